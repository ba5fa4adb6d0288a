// respond.go: how a handler's error becomes an answer, and how a body is sent.
// Handlers return errors; only the responder writes error answers.

package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// The error kinds that all layers share. A missing file is fs.ErrNotExist.
var (
	errBadRequest  = errors.New("bad request")
	errDenied      = errors.New("denied")
	errTooLong     = errors.New("path too long")
	errUnreachable = errors.New("upstream unreachable") // dial, DNS, TLS, reset before headers
	errTimeout     = errors.New("upstream timed out")
	errBadUpstream = errors.New("bad upstream answer") // there is an answer, but it cannot be used
	errStoreDown   = errors.New("store is not usable")
	errNoSpace     = errors.New("no space left to store")
	errBusy        = errors.New("too many requests") // Retry-After is sent
	errClientGone  = errors.New("the client left")
)

// statusClientGone is logged, as nginx does, for a client that left before the end.
const statusClientGone = 499

// problem is an error with everything that its answer needs.
type problem struct {
	status     int
	detail     string        // is sent to the client: it never holds a secret or a query
	retryAfter time.Duration // 0 means no Retry-After header
	headers    http.Header   // Allow of a 405, WWW-Authenticate of a 401
	cause      error         // for errors.Is, errors.AsType and the log; may be nil
}

func (p *problem) Error() string {
	if p.cause == nil {
		return p.detail
	}
	return p.detail + ": " + p.cause.Error()
}

func (p *problem) Unwrap() error { return p.cause }

func newProblem(status int, format string, args ...any) *problem {
	return &problem{status: status, detail: fmt.Sprintf(format, args...)}
}

// errorStatuses is the only table from an error kind to the status and the text of
// its answer. The first match counts. The reason of another error is only logged.
var errorStatuses = []struct {
	err    error
	status int
	detail string
}{
	{context.Canceled, statusClientGone, "the client left"},
	{errClientGone, statusClientGone, "the client left"},
	{errBadRequest, http.StatusBadRequest, "bad request"},
	{errDenied, http.StatusForbidden, "this path may not be fetched: no pattern of the remote allows it"},
	{errTooLong, http.StatusRequestURITooLong, "the path with its query is over 1024 bytes long when it is escaped"},
	{fs.ErrNotExist, http.StatusNotFound, "not found"},
	{errBusy, http.StatusServiceUnavailable, "too many requests, try again later"},
	{errNoSpace, http.StatusInsufficientStorage, "no space left to store this"},
	{errStoreDown, http.StatusServiceUnavailable, "the store cannot be used right now"},
	{errTimeout, http.StatusGatewayTimeout, "the upstream did not answer in time"},
	{errUnreachable, http.StatusBadGateway, "the upstream cannot be reached"},
	{errBadUpstream, http.StatusBadGateway, "the upstream's answer cannot be used"},
}

// statusAndDetail returns the status and the text that a client gets for err.
func statusAndDetail(err error) (status int, detail string) {
	if p, ok := errors.AsType[*problem](err); ok {
		return p.status, p.detail
	}
	for _, row := range errorStatuses {
		if errors.Is(err, row.err) {
			return row.status, row.detail
		}
	}
	return http.StatusInternalServerError, "internal error"
}

// secret is a string that fmt, slog and encoding/json print as "***", or "" if it is empty.
type secret string

func (s secret) String() string {
	if s == "" {
		return ""
	}
	return "***"
}

// GoString is for %#v, MarshalText for encoding/json and slog, which do not use String.
func (s secret) GoString() string             { return s.String() }
func (s secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// handler serves one request. The responder answers an error that it returns, or aborts
// the connection if the answer has begun: the client must not take a part for the whole.
type handler func(w *response, r *http.Request) error

// responder serves a request by a handler: it recovers from panics, answers errors,
// logs one line and counts. Its method may be called concurrently.
type responder struct {
	now   func() time.Time
	log   *slog.Logger
	count func(remote, result string, status int, bytes int64, firstByte, took time.Duration)
	// isDown reports an outage of a remote that was logged when it began. It may be nil.
	isDown func(remote string) bool
	// cutOff is set when the server closes connections that still have answers on them.
	cutOff atomic.Bool
}

// errorWriter writes an error answer in the format of its API.
type errorWriter func(w http.ResponseWriter, status int, detail string, err error)

// serveRequest runs h for one request. It panics with http.ErrAbortHandler where
// the connection must be aborted, after the request was logged and counted.
func (s *responder) serveRequest(w http.ResponseWriter, r *http.Request, h handler, writeError errorWriter) {
	began := s.now()
	res := &response{ResponseWriter: w, controller: *http.NewResponseController(w), now: s.now, sendfile: r.ProtoMajor == 1 && r.TLS == nil}
	res.values = res.space[:0]
	res.conn, _ = r.Context().Value(clientConnKey{}).(*clientConn)
	res.requestID = chooseRequestID(r.Header.Get("X-Request-Id"))
	res.setCommonHeaders()
	if r.ProtoMajor == 1 { // HTTP/2 ends a request at its deadline although nothing is to be written yet
		res.extendWriteDeadline() // that of an earlier answer may be over, and net/http may write before we do
	}
	if r.ContentLength != 0 {
		// net/http reads a body that no handler reads before it sends the answer, for
		// which this leaves time. It removes the deadline at the end of the body.
		_ = res.controller.SetReadDeadline(began.Add(clientTimeout / 2))
	}
	err := s.callHandler(res, r, h)
	res.extendWriteDeadline() // for what net/http writes after us: all, if the handler wrote nothing
	abort := err != nil && s.answerError(res, r, err, writeError)
	s.logAndCount(res, r, err, began)
	if abort {
		if !r.ProtoAtLeast(1, 1) {
			res.resetConnection()
		}
		panic(http.ErrAbortHandler)
	}
	if err != nil && r.ContentLength != 0 && r.ProtoMajor == 1 {
		s.readRefusedBody(res, r)
	}
}

// setCommonHeaders sets the headers of all answers: no browser takes one for something
// else, or lets another site's page embed it.
func (w *response) setCommonHeaders() {
	w.setHeader("X-Request-Id", w.requestID)
	w.setHeader("X-Content-Type-Options", "nosniff")
	w.setHeader("Cross-Origin-Resource-Policy", "same-origin")
}

// readRefusedBody sends the answer and then reads the rest of an upload that was refused.
// Some clients send all of it before they read the answer, which would be lost if the
// connection were closed: TCP would reset it.
func (s *responder) readRefusedBody(w *response, r *http.Request) {
	if w.controller.Flush() != nil {
		return
	}
	end := s.now().Add(maxRefusedBodyTime)
	for n := 0; n < maxRefusedBody && s.now().Before(end); n += copyBufferSize {
		_ = w.controller.SetReadDeadline(s.now().Add(closeDelay))
		if _, err := io.CopyN(io.Discard, r.Body, copyBufferSize); err != nil {
			return
		}
	}
}

// callHandler calls h and turns a panic into an error, that of http.ErrAbortHandler too:
// an aborted answer is logged like any other.
func (s *responder) callHandler(w *response, r *http.Request, h handler) (err error) {
	defer func() {
		switch p := recover(); {
		case p == nil:
		case p == any(http.ErrAbortHandler):
			err = http.ErrAbortHandler
		default:
			err = fmt.Errorf("panic: %v", p)
			s.log.Error("handler panicked", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	if err := h(w, r); err != nil {
		return err
	}
	if w.bodyErr != nil {
		return fmt.Errorf("sending the body: %w", w.bodyErr)
	}
	return w.clientErr
}

// answerError answers err, unless an answer has begun or the client has left: then the
// connection must be aborted.
func (s *responder) answerError(w *response, r *http.Request, err error, writeError errorWriter) (abort bool) {
	if w.status != 0 {
		return true
	}
	status, detail := statusAndDetail(err)
	p, isProblem := errors.AsType[*problem](err) // an upstream may answer 499 too
	if (status == statusClientGone && !isProblem) || errors.Is(err, http.ErrAbortHandler) {
		w.noteStatus(status)
		return true
	}
	h := w.Header()
	clear(h)
	w.setCommonHeaders()
	if isProblem {
		if p.retryAfter > 0 {
			h.Set("Retry-After", strconv.Itoa(int(math.Ceil(p.retryAfter.Seconds()))))
		}
		maps.Copy(h, p.headers)
	}
	switch {
	case r.ProtoMajor != 1:
	case r.ContentLength != 0:
		// net/http would first read the rest of the body, which the client may not
		// send before our answer.
		h.Set("Connection", "close")
	case r.ProtoMinor == 1:
		h.Set("Connection", "keep-alive")
	}
	writeError(w, status, detail, err)
	return false
}

// writeJSONError is the errorWriter of all endpoints but the registry's.
func writeJSONError(w http.ResponseWriter, status int, detail string, _ error) {
	b, _ := json.Marshal(map[string]string{"detail": detail}) // strings cannot fail
	sendJSON(w, status, b)
}

// writeJSON answers 200 with v as indented JSON.
func writeJSON(w http.ResponseWriter, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err == nil {
		sendJSON(w, http.StatusOK, b)
	}
	return err
}

// sendJSON answers with a status and the JSON text b. It sets the length: a client has the
// whole answer while the responder still reads its request (readRefusedBody).
func sendJSON(w http.ResponseWriter, status int, b []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)+1))
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n'))
}

// fileSource is a body whose bytes are in a file that it can hand out, so that the
// kernel sends them (sendfile). One goroutine uses it.
type fileSource interface {
	io.Reader
	// nextFile waits until there are bytes to read at the current position. It
	// returns a file that is at that position, and how many of its bytes may be
	// read, at most limit. The source keeps the file and closes it. Without a file
	// n bytes are to be read by Read, or all if n is 0. io.EOF is the end of the body.
	nextFile(limit int64) (f *os.File, n int64, err error)
	// advanceBy moves the current position by n bytes, which were read from the
	// file that nextFile returned.
	advanceBy(n int64)
}

// socketSource is a body that may arrive on a socket, from which the kernel can move it to
// the client's. One goroutine uses it.
type socketSource interface {
	// sendFromSocket moves the next bytes, at most limit, to w, and returns how many. 0:
	// Read is to be used, which also finds out what is wrong.
	sendFromSocket(w io.Writer, limit int64) int64
}

// seekOffset returns the offset that Seek(offset, whence) leads to in a body of size
// bytes (io.Seeker), of which at is the current one.
func seekOffset(offset int64, whence int, at, size int64) int64 {
	switch whence {
	case io.SeekCurrent:
		offset += at
	case io.SeekEnd:
		offset += size
	}
	return offset
}

// growingBody is a body that may still be arriving. While a reader waits for it,
// nothing that was read before may stay in a buffer.
type growingBody interface {
	// readyToRead reports whether the next Read returns without waiting.
	readyToRead() bool
}

const (
	// sendStep is how many bytes are handed to the kernel at once: so many that setting
	// the deadline costs nothing, and so few that a client's leaving is soon noticed.
	sendStep = 4 << 20
	// clientTimeout is how long a client may take no byte before it counts as gone. It is
	// long because TCP hides a slow reader: while a client reads a few bytes a second,
	// none leaves us until its receive window reopens.
	clientTimeout = 5 * time.Minute
	// closeDelay is how long the next bytes of a refused upload are awaited. It is several
	// round trips.
	closeDelay = time.Second
	// maxRefusedBody and maxRefusedBodyTime bound the reading of a refused upload: most
	// files are smaller, and a slow line takes about so long for one.
	maxRefusedBody     = 64 << 20
	maxRefusedBodyTime = 30 * time.Second
	// copyBufferSize is the size of the buffers of most bodies. It holds a small
	// file at once, and TLS sends 16 KiB at a time anyway.
	copyBufferSize = 64 << 10
	// largeBufferSize is the buffer size of fills and followers, and of large bodies that
	// come from another machine and leave without TLS. System calls are most of their
	// work: 64 MiB from S3 take a tenth less time than with copyBufferSize.
	largeBufferSize = 256 << 10
)

// response is the http.ResponseWriter of all handlers. It counts, moves the write
// deadline while the client takes bytes, and sends files by sendfile: http.ServeContent
// copies into ReadFrom. One goroutine uses it.
type response struct {
	http.ResponseWriter
	controller    http.ResponseController
	conn          *clientConn // nil: not known
	now           func() time.Time
	sendfile      bool      // plain HTTP/1, where net/http lets the kernel send files
	deadlineSetAt time.Time // when the write deadline was last set

	status    int       // 0 until the header was written
	headerAt  time.Time // when that was
	bytes     int64     // of the body, written so far
	size      int64     // of the whole file; 0: not known, or it has none
	bodyErr   error     // reading the body failed, so the answer must not end cleanly
	clientErr error     // writing to the client failed; wraps errClientGone

	// What the log line and the counters say; handlers set it.
	remote, path, result string
	detail               string // why a copy is stale
	mirror               string // the host of the mirror that answered; "": base_url did
	requestID            string
	quiet                bool // is logged at debug level only

	values []string   // of headers, at first in space
	space  [12]string // as many as a reply from the store has
}

// setHeader sets a header by its canonical name. The values share one array, since this
// runs several times for every hit.
func (w *response) setHeader(name, value string) {
	w.values = append(w.values, value)
	n := len(w.values)
	w.Header()[name] = w.values[n-1 : n : n]
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader writes the header and remembers its status.
func (w *response) WriteHeader(status int) {
	if status >= 200 { // 1xx is not yet the answer
		w.noteStatus(status)
	}
	w.extendWriteDeadline()
	switch h := w.Header(); { // what http.ServeContent leaves as it is
	case status == http.StatusPreconditionFailed: // it has no body either, like a 304
		h.Del("Content-Length")
	case status == http.StatusRequestedRangeNotSatisfiable && w.size > 0: // of a malformed range too
		h.Set("Content-Range", "bytes */"+strconv.FormatInt(w.size, 10))
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) noteStatus(status int) {
	if w.status == 0 {
		w.status, w.headerAt = status, w.now()
	}
}

func (w *response) Write(p []byte) (int, error) {
	w.noteStatus(http.StatusOK)
	w.extendWriteDeadline()
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, w.noteWriteError(err)
}

// resetConnection resets the connection of an HTTP/1.0 client. One that is closed in order
// would mean the end of a body without a length.
func (w *response) resetConnection() {
	conn, _, err := w.controller.Hijack()
	if err != nil {
		return
	}
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn() // close_notify would be an orderly end
	}
	if t, ok := conn.(interface{ SetLinger(seconds int) error }); ok {
		_ = t.SetLinger(0)
	}
	conn.Close()
}

func (w *response) noteWriteError(err error) error {
	if err != nil && w.clientErr == nil && !errors.Is(err, http.ErrBodyNotAllowed) {
		w.clientErr = fmt.Errorf("%w: %w", errClientGone, err)
	}
	return err
}

// extendWriteDeadline moves the write deadline to clientTimeout from now, if a quarter of
// it has passed: setting it for each small write would cost more than the write. It is
// never removed, because net/http writes what is buffered after the handler returned.
func (w *response) extendWriteDeadline() {
	now := w.now()
	if now.Sub(w.deadlineSetAt) < clientTimeout/4 {
		return
	}
	w.deadlineSetAt = now
	_ = w.controller.SetWriteDeadline(now.Add(clientTimeout)) // a recorder in tests has none
}

// ReadFrom sends src, by the kernel if it is a fileSource and the connection is
// plain. An error of src is remembered in bodyErr, because http.ServeContent
// ignores the error of its copy.
func (w *response) ReadFrom(src io.Reader) (int64, error) {
	limit, body := int64(math.MaxInt64), src
	if l, ok := src.(*io.LimitedReader); ok {
		limit, body = l.N, l.R
	}
	return w.sendBody(body, limit)
}

// sendBody is ReadFrom for the next limit bytes of body (math.MaxInt64: all).
func (w *response) sendBody(body io.Reader, limit int64) (sent int64, err error) {
	w.noteStatus(http.StatusOK)
	if m, ok := body.(memorySource); ok {
		if unread, ok := m.unread(); ok {
			return w.sendMemory(unread[:min(limit, int64(len(unread)))])
		}
	}
	files, ok := body.(fileSource)
	if !ok || !w.sendfile {
		return w.copyBody(body, 0, limit)
	}
	for sent < limit {
		w.flushIfWaiting(body)
		f, n, err := files.nextFile(min(limit-sent, sendStep))
		if err != nil {
			return sent, w.checkBodyEnd(err, sent, limit)
		}
		if f == nil {
			if n == 0 {
				return w.copyBody(body, sent, limit)
			}
			if sent, err = w.copyBody(body, sent, sent+n); err != nil {
				return sent, err
			}
			continue
		}
		step, err := w.sendFile(f, n)
		files.advanceBy(step)
		sent += step
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// flushIfWaiting sends what is buffered (at first the headers) if the next read of
// body would wait.
func (w *response) flushIfWaiting(body any) {
	if g, ok := body.(growingBody); ok && !g.readyToRead() {
		_ = w.controller.Flush() // an error comes again from the next write
	}
}

// sendFile sends n bytes of f from its current position. If the deadline passes
// although bytes were sent, the step was only large for a slow client, and it goes
// on.
func (w *response) sendFile(f *os.File, n int64) (sent int64, err error) {
	for sent < n {
		w.deadlineSetAt = time.Time{} // each step gets the whole time
		w.extendWriteDeadline()
		step, err := io.Copy(w.ResponseWriter, &io.LimitedReader{R: f, N: n - sent}) // by its ReadFrom
		sent += step
		w.bytes += step
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && step > 0:
		case err != nil:
			return sent, w.noteWriteError(err)
		case step == 0: // the file is shorter than its record says
			w.bodyErr = io.ErrUnexpectedEOF
			return sent, w.bodyErr
		}
	}
	return sent, nil
}

// The buffers of copyBody, of copyBufferSize and largeBufferSize bytes.
var (
	copyBuffers  = sync.Pool{New: func() any { return new([copyBufferSize]byte) }}
	largeBuffers = sync.Pool{New: func() any { return new([largeBufferSize]byte) }}
)

// copyBody sends what the kernel cannot send: from memory, by TLS, from a stream. Of
// the limit bytes of the body sent are sent already, and it returns how many are then.
func (w *response) copyBody(body io.Reader, sent, limit int64) (int64, error) {
	var buf []byte
	var socket socketSource
	if w.sendfile && limit > 4*largeBufferSize {
		socket, _ = body.(socketSource)
		b := largeBuffers.Get().(*[largeBufferSize]byte)
		defer largeBuffers.Put(b)
		buf = b[:]
	} else {
		b := copyBuffers.Get().(*[copyBufferSize]byte)
		defer copyBuffers.Put(b)
		buf = b[:]
	}
	for sent < limit {
		w.flushIfWaiting(body)
		if socket != nil {
			w.extendWriteDeadline()
			n := socket.sendFromSocket(w.ResponseWriter, limit-sent)
			w.bytes += n
			if sent += n; n > 0 {
				continue
			}
		}
		n, err := body.Read(buf[:min(int64(len(buf)), limit-sent)])
		if n > 0 {
			written, werr := w.Write(buf[:n])
			sent += int64(written)
			if werr != nil {
				return sent, werr
			}
		}
		if err != nil {
			return sent, w.checkBodyEnd(err, sent, limit)
		}
	}
	return sent, nil
}

// checkBodyEnd returns nil if the error of a body is its proper end: io.EOF, and
// after limit bytes if a length was promised. Otherwise it remembers the error in
// bodyErr and returns it.
func (w *response) checkBodyEnd(err error, sent, limit int64) error {
	if err == io.EOF && (limit == math.MaxInt64 || sent == limit) {
		return nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	w.bodyErr = err
	return err
}
