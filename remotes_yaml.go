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
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"
)

// configError is one mistake in a configuration file.
type configError struct {
	line int    // counted from 1
	text string // FILE:LINE: remote "x": what is wrong and how to cure it; never a secret
}

var (
	namePattern     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	dollarPattern   = regexp.MustCompile(`\$\$|\$\{[^}]*\}`)
	variablePattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	headerPattern   = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
	bareVariable    = regexp.MustCompile(`\$([A-Za-z_][A-Za-z0-9_]*)`)
	registryPattern = regexp.MustCompile(`^[A-Za-z0-9._-]+(:[0-9]+)?$|^\[[0-9A-Fa-f:.]+\](:[0-9]+)?$`)
	yamlErrorStart  = regexp.MustCompile(`^(?:yaml: )?(?:line [0-9]+: )?`)
	sizePattern     = regexp.MustCompile(`(?i)^([0-9]+(?:\.[0-9]+)?) ?(?:([KMGT])(i?)B?|B)?$`)

	// Features of other engines that Go's does not have, as regexp.Compile quotes them.
	lookAroundPattern    = regexp.MustCompile("`(\\(\\?<?[=!])")
	backReferencePattern = regexp.MustCompile("`(\\\\[1-9k]|\\(\\?P)`")
)

// parseConfig parses data, the content of the file called name. env looks up an
// environment variable as os.LookupEnv does. The error has every mistake in the file, each
// on a line, in the order of its lines.
func parseConfig(name string, data []byte, env func(string) (string, bool)) (*config, error) {
	c := &configReader{file: name, env: env, keys: remoteKeys, registries: map[string]int{}}
	cfg := &config{remotes: map[string]*remote{}, registries: map[string]*remote{}}
	c.readDocument(bytes.TrimPrefix(data, []byte("\ufeff")), cfg)
	if len(c.errs) > 0 {
		slices.SortStableFunc(c.errs, func(a, b configError) int { return a.line - b.line })
		var all []string
		for _, e := range c.errs {
			all = append(all, e.text)
		}
		return nil, errors.New(strings.Join(all, "\n"))
	}
	cfg.names = sortedKeys(cfg.remotes)
	cfg.warnings = c.warnings
	cfg.urls = newURLTable(cfg, false)
	publicURL, _ := env("PUBLIC_URL")
	cfg.useLinks(publicURL)
	for _, name := range cfg.names {
		r := cfg.remotes[name]
		r.config = cfg
		if !r.local && r.packageType == "generic" && r.mutable == nil && r.immutableTTL == 0 {
			cfg.warnings = append(cfg.warnings, fmt.Sprintf("remote %q: it has no mutable_patterns, so what is stored is never looked at again: list its index files there", name))
		}
	}
	return cfg, nil
}

// configReader walks the nodes of one file and collects its mistakes.
type configReader struct {
	file string
	env  func(string) (string, bool)
	keys []remoteKey // remoteKeys; methods that it refers to cannot name it (initialization cycle)
	errs []configError
	// warnings are about what is valid but rarely meant, a text each as in errs.
	warnings []string

	remote      string         // the remote that is read now; "" outside of remotes
	key         string         // the key that is read now
	masked      string         // the value that was read last, with *** for ${VAR}; "": it has none, or is a secret
	typeUnknown bool           // type or package is wrong: other keys are not checked against them
	registries  map[string]int // the line of each value of the key registry
}

// yamlField is one key of a mapping with its value.
type yamlField struct{ key, value *yaml.Node }

func (c *configReader) addError(line int, format string, args ...any) {
	line = max(line, 1)
	c.errs = append(c.errs, configError{line, c.locate(line) + fmt.Sprintf(format, args...)})
}

// addWarning reports what is valid but probably a mistake, in the value n of the
// current key.
func (c *configReader) addWarning(n *yaml.Node, format string, args ...any) {
	c.warnings = append(c.warnings, c.locate(n.Line)+c.key+" "+fmt.Sprintf(format, args...))
}

// locate is the begin of a message: the file, the line and the remote.
func (c *configReader) locate(line int) string {
	where := fmt.Sprintf("%s:%d: ", c.file, line)
	if c.remote != "" {
		where += fmt.Sprintf("remote %q: ", c.remote)
	}
	return where
}

// addValueError reports a mistake in the value n of the current key. An alias is reported
// by rejectReferences.
func (c *configReader) addValueError(n *yaml.Node, format string, args ...any) {
	if n.Kind != yaml.AliasNode {
		c.addError(n.Line, "%s %s", c.key, fmt.Sprintf(format, args...))
	}
}

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
	seen := 0
	for k, v := range mappingPairs(doc.Content[0]) {
		switch {
		case k.Value == "apiVersion" || k.Value == "kind":
			c.addError(k.Line, "this is a Kubernetes manifest: CONFIG_PATH must name a file with what stands in it below data, as a mounted config map is")
			return
		case k.Value != "remotes":
			c.addError(k.Line, "unknown key %.60q: the only key at the top is remotes", k.Value)
		case seen > 0:
			c.addError(k.Line, "remotes is there twice (first in line %d): put all remotes below one", seen)
		default:
			seen = k.Line
			c.readRemotes(v, cfg)
			c.remote = ""
		}
	}
	if seen == 0 {
		c.addError(doc.Content[0].Line, "the key remotes is missing: the file must be a mapping with it, and below it the remotes by name")
	}
	// Decode stopped at the end of the document. What follows must be the end of the
	// file, or half of the remotes would be ignored.
	switch err := dec.Decode(&next); {
	case err == nil:
		c.addError(next.Line, "a second YAML document begins here: put everything into one, without ---")
	case !errors.Is(err, io.EOF):
		c.addSyntaxError(data, err)
	}
}

// addSyntaxError reports an error of yaml.v3. Its texts do not quote the file, except for
// the name of an unknown anchor, which may be a password that begins with an asterisk and
// is left out here.
func (c *configReader) addSyntaxError(data []byte, err error) {
	text := yamlErrorStart.ReplaceAllString(err.Error(), "")
	switch {
	case strings.Contains(text, "UTF-8"), text == "invalid Unicode character", strings.HasPrefix(text, "control characters"):
		text = "this line is not UTF-8 or holds a control character: save the file in UTF-8, and write a control character as an escape within double quotes"
	case strings.HasPrefix(text, "unknown anchor"):
		text = "an alias of an anchor that does not exist: put a value that begins with * in quotes"
	case text == "did not find expected alphabetic or numeric character":
		text += " (put a value that begins with * in quotes; a pattern is a regular expression: write '\\.gz$' for *.gz)"
	case text == "found unknown escape character":
		text += ` (in double quotes a backslash is written \\; put a pattern in single quotes)`
	case text == "found unexpected end of stream":
		text += " (it begins here and is not closed: put a quote or a bracket at its end)"
	case strings.HasPrefix(text, "mapping values are not allowed"):
		text += " (put a value that holds a colon and a blank in quotes)"
	case strings.HasSuffix(text, "cannot start any token"), strings.Contains(text, "tab character"):
		text += " (indent with spaces, not with tabs; put a value that begins with @, % or ` in quotes)"
	default:
		text += " (write KEY: VALUE or - VALUE on each line, indented as those above; close a bracket that is open; put a value that begins with [, { or a quote in single quotes, all of it; remove a line that begins with %)"
	}
	c.addError(lineOfSyntaxError(data, err), "not readable as YAML: %s", text)
}

// lineOfSyntaxError returns the first line with which the error is there. yaml.v3 often
// names the line where the block begins, or one too many.
func lineOfSyntaxError(data []byte, err error) int {
	lines := bytes.SplitAfter(data, []byte("\n"))
	return 1 + sort.Search(len(lines)-1, func(i int) bool {
		var doc yaml.Node
		dec := yaml.NewDecoder(bytes.NewReader(bytes.Join(lines[:i+1], nil)))
		for {
			if e := dec.Decode(&doc); e != nil {
				return e.Error() == err.Error()
			}
		}
	})
}

// readRemotes reads the mapping from names to remotes into cfg.
func (c *configReader) readRemotes(n *yaml.Node, cfg *config) {
	if n.Kind != yaml.MappingNode || len(n.Content) == 0 {
		c.addError(n.Line, "remotes must be a mapping with at least one remote: NAME, and below it its keys")
		return
	}
	lines := map[string]int{}
	for k, v := range mappingPairs(n) {
		r := c.readRemote(k, v)
		if first := lines[r.name]; first > 0 {
			c.addError(k.Line, "this name is there twice (first in line %d): rename one, names must be unique", first)
			continue
		}
		lines[r.name] = k.Line
		if cfg.remotes[r.name] = r; len(c.errs) == 0 { // else r may be incomplete, and cfg is not used
			cfg.addRegistry(r)
		}
	}
}

// readRemote reads the remote named k, which can be used only if no mistake was reported.
func (c *configReader) readRemote(k, v *yaml.Node) *remote {
	c.remote, c.typeUnknown = k.Value, false
	r := &remote{name: k.Value, packageType: "generic", query: keepQuery, mutableTTL: time.Hour, timeout: 30 * time.Second, masked: map[string]string{}}
	c.rejectReferences(k)
	c.rejectReferences(v)
	if v.Kind != yaml.MappingNode && !c.typeUnknown {
		c.addError(k.Line, "needs keys below its name, at least base_url")
		c.typeUnknown = true
	}
	fields := map[string]yamlField{}
	c.collectKeys(v, "", fields)
	for _, key := range c.keys {
		f, given := fields[key.name]
		switch c.key = key.name; {
		case !given:
		case key.onType != "" && key.onType != r.typeName() && !c.typeUnknown:
			c.addError(f.key.Line, "%s has no meaning for type %q: remove it", key.name, r.typeName())
		case key.docker && r.packageType != "docker" && !c.typeUnknown:
			c.addError(f.key.Line, "%s is for package \"docker\" only: remove it", key.name)
		case key.set != nil:
			key.set(c, r, f.value)
		case key.field != nil:
			c.readField(f.value, key.minimum, key.field(r))
		}
		if given && c.masked != "" {
			r.masked[key.name] = c.masked
		}
		c.masked = ""
	}
	if _, ok := fields["base_url"]; !ok && !r.local && !c.typeUnknown {
		c.addError(k.Line, "base_url is missing: say where its files are, or type: \"local\"")
	}
	// The name is an element of paths, the name of a directory and the begin of every
	// storage key.
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
	return r
}

// rejectReferences reports the aliases and the tags in n and below. With them a value
// would not stand where it is used. A merge key (<<) is refused by its alias, and as a
// key that is unknown.
func (c *configReader) rejectReferences(n *yaml.Node) {
	switch {
	case n.Kind == yaml.AliasNode:
		c.typeUnknown = true // type and package may be among what it stands for
		c.addError(n.Line, "a YAML alias or merge key (<<) is not allowed: write out what it stands for, or put the value in quotes if it begins with *")
	case n.Style&yaml.TaggedStyle != 0:
		c.addError(n.Line, "a YAML tag is not allowed: remove it, or put the value in quotes if it begins with !")
	}
	for _, child := range n.Content {
		c.rejectReferences(child)
	}
}

// collectKeys puts the keys of the mapping n into a map by their full names, which
// begin with prefix. It reports unknown and repeated keys.
func (c *configReader) collectKeys(n *yaml.Node, prefix string, into map[string]yamlField) {
	for k, v := range mappingPairs(n) {
		name := prefix + k.Value
		first, twice := into[name]
		switch {
		case v.Kind == yaml.AliasNode: // rejectReferences has reported it
			continue
		case strings.Contains(k.Value, "."), !slices.ContainsFunc(c.keys, func(k remoteKey) bool { return k.name == name }):
			var known []string // those of blocks too
			for _, key := range c.keys {
				if name, ok := strings.CutPrefix(key.name, prefix); ok {
					known = append(known, strings.Replace(name, ".", ": ", 1))
				}
			}
			c.addError(k.Line, "unknown key %.60q: remove it, or use one of %s", name, strings.Join(known, ", "))
			continue
		case twice:
			c.addError(k.Line, "%s is there twice (first in line %d): keep one", name, first.key.Line)
			continue
		case v.ShortTag() == "!!null":
			v.Line = k.Line // yaml.v3 may say that a missing value is on a later line
		}
		into[name] = yamlField{k, v}
		if name != "cache" { // the only block in a remote
			continue
		}
		if c.key = name; v.Kind != yaml.MappingNode {
			c.addValueError(v, "must be a mapping such as {mutable_ttl: 3600}: give its keys, or remove it")
		}
		c.collectKeys(v, "cache.", into)
	}
}

// readScalar returns the text of a scalar as the file has it, so a number or a date
// may stand without quotes. true and false must not: YAML has several spellings of
// them.
func (c *configReader) readScalar(n *yaml.Node) (string, bool) {
	switch tag := n.ShortTag(); {
	case n.Kind != yaml.ScalarNode:
		c.addValueError(n, "must be text, not a list or a mapping: put a value that begins with [ or { in single quotes")
	case tag == "!!null":
		c.addValueError(n, "has no value: give one, or remove the key")
	case tag == "!!bool":
		c.addValueError(n, "must be text: put %s in quotes", n.Value)
	default:
		return n.Value, true
	}
	return "", false
}

// readString returns the text of n with its variables expanded; ok is false if a mistake
// was reported.
func (c *configReader) readString(n *yaml.Node) (s string, ok bool) {
	raw, ok := c.readScalar(n)
	s, complaint := expandVariables(raw, c.env)
	c.masked = ""
	if hidden, _ := expandVariables(raw, func(string) (string, bool) { return "***", true }); hidden != s {
		c.masked = hidden
	}
	if complaint != "" {
		c.addValueError(n, "%s", complaint)
		return "", false
	}
	for _, m := range bareVariable.FindAllStringSubmatch(n.Value, -1) {
		// Only a name that is set is quoted: the text may be a secret.
		if v, _ := c.env(m[1]); v != "" && !strings.Contains(n.Value, "$$"+m[1]) {
			c.addWarning(n, "has $%[1]s without braces, which is text: write ${%[1]s} for the variable, or $$%[1]s for the text", m[1])
		}
	}
	return s, ok
}

// readField reads n into the field of a remote that field points to, by the field's
// type. minimum is that of a number of seconds.
func (c *configReader) readField(n *yaml.Node, minimum int64, field any) {
	switch f := field.(type) {
	case *string:
		*f, _ = c.readString(n)
	case *secret:
		s, _ := c.readString(n)
		c.masked = "" // no part of a secret is shown
		if *f = secret(s); !isCleanSecret(s) {
			c.addValueError(n, uncleanSecret)
		}
	case *bool:
		if n.ShortTag() != "!!bool" {
			c.addValueError(n, "must be true or false")
		}
		*f = strings.EqualFold(n.Value, "true")
	case *time.Duration:
		v, err := strconv.ParseInt(n.Value, 10, 64)
		switch {
		case err != nil || n.ShortTag() != "!!int" || v < 0 || strconv.FormatInt(v, 10) != n.Value: // 010 is octal in YAML
			c.addValueError(n, "must be a whole number of seconds, not negative and without unit or quotes, not %.40q", n.Value)
		case v < minimum || v > maxSeconds:
			c.addValueError(n, "must be from %d to %d seconds, not %s", minimum, int64(maxSeconds), n.Value)
		}
		*f = time.Duration(v) * time.Second
	case *int64:
		s, ok := c.readString(n)
		v, err := parseSize(s)
		if *f = v; ok && err != nil {
			c.addValueError(n, "%v, not %.40q", err, n.Value)
		}
	case *[]*regexp.Regexp:
		c.readPatterns(n, f)
	case **url.URL:
		*f = c.readURL(n, true)
	}
}

// readPatterns reads a list of regular expressions. Variables are not expanded, since $
// has a meaning in a pattern.
func (c *configReader) readPatterns(n *yaml.Node, dst *[]*regexp.Regexp) {
	switch {
	case n.ShortTag() == "!!null" || (n.Kind == yaml.SequenceNode && len(n.Content) == 0):
		c.addValueError(n, "is empty: list at least one pattern, or remove the key (without immutable_patterns everything is allowed)")
	case n.Kind != yaml.SequenceNode:
		c.addValueError(n, "must be a list of regular expressions, each after a dash")
	}
	for _, item := range n.Content {
		s, ok := c.readScalar(item)
		p, err := regexp.Compile(s)
		switch {
		case ok && s == "":
			c.addValueError(item, "has an empty pattern, which matches everything: write \".*\" if you mean that")
		case err != nil:
			c.addValueError(item, "has %q: %s", s, explainPatternError(err))
		default:
			*dst = append(*dst, p)
			if strings.Contains(s, "/*") {
				c.addWarning(item, "has %q, in which * repeats the slash before it: write .* for any text", s)
			}
		}
	}
}

// readURL reads an absolute http or https URL, or returns nil after reporting a mistake,
// which never quotes the URL: it may hold a password. Without a query the URL has no
// slash at its end, so that joinURL can append one and a spelling.
func (c *configReader) readURL(n *yaml.Node, withQuery bool) *url.URL {
	s, ok := c.readString(n)
	scheme, _, _ := strings.Cut(strings.ToLower(s), "://")
	if !withQuery {
		s, c.masked = strings.TrimRight(s, "/"), strings.TrimRight(c.masked, "/")
	}
	u, err := url.Parse(s)
	switch {
	case !ok: // it is reported
	case strings.TrimSpace(s) != s:
		c.addValueError(n, "has a blank or a line break at an end: remove it")
	case scheme != "http" && scheme != "https":
		c.addValueError(n, "must begin with http:// or https://")
	case err != nil:
		c.addValueError(n, "is not a URL: write https://HOST:PORT/PATH, and put credentials into username and password")
	case u.User != nil:
		c.addValueError(n, "holds credentials: move them to username and password")
	case u.Hostname() == "":
		c.addValueError(n, "has no host: write https://HOST/PATH")
	case hasBadPort(u):
		c.addValueError(n, "has an invalid port: ports are 1 to 65535")
	case !withQuery && (u.RawQuery != "" || u.ForceQuery):
		c.addValueError(n, "holds a query (?): remove it, the query of a request comes from the client")
	case strings.Contains(s, "#"):
		c.addValueError(n, "holds a fragment (#): remove it")
	default:
		u.Host = strings.ToLower(u.Host)
		return u
	}
	return nil
}

// mappingPairs yields the keys and values of a mapping, and nothing of another node.
func mappingPairs(n *yaml.Node) iter.Seq2[*yaml.Node, *yaml.Node] {
	return func(yield func(k, v *yaml.Node) bool) {
		for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
			if !yield(n.Content[i], n.Content[i+1]) {
				return
			}
		}
	}
}

// expandVariables replaces ${VAR} by the value of the environment variable and $$ by a
// dollar sign. An empty variable counts as unset, as it does for the settings. complaint
// is "", or says what is wrong and quotes only names: the rest of s may be a secret.
func expandVariables(s string, env func(string) (string, bool)) (expanded, complaint string) {
	var missing []string
	expanded = dollarPattern.ReplaceAllStringFunc(s, func(match string) string {
		if match == "$$" {
			return "$"
		}
		name := match[len("${") : len(match)-len("}")]
		value, _ := env(name)
		switch {
		case !variablePattern.MatchString(name):
			complaint = "has a ${...} that does not hold the name of a variable: write $$ for a plain dollar sign"
		case value == "" && !slices.Contains(missing, name):
			missing = append(missing, name)
		}
		return value
	})
	if len(missing) > 0 && complaint == "" {
		complaint = fmt.Sprintf("needs the environment variable %s, which is unset or empty: set it, or write $$ for a plain dollar sign", strings.Join(missing, " and "))
	}
	return expanded, complaint
}

// explainPatternError says why Go cannot compile a pattern.
func explainPatternError(err error) string {
	text := strings.TrimPrefix(err.Error(), "error parsing regexp: ")
	if m := lookAroundPattern.FindStringSubmatch(text); m != nil {
		return "look-around (" + m[1] + "...) does not exist in Go's regular expressions (RE2): list what is allowed instead"
	}
	if m := backReferencePattern.FindStringSubmatch(text); m != nil {
		return "back-references (" + m[1] + ") do not exist in Go's regular expressions (RE2): write the text out"
	}
	if strings.Contains(text, "repetition operator") {
		return text + ": patterns are regular expressions, not globs: write .*\\.gz$ for *.gz"
	}
	return text + ": Go's regular expressions are RE2, see https://github.com/google/re2/wiki/Syntax"
}
