// spool.go: the temporary file, or the memory, that a body grows in, those that read it
// while it grows, and the one account of the space that all spools take.

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// reserveAhead is how much space a body of unknown length has reserved ahead
	// of what is written: little enough that many such bodies find room, much
	// enough that the account is seldom asked.
	reserveAhead = 8 << 20
	// heldBackBytes of a body with a known digest are given to a reader only
	// when all of it has verified, so that nobody completes a wrong body.
	heldBackBytes = 64 << 10
	// maxSmallBody is the largest body, in bytes, that grows in memory, and that a store
	// keeps there. Metadata and manifests are smaller. They are asked for most, and a
	// file costs more than all else.
	maxSmallBody = 64 << 10
	// reclaimAhead is how far ahead of a body others are removed for it: a body that
	// breaks off has cost no more than that.
	reclaimAhead = 64 << 20
	// minSendfile is how many bytes must be there for a reader to open a file of its own:
	// the first bytes of a body are not to wait for that.
	minSendfile = 64 << 10
	// inodesPerFile is what a stored file takes: a directory, a body, a record.
	// entryOverhead are their blocks beside the bytes of the body, which outweigh the
	// index row.
	inodesPerFile = 3
	entryOverhead = 12 << 10
	// minFreeInodes is the part of the inodes that stays free, as a divisor.
	minFreeInodes = 50
)

var (
	// errDigest is a body that does not have the digest that was asked for.
	errDigest = fmt.Errorf("%w: the body does not have its digest", errBadUpstream)
	// errTooMuch is a body that is longer than its announced length.
	errTooMuch = fmt.Errorf("%w: the body is longer than it said", errBadUpstream)
)

// room is space on a disk.
type room struct{ bytes, inodes int64 }

// diskUsage says how much of a disk this process may still fill, and how large it is.
type diskUsage struct{ free, size room } // size.inodes 0: it has any number

// reclaimer removes what can be had again.
type reclaimer interface {
	// reclaimable is how much reclaim could free.
	reclaimable() room
	// reclaim frees need, if it can, and returns what it has freed. Before it removes
	// something it calls removing with the bytes of that.
	reclaim(need room, removing func(bytes int64)) room
}

// spoolSpace makes spools and accounts for the space that they will take, so
// that MIN_FREE stays free however many bodies grow at once. Its methods may be
// called concurrently.
type spoolSpace struct {
	createFile func() (*os.File, error) // a new temporary file; errNoSpace or errStoreDown
	isBroken   func() bool              // createFile is known to fail
	diskSpace  func() (diskUsage, error)
	minFree    int64     // bytes that stay free; -1: defaultMinFree of the disk
	reclaimer  reclaimer // nil: there is nothing to reclaim
	now        func() time.Time

	// mu guards the account. It is held while the disk is asked, or two spools would be
	// promised the same bytes. No other lock is taken under it.
	mu sync.Mutex
	account
	refused   int64 // bytes that could not be reserved last
	refusedAt time.Time
}

// refusalCounts is how long space that could not be had counts as missing, unless it can
// be had before that: a file that is too large for the disk may never be asked for again.
const refusalCounts = time.Minute

// account is what the spools that have not ended take.
type account struct {
	reserved int64 // promised to spools that have not written it yet
	owed     int64 // of that, what is not free yet and has to be reclaimed
	growing  int64 // how many spools there are
}

// add changes the account.
func (s *spoolSpace) add(d account) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved += d.reserved
	s.owed += d.owed
	s.growing += d.growing
}

// defaultMinFree is MIN_FREE where it is not given: 1 GiB, or 5 % of a disk that
// is smaller than 20 GiB.
func defaultMinFree(diskSize int64) int64 { return min(1<<30, diskSize/20) }

// reserve promises n bytes, and the inodes of a file, or returns errNoSpace. Where they
// are not free but can be reclaimed, short is what their spool has to reclaim before it
// needs them. Each byte is given back when it is on the disk, which accounts for it from
// then on, or is not needed any more.
func (s *spoolSpace) reserve(n int64, mayReclaim bool) (short room, err error) {
	err = s.findRoom(n, mayReclaim, func(missing room) {
		short = missing
		s.reserved += n
		s.owed += short.bytes
	})
	if errors.Is(err, errNoSpace) && mayReclaim {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.refused, s.refusedAt = n, s.now()
	}
	return short, err
}

// findRoom calls found, with mu held, with what would have to be reclaimed for n bytes
// more. errNoSpace: that is not reclaimable.
func (s *spoolSpace) findRoom(n int64, mayReclaim bool, found func(short room)) error {
	err := s.findAmong(room{}, n, found)
	if errors.Is(err, errNoSpace) && mayReclaim && s.reclaimer != nil {
		err = s.findAmong(s.reclaimer.reclaimable(), n, found) // asked without the lock: it may take long
	}
	return err
}

// findAmong is findRoom where so much is reclaimable.
func (s *spoolSpace) findAmong(reclaimable room, n int64, found func(short room)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	disk, err := s.diskSpace()
	if err != nil {
		return err
	}
	keep := s.minFree
	if keep < 0 {
		keep = defaultMinFree(disk.size.bytes)
	}
	n = min(n, math.MaxInt64/2) // an upstream may say any length, and the sum must not overflow
	short := room{bytes: max(0, keep+s.reserved-s.owed+s.growing*entryOverhead+n-disk.free.bytes)}
	if disk.size.inodes > 0 {
		short.inodes = max(0, disk.size.inodes/minFreeInodes+s.growing*inodesPerFile-disk.free.inodes)
	}
	if (short.bytes > 0 && s.owed+short.bytes > reclaimable.bytes) || short.inodes > reclaimable.inodes {
		return fmt.Errorf("%w: %d bytes and %d inodes are free, of which %d bytes are reserved and MIN_FREE keeps %d; %d more are needed", errNoSpace, disk.free.bytes, disk.free.inodes, s.reserved, keep, n)
	}
	found(short)
	return nil
}

// reclaim has owed bytes and inodes freed. errNoSpace: there is not enough any more.
func (s *spoolSpace) reclaim(need room) error {
	owed := need.bytes
	settle := func(bytes int64) {
		bytes = min(bytes, owed)
		owed -= bytes
		s.add(account{owed: -bytes})
	}
	// Bytes that are free and still owed would be promised to two spools.
	freed := s.reclaimer.reclaim(need, settle)
	settle(owed)
	if freed.bytes < need.bytes || freed.inodes < need.inodes {
		return fmt.Errorf("%w: %+v was to be reclaimed, and only %+v could be", errNoSpace, need, freed)
	}
	return nil
}

// check returns errNoSpace if nothing can be stored, or not what could not be lately.
func (s *spoolSpace) check() error {
	s.mu.Lock()
	need := int64(1)
	if s.now().Sub(s.refusedAt) < refusalCounts {
		need = s.refused
	}
	s.mu.Unlock()
	return s.findRoom(need, true, func(room) {})
}

// newSpool makes an empty spool for a body with that digest ("" is any). Its
// maker is its only writer; it calls setSize before the first Write, then
// end, settle and release.
func (s *spoolSpace) newSpool(digest string) *spool {
	s.add(account{growing: 1})
	return &spool{space: s, hash: newBodyHash(digest), size: -1, users: 1}
}

// spool is a body that is being written by one goroutine and read by any number
// of readers.
type spool struct {
	space *spoolSpace
	// Where the body is, from setSize on: the writer appends, everyone else reads at
	// offsets of their own.
	file   *os.File // nil: in memory
	memory []byte   // of a body of at most maxSmallBody bytes

	// The writer alone uses these.
	hash     *bodyHash
	reserved int64 // of the account, for bytes that the disk does not have yet
	owed     int64 // of that, what has to be reclaimed
	// isTransient: it is known before setSize that the body will not be stored, and nothing
	// is reclaimed for it.
	isTransient bool

	mu      sync.Mutex // guards the fields below; of the other locks only the account's is taken under it
	size    int64      // of the whole body; -1: not known
	written int64
	ended   error // nil: it grows; io.EOF: the body is whole and verified; else: no more will come
	users   int   // the writer and the readers: the last one closes the file
	changed broadcast
}

// setSize announces the size of the whole body (-1: not known), makes the place that it
// grows in, and reserves its space, or some ahead. errNoSpace: there is not enough.
func (s *spool) setSize(size int64) (err error) {
	needed := size
	if size < 0 {
		needed = reserveAhead
	}
	if err := s.reserveMore(max(0, needed-s.reserved)); err != nil {
		return err
	}
	if size >= 0 && size <= maxSmallBody {
		s.memory = make([]byte, size)
	} else if s.file, err = s.space.createFile(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = size
	return nil
}

// reserveMore reserves n bytes more, and reclaims of them what will be written soon.
func (s *spool) reserveMore(n int64) error {
	short, err := s.space.reserve(n, !s.isTransient)
	if err != nil {
		return err
	}
	s.reserved += n
	s.owed += short.bytes
	return s.reclaimOwed(short.inodes)
}

// reclaimOwed has these inodes reclaimed, and so much of what is owed that the next
// reclaimAhead bytes of the body have their space.
func (s *spool) reclaimOwed(inodes int64) error {
	due := max(0, s.owed-max(0, s.reserved-reclaimAhead))
	if due == 0 && inodes == 0 {
		return nil
	}
	s.owed -= due
	return s.space.reclaim(room{due, inodes})
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
	if s.owed > max(0, s.reserved-reclaimAhead/2) { // in steps of half of it
		if err := s.reclaimOwed(0); err != nil {
			return err
		}
	}
	if s.file == nil {
		copy(s.memory[s.written:], p)
	} else if _, err := s.file.Write(p); err != nil {
		return fmt.Errorf("%w: writing the spool: %w", errNoSpace, err)
	}
	s.mu.Lock()
	s.written += n
	s.changed.wake()
	s.mu.Unlock()
	if s.file != nil { // else the disk has it when it is stored
		s.reserved -= n
		s.space.add(account{reserved: -n})
	}
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

// end writes no more: what was reserved for more is free at once. Readers get err, which
// is not nil, behind what they may read: io.EOF says that the writer has verified the whole
// body. The first end counts.
func (s *spool) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil {
		return
	}
	inMemory := int64(len(s.memory)) // a store has still to write that
	s.space.add(account{reserved: inMemory - s.reserved, owed: -s.owed})
	s.reserved = inMemory
	if s.ended = err; err == io.EOF {
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

// body is what is written: a file, which a store may take, or a *bytes.Reader.
func (s *spool) body() io.ReaderAt {
	if s.file != nil {
		return s.file
	}
	return bytes.NewReader(s.memory[:s.written])
}

// settle follows end when the body is stored, or is not to be: it takes no space any more.
// The file's name goes, unless a store has taken it. Readers go on.
func (s *spool) settle() {
	s.space.add(account{reserved: -s.reserved, growing: -1})
	if s.file != nil {
		_ = os.Remove(s.file.Name())
	}
}

// release ends a use of the spool; the last one closes the file.
func (s *spool) release() {
	s.mu.Lock()
	s.users--
	last := s.users == 0
	s.mu.Unlock()
	if last && s.file != nil {
		_ = s.file.Close()
	}
}

// discard is what a writer without readers does in the end.
func (s *spool) discard() {
	s.end(io.ErrUnexpectedEOF)
	s.settle()
	s.release()
}

// newReader returns a reader that begins at the start of the body. It waits for
// bytes until ctx ends. A reader that holdsBack does not get the last
// heldBackBytes before the body is complete.
func (s *spool) newReader(ctx context.Context, holdsBack bool) *spoolReader {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users++
	return &spoolReader{spool: s, ctx: ctx, holdsBack: holdsBack, size: s.size}
}

// openFile is os.OpenFile for what is never polled, regular files and directories,
// without the five system calls by which that finds out: they take longer than opening.
func openFile(name string, flag int, perm uint32) (*os.File, error) {
	for {
		fd, err := syscall.Open(name, flag|syscall.O_CLOEXEC, perm)
		if err == nil {
			return os.NewFile(uintptr(fd), name), nil
		}
		if err != syscall.EINTR {
			return nil, &os.PathError{Op: "open", Path: name, Err: err}
		}
	}
}

// spoolReader reads a spool at its own pace. It is a fileSource and a
// growingBody, and seeks where the size was known when it was made. One
// goroutine at a time uses it; Close releases the spool.
type spoolReader struct {
	spool     *spool
	ctx       context.Context
	size      int64 // of the whole body when the reader was made; -1: not known
	holdsBack bool
	ownFile   *os.File // nil: not opened; read the spool's descriptor or memory
	offset    int64
}

// available says what can be done at the reader's offset: read n bytes, stop
// with err (io.EOF at the end of a complete body), or wait for changed.
func (r *spoolReader) available() (n int64, changed <-chan struct{}, err error) {
	s := r.spool
	s.mu.Lock()
	defer s.mu.Unlock()
	readable := s.written
	if r.holdsBack && s.ended != io.EOF {
		if s.size >= 0 {
			readable = min(readable, s.size-heldBackBytes)
		} else {
			readable -= heldBackBytes
		}
	}
	if readable > r.offset {
		return readable - r.offset, nil, nil
	}
	if s.ended != nil {
		return 0, nil, s.ended
	}
	return 0, s.changed.next(), nil
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
	p = p[:min(int64(len(p)), n)]
	if r.spool.file == nil {
		copy(p, r.spool.memory[r.offset:])
	} else if _, err := r.spool.file.ReadAt(p, r.offset); err != nil {
		return 0, err
	}
	r.offset += int64(len(p))
	return len(p), nil
}

// nextFile: see fileSource.
func (r *spoolReader) nextFile(limit int64) (*os.File, int64, error) {
	n, err := r.waitForBytes()
	if err != nil {
		return nil, 0, err
	}
	n = min(n, limit)
	if shared := r.spool.file; shared != nil && r.ownFile == nil && n >= minSendfile {
		// With an offset of its own, which sendfile needs. Once a store has taken the name the
		// shared descriptor is read.
		r.ownFile, _ = openFile(shared.Name(), os.O_RDONLY, 0)
	}
	if r.ownFile == nil {
		return nil, n, nil
	}
	if _, err := r.ownFile.Seek(r.offset, io.SeekStart); err != nil {
		return nil, 0, err
	}
	return r.ownFile, n, nil
}

// advanceBy: see fileSource.
func (r *spoolReader) advanceBy(n int64) { r.offset += n }

// unread: see memorySource.
func (r *spoolReader) unread() ([]byte, bool) {
	s := r.spool
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file != nil || s.ended != io.EOF {
		return nil, false
	}
	return s.memory[min(r.offset, s.written):s.written], true
}

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

// bodyHash hashes what is written to it: always with SHA-256, by which the store knows a
// body, and with SHA-512 where the body's digest is one.
type bodyHash struct {
	io.Writer
	sha256, sha512 hash.Hash // sha512 is nil if the digest is none
	digest         string    // that it is to have: sha256:HEX or sha512:HEX; "" is any
}

func newBodyHash(digest string) *bodyHash {
	h := &bodyHash{sha256: sha256.New(), digest: digest}
	h.Writer = h.sha256
	if strings.HasPrefix(digest, "sha512:") {
		h.sha512 = sha512.New()
		h.Writer = io.MultiWriter(h.sha256, h.sha512)
	}
	return h
}

// sumHex is the SHA-256 of what was written.
func (h *bodyHash) sumHex() string { return hex.EncodeToString(h.sha256.Sum(nil)) }

// verify compares what was written with the digest. A mismatch is errDigest.
func (h *bodyHash) verify() error {
	if h.digest == "" {
		return nil
	}
	got := "sha256:" + h.sumHex()
	if h.sha512 != nil {
		got = "sha512:" + hex.EncodeToString(h.sha512.Sum(nil))
	}
	if got != h.digest {
		return fmt.Errorf("%w: %s instead of %s", errDigest, got, h.digest)
	}
	return nil
}
