package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// statusOf returns the status that a client gets for err.
func statusOf(err error) int {
	status, _ := statusAndDetail(err)
	return status
}

func TestErrorsHaveOneStatusEach(t *testing.T) {
	t.Parallel()
	want := map[error]int{
		context.Canceled: 499, errClientGone: 499, errBadRequest: 400, errDenied: 403, errTooLong: 414,
		fs.ErrNotExist: 404, errBusy: 503, errNoSpace: 507, errStoreDown: 503, errTimeout: 504, errUnreachable: 502, errBadUpstream: 502,
		errBroken: 502, errDigest: 502, &upstreamStatus{404}: 404, &upstreamStatus{410}: 404,
		errors.New("anything else"): 500, newProblem(418, "teapot"): 418,
	}
	for err, status := range want {
		wrapped := fmt.Errorf("doing something: %w", err)
		if got := statusOf(wrapped); got != status {
			t.Errorf("%v is %d, want %d", err, got, status)
		}
	}
	for _, k := range errorStatuses {
		if want[k.err] != k.status {
			t.Errorf("%v is in the table with %d and not in this test", k.err, k.status)
		}
	}
	// The reason of an error of no kind is only logged.
	if _, detail := statusAndDetail(errors.New("dial 10.0.0.7: secret")); detail != "internal error" {
		t.Errorf("a client is told %q", detail)
	}
}

func TestSecretsPrintNowhere(t *testing.T) {
	t.Parallel()
	s := secret("hunter2")
	j, err := json.Marshal(map[string]any{"s": s, "p": &s, "m": map[string]secret{"k": s}})
	if err != nil {
		t.Fatal(err)
	}
	logs := &testLogs{}
	slog.New(slog.NewJSONHandler(logs, nil)).Info("x", "s", s, "p", &s, "any", struct{ S secret }{s})
	slog.New(slog.NewTextHandler(logs, nil)).Info("x", "s", s, "p", &s, "any", struct{ S secret }{s})
	for _, text := range []string{fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %s %q", s, s, s, s, s), fmt.Sprintf("%+v", struct{ S secret }{s}), string(j), logs.String()} {
		if strings.Contains(text, "hunter2") {
			t.Errorf("a secret shows: %s", text)
		}
	}
}

// logged is the log line of a request.
type logged struct {
	Level, Msg, Method, Remote, Path, Client, Error, Detail, Mirror string

	Status       int
	Bytes        int64
	DurationMS   float64 `json:"duration_ms"`
	ForwardedFor string  `json:"forwarded_for"`
	UserAgent    string  `json:"user_agent"`
	RequestID    string  `json:"request_id"`
}

// requestLines returns the log lines of requests, in order.
func (l *testLogs) requestLines(t testing.TB) (lines []logged) {
	for line := range strings.Lines(l.String()) {
		var v logged
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Errorf("not JSON: %s", line)
		}
		if v.Method != "" {
			lines = append(lines, v)
		}
	}
	return lines
}

// wantLine waits for the log line of the nth request.
func (tt *tester) wantLine(n int) logged {
	tt.Helper()
	tt.eventually("the line of a request", func() bool { return len(tt.logs.requestLines(tt)) > n })
	return tt.logs.requestLines(tt)[n]
}

func TestEachRequestIsOneLine(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ['idx$']`, "check_mutable_updates: true", "password: SECRET", "username: u")
	tt.origin.file("/a.idx?token=SECRET", "body").etag(`"1"`)
	get := func() { tt.get("/api/r/a.idx?token=SECRET", "Authorization: Bearer SECRET") }
	steps := []struct {
		do     func()
		msg    string
		status int
		bytes  int64
		path   string
		method string
	}{
		{get, "Cache MISS", 200, 4, "a.idx", "GET"},
		{get, "Cache HIT", 200, 4, "a.idx", "GET"},
		{func() { tt.advance(2 * time.Hour); get() }, "Cache REVALIDATED", 200, 4, "a.idx", "GET"},
		{func() { tt.advance(2 * time.Hour); tt.down(); get() }, "Cache STALE", 200, 4, "a.idx", "GET"},
		{func() { tt.upAgain(); tt.get("/api/r/none?x=SECRET") }, "Cache MISS", 404, -1, "none", "GET"},
		{func() { tt.get("/api/r/a%2F..%2Fb?x=SECRET") }, "Request", 400, -1, "", "GET"},
		{func() { tt.head("/api/r/a.idx?token=SECRET") }, "Cache HIT", 200, 0, "a.idx", "HEAD"},
		{func() { tt.get("/api/r/a.idx?token=SECRET", "Range: bytes=1-2") }, "Cache HIT", 206, 2, "a.idx", "GET"},
		{func() { tt.get("/config") }, "Request", 200, -1, "/config", "GET"},
		{func() { tt.get("/artifacts/r?pattern=(SECRET") }, "Request", 400, -1, "/artifacts/r", "GET"},
	}
	for n, s := range steps {
		s.do()
		v := tt.wantLine(n)
		if v.Msg != s.msg || v.Status != s.status || (s.bytes >= 0 && v.Bytes != s.bytes) || (s.path != "" && v.Path != s.path) || v.Method != s.method ||
			v.Client != "127.0.0.1" || v.DurationMS <= 0 || v.RequestID == "" || (s.path == "a.idx" && v.Remote != "r") {
			t.Errorf("line %d is %+v, want %s %d", n, v, s.msg, s.status)
		}
	}
	if lines := tt.logs.requestLines(t); len(lines) != len(steps) {
		t.Errorf("%d lines for %d requests", len(lines), len(steps))
	}
	if strings.Contains(tt.logs.String(), "SECRET") {
		t.Errorf("a log line shows a query or a secret:\n%s", strings.Join(tt.logs.lines("SECRET"), ""))
	}
}

// What an operator needs of a request besides its result: who asked, through what,
// why a copy is stale, which mirror has the body.
func TestLogLineSaysWhoAskedAndWhy(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	mirror := tt.another()
	tt.moveUpstream(tt.origin.url, `mutable_patterns: ['idx$']`, "mirrors: ["+mirror.url+"]")
	tt.origin.file("/a.idx", "body").acts(tt.origin.resets)
	mirror.file("/a.idx", "body")
	tt.get("/api/r/a.idx", "X-Forwarded-For: 10.1.2.3"+strings.Repeat(", 10.9.9.9", 100), "X-Request-Id: abc-1").
		wantMiss().wantHeader("X-Request-Id", "abc-1")
	v := tt.wantLine(0)
	if !strings.HasPrefix(v.ForwardedFor, "10.1.2.3, 10.9") || len(v.ForwardedFor) != maxLoggedHeader || v.UserAgent != "client" ||
		v.RequestID != "abc-1" || "http://"+v.Mirror != mirror.url || v.Detail != "" {
		t.Errorf("the miss is %+v", v)
	}
	tt.advance(2 * time.Hour)
	tt.down()
	_ = mirror.serve.Close()
	tt.get("/api/r/a.idx", "X-Request-Id: with a blank").wantStale()
	if v := tt.wantLine(1); v.Detail != "unreachable" || len(v.RequestID) != 16 || v.Level != "INFO" {
		t.Errorf("the stale hit is %+v", v)
	}
}

// A mirror that stands in for weeks is seen: in a line when base_url begins to fail and
// in one when it works again, on the page, and as a metric.
func TestAMirrorThatStandsInIsSeen(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	mirror := tt.another()
	tt.moveUpstream(tt.origin.url, "mirrors: ["+mirror.url+"]")
	files := 0
	ask := func(act http.HandlerFunc) {
		t.Helper()
		files++
		path := fmt.Sprint("/", files)
		tt.origin.file(path, "body").acts(act)
		mirror.file(path, "body")
		tt.get("/api/r" + path).wantMiss()
		tt.advance(time.Minute)
	}
	wantFailing := func(n int, onPage ...string) {
		t.Helper()
		if text := tt.get("/metrics").text; !strings.Contains(text, fmt.Sprintf("artifactapi_failing_origins{remote=\"r\"} %d\n", n)) {
			t.Errorf("/metrics does not say that %d origins fail", n)
		}
		for _, path := range []string{"/", "/?remote=r"} {
			for _, part := range onPage {
				if text := tt.get(path, browser).text; !strings.Contains(text, part) {
					t.Errorf("%s lacks %q", path, part)
				}
			}
		}
	}
	wantLines := func(text string, n int) {
		t.Helper()
		if lines := tt.logs.lines(text); len(lines) != n {
			t.Errorf("%d lines have %q; want %d:\n%s", len(lines), text, n, tt.logs)
		}
	}
	tt.origin.file("/a", "body")
	tt.origin.file("/b", "body").acts(answers(500))
	mirror.file("/b", "body")
	tt.get("/api/r/a").wantMiss()
	tt.get("/api/r/b").wantMiss()
	wantFailing(0, ">up<") // it is one file's
	tt.advance(time.Minute)
	ask(tt.origin.resets)
	wantFailing(1, "up in part", tt.origin.url+" fails for 1 min: ")
	ask(nil)
	wantFailing(0, ">up<")
	ask(answers(503))
	ask(answers(503))
	wantFailing(1, tt.origin.url+" fails for 2 min: it answers 503")
	ask(nil)
	wantFailing(0, ">up<")
	wantLines("an origin of a remote fails", 2)
	wantLines("an origin of a remote works again", 2)
	ask(tt.origin.resets)
	wantFailing(1)
	for _, keys := range [][]string{{}, {"mirrors: [" + mirror.url + "]", "sealed: true"}} { // nobody asks the origin beside another any more
		tt.moveUpstream(tt.origin.url, keys...)
		wantFailing(0)
		if text := tt.get("/", browser).text; strings.Contains(text, "fails for") {
			t.Errorf("with %q the page says of an origin that it fails", keys)
		}
	}
	if lines := tt.logs.lines("an origin of a remote fails"); !strings.Contains(lines[0], tt.origin.url) || !strings.Contains(lines[1], "503") {
		t.Errorf("the lines name no origin or no cause: %q", lines)
	}
}

// A failure of ours is a warning with its cause, so that LOG_LEVEL=warn shows it. An
// outage was announced when it began: what requests notice of it is no news.
func TestServerErrorsAreWarnings(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "").acts(answers(500))
	tt.get("/api/r/a").wantStatus(502).wantHeader("X-Request-Id", tt.wantLine(0).RequestID)
	if v := tt.wantLine(0); v.Level != "WARN" || !strings.Contains(v.Error, "500") {
		t.Errorf("an upstream's 500 is %+v", v)
	}
	tt.origin.file("/a", "").acts(answers(403))
	tt.get("/api/r/a").wantStatus(403)
	if v := tt.wantLine(1); v.Msg != "Cache MISS" {
		t.Errorf("an upstream's 403 is %+v", v)
	}
	tt.down()
	tt.get("/api/r/b").wantStatus(502)
	if v := tt.wantLine(2); v.Level != "INFO" || v.Error == "" {
		t.Errorf("a failure in an outage that was announced is %+v", v)
	}
}

func TestHealthChecksAreQuietInTheLog(t *testing.T) {
	t.Parallel()
	tt := setup{env: map[string]string{"LOG_LEVEL": "info"}}.start(t)
	tt.get("/health").wantStatus(200)
	tt.get("/metrics").wantStatus(200)
	tt.server.draining.Store(true) // which is announced when it begins
	tt.get("/health").wantStatus(503)
	tt.get("/")
	if v := tt.wantLine(0); v.Path != "/" {
		t.Errorf("a probe is logged: %+v", v)
	}
}

func TestClientThatLeavesIs499InTheLog(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "").acts(tt.origin.stalls)
	ctx, leave := context.WithCancel(context.Background())
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		tt.start(ctx, "GET", "/api/r/a", nil).leave()
	}()
	tt.origin.awaitRequests("/a", 1)
	leave()
	<-gone
	if v := tt.wantLine(0); v.Status != 499 {
		t.Errorf("a client that left before its answer is %+v", v)
	}
	text := noise(1, 32<<20)
	tt.origin.file("/b", text)
	s := tt.open("/api/r/b")
	s.read(1000)
	s.leave()
	if v := tt.wantLine(1); v.Status != 499 || v.Bytes == 0 || v.Bytes == int64(len(text)) {
		t.Errorf("a client that left in the middle is %+v", v)
	}
}

func TestAbortedAnswersAreLoggedOnce(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", noise(1, 1<<20)).noRanges().cut(500_000)
	tt.get("/api/r/a").wantAborted()
	v := tt.wantLine(0)
	if v.Error == "" || v.Bytes > 500_000 || v.Msg != "Cache MISS" {
		t.Errorf("logged as %+v", v)
	}
	if n := len(tt.logs.requestLines(t)); n != 1 {
		t.Errorf("%d lines", n)
	}
}

func TestPanicsAreAnswered(t *testing.T) {
	t.Parallel()
	logs := &testLogs{}
	s := &responder{now: time.Now, log: slog.New(slog.NewJSONHandler(logs, nil)), count: newMetrics().countRequest}
	w := httptest.NewRecorder()
	s.serveRequest(w, httptest.NewRequest("GET", "/x", nil), func(*response, *http.Request) error { panic("oh") }, writeJSONError)
	if w.Code != 500 || !strings.Contains(w.Body.String(), "internal error") || strings.Contains(w.Body.String(), "oh") {
		t.Errorf("answered %d %s", w.Code, w.Body)
	}
	if !strings.Contains(logs.String(), "TestPanicsAreAnswered") {
		t.Error("the log has no stack")
	}
	defer func() {
		if p := recover(); p != any(http.ErrAbortHandler) {
			t.Errorf("an answer that has begun ended with %v, want net/http's abort", p)
		}
	}()
	s.serveRequest(httptest.NewRecorder(), httptest.NewRequest("GET", "/x", nil), func(w *response, _ *http.Request) error {
		_, _ = w.Write([]byte("begun"))
		panic("oh")
	}, writeJSONError)
}

// The answer to an error has none of the headers that a handler set for the file.
func TestErrorAnswersStartAfresh(t *testing.T) {
	t.Parallel()
	s := &responder{now: time.Now, log: slog.New(slog.DiscardHandler), count: newMetrics().countRequest}
	w := httptest.NewRecorder()
	s.serveRequest(w, httptest.NewRequest("GET", "/x", nil), func(w *response, _ *http.Request) error {
		w.Header().Set("Content-Length", "1000")
		w.Header().Set("ETag", `"x"`)
		return &problem{status: 503, detail: "busy", retryAfter: 1500 * time.Millisecond}
	}, writeJSONError)
	if h := w.Header(); h.Get("Content-Length") != strconv.Itoa(w.Body.Len()) || h.Get("ETag") != "" || h.Get("Retry-After") != "2" || h.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("headers %v", h)
	}
}

// A client that takes no byte for clientTimeout is dropped. It would hold its
// connection forever.
func TestClientThatTakesNothingIsDropped(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		text := noise(1, 300_000)
		tt.origin.file("/a", text)
		tt.get("/api/r/a").wantBody(text)
		s := tt.open("/api/r/a")
		defer s.leave()
		s.read(1)
		tt.advance(clientTimeout - time.Second)
		s.read(100_000)
		tt.advance(clientTimeout + time.Second)
		s.rest().wantAborted()
		if v := tt.wantLine(1); v.Status != 499 {
			t.Errorf("logged as %+v", v)
		}
	})
}

func TestRequestsAreCounted(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "body")
	tt.get("/api/r/a")
	tt.get("/api/r/a")
	tt.get("/api/r/a")
	tt.get("/api/r/none")
	tt.wantLine(3)
	series := readExposition(t, tt.get("/metrics").wantStatus(200).text)
	sum := func(parts ...string) (n float64) {
	next:
		for name, v := range series {
			for _, p := range parts {
				if !strings.Contains(name, p) {
					continue next
				}
			}
			n += v
		}
		return n
	}
	for _, c := range []struct {
		parts []string
		want  float64
	}{
		{[]string{"requests_total", `remote="r"`, `result="hit"`}, 2},
		{[]string{"requests_total", `remote="r"`, `result="miss"`}, 2},
		{[]string{"requests_total", `remote="r"`, "4xx"}, 1},
		{[]string{"stored", "bytes", `remote="r"`}, 4},
	} {
		if got := sum(c.parts...); got != c.want {
			t.Errorf("series with %q add up to %v, want %v", c.parts, got, c.want)
		}
	}
}

// The deadline also holds for what net/http has in its buffer when the handler
// returns.
func TestClientThatTakesNoShortAnswerIsDropped(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		for _, request := range []string{
			"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
			"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
			"PUT /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n",
		} {
			conn, err := tt.client.DialContext(t.Context(), "tcp", "front:80")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, request); err != nil {
				t.Fatal(err)
			}
			tt.advance(clientTimeout + time.Second)
			if b, err := io.ReadAll(conn); len(b) > 0 {
				t.Errorf("after all that time there was still someone who wrote: %q, %v", b, err)
			}
			conn.Close()
		}
	})
}

// net/http reads the rest of a request's body before it answers, to keep the
// connection. A refusal must come even if the body never does.
func TestBodyThatNeverComesIsNotAwaited(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		for request, status := range map[string]int{"GET /api/r/none": 404, "DELETE /artifacts/r/a": 403, "PUT /api/r/a": 405} {
			for _, length := range []string{"Content-Length: 10", "Transfer-Encoding: chunked"} {
				conn, err := tt.client.DialContext(t.Context(), "tcp", "front:80")
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				go io.WriteString(conn, request+" HTTP/1.1\r\nHost: x\r\n"+length+"\r\n\r\n")
				method, _, _ := strings.Cut(request, " ")
				in := bufio.NewReader(conn)
				res, err := http.ReadResponse(in, &http.Request{Method: method})
				if err != nil {
					t.Fatalf("%s, %s: %v", request, length, err)
				}
				_, err = io.ReadAll(res.Body)
				if d := time.Since(began); d > 0 || err != nil || res.StatusCode != status || !res.Close {
					t.Errorf("%s, %s: %d after %v, closes %v, %v", request, length, res.StatusCode, d, res.Close, err)
				}
				if _, err := in.ReadByte(); err != io.EOF {
					t.Errorf("%s, %s: the connection ended with %v after %v", request, length, err, time.Since(began))
				}
				conn.Close()
			}
		}
	})
}

// writtenLines counts the writes that reach a log's reader.
type writtenLines struct {
	mu     sync.Mutex
	writes []string
}

func (w *writtenLines) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writes = append(w.writes, string(p))
	return len(p), nil
}

func (w *writtenLines) want(t *testing.T, want ...string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Equal(w.writes, want) {
		t.Errorf("%q was written, want %q", w.writes, want)
	}
	w.writes = nil
}

func TestLogLinesAreWrittenTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out writtenLines
		lines := &lineWriter{to: &out}
		plain := slog.NewTextHandler(lines, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.MessageKey {
				return a
			}
			return slog.Attr{}
		}})
		log := slog.New(lineHandler{plain, lines, false})
		log.Info("a")
		log.Info("b")
		time.Sleep(maxLineDelay - 1)
		synctest.Wait()
		out.want(t)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		out.want(t, "msg=a\nmsg=b\n")
		log.Info("c")
		log.With("x", 1).Warn("d") // a warning waits for nothing, and comes behind what was before it
		out.want(t, "msg=c\nmsg=d\n")
		log.Info("e")
		lines.flush() // the end of the server
		out.want(t, "msg=e\n")
		time.Sleep(2 * maxLineDelay)
		synctest.Wait()
		out.want(t)
		long := strings.Repeat("f", maxHeldLines)
		log.Info(long)
		out.want(t, "msg="+long+"\n")
	})
}

// TestRequestLinesAreThoseOfSlog: the line of a request is made by hand, and nobody who
// reads the log can tell.
func TestRequestLinesAreThoseOfSlog(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 2, 3, 4, 5, 6, 789000000, time.FixedZone("", 3600))
	for name, attrs := range map[string][]slog.Attr{
		"none":     nil,
		"ordinary": {slog.String("path", "a/b c+~"), slog.Int("status", 200), slog.Int64("bytes", -1), slog.Float64("duration_ms", 0.25)},
		"odd":      {slog.String("quotes", `"\`), slog.String("controls", "\x00\n\t\x7f"), slog.String("umlaut", "ü\u2028"), slog.String("broken", "a\xffb"), slog.String("", "")},
		"numbers":  {slog.Float64("duration_ms", 1e9), slog.Float64("zero", 0), slog.Int64("much", math.MaxInt64)},
	} {
		var plain, gathered bytes.Buffer
		rec := slog.NewRecord(at, slog.LevelInfo, "Cache HIT", 0)
		rec.AddAttrs(attrs...)
		if err := slog.NewJSONHandler(&plain, nil).Handle(t.Context(), rec); err != nil {
			t.Fatal(err)
		}
		h := lineHandler{slog.NewJSONHandler(io.Discard, nil), &lineWriter{to: &gathered}, true}
		h.writeJSON(at, slog.LevelInfo, "Cache HIT", attrs)
		h.lines.flush()
		var want, got map[string]any
		if err := errors.Join(json.Unmarshal(plain.Bytes(), &want), json.Unmarshal(gathered.Bytes(), &got)); err != nil {
			t.Fatal(name, err)
		}
		if !maps.Equal(want, got) || (name != "odd" && !bytes.Equal(plain.Bytes(), gathered.Bytes())) || !bytes.HasSuffix(gathered.Bytes(), []byte("}\n")) {
			t.Errorf("%s: %s instead of %s", name, &gathered, &plain)
		}
	}
}

// A reader of the log that stops reading stops those who log: nothing is lost, and
// what waits is bounded.
func TestLogWaitsForItsReader(t *testing.T) {
	t.Parallel()
	in, out := io.Pipe()
	lines := &lineWriter{to: out}
	const loggers, each = 8, 1000
	line := strings.Repeat("x", 99)
	var done sync.WaitGroup
	for n := range loggers {
		done.Go(func() {
			for i := range each {
				_, _ = fmt.Fprintf(lines, "%d %4d %s\n", n, i, line)
			}
		})
	}
	var next [loggers]int
	read := make(chan struct{})
	go func() {
		defer close(read)
		for s := bufio.NewScanner(in); s.Scan(); {
			var n, i int
			if _, err := fmt.Sscanf(s.Text(), "%d %d "+line, &n, &i); err != nil || next[n] != i {
				t.Errorf("%q came where line %v of its logger was expected: %v", s.Text(), next, err)
				return
			}
			next[n]++
			lines.mu.Lock()
			if held := len(lines.held); held > maxHeldLines+loggers*(len(line)+9) {
				t.Errorf("%d bytes wait", held)
			}
			lines.mu.Unlock()
		}
	}()
	done.Wait()
	lines.flush()
	out.Close()
	<-read
	for n, got := range next {
		if got != each {
			t.Errorf("logger %d: %d of %d lines were read", n, got, each)
		}
	}
}
