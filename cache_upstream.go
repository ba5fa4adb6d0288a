// cache_upstream.go: what is asked upstream for a file, and what the headers of an
// answer mean for clients and for the record.

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// headUpstream answers HEAD for a file that is not stored, and stores nothing. Requests
// for the same share one question to upstream.
func (c *cache) headUpstream(ctx context.Context, file fileRequest) (*fileReply, error) {
	reply, err := c.heads.call(ctx, file.wireKey(), func() (reply fileReply, err error) {
		places := c.fills.slotsOf(file.remote.name).heads
		if err := takePlace(ctx, places); err != nil {
			return reply, err
		}
		defer func() { <-places }()
		reply, resp, err := file.askUnstored(ctx, c, file.newUpstreamRequest(http.MethodHead, nil))
		if status, failed := errors.AsType[*upstreamStatus](err); failed && refusesHEAD(status.code) {
			firstByte := http.Header{"Range": {"bytes=0-0"}} // tells the size too
			reply, resp, err = file.askUnstored(ctx, c, file.newUpstreamRequest(http.MethodGet, firstByte))
		}
		if err != nil {
			return reply, err
		}
		resp.Body.Close()
		if file.rewrittenLinks() != nil {
			reply.size = -1 // known when it was fetched and rewritten
		}
		reply.body = unreadBody(reply.size)
		return reply, nil
	})
	return &reply, err
}

// askUnstored sends a request for a file that will not be stored: for all of it, or for its
// first byte to learn what HEAD does not say. The reply has no body yet.
func (file fileRequest) askUnstored(ctx context.Context, c *cache, req upstreamRequest) (reply fileReply, resp *upstreamResponse, err error) {
	if resp, err = file.behaves().requestBody(ctx, c.upstream, req); err != nil {
		return reply, nil, err
	}
	if req.header.Get("Range") != "" {
		_, _, size, isPart := parseContentRange(resp.Header.Get("Content-Range"))
		switch {
		case resp.StatusCode == http.StatusPartialContent && isPart: // size may be -1, as the length
			resp.StatusCode, resp.ContentLength = http.StatusOK, size
		case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable: // without a first byte it is empty
			resp.StatusCode, resp.ContentLength, resp.Header = http.StatusOK, 0, http.Header{} // which describe the error
		}
	}
	if err := c.statusError(file, resp); err != nil {
		resp.Body.Close()
		return reply, nil, err
	}
	return fileReply{rec: file.newRecord(resp.Header, c.now()), size: resp.ContentLength, result: "MISS", cacheStatus: "fwd=miss",
		mirror: file.remote.mirrorHost(resp.origin)}, resp, nil
}

// takePlace waits for one of the places, as long as ctx allows.
func takePlace(ctx context.Context, places chan<- struct{}) error {
	select {
	case places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// refusesHEAD reports whether the status of a HEAD may say that upstream does not take
// HEAD: presigned URLs and CDNs refuse it in all these ways.
func refusesHEAD(status int) bool { return slices.Contains([]int{400, 401, 403, 405, 501}, status) }

func (file fileRequest) newUpstreamRequest(method string, header http.Header) upstreamRequest {
	h := http.Header{}
	maps.Copy(h, header)
	if file.accept != "" {
		h.Set("Accept", file.accept)
	}
	if file.via != "" {
		h.Set("Via", file.via)
	}
	return upstreamRequest{remote: file.remote, method: method, wire: file.wire, header: h, scope: file.scope, hasCopy: file.hasCopy, digestKnown: file.digest != ""}
}

// statusError is the error that a client gets for a status of upstream's other than
// 200, and nil for 200. 4xx statuses pass through, but for two: a 401 is about this
// server's credentials and becomes 502, a 429 becomes 503 with Retry-After.
func (c *cache) statusError(file fileRequest, resp *upstreamResponse) error {
	code, name := resp.StatusCode, file.remote.name
	if code == http.StatusOK {
		c.missing.delete(file.wireKey())
		return nil
	}
	p := &problem{status: code, cause: &upstreamStatus{code}, detail: fmt.Sprintf("the upstream of remote %q answered %d", name, code)}
	switch {
	case code == http.StatusNotFound, code == http.StatusGone:
		missing := missingFile{code, c.now(), resp.Request.Method == http.MethodHead}
		c.missing.putFor(file.wireKey(), missing, max(maxMissingAge, file.remote.negativeTTL))
		return missing.newProblem(name)
	case code == http.StatusUnauthorized:
		p.status = http.StatusBadGateway
		p.detail = fmt.Sprintf("the upstream of remote %q wants credentials: its username or password is missing or wrong", name)
		if at := resp.Request.URL; !sameServer(at, file.remote.origins[resp.origin].url) {
			p.detail = fmt.Sprintf("the upstream of remote %q redirects to %s, which wants credentials of its own", name, clipText(at.Host))
		}
	case code == http.StatusTooManyRequests:
		p.status = http.StatusServiceUnavailable
		p.retryAfter = max(time.Second, parseRetryAfter(resp.Header, c.now()))
		p.detail = fmt.Sprintf("the upstream of remote %q limits its requests (429)", name)
	case code == http.StatusLoopDetected:
		p.detail = fmt.Sprintf("the upstream of remote %q answered 508: its requests come back to where they came from", name)
	case slices.Contains(redirectStatuses, code): // followRedirects leaves those that only add a slash
		path, query, found := strings.Cut(file.spelling, "?")
		to := path[strings.LastIndexByte(path, '/')+1:] + "/" // relative: clients know this server by addresses of their own
		if found {
			to += "?" + query
		}
		p.status, p.headers = http.StatusFound, http.Header{"Location": {to}}
		p.detail = fmt.Sprintf("the upstream of remote %q has a folder there: its path ends in /", name)
	case code < 400 || code >= 500:
		p.status = http.StatusBadGateway
		if code == http.StatusServiceUnavailable {
			p.retryAfter = parseRetryAfter(resp.Header, c.now())
		}
	}
	return p
}

// maxMissingAge is how long an answer that there is no such file is remembered for an
// outage: a package manager takes 404 for an answer and 502 for a failure.
const maxMissingAge = 24 * time.Hour

// missingFile is an answer of upstream's that it does not have a file.
type missingFile struct {
	status int // 404 or 410
	at     time.Time
	byHEAD bool // what HEAD does not find GET may
}

func (m missingFile) newProblem(remote string) *problem {
	return &problem{status: m.status, cause: &upstreamStatus{m.status},
		detail: fmt.Sprintf("not found: the upstream of remote %q answered %d", remote, m.status)}
}

// wireKey is the key of what is asked upstream: the file's, or another one for each way
// to a file with a shared key.
func (file fileRequest) wireKey() string {
	if file.sharedKey {
		return storageKey(file.remote.name, file.wire)
	}
	return file.key()
}

// recallMissing returns the 404 or 410 that upstream gave for a file that is not stored,
// or nil: within negative_ttl and, always as 404, while the remote is down. storeErr says
// why there is no copy: where the store could not be asked, there may be one.
func (file fileRequest) recallMissing(ctx context.Context, c *cache, rng byteRange, storeErr error) error {
	missing, found := c.missing.get(file.wireKey())
	if !found {
		return nil
	}
	p := missing.newProblem(file.remote.name)
	p.headers = http.Header{"Cache-Status": {"artifactapi; hit; detail=negative"}, "X-Artifact-Source": sourceCache}
	switch {
	case c.now().Sub(missing.at) < file.remote.negativeTTL && (rng.head || !missing.byHEAD):
		return p
	case errors.Is(storeErr, fs.ErrNotExist) && c.upstream.isDown(ctx, file.remote):
		p.status = http.StatusNotFound
		p.headers["Cache-Status"] = []string{"artifactapi; hit; detail=unreachable"}
		return p
	}
	return nil
}

// forgetMissing forgets what the upstream of a remote did not have: it may be another now.
func (c *cache) forgetMissing(remote string) {
	for _, key := range c.missing.keys() {
		if strings.HasPrefix(key, remote+"/") {
			c.missing.delete(key)
		}
	}
}

// upstreamStatus is the cause of a problem that stands for a status of upstream's.
type upstreamStatus struct{ code int }

func (e *upstreamStatus) Error() string { return "upstream status " + strconv.Itoa(e.code) }

// Is reports that a 404 or 410 of upstream's means fs.ErrNotExist.
func (e *upstreamStatus) Is(target error) bool { return target == fs.ErrNotExist && e.isGone() }

func (e *upstreamStatus) isGone() bool {
	return e.code == http.StatusNotFound || e.code == http.StatusGone
}

// maxHeaderValue bounds a header of upstream's that a record keeps: the whole record
// must fit the 2 KB of metadata that an S3 object may have.
const maxHeaderValue = 128

// newRecord begins the record of a body whose headers are h: without its size, and without
// its hash unless that is known beforehand.
func (file *fileRequest) newRecord(h http.Header, now time.Time) *record {
	now = now.UTC()
	rec := &record{
		Remote: file.remote.name, Path: file.spelling, Class: file.class, Fetched: now, Modified: now.Truncate(time.Second),
		ContentType: boundedHeader(h.Get("Content-Type")), Encoding: boundedHeader(h.Get("Content-Encoding")),
		ETag: boundedHeader(h.Get("ETag")), LastModified: boundedHeader(h.Get("Last-Modified")),
		Links: file.rewrittenLinks().tableID(),
	}
	if digest := h.Get("Docker-Content-Digest"); isDigest(digest) {
		rec.Digest = digest
	}
	if t, err := http.ParseTime(rec.LastModified); err == nil && !t.IsZero() { // which is sent for a date that is not known
		rec.Modified = t.UTC()
	} else {
		rec.LastModified = ""
	}
	if sum, isSHA256 := strings.CutPrefix(file.digest, "sha256:"); isSHA256 {
		rec.SHA256 = sum
	}
	file.behaves().keepHeaders(rec, h)
	return rec
}

// boundedHeader is v, or "" if it cannot be kept: too long, or bytes that JSON does not have.
func boundedHeader(v string) string {
	if len(v) > maxHeaderValue || !utf8.ValidString(v) {
		return ""
	}
	return v
}
