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
)

// passOnReply answers where there is no spool: from upstream, for this client alone. Nothing
// is stored. A body that is still to come has one of the remote's places. A range of it is
// where ServeContent seeks.
func (c *cache) passOnReply(ctx context.Context, file fileRequest, hasCopy bool) (*fileReply, error) {
	places := c.fills.slotsOf(file.remote.name).passOns
	if err := takePlace(ctx, places); err != nil {
		return nil, err
	}
	var body *upstreamReader
	defer func() {
		if body == nil { // else its Close frees the place
			<-places
		}
	}()
	req := file.newUpstreamRequest(http.MethodGet, nil)
	req.hasCopy = hasCopy
	reply, resp, err := file.askUnstored(ctx, c, req)
	if err != nil {
		return nil, err
	}
	if hasCopy {
		reply.cacheStatus = "fwd=stale; fwd-status=200"
	}
	reply.rec.IsPage = file.isPage(resp)
	if file.maxBytes > 0 {
		return &reply, reply.readSmallBody(ctx, file, resp)
	}
	body = newUpstreamReader(ctx, c, file, resp)
	body.places = places
	if body.rewriteLinks() {
		reply.size = -1
	} else if file.digest != "" {
		hash := newBodyHash(file.digest)
		ahead := bufio.NewReaderSize(io.TeeReader(nextBytes{body}, hash), heldBackBytes+copyBufferSize)
		body.through = &verifiedReader{ahead, hash}
	}
	reply.body = body
	return &reply, nil
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
	if err := s.verify(); err != nil {
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
	ahead *bufio.Reader // of the body, by way of hash
	hash  *bodyHash
}

func (v *verifiedReader) Read(p []byte) (int, error) {
	_, err := v.ahead.Peek(heldBackBytes + 1)
	if err == nil {
		return v.ahead.Read(p[:min(len(p), v.ahead.Buffered()-heldBackBytes)])
	}
	if err == io.EOF {
		err = v.hash.verify()
	}
	if err != nil {
		return 0, err
	}
	return v.ahead.Read(p)
}
