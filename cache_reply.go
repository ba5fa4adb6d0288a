// cache_reply.go: how a reply is sent: its headers, its content type, its body.

package main

import (
	"context"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"
)

// maxRanges is how many ranges a request may ask for at once: ServeContent
// takes seconds for 200,000. zchunk asks for 256.
const maxRanges = 1000

// sharedBody is a body that may be closed while it is read. ServeContent reads
// the parts of a multi-range answer in a goroutine that it does not wait for
// when the client leaves.
type sharedBody struct {
	mu     sync.Mutex // held for all of a read: Close waits for it
	body   io.ReadSeekCloser
	cancel context.CancelFunc // ends a read that waits for more
	closed bool
}

func (b *sharedBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, fs.ErrClosed
	}
	return b.body.Read(p)
}

func (b *sharedBody) Seek(off int64, whence int) (int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, fs.ErrClosed
	}
	return b.body.Seek(off, whence)
}

func (b *sharedBody) Close() error {
	b.cancel()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return b.body.Close()
}

// outcomeOf names a request that failed: one that went upstream was a miss.
func outcomeOf(err error) string {
	if status, _ := statusAndDetail(err); status == http.StatusForbidden || status == http.StatusBadRequest {
		return ""
	}
	return "MISS"
}

// askedOf reads what get needs to know of r. ServeContent judges the Range
// again and is what answers it.
func askedOf(r *http.Request) asked {
	a := asked{head: r.Method == http.MethodHead, to: -1, ifRange: r.Header.Get("If-Range") != ""}
	spec, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes=")
	if !ok || strings.Contains(spec, ",") {
		return a
	}
	first, last, ok := strings.Cut(strings.TrimSpace(spec), "-")
	if !ok {
		return a
	}
	if first == "" {
		a.suffix, _ = strconv.ParseInt(last, 10, 64)
		return a
	}
	from, err := strconv.ParseInt(first, 10, 64)
	if err != nil || from < 0 {
		return a
	}
	a.from = from
	if to, err := strconv.ParseInt(last, 10, 64); err == nil && to >= from {
		a.to = to
	}
	return a
}

// send writes headers and body. http.ServeContent judges ranges and
// conditions; where the length is not known yet the body goes out in full.
func (c *cache) send(w *response, r *http.Request, q want, rep *reply) {
	c.headers(w.Header(), r, q, rep)
	if rep.size >= 0 {
		if rep.rec.Encoding != "" {
			// ServeContent leaves it out for coded bodies, fearing a wrapper.
			w.Header().Set("Content-Length", strconv.FormatInt(rep.size, 10))
		}
		http.ServeContent(w, r, "", rep.rec.Modified, rep.body)
		return
	}
	w.Header().Set("Last-Modified", rep.rec.Modified.Format(http.TimeFormat))
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		_, _ = io.Copy(w, rep.body) // its failures are noted in w
	}
}

// headers sets all headers of an answer but those ServeContent sets. Their
// values share one array: this runs for every hit.
func (c *cache) headers(h http.Header, r *http.Request, q want, rep *reply) {
	values := make([]string, 0, 6)
	set := func(name, value string) {
		values = append(values, value)
		h[name] = values[len(values)-1 : len(values) : len(values)]
	}
	status := "artifactapi; " + rep.status
	if rep.stored {
		status += "; stored"
	}
	set("Cache-Status", status)
	h["X-Artifact-Source"] = sourceCache
	if rep.remote {
		h["X-Artifact-Source"] = sourceRemote
	}
	if !rep.at.IsZero() {
		set("Age", strconv.FormatInt(max(0, int64(c.now().Sub(rep.at)/time.Second)), 10))
	}
	if rep.size >= 0 {
		h["Accept-Ranges"] = acceptRanges
	}
	if rep.sum {
		set("Etag", `"sha256-`+rep.rec.SHA256+`"`)
	}
	if rep.rec.Encoding != "" {
		set("Content-Encoding", rep.rec.Encoding)
	}
	h["X-Content-Type-Options"] = noSniff
	h["Content-Security-Policy"] = sandbox
	if r.ProtoMajor == 1 && r.ProtoMinor == 1 && r.ContentLength == 0 {
		h["Connection"] = keepAlive // apk reuses a connection only then
	}
	if q.dress != nil {
		q.dress(h, rep.rec)
		return
	}
	set("Content-Type", contentType(q.path, rep.rec.ContentType))
	set("Content-Disposition", disposition(path.Base(q.path)))
}

// Header values that never change, shared by all answers.
var (
	sourceCache  = []string{"cache"}
	sourceRemote = []string{"remote"}
	acceptRanges = []string{"bytes"}
	noSniff      = []string{"nosniff"}
	sandbox      = []string{"sandbox"} // cached HTML must not script our page
	keepAlive    = []string{"keep-alive"}
)

// disposition names the file to save (RFC 6266). Most names need no quotes.
func disposition(name string) string {
	if strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-+") == "" {
		return "attachment; filename=" + name
	}
	return mime.FormatMediaType("attachment", map[string]string{"filename": name})
}

// types are the content types by file name, longest suffix first where one
// ends in another. A scratch image has no mime.types to ask.
var types = map[string]string{
	".7z": "application/x-7z-compressed", ".apk": "application/vnd.android.package-archive",
	".asc": "application/pgp-signature", ".bz2": "application/x-bzip2", ".crate": "application/gzip",
	".css": "text/css; charset=utf-8", ".deb": "application/vnd.debian.binary-package",
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

// contentType is the type of a file by its name; upstream's for JSON and XML
// metadata (npm and others have types of their own) and where the name says
// nothing.
func contentType(name, upstream string) string {
	ext := strings.ToLower(path.Ext(name))
	t := types[ext]
	metadata := ext == ".json" || ext == ".xml"
	switch {
	case upstream != "" && (t == "" || metadata):
		return upstream
	case t != "":
		return t
	}
	return "application/octet-stream"
}

// unread is the body of an answer to HEAD: its size is all that is asked of it.
type unread int64

func (unread) Read([]byte) (int, error) { return 0, io.EOF }

func (unread) Close() error { return nil }

func (u unread) Seek(off int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		off += int64(u)
	}
	return off, nil
}
