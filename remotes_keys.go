// remotes_keys.go: the keys that a remote in remotes.yaml may have: how each is read
// and checked, and what /config answers for it.

package main

import (
	"errors"
	"math"
	"net/http"
	"net/url"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"gopkg.in/yaml.v3"
)

// remoteKey is one key that an entry of remotes.yaml may have.
type remoteKey struct {
	name        string // as in the file; a key of a block has the block's name before it: cache.mutable_ttl
	onType      string // remote or local, the type that may have it; "" for both
	docker      bool   // for package docker only
	defaultText string // the default as README.md documents it, which a test compares
	minimum     int64  // of a number of seconds
	// field returns a pointer to the field that has the value, or to the value where no
	// field has it. Its type says how it is read (readField) and shown in /config.
	field func(r *remote) any
	// set reads the value n of a key with rules of its own into r and reports its
	// mistakes to c. A block, and the keys of a mirror, which setMirrors reads, have
	// neither field nor set.
	set func(c *configReader, r *remote, n *yaml.Node)
}

// remoteKeys lists every key of a remote; any other key is refused. The order is
// the one in which they are read: type and package come first, because they decide
// which other keys are allowed, and base_url comes before mirrors.
var remoteKeys = []remoteKey{
	{name: "type", defaultText: "remote", set: setType, field: func(r *remote) any { return new(r.typeName()) }},
	{name: "package", defaultText: "generic", set: setPackage, field: func(r *remote) any { return &r.packageType }},
	{name: "description", defaultText: "none", field: func(r *remote) any { return &r.description }},
	{name: "base_url", onType: "remote", defaultText: "required", set: setBaseURL, field: func(r *remote) any { return new(r.shownURL(0)) }},
	{name: "mirrors", onType: "remote", defaultText: "none", set: setMirrors, field: func(r *remote) any { return new(shownMirrors(r)) }},
	{name: "mirrors.url", onType: "remote", defaultText: "required"},
	{name: "mirrors.auth", onType: "remote", defaultText: "false"},
	{name: "mirrors.verified", onType: "remote", defaultText: "false"},
	{name: "immutable_patterns", defaultText: "everything is allowed", field: func(r *remote) any { return &r.immutable }},
	{name: "mutable_patterns", defaultText: "none beside the built-in ones", field: func(r *remote) any { return &r.mutable }},
	{name: "check_mutable_updates", onType: "remote", defaultText: "false", field: func(r *remote) any { return &r.checkMutable }},
	{name: "check_builtin_updates", onType: "remote", defaultText: "false", field: func(r *remote) any { return &r.checkBuiltin }},
	{name: "username", onType: "remote", defaultText: "none", set: setUsername, field: func(r *remote) any { return &r.username }},
	{name: "password", onType: "remote", defaultText: "none", set: setPassword, field: func(r *remote) any { return &r.password }},
	{name: "headers", onType: "remote", defaultText: "none", set: setHeaders, field: func(r *remote) any { return &r.headers }},
	{name: "stale_if_error", onType: "remote", defaultText: "false", field: func(r *remote) any { return &r.staleIfError }},
	{name: "negative_ttl", onType: "remote", defaultText: "0", field: func(r *remote) any { return &r.negativeTTL }},
	{name: "rewrite", onType: "remote", defaultText: "the documents of the package", field: func(r *remote) any { return &r.rewrite }},
	{name: "sealed", onType: "remote", defaultText: "false", field: func(r *remote) any { return &r.sealed }},
	{name: "would_miss", onType: "remote", defaultText: "false", field: func(r *remote) any { return &r.wouldMiss }},
	{name: "query", onType: "remote", defaultText: "keep", set: setQuery, field: func(r *remote) any { return &r.query }},
	{name: "timeout", onType: "remote", defaultText: "30", minimum: 1, field: func(r *remote) any { return &r.timeout }},
	{name: "cache", defaultText: "as its keys say"},
	{name: "cache.immutable_ttl", defaultText: "0", field: func(r *remote) any { return &r.immutableTTL }},
	{name: "cache.mutable_ttl", defaultText: "3600", field: func(r *remote) any { return &r.mutableTTL }},
	{name: "cache.max_size", onType: "remote", defaultText: "none", field: func(r *remote) any { return &r.maxSize }},
	{name: "registry", onType: "remote", docker: true, defaultText: "host of base_url", set: setRegistry, field: func(r *remote) any { return &r.registry }},
	{name: "token_realm", onType: "remote", docker: true, defaultText: "none", field: func(r *remote) any { return &r.tokenRealm }},
	{name: "write_token", onType: "local", defaultText: "none", field: func(r *remote) any { return &r.writeToken }},
}

// packageRules say what is special about the files of a package.
type packageRules struct {
	mutable []*regexp.Regexp // built-in mutable patterns
	// isRevalidated: the built-in mutable files are asked for with their validators unless
	// the configuration says otherwise, and missing files are remembered for a minute.
	// Clients ask often, and for many that are not there.
	isRevalidated bool
	// links: documents link to the files that clients fetch. absoluteLinks: their clients
	// take absolute URLs only.
	links, absoluteLinks bool
}

// packageTypes are all packages that there are. Patterns begin with plain text although (^|/)
// would be more exact: with a literal prefix a pattern is ten times as fast, and all are
// tried on every request. A path that one matches by mistake is only revalidated more often.
var packageTypes = map[string]packageRules{
	"generic": {},
	"alpine":  {mutable: compileAll(`APKINDEX\.tar\.gz$`, `packages\.adb$`)},
	"rpm": {mutable: compileAll(`repomd\.xml(?:\.key)?$`, `repodata/.*\.(?:xml|sqlite|ya?ml|asc|txt)(?:\.(?:gz|bz2|xz|zst|zck|lzma))?$`,
		`productid(?:\.(?:gz|bz2|xz|zst))?$`, `\.yml\.gz$`, `Packages\.gz$`,
		`media\.1/media$`, `\.treeinfo$`, `RPM-GPG-KEY-[^/]+$`, `mirrorlist$`, `content$`)},
	"deb": {isRevalidated: true, mutable: compileAll(
		`Release(?:\.gpg)?$`, // InRelease too
		`Packages`+compressed, `Sources`+compressed, `Index`+compressed,
		`Contents-[^/]+$`, `Translation-[^/]+$`, `Components-[^/]+$`, `Commands-[^/]+$`, `dep11/[^/]+$`)},
	"go": {isRevalidated: true, mutable: compileAll(`/@v/list$`, `/@latest$`,
		`/@v/(?:[^v/][^/]*|v(?:\d+(?:\.\d+)?)?(?:\.?[^\d./][^/]*)?)\.info$`, // of a branch: no vX.Y.Z
		`^sumdb/[^/]+/latest$`, `\.p/[0-9]+$`)}, // a part of a tile, which grows
	"maven": {isRevalidated: true, mutable: compileAll(`maven-metadata\.xml(?:\.(?:md5|sha1|sha256|sha512|asc))?$`, `-SNAPSHOT/`)},
	"helm":  {isRevalidated: true, links: true, mutable: compileAll(`(?:^|/)index\.yaml$`)},
	"pypi":  {isRevalidated: true, links: true, mutable: compileAll(`^simple/`)},
	"npm": {isRevalidated: true, links: true, absoluteLinks: true, mutable: compileAll(`^(?:@[^/]+/)?[^/]+$`,
		`^(?:@[^/]+/)?[^@/][^/]*/[^./-][^./]*(?:\.[^./t][^./]*)*$`, // a tag or a version, no .tgz: corepack asks for pnpm/latest
		`^-/`)},
	// A sparse index, which base_url may be the root of, has 1/a, 2/ab, 3/a/abc and ab/cd/abcd
	// (the Cargo book, "Registry Index").
	"cargo": {isRevalidated: true, links: true, absoluteLinks: true,
		mutable: compileAll(`^index/`, `config\.json$`, `^(?:[12]|3/[^/]|[^/]{2}/[^/]{2})/[^/]+$`)},
	"terraform": {isRevalidated: true, links: true, mutable: compileAll(`/versions$`, `/download(?:/[^/]+/[^/]+)?$`, `index\.json$`,
		`/\d+\.\d+\.\d+(?:-[^/_]*)?\.json$`, // of a mirror: it gains platforms
		`^\.well-known/`)},
	// A reference with a colon is a digest and immutable; a tag has no colon (OCI
	// distribution spec, "Pulling manifests").
	"docker": {mutable: compileAll(`/manifests/[^/:]+$`, `/tags/list$`, `/referrers/[^/]+$`)},
}

// compressed ends the pattern of a file of deb that may be compressed.
const compressed = `(?:\.(?:gz|xz|bz2|lzma|zst))?$`

func compileAll(patterns ...string) (all []*regexp.Regexp) {
	for _, p := range patterns {
		all = append(all, regexp.MustCompile(p))
	}
	return all
}

// digestInName returns the digest that the name of a file of metadata promises, as
// sha256:HEX or sha512:HEX. Such a file cannot change, and its bytes can be verified.
// own without a digest is a file below by-hash/ whose hash is too weak to verify.
func (r *remote) digestInName(file string) (digest string, own bool) {
	dir, name := path.Split(file)
	switch {
	case r.local || name == "":
	case r.packageType == "rpm" && strings.HasSuffix("/"+dir, "/repodata/"):
		if sum, _, cut := strings.Cut(name, "-"); cut && isHex(sum, 64) {
			return "sha256:" + sum, true
		}
	case r.packageType == "deb" && strings.Contains("/"+dir, "/by-hash/"):
		if digest = strings.ToLower(path.Base(dir)) + ":" + name; isDigest(digest) {
			return digest, true
		}
		return "", true
	}
	return "", false
}

// isDigest reports whether s is a digest that can be verified: sha256 or sha512 with
// its hash in lower-case hexadecimal.
func isDigest(s string) bool {
	algorithm, sum, _ := strings.Cut(s, ":")
	return (algorithm == "sha256" && isHex(sum, 64)) || (algorithm == "sha512" && isHex(sum, 128))
}

// isHex reports whether s is n digits of lower-case hexadecimal.
func isHex(s string, n int) bool { return len(s) == n && strings.Trim(s, "0123456789abcdef") == "" }

// reservedNames are the first path elements of our own endpoints. A remote must not
// have such a name, which would be confused with the endpoint in logs and metrics.
var reservedNames = []string{"api", "artifacts", "cache-artifact", "config", "health", "metrics", "missed", "v1", "v2"}

// ownHeaders are request headers that artifactapi or net/http sets. A configured one
// would be ignored, or would break ranges and revalidation.
var ownHeaders = []string{
	"Accept-Encoding", "Connection", "Content-Length", "Expect", "Host", "If-Match", "If-Modified-Since",
	"If-None-Match", "If-Range", "If-Unmodified-Since", "Keep-Alive", "Proxy-Connection", "Range", "Te",
	"Trailer", "Transfer-Encoding", "Upgrade", "Via",
}

// setType reads type. With a bad value the other keys are not checked against it.
func setType(c *configReader, r *remote, n *yaml.Node) {
	s, ok := c.readString(n)
	if ok && s != "remote" && s != "local" {
		c.addValueError(n, "must be \"remote\" or \"local\", not %.40q", n.Value)
		ok = false
	}
	r.local, c.typeUnknown = s == "local", c.typeUnknown || !ok
}

func setPackage(c *configReader, r *remote, n *yaml.Node) {
	s, ok := c.readString(n)
	rules, known := packageTypes[s]
	switch {
	case s == "docker" && r.local:
		c.addValueError(n, "\"docker\" cannot be of type \"local\": artifactapi only mirrors registries, images are pushed to the registry itself")
	case known:
		r.packageType, r.builtin = s, rules.mutable
		if rules.isRevalidated && !r.local {
			r.checkBuiltin, r.negativeTTL = true, time.Minute
		}
		return
	case ok:
		c.addValueError(n, "must be generic, alpine, deb, rpm, docker, go, maven, helm, pypi, npm, cargo or terraform, not %.40q: use generic for others, with mutable_patterns for their index files", n.Value)
	}
	c.typeUnknown = true
}

// setQuery reads query. A registry's queries are pages of lists: they always count.
func setQuery(c *configReader, r *remote, n *yaml.Node) {
	var ok bool
	switch r.query, ok = c.readString(n); {
	case r.packageType == "docker" && !c.typeUnknown:
		c.addValueError(n, "has no meaning for package \"docker\": remove it")
	case ok && !slices.Contains([]string{keepQuery, dropQuery, allQueries}, r.query):
		c.addValueError(n, "must be keep, drop or all, not %.40q", n.Value)
	}
}

// setBaseURL reads base_url, before mirrors: it is the first origin.
func setBaseURL(c *configReader, r *remote, n *yaml.Node) {
	u := c.readURL(n, false)
	if u != nil && r.packageType == "docker" && strings.HasSuffix(u.Path, "/v2") {
		c.addValueError(n, "ends in /v2, which is added to it: remove that")
	}
	r.origins = append(r.origins, origin{url: u, auth: true, masked: c.masked})
}

// setMirrors reads a list of URLs, or of mappings with url, auth and verified.
func setMirrors(c *configReader, r *remote, n *yaml.Node) {
	if n.Kind != yaml.SequenceNode {
		c.addValueError(n, "must be a list of URLs or of {url: URL, auth: true, verified: true}")
		return
	}
	for _, item := range n.Content {
		c.key = "mirrors"
		var o origin
		urlNode := item
		if item.Kind == yaml.MappingNode {
			fields := map[string]yamlField{}
			c.collectKeys(item, "mirrors.", fields)
			readFlag := func(key string, to *bool) {
				if f, given := fields[key]; given {
					c.key = key
					c.readField(f.value, 0, to)
				}
			}
			readFlag("mirrors.auth", &o.auth)
			readFlag("mirrors.verified", &o.verified)
			c.key = "mirrors.url"
			if urlNode = fields["mirrors.url"].value; urlNode == nil {
				c.addValueError(item, "is missing: say where the mirror is")
				continue
			}
		}
		o.url = c.readURL(urlNode, false)
		o.masked, c.masked = c.masked, ""
		r.origins = append(r.origins, o)
	}
}

// setUsername reads username. Basic authorization ends the username at the first
// colon (RFC 7617 section 2).
func setUsername(c *configReader, r *remote, n *yaml.Node) {
	r.username, _ = c.readString(n)
	switch {
	case strings.Contains(r.username, ":"):
		c.addValueError(n, "must not hold a colon (RFC 7617): put what follows it into password")
	case !isCleanSecret(r.username):
		c.addValueError(n, uncleanSecret)
	}
}

// setPassword reads password, after username.
func setPassword(c *configReader, r *remote, n *yaml.Node) {
	c.readField(n, 0, &r.password)
	if r.password != "" && r.username == "" {
		c.addWarning(n, "has no username beside it: upstreams that take a token as the password want one too, some of them any")
	}
}

// setHeaders reads headers, a mapping from names to values.
func setHeaders(c *configReader, r *remote, n *yaml.Node) {
	if n.Kind != yaml.MappingNode {
		c.addValueError(n, "must be a mapping such as {X-Token: \"...\"}")
	}
	r.headers = http.Header{}
	for k, v := range mappingPairs(n) {
		c.key = "headers"
		name := http.CanonicalHeaderKey(k.Value)
		switch {
		case !headerPattern.MatchString(k.Value): // not quoted: it may be a whole header with a secret value
			c.addValueError(k, "has an invalid header name: write NAME: \"value\"")
		case slices.Contains(ownHeaders, name):
			c.addValueError(k, "must not hold %s, which artifactapi or HTTP sets: remove it", name)
		case r.headers[name] != nil:
			c.addValueError(k, "has %s twice (upper and lower case are the same): keep one", name)
		default:
			c.key = "headers: " + name
			var value secret
			c.readField(v, 0, &value)
			r.headers.Set(name, string(value))
		}
	}
}

func setRegistry(c *configReader, r *remote, n *yaml.Node) {
	s, ok := c.readString(n)
	r.registry = strings.ToLower(s)
	first, twice := c.registries[r.registry]
	switch {
	case !ok:
	case !registryPattern.MatchString(s):
		c.addValueError(n, "must be a host such as docker.io or quay.io:443, without https:// and without a path")
	case twice:
		c.addValueError(n, "is already the registry of another remote (line %d): clients could not tell the two apart, so remove one", first)
	default:
		c.registries[r.registry] = n.Line
	}
}

// isCleanSecret reports whether s can be sent as it is. White space at an end is lost
// on the way, and a line break would begin another header.
func isCleanSecret(s string) bool {
	return strings.TrimSpace(s) == s && !strings.ContainsFunc(s, unicode.IsControl)
}

// uncleanSecret tells users what isCleanSecret refuses, without showing it.
const uncleanSecret = "holds a line break, a control character, or white space at one end: remove it (a variable that was set from a file often ends in one)"

// hasBadPort: u has a port, or a colon for one, that is not 1 to 65535.
func hasBadPort(u *url.URL) bool {
	port, err := strconv.Atoi(u.Port())
	return strings.HasSuffix(u.Host, ":") || (u.Port() != "" && (err != nil || port < 1 || port > math.MaxUint16))
}

// parseSize parses a number of bytes, such as 1073741824, 50GiB, 1.5 TiB or 500MB.
// Its error begins with "must be" and does not name the key.
func parseSize(s string) (int64, error) {
	m := sizePattern.FindStringSubmatch(s)
	if m == nil {
		return 0, errors.New("must be a size such as 50GiB or 500MB")
	}
	base := 1000.0
	if m[3] != "" {
		base = 1024
	}
	exponent := strings.Index("-KMGT", strings.ToUpper(m[2])) // 0 without a letter
	number, err := strconv.ParseFloat(m[1], 64)
	if v := number * math.Pow(base, float64(exponent)); err == nil && v < math.MaxInt64 {
		return int64(v), nil
	}
	return 0, errors.New("must be a size below 8388608TiB")
}

// publicView returns the effective configuration for /config: every key that applies to a
// remote, with its default if the file does not have it, and "***" instead of secrets and
// of what came from ${VAR}.
func (c *config) publicView() map[string]any {
	all := map[string]any{}
	for name, r := range c.remotes {
		cache := map[string]any{}
		m := map[string]any{"cache": cache}
		all[name] = m
		for _, k := range remoteKeys {
			if k.field == nil || (k.onType != "" && k.onType != r.typeName()) || (k.docker && r.packageType != "docker") {
				continue
			}
			v := publicField(k.field(r))
			if hidden, ok := r.masked[k.name]; ok {
				v = hidden
			}
			if name, ok := strings.CutPrefix(k.name, "cache."); ok && v != nil {
				cache[name] = v
			} else if v != nil {
				m[k.name] = v
			}
		}
	}
	return map[string]any{"remotes": all}
}

func (r *remote) typeName() string {
	if r.local {
		return "local"
	}
	return "remote"
}

// shownMirrors returns the mirrors with their keys.
func shownMirrors(r *remote) (list []map[string]any) {
	for i, o := range r.origins[1:] {
		list = append(list, map[string]any{"url": r.shownURL(i + 1), "auth": o.auth, "verified": o.verified})
	}
	return list
}

// publicField returns the value that field points to as remotes.yaml would have it,
// or nil if the file does not have the key and it has no default to show.
func publicField(field any) any {
	switch f := field.(type) {
	case *bool:
		return *f
	case *time.Duration:
		return int64(*f / time.Second)
	case **url.URL:
		if *f != nil {
			return (*f).String()
		}
	case *http.Header: // the values may be secrets
		hidden := map[string]secret{}
		for name := range *f {
			hidden[name] = secret(f.Get(name))
		}
		if len(hidden) > 0 {
			return hidden
		}
	default: // encoding/json writes a secret as *** and a Regexp as its text
		if v := reflect.ValueOf(field).Elem(); !v.IsZero() {
			return v.Interface()
		}
	}
	return nil
}
