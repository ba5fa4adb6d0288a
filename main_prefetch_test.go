package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// command runs artifactapi prefetch with this text on its standard input.
func (tt *tester) command(stdin string, args ...string) (out string, err error) {
	tt.Helper()
	var b bytes.Buffer
	set := &settings{listen: strings.TrimPrefix(tt.url, "http://"), apiToken: tt.server.set.apiToken}
	err = runPrefetch(context.Background(), set, args, strings.NewReader(stdin), &b)
	if strings.ContainsAny(b.String(), "\r\x1b") {
		tt.Errorf("a progress bar, and no terminal: %q", b.String())
	}
	return b.String(), err
}

func TestPrefetchCommand(t *testing.T) {
	t.Parallel()
	tt := setup{env: map[string]string{"API_TOKEN": "sesame"}}.start(t)
	tt.origin.file("/", `<a href="a.bin">a</a><a href="b.bin">b</a><a href="c.txt">c</a>`)
	tt.origin.file("/a.bin", "12345")
	tt.origin.file("/c.txt", "c")
	tt.origin.file("/sub/", `<a href="z.bin">z</a>`)
	tt.origin.file("/sub/z.bin", "z")
	for _, c := range []struct {
		stdin string
		args  []string
		out   []string // parts of the output
		err   string   // a part of the error; "": none
	}{
		{"", []string{"--dry-run", "r", `a\.bin`}, []string{"r/a.bin\n", "1 found, 0 fetched, 0 there already, 0 failed"}, ""},
		{"", []string{"--server", tt.url + "/", "r", `a\.bin`, `c\.txt`}, []string{"2 found, 2 fetched, 0 there already, 0 failed, 6 B"}, ""},
		{"", []string{"r", `\.bin`}, []string{"failed: r/b.bin: 404 not found", "2 found, 0 fetched, 1 there already, 1 failed"}, "not fetched: 1 files"},
		{tt.origin.url + "/a.bin http://elsewhere.example/x", []string{"-"}, []string{"skipped: http://elsewhere.example/x:", "1 there already"}, ""},
		{tt.origin.url + "/gone", []string{"-"}, []string{"failed: r/gone: 404"}, "not fetched: 1 files"},
		{`{"remote":"r","path":"a","query":true}` + "\n" + `{"remote":"r","path":"b","query":true}`, []string{"-"}, []string{"0 found"}, "not fetched: 2 files"},
		{"", []string{"none", "."}, nil, "none"},
		{"", []string{"r", "a(["}, nil, "pattern"},
		{"", []string{"r/..", "a"}, nil, "prefix"},
		{"", []string{"r/sub/", `z\.bin`}, []string{"1 found, 1 fetched"}, ""},
		{"", []string{"--server", "http://" + refusingAddress(t), "r", "."}, nil, "connection refused"},
		{"", []string{"--server", tt.origin.url, "r", "."}, nil, tt.origin.url + " answered 404"},
	} {
		out, err := tt.command(c.stdin, c.args...)
		if (err != nil) != (c.err != "") || (err != nil && !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%q: error %v, want %q", c.args, err, c.err)
		}
		for _, part := range c.out {
			if !strings.Contains(out, part) {
				t.Errorf("%q: output %q, want %q", c.args, out, part)
			}
		}
		if strings.Contains(out+fmt.Sprint(err), "sesame") {
			t.Errorf("%q: the token is shown", c.args)
		}
	}
}

func TestPrefetchCommandOfImages(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.image("team/app", "1.0", 10)
	tt := setup{yaml: "remotes:\n  hub: {base_url: '" + h.url() + "', package: docker}\n"}.start(t)
	if out, err := tt.command("", "hub", "team/app:1.0"); err != nil || !strings.Contains(out, "3 found, 3 fetched") {
		t.Errorf("%v: %s", err, out)
	}
}

// An answer that ends before its summary is no success, and what a server says moves no
// cursor.
func TestPrefetchCommandTrustsNoServer(t *testing.T) {
	t.Parallel()
	text := ""
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, text) }))
	t.Cleanup(srv.Close)
	var out bytes.Buffer
	for _, text = range []string{"", `{"event":"found"}`, `{"event":"failed","remote":"r","path":"\u001b[2J\rx","status":404}` + "\n"} {
		err := runPrefetch(context.Background(), &settings{}, []string{"--server", srv.URL, "-"}, strings.NewReader(""), &out)
		if !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "not all was fetched") {
			t.Errorf("%q: %v", text, err)
		}
	}
	if strings.ContainsAny(out.String(), "\r\x1b") || !strings.Contains(out.String(), "?[2J?x") {
		t.Errorf("%q", out.String())
	}
}

func TestProgressBar(t *testing.T) {
	t.Parallel()
	last := progressEvent{Done: 4, Failed: 0}
	got := drawBar(last, progressEvent{Found: 40, Done: 9, Failed: 1, Bytes: 1_500_000_000, BytesPerSecond: 10_000})
	if want := "[#####...............] 10/40 files, 1.4 GiB, 9.8 KiB/s, 5s left"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := drawBar(last, progressEvent{Done: 4}), "[....................] 4/0 files, 0 B, 0 B/s, - left"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
