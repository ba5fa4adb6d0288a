package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
)

// warm returns a mirror that has stored an image with one layer of size bytes.
func warm(b *testing.B, size int) (m *mirror, im *hubImage) {
	h := newHub(b)
	im = h.image("app", "v1", size)
	m = newMirror(b, h.url())
	m.pull("/v2/reg/app", "v1", im)
	m.waitUntilStored()
	return m, im
}

// hit measures answers for path that the handler gives without a network.
func (m *mirror) hit(b *testing.B, path string, size int) {
	b.SetBytes(int64(size))
	b.ReportAllocs()
	r := httptest.NewRequest(http.MethodGet, path, nil)
	for b.Loop() {
		w := sink{h: http.Header{}}
		m.reg.ServeHTTP(&w, r)
		if w.status != http.StatusOK || w.n != size {
			b.Fatalf("status %d, %d bytes", w.status, w.n)
		}
	}
}

// sink is a ResponseWriter that discards the answer.
type sink struct {
	h         http.Header
	status, n int
}

func (s *sink) Header() http.Header    { return s.h }
func (s *sink) WriteHeader(status int) { s.status = status }
func (s *sink) Write(p []byte) (int, error) {
	s.n += len(p)
	return len(p), nil
}

func BenchmarkManifestHit(b *testing.B) {
	m, im := warm(b, 10)
	b.Run("tag", func(b *testing.B) { m.hit(b, "/v2/reg/app/manifests/v1", len(im.body)) })
	b.Run("digest", func(b *testing.B) { m.hit(b, "/v2/reg/app/manifests/"+im.digest, len(im.body)) })
	b.Run("namespace", func(b *testing.B) { m.hit(b, "/v2/reg/app/manifests/v1?ns=docker.io", len(im.body)) })
}

// Blobs go over real connections, because only those use sendfile.
func BenchmarkBlobHit(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			m, im := warm(b, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				m.drop(b, "/v2/reg/app/blobs/"+im.order[1], size)
			}
		})
	}
}

// drop measures answers for path over the network and discards them.
func (m *mirror) drop(b *testing.B, path string, size int) {
	res, err := m.client.Get(m.srv.URL + path)
	if err != nil {
		b.Fatal(err)
	}
	defer res.Body.Close()
	if n, err := io.Copy(io.Discard, res.Body); n != int64(size) || err != nil {
		b.Fatalf("%d bytes, %v", n, err)
	}
}

func BenchmarkBlobCold(b *testing.B) {
	for _, size := range []int{4 << 10, 16 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			h := newHub(b)
			m := newMirror(b, h.url())
			body := bytes.Repeat([]byte("cold"), size/4)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				b.StopTimer()
				copy(body, fmt.Sprintf("%08d", n))
				clear(h.repo("app").blobs)
				d := h.blob("app", body)
				b.StartTimer()
				m.drop(b, "/v2/reg/app/blobs/"+d, size)
			}
		})
	}
}
