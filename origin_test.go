// origin_test.go: the upstream of the tests, an HTTP server on loopback (or on
// pipes in a synctest bubble). It does to each file what a test tells it: break
// the body off, hold it back, lie about its length. TestMain serves one for
// people with -origin=ADDRESS.

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var originFlag = flag.String("origin", "", "serve the tests' origin at this address, for trying things by hand")

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
	_, _ = buf.WriteString("HTTP/1.1 200 OK\r\nConnection: close\r\n" + length)
	_ = header.Write(buf)
	_, _ = buf.WriteString("\r\n")
	text := f.text
	if w.cutAt >= 0 {
		text = text[:w.cutAt]
	}
	if w.r.Method != http.MethodHead {
		_, _ = buf.WriteString(text)
	}
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
