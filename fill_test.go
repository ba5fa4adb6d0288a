package main

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"strconv"
	"testing"
)

func TestFirstByteDoesNotWaitForTheLast(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 300_000)
	f := tt.origin.file("/a", text)
	first, second := f.stallAt(0), f.stallAt(100_000)
	defer first()
	defer second()
	s := tt.open("/api/r/a") // returns: headers come before the first byte
	defer s.leave()
	s.wantStatus(200).wantMiss().wantHeader("Content-Length", "300000")
	first()
	if got := s.read(100_000); got != text[:100_000] {
		t.Error("wrong bytes")
	}
	second()
	s.rest().wantBody(text)
}

// An upstream that codes although it was asked not to is taken at its word:
// the coded bytes are the file.
func TestCodedAnswerIsReplayedCoded(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	var coded bytes.Buffer
	z := gzip.NewWriter(&coded)
	_, _ = io.WriteString(z, noise(1, 200_000))
	_ = z.Close()
	text := coded.String()
	tt.origin.file("/a.xml", text).says("Content-Encoding", "gzip")
	for _, want := range []func(*got) *got{(*got).wantMiss, (*got).wantHit} {
		want(tt.get("/api/r/a.xml").wantStatus(200)).wantBody(text).wantHeader("Content-Encoding", "gzip").
			wantHeader("Content-Length", strconv.Itoa(len(text)))
	}
	tt.restart()
	tt.get("/api/r/a.xml").wantHit().wantBody(text).wantHeader("Content-Encoding", "gzip")
	tt.head("/api/r/a.xml").wantHit().wantHeader("Content-Length", strconv.Itoa(len(text)))
	tt.get("/api/r/a.xml", "Range: bytes=10-19").wantStatus(206).wantBody(text[10:20])
	tt.get("/api/r/a.xml", "Range: bytes=999999999-").wantStatus(416)
	tt.get("/api/r/a.xml", `If-Match: "x"`).wantStatus(412).wantBody("")
	tt.get("/api/r/a.xml", "If-Modified-Since: "+longAgo.Format(http.TimeFormat)).wantStatus(304).wantBody("")
}
