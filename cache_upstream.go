// cache_upstream.go: what is asked upstream for a file, and what the headers of an
// answer mean for clients and for the record.

package main

import (
	"context"
	"fmt"
	"io/fs"
	"net/http"
	"strconv"
	"time"
)

// headUpstream answers HEAD for a file that is not stored; nothing is stored.
// Where HEAD is refused, a GET is asked and its body not read.
func (c *cache) headUpstream(ctx context.Context, file fileRequest) (*fileReply, error) {
	req := file.newUpstreamRequest(http.MethodHead, nil)
	resp, err := c.upstream.send(ctx, req)
	if err != nil {
		return nil, err
	}
	if refusesHEAD(resp.StatusCode) {
		resp.Body.Close()
		req.method = http.MethodGet
		if resp, err = c.upstream.send(ctx, req); err != nil {
			return nil, err
		}
	}
	defer resp.Body.Close()
	if err := c.statusError(file, resp); err != nil {
		return nil, err
	}
	rec := file.newRecord(resp.Header, c.now())
	return &fileReply{rec: rec, size: resp.ContentLength, body: unreadBody(resp.ContentLength), fromRemote: true, cacheStatus: "fwd=miss", result: "MISS"}, nil
}

// refusesHEAD: presigned and CDN origins refuse HEAD in all these ways.
func refusesHEAD(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return true
	}
	return false
}

// newUpstreamRequest is what is asked upstream for q.
func (file fileRequest) newUpstreamRequest(method string, header http.Header) upstreamRequest {
	h := http.Header{}
	for k, v := range header {
		h[k] = v
	}
	if file.accept != "" {
		h.Set("Accept", file.accept)
	}
	return upstreamRequest{remote: file.remote, method: method, wire: file.wire, header: h, scope: file.scope}
}

// statusError turns an upstream's status other than 200 into the error a client
// gets (SPEC.md section 4, Responses); nil for 200.
func (c *cache) statusError(file fileRequest, resp *upstreamResponse) error {
	p := &problem{status: resp.StatusCode, cause: &upstreamStatus{resp.StatusCode}}
	name := file.remote.name
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
		return nil
	case code == http.StatusNotFound, code == http.StatusGone:
		p.detail = fmt.Sprintf("not found: the upstream of remote %q answered %d", name, code)
		if !file.sharedKey {
			c.missing.putFor(file.key(), p, file.remote.negativeTTL)
		}
	case code == http.StatusUnauthorized:
		p.status = http.StatusBadGateway
		p.detail = fmt.Sprintf("the upstream of remote %q wants credentials: its username or password is missing or wrong", name)
	case code == http.StatusForbidden:
		p.detail = fmt.Sprintf("the upstream of remote %q answered 403 Forbidden", name)
	case code == http.StatusTooManyRequests:
		p.status = http.StatusServiceUnavailable
		p.retryAfter = max(time.Second, parseRetryAfter(resp.Header, c.now()))
		p.detail = fmt.Sprintf("the upstream of remote %q limits its requests (429)", name)
	case code >= 400 && code < 500:
		p.detail = fmt.Sprintf("the upstream of remote %q answered %d", name, code)
	default:
		p.status = http.StatusBadGateway
		p.detail = fmt.Sprintf("the upstream of remote %q answered %d", name, code)
	}
	return p
}

// upstreamStatus is the cause of a problem that an upstream's status made.
type upstreamStatus struct{ code int }

func (e *upstreamStatus) Error() string { return "upstream status " + strconv.Itoa(e.code) }

// Is: a 404 or 410 upstream is a file that is not there.
func (e *upstreamStatus) Is(target error) bool {
	return target == fs.ErrNotExist && e.isGone()
}

func (e *upstreamStatus) isGone() bool {
	return e.code == http.StatusNotFound || e.code == http.StatusGone
}

// maxHeaderValue bounds what is kept of an upstream's header: a record must
// fit S3's 2 KB of metadata.
const maxHeaderValue = 128

// newRecord begins the record of a body that is about to be fetched.
func (file *fileRequest) newRecord(h http.Header, now time.Time) *record {
	now = now.UTC()
	rec := &record{
		Remote: file.remote.name, Path: file.spelling, Class: file.class, Fetched: now, Modified: now.Truncate(time.Second),
		ContentType: boundedHeader(h.Get("Content-Type")), Encoding: boundedHeader(h.Get("Content-Encoding")),
		ETag: boundedHeader(h.Get("ETag")), LastModified: boundedHeader(h.Get("Last-Modified")),
		Digest: boundedHeader(h.Get("Docker-Content-Digest")),
	}
	if t, err := http.ParseTime(rec.LastModified); err == nil {
		rec.Modified = t.UTC()
	} else {
		rec.LastModified = ""
	}
	file.behaves().keepHeaders(rec, h)
	return rec
}

func boundedHeader(v string) string {
	if len(v) > maxHeaderValue {
		return ""
	}
	return v
}
