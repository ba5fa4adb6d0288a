// store_hot.go: copies on local disk of what S3 has, those used last, so that
// a replica serves them at the speed of its disk.

package main

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
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
	// maxHotShare of the tier is the most that one file may take: a single image
	// of a disk must not push everything else out.
	maxHotShare = 2
	// maxParallelCopies are made at once; further files wait for their next reader.
	maxParallelCopies = 4
	// maxChunksAhead is how many chunks (2 MiB) a client may be ahead of the copy
	// before it leaves the copy behind: it is never made to wait.
	maxChunksAhead = 32
)

var (
	_ objects        = (*tieredStore)(nil)
	_ cachingObjects = (*tieredStore)(nil)
)

// tieredStore implements objects in S3 with copies on disk. What is stored is
// durable in S3 before there is a copy, so that any copy may be lost. A copy
// answers as long as s3Store.trusts its ticket; then S3 is asked whether it
// still has that version.
type tieredStore struct {
	cold      *s3Store
	disk      *diskStore
	checkRoom func(n int64) error // nil while n more bytes may be written
	log       *slog.Logger
	copies    *recency      // the copies that may be used
	copyLocks keyedLock     // by key: for changes of the copy on disk
	slots     chan struct{} // of copies being made

	mu      sync.Mutex // guards copying
	copying map[string]bool

	ctx    context.Context // of what runs in the background
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// newTiered puts up to limit bytes in disk, which is the tier's alone, before
// cold; 0 keeps none. load finds what an earlier process left there. The
// caller closes the tier first, then cold.
func newTiered(cold *s3Store, disk *diskStore, limit int64, room func(n int64) error) *tieredStore {
	ctx, cancel := context.WithCancel(context.Background())
	return &tieredStore{cold: cold, disk: disk, checkRoom: room, log: cold.log, copies: newRecency(limit, maxHotCopies),
		slots: make(chan struct{}, maxParallelCopies), copying: map[string]bool{}, ctx: ctx, cancel: cancel}
}

// Close ends what runs in the background.
func (t *tieredStore) Close() {
	t.cancel()
	t.wg.Wait()
}

// findCopies finds the copies of an earlier process. Each is used again once S3 was
// asked about it.
func (t *tieredStore) findCopies(ctx context.Context) error {
	return t.disk.walk(ctx, func(key string, rec *record) error {
		t.removeCopies(t.copies.addLast(keptEntry{key: key, cost: rec.Size + hotCopyOverhead}))
		return nil
	})
}

func (t *tieredStore) mayKeep(size int64) bool {
	return size+hotCopyOverhead <= t.copies.limit/maxHotShare
}

// open: see objects.
func (t *tieredStore) open(ctx context.Context, key string, off int64) (*object, error) {
	if k, ok := t.copies.get(key); ok {
		if obj, err := t.openCopy(ctx, key, off, k); obj != nil || err != nil {
			return obj, err
		}
	}
	stamp := t.cold.stampOf(key)
	obj, err := t.cold.open(ctx, key, off)
	if err != nil || obj.body == nil || off > 0 || !t.mayKeep(obj.rec.Size) {
		return obj, err
	}
	if body, ok := obj.body.(*s3Reader); ok {
		obj.body = &copyingBody{s3Reader: body, t: t, rec: obj.rec, ticket: stamp}
	}
	return obj, nil
}

// openCopy answers from the copy; with neither object nor error S3 has to.
func (t *tieredStore) openCopy(ctx context.Context, key string, off int64, k keptEntry) (*object, error) {
	obj, err := t.disk.open(ctx, key, off)
	if ctx.Err() != nil {
		return nil, err
	}
	if err != nil {
		t.log.Debug("a local copy cannot be used", "key", key, "error", err)
		t.invalidate(key)
		return nil, nil
	}
	if t.cold.trustsCopy(obj.rec.Class, k.stamp) {
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

// recheckCopy asks S3 whether it still has the version of a copy; one that it does
// not have is dropped. While S3 is down, immutable files are good enough.
func (t *tieredStore) recheckCopy(ctx context.Context, key string, rec *record) (good bool, err error) {
	stamp := t.cold.stampOf(key)
	now, err := t.cold.headRecord(ctx, key)
	switch {
	case err == nil && now.SHA256 == rec.SHA256 && now.Fetched.Equal(rec.Fetched):
		if t.cold.isCurrent(key, stamp) {
			t.copies.confirm(key, stamp)
		}
		return true, nil
	case errors.Is(err, errStoreDown):
		return rec.Class == immutable, err
	case err == nil, errors.Is(err, fs.ErrNotExist):
		t.invalidate(key)
	}
	return false, err
}

// put: see objects. The spool becomes the copy once S3 has the object; where
// that fails there is none.
func (t *tieredStore) put(ctx context.Context, key string, rec *record, spool *os.File) error {
	stamp, err := t.cold.putStamped(ctx, key, rec, spool)
	if err != nil {
		t.copies.confirm(key, changeStamp{}) // it may have arrived: ask before the copy is used
		return err
	}
	t.copies.drop(key)
	if !t.mayKeep(rec.Size) {
		t.removeCopy(key)
		return nil
	}
	if err := t.installCopy(ctx, key, rec, spool, stamp); err != nil && ctx.Err() == nil {
		t.log.Warn("no local copy", "key", key, "error", err)
	}
	return nil
}

// installCopy makes spool, rec's body, the copy of key. Other copies go only when
// key's turn is over: two that wait for each other's would wait for ever.
func (t *tieredStore) installCopy(ctx context.Context, key string, rec *record, spool *os.File, stamp changeStamp) error {
	if err := t.copyLocks.lock(ctx, key); err != nil {
		return err
	}
	out, err := t.replaceCopy(ctx, key, rec, spool, stamp)
	t.copyLocks.unlock(key)
	t.removeCopies(out)
	return err
}

// replaceCopy does install's work, unless key was announced to be replaced or
// removed after at. It has key's turn.
func (t *tieredStore) replaceCopy(ctx context.Context, key string, rec *record, spool *os.File, stamp changeStamp) (out []keptEntry, err error) {
	valid := func() bool { return t.cold.isCurrent(key, stamp) }
	if !valid() {
		return nil, nil
	}
	if err := t.disk.put(ctx, key, rec, spool); err != nil {
		t.copies.drop(key)
		return nil, errors.Join(err, t.deleteCopyFile(key))
	}
	added, out := t.copies.add(keptEntry{key: key, cost: rec.Size + hotCopyOverhead, stamp: stamp}, valid)
	if !added {
		return nil, t.deleteCopyFile(key)
	}
	return out, nil
}

// delete: see objects.
func (t *tieredStore) delete(ctx context.Context, key string) error {
	err := t.cold.delete(ctx, key)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		t.invalidate(key)
	} else {
		t.copies.confirm(key, changeStamp{})
	}
	return err
}

// walk: see objects.
func (t *tieredStore) walk(ctx context.Context, f func(key string, rec *record) error) error {
	return t.cold.walk(ctx, f)
}

// invalidate drops key's copy: the object was replaced or removed. The copy is not
// used any more when it returns; its file goes in the background.
func (t *tieredStore) invalidate(key string) {
	t.cold.invalidate(key)
	if t.copies.drop(key) && t.ctx.Err() == nil {
		t.wg.Go(func() { t.removeCopy(key) })
	}
}

// invalidateAll has S3 asked about each copy before it is used again.
func (t *tieredStore) invalidateAll() { t.cold.invalidateAll() }

func (t *tieredStore) refusesWrites() bool { return t.cold.refusesWrites() }

// freeSpace frees about n bytes of disk for what needs them more, and says
// whether it freed any.
func (t *tieredStore) freeSpace(n int64) bool {
	out := t.copies.shrink(n)
	t.removeCopies(out)
	return len(out) > 0
}

func (t *tieredStore) removeCopies(out []keptEntry) {
	for _, k := range out {
		t.removeCopy(k.key)
	}
}

// removeCopy removes key's file, unless there is a new copy by now.
func (t *tieredStore) removeCopy(key string) {
	if t.copyLocks.lock(t.ctx, key) != nil {
		return // at the end: load will find it
	}
	defer t.copyLocks.unlock(key)
	if t.copies.has(key) {
		return
	}
	if err := t.deleteCopyFile(key); err != nil {
		t.log.Warn("removing a local copy", "key", key, "error", err)
	}
}

func (t *tieredStore) deleteCopyFile(key string) error {
	if err := t.disk.delete(context.WithoutCancel(t.ctx), key); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// verify checks the copies and the objects.
func (t *tieredStore) verify(ctx context.Context, report func(key string, err error)) (checked, dropped int, err error) {
	checked, dropped, err = t.disk.verify(ctx, func(key string, err error) { report("local copy of "+key, err) })
	c, d, cerr := t.cold.verify(ctx, report)
	return checked + c, dropped + d, errors.Join(err, cerr)
}

// hotCopy is a copy being made of what a client reads.
type hotCopy struct {
	key, etag string
	rec       *record
	ticket    changeStamp // from before S3 was asked
	chunks    chan hotChunk
	rest      bool // set before chunks is closed: the client is too fast, get the rest from S3
}

type hotChunk struct {
	buf *[copyBufferSize]byte
	n   int
}

// tryStartCopy starts a copy, if there is none of that key on its way and a slot is
// free.
func (t *tieredStore) tryStartCopy(c *hotCopy) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.copying[c.key] || t.ctx.Err() != nil {
		return false
	}
	select {
	case t.slots <- struct{}{}:
	default:
		return false
	}
	t.copying[c.key] = true
	t.wg.Go(func() { t.runCopy(c) })
	return true
}

func (t *tieredStore) runCopy(c *hotCopy) {
	err := t.makeCopy(c)
	if err != nil && t.ctx.Err() == nil {
		t.log.Warn("no local copy", "key", c.key, "error", err)
	}
	<-t.slots
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.copying, c.key)
}

// makeCopy makes a copy of what comes in, if that is the whole body with its
// record's sha256.
func (t *tieredStore) makeCopy(c *hotCopy) error {
	cost := c.rec.Size + hotCopyOverhead
	t.removeCopies(t.copies.reserve(cost))
	spool, err := t.newSpool(c.rec.Size)
	var h hash.Hash
	if err == nil {
		defer spool.Close()
		defer os.Remove(spool.Name())
		h, err = t.receiveChunks(c, spool)
	} else {
		c.discardChunks()
	}
	t.copies.release(cost)
	if err != nil || h == nil {
		return err
	}
	if sum := hex.EncodeToString(h.Sum(nil)); sum != c.rec.SHA256 {
		return fmt.Errorf("the object in S3 has sha256 %s, its record %s: run verify", sum, c.rec.SHA256)
	}
	return t.installCopy(t.ctx, c.key, c.rec, spool, c.ticket)
}

// receiveChunks writes and hashes what the client reads; nil when that was not all.
func (t *tieredStore) receiveChunks(c *hotCopy, spool *os.File) (h hash.Hash, err error) {
	h = sha256.New()
	w, n := io.MultiWriter(spool, h), int64(0)
	for ch := range c.chunks {
		_, err = w.Write(ch.buf[:ch.n])
		copyBuffers.Put(ch.buf)
		if err != nil {
			c.discardChunks()
			return nil, err
		}
		n += int64(ch.n)
	}
	if c.rest {
		n, err = t.readRest(c, n, w)
	}
	if n != c.rec.Size {
		return nil, err
	}
	return h, err
}

// discardChunks lets the client go on without a copy.
func (c *hotCopy) discardChunks() {
	for ch := range c.chunks {
		copyBuffers.Put(ch.buf)
	}
}

// newSpool is a file for a copy of that size, where MIN_FREE allows it.
func (t *tieredStore) newSpool(size int64) (*os.File, error) {
	if t.checkRoom != nil {
		if err := t.checkRoom(size); err != nil {
			return nil, err
		}
	}
	return t.disk.newSpool()
}

// readRest reads what a client was too fast for, of the same version.
func (t *tieredStore) readRest(c *hotCopy, n int64, w io.Writer) (int64, error) {
	r := &s3Reader{s: t.cold, key: c.key, etag: c.etag, size: c.rec.Size, off: n, at: n}
	r.ctx, r.cancel = context.WithCancelCause(t.ctx)
	defer r.Close()
	k, err := io.Copy(w, r)
	if errors.Is(err, errS3PreconditionFailed) {
		err = nil // replaced: not a copy, and nothing to report
	}
	return n + k, err
}

// copyingBody is a body from S3 of which a copy is made while it is read from its
// beginning to its end.
type copyingBody struct {
	*s3Reader
	t      *tieredStore
	rec    *record
	ticket changeStamp

	copyMu sync.Mutex // guards the rest, for the reason of s3Reader.mu
	pos    int64      // where the reader stands
	fed    int64      // what the copy was given, or will be with chunk
	copy   *hotCopy
	chunk  hotChunk
	done   bool // nothing more will be given
}

func (b *copyingBody) Read(p []byte) (int, error) {
	n, err := b.s3Reader.Read(p)
	b.copyMu.Lock()
	defer b.copyMu.Unlock()
	b.feedCopy(p[:n])
	b.pos += int64(n)
	return n, err
}

func (b *copyingBody) Seek(off int64, whence int) (int64, error) {
	to, err := b.s3Reader.Seek(off, whence)
	b.copyMu.Lock()
	defer b.copyMu.Unlock()
	if err == nil {
		b.pos = to
	}
	return to, err
}

func (b *copyingBody) Close() error {
	err := b.s3Reader.Close()
	b.copyMu.Lock()
	defer b.copyMu.Unlock()
	b.endCopy(false)
	return err
}

// feedCopy gives the copy what follows on what it has.
func (b *copyingBody) feedCopy(p []byte) {
	if len(p) == 0 || b.done {
		return
	}
	if b.pos != b.fed {
		b.endCopy(false)
		return
	}
	if b.copy == nil {
		c := &hotCopy{key: b.key, etag: b.etag, rec: b.rec, ticket: b.ticket, chunks: make(chan hotChunk, maxChunksAhead)}
		if !b.t.tryStartCopy(c) {
			b.done = true
			return
		}
		b.copy = c
	}
	for len(p) > 0 {
		if b.chunk.buf == nil {
			b.chunk.buf = copyBuffers.Get().(*[copyBufferSize]byte)
		}
		n := copy(b.chunk.buf[b.chunk.n:], p)
		p, b.fed, b.chunk.n = p[n:], b.fed+int64(n), b.chunk.n+n
		if b.chunk.n < copyBufferSize && b.fed < b.rec.Size {
			return
		}
		select {
		case b.copy.chunks <- b.chunk:
			b.chunk = hotChunk{}
		default:
			b.endCopy(true)
			return
		}
	}
	if b.fed == b.rec.Size {
		b.endCopy(false)
	}
}

// endCopy gives the copy nothing more.
func (b *copyingBody) endCopy(rest bool) {
	if b.copy != nil && !b.done {
		b.copy.rest = rest
		close(b.copy.chunks)
	}
	if b.chunk.buf != nil {
		copyBuffers.Put(b.chunk.buf)
	}
	b.done, b.chunk = true, hotChunk{}
}

// keptEntry is what a recency keeps of one key.
type keptEntry struct {
	key   string
	cost  int64
	stamp changeStamp // when S3 was known to have it
	rec   *record     // with text: of a record in memory
	text  string
}

// recency keeps entries within a budget, those used last.
type recency struct {
	mu    sync.Mutex // guards all below; never held across I/O
	byKey map[string]*list.Element
	order list.List // of *kept, used last in front
	cost  int64
	limit int64
	most  int // entries, for the memory they take
}

func newRecency(limit int64, most int) *recency {
	return &recency{byKey: map[string]*list.Element{}, limit: limit, most: most}
}

func (r *recency) get(key string) (keptEntry, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	el := r.byKey[key]
	if el == nil {
		return keptEntry{}, false
	}
	r.order.MoveToFront(el)
	return *el.Value.(*keptEntry), true
}

// add puts an entry in front, if valid says so under the lock that drop takes
// too, and returns those that had to go for it.
func (r *recency) add(k keptEntry, valid func() bool) (added bool, out []keptEntry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !valid() {
		return false, nil
	}
	r.remove(r.byKey[k.key])
	r.byKey[k.key] = r.order.PushFront(&k)
	r.cost += k.cost
	return true, r.trim(0)
}

// addLast is add for an entry of which nobody knows when it was used; a known
// one stays as it is.
func (r *recency) addLast(k keptEntry) (out []keptEntry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byKey[k.key] == nil {
		r.byKey[k.key] = r.order.PushBack(&k)
		r.cost += k.cost
	}
	return r.trim(0)
}

// confirm renews an entry's ticket.
func (r *recency) confirm(key string, stamp changeStamp) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if el := r.byKey[key]; el != nil {
		el.Value.(*keptEntry).stamp = stamp
	}
}

func (r *recency) drop(key string) (was bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	el := r.byKey[key]
	r.remove(el)
	return el != nil
}

func (r *recency) has(key string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.byKey[key] != nil
}

// reserve makes room for n that will be added later; release gives it back.
func (r *recency) reserve(n int64) (out []keptEntry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cost += n
	return r.trim(0)
}

func (r *recency) release(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cost -= n
}

// shrink lets entries worth n go.
func (r *recency) shrink(n int64) (out []keptEntry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.trim(max(0, r.limit-r.cost) + n)
}

// trim lets the last entries go until spare of the budget is free. The lock
// is held.
func (r *recency) trim(spare int64) (out []keptEntry) {
	for r.order.Len() > 0 && (r.cost+spare > r.limit || r.order.Len() > r.most) {
		el := r.order.Back()
		out = append(out, *el.Value.(*keptEntry))
		r.remove(el)
	}
	return out
}

func (r *recency) remove(el *list.Element) {
	if el != nil {
		k := r.order.Remove(el).(*keptEntry)
		delete(r.byKey, k.key)
		r.cost -= k.cost
	}
}
