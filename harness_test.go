// harness_test.go: the tester, a server under test that is wired as the real
// one is, and the words that tests are written in. The upstream that it asks is
// in origin_test.go.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
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
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
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
	s.useConfig(tt.parse(tt.yaml()))
	s.stores = openStores(set, time.Now, s.log)
	tt.server, tt.api = s, s.newHandler().(*api)
	tt.cache, tt.disk = s.cache, s.stores.disk
	tt.useClock()
	tt.cache.upstream = tt.newUpstream(s.log)
	tt.up = tt.cache.upstream
	if tt.setup.objects != nil {
		tt.cache.useObjects(tt.setup.objects(tt.cache.objects))
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
	if s.stores.disk.owner == nil {
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
	tt.server.useConfig(tt.parse(yaml))
}

// moveUpstream gives r another base_url and keys.
func (tt *tester) moveUpstream(base string, keys ...string) {
	tt.Helper()
	tt.configure(remoteYAML(base, keys...))
}

func (tt *tester) newUpstream(log *slog.Logger) *upstream {
	up := newUpstream(func(reach addressKind) http.RoundTripper {
		tr := newTransport(reach)
		tr.Proxy = nil
		tr.DialContext = tt.dialer(reach)
		tr.TLSClientConfig = tt.origin.trust(tr.TLSClientConfig)
		return tr
	}, tt.clock.now, log, tt.api.metrics)
	up.proxyFor = func(*http.Request) (*url.URL, error) { return nil, nil }
	// 127.0.0.1 plays the outside world, the rest of 127/8 the inside.
	up.kindOf = func(a netip.Addr) addressKind {
		if a == outside {
			return publicAddress
		}
		return kindOfAddress(a)
	}
	up.version = "test"
	return up
}

var outside = netip.MustParseAddr("127.0.0.1")

// dialer dials origins for the server: names that the test gave out lead to
// their places, and who is down refuses.
func (tt *tester) dialer(reach addressKind) func(ctx context.Context, network, address string) (net.Conn, error) {
	dial := onlyLoopback(new(net.Dialer))
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if at, ok := tt.dials[address]; ok {
			address = at
		}
		if ap, err := netip.ParseAddrPort(address); reach != anyAddress && (err != nil || ap.Addr() != outside) {
			if err := reach.refuseOthers(ctx, network, address, nil); err != nil {
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
		t, err := tt.api.config().resolveTarget("r/"+path, r.URL.RawQuery)
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
	tt.advance(outagePause + time.Second)
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
		var wait <-chan struct{}
		for _, f := range c.fills.all() {
			written, size := f.progress()
			f.mu.Lock()
			if f.phase != phaseDone && (f.phase >= phaseComplete || f.rec != nil && written == size) {
				wait = f.changed.next()
			}
			f.mu.Unlock()
		}
		if wait == nil {
			return
		}
		<-wait
	}
}

// useObjects makes a cache keep files in o.
func (c *cache) useObjects(o objects) { c.objects = o }

// joinReplicas makes a cache one of several replicas.
func (c *cache) joinReplicas(r replicas) { c.replicas = r }

// all are the fills in the table.
func (t *fillTable) all() (all []*fill) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.byKey {
		all = append(all, f)
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
	if strings.HasPrefix(path, "//") { // Opaque would become http://...
		req.URL.Path, req.URL.Opaque = req.URL.Opaque, ""
	}
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
	name, query, _ := strings.Cut(path, "?")
	t, err := tt.server.config.Load().resolveTarget("r/"+name, query)
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
