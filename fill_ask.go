// fill_ask.go: what a fill asks upstream: whether the copy is still good, the
// body, and the rest of one that broke off.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// isRevalidated says whether an expired copy of q is revalidated rather than fetched
// again (SPEC.md section 5).
func (file fileRequest) isRevalidated() bool {
	switch {
	case file.ask != nil:
		return false
	case file.builtin:
		return file.remote.checkBuiltin
	}
	return file.remote.checkMutable
}

func validatorsOf(rec *record) http.Header {
	h := http.Header{}
	if rec.ETag != "" {
		h.Set("If-None-Match", rec.ETag)
	}
	if rec.LastModified != "" {
		h.Set("If-Modified-Since", rec.LastModified)
	}
	return h
}

// revalidateByHEAD asks whether the copy is still good: errUnchanged if so. again says
// that HEAD is refused here and a conditional GET must ask once more.
func (f *fill) revalidateByHEAD(validators http.Header) (again bool, err error) {
	c, name := f.c, f.file.remote.name
	if c.headIsRefused(name) {
		return true, nil
	}
	req := f.file.newUpstreamRequest(http.MethodHead, validators)
	req.hasCopy = true
	resp, err := c.upstream.send(f.ctx, req)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	switch {
	case f.isUnchanged(resp):
		return false, errUnchanged
	case refusesHEAD(resp.StatusCode):
		c.mu.Lock()
		c.headRefusedUntil[name] = c.now().Add(headRefusedFor)
		c.mu.Unlock()
		return true, nil
	}
	return false, c.statusError(f.file, resp)
}

func (c *cache) headIsRefused(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now().Before(c.headRefusedUntil[name])
}

// isUnchanged says whether an answer to a conditional request means that the
// copy is still good: 304, or a 200 that names the very same bytes.
func (f *fill) isUnchanged(resp *upstreamResponse) bool {
	if resp.StatusCode == http.StatusNotModified {
		return true
	}
	if resp.StatusCode != http.StatusOK {
		return false
	}
	digest := resp.Header.Get("Docker-Content-Digest")
	if digest != "" && digest == f.oldRecord.Digest {
		return true
	}
	return isStrongETag(f.oldRecord.ETag) && resp.Header.Get("ETag") == f.oldRecord.ETag
}

func isStrongETag(etag string) bool { return strings.HasPrefix(etag, `"`) }

// requestBody asks for q's body, in its own way where it has one.
func (c *cache) requestBody(ctx context.Context, file fileRequest, req upstreamRequest) (*upstreamResponse, error) {
	if file.ask != nil {
		return file.ask(ctx, req)
	}
	return c.upstream.send(ctx, req)
}

// mayBeStored: a body that only the connection's end delimits cannot be told from
// a cut one, and one over the remote's whole budget would push out the rest.
func (f *fill) mayBeStored(resp *upstreamResponse) bool {
	c, name := f.c, f.file.remote.name
	if resp.ContentLength < 0 && resp.ProtoMajor == 1 && len(resp.TransferEncoding) == 0 {
		c.log.Warn("not stored: the upstream gave neither length nor chunks, so a cut body could not be told from a whole one", "remote", name, "path", f.file.path)
		return false
	}
	return f.fitsMaxSize(resp.ContentLength)
}

// fitsMaxSize says whether cache.max_size allows for a body of that size.
func (f *fill) fitsMaxSize(size int64) bool {
	rem := f.file.remote
	if rem.maxSize > 0 && size > rem.maxSize {
		f.c.log.Warn("not stored: larger than cache.max_size", "remote", rem.name, "path", f.file.path, "size", size)
		return false
	}
	return true
}

func (f *fill) newTooLargeError() error {
	return &problem{status: http.StatusBadGateway, cause: errTooLarge,
		detail: fmt.Sprintf("the upstream's body is larger than the %d bytes that are allowed here", f.file.maxBytes)}
}

// rangeValidator is what If-Range may carry (RFC 9110 section 13.1.5): a strong
// ETag, or a date that is strong because it is well before the answer's.
func rangeValidator(resp *upstreamResponse) string {
	if tag := resp.Header.Get("ETag"); tag != "" {
		if isStrongETag(tag) {
			return tag
		}
		return ""
	}
	modified, err1 := http.ParseTime(resp.Header.Get("Last-Modified"))
	date, err2 := http.ParseTime(resp.Header.Get("Date"))
	if err1 == nil && err2 == nil && date.Sub(modified) >= time.Minute {
		return resp.Header.Get("Last-Modified")
	}
	return ""
}

// resumeBody asks for the rest of a body that broke off with err the nth time. Its
// error is how the flight ends.
func (f *fill) resumeBody(err error, n int) (*upstreamResponse, error) {
	if _, full := errors.AsType[*spoolError](err); full {
		f.c.noteStoreError("spool", "growing", f.key, err)
		return nil, err
	}
	if _, fatal := errors.AsType[*problem](err); fatal || errors.Is(err, errBroken) || f.ctx.Err() != nil {
		return nil, err
	}
	broken := fmt.Errorf("%w after %d of %d bytes: %w", errBroken, f.written, f.size, err)
	if n >= maxResumes {
		return nil, broken
	}
	resp, err := f.c.requestPart(f.ctx, f.partFrom(f.written, -1))
	if err != nil {
		return nil, fmt.Errorf("%w; it cannot be resumed: %w", broken, err)
	}
	f.mu.Lock()
	f.size = resp.completeLength()
	f.mu.Unlock()
	f.c.log.Info("resumed a body that broke off", "remote", f.file.remote.name, "path", f.file.path, "at", f.written)
	return resp, nil
}

// bodyPart describes the part of a body that is asked for by Range.
type bodyPart struct {
	want      fileRequest
	validator string
	size      int64 // of the whole body, -1 unknown
	from, to  int64 // to -1: the end
	origin    int
}

func (f *fill) partFrom(from, to int64) bodyPart {
	f.mu.Lock()
	defer f.mu.Unlock()
	return bodyPart{f.file, f.validator, f.size, from, to, f.origin}
}

// requestPart asks upstream for a part, and accepts exactly that part of the very
// same body.
func (c *cache) requestPart(ctx context.Context, p bodyPart) (*upstreamResponse, error) {
	if p.validator == "" && p.want.digest == "" {
		return nil, errors.New("the upstream gave no strong validator")
	}
	h := http.Header{"Range": {"bytes=" + strconv.FormatInt(p.from, 10) + "-"}}
	if p.to >= 0 {
		h["Range"][0] += strconv.FormatInt(p.to, 10)
	}
	if p.validator != "" {
		h["If-Range"] = []string{p.validator}
	}
	req := p.want.newUpstreamRequest(http.MethodGet, h)
	req.first = p.origin
	resp, err := c.upstream.send(ctx, req)
	if err != nil {
		return nil, err
	}
	first, last, size, ok := parseContentRange(resp.Header.Get("Content-Range"))
	if p.size < 0 && last != size-1 {
		ok = false // where the whole ends would still not be known
	}
	if resp.StatusCode != http.StatusPartialContent || !ok || first != p.from || p.size >= 0 && size != p.size {
		resp.Body.Close()
		return nil, fmt.Errorf("%w: status %d, Content-Range %q for a part from %d", errBadUpstream, resp.StatusCode, resp.Header.Get("Content-Range"), p.from)
	}
	return resp, nil
}

// completeLength is the size of the body of which requestPart's answer is a part.
func (resp *upstreamResponse) completeLength() int64 {
	_, _, size, _ := parseContentRange(resp.Header.Get("Content-Range"))
	return size
}
