// remotes_keys.go: the keys that a remote of remotes.yaml may have: how each is
// read and checked, and how /config shows it.

package main

import (
	"errors"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"
)

// remoteKey is one key that an entry of remotes.yaml may have.
type remoteKey struct {
	name        string // as in the file; below a block with the block's name: cache.mutable_ttl
	onType      string // the type that has it, remote or local; "" for both
	docker      bool   // for package docker only
	defaultText string // default, as README's table gives it
	// set reads the key's value into r; nil for a block and for the keys of a
	// mirror, which setMirrors reads.
	set func(c *configReader, r *remote, n *yaml.Node)
	// publicValue is the effective value for /config; nil leaves the key out.
	publicValue func(r *remote) any
}

// remoteKeys is every key of a remote. Whatever is not here is refused. It is
// in the order in which the keys are read: type and package decide what the
// others mean, base_url goes before its mirrors.
var remoteKeys = []remoteKey{
	{name: "type", defaultText: "remote", set: setType, publicValue: func(r *remote) any { return r.typeName() }},
	{name: "package", defaultText: "generic", set: setPackage, publicValue: func(r *remote) any { return r.packageType }},
	{name: "description", defaultText: "none",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readString(n, &r.description) },
		publicValue: func(r *remote) any { return nilIfZero(r.description) }},
	{name: "base_url", onType: "remote", defaultText: "required", set: setBaseURL, publicValue: publicBaseURL},
	{name: "mirrors", onType: "remote", defaultText: "none", set: setMirrors, publicValue: publicMirrors},
	{name: "mirrors.url", onType: "remote", defaultText: "required"},
	{name: "mirrors.auth", onType: "remote", defaultText: "false"},
	{name: "immutable_patterns", defaultText: "everything is allowed",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readPatterns(n, &r.immutable) },
		publicValue: func(r *remote) any { return publicPatterns(r.immutable) }},
	{name: "mutable_patterns", defaultText: "none beside the built-in ones",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readPatterns(n, &r.mutable) },
		publicValue: func(r *remote) any { return publicPatterns(r.mutable) }},
	{name: "check_mutable_updates", onType: "remote", defaultText: "false",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readBool(n, &r.checkMutable) },
		publicValue: func(r *remote) any { return r.checkMutable }},
	{name: "check_builtin_updates", onType: "remote", defaultText: "false",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readBool(n, &r.checkBuiltin) },
		publicValue: func(r *remote) any { return r.checkBuiltin }},
	{name: "username", onType: "remote", defaultText: "none", set: setUsername,
		publicValue: func(r *remote) any { return nilIfZero(r.username) }},
	{name: "password", onType: "remote", defaultText: "none",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readString(n, (*string)(&r.password)) },
		publicValue: func(r *remote) any { return nilIfZero(r.password) }},
	{name: "headers", onType: "remote", defaultText: "none", set: setHeaders, publicValue: publicHeaders},
	{name: "stale_if_error", onType: "remote", defaultText: "false",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readBool(n, &r.staleIfError) },
		publicValue: func(r *remote) any { return r.staleIfError }},
	{name: "negative_ttl", onType: "remote", defaultText: "0",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readSeconds(n, 0, &r.negativeTTL) },
		publicValue: func(r *remote) any { return wholeSeconds(r.negativeTTL) }},
	{name: "timeout", onType: "remote", defaultText: "30",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readSeconds(n, 1, &r.timeout) },
		publicValue: func(r *remote) any { return wholeSeconds(r.timeout) }},
	{name: "cache", defaultText: "as its keys say"},
	{name: "cache.immutable_ttl", defaultText: "0",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readSeconds(n, 0, &r.immutableTTL) },
		publicValue: func(r *remote) any { return wholeSeconds(r.immutableTTL) }},
	{name: "cache.mutable_ttl", defaultText: "3600",
		set:         func(c *configReader, r *remote, n *yaml.Node) { c.readSeconds(n, 0, &r.mutableTTL) },
		publicValue: func(r *remote) any { return wholeSeconds(r.mutableTTL) }},
	{name: "cache.max_size", onType: "remote", defaultText: "none", set: setMaxSize,
		publicValue: func(r *remote) any { return nilIfZero(r.maxSize) }},
	{name: "registry", onType: "remote", docker: true, defaultText: "host of base_url", set: setRegistry,
		publicValue: func(r *remote) any { return r.registry }},
	{name: "token_realm", onType: "remote", docker: true, defaultText: "none", set: setTokenRealm, publicValue: publicTokenRealm},
	{name: "write_token", onType: "local", defaultText: "none", set: setWriteToken,
		publicValue: func(r *remote) any { return nilIfZero(r.writeToken) }},
}

// builtinPatterns are the mutable patterns that each package brings along; its
// keys are the packages there are. The one below repodata begins with plain
// text although (^|/) would be more exact: a literal prefix makes it ten times
// as fast on every request, and a path that it takes wrongly is only
// revalidated more often.
var builtinPatterns = map[string][]*regexp.Regexp{
	"generic": nil,
	"alpine":  {regexp.MustCompile(`APKINDEX\.tar\.gz$`)},
	"rpm": {
		regexp.MustCompile(`repomd\.xml$`),
		regexp.MustCompile(`repodata/.*\.(?:xml|sqlite|yaml|asc|txt)(?:\.(?:gz|bz2|xz|zst|zck|lzma))?$`),
		regexp.MustCompile(`Packages\.gz$`),
	},
	// A digest has a colon, a tag never has.
	"docker": {
		regexp.MustCompile(`/manifests/[^/:]+$`),
		regexp.MustCompile(`/tags/list$`),
		regexp.MustCompile(`/referrers/[^/]+$`),
	},
}

// laterPackages are named in the contract but not built yet.
var laterPackages = []string{"deb", "go", "npm", "pypi", "helm", "maven"}

// reservedNames are first path elements of our own.
var reservedNames = []string{"api", "artifacts", "cache-artifact", "config", "health", "metrics", "v1", "v2"}

// ownHeaders are set by us or by the protocol; a configured one would be
// ignored or would break ranges and revalidation.
var ownHeaders = []string{
	"Accept-Encoding", "Connection", "Content-Length", "Expect", "Host", "If-Match", "If-Modified-Since",
	"If-None-Match", "If-Range", "If-Unmodified-Since", "Keep-Alive", "Proxy-Connection", "Range", "Te",
	"Trailer", "Transfer-Encoding", "Upgrade",
}

// setType reads type. What r is stays open when it is neither.
func setType(c *configReader, r *remote, n *yaml.Node) {
	var s string
	ok := c.readString(n, &s)
	if s != "remote" && s != "local" {
		if ok {
			c.addValueError(n, "must be \"remote\" or \"local\"%s", quoteValue(n))
		}
		c.typeUnknown = true
		return
	}
	r.local = s == "local"
}

// setPackage reads package.
func setPackage(c *configReader, r *remote, n *yaml.Node) {
	var s string
	ok := c.readString(n, &s)
	_, known := builtinPatterns[s]
	switch {
	case known && s == "docker" && r.local:
		c.addValueError(n, "\"docker\" cannot be of type \"local\": images are pushed to a registry, artifactapi only mirrors one")
	case known:
		r.packageType = s
		return
	case slices.Contains(laterPackages, s):
		c.addValueError(n, "%q is not built yet: use \"generic\" with mutable_patterns for its index files", s)
	case ok:
		c.addValueError(n, "must be generic, alpine, rpm or docker%s", quoteValue(n))
	}
	c.typeUnknown = true
}

// setBaseURL reads base_url; it is the first key that adds an origin.
func setBaseURL(c *configReader, r *remote, n *yaml.Node) {
	if u := c.readURL(n, false); u != nil {
		r.origins = append(r.origins, origin{withoutTrailingSlash(u), true})
	}
}

// setMirrors reads a list of URLs, or of mappings with url and auth.
func setMirrors(c *configReader, r *remote, n *yaml.Node) {
	if n.Kind != yaml.SequenceNode {
		c.addValueError(n, "must be a list of URLs or of {url: URL, auth: true}")
		return
	}
	for _, item := range n.Content {
		c.key = "mirrors"
		var o origin
		place := item
		if item.Kind == yaml.MappingNode {
			fields := map[string]yamlField{}
			c.collectKeys(item, "mirrors.", fields)
			if f, ok := fields["mirrors.auth"]; ok {
				c.key = "mirrors.auth"
				c.readBool(f.value, &o.auth)
			}
			c.key = "mirrors.url"
			if place = fields["mirrors.url"].value; place == nil {
				c.addValueError(item, "is missing: say where the mirror is")
				continue
			}
		}
		if o.url = c.readURL(place, false); o.url != nil {
			o.url = withoutTrailingSlash(o.url)
			r.origins = append(r.origins, o)
		}
	}
}

// setUsername reads username, which Basic separates by a colon.
func setUsername(c *configReader, r *remote, n *yaml.Node) {
	if c.readString(n, &r.username) && strings.Contains(r.username, ":") {
		c.addValueError(n, "cannot hold a colon (RFC 7617): what follows it belongs into password")
	}
}

// setHeaders reads the mapping from names to values.
func setHeaders(c *configReader, r *remote, n *yaml.Node) {
	if n.Kind != yaml.MappingNode {
		c.addValueError(n, "must be a mapping such as {X-Token: \"...\"}")
		return
	}
	r.headers = http.Header{}
	for k, v := range mappingPairs(n) {
		c.key = "headers"
		name := http.CanonicalHeaderKey(k.Value)
		switch {
		case k.Kind == yaml.AliasNode || k.ShortTag() == "!!merge":
		case !headerPattern.MatchString(k.Value): // not quoted: it may be a whole header with its value
			c.addValueError(k, "has a name that is none: write NAME: \"value\"")
		case slices.Contains(ownHeaders, name):
			c.addValueError(k, "cannot hold %s, which artifactapi or HTTP sets: remove it", name)
		case r.headers[name] != nil:
			c.addValueError(k, "has %s twice (upper and lower case are the same): keep one", name)
		default:
			c.key = "headers: " + name
			r.headers[name] = []string{""}
			c.readHeaderValue(v, &r.headers[name][0])
		}
	}
}

// readHeaderValue reads one value; a line break in it would begin another header.
func (c *configReader) readHeaderValue(n *yaml.Node, dst *string) {
	if c.readString(n, dst) && strings.ContainsFunc(*dst, func(r rune) bool { return (r < ' ' && r != '\t') || r == 0x7f }) {
		c.addValueError(n, "holds a line break or a control character: remove it (often the end of a file put into a variable)")
	}
}

// setMaxSize reads cache.max_size.
func setMaxSize(c *configReader, r *remote, n *yaml.Node) {
	var s string
	if !c.readString(n, &s) {
		return
	}
	v, err := parseSize(s)
	if err != nil {
		c.addValueError(n, "%v%s", err, quoteValue(n))
	}
	r.maxSize = v
}

// setRegistry reads registry, which must name one remote only.
func setRegistry(c *configReader, r *remote, n *yaml.Node) {
	var s string
	if !c.readString(n, &s) {
		return
	}
	if r.registry = strings.ToLower(s); !registryPattern.MatchString(s) {
		c.addValueError(n, "must be a host such as docker.io or quay.io:443, without https:// and path")
		return
	}
	if first, ok := c.registries[r.registry]; ok {
		c.addValueError(n, "is that of another remote (line %d): clients could not tell them apart, so give it to one only", first)
		return
	}
	c.registries[r.registry] = n.Line
}

// setTokenRealm reads token_realm.
func setTokenRealm(c *configReader, r *remote, n *yaml.Node) { r.tokenRealm = c.readURL(n, true) }

// setWriteToken reads write_token. A line break could not be sent by any client.
func setWriteToken(c *configReader, r *remote, n *yaml.Node) {
	if c.readString(n, (*string)(&r.writeToken)) && strings.ContainsAny(string(r.writeToken), "\r\n") {
		c.addValueError(n, "holds a line break: remove it (often the end of a file put into a variable)")
	}
}

// parseUpstreamURL reads an absolute http(s) URL, or says what is wrong with
// it without quoting any of it.
func parseUpstreamURL(s string, withQuery bool) (u *url.URL, complaint string) {
	if l := strings.ToLower(s); !strings.HasPrefix(l, "http://") && !strings.HasPrefix(l, "https://") {
		return nil, "must begin with http:// or https://"
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, "is not a URL: write https://HOST:PORT/PATH, and credentials into username and password"
	}
	switch {
	case u.User != nil:
		return nil, "holds credentials: move them to username and password"
	case u.Hostname() == "":
		return nil, "has no host: write https://HOST/PATH"
	case hasBadPort(u):
		return nil, "has a port that is none: ports are 1 to 65535"
	case !withQuery && (u.RawQuery != "" || u.ForceQuery):
		return nil, "holds a query (?): remove it, clients send theirs"
	case strings.Contains(s, "#"):
		return nil, "holds a fragment (#): remove it"
	}
	u.Host = strings.ToLower(u.Host)
	return u, ""
}

// hasBadPort reports whether u has a port that is none.
func hasBadPort(u *url.URL) bool {
	port, err := strconv.Atoi(u.Port())
	return strings.HasSuffix(u.Host, ":") || (u.Port() != "" && (err != nil || port < 1 || port > math.MaxUint16))
}

// withoutTrailingSlash drops the slashes at the end of u's path, so that a spelling
// goes behind it with exactly one.
func withoutTrailingSlash(u *url.URL) *url.URL {
	escaped := strings.TrimRight(u.EscapedPath(), "/")
	w := &url.URL{Scheme: u.Scheme, Host: u.Host}
	w.Path, _ = url.PathUnescape(escaped) // came from EscapedPath: it is well-formed
	if w.EscapedPath() != escaped {
		w.RawPath = escaped
	}
	return w
}

// hasPattern reports whether list has a pattern of that text.
func hasPattern(list []*regexp.Regexp, text string) bool {
	return slices.ContainsFunc(list, func(p *regexp.Regexp) bool { return p.String() == text })
}

// parseSize reads a number of bytes: 1073741824, 50GiB, 1.5 TiB, 500MB.
func parseSize(s string) (int64, error) {
	m := sizePattern.FindStringSubmatch(s)
	if m == nil {
		return 0, errors.New("must be a size such as 50GiB or 500MB")
	}
	unit := strings.ToUpper(m[2])
	base := 1000.0
	if strings.Contains(unit, "I") {
		base = 1024
	}
	power := 0.0
	if unit != "" {
		power = float64(strings.IndexByte("BKMGT", unit[0]))
	}
	number, err := strconv.ParseFloat(m[1], 64)
	if v := number * math.Pow(base, power); err == nil && v < math.MaxInt64 {
		return int64(v), nil
	}
	return 0, errors.New("must be a size below 8388608TiB")
}

// publicView is the effective configuration for /config, ready for encoding/json:
// every key that applies, with its default where the file says nothing, and
// "***" for secrets.
func (c *config) publicView() any {
	all := map[string]any{}
	for name, r := range c.remotes {
		all[name] = r.publicView()
	}
	return map[string]any{"remotes": all}
}

// publicView is what the file could say to mean r.
func (r *remote) publicView() map[string]any {
	cache := map[string]any{}
	m := map[string]any{"cache": cache}
	for _, k := range remoteKeys {
		if k.publicValue == nil || (k.onType != "" && k.onType != r.typeName()) || (k.docker && r.packageType != "docker") {
			continue
		}
		v := k.publicValue(r)
		if v == nil {
			continue
		}
		if name, ok := strings.CutPrefix(k.name, "cache."); ok {
			cache[name] = v
		} else {
			m[k.name] = v
		}
	}
	return m
}

// typeName is the word for r's type.
func (r *remote) typeName() string {
	if r.local {
		return "local"
	}
	return "remote"
}

func publicBaseURL(r *remote) any { return r.origins[0].url.String() }

func publicMirrors(r *remote) any {
	var l []map[string]any
	for _, o := range r.origins[1:] {
		l = append(l, map[string]any{"url": o.url.String(), "auth": o.auth})
	}
	if l == nil {
		return nil
	}
	return l
}

func publicPatterns(list []*regexp.Regexp) any {
	if len(list) == 0 {
		return nil
	}
	return list // a Regexp marshals as its text
}

func publicHeaders(r *remote) any {
	if len(r.headers) == 0 {
		return nil
	}
	m := map[string]secret{}
	for name := range r.headers {
		m[name] = secret(r.headers.Get(name))
	}
	return m
}

func publicTokenRealm(r *remote) any {
	if r.tokenRealm == nil {
		return nil
	}
	return r.tokenRealm.String()
}

func wholeSeconds(d time.Duration) any { return int64(d / time.Second) }

// nilIfZero is v, or nil for what was not given.
func nilIfZero[T comparable](v T) any {
	var zero T
	if v == zero {
		return nil
	}
	return v
}
