// fill_direct.go: passing on without a spool: straight from upstream, for one
// client alone.

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// direct answers when there is no spool: straight from upstream, for this
// client alone.
func (c *cache) direct(ctx context.Context, q want, a asked, cp *stored) (*reply, error) {
	req := q.question(http.MethodGet, a.header(q))
	req.hasCopy = cp != nil
	resp, err := c.askBody(ctx, q, req)
	if err == nil && resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		resp.Body.Close() // refused here, with the size that only the whole has
		req.header.Del("Range")
		resp, err = c.askBody(ctx, q, req)
	}
	var at, size int64
	if err == nil {
		if at, size, err = c.part(q, resp, req.header.Get("Range") != ""); err != nil {
			resp.Body.Close()
		}
	}
	if err != nil {
		if why := q.staleFor(err); why != "" && cp != nil {
			return c.stale(cp, why), nil
		}
		return nil, err
	}
	rec := c.newRecord(q, resp.Header)
	rep := &reply{rec: rec, size: size, remote: true, outcome: "MISS", status: "fwd=miss"}
	if cp != nil {
		rep.status = "fwd=stale; fwd-status=200"
	}
	if q.whole {
		return rep, c.inMemory(ctx, q, rep, resp)
	}
	body := &remoteBody{c: c, ctx: ctx, ans: resp, at: at, part: rest{want: q, validator: rangeValidator(resp), size: size, to: a.to, origin: resp.origin}}
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
func (c *cache) part(q want, resp *upstreamResponse, ranged bool) (at, size int64, err error) {
	first, _, size, ok := parseContentRange(resp.Header.Get("Content-Range"))
	if ranged && resp.StatusCode == http.StatusPartialContent && ok && size >= 0 {
		return first, size, nil
	}
	return 0, resp.ContentLength, c.refused(q, resp)
}

// inMemory makes rep of a small body that must be whole before it is answered.
func (c *cache) inMemory(ctx context.Context, q want, rep *reply, resp *upstreamResponse) error {
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, q.limit+1))
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
	ans  *upstreamResponse // may be nil: asked for when read
	at   int64             // where ans stands
	off  int64             // where the reader stands
	sums *sums             // of a body with a digest, up to at; nil: it is not verified
	held []byte            // read and hashed, not yet given out
	done bool              // all is read and verified
	tear int               // how often it broke off
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
	_, err := b.readHeld(make([]byte, min(n, copyBufferSize)))
	b.off = to
	return err
}

// readHeld gives out what lies holdBack behind, and the rest once it verified.
func (b *remoteBody) readHeld(p []byte) (int, error) {
	for !b.done && len(b.held) <= holdBack {
		buf := make([]byte, copyBufferSize)
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

// readyToRead makes it live.
func (b *remoteBody) readyToRead() bool { return b.done }

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
	resp, err := b.c.askRest(b.ctx, part)
	if err == nil {
		b.drop()
		b.ans, b.at, b.part.size = resp, off, resp.whole()
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
