// remotes_keys.go: the keys that a remote in remotes.yaml may have: how each is read
// and checked, and what /config answers for it.

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
	name        string // as in the file; a key of a block has the block's name before it: cache.mutable_ttl
	onType      string // remote or local, the type that may have it; "" for both
	docker      bool   // for package docker only
	defaultText string // the default as README.md documents it, which a test compares
	// set reads the value n of the key into r and reports its mistakes to c. It is
	// nil for a block, and for the keys of a mirror, which setMirrors reads.
	set func(c *configReader, r *remote, n *yaml.Node)
	// publicValue returns the effective value for /config. A nil result leaves the
	// key out.
	publicValue func(r *remote) any
}

// remoteKeys lists every key of a remote; any other key is refused. The order is
// the one in which they are read: type and package come first, because they decide
// which other keys are allowed, and base_url comes before mirrors.
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

// builtinPatterns are the mutable patterns of each package; its keys are all
// packages that there are. The pattern for repodata begins with plain text although
// (^|/) would be more exact: with a literal prefix it is ten times as fast, and it is
// tried on every request. A path that it matches by mistake is only revalidated more
// often.
var builtinPatterns = map[string][]*regexp.Regexp{
	"generic": nil,
	"alpine":  {regexp.MustCompile(`APKINDEX\.tar\.gz$`)},
	"rpm": {
		regexp.MustCompile(`repomd\.xml$`),
		regexp.MustCompile(`repodata/.*\.(?:xml|sqlite|yaml|asc|txt)(?:\.(?:gz|bz2|xz|zst|zck|lzma))?$`),
		regexp.MustCompile(`Packages\.gz$`),
	},
	// A reference with a colon is a digest and immutable; a tag has no colon (OCI
	// distribution spec, "Pulling manifests").
	"docker": {
		regexp.MustCompile(`/manifests/[^/:]+$`),
		regexp.MustCompile(`/tags/list$`),
		regexp.MustCompile(`/referrers/[^/]+$`),
	},
}

// laterPackages are packages that are planned. They have an error message of their
// own.
var laterPackages = []string{"deb", "go", "npm", "pypi", "helm", "maven"}

// reservedNames are the first path elements of our own endpoints. A remote must not
// have such a name, which would be confused with the endpoint in logs and metrics.
var reservedNames = []string{"api", "artifacts", "cache-artifact", "config", "health", "metrics", "v1", "v2"}

// ownHeaders are request headers that artifactapi or net/http sets. A configured one
// would be ignored, or would break ranges and revalidation.
var ownHeaders = []string{
	"Accept-Encoding", "Connection", "Content-Length", "Expect", "Host", "If-Match", "If-Modified-Since",
	"If-None-Match", "If-Range", "If-Unmodified-Since", "Keep-Alive", "Proxy-Connection", "Range", "Te",
	"Trailer", "Transfer-Encoding", "Upgrade",
}

// setType reads type. With another value the other keys are not checked against the
// type.
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

// setPackage reads package. With a bad value the other keys are not checked against
// the package.
func setPackage(c *configReader, r *remote, n *yaml.Node) {
	var s string
	ok := c.readString(n, &s)
	_, known := builtinPatterns[s]
	switch {
	case known && s == "docker" && r.local:
		c.addValueError(n, "\"docker\" cannot be of type \"local\": artifactapi only mirrors registries, images are pushed to the registry itself")
	case known:
		r.packageType = s
		return
	case slices.Contains(laterPackages, s):
		c.addValueError(n, "%q is not supported yet: use \"generic\" with mutable_patterns for its index files", s)
	case ok:
		c.addValueError(n, "must be generic, alpine, rpm or docker%s", quoteValue(n))
	}
	c.typeUnknown = true
}

// setBaseURL reads base_url. It is read before mirrors, so it is the first origin.
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
		urlNode := item
		if item.Kind == yaml.MappingNode {
			fields := map[string]yamlField{}
			c.collectKeys(item, "mirrors.", fields)
			if f, ok := fields["mirrors.auth"]; ok {
				c.key = "mirrors.auth"
				c.readBool(f.value, &o.auth)
			}
			c.key = "mirrors.url"
			if urlNode = fields["mirrors.url"].value; urlNode == nil {
				c.addValueError(item, "is missing: say where the mirror is")
				continue
			}
		}
		if o.url = c.readURL(urlNode, false); o.url != nil {
			o.url = withoutTrailingSlash(o.url)
			r.origins = append(r.origins, o)
		}
	}
}

// setUsername reads username. Basic authorization ends the username at the first
// colon (RFC 7617 section 2).
func setUsername(c *configReader, r *remote, n *yaml.Node) {
	if c.readString(n, &r.username) && strings.Contains(r.username, ":") {
		c.addValueError(n, "must not hold a colon (RFC 7617): put what follows it into password")
	}
}

// setHeaders reads headers, a mapping from names to values.
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
		case !headerPattern.MatchString(k.Value): // not quoted: it may be a whole header with a secret value
			c.addValueError(k, "has an invalid header name: write NAME: \"value\"")
		case slices.Contains(ownHeaders, name):
			c.addValueError(k, "must not hold %s, which artifactapi or HTTP sets: remove it", name)
		case r.headers[name] != nil:
			c.addValueError(k, "has %s twice (upper and lower case are the same): keep one", name)
		default:
			c.key = "headers: " + name
			r.headers[name] = []string{""}
			c.readHeaderValue(v, &r.headers[name][0])
		}
	}
}

// readHeaderValue reads the value of one header. It refuses a line break, which would
// begin another header.
func (c *configReader) readHeaderValue(n *yaml.Node, dst *string) {
	if c.readString(n, dst) && strings.ContainsFunc(*dst, func(r rune) bool { return (r < ' ' && r != '\t') || r == 0x7f }) {
		c.addValueError(n, "holds a line break or a control character: remove it (a variable that was set from a file often ends in one)")
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

// setRegistry reads registry. Two remotes must not have the same one.
func setRegistry(c *configReader, r *remote, n *yaml.Node) {
	var s string
	if !c.readString(n, &s) {
		return
	}
	if r.registry = strings.ToLower(s); !registryPattern.MatchString(s) {
		c.addValueError(n, "must be a host such as docker.io or quay.io:443, without https:// and without a path")
		return
	}
	if first, ok := c.registries[r.registry]; ok {
		c.addValueError(n, "is already the registry of another remote (line %d): clients could not tell the two apart, so remove one", first)
		return
	}
	c.registries[r.registry] = n.Line
}

// setTokenRealm reads token_realm, a URL that may have a query.
func setTokenRealm(c *configReader, r *remote, n *yaml.Node) { r.tokenRealm = c.readURL(n, true) }

// setWriteToken reads write_token. No client could send a line break in a header.
func setWriteToken(c *configReader, r *remote, n *yaml.Node) {
	if c.readString(n, (*string)(&r.writeToken)) && strings.ContainsAny(string(r.writeToken), "\r\n") {
		c.addValueError(n, "holds a line break: remove it (a variable that was set from a file often ends in one)")
	}
}

// parseUpstreamURL parses an absolute http or https URL. complaint is "", or says
// what is wrong with s and how to cure it. It never quotes s, which may hold a
// password.
func parseUpstreamURL(s string, withQuery bool) (u *url.URL, complaint string) {
	if l := strings.ToLower(s); !strings.HasPrefix(l, "http://") && !strings.HasPrefix(l, "https://") {
		return nil, "must begin with http:// or https://"
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, "is not a URL: write https://HOST:PORT/PATH, and put credentials into username and password"
	}
	switch {
	case u.User != nil:
		return nil, "holds credentials: move them to username and password"
	case u.Hostname() == "":
		return nil, "has no host: write https://HOST/PATH"
	case hasBadPort(u):
		return nil, "has an invalid port: ports are 1 to 65535"
	case !withQuery && (u.RawQuery != "" || u.ForceQuery):
		return nil, "holds a query (?): remove it, the query of a request comes from the client"
	case strings.Contains(s, "#"):
		return nil, "holds a fragment (#): remove it"
	}
	u.Host = strings.ToLower(u.Host)
	return u, ""
}

// hasBadPort reports whether u has a port, or a colon for one, that is not 1 to 65535.
func hasBadPort(u *url.URL) bool {
	port, err := strconv.Atoi(u.Port())
	return strings.HasSuffix(u.Host, ":") || (u.Port() != "" && (err != nil || port < 1 || port > math.MaxUint16))
}

// withoutTrailingSlash returns u without the slashes at the end of its path, so that
// joinURL can append one and a spelling. Only scheme, host and path are kept.
func withoutTrailingSlash(u *url.URL) *url.URL {
	escaped := strings.TrimRight(u.EscapedPath(), "/")
	w := &url.URL{Scheme: u.Scheme, Host: u.Host}
	w.Path, _ = url.PathUnescape(escaped) // EscapedPath is well-formed
	if w.EscapedPath() != escaped {
		w.RawPath = escaped
	}
	return w
}

// hasPattern reports whether list has a pattern with that text.
func hasPattern(list []*regexp.Regexp, text string) bool {
	return slices.ContainsFunc(list, func(p *regexp.Regexp) bool { return p.String() == text })
}

// parseSize parses a number of bytes, such as 1073741824, 50GiB, 1.5 TiB or 500MB.
// Its error begins with "must be" and does not name the key.
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
	exponent := 0.0
	if unit != "" {
		exponent = float64(strings.IndexByte("BKMGT", unit[0]))
	}
	number, err := strconv.ParseFloat(m[1], 64)
	if v := number * math.Pow(base, exponent); err == nil && v < math.MaxInt64 {
		return int64(v), nil
	}
	return 0, errors.New("must be a size below 8388608TiB")
}

// publicView returns the effective configuration for /config, ready for
// encoding/json: every key that applies to a remote, with its default if the file
// does not have it, and "***" instead of secrets.
func (c *config) publicView() any {
	all := map[string]any{}
	for name, r := range c.remotes {
		all[name] = r.publicView()
	}
	return map[string]any{"remotes": all}
}

// publicView returns the keys of r with their effective values, as remotes.yaml would
// have them.
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

// typeName returns the value of r's key type.
func (r *remote) typeName() string {
	if r.local {
		return "local"
	}
	return "remote"
}

// publicBaseURL returns base_url. It has no credentials: readURL refuses them.
func publicBaseURL(r *remote) any { return r.origins[0].url.String() }

// publicMirrors returns the mirrors with their auth, or nil if there are none.
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

// publicPatterns returns a list of patterns, or nil for an empty one.
func publicPatterns(list []*regexp.Regexp) any {
	if len(list) == 0 {
		return nil
	}
	return list // encoding/json writes a Regexp as its text
}

// publicHeaders returns the names of the headers. The values may be secrets.
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

// publicTokenRealm returns token_realm, or nil.
func publicTokenRealm(r *remote) any {
	if r.tokenRealm == nil {
		return nil
	}
	return r.tokenRealm.String()
}

// wholeSeconds returns d as remotes.yaml has it.
func wholeSeconds(d time.Duration) any { return int64(d / time.Second) }

// nilIfZero returns v, or nil if v is the zero value, which means that the file does
// not have the key.
func nilIfZero[T comparable](v T) any {
	var zero T
	if v == zero {
		return nil
	}
	return v
}
