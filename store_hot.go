// store_hot.go: hot copies, which are copies on local disk of the objects in S3 that
// were used last, so that a replica serves them at the speed of its disk.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"sync"
)

const (
	// maxHotCopies bounds the copies, at some 300 bytes of memory each.
	maxHotCopies = 100_000
	// maxParallelCopies bounds the copies that are made at once. Further files get
	// their copy from a later reader.
	maxParallelCopies = 4
	// maxChunksAhead is how many chunks (4 MiB in all) a client may be ahead of its
	// copy: 40 ms of a disk that stalls, at 1 Gbit/s. A client never waits.
	maxChunksAhead = 64
)

var _ objects = (*tieredStore)(nil)

// tieredStore is an s3Store with hot copies on disk. An object is durable in S3 before
// it has a copy, so any copy may be lost. A copy is served as long as trustsCopy; after
// that S3 is asked whether it still has that version.
type tieredStore struct {
	*s3Store
	disk      *diskStore
	space     *spoolSpace    // may call reclaim: no key is locked when something is reserved
	copies    *lru[validity] // the copies that may be used
	copyLocks keyedLock      // for changes of a key's copy on disk; taken before the locks of disk and copies

	// isInTrouble reports whether the log says already that the disk or S3 cannot be used.
	// It is set before the first use.
	isInTrouble func() bool

	mu      sync.Mutex      // guards copying; no other lock is taken under it
	copying map[string]bool // the keys of which a copy is being made

	ctx    context.Context // of what runs in the background
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// newTiered puts up to limit bytes of copies in disk, which nothing else uses, in
// front of s3; 0 keeps none. Copies grow in spools of space. findCopies finds what an
// earlier process left. The caller closes the tier before s3.
func newTiered(s3 *s3Store, disk *diskStore, limit int64, space *spoolSpace) *tieredStore {
	ctx, cancel := context.WithCancel(context.Background())
	return &tieredStore{s3Store: s3, disk: disk, space: space, copies: newLRU[validity](limit, maxHotCopies),
		isInTrouble: func() bool { return false }, copying: map[string]bool{}, ctx: ctx, cancel: cancel}
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
		t.removeCopies(t.copies.putOldest(key, entryCost(rec.Size), validity{}))
		return nil
	})
}

// mayCopy: one image of a disk must not evict everything else.
func (t *tieredStore) mayCopy(size int64) bool { return entryCost(size) <= t.copies.budget/2 }

// open implements objects.
func (t *tieredStore) open(ctx context.Context, key string, off int64) (*object, error) {
	if v, found := t.copies.get(key); found {
		if obj, err := t.openCopy(ctx, key, off, v); obj != nil || err != nil {
			return obj, err
		}
	}
	v := t.validityNow(key)
	obj, err := t.s3Store.open(ctx, key, off)
	if err != nil || obj.body == nil || off > 0 || !t.mayCopy(obj.rec.Size) {
		return obj, err
	}
	obj.body = &copyingBody{s3Reader: obj.body.(*s3Reader), tier: t, rec: obj.rec, validity: v}
	return obj, nil
}

// openCopy opens the copy of key, which was valid at v. Once that does not suffice, S3
// is asked whether it still has that version, and the copy is dropped if not. While S3
// is down, the copy of an immutable file is good. Without an object and an error S3 has
// to be asked for it.
func (t *tieredStore) openCopy(ctx context.Context, key string, off int64, v validity) (*object, error) {
	obj, err := t.disk.open(ctx, key, off)
	if err != nil && ctx.Err() == nil {
		t.log.Debug("a hot copy cannot be used", "key", key, "error", err)
		t.invalidate(key)
		return nil, nil
	}
	if err != nil || t.trustsCopy(obj.rec.Class, v) {
		return obj, err
	}
	v = t.validityNow(key)
	now, err := t.openRecord(ctx, key)
	switch {
	case err == nil && now.rec.SHA256 == obj.rec.SHA256 && now.rec.Fetched.Equal(obj.rec.Fetched):
		if t.isCurrent(key, v) {
			t.copies.update(key, v)
		}
		return obj, nil
	case errors.Is(err, errStoreDown) && obj.rec.Class == immutable:
		return obj, nil
	case err == nil, errors.Is(err, fs.ErrNotExist):
		t.invalidate(key)
	}
	if obj.body != nil {
		obj.body.Close()
	}
	return nil, err
}

// put implements objects. The spool becomes the copy once S3 has the object. That this
// fails is no error: there is no copy then.
func (t *tieredStore) put(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error {
	v, err := t.upload(ctx, key, rec, spool, when)
	if err != nil {
		t.copies.update(key, validity{}) // the new version may have arrived: ask S3 first
		return err
	}
	t.copies.remove(key)
	if !t.mayCopy(rec.Size) {
		t.removeCopy(key)
	} else if err := t.installCopy(ctx, key, rec, spool, v); err != nil && ctx.Err() == nil {
		t.warn("no hot copy was made", key, err)
	}
	return nil
}

// warn logs what failed, as a warning unless the log tells of the cause already.
func (t *tieredStore) warn(what, key string, err error) {
	level := slog.LevelWarn
	if t.isInTrouble() {
		level = slog.LevelDebug
	}
	t.log.Log(t.ctx, level, what, "key", key, "error", err)
}

// installCopy makes spool, the body of rec, the copy of key, unless key was invalidated
// since v.
func (t *tieredStore) installCopy(ctx context.Context, key string, rec *record, spool io.ReaderAt, v validity) (err error) {
	if err := t.copyLocks.lock(ctx, key); err != nil {
		return err
	}
	added, evicted := false, []lruEntry[validity](nil)
	isValid := func() bool { return t.isCurrent(key, v) }
	if isValid() { // else there may be a newer copy
		if err = t.disk.put(ctx, key, rec, spool, putCondition{}); err == nil {
			added, evicted = t.copies.putIf(key, entryCost(rec.Size), v, isValid)
		}
	}
	t.copyLocks.unlock(key)
	if !added {
		t.removeCopy(key) // an older one, too: put has taken it out of the account
	}
	t.removeCopies(evicted) // without the lock: two that wait for each other's key would wait forever
	return err
}

// delete implements objects.
func (t *tieredStore) delete(ctx context.Context, key string) error {
	err := t.s3Store.delete(ctx, key)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		t.invalidate(key)
	} else {
		t.copies.update(key, validity{}) // it may be deleted: ask S3 first
	}
	return err
}

// invalidate implements objects. key's copy is not used any more when it
// returns; the file is removed in the background.
func (t *tieredStore) invalidate(key string) {
	t.s3Store.invalidate(key)
	if t.copies.remove(key) && t.ctx.Err() == nil {
		t.wg.Go(func() { t.removeCopy(key) })
	}
}

// reclaimable implements reclaimer.
func (t *tieredStore) reclaimable() room {
	files, bytes := t.copies.size()
	return room{bytes, int64(files) * inodesPerFile}
}

// reclaim implements reclaimer: it removes the copies that were used longest ago.
func (t *tieredStore) reclaim(need room, removing func(bytes int64)) (freed room) {
	for freed.bytes < need.bytes || freed.inodes < need.inodes {
		evicted := t.copies.evict(max(1, need.bytes-freed.bytes))
		if len(evicted) == 0 {
			break
		}
		for _, e := range evicted {
			removing(e.cost)
			t.removeCopy(e.key)
			freed.bytes += e.cost
			freed.inodes += inodesPerFile
		}
	}
	return freed
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
	if _, found := t.copies.get(key); found {
		return
	}
	if err := t.disk.delete(context.WithoutCancel(t.ctx), key); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.warn("a hot copy cannot be removed", key, err)
	}
}

// verify implements verifiableObjects for the copies and the objects.
func (t *tieredStore) verify(ctx context.Context, report func(key string, err error)) (checked int, err error) {
	copies, err := t.disk.verify(ctx, func(key string, err error) { report("hot copy of "+key, err) })
	checked, s3err := t.s3Store.verify(ctx, report)
	return copies + checked, errors.Join(err, s3err)
}

// tryStartCopy starts the copy of what b reads, unless one of that key is being made or
// too many are.
func (t *tieredStore) tryStartCopy(b *copyingBody) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.copying[b.key] || len(t.copying) == maxParallelCopies || t.ctx.Err() != nil {
		return false
	}
	t.copying[b.key] = true
	chunks := make(chan []byte, maxChunksAhead)
	b.chunks = chunks
	t.wg.Go(func() { t.runCopy(b.key, b.rec, b.validity, chunks) })
	return true
}

// runCopy makes the copy of what arrives, if that is the whole body. It is not if the
// client did not read everything, or was faster than the disk.
func (t *tieredStore) runCopy(key string, rec *record, v validity, chunks <-chan []byte) {
	spool := t.space.newSpool("")
	defer spool.discard()
	err := spool.setSize(rec.Size)
	written := int64(0) // and reserved of the tier's budget
	for chunk := range chunks {
		if err == nil {
			// Chunk by chunk: a client that is faster than the disk soon ends its copy,
			// which then has not evicted the gigabytes of the whole file for nothing.
			written += int64(len(chunk))
			if evicted := t.copies.reserve(int64(len(chunk))); len(evicted) > 0 {
				t.wg.Go(func() { t.removeCopies(evicted) }) // the copy is not held up
			}
			err = spool.appendUnhashed(chunk)
		}
		copyBuffers.Put((*[copyBufferSize]byte)(chunk[:copyBufferSize]))
	}
	t.copies.reserve(-written)
	if err == nil && written == rec.Size {
		var sum string // only now: a client in the same network may be faster than SHA-256
		sum, err = hashBody(t.ctx, spool.body())
		switch {
		case err == nil && sum == rec.SHA256:
			err = t.installCopy(t.ctx, key, rec, spool.body(), v)
		case err == nil:
			err = fmt.Errorf("the object in S3 has sha256 %s, its record %s: run verify", sum, rec.SHA256)
		}
	}
	if err != nil && t.ctx.Err() == nil {
		t.warn("no hot copy was made", key, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.copying, key)
}

// copyingBody is a body from S3 of which a copy is made if it is read from its
// beginning to its end. Like s3Reader, it is used by one goroutine at a time.
type copyingBody struct {
	*s3Reader
	tier     *tieredStore
	rec      *record
	validity             // from before S3 was asked
	chunks   chan []byte // of the body, from copyBuffers, for runCopy; nil: it does not run
	chunk    []byte      // of the body, being filled for chunks
	fed      int64       // what the copy got, and will get with chunk; -1: it gets nothing more
}

func (b *copyingBody) Read(p []byte) (int, error) {
	at := b.off
	n, err := b.s3Reader.Read(p)
	if n > 0 && b.fed >= 0 {
		b.feedCopy(at, p[:n])
	}
	return n, err
}

// sendFromSocket: see socketSource. The copy gets its bytes from Read.
func (b *copyingBody) sendFromSocket(w io.Writer, limit int64) int64 {
	if b.fed >= 0 {
		return 0
	}
	return b.s3Reader.sendFromSocket(w, limit)
}

func (b *copyingBody) Close() error {
	err := b.s3Reader.Close()
	b.endCopy()
	return err
}

// feedCopy gives p, which stands at that offset of the body, to the copy. The first
// bytes start it.
func (b *copyingBody) feedCopy(at int64, p []byte) {
	if at != b.fed || (at == 0 && !b.tier.tryStartCopy(b)) {
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
		case b.chunks <- b.chunk:
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
	if b.chunks != nil {
		close(b.chunks)
	}
	b.chunks, b.chunk, b.fed = nil, nil, -1 // the garbage collector takes a chunk that is not full
}
