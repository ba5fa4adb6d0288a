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
	// maxFillsPerRemote bounds what one slow upstream can pile up.
	maxFillsPerRemote = 64
	// maxAbandonedPerRemote is how many fills without a client may go on per remote;
	// a client that comes and goes must not leave an endless queue behind.
	maxAbandonedPerRemote = 8
	// maxResumes bounds how often one body may break off.
	maxResumes = 3
	// holdBack of a body with a known digest is sent only once it verified, so
	// that nobody completes a wrong one.
	holdBack = 64 << 10
	// farRangeDistance of the fill a range is worth an upstream request of its own.
	farRangeDistance = 8 << 20
	// maxFarRanges bounds those requests for one fill.
	maxFarRanges = 8
	// maxWholeBodyWait is how long clients of an expired copy wait for the whole new
	// one; package managers give up after 30 s of silence.
	maxWholeBodyWait = 10 * time.Second
	// headRefusedFor is how long a refused HEAD is remembered.
	headRefusedFor = time.Hour
	// roomEvery is how often a growing spool looks at the free space.
	roomEvery = 64 << 20
)

// How a flight can end other than by a body that is complete (nil) or an
// upstream's failure.
var (
	errUnchanged     = errors.New("the copy is still good")
	errLookAgain     = errors.New("the store has it now")
	errNoSpool       = errors.New("no spool: each client asks upstream itself")
	errAbandoned     = errors.New("nobody waits any more")
	errFillQueueFull = fmt.Errorf("%w: the remote's fills take too long", errBusy)
	errBroken        = fmt.Errorf("%w: the body broke off", errBadUpstream)
	errDigest        = fmt.Errorf("%w: the body does not have its digest", errBadUpstream)
	errTooLarge      = fmt.Errorf("%w: the body is too large", errBadUpstream)
)

// fill is one fetch of one key. Its goroutine belongs to the cache; clients
// wait for it and read its spool at their own pace.
type fill struct {
	c           *cache
	key         string
	file        fileRequest
	oldRecord   *record // the expired copy's, or nil
	endedBefore int64   // cache.ended when the store was looked up

	ctx      context.Context
	cancel   context.CancelCauseFunc
	farSlots chan struct{} // slots of far ranges

	// Guarded by cache.mu.
	waiters int
	running bool // has its slot
	landed  bool // left the table
	over    bool // its goroutine has ended

	mu        sync.Mutex // guards what follows
	changed   chan struct{}
	rec       *record // once headers are there; replaced when complete
	size      int64   // -1: not known
	storable  bool
	spool     *os.File
	hash      *bodyHash // of what was written; the flight's goroutine alone uses it
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

// joinFill returns the flight for key, a new one if there is none; lead says so.
// Each join is paired with a leave.
func (c *cache) joinFill(key string, file fileRequest, cp *storedCopy, ended int64) (f *fill, lead bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.fills[key]; f != nil {
		f.waiters++
		return f, false
	}
	f = &fill{c: c, key: key, file: file, endedBefore: ended, waiters: 1, size: -1, hash: newBodyHash(file.digest),
		changed: make(chan struct{}), farSlots: make(chan struct{}, maxFarRanges)}
	if cp != nil {
		f.oldRecord = cp.rec
	}
	f.ctx, f.cancel = context.WithCancelCause(c.ctx)
	c.fills[key] = f
	c.fillsRunning.Go(f.run)
	return f, true
}

func (c *cache) isFilling(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fills[key] != nil
}

// leave is the end of one client's interest. A flight that has not begun ends
// with its last client; one that runs goes on alone, but not too many do.
func (f *fill) leave() {
	c := f.c
	c.mu.Lock()
	f.waiters--
	var victim *fill
	switch {
	case f.waiters > 0 || f.landed:
	case !f.running:
		victim = f
	default:
		victim = c.pickAbandonedFill(f.file.remote.name)
	}
	if victim != nil {
		c.dropFill(victim)
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

// pickAbandonedFill picks the flight of a remote to drop: the one furthest from its
// end among those without clients, if they are too many. c.mu is held.
func (c *cache) pickAbandonedFill(name string) *fill {
	var victim *fill
	var most int64
	alone := 0
	for _, f := range c.fills {
		if f.waiters > 0 || f.file.remote.name != name {
			continue
		}
		left := f.bytesLeft()
		if left == 0 {
			continue // it asks nothing of upstream any more, and is being stored
		}
		alone++
		if victim == nil || left > most {
			victim, most = f, left
		}
	}
	if alone <= maxAbandonedPerRemote {
		return nil
	}
	return victim
}

// bytesLeft is how many bytes are still to come; an unknown length is the furthest.
func (f *fill) bytesLeft() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.size < 0 {
		return 1 << 62
	}
	return f.size - f.written
}

// dropFill takes f out of the table. c.mu is held.
func (c *cache) dropFill(f *fill) {
	f.landed = true
	if c.fills[f.key] == f {
		delete(c.fills, f.key)
	}
}

// run is the flight's goroutine.
func (f *fill) run() {
	c, name := f.c, f.file.remote.name
	err := f.waitForSlot()
	if err == nil {
		c.metrics.addFillsInFlight(name, 1)
		err = f.fetch()
		c.metrics.addFillsInFlight(name, -1)
		<-c.fillSlot(name)
	}
	if cause := context.Cause(f.ctx); cause != nil && err != nil {
		err = cause
	}
	f.applyToOldCopy(err)
	f.endFill(err)
}

// fillSlot is the semaphore of a remote's fills.
func (c *cache) fillSlot(name string) chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.fillSlots[name]
	if s == nil {
		s = make(chan struct{}, maxFillsPerRemote)
		c.fillSlots[name] = s
	}
	return s
}

// waitForSlot waits for the remote to have room for one more fill, as long as a
// client waits for this one, and not for long where a copy can answer.
func (f *fill) waitForSlot() error {
	var enough <-chan time.Time
	if f.oldRecord != nil {
		t := time.NewTimer(copyTimeout)
		defer t.Stop()
		enough = t.C
	}
	select {
	case f.c.fillSlot(f.file.remote.name) <- struct{}{}:
	case <-enough:
		return errFillQueueFull
	case <-f.ctx.Done():
		return context.Cause(f.ctx)
	}
	f.c.mu.Lock()
	f.running = true
	f.c.mu.Unlock()
	return nil
}

// fetch does the asking. Its error is how the flight ended.
func (f *fill) fetch() error {
	if f.oldRecord != nil {
		f.mu.Lock()
		f.timer = time.AfterFunc(maxWholeBodyWait, f.stopWaitingForWhole)
		f.mu.Unlock()
	}
	other := f.acquireLease()
	if f.mayBeStoredByNow(other) && f.isStoredByNow() {
		return errLookAgain
	}
	if other != nil {
		err := f.followReplica(other)
		switch {
		case !errors.Is(err, errReplica):
			return err
		case f.rec == nil && f.isStoredByNow(): // it ended before we asked
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
	if f.oldRecord != nil && f.file.isRevalidated() {
		validators = validatorsOf(f.oldRecord)
		again, err := f.revalidateByHEAD(validators)
		if err != nil {
			return err
		}
		if !again {
			validators = nil // it has changed: get it whatever it was
		}
	}
	return f.fetchBody(validators)
}

// mayBeStoredByNow says whether the store can have the file although the lookup
// missed: another flight ended meanwhile, here or on another replica, whose
// lease was then there to take.
func (f *fill) mayBeStoredByNow(other *leaseHolder) bool {
	return f.c.endedFills.Load() != f.endedBefore || f.c.replicas != nil && other == nil
}

// isStoredByNow looks into the store again: for the body too, since a store that
// is down may still know the record.
func (f *fill) isStoredByNow() bool {
	s, err := f.c.findCopy(f.ctx, f.key, f.file, byteRange{})
	if err != nil {
		return false
	}
	s.body.Close()
	return s.isFresh()
}

// fetchBody gets the body; with validators conditionally.
func (f *fill) fetchBody(validators http.Header) error {
	// Without a spool, upstream need not be asked on behalf of all. With a copy
	// in hand the disk, which may be busy, is not to delay the answer that
	// upstream is gone.
	if f.oldRecord == nil {
		if err := f.openSpool(); err != nil {
			return err
		}
	}
	req := f.file.newUpstreamRequest(http.MethodGet, validators)
	req.hasCopy = f.oldRecord != nil
	resp, err := f.c.requestBody(f.ctx, f.file, req)
	if err != nil {
		return err
	}
	if err := f.acceptHeaders(resp, validators != nil); err != nil {
		resp.Body.Close()
		return err
	}
	return f.receiveBody(resp, 0)
}

// acceptHeaders decides about an answer's headers; nil means that its body comes.
func (f *fill) acceptHeaders(resp *upstreamResponse, conditional bool) error {
	if conditional && f.isUnchanged(resp) {
		return errUnchanged
	}
	if err := f.c.statusError(f.file, resp); err != nil {
		return err
	}
	return f.prepareBody(resp)
}

// receiveBody moves ans's body, and what resumes it, into the spool; n times it
// has broken off already.
func (f *fill) receiveBody(resp *upstreamResponse, n int) error {
	for ; ; n++ {
		err := f.copyToSpool(resp)
		resp.Body.Close()
		if err == nil {
			return f.completeFill()
		}
		if resp, err = f.resumeBody(err, n); err != nil {
			return err
		}
	}
}

// openSpool makes the file that the body grows in, if there is none yet.
func (f *fill) openSpool() error {
	if f.spool != nil {
		return nil
	}
	if f.c.isPassedOn(f.key) {
		return errNoSpool
	}
	spool, err := f.c.spools.newSpool()
	if err == nil {
		f.mu.Lock()
		f.spool = spool
		f.mu.Unlock()
		err = f.c.spools.checkRoom(0)
	}
	if err != nil {
		f.c.noteStoreError("spool", "beginning", f.key, err)
		return errNoSpool
	}
	return nil
}

// prepareBody makes an answer's headers known to the clients that wait.
func (f *fill) prepareBody(resp *upstreamResponse) error {
	file, c := f.file, f.c
	if file.maxBytes > 0 && resp.ContentLength > file.maxBytes {
		return f.newTooLargeError()
	}
	if err := f.openSpool(); err != nil {
		return err
	}
	if err := c.spools.checkRoom(max(0, resp.ContentLength)); err != nil {
		c.noteStoreError("spool", "beginning", f.key, err)
		return errNoSpool
	}
	rec := c.newRecord(file, resp.Header)
	if hexsum, ok := strings.CutPrefix(file.digest, "sha256:"); ok {
		rec.SHA256 = hexsum
	}
	f.publishHeaders(rec, resp.ContentLength, resp.origin, rangeValidator(resp), f.mayBeStored(resp))
	return nil
}

// publishHeaders makes the headers of the coming body known to all who wait.
func (f *fill) publishHeaders(rec *record, total int64, origin int, validator string, storable bool) {
	f.mu.Lock()
	f.rec, f.size, f.origin, f.validator, f.storable = rec, total, origin, validator, storable
	f.wakeWaiters()
	f.mu.Unlock()
}

// wakeWaiters tells all who wait that something has changed. f.mu is held.
func (f *fill) wakeWaiters() {
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fill) stopWaitingForWhole() {
	f.mu.Lock()
	f.late = true
	f.wakeWaiters()
	f.mu.Unlock()
}

// spoolError is a spool that cannot grow.
type spoolError struct{ err error }

func (e *spoolError) Error() string { return "writing the spool: " + e.err.Error() }
func (e *spoolError) Unwrap() error { return e.err }

// copyToSpool moves ans's body into the spool until its end.
func (f *fill) copyToSpool(resp *upstreamResponse) error {
	buf := largeBuffers.Get().(*[largeBufferSize]byte)
	defer largeBuffers.Put(buf)
	for {
		n, err := resp.Body.Read(buf[:])
		if n > 0 {
			if err := f.appendToSpool(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF && (f.size < 0 || f.written == f.size):
			return nil
		case err == io.EOF:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
	}
}

// appendToSpool writes one piece and moves the watermark.
func (f *fill) appendToSpool(p []byte) error {
	switch end := f.written + int64(len(p)); {
	case f.size >= 0 && end > f.size:
		return fmt.Errorf("%w: longer than it said", errBroken)
	case f.file.maxBytes > 0 && end > f.file.maxBytes:
		return f.newTooLargeError()
	case end/roomEvery != f.written/roomEvery:
		if err := f.c.spools.checkRoom(int64(len(p))); err != nil {
			return &spoolError{err}
		}
	}
	if _, err := f.spool.Write(p); err != nil {
		return &spoolError{err}
	}
	f.hash.Write(p)
	f.mu.Lock()
	f.written += int64(len(p))
	f.wakeWaiters()
	f.mu.Unlock()
	return nil
}

// completeFill is the last step of a body that is all there: verify, show it to all,
// store it. A store that fails takes nothing from the clients.
func (f *fill) completeFill() error {
	rec := *f.rec
	if err := f.verifyBody(&rec); err != nil {
		f.c.metrics.countUpstreamError(f.file.remote.name, "digest")
		return err
	}
	if f.oldRecord != nil && f.oldRecord.SHA256 == rec.SHA256 {
		rec.Modified = f.oldRecord.Modified // the same bytes keep their date
	}
	if f.file.check != nil {
		if err := f.file.check(f.ctx, &rec, f.spool); err != nil {
			return err
		}
	}
	if f.storable && !f.fitsMaxSize(rec.Size) { // its length was not known in the beginning
		f.mu.Lock()
		f.storable = false
		f.mu.Unlock()
	}
	if f.publishBody(&rec) {
		_ = f.c.storeBody(f.c.ctx, f.key, &rec, f.spool) // it has logged its failure
		f.removeIfPurged()
	}
	return nil
}

// removeIfPurged makes up for a purge by another replica that found nothing yet.
func (f *fill) removeIfPurged() {
	f.mu.Lock()
	gone := f.gone
	f.mu.Unlock()
	if gone {
		f.removeStored("purging")
	}
}

// removeStored removes what is stored under the flight's key.
func (f *fill) removeStored(doing string) {
	if err := f.c.removeFile(f.c.ctx, f.file.remote.name, f.key); err != nil && !errors.Is(err, os.ErrNotExist) {
		f.c.noteStoreError("storage", doing, f.key, err)
	}
}

// publishBody shows the whole body to all who wait; store says that it is to be
// stored as well.
func (f *fill) publishBody(rec *record) (store bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rec, f.size, f.complete = rec, rec.Size, true
	f.storing = f.storable && !f.purged
	f.wakeWaiters()
	return f.storing
}

// verifyBody completes rec from what was hashed on the way.
func (f *fill) verifyBody(rec *record) error {
	if err := f.hash.verifyDigest(f.file.digest); err != nil {
		return err
	}
	rec.Size, rec.SHA256 = f.written, f.hash.sumHex()
	return nil
}

// bodyHash hashes a body: always SHA-256, and SHA-512 where its digest is one.
type bodyHash struct{ sha256, sha512 hash.Hash }

func newBodyHash(digest string) *bodyHash {
	s := &bodyHash{sha256: sha256.New()}
	if strings.HasPrefix(digest, "sha512:") {
		s.sha512 = sha512.New()
	}
	return s
}

// clone is a second s that goes on by itself.
func (s *bodyHash) clone() *bodyHash {
	t := &bodyHash{sha256: cloneHash(s.sha256)}
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

func (s *bodyHash) Write(p []byte) {
	s.sha256.Write(p)
	if s.sha512 != nil {
		s.sha512.Write(p)
	}
}

func (s *bodyHash) sumHex() string { return hex.EncodeToString(s.sha256.Sum(nil)) }

// verifyDigest compares with a digest ("" is any).
func (s *bodyHash) verifyDigest(digest string) error {
	if digest == "" {
		return nil
	}
	got := "sha256:" + s.sumHex()
	if s.sha512 != nil {
		got = "sha512:" + hex.EncodeToString(s.sha512.Sum(nil))
	}
	if got != digest {
		return fmt.Errorf("%w: %s instead of %s", errDigest, got, digest)
	}
	return nil
}

// storeBody keeps a complete body: object, then index row, then freshness. Of a
// crash between two of them the first leaves an object without a row, which
// the index finds by its walk (or reindex), the second a copy whose freshness
// counts from its fetch. It says whether the object is stored.
func (c *cache) storeBody(ctx context.Context, key string, rec *record, spool *os.File) error {
	if err := c.objects.put(ctx, key, rec, spool); err != nil {
		if !errors.Is(err, errFileExists) {
			c.noteStoreError("storage", "storing", key, err)
		}
		return err
	}
	c.announceChange(ctx, key)
	c.negative.delete(key)
	if err := c.index.saveRow(ctx, newIndexRow(key, rec)); err != nil {
		c.noteStoreError("database", "indexing", key, err)
	}
	if rec.Class != local {
		c.refreshMark(ctx, key, rec)
	}
	return nil
}

// storeUnderSecondKey stores a complete body under a second target too, from a spool of
// its own: put may take the name of the first one's. The second copy is for
// later requests alone, so a failure is noted and passed over.
func (c *cache) storeUnderSecondKey(ctx context.Context, t target, rec *record, body io.ReaderAt) {
	key := t.key()
	if old, err := c.objects.open(ctx, key, -1); err == nil && old.rec.Path == t.spelling && old.rec.SHA256 == rec.SHA256 {
		return
	}
	spool, err := c.spools.newSpool()
	if err != nil {
		c.noteStoreError("spool", "beginning", key, err)
		return
	}
	defer spool.Close()
	defer os.Remove(spool.Name())
	if _, err := io.Copy(spool, io.NewSectionReader(body, 0, rec.Size)); err != nil {
		c.noteStoreError("spool", "growing", key, err)
		return
	}
	second := *rec
	second.Path, second.Class = t.spelling, t.class
	_ = c.storeBody(ctx, key, &second, spool) // has noted its failure
}

func newIndexRow(key string, rec *record) indexRow {
	return indexRow{Remote: rec.Remote, Path: rec.Path, Key: key, SHA256: rec.SHA256, ContentType: rec.ContentType,
		Class: rec.Class, Size: rec.Size, Fetched: rec.Fetched, LastAccess: rec.Fetched}
}

// refreshMark notes that the copy was just found good.
func (c *cache) refreshMark(ctx context.Context, key string, rec *record) {
	if err := c.marks.setMark(ctx, key, freshnessMark{GoodAt: c.now().UTC(), SHA256: rec.SHA256}); err != nil {
		c.noteStoreError("redis", "refreshing", key, err)
	}
}

// applyToOldCopy does what the end of a flight means for the copy it was to replace, if
// that was not purged meanwhile.
func (f *fill) applyToOldCopy(err error) {
	c, old := f.c, f.oldRecord
	f.mu.Lock()
	purged := f.purged
	f.mu.Unlock()
	if old == nil || err == nil || purged {
		return
	}
	status, _ := errors.AsType[*upstreamStatus](err)
	switch {
	case errors.Is(err, errUnchanged), isUnreachable(err):
		c.refreshMark(c.ctx, f.key, old)
	case status != nil && status.isGone():
		c.log.Info("evicted: the upstream has it no more", "remote", f.file.remote.name, "path", f.file.path, "status", status.code)
		f.removeStored("evicting")
	}
}

// isUnreachable: the upstream said nothing that counts, so the copy stays good.
func isUnreachable(err error) bool {
	return errors.Is(err, errUnreachable) || errors.Is(err, errTimeout) || errors.Is(err, errBroken)
}

// endFill takes the flight out of the table and lets everyone know.
func (f *fill) endFill(err error) {
	c := f.c
	if f.release != nil {
		f.release()
	}
	c.mu.Lock()
	c.endedFills.Add(1)
	c.dropFill(f)
	f.over = true
	alone := f.waiters == 0
	c.mu.Unlock()
	f.mu.Lock()
	f.done, f.err = true, err
	if f.timer != nil {
		f.timer.Stop()
	}
	f.wakeWaiters()
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
func (f *fill) closeSpool() {
	if f.spool != nil {
		_ = f.spool.Close()
	}
}

// preventStoring keeps the flight's body from being stored; one that is being
// stored right now is waited for.
func (f *fill) preventStoring(ctx context.Context) error {
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
