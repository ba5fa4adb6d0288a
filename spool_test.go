package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
)

// testSpace makes spools in a directory of the test, on a disk that has that
// much free.
func testSpace(t *testing.T, free uint64) *spoolSpace {
	dir := t.TempDir()
	return &spoolSpace{
		createFile: func() (*os.File, error) { return os.CreateTemp(dir, "*") },
		diskSpace:  func() (uint64, uint64, error) { return free, free, nil },
	}
}

func newTestSpool(t *testing.T, space *spoolSpace, digest string, size int64) *spool {
	t.Helper()
	s, err := space.newSpool(digest)
	must(t, err)
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
		s.complete()
		s.removeName()
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
	if err := s.hash.verifyDigest(sha256Of([]byte("another"))); !errors.Is(err, errDigest) {
		t.Errorf("a wrong body verifies: %v", err)
	}
	s.fail(failed)
	s.fail(errors.New("the first end counts"))
	s.complete()
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
		s.complete()
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
	space.minFree = 10 * mib
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
	must(t, unknown.setSize(10*mib)) // a part that continues it told
	wantReserved(49*mib + reserveAhead)

	tooLarge, err := space.newSpool("")
	must(t, err)
	if err := tooLarge.setSize(40 * mib); !errors.Is(err, errNoSpace) {
		t.Errorf("more than there is was promised: %v", err)
	}
	freed := int64(0)
	space.freeUp = func(n int64) bool {
		freed = n
		known.fail(errors.New("makes room"))
		return true
	}
	if err := tooLarge.setSize(40 * mib); err != nil || freed != 40*mib {
		t.Errorf("after %d bytes were asked for: %v", freed, err)
	}
	wantReserved(40*mib + reserveAhead)
	for _, s := range []*spool{known, unknown, tooLarge} {
		s.discard()
	}
	wantReserved(0)
	if err := space.reserve(91 * mib); !errors.Is(err, errNoSpace) {
		t.Errorf("MIN_FREE is given away: %v", err)
	}
	must(t, space.reserve(90*mib))
	space.release(90 * mib)
	wantReserved(0)
}

func TestSpaceOfADiskThatCannotBeAsked(t *testing.T) {
	t.Parallel()
	space := testSpace(t, 0)
	space.diskSpace = func() (uint64, uint64, error) { return 0, 0, fmt.Errorf("%w: gone", errStoreDown) }
	s, err := space.newSpool("")
	must(t, err)
	if err := s.setSize(1); !errors.Is(err, errStoreDown) {
		t.Error(err)
	}
	s.discard()
}
