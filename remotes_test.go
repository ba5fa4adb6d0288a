package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// testEnv is the environment of the configurations in these tests.
func testEnv(name string) (string, bool) {
	v, ok := map[string]string{
		"TOKEN":   "tok-hidden",
		"MIRROR":  "https://two.example.org/m/",
		"URL":     "https://joe:pw-hidden@example.org",
		"NEWLINE": "tok-hidden\r\nX-B: c",
		"EMPTY":   "",
	}[name]
	return v, ok
}

func mustParse(t testing.TB, yaml string) *config {
	t.Helper()
	c, err := parseConfig("remotes.yaml", []byte(yaml), testEnv)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// wellFormed is a remote without mistakes, to which keys can be appended.
const wellFormed = "    base_url: http://127.0.0.1:9\n"

// one returns a file with one remote x, which has the given keys.
func one(keys string) string { return "remotes:\n  x:\n" + wellFormed + keys }

// hidden is a secret that must not be in any message.
const hidden = "hidden"

// What is valid but rarely meant is told, and the server starts all the same.
func TestConfigWarnings(t *testing.T) {
	t.Parallel()
	cfg := mustParse(t, one("    mutable_patterns: [a]\n    description: $TOKEN, $$TOKEN and $NONE\n    password: p$TOKEN\n"))
	want := []string{`remotes.yaml:6: remote "x": password has $TOKEN without braces`, `remotes.yaml:6: remote "x": password has no username`}
	if len(cfg.warnings) != len(want) || !strings.HasPrefix(cfg.warnings[0], want[0]) || !strings.HasPrefix(cfg.warnings[1], want[1]) {
		t.Errorf("warnings %q, want %q", cfg.warnings, want)
	}
	glob := mustParse(t, one("    mutable_patterns:\n      - (/a)*\n      - pool/*.gz\n")).warnings
	if len(glob) != 1 || !strings.HasPrefix(glob[0], `remotes.yaml:6: remote "x": mutable_patterns has "pool/*.gz", in which * repeats the slash`) {
		t.Errorf("warnings %q for a glob", glob)
	}
	for _, nothing := range []string{"description: $NONE costs 5$\n    username: ${TOKEN}\n    password: p$$TOKEN\n", "username: ''\n    password: ''\n"} {
		if cfg := mustParse(t, one("    mutable_patterns: [a]\n    "+nothing)); len(cfg.warnings) > 0 {
			t.Errorf("warnings %q for nothing", cfg.warnings)
		}
	}
}

// In each file HERE marks the line that the message must name. The message must hold
// want.
func TestConfigMistakes(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, yaml, want string }{
		{"unknown key", one("    bogus: 1 # HERE\n"), `remote "x": unknown key "bogus": remove it`},
		{"misspelled key", one("    mutable_patern: [a] # HERE\n"), "or use one of type, package, description, base_url"},
		{"misspelled key below cache", one("    cache:\n      mutable_tll: 5 # HERE\n"), `"cache.mutable_tll": remove it, or use one of immutable_ttl, mutable_ttl, max_size`},
		{"key of cache outside of it", one("    mutable_ttl: 5 # HERE\n"), ", cache: mutable_ttl,"},
		{"key of cache with the name of its block", one("    cache.mutable_ttl: 5 # HERE\n"), `unknown key "cache.mutable_ttl": remove it, or use one of type,`},
		{"key of a mirror outside of it", one("    mirrors.url: http://a # HERE\n"), `unknown key "mirrors.url": remove it`},
		{"key of a remote below cache", one("    cache: {timeout: 5} # HERE\n"), `unknown key "cache.timeout"`},
		{"unknown key of a mirror", one("    mirrors: [{url: http://a, aut: true}] # HERE\n"), `"mirrors.aut": remove it, or use one of url, auth, verified`},
		{"manifest of Kubernetes", "apiVersion: v1 # HERE\nkind: ConfigMap\ndata:\n  remotes.yaml: |\n    remotes:\n", "this is a Kubernetes manifest"},
		{"manifest that begins with its kind", "kind: ConfigMap # HERE\ndata:\n  remotes.yaml: x\napiVersion: v1\n", "this is a Kubernetes manifest"},
		{"unknown key at the top", "remotes:\n  x:\n" + wellFormed + "others: 1 # HERE\n", `unknown key "others"`},
		{"key that is a list", one("    ? [a] # HERE\n    : b\n"), `unknown key ""`},
		{"duplicate key", one("    timeout: 5\n    timeout: 6 # HERE\n"), "timeout is there twice (first in line 4)"},
		{"duplicate key below cache", one("    cache: {mutable_ttl: 5, mutable_ttl: 6} # HERE\n"), "cache.mutable_ttl is there twice"},
		{"duplicate name", one("  x: # HERE\n" + wellFormed), `remote "x": this name is there twice (first in line 2)`},
		{"remotes twice", one("remotes: # HERE\n  y:\n" + wellFormed), "remotes is there twice"},
		{"second document", one("--- # HERE\nremotes:\n"), "second YAML document"},
		{"empty second document", one("--- # HERE\n"), "second YAML document"},
		{"broken second document", one("---\na: [ # HERE\n"), "not readable as YAML"},
		{"alias for a remote", "remotes:\n  x: &a\n" + wellFormed + "  y: *a # HERE\n", `remote "y": a YAML alias`},
		{"alias for a value", one("    username: &a joe\n    password: *a # HERE\n"), `remote "x": a YAML alias`},
		{"alias in a list", one("    immutable_patterns: [&a joe, *a] # HERE\n"), "a YAML alias"},
		{"alias for all remotes", "remotes: &a {x: *a} # HERE\n", "a YAML alias"},
		{"alias of nothing, like a password", one("    password: *hidden # HERE\n"), "begins with * in quotes"},
		{"merge key", "remotes:\n  x: &a\n" + wellFormed + "  y:\n    <<: *a # HERE\n", `remote "y": a YAML alias or merge key`},
		{"merge key among remotes", one("  <<: {base_url: 'http://a'} # HERE\n"), `remote "<<": a name begins with`},
		{"merge key with a mapping", one("    <<: {timeout: 5} # HERE\n"), `unknown key "<<"`},
		{"tag", one("    password: !hidden # HERE\n"), "a YAML tag"},
		{"empty file", "", "the file is empty"},
		{"file of comments", "# nothing\n", "the file is empty"},
		{"file that is a list", "- remotes # HERE\n", "must be a mapping"},
		{"no remotes", "remotes: {} # HERE\n", "at least one remote"},
		{"remotes without value", "remotes: # HERE\n", "at least one remote"},
		{"remotes is a list", "remotes: [a] # HERE\n", "must be a mapping"},
		{"no key remotes", "{} # HERE\n", "the key remotes is missing"},
		{"remote without keys", "remotes:\n  x: # HERE\n  y:\n" + wellFormed, "needs keys below its name"},
		{"remote that is text", "remotes:\n  x: http://a # HERE\n", "needs keys below its name"},
		{"bad flow", "remotes:\n  x:\n   - : [ # HERE\n", "not readable as YAML"},
		{"tabs", "remotes:\n\tx: 1 # HERE\n", "not with tabs"},
		{"line that is indented too little", "remotes:\n  x:\n    base_url: http://a\n    description: >\n      'one\n      two\n   package: rpm # HERE\n", "not readable as YAML"},
		{"name that is indented too little", one("    description: b\n y: # HERE\n" + wellFormed), "not readable as YAML"},
		{"line without a colon", one("    package rpm # HERE\n    timeout: 5\n"), "write KEY: VALUE or - VALUE"},
		{"list behind its key", one("    mutable_patterns: - a # HERE\n"), "write KEY: VALUE or - VALUE"},
		{"line that is indented with a tab", one("    description: a\n\t  b # HERE\n"), "not with tabs"},
		{"version of YAML", "%YAML 1.2 # HERE\n---\n" + one(""), "remove a line that begins with %"},
		{"colon and blank in a value", one("    description: a: b # HERE\n"), "put a value that holds a colon and a blank in quotes"},
		{"quote that is not closed", one("    description: \"a # HERE\n    timeout: 5\n"), "it begins here and is not closed"},
		{"quote that ends early", one("    description: 'it's' # HERE\n    timeout: 5\n"), "in single quotes"},
		{"list that is not closed", one("    mutable_patterns: [a,\n    timeout: 5 # HERE\n"), "close a bracket that is open"},
		{"glob without quotes", one("    mutable_patterns:\n      - *.gz # HERE\n"), "begins with * in quotes"},
		{"not UTF-8", "remotes:\n  x: \"\xff\" # HERE\n", "not UTF-8"},
		{"a surrogate in UTF-8", "remotes:\n  x: \"\xed\xa0\x80\" # HERE\n", "not UTF-8"},
		{"control character", "remotes:\n  x: \"\x01\" # HERE\n", "control character"},

		{"name that begins with a dot", "remotes:\n  .x: # HERE\n" + wellFormed, "a name begins with"},
		{"name with a slash", "remotes:\n  a/b: # HERE\n" + wellFormed, `remote "a/b": a name begins with`},
		{"empty name", "remotes:\n  \"\": # HERE\n" + wellFormed, "a name begins with"},
		{"long name", "remotes:\n  " + strings.Repeat("x", 101) + ": # HERE\n" + wellFormed, "at most 100"},
		{"docker name in capitals", "remotes:\n  Foo: # HERE\n" + wellFormed + "    package: docker\n", `rename it to "foo"`},

		{"no base_url", "remotes:\n  x: # HERE\n    package: generic\n", "base_url is missing"},
		{"base_url without value", "remotes:\n  x:\n    base_url: # HERE\n\n    package: generic\n", "base_url has no value"},
		{"base_url that is a list", "remotes:\n  x:\n    base_url: [http://a] # HERE\n", "base_url must be text"},
		{"base_url without scheme", "remotes:\n  x:\n    base_url: example.org:80/x # HERE\n", "base_url must begin with http"},
		{"base_url with ftp", "remotes:\n  x:\n    base_url: ftp://a/x # HERE\n", "base_url must begin with http"},
		{"base_url without host", "remotes:\n  x:\n    base_url: http:///x # HERE\n", "base_url has no host"},
		{"base_url with port only", "remotes:\n  x:\n    base_url: http://:80/x # HERE\n", "base_url has no host"},
		{"base_url with port 0", "remotes:\n  x:\n    base_url: http://a:0/x # HERE\n", "ports are 1 to 65535"},
		{"base_url with an empty port", "remotes:\n  x:\n    base_url: \"http://a:\" # HERE\n", "ports are 1 to 65535"},
		{"base_url with a blank at its end", "remotes:\n  x:\n    base_url: \"http://a/ \" # HERE\n", "base_url has a blank"},
		{"registry with its API's path", "remotes:\n  x:\n    base_url: http://a/v2/ # HERE\n    package: docker\n", "base_url ends in /v2"},
		{"base_url with a password", "remotes:\n  x:\n    base_url: http://joe:pw-hidden@a/x # HERE\n", "base_url holds credentials"},
		{"base_url with a password from a variable", "remotes:\n  x:\n    base_url: ${URL} # HERE\n", "base_url holds credentials"},
		{"base_url with an unreadable password", "remotes:\n  x:\n    base_url: http://joe:hidden%zz@a/x # HERE\n", "base_url is not a URL"},
		{"base_url with a slash in its password", "remotes:\n  x:\n    base_url: http://joe:hidden/z@a/x # HERE\n", "base_url is not a URL"},
		{"base_url with a query", "remotes:\n  x:\n    base_url: http://a/x?y=1 # HERE\n", "base_url holds a query"},
		{"base_url with an empty query", "remotes:\n  x:\n    base_url: http://a/x? # HERE\n", "base_url holds a query"},
		{"base_url with a fragment", "remotes:\n  x:\n    base_url: \"http://a/x#\" # HERE\n", "base_url holds a fragment"},
		{"unknown type", one("    type: remoote # HERE\n"), `type must be "remote" or "local", not "remoote"`},
		{"empty type", one("    type: \"\" # HERE\n"), "type must be"},
		{"unknown package", one("    package: alpin # HERE\n"), `not "alpin"`},
		{"package of later", one("    package: conan # HERE\n"), "use generic for others"},
		{"local docker", "remotes:\n  x:\n    type: local\n    package: docker # HERE\n", "cannot be of type"},
		{"base_url on a local one", "remotes:\n  x:\n    base_url: http://a # HERE\n    type: local\n", `base_url has no meaning for type "local"`},
		{"mirrors on a local one", "remotes:\n  x:\n    type: local\n    mirrors: [] # HERE\n", "mirrors has no meaning"},
		{"password on a local one", "remotes:\n  x:\n    type: local\n    password: pw-hidden # HERE\n", "password has no meaning"},
		{"max_size on a local one", "remotes:\n  x:\n    type: local\n    cache: {max_size: 5} # HERE\n", "cache.max_size has no meaning"},
		{"write_token on a remote", one("    write_token: hidden # HERE\n"), "write_token has no meaning"},
		{"write_token with a line break", "remotes:\n  x:\n    type: local\n    write_token: ${NEWLINE} # HERE\n", "line break"},
		{"registry on generic", one("    registry: a # HERE\n"), `registry is for package "docker" only`},
		{"registry with a scheme", one("    package: docker\n    registry: https://docker.io # HERE\n"), "registry must be a host"},
		{"registry given twice", one("    package: docker\n    registry: docker.io\n") + "  y:\n" + wellFormed + "    package: docker\n    registry: Docker.io # HERE\n", "another remote (line 5)"},
		{"token_realm that is no URL", one("    package: docker\n    token_realm: auth.docker.io # HERE\n"), "token_realm must begin with http"},
		{"mirrors is one URL", one("    mirrors: http://a # HERE\n"), "mirrors must be a list"},
		{"mirrors is one mirror", one("    mirrors: {url: http://a} # HERE\n"), "mirrors must be a list"},
		{"mirror that is no URL", one("    mirrors:\n      - http://a\n      - nonsense # HERE\n"), "mirrors must begin with http"},
		{"mirror with a password", one("    mirrors: [{url: http://joe:hidden@a}] # HERE\n"), "mirrors.url holds credentials"},
		{"mirror without url", one("    mirrors: [{auth: true}] # HERE\n"), "mirrors.url is missing"},
		{"mirror with auth yes", one("    mirrors: [{url: http://a, auth: yes}] # HERE\n"), "mirrors.auth must be true or false"},

		{"look-ahead", one("    immutable_patterns: [\"^(?!foo)\"] # HERE\n"), "look-around"},
		{"look-behind", one("    mutable_patterns:\n      - a\n      - (?<=a)b # HERE\n"), "look-around"},
		{"back-reference", one("    mutable_patterns: ['(a)\\1'] # HERE\n"), `back-references (\1)`},
		{"back-reference by name", one("    mutable_patterns: ['(?P<a>a)(?P=a)'] # HERE\n"), "back-references"},
		{"broken regex", one("    mutable_patterns: ['a(['] # HERE\n"), "missing closing ]"},
		{"backslash in double quotes", one("    mutable_patterns:\n      - a\n      - \"a\\.b\" # HERE\n"), "in double quotes a backslash is written"},
		{"pattern that YAML reads as a list", one("    mutable_patterns:\n      - [a-z] # HERE\n"), "in single quotes"},
		{"pattern that begins like a list", one("    mutable_patterns:\n      - [a-z]+\\.rpm$ # HERE\n"), "in single quotes"},
		{"two unset variables", one("    username: \"${NONE}${OTHER}${NONE}\" # HERE\n"), "variable NONE and OTHER,"},
		{"glob and its cure", one("    mutable_patterns: ['*.gz'] # HERE\n"), `write .*\.gz$ for *.gz`},
		{"glob instead of a regex", one("    mutable_patterns: ['*.gz'] # HERE\n"), "missing argument to repetition"},
		{"glob of folders", one("    mutable_patterns: ['pool/**/a'] # HERE\n"), "patterns are regular expressions, not globs"},
		{"empty immutable_patterns", one("    immutable_patterns: [] # HERE\n"), "immutable_patterns is empty: list at least one pattern, or remove the key (without immutable_patterns everything is allowed)"},
		{"immutable_patterns without a value", one("    immutable_patterns: # HERE\n    #  - a\n"), "immutable_patterns is empty"},
		{"mutable_patterns without a value", one("    mutable_patterns: # HERE\n"), "mutable_patterns is empty"},
		{"patterns are text", one("    immutable_patterns: a # HERE\n"), "must be a list"},
		{"empty pattern", one("    immutable_patterns: ['', a] # HERE\n"), "matches everything"},
		{"pattern without value", one("    immutable_patterns:\n      - a\n      - # HERE\n"), "no value"},
		{"pattern that is true", one("    immutable_patterns: [true] # HERE\n"), "put true in quotes"},

		{"ttl is a word", one("    cache: {mutable_ttl: soon} # HERE\n"), `cache.mutable_ttl must be a whole number of seconds, not negative and without unit or quotes, not "soon"`},
		{"ttl is negative", one("    cache: {mutable_ttl: -5} # HERE\n"), `not "-5"`},
		{"ttl is in quotes", one("    cache: {immutable_ttl: \"5\"} # HERE\n"), "without unit or quotes"},
		{"ttl is octal", one("    negative_ttl: 010 # HERE\n"), `not "010"`},
		{"ttl is endless", one("    negative_ttl: 99999999999999999999 # HERE\n"), "negative_ttl must be"},
		{"ttl is over a hundred years", one("    negative_ttl: 9999999999 # HERE\n"), "negative_ttl must be from 0 to"},
		{"query is a word", one("    query: maybe # HERE\n"), `query must be keep, drop or all, not "maybe"`},
		{"query of a registry", one("    package: docker\n    query: drop # HERE\n"), "query has no meaning for package"},
		{"timeout is 0", one("    timeout: 0 # HERE\n"), "timeout must be from 1 to"},
		{"cache without a value", one("    cache: # HERE\n"), "cache must be a mapping"},
		{"size without unit", one("    cache: {max_size: 5 apples} # HERE\n"), "must be a size such as 50GiB"},
		{"check_mutable_updates is a word", one("    check_mutable_updates: perhaps # HERE\n"), "check_mutable_updates must be true or false"},
		{"description is a list", one("    description: [a] # HERE\n"), "description must be text"},
		{"password is true", one("    password: true # HERE\n"), "put true in quotes"},
		{"username with a line break", one("    username: \"hidden\\n\" # HERE\n"), "username holds a line break"},
		{"password with a blank", one("    password: \"hidden \" # HERE\n"), "password holds a line break"},
		{"username with a colon", one("    username: joe:hidden # HERE\n"), "must not hold a colon"},
		{"headers are a list", one("    headers: [a] # HERE\n"), "headers must be a mapping"},
		{"header with a line break", one("    headers: {X-A: \"b\\r\\nX-B: c\"} # HERE\n"), "headers: X-A holds a line break"},
		{"header with a line break from a variable", one("    headers: {X-A: \"${NEWLINE}\"} # HERE\n"), "headers: X-A holds a line break"},
		{"header name with a value in it", one("    headers: {\"X-A hidden\": b} # HERE\n"), "invalid header name"},
		{"header twice", one("    headers: {X-A: b, x-a: c} # HERE\n"), "has X-A twice"},
		{"header of ours", one("    headers: {host: a} # HERE\n"), "must not hold Host"},
		{"unset variable", one("    username: \"${UNSET}\" # HERE\n"), "username needs the environment variable UNSET"},
		{"empty variable", one("    username: \"${EMPTY}\" # HERE\n"), "EMPTY, which is unset or empty"},
		{"variable that is none", one("    password: \"${hidden!}\" # HERE\n"), "write $$ for a plain dollar sign"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := parseConfig("remotes.yaml", []byte(tt.yaml), testEnv)
			said := fmt.Sprint(err)
			before, _, found := strings.Cut(tt.yaml, "HERE")
			line := 1
			if found {
				line += strings.Count(before, "\n")
			}
			if strings.Contains(said, "\n") || !strings.HasPrefix(said, fmt.Sprintf("remotes.yaml:%d: ", line)) || !strings.Contains(said, tt.want) {
				t.Errorf("got  %v\nwant remotes.yaml:%d: ... %s", err, line, tt.want)
			}
			if msg := strings.ReplaceAll(said, "matches everything", ""); strings.Contains(msg, hidden) {
				t.Errorf("a secret is in %q", msg)
			}
		})
	}
}

func TestConfigReservedNames(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"v1", "v2", "api", "artifacts", "cache-artifact", "config", "health", "metrics", "missed"} {
		_, err := parseConfig("f", []byte("remotes:\n  "+name+":\n"+wellFormed), testEnv)
		if want := fmt.Sprintf("f:2: remote %q: this name is reserved, because artifactapi serves /%s itself: rename the remote", name, name); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestConfigReportsAllMistakesInOrder(t *testing.T) {
	t.Parallel()
	yaml := one("    bogus: 1\n    immutable_patterns: [\"(?!x)\"]\n    username: ${UNSET}\n") +
		"  v1:\n    base_url: nope\n  z: {}\nmore: 1\n"
	_, err := parseConfig("dir/r.yaml", []byte(yaml), testEnv)
	var got []int
	for line := range strings.SplitSeq(err.Error(), "\n") {
		var n int
		if _, err := fmt.Sscanf(line, "dir/r.yaml:%d:", &n); err != nil {
			t.Errorf("no line number in %q", line)
		}
		got = append(got, n)
	}
	if want := []int{4, 5, 6, 7, 8, 9, 10}; !slices.Equal(got, want) {
		t.Errorf("lines %v, want %v:\n%v", got, want, err)
	}
}

func TestConfigWithEveryKey(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/config-full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range remoteKeys {
		name := k.name[strings.LastIndexByte(k.name, '.')+1:]
		if !strings.Contains(string(data), name+":") {
			t.Errorf("testdata/config-full.yaml does not have %s", k.name)
		}
	}
	c := mustParse(t, string(data))
	if want := []string{"files", "images", "own"}; !slices.Equal(c.names, want) {
		t.Errorf("names %v, want %v", c.names, want)
	}
	f := c.remotes["files"]
	for _, tt := range []struct {
		what      string
		got, want any
	}{
		{"base_url", f.origins[0].url.String(), "https://example.org:8443/a%2Fb/c"},
		{"base_url's auth", f.origins[0].auth, true},
		{"mirror", f.origins[1].url.String(), "http://mirror.example.org"},
		{"mirror's auth", f.origins[1].auth, false},
		{"second mirror", f.origins[2].url.String(), "https://two.example.org/m"},
		{"second mirror's auth", f.origins[2].auth, true},
		{"mirrors that are only good for verified bodies", fmt.Sprint(f.origins[1].verified, f.origins[2].verified, f.origins[3].verified), "false false true"},
		{"description", f.description, "2024-01-02"},
		{"patterns", fmt.Sprint(f.immutable, f.mutable), `[\.bin$ \.bin$ ^\d+$] [index$]`},
		{"username", f.username, "joe$"},
		{"password", string(f.password), "012345"},
		{"header", f.headers.Get("X-Token"), "a$btok-hidden"},
		{"header that is a number", f.headers.Get("X-Number"), "5"},
		{"flags", f.checkMutable && f.checkBuiltin && f.staleIfError && f.sealed && f.wouldMiss, true},
		{"negative_ttl", f.negativeTTL, 5 * time.Second},
		{"query", f.query, "drop"},
		{"default query", c.remotes["images"].query, "keep"},
		{"timeout", f.timeout, 7 * time.Second},
		{"immutable_ttl", f.immutableTTL, 11 * time.Second},
		{"mutable_ttl", f.mutableTTL, time.Duration(0)},
		{"max_size", f.maxSize, int64(3 << 29)},
		{"registry", c.registries["docker.io"], c.remotes["images"]},
		{"token_realm", c.remotes["images"].tokenRealm.String(), "https://auth.example.org/token?a=b"},
		{"default mutable_ttl", c.remotes["images"].mutableTTL, time.Hour},
		{"default timeout", c.remotes["images"].timeout, 30 * time.Second},
		{"write_token", string(c.remotes["own"].writeToken), "tok-hidden"},
		{"local", c.remotes["own"].local, true},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.what, tt.got, tt.want)
		}
	}
}

func TestConfigAcceptsByteOrderMarkAndMarkers(t *testing.T) {
	t.Parallel()
	mustParse(t, "\ufeff---\r\nremotes: {x: {base_url: 'http://a'}}\r\n...\r\n")
}

func TestDollarSigns(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"a$b$": "a$b$", "a$$b": "a$b", "$$$": "$$", "$${TOKEN}": "${TOKEN}", "${TOKEN}": "tok-hidden",
		"x${TOKEN}y${TOKEN}z": "xtok-hiddenytok-hiddenz", "${": "${", "${TOKEN": "${TOKEN", "$TOKEN": "$TOKEN", "": "",
	} {
		if got, complaint := expandVariables(in, testEnv); got != want || complaint != "" {
			t.Errorf("expand(%q) = %q, %q, want %q", in, got, complaint, want)
		}
	}
}

func TestSizes(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]int64{
		"0": 0, "1073741824": 1 << 30, "50GiB": 50 << 30, "1.5 KiB": 1536, "500MB": 500e6, "7B": 7, "2tib": 2 << 40, "50G": 50e9, "50Gi": 50 << 30,
		"": -1, "GiB": -1, "-1": -1, "5 apples": -1, "99999999999TiB": -1, "1e3": -1, "0x10": -1, "5i": -1,
	} {
		got, err := parseSize(in)
		if (want < 0 && err == nil) || (want >= 0 && (err != nil || got != want)) {
			t.Errorf("parseSize(%q) = %d, %v, want %d", in, got, err, want)
		}
	}
}

func TestRegistryNames(t *testing.T) {
	t.Parallel()
	c := mustParse(t, "remotes:\n"+
		"  hub: {base_url: 'https://registry-1.docker.io', package: docker}\n"+
		"  port: {base_url: 'http://127.0.0.1:5000/sub', package: docker}\n"+
		"  port-again: {base_url: 'http://127.0.0.1:5000', package: docker}\n"+
		"  default: {base_url: 'https://quay.io', package: docker}\n"+
		"  given: {base_url: 'http://127.0.0.1:5001', package: docker, registry: quay.io}\n"+
		"  default-later: {base_url: 'https://QUAY.io', package: docker}\n"+
		"  files: {base_url: 'https://files.example.org'}\n")
	for ns, want := range map[string]string{
		"docker.io": "hub", "Docker.IO": "hub", "127.0.0.1:5000": "port", "quay.io": "given",
		"registry-1.docker.io": "", "files.example.org": "", "": "",
	} {
		got := ""
		if r := c.registries[strings.ToLower(ns)]; r != nil {
			got = r.name
		}
		if got != want {
			t.Errorf("byRegistry(%q) = %q, want %q", ns, got, want)
		}
	}
}

func TestPublicHasDefaultsButNoSecrets(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/config-full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.MarshalIndent(mustParse(t, string(data)).publicView(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, s := range []string{"012345", hidden, "a$b"} {
		if strings.Contains(text, s) {
			t.Errorf("the secret %s is in %s", s, text)
		}
	}
	for _, s := range []string{
		`"password": "***"`, `"write_token": "***"`, `"X-Token": "***"`, `"username": "joe$"`, `"max_size": 1610612736`,
		`"base_url": "https://example.org:8443/a%2Fb/c"`, `"url": "***"`, `"registry": "docker.io"`,
		`"timeout": 30`, `"mutable_ttl": 3600`, `"\\.bin$"`, `"type": "local"`, `"stale_if_error": false`, `"sealed": true`, `"would_miss": false`,
	} {
		if !strings.Contains(text, s) {
			t.Errorf("%s is not in %s", s, text)
		}
	}
	own, _ := json.Marshal(mustParse(t, "remotes: {own: {type: local}}").publicView())
	want := `{"remotes":{"own":{"cache":{"immutable_ttl":0,"mutable_ttl":3600},"package":"generic","type":"local"}}}`
	if string(own) != want {
		t.Errorf("got  %s\nwant %s", own, want)
	}
}

// What a variable holds may be a secret wherever it stands.
func TestPublicHasNoVariables(t *testing.T) {
	t.Parallel()
	b, err := json.Marshal(mustParse(t, `
remotes:
  a: {base_url: "https://h.example/${TOKEN}/a/", description: "$$ ${TOKEN}", username: "u-${TOKEN}", password: "p-${TOKEN}", headers: {X: "h-${TOKEN}"}}
  b: {base_url: "${MIRROR}", mirrors: ["https://plain.example/", {url: "https://${TOKEN}.example"}, "https://third.example"], package: docker, token_realm: "https://t.example/${TOKEN}"}
  c: {type: local, write_token: "w-${TOKEN}", description: plain}
  d: {base_url: "https://${TOKEN}.example/p", package: docker}
  e: {base_url: "https://registry-1.docker.io/", package: docker}
`).publicView())
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, s := range []string{hidden, "two.example", "p-", "h-", "w-"} {
		if strings.Contains(text, s) {
			t.Errorf("%s is in %s", s, text)
		}
	}
	for _, s := range []string{`"base_url":"https://h.example/***/a"`, `"description":"$ ***"`, `"username":"u-***"`, `"base_url":"***"`, `"registry":"***"`,
		`"mirrors":[{"auth":false,"url":"https://plain.example","verified":false},{"auth":false,"url":"https://***.example","verified":false},{"auth":false,"url":"https://third.example","verified":false}]`,
		`"token_realm":"https://t.example/***"`, `"description":"plain"`, `"registry":"***.example"`, `"registry":"docker.io"`} {
		if !strings.Contains(text, s) {
			t.Errorf("%s is not in %s", s, text)
		}
	}
}

func TestComparedConfigs(t *testing.T) {
	t.Parallel()
	const same = "  same: {base_url: https://a.example, mutable_patterns: ['a+'], headers: {X: a}, mirrors: [https://b.example], package: docker}\n"
	old := mustParse(t, "remotes:\n"+same+`
  gone: {base_url: https://a.example}
  pattern: {base_url: https://a.example, mutable_patterns: ['a']}
  secret: {base_url: https://a.example, username: u, password: a}
  mirror: {base_url: https://a.example, mirrors: [https://b.example]}
  local: {type: local}
`)
	c := mustParse(t, "# moved\nremotes:\n"+`
  new: {base_url: https://a.example}
  local: {base_url: https://a.example}
  pattern: {base_url: https://a.example, mutable_patterns: ['b']}
  secret: {base_url: https://a.example, username: u, password: b}
  mirror: {base_url: https://a.example, mirrors: [{url: https://b.example, auth: true}]}
`+same)
	if got := fmt.Sprint(c.compare(old)); got != "map[added:[new] changed:[local mirror pattern secret] removed:[gone]]" {
		t.Error(got)
	}
	if differences := c.compare(c); len(differences) > 0 {
		t.Error(differences)
	}
}

func TestShippedConfig(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("remotes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c := mustParse(t, string(data))
	for _, name := range strings.Fields("github github-archive hashicorp-releases alpine almalinux helm-charts apt-mirror dockerhub ghcr k8s-registry quay local-generic") {
		if c.remotes[name] == nil {
			t.Errorf("there is no %s", name)
		}
	}
	for _, tt := range []struct {
		remote, path string
		want         class
	}{
		{"github", "gruntwork-io/terragrunt/releases/download/v0.96.1/terragrunt_linux_amd64.tar.gz", immutable},
		{"github", "gruntwork-io/terragrunt/releases/latest/download/terragrunt_linux_amd64", mutable},
		{"github", "gruntwork-io/terragrunt", ""},
		{"github", "a/b/releases/download/cli/v1.2/file.tar.gz", immutable},
		{"github", "a/b/releases/download/nightly/file.tar.gz", mutable},
		{"github", "a/b/releases/download/app-nightly/file.tar.gz", mutable},
		{"github", "a/b/releases/download/v1.2-nightly.3/file.tar.gz", immutable},
		{"github-archive", "a/b/archive/v1.2.3.tar.gz", immutable},
		{"github-archive", "a/b/archive/1.2.tar.gz", immutable},
		{"github-archive", "a/b/archive/0123456789abcdef0123456789abcdef01234567.zip", immutable},
		{"github-archive", "a/b/archive/abcdef0123456789abcdef0123456789abcdef01.tar.gz", immutable},
		{"github-archive", "a/b/archive/refs/tags/cli/v1.tar.gz", immutable},
		{"github-archive", "a/b/archive/main.tar.gz", mutable},
		{"github-archive", "a/b/archive/devel.zip", mutable},
		{"github-archive", "a/b/archive/feature-1.tar.gz", mutable},
		{"github-archive", "a/b/archive/vnext.tar.gz", mutable},
		{"github-archive", "a/b/archive/2.x.tar.gz", mutable},
		{"github-archive", "a/b/archive/release/1.2.tar.gz", mutable},
		{"github-archive", "a/b/archive/refs/tags/v1.tar.gz", immutable},
		{"github-archive", "a/b/archive/refs/heads/main.tar.gz", mutable},
		{"hashicorp-releases", "terraform/1.9.0/terraform_1.9.0_linux_amd64.zip", immutable},
		{"hashicorp-releases", "terraform/1.9.0/terraform_1.9.0_SHA256SUMS.72D7468F.sig", immutable},
		{"hashicorp-releases", "terraform/index.json", mutable},
		{"alpine", "v3.22/main/x86_64/APKINDEX.tar.gz", mutable},
		{"alpine", "v3.22/main/x86_64/busybox-1.37.0-r18.apk", immutable},
		{"alpine", "v3.22/releases/x86_64/alpine-minirootfs-3.22.0-x86_64.tar.gz.sha256", immutable},
		{"almalinux", "9/BaseOS/x86_64/os/repodata/repomd.xml", mutable},
		{"almalinux", "9/BaseOS/x86_64/os/images/pxeboot/vmlinuz", mutable},
		{"almalinux", "9/BaseOS/x86_64/os/.treeinfo", mutable},
		{"almalinux", "9/BaseOS/x86_64/os/media.repo", mutable},
		{"almalinux", "9/BaseOS/x86_64/os/EFI/BOOT/grub.cfg", mutable},
		{"almalinux", "RPM-GPG-KEY-AlmaLinux-9", mutable},
		{"alpine", "v3.22/releases/x86_64/netboot/vmlinuz-lts", mutable},
		{"apt-mirror", "dists/trixie/main/installer-amd64/current/images/netboot/mini.iso", mutable},
		{"apt-mirror", "dists/trixie/main/binary-amd64/Packages.diff/T-2025-01-01-0000.00-F-x.gz", immutable},
		{"almalinux", "9/BaseOS/x86_64/os/Packages/bash-5.1.8-9.el9.x86_64.rpm", immutable},
		{"helm-charts", "index.yaml", mutable},
		{"helm-charts", "charts/cert-manager-v1.18.2.tgz", immutable},
		{"apt-mirror", "dists/trixie/InRelease", mutable},
		{"apt-mirror", "dists/trixie/main/binary-amd64/Packages.xz", mutable},
		{"apt-mirror", "dists/trixie/main/i18n/Translation-en.bz2", mutable},
		{"apt-mirror", "dists/trixie/main/binary-amd64/by-hash/SHA256/0a1b", immutable},
		{"apt-mirror", "pool/main/b/bash/bash_5.2-1_amd64.deb", immutable},
		{"apt-mirror", "project/trace/x", ""},
		{"dockerhub", "library/alpine/manifests/latest", mutable},
		{"local-generic", "a/b.bin", local},
	} {
		got, _, err := c.remotes[tt.remote].classifyPath(tt.path)
		if got != tt.want || (err != nil) != (tt.want == "") {
			t.Errorf("%s %s: got %q, %v, want %q", tt.remote, tt.path, got, err, tt.want)
		}
	}
	if c.registries["docker.io"] != c.remotes["dockerhub"] {
		t.Error("docker.io is not dockerhub")
	}
}

func (r *remote) classifyPath(path string) (class, bool, error) {
	t := target{remote: r, path: path}
	err := t.classify()
	return t.class, t.builtin, err
}

func TestClassify(t *testing.T) {
	t.Parallel()
	c := mustParse(t, `
remotes:
  g: {base_url: "http://a"}
  allow: {base_url: "http://a", immutable_patterns: ['^pub/.*\.tar\.gz$'], mutable_patterns: ['^pub/latest', 'index\.json$']}
  search: {base_url: "http://a", immutable_patterns: [release]}
  onlymut: {base_url: "http://a", mutable_patterns: ['\.json$']}
  alp: {base_url: "http://a", package: alpine, immutable_patterns: ['\.apk$']}
  both: {base_url: "http://a", package: alpine, immutable_patterns: ["."], mutable_patterns: ['APKINDEX\.tar\.gz$', "APK"]}
  rpm: {base_url: "http://a", package: rpm, immutable_patterns: ['\.rpm$']}
  dirs: {base_url: "http://a", immutable_patterns: ["^pub/"]}
  hub: {base_url: "http://a", package: docker}
  nginx: {base_url: "http://a", package: docker, immutable_patterns: ["^library/nginx/"], mutable_patterns: ["."]}
  own: {type: local, immutable_patterns: ['\.bin$'], mutable_patterns: ['\.txt$']}
`)
	for _, tt := range []struct {
		remote, path, want string // + for built-in, "" for denied
	}{
		{"g", "d/any.thing", "immutable"},
		{"g", "APKINDEX.tar.gz", "immutable"},
		{"g", "some/dir/", "mutable"},
		{"allow", "pub/a.tar.gz", "immutable"},
		{"allow", "pub/a.zip", ""},
		{"allow", "x/pub/a.tar.gz", ""},
		{"allow", "pub/latest.tar.gz", "mutable"},
		{"allow", "other/index.json", "mutable"},
		{"search", "a/release-1/x", "immutable"},
		{"search", "a/nothing", ""},
		{"onlymut", "d/x.json", "mutable"},
		{"onlymut", "d/x.iso", "immutable"},
		{"alp", "v3/APKINDEX.tar.gz", "mutable+"},
		{"alp", "v3/foo-1.apk", "immutable"},
		{"alp", "v3/APKINDEX.tar.gz.sig", ""},
		{"alp", "repodata/repomd.xml", ""},
		{"both", "e/APKINDEX.tar.gz", "mutable+"},
		{"both", "e/APK", "mutable"},
		{"rpm", "9/os/repodata/repomd.xml", "mutable+"},
		{"rpm", "9/os/repodata/repomd.xml.asc", "mutable+"},
		{"rpm", "9/os/repodata/0a-primary.xml.gz", "mutable+"},
		{"rpm", "9/os/repodata/0a-filelists.sqlite.bz2", "mutable+"},
		{"rpm", "9/os/repodata/0a-modules.yaml.gz", "mutable+"},
		{"rpm", "9/os/repodata/0a-other.xml.zst", "mutable+"},
		{"rpm", "9/os/Packages.gz", "mutable+"},
		{"rpm", "9/os/Packages/foo.rpm", "immutable"},
		{"rpm", "9/os/notes.txt", ""},
		{"dirs", "pub/dir/", "mutable"},
		{"dirs", "priv/dir/", ""},
		{"hub", "library/alpine/manifests/latest", "mutable+"},
		{"hub", "library/alpine/manifests/sha256:0a", "immutable"},
		{"hub", "library/alpine/blobs/sha256:0a", "immutable"},
		{"hub", "library/alpine/tags/list", "mutable+"},
		{"hub", "library/alpine/referrers/sha256:0a", "mutable+"},
		{"nginx", "library/nginx/manifests/latest", "mutable+"},
		{"nginx", "library/nginx/blobs/sha256:0a", "immutable"},
		{"nginx", "library/alpine/manifests/latest", ""},
		{"nginx", "library/alpine/blobs/sha256:0a", ""},
		{"own", "a.bin", "local"},
		{"own", "a.txt", "local"},
		{"own", "a.zip", ""},
	} {
		got, builtin, err := c.remotes[tt.remote].classifyPath(tt.path)
		text := string(got)
		if builtin {
			text += "+"
		}
		if text != tt.want || errors.Is(err, errDenied) != (tt.want == "") {
			t.Errorf("%s %s: got %q, %v, want %q", tt.remote, tt.path, text, err, tt.want)
		}
		if tt.want == "" && statusOf(err) != 403 {
			t.Errorf("%s %s: status %d, want 403", tt.remote, tt.path, statusOf(err))
		}
	}
}

func TestTTL(t *testing.T) {
	t.Parallel()
	r := &remote{mutableTTL: 5, immutableTTL: 7}
	for _, tt := range []struct {
		r       *remote
		c       class
		d       time.Duration
		forever bool
	}{
		{r, mutable, 5, false}, {r, immutable, 7, false}, {r, local, 0, true},
		{&remote{}, immutable, 0, true}, {&remote{absence: absence{sealed: true}, mutableTTL: 5}, mutable, 0, true}, {&remote{}, mutable, 0, false},
	} {
		if d, forever := tt.r.ttlOf(tt.c); d != tt.d || forever != tt.forever {
			t.Errorf("ttl(%s) = %v, %v, want %v, %v", tt.c, d, forever, tt.d, tt.forever)
		}
	}
}

func TestSpell(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, escaped, query, path, spelling string }{
		{"plain", "a/b-1.0_x~y.tar.gz", "", "a/b-1.0_x~y.tar.gz", "a/b-1.0_x~y.tar.gz"},
		{"empty", "", "", "", ""},
		{"empty with a query", "", "prefix=a", "", ""},
		{"slashes only", "///", "", "", ""},
		{"dot only", "./", "", "", ""},
		{"raw plus and caret", "sp/a+b~c^d%20e.bin", "", "sp/a+b~c^d e.bin", "sp/a%2Bb~c%5Ed%20e.bin"},
		{"escaped in lower case", "sp/a%2bb%7ec%5ed%20e.bin", "", "sp/a+b~c^d e.bin", "sp/a%2Bb~c%5Ed%20e.bin"},
		{"letters escaped", "sp/%61+b~c%5Ed%20%65.bin", "", "sp/a+b~c^d e.bin", "sp/a%2Bb~c%5Ed%20e.bin"},
		{"dot segments", "./a/./b/.", "", "a/b/", "a/b/"},
		{"escaped dot segment", "a/%2e/b", "", "a/b", "a/b"},
		{"double slashes", "//a//b///c", "", "a/b/c", "a/b/c"},
		{"trailing slash", "a/b/", "", "a/b/", "a/b/"},
		{"trailing slashes", "a/b//", "", "a/b/", "a/b/"},
		{"escaped slash", "s/scope%2fname", "", "s/scope/name", "s/scope%2Fname"},
		{"escaped slashes are not folded", "s%2F%2F/a%2F.%2Fb", "", "s///a/./b", "s%2F%2F/a%2F.%2Fb"},
		{"escaped slash first", "%2Fa", "", "/a", "%2Fa"},
		{"escaped slash last", "a%2F", "", "a/", "a%2F"},
		{"escaped question mark", "a%3Fb", "", "a?b", "a%3Fb"},
		{"query", "a", "x=1&y=%2fz", "a", "a?x=1&y=%2fz"},
		{"malformed escape in the query", "a", "%zz", "a", "a?%zz"},
		{"decoded once", "a%252e%252e%252fb", "", "a%2e%2e%2fb", "a%252e%252e%252fb"},
		{"UTF-8", "u/%c3%a9%E2%82%AC", "", "u/é€", "u/%C3%A9%E2%82%AC"},
		{"raw UTF-8", "u/é", "", "u/é", "u/%C3%A9"},
		{"dots within a name", "n/a..b...c/...", "", "n/a..b...c/...", "n/a..b...c/..."},
		{"reserved characters", "@s:x/f,1=2&$.bin", "", "@s:x/f,1=2&$.bin", "%40s%3Ax/f%2C1%3D2%26%24.bin"},
		{"1,024 bytes", strings.Repeat("d", 1022), "q", strings.Repeat("d", 1022), strings.Repeat("d", 1022) + "?q"},
		{"1,024 bytes and a dot", strings.Repeat("%64", 1023) + "/.", "", strings.Repeat("d", 1023) + "/", strings.Repeat("d", 1023) + "/"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path, spelling, err := spellPath(tt.escaped, tt.query)
			if path != tt.path || spelling != tt.spelling || err != nil {
				t.Errorf("got %q, %q, %v, want %q, %q", path, spelling, err, tt.path, tt.spelling)
			}
			if d := decodePath(spelling); d != path {
				t.Errorf("decodedPath(%q) = %q, want %q", spelling, d, path)
			}
		})
	}
}

func TestUnsafePathsAreRefused(t *testing.T) {
	t.Parallel()
	for _, escaped := range []string{
		"../x", "a/../b", "a/..", "..", "%2e%2e/x", "a/%2e%2e/b", "a/.%2e/b", "a/%2E./b", "a/..%2fb", "a%2f..%2fb", "a%2f..", "..%2f",
		"%2E%2E%2Fx", "a/%2e%2e%2f%2e%2e%2fetc/passwd", "a/%5c/b", "a%5c..%5cb", "..%5cx", `a\b`, "a%00b", "a\x00b", "a%0ab", "a%0d%0aX:y",
		"a%7fb", "a%1fb", "a%zzb", "a%2", "a%", "a%-1", "a%+1", "a%ffb", "%c3%28", "\xff", "./../x", "a//../b",
	} {
		if path, spelling, err := spellPath(escaped, ""); !errors.Is(err, errBadRequest) || statusOf(err) != 400 {
			t.Errorf("%q: got %q, %q, %v, want errBadRequest", escaped, path, spelling, err)
		}
	}
	for _, query := range []string{"a\nb", "a\x00", "a b", "\x7f", "\xff"} {
		if _, spelling, err := spellPath("a", query); !errors.Is(err, errBadRequest) {
			t.Errorf("query %q: got %q, %v, want errBadRequest", query, spelling, err)
		}
	}
}

func TestLongPathsAreRefused(t *testing.T) {
	t.Parallel()
	for name, s := range map[string][2]string{
		"plain":      {strings.Repeat("d", 1025), ""},
		"escaped":    {strings.Repeat("%2B", 342), ""},
		"with query": {strings.Repeat("d", 1000), strings.Repeat("q", 24)},
		"huge":       {strings.Repeat("é", 50000), ""},
	} {
		if _, _, err := spellPath(s[0], s[1]); !errors.Is(err, errTooLong) || statusOf(err) != 414 {
			t.Errorf("%s: got %v, want errTooLong", name, err)
		}
	}
	if _, _, err := spellPath(strings.Repeat("./", 5000)+"a", ""); err != nil {
		t.Errorf("a short path with many dots in front: %v", err)
	}
}

func TestKey(t *testing.T) {
	t.Parallel()
	for spelling, want := range map[string]string{ // hashes from sha256sum
		"k/file-1.0_x~y.tar.gz":                  "key/099477eab5b1837f/file-1.0_x~y.tar.gz",
		"k/q.bin?x=1&y=%2f":                      "key/-/q.bin",
		"k/q.bin?a/b":                            "key/-/q.bin",
		"k/dir/":                                 "key/-/_",
		"k/.hidden":                              "key/-/_hidden",
		"k/%40scope%2Bx%3D1":                     "key/-/@scope+x=1",
		"a%2Fb":                                  "key/-/a_b",
		"k/a%20b%22c%3B%C3%A9.bin":               "key/-/a_b_c___.bin",
		"k/" + strings.Repeat("n", 150) + ".bin": "key/-/" + strings.Repeat("n", 116) + ".bin",
		"k/" + strings.Repeat("n", 9) + "." + long(119):       "key/-/_" + long(119),
		"k/" + strings.Repeat("%E2%82%AC", 100) + ".bin":      "key/-/" + strings.Repeat("_", 116) + ".bin",
		"blobs/sha256:0a1b":                                   "key/-/sha256_0a1b",
		"library/alpine/tags/list?n=5":                        "key/-/list",
		"k/" + strings.Repeat("n", 1018) + "?" + "abc" + "de": "key/-/" + strings.Repeat("n", 120),
	} {
		got := target{remote: &remote{name: "key"}, spelling: spelling}.key()
		parts := strings.Split(got, "/")
		if len(parts) != 3 || len(parts[1]) != 16 {
			t.Fatalf("%s: key %q", spelling, got)
		}
		if strings.Contains(want, "/-/") {
			parts[1] = "-"
		}
		if got := strings.Join(parts, "/"); got != want {
			t.Errorf("%s:\ngot  %s\nwant %s", spelling, got, want)
		}
	}
}

func long(n int) string { return strings.Repeat("x", n) }

func TestKeysTellSpellingsApart(t *testing.T) {
	t.Parallel()
	keys := map[string]string{}
	for _, s := range []string{"a%2Fb", "a/b", "a%3Fb", "a?b", "A/b", "a/b/", "a/b?", "a_b"} {
		k := target{remote: &remote{name: "r"}, spelling: s}.key()
		if other, ok := keys[k]; ok {
			t.Errorf("%s and %s have the key %s", s, other, k)
		}
		keys[k] = s
	}
}

func TestResolve(t *testing.T) {
	t.Parallel()
	c := mustParse(t, "remotes:\n"+
		"  g: {base_url: 'http://a', mutable_patterns: ['index$'], immutable_patterns: ['bin$']}\n"+
		"  alp: {base_url: 'http://a', package: alpine}\n"+
		"  own: {type: local}\n"+
		"  hub: {base_url: 'http://a', package: docker}\n")
	for _, tt := range []struct {
		name, remote, escaped, query string
		status                       int // of the error; 0 for none
		detail                       string
		class                        class
		spelling                     string
	}{
		{name: "a file", remote: "g", escaped: "a+b.bin", query: "x=1", class: immutable, spelling: "a%2Bb.bin?x=1"},
		{name: "an index", remote: "g", escaped: "index", class: mutable, spelling: "index"},
		{name: "a built-in index", remote: "alp", escaped: "APKINDEX.tar.gz", class: mutable, spelling: "APKINDEX.tar.gz"},
		{name: "a file of ours", remote: "own", escaped: "a", class: local, spelling: "a"},
		{name: "the list", remote: "g"},
		{name: "the list with a slash", remote: "g", escaped: "/"},
		{name: "unknown remote", remote: "nosuch", escaped: "a", status: 404, detail: `there is no remote "nosuch"`},
		{name: "container registry", remote: "hub", escaped: "a", status: 404, detail: "/v2/hub/"},
		{name: "container registry's list", remote: "hub", status: 404, detail: "/v2/hub/"},
		{name: "unsafe", remote: "g", escaped: "a/../b", status: 400, detail: ".."},
		{name: "unsafe before denied", remote: "g", escaped: "%00", status: 400},
		{name: "too long", remote: "g", escaped: strings.Repeat("a", 1025), status: 414},
		{name: "denied", remote: "g", escaped: "a.zip", query: "bin", status: 403, detail: `remote "g"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := c.resolveTarget(tt.remote+"/"+tt.escaped, tt.query)
			if tt.status != 0 {
				if status, detail := statusAndDetail(err); status != tt.status || !strings.Contains(detail, tt.detail) {
					t.Errorf("got %v, want %d %s", err, tt.status, tt.detail)
				}
				return
			}
			if err != nil || got.remote != c.remotes[tt.remote] || got.class != tt.class || got.spelling != tt.spelling || got.wire != tt.spelling {
				t.Errorf("got %+v, %v, want %s %s", got, err, tt.class, tt.spelling)
			}
			if got.builtin != (tt.remote == "alp") {
				t.Errorf("builtin is %v", got.builtin)
			}
		})
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	t.Parallel()
	c := mustParse(t, one("    username: joe\n    password: ${TOKEN}\n"))
	if s := fmt.Sprintf("%v %+v %#v %+v", *c.remotes["x"], c.remotes["x"], c.remotes["x"], c.remotes["x"].password); strings.Contains(s, hidden) {
		t.Errorf("the password is in %s", s)
	}
}

// FuzzSpell: a spelling that spellPath returns is its own spelling, decodes to the path,
// and holds nothing that leads elsewhere.
func FuzzSpell(f *testing.F) {
	for _, s := range []string{"a/b", "./a//b/", "a%2f..%2fb", "a+b%20c^", "%C3%A9", "a%2F.", "%2F/", ".%2e", "a/.", "%"} {
		f.Add(s, "x=%2f")
		f.Add(s, "")
	}
	f.Fuzz(func(t *testing.T, escaped, query string) {
		path, spelling, err := spellPath(escaped, query)
		if err != nil {
			if (!errors.Is(err, errBadRequest) && !errors.Is(err, errTooLong)) || path != "" || spelling != "" {
				t.Fatalf("%q, %q, %v", path, spelling, err)
			}
			return
		}
		if len(spelling) > maxSpelling || decodePath(spelling) != path {
			t.Fatalf("%q is the spelling of %q", spelling, path)
		}
		if slices.Contains(strings.Split(path, "/"), "..") || strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' }) {
			t.Fatalf("path %q", path)
		}
		bare, rest, _ := strings.Cut(spelling, "?")
		if strings.HasPrefix(bare, "/") || strings.Contains(bare, "//") || (path != "" && rest != query) {
			t.Fatalf("spelling %q", spelling)
		}
		again, spellingAgain, err := spellPath(bare, rest)
		if again != path || spellingAgain != spelling || err != nil {
			t.Fatalf("%q was %q, now %q, %q, %v", escaped, spelling, again, spellingAgain, err)
		}
		key := target{remote: &remote{name: "r"}, spelling: spelling}.key()
		_, name, _ := strings.Cut(key[2:], "/")
		if name == "" || len(name) > maxFilename || name[0] == '.' || strings.Contains(name, "/") {
			t.Fatalf("key %q", key)
		}
	})
}

// FuzzConfig: no file makes the parser panic, and every mistake has its line.
func FuzzConfig(f *testing.F) {
	for _, name := range []string{"remotes.yaml", "testdata/config-full.yaml"} {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(data))
	}
	for _, s := range []string{"", "a: *b", one("    password: !hidden\n"), "remotes: {x: {<<: {}}}", "remotes: [", "--- |\n", "? [a]\n: b", "%YAML 1.1\n---\nx"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, yaml string) {
		c, err := parseConfig("f", []byte(yaml), testEnv)
		if err == nil {
			if _, err := json.Marshal(c.publicView()); err != nil || len(c.names) == 0 {
				t.Fatalf("%v: %v", c.names, err)
			}
			return
		}
		for said := range strings.SplitSeq(err.Error(), "\n") {
			if !mistakePattern.MatchString(said) {
				t.Fatalf("%q", said)
			}
		}
	})
}

var mistakePattern = regexp.MustCompile(`^f:[1-9][0-9]*: .`)

func BenchmarkResolve(b *testing.B) {
	data, err := os.ReadFile("remotes.yaml")
	if err != nil {
		b.Fatal(err)
	}
	c := mustParse(b, string(data))
	for _, bb := range []struct{ name, remote, escaped, query string }{
		{"plain", "github", "gruntwork-io/terragrunt/releases/download/v0.96.1/terragrunt_linux_amd64.tar.gz", ""},
		{"query", "local-generic", "some/dir/file-1.0.tar.gz", "x=1"},
		{"escaped", "local-generic", "some/g++-1.0_%7Ex86_64.rpm", ""},
		{"rpm", "almalinux", "9/BaseOS/x86_64/os/Packages/bash-5.1.8-9.el9.x86_64.rpm", ""},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				t, err := c.resolveTarget(bb.remote+"/"+bb.escaped, bb.query)
				if err != nil {
					b.Fatal(err)
				}
				_ = t.key()
			}
		})
	}
}

func TestNamesThatAreTheirHash(t *testing.T) {
	t.Parallel()
	hex := strings.Repeat("0123456789abcdef", 4)
	hex512 := strings.Repeat("0123456789abcdef", 8)
	c := mustParse(t, "remotes:\n"+
		"  deb: {base_url: 'http://a', package: deb, immutable_patterns: ['^pool/'], mutable_patterns: ['by-hash', 'repodata']}\n"+
		"  rpm: {base_url: 'http://a', package: rpm, immutable_patterns: ['rpm$'], mutable_patterns: ['by-hash', 'repodata']}\n"+
		"  own: {type: local, package: deb, immutable_patterns: ['^pool/']}\n")
	for _, tt := range []struct {
		remote, path, digest string
		class                class
	}{
		{"deb", "dists/t/main/by-hash/SHA256/" + hex, "sha256:" + hex, immutable},
		{"deb", "by-hash/SHA512/" + hex512, "sha512:" + hex512, immutable},
		{"deb", "dists/t/by-hash/MD5Sum/" + hex[:32], "", immutable},
		{"deb", "dists/t/by-hash/SHA256/x", "", immutable},
		{"deb", "repodata/" + hex + "-primary.xml.gz", "", mutable},
		{"deb", "pool/a.deb", "", immutable},
		{"rpm", "a/repodata/" + hex + "-primary.xml.gz", "sha256:" + hex, immutable},
		{"rpm", "repodata/" + hex + "-primary.xml.gz", "sha256:" + hex, immutable},
		{"rpm", "repodata/" + hex[1:] + "-primary.xml.gz", "", mutable},
		{"rpm", "x/by-hash/SHA256/" + hex, "", mutable},
		{"own", "by-hash/SHA256/" + hex, "", ""},
	} {
		class, builtin, err := c.remotes[tt.remote].classifyPath(tt.path)
		digest, _ := c.remotes[tt.remote].digestInName(tt.path)
		if class != tt.class || digest != tt.digest || (err != nil) != (tt.class == "") || (class == immutable && builtin) {
			t.Errorf("%s %s: class %q, digest %q, %v", tt.remote, tt.path, class, digest, err)
		}
	}
}

// A mistake in a value from the environment is told without that value.
func TestMistakesDoNotQuoteVariables(t *testing.T) {
	t.Parallel()
	env := func(string) (string, bool) { return "hunter2:\n/\x00#", true }
	for _, key := range []string{"type", "package", "query", "base_url", "registry", "token_realm", "username", "password", "description",
		"timeout", "negative_ttl", "sealed", "mirrors", "headers", "immutable_patterns", "rewrite", "cache"} {
		for _, kind := range []string{"generic", "docker"} {
			for _, value := range []string{`"a${V}"`, `["a${V}"]`, `{url: "${V}", X-A: "${V}", max_size: "${V}", mutable_ttl: "${V}"}`, `[{url: "${V}", auth: "${V}"}]`} {
				text := "remotes:\n  r:\n    " + key + ": " + value + "\n"
				if key != "base_url" {
					text += "    base_url: https://x\n"
				}
				if key != "package" {
					text += "    package: " + kind + "\n"
				}
				cfg, err := parseConfig("remotes.yaml", []byte(text), env)
				if said := fmt.Sprint(err); strings.Contains(said, "hunter2") || (err == nil && strings.Contains(fmt.Sprint(cfg.warnings), "hunter2")) {
					t.Errorf("%s: %s", text, said)
				}
			}
		}
	}
}
