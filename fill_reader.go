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
	ttl, forever := q.remote.ttlOf(q.class)
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
	resp, err := r.f.c.askRest(r.ctx, part)
	if err != nil { // the fill will come by
		r.f.mu.Lock()
		r.f.noRanges = r.f.noRanges || errors.Is(err, errBadUpstream)
		r.f.mu.Unlock()
		r.land()
		return nil
	}
	r.rest = &remoteBody{c: r.f.c, ctx: r.ctx, part: part, off: r.off, ans: resp, at: r.off}
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

// nextFile is for sendfile.
func (r *spoolReader) nextFile(limit int64) (*os.File, int64, error) {
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

func (r *spoolReader) advanceBy(n int64) { r.off += n }

// readyToRead makes it live.
func (r *spoolReader) readyToRead() bool {
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
