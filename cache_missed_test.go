package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// missedLines is what /missed lists, as "remote path count", with "?" behind the path
// of a miss with a query.
func (tt *tester) missedLines(query string) (lines []string) {
	tt.Helper()
	g := tt.get("/missed"+query).wantStatus(200).wantHeader("Content-Type", "application/x-ndjson")
	for line := range strings.Lines(g.text) {
		var f struct {
			Remote, Path string
			Query        bool
			First, Last  time.Time
			Count        int
		}
		if err := json.Unmarshal([]byte(line), &f); err != nil || f.First.IsZero() || f.Last.Before(f.First) {
			tt.Errorf("%v in the line %q of /missed", err, line)
		}
		if f.Query {
			f.Path += "?"
		}
		lines = append(lines, fmt.Sprintf("%s %s %d", f.Remote, f.Path, f.Count))
	}
	slices.Sort(lines)
	return lines
}

func (tt *tester) wantMissed(want ...string) {
	tt.Helper()
	if got := tt.missedLines(""); !slices.Equal(got, want) {
		tt.Errorf("missed %q, want %q", got, want)
	}
}

// wantSealed is a copy of a sealed remote, of any age.
func (g *got) wantSealed() *got { g.Helper(); return g.wantFrom("cache", "hit; detail=sealed") }

var expiringKeys = []string{`mutable_patterns: ['\.idx$']`, "check_mutable_updates: true", "cache: {mutable_ttl: 1}"}

func TestSealedRemoteAnswersFromItsCopies(t *testing.T) {
	t.Parallel()
	tt := newTester(t, expiringKeys...)
	mirror := tt.another()
	tt.origin.file("/a.idx", "0123456789")
	tt.origin.file("/a.bin", "body")
	tt.get("/api/r/a.idx").wantMiss()
	tt.get("/api/r/a.bin").wantMiss()
	tt.moveUpstream(tt.origin.url, append(expiringKeys, "sealed: true", "mirrors: ["+mirror.url+"]")...)
	asked := len(tt.origin.all())
	for range 2 {
		tt.advance(10 * 24 * time.Hour)
		tt.get("/api/r/a.idx").wantSealed().wantBody("0123456789")
	}
	tt.head("/api/r/a.idx").wantStatus(200).wantSealed().wantHeader("Content-Length", "10")
	tt.get("/api/r/a.idx", "Range: bytes=2-3").wantStatus(206).wantSealed().wantBody("23")
	tt.get("/api/v1/remote/r/a.bin").wantSealed().wantBody("body")
	if text := tt.get("/artifacts/r").text; strings.Contains(text, `"fresh": false`) || !strings.Contains(text, `"expires_at": null`) {
		t.Errorf("a copy that always answers is not fresh in %s", text)
	}
	for _, path := range []string{"b.bin", "b.idx", "a.bin?v=2"} {
		tt.get("/api/r/"+path).wantDetail(404, "sealed")
		tt.head("/api/r/" + path).wantStatus(404)
	}
	if n := len(tt.origin.all()) - asked + len(mirror.all()); n > 0 {
		t.Errorf("the upstream of a sealed remote was asked %d times", n)
	}
	tt.wantMissed("r a.bin? 2", "r b.bin 2", "r b.idx 2")
	tt.eventually("a line for each request", func() bool { return len(tt.logs.lines("Cache MISS")) == 2+6 })
	if n := len(tt.logs.lines("Cache HIT")); n != 5 || len(tt.logs.lines("Cache STALE")) > 0 {
		t.Errorf("%d hits in the log, want 5 and nothing stale", n)
	}
	if len(tt.logs.lines("cannot be reached")) > 0 || tt.up.circuitOf("r").outageCause() != nil {
		t.Error("a sealed remote counts as down")
	}
}

func TestSealedRemoteIsNotDown(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.down()
	for _, up := range []string{"0", "1"} {
		tt.get("/api/r/a")
		if text := tt.get("/metrics").text; !strings.Contains(text, "\nartifactapi_remote_up{remote=\"r\"} "+up+"\n") {
			t.Errorf("artifactapi_remote_up is not %s in %s", up, text)
		}
		tt.moveUpstream(tt.origin.url, "sealed: true")
	}
	if text := tt.get("/", "Accept: text/html").text; strings.Contains(text, "down for") || !strings.Contains(text, ">sealed<") || !strings.Contains(text, ">files missed: 1<") {
		t.Errorf("the page does not show a sealed remote that has missed a file: %s", text)
	}
}

// A file that could not be looked for is not missing.
func TestSealedRemoteWhoseStoreIsDown(t *testing.T) {
	t.Parallel()
	broken := &brokenObjects{}
	tt := setup{objects: broken.wrap, keys: []string{"sealed: true"}}.start(t)
	broken.failOpen(errStoreDown)
	tt.get("/api/r/a").wantStatus(503)
	broken.failOpen(nil)
	tt.wantMissed()
}

func TestSEALEDIsForAllRemotes(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: "remotes:\n  a: {base_url: ORIGIN}\n  b: {base_url: ORIGIN}\n  own: {type: local}\n",
		env: map[string]string{"SEALED": "TRUE", "API_TOKEN": "t"}}.start(t)
	for _, name := range []string{"a", "b"} {
		tt.get("/api/"+name+"/x").wantDetail(404, "sealed")
	}
	tt.put("/api/own/x", "own", "Authorization: Bearer t").wantStatus(201)
	tt.get("/api/own/x").wantHit().wantBody("own")
	tt.get("/api/own/y").wantStatus(404)
	tt.configure("remotes:\n  c: {base_url: " + tt.origin.url + "}\n") // it stays after a reload
	tt.get("/api/c/x").wantDetail(404, "sealed")
	if text := tt.get("/config").text; !strings.Contains(text, `"sealed": true`) {
		t.Errorf("/config does not say that remotes are sealed: %s", text)
	}
	tt.wantMissed("a x 1", "b x 1", "c x 1")
	if n := len(tt.origin.all()); n > 0 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

func TestSealedRegistry(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("team/app", "v1", 300)
	m := newMirror(t, h.url())
	m.pull("/v2/reg/team/app", "v1", im)
	m.get("/v2/reg/team/app/referrers/" + im.digest).want(200)
	other := h.image("team/app", "v2", 400)
	m.get("/v2/reg/team/app/manifests/v2").want(200) // its manifest without its layers
	third := h.image("team/third", "v1", 500)
	m.get("/v2/reg/team/third/blobs/" + third.order[1]).want(200)
	m.advance(48 * time.Hour)
	m.reg.config().remotes["reg"].sealed = true
	h.forget()
	m.pull("/v2/reg/team/app", "v1", im)
	m.get("/v2/reg/team/app/manifests/v1").wantHeader("Cache-Status", "artifactapi; hit; detail=sealed")
	m.get("/v2/reg/team/app/referrers/" + im.digest).want(200).wantFrom("cache")
	for path, code := range map[string]string{
		"manifests/v3": "MANIFEST_UNKNOWN", "manifests/" + sha256Of(nil): "MANIFEST_UNKNOWN", "blobs/" + other.order[1]: "BLOB_UNKNOWN",
		"tags/list": "NAME_UNKNOWN", "tags/list?n=1": "NAME_UNKNOWN",
		"blobs/" + third.order[1]:   "BLOB_UNKNOWN", // stored, but nothing says that this image has it
		"referrers/" + other.digest: "NAME_UNKNOWN", // an empty list would say that there is no signature
	} {
		if a := m.get("/v2/reg/team/app/"+path).wantError(404, code); !strings.Contains(string(a.body), "sealed") {
			t.Errorf("%s: %s does not say that the remote is sealed", path, a.body)
		}
		m.head("/v2/reg/team/app/" + path).want(404) // of the layer too, whose size is known
	}
	h.wantAsked(0, "", "")
	var missed []string
	for _, f := range m.cache.missed.list("reg") {
		missed = append(missed, fmt.Sprintf("%s %v %d", f.Path, f.Query, f.Count))
	}
	want := []string{"team/app/manifests/v3 false 2", "team/app/manifests/" + sha256Of(nil) + " false 2", "team/app/blobs/" + other.order[1] + " false 2", "team/app/blobs/" + third.order[1] + " false 2",
		"team/app/tags/list false 2", "team/app/tags/list true 2", "team/app/referrers/" + other.digest + " false 2"}
	slices.Sort(missed)
	slices.Sort(want)
	if !slices.Equal(missed, want) {
		t.Errorf("missed %q, want %q", missed, want)
	}
}

// However a file is asked for, the last step refuses to ask a sealed remote's upstream,
// even if what comes before it did not look.
func TestNoUpstreamIsAskedForASealedRemote(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: "remotes:\n  r: {base_url: ORIGIN, mirrors: [ORIGIN], sealed: true, check_mutable_updates: true}\n" +
		"  d: {base_url: ORIGIN, package: docker, sealed: true}\n"}.start(t)
	var asked []string
	dials := roundTrip(func(r *http.Request) (*http.Response, error) {
		asked = append(asked, r.URL.String())
		return nil, errors.New("dialled")
	})
	for reach := range tt.up.transports {
		tt.up.transports[reach] = dials
	}
	c, ctx, cfg := tt.cache, context.Background(), tt.server.config.Load()
	file := func(path string) fileRequest {
		t, err := cfg.resolveTarget("r/"+path, "")
		if err != nil {
			tt.Fatal(err)
		}
		return fileRequest{target: t}
	}
	fill := func(cp *storedCopy) error {
		f, leads := c.joinFill("r/key/x", file("x/"), cp, 0)
		_, _, err := f.awaitReply(ctx, leads, byteRange{}, cp)
		return err
	}
	registry := &exchange{upstreamRequest: upstreamRequest{remote: cfg.remotes["d"]}, origin: cfg.remotes["d"].origins[0].url}
	for _, way := range []struct {
		name string
		ask  func() error
	}{
		{"GET", func() error { return fill(nil) }},
		{"revalidation", func() error {
			return fill(&storedCopy{object: &object{rec: &record{ETag: `"x"`}, body: unreadBody(1)}})
		}},
		{"HEAD", func() error { _, err := c.headUpstream(ctx, file("x")); return err }},
		{"range", func() error {
			b := &upstreamReader{c: c, ctx: ctx, file: file("x"), validator: `"x"`, size: 9, last: 6}
			return b.seekUpstream(5)
		}},
		{"passing on", func() error { _, err := c.passOnReply(ctx, file("x"), false); return err }},
		{"referrers", func() error {
			call := &registryCall{remote: cfg.remotes["d"], image: "i", route: routeReferrers, digest: sha256Of(nil)}
			_, err := (&listFile{registryFile{call: call}, "manifests"}).requestBody(ctx, tt.up, upstreamRequest{remote: call.remote, method: "GET", wire: "x"})
			return err
		}},
		{"token", func() error {
			_, _, err := tt.up.requestToken(ctx, registry, "", mustURL(t, "https://127.0.0.1/token"))
			return err
		}},
		{"redirect", func() error {
			_, err := tt.up.roundTrip(ctx, registry, mustURL(t, "https://127.0.0.1/elsewhere"), false)
			return err
		}},
		{"taking over from a replica", func() error {
			run := &fillRun{fill: fill0(c, file("x"))}
			run.rec = &record{}
			run.ctx, run.cancel = context.WithCancelCause(ctx)
			defer run.cancel(nil)
			if !run.openSpool() {
				t.Fatal("no spool")
			}
			defer run.spool.release()
			run.validator = `"x"`
			return run.takeOver(errUnreachable).err
		}},
	} {
		if err := way.ask(); !errors.Is(err, errSealed) || len(asked) > 0 {
			t.Errorf("%s: error %v after asking for %q", way.name, err, asked)
		}
		asked = nil
	}
	if tt.up.circuitOf("r").outageCause() != nil || tt.up.circuitOf("d").outageCause() != nil {
		t.Error("a sealed remote counts as down")
	}
}

// fill0 is a fill that nothing was done for.
func fill0(c *cache, file fileRequest) fill { return fill{c: c, key: file.key(), file: file} }

func TestWouldMissAnswersAndRecords(t *testing.T) {
	t.Parallel()
	tt := newTester(t, append(expiringKeys, "would_miss: true", "negative_ttl: 60")...)
	tt.origin.file("/a.idx", "index")
	tt.origin.file("/some%20dir/a%2Bb.bin", "body")
	tt.head("/api/r/a.idx").wantStatus(200)
	tt.get("/api/r/a.idx").wantMiss().wantBody("index")
	tt.get("/api/r/some%20dir/a+b.bin").wantMiss().wantBody("body")
	tt.get("/api/r/some%20dir/a+b.bin").wantHit()
	tt.get("/api/r/gone").wantStatus(404)
	tt.advance(time.Minute)
	tt.get("/api/r/a.idx").wantStatus(200) // expired, and a sealed remote would answer
	tt.get("/api/r/gone").wantStatus(404)
	tt.wantMissed("r a.idx 2", "r gone 2", "r some dir/a+b.bin 1")
	tt.moveUpstream(tt.origin.url, expiringKeys...) // others record nothing
	tt.get("/api/r/other").wantStatus(404)
	tt.wantMissed("r a.idx 2", "r gone 2", "r some dir/a+b.bin 1")
}

func TestMissedFilesAreListedAndForgotten(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: "remotes:\n  a: {base_url: ORIGIN, sealed: true}\n  b: {base_url: ORIGIN, sealed: true}\n", env: map[string]string{"API_TOKEN": "t"}}.start(t)
	const token = "Authorization: Bearer t"
	for range 3 {
		tt.get("/api/a/x/y?token=hunter2").wantStatus(404)
		tt.advance(time.Minute)
	}
	tt.get("/api/a/x/y").wantStatus(404)
	tt.get("/api/b/z").wantStatus(404)
	tt.wantMissed("a x/y 1", "a x/y? 3", "b z 1")
	if lines := tt.missedLines("?remote=b"); !slices.Equal(lines, []string{"b z 1"}) {
		t.Errorf("of b %q are listed", lines)
	}
	if strings.Contains(tt.get("/missed").text+tt.logs.String(), "hunter2") {
		t.Error("a client's query is shown")
	}
	tt.get("/missed?remote=c").wantDetail(404, `there is no remote`)
	tt.put("/missed", "", token).wantStatus(405).wantHeader("Allow", "GET, HEAD, DELETE")
	tt.get("/missed/a").wantStatus(404)
	tt.delete("/missed").wantStatus(401)
	tt.delete("/missed", token, "Sec-Fetch-Site: cross-site").wantStatus(403)
	if text := tt.get("/metrics").text; !strings.Contains(text, "\nartifactapi_missed_files 3\n") {
		t.Errorf("artifactapi_missed_files is not 3 in %s", text)
	}
	tt.delete("/missed?remote=a", token).wantStatus(204)
	tt.wantMissed("b z 1")
	tt.delete("/missed", token).wantStatus(204)
	tt.wantMissed()
	tt.get("/api/b/z").wantStatus(404)
	tt.wantMissed("b z 1")
}

// Clients of npm ask for @scope%2Fname, which is another file than @scope/name.
func TestMissedFileIsFetchedAsItWasAskedFor(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "sealed: true")
	tt.origin.file("/%40scope%2Fname", "body")
	tt.get("/api/r/@scope%2fname").wantStatus(404)
	tt.restart()
	list := tt.get("/missed").text
	tt.moveUpstream(tt.origin.url)
	tt.prefetch("\n"+list).wants("done", "r/@scope/name")
	tt.moveUpstream(tt.origin.url, "sealed: true")
	tt.get("/api/r/@scope%2Fname").wantSealed().wantBody("body")
}

func TestMissedFilesOutliveARestart(t *testing.T) {
	t.Parallel()
	tt := setup{keys: []string{"sealed: true"}, env: map[string]string{"API_TOKEN": "t"}}.start(t)
	tt.get("/api/r/x").wantStatus(404)
	tt.get("/api/r/y?q").wantStatus(404)
	list := tt.get("/missed").text
	tt.restart()
	tt.get("/missed").wantBody(list)
	tt.get("/api/r/x").wantStatus(404)
	tt.wantMissed("r x 2", "r y? 1")
	tt.delete("/missed", "Authorization: Bearer t").wantStatus(204)
	tt.restart()
	tt.wantMissed()
	name := tt.disk.dir + "/.missed"
	tt.end()
	must(t, os.WriteFile(name, []byte("damaged"), 0o600))
	tt.begin()
	tt.wantLog("the snapshot of missed files is damaged")
	tt.wantMissed()
}

func TestMissedFilesAreBounded(t *testing.T) {
	now := time.Now()
	add := func(m *missedFiles, path string) {
		now = now.Add(time.Second)
		m.addMisses(missedFile{missedKey{Remote: "r", Path: path}, now, now, 1})
	}
	m := missedFiles{files: map[missedKey]*missedFile{}}
	add(&m, "often")
	add(&m, "often")
	for i := range maxMissedFiles + 1 {
		add(&m, fmt.Sprint("once-", i))
	}
	if n := m.count(); n > maxMissedFiles || n < maxMissedFiles*9/10 {
		t.Errorf("%d missed files are kept, want %d at most and few less", n, maxMissedFiles)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	list := m.list("")
	m.addMisses(*list[0])
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 3<<20 {
		t.Errorf("a client that reads the list slowly holds %d bytes", grown)
	}
	if now := m.list("")[0]; now.Count != 2*list[0].Count {
		t.Errorf("%+v was missed again: %+v", list[0], now)
	}
	for path, want := range map[string]bool{"often": true, "once-0": false, fmt.Sprint("once-", maxMissedFiles): true} {
		if is := m.files[missedKey{Remote: "r", Path: path}] != nil; is != want {
			t.Errorf("%s is kept: %v, want %v", path, is, want)
		}
	}
	m.forget("")
	if m.count() != 0 {
		t.Errorf("%d files are left", m.count())
	}
}
