// store_s3_test.go: s3Store against the fake server, its faults and outages,
// and the suite against a real one (TEST_S3, see s3sig_test.go).

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"
)

// put makes an s3Store objects by itself.
func (s *s3Store) put(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error {
	_, err := s.upload(ctx, key, rec, spool, when)
	return err
}

// s3Bench is an s3Store at a fake server, with a clock and a log of its own.
type s3Bench struct {
	*storeTester
	fake   *fakeS3
	store  *s3Store
	online atomic.Bool
	ahead  atomic.Int64 // of the clock
	log    *logBuffer
}

// logBuffer is a log to look into.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// count returns how often a text occurs.
func (l *logBuffer) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

func newS3Bench(t *testing.T, change ...func(*s3Config)) *s3Bench {
	return newS3BenchAt(t, newFakeS3(t), change...)
}

// newS3BenchAt makes one more replica at a server.
func newS3BenchAt(t *testing.T, f *fakeS3, change ...func(*s3Config)) *s3Bench {
	b := &s3Bench{fake: f, log: new(logBuffer)}
	b.online.Store(true)
	change = append(change, func(c *s3Config) {
		c.now = func() time.Time { return time.Now().Add(time.Duration(b.ahead.Load())) }
		c.log = slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	b.store = newS3Store(f.client(change...), b.online.Load)
	t.Cleanup(b.store.Close)
	b.storeTester = &storeTester{t: t, objects: b.store, dir: t.TempDir()}
	return b
}

func (b *s3Bench) advance(d time.Duration) { b.ahead.Add(int64(d)) }

func (b *s3Bench) putClass(spelling, content string, c class) {
	b.t.Helper()
	rec := testRecord(spelling, content)
	rec.Class = c
	if err := b.objects.put(b.t.Context(), testKey(spelling), rec, tempSpool(b.t, b.dir, content), putCondition{}); err != nil {
		b.t.Fatal(err)
	}
}

// wantRequests checks what S3 was asked since the last look: operation and
// number in turn, nothing else.
func (b *s3Bench) wantRequests(what ...any) {
	b.t.Helper()
	for i := 0; i < len(what); i += 2 {
		if n := b.fake.count(what[i].(string)); n != what[i+1].(int) {
			b.t.Errorf("%d times %s, want %d", n, what[i], what[i+1])
		}
	}
	if n := b.fake.count(""); n != 0 {
		b.t.Errorf("%d other requests", n)
	}
}

// wantDown checks that opening fails because the store is down, and not as a miss.
func (b *s3Bench) wantDown(spelling string) {
	b.t.Helper()
	for _, off := range []int64{0, -1} {
		o, err := b.open(b.t.Context(), testKey(spelling), off)
		if !errors.Is(err, errStoreDown) || errors.Is(err, fs.ErrNotExist) || o != nil {
			b.t.Fatalf("open %s at %d: %v, %v; want a store that is down", spelling, off, o, err)
		}
	}
}

// always is a fault of all requests for one operation ("" for all).
func always(op string, fault fakeFault) func(o, key string) (bool, *fakeFault) {
	return func(o, _ string) (bool, *fakeFault) {
		if op != "" && o != op {
			return true, nil
		}
		return false, &fault
	}
}

func TestS3Objects(t *testing.T) {
	t.Parallel()
	testObjects(t, func(t *testing.T) objects { return newS3Bench(t).store })
}

// realBucket is a new bucket on the server of TEST_S3.
func realBucket(t *testing.T) *s3Client {
	cfg := realS3(t, 5<<20).cfg
	cfg.bucket = fmt.Sprintf("%s-%x", cfg.bucket, rand.Uint64())
	c := newS3Client(cfg)
	must(t, c.createBucket(t.Context()))
	return c
}

func TestS3ObjectsReal(t *testing.T) {
	t.Parallel()
	testObjects(t, func(t *testing.T) objects {
		return newS3Store(realBucket(t), func() bool { return true })
	})
}

func TestS3HitIsOneGet(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("f", "content")
	b.putClass("m", "content", mutable)
	b.fake.count("")
	for _, off := range []int64{0, 3} {
		wantBody(t, b.mustOpen("f", off).body, "content"[off:])
		b.wantRequests("GetObject", 1)
	}
	b.mustOpen("f", -1)
	b.wantRequests()
	b.mustOpen("m", -1)
	b.wantRequests("HeadObject", 1)
}

func TestS3RecordsInMemory(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("f", "content")
	b.fake.count("")
	b.online.Store(false)
	b.advance(recheckAfter / 2)
	b.mustOpen("f", -1)
	b.wantRequests()
	b.advance(recheckAfter / 2)
	b.mustOpen("f", -1)
	b.wantRequests("HeadObject", 1)
	b.mustOpen("f", -1)
	b.wantRequests()
	b.online.Store(true)
	b.store.invalidate("")
	b.mustOpen("f", -1)
	b.wantRequests("HeadObject", 1)
	b.store.invalidate(testKey("f"))
	b.mustOpen("f", -1)
	b.wantRequests("HeadObject", 1)
}

// A hit reads the record of its answer, and parses it only where it is another text than
// the last one's.
func TestS3RecordsAreParsedOnce(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("f", "content")
	first := b.mustOpen("f", 0).rec
	if b.mustOpen("f", 0).rec != first {
		t.Error("the same text is another record")
	}
	meta := b.fake.object(testKey("f")).meta
	meta.Set("X-Amz-Meta-"+s3RecordField, strings.Replace(meta.Get("X-Amz-Meta-"+s3RecordField), `"n":7`, `"n":8`, 1))
	b.wantMiss("f") // the object has 7 bytes
	b.mustPut("f", "another")
	b.wantHit("f", "another")
}

func TestS3ServesAsOneGet(t *testing.T) {
	t.Parallel()
	content := bigContent(300_000)
	for name, c := range map[string]struct {
		off  int64
		head string // Range
		want string
	}{
		"all":         {0, "", content},
		"from within": {1000, "bytes=1000-", content[1000:]},
		"a part":      {1000, "bytes=1000-1999", content[1000:2000]},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newS3Bench(t)
			b.mustPut("f", content)
			b.fake.count("")
			o := b.mustOpen("f", c.off)
			w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
			w.Header().Set("Content-Type", "text/plain") // or it is guessed from the first bytes
			r.Header.Set("Range", c.head)
			http.ServeContent(w, r, "f", time.Time{}, o.body)
			if w.Body.String() != c.want {
				t.Errorf("%d bytes, want %d", w.Body.Len(), len(c.want))
			}
			b.wantRequests("GetObject", 1)
		})
	}
}

func TestS3ManyRanges(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	content := bigContent(1_000_000)
	b.mustPut("f", content)
	o := b.mustOpen("f", 0)
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
	w.Header().Set("Content-Type", "text/plain")
	r.Header.Set("Range", "bytes=10-19,100-109,900000-900009,500-509")
	http.ServeContent(w, r, "f", time.Time{}, o.body)
	for _, at := range []int{10, 100, 900_000, 500} {
		if !strings.Contains(w.Body.String(), content[at:at+10]) {
			t.Errorf("the range at %d is missing", at)
		}
	}
	// One each for the beginning, the part far ahead, and the way back.
	if n := b.fake.count("GetObject"); n != 3 {
		t.Errorf("%d requests, want 3", n)
	}
}

// Of many ascending ranges the gaps are read over: S3 gets a few requests.
func TestS3CrowdsOfRangesAreFewRequests(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	const size, many = 12 << 20, 60
	content := bigContent(size)
	b.mustPut("f", content)
	var spec []string
	for n := range many {
		spec = append(spec, fmt.Sprintf("%d-%d", n*size/many, n*size/many+9))
	}
	o := b.mustOpen("f", 0)
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
	w.Header().Set("Content-Type", "text/plain")
	r.Header.Set("Range", "bytes="+strings.Join(spec, ", "))
	http.ServeContent(w, r, "f", time.Time{}, o.body)
	o.body.Close()
	got := w.Body.String()
	if w.Code != http.StatusPartialContent {
		t.Errorf("status %d with %d bytes", w.Code, len(got))
	}
	for n := range many {
		part := content[n*size/many:][:10]
		if k := strings.Index(got, part); k < 0 {
			t.Fatalf("range %d is missing", n)
		} else {
			got = got[k+10:]
		}
	}
	if n := b.fake.count("GetObject"); n > 4 {
		t.Errorf("%d requests for %d ranges", n, len(spec))
	}
}

func TestS3BehindTheEnd(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("f", "content")
	b.mustPut("empty", "")
	for _, off := range []int64{7, 100} {
		o := b.mustOpen("f", off)
		wantBody(t, o.body, "")
		wantRecord(t, o.rec, testRecord("f", "content"))
		o.body.Seek(2, io.SeekStart)
		wantBody(t, o.body, "ntent")
	}
	wantBody(t, b.mustOpen("empty", 5).body, "")
}

func TestS3VanishedIsAMissAndRepaired(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("f", "content")
	b.fake.drop(testKey("f"))
	b.wantMiss("f") // though its record is in memory
	b.mustPut("f", "content")
	b.wantHit("f", "content")
}

func TestS3ObjectsOfNoUseAreMisses(t *testing.T) {
	t.Parallel()
	sound, err := encodeS3Record(testRecord("f", "content"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ text, reason string }{
		"foreign":          {"", "no record of ours"},
		"cut":              {sound[:len(sound)/2], "damaged"},
		"no JSON":          {"x", "damaged"},
		"of no file":       {`{"v":1}`, "damaged"},
		"of another file":  {strings.Replace(sound, `"p":"f"`, `"p":"g"`, 1), "of another file"},
		"of another size":  {strings.Replace(sound, `"n":7`, `"n":8`, 1), "the object has 7"},
		"of a later world": {strings.Replace(sound, `"v":1`, `"v":2`, 1), "another version"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newS3Bench(t)
			p := putOf([]byte("content"))
			p.meta = map[string]string{}
			if c.text != "" {
				p.meta[s3RecordField] = c.text
			}
			mustPut(t, b.store.client, testKey("f"), p)
			b.wantMiss("f")
			if b.log.count(c.reason) == 0 {
				t.Errorf("the log does not give the reason: %s", b.log.b.String())
			}
			err := b.walk(t.Context(), func(key string, _ *record) error { return errors.New("walk calls f for " + key) })
			if err != nil {
				t.Error(err)
			}
			b.mustPut("f", "content")
			b.wantHit("f", "content")
		})
	}
}

// TestS3SizeIsComparedEachTime: somebody changed the body of an object whose record is
// in memory, and left the record.
func TestS3SizeIsComparedEachTime(t *testing.T) {
	t.Parallel()
	for _, data := range []string{"cont", "", "content, and more"} {
		for _, off := range []int64{0, 3, 100} {
			b := newS3Bench(t)
			b.mustPut("f", "content")
			wantBody(t, b.mustOpen("f", 0).body, "content")
			b.fake.object(testKey("f")).data = []byte(data)
			if o, err := b.open(t.Context(), testKey("f"), off); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("open of %q at %d: %v, %v", data, off, o, err)
			}
			if want := fmt.Sprintf("the object has %d", len(data)); b.log.count(want) != 1 {
				t.Errorf("the log does not say %q: %s", want, b.log.b.String())
			}
			b.wantMiss("f")
			b.mustPut("f", "content")
			b.wantHit("f", "content")
		}
	}
}

func TestS3RecordFits(t *testing.T) {
	t.Parallel()
	rec := testRecord("f", "content")
	long := strings.Repeat("x", maxHeaderValue)
	rec.Remote, rec.Path = strings.Repeat("r", maxName), strings.Repeat("p", maxSpelling)
	rec.ContentType, rec.ETag, rec.Digest = long, long, "sha512:"+strings.Repeat("0", 128)
	full, err := encodeS3Record(rec)
	if err != nil || len(full) > s3MaxRecord || !strings.Contains(full, `"g":`) {
		t.Fatalf("the longest ordinary record: %d bytes, %v", len(full), err)
	}
	rec.Path = strings.Repeat(`"`, 1024)
	if _, err := encodeS3Record(rec); err == nil {
		t.Errorf("a record that cannot fit: %v", err)
	}
}

func FuzzS3Record(f *testing.F) {
	f.Add("path/a?b=c", "text/plain", `W/"x"`)
	f.Add("a  b   c", "é\x7f\u2028", "😀<&>\\")
	f.Fuzz(func(t *testing.T, p, typ, etag string) {
		rec := testRecord(p, "x")
		rec.ContentType, rec.ETag = typ, etag
		text, err := encodeS3Record(rec)
		if err != nil || !utf8.ValidString(p) || !utf8.ValidString(typ) || !utf8.ValidString(etag) {
			return
		}
		isOdd := strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) || strings.TrimSpace(text) != text
		if isOdd || strings.Contains(text, "  ") || len(text) > s3MaxRecord { // servers change it
			t.Fatalf("%q", text)
		}
		got, err := decodeS3Record(testKey(p), &s3Object{size: 1, meta: map[string]string{s3RecordField: text}})
		if err != nil {
			t.Fatal(err)
		}
		if got.Path != p || got.ETag != etag || got.ContentType != typ {
			t.Errorf("%+v became %+v", rec, got)
		}
	})
}

func TestS3CutBodiesGoOn(t *testing.T) {
	t.Parallel()
	content := bigContent(500_000)
	b := newS3Bench(t)
	b.mustPut("f", content)
	b.fake.failOnce("GetObject", s3MaxInterruptions, true, fakeFault{cut: 100_000})
	wantBody(t, b.mustOpen("f", 0).body, content)
	b.fake.failOnce("GetObject", s3MaxInterruptions+2, true, fakeFault{cut: 10_000})
	n, err := io.Copy(io.Discard, b.mustOpen("f", 0).body)
	if err == nil || n >= int64(len(content)) {
		t.Errorf("a body that breaks off again and again: %d bytes, %v", n, err)
	}
}

func TestS3VersionsAreNeverMixed(t *testing.T) {
	t.Parallel()
	old, next := strings.Repeat("a", 500_000), strings.Repeat("b", 500_000)
	for name, change := range map[string]func(b *s3Bench){
		"replaced": func(b *s3Bench) { b.mustPut("f", next) },
		"deleted":  func(b *s3Bench) { b.fake.drop(testKey("f")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newS3Bench(t)
			b.mustPut("f", old)
			b.fake.failOnce("GetObject", 1, true, fakeFault{cut: 100_000})
			o := b.mustOpen("f", 0)
			change(b)
			got, err := io.ReadAll(o.body)
			if !errors.Is(err, errS3PreconditionFailed) || string(got) != old[:len(got)] || len(got) != 100_000 {
				t.Errorf("%d bytes, %v; want 100000 old ones and an error", len(got), err)
			}
			o = reopen(b)
			if o != nil {
				wantWhole(t, o)
			}
		})
	}
}

// reopen opens f again, if it is there.
func reopen(b *s3Bench) *object {
	o, err := b.open(b.t.Context(), testKey("f"), 0)
	if err != nil {
		return nil
	}
	b.t.Cleanup(func() { o.body.Close() })
	return o
}

func TestS3ReadEndsWithItsContext(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("f", bigContent(500_000))
	b.fake.failOnce("GetObject", 1, true, fakeFault{cut: 1000})
	ctx, leave := context.WithCancel(t.Context())
	o, err := b.open(ctx, testKey("f"), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer o.body.Close()
	if _, err := io.ReadFull(o.body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	asked := make(chan struct{}, 10)
	b.fake.fail(func(op, _ string) (bool, *fakeFault) {
		asked <- struct{}{}
		return false, &fakeFault{hang: true}
	})
	ended := make(chan error)
	go func() {
		_, err := io.Copy(io.Discard, o.body)
		ended <- err
	}()
	<-asked
	leave()
	if err := <-ended; err == nil {
		t.Error("a read whose caller left ended well")
	}
}

func TestS3FaultsOfTheStore(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault fakeFault
		times int // 0: always
	}{
		"slow down for a moment": {fakeFault{status: 503, code: "SlowDown"}, 2},
		"internal error, once":   {fakeFault{status: 500, code: "InternalError"}, 1},
		"connection lost, twice": {fakeFault{}, 2},
		"slow down forever":      {fakeFault{status: 503, code: "SlowDown"}, 0},
		"internal error forever": {fakeFault{status: 500, code: "InternalError"}, 0},
		"connections are lost":   {fakeFault{}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newS3Bench(t)
			b.putClass("f", "content", mutable)
			if c.times > 0 {
				b.fake.failOnce("GetObject", c.times, false, c.fault)
				wantBody(t, b.mustOpen("f", 0).body, "content")
				return
			}
			b.fake.fail(always("", c.fault))
			b.wantDown("f")
			if err := b.delete(t.Context(), testKey("f")); !errors.Is(err, errStoreDown) {
				t.Errorf("delete: %v", err)
			}
			if err := b.put("f", "next"); !errors.Is(err, errStoreDown) {
				t.Errorf("put: %v", err)
			}
			if err := b.walk(t.Context(), func(string, *record) error { return nil }); !errors.Is(err, errStoreDown) {
				t.Errorf("walk: %v", err)
			}
			b.fake.fail(nil)
			b.advance(s3RetryAfter)
			wantBody(t, b.mustOpen("f", 0).body, "content")
		})
	}
}

func TestS3HangIsOneShortWait(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("f", "content")
	b.store.openTimeout = time.Second // less than that a dial takes on a busy machine
	b.fake.fail(always("", fakeFault{hang: true}))
	b.fake.count("")
	b.store.invalidate(testKey("f"))
	b.wantDown("f") // two opens, of which one waits
	b.wantRequests("GetObject", 1)
	b.wantDown("f")
	b.wantRequests()
	b.advance(s3RetryAfter)
	b.wantDown("f") // one finds out
	b.wantRequests("GetObject", 1)
	b.fake.fail(nil)
	b.wantDown("f")
	b.store.openTimeout = s3OpenTimeout
	if err := b.store.ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.wantHit("f", "content")
}

// A crowd of slow clients may have all connections that there may be. Who gets none is
// answered by the upstream, and that says nothing about S3.
func TestS3CrowdIsNoOutage(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t, func(c *s3Config) { c.transport.(*http.Transport).MaxConnsPerHost = 2 })
	content := bigContent(100_000)
	b.putClass("f", content, mutable)
	slow := []*object{b.mustOpen("f", 0), b.mustOpen("f", 0)}
	b.store.openTimeout = 50 * time.Millisecond
	b.wantDown("f")
	b.store.openTimeout = s3OpenTimeout
	if err := b.store.ping(t.Context()); !errors.Is(err, errStoreDown) || !strings.Contains(err.Error(), "connections to S3 are in use") {
		t.Errorf("ping: %v", err)
	}
	if cause := b.store.outage.outageCause(); cause != nil {
		t.Errorf("it is called an outage: %v", cause)
	}
	for _, o := range slow {
		wantBody(t, o.body, content)
		o.body.Close()
	}
	wantBody(t, b.mustOpen("f", 0).body, content)
}

func TestS3LateAnswersAreNoOutage(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.putClass("f", "content", mutable)
	began := b.store.now()
	b.advance(time.Second)
	wantBody(t, b.mustOpen("f", 0).body, "content")
	b.store.classifyError(t.Context(), began, errS3Timeout)
	wantBody(t, b.mustOpen("f", 0).body, "content") // the other request was only slow
	b.store.classifyError(t.Context(), b.store.now(), errS3Timeout)
	b.wantDown("f")
}

// TestS3OutageCostsNoWaitBesideChecks: each check that fails renews the pause after
// which a client would find out by itself.
func TestS3OutageCostsNoWaitBesideChecks(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.putClass("f", "content", mutable)
	b.fake.fail(always("", fakeFault{}))
	for range 10 {
		b.store.ping(t.Context())
		b.fake.count("")
		b.advance(s3CheckTimeout + 500*time.Millisecond)
		b.wantDown("f")
		b.wantRequests()
	}
	b.fake.fail(nil)
	if err := b.store.ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantBody(t, b.mustOpen("f", 0).body, "content")
}

// TestS3ProbeWithoutAResult: an answer that says neither that S3 is up nor that it is
// down leaves finding out to the next request.
func TestS3ProbeWithoutAResult(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.putClass("f", "content", mutable)
	b.fake.fail(always("", fakeFault{}))
	b.store.ping(t.Context())
	b.advance(s3RetryAfter)
	b.fake.fail(always("", fakeFault{status: 503, code: "SlowDown"}))
	b.wantDown("f")
	b.fake.fail(nil)
	waitUntil(t, "up", func() bool { return reopen(b) != nil })
}

func TestS3LongOutageTakesNoUploads(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.fake.fail(always("", fakeFault{}))
	b.store.ping(t.Context())
	b.fake.count("")
	if err := b.put("f", "x"); !errors.Is(err, errStoreDown) || b.fake.count("PutObject") != s3WriteTries {
		t.Errorf("put in a short outage: %v", err)
	}
	b.fake.count("")
	b.advance(s3WriteThrough + time.Second)
	if err := b.put("f", "x"); !errors.Is(err, errStoreDown) {
		t.Errorf("put in a long outage: %v", err)
	}
	b.wantRequests()
}

// TestS3LostAcknowledgementOfAPut: a put without an answer is an error, but what
// it stored is served and not the record that was in memory before.
func TestS3LostAcknowledgementOfAPut(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("f", "old")
	b.fake.fail(func(op, _ string) (bool, *fakeFault) {
		if op == "PutObject" {
			return true, &fakeFault{}
		}
		return true, nil
	})
	if err := b.put("f", "new"); !errors.Is(err, errStoreDown) {
		t.Errorf("a put whose answers were all lost: %v", err)
	}
	b.fake.fail(nil)
	b.advance(s3RetryAfter)
	b.wantHit("f", "new")
	// The same bytes again, which do not arrive: the old record must not pass for the new one.
	b.fake.fail(always("PutObject", fakeFault{}))
	if err := b.put("f", "new"); err == nil {
		t.Error("an upload that never arrived was acknowledged")
	}
}

func TestS3PingLogsOnce(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil func(b *s3Bench)
		heal  func(b *s3Bench)
		want  string
	}{
		"wrong credentials": {
			func(b *s3Bench) { b.store.client.cfg.accessKey = "nobody" },
			func(b *s3Bench) { b.store.client.cfg.accessKey = b.fake.access }, "S3 refuses the credentials"},
		"read-only": {
			func(b *s3Bench) { b.fake.readOnly = true },
			func(b *s3Bench) { b.fake.readOnly = false; b.advance(s3WriteCheckInterval) }, "S3 refuses writes"},
		"unreachable": {
			func(b *s3Bench) { b.fake.fail(always("", fakeFault{})) },
			func(b *s3Bench) { b.fake.fail(nil) }, "S3 cannot be reached"},
		"somebody else's bucket": {
			func(b *s3Bench) { b.fake.exists, b.fake.foreign = false, true },
			func(b *s3Bench) { b.fake.foreign = false }, "the bucket does not exist and cannot be created"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newS3Bench(t)
			s := &server{log: b.store.log, cache: &cache{metrics: newMetrics()}}
			storage := &backend{name: "storage", okWord: "ok", ping: b.store.ping}
			check := func(want string) {
				t.Helper()
				for range 3 {
					s.checkBackend(storage)
					if storage.state() != want {
						t.Errorf("the state is %s, want %s", storage.state(), want)
					}
				}
			}
			c.spoil(b)
			check("down")
			c.heal(b)
			check("ok")
			if n := b.log.count(c.want); n != 1 {
				t.Errorf("%d lines say %q, want one: %s", n, c.want, b.log.b.String())
			}
			if n := b.log.count("backend is "); n != 2 {
				t.Errorf("%d lines say that it is down or well again, want one each", n)
			}
			if b.log.count(b.fake.secret) > 0 {
				t.Error("the secret is in the log")
			}
			b.mustPut("f", "x")
			b.wantHit("f", "x")
		})
	}
}

// An S3 that starts after us, and with other credentials, is down for another reason
// than before.
func TestS3PingLogsAnotherReason(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	s := &server{log: b.store.log, cache: &cache{metrics: newMetrics()}}
	storage := &backend{name: "storage", okWord: "ok", ping: b.store.ping}
	b.fake.fail(always("", fakeFault{}))
	s.checkBackend(storage)
	b.store.check.running.Wait() // which may take longer than the check of the backend
	b.fake.fail(nil)
	b.store.client.cfg.accessKey = "nobody"
	s.checkBackend(storage)
	s.checkBackend(storage)
	for _, reason := range []string{"S3 cannot be reached", "S3 refuses the credentials"} {
		if n := b.log.count(reason); n != 1 {
			t.Errorf("%d lines say %q, want one: %s", n, reason, b.log.b.String())
		}
	}
}

func TestS3ReadOnlyBucketIsRead(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("f", "x")
	b.fake.readOnly = true
	if err := b.put("g", "x"); !errors.Is(err, errStoreDown) {
		t.Errorf("put: %v", err)
	}
	b.wantHit("f", "x")
	b.wantMiss("g")
	if err := b.store.ping(t.Context()); !errors.Is(err, errStoreDown) {
		t.Errorf("ping after a refused put: %v", err)
	}
	tt := setup{objects: func(objects) objects { return b.store }}.start(t)
	tt.cache.storageIsDown = func() bool { return b.store.whyDown() != nil }
	tt.origin.file("/h", "x")
	tt.get("/api/r/h").wantUnstored().wantBody("x")
	b.fake.readOnly = false
	b.mustPut("g", "x")
	if err := b.store.ping(t.Context()); err != nil {
		t.Errorf("ping after a put: %v", err)
	}
	tt.get("/api/r/h").wantMiss()
}

func TestS3PingIsCheapAndPatient(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.store.ping(t.Context())
	b.fake.count("")
	if err := b.store.ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.wantRequests("GetObject", 1)
	b.fake.fail(always("", fakeFault{hang: true}))
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		if err := b.store.ping(ctx); !errors.Is(err, errStoreDown) {
			t.Errorf("ping of a server that hangs: %v", err)
		}
		cancel()
	}
	if n := b.fake.count("GetObject"); n > 1 {
		t.Errorf("%d checks at once", n)
	}
}

func TestS3ClockOfAnHourAgo(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.advance(-time.Hour)
	err := b.store.ping(t.Context())
	if !errors.Is(err, errStoreDown) {
		t.Fatalf("ping: %v", err)
	}
	if s := err.Error(); !strings.Contains(s, "set the clock of this machine") || strings.Contains(s, "cannot be reached") {
		t.Errorf("the error does not name the clock: %s", s)
	}
}

func TestS3MissingBucketIsMade(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.fake.drop("")
	b.wantNoBody("f")
	must(t, b.store.ping(t.Context()))
	b.mustPut("f", "x")
	b.wantHit("f", "x")
}

// wantNoBody is wantDown for a body alone: a HEAD cannot tell a bucket that is
// missing from an object that is.
func (b *s3Bench) wantNoBody(spelling string) {
	b.t.Helper()
	if _, err := b.open(b.t.Context(), testKey(spelling), 0); !errors.Is(err, errStoreDown) {
		b.t.Errorf("open: %v", err)
	}
}

func TestS3FullIsNoSpace(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.fake.fail(always("PutObject", fakeFault{status: 507, code: "XMinioStorageFull"}))
	if err := b.put("f", "x"); !errors.Is(err, errNoSpace) {
		t.Errorf("put: %v", err)
	}
}

// An S3 without space is told of as that, whether a file or the check of the start finds it.
func TestS3FullIsTold(t *testing.T) {
	t.Parallel()
	for name, fill := range map[string]func(b *s3Bench){
		"at the start": func(*s3Bench) {},
		"later": func(b *s3Bench) {
			b.fake.fail(nil)
			if err := b.store.ping(b.t.Context()); err != nil {
				b.t.Error(err)
			}
			b.fake.fail(s3Full)
			b.put("f", "x")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newS3Bench(t)
			s := &server{log: b.store.log, cache: &cache{metrics: newMetrics()}}
			storage := &backend{name: "storage", okWord: "ok", ping: b.store.ping}
			wantState := func(want string) {
				t.Helper()
				s.checkBackend(storage)
				b.store.check.running.Wait() // which may take longer than the check of the backend
				if s.checkBackend(storage); storage.state() != want {
					t.Errorf("the state is %s, want %s: %s", storage.state(), want, b.log.b.String())
				}
			}
			b.fake.fail(s3Full)
			fill(b)
			wantState("full")
			b.fake.fail(nil)
			b.advance(s3WriteCheckInterval)
			wantState("ok")
			b.mustPut("f", "x")
		})
	}
}

// s3Full is a server whose disks are full.
func s3Full(op, _ string) (bool, *fakeFault) {
	if op == "PutObject" || op == "CreateMultipartUpload" {
		return false, &fakeFault{status: 507, code: "XMinioStorageFull"}
	}
	return true, nil
}

// What waits for an outage to end does not wait for an object that S3 refuses.
func TestS3RefusesOneObject(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("a", "a")
	b.fake.fail(always("HeadObject", fakeFault{status: 403}))
	if _, err := b.stat(t.Context(), testKey("a")); err == nil || errors.Is(err, errStoreDown) || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("refused: %v", err)
	}
	b.fake.fail(nil)
	b.fake.drop(testKey("a"))
	if _, err := b.stat(t.Context(), testKey("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed elsewhere: %v", err)
	}
}

func TestS3WalkEndsWithAFailure(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	for i := range 50 {
		b.putClass(fmt.Sprint("f", i), "x", mutable)
	}
	b.fake.fail(always("HeadObject", fakeFault{status: 403}))
	seen := 0
	err := b.walk(t.Context(), func(string, *record) error { seen++; return nil })
	if !errors.Is(err, errStoreDown) || seen > 0 {
		t.Errorf("walk: %v after %d; a reindex would drop the rows of the others", err, seen)
	}
}

func TestS3Verify(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	for _, name := range []string{"good", "rotten", "damaged", "empty"} {
		b.mustPut(name, strings.Repeat(name, len(name)%5*10))
	}
	mustPut(t, b.store.client, "some/where/else", putOf([]byte("x")))
	mustPut(t, b.store.client, testKey("foreign"), putOf([]byte("x")))
	b.fake.object(testKey("rotten")).data[3] ^= 1
	b.fake.object(testKey("damaged")).meta.Set("X-Amz-Meta-Artifact", "{")
	reported, dropped := map[string]error{}, 0
	checked, err := b.store.verify(t.Context(), func(key string, err error) {
		reported[key] = err
		if errors.Is(err, errDropped) {
			dropped++
		}
	})
	if checked != 5 || dropped != 2 || err != nil || len(reported) != 3 {
		t.Errorf("%d checked, %d dropped, %v, %v", checked, dropped, err, reported)
	}
	for _, name := range []string{"rotten", "damaged"} {
		if !errors.Is(reported[testKey(name)], errDropped) {
			t.Errorf("%s: %v", name, reported[testKey(name)])
		}
		b.wantMiss(name)
	}
	b.wantHit("good", strings.Repeat("good", 40))
	if b.fake.object("some/where/else") == nil || b.fake.object(testKey("foreign")) == nil {
		t.Error("something that is not ours was dropped")
	}
}

// S3 fails between the look at a body and its removal: it is not good.
func TestS3VerifyInAnOutage(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	b.mustPut("rotten", "rotten")
	b.fake.object(testKey("rotten")).data[3] ^= 1
	b.fake.fail(always("HeadObject", fakeFault{status: 403}))
	var reported error
	checked, err := b.store.verify(t.Context(), func(_ string, err error) { reported = err })
	if checked != 1 || err != nil || !errors.Is(reported, errStoreDown) {
		t.Errorf("%d checked, %v, reported %v", checked, err, reported)
	}
}

func TestS3SweepAbortsOldUploads(t *testing.T) {
	t.Parallel()
	b := newS3Bench(t)
	if _, err := b.store.client.createMultipartUpload(t.Context(), testKey("f"), s3PutInput{}); err != nil {
		t.Fatal(err)
	}
	if err := b.store.sweep(t.Context()); err != nil || b.fake.pending() != 1 {
		t.Errorf("a young upload: %v, %d left", err, b.fake.pending())
	}
	other, err := b.store.client.createMultipartUpload(t.Context(), "backup/of/another/program.tar", s3PutInput{})
	if err != nil {
		t.Fatal(err)
	}
	b.fake.mu.Lock()
	for _, u := range b.fake.uploads {
		u.initiated = u.initiated.Add(-25 * time.Hour)
	}
	b.fake.lost[other] = true
	b.fake.mu.Unlock()
	if err := b.store.sweep(t.Context()); err != nil || b.fake.pending() != 1 || b.fake.uploads[other] == nil {
		t.Errorf("an old upload, and one of another program: %v, %d left", err, b.fake.pending())
	}
}

// TestS3RefusedConnections asks a port without a listener, as after a crash.
func TestS3RefusedConnections(t *testing.T) {
	t.Parallel()
	dead := httptest.NewServer(nil)
	dead.Close()
	c := newS3Client(s3Config{host: dead.Listener.Addr().String(), bucket: "b", accessKey: "a", secretKey: "s", now: time.Now,
		sleep: func(ctx context.Context, _ time.Duration) error { return ctx.Err() }})
	s := newS3Store(c, nil)
	b := &s3Bench{storeTester: &storeTester{t: t, objects: s, dir: t.TempDir()}}
	b.wantDown("f")
	if err := s.ping(t.Context()); !errors.Is(err, errStoreDown) {
		t.Errorf("ping: %v", err)
	}
}

// BenchmarkS3Hit compares what a hit costs, in the store and as a client of the
// server sees it, with a bare signed GET of the same object: of the server
// that TEST_S3 names, or of the fake.
func BenchmarkS3Hit(b *testing.B) {
	for _, size := range []int{4 << 10, 1 << 20, 64 << 20} {
		b.Run(fmt.Sprint(size>>10, "KiB"), func(b *testing.B) {
			s := newS3Store(benchS3(b), func() bool { return true })
			content := bigContent(size)
			if err := s.put(b.Context(), testKey("bench"), testRecord("bench", content), tempSpool(b, b.TempDir(), content), putCondition{}); err != nil {
				b.Fatal(err)
			}
			benchReads(b, "direct", size, func() (io.ReadCloser, error) {
				o, err := s.client.getObject(b.Context(), testKey("bench"), 0, "")
				if err != nil {
					return nil, err
				}
				return o.body, nil
			})
			benchObjects(b, s, size)
		})
	}
}

// benchS3 is a client without small parts.
func benchS3(b *testing.B) *s3Client {
	b.Helper()
	if os.Getenv("TEST_S3") != "" {
		return realS3(b, 64<<20)
	}
	cfg := newFakeS3(b).config()
	cfg.partSize = 0
	return newS3Client(cfg)
}

// benchObjects reads the object "bench" from o, and through a server over o.
func benchObjects(b *testing.B, o objects, size int) {
	benchReads(b, "store", size, func() (io.ReadCloser, error) {
		obj, err := o.open(b.Context(), testKey("bench"), 0)
		if err != nil {
			return nil, err
		}
		return obj.body, nil
	})
	tt := setup{objects: func(objects) objects { return o }}.start(b)
	tt.get("/api/r/bench").wantHit()
	benchReads(b, "client", size, func() (io.ReadCloser, error) {
		res, err := tt.client.RoundTrip(httptest.NewRequest("GET", tt.url+"/api/r/bench", nil))
		if err != nil {
			return nil, err
		}
		return res.Body, nil
	})
}

// benchReads measures how fast a body is there and read.
func benchReads(b *testing.B, name string, size int, open func() (io.ReadCloser, error)) {
	b.Run(name, func(b *testing.B) {
		b.SetBytes(int64(size))
		b.ReportAllocs()
		for b.Loop() {
			body, err := open()
			if err != nil {
				b.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, body); err != nil || n != int64(size) {
				b.Fatal(n, err)
			}
			body.Close()
		}
	})
}
