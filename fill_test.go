package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// --- many clients, one fetch ---

// Many clients that ask for a file that is not stored cost one upstream request and
// no memory. The server runs in a child process, so that the memory is its alone.
func TestCrowdOnAColdFile(t *testing.T) {
	t.Parallel()
	clients, size := 200, 64<<20
	if testing.Short() {
		clients, size = 50, 32<<20
	}
	const before = 1 << 20 // what the origin sends before all clients have got some
	o := newTestOrigin(t, setup{})
	text := noise(1, size)
	release := o.file("/big.iso", text).etag(`"1"`).stallAt(before)
	defer release()
	c := childSetup{yaml: remoteYAML(o.url)}.start(t)
	tt := c.tester()
	resident := c.memory("VmRSS")

	var begun, done sync.WaitGroup
	begun.Add(clients)
	for range clients {
		done.Go(func() {
			s := tt.open("/api/r/big.iso")
			defer s.leave()
			if s.wantStatus(200); s.res == nil || s.length != int64(size) {
				t.Errorf("Content-Length %d, want %d", s.length, size)
				begun.Done()
				return
			}
			got := readSame(s.res.Body, text, 0, before)
			begun.Done()
			if got == before {
				got = readSame(s.res.Body, text, before, size)
			}
			if got != size {
				t.Errorf("a body was right up to %d of %d bytes only", got, size)
			}
		})
	}
	all := make(chan struct{})
	go func() { begun.Wait(); close(all) }()
	select {
	case <-all:
	case <-time.After(30 * time.Second):
		t.Error("not everybody got bytes before the fill ended")
	}
	release()
	done.Wait()
	if n := o.requests("/big.iso"); n != 1 {
		t.Errorf("%d upstream requests for %d clients", n, clients)
	}
	if grown := c.memory("VmHWM") - resident; grown >= 64<<20 && !raceEnabled() {
		t.Errorf("resident memory grew by %d MiB for a file of %d MiB", grown>>20, size>>20)
	} else {
		t.Logf("resident memory grew by %d MiB for %d clients of a file of %d MiB", grown>>20, clients, size>>20)
	}
	awaitThat(t, "a hit", func() bool {
		g := tt.get("/api/r/big.iso", "Range: bytes=5-9").wantStatus(206).wantBody(text[5:10])
		return g.header.Get("X-Artifact-Source") == "cache"
	})
	if n := o.requests("/big.iso"); n != 1 {
		t.Errorf("%d upstream requests in the end", n)
	}
}

// raceEnabled says whether the race detector's own memory is in the way.
func raceEnabled() bool {
	info, _ := debug.ReadBuildInfo()
	for _, s := range info.Settings {
		if s.Key == "-race" && s.Value == "true" {
			return true
		}
	}
	return false
}

// readSame reads to offset to and returns how far r is the same as text.
func readSame(r io.Reader, text string, from, to int) int {
	buf := make([]byte, 256<<10)
	for from < to {
		n, err := r.Read(buf[:min(len(buf), to-from)])
		if string(buf[:n]) != text[from:from+n] {
			return from + firstDifference(string(buf[:n]), text[from:from+n])
		}
		if from += n; err != nil && from < to {
			return from
		}
	}
	if to == len(text) {
		if n, err := r.Read(buf); n > 0 || err != io.EOF {
			return -1 // goes on behind its end, or has none
		}
	}
	return from
}

func TestFirstByteDoesNotWaitForTheLast(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 300_000)
	f := tt.origin.file("/a", text)
	first, second := f.stallAt(0), f.stallAt(100_000)
	defer first()
	defer second()
	s := tt.open("/api/r/a") // returns: headers come before the first byte
	defer s.leave()
	s.wantStatus(200).wantMiss().wantHeader("Content-Length", "300000")
	first()
	if got := s.read(100_000); got != text[:100_000] {
		t.Error("wrong bytes")
	}
	second()
	s.rest().wantBody(text)
}

func TestLateComersJoinTheFill(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 1<<20)
	release := tt.origin.file("/a", text).stallAt(900_000)
	defer release()
	first := tt.open("/api/r/a")
	defer first.leave()
	first.read(900_000)
	late := tt.open("/api/r/a")
	defer late.leave()
	late.read(900_000)
	release()
	late.rest().wantJoined().wantBody(text)
	first.rest().wantMiss().wantBody(text)
	tt.settle()
	tt.get("/api/r/a").wantHit()
	tt.wantRequests("/a", 1)
}

// Between the last byte and the store there is no moment at which the file is
// neither here nor there.
func TestNobodyFetchesAgainWhatWasJustFetched(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	for i := range 30 {
		path := fmt.Sprintf("/f%d", i)
		tt.origin.file(path, "body")
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				for range 10 {
					s := tt.open("/api/r" + path)
					s.rest().wantStatus(200).wantBody("body")
					s.leave()
				}
			})
		}
		all.Wait()
		tt.wantRequests(path, 1)
	}
}

// heldObjects store when they are let.
type heldObjects struct {
	objects
	gate chan struct{}
}

func (g *heldObjects) put(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error {
	<-g.gate
	return g.objects.put(ctx, key, rec, spool, when)
}

// While a body that is all there is being stored, which may take long, it is
// as good as stored: who comes then does not begin or join a download.
func TestHitWhileTheBodyIsBeingStored(t *testing.T) {
	t.Parallel()
	gated := &heldObjects{gate: make(chan struct{})}
	tt := setup{objects: func(o objects) objects { gated.objects = o; return gated }, keys: []string{"mutable_patterns: ['^m']"}}.start(t)
	text := noise(1, 100_000)
	ask := func(method, path string, headers ...string) *got {
		s := tt.start(t.Context(), method, path, nil, headers...) // get would wait for the store
		defer s.leave()
		return s.rest()
	}
	for path, status := range map[string]string{"a": "hit", "m": "hit; ttl=N"} {
		tt.origin.file("/"+path, text)
		ask("GET", "/api/r/"+path).wantMiss().wantBody(text)
		tt.wantStored(path, false)
		ask("GET", "/api/r/"+path).wantFrom("cache", status).wantHeader("Age", "0").wantBody(text)
		ask("GET", "/api/r/"+path, "Range: bytes=-9").wantStatus(206).wantFrom("cache", status).wantBody(text[99_991:])
		ask("HEAD", "/api/r/"+path).wantFrom("cache", status).wantHeader("Content-Length", "100000")
		tt.wantRequests("/"+path, 1)
	}
	close(gated.gate)
	tt.eventually("both to be stored", func() bool { return tt.flying() == 0 })
	tt.get("/api/r/a").wantHit().wantBody(text)
}

// TestEachRequestAsksUpstreamWithoutATTL: a body that is being stored is the answer to
// those who came before it, and a file whose TTL is 0 is asked for again for all others.
func TestEachRequestAsksUpstreamWithoutATTL(t *testing.T) {
	t.Parallel()
	gated := &heldObjects{gate: make(chan struct{}, 10)}
	tt := setup{objects: func(o objects) objects { gated.objects = o; return gated }, keys: []string{"mutable_patterns: ['^m']", "cache: {mutable_ttl: 0}"}}.start(t)
	tt.origin.file("/m", "body")
	ask := func(method string) *got {
		s := tt.start(t.Context(), method, "/api/r/m", nil)
		defer s.leave()
		return s.rest()
	}
	ask("GET").wantMiss().wantBody("body")
	for n, method := range []string{"GET", "HEAD", "GET"} {
		next := make(chan *got)
		go func() { next <- ask(method) }()
		tt.eventually("the next client to wait for the one before", func() bool { return tt.waiting("m") == 1 })
		tt.wantRequests("GET /m", n+1)
		gated.gate <- struct{}{}
		tt.eventually("upstream to be asked", func() bool { return tt.origin.requests("GET /m") == n+2 })
		(<-next).wantStatus(200).wantFrom("remote", "fwd=stale; fwd-status=200; stored")
	}
	close(gated.gate)
	tt.settle()
}

// hookedObjects are a store whose misses wait for the test.
type hookedObjects struct {
	objects
	missed atomic.Pointer[func()]
}

func (h *hookedObjects) open(ctx context.Context, key string, off int64) (*object, error) {
	obj, err := h.objects.open(ctx, key, off)
	if f := h.missed.Load(); f != nil && err != nil {
		(*f)()
	}
	return obj, err
}

// Who looked into the store just before a fill ended, and takes off after it,
// looks again.
func TestLateLookerDoesNotFetchAgain(t *testing.T) {
	t.Parallel()
	hooked := &hookedObjects{}
	tt := setup{objects: func(o objects) objects { hooked.objects = o; return hooked }}.start(t)
	tt.origin.file("/a", "body")
	between := func() {
		hooked.missed.Store(nil)
		tt.get("/api/r/a").wantMiss().wantBody("body")
		tt.eventually("the fill to end", func() bool { return tt.flying() == 0 })
	}
	hooked.missed.Store(&between)
	tt.get("/api/r/a").wantHit().wantBody("body")
	tt.wantRequests("/a", 1)
}

// The end of another file's fill is no reason to look again: in S3 each look is a request.
func TestEndOfAnotherFillIsNoReasonToLookAgain(t *testing.T) {
	t.Parallel()
	hooked := &hookedObjects{}
	tt := setup{objects: func(o objects) objects { hooked.objects = o; return hooked }}.start(t)
	tt.origin.file("/a", "body")
	tt.origin.file("/b", "body")
	var misses atomic.Int64
	count := func() { misses.Add(1) }
	between := func() {
		hooked.missed.Store(&count)
		tt.get("/api/r/b").wantMiss()
		tt.eventually("the other fill to end", func() bool { return tt.flying() == 0 })
	}
	hooked.missed.Store(&between)
	tt.get("/api/r/a").wantMiss().wantBody("body")
	if n := misses.Load(); n != 1 {
		t.Errorf("%d looks behind the first one, not that for the other file alone", n)
	}
}

// --- clients that leave or are slow ---

func TestFirstClientLeavesAndDisturbsNobody(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 2<<20)
	release := tt.origin.file("/a", text).stallAt(200_000)
	defer release()
	first := tt.open("/api/r/a")
	first.read(200_000)
	second := tt.open("/api/r/a")
	defer second.leave()
	second.read(100_000)
	first.leave()
	tt.eventually("the first client to be gone", func() bool { return tt.waiting("a") == 1 })
	release()
	second.rest().wantBody(text)
	tt.settle()
	tt.get("/api/r/a").wantHit().wantBody(text)
	tt.wantRequests("/a", 1)
}

func TestFillThatNobodyWaitsForIsFinished(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 1<<20)
	release := tt.origin.file("/a", text).stallAt(100_000)
	defer release()
	only := tt.open("/api/r/a")
	only.read(100_000)
	only.leave()
	tt.eventually("the client to be gone", func() bool { return tt.waiting("a") == 0 })
	release()
	tt.eventually("the fill to end", func() bool { return tt.flying() == 0 })
	tt.get("/api/r/a").wantHit().wantBody(text)
	tt.wantRequests("/a", 1)
	tt.wantNoSpools()
}

func TestSlowClientSlowsNobody(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 24<<20) // more than sockets hold for a client that does not read
	tt.origin.file("/a", text)
	slow := tt.open("/api/r/a")
	defer slow.leave()
	slow.read(1)
	tt.get("/api/r/a").wantBody(text)
	tt.eventually("the fill to end beside a client that does not read", func() bool { return tt.flying() == 0 })
	tt.wantStored("a", true)
	tt.get("/api/r/a").wantHit().wantBody(text)
	slow.read(1)
	slow.rest().wantBody(text) // it still gets it all, though the spool has moved
	tt.wantRequests("/a", 1)
	tt.wantNoSpools()
}

// Who takes a step now and then is slow, not dead, however long it lasts.
func TestSlowClientIsNotTakenForDead(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		text := noise(1, 3*sendStep)
		tt.origin.file("/a", text)
		for range 2 { // from the fill, and from the store
			s := tt.open("/api/r/a")
			for range 3 { // together longer than the patience
				time.Sleep(clientTimeout/2 - time.Second) // not at the very instant of the first deadline
				s.read(sendStep)
			}
			s.rest().wantStatus(200).wantBody(text)
			s.leave()
			tt.settle()
		}
	})
}

func TestAtMostEightFillsGoOnAlone(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 100_000)
	for i := range 9 {
		path := fmt.Sprintf("/f%d", i)
		at := int64(90_000)
		if i == 3 {
			at = 10 // furthest from its end
		}
		release := tt.origin.file(path, text).stallAt(at)
		defer release()
		s := tt.open("/api/r" + path)
		s.read(10)
		tt.eventually("bytes", func() bool { return tt.filled(path[1:]) == at })
		s.leave()
		tt.eventually("the client to be gone", func() bool { return tt.waiting(path[1:]) == 0 })
	}
	tt.eventually("one fill to be dropped", func() bool { return tt.flying() == 8 })
	if tt.filled("f3") >= 0 {
		t.Error("the fill furthest from its end goes on")
	}
	watched := tt.open("/api/r/f0") // one that has a client again is not alone
	defer watched.leave()
	release := tt.origin.file("/g", text).stallAt(10)
	defer release()
	s := tt.open("/api/r/g")
	s.read(10)
	s.leave()
	tt.eventually("the client to be gone", func() bool { return tt.waiting("g") == 0 })
	if n := tt.flying(); n != 9 {
		t.Errorf("%d fills go on, want eight alone and one with a client", n)
	}
}

// Bodies that are all there and take their time to be stored are not what is
// dropped: who asks again would fetch them again.
func TestBodiesThatAreBeingStoredAreNotDropped(t *testing.T) {
	t.Parallel()
	held := &heldObjects{gate: make(chan struct{})}
	tt := setup{objects: func(o objects) objects { held.objects = o; return held }}.start(t)
	for range 2 {
		for i := range 2 * maxAbandonedPerRemote {
			path := fmt.Sprintf("/f%d", i)
			tt.origin.file(path, path)
			s := tt.open("/api/r" + path)
			s.rest().wantStatus(200).wantBody(path)
			s.leave()
			tt.eventually("the client to be gone", func() bool { return tt.waiting(path[1:]) == 0 })
		}
	}
	for i := range 2 * maxAbandonedPerRemote {
		tt.wantRequests(fmt.Sprintf("/f%d", i), 1)
	}
	close(held.gate)
	tt.eventually("all to be stored", func() bool { return tt.flying() == 0 })
}

func TestFillsPerRemoteAreBounded(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	open := make(chan struct{})
	var inside, most atomic.Int64
	tt.origin.troubled(func(w http.ResponseWriter, r *http.Request) {
		now := inside.Add(1)
		defer inside.Add(-1)
		for {
			if m := most.Load(); now <= m || most.CompareAndSwap(m, now) {
				break
			}
		}
		select {
		case <-open:
		case <-r.Context().Done():
		case <-tt.origin.ended:
		}
		_, _ = io.WriteString(w, r.URL.Path)
	})
	var all sync.WaitGroup
	for i := range maxPerRemote + 6 {
		path := fmt.Sprintf("/f%d", i)
		all.Go(func() { tt.get("/api/r" + path).wantStatus(200).wantBody(path) })
	}
	tt.eventually("64 fills", func() bool { return inside.Load() == maxPerRemote })
	tt.eventually("the rest to wait", func() bool { return tt.flying() == maxPerRemote+6 })
	impatient := make(chan struct{})
	ctx, leave := context.WithCancel(context.Background())
	go func() {
		defer close(impatient)
		tt.start(ctx, "GET", "/api/r/impatient", nil).leave()
	}()
	tt.eventually("one more", func() bool { return tt.flying() == maxPerRemote+7 })
	leave()
	<-impatient
	tt.eventually("it to be gone", func() bool { return tt.flying() == maxPerRemote+6 })
	close(open)
	all.Wait()
	if n := most.Load(); n != maxPerRemote {
		t.Errorf("%d fills at once, want %d", n, maxPerRemote)
	}
	tt.wantRequests("/impatient", 0)
}

// So many files may wait for a place; what comes behind them is told to come back.
func TestQueueOfFillsIsBounded(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	open := make(chan struct{})
	tt.origin.troubled(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-open:
		case <-tt.origin.ended:
		}
		_, _ = io.WriteString(w, r.URL.Path)
	})
	const most = maxPerRemote + maxQueuedPerRemote
	var all sync.WaitGroup
	for i := range most {
		path := fmt.Sprintf("/f%d", i)
		all.Go(func() { tt.get("/api/r" + path).wantStatus(200).wantBody(path) })
	}
	slots := tt.cache.fills.slotsOf("r")
	tt.eventually("a full queue", func() bool { return len(slots.queue) == most })
	tt.get("/api/r/more").wantDetail(503, "too many downloads").wantHeader("Retry-After", "10")
	for range 3 { // many clients of a file that waits count once
		all.Go(func() { tt.get("/api/r/f0").wantStatus(200) })
	}
	close(open)
	all.Wait()
	tt.settle()
	if n := len(slots.queue); n != 0 || len(slots.places) != 0 {
		t.Errorf("%d fills are counted as queued, %d have a place", n, len(slots.places))
	}
	tt.get("/api/r/more").wantStatus(200)
}

// An upstream that hangs keeps all fills of its remote waiting. Who has a copy
// is not to wait behind them.
func TestExpiredCopyBehindFillsThatHang(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t, "mutable_patterns: ['^m']")
		tt.origin.file("/m", "old")
		tt.get("/api/r/m").wantMiss()
		tt.advance(2 * time.Hour)
		tt.origin.troubled(tt.origin.stalls)
		var all sync.WaitGroup
		for i := range maxPerRemote {
			all.Go(func() { tt.get(fmt.Sprintf("/api/r/f%d", i)).wantStatus(504) })
		}
		synctest.Wait()
		began := time.Now()
		tt.get("/api/r/m").wantFrom("cache", "hit; ttl=-N; detail=crowded").wantBody("old")
		if d := time.Since(began); d != copyTimeout {
			t.Errorf("the copy came after %v", d)
		}
		all.Wait()
		tt.origin.troubled(nil)
		tt.advance(outagePause + time.Second)
		tt.origin.file("/m", "new")
		tt.get("/api/r/m").wantRefetched().wantBody("new") // nothing was learned of it
	})
}

// Each of several servers, or HEAD and then GET, may take its time. Who has a copy does
// not wait for all of them, and not for a manifest that does not arrive.
func TestExpiredCopyBehindSlowAnswers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := setup{bubble: true, yaml: "remotes:\n  r: {base_url: ORIGIN, mirrors: [ORIGIN/a, ORIGIN/b], mutable_patterns: ['^m']}\n" +
			"  d: {base_url: ORIGIN, package: docker}\n"}.start(t)
		text := `{"schemaVersion": 2}`
		tt.origin.file("/m", "old")
		tt.origin.file("/v2/i/manifests/t", text).says("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		for _, path := range []string{"/api/r/m", "/v2/d/i/manifests/t"} {
			tt.get(path).wantMiss()
		}
		tt.advance(2 * time.Hour)
		tt.origin.troubled(tt.origin.stalls)
		began := time.Now()
		tt.get("/api/r/m").wantFrom("cache", "hit; ttl=-N; detail=unreachable").wantBody("old")
		tt.origin.troubled(nil)
		release := tt.origin.file("/v2/i/manifests/t", text).stallAt(5)
		tt.get("/v2/d/i/manifests/t").wantFrom("cache", "hit; ttl=-N; detail=unreachable").wantBody(text)
		if d := time.Since(began); d != 2*maxWholeBodyWait {
			t.Errorf("the copies came after %v", d)
		}
		release()
		tt.origin.awaitRequests("/b/m", 1) // the fill goes on
	})
}

// --- bodies that break off ---

func TestCutBodyIsResumed(t *testing.T) {
	t.Parallel()
	const size, half = 1 << 20, 1 << 19
	text := noise(1, size)
	date := longAgo.Format(http.TimeFormat)
	for what, c := range map[string]struct {
		set     func(*testFile)
		ranges  []string
		ifRange string
	}{
		"by ETag":                     {func(f *testFile) { f.etag(`"1"`).cut(half) }, []string{"bytes=524288-"}, `"1"`},
		"by a date that is long past": {func(f *testFile) { f.cut(half) }, []string{"bytes=524288-"}, date},
		"three times": {func(f *testFile) { f.etag(`"1"`).cut(100, 1000, 1_000_000) },
			[]string{"bytes=100-", "bytes=1000-", "bytes=1000000-"}, `"1"`},
		"before the first byte": {func(f *testFile) { f.etag(`"1"`).cut(0) }, []string{"bytes=0-"}, `"1"`},
		"at the last byte":      {func(f *testFile) { f.etag(`"1"`).cut(size - 1) }, []string{"bytes=1048575-"}, `"1"`},
		"of unknown length":     {func(f *testFile) { f.etag(`"1"`).chunked().cut(half) }, []string{"bytes=524288-"}, `"1"`},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			tt := newTester(t)
			c.set(tt.origin.file("/a", text))
			tt.get("/api/r/a").wantStatus(200).wantMiss().wantBody(text)
			tt.get("/api/r/a").wantHit().wantBody(text)
			want := []string{"GET /a"}
			for _, r := range c.ranges {
				want = append(want, "GET /a "+r)
			}
			if got := tt.origin.all(); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("the origin was asked %v, want %v", got, want)
			}
			if got := tt.origin.last("/a").header.Get("If-Range"); got != c.ifRange {
				t.Errorf("If-Range: %s, want %s", got, c.ifRange)
			}
			tt.wantNoSpools()
		})
	}
}

func TestCutBodyThatCannotBeResumed(t *testing.T) {
	t.Parallel()
	const half = 1 << 19
	text := noise(1, 1<<20)
	hopeless := map[string]bool{"a weak ETag": true, "no validator": true, "a date of just now": true}
	for what, set := range map[string]func(tt *tester, f *testFile){
		"no ranges there":        func(_ *tester, f *testFile) { f.etag(`"1"`).noRanges().cut(half) },
		"a weak ETag":            func(_ *tester, f *testFile) { f.etag(`W/"1"`).cut(half) },
		"no validator":           func(_ *tester, f *testFile) { f.undated().cut(half) },
		"a date of just now":     func(_ *tester, f *testFile) { f.at(time.Now()).cut(half) },
		"it is stuck four times": func(_ *tester, f *testFile) { f.etag(`"1"`).cut(half, half, half, half, half) },
		"the file has changed": func(_ *tester, f *testFile) {
			f.replacedAt(half, http.Header{"Etag": {`"1"`}}, 200, http.Header{"Etag": {`"2"`}})
		},
		"the file has changed, and If-Range is ignored": func(_ *tester, f *testFile) {
			f.replacedAt(half, http.Header{"Etag": {`"1"`}}, 206, http.Header{"Etag": {`"2"`}})
		},
		"the 206 names no version": func(_ *tester, f *testFile) { f.replacedAt(half, http.Header{"Etag": {`"1"`}}, 206, http.Header{}) },
		"the 206 names the version weakly": func(_ *tester, f *testFile) {
			f.replacedAt(half, http.Header{"Etag": {`"1"`}}, 206, http.Header{"Etag": {`W/"1"`}})
		},
		"the 206 is of another time": func(_ *tester, f *testFile) {
			f.replacedAt(half, http.Header{"Last-Modified": {longAgo.Format(http.TimeFormat)}}, 206, http.Header{"Last-Modified": {time.Now().UTC().Format(http.TimeFormat)}})
		},
		"the 206 has no date": func(_ *tester, f *testFile) {
			f.replacedAt(half, http.Header{"Last-Modified": {longAgo.Format(http.TimeFormat)}}, 206, http.Header{"Etag": {`"1"`}})
		},
		"a 206 for another range": func(tt *tester, f *testFile) {
			f.etag(`"1"`).cut(half).acts(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Range") != "" {
					w.Header().Set("Content-Range", "bytes 524289-1048575/1048576")
					w.WriteHeader(206)
					_, _ = io.WriteString(w, text[half+1:])
					return
				}
				w.Header().Set("Content-Length", "1048576")
				_, _ = io.WriteString(w, text[:half])
				panic(http.ErrAbortHandler)
			})
		},
		"a 206 of another size": func(tt *tester, f *testFile) {
			f.etag(`"1"`).acts(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Range") != "" {
					w.Header().Set("Content-Range", "bytes 524288-1048575/1048577")
					w.WriteHeader(206)
					_, _ = io.WriteString(w, text[half:])
					return
				}
				w.Header().Set("Content-Length", "1048576")
				_, _ = io.WriteString(w, text[:half])
				panic(http.ErrAbortHandler)
			})
		},
		"206s that end too soon": func(tt *tester, f *testFile) {
			f.etag(`"1"`).acts(func(w http.ResponseWriter, r *http.Request) {
				from := half
				if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil {
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/1048576", from, from+9))
					w.WriteHeader(206)
					_, _ = io.WriteString(w, text[from:from+10])
					return
				}
				w.Header().Set("Content-Length", "1048576")
				_, _ = io.WriteString(w, text[:half])
				panic(http.ErrAbortHandler)
			})
		},
		"a length that promises too much": func(_ *tester, f *testFile) { f.etag(`"1"`).lying(5) },
		"chunks without an end":           func(_ *tester, f *testFile) { f.chunked().noRanges().cut(half) },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			tt := newTester(t)
			f := tt.origin.file("/a", text)
			release := f.stallAt(1000) // until all three clients are here
			set(tt, f)
			var all sync.WaitGroup
			for range 3 {
				all.Go(func() {
					g := tt.get("/api/r/a")
					if g.err == nil && g.status == 502 {
						return // the fill ended before this client's answer began
					}
					if g.wantAborted(); !strings.HasPrefix(text, g.text) {
						t.Error("wrong bytes before the abort")
					}
				})
			}
			if f.actsAlready() {
				release()
			} else {
				tt.eventually("three clients", func() bool { return tt.waiting("a") == 3 })
				release()
			}
			all.Wait()
			if n := tt.origin.requests("/a"); n > 1 && hopeless[what] {
				t.Errorf("the rest was asked for without a validator: %v", tt.origin.all())
			}
			tt.wantStored("a", false)
			tt.wantNoSpools()
			tt.origin.file("/a", text) // healthy again: the next request starts afresh
			tt.get("/api/r/a").wantStatus(200).wantMiss().wantBody(text)
			if h := tt.origin.last("/a").header; h.Get("Range") != "" {
				t.Error("the next request did not start afresh")
			}
		})
	}
}

// replacedAt makes the first answer, with these headers, break off at n. The rest is
// asked for with that status and those other headers.
func (f *testFile) replacedAt(n int, first http.Header, status int, other http.Header) {
	f.acts(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Del("Last-Modified")
		if r.Header.Get("Range") == "" {
			maps.Copy(w.Header(), first)
			w.Header().Set("Content-Length", strconv.Itoa(len(f.text)))
			_, _ = io.WriteString(w, f.text[:n])
			panic(http.ErrAbortHandler)
		}
		maps.Copy(w.Header(), other)
		rest := f.text
		if status == http.StatusPartialContent {
			rest = rest[n:]
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", n, len(f.text)-1, len(f.text)))
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, rest)
	})
}

// actsAlready says whether the file has a handler of its own, which knows no
// gates.
func (f *testFile) actsAlready() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.act != nil
}

// base_url answers, and breaks off at the same place each time.
func TestStuckBodyGoesOnAtAMirror(t *testing.T) {
	t.Parallel()
	for _, spooled := range []bool{true, false} {
		t.Run(fmt.Sprintf("spooled %v", spooled), func(t *testing.T) {
			t.Parallel()
			spools := &brokenSpools{}
			tt := setup{spools: spools.wrap}.start(t)
			if !spooled {
				spools.set(func() { spools.none = errNoSpace })
			}
			m := tt.another()
			tt.moveUpstream(tt.origin.url, "mirrors: ["+m.url+"]")
			text := noise(1, 1<<20)
			tt.origin.file("/a", text).etag(`"1"`).cut(600_000, 600_000, 600_000, 600_000, 600_000)
			m.file("/a", text).etag(`"1"`)
			tt.get("/api/r/a").wantStatus(200).wantBody(text)
			if got := strings.Join(m.all(), ", "); got != "GET /a bytes=600000-" {
				t.Errorf("the mirror was asked %q", got)
			}
		})
	}
}

func TestMirrorFinishesWhatBaseBegan(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	m := tt.another()
	tt.moveUpstream(tt.origin.url, "mirrors: ["+m.url+"]")
	text := noise(1, 1<<20)
	tt.origin.file("/a", text).etag(`"1"`).cut(600_000)
	m.file("/a", text).etag(`"1"`)
	s := tt.origin.file("/a", text).etag(`"1"`)
	release := s.stallAt(600_000)
	defer release()
	in := tt.open("/api/r/a")
	defer in.leave()
	in.read(600_000)
	before := tt.yaml()
	tt.configure("remotes: {other: {type: local}}") // of no matter to what has begun
	tt.down()
	in.rest().wantMiss().wantBody(text)
	if got := m.last("/a").header.Get("Range"); got != "bytes=600000-" {
		t.Errorf("the mirror was asked for %q", got)
	}
	tt.settle()
	tt.get("/api/r/a").wantStatus(404)
	tt.configure(before)
	tt.get("/api/r/a").wantHit().wantBody(text)
}

// A mirror that has another version is passed over.
func TestMirrorWithAnotherVersionIsPassedOver(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	other, same := tt.another(), tt.another()
	tt.moveUpstream(tt.origin.url, "mirrors: ["+other.url+", "+same.url+"]")
	text := noise(1, 1<<20)
	other.file("/a", noise(2, 1<<20)).etag(`"2"`)
	same.file("/a", text).etag(`"1"`)
	release := tt.origin.file("/a", text).etag(`"1"`).stallAt(600_000)
	defer release()
	in := tt.open("/api/r/a")
	defer in.leave()
	in.read(600_000)
	tt.down()
	in.rest().wantMiss().wantBody(text)
	if got := same.last("/a").header.Get("Range"); got != "bytes=600000-" {
		t.Errorf("the mirror was asked for %q", got)
	}
}

// To an HTTP/1.0 client the connection's end is a body's end where no length
// was told: it has to see a broken one, or a 502 where nothing was sent yet.
func TestCutBodyIsNoCleanEndForHTTP10(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 200_000)
	tt.origin.file("/whole", text).chunked()
	tt.origin.file("/cut", text).chunked().noRanges().cut(100_000)
	for path, whole := range map[string]bool{"whole": true, "cut": false} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(tt.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "GET /api/r/"+path+" HTTP/1.0\r\n\r\n")
		b, err := io.ReadAll(conn)
		if !whole && bytes.HasPrefix(b, []byte("HTTP/1.0 502 ")) {
			err = io.ErrUnexpectedEOF
		}
		if conn.Close(); whole != (err == nil) || whole && !bytes.HasSuffix(b, []byte(text)) {
			t.Errorf("%s: %d bytes, then %v", path, len(b), err)
		}
	}
}

// What lies behind the promised length is not the body, and never becomes
// another answer.
func TestLengthThatPromisesTooLittle(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	evil := "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
	tt.origin.file("/a", "good"+evil).lying(-int64(len(evil)))
	tt.origin.file("/b", "bbbb")
	tt.get("/api/r/a").wantBody("good")
	tt.get("/api/r/b").wantBody("bbbb")
	tt.get("/api/r/a").wantHit().wantBody("good")
}

func TestCloseDelimitedBodyIsServedAndNotStored(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 100_000)
	f := tt.origin.file("/a.zip", text).closeDelimited()
	for range 2 {
		tt.get("/api/r/a.zip").wantStatus(200).wantUnstored().wantBody(text)
	}
	tt.wantRequests("/a.zip", 2)
	tt.wantLog("neither a length nor chunks")
	f.cut(500) // nobody can tell; but it does not stay
	tt.get("/api/r/a.zip").wantBody(text[:500])
	tt.wantStored("a.zip", false)
	tt.wantNoSpools()
}

func TestChunkedBodyIsStored(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 300_000)
	f := tt.origin.file("/a", text).chunked()
	release := f.stallAt(1000)
	defer release()
	first := tt.open("/api/r/a")
	defer first.leave()
	first.read(1000)
	// Its length is not known yet: full answers, whatever was asked for.
	ranged := tt.open("/api/r/a", "Range: bytes=5-9")
	defer ranged.leave()
	ranged.wantStatus(200).wantHeader("Accept-Ranges", "").wantHeader("Content-Length", "")
	conditional := tt.open("/api/r/a", "If-Modified-Since: "+longAgo.Add(time.Hour).Format(http.TimeFormat))
	defer conditional.leave()
	conditional.wantStatus(200)
	tt.head("/api/r/a").wantStatus(200).wantHeader("Content-Length", "").wantBody("")
	release()
	first.rest().wantMiss().wantBody(text)
	ranged.rest().wantBody(text)
	conditional.rest().wantBody(text)
	tt.settle()
	tt.get("/api/r/a", "Range: bytes=5-9").wantStatus(206).wantHit().wantBody(text[5:10])
	tt.wantRequests("/a", 1)
}

// --- ranges and conditions while a fill runs ---

func TestRangesWhileFilling(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	const size, at = 2 << 20, 1 << 20
	text := noise(1, size)
	release := tt.origin.file("/a", text).stallAt(at)
	defer release()
	first := tt.open("/api/r/a")
	defer first.leave()
	first.read(at)

	// What is there already is answered now.
	tt.get("/api/r/a", "Range: bytes=0-99").wantStatus(206).wantJoined().wantBody(text[:100]).
		wantHeader("Content-Range", fmt.Sprintf("bytes 0-99/%d", size))
	tt.get("/api/r/a", fmt.Sprintf("Range: bytes=%d-%d", at-5, at-1)).wantStatus(206).wantBody(text[at-5 : at])
	tt.get("/api/r/a", "Range: bytes=1-2,10-19,5-5").wantStatus(206).wantJoined()
	tt.get("/api/r/a", "Range: bytes=99999999-").wantStatus(416).wantHeader("Content-Range", fmt.Sprintf("bytes */%d", size))
	tt.get("/api/r/a", "If-Modified-Since: "+longAgo.Format(http.TimeFormat)).wantStatus(304)
	tt.get("/api/r/a", "Range: bytes=3-4", "If-Range: "+longAgo.Format(http.TimeFormat)).wantStatus(206).wantBody(text[3:5])
	tt.head("/api/r/a").wantStatus(200).wantHeader("Content-Length", strconv.Itoa(size)).wantHeader("ETag", "")

	// What is not waits for the fill.
	waiting := map[*stream]string{
		tt.open("/api/r/a", "Range: bytes=-7"):                                       text[size-7:],
		tt.open("/api/r/a", fmt.Sprintf("Range: bytes=%d-%d", at-5, at+5)):           text[at-5 : at+6],
		tt.open("/api/r/a", fmt.Sprintf("Range: bytes=%d-", at+100_000)):             text[at+100_000:],
		tt.open("/api/r/a", "Range: bytes=0-9", `If-Range: "something else"`):        text,
		tt.open("/api/r/a", fmt.Sprintf("Range: bytes=%d-%d", size-1, size+100_000)): text[size-1:],
	}
	release()
	for s, want := range waiting {
		s.rest().wantBody(want)
		s.leave()
	}
	first.rest().wantBody(text)
	tt.wantRequests("/a", 1)
}

func TestFarRangeIsFetchedOnItsOwn(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	const size = 24 << 20
	text := noise(1, size)
	f := tt.origin.file("/a", text).etag(`"1"`)
	release := f.stallAt(1 << 20)
	defer release()
	first := tt.open("/api/r/a")
	defer first.leave()
	first.read(1 << 20)

	tt.get("/api/r/a", "Range: bytes=20000000-20000099").wantStatus(206).wantBody(text[20_000_000:20_000_100])
	if h := tt.origin.last("/a").header; h.Get("Range") != "bytes=20000000-20000099" || h.Get("If-Range") != `"1"` {
		t.Errorf("asked for Range %q, If-Range %q", h.Get("Range"), h.Get("If-Range"))
	}
	tt.get("/api/r/a", "Range: bytes=-1000").wantStatus(206).wantBody(text[size-1000:])
	tt.get("/api/r/a", "Range: bytes=20000000-").wantStatus(206).wantBody(text[20_000_000:])
	tt.wantRequests("/a", 4)

	near := tt.open("/api/r/a", "Range: bytes=2000000-2000099") // the fill will be there soon
	defer near.leave()
	release()
	near.rest().wantStatus(206).wantBody(text[2_000_000:2_000_100])
	first.rest().wantBody(text)
	tt.wantRequests("/a", 4)
	tt.settle()
	tt.get("/api/r/a").wantHit().wantBody(text)
}

func TestFarRangesAreBoundedAndComeBackToTheFill(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	const size = 24 << 20
	text := noise(1, size)
	f := tt.origin.file("/a", text).etag(`"1"`)
	first, far := f.stallAt(1<<20), f.stallAt(20_000_050)
	defer first()
	defer far()
	begun := tt.open("/api/r/a")
	defer begun.leave()
	begun.read(1 << 20)
	var streams []*stream
	var opened sync.WaitGroup
	var mu sync.Mutex
	for range maxFarRanges + 3 {
		opened.Go(func() {
			s := tt.open("/api/r/a", "Range: bytes=20000000-20000999")
			mu.Lock()
			defer mu.Unlock()
			streams = append(streams, s)
		})
	}
	tt.origin.awaitRequests("/a", 1+maxFarRanges)
	tt.eventually("the others to wait", func() bool { return tt.waiting("a") == 1+maxFarRanges+3 })
	tt.wantRequests("/a", 1+maxFarRanges)
	first() // the fill comes by and serves those that wait; far ones are held
	far()
	opened.Wait()
	for _, s := range streams {
		s.rest().wantStatus(206).wantBody(text[20_000_000:20_001_000])
		s.leave()
	}
	begun.rest().wantBody(text)
}

func TestFarRangeWithoutRangesUpstreamWaits(t *testing.T) {
	t.Parallel()
	for what, set := range map[string]func(*testFile){
		"no ranges":    func(f *testFile) { f.etag(`"1"`).noRanges() },
		"no validator": func(f *testFile) { f.undated() },
		"cut again":    func(f *testFile) { f.etag(`"1"`).cut(-1).cut(slices.Repeat([]int64{20_000_010}, 20)...) },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			tt := newTester(t)
			text := noise(1, 24<<20)
			f := tt.origin.file("/a", text)
			set(f)
			release := f.stallAt(1 << 20)
			defer release()
			first := tt.open("/api/r/a")
			defer first.leave()
			first.read(1 << 20)
			far := make(chan *got)
			go func() { far <- tt.get("/api/r/a", "Range: bytes=20000000-20000099") }()
			tt.eventually("the far range", func() bool { return tt.waiting("a") == 2 })
			if what == "no ranges" {
				tt.origin.awaitRequests("/a", 2)
			}
			release()
			(<-far).wantStatus(206).wantBody(text[20_000_000:20_000_100])
			first.rest().wantBody(text)
		})
	}
}

// stoppingReader serves a body that stands still at a watermark.
type stoppingReader struct {
	text string
	at   int
	off  int
	open chan struct{}
}

func (r *stoppingReader) Read(p []byte) (int, error) {
	if r.off == r.at {
		<-r.open
	}
	if r.off == len(r.text) {
		return 0, io.EOF
	}
	end := len(r.text)
	if r.off < r.at {
		end = r.at
	}
	n := copy(p, r.text[r.off:end])
	r.off += n
	return n, nil
}

func (r *stoppingReader) Close() error { return nil }

// FuzzRangeWhileFilling compares answers given while a file grows with what
// net/http says about the whole of it.
func FuzzRangeWhileFilling(f *testing.F) {
	for _, s := range []string{"bytes=0-0", "bytes=-1", "bytes=5-", "bytes=0-9,20-29", "bytes=9999-", "bytes=3-1", "bytes=-0", "bytes=", "items=0-1",
		"bytes=0-,0-,0-", "bytes= 1-2 , 3-4", "bytes=1-2,", "bytes=--1", "bytes=18446744073709551616-", "bytes=-18446744073709551616", "bytes=9223372036854775807-"} {
		f.Add(s, "", "", 300, 100)
		f.Add(s, longAgo.Format(http.TimeFormat), "", 300, 0)
		f.Add(s, `"x"`, "*", 1, 1)
		f.Add(s, "", longAgo.Format(http.TimeFormat), 0, 0)
	}
	f.Fuzz(func(t *testing.T, spec, ifRange, condition string, size, at int) {
		size = max(0, size%100_000)
		at = max(0, min(at, size))
		text := noise(1, size)
		body := &stoppingReader{text: text, at: at, open: make(chan struct{})}
		tt := newRecorderTester(t, func(r *http.Request) (*http.Response, error) {
			h := http.Header{"Last-Modified": {longAgo.Format(http.TimeFormat)}, "Content-Length": {strconv.Itoa(size)}}
			return &http.Response{StatusCode: 200, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: h,
				ContentLength: int64(size), Body: body, Request: r}, nil
		})
		request := func() *http.Request {
			r := httptest.NewRequest("GET", "/api/r/a", nil)
			r.Header = http.Header{}
			for name, v := range map[string]string{"Range": spec, "If-Range": ifRange, "If-None-Match": condition, "If-Modified-Since": condition} {
				if v != "" {
					r.Header.Set(name, v)
				}
			}
			return r
		}
		got := httptest.NewRecorder()
		done := make(chan struct{})
		go func() {
			defer close(done)
			tt.api.ServeHTTP(got, request())
		}()
		if size > 0 {
			tt.eventually("the watermark", func() bool {
				select {
				case <-done:
					return true
				default:
					return tt.filled("a") == int64(at)
				}
			})
		}
		close(body.open)
		<-done

		want := httptest.NewRecorder()
		r := request()
		limitRanges(r)
		if size == 0 {
			r.Header.Del("Range")
		}
		want.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(want, r, "", longAgo, strings.NewReader(text))
		if want.Code == 416 { // which it does not say of a malformed range
			want.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
		}
		if got.Code != want.Code {
			t.Fatalf("%q on %d bytes: status %d, want %d", spec, size, got.Code, want.Code)
		}
		for _, name := range []string{"Content-Range", "Content-Length"} {
			if got.Header().Get(name) != want.Header().Get(name) {
				t.Errorf("%q on %d bytes: %s: %q, want %q", spec, size, name, got.Header().Get(name), want.Header().Get(name))
			}
		}
		if g, w := bodyOf(t, got), bodyOf(t, want); g != w {
			t.Errorf("%q on %d bytes: %d bytes that differ from the %d wanted at %d", spec, size, len(g), len(w), firstDifference(g, w))
		}
	})
}

// bodyOf is a recorded body; parts of several ranges are joined, because their
// boundary is random.
func bodyOf(t *testing.T, r *httptest.ResponseRecorder) string {
	t.Helper()
	if !strings.HasPrefix(r.Header().Get("Content-Type"), "multipart/") {
		return r.Body.String()
	}
	g := &got{TB: t, header: r.Header(), text: r.Body.String()}
	return strings.Join(g.multipart(), "|")
}

// newRecorderTester is a tester without sockets: the upstream is a function,
// and answers are recorded.
func newRecorderTester(t testing.TB, upstream func(*http.Request) (*http.Response, error)) *tester {
	t.Helper()
	tt := setup{unserved: true}.start(t)
	for i := range tt.up.transports {
		tt.up.transports[i] = transportFunc(upstream)
	}
	return tt
}

type transportFunc func(*http.Request) (*http.Response, error)

func (f transportFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// --- bodies whose digest is known beforehand ---

func TestWrongDigestIsNeverCompleted(t *testing.T) {
	t.Parallel()
	for _, size := range []int{0, 1, 1000, heldBackBytes, heldBackBytes + 1, 1 << 20} {
		for _, chunked := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d bytes, chunked %v", size, chunked), func(t *testing.T) {
				t.Parallel()
				tt := newTester(t)
				text := noise(1, size)
				f := tt.origin.file("/a", text)
				if chunked {
					f.chunked()
				}
				wrong := sha256.Sum256([]byte("another body"))
				tt.digested(func(q *fileRequest) { q.digest = "sha256:" + hex.EncodeToString(wrong[:]) })
				g := tt.get("/api/r/a")
				if g.err == nil && g.status != 502 {
					t.Errorf("a wrong body of %d bytes was completed: %d with %d bytes", size, g.status, len(g.text))
				}
				if sent := len(g.text); g.err != nil && sent > max(0, size-heldBackBytes) {
					t.Errorf("%d of %d bytes were sent before it was verified", sent, size)
				}
				if size <= heldBackBytes && !chunked {
					g.wantDetail(502, "cannot be used") // nothing was sent yet
				}
				tt.wantStored("a", false)
				right := sha256.Sum256([]byte(text))
				tt.digested(func(q *fileRequest) { q.digest = "sha256:" + hex.EncodeToString(right[:]) })
				tt.get("/api/r/a").wantStatus(200).wantMiss().wantBody(text)
				tt.get("/api/r/a").wantHit().wantBody(text)
				tt.wantNoSpools()
			})
		}
	}
}

// Of a small body nothing is sent, headers included, before it verifies.
func TestSmallDigestedBodyIsA502WhenItIsWrong(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	release := tt.origin.file("/a", noise(1, heldBackBytes)).stallAt(heldBackBytes - 1)
	defer release()
	tt.digested(func(q *fileRequest) { q.digest = "sha256:" + strings.Repeat("00", 32) })
	answer := make(chan *got)
	go func() { answer <- tt.get("/api/r/a") }()
	tt.eventually("all but the last byte", func() bool { return tt.filled("a") == heldBackBytes-1 })
	release()
	(<-answer).wantDetail(502, "cannot be used")
}

// The ETag does not depend on the way in which a body with a known digest is answered.
func TestKnownDigestIsTheETagFromTheStart(t *testing.T) {
	t.Parallel()
	text := noise(1, 200_000)
	etag := `"` + strings.Replace(sha256Of([]byte(text)), ":", "-", 1) + `"`
	spools := &brokenSpools{}
	tt := setup{spools: spools.wrap}.start(t)
	tt.origin.file("/a", text)
	tt.digested(func(q *fileRequest) { q.digest = sha256Of([]byte(text)) })
	tt.head("/api/r/a").wantStatus(200).wantHeader("ETag", etag)
	spools.set(func() { spools.none = errNoSpace })
	tt.get("/api/r/a").wantUnstored().wantBody(text).wantHeader("ETag", etag)
	tt.get("/api/r/a", "If-None-Match: "+etag).wantStatus(304)
	spools.set(func() { spools.none = nil })
	tt.get("/api/r/a").wantMiss().wantBody(text).wantHeader("ETag", etag)
	tt.get("/api/r/a").wantHit().wantHeader("ETag", etag)
}

func TestSHA512IsVerified(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 200_000)
	tt.origin.file("/a", text)
	sum := sha512.Sum512([]byte(text))
	tt.digested(func(q *fileRequest) { q.digest = "sha512:" + hex.EncodeToString(sum[:]) })
	tt.get("/api/r/a").wantMiss().wantBody(text)
	tt.digested(func(q *fileRequest) { q.digest = "sha512:" + strings.Repeat("00", 64) })
	tt.origin.file("/b", text)
	if g := tt.get("/api/r/b"); g.err == nil && g.status != 502 {
		t.Errorf("a body without its digest was completed: status %d", g.status)
	}
}

func TestCutBodyWithADigestIsResumedWithoutValidator(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 1<<20)
	tt.origin.file("/a", text).undated().cut(300_000)
	sum := sha256.Sum256([]byte(text))
	tt.digested(func(q *fileRequest) { q.digest = "sha256:" + hex.EncodeToString(sum[:]) })
	tt.get("/api/r/a").wantMiss().wantBody(text)
}

// Mirrors name the same bytes in their own ways: the digest tells whether they are.
func TestCutBodyWithADigestGoesOnAtAMirrorWithAnotherETag(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	m := tt.another()
	tt.moveUpstream(tt.origin.url, "mirrors: [{url: "+m.url+", verified: true}]")
	text := noise(1, 1<<20)
	tt.digested(func(q *fileRequest) { q.digest = sha256Of([]byte(text)) })
	m.file("/a", text).etag(`"of the mirror"`)
	release := tt.origin.file("/a", text).etag(`"1"`).stallAt(600_000)
	defer release()
	in := tt.open("/api/r/a")
	defer in.leave()
	in.read(600_000)
	tt.down()
	in.rest().wantMiss().wantBody(text)
	if got := strings.Join(m.all(), ", "); got != "GET /a bytes=600000-" {
		t.Errorf("the mirror was asked %q", got)
	}
}

// A range is not held back until the whole body has verified: lazy pulls read the end
// of a layer first (eStargz, zstd:chunked). An answer that reaches from the first byte
// to the last is held back, whatever its form.
func TestOnlyWholeAnswersAreHeldBack(t *testing.T) {
	t.Parallel()
	const size = 12 << 20
	text := noise(1, size)
	for _, spooled := range []bool{true, false} {
		t.Run(fmt.Sprintf("spooled %v", spooled), func(t *testing.T) {
			t.Parallel()
			spools := &brokenSpools{}
			tt := setup{spools: spools.wrap}.start(t)
			if !spooled {
				spools.set(func() { spools.none = errNoSpace })
			}
			release := tt.origin.file("/a", text).etag(`"1"`).stallAt(size - 1000)
			defer release()
			tt.digested(func(file *fileRequest) { file.digest = sha256Of([]byte("another body")) })
			whole := map[string]*stream{}
			for _, header := range []string{"X: y", "Range: bytes=0-", fmt.Sprintf("Range: bytes=0-%d", size-1), fmt.Sprintf("Range: bytes=-%d", size)} {
				whole[header] = tt.open("/api/r/a", header)
				defer whole[header].leave()
			}
			parts := []string{"bytes=-500", fmt.Sprintf("bytes=%d-", size-500), fmt.Sprintf("bytes=1-%d", size-1100), "bytes=0-9", "bytes=5-9,-500"}
			if spooled {
				parts = parts[2:4] // the others begin where the fill stalls
				tt.eventually("what arrives", func() bool { return tt.filled("a") == size-1000 })
			} else {
				release()
			}
			for _, part := range parts {
				g := tt.get("/api/r/a", "Range: "+part)
				if g.wantStatus(206); strings.Contains(part, "500") && !strings.Contains(g.text, text[size-500:]) {
					t.Errorf("%s: other bytes", part)
				}
			}
			release()
			for header, s := range whole {
				if s.rest().wantAborted(); len(s.text) > size-heldBackBytes {
					t.Errorf("%s: %d bytes were sent of a body that does not verify", header, len(s.text))
				}
			}
			tt.wantStored("a", false)
		})
	}
}

// checkedFile is a download whose body is checked.
type checked struct {
	download
	check func(rec *record, body io.ReaderAt) error
}

func checkedFile(check func(rec *record, body io.ReaderAt) error) fileBehavior {
	return &checked{check: check}
}

func (f *checked) checkBody(_ context.Context, rec *record, body io.ReaderAt) error {
	return f.check(rec, body)
}

func TestWholeBodiesAreCheckedBeforeTheyAreAnswered(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	refused := &problem{status: 502, detail: "no manifest", cause: errBadUpstream}
	tt.digested(func(q *fileRequest) {
		q.maxBytes = 1000
		q.behavior = checkedFile(func(rec *record, body io.ReaderAt) error {
			b := make([]byte, rec.Size)
			if _, err := body.ReadAt(b, 0); err != nil && err != io.EOF {
				return err
			}
			if bytes.HasPrefix(b, []byte("<html")) {
				return refused
			}
			rec.Digest = "noted"
			return nil
		})
	})
	tt.origin.file("/ok", "manifest")
	tt.head("/api/r/ok").wantStatus(200).wantMiss().wantHeader("Content-Length", "8") // fetched and stored
	tt.get("/api/r/ok").wantHit().wantBody("manifest")
	tt.wantRequests("/ok", 1)
	tt.origin.file("/login", "<html>").chunked()
	tt.get("/api/r/login").wantDetail(502, "no manifest")
	tt.origin.file("/huge", noise(1, 1001))
	tt.get("/api/r/huge").wantDetail(502, "larger")
	tt.origin.file("/endless", noise(1, 5000)).chunked()
	tt.get("/api/r/endless").wantDetail(502, "larger")
	tt.origin.file("/cut", "manifest").noRanges().cut(4)
	tt.get("/api/r/cut").wantStatus(502)
	for _, path := range []string{"login", "huge", "endless", "cut"} {
		tt.wantStored(path, false)
	}
	tt.wantNoSpools()
}

// --- a store that is full or broken ---

// brokenSpools makes spools fail on demand.
type brokenSpools struct {
	space *spoolSpace

	mu     sync.Mutex // guards the fields below
	none   error      // there is no spool
	full   bool       // nothing can be written to spools
	noRoom bool       // the disk has nothing free
	free   int64      // what the disk has free; 0: what it has
	files  []*os.File // that were made
}

func (b *brokenSpools) wrap(s *spoolSpace) {
	b.space = s
	createFile, diskSpace := s.createFile, s.diskSpace
	s.createFile = func() (*os.File, error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.none != nil {
			return nil, b.none
		}
		f, err := createFile()
		b.files = append(b.files, f)
		if b.full && err == nil {
			f.Close()
		}
		return f, err
	}
	s.diskSpace = func() (diskUsage, error) {
		disk, err := diskSpace()
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.noRoom || b.free > 0 {
			disk.free.bytes = b.free
		}
		return disk, err
	}
}

func (b *brokenSpools) set(change func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change()
}

func (b *brokenSpools) heal() {
	b.set(func() { b.none, b.full, b.noRoom, b.free = nil, false, false, 0 })
}

// breakFiles makes every write to the spools there are fail, as on a disk that
// another program has filled.
func (b *brokenSpools) breakFiles() {
	b.set(func() {
		for _, f := range b.files {
			f.Close()
		}
	})
}

// reserved is how much of the disk is promised.
func (b *brokenSpools) reserved() int64 {
	b.space.mu.Lock()
	defer b.space.mu.Unlock()
	return b.space.reserved
}

// Clients get their bytes even if the store is full or broken.
func TestClientsGetTheirBytesWithoutAStore(t *testing.T) {
	t.Parallel()
	noSpace, down := fmt.Errorf("%w: test", errNoSpace), fmt.Errorf("%w: test", errStoreDown)
	for what, c := range map[string]struct {
		breakIt func(*brokenSpools, *brokenObjects)
		shared  bool // one upstream request serves all
	}{
		"no spool, disk full":    {func(s *brokenSpools, _ *brokenObjects) { s.none = noSpace }, false},
		"no spool, disk broken":  {func(s *brokenSpools, _ *brokenObjects) { s.none = down }, false},
		"under MIN_FREE":         {func(s *brokenSpools, _ *brokenObjects) { s.noRoom = true }, false},
		"storing fails, full":    {func(_ *brokenSpools, o *brokenObjects) { o.failPut(noSpace) }, true},
		"storing fails, is down": {func(_ *brokenSpools, o *brokenObjects) { o.failPut(down) }, true},
		"nothing works":          {func(s *brokenSpools, o *brokenObjects) { s.none = down; o.failPut(down); o.failOpen(down) }, false},
	} {
		for _, clients := range []int{1, 20} {
			t.Run(fmt.Sprintf("%s, %d clients", what, clients), func(t *testing.T) {
				t.Parallel()
				spools, objects := &brokenSpools{}, &brokenObjects{}
				c.breakIt(spools, objects)
				tt := setup{spools: spools.wrap, objects: objects.wrap}.start(t)
				text := noise(1, 300_000)
				release := tt.origin.file("/a", text).etag(`"1"`).stallAt(1000)
				defer release()
				var all sync.WaitGroup
				for range clients {
					all.Go(func() {
						tt.get("/api/r/a").wantStatus(200).wantBody(text).wantHeader("Content-Length", "300000")
					})
				}
				if c.shared {
					tt.eventually("all clients", func() bool { return tt.waiting("a") == clients })
				} else {
					tt.origin.awaitRequests("/a", clients)
				}
				release()
				all.Wait()
				if n := tt.origin.requests("/a"); c.shared && n != 1 {
					t.Errorf("%d upstream requests", n)
				}
				tt.get("/api/r/a", "Range: bytes=300000-").wantStatus(416).wantHeader("Content-Range", "bytes */300000")
				tt.get("/api/r/a", "Range: bytes=7-9").wantStatus(206).wantBody(text[7:10])
				tt.get("/api/r/a", "Range: bytes=-5").wantStatus(206).wantBody(text[299_995:])
				tt.head("/api/r/a").wantStatus(200).wantHeader("Content-Length", "300000")
				objects.failOpen(nil)
				tt.wantStored("a", false)
				tt.wantLog("a store failed")
				spools.heal()
				objects.failPut(nil)
				tt.get("/api/r/a").wantMiss().wantBody(text)
				tt.get("/api/r/a").wantHit().wantBody(text)
				tt.wantNoSpools()
				if n := spools.reserved(); n != 0 {
					t.Errorf("%d bytes are still reserved", n)
				}
			})
		}
	}
}

// What is asked for while the store is down is not said to be stored.
func TestNothingIsSaidToBeStoredInAnOutage(t *testing.T) {
	t.Parallel()
	objects, down := &brokenObjects{}, fmt.Errorf("%w: test", errStoreDown)
	objects.failOpen(down)
	objects.failPut(down)
	tt := setup{objects: objects.wrap}.start(t)
	tt.origin.file("/a", "text")
	tt.get("/api/r/a").wantUnstored().wantBody("text")
	objects.failOpen(nil)
	objects.failPut(nil)
	tt.get("/api/r/a").wantMiss()
	tt.get("/api/r/a").wantHit()

	objects.failPut(down) // it can be read, as a disk of another user can
	tt.cache.storageIsDown = func() bool { return true }
	tt.origin.file("/b", "text")
	tt.get("/api/r/b").wantUnstored().wantBody("text")
}

func TestWithoutAStoreErrorsAreStillErrors(t *testing.T) {
	t.Parallel()
	spools := &brokenSpools{none: errNoSpace}
	tt := setup{spools: spools.wrap, keys: []string{"mutable_patterns: ['idx$']"}}.start(t)
	tt.get("/api/r/none").wantDetail(404, "404")
	text := noise(1, 200_000)
	tt.origin.file("/cut", text).noRanges().cut(100_000, 100_000) // for the fill, and for its client
	tt.get("/api/r/cut").wantAborted()
	tt.origin.file("/resumed", text).etag(`"1"`).cut(100_000, 100_000)
	tt.get("/api/r/resumed").wantBody(text)
	tt.origin.file("/chunked", text).chunked()
	tt.get("/api/r/chunked").wantBody(text)
	tt.get("/api/r/chunked", "Range: bytes=1-2").wantStatus(200).wantBody(text) // its length is not known
	tt.origin.file("/undated", text).undated()
	tt.get("/api/r/undated", "Range: bytes=1-2", `If-Range: "another"`).wantStatus(200).wantBody(text)
	sum := sha256.Sum256([]byte(text))
	tt.origin.file("/right", text)
	tt.origin.file("/wrong", text+"x")
	tt.digested(func(q *fileRequest) { q.digest = "sha256:" + hex.EncodeToString(sum[:]) })
	tt.get("/api/r/right").wantBody(text)
	tt.get("/api/r/wrong").wantAborted()
}

func TestExpiredCopyWithoutRoomForTheNewOne(t *testing.T) {
	t.Parallel()
	spools := &brokenSpools{}
	tt := setup{spools: spools.wrap, keys: []string{`mutable_patterns: ["."]`}}.start(t)
	tt.origin.file("/a", "old")
	tt.get("/api/r/a")
	tt.advance(2 * time.Hour)
	spools.set(func() { spools.noRoom = true })
	tt.origin.file("/a", "new")
	tt.get("/api/r/a").wantFrom("remote", "fwd=stale; fwd-status=200").wantBody("new")
	tt.wantStored("a", true) // the old one
	tt.digested(func(q *fileRequest) { q.maxBytes = 1000 })
	tt.origin.file("/a", "new").cut(2, 2) // for the fill, and for its client
	tt.get("/api/r/a").wantStale().wantBody("old")
	tt.digested(func(*fileRequest) {})
	tt.down()
	tt.get("/api/r/a").wantStale().wantBody("old")
}

func TestLargerThanMaxSizeIsStreamedNotStored(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "cache: {max_size: 1MiB}")
	small, large := noise(1, 1<<20), noise(2, 1<<20+1)
	tt.origin.file("/small", small)
	tt.origin.file("/large", large)
	tt.get("/api/r/small").wantMiss().wantBody(small)
	tt.get("/api/r/large").wantUnstored().wantBody(large)
	tt.wantStored("small", true)
	tt.wantStored("large", false)
	tt.wantLog("max_size")
	tt.wantNoSpools()
}

// --- purging beside a fill ---

func TestPurgeDuringAFill(t *testing.T) {
	t.Parallel()
	tt := setup{env: map[string]string{"API_TOKEN": "t"}}.start(t)
	old, next := noise(1, 500_000), noise(2, 500_000)
	release := tt.origin.file("/a", old).stallAt(1000)
	defer release()
	first := tt.open("/api/r/a")
	defer first.leave()
	first.read(1000)
	tt.delete("/artifacts/r/a", "Authorization: Bearer t")
	tt.origin.file("/a", next)
	tt.get("/api/r/a").wantMiss().wantBody(next) // not what was purged
	release()
	first.rest().wantStatus(200).wantBody(old) // who has begun gets it all
	tt.wantNoSpools()                          // both fills have ended
	tt.get("/api/r/a").wantHit().wantBody(next)
	tt.wantRequests("/a", 2)
}

// What a question from before a purge brings to light says nothing about what
// was stored after it.
// What nobody waits for and may not be stored is not fetched to its end.
func TestPurgeOfAFillWithoutClients(t *testing.T) {
	t.Parallel()
	tt := setup{env: map[string]string{"API_TOKEN": "t"}}.start(t)
	release := tt.origin.file("/a", noise(1, 500_000)).stallAt(1000)
	defer release()
	s := tt.open("/api/r/a")
	s.read(1000)
	s.leave()
	tt.eventually("the client to be gone", func() bool { return tt.waiting("a") == 0 })
	tt.delete("/artifacts/r/a", "Authorization: Bearer t")
	tt.awaitEnds(1)
	tt.wantNoSpools()
}

func TestPurgeDuringARevalidation(t *testing.T) {
	t.Parallel()
	tt := setup{env: map[string]string{"API_TOKEN": "t"}, keys: []string{`mutable_patterns: ["."]`}}.start(t)
	tt.origin.file("/a", "old")
	tt.get("/api/r/a").wantMiss()
	tt.advance(2 * time.Hour)
	gone := make(chan struct{})
	tt.origin.file("/a", "").acts(func(w http.ResponseWriter, _ *http.Request) {
		<-gone
		w.WriteHeader(http.StatusNotFound)
	})
	var all sync.WaitGroup
	all.Go(func() {
		s := tt.open("/api/r/a")
		defer s.leave()
		s.rest().wantStatus(404)
	})
	tt.origin.awaitRequests("/a", 2)
	tt.delete("/artifacts/r/a", "Authorization: Bearer t").wantStatus(204)
	tt.origin.file("/a", "new")
	tt.get("/api/r/a").wantMiss().wantBody("new")
	close(gone)
	all.Wait()
	tt.get("/api/r/a").wantHit().wantBody("new")
}

// --- hostile upstreams ---

func TestUpstreamThatStopsInTheMiddle(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		tt.origin.file("/a", noise(1, 1000)).noRanges().stallAt(500)
		began := time.Now()
		s := tt.open("/api/r/a")
		defer s.leave()
		s.read(500)
		if d := time.Since(began); d > 0 {
			t.Errorf("what was there came after %v", d)
		}
		s.rest().wantAborted()
		if d := time.Since(began); d != bodyIdleTimeout {
			t.Errorf("aborted after %v of silence, want %v", d, bodyIdleTimeout)
		}
		tt.wantStored("a", false)
	})
}

func TestUpstreamThatDripsIsWaitedFor(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		text := noise(1, 100)
		tt.origin.file("/a", text).acts(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			for i := range len(text) {
				if i > 0 {
					time.Sleep(50 * time.Second)
				}
				_, _ = io.WriteString(w, text[i:i+1])
				_ = http.NewResponseController(w).Flush()
			}
		})
		began := time.Now()
		tt.get("/api/r/a").wantStatus(200).wantMiss().wantBody(text)
		if d := time.Since(began); d < time.Hour {
			t.Errorf("100 bytes at one every 50 s took %v", d)
		}
		tt.get("/api/r/a").wantHit().wantBody(text)
	})
}

func TestRedirectsThatLeadNowhere(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	for what, location := range map[string]string{
		"loop": "/loop", "empty": "", "scheme": "ftp://127.0.0.1/x", "file": "file:///etc/passwd", "garbage": "http://[::1", "no-host": "http:///x",
	} {
		tt.origin.file("/"+what, "").acts(func(w http.ResponseWriter, _ *http.Request) {
			if location != "" {
				w.Header().Set("Location", location)
			}
			w.WriteHeader(http.StatusFound)
		})
		tt.get("/api/r/"+what).wantDetail(502, "redirect")
		tt.wantStored(what, false)
	}
	if n := tt.origin.requests("/loop"); n != maxRedirects+1 {
		t.Errorf("a loop was followed %d times", n-1)
	}
	for i := range maxRedirects { // ten are fine
		tt.origin.file(fmt.Sprintf("/hop%d", i), "").acts(http.RedirectHandler(fmt.Sprintf("/hop%d", i+1), http.StatusFound).ServeHTTP)
	}
	tt.origin.file(fmt.Sprintf("/hop%d", maxRedirects), "there")
	tt.get("/api/r/hop0").wantMiss().wantBody("there")
}

func TestRedirectToAnotherHostTakesNoSecretsAlong(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	cdn := tt.another()
	tt.moveUpstream(tt.origin.url, "username: u", "password: SECRET", `headers: {X-Key: SECRET}`)
	tt.origin.file("/a", "").acts(http.RedirectHandler(cdn.url+"/blob?X-Amz-Signature=SECRET", http.StatusFound).ServeHTTP)
	tt.origin.file("/same", "").acts(http.RedirectHandler("/real", http.StatusFound).ServeHTTP)
	tt.origin.file("/real", "real")
	cdn.file("/blob?X-Amz-Signature=SECRET", "blob")
	tt.get("/api/r/a").wantMiss().wantBody("blob")
	if h := tt.origin.last("/a").header; h.Get("Authorization") == "" || h.Get("X-Key") == "" {
		t.Errorf("base_url did not get the credentials: %v", h)
	}
	if h := cdn.last("/blob?X-Amz-Signature=SECRET").header; h.Get("Authorization") != "" || h.Get("X-Key") != "" || h.Get("Referer") != "" {
		t.Errorf("another host got secrets: %v", h)
	}
	tt.get("/api/r/same").wantMiss().wantBody("real")
	if h := tt.origin.last("/real").header; h.Get("Authorization") == "" {
		t.Error("a redirect that stays at base_url lost the credentials")
	}
	tt.origin.file("/broken", "").acts(http.RedirectHandler(strings.Replace(cdn.url, "http:", "https:", 1)+"/x?sig=SECRET", http.StatusFound).ServeHTTP)
	if g := tt.get("/api/r/broken").wantStatus(502); strings.Contains(g.text, "SECRET") {
		t.Errorf("an answer shows a secret: %s", g.text)
	}
	if logs := tt.logs.lines("SECRET"); len(logs) > 0 {
		t.Errorf("a log line shows a secret: %s", logs[0])
	}
}

func TestRedirectToTheInsideIsRefused(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(tt.origin.url, "http://"))
	tt.dials["files.example:"+port] = strings.TrimPrefix(tt.origin.url, "http://")
	tt.dials["cdn.example:"+port] = strings.TrimPrefix(tt.origin.url, "http://")
	tt.moveUpstream("http://files.example:" + port)
	inside, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Skipf("no second loopback address here: %v", err)
	}
	defer inside.Close()
	asked := make(chan struct{}, 1)
	var accepted sync.WaitGroup
	accepted.Go(func() {
		if c, err := inside.Accept(); err == nil {
			c.Close()
			asked <- struct{}{}
		}
	})
	for _, to := range []string{inside.Addr().String(), "[::1]:80", "169.254.169.254", "10.0.0.1", "192.168.1.1:8080", "0.0.0.0:80", "[::ffff:10.0.0.1]:80"} {
		path := "/" + hex.EncodeToString([]byte(to))
		tt.origin.file(path, "").acts(http.RedirectHandler("http://"+to+"/latest/meta-data", http.StatusFound).ServeHTTP)
		tt.get("/api/r"+path).wantDetail(502, "private address")
	}
	inside.Close()
	accepted.Wait()
	if len(asked) > 0 {
		t.Error("the inside was asked")
	}
	tt.origin.file("/ok", "").acts(http.RedirectHandler("http://cdn.example:"+port+"/there", http.StatusFound).ServeHTTP)
	tt.origin.file("/there", "there")
	tt.get("/api/r/ok").wantMiss().wantBody("there") // another public host is fine
}

func TestRedirectFromHTTPSToHTTPIsRefused(t *testing.T) {
	t.Parallel()
	tt := setup{tls: true}.start(t)
	plain := tt.another()
	plain.file("/a", "plain")
	tt.origin.file("/a", "").acts(http.RedirectHandler(plain.url+"/a", http.StatusFound).ServeHTTP)
	tt.get("/api/r/a").wantDetail(502, "https to http")
	tt.origin.file("/b", "body")
	tt.get("/api/r/b").wantMiss().wantBody("body")
	if n := len(plain.all()); n > 0 {
		t.Error("the http target was asked")
	}
	tt.digested(func(file *fileRequest) { file.digest = sha256Of([]byte("plain")) }) // it will be verified
	tt.get("/api/r/a").wantMiss().wantBody("plain")
}

// An upstream that codes although it was asked not to is taken at its word:
// the coded bytes are the file.
func TestCodedAnswerIsReplayedCoded(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	var coded bytes.Buffer
	z := gzip.NewWriter(&coded)
	_, _ = io.WriteString(z, noise(1, 200_000))
	_ = z.Close()
	text := coded.String()
	tt.origin.file("/a.xml", text).says("Content-Encoding", "gzip")
	for _, want := range []func(*got) *got{(*got).wantMiss, (*got).wantHit} {
		want(tt.get("/api/r/a.xml").wantStatus(200)).wantBody(text).wantHeader("Content-Encoding", "gzip").
			wantHeader("Content-Length", strconv.Itoa(len(text)))
	}
	tt.restart()
	tt.get("/api/r/a.xml").wantHit().wantBody(text).wantHeader("Content-Encoding", "gzip")
	tt.head("/api/r/a.xml").wantHit().wantHeader("Content-Length", strconv.Itoa(len(text)))
	tt.get("/api/r/a.xml", "Range: bytes=10-19").wantStatus(206).wantBody(text[10:20])
	tt.get("/api/r/a.xml", "Range: bytes=999999999-").wantStatus(416)
	tt.get("/api/r/a.xml", `If-Match: "x"`).wantStatus(412).wantBody("")
	tt.get("/api/r/a.xml", "If-Modified-Since: "+longAgo.Format(http.TimeFormat)).wantStatus(304).wantBody("")
}

// A body of known length has all its space from the start.
func TestReservedBodySurvivesAFullDisk(t *testing.T) {
	t.Parallel()
	spools := &brokenSpools{}
	tt := setup{spools: spools.wrap}.start(t)
	text := noise(1, 3<<20)
	release := tt.origin.file("/a", text).stallAt(200_000)
	defer release()
	s := tt.open("/api/r/a")
	defer s.leave()
	tt.eventually("the first bytes", func() bool { return tt.filled("a") == 200_000 })
	if n := spools.reserved(); n != 3<<20-200_000 {
		t.Errorf("%d bytes are reserved for %d that are missing", n, 3<<20-200_000)
	}
	spools.set(func() { spools.noRoom = true })
	release()
	s.rest().wantStatus(200).wantBody(text)
	tt.settle()
	tt.wantStored("a", true)
	if n := spools.reserved(); n != 0 {
		t.Errorf("%d bytes are still reserved", n)
	}
}

// Space that ends in the middle of a body cuts off those that have a part of it.
// Nothing is stored, nothing wrong is completed, and for a minute the file is
// passed on.
func TestSpaceThatEndsInTheMiddle(t *testing.T) {
	t.Parallel()
	text := noise(1, 20<<20)
	for name, c := range map[string]struct {
		chunked bool
		breakIt func(*brokenSpools)
	}{
		"unknown length, nothing left to reserve": {true, func(s *brokenSpools) { s.set(func() { s.noRoom = true }) }},
		"another program fills the disk":          {false, (*brokenSpools).breakFiles},
	} {
		for _, digest := range []string{"", sha256Of([]byte(text)), sha256Of([]byte("another body"))} {
			t.Run(fmt.Sprintf("%s, digest %.10s", name, digest), func(t *testing.T) {
				t.Parallel()
				spools := &brokenSpools{}
				tt := setup{spools: spools.wrap}.start(t)
				f := tt.origin.file("/a", text).etag(`"1"`)
				if c.chunked {
					f.chunked()
				}
				release := f.stallAt(200_000)
				defer release()
				tt.digested(func(file *fileRequest) { file.digest = digest })
				s := tt.open("/api/r/a")
				defer s.leave()
				s.read(100_000)
				c.breakIt(spools)
				release()
				if c.chunked { // the spool can be read: a slow client sees late that it is cut off
					tt.eventually("the fill has ended", func() bool { return !tt.cache.fills.isFilling(testKey("a")) })
					tt.advance(2 * time.Minute)
				}
				s.rest().wantAborted()
				if digest != "" && len(s.text) > len(text)-heldBackBytes {
					t.Errorf("%d bytes were sent of a body that did not verify", len(s.text))
				}
				tt.eventually("nothing is reserved", func() bool { return spools.reserved() == 0 })
				spools.heal() // small files still fit: it is this one that does not
				g := tt.get("/api/r/a")
				if digest == sha256Of([]byte("another body")) {
					g.wantAborted()
					return
				}
				g.wantUnstored().wantBody(text)
				tt.advance(2 * time.Minute)
				tt.get("/api/r/a").wantMiss().wantBody(text)
				tt.wantNoSpools()
			})
		}
	}
}

// Clients that have nothing yet when the space ends are passed on.
func TestSpaceThatEndsBeforeAnythingWasSent(t *testing.T) {
	t.Parallel()
	spools := &brokenSpools{}
	tt := setup{spools: spools.wrap, keys: []string{`mutable_patterns: ["."]`}}.start(t)
	tt.origin.file("/a", "old")
	tt.get("/api/r/a").wantMiss()
	tt.advance(2 * time.Hour)
	text := noise(1, 300_000)
	release := tt.origin.file("/a", text).stallAt(1000)
	defer release()
	var all sync.WaitGroup
	for range 3 { // they wait for the whole of it: they could have the old one
		all.Go(func() { tt.get("/api/r/a").wantFrom("remote", "fwd=stale; fwd-status=200").wantBody(text) })
	}
	tt.eventually("the first bytes", func() bool { return tt.filled("a") == 1000 && tt.waiting("a") == 3 })
	spools.breakFiles()
	release()
	all.Wait()
}

// Bodies of unknown length cannot take more than there is, however many grow at
// once: MIN_FREE holds.
func TestManyBodiesOfUnknownLengthShareTheSpace(t *testing.T) {
	t.Parallel()
	const bodies, fit = 20, 3
	spools := &brokenSpools{free: 1<<20 + fit*reserveAhead} // MIN_FREE is 1 MiB here
	tt := setup{spools: spools.wrap}.start(t)
	var all sync.WaitGroup
	var passedOn atomic.Int64
	for i := range bodies {
		text := noise(uint64(i), 100_000)
		release := tt.origin.file(fmt.Sprintf("/%d", i), text).chunked().stallAt(1000)
		all.Go(func() {
			s := tt.open(fmt.Sprintf("/api/r/%d", i))
			defer s.leave()
			tt.eventually("all have begun", func() bool { return len(tt.origin.all()) >= bodies })
			if n := spools.reserved(); n > fit*reserveAhead {
				t.Errorf("%d bytes are reserved", n)
			}
			release()
			if g := s.rest(); g.ok() && cacheStatusIs(g.header.Get("Cache-Status"), "fwd=miss") {
				passedOn.Add(1)
			}
		})
	}
	all.Wait()
	tt.settle()
	stored := 0
	for i := range bodies {
		if _, err := tt.disk.open(t.Context(), storageKey("r", strconv.Itoa(i)), -1); err == nil {
			stored++
		}
	}
	if stored == 0 || stored == bodies {
		t.Errorf("%d of %d bodies were stored", stored, bodies)
	}
	if n := spools.reserved(); n != 0 {
		t.Errorf("%d bytes are still reserved", n)
	}
}

// stopsAt makes an origin send n bytes of a body without length or chunks, and
// then nothing until done.
func stopsAt(n int, done <-chan struct{}) func(*testFile) *testFile {
	return func(f *testFile) *testFile {
		return f.acts(func(w http.ResponseWriter, r *http.Request) {
			conn, buf, err := http.NewResponseController(w).Hijack()
			if err != nil {
				panic(err)
			}
			defer conn.Close()
			_, _ = buf.WriteString("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + f.text[:n])
			_ = buf.Flush()
			<-done
		})
	}
}

// A body that may not be stored ends with its last client.
func TestBodyThatMayNotBeStoredEndsWithItsLastClient(t *testing.T) {
	t.Parallel()
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	whole := func(f *testFile) *testFile { return f }
	ofRemote, ofAll := []string{"cache: {max_size: 100KiB}"}, map[string]string{"CACHE_MAX_SIZE": "100KiB"}
	for name, c := range map[string]struct {
		keys []string
		env  map[string]string
		plan func(*testFile) *testFile
	}{
		"larger than max_size":                  {ofRemote, nil, whole},
		"larger than max_size, in chunks":       {ofRemote, nil, (*testFile).chunked},
		"larger than CACHE_MAX_SIZE":            {nil, ofAll, whole},
		"larger than CACHE_MAX_SIZE, in chunks": {nil, ofAll, (*testFile).chunked},
		"delimited by the connection's end":     {nil, nil, stopsAt(200_000, done)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tt := setup{keys: c.keys, env: c.env}.start(t)
			release := c.plan(tt.origin.file("/a", noise(1, 400_000))).stallAt(200_000)
			defer release()
			s := tt.open("/api/r/a")
			s.read(100_000)
			tt.eventually("what arrives", func() bool { return tt.filled("a") == 200_000 })
			s.leave()
			tt.eventually("the end of the fill", func() bool { return tt.flying() == 0 })
			tt.wantStored("a", false)
			tt.wantNoSpools()
		})
	}
}

func TestRangeOfADigestedBodyWithoutASpool(t *testing.T) {
	t.Parallel()
	spools := &brokenSpools{none: errNoSpace}
	tt := setup{spools: spools.wrap}.start(t)
	text := noise(1, 400_000)
	tt.origin.file("/a", text)
	tt.digested(func(q *fileRequest) { q.digest = sha256Of([]byte(text)) })
	tt.get("/api/r/a", "Range: bytes=100-").wantStatus(206).wantBody(text[100:])
	tt.get("/api/r/a", "Range: bytes=100-200000").wantStatus(206).wantBody(text[100:200001])
	tt.get("/api/r/a", "Range: bytes=-70000").wantStatus(206).wantBody(text[330_000:])
	tt.get("/api/r/a", "Range: bytes=399999-,0-99999").wantStatus(206)
	tt.digested(func(q *fileRequest) { q.digest = sha256Of([]byte("another body")) })
	tt.get("/api/r/a", "Range: bytes=0-").wantAborted()
	tt.get("/api/r/a", "Range: bytes=-400000").wantAborted()
}

// Of a body of unknown length only the 206 that resumes it says where it ends.
func TestResumedBodyOfUnknownLengthIsWhole(t *testing.T) {
	t.Parallel()
	text := noise(1, 300_000)
	for name, c := range map[string]struct {
		contentRange string
		to           int
		whole        bool
	}{
		"all of the rest":                {"bytes 100000-299999/300000", 300_000, true},
		"less than the rest":             {"bytes 100000-199999/300000", 200_000, false},
		"less than it says, in chunks":   {"bytes 100000-299999/300000", 200_000, false},
		"a size that nobody tells":       {"bytes 100000-199999/*", 200_000, false},
		"less than it says, every time":  {"bytes 100000-299999/300000", 100_000, false},
		"more than it says":              {"bytes 100000-199999/200000", 300_000, false},
		"an end that is not the whole's": {"bytes 100000-299999/300001", 300_000, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tt := newTester(t)
			f := tt.origin.file("/a", text).etag(`"1"`)
			f.acts(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Range") == "" {
					_, _ = io.WriteString(w, text[:100_000])
					_ = http.NewResponseController(w).Flush()
					panic(http.ErrAbortHandler)
				}
				w.Header().Set("Content-Range", c.contentRange)
				w.Header().Set("ETag", `"1"`)
				w.WriteHeader(http.StatusPartialContent)
				_ = http.NewResponseController(w).Flush() // in chunks
				if r.Header.Get("Range") == "bytes=100000-" {
					_, _ = io.WriteString(w, text[100_000:c.to])
				}
			})
			g := tt.get("/api/r/a")
			if c.whole {
				g.wantBody(text)
			} else if g.status != 502 { // the fill ended before this client's answer began
				g.wantAborted()
			}
			tt.wantStored("a", c.whole)
		})
	}
}

func TestChunkedBodyOverMaxSizeIsNotStored(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "cache: {max_size: 100KiB}")
	text := noise(1, 200_000)
	tt.origin.file("/a", text).chunked()
	tt.get("/api/r/a").wantBody(text)
	tt.wantStored("a", false)
	tt.wantLog("larger than cache.max_size")
}

// A copy that was opened before another fill replaced it is not what upstream calls unchanged.
func TestUnchangedIsSaidOfTheCopyThatWasAskedAbout(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	f := &fill{c: tt.cache, oldRecord: &record{SHA256: "of the new one"}, file: fileRequest{target: target{remote: tt.server.config.Load().remotes["r"], path: "a", spelling: "a"}}}
	opened := &storedCopy{object: &object{rec: &record{SHA256: "of the old one"}, body: unreadBody(0)}}
	if reply, again, err := f.replyWithoutBody(t.Context(), opened, fillOutcome{kind: outcomeUnchanged}); !again || reply != nil || err != nil {
		t.Errorf("reply %+v, again %v, error %v; want another look into the store", reply, again, err)
	}
}
