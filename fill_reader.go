// fill_reader.go: how clients follow the spool of a fill.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
)

// awaitFill waits until f has something to answer with. It closes cp's body unless
// the reply sends it.
func (c *cache) awaitFill(ctx context.Context, f *fill, lead bool, rng byteRange, cp *storedCopy) (reply *fileReply, err error) {
	defer func() {
		if cp != nil && (reply == nil || reply.body != cp.body) {
			cp.body.Close()
		}
	}()
	f.mu.Lock()
	arrived := !lead && f.written == f.size // all there before this client was
	f.mu.Unlock()
	for {
		f.mu.Lock()
		ready, done, changed, err := f.canAnswer(cp != nil), f.done, f.changed, f.err
		ready = ready && (!arrived || f.complete) // it is being verified
		stored := arrived && f.storing
		f.mu.Unlock()
		switch {
		case ready && stored:
			return f.hitFromSpool(ctx, rng), nil
		case ready:
			return f.replyFromSpool(ctx, lead, rng), nil
		case done:
			f.leave()
			return c.replyWithoutBody(ctx, f.file, rng, cp, err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			f.leave()
			return nil, context.Cause(ctx)
		}
	}
}

// canAnswer says whether a client can be sent the growing or complete body. f.mu
// is held.
func (f *fill) canAnswer(hasCopy bool) bool {
	switch {
	case f.complete:
		return true
	case f.rec == nil || f.done || f.file.needsWholeBody:
		return false
	case f.file.digest != "" && f.size >= 0 && f.size <= holdBack:
		return false // nothing may be sent before it verifies: a 502 is still possible
	}
	return !hasCopy || f.late
}

// replyFromSpool is the answer out of a spool. Closing its body leaves the flight.
func (f *fill) replyFromSpool(ctx context.Context, lead bool, rng byteRange) *fileReply {
	f.mu.Lock()
	reply := &fileReply{rec: f.rec, size: f.size, fromRemote: true, result: "MISS", hashKnown: f.complete || f.rec.SHA256 != ""}
	reply.cacheStatus = "fwd=miss"
	if f.oldRecord != nil {
		reply.cacheStatus = "fwd=stale; fwd-status=200"
	}
	if lead && !f.followed {
		reply.willBeStored = f.storable
	} else {
		reply.cacheStatus += "; collapsed"
	}
	f.mu.Unlock()
	if rng.head {
		f.leave()
		reply.body = unreadBody(reply.size)
		return reply
	}
	reply.body = f.newReader(ctx, rng)
	return reply
}

// hitFromSpool is the answer out of a spool whose body is complete and being stored:
// for who comes now there is no download to join.
func (f *fill) hitFromSpool(ctx context.Context, rng byteRange) *fileReply {
	c, file := f.c, f.file
	reply := f.replyFromSpool(ctx, false, rng)
	ttl, forever := file.remote.ttlOf(file.class)
	c.countUse(file.remote.name, f.key)
	return c.hitReply(&storedCopy{object: &object{reply.rec, reply.body}, goodAt: c.now(), ttlLeft: ttl, forever: forever}, "")
}

// replyWithoutBody answers when the flight brought no body.
func (c *cache) replyWithoutBody(ctx context.Context, file fileRequest, rng byteRange, cp *storedCopy, err error) (*fileReply, error) {
	_, full := errors.AsType[*spoolError](err)
	switch {
	case errors.Is(err, errUnchanged) && cp != nil:
		cp.goodAt = c.now()
		c.countUse(file.remote.name, file.key())
		return &fileReply{rec: cp.rec, size: cp.rec.Size, body: cp.body, goodAt: cp.goodAt, hashKnown: true,
			cacheStatus: "fwd=stale; fwd-status=304", result: "REVALIDATED"}, nil
	case errors.Is(err, errUnchanged), errors.Is(err, errAbandoned):
		return nil, errLookAgain
	case full, errors.Is(err, errNoSpool):
		return c.passOnReply(ctx, file, rng, cp)
	case cp != nil:
		if why := file.staleReason(err); why != "" {
			c.countUse(file.remote.name, file.key())
			return c.staleReply(cp, why), nil
		}
	}
	return nil, err
}

// staleReason says why the expired copy may answer for err; "" if it may not.
func (file fileRequest) staleReason(err error) string {
	if isUnreachable(err) {
		return "unreachable"
	}
	if errors.Is(err, errFillQueueFull) {
		return "crowded"
	}
	status, _ := errors.AsType[*upstreamStatus](err)
	switch {
	case status == nil:
		return ""
	case status.code == http.StatusTooManyRequests && (file.staleOn429 || file.remote.staleIfError),
		status.code >= 500 && (file.staleOn5xx || file.remote.staleIfError):
		return "upstream-" + strconv.Itoa(status.code)
	}
	return ""
}

// newReader follows f's spool for one client.
func (f *fill) newReader(ctx context.Context, rng byteRange) io.ReadSeekCloser {
	r := &spoolReader{f: f, ctx: ctx, to: rng.to}
	// An open file of its own has an offset of its own, which sendfile needs.
	// Where the store has taken the name away already, the shared one is read;
	// the name may be another spool's by now.
	if own, err := os.Open(f.spool.Name()); err == nil && sameFile(own, f.spool) {
		r.ownFile = own
	} else if err == nil {
		_ = own.Close()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	single := rng.from > 0 || rng.suffix > 0
	r.size = f.size
	r.mayRequestFar = single && !f.complete && (f.validator != "" || f.file.digest != "")
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
	f             *fill
	ctx           context.Context
	size          int64    // of the whole body as it was known in the beginning; -1: not known
	ownFile       *os.File // nil: read through the flight's descriptor
	offset        int64
	to            int64           // last byte that was asked for, -1: the end
	mayRequestFar bool            // a far range may be asked for upstream
	beyond        *upstreamReader // reads beyond the spool, if it does
	holdsFarSlot  bool            // rest holds a far slot
}

// readableBytes is how far clients may read. f.mu is held.
func (f *fill) readableBytes() int64 {
	switch {
	case f.complete || f.file.digest == "":
		return f.written
	case f.size >= 0:
		return max(0, min(f.written, f.size-holdBack))
	}
	return max(0, f.written-holdBack)
}

// readState is what a reader at off can do now: read n bytes, or stop with err, or
// wait for changed.
func (f *fill) readState(off int64) (n int64, changed chan struct{}, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch n := f.readableBytes() - off; {
	case n > 0:
		return n, nil, nil
	case f.complete:
		return 0, nil, io.EOF
	case f.done:
		return 0, nil, f.err
	}
	return 0, f.changed, nil
}

// waitForBytes blocks until bytes can be read from the spool, or from r.rest.
func (r *spoolReader) waitForBytes() (n int64, err error) {
	for {
		if r.beyond != nil {
			return 0, nil
		}
		n, changed, err := r.f.readState(r.offset)
		if _, full := errors.AsType[*spoolError](err); full {
			if r.beyond, err = r.continueUpstream(); err != nil {
				return 0, err
			}
			continue
		}
		if n > 0 || err != nil {
			return n, err
		}
		if r.mayRequestFar && r.isFar() {
			if err := r.requestFarRange(changed); err != nil {
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

// continueUpstream is what a client reads on from when the spool could not grow: what has
// arrived and is not verified yet, and behind it an upstream request of its own.
func (r *spoolReader) continueUpstream() (*upstreamReader, error) {
	f := r.f // has ended: nothing of it changes any more
	b := &upstreamReader{c: f.c, ctx: r.ctx, part: f.partFrom(r.offset, r.to), offset: r.offset, respOffset: f.written}
	if f.file.digest == "" {
		return b, nil
	}
	b.hash, b.held = f.hash.clone(), make([]byte, max(0, f.written-r.offset))
	if _, err := f.spool.ReadAt(b.held, r.offset); err != nil && len(b.held) > 0 {
		return nil, fmt.Errorf("reading the spool: %w", err)
	}
	return b, nil
}

func (r *spoolReader) isFar() bool {
	r.f.mu.Lock()
	defer r.f.mu.Unlock()
	end := r.f.size
	if r.f.file.digest != "" {
		end -= holdBack // that part waits until the whole body verifies
	}
	return !r.f.noRanges && r.offset-r.f.written > farRangeDistance && r.offset < end
}

// requestFarRange begins a ranged request for what is far ahead of the fill, or waits for
// a slot to do so.
func (r *spoolReader) requestFarRange(changed chan struct{}) error {
	select {
	case r.f.farSlots <- struct{}{}:
	case <-changed:
		return nil // the fill came closer: judge again
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
	r.holdsFarSlot = true
	if !r.isFar() { // any more, after the wait
		r.leaveFarRange()
		return nil
	}
	r.mayRequestFar = false
	part := r.f.partFrom(r.offset, r.to)
	resp, err := r.f.c.requestPart(r.ctx, part)
	if err != nil { // the fill will come by
		r.f.mu.Lock()
		r.f.noRanges = r.f.noRanges || errors.Is(err, errBadUpstream)
		r.f.mu.Unlock()
		r.leaveFarRange()
		return nil
	}
	r.beyond = &upstreamReader{c: r.f.c, ctx: r.ctx, part: part, offset: r.offset, resp: resp, respOffset: r.offset}
	return nil
}

// leaveFarRange goes back from the ranged request to the spool.
func (r *spoolReader) leaveFarRange() {
	if r.beyond != nil {
		r.beyond.Close()
		r.beyond = nil
	}
	if r.holdsFarSlot {
		<-r.f.farSlots
		r.holdsFarSlot = false
	}
}

func (r *spoolReader) Read(p []byte) (int, error) {
	n, err := r.waitForBytes()
	if err != nil {
		return 0, err
	}
	if r.beyond != nil {
		return r.readBeyond(p)
	}
	k, err := r.f.spool.ReadAt(p[:min(int64(len(p)), n)], r.offset)
	r.offset += int64(k)
	return k, err
}

// readBeyond reads beyond the spool. What a far range cannot give, the fill will.
func (r *spoolReader) readBeyond(p []byte) (int, error) {
	if r.holdsFarSlot && r.f.file.digest != "" {
		held := r.size - holdBack - r.offset
		if held <= 0 {
			r.leaveFarRange()
			return 0, nil
		}
		p = p[:min(int64(len(p)), held)]
	}
	n, err := r.beyond.Read(p)
	r.offset += int64(n)
	if err != nil && r.holdsFarSlot {
		r.leaveFarRange()
		return n, nil
	}
	return n, err
}

// nextFile is for sendfile.
func (r *spoolReader) nextFile(limit int64) (*os.File, int64, error) {
	if r.ownFile == nil || r.beyond != nil {
		return nil, 0, nil
	}
	n, err := r.waitForBytes()
	if err != nil || r.beyond != nil {
		return nil, 0, err
	}
	if _, err := r.ownFile.Seek(r.offset, io.SeekStart); err != nil {
		return nil, 0, err
	}
	return r.ownFile, min(n, limit), nil
}

func (r *spoolReader) advanceBy(n int64) { r.offset += n }

// readyToRead makes it live.
func (r *spoolReader) readyToRead() bool {
	if r.beyond != nil {
		return false
	}
	n, _, err := r.f.readState(r.offset)
	return n > 0 || err != nil
}

func (r *spoolReader) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekEnd:
		off += r.size
	case io.SeekCurrent:
		off += r.offset
	}
	r.offset = off
	return off, nil
}

func (r *spoolReader) Close() error {
	r.leaveFarRange()
	if r.ownFile != nil {
		_ = r.ownFile.Close()
	}
	r.f.leave()
	return nil
}
