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
	// hotOverhead is charged for each copy beside its bytes: the blocks of its
	// directory, its record and the end of its body.
	hotOverhead = 12 << 10
	// hotFiles bounds the copies, at some 300 bytes of memory each.
	hotFiles = 100_000
	// hotShare of the tier is the most that one file may take: a single image
	// of a disk must not push everything else out.
	hotShare = 2
	// hotCopies are made at once; further files wait for their next reader.
	hotCopies = 4
	// hotAhead is how many chunks (2 MiB) a client may be ahead of the copy
	// before it leaves the copy behind: it is never made to wait.
	hotAhead = 32
)

var (
	_ objects        = (*tiered)(nil)
	_ cachingObjects = (*tiered)(nil)
)

// tiered implements objects in S3 with copies on disk. What is stored is
// durable in S3 before there is a copy, so that any copy may be lost. A copy
// answers as long as s3Store.trusts its ticket; then S3 is asked whether it
// still has that version.
type tiered struct {
	cold  *s3Store
	disk  *diskStore
	room  func(n int64) error // nil while n more bytes may be written
	log   *slog.Logger
	files *recency      // the copies that may be used
	turns turns         // by key: who changes the copy on disk
	slots chan struct{} // of copies being made

	mu      sync.Mutex // guards copying
	copying map[string]bool

	ctx    context.Context // of what runs in the background
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// newTiered puts up to limit bytes in disk, which is the tier's alone, before
// cold; 0 keeps none. load finds what an earlier process left there. The
// caller closes the tier first, then cold.
func newTiered(cold *s3Store, disk *diskStore, limit int64, room func(n int64) error) *tiered {
	ctx, cancel := context.WithCancel(context.Background())
	return &tiered{cold: cold, disk: disk, room: room, log: cold.log, files: newRecency(limit, hotFiles),
		slots: make(chan struct{}, hotCopies), copying: map[string]bool{}, ctx: ctx, cancel: cancel}
}

// close ends what runs in the background.
func (t *tiered) close() {
	t.cancel()
	t.wg.Wait()
}

// load finds the copies of an earlier process. Each is used again once S3 was
// asked about it.
func (t *tiered) load(ctx context.Context) error {
	return t.disk.walk(ctx, func(key string, rec *record) error {
		t.removeAll(t.files.addLast(kept{key: key, cost: rec.Size + hotOverhead}))
		return nil
	})
}

func (t *tiered) wants(size int64) bool { return size+hotOverhead <= t.files.limit/hotShare }

// open: see objects.
func (t *tiered) open(ctx context.Context, key string, off int64) (*object, error) {
	if k, ok := t.files.get(key); ok {
		if obj, err := t.warm(ctx, key, off, k); obj != nil || err != nil {
			return obj, err
		}
	}
	at := t.cold.ticket(key)
	obj, err := t.cold.open(ctx, key, off)
	if err != nil || obj.body == nil || off > 0 || !t.wants(obj.rec.Size) {
		return obj, err
	}
	if body, ok := obj.body.(*s3Reader); ok {
		obj.body = &teeBody{s3Reader: body, t: t, rec: obj.rec, ticket: at}
	}
	return obj, nil
}

// warm answers from the copy; with neither object nor error S3 has to.
func (t *tiered) warm(ctx context.Context, key string, off int64, k kept) (*object, error) {
	obj, err := t.disk.open(ctx, key, off)
	if ctx.Err() != nil {
		return nil, err
	}
	if err != nil {
		t.log.Debug("a local copy cannot be used", "key", key, "error", err)
		t.invalidate(key)
		return nil, nil
	}
	if t.cold.trusts(obj.rec.Class, k.ticket) {
		return obj, nil
	}
	good, err := t.recheck(ctx, key, obj.rec)
	if good {
		return obj, nil
	}
	if obj.body != nil {
		obj.body.Close()
	}
	return nil, err
}

// recheck asks S3 whether it still has the version of a copy; one that it does
// not have is dropped. While S3 is down, immutable files are good enough.
func (t *tiered) recheck(ctx context.Context, key string, rec *record) (good bool, err error) {
	at := t.cold.ticket(key)
	now, err := t.cold.head(ctx, key)
	switch {
	case err == nil && now.SHA256 == rec.SHA256 && now.Fetched.Equal(rec.Fetched):
		if t.cold.valid(key, at) {
			t.files.confirm(key, at)
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
func (t *tiered) put(ctx context.Context, key string, rec *record, spool *os.File) error {
	at, err := t.cold.store(ctx, key, rec, spool)
	if err != nil {
		t.files.confirm(key, ticket{}) // it may have arrived: ask before the copy is used
		return err
	}
	t.files.drop(key)
	if !t.wants(rec.Size) {
		t.remove(key)
		return nil
	}
	if err := t.install(ctx, key, rec, spool, at); err != nil && ctx.Err() == nil {
		t.log.Warn("no local copy", "key", key, "error", err)
	}
	return nil
}

// install makes spool, rec's body, the copy of key. Other copies go only when
// key's turn is over: two that wait for each other's would wait for ever.
func (t *tiered) install(ctx context.Context, key string, rec *record, spool *os.File, at ticket) error {
	if err := t.turns.take(ctx, key); err != nil {
		return err
	}
	out, err := t.exchange(ctx, key, rec, spool, at)
	t.turns.give(key)
	t.removeAll(out)
	return err
}

// exchange does install's work, unless key was announced to be replaced or
// removed after at. It has key's turn.
func (t *tiered) exchange(ctx context.Context, key string, rec *record, spool *os.File, at ticket) (out []kept, err error) {
	valid := func() bool { return t.cold.valid(key, at) }
	if !valid() {
		return nil, nil
	}
	if err := t.disk.put(ctx, key, rec, spool); err != nil {
		t.files.drop(key)
		return nil, errors.Join(err, t.discard(key))
	}
	added, out := t.files.add(kept{key: key, cost: rec.Size + hotOverhead, ticket: at}, valid)
	if !added {
		return nil, t.discard(key)
	}
	return out, nil
}

// delete: see objects.
func (t *tiered) delete(ctx context.Context, key string) error {
	err := t.cold.delete(ctx, key)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		t.invalidate(key)
	} else {
		t.files.confirm(key, ticket{})
	}
	return err
}

// walk: see objects.
func (t *tiered) walk(ctx context.Context, f func(key string, rec *record) error) error {
	return t.cold.walk(ctx, f)
}

// invalidate drops key's copy: the object was replaced or removed. The copy is not
// used any more when it returns; its file goes in the background.
func (t *tiered) invalidate(key string) {
	t.cold.invalidate(key)
	if t.files.drop(key) && t.ctx.Err() == nil {
		t.wg.Go(func() { t.remove(key) })
	}
}

// invalidateAll has S3 asked about each copy before it is used again.
func (t *tiered) invalidateAll() { t.cold.invalidateAll() }

func (t *tiered) refusesWrites() bool { return t.cold.refusesWrites() }

// shrink frees about n bytes of disk for what needs them more, and says
// whether it freed any.
func (t *tiered) shrink(n int64) bool {
	out := t.files.shrink(n)
	t.removeAll(out)
	return len(out) > 0
}

func (t *tiered) removeAll(out []kept) {
	for _, k := range out {
		t.remove(k.key)
	}
}

// remove removes key's file, unless there is a new copy by now.
func (t *tiered) remove(key string) {
	if t.turns.take(t.ctx, key) != nil {
		return // at the end: load will find it
	}
	defer t.turns.give(key)
	if t.files.has(key) {
		return
	}
	if err := t.discard(key); err != nil {
		t.log.Warn("removing a local copy", "key", key, "error", err)
	}
}

func (t *tiered) discard(key string) error {
	if err := t.disk.delete(context.WithoutCancel(t.ctx), key); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// verify checks the copies and the objects.
func (t *tiered) verify(ctx context.Context, report func(key string, err error)) (checked, dropped int, err error) {
	checked, dropped, err = t.disk.verify(ctx, func(key string, err error) { report("local copy of "+key, err) })
	c, d, cerr := t.cold.verify(ctx, report)
	return checked + c, dropped + d, errors.Join(err, cerr)
}

// hotCopy is a copy being made of what a client reads.
type hotCopy struct {
	key, etag string
	rec       *record
	ticket    ticket // from before S3 was asked
	chunks    chan hotChunk
	rest      bool // set before chunks is closed: the client is too fast, get the rest from S3
}

type hotChunk struct {
	buf *[copyBufferSize]byte
	n   int
}

// begin starts a copy, if there is none of that key on its way and a slot is
// free.
func (t *tiered) begin(c *hotCopy) bool {
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
	t.wg.Go(func() { t.copy(c) })
	return true
}

func (t *tiered) copy(c *hotCopy) {
	err := t.make(c)
	if err != nil && t.ctx.Err() == nil {
		t.log.Warn("no local copy", "key", c.key, "error", err)
	}
	<-t.slots
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.copying, c.key)
}

// make makes a copy of what comes in, if that is the whole body with its
// record's sha256.
func (t *tiered) make(c *hotCopy) error {
	cost := c.rec.Size + hotOverhead
	t.removeAll(t.files.reserve(cost))
	spool, err := t.spool(c.rec.Size)
	var h hash.Hash
	if err == nil {
		defer spool.Close()
		defer os.Remove(spool.Name())
		h, err = t.receive(c, spool)
	} else {
		c.discard()
	}
	t.files.release(cost)
	if err != nil || h == nil {
		return err
	}
	if sum := hex.EncodeToString(h.Sum(nil)); sum != c.rec.SHA256 {
		return fmt.Errorf("the object in S3 has sha256 %s, its record %s: run verify", sum, c.rec.SHA256)
	}
	return t.install(t.ctx, c.key, c.rec, spool, c.ticket)
}

// receive writes and hashes what the client reads; nil when that was not all.
func (t *tiered) receive(c *hotCopy, spool *os.File) (h hash.Hash, err error) {
	h = sha256.New()
	w, n := io.MultiWriter(spool, h), int64(0)
	for ch := range c.chunks {
		_, err = w.Write(ch.buf[:ch.n])
		copyBuffers.Put(ch.buf)
		if err != nil {
			c.discard()
			return nil, err
		}
		n += int64(ch.n)
	}
	if c.rest {
		n, err = t.finish(c, n, w)
	}
	if n != c.rec.Size {
		return nil, err
	}
	return h, err
}

// discard lets the client go on without a copy.
func (c *hotCopy) discard() {
	for ch := range c.chunks {
		copyBuffers.Put(ch.buf)
	}
}

// spool is a file for a copy of that size, where MIN_FREE allows it.
func (t *tiered) spool(size int64) (*os.File, error) {
	if t.room != nil {
		if err := t.room(size); err != nil {
			return nil, err
		}
	}
	return t.disk.spool()
}

// finish reads what a client was too fast for, of the same version.
func (t *tiered) finish(c *hotCopy, n int64, w io.Writer) (int64, error) {
	r := &s3Reader{s: t.cold, key: c.key, etag: c.etag, size: c.rec.Size, off: n, at: n}
	r.ctx, r.cancel = context.WithCancelCause(t.ctx)
	defer r.Close()
	k, err := io.Copy(w, r)
	if errors.Is(err, errS3PreconditionFailed) {
		err = nil // replaced: not a copy, and nothing to report
	}
	return n + k, err
}

// teeBody is a body from S3 of which a copy is made while it is read from its
// beginning to its end.
type teeBody struct {
	*s3Reader
	t      *tiered
	rec    *record
	ticket ticket

	tee   sync.Mutex // guards the rest, for the reason of s3Reader.mu
	pos   int64      // where the reader stands
	fed   int64      // what the copy was given, or will be with chunk
	copy  *hotCopy
	chunk hotChunk
	done  bool // nothing more will be given
}

func (b *teeBody) Read(p []byte) (int, error) {
	n, err := b.s3Reader.Read(p)
	b.tee.Lock()
	defer b.tee.Unlock()
	b.feed(p[:n])
	b.pos += int64(n)
	return n, err
}

func (b *teeBody) Seek(off int64, whence int) (int64, error) {
	to, err := b.s3Reader.Seek(off, whence)
	b.tee.Lock()
	defer b.tee.Unlock()
	if err == nil {
		b.pos = to
	}
	return to, err
}

func (b *teeBody) Close() error {
	err := b.s3Reader.Close()
	b.tee.Lock()
	defer b.tee.Unlock()
	b.end(false)
	return err
}

// feed gives the copy what follows on what it has.
func (b *teeBody) feed(p []byte) {
	if len(p) == 0 || b.done {
		return
	}
	if b.pos != b.fed {
		b.end(false)
		return
	}
	if b.copy == nil {
		c := &hotCopy{key: b.key, etag: b.etag, rec: b.rec, ticket: b.ticket, chunks: make(chan hotChunk, hotAhead)}
		if !b.t.begin(c) {
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
			b.end(true)
			return
		}
	}
	if b.fed == b.rec.Size {
		b.end(false)
	}
}

// end gives the copy nothing more.
func (b *teeBody) end(rest bool) {
	if b.copy != nil && !b.done {
		b.copy.rest = rest
		close(b.copy.chunks)
	}
	if b.chunk.buf != nil {
		copyBuffers.Put(b.chunk.buf)
	}
	b.done, b.chunk = true, hotChunk{}
}

// kept is what a recency keeps of one key.
type kept struct {
	key    string
	cost   int64
	ticket ticket  // when S3 was known to have it
	rec    *record // with text: of a record in memory
	text   string
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

func (r *recency) get(key string) (kept, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	el := r.byKey[key]
	if el == nil {
		return kept{}, false
	}
	r.order.MoveToFront(el)
	return *el.Value.(*kept), true
}

// add puts an entry in front, if valid says so under the lock that drop takes
// too, and returns those that had to go for it.
func (r *recency) add(k kept, valid func() bool) (added bool, out []kept) {
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
func (r *recency) addLast(k kept) (out []kept) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byKey[k.key] == nil {
		r.byKey[k.key] = r.order.PushBack(&k)
		r.cost += k.cost
	}
	return r.trim(0)
}

// confirm renews an entry's ticket.
func (r *recency) confirm(key string, t ticket) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if el := r.byKey[key]; el != nil {
		el.Value.(*kept).ticket = t
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
func (r *recency) reserve(n int64) (out []kept) {
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
func (r *recency) shrink(n int64) (out []kept) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.trim(max(0, r.limit-r.cost) + n)
}

// trim lets the last entries go until spare of the budget is free. The lock
// is held.
func (r *recency) trim(spare int64) (out []kept) {
	for r.order.Len() > 0 && (r.cost+spare > r.limit || r.order.Len() > r.most) {
		el := r.order.Back()
		out = append(out, *el.Value.(*kept))
		r.remove(el)
	}
	return out
}

func (r *recency) remove(el *list.Element) {
	if el != nil {
		k := r.order.Remove(el).(*kept)
		delete(r.byKey, k.key)
		r.cost -= k.cost
	}
}
