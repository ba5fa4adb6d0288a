package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// usageOf is a disk without a limit on files.
func usageOf(free, size int64) diskUsage {
	return diskUsage{free: room{bytes: free}, size: room{bytes: size}}
}

// testSpace makes spools in a directory of the test, on a disk that has that
// much free.
func testSpace(t *testing.T, free int64) *spoolSpace {
	dir := t.TempDir()
	return &spoolSpace{
		now:        func() time.Time { return testDay },
		createFile: func() (*os.File, error) { return os.CreateTemp(dir, "*") },
		diskSpace:  func() (diskUsage, error) { return usageOf(free, free), nil },
	}
}

func newTestSpool(t *testing.T, space *spoolSpace, digest string, size int64) *spool {
	t.Helper()
	s := space.newSpool(digest)
	must(t, s.setSize(size))
	return s
}

func TestReadersFollowASpool(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		text := noise(1, 1_000_000)
		s := newTestSpool(t, testSpace(t, 1<<30), "", int64(len(text)))
		var readers sync.WaitGroup
		for _, from := range []int{0, 1, 500_000, len(text)} {
			r := s.newReader(t.Context(), false)
			_, err := r.Seek(int64(from), io.SeekStart)
			must(t, err)
			readers.Go(func() {
				defer r.Close()
				if got, err := io.ReadAll(r); err != nil || string(got) != text[from:] {
					t.Errorf("from %d: %d bytes, %v", from, len(got), err)
				}
			})
		}
		for off := 0; off < len(text); off += 70_000 {
			_, err := io.WriteString(s, text[off:min(off+70_000, len(text))])
			must(t, err)
			synctest.Wait()
		}
		s.end(io.EOF)
		s.settle()
		late := s.newReader(t.Context(), false) // reads the shared descriptor
		got, err := io.ReadAll(late)
		if err != nil || string(got) != text {
			t.Errorf("behind the end: %d bytes, %v", len(got), err)
		}
		readers.Wait()
		s.release()
		if _, err := late.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the last reader's file is closed too early: %v", err)
		}
		late.Close()
		if err := s.file.Close(); !errors.Is(err, os.ErrClosed) {
			t.Error("the last one has left and the file is open")
		}
	})
}

func TestReadersOfAFailedSpool(t *testing.T) {
	t.Parallel()
	failed := errors.New("failed")
	text := noise(1, 200_000)
	s := newTestSpool(t, testSpace(t, 1<<30), sha256Of([]byte("another")), int64(len(text)))
	all, held := s.newReader(t.Context(), false), s.newReader(t.Context(), true)
	_, err := io.WriteString(s, text)
	must(t, err)
	if err := s.hash.verify(); !errors.Is(err, errDigest) {
		t.Errorf("a wrong body verifies: %v", err)
	}
	s.end(failed)
	s.end(errors.New("the first end counts"))
	s.end(io.EOF)
	for _, c := range []struct {
		r    *spoolReader
		want int
	}{{all, len(text)}, {held, len(text) - heldBackBytes}} {
		got, err := io.ReadAll(c.r)
		if len(got) != c.want || !errors.Is(err, failed) {
			t.Errorf("%d bytes, then %v; want %d", len(got), err, c.want)
		}
		c.r.Close()
	}
	s.discard()
	if _, err := os.Stat(s.file.Name()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the name is still there: %v", err)
	}
}

func TestSpoolHoldsBackUntilItIsComplete(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{-1, 200_000} {
		s := newTestSpool(t, testSpace(t, 1<<30), "", size)
		r := s.newReader(t.Context(), true)
		_, err := io.WriteString(s, noise(1, 200_000))
		must(t, err)
		if n, _, err := r.available(); n != 200_000-heldBackBytes || err != nil {
			t.Errorf("size %d: %d bytes can be read, %v", size, n, err)
		}
		s.end(io.EOF)
		if n, _, err := r.available(); n != 200_000 || err != nil {
			t.Errorf("size %d: %d bytes can be read in the end, %v", size, n, err)
		}
		r.Close()
		s.discard()
	}
}

func TestSpoolRefusesMoreThanItsSize(t *testing.T) {
	t.Parallel()
	s := newTestSpool(t, testSpace(t, 1<<30), "", 3)
	if n, err := io.WriteString(s, "four"); n != 0 || !errors.Is(err, errTooMuch) {
		t.Errorf("wrote %d, %v", n, err)
	}
	if written, _ := s.progress(); written != 0 {
		t.Errorf("%d bytes are there", written)
	}
	s.discard()
}

// The account is right after every kind of use and end.
func TestSpaceAccount(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	space := testSpace(t, 100*mib)
	at := testDay
	space.minFree, space.now = 10*mib, func() time.Time { return at }
	wantReserved := func(want int64) {
		t.Helper()
		if space.reserved != want {
			t.Errorf("%d bytes are reserved; want %d", space.reserved, want)
		}
	}
	piece := strings.Repeat("x", mib)
	known := newTestSpool(t, space, "", 50*mib)
	wantReserved(50 * mib)
	_, err := io.WriteString(known, piece)
	must(t, err)
	wantReserved(49 * mib)

	unknown := newTestSpool(t, space, "", -1)
	wantReserved(49*mib + reserveAhead)
	for range reserveAhead/mib + 1 { // reserves again when it is used up
		_, err := io.WriteString(unknown, piece)
		must(t, err)
	}
	wantReserved(49*mib + reserveAhead)

	small := newTestSpool(t, space, "", 1000) // in memory
	_, err = small.Write(make([]byte, 1000))
	must(t, err)
	small.end(io.EOF)
	wantReserved(49*mib + reserveAhead + 1000) // a store has still to write it

	tooLarge := space.newSpool("")
	if err := tooLarge.setSize(40 * mib); !errors.Is(err, errNoSpace) {
		t.Errorf("more than there is was promised: %v", err)
	}
	for _, s := range []*spool{known, unknown, small, tooLarge} {
		s.discard()
	}
	wantReserved(0)
	must(t, space.check()) // what was refused to tooLarge would be there now
	if _, err := space.reserve(91*mib, true); !errors.Is(err, errNoSpace) {
		t.Errorf("MIN_FREE is given away: %v", err)
	}
	for range 2 { // that it has failed once more is no request for space
		if err := space.check(); !errors.Is(err, errNoSpace) {
			t.Errorf("a body found no room, and the disk is not full: %v", err)
		}
		at = at.Add(refusalCounts / 2)
	}
	must(t, space.check()) // nobody asked for so much since
	_, err = space.reserve(90*mib, true)
	must(t, err)
	if err := space.check(); !errors.Is(err, errNoSpace) {
		t.Errorf("all is reserved, and the disk is not full: %v", err)
	}
	space.add(account{reserved: -90 * mib})
	must(t, space.check())
	if (space.account != account{}) {
		t.Errorf("without spools the account is %+v", space.account)
	}
}

// fullDisk is a disk with nothing free that MIN_FREE does not keep. What is reclaimed
// becomes free.
type fullDisk struct {
	usage     diskUsage
	old       room // what is reclaimable
	reclaimed []int64
	between   func() // called when something was removed; may be nil
}

func (d *fullDisk) reclaimable() room { return d.old }
func (d *fullDisk) reclaim(need room, removing func(int64)) room {
	freed := room{min(need.bytes, d.old.bytes), min(need.inodes, d.old.inodes)}
	d.old.bytes -= freed.bytes
	d.old.inodes -= freed.inodes
	for left := freed.bytes; left > 0; { // two files
		piece := min(left, freed.bytes/2+1)
		left -= piece
		removing(piece)
		d.usage.free.bytes += piece
		if d.between != nil {
			d.between()
		}
	}
	d.usage.free.inodes += freed.inodes
	d.reclaimed = append(d.reclaimed, freed.bytes+freed.inodes)
	return freed
}

// There is room for what so many files take beside their bytes.
func newFullDisk(t *testing.T, old room, files int64) (*fullDisk, *spoolSpace) {
	d := &fullDisk{usage: usageOf(10<<20+files*entryOverhead, 1<<40), old: old}
	space := testSpace(t, 0)
	space.minFree, space.reclaimer = 10<<20, d
	space.diskSpace = func() (diskUsage, error) { return d.usage, nil }
	return d, space
}

// grow writes n bytes, and the disk has less.
func (d *fullDisk) grow(t *testing.T, s *spool, n int) {
	t.Helper()
	_, err := io.WriteString(s, strings.Repeat("x", n))
	must(t, err)
	d.usage.free.bytes -= int64(n)
}

// Space is reclaimed as a body arrives, and not far ahead of it.
func TestSpaceIsReclaimedAsTheBodyArrives(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	d, space := newFullDisk(t, room{bytes: 300 * mib}, 1)
	s := newTestSpool(t, space, "", 200*mib)
	for written := range 200 {
		gone := 300*mib - d.old.bytes
		if ahead := gone - int64(written)*mib; ahead < 0 || ahead > reclaimAhead {
			t.Fatalf("after %d MiB of the body %d bytes are reclaimed", written, gone)
		}
		d.grow(t, s, mib)
		if d.usage.free.bytes < 10*mib {
			t.Fatalf("after %d MiB of the body %d bytes are free", written, d.usage.free.bytes)
		}
	}
	if gone := 300*mib - d.old.bytes; gone != 200*mib || len(d.reclaimed) > 8 {
		t.Errorf("for a body of 200 MiB %d bytes went in %d steps", gone, len(d.reclaimed))
	}
	s.discard()
	if (space.account != account{}) {
		t.Errorf("without spools the account is %+v", space.account)
	}
}

// TestWhatIsReclaimedIsPromisedOnce: while old files go for one body, what they free is
// not there for another.
func TestWhatIsReclaimedIsPromisedOnce(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	d, space := newFullDisk(t, room{bytes: 20 * mib}, 1)
	asked := 0
	d.between = func() {
		asked++
		var short room
		if err := space.findAmong(room{}, 1, func(missing room) { short = missing }); err == nil {
			t.Errorf("after %d removals there is room for another body: %+v", asked, short)
		}
	}
	newTestSpool(t, space, "", 20*mib).discard()
	if asked != 2 {
		t.Errorf("%d files were removed", asked)
	}
}

func TestWhatIsReclaimable(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for name, c := range map[string]struct {
		old    room
		inodes room // free and all
		sizes  []int64
		fails  int   // the one of them that finds no space; -1: none
		gone   int64 // of bytes and inodes
	}{
		"a body that fits":                      {old: room{bytes: 20 * mib}, sizes: []int64{20 * mib}, fails: -1, gone: 20 * mib},
		"a body that does not":                  {old: room{bytes: 20 * mib}, sizes: []int64{20*mib + 1}, fails: 0},
		"two that do not fit together":          {old: room{bytes: 200 * mib}, sizes: []int64{150 * mib, 60 * mib}, fails: 1, gone: reclaimAhead},
		"two that do":                           {old: room{bytes: 200 * mib}, sizes: []int64{150 * mib, 50 * mib}, fails: -1, gone: reclaimAhead + 50*mib},
		"a body of unknown length":              {old: room{bytes: 200 * mib}, sizes: []int64{-1}, fails: -1, gone: reserveAhead},
		"no inodes":                             {inodes: room{4, 100}, sizes: []int64{0}, fails: 0},
		"enough inodes":                         {inodes: room{5, 100}, sizes: []int64{0}, fails: -1},
		"inodes of old files":                   {old: room{inodes: 9}, inodes: room{2, 100}, sizes: []int64{0}, fails: -1, gone: 3},
		"inodes for each of several":            {old: room{inodes: 9}, inodes: room{2, 100}, sizes: []int64{0, 0}, fails: -1, gone: 6},
		"a file system without a count of them": {old: room{bytes: mib}, sizes: []int64{1}, fails: -1, gone: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, space := newFullDisk(t, c.old, int64(len(c.sizes)))
			d.usage.free.inodes, d.usage.size.inodes = c.inodes.bytes, c.inodes.inodes
			spools := make([]*spool, len(c.sizes))
			for i := range spools {
				spools[i] = space.newSpool("")
				defer spools[i].discard()
			}
			for i, size := range c.sizes {
				if err := spools[i].setSize(size); errors.Is(err, errNoSpace) != (i == c.fails) {
					t.Errorf("body %d of %d bytes: %v", i, size, err)
				}
			}
			gone := int64(0)
			for _, n := range d.reclaimed {
				gone += n
			}
			if gone != c.gone {
				t.Errorf("%d went; want %d", gone, c.gone)
			}
		})
	}
}

// An upstream may say any length. One that no disk has does not pass where MIN_FREE is
// short already, or everything would pass after it.
func TestSpaceOfALengthThatNoDiskHas(t *testing.T) {
	t.Parallel()
	space := testSpace(t, 100)
	space.minFree = 200
	for _, mayReclaim := range []bool{false, true} {
		if _, err := space.reserve(math.MaxInt64, mayReclaim); !errors.Is(err, errNoSpace) {
			t.Errorf("reclaiming %v: %v", mayReclaim, err)
		}
		if _, err := space.reserve(1, mayReclaim); !errors.Is(err, errNoSpace) {
			t.Errorf("a byte more, reclaiming %v: %v", mayReclaim, err)
		}
	}
}

func TestSpaceOfADiskThatCannotBeAsked(t *testing.T) {
	t.Parallel()
	space := testSpace(t, 0)
	space.diskSpace = func() (diskUsage, error) { return diskUsage{}, fmt.Errorf("%w: gone", errStoreDown) }
	s := space.newSpool("")
	if err := s.setSize(1); !errors.Is(err, errStoreDown) {
		t.Error(err)
	}
	s.discard()
}
