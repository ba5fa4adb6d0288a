// fill_ask.go: what a fill asks upstream: whether the copy is still good, the
// body, and the rest of one that broke off.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
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
	if file.builtin {
		return file.remote.checkBuiltin && !file.alwaysRefetched
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
	c, kind := f.c, f.file.remote.name+" "+f.file.accept // registries have HEAD for manifests, and not for lists
	validators = validatorsOf(f.oldRecord)
	for _, refuses := range []string{kind, f.key} {
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
		c.headRefused.putFor(kind, struct{}{}, headRefusedFor)
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
	old, tag, date := f.oldRecord, resp.Header.Get("ETag"), resp.Header.Get("Last-Modified")
	switch digest := resp.Header.Get("Docker-Content-Digest"); {
	case resp.StatusCode == http.StatusOK:
		return (digest != "" && digest == old.Digest) || (isStrongETag(tag) && tag == old.ETag)
	case resp.StatusCode != http.StatusNotModified, old.ETag == "" && old.LastModified == "":
		return false
	case tag != "" && old.ETag != "": // compared weakly (RFC 9110 section 8.8.3.2)
		return strings.TrimPrefix(tag, "W/") == strings.TrimPrefix(old.ETag, "W/")
	}
	return date == "" || old.LastModified == "" || date == old.LastModified
}

func isStrongETag(etag string) bool { return strings.HasPrefix(etag, `"`) }

// hasKnownEnd is false for a body that only the end of the connection delimits (RFC 9112
// section 6.3): it cannot be told from a cut one.
func (resp *upstreamResponse) hasKnownEnd() bool {
	return resp.ContentLength >= 0 || resp.ProtoMajor != 1 || len(resp.TransferEncoding) > 0
}

// isCoded reports whether the body is coded, although nobody asked for that.
func (resp *upstreamResponse) isCoded() bool {
	return !slices.Contains([]string{"", "identity"}, resp.Header.Get("Content-Encoding"))
}

// mayBeStored reports whether the body of resp may be stored. One that may be cut may not,
// one over cache.max_size would push out everything else, and a page to log in would be
// there forever in the place of an archive.
func (f *fillRun) mayBeStored(resp *upstreamResponse, isPage bool) bool {
	c, name := f.c, f.file.remote.name
	if !resp.hasKnownEnd() {
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
	isOver := func(limit int64) bool { return limit > 0 && size > limit }
	if isOver(rem.maxSize) || isOver(f.c.evictor.limit) {
		f.c.log.Warn("a file is passed on and not stored: it is larger than cache.max_size or CACHE_MAX_SIZE", "remote", rem.name, "path", f.file.path, "size", size)
		return false
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
	if _, fate := f.state(); size < 0 && fate == fateKeep && !f.fitsMaxSize(written) {
		f.setFate(fatePassOn)
		f.c.fills.leave(&f.fill, 0)
	}
	return f.spool.Write(p)
}

// upstreamReader reads a body straight from upstream, from wherever it is sought to, and
// asks again by Range when the body breaks off. It is a growingBody. One goroutine uses it.
type upstreamReader struct {
	c         *cache
	ctx       context.Context
	file      fileRequest
	validator string            // of the body, for If-Range; may be ""
	size      int64             // of the whole body; -1: not known
	last      int64             // the last byte to ask for by Range; -1: to the end
	origin    int               // which origin answered first
	resp      *upstreamResponse // nil: asked for when bytes are wanted
	at        int64             // where resp is
	offset    int64             // of the next byte that is given out
	through   io.Reader         // makes what is given out of what is read, until the reader is sought; nil: the same
	given     int64             // how much through has given out
	stuck     int               // times that the body broke off without progress
	breakAt   int64             // where it broke off last
	places    chan struct{}     // among which its Close, which is called once, frees one; may be nil
}

// newUpstreamReader returns a reader of the body of resp, which has the whole file.
func newUpstreamReader(ctx context.Context, c *cache, file fileRequest, resp *upstreamResponse) *upstreamReader {
	return &upstreamReader{c: c, ctx: ctx, file: file, validator: rangeValidator(resp), size: resp.ContentLength, last: -1, origin: resp.origin, resp: resp}
}

// newPartReader returns a reader of the body from an offset to the byte last (-1: to the end).
func (f *fill) newPartReader(ctx context.Context, from, last int64) *upstreamReader {
	_, size := f.progress()
	f.mu.Lock()
	defer f.mu.Unlock()
	return &upstreamReader{c: f.c, ctx: ctx, file: f.file, validator: f.validator, size: size, last: last, origin: f.origin,
		at: from, offset: from, breakAt: from}
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

func (b nextBytes) Read(p []byte) (int, error) { return b.readAt(p, b.at) }

// readAt reads from off, and asks upstream for what resp does not have. There is no bound
// on breaks with progress: 50 GB over a bad line must arrive.
func (b *upstreamReader) readAt(p []byte, off int64) (int, error) {
	for {
		isEnd := b.size >= 0 && off >= b.size
		if isEnd && (b.resp == nil || b.at != off) {
			return 0, io.EOF
		}
		if err := b.seekUpstream(off); err != nil {
			return 0, err
		}
		n, err := b.resp.Body.Read(p)
		b.at += int64(n)
		switch {
		case b.size >= 0 && off+int64(n) > b.size: // known from the Content-Range of a part
			return 0, errTooMuch
		case n > 0 || err == nil:
			return n, nil
		case isEnd || (err == io.EOF && b.size < 0):
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
	broken := fmt.Errorf("%w after %d of %d bytes: %w", errBroken, off, b.size, cause)
	if b.stuck > maxResumes {
		return broken
	}
	if err := b.seekUpstream(off); err != nil {
		return fmt.Errorf("%w; it cannot be resumed: %w", broken, err)
	}
	b.c.log.Info("resumed a body that broke off", "remote", b.file.remote.name, "path", b.file.path, "at", off)
	return nil
}

// seekUpstream brings resp to off: by a ranged request, or by reading on where upstream
// has no ranges. A body that is stuck for the second time is asked of the next origin.
func (b *upstreamReader) seekUpstream(off int64) error {
	if b.resp != nil && b.at == off {
		return nil
	}
	var resp *upstreamResponse
	var size int64
	var err error
	origin := b.origin + max(0, b.stuck-1)
	for range b.file.remote.origins { // one may have another version, and the next one ours
		if resp, size, err = b.requestPart(off, origin%len(b.file.remote.origins)); !errors.Is(err, errBadUpstream) {
			break
		}
		origin++
	}
	if err == nil {
		b.closeResponse()
		b.resp, b.at, b.size = resp, off, size
		return nil
	}
	if b.resp == nil || off < b.at {
		return err
	}
	n, err := io.CopyN(io.Discard, b.resp.Body, off-b.at)
	b.at += n
	if err != nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	return nil
}

// requestPart asks upstream for the body from off on, and accepts exactly that part of the
// very same body, of whose whole it returns the size. Not every server knows If-Range, so
// the answer must name the version too (RFC 9110 section 13.1.5). Where the digest of the
// whole body will tell, neither names one: mirrors name the same bytes in their own ways.
func (b *upstreamReader) requestPart(off int64, origin int) (resp *upstreamResponse, size int64, err error) {
	if b.validator == "" && b.file.digest == "" {
		return nil, 0, errors.New("the upstream gave no strong validator")
	}
	spec := fmt.Sprintf("bytes=%d-", off)
	if b.last >= off {
		spec += strconv.FormatInt(b.last, 10)
	}
	req := b.file.newUpstreamRequest(http.MethodGet, http.Header{"Range": {spec}})
	req.first = origin
	if b.file.digest == "" {
		req.header.Set("If-Range", b.validator)
	}
	if resp, err = b.file.behaves().requestBody(b.ctx, b.c.upstream, req); err != nil {
		return nil, 0, err
	}
	first, last, size, ok := parseContentRange(resp.Header.Get("Content-Range"))
	version := resp.Header.Get("Last-Modified")
	if isStrongETag(b.validator) {
		version = resp.Header.Get("ETag")
	}
	isRest := b.size >= 0 && size == b.size || b.size < 0 && last == size-1 // else it would not be known where the whole ends
	switch {
	case resp.StatusCode != http.StatusPartialContent || !ok || first != off || !isRest:
		err = fmt.Errorf("%w: status %d, Content-Range %q for a part from %d", errBadUpstream, resp.StatusCode, resp.Header.Get("Content-Range"), off)
	case b.file.digest == "" && version != b.validator:
		err = fmt.Errorf("%w: the part is of another version of the file", errBadUpstream)
	default:
		return resp, size, nil
	}
	resp.Body.Close()
	return nil, 0, err
}

func (b *upstreamReader) closeResponse() {
	if b.resp != nil {
		b.resp.Body.Close()
		b.resp = nil
	}
}

// readyToRead: see growingBody.
func (b *upstreamReader) readyToRead() bool { return false }

func (b *upstreamReader) Seek(off int64, whence int) (int64, error) {
	b.offset = seekOffset(off, whence, b.offset, b.size)
	return b.offset, nil
}

func (b *upstreamReader) Close() error {
	b.closeResponse()
	if b.places != nil {
		<-b.places
	}
	return nil
}
