package main

import (
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
