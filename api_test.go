package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// --- local repositories and writing ---

const localYAML = `
remotes:
  r: {base_url: ORIGIN}
  l: {type: local, write_token: own}
  other: {type: local}
  picky:
    type: local
    immutable_patterns: ['\.rpm$']
    mutable_patterns: ['^index/']
`

const bearer = "Authorization: Bearer t"

// newLocalTester starts a server with local repositories and API_TOKEN=t.
func newLocalTester(t testing.TB) *tester {
	t.Helper()
	return setup{yaml: localYAML, env: map[string]string{"API_TOKEN": "t"}}.start(t)
}

func TestLocalRepositoryKeepsWhatIsPut(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	large := noise(1, 300_000)
	tt.get("/api/l/d/a.rpm").wantDetail(404, "")
	tt.put("/api/l/d/a.rpm", "one", bearer).wantStatus(201).wantBody("")
	sum := sha256.Sum256([]byte("one"))
	tt.get("/api/l/d/a.rpm").wantStatus(200).wantFrom("cache", "hit").wantBody("one").
		wantHeader("Content-Type", "application/x-rpm").wantHeader("Content-Length", "3").
		wantHeader("ETag", `"sha256-`+hex.EncodeToString(sum[:])+`"`)
	tt.head("/api/l/d/a.rpm").wantStatus(200).wantHeader("Content-Length", "3")
	tt.put("/api/l/d/a.rpm", large, bearer).wantStatus(200) // replaced
	tt.get("/api/l/d/a.rpm").wantStatus(200).wantBody(large)
	tt.get("/api/l/d/a.rpm", "Range: bytes=5-9").wantStatus(206).wantBody(large[5:10])
	tt.put("/api/l/empty", "", bearer).wantStatus(201)
	tt.get("/api/l/empty").wantStatus(200).wantBody("")
	tt.put("/api/v1/remote/l/x%2By", "plus", bearer).wantStatus(201)
	tt.get("/api/l/x+y").wantBody("plus")
	tt.restart()
	tt.advance(20 * 365 * 24 * time.Hour)
	tt.get("/api/l/d/a.rpm").wantFrom("cache", "hit").wantBody(large)
	list := tt.list("l")
	if len(list) != 3 || list[0].Path != "d/a.rpm" || list[0].Class != local || list[0].ExpiresAt != nil || !list[0].Fresh || list[0].Source != "" {
		t.Errorf("listed as %+v", list)
	}
	tt.delete("/api/l/d/a.rpm", bearer).wantStatus(204)
	tt.get("/api/l/d/a.rpm").wantStatus(404)
	tt.delete("/api/l/d/a.rpm", bearer).wantStatus(404)
	if n := len(tt.origin.all()); n > 0 {
		t.Errorf("the origin was asked %d times", n)
	}
	tt.wantNoSpools()
}

func TestUploadOfUnknownLength(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	text := noise(1, 300_000)
	tt.send("PUT", "/api/l/a", io.MultiReader(strings.NewReader(text[:100]), strings.NewReader(text[100:])), bearer).wantStatus(201)
	tt.get("/api/l/a").wantBody(text)
}

// slowObjects is a store that takes some time for each put.
type slowObjects struct {
	objects
	wait time.Duration
}

func (s *slowObjects) put(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error {
	select {
	case <-time.After(s.wait):
		return s.objects.put(ctx, key, rec, spool, when)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// S3 may need more time for a large upload than a client may be silent.
func TestUploadThatIsStoredSlowly(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		slow := func(o objects) objects { return &slowObjects{o, 3 * clientTimeout} }
		tt := setup{yaml: localYAML, env: map[string]string{"API_TOKEN": "t"}, bubble: true, objects: slow}.start(t)
		tt.put("/api/l/a", "body", bearer).wantStatus(201)
		tt.get("/api/l/a").wantStatus(200).wantBody("body")
	})
}

// A file's TTL runs while it is being stored: nobody asks upstream about it meanwhile.
func TestTTLRunsWhileAFileIsStored(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		slow := func(o objects) objects { return &slowObjects{o, time.Minute} }
		tt := setup{keys: []string{`mutable_patterns: ["x"]`, "cache: {mutable_ttl: 90}"}, bubble: true, objects: slow}.start(t)
		tt.origin.file("/x", "one")
		tt.get("/api/r/x").wantMiss().wantBody("one") // it returns when the file is stored
		time.Sleep(10 * time.Second)
		tt.get("/api/r/x").wantFrom("cache", "hit; ttl=20")
		tt.origin.file("/x", "two")
		time.Sleep(21 * time.Second)
		tt.get("/api/r/x").wantBody("two")
	})
}

// pausingBody is an upload that comes in pieces, with a pause in front of each.
type pausingBody struct {
	pieces []string
	pause  time.Duration
}

func (b *pausingBody) Read(p []byte) (int, error) {
	if len(b.pieces) == 0 {
		return 0, io.EOF
	}
	time.Sleep(b.pause)
	n := copy(p, b.pieces[0])
	b.pieces = b.pieces[1:]
	return n, nil
}

// The deadline for writing answers does not end an upload that lasts longer, or its answer.
func TestUploadThatLasts(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := setup{yaml: localYAML, env: map[string]string{"API_TOKEN": "t"}, bubble: true}.start(t)
		var h1, h2 http.Protocols
		h1.SetHTTP1(true)
		h2.SetUnencryptedHTTP2(true)
		for name, protocols := range map[string]*http.Protocols{"HTTP/1.1": &h1, "HTTP/2.0": &h2} {
			l := newPipeListener()
			srv := &http.Server{Handler: tt, Protocols: protocols}
			go srv.Serve(l)
			client := &http.Transport{DialContext: l.DialContext, Protocols: protocols}
			for _, status := range []int{201, 200} { // new, and replaced
				body := &pausingBody{[]string{"a", "b", "c"}, clientTimeout - time.Minute}
				req, err := http.NewRequest("PUT", "http://front/api/l/"+name, body)
				must(t, err)
				req.Header.Set("Authorization", "Bearer t")
				if res, err := client.RoundTrip(req); err != nil || res.StatusCode != status || res.Proto != name {
					t.Errorf("%s, to be %d: %v, %v", name, status, res, err)
				}
				tt.get("/api/l/" + name).wantStatus(200).wantBody("abc")
			}
			client.CloseIdleConnections()
			srv.Close()
		}
	})
}

// hangingObjects is a store whose puts do not end with their context.
type hangingObjects struct{ slowObjects }

func (s *hangingObjects) put(_ context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error {
	return s.slowObjects.put(context.Background(), key, rec, spool, when)
}

func TestEndDoesNotWaitForAStoreThatHangs(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := setup{bubble: true, objects: func(o objects) objects { return &hangingObjects{slowObjects{o, time.Minute}} }}.start(t)
		tt.origin.file("/a", "body")
		tt.open("/api/r/a").read(4) // and it is not stored yet
		began := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
		defer cancel()
		tt.cache.Close(ctx)
		if took := time.Since(began); took > drainTimeout+5*time.Second {
			t.Errorf("the end took %v", took)
		}
		tt.cache.fills.running.Wait() // no goroutine outlives a bubble
	})
}

func TestUploadsThatAreRefused(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	sum := sha256.Sum256([]byte("body"))
	right, wrong := hex.EncodeToString(sum[:]), strings.Repeat("0", 64)
	digest := "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
	tt.put("/api/l/a", "old", bearer).wantStatus(201)
	old := strings.TrimPrefix(sha256Of([]byte("old")), "sha256:")
	for _, c := range []struct {
		what, path string
		header     string
		status     int
	}{
		{"an empty path", "/api/l/", "X: y", 400},
		{"a path that climbs", "/api/l/../a", "X: y", 400},
		{"another checksum", "/api/l/a", "X-Checksum-Sha256: " + wrong, 422},
		{"another digest", "/api/l/a", "Content-Digest: sha-256=:" + base64.StdEncoding.EncodeToString(make([]byte, 32)) + ":", 422},
		{"a right checksum and another digest", "/api/l/a", "X-Checksum-Sha256: " + right + "\nContent-Digest: sha-256=:" + base64.StdEncoding.EncodeToString(make([]byte, 32)) + ":", 422},
		{"another SHA-512", "/api/l/a", "Content-Digest: " + digest + ", sha-512=:" + base64.StdEncoding.EncodeToString(make([]byte, 64)) + ":", 422},
		{"a piece of a file", "/api/l/a", "Content-Range: bytes 0-3/8", 400},
		{"a malformed checksum", "/api/l/a", "X-Checksum-Sha256: abc", 400},
		{"a malformed digest", "/api/l/a", "Content-Digest: sha-256=:abc:", 400},
		{"two checksums", "/api/l/a", "Content-Digest: " + digest + "\nX-Checksum-Sha256: " + wrong, 422},
		{"another SHA-1", "/api/l/a", "X-Checksum-Sha1: " + wrong[:40], 422},
		{"another MD5", "/api/l/a", "X-Checksum-Md5: " + wrong[:32], 422},
		{"another Content-MD5", "/api/l/a", "Content-MD5: AAAAAAAAAAAAAAAAAAAAAA==", 422},
		{"a malformed Content-MD5", "/api/l/a", "Content-MD5: " + wrong[:32], 400},
		{"another Repr-Digest", "/api/l/a", "Repr-Digest: sha=:" + base64.StdEncoding.EncodeToString(make([]byte, 20)) + ":;q=1", 422},
		{"another Digest", "/api/l/a", "Digest: UNIXsum=1,MD5=AAAAAAAAAAAAAAAAAAAAAA==", 422},
		{"no body but a checksum", "/api/l/a", "X-Checksum-Deploy: true\nX-Checksum-Sha1: " + wrong[:40], 501},
		{"a form", "/api/l/a", "Content-Type: Multipart/Form-Data; boundary=x", 415},
		{"over what is there", "/api/l/a", "If-None-Match: *", 412},
		{"over this version", "/api/l/a", `If-None-Match: "x", "sha256-` + old + `"`, 412},
		{"over another version", "/api/l/a", `If-Match: "sha256-` + wrong + `"`, 412},
		{"over a version that is only alike", "/api/l/a", `If-Match: W/"sha256-` + old + `"`, 412},
		{"over what is not there", "/api/l/none", "If-Match: *", 412},
		{"over what is not so old", "/api/l/a", "If-Unmodified-Since: " + longAgo.Format(http.TimeFormat), 412},
		{"no pattern matches", "/api/picky/a.deb", "X: y", 403},
		{"a remote that is not local", "/api/r/a", "X: y", 405},
	} {
		g := tt.put(c.path, "body", append(strings.Split(c.header, "\n"), bearer)...)
		if g.status != c.status || !g.has(`{"detail":`) {
			t.Errorf("%s: %d %s, want %d", c.what, g.status, g.text, c.status)
		}
	}
	tt.get("/api/l/a").wantBody("old")
	tt.delete("/api/l/", bearer).wantStatus(400)
	tt.delete("/api/l", bearer).wantStatus(400)
	tt.put("/api/l/a", "body", bearer, "X-Checksum-Sha256: "+strings.ToUpper(right)).wantStatus(200)
	long := sha512.Sum512([]byte("body"))
	tt.put("/api/l/b", "body", bearer, "Content-Digest: crc32c=:AAAA:, sha-512=:"+base64.StdEncoding.EncodeToString(long[:])+":, "+digest).wantStatus(201)
	md5sum, sha1sum := md5.Sum([]byte("body")), sha1.Sum([]byte("body"))
	tt.put("/api/l/d", "body", bearer, "Content-MD5: "+base64.StdEncoding.EncodeToString(md5sum[:]), "X-Checksum-Md5: "+hex.EncodeToString(md5sum[:]),
		"X-Checksum-Sha1: "+hex.EncodeToString(sha1sum[:]), "Repr-Digest: "+digest+";q=1", "Digest: SHA-256="+strings.Trim(digest[8:], ":")+", SHA="+base64.StdEncoding.EncodeToString(sha1sum[:]),
		"X-Checksum-Deploy: false", "Content-Type: application/x-www-form-urlencoded").wantStatus(201)
	tt.put("/api/l/c", "body", bearer, "If-None-Match: *").wantStatus(201)
	tt.put("/api/picky/a.rpm", "body", bearer).wantStatus(201)
	tt.put("/api/picky/index/x", "body", bearer).wantStatus(201)
	tt.wantNoSpools()
}

// A repeated digest is hashed once: hashing costs more than all else.
func TestDigestsAreHashedOnceEach(t *testing.T) {
	t.Parallel()
	sum := sha256.Sum256(nil)
	h := http.Header{"X-Checksum-Sha256": {hex.EncodeToString(sum[:])}}
	for range 500 {
		h.Add("Content-Digest", "sha-256=:"+base64.StdEncoding.EncodeToString(sum[:])+":")
	}
	if sums, err := parseDeclaredDigests(h); len(sums) != 1 || err != nil {
		t.Errorf("%d hashes, %v", len(sums), err)
	}
}

// Of two clients that change one file the second finds out, and so nothing is lost.
func TestConditionsOfWriting(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	tt.put("/api/l/a", "one", bearer).wantStatus(201)
	tag := tt.get("/api/l/a").header.Get("ETag")
	other := `If-Match: "another", `
	tt.put("/api/l/a", "two", bearer, other+tag).wantStatus(200)
	tt.put("/api/l/a", "lost", bearer, "If-Match: "+tag).wantDetail(412, "condition")
	tt.delete("/api/l/a", bearer, "If-Match: "+tag).wantDetail(412, "condition")
	tt.get("/api/l/a").wantBody("two")
	weak := "W/" + tt.get("/api/l/a").header.Get("ETag") // as a front that compresses makes it
	tt.put("/api/l/a", "lost", bearer, "If-None-Match: "+weak).wantDetail(412, "exists")
	tt.put("/api/l/a", "lost", bearer, "If-Match: "+weak).wantDetail(412, "condition")
	// The date is ignored beside a tag, and so is one that is none, or of no file.
	date := func(d time.Duration) string {
		return "If-Unmodified-Since: " + tt.clock.now().Add(d).UTC().Format(http.TimeFormat)
	}
	tt.put("/api/l/b", "new", bearer, date(-time.Hour)).wantStatus(201)
	tt.put("/api/l/a", "three", bearer, "If-Match: *", date(-time.Hour)).wantStatus(200)
	tt.put("/api/l/a", "four", bearer, "If-Unmodified-Since: yesterday").wantStatus(200)
	tt.put("/api/l/a", "five", bearer, "If-Unmodified-Since: "+tt.get("/api/l/a").header.Get("Last-Modified")).wantStatus(200)
	tt.delete("/api/l/a", bearer, date(-time.Hour)).wantStatus(412)
	tt.delete("/api/l/none", bearer, "If-Match: *").wantStatus(412)
	tt.delete("/api/l/none", bearer).wantStatus(404)
	tt.delete("/api/l/a", bearer, date(time.Hour)).wantStatus(204)
	tt.get("/api/l/a").wantStatus(404)
}

func TestBrokenUploadLeavesTheOldFile(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	tt.put("/api/l/a", "old", bearer).wantStatus(201)
	for _, head := range []string{"Content-Length: 1000000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n1000\r\n"} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(tt.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "PUT /api/l/a HTTP/1.1\r\nHost: x\r\n"+bearer+"\r\n"+head+noise(1, 1000))
		n := len(tt.logs.requestLines(t))
		tt.eventually("the spool", func() bool { d, _ := os.ReadDir(tt.disk.dir + "/.spool"); return len(d) == 1 })
		conn.Close()
		if v := tt.wantLine(n); v.Status < 400 {
			t.Errorf("logged as %+v", v)
		}
		tt.get("/api/l/a").wantStatus(200).wantBody("old")
		tt.wantNoSpools()
	}
}

// A file of a local repository cannot be fetched again. However it is damaged, its rest
// stays on the disk, it is not served, and it can be uploaded again.
func TestDamagedUploadIsSetAside(t *testing.T) {
	t.Parallel()
	text := noise(1, 100_000)
	for what, damage := range map[string]func(body, record string) error{
		"record damaged": func(_, record string) error {
			return os.WriteFile(record, []byte("artifactapi record 1 00000000\n{}\n"), 0o600)
		},
		"record gone":  func(_, record string) error { return os.Remove(record) },
		"body damaged": func(body, _ string) error { return os.WriteFile(body, []byte(text[:50_000]+"?"+text[50_001:]), 0o600) },
		"body cut":     func(body, _ string) error { return os.Truncate(body, 70_000) },
	} {
		for _, finder := range []string{"a reader", "a writer", "verify", "the sweep"} {
			if finder == "the sweep" && what != "record gone" {
				continue // sweep looks only into directories where a file is missing or does not belong
			}
			t.Run(what+", found by "+finder, func(t *testing.T) {
				t.Parallel()
				tt := newLocalTester(t)
				tt.put("/api/l/d/a.rpm", text, bearer).wantStatus(201)
				body := tt.disk.dir + "/" + tt.list("l")[0].Key
				record := filepath.Dir(body) + "/" + recordFile
				if err := damage(body, record); err != nil {
					t.Fatal(err)
				}
				left := map[string]string{}
				for _, name := range []string{body, record} {
					if data, err := os.ReadFile(name); err == nil {
						left[filepath.Base(name)] = string(data)
					}
				}
				tt.restart() // the memory still has the undamaged record
				switch finder {
				case "a reader":
					tt.get("/api/l/d/a.rpm").wantStatus(404)
					tt.get("/api/l/d/a.rpm").wantStatus(404)
				case "a writer":
					tt.put("/api/l/d/a.rpm", "new", bearer).wantStatus(201)
				case "verify":
					env := envOf(map[string]string{"DATA_DIR": tt.disk.dir, "CONFIG_PATH": "/none"})
					var out bytes.Buffer
					if code := run(t.Context(), []string{"verify"}, env, &out, &out); code != 1 || !strings.Contains(out.String(), "it is kept in") {
						t.Errorf("exit status %d: %s", code, &out)
					}
				case "the sweep":
					tt.disk.now = func() time.Time { return time.Now().Add(2 * orphanAge) }
					if err := tt.disk.sweep(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				tt.wantAside(filepath.Dir(body), left)
				wantVerify := func(want int) {
					t.Helper()
					var reports []string
					_, err := tt.disk.verify(t.Context(), func(key string, err error) { reports = append(reports, key+": "+err.Error()) })
					if err != nil || len(reports) != want {
						t.Errorf("verify reports %q, want %d: %v", reports, want, err)
					}
				}
				if finder != "a writer" {
					wantVerify(1) // until it is uploaded again
				}
				tt.put("/api/l/d/a.rpm", "new", bearer)
				wantVerify(0)
				tt.get("/api/l/d/a.rpm").wantStatus(200).wantBody("new")
				tt.delete("/api/l/d/a.rpm", bearer).wantStatus(204)
				tt.wantAside(filepath.Dir(body), left)
			})
		}
	}
}

// wantAside wants one damaged file set aside in a directory, with these contents by name.
func (tt *tester) wantAside(dir string, want map[string]string) {
	tt.Helper()
	kept := map[string]string{}
	names, _ := filepath.Glob(dir + "/" + asideMark + "*")
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			tt.Error(err)
		}
		kept[strings.TrimPrefix(filepath.Base(name), asideMark)] = string(data)
	}
	if !maps.Equal(kept, want) {
		tt.Errorf("%d files were set aside, want %d with what was left", len(kept), len(want))
	}
}

func TestUploadIsOnlyAcknowledgedWhenItIsStored(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		breakIt func(*brokenSpools, *brokenObjects)
		status  int
	}{
		"no spool: full":   {func(s *brokenSpools, _ *brokenObjects) { s.none = fmt.Errorf("%w: test", errNoSpace) }, 507},
		"no spool: down":   {func(s *brokenSpools, _ *brokenObjects) { s.none = fmt.Errorf("%w: test", errStoreDown) }, 503},
		"under MIN_FREE":   {func(s *brokenSpools, _ *brokenObjects) { s.noRoom = true }, 507},
		"spool full":       {func(s *brokenSpools, _ *brokenObjects) { s.full = true }, 507},
		"storing: full":    {func(_ *brokenSpools, o *brokenObjects) { o.failPut(fmt.Errorf("%w: test", errNoSpace)) }, 507},
		"storing: down":    {func(_ *brokenSpools, o *brokenObjects) { o.failPut(fmt.Errorf("%w: test", errStoreDown)) }, 503},
		"cannot be asked":  {func(_ *brokenSpools, o *brokenObjects) { o.failOpen(fmt.Errorf("%w: test", errStoreDown)) }, 503},
		"an fsync failure": {nil, 503},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			spools, objects := &brokenSpools{}, &brokenObjects{}
			tt := setup{yaml: localYAML, env: map[string]string{"API_TOKEN": "t"}, spools: spools.wrap, objects: objects.wrap}.start(t)
			tt.put("/api/l/a", "old", bearer).wantStatus(201)
			text := noise(1, maxSmallBody+1)
			if c.breakIt == nil {
				tt.disk.fsync = func(*os.File) error { return errors.New("input/output error") }
			} else {
				c.breakIt(spools, objects)
			}
			tt.put("/api/l/a", text, bearer).wantDetail(c.status, "")
			tt.put("/api/l/b", text, bearer).wantDetail(c.status, "")
			spools.heal()
			objects.failPut(nil)
			objects.failOpen(nil)
			tt.get("/api/l/a").wantStatus(200).wantBody("old")
			tt.get("/api/l/b").wantStatus(404)
			tt.wantNoSpools()
		})
	}
}

func TestWhoMayWrite(t *testing.T) {
	t.Parallel()
	basic := func(password string) string {
		return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("anyone:"+password))
	}
	both, none := newLocalTester(t), setup{yaml: strings.Replace(localYAML, ", write_token: own", "", 1)}.start(t)
	own := setup{yaml: localYAML}.start(t)
	for _, c := range []struct {
		what   string
		tt     *tester
		path   string
		header string
		status int
	}{
		{"no token is set", none, "/api/l/a", bearer, 403},
		{"no token is set for purging", none, "/artifacts/r/a", bearer, 403},
		{"no token was sent", both, "/api/l/a", "X: y", 401},
		{"another token", both, "/api/l/a", "Authorization: Bearer u", 401},
		{"an empty token", both, "/api/l/a", "Authorization: Bearer ", 401},
		{"another scheme", both, "/api/l/a", "Authorization: Digest t", 401},
		{"API_TOKEN", both, "/api/l/a", bearer, 0},
		{"API_TOKEN, any case of the scheme", both, "/api/l/a", "Authorization: bearer t", 0},
		{"API_TOKEN as a password", both, "/api/l/a", basic("t"), 0},
		{"the repository's own", both, "/api/l/a", "Authorization: Bearer own", 0},
		{"the repository's own as a password", both, "/api/l/a", basic("own"), 0},
		{"a wrong password", both, "/api/l/a", basic("x"), 401},
		{"another repository's own", both, "/api/other/a", "Authorization: Bearer own", 401},
		{"the repository's own, alone", own, "/api/l/a", "Authorization: Bearer own", 0},
		{"another repository without any", own, "/api/other/a", "Authorization: Bearer own", 403},
		{"purging takes API_TOKEN", both, "/artifacts/l/a", bearer, 0},
		{"purging does not take the repository's", both, "/artifacts/l/a", "Authorization: Bearer own", 401},
		{"purging by pattern", both, "/artifacts/l?pattern=.", "X: y", 401},
	} {
		for _, method := range []string{"PUT", "DELETE"} {
			if strings.HasPrefix(c.path, "/artifacts") && method == "PUT" {
				continue
			}
			g := c.tt.send(method, c.path, strings.NewReader("body"), c.header)
			switch {
			case c.status == 0 && (g.status == 401 || g.status == 403):
				t.Errorf("%s: %s is refused: %d %s", c.what, method, g.status, g.text)
			case c.status != 0 && g.status != c.status:
				t.Errorf("%s: %s is %d, want %d", c.what, method, g.status, c.status)
			case g.status == 401 && !slices.Equal(g.header["Www-Authenticate"], []string{`Bearer realm="artifactapi"`, `Basic realm="artifactapi"`}):
				t.Errorf("%s: the challenges are %q", c.what, g.header["Www-Authenticate"])
			case g.status == 403 && !g.has("API_TOKEN"):
				t.Errorf("%s: the answer does not name the variable: %s", c.what, g.text)
			}
		}
	}
}

func TestTokenIsJudgedBeforeTheBodyIsRead(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	endless, feed := io.Pipe()
	defer feed.Close()
	s := tt.start(context.Background(), "PUT", "/api/l/a", endless) // the body never comes
	defer s.leave()
	s.wantStatus(401)
}

// A client that asks with Expect: 100-continue, as curl does, need not send gigabytes to
// learn that the file is there.
func TestConditionsAreJudgedBeforeTheBodyIsRead(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	tt.put("/api/l/a", "one", bearer).wantStatus(201)
	tag := tt.get("/api/l/a").header.Get("ETag")
	for _, condition := range []string{"If-None-Match: *", "If-None-Match: " + tag, "If-Match: \"another\"", "If-Unmodified-Since: Thu, 01 Jan 1970 00:00:00 GMT"} {
		endless, feed := io.Pipe()
		defer feed.Close()
		s := tt.start(context.Background(), "PUT", "/api/l/a", endless, bearer, condition) // the body never comes
		defer s.leave()
		s.wantStatus(412)
	}
	tt.get("/api/l/a").wantBody("one")
}

// Some clients read the answer only after they have sent the whole body.
func TestRefusedUploadIsAnsweredToAClientThatSendsAll(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	const size = 64 << 20 // far more than the kernel buffers of both ends hold
	for request, status := range map[string]int{"PUT /api/l/a": 401, "PUT /api/r/a": 405, "PUT /v2/d/app/blobs/uploads/1": 405} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(tt.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", request, size)
		if n, err := io.CopyN(conn, zeros{}, size); err != nil {
			t.Fatalf("%s: the connection ended after %d bytes: %v", request, n, err)
		}
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || res.StatusCode != status || !res.Close {
			t.Errorf("%s: %v, %v", request, res, err)
		}
	}
}

// A refused upload is read for its client's sake, but not to its end.
func TestRefusedUploadIsNotReadForever(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	conn, err := net.Dial("tcp", strings.TrimPrefix(tt.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "PUT /api/l/a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", int64(900<<30))
	const most = maxRefusedBody + 32<<20 // with what the kernel buffers
	if n, err := io.CopyN(conn, zeros{}, most); err == nil {
		t.Errorf("%d bytes of a refused upload were read", n)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestBrowsersOfOtherSitesMayNotWrite(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	tt.put("/api/l/a", "body", bearer).wantStatus(201)
	for _, h := range []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "Origin: https://evil.example"} {
		tt.put("/api/l/a", "evil", bearer, h).wantDetail(403, "cross-origin")
		tt.delete("/api/l/a", bearer, h).wantDetail(403, "cross-origin")
		tt.delete("/artifacts/l/a", bearer, h).wantDetail(403, "cross-origin")
		tt.delete("/artifacts/l?pattern=.", bearer, h).wantDetail(403, "cross-origin")
		tt.put("/api/r/a", "evil", h).wantDetail(403, "cross-origin") // writing there is 405 for others
		tt.send("POST", "/config", nil, h).wantDetail(403, "cross-origin")
		tt.get("/api/l/a", h).wantStatus(200).wantBody("body") // reading is open
	}
	tt.put("/api/l/a", "mine", bearer, "Sec-Fetch-Site: same-origin").wantStatus(200)
	tt.put("/api/l/a", "mine", bearer, "Origin: "+tt.url).wantStatus(200)
}

// No page of another site may read what is here, by embedding or by asking; a link may
// be followed.
func TestPagesOfOtherSitesMayNotRead(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	tt.put("/api/l/a", "body", bearer).wantStatus(201)
	const site, mode = "Sec-Fetch-Site: ", "Sec-Fetch-Mode: "
	for path, status := range map[string]int{"/artifacts/l": 200, "/config": 200, "/metrics": 200, "/missed": 200, "/artifacts/none": 404,
		"//config": 200, "/": 200, "/health": 200, "/api/l/a": 200, "/api/l/none": 404, "/v2/": 200, "/v2/none/a/manifests/b": 404} {
		refused := status
		if strings.Contains("artifacts config metrics missed", strings.Split(strings.Trim(path, "/"), "/")[0]) && path != "/" {
			refused = 403
		}
		tt.get(path, site+"cross-site", mode+"no-cors").wantStatus(refused)
		tt.get(path, site+"cross-site").wantStatus(refused)
		tt.head(path, site+"cross-site", mode+"cors").wantStatus(refused)
		tt.get(path, site+"same-origin", mode+"cors").wantStatus(status)
		tt.get(path, site+"none", mode+"navigate").wantStatus(status)
		tt.get(path, site+"cross-site", mode+"navigate").wantStatus(status).
			wantHeader("X-Content-Type-Options", "nosniff").wantHeader("Cross-Origin-Resource-Policy", "same-origin")
	}
	tt.get("/", "Accept: text/html").wantHeader("X-Content-Type-Options", "nosniff").wantHeader("Cross-Origin-Resource-Policy", "same-origin")
}

// While many clients write and read one file, each of them reads one whole version.
func TestLocalFileUnderWritersAndReaders(t *testing.T) {
	t.Parallel()
	tt := newLocalTester(t)
	versions := map[string]bool{}
	for i := range 8 {
		versions[noise(uint64(i), 20_000+100_000*(i%2))] = true
	}
	tt.put("/api/l/a", noise(0, 20_000), bearer)
	var all sync.WaitGroup
	for text := range versions {
		all.Go(func() {
			for range 5 {
				tt.put("/api/l/a", text, bearer).wantStatus(200)
				if g := tt.get("/api/l/a"); g.ok() && (g.status != 200 || !versions[g.text]) {
					t.Errorf("status %d with %d bytes that no client wrote", g.status, len(g.text))
				}
			}
		})
	}
	all.Wait()
	var created, refused atomic.Int64
	for text := range versions {
		all.Go(func() {
			switch g := tt.put("/api/l/once", text, bearer, "If-None-Match: *"); g.status {
			case 201:
				created.Add(1)
			case 412:
				refused.Add(1)
			}
		})
	}
	all.Wait()
	if created.Load() != 1 || refused.Load() != 7 {
		t.Errorf("of eight clients that create one file %d did and %d were refused", created.Load(), refused.Load())
	}
	for range 20 {
		all.Go(func() { tt.put("/api/l/x", "body", bearer) })
		all.Go(func() { tt.delete("/api/l/x", bearer) })
	}
	all.Wait()
	g := tt.get("/api/l/x")
	listed := slices.ContainsFunc(tt.list("l"), func(a listedArtifact) bool { return a.Path == "x" })
	if g.status == 200 && g.text != "body" || (g.status == 200) != listed {
		t.Errorf("after writers and deleters: status %d, %q, listed %v", g.status, g.text, listed)
	}
	tt.wantNoSpools()
}

// Of two clients that create one file the second waits for the first and is refused.
func TestCreatingTwiceAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hooked := &hookedObjects{}
		tt := setup{yaml: localYAML, env: map[string]string{"API_TOKEN": "t"}, bubble: true,
			objects: func(o objects) objects { hooked.objects = o; return hooked }}.start(t)
		var second *got
		var done sync.WaitGroup
		between := func() { // the first has looked and has not stored yet
			hooked.missed.Store(nil)
			done.Go(func() { second = tt.put("/api/l/a", "second", bearer, "If-None-Match: *") })
			synctest.Wait() // the second waits, or has stored its body
		}
		before := func() { hooked.missed.Store(&between) } // the look before its body
		hooked.missed.Store(&before)
		tt.put("/api/l/a", "first", bearer, "If-None-Match: *").wantStatus(201)
		done.Wait()
		second.wantStatus(412)
		tt.get("/api/l/a").wantBody("first")
	})
}

func TestCreatingTwiceOnTwoReplicas(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	hooked := &hookedObjects{objects: b.store}
	over := func(o objects) *tester {
		return setup{yaml: localYAML, env: map[string]string{"API_TOKEN": "t"}, objects: func(objects) objects { return o }}.start(t)
	}
	one, other := over(hooked), over(newS3BenchAt(t, b.fake).store)
	between := func() {
		hooked.missed.Store(nil)
		other.put("/api/l/a", "first", bearer, "If-None-Match: *").wantStatus(201)
	}
	before := func() { hooked.missed.Store(&between) } // the look before its body
	hooked.missed.Store(&before)
	one.put("/api/l/a", "second", bearer, "If-None-Match: *").wantDetail(412, "exists")
	one.get("/api/l/a").wantBody("first")
}

// A replica may know an older version, or be overtaken while it uploads.
func TestChangingOneFileOnTwoReplicas(t *testing.T) {
	t.Parallel()
	var between atomic.Pointer[func()]
	b := newS3Bench(t, func(c *s3Config) {
		to := c.transport
		c.transport = transportFunc(func(r *http.Request) (*http.Response, error) {
			if f := between.Load(); f != nil && r.Method == "PUT" && between.CompareAndSwap(f, nil) {
				(*f)()
			}
			return to.RoundTrip(r)
		})
	})
	over := func(o objects) *tester {
		return setup{yaml: localYAML, env: map[string]string{"API_TOKEN": "t"}, objects: func(objects) objects { return o }}.start(t)
	}
	one, other := over(b.store), over(newS3BenchAt(t, b.fake).store)
	one.put("/api/l/a", "1", bearer).wantStatus(201)
	tag := func(tt *tester) string { return "If-Match: " + tt.get("/api/l/a").header.Get("ETag") }
	first := tag(one)
	other.put("/api/l/a", "2", bearer, first).wantStatus(200)
	one.put("/api/l/a", "lost", bearer, first).wantDetail(412, "condition") // it was not told yet
	second := tag(one)
	overtake := func() { other.put("/api/l/a", "3", bearer, tag(other)).wantStatus(200) }
	between.Store(&overtake)
	one.put("/api/l/a", "lost", bearer, second).wantDetail(412, "condition")
	one.get("/api/l/a").wantBody("3")
	remove := func() { other.delete("/api/l/a", bearer).wantStatus(204) }
	between.Store(&remove)
	one.put("/api/l/a", "lost", bearer, "If-Match: *").wantDetail(412, "condition")
	one.put("/api/l/a", "4", bearer).wantStatus(201)
	b.fake.failOnce("PutObject", 1, false, fakeFault{status: 404, code: "NoSuchKey"}) // as AWS says it
	one.put("/api/l/a", "lost", bearer, tag(one)).wantDetail(412, "condition")
	key := storageKey("l", "a")
	old, err := b.store.open(t.Context(), key, -1)
	must(t, err)
	one.put("/api/l/a", "5", bearer, tag(one)).wantStatus(200)
	one.get("/api/l/a").wantBody("5")
	if err := b.store.put(t.Context(), key, old.rec, tempSpool(t, t.TempDir(), "4"), putCondition{old: old.rec}); !errors.Is(err, errCondition) {
		t.Errorf("replacing what is not there any more: %v", err)
	}
}

// --- listing and purging ---

// listing is a page of a remote's files.
type listing struct {
	Artifacts []listedArtifact
	Next      *string
}

// page returns the paths of a page of r's listing.
func (tt *tester) page(query string) (paths []string, next *string) {
	tt.Helper()
	g := tt.get("/artifacts/r?" + query).wantStatus(200)
	var l listing
	if err := json.Unmarshal([]byte(g.text), &l); err != nil {
		tt.Fatalf("%v: %s", err, g.text)
	}
	for _, a := range l.Artifacts {
		paths = append(paths, a.Path)
	}
	return paths, l.Next
}

// A pattern that is too large is refused before its program is made: that would take 100 MB
// for 500 bytes of a query.
func TestLargePatternsTakeLittleMemory(t *testing.T) {
	tt := newTester(t)
	for pattern, status := range map[string]int{
		"a{998}": 200, "a{999}": 400, `(\pL|x?){100}`: 200, "(?:ab?c*){199}": 200, "(?i:k){998}": 200, "(?:(?:a{2}){2}){249}": 200, "(?:[ab]c){499}": 200,
		"(" + strings.Repeat("a", 300) + "){1000}": 400, "(?:" + strings.Repeat("(", 120) + "a" + strings.Repeat(")", 120) + "){0,1000}": 400,
		strings.Repeat(`\pL{999}`, 60): 400, "(?:" + strings.Repeat("a?", 250) + "){1000,}": 400,
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		tt.get("/artifacts/r?pattern=" + url.QueryEscape(pattern)).wantStatus(status)
		runtime.ReadMemStats(&after)
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 5<<20 {
			t.Errorf("%.40q took %d bytes", pattern, grown)
		}
	}
}

func TestListingInPages(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	all := []string{"B", "a", "a b", "a/b", "a/c", "b+c", "z/ü"}
	for _, p := range all {
		tt.origin.troubled(answers(200))
		tt.get("/api/r/" + (&urlPath{p}).escaped()).wantStatus(200)
	}
	if text := tt.get("/artifacts/r?prefix=none").text; !strings.Contains(text, `"artifacts": []`) { // what scripts look for
		t.Errorf("an empty list is %s", text)
	}
	if got, next := tt.page(""); !slices.Equal(got, all) || next != nil {
		t.Errorf("all of it: %q, next %v", got, next)
	}
	var walked []string
	for query := "limit=2"; ; {
		got, next := tt.page(query)
		walked = append(walked, got...)
		if next == nil {
			break
		}
		if len(got) != 2 || len(walked) > len(all) {
			t.Fatalf("a page of %q after %q", got, walked)
		}
		query = "limit=2&after=" + (&urlPath{*next}).query()
	}
	if !slices.Equal(walked, all) {
		t.Errorf("page by page: %q", walked)
	}
	for query, want := range map[string][]string{
		"prefix=a/": {"a/b", "a/c"}, "prefix=a": {"a", "a b", "a/b", "a/c"}, "prefix=nothing": nil,
		"pattern=[bc]$": {"a b", "a/b", "a/c", "b+c"}, "pattern=^a&prefix=a/": {"a/b", "a/c"},
	} {
		if got, _ := tt.page(query); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", query, got, want)
		}
	}
	for _, query := range []string{"limit=0", "limit=10001", "limit=x", "limit=-1", "pattern=("} {
		tt.get("/artifacts/r?"+query).wantDetail(400, "")
	}
	tt.get("/artifacts/r?limit=10000").wantStatus(200)
	tt.get("/artifacts/nobody").wantDetail(404, "nobody")
	tt.get("/artifacts/").wantStatus(404)
	for i := range 1000 {
		must(t, tt.cache.index.saveRow(t.Context(), testRow("r", fmt.Sprintf("y%03d", i))))
	}
	if got, next := tt.page(""); len(got) != 1000 || next == nil {
		t.Errorf("a page without a limit has %d entries, next %v", len(got), next)
	}
	for i := range 1500 {
		must(t, tt.cache.index.saveRow(t.Context(), testRow("r", fmt.Sprintf("x%04d", i))))
	}
	parts := &partsIndex{index: tt.cache.index}
	tt.cache.index = parts
	if got, next := tt.page("limit=2400"); len(got) != 2400 || next == nil || *next != got[2399] || !slices.IsSorted(got) {
		t.Errorf("a long page has %d entries, next %v", len(got), next)
	}
	if got, next := tt.page("limit=10000"); len(got) != 2507 || next != nil {
		t.Errorf("the longest page has %d entries, next %v", len(got), next)
	}
	if parts.most > listPageSize {
		t.Errorf("a client that reads slowly holds %d rows", parts.most)
	}
}

// partsIndex knows the most rows that were wanted at once.
type partsIndex struct {
	index
	most int
}

func (x *partsIndex) listPage(ctx context.Context, q pageQuery) (indexPage, error) {
	x.most = max(x.most, q.limit)
	return x.index.listPage(ctx, q)
}

func TestListingWhileTheIndexIsBeingLoaded(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.cache.index = newEmbeddedIndex(t.TempDir(), tt.server.log) // it is not loaded yet
	tt.origin.file("/a", "body")
	tt.get("/api/r/a").wantMiss()
	if g := tt.get("/artifacts/r"); !g.has(`"path": "a"`) || !g.has(`"complete": false`) {
		t.Errorf("listed as %s", g.text)
	}
}

// urlPath escapes a path for a URL.
type urlPath struct{ path string }

func (p *urlPath) escaped() string { return strings.ReplaceAll(p.query(), "%2F", "/") }
func (p *urlPath) query() string {
	var b strings.Builder
	for i := range len(p.path) {
		fmt.Fprintf(&b, "%%%02X", p.path[i])
	}
	return b.String()
}

func TestListingTellsEverythingAboutAFile(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ['idx$']`, "cache: {mutable_ttl: 600}")
	tt.origin.file("/d/a.idx?v=1", "body")
	tt.get("/api/r/d/a.idx?v=1")
	stored := tt.clock.now()
	tt.advance(time.Minute)
	tt.get("/api/r/d/a.idx?v=1")
	tt.get("/api/r/d/a.idx?v=1")
	tt.cache.flushCounts(context.Background())
	list := tt.list("r")
	if len(list) != 1 {
		t.Fatalf("%+v", list)
	}
	a := list[0]
	sum := sha256.Sum256([]byte("body"))
	near := func(got time.Time, want time.Time) bool { return got.Sub(want).Abs() < 5*time.Second }
	if a.Path != "d/a.idx" || a.Size != 4 || a.SHA256 != hex.EncodeToString(sum[:]) || a.ContentType != "application/x-origin" ||
		a.Source != tt.origin.url+"/d/a.idx" || len(a.Variant) != 16 || a.Class != mutable || a.Hits != 2 || !a.Fresh ||
		!near(a.FetchedAt, stored) || !near(a.LastAccess, stored.Add(time.Minute)) ||
		a.ExpiresAt == nil || !near(*a.ExpiresAt, stored.Add(10*time.Minute)) {
		t.Errorf("%+v", a)
	}
	if !regexp.MustCompile(`"fetched_at": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"`).MatchString(tt.get("/artifacts/r").text) {
		t.Error("times are not RFC 3339 in UTC")
	}
	tt.advance(time.Hour)
	if a := tt.list("r")[0]; a.Fresh {
		t.Errorf("an expired file is listed as fresh: %+v", a)
	}
	must(t, tt.cache.marks.setMark(t.Context(), a.Key, freshnessMark{tt.clock.now().AddDate(1, 0, 0), a.SHA256}))
	if a := tt.list("r")[0]; a.Fresh {
		t.Errorf("by a clock that is a year ahead it is listed as fresh: %+v", a)
	}
}

func TestPurging(t *testing.T) {
	t.Parallel()
	tt := setup{env: map[string]string{"API_TOKEN": "t"}, keys: []string{"negative_ttl: 600"}}.start(t)
	tt.origin.troubled(answers(200))
	fetch := func(paths ...string) {
		for _, p := range paths {
			tt.get("/api/r/" + p).wantStatus(200)
		}
	}
	left := func(want ...string) {
		t.Helper()
		if got, _ := tt.page(""); !slices.Equal(got, want) {
			t.Errorf("left: %q, want %q", got, want)
		}
	}
	fetch("d/a", "d/a?v=1", "d/a?v=2", "d/ab", "d/a/b", "e+f", "g//h")
	tt.delete("/artifacts/r/d/a", bearer).wantStatus(204).wantBody("")
	left("d/a/b", "d/ab", "e+f", "g/h")
	tt.delete("/artifacts/r/d/a", bearer).wantDetail(404, "")
	tt.get("/api/r/d/a").wantMiss()
	fetch("q?v=1", "q?v=2") // query variants without a file at the plain path
	tt.delete("/artifacts/r/q", bearer).wantStatus(204)
	tt.delete("/artifacts/r/e%2Bf", bearer).wantStatus(204) // another spelling of the same path
	tt.delete("/artifacts/r/g//./h", bearer).wantStatus(204)
	left("d/a", "d/a/b", "d/ab")
	tt.delete("/artifacts/r?pattern=^d/a$", bearer).wantStatus(200)
	left("d/a/b", "d/ab")
	for _, query := range []string{"", "?pattern=", "?pattern=(", "?pattern=" + strings.Repeat("a", 513), "?pattern=(.{40}){40}"} {
		tt.delete("/artifacts/r"+query, bearer).wantDetail(400, "")
	}
	tt.delete("/artifacts/nobody/x", bearer).wantStatus(404)
	tt.delete("/artifacts/nobody?pattern=.", bearer).wantStatus(404)
	tt.delete("/artifacts/r/../x", bearer).wantStatus(400)
	for _, query := range []string{"prefix=d/", "pattern=.&prefix=d/", "pattern=.&limit=1", "pattern=.&a;b"} {
		tt.delete("/artifacts/r?"+query, bearer).wantDetail(400, "nothing else")
	}
	tt.delete("/artifacts/r?pattern=.", bearer).wantStatus(200)
	left()
	tt.origin.troubled(nil)
	tt.get("/api/r/missing").wantStatus(404)
	tt.origin.file("/missing", "there now")
	tt.get("/api/r/missing").wantStatus(404)
	tt.delete("/artifacts/r/missing", bearer) // the remembered 404 is forgotten
	tt.get("/api/r/missing").wantStatus(200)
}

// --- overview, health, configuration ---

// What is stored of a remote that is in remotes.yaml no more can be seen and removed. A
// name that never was one becomes no label.
func TestRemovedRemoteIsListedAndPurged(t *testing.T) {
	t.Parallel()
	tt := setup{env: map[string]string{"API_TOKEN": "t"}, keys: []string{`mutable_patterns: ['idx$']`}}.start(t)
	paths := []string{"a", "b/x%3A1", "b/x2", "b/x.idx", "c+d?e=f"}
	tt.origin.troubled(answers(200))
	for _, p := range paths {
		tt.get("/api/r/" + p).wantStatus(200)
	}
	tt.settle()
	tt.configure("remotes: {l: {type: local}}")
	tt.get("/api/r/a").wantStatus(404)
	list := tt.list("r")
	if len(list) != len(paths) {
		t.Fatalf("%+v", list)
	}
	for _, a := range list {
		if a.Source != "" || (a.Class == mutable) == a.Fresh {
			t.Errorf("%+v", a)
		}
	}
	tt.delete("/artifacts/r/a").wantStatus(401)
	tt.delete("/artifacts/r?pattern=.").wantStatus(401)
	tt.delete("/artifacts/r/a", bearer).wantStatus(204)
	tt.delete("/artifacts/r/b/x:1", bearer).wantStatus(204)
	tt.delete("/artifacts/r/c+d", bearer).wantStatus(204)
	tt.delete("/artifacts/r/a", bearer).wantDetail(404, "nothing is stored at this path")
	if g := tt.delete("/artifacts/r?pattern=^b/", bearer).wantStatus(200); !g.has(`"purged": 2`) {
		t.Error(g.text)
	}
	for _, name := range []string{"r", "never", "%2e%2e"} {
		tt.get("/artifacts/" + name).wantStatus(404)
		tt.delete("/artifacts/"+name+"?pattern=.", bearer).wantStatus(404)
	}
	tt.get("/artifacts/l").wantStatus(200)
	if g := tt.get("/metrics"); g.has("never") {
		t.Error("a name that is no remote became a label")
	}
	if lines := tt.logs.lines(`"remote":"never"`); lines != nil {
		t.Error(lines)
	}
}

// A listed path is purged as it is shown, also where its spelling is another one: npm
// asks for @scope%2Fname.
func TestPurgeByTheListedPath(t *testing.T) {
	t.Parallel()
	tt := setup{keys: []string{"package: npm"}, env: map[string]string{"API_TOKEN": "t0ken"}}.start(t)
	const bearer = "Authorization: Bearer t0ken"
	for _, uri := range []string{"/%40s%2Fa", "/%40s/a", "/%40s%2Fab"} {
		tt.origin.file(uri, "{}")
	}
	tt.get("/api/r/@s%2fa").wantMiss()
	tt.get("/api/r/@s%2Fab").wantMiss()
	tt.settle()
	tt.delete("/artifacts/r/@s/a", bearer).wantStatus(204)
	tt.get("/api/r/@s%2Fab").wantHit()
	tt.get("/api/r/@s%2fa").wantMiss()
	tt.get("/api/r/@s/a").wantMiss()
	tt.settle()
	tt.delete("/artifacts/r/@s/a", bearer).wantStatus(204) // both spellings
	if list := tt.list("r"); len(list) != 1 {
		t.Errorf("left: %+v", list)
	}
}

func TestOverview(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: strings.Replace(localYAML, "r: {base_url: ORIGIN}", "r: {base_url: ORIGIN, package: rpm, description: \"<script>alert(1)</script>\"}", 1)}.start(t)
	tt.origin.file("/a", "body")
	tt.get("/api/r/a")
	var v struct {
		Name, Version string
		Remotes       []map[string]any
	}
	g := tt.get("/").wantStatus(200).wantHeader("Content-Type", "application/json")
	if err := json.Unmarshal([]byte(g.text), &v); err != nil {
		t.Fatal(err)
	}
	if v.Name != "artifactapi" || v.Version == "" || len(v.Remotes) != 4 {
		t.Fatalf("%+v", v)
	}
	r := v.Remotes[slices.IndexFunc(v.Remotes, func(r map[string]any) bool { return r["name"] == "r" })]
	if r["type"] != "remote" || r["package"] != "rpm" || r["url"] != tt.origin.url || r["artifacts"] != 1.0 || r["bytes"] != 4.0 {
		t.Errorf("%+v", r)
	}

	g = tt.get("/", "Accept: text/html,application/xhtml+xml").wantStatus(200).wantHeader("Content-Type", "text/html; charset=utf-8").
		wantHeader("Vary", "Accept").wantHeader("X-Content-Type-Options", "nosniff")
	if strings.Contains(g.text, "<script>alert") {
		t.Error("a description is not escaped")
	}
	policy := g.header.Get("Content-Security-Policy")
	if !strings.HasPrefix(policy, "default-src 'none'") || strings.Contains(policy, "unsafe") {
		t.Errorf("policy %q", policy)
	}
	for _, tag := range []string{"style", "script"} {
		for _, part := range regexp.MustCompile(`(?s)<`+tag+`[^>]*>(.*?)</`+tag+`>`).FindAllStringSubmatch(g.text, -1) {
			sum := sha256.Sum256([]byte(part[1]))
			if !strings.Contains(policy, "'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'") {
				t.Errorf("the policy %q does not allow the page's own %s", policy, tag)
			}
		}
	}
	if regexp.MustCompile(`\son[a-z]+=|style=`).MatchString(g.text) {
		t.Error("the page has attributes that its policy does not allow")
	}
}

func TestConfigIsShownWithoutItsSecrets(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: `
remotes:
  r: {base_url: ORIGIN, username: u, password: HIDDEN, headers: {X-Key: HIDDEN}, timeout: 7}
  l: {type: local, write_token: HIDDEN}
`, env: map[string]string{"API_TOKEN": "HIDDEN"}}.start(t)
	g := tt.get("/config").wantStatus(200).wantHeader("Content-Type", "application/json")
	if g.has("HIDDEN") {
		t.Errorf("a secret shows: %s", g.text)
	}
	for _, part := range []string{`"***"`, `"API_TOKEN": "***"`, `"LOG_LEVEL": "debug"`, `"timeout": 7`, `"mutable_ttl": 3600`, `"X-Key"`, tt.origin.url} {
		if !g.has(part) {
			t.Errorf("%s is missing in %s", part, g.text)
		}
	}
}

// What came from a variable is shown neither by the endpoints nor in an error.
func TestVariablesAreNotShown(t *testing.T) {
	t.Parallel()
	tt := setup{env: map[string]string{"API_TOKEN": "t"}}.start(t)
	tt.get("/api/r/a")
	tt.origin.file("/a", "x")
	tt.get("/api/r/a").wantStatus(200)
	tt.settle()
	tt.server.config.Store(mustParse(t, `
remotes:
  r: {base_url: "http://127.0.0.1:9/${TOKEN}/x", description: "of ${TOKEN}"}
  away: {base_url: "http://${TOKEN}.example/x"}
`))
	for path, want := range map[string]string{"/": `"url": "http://127.0.0.1:9/***/x"`, "/config": `"description": "of ***"`, "/artifacts/r": `"source": "http://127.0.0.1:9/***/x/a"`,
		"/api/away/a": `***.example: `} {
		if g := tt.get(path); !g.has(want) || g.has(hidden) {
			t.Errorf("%s: want %s in %s", path, want, g.text)
		}
	}
	if g := tt.get("/", browser); g.has("tok-hidden") || !g.has("of ***") {
		t.Errorf("the page shows it: %s", g.text)
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	health := func() (v struct {
		Status   string
		Backends map[string]string
	}) {
		t.Helper()
		g := tt.get("/health").wantStatus(200)
		if err := json.Unmarshal([]byte(g.text), &v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	if h := health(); h.Status != "healthy" || fmt.Sprint(h.Backends) != "map[database:embedded redis:embedded storage:embedded]" {
		t.Errorf("%+v", h)
	}
	if err := os.RemoveAll(tt.disk.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tt.disk.dir, nil, 0o600); err != nil { // a file instead of a directory stops root, too
		t.Fatal(err)
	}
	tt.server.checkBackend(tt.server.stores.backends[len(tt.server.stores.backends)-1])
	if h := health(); h.Status != "degraded" || h.Backends["storage"] != "down" {
		t.Errorf("without DATA_DIR: %+v", h)
	}
	tt.origin.file("/a", "body")
	tt.get("/api/r/a").wantStatus(200).wantBody("body") // files are served but not stored
	if lines := tt.logs.lines(`"WARN","msg":"a store failed`); len(lines) > 0 {
		t.Errorf("each fill tells what the log has said already: %q", lines)
	}
	if err := os.Remove(tt.disk.dir); err != nil {
		t.Fatal(err)
	}
	tt.server.checkBackend(tt.server.stores.backends[len(tt.server.stores.backends)-1])
	if h := health(); h.Status != "healthy" {
		t.Errorf("DATA_DIR is back: %+v", h)
	}
	tt.server.draining.Store(true)
	tt.get("/health").wantDetail(503, "draining")
}

// From the first failure on it is one outage: what single requests notice of it before
// the next check of S3, and after it, is no warning.
func TestAnOutageOfS3IsToldOnce(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	c := f.config()
	tt := setup{keys: []string{"mutable_patterns: [b]"}, env: map[string]string{"MINIO_ENDPOINT": c.host, "MINIO_ACCESS_KEY": c.accessKey, "MINIO_SECRET_KEY": c.secretKey, "MINIO_BUCKET": c.bucket}}.start(t)
	tt.origin.file("/a", "body")
	tt.server.stores.hot.outage.fail(errors.New("connection refused"), time.Now())
	for range 3 {
		tt.get("/api/r/a").wantStatus(200).wantBody("body")
	}
	if lines := tt.logs.lines(`"level":"WARN"`); len(lines) > 0 {
		t.Errorf("%d lines about an outage that the next check tells of: %q", len(lines), lines)
	}
}

// A disk that hangs takes all the time that the check of storage has.
func TestDiskThatHangsIsNotTakenForS3(t *testing.T) {
	t.Parallel()
	c := newFakeS3(t).config()
	tt := setup{env: map[string]string{"MINIO_ENDPOINT": c.host, "MINIO_ACCESS_KEY": c.accessKey, "MINIO_SECRET_KEY": c.secretKey, "MINIO_BUCKET": c.bucket}}.start(t)
	storage := tt.server.stores.backends[len(tt.server.stores.backends)-1]
	tt.disk.probe.done = make(chan struct{}) // of a check that does not end
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err := storage.ping(ctx)
	tt.disk.probe.done = nil
	if text := fmt.Sprint(err); !strings.Contains(text, "DATA_DIR") || strings.Contains(text, "S3 cannot be reached") {
		t.Error(text)
	}
}

func TestHEADOfTheEndpoints(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	for _, path := range []string{"/", "/health", "/config", "/metrics", "/artifacts/r", "/api/r"} {
		g := tt.send(http.MethodHead, path, nil)
		if g.status != 200 || g.text != "" {
			t.Errorf("HEAD %s: %d", path, g.status)
		}
	}
}

// TestListingHasWhatWasJustFetched: a client that has the whole file may list it, although
// it is being stored at that moment.
func TestListingHasWhatWasJustFetched(t *testing.T) {
	t.Parallel()
	gated := &heldObjects{gate: make(chan struct{})}
	tt := setup{objects: func(o objects) objects { gated.objects = o; return gated }}.start(t)
	tt.origin.file("/a", "body")
	ask := func(path string) *got {
		s := tt.start(t.Context(), "GET", path, nil) // get would wait for the store
		defer s.leave()
		return s.rest()
	}
	ask("/api/r/a").wantMiss().wantBody("body")
	listed := make(chan *got)
	go func() { listed <- ask("/artifacts/r") }()
	tt.eventually("the listing to wait for the store", func() bool { return tt.waiting("a") == 1 })
	close(gated.gate)
	if g := (<-listed).wantStatus(200); !strings.Contains(g.text, `"path":"a"`) && !strings.Contains(g.text, `"path": "a"`) {
		t.Errorf("the listing: %s", g.text)
	}
}
