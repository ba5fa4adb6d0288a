// registry_path.go: what a path below /v2/ means, in all the shapes that clients
// use.

package main

import (
	"net/http"
	"net/url"
	"strings"
)

// parseCall understands a path in any of the shapes of SPEC.md section 6. Its
// errors are coded.
func parseCall(cfg *config, u *url.URL) (*registryCall, error) {
	c := &registryCall{path: u.EscapedPath()}
	var query url.Values
	if u.RawQuery != "" {
		query, _ = url.ParseQuery(u.RawQuery) // what is malformed counts as absent
		c.ns = query.Get("ns")
		query.Del("ns")
	}
	first, rest, _ := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	var err error
	if first == "v2" {
		err = c.parseBelowV2(cfg, rest)
	} else {
		_, rest, _ = strings.Cut(rest, "/") // "v2"
		err = c.parseBelowRemote(cfg, first, rest)
	}
	if err != nil || c.route == routePing {
		return c, err
	}
	if c.remote.registry == "docker.io" && !strings.Contains(c.image, "/") {
		c.image = "library/" + c.image
	}
	if c.route == routeTags || c.route == routeReferrers {
		c.query = query.Encode() // all of it: some registries name pages by parameters of their own
	}
	return c, c.checkNames()
}

// parseBelowV2 reads what is behind /v2/.
func (c *registryCall) parseBelowV2(cfg *config, rest string) error {
	if rest == "" {
		return nil
	}
	name, ok := c.splitOperation(rest)
	if !ok {
		name = rest
	}
	first, image, _ := strings.Cut(name, "/")
	rem := dockerRemote(cfg, first)
	switch {
	case !ok && rem != nil && (image == "" || image == "v2" || image == "v2/"):
		c.remote = rem
		return nil
	case !ok && rem != nil:
		c.remote = rem
		return newNoRouteError()
	case rem != nil && image != "":
		// What a client makes of a mirror's URL that has a path.
		if inner, ok := strings.CutPrefix(image, "v2/"); ok {
			image = inner
		}
	default:
		if rem = cfg.remoteByRegistry(c.ns); rem == nil || c.ns == "" {
			return newUnknownNameError(cfg, first, c.ns)
		}
		image = name
	}
	if !ok {
		return newNoRouteError()
	}
	c.remote, c.image = rem, image
	return nil
}

// parseBelowRemote reads what is behind /{remote}/v2/.
func (c *registryCall) parseBelowRemote(cfg *config, name, rest string) error {
	if c.remote = dockerRemote(cfg, name); c.remote == nil {
		return newUnknownNameError(cfg, name, "")
	}
	if rest == "" {
		return nil
	}
	image, ok := c.splitOperation(rest)
	if !ok {
		return newNoRouteError()
	}
	c.image = image
	return nil
}

// splitOperation takes the operation off the end of a path, because names may hold the
// words of the routes themselves. What is left is the name.
func (c *registryCall) splitOperation(rest string) (name string, ok bool) {
	if name, ok := strings.CutSuffix(rest, "/tags/list"); ok {
		c.route = routeTags
		return name, name != ""
	}
	i := strings.LastIndexByte(rest, '/')
	j := strings.LastIndexByte(rest[:max(i, 0)], '/')
	if j < 1 {
		return "", false
	}
	switch k := registryRoute(rest[j+1 : i]); k {
	case routeManifest, routeBlob, routeReferrers:
		c.route, c.reference = k, rest[i+1:]
		return rest[:j], true
	}
	return "", false
}

// dockerRemote is the registry remote of that name, or nil.
func dockerRemote(cfg *config, name string) *remote {
	if r := cfg.remotes[name]; r != nil && r.packageType == "docker" {
		return r
	}
	return nil
}

// checkNames refuses what no registry can have, before anyone is asked.
func (c *registryCall) checkNames() error {
	if !isImageName(c.image) {
		return newRegistryError(codeNameInvalid, http.StatusBadRequest, "%.300q is no name of an image", c.image)
	}
	if c.route == routeTags {
		return nil
	}
	if isDigest(c.reference) {
		c.digest = c.reference
		return nil
	}
	if c.route != routeManifest || strings.Contains(c.reference, ":") {
		return newRegistryError(codeDigestInvalid, http.StatusBadRequest, "%.200q is no digest: sha256 and sha512 in lower case are", c.reference)
	}
	if !isTag(c.reference) {
		return newRegistryError(codeManifestUnknown, http.StatusNotFound, "%.200q can be no tag", c.reference)
	}
	return nil
}

// isImageName reports whether s is the name of an image: runs of a-z0-9 with one
// separator between two of them.
func isImageName(s string) bool {
	for {
		rest := strings.TrimLeft(s, "abcdefghijklmnopqrstuvwxyz0123456789")
		if len(rest) == len(s) {
			return false // empty, or a separator without a run
		}
		if rest == "" {
			return true
		}
		n := len(rest) - len(strings.TrimLeft(rest, "._-/"))
		switch sep := rest[:n]; sep {
		case ".", "_", "__", "/":
		default:
			if strings.Trim(sep, "-") != "" || n == 0 {
				return false
			}
		}
		s = rest[n:]
	}
}

// isTag: a word of letters, digits and ._- that does not begin with . or -.
func isTag(s string) bool {
	if s == "" || len(s) > maxTag || s[0] == '.' || s[0] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !(unescapedBytes[c] && c != '/' && c != '~') {
			return false
		}
	}
	return true
}

// isDigest: the algorithms we can verify, in the one spelling they have.
func isDigest(s string) bool {
	algorithm, sum, _ := strings.Cut(s, ":")
	if strings.Trim(sum, "0123456789abcdef") != "" {
		return false
	}
	return algorithm == "sha256" && len(sum) == 64 || algorithm == "sha512" && len(sum) == 128
}
