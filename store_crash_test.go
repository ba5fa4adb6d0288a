package main

// Tests of what damage, failures and crashes leave in the disk store.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// diskTester is a disk store and its files under test.
type diskTester struct {
	*storeTester
	d   *diskStore
	log *bytes.Buffer
}

func newDiskTester(t *testing.T) *diskTester {
	d := newTestDisk(t)
	log := new(bytes.Buffer)
	d.log = slog.New(slog.NewTextHandler(log, nil))
	return &diskTester{&storeTester{t: t, objects: d, dir: t.TempDir()}, d, log}
}

// reopen replaces the store by one after a restart.
func (s *diskTester) reopen() {
	fresh := newDiskStore(s.d.dir, s.d.now, s.d.log)
	s.d, s.objects = fresh, fresh
}

func (s *diskTester) file(spelling, name string) string {
	return s.d.folderOf(testKey(spelling)) + "/" + name
}
func (s *diskTester) body(spelling string) string { return s.d.pathOf(testKey(spelling)) }

// wantFiles wants exactly these names in the directory of a stored file.
func (s *diskTester) wantFiles(spelling string, want ...string) {
	s.t.Helper()
	var got []string
	entries, _ := os.ReadDir(s.d.folderOf(testKey(spelling)))
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		s.t.Errorf("files of %s: %q, want %q", spelling, got, want)
	}
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	must(t, err)
	return data
}

// tamper rewrites a file in place.
func tamper(t testing.TB, name string, f func([]byte) []byte) {
	t.Helper()
	data := f(slices.Clone(readFile(t, name)))
	must(t, os.WriteFile(name, data, 0o600))
}

// restore replaces name by another file with the same bytes, as a backup does.
func restore(t testing.TB, name string) {
	t.Helper()
	data := readFile(t, name)
	must(t, os.WriteFile(name+"~", data, 0o600), os.Rename(name+"~", name),
		os.Chtimes(name, testDay, testDay))
}

// seal makes the content of a record file of JSON, with a correct checksum.
func seal(body []byte) []byte {
	return fmt.Appendf(nil, "%s%08x\n%s\n", recordMagic, crc32.Checksum(body, castagnoli), body)
}

// editRecord changes one member of a record and keeps its checksum correct.
func editRecord(t testing.TB, name, member string, value any) {
	t.Helper()
	tamper(t, name, func(data []byte) []byte {
		_, body, _ := bytes.Cut(data, []byte("\n"))
		var m map[string]any
		must(t, json.Unmarshal(body, &m))
		m[member] = value
		body, err := json.Marshal(m)
		must(t, err)
		return seal(body)
	})
}

func TestDiskDamage(t *testing.T) {
	t.Parallel()
	const rec, next = recordFile, recordNext
	type damage struct {
		hit  bool
		keep bool // it is a miss, but the files stay
		do   func(s *diskTester)
	}
	onRecord := func(f func([]byte) []byte) func(s *diskTester) {
		return func(s *diskTester) { tamper(s.t, s.file("f", rec), f) }
	}
	for name, c := range map[string]damage{
		"body truncated": {do: func(s *diskTester) { must(s.t, os.Truncate(s.body("f"), 3)) }},
		"body emptied":   {do: func(s *diskTester) { must(s.t, os.Truncate(s.body("f"), 0)) }},
		"body extended": {do: func(s *diskTester) {
			tamper(s.t, s.body("f"), func(b []byte) []byte { return append(b, 'x') })
		}},
		"body changed in place": {do: func(s *diskTester) {
			tamper(s.t, s.body("f"), func(b []byte) []byte { b[2] ^= 1; return b })
			must(s.t, os.Chtimes(s.body("f"), testDay, testDay))
		}},
		"body swapped": {do: func(s *diskTester) {
			s.mustPut("other", strings.Repeat("z", len(readFile(s.t, s.body("f")))))
			must(s.t, os.Rename(s.body("other"), s.body("f")))
		}},
		"body restored":             {hit: true, do: func(s *diskTester) { restore(s.t, s.body("f")) }},
		"body touched":              {hit: true, do: func(s *diskTester) { must(s.t, os.Chtimes(s.body("f"), testDay, testDay)) }},
		"body and record restored":  {hit: true, do: func(s *diskTester) { restore(s.t, s.body("f")); restore(s.t, s.file("f", rec)) }},
		"body gone":                 {keep: true, do: func(s *diskTester) { must(s.t, os.Remove(s.body("f"))) }},
		"body is a directory":       {keep: true, do: func(s *diskTester) { must(s.t, os.Remove(s.body("f")), os.Mkdir(s.body("f"), 0o755)) }},
		"record gone":               {do: func(s *diskTester) { must(s.t, os.Remove(s.file("f", rec))) }},
		"record empty":              {do: onRecord(func([]byte) []byte { return nil })},
		"record short":              {do: onRecord(func(b []byte) []byte { return b[:len(b)-9] })},
		"record without its end":    {do: onRecord(func(b []byte) []byte { return b[:len(b)-1] })},
		"record long":               {do: onRecord(func(b []byte) []byte { return append(b, '\n') })},
		"record huge":               {do: onRecord(func(b []byte) []byte { return append(b, make([]byte, 1<<20)...) })},
		"record of zeros":           {do: onRecord(func(b []byte) []byte { clear(b); return b })},
		"record with a flipped bit": {do: onRecord(func(b []byte) []byte { b[len(b)-20] ^= 4; return b })},
		"record without JSON":       {do: onRecord(func([]byte) []byte { return seal([]byte("nothing")) })},
		"record of another version": {do: onRecord(func(b []byte) []byte {
			return bytes.Replace(b, []byte("record 1"), []byte("record 2"), 1)
		})},
		"record of another path":   {keep: true, do: func(s *diskTester) { editRecord(s.t, s.file("f", rec), "p", "g") }},
		"record of another remote": {keep: true, do: func(s *diskTester) { editRecord(s.t, s.file("f", rec), "r", "q") }},
		"record with no sha256":    {do: func(s *diskTester) { editRecord(s.t, s.file("f", rec), "s", "") }},
		"record with another size": {do: func(s *diskTester) { editRecord(s.t, s.file("f", rec), "n", 5) }},
		"records swapped": {keep: true, do: func(s *diskTester) {
			s.mustPut("other", "x")
			must(s.t, os.Rename(s.file("other", rec), s.file("f", rec)))
		}},
		"a damaged next record beside": {hit: true, do: func(s *diskTester) {
			must(s.t, os.WriteFile(s.file("f", next), []byte("artifactapi"), 0o600))
		}},
		"the record is the next one": {hit: true, do: func(s *diskTester) {
			must(s.t, os.Rename(s.file("f", rec), s.file("f", next)))
		}},
		"the record is the next one and the body restored": {hit: true, do: func(s *diskTester) {
			must(s.t, os.Rename(s.file("f", rec), s.file("f", next)))
			restore(s.t, s.body("f"))
		}},
		"a damaged record and a sound next one": {hit: true, do: func(s *diskTester) {
			must(s.t, os.Rename(s.file("f", rec), s.file("f", next)))
			must(s.t, os.WriteFile(s.file("f", rec), nil, 0o600))
		}},
	} {
		for _, content := range []string{"hello, small content", bigContent(maxSmallBody + 1000)} {
			for _, warm := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s, %d bytes, warm %v", name, len(content), warm), func(t *testing.T) {
					t.Parallel()
					s := newDiskTester(t)
					s.mustPut("f", content)
					s.wantHit("f", content)
					c.do(s)
					if !warm {
						s.reopen()
					}
					if c.hit {
						s.wantHit("f", content)
						s.wantHit("f", content)
						s.reopen()
						s.wantHit("f", content)
						s.mustPut("f", "new")
					} else if warm && strings.HasPrefix(name, "record") {
						s.wantHit("f", content) // the memory has the undamaged record
					} else if s.wantMiss("f"); !c.keep {
						s.wantFiles("f")
						if !strings.Contains(s.log.String(), "dropped") {
							t.Errorf("no reason was logged: %s", s.log)
						}
					}
					if fi, err := os.Stat(s.body("f")); err == nil && fi.IsDir() {
						return // a rename cannot replace a directory; verify reports it
					}
					s.mustPut("f", "new")
					s.wantHit("f", "new")
					s.wantFiles("f", "f", rec)
				})
			}
		}
	}
}

func TestDiskRepairHashesOnce(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	s.mustPut("f", bigContent(1<<20))
	restore(t, s.body("f"))
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			o, err := s.open(t.Context(), testKey("f"), 0)
			if err != nil {
				t.Errorf("open: %v", err)
				return
			}
			wantWhole(t, o)
			o.body.Close()
		})
	}
	wg.Wait()
	if n := strings.Count(s.log.String(), "was repaired"); n != 1 {
		t.Errorf("repaired %d times: %s", n, s.log)
	}
}

// put fails if any one of its fsyncs fails. Then the old copy is stored or, if it is in
// place already, the new one.
func TestDiskSyncFailure(t *testing.T) {
	t.Parallel()
	for _, old := range []string{"", "old"} {
		for failing := 0; ; failing++ {
			s := newDiskTester(t)
			if old != "" {
				s.mustPut("f", old)
			}
			calls, moved := 0, false
			s.d.fsync = func(f *os.File) error {
				if calls++; calls-1 == failing {
					return &fs.PathError{Op: "sync", Path: f.Name(), Err: syscall.EIO}
				}
				return nil
			}
			s.d.stepDone = func(step string) { moved = moved || step == "body moved" }
			err := s.put("f", "new")
			s.d.fsync, s.d.stepDone = (*os.File).Sync, func(string) {}
			if failing == calls {
				must(t, err)
				break
			}
			if !errors.Is(err, errStoreDown) || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("fsync %d: %v, want errStoreDown", failing, err)
			}
			switch {
			case moved:
				s.wantHit("f", "new")
			case old != "":
				s.wantHit("f", old)
				s.wantFiles("f", "f", recordFile)
			default:
				s.wantMiss("f")
				s.wantFiles("f")
			}
			s.mustPut("f", "again")
			s.wantHit("f", "again")
			s.wantFiles("f", "f", recordFile)
		}
	}
}

func TestStoreErrorKinds(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ err, kind error }{
		{syscall.ENOSPC, errNoSpace}, {syscall.EDQUOT, errNoSpace}, {syscall.EFBIG, errNoSpace},
		{syscall.EIO, errStoreDown}, {syscall.EACCES, errStoreDown}, {syscall.EROFS, errStoreDown},
		{fs.ErrNotExist, errStoreDown}, {context.Canceled, context.Canceled}, {errNoSpace, errNoSpace},
	} {
		err := storeError("doing", fmt.Errorf("wrapped: %w", c.err))
		if !errors.Is(err, c.kind) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v became %v, want %v", c.err, err, c.kind)
		}
	}
	if err := storeError("doing", nil); err != nil {
		t.Errorf("nil became %v", err)
	}
}

func TestDiskUnusable(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	ctx := t.Context()
	blocker := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(blocker, nil, 0o600))
	s.d.dir = blocker + "/data" // a file in its path makes it unwritable, even for root
	if _, err := s.open(ctx, testKey("f"), 0); !errors.Is(err, errStoreDown) {
		t.Errorf("open: %v", err)
	}
	_, spoolErr := s.d.newSpool()
	_, lockErr := s.d.lockData()
	for name, err := range map[string]error{"put": s.put("f", "x"), "spool": spoolErr, "lock": lockErr, "ping": s.d.ping(ctx),
		"walk": s.walk(ctx, nil), "delete": s.delete(ctx, testKey("f"))} {
		if !errors.Is(err, errStoreDown) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, want errStoreDown", name, err)
		}
	}
	must(t, os.Remove(blocker))
	must(t, s.d.ping(ctx))
	must(t, os.Symlink(blocker+"/none", s.d.pathOf("r"))) // to a disk that is not mounted
	if err := s.put("f", "x"); !errors.Is(err, errStoreDown) {
		t.Errorf("put below a link that leads nowhere: %v", err)
	}
	must(t, os.Remove(s.d.pathOf("r")))
	s.mustPut("f", "x")
	s.wantHit("f", "x")

	// What a disk that is not mounted lacks is not missing; of one that cannot be written to it is.
	must(t, os.Rename(s.d.dir, s.d.dir+".away"))
	must(t, os.Symlink(blocker+"/none", s.d.dir))
	if err := s.d.ping(ctx); !errors.Is(err, errStoreDown) {
		t.Fatalf("ping: %v", err)
	}
	_, err := s.open(ctx, testKey("g"), 0)
	for doing, err := range map[string]error{"open": err, "delete": s.delete(ctx, testKey("g"))} {
		if !errors.Is(err, errStoreDown) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s without the disk: %v, want errStoreDown", doing, err)
		}
	}
	must(t, os.Remove(s.d.dir))
	must(t, os.Rename(s.d.dir+".away", s.d.dir))
	s.wantMiss("g")
	must(t, s.d.ping(ctx))
	s.wantMiss("g")
	s.wantHit("f", "x")
}

func TestDiskCopiesWhatItCannotRename(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	for i, content := range []string{"old", bigContent(200_000), ""} {
		spool := tempSpool(t, s.dir, content)
		must(t, os.Remove(spool.Name()))
		if i == 1 { // the name is another file's by now
			must(t, os.WriteFile(spool.Name(), []byte("wrong"), 0o600))
		}
		must(t, s.objects.put(t.Context(), testKey("f"), testRecord("f", content), spool, putCondition{}))
		s.wantHit("f", content)
		s.wantFiles("f", "f", recordFile)
	}
	other, err := os.MkdirTemp("/dev/shm", "artifactapi")
	if err != nil {
		t.Skip("no second file system")
	}
	t.Cleanup(func() { os.RemoveAll(other) })
	s.dir = other
	s.mustPut("f", "from elsewhere")
	s.wantHit("f", "from elsewhere")
	s.wantFiles("f", "f", recordFile)
}

// Two stores on one directory treat each other as two processes do.
func TestDiskTwoProcesses(t *testing.T) {
	t.Parallel()
	a := newDiskTester(t)
	b := &storeTester{t: t, objects: newDiskStore(a.d.dir, time.Now, a.d.log), dir: a.dir}
	var wg sync.WaitGroup
	for _, s := range []*storeTester{a.storeTester, b} {
		for i := range 2 {
			wg.Go(func() {
				for range 20 {
					if err := s.put("f", strings.Repeat("x", 1+i)); err != nil {
						t.Errorf("put: %v", err)
					}
					if err := s.delete(t.Context(), testKey("f")); err != nil && !errors.Is(err, fs.ErrNotExist) {
						t.Errorf("delete: %v", err)
					}
				}
			})
		}
	}
	wg.Wait()
	a.mustPut("f", "one")
	b.wantHit("f", "one")
	b.mustPut("f", "two")
	a.wantHit("f", "two")
	a.wantFiles("f", "f", recordFile)
	must(t, b.delete(t.Context(), testKey("f")))
	a.wantMiss("f")
}

func TestDiskOwner(t *testing.T) {
	t.Parallel()
	a, b := newTestDisk(t), newTestDisk(t)
	b.dir = a.dir
	for _, c := range []struct {
		d    *diskStore
		held bool
	}{{a, true}, {b, false}} {
		if held, err := c.d.lockData(); held != c.held || err != nil {
			t.Errorf("locked %v, %v; want %v", held, err, c.held)
		}
	}
	must(t, a.Close())
	if held, err := b.lockData(); !held || err != nil {
		t.Errorf("after Close: locked %v, %v", held, err)
	}
}

func TestDiskSpace(t *testing.T) {
	t.Parallel()
	d := newTestDisk(t)
	u, err := d.freeSpace()
	if err != nil || u.free.bytes <= 0 || u.free.bytes > u.size.bytes || u.free.inodes < 0 || u.free.inodes > u.size.inodes {
		t.Errorf("%+v, %v", u, err)
	}
	for size, want := range map[int64]int64{0: 0, 1 << 30: 1 << 30 / 20, 20 << 30: 1 << 30, 1 << 40: 1 << 30} {
		if got := defaultMinFree(size); got != want {
			t.Errorf("MIN_FREE of a disk of %d bytes is %d, want %d", size, got, want)
		}
	}
}

func TestMemoryCacheIsBounded(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	s.d.memory = newLRU[*memoryEntry](16*(memoryEntryCost+2), 0)
	for i := range 100 {
		s.mustPut(fmt.Sprint(i), fmt.Sprint(i))
		s.wantHit(fmt.Sprint(i), fmt.Sprint(i))
	}
	s.mustPut("larger", bigContent(20_000)) // larger than the budget
	s.wantHit("larger", bigContent(20_000))
	for i := range 100 {
		s.wantHit(fmt.Sprint(i), fmt.Sprint(i))
		m := s.d.memory
		if m.cost > m.budget || m.order.Len() != len(m.byKey) || m.order.Len() == 0 || m.order.Len() > 16 {
			t.Errorf("cost %d of %d, %d entries of %d", m.cost, m.budget, m.order.Len(), len(m.byKey))
		}
	}
}

func TestDiskSweep(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	inUse, err := s.d.newSpool()
	must(t, err)
	defer inUse.Close()
	spools := s.d.dir + "/" + spoolDir
	must(t, os.WriteFile(spools+"/crashed", nil, 0o600), s.d.sweep(t.Context()))
	if _, err := os.Stat(spools + "/crashed"); err != nil {
		t.Errorf("a young spool was swept: its owner may be about to lock it: %v", err)
	}
	must(t, s.d.sweepSpools(true))
	if _, err := os.Stat(spools + "/crashed"); err == nil {
		t.Error("a crashed spool was left")
	}
	if _, err := os.Stat(inUse.Name()); err != nil {
		t.Errorf("a spool in use was swept: %v", err)
	}
}

func TestDiskSweepOrphans(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	spellings := []string{"good", "no-record", "no-body", "next-beside", "next-alone", "empty", "temps", "restored"}
	for _, spelling := range spellings {
		s.mustPut(spelling, "content")
	}
	foreign := s.d.dir + "/lost+found/deep/file"
	must(t,
		os.Remove(s.file("no-record", recordFile)),
		os.Remove(s.body("no-body")),
		os.WriteFile(s.file("next-beside", recordNext), []byte("cut"), 0o600),
		os.Rename(s.file("next-alone", recordFile), s.file("next-alone", recordNext)),
		os.Remove(s.body("empty")), os.Remove(s.file("empty", recordFile)),
		os.WriteFile(s.file("temps", bodyNext), nil, 0o600),
		os.WriteFile(s.file("temps", recordFile+tempSuffix), nil, 0o600),
		os.MkdirAll(filepath.Dir(foreign), 0o755), os.WriteFile(foreign, nil, 0o600),
	)
	restore(t, s.body("restored"))
	must(t, s.d.sweep(t.Context()))
	s.wantFiles("no-record", "no-record") // a restore that still runs may bring the record

	s.d.now = func() time.Time { return time.Now().Add(25 * time.Hour) }
	must(t, s.d.sweep(t.Context()))
	for _, spelling := range []string{"good", "next-beside", "next-alone", "temps", "restored"} {
		s.wantFiles(spelling, spelling, recordFile)
		s.wantHit(spelling, "content")
	}
	for _, spelling := range []string{"no-record", "no-body", "empty"} {
		if _, err := os.Stat(s.d.folderOf(testKey(spelling))); err == nil {
			t.Errorf("%s: the directory was left", spelling)
		}
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Errorf("a file that is not ours was touched: %v", err)
	}
}

func TestDiskVerify(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	for _, spelling := range []string{"good", "rotten", "restored", "cut", "no-record", "no-body"} {
		s.mustPut(spelling, "content of a file")
	}
	rot(t, s.body("rotten"))
	s.reopen()
	s.mustOpen("rotten", 0) // a hit does not hash, so it cannot notice
	restore(t, s.body("restored"))
	must(t, os.Truncate(s.body("cut"), 1), os.Remove(s.file("no-record", recordFile)), os.Remove(s.body("no-body")),
		os.WriteFile(s.d.dir+"/r/stray", nil, 0o600))
	reported, dropped := map[string]bool{}, 0
	checked, err := s.d.verify(t.Context(), func(key string, err error) {
		reported[key] = true
		if errors.Is(err, errDropped) {
			dropped++
		}
	})
	must(t, err)
	if checked != 5 || dropped != 4 || len(reported) != 4 || reported[testKey("restored")] {
		t.Errorf("checked %d, dropped %d, reported %v", checked, dropped, reported)
	}
	for _, spelling := range []string{"rotten", "cut", "no-record", "no-body"} {
		s.wantMiss(spelling)
		s.wantFiles(spelling)
	}
	s.wantHit("good", "content of a file")
	s.wantHit("restored", "content of a file")
	checked, err = s.d.verify(t.Context(), func(key string, err error) { t.Errorf("%s: %v", key, err) })
	if checked != 2 || err != nil {
		t.Errorf("second run: checked %d, %v", checked, err)
	}
}

// Who removes what verify names is not told of another file by the next verify.
func TestVerifyNamesAllThatIsSetAside(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	s.d.isIrreplaceable = func(string) bool { return true }
	s.mustPut("a", "content")
	rot(t, s.body("a"))
	var reported []string
	report := func(key string, _ error) { reported = append(reported, key) }
	for range 2 { // it is set aside, and then it is there
		reported = nil
		_, err := s.d.verify(t.Context(), report)
		must(t, err)
	}
	if len(reported) != 1 {
		t.Fatalf("reported %q, want one place", reported)
	}
	names, err := filepath.Glob(s.d.dir + "/" + reported[0])
	must(t, err)
	for _, name := range names {
		must(t, os.Remove(name))
	}
	reported = nil
	_, err = s.d.verify(t.Context(), report)
	must(t, err)
	if len(reported) > 0 {
		t.Errorf("after what it named was removed verify reports %q", reported)
	}
	s.wantFiles("a")
}

// Whatever somebody puts beside a stored file, in any state of its record: that costs
// the stored file nothing. verify reports it and leaves it alone.
func TestDiskLeavesStrayFilesAlone(t *testing.T) {
	t.Parallel()
	text := bigContent(maxSmallBody + 1000)
	states := map[string]func(s *diskTester){
		"whole":              func(*diskTester) {},
		"restored":           func(s *diskTester) { restore(s.t, s.body("f")) },
		"the record is next": func(s *diskTester) { must(s.t, os.Rename(s.file("f", recordFile), s.file("f", recordNext))) },
		"a damaged next one": func(s *diskTester) { must(s.t, os.WriteFile(s.file("f", recordNext), []byte("cut"), 0o600)) },
		"touched":            func(s *diskTester) { editRecord(s.t, s.file("f", recordFile), "mt", 1) },
	}
	finders := map[string]func(s *diskTester){
		"a hit": func(s *diskTester) { s.wantHit("f", text) },
		"a hit on the stray": func(s *diskTester) {
			for _, name := range []string{"Thumbs.db", "f.xz", "copy of f"} {
				if _, err := s.open(s.t.Context(), filepath.Dir(testKey("f"))+"/"+name, 0); !errors.Is(err, fs.ErrNotExist) {
					s.t.Errorf("opening %s: %v", name, err)
				}
			}
		},
		"the sweep": func(s *diskTester) { s.sweepLater() },
		"verify":    func(s *diskTester) { s.wantVerified(1, "Thumbs.db", "f.xz", "copy of f", ".DS_Store", "folder") },
		"a writer":  func(s *diskTester) { s.mustPut("f", text) },
	}
	for state, prepare := range states {
		for finder, find := range finders {
			t.Run(state+", "+finder, func(t *testing.T) {
				t.Parallel()
				s := newDiskTester(t)
				s.mustPut("f", text)
				strays := map[string]string{"Thumbs.db": "thumbs", "f.xz": "", "copy of f": text, ".DS_Store": "finder"}
				for name, content := range strays {
					must(t, os.WriteFile(s.file("f", name), []byte(content), 0o600))
				}
				must(t, os.Mkdir(s.file("f", "folder"), 0o755))
				prepare(s)
				s.reopen()
				find(s)
				s.sweepLater()
				for range 2 {
					s.wantVerified(1, "Thumbs.db", "f.xz", "copy of f", ".DS_Store", "folder")
					s.wantHit("f", text)
				}
				s.wantFiles("f", "f", recordFile, "Thumbs.db", "f.xz", "copy of f", ".DS_Store", "folder")
				for name, content := range strays {
					if got := string(readFile(t, s.file("f", name))); got != content {
						t.Errorf("%s was changed: it has %d bytes", name, len(got))
					}
				}
			})
		}
	}
}

// xz without -k replaces a body: what it left may be all there is of the file.
func TestDiskLeavesAStrayFileWithoutItsBody(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	s.mustPut("f", "content")
	must(t, os.Rename(s.body("f"), s.file("f", "f.xz")))
	s.wantMiss("f")
	s.sweepLater()
	s.wantVerified(0, "f.xz")
	var out bytes.Buffer
	env := envOf(map[string]string{"DATA_DIR": s.d.dir, "CONFIG_PATH": "/none"})
	if code := run(t.Context(), []string{"verify"}, env, &out, &out); code != 1 || !strings.Contains(out.String(), "f.xz: a stray file") {
		t.Errorf("verify exits with %d: %s", code, &out)
	}
	s.wantFiles("f", "f.xz", recordFile)
	must(t, os.Rename(s.file("f", "f.xz"), s.body("f")))
	s.wantHit("f", "content")
	s.wantVerified(1)
}

// sweepLater sweeps as if a day had passed.
func (s *diskTester) sweepLater() {
	s.t.Helper()
	s.d.now = func() time.Time { return time.Now().Add(25 * time.Hour) }
	must(s.t, s.d.sweep(s.t.Context()))
	s.d.now = time.Now
}

// wantVerified wants verify to check that many bodies, to drop none, and to report
// exactly these files beside f, once each.
func (s *diskTester) wantVerified(checked int, strays ...string) {
	s.t.Helper()
	var got []string
	n, err := s.d.verify(s.t.Context(), func(key string, err error) {
		got = append(got, strings.TrimPrefix(key, filepath.Dir(testKey("f"))+"/"))
		if errors.Is(err, errDropped) {
			s.t.Errorf("%s: %v", key, err)
		}
	})
	slices.Sort(got)
	slices.Sort(strays)
	if n != checked || err != nil || !slices.Equal(got, strays) {
		s.t.Errorf("verify: checked %d, want %d; reported %q, want %q; %v", n, checked, got, strays, err)
	}
}

// rot flips a bit of a file and keeps its size and time.
func rot(t testing.TB, name string) {
	t.Helper()
	fi, err := os.Stat(name)
	must(t, err)
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("X"), 1)
	must(t, err, f.Close(), os.Chtimes(name, fi.ModTime(), fi.ModTime()))
}

// TestDiskStatsNowAndThen: what this process changes is seen at once, what another one
// changes when the next look is due.
func TestDiskStatsNowAndThen(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	at := testDay
	s.d.now, s.d.statEvery = func() time.Time { return at }, time.Second
	s.mustPut("f", "old")
	s.wantHit("f", "old")
	s.wantHit("f", "old") // looked at the file
	old, _ := s.d.memory.get(testKey("f"))
	s.mustPut("f", "new")
	old = &memoryEntry{key: old.key, id: old.id, rec: old.rec, headers: old.headers, body: old.body}
	s.d.memory.put(old.key, old.cost(), old) // by a reader who opened the file before
	s.wantHit("f", "new")
	s.wantHit("f", "new")
	must(t, os.Rename(s.body("f"), s.body("f")+"-away"))
	s.wantHit("f", "new")
	at = at.Add(-time.Minute) // the clock was put back
	s.wantMiss("f")
	must(t, os.Rename(s.body("f")+"-away", s.body("f")))
	s.wantHit("f", "new")
	s.wantHit("f", "new")
	must(t, os.Remove(s.body("f")))
	at = at.Add(time.Second - 1)
	s.wantHit("f", "new")
	at = at.Add(1)
	s.wantMiss("f")
	s.mustPut("f", "third")
	s.wantHit("f", "third")
	s.wantHit("f", "third")
	must(t, s.d.delete(t.Context(), testKey("f")))
	s.wantMiss("f")
}

func TestDiskVerifyLeavesTheReplaced(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	s.mustPut("f", "old")
	fi, err := os.Stat(s.body("f"))
	must(t, err)
	entryOf := func(spelling string) *memoryEntry {
		return &memoryEntry{key: testKey(spelling), id: identityOf(fi), rec: testRecord("f", "old")}
	}
	s.mustPut("f", "new")
	must(t, s.d.verifyBody(t.Context(), entryOf("f")))
	s.wantHit("f", "new")
	must(t, s.d.verifyBody(t.Context(), entryOf("gone")))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.d.verify(ctx, func(string, error) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	s.wantHit("f", "new")
}

// crashScenes are the operations that are killed at each of their steps. want lists the
// contents that may be stored afterwards; "" is none.
var crashScenes = map[string]struct {
	prepare, act func(s *diskTester)
	want         []string
}{
	"first commit": {func(s *diskTester) {}, crashPut, []string{"", "new"}},
	"replacement":  {func(s *diskTester) { s.mustPut("f", "old") }, crashPut, []string{"old", "new"}},
	"replacement by copying": {func(s *diskTester) { s.mustPut("f", "old") }, func(s *diskTester) {
		spool := tempSpool(s.t, s.dir, "new")
		os.Remove(spool.Name())
		s.objects.put(s.t.Context(), testKey("f"), testRecord("f", "new"), spool, putCondition{})
	}, []string{"old", "new"}},
	"replacement after a crash and a restore": {func(s *diskTester) {
		s.mustPut("f", "old")
		must(s.t, os.Rename(s.file("f", recordFile), s.file("f", recordNext)))
		restore(s.t, s.body("f"))
	}, crashPut, []string{"old", "new"}},
	"deletion": {func(s *diskTester) { s.mustPut("f", "old") }, func(s *diskTester) {
		s.delete(s.t.Context(), testKey("f"))
	}, []string{"old", ""}},
	"repair": {func(s *diskTester) { s.mustPut("f", "old"); restore(s.t, s.body("f")) }, func(s *diskTester) {
		s.open(s.t.Context(), testKey("f"), 0)
	}, []string{"old"}},
}

func crashPut(s *diskTester) {
	spool, err := s.d.newSpool()
	must(s.t, err)
	io.WriteString(spool, "new")
	s.objects.put(s.t.Context(), testKey("f"), testRecord("f", "new"), spool, putCondition{})
}

// crashVar is the variable that tells the child its scene, the number of the step at
// which it kills itself, and its directory, with | between them.
const crashVar = "ARTIFACTAPI_TEST_CRASH"

// TestCrashChild is the child process. Without crashVar it does nothing.
func TestCrashChild(t *testing.T) {
	parts := strings.Split(os.Getenv(crashVar), "|")
	if len(parts) != 3 {
		t.Skip("run by TestDiskCrash")
	}
	s := newDiskTester(t)
	s.d.dir = parts[2]
	n := 0
	s.d.stepDone = func(string) {
		if fmt.Sprint(n) == parts[1] {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		n++
	}
	crashScenes[parts[0]].act(s)
}

func TestDiskCrash(t *testing.T) {
	t.Parallel()
	for name, scene := range crashScenes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newDiskTester(t)
			scene.prepare(s)
			var steps []string
			s.d.stepDone = func(step string) { steps = append(steps, step) }
			scene.act(s)
			if len(steps) == 0 {
				t.Fatal("no steps")
			}
			for n, step := range steps {
				s := newDiskTester(t)
				scene.prepare(s)
				crash(t, name, n, s.d.dir)
				wantAfterCrash(t, step, s, scene.want)
			}
		})
	}
}

// crash runs a scene in a child process that kills itself at step n.
func crash(t *testing.T, scene string, n int, dir string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestCrashChild$")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%d|%s", crashVar, scene, n, dir))
	out, err := cmd.CombinedOutput()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("child was not killed: %v\n%s", err, out)
	}
}

func wantAfterCrash(t *testing.T, step string, s *diskTester, want []string) {
	t.Helper()
	s.reopen()
	s.d.isIrreplaceable = func(string) bool { return true } // nothing that a crash leaves is set aside
	o, err := s.open(t.Context(), testKey("f"), 0)
	got := ""
	if err == nil {
		body, err := io.ReadAll(o.body)
		must(t, err, o.body.Close())
		got = string(body)
		wantRecord(t, o.rec, testRecord("f", got))
	} else if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after %q: %v", step, err)
	}
	if !slices.Contains(want, got) {
		t.Errorf("after %q: %q, want one of %q", step, got, want)
	}
	s.d.now = func() time.Time { return time.Now().Add(25 * time.Hour) }
	must(t, s.d.sweepSpools(true), s.d.sweep(t.Context()))
	if got == "" {
		s.wantMiss("f")
		s.wantFiles("f")
	} else {
		s.wantHit("f", got)
		s.wantFiles("f", "f", recordFile)
	}
	if left, _ := os.ReadDir(s.d.dir + "/" + spoolDir); len(left) > 0 {
		t.Errorf("after %q: spool %s was left", step, left[0].Name())
	}
	s.mustPut("f", "next")
	s.wantHit("f", "next")
}

// TestDiskFileTooLarge runs in a process of its own, because a limit on the size of
// files holds for a whole process.
func TestDiskFileTooLarge(t *testing.T) {
	if os.Getenv(crashVar) != "limit" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestDiskFileTooLarge$")
		cmd.Env = append(os.Environ(), crashVar+"=limit")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	s := newDiskTester(t)
	s.mustPut("f", "old")
	spool := tempSpool(t, s.dir, bigContent(100_000))
	must(t, os.Remove(spool.Name())) // so that put must copy it
	must(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 50_000, Max: 50_000}))
	err := s.objects.put(t.Context(), testKey("f"), testRecord("f", bigContent(100_000)), spool, putCondition{})
	if !errors.Is(err, errNoSpace) {
		t.Errorf("put: %v, want errNoSpace", err)
	}
	s.wantHit("f", "old")
	s.wantFiles("f", "f", recordFile)
}

// walker is a store of objects of which only walk works.
type walker struct {
	objects
	f func(f func(key string, rec *record) error) error
}

func (w walker) walk(_ context.Context, f func(key string, rec *record) error) error { return w.f(f) }

func TestIndexSurvivesRestart(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	x := newTestIndex(t, s.d.dir, s.d)
	for _, spelling := range []string{"a", "b%20c", "d?q=1", "lost"} {
		s.mustPut(spelling, spelling)
		must(t, x.saveRow(t.Context(), newIndexRow(testKey(spelling), testRecord(spelling, spelling))))
		must(t, second(x.countUses(t.Context(), []fileUse{{"r", testKey(spelling), 3, testDay.Add(time.Hour)}})))
	}
	before, err := x.listPage(t.Context(), pageQuery{remote: "r", limit: 3})
	must(t, err, x.saveSnapshot(), s.delete(t.Context(), testKey("lost")))
	s.mustPut("unknown", "12345")

	it := &indexTester{t, newTestIndex(t, s.d.dir, s.d)}
	it.wantPaths(pageQuery{remote: "r", limit: 9}, "a", "b%20c", "d?q=1", "unknown")
	for _, r := range before.rows {
		it.wantRow(r)
	}
	it.wantRow(newIndexRow(testKey("unknown"), testRecord("unknown", "12345")))
}

func TestIndexIgnoresDamagedSnapshot(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	x := newTestIndex(t, s.d.dir, s.d)
	for i := range 50 {
		spelling := fmt.Sprint("f", i)
		s.mustPut(spelling, "x")
		must(t, x.saveRow(t.Context(), newIndexRow(testKey(spelling), testRecord(spelling, "x"))))
	}
	must(t, x.saveSnapshot())
	name := x.name
	sound := readFile(t, name)
	for _, damaged := range [][]byte{
		nil, sound[:5], sound[:len(sound)/2], append(slices.Clone(sound), 1, 2, 3), bytes.Repeat([]byte{255}, 100),
		bytes.Replace(sound, []byte("index 2"), []byte("index 1"), 1), bytes.Replace(sound, []byte("f7"), []byte("g7"), 1),
	} {
		must(t, os.WriteFile(name, damaged, 0o600))
		log := new(bytes.Buffer)
		x := newEmbeddedIndex(s.d.dir, slog.New(slog.NewTextHandler(log, nil)))
		must(t, x.reconcile(t.Context(), s.d))
		if n := len((&indexTester{t, x}).paths(pageQuery{remote: "r", limit: 100})); n != 50 {
			t.Errorf("%d rows from a snapshot of %d bytes", n, len(damaged))
		}
		if strings.Count(log.String(), "\n") != 1 {
			t.Errorf("log: %s", log)
		}
	}
}

// While the index is loaded, a put or delete must not be undone by what the walk read
// before it.
func TestIndexLoadsBesideWriters(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rec := func(spelling string) *record { return testRecord(spelling, "old") }
	x := newTestIndex(t, dir, walker{f: func(f func(string, *record) error) error {
		return errors.Join(f(testKey("kept"), rec("kept")), f(testKey("gone"), rec("gone")), f(testKey("vanished"), rec("vanished")))
	}})
	must(t, second(x.countUses(t.Context(), []fileUse{{"r", testKey("kept"), 4, testDay}})), x.saveSnapshot())

	x = newEmbeddedIndex(dir, slog.New(slog.DiscardHandler))
	ctx := t.Context()
	newer := newIndexRow(testKey("kept"), testRecord("kept", "newer"))
	down := walker{f: func(func(string, *record) error) error { return errStoreDown }}
	if err := x.reconcile(ctx, down); !errors.Is(err, errStoreDown) {
		t.Errorf("load: %v", err)
	}
	if p, err := x.listPage(ctx, pageQuery{remote: "r", limit: 9}); err != nil || p.complete || len(p.rows) != 3 {
		t.Errorf("while the store is down: %+v, %v", p, err)
	}
	must(t, x.reconcile(ctx, walker{f: func(f func(string, *record) error) error {
		must(t, x.saveRow(ctx, newer), x.delete(ctx, "r", testKey("gone")))
		must(t, x.saveRow(ctx, newIndexRow(testKey("came"), rec("came"))), x.saveSnapshot())
		// A use of a file without a row makes it, before the walk comes to the file.
		var heard useCounts
		heard.addUses(fileUse{"r", testKey("used"), 2, testDay})
		must(t, heard.flush(ctx, x, &fakeObjects{recs: map[string]*record{testKey("used"): rec("used")}}))
		return errors.Join(f(testKey("gone"), rec("gone")), f(testKey("kept"), rec("kept")), f(testKey("used"), rec("used")))
	}}))
	it := &indexTester{t, x}
	it.wantPaths(pageQuery{remote: "r", limit: 9}, "came", "kept", "used")
	newer.Hits, newer.LastAccess = 4, testDay
	it.wantRow(newer)
	used := newIndexRow(testKey("used"), rec("used"))
	used.Hits, used.LastAccess = 2, testDay
	it.wantRow(used)
}

// It is not parallel, because it measures the memory of the process.
func TestIndexMemory(t *testing.T) {
	x := newTestIndex(t, t.TempDir(), newTestDisk(t))
	const rows = 50_000
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for i := range rows {
		must(t, x.saveRow(t.Context(), testRow("r", fmt.Sprintf("pool/main/p/package/package_%d_amd64.deb", i))))
	}
	if per := (heap() - before) / rows; per > 300 {
		t.Errorf("a row takes %d bytes", per)
	} else {
		t.Logf("a row takes %d bytes", per)
	}
	runtime.KeepAlive(x)
}

func TestFreshnessSurvivesOrderlyRestart(t *testing.T) {
	t.Parallel()
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	f := newLocalFreshness(dir, time.Now, log)
	a, b := freshnessMark{testDay, "aa"}, freshnessMark{testDay.Add(time.Hour), "bb"}
	must(t, f.setMark(t.Context(), "a", b), f.setMark(t.Context(), "a", a), f.setMark(t.Context(), "b", b),
		f.setMark(t.Context(), "c", b), f.delete(t.Context(), "c"), f.saveSnapshot())
	f = newLocalFreshness(dir, time.Now, log)
	wantMark(t, f, "a", a)
	wantMark(t, f, "b", b)
	wantNoMark(t, f, "c")

	// A crash loses what came after the last snapshot: the files are revalidated.
	must(t, f.saveSnapshot(), f.setMark(t.Context(), "c", a), f.delete(t.Context(), "a"))
	f = newLocalFreshness(dir, time.Now, log)
	wantMark(t, f, "a", a)
	wantMark(t, f, "b", b)
	wantNoMark(t, f, "c")
}

func TestFreshnessIgnoresDamagedSnapshot(t *testing.T) {
	t.Parallel()
	dir, log := t.TempDir(), new(bytes.Buffer)
	start := func() *localFreshness {
		return newLocalFreshness(dir, time.Now, slog.New(slog.NewTextHandler(log, nil)))
	}
	f, m := start(), freshnessMark{testDay, "s"}
	must(t, f.setMark(t.Context(), "a", m), f.setMark(t.Context(), "b", m), f.saveSnapshot())
	tamper(t, f.name, func(data []byte) []byte { return data[:len(data)-3] })
	f = start()
	if n := len(f.marks.keys()); n != 1 || strings.Count(log.String(), "is damaged") != 1 {
		t.Errorf("%d marks are left of two; log: %s", n, log)
	}
	must(t, f.setMark(t.Context(), "d", m), f.saveSnapshot())
	f = start()
	wantMark(t, f, "d", m)
	if n := len(f.marks.keys()); n != 2 || strings.Count(log.String(), "\n") != 1 {
		t.Errorf("%d marks; log: %s", n, log)
	}
}

func TestFreshnessIsBounded(t *testing.T) {
	t.Parallel()
	f := newLocalFreshness(t.TempDir(), time.Now, slog.New(slog.DiscardHandler))
	if f.marks.limit != maxMarks {
		t.Errorf("the limit is %d, want %d", f.marks.limit, maxMarks)
	}
	f.marks.limit = 1000 // a million take a second
	for i := range 1000 {
		f.marks.put(strconv.Itoa(i), freshnessMark{})
	}
	m := freshnessMark{testDay, "s"}
	for _, key := range []string{"new", "newer", "new"} {
		must(t, f.setMark(t.Context(), key, m))
		wantMark(t, f, key, m)
	}
	if n := len(f.marks.keys()); n != 1000 {
		t.Errorf("%d marks, want 1000", n)
	}
}

func TestFreshnessWithoutDisk(t *testing.T) {
	t.Parallel()
	blocker := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(blocker, nil, 0o600))
	f := newLocalFreshness(blocker+"/data", time.Now, slog.New(slog.DiscardHandler))
	m := freshnessMark{testDay, "s"}
	must(t, f.setMark(t.Context(), "k", m))
	wantMark(t, f, "k", m)
	for range 2 {
		if err := f.saveSnapshot(); !errors.Is(err, errStoreDown) {
			t.Errorf("saving below a file: %v", err)
		}
	}
	must(t, os.Remove(blocker), os.MkdirAll(blocker+"/data", 0o755), f.saveSnapshot())
	wantMark(t, newLocalFreshness(blocker+"/data", time.Now, slog.New(slog.DiscardHandler)), "k", m)
}

// A snapshot is not written again while nothing changes: that would wear disks out,
// and a command such as verify would undo what a server beside it has saved.
func TestSnapshotsAreWrittenForChangesOnly(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	s.mustPut("f", "x")
	open := func() (*localFreshness, *embeddedIndex) {
		return newLocalFreshness(s.d.dir, time.Now, slog.New(slog.DiscardHandler)), newTestIndex(t, s.d.dir, s.d)
	}
	f, x := open()
	must(t, f.setMark(t.Context(), "k", freshnessMark{testDay, "s"}), f.saveSnapshot(), x.saveSnapshot())
	again, xAgain := open()
	must(t, os.Remove(f.name), os.Remove(x.name), f.saveSnapshot(), x.saveSnapshot(), again.saveSnapshot(), xAgain.saveSnapshot())
	for _, name := range []string{f.name, x.name} {
		if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was written without a change: %v", name, err)
		}
	}
}

func FuzzRecord(f *testing.F) {
	var sound bytes.Buffer
	must(f, writeRecord(testRecord("f", "x"), fileIdentity{1, 2, 3}, "boot")(&sound))
	f.Add(sound.Bytes())
	f.Add([]byte(recordMagic + "00000000\n{}\n"))
	f.Add(seal([]byte(`{"s":"` + strings.Repeat("0", 64) + `","f":"0000-01-01T00:00:00Z"}`)))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, data := range [][]byte{data, seal(data)} {
			e, err := decodeRecord(data)
			if err != nil {
				if e != nil || !errors.Is(err, errDamaged) {
					t.Fatalf("%v, %v", e, err)
				}
				continue
			}
			var again bytes.Buffer
			if writeRecord(&e.record, e.bodyIdentity(), e.Boot)(&again) != nil || again.Len() > maxRecord {
				continue // it is too long once it is escaped
			}
			f, err := decodeRecord(again.Bytes())
			if err != nil || f.bodyIdentity() != e.bodyIdentity() {
				t.Fatalf("%+v came back as %+v, %v", e, f, err)
			}
			wantRecord(t, &f.record, &e.record)
		}
	})
}

// FuzzSnapshot: what is saved is read, whatever damage follows it.
func FuzzSnapshot(f *testing.F) {
	f.Add("r", "a%20b?c", int64(7), []byte("x"))
	f.Fuzz(func(t *testing.T, remote, spelling string, size int64, tail []byte) {
		if !namePattern.MatchString(remote) {
			remote = "r" // no remote has such a name
		}
		want := testRow(remote, strings.ToValidUTF8(spelling, "?"))
		want.Size = size
		x := newEmbeddedIndex(t.TempDir(), slog.New(slog.DiscardHandler))
		x.fsync = func(*os.File) error { return nil }
		must(t, x.saveRow(t.Context(), want))
		x.complete.Store(true)
		must(t, x.saveSnapshot())
		again := newEmbeddedIndex(t.TempDir(), x.log)
		must(t, os.WriteFile(again.name, append(readFile(t, x.name), tail...), 0o600))
		err := loadSnapshot(again.snapshotFile, again.restoreRow)
		if e := again.findEntry(want.Remote, want.Key); e == nil || e.toRow(want.Remote) != want || len(tail) == 0 && err != nil {
			t.Fatalf("%+v came back as %+v, %v", want, e, err)
		}
	})
}

func BenchmarkDiskOpen(b *testing.B) {
	for name, size := range map[string]int{"Small": 4 << 10, "Large": 1 << 20} {
		b.Run(name, func(b *testing.B) {
			d := newTestDisk(b)
			content := bigContent(size)
			key := testKey("dir/f")
			must(b, d.put(b.Context(), key, testRecord("dir/f", content), tempSpool(b, b.TempDir(), content), putCondition{}))
			b.ReportAllocs()
			for b.Loop() {
				o, err := d.open(b.Context(), key, 0)
				if err != nil {
					b.Fatal(err)
				}
				o.body.Close()
			}
		})
	}
}

func BenchmarkDiskPut(b *testing.B) {
	d, dir := newTestDisk(b), b.TempDir()
	content := bigContent(4 << 10)
	rec := testRecord("f", content)
	for b.Loop() {
		spool := tempSpool(b, dir, content)
		must(b, d.put(b.Context(), testKey("f"), rec, spool, putCondition{}))
		spool.Close()
	}
}

// verify reports no loss where a crash during the first put of a file left only its
// .record.next: an operator must not be alarmed after a power failure.
func TestVerifyIsNotAlarmedByACrashedFirstCommit(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "text")
	tt.get("/api/r/a").wantMiss()
	body := tt.fileOf("a")
	dir := filepath.Dir(body)
	if err := errors.Join(os.Remove(body), os.Rename(dir+"/"+recordFile, dir+"/"+recordNext)); err != nil {
		t.Fatal(err)
	}
	if _, err := tt.disk.verify(t.Context(), func(key string, err error) { t.Errorf("%s: %v", key, err) }); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("the leftover is still there")
	}
}

// The error of a directory that cannot be written says who must be able to.
func TestUnwritableDataDirNamesTheCure(t *testing.T) {
	t.Parallel()
	for _, cause := range []error{syscall.EACCES, syscall.EROFS} {
		err := storeError("making a file", &fs.PathError{Op: "open", Path: "/data/x", Err: cause})
		if want := fmt.Sprintf("user %d, which must own DATA_DIR", os.Getuid()); !errors.Is(err, errStoreDown) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: want %q in it", err, want)
		}
	}
}

// A small file of a remote is stored without fsync. While the machine runs it is used as
// it is; after a power failure it is hashed before it is used, and what was lost is a miss.
func TestSmallFilesAreSyncedLater(t *testing.T) {
	t.Parallel()
	zero := func(t *testing.T, name string) { // what the file system knows of a file is there, its bytes are not
		fi, err := os.Stat(name)
		must(t, err)
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		must(t, err)
		_, err = f.Write(make([]byte, fi.Size()))
		must(t, err, f.Close(), os.Chtimes(name, fi.ModTime(), fi.ModTime()))
	}
	for name, c := range map[string]struct {
		hit  bool
		lose func(s *diskTester)
	}{
		"all was written":           {true, func(*diskTester) {}},
		"the body is zeros":         {false, func(s *diskTester) { zero(s.t, s.body("f")) }},
		"the body is empty":         {false, func(s *diskTester) { must(s.t, os.Truncate(s.body("f"), 0)) }},
		"the body is gone":          {false, func(s *diskTester) { must(s.t, os.Remove(s.body("f"))) }},
		"the record is zeros":       {false, func(s *diskTester) { zero(s.t, s.file("f", recordFile)) }},
		"the record is empty":       {false, func(s *diskTester) { must(s.t, os.Truncate(s.file("f", recordFile), 0)) }},
		"the record is not renamed": {true, func(s *diskTester) { must(s.t, os.Rename(s.file("f", recordFile), s.file("f", recordNext))) }},
	} {
		for _, where := range []string{"file", "memory"} {
			t.Run(name+", spool in "+where, func(t *testing.T) { testSyncedLater(t, where == "memory", c.hit, c.lose) })
		}
	}
}

func testSyncedLater(t *testing.T, inMemory, hit bool, lose func(s *diskTester)) {
	t.Parallel()
	s := newDiskTester(t)
	s.inMemory = inMemory
	restart := func(boot string) *int {
		s.reopen()
		synced := new(int)
		s.d.delaysSync, s.d.boot = true, boot
		s.d.fsync = func(*os.File) error { *synced++; return nil }
		return synced
	}
	synced := restart("one")
	s.mustPut("f", "content")
	restart("one") // the process died
	s.wantHit("f", "content")
	if *synced > 0 {
		t.Errorf("%d fsyncs", *synced)
	}
	lose(s)
	synced = restart("two")
	if !hit {
		s.wantMiss("f")
		s.mustPut("f", "content")
		return
	}
	s.wantHit("f", "content")
	if *synced < 2 {
		t.Error("the file was used and not synced")
	}
	synced = restart("three")
	s.wantHit("f", "content")
	if *synced > 0 {
		t.Error("the file was checked again")
	}
}

// A crash between the last two renames leaves a file that was not synced, and its record
// under the other name. A repair writes a record that says that the file is durable, so it
// has to be.
func TestRepairedRecordsAreOfSyncedFiles(t *testing.T) {
	t.Parallel()
	s := newDiskTester(t)
	s.d.delaysSync, s.d.boot = true, "one"
	s.mustPut("f", "content")
	must(t, os.Rename(s.file("f", recordFile), s.file("f", recordNext)))
	var synced []string
	s.d.fsync = func(f *os.File) error { synced = append(synced, f.Name()); return nil }
	s.wantVerified(1)
	e, err := readRecord(s.file("f", recordFile))
	must(t, err)
	if e.Boot == "" && !slices.Contains(synced, s.body("f")) {
		t.Errorf("the record says that the file is durable, and only these were synced: %q", synced)
	}
}

// What must be durable at once still is: uploads, what cannot be fetched again, large
// files, a new version of a stored file, and all where the boot is not known.
func TestOtherFilesAreSyncedAtOnce(t *testing.T) {
	t.Parallel()
	large := strings.Repeat("x", maxUnsynced+1)
	for name, c := range map[string]struct {
		content string
		prepare func(s *diskTester, rec *record)
	}{
		"upload":        {"x", func(_ *diskTester, rec *record) { rec.Class = local }},
		"irreplaceable": {"x", func(s *diskTester, _ *record) { s.d.isIrreplaceable = func(string) bool { return true } }},
		"large":         {large, func(*diskTester, *record) {}},
		"new version":   {"x", func(s *diskTester, _ *record) { s.mustPut("f", "old") }},
		"no boot":       {"x", func(s *diskTester, _ *record) { s.d.boot = "" }},
		"commands":      {"x", func(s *diskTester, _ *record) { s.d.delaysSync = false }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newDiskTester(t)
			s.d.delaysSync, s.d.boot = true, "one"
			rec := testRecord("f", c.content)
			c.prepare(s, rec)
			synced := 0
			s.d.fsync = func(*os.File) error { synced++; return nil }
			must(t, s.d.put(t.Context(), testKey("f"), rec, tempSpool(t, s.dir, c.content), putCondition{}))
			if synced < 4 {
				t.Errorf("%d fsyncs, want those of body, record and both directories", synced)
			}
			if e, err := readRecord(s.file("f", recordFile)); err != nil || e.Boot != "" {
				t.Errorf("the record is of boot %q: %v", e.Boot, err)
			}
		})
	}
}

// Who finds the record of a new file half written waits for the rest, and nothing is wrong.
func TestRecordThatIsBeingWritten(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s := newDiskTester(t)
		s.mustPut("f", "text")
		unlock, err := s.d.lockFolder(t.Context(), s.d.folderOf(testKey("f")), false)
		must(t, err)
		whole, err := os.ReadFile(s.file("f", recordFile))
		must(t, err)
		must(t, os.Truncate(s.file("f", recordFile), 0))
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.wantHit("f", "text")
		}()
		synctest.Wait() // for the lock
		must(t, os.WriteFile(s.file("f", recordFile), whole, 0o600))
		unlock()
		<-done
		if s.log.Len() > 0 {
			t.Errorf("it is told of: %s", s.log)
		}
	})
}

// A copy that proves to be what a record says is served, also where that record cannot be
// written anew: from a restored backup, or after a power failure, on a disk that is full or
// read-only.
func TestDiskServesWhatItCannotRepair(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]error{"full": syscall.ENOSPC, "read-only": syscall.EROFS} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newDiskTester(t)
			s.mustPut("f", "content")
			must(t, os.Chtimes(s.body("f"), testDay, testDay))
			s.reopen()
			s.d.fsync = func(*os.File) error { return fault }
			s.wantHit("f", "content")
			s.wantHit("f", "content")
			s.reopen()
			s.d.fsync = func(*os.File) error { return fault }
			s.wantVerified(1)
			if err := s.put("f", "other"); err == nil || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("put: %v", err)
			}
			s.wantFiles("f", filepath.Base(s.body("f")), recordFile)
			rot(t, s.body("f"))
			must(t, os.Chtimes(s.body("f"), testDay, testDay.Add(time.Second)))
			if _, err := s.objects.open(t.Context(), testKey("f"), 0); err == nil {
				t.Error("a damaged body is served")
			}
		})
	}
}
