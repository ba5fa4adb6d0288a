// cache_reply.go: how a reply is sent: its headers, its content type, its body.

package main

import (
	"bufio"
	"cmp"
	"context"
	"io"
	"math"
	"mime"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// limitRanges removes a Range header that is not to be heeded: of a HEAD, since Range is
// defined for GET alone (RFC 9110 section 14.2), one of another unit than bytes, which
// must be ignored (ibid.), one of the last 0 bytes, for which ServeContent sends 206, and
// one of more than 1,000 ranges: ServeContent takes seconds for 200,000, and zchunk, the
// client that asks for most, wants 256.
func limitRanges(r *http.Request) {
	spec := r.Header.Get("Range")
	if r.Method == http.MethodHead || !strings.HasPrefix(spec, "bytes=") || spec == "bytes=-0" || strings.Count(spec, ",") >= 1000 {
		r.Header.Del("Range")
	}
}

// closableBody is a body that may be closed while it is read. ServeContent reads
// the parts of a multi-range answer in a goroutine that it does not wait for
// when the client leaves.
type closableBody struct {
	mu     sync.Mutex         // held for all of a read: Close waits for it
	body   io.ReadSeekCloser  // when it is closed, one without bytes
	cancel context.CancelFunc // ends a read that waits for more
}

func (b *closableBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.body.Read(p)
}

func (b *closableBody) Seek(off int64, whence int) (int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.body.Seek(off, whence)
}

func (b *closableBody) Close() error {
	b.cancel()
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.body.Close()
	b.body = unreadBody(0)
	return err
}

// parseByteRange reads what findOrFetch needs to know of r. It only says where reading
// will begin: ServeContent evaluates the Range header itself.
func parseByteRange(r *http.Request) byteRange {
	rng := byteRange{head: r.Method == http.MethodHead, to: -1, hasIfRange: r.Header.Get("If-Range") != ""}
	spec, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes=")
	rng.several = ok && strings.Contains(spec, ",")
	first, last, hasDash := strings.Cut(strings.TrimSpace(spec), "-")
	if rng.several || !hasDash {
		return rng
	}
	from, err := strconv.ParseInt(first, 10, 64)
	switch to, toErr := strconv.ParseInt(last, 10, 64); {
	case first == "":
		rng.suffix = to
	case err == nil && from >= 0:
		rng.from = from
		if toErr == nil && to >= from {
			rng.to = to
		}
	}
	return rng
}

// send writes headers and body for a client's request. http.ServeContent evaluates
// ranges and conditions; where there are none, or where the length is not known yet,
// the body goes out in full.
func (reply *fileReply) send(w *response, r *http.Request, file fileRequest, now time.Time) {
	reply.setHeaders(w, r, file, now)
	known := reply.headers
	if known == nil {
		known = newRecordHeaders(reply.rec, reply.size)
	}
	if reply.rec.SHA256 != "" {
		w.Header()["Etag"] = known.etag
	}
	if known.modified != nil { // ServeContent takes 1970 for a time that is not known
		w.Header()["Last-Modified"] = known.modified
	}
	size := int64(math.MaxInt64)
	if reply.size >= 0 {
		size, w.size = reply.size, reply.size
		isPlain := r.Method == http.MethodGet && !slices.ContainsFunc(conditionHeaders, func(name string) bool { return r.Header[name] != nil })
		if isPlain || reply.rec.Encoding != "" {
			// ServeContent leaves it out for coded bodies, because it cannot know
			// whether something below it codes them.
			w.Header()["Content-Length"] = known.length
		}
		if size == 0 {
			r.Header.Del("Range") // ServeContent says "bytes 0--1/0" of the last byte of nothing
		}
		if !isPlain {
			http.ServeContent(w, r, "", reply.rec.Modified, reply.body)
			return
		}
	}
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		_, _ = w.sendBody(reply.body, size) // its failures are remembered in w
	}
}

// conditionHeaders are the headers of requests that ServeContent answers in its own way.
var conditionHeaders = []string{"Range", "If-Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since"}

// recordHeaders are the values of headers that a record alone decides. The answers with
// a stored body share them.
type recordHeaders struct{ etag, length, modified []string }

// newRecordHeaders makes the values for a body of size bytes.
func newRecordHeaders(rec *record, size int64) *recordHeaders {
	h := &recordHeaders{etag: []string{`"sha256-` + rec.SHA256 + `"`}, length: []string{strconv.FormatInt(size, 10)}}
	if !rec.Modified.IsZero() {
		h.modified = []string{rec.Modified.UTC().Format(http.TimeFormat)}
	}
	return h
}

// setHeaders sets all headers of a reply but those that send and ServeContent set.
func (reply *fileReply) setHeaders(w *response, r *http.Request, file fileRequest, now time.Time) {
	h := w.Header()
	h["Cache-Status"] = statusHit
	if reply.cacheStatus != "hit" || reply.willBeStored {
		status := "artifactapi; " + reply.cacheStatus
		if reply.willBeStored {
			status += "; stored"
		}
		w.setHeader("Cache-Status", status)
	}
	h["X-Artifact-Source"] = sourceCache
	if reply.result == "MISS" {
		h["X-Artifact-Source"] = sourceRemote
	}
	if !reply.goodAt.IsZero() {
		w.setHeader("Age", strconv.FormatInt(max(0, int64(now.Sub(reply.goodAt)/time.Second)), 10))
	}
	if reply.size >= 0 {
		h["Accept-Ranges"] = acceptRanges
	}
	if reply.rec.Encoding != "" {
		w.setHeader("Content-Encoding", reply.rec.Encoding)
	}
	h["Cache-Control"] = noTransform
	h["Content-Security-Policy"] = sandbox
	if r.ProtoMajor == 1 && r.ProtoMinor == 1 && r.ContentLength == 0 {
		h["Connection"] = keepAlive // apk reuses a connection only then
	}
	file.behaves().setHeaders(w, file.path, reply.rec)
}

// setHeaders sets what describes a download.
func (download) setHeaders(w *response, name string, rec *record) {
	contentType := rec.ContentType
	if !rec.IsPage {
		contentType = contentTypeOf(name, contentType)
	}
	w.setHeader("Content-Type", contentType)
	w.setHeader("Content-Disposition", contentDisposition(path.Base(name)))
}

// Header values that never change, shared by all answers.
var (
	statusHit    = []string{"artifactapi; hit"}
	sourceCache  = []string{"cache"}
	sourceRemote = []string{"remote"}
	acceptRanges = []string{"bytes"}
	noTransform  = []string{"no-transform"} // fronts that compress drop the ETag and the length
	sandbox      = []string{"sandbox"}      // cached HTML must not script our page
	keepAlive    = []string{"keep-alive"}
)

// contentDisposition names the file to save (RFC 6266). mime.FormatMediaType would do
// for all names; most need no quotes, and this runs for every hit.
func contentDisposition(name string) string {
	if strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-+") == "" {
		return "attachment; filename=" + name
	}
	named := mime.FormatMediaType("attachment", map[string]string{"filename": name})
	if extended, isExtended := strings.CutPrefix(named, "attachment; filename*="); isExtended {
		// For clients that do not know filename* (RFC 6266 section 4.3).
		plain := strings.Map(func(r rune) rune {
			if r < 0x80 && unescapedBytes[r] {
				return r
			}
			return '_'
		}, name)
		return "attachment; filename=" + plain + "; filename*=" + extended
	}
	return named
}

// contentTypes are the content types by the extension of the file name. The system's
// mime.types is not used: an image from scratch has none.
var contentTypes = map[string]string{
	".7z": "application/x-7z-compressed", ".apk": "application/vnd.android.package-archive",
	".asc": "application/pgp-signature", ".bz2": "application/x-bzip2", ".crate": "application/gzip",
	".css": "text/css; charset=utf-8", ".deb": "application/vnd.debian.binary-package", ".drpm": "application/x-rpm", ".nupkg": "application/zip", ".udeb": "application/vnd.debian.binary-package",
	".dmg": "application/x-apple-diskimage", ".exe": "application/vnd.microsoft.portable-executable",
	".gem": "application/octet-stream", ".gz": "application/gzip", ".html": "text/html; charset=utf-8",
	".iso": "application/x-iso9660-image", ".jar": "application/java-archive",
	".js": "text/javascript; charset=utf-8", ".json": "application/json", ".md": "text/markdown; charset=utf-8",
	".msi": "application/x-msi", ".pdf": "application/pdf", ".png": "image/png",
	".pom": "application/xml", ".rpm": "application/x-rpm", ".sig": "application/pgp-signature",
	".svg": "image/svg+xml", ".tar": "application/x-tar", ".tbz2": "application/x-bzip2",
	".tgz": "application/gzip", ".txt": "text/plain; charset=utf-8", ".txz": "application/x-xz",
	".war": "application/java-archive", ".wasm": "application/wasm", ".whl": "application/zip",
	".xml": "application/xml", ".xz": "application/x-xz", ".yaml": "application/yaml", ".yml": "application/yaml",
	".zip": "application/zip", ".zst": "application/zstd",
}

// archiveExtensions are those of archives and packages.
var archiveExtensions = strings.Fields(".7z .apk .bz2 .crate .deb .dmg .drpm .exe .gem .gz .iso .jar .msi .nupkg .rpm .tar .tbz2 .tgz .txz .udeb .war .whl .xz .zip .zst")

// pageBytes is how much of a body tells whether it is a web page (WHATWG "MIME Sniffing"
// section 7.1 looks at as much at most).
const pageBytes = 512

// isPage reports whether resp is a web page under the name of an archive or a package,
// to log in or with an excuse. Some servers call everything text/html that they do not
// know, so the beginning of the body must be one too, where it can be read: those do not
// code it. A digest tells more than both.
func (file *fileRequest) isPage(resp *upstreamResponse) bool {
	mediaType, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	if file.digest != "" || !strings.EqualFold(strings.TrimSpace(mediaType), "text/html") ||
		!slices.Contains(archiveExtensions, strings.ToLower(path.Ext(file.path))) {
		return false
	}
	body := bufio.NewReaderSize(resp.Body, pageBytes)
	begin, _ := body.Peek(pageBytes) // its error comes again with the next read
	resp.Body = struct {
		io.Reader
		io.Closer
	}{body, resp.Body}
	return resp.isCoded() || strings.HasPrefix(http.DetectContentType(begin), "text/html")
}

// contentTypeOf is the content type of a file by its name. Upstream's counts for JSON
// and XML metadata (npm and others have types of their own) unless it says nothing, and
// where the name says nothing.
func contentTypeOf(name, upstream string) string {
	ext := strings.ToLower(path.Ext(name))
	t := contentTypes[ext]
	metadata := ext == ".json" || ext == ".xml"
	if upstream != "" && (t == "" || (metadata && !strings.HasPrefix(strings.ToLower(upstream), "application/octet-stream"))) {
		return upstream
	}
	return cmp.Or(t, "application/octet-stream")
}

// unreadBody is the body of a reply to HEAD. ServeContent only seeks to its end.
type unreadBody int64

func (unreadBody) Read([]byte) (int, error) { return 0, io.EOF }

func (unreadBody) Close() error { return nil }

func (u unreadBody) Seek(off int64, whence int) (int64, error) {
	return seekOffset(off, whence, 0, int64(u)), nil
}

// fileReply is a reply that is ready to be sent. Its holder closes body.
type fileReply struct {
	rec          *record        // its SHA256 is "" as long as it is not known
	headers      *recordHeaders // of rec and size, if the store has them; else nil
	size         int64          // of the whole body; -1: not known yet
	body         io.ReadSeekCloser
	goodAt       time.Time // when the copy was last found good; zero: just fetched
	cacheStatus  string    // Cache-Status, behind the name
	willBeStored bool      // Cache-Status says "stored": the body is to be kept
	result       string    // HIT, MISS, STALE, REVALIDATED: for log and counters
	mirror       string    // the host of the mirror that has the body, for the log; "": base_url has it
}

// byteRange is the part of a body that a client wants, as far as a single range says
// it, and whether it wants a body at all.
type byteRange struct {
	head       bool  // a HEAD request
	from, to   int64 // of a range with a known beginning; to is -1 for "to the end"
	suffix     int64 // the length of a range that ends at the end; 0: it is none
	several    bool  // several ranges, of which the fields above say nothing
	hasIfRange bool  // the whole body may be wanted after all
	ahead      bool  // no client wants it yet, so none has missed it
}

// isWhole reports whether the answer may reach from the first byte to the last of a
// body of that size (-1: not known, and then no range is answered).
func (rng byteRange) isWhole(size int64) bool {
	switch {
	case size < 0, rng.hasIfRange:
		return true
	case rng.several:
		return false
	case rng.suffix > 0:
		return rng.suffix >= size
	}
	return rng.from == 0 && (rng.to < 0 || rng.to >= size-1)
}
