// remotes.go: a request path becomes a file of one remote: its decoded path, its
// upstream spelling and its storage key.

package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// maxSpelling bounds an upstream spelling with its query: a record then
	// fits the 2 KB of metadata that an S3 object may have.
	maxSpelling = 1024
	// maxFilename is how much of a file's name a key keeps: with the rest of a
	// key it stays far below the 255 bytes of a file system's names.
	maxFilename = 120
	// maxName bounds a remote's name, which is a directory's name as well.
	maxName = 100
	// maxSeconds is about 100 years: more would overflow a time.Duration when
	// it is added to a date.
	maxSeconds = 100 * 366 * 24 * 3600
	// defaultMutableTTL and defaultTimeout are what a remote without those keys
	// has (README's table of keys says so too).
	defaultMutableTTL = 3600 * time.Second
	defaultTimeout    = 30 * time.Second
)

// class says how long a stored file may answer (SPEC.md section 5).
type class string

const (
	immutable class = "immutable" // for ever, or immutable_ttl
	mutable   class = "mutable"   // mutable_ttl, then revalidated
	local     class = "local"     // ours: for ever
)

// remote is one entry of remotes.yaml, ready to use. It is not changed after
// loading; a reload makes new ones.
type remote struct {
	name        string
	local       bool   // type: local
	packageType string // package
	description string

	origins      []origin    // base_url first, then mirrors in order; empty for local
	headers      http.Header // sent upstream where credentials are
	username     string
	password     secret
	registry     string   // docker: the ns that names it (docker.io)
	tokenRealm   *url.URL // docker: the realm that may have the credentials; may be nil
	writeToken   secret   // local
	staleIfError bool

	immutable    []*regexp.Regexp // nil: everything is allowed
	mutable      []*regexp.Regexp // user's
	builtin      []*regexp.Regexp // the package's
	checkMutable bool             // check_mutable_updates
	checkBuiltin bool             // check_builtin_updates
	immutableTTL time.Duration    // 0: for ever
	mutableTTL   time.Duration    // 0: re-check on every request
	negativeTTL  time.Duration    // 0: off
	timeout      time.Duration    // connect and response header, each hop
	maxSize      int64            // cache.max_size in bytes, 0: none
}

// Format prints the name whatever the verb: fmt does not ask the methods of
// unexported fields, so the secrets would show.
func (r remote) Format(s fmt.State, _ rune) { io.WriteString(s, r.name) }

// origin is one place that has a remote's files: base_url or a mirror.
type origin struct {
	url  *url.URL // scheme, host and the escaped base path without trailing slash
	auth bool     // may have the remote's credentials and headers (base_url: always)
}

// config is a whole remotes.yaml.
type config struct {
	remotes    map[string]*remote
	names      []string // sorted
	registries map[string]*remote
}

// target is one file of one remote, as a request named it.
type target struct {
	remote   *remote
	path     string // decoded, without query: what patterns, listings and logs see
	spelling string // upstream spelling with its query: what the record holds and the key is made of
	wire     string // escaped path and query as asked below base_url (no leading slash); spelling but for registries
	class    class
	builtin  bool // mutable by a built-in pattern
}

// addRegistry notes which remote a registry names. What registry: says goes before
// a default; of several defaults the first in the file has it, since two
// remotes of one host (with other credentials, say) are fine as long as clients
// name them.
func (c *config) addRegistry(r *remote) {
	if r.packageType != "docker" {
		return
	}
	given := r.registry != ""
	if !given && len(r.origins) > 0 {
		if r.registry = r.origins[0].url.Host; r.registry == "registry-1.docker.io" {
			r.registry = "docker.io"
		}
	}
	if _, taken := c.registries[r.registry]; !taken || given {
		c.registries[r.registry] = r
	}
}

// remoteByRegistry is the docker remote that a client's ns names, or nil.
func (c *config) remoteByRegistry(ns string) *remote { return c.registries[strings.ToLower(ns)] }

// isIrreplaceable says whether a remote's files may be nowhere else: a local
// repository's are not, and of a name that is in the file no more nobody knows.
func (c *config) isIrreplaceable(name string) bool {
	r := c.remotes[name]
	return r == nil || r.local
}

// urlPath is where clients find r: /api/NAME/, or /v2/NAME/ for docker.
func (r *remote) urlPath() string {
	if r.packageType == "docker" {
		return "/v2/" + r.name + "/"
	}
	return "/api/" + r.name + "/"
}

// resolveTarget finds the file that a request below /api/ means: escaped is what
// follows the remote's name in its path, as it was sent, query its raw query.
// An empty path (the remote's list) is a target without class. Its errors are
// problems: 404 for a remote that is not there or lives below /v2/, 400, 414,
// and 403 for a path that r's patterns do not allow.
func (c *config) resolveTarget(name, escaped, query string) (target, error) {
	r := c.remotes[name]
	if r == nil {
		return target{}, newProblem(http.StatusNotFound, "there is no remote %.100q", name)
	}
	if r.packageType == "docker" {
		return target{}, newProblem(http.StatusNotFound, "remote %q is a container registry: it is below %s", name, r.urlPath())
	}
	path, spelling, err := spellPath(escaped, query)
	if err != nil || path == "" {
		return target{remote: r}, err
	}
	t := target{remote: r, path: path, spelling: spelling, wire: spelling}
	t.class, t.builtin, err = r.classifyPath(path)
	return t, err
}

// spellPath reads an escaped request path (without its remote) and the raw query
// into the decoded path and the upstream spelling (SPEC.md section 4, Paths).
// Its errors are problems of errBadRequest and errTooLong. An empty path is "",
// whatever the query.
func spellPath(escaped, query string) (path, spelling string, err error) {
	escaped = strings.TrimLeft(escaped, "/")
	path, spelling = escaped, escaped
	if !isPlainPath(escaped) {
		if path, spelling, err = spellEscapedPath(escaped); err != nil {
			return "", "", err
		}
	}
	if path == "" {
		return "", "", nil
	}
	if query != "" {
		if strings.ContainsFunc(query, func(r rune) bool { return r <= ' ' || r == 0x7f }) || !utf8.ValidString(query) {
			return "", "", newUnsafePathError("the query holds a space, a control character or invalid UTF-8")
		}
		spelling += "?" + query
	}
	if len(spelling) > maxSpelling {
		return "", "", newTooLongError()
	}
	return path, spelling, nil
}

// isPlainPath reports whether s is its own spelling and its own decoded path, which
// nearly all requests are: nothing is allocated for them.
func isPlainPath(s string) bool {
	start := 0 // of the segment
	for i := range len(s) {
		if !unescapedBytes[s[i]] {
			return false
		}
		if s[i] == '/' {
			if isFoldable(s[start:i]) {
				return false
			}
			start = i + 1
		}
	}
	return start == len(s) || !isFoldable(s[start:])
}

// isFoldable reports whether a segment must be folded away or refused.
func isFoldable(segment string) bool { return segment == "" || segment == "." || segment == ".." }

// spellEscapedPath is spell for a path that is not plain, in one pass: path gets each
// byte decoded, spelling gets it escaped anew.
func spellEscapedPath(escaped string) (string, string, error) {
	var pathSpace, spellingSpace [256]byte // most paths fit: no allocation but the results
	path, spelling := pathSpace[:0], spellingSpace[:0]
	segment, segmentSpelling, piece := 0, 0, 0 // where they begin; a piece ends at escaped slashes as well
	for i := 0; i <= len(escaped); i++ {
		if i == len(escaped) || escaped[i] == '/' {
			if string(path[piece:]) == ".." {
				return "", "", newUnsafePathError("the path holds ..")
			}
			empty := len(path) == segment || string(path[segment:]) == "."
			if empty {
				path, spelling = path[:segment], spelling[:segmentSpelling]
			}
			if i < len(escaped) && !empty {
				path, spelling = append(path, '/'), append(spelling, '/')
			}
			segment, segmentSpelling, piece = len(path), len(spelling), len(path)
			continue
		}
		b, n := unescapeAt(escaped, i)
		if n == 0 {
			return "", "", newUnsafePathError("the path holds a % that is not followed by two hex digits")
		}
		i += n - 1
		if b < ' ' || b == 0x7f || b == '\\' {
			return "", "", newUnsafePathError("the path holds a control character or a backslash")
		}
		if b == '/' {
			if string(path[piece:]) == ".." {
				return "", "", newUnsafePathError("the path holds ..")
			}
			piece = len(path) + 1
		}
		path = append(path, b)
		spelling = appendSpelled(spelling, b, n == 3)
		if len(spelling) > maxSpelling+1 { // one more: a last . may still be folded away
			return "", "", newTooLongError()
		}
	}
	if !utf8.Valid(path) {
		return "", "", newUnsafePathError("the path is not UTF-8")
	}
	return string(path), string(spelling), nil
}

// unescapeAt is the byte that s[i:] begins with, decoded, and how many bytes it
// took; none if it is a malformed escape.
func unescapeAt(s string, i int) (b byte, n int) {
	if s[i] != '%' {
		return s[i], 1
	}
	if i+2 >= len(s) {
		return 0, 0
	}
	high, ok := hexValue(s[i+1])
	low, ok2 := hexValue(s[i+2])
	if !ok || !ok2 {
		return 0, 0
	}
	return high<<4 | low, 3
}

// hexValue is the value of one hex digit.
func hexValue(c byte) (v byte, ok bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// unescapedBytes has the bytes that a spelling holds unescaped.
var unescapedBytes = func() (t [256]bool) {
	for _, b := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/") {
		t[b] = true
	}
	return t
}()

// appendSpelled appends b as a spelling has it. A slash that was escaped stays
// escaped: it is part of a name.
func appendSpelled(to []byte, b byte, wasEscaped bool) []byte {
	if unescapedBytes[b] && !(b == '/' && wasEscaped) {
		return append(to, b)
	}
	return append(to, '%', upperHex[b>>4], upperHex[b&15])
}

// newUnsafePathError is the answer to a path that cannot be asked for.
func newUnsafePathError(why string) error {
	return &problem{status: http.StatusBadRequest, detail: why, cause: errBadRequest}
}

// newTooLongError is the answer to a path that could not be stored.
func newTooLongError() error {
	return &problem{status: http.StatusRequestURITooLong, cause: errTooLong,
		detail: fmt.Sprintf("the path with its query is over %d bytes long when it is escaped", maxSpelling)}
}

// classifyPath decides what path is on r (SPEC.md section 3), or errDenied.
func (r *remote) classifyPath(path string) (c class, builtin bool, err error) {
	builtin = matchesAny(r.builtin, path)
	listed := r.packageType != "docker" && (builtin || matchesAny(r.mutable, path)) // allowed whatever else is
	switch {
	case !listed && r.immutable != nil && !matchesAny(r.immutable, path):
		return "", false, &problem{status: http.StatusForbidden, cause: errDenied,
			detail: fmt.Sprintf("remote %q does not allow this path: none of its patterns matches", r.name)}
	case r.local:
		return local, false, nil
	case builtin || listed || strings.HasSuffix(path, "/"):
		return mutable, builtin, nil
	}
	return immutable, false, nil
}

// matchesAny reports whether any pattern is found in path.
func matchesAny(patterns []*regexp.Regexp, path string) bool {
	for _, p := range patterns {
		if p.MatchString(path) {
			return true
		}
	}
	return false
}

// ttlOf is how long a file of that class stays fresh; forever says for ever.
func (r *remote) ttlOf(c class) (d time.Duration, forever bool) {
	switch c {
	case mutable:
		return r.mutableTTL, false
	case immutable:
		return r.immutableTTL, r.immutableTTL == 0
	}
	return 0, true
}

// key is the file's storage key.
func (t target) key() string { return storageKey(t.remote.name, t.spelling) }

// storageKey is the storage key {remote}/{path_hash}/{filename} of a remote's file
// (SPEC.md section 4).
func storageKey(remote, spelling string) string {
	var space [maxName + 1 + 16 + 1 + maxFilename]byte
	var copied [maxSpelling]byte // []byte(spelling) would be on the heap
	sum := sha256.Sum256(append(copied[:0], spelling...))
	k := append(space[:0], remote...)
	k = append(k, '/')
	for _, b := range sum[:8] {
		k = append(k, lowerHex[b>>4], lowerHex[b&15])
	}
	k = append(k, '/')
	return string(appendFilename(k, spelling))
}

const (
	lowerHex = "0123456789abcdef"
	upperHex = "0123456789ABCDEF"
)

// appendFilename appends the safe form of a spelling's last element: its end,
// if it is long, so that extensions stay. It never begins with a dot, which is
// how names of our own begin.
func appendFilename(to []byte, spelling string) []byte {
	path, _, _ := strings.Cut(spelling, "?")
	last := path[strings.LastIndexByte(path, '/')+1:]
	start := len(to)
	for i := 0; i < len(last); {
		b, n := unescapeAt(last, i)
		if i += max(n, 1); !(unescapedBytes[b] && b != '/') && b != '+' && b != '@' && b != '=' {
			b = '_'
		}
		to = append(to, b)
	}
	if over := len(to) - start - maxFilename; over > 0 {
		to = slices.Delete(to, start, start+over)
	}
	switch {
	case len(to) == start:
		to = append(to, '_')
	case to[start] == '.':
		to[start] = '_'
	}
	return to
}

// decodePath is a spelling as people read it: unescaped, without query.
func decodePath(spelling string) string {
	path, _, _ := strings.Cut(spelling, "?")
	if !strings.Contains(path, "%") {
		return path
	}
	decoded, err := url.PathUnescape(path)
	if err != nil {
		return path // no spelling of ours
	}
	return decoded
}
