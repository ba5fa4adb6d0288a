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

// checks says whether an expired copy of q is revalidated rather than fetched
// again (SPEC.md section 5).
func (q want) checks() bool {
	switch {
	case q.ask != nil:
		return false
	case q.builtin:
		return q.remote.checkBuiltin
	}
	return q.remote.checkMutable
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

// askHEAD asks whether the copy is still good: errUnchanged if so. again says
// that HEAD is refused here and a conditional GET must ask once more.
func (f *flight) askHEAD(validators http.Header) (again bool, err error) {
	c, name := f.c, f.want.remote.name
	if c.refusesHEAD(name) {
		return true, nil
	}
	req := f.want.question(http.MethodHead, validators)
	req.hasCopy = true
	resp, err := c.up.send(f.ctx, req)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	switch {
	case f.unchanged(resp):
		return false, errUnchanged
	case headRefused(resp.StatusCode):
		c.mu.Lock()
		c.noHEAD[name] = c.now().Add(noHEADFor)
		c.mu.Unlock()
		return true, nil
	}
	return false, c.refused(f.want, resp)
}

func (c *cache) refusesHEAD(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now().Before(c.noHEAD[name])
}

// unchanged says whether an answer to a conditional request means that the
// copy is still good: 304, or a 200 that names the very same bytes.
func (f *flight) unchanged(resp *upstreamResponse) bool {
	if resp.StatusCode == http.StatusNotModified {
		return true
	}
	if resp.StatusCode != http.StatusOK {
		return false
	}
	digest := resp.Header.Get("Docker-Content-Digest")
	if digest != "" && digest == f.old.Digest {
		return true
	}
	return strong(f.old.ETag) && resp.Header.Get("ETag") == f.old.ETag
}

func strong(etag string) bool { return strings.HasPrefix(etag, `"`) }

// askBody asks for q's body, in its own way where it has one.
func (c *cache) askBody(ctx context.Context, q want, req upstreamRequest) (*upstreamResponse, error) {
	if q.ask != nil {
		return q.ask(ctx, req)
	}
	return c.up.send(ctx, req)
}

// mayStore: a body that only the connection's end delimits cannot be told from
// a cut one, and one over the remote's whole budget would push out the rest.
func (f *flight) mayStore(resp *upstreamResponse) bool {
	c, name := f.c, f.want.remote.name
	if resp.ContentLength < 0 && resp.ProtoMajor == 1 && len(resp.TransferEncoding) == 0 {
		c.log.Warn("not stored: the upstream gave neither length nor chunks, so a cut body could not be told from a whole one", "remote", name, "path", f.want.path)
		return false
	}
	return f.fits(resp.ContentLength)
}

// fits says whether cache.max_size allows for a body of that size.
func (f *flight) fits(size int64) bool {
	rem := f.want.remote
	if rem.maxSize > 0 && size > rem.maxSize {
		f.c.log.Warn("not stored: larger than cache.max_size", "remote", rem.name, "path", f.want.path, "size", size)
		return false
	}
	return true
}

func (f *flight) tooLarge() error {
	return &problem{status: http.StatusBadGateway, cause: errTooLarge,
		detail: fmt.Sprintf("the upstream's body is larger than the %d bytes that are allowed here", f.want.limit)}
}

// rangeValidator is what If-Range may carry (RFC 9110 section 13.1.5): a strong
// ETag, or a date that is strong because it is well before the answer's.
func rangeValidator(resp *upstreamResponse) string {
	if tag := resp.Header.Get("ETag"); tag != "" {
		if strong(tag) {
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

// resume asks for the rest of a body that broke off with err the nth time. Its
// error is how the flight ends.
func (f *flight) resume(err error, n int) (*upstreamResponse, error) {
	if _, full := errors.AsType[*spoolError](err); full {
		f.c.storeFailed("spool", "growing", f.key, err)
		return nil, err
	}
	if _, fatal := errors.AsType[*problem](err); fatal || errors.Is(err, errBroken) || f.ctx.Err() != nil {
		return nil, err
	}
	broken := fmt.Errorf("%w after %d of %d bytes: %w", errBroken, f.written, f.total, err)
	if n >= resumes {
		return nil, broken
	}
	resp, err := f.c.askRest(f.ctx, f.restOf(f.written, -1))
	if err != nil {
		return nil, fmt.Errorf("%w; it cannot be resumed: %w", broken, err)
	}
	f.mu.Lock()
	f.total = resp.whole()
	f.mu.Unlock()
	f.c.log.Info("resumed a body that broke off", "remote", f.want.remote.name, "path", f.want.path, "at", f.written)
	return resp, nil
}

// rest describes the part of a body that is asked for by Range.
type rest struct {
	want      want
	validator string
	size      int64 // of the whole body, -1 unknown
	from, to  int64 // to -1: the end
	origin    int
}

func (f *flight) restOf(from, to int64) rest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return rest{f.want, f.validator, f.total, from, to, f.origin}
}

// askRest asks upstream for a part, and accepts exactly that part of the very
// same body.
func (c *cache) askRest(ctx context.Context, p rest) (*upstreamResponse, error) {
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
	req := p.want.question(http.MethodGet, h)
	req.first = p.origin
	resp, err := c.up.send(ctx, req)
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

// whole is the size of the body of which askRest's answer is a part.
func (resp *upstreamResponse) whole() int64 {
	_, _, size, _ := parseContentRange(resp.Header.Get("Content-Range"))
	return size
}
