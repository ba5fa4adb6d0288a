package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"html"
	"regexp"
	"strings"
	"testing"
	"time"
)

const browser = "Accept: text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"

// The policy of the page names its own style and script by their hashes, and allows
// nothing else: what an upstream could smuggle in would not run.
func TestPageRunsItsOwnScriptOnly(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `description: "<img src=x onerror=alert(1)>"`)
	tt.origin.file("/%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E", "body")
	tt.get("/api/r/%3Cimg%20src=x%20onerror=alert(1)%3E").wantStatus(200)
	for _, path := range []string{"/", "/?remote=r", "/?remote=r&search=%3Cscript%3E"} {
		g := tt.get(path, browser).wantStatus(200)
		policy := g.header.Get("Content-Security-Policy")
		for _, directive := range []string{"default-src 'none'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"} {
			if !strings.Contains(policy, directive) {
				t.Errorf("%s: the policy lacks %s: %s", path, directive, policy)
			}
		}
		for tag, directive := range map[string]string{"style": "style-src", "script": "script-src"} {
			found := regexp.MustCompile(`(?s)<`+tag+`>(.*?)</`+tag+`>`).FindAllStringSubmatch(g.text, -1)
			if len(found) != 1 {
				t.Fatalf("%s: %d elements %s", path, len(found), tag)
			}
			sum := sha256.Sum256([]byte(found[0][1]))
			if want := directive + " 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"; !strings.Contains(policy, want) {
				t.Errorf("%s: the policy lacks %s: %s", path, want, policy)
			}
		}
		if strings.Contains(g.text, "<img") || strings.Contains(g.text, "alert(1)<") || strings.Contains(g.text, " style=") || strings.Contains(g.text, " onclick=") {
			t.Errorf("%s: text of others is not escaped, or the page has what its policy forbids", path)
		}
		if len(g.text) > 60<<10 {
			t.Errorf("%s has %d bytes", path, len(g.text))
		}
	}
}

// A remote's page has what an operator looks for: files with their state, the settings of
// clients for the address that he came by, whether the upstream answers.
func TestPageOfARemote(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "package: rpm", `mutable_patterns: ['\.idx$']`)
	for i := range rowsOnPage + 1 {
		tt.origin.file(fmt.Sprintf("/pool/f%03d.rpm", i), "body")
		tt.get(fmt.Sprintf("/api/r/pool/f%03d.rpm", i)).wantStatus(200)
	}
	tt.origin.file("/a.idx", "body")
	tt.get("/api/r/a.idx").wantStatus(200)
	tt.get("/api/r/a.idx").wantHit()
	tt.advance(90 * time.Minute)
	wantText := func(g *got, parts ...string) *got {
		t.Helper()
		for _, p := range parts {
			if !strings.Contains(g.text, p) {
				t.Errorf("the page lacks %q: %s", p, regexp.MustCompile(`(?s)<style>.*?</style>|<script>.*</script>`).ReplaceAllString(g.text, ""))
			}
		}
		return g
	}
	g := wantText(tt.get("/?remote=r", browser, "X-Forwarded-Proto: https"),
		"82 files of", "baseurl=https://127.0.0.1:", "a.idx", "expired 30 min ago", "for ever", "f078.rpm", "1 h ago", ">1 %<")
	if strings.Contains(g.text, "f079.rpm") {
		t.Errorf("there are more than %d files", rowsOnPage)
	}
	next := regexp.MustCompile(`<a href="(\?[^"]*after=[^"]*)">More`).FindStringSubmatch(g.text)
	if next == nil {
		t.Fatal("no link to more files")
	}
	wantText(tt.get("/"+strings.ReplaceAll(next[1], "&amp;", "&"), browser), "f079.rpm", "f080.rpm")
	wantText(tt.get("/?remote=r&search=F07", browser), "f070.rpm", "f079.rpm")
	wantText(tt.get("/?remote=r&search=nothing", browser), "Nothing is stored that has")
	wantText(tt.get("/?remote=r&search=%ff", browser).wantStatus(200), "not a valid regular expression")
	wantText(tt.get("/?remote=r&search="+strings.Repeat("x", 600), browser).wantStatus(200), "more than 512 bytes")
	wantText(tt.get("/?remote=r&prefix=pool/f08", browser), "f080.rpm")
	tt.get("/?remote=none", browser).wantDetail(404, "none")
	tt.down()
	tt.get("/api/r/new").wantStatus(502)
	wantText(tt.get("/", browser), "down for", "upstream unreachable")
}

// However many remotes and files there are and however long their names, a page stays
// short, and its links lead to all of them.
func TestPageStaysShort(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "package: docker")
	digest := strings.Repeat("0123456789abcdef", 4)
	wordy := "remotes:\n"
	for i := range 300 {
		wordy += fmt.Sprintf("  r%03d: {base_url: '%s/%d', description: '%s'}\n", i, tt.origin.url, i, strings.Repeat("d", 60))
	}
	for name, path := range map[string]func(int) string{
		"r": func(i int) string {
			return fmt.Sprintf("rancher/mirrored-cluster-api-controller/manifests/sha256:%s%04d", digest[4:], i)
		},
		"r007": func(i int) string { return fmt.Sprintf("%s/%04d", strings.Repeat("%C3%A4", 160), i) },
	} {
		for i := range 10_000 {
			row := indexRow{Key: fmt.Sprintf("%s/%016x/f", name, i), Remote: name, Path: path(i), Class: immutable, Size: 1234, SHA256: digest, Fetched: tt.clock.now()}
			if err := tt.cache.index.saveRow(t.Context(), row); err != nil {
				t.Fatal(err)
			}
		}
	}
	walk := func(at, row string, most int) (rows int) {
		for pages := 1; ; pages++ {
			g := tt.get("/?"+at, browser).wantStatus(200)
			if len(g.text) >= 60_000 || pages > 500 {
				t.Fatalf("page %d, ?%s, has %d bytes", pages, at, len(g.text))
			}
			rows += strings.Count(g.text, row)
			next := regexp.MustCompile(`<a href="\?([^"]*)">More`).FindStringSubmatch(g.text)
			if next == nil || rows >= most {
				return rows
			}
			at = strings.ReplaceAll(next[1], "&amp;", "&")
		}
	}
	if rows := walk("remote=r", `<th scope="row"`, 10_000); rows != 10_000 {
		t.Errorf("%d files", rows)
	}
	tt.configure(wordy)
	if rows := walk("remote=r007", `<th scope="row"`, 200); rows < 200 {
		t.Errorf("%d files with long names", rows)
	}
	for step := range trendLength { // a plot is the largest part of a row
		for i := range 300 {
			for range 1 + step%7 {
				tt.api.metrics.countRequest(fmt.Sprintf("r%03d", i), "miss", 200, 1, 0, 0)
			}
		}
		tt.api.metrics.sampleTrend()
	}
	if rows := walk("", `<th scope="row"`, 1000); rows != 300 {
		t.Errorf("%d remotes", rows)
	}
	if rows := walk("search=R29", `<th scope="row"`, 1000); rows != 10 {
		t.Errorf("%d remotes found", rows)
	}
	if g := tt.get("/?search=%3Cnone%3E", browser).wantStatus(200); !g.has("There is no remote that has “&lt;none&gt;” in its name") {
		t.Errorf("an overview without remotes: %s", g.text)
	}
}

// A running prefetch is on the page, with how far it is.
func TestPageShowsRunningPrefetches(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "body")
	release := tt.origin.file("/b", noise(1, 100_000)).stallAt(50_000)
	defer release()
	for _, body := range []string{`{"remote": "r", "paths": ["a", "b", "none"]}`, `{"urls": ["` + tt.origin.url + `/b"]}`} {
		done := make(chan *runAnswer)
		go func() { done <- tt.prefetch(body) }()
		defer func() { <-done }()
	}
	defer release()
	for _, part := range []string{`<a href="?remote=r">r</a>: <progress aria-label="Files done" max="3" value="2"></progress> 2 of 3 files, <span class="bad">1 failed</span>`, `several remotes: <progress aria-label="Files done" max="1" value="0">`} {
		tt.eventually("the page to have "+part, func() bool { return tt.get("/", browser).has(part) })
	}
}

// deadIndex answers no question.
type deadIndex struct{ index }

func (deadIndex) totals(context.Context, bool) (map[string]remoteTotal, error) {
	return nil, errStoreDown
}

func (deadIndex) listPage(context.Context, pageQuery) (indexPage, error) {
	return indexPage{}, errStoreDown
}

func TestOverviewWithoutTheIndex(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.cache.index = deadIndex{tt.cache.index}
	if g := tt.get("/").wantStatus(200); !strings.Contains(g.text, `"artifacts": null`) || !strings.Contains(g.text, `"bytes": null`) {
		t.Errorf("what is not known is not null: %s", g.text)
	}
	if g := tt.get("/", browser).wantStatus(200); !g.has(`<p class="big">?</p>`) || !g.has(`data-label="Files">?</td>`) {
		t.Errorf("what is not known is not ?: %s", g.text)
	}
	if g := tt.get("/?remote=r", browser).wantStatus(200); !strings.Contains(g.text, "cannot be used right now") {
		t.Errorf("the page does not say that the index is away:\n%s", g.text)
	}
}

func TestPageWritesNumbersForPeople(t *testing.T) {
	t.Parallel()
	n := int64(1234567)
	for got, want := range map[string]string{
		formatBytes(0): "0 B", formatBytes(1023): "1023 B", formatBytes(n): "1.2 MiB", formatBytes(5 << 40): "5 TiB",
		formatCount(999): "999", formatCount(n): "1\u2009234\u2009567", formatCount(12): "12",
		formatSpan(-time.Second): "0 s", formatSpan(59 * time.Second): "59 s", formatSpan(90 * time.Minute): "1 h", formatSpan(49 * time.Hour): "2 d",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// The plot has a step for each sample: what happened in it, not since the start.
func TestTrendIsByStep(t *testing.T) {
	t.Parallel()
	m := newMetrics()
	if v := (&pageRemote{}); true {
		v.setPlot(m.trendOf("r"))
		if v.PlotAll != "" {
			t.Error("a plot of nothing")
		}
	}
	for step := range trendLength + 3 {
		for range step {
			m.countRequest("r", "hit", 200, 10, 0, 0)
		}
		m.countRequest("r", "miss", 200, 10, 0, 0)
		m.sampleTrend()
	}
	m.countRequest("r", "stale", 200, 10, 0, 0)
	steps := m.trendOf("r")
	last, before := steps[trendLength-1], steps[trendLength-2]
	if len(steps) != trendLength || last != (remoteUsage{1, 0, 10}) || before != (remoteUsage{trendLength + 2, 1, 10 * (trendLength + 2)}) {
		t.Errorf("%d steps that end in %v, %v", len(steps), before, last)
	}
	var v pageRemote
	v.setPlot([]remoteUsage{{}, {}, {}, {hits: 3}, {hits: 3}, {misses: 1}})
	if want := "M0 20V20H3V0H5V20H6V20Z"; v.PlotHits != want {
		t.Errorf("the plot is %s, want %s", v.PlotHits, want)
	}
	v.setPlot(steps[trendLength-2:])
	if want := "M0 20V0H1V19.7H2V20Z"; v.PlotAll != want {
		t.Errorf("the plot is %s, want %s", v.PlotAll, want)
	}
}

// Once there is a remote for them, links lead past the cache no more.
func TestPageNamesTheRemoteToAdd(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "package: helm")
	tt.origin.file("/index.yaml", "urls:\n- https://charts.example/a\n- https://charts.example/b\n- https://other.example/c\n")
	advice := func() string {
		t.Helper()
		tt.get("/api/r/index.yaml").wantStatus(200)
		_, text, _ := strings.Cut(tt.get("/?remote=r", browser).wantStatus(200).text, "Links that lead past")
		text, _, _ = strings.Cut(text, "</section>")
		return html.UnescapeString(text)
	}
	if text := advice(); !strings.Contains(text, "2 links to <code>charts.example</code>") || !strings.Contains(text, "1 links to <code>other.example</code>") {
		t.Errorf("before: %s", text)
	}
	tt.configure("remotes:\n  r: {base_url: '" + tt.origin.url + "', package: helm}\n  charts: {base_url: 'https://charts.example'}\n")
	if text := advice(); strings.Contains(text, "charts.example") || !strings.Contains(text, "1 links to <code>other.example</code>") {
		t.Errorf("with a remote for them: %s", text)
	}
}

// Settings name our address as the client knows it, and what is for plain HTTP only
// there.
func TestClientSettings(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.configure("remotes:\n  hub: {base_url: 'https://registry-1.docker.io', package: docker}\n  quay: {base_url: 'https://quay.io', package: docker}\n  a: {base_url: 'http://x', package: alpine}\n")
	all := func(name, scheme string) string {
		g := tt.get("/?remote="+name, browser, "X-Forwarded-Proto: "+scheme).wantStatus(200)
		_, text, _ := strings.Cut(g.text, "Client settings")
		text, _, _ = strings.Cut(text, "</section>")
		return strings.ReplaceAll(html.UnescapeString(text), strings.TrimPrefix(tt.url, "http://"), "cache:8000")
	}
	plain, secure := all("hub", "http"), all("hub", "https")
	for _, want := range []string{"certs.d/docker.io/hosts.toml", `[host."http://cache:8000/hub"]`, `"^(.*)$": "hub/$1"`, "{\n  \"insecure-registries\": [\"cache:8000\"],\n", `location = "cache:8000/hub"`, "insecure = true<"} {
		if !strings.Contains(plain, want) {
			t.Errorf("no %q in\n%s", want, plain)
		}
	}
	if strings.Contains(secure, "insecure") || strings.Contains(plain, "curl") || !strings.Contains(secure, "{\n  \"registry-mirrors\": [\"https://cache:8000/hub\"]\n}") {
		t.Errorf("over TLS:\n%s", secure)
	}
	for _, scheme := range []string{"http", "https"} { // Docker would ask it for docker.io's images
		if text := all("quay", scheme); strings.Contains(text, "registry-mirrors") || !strings.Contains(text, "docker pull cache:8000/quay/") ||
			strings.Contains(text, "{\n  \"insecure-registries\": [\"cache:8000\"]\n}") != (scheme == "http") {
			t.Errorf("of another registry over %s:\n%s", scheme, text)
		}
	}
	if text := all("a", "http"); !strings.Contains(text, "http://cache:8000/api/a/v3") || !strings.Contains(text, "curl -fLO http://cache:8000/api/a/PATH") {
		t.Errorf("alpine:\n%s", text)
	}
	cfg, err := parseConfig("remotes.yaml", []byte("remotes:\n  hub: {base_url: 'https://x', package: docker, registry: '${REG}:5000'}\n"), func(string) (string, bool) { return "inside.example", true })
	must(t, err)
	tt.server.useConfig(cfg)
	if text := all("hub", "https"); strings.Contains(text, "inside.example") || !strings.Contains(text, "/***:5000/") {
		t.Errorf("what came from the environment is shown: %v", text)
	}
	for name := range packageTypes {
		tt.configure("remotes:\n  a: {base_url: 'http://x', package: " + name + "}\n")
		if text := all("a", "https"); strings.Count(text, "<details open>") != 1 {
			t.Errorf("of %s none is shown, or several:\n%s", name, text)
		}
	}
}
