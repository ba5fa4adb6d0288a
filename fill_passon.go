// fill_passon.go: passing a file on without a spool: straight from upstream, by a
// request for one client alone.

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
)

// passOnReply answers where there is no spool: from upstream, for this client
// alone. Nothing is stored. A body that is still to come has one of the remote's places.
func (c *cache) passOnReply(ctx context.Context, file fileRequest, rng byteRange, cp *storedCopy) (*fileReply, error) {
	places := c.fills.slotsOf(file.remote.name).passOns
	select {
	case places <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	reply, err := file.passOn(ctx, c, rng, cp)
	if err == nil {
		if body, ok := reply.body.(*upstreamReader); ok {
			body.places = places
			return reply, nil
		}
	}
	<-places
	return reply, err
}

// passOn asks upstream for a file that is not stored, for one client alone.
func (file fileRequest) passOn(ctx context.Context, c *cache, rng byteRange, cp *storedCopy) (*fileReply, error) {
	req := file.newUpstreamRequest(http.MethodGet, rng.rangeHeader(file))
	req.hasCopy = cp != nil
	resp, err := file.behaves().requestBody(ctx, c.upstream, req)
	if err == nil && resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		resp.Body.Close() // refused here, with the size that only the whole has
		req.header.Del("Range")
		resp, err = file.behaves().requestBody(ctx, c.upstream, req)
	}
	var at, size int64
	if err == nil {
		var partial bool
		if at, size, partial = resp.partOf(req.header.Get("Range") != ""); !partial {
			err = c.statusError(file, resp)
		}
		if err != nil {
			resp.Body.Close()
		}
	}
	if err != nil {
		if why := file.staleReason(err); why != "" && cp != nil {
			return cp.staleReply(why), nil
		}
		return nil, err
	}
	rec := file.newRecord(resp.Header, c.now())
	rec.isPage = file.isPage(resp)
	reply := &fileReply{rec: rec, size: size, fromRemote: true, result: "MISS", cacheStatus: "fwd=miss", mirror: file.remote.mirrorHost(resp.origin)}
	if cp != nil {
		reply.cacheStatus = "fwd=stale; fwd-status=200"
	}
	if file.needsWholeBody {
		return reply, reply.readSmallBody(ctx, file, resp)
	}
	validator := rangeValidator(resp)
	if file.rewriteLinks(ctx, c, resp) {
		reply.size, size, validator = -1, -1, "" // upstream's parts are of another body
	}
	body := &upstreamReader{up: c.upstream, ctx: ctx, resp: resp, respOffset: at, part: bodyPart{file: file, validator: validator, size: size, to: rng.to, origin: resp.origin}}
	if file.digest != "" && rng.isWhole(size) {
		body.hash = newBodyHash(file.digest)
	}
	reply.body = body
	return reply, nil
}

// rangeHeader is the Range header for the single range that a client wants, or
// nil. A body of which the client may have an older part (If-Range) is asked for as a
// whole.
func (rng byteRange) rangeHeader(file fileRequest) http.Header {
	switch {
	case file.needsWholeBody || rng.hasIfRange || file.rewrittenLinks() != nil || (rng.from == 0 && rng.to < 0 && rng.suffix == 0):
		return nil
	case rng.suffix > 0:
		return http.Header{"Range": {"bytes=-" + strconv.FormatInt(rng.suffix, 10)}}
	case rng.to >= 0:
		return http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", rng.from, rng.to)}}
	}
	return http.Header{"Range": {fmt.Sprintf("bytes=%d-", rng.from)}}
}

// partOf is where the body of resp begins, and the size of the whole (-1: not
// known). partial reports whether it is a part, which only a ranged request may get.
func (resp *upstreamResponse) partOf(ranged bool) (at, size int64, partial bool) {
	first, _, size, ok := parseContentRange(resp.Header.Get("Content-Range"))
	if ranged && resp.StatusCode == http.StatusPartialContent && ok && size >= 0 {
		return first, size, true
	}
	return 0, resp.ContentLength, false
}

// readSmallBody gives reply a small body, which must be whole before it is sent.
func (reply *fileReply) readSmallBody(ctx context.Context, file fileRequest, resp *upstreamResponse) error {
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, file.maxBytes+1))
	if err != nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	if int64(len(b)) > file.maxBytes {
		return file.newTooLargeError()
	}
	s := newBodyHash(file.digest)
	s.Write(b)
	if err := s.verifyDigest(file.digest); err != nil {
		return err
	}
	reply.rec.Size, reply.rec.SHA256, reply.size, reply.hashKnown = int64(len(b)), s.sumHex(), int64(len(b)), true
	body := bytes.NewReader(b)
	reply.body = struct {
		io.ReadSeeker
		io.Closer
	}{body, io.NopCloser(nil)}
	return file.behaves().checkBody(ctx, reply.rec, body)
}

// upstreamReader reads a body straight from upstream, from wherever it is sought
// to, and asks again by Range when the body breaks off. It is a growingBody.
type upstreamReader struct {
	up         *upstream
	ctx        context.Context
	part       bodyPart
	resp       *upstreamResponse // nil: asked for when bytes are wanted
	respOffset int64             // of the next byte of resp
	offset     int64             // of the next byte that is given out
	hash       *bodyHash         // of a whole body with a digest, up to respOffset; nil: it is not verified
	held       []byte            // read and hashed, not given out yet
	done       bool              // all is read and verified
	stuck      int               // times that the body broke off without progress
	breakAt    int64             // where it broke off last
	places     chan struct{}     // among which its Close, which is called once, frees one; may be nil
}

func (b *upstreamReader) Read(p []byte) (int, error) {
	if b.hash != nil && b.offset == b.respOffset-int64(len(b.held)) {
		return b.readHeld(p)
	}
	b.hash, b.held = nil, nil // sought elsewhere: a part proves nothing about the whole
	n, err := b.readAt(p, b.offset)
	b.offset += int64(n)
	return n, err
}

// readHeld gives out what lies heldBackBytes behind, and the rest when it has
// verified.
func (b *upstreamReader) readHeld(p []byte) (int, error) {
	for !b.done && len(b.held) <= heldBackBytes {
		buf := make([]byte, copyBufferSize)
		n, err := b.readAt(buf, b.respOffset)
		b.hash.Write(buf[:n])
		b.held = append(b.held, buf[:n]...)
		if err == io.EOF {
			if err := b.hash.verifyDigest(b.part.file.digest); err != nil {
				return 0, err
			}
			b.done = true
		} else if err != nil {
			return 0, err
		}
	}
	free := len(b.held)
	if !b.done {
		free -= heldBackBytes
	}
	if free == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.held[:free])
	b.held = b.held[n:]
	b.offset += int64(n)
	return n, nil
}

// readyToRead: see growingBody.
func (b *upstreamReader) readyToRead() bool { return b.done }

// readAt reads from off, and asks upstream for what resp does not have.
func (b *upstreamReader) readAt(p []byte, off int64) (int, error) {
	for {
		if b.part.size >= 0 && off >= b.part.size {
			return 0, io.EOF
		}
		if err := b.seekUpstream(off); err != nil {
			return 0, err
		}
		n, err := b.resp.Body.Read(p)
		b.respOffset += int64(n)
		if n > 0 || err == nil {
			return n, nil
		}
		if err == io.EOF && (b.part.size < 0 || off >= b.part.size) {
			return 0, io.EOF
		}
		b.closeResponse()
		b.stuck, b.breakAt = countStuck(b.stuck, b.breakAt, off), off
		if b.stuck > maxResumes || b.ctx.Err() != nil {
			return 0, fmt.Errorf("%w: %w", errBroken, err)
		}
	}
}

// seekUpstream brings resp to off: by a ranged request, or by reading on where
// upstream has no ranges.
func (b *upstreamReader) seekUpstream(off int64) error {
	if b.resp != nil && b.respOffset == off {
		return nil
	}
	part := b.part
	part.from = off
	part.tryOtherOrigin(b.stuck)
	if part.to < off {
		part.to = -1
	}
	resp, err := part.request(b.ctx, b.up)
	if err == nil {
		b.closeResponse()
		b.resp, b.respOffset, b.part.size = resp, off, resp.completeLength()
		return nil
	}
	if b.resp == nil || off < b.respOffset {
		return err
	}
	n, err := io.CopyN(io.Discard, b.resp.Body, off-b.respOffset)
	b.respOffset += n
	if err != nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	return nil
}

func (b *upstreamReader) closeResponse() {
	if b.resp != nil {
		b.resp.Body.Close()
		b.resp = nil
	}
}

func (b *upstreamReader) Seek(off int64, whence int) (int64, error) {
	b.offset = seekOffset(off, whence, b.offset, b.part.size)
	return b.offset, nil
}

func (b *upstreamReader) Close() error {
	b.closeResponse()
	if b.places != nil {
		<-b.places
	}
	return nil
}
