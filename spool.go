// spool.go: the temporary file that a body grows in, those that read it while it
// grows, and the one account of the space that all spools take.

package main

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"
	"sync"
)

const (
	// reserveAhead is how much space a body of unknown length has reserved ahead
	// of what is written: little enough that many such bodies find room, much
	// enough that the account is seldom asked.
	reserveAhead = 8 << 20
	// heldBackBytes of a body with a known digest are given to a reader only
	// when all of it has verified, so that nobody completes a wrong body.
	heldBackBytes = 64 << 10
)

var (
	// errDigest is a body that does not have the digest that was asked for.
	errDigest = fmt.Errorf("%w: the body does not have its digest", errBadUpstream)
	// errTooMuch is a body that is longer than its announced length.
	errTooMuch = fmt.Errorf("%w: the body is longer than it said", errBadUpstream)
)

// spoolSpace makes spools and accounts for the space that they will take, so
// that MIN_FREE stays free however many bodies grow at once. Its methods may be
// called concurrently.
type spoolSpace struct {
	createFile func() (*os.File, error) // a new temporary file; errNoSpace or errStoreDown
	diskSpace  func() (free, size uint64, err error)
	minFree    int64 // bytes that stay free; -1: defaultMinFree of the disk
	// freeUp removes about n bytes of what can be had again, such as hot copies,
	// and reports whether it removed anything. nil: there is nothing.
	freeUp func(n int64) bool

	// mu guards reserved. It is held while the disk is asked, or two spools
	// would be promised the same bytes. No other lock is taken under it.
	mu       sync.Mutex
	reserved int64 // promised to spools that have not written it yet
}

// defaultMinFree is MIN_FREE where it is not given: 1 GiB, or 5 % of a disk that
// is smaller than 20 GiB.
func defaultMinFree(diskSize uint64) uint64 { return min(1<<30, diskSize/20) }

// reserve promises n bytes, or returns errNoSpace. Each byte is given back by
// release: when it is written, since the disk accounts for it from then on, or
// when it is not needed any more.
func (s *spoolSpace) reserve(n int64) error {
	err := s.tryReserve(n)
	if errors.Is(err, errNoSpace) && s.freeUp != nil && s.freeUp(n) {
		err = s.tryReserve(n)
	}
	return err
}

func (s *spoolSpace) tryReserve(n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	free, size, err := s.diskSpace()
	if err != nil {
		return err
	}
	keep := uint64(s.minFree)
	if s.minFree < 0 {
		keep = defaultMinFree(size)
	}
	if free < keep+uint64(s.reserved)+uint64(n) {
		return fmt.Errorf("%w: %d bytes are free, of which %d are reserved and MIN_FREE keeps %d; %d more are needed", errNoSpace, free, s.reserved, keep, n)
	}
	s.reserved += n
	return nil
}

func (s *spoolSpace) release(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved -= n
}

// newSpool makes an empty spool for a body with that digest ("" is any). Its
// maker is its only writer; it calls setSize before the first Write, then
// complete or fail, and release in the end.
func (s *spoolSpace) newSpool(digest string) (*spool, error) {
	file, err := s.createFile()
	if err != nil {
		return nil, err
	}
	return &spool{space: s, file: file, hash: newBodyHash(digest), size: -1, users: 1}, nil
}

// spool is a body that is being written by one goroutine and read by any number
// of readers.
type spool struct {
	space *spoolSpace
	file  *os.File // the writer appends; everyone else reads at offsets of their own

	// The writer alone uses these.
	hash     *bodyHash
	reserved int64 // of the account, for bytes that are still to come

	mu      sync.Mutex // guards the fields below; of the other locks only the account's is taken under it
	size    int64      // of the whole body; -1: not known
	written int64
	state   spoolState
	err     error // of a spool that failed
	users   int   // the writer and the readers: the last one closes the file
	changed broadcast
}

// spoolState says what is to be expected of a spool.
type spoolState int

const (
	spoolGrowing  spoolState = iota
	spoolComplete            // the body is whole and verified
	spoolFailed              // no more will come
)

// setSize announces the size of the whole body (-1: not known) and reserves what
// is missing of it, or some space ahead. errNoSpace: there is not enough.
func (s *spool) setSize(size int64) error {
	missing := int64(reserveAhead)
	if size >= 0 {
		missing = size - s.written
	}
	if err := s.reserveMore(missing - s.reserved); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = size
	return nil
}

func (s *spool) reserveMore(n int64) error {
	if n <= 0 {
		return nil
	}
	if err := s.space.reserve(n); err != nil {
		return err
	}
	s.reserved += n
	return nil
}

// Write appends p to the body, all of it or none. Its errors are errTooMuch, and
// errNoSpace for a spool that cannot grow, for whatever reason; either ends the spool.
func (s *spool) Write(p []byte) (int, error) {
	s.hash.Write(p) // first: readers are woken for as much as possible
	if err := s.appendUnhashed(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// appendUnhashed is Write for a body that may arrive faster than it can be hashed: its
// writer hashes the file in the end.
func (s *spool) appendUnhashed(p []byte) error {
	n := int64(len(p))
	if s.size >= 0 && s.written+n > s.size {
		return errTooMuch
	}
	if s.reserved < n { // the length is not known
		if err := s.reserveMore(n + reserveAhead - s.reserved); err != nil {
			return err
		}
	}
	if _, err := s.file.Write(p); err != nil {
		return fmt.Errorf("%w: writing the spool: %w", errNoSpace, err)
	}
	s.mu.Lock()
	s.written += n
	s.changed.wake()
	s.mu.Unlock()
	s.reserved -= n
	s.space.release(n)
	return nil
}

// broadcast wakes all that wait for a change of what its owner's mutex guards. That
// mutex is held for its methods.
type broadcast struct{ waiting chan struct{} } // nil: nobody waits

// next returns a channel that is closed by the next wake.
func (b *broadcast) next() <-chan struct{} {
	if b.waiting == nil {
		b.waiting = make(chan struct{})
	}
	return b.waiting
}

func (b *broadcast) wake() {
	if b.waiting != nil {
		close(b.waiting)
		b.waiting = nil
	}
}

// complete gives readers the body to its end. The writer has verified it.
func (s *spool) complete() { s.end(spoolComplete, nil) }

// fail ends the body, unless it is complete. Readers get err, which is not nil,
// behind what they may read.
func (s *spool) fail(err error) { s.end(spoolFailed, err) }

// end writes no more: what was reserved is free at once. The first end counts.
func (s *spool) end(state spoolState, err error) {
	s.space.release(s.reserved)
	s.reserved = 0
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != spoolGrowing {
		return
	}
	s.state, s.err = state, err
	if state == spoolComplete {
		s.size = s.written
	}
	s.changed.wake()
}

// progress is how much is written of how much; size is -1 while it is not known.
func (s *spool) progress() (written, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written, s.size
}

// removeName removes the file's name, unless a store has taken it. Readers go on.
func (s *spool) removeName() { _ = os.Remove(s.file.Name()) }

// release ends a use of the spool; the last one closes the file.
func (s *spool) release() {
	s.mu.Lock()
	s.users--
	last := s.users == 0
	s.mu.Unlock()
	if last {
		_ = s.file.Close()
	}
}

// discard is what a writer without readers does in the end.
func (s *spool) discard() {
	s.fail(io.ErrUnexpectedEOF)
	s.removeName()
	s.release()
}

// newReader returns a reader that begins at the start of the body. It waits for
// bytes until ctx ends. A reader that holdsBack does not get the last
// heldBackBytes before the body is complete.
func (s *spool) newReader(ctx context.Context, holdsBack bool) *spoolReader {
	r := &spoolReader{spool: s, ctx: ctx, holdsBack: holdsBack}
	// A file of its own has an offset of its own, which sendfile needs. Where a
	// store has taken the name already, another spool may have it by now; then
	// the shared descriptor is read.
	if own, err := os.Open(s.file.Name()); err == nil && sameFile(own, s.file) {
		r.ownFile = own
	} else if err == nil {
		_ = own.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users++
	r.size = s.size
	return r
}

func sameFile(a, b *os.File) bool {
	x, err1 := a.Stat()
	y, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// spoolReader reads a spool at its own pace. It is a fileSource and a
// growingBody, and seeks where the size was known when it was made. One
// goroutine at a time uses it; Close releases the spool.
type spoolReader struct {
	spool     *spool
	ctx       context.Context
	size      int64 // of the whole body when the reader was made; -1: not known
	holdsBack bool
	ownFile   *os.File // nil: read the spool's descriptor
	offset    int64
}

// available says what can be done at the reader's offset: read n bytes, stop
// with err (io.EOF at the end of a complete body), or wait for changed.
func (r *spoolReader) available() (n int64, changed <-chan struct{}, err error) {
	s := r.spool
	s.mu.Lock()
	defer s.mu.Unlock()
	switch n := s.readableBytes(r.holdsBack) - r.offset; {
	case n > 0:
		return n, nil, nil
	case s.state == spoolComplete:
		return 0, nil, io.EOF
	case s.state == spoolFailed:
		return 0, nil, s.err
	}
	return 0, s.changed.next(), nil
}

// readableBytes is how far readers may read. mu is held.
func (s *spool) readableBytes(holdsBack bool) int64 {
	switch {
	case s.state == spoolComplete || !holdsBack:
		return s.written
	case s.size >= 0:
		return max(0, min(s.written, s.size-heldBackBytes))
	}
	return max(0, s.written-heldBackBytes)
}

// waitForBytes waits until n bytes can be read at the reader's offset.
func (r *spoolReader) waitForBytes() (n int64, err error) {
	for {
		n, changed, err := r.available()
		if n > 0 || err != nil {
			return n, err
		}
		select {
		case <-changed:
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
}

func (r *spoolReader) Read(p []byte) (int, error) {
	n, err := r.waitForBytes()
	if err != nil {
		return 0, err
	}
	k, err := r.spool.file.ReadAt(p[:min(int64(len(p)), n)], r.offset)
	r.offset += int64(k)
	return k, err
}

// nextFile: see fileSource.
func (r *spoolReader) nextFile(limit int64) (*os.File, int64, error) {
	if r.ownFile == nil {
		return nil, 0, nil
	}
	n, err := r.waitForBytes()
	if err != nil {
		return nil, 0, err
	}
	if _, err := r.ownFile.Seek(r.offset, io.SeekStart); err != nil {
		return nil, 0, err
	}
	return r.ownFile, min(n, limit), nil
}

// advanceBy: see fileSource.
func (r *spoolReader) advanceBy(n int64) { r.offset += n }

// readyToRead: see growingBody.
func (r *spoolReader) readyToRead() bool {
	n, _, err := r.available()
	return n > 0 || err != nil
}

func (r *spoolReader) Seek(offset int64, whence int) (int64, error) {
	r.offset = seekOffset(offset, whence, r.offset, r.size)
	return r.offset, nil
}

func (r *spoolReader) Close() error {
	if r.ownFile != nil {
		_ = r.ownFile.Close()
	}
	r.spool.release()
	return nil
}

// bodyHash hashes a body: always with SHA-256, by which the store knows it, and
// with SHA-512 where its digest is one.
type bodyHash struct{ sha256, sha512 hash.Hash }

func newBodyHash(digest string) *bodyHash {
	h := &bodyHash{sha256: sha256.New()}
	if strings.HasPrefix(digest, "sha512:") {
		h.sha512 = sha512.New()
	}
	return h
}

func (h *bodyHash) Write(p []byte) (int, error) {
	h.sha256.Write(p)
	if h.sha512 != nil {
		h.sha512.Write(p)
	}
	return len(p), nil
}

// sumHex is the SHA-256 of what was written.
func (h *bodyHash) sumHex() string { return hex.EncodeToString(h.sha256.Sum(nil)) }

// verifyDigest compares what was written with a digest of the form sha256:HEX
// or sha512:HEX ("" is any). A mismatch is errDigest.
func (h *bodyHash) verifyDigest(digest string) error {
	if digest == "" {
		return nil
	}
	got := "sha256:" + h.sumHex()
	if h.sha512 != nil {
		got = "sha512:" + hex.EncodeToString(h.sha512.Sum(nil))
	}
	if got != digest {
		return fmt.Errorf("%w: %s instead of %s", errDigest, got, digest)
	}
	return nil
}
