// respond_log.go: the log line of a request.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"time"
)

// maxLoggedHeader bounds what a client can write into a log line by one header, in
// bytes. User agents of package managers and browsers are shorter.
const maxLoggedHeader = 200

// logAndCount writes the one log line of a request and counts it.
func (s *responder) logAndCount(w *response, r *http.Request, err error, began time.Time) {
	ended := s.now()
	took := ended.Sub(began)
	if w.status == 0 {
		w.status = http.StatusOK // a handler that wrote nothing: net/http sends this
	}
	if w.headerAt.IsZero() {
		w.headerAt = ended
	}
	// context.Canceled: the client left while we waited for its body
	if errors.Is(err, errClientGone) || errors.Is(err, context.Canceled) {
		if s.cutOff.Load() {
			err = errors.New("cut off: the server stops")
		} else {
			w.status = statusClientGone
		}
	}
	s.metrics.countRequest(w.remote, strings.ToLower(w.result), w.status, w.bytes, w.headerAt.Sub(began), took)
	msg := "Request"
	if w.result != "" {
		msg = "Cache " + w.result
	}
	level := s.levelOf(w, err)
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	client, _, _ := net.SplitHostPort(r.RemoteAddr)
	attrs := make([]slog.Attr, 0, 14)
	attrs = append(attrs, slog.String("method", r.Method), slog.String("remote", w.remote), slog.String("path", cmp.Or(w.path, r.URL.Path)),
		slog.Int("status", w.status), slog.Int64("bytes", w.bytes), slog.Float64("duration_ms", float64(took.Microseconds())/1000),
		slog.String("client", client))
	forwarded := strings.Join(r.Header.Values("X-Forwarded-For"), ", ")
	for _, a := range [...]struct{ key, value string }{{"forwarded_for", forwarded}, {"user_agent", r.UserAgent()},
		{"request_id", w.requestID}, {"detail", w.detail}, {"mirror", w.mirror}} {
		if a.value != "" {
			attrs = append(attrs, slog.String(a.key, a.value[:min(len(a.value), maxLoggedHeader)]))
		}
	}
	if err != nil && !errors.Is(err, http.ErrAbortHandler) {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	s.log.LogAttrs(r.Context(), level, msg, attrs...)
}

// levelOf is the level of a request's log line. A failure of ours is a warning, unless
// it comes from an outage that was logged when it began.
func (s *responder) levelOf(w *response, err error) slog.Level {
	announced := errors.Is(err, errStoreDown) || (s.isDown != nil && s.isDown(w.remote))
	switch {
	case w.status >= 500 && !announced:
		return slog.LevelWarn
	case w.result == "" && w.quiet:
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// acceptRequestID returns an X-Request-Id of a client or a proxy if it is fit for a
// header and a log line: at most 128 visible ASCII characters. Otherwise it returns "".
func acceptRequestID(id string) string {
	if len(id) > 128 || strings.ContainsFunc(id, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return ""
	}
	return id
}

// newRequestID makes 16 random hex digits. They tell requests apart, nothing more.
func newRequestID() string { return fmt.Sprintf("%016x", rand.Uint64()) }
