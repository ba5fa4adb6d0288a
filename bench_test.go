package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// newBenchTester is a tester that logs as a server does, to nowhere.
func newBenchTester(b *testing.B, keys ...string) *tester {
	b.Helper()
	tt := newTester(b, append(keys, "description: bench")...)
	log := slog.New(lineHandler{slog.NewJSONHandler(io.Discard, nil), &lineWriter{to: io.Discard}, true})
	tt.cache.log, tt.api.responder.log = log, log
	return tt
}

// nowhere is a ResponseWriter that keeps nothing.
type nowhere struct {
	header http.Header
	status int
}

func (w *nowhere) Header() http.Header         { return w.header }
func (w *nowhere) WriteHeader(status int)      { w.status = status }
func (w *nowhere) Write(p []byte) (int, error) { return len(p), nil }

// SetWriteDeadline is there because the controller would make an error
// otherwise, at a cost that no server has.
func (w *nowhere) SetWriteDeadline(time.Time) error { return nil }

// BenchmarkHitSmall is a stored file of 1 KiB without the network: what our
// own code costs.
func BenchmarkHitSmall(b *testing.B) {
	tt := newBenchTester(b)
	tt.origin.file("/pool/main/a/app_1.2.3-4_amd64.deb", noise(1, 1<<10))
	tt.get("/api/r/pool/main/a/app_1.2.3-4_amd64.deb").wantMiss()
	r := httptest.NewRequest("GET", "/api/r/pool/main/a/app_1.2.3-4_amd64.deb", nil)
	w := &nowhere{header: http.Header{}}
	b.ReportAllocs()
	b.SetBytes(1 << 10)
	for b.Loop() {
		clear(w.header)
		tt.api.ServeHTTP(w, r)
	}
	if w.status != 200 {
		b.Fatalf("status %d", w.status)
	}
}

// BenchmarkHitLarge is a stored file of 64 MiB over a socket.
func BenchmarkHitLarge(b *testing.B) {
	const size = 64 << 20
	tt := newBenchTester(b)
	tt.origin.file("/big.iso", noise(1, size))
	tt.get("/api/r/big.iso").wantMiss()
	get := benchGet(b, tt, "/api/r/big.iso")
	b.ReportAllocs()
	b.SetBytes(size)
	for b.Loop() {
		get(size)
	}
}

// benchGet asks over one connection, as plainly as can be: the client is not
// what is measured.
func benchGet(b *testing.B, tt *tester, path string) func(size int64) {
	b.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(tt.url, "http://"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	in, request := bufio.NewReaderSize(conn, 256<<10), "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n"
	return func(size int64) {
		if _, err := io.WriteString(conn, request); err != nil {
			b.Fatal(err)
		}
		res, err := http.ReadResponse(in, nil)
		if err != nil {
			b.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, res.Body); n != size || err != nil {
			b.Fatalf("%d bytes, %v", n, err)
		}
	}
}

// BenchmarkHitParallel is a hundred small files asked for over sockets, as
// many at once as there are processors.
func BenchmarkHitParallel(b *testing.B) {
	tt := newBenchTester(b, `mutable_patterns: ["idx$"]`)
	const files, size = 100, 4 << 10
	for i := range files {
		path := fmt.Sprintf("/f%d.idx", i)
		tt.origin.file(path, noise(uint64(i), size))
		tt.get("/api/r" + path).wantMiss()
	}
	var next atomic.Int64
	b.ReportAllocs()
	b.SetBytes(size)
	b.RunParallel(func(pb *testing.PB) {
		var gets [files]func(int64)
		conn, err := net.Dial("tcp", strings.TrimPrefix(tt.url, "http://"))
		if err != nil {
			b.Error(err)
			return
		}
		defer conn.Close()
		in := bufio.NewReader(conn)
		for i := range gets {
			request := fmt.Sprintf("GET /api/r/f%d.idx HTTP/1.1\r\nHost: x\r\n\r\n", i)
			gets[i] = func(size int64) {
				_, _ = io.WriteString(conn, request)
				res, err := http.ReadResponse(in, nil)
				if err != nil {
					b.Error(err)
					return
				}
				if n, err := io.Copy(io.Discard, res.Body); n != size || err != nil {
					b.Errorf("%d bytes, %v", n, err)
				}
			}
		}
		for pb.Next() {
			gets[next.Add(1)%files](size)
		}
	})
}

// BenchmarkFill is a cold file from its upstream to one client and the store,
// fsyncs included.
func BenchmarkFill(b *testing.B) {
	for _, size := range []int{1 << 10, 1 << 20, 64 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			tt := newBenchTester(b)
			text := noise(1, size)
			n := 0
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				n++
				path := fmt.Sprintf("/f%d", n)
				tt.origin.file(path, text)
				s := tt.open("/api/r" + path)
				if k, err := io.Copy(io.Discard, s.res.Body); k != int64(size) || err != nil {
					b.Fatalf("%d bytes, %v", k, err)
				}
				s.leave()
				tt.settle()
				b.StopTimer()
				key := target{remote: tt.server.config.Load().remotes["r"], spelling: path[1:]}.key()
				if err := tt.cache.purgeFile(context.Background(), "r", key); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
