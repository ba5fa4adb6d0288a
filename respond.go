// respond.go: how a handler's error becomes an answer, how a body is sent, and
// how an answer becomes a log line. Handlers return errors; responder alone
// writes them.

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
	"math"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The error kinds that all layers share. A richer error wraps one of them;
// "not there" is fs.ErrNotExist in every layer.
var (
	errBadRequest   = errors.New("bad request")
	errUnauthorized = errors.New("a token is needed")
	errDenied       = errors.New("denied")
	errTooLong      = errors.New("path too long")
	errUnreachable  = errors.New("upstream unreachable") // dial, DNS, TLS, reset before headers
	errTimeout      = errors.New("upstream timed out")
	errBadUpstream  = errors.New("bad upstream answer") // one that cannot be used
	errStoreDown    = errors.New("store is not usable")
	errNoSpace      = errors.New("no space left to store")
	errBusy         = errors.New("too many requests") // Retry-After is sent
	errClientGone   = errors.New("the client left")
)

// statusClientGone is logged for a client that left before its answer; it is
// never on the wire (nginx's number).
const statusClientGone = 499

// problem is an error with all that its answer needs. detail reaches the
// client and so never holds a secret or a query; cause reaches the log only.
type problem struct {
	status     int
	detail     string
	retryAfter time.Duration // 0: no Retry-After
	allow      string        // Allow, with 405
	challenge  string        // WWW-Authenticate, with 401
	cause      error         // what errors.Is sees; may be nil
}

func (p *problem) Error() string {
	if p.cause == nil {
		return p.detail
	}
	return p.detail + ": " + p.cause.Error()
}

func (p *problem) Unwrap() error { return p.cause }

// newProblem makes a problem of a status and a text for the client.
func newProblem(status int, format string, args ...any) *problem {
	return &problem{status: status, detail: fmt.Sprintf(format, args...)}
}

// errorStatuses is the one table from an error to the status and text of its answer.
// The first match counts; an error of no kind is 500 and explains itself in
// the log only.
var errorStatuses = []struct {
	err    error
	status int
	detail string
}{
	{context.Canceled, statusClientGone, "the client left"},
	{errClientGone, statusClientGone, "the client left"},
	{errBadRequest, http.StatusBadRequest, "bad request"},
	{errUnauthorized, http.StatusUnauthorized, "a token is needed"},
	{errDenied, http.StatusForbidden, "this path may not be fetched: no pattern of the remote allows it"},
	{errTooLong, http.StatusRequestURITooLong, "the path is longer than 1024 bytes"},
	{fs.ErrNotExist, http.StatusNotFound, "not found"},
	{errBusy, http.StatusServiceUnavailable, "too many requests, try again later"},
	{errNoSpace, http.StatusInsufficientStorage, "no space left to store this"},
	{errStoreDown, http.StatusServiceUnavailable, "the store cannot be used right now"},
	{errTimeout, http.StatusGatewayTimeout, "the upstream did not answer in time"},
	{errUnreachable, http.StatusBadGateway, "the upstream cannot be reached"},
	{errBadUpstream, http.StatusBadGateway, "the upstream's answer cannot be used"},
}

// statusAndDetail is the status and the text for the client of err.
func statusAndDetail(err error) (status int, detail string) {
	if p, ok := errors.AsType[*problem](err); ok {
		return p.status, p.detail
	}
	for _, k := range errorStatuses {
		if errors.Is(err, k.err) {
			return k.status, k.detail
		}
	}
	return http.StatusInternalServerError, "internal error"
}

// secret is a string that never prints: not through fmt, slog or JSON.
type secret string

func (s secret) String() string {
	if s == "" {
		return ""
	}
	return "***"
}

// GoString, LogValue and MarshalJSON close the other ways out.
func (s secret) GoString() string             { return s.String() }
func (s secret) LogValue() slog.Value         { return slog.StringValue(s.String()) }
func (s secret) MarshalJSON() ([]byte, error) { return json.Marshal(s.String()) }

// handler serves one request. An error it returns is answered by the
// responder, unless the answer has begun: then the connection is aborted.
type handler func(w *response, r *http.Request) error

// responder turns handlers into http.Handlers: it recovers, answers errors,
// logs one line and counts.
type responder struct {
	now     func() time.Time
	log     *slog.Logger
	metrics requestCounter
}

// requestCounter counts answered requests: metrics, or a test's.
type requestCounter interface {
	countRequest(remote, result string, status int, bytes int64, d time.Duration)
}

// errorWriter writes the answer for an error in the format of its API.
type errorWriter func(w http.ResponseWriter, status int, detail string, err error)

// serveRequest runs h for one request.
func (s *responder) serveRequest(w http.ResponseWriter, r *http.Request, h handler, fail errorWriter) {
	began := s.now()
	res := &response{ResponseWriter: w, controller: http.NewResponseController(w), now: s.now, head: r.Method == http.MethodHead}
	if r.ProtoMajor == 1 && r.TLS == nil {
		res.sendfile = true
	}
	res.extendWriteDeadline() // an earlier answer's deadline may be over, and net/http may write before us
	if r.ContentLength != 0 {
		// A body that nobody reads is read by net/http before it answers, which
		// must still be in time. It lifts this at the body's end.
		_ = res.controller.SetReadDeadline(began.Add(clientTimeout / 2))
	}
	unwanted := hasUnwantedBody(r)
	if unwanted {
		res.Header().Set("Connection", "close")
	}
	err := s.callHandler(res, r, h)
	if unwanted { // the connection may end
		_ = res.controller.SetReadDeadline(s.now().Add(closeDelay))
	}
	abort := false
	if err != nil {
		abort = s.answerError(res, r, err, fail)
	}
	s.logAndCount(res, r, err, s.now().Sub(began))
	if abort {
		if !r.ProtoAtLeast(1, 1) {
			res.resetConnection()
		}
		panic(http.ErrAbortHandler)
	}
	if err != nil && !unwanted && r.ContentLength != 0 && r.ProtoMajor == 1 {
		s.readRefusedBody(res, r)
	}
}

// readRefusedBody reads what still comes of an upload that was refused. Some clients
// send all before they look for an answer; closing before that would take the
// answer with it.
func (s *responder) readRefusedBody(w *response, r *http.Request) {
	if w.controller.Flush() != nil {
		return
	}
	for end := s.now().Add(maxRefusedBodyTime); s.now().Before(end); {
		_ = w.controller.SetReadDeadline(s.now().Add(closeDelay))
		if _, err := io.CopyN(io.Discard, r.Body, copyBufferSize); err != nil {
			return
		}
	}
}

// hasUnwantedBody says whether r announces a body that means nothing here.
// net/http would read it before it answers, to keep the connection; but it may
// never come.
func hasUnwantedBody(r *http.Request) bool {
	return r.ContentLength != 0 && r.ProtoMajor == 1 && r.Method != http.MethodPut && r.Method != http.MethodPost
}

// callHandler calls h and turns a panic into an error; net/http's own abort too, so
// that an aborted answer is logged like any other.
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

// answerError answers err, or says that the connection must be aborted because an
// answer has begun.
func (s *responder) answerError(w *response, r *http.Request, err error, write errorWriter) (abort bool) {
	if w.status != 0 {
		return true
	}
	status, detail := statusAndDetail(err)
	if status == statusClientGone || errors.Is(err, http.ErrAbortHandler) {
		w.status = status
		return true
	}
	h := w.Header()
	clear(h)
	if p, ok := errors.AsType[*problem](err); ok {
		if p.retryAfter > 0 {
			h.Set("Retry-After", strconv.Itoa(int(math.Ceil(p.retryAfter.Seconds()))))
		}
		if p.allow != "" {
			h.Set("Allow", p.allow)
		}
		if p.challenge != "" {
			h.Set("WWW-Authenticate", p.challenge)
		}
	}
	h.Set("X-Content-Type-Options", "nosniff")
	switch {
	case r.ProtoMajor != 1:
	case r.ContentLength != 0:
		// To keep the connection net/http would first read the rest of the
		// body, which a client may be waiting with.
		h.Set("Connection", "close")
	case r.ProtoMinor == 1:
		h.Set("Connection", "keep-alive")
	}
	write(w, status, detail, err)
	return false
}

// logAndCount writes the one log line of a request and counts it.
func (s *responder) logAndCount(w *response, r *http.Request, err error, took time.Duration) {
	if w.status == 0 {
		w.status = http.StatusOK // nothing was written: net/http sends this
	}
	if errors.Is(err, errClientGone) || errors.Is(err, context.Canceled) {
		w.status = statusClientGone // a body that is waited for sees its context end first
	}
	s.metrics.countRequest(w.remote, strings.ToLower(w.result), w.status, w.bytes, took)
	level, msg := slog.LevelInfo, "Request"
	switch {
	case w.result != "":
		msg = "Cache " + w.result
	case w.quiet:
		level = slog.LevelDebug
	}
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	path := w.path
	if path == "" {
		path = r.URL.Path
	}
	client, _, splitErr := net.SplitHostPort(r.RemoteAddr)
	if splitErr != nil {
		client = r.RemoteAddr
	}
	attrs := []slog.Attr{slog.String("method", r.Method), slog.String("remote", w.remote), slog.String("path", path),
		slog.Int("status", w.status), slog.Int64("bytes", w.bytes), slog.Duration("duration", took), slog.String("client", client)}
	if err != nil && !errors.Is(err, http.ErrAbortHandler) {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	s.log.LogAttrs(r.Context(), level, msg, attrs...)
}

// writeJSONError is the errorWriter of everything but the registry.
func writeJSONError(w http.ResponseWriter, status int, detail string, _ error) {
	b, _ := json.Marshal(map[string]string{"detail": detail}) // strings always encode
	sendJSON(w, status, b)
}

// writeJSON answers 200 with v.
func writeJSON(w http.ResponseWriter, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the answer: %w", err)
	}
	sendJSON(w, http.StatusOK, b)
	return nil
}

// sendJSON answers status with b and its length: a client then has the whole
// answer though the handler goes on (linger).
func sendJSON(w http.ResponseWriter, status int, b []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)+1))
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n'))
}

// fileSource is a body that can hand out the file its bytes are in, so that the
// kernel sends them (sendfile).
type fileSource interface {
	io.Reader
	// nextFile waits until bytes can be read where the source stands and returns a
	// file that stands there with how many of its bytes are ready, at most max.
	// A nil file means: use Read. io.EOF ends the source.
	nextFile(max int64) (f *os.File, n int64, err error)
	// advanceBy says that n bytes were read from next's file.
	advanceBy(n int64)
}

// growingBody is a body that may have to be waited for: what was sent before must
// not sit in a buffer meanwhile.
type growingBody interface {
	// readyToRead says that reading on will not wait.
	readyToRead() bool
}

const (
	// sendStep is how much is handed to the kernel at once: large enough that
	// the deadline's cost vanishes, small enough that a fill's watermark and a
	// client's departure are noticed.
	sendStep = 4 << 20
	// clientTimeout is how long a client may take no byte at all before it counts
	// as dead. TCP shows a reader of some bytes a second only now and then,
	// when its window reopens, so this is long.
	clientTimeout = 5 * time.Minute
	// closeDelay is how long a connection stays open behind its last answer for
	// a body on its way: closed before, it could take the answer with it.
	closeDelay = time.Second
	// maxRefusedBodyTime is how long a refused upload is read at most: what a gigabyte
	// takes on a good line.
	maxRefusedBodyTime = 30 * time.Second
	copyBufferSize     = 64 << 10
	// largeBufferSize is for bodies that fills and followers move, and for large ones
	// that come from another machine and leave unencrypted: system calls are most
	// of the work, and 64 MiB of S3 take a tenth less time than by copyBufferSize.
	largeBufferSize = 256 << 10
)

// response is the http.ResponseWriter of all handlers: it counts, pushes the
// write deadline forward while the client takes bytes, and sends files by
// sendfile. ServeContent's copy lands in ReadFrom.
type response struct {
	http.ResponseWriter
	controller    *http.ResponseController
	now           func() time.Time
	head          bool
	sendfile      bool      // plain HTTP/1: net/http hands files to the kernel
	deadlineSetAt time.Time // when the write deadline was last set

	status    int
	bytes     int64
	bodyErr   error // reading a body failed: the answer must not end cleanly
	clientErr error // writing to the client failed

	// For the log line and the counters, set by handlers.
	remote, path, result string
	quiet                bool // not worth a line unless debugging
}

// Unwrap lets http.ResponseController reach the connection.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader notes the status. Informational ones are not the answer.
func (w *response) WriteHeader(status int) {
	if status >= 200 && w.status == 0 {
		w.status = status
	}
	w.extendWriteDeadline()
	if status == http.StatusPreconditionFailed {
		// ServeContent takes it back for 304, not here; there is no body.
		w.Header().Del("Content-Length")
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	w.extendWriteDeadline()
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, w.noteWriteError(err)
}

// resetConnection breaks the connection of an HTTP/1.0 client, who takes a closed one for
// the end of a body without a length.
func (w *response) resetConnection() {
	conn, _, err := w.controller.Hijack()
	if err != nil {
		return
	}
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn() // no farewell
	}
	if t, ok := conn.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	conn.Close()
}

// noteWriteError notes a write that failed: the client is gone.
func (w *response) noteWriteError(err error) error {
	if err != nil && w.clientErr == nil && !errors.Is(err, http.ErrBodyNotAllowed) {
		w.clientErr = fmt.Errorf("%w: %w", errClientGone, err)
	}
	return err
}

// extendWriteDeadline moves the write deadline. Setting a timer for each small write would
// cost more than the write, hence the quarter. It is never lifted: net/http
// writes what is buffered after the handler, to a client that may take nothing.
func (w *response) extendWriteDeadline() {
	now := w.now()
	if now.Sub(w.deadlineSetAt) < clientTimeout/4 && !w.deadlineSetAt.IsZero() {
		return
	}
	w.deadlineSetAt = now
	_ = w.controller.SetWriteDeadline(now.Add(clientTimeout)) // a recorder in tests has none
}

// ReadFrom sends src, through the kernel where it is a source on a plain
// connection. A failing src is noted in bodyErr, because http.ServeContent
// drops what its copy returns.
func (w *response) ReadFrom(src io.Reader) (int64, error) {
	limit, body := int64(math.MaxInt64), src
	if l, ok := src.(*io.LimitedReader); ok {
		limit, body = l.N, l.R
	}
	if w.status == 0 {
		w.status = http.StatusOK
	}
	if s, ok := body.(fileSource); ok && w.sendfile {
		return w.sendFiles(s, limit)
	}
	return w.copyBody(body, limit)
}

// flushIfWaiting sends what is buffered, the headers above all, if body would
// keep the client waiting for more.
func (w *response) flushIfWaiting(body any) {
	if l, ok := body.(growingBody); ok && !l.readyToRead() {
		_ = w.controller.Flush() // a client that has left shows at the next write
	}
}

// sendFiles sends limit bytes of s, or all.
func (w *response) sendFiles(s fileSource, limit int64) (sent int64, err error) {
	for sent < limit {
		w.flushIfWaiting(s)
		f, n, err := s.nextFile(min(limit-sent, sendStep))
		if err != nil {
			return sent, w.checkBodyEnd(err, sent, limit)
		}
		if f == nil {
			if limit < math.MaxInt64 { // a length was promised
				limit -= sent
			}
			n, err := w.copyBody(s, limit)
			return sent + n, err
		}
		k, err := w.sendFile(f, n)
		s.advanceBy(k)
		sent += k
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// sendFile sends n bytes of f from where it stands. A deadline that passes
// while bytes still flow only means that the step was long for this client.
func (w *response) sendFile(f *os.File, n int64) (sent int64, err error) {
	rf, ok := w.ResponseWriter.(io.ReaderFrom)
	for sent < n {
		w.deadlineSetAt = time.Time{}
		w.extendWriteDeadline()
		var k int64
		src := &io.LimitedReader{R: f, N: n - sent}
		if ok {
			k, err = rf.ReadFrom(src)
		} else {
			k, err = io.Copy(w.ResponseWriter, src)
		}
		sent += k
		w.bytes += k
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && k > 0:
		case err != nil:
			return sent, w.noteWriteError(err)
		case k == 0: // the file is shorter than its record says
			w.bodyErr = io.ErrUnexpectedEOF
			return sent, w.bodyErr
		}
	}
	return sent, nil
}

var (
	copyBuffers  = sync.Pool{New: func() any { return new([copyBufferSize]byte) }}
	largeBuffers = sync.Pool{New: func() any { return new([largeBufferSize]byte) }}
)

// copyBody sends limit bytes of what cannot be sent by the kernel: memory, TLS,
// streams.
func (w *response) copyBody(body io.Reader, limit int64) (sent int64, err error) {
	var buf []byte
	if w.sendfile && limit > 4*largeBufferSize {
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
		n, err := body.Read(buf[:min(int64(len(buf)), limit-sent)])
		if n > 0 {
			k, werr := w.Write(buf[:n])
			sent += int64(k)
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

// checkBodyEnd judges the end of a source: clean only at EOF and, where a length was
// promised, only behind it.
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

// statusOf is describe's status alone.
func statusOf(err error) int {
	status, _ := statusAndDetail(err)
	return status
}
