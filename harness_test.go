package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

var originFlag = flag.String("origin", "", "serve the tests' origin at this address, for trying things by hand")

// TestMain is the test binary's three lives: the tests, a child that is the
// real server (crash_test.go), and an origin for hands.
func TestMain(m *testing.M) {
	if os.Getenv(childMark) != "" {
		os.Exit(childMain())
	}
	flag.Parse()
	if *originFlag != "" {
		os.Exit(serveOriginByHand(*originFlag))
	}
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("tests ask no name server")
	}}
	http.DefaultTransport.(*http.Transport).DialContext = onlyLoopback(new(net.Dialer))
	code := m.Run()
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	if left := leftGoroutines(); code == 0 && left != "" {
		fmt.Fprintf(os.Stderr, "goroutines outlive the tests:\n\n%s\n", left)
		code = 1
	}
	os.Exit(code)
}

// onlyLoopback dials this machine and refuses all else: no test leaves it.
func onlyLoopback(d *net.Dialer) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		host, _, err := net.SplitHostPort(address)
		if ip := net.ParseIP(host); err == nil && host != "localhost" && ip != nil && !ip.IsLoopback() {
			return nil, fmt.Errorf("tests dial loopback only, not %s", address)
		}
		return d.DialContext(ctx, network, address)
	}
}

// leftGoroutines are the stacks of goroutines that nobody ended, once those
// that are just ending have had their time.
func leftGoroutines() string {
	var left []string
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		buf := make([]byte, 4<<20)
		buf = buf[:runtime.Stack(buf, true)]
		left = left[:0]
		for i, g := range strings.Split(string(buf), "\n\n") {
			// The first is this one; a signal.Notify leaves its loop for ever.
			if i > 0 && !strings.Contains(g, "os/signal.") && !strings.Contains(g, "testing.runFuzz") {
				left = append(left, g)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return strings.Join(left, "\n\n")
		}
	}
}

// tester is a server under test: the real wiring over a disk store in a
// temporary directory, in front of an origin that does as it is told, with a
// clock that can be advanced. The remote is called r; its path /api/r/x is the
// origin's /x.
type tester struct {
	testing.TB
	origin *testOrigin
	server *server
	api    *api
	cache  *cache
	disk   *diskStore
	up     *upstream
	clock  *testClock
	logs   *testLogs
	url    string // of the server

	setup  setup
	wants  atomic.Pointer[func(*fileRequest)] // see digested
	front  *http.Server
	client *http.Transport
	dials  map[string]string // address that a test has a name for -> where it is
	ends   []func()
}

// setup is what a tester is made of beyond the usual.
type setup struct {
	yaml    string            // the whole remotes.yaml with ORIGIN for the origin's URL; "": one remote r
	keys    []string          // of r
	env     map[string]string // of the server
	dir     string            // DATA_DIR; "": a new one
	bubble  bool              // run in a synctest bubble: pipes instead of sockets, the bubble's clock
	objects func(objects) objects
	spools  func(*spoolSpace)
	tls     bool // the origin speaks TLS

	unserved bool // no front: the test calls the handler
}

// newTester starts a server whose remote r has these keys (lines of YAML)
// beside its base_url.
func newTester(t testing.TB, keys ...string) *tester {
	t.Helper()
	return setup{keys: keys}.start(t)
}

// inBubble runs a test on the bubble's clock, where waiting takes no time.
func inBubble(t *testing.T, test func(t *testing.T)) {
	t.Parallel()
	synctest.Test(t, test)
}

// newBubbleTester is newTester within inBubble.
func newBubbleTester(t testing.TB, keys ...string) *tester {
	t.Helper()
	return setup{keys: keys, bubble: true}.start(t)
}

func (s setup) start(t testing.TB) *tester {
	t.Helper()
	if s.dir == "" {
		s.dir = filepath.Join(t.TempDir(), "data")
	}
	tt := &tester{TB: t, setup: s, clock: &testClock{}, logs: &testLogs{}, dials: map[string]string{}}
	t.Cleanup(func() {
		if t.Failed() && testing.Verbose() {
			t.Logf("the server said:\n%s", tt.logs)
		}
	})
	tt.origin = newTestOrigin(t, s)
	tt.begin()
	t.Cleanup(tt.end)
	return tt
}

// begin wires a server over DATA_DIR and opens its front.
func (tt *tester) begin() {
	tt.Helper()
	env := map[string]string{"DATA_DIR": tt.setup.dir, "LOG_LEVEL": "debug", "LOG_FORMAT": "json", "MIN_FREE": "1MiB"}
	for k, v := range tt.setup.env {
		env[k] = v
	}
	lookup := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	set, err := parseSettings(lookup)
	if err != nil {
		tt.Fatal(err)
	}
	s := &server{set: set, env: lookup, log: newLogger(set, tt.logs)}
	s.config.Store(tt.parse(tt.yaml()))
	if s.stores, err = openStores(set, time.Now, s.log); err != nil {
		tt.Fatal(err)
	}
	tt.server, tt.api = s, s.newHandler().(*api)
	tt.cache, tt.disk = s.cache, s.stores.disk
	tt.useClock()
	tt.cache.upstream = tt.newUpstream(s.log)
	tt.up = tt.cache.upstream
	if tt.setup.objects != nil {
		tt.cache.objects = tt.setup.objects(tt.cache.objects)
	}
	if tt.setup.spools != nil {
		tt.setup.spools(tt.cache.space)
	}
	for _, b := range s.stores.backends {
		s.checkBackend(b)
	}
	if err := s.stores.embedded.reconcile(context.Background(), s.stores.disk); err != nil {
		tt.Fatal(err)
	}
	if !s.ownsDataDir {
		tt.Fatal("DATA_DIR is still held by another server")
	}
	if tt.setup.unserved {
		tt.ends = append(tt.ends, tt.closer())
		return
	}
	tt.serve()
}

func (tt *tester) useClock() {
	now := tt.clock.now
	tt.cache.now, tt.api.now, tt.api.responder.now = now, now, now
}

// yaml is the remotes.yaml in force at start.
func (tt *tester) yaml() string {
	if tt.setup.yaml != "" {
		return strings.ReplaceAll(tt.setup.yaml, "ORIGIN", tt.origin.url)
	}
	return remoteYAML(tt.origin.url, tt.setup.keys...)
}

// remoteYAML is a file with one remote r.
func remoteYAML(base string, keys ...string) string {
	text := "remotes:\n  r:\n    base_url: " + base + "\n"
	for _, k := range keys {
		text += "    " + strings.ReplaceAll(k, "\n", "\n    ") + "\n"
	}
	return text
}

func (tt *tester) parse(yaml string) *config {
	tt.Helper()
	cfg, err := parseConfig("remotes.yaml", []byte(yaml), func(string) (string, bool) { return "", false })
	if err != nil {
		tt.Fatal(err)
	}
	return cfg
}

// configure puts another configuration into force, as a reload does. What is
// stored stays.
func (tt *tester) configure(yaml string) {
	tt.Helper()
	tt.server.config.Store(tt.parse(yaml))
}

// moveUpstream gives r another base_url and keys.
func (tt *tester) moveUpstream(base string, keys ...string) {
	tt.Helper()
	tt.configure(remoteYAML(base, keys...))
}

func (tt *tester) newUpstream(log *slog.Logger) *upstream {
	up := newUpstream(func(strict bool) http.RoundTripper {
		tr := newTransport(strict)
		tr.Proxy = nil
		tr.DialContext = tt.dialer(strict)
		tr.TLSClientConfig = tt.origin.trust(tr.TLSClientConfig)
		return tr
	}, tt.clock.now, log, tt.api.metrics)
	up.proxyFor = func(*http.Request) (*url.URL, error) { return nil, nil }
	// 127.0.0.1 plays the outside world, the rest of 127/8 the inside.
	up.isPrivate = func(a netip.Addr) bool { return a != outside && isPrivateAddress(a) }
	up.version = "test"
	return up
}

var outside = netip.MustParseAddr("127.0.0.1")

// dialer dials origins for the server: names that the test gave out lead to
// their places, and who is down refuses.
func (tt *tester) dialer(strict bool) func(ctx context.Context, network, address string) (net.Conn, error) {
	dial := onlyLoopback(new(net.Dialer))
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if at, ok := tt.dials[address]; ok {
			address = at
		}
		if ap, err := netip.ParseAddrPort(address); strict && (err != nil || ap.Addr() != outside) {
			if err := refusePrivate(ctx, network, address, nil); err != nil {
				return nil, err
			}
		}
		return tt.origin.dial(ctx, address, dial)
	}
}

// serve opens the server's front: a socket, or pipes in a bubble.
func (tt *tester) serve() {
	tt.Helper()
	lis := tt.listen()
	tt.url = "http://" + lis.Addr().String()
	tt.front = &http.Server{Handler: tt, MaxHeaderBytes: 64 << 10, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	tt.client = &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 256, DialContext: onlyLoopback(new(net.Dialer))}
	if p, ok := lis.(*pipeListener); ok {
		tt.url = "http://front"
		tt.client.DialContext = p.DialContext
	}
	done := make(chan struct{})
	front, client := tt.front, tt.client
	go func() {
		defer close(done)
		_ = front.Serve(lis)
	}()
	tt.ends = append(tt.ends, func() {
		client.CloseIdleConnections()
		_ = front.Close()
		<-done
	}, tt.closer())
}

// closer ends what begin has wired.
func (tt *tester) closer() func() {
	server, up := tt.server, tt.up
	return func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // whatever still fills is dropped
		server.cache.Close(ctx)
		_ = server.stores.Close()
		up.Close()
	}
}

// ServeHTTP is the server's front.
func (tt *tester) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path, below := strings.CutPrefix(r.URL.EscapedPath(), "/api/r/")
	change := tt.wants.Load()
	if change == nil || !below {
		tt.api.ServeHTTP(w, r)
		return
	}
	tt.api.responder.serveRequest(w, r, func(w *response, r *http.Request) error {
		t, err := tt.api.config().resolveTarget("r", path, r.URL.RawQuery)
		if err != nil {
			return err
		}
		file := fileRequest{target: t}
		(*change)(&file)
		return tt.cache.serveFile(w, r, file)
	}, writeJSONError)
}

// digested makes every request below /api/r/ one for what change makes of it,
// as the registry asks for bodies with a digest.
func (tt *tester) digested(change func(*fileRequest)) { tt.wants.Store(&change) }

func (tt *tester) listen() net.Listener {
	tt.Helper()
	if tt.setup.bubble {
		return newPipeListener()
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tt.Fatal(err)
	}
	return lis
}

// end stops the server; the origin is still there.
func (tt *tester) end() {
	for _, f := range tt.ends {
		f()
	}
	tt.ends = nil
}

// restart stops the server cleanly and starts another over the same DATA_DIR.
func (tt *tester) restart() {
	tt.Helper()
	tt.settle()
	cfg := tt.server.config.Load()
	tt.end()
	tt.begin()
	tt.server.config.Store(cfg)
}

// advance moves the clock.
func (tt *tester) advance(d time.Duration) {
	if tt.setup.bubble {
		time.Sleep(d)
		synctest.Wait()
		return
	}
	tt.clock.advance(d)
}

// down makes the origin refuse connections; up ends that, and what the breaker
// remembers of it.
func (tt *tester) down() { tt.origin.setDown(true) }

func (tt *tester) upAgain() {
	tt.origin.setDown(false)
	tt.advance(downTime + time.Second)
}

// testClock is the time plus what tests advanced it by. It is never in the
// past, because sockets' deadlines are made with it.
type testClock struct{ offset atomic.Int64 }

func (c *testClock) now() time.Time          { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *testClock) advance(d time.Duration) { c.offset.Add(int64(d)) }

// testLogs collects what the server logs.
type testLogs struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (l *testLogs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *testLogs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// lines are those that hold text.
func (l *testLogs) lines(text string) (lines []string) {
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	return lines
}

// wantLog fails unless some line holds text.
func (tt *tester) wantLog(text string) {
	tt.Helper()
	// The line of a request is written after its answer.
	tt.eventually("a log line with "+text, func() bool { return len(tt.logs.lines(text)) > 0 })
}

// eventually waits for what needs no more doing of the test's.
func (tt *tester) eventually(what string, is func() bool) {
	tt.Helper()
	awaitThat(tt, what, is)
}

// awaitThat polls for what only the world can bring about.
func awaitThat(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// settle waits for fills whose bodies are all there to be stored.
func (tt *tester) settle() {
	c := tt.cache
	if c == nil {
		return // a child's
	}
	for {
		var wait chan struct{}
		for _, f := range c.fills.all() {
			written, size := f.progress()
			f.mu.Lock()
			if f.phase != phaseDone && (f.phase >= phaseComplete || f.rec != nil && written == size) {
				wait = f.changed
			}
			f.mu.Unlock()
		}
		if wait == nil {
			return
		}
		<-wait
	}
}

// all are the fills in the table.
func (t *fillTable) all() (all []*fill) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, fills := range t.byKey {
		all = append(all, fills...)
	}
	return all
}

// fillOf is the fill of /api/r/path that goes on, or nil.
func (tt *tester) fillOf(path string) *fill {
	for _, f := range tt.cache.fills.all() {
		if f.file.path == path {
			return f
		}
	}
	return nil
}

// flying is how many fills go on.
func (tt *tester) flying() int { return len(tt.cache.fills.all()) }

// filled is how many bytes of /api/r/path have arrived so far, -1 when no fill
// of it goes on.
func (tt *tester) filled(path string) int64 {
	f := tt.fillOf(path)
	if f == nil {
		return -1
	}
	written, _ := f.progress()
	return written
}

// waiting is how many clients a fill of /api/r/path has.
func (tt *tester) waiting(path string) int { return tt.cache.fills.clientsOf(tt.fillOf(path)) }

// clientsOf is how many clients f has; nil has none.
func (t *fillTable) clientsOf(f *fill) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f == nil {
		return 0
	}
	return f.clients
}

// got is an answer with its body. Its verbs chain.
type got struct {
	testing.TB
	what   string
	status int
	header http.Header
	length int64
	text   string
	err    error // reading the answer or its body
}

// get asks for a path of the server; headers are "Name: value".
func (tt *tester) get(path string, headers ...string) *got {
	tt.Helper()
	return tt.send(http.MethodGet, path, nil, headers...)
}

func (tt *tester) head(path string, headers ...string) *got {
	tt.Helper()
	return tt.send(http.MethodHead, path, nil, headers...)
}

func (tt *tester) put(path, text string, headers ...string) *got {
	tt.Helper()
	return tt.send(http.MethodPut, path, strings.NewReader(text), headers...)
}

func (tt *tester) delete(path string, headers ...string) *got {
	tt.Helper()
	return tt.send(http.MethodDelete, path, nil, headers...)
}

// send asks and reads the whole answer.
func (tt *tester) send(method, path string, body io.Reader, headers ...string) *got {
	tt.Helper()
	s := tt.start(context.Background(), method, path, body, headers...)
	defer s.leave()
	g := s.rest()
	tt.settle()
	return g
}

// stream is an answer whose body is read by and by.
type stream struct {
	*got
	res    *http.Response
	cancel context.CancelFunc
}

// open begins a GET and returns when its headers are there.
func (tt *tester) open(path string, headers ...string) *stream {
	tt.Helper()
	return tt.start(context.Background(), http.MethodGet, path, nil, headers...)
}

func (tt *tester) start(ctx context.Context, method, path string, body io.Reader, headers ...string) *stream {
	tt.Helper()
	limit := time.Minute // who waits for ever is to fail, by name
	if tt.setup.bubble {
		limit = 1000 * time.Hour
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	req, err := http.NewRequestWithContext(ctx, method, tt.url, body)
	if err != nil {
		tt.Fatal(err)
	}
	// The path goes out as the test wrote it.
	req.URL.Opaque, req.URL.RawQuery, _ = strings.Cut(path, "?")
	req.Header.Set("User-Agent", "client")
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	s := &stream{got: &got{TB: tt.TB, what: method + " " + path}, cancel: cancel}
	res, err := tt.client.RoundTrip(req)
	if err != nil {
		s.err = err
		return s
	}
	s.res, s.status, s.header, s.length = res, res.StatusCode, res.Header, res.ContentLength
	return s
}

// read reads exactly n bytes.
func (s *stream) read(n int) string {
	s.Helper()
	if s.err != nil {
		s.Fatalf("%s: %v", s.what, s.err)
	}
	p := make([]byte, n)
	k, err := io.ReadFull(s.res.Body, p)
	if err != nil {
		s.Fatalf("%s: %v after %d of %d bytes", s.what, err, k, n)
	}
	s.text += string(p)
	return string(p)
}

// rest reads to the end.
func (s *stream) rest() *got {
	if s.err == nil {
		var b []byte
		b, s.err = io.ReadAll(s.res.Body)
		s.text += string(b)
	}
	return s.got
}

// leave hangs up.
func (s *stream) leave() {
	s.cancel()
	if s.res != nil {
		_ = s.res.Body.Close()
	}
}

func (g *got) ok() bool {
	g.Helper()
	if g.err != nil {
		g.Errorf("%s: %v after %d bytes", g.what, g.err, len(g.text))
	}
	return g.err == nil
}

func (g *got) wantStatus(status int) *got {
	g.Helper()
	if g.ok() && g.status != status {
		g.Errorf("%s: status %d, want %d (%.200s)", g.what, g.status, status, g.text)
	}
	return g
}

func (g *got) wantBody(text string) *got {
	g.Helper()
	switch {
	case !g.ok() || g.text == text:
	case len(text)+len(g.text) < 400:
		g.Errorf("%s: body %q, want %q", g.what, g.text, text)
	default:
		g.Errorf("%s: a body of %d bytes that differs from the %d bytes wanted at %d", g.what, len(g.text), len(text), firstDifference(g.text, text))
	}
	return g
}

func firstDifference(a, b string) int {
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

// wantDetail is an error's status and a part of its text.
func (g *got) wantDetail(status int, part string) *got {
	g.Helper()
	g.wantStatus(status)
	if !strings.HasPrefix(g.text, `{"detail":`) || !strings.Contains(g.text, part) {
		g.Errorf("%s: answer %q, want JSON with a detail that says %q", g.what, g.text, part)
	}
	return g
}

// wantHeader wants a header's value; "" wants none.
func (g *got) wantHeader(name, value string) *got {
	g.Helper()
	if v := g.header.Get(name); g.ok() && v != value {
		g.Errorf("%s: %s: %q, want %q", g.what, name, v, value)
	}
	return g
}

// wantAborted wants an answer that ended in the middle, noticeably.
func (g *got) wantAborted() *got {
	g.Helper()
	if g.err == nil {
		g.Errorf("%s: a clean end after %d bytes (status %d), want an aborted connection", g.what, len(g.text), g.status)
	}
	return g
}

func (g *got) wantFrom(source, status string) *got {
	g.Helper()
	if !g.ok() {
		return g
	}
	if s := g.header.Get("Cache-Status"); g.header.Get("X-Artifact-Source") != source || !cacheStatusIs(s, status) {
		g.Errorf("%s: source %q, Cache-Status %q (status %d), want %q, %q", g.what, g.header.Get("X-Artifact-Source"), s, g.status, source, status)
	}
	return g
}

// cacheStatusIs compares parameters; ttl=N stands for any not negative number,
// ttl=-N for any negative one.
func cacheStatusIs(got, want string) bool {
	g, w := strings.Split(got, "; "), strings.Split("artifactapi; "+want, "; ")
	if len(g) != len(w) {
		return false
	}
	for i := range g {
		value, isTTL := strings.CutPrefix(g[i], "ttl=")
		n, err := strconv.Atoi(value)
		switch w[i] {
		case "ttl=N":
			if !isTTL || err != nil || n < 0 {
				return false
			}
		case "ttl=-N":
			if !isTTL || err != nil || n >= 0 {
				return false
			}
		default:
			if g[i] != w[i] {
				return false
			}
		}
	}
	return true
}

// The ways in which a file can be answered. wantHit takes a copy with a TTL and
// one that is for ever alike.
func (g *got) wantHit() *got {
	g.Helper()
	if strings.Contains(g.header.Get("Cache-Status"), "ttl=") {
		return g.wantFrom("cache", "hit; ttl=N")
	}
	return g.wantFrom("cache", "hit")
}
func (g *got) wantMiss() *got   { g.Helper(); return g.wantFrom("remote", "fwd=miss; stored") }
func (g *got) wantJoined() *got { g.Helper(); return g.wantFrom("remote", "fwd=miss; collapsed") }
func (g *got) wantRevalidated() *got {
	g.Helper()
	return g.wantFrom("cache", "fwd=stale; fwd-status=304")
}
func (g *got) wantRefetched() *got {
	g.Helper()
	return g.wantFrom("remote", "fwd=stale; fwd-status=200; stored")
}

// wantUnstored is a file that was passed on and not kept.
func (g *got) wantUnstored() *got { g.Helper(); return g.wantFrom("remote", "fwd=miss") }
func (g *got) wantStale() *got {
	g.Helper()
	return g.wantFrom("cache", "hit; ttl=-N; detail=unreachable")
}

// wantStored says whether the store has a body for /api/r/path.
func (tt *tester) wantStored(path string, stored bool) {
	tt.Helper()
	t, err := tt.server.config.Load().resolveTarget("r", path, "")
	if err != nil {
		tt.Fatal(err)
	}
	obj, err := tt.disk.open(context.Background(), t.key(), 0)
	if err == nil {
		obj.body.Close()
	}
	if (err == nil) != stored {
		tt.Errorf("%s is stored: %v, want %v", path, err == nil, stored)
	}
}

// wantRequests says how often the origin was asked; what is "/path" or
// "METHOD /path".
func (tt *tester) wantRequests(what string, n int) {
	tt.Helper()
	if k := tt.origin.requests(what); k != n {
		tt.Errorf("the origin got %d requests for %s, want %d: %v", k, what, n, tt.origin.all())
	}
}

// wantNoSpools says that nothing temporary is left behind.
func (tt *tester) wantNoSpools() {
	tt.Helper()
	tt.eventually("the spools to be gone", func() bool {
		names, _ := filepath.Glob(tt.disk.dir + "/.spool/*")
		return len(names) == 0
	})
}

// noise is n bytes of which each eight differ from any others: a shifted, mixed
// or repeated piece shows.
func noise(salt uint64, n int) string {
	b := make([]byte, 0, n+8)
	for i := uint64(1); len(b) < n; i++ {
		x := (i + salt<<40) * 0x9E3779B97F4A7C15
		b = binary.LittleEndian.AppendUint64(b, x^x>>29)
	}
	return string(b[:n])
}

// testOrigin is an upstream that does as it is told.
type testOrigin struct {
	testing.TB
	url   string
	serve *http.Server
	tls   *tlsPair
	pipes *pipeListener
	dead  string // an address that refuses connections
	ended chan struct{}

	mu      sync.Mutex // guards what follows
	down    bool
	conns   map[net.Conn]bool
	trouble http.HandlerFunc // answers everything
	files   map[string]*testFile
	seen    []*seenRequest
	wake    chan struct{} // closed when seen grows
}

// seenRequest is one that reached an origin.
type seenRequest struct {
	method, uri, host string
	header            http.Header
}

// newTestOrigin starts an origin; its test ends it.
func newTestOrigin(t testing.TB, s setup) *testOrigin {
	t.Helper()
	o := &testOrigin{TB: t, files: map[string]*testFile{}, conns: map[net.Conn]bool{}, ended: make(chan struct{}), wake: make(chan struct{})}
	var lis net.Listener
	if s.bubble {
		o.pipes = newPipeListener()
		lis, o.url = o.pipes, "http://127.0.0.1:80"
	} else {
		var err error
		if lis, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		o.url = "http://" + lis.Addr().String()
		o.dead = refusingAddress(t)
	}
	if s.tls {
		o.tls = newTLSPair(t)
		lis, o.url = o.tls.listen(lis), strings.Replace(o.url, "http:", "https:", 1)
	}
	o.serve = &http.Server{Handler: o, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0), ConnState: o.track}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = o.serve.Serve(lis)
	}()
	t.Cleanup(func() {
		close(o.ended)
		_ = o.serve.Close()
		<-done
	})
	return o
}

// another is a second origin of the same test.
func (tt *tester) another() *testOrigin {
	tt.Helper()
	if tt.setup.bubble {
		tt.Fatal("a bubble has one origin")
	}
	return newTestOrigin(tt.TB, setup{})
}

// refusingAddress is bound and does not listen: nobody else gets the port, and
// the kernel refuses connections.
func refusingAddress(t testing.TB) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
		t.Cleanup(func() { syscall.Close(fd) })
		err = syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}
	var at syscall.Sockaddr
	if err == nil {
		at, err = syscall.Getsockname(fd)
	}
	if err != nil {
		t.Fatal(err)
	}
	return "127.0.0.1:" + strconv.Itoa(at.(*syscall.SockaddrInet4).Port)
}

// dial is how the server under test reaches address.
func (o *testOrigin) dial(ctx context.Context, address string, dial func(context.Context, string, string) (net.Conn, error)) (net.Conn, error) {
	o.mu.Lock()
	down := o.down
	o.mu.Unlock()
	_, home, _ := strings.Cut(o.url, "://")
	switch {
	case o.pipes != nil && down:
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	case o.pipes != nil:
		return o.pipes.DialContext(ctx, "tcp", address)
	case down && address == home:
		return dial(ctx, "tcp", o.dead)
	}
	return dial(ctx, "tcp", address)
}

// setDown makes it refuse connections, and breaks those there are.
func (o *testOrigin) setDown(down bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.down = down
	for c := range o.conns {
		_ = c.Close()
	}
}

func (o *testOrigin) track(c net.Conn, state http.ConnState) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if state == http.StateClosed || state == http.StateHijacked {
		delete(o.conns, c)
		return
	}
	o.conns[c] = true
}

// troubled makes every request meet h; nil ends that.
func (o *testOrigin) troubled(h http.HandlerFunc) {
	o.mu.Lock()
	o.trouble = h
	o.mu.Unlock()
}

// stalls accepts and never answers.
func (o *testOrigin) stalls(w http.ResponseWriter, r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-o.ended:
	}
	panic(http.ErrAbortHandler)
}

// resets ends the connection with RST instead of an answer.
func (o *testOrigin) resets(w http.ResponseWriter, r *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	if c, ok := conn.(*net.TCPConn); ok {
		_ = c.SetLinger(0)
	}
	conn.Close()
}

// answers says status to everything.
func answers(status int, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for _, h := range headers {
			name, value, _ := strings.Cut(h, ": ")
			w.Header().Set(name, value)
		}
		w.WriteHeader(status)
		_, _ = fmt.Fprintf(w, "upstream says %d", status)
	}
}

func (o *testOrigin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.mu.Lock()
	o.seen = append(o.seen, &seenRequest{r.Method, r.RequestURI, r.Host, r.Header.Clone()})
	close(o.wake)
	o.wake = make(chan struct{})
	trouble, f := o.trouble, o.files[r.RequestURI]
	o.mu.Unlock()
	switch {
	case trouble != nil:
		trouble(w, r)
	case f != nil:
		f.serve(w, r)
	default:
		answers(http.StatusNotFound)(w, r)
	}
}

// requests counts those for "/path" or "METHOD /path".
func (o *testOrigin) requests(what string) (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range o.seen {
		if s.uri == what || s.method+" "+s.uri == what {
			n++
		}
	}
	return n
}

// awaitRequests waits for the nth request for what.
func (o *testOrigin) awaitRequests(what string, n int) {
	o.Helper()
	timeout := time.After(20 * time.Second)
	for {
		o.mu.Lock()
		wake := o.wake
		o.mu.Unlock()
		if o.requests(what) >= n {
			return
		}
		select {
		case <-wake:
		case <-timeout:
			o.Fatalf("waited in vain for request %d for %s: %v", n, what, o.all())
		}
	}
}

// last is the latest request for "/path" or "METHOD /path".
func (o *testOrigin) last(what string) *seenRequest {
	o.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := len(o.seen) - 1; i >= 0; i-- {
		if s := o.seen[i]; s.uri == what || s.method+" "+s.uri == what {
			return s
		}
	}
	o.Fatalf("no request for %s reached the origin", what)
	return nil
}

// all is what was asked, in order.
func (o *testOrigin) all() (lines []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range o.seen {
		line := s.method + " " + s.uri
		if r := s.header.Get("Range"); r != "" {
			line += " " + r
		}
		lines = append(lines, line)
	}
	return lines
}

func (o *testOrigin) forget() {
	o.mu.Lock()
	o.seen = nil
	o.mu.Unlock()
}

// testFile is a file of an origin with its faults. Its verbs chain and are
// called before it is asked for, or by anyone at any time.
type testFile struct {
	o  *testOrigin
	mu sync.Mutex // guards what follows
	filePlan
}

// filePlan is how a file is answered.
type filePlan struct {
	text     string
	header   http.Header
	modified time.Time
	status   int // instead of 200 with the text
	act      http.HandlerFunc
	headSays int  // instead of an answer to HEAD
	noRange  bool // Range is ignored
	chunks   bool
	closes   bool  // neither length nor chunks
	lie      int64 // what Content-Length says too much
	breaks   []int64
	gates    []*testGate
}

// testGate holds bodies at an offset until it is opened.
type testGate struct {
	at   int64
	open chan struct{}
}

var longAgo = time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC)

// file puts a file there, or another in its place. It has a Last-Modified, no
// ETag, and ranges.
func (o *testOrigin) file(path, text string) *testFile {
	f := &testFile{o: o, filePlan: filePlan{text: text, header: http.Header{}, modified: longAgo}}
	o.mu.Lock()
	o.files[path] = f
	o.mu.Unlock()
	return f
}

// remove takes a file away: 404.
func (o *testOrigin) remove(path string) {
	o.mu.Lock()
	delete(o.files, path)
	o.mu.Unlock()
}

func (f *testFile) set(change func()) *testFile {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	return f
}

func (f *testFile) etag(tag string) *testFile { return f.says("ETag", tag) }
func (f *testFile) says(name, value string) *testFile {
	return f.set(func() { f.header.Set(name, value) })
}
func (f *testFile) at(t time.Time) *testFile          { return f.set(func() { f.modified = t }) }
func (f *testFile) undated() *testFile                { return f.set(func() { f.modified = time.Time{} }) }
func (f *testFile) answering(status int) *testFile    { return f.set(func() { f.status = status }) }
func (f *testFile) refusesHEAD(status int) *testFile  { return f.set(func() { f.headSays = status }) }
func (f *testFile) acts(h http.HandlerFunc) *testFile { return f.set(func() { f.act = h }) }
func (f *testFile) noRanges() *testFile               { return f.set(func() { f.noRange = true }) }
func (f *testFile) chunked() *testFile                { return f.set(func() { f.chunks = true }) }
func (f *testFile) closeDelimited() *testFile         { return f.set(func() { f.closes = true }) }
func (f *testFile) lying(by int64) *testFile          { return f.set(func() { f.lie = by }) }

// cut breaks the next answers off, each at the next of these offsets in the
// file.
func (f *testFile) cut(offsets ...int64) *testFile {
	return f.set(func() { f.breaks = append(f.breaks, offsets...) })
}

// stallAt holds bodies back at an offset until release is called.
func (f *testFile) stallAt(n int64) (release func()) {
	g := &testGate{at: n, open: make(chan struct{})}
	f.set(func() { f.gates = append(f.gates, g) })
	return sync.OnceFunc(func() { close(g.open) })
}

// faults are those of one answer.
func (f *testFile) faults(w http.ResponseWriter, r *http.Request) *faultyWriter {
	fw := &faultyWriter{ResponseWriter: w, r: r, o: f.o, cutAt: -1, gates: f.gates}
	if len(f.breaks) > 0 && r.Method == http.MethodGet {
		fw.cutAt, f.breaks = f.breaks[0], f.breaks[1:]
	}
	return fw
}

func (f *testFile) serve(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	file := f.filePlan
	file.header = file.header.Clone()
	fw := f.faults(w, r)
	f.mu.Unlock()
	for k, v := range file.header {
		w.Header()[k] = v
	}
	if w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "application/x-origin")
	}
	if !file.modified.IsZero() {
		w.Header().Set("Last-Modified", file.modified.Format(http.TimeFormat))
	}
	if file.noRange {
		r.Header.Del("Range")
	}
	switch {
	case file.act != nil:
		file.act(w, r)
	case file.headSays != 0 && r.Method == http.MethodHead:
		w.WriteHeader(file.headSays)
	case file.status != 0:
		answers(file.status)(w, r)
	case file.closes:
		file.serveRaw(fw, "")
	case file.lie < 0: // net/http would not write what is too much
		file.serveRaw(fw, fmt.Sprintf("Content-Length: %d\r\n", int64(len(file.text))+file.lie))
	case file.lie > 0:
		w.Header().Set("Content-Length", strconv.FormatInt(int64(len(file.text))+file.lie, 10))
		_, _ = io.WriteString(fw, file.text)
		panic(http.ErrAbortHandler)
	case file.chunks && r.Header.Get("Range") == "":
		_ = http.NewResponseController(w).Flush()
		if r.Method != http.MethodHead {
			_, _ = io.WriteString(fw, file.text)
		}
	default:
		if file.header.Get("Content-Encoding") != "" && r.Header.Get("Range") == "" {
			w.Header().Set("Content-Length", strconv.Itoa(len(file.text))) // ServeContent would not
		}
		http.ServeContent(fw, r, "", file.modified, strings.NewReader(file.text))
	}
}

// serveRaw answers with what net/http would not.
func (f *filePlan) serveRaw(w *faultyWriter, length string) {
	header := w.Header().Clone()
	conn, buf, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	_, _ = buf.WriteString("HTTP/1.1 200 OK\r\n" + length)
	_ = header.Write(buf)
	_, _ = buf.WriteString("\r\n")
	text := f.text
	if w.cutAt >= 0 {
		text = text[:w.cutAt]
	}
	_, _ = buf.WriteString(text)
	_ = buf.Flush()
}

// faultyWriter counts the bytes of a body and breaks off or waits where it was
// told to. Offsets are the file's.
type faultyWriter struct {
	http.ResponseWriter
	r     *http.Request
	o     *testOrigin
	off   int64
	begun bool
	cutAt int64 // -1: never
	gates []*testGate
}

func (w *faultyWriter) WriteHeader(status int) {
	if first, _, _, ok := parseContentRange(w.Header().Get("Content-Range")); ok && status == http.StatusPartialContent {
		w.off = first
	}
	w.begun = true
	w.ResponseWriter.WriteHeader(status)
}

func (w *faultyWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		step := int64(len(p))
		for _, g := range w.gates {
			if g.at == w.off {
				w.wait(g)
			} else if g.at > w.off {
				step = min(step, g.at-w.off)
			}
		}
		if w.cutAt == w.off {
			_ = http.NewResponseController(w.ResponseWriter).Flush()
			panic(http.ErrAbortHandler)
		}
		if w.cutAt > w.off {
			step = min(step, w.cutAt-w.off)
		}
		k, err := w.ResponseWriter.Write(p[:step])
		n += k
		w.off += int64(k)
		if err != nil {
			return n, err
		}
		p = p[k:]
	}
	if w.cutAt == w.off {
		_ = http.NewResponseController(w.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, nil
}

func (w *faultyWriter) wait(g *testGate) {
	_ = http.NewResponseController(w.ResponseWriter).Flush()
	select {
	case <-g.open:
	case <-w.r.Context().Done():
		panic(http.ErrAbortHandler)
	case <-w.o.ended:
		panic(http.ErrAbortHandler)
	}
}

// pipeListener is a network of one place, for bubbles: synctest can tell that
// a goroutine waits for a pipe, and not that it waits for a socket.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

func (l *pipeListener) DialContext(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.done:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// tlsPair is a certificate for 127.0.0.1 and its key.
type tlsPair struct {
	certPEM, keyPEM []byte
	cert            tls.Certificate
	pool            *x509.CertPool
}

func newTLSPair(t testing.TB) *tlsPair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p := &tlsPair{
		certPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		keyPEM:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
		pool:    x509.NewCertPool(),
	}
	if p.cert, err = tls.X509KeyPair(p.certPEM, p.keyPEM); err != nil {
		t.Fatal(err)
	}
	p.pool.AppendCertsFromPEM(p.certPEM)
	return p
}

func (p *tlsPair) listen(l net.Listener) net.Listener {
	return tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{p.cert}})
}

// trust adds the origin's certificate to a client's configuration.
func (o *testOrigin) trust(cfg *tls.Config) *tls.Config {
	if o.tls == nil {
		return cfg
	}
	cfg = cfg.Clone()
	cfg.RootCAs = o.tls.pool
	return cfg
}

// serveOriginByHand is the test binary with -origin=ADDRESS.
func serveOriginByHand(address string) int {
	o := &testOrigin{files: map[string]*testFile{}, conns: map[net.Conn]bool{}, ended: make(chan struct{}), wake: make(chan struct{})}
	big := noise(1, 64<<20)
	half := int64(len(big) / 2)
	o.file("/hello.txt", "hello\n").etag(`"1"`)
	o.file("/big.bin", big).etag(`"big"`)
	o.file("/cut.bin", big).etag(`"cut"`).cut(half, half, half, half, half, half, half, half)
	o.file("/once.bin", big).etag(`"once"`).cut(half)
	o.file("/no-ranges.bin", big).noRanges().cut(half, half)
	o.file("/chunked.bin", big).chunked()
	o.file("/close.bin", big).closeDelimited()
	o.file("/long.bin", "short").lying(10)
	o.file("/503", "").answering(http.StatusServiceUnavailable)
	o.file("/loop", "").acts(http.RedirectHandler("/loop", http.StatusFound).ServeHTTP)
	o.file("/moved", "").acts(http.RedirectHandler("/hello.txt", http.StatusFound).ServeHTTP)
	o.file("/stall", "").acts(o.stalls)
	o.file("/reset", "").acts(o.resets)
	for path := range o.files {
		fmt.Println("http://" + address + path)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	srv := &http.Server{Addr: address, Handler: o}
	failed := make(chan error, 1)
	go func() { failed <- srv.ListenAndServe() }()
	select {
	case err := <-failed:
		fmt.Fprintln(os.Stderr, err)
		return 1
	case <-ctx.Done():
	}
	close(o.ended)
	_ = srv.Close()
	return 0
}
