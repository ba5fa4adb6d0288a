package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	goast "go/ast"
	goparser "go/parser"
	gotoken "go/token"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// envOf makes an environment of these variables.
func envOf(vars map[string]string) lookupEnv {
	return func(name string) (string, bool) { v, ok := vars[name]; return v, ok }
}

// --- sub-commands ---

func TestCommands(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	good, bad, odd := dir+"/good.yaml", dir+"/bad.yaml", dir+"/odd.yaml"
	for name, text := range map[string]string{good: remoteYAML("http://127.0.0.1:1"), odd: remoteYAML("http://127.0.0.1:1", "password: a"), bad: "remotes:\n  r: {base_url: nonsense, shape: round}\n"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args string
		code int
		out  string // a part of stdout
		err  string // a part of stderr
	}{
		{"version", 0, "artifactapi ", ""},
		{"help", 0, "usage:", ""},
		{"--help", 0, "usage:", ""},
		{"-h", 0, "usage:", ""},
		{"nonsense", 2, "", "\"nonsense\"\nusage:"},
		{"--version", 0, "artifactapi ", ""},
		{"--verbose", 2, "", "\"--verbose\"\nusage:"},
		{"check one two", 2, "", "\"two\"\nusage:"},
		{"serve now", 2, "", "\"now\"\nusage:"},
		{"prefetch", 2, "", "usage:"},
		{"prefetch remote", 2, "", "usage:"},
		{"prefetch - more", 2, "", "usage:"},
		{"prefetch --shape round remote .", 2, "", "-shape\nusage:"},
		{"prefetch remote --dry-run .", 2, "", "\"--dry-run\"\nusage:"},
		{"export --all", 2, "", "\"--all\"\nusage:"},
		{"version please", 2, "", "usage:"},
		{"check", 0, "1 remotes", ""},
		{"check " + good, 0, "1 remotes", ""},
		{"check " + odd, 0, "warning: ", ""},
		{"check " + bad, 1, "", "bad.yaml:2: remote \"r\""},
		{"check " + dir + "/none.yaml", 1, "", "none.yaml"},
		{"verify", 0, "0 checked, 0 dropped\nnothing is stored in ", ""},
		{"healthcheck", 1, "", "/health"},
	} {
		t.Run(c.args, func(t *testing.T) {
			t.Parallel()
			var out, errs bytes.Buffer
			env := envOf(map[string]string{"CONFIG_PATH": good, "DATA_DIR": t.TempDir() + "/data", "LISTEN_ADDR": refusingAddress(t)})
			code := run(context.Background(), strings.Fields(c.args), env, &out, &errs)
			if code != c.code || !strings.Contains(out.String(), c.out) || !strings.Contains(errs.String(), c.err) {
				t.Errorf("exit %d, stdout %q, stderr %q; want %d, %q, %q", code, out.String(), errs.String(), c.code, c.out, c.err)
			}
		})
	}
}

func TestVerifyDropsWhatDoesNotMatch(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", noise(1, 1000))
	tt.origin.file("/b", noise(2, 1000))
	body := tt.fileOf("a")
	tt.get("/api/r/b")
	verify := func() (int, string) {
		var out, errs bytes.Buffer
		code := run(context.Background(), []string{"verify"}, envOf(map[string]string{"DATA_DIR": tt.disk.dir}), &out, &errs)
		return code, out.String() + errs.String()
	}
	if code, said := verify(); code != 0 || !strings.Contains(said, "2 checked, 0 dropped") {
		t.Errorf("nothing is damaged, and verify exits with %d: %s", code, said)
	}
	// Only verify finds damage that changes neither size nor time.
	info, err := os.Stat(body)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(body, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = f.WriteAt([]byte{0}, 500)
	f.Close()
	if err := os.Chtimes(body, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	if code, said := verify(); code != 1 || !strings.Contains(said, "2 checked, 1 dropped") {
		t.Errorf("one file is damaged, and verify exits with %d: %s", code, said)
	}
	tt.restart()
	tt.get("/api/r/a").wantMiss().wantBody(noise(1, 1000)) // beside a running server
	tt.get("/api/r/b").wantHit()
}

// --- environment ---

func TestEnvironment(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		vars string // NAME=value ...
		want string // a part of the error; "" for none
	}{
		{"", ""},
		{"LISTEN_ADDR= MIN_FREE= LOG_LEVEL= DBHOST= MINIO_ENDPOINT= REDIS_URL= TLS_CERT_FILE=", ""}, // empty is unset
		{"LISTEN_ADDR=8000", "LISTEN_ADDR"},
		{"LISTEN_ADDR=localhost", "LISTEN_ADDR"},
		{"LISTEN_ADDR=:65536", "LISTEN_ADDR"},
		{"LISTEN_ADDR=:http", "LISTEN_ADDR"},
		{"LISTEN_ADDR=:", "LISTEN_ADDR"},
		{"LISTEN_ADDR=:0", ""},
		{"KUBERNETES_SERVICE_HOST=10.0.0.1", ""},
		{"MIN_FREE=much", "MIN_FREE"},
		{"MIN_FREE=5GiB", ""},
		{"CACHE_MAX_SIZE=-1", "CACHE_MAX_SIZE"},
		{"HOT_CACHE_SIZE=x", "HOT_CACHE_SIZE"},
		{"DRAIN_DELAY=10", "DRAIN_DELAY"},
		{"DRAIN_DELAY=-1s", "DRAIN_DELAY"},
		{"DRAIN_DELAY=1m30s", ""},
		{"LOG_LEVEL=loud", "LOG_LEVEL"},
		{"LOG_LEVEL=DEBUG", ""},
		{"LOG_FORMAT=xml", "LOG_FORMAT"},
		{"SEALED=perhaps", "SEALED"},
		{"SEALED=1", ""},
		{"TLS_CERT_FILE=a", "TLS_KEY_FILE"},
		{"TLS_KEY_FILE=a", "TLS_CERT_FILE"},
		{"DBHOST=db", "DBUSER"},
		{"DBHOST=db DBUSER=u", "DBNAME"},
		{"DBHOST=db DBUSER=u DBNAME=n DBPORT=x", "DBPORT"},
		{"DBHOST=db DBUSER=u DBNAME=n DBPORT=0", "DBPORT"},
		{"DBHOST=db DBUSER=u DBNAME=n DBSSLMODE=maybe", "DBSSLMODE"},
		{"MINIO_ENDPOINT=s3:9000", "MINIO_ACCESS_KEY"},
		{"MINIO_ENDPOINT=s3:9000 MINIO_ACCESS_KEY=a", "MINIO_SECRET_KEY"},
		{"MINIO_ENDPOINT=s3:9000 MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b", "MINIO_BUCKET"},
		{"MINIO_ENDPOINT=https://s3:9000 MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc MINIO_SECURE=false", "MINIO_SECURE"},
		{"MINIO_ENDPOINT=http://s3:9000 MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc MINIO_SECURE=true", "MINIO_SECURE"},
		{"MINIO_ENDPOINT=ftp://s3 MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc", "MINIO_ENDPOINT"},
		{"MINIO_ENDPOINT=https://s3:9000 MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc", ""},
		{"MINIO_SECURE=perhaps", "MINIO_SECURE"},
		{"MINIO_REGION=a/b", "MINIO_REGION"},
		{"REDIS_URL=localhost:6379", "REDIS_URL"},
		{"REDIS_URL=redis://:hunter2@/0", "REDIS_URL"},
		{"REDIS_URL=redis://:hunter2@localhost:6379/0", ""},
		{"REDIS_URL=redis://:hunter2%zz@localhost:6379/0", "REDIS_URL"},
		{"REDIS_URL=redis://:hunter2@localhost:99999/0", "REDIS_URL"},
		{"DBHOST=postgres://u:hunter2@db/n DBUSER=u DBNAME=n", "DBHOST"},
		{"DBHOST=db:5432 DBUSER=u DBNAME=n", "DBHOST"},
		{"DBHOST=::1 DBUSER=u DBNAME=n", ""},
		{"DBHOST=/run/postgresql DBUSER=u DBNAME=n", ""},
		{"DBHOST=db_1.local DBUSER=u DBNAME=n", ""},
		{"MINIO_ENDPOINT=s3:x MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc", "MINIO_ENDPOINT"},
		{"MINIO_ENDPOINT=s3:99999 MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc", "MINIO_ENDPOINT"},
		{"MINIO_ENDPOINT=:9000 MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc", "MINIO_ENDPOINT"},
		{"MINIO_ENDPOINT=s3:9000/path MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc", "MINIO_ENDPOINT"},
		{"MINIO_ENDPOINT=http://a:hunter2@s3 MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc", "MINIO_ENDPOINT"},
		{"MINIO_ENDPOINT=HTTPS://s3/ MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc MINIO_SECURE=TRUE", ""},
		{"MINIO_ENDPOINT=s3:9000 MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc/d", "MINIO_BUCKET"},
		{"MINIO_ENDPOINT=s3:9000 MINIO_ACCESS_KEY=a MINIO_SECRET_KEY=b MINIO_BUCKET=ccc MINIO_REGION=a/b", "MINIO_REGION"},
		{"ADVERTISE_URL=http://a:hunter2@h", "ADVERTISE_URL"},
		{"ADVERTISE_URL=h:8000", "ADVERTISE_URL"},
		{"ADVERTISE_URL=https://h:8000/", ""},
		{"HTTPS_PROXY=http://a:hunter2@[bad", "HTTPS_PROXY"},
		{"http_proxy=ftp://proxy", "http_proxy"},
		{"HTTP_PROXY=proxy:3128 HTTPS_PROXY=socks5://a:hunter2@proxy:1080", ""},
	} {
		vars := map[string]string{}
		for _, v := range strings.Fields(c.vars) {
			name, value, _ := strings.Cut(v, "=")
			vars[name] = value
		}
		_, err := parseSettings(envOf(vars))
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.vars, err)
		case c.want != "" && err == nil:
			t.Errorf("%s is taken, want an error that names %s", c.vars, c.want)
		case err != nil && (!strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2")):
			t.Errorf("%s: %q, want an error that names %s and shows no secret", c.vars, err, c.want)
		}
	}
}

func TestAllMistakesInTheEnvironmentAreNamed(t *testing.T) {
	t.Parallel()
	_, err := parseSettings(envOf(map[string]string{"MINIO_ACCESS_KEY": "a", "DBNAME": "n", "MIN_FREE": "much", "LOG_LEVEL": "loud", "DBPASS": "hunter2\n"}))
	if err == nil {
		t.Fatal("all was taken")
	}
	var got []string
	for line := range strings.Lines(err.Error()) {
		name, _, _ := strings.Cut(strings.TrimPrefix(line, "environment: "), ":")
		got = append(got, name)
	}
	slices.Sort(got)
	if want := strings.Fields("DBHOST DBPASS DBUSER LOG_LEVEL MINIO_BUCKET MINIO_ENDPOINT MINIO_SECRET_KEY MIN_FREE"); !slices.Equal(got, want) {
		t.Errorf("the error names %q, want a line for each of %q: %v", got, want, err)
	}
}

// A word that is not one of those that may be there contradicts nothing.
func TestWrongWordIsOneMistake(t *testing.T) {
	t.Parallel()
	_, err := parseSettings(envOf(map[string]string{"MINIO_ENDPOINT": "http://h:9000", "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "s", "MINIO_BUCKET": "buck", "MINIO_SECURE": "maybe"}))
	if want := `environment: MINIO_SECURE: "maybe" is not one of true, false, 1, 0`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// openTerminal opens a terminal until the test ends. It echoes what is written to it.
func openTerminal(t *testing.T) *os.File {
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	t.Cleanup(func() { terminal.Close() })
	return terminal
}

func TestLogFormatFollowsTheOutput(t *testing.T) {
	t.Parallel()
	terminal := openTerminal(t)
	for _, c := range []struct {
		to           io.Writer
		format, want string
	}{
		{terminal, "", "*slog.TextHandler"}, {terminal, "json", "*slog.JSONHandler"},
		{io.Discard, "", "*slog.JSONHandler"}, {io.Discard, "text", "*slog.TextHandler"},
	} {
		if got := fmt.Sprintf("%T", newLogger(&settings{logFormat: c.format}, c.to).Handler()); got != c.want {
			t.Errorf("LOG_FORMAT=%s to %T: %s, want %s", c.format, c.to, got, c.want)
		}
	}
}

func TestTokenThatNobodyCouldSend(t *testing.T) {
	t.Parallel()
	for _, token := range []string{"hunter2\n", " hunter2", "hun\r\nter2", "hunter2 "} {
		for _, name := range []string{"API_TOKEN", "DBUSER", "DBPASS", "DBNAME", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY"} {
			_, err := parseSettings(envOf(map[string]string{name: token}))
			if err == nil || !strings.Contains(err.Error(), name+": holds") || strings.Contains(err.Error(), "hun") {
				t.Errorf("%q: %v, want an error that names %s and does not show it", token, err, name)
			}
		}
	}
	for _, v := range []string{"redis://:hunter2@h:6379/0\n", "redis://:hunter2@h:6379/0 ", "redis://:hunter2@h:6379 "} {
		_, err := parseSettings(envOf(map[string]string{"REDIS_URL": v}))
		if err == nil || !strings.Contains(err.Error(), "REDIS_URL") || strings.Contains(err.Error(), "hun") {
			t.Errorf("%q: %v, want an error that names REDIS_URL and does not show it", v, err)
		}
	}
}

func TestSettingsAreShownWithoutTheirSecrets(t *testing.T) {
	t.Parallel()
	set, err := parseSettings(envOf(map[string]string{"API_TOKEN": "HIDDEN", "DBPASS": "HIDDEN", "DBHOST": "h", "DBUSER": "u@server", "DBNAME": "n", "REDIS_URL": "rediss://HIDDEN:HID@DEN@h:6379/2?HIDDEN",
		"MINIO_ENDPOINT": "https://s3:9", "MINIO_ACCESS_KEY": "id", "MINIO_SECRET_KEY": "HIDDEN", "MINIO_BUCKET": "bbb", "HTTPS_PROXY": "u:HIDDEN@p:3128", "http_proxy": "http://u:1?HIDDEN@p",
		"MIN_FREE": "3MB", "LOG_LEVEL": "WARN", "DATA_DIR": "/d@t/a"}))
	must(t, err)
	for name, want := range map[string]string{"API_TOKEN": "***", "DBPASS": "***", "DBUSER": "u@server", "DBPORT": "5432", "REDIS_URL": "rediss://***@h:6379/2", "MINIO_SECRET_KEY": "***", "MINIO_ACCESS_KEY": "id",
		"MINIO_SECURE": "true", "MINIO_REGION": "us-east-1", "HTTPS_PROXY": "***@p:3128", "http_proxy": "http://***@p", "MIN_FREE": "3MB", "HOT_CACHE_SIZE": "10GiB", "DATA_DIR": "/d@t/a", "CACHE_MAX_SIZE": "0"} {
		if got, ok := set.shown[name]; !ok || got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if all := fmt.Sprint(set.shown); strings.Contains(all, "HIDDEN") || strings.Contains(all, "DEN@") {
		t.Errorf("a secret shows: %s", all)
	}
	if p := set.redisPrefix(); p != "bbb" {
		t.Errorf("the keys in Redis have the prefix %q, want the bucket's name", p)
	}
	unset, err := parseSettings(envOf(nil))
	must(t, err)
	names, _ := environmentOf(t)
	for _, name := range names {
		if v, ok := unset.shown[name]; !ok || v == "***" {
			t.Errorf("%s is shown as %q, %v", name, v, ok)
		}
	}
	if _, ok := unset.shown["https_proxy"]; ok || len(unset.shown) > len(names) {
		t.Errorf("more is shown than there is: %q", unset.shown)
	}
}

// --- the documents are complete ---

// environmentOf returns the variables that main_env.go reads (the first arguments of
// envReader's methods) and those that the libraries read. defaults holds the defaults
// that are strings.
func environmentOf(t *testing.T) (names []string, defaults map[string]string) {
	p := readProgram(t)
	reads := map[string]bool{"readString": true, "readSize": true, "readOneOf": true, "readBool": true}
	defaults = map[string]string{}
	p.each(func(file string, n goast.Node) {
		call, ok := n.(*goast.CallExpr)
		if !ok || file != "main_env.go" || len(call.Args) == 0 {
			return
		}
		sel, ok := call.Fun.(*goast.SelectorExpr)
		lit, isLit := call.Args[0].(*goast.BasicLit)
		if !ok || !isLit || !reads[sel.Sel.Name] {
			return
		}
		name, err := strconv.Unquote(lit.Value)
		if err != nil || !regexp.MustCompile(`^[A-Z][A-Z0-9_]+$`).MatchString(name) || slices.Contains(names, name) {
			return
		}
		names = append(names, name)
		if value, ok := call.Args[len(call.Args)-1].(*goast.BasicLit); ok && sel.Sel.Name == "readString" {
			defaults[name], _ = strconv.Unquote(value.Value)
		}
	})
	if len(names) < 10 {
		t.Fatalf("found only %q in main_env.go: did the reader of the environment change?", names)
	}
	return append(names, "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE"), defaults
}

// commandsOf returns the sub-commands that usage lists.
func commandsOf(t *testing.T) (names []string) {
	for _, m := range regexp.MustCompile(`(?m)^  ([a-z]+)`).FindAllStringSubmatch(usage, -1) {
		names = append(names, m[1])
	}
	if len(names) < 5 {
		t.Fatalf("found only %q in the usage", names)
	}
	return names
}

func TestTheManualIsComplete(t *testing.T) {
	t.Parallel()
	manual := packageComment(t)
	names, _ := environmentOf(t)
	for _, name := range append(names, commandsOf(t)...) {
		if !hasWord(manual, name) {
			t.Errorf("go doc does not name %s", name)
		}
	}
	for _, route := range []string{"/api/{remote}/{path}", "/v2/", "/health", "/config", "/metrics", "/missed", "/artifacts/{remote}"} {
		if !strings.Contains(manual, route) {
			t.Errorf("go doc does not name %s", route)
		}
	}
	for _, name := range commandsOf(t) { // each documented command exists
		var out, errs bytes.Buffer
		env := envOf(map[string]string{"CONFIG_PATH": t.TempDir() + "/none", "DATA_DIR": t.TempDir(), "LISTEN_ADDR": refusingAddress(t)})
		args := []string{name}
		if name == "prefetch" {
			args = append(args, "r", ".")
		}
		if code := run(context.Background(), args, env, &out, &errs); code == 2 {
			t.Errorf("%s is in the usage and is refused", name)
		}
	}
}

// packageComment returns the comment that go doc prints first.
func packageComment(t *testing.T) string {
	f, err := goparser.ParseFile(gotoken.NewFileSet(), "main.go", nil, goparser.ParseComments|goparser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	return f.Doc.Text()
}

func hasWord(text, word string) bool {
	return regexp.MustCompile(`(^|[^A-Za-z0-9_.])` + regexp.QuoteMeta(word) + `($|[^A-Za-z0-9_])`).MatchString(text)
}

func TestREADMEIsComplete(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{} // line of each name in a cell of a table; a first cell is preferred
	for line := range strings.Lines(string(data)) {
		cells := strings.Split(line, "|")
		if len(cells) < 3 {
			continue
		}
		for i, cell := range cells[1 : len(cells)-1] {
			for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
				if i == 0 || rows[m[1]] == "" {
					rows[m[1]] = line
				}
			}
		}
	}
	variables, defaults := environmentOf(t)
	for _, name := range variables {
		if rows[name] == "" || !strings.Contains(rows[name], defaults[name]) {
			t.Errorf("no table in README.md has %s with the default %q", name, defaults[name])
		}
	}
	for _, k := range remoteKeys {
		if rows[k.name] == "" && k.name != "cache" {
			t.Errorf("no table in README.md has the key %s", k.name)
		}
		if k.field != nil && rows[k.name] != "" && regexp.MustCompile(`^[0-9]+$|^(true|false)$`).MatchString(k.defaultText) && !strings.Contains(rows[k.name], "`"+k.defaultText+"`") {
			t.Errorf("README.md does not give the default %s of %s: %s", k.defaultText, k.name, rows[k.name])
		}
	}
	keys := map[string]bool{}
	for _, k := range remoteKeys {
		keys[k.name] = true
	}
	for _, name := range firstCells(t, string(data), "## remotes.yaml") {
		if !keys[name] {
			t.Errorf("README.md has the key %s, which is not known", name)
		}
	}
	for _, name := range firstCells(t, string(data), "## Environment") {
		if !slices.Contains(variables, name) && !strings.HasPrefix(name, "artifactapi") {
			t.Errorf("README.md has the variable %s, which is not read", name)
		}
	}
	files := firstCells(t, string(data), "## Files")
	for _, rung := range ladder {
		if !slices.Contains(files, rung.file) || !strings.Contains(rows[rung.file], fmt.Sprintf("| %d |", rung.layer)) {
			t.Errorf("README.md does not have %s in layer %d: %s", rung.file, rung.layer, rows[rung.file])
		}
	}
	for _, name := range files {
		if !slices.ContainsFunc(ladder, func(r rung) bool { return r.file == name }) {
			t.Errorf("README.md has %s, which is not in the ladder", name)
		}
	}
	for _, name := range commandsOf(t) {
		if !strings.Contains(string(data), "`artifactapi "+name) {
			t.Errorf("README.md does not name the command %s", name)
		}
	}
	for _, block := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(data), -1) {
		if !strings.HasPrefix(strings.TrimSpace(block[1]), "remotes:") {
			continue
		}
		// Each variable that an example uses is set.
		if _, err := parseConfig("README.md", []byte(block[1]), func(string) (string, bool) { return "x", true }); err != nil {
			t.Errorf("an example is not valid: %v\n%s", err, block[1])
		}
	}
}

// firstCells returns the names in the first cells of the tables of one section of
// README.md.
func firstCells(t *testing.T, text, heading string) (names []string) {
	_, section, found := strings.Cut(text, "\n"+heading+"\n")
	section, _, _ = strings.Cut(section, "\n## ")
	for line := range strings.Lines(section) {
		if cells := strings.Split(line, "|"); len(cells) > 2 {
			for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
				names = append(names, m[1])
			}
		}
	}
	if !found || len(names) == 0 {
		t.Errorf("README.md has no table below %s", heading)
	}
	return names
}

// The client settings in README.md ask for files that the shipped remotes.yaml allows.
func TestREADMEsClientsFindTheirIndexes(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := loadConfig("remotes.yaml", os.LookupEnv)
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]bool{}
	behind := map[string]string{"almalinux": "repodata/repomd.xml", "alpine": "x86_64/APKINDEX.tar.gz", "apt-mirror": "dists/trixie/InRelease",
		"goproxy": "golang.org/x/text/@v/list", "maven-central": "junit/junit/maven-metadata.xml", "helm-charts": "index.yaml", "pypi": "requests/",
		"npm": "lodash", "crates": "config.json", "terraform": "hashicorp/aws/versions"}
	for _, m := range regexp.MustCompile(`//cache\.example:8000/api/([a-z0-9-]+)/?([^\s`+"`"+`"<]*)`).FindAllStringSubmatch(string(data), -1) {
		path := strings.TrimLeft(strings.TrimSuffix(m[2], "/")+"/"+behind[m[1]], "/")
		if at, err := cfg.resolveTarget(m[1]+"/"+path, ""); err != nil || !strings.HasSuffix(at.path, behind[m[1]]) || at.class != mutable {
			t.Errorf("%s leads to %s, which is %q, %v", m[0], path, at.class, err)
		}
		shown[m[1]] = true
	}
	if len(shown) != len(behind) {
		t.Errorf("README.md shows the clients of %v, want %v", shown, behind)
	}
}

// --- the server as a process ---

func TestServerStartsServesAndStops(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	o.file("/a", "body")
	c := childSetup{yaml: remoteYAML(o.url)}.start(t)
	c.tester().get("/api/r/a").wantMiss().wantBody("body")
	c.wantLog(`"remotes":1`)
	awaitThat(t, "it to be stored", func() bool { return c.tester().get("/artifacts/r").has(`"path": "a"`) })
	if code := c.stop(); code != 0 {
		t.Errorf("exit status %d\n%s", code, c.logs())
	}
	c = c.again()
	o.troubled(o.resets)
	c.tester().get("/api/r/a").wantHit().wantBody("body")
	awaitThat(t, "the list", func() bool { return c.tester().get("/artifacts/r").has(`"path": "a"`) })
}

// The work that reads every file of a large cache runs in the background: the first
// client must not wait for it.
func TestStartDoesNotWaitForTheSweep(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	orphans := tt.disk.dir + "/r/0123456789abcdef"
	long := time.Now().Add(-2 * orphanAge)
	must(t, os.MkdirAll(orphans, 0o755), os.WriteFile(orphans+"/"+recordNext, nil, 0o600), os.Chtimes(orphans, long, long))
	tt.restart() // it returns when requests are served
	if _, err := os.Stat(orphans); err != nil {
		t.Errorf("the sweep came before the first request: %v", err)
	}
	dir := filepath.Dir(tt.disk.dir)
	tt.end()
	childSetup{yaml: tt.yaml(), dir: dir}.start(t)
	awaitThat(t, "the sweep", func() bool { _, err := os.Stat(orphans); return err != nil })
}

func TestWrongConfigurationStopsTheStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	yaml := "remotes:\n  r:\n    base_url: nonsense\n  x:\n    shape: round\n"
	if err := os.WriteFile(dir+"/remotes.yaml", []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	env := envOf(map[string]string{"CONFIG_PATH": dir + "/remotes.yaml", "DATA_DIR": dir + "/data", "LISTEN_ADDR": "127.0.0.1:0"})
	if code := run(context.Background(), nil, env, &out, &errs); code != 1 {
		t.Errorf("exit status %d", code)
	}
	for _, part := range []string{`remotes.yaml:3: remote "r"`, `remotes.yaml:5: remote "x"`} {
		if !strings.Contains(errs.String(), part) {
			t.Errorf("the error %q does not name %q", errs.String(), part)
		}
	}
	if _, err := os.Stat(dir + "/data"); err == nil {
		t.Error("DATA_DIR was made by a server that did not start")
	}
}

// No request fails while the configuration is reloaded again and again by SIGHUP.
func TestReloadUnderLoad(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	other := newTestOrigin(t, setup{})
	text := noise(1, 100_000)
	for _, at := range []*testOrigin{o, other} {
		at.troubled(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) })
	}
	configs := []string{remoteYAML(o.url), remoteYAML(other.url, "timeout: 7"), "remotes:\n  r: {base_url: oops\n"}
	c := childSetup{yaml: configs[0]}.start(t)
	tt := c.tester()
	tt.get("/api/r/warm").wantStatus(200)
	stop := make(chan struct{})
	var requests, n atomic.Int64
	var load sync.WaitGroup
	for i := range 8 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				path := "/api/r/warm"
				if i%2 == 0 {
					path = fmt.Sprintf("/api/r/cold%d", n.Add(1)) // a miss for each request
				}
				tt.get(path).wantStatus(200).wantBody(text)
				requests.Add(1)
			}
		})
	}
	for i := range 12 {
		c.configure(configs[i%3])
		if err := c.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		awaitThat(t, "the reload", func() bool {
			return strings.Count(c.logs(), "configuration loaded")+strings.Count(c.logs(), "the old one stays in force") > i
		})
		awaitThat(t, "requests beside it", func() bool { return requests.Load() >= int64(5*(i+1)) })
	}
	close(stop)
	load.Wait()
	if n := strings.Count(c.logs(), "the old one stays in force"); n != 4 {
		t.Errorf("%d broken files were reported, want 4", n)
	}
	if g := tt.get("/config"); !g.has(other.url) {
		t.Errorf("the last good file is not in force: %s", g.text)
	}
}

func TestChangedConfigurationIsNoticed(t *testing.T) {
	t.Parallel()
	c := childSetup{yaml: remoteYAML("http://127.0.0.1:1")}.start(t)
	c.configure(remoteYAML("http://127.0.0.1:2"))
	c.wantLog("configuration loaded")
	if g := c.tester().get("/config"); !g.has("127.0.0.1:2") {
		t.Errorf("in force: %s", g.text)
	}
}

// What stands in the file for a moment while it is written is not put into force: half
// of it may lack an allow list.
func TestHalfWrittenConfigurationIsNotLoaded(t *testing.T) {
	t.Parallel()
	file := t.TempDir() + "/remotes.yaml"
	tt := setup{env: map[string]string{"CONFIG_PATH": file, "SEALED": "true"}}.start(t)
	s := tt.server
	write := func(yaml string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	wantAtNextLook := func(names ...string) {
		t.Helper()
		s.checkFiles(false)
		if got := s.config.Load().names; !slices.Equal(got, names) {
			t.Errorf("the remotes in force are %q, want %q", got, names)
		}
	}
	first := "remotes:\n  a:\n    base_url: http://a.test\n"
	whole := first + "  b:\n    base_url: http://b.test\n"
	old := s.config.Load().names
	write(first)
	wantAtNextLook(old...)
	write(whole)
	wantAtNextLook(old...)
	wantAtNextLook("a", "b")

	write("remotes: {a: {base_url: oops}}")
	wantAtNextLook("a", "b")
	if g := tt.get("/health").wantStatus(200); !g.has(`"status": "healthy"`) || g.has("configuration") {
		t.Errorf("a file that is being written counts: %s", g.text)
	}
	wantAtNextLook("a", "b")
	if g := tt.get("/health").wantStatus(200); !g.has(`"status": "degraded"`) || !g.has(`"configuration": "rejected"`) {
		t.Errorf("a rejected configuration does not show: %s", g.text)
	}
	if g := tt.get("/metrics"); !g.has("artifactapi_config_last_reload_successful 0\n") {
		t.Error("a rejected configuration is no metric")
	}
	write(whole)
	wantAtNextLook("a", "b")
	wantAtNextLook("a", "b")
	if g := tt.get("/health"); !g.has(`"status": "healthy"`) || g.has("configuration") {
		t.Errorf("a good configuration does not end it: %s", g.text)
	}
	write("remotes:\n  b: {base_url: http://other.test}\n  c: {type: local}\n")
	wantAtNextLook("a", "b")
	wantAtNextLook("b", "c")
	tt.wantLog(`"added":["c"],"changed":["b"],"removed":["a"]`)
	before := s.config.Load()
	s.checkFiles(true)
	if s.config.Load() == before {
		t.Error("SIGHUP loads nothing")
	}
	tt.wantLog(`"configuration loaded","remotes":2}`) // and nothing of what is another
}

// A SIGHUP while the server starts does not end it.
func TestReloadDuringTheStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pipe, yaml := dir+"/pipe", dir+"/yaml"
	if err := errors.Join(syscall.Mkfifo(pipe, 0o600), os.WriteFile(yaml, []byte(remoteYAML("http://127.0.0.1:1")), 0o600)); err != nil {
		t.Skipf("no named pipes here: %v", err)
	}
	born := func(p *os.Process) {
		var w *os.File
		awaitThat(t, "the server to read its configuration", func() (ok bool) {
			f, err := os.OpenFile(pipe, os.O_WRONLY|syscall.O_NONBLOCK, 0)
			w = f
			return err == nil
		})
		if err := errors.Join(p.Signal(syscall.SIGHUP), os.Rename(yaml, pipe), w.Close()); err != nil {
			t.Error(err)
		}
	}
	c := childSetup{yaml: "", env: []string{"CONFIG_PATH=" + pipe}, born: born}.start(t)
	c.wantLog("configuration loaded")
}

func TestDrainDelayCountsForTheEnd(t *testing.T) {
	t.Parallel()
	for delay, want := range map[time.Duration]time.Duration{0: 25 * time.Second, 5 * time.Second: 20 * time.Second, time.Minute: 10 * time.Second} {
		if got := (&settings{drainDelay: delay}).drainTime(); got != want {
			t.Errorf("after a delay of %v requests get %v; want %v", delay, got, want)
		}
	}
}

func TestDraining(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	text := noise(1, 1<<20)
	release := o.file("/a", text).etag(`"1"`).stallAt(500_000)
	defer release()
	alone := o.file("/b", text).etag(`"1"`).stallAt(1000)
	defer alone()
	c := childSetup{yaml: remoteYAML(o.url), env: []string{"DRAIN_DELAY=2s"}}.start(t)
	tt := c.tester()
	conn, err := net.Dial("tcp", strings.TrimPrefix(c.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "GET /api/r/a HTTP/1.1\r\nHost: x\r\n\r\n")
	in := bufio.NewReader(conn)
	s, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := readSame(s.Body, text, 0, 500_000); n != 500_000 {
		t.Fatalf("the body is right up to byte %d only", n)
	}
	left := tt.open("/api/r/b") // the client leaves and the fill continues
	left.read(1000)
	left.leave()
	prefetch := tt.start(t.Context(), http.MethodPost, "/cache-artifact", strings.NewReader(`{"remote": "r", "paths": ["b"]}`), "Content-Type: application/json")
	defer prefetch.leave()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	awaitThat(t, "/health to say so while requests are still accepted", func() bool {
		g := tt.get("/health")
		return g.status == 503 && g.has("draining")
	})
	c.wantLog(`"delay":"`) // not a number of nanoseconds
	tt.get("/config").wantStatus(200)
	awaitThat(t, "the end of accepting", func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(c.url, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	if run := prefetch.rest(); run.err == nil || !run.has(`"found"`) { // it does not wait for the upstream
		t.Errorf("a prefetch ended in order: %s", run.text)
	}
	release()
	if n := readSame(s.Body, text, 500_000, len(text)); n != len(text) {
		t.Errorf("a request in flight was right up to %d of %d bytes", n, len(text))
	}
	if _, err := in.ReadByte(); err != io.EOF {
		t.Errorf("the connection: %v, want its end", err)
	}
	alone() // no client is left, only this fill runs
	<-c.exited
	if code := c.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit status %d\n%s", code, c.logs())
	}
	o.troubled(o.resets)
	c = c.again()
	c.tester().get("/api/r/a").wantHit().wantBody(text)
	c.tester().get("/api/r/b").wantHit().wantBody(text) // the fill that ran was finished and stored
}

func TestHeadersOver64KiBAre431(t *testing.T) {
	t.Parallel()
	c := childSetup{yaml: remoteYAML("http://127.0.0.1:1")}.start(t)
	ask := func(n int) int {
		conn, err := net.Dial("tcp", strings.TrimPrefix(c.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: x\r\nX-Long: "+strings.Repeat("x", n)+"\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res.StatusCode
	}
	if status := ask(63 << 10); status != 200 {
		t.Errorf("63 KiB of headers: %d", status)
	}
	if status := ask(64 << 10); status != 431 { // plus the request line
		t.Errorf("more than 64 KiB of headers: %d, want 431", status)
	}
}

func TestTLSFilesAreReadAgain(t *testing.T) {
	t.Parallel()
	first, second := newTLSPair(t), newTLSPair(t)
	dir := t.TempDir()
	write := func(p *tlsPair) {
		for name, data := range map[string][]byte{"cert.pem": p.certPEM, "key.pem": p.keyPEM} {
			if err := os.WriteFile(dir+"/"+name, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(first)
	env := []string{"TLS_CERT_FILE=" + dir + "/cert.pem", "TLS_KEY_FILE=" + dir + "/key.pem"}
	c := childSetup{yaml: remoteYAML("http://127.0.0.1:1"), env: env}.start(t)
	address := strings.TrimPrefix(c.url, "http://")
	trusts := func(p *tlsPair) bool {
		conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: p.pool})
		if err == nil {
			conn.Close()
		}
		return err == nil
	}
	if !trusts(first) || trusts(second) {
		t.Fatal("not the certificate that was given")
	}
	var out, errs bytes.Buffer
	vars := map[string]string{"LISTEN_ADDR": address, "TLS_CERT_FILE": dir + "/cert.pem", "TLS_KEY_FILE": dir + "/key.pem"}
	if code := run(context.Background(), []string{"healthcheck"}, envOf(vars), &out, &errs); code != 0 {
		t.Errorf("healthcheck over TLS: %d %s", code, errs.String())
	}
	write(second)
	if err := c.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	awaitThat(t, "the new certificate", func() bool { return trusts(second) })
	c.wantLog(`"msg":"certificate loaded"`)
	if err := os.WriteFile(dir+"/key.pem", []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	c.wantLog("the new certificate is rejected")
	if !trusts(second) {
		t.Error("the old certificate is no longer in force")
	}
}

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	c := childSetup{yaml: remoteYAML("http://127.0.0.1:1"), env: []string{"DRAIN_DELAY=20s"}}.start(t)
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(c.url, "http://"))
	check := func(address string) int {
		var out, errs bytes.Buffer
		return run(context.Background(), []string{"healthcheck"}, envOf(map[string]string{"LISTEN_ADDR": address}), &out, &errs)
	}
	for _, address := range []string{"127.0.0.1:" + port, "localhost:" + port} {
		if code := check(address); code != 0 {
			t.Errorf("%s: %d", address, code)
		}
	}
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	awaitThat(t, "healthcheck to fail while draining", func() bool { return check("127.0.0.1:"+port) == 1 })
}

// net/http's client logs bytes that an upstream sends after its answer. They may be an
// echo of the request, with credentials.
func TestWhatUpstreamSendsUnaskedIsNotLogged(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	closed := make(chan struct{})
	o.troubled(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbodyHTTP/1.1 200 OK\r\nX-Echo: SECRET\r\n\r\n")
		_, _ = conn.Read(make([]byte, 1)) // until the client has closed the connection
		conn.Close()
		close(closed)
	})
	c := childSetup{yaml: remoteYAML(o.url)}.start(t)
	c.tester().get("/api/r/a").wantStatus(200).wantBody("body")
	<-closed
	if code := c.stop(); code != 0 || strings.Contains(c.logs(), "SECRET") {
		t.Errorf("exit status %d, log:\n%s", code, c.logs())
	}
}

func TestProxyForUpstreams(t *testing.T) {
	t.Parallel()
	proxy, direct := newTestOrigin(t, setup{}), newTestOrigin(t, setup{})
	proxy.file("http://files.example/a", "through the proxy")
	direct.file("/a", "directly")
	here := strings.Replace(direct.url, "127.0.0.1", "0.0.0.0", 1) // an address of this machine that net/http does not take for loopback
	yaml := remoteYAML("http://files.example") + "  direct: {base_url: '" + here + "'}\n  tls: {base_url: 'https://tls.example'}\n"
	c := childSetup{yaml: yaml, env: []string{"HTTP_PROXY=" + proxy.url, "HTTPS_PROXY=" + proxy.url, "NO_PROXY=0.0.0.0"}}.start(t)
	c.tester().get("/api/r/a").wantMiss().wantBody("through the proxy")
	c.tester().get("/api/direct/a").wantMiss().wantBody("directly")
	c.tester().get("/api/tls/a").wantDetail(502, "unreachable") // the proxy refuses CONNECT
	want := "[GET http://files.example/a" + strings.Repeat(" CONNECT tls.example:443", 3) + "]"
	if got := fmt.Sprint(proxy.all()); got != want {
		t.Errorf("the proxy was asked %s, want %s", got, want)
	}
}

func TestSSLCertFile(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{tls: true})
	o.file("/a", "trusted")
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/ca.pem", o.tls.certPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	c := childSetup{yaml: remoteYAML(o.url), env: []string{"SSL_CERT_FILE=" + dir + "/ca.pem"}}.start(t)
	c.tester().get("/api/r/a").wantMiss().wantBody("trusted")
	c = childSetup{yaml: remoteYAML(o.url), env: []string{"SSL_CERT_FILE=/dev/null"}}.start(t)
	c.tester().get("/api/r/a").wantDetail(502, "unreachable")
}

func TestUnwritableDataDirIsDegradedAndServes(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	text := noise(1, 300_000)
	o.file("/a", text).etag(`"1"`)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/data", nil, 0o600); err != nil { // a file instead of a directory stops root, too
		t.Fatal(err)
	}
	c := childSetup{yaml: remoteYAML(o.url), dir: dir}.start(t)
	tt := c.tester()
	tt.get("/api/r/a").wantStatus(200).wantBody(text)
	tt.get("/api/r/a", "Range: bytes=5-9").wantStatus(206).wantBody(text[5:10])
	awaitThat(t, "/health to say so", func() bool { return tt.get("/health").has(`"degraded"`) })
	c.wantLog("backend is down")
	before := o.requests("/a")
	tt.get("/api/r/a").wantUnstored().wantBody(text)
	if n := o.requests("/a") - before; n != 1 {
		t.Errorf("a file that cannot be stored took %d requests", n)
	}
	if err := os.Remove(dir + "/data"); err != nil {
		t.Fatal(err)
	}
	awaitThat(t, "it to recover without a restart", func() bool { return tt.get("/health").has(`"healthy"`) })
	tt.get("/api/r/a").wantMiss().wantBody(text)
	awaitThat(t, "a hit", func() bool { return tt.get("/api/r/a").header.Get("X-Artifact-Source") == "cache" })
	if n := strings.Count(c.logs(), `"ERROR"`); n != 1 {
		t.Errorf("the log tells of DATA_DIR %d times:\n%s", n, c.logs())
	}
}

// What was not checked yet, and what is full, may store a file.
func TestStorageThatIsKnownToBeDown(t *testing.T) {
	t.Parallel()
	var found, seen error
	b := &backend{name: "storage", okWord: "ok", ping: func(context.Context) error { return found }, seenDown: func() error { return seen }}
	st := &stores{backends: []*backend{b}}
	s := &server{log: newLogger(new(settings), io.Discard), stores: st, cache: &cache{metrics: newMetrics()}}
	want := func(what string, down bool) {
		t.Helper()
		if st.storageIsDown() != down {
			t.Errorf("%s: down is %t", what, !down)
		}
	}
	want("not checked yet", false)
	seen = errStoreDown
	want("a request found it down", true)
	seen = nil
	for _, c := range []struct {
		found error
		down  bool
	}{{errStoreDown, true}, {errNoSpace, false}, {nil, false}} {
		found = c.found
		s.checkBackend(b)
		want(fmt.Sprint(c.found), c.down)
	}
}

// Files on disk would be forgotten, and fill it, when S3 is configured.
func TestEarlierDiskStoreIsReported(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	for _, path := range []string{"/a", "/b"} {
		tt.origin.file(path, "text")
		tt.get("/api/r" + path).wantStatus(200)
	}
	tt.settle()
	for dir, want := range map[string]string{tt.disk.dir: `"files":2`, t.TempDir(): "", t.TempDir() + "/none": ""} {
		logs := &testLogs{}
		set, err := parseSettings(envOf(map[string]string{"DATA_DIR": dir, "MINIO_ENDPOINT": "127.0.0.1:9", "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b", "MINIO_BUCKET": "ccc"}))
		must(t, err)
		st := openStores(set, time.Now, newLogger(set, logs))
		for _, b := range st.backends {
			for _, task := range b.tasks {
				if task.doing == "looking for an earlier store" {
					must(t, task.step(t.Context()))
				}
			}
		}
		must(t, st.Close())
		lines := logs.lines("export")
		if (want == "") != (len(lines) == 0) || want != "" && (!strings.Contains(lines[0], want) || !strings.Contains(lines[0], "import") || !strings.Contains(lines[0], "ERROR")) {
			t.Errorf("%s: %q, want %s", dir, lines, want)
		}
	}
}

// An operator who reads that DATA_DIR failed too looks at the wrong disk.
func TestHangingS3IsNotBlamedOnDataDir(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0") // it accepts, and nobody answers
	must(t, err)
	set, err := parseSettings(envOf(map[string]string{"DATA_DIR": t.TempDir(), "MINIO_ENDPOINT": l.Addr().String(), "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b", "MINIO_BUCKET": "ccc"}))
	must(t, err)
	st := openStores(set, time.Now, slog.New(slog.DiscardHandler))
	ctx, leave := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer leave()
	for _, b := range st.backends {
		if b.name != "storage" {
			continue
		}
		if err := b.ping(ctx); !errors.Is(err, errStoreDown) || strings.Contains(err.Error(), "DATA_DIR") {
			t.Errorf("S3 that hangs: %v", err)
		}
	}
	l.Close() // which ends the check that is still waiting
	must(t, st.Close())
}

// Without S3 nothing looks at hot copies any more.
func TestHotCopiesGoWithS3(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must(t, os.MkdirAll(dir+"/.hot/r", 0o755))
	must(t, os.WriteFile(dir+"/.hot/r/f", nil, 0o600))
	set, err := parseSettings(envOf(map[string]string{"DATA_DIR": dir}))
	must(t, err)
	st := openStores(set, time.Now, slog.New(slog.DiscardHandler))
	for _, b := range st.backends {
		for _, task := range b.tasks {
			must(t, task.step(t.Context()))
		}
	}
	must(t, st.Close())
	if _, err := os.Stat(dir + "/.hot"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("they stay: %v", err)
	}
}

func TestMinFreeIsLeftAlone(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	o.file("/a", "body")
	c := childSetup{yaml: remoteYAML(o.url), env: []string{"MIN_FREE=100000TiB"}}.start(t)
	for range 2 {
		c.tester().get("/api/r/a").wantUnstored().wantBody("body")
	}
	c.wantLog("MIN_FREE")
}

func TestSecondServerOnTheSameDataDir(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	release := o.file("/a", noise(1, 100_000)).stallAt(50_000)
	defer release()
	first := childSetup{yaml: remoteYAML(o.url)}.start(t)
	s := first.tester().open("/api/r/a")
	defer s.leave()
	s.read(50_000)
	var spools []string
	awaitThat(t, "its spool to be alone", func() bool { // the checks for /health make files there, too
		spools, _ = filepath.Glob(first.dir + "/data/.spool/*")
		return len(spools) == 1
	})
	second := childSetup{yaml: remoteYAML(o.url), dir: first.dir}.start(t)
	second.wantLog("another process uses DATA_DIR")
	if _, err := os.Stat(spools[0]); err != nil {
		t.Errorf("the first server's spool: %v", err)
	}
	release()
	s.rest().wantBody(noise(1, 100_000))
	awaitThat(t, "one to see what the other has stored", func() bool {
		return second.tester().get("/api/r/a").header.Get("X-Artifact-Source") == "cache"
	})
}

func TestHealthWaitsForNothingThatHangs(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	o.troubled(o.stalls)
	c := childSetup{yaml: remoteYAML(o.url)}.start(t)
	tt := c.tester()
	ctx, leave := context.WithCancel(context.Background())
	var hanging sync.WaitGroup
	for i := range maxPerRemote + 5 {
		hanging.Go(func() { tt.start(ctx, "GET", fmt.Sprintf("/api/r/f%d", i), nil).leave() })
	}
	awaitThat(t, "every place to be taken", func() bool { return len(o.all()) == maxPerRemote })
	mustEnd(t, func() { tt.get("/health").wantStatus(200) })
	leave()
	hanging.Wait()
}

// The first request finds a bucket that is made at the start, and /health what is up.
func TestBackendsAreCheckedBeforeTheFirstRequest(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s := newBubbleTester(t).server
		answers := func(context.Context) error { time.Sleep(checkTimeout / 2); return nil }
		hangs := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		s.stores.backends = []*backend{{name: "storage", okWord: "ok", ping: answers}, {name: "database", okWord: "ok", ping: hangs}}
		ctx, stop := context.WithCancel(t.Context())
		var loops sync.WaitGroup
		began := time.Now()
		s.startLoops(ctx, &loops)
		h := s.reportHealth()
		if took := time.Since(began); took != checkTimeout || h.Backends["storage"] != "ok" || h.Backends["database"] != "down" {
			t.Errorf("after %v health is %v", took, h.Backends)
		}
		stop()
		loops.Wait()
	})
}

// The end of whatever reads the log (a pipe to another program) ends nothing.
func TestServerOutlivesTheReaderOfItsLog(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/remotes.yaml", []byte("remotes: {own: {type: local}}"), 0o600))
	r, w, err := os.Pipe()
	must(t, err)
	cmd := exec.Command(os.Args[0])
	cmd.Stderr = w
	cmd.Env = []string{childMark + "=1", "CONFIG_PATH=" + dir + "/remotes.yaml", "DATA_DIR=" + dir + "/data", "LISTEN_ADDR=127.0.0.1:0",
		"LOG_FORMAT=json", "GORACE=" + os.Getenv("GORACE")}
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	w.Close()
	var said struct{ Address string }
	for lines := bufio.NewScanner(r); said.Address == "" && lines.Scan(); {
		_ = json.Unmarshal(lines.Bytes(), &said)
	}
	r.Close()
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	for range 3 { // each is a log line
		res, err := client.Get("http://" + said.Address + "/api/own/none")
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusNotFound {
			t.Errorf("status %d", res.StatusCode)
		}
	}
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	if err := cmd.Wait(); err != nil {
		t.Errorf("the end: %v", err)
	}
}

// A generic remote without mutable_patterns keeps what it has stored: that is told
// before anyone wonders where the new versions are.
func TestRemotesThatAreNeverLookedAtAgainAreNamed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	text := "remotes:\n  pinned: {base_url: 'http://a'}\n  watched: {base_url: 'http://a', mutable_patterns: ['x$']}\n" +
		"  aging: {base_url: 'http://a', cache: {immutable_ttl: 60}}\n  rpms: {base_url: 'http://a', package: rpm}\n  own: {type: local}\n"
	must(t, os.WriteFile(dir+"/remotes.yaml", []byte(text), 0o600))
	var out strings.Builder
	env := envOf(map[string]string{"CONFIG_PATH": dir + "/remotes.yaml"})
	if code := run(t.Context(), []string{"check"}, env, &out, &out); code != 0 || strings.Count(out.String(), "warning") != 1 || !strings.Contains(out.String(), `remote "pinned": it has no mutable_patterns`) {
		t.Errorf("check: exit status %d, %s", code, &out)
	}
	tt := newTester(t, "mutable_patterns: [x]")
	tt.server.useConfig(mustParse(t, text))
	if lines := tt.logs.lines("mutable_patterns"); len(lines) != 1 || !strings.Contains(lines[0], "pinned") {
		t.Errorf("the log has %q", lines)
	}
}

// A command that root runs leaves nothing in DATA_DIR that its owner, who runs the server,
// could not read.
func TestCommandsOfRootAreTheOwners(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can become somebody else")
	}
	const owner = 65532
	dir := t.TempDir()
	must(t, os.Chmod(filepath.Dir(dir), 0o755))
	must(t, os.WriteFile(dir+"/remotes.yaml", []byte("remotes: {own: {type: local}}"), 0o644))
	must(t, os.Mkdir(dir+"/data", 0o700))
	must(t, os.Chown(dir+"/data", owner, owner))
	d := newDiskStore(dir+"/data", time.Now, slog.New(slog.DiscardHandler))
	must(t, d.put(t.Context(), testKey("f"), testRecord("f", "content"), strings.NewReader("content"), putCondition{}))
	must(t, filepath.WalkDir(d.dir, func(name string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chown(name, owner, owner))
	}))
	must(t, os.Chtimes(d.pathOf(testKey("f")), testDay, testDay)) // as a restored backup has it: verify writes its record anew
	for _, command := range []string{"verify", "reindex", "have"} {
		cmd := exec.Command(os.Args[0], command)
		cmd.Env = []string{childMark + "=1", "CONFIG_PATH=" + dir + "/remotes.yaml", "DATA_DIR=" + d.dir, "GORACE=" + os.Getenv("GORACE")}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
	}
	must(t, filepath.WalkDir(d.dir, func(name string, _ fs.DirEntry, err error) error {
		fi, statErr := os.Stat(name)
		if err = errors.Join(err, statErr); err == nil && fi.Sys().(*syscall.Stat_t).Uid != owner {
			t.Errorf("%s is root's", name)
		}
		return err
	}))
}
