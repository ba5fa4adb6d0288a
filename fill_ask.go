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
	// maxResumes bounds how often one body may break off without progress.
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

// revalidateByHEAD asks whether the expired copy is still good. If not, it returns the
// validators for a GET: those of the copy where HEAD is refused or finds nothing, which
// proves nothing, and none where upstream has another version.
func (f *fillRun) revalidateByHEAD() (validators http.Header, unchanged bool, err error) {
	c, name := f.c, f.file.remote.name
	validators = validatorsOf(f.oldRecord)
	for _, refuses := range []string{name, f.key} {
		if _, found := c.headRefused.get(refuses); found {
			return validators, false, nil
		}
	}
	req := f.file.newUpstreamRequest(http.MethodHead, validators)
	req.hasCopy = true
	resp, err := c.upstream.send(f.ctx, req)
	if err != nil {
		return nil, false, err
	}
	resp.Body.Close()
	switch code := resp.StatusCode; {
	case f.isUnchanged(resp):
		return nil, true, nil
	case code == http.StatusNotModified:
		return nil, false, nil // it names another version, or nobody asked for it
	case code == http.StatusMethodNotAllowed, code == http.StatusNotImplemented:
		c.headRefused.putFor(name, struct{}{}, headRefusedFor)
		return validators, false, nil
	case refusesHEAD(code), code == http.StatusNotFound:
		c.headRefused.putFor(f.key, struct{}{}, headRefusedFor)
		return validators, false, nil
	}
	return nil, false, c.statusError(f.file, resp)
}

// isUnchanged reports whether an answer to a conditional request means that the copy is
// still good: a 304 that does not name another version, or a 200 that names the very
// same bytes.
func (f *fillRun) isUnchanged(resp *upstreamResponse) bool {
	if resp.StatusCode == http.StatusNotModified {
		return len(validatorsOf(f.oldRecord)) > 0 && f.oldRecord.mayBe(resp.Header)
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
// would be there forever in the place of an archive.
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

// Write appends a piece of the body to the spool.
func (f *fillRun) Write(p []byte) (int, error) {
	written, size := f.spool.progress()
	written += int64(len(p))
	if f.file.maxBytes > 0 && written > f.file.maxBytes {
		return 0, f.file.newTooLargeError()
	}
	if size < 0 && f.currentFate() == fateKeep && !f.fitsMaxSize(written) {
		f.setStorable(false)
		f.endIfOfNoUse()
	}
	return f.spool.Write(p)
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

// upstreamReader reads a body straight from upstream, from wherever it is sought to, and
// asks again by Range when the body breaks off. It is a growingBody. One goroutine uses it.
type upstreamReader struct {
	c       *cache
	ctx     context.Context
	part    bodyPart          // from is where resp is
	resp    *upstreamResponse // nil: asked for when bytes are wanted
	offset  int64             // of the next byte that is given out
	through io.Reader         // makes what is given out of what is read, until the reader is sought; nil: the same
	given   int64             // how much through has given out
	stuck   int               // times that the body broke off without progress
	breakAt int64             // where it broke off last
	places  chan struct{}     // among which its Close, which is called once, frees one; may be nil
}

// newReader returns a reader of resp, whose body begins at p.from.
func (p bodyPart) newReader(ctx context.Context, c *cache, resp *upstreamResponse) *upstreamReader {
	return &upstreamReader{c: c, ctx: ctx, part: p, resp: resp, offset: p.from, breakAt: p.from}
}

func (b *upstreamReader) Read(p []byte) (n int, err error) {
	if b.through != nil && b.offset == b.given {
		n, err = b.through.Read(p)
		b.given += int64(n)
	} else {
		b.through = nil
		n, err = b.readAt(p, b.offset)
	}
	b.offset += int64(n)
	return n, err
}

// nextBytes is the body of an upstreamReader as it comes, for what it goes through.
type nextBytes struct{ *upstreamReader }

func (b nextBytes) Read(p []byte) (int, error) { return b.readAt(p, b.part.from) }

// readAt reads from off, and asks upstream for what resp does not have. There is no bound
// on breaks with progress: 50 GB over a bad line must arrive.
func (b *upstreamReader) readAt(p []byte, off int64) (int, error) {
	for {
		isEnd := b.part.size >= 0 && off >= b.part.size
		if isEnd && (b.resp == nil || b.part.from != off) {
			return 0, io.EOF
		}
		if err := b.seekUpstream(off); err != nil {
			return 0, err
		}
		n, err := b.resp.Body.Read(p)
		b.part.from += int64(n)
		switch {
		case b.part.size >= 0 && off+int64(n) > b.part.size:
			return 0, errTooMuch
		case n > 0 || err == nil:
			return n, nil
		case isEnd || (err == io.EOF && b.part.size < 0):
			return 0, io.EOF
		case err == io.EOF:
			err = io.ErrUnexpectedEOF
		}
		if err := b.resume(off, err); err != nil {
			return 0, err
		}
	}
}

// resume asks for the rest of a body that broke off at off with cause. Its error means
// that the body cannot be had.
func (b *upstreamReader) resume(off int64, cause error) error {
	b.closeResponse()
	if b.ctx.Err() != nil {
		return cause
	}
	if b.stuck++; off-b.breakAt >= minProgress {
		b.stuck = 0
	}
	b.breakAt = off
	broken := fmt.Errorf("%w after %d of %d bytes: %w", errBroken, off, b.part.size, cause)
	if b.stuck > maxResumes {
		return broken
	}
	if err := b.seekUpstream(off); err != nil {
		return fmt.Errorf("%w; it cannot be resumed: %w", broken, err)
	}
	b.c.log.Info("resumed a body that broke off", "remote", b.part.file.remote.name, "path", b.part.file.path, "at", off)
	return nil
}

// seekUpstream brings resp to off: by a ranged request, or by reading on where upstream
// has no ranges. A body that is stuck for the second time is asked of the next origin.
func (b *upstreamReader) seekUpstream(off int64) error {
	if b.resp != nil && b.part.from == off {
		return nil
	}
	part := b.part
	part.from = off
	part.origin += max(0, b.stuck-1)
	if part.to < off {
		part.to = -1
	}
	var resp *upstreamResponse
	var err error
	for range part.file.remote.origins { // one may have another version, and the next one ours
		part.origin %= len(part.file.remote.origins)
		if resp, err = part.request(b.ctx, b.c.upstream); !errors.Is(err, errBadUpstream) {
			break
		}
		part.origin++
	}
	if err == nil {
		b.closeResponse()
		_, _, size, _ := parseContentRange(resp.Header.Get("Content-Range"))
		b.resp, b.part.from, b.part.size = resp, off, size
		return nil
	}
	if b.resp == nil || off < b.part.from {
		return err
	}
	n, err := io.CopyN(io.Discard, b.resp.Body, off-b.part.from)
	b.part.from += n
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

// readyToRead: see growingBody.
func (b *upstreamReader) readyToRead() bool {
	v, ok := b.through.(*verifiedReader)
	return ok && v.whole
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
