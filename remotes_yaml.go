// remotes_yaml.go: how remotes.yaml becomes ready values. yaml.v3 only parses the
// file into nodes, which are walked here: decoding into structs would stop at the
// first mistake and would not know the line of each.

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

// configError is one mistake in a configuration file.
type configError struct {
	file   string
	line   int    // counted from 1
	remote string // "" outside of a remote
	text   string // what is wrong and how to cure it; never a secret
}

// Error returns file:LINE: remote "x": text.
func (e configError) Error() string {
	if e.remote == "" {
		return fmt.Sprintf("%s:%d: %s", e.file, e.line, e.text)
	}
	return fmt.Sprintf("%s:%d: remote %q: %s", e.file, e.line, e.remote, e.text)
}

// configErrors are all mistakes in one file, in the order of its lines. A caller that
// prints each on a line of its own gets them with errors.AsType.
type configErrors []configError

// Error returns all mistakes, each on a line.
func (l configErrors) Error() string {
	s := make([]string, len(l))
	for i, e := range l {
		s[i] = e.Error()
	}
	return strings.Join(s, "\n")
}

// What values of remotes.yaml look like.
var (
	namePattern     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	variablePattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	headerPattern   = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
	registryPattern = regexp.MustCompile(`^[A-Za-z0-9._-]+(:[0-9]+)?$|^\[[0-9A-Fa-f:.]+\](:[0-9]+)?$`)
	integerPattern  = regexp.MustCompile(`^(0|[1-9][0-9]*)$`)
	sizePattern     = regexp.MustCompile(`(?i)^([0-9]+(?:\.[0-9]+)?) ?(|B|[KMGT]i?B)$`)

	// yamlErrorPattern splits a syntax error of yaml.v3 into its line and its text.
	// The scanner of yaml.v3 counts lines from 1 and the parser from 0;
	// parserErrorPattern matches the texts of the parser.
	yamlErrorPattern   = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)
	parserErrorPattern = regexp.MustCompile(`^did not find expected (?:<|node|'-'|key|',')|^found (?:undefined tag handle|duplicate %|incompatible)`)
)

// parseConfig parses data, the content of the file called name. env looks up an
// environment variable as os.LookupEnv does. The error is a configErrors with every
// mistake in the file.
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

// configReader walks the nodes of one file and collects its mistakes. One goroutine
// uses it.
type configReader struct {
	file string
	env  func(string) (string, bool)
	keys []remoteKey // remoteKeys; methods that it refers to cannot name it (initialization cycle)
	errs configErrors

	remote      string         // the remote that is read now; "" outside of remotes
	key         string         // the key that is read now
	typeUnknown bool           // type or package is wrong: other keys are not checked against them
	registries  map[string]int // the line of each value of the key registry
}

// yamlField is one key of a mapping with its value.
type yamlField struct{ key, value *yaml.Node }

// addError reports a mistake.
func (c *configReader) addError(line int, format string, args ...any) {
	c.errs = append(c.errs, configError{c.file, max(line, 1), c.remote, fmt.Sprintf(format, args...)})
}

// addValueError reports a mistake in the value n of the current key. It does not
// report an alias, which rejectAliases has reported.
func (c *configReader) addValueError(n *yaml.Node, format string, args ...any) {
	if n.Kind != yaml.AliasNode {
		c.addError(n.Line, "%s %s", c.key, fmt.Sprintf(format, args...))
	}
}

// checkEncoding refuses bytes that YAML does not allow (YAML 1.2 section 5.1) and
// reports whether there are none. yaml.v3 would refuse them without naming the line.
func (c *configReader) checkEncoding(data []byte) bool {
	for line, text := range bytes.Split(data, []byte("\n")) {
		if !utf8.Valid(text) {
			c.addError(line+1, "this line is not UTF-8: save the file in UTF-8")
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

// readDocument reads the document of a file and refuses a second one.
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
	// Decode stopped at the end of the document. What follows must be the end of the
	// file, or half of the remotes would be ignored.
	switch err := dec.Decode(&next); {
	case err == nil:
		c.addError(next.Line, "a second YAML document begins here: put everything into one, without ---")
	case !errors.Is(err, io.EOF):
		c.addSyntaxError(data, err)
	}
}

// addSyntaxError reports an error of yaml.v3. The texts of yaml.v3 do not quote the
// file, except for the name of an unknown anchor, which may be a password that begins
// with an asterisk and is left out here.
func (c *configReader) addSyntaxError(data []byte, err error) {
	m := yamlErrorPattern.FindStringSubmatch(err.Error())
	if m == nil {
		c.addError(1, "not readable as YAML")
		return
	}
	line, _ := strconv.Atoi(m[1]) // 0, which addError makes 1, if yaml.v3 names no line
	text := m[2]
	if parserErrorPattern.MatchString(text) {
		line++
	}
	if anchor, ok := strings.CutPrefix(text, "unknown anchor '"); ok {
		anchor = "*" + strings.TrimSuffix(anchor, "' referenced")
		before, _, _ := strings.Cut(string(data), anchor)
		line = strings.Count(before, "\n") + 1
		text = "an alias of an anchor that does not exist: put a value that begins with * in quotes"
	}
	if strings.HasSuffix(text, "cannot start any token") {
		text += " (indent with spaces, not with tabs; put a value that begins with @, % or ` in quotes)"
	}
	// yaml.v3 may name a line behind the end of the file.
	last := bytes.Count(bytes.TrimRight(data, "\r\n"), []byte("\n")) + 1
	c.addError(min(line, last), "not readable as YAML: %s", text)
}

// readRoot reads the top level of the file.
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

// readRemotes reads the mapping from names to remotes into cfg.
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
			c.addError(k.Line, "this name is there twice (first in line %d): rename one, names must be unique", first)
			continue
		}
		lines[r.name] = k.Line
		cfg.remotes[r.name] = r
		cfg.addRegistry(r)
	}
}

// readRemote reads the remote named k. The result can be used only if no mistake was
// reported.
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
	// A pattern that is built in too counts as built in: check_builtin_updates rules it.
	r.mutable = slices.DeleteFunc(r.mutable, func(p *regexp.Regexp) bool { return hasPattern(r.builtin, p.String()) })
	return r
}

// rejectAliases reports the aliases, merge keys and tags in n and below. With them a
// value would not stand where it is used.
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

// rejectNode reports whether n itself is an alias, a merge key or tagged. If it is,
// that is also reported as a mistake.
func (c *configReader) rejectNode(n *yaml.Node) bool {
	switch {
	case n.Kind == yaml.AliasNode:
		c.addError(n.Line, "a YAML alias is not allowed: write the value out, or put it in quotes if it begins with *")
	case n.ShortTag() == "!!merge":
		c.typeUnknown = true // type and package may be among the merged keys
		c.addError(n.Line, "a YAML merge key (<<) is not allowed: write the keys out")
	case n.Style&yaml.TaggedStyle != 0:
		c.addError(n.Line, "a YAML tag is not allowed: remove it, or put the value in quotes if it begins with !")
	default:
		return false
	}
	return true
}

// collectKeys puts the keys of the mapping n into a map by their full names, which
// begin with prefix. It refuses unknown and repeated keys.
func (c *configReader) collectKeys(n *yaml.Node, prefix string, into map[string]yamlField) {
	for k, v := range mappingPairs(n) {
		name := prefix + k.Value
		if k.Kind == yaml.AliasNode || k.ShortTag() == "!!merge" {
			continue // rejectAliases has reported it
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
			v.Line = k.Line // yaml.v3 may say that a missing value is on a later line
		}
		into[name] = yamlField{k, v}
		if name == "cache" {
			c.collectCacheKeys(v, into)
		}
	}
}

// collectCacheKeys is collectKeys for the block cache, the only block in a remote.
func (c *configReader) collectCacheKeys(v *yaml.Node, into map[string]yamlField) {
	c.key = "cache"
	if v.Kind != yaml.MappingNode {
		c.addValueError(v, "must be a mapping such as {mutable_ttl: 3600}: give its keys, or remove it")
		return
	}
	c.collectKeys(v, "cache.", into)
}

// findKey returns the key with that full name, or nil.
func (c *configReader) findKey(name string) *remoteKey {
	for i := range c.keys {
		if c.keys[i].name == name {
			return &c.keys[i]
		}
	}
	return nil
}

// addUnknownKey reports that the key k below prefix is unknown, and names the key that
// is most like it.
func (c *configReader) addUnknownKey(k *yaml.Node, prefix string) {
	if k.Kind != yaml.ScalarNode {
		c.addError(k.Line, "a key must be a word")
		return
	}
	hint := "remove it"
	best := 3 // a word with more than two typing errors is another word
	for _, key := range c.keys {
		name, ok := strings.CutPrefix(key.name, prefix)
		if d := editDistance(k.Value, name); ok && d < best {
			best, hint = d, fmt.Sprintf("did you mean %s?", name)
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

// keyApplies reports whether a remote like r may have the key. If not, that is also
// reported as a mistake.
func (c *configReader) keyApplies(key remoteKey, r *remote, f yamlField) bool {
	switch {
	case c.typeUnknown:
	case key.onType != "" && key.onType != r.typeName():
		c.addError(f.key.Line, "%s has no meaning for type %q: remove it", key.name, r.typeName())
		return false
	case key.docker && r.packageType != "docker":
		c.addError(f.key.Line, "%s is for package \"docker\" only: remove it", key.name)
		return false
	}
	return true
}

// checkName refuses a bad name of r. The name is an element of paths, the name of a
// directory and the begin of every storage key.
func (c *configReader) checkName(k *yaml.Node, r *remote) {
	switch {
	case !namePattern.MatchString(r.name):
		c.addError(k.Line, "a name begins with a letter or a digit and has only letters, digits, '.', '_' and '-': rename it")
	case len(r.name) > maxName:
		c.addError(k.Line, "a name has at most %d characters: shorten it", maxName)
	case slices.Contains(reservedNames, r.name):
		c.addError(k.Line, "this name is reserved, because artifactapi serves /%s itself: rename the remote", r.name)
	case r.packageType == "docker" && r.name != strings.ToLower(r.name):
		c.addError(k.Line, "image names are in lower case, so the name of a docker remote must be too: rename it to %q", strings.ToLower(r.name))
	}
}

// readScalar returns the text of a scalar as the file has it, so a number or a date
// may stand without quotes. true and false must not: YAML has several spellings of
// them.
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

// readString reads text into dst, with its variables expanded, and reports whether it
// did. Otherwise dst is unchanged and the mistake is reported.
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

// readBool reads true or false into dst.
func (c *configReader) readBool(n *yaml.Node, dst *bool) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" {
		c.addValueError(n, "must be true or false")
		return
	}
	*dst = strings.EqualFold(n.Value, "true")
}

// readSeconds reads a whole number of seconds from minimum to maxSeconds into dst.
func (c *configReader) readSeconds(n *yaml.Node, minimum int64, dst *time.Duration) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || !integerPattern.MatchString(n.Value) {
		c.addValueError(n, "must be a whole number of seconds, not negative and without unit or quotes%s", quoteValue(n))
		return
	}
	v, err := strconv.ParseInt(n.Value, 10, 64)
	if err != nil || v < minimum || v > maxSeconds {
		c.addValueError(n, "must be from %d to %d seconds%s", minimum, int64(maxSeconds), quoteValue(n))
		return
	}
	*dst = time.Duration(v) * time.Second
}

// readPatterns reads a list of regular expressions into dst. A repeated pattern is
// taken once. Variables are not expanded, since $ has a meaning in a pattern.
func (c *configReader) readPatterns(n *yaml.Node, dst *[]*regexp.Regexp) {
	if (n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null") || (n.Kind == yaml.SequenceNode && len(n.Content) == 0) {
		effect := ""
		if c.key == "immutable_patterns" {
			effect = " to allow everything"
		}
		c.addValueError(n, "is empty: list at least one pattern, or remove the key%s", effect)
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
			c.addValueError(item, "has an empty pattern, which matches everything: write \".*\" if you mean that")
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

// readURL reads an http or https URL, or returns nil after reporting a mistake. The
// report never quotes the URL, which may hold a password.
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

// mappingPairs yields the keys and values of a mapping. For another node it yields
// nothing.
func mappingPairs(n *yaml.Node) iter.Seq2[*yaml.Node, *yaml.Node] {
	return func(yield func(k, v *yaml.Node) bool) {
		for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
			if !yield(n.Content[i], n.Content[i+1]) {
				return
			}
		}
	}
}

// quoteValue returns the part of a message that quotes the value of n, as it stands in
// the file with its variables not expanded. For another node, or an empty value, it
// is "".
func quoteValue(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Value == "" {
		return ""
	}
	return fmt.Sprintf(", not %.40q", n.Value)
}

// expandVariables replaces ${VAR} by the value of the environment variable and $$ by a
// dollar sign. Any other $ stays. An empty variable counts as unset, as it does for
// the settings of the program. complaint is "", or says what is wrong; it quotes only
// names of variables, because the rest of s may be a secret.
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
			return "", "has a ${...} that does not hold the name of a variable: write $$ for a plain dollar sign"
		default:
			value, ok := env(name)
			if !ok || value == "" {
				return "", fmt.Sprintf("needs the environment variable %s, which is unset or empty: set it, or write $$ for a plain dollar sign", name)
			}
			b.WriteString(value)
			s = after
		}
	}
}

// explainPatternError says why Go cannot compile a pattern. It names the features of
// other engines that RE2 does not have.
func explainPatternError(err error) string {
	invalid, ok := errors.AsType[*syntax.Error](err)
	if !ok {
		return err.Error()
	}
	expr := invalid.Expr
	isLookAround := func(prefix string) bool { return strings.HasPrefix(expr, prefix) }
	isBackReference := expr == "(?P" || (invalid.Code == syntax.ErrInvalidEscape && len(expr) > 1 && strings.IndexByte("123456789k", expr[1]) >= 0)
	switch {
	case slices.ContainsFunc([]string{"(?=", "(?!", "(?<=", "(?<!"}, isLookAround):
		return "look-around (" + expr[:3] + "...) does not exist in Go's regular expressions (RE2): list what is allowed instead"
	case isBackReference:
		return "back-references (" + expr + ") do not exist in Go's regular expressions (RE2): write the text out"
	}
	return fmt.Sprintf("%s (%s): Go's regular expressions are RE2, see https://github.com/google/re2/wiki/Syntax", invalid.Code, expr)
}

// editDistance returns how many bytes must be inserted, removed or changed to make b
// out of a (Levenshtein distance).
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
