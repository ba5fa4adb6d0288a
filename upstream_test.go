package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// upstreamTester tests an upstream with one remote.
type upstreamTester struct {
	*testing.T
	u   *upstream
	r   *remote
	log *bytes.Buffer
}

// newUpstreamTester makes a tester whose remote has that base_url and those mirrors,
// over real sockets. A mirror written "auth URL" has auth.
func newUpstreamTester(t *testing.T, origins ...string) *upstreamTester {
	t.Helper()
	return newUpstreamTesterOver(t, nil, origins...)
}

// newUpstreamTesterOver is newUpstreamTester over a fake transport.
func newUpstreamTesterOver(t *testing.T, rt roundTrip, origins ...string) *upstreamTester {
	t.Helper()
	a := &upstreamTester{T: t, log: new(bytes.Buffer), r: &remote{name: "r", packageType: "generic", timeout: 5 * time.Second}}
	a.u = newUpstream(func(reach addressKind) http.RoundTripper {
		if rt != nil {
			return rt
		}
		return newTransport(reach)
	}, time.Now, slog.New(slog.NewTextHandler(a.log, nil)), newMetrics())
	a.u.proxyFor = func(*http.Request) (*url.URL, error) { return nil, nil }
	a.u.version = "test"
	for i, s := range origins {
		s, auth := strings.CutPrefix(s, "auth ")
		a.r.origins = append(a.r.origins, origin{url: mustURL(t, s), auth: auth || i == 0})
	}
	a.r.config = &config{remotes: map[string]*remote{"r": a.r}}
	t.Cleanup(a.u.Close)
	return a
}

// isPublic is an upstream's kindOf in a world without private networks.
func isPublic(netip.Addr) addressKind { return publicAddress }

func mustURL(t testing.TB, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// get sends a GET for wire and reads the whole answer.
func (a *upstreamTester) get(wire string) *upstreamResult {
	return a.send(upstreamRequest{remote: a.r, method: "GET", wire: wire})
}

func (a *upstreamTester) send(req upstreamRequest) *upstreamResult {
	return a.sendUnder(context.Background(), req)
}

func (a *upstreamTester) sendUnder(ctx context.Context, req upstreamRequest) *upstreamResult {
	a.Helper()
	req.remote = a.r
	if req.method == "" {
		req.method = "GET"
	}
	resp, err := a.u.send(ctx, req)
	if err != nil {
		if resp != nil {
			a.Error("an answer beside an error")
		}
		return &upstreamResult{T: a.T, err: err}
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return &upstreamResult{T: a.T, upstreamResponse: resp, text: string(text), bodyErr: err}
}

// upstreamResult is the outcome of a request.
type upstreamResult struct {
	*testing.T
	*upstreamResponse
	text    string
	bodyErr error
	err     error
}

func (r *upstreamResult) want(status int, text string) *upstreamResult {
	r.Helper()
	switch {
	case r.err != nil:
		r.Fatalf("got error %v; want status %d", r.err, status)
	case r.bodyErr != nil:
		r.Fatalf("reading the body: %v", r.bodyErr)
	case r.StatusCode != status || r.text != text:
		r.Fatalf("got %d %q; want %d %q", r.StatusCode, r.text, status, text)
	}
	return r
}

func (r *upstreamResult) wantErr(kind error, texts ...string) {
	r.Helper()
	if !errors.Is(r.err, kind) {
		r.Fatalf("got error %v; want %v", r.err, kind)
	}
	for _, s := range texts {
		if !strings.Contains(r.err.Error(), s) {
			r.Errorf("error %q lacks %q", r.err, s)
		}
	}
	if strings.Contains(r.err.Error(), "SECRET") {
		r.Errorf("error %q shows a secret", r.err)
	}
}

// site is a real server that records its requests.
type site struct {
	*httptest.Server
	mu   sync.Mutex // guards seen
	seen []*http.Request
}

func newSite(t *testing.T, h http.HandlerFunc) *site {
	t.Helper()
	s := new(site)
	s.Server = httptest.NewServer(s.record(h))
	t.Cleanup(s.Close)
	return s
}

func (s *site) record(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.seen = append(s.seen, r)
		s.mu.Unlock()
		h(w, r)
	}
}

func (s *site) requests() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.seen)
}

// says answers every request with one status and text.
func says(status int, text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		io.WriteString(w, text)
	}
}

// sends answers every request with a redirect.
func sends(status int, to string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", to)
		w.WriteHeader(status)
	}
}

// closedPort returns the URL of a port on which no program listens.
func closedPort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "http://" + l.Addr().String()
}

func TestRequestsGoUpstreamAsOurs(t *testing.T) {
	t.Parallel()
	s := newSite(t, says(200, "x"))
	a := newUpstreamTester(t, s.URL+"/base/p%2Fq")
	a.send(upstreamRequest{wire: "f?q=1", header: http.Header{"Range": {"bytes=5-"}}}).want(200, "x")
	h := s.requests()[0].Header
	for name, want := range map[string]string{
		"User-Agent": "artifactapi/test", "Accept-Encoding": "identity", "Range": "bytes=5-", "Via": a.u.via,
	} {
		if got := h.Get(name); got != want {
			t.Errorf("%s: %q; want %q", name, got, want)
		}
	}
	if len(h) != 4 {
		t.Errorf("more headers than ours went out: %v", h)
	}
}

func TestAskKeepsWireBytes(t *testing.T) {
	t.Parallel()
	s := newSite(t, says(200, ""))
	for base, path := range map[string]string{"": "", "/b%2Fc": "/b%2Fc"} {
		a := newUpstreamTester(t, s.URL+base)
		for _, wire := range []string{
			"a%2Fb", "a/b", "a%3Fb", "a?b", "a?", "a%2Bb%20c~.-_", "dir/", "", "x?a=b&c=%2f+%zz",
			"library/nginx/manifests/latest", "blobs/sha256:abcd", "u/%C3%A9",
		} {
			a.get(wire).want(200, "")
			seen := s.requests()
			if got, want := seen[len(seen)-1].RequestURI, path+"/"+wire; got != want {
				t.Errorf("%q went out as %q", want, got)
			}
		}
	}
}

func TestMirrorsAnswerForABrokenBase(t *testing.T) {
	t.Parallel()
	good := newSite(t, says(200, "good"))
	for name, base := range map[string]string{
		"unreachable": closedPort(t),
		"500":         newSite(t, says(500, "")).URL,
		"503":         newSite(t, says(503, "")).URL,
	} {
		lacking := newSite(t, says(404, "none"))
		a := newUpstreamTester(t, base, lacking.URL, good.URL)
		if r := a.get("f").want(200, "good"); r.origin != 2 {
			t.Errorf("%s: origin %d answered; want 2", name, r.origin)
		}
		if n := len(lacking.requests()); n != 1 {
			t.Errorf("%s: first mirror was asked %d times; want 1", name, n)
		}
	}
}

func TestBasesOwn4xxIsTheAnswer(t *testing.T) {
	t.Parallel()
	mirror := newSite(t, says(200, "mirror"))
	a := newUpstreamTester(t, newSite(t, says(404, "none")).URL, mirror.URL)
	a.get("f").want(404, "none")
	if len(mirror.requests()) != 0 {
		t.Error("the mirror was asked though base_url had answered")
	}
}

func TestMirrors4xxNeverCounts(t *testing.T) {
	t.Parallel()
	mirror := newSite(t, says(404, "mirror lacks it")).URL
	a := newUpstreamTester(t, newSite(t, says(500, "base")).URL, mirror)
	a.get("f").want(500, "base")
	b := newUpstreamTester(t, closedPort(t), mirror)
	b.send(upstreamRequest{wire: "f", hasCopy: true}).wantErr(errUnreachable, `remote "r"`, "127.0.0.1", "refused")
}

func TestResumeAsksTheNamedOriginFirst(t *testing.T) {
	t.Parallel()
	base, m1, m2 := newSite(t, says(200, "base")), newSite(t, says(200, "m1")), newSite(t, says(404, ""))
	a := newUpstreamTester(t, base.URL, m1.URL, m2.URL)
	a.send(upstreamRequest{wire: "f", first: 1}).want(200, "m1")
	a.send(upstreamRequest{wire: "f", first: 2}).want(200, "base")
	a.send(upstreamRequest{wire: "f", first: 9}).want(200, "base")
	if len(m2.requests()) != 1 {
		t.Error("the second mirror was not asked first")
	}
}

// script answers requests by do, with their number, and records them.
type script struct {
	mu    sync.Mutex // guards the fields below, except do
	lines []string
	at    []time.Time
	reqs  []*http.Request
	do    func(n int, r *http.Request) (*http.Response, error)
}

func (s *script) rt(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	n := len(s.lines)
	s.lines = append(s.lines, r.URL.Host+r.URL.Path)
	s.at = append(s.at, time.Now())
	s.reqs = append(s.reqs, r)
	s.mu.Unlock()
	return s.do(n, r)
}

// fake makes a response; headers are "Name: value".
func fake(status int, text string, headers ...string) *http.Response {
	h := http.Header{}
	for _, s := range headers {
		name, value, _ := strings.Cut(s, ": ")
		h.Add(name, value)
	}
	return &http.Response{StatusCode: status, Header: h, ContentLength: int64(len(text)), Body: io.NopCloser(strings.NewReader(text))}
}

// hang answers nothing until the request ends.
func hang(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, context.Cause(r.Context())
}

var errDial = &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}

func TestRetries(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		q       upstreamRequest
		do      func(n int, r *http.Request) (*http.Response, error)
		want    string // the hosts that are asked
		status  int
		err     error
		elapsed time.Duration
		base    []string
	}{
		"503 until it works": {
			do: func(n int, _ *http.Request) (*http.Response, error) {
				return fake([]int{503, 502, 200}[n], ""), nil
			},
			want: "b b b", status: 200, elapsed: time.Second,
		},
		"504 for ever": {
			do:   func(int, *http.Request) (*http.Response, error) { return fake(504, ""), nil },
			want: "b b b", status: 504, elapsed: time.Second,
		},
		"refused for ever": {
			do:   func(int, *http.Request) (*http.Response, error) { return nil, errDial },
			want: "b b b", err: errUnreachable, elapsed: time.Second,
		},
		"refused, then 503": {
			do: func(n int, _ *http.Request) (*http.Response, error) {
				if n < 2 {
					return nil, errDial
				}
				return fake(503, ""), nil
			},
			want: "b b b", status: 503, elapsed: time.Second,
		},
		"503, then refused": {
			do: func(n int, _ *http.Request) (*http.Response, error) {
				if n < 2 {
					return fake(503, ""), nil
				}
				return nil, errDial
			},
			want: "b b b", err: errUnreachable, elapsed: time.Second,
		},
		"500 is no passing failure": {
			do:   func(int, *http.Request) (*http.Response, error) { return fake(500, ""), nil },
			want: "b", status: 500,
		},
		"404 is an answer": {
			do:   func(int, *http.Request) (*http.Response, error) { return fake(404, ""), nil },
			want: "b", status: 404,
		},
		"never for HEAD": {
			q:    upstreamRequest{method: "HEAD"},
			do:   func(int, *http.Request) (*http.Response, error) { return fake(503, ""), nil },
			want: "b", status: 503,
		},
		"never with a copy": {
			q:    upstreamRequest{hasCopy: true},
			do:   func(int, *http.Request) (*http.Response, error) { return nil, errDial },
			want: "b", err: errUnreachable,
		},
		"never after a timeout": {
			do:   func(_ int, r *http.Request) (*http.Response, error) { return hang(r) },
			want: "b", err: errTimeout, elapsed: 5 * time.Second,
		},
		"never after a mirror's timeout": {
			do: func(_ int, r *http.Request) (*http.Response, error) {
				if r.URL.Host == "m" {
					return hang(r)
				}
				return nil, errDial
			},
			want: "b m", err: errUnreachable, elapsed: 5 * time.Second, base: []string{"http://m"},
		},
		"all mirrors before any retry": {
			do: func(n int, _ *http.Request) (*http.Response, error) {
				if n == 4 {
					return fake(200, ""), nil
				}
				return nil, errDial
			},
			want: "b m n b m", status: 200, elapsed: 200 * time.Millisecond, base: []string{"http://m", "http://n"},
		},
		"a mirror's 4xx between": {
			do: func(n int, r *http.Request) (*http.Response, error) {
				if r.URL.Host == "m" {
					return fake(403, ""), nil
				}
				return nil, errDial
			},
			want: "b m m b m b", err: errUnreachable, elapsed: time.Second, base: []string{"http://m"},
		},
		"a mirror after base_url's timeout": {
			do: func(_ int, r *http.Request) (*http.Response, error) {
				if r.URL.Host == "m" {
					return fake(200, ""), nil
				}
				return hang(r)
			},
			want: "b m", status: 200, elapsed: 5 * time.Second, base: []string{"http://m"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &script{do: c.do}
				a := newUpstreamTesterOver(t, s.rt, append([]string{"http://b"}, c.base...)...)
				began := time.Now()
				r := a.send(c.q)
				if c.err != nil {
					r.wantErr(c.err)
				} else {
					r.want(c.status, "")
				}
				if d := time.Since(began); d != c.elapsed {
					t.Errorf("took %v; want %v", d, c.elapsed)
				}
				if got := strings.ReplaceAll(strings.Join(s.lines, " "), "/", ""); got != c.want {
					t.Errorf("asked %s; want %s", got, c.want)
				}
			})
		})
	}
}

// TestSilentAddressLeavesTimeForTheNext: the name of base_url has several addresses, and
// the first is silent. The dialer is net.Dialer in what it does with a deadline.
func TestSilentAddressLeavesTimeForTheNext(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		timeout, elapsed time.Duration
		hasCopy, down    bool
	}{
		"a fill":                   {timeout: 30 * time.Second, elapsed: 15500 * time.Millisecond},
		"with a copy":              {timeout: 30 * time.Second, elapsed: 5500 * time.Millisecond, hasCopy: true},
		"with a copy, impatiently": {timeout: 4 * time.Second, elapsed: 2500 * time.Millisecond, hasCopy: true},
		"while the remote is down": {timeout: 30 * time.Second, elapsed: 2 * time.Second, down: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				silent := 1 // of two addresses
				rt := &http.Transport{DisableKeepAlives: true, DialContext: dialWithin(func(ctx context.Context, _, _ string) (net.Conn, error) {
					for left := 2; left > 0; left-- {
						ctx, cancel := ctx, context.CancelFunc(func() {})
						if deadline, ok := ctx.Deadline(); ok {
							ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(left))
						}
						if left <= 2-silent {
							cancel()
							return answering("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"), nil
						}
						<-ctx.Done()
						cancel()
					}
					return nil, ctx.Err()
				})}
				a := newUpstreamTesterOver(t, rt.RoundTrip, "http://b")
				a.r.timeout = c.timeout
				if c.down {
					a.u.circuitOf("r").fail(errDial, time.Now())
				}
				began := time.Now()
				a.send(upstreamRequest{hasCopy: c.hasCopy}).want(200, "x")
				if d := time.Since(began); d != c.elapsed {
					t.Errorf("took %v; want %v", d, c.elapsed)
				}

				// Where all are silent it is a timeout, and the dial ends too.
				silent = 2
				a.send(upstreamRequest{hasCopy: c.hasCopy}).wantErr(errTimeout)
				time.Sleep(2 * time.Second)
			})
		})
	}
}

// answering is a connection to a server that sends text for the first request.
func answering(text string) net.Conn {
	here, there := net.Pipe()
	go func() {
		defer there.Close()
		if _, err := http.ReadRequest(bufio.NewReader(there)); err == nil {
			io.WriteString(there, text)
		}
	}()
	return here
}

func TestPauseEndsWithTheQuestion(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{do: func(int, *http.Request) (*http.Response, error) { return nil, errDial }}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		newUpstreamTesterOver(t, s.rt, "http://b").sendUnder(ctx, upstreamRequest{}).wantErr(context.DeadlineExceeded)
		if len(s.lines) != 1 {
			t.Errorf("asked %d times; want 1", len(s.lines))
		}
	})
}

// TestTimeoutIsPerHop: each of two requests along a redirect takes 4 s of 5. That is
// fine for a fill, and too much together if a copy can be served.
func TestTimeoutIsPerHop(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{do: func(n int, r *http.Request) (*http.Response, error) {
			select {
			case <-time.After(4 * time.Second):
			case <-r.Context().Done():
				return nil, context.Cause(r.Context())
			}
			if r.URL.Path == "/f" {
				return fake(302, "", "Location: /g"), nil
			}
			return fake(200, "x"), nil
		}}
		a := newUpstreamTesterOver(t, s.rt, "http://b")
		a.get("f").want(200, "x")
		began := time.Now()
		a.send(upstreamRequest{wire: "f", hasCopy: true}).wantErr(errTimeout, `remote "r"`)
		if d := time.Since(began); d != 5*time.Second {
			t.Errorf("gave up after %v; want 5s", d)
		}
		a.r.timeout = time.Minute
		a.send(upstreamRequest{wire: "f", hasCopy: true}).want(200, "x")
	})
}

// TestAnswerOfTheLastMoment: the transport returns an answer just after the timeout
// ended the request.
func TestAnswerOfTheLastMoment(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{do: func(int, *http.Request) (*http.Response, error) {
			time.Sleep(6 * time.Second)
			return fake(200, "x"), nil
		}}
		newUpstreamTesterOver(t, s.rt, "http://b").get("f").wantErr(errTimeout)
	})
}

func TestUnwritablePathIsRefused(t *testing.T) {
	t.Parallel()
	newUpstreamTester(t, "http://b").get("a%zz").wantErr(errBadRequest)
}

func TestTransportSpeaksHTTP2(t *testing.T) {
	t.Parallel()
	plain := newSite(t, says(200, "x"))
	s := httptest.NewUnstartedServer(sends(302, plain.URL+"/f?SECRET"))
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	a := newUpstreamTester(t, s.URL)
	a.u.transports[anyAddress].(*http.Transport).TLSClientConfig.RootCAs = s.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	a.get("f").wantErr(errBadUpstream, "https to http")
	if len(plain.requests()) != 0 {
		t.Error("it went from https to http")
	}
	s.Config.Handler = says(200, "x")
	if r := a.get("f").want(200, "x"); r.ProtoMajor != 2 {
		t.Errorf("spoke %s", r.Proto)
	}
}

func TestWithACopyTenSecondsAreEnough(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{do: func(_ int, r *http.Request) (*http.Response, error) { return hang(r) }}
		a := newUpstreamTesterOver(t, s.rt, "http://b")
		for timeout, want := range map[time.Duration][2]time.Duration{
			time.Minute:     {10 * time.Second, time.Minute},
			3 * time.Second: {3 * time.Second, 3 * time.Second},
		} {
			a.r.timeout = timeout
			for i, hasCopy := range []bool{true, false} {
				time.Sleep(outagePause)
				began := time.Now()
				a.send(upstreamRequest{hasCopy: hasCopy}).wantErr(errTimeout)
				if d := time.Since(began); d != want[i] {
					t.Errorf("timeout %v, copy %v: gave up after %v; want %v", timeout, hasCopy, d, want[i])
				}
			}
		}
	})
}

// dripping is a body that sends one byte after each of its pauses.
type dripping struct {
	ctx    context.Context
	pauses []time.Duration
}

func (d *dripping) Read(p []byte) (int, error) {
	if len(d.pauses) == 0 {
		return 0, io.EOF
	}
	select {
	case <-time.After(d.pauses[0]):
	case <-d.ctx.Done():
		return 0, context.Cause(d.ctx)
	}
	d.pauses = d.pauses[1:]
	p[0] = '.'
	return 1, nil
}

func (d *dripping) Close() error { return nil }

func drip(pauses ...time.Duration) func(int, *http.Request) (*http.Response, error) {
	return func(_ int, r *http.Request) (*http.Response, error) {
		resp := fake(200, "")
		resp.ContentLength, resp.Body = -1, &dripping{r.Context(), pauses}
		return resp, nil
	}
}

func TestBodyMayBeSlowButNotSilent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{do: drip(59*time.Second, 59*time.Second, 59*time.Second)}
		newUpstreamTesterOver(t, s.rt, "http://b").send(upstreamRequest{hasCopy: true}).want(200, "...")

		s = &script{do: drip(59*time.Second, 61*time.Second)}
		r := newUpstreamTesterOver(t, s.rt, "http://b").get("f")
		if !errors.Is(r.bodyErr, errTimeout) || r.text != "." {
			t.Errorf("got %q, %v; want one byte and errTimeout", r.text, r.bodyErr)
		}
	})
}

func TestSlowReaderIsNoSilentUpstream(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{do: drip(time.Second, time.Second)}
		a := newUpstreamTesterOver(t, s.rt, "http://b")
		resp, err := a.u.send(t.Context(), upstreamRequest{remote: a.r, method: "GET"})
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		for _, want := range []error{nil, nil, io.EOF} {
			time.Sleep(time.Hour)
			if _, err := resp.Body.Read(make([]byte, 10)); err != want {
				t.Fatalf("read: %v; want %v", err, want)
			}
		}
	})
}

// foreign is a context that package context must watch with a goroutine. A synctest
// bubble then fails the test if a context that was derived from it is not cancelled.
type foreign struct {
	context.Context
	done chan struct{}
}

func (f foreign) Done() <-chan struct{} { return f.done }

func TestCloseReleasesTheRequest(t *testing.T) {
	t.Parallel()
	for _, hasCopy := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := &script{do: func(n int, _ *http.Request) (*http.Response, error) {
				return []*http.Response{fake(302, "", "Location: /g"), fake(200, "x")}[n], nil
			}}
			a := newUpstreamTesterOver(t, s.rt, "http://b")
			ctx := foreign{t.Context(), make(chan struct{})}
			resp, err := a.u.send(ctx, upstreamRequest{remote: a.r, method: "GET", hasCopy: hasCopy})
			if err != nil {
				t.Fatal(err)
			}
			if s.reqs[0].Context().Err() == nil {
				t.Error("the redirect's request was not released")
			}
			if s.reqs[1].Context().Err() != nil {
				t.Error("the body's request ended before Close")
			}
			resp.Body.Close()
			if s.reqs[1].Context().Err() == nil {
				t.Error("Close did not release the request")
			}
		})
	}
}

func TestDiscardedAnswersAreReleased(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{do: func(n int, _ *http.Request) (*http.Response, error) {
			return fake([]int{503, 404, 503, 404, 500, 200}[n], "text"), nil
		}}
		a := newUpstreamTesterOver(t, s.rt, "http://b", "http://m")
		resp, err := a.u.send(t.Context(), upstreamRequest{remote: a.r, method: "GET"})
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		for i, r := range s.reqs {
			if ended := r.Context().Err() != nil; ended != (i < 5) {
				t.Errorf("request %d released: %v", i, ended)
			}
		}
	})
}

func TestClientsEndIsItsOwnError(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{do: func(_ int, r *http.Request) (*http.Response, error) { return hang(r) }}
		a := newUpstreamTesterOver(t, s.rt, "http://b", "http://m")
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		a.sendUnder(ctx, upstreamRequest{}).wantErr(context.Canceled)
		if len(s.lines) != 1 {
			t.Error("the mirror was asked for a client that had left")
		}
		if _, err := a.u.tryOrigin(ctx, upstreamRequest{remote: a.r}, 0); err != context.Canceled {
			t.Errorf("one attempt: %v; want context.Canceled", err)
		}

		s.do = func(_ int, r *http.Request) (*http.Response, error) {
			if r.URL.Host == "m" {
				return hang(r)
			}
			return nil, errDial
		}
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		a.sendUnder(ctx, upstreamRequest{hasCopy: true}).wantErr(context.Canceled)

		s.do = drip(time.Second, time.Hour)
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(2*time.Second, cancel)
		if r := a.sendUnder(ctx, upstreamRequest{}); !errors.Is(r.bodyErr, context.Canceled) {
			t.Errorf("body: %v; want context.Canceled", r.bodyErr)
		}
	})
}

func TestRedirectsAreFollowed(t *testing.T) {
	t.Parallel()
	header := http.Header{"Range": {"bytes=1-"}, "If-Range": {`"e"`}, "If-None-Match": {`"e"`}, "Accept": {"a/b"}}
	for _, status := range []int{301, 302, 303, 307, 308} {
		for _, method := range []string{"GET", "HEAD"} {
			s := &script{do: func(n int, _ *http.Request) (*http.Response, error) {
				return []*http.Response{fake(status, "moved", "Location: ../x%2Fy?sig=a%2Fb c#frag"), fake(206, "")}[n], nil
			}}
			a := newUpstreamTesterOver(t, s.rt, "http://b/p")
			a.send(upstreamRequest{method: method, wire: "q/f", header: header}).want(206, "")
			to := s.reqs[1]
			if to.Method != method || to.URL.String() != "http://b/p/x%2Fy?sig=a%2Fb%20c" {
				t.Errorf("%d: went to %s %s", status, to.Method, to.URL)
			}
			for name, v := range header {
				if to.Header.Get(name) != v[0] {
					t.Errorf("%s was lost", name)
				}
			}
		}
	}
	for _, status := range []int{300, 304, 305} {
		s := &script{do: func(int, *http.Request) (*http.Response, error) { return fake(status, "", "Location: /y"), nil }}
		newUpstreamTesterOver(t, s.rt, "http://b").get("f").want(status, "")
	}
}

func TestRedirectsHaveAnEnd(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		length int
		err    error
	}{{10, nil}, {11, errBadUpstream}} {
		s := &script{do: func(n int, _ *http.Request) (*http.Response, error) {
			if n < c.length {
				return fake(302, "", fmt.Sprintf("Location: /%d?SECRET", n)), nil
			}
			return fake(200, ""), nil
		}}
		r := newUpstreamTesterOver(t, s.rt, "http://b").get("f")
		if c.err == nil {
			r.want(200, "")
		} else {
			r.wantErr(c.err, "redirect loop")
		}
	}
}

func TestBadRedirectsAreRefused(t *testing.T) {
	t.Parallel()
	for location, reason := range map[string]string{
		"http://b/f?SECRET":         "https to http",
		"http://other/f?SECRET":     "https to http",
		"ftp://b/f?SECRET":          "neither http nor https",
		"mailto:SECRET":             "neither http nor https",
		"https:///f?SECRET":         "without a host",
		"":                          "without Location",
		"https://b/%zz?SECRET":      "malformed",
		"https://SECRET:x@b:port/f": "malformed",
	} {
		s := &script{do: func(int, *http.Request) (*http.Response, error) {
			resp := fake(302, "")
			if location != "" {
				resp.Header.Set("Location", location)
			}
			return resp, nil
		}}
		a := newUpstreamTesterOver(t, s.rt, "https://b", "https://m")
		r := a.get("f")
		r.wantErr(errBadUpstream, reason)
		if statusOf(r.err) != 502 {
			t.Errorf("%s: status %d; want 502", location, statusOf(r.err))
		}
		if len(s.lines) != 1 {
			t.Errorf("%s: asked %v", location, s.lines)
		}
	}
}

func TestSecretsOfRedirectsNeverShow(t *testing.T) {
	t.Parallel()
	s := newSite(t, sends(302, closedPort(t)+"/f?X-Amz-Signature=SECRET"))
	a := newUpstreamTester(t, s.URL)
	a.get("f").wantErr(errUnreachable, "refused")
	if strings.Contains(a.log.String(), "SECRET") {
		t.Errorf("log: %s", a.log)
	}
}

// TestCredentialsStayHome: along each chain of redirects the hosts with a star get the
// credentials, and no others do.
func TestCredentialsStayHome(t *testing.T) {
	t.Parallel()
	for _, chain := range []string{
		"https://b.test/f*",
		"https://b.test/f* https://b.test:443/g*",
		"https://b.test/f* https://B.TEST/g*",
		"https://b.test/f* https://b.test:8443/g",
		"https://b.test/f* https://cdn.b.test/g https://b.test/h*",
		"https://b.test/f* https://evil.test/g",
		"https://b.test/f* https://user:pw@evil.test/g",
		"https://b.test/f* https://auth.test/g*",
		"https://b.test/f* https://plain.test/g https://auth.test:443/h*",
	} {
		hops := strings.Fields(chain)
		s := &script{do: func(n int, r *http.Request) (*http.Response, error) {
			want := strings.HasSuffix(hops[n], "*")
			user, pw, _ := r.BasicAuth()
			if got := user == "u" && pw == "p"; got != want || r.URL.User != nil || (r.Header.Get("X-Key") == "k") != want ||
				(!want && r.Header.Get("Authorization") != "") {
				t.Errorf("%s: hop %d had %v", chain, n, r.Header)
			}
			if n+1 < len(hops) {
				return fake(302, "", "Location: "+strings.TrimSuffix(hops[n+1], "*")), nil
			}
			return fake(200, ""), nil
		}}
		a := newUpstreamTesterOver(t, s.rt, "https://b.test", "https://plain.test", "auth https://auth.test")
		a.r.username, a.r.password, a.r.headers = "u", "p", http.Header{"X-Key": {"k"}}
		a.get("f").want(200, "")
		if len(s.lines) != len(hops) {
			t.Errorf("%s: went %v", chain, s.lines)
		}
	}
}

func TestMirrorsGetCredentialsOnlyWhenMarked(t *testing.T) {
	t.Parallel()
	s := &script{do: func(_ int, r *http.Request) (*http.Response, error) {
		_, _, got := r.BasicAuth()
		if want := r.URL.Host != "plain"; got != want || (r.Header.Get("X-Key") != "") != want {
			t.Errorf("%s had %v", r.URL.Host, r.Header)
		}
		return fake(500, ""), nil
	}}
	a := newUpstreamTesterOver(t, s.rt, "https://b", "https://plain", "auth https://auth")
	a.r.username, a.r.headers = "u", http.Header{"X-Key": {"k"}}
	a.get("f").want(500, "")
	if len(s.lines) != 3 {
		t.Errorf("asked %v", s.lines)
	}
}

func TestConfiguredHeadersCannotBreakAnswers(t *testing.T) {
	t.Parallel()
	s := newSite(t, says(200, ""))
	a := newUpstreamTester(t, s.URL)
	a.r.headers = http.Header{"Accept-Encoding": {"gzip"}, "User-Agent": {"mine"}, "Accept": {"x"}}
	a.send(upstreamRequest{wire: "f", header: http.Header{"Accept": {"y"}}}).want(200, "")
	r := s.requests()[0]
	if h := r.Header; h.Get("Accept-Encoding") != "identity" || h.Get("User-Agent") != "mine" || h.Get("Accept") != "y" {
		t.Errorf("went out: %v", h)
	}
	if len(a.r.headers) != 3 || a.r.headers.Get("Accept-Encoding") != "gzip" {
		t.Error("the remote was changed")
	}
}

func TestCodedBodyStaysCoded(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		io.WriteString(w, "\x1f\x8bnot really")
	})
	r := newUpstreamTester(t, s.URL).get("f").want(200, "\x1f\x8bnot really")
	if r.Header.Get("Content-Encoding") != "gzip" || r.Uncompressed {
		t.Error("the coding was taken off")
	}
}

// elsewhere returns the URL of s under another host name: localhost instead of
// 127.0.0.1.
func elsewhere(s *site) string { return strings.Replace(s.URL, "127.0.0.1", "localhost", 1) }

func TestRedirectMayNotLeadInside(t *testing.T) {
	t.Parallel()
	inside := newSite(t, says(200, "inside"))
	base := newSite(t, sends(302, elsewhere(inside)+"/f?SECRET"))
	a := newUpstreamTester(t, base.URL)
	a.get("f").want(200, "inside") // base_url has a private address itself
	byName := newSite(t, sends(302, inside.URL))
	newUpstreamTester(t, elsewhere(byName)).get("f").want(200, "inside") // its connection went to a private address

	a = newUpstreamTester(t, base.URL)
	a.u.kindOf = isPublic // so base_url is
	r := a.get("f")
	r.wantErr(errBadUpstream, "private address", "localhost")
	if statusOf(r.err) != 502 {
		t.Errorf("status %d; want 502", statusOf(r.err))
	}
	if n := len(inside.requests()); n != 2 {
		t.Errorf("the inside was asked %d times; want 2", n)
	}

	a.r.config.remotes["other"] = &remote{origins: []origin{{url: mustURL(t, elsewhere(inside))}}}
	a.get("f").want(200, "inside") // the administrator knows that server: the cure
}

// TestRedirectsStayWithinTheOriginsKind: from an origin of each kind a redirect leads to
// targets of the kinds that are listed, and no others.
func TestRedirectsStayWithinTheOriginsKind(t *testing.T) {
	t.Parallel()
	const kinds = "8.8.8.8 10.0.0.9 100.64.0.9 [fd00::9] 127.0.0.9 169.254.0.9 198.18.0.9 240.0.0.9"
	for base, want := range map[string]string{
		"8.8.4.4":     "8.8.8.8",
		"10.0.0.1":    "8.8.8.8 10.0.0.9 100.64.0.9 [fd00::9]",
		"100.64.0.1":  "8.8.8.8 10.0.0.9 100.64.0.9 [fd00::9]",
		"[fd00::1]":   "8.8.8.8 10.0.0.9 100.64.0.9 [fd00::9]",
		"127.0.0.1":   "8.8.8.8 127.0.0.9",
		"169.254.0.1": "8.8.8.8 169.254.0.9",
		"198.18.0.1":  "8.8.8.8 198.18.0.9 240.0.0.9",
	} {
		for _, named := range []bool{false, true} { // base_url has a name that leads there
			host := base
			if named {
				host = "base.test"
			}
			a := newUpstreamTester(t, "http://"+host)
			for i := range a.u.transports {
				reach := addressKind(i)
				a.u.transports[i] = transportFunc(func(r *http.Request) (*http.Response, error) {
					at := r.URL.Host
					if at == "base.test" {
						at = base
					}
					if err := reach.refuseOthers(t.Context(), "tcp", at+":80", nil); err != nil {
						return nil, err
					}
					addr := &net.TCPAddr{IP: net.ParseIP(strings.Trim(at, "[]"))}
					httptrace.ContextClientTrace(r.Context()).GotConn(httptrace.GotConnInfo{Conn: connTo{addr: addr}})
					if to := strings.TrimPrefix(r.URL.Path, "/"); to != "" {
						return fake(302, "", "Location: http://"+to+"/"), nil
					}
					return fake(200, ""), nil
				})
			}
			var got []string
			for to := range strings.FieldsSeq(kinds) {
				r := a.get(to)
				if r.err == nil {
					got = append(got, to)
				} else {
					r.wantErr(errBadUpstream, "private address", "base_url: http://"+to)
				}
			}
			if s := strings.Join(got, " "); s != want {
				t.Errorf("from %s (%s) to %s; want %s", host, base, s, want)
			}
		}
	}
}

// connTo is a connection that knows where it leads, and no more.
type connTo struct {
	net.Conn
	addr net.Addr
}

func (c connTo) RemoteAddr() net.Addr { return c.addr }

// TestReboundNameReachesNothingInside: base_url's name leads inside at last, and a
// redirect to another port of it does not get there.
func TestReboundNameReachesNothingInside(t *testing.T) {
	t.Parallel()
	inside, base := newSite(t, says(200, "inside")), newSite(t, nil)
	a := newUpstreamTester(t, elsewhere(base))
	a.u.kindOf = isPublic // when base_url was connected to
	for to, ok := range map[string]bool{elsewhere(inside): false, elsewhere(base): true} {
		base.Config.Handler = base.record(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/f" {
				http.Redirect(w, r, to+"/g", http.StatusFound)
			}
		})
		if r := a.get("f"); ok {
			r.want(200, "") // the very server of base_url
		} else {
			r.wantErr(errBadUpstream, "private address")
		}
	}
	if n := len(inside.requests()); n != 0 {
		t.Errorf("the inside was asked %d times", n)
	}
}

func TestWhereAProxyDialsAddressesAreItsMatter(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Host == "base.test" {
			w.Header().Set("Location", "http://10.1.2.3/g")
			w.WriteHeader(302)
		}
	})
	a := newUpstreamTester(t, "http://base.test")
	a.u.proxyFor = http.ProxyURL(mustURL(t, s.URL))
	for _, rt := range a.u.transports {
		rt.(*http.Transport).Proxy = a.u.proxyFor
	}
	a.get("f").want(200, "")
	if n := len(s.requests()); n != 2 {
		t.Errorf("the proxy saw %d requests; want 2", n)
	}

	// A gateway error may be the proxy's own: the origin cannot be reached.
	handler := s.Config.Handler
	for status, text := range map[int]string{502: "the proxy", 503: "the proxy", 504: "the proxy", 407: "HTTP_PROXY"} {
		s.Config.Handler = says(status, "from the proxy")
		a.send(upstreamRequest{wire: "f", hasCopy: true}).wantErr(errUnreachable, text, fmt.Sprint(status))
	}
	s.Config.Handler = says(500, "from the proxy")
	a.get("f").want(500, "from the proxy")
	s.Config.Handler = handler

	// What it answers to CONNECT is its own.
	a.r.origins[0].url = mustURL(t, "https://base.test")
	for status, text := range map[int]string{407: "HTTP_PROXY", 403: "the proxy", 503: "the proxy"} {
		s.Config.Handler = says(status, "")
		a.send(upstreamRequest{wire: "f", hasCopy: true}).wantErr(errUnreachable, text, fmt.Sprint(status))
	}
	a.r.origins[0].url = mustURL(t, "http://base.test")
	s.Config.Handler = handler

	// A proxy with a private address does not make the origin private.
	inside := newSite(t, says(200, "inside"))
	s.Config.Handler = sends(302, inside.URL+"/f")
	for _, rt := range a.u.transports {
		rt.(*http.Transport).Proxy = func(r *http.Request) (*url.URL, error) { return a.u.proxyFor(r) }
	}
	a.u.proxyFor = func(r *http.Request) (*url.URL, error) {
		if r.URL.Host == "base.test" {
			return mustURL(t, s.URL), nil
		}
		return nil, nil
	}
	a.get("f").wantErr(errBadUpstream, "private address")

	// A base_url at a private address is known to be there.
	a.r.origins[0].url = mustURL(t, "http://127.1.2.3")
	a.u.proxyFor = func(r *http.Request) (*url.URL, error) {
		if r.URL.Host == "127.1.2.3" {
			return mustURL(t, s.URL), nil
		}
		return nil, nil
	}
	a.get("f").want(200, "inside")
}

func TestKindsOfAddresses(t *testing.T) {
	t.Parallel()
	for kind, addresses := range map[addressKind]string{
		publicAddress: "64:ff9b::808:808 ::8.8.8.8 2002:808:808::1 2001:0:a00:1::f7f7:f7f7 100.63.255.255 100.128.0.1 198.20.0.1 " +
			"192.0.1.1 2001:1::1 172.32.0.1 8.8.8.8 2606:4700::1111 ::ffff:8.8.8.8",
		privateAddress: "10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 fd00::1 fc00::1 ::ffff:10.0.0.1 100.64.0.1 " +
			"64:ff9b::a00:1 ::10.0.0.1 2002:a00:1::1 2001:0:808:808::f5ff:fffe",
		loopbackAddress:  "127.0.0.1 127.9.9.9 ::1 ::ffff:127.0.0.1 2002:7f00:1::",
		linkLocalAddress: "169.254.169.254 fe80::1 fe80::1%eth0 ::ffff:169.254.169.254",
		reservedAddress: "0.0.0.0 :: ::ffff:0.0.0.0 192.0.0.1 198.18.0.1 198.19.255.255 240.0.0.1 255.255.255.255 0.1.2.3 " +
			"224.0.0.1 ff02::1 fec0::1 64:ff9b:1::808:808",
	} {
		for s := range strings.FieldsSeq(addresses) {
			if got := kindOfAddress(netip.MustParseAddr(s)); got != kind {
				t.Errorf("%s is of kind %d, want %d", s, got, kind)
			}
		}
	}
}

func TestUnreachableInAllItsKinds(t *testing.T) {
	t.Parallel()
	tlsSite := httptest.NewUnstartedServer(says(200, ""))
	tlsSite.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	tlsSite.StartTLS()
	t.Cleanup(tlsSite.Close)
	raw := func(text string) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for c, err := l.Accept(); err == nil; c, err = l.Accept() {
				c.Read(make([]byte, 4096))
				io.WriteString(c, text)
				c.Close()
			}
		}()
		return "http://" + l.Addr().String()
	}
	for name, base := range map[string]string{
		"refused":             closedPort(t),
		"untrusted":           tlsSite.URL,
		"no TLS":              strings.Replace(raw("x"), "http", "https", 1),
		"closed unanswered":   raw(""),
		"no HTTP":             raw("220 mail.test ESMTP\r\n"),
		"cut in the header":   raw("HTTP/1.1 200 OK\r\nContent-Le"),
		"malformed in header": raw("HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
	} {
		r := newUpstreamTester(t, base).send(upstreamRequest{wire: "f?SECRET", hasCopy: true})
		if !errors.Is(r.err, errUnreachable) || statusOf(r.err) != 502 {
			t.Errorf("%s: %v", name, r.err)
			continue
		}
		r.wantErr(errUnreachable, `remote "r"`, "127.0.0.1")
		p, _ := errors.AsType[*problem](r.err)
		if p == nil || strings.Contains(p.detail, "dial") {
			t.Errorf("%s: the client's detail is %v", name, p)
		}
	}
	s := &script{do: func(int, *http.Request) (*http.Response, error) {
		return nil, &net.DNSError{Err: "no such host " + strings.Repeat("é", 1000), Name: "b"}
	}}
	r := newUpstreamTesterOver(t, s.rt, "http://b").send(upstreamRequest{hasCopy: true})
	r.wantErr(errUnreachable, "no such host")
	if len(r.err.Error()) > 1000 {
		t.Errorf("error of %d bytes", len(r.err.Error()))
	}
}

func TestBrokenBodyIsAnError(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		io.WriteString(w, "half")
	})
	r := newUpstreamTester(t, s.URL).get("f")
	if !errors.Is(r.bodyErr, errUnreachable) || r.text != "half" {
		t.Errorf("got %q, %v", r.text, r.bodyErr)
	}
}

func TestDiscardedBodiesAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{}
		s.do = func(n int, r *http.Request) (*http.Response, error) {
			if n > 0 {
				return fake(200, "x"), nil
			}
			resp, _ := drip(time.Hour, time.Hour)(n, r)
			resp.StatusCode = 302
			resp.Header.Set("Location", "/g")
			return resp, nil
		}
		began := time.Now()
		newUpstreamTesterOver(t, s.rt, "http://b").get("f").want(200, "x")
		if d := time.Since(began); d > time.Second {
			t.Errorf("a redirect's endless body was read for %v", d)
		}
	})
}

// answersAs is the fake upstream of the breaker tests. how says what it does now.
type answersAs struct{ how string }

func (s *answersAs) rt(r *http.Request) (*http.Response, error) {
	switch s.how {
	case "refuses":
		return nil, errDial
	case "resets":
		return nil, syscall.ECONNRESET
	case "hangs":
		return hang(r)
	case "garbles": // after a connection was made
		c, _ := net.Pipe()
		httptrace.ContextClientTrace(r.Context()).GotConn(httptrace.GotConnInfo{Conn: c})
		return nil, errors.New("malformed HTTP response")
	case "moved":
		if r.URL.Host != "b" {
			return nil, errDial
		}
		return fake(302, "", "Location: http://elsewhere/"), nil
	case "mirror":
		if r.URL.Host == "b" {
			return nil, errDial
		}
		return fake(404, ""), nil
	}
	return fake(404, ""), nil
}

// TestDown checks for each kind of answer whether the remote counts as down after it.
func TestDown(t *testing.T) {
	t.Parallel()
	for how, want := range map[string]bool{
		"answers": false, "refuses": true, "resets": true, "hangs": true, "moved": false, "mirror": false,
	} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newUpstreamTesterOver(t, (&answersAs{how}).rt, "http://b", "http://m")
				a.send(upstreamRequest{hasCopy: true})
				if got := a.u.isDown(t.Context(), a.r); got != want {
					t.Errorf("down: %v; want %v", got, want)
				}
			})
		})
	}
}

func TestDownLastsTenSecondsThenOneProbes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &answersAs{"refuses"}
		a := newUpstreamTesterOver(t, s.rt, "http://b")
		down := func(want ...bool) {
			t.Helper()
			for i, w := range want {
				// A reload makes a new remote of the same name.
				if got := a.u.isDown(t.Context(), &remote{name: "r"}); got != w {
					t.Errorf("caller %d: down is %v; want %v", i, got, w)
				}
			}
		}
		down(false, false)
		a.send(upstreamRequest{hasCopy: true}).wantErr(errUnreachable)
		down(true, true)
		time.Sleep(10*time.Second - time.Nanosecond)
		down(true)
		time.Sleep(time.Nanosecond)
		down(false, true, true) // the first is the probe

		a.send(upstreamRequest{hasCopy: true}).wantErr(errUnreachable) // the probe: still down
		down(true)
		time.Sleep(10 * time.Second)
		down(false, true)

		a.send(upstreamRequest{hasCopy: true}).wantErr(errUnreachable)
		time.Sleep(10 * time.Second)
		s.how = "hangs" // a probe that ends without a result makes place for another
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if a.u.isDown(ctx, a.r) {
			t.Error("nobody may probe")
		}
		down(true)
		a.sendUnder(ctx, upstreamRequest{hasCopy: true}).wantErr(context.DeadlineExceeded)
		synctest.Wait()
		down(false, true)

		s.how = "answers" // any status will do
		a.send(upstreamRequest{hasCopy: true}).want(404, "")
		down(false, false, false)
	})
}

// TestSilenceOfOneFileIsNoOutage: a request fails in each way, and another one is
// answered that long before the failure, which comes after 4 s. A file with a copy has
// answered once: what others got before it was asked for counts for one without.
func TestSilenceOfOneFileIsNoOutage(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		how       string
		answered  time.Duration
		hasCopy   bool
		wantsDown bool
	}{
		{"hangs", 2 * time.Second, false, false}, {"resets", 2 * time.Second, false, false}, {"garbles", 2 * time.Second, false, false},
		{"hangs", 2 * time.Second, true, false}, {"resets", 2 * time.Second, true, false}, {"garbles", 2 * time.Second, true, false},
		{"hangs", 13 * time.Second, false, false}, {"resets", 13 * time.Second, false, false}, {"garbles", 13 * time.Second, false, false},
		{"hangs", 13 * time.Second, true, true}, {"resets", 13 * time.Second, true, true}, {"garbles", 13 * time.Second, true, true},
		{"hangs", 16 * time.Second, false, true}, {"garbles", 16 * time.Second, false, true},
		{"refuses", 2 * time.Second, false, true}, {"refuses", 13 * time.Second, true, true},
	} {
		t.Run(fmt.Sprintf("%s, answered %v before, copy %v", c.how, c.answered, c.hasCopy), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newUpstreamTesterOver(t, func(r *http.Request) (*http.Response, error) {
					if r.URL.Path == "/good" {
						return fake(200, ""), nil
					}
					select {
					case <-time.After(4 * time.Second):
					case <-r.Context().Done():
						return nil, context.Cause(r.Context())
					}
					return (&answersAs{c.how}).rt(r)
				}, "http://b")
				var wg sync.WaitGroup
				wg.Go(func() {
					time.Sleep(20*time.Second - c.answered)
					a.get("good").want(200, "")
				})
				time.Sleep(16 * time.Second)
				a.send(upstreamRequest{wire: "bad", method: "HEAD", hasCopy: c.hasCopy})
				wg.Wait()
				if got := a.u.isDown(t.Context(), a.r); got != c.wantsDown {
					t.Errorf("down: %v; want %v", got, c.wantsDown)
				}
			})
		})
	}
}

// TestWhileDownOneShortTry: what has no copy is asked for once during an outage, and a
// dial that hangs is given up soon.
func TestWhileDownOneShortTry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{do: func(int, *http.Request) (*http.Response, error) { return nil, errDial }}
		a := newUpstreamTesterOver(t, s.rt, "http://b")
		try := func(wantTook time.Duration, wantRequests int) {
			t.Helper()
			began, before := time.Now(), len(s.lines)
			if r := a.get("f"); r.err == nil {
				t.Error("an answer")
			}
			if took, n := time.Since(began), len(s.lines)-before; took != wantTook || n != wantRequests {
				t.Errorf("%d requests in %v, want %d in %v", n, took, wantRequests, wantTook)
			}
		}
		try(time.Second, 3) // the outage begins: with retries
		try(0, 1)
		s.do = func(_ int, r *http.Request) (*http.Response, error) { return hang(r) }
		try(3*time.Second, 1)
		s.do = func(_ int, r *http.Request) (*http.Response, error) { // connected, and then silent
			c, _ := net.Pipe()
			httptrace.ContextClientTrace(r.Context()).GotConn(httptrace.GotConnInfo{Conn: c})
			return hang(r)
		}
		try(a.r.timeout, 1)
	})
}

// TestFailedOriginIsAskedLast: for 10 s after a failure by network the others are asked
// first.
func TestFailedOriginIsAskedLast(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, silent := &script{}, true
		s.do = func(_ int, r *http.Request) (*http.Response, error) {
			if r.URL.Host == "b" && silent {
				return hang(r)
			}
			if r.URL.Host == "m2" {
				return fake(500, ""), nil // that is no failure of the network
			}
			return fake(200, r.URL.Host), nil
		}
		a := newUpstreamTesterOver(t, s.rt, "http://b", "http://m2", "http://m")
		asks := func(answer, hosts string) {
			t.Helper()
			before := len(s.lines)
			a.get("").want(200, answer)
			if got := strings.ReplaceAll(strings.Join(s.lines[before:], " "), "/", ""); got != hosts {
				t.Errorf("asked %s, want %s", got, hosts)
			}
		}
		asks("m", "b m2 m")
		silent = false
		asks("m", "m2 m")
		time.Sleep(outagePause)
		asks("b", "b")
	})
}

// registrySite is a fake registry with its token service, each on a host of its own.
type registrySite struct {
	*script
	*upstreamTester
	challenge string
	tokens    func(w http.ResponseWriter, r *http.Request)
	accepts   func(auth string) bool
	exchanges []*http.Request // guarded by script.mu
}

// newTokenRegistry makes a registry at registry.test.test with a token service at
// auth.test.test. The service gives the tokens t1, t2 and so on; the registry accepts
// the last one.
func newTokenRegistry(t *testing.T, origins ...string) *registrySite {
	g := &registrySite{challenge: `Bearer realm="https://auth.test.test/token",service="svc",scope="ignored"`}
	g.tokens = func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"token":"t%d","expires_in":300}`, g.exchanged())
	}
	g.accepts = func(auth string) bool { return auth == fmt.Sprintf("Bearer t%d", g.exchanged()) }
	g.script = &script{do: func(_ int, r *http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		switch {
		case strings.HasPrefix(r.URL.Path, "/token"):
			g.mu.Lock()
			g.exchanges = append(g.exchanges, r)
			g.mu.Unlock()
			g.tokens(w, r)
		case strings.HasPrefix(r.URL.Host, "blobs."):
			if r.Header.Get("Authorization") != "" {
				t.Errorf("blob storage got %v", r.Header)
			}
			io.WriteString(w, "blob")
		case !g.accepts(r.Header.Get("Authorization")):
			w.Header().Set("WWW-Authenticate", g.challenge)
			w.WriteHeader(401)
		case strings.Contains(r.URL.Path, "/blobs/"):
			w.Header().Set("Location", "https://blobs.test.test/x?SECRET")
			w.WriteHeader(307)
		default:
			io.WriteString(w, "manifest")
		}
		return w.Result(), nil
	}}
	if len(origins) == 0 {
		origins = []string{"https://registry.test.test"}
	}
	g.upstreamTester = newUpstreamTesterOver(t, g.rt, origins...)
	g.r.packageType = "docker"
	return g
}

func (g *registrySite) exchanged() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.exchanges)
}

func (g *registrySite) pull() *upstreamResult {
	g.Helper()
	return g.upstreamTester.send(upstreamRequest{wire: "i/manifests/x", scope: "repository:i:pull"})
}

// wantTraffic checks how many requests there were so far, and how many of them went to
// the token service.
func (g *registrySite) wantTraffic(requests, exchanges int) {
	g.Helper()
	if n, x := len(g.lines), len(g.exchanges); n != requests || x != exchanges {
		g.Errorf("%d requests, of them %d exchanges; want %d and %d: %v", n, x, requests, exchanges, g.lines)
	}
}

func TestTokenIsExchangedAndKept(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t)
	g.pull().want(200, "manifest")
	g.wantTraffic(3, 1)
	x := g.exchanges[0]
	if x.URL.String() != "https://auth.test.test/token?scope=repository%3Ai%3Apull&service=svc" ||
		x.Header.Get("Authorization") != "" || x.Header.Get("Accept") != "application/json" {
		t.Errorf("exchanged at %s with %v", x.URL, x.Header)
	}
	g.pull().want(200, "manifest")
	g.wantTraffic(4, 1)

	other := upstreamRequest{wire: "j/manifests/x", scope: "repository:j:pull"}
	g.send(other).want(200, "manifest") // another scope, another token
	g.wantTraffic(7, 2)
}

func TestTokenGoesNotToBlobStorage(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t)
	g.r.username, g.r.headers = "u", http.Header{"X-Key": {"k"}}
	g.send(upstreamRequest{wire: "i/blobs/x", scope: "s"}).want(200, "blob") // the fake checks
	for _, r := range g.reqs {
		if got, want := r.Header.Get("X-Key") != "", r.URL.Host == "registry.test.test"; got != want {
			t.Errorf("%s: configured header sent: %v", r.URL.Host, got)
		}
	}
	// A 401 of the blob storage is not taken for one of the registry either.
	do := g.do
	g.do = func(n int, r *http.Request) (*http.Response, error) {
		if r.URL.Host == "blobs.test.test" {
			return fake(401, "", `WWW-Authenticate: Basic realm="https://auth.test.test/token"`), nil
		}
		return do(n, r)
	}
	n := g.exchanged()
	g.send(upstreamRequest{wire: "i/blobs/x", scope: "s"}).want(401, "")
	if g.exchanged() != n {
		t.Error("a token was asked for blob storage")
	}
}

// TestTokenHasTheScopeOfTheChallenge: registries that map paths know an image by
// another name than ours.
func TestTokenHasTheScopeOfTheChallenge(t *testing.T) {
	t.Parallel()
	const own = "repository:i:pull"
	for scope, want := range map[string]string{
		"repository:mapped/i:pull":            "repository:mapped/i:pull",
		own:                                   own,
		"":                                    own,
		"repository:i:pull,push":              own,
		"repository:a:pull repository:b:pull": own,
		"registry:catalog:*":                  own,
		"repository::pull":                    own,
	} {
		g := newTokenRegistry(t)
		g.challenge = `Bearer realm="https://auth.test.test/token",service="svc",scope="` + scope + `"`
		g.pull().want(200, "manifest")
		g.pull().want(200, "manifest")
		g.wantTraffic(4, 1)
		if got := g.exchanges[0].URL.Query()["scope"]; !slices.Equal(got, []string{want}) {
			t.Errorf("%q: asked for %q, want %q", scope, got, want)
		}
	}
}

// TestAnotherRegistryBehindARedirect: it wants a token of its own, and gets one that was
// asked for anonymously. The password is not for it, and its silence says nothing about
// the remote.
func TestAnotherRegistryBehindARedirect(t *testing.T) {
	t.Parallel()
	newPair := func(origins ...string) *registrySite {
		g := newTokenRegistry(t, origins...)
		g.r.username, g.r.password, g.r.headers = "u", "SECRET", http.Header{"X-Key": {"k"}}
		do := g.do
		g.do = func(n int, r *http.Request) (*http.Response, error) {
			if user, _, basic := r.BasicAuth(); basic && r.URL.Host != "auth.test.test" {
				t.Errorf("%s got the password of %s", r.URL, user)
			}
			if r.URL.Host == "other.example" && r.Header.Get("X-Key") != "" {
				t.Errorf("%s got %v", r.URL, r.Header)
			}
			switch auth := r.Header.Get("Authorization"); {
			case r.URL.Host == "other.example" && r.URL.Path == "/t":
				return fake(200, `{"token":"theirs","expires_in":300}`), nil
			case r.URL.Host == "other.example" && auth == "Bearer theirs":
				return fake(200, "manifest"), nil
			case r.URL.Host == "other.example":
				if auth != "" {
					t.Errorf("%s got %q", r.URL, auth)
				}
				return fake(401, "", `WWW-Authenticate: Bearer realm="https://other.example/t",scope="repository:them/i:pull"`), nil
			case g.accepts(auth):
				return fake(307, "", "Location: https://other.example/v2/them/i/x"), nil
			}
			return do(n, r)
		}
		return g
	}
	g := newPair()
	g.pull().want(200, "manifest")
	g.wantTraffic(6, 1) // two challenges and two tokens, then the file
	if last := g.reqs[len(g.reqs)-2]; last.URL.String() != "https://other.example/t?scope=repository%3Athem%2Fi%3Apull" {
		t.Errorf("the token was asked for at %s", last.URL)
	}
	g.pull().want(200, "manifest")
	g.wantTraffic(9, 1) // both tokens are remembered

	// A mirror with auth is a registry like any other when a redirect leads there.
	g = newPair("https://registry.test.test", "auth https://other.example")
	g.r.headers = nil
	g.pull().want(200, "manifest")

	g = newPair()
	do := g.do
	g.do = func(n int, r *http.Request) (*http.Response, error) {
		if r.URL.Host == "other.example" && r.URL.Path != "/t" && r.Header.Get("Authorization") != "" {
			return nil, errDial
		}
		return do(n, r)
	}
	g.upstreamTester.send(upstreamRequest{wire: "i/manifests/x", scope: "repository:i:pull", hasCopy: true}).wantErr(errUnreachable)
	if g.u.isDown(t.Context(), g.r) {
		t.Error("the remote counts as down though it answers")
	}

	g = newPair() // a third one gets nothing
	do = g.do
	g.do = func(n int, r *http.Request) (*http.Response, error) {
		switch {
		case r.URL.Host == "third.example":
			return fake(401, "", `WWW-Authenticate: Bearer realm="https://auth.test.test/token"`), nil
		case r.Header.Get("Authorization") == "Bearer theirs":
			return fake(307, "", "Location: https://third.example/x"), nil
		}
		return do(n, r)
	}
	g.pull().want(401, "")
	g.wantTraffic(7, 1)
}

// TestHostileTokensAreBounded: a registry that challenges with ever new scopes, and whose
// tokens are as long as they may be.
func TestHostileTokensAreBounded(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t)
	g.tokens = says(200, `{"token":"`+strings.Repeat("a", 16<<10)+`","expires_in":86400}`)
	g.accepts = func(auth string) bool { return len(auth) > 16<<10 }
	for i := range 1100 {
		g.send(upstreamRequest{wire: "f", scope: strconv.Itoa(i)}).want(200, "manifest")
	}
	bytes := 0
	for _, k := range g.u.authorizations.keys() {
		auth, _ := g.u.authorizations.get(k)
		bytes += len(strings.TrimPrefix(auth, "Bearer "))
	}
	if bytes > 16<<20 {
		t.Errorf("the tokens take %d bytes, want 16 MiB at most", bytes)
	}
	g.accepts = func(string) bool { return false }
	g.challenge = `Bearer realm="https://auth.test.test/token?` + strings.Repeat("a", 4<<10) + `"`
	n := g.exchanged()
	if g.send(upstreamRequest{wire: "f", scope: "new"}).want(401, ""); g.exchanged() != n {
		t.Error("a challenge of 4 KiB was believed")
	}
}

func TestOneExchangeForMany(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newTokenRegistry(t)
		give := g.tokens
		g.tokens = func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(time.Second)
			give(w, r)
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { g.pull().want(200, "manifest") })
		}
		wg.Wait()
		g.wantTraffic(50+1+50, 1)
	})
}

func TestWaitersShareAFailureButNotAnAbandonedExchange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newTokenRegistry(t)
		g.tokens = func(w http.ResponseWriter, _ *http.Request) {
			time.Sleep(time.Second)
			w.WriteHeader(500)
		}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { g.upstreamTester.send(upstreamRequest{hasCopy: true, scope: "s"}).wantErr(errUnreachable) })
		}
		wg.Wait()
		g.wantTraffic(10+1, 1)
		g.upstreamTester.send(upstreamRequest{hasCopy: true, scope: "s"}).wantErr(errUnreachable)
		g.wantTraffic(10+1+2, 2) // a failure is shared by those that waited for it, and then forgotten

		g = newTokenRegistry(t)
		do := g.do
		g.do = func(n int, r *http.Request) (*http.Response, error) {
			if r.URL.Path == "/token" && g.exchanged() == 0 {
				g.mu.Lock()
				g.exchanges = append(g.exchanges, r)
				g.mu.Unlock()
				return hang(r)
			}
			return do(n, r)
		}
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() { g.sendUnder(ctx, upstreamRequest{scope: "s"}).wantErr(context.Canceled) })
		synctest.Wait()
		for range 10 {
			wg.Go(func() { g.upstreamTester.send(upstreamRequest{scope: "s"}).want(200, "manifest") })
		}
		short, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		wg.Go(func() { g.sendUnder(short, upstreamRequest{scope: "s"}).wantErr(context.DeadlineExceeded) })
		time.Sleep(2 * time.Second)
		cancel()
		wg.Wait()
		if n := g.exchanged(); n != 2 {
			t.Errorf("%d exchanges; want 2", n)
		}
	})
}

func TestTokenLife(t *testing.T) {
	t.Parallel()
	for answer, life := range map[string]time.Duration{
		`{"token":"t"}`:                                    54 * time.Second,
		`{"access_token":"t"}`:                             54 * time.Second,
		`{"token":"t","expires_in":300}`:                   270 * time.Second,
		`{"token":"t","expires_in":"300"}`:                 270 * time.Second,
		`{"token":"t","expires_in":0}`:                     54 * time.Second,
		`{"token":"t","expires_in":-5,"issued_at":7}`:      54 * time.Second,
		`{"token":"t","expires_in":null,"issued_at":null}`: 54 * time.Second,
		`{"token":"t","expires_in":1e300}`:                 maxTokenLife * 9 / 10,
	} {
		t.Run(answer, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newTokenRegistry(t)
				g.accepts = func(auth string) bool { return auth == "Bearer t" }
				g.tokens = says(200, answer)
				g.pull().want(200, "manifest")
				time.Sleep(life - time.Nanosecond)
				g.pull().want(200, "manifest")
				g.wantTraffic(4, 1)
				time.Sleep(time.Nanosecond)
				g.pull().want(200, "manifest")
				g.wantTraffic(7, 2)
			})
		})
	}
}

// pullKey is where the token of registrySite.pull is kept.
var pullKey = registryKey{"r", "https://registry.test.test", "repository:i:pull", ""}

func TestRefusedTokenIsRenewedOnce(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t)
	g.pull().want(200, "manifest")
	g.accepts = func(auth string) bool { return auth == "Bearer t2" }
	g.pull().want(200, "manifest") // t1 was revoked
	g.wantTraffic(6, 2)

	g.accepts = func(string) bool { return false }
	g.pull().want(401, "") // t2 and the fresh t3 refused
	g.wantTraffic(9, 3)

	// A token that another request has got meanwhile is not a fresh one.
	clear(g.u.authorizations.entries)
	g.accepts = func(auth string) bool {
		if auth == "" {
			g.u.authorizations.put(pullKey, "Bearer t3")
		}
		return auth == "Bearer t4"
	}
	g.pull().want(200, "manifest")
	g.wantTraffic(13, 4)
}

// TestRefusedTokensComeToAnEnd: other requests get a new token again and again.
func TestRefusedTokensComeToAnEnd(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t)
	g.accepts = func(string) bool {
		g.u.authorizations.put(pullKey, fmt.Sprint("Bearer ", len(g.lines)))
		return false
	}
	g.pull().want(401, "")
	g.wantTraffic(3, 0)
}

func TestTokenServiceFailures(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		status int
		err    error
	}{
		"401":          {says(401, ""), 403, errCredentials},
		"403":          {says(403, ""), 403, errCredentials},
		"404":          {says(404, ""), 502, errUnreachable},
		"500":          {says(500, ""), 502, errUnreachable},
		"no JSON":      {says(200, "<html>"), 502, errUnreachable},
		"no object":    {says(200, "[]"), 502, errUnreachable},
		"no token":     {says(200, `{"token":""}`), 502, errUnreachable},
		"header split": {says(200, `{"token":"a\r\nX: y"}`), 502, errUnreachable},
		"endless":      {says(200, `{"token":"`+strings.Repeat("a", 1<<20)+`"}`), 502, errUnreachable},
		"too long":     {says(200, `{"token":"`+strings.Repeat("a", 16<<10+1)+`"}`), 502, errUnreachable},
	} {
		g := newTokenRegistry(t)
		g.r.username, g.r.password = "u", "SECRET"
		g.tokens = c.answer
		r := g.upstreamTester.send(upstreamRequest{scope: "s", hasCopy: true})
		r.wantErr(c.err, `remote "r"`, "auth.test.test")
		if statusOf(r.err) != c.status {
			t.Errorf("%s: status %d; want %d", name, statusOf(r.err), c.status)
		}
		if g.u.isDown(t.Context(), g.r) {
			t.Errorf("%s: the remote counts as down though it answers", name)
		}
	}
}

func TestTokenServiceUnreachableCountsForTheRemote(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		refuse := func(*http.Request) (*http.Response, error) { return nil, errDial }
		// Many times, since two events end the wait at the same instant.
		for i := range 20 {
			fails := []func(*http.Request) (*http.Response, error){refuse, hang}[i%2]
			g := newTokenRegistry(t)
			do := g.do
			g.do = func(n int, r *http.Request) (*http.Response, error) {
				if r.URL.Path == "/token" {
					return fails(r)
				}
				return do(n, r)
			}
			r := g.upstreamTester.send(upstreamRequest{scope: "s", hasCopy: true})
			if !errors.Is(r.err, errUnreachable) && !errors.Is(r.err, errTimeout) {
				t.Errorf("got %v", r.err)
			}
			if !g.u.isDown(t.Context(), g.r) {
				t.Error("not down")
			}
		}
	})
}

// TestTokenServiceDownIsOneLine: the registry's challenges do not end the outage.
func TestTokenServiceDownIsOneLine(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newTokenRegistry(t)
		do, down := g.do, true
		g.do = func(n int, r *http.Request) (*http.Response, error) {
			if down && r.URL.Path == "/token" {
				return nil, errDial
			}
			return do(n, r)
		}
		wantLines := func(gone, back int) {
			t.Helper()
			if n, m := strings.Count(g.log.String(), "cannot be reached"), strings.Count(g.log.String(), "reached again"); n != gone || m != back {
				t.Errorf("%d lines say that it is gone and %d that it is back; want %d and %d", n, m, gone, back)
			}
		}
		for range 5 {
			g.pull().wantErr(errUnreachable)
		}
		wantLines(1, 0)
		down = false
		time.Sleep(outagePause)
		if r := g.pull(); r.err != nil {
			t.Error(r.err)
		}
		wantLines(1, 1)
	})
}

func TestTokenMayNotTrickle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newTokenRegistry(t)
		do := g.do
		g.do = func(n int, r *http.Request) (*http.Response, error) {
			if r.URL.Path == "/token" {
				return drip(slices.Repeat([]time.Duration{2 * time.Second}, 1000)...)(n, r)
			}
			return do(n, r)
		}
		began := time.Now()
		g.pull().wantErr(errTimeout)
		if d := time.Since(began); d != g.r.timeout {
			t.Errorf("gave up after %v; want %v", d, g.r.timeout)
		}
	})
}

func TestTokenServices429IsTheAnswer(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t)
	g.tokens = func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(429)
	}
	r := g.pull().want(429, "")
	if r.Header.Get("Retry-After") != "7" {
		t.Error("Retry-After was lost")
	}
}

func TestCredentialsGoToTheRealm(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t)
	g.r.username, g.r.password = "u", "p"
	g.pull().want(200, "manifest")
	for _, r := range g.reqs {
		user, pw, _ := r.BasicAuth()
		if got, want := user == "u" && pw == "p", r.URL.Path == "/token"; got != want {
			t.Errorf("%s: password sent: %v", r.URL, got)
		}
	}
	g.r = &remote{config: g.r.config, name: "r", packageType: "docker", origins: g.r.origins, timeout: g.r.timeout, username: "u", password: "changed"}
	g.pull().want(200, "manifest") // after a reload with another password
	g.wantTraffic(6, 2)
}

func TestForeignRealmIsNotAsked(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t)
	g.challenge = `Bearer realm="https://evil.example/token?SECRET"`
	g.r.username, g.r.password = "u", "SECRET"
	r := g.pull()
	r.wantErr(errBadUpstream, "token_realm", "https://evil.example/token", `remote "r"`)
	if statusOf(r.err) != 502 {
		t.Errorf("status %d; want 502", statusOf(r.err))
	}
	g.wantTraffic(1, 0)
	g.u.circuitOf("r").fail(errDial, time.Now())
	if !g.u.isInOutage("r") {
		t.Fatal("there is no outage to end")
	}
	g.pull().wantErr(errBadUpstream, "token_realm")
	if g.u.isInOutage("r") {
		t.Error("the registry answers, and counts as down")
	}

	g.r.tokenRealm = mustURL(t, "https://evil.example/token")
	g.pull().want(200, "manifest")

	g = newTokenRegistry(t) // without credentials every realm may be asked
	g.challenge = `Bearer realm="https://evil.example/token"`
	g.pull().want(200, "manifest")

	g = newTokenRegistry(t)
	g.challenge = `Bearer realm="/token"`
	g.pull().wantErr(errBadUpstream, "realm")
}

func TestRealmTrust(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		base, realm string
		want        bool
	}{
		{"https://registry-1.docker.io/v2", "https://auth.docker.io/token", true},
		{"https://registry-1.docker.io/v2", "https://docker.io/token", true},
		{"https://registry-1.docker.io/v2", "https://a.b.DOCKER.io:8443/token", true},
		{"https://registry-1.docker.io/v2", "http://auth.docker.io/token", false},
		{"https://registry-1.docker.io/v2", "https://notdocker.io/token", false},
		{"https://registry-1.docker.io/v2", "https://docker.io.evil.example/token", false},
		{"https://registry.gitlab.com/v2", "https://gitlab.com/jwt/auth", true},
		{"https://ghcr.io/v2", "https://ghcr.io/token", true},
		{"https://ghcr.io/v2", "https://evil.io/token", false},
		{"https://r.co.uk/v2", "https://evil.co.uk/token", false},
		{"https://r.example.co.uk/v2", "https://auth.example.co.uk/token", true},
		{"https://me.github.io/v2", "https://you.github.io/token", false},
		{"https://mine.azurecr.io/v2", "https://mine.azurecr.io/oauth2/token", true},
		{"https://mine.azurecr.io/v2", "https://yours.azurecr.io/oauth2/token", false},
		{"http://r.corp.test/v2", "http://auth.corp.test/token", true},
		{"http://r.corp.test/v2", "https://auth.corp.test/token", true},
		{"https://10.0.0.1:5000/v2", "https://10.0.0.1/token", true},
		{"https://10.0.0.1/v2", "https://9.0.0.1/token", false},
		{"https://10.0.0.1/v2", "https://0.0.1/token", false},
		{"https://[fd00::1]/v2", "https://[fd00::1]:5001/token", true},
		{"https://[fd00::1]/v2", "https://[fd00::2]/token", false},
		{"https://localhost/v2", "https://localhost/token", true},
		{"https://a.0.0.1/v2", "https://10.0.0.1/token", false},
		{"https://r.example.com./v2", "https://auth.example.com/token", true},
		{"https://plain.example/v2", "https://configured.example/token", true},
		{"https://plain.example/v2", "https://configured.example:443/token?x", true},
		{"https://plain.example/v2", "http://configured.example/token", false},
		{"https://plain.example/v2", "https://configured.example/other", false},
	} {
		r := &remote{origins: []origin{{url: mustURL(t, c.base), auth: true}}, tokenRealm: mustURL(t, "https://configured.example/token")}
		if got := r.trustsRealm(mustURL(t, c.realm)); got != c.want {
			t.Errorf("%s trusts %s: %v; want %v", c.base, c.realm, got, c.want)
		}
	}
	for _, auth := range []bool{false, true} { // a mirror's own realm
		r := &remote{origins: []origin{{url: mustURL(t, "https://r.base.example"), auth: true}, {url: mustURL(t, "https://r.mirror.example"), auth: auth}}}
		if got := r.trustsRealm(mustURL(t, "https://auth.mirror.example/token")); got != auth {
			t.Errorf("the realm of a mirror with auth %v is trusted: %v", auth, got)
		}
	}
}

func TestRealmMayNotLeadInside(t *testing.T) {
	t.Parallel()
	service := newSite(t, says(200, `{"token":"t"}`))
	base := newSite(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer t" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+elsewhere(service)+`/token"`)
			w.WriteHeader(401)
		}
	})
	for name, c := range map[string]struct {
		public bool
		realm  *url.URL
		ok     bool
	}{
		"a registry inside":          {false, nil, true},
		"a public registry":          {true, nil, false},
		"where token_realm names it": {true, mustURL(t, elsewhere(service)+"/token"), true},
	} {
		a := newUpstreamTester(t, base.URL)
		a.r.packageType, a.r.tokenRealm = "docker", c.realm
		if c.public {
			a.u.kindOf = isPublic
		}
		if r := a.send(upstreamRequest{scope: "s"}); c.ok {
			r.want(200, "")
		} else {
			r.wantErr(errBadUpstream, "private address")
			t.Log(name, r.err)
		}
	}
}

// TestTrustedRealmMayNotLeadInside: the service itself may be inside, and its redirects
// lead where those of base_url may.
func TestTrustedRealmMayNotLeadInside(t *testing.T) {
	t.Parallel()
	inside := newSite(t, says(200, `{"token":"t"}`))
	service := newSite(t, sends(302, inside.URL+"/token"))
	base := newSite(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+service.URL+`/token"`)
		w.WriteHeader(401)
	})
	a := newUpstreamTester(t, base.URL)
	a.r.packageType, a.r.username, a.r.tokenRealm = "docker", "u", mustURL(t, service.URL+"/token")
	a.u.kindOf = isPublic
	a.send(upstreamRequest{scope: "s"}).wantErr(errBadUpstream, "private address")
	if n := len(inside.requests()); n != 0 {
		t.Errorf("the inside was asked %d times", n)
	}
}

func TestTokenRequestsRedirectKeepsThePassword(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t)
	g.r.username, g.r.password = "u", "p"
	g.tokens = func(w http.ResponseWriter, r *http.Request) {
		_, _, basic := r.BasicAuth()
		if r.URL.Host == "evil.example" {
			if basic {
				t.Error("the password went along a redirect")
			}
			w.WriteHeader(401)
			return
		}
		w.Header().Set("Location", "https://evil.example/token")
		w.WriteHeader(302)
	}
	g.pull().wantErr(errCredentials)
}

// The digest that is known is a blob's, and no token's.
func TestTokenRequestKeepsToHTTPS(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t)
	g.tokens = sends(302, "http://auth.test.test/token/plain")
	g.upstreamTester.send(upstreamRequest{scope: "s", digestKnown: true}).wantErr(errBadUpstream, "https to http")
}

func TestBasicRegistry(t *testing.T) {
	t.Parallel()
	for _, scope := range []string{"", "repository:i:pull"} {
		g := newTokenRegistry(t)
		g.challenge = `Negotiate abc==, BASIC realm="x"`
		g.r.username, g.r.password = "u", "p"
		g.accepts = func(auth string) bool { return auth == "Basic dTpw" }
		req := upstreamRequest{wire: "f", scope: scope}
		g.send(req).want(200, "manifest")
		g.send(req).want(200, "manifest") // remembered
		g.wantTraffic(3, 0)
		g.accepts = func(string) bool { return false }
		g.send(req).want(401, "") // wrong password: it is not sent twice
		g.wantTraffic(4, 0)

		for _, g.challenge = range []string{`Basic realm="x"`, `Bearer service="s"`, `Digest realm="x"`, ``} {
			g.r = &remote{config: g.r.config, name: "r", packageType: "docker", origins: g.r.origins, timeout: g.r.timeout}
			before := len(g.lines)
			g.send(req).want(401, "") // no credentials for a Basic challenge
			g.wantTraffic(before+1, 0)
		}
	}
}

// TestUnmarkedMirrorGetsNoBoughtToken: a mirror without auth names the realm of
// base_url.
func TestUnmarkedMirrorGetsNoBoughtToken(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t, "https://registry.test.test", "https://mirror.example", "auth https://second.test.test")
	g.r.username, g.r.password = "u", "p"
	g.tokens = func(w http.ResponseWriter, r *http.Request) {
		_, _, basic := r.BasicAuth()
		fmt.Fprintf(w, `{"token":"bought-%v"}`, basic)
	}
	g.accepts = func(auth string) bool { return strings.HasPrefix(auth, "Bearer bought") }
	for i, want := range []string{"Bearer bought-true", "Bearer bought-false", "Bearer bought-true"} {
		g.upstreamTester.send(upstreamRequest{wire: "f", scope: "s", first: i}).want(200, "manifest")
		if got := g.reqs[len(g.reqs)-1].Header.Get("Authorization"); got != want {
			t.Errorf("origin %d got %q; want %q", i, got, want)
		}
	}
}

func TestMirrorsTokenTroubleNeverCounts(t *testing.T) {
	t.Parallel()
	g := newTokenRegistry(t, "https://registry.test.test", "https://mirror.example")
	do := g.do
	g.do = func(n int, r *http.Request) (*http.Response, error) {
		if r.URL.Host == "registry.test.test" {
			return fake(500, "base"), nil
		}
		return do(n, r)
	}
	g.tokens = says(403, "")
	g.pull().want(500, "base")
	g.tokens = says(429, "")
	g.pull().want(500, "base")
}

func TestParseChallenges(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]string{
		``:      ``,
		`Basic`: `basic`,
		`Bearer realm="https://a/t",service="s",scope="repository:a:pull,push"`: `bearer realm="https://a/t", scope="repository:a:pull,push", service="s"`,
		`bEaReR REALM = "x" , Service=y`:                                        `bearer realm="x", service="y"`,
		`Basic realm="a", Bearer realm="b"`:                                     `basic realm="a", bearer realm="b"`,
		`Bearer realm="a b", BASIC realm="Basic"`:                               `basic realm="Basic", bearer realm="a b"`,
		`Negotiate YII/+a==, Basic realm="a"`:                                   `basic realm="a"`,
		`Digest realm="d", Basic realm="a"`:                                     `basic realm="a"`,
		`Bearer realm=https://a/t?x=y,service=s`:                                `bearer realm="https://a/t?x=y", service="s"`,
		`Bearer realm="a",realm="b"`:                                            `bearer realm="a"`,
		`Bearer realm="unfinished`:                                              `bearer`,
		`Basic realm=""`:                                                        `basic realm=""`,
	} {
		if got := render(parseChallenges([]string{header})); got != want {
			t.Errorf("%s: %s; want %s", header, got, want)
		}
	}
	if got := parseChallenges([]string{`Basic realm="a"`, `Bearer realm="b"`}); len(got) != 2 {
		t.Errorf("two headers: %v", got)
	}
}

// render returns the text of challenges, with all values in quotes.
func render(challenges map[string]map[string]string) string {
	var all []string
	for _, scheme := range sortedKeys(challenges) {
		var params []string
		for _, name := range sortedKeys(challenges[scheme]) {
			params = append(params, name+`="`+challenges[scheme][name]+`"`)
		}
		all = append(all, strings.TrimSpace(scheme+" "+strings.Join(params, ", ")))
	}
	return strings.Join(all, ", ")
}

func FuzzChallenges(f *testing.F) {
	f.Add(`Bearer realm="https://a/t",service="s",scope="repository:a:pull,push"`)
	f.Add(`Negotiate YII/+a==, Basic realm="a\"b", , x y = z`)
	f.Fuzz(func(t *testing.T, header string) {
		text := render(parseChallenges([]string{header}))
		if again := parseChallenges([]string{text}); len(text) <= maxChallenge && render(again) != text {
			t.Errorf("%q became %q, then %v", header, text, again)
		}
	})
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for s, want := range map[string]time.Duration{
		"": 0, "0": 0, "7": 7 * time.Second, " 7 ": 7 * time.Second, "-7": 0, "1.5": 0, "soon": 0,
		"99999": time.Hour, "18446744073709551615": time.Hour, "18446744073709551616": 0,
		now.Add(time.Minute).Format(http.TimeFormat):                  time.Minute,
		now.Add(-time.Minute).Format(http.TimeFormat):                 0,
		now.Add(1000 * time.Hour).Format(http.TimeFormat):             time.Hour,
		now.AddDate(7000, 0, 0).Format(http.TimeFormat):               time.Hour,
		now.Add(time.Minute).Format("Monday, 02-Jan-06 15:04:05 GMT"): time.Minute,
	} {
		if got := parseRetryAfter(http.Header{"Retry-After": {s}}, now); got != want {
			t.Errorf("%q: %v; want %v", s, got, want)
		}
	}
}

func FuzzRetryAfter(f *testing.F) {
	f.Add("7", int64(0))
	f.Add("Fri, 02 Jan 2026 03:04:05 GMT", int64(1767323045))
	f.Fuzz(func(t *testing.T, s string, now int64) {
		if d := parseRetryAfter(http.Header{"Retry-After": {s}}, time.Unix(now, 0)); d < 0 || d > maxRetryAfter {
			t.Errorf("%q: %v", s, d)
		}
	})
}

func TestContentRange(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		"bytes 0-9/100": "0 9 100", "Bytes 5-5/6": "5 5 6", "bytes 5-9/*": "5 9 -1", " bytes  5-9/10 ": "5 9 10",
		"bytes 0-999999999999999998/999999999999999999": "0 999999999999999998 999999999999999999",
		"": "", "bytes": "", "bytes */100": "", "bytes 9-5/100": "", "bytes 0-9/9": "", "bytes 0-9": "",
		"bytes -9/100": "", "bytes 0-/100": "", "bytes +0-9/100": "", "items 0-9/100": "", "bytes=0-9/100": "",
		"bytes 0-1000000000000000000/*": "", "bytes 0-9/100/1": "",
	} {
		got := ""
		if first, last, size, ok := parseContentRange(s); ok {
			got = fmt.Sprint(first, last, size)
		}
		if got != want {
			t.Errorf("%q: %q; want %q", s, got, want)
		}
	}
}

func FuzzContentRange(f *testing.F) {
	f.Add("bytes 0-9/100")
	f.Add("bytes 5-9/*")
	f.Fuzz(func(t *testing.T, s string) {
		first, last, size, ok := parseContentRange(s)
		if !ok {
			return
		}
		if first < 0 || last < first || size < -1 || (size >= 0 && last >= size) {
			t.Fatalf("%q: %d-%d/%d", s, first, last, size)
		}
		again := fmt.Sprintf("bytes %d-%d/%d", first, last, size)
		if a, b, c, ok := parseContentRange(strings.Replace(again, "/-1", "/*", 1)); !ok || a != first || b != last || c != size {
			t.Errorf("%q: not the same as %q", s, again)
		}
	})
}

// An IPv6 address has many spellings: whichever remotes.yaml has, its server is known.
func TestConfiguredServerIsKnownByItsAddress(t *testing.T) {
	t.Parallel()
	cfg := mustParse(t, "remotes:\n  a: {base_url: 'http://[FD00:0::2]/x'}\n  b: {base_url: 'https://Files.Example:443', mirrors: ['http://10.0.0.1:81']}\n")
	for at, want := range map[string]bool{
		"http://[fd00::2]/y": true, "http://[fd00:0:0:0:0:0:0:2]:80/": true, "http://[fd00::3]/": false, "http://[fd00::2]:81/": false,
		"https://[fd00::2]/": false, "http://[fd00::2%25eth0]/": false, "https://files.example/z": true, "http://10.0.0.1:81/": true, "http://10.0.0.1/": false,
	} {
		u, err := url.Parse(at)
		if err != nil {
			t.Fatal(err)
		}
		if cfg.hasServer(u) != want {
			t.Errorf("%s is the server of a remote: want %t", at, want)
		}
	}
}
