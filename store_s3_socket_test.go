package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"
)

// socketBench sends one object in S3 to clients over real connections.
type socketBench struct {
	*s3Bench
	srv     *httptest.Server
	content string
	stalls  bool          // the client reads nothing before a step has failed
	moved   atomic.Int64  // bytes that the kernel moved from socket to socket
	failed  chan struct{} // a step of that ended early
	ended   chan error    // how answers ended
}

func newSocketBench(t *testing.T) *socketBench {
	b := &socketBench{s3Bench: newS3Bench(t), content: bigContent(16<<20 + 7),
		failed: make(chan struct{}, 100), ended: make(chan error, 100)}
	b.mustPut("f", b.content)
	b.srv = httptest.NewServer(http.HandlerFunc(func(hw http.ResponseWriter, r *http.Request) {
		o, err := b.open(r.Context(), testKey("f"), 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer o.body.Close()
		w := &response{ResponseWriter: hw, controller: *http.NewResponseController(hw), now: time.Now, sendfile: true}
		w.setHeader("Content-Type", "application/octet-stream") // or ServeContent reads and seeks back
		http.ServeContent(w, r, "", time.Time{}, &watchedSocket{o.body.(*s3Reader), b, w})
		b.ended <- errors.Join(w.bodyErr, w.clientErr)
	}))
	t.Cleanup(b.srv.Close)
	return b
}

// watchedSocket counts what the kernel moves.
type watchedSocket struct {
	*s3Reader
	b *socketBench
	w *response
}

func (s *watchedSocket) sendFromSocket(w io.Writer, limit int64) int64 {
	hadFailed := s.noSocket
	if s.b.stalls && !hadFailed && s.b.moved.Load() > 0 {
		_ = s.w.controller.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	}
	n := s.s3Reader.sendFromSocket(w, limit)
	s.b.moved.Add(n)
	if s.noSocket && !hadFailed {
		_ = s.w.controller.SetWriteDeadline(time.Time{})
		s.b.failed <- struct{}{}
	}
	return n
}

// get asks for a range, "" for the whole, and checks the body.
func (b *socketBench) get(byteRange, want string) {
	b.t.Helper()
	req, _ := http.NewRequestWithContext(b.t.Context(), http.MethodGet, b.srv.URL, nil)
	if byteRange != "" {
		req.Header.Set("Range", byteRange)
	}
	res, err := b.srv.Client().Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil || string(got) != want {
		b.t.Errorf("%s: %d bytes, want %d; %v", byteRange, len(got), len(want), err)
	}
	if err := <-b.ended; err != nil {
		b.t.Error(err)
	}
}

func TestS3BodiesGoFromSocketToSocket(t *testing.T) {
	t.Parallel()
	b := newSocketBench(t)
	var dials atomic.Int64
	tr := b.store.client.cfg.transport.(*http.Transport)
	dial := tr.DialContext
	tr.CloseIdleConnections()
	tr.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials.Add(1)
		return dial(ctx, network, addr)
	}
	for range 3 {
		b.get("", b.content)
	}
	if moved := b.moved.Load(); moved < 2*int64(len(b.content)) {
		t.Errorf("the kernel moved %d of %d bytes", moved, 3*len(b.content))
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections to S3, want one for all", n)
	}
	b.get("bytes=1000003-9000001", b.content[1000003:9000002])
	b.get("bytes=-5000000", b.content[len(b.content)-5000000:])
	b.get("bytes=7-8", b.content[7:9])
}

func TestS3SocketThatBreaksOff(t *testing.T) {
	t.Parallel()
	b := newSocketBench(t)
	b.fake.failOnce("GetObject", 3, true, fakeFault{cut: 7<<20 + 5})
	b.get("", b.content)
	if moved := b.moved.Load(); moved < 8<<20 {
		t.Errorf("the kernel moved %d bytes", moved)
	}
}

// What the kernel had taken from S3 and not given to a client that stalled is asked for
// again: nothing is missing and nothing comes twice.
func TestS3SocketOfASlowClient(t *testing.T) {
	t.Parallel()
	b := newSocketBench(t)
	b.stalls = true
	conn := b.dial()
	<-b.failed
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(res.Body)
	if err != nil || !bytes.Equal(got, []byte(b.content)) {
		t.Errorf("%d bytes of %d, %v", len(got), len(b.content), err)
	}
	if err := <-b.ended; err != nil {
		t.Error(err)
	}
}

func TestS3SocketWhoseClientLeaves(t *testing.T) {
	t.Parallel()
	b := newSocketBench(t)
	conn := b.dial()
	if _, err := io.ReadFull(conn, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := <-b.ended; err == nil {
		t.Error("the answer to a client that left ended well")
	}
}

// dial asks for the object and reads nothing.
func (b *socketBench) dial() net.Conn {
	b.t.Helper()
	conn, err := net.Dial("tcp", b.srv.Listener.Addr().String())
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.Close() })
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: h\r\n\r\n"); err != nil {
		b.t.Fatal(err)
	}
	return conn
}
