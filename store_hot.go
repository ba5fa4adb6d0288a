// store_hot.go: hot copies, which are copies on local disk of the objects in S3 that
// were used last, so that a replica serves them at the speed of its disk.

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
)

const (
	// hotCopyOverhead is charged for each copy beside its bytes: the blocks of its
	// directory, its record and the end of its body.
	hotCopyOverhead = 12 << 10
	// maxHotCopies bounds the copies, at some 300 bytes of memory each.
	maxHotCopies = 100_000
	// maxHotShare is the part of the tier that one file may take, as a divisor: one
	// image of a disk must not evict everything else.
	maxHotShare = 2
	// maxParallelCopies bounds the copies that are made at once. Further files get
	// their copy from a later reader.
	maxParallelCopies = 4
	// maxChunksAhead is how many chunks (4 MiB in all) a client may be ahead of its
	// copy: 40 ms of a disk that stalls, at 1 Gbit/s. A client never waits.
	maxChunksAhead = 64
	// copyBudgetStep is how far ahead of the bytes written others are evicted. A
	// client that is faster than the disk soon ends its copy, which then has not
	// evicted the gigabytes of the whole file for nothing.
	copyBudgetStep = 8 << 20
)

var (
	_ objects        = (*tieredStore)(nil)
	_ cachingObjects = (*tieredStore)(nil)
)

// tieredStore implements objects in S3 with hot copies on disk. An object is durable
// in S3 before it has a copy, so any copy may be lost. A copy is served as long as
// s3Store.trustsCopy; after that S3 is asked whether it still has that version.
type tieredStore struct {
	s3        *s3Store
	disk      *diskStore
	checkRoom func(n int64) error // nil while n more bytes may be written
	log       *slog.Logger
	copies    *lru[validity] // the copies that may be used
	copyLocks keyedLock      // for changes of a key's copy on disk; taken before the locks of disk and copies

	mu      sync.Mutex      // guards copying; no other lock is taken under it
	copying map[string]bool // the keys of which a copy is being made

	ctx    context.Context // of what runs in the background
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// newTiered puts up to limit bytes of copies in disk, which nothing else uses, in
// front of s3; 0 keeps none. checkRoom is nil or returns nil while n more bytes may be
// written. findCopies finds what an earlier process left. The caller closes the tier
// before s3.
func newTiered(s3 *s3Store, disk *diskStore, limit int64, checkRoom func(n int64) error) *tieredStore {
	if checkRoom == nil {
		checkRoom = func(int64) error { return nil }
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &tieredStore{s3: s3, disk: disk, checkRoom: checkRoom, log: s3.log, copies: newLRU[validity](limit, maxHotCopies),
		copying: map[string]bool{}, ctx: ctx, cancel: cancel}
}

// Close ends what runs in the background.
func (t *tieredStore) Close() {
	t.cancel()
	t.wg.Wait()
}

// findCopies finds the copies of an earlier process. S3 is asked about each before it
// is used.
func (t *tieredStore) findCopies(ctx context.Context) error {
	return t.disk.walk(ctx, func(key string, rec *record) error {
		t.removeCopies(t.copies.putOldest(key, rec.Size+hotCopyOverhead, validity{}))
		return nil
	})
}

func (t *tieredStore) mayCopy(size int64) bool {
	return size+hotCopyOverhead <= t.copies.budget/maxHotShare
}

// open implements objects.
func (t *tieredStore) open(ctx context.Context, key string, off int64) (*object, error) {
	if v, found := t.copies.get(key); found {
		if obj, err := t.openCopy(ctx, key, off, v); obj != nil || err != nil {
			return obj, err
		}
	}
	v := t.s3.validityNow(key)
	obj, err := t.s3.open(ctx, key, off)
	if err != nil || obj.body == nil || off > 0 || !t.mayCopy(obj.rec.Size) {
		return obj, err
	}
	obj.body = &copyingBody{s3Reader: obj.body.(*s3Reader), tier: t, hot: &hotCopy{key: key, rec: obj.rec, validity: v}}
	return obj, nil
}

// openCopy opens the copy of key, which was valid at v. Without an object and an
// error S3 has to be asked for it.
func (t *tieredStore) openCopy(ctx context.Context, key string, off int64, v validity) (*object, error) {
	obj, err := t.disk.open(ctx, key, off)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		t.log.Debug("a hot copy cannot be used", "key", key, "error", err)
		t.invalidate(key)
		return nil, nil
	}
	if t.s3.trustsCopy(obj.rec.Class, v) {
		return obj, nil
	}
	good, err := t.recheckCopy(ctx, key, obj.rec)
	if good {
		return obj, nil
	}
	if obj.body != nil {
		obj.body.Close()
	}
	return nil, err
}

// recheckCopy asks S3 whether it still has the version of a copy, and drops the copy
// if not. While S3 is down, the copy of an immutable file is good.
func (t *tieredStore) recheckCopy(ctx context.Context, key string, rec *record) (good bool, err error) {
	v := t.s3.validityNow(key)
	now, err := t.s3.headRecord(ctx, key)
	switch {
	case err == nil && now.SHA256 == rec.SHA256 && now.Fetched.Equal(rec.Fetched):
		if t.s3.isCurrent(key, v) {
			t.setValidity(key, v)
		}
		return true, nil
	case errors.Is(err, errStoreDown):
		return rec.Class == immutable, err
	case err == nil, errors.Is(err, fs.ErrNotExist):
		t.invalidate(key)
	}
	return false, err
}

// setValidity says when key's copy was valid. With the zero validity S3 is asked
// before it is used again.
func (t *tieredStore) setValidity(key string, v validity) {
	t.copies.update(key, func(old *validity) { *old = v })
}

// put implements objects. The spool becomes the copy once S3 has the object. That this
// fails is no error: there is no copy then.
func (t *tieredStore) put(ctx context.Context, key string, rec *record, spool *os.File, create bool) error {
	v, err := t.s3.upload(ctx, key, rec, spool, create)
	if err != nil {
		t.setValidity(key, validity{}) // the new version may have arrived
		return err
	}
	t.copies.remove(key)
	if !t.mayCopy(rec.Size) {
		t.removeCopy(key)
		return nil
	}
	if err := t.installCopy(ctx, key, rec, spool, v); err != nil && ctx.Err() == nil {
		t.log.Warn("no hot copy was made", "key", key, "error", err)
	}
	return nil
}

// installCopy makes spool, the body of rec, the copy of key. Other copies are evicted
// after key's lock is given back: two that wait for each other's key would wait
// forever.
func (t *tieredStore) installCopy(ctx context.Context, key string, rec *record, spool *os.File, v validity) error {
	if err := t.copyLocks.lock(ctx, key); err != nil {
		return err
	}
	evicted, err := t.replaceCopy(ctx, key, rec, spool, v)
	t.copyLocks.unlock(key)
	t.removeCopies(evicted)
	return err
}

// replaceCopy does the work of installCopy, unless key was invalidated since v. The
// caller holds key's lock.
func (t *tieredStore) replaceCopy(ctx context.Context, key string, rec *record, spool *os.File, v validity) (evicted []lruEntry[validity], err error) {
	valid := func() bool { return t.s3.isCurrent(key, v) }
	if !valid() {
		return nil, nil
	}
	if err := t.disk.put(ctx, key, rec, spool, false); err != nil {
		t.copies.remove(key)
		return nil, errors.Join(err, t.deleteCopyFile(key))
	}
	added, evicted := t.copies.putIf(key, rec.Size+hotCopyOverhead, v, valid)
	if !added {
		return nil, t.deleteCopyFile(key)
	}
	return evicted, nil
}

// delete implements objects.
func (t *tieredStore) delete(ctx context.Context, key string) error {
	err := t.s3.delete(ctx, key)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		t.invalidate(key)
	} else {
		t.setValidity(key, validity{}) // it may be deleted
	}
	return err
}

// walk implements objects.
func (t *tieredStore) walk(ctx context.Context, f func(key string, rec *record) error) error {
	return t.s3.walk(ctx, f)
}

// invalidate implements cachingObjects. key's copy is not used any more when it
// returns; the file is removed in the background.
func (t *tieredStore) invalidate(key string) {
	t.s3.invalidate(key)
	if t.copies.remove(key) && t.ctx.Err() == nil {
		t.wg.Go(func() { t.removeCopy(key) })
	}
}

// invalidateAll implements cachingObjects. S3 is asked about each copy before it is
// used again.
func (t *tieredStore) invalidateAll() { t.s3.invalidateAll() }

// refusesWrites implements cachingObjects.
func (t *tieredStore) refusesWrites() bool { return t.s3.refusesWrites() }

// freeSpace removes copies worth about n bytes, those used longest ago, for something
// that needs the space more. It reports whether it removed any.
func (t *tieredStore) freeSpace(n int64) bool {
	evicted := t.copies.evict(n)
	t.removeCopies(evicted)
	return len(evicted) > 0
}

func (t *tieredStore) removeCopies(evicted []lruEntry[validity]) {
	for _, e := range evicted {
		t.removeCopy(e.key)
	}
}

// removeCopy removes the file of key's copy, unless there is a new copy by now.
func (t *tieredStore) removeCopy(key string) {
	if t.copyLocks.lock(t.ctx, key) != nil {
		return // the tier is closed: findCopies will find it
	}
	defer t.copyLocks.unlock(key)
	if t.copies.contains(key) {
		return
	}
	if err := t.deleteCopyFile(key); err != nil {
		t.log.Warn("a hot copy cannot be removed", "key", key, "error", err)
	}
}

func (t *tieredStore) deleteCopyFile(key string) error {
	if err := t.disk.delete(context.WithoutCancel(t.ctx), key); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// verify implements verifiableObjects for the copies and the objects.
func (t *tieredStore) verify(ctx context.Context, report func(key string, err error)) (checked, dropped int, err error) {
	checked, dropped, err = t.disk.verify(ctx, func(key string, err error) { report("hot copy of "+key, err) })
	c, d, s3err := t.s3.verify(ctx, report)
	return checked + c, dropped + d, errors.Join(err, s3err)
}

// hotCopy is a copy being made of the body that a client reads.
type hotCopy struct {
	validity // from before S3 was asked
	key      string
	rec      *record
	chunks   chan []byte // of the body, from copyBuffers; closed by the client's side
	reserved int64       // of the tier's budget; runCopy's alone
}

// tryStartCopy starts a copy, unless one of that key is being made or too many are.
func (t *tieredStore) tryStartCopy(c *hotCopy) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.copying[c.key] || len(t.copying) == maxParallelCopies || t.ctx.Err() != nil {
		return false
	}
	t.copying[c.key] = true
	c.chunks = make(chan []byte, maxChunksAhead)
	t.wg.Go(func() { t.runCopy(c) })
	return true
}

// runCopy makes the copy of what arrives, if that is the whole body.
func (t *tieredStore) runCopy(c *hotCopy) {
	spool, err := t.spoolCopy(c)
	for chunk := range c.chunks { // the client goes on without a copy
		putChunk(chunk)
	}
	t.copies.release(c.reserved)
	if spool != nil {
		err = t.installCopy(t.ctx, c.key, c.rec, spool, c.validity)
		spool.Close()
		os.Remove(spool.Name())
	}
	if err != nil && t.ctx.Err() == nil {
		t.log.Warn("no hot copy was made", "key", c.key, "error", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.copying, c.key)
}

// spoolCopy writes the chunks of c to a temporary file. It returns the file, which the
// caller closes and removes, if that is the whole body and has the record's sha256.
// Without a file and an error the client did not read everything, or was too fast.
func (t *tieredStore) spoolCopy(c *hotCopy) (_ *os.File, err error) {
	if err := t.makeRoom(c.rec.Size); err != nil {
		return nil, err
	}
	spool, err := t.disk.newSpool()
	if err != nil {
		return nil, err
	}
	h, written := sha256.New(), int64(0)
	w := io.MultiWriter(spool, h)
	for chunk := range c.chunks {
		t.reserveBudget(c, written+int64(len(chunk)))
		n, werr := w.Write(chunk)
		putChunk(chunk)
		if written += int64(n); werr != nil {
			err = werr
			break
		}
	}
	if err == nil && written == c.rec.Size {
		sum := hex.EncodeToString(h.Sum(nil))
		if sum == c.rec.SHA256 {
			return spool, nil
		}
		err = fmt.Errorf("the object in S3 has sha256 %s, its record %s: run verify", sum, c.rec.SHA256)
	}
	spool.Close()
	os.Remove(spool.Name())
	return nil, err
}

// makeRoom returns nil if a copy of that size fits on the disk, for which older copies
// may have to go.
func (t *tieredStore) makeRoom(size int64) error {
	err := t.checkRoom(size)
	if errors.Is(err, errNoSpace) && t.freeSpace(size) {
		err = t.checkRoom(size)
	}
	return err
}

// reserveBudget takes budget for the first n bytes of c, and some more. What is
// evicted for it is removed in the background, so that the copy is not held up.
func (t *tieredStore) reserveBudget(c *hotCopy, n int64) {
	if n <= c.reserved {
		return
	}
	step := min(n+copyBudgetStep, c.rec.Size+hotCopyOverhead) - c.reserved
	c.reserved += step
	if evicted := t.copies.reserve(step); len(evicted) > 0 {
		t.wg.Go(func() { t.removeCopies(evicted) })
	}
}

// copyingBody is a body from S3 of which a copy is made if it is read from its
// beginning to its end. Like s3Reader, it is used by one goroutine at a time.
type copyingBody struct {
	*s3Reader
	tier  *tieredStore
	hot   *hotCopy // nil: nothing more is given to it
	chunk []byte   // of the body, being filled for hot
	fed   int64    // what hot got, and will get with chunk
}

func (b *copyingBody) Read(p []byte) (int, error) {
	at := b.off
	n, err := b.s3Reader.Read(p)
	if n > 0 && b.hot != nil {
		b.feedCopy(at, p[:n])
	}
	return n, err
}

func (b *copyingBody) Close() error {
	err := b.s3Reader.Close()
	b.endCopy()
	return err
}

// feedCopy gives p, which stands at that offset of the body, to the copy. The first
// bytes start it.
func (b *copyingBody) feedCopy(at int64, p []byte) {
	if at != b.fed || (at == 0 && !b.tier.tryStartCopy(b.hot)) {
		b.endCopy()
		return
	}
	for len(p) > 0 {
		if b.chunk == nil {
			b.chunk = copyBuffers.Get().(*[copyBufferSize]byte)[:0]
		}
		n := min(len(p), copyBufferSize-len(b.chunk))
		b.chunk = append(b.chunk, p[:n]...)
		p, b.fed = p[n:], b.fed+int64(n)
		if len(b.chunk) < copyBufferSize && b.fed < b.size {
			return
		}
		select {
		case b.hot.chunks <- b.chunk:
			b.chunk = nil
		default: // the client is faster than the disk: a later reader makes the copy
			b.endCopy()
			return
		}
	}
	if b.fed == b.size {
		b.endCopy()
	}
}

// endCopy gives the copy nothing more.
func (b *copyingBody) endCopy() {
	if b.hot != nil && b.hot.chunks != nil {
		close(b.hot.chunks)
	}
	if b.chunk != nil {
		putChunk(b.chunk)
	}
	b.hot, b.chunk = nil, nil
}

func putChunk(chunk []byte) { copyBuffers.Put((*[copyBufferSize]byte)(chunk[:copyBufferSize])) }
