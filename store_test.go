package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The conformance suites testObjects, testIndex and testFreshness: every implementation of
// an interface of cache.go must pass its suite.

// storeTester is one implementation of objects under test.
type storeTester struct {
	t *testing.T
	objects
	dir      string // for spools
	inMemory bool   // where small spools are, as those of the cache
}

// testRecord makes the record of content as the file spelling of remote "r".
func testRecord(spelling, content string) *record {
	sum := sha256.Sum256([]byte(content))
	return &record{
		Remote: "r", Path: spelling, Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:]),
		Class: immutable, ContentType: "text/x-test; charset=utf-8", ETag: `W/"a\"b"`,
		LastModified: "Mon, 02 Jan 2006 15:04:05 GMT",
		Fetched:      time.Date(2024, 2, 29, 12, 0, 0, 123456789, time.UTC),
	}
}

func testKey(spelling string) string { return storageKey("r", spelling) }

// tempSpool makes a spool with content, as the cache does.
func tempSpool(t testing.TB, dir, content string) *os.File {
	t.Helper()
	f, err := os.CreateTemp(dir, "spool")
	if err == nil {
		_, err = io.WriteString(f, content)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func (s *storeTester) put(spelling, content string) error {
	s.t.Helper()
	var spool io.ReaderAt = tempSpool(s.t, s.dir, content)
	if s.inMemory && len(content) <= maxSmallBody {
		spool = bytes.NewReader([]byte(content))
	}
	return s.objects.put(s.t.Context(), testKey(spelling), testRecord(spelling, content), spool, putCondition{})
}

func (s *storeTester) mustPut(spelling, content string) {
	s.t.Helper()
	if err := s.put(spelling, content); err != nil {
		s.t.Fatalf("put %s: %v", spelling, err)
	}
}

func (s *storeTester) mustOpen(spelling string, off int64) *object {
	s.t.Helper()
	o, err := s.open(s.t.Context(), testKey(spelling), off)
	if err != nil {
		s.t.Fatalf("open %s at %d: %v", spelling, off, err)
	}
	if o.body != nil {
		s.t.Cleanup(func() { o.body.Close() })
	}
	return o
}

// wantHit wants a file to be stored: opened whole, and opened without its body.
func (s *storeTester) wantHit(spelling, content string) {
	s.t.Helper()
	o := s.mustOpen(spelling, 0)
	wantBody(s.t, o.body, content)
	wantRecord(s.t, o.rec, testRecord(spelling, content))
	o = s.mustOpen(spelling, -1)
	if o.body != nil {
		s.t.Errorf("%s: a body where the record alone was asked for", spelling)
	}
	wantRecord(s.t, o.rec, testRecord(spelling, content))
}

func (s *storeTester) wantMiss(spelling string) {
	s.t.Helper()
	for _, off := range []int64{0, -1} {
		o, err := s.open(s.t.Context(), testKey(spelling), off)
		if !errors.Is(err, fs.ErrNotExist) || errors.Is(err, errStoreDown) || o != nil {
			s.t.Fatalf("open %s at %d: %v, %v; want a miss", spelling, off, o, err)
		}
	}
}

func wantBody(t testing.TB, r io.Reader, content string) {
	t.Helper()
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("reading: %v", err)
	}
	if string(got) != content {
		t.Fatalf("body of %d bytes %.40q, want %d bytes %.40q", len(got), got, len(content), content)
	}
}

func wantRecord(t testing.TB, got, want *record) {
	t.Helper()
	g, w := *got, *want
	if !g.Fetched.Equal(w.Fetched) {
		t.Errorf("fetched %v, want %v", g.Fetched, w.Fetched)
	}
	g.Fetched, w.Fetched = time.Time{}, time.Time{}
	if g != w {
		t.Errorf("record\n%+v, want\n%+v", g, w)
	}
}

func testObjects(t *testing.T, newStore func(t *testing.T) objects) {
	for name, f := range map[string]func(*storeTester){
		"a file that was never stored is a miss":      testNever,
		"what was put is opened, again and again":     testRoundTrip,
		"an empty body is a body":                     testEmpty,
		"a big body comes back whole":                 testBig,
		"reading begins at the offset and seeks":      testOffset,
		"a replacement is whole, with its own record": testReplace,
		"an open body outlives replace and delete":    testOutlive,
		"the spool stays the caller's":                testSpoolStays,
		"delete says that nothing was there":          testDeleteTwice,
		"a cancelled request stores nothing":          testCancelled,
		"one of many concurrent puts wins":            testConcurrentPut,
		"walk sees all and stops at an error":         testWalk,
		"records keep odd values":                     testOddRecords,
		"spellings that differ are files that differ": testSpellings,
	} {
		for _, where := range []string{"file", "memory"} {
			t.Run(name+", spool in "+where, func(t *testing.T) {
				t.Parallel()
				f(&storeTester{t: t, objects: newStore(t), dir: t.TempDir(), inMemory: where == "memory"})
			})
		}
	}
}

func testNever(s *storeTester) {
	s.wantMiss("never")
	if err := s.delete(s.t.Context(), testKey("never")); !errors.Is(err, fs.ErrNotExist) {
		s.t.Errorf("delete: %v", err)
	}
	s.mustPut("other", "x")
	s.wantMiss("never")
}

func testRoundTrip(s *storeTester) {
	s.mustPut("dir/file.txt", "hello")
	for range 3 {
		s.wantHit("dir/file.txt", "hello")
	}
}

func testEmpty(s *storeTester) {
	s.mustPut("empty", "")
	s.wantHit("empty", "")
	s.wantHit("empty", "")
}

// bigContent returns n bytes that do not repeat, so that a test sees a part in the wrong
// place.
func bigContent(n int) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return string(b)
}

func testBig(s *storeTester) {
	content := bigContent(9<<20 + 7)
	s.mustPut("big.iso", content)
	s.wantHit("big.iso", content)
	wantBody(s.t, s.mustOpen("big.iso", 8<<20).body, content[8<<20:])
}

func testOffset(s *storeTester) {
	for _, n := range []int{10, 200_000} {
		spelling, content := fmt.Sprint("f", n), bigContent(n)
		s.mustPut(spelling, content)
		for range 2 { // a store may answer the second open from memory
			for _, off := range []int{0, 1, n - 1, n} {
				wantBody(s.t, s.mustOpen(spelling, int64(off)).body, content[off:])
			}
			testSeek(s, spelling, content)
		}
	}
}

// testSeek seeks and reads as http.ServeContent does.
func testSeek(s *storeTester, spelling, content string) {
	s.t.Helper()
	body := s.mustOpen(spelling, 3).body
	if size, err := body.Seek(0, io.SeekEnd); err != nil || size != int64(len(content)) {
		s.t.Fatalf("seek to the end: %d, %v", size, err)
	}
	if _, err := body.Seek(2, io.SeekStart); err != nil {
		s.t.Fatal(err)
	}
	part := make([]byte, 4)
	if _, err := io.ReadFull(body, part); err != nil || string(part) != content[2:6] {
		s.t.Fatalf("read %q, %v; want %q", part, err, content[2:6])
	}
	if at, err := body.Seek(1, io.SeekCurrent); err != nil || at != 7 {
		s.t.Fatalf("seek on: %d, %v", at, err)
	}
	wantBody(s.t, body, content[7:])
}

func testReplace(s *storeTester) {
	for _, content := range []string{"one", "two", "", bigContent(100_000), "three"} {
		s.mustPut("f", content)
		s.wantHit("f", content)
	}
}

func testOutlive(s *storeTester) {
	for _, content := range []string{"small", bigContent(300_000)} {
		s.mustPut("f", content)
		a, b := s.mustOpen("f", 0), s.mustOpen("f", 0)
		s.mustPut("f", "new")
		wantBody(s.t, a.body, content)
		if err := s.delete(s.t.Context(), testKey("f")); err != nil {
			s.t.Fatal(err)
		}
		wantBody(s.t, b.body, content)
		wantRecord(s.t, b.rec, testRecord("f", content))
		s.wantMiss("f")
	}
}

func testSpoolStays(s *storeTester) {
	spool := tempSpool(s.t, s.dir, "content")
	for _, spelling := range []string{"a", "b", "a"} {
		err := s.objects.put(s.t.Context(), testKey(spelling), testRecord(spelling, "content"), spool, putCondition{})
		if err != nil {
			s.t.Fatal(err)
		}
	}
	wantBody(s.t, io.NewSectionReader(spool, 0, 7), "content")
	spool.Close()
	s.wantHit("a", "content")
	s.wantHit("b", "content")
}

func testDeleteTwice(s *storeTester) {
	s.mustPut("f", "x")
	s.wantHit("f", "x")
	if err := s.delete(s.t.Context(), testKey("f")); err != nil {
		s.t.Fatal(err)
	}
	s.wantMiss("f")
	if err := s.delete(s.t.Context(), testKey("f")); !errors.Is(err, fs.ErrNotExist) {
		s.t.Errorf("second delete: %v", err)
	}
	s.mustPut("f", "again")
	s.wantHit("f", "again")
}

func testCancelled(s *storeTester) {
	s.mustPut("f", "old")
	ctx, cancel := context.WithCancel(s.t.Context())
	cancel()
	for _, spelling := range []string{"f", "g"} {
		err := s.objects.put(ctx, testKey(spelling), testRecord(spelling, "new"), tempSpool(s.t, s.dir, "new"), putCondition{})
		if !errors.Is(err, context.Canceled) {
			s.t.Errorf("put %s: %v", spelling, err)
		}
	}
	if _, err := s.open(ctx, testKey("f"), 0); !errors.Is(err, context.Canceled) {
		s.t.Errorf("open: %v", err)
	}
	if err := s.walk(ctx, func(string, *record) error { return nil }); !errors.Is(err, context.Canceled) {
		s.t.Errorf("walk: %v", err)
	}
	s.wantHit("f", "old")
	s.wantMiss("g")
}

func testConcurrentPut(s *storeTester) {
	contents := []string{"", "x", bigContent(70_000), bigContent(1000), strings.Repeat("y", 70_000)}
	var wg sync.WaitGroup
	for _, content := range contents {
		spool := tempSpool(s.t, s.dir, content)
		wg.Go(func() {
			if err := s.objects.put(s.t.Context(), testKey("f"), testRecord("f", content), spool, putCondition{}); err != nil {
				s.t.Errorf("put: %v", err)
			}
		})
		wg.Go(func() {
			o, err := s.open(s.t.Context(), testKey("f"), 0)
			if errors.Is(err, fs.ErrNotExist) {
				return
			}
			if err != nil {
				s.t.Errorf("open: %v", err)
				return
			}
			defer o.body.Close()
			wantWhole(s.t, o)
		})
	}
	wg.Wait()
	o := s.mustOpen("f", 0)
	wantWhole(s.t, o)
	if !slices.ContainsFunc(contents, func(c string) bool { return testRecord("f", c).SHA256 == o.rec.SHA256 }) {
		s.t.Errorf("an object with none of the contents: %+v", o.rec)
	}
}

// wantWhole wants a body to match its record.
func wantWhole(t testing.TB, o *object) {
	t.Helper()
	h := sha256.New()
	n, err := io.Copy(h, o.body)
	if err != nil || n != o.rec.Size || hex.EncodeToString(h.Sum(nil)) != o.rec.SHA256 {
		t.Errorf("body of %d bytes, %v, is not what the record says: %+v", n, err, o.rec)
	}
}

func testWalk(s *storeTester) {
	want := map[string]string{}
	for i := range 20 {
		spelling := fmt.Sprint("dir/f", i)
		s.mustPut(spelling, "old")
		s.mustPut(spelling, spelling)
		want[testKey(spelling)] = spelling
	}
	s.mustPut("gone", "x")
	if err := s.delete(s.t.Context(), testKey("gone")); err != nil {
		s.t.Fatal(err)
	}
	err := s.walk(s.t.Context(), func(key string, rec *record) error {
		if want[key] == "" {
			s.t.Errorf("walk called f for %s twice or without reason", key)
			return nil
		}
		wantRecord(s.t, rec, testRecord(want[key], want[key]))
		delete(want, key)
		return nil
	})
	if err != nil || len(want) > 0 {
		s.t.Errorf("walk: %v, without %v", err, want)
	}
	stop, calls := errors.New("stop"), 0
	err = s.walk(s.t.Context(), func(string, *record) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		s.t.Errorf("walk after an error: %v, %d calls", err, calls)
	}
}

func testOddRecords(s *storeTester) {
	rec := testRecord("odd", "x")
	rec.ContentType, rec.ETag, rec.Link = "", `"`+strings.Repeat("é", 50)+`"`, `</v2/x>; rel="next"`
	rec.Class, rec.Encoding, rec.LastModified = mutable, "gzip", ""
	rec.Digest, rec.Filters = "sha256:"+rec.SHA256, "artifactType"
	rec.Fetched = time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC)
	if err := s.objects.put(s.t.Context(), testKey("odd"), rec, tempSpool(s.t, s.dir, "x"), putCondition{}); err != nil {
		s.t.Fatal(err)
	}
	wantRecord(s.t, s.mustOpen("odd", 0).rec, rec)
}

func testSpellings(s *storeTester) {
	spellings := []string{"a/b", "a%2Fb", "a?b", "a%3Fb", "dir/", "dir", "A/b", ".hidden", "x%20y", "very/" + strings.Repeat("long", 100)}
	for _, spelling := range spellings {
		s.mustPut(spelling, spelling)
	}
	for _, spelling := range spellings {
		s.wantHit(spelling, spelling)
	}
}

func newTestDisk(t testing.TB) *diskStore {
	d := newDiskStore(filepath.Join(t.TempDir(), "data"), time.Now, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { d.Close() })
	return d
}

// A folder on a bad sector takes nothing from the listing of the others.
func TestWalkLeavesOutAFolder(t *testing.T) {
	t.Parallel()
	s := &storeTester{t: t, objects: newTestDisk(t), dir: t.TempDir()}
	for i := range 20 {
		s.mustPut(fmt.Sprint("f", i), "x")
	}
	disk := s.objects.(*diskStore)
	bad := disk.dir + "/r/" + strings.Repeat("0", 16)
	must(t, os.Symlink(bad, bad)) // root cannot read it either
	for _, listsAll := range []bool{false, true} {
		disk.listsAll = listsAll
		n := 0
		err := disk.walk(t.Context(), func(string, *record) error { n++; return nil })
		if listsAll != errors.Is(err, errStoreDown) || (!listsAll && n != 20) {
			t.Errorf("to list all: %v; %d are listed, %v", listsAll, n, err)
		}
	}
}

func TestDiskObjects(t *testing.T) {
	t.Parallel()
	testObjects(t, func(t *testing.T) objects { return newTestDisk(t) })
	t.Run("with few stats", func(t *testing.T) {
		testObjects(t, func(t *testing.T) objects {
			d := newTestDisk(t)
			d.statEvery = time.Hour
			return d
		})
	})
}

// testIndex is the suite for index. newIndex makes an empty index that is loaded.
func testIndex(t *testing.T, newIndex func(t *testing.T) index) {
	for name, f := range map[string]func(*indexTester){
		"an empty index has empty pages":                testIndexEmpty,
		"a row comes back as it was saved":              testIndexRow,
		"a second save replaces and keeps the use":      testIndexReplace,
		"delete removes one row and is silent on none":  testIndexDelete,
		"rows are in byte order of their decoded path":  testIndexOrder,
		"prefix and pattern choose by decoded path":     testIndexChoose,
		"pages neither lose nor repeat variants":        testIndexPaging,
		"a page may begin anywhere":                     testIndexAfter,
		"uses are counted and never go back in time":    testIndexUses,
		"uses without a row are returned":               testIndexUnknownUses,
		"totals follow what is stored":                  testIndexTotals,
		"the oldest come first, page by page":           testIndexOldest,
		"many rows stay in order through many changes":  testIndexMany,
		"writers and readers do not disturb each other": testIndexConcurrent,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(&indexTester{t, newIndex(t)})
		})
	}
}

// indexTester is one implementation of index under test.
type indexTester struct {
	t *testing.T
	index
}

var testDay = time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)

func testRow(remote, spelling string) indexRow {
	rec := testRecord(spelling, "content of "+spelling)
	return indexRow{
		Remote: remote, Path: spelling, Key: storageKey(remote, spelling), SHA256: rec.SHA256,
		ContentType: "text/plain", Class: immutable, Size: rec.Size, Fetched: testDay, LastAccess: testDay,
	}
}

func (x *indexTester) save(rows ...indexRow) {
	x.t.Helper()
	for _, r := range rows {
		if err := x.index.saveRow(x.t.Context(), r); err != nil {
			x.t.Fatalf("save %s: %v", r.Path, err)
		}
	}
}

func (x *indexTester) page(q pageQuery) indexPage {
	x.t.Helper()
	p, err := x.index.listPage(x.t.Context(), q)
	if err != nil || !p.complete {
		x.t.Fatalf("page %+v: %v, complete %v", q, err, p.complete)
	}
	if len(p.rows) > q.limit {
		x.t.Fatalf("page %+v has %d rows", q, len(p.rows))
	}
	return p
}

// paths returns the paths on all pages of q.
func (x *indexTester) paths(q pageQuery) (paths []string) {
	x.t.Helper()
	for range 10_000 {
		p := x.page(q)
		for _, r := range p.rows {
			paths = append(paths, r.Path)
		}
		if p.next == "" {
			return paths
		}
		if len(p.rows) == 0 {
			x.t.Fatalf("empty page %+v with a next one", q)
		}
		q.after = p.next
	}
	x.t.Fatal("pages without an end")
	return nil
}

func (x *indexTester) wantPaths(q pageQuery, want ...string) {
	x.t.Helper()
	if got := x.paths(q); !slices.Equal(got, want) {
		x.t.Errorf("page %+v:\n%q, want\n%q", q, got, want)
	}
}

func (x *indexTester) wantRow(want indexRow) {
	x.t.Helper()
	rows := x.page(pageQuery{remote: want.Remote, prefix: decodePath(want.Path), limit: 1}).rows
	if len(rows) != 1 {
		x.t.Fatalf("no row for %s", want.Path)
	}
	// A database may round times to the microsecond.
	got := rows[0]
	for _, p := range [][2]*time.Time{{&got.Fetched, &want.Fetched}, {&got.LastAccess, &want.LastAccess}} {
		if d := p[0].Sub(*p[1]).Abs(); d > time.Microsecond {
			x.t.Errorf("%s: time %v, want %v", want.Path, p[0], p[1])
		}
		*p[0], *p[1] = time.Time{}, time.Time{}
	}
	if got != want {
		x.t.Errorf("row\n%+v, want\n%+v", got, want)
	}
}

func testIndexEmpty(x *indexTester) {
	x.wantPaths(pageQuery{remote: "r", limit: 10})
	x.wantPaths(pageQuery{limit: 10, oldest: true})
	x.wantPaths(pageQuery{remote: "r", prefix: "a", after: "b", limit: 1})
	if got, err := x.totals(x.t.Context(), false); err != nil || len(got) != 0 {
		x.t.Errorf("totals %v, %v", got, err)
	}
}

func testIndexRow(x *indexTester) {
	a := testRow("r", "dir/a%20b%2Bc")
	a.ContentType, a.Class, a.Hits = "", mutable, 7
	a.LastAccess = testDay.Add(3 * time.Second)
	b := testRow("r", "empty")
	b.Size, b.Class = 0, local
	x.save(a, b)
	x.wantRow(a)
	x.wantRow(b)
}

func testIndexReplace(x *indexTester) {
	old := testRow("r", "f")
	old.Hits, old.LastAccess = 5, testDay.Add(time.Hour)
	x.save(old)
	r := testRow("r", "f")
	r.Size, r.ContentType, r.SHA256 = 99, "application/json", testRecord("f", "other").SHA256
	r.Fetched, r.LastAccess = testDay.Add(time.Minute), testDay.Add(time.Minute)
	x.save(r)
	r.Hits, r.LastAccess = 5, old.LastAccess
	x.wantRow(r)
	x.wantPaths(pageQuery{remote: "r", limit: 10}, "f")
}

func testIndexDelete(x *indexTester) {
	x.save(testRow("r", "a"), testRow("r", "b"), testRow("s", "a"))
	for range 2 {
		if err := x.delete(x.t.Context(), "r", storageKey("r", "a")); err != nil {
			x.t.Fatal(err)
		}
	}
	if err := x.delete(x.t.Context(), "nobody", storageKey("nobody", "a")); err != nil {
		x.t.Fatal(err)
	}
	x.wantPaths(pageQuery{remote: "r", limit: 10}, "b")
	x.wantPaths(pageQuery{remote: "s", limit: 10}, "a")
}

func testIndexOrder(x *indexTester) {
	// Their decoded paths: ".a" "A" "B/c" "a" "a b" "a+b" "a-b" "a/b" "ab" "é"
	want := []string{".a", "A", "B/c", "a", "a%20b", "a%2Bb", "a-b", "a/b", "ab", "%C3%A9"}
	for _, i := range rand.Perm(len(want)) {
		x.save(testRow("r", want[i]))
	}
	x.save(testRow("q", "0"), testRow("s", "z"))
	for _, limit := range []int{1, 3, len(want) - 1, len(want), 100} {
		x.wantPaths(pageQuery{remote: "r", limit: limit}, want...)
	}
}

func testIndexChoose(x *indexTester) {
	for _, p := range []string{"a", "dir/x.tar.gz", "dir/y%20z.rpm", "dir/z.rpm?v=1", "dir2/x.rpm", "dir%5F/x", "e%25"} {
		x.save(testRow("r", p))
	}
	x.wantPaths(pageQuery{remote: "r", prefix: "dir/", limit: 2}, "dir/x.tar.gz", "dir/y%20z.rpm", "dir/z.rpm?v=1")
	x.wantPaths(pageQuery{remote: "r", prefix: "dir/y z", limit: 2}, "dir/y%20z.rpm")
	x.wantPaths(pageQuery{remote: "r", prefix: "dir_", limit: 2}, "dir%5F/x") // _ and % are not wildcards
	x.wantPaths(pageQuery{remote: "r", prefix: "e%", limit: 2}, "e%25")
	rpm := regexp.MustCompile(`\.rpm$`)
	x.wantPaths(pageQuery{remote: "r", pattern: rpm, limit: 1}, "dir/y%20z.rpm", "dir/z.rpm?v=1", "dir2/x.rpm")
	x.wantPaths(pageQuery{remote: "r", pattern: rpm, prefix: "dir2", limit: 1}, "dir2/x.rpm")
	x.wantPaths(pageQuery{remote: "r", pattern: regexp.MustCompile("nothing"), limit: 1})
}

// variants returns n spellings with the same decoded path, in the order of their keys.
func variants(n int) (spellings []string) {
	for i := range n - 1 {
		spellings = append(spellings, fmt.Sprint("d/v?n=", i))
	}
	spellings = append(spellings, "d%2Fv")
	slices.SortFunc(spellings, func(a, b string) int { return strings.Compare(testKey(a), testKey(b)) })
	return spellings
}

func testIndexPaging(x *indexTester) {
	want := slices.Concat([]string{"a", "b?x=1"}, variants(20), []string{"z"})
	for _, i := range rand.Perm(len(want)) {
		x.save(testRow("r", want[i]))
	}
	for limit := range 24 {
		x.wantPaths(pageQuery{remote: "r", limit: limit + 1}, want...)
	}
	x.wantPaths(pageQuery{remote: "r", limit: 3, pattern: regexp.MustCompile("v$")}, variants(20)...)
	if next := x.page(pageQuery{remote: "r", limit: 2}).next; next != "b" {
		x.t.Errorf("next %q, want the path alone", next)
	}
	if next := x.page(pageQuery{remote: "r", limit: 3}).next; next != "d/v\n"+testKey(variants(20)[0]) {
		x.t.Errorf("next %q, want path and key", next)
	}
}

func testIndexAfter(x *indexTester) {
	spellings := variants(3)
	x.save(testRow("r", "a"), testRow("r", "e"))
	for _, p := range spellings {
		x.save(testRow("r", p))
	}
	for after, want := range map[string][]string{
		"0":                             {"a", spellings[0], spellings[1], spellings[2], "e"},
		"b":                             {spellings[0], spellings[1], spellings[2], "e"},
		"d/v":                           {"e"},
		"e":                             nil,
		"d/v\n" + testKey(spellings[1]): {spellings[2], "e"},
		"d/v\n" + testKey(spellings[2]): {"e"},
	} {
		x.wantPaths(pageQuery{remote: "r", after: after, limit: 2}, want...)
	}
	x.wantPaths(pageQuery{remote: "r", prefix: "d", after: "a", limit: 9}, spellings...)
	x.wantPaths(pageQuery{remote: "r", prefix: "d", after: "z", limit: 9})
}

// count counts uses of rows that are there.
func (x *indexTester) count(batch ...fileUse) {
	x.t.Helper()
	if unknown, err := x.countUses(x.t.Context(), batch); err != nil || len(unknown) > 0 {
		x.t.Fatalf("counting uses: unknown %v, %v", unknown, err)
	}
}

func testIndexUses(x *indexTester) {
	r := testRow("r", "f")
	x.save(r)
	late := testDay.Add(time.Hour)
	x.count(fileUse{"r", r.Key, 2, late})
	x.count(fileUse{"r", r.Key, 3, testDay.Add(-time.Hour)})
	x.count()
	r.Hits, r.LastAccess = 5, late
	x.wantRow(r)
	x.wantPaths(pageQuery{limit: 10, oldest: true, used: true}, "f")
}

func testIndexUnknownUses(x *indexTester) {
	known, lost := testRow("r", "known"), testRow("r", "lost")
	x.save(known, lost)
	x.delete(x.t.Context(), "r", lost.Key)
	use := func(remote, spelling string) fileUse {
		return fileUse{remote, storageKey(remote, spelling), 2, testDay.Add(time.Hour)}
	}
	unknown, err := x.countUses(x.t.Context(), []fileUse{use("r", "lost"), use("r", "known"), use("r", "never"), use("nobody", "f")})
	slices.SortFunc(unknown, func(a, b fileUse) int { return strings.Compare(a.key, b.key) })
	want := []fileUse{use("nobody", "f"), use("r", "lost"), use("r", "never")}
	slices.SortFunc(want, func(a, b fileUse) int { return strings.Compare(a.key, b.key) })
	if err != nil || !slices.Equal(unknown, want) {
		x.t.Errorf("unknown uses %v, %v; want %v", unknown, err, want)
	}
	// The row of one of them is made, and its uses are counted again.
	x.save(lost)
	x.count(use("r", "lost"))
	for _, r := range []indexRow{known, lost} {
		r.Hits, r.LastAccess = 2, testDay.Add(time.Hour)
		x.wantRow(r)
	}
}

func testIndexTotals(x *indexTester) {
	want := func(want map[string]remoteTotal) {
		x.t.Helper()
		if got, err := x.totals(x.t.Context(), false); err != nil || !maps.Equal(got, want) {
			x.t.Errorf("totals %v, %v; want %v", got, err, want)
		}
	}
	a, b, c := testRow("r", "a"), testRow("r", "b?q"), testRow("s", "c")
	a.Size, b.Size, c.Size = 100, 20, 0
	x.save(a, b, c)
	want(map[string]remoteTotal{"r": {2, 120}, "s": {1, 0}})
	a.Size = 7
	x.save(a)
	want(map[string]remoteTotal{"r": {2, 27}, "s": {1, 0}})
	x.delete(x.t.Context(), "r", a.Key)
	x.delete(x.t.Context(), "s", c.Key)
	want(map[string]remoteTotal{"r": {1, 20}})
}

func testIndexOldest(x *indexTester) {
	var all, even []string
	for i := range 30 {
		r := testRow([]string{"r", "s"}[i%2], fmt.Sprint("f", (i*7)%30))
		r.LastAccess = testDay.Add(time.Duration(i) * time.Second)
		x.save(r)
		all = append(all, r.Path)
		if i%2 == 0 {
			even = append(even, r.Path)
		}
	}
	for _, limit := range []int{1, 7, 30, 31} {
		x.wantPaths(pageQuery{oldest: true, limit: limit}, all...)
		x.wantPaths(pageQuery{oldest: true, remote: "r", limit: limit}, even...)
	}
	x.countUses(x.t.Context(), []fileUse{{"r", storageKey("r", all[0]), 1, testDay.Add(time.Hour)}})
	upload := testRow("l", "upload")
	upload.Class, upload.Hits = local, 3
	x.save(upload) // never goes
	x.wantPaths(pageQuery{oldest: true, limit: 50}, all[1:]...)
	x.wantPaths(pageQuery{oldest: true, used: true, limit: 50}, append(all[1:], all[0])...)
	x.wantPaths(pageQuery{oldest: true, used: true, limit: 7}, append(all[1:], all[0])...)
	x.wantPaths(pageQuery{oldest: true, used: true, remote: "r", limit: 50}, append(even[1:], even[0])...)
	totals, err := x.totals(x.t.Context(), true)
	if r, s := totals["r"], totals["s"]; err != nil || r.Files != 14 || s.Files != 15 || r.Bytes == 0 || totals["l"].Files != 0 {
		x.t.Errorf("unused %v, %v", totals, err)
	}
	for _, name := range []string{"t", "u"} { // both have the same time
		for _, p := range variants(5) {
			x.save(testRow(name, p))
		}
	}
	if got := x.paths(pageQuery{oldest: true, limit: 3}); len(got) != 39 {
		x.t.Errorf("%d rows, want 39", len(got))
	}
}

func testIndexMany(x *indexTester) {
	want := map[string]bool{}
	for i := range 3000 {
		spelling := fmt.Sprintf("dir%d/f%04d", i%3, rand.IntN(2000))
		if i%4 == 0 {
			x.delete(x.t.Context(), "r", testKey(spelling))
			delete(want, spelling)
		} else {
			x.save(testRow("r", spelling))
			want[spelling] = true
		}
	}
	x.wantPaths(pageQuery{remote: "r", limit: 701}, slices.Sorted(maps.Keys(want))...)
	for spelling := range want {
		x.delete(x.t.Context(), "r", testKey(spelling))
	}
	x.wantPaths(pageQuery{remote: "r", limit: 701})
}

func testIndexConcurrent(x *indexTester) {
	var wg sync.WaitGroup
	ctx := x.t.Context()
	for w := range 4 {
		wg.Go(func() {
			for i := range 50 {
				r := testRow("r", fmt.Sprintf("f%d-%d", w, i))
				if err := x.index.saveRow(ctx, r); err != nil {
					x.t.Errorf("save: %v", err)
				}
				x.countUses(ctx, []fileUse{{"r", r.Key, 1, testDay}})
				if i%2 == 0 {
					x.delete(ctx, "r", r.Key)
				}
			}
		})
		wg.Go(func() {
			for range 20 {
				p, err := x.index.listPage(ctx, pageQuery{remote: "r", limit: 50, oldest: w%2 == 0})
				if err != nil || w%2 == 1 && !slices.IsSortedFunc(p.rows, func(a, b indexRow) int { return strings.Compare(a.Path, b.Path) }) {
					x.t.Errorf("page: %v", err)
				}
			}
		})
	}
	wg.Wait()
	if got := x.paths(pageQuery{remote: "r", limit: 1000}); len(got) != 100 {
		x.t.Errorf("%d rows, want 100", len(got))
	}
}

// testFreshness is the suite for freshness.
func testFreshness(t *testing.T, newFreshness func(t *testing.T) freshness) {
	t.Run("an unknown key is not there", func(t *testing.T) {
		t.Parallel()
		f := newFreshness(t)
		wantNoMark(t, f, "k")
		if err := f.delete(t.Context(), "k"); err != nil {
			t.Errorf("delete: %v", err)
		}
	})
	t.Run("a mark comes back, the last one wins, delete ends it", func(t *testing.T) {
		t.Parallel()
		f := newFreshness(t)
		for i, key := range []string{"r/0/a", "r/0/a", "r/0/b"} {
			m := freshnessMark{testDay.Add(time.Duration(i)*time.Hour + 123456*time.Microsecond), testRecord("f", key).SHA256}
			if err := f.setMark(t.Context(), key, m); err != nil {
				t.Fatal(err)
			}
			wantMark(t, f, key, m)
		}
		if err := f.delete(t.Context(), "r/0/a"); err != nil {
			t.Fatal(err)
		}
		wantNoMark(t, f, "r/0/a")
		if _, err := f.getMark(t.Context(), "r/0/b"); err != nil {
			t.Errorf("another key: %v", err)
		}
	})
	t.Run("concurrent use", func(t *testing.T) {
		t.Parallel()
		f := newFreshness(t)
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for range 50 {
					key := fmt.Sprint("r/0/", i%3)
					f.setMark(t.Context(), key, freshnessMark{testDay, "s"})
					f.getMark(t.Context(), key)
					f.delete(t.Context(), key)
				}
			})
		}
		wg.Wait()
		wantNoMark(t, f, "r/0/0")
	})
}

func wantMark(t testing.TB, f freshness, key string, want freshnessMark) {
	t.Helper()
	got, err := f.getMark(t.Context(), key)
	if err != nil || !got.GoodAt.Equal(want.GoodAt) || got.SHA256 != want.SHA256 {
		t.Errorf("mark of %s: %v, %v; want %v", key, got, err, want)
	}
}

func wantNoMark(t testing.TB, f freshness, key string) {
	t.Helper()
	if m, err := f.getMark(t.Context(), key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("mark of %s: %v, %v; want none", key, m, err)
	}
}

func newTestIndex(t testing.TB, dir string, from objects) *embeddedIndex {
	t.Helper()
	x := newEmbeddedIndex(dir, slog.New(slog.DiscardHandler))
	if err := x.reconcile(t.Context(), from); err != nil {
		t.Fatal(err)
	}
	return x
}

func TestEmbeddedIndex(t *testing.T) {
	t.Parallel()
	testIndex(t, func(t *testing.T) index { return newTestIndex(t, t.TempDir(), newTestDisk(t)) })
}

func TestLocalFreshness(t *testing.T) {
	t.Parallel()
	testFreshness(t, func(t *testing.T) freshness {
		return newLocalFreshness(t.TempDir(), time.Now, slog.New(slog.DiscardHandler))
	})
}
