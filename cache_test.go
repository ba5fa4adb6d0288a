package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// --- the path decision  ---

func TestSecondRequestIsServedFromTheStore(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a/b.tar.gz", "body")
	tt.get("/api/r/a/b.tar.gz").wantStatus(200).wantMiss().wantBody("body")
	tt.get("/api/r/a/b.tar.gz").wantStatus(200).wantHit().wantBody("body")
	tt.get("/api/v1/remote/r/a/b.tar.gz").wantHit().wantBody("body")
	for _, path := range []string{"//api/r/a/b.tar.gz", "/./api/r/a/b.tar.gz", "/api//r/a/b.tar.gz", "/api/.//r//a/./b.tar.gz",
		"/api//v1/remote/r/a/b.tar.gz", "/api/./v1/.//remote//r/a/b.tar.gz", "/%61pi/%72/a/b.tar.gz", "/api/v1/remot%65/r/%61/b.tar.gz"} {
		tt.get(path).wantHit().wantBody("body")
	}
	tt.wantRequests("/a/b.tar.gz", 1)
	tt.wantNoSpools()
	tt.restart()
	tt.down()
	tt.get("/api/r/a/b.tar.gz").wantHit().wantBody("body")
}

func TestPatternsDecide(t *testing.T) {
	t.Parallel()
	const (
		only      = `immutable_patterns: ['\.rpm$']`
		indexes   = `mutable_patterns: ['\.idx$']`
		both      = `mutable_patterns: ['latest']`
		anchored  = `immutable_patterns: ['^pool/']`
		rpmRemote = "package: rpm"
		apkRemote = "package: alpine"
	)
	for _, c := range []struct {
		what string
		keys []string
		path string
		want class // "" is 403
	}{
		{"no patterns allow everything", nil, "any/thing.bin", immutable},
		{"an immutable pattern allows", []string{only}, "a.rpm", immutable},
		{"what no pattern allows is refused", []string{only}, "a.deb", ""},
		{"patterns are searched anywhere", []string{`immutable_patterns: ['pool']`}, "x/pool/a", immutable},
		{"unless they are anchored", []string{anchored}, "x/pool/a", ""},
		{"a mutable pattern allows what immutable ones do not", []string{only, indexes}, "x.idx", mutable},
		{"mutable wins when both match", []string{only, both}, "latest.rpm", mutable},
		{"a mutable pattern alone refuses nothing", []string{indexes}, "a.rpm", immutable},
		{"built-in of rpm", []string{rpmRemote, only}, "8/repodata/repomd.xml", mutable},
		{"built-in of rpm metadata", []string{rpmRemote, only}, "8/repodata/abc-primary.xml.gz", mutable},
		{"built-in of alpine", []string{apkRemote, only}, "v3/main/x86_64/APKINDEX.tar.gz", mutable},
		{"generic has no built-ins", []string{only}, "v3/main/x86_64/APKINDEX.tar.gz", ""},
		{"a directory listing is never immutable", nil, "pool/", mutable},
		{"and must be allowed", []string{only}, "pool/", ""},
		{"the query is no part of the decision", []string{only}, "a.deb?x=.rpm", ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			tt := newTester(t, c.keys...)
			tt.origin.file("/"+c.path, "body")
			if c.want == "" {
				tt.get("/api/r/"+c.path).wantDetail(403, "pattern")
				tt.wantRequests("/"+c.path, 0)
				return
			}
			tt.get("/api/r/" + c.path).wantMiss().wantBody("body")
			if list := tt.list("r"); len(list) != 1 || list[0].Class != c.want {
				t.Errorf("listed as %+v, want class %s", list, c.want)
			}
		})
	}
}

func TestUnknownRemotesAndOtherPlaces(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: `
remotes:
  r: {base_url: ORIGIN}
  hub: {base_url: ORIGIN, package: docker}
`}.start(t)
	tt.get("/api/nobody/a").wantDetail(404, "nobody")
	tt.get("/api/hub/library/nginx").wantDetail(404, "/v2/hub/")
	tt.get("/api/").wantStatus(404)
	tt.get("/api").wantStatus(404)
	tt.get("/nowhere").wantStatus(404)
	tt.get("/apiary").wantStatus(404)
	if n := len(tt.origin.all()); n > 0 {
		t.Errorf("the origin was asked %d times", n)
	}
}

func TestEmptyPathListsWhatIsStored(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/x", "body")
	tt.get("/api/r/x")
	tt.origin.forget()
	for _, path := range []string{"/api/r", "/api/r/", "/api/v1/remote/r/", "/artifacts/r"} {
		g := tt.get(path).wantStatus(200)
		if !strings.Contains(g.text, `"path": "x"`) {
			t.Errorf("%s: %s", path, g.text)
		}
	}
	if n := len(tt.origin.all()); n > 0 {
		t.Errorf("the origin was asked %d times", n)
	}
}

func TestUnsafePathsGoNowhere(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	for _, path := range []string{"../x", "a/../x", "a/..", "%2e%2e/x", "a/%2E./x", "a%2F..%2Fx", "a%00", "a%0a", "a\\b", "a%5Cb", "%ff", "a%7f", "a%zz"} {
		tt.get("/api/r/" + path).wantStatus(400)
	}
	tt.get("/api/r/" + strings.Repeat("a", 1024)).wantStatus(404) // upstream's
	tt.get("/api/r/" + strings.Repeat("a", 1025)).wantStatus(414)
	tt.get("/api/r/" + strings.Repeat("%20", 400)).wantStatus(414)
	if n := len(tt.origin.all()); n != 1 {
		t.Errorf("the origin was asked %d times: %v", n, tt.origin.all())
	}
}

func TestSpellingsOfOneFileAreOneEntry(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/g%2B%2B~1%5E%20.x", "one")
	tt.get("/api/r/g++~1^%20.x").wantMiss().wantBody("one")
	for _, path := range []string{"g%2B%2B~1%5E%20.x", "g%2b%2b%7E1%5e%20.x", "%67++%7e1^%20.x", "./g++~1^%20.x", "/g++~1^%20.x", ".//./g++~1%5E%20.x"} {
		tt.get("/api/r/" + path).wantStatus(200).wantHit().wantBody("one")
	}
	tt.wantRequests("/g%2B%2B~1%5E%20.x", 1)
}

func TestDifferentFilesStayDifferent(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	paths := []string{"a%2Fb", "a/b", "a%3Fb", "a?b", "a?b&c", "a", "a/b/", "A/b"}
	for _, p := range paths {
		tt.origin.file("/"+p, "content of "+p)
		tt.get("/api/r/" + p).wantStatus(200).wantMiss().wantBody("content of " + p)
	}
	for _, p := range paths {
		tt.get("/api/r/" + p).wantHit().wantBody("content of " + p)
		tt.wantRequests("/"+p, 1)
	}
}

func TestKeysAreAsPromised(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	for path, name := range map[string]string{
		"dir/file-1.0+x.tar.gz":                 "file-1.0_x.tar.gz",
		"a%20b/.hidden":                         "_hidden",
		"d/":                                    "_",
		"x?y=/z":                                "x",
		"a@1=b~c.whl":                           "a@1=b~c.whl",
		"n/" + strings.Repeat("0123456789", 13): strings.Repeat("0123456789", 12),
	} {
		spelling := strings.ReplaceAll(path, "+", "%2B")
		spelling = strings.ReplaceAll(spelling, "@1=", "%401%3D")
		name = strings.ReplaceAll(name, "0_x", "0+x")
		tt.origin.file("/"+spelling, "body")
		tt.get("/api/r/" + path).wantMiss()
		sum := sha256.Sum256([]byte(spelling))
		want := "r/" + hex.EncodeToString(sum[:8]) + "/" + name
		found := false
		for _, a := range tt.list("r") {
			found = found || a.Key == want
		}
		if !found {
			t.Errorf("no artifact has the key %s: %+v", want, tt.list("r"))
		}
	}
}

// --- what crosses the proxy (section 4) ---

func TestClientsHeadersStayHere(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `headers: {X-Key: "k"}`)
	tt.origin.file("/a", "body")
	tt.get("/api/r/a?q=1", "Authorization: Bearer client", "Cookie: c=1", "Accept: text/html", "Accept-Encoding: gzip",
		"X-Forwarded-For: 1.2.3.4", "Range: bytes=1-2", "If-None-Match: \"x\"", "Cache-Control: no-cache", "Referer: http://x/")
	tt.origin.file("/a?q=1", "body")
	tt.get("/api/r/a?q=1", "Authorization: Bearer client", "Accept-Encoding: gzip", "If-None-Match: \"x\"").wantMiss()
	s := tt.origin.last("/a?q=1")
	want := map[string]string{"User-Agent": "artifactapi/test", "Accept-Encoding": "identity", "X-Key": "k", "Via": tt.up.via}
	for name := range s.header {
		if s.header.Get(name) != want[name] {
			t.Errorf("upstream was sent %s: %q", name, s.header.Get(name))
		}
	}
	for name, v := range want {
		if s.header.Get(name) != v {
			t.Errorf("upstream was sent %s: %q, want %q", name, s.header.Get(name), v)
		}
	}
	if "http://"+s.host != tt.origin.url {
		t.Errorf("upstream was sent Host %q, want its own, %s", s.host, tt.origin.url)
	}
}

func TestUpstreamsOtherHeadersStayThere(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "body").etag(`"theirs"`).says("Set-Cookie", "a=b").says("Vary", "*").says("Cache-Control", "no-store").
		says("Expires", "0").says("X-Powered-By", "x").says("Link", "<x>").says("Content-Encoding", "br")
	for _, g := range []*got{tt.get("/api/r/a").wantMiss(), tt.get("/api/r/a").wantHit()} {
		for _, name := range []string{"Set-Cookie", "Vary", "Expires", "X-Powered-By", "Link", "X-Content"} {
			g.wantHeader(name, "")
		}
		g.wantHeader("Content-Type", "application/x-origin").wantHeader("Content-Encoding", "br").wantHeader("Cache-Control", "no-transform")
		if g.header.Get("ETag") == `"theirs"` {
			t.Error("upstream's ETag reached the client")
		}
	}
}

func TestClientsCannotForceARefetch(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`)
	tt.origin.file("/a", "body")
	tt.get("/api/r/a")
	tt.get("/api/r/a", "Cache-Control: no-cache", "Pragma: no-cache").wantHit()
	tt.get("/api/r/a", "Cache-Control: max-age=0").wantHit()
	tt.wantRequests("/a", 1)
}

// --- responses ---

func TestHeadersOfAnAnswer(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ['\.idx$']`)
	tt.origin.file("/d/a b.tar.gz", "x")
	tt.origin.file("/d/a%20b.tar.gz", "body")
	sum := sha256.Sum256([]byte("body"))
	common := func(g *got) {
		g.wantStatus(200).wantBody("body").
			wantHeader("Content-Length", "4").
			wantHeader("Content-Type", "application/gzip").
			wantHeader("Content-Disposition", `attachment; filename="a b.tar.gz"`).
			wantHeader("Last-Modified", longAgo.Format(http.TimeFormat)).
			wantHeader("Accept-Ranges", "bytes").
			wantHeader("X-Content-Type-Options", "nosniff").
			wantHeader("Content-Security-Policy", "sandbox").
			wantHeader("Connection", "keep-alive")
	}
	g := tt.get("/api/r/d/a%20b.tar.gz")
	common(g)
	g.wantHeader("Age", "").wantHeader("Cache-Status", "artifactapi; fwd=miss; stored").wantHeader("X-Artifact-Source", "remote")
	tt.advance(90 * time.Second)
	g = tt.get("/api/r/d/a%20b.tar.gz")
	common(g)
	g.wantHeader("Age", "90").wantHeader("Cache-Status", "artifactapi; hit").wantHeader("X-Artifact-Source", "cache").
		wantHeader("ETag", `"sha256-`+hex.EncodeToString(sum[:])+`"`)
	tt.origin.file("/x.idx", "index")
	tt.get("/api/r/x.idx")
	tt.advance(100 * time.Second)
	s := tt.get("/api/r/x.idx").header.Get("Cache-Status")
	if s != "artifactapi; hit; ttl=3499" && s != "artifactapi; hit; ttl=3500" {
		t.Errorf("Cache-Status %q 100 s into an hour", s)
	}
}

func TestContentTypes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, upstream, want string }{
		{"a.tar.gz", "text/plain", "application/gzip"},
		{"a.tgz", "", "application/gzip"},
		{"a.zip", "application/octet-stream", "application/zip"},
		{"a.rpm", "text/html", "application/x-rpm"},
		{"a.DEB", "", "application/vnd.debian.binary-package"},
		{"a.apk", "", "application/vnd.android.package-archive"},
		{"a.jar", "", "application/java-archive"},
		{"a.whl", "", "application/zip"},
		{"a.yaml", "text/plain", "application/yaml"},
		{"a.json", "", "application/json"},
		{"a.json", "application/vnd.npm.install-v1+json", "application/vnd.npm.install-v1+json"},
		{"a.xml", "", "application/xml"},
		{"a.xml", "text/xml", "text/xml"},
		{"a.json", "application/octet-stream", "application/json"},
		{"a.xml", "application/octet-stream; charset=binary", "application/xml"},
		{"a.json", "Application/Octet-Stream", "application/json"},
		{"download", "application/x-thing", "application/x-thing"},
		{"a.weird", "", "application/octet-stream"},
		{"LICENSE", "", "application/octet-stream"},
	} {
		if got := contentTypeOf(c.name, c.upstream); got != c.want {
			t.Errorf("%s from upstream as %q: %q, want %q", c.name, c.upstream, got, c.want)
		}
	}
}

func TestWebPageInThePlaceOfAnArchive(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ['^APKINDEX']`)
	tt.origin.file("/APKINDEX.tar.gz", "index")
	tt.get("/api/r/APKINDEX.tar.gz").wantMiss()
	tt.advance(2 * time.Hour)
	for _, name := range []string{"APKINDEX.tar.gz", "a.jar", "A.RPM"} {
		tt.origin.file("/"+name, "<html>log in").says("Content-Type", "Text/HTML; charset=utf-8")
		for range 2 {
			tt.get("/api/r/"+name).wantStatus(200).wantBody("<html>log in").wantHeader("Content-Type", "Text/HTML; charset=utf-8")
		}
	}
	tt.wantStored("a.jar", false)
	tt.origin.file("/coded.jar", "\x1f\x8bcoded").says("Content-Type", "text/html").says("Content-Encoding", "gzip") // although nobody asked for that
	tt.get("/api/r/coded.jar").wantStatus(200).wantHeader("Content-Type", "text/html")
	tt.wantStored("coded.jar", false)
	tt.down() // the good index is still there
	tt.get("/api/r/APKINDEX.tar.gz").wantStale().wantBody("index").wantHeader("Content-Type", "application/gzip")
	tt.upAgain()
	for name, text := range map[string]string{"page.html": "<html>", "page": "<html>", "a.xml": "<html>", "b.zip": "PK", "c.deb": noise(1, 2000), "empty.tgz": ""} {
		tt.origin.file("/"+name, text).says("Content-Type", "text/html") // where a page may be, and what is no page
		tt.get("/api/r/" + name).wantMiss().wantBody(text)
		tt.get("/api/r/"+name).wantHit().wantHeader("Content-Type", contentTypeOf(name, "text/html"))
	}
	tt.digested(func(file *fileRequest) { file.digest = sha256Of([]byte("jar")) }) // it is a jar, whatever it is called
	tt.origin.file("/b.jar", "jar").says("Content-Type", "text/html")
	tt.get("/api/r/b.jar").wantMiss()
	for _, ext := range archiveExtensions {
		if contentTypes[ext] == "" {
			t.Errorf("%s has no type of its own", ext)
		}
	}
}

func TestDispositionIsSafe(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	for name, want := range map[string]string{
		"plain.txt":                      "plain.txt",
		"a%22;%20filename=evil.exe":      `a"; filename=evil.exe`,
		"%C3%BCber.txt":                  "über.txt",
		"semi;colon.txt":                 "semi;colon.txt",
		"x'y%25z.txt":                    "x'y%z.txt",
		"a%2Fb.txt":                      "b.txt",
		"q.txt?filename=%0d%0aSet-X:%20": "q.txt",
	} {
		tt.origin.troubled(answers(200))
		g := tt.get("/api/r/" + name).wantStatus(200)
		typ, params, err := mime.ParseMediaType(g.header.Get("Content-Disposition"))
		if err != nil || typ != "attachment" || params["filename"] != want {
			t.Errorf("%s: %q means %q, %v; want %q", name, g.header.Get("Content-Disposition"), params, err, want)
		}
	}
	tt.get("/api/r/%C3%BCb%3Ber.txt").wantHeader("Content-Disposition", `attachment; filename=_b_er.txt; filename*=utf-8''%C3%BCb%3Ber.txt`)
}

func TestLastModifiedIsTheSameForTheSameBytes(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`)
	f := tt.origin.file("/a", "body").undated()
	first := tt.get("/api/r/a").wantMiss().header.Get("Last-Modified")
	if first == "" {
		t.Fatal("no Last-Modified where upstream has none: want the date of the first fetch")
	}
	tt.advance(2 * time.Hour)
	tt.get("/api/r/a").wantRefetched().wantHeader("Last-Modified", first)
	tt.get("/api/r/a").wantHit().wantHeader("Last-Modified", first)
	tt.restart()
	tt.get("/api/r/a").wantHit().wantHeader("Last-Modified", first)

	later := longAgo.Add(time.Hour)
	f.at(later)
	tt.advance(2 * time.Hour)
	tt.get("/api/r/a").wantRefetched().wantHeader("Last-Modified", first)
	tt.origin.file("/a", "other").at(later)
	tt.advance(2 * time.Hour)
	tt.get("/api/r/a").wantRefetched().wantHeader("Last-Modified", later.Format(http.TimeFormat))
}

func TestConditionalRequestsOnHits(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "body")
	tt.get("/api/r/a")
	etag := tt.get("/api/r/a").header.Get("ETag")
	at, before, after := longAgo.Format(http.TimeFormat), longAgo.Add(-time.Hour).Format(http.TimeFormat), longAgo.Add(time.Hour).Format(http.TimeFormat)
	for _, c := range []struct {
		what   string
		header []string
		status int
		body   string
	}{
		{"its ETag", []string{"If-None-Match: " + etag}, 304, ""},
		{"its ETag, weak", []string{"If-None-Match: W/" + etag}, 304, ""},
		{"one of several", []string{`If-None-Match: "x", ` + etag}, 304, ""},
		{"any", []string{"If-None-Match: *"}, 304, ""},
		{"another ETag", []string{`If-None-Match: "x"`}, 200, "body"},
		{"its date", []string{"If-Modified-Since: " + at}, 304, ""},
		{"a later date", []string{"If-Modified-Since: " + after}, 304, ""},
		{"an earlier date", []string{"If-Modified-Since: " + before}, 200, "body"},
		{"another ETag beats its date", []string{`If-None-Match: "x"`, "If-Modified-Since: " + at}, 200, "body"},
		{"If-Match of another", []string{`If-Match: "x"`}, 412, ""},
		{"If-Unmodified-Since before", []string{"If-Unmodified-Since: " + before}, 412, ""},
		{"a range", []string{"Range: bytes=1-2"}, 206, "od"},
		{"If-Range with its ETag", []string{"Range: bytes=1-2", "If-Range: " + etag}, 206, "od"},
		{"If-Range with another ETag", []string{"Range: bytes=1-2", `If-Range: "x"`}, 200, "body"},
		{"If-Range with a weak ETag", []string{"Range: bytes=1-2", "If-Range: W/" + etag}, 200, "body"},
		{"If-Range with its date", []string{"Range: bytes=1-2", "If-Range: " + at}, 206, "od"},
		{"If-Range with a later date", []string{"Range: bytes=1-2", "If-Range: " + after}, 200, "body"},
		{"an ETag that matches beats a range", []string{"Range: bytes=1-2", "If-None-Match: " + etag}, 304, ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			tt.get("/api/r/a", c.header...).wantStatus(c.status).wantHit().wantBody(c.body)
			head := tt.head("/api/r/a", c.header...)
			if c.status != 206 {
				head.wantStatus(c.status)
			}
			head.wantBody("")
		})
	}
	tt.wantRequests("/a", 1)
}

func TestRangesOnHits(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 200_000) // more than is kept in memory
	for _, path := range []string{"/small", "/large"} {
		if path == "/small" {
			tt.origin.file(path, text[:100])
		} else {
			tt.origin.file(path, text)
		}
		whole := tt.get("/api/r" + path).text
		size := len(whole)
		for spec, want := range map[string]string{
			"0-0": whole[:1], "10-19": whole[10:20], "50-": whole[50:], "-7": whole[size-7:], "-999999": whole,
			"90-999999": whole[90:], fmt.Sprintf("%d-", size-1): whole[size-1:],
		} {
			tt.get("/api/r"+path, "Range: bytes="+spec).wantStatus(206).wantHit().wantBody(want).
				wantHeader("Content-Length", strconv.Itoa(len(want)))
		}
		for _, spec := range []string{fmt.Sprintf("%d-", size), "999999-", "99999999999999999999-", "5-1", "x"} {
			tt.get("/api/r"+path, "Range: bytes="+spec).wantStatus(416).wantHeader("Content-Range", fmt.Sprintf("bytes */%d", size))
		}
		for _, spec := range []string{"bytes", "lines=1-2", "bytes=-0"} {
			tt.get("/api/r"+path, "Range: "+spec).wantStatus(200).wantBody(whole).wantHeader("Content-Range", "")
		}
		parts := tt.get("/api/r"+path, "Range: bytes=1-3,-2,20-29").wantStatus(206).wantHit().multipart()
		if want := []string{whole[1:4], whole[size-2:], whole[20:30]}; fmt.Sprint(parts) != fmt.Sprint(want) {
			t.Errorf("parts %q, want %q", parts, want)
		}
	}
}

// multipart takes an answer with several ranges apart.
func (g *got) multipart() (parts []string) {
	g.Helper()
	_, params, err := mime.ParseMediaType(g.header.Get("Content-Type"))
	if err != nil {
		g.Fatal(err)
	}
	r := multipart.NewReader(strings.NewReader(g.text), params["boundary"])
	for {
		p, err := r.NextPart()
		if err != nil {
			return parts
		}
		b, err := io.ReadAll(p)
		if err != nil {
			g.Fatal(err)
		}
		parts = append(parts, string(b))
	}
}

// A body that is sent without net/http's help has the headers that it would have had.
func TestConditionThatChangesNothing(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a.deb", "body").etag(`"1"`)
	tt.origin.file("/a.tar", "coded").says("Content-Encoding", "gzip")
	tt.origin.file("/empty", "")
	for _, path := range []string{"/api/r/a.deb", "/api/r/a.tar", "/api/r/empty"} {
		tt.get(path, "Accept-Encoding: gzip").wantMiss()
		plain := tt.get(path, "Accept-Encoding: gzip", "X-Request-Id: 1").wantHit()
		condition := tt.get(path, "Accept-Encoding: gzip", "X-Request-Id: 1", `If-None-Match: "other"`).wantHit()
		for _, name := range []string{"Date", "Age"} { // a second may have passed
			delete(plain.header, name)
			delete(condition.header, name)
		}
		if plain.text != condition.text || !reflect.DeepEqual(plain.header, condition.header) {
			t.Errorf("%s:\n%v\nis answered, and with a condition that does not hold\n%v", path, plain.header, condition.header)
		}
	}
}

func TestHEADIgnoresRange(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "0123456789").etag(`"1"`)
	for range 2 { // not stored, stored
		tt.head("/api/r/a", "Range: bytes=2-3").wantStatus(200).wantHeader("Content-Length", "10").wantHeader("Content-Range", "")
		tt.head("/api/r/a", "Range: bytes=20-").wantStatus(200)
		tt.get("/api/r/a")
	}
}

func TestTooManyRangesAreIgnored(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 5000)
	tt.origin.file("/a", text)
	tt.get("/api/r/a")
	spec := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, ",%d-%d", 4*i, 4*i)
		}
		return "Range: bytes=" + b.String()[1:]
	}
	if n := len(tt.get("/api/r/a", spec(1000)).wantStatus(206).multipart()); n != 1000 {
		t.Errorf("%d parts for 1,000 ranges", n)
	}
	tt.get("/api/r/a", spec(1001)).wantStatus(200).wantBody(text)
}

func TestHEADOfWhatIsNotStored(t *testing.T) {
	t.Parallel()
	for _, refusal := range []int{0, 400, 401, 403, 405, 501} {
		t.Run(strconv.Itoa(refusal), func(t *testing.T) {
			t.Parallel()
			tt := newTester(t)
			f := tt.origin.file("/a.zip", noise(1, 1<<20)).refusesHEAD(refusal)
			release := f.stallAt(1000) // a client that reads the body waits forever
			defer release()
			g := tt.head("/api/r/a.zip").wantStatus(200).wantUnstored().wantHeader("Content-Length", strconv.Itoa(1<<20)).
				wantHeader("Last-Modified", longAgo.Format(http.TimeFormat)).wantHeader("Content-Type", "application/zip").wantBody("")
			if g.header.Get("ETag") != "" {
				t.Error("an ETag before the hash is known")
			}
			tt.wantStored("a.zip", false)
			tt.wantRequests("HEAD /a.zip", 1)
			tt.wantRequests("GET /a.zip", min(refusal, 1))
			tt.head("/api/r/none").wantStatus(404).wantBody("")
		})
	}
}

// Where HEAD is refused and there is no first byte to ask for, the file is empty.
func TestHEADOfAnEmptyFileThatRefusesHEAD(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a.zip", "").acts(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/xml")
		w.Header().Set("Content-Range", "bytes */0")
		if r.Method == "HEAD" {
			w.WriteHeader(http.StatusForbidden)
		} else if r.Header.Get("Range") != "" {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			_, _ = io.WriteString(w, "<Error/>")
		}
	})
	tt.head("/api/r/a.zip").wantStatus(200).wantUnstored().wantHeader("Content-Length", "0").wantHeader("Content-Type", "application/zip")
	tt.get("/api/r/a.zip").wantStatus(200).wantBody("")
}

// The whole may be as long as it likes where its first byte comes (RFC 9110 section 14.4).
func TestHEADOfAFileOfUnknownLengthThatRefusesHEAD(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a.zip", "").acts(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-0/*")
		w.WriteHeader(map[string]int{"HEAD": http.StatusForbidden, "GET": http.StatusPartialContent}[r.Method])
	})
	tt.head("/api/r/a.zip").wantStatus(200).wantUnstored().wantHeader("Content-Length", "").wantHeader("Content-Type", "application/zip")
}

// net/http answers another unit with 416, and the last byte of nothing with
// "Content-Range: bytes 0--1/0".
func TestRangesThatNetHTTPMistakesAreIgnored(t *testing.T) {
	t.Parallel()
	tt := setup{env: map[string]string{"API_TOKEN": "t"}}.start(t)
	tt.origin.file("/a", "")
	tt.origin.file("/b", "text")
	tt.get("/api/r/b", "Range: items=0-1").wantStatus(200).wantBody("text")
	tt.get("/api/r/b", "Range: items=0-1").wantHit().wantStatus(200).wantBody("text")
	for _, spec := range []string{"bytes=-1", "bytes=0-0", "bytes=5-", "bytes=-1,-2"} {
		for range 2 {
			tt.get("/api/r/a", "Range: "+spec).wantStatus(200).wantBody("").wantHeader("Content-Range", "")
		}
		tt.delete("/artifacts/r/a", bearer).wantStatus(204)
	}
}

func TestUpstreamsErrorsAreTranslated(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		upstream, status int
		detail           string
		header           []string
	}{
		{404, 404, "404", nil},
		{410, 410, "410", nil},
		{401, 502, `remote \"r\" wants credentials`, nil},
		{403, 403, "upstream", nil},
		{429, 503, "429", []string{"Retry-After: 7"}},
		{503, 502, "503", []string{"Retry-After: 7"}}, // and no retry before
		{400, 400, "400", nil},
		{418, 418, "418", nil},
		{451, 451, "451", nil},
		{499, 499, "499", nil},
		{500, 502, "500", nil},
		{501, 502, "501", nil},
		{201, 502, "201", nil},
		{204, 502, "204", nil},
		{206, 502, "206", []string{"Content-Range: bytes 0-3/9"}},
		{304, 502, "304", nil},
		{300, 502, "300", nil},
	} {
		t.Run(strconv.Itoa(c.upstream), func(t *testing.T) {
			t.Parallel()
			tt := newTester(t)
			tt.origin.troubled(answers(c.upstream, c.header...))
			g := tt.get("/api/r/a").wantDetail(c.status, c.detail)
			retry := ""
			if c.upstream == 429 || c.upstream == 503 {
				retry = "7"
			}
			g.wantHeader("Retry-After", retry).wantHeader("X-Artifact-Source", "").wantHeader("Content-Type", "application/json")
			tt.wantStored("a", false)
			tt.wantRequests("/a", 1)
			tt.wantNoSpools()
		})
	}
}

func TestPassingFailuresAreRetriedTwice(t *testing.T) {
	for _, status := range []int{502, 503, 504} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				tt := newBubbleTester(t)
				tt.origin.troubled(answers(status))
				tt.get("/api/r/a").wantDetail(502, strconv.Itoa(status))
				tt.wantRequests("/a", 3)
			})
		})
	}
}

func TestNothingIsRetriedWithACopy(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t, `mutable_patterns: ["."]`, "stale_if_error: true")
		tt.origin.file("/a", "body")
		tt.get("/api/r/a")
		tt.advance(2 * time.Hour)
		tt.origin.forget()
		tt.origin.troubled(answers(503))
		began := time.Now()
		tt.get("/api/r/a").wantFrom("cache", "hit; ttl=-N; detail=upstream-503").wantBody("body")
		tt.wantRequests("/a", 1)
		if d := time.Since(began); d > 0 {
			t.Errorf("the copy came after %v", d)
		}
	})
}

func TestUnreachableWithoutACopy(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t, "timeout: 7")
		tt.down()
		tt.get("/api/r/a").wantDetail(502, "unreachable")
		tt.upAgain()
		tt.origin.troubled(tt.origin.stalls)
		began := time.Now()
		tt.get("/api/r/a").wantDetail(504, "timed out")
		if d := time.Since(began); d != 7*time.Second {
			t.Errorf("timed out after %v, want the timeout of 7s", d)
		}
		tt.origin.troubled(nil)
		tt.origin.file("/a", "body")
		tt.get("/api/r/a").wantMiss().wantBody("body")
	})
}

func TestNeitherStoreNorUpstreamIs503(t *testing.T) {
	t.Parallel()
	broken := &brokenObjects{}
	tt := setup{objects: broken.wrap}.start(t)
	tt.origin.file("/a", "body")
	broken.failOpen(fmt.Errorf("%w: test", errStoreDown))
	tt.get("/api/r/a").wantStatus(200).wantBody("body") // the upstream still has it
	tt.get("/api/r/missing").wantStatus(404)
	tt.down()
	tt.get("/api/r/b").wantDetail(503, "neither")
	tt.get("/api/r/missing").wantDetail(503, "neither") // the store may have it
	broken.failOpen(nil)
	tt.get("/api/r/b").wantStatus(502)
	tt.get("/api/r/missing").wantStatus(404)
}

func TestUnknownMethods(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"} {
		tt.send(method, "/api/r/a", nil).wantDetail(405, method).wantHeader("Allow", "GET, HEAD")
	}
	for _, path := range []string{"/", "/health", "/config", "/metrics"} {
		tt.send("POST", path, nil).wantStatus(405).wantHeader("Allow", "GET, HEAD")
	}
	tt.send("POST", "/artifacts/r", nil).wantStatus(405)
	if n := len(tt.origin.all()); n > 0 {
		t.Errorf("the origin was asked %d times", n)
	}
}

// --- expiry (section 5) ---

func TestImmutableIsForEver(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "old")
	tt.get("/api/r/a")
	tt.origin.file("/a", "new")
	tt.advance(20 * 365 * 24 * time.Hour)
	tt.get("/api/r/a").wantFrom("cache", "hit").wantBody("old")
	tt.wantRequests("/a", 1)
}

func TestImmutableTTL(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "cache: {immutable_ttl: 600}", "check_mutable_updates: true")
	tt.origin.file("/a", "old").etag(`"1"`)
	tt.get("/api/r/a")
	tt.advance(570 * time.Second)
	tt.get("/api/r/a").wantHit()
	tt.advance(31 * time.Second)
	tt.get("/api/r/a").wantRevalidated().wantBody("old")
	tt.wantRequests("GET /a", 1)
	tt.wantRequests("HEAD /a", 1)
	tt.advance(601 * time.Second)
	tt.down()
	tt.get("/api/r/a").wantStale()
	tt.advance(590 * time.Second) // refreshed in full
	tt.get("/api/r/a").wantHit()
	tt.advance(20 * time.Second)
	tt.get("/api/r/a").wantStale()
}

func TestMutableWithinItsTTL(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`, "cache: {mutable_ttl: 300}")
	tt.origin.file("/a", "old")
	tt.get("/api/r/a")
	tt.origin.file("/a", "new")
	tt.advance(298 * time.Second)
	tt.get("/api/r/a").wantHit().wantBody("old")
	tt.wantRequests("/a", 1)
	tt.advance(3 * time.Second)
	tt.get("/api/r/a").wantRefetched().wantBody("new")
	tt.get("/api/r/a").wantHit().wantBody("new")
	tt.wantRequests("/a", 2)
}

func TestExpiredIsFetchedUnconditionally(t *testing.T) {
	t.Parallel()
	for what, keys := range map[string][]string{
		"user pattern, no checks":             {`mutable_patterns: ["repomd"]`},
		"built-in, checks of user patterns":   {"package: rpm", "check_mutable_updates: true"},
		"both match: it counts as a built-in": {"package: rpm", "check_mutable_updates: true", `mutable_patterns: ["repomd"]`},
		"user pattern, checks of built-ins":   {`mutable_patterns: ["repomd"]`, "check_builtin_updates: true"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			tt := newTester(t, keys...)
			tt.origin.file("/repodata/repomd.xml", "one").etag(`"1"`)
			tt.get("/api/r/repodata/repomd.xml").wantMiss()
			tt.advance(2 * time.Hour)
			tt.get("/api/r/repodata/repomd.xml").wantRefetched().wantBody("one")
			tt.wantRequests("HEAD /repodata/repomd.xml", 0)
			tt.wantRequests("GET /repodata/repomd.xml", 2)
			if h := tt.origin.last("/repodata/repomd.xml").header; h.Get("If-None-Match")+h.Get("If-Modified-Since") != "" {
				t.Errorf("the refetch was conditional: %v", h)
			}
			tt.get("/api/r/repodata/repomd.xml").wantHit()
		})
	}
}

func TestCheckedUpdates(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		keys []string
		path string
	}{
		"user pattern":             {[]string{`mutable_patterns: ["idx$"]`, "check_mutable_updates: true"}, "a.idx"},
		"built-in":                 {[]string{"package: alpine", "check_builtin_updates: true"}, "APKINDEX.tar.gz"},
		"built-in, both asked for": {[]string{"package: alpine", "check_builtin_updates: true", "check_mutable_updates: true"}, "APKINDEX.tar.gz"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			tt := newTester(t, c.keys...)
			path, up := "/api/r/"+c.path, "/"+c.path
			tt.origin.file(up, "one").etag(`"1"`)
			tt.get(path).wantMiss()
			tt.advance(2 * time.Hour)

			tt.get(path).wantRevalidated().wantBody("one")
			s := tt.origin.last("HEAD " + up)
			if s.header.Get("If-None-Match") != `"1"` || s.header.Get("If-Modified-Since") != longAgo.Format(http.TimeFormat) {
				t.Errorf("HEAD without the validators of the first answer: %v", s.header)
			}
			tt.wantRequests("GET "+up, 1)
			tt.get(path).wantHit() // refreshed in place
			tt.wantRequests(up, 2)

			tt.advance(2 * time.Hour)
			tt.origin.file(up, "two").etag(`"2"`).at(longAgo.Add(time.Hour))
			tt.get(path).wantRefetched().wantBody("two")
			tt.wantRequests("HEAD "+up, 2)
			tt.wantRequests("GET "+up, 2)
			tt.get(path).wantHit().wantBody("two")
		})
	}
}

func TestValidatorsAreSentWhenKnown(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what         string
		etag         string
		dated        bool
		sameTag      bool
		want         func(*got) *got
		heads, gets  int
		ifTag, ifMod bool
	}{
		{"both", `"1"`, true, false, (*got).wantRevalidated, 1, 1, true, true},
		{"the ETag alone", `"1"`, false, false, (*got).wantRevalidated, 1, 1, true, false},
		{"a weak ETag", `W/"1"`, false, false, (*got).wantRevalidated, 1, 1, true, false},
		{"the date alone", "", true, false, (*got).wantRevalidated, 1, 1, false, true},
		{"none", "", false, false, (*got).wantRefetched, 1, 2, false, false},
		{"a 200 with the same strong ETag is no change", `"1"`, true, true, (*got).wantRevalidated, 1, 1, true, true},
		{"a 200 with the same weak ETag may be one", `W/"1"`, true, true, (*got).wantRefetched, 1, 2, true, true},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			tt := newTester(t, `mutable_patterns: ["."]`, "check_mutable_updates: true")
			f := tt.origin.file("/a", "body")
			if c.etag != "" {
				f.etag(c.etag)
			}
			if !c.dated {
				f.undated()
			}
			tt.get("/api/r/a").wantMiss()
			if c.sameTag { // an origin that ignores conditions
				f.acts(answers(200, "ETag: "+c.etag))
			}
			tt.advance(2 * time.Hour)
			c.want(tt.get("/api/r/a"))
			tt.wantRequests("HEAD /a", c.heads)
			tt.wantRequests("GET /a", c.gets)
			h := tt.origin.last("HEAD /a").header
			if (h.Get("If-None-Match") != "") != c.ifTag || (h.Get("If-Modified-Since") != "") != c.ifMod {
				t.Errorf("HEAD with %v", h)
			}
		})
	}
}

func TestRefusedHEADBecomesAConditionalGET(t *testing.T) {
	t.Parallel()
	for _, status := range []int{400, 401, 403, 404, 405, 501} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			t.Parallel()
			tt := newTester(t, `mutable_patterns: ["."]`, "check_mutable_updates: true", "cache: {mutable_ttl: 60}")
			f := tt.origin.file("/a", "body").etag(`"1"`).refusesHEAD(status)
			tt.origin.file("/b", "bbb").etag(`"b"`).refusesHEAD(status)
			tt.get("/api/r/a").wantMiss()
			tt.get("/api/r/b").wantMiss()
			tt.advance(2 * time.Minute)
			tt.get("/api/r/a").wantRevalidated().wantBody("body")
			tt.wantRequests("HEAD /a", 1)
			tt.wantRequests("GET /a", 2)
			if tt.origin.last("GET /a").header.Get("If-None-Match") != `"1"` {
				t.Error("the GET was not conditional")
			}
			tt.get("/api/r/b").wantRevalidated()
			ofRemote := status == 405 || status == 501 // remembered for the whole remote, else for the file
			tt.wantRequests("HEAD /b", map[bool]int{true: 0, false: 1}[ofRemote])

			tt.advance(50 * time.Minute)
			tt.origin.file("/a", "new").etag(`"2"`).at(longAgo.Add(time.Hour)).refusesHEAD(status)
			tt.get("/api/r/a").wantRefetched().wantBody("new")
			tt.wantRequests("HEAD /a", 1)
			tt.wantRequests("GET /a", 3) // the conditional GET brought the new body along

			tt.advance(time.Hour) // forgotten: HEAD is tried again
			f.refusesHEAD(0)
			tt.origin.file("/a", "new").etag(`"2"`).at(longAgo.Add(time.Hour))
			tt.get("/api/r/a").wantRevalidated()
			tt.wantRequests("HEAD /a", 2)
			tt.wantRequests("GET /a", 3)
		})
	}
}

// Builds that can be repeated date their files 1970, which net/http takes for no date.
func TestDateOfTheEpochIsADate(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	const epoch = "Thu, 01 Jan 1970 00:00:00 GMT"
	tt.origin.file("/a", "text").acts(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Last-Modified", epoch)
		_, _ = io.WriteString(w, "text")
	})
	tt.get("/api/r/a").wantMiss().wantHeader("Last-Modified", epoch)
	tt.get("/api/r/a").wantHit().wantHeader("Last-Modified", epoch)
	tt.get("/api/r/a", "Range: bytes=1-").wantStatus(206).wantHeader("Last-Modified", epoch)
	tt.head("/api/r/a").wantStatus(200).wantHeader("Last-Modified", epoch)
}

// Programs that do not know the date of a file send the first day of their calendar.
func TestDateOfTheYearOneIsNone(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`, "check_mutable_updates: true")
	tt.origin.file("/a", "text").undated().says("Last-Modified", "Mon, 01 Jan 0001 00:00:00 GMT")
	first := tt.get("/api/r/a").wantMiss().header.Get("Last-Modified")
	if first == "" {
		t.Error("no Last-Modified: want the date of the first fetch")
	}
	tt.advance(2 * time.Hour)
	tt.get("/api/r/a").wantRefetched().wantHeader("Last-Modified", first)
	if since := tt.origin.last("HEAD /a").header.Get("If-Modified-Since"); since != "" {
		t.Errorf("asked with If-Modified-Since %q", since)
	}
}

// A record is JSON, which has no bytes that are not UTF-8: they would come back as others.
func TestHeadersThatAreNotUTF8AreNotKept(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`, "check_mutable_updates: true")
	tt.origin.file("/a", "text").etag("\"caf\xe9\"").says("Content-Type", "text/x; n=\xe9")
	tt.get("/api/r/a").wantMiss().wantHeader("Content-Type", "application/octet-stream")
	tt.get("/api/r/a").wantHit().wantHeader("Content-Type", "application/octet-stream")
	tt.advance(2 * time.Hour)
	tt.get("/api/r/a").wantRevalidated()
	if tag := tt.origin.last("HEAD /a").header.Get("If-None-Match"); tag != "" {
		t.Errorf("asked with If-None-Match %q", tag)
	}
}

// A 304 that names another version is not believed: a front of upstream's may have
// answered for an old copy of its own.
func TestNotModifiedThatNamesAnotherVersion(t *testing.T) {
	t.Parallel()
	date, later := longAgo.Format(http.TimeFormat), longAgo.Add(time.Hour).Format(http.TimeFormat)
	for _, c := range []struct {
		name     string
		old, now http.Header
		changed  bool
	}{
		{"the same ETag", http.Header{"Etag": {`"1"`}}, http.Header{"Etag": {`"1"`}}, false},
		{"the same ETag, weakly", http.Header{"Etag": {`"1"`}}, http.Header{"Etag": {`W/"1"`}}, false},
		{"another ETag", http.Header{"Etag": {`"1"`}}, http.Header{"Etag": {`"2"`}}, true},
		{"the same ETag, another date", http.Header{"Etag": {`"1"`}, "Last-Modified": {date}}, http.Header{"Etag": {`"1"`}, "Last-Modified": {later}}, false},
		{"no ETag, another date", http.Header{"Etag": {`"1"`}, "Last-Modified": {date}}, http.Header{"Last-Modified": {later}}, true},
		{"only now an ETag, another date", http.Header{"Last-Modified": {date}}, http.Header{"Etag": {`"2"`}, "Last-Modified": {later}}, true},
		{"nothing at all, not even asked for", http.Header{}, http.Header{}, true},
		{"nothing", http.Header{"Etag": {`"1"`}, "Last-Modified": {date}}, http.Header{}, false},
	} {
		for _, refusesHEAD := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, HEAD refused: %v", c.name, refusesHEAD), func(t *testing.T) {
				t.Parallel()
				tt := newTester(t, `mutable_patterns: ["."]`, "check_mutable_updates: true")
				first := true
				tt.origin.file("/a", "").acts(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Del("Last-Modified")
					conditional := r.Header.Get("If-None-Match")+r.Header.Get("If-Modified-Since") != ""
					switch {
					case r.Method == http.MethodHead && refusesHEAD:
						w.WriteHeader(http.StatusForbidden)
					case first:
						maps.Copy(w.Header(), c.old)
						_, _ = io.WriteString(w, "old")
						first = false
					case conditional, r.Method == http.MethodHead:
						maps.Copy(w.Header(), c.now)
						w.WriteHeader(http.StatusNotModified)
					default:
						_, _ = io.WriteString(w, "new")
					}
				})
				tt.get("/api/r/a").wantMiss().wantBody("old")
				tt.advance(2 * time.Hour)
				if c.changed {
					tt.get("/api/r/a").wantRefetched().wantBody("new")
				} else {
					tt.get("/api/r/a").wantRevalidated().wantBody("old")
				}
			})
		}
	}
}

func TestRevalidationFollowsRedirects(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`, "check_mutable_updates: true")
	tt.origin.file("/a", "").acts(http.RedirectHandler("/real", http.StatusFound).ServeHTTP)
	tt.origin.file("/real", "body").etag(`"1"`)
	tt.get("/api/r/a").wantMiss().wantBody("body")
	tt.advance(2 * time.Hour)
	tt.get("/api/r/a").wantRevalidated().wantBody("body")
	if tt.origin.last("HEAD /real").header.Get("If-None-Match") != `"1"` {
		t.Error("the redirected HEAD was not conditional")
	}
}

func TestGoneUpstreamEvicts(t *testing.T) {
	t.Parallel()
	for what, keys := range map[string][]string{
		"refetched": {`mutable_patterns: ["."]`, "stale_if_error: true"},
		"checked":   {`mutable_patterns: ["."]`, "stale_if_error: true", "check_mutable_updates: true"},
	} {
		for _, status := range []int{404, 410} {
			t.Run(what+strconv.Itoa(status), func(t *testing.T) {
				t.Parallel()
				tt := newTester(t, keys...)
				tt.origin.file("/a", "body").etag(`"1"`)
				tt.get("/api/r/a")
				tt.origin.file("/a", "").answering(status)
				tt.advance(2 * time.Hour)
				tt.get("/api/r/a").wantStatus(status)
				tt.wantStored("a", false)
				if l := tt.list("r"); len(l) > 0 {
					t.Errorf("still listed: %+v", l)
				}
				tt.origin.troubled(answers(500))
				tt.get("/api/r/a").wantStatus(502) // nothing is left to be stale
			})
		}
	}
}

func TestErrorsOfUpstreamReachTheClient(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ upstream, status int }{{500, 502}, {503, 502}, {403, 403}, {429, 503}, {401, 502}, {400, 400}, {204, 502}} {
		for what, check := range map[string]string{"refetched": "check_mutable_updates: false", "checked": "check_mutable_updates: true"} {
			t.Run(what+strconv.Itoa(c.upstream), func(t *testing.T) {
				t.Parallel()
				tt := newTester(t, `mutable_patterns: ["."]`, check)
				tt.origin.file("/a", "body").etag(`"1"`)
				tt.get("/api/r/a")
				tt.advance(2 * time.Hour)
				tt.origin.troubled(answers(c.upstream))
				tt.get("/api/r/a").wantStatus(c.status)
				tt.get("/api/r/a").wantStatus(c.status) // normal expiry: not refreshed
				tt.wantStored("a", true)                // but kept aside
				tt.origin.troubled(nil)
				tt.down()
				tt.get("/api/r/a").wantStale().wantBody("body") // for an outage
			})
		}
	}
}

func TestStaleIfError(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		upstream int
		stale    bool
	}{{500, true}, {502, true}, {503, true}, {429, true}, {403, false}, {401, false}, {400, false}} {
		t.Run(strconv.Itoa(c.upstream), func(t *testing.T) {
			t.Parallel()
			tt := newTester(t, `mutable_patterns: ["."]`, "stale_if_error: true")
			tt.origin.file("/a", "body")
			tt.get("/api/r/a")
			tt.advance(2 * time.Hour)
			tt.origin.troubled(answers(c.upstream))
			for range 2 {
				g := tt.get("/api/r/a")
				if c.stale {
					g.wantStatus(200).wantBody("body").wantFrom("cache", "hit; ttl=-N; detail=upstream-"+strconv.Itoa(c.upstream))
				} else if g.status == 200 {
					t.Errorf("%d was hidden behind the copy", c.upstream)
				}
			}
			tt.origin.troubled(nil)
			tt.get("/api/r/a").wantRefetched() // not refreshed by errors
		})
	}
}

func TestUnreachableKeepsTheCopyAndRefreshesItsTTL(t *testing.T) {
	t.Parallel()
	for what, breakIt := range map[string]func(tt *tester, keys ...string){
		"refused": func(tt *tester, keys ...string) { tt.down() },
		"reset":   func(tt *tester, keys ...string) { tt.origin.troubled(tt.origin.resets) },
		"no name": func(tt *tester, keys ...string) { tt.moveUpstream("http://no-such-name.invalid", keys...) },
		"no TLS": func(tt *tester, keys ...string) {
			tt.moveUpstream(strings.Replace(tt.origin.url, "http:", "https:", 1), keys...)
		},
		"no HTTP": func(tt *tester, keys ...string) {
			tt.origin.troubled(func(w http.ResponseWriter, r *http.Request) {
				conn, _, _ := http.NewResponseController(w).Hijack()
				_, _ = io.WriteString(conn, "220 mail.example ESMTP\r\n")
				conn.Close()
			})
		},
	} {
		for _, check := range []string{"check_mutable_updates: false", "check_mutable_updates: true"} {
			t.Run(what+", "+check, func(t *testing.T) {
				t.Parallel()
				keys := []string{`mutable_patterns: ["."]`, check, "cache: {mutable_ttl: 1000}"}
				tt := newTester(t, keys...)
				tt.origin.file("/a", "body").etag(`"1"`)
				tt.get("/api/r/a")
				tt.advance(2000 * time.Second)
				breakIt(tt, keys...)
				tt.get("/api/r/a").wantStatus(200).wantStale().wantBody("body")
				asked := len(tt.origin.all())
				tt.advance(990 * time.Second)
				tt.get("/api/r/a").wantHit().wantBody("body")
				if n := len(tt.origin.all()); n != asked {
					t.Errorf("upstream was asked within the refreshed TTL: %v", tt.origin.all())
				}
				tt.advance(20 * time.Second)
				tt.get("/api/r/a").wantStale() // and no longer
			})
		}
	}
}

func TestTimeoutKeepsTheCopyAndRefreshesItsTTL(t *testing.T) {
	for _, c := range []struct {
		keys []string
		wait time.Duration
	}{
		{[]string{"check_mutable_updates: false", "timeout: 4"}, 4 * time.Second},
		{[]string{"check_mutable_updates: true", "timeout: 4"}, 4 * time.Second},
		{[]string{"check_mutable_updates: false"}, 10 * time.Second}, // not the default of 30 s: package managers give up
	} {
		t.Run(fmt.Sprint(c.keys), func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				tt := newBubbleTester(t, append(c.keys, `mutable_patterns: ["."]`, "cache: {mutable_ttl: 1000}")...)
				tt.origin.file("/a", "body").etag(`"1"`)
				tt.get("/api/r/a")
				tt.advance(2000 * time.Second)
				tt.origin.troubled(tt.origin.stalls)
				began := time.Now()
				tt.get("/api/r/a").wantStale().wantBody("body")
				if d := time.Since(began); d != c.wait {
					t.Errorf("stale after %v, want %v", d, c.wait)
				}
				tt.advance(990 * time.Second)
				tt.get("/api/r/a").wantHit()
				tt.advance(20 * time.Second)
				tt.get("/api/r/a").wantStale()
			})
		})
	}
}

func TestDownRemoteIsStaleAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t, `mutable_patterns: ["."]`, "cache: {mutable_ttl: 60}", "timeout: 5")
		for _, p := range []string{"/a", "/b"} {
			tt.origin.file(p, "body of "+p)
			tt.get("/api/r" + p)
		}
		tt.advance(2 * time.Minute)
		tt.origin.troubled(tt.origin.stalls)
		tt.get("/api/r/a").wantStale() // after 5 s; the remote is down from here on
		tt.origin.forget()
		began := time.Now()
		tt.get("/api/r/b").wantStale().wantBody("body of /b")
		tt.get("/api/r/b").wantStale()
		if d := time.Since(began); d > 0 {
			t.Errorf("a known outage took %v", d)
		}
		tt.wantRequests("/b", 0)
		tt.get("/api/r/c").wantStatus(504) // without a copy it is tried
		tt.wantRequests("/c", 1)

		tt.advance(11 * time.Second)
		tt.origin.troubled(nil)
		tt.get("/api/r/b").wantRefetched() // its TTL was not refreshed; this was the probe
		tt.wantRequests("/b", 1)
	})
}

func TestBrokenReplacementLeavesTheOldCopy(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`, "cache: {mutable_ttl: 60}")
	tt.origin.file("/a", "old")
	tt.get("/api/r/a")
	tt.advance(2 * time.Minute)
	next := noise(1, 1<<20)
	tt.origin.file("/a", next).noRanges().cut(500_000)
	tt.get("/api/r/a").wantStatus(200).wantStale().wantBody("old")
	tt.get("/api/r/a").wantHit().wantBody("old") // refreshed
	tt.advance(2 * time.Minute)
	tt.get("/api/r/a").wantRefetched().wantBody(next)
	tt.wantNoSpools()
}

func TestReplacementIsWholeBeforeItIsSent(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t, `mutable_patterns: ["."]`)
		tt.origin.file("/a", "old")
		tt.get("/api/r/a")
		next := noise(1, 100_000)
		for _, c := range []struct {
			what string
			late time.Duration // upstream's headers
			held time.Duration
			wait time.Duration // until the client has its headers
		}{
			{"a quick one is sent when it is complete", 0, 3 * time.Second, 3 * time.Second},
			{"a slow one begins after ten seconds", 0, 25 * time.Second, 10 * time.Second},
			{"the wait for upstream is part of them", 9 * time.Second, 25 * time.Second, 10 * time.Second},
		} {
			tt.advance(2 * time.Hour)
			f := tt.origin.file("/a", next)
			release := f.stallAt(50_000)
			if c.late > 0 {
				f.acts(func(w http.ResponseWriter, r *http.Request) {
					time.Sleep(c.late)
					w.Header().Set("Content-Length", strconv.Itoa(len(next)))
					_, _ = io.WriteString(w, next[:50_000])
					_ = http.NewResponseController(w).Flush()
					time.Sleep(c.held - c.late)
					_, _ = io.WriteString(w, next[50_000:])
				})
			}
			timer := time.AfterFunc(c.held, release)
			began := time.Now()
			s := tt.open("/api/r/a")
			if d := time.Since(began); d != c.wait {
				t.Errorf("%s: headers after %v", c.what, d)
			}
			s.read(50_000)
			s.rest().wantBody(next).wantRefetched()
			if d := time.Since(began); d != c.held {
				t.Errorf("%s: the end after %v", c.what, d)
			}
			s.leave()
			timer.Stop()
			tt.settle()
		}
	})
}

func TestNegativeTTL(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "negative_ttl: 60")
	for _, status := range []int{404, 410} {
		path := fmt.Sprintf("/missing%d", status)
		tt.origin.file(path, "").answering(status)
		for range 3 {
			tt.get("/api/r"+path).wantDetail(status, strconv.Itoa(status))
			tt.head("/api/r" + path).wantStatus(status)
		}
		tt.wantRequests(path, 1)
		tt.origin.file(path, "here now")
		tt.get("/api/r"+path).wantStatus(status).wantFrom("cache", "hit; detail=negative")
		tt.get("/api/r" + path + "?v=2").wantStatus(404)
		tt.advance(61 * time.Second)
		tt.get("/api/r" + path).wantMiss().wantBody("here now")
	}
	tt.origin.file("/failing", "").answering(403)
	tt.get("/api/r/failing").wantStatus(403)
	tt.get("/api/r/failing").wantStatus(403)
	tt.wantRequests("/failing", 2) // other errors are not remembered
}

// What one upstream did not have another one may have.
func TestAnotherUpstreamIsAskedForWhatWasMissing(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "negative_ttl: 60")
	other := tt.another()
	other.file("/a", "body")
	tt.get("/api/r/a").wantStatus(404)
	tt.moveUpstream(tt.origin.url, "negative_ttl: 60")
	tt.get("/api/r/a").wantStatus(404)
	tt.wantRequests("/a", 1) // the remote is what it was
	tt.moveUpstream(other.url, "negative_ttl: 60")
	tt.get("/api/r/a").wantMiss().wantBody("body")
}

// Some servers answer HEAD with 404 for what GET brings.
func TestWhatHEADDoesNotFindGETMay(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "negative_ttl: 60")
	tt.origin.file("/a", "body").acts(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		io.WriteString(w, "body")
	})
	tt.head("/api/r/a").wantStatus(404)
	tt.head("/api/r/a").wantStatus(404)
	tt.wantRequests("HEAD /a", 1)
	tt.get("/api/r/a").wantMiss().wantBody("body")
}

func TestNegativeTTLIsBounded(t *testing.T) {
	t.Parallel()
	missing := newTester(t).cache.missing
	for i := range maxRememberedFiles + 10 {
		missing.putFor(strconv.Itoa(i), missingFile{status: 404}, time.Hour)
	}
	_, last := missing.get(strconv.Itoa(maxRememberedFiles + 9))
	if n := len(missing.keys()); n != maxRememberedFiles || maxRememberedFiles != 100_000 || !last {
		t.Errorf("%d missing files are remembered, the last one: %v", n, last)
	}
}

func TestNegativeTTLMayBeLongerThanADay(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "negative_ttl: 172800")
	tt.get("/api/r/a").wantStatus(404)
	tt.advance(47 * time.Hour)
	tt.get("/api/r/a").wantStatus(404).wantFrom("cache", "hit; detail=negative")
	tt.advance(2 * time.Hour)
	tt.down()
	tt.get("/api/r/a").wantStatus(502)
}

func TestMissingFilesAreAskedForAgainWithoutNegativeTTL(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.get("/api/r/a").wantStatus(404)
	tt.origin.file("/a", "body")
	tt.get("/api/r/a").wantMiss()
}

// What upstream did not have within the last day is missing while it cannot be reached.
func TestMissingFilesAreMissingInAnOutage(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	wantRecalled := func(g *got) {
		t.Helper()
		g.wantStatus(404).wantFrom("cache", "hit; detail=unreachable")
	}
	tt.get("/api/r/a").wantStatus(404)
	tt.head("/api/r/b").wantStatus(404)
	tt.origin.file("/gone", "").answering(410)
	tt.get("/api/r/gone").wantStatus(410)
	tt.get("/api/r/back").wantStatus(404)
	tt.origin.file("/back", "here again")
	tt.head("/api/r/back").wantStatus(200)
	tt.origin.forget()
	tt.down()
	tt.get("/api/r/a").wantStatus(502) // this one has found out
	for range 3 {
		wantRecalled(tt.get("/api/r/a"))
		wantRecalled(tt.get("/api/r/b"))
		wantRecalled(tt.head("/api/r/gone"))
	}
	tt.get("/api/r/back").wantStatus(502)
	tt.get("/api/r/never").wantStatus(502)
	tt.advance(12 * time.Hour)
	wantRecalled(tt.get("/api/r/a")) // a probe
	tt.advance(13 * time.Hour)
	tt.get("/api/r/a").wantStatus(502)

	tt.upAgain()
	tt.get("/api/r/a").wantStatus(404).wantHeader("Cache-Status", "")
	tt.origin.file("/hangs", "").answering(404)
	tt.get("/api/r/hangs").wantStatus(404)
	tt.origin.file("/hangs", "").acts(tt.origin.resets) // one file does: the remote is not down
	tt.get("/api/r/hangs").wantStatus(502)
}

func TestMirrorsStandIn(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	m := tt.another()
	tt.moveUpstream(tt.origin.url, "mirrors: ["+m.url+"]", "timeout: 5")
	for _, p := range []string{"/a", "/b", "/c"} {
		m.file(p, "mirrored "+p)
	}
	tt.origin.troubled(answers(500))
	tt.get("/api/r/a").wantMiss().wantBody("mirrored /a")
	tt.origin.troubled(tt.origin.resets)
	tt.get("/api/r/b").wantMiss().wantBody("mirrored /b")
	tt.origin.troubled(nil)
	tt.get("/api/r/c").wantMiss().wantBody("mirrored /c") // base_url is asked last for a while
	tt.wantRequests("/c", 0)
	tt.advance(outagePause)
	m.file("/d", "mirrored")
	tt.get("/api/r/d").wantStatus(404) // base_url's word counts
	m.remove("/d")
	tt.origin.troubled(answers(500))
	tt.get("/api/r/d").wantDetail(502, "500") // a mirror's 404 never counts
}

func TestFreshnessSurvivesARestart(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`, "check_mutable_updates: true")
	tt.origin.file("/a", "body").etag(`"1"`)
	tt.get("/api/r/a")
	tt.advance(2 * time.Hour)
	tt.get("/api/r/a").wantRevalidated()
	tt.restart()
	tt.origin.forget()
	tt.advance(30 * time.Minute)
	tt.get("/api/r/a").wantHit()
	tt.wantRequests("/a", 0)
	tt.advance(time.Hour)
	tt.get("/api/r/a").wantRevalidated()
}

func TestMutableTTLZeroChecksEveryTime(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`, "check_mutable_updates: true", "cache: {mutable_ttl: 0}")
	tt.origin.file("/a", "body").etag(`"1"`)
	tt.get("/api/r/a").wantMiss()
	for n := range 3 {
		tt.get("/api/r/a").wantRevalidated()
		tt.wantRequests("HEAD /a", n+1)
	}
	tt.down()
	tt.get("/api/r/a").wantStale()
}

func TestHEADAndRangeOfAnExpiredFileRevalidate(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`, "check_mutable_updates: true")
	tt.origin.file("/a", "body").etag(`"1"`)
	tt.get("/api/r/a")
	tt.advance(2 * time.Hour)
	tt.head("/api/r/a").wantRevalidated().wantHeader("Content-Length", "4")
	tt.wantRequests("HEAD /a", 1)
	tt.advance(2 * time.Hour)
	tt.get("/api/r/a", "Range: bytes=1-2").wantStatus(206).wantRevalidated().wantBody("od")
	tt.wantRequests("HEAD /a", 2)
	tt.wantRequests("GET /a", 1)

	tt.advance(2 * time.Hour)
	tt.origin.file("/a", "longer").etag(`"2"`).at(longAgo.Add(time.Hour))
	tt.head("/api/r/a").wantStatus(200).wantRefetched().wantHeader("Content-Length", "6")
	tt.get("/api/r/a").wantHit().wantBody("longer")
	tt.advance(2 * time.Hour)
	f := tt.origin.file("/a", "another").etag(`"3"`).at(longAgo.Add(2 * time.Hour))
	tt.get("/api/r/a", "Range: bytes=2-3").wantStatus(206).wantRefetched().wantBody("ot")
	tt.get("/api/r/a").wantHit().wantBody("another")

	tt.advance(2 * time.Hour)
	f.answering(404)
	tt.head("/api/r/a").wantStatus(404)
	tt.wantStored("a", false)
}

// list is the first page of a remote's listing.
func (tt *tester) list(remote string) []listedArtifact {
	tt.Helper()
	g := tt.get("/artifacts/" + remote).wantStatus(200)
	var l listing
	if err := json.Unmarshal([]byte(g.text), &l); err != nil {
		tt.Fatal(err)
	}
	return l.Artifacts
}

// brokenObjects are a store that fails on demand.
type brokenObjects struct {
	objects
	mu               sync.Mutex // guards what follows
	opening, putting error
}

func (b *brokenObjects) wrap(o objects) objects {
	b.objects = o
	return b
}

// failOpen makes every open fail; nil ends that.
func (b *brokenObjects) failOpen(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.opening = err
}

// failPut makes every put fail; nil ends that.
func (b *brokenObjects) failPut(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.putting = err
}

func (b *brokenObjects) open(ctx context.Context, key string, off int64) (*object, error) {
	b.mu.Lock()
	err := b.opening
	b.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return b.objects.open(ctx, key, off)
}

func (b *brokenObjects) put(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error {
	b.mu.Lock()
	err := b.putting
	b.mu.Unlock()
	if err != nil {
		return err
	}
	return b.objects.put(ctx, key, rec, spool, when)
}

func TestNegativeTTLOfAFileThatWasEvicted(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`, "negative_ttl: 60")
	tt.origin.file("/a", "old")
	tt.get("/api/r/a").wantMiss()
	tt.advance(2 * 3600e9)
	tt.origin.file("/a", "").answering(404)
	tt.origin.forget()
	tt.get("/api/r/a").wantStatus(404)
	tt.get("/api/r/a").wantStatus(404)
	tt.wantRequests("/a", 1)
}

// watchedBody is read from for ever and notices that it is closed meanwhile.
type watchedBody struct {
	io.ReadSeekCloser
	begun, goOn, closed chan struct{}
	once                sync.Once
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.once.Do(func() { close(b.begun) })
	<-b.goOn
	return b.ReadSeekCloser.Read(p)
}

func (b *watchedBody) Close() error {
	close(b.closed)
	return b.ReadSeekCloser.Close()
}

type watchedObjects struct {
	objects
	body *watchedBody
}

func (o *watchedObjects) open(ctx context.Context, key string, off int64) (*object, error) {
	obj, err := o.objects.open(ctx, key, off)
	if err != nil || obj.body == nil {
		return obj, err
	}
	o.body.ReadSeekCloser = obj.body
	return &object{rec: obj.rec, body: o.body}, nil
}

// goneWriter is a client that leaves.
type goneWriter struct {
	*httptest.ResponseRecorder
	when chan struct{}
}

func (w goneWriter) Write([]byte) (int, error) {
	<-w.when
	return 0, io.ErrClosedPipe
}

// ServeContent reads the parts of a multi-range answer in a goroutine of its
// own, which it leaves behind when the client goes.
func TestMultiRangeClientLeaves(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", noise(1, 1<<20))
	tt.get("/api/r/a").wantStatus(200)
	body := &watchedBody{begun: make(chan struct{}), goOn: make(chan struct{}), closed: make(chan struct{})}
	tt.cache.useObjects(&watchedObjects{tt.cache.objects, body})
	var done sync.WaitGroup
	done.Go(func() {
		defer func() { _ = recover() }() // the aborted connection
		r := httptest.NewRequest("GET", "/api/r/a", nil)
		r.Header.Set("Range", "bytes=0-500000,600000-1000000")
		tt.api.ServeHTTP(goneWriter{httptest.NewRecorder(), body.begun}, r)
	})
	select {
	case <-body.closed:
		t.Error("closed while it is read")
	case <-time.After(200 * time.Millisecond):
	}
	close(body.goOn)
	done.Wait()
	<-body.closed
}

// TestViaFindsLoops: of a client's Via the entries of servers like this one go on
// upstream, 16 at most, and a request that has been here is refused.
func TestViaFindsLoops(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.up.via = "1.1 artifactapi-00000000000000ff"
	entry := func(n int) string { return fmt.Sprintf("1.1 artifactapi-%016x", n) }
	var many []string
	for n := range 20 {
		many = append(many, entry(n))
	}
	last16 := strings.Join(many[4:], ", ")
	for name, c := range map[string]struct {
		via  []string
		want string // in front of ours; "508": refused
	}{
		"none":        {},
		"others":      {via: []string{"1.1 squid, 1.0 artifactapi-0000000000000001", "1.1 artifactapi-1", "1.1 artifactapi-000000000000000G"}},
		"two":         {via: []string{entry(1) + ",1.1 squid (a, b)", entry(2)}, want: entry(1) + ", " + entry(2)},
		"twenty":      {via: many, want: last16},
		"ours":        {via: []string{"1.1 squid, " + tt.up.via}, want: "508"},
		"ours of old": {via: append([]string{tt.up.via}, many...), want: "508"},
	} {
		path, headers := "/"+strings.ReplaceAll(name, " ", "-"), []string{}
		for _, v := range c.via {
			headers = append(headers, "Via: "+v)
		}
		tt.origin.file(path, "body")
		if c.want == "508" {
			tt.get("/api/r"+path, headers...).wantDetail(508, "base_url")
			tt.wantRequests(path, 0)
			continue
		}
		tt.get("/api/r"+path, headers...).wantMiss()
		want := tt.up.via
		if c.want != "" {
			want = c.want + ", " + want
		}
		if got := tt.origin.last(path).header["Via"]; len(got) != 1 || got[0] != want {
			t.Errorf("%s: Via %q, want %q", name, got, want)
		}
	}
}

// A remote whose base_url is this server, by another remote: the loop ends at once, and
// its status comes back through all of it.
func TestLoopIs508(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.configure("remotes: {r: {base_url: " + tt.url + "/api/s}, s: {base_url: " + tt.url + "/api/r}, d: {package: docker, base_url: " + tt.url + "}}")
	tt.get("/api/r/a").wantDetail(508, "come back")
	tt.head("/api/r/a").wantStatus(508)
	g := tt.get("/v2/d/d/image/manifests/latest").wantStatus(508)
	if !strings.HasPrefix(g.text, `{"errors":[{"code":"UNAVAILABLE"`) {
		t.Errorf("below /v2/: %s", g.text)
	}
}

// A folder that is asked for without its slash is no file: the redirect that adds it is
// the answer, for GET and HEAD.
func TestRedirectThatAddsASlashIsPassedOn(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	host := tt.origin.url
	for path, c := range map[string]struct{ location, want string }{
		"/folder":      {"/folder/", "folder/"},
		"/a%20b/c%3Ad": {"/a%20b/c:d/", "c%3Ad/"},
		"/a%2Fb":       {"/a%2Fb/", "a%2Fb/"},
		"/absolute":    {host + "/absolute/", "absolute/"},
		"/tls":         {"https://127.0.0.1:8443/tls/", "tls/"},
		"/queried?x=1": {"/queried/?x=1", "queried/?x=1"},
		"/lost?x=1":    {"/lost/", "lost/?x=1"},
		"/signed":      {"/signed/?X-Amz-Signature=s", ""},
		"/elsewhere":   {"/elsewhere/deeper/", ""},
	} {
		tt.origin.file(path, "").acts(http.RedirectHandler(c.location, http.StatusMovedPermanently).ServeHTTP)
		for _, g := range []*got{tt.get("/api/r" + path), tt.head("/api/v1/remote/r" + path)} {
			if c.want == "" {
				g.wantStatus(404) // it was followed
			} else {
				g.wantStatus(302).wantHeader("Location", c.want)
			}
		}
		tt.wantStored(strings.TrimPrefix(path, "/"), false)
	}
	tt.origin.file("/hop", "").acts(http.RedirectHandler("/folder", http.StatusFound).ServeHTTP)
	tt.origin.file("/folder/", "listing")
	tt.get("/api/r/hop").wantMiss().wantBody("listing") // the slash is not hop's
}

// TestHEADsAreBoundedAndShared: of a crowd that asks by HEAD for files that hang 64 are
// asked for, each once, and GETs are not in their way.
func TestHEADsAreBoundedAndShared(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		release := make(chan struct{})
		tt.origin.troubled(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				<-release
			}
			w.Header().Set("Content-Length", "4")
			io.WriteString(w, "body")
		})
		heads := map[string][]*stream{}
		var mu sync.Mutex // guards heads
		var crowd sync.WaitGroup
		ask := func(ctx context.Context, path string) {
			crowd.Go(func() {
				s := tt.start(ctx, http.MethodHead, path, nil)
				mu.Lock()
				defer mu.Unlock()
				heads[path] = append(heads[path], s)
			})
			synctest.Wait()
		}
		leaving, leave := context.WithCancel(t.Context())
		ask(leaving, "/api/r/same")
		for range 9 {
			ask(t.Context(), "/api/r/same")
		}
		for n := range 80 {
			ask(t.Context(), fmt.Sprintf("/api/r/%d", n))
		}
		if n := len(tt.origin.all()); n != maxPerRemote || maxPerRemote != 64 {
			t.Errorf("%d requests upstream, want 64", n)
		}
		leave() // another one of those that wait asks
		synctest.Wait()
		tt.get("/api/r/a").wantMiss().wantBody("body")
		close(release)
		crowd.Wait()
		tt.wantRequests("HEAD /same", 2)
		gone := 0
		for path, all := range heads {
			for _, s := range all {
				if s.err != nil {
					gone++
					continue
				}
				s.wantStatus(200).wantUnstored().wantHeader("Content-Length", "4")
				s.leave()
			}
			if path != "/api/r/same" {
				tt.wantRequests(strings.TrimPrefix(path, "/api/r"), 1)
			}
		}
		if gone != 1 {
			t.Errorf("%d of 90 got no answer, want the one that left", gone)
		}
	})
}

// TestPassedOnBodiesAreBounded: where nothing can be stored 64 bodies of a remote are
// passed on at once, and the others wait for their turn.
func TestPassedOnBodiesAreBounded(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := setup{bubble: true}.start(t)
		tt.cache.passOn.putFor(testKey("a"), struct{}{}, time.Hour)
		release := tt.origin.file("/a", noise(1, 1<<16)).stallAt(1 << 15)
		var crowd sync.WaitGroup
		for range 70 {
			crowd.Go(func() { tt.get("/api/r/a").wantUnstored() })
		}
		synctest.Wait()
		tt.wantRequests("/a", 64)
		release()
		crowd.Wait()
		tt.wantRequests("/a", 70)
		tt.get("/api/r/a").wantUnstored() // all places are free again
		synctest.Wait()
		if n := len(tt.cache.fills.slotsOf("r").passOns); n != 0 {
			t.Errorf("%d places are still taken", n)
		}
	})
}

func TestAnIndexThatIsStoredForEverIsTold(t *testing.T) {
	t.Parallel()
	for path, warned := range map[string]bool{
		"/repo/index.yaml": true, "/dists/x/InRelease": true, "/simple/pip": true, "/core.db": true, "/lodash": false, "/a.tar.gz": false, "/repo/index.yaml.gz": false,
	} {
		tt := newTester(t)
		tt.origin.file(path, "one")
		tt.get("/api/r" + path).wantMiss()
		tt.origin.file("/b"+path, "two")
		tt.get("/api/r/b" + path).wantMiss()
		if n := len(tt.logs.lines("mutable_patterns and purge")); n > 1 || (n == 1) != warned {
			t.Errorf("%s: %d warnings", path, n)
		}
	}
	signed := newTester(t, "package: deb")
	signed.origin.file("/dists/x/Release", "SHA256:\n "+strings.Repeat("a", 64)+" 1 main/Packages\n")
	signed.origin.file("/dists/x/Release.gpg", "signature")
	signed.get("/api/r/dists/x/Release").wantMiss()
	signed.get("/api/r/dists/x/Release.gpg").wantMiss()
	if lines := signed.logs.lines("mutable_patterns and purge"); len(lines) > 0 {
		t.Errorf("the signature belongs to its root: %q", lines)
	}
	tt := newTester(t)
	tt.origin.file("/lodash", "{}").says("Content-Type", "application/json")
	tt.get("/api/r/lodash").wantMiss()
	tt.wantLog(`"pattern":"^(@[^/]+/)?[^/.]+$"`)
}
