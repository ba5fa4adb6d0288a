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
	namePattern     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	variablePattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	headerPattern   = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
	registryPattern = regexp.MustCompile(`^[A-Za-z0-9._-]+(:[0-9]+)?$|^\[[0-9A-Fa-f:.]+\](:[0-9]+)?$`)
	integerPattern  = regexp.MustCompile(`^(0|[1-9][0-9]*)$`)
	sizePattern     = regexp.MustCompile(`(?i)^([0-9]+(?:\.[0-9]+)?) ?(|B|[KMGT]i?B)$`)

	// yamlErrorPattern takes yaml.v3's syntax errors apart. Those that its parser
	// (not its scanner) finds count lines from 0: parserErrorPattern knows them.
	yamlErrorPattern   = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)
	parserErrorPattern = regexp.MustCompile(`^did not find expected (?:<|node|'-'|key|',')|^found (?:undefined tag handle|duplicate %|incompatible)`)
)

// parseConfig turns the bytes of file name into a config. Its error is a
// configErrors that lists every mistake, one a line:
// name:LINE: remote "x": what and how to cure it. env is os.LookupEnv.
func parseConfig(name string, data []byte, env func(string) (string, bool)) (*config, error) {
	c := &configReader{file: name, env: env, keys: remoteKeys, registries: map[string]int{}}
	cfg := &config{remotes: map[string]*remote{}, registries: map[string]*remote{}}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	if c.checkEncoding(data) {
		c.readDocument(data, cfg)
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

	remote      string         // being read; "" outside of one
	key         string         // being read
	typeUnknown bool           // its type or package is wrong: do not judge the other keys by them
	registries  map[string]int // line of each registry: that was given
}

// yamlField is one key of a mapping with its value.
type yamlField struct{ key, value *yaml.Node }

// addError notes a mistake.
func (c *configReader) addError(line int, format string, args ...any) {
	c.errs = append(c.errs, configError{c.file, max(line, 1), c.remote, fmt.Sprintf(format, args...)})
}

// addValueError notes a mistake in the value of the current key. An alias was reported
// when the tree was searched for them.
func (c *configReader) addValueError(n *yaml.Node, format string, args ...any) {
	if n.Kind != yaml.AliasNode {
		c.addError(n.Line, "%s %s", c.key, fmt.Sprintf(format, args...))
	}
}

// checkEncoding refuses bytes that YAML cannot hold, since yaml.v3 does so without
// a line.
func (c *configReader) checkEncoding(data []byte) bool {
	for line, text := range bytes.Split(data, []byte("\n")) {
		if !utf8.Valid(text) {
			c.addError(line+1, "this line is not UTF-8: save the file in that encoding")
			return false
		}
		control := func(r rune) bool { return (r < ' ' && r != '\t' && r != '\r') || (r >= 0x7f && r < 0xa0 && r != 0x85) }
		if bytes.IndexFunc(text, control) >= 0 {
			c.addError(line+1, "this line holds a control character: remove it, or write it as an escape within double quotes")
			return false
		}
	}
	return true
}

// readDocument reads the one document of a file and refuses any more.
func (c *configReader) readDocument(data []byte, cfg *config) {
	var doc, next yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		c.addError(1, "the file is empty: it needs the key remotes with at least one remote")
		return
	case err != nil:
		c.addSyntaxError(data, err)
		return
	}
	c.readRoot(doc.Content[0], cfg)
	c.remote = ""
	switch err := dec.Decode(&next); {
	case err == nil:
		c.addError(next.Line, "a second YAML document begins here: keep everything in one, without ---")
	case !errors.Is(err, io.EOF):
		c.addSyntaxError(data, err)
	}
}

// addSyntaxError reports what yaml.v3 could not read. Its text never quotes the file,
// but for the name of an unknown anchor, which may be a password that begins
// with an asterisk.
func (c *configReader) addSyntaxError(data []byte, err error) {
	m := yamlErrorPattern.FindStringSubmatch(err.Error())
	if m == nil {
		c.addError(1, "not readable as YAML")
		return
	}
	line, _ := strconv.Atoi(m[1])
	text := m[2]
	if parserErrorPattern.MatchString(text) {
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
	c.addError(min(line, last), "not readable as YAML: %s", text)
}

// readRoot reads the file's top level.
func (c *configReader) readRoot(root *yaml.Node, cfg *config) {
	if root.Kind != yaml.MappingNode {
		c.addError(root.Line, "the file must be a mapping with the key remotes")
		return
	}
	seen := 0
	for k, v := range mappingPairs(root) {
		switch {
		case c.rejectNode(k):
		case k.Value != "remotes":
			c.addError(k.Line, "unknown key %.60q: the only key at the top is remotes", k.Value)
		case seen > 0:
			c.addError(k.Line, "remotes is there twice (first in line %d): put all remotes below one", seen)
		default:
			seen = k.Line
			c.readRemotes(v, cfg)
		}
		c.remote = ""
	}
	if seen == 0 {
		c.addError(root.Line, "the key remotes is missing: it holds the remotes by name")
	}
}

// readRemotes reads the mapping from names to remotes.
func (c *configReader) readRemotes(n *yaml.Node, cfg *config) {
	if n.Kind != yaml.MappingNode || len(n.Content) == 0 {
		if !c.rejectNode(n) {
			c.addError(n.Line, "remotes must be a mapping with at least one remote: NAME, and below it its keys")
		}
		return
	}
	lines := map[string]int{}
	for k, v := range mappingPairs(n) {
		if c.remote = ""; c.rejectNode(k) {
			continue
		}
		r := c.readRemote(k, v)
		if first := lines[r.name]; first > 0 {
			c.addError(k.Line, "this name is there twice (first in line %d): names must be unique", first)
			continue
		}
		lines[r.name] = k.Line
		cfg.remotes[r.name] = r
		cfg.addRegistry(r)
	}
}

// readRemote reads one entry. What it returns is whole only if no mistake was
// noted.
func (c *configReader) readRemote(k, v *yaml.Node) *remote {
	c.remote, c.typeUnknown = k.Value, false
	r := &remote{name: k.Value, packageType: "generic", mutableTTL: defaultMutableTTL, timeout: defaultTimeout}
	c.rejectAliases(v)
	if v.Kind != yaml.MappingNode {
		if v.Kind != yaml.AliasNode {
			c.addError(k.Line, "needs keys below its name, at least base_url")
		}
		c.checkName(k, r)
		return r
	}
	fields := map[string]yamlField{}
	c.collectKeys(v, "", fields)
	for _, key := range c.keys {
		if f, ok := fields[key.name]; ok && key.set != nil && c.keyApplies(key, r, f) {
			c.key = key.name
			key.set(c, r, f.value)
		}
	}
	if _, ok := fields["base_url"]; !ok && !r.local && !c.typeUnknown {
		c.addError(k.Line, "base_url is missing: say where its files are, or type: \"local\"")
	}
	c.checkName(k, r)
	r.builtin = builtinPatterns[r.packageType]
	r.mutable = slices.DeleteFunc(r.mutable, func(p *regexp.Regexp) bool { return hasPattern(r.builtin, p.String()) })
	return r
}

// rejectAliases refuses what hides a value elsewhere: aliases, merge keys and tags.
func (c *configReader) rejectAliases(n *yaml.Node) {
	if c.rejectNode(n) {
		return
	}
	if n.Kind != yaml.MappingNode {
		for _, child := range n.Content {
			c.rejectAliases(child)
		}
		return
	}
	for k, v := range mappingPairs(n) {
		if !c.rejectNode(k) {
			c.rejectAliases(v)
		}
	}
}

// rejectNode reports whether n is an alias, a merge key or tagged, and notes that
// as a mistake.
func (c *configReader) rejectNode(n *yaml.Node) bool {
	switch {
	case n.Kind == yaml.AliasNode:
		c.addError(n.Line, "a YAML alias: write the value out (or in quotes if it shall begin with *)")
	case n.ShortTag() == "!!merge":
		c.typeUnknown = true // what is merged may be what seems to be missing
		c.addError(n.Line, "a YAML merge key (<<): write the keys out")
	case n.Style&yaml.TaggedStyle != 0:
		c.addError(n.Line, "a YAML tag: remove it (or put a value that begins with ! in quotes)")
	default:
		return false
	}
	return true
}

// collectKeys files the keys of mapping n by their full names and refuses unknown
// and repeated ones.
func (c *configReader) collectKeys(n *yaml.Node, prefix string, into map[string]yamlField) {
	for k, v := range mappingPairs(n) {
		name := prefix + k.Value
		if k.Kind == yaml.AliasNode || k.ShortTag() == "!!merge" {
			continue // noted by scan
		}
		if k.Kind != yaml.ScalarNode || c.findKey(name) == nil {
			c.addUnknownKey(k, prefix)
			continue
		}
		if first, ok := into[name]; ok {
			c.addError(k.Line, "%s is there twice (first in line %d): keep one", name, first.key.Line)
			continue
		}
		if v.ShortTag() == "!!null" && v.Kind == yaml.ScalarNode {
			v.Line = k.Line // yaml.v3 may put a value that is not there on a later line
		}
		into[name] = yamlField{k, v}
		if name == "cache" {
			c.collectCacheKeys(v, into)
		}
	}
}

// collectCacheKeys files the keys of the one block that a remote has.
func (c *configReader) collectCacheKeys(v *yaml.Node, into map[string]yamlField) {
	c.key = "cache"
	if v.Kind != yaml.MappingNode {
		c.addValueError(v, "must be a mapping such as {mutable_ttl: 3600}: give its keys, or remove it")
		return
	}
	c.collectKeys(v, "cache.", into)
}

// findKey finds a key by its full name.
func (c *configReader) findKey(name string) *remoteKey {
	for i := range c.keys {
		if c.keys[i].name == name {
			return &c.keys[i]
		}
	}
	return nil
}

// addUnknownKey reports key k below prefix and says what may have been meant.
func (c *configReader) addUnknownKey(k *yaml.Node, prefix string) {
	if k.Kind != yaml.ScalarNode {
		c.addError(k.Line, "a key must be a word")
		return
	}
	hint := "remove it"
	best := 3 // more than two slips make another word
	for _, key := range c.keys {
		rest, ok := strings.CutPrefix(key.name, prefix)
		if d := editDistance(k.Value, rest); ok && d < best {
			best, hint = d, fmt.Sprintf("did you mean %s?", rest)
		}
	}
	switch {
	case prefix == "" && c.findKey("cache."+k.Value) != nil:
		hint = "it belongs below cache"
	case prefix != "" && c.findKey(k.Value) != nil:
		hint = "it does not belong below " + strings.TrimSuffix(prefix, ".")
	}
	c.addError(k.Line, "unknown key %.60q: %s", prefix+k.Value, hint)
}

// keyApplies reports whether a key means something for r, and notes if not.
func (c *configReader) keyApplies(key remoteKey, r *remote, f yamlField) bool {
	switch {
	case c.typeUnknown:
	case key.onType != "" && key.onType != r.typeName():
		c.addError(f.key.Line, "%s means nothing for type %q: remove it", key.name, r.typeName())
		return false
	case key.docker && r.packageType != "docker":
		c.addError(f.key.Line, "%s is for package \"docker\" only: remove it", key.name)
		return false
	}
	return true
}

// checkName judges r's name, which is a path element, a directory and part of
// every key.
func (c *configReader) checkName(k *yaml.Node, r *remote) {
	switch {
	case !namePattern.MatchString(r.name):
		c.addError(k.Line, "a name begins with a letter or a digit and has only letters, digits, '.', '_' and '-': rename it")
	case len(r.name) > maxName:
		c.addError(k.Line, "a name has at most %d characters: shorten it", maxName)
	case slices.Contains(reservedNames, r.name):
		c.addError(k.Line, "this name is taken by a path of our own: rename it")
	case r.packageType == "docker" && r.name != strings.ToLower(r.name):
		c.addError(k.Line, "image names are lower case, so a docker remote's name is too: rename it to %q", strings.ToLower(r.name))
	}
}

// readScalar reads a scalar as it is in the file. A number or a date is fine, its
// text counts; true and false are not, since YAML has several spellings of them.
func (c *configReader) readScalar(n *yaml.Node) (string, bool) {
	switch tag := n.ShortTag(); {
	case n.Kind != yaml.ScalarNode:
		c.addValueError(n, "must be text, not a list or a mapping")
	case tag == "!!null":
		c.addValueError(n, "has no value: give one, or remove the key")
	case tag == "!!bool":
		c.addValueError(n, "must be text: put %s in quotes", n.Value)
	default:
		return n.Value, true
	}
	return "", false
}

// readString reads a string value into dst, with its variables expanded.
func (c *configReader) readString(n *yaml.Node, dst *string) bool {
	s, ok := c.readScalar(n)
	if !ok {
		return false
	}
	s, complaint := expandVariables(s, c.env)
	if complaint != "" {
		c.addValueError(n, "%s", complaint)
		return false
	}
	*dst = s
	return true
}

// readBool reads a boolean.
func (c *configReader) readBool(n *yaml.Node, dst *bool) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" {
		c.addValueError(n, "must be true or false")
		return
	}
	*dst = strings.EqualFold(n.Value, "true")
}

// readSeconds reads a whole number of seconds, at least least.
func (c *configReader) readSeconds(n *yaml.Node, least int64, dst *time.Duration) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || !integerPattern.MatchString(n.Value) {
		c.addValueError(n, "must be a whole number of seconds, not negative and without unit or quotes%s", quoteValue(n))
		return
	}
	v, err := strconv.ParseInt(n.Value, 10, 64)
	if err != nil || v < least || v > maxSeconds {
		c.addValueError(n, "must be from %d to %d seconds%s", least, int64(maxSeconds), quoteValue(n))
		return
	}
	*dst = time.Duration(v) * time.Second
}

// readPatterns reads a list of regular expressions; one that is there twice counts
// once. Variables are not expanded, so that $ keeps its meaning.
func (c *configReader) readPatterns(n *yaml.Node, dst *[]*regexp.Regexp) {
	if (n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null") || (n.Kind == yaml.SequenceNode && len(n.Content) == 0) {
		c.addValueError(n, "is empty: list at least one pattern, or remove the key%s", map[bool]string{true: " to allow everything"}[c.key == "immutable_patterns"])
		return
	}
	if n.Kind != yaml.SequenceNode {
		c.addValueError(n, "must be a list of regular expressions, each after a dash")
		return
	}
	for _, item := range n.Content {
		s, ok := c.readScalar(item)
		if !ok || hasPattern(*dst, s) {
			continue
		}
		if s == "" {
			c.addValueError(item, "has an empty pattern, which matches everything: write \".*\" if that is meant")
			continue
		}
		p, err := regexp.Compile(s)
		if err != nil {
			c.addValueError(item, "has %q: %s", s, explainPatternError(err))
			continue
		}
		*dst = append(*dst, p)
	}
}

// readURL reads an http or https URL. Its complaints never quote it, since it may
// hold a password.
func (c *configReader) readURL(n *yaml.Node, withQuery bool) *url.URL {
	var s string
	if !c.readString(n, &s) {
		return nil
	}
	u, complaint := parseUpstreamURL(s, withQuery)
	if complaint != "" {
		c.addValueError(n, "%s", complaint)
		return nil
	}
	return u
}

// mappingPairs yields the keys and values of a mapping, and nothing of other nodes.
func mappingPairs(n *yaml.Node) iter.Seq2[*yaml.Node, *yaml.Node] {
	return func(yield func(k, v *yaml.Node) bool) {
		for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
			if !yield(n.Content[i], n.Content[i+1]) {
				return
			}
		}
	}
}

// quoteValue is how a message shows the value of n as it is in the file, before
// variables are expanded.
func quoteValue(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Value == "" {
		return ""
	}
	return fmt.Sprintf(", not %.40q", n.Value)
}

// expandVariables replaces ${VAR} by the environment's value and $$ by a dollar sign;
// any other $ is itself. An empty variable counts as unset, as everywhere. Only
// what looks like a variable's name is quoted: the rest may be a secret.
func expandVariables(s string, env func(string) (string, bool)) (expanded, complaint string) {
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
		case !variablePattern.MatchString(name):
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

// explainPatternError says why Go cannot compile a regex, and names what users of
// other engines miss.
func explainPatternError(err error) string {
	var e *syntax.Error
	if !errors.As(err, &e) {
		return err.Error()
	}
	x := e.Expr
	switch {
	case strings.HasPrefix(x, "(?=") || strings.HasPrefix(x, "(?!") || strings.HasPrefix(x, "(?<=") || strings.HasPrefix(x, "(?<!"):
		return "look-around (" + x[:3] + "...) does not exist in Go's regular expressions (RE2): list what is allowed instead"
	case e.Code == syntax.ErrInvalidEscape && len(x) > 1 && ((x[1] >= '1' && x[1] <= '9') || x[1] == 'k'), x == "(?P":
		return "back-references (" + x + ") do not exist in Go's regular expressions (RE2): write the text out"
	}
	return fmt.Sprintf("%s (%s): Go's regular expressions are RE2, see https://github.com/google/re2/wiki/Syntax", e.Code, x)
}

// editDistance is how many letters must be put in, left out or changed to make b
// of a (Levenshtein).
func editDistance(a, b string) int {
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
