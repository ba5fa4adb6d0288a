// remotes_yaml.go: remotes.yaml becomes ready values. The node tree is walked by
// hand, so that every mistake is found and has its line.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
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
