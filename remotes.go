// remotes.go: remotes.yaml becomes ready values, and a request path becomes a
// file of one remote.
package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
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
	pkg         string // package
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

// configError is one mistake of a configuration file.
type configError struct {
	file   string
	line   int
	remote string // "" outside of a remote
	text   string // what and how to cure it; never a secret
}

func (e configError) Error() string {
	if e.remote == "" {
		return fmt.Sprintf("%s:%d: %s", e.file, e.line, e.text)
	}
	return fmt.Sprintf("%s:%d: remote %q: %s", e.file, e.line, e.remote, e.text)
}

// configErrors is every mistake of one file, in the order of its lines. Callers
// that print them one a line get at them with errors.As.
type configErrors []configError

func (l configErrors) Error() string {
	s := make([]string, len(l))
	for i, e := range l {
		s[i] = e.Error()
	}
	return strings.Join(s, "\n")
}

// remoteKey is one key that an entry of remotes.yaml may have.
type remoteKey struct {
	name   string // as in the file; below a block with the block's name: cache.mutable_ttl
	on     string // the type that has it, remote or local; "" for both
	docker bool   // for package docker only
	def    string // default, as README's table gives it
	// set reads the key's value into r; nil for a block and for the keys of a
	// mirror, which setMirrors reads.
	set func(c *configReader, r *remote, n *yaml.Node)
	// show is the effective value for /config; nil leaves the key out.
	show func(r *remote) any
}

// remoteKeys is every key of a remote. Whatever is not here is refused. It is
// in the order in which the keys are read: type and package decide what the
// others mean, base_url goes before its mirrors.
var remoteKeys = []remoteKey{
	{name: "type", def: "remote", set: setType, show: func(r *remote) any { return r.kind() }},
	{name: "package", def: "generic", set: setPackage, show: func(r *remote) any { return r.pkg }},
	{name: "description", def: "none",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.text(n, &r.description) },
		show: func(r *remote) any { return unlessZero(r.description) }},
	{name: "base_url", on: "remote", def: "required", set: setBaseURL, show: showBaseURL},
	{name: "mirrors", on: "remote", def: "none", set: setMirrors, show: showMirrors},
	{name: "mirrors.url", on: "remote", def: "required"},
	{name: "mirrors.auth", on: "remote", def: "false"},
	{name: "immutable_patterns", def: "everything is allowed",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.patterns(n, &r.immutable) },
		show: func(r *remote) any { return showPatterns(r.immutable) }},
	{name: "mutable_patterns", def: "none beside the built-in ones",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.patterns(n, &r.mutable) },
		show: func(r *remote) any { return showPatterns(r.mutable) }},
	{name: "check_mutable_updates", on: "remote", def: "false",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.flag(n, &r.checkMutable) },
		show: func(r *remote) any { return r.checkMutable }},
	{name: "check_builtin_updates", on: "remote", def: "false",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.flag(n, &r.checkBuiltin) },
		show: func(r *remote) any { return r.checkBuiltin }},
	{name: "username", on: "remote", def: "none", set: setUsername,
		show: func(r *remote) any { return unlessZero(r.username) }},
	{name: "password", on: "remote", def: "none",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.text(n, (*string)(&r.password)) },
		show: func(r *remote) any { return unlessZero(r.password) }},
	{name: "headers", on: "remote", def: "none", set: setHeaders, show: showHeaders},
	{name: "stale_if_error", on: "remote", def: "false",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.flag(n, &r.staleIfError) },
		show: func(r *remote) any { return r.staleIfError }},
	{name: "negative_ttl", on: "remote", def: "0",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.seconds(n, 0, &r.negativeTTL) },
		show: func(r *remote) any { return inSeconds(r.negativeTTL) }},
	{name: "timeout", on: "remote", def: "30",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.seconds(n, 1, &r.timeout) },
		show: func(r *remote) any { return inSeconds(r.timeout) }},
	{name: "cache", def: "as its keys say"},
	{name: "cache.immutable_ttl", def: "0",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.seconds(n, 0, &r.immutableTTL) },
		show: func(r *remote) any { return inSeconds(r.immutableTTL) }},
	{name: "cache.mutable_ttl", def: "3600",
		set:  func(c *configReader, r *remote, n *yaml.Node) { c.seconds(n, 0, &r.mutableTTL) },
		show: func(r *remote) any { return inSeconds(r.mutableTTL) }},
	{name: "cache.max_size", on: "remote", def: "none", set: setMaxSize,
		show: func(r *remote) any { return unlessZero(r.maxSize) }},
	{name: "registry", on: "remote", docker: true, def: "host of base_url", set: setRegistry,
		show: func(r *remote) any { return r.registry }},
	{name: "token_realm", on: "remote", docker: true, def: "none", set: setTokenRealm, show: showTokenRealm},
	{name: "write_token", on: "local", def: "none", set: setWriteToken,
		show: func(r *remote) any { return unlessZero(r.writeToken) }},
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

var (
	nameForm     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	variableForm = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	headerForm   = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
	registryForm = regexp.MustCompile(`^[A-Za-z0-9._-]+(:[0-9]+)?$|^\[[0-9A-Fa-f:.]+\](:[0-9]+)?$`)
	integerForm  = regexp.MustCompile(`^(0|[1-9][0-9]*)$`)
	sizeForm     = regexp.MustCompile(`(?i)^([0-9]+(?:\.[0-9]+)?) ?(|B|[KMGT]i?B)$`)

	// yamlComplaint takes yaml.v3's syntax errors apart. Those that its parser
	// (not its scanner) finds count lines from 0: parserComplaint knows them.
	yamlComplaint   = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)
	parserComplaint = regexp.MustCompile(`^did not find expected (?:<|node|'-'|key|',')|^found (?:undefined tag handle|duplicate %|incompatible)`)
)

// --- from a file to a config ---

// parseConfig turns the bytes of file name into a config. Its error is a
// configErrors that lists every mistake, one a line:
// name:LINE: remote "x": what and how to cure it. env is os.LookupEnv.
func parseConfig(name string, data []byte, env func(string) (string, bool)) (*config, error) {
	c := &configReader{file: name, env: env, keys: remoteKeys, registries: map[string]int{}}
	cfg := &config{remotes: map[string]*remote{}, registries: map[string]*remote{}}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	if c.readable(data) {
		c.readDocuments(data, cfg)
	}
	if len(c.errs) > 0 {
		slices.SortStableFunc(c.errs, func(a, b configError) int { return a.line - b.line })
		return nil, c.errs
	}
	for n := range cfg.remotes {
		cfg.names = append(cfg.names, n)
	}
	slices.Sort(cfg.names)
	return cfg, nil
}

// configReader walks the node tree of one file and collects its mistakes.
type configReader struct {
	file string
	env  func(string) (string, bool)
	keys []remoteKey // remoteKeys, which cannot be named by what it names itself
	errs configErrors

	remote     string         // being read; "" outside of one
	key        string         // being read
	unsure     bool           // its type or package is wrong: do not judge the other keys by them
	registries map[string]int // line of each registry: that was given
}

// field is one key of a mapping with its value.
type field struct{ key, value *yaml.Node }

// fail notes a mistake.
func (c *configReader) fail(line int, format string, args ...any) {
	c.errs = append(c.errs, configError{c.file, max(line, 1), c.remote, fmt.Sprintf(format, args...)})
}

// bad notes a mistake in the value of the current key. An alias was reported
// when the tree was searched for them.
func (c *configReader) bad(n *yaml.Node, format string, args ...any) {
	if n.Kind != yaml.AliasNode {
		c.fail(n.Line, "%s %s", c.key, fmt.Sprintf(format, args...))
	}
}

// readable refuses bytes that YAML cannot hold, since yaml.v3 does so without
// a line.
func (c *configReader) readable(data []byte) bool {
	for line, text := range bytes.Split(data, []byte("\n")) {
		if !utf8.Valid(text) {
			c.fail(line+1, "this line is not UTF-8: save the file in that encoding")
			return false
		}
		control := func(r rune) bool { return r < ' ' && r != '\t' && r != '\r' || r >= 0x7f && r < 0xa0 && r != 0x85 }
		if bytes.IndexFunc(text, control) >= 0 {
			c.fail(line+1, "this line holds a control character: remove it, or write it as an escape within double quotes")
			return false
		}
	}
	return true
}

// readDocuments reads the one document of a file and refuses any more.
func (c *configReader) readDocuments(data []byte, cfg *config) {
	var doc, next yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		c.fail(1, "the file is empty: it needs the key remotes with at least one remote")
		return
	case err != nil:
		c.syntax(data, err)
		return
	}
	c.readRoot(doc.Content[0], cfg)
	c.remote = ""
	switch err := dec.Decode(&next); {
	case err == nil:
		c.fail(next.Line, "a second YAML document begins here: keep everything in one, without ---")
	case !errors.Is(err, io.EOF):
		c.syntax(data, err)
	}
}

// syntax reports what yaml.v3 could not read. Its text never quotes the file,
// but for the name of an unknown anchor, which may be a password that begins
// with an asterisk.
func (c *configReader) syntax(data []byte, err error) {
	m := yamlComplaint.FindStringSubmatch(err.Error())
	if m == nil {
		c.fail(1, "not readable as YAML")
		return
	}
	line, _ := strconv.Atoi(m[1])
	text := m[2]
	if parserComplaint.MatchString(text) {
		line++
	}
	if anchor, ok := strings.CutPrefix(text, "unknown anchor '"); ok {
		anchor = "*" + strings.TrimSuffix(anchor, "' referenced")
		before, _, _ := strings.Cut(string(data), anchor)
		line = strings.Count(before, "\n") + 1
		text = "an alias of something that is not there: put a value that begins with * in quotes"
	}
	if strings.HasSuffix(text, "cannot start any token") {
		text += " (indent with spaces, not with tabs; put a value that begins with @, % or ` in quotes)"
	}
	last := bytes.Count(bytes.TrimRight(data, "\r\n"), []byte("\n")) + 1
	c.fail(min(line, last), "not readable as YAML: %s", text)
}

// readRoot reads the file's top level.
func (c *configReader) readRoot(root *yaml.Node, cfg *config) {
	if root.Kind != yaml.MappingNode {
		c.fail(root.Line, "the file must be a mapping with the key remotes")
		return
	}
	seen := 0
	for k, v := range pairs(root) {
		switch {
		case c.foreign(k):
		case k.Value != "remotes":
			c.fail(k.Line, "unknown key %.60q: the only key at the top is remotes", k.Value)
		case seen > 0:
			c.fail(k.Line, "remotes is there twice (first in line %d): put all remotes below one", seen)
		default:
			seen = k.Line
			c.readRemotes(v, cfg)
		}
		c.remote = ""
	}
	if seen == 0 {
		c.fail(root.Line, "the key remotes is missing: it holds the remotes by name")
	}
}

// readRemotes reads the mapping from names to remotes.
func (c *configReader) readRemotes(n *yaml.Node, cfg *config) {
	if n.Kind != yaml.MappingNode || len(n.Content) == 0 {
		if !c.foreign(n) {
			c.fail(n.Line, "remotes must be a mapping with at least one remote: NAME, and below it its keys")
		}
		return
	}
	lines := map[string]int{}
	for k, v := range pairs(n) {
		if c.remote = ""; c.foreign(k) {
			continue
		}
		r := c.readRemote(k, v)
		if first := lines[r.name]; first > 0 {
			c.fail(k.Line, "this name is there twice (first in line %d): names must be unique", first)
			continue
		}
		lines[r.name] = k.Line
		cfg.remotes[r.name] = r
		cfg.register(r)
	}
}

// readRemote reads one entry. What it returns is whole only if no mistake was
// noted.
func (c *configReader) readRemote(k, v *yaml.Node) *remote {
	c.remote, c.unsure = k.Value, false
	r := &remote{name: k.Value, pkg: "generic", mutableTTL: defaultMutableTTL, timeout: defaultTimeout}
	c.scan(v)
	if v.Kind != yaml.MappingNode {
		if v.Kind != yaml.AliasNode {
			c.fail(k.Line, "needs keys below its name, at least base_url")
		}
		c.checkName(k, r)
		return r
	}
	fields := map[string]field{}
	c.collect(v, "", fields)
	for _, key := range c.keys {
		if f, ok := fields[key.name]; ok && key.set != nil && c.applies(key, r, f) {
			c.key = key.name
			key.set(c, r, f.value)
		}
	}
	if _, ok := fields["base_url"]; !ok && !r.local && !c.unsure {
		c.fail(k.Line, "base_url is missing: say where its files are, or type: \"local\"")
	}
	c.checkName(k, r)
	r.builtin = builtinPatterns[r.pkg]
	r.mutable = slices.DeleteFunc(r.mutable, func(p *regexp.Regexp) bool { return hasPattern(r.builtin, p.String()) })
	return r
}

// scan refuses what hides a value elsewhere: aliases, merge keys and tags.
func (c *configReader) scan(n *yaml.Node) {
	if c.foreign(n) {
		return
	}
	if n.Kind != yaml.MappingNode {
		for _, child := range n.Content {
			c.scan(child)
		}
		return
	}
	for k, v := range pairs(n) {
		if !c.foreign(k) {
			c.scan(v)
		}
	}
}

// foreign reports whether n is an alias, a merge key or tagged, and notes that
// as a mistake.
func (c *configReader) foreign(n *yaml.Node) bool {
	switch {
	case n.Kind == yaml.AliasNode:
		c.fail(n.Line, "a YAML alias: write the value out (or in quotes if it shall begin with *)")
	case n.ShortTag() == "!!merge":
		c.unsure = true // what is merged may be what seems to be missing
		c.fail(n.Line, "a YAML merge key (<<): write the keys out")
	case n.Style&yaml.TaggedStyle != 0:
		c.fail(n.Line, "a YAML tag: remove it (or put a value that begins with ! in quotes)")
	default:
		return false
	}
	return true
}

// collect files the keys of mapping n by their full names and refuses unknown
// and repeated ones.
func (c *configReader) collect(n *yaml.Node, prefix string, into map[string]field) {
	for k, v := range pairs(n) {
		name := prefix + k.Value
		if k.Kind == yaml.AliasNode || k.ShortTag() == "!!merge" {
			continue // noted by scan
		}
		if k.Kind != yaml.ScalarNode || c.known(name) == nil {
			c.unknown(k, prefix)
			continue
		}
		if first, ok := into[name]; ok {
			c.fail(k.Line, "%s is there twice (first in line %d): keep one", name, first.key.Line)
			continue
		}
		if v.ShortTag() == "!!null" && v.Kind == yaml.ScalarNode {
			v.Line = k.Line // yaml.v3 may put a value that is not there on a later line
		}
		into[name] = field{k, v}
		if name == "cache" {
			c.collectCache(v, into)
		}
	}
}

// collectCache files the keys of the one block that a remote has.
func (c *configReader) collectCache(v *yaml.Node, into map[string]field) {
	c.key = "cache"
	if v.Kind != yaml.MappingNode {
		c.bad(v, "must be a mapping such as {mutable_ttl: 3600}: give its keys, or remove it")
		return
	}
	c.collect(v, "cache.", into)
}

// known finds a key by its full name.
func (c *configReader) known(name string) *remoteKey {
	for i := range c.keys {
		if c.keys[i].name == name {
			return &c.keys[i]
		}
	}
	return nil
}

// unknown reports key k below prefix and says what may have been meant.
func (c *configReader) unknown(k *yaml.Node, prefix string) {
	if k.Kind != yaml.ScalarNode {
		c.fail(k.Line, "a key must be a word")
		return
	}
	hint := "remove it"
	best := 3 // more than two slips make another word
	for _, key := range c.keys {
		rest, ok := strings.CutPrefix(key.name, prefix)
		if d := distance(k.Value, rest); ok && d < best {
			best, hint = d, fmt.Sprintf("did you mean %s?", rest)
		}
	}
	switch {
	case prefix == "" && c.known("cache."+k.Value) != nil:
		hint = "it belongs below cache"
	case prefix != "" && c.known(k.Value) != nil:
		hint = "it does not belong below " + strings.TrimSuffix(prefix, ".")
	}
	c.fail(k.Line, "unknown key %.60q: %s", prefix+k.Value, hint)
}

// applies reports whether a key means something for r, and notes if not.
func (c *configReader) applies(key remoteKey, r *remote, f field) bool {
	switch {
	case c.unsure:
	case key.on != "" && key.on != r.kind():
		c.fail(f.key.Line, "%s means nothing for type %q: remove it", key.name, r.kind())
		return false
	case key.docker && r.pkg != "docker":
		c.fail(f.key.Line, "%s is for package \"docker\" only: remove it", key.name)
		return false
	}
	return true
}

// checkName judges r's name, which is a path element, a directory and part of
// every key.
func (c *configReader) checkName(k *yaml.Node, r *remote) {
	switch {
	case !nameForm.MatchString(r.name):
		c.fail(k.Line, "a name begins with a letter or a digit and has only letters, digits, '.', '_' and '-': rename it")
	case len(r.name) > maxName:
		c.fail(k.Line, "a name has at most %d characters: shorten it", maxName)
	case slices.Contains(reservedNames, r.name):
		c.fail(k.Line, "this name is taken by a path of our own: rename it")
	case r.pkg == "docker" && r.name != strings.ToLower(r.name):
		c.fail(k.Line, "image names are lower case, so a docker remote's name is too: rename it to %q", strings.ToLower(r.name))
	}
}

// --- reading one value ---

// word reads a scalar as it is in the file. A number or a date is fine, its
// text counts; true and false are not, since YAML has several spellings of them.
func (c *configReader) word(n *yaml.Node) (string, bool) {
	switch tag := n.ShortTag(); {
	case n.Kind != yaml.ScalarNode:
		c.bad(n, "must be text, not a list or a mapping")
	case tag == "!!null":
		c.bad(n, "has no value: give one, or remove the key")
	case tag == "!!bool":
		c.bad(n, "must be text: put %s in quotes", n.Value)
	default:
		return n.Value, true
	}
	return "", false
}

// text reads a string value into dst, with its variables expanded.
func (c *configReader) text(n *yaml.Node, dst *string) bool {
	s, ok := c.word(n)
	if !ok {
		return false
	}
	s, complaint := expand(s, c.env)
	if complaint != "" {
		c.bad(n, "%s", complaint)
		return false
	}
	*dst = s
	return true
}

// flag reads a boolean.
func (c *configReader) flag(n *yaml.Node, dst *bool) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" {
		c.bad(n, "must be true or false")
		return
	}
	*dst = strings.EqualFold(n.Value, "true")
}

// seconds reads a whole number of seconds, at least least.
func (c *configReader) seconds(n *yaml.Node, least int64, dst *time.Duration) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || !integerForm.MatchString(n.Value) {
		c.bad(n, "must be a whole number of seconds, not negative and without unit or quotes%s", quoted(n))
		return
	}
	v, err := strconv.ParseInt(n.Value, 10, 64)
	if err != nil || v < least || v > maxSeconds {
		c.bad(n, "must be from %d to %d seconds%s", least, int64(maxSeconds), quoted(n))
		return
	}
	*dst = time.Duration(v) * time.Second
}

// patterns reads a list of regular expressions; one that is there twice counts
// once. Variables are not expanded, so that $ keeps its meaning.
func (c *configReader) patterns(n *yaml.Node, dst *[]*regexp.Regexp) {
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" || n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
		c.bad(n, "is empty: list at least one pattern, or remove the key%s", map[bool]string{true: " to allow everything"}[c.key == "immutable_patterns"])
		return
	}
	if n.Kind != yaml.SequenceNode {
		c.bad(n, "must be a list of regular expressions, each after a dash")
		return
	}
	for _, item := range n.Content {
		s, ok := c.word(item)
		if !ok || hasPattern(*dst, s) {
			continue
		}
		if s == "" {
			c.bad(item, "has an empty pattern, which matches everything: write \".*\" if that is meant")
			continue
		}
		p, err := regexp.Compile(s)
		if err != nil {
			c.bad(item, "has %q: %s", s, patternComplaint(err))
			continue
		}
		*dst = append(*dst, p)
	}
}

// url reads an http or https URL. Its complaints never quote it, since it may
// hold a password.
func (c *configReader) url(n *yaml.Node, withQuery bool) *url.URL {
	var s string
	if !c.text(n, &s) {
		return nil
	}
	u, complaint := parseUpstreamURL(s, withQuery)
	if complaint != "" {
		c.bad(n, "%s", complaint)
		return nil
	}
	return u
}

// setType reads type. What r is stays open when it is neither.
func setType(c *configReader, r *remote, n *yaml.Node) {
	var s string
	ok := c.text(n, &s)
	if s != "remote" && s != "local" {
		if ok {
			c.bad(n, "must be \"remote\" or \"local\"%s", quoted(n))
		}
		c.unsure = true
		return
	}
	r.local = s == "local"
}

// setPackage reads package.
func setPackage(c *configReader, r *remote, n *yaml.Node) {
	var s string
	ok := c.text(n, &s)
	_, known := builtinPatterns[s]
	switch {
	case known && s == "docker" && r.local:
		c.bad(n, "\"docker\" cannot be of type \"local\": images are pushed to a registry, artifactapi only mirrors one")
	case known:
		r.pkg = s
		return
	case slices.Contains(laterPackages, s):
		c.bad(n, "%q is not built yet: use \"generic\" with mutable_patterns for its index files", s)
	case ok:
		c.bad(n, "must be generic, alpine, rpm or docker%s", quoted(n))
	}
	c.unsure = true
}

// setBaseURL reads base_url; it is the first key that adds an origin.
func setBaseURL(c *configReader, r *remote, n *yaml.Node) {
	if u := c.url(n, false); u != nil {
		r.origins = append(r.origins, origin{withoutSlash(u), true})
	}
}

// setMirrors reads a list of URLs, or of mappings with url and auth.
func setMirrors(c *configReader, r *remote, n *yaml.Node) {
	if n.Kind != yaml.SequenceNode {
		c.bad(n, "must be a list of URLs or of {url: URL, auth: true}")
		return
	}
	for _, item := range n.Content {
		c.key = "mirrors"
		var o origin
		place := item
		if item.Kind == yaml.MappingNode {
			fields := map[string]field{}
			c.collect(item, "mirrors.", fields)
			if f, ok := fields["mirrors.auth"]; ok {
				c.key = "mirrors.auth"
				c.flag(f.value, &o.auth)
			}
			c.key = "mirrors.url"
			if place = fields["mirrors.url"].value; place == nil {
				c.bad(item, "is missing: say where the mirror is")
				continue
			}
		}
		if o.url = c.url(place, false); o.url != nil {
			o.url = withoutSlash(o.url)
			r.origins = append(r.origins, o)
		}
	}
}

// setUsername reads username, which Basic separates by a colon.
func setUsername(c *configReader, r *remote, n *yaml.Node) {
	if c.text(n, &r.username) && strings.Contains(r.username, ":") {
		c.bad(n, "cannot hold a colon (RFC 7617): what follows it belongs into password")
	}
}

// setHeaders reads the mapping from names to values.
func setHeaders(c *configReader, r *remote, n *yaml.Node) {
	if n.Kind != yaml.MappingNode {
		c.bad(n, "must be a mapping such as {X-Token: \"...\"}")
		return
	}
	r.headers = http.Header{}
	for k, v := range pairs(n) {
		c.key = "headers"
		name := http.CanonicalHeaderKey(k.Value)
		switch {
		case k.Kind == yaml.AliasNode || k.ShortTag() == "!!merge":
		case !headerForm.MatchString(k.Value): // not quoted: it may be a whole header with its value
			c.bad(k, "has a name that is none: write NAME: \"value\"")
		case slices.Contains(ownHeaders, name):
			c.bad(k, "cannot hold %s, which artifactapi or HTTP sets: remove it", name)
		case r.headers[name] != nil:
			c.bad(k, "has %s twice (upper and lower case are the same): keep one", name)
		default:
			c.key = "headers: " + name
			r.headers[name] = []string{""}
			c.headerValue(v, &r.headers[name][0])
		}
	}
}

// headerValue reads one value; a line break in it would begin another header.
func (c *configReader) headerValue(n *yaml.Node, dst *string) {
	if c.text(n, dst) && strings.ContainsFunc(*dst, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
		c.bad(n, "holds a line break or a control character: remove it (often the end of a file put into a variable)")
	}
}

// setMaxSize reads cache.max_size.
func setMaxSize(c *configReader, r *remote, n *yaml.Node) {
	var s string
	if !c.text(n, &s) {
		return
	}
	v, err := parseSize(s)
	if err != nil {
		c.bad(n, "%v%s", err, quoted(n))
	}
	r.maxSize = v
}

// setRegistry reads registry, which must name one remote only.
func setRegistry(c *configReader, r *remote, n *yaml.Node) {
	var s string
	if !c.text(n, &s) {
		return
	}
	if r.registry = strings.ToLower(s); !registryForm.MatchString(s) {
		c.bad(n, "must be a host such as docker.io or quay.io:443, without https:// and path")
		return
	}
	if first, ok := c.registries[r.registry]; ok {
		c.bad(n, "is that of another remote (line %d): clients could not tell them apart, so give it to one only", first)
		return
	}
	c.registries[r.registry] = n.Line
}

// setTokenRealm reads token_realm.
func setTokenRealm(c *configReader, r *remote, n *yaml.Node) { r.tokenRealm = c.url(n, true) }

// setWriteToken reads write_token. A line break could not be sent by any client.
func setWriteToken(c *configReader, r *remote, n *yaml.Node) {
	if c.text(n, (*string)(&r.writeToken)) && strings.ContainsAny(string(r.writeToken), "\r\n") {
		c.bad(n, "holds a line break: remove it (often the end of a file put into a variable)")
	}
}

// --- helpers of reading ---

// pairs yields the keys and values of a mapping, and nothing of other nodes.
func pairs(n *yaml.Node) iter.Seq2[*yaml.Node, *yaml.Node] {
	return func(yield func(k, v *yaml.Node) bool) {
		for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
			if !yield(n.Content[i], n.Content[i+1]) {
				return
			}
		}
	}
}

// quoted is how a message shows the value of n as it is in the file, before
// variables are expanded.
func quoted(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Value == "" {
		return ""
	}
	return fmt.Sprintf(", not %.40q", n.Value)
}

// expand replaces ${VAR} by the environment's value and $$ by a dollar sign;
// any other $ is itself. An empty variable counts as unset, as everywhere. Only
// what looks like a variable's name is quoted: the rest may be a secret.
func expand(s string, env func(string) (string, bool)) (expanded, complaint string) {
	var b strings.Builder
	for {
		before, rest, found := strings.Cut(s, "$")
		b.WriteString(before)
		if !found {
			return b.String(), ""
		}
		name, after, closed := strings.Cut(strings.TrimPrefix(rest, "{"), "}")
		switch {
		case strings.HasPrefix(rest, "$"):
			b.WriteByte('$')
			s = rest[1:]
		case !strings.HasPrefix(rest, "{") || !closed:
			b.WriteByte('$')
			s = rest
		case !variableForm.MatchString(name):
			return "", "has ${...} around what is no variable's name: write $$ for a dollar sign that is meant as such"
		default:
			value, ok := env(name)
			if !ok || value == "" {
				return "", fmt.Sprintf("needs the environment variable %s, which is unset or empty: set it, or write $$ for a dollar sign", name)
			}
			b.WriteString(value)
			s = after
		}
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
	case badPort(u):
		return nil, "has a port that is none: ports are 1 to 65535"
	case !withQuery && (u.RawQuery != "" || u.ForceQuery):
		return nil, "holds a query (?): remove it, clients send theirs"
	case strings.Contains(s, "#"):
		return nil, "holds a fragment (#): remove it"
	}
	u.Host = strings.ToLower(u.Host)
	return u, ""
}

// badPort reports whether u has a port that is none.
func badPort(u *url.URL) bool {
	port, err := strconv.Atoi(u.Port())
	return strings.HasSuffix(u.Host, ":") || u.Port() != "" && (err != nil || port < 1 || port > math.MaxUint16)
}

// withoutSlash drops the slashes at the end of u's path, so that a spelling
// goes behind it with exactly one.
func withoutSlash(u *url.URL) *url.URL {
	escaped := strings.TrimRight(u.EscapedPath(), "/")
	w := &url.URL{Scheme: u.Scheme, Host: u.Host}
	w.Path, _ = url.PathUnescape(escaped) // came from EscapedPath: it is well-formed
	if w.EscapedPath() != escaped {
		w.RawPath = escaped
	}
	return w
}

// patternComplaint says why Go cannot compile a regex, and names what users of
// other engines miss.
func patternComplaint(err error) string {
	var e *syntax.Error
	if !errors.As(err, &e) {
		return err.Error()
	}
	x := e.Expr
	switch {
	case strings.HasPrefix(x, "(?=") || strings.HasPrefix(x, "(?!") || strings.HasPrefix(x, "(?<=") || strings.HasPrefix(x, "(?<!"):
		return "look-around (" + x[:3] + "...) does not exist in Go's regular expressions (RE2): list what is allowed instead"
	case e.Code == syntax.ErrInvalidEscape && len(x) > 1 && (x[1] >= '1' && x[1] <= '9' || x[1] == 'k'), x == "(?P":
		return "back-references (" + x + ") do not exist in Go's regular expressions (RE2): write the text out"
	}
	return fmt.Sprintf("%s (%s): Go's regular expressions are RE2, see https://github.com/google/re2/wiki/Syntax", e.Code, x)
}

// hasPattern reports whether list has a pattern of that text.
func hasPattern(list []*regexp.Regexp, text string) bool {
	return slices.ContainsFunc(list, func(p *regexp.Regexp) bool { return p.String() == text })
}

// parseSize reads a number of bytes: 1073741824, 50GiB, 1.5 TiB, 500MB.
func parseSize(s string) (int64, error) {
	m := sizeForm.FindStringSubmatch(s)
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

// distance is how many letters must be put in, left out or changed to make b
// of a (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		corner := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := corner
			if a[i] != b[j] {
				change++
			}
			corner = row[j+1]
			row[j+1] = min(change, corner+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// --- what is shown of a config ---

// public is the effective configuration for /config, ready for encoding/json:
// every key that applies, with its default where the file says nothing, and
// "***" for secrets.
func (c *config) public() any {
	all := map[string]any{}
	for name, r := range c.remotes {
		all[name] = r.public()
	}
	return map[string]any{"remotes": all}
}

// public is what the file could say to mean r.
func (r *remote) public() map[string]any {
	cache := map[string]any{}
	m := map[string]any{"cache": cache}
	for _, k := range remoteKeys {
		if k.show == nil || k.on != "" && k.on != r.kind() || k.docker && r.pkg != "docker" {
			continue
		}
		v := k.show(r)
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

// kind is the word for r's type.
func (r *remote) kind() string {
	if r.local {
		return "local"
	}
	return "remote"
}

func showBaseURL(r *remote) any { return r.origins[0].url.String() }

func showMirrors(r *remote) any {
	var l []map[string]any
	for _, o := range r.origins[1:] {
		l = append(l, map[string]any{"url": o.url.String(), "auth": o.auth})
	}
	if l == nil {
		return nil
	}
	return l
}

func showPatterns(list []*regexp.Regexp) any {
	if len(list) == 0 {
		return nil
	}
	return list // a Regexp marshals as its text
}

func showHeaders(r *remote) any {
	if len(r.headers) == 0 {
		return nil
	}
	m := map[string]secret{}
	for name := range r.headers {
		m[name] = secret(r.headers.Get(name))
	}
	return m
}

func showTokenRealm(r *remote) any {
	if r.tokenRealm == nil {
		return nil
	}
	return r.tokenRealm.String()
}

func inSeconds(d time.Duration) any { return int64(d / time.Second) }

// unlessZero is v, or nil for what was not given.
func unlessZero[T comparable](v T) any {
	var zero T
	if v == zero {
		return nil
	}
	return v
}

// --- from a request to a file ---

// register notes which remote a registry names. What registry: says goes before
// a default; of several defaults the first in the file has it, since two
// remotes of one host (with other credentials, say) are fine as long as clients
// name them.
func (c *config) register(r *remote) {
	if r.pkg != "docker" {
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

// byRegistry is the docker remote that a client's ns names, or nil.
func (c *config) byRegistry(ns string) *remote { return c.registries[strings.ToLower(ns)] }

// precious says whether a remote's files may be nowhere else: a local
// repository's are not, and of a name that is in the file no more nobody knows.
func (c *config) precious(name string) bool {
	r := c.remotes[name]
	return r == nil || r.local
}

// home is where clients find r: /api/NAME/, or /v2/NAME/ for docker.
func (r *remote) home() string {
	if r.pkg == "docker" {
		return "/v2/" + r.name + "/"
	}
	return "/api/" + r.name + "/"
}

// resolve finds the file that a request below /api/ means: escaped is what
// follows the remote's name in its path, as it was sent, query its raw query.
// An empty path (the remote's list) is a target without class. Its errors are
// problems: 404 for a remote that is not there or lives below /v2/, 400, 414,
// and 403 for a path that r's patterns do not allow.
func (c *config) resolve(name, escaped, query string) (target, error) {
	r := c.remotes[name]
	if r == nil {
		return target{}, refuse(http.StatusNotFound, "there is no remote %.100q", name)
	}
	if r.pkg == "docker" {
		return target{}, refuse(http.StatusNotFound, "remote %q is a container registry: it is below %s", name, r.home())
	}
	path, spelling, err := spell(escaped, query)
	if err != nil || path == "" {
		return target{remote: r}, err
	}
	t := target{remote: r, path: path, spelling: spelling, wire: spelling}
	t.class, t.builtin, err = r.classify(path)
	return t, err
}

// spell reads an escaped request path (without its remote) and the raw query
// into the decoded path and the upstream spelling (SPEC.md section 4, Paths).
// Its errors are problems of errBadRequest and errTooLong. An empty path is "",
// whatever the query.
func spell(escaped, query string) (path, spelling string, err error) {
	escaped = strings.TrimLeft(escaped, "/")
	path, spelling = escaped, escaped
	if !spelled(escaped) {
		if path, spelling, err = respell(escaped); err != nil {
			return "", "", err
		}
	}
	if path == "" {
		return "", "", nil
	}
	if query != "" {
		if strings.ContainsFunc(query, func(r rune) bool { return r <= ' ' || r == 0x7f }) || !utf8.ValidString(query) {
			return "", "", unsafePath("the query holds a space, a control character or invalid UTF-8")
		}
		spelling += "?" + query
	}
	if len(spelling) > maxSpelling {
		return "", "", tooLong()
	}
	return path, spelling, nil
}

// spelled reports whether s is its own spelling and its own decoded path, which
// nearly all requests are: nothing is allocated for them.
func spelled(s string) bool {
	start := 0 // of the segment
	for i := range len(s) {
		if !pathPlain[s[i]] {
			return false
		}
		if s[i] == '/' {
			if foldable(s[start:i]) {
				return false
			}
			start = i + 1
		}
	}
	return start == len(s) || !foldable(s[start:])
}

// foldable reports whether a segment must be folded away or refused.
func foldable(segment string) bool { return segment == "" || segment == "." || segment == ".." }

// respell is spell for a path that is not plain, in one pass: path gets each
// byte decoded, spelling gets it escaped anew.
func respell(escaped string) (string, string, error) {
	var pathSpace, spellingSpace [256]byte // most paths fit: no allocation but the results
	path, spelling := pathSpace[:0], spellingSpace[:0]
	segment, segmentSpelling, piece := 0, 0, 0 // where they begin; a piece ends at escaped slashes as well
	for i := 0; i <= len(escaped); i++ {
		if i == len(escaped) || escaped[i] == '/' {
			if string(path[piece:]) == ".." {
				return "", "", unsafePath("the path holds ..")
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
			return "", "", unsafePath("the path holds a % that is not followed by two hex digits")
		}
		i += n - 1
		if b < ' ' || b == 0x7f || b == '\\' {
			return "", "", unsafePath("the path holds a control character or a backslash")
		}
		if b == '/' {
			if string(path[piece:]) == ".." {
				return "", "", unsafePath("the path holds ..")
			}
			piece = len(path) + 1
		}
		path = append(path, b)
		spelling = appendSpelling(spelling, b, n == 3)
		if len(spelling) > maxSpelling+1 { // one more: a last . may still be folded away
			return "", "", tooLong()
		}
	}
	if !utf8.Valid(path) {
		return "", "", unsafePath("the path is not UTF-8")
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
	high, ok := unhex(s[i+1])
	low, ok2 := unhex(s[i+2])
	if !ok || !ok2 {
		return 0, 0
	}
	return high<<4 | low, 3
}

// unhex is the value of one hex digit.
func unhex(c byte) (v byte, ok bool) {
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

// pathPlain has the bytes that a spelling holds unescaped.
var pathPlain = func() (t [256]bool) {
	for _, b := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/") {
		t[b] = true
	}
	return t
}()

// appendSpelling appends b as a spelling has it. A slash that was escaped stays
// escaped: it is part of a name.
func appendSpelling(to []byte, b byte, wasEscaped bool) []byte {
	if pathPlain[b] && !(b == '/' && wasEscaped) {
		return append(to, b)
	}
	return append(to, '%', upperHex[b>>4], upperHex[b&15])
}

// unsafePath is the answer to a path that cannot be asked for.
func unsafePath(why string) error {
	return &problem{status: http.StatusBadRequest, detail: why, cause: errBadRequest}
}

// tooLong is the answer to a path that could not be stored.
func tooLong() error {
	return &problem{status: http.StatusRequestURITooLong, cause: errTooLong,
		detail: fmt.Sprintf("the path with its query is over %d bytes long when it is escaped", maxSpelling)}
}

// classify decides what path is on r (SPEC.md section 3), or errDenied.
func (r *remote) classify(path string) (c class, builtin bool, err error) {
	builtin = matches(r.builtin, path)
	listed := r.pkg != "docker" && (builtin || matches(r.mutable, path)) // allowed whatever else is
	switch {
	case !listed && r.immutable != nil && !matches(r.immutable, path):
		return "", false, &problem{status: http.StatusForbidden, cause: errDenied,
			detail: fmt.Sprintf("remote %q does not allow this path: none of its patterns matches", r.name)}
	case r.local:
		return local, false, nil
	case builtin || listed || strings.HasSuffix(path, "/"):
		return mutable, builtin, nil
	}
	return immutable, false, nil
}

// matches reports whether any pattern is found in path.
func matches(patterns []*regexp.Regexp, path string) bool {
	for _, p := range patterns {
		if p.MatchString(path) {
			return true
		}
	}
	return false
}

// ttl is how long a file of that class stays fresh; forever says for ever.
func (r *remote) ttl(c class) (d time.Duration, forever bool) {
	switch c {
	case mutable:
		return r.mutableTTL, false
	case immutable:
		return r.immutableTTL, r.immutableTTL == 0
	}
	return 0, true
}

// key is the file's storage key.
func (t target) key() string { return keyOf(t.remote.name, t.spelling) }

// keyOf is the storage key {remote}/{path_hash}/{filename} of a remote's file
// (SPEC.md section 4).
func keyOf(remote, spelling string) string {
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
		if i += max(n, 1); !(pathPlain[b] && b != '/') && b != '+' && b != '@' && b != '=' {
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

// decodedPath is a spelling as people read it: unescaped, without query.
func decodedPath(spelling string) string {
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
