// fill.go: the fetch of one file (a flight) and the spool it grows in. The
// decision to fetch is in cache.go.

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
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// fillsPerRemote bounds what one slow upstream can pile up.
	fillsPerRemote = 64
	// alonePerRemote is how many fills without a client may go on per remote;
	// a client that comes and goes must not leave an endless queue behind.
	alonePerRemote = 8
	// resumes bounds how often one body may break off.
	resumes = 3
	// holdBack of a body with a known digest is sent only once it verified, so
	// that nobody completes a wrong one.
	holdBack = 64 << 10
	// farAhead of the fill a range is worth an upstream request of its own.
	farAhead = 8 << 20
	// farPerFill bounds those requests for one fill.
	farPerFill = 8
	// lateAfter is how long clients of an expired copy wait for the whole new
	// one; package managers give up after 30 s of silence.
	lateAfter = 10 * time.Second
	// noHEADFor is how long a refused HEAD is remembered.
	noHEADFor = time.Hour
	// roomEvery is how often a growing spool looks at the free space.
	roomEvery = 64 << 20
)

// How a flight can end other than by a body that is complete (nil) or an
// upstream's failure.
var (
	errUnchanged = errors.New("the copy is still good")
	errLookAgain = errors.New("the store has it now")
	errNoSpool   = errors.New("no spool: each client asks upstream itself")
	errAbandoned = errors.New("nobody waits any more")
	errCrowded   = fmt.Errorf("%w: the remote's fills take too long", errBusy)
	errBroken    = fmt.Errorf("%w: the body broke off", errBadUpstream)
	errDigest    = fmt.Errorf("%w: the body does not have its digest", errBadUpstream)
	errTooLarge  = fmt.Errorf("%w: the body is too large", errBadUpstream)
)

// flight is one fetch of one key. Its goroutine belongs to the cache; clients
// wait for it and read its spool at their own pace.
type flight struct {
	c     *cache
	key   string
	want  want
	old   *record // the expired copy's, or nil
	ended int64   // cache.ended when the store was looked up

	ctx    context.Context
	cancel context.CancelCauseFunc
	far    chan struct{} // slots of far ranges

	// Guarded by cache.mu.
	waiters int
	running bool // has its slot
	landed  bool // left the table
	over    bool // its goroutine has ended

	mu        sync.Mutex // guards what follows
	changed   chan struct{}
	rec       *record // once headers are there; replaced when complete
	total     int64   // -1: not known
	storable  bool
	spool     *os.File
	sums      *sums // of what was written; the flight's goroutine alone uses it
	written   int64
	late      bool        // has kept holders of an expired copy waiting for too long
	timer     *time.Timer // to late
	complete  bool        // whole and verified
	purged    bool
	gone      bool // purged by another replica, which could not wait for storing
	storing   bool
	done      bool
	err       error
	validator string // for If-Range; "" when the upstream gave no strong one
	noRanges  bool   // the upstream answered otherwise when asked for one
	origin    int    // who answered
	followed  bool   // the body comes from another replica
	token     string // of the lease across replicas, while it is held
	release   func() // gives it back
}

// join returns the flight for key, a new one if there is none; lead says so.
// Each join is paired with a leave.
func (c *cache) join(key string, q want, cp *stored, ended int64) (f *flight, lead bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.flights[key]; f != nil {
		f.waiters++
		return f, false
	}
	f = &flight{c: c, key: key, want: q, ended: ended, waiters: 1, total: -1, sums: newSums(q.digest),
		changed: make(chan struct{}), far: make(chan struct{}, farPerFill)}
	if cp != nil {
		f.old = cp.rec
	}
	f.ctx, f.cancel = context.WithCancelCause(c.ctx)
	c.flights[key] = f
	c.fills.Go(f.run)
	return f, true
}

func (c *cache) flying(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flights[key] != nil
}

// leave is the end of one client's interest. A flight that has not begun ends
// with its last client; one that runs goes on alone, but not too many do.
func (f *flight) leave() {
	c := f.c
	c.mu.Lock()
	f.waiters--
	var victim *flight
	switch {
	case f.waiters > 0 || f.landed:
	case !f.running:
		victim = f
	default:
		victim = c.tooManyAlone(f.want.remote.name)
	}
	if victim != nil {
		c.land(victim)
	}
	closing := f.waiters == 0 && f.over
	c.mu.Unlock()
	if victim != nil {
		victim.cancel(errAbandoned)
	}
	if closing {
		f.closeSpool()
	}
}

// tooManyAlone picks the flight of a remote to drop: the one furthest from its
// end among those without clients, if they are too many. c.mu is held.
func (c *cache) tooManyAlone(name string) *flight {
	var victim *flight
	var most int64
	alone := 0
	for _, f := range c.flights {
		if f.waiters > 0 || f.want.remote.name != name {
			continue
		}
		left := f.left()
		if left == 0 {
			continue // it asks nothing of upstream any more, and is being stored
		}
		alone++
		if victim == nil || left > most {
			victim, most = f, left
		}
	}
	if alone <= alonePerRemote {
		return nil
	}
	return victim
}

// left is how many bytes are still to come; an unknown length is the furthest.
func (f *flight) left() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.total < 0 {
		return 1 << 62
	}
	return f.total - f.written
}

// land takes f out of the table. c.mu is held.
func (c *cache) land(f *flight) {
	f.landed = true
	if c.flights[f.key] == f {
		delete(c.flights, f.key)
	}
}

// run is the flight's goroutine.
func (f *flight) run() {
	c, name := f.c, f.want.remote.name
	err := f.waitSlot()
	if err == nil {
		c.metrics.addFillsInFlight(name, 1)
		err = f.fetch()
		c.metrics.addFillsInFlight(name, -1)
		<-c.slot(name)
	}
	if cause := context.Cause(f.ctx); cause != nil && err != nil {
		err = cause
	}
	f.settle(err)
	f.finish(err)
}

// slot is the semaphore of a remote's fills.
func (c *cache) slot(name string) chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.slots[name]
	if s == nil {
		s = make(chan struct{}, fillsPerRemote)
		c.slots[name] = s
	}
	return s
}

// waitSlot waits for the remote to have room for one more fill, as long as a
// client waits for this one, and not for long where a copy can answer.
func (f *flight) waitSlot() error {
	var enough <-chan time.Time
	if f.old != nil {
		t := time.NewTimer(copyTimeout)
		defer t.Stop()
		enough = t.C
	}
	select {
	case f.c.slot(f.want.remote.name) <- struct{}{}:
	case <-enough:
		return errCrowded
	case <-f.ctx.Done():
		return context.Cause(f.ctx)
	}
	f.c.mu.Lock()
	f.running = true
	f.c.mu.Unlock()
	return nil
}

// fetch does the asking. Its error is how the flight ended.
func (f *flight) fetch() error {
	if f.old != nil {
		f.mu.Lock()
		f.timer = time.AfterFunc(lateAfter, f.beLate)
		f.mu.Unlock()
	}
	other := f.takeLease()
	if f.mayBeStored(other) && f.storeHasIt() {
		return errLookAgain
	}
	if other != nil {
		err := f.follow(other)
		switch {
		case !errors.Is(err, errPeer):
			return err
		case f.rec == nil && f.storeHasIt(): // it ended before we asked
			return errLookAgain
		}
		f.c.log.Info("fetching what another replica began", "key", f.key, "replica", other.addr, "at", f.written, "error", err)
		if f.rec != nil {
			return f.takeOver(err)
		}
		f.mu.Lock()
		f.followed = false
		f.mu.Unlock()
	}
	var validators http.Header
	if f.old != nil && f.want.checks() {
		validators = validatorsOf(f.old)
		again, err := f.askHEAD(validators)
		if err != nil {
			return err
		}
		if !again {
			validators = nil // it has changed: get it whatever it was
		}
	}
	return f.fill(validators)
}

// mayBeStored says whether the store can have the file although the lookup
// missed: another flight ended meanwhile, here or on another replica, whose
// lease was then there to take.
func (f *flight) mayBeStored(other *filler) bool {
	return f.c.ended.Load() != f.ended || f.c.replicas != nil && other == nil
}

// storeHasIt looks into the store again: for the body too, since a store that
// is down may still know the record.
func (f *flight) storeHasIt() bool {
	s, err := f.c.lookup(f.ctx, f.key, f.want, asked{})
	if err != nil {
		return false
	}
	s.body.Close()
	return s.fresh()
}

// fill gets the body; with validators conditionally.
func (f *flight) fill(validators http.Header) error {
	// Without a spool, upstream need not be asked on behalf of all. With a copy
	// in hand the disk, which may be busy, is not to delay the answer that
	// upstream is gone.
	if f.old == nil {
		if err := f.openSpool(); err != nil {
			return err
		}
	}
	req := f.want.question(http.MethodGet, validators)
	req.hasCopy = f.old != nil
	resp, err := f.c.askBody(f.ctx, f.want, req)
	if err != nil {
		return err
	}
	if err := f.judge(resp, validators != nil); err != nil {
		resp.Body.Close()
		return err
	}
	return f.receive(resp, 0)
}

// judge decides about an answer's headers; nil means that its body comes.
func (f *flight) judge(resp *upstreamResponse, conditional bool) error {
	if conditional && f.unchanged(resp) {
		return errUnchanged
	}
	if err := f.c.refused(f.want, resp); err != nil {
		return err
	}
	return f.begin(resp)
}

// receive moves ans's body, and what resumes it, into the spool; n times it
// has broken off already.
func (f *flight) receive(resp *upstreamResponse, n int) error {
	for ; ; n++ {
		err := f.pump(resp)
		resp.Body.Close()
		if err == nil {
			return f.arrive()
		}
		if resp, err = f.resume(err, n); err != nil {
			return err
		}
	}
}

// openSpool makes the file that the body grows in, if there is none yet.
func (f *flight) openSpool() error {
	if f.spool != nil {
		return nil
	}
	if f.c.passesOn(f.key) {
		return errNoSpool
	}
	spool, err := f.c.spools.spool()
	if err == nil {
		f.mu.Lock()
		f.spool = spool
		f.mu.Unlock()
		err = f.c.spools.room(0)
	}
	if err != nil {
		f.c.storeFailed("spool", "beginning", f.key, err)
		return errNoSpool
	}
	return nil
}

// begin makes an answer's headers known to the clients that wait.
func (f *flight) begin(resp *upstreamResponse) error {
	q, c := f.want, f.c
	if q.limit > 0 && resp.ContentLength > q.limit {
		return f.tooLarge()
	}
	if err := f.openSpool(); err != nil {
		return err
	}
	if err := c.spools.room(max(0, resp.ContentLength)); err != nil {
		c.storeFailed("spool", "beginning", f.key, err)
		return errNoSpool
	}
	rec := c.newRecord(q, resp.Header)
	if hexsum, ok := strings.CutPrefix(q.digest, "sha256:"); ok {
		rec.SHA256 = hexsum
	}
	f.show(rec, resp.ContentLength, resp.origin, rangeValidator(resp), f.mayStore(resp))
	return nil
}

// show makes the headers of the coming body known to all who wait.
func (f *flight) show(rec *record, total int64, origin int, validator string, storable bool) {
	f.mu.Lock()
	f.rec, f.total, f.origin, f.validator, f.storable = rec, total, origin, validator, storable
	f.wake()
	f.mu.Unlock()
}

// wake tells all who wait that something has changed. f.mu is held.
func (f *flight) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *flight) beLate() {
	f.mu.Lock()
	f.late = true
	f.wake()
	f.mu.Unlock()
}

// spoolError is a spool that cannot grow.
type spoolError struct{ err error }

func (e *spoolError) Error() string { return "writing the spool: " + e.err.Error() }
func (e *spoolError) Unwrap() error { return e.err }

// pump moves ans's body into the spool until its end.
func (f *flight) pump(resp *upstreamResponse) error {
	buf := largeBuffers.Get().(*[largeBufferSize]byte)
	defer largeBuffers.Put(buf)
	for {
		n, err := resp.Body.Read(buf[:])
		if n > 0 {
			if err := f.append(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF && (f.total < 0 || f.written == f.total):
			return nil
		case err == io.EOF:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
	}
}

// append writes one piece and moves the watermark.
func (f *flight) append(p []byte) error {
	switch end := f.written + int64(len(p)); {
	case f.total >= 0 && end > f.total:
		return fmt.Errorf("%w: longer than it said", errBroken)
	case f.want.limit > 0 && end > f.want.limit:
		return f.tooLarge()
	case end/roomEvery != f.written/roomEvery:
		if err := f.c.spools.room(int64(len(p))); err != nil {
			return &spoolError{err}
		}
	}
	if _, err := f.spool.Write(p); err != nil {
		return &spoolError{err}
	}
	f.sums.write(p)
	f.mu.Lock()
	f.written += int64(len(p))
	f.wake()
	f.mu.Unlock()
	return nil
}

// arrive is the last step of a body that is all there: verify, show it to all,
// store it. A store that fails takes nothing from the clients.
func (f *flight) arrive() error {
	rec := *f.rec
	if err := f.verify(&rec); err != nil {
		f.c.metrics.countUpstreamError(f.want.remote.name, "digest")
		return err
	}
	if f.old != nil && f.old.SHA256 == rec.SHA256 {
		rec.Modified = f.old.Modified // the same bytes keep their date
	}
	if f.want.check != nil {
		if err := f.want.check(f.ctx, &rec, f.spool); err != nil {
			return err
		}
	}
	if f.storable && !f.fits(rec.Size) { // its length was not known in the beginning
		f.mu.Lock()
		f.storable = false
		f.mu.Unlock()
	}
	if f.present(&rec) {
		_ = f.c.store(f.c.ctx, f.key, &rec, f.spool) // it has logged its failure
		f.unstore()
	}
	return nil
}

// unstore makes up for a purge by another replica that found nothing yet.
func (f *flight) unstore() {
	f.mu.Lock()
	gone := f.gone
	f.mu.Unlock()
	if gone {
		f.remove("purging")
	}
}

// remove removes what is stored under the flight's key.
func (f *flight) remove(doing string) {
	if err := f.c.remove(f.c.ctx, f.want.remote.name, f.key); err != nil && !errors.Is(err, os.ErrNotExist) {
		f.c.storeFailed("storage", doing, f.key, err)
	}
}

// present shows the whole body to all who wait; store says that it is to be
// stored as well.
func (f *flight) present(rec *record) (store bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rec, f.total, f.complete = rec, rec.Size, true
	f.storing = f.storable && !f.purged
	f.wake()
	return f.storing
}

// verify completes rec from what was hashed on the way.
func (f *flight) verify(rec *record) error {
	if err := f.sums.verify(f.want.digest); err != nil {
		return err
	}
	rec.Size, rec.SHA256 = f.written, f.sums.hex()
	return nil
}

// sums hashes a body: always SHA-256, and SHA-512 where its digest is one.
type sums struct{ sha256, sha512 hash.Hash }

func newSums(digest string) *sums {
	s := &sums{sha256: sha256.New()}
	if strings.HasPrefix(digest, "sha512:") {
		s.sha512 = sha512.New()
	}
	return s
}

// clone is a second s that goes on by itself.
func (s *sums) clone() *sums {
	t := &sums{sha256: cloneHash(s.sha256)}
	if s.sha512 != nil {
		t.sha512 = cloneHash(s.sha512)
	}
	return t
}

func cloneHash(h hash.Hash) hash.Hash {
	c, err := h.(hash.Cloner).Clone() // the standard library's all can
	if err != nil {
		panic(err)
	}
	return c
}

func (s *sums) write(p []byte) {
	s.sha256.Write(p)
	if s.sha512 != nil {
		s.sha512.Write(p)
	}
}

func (s *sums) hex() string { return hex.EncodeToString(s.sha256.Sum(nil)) }

// verify compares with a digest ("" is any).
func (s *sums) verify(digest string) error {
	if digest == "" {
		return nil
	}
	got := "sha256:" + s.hex()
	if s.sha512 != nil {
		got = "sha512:" + hex.EncodeToString(s.sha512.Sum(nil))
	}
	if got != digest {
		return fmt.Errorf("%w: %s instead of %s", errDigest, got, digest)
	}
	return nil
}

// store keeps a complete body: object, then index row, then freshness. Of a
// crash between two of them the first leaves an object without a row, which
// the index finds by its walk (or reindex), the second a copy whose freshness
// counts from its fetch. It says whether the object is stored.
func (c *cache) store(ctx context.Context, key string, rec *record, spool *os.File) error {
	if err := c.objects.put(ctx, key, rec, spool); err != nil {
		if !errors.Is(err, errExists) {
			c.storeFailed("storage", "storing", key, err)
		}
		return err
	}
	c.announce(ctx, key)
	c.negative.delete(key)
	if err := c.index.save(ctx, rowOf(key, rec)); err != nil {
		c.storeFailed("database", "indexing", key, err)
	}
	if rec.Class != local {
		c.refresh(ctx, key, rec)
	}
	return nil
}

// storeAs stores a complete body under a second target too, from a spool of
// its own: put may take the name of the first one's. The second copy is for
// later requests alone, so a failure is noted and passed over.
func (c *cache) storeAs(ctx context.Context, t target, rec *record, body io.ReaderAt) {
	key := t.key()
	if old, err := c.objects.open(ctx, key, -1); err == nil && old.rec.Path == t.spelling && old.rec.SHA256 == rec.SHA256 {
		return
	}
	spool, err := c.spools.spool()
	if err != nil {
		c.storeFailed("spool", "beginning", key, err)
		return
	}
	defer spool.Close()
	defer os.Remove(spool.Name())
	if _, err := io.Copy(spool, io.NewSectionReader(body, 0, rec.Size)); err != nil {
		c.storeFailed("spool", "growing", key, err)
		return
	}
	second := *rec
	second.Path, second.Class = t.spelling, t.class
	_ = c.store(ctx, key, &second, spool) // has noted its failure
}

func rowOf(key string, rec *record) row {
	return row{Remote: rec.Remote, Path: rec.Path, Key: key, SHA256: rec.SHA256, ContentType: rec.ContentType,
		Class: rec.Class, Size: rec.Size, Fetched: rec.Fetched, LastAccess: rec.Fetched}
}

// refresh notes that the copy was just found good.
func (c *cache) refresh(ctx context.Context, key string, rec *record) {
	if err := c.fresh.set(ctx, key, mark{At: c.now().UTC(), SHA256: rec.SHA256}); err != nil {
		c.storeFailed("redis", "refreshing", key, err)
	}
}

// settle does what the end of a flight means for the copy it was to replace, if
// that was not purged meanwhile.
func (f *flight) settle(err error) {
	c, old := f.c, f.old
	f.mu.Lock()
	purged := f.purged
	f.mu.Unlock()
	if old == nil || err == nil || purged {
		return
	}
	status, _ := errors.AsType[*upstreamStatus](err)
	switch {
	case errors.Is(err, errUnchanged), outOfReach(err):
		c.refresh(c.ctx, f.key, old)
	case status != nil && status.gone():
		c.log.Info("evicted: the upstream has it no more", "remote", f.want.remote.name, "path", f.want.path, "status", status.code)
		f.remove("evicting")
	}
}

// outOfReach: the upstream said nothing that counts, so the copy stays good.
func outOfReach(err error) bool {
	return errors.Is(err, errUnreachable) || errors.Is(err, errTimeout) || errors.Is(err, errBroken)
}

// finish takes the flight out of the table and lets everyone know.
func (f *flight) finish(err error) {
	c := f.c
	if f.release != nil {
		f.release()
	}
	c.mu.Lock()
	c.ended.Add(1)
	c.land(f)
	f.over = true
	alone := f.waiters == 0
	c.mu.Unlock()
	f.mu.Lock()
	f.done, f.err = true, err
	if f.timer != nil {
		f.timer.Stop()
	}
	f.wake()
	f.mu.Unlock()
	if err != nil && !errors.Is(err, errUnchanged) && !errors.Is(err, errLookAgain) {
		c.log.Debug("fill ended", "key", f.key, "error", err)
	}
	if f.spool != nil {
		_ = os.Remove(f.spool.Name()) // gone already where the store took it
	}
	if alone {
		f.closeSpool()
	}
	f.cancel(nil)
}

// closeSpool is called by whoever is last: the flight or its last client.
func (f *flight) closeSpool() {
	if f.spool != nil {
		_ = f.spool.Close()
	}
}

// neverStore keeps the flight's body from being stored; one that is being
// stored right now is waited for.
func (f *flight) neverStore(ctx context.Context) error {
	for {
		f.mu.Lock()
		f.purged = true
		wait, changed := f.storing && !f.done, f.changed
		f.mu.Unlock()
		if !wait {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
