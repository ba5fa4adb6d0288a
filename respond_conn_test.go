package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// startConnServer serves tt on loopback as serveUntilDone does, and returns a connection
// to it.
func startConnServer(t *testing.T, tt *tester) net.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	srv := &http.Server{Handler: tt.api, ConnContext: addClientConn}
	go srv.Serve(clientListener{l})
	t.Cleanup(func() { srv.Close() })
	conn, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// headerWriter sends a body as net/http does: first the header, then the rest by ReadFrom.
type headerWriter struct {
	*httptest.ResponseRecorder
	conn *clientConn
	held int // bytes of the header, before the body came
}

func (h *headerWriter) ReadFrom(src io.Reader) (int64, error) {
	if _, err := io.WriteString(h.conn, "header"); err != nil {
		return 0, err
	}
	h.held = len(h.conn.held)
	return h.conn.ReadFrom(src)
}

// The header of a small body from memory waits for the body.
func TestHeaderAndSmallBodyLeaveTogether(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	defer client.Close()
	conn, err := clientListener{l}.Accept()
	must(t, err)
	defer conn.Close()
	for _, size := range []int{minHeld, maxSmallBody} {
		h := &headerWriter{ResponseRecorder: httptest.NewRecorder(), conn: conn.(*clientConn)}
		w := &response{ResponseWriter: h, controller: *http.NewResponseController(h), conn: h.conn, now: time.Now}
		text := noise(1, size)
		n, err := w.sendMemory([]byte(text))
		if n != int64(size) || w.bytes != n || err != nil || h.held != len("header") || len(h.conn.held) > 0 {
			t.Errorf("%d of %d bytes, %v; of the header %d were held, %d still are", n, size, err, h.held, len(h.conn.held))
		}
		got := make([]byte, len("header")+size)
		if _, err := io.ReadFull(client, got); err != nil || string(got) != "header"+text {
			t.Errorf("the client got something else: %v", err)
		}
	}
}

// Whatever is asked for on one connection, the answers come in order and whole.
func TestAnswersOnOneConnection(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	sizes := []int{0, 1, minHeld - 1, minHeld, 4 << 10, 16 << 10, maxSmallBody, maxSmallBody + 1, 1 << 20}
	for _, size := range sizes {
		path := fmt.Sprintf("/f%d", size)
		tt.origin.file(path, noise(1, size))
		tt.get("/api/r" + path).wantStatus(200)
	}
	conn := startConnServer(t, tt)
	in := bufio.NewReader(conn)
	for _, size := range sizes {
		text, url := noise(1, size), fmt.Sprintf("/api/r/f%d", size)
		for _, c := range []struct {
			method, headers, want string
			status                int
		}{
			{"GET", "", text, 200},
			{"HEAD", "", "", 200},
			{"GET", "Range: bytes=0-2999\r\n", text[:min(3000, size)], 206},
			{"GET", "Range: bytes=-2500\r\n", text[max(0, size-2500):], 206},
			{"GET", "If-None-Match: *\r\n", "", 304},
			{"GET", "", text, 200},
		} {
			if size == 0 && c.status == 206 {
				c.status = 200
			}
			request := c.method + " " + url + " HTTP/1.1\r\nHost: x\r\n" + c.headers + "\r\n"
			_, err := io.WriteString(conn, request+request) // the second is there before the first is answered
			must(t, err)
			for range 2 {
				res, err := http.ReadResponse(in, &http.Request{Method: c.method})
				must(t, err)
				body, err := io.ReadAll(res.Body)
				if err != nil || res.StatusCode != c.status || string(body) != c.want {
					t.Errorf("%q: status %d with %d bytes (%v), want %d with %d", request, res.StatusCode, len(body), err, c.status, len(c.want))
				}
			}
		}
	}
	_, err := io.WriteString(conn, "GET /api/r/f4096 HTTP/1.0\r\n\r\n")
	must(t, err)
	all, err := io.ReadAll(in)
	if _, body, _ := strings.Cut(string(all), "\r\n\r\n"); err != nil || body != noise(1, 4<<10) {
		t.Errorf("HTTP/1.0: %d bytes, %v", len(body), err)
	}
}
