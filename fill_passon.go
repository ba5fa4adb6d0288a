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
	if err := takePlace(ctx, places); err != nil {
		return nil, err
	}
	reply, err := file.passOn(ctx, c, rng, cp != nil)
	if body, ok := reply.body.(*upstreamReader); ok {
		body.places = places
	} else {
		<-places
	}
	switch why := file.staleReason(err); {
	case err != nil && cp != nil && why != "":
		return file.staleReply(c, cp, why), nil
	case err != nil:
		return nil, err
	case cp != nil:
		reply.cacheStatus = "fwd=stale; fwd-status=200"
	}
	return &reply, nil
}

// passOn asks upstream for a file that is not stored, for one client alone.
func (file fileRequest) passOn(ctx context.Context, c *cache, rng byteRange, hasCopy bool) (fileReply, error) {
	part, whole := file.newUpstreamRequest(http.MethodGet, rng.rangeHeader(file)), file.newUpstreamRequest(http.MethodGet, nil)
	part.hasCopy, whole.hasCopy = hasCopy, hasCopy
	// A range that upstream cannot satisfy is refused here, with the size that only the whole has.
	notSatisfiable := func(status int) bool { return status == http.StatusRequestedRangeNotSatisfiable }
	reply, resp, at, err := file.askUnstored(ctx, c, part, notSatisfiable, whole)
	if err != nil {
		return reply, err
	}
	reply.rec.isPage = file.isPage(resp)
	if file.maxBytes > 0 {
		return reply, reply.readSmallBody(ctx, file, resp)
	}
	body := &upstreamReader{c: c, ctx: ctx, file: file, validator: rangeValidator(resp), size: reply.size, last: rng.to, origin: resp.origin, resp: resp,
		at: at, offset: at, breakAt: at}
	if body.rewriteLinks() {
		reply.size = -1
	} else if file.digest != "" && rng.isWhole(reply.size) {
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
	case file.maxBytes > 0 || rng.hasIfRange || file.rewrittenLinks() != nil || (rng.from == 0 && rng.to < 0 && rng.suffix == 0):
		return nil
	case rng.suffix > 0:
		return http.Header{"Range": {"bytes=-" + strconv.FormatInt(rng.suffix, 10)}}
	case rng.to >= 0:
		return http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", rng.from, rng.to)}}
	}
	return http.Header{"Range": {fmt.Sprintf("bytes=%d-", rng.from)}}
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
	reply.rec.Size, reply.rec.SHA256, reply.size = int64(len(b)), s.sumHex(), int64(len(b))
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
