// fill.go: the fetch of one file (a flight), the spool it grows in, and the
// readers that follow it. The decision to fetch is in cache.go.
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
	"net/http"
	"os"
	"strconv"
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
		c.metrics.filling(name, 1)
		err = f.fetch()
		c.metrics.filling(name, -1)
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
		t := time.NewTimer(copyPatience)
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

// checks says whether an expired copy of q is revalidated rather than fetched
// again (SPEC.md section 5).
func (q want) checks() bool {
	switch {
	case q.ask != nil:
		return false
	case q.builtin:
		return q.remote.checkBuiltin
	}
	return q.remote.checkMutable
}

func validatorsOf(rec *record) http.Header {
	h := http.Header{}
	if rec.ETag != "" {
		h.Set("If-None-Match", rec.ETag)
	}
	if rec.LastModified != "" {
		h.Set("If-Modified-Since", rec.LastModified)
	}
	return h
}

// askHEAD asks whether the copy is still good: errUnchanged if so. again says
// that HEAD is refused here and a conditional GET must ask once more.
func (f *flight) askHEAD(validators http.Header) (again bool, err error) {
	c, name := f.c, f.want.remote.name
	if c.refusesHEAD(name) {
		return true, nil
	}
	ask := f.want.question(http.MethodHead, validators)
	ask.hasCopy = true
	ans, err := c.up.ask(f.ctx, ask)
	if err != nil {
		return false, err
	}
	ans.Body.Close()
	switch {
	case f.unchanged(ans):
		return false, errUnchanged
	case headRefused(ans.StatusCode):
		c.mu.Lock()
		c.noHEAD[name] = c.now().Add(noHEADFor)
		c.mu.Unlock()
		return true, nil
	}
	return false, c.refused(f.want, ans)
}

func (c *cache) refusesHEAD(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now().Before(c.noHEAD[name])
}

// unchanged says whether an answer to a conditional request means that the
// copy is still good: 304, or a 200 that names the very same bytes.
func (f *flight) unchanged(ans *answer) bool {
	if ans.StatusCode == http.StatusNotModified {
		return true
	}
	if ans.StatusCode != http.StatusOK {
		return false
	}
	digest := ans.Header.Get("Docker-Content-Digest")
	if digest != "" && digest == f.old.Digest {
		return true
	}
	return strong(f.old.ETag) && ans.Header.Get("ETag") == f.old.ETag
}

func strong(etag string) bool { return strings.HasPrefix(etag, `"`) }

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
	ask := f.want.question(http.MethodGet, validators)
	ask.hasCopy = f.old != nil
	ans, err := f.c.askBody(f.ctx, f.want, ask)
	if err != nil {
		return err
	}
	if err := f.judge(ans, validators != nil); err != nil {
		ans.Body.Close()
		return err
	}
	return f.receive(ans, 0)
}

// judge decides about an answer's headers; nil means that its body comes.
func (f *flight) judge(ans *answer, conditional bool) error {
	if conditional && f.unchanged(ans) {
		return errUnchanged
	}
	if err := f.c.refused(f.want, ans); err != nil {
		return err
	}
	return f.begin(ans)
}

// receive moves ans's body, and what resumes it, into the spool; n times it
// has broken off already.
func (f *flight) receive(ans *answer, n int) error {
	for ; ; n++ {
		err := f.pump(ans)
		ans.Body.Close()
		if err == nil {
			return f.arrive()
		}
		if ans, err = f.resume(err, n); err != nil {
			return err
		}
	}
}

// askBody asks for q's body, in its own way where it has one.
func (c *cache) askBody(ctx context.Context, q want, ask question) (*answer, error) {
	if q.ask != nil {
		return q.ask(ctx, ask)
	}
	return c.up.ask(ctx, ask)
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
func (f *flight) begin(ans *answer) error {
	q, c := f.want, f.c
	if q.limit > 0 && ans.ContentLength > q.limit {
		return f.tooLarge()
	}
	if err := f.openSpool(); err != nil {
		return err
	}
	if err := c.spools.room(max(0, ans.ContentLength)); err != nil {
		c.storeFailed("spool", "beginning", f.key, err)
		return errNoSpool
	}
	rec := c.newRecord(q, ans.Header)
	if hexsum, ok := strings.CutPrefix(q.digest, "sha256:"); ok {
		rec.SHA256 = hexsum
	}
	f.show(rec, ans.ContentLength, ans.origin, rangeValidator(ans), f.mayStore(ans))
	return nil
}

// show makes the headers of the coming body known to all who wait.
func (f *flight) show(rec *record, total int64, origin int, validator string, storable bool) {
	f.mu.Lock()
	f.rec, f.total, f.origin, f.validator, f.storable = rec, total, origin, validator, storable
	f.wake()
	f.mu.Unlock()
}

// mayStore: a body that only the connection's end delimits cannot be told from
// a cut one, and one over the remote's whole budget would push out the rest.
func (f *flight) mayStore(ans *answer) bool {
	c, name := f.c, f.want.remote.name
	if ans.ContentLength < 0 && ans.ProtoMajor == 1 && len(ans.TransferEncoding) == 0 {
		c.log.Warn("not stored: the upstream gave neither length nor chunks, so a cut body could not be told from a whole one", "remote", name, "path", f.want.path)
		return false
	}
	return f.fits(ans.ContentLength)
}

// fits says whether cache.max_size allows for a body of that size.
func (f *flight) fits(size int64) bool {
	rem := f.want.remote
	if rem.maxSize > 0 && size > rem.maxSize {
		f.c.log.Warn("not stored: larger than cache.max_size", "remote", rem.name, "path", f.want.path, "size", size)
		return false
	}
	return true
}

func (f *flight) tooLarge() error {
	return &problem{status: http.StatusBadGateway, cause: errTooLarge,
		detail: fmt.Sprintf("the upstream's body is larger than the %d bytes that are allowed here", f.want.limit)}
}

// rangeValidator is what If-Range may carry (RFC 9110 section 13.1.5): a strong
// ETag, or a date that is strong because it is well before the answer's.
func rangeValidator(ans *answer) string {
	if tag := ans.Header.Get("ETag"); tag != "" {
		if strong(tag) {
			return tag
		}
		return ""
	}
	modified, err1 := http.ParseTime(ans.Header.Get("Last-Modified"))
	date, err2 := http.ParseTime(ans.Header.Get("Date"))
	if err1 == nil && err2 == nil && date.Sub(modified) >= time.Minute {
		return ans.Header.Get("Last-Modified")
	}
	return ""
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
func (f *flight) pump(ans *answer) error {
	buf := largeBuffers.Get().(*[largeCopy]byte)
	defer largeBuffers.Put(buf)
	for {
		n, err := ans.Body.Read(buf[:])
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

// resume asks for the rest of a body that broke off with err the nth time. Its
// error is how the flight ends.
func (f *flight) resume(err error, n int) (*answer, error) {
	if _, full := errors.AsType[*spoolError](err); full {
		f.c.storeFailed("spool", "growing", f.key, err)
		return nil, err
	}
	if _, fatal := errors.AsType[*problem](err); fatal || errors.Is(err, errBroken) || f.ctx.Err() != nil {
		return nil, err
	}
	broken := fmt.Errorf("%w after %d of %d bytes: %w", errBroken, f.written, f.total, err)
	if n >= resumes {
		return nil, broken
	}
	ans, err := f.c.askRest(f.ctx, f.restOf(f.written, -1))
	if err != nil {
		return nil, fmt.Errorf("%w; it cannot be resumed: %w", broken, err)
	}
	f.mu.Lock()
	f.total = ans.whole()
	f.mu.Unlock()
	f.c.log.Info("resumed a body that broke off", "remote", f.want.remote.name, "path", f.want.path, "at", f.written)
	return ans, nil
}

// rest describes the part of a body that is asked for by Range.
type rest struct {
	want      want
	validator string
	size      int64 // of the whole body, -1 unknown
	from, to  int64 // to -1: the end
	origin    int
}

func (f *flight) restOf(from, to int64) rest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return rest{f.want, f.validator, f.total, from, to, f.origin}
}

// askRest asks upstream for a part, and accepts exactly that part of the very
// same body.
func (c *cache) askRest(ctx context.Context, p rest) (*answer, error) {
	if p.validator == "" && p.want.digest == "" {
		return nil, errors.New("the upstream gave no strong validator")
	}
	h := http.Header{"Range": {"bytes=" + strconv.FormatInt(p.from, 10) + "-"}}
	if p.to >= 0 {
		h["Range"][0] += strconv.FormatInt(p.to, 10)
	}
	if p.validator != "" {
		h["If-Range"] = []string{p.validator}
	}
	ask := p.want.question(http.MethodGet, h)
	ask.first = p.origin
	ans, err := c.up.ask(ctx, ask)
	if err != nil {
		return nil, err
	}
	first, last, size, ok := contentRange(ans.Header.Get("Content-Range"))
	if p.size < 0 && last != size-1 {
		ok = false // where the whole ends would still not be known
	}
	if ans.StatusCode != http.StatusPartialContent || !ok || first != p.from || p.size >= 0 && size != p.size {
		ans.Body.Close()
		return nil, fmt.Errorf("%w: status %d, Content-Range %q for a part from %d", errBadUpstream, ans.StatusCode, ans.Header.Get("Content-Range"), p.from)
	}
	return ans, nil
}

// whole is the size of the body of which askRest's answer is a part.
func (a *answer) whole() int64 {
	_, _, size, _ := contentRange(a.Header.Get("Content-Range"))
	return size
}

// arrive is the last step of a body that is all there: verify, show it to all,
// store it. A store that fails takes nothing from the clients.
func (f *flight) arrive() error {
	rec := *f.rec
	if err := f.verify(&rec); err != nil {
		f.c.metrics.upstreamFailed(f.want.remote.name, "digest")
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

// await waits until f has something to answer with. It closes cp's body unless
// the reply sends it.
func (c *cache) await(ctx context.Context, f *flight, lead bool, a asked, cp *stored) (rep *reply, err error) {
	defer func() {
		if cp != nil && (rep == nil || rep.body != cp.body) {
			cp.body.Close()
		}
	}()
	f.mu.Lock()
	arrived := !lead && f.written == f.total // all there before this client was
	f.mu.Unlock()
	for {
		f.mu.Lock()
		ready, done, changed, err := f.ready(cp != nil), f.done, f.changed, f.err
		ready = ready && (!arrived || f.complete) // it is being verified
		stored := arrived && f.storing
		f.mu.Unlock()
		switch {
		case ready && stored:
			return f.hit(ctx, a), nil
		case ready:
			return f.reply(ctx, lead, a), nil
		case done:
			f.leave()
			return c.fallBack(ctx, f.want, a, cp, err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			f.leave()
			return nil, context.Cause(ctx)
		}
	}
}

// ready says whether a client can be sent the growing or complete body. f.mu
// is held.
func (f *flight) ready(hasCopy bool) bool {
	switch {
	case f.complete:
		return true
	case f.rec == nil || f.done || f.want.whole:
		return false
	case f.want.digest != "" && f.total >= 0 && f.total <= holdBack:
		return false // nothing may be sent before it verifies: a 502 is still possible
	}
	return !hasCopy || f.late
}

// reply is the answer out of a spool. Closing its body leaves the flight.
func (f *flight) reply(ctx context.Context, lead bool, a asked) *reply {
	f.mu.Lock()
	rep := &reply{rec: f.rec, size: f.total, remote: true, outcome: "MISS", sum: f.complete || f.rec.SHA256 != ""}
	rep.status = "fwd=miss"
	if f.old != nil {
		rep.status = "fwd=stale; fwd-status=200"
	}
	if lead && !f.followed {
		rep.stored = f.storable
	} else {
		rep.status += "; collapsed"
	}
	f.mu.Unlock()
	if a.head {
		f.leave()
		rep.body = unread(rep.size)
		return rep
	}
	rep.body = f.reader(ctx, a)
	return rep
}

// hit is the answer out of a spool whose body is complete and being stored:
// for who comes now there is no download to join.
func (f *flight) hit(ctx context.Context, a asked) *reply {
	c, q := f.c, f.want
	rep := f.reply(ctx, false, a)
	ttl, forever := q.remote.ttl(q.class)
	c.used(q.remote.name, f.key)
	return c.hit(&stored{object: &object{rep.rec, rep.body}, at: c.now(), ttl: ttl, forever: forever}, "")
}

// fallBack answers when the flight brought no body.
func (c *cache) fallBack(ctx context.Context, q want, a asked, cp *stored, err error) (*reply, error) {
	_, full := errors.AsType[*spoolError](err)
	switch {
	case errors.Is(err, errUnchanged) && cp != nil:
		cp.at = c.now()
		c.used(q.remote.name, q.key())
		return &reply{rec: cp.rec, size: cp.rec.Size, body: cp.body, at: cp.at, sum: true,
			status: "fwd=stale; fwd-status=304", outcome: "REVALIDATED"}, nil
	case errors.Is(err, errUnchanged), errors.Is(err, errAbandoned):
		return nil, errLookAgain
	case full, errors.Is(err, errNoSpool):
		return c.direct(ctx, q, a, cp)
	case cp != nil:
		if why := q.staleFor(err); why != "" {
			c.used(q.remote.name, q.key())
			return c.stale(cp, why), nil
		}
	}
	return nil, err
}

// staleFor says why the expired copy may answer for err; "" if it may not.
func (q want) staleFor(err error) string {
	if outOfReach(err) {
		return "unreachable"
	}
	if errors.Is(err, errCrowded) {
		return "crowded"
	}
	status, _ := errors.AsType[*upstreamStatus](err)
	switch {
	case status == nil:
		return ""
	case status.code == http.StatusTooManyRequests && (q.staleOn429 || q.remote.staleIfError),
		status.code >= 500 && (q.staleOn5xx || q.remote.staleIfError):
		return "upstream-" + strconv.Itoa(status.code)
	}
	return ""
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

// reader follows f's spool for one client.
func (f *flight) reader(ctx context.Context, a asked) io.ReadSeekCloser {
	r := &spoolReader{f: f, ctx: ctx, to: a.to}
	// An open file of its own has an offset of its own, which sendfile needs.
	// Where the store has taken the name away already, the shared one is read;
	// the name may be another spool's by now.
	if own, err := os.Open(f.spool.Name()); err == nil && sameFile(own, f.spool) {
		r.own = own
	} else if err == nil {
		_ = own.Close()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	single := a.from > 0 || a.suffix > 0
	r.size = f.total
	r.jump = single && !f.complete && (f.validator != "" || f.want.digest != "")
	return r
}

func sameFile(a, b *os.File) bool {
	x, err1 := a.Stat()
	y, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// spoolReader is one client's view of a growing body: a source, and an
// io.ReadSeeker where the size is known. Closing it leaves the flight.
type spoolReader struct {
	f    *flight
	ctx  context.Context
	size int64    // of the whole body as it was known in the beginning; -1: not known
	own  *os.File // nil: read through the flight's descriptor
	off  int64
	to   int64       // last byte that was asked for, -1: the end
	jump bool        // a far range may be asked for upstream
	rest *remoteBody // reads beyond the spool, if it does
	slot bool        // rest holds a far slot
}

// readable is how far clients may read. f.mu is held.
func (f *flight) readable() int64 {
	switch {
	case f.complete || f.want.digest == "":
		return f.written
	case f.total >= 0:
		return max(0, min(f.written, f.total-holdBack))
	}
	return max(0, f.written-holdBack)
}

// state is what a reader at off can do now: read n bytes, or stop with err, or
// wait for changed.
func (f *flight) state(off int64) (n int64, changed chan struct{}, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch n := f.readable() - off; {
	case n > 0:
		return n, nil, nil
	case f.complete:
		return 0, nil, io.EOF
	case f.done:
		return 0, nil, f.err
	}
	return 0, f.changed, nil
}

// wait blocks until bytes can be read from the spool, or from r.rest.
func (r *spoolReader) wait() (n int64, err error) {
	for {
		if r.rest != nil {
			return 0, nil
		}
		n, changed, err := r.f.state(r.off)
		if _, full := errors.AsType[*spoolError](err); full {
			if r.rest, err = r.goOn(); err != nil {
				return 0, err
			}
			continue
		}
		if n > 0 || err != nil {
			return n, err
		}
		if r.jump && r.isFar() {
			if err := r.leap(changed); err != nil {
				return 0, err
			}
			continue
		}
		select {
		case <-changed:
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
}

// goOn is what a client reads on from when the spool could not grow: what has
// arrived and is not verified yet, and behind it an upstream request of its own.
func (r *spoolReader) goOn() (*remoteBody, error) {
	f := r.f // has ended: nothing of it changes any more
	b := &remoteBody{c: f.c, ctx: r.ctx, part: f.restOf(r.off, r.to), off: r.off, at: f.written}
	if f.want.digest == "" {
		return b, nil
	}
	b.sums, b.held = f.sums.clone(), make([]byte, max(0, f.written-r.off))
	if _, err := f.spool.ReadAt(b.held, r.off); err != nil && len(b.held) > 0 {
		return nil, fmt.Errorf("reading the spool: %w", err)
	}
	return b, nil
}

func (r *spoolReader) isFar() bool {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	end := r.f.total
	if r.f.want.digest != "" {
		end -= holdBack // that part waits until the whole body verifies
	}
	return !r.f.noRanges && r.off-r.f.written > farAhead && r.off < end
}

// leap begins a ranged request for what is far ahead of the fill, or waits for
// a slot to do so.
func (r *spoolReader) leap(changed chan struct{}) error {
	select {
	case r.f.far <- struct{}{}:
	case <-changed:
		return nil // the fill came closer: judge again
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
	r.slot = true
	if !r.isFar() { // any more, after the wait
		r.land()
		return nil
	}
	r.jump = false
	part := r.f.restOf(r.off, r.to)
	ans, err := r.f.c.askRest(r.ctx, part)
	if err != nil { // the fill will come by
		r.f.mu.Lock()
		r.f.noRanges = r.f.noRanges || errors.Is(err, errBadUpstream)
		r.f.mu.Unlock()
		r.land()
		return nil
	}
	r.rest = &remoteBody{c: r.f.c, ctx: r.ctx, part: part, off: r.off, ans: ans, at: r.off}
	return nil
}

// land goes back from the ranged request to the spool.
func (r *spoolReader) land() {
	if r.rest != nil {
		r.rest.Close()
		r.rest = nil
	}
	if r.slot {
		<-r.f.far
		r.slot = false
	}
}

func (r *spoolReader) Read(p []byte) (int, error) {
	n, err := r.wait()
	if err != nil {
		return 0, err
	}
	if r.rest != nil {
		return r.readRest(p)
	}
	k, err := r.f.spool.ReadAt(p[:min(int64(len(p)), n)], r.off)
	r.off += int64(k)
	return k, err
}

// readRest reads beyond the spool. What a far range cannot give, the fill will.
func (r *spoolReader) readRest(p []byte) (int, error) {
	if r.slot && r.f.want.digest != "" {
		held := r.size - holdBack - r.off
		if held <= 0 {
			r.land()
			return 0, nil
		}
		p = p[:min(int64(len(p)), held)]
	}
	n, err := r.rest.Read(p)
	r.off += int64(n)
	if err != nil && r.slot {
		r.land()
		return n, nil
	}
	return n, err
}

// next is for sendfile.
func (r *spoolReader) next(limit int64) (*os.File, int64, error) {
	if r.own == nil || r.rest != nil {
		return nil, 0, nil
	}
	n, err := r.wait()
	if err != nil || r.rest != nil {
		return nil, 0, err
	}
	if _, err := r.own.Seek(r.off, io.SeekStart); err != nil {
		return nil, 0, err
	}
	return r.own, min(n, limit), nil
}

func (r *spoolReader) skip(n int64) { r.off += n }

// ready makes it live.
func (r *spoolReader) ready() bool {
	if r.rest != nil {
		return false
	}
	n, _, err := r.f.state(r.off)
	return n > 0 || err != nil
}

func (r *spoolReader) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekEnd:
		off += r.size
	case io.SeekCurrent:
		off += r.off
	}
	r.off = off
	return off, nil
}

func (r *spoolReader) Close() error {
	r.land()
	if r.own != nil {
		_ = r.own.Close()
	}
	r.f.leave()
	return nil
}

// direct answers when there is no spool: straight from upstream, for this
// client alone.
func (c *cache) direct(ctx context.Context, q want, a asked, cp *stored) (*reply, error) {
	ask := q.question(http.MethodGet, a.header(q))
	ask.hasCopy = cp != nil
	ans, err := c.askBody(ctx, q, ask)
	if err == nil && ans.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		ans.Body.Close() // refused here, with the size that only the whole has
		ask.header.Del("Range")
		ans, err = c.askBody(ctx, q, ask)
	}
	var at, size int64
	if err == nil {
		if at, size, err = c.part(q, ans, ask.header.Get("Range") != ""); err != nil {
			ans.Body.Close()
		}
	}
	if err != nil {
		if why := q.staleFor(err); why != "" && cp != nil {
			return c.stale(cp, why), nil
		}
		return nil, err
	}
	rec := c.newRecord(q, ans.Header)
	rep := &reply{rec: rec, size: size, remote: true, outcome: "MISS", status: "fwd=miss"}
	if cp != nil {
		rep.status = "fwd=stale; fwd-status=200"
	}
	if q.whole {
		return rep, c.inMemory(ctx, q, rep, ans)
	}
	body := &remoteBody{c: c, ctx: ctx, ans: ans, at: at, part: rest{want: q, validator: rangeValidator(ans), size: size, to: a.to, origin: ans.origin}}
	if q.digest != "" {
		body.sums = newSums(q.digest)
	}
	rep.body = body
	return rep, nil
}

// header asks for the single range that a client wants. A body with a digest is
// asked for as a whole, since only that can be verified; and so is one of which
// the client has an older part, perhaps (If-Range).
func (a asked) header(q want) http.Header {
	switch {
	case q.whole || q.digest != "" || a.ifRange || a.from == 0 && a.to < 0 && a.suffix == 0:
		return nil
	case a.suffix > 0:
		return http.Header{"Range": {"bytes=-" + strconv.FormatInt(a.suffix, 10)}}
	case a.to >= 0:
		return http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", a.from, a.to)}}
	}
	return http.Header{"Range": {fmt.Sprintf("bytes=%d-", a.from)}}
}

// part judges the answer to a question that may have asked for a range: where
// its body begins, and the size of the whole (-1: not known).
func (c *cache) part(q want, ans *answer, ranged bool) (at, size int64, err error) {
	first, _, size, ok := contentRange(ans.Header.Get("Content-Range"))
	if ranged && ans.StatusCode == http.StatusPartialContent && ok && size >= 0 {
		return first, size, nil
	}
	return 0, ans.ContentLength, c.refused(q, ans)
}

// inMemory makes rep of a small body that must be whole before it is answered.
func (c *cache) inMemory(ctx context.Context, q want, rep *reply, ans *answer) error {
	defer ans.Body.Close()
	b, err := io.ReadAll(io.LimitReader(ans.Body, q.limit+1))
	if err != nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	if int64(len(b)) > q.limit {
		return (&flight{want: q}).tooLarge()
	}
	s := newSums(q.digest)
	s.write(b)
	if err := s.verify(q.digest); err != nil {
		return err
	}
	rep.rec.Size, rep.rec.SHA256, rep.size, rep.sum = int64(len(b)), s.hex(), int64(len(b)), true
	body := bytes.NewReader(b)
	rep.body = struct {
		io.ReadSeeker
		io.Closer
	}{body, io.NopCloser(nil)}
	if q.check != nil {
		return q.check(ctx, rep.rec, body)
	}
	return nil
}

// remoteBody reads a body straight from upstream, from wherever it is sought
// to, and asks again by Range when it breaks off.
type remoteBody struct {
	c    *cache
	ctx  context.Context
	part rest
	ans  *answer // may be nil: asked for when read
	at   int64   // where ans stands
	off  int64   // where the reader stands
	sums *sums   // of a body with a digest, up to at; nil: it is not verified
	held []byte  // read and hashed, not yet given out
	done bool    // all is read and verified
	tear int     // how often it broke off
}

func (b *remoteBody) Read(p []byte) (int, error) {
	for b.sums != nil {
		switch ahead := b.off - (b.at - int64(len(b.held))); {
		case ahead == 0:
			return b.readHeld(p)
		case ahead > 0 && !b.done && b.wantsEnd():
			if err := b.skipHeld(ahead); err != nil {
				return 0, err
			}
		default: // a part from the middle, which proves nothing about the whole
			b.sums, b.held = nil, nil
		}
	}
	n, err := b.readAt(p, b.off)
	b.off += int64(n)
	return n, err
}

// wantsEnd: the range that was asked for reaches into what is held back.
func (b *remoteBody) wantsEnd() bool {
	return b.part.to < 0 || b.part.to >= b.part.size-holdBack
}

// skipHeld reads n bytes that nobody wants but the digest, or some of them.
func (b *remoteBody) skipHeld(n int64) error {
	to := b.off
	b.off -= n
	_, err := b.readHeld(make([]byte, min(n, copySize)))
	b.off = to
	return err
}

// readHeld gives out what lies holdBack behind, and the rest once it verified.
func (b *remoteBody) readHeld(p []byte) (int, error) {
	for !b.done && len(b.held) <= holdBack {
		buf := make([]byte, copySize)
		n, err := b.readAt(buf, b.at)
		b.sums.write(buf[:n])
		b.held = append(b.held, buf[:n]...)
		if err == io.EOF {
			if err := b.sums.verify(b.part.want.digest); err != nil {
				return 0, err
			}
			b.done = true
		} else if err != nil {
			return 0, err
		}
	}
	free := len(b.held)
	if !b.done {
		free -= holdBack
	}
	if free == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.held[:free])
	b.held = b.held[n:]
	b.off += int64(n)
	return n, nil
}

// ready makes it live.
func (b *remoteBody) ready() bool { return b.done }

// readAt reads from off, asking for what is not at hand.
func (b *remoteBody) readAt(p []byte, off int64) (int, error) {
	for {
		if b.part.size >= 0 && off >= b.part.size {
			return 0, io.EOF
		}
		if err := b.reach(off); err != nil {
			return 0, err
		}
		n, err := b.ans.Body.Read(p)
		b.at += int64(n)
		if n > 0 || err == nil {
			return n, nil
		}
		if err == io.EOF && (b.part.size < 0 || off >= b.part.size) {
			return 0, io.EOF
		}
		b.drop()
		if b.tear++; b.tear > resumes || b.ctx.Err() != nil {
			return 0, fmt.Errorf("%w: %w", errBroken, err)
		}
	}
}

// reach brings b.ans to off: by asking for the part, or by reading on where
// upstream has no ranges.
func (b *remoteBody) reach(off int64) error {
	if b.ans != nil && b.at == off {
		return nil
	}
	part := b.part
	part.from = off
	if part.to < off {
		part.to = -1
	}
	ans, err := b.c.askRest(b.ctx, part)
	if err == nil {
		b.drop()
		b.ans, b.at, b.part.size = ans, off, ans.whole()
		return nil
	}
	if b.ans == nil || off < b.at {
		b.c.passOn(b.part.want.key())
		return err
	}
	n, err := io.CopyN(io.Discard, b.ans.Body, off-b.at)
	b.at += n
	if err != nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	return nil
}

// passOnFor is how long a file is passed on unspooled after a spool was too
// small for it and upstream would not go on from there.
const passOnFor = time.Minute

// passOn has each client of key ask upstream itself for a while: a spool that
// breaks off again, at the same place, would help nobody.
func (c *cache) passOn(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.passed) >= maxRemembered {
		clear(c.passed)
	}
	c.passed[key] = c.now().Add(passOnFor)
}

func (c *cache) passesOn(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	until, ok := c.passed[key]
	if ok && !c.now().Before(until) {
		delete(c.passed, key)
		return false
	}
	return ok
}

func (b *remoteBody) drop() {
	if b.ans != nil {
		b.ans.Body.Close()
		b.ans = nil
	}
}

func (b *remoteBody) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekEnd:
		off += b.part.size
	case io.SeekCurrent:
		off += b.off
	}
	b.off = off
	return off, nil
}

func (b *remoteBody) Close() error {
	b.drop()
	return nil
}
