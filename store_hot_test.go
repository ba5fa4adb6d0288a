// store_hot_test.go: hot copies in front of S3: when they are made, when they are
// used, and when they are removed.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// hotBench is a tier in front of an s3Bench.
type hotBench struct {
	*s3Bench
	tier  *tieredStore
	disk  *diskStore
	space *spoolSpace
}

// spaceOf makes spools on disk, without a bound.
func spaceOf(disk *diskStore) *spoolSpace {
	return &spoolSpace{createFile: disk.newSpool, diskSpace: disk.freeSpace, now: time.Now}
}

// onNewSpool calls f before each spool of a copy is made.
func (b *hotBench) onNewSpool(f func()) {
	create := b.space.createFile
	b.space.createFile = func() (*os.File, error) {
		f()
		return create()
	}
}

const hotTestLimit = 16 << 20

func newHotBench(t *testing.T) *hotBench { return newHotBenchAt(t, newFakeS3(t), hotTestLimit) }

// newHotBenchAt makes one more replica at a server.
func newHotBenchAt(t *testing.T, f *fakeS3, limit int64) *hotBench {
	b := &hotBench{s3Bench: newS3BenchAt(t, f)}
	b.restart(newTestDisk(t), limit)
	return b
}

// restart makes a new tier of what is on disk.
func (b *hotBench) restart(disk *diskStore, limit int64) {
	b.disk, b.space = disk, spaceOf(disk)
	b.tier = newTiered(b.store, disk, limit, b.space)
	b.space.reclaimer = b.tier
	b.t.Cleanup(b.tier.Close)
	b.objects = b.tier
	if err := b.tier.findCopies(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
}

// read reads a whole body and waits for the copy that is made of it.
func (b *hotBench) read(spelling, content string) {
	b.t.Helper()
	wantBody(b.t, b.mustOpen(spelling, 0).body, content)
	b.tier.wg.Wait()
}

// wantHot checks that a file is served without a request.
func (b *hotBench) wantHot(spelling, content string) {
	b.t.Helper()
	b.fake.count("")
	b.wantHit(spelling, content)
	b.wantRequests()
}

// wantNoCopy checks that there is no copy of a file. It does not open the file, which
// would make one.
func (b *hotBench) wantNoCopy(spelling string) {
	b.t.Helper()
	b.tier.wg.Wait()
	if _, found := b.tier.copies.get(testKey(spelling)); found {
		b.t.Errorf("there is a copy of %s", spelling)
	}
	if o, err := b.disk.open(b.t.Context(), testKey(spelling), -1); !errors.Is(err, fs.ErrNotExist) {
		b.t.Errorf("on disk is %s: %v, %v", spelling, o, err)
	}
}

func TestTieredObjects(t *testing.T) {
	t.Parallel()
	testObjects(t, func(t *testing.T) objects { return newHotBench(t).tier })
}

func TestTieredObjectsWithoutCopies(t *testing.T) {
	t.Parallel()
	testObjects(t, func(t *testing.T) objects { return newHotBenchAt(t, newFakeS3(t), 0).tier })
}

func TestTieredObjectsReal(t *testing.T) {
	t.Parallel()
	testObjects(t, func(t *testing.T) objects {
		disk := newTestDisk(t)
		s := newTiered(newS3Store(realBucket(t), func() bool { return true }), disk, hotTestLimit, spaceOf(disk))
		t.Cleanup(s.Close)
		return s
	})
}

func TestHotIsNoRequest(t *testing.T) {
	t.Parallel()
	b := newHotBench(t)
	small, large := "small", bigContent(1_000_000)
	b.mustPut("small", small)
	b.mustPut("large", large)
	b.wantHot("small", small)
	b.wantHot("large", large)
	if _, ok := b.mustOpen("small", 0).body.(*memBody); !ok {
		t.Error("a small body is not served from memory")
	}
	if _, ok := b.mustOpen("large", 0).body.(*fileBody); !ok {
		t.Error("a large body is not served from its file")
	}
}

func TestHotIsWhatWasReadToItsEnd(t *testing.T) {
	t.Parallel()
	content := bigContent(300_000)
	for name, c := range map[string]struct {
		read func(o *object)
		hot  bool
	}{
		"all of it":     {func(o *object) { io.Copy(io.Discard, o.body) }, true},
		"by its size":   {func(o *object) { io.CopyN(io.Discard, o.body, 300_000) }, true},
		"nothing":       {func(o *object) {}, false},
		"all but one":   {func(o *object) { io.CopyN(io.Discard, o.body, 299_999) }, false},
		"twice a part":  {func(o *object) { readFrom(o, 0, 1000); readFrom(o, 0, 300_000) }, false},
		"all but a gap": {func(o *object) { readFrom(o, 0, 1000); readFrom(o, 1001, 298_999) }, false},
		"measured first": {func(o *object) {
			o.body.Seek(0, io.SeekEnd)
			readFrom(o, 0, 300_000)
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newHotBench(t)
			a.mustPut("f", content)
			b := newHotBenchAt(t, a.fake, hotTestLimit)
			b.fake.count("")
			o := b.mustOpen("f", 0)
			c.read(o)
			o.body.Close()
			b.tier.wg.Wait()
			if c.hot {
				b.wantRequests("GetObject", 1)
				b.wantHot("f", content)
				return
			}
			b.wantNoCopy("f")
		})
	}
}

func readFrom(o *object, off, n int64) {
	o.body.Seek(off, io.SeekStart)
	io.CopyN(io.Discard, o.body, n)
}

func TestRangesAreNotCopied(t *testing.T) {
	t.Parallel()
	a := newHotBench(t)
	a.mustPut("f", "content")
	b := newHotBenchAt(t, a.fake, hotTestLimit)
	wantBody(t, b.mustOpen("f", 1).body, "ontent")
	b.wantNoCopy("f")
}

func TestCopiesAreVerified(t *testing.T) {
	t.Parallel()
	a := newHotBench(t)
	a.mustPut("f", "content")
	a.fake.object(testKey("f")).data[2] ^= 1
	b := newHotBenchAt(t, a.fake, hotTestLimit)
	io.Copy(io.Discard, b.mustOpen("f", 0).body)
	b.wantNoCopy("f")
	if b.log.count("run verify") != 1 {
		t.Errorf("the log does not say so: %s", b.log.b.String())
	}
}

// TestFastClientsAreNotSlowed has a disk that does not begin before the client has
// everything. No copy is made then, and a later reader makes it.
func TestFastClientsAreNotSlowed(t *testing.T) {
	t.Parallel()
	content := bigContent(3 * maxChunksAhead * copyBufferSize / 2)
	a := newHotBench(t)
	a.mustPut("f", content)
	b := newHotBenchAt(t, a.fake, hotTestLimit)
	gate := make(chan struct{})
	b.onNewSpool(func() { <-gate })
	b.fake.count("")
	wantBody(t, b.mustOpen("f", 0).body, content)
	close(gate)
	b.wantNoCopy("f")
	b.wantRequests("GetObject", 1) // nothing is read a second time
	if b.log.count("no hot copy was made") > 0 {
		t.Error("a fast client was logged as a failure")
	}
	if b.tier.copies.cost != 0 {
		t.Errorf("%d bytes are charged for nothing", b.tier.copies.cost)
	}
	o := b.mustOpen("f", 0)
	body := o.body.(*copyingBody)
	for range len(content) / copyBufferSize {
		waitUntil(t, "keeping up", func() bool { return len(body.chunks) < maxChunksAhead/2 })
		io.CopyN(io.Discard, o.body, copyBufferSize)
	}
	b.tier.wg.Wait()
	b.wantHot("f", content)
}

// TestUnfinishedCopiesEvictLittle: a copy that ends early has evicted others for what
// was written, not for the whole file.
func TestUnfinishedCopiesEvictLittle(t *testing.T) {
	t.Parallel()
	const others = 32
	a := newHotBench(t)
	a.mustPut("large", bigContent(15<<20))
	b := newHotBenchAt(t, a.fake, others<<20)
	for i := range others {
		b.tier.copies.put(testKey(fmt.Sprint(i)), 1<<20, validity{})
	}
	o := b.mustOpen("large", 0)
	io.CopyN(io.Discard, o.body, copyBufferSize)
	o.body.Close()
	b.wantNoCopy("large")
	if left, want := len(b.tier.copies.byKey), others-1; left != want {
		t.Errorf("%d other copies are left, want %d", left, want)
	}
	if cost := b.tier.copies.cost; cost != int64(len(b.tier.copies.byKey))<<20 {
		t.Errorf("%d bytes are charged", cost)
	}
}

func TestCopiesLeaveRoom(t *testing.T) {
	t.Parallel()
	a := newHotBench(t)
	a.mustPut("f", "content")
	b := newHotBenchAt(t, a.fake, hotTestLimit)
	b.space.diskSpace = func() (diskUsage, error) { return usageOf(6, 100), nil }
	b.read("f", "content")
	b.wantNoCopy("f")
}

// TestNewCopiesReplaceOldOnesOnAFullDisk: the tier is not at its limit, but the disk is.
func TestNewCopiesReplaceOldOnesOnAFullDisk(t *testing.T) {
	t.Parallel()
	a := newHotBench(t)
	a.mustPut("new", "new")
	b := newHotBenchAt(t, a.fake, hotTestLimit)
	b.mustPut("old", "old")
	b.space.diskSpace = func() (diskUsage, error) {
		if _, found := b.tier.copies.get(testKey("old")); !found {
			return usageOf(3, 100), nil
		}
		return usageOf(0, 100), nil
	}
	b.read("new", "new")
	b.wantHot("new", "new")
	b.wantNoCopy("old")
}

func TestOneCopyOfManyReaders(t *testing.T) {
	t.Parallel()
	a := newHotBench(t)
	content := bigContent(300_000)
	a.mustPut("f", content)
	b := newHotBenchAt(t, a.fake, hotTestLimit)
	made := 0
	gate := make(chan struct{})
	b.onNewSpool(func() { made++; <-gate })
	for range 5 {
		wantBody(t, b.mustOpen("f", 0).body, content)
	}
	close(gate)
	b.tier.wg.Wait()
	if made != 1 {
		t.Errorf("%d copies were made", made)
	}
	b.wantHot("f", content)
}

func TestEviction(t *testing.T) {
	t.Parallel()
	const size, limit = 100_000, 1_000_000
	b := newHotBenchAt(t, newFakeS3(t), limit)
	content := func(i int) string { return fmt.Sprint(i, strings.Repeat("x", size)) }
	for i := range 30 {
		b.mustPut(fmt.Sprint(i), content(i))
		b.mustOpen("0", 0) // used all the time
		var bytes int64
		b.disk.walk(t.Context(), func(_ string, rec *record) error { bytes += rec.Size; return nil })
		if bytes > limit || b.tier.copies.cost > limit {
			t.Fatalf("%d bytes on disk, %d by our count, %d are allowed", bytes, b.tier.copies.cost, limit)
		}
	}
	b.wantHot("0", content(0))
	b.wantHot("29", content(29))
	b.wantNoCopy("1")
	b.wantHit("1", content(1))
	b.mustPut("huge", strings.Repeat("x", limit-10_000))
	b.wantNoCopy("huge")
	b.wantHot("0", content(0))
	all := b.tier.reclaimable()
	if got := b.tier.reclaim(room{inodes: 1}, func(int64) {}); got.inodes != inodesPerFile {
		t.Errorf("reclaimed %+v for an inode", got)
	}
	if got := b.tier.reclaim(room{bytes: limit}, func(int64) {}); got.bytes >= all.bytes || got.bytes == 0 || (b.tier.reclaimable() != room{}) {
		t.Errorf("of %+v was reclaimed %+v, and there is %+v", all, got, b.tier.reclaimable())
	}
	if got := b.tier.reclaim(room{bytes: 1}, func(int64) {}); got != (room{}) {
		t.Errorf("reclaimed %+v of nothing", got)
	}
	b.wantNoCopy("0")
	if b.tier.copies.cost != 0 {
		t.Errorf("%d bytes are charged for nothing", b.tier.copies.cost)
	}
}

// TestTrust has each case of when a copy is served without asking S3.
func TestTrust(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		class  class
		online bool
		age    time.Duration
		reset  bool
		asked  bool
	}{
		"immutable, announcements arrive":      {immutable, true, 24 * time.Hour / 100, false, false},
		"immutable, young":                     {immutable, false, 59 * time.Second, false, false},
		"immutable, a minute old":              {immutable, false, 60 * time.Second, false, true},
		"immutable, something may be missed":   {immutable, true, 0, true, true},
		"mutable, announcements arrive":        {mutable, true, 10 * time.Minute, false, false},
		"mutable, they do not":                 {mutable, false, 0, false, true},
		"mutable, something may be missed":     {mutable, true, 0, true, true},
		"of our own, announcements arrive":     {local, true, 10 * time.Minute, false, false},
		"of our own, they do not":              {local, false, 0, false, true},
		"of our own, something may be missed":  {local, true, 0, true, true},
		"immutable, missed and not yet online": {immutable, false, 0, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newHotBench(t)
			b.putClass("f", "content", c.class)
			b.online.Store(c.online)
			b.advance(c.age)
			if c.reset {
				b.tier.invalidate("")
			}
			b.fake.count("")
			wantBody(t, b.mustOpen("f", 0).body, "content")
			if !c.asked {
				b.wantRequests()
				return
			}
			b.wantRequests("HeadObject", 1)
			b.online.Store(true)
			wantBody(t, b.mustOpen("f", 0).body, "content")
			b.wantRequests()
		})
	}
}

func TestAnnouncementsReachTheCopy(t *testing.T) {
	t.Parallel()
	a := newHotBench(t)
	a.putClass("f", "old", mutable)
	b := newHotBenchAt(t, a.fake, hotTestLimit)
	b.read("f", "old")
	a.putClass("f", "new", mutable)
	b.tier.invalidate(testKey("f"))
	b.read("f", "new")
	wantBody(t, b.mustOpen("f", 0).body, "new")
	if err := a.delete(t.Context(), testKey("f")); err != nil {
		t.Fatal(err)
	}
	b.tier.invalidate(testKey("f"))
	b.wantMiss("f")
	b.wantNoCopy("f")
}

// TestAnnouncementsDuringACopy: what was read before an announcement must not become
// a copy after it.
func TestAnnouncementsDuringACopy(t *testing.T) {
	t.Parallel()
	a := newHotBench(t)
	content := bigContent(300_000)
	a.putClass("f", content, mutable)
	b := newHotBenchAt(t, a.fake, hotTestLimit)
	o := b.mustOpen("f", 0)
	io.CopyN(io.Discard, o.body, 100_000)
	b.tier.invalidate(testKey("f"))
	io.Copy(io.Discard, o.body)
	b.wantNoCopy("f")
}

// A change of another key that is counted with f's, during an upload of f, keeps the new
// version from becoming the copy. Then the old copy goes too: nothing counts it any more.
func TestNoCopyStaysThatNothingCounts(t *testing.T) {
	t.Parallel()
	b := newHotBench(t)
	b.mustPut("f", "old")
	b.wantHot("f", "old")
	n := 0
	for n = 0; b.store.changesOf(testKey(fmt.Sprint(n))) != b.store.changesOf(testKey("f")); n++ {
	}
	b.fake.fail(func(op, _ string) (bool, *fakeFault) {
		if op == "PutObject" {
			b.tier.invalidate(testKey(fmt.Sprint(n)))
		}
		return true, nil
	})
	b.mustPut("f", "new")
	b.wantNoCopy("f")
	b.fake.fail(nil)
	b.read("f", "new")
	b.wantHot("f", "new")
}

func TestMissedAnnouncementsAreFound(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(a *hotBench){
		"replaced":       func(a *hotBench) { a.putClass("f", "new", mutable) },
		"deleted":        func(a *hotBench) { a.delete(a.t.Context(), testKey("f")) },
		"deleted, again": func(a *hotBench) { a.fake.drop(testKey("f")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newHotBench(t)
			a.putClass("f", "old", mutable)
			b := newHotBenchAt(t, a.fake, hotTestLimit)
			b.read("f", "old")
			b.online.Store(false)
			change(a)
			if name == "replaced" {
				b.read("f", "new")
				return
			}
			b.wantMiss("f")
			b.wantNoCopy("f")
		})
	}
}

func TestHotInAnOutage(t *testing.T) {
	t.Parallel()
	b := newHotBench(t)
	b.putClass("forever", "x", immutable)
	b.putClass("changes", "x", mutable)
	b.fake.fail(always("", fakeFault{}))
	b.wantDown("unknown")
	for _, spelling := range []string{"forever", "changes"} {
		wantBody(t, b.mustOpen(spelling, 0).body, "x")
	}
	b.online.Store(false)
	b.advance(time.Hour / 10)
	wantBody(t, b.mustOpen("forever", 0).body, "x")
	b.wantDown("changes") // it may have been replaced: upstream is asked
	b.fake.fail(nil)
	if err := b.store.ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantBody(t, b.mustOpen("changes", 0).body, "x")
}

// TestPutWithoutAnAnswer: the new version may be in S3 or not, so the old copy
// is checked before it is used again.
func TestPutWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	b := newHotBench(t)
	b.putClass("f", "old", mutable)
	b.fake.fail(func(op, _ string) (bool, *fakeFault) { return op == "PutObject", &fakeFault{} })
	rec := testRecord("f", "new")
	if err := b.tier.put(t.Context(), testKey("f"), rec, tempSpool(t, b.dir, "new"), putCondition{}); err == nil {
		t.Fatal("put was acknowledged")
	}
	b.fake.fail(nil)
	b.advance(s3RetryAfter)
	wantBody(t, b.mustOpen("f", 0).body, "new")
}

func TestCopiesOutliveTheProcess(t *testing.T) {
	t.Parallel()
	b := newHotBench(t)
	content := bigContent(100_000)
	b.mustPut("kept", content)
	b.mustPut("replaced", "old")
	b.tier.Close()
	a := newHotBenchAt(t, b.fake, hotTestLimit)
	a.mustPut("replaced", "new")
	b.restart(b.disk, hotTestLimit)
	b.fake.count("")
	wantBody(t, b.mustOpen("kept", 0).body, content)
	b.wantRequests("HeadObject", 1)
	b.wantHot("kept", content)
	b.read("replaced", "new")
	b.tier.Close()
	b.restart(b.disk, 0) // switched off
	b.wantNoCopy("kept")
	b.wantHit("kept", content)
}

func TestDamagedCopiesAreNoMatter(t *testing.T) {
	t.Parallel()
	b := newHotBench(t)
	content := bigContent(100_000)
	b.mustPut("f", content)
	if err := b.disk.delete(t.Context(), testKey("f")); err != nil {
		t.Fatal(err)
	}
	b.read("f", content)
	b.wantHot("f", content)
	checked, err := b.tier.verify(t.Context(), func(key string, err error) { t.Errorf("%s: %v", key, err) })
	if checked != 2 || err != nil {
		t.Errorf("%d checked, %v", checked, err)
	}
}

// toldReplicas is replicas as far as announcing goes.
type toldReplicas struct {
	replicas
	down bool
	told []string
}

func (r *toldReplicas) hearsChanges() bool { return !r.down }

func (r *toldReplicas) announceChange(ctx context.Context, key string) error {
	if r.down || ctx.Err() != nil {
		return errStoreDown
	}
	r.told = append(r.told, key)
	return nil
}

func TestChangesAreAnnounced(t *testing.T) {
	t.Parallel()
	disk, fresh := newTestDisk(t), newLocalFreshness(t.TempDir(), time.Now, slog.New(slog.DiscardHandler))
	r := &toldReplicas{}
	c := newCache(cacheStores{objects: disk, index: newTestIndex(t, t.TempDir(), disk), marks: fresh, replicas: r}, nil, time.Now, slog.New(slog.DiscardHandler), newMetrics())
	c.flushCounts(t.Context())
	if want := []string{copiesPrefix}; !slices.Equal(r.told, want) {
		t.Errorf("at the start told %q, want %q", r.told, want)
	}
	r.told = nil
	change := func(spelling string) {
		t.Helper()
		rec := testRecord(spelling, "x")
		if err := c.storeBody(t.Context(), testKey(spelling), rec, tempSpool(t, t.TempDir(), "x"), putCondition{}); err != nil {
			t.Fatal(err)
		}
	}
	change("a")
	r.down = true
	change("b")
	if err := c.removeFile(t.Context(), "r", testKey("a"), removedPrefix); err != nil {
		t.Fatal(err)
	}
	c.flushCounts(t.Context())
	if want := []string{testKey("a")}; !slices.Equal(r.told, want) {
		t.Errorf("told %q, want %q", r.told, want)
	}
	r.down, r.told = false, nil
	c.flushCounts(t.Context())
	c.flushCounts(t.Context())
	if want := []string{copiesPrefix}; !slices.Equal(r.told, want) {
		t.Errorf("told late %q, want %q", r.told, want)
	}
}

// leftClient is a store that confirms a change to a client that has left meanwhile.
type leftClient struct {
	objects
	leave func()
}

func (o leftClient) put(context.Context, string, *record, io.ReaderAt, putCondition) error {
	o.leave()
	return nil
}

func (o leftClient) delete(context.Context, string) error {
	o.leave()
	return nil
}

func TestChangesOfAClientThatLeftAreAnnounced(t *testing.T) {
	t.Parallel()
	for want, change := range map[string]func(ctx context.Context, c *cache) error{
		testKey("f"): func(ctx context.Context, c *cache) error {
			return c.storeBody(ctx, testKey("f"), testRecord("f", "x"), strings.NewReader("x"), putCondition{})
		},
		removedPrefix + testKey("f"): func(ctx context.Context, c *cache) error { return c.removeFile(ctx, "r", testKey("f"), removedPrefix) },
	} {
		disk, r := newTestDisk(t), &toldReplicas{}
		ctx, leave := context.WithCancel(t.Context())
		c := newCache(cacheStores{objects: leftClient{disk, leave}, index: newTestIndex(t, t.TempDir(), disk),
			marks: newLocalFreshness(t.TempDir(), time.Now, disk.log), replicas: r}, nil, time.Now, disk.log, newMetrics())
		if err := change(ctx, c); err != nil || !slices.Equal(r.told, []string{want}) {
			t.Errorf("%v, told %q, want %q", err, r.told, want)
		}
	}
}

// A local file may have been replaced or removed although S3 gave no answer. The other
// replicas hear of that: what they have never expires.
func TestChangeWithoutAnAnswerIsAnnounced(t *testing.T) {
	t.Parallel()
	for op, change := range map[string]func(t *testing.T, c *cache) error{
		"PutObject": func(t *testing.T, c *cache) error {
			rec := testRecord("f", "new")
			rec.Class = local
			return c.storeBody(t.Context(), testKey("f"), rec, tempSpool(t, t.TempDir(), "new"), putCondition{})
		},
		"DeleteObject": func(t *testing.T, c *cache) error { return c.removeFile(t.Context(), "r", testKey("f"), removedPrefix) },
	} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			a := newHotBench(t)
			a.putClass("f", "old", local)
			b := newHotBenchAt(t, a.fake, hotTestLimit)
			b.read("f", "old")
			b.fake.count("")
			wantBody(t, b.mustOpen("f", 0).body, "old")
			b.wantRequests() // it has a copy
			a.fake.fail(func(o, _ string) (bool, *fakeFault) {
				if o != op {
					return true, nil
				}
				return true, &fakeFault{}
			})
			r := &toldReplicas{}
			if err := change(t, newCache(cacheStores{objects: a.tier, replicas: r}, nil, time.Now, a.store.log, newMetrics())); err == nil {
				t.Fatal("the change was acknowledged")
			}
			other := newCache(cacheStores{objects: b.tier, index: newEmbeddedIndex(t.TempDir(), b.store.log)}, nil, time.Now, b.store.log, newMetrics())
			for _, announced := range r.told {
				other.onChange(announced)
			}
			if op == "DeleteObject" {
				b.tier.wg.Wait()
				b.wantMiss("f")
				return
			}
			wantBody(t, b.mustOpen("f", 0).body, "new")
		})
	}
}

// Without PostgreSQL each replica has an index of its own: one that still lists what another
// has removed shows, and counts, what is not there.
func TestRemovedElsewhereIsNotListedHere(t *testing.T) {
	t.Parallel()
	b := newHotBench(t)
	index := newEmbeddedIndex(t.TempDir(), b.store.log)
	c := newCache(cacheStores{objects: b.tier, index: index}, nil, time.Now, b.store.log, newMetrics())
	for _, spelling := range []string{"evicted", "removed", "replaced", "stays"} {
		must(t, index.saveRow(t.Context(), testRow("r", spelling)))
	}
	c.onChange(copiesPrefix)
	c.onChange(copiesPrefix + testKey("evicted"))
	c.onChange(removedPrefix + testKey("removed"))
	c.onChange(testKey("replaced"))
	c.onChange(removedPrefix + "junk")
	p, err := index.listPage(t.Context(), pageQuery{remote: "r", limit: 10})
	if err != nil || len(p.rows) != 2 || p.rows[0].Path != "replaced" || p.rows[1].Path != "stays" {
		t.Errorf("listed are %v, %v", p.rows, err)
	}
}

// A file that another replica removed, and was not heard to, has no row, as if it lacked one.
func TestUseOfAFileThatIsGoneAddsNoRow(t *testing.T) {
	t.Parallel()
	b := newHotBench(t)
	index := newEmbeddedIndex(t.TempDir(), b.store.log)
	for _, spelling := range []string{"gone", "stays"} {
		b.mustPut(spelling, spelling)
		b.read(spelling, spelling)
	}
	b.fake.drop(testKey("gone"))
	b.wantHot("gone", "gone")
	var uses useCounts
	uses.addUses(fileUse{"r", testKey("gone"), 1, testDay}, fileUse{"r", testKey("stays"), 1, testDay})
	must(t, uses.flush(t.Context(), index, b.tier))
	p, err := index.listPage(t.Context(), pageQuery{remote: "r", limit: 10})
	if err != nil || len(p.rows) != 1 || p.rows[0].Path != "stays" {
		t.Errorf("listed are %v, %v", p.rows, err)
	}
}

func TestOutdatedCopyIsAskedForAgain(t *testing.T) {
	t.Parallel()
	a := newHotBench(t)
	a.putClass("f", "old", mutable)
	b := newHotBenchAt(t, a.fake, hotTestLimit)
	b.read("f", "old")
	a.putClass("f", "new", mutable)
	fresh := newLocalFreshness(t.TempDir(), time.Now, slog.New(slog.DiscardHandler))
	c := newCache(cacheStores{objects: b.tier, marks: fresh}, nil, time.Now, b.store.log, newMetrics())
	file := fileRequest{target: target{remote: &remote{name: "r"}, path: "f", spelling: "f", class: mutable}}
	wantLookup := func(content string) {
		t.Helper()
		s, err := c.findCopy(t.Context(), testKey("f"), file, byteRange{})
		if err != nil {
			t.Fatal(err)
		}
		defer s.body.Close()
		wantBody(t, s.body, content)
	}
	wantLookup("old") // the change was not announced
	fresh.setMark(t.Context(), testKey("f"), freshnessMark{GoodAt: time.Now(), SHA256: testRecord("f", "new").SHA256})
	b.fake.count("")
	wantLookup("new")
	b.wantRequests("GetObject", 1)
	b.tier.wg.Wait()
	wantLookup("new")
	b.wantRequests()
	fresh.setMark(t.Context(), testKey("f"), freshnessMark{GoodAt: time.Now(), SHA256: testRecord("f", "lost").SHA256})
	wantLookup("new") // asked for once, not in a loop
	b.wantRequests("GetObject", 1)
}

// BenchmarkHotHit is BenchmarkS3Hit with a copy on local disk.
func BenchmarkHotHit(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 20} {
		b.Run(fmt.Sprint(size>>10, "KiB"), func(b *testing.B) {
			s := newS3Store(benchS3(b), func() bool { return true })
			d := newDiskStore(filepath.Join(b.TempDir(), "hot"), time.Now, slog.New(slog.DiscardHandler))
			t := newTiered(s, d, 1<<30, spaceOf(d))
			defer t.Close()
			content := bigContent(size)
			if err := t.put(b.Context(), testKey("bench"), testRecord("bench", content), tempSpool(b, b.TempDir(), content), putCondition{}); err != nil {
				b.Fatal(err)
			}
			benchObjects(b, t, size)
		})
	}
}

func TestS3Settings(t *testing.T) {
	t.Parallel()
	good := map[string]string{"MINIO_ENDPOINT": "minio:9000", "MINIO_ACCESS_KEY": "k", "MINIO_SECRET_KEY": "s3cr3t", "MINIO_BUCKET": "bkt"}
	for name, c := range map[string]struct {
		env  map[string]string
		want string // host, secure, virtual host, size of the tier; or a part of the error
	}{
		"host and port":     {nil, "minio:9000 false false 10737418240"},
		"a URL":             {map[string]string{"MINIO_ENDPOINT": "https://s3.example/"}, "s3.example true false 10737418240"},
		"secure":            {map[string]string{"MINIO_SECURE": "1", "HOT_CACHE_SIZE": "0"}, "minio:9000 true false 0"},
		"both":              {map[string]string{"MINIO_ENDPOINT": "https://s3.example", "MINIO_SECURE": "true"}, "s3.example true false 10737418240"},
		"virtual host":      {map[string]string{"MINIO_VIRTUAL_HOST": "true"}, "minio:9000 false true 10737418240"},
		"an address":        {map[string]string{"MINIO_ENDPOINT": "http://[::1]:9000"}, "[::1]:9000 false false 10737418240"},
		"none":              {map[string]string{"MINIO_ENDPOINT": "", "MINIO_ACCESS_KEY": "", "MINIO_SECRET_KEY": "", "MINIO_BUCKET": ""}, "nil"},
		"no endpoint":       {map[string]string{"MINIO_ENDPOINT": ""}, "MINIO_ENDPOINT"},
		"contradiction":     {map[string]string{"MINIO_ENDPOINT": "http://x", "MINIO_SECURE": "true"}, "MINIO_SECURE"},
		"contradiction too": {map[string]string{"MINIO_ENDPOINT": "https://x", "MINIO_SECURE": "false"}, "MINIO_SECURE"},
		"another scheme":    {map[string]string{"MINIO_ENDPOINT": "s3://x"}, "MINIO_ENDPOINT"},
		"a path":            {map[string]string{"MINIO_ENDPOINT": "http://x/y"}, "MINIO_ENDPOINT"},
		"user info":         {map[string]string{"MINIO_ENDPOINT": "http://k:s3cr3t@x"}, "MINIO_ENDPOINT"},
		"no bucket":         {map[string]string{"MINIO_BUCKET": ""}, "MINIO_BUCKET"},
		"a short bucket":    {map[string]string{"MINIO_BUCKET": "b"}, "MINIO_BUCKET"},
		"no secret":         {map[string]string{"MINIO_SECRET_KEY": ""}, "MINIO_SECRET_KEY"},
		"a bad size":        {map[string]string{"HOT_CACHE_SIZE": "much"}, "HOT_CACHE_SIZE"},
		"half a truth":      {map[string]string{"MINIO_VIRTUAL_HOST": "maybe"}, "MINIO_VIRTUAL_HOST"},
	} {
		set, err := parseSettings(func(name string) (string, bool) {
			if v, ok := c.env[name]; ok {
				return v, true
			}
			v, ok := good[name]
			return v, ok
		})
		got := "nil"
		switch {
		case err != nil:
			got = err.Error()
		case set.s3.bucket != "":
			got = fmt.Sprint(set.s3.host, " ", set.s3.secure, " ", set.s3.virtualHost, " ", set.hotSize)
		}
		if got != c.want && (err == nil || !strings.Contains(got, c.want)) || strings.Contains(got, "s3cr3t") {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// TestManyRangesForAClientThatLeaves: ServeContent reads several ranges in a goroutine
// of its own, which may still read when the handler closes the body. The bodies of S3
// rely on closableBody for that, which -race shows here.
func TestManyRangesForAClientThatLeaves(t *testing.T) {
	t.Parallel()
	content := bigContent(8 << 20)
	a := newHotBench(t)
	a.mustPut("f", content)
	for name, limit := range map[string]int64{"S3": 0, "a copy being made": hotTestLimit} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for range 10 {
				b := newHotBenchAt(t, a.fake, limit)
				tt := setup{objects: func(objects) objects { return b.tier }}.start(t)
				ctx, leave := context.WithCancel(t.Context())
				r := httptest.NewRequestWithContext(ctx, "GET", tt.url+"/api/r/f", nil)
				r.Header.Set("Range", "bytes=0-3999999,7000000-7000009,10-19")
				res, err := tt.client.RoundTrip(r)
				if err != nil || res.StatusCode != http.StatusPartialContent {
					t.Fatal(res, err)
				}
				io.CopyN(io.Discard, res.Body, 1_000_000)
				leave()
				res.Body.Close()
			}
		})
	}
}

// What the log says already of a disk that cannot be used is not a warning for each file.
func TestHotCopiesOfABrokenDiskWarnOnce(t *testing.T) {
	t.Parallel()
	b := newHotBench(t)
	b.disk.dir = t.TempDir() + "/file/hot"
	must(t, os.WriteFile(filepath.Dir(b.disk.dir), nil, 0o600))
	for _, known := range []bool{false, true} {
		b.tier.isInTrouble = func() bool { return known }
		b.mustPut("f", "text")
		b.read("f", "text")
		if n := b.log.count("level=WARN"); n != 3 {
			t.Errorf("known %t: %d warnings, want 3 of when it was not known", known, n)
		}
	}
}
