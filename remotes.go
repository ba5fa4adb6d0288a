// remotes.go: how the path of a request becomes a file of one remote, with its
// decoded path, its upstream spelling, its storage key and, by the patterns, its class.

package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// maxSpelling bounds an upstream spelling with its query, in bytes. A record
	// with it fits the 2 KB of metadata that an S3 object may have.
	maxSpelling = 1024
	// maxFilename is how many bytes of a file's name a key contains: file systems allow 255.
	maxFilename = 120
	// maxName bounds the name of a remote, which is also the name of a directory.
	maxName = 100
	// maxSeconds is about 100 years: more could overflow when it is added to a date.
	maxSeconds = 100 * 366 * 24 * 3600
)

// class says how long a stored file may be served without asking its upstream; see
// "How it decides" in README.md.
type class string

const (
	immutable class = "immutable" // forever, or for immutable_ttl if that is set
	mutable   class = "mutable"   // for mutable_ttl; then it is revalidated
	local     class = "local"     // forever: it was uploaded here and has no upstream
)

// remote is one entry of remotes.yaml, ready to use. It is not changed after
// loading; a reload makes new ones.
type remote struct {
	config      *config // that it is a part of; only tests make remotes without one
	name        string
	local       bool   // type: local
	packageType string // package
	description string

	origins      []origin    // base_url first, then mirrors in order; empty for local
	headers      http.Header // sent to the origins that get the credentials
	username     string
	password     secret
	registry     string   // docker: the registry that clients name in ns, such as docker.io
	tokenRealm   *url.URL // docker: a token service that may get the credentials; may be nil
	writeToken   secret   // local: allows writing to this repository; may be ""
	staleIfError bool

	immutable    []*regexp.Regexp // immutable_patterns; nil means that everything is allowed
	mutable      []*regexp.Regexp // mutable_patterns, without those in builtin
	builtin      []*regexp.Regexp // mutable patterns of the package
	checkMutable bool             // check_mutable_updates
	checkBuiltin bool             // check_builtin_updates
	rewrite      []*regexp.Regexp // patterns of documents whose links are rewritten, beside those of the package
	links        *linkTable       // leads the links of documents here; nil: they stay
	immutableTTL time.Duration    // 0 means forever
	mutableTTL   time.Duration    // 0 means that every request revalidates
	negativeTTL  time.Duration    // how long a 404 or 410 is remembered; 0 means not at all
	timeout      time.Duration    // to connect and to get the response header, for each redirect anew
	maxSize      int64            // cache.max_size in bytes; 0 means no limit
	query        string           // keep, drop or all: what becomes of clients' queries
	absence

	// masked holds the values of keys that hold a ${VAR}, with *** in its place, to be
	// shown instead. Those of base_url and the mirrors are in origins.
	masked map[string]string
}

// absence says what becomes of a request for a file that is not stored.
type absence struct {
	sealed    bool // no upstream is ever asked: copies answer whatever their age
	wouldMiss bool // what a sealed remote would not have is recorded
}

// The values of query. With keepQuery at most maxVariants files of one path are stored.
const (
	keepQuery  = "keep"
	dropQuery  = "drop"
	allQueries = "all"
)

// Format prints the name of the remote, whatever the verb is. Without it fmt would
// print the secrets: it does not call the methods of unexported fields.
func (r remote) Format(s fmt.State, _ rune) { io.WriteString(s, r.name) }

// origin is one server that has a remote's files: base_url or a mirror.
type origin struct {
	url  *url.URL // scheme, host and escaped base path without a slash at its end
	auth bool     // gets the remote's credentials and headers; always true for base_url
	// verified: asked only for bodies whose digest is known, so that it need not be trusted.
	verified bool
	masked   string // url as it may be shown, with *** for ${VAR}; "": as it is
}

// mirrorHost is the host of origin i, or "" for base_url. i may come from a replica
// whose configuration has more mirrors.
func (r *remote) mirrorHost(i int) string {
	if i <= 0 || i >= len(r.origins) {
		return ""
	}
	return r.origins[i].url.Host
}

// config is a whole remotes.yaml. It is not changed after parseConfig.
type config struct {
	remotes    map[string]*remote // by name
	names      []string           // of all remotes, sorted
	warnings   []string           // what is valid but probably a mistake, for the log and for check
	registries map[string]*remote // docker remotes by registry, in lower case
	urls       urlTable           // of the remotes
	publicURL  string             // PUBLIC_URL without a slash at its end; "": not known
}

// target is one file of one remote, as a request named it.
type target struct {
	remote   *remote
	path     string // decoded, without query; patterns, listings and logs use it
	spelling string // upstream spelling with its query; the record contains it and the key is its hash
	wire     string // escaped path and query that are asked below base_url, or below v2/ there; differs from spelling for blobs and for files that a root names
	class    class  // set by classify
	builtin  bool   // mutable by a built-in pattern; set by classify
}

// addRegistry remembers the registry of a docker remote. A remote with the key
// registry has precedence over one with the default, the host of base_url. Of
// several remotes with the same default the first in the file gets it: two remotes
// of one host are useful, for example with other credentials, and clients can name
// them.
func (c *config) addRegistry(r *remote) {
	if r.packageType != "docker" {
		return
	}
	given := r.registry != ""
	if !given {
		// Clients say docker.io for the registry that is served at this host.
		if r.registry = r.origins[0].url.Host; r.registry == "registry-1.docker.io" {
			r.registry = "docker.io"
		}
		if host := r.shownHost(0); host != r.origins[0].url.Host {
			r.masked["registry"] = host
		}
	}
	if _, taken := c.registries[r.registry]; !taken || given {
		c.registries[r.registry] = r
	}
}

// isIrreplaceable reports whether the files of a remote may exist nowhere else: it is a
// local repository, or not in remotes.yaml any more and may have been one.
func (c *config) isIrreplaceable(name string) bool {
	r := c.remotes[name]
	return r == nil || r.local
}

// compare names the remotes that differ from those of old: "added", "changed", "removed".
func (c *config) compare(old *config) map[string][]string {
	differences := map[string][]string{}
	for _, name := range slices.Compact(slices.Sorted(slices.Values(slices.Concat(c.names, old.names)))) {
		is, was := c.remotes[name], old.remotes[name]
		what := "changed"
		switch {
		case was == nil:
			what = "added"
		case is == nil:
			what = "removed"
		case is.equals(*was):
			continue
		}
		differences[what] = append(differences[what], name)
	}
	return differences
}

// equals leaves out what belongs to the whole file.
func (r remote) equals(other remote) bool {
	r.config, r.links, other.config, other.links = nil, nil, nil, nil
	return reflect.DeepEqual(r, other)
}

// urlPath returns the path of r for clients: /api/NAME/, or /v2/NAME/ for docker.
func (r *remote) urlPath() string {
	if r.packageType == "docker" {
		return "/v2/" + r.name + "/"
	}
	return "/api/" + r.name + "/"
}

// shownURL returns the URL of origin i as it may be shown.
func (r *remote) shownURL(i int) string {
	return cmp.Or(r.origins[i].masked, r.origins[i].url.String())
}

// shownHost returns the host of origin i as it may be shown.
func (r *remote) shownHost(i int) string {
	_, rest, found := strings.Cut(r.shownURL(i), "://")
	if !found {
		return "***" // scheme and host are from one variable
	}
	host, _, _ := strings.Cut(rest, "/")
	return host
}

// resolveTarget returns the file that a request below /api/ names, or below
// /api/v1/remote/, which is another name for it. below is the rest of the path as the
// client sent it, and query is the raw query. An empty path, which lists the remote, gives
// a target with the remote alone. With an error, which may be classify's, the target has
// what is known.
func (c *config) resolveTarget(below, query string) (target, error) {
	name, escaped := cutElement(below)
	if second, rest := cutElement(escaped); name == "v1" && second == "remote" {
		name, escaped = cutElement(rest)
	}
	r := c.remotes[name]
	switch {
	case r == nil:
		return target{}, newProblem(http.StatusNotFound, "there is no remote %.100q", name)
	case r.packageType == "docker":
		return target{}, newProblem(http.StatusNotFound, "remote %q is a container registry: ask for it below %s", name, r.urlPath())
	}
	if r.query == dropQuery {
		query = ""
	}
	path, spelling, err := spellPath(escaped, query)
	if err != nil || path == "" {
		return target{remote: r}, err
	}
	t := target{remote: r, path: path, spelling: spelling, wire: spelling}
	return t, t.classify()
}

// spellPath turns an escaped request path (without its remote) and a raw query into
// the decoded path and the upstream spelling. Both are the same for all ways to
// escape one path: empty segments and "." are dropped, and only what must be escaped
// is escaped. "..", control characters, backslashes and invalid UTF-8 are refused.
// The query is kept as it is. If the path is empty, the results are empty, whatever
// the query is. The errors wrap errBadRequest or errTooLong.
func spellPath(escaped, query string) (path, spelling string, err error) {
	escaped = strings.TrimLeft(escaped, "/")
	path, spelling = escaped, escaped
	if !isPlainPath(escaped) {
		path, spelling, err = spellEscapedPath(escaped)
	}
	if err != nil || path == "" {
		return "", "", err
	}
	if query != "" {
		if strings.ContainsFunc(query, func(r rune) bool { return r <= ' ' || r == 0x7f }) || !utf8.ValidString(query) {
			return "", "", newUnsafePathError("the query holds a space, a control character or invalid UTF-8")
		}
		spelling += "?" + query
	}
	if len(spelling) > maxSpelling {
		return "", "", errTooLong
	}
	return path, spelling, nil
}

// isPlainPath reports whether s is surely its own spelling and decoded path: nothing must
// be escaped, and no segment is empty or begins with a dot. Nearly all paths are plain,
// and spellPath allocates nothing for them.
func isPlainPath(s string) bool {
	previous := byte('/')
	for i := range len(s) {
		if !unescapedBytes[s[i]] || (previous == '/' && (s[i] == '/' || s[i] == '.')) {
			return false
		}
		previous = s[i]
	}
	return true
}

// spellEscapedPath is spellPath for a path that is not plain.
func spellEscapedPath(escaped string) (string, string, error) {
	var path, spelling []string
	segments := strings.Split(escaped, "/")
	for i, segment := range segments {
		name, err := url.PathUnescape(segment)
		switch {
		case err != nil:
			return "", "", newUnsafePathError("the path holds a % that is not followed by two hex digits")
		case strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' }):
			return "", "", newUnsafePathError("the path holds a control character or a backslash")
		case strings.Contains("/"+name+"/", "/../"): // behind an escaped slash too: an upstream may decode it
			return "", "", newUnsafePathError("the path holds ..")
		case !utf8.ValidString(name):
			return "", "", newUnsafePathError("the path is not UTF-8")
		case name == "" || name == ".":
			if i < len(segments)-1 || path == nil {
				continue
			}
			name = "" // the path ends in a slash
		}
		path, spelling = append(path, name), append(spelling, uriEncode(name, false))
	}
	return strings.Join(path, "/"), strings.Join(spelling, "/"), nil
}

// unescapedBytes says which bytes are not escaped in a spelling: the unreserved
// characters of RFC 3986 section 2.3, and the slash.
var unescapedBytes = func() (t [256]bool) {
	for _, b := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/") {
		t[b] = true
	}
	return t
}()

// classify decides by the patterns of its remote which class a file has, and whether a
// built-in pattern made it mutable. Mutable patterns come first; what they do not match
// must match an immutable pattern, if there is any, or the error is a problem that wraps
// errDenied. For docker a mutable pattern allows nothing, because immutable_patterns there
// say which images may be pulled. A path that ends in a slash is a listing and so mutable.
// A name that is its own hash is allowed and immutable, whatever the patterns say.
func (t *target) classify() error {
	r := t.remote
	if _, own := r.digestInName(t.path); own {
		t.class = immutable
		return nil
	}
	builtin := matchesAny(r.builtin, t.path)
	listed := r.packageType != "docker" && (builtin || matchesAny(r.mutable, t.path)) // allowed without an immutable pattern
	switch {
	case !listed && r.immutable != nil && !matchesAny(r.immutable, t.path):
		return &problem{status: http.StatusForbidden, cause: errDenied,
			detail: fmt.Sprintf("remote %q does not allow this path: none of its patterns matches", r.name)}
	case r.local:
		t.class = local
	case builtin || listed || strings.HasSuffix(t.path, "/"):
		t.class, t.builtin = mutable, builtin
	default:
		t.class = immutable
	}
	return nil
}

// matchesAny reports whether one of the patterns matches somewhere in path.
func matchesAny(patterns []*regexp.Regexp, path string) bool {
	return slices.ContainsFunc(patterns, func(p *regexp.Regexp) bool { return p.MatchString(path) })
}

// newUnsafePathError makes the answer to a path that is not passed to an upstream.
func newUnsafePathError(reason string) error {
	return &problem{status: http.StatusBadRequest, detail: reason, cause: errBadRequest}
}

// key returns the storage key of the file.
func (t target) key() string { return storageKey(t.remote.name, t.spelling) }

// storageKey returns the storage key {remote}/{path_hash}/{filename} of a remote's
// file. path_hash is the first 8 bytes of the spelling's SHA-256, in hex. filename only
// helps people who look into the store: the end of the last element, decoded, with "_" for
// every byte that is not safe in a file name, and for a dot at its begin, which the names
// of our own files have.
func storageKey(remote, spelling string) string {
	var space [maxName + 1 + 16 + 1 + maxFilename]byte
	var copied [maxSpelling]byte // []byte(spelling) would be allocated
	sum := sha256.Sum256(append(copied[:0], spelling...))
	key := append(append(space[:0], remote...), '/')
	key = append(hex.AppendEncode(key, sum[:8]), '/')
	path := trimSuffixes(spelling)
	name := decodePath(path[strings.LastIndexByte(path, '/')+1:])
	name = cmp.Or(name[max(0, len(name)-maxFilename):], "_")
	for i := range len(name) {
		b := name[i]
		isSafe := unescapedBytes[b] && b != '/' && (i > 0 || b != '.')
		if !isSafe && strings.IndexByte("+@=", b) < 0 {
			b = '_'
		}
		key = append(key, b)
	}
	return string(key)
}

// keyHash returns the path hash in a storage key, or 0 if the key is malformed.
func keyHash(key string) uint64 {
	_, rest, _ := strings.Cut(key, "/")
	digits, _, _ := strings.Cut(rest, "/")
	n, _ := strconv.ParseUint(digits, 16, 64)
	return n
}

// trimEmptySegments removes the empty and "." segments in front of a path: clients make
// them when they join URLs ("//api/x", "/./api/x").
func trimEmptySegments(path string) string {
	for strings.HasPrefix(path, "/") || strings.HasPrefix(path, "./") {
		_, path, _ = strings.Cut(path, "/")
	}
	return path
}

// cutElement cuts the first element that is not empty off an escaped path, and decodes it.
func cutElement(path string) (first, rest string) {
	first, rest, _ = strings.Cut(trimEmptySegments(path), "/")
	first, _ = url.PathUnescape(first) // "" if it is malformed, which names nothing
	return first, rest
}

// trimSuffixes returns a spelling without its query, and without the hash behind "#"
// that a file has which a root names. Neither sign is in a path's spelling as it is.
func trimSuffixes(spelling string) string {
	if i := strings.IndexAny(spelling, "?#"); i >= 0 {
		return spelling[:i]
	}
	return spelling
}

// namedSpelling is the spelling under which a file is stored that a root names, by
// its content: each generation has its own, and they do not push each other out.
func namedSpelling(spelling, sum string) string { return spelling + "#" + sum }

// decodePath returns the decoded path of a spelling, without query and hash.
func decodePath(spelling string) string {
	path := trimSuffixes(spelling)
	if decoded, err := url.PathUnescape(path); err == nil {
		return decoded
	}
	return path // spellPath did not make this spelling
}
