// fill_reader.go: how clients wait for a fill and read its growing body.

package main

import (
	"context"
	"errors"
	"net/http"
	"os"
	"strconv"
)

const (
	// farRangeDistance is how far ahead of the fill a range must begin to be
	// worth an upstream request of its own.
	farRangeDistance = 8 << 20
	// maxFarRanges bounds those requests for one fill.
	maxFarRanges = 8
)

// awaitReply waits until the fill has something to answer with; again says that
// the store must be looked up once more. It closes cp's body unless the reply
// sends it.
func (f *fill) awaitReply(ctx context.Context, leads bool, rng byteRange, cp *storedCopy) (reply *fileReply, again bool, err error) {
	defer func() {
		if cp != nil && (reply == nil || reply.body != cp.body) {
			cp.body.Close()
		}
	}()
	waits := cp != nil // for the whole body, because the copy can answer instead
	lateComer := !leads && f.hasAll()
	ready, fate, outcome := false, fateKeep, fillOutcome{}
	isDecided := func() bool {
		ready = f.canAnswer(waits) && (!lateComer || f.phase >= phaseComplete)
		fate, outcome = f.fate, f.outcome
		return ready || f.phase == phaseDone
	}
	if waits {
		enough, cancel := context.WithTimeout(ctx, maxWholeBodyWait)
		defer cancel()
		waits = f.await(enough, isDecided) == nil // else a growing body will do
		if f.await(enough, isDecided) != nil && ctx.Err() == nil {
			defer f.leave()
			why := "unreachable"
			if phase, _ := f.state(); phase == phaseQueued {
				why = "crowded"
			} else if f.file.rulesOthers() {
				why = "agreeing"
			}
			return f.file.staleReply(f.c, cp, why), false, nil
		}
	}
	if err := f.await(ctx, isDecided); err != nil {
		f.leave()
		return nil, false, err
	}
	if !ready {
		f.leave()
		return f.replyWithoutBody(ctx, cp, outcome)
	}
	reply = f.replyFromSpool(ctx, leads, rng)
	if lateComer && fate == fateKeep { // there was no download to join any more
		ttl, forever := f.file.remote.ttlOf(f.file.class)
		f.c.countUse(f.file.remote.name, f.key)
		hit := &storedCopy{object: &object{rec: reply.rec, body: reply.body}, goodAt: f.c.now(), ttlLeft: ttl, forever: forever}
		reply = hit.hitReply()
	}
	return reply, false, nil
}

// hasAll reports whether the body is all there: a client has no download to join any more.
func (f *fill) hasAll() bool {
	written, size := f.progress()
	return written == size
}

// awaitEnd waits until the fill has ended, and leaves it.
func (f *fill) awaitEnd(ctx context.Context) (outcome fillOutcome, err error) {
	defer f.leave()
	err = f.await(ctx, func() bool {
		outcome = f.outcome
		return f.phase == phaseDone
	})
	return outcome, err
}

// canAnswer reports whether a client can be sent the complete body, or the growing one
// unless it waits for the whole. mu is held.
func (f *fill) canAnswer(waits bool) bool {
	switch {
	case f.phase == phaseDone:
		return f.outcome.kind == outcomeBody
	case f.file.rulesOthers():
		return false // not before it is stored
	case f.phase >= phaseComplete:
		return true
	case f.phase < phaseFilling || f.file.maxBytes > 0:
		return false
	}
	if _, size := f.spool.progress(); f.file.digest != "" && size >= 0 && size <= heldBackBytes {
		return false // nothing may be sent before it verifies: a 502 is still possible
	}
	return !waits
}

// replyFromSpool is the reply of a fill that can answer. Closing its body leaves
// the fill.
func (f *fill) replyFromSpool(ctx context.Context, leads bool, rng byteRange) *fileReply {
	_, size := f.progress()
	f.mu.Lock()
	reply := &fileReply{rec: f.rec, size: size, result: "MISS", cacheStatus: "fwd=miss", mirror: f.file.remote.mirrorHost(f.origin)}
	if f.oldRecord != nil {
		reply.cacheStatus = "fwd=stale; fwd-status=200"
	}
	if leads && !f.isFollower {
		reply.willBeStored = f.fate == fateKeep
	} else {
		reply.cacheStatus += "; collapsed"
	}
	f.mu.Unlock()
	if rng.head {
		f.leave()
		reply.body = unreadBody(size)
		return reply
	}
	r := f.spool.newReader(ctx, f.file.digest != "" && rng.isWhole(size))
	reply.body = &fillReader{spoolReader: r, f: f, last: rng.to, mayRequestFar: rng.from > 0 || rng.suffix > 0}
	return reply
}

// replyWithoutBody answers when the fill has brought no body; again says that
// the store must be looked up once more.
func (f *fill) replyWithoutBody(ctx context.Context, cp *storedCopy, outcome fillOutcome) (reply *fileReply, again bool, err error) {
	c, file := f.c, f.file
	switch {
	case outcome.kind == outcomeLookAgain,
		outcome.kind == outcomeUnchanged && (cp == nil || f.oldRecord == nil || cp.rec.SHA256 != f.oldRecord.SHA256): // it may have been replaced since it was opened
		return nil, true, nil
	case outcome.kind == outcomeUnchanged:
		cp.goodAt = c.now()
		c.countUse(file.remote.name, file.key())
		return &fileReply{rec: cp.rec, size: cp.rec.Size, body: cp.body, goodAt: cp.goodAt,
			cacheStatus: "fwd=stale; fwd-status=304", result: "REVALIDATED"}, false, nil
	case outcome.kind == outcomeNoSpool && cp != nil && file.rulesOthers(): // a new root that is not stored does not rule
		return file.staleReply(c, cp, "agreeing"), false, nil
	case outcome.kind == outcomeNoSpool:
		if reply, outcome.err = c.passOnReply(ctx, file, cp != nil); outcome.err == nil {
			return reply, false, nil
		}
	}
	if why := file.staleReason(outcome.err); why != "" && cp != nil {
		return file.staleReply(c, cp, why), false, nil
	}
	return nil, false, outcome.err
}

// staleReason says why the expired copy may answer for err; "" if it may not.
func (file fileRequest) staleReason(err error) string {
	status, _ := errors.AsType[*upstreamStatus](err)
	switch {
	case isUnreachable(err):
		return "unreachable"
	case errors.Is(err, errFillQueueFull):
		return "crowded"
	case errors.Is(err, errAgreeing):
		return "agreeing"
	case status == nil, status.code < 500 && status.code != http.StatusTooManyRequests:
		return ""
	case file.remote.staleIfError, file.behaves().servesStale(status.code):
		return "upstream-" + strconv.Itoa(status.code)
	}
	return ""
}

// fillReader is a client's reader of a growing body. A range far ahead of the
// fill it reads from upstream, by a request of its own.
type fillReader struct {
	*spoolReader
	f             *fill
	last          int64           // last byte that was asked for; -1: to the end
	mayRequestFar bool            // it was not decided yet
	beyond        *upstreamReader // reads ahead of the fill, and holds a far slot; nil: the spool is read
}

func (r *fillReader) Read(p []byte) (int, error) {
	if err := r.chooseSource(); err != nil {
		return 0, err
	}
	if r.beyond != nil {
		if n, _ := r.beyond.Read(p); n > 0 {
			r.offset += int64(n)
			return n, nil
		}
		r.leaveBeyond() // what it cannot give the fill will bring
	}
	return r.spoolReader.Read(p)
}

// chooseSource decides, before the first read, whether the range that was asked
// for is worth a request of its own.
func (r *fillReader) chooseSource() error {
	for r.mayRequestFar && r.isFarAhead() {
		_, changed, _ := r.available()
		if changed == nil {
			break
		}
		select {
		case r.f.farSlots <- struct{}{}:
			beyond := r.f.newPartReader(r.ctx, r.offset, r.last)
			if r.isFarAhead() && beyond.seekUpstream(r.offset) == nil { // still, after the wait
				r.beyond = beyond
			} else { // the fill will come by
				<-r.f.farSlots
			}
			r.mayRequestFar = false
		case <-changed:
		case <-r.ctx.Done():
			return context.Cause(r.ctx)
		}
	}
	r.mayRequestFar = false
	return nil
}

func (r *fillReader) isFarAhead() bool {
	written, size := r.f.progress()
	return r.offset-written > farRangeDistance && r.offset < size
}

// leaveBeyond goes back to the spool.
func (r *fillReader) leaveBeyond() {
	if r.beyond != nil {
		r.beyond.Close()
		r.beyond = nil
		<-r.f.farSlots
	}
}

// nextFile: see fileSource.
func (r *fillReader) nextFile(limit int64) (*os.File, int64, error) {
	if err := r.chooseSource(); err != nil || r.beyond != nil {
		return nil, 0, err
	}
	return r.spoolReader.nextFile(limit)
}

// readyToRead: see growingBody.
func (r *fillReader) readyToRead() bool { return r.beyond == nil && r.spoolReader.readyToRead() }

func (r *fillReader) Close() error {
	r.leaveBeyond()
	err := r.spoolReader.Close()
	r.f.set(func() {
		if r.f.outcome.kind == outcomeNoSpool { // a slow client learns only now that it is cut off, and comes again
			r.f.c.passOn.putFor(r.f.key, struct{}{}, passOnTime)
		}
	})
	r.f.leave()
	return err
}
