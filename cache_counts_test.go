package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A file whose row never was, or was lost in a crash, is listed after its next use.
func TestUseOfAFileWithoutARowAddsIt(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: "remotes:\n  r:\n    base_url: ORIGIN\n    mutable_patterns: ['idx$']\n  l:\n    type: local\n", env: map[string]string{"API_TOKEN": "t"}}.start(t)
	tt.origin.file("/a", "body")
	tt.origin.file("/idx", "body")
	tt.get("/api/r/a").wantMiss()
	tt.get("/api/r/idx").wantMiss()
	tt.put("/api/l/up", "text", "Authorization: Bearer t").wantStatus(201)
	tt.settle()
	before := map[string]indexRow{}
	for remote, paths := range map[string][]string{"r": {"a", "idx"}, "l": {"up"}} {
		p, err := tt.cache.index.listPage(t.Context(), pageQuery{remote: remote, limit: 9})
		must(t, err)
		for i, path := range paths {
			before[path] = p.rows[i]
			must(t, tt.cache.index.delete(t.Context(), remote, p.rows[i].Key))
		}
		if rows := tt.list(remote); len(rows) > 0 {
			t.Fatalf("%s still has %v", remote, rows)
		}
	}
	for range 2 {
		tt.get("/api/r/a").wantHit()
	}
	tt.get("/api/r/idx").wantHit()
	tt.get("/api/l/up").wantStatus(200)
	tt.cache.flushCounts(t.Context())
	for path, hits := range map[string]int64{"a": 2, "idx": 1, "up": 1} {
		want := before[path]
		p, err := tt.cache.index.listPage(t.Context(), pageQuery{remote: want.Remote, prefix: path, limit: 1})
		must(t, err)
		if len(p.rows) != 1 {
			t.Fatalf("%s is not listed", path)
		}
		got := p.rows[0]
		if got.Hits != hits || !got.LastAccess.After(got.Fetched) {
			t.Errorf("%s: %d hits, want %d; used at %v, fetched at %v", path, got.Hits, hits, got.LastAccess, got.Fetched)
		}
		got.Hits, got.LastAccess, want.LastAccess = 0, time.Time{}, time.Time{}
		if got != want {
			t.Errorf("the row of %s\n%+v, was\n%+v", path, got, want)
		}
	}
}

// Two servers over one DATA_DIR have an index each. What the first one stores is
// listed by the second one after its first use there.
func TestServersOverOneDirectoryListWhatTheyUse(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	o.file("/a", "body")
	yaml := remoteYAML(o.url)
	first := childSetup{yaml: yaml}.start(t)
	second := childSetup{yaml: yaml, dir: first.dir}.start(t)
	awaitThat(t, "the second index to be loaded", func() bool { return !second.tester().get("/artifacts/r").has("complete") })
	first.tester().get("/api/r/a").wantStatus(200).wantBody("body")
	awaitThat(t, "the file to be stored", func() bool { return first.tester().get("/artifacts/r").has(`"path": "a"`) })
	if g := second.tester().get("/artifacts/r"); g.has(`"path"`) || g.has("complete") {
		t.Fatalf("the second server lists %s", g.text)
	}
	second.tester().get("/api/r/a").wantHit().wantBody("body")
	awaitThat(t, "the second server to list it", func() bool { return second.tester().get("/artifacts/r").has(`"path": "a"`) })
}

// countingObjects counts the records that are read.
type countingObjects struct {
	fakeObjects
	reads atomic.Int64
	err   error
}

func (c *countingObjects) stat(ctx context.Context, key string) (*object, error) {
	c.reads.Add(1)
	if c.err != nil {
		return nil, c.err
	}
	return c.fakeObjects.stat(ctx, key)
}

// After the loss of a database every file lacks its row.
func TestHealingReadsAFewRecordsAtATime(t *testing.T) {
	t.Parallel()
	var stored countingObjects
	x := newTestIndex(t, t.TempDir(), newTestDisk(t))
	var heard useCounts
	const files = 2*usesBatch + 200
	for i := range files {
		spelling := fmt.Sprint("f", i)
		stored.add(spelling, "x")
		heard.addUses(fileUse{"r", testKey(spelling), 3, testDay})
	}
	for n := range 3 {
		must(t, heard.flush(t.Context(), x, &stored))
		if reads, most := stored.reads.Load(), int64((n+1)*usesBatch); reads > most {
			t.Errorf("%d records were read, want at most %d", reads, most)
		}
	}
	must(t, heard.flush(t.Context(), x, &stored))
	rows := 0
	must(t, x.eachEntry(t.Context(), "r", sortKey{}, func(e *indexEntry) bool {
		rows++
		return e.hits.Load() == 3
	}))
	if rows != files || stored.reads.Load() != files {
		t.Errorf("%d rows with their uses after %d reads, want %d", rows, stored.reads.Load(), files)
	}
}

// A file that is missing gets no row, and its uses are not kept. Those of a file whose
// store is down are: the file is there.
func TestHealingKeepsTheUsesOfAStoreThatIsDown(t *testing.T) {
	t.Parallel()
	var stored countingObjects
	x := newTestIndex(t, t.TempDir(), newTestDisk(t))
	var heard useCounts
	flush := func(at time.Duration) {
		t.Helper()
		heard.addUses(fileUse{"r", testKey("f"), 1, testDay.Add(at)})
		stored.reads.Store(0)
		must(t, heard.flush(t.Context(), x, &stored))
	}
	flush(0) // missing
	if uses := heard.take(); len(uses) > 0 {
		t.Errorf("uses of a missing file are kept: %v", uses)
	}
	stored.add("f", "x")
	stored.err = errStoreDown
	flush(time.Second)
	flush(2 * time.Second)
	stored.err = nil
	flush(3 * time.Second)
	flush(4 * time.Second)
	if n := stored.reads.Load(); n != 0 {
		t.Errorf("the record of a file with a row is read %d times", n)
	}
	want := newIndexRow(testKey("f"), stored.recs[testKey("f")])
	want.Hits, want.LastAccess = 4, testDay.Add(4*time.Second)
	(&indexTester{t, x}).wantRow(want)
}

// endingIndex is an index in a database, asked at the end of the process.
type endingIndex struct {
	index
	end func()
}

func (x *endingIndex) countUses(ctx context.Context, _ []fileUse) ([]fileUse, error) {
	x.end()
	return nil, ctx.Err()
}

// The flush that the shutdown interrupts leaves its uses to the last one.
func TestInterruptedFlushLosesNoUses(t *testing.T) {
	t.Parallel()
	var heard useCounts
	for i := range usesBatch + 1 {
		heard.addUses(fileUse{"r", fmt.Sprint(i), 1, testDay})
	}
	ctx, cancel := context.WithCancel(t.Context())
	_ = heard.flush(ctx, &endingIndex{end: cancel}, nil)
	if n := len(heard.take()); n != usesBatch+1 {
		t.Errorf("the uses of %d files are left, want those of %d", n, usesBatch+1)
	}
}

func TestUsesAreBounded(t *testing.T) {
	t.Parallel()
	var heard useCounts
	for i := range maxUses + 10 {
		heard.addUses(fileUse{"r", fmt.Sprint(i), 1, testDay})
	}
	heard.addUses(fileUse{"r", "0", 2, testDay.Add(-time.Hour)}, fileUse{"r", "new", 1, testDay})
	all := heard.take()
	if len(all) != maxUses {
		t.Errorf("%d files are remembered", len(all))
	}
	for _, use := range all {
		if use.key == "0" && (use.hits != 3 || use.last != testDay) {
			t.Errorf("uses that were put back: %+v", use)
		}
	}
}

// Files that never expire need no mark: there would be as many as files.
func TestFilesThatNeverExpireHaveNoMark(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ['idx$']`, "check_mutable_updates: true")
	for _, path := range []string{"a", "idx"} {
		tt.origin.file("/"+path, "body")
		tt.get("/api/r/" + path).wantMiss()
	}
	tt.settle()
	wantNoMark(t, tt.cache.marks, testKey("a"))
	m, err := tt.cache.marks.getMark(t.Context(), testKey("idx"))
	must(t, err)
	tt.configure(remoteYAML(tt.origin.url, "cache: {immutable_ttl: 60}")) // now all files expire
	tt.advance(2 * time.Minute)
	tt.get("/api/r/a").wantRefetched()
	tt.settle()
	if again, err := tt.cache.marks.getMark(t.Context(), testKey("a")); err != nil || !again.GoodAt.After(m.GoodAt) {
		t.Errorf("the mark of a file that expires now: %+v, %v", again, err)
	}
}

// The grace period of a container may end before the drain does.
func TestKilledWhileDrainingKeepsSnapshots(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	o.file("/a", "body")
	yaml := "remotes:\n  r:\n    base_url: " + o.url + "\n    mutable_patterns: ['.']\n"
	c := childSetup{yaml: yaml, env: []string{"DRAIN_DELAY=1m"}}.start(t)
	c.tester().get("/api/r/a").wantStatus(200).wantBody("body")
	awaitThat(t, "the file to be stored", func() bool { return c.tester().get("/artifacts/r").has(`"path": "a"`) })
	must(t, c.cmd.Process.Signal(syscall.SIGTERM))
	for _, name := range []string{".freshness", ".index"} {
		awaitThat(t, name+" to be written", func() bool {
			_, err := os.Stat(filepath.Join(c.dir, "data", name))
			return err == nil
		})
	}
	c.kill()
	key := storageKey("r", "a")
	wantFresh := newLocalFreshness(c.dir+"/data", time.Now, slog.New(slog.DiscardHandler))
	if _, err := wantFresh.getMark(t.Context(), key); err != nil {
		t.Errorf("the mark is lost: %v", err)
	}
}
