// fill.go: a fill, which is the fetch of one file for all who want it: its
// phases, what becomes of its body, and how it can end. The decision to fetch is
// in cache.go.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"sync"
	"time"
)

// maxWholeBodyWait is how long clients that an expired copy could serve wait for
// the whole new one: package managers give up after 30 s of silence.
const maxWholeBodyWait = 10 * time.Second

var (
	// errAbandoned ends the context of a fill that nobody waits for, or can join, any more.
	errAbandoned = errors.New("nobody waits for the fill any more")
	// errFillQueueFull: there is no place for another fill, or none became free in time.
	errFillQueueFull = &problem{status: http.StatusServiceUnavailable, cause: errBusy, retryAfter: 10 * time.Second,
		detail: "the remote has too many downloads at once: try again later"}
	errBroken   = fmt.Errorf("%w: the body broke off", errBadUpstream)
	errTooLarge = fmt.Errorf("%w: the body is too large", errBadUpstream)
)

// fillPhase is how far a fill is. Phases follow each other in this order; any
// of them may be followed by phaseDone.
type fillPhase int

const (
	phaseQueued   fillPhase = iota // waits for one of the remote's places
	phaseAsking                    // asks another replica, or upstream
	phaseFilling                   // the headers are known, the body grows in the spool
	phaseComplete                  // the body is whole and verified
	phaseStoring                   // it is being stored, here or by the replica that is followed
	phaseDone                      // outcome says how it ended
)

// bodyFate is what becomes of a fill's body. Of several the last in this order counts.
type bodyFate int

const (
	fateKeep            bodyFate = iota // it is to be stored
	fatePassOn                          // it may not be stored: it ends with its last client
	fatePurgedHere                      // it is not stored any more; the purge waits for one that is being stored
	fatePurgedElsewhere                 // the same by another replica, which cannot wait: what is stored is removed
)

// outcomeKind is how a fill ended. Replicas tell each other by these words.
type outcomeKind string

const (
	outcomeBody      outcomeKind = "body"      // there is a whole, verified body
	outcomeUnchanged outcomeKind = "unchanged" // the expired copy is still good
	outcomeLookAgain outcomeKind = "again"     // the store has the file by now, or its clients begin anew
	outcomeNoSpool   outcomeKind = "no spool"  // there is none: each client asks upstream itself
	outcomeFailed    outcomeKind = "failed"    // err says why
)

// fillOutcome is how a fill ended; err is what clients of a failed one get.
type fillOutcome struct {
	kind outcomeKind
	err  error
}

func failedOutcome(err error) fillOutcome { return fillOutcome{outcomeFailed, err} }

// fill is one fetch of one file, as clients and the table see it. Clients wait for
// it and read its spool at their own pace. Its goroutine is fillRun's.
type fill struct {
	c         *cache
	key       string
	file      fileRequest
	oldRecord *record // of the expired copy; nil: there is none

	ctx      context.Context
	cancel   context.CancelCauseFunc
	farSlots chan struct{} // of ranged requests beside the fill

	clients int // guarded by the table's mu

	mu         sync.Mutex // guards the fields below; taken after the table's mu and before a spool's
	changed    broadcast
	phase      fillPhase
	fate       bodyFate
	outcome    fillOutcome
	rec        *record // from phaseFilling on; replaced when the body is complete
	spool      *spool  // nil: not opened yet
	validator  string  // for If-Range; "": upstream gave no strong one
	origin     int     // which of the remote's origins answered
	isFollower bool    // its body began as another replica's
	leaseToken string  // of the lease on the key across replicas; "": it is not held
}

// joinFill returns the fill of a file, a new one if there is none; its leader
// is the request that began it. endedBefore is fillTable.endedOf(key) from before the
// store was looked up.
func (c *cache) joinFill(key string, file fileRequest, cp *storedCopy, endedBefore int64) (f *fill, leads bool) {
	return c.fills.join(key, file.spelling, func() *fill {
		run := &fillRun{fill: fill{c: c, key: key, file: file, farSlots: make(chan struct{}, maxFarRanges)}, endedBefore: endedBefore}
		if cp != nil {
			run.oldRecord = cp.rec
		}
		run.ctx, run.cancel = context.WithCancelCause(c.ctx)
		c.fills.running.Go(run.run)
		return &run.fill
	})
}

func (f *fill) leave() { f.c.fills.leave(f, 1) }

// advance moves the fill to a later phase and wakes all that wait. mu is held.
func (f *fill) advance(to fillPhase) {
	if to != f.phase+1 && (to != phaseDone || f.phase == phaseDone) {
		panic(fmt.Sprintf("fill of %s: from phase %d to %d", f.key, f.phase, to))
	}
	f.phase = to
	f.changed.wake()
}

// set changes what mu guards.
func (f *fill) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fill) setFate(fate bodyFate) { f.set(func() { f.fate = max(f.fate, fate) }) }

// await waits until the fill is as is says, which is called with mu held.
func (f *fill) await(ctx context.Context, is func() bool) error {
	for {
		f.mu.Lock()
		ok, changed := is(), f.changed.next()
		f.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// state is how far the fill is, and what becomes of its body.
func (f *fill) state() (fillPhase, bodyFate) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.phase, f.fate
}

// progress is how much of the body has arrived, of how much (-1: not known).
func (f *fill) progress() (written, size int64) {
	f.mu.Lock()
	spool := f.spool
	f.mu.Unlock()
	if spool == nil {
		return 0, -1
	}
	return spool.progress()
}

// fillRun is the goroutine of a fill, which belongs to the cache. Its methods are
// that goroutine's alone; it alone moves the phase, writes the spool and sets the
// record, and so reads them without the lock.
type fillRun struct {
	fill
	endedBefore int64  // fillTable.endedOf(key) when the store was looked up
	freeSlot    func() // gives the place among the remote's fills back; may be called again
	lease       lease
}

// run is the goroutine.
func (f *fillRun) run() {
	outcome := failedOutcome(f.waitForSlot())
	if outcome.err == nil {
		outcome = f.fetch()
		f.freeSlot()
	}
	if cause := context.Cause(f.ctx); cause != nil && outcome.kind != outcomeBody {
		outcome = failedOutcome(cause)
	}
	f.applyToOldCopy(outcome)
	f.end(outcome)
	if errors.Is(outcome.err, errDigest) {
		f.c.fills.running.Go(func() { f.c.generations.askAfter(f.c.ctx, &f.file, outcome.err) }) // its clients have been cut off already
	}
}

// waitForSlot waits for a place among the remote's fills, as long as a client waits for
// this one.
func (f *fillRun) waitForSlot() error {
	slots := f.c.fills.slotsOf(f.file.remote.name)
	select {
	case slots.queue <- struct{}{}:
	default:
		return errFillQueueFull
	}
	if err := takePlace(f.ctx, slots.places); err != nil {
		<-slots.queue
		return err
	}
	f.freeSlot = sync.OnceFunc(func() {
		<-slots.places
		<-slots.queue
	})
	f.set(func() { f.advance(phaseAsking) })
	return nil
}

// fetch brings the body, or finds out that none is needed or to be had.
func (f *fillRun) fetch() fillOutcome {
	f.acquireLease()
	// The store can have the file although it did not when it was looked up: another fill
	// has ended since then, here or on another replica.
	hasChanged := f.c.fills.endedOf(f.key).Load() != f.endedBefore || f.lease.wasHeld
	if hasChanged && f.isStoredByNow() {
		return fillOutcome{kind: outcomeLookAgain}
	}
	if leader := f.lease.other; leader != nil {
		if err := f.file.behaves().permit(f.ctx, f.file, f.oldRecord); err != nil {
			return failedOutcome(err)
		}
		if outcome, ended := f.fetchFromReplica(leader); ended {
			return outcome
		}
	}
	var validators http.Header
	if f.oldRecord != nil && f.file.isRevalidated() && f.oldRecord.Links == f.file.rewrittenLinks().tableID() {
		var unchanged bool
		var err error
		if validators, unchanged, err = f.revalidateByHEAD(); err != nil {
			return failedOutcome(err)
		}
		if unchanged {
			return fillOutcome{kind: outcomeUnchanged}
		}
	}
	return f.fetchBody(validators)
}

// isStoredByNow looks into the store again. It asks for the body too, since a
// store that is down may still know the record.
func (f *fillRun) isStoredByNow() bool {
	cp, err := f.c.findCopy(f.ctx, f.key, f.file, byteRange{})
	if err != nil {
		return false
	}
	cp.body.Close()
	return cp.isFresh()
}

// fetchBody gets the body from upstream; with validators, if it has changed.
func (f *fillRun) fetchBody(validators http.Header) fillOutcome {
	if f.oldRecord == nil && !f.openSpool() { // upstream need not be asked on behalf of all
		return fillOutcome{kind: outcomeNoSpool}
	}
	req := f.file.newUpstreamRequest(http.MethodGet, validators)
	req.hasCopy = f.oldRecord != nil
	resp, err := f.file.behaves().requestBody(f.ctx, f.c.upstream, req)
	if err != nil {
		return failedOutcome(err)
	}
	switch {
	case validators == nil:
	case f.isUnchanged(resp):
		resp.Body.Close()
		return fillOutcome{kind: outcomeUnchanged}
	case resp.StatusCode == http.StatusNotModified:
		resp.discardBody() // it names another version: get that
		return f.fetchBody(nil)
	}
	body, outcome := f.acceptHeaders(resp)
	if body == nil {
		resp.Body.Close()
		return outcome
	}
	return f.receiveBody(body)
}

// acceptHeaders looks at the headers of an answer and lets clients know them. The body
// is nil if it is not wanted: outcome says why.
func (f *fillRun) acceptHeaders(resp *upstreamResponse) (body *upstreamReader, outcome fillOutcome) {
	if err := f.c.statusError(f.file, resp); err != nil {
		return nil, failedOutcome(err)
	}
	if f.file.maxBytes > 0 && resp.ContentLength > f.file.maxBytes {
		return nil, failedOutcome(f.file.newTooLargeError())
	}
	if !f.openSpool() {
		return nil, fillOutcome{kind: outcomeNoSpool}
	}
	rec := f.file.newRecord(resp.Header, f.c.now())
	rec.IsPage = f.file.isPage(resp)
	storable := f.mayBeStored(resp, rec.IsPage)
	if !storable && f.oldRecord != nil && f.file.rulesOthers() {
		return nil, failedOutcome(errAgreeing) // the old root is there, and still rules
	}
	body = newUpstreamReader(f.ctx, f.c, f.file, resp)
	head := replicaHead{rec, body.size, body.validator, resp.origin, storable}
	if body.rewriteLinks() {
		head.Total, head.Validator = -1, "" // upstream's parts are of another body
	}
	if err := f.publishHeaders(head); err != nil {
		f.c.reportStoreError("spool", "beginning", f.key, err)
		return nil, fillOutcome{kind: outcomeNoSpool}
	}
	return body, fillOutcome{}
}

// openSpool makes the spool, if there is none yet; false: the file is passed on.
func (f *fillRun) openSpool() bool {
	if f.spool != nil {
		return true
	}
	if _, found := f.c.passOn.get(f.key); found || f.c.space.isBroken() {
		return false
	}
	spool := f.c.space.newSpool(f.file.digest)
	f.set(func() { f.spool = spool })
	return true
}

// publishHeaders makes room for the coming body and its headers known to all that wait.
func (f *fillRun) publishHeaders(head replicaHead) error {
	f.spool.isTransient = !head.Storable
	if err := f.spool.setSize(head.Total); err != nil {
		return err
	}
	if !head.Storable {
		f.setFate(fatePassOn)
	}
	f.set(func() {
		f.rec, f.origin, f.validator = head.Record, head.Origin, head.Validator
		f.advance(phaseFilling)
	})
	f.c.fills.leave(&f.fill, 0) // the last client may have left already
	return nil
}

// receiveBody moves a body into the spool.
func (f *fillRun) receiveBody(body *upstreamReader) fillOutcome {
	buf := largeBuffers.Get().(*[largeBufferSize]byte)
	_, err := io.CopyBuffer(f, body, buf[:])
	largeBuffers.Put(buf)
	body.Close()
	switch {
	case err == nil:
		return f.completeFill()
	case errors.Is(err, errNoSpace):
		return f.runOutOfSpace(err)
	}
	return failedOutcome(err)
}

// passOnTime is how long a file is passed on after its spool ran out of space, and after a
// client was cut off by that: another spool would break off at the same place.
const passOnTime = time.Minute

// runOutOfSpace ends a fill in the middle of its body. Clients that have a part
// of it are cut off; the others, and those that come now, ask upstream
// themselves.
func (f *fillRun) runOutOfSpace(err error) fillOutcome {
	f.c.reportStoreError("spool", "growing", f.key, err)
	f.c.passOn.putFor(f.key, struct{}{}, passOnTime)
	return fillOutcome{kind: outcomeNoSpool, err: err}
}

// completeFill is the last step of a body that is all there: it is verified,
// published and stored. A store that fails takes nothing from the clients.
func (f *fillRun) completeFill() fillOutcome {
	f.freeSlot() // what follows may fetch other files of the remote
	rec := *f.rec
	if err := f.spool.hash.verify(); err != nil {
		f.c.metrics.countUpstreamError(f.file.remote.name, "digest")
		return failedOutcome(err)
	}
	rec.Size, _ = f.spool.progress()
	rec.SHA256 = f.spool.hash.sumHex()
	if f.oldRecord != nil && f.oldRecord.SHA256 == rec.SHA256 {
		rec.Modified = f.oldRecord.Modified // the same bytes keep their date
	}
	switch err := f.file.behaves().checkBody(f.ctx, &rec, f.spool.body()); {
	case errors.Is(err, errStoreDown) && f.oldRecord == nil: // clients get it, and the store does not
		f.setFate(fatePassOn)
	case err != nil:
		return failedOutcome(err)
	}
	f.publishBody(&rec)
	return f.store()
}

// publishBody lets all that wait have the whole body. The remote has a place for
// another fill from now on.
func (f *fillRun) publishBody(rec *record) {
	f.freeSlot() // of a fill that followed another replica's
	f.spool.end(io.EOF)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rec = rec
	f.advance(phaseComplete)
	if f.fate == fateKeep {
		f.advance(phaseStoring)
	}
}

// store stores a body that is published, unless its fate is another.
func (f *fillRun) store() (outcome fillOutcome) {
	outcome.kind = outcomeBody
	if f.phase != phaseStoring {
		return outcome
	}
	// The TTL runs from here: S3 may need a while for a large file.
	arrived := f.c.now()
	if f.c.storeBody(f.c.ctx, f.key, f.rec, f.spool.body(), putCondition{}) == nil { // else it has logged its failure
		f.c.refreshMark(f.c.ctx, f.file.target, f.rec, arrived)
		f.c.evictor.trimVariants(f.c.ctx, f.file.target)
		warnOfIndex(&f.fill, f.rec)
	} else if f.oldRecord != nil && f.file.rulesOthers() {
		outcome = failedOutcome(errAgreeing) // the old root is there, and still rules
	}
	if _, fate := f.state(); fate == fatePurgedElsewhere { // when nothing was stored yet
		f.removeStored("purging")
	}
	return outcome
}

// removeStored removes what is stored under the fill's key.
func (f *fillRun) removeStored(doing string) {
	if err := f.c.removeFile(f.c.ctx, f.file.remote.name, f.key, removedPrefix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.c.reportStoreError("storage", doing, f.key, err)
	}
}

// applyToOldCopy does what the end of a fill means for the copy that it was to
// replace, unless that was purged meanwhile or the end means nothing for it.
func (f *fillRun) applyToOldCopy(outcome fillOutcome) {
	c, old := f.c, f.oldRecord
	if _, fate := f.state(); old == nil || fate >= fatePurgedHere || outcome.kind == outcomeLookAgain {
		return
	}
	status, _ := errors.AsType[*upstreamStatus](outcome.err)
	switch {
	case outcome.kind == outcomeUnchanged, isUnreachable(outcome.err):
		c.refreshMark(c.ctx, f.file.target, old, c.now())
	case status != nil && status.isGone() && !f.file.sharedKey: // else another image may have it
		c.log.Info("evicted a file that upstream does not have any more", "remote", f.file.remote.name, "path", f.file.path, "status", status.code)
		f.removeStored("evicting")
	}
}

// isUnreachable reports whether upstream said nothing that counts, so that an
// expired copy stays good.
func isUnreachable(err error) bool {
	return failedByNetwork(err) || errors.Is(err, errBroken)
}

// end takes the fill out of the table and lets everyone know how it ended.
func (f *fillRun) end(outcome fillOutcome) {
	if f.lease.release != nil {
		f.lease.release()
	}
	unused := f.c.fills.finish(&f.fill, outcome) // first: a client that is cut off may come again at once
	if f.spool != nil {
		f.spool.end(errors.Join(outcome.err, io.ErrUnexpectedEOF)) // unless it is complete
		f.spool.settle()
	}
	if outcome.err != nil {
		f.c.log.Debug("a fill has failed", "key", f.key, "error", outcome.err)
	}
	if unused {
		f.releaseSpool()
	}
	f.cancel(nil)
}

// releaseSpool is called by whoever is last: the fill or its last client.
func (f *fill) releaseSpool() {
	if f.spool != nil {
		f.spool.release()
	}
}
