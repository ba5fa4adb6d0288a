// fill_ask.go: what a fill asks upstream: whether the copy is still good, the
// body, and the rest of one that broke off.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	// maxResumes bounds how often one body may break off without progress. There is
	// no bound on breaks with progress: 50 GB over a bad line must arrive.
	maxResumes = 3
	// minProgress is what must arrive between two breaks to count as progress: an
	// origin that gives some bytes with each request would be asked forever.
	minProgress = 64 << 10
	// headRefusedFor is how long a refused HEAD is remembered.
	headRefusedFor = time.Hour
)

// isRevalidated reports whether an expired copy of the file is revalidated rather
// than fetched again: check_mutable_updates and check_builtin_updates say so.
func (file fileRequest) isRevalidated() bool {
	switch {
	case file.alwaysRefetched:
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

// copyState is what a revalidation found out about an expired copy.
type copyState int

const (
	copyUnknown   copyState = iota // HEAD is refused here: a conditional GET must tell
	copyUnchanged                  // it is still good
	copyChanged                    // upstream has another version
)

// revalidateByHEAD asks whether the expired copy is still good. A HEAD that is refused
// or finds nothing proves nothing: GET may work all the same.
func (f *fillRun) revalidateByHEAD(validators http.Header) (copyState, error) {
	c, name := f.c, f.file.remote.name
	for _, refuses := range []string{name, f.key} {
		if _, found := c.headRefused.get(refuses); found {
			return copyUnknown, nil
		}
	}
	req := f.file.newUpstreamRequest(http.MethodHead, validators)
	req.hasCopy = true
	resp, err := c.upstream.send(f.ctx, req)
	if err != nil {
		return copyUnknown, err
	}
	resp.Body.Close()
	switch code := resp.StatusCode; {
	case f.isUnchanged(resp):
		return copyUnchanged, nil
	case code == http.StatusNotModified:
		return copyChanged, nil // it names another version
	case code == http.StatusMethodNotAllowed, code == http.StatusNotImplemented:
		c.headRefused.putFor(name, struct{}{}, headRefusedFor)
		return copyUnknown, nil
	case refusesHEAD(code), code == http.StatusNotFound:
		c.headRefused.putFor(f.key, struct{}{}, headRefusedFor)
		return copyUnknown, nil
	}
	return copyChanged, c.statusError(f.file, resp)
}

// isUnchanged reports whether an answer to a conditional request means that the copy is
// still good: a 304 that does not name another version, or a 200 that names the very
// same bytes.
func (f *fillRun) isUnchanged(resp *upstreamResponse) bool {
	if resp.StatusCode == http.StatusNotModified {
		return f.oldRecord.mayBe(resp.Header)
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

// mayBe reports whether headers do not name another version than the record's: by ETag,
// compared weakly (RFC 9110 section 8.8.3.2), or where one of the two has none by
// Last-Modified.
func (rec *record) mayBe(h http.Header) bool {
	if tag := h.Get("ETag"); tag != "" && rec.ETag != "" {
		return strings.TrimPrefix(tag, "W/") == strings.TrimPrefix(rec.ETag, "W/")
	}
	date := h.Get("Last-Modified")
	return date == "" || rec.LastModified == "" || date == rec.LastModified
}

func isStrongETag(etag string) bool { return strings.HasPrefix(etag, `"`) }

// mayBeStored reports whether the body of resp may be stored. A body that only
// the end of the connection delimits (RFC 9112 section 6.3) cannot be told from a
// cut one, one over cache.max_size would push out everything else, and a page to log in
// would be there for ever in the place of an archive.
func (f *fillRun) mayBeStored(resp *upstreamResponse, isPage bool) bool {
	c, name := f.c, f.file.remote.name
	if resp.ContentLength < 0 && resp.ProtoMajor == 1 && len(resp.TransferEncoding) == 0 {
		c.log.Warn("a file is passed on and not stored: upstream gave neither a length nor chunks, so that a cut body could not be told from a whole one", "remote", name, "path", f.file.path)
		return false
	}
	if isPage {
		c.log.Warn("a file is passed on and not stored: upstream sent a web page (text/html) under the name of an archive", "remote", name, "path", f.file.path)
		return false
	}
	return f.fitsMaxSize(resp.ContentLength)
}

// fitsMaxSize reports whether cache.max_size and CACHE_MAX_SIZE allow a body of that size.
func (f *fillRun) fitsMaxSize(size int64) bool {
	rem := f.file.remote
	for name, limit := range map[string]int64{"cache.max_size": rem.maxSize, "CACHE_MAX_SIZE": f.c.evictor.limit} {
		if limit > 0 && size > limit {
			f.c.log.Warn("a file is passed on and not stored: it is larger than "+name, "remote", rem.name, "path", f.file.path, "size", size)
			return false
		}
	}
	return true
}

func (file fileRequest) newTooLargeError() error {
	return &problem{status: http.StatusBadGateway, cause: errTooLarge,
		detail: fmt.Sprintf("the upstream's body is larger than the %d bytes that are allowed here", file.maxBytes)}
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

// copyToSpool moves the body of resp into the spool until its end.
func (f *fillRun) copyToSpool(resp *upstreamResponse) error {
	buf := largeBuffers.Get().(*[largeBufferSize]byte)
	defer largeBuffers.Put(buf)
	for {
		n, err := resp.Body.Read(buf[:])
		if n > 0 {
			if err := f.appendToSpool(buf[:n]); err != nil {
				return err
			}
		}
		written, size := f.spool.progress()
		switch {
		case err == io.EOF && (size < 0 || written == size):
			return nil
		case err == io.EOF:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
	}
}

func (f *fillRun) appendToSpool(p []byte) error {
	written, size := f.spool.progress()
	written += int64(len(p))
	if f.file.maxBytes > 0 && written > f.file.maxBytes {
		return f.file.newTooLargeError()
	}
	if maxSize := f.file.remote.maxSize; size < 0 && maxSize > 0 && written > maxSize && written-int64(len(p)) <= maxSize {
		f.fitsMaxSize(written) // says so in the log
		f.mu.Lock()
		f.setStorable(false)
		f.mu.Unlock()
		f.endIfOfNoUse()
	}
	_, err := f.spool.Write(p)
	return err
}

// countStuck counts the breaks of a body without progress between them: stuck were
// there before the bytes from before to now.
func countStuck(stuck int, before, now int64) int {
	if now-before < minProgress {
		return stuck + 1
	}
	return 0
}

// resumeBody asks for the rest of a body that broke off with cause. It is stuck after
// that many breaks without progress. An error means that the body cannot be had.
func (f *fillRun) resumeBody(cause error, stuck int) (*upstreamResponse, error) {
	if _, fatal := errors.AsType[*problem](cause); fatal || errors.Is(cause, errBroken) || errors.Is(cause, errTooMuch) || f.ctx.Err() != nil {
		return nil, cause
	}
	written, size := f.spool.progress()
	broken := fmt.Errorf("%w after %d of %d bytes: %w", errBroken, written, size, cause)
	if stuck > maxResumes {
		return nil, broken
	}
	part := f.partFrom(written, -1)
	part.tryOtherOrigin(stuck)
	resp, err := part.request(f.ctx, f.c.upstream)
	if err == nil {
		if err = f.spool.setSize(resp.completeLength()); err != nil {
			resp.Body.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w; it cannot be resumed: %w", broken, err)
	}
	f.c.log.Info("resumed a body that broke off", "remote", f.file.remote.name, "path", f.file.path, "at", written)
	return resp, nil
}

// bodyPart describes the part of a body that is asked for by Range.
type bodyPart struct {
	file      fileRequest
	validator string
	size      int64 // of the whole body; -1: not known
	from, to  int64 // to is the last byte; -1: to the end
	origin    int   // which origin answered before
}

func (f *fill) partFrom(from, to int64) bodyPart {
	_, size := f.progress()
	f.mu.Lock()
	defer f.mu.Unlock()
	return bodyPart{f.file, f.validator, size, from, to, f.origin}
}

// tryOtherOrigin has the next origin asked first for a body that is stuck for at least
// the second time.
func (p *bodyPart) tryOtherOrigin(stuck int) {
	p.origin = (p.origin + max(0, stuck-1)) % len(p.file.remote.origins)
}

// request asks upstream for the part, and accepts exactly that part of the very same
// body. Not every server knows If-Range, so the answer must name the version too (RFC
// 9110 section 13.1.5), unless the digest of the whole body will tell.
func (p bodyPart) request(ctx context.Context, up *upstream) (*upstreamResponse, error) {
	if p.validator == "" && p.file.digest == "" {
		return nil, errors.New("the upstream gave no strong validator")
	}
	h := http.Header{"Range": {"bytes=" + strconv.FormatInt(p.from, 10) + "-"}}
	if p.to >= 0 {
		h["Range"][0] += strconv.FormatInt(p.to, 10)
	}
	if p.validator != "" {
		h["If-Range"] = []string{p.validator}
	}
	req := p.file.newUpstreamRequest(http.MethodGet, h)
	req.first = p.origin
	resp, err := up.send(ctx, req)
	if err != nil {
		return nil, err
	}
	first, last, size, ok := parseContentRange(resp.Header.Get("Content-Range"))
	if p.size < 0 && last != size-1 {
		ok = false // where the whole ends would still not be known
	}
	if resp.StatusCode != http.StatusPartialContent || !ok || first != p.from || (p.size >= 0 && size != p.size) {
		resp.Body.Close()
		return nil, fmt.Errorf("%w: status %d, Content-Range %q for a part from %d", errBadUpstream, resp.StatusCode, resp.Header.Get("Content-Range"), p.from)
	}
	if p.file.digest == "" && !p.isSameVersion(resp.Header) {
		resp.Body.Close()
		return nil, fmt.Errorf("%w: the part is of another version of the file", errBadUpstream)
	}
	return resp, nil
}

// isSameVersion reports whether an answer names the version that the part is of.
func (p bodyPart) isSameVersion(h http.Header) bool {
	if isStrongETag(p.validator) {
		return h.Get("ETag") == p.validator
	}
	return h.Get("Last-Modified") == p.validator
}

// completeLength is the size of the body of which bodyPart.request's answer is a part.
func (resp *upstreamResponse) completeLength() int64 {
	_, _, size, _ := parseContentRange(resp.Header.Get("Content-Range"))
	return size
}
