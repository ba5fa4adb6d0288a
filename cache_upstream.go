// cache_upstream.go: what is asked upstream for a file, and what the headers of an
// answer mean for clients and for the record.

package main

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"strconv"
	"time"
)

// headUpstream answers HEAD for a file that is not stored, and stores nothing. Where
// upstream refuses HEAD, it asks for the first byte, which tells the size too.
func (c *cache) headUpstream(ctx context.Context, file fileRequest) (*fileReply, error) {
	req := file.newUpstreamRequest(http.MethodHead, nil)
	resp, err := c.upstream.send(ctx, req)
	if err != nil {
		return nil, err
	}
	if refusesHEAD(resp.StatusCode) {
		resp.Body.Close()
		if resp, err = c.upstream.send(ctx, file.newUpstreamRequest(http.MethodGet, http.Header{"Range": {"bytes=0-0"}})); err != nil {
			return nil, err
		}
	}
	defer resp.Body.Close()
	_, size, partial := resp.partOf(true)
	if !partial {
		if err := c.statusError(file, resp); err != nil {
			return nil, err
		}
	}
	rec := file.newRecord(resp.Header, c.now())
	return &fileReply{rec: rec, size: size, body: unreadBody(size), fromRemote: true, cacheStatus: "fwd=miss", result: "MISS"}, nil
}

// refusesHEAD reports whether the status of a HEAD may say that upstream does not take
// HEAD: presigned URLs and CDNs refuse it in all these ways.
func refusesHEAD(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return true
	}
	return false
}

// newUpstreamRequest is the request to upstream for the file, with these headers.
func (file fileRequest) newUpstreamRequest(method string, header http.Header) upstreamRequest {
	h := http.Header{}
	maps.Copy(h, header)
	if file.accept != "" {
		h.Set("Accept", file.accept)
	}
	return upstreamRequest{remote: file.remote, method: method, wire: file.wire, header: h, scope: file.scope, digest: file.digest}
}

// statusError is the error that a client gets for a status of upstream's other than
// 200, and nil for 200. 4xx statuses pass through, but for two: a 401 is about this
// server's credentials and becomes 502, a 429 becomes 503 with Retry-After.
func (c *cache) statusError(file fileRequest, resp *upstreamResponse) error {
	code, name := resp.StatusCode, file.remote.name
	if code == http.StatusOK {
		return nil
	}
	p := &problem{status: code, cause: &upstreamStatus{code}}
	switch {
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
		if code == http.StatusServiceUnavailable {
			p.retryAfter = parseRetryAfter(resp.Header, c.now())
		}
		p.detail = fmt.Sprintf("the upstream of remote %q answered %d", name, code)
	}
	return p
}

// upstreamStatus is the cause of a problem that stands for a status of upstream's.
type upstreamStatus struct{ code int }

func (e *upstreamStatus) Error() string { return "upstream status " + strconv.Itoa(e.code) }

// Is reports that a 404 or 410 of upstream's means fs.ErrNotExist.
func (e *upstreamStatus) Is(target error) bool {
	return target == fs.ErrNotExist && e.isGone()
}

func (e *upstreamStatus) isGone() bool {
	return e.code == http.StatusNotFound || e.code == http.StatusGone
}

// maxHeaderValue bounds a header of upstream's that a record keeps: the whole record
// must fit the 2 KB of metadata that an S3 object may have.
const maxHeaderValue = 128

// newRecord begins the record of a body whose headers are h. Its size and its hash
// are still missing.
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

// boundedHeader is v, or "" if it is too long to be kept.
func boundedHeader(v string) string {
	if len(v) > maxHeaderValue {
		return ""
	}
	return v
}
