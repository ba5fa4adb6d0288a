// respond_log.go: the log line of a request, and how lines are gathered and written.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// maxLoggedHeader bounds what one header of a client adds to a log line, in bytes. User
// agents are shorter.
const maxLoggedHeader = 200

// logAndCount writes the one log line of a request and counts it.
func (s *responder) logAndCount(w *response, r *http.Request, err error, began time.Time) {
	w.noteStatus(http.StatusOK) // net/http sends this if a handler wrote nothing
	ended := s.now()
	took := ended.Sub(began)
	// context.Canceled: the client left while we waited for its body
	if errors.Is(err, errClientGone) || errors.Is(err, context.Canceled) {
		if s.cutOff.Load() {
			err = errors.New("cut off: the server stops")
		} else {
			w.status = statusClientGone
		}
	}
	s.count(w.remote, strings.ToLower(w.result), w.status, w.bytes, w.headerAt.Sub(began), took)
	msg := "Request"
	if w.result != "" {
		msg = "Cache " + w.result
	}
	level := s.levelOf(w, err)
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	client, _, _ := net.SplitHostPort(r.RemoteAddr)
	var space [14]slog.Attr // on the stack
	attrs := append(space[:0], slog.String("method", r.Method), slog.String("remote", w.remote), slog.String("path", cmp.Or(w.path, r.URL.Path)),
		slog.Int("status", w.status), slog.Int64("bytes", w.bytes), slog.Float64("duration_ms", float64(took.Microseconds())/1000),
		slog.String("client", client))
	forwarded := strings.Join(r.Header["X-Forwarded-For"], ", ")
	for _, a := range [...]struct{ key, value string }{{"forwarded_for", forwarded}, {"user_agent", r.UserAgent()},
		{"request_id", w.requestID}, {"detail", w.detail}, {"mirror", w.mirror}} {
		if a.value != "" {
			attrs = append(attrs, slog.String(a.key, a.value[:min(len(a.value), maxLoggedHeader)]))
		}
	}
	if err != nil && !errors.Is(err, http.ErrAbortHandler) {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	if h, ok := s.log.Handler().(lineHandler); ok && h.isJSON {
		h.writeJSON(ended, level, msg, attrs)
		return
	}
	// Not by LogAttrs: for each line it asks the clock again and who has called it.
	line := slog.NewRecord(ended, level, msg, 0)
	line.AddAttrs(attrs...)
	_ = s.log.Handler().Handle(r.Context(), line) // slog passes over its error, too
}

// levelOf is the level of a request's log line. A failure of ours is a warning, unless it
// comes from an outage that was logged when it began.
func (s *responder) levelOf(w *response, err error) slog.Level {
	switch {
	case w.quiet && w.status == http.StatusServiceUnavailable: // /health while draining
		return slog.LevelDebug
	case w.status >= 500 && !errors.Is(err, errStoreDown) && (s.isDown == nil || !s.isDown(w.remote)):
		return slog.LevelWarn
	case w.result == "" && w.quiet:
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// chooseRequestID returns the X-Request-Id of a client or a proxy if it is fit for a
// header and a log line: at most 128 visible ASCII characters. Otherwise it makes 16
// hex digits.
func chooseRequestID(id string) string {
	if id == "" || len(id) > 128 || strings.ContainsFunc(id, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return strconv.FormatUint(rand.Uint64()|1<<63, 16)
	}
	return id
}

const (
	// maxHeldLines bounds the log lines that wait to be written, in bytes: some 200 lines.
	maxHeldLines = 64 << 10
	// maxLineDelay is how long a line waits. A process that is killed loses no more.
	maxLineDelay = 100 * time.Millisecond
)

// lineWriter gathers log lines and writes many of them at once: to write one at a time
// is a tenth of what a hit costs. While the reader of the log does not read, those who log
// wait. What cannot be written is lost. Its methods may be called concurrently.
type lineWriter struct {
	to io.Writer

	// writing is held while to is written, so that lines stay in their order; it is
	// taken before mu. It guards space.
	writing sync.Mutex
	space   []byte // of lines that are written already, for the next ones

	mu   sync.Mutex // guards held
	held []byte
}

// Write holds a line back, and writes what is held when that is much.
func (l *lineWriter) Write(line []byte) (int, error) {
	l.mu.Lock()
	if len(l.held) == 0 {
		time.AfterFunc(maxLineDelay, l.flush) // nothing is left to do, or less, where they were written before
	}
	l.held = append(l.held, line...)
	isFull := len(l.held) >= maxHeldLines
	l.mu.Unlock()
	if isFull {
		l.flush()
	}
	return len(line), nil
}

// flush writes all lines that were logged before. The maker of l calls it in the end.
func (l *lineWriter) flush() {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	lines := l.held
	l.held = l.space[:0]
	l.mu.Unlock()
	if len(lines) > 0 {
		_, _ = l.to.Write(lines)
	}
	l.space = lines
}

// lineHandler is a handler whose lines go to a lineWriter. A warning is written at once,
// with all lines before it: what follows may be a crash.
type lineHandler struct {
	slog.Handler
	lines  *lineWriter
	isJSON bool // its lines are those of slog's JSONHandler, without attributes or groups of its own
}

func (h lineHandler) Handle(ctx context.Context, rec slog.Record) error {
	err := h.Handler.Handle(ctx, rec)
	h.flushAt(rec.Level)
	return err
}

func (h lineHandler) flushAt(level slog.Level) {
	if level >= slog.LevelWarn {
		h.lines.flush()
	}
}

func (h lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return lineHandler{Handler: h.Handler.WithAttrs(attrs), lines: h.lines}
}

// writeJSON writes a line as slog's JSONHandler would, for which a request's line is half of
// our own work for a hit from memory. This way it is a sixth.
func (h lineHandler) writeJSON(at time.Time, level slog.Level, msg string, attrs []slog.Attr) {
	var space [1024]byte // on the stack; most lines have 400 bytes
	b := append(space[:0], `{"time":"`...)
	b = at.AppendFormat(b, time.RFC3339Nano)
	b = append(append(append(b, `","level":"`...), level.String()...), '"')
	b = appendJSONString(append(b, `,"msg":`...), msg)
	for _, a := range attrs {
		b = append(append(append(b, `,"`...), a.Key...), `":`...)
		switch a.Value.Kind() {
		case slog.KindInt64:
			b = strconv.AppendInt(b, a.Value.Int64(), 10)
		case slog.KindFloat64:
			b = strconv.AppendFloat(b, a.Value.Float64(), 'f', -1, 64)
		default:
			b = appendJSONString(b, a.Value.String())
		}
	}
	_, _ = h.lines.Write(append(b, "}\n"...))
	h.flushAt(level)
}

// appendJSONString appends s as a string of JSON.
func appendJSONString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, _ := json.Marshal(s) // a string cannot fail
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}
