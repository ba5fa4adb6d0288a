package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// prefetched answers of the tests: the events of a run.
type runAnswer struct {
	*got
	events []prefetchEvent
}

// prefetch starts a run and reads all its events. A body that begins with { is JSON.
func (tt *tester) prefetch(body string, headers ...string) *runAnswer {
	tt.Helper()
	contentType := "Content-Type: text/plain; charset=utf-8"
	if strings.HasPrefix(body, `{"`) {
		contentType = "Content-Type: application/json"
	}
	a := &runAnswer{got: tt.send(http.MethodPost, "/cache-artifact", strings.NewReader(body), append(headers, contentType)...)}
	if a.status != http.StatusOK {
		return a
	}
	for d := json.NewDecoder(strings.NewReader(a.text)); ; {
		var e prefetchEvent
		if err := d.Decode(&e); err == io.EOF {
			return a
		} else if err != nil {
			tt.Fatalf("%q: %v", a.text, err)
		}
		a.events = append(a.events, e)
	}
}

// of returns what the events of one name say, sorted: remote/path, and a status.
func (a *runAnswer) of(event string) (l []string) {
	for _, e := range a.events {
		if e.Event == event {
			s := e.Remote + "/" + e.Path
			if e.Status != 0 {
				s += fmt.Sprintf(" %d", e.Status)
			}
			l = append(l, s)
		}
	}
	slices.Sort(l)
	return l
}

func (a *runAnswer) wants(event string, want ...string) *runAnswer {
	a.Helper()
	slices.Sort(want)
	if l := a.of(event); a.wantStatus(http.StatusOK) != nil && !slices.Equal(l, want) {
		a.Errorf("%s: %s %q, want %q; all: %s", a.what, event, l, want, a.text)
	}
	return a
}

// wantSum wants these numbers in the summary, which is the last event.
func (a *runAnswer) wantSum(found, fetched, cached, failed int64) *runAnswer {
	a.Helper()
	if len(a.events) == 0 {
		a.Fatalf("no events: %d %s", a.status, a.text)
	}
	s := a.events[len(a.events)-1]
	if s.Event != "summary" || s.Found != found || s.Fetched != fetched || s.Cached != cached || s.Failed != failed {
		a.Errorf("summary %+v, want found %d, fetched %d, cached %d, failed %d; all: %s", s, found, fetched, cached, failed, a.text)
	}
	return a
}

func TestPrefetchIsRefused(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: "remotes:\n  r: {base_url: ORIGIN}\n  hub: {base_url: ORIGIN, package: docker}\n  own: {type: local}\n"}.start(t)
	tt.origin.file("/a", "a")
	for _, c := range []struct {
		body   string
		status int
		detail string
	}{
		{`{"remote": "none", "pattern": "."}`, 404, "none"},
		{`{"paths": ["a"]}`, 400, "remote"},
		{`{"remote": "own", "pattern": "."}`, 400, "local"},
		{`{"remote": "r"}`, 400, "exactly one"},
		{`{"remote": "r", "pattern": ".", "paths": ["a"]}`, 400, "exactly one"},
		{`{"remote": "r", "pattern": "a", "include_pattern": "a"}`, 400, "exactly one"},
		{`{"remote": "r", "pattern": "("}`, 400, "pattern"},
		{`{"remote": "r", "pattern": "(?!x)"}`, 400, "pattern"},
		{`{"remote": "r", "paths": "a"}`, 400, "paths"},
		{`{"remote": "r", "path": ["a"]}`, 400, "path"},
		{`{"remote": "r", "paths": ["a"], "prefix": "x"}`, 400, "prefix"},
		{`{"remote": "r", "pattern": ".", "prefix": "../x"}`, 400, "prefix"},
		{`{"remote": "r", "images": ["a:1"]}`, 400, "images"},
		{`{"remote": "r", "pattern": ".", "platforms": ["linux/amd64"]}`, 400, "platforms"},
		{`{"remote": "hub", "images": ["a:1"], "platforms": ["amd64"]}`, 400, "platforms"},
		{`{"remote": "hub", "images": ["a:1"], "platforms": ["linux/"]}`, 400, "platforms"},
		{`{"remote": "hub", "pattern": "."}`, 400, "images"},
		{`{"remote": "r", "urls": ["http://x/"]}`, 400, "urls"},
		{`{"remote": "r", "paths": ["a"`, 400, "JSON"},
		{`{"remote": "r", "paths": ["a"]} {}`, 400, "one JSON object"},
	} {
		tt.prefetch(c.body).wantDetail(c.status, c.detail)
	}
	for _, query := range []string{"dry_run=perhaps", "dry_run", "dry_run=true;x"} { // nothing is fetched by mistake
		tt.send(http.MethodPost, "/cache-artifact?"+query, strings.NewReader("x"), "Content-Type: text/plain").wantDetail(400, "dry_run")
	}
	tt.send(http.MethodPost, "/cache-artifact", strings.NewReader(`["a"]`), "Content-Type: application/json").wantDetail(400, "the body")
	for _, contentType := range []string{"text/html", "application/x-www-form-urlencoded", ";"} {
		tt.send(http.MethodPost, "/cache-artifact", strings.NewReader("x"), "Content-Type: "+contentType).wantDetail(415, "application/json")
	}
	tt.get("/cache-artifact").wantDetail(405, "GET").wantHeader("Allow", "POST")
	if n := len(tt.origin.all()); n > 0 {
		t.Errorf("the upstream was asked: %q", tt.origin.all())
	}
	if n := len(tt.api.runs.runs); n > 0 {
		t.Errorf("%d refused requests still count as runs", n)
	}
}

func TestPrefetchNeedsTheTokenOnceThereIsOne(t *testing.T) {
	t.Parallel()
	tt := setup{env: map[string]string{"API_TOKEN": "sesame"}}.start(t)
	tt.origin.file("/a", "a")
	tt.prefetch(`{"remote": "r", "paths": ["a"]}`).wantDetail(401, "token")
	tt.prefetch(`{"remote": "r", "paths": ["a"]}`, "Authorization: Bearer wrong").wantDetail(401, "token")
	tt.prefetch(`{"remote": "r", "paths": ["a"]}`, "Authorization: Bearer sesame").wants("done", "r/a")
	tt.prefetch(`{"remote": "r", "paths": ["a"]}`, "Authorization: Bearer sesame", "Sec-Fetch-Site: cross-site").wantDetail(403, "another site")
}

func TestPrefetchOfPaths(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `immutable_patterns: ['^ok/']`)
	tt.origin.file(spelled("ok/a b+c"), "spaced")
	tt.origin.file("/ok/two", "2")
	tt.origin.file("/no", "refused")
	body := `{"remote": "r", "paths": ["ok/a b+c", "/ok/two", "ok/two", "no", "../up", "ok/gone", ""]}`
	tt.prefetch(body).wants("found", "r/ok/a b+c", "r/ok/two", "r/ok/gone").wants("done", "r/ok/a b+c", "r/ok/two").
		wants("failed", "r/no 403", "r/../up 400", "r/ok/gone 404", "r/ 400").wantSum(3, 2, 0, 4)
	tt.origin.forget()
	tt.get("/api/r/ok/a%20b+c").wantHit().wantBody("spaced")
	tt.prefetch(body).wantSum(3, 0, 2, 4)
	if n := tt.origin.requests("GET /no") + tt.origin.requests("GET /ok/two"); n > 0 {
		t.Errorf("asked again: %q", tt.origin.all())
	}
}

func TestPrefetchSummaryAlone(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "12345")
	g := tt.prefetch(`{"remote": "r", "paths": ["a", "b"]}`, "Accept: application/json").wantHeader("Content-Type", "application/json")
	var s summaryEvent
	if err := json.Unmarshal([]byte(g.text), &s); err != nil || s.Found != 2 || s.Fetched != 1 || s.Failed != 1 || s.Bytes != 5 || s.DryRun {
		t.Errorf("%v: %s", err, g.text)
	}
}

// A file that a stored root names is stored by its content.
func TestPrefetchOfMetadata(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	a.publish(map[string]string{"main/binary-amd64/Packages": "Package: x\n"})
	body := `{"remote": "r", "paths": ["dists/t/main/binary-amd64/Packages", "dists/t/InRelease"]}`
	a.getRoot().wantStatus(200)
	a.prefetch(body).wants("failed")
	a.prefetch(body).wants("failed").wantSum(2, 0, 2, 0)
}

// What a root names is fetched behind it, in the way in which clients are answered then.
func TestPrefetchFetchesRootsFirst(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t, "package: rpm")
		files := rpmFiles("one")
		root := repomdOf(&testArchive{files: files})
		files["repodata/repomd.xml"], files["repodata/repomd.xml.asc"] = root, "signature"
		for name, text := range files {
			tt.origin.file("/"+name, "").acts(func(w http.ResponseWriter, _ *http.Request) {
				time.Sleep(time.Duration(2+strings.Compare("repodata/o", name)) * time.Second) // what comes before the root takes longer
				_, _ = io.WriteString(w, text)
			})
		}
		body, _ := json.Marshal(prefetchRequest{Remote: "r", Paths: sortedKeys(files)})
		tt.prefetch(string(body)).wants("failed")
		tt.moveUpstream(tt.origin.url, "package: rpm", "sealed: true")
		for name, text := range files {
			tt.get("/api/r/" + name).wantStatus(200).wantBody(text)
		}
	})
}

// A file that cannot be stored was not fetched ahead, whatever else became of it.
func TestPrefetchThatStoresNothingFails(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `cache: {max_size: 10B}`)
	tt.origin.file("/big", strings.Repeat("x", 100))
	tt.origin.file("/torn", strings.Repeat("x", 9)).cut(3, 3, 3, 3, 3, 3)
	a := tt.prefetch(`{"remote": "r", "paths": ["big", "torn"]}`).wants("done").wants("failed", "r/big 507", "r/torn 502")
	if !strings.Contains(a.text, "log says why") {
		t.Errorf("of a file that is too large: %s", a.text)
	}
}

// What a run fetches, no client has missed.
func TestPrefetchMissesNothing(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `would_miss: true`)
	tt.origin.file("/a", "a")
	tt.origin.file("/x/", `<a href="a">a</a>`)
	tt.prefetch(`{"remote": "r", "paths": ["a"]}`).wants("done", "r/a")
	tt.prefetch(`{"remote": "r", "pattern": "none", "prefix": "x"}`).wants("failed")
	tt.get("/missed").wantStatus(200).wantBody("")
	tt.get("/api/r/b").wantStatus(404)
	tt.prefetch("\n"+tt.get("/missed").text).wants("failed", "r/b 404")
}

func TestPrefetchOfASealedRemote(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `sealed: true`)
	tt.origin.file("/", `<a href="a">a</a>`)
	tt.prefetch(`{"remote": "r", "paths": ["a"]}`).wants("failed", "r/a 404")
	tt.prefetch(`{"remote": "r", "pattern": "a"}`).wants("done")
	if l := tt.origin.all(); len(l) > 0 {
		t.Errorf("the upstream was asked: %q", l)
	}
}

func TestPrefetchRunsAtMostTwice(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	release := []func(){tt.origin.file("/one", "12345").stallAt(3), tt.origin.file("/two", "12345").stallAt(3)}
	ends := make(chan *runAnswer, 2)
	for _, name := range []string{"one", "two"} {
		go func() {
			ends <- tt.prefetch(`{"remote": "r", "paths": ["` + name + `"]}`)
		}()
		tt.origin.awaitRequests("GET /"+name, 1)
	}
	if l := tt.api.runs.list(); len(l) != 2 || l[0].remote.name != "r" || l[1].progress().Found != 1 {
		t.Errorf("the list of runs is %v", l)
	}
	tt.prefetch("nothing").wantDetail(429, "two")
	for _, f := range release {
		f()
	}
	(<-ends).wantSum(1, 1, 0, 0)
	(<-ends).wantSum(1, 1, 0, 0)
	tt.prefetch("nothing").wantSum(0, 0, 0, 0)
}

func TestPrefetchFetchesEightAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		var now, most atomic.Int32
		var paths []string
		for i := range 40 {
			paths = append(paths, fmt.Sprintf("f%d", i))
			tt.origin.file("/"+paths[i], "").acts(func(w http.ResponseWriter, _ *http.Request) {
				most.Store(max(most.Load(), now.Add(1)))
				time.Sleep(2 * time.Second)
				now.Add(-1)
				_, _ = io.WriteString(w, "12345")
			})
		}
		body, _ := json.Marshal(prefetchRequest{Remote: "r", Paths: paths})
		a := tt.prefetch(string(body)).wantSum(40, 40, 0, 0)
		if most.Load() != 8 {
			t.Errorf("%d at once", most.Load())
		}
		progress := 0
		for i, e := range a.events {
			if e.Event == "progress" {
				progress++
				if e.Found != 40 || e.Done > int64(i) || e.Bytes != 5*e.Done {
					t.Errorf("progress %+v", e)
				}
			}
		}
		if s := a.events[len(a.events)-1]; progress < 8 || progress > 11 || s.Seconds != 10 || s.Bytes != 200 {
			t.Errorf("%d lines of progress in %v s, %d bytes", progress, s.Seconds, s.Bytes)
		}
	})
}

func TestPrefetchEndsWithItsClient(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	var paths []string
	for i := range 100 {
		paths = append(paths, fmt.Sprintf("f%d", i))
		tt.origin.file("/"+paths[i], "12345").stallAt(3)
	}
	body, _ := json.Marshal(prefetchRequest{Remote: "r", Paths: paths})
	s := tt.start(context.Background(), http.MethodPost, "/cache-artifact", bytes.NewReader(body), "Content-Type: application/json")
	tt.eventually("eight downloads", func() bool { return len(tt.origin.all()) == prefetchWorkers })
	s.leave()
	tt.eventually("the end of the run", func() bool {
		tt.api.runs.mu.Lock()
		defer tt.api.runs.mu.Unlock()
		return len(tt.api.runs.runs) == 0
	})
	if n := len(tt.origin.all()); n != prefetchWorkers {
		t.Errorf("%d requests", n)
	}
}

// spelled is the path that upstream is asked for.
func spelled(path string) string {
	_, spelling, _ := spellPath((&remote{}).pathHere(path)[len("/api//"):], "")
	return "/" + spelling
}

// --- indexes ---

func gz(parts ...string) string {
	var b bytes.Buffer
	for _, part := range parts { // a member each
		z := gzip.NewWriter(&b)
		_, _ = io.WriteString(z, part)
		_ = z.Close()
	}
	return b.String()
}

// tarOf is a tar of one file, without its end, as apk's parts are.
func tarOf(name, text string) string {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	_ = w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))})
	_, _ = io.WriteString(w, text)
	_ = w.Flush()
	return b.String()
}

func rpmPackage(location string, size int) string {
	return fmt.Sprintf(`<package type="rpm"><name>x</name><size package="%d" installed="9"/><location %s/><format><rpm:entry name="size"/></format></package>`, size, location)
}

func primary(packages ...string) string {
	return `<?xml version="1.0" encoding="UTF-8"?><metadata xmlns="http://linux.duke.edu/metadata/common" xmlns:rpm="http://linux.duke.edu/metadata/rpm">` +
		strings.Join(packages, "\n") + `</metadata>`
}

func repomd(location string) string {
	return `<repomd><data type="other"><location href="repodata/other.xml"/></data><data type="primary"><location href="` + location + `"/></data></repomd>`
}

// namedRelease is an InRelease that names these files with these texts.
func namedRelease(files ...string) string {
	text := "-----BEGIN PGP SIGNED MESSAGE-----\n\nSuite: t\nMD5Sum:\n ff 1 Packages.bz2\nSHA256:\n"
	for i := 0; i < len(files); i += 2 {
		text += fmt.Sprintf(" %x %d %s\n", sha256.Sum256([]byte(files[i+1])), len(files[i+1]), files[i])
	}
	return text
}

const (
	apkIndex    = "P:curl\nV:8.1-r0\nS:11\nD:so:x\nF:\n\nP:zlib\nV:1-r1\nS:12\n\nP:curl-dev\nV:8.1-r0\nS:13\n" // no empty line at the end
	debPackages = "Package: curl\nFilename: %[1]spool/c/curl_1%%3a2+x.deb\nSize: 21\nDescription: s\n Filename: not/this_curl.deb\n .\n\nPackage: zlib\nFilename: %[1]spool/z/zlib_1.deb\nSize: 22\n\n"
	linkPage    = `<html><a href="../">../</a><A class=x HREF='%s'>x</A><a href="?C=N">sort</a><a href=zlib.tar.gz>z</a></html>`
)

func TestPrefetchByIndex(t *testing.T) {
	t.Parallel()
	pool := strings.ReplaceAll(fmt.Sprintf(debPackages, ""), "%%", "%")
	release := namedRelease("main/binary-amd64/Packages.gz", gz(pool), "main/i18n/Translation-en", "x")
	plainRelease := namedRelease("main/binary-amd64/Packages", pool)
	for _, c := range []struct {
		name, keys, prefix string
		files              map[string]string // what upstream has beside the packages
		want               []string
		sizes              int64 // together, as far as the index says
		failed             []string
	}{
		{"alpine", "package: alpine", "", map[string]string{"/APKINDEX.tar.gz": gz(tarOf(".SIGN.RSA", "s"), tarOf("DESCRIPTION", "v3")+tarOf("APKINDEX", apkIndex)+strings.Repeat("\x00", 1024))},
			[]string{"curl-8.1-r0.apk", "curl-dev-8.1-r0.apk"}, 24, nil},
		{"alpine below a prefix", "package: alpine", "v3/main/", map[string]string{"/v3/main/APKINDEX.tar.gz": gz(tarOf("APKINDEX", apkIndex) + strings.Repeat("\x00", 1024))},
			[]string{"v3/main/curl-8.1-r0.apk", "v3/main/curl-dev-8.1-r0.apk"}, 24, nil},
		{"alpine, cut", "package: alpine", "", map[string]string{"/APKINDEX.tar.gz": gz(tarOf("APKINDEX", apkIndex))[:60]}, nil, 0, []string{"APKINDEX.tar.gz 502"}},
		{"alpine, none", "package: alpine", "", nil, nil, 0, []string{"APKINDEX.tar.gz 404"}},
		{"alpine, an index that patterns hide", "package: alpine\nimmutable_patterns: ['^curl-8', '^zlib']", "",
			map[string]string{"/APKINDEX.tar.gz": gz(tarOf("APKINDEX", apkIndex) + strings.Repeat("\x00", 1024))}, []string{"curl-8.1-r0.apk"}, 11, nil},
		{"all of it refused", "package: alpine\nimmutable_patterns: ['^other']", "",
			map[string]string{"/APKINDEX.tar.gz": gz(tarOf("APKINDEX", apkIndex) + strings.Repeat("\x00", 1024))}, nil, 0, []string{" 403"}},
		{"rpm", "package: rpm", "9/os", map[string]string{"/9/os/repodata/repomd.xml": repomd("repodata/p.xml.gz"),
			"/9/os/repodata/p.xml.gz": gz(primary(rpmPackage(`href="p/curl-1+x^2.rpm"`, 31), rpmPackage(`href="p/zlib.rpm"`, 32)))}, []string{"9/os/p/curl-1+x^2.rpm"}, 31, nil},
		{"rpm, plain", "package: rpm", "", map[string]string{"/repodata/repomd.xml": repomd("repodata/p.xml"), "/repodata/p.xml": primary(rpmPackage(`href="curl.rpm"`, 31))}, []string{"curl.rpm"}, 31, nil},
		{"rpm, bzip2", "package: rpm", "", map[string]string{"/repodata/repomd.xml": repomd("p.xml.bz2"), "/p.xml.bz2": bzippedPrimary}, []string{"curl.rpm"}, 5, nil},
		{"rpm, zstd", "package: rpm", "", map[string]string{"/repodata/repomd.xml": repomd("repodata/p.xml.zst"), "/repodata/p.xml.zst": "\x28\xb5\x2f\xfd...."}, nil, 0, []string{"repodata/p.xml.zst 501"}},
		{"rpm, a location above", "package: rpm", "in/", map[string]string{"/in/repodata/repomd.xml": repomd("repodata/p.xml"), "/in/repodata/p.xml": primary(
			rpmPackage(`href="../../curl-up.rpm"`, 1), rpmPackage(`href="curl.rpm"`, 31))}, []string{"in/curl.rpm"}, 31, []string{"in/../../curl-up.rpm 400"}},
		{"rpm, an endless element", "package: rpm", "", map[string]string{"/repodata/repomd.xml": repomd("p.xml"), "/p.xml": "<metadata><x>" + strings.Repeat("x", 3<<20)}, nil, 0, []string{"p.xml 502"}},
		{"rpm, cut between elements", "package: rpm", "", map[string]string{"/repodata/repomd.xml": repomd("p.xml"), "/p.xml": "<metadata>" + rpmPackage(`href="curl.rpm"`, 31)}, []string{"curl.rpm"}, 31, []string{"p.xml 502"}},
		{"rpm, no primary", "package: rpm", "", map[string]string{"/repodata/repomd.xml": "<repomd/>"}, nil, 0, []string{"repodata/repomd.xml 502"}},
		{"deb, a suite", "package: deb", "dists/t", map[string]string{"/dists/t/InRelease": release, "/dists/t/main/i18n/Translation-en": "x", "/dists/t/main/binary-amd64/Packages.gz": gz(pool)}, []string{"pool/c/curl_1%3a2+x.deb"}, 21, nil},
		{"deb, a suite by its name", "package: deb", "t", map[string]string{"/dists/t/Release": plainRelease, "/dists/t/main/binary-amd64/Packages": pool}, []string{"pool/c/curl_1%3a2+x.deb"}, 21, nil},
		{"deb, a folder", "package: generic", "sub/dists/t/main/binary-amd64", map[string]string{"/sub/dists/t/main/binary-amd64/Packages": pool}, []string{"sub/pool/c/curl_1%3a2+x.deb"}, 21, nil},
		{"deb, flat", "package: deb", "", map[string]string{"/Packages.gz": gz(fmt.Sprintf(debPackages, "./"))}, []string{"pool/c/curl_1%3a2+x.deb"}, 21, nil},
		{"deb, flat below a prefix", "package: deb", "a/b", map[string]string{"/a/b/Packages": pool}, []string{"a/b/pool/c/curl_1%3a2+x.deb"}, 21, nil},
		{"deb, flat, from the root", "package: deb", "a", map[string]string{"/a/Packages": fmt.Sprintf(debPackages, "a/")}, []string{"a/pool/c/curl_1%3a2+x.deb"}, 21, nil},
		{"deb, only xz", "package: deb", "dists/t", map[string]string{"/dists/t/InRelease": namedRelease("Packages.xz", "\xfd7zXZ\x00"), "/dists/t/Packages.xz": "\xfd7zXZ\x00"}, nil, 0, []string{"dists/t/Packages.xz 501"}},
		{"deb, none", "package: deb", "dists/t", nil, nil, 0, []string{"dists/t/Packages.gz 404"}},
		{"a listing", "package: generic", "", map[string]string{"/": fmt.Sprintf(linkPage, "a%20curl+.gz")}, []string{"a curl+.gz"}, 0, nil},
		{"listings below a prefix", "package: generic", "x", map[string]string{"/x/": fmt.Sprintf(linkPage, "/x/curl/"), "/x/curl/": fmt.Sprintf(linkPage, "http://ORIGIN/x/curl/1")},
			[]string{"x/curl/1", "x/curl/zlib.tar.gz"}, 0, nil},
		{"listings below a prefix in another spelling", "package: generic", "./x//", map[string]string{"/x/": fmt.Sprintf(linkPage, "/x/curl/"), "/x/curl/": fmt.Sprintf(linkPage, "http://ORIGIN/x/curl/1")},
			[]string{"x/curl/1", "x/curl/zlib.tar.gz"}, 0, nil},
		{"listings that lead away", "package: generic", "x", map[string]string{"/x/": fmt.Sprintf(linkPage, "curl1") + fmt.Sprintf(linkPage, "/curl2") + fmt.Sprintf(linkPage, "../y/curl3") + fmt.Sprintf(linkPage, "%2e%2e/curl4") +
			fmt.Sprintf(linkPage, "..%2fcurl5") + fmt.Sprintf(linkPage, "http://127.0.0.1:1/x/curl6") + fmt.Sprintf(linkPage, "//127.0.0.1:1/x/curl7") + fmt.Sprintf(linkPage, "javascript:curl8") + fmt.Sprintf(linkPage, "#curl9") + fmt.Sprintf(linkPage, "./")},
			[]string{"x/curl1"}, 0, nil},
		{"a listing that is not there", "package: generic", "x", nil, nil, 0, []string{"x/ 404"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			tt := newTester(t, strings.Split(c.keys, "\n")...)
			host := strings.TrimPrefix(tt.origin.url, "http://")
			for path, text := range c.files {
				tt.origin.file(path, strings.ReplaceAll(text, "ORIGIN", host))
			}
			var done, failed []string
			for _, path := range c.want {
				tt.origin.file(spelled(path), path)
				done = append(done, "r/"+path)
			}
			for _, f := range c.failed {
				failed = append(failed, "r/"+f)
			}
			n := int64(len(c.want))
			body, _ := json.Marshal(prefetchRequest{Remote: "r", Pattern: "curl", Prefix: c.prefix})
			dry := tt.prefetch(strings.Replace(string(body), `"dry_run":false`, `"dry_run":true`, 1)).wants("found", done...).wants("failed", failed...).wantSum(n, 0, 0, int64(len(failed)))
			if s := dry.events[len(dry.events)-1]; s.Bytes != c.sizes {
				t.Errorf("the index says %d bytes, found %d", c.sizes, s.Bytes)
			}
			tt.prefetch(string(body)).wants("done", done...).wants("failed", failed...).wantSum(n, n, 0, int64(len(failed)))
			tt.prefetch(string(body)).wants("done", done...).wantSum(n, 0, n, int64(len(failed)))
			for _, e := range dry.events {
				if e.Event == "failed" && e.Status == http.StatusNotImplemented && !strings.Contains(e.Detail, "dnf download --url") {
					t.Errorf("%q says no way out", e.Detail)
				}
			}
		})
	}
}

// bzippedPrimary is a primary.xml with curl.rpm of 5 bytes, which Go cannot compress.
var bzippedPrimary = func() string {
	b, _ := base64.StdEncoding.DecodeString("QlpoOTFBWSZTWdoe/GAAAAeZgFABggcv794QIABUUAAZADQMlA9RmoG1PQg7OuwdRIJMFeUYbjC4qUEGgpVTNB9Bu4bMxMpHdcapDBRYxxe8sDCZFI/F3JFOFCQ2h78YAA==")
	return string(b)
}()

func TestListingsWithoutEndAreBounded(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.troubled(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `<a href="d/">d</a><a href="d/">d</a><a href="./">.</a><a href="f%d">f</a>`, strings.Count(r.URL.Path, "/"))
	})
	a := tt.prefetch(`{"remote": "r", "pattern": "f", "prefix": "top", "dry_run": true}`)
	if n := len(a.of("found")); n != maxIndexDepth+1 {
		t.Errorf("found %d files", n)
	}
	a.wants("failed", "r/top/"+strings.Repeat("d/", maxIndexDepth+1)+" 413")
}

// S3 says 403 of what is not there to whom it does not let list.
func TestPrefetchByAnIndexBesideMissingOnes(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "package: deb")
	for _, path := range []string{"/t/InRelease", "/t/Release", "/dists/t/InRelease"} {
		tt.origin.file(path, "").answering(403)
	}
	list := strings.ReplaceAll(fmt.Sprintf(debPackages, ""), "%%", "%")
	for path, text := range map[string]string{"/dists/t/Release": namedRelease("main/binary-amd64/Packages", list), "/dists/t/main/binary-amd64/Packages": list, "/pool/z/zlib_1.deb": "zlib"} {
		tt.origin.file(path, text)
	}
	tt.prefetch(`{"remote": "r", "prefix": "t", "pattern": "zlib"}`).wants("done", "r/pool/z/zlib_1.deb").wants("failed")
}

// The memory of a run does not grow with its index, nor with the links of a listing.
func TestLargeIndexTakesLittleMemory(t *testing.T) {
	grows := func(tt *tester) int64 {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		tt.prefetch(`{"remote": "r", "pattern": "curl"}`).wantSum(0, 0, 0, 0)
		runtime.ReadMemStats(&after)
		return int64(after.HeapSys) - int64(before.HeapSys)
	}
	tt := newTester(t, "package: rpm")
	tt.origin.file("/repodata/repomd.xml", repomd("p.xml.gz"))
	tt.origin.file("/p.xml.gz", gz(primary(slices.Repeat([]string{rpmPackage(`href="zlib.rpm"`, 1) + strings.Repeat(`<x y="z"/>`, 300)}, 2000)...)))
	if grown := grows(tt); grown > 32<<20 {
		t.Errorf("the heap has grown by %d bytes for 6 MB of XML", grown)
	}
	tt = newTester(t)
	tt.origin.file("/", strings.Repeat("<a href=a>", 200_000))
	if grown := grows(tt); grown > 32<<20 {
		t.Errorf("the heap has grown by %d bytes for 200,000 links", grown)
	}
}

// --- texts ---

func TestPrefetchOfAnyText(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: "remotes:\n  r: {base_url: ORIGIN/pub, mirrors: ['http://mirror.example/m']}\n  deep: {base_url: ORIGIN/pub/deep}\n  own: {type: local}\n"}.start(t)
	var want []string
	for _, name := range []string{"a1", "a2.tgz", "a3", "a4.rpm", "a5", "p/x_1+2~b.deb", "a6(1).zip", "a7", "b1", "b2", "missed one", "c1", "q"} {
		tt.origin.file("/pub"+spelled(name), name)
		want = append(want, "r/"+name)
	}
	tt.origin.file("/pub/deep/d", "deep")
	tt.origin.file("/pub/q?x=1", "q")
	u, own := tt.origin.url+"/pub/", tt.url
	text := "'" + u + "p/x_1%2b2~b.deb' x_1%2b2~b.deb 12 SHA256:ab\n" +
		"see (" + u + "a1), <" + u + "a2.tgz>; or\n \"resolved\": \"" + u + "a3\",\n\turl=" + u + "a4.rpm#sha256=ff\r\n" +
		"http://mirror.example/m/a5 " + u + "a6(1).zip. " + strings.ReplaceAll(`{"dist":"`+u+`a7"}`, "/", `\/`) + " " + u + "a1\n" +
		"GET " + own + "/api/r/b1 " + own + "//api/v1/remote/r/./b2 " + own + "/health\n" +
		`{"remote":"r","path":"missed one","first":"2026-01-01T00:00:00Z","last":"2026-01-01T00:00:00Z","count":3}` + "\n" +
		`{"remote":"r","path":"asked","count":3,"query":true}` + "\n" +
		`{"msg":"Cache MISS","remote":"deep","path":"d","status":200}` + "\n" +
		`{"remote":"gone","path":"x","count":1}` + "\n" +
		strings.Repeat("x", 64<<10-20) + " " + u + "c1 " + strings.Repeat("y", 128<<10) + "\n" +
		"http://user:secret@unknown.example/z?token=secret http://unknown.example/z\n" + u + "q?x=1"
	a := tt.prefetch(text).wants("done", append(want, "deep/d")...).
		wants("failed", "r/asked 400", "gone/x 404", "/http://unknown.example/z 404", "/"+own+"/health 404")
	if strings.Contains(a.text, "secret") {
		t.Errorf("a secret is shown: %s", a.text)
	}
	if tt.origin.requests("GET /pub/q?x=1") != 1 {
		t.Errorf("the query was lost: %q", tt.origin.all())
	}
	tt.prefetch(fmt.Sprintf(`{"urls": [%q, "nonsense", %q]}`, u+"a1", u+"deep/d")).wants("done", "r/a1", "deep/d").wants("failed", "/nonsense 404").wantSum(2, 0, 2, 1)
	tt.origin.file(spelled("pub/whole.(1)"), "x") // a URL that stands alone does not end where a sentence would
	tt.prefetch(fmt.Sprintf(`{"urls": [%q]}`, u+"whole.(1)")).wants("done", "r/whole.(1)")
}

// A server has the address at which it was asked, and PUBLIC_URL.
func TestTextsNameThisServer(t *testing.T) {
	t.Parallel()
	cfg := mustParse(t, "remotes:\n  r: {base_url: 'http://a.example'}\n  hub: {base_url: 'http://reg.example', package: docker}\n")
	cfg.useLinks("https://public.example:8443/")
	s := &prefetchRun{cfg: cfg, ownHost: "own.example:8000"}
	for text, want := range map[string]string{
		"https://OWN.example:8000/api/r/x?y":          "/api/r/x?y",
		"https://public.example:8443/api/r/x":         "/api/r/x",
		"https://public.example/api/r/x":              "",
		"own.example:8000/hub/app:1":                  "/v2/hub/app/manifests/1",
		"docker://public.example:8443/hub/a/b@sha:ff": "/v2/hub/a/b/manifests/sha:ff",
		"--image=reg.example/app,":                    "/v2/hub/app/manifests/latest",
	} {
		if s.named = nil; s.scan(strings.NewReader(text)) != nil || len(s.named) != 1 || s.named[0].way != want {
			t.Errorf("%s: %+v, want %q", text, s.named, want)
		}
	}
	for _, text := range []string{"own.example:8000/r/app:1", "elsewhere.example/app:1", "reg.example", "reg.example/", "word"} {
		if s.named = nil; s.scan(strings.NewReader(text)) != nil || len(s.named) > 0 {
			t.Errorf("%s: %+v", text, s.named)
		}
	}
}

// A body of 16 MiB may name five million files, which would be some hundred bytes each.
func TestRequestThatNamesTooMuchIsRefused(t *testing.T) {
	t.Parallel()
	cfg := mustParse(t, "remotes:\n  r: {base_url: 'http://a.example'}\n")
	names := func(name string) string { return strings.Repeat(name, 2*maxPrefetchFiles) }
	for what, body := range map[string]string{
		"lines": names("http://a.example/x\n"), "one line": names("http://a.example/x "),
		"paths": `{"remote":"r","paths":[` + names(`"",`) + `""]}`, "urls": `{"urls":[` + names(`"",`) + `""]}`,
	} {
		s := &prefetchRun{cfg: cfg}
		err := s.readBody(nil, httptest.NewRequest(http.MethodPost, "/cache-artifact", strings.NewReader(body)), strings.HasPrefix(body, "{"))
		if p, ok := errors.AsType[*problem](err); !ok || p.status != http.StatusRequestEntityTooLarge || len(s.named) > maxPrefetchFiles+1 {
			t.Errorf("%s: %d files, %v", what, len(s.named), err)
		}
	}
}

func FuzzScanText(f *testing.F) {
	f.Add("see http://a.example/b?c d\n{\"remote\":\"r\",\"path\":\"x\"}\nreg.example/a:1@b")
	f.Add("http://")
	f.Add("https://@?#/\\/")
	cfg := mustParse(f, "remotes:\n  r: {base_url: 'http://a.example/b'}\n  d: {base_url: 'http://reg.example', package: docker}\n")
	f.Fuzz(func(t *testing.T, text string) {
		s := &prefetchRun{cfg: cfg, ownHost: "own:8000"}
		if err := s.scan(strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
		for _, file := range s.named {
			if file.way == "" && (file.err == nil || file.remote != "") {
				t.Errorf("%+v has no path here", file)
			}
		}
	})
}

// --- images ---

// prefetchImages is a run of a mirror.
func (m *mirror) prefetchImages(body string) *runAnswer {
	m.t.Helper()
	tt := &tester{TB: m.t, url: m.srv.URL, client: m.client.Transport.(*http.Transport), cache: m.cache}
	return tt.prefetch(body, "Authorization: Bearer t")
}

// multiImage is an index with two platforms and a signature.
type multiImage struct {
	index, signature string
	amd, arm         *hubImage
}

func newMultiImage(h *hub) multiImage {
	x := multiImage{amd: h.image("team/app", "", 10, 20), arm: h.image("team/app", "", 30)}
	at := func(im *hubImage, arch string) string {
		d := descriptorOf(typeManifest, im.digest, len(im.body))
		return d[:len(d)-1] + `,"platform":{"os":"linux","architecture":"` + arch + `","variant":"v8"}}`
	}
	x.index = h.manifest("team/app", "", typeIndex, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s,%s]}`, typeIndex, at(x.amd, "amd64"), at(x.arm, "arm64")), "1.0")
	layer := h.blob("team/app", []byte("signature"))
	x.signature = h.manifest("team/app", "", typeManifest, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s],"subject":{"digest":%q}}`,
		typeManifest, descriptorOf("application/vnd.oci.empty.v1+json", h.blob("team/app", []byte("{}")), 2), descriptorOf("x/y", layer, 9), x.index))
	return x
}

func TestPrefetchOfImages(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	x := newMultiImage(h)
	m := newMirror(t, h.url(), `registry: "quay.io"`, `immutable_patterns: ["^team/"]`)
	all := map[string]bool{"manifests/1.0": true, "manifests/" + x.signature: true}
	for _, im := range []*hubImage{x.amd, x.arm} {
		all["manifests/"+im.digest] = true
		for d := range im.blobs {
			all["blobs/"+d] = true
		}
	}
	all["blobs/"+sha256Of([]byte("signature"))], all["blobs/"+sha256Of([]byte("{}"))] = true, true
	var want []string
	for p := range all {
		want = append(want, "reg/team/app/"+p)
	}
	few := m.prefetchImages(`{"remote": "reg", "images": ["team/app:1.0"], "platforms": ["linux/amd64"]}`).wants("failed")
	for d := range x.arm.blobs {
		if slices.Contains(few.of("done"), "reg/team/app/blobs/"+d) && x.amd.blobs[d] == nil {
			t.Errorf("a blob of another platform was fetched")
		}
	}
	if !slices.Contains(few.of("done"), "reg/team/app/manifests/"+x.signature) {
		t.Errorf("the signature of the index was not fetched: %s", few.text)
	}
	m.prefetchImages(`{"remote": "reg", "images": ["team/app:1.0"], "dry_run": true}`).wants("found", want...).wants("done")
	m.prefetchImages("image: quay.io/team/app:1.0").wants("done", want...).wants("failed")
	m.prefetchImages(`{"remote": "reg", "images": ["team/app:1.0"]}`).wants("done", want...).wantSum(int64(len(want)), 0, int64(len(want)), 0)
	h.down()
	m.get("/v2/reg/team/app/manifests/" + x.index).want(200)
	m.get("/v2/reg/team/app/referrers/" + x.index).want(200)
	for d, b := range x.arm.blobs {
		m.get("/v2/reg/team/app/blobs/" + d).want(200).wantBody(b)
	}
}

// The tags of an image are its index, and a list of tags or referrers may have pages.
func TestPrefetchOfTags(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "package: docker", "immutable_patterns: ['^team/app/(manifests|blobs|referrers)/']")
	page := func(path, link, text string) {
		tt.origin.file(path, text).says("Content-Type", "application/json").says("Link", link)
	}
	page("/v2/team/app/tags/list", `</v2/team/app/tags/list?last=1.0&n=2>; rel="next"`, `{"name":"team/app","tags":["0.9","1.0"]}`)
	page("/v2/team/app/tags/list?last=1.0&n=2", "", `{"name":"team/app","tags":["1.1","latest"]}`)
	text := func(s string) string {
		return `{"schemaVersion":2,"mediaType":"` + typeManifest + `","annotations":{"is":"` + s + `"}}`
	}
	want := []string{"r/team/app/manifests/1.0", "r/team/app/manifests/1.1"}
	for _, name := range []string{"one", "two"} {
		digest := sha256Of([]byte(text(name)))
		tt.origin.file("/v2/team/app/manifests/"+digest, text(name))
		page("/v2/team/app/referrers/"+digest, "", emptyIndex)
		signatures := `{"schemaVersion":2,"manifests":[` + descriptorOf(typeManifest, digest, 1) + `]}`
		referrers := "/v2/team/app/referrers/" + sha256Of([]byte(text("image")))
		if name == "one" {
			page(referrers, `<?n=1>; rel="next"`, signatures)
		} else {
			page(referrers+"?n=1", "", signatures)
		}
		want = append(want, "r/team/app/manifests/"+digest)
	}
	for _, tag := range []string{"1.0", "1.1"} {
		tt.origin.file("/v2/team/app/manifests/"+tag, text("image"))
	}
	tt.prefetch(`{"remote": "r", "prefix": "team/app", "pattern": "/1[.][0-9]$"}`).wants("failed").wants("done", want...)
	tt.prefetch(`{"remote": "r", "prefix": "team/none", "pattern": "."}`).wants("failed", "r/team/none/tags/list 404")
	if out, err := tt.command("", "--dry-run", "r/team/app", "/1\\.1$"); err != nil || !strings.Contains(out, "3 found") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestPrefetchOfImagesThatCannotBeHad(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.image("team/app", "1.0", 10)
	h.image("secret/app", "1.0", 10)
	m := newMirror(t, h.url(), `immutable_patterns: ["^team/.*/manifests/"]`)
	m.prefetchImages(`{"remote": "reg", "images": ["team/app:none", "secret/app:1.0", "Team:1", "team/app@sha256:ff"]}`).
		wants("failed", "reg/team/app/manifests/none 404", "reg/secret/app/manifests/1.0 403", "reg/Team/manifests/1 400", "reg/team/app/manifests/sha256:ff 400")
	h.wantAsked(0, http.MethodGet, "/v2/secret/app/manifests/1.0")
	a := m.prefetchImages(`{"remote": "reg", "images": ["team/app:1.0"]}`).wants("done", "reg/team/app/manifests/1.0")
	if l := a.of("failed"); len(l) != 2 { // a blob and the configuration, not the referrers
		t.Errorf("failed: %q", l)
	}
}
