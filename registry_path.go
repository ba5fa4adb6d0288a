// registry_path.go: parses the paths of the registry API, in all the shapes that
// clients make of a mirror's address.

package main

import (
	"net/http"
	"net/url"
	"path"
	"regexp"
	"strings"
)

// parseCall parses the URL of a request to the registry. Its path has one of these
// shapes, where OPERATION is manifests/REFERENCE, blobs/DIGEST, tags/list or
// referrers/DIGEST:
//
//	/v2/                             the registry itself
//	/v2/{remote}/IMAGE/OPERATION     the remote is part of the image's name
//	/v2/{remote}/v2/IMAGE/OPERATION  a mirror's URL with the path /v2/{remote}
//	/{remote}/v2/IMAGE/OPERATION     a mirror's URL with the path /{remote}
//	/v2/IMAGE/OPERATION?ns=REGISTRY  the remote whose registry is ns (containerd)
//
// Its errors are registryErrors. A call with an error still has the remote, if that
// is known, for the log.
func parseCall(cfg *config, u *url.URL) (*registryCall, error) {
	c := &registryCall{path: trimEmptySegments(u.EscapedPath())}
	var query url.Values
	if u.RawQuery != "" {
		query, _ = url.ParseQuery(u.RawQuery) // malformed parameters are ignored
		c.ns = query.Get("ns")
		query.Del("ns")
	}
	path, ns := trimEmptySegments(u.Path), c.ns
	first, rest, _ := strings.Cut(path, "/")
	if first != "v2" { // /{remote}/v2/... is /v2/{remote}/v2/..., and no ns counts beside the remote
		rest, ns = path, ""
	}
	if err := c.parseBelowV2(cfg, rest, ns); err != nil || c.route == routePing {
		return c, err
	}
	if c.remote.registry == "docker.io" && !strings.Contains(c.image, "/") {
		c.image = "library/" + c.image // Docker Hub's name for its official images
	}
	if c.route == routeTags || c.route == routeReferrers {
		c.query = query.Encode() // all of it: some registries number pages with parameters of their own
	}
	return c, c.checkNames()
}

// parseBelowV2 parses the part of a path behind /v2/. A docker remote of the name of
// the first element is preferred to the one whose registry is ns.
func (c *registryCall) parseBelowV2(cfg *config, rest, ns string) error {
	if rest = trimEmptySegments(rest); rest == "" {
		return nil
	}
	name, hasOperation := c.splitOperation(rest)
	if !hasOperation && path.Base(name) == "_catalog" {
		return errNoCatalog
	}
	first, image, _ := strings.Cut(name, "/")
	image = trimEmptySegments(image)
	if v2, rest, isFolder := strings.Cut(image, "/"); v2 == "v2" && (isFolder || !hasOperation) {
		image = trimEmptySegments(rest) // clients append /v2/IMAGE to a mirror's URL, whatever its path is
	}
	rem, ofNS := cfg.remotes[first], cfg.registries[strings.ToLower(ns)]
	switch isDocker := rem != nil && rem.packageType == "docker"; {
	case isDocker && (image != "" || !hasOperation):
		c.remote, c.image = rem, image
	case ofNS != nil:
		c.remote, c.image = ofNS, name
	case isDocker:
		return newRegistryError("NAME_UNKNOWN", http.StatusNotFound, "the path names no image: use /v2/%s/IMAGE/...", first)
	case rem != nil:
		e := newRegistryError("NAME_UNKNOWN", http.StatusNotFound, "remote %q is not a container registry: its files are below %s", first, rem.urlPath())
		e.detail = map[string]string{"location": rem.urlPath()}
		return e
	case ns != "":
		return newRegistryError("NAME_UNKNOWN", http.StatusNotFound, "no docker remote is named %.100q, and none has the registry %.100q", first, ns)
	default:
		return newRegistryError("NAME_UNKNOWN", http.StatusNotFound, "there is no docker remote %.100q", first)
	}
	if !hasOperation && c.image != "" {
		return errNoRoute
	}
	return nil
}

// splitOperation cuts the operation off the end of a path, sets c's route and
// reference, and returns the name before it, or all of it if there is no operation. An
// image's name may have an element like "tags" or "blobs" before that.
func (c *registryCall) splitOperation(rest string) (name string, hasOperation bool) {
	i := strings.LastIndexByte(rest, '/')
	j := strings.LastIndexByte(rest[:max(i, 0)], '/')
	if j < 1 {
		return rest, false
	}
	switch route, reference := rest[j+1:i], rest[i+1:]; {
	case route == routeTags && reference == "list":
		c.route = route
	case route == routeManifest, route == routeBlob, route == routeReferrers:
		c.route, c.reference = route, reference
	default:
		return rest, false
	}
	return rest[:j], true
}

// checkNames refuses names, tags and digests that no registry can have. It sets c.digest
// if the reference is one.
func (c *registryCall) checkNames() error {
	switch {
	case !imagePattern.MatchString(c.image):
		return newRegistryError("NAME_INVALID", http.StatusBadRequest, "%.300q is not a valid image name", c.image)
	case c.route == routeTags:
		return nil
	case isDigest(c.reference):
		c.digest = c.reference
		return nil
	case c.route != routeManifest, strings.Contains(c.reference, ":"):
		return newRegistryError("DIGEST_INVALID", http.StatusBadRequest, "%.200q is not a digest: use sha256:HEX or sha512:HEX in lower case", c.reference)
	case !isTag(c.reference):
		return newRegistryError("MANIFEST_UNKNOWN", http.StatusNotFound, "%.200q is not a valid tag", c.reference)
	}
	return nil
}

// imagePattern matches the name of an image (OCI distribution specification).
var imagePattern = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|__?|-+|/)[a-z0-9]+)*$`)

// isTag reports whether s is a tag: letters, digits and "._-", at most 128 of them,
// the first one neither "." nor "-" (OCI distribution specification).
func isTag(s string) bool {
	return s != "" && len(s) <= 128 && s[0] != '.' && s[0] != '-' &&
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == ""
}
