// fill_passon.go: passing a file on without a spool: straight from upstream, by a
// request for one client alone.

package main

import (
	"bufio"
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
			return file.staleReply(c, cp, why), nil
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
	body := bodyPart{file, rangeValidator(resp), size, at, rng.to, resp.origin}.newReader(ctx, c, resp)
	if body.rewriteLinks() {
		reply.size = -1
	} else if file.digest != "" && rng.isWhole(size) {
		body.through = newVerifiedReader(nextBytes{body}, file.digest)
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

// verifiedReader gives a body out heldBackBytes behind what has arrived of it, and the
// rest when all of it has its digest.
type verifiedReader struct {
	ahead  *bufio.Reader // of the body, by way of hash
	hash   *bodyHash
	digest string
	whole  bool // all has arrived and is verified
}

func newVerifiedReader(body io.Reader, digest string) *verifiedReader {
	hash := newBodyHash(digest)
	return &verifiedReader{bufio.NewReaderSize(io.TeeReader(body, hash), heldBackBytes+copyBufferSize), hash, digest, false}
}

func (v *verifiedReader) Read(p []byte) (int, error) {
	if _, err := v.ahead.Peek(heldBackBytes + 1); err != nil {
		if err == io.EOF && !v.whole {
			err = v.hash.verifyDigest(v.digest)
			v.whole = err == nil
		}
		if !v.whole {
			return 0, err
		}
		return v.ahead.Read(p)
	}
	return v.ahead.Read(p[:min(len(p), v.ahead.Buffered()-heldBackBytes)])
}
