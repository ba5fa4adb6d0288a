package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func digestFor(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// A spool that fills up in the middle hands each client on to upstream. What
// comes from there must not escape the digest.
func TestDigestIsKeptWhenTheSpoolIsFull(t *testing.T) {
	t.Parallel()
	const size = roomEvery + 300_000 // the free space is looked at on the way
	text := noise(1, size)
	for _, right := range []bool{true, false} {
		t.Run(fmt.Sprintf("right %v", right), func(t *testing.T) {
			spools := &brokenSpools{}
			tt := setup{spools: spools.wrap}.start(t)
			release := tt.origin.file("/a", text).etag(`"1"`).stallAt(200_000)
			defer release()
			digest := digestFor(text)
			if !right {
				digest = digestFor("another body")
			}
			tt.digested(func(q *want) { q.digest = digest })
			s, end := tt.open("/api/r/a"), tt.open("/api/r/a", fmt.Sprintf("Range: bytes=%d-", roomEvery-1000))
			defer s.leave()
			defer end.leave()
			spools.mu.Lock()
			spools.noRoom = errNoSpace
			spools.mu.Unlock()
			release()
			s.rest()
			end.rest()
			if right {
				s.wantStatus(200).wantBody(text)
				end.wantStatus(206).wantBody(text[roomEvery-1000:])
				return
			}
			s.wantAborted()
			end.wantAborted()
			if len(s.text) > size-holdBack {
				t.Errorf("%d of %d bytes were sent of a body that does not verify", len(s.text), size)
			}
		})
	}
}

func TestRangeOfADigestedBodyWithoutASpool(t *testing.T) {
	t.Parallel()
	spools := &brokenSpools{none: errNoSpace}
	tt := setup{spools: spools.wrap}.start(t)
	text := noise(1, 400_000)
	tt.origin.file("/a", text)
	tt.digested(func(q *want) { q.digest = digestFor(text) })
	tt.get("/api/r/a", "Range: bytes=100-").wantStatus(206).wantBody(text[100:])
	tt.get("/api/r/a", "Range: bytes=100-200000").wantStatus(206).wantBody(text[100:200001])
	tt.get("/api/r/a", "Range: bytes=-70000").wantStatus(206).wantBody(text[330_000:])
	tt.get("/api/r/a", "Range: bytes=399999-,0-99999").wantStatus(206)
	tt.digested(func(q *want) { q.digest = digestFor("another body") })
	tt.get("/api/r/a", "Range: bytes=100-").wantAborted()
	tt.get("/api/r/a", "Range: bytes=-5").wantAborted()
}

// Of a body of unknown length only the 206 that resumes it says where it ends.
func TestResumedBodyOfUnknownLengthIsWhole(t *testing.T) {
	t.Parallel()
	text := noise(1, 300_000)
	for name, c := range map[string]struct {
		contentRange string
		to           int
		whole        bool
	}{
		"all of the rest":                {"bytes 100000-299999/300000", 300_000, true},
		"less than the rest":             {"bytes 100000-199999/300000", 200_000, false},
		"less than it says, in chunks":   {"bytes 100000-299999/300000", 200_000, false},
		"a size that nobody tells":       {"bytes 100000-199999/*", 200_000, false},
		"less than it says, every time":  {"bytes 100000-299999/300000", 100_000, false},
		"more than it says":              {"bytes 100000-199999/200000", 300_000, false},
		"an end that is not the whole's": {"bytes 100000-299999/300001", 300_000, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tt := newTester(t)
			f := tt.origin.file("/a", text).etag(`"1"`)
			f.acts(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Range") == "" {
					_, _ = io.WriteString(w, text[:100_000])
					_ = http.NewResponseController(w).Flush()
					panic(http.ErrAbortHandler)
				}
				w.Header().Set("Content-Range", c.contentRange)
				w.WriteHeader(http.StatusPartialContent)
				_ = http.NewResponseController(w).Flush() // in chunks
				if r.Header.Get("Range") == "bytes=100000-" {
					_, _ = io.WriteString(w, text[100_000:c.to])
				}
			})
			g := tt.get("/api/r/a")
			if c.whole {
				g.wantBody(text)
			} else {
				g.wantAborted()
			}
			tt.wantStored("a", c.whole)
		})
	}
}

func TestNegativeTTLOfAFileThatWasEvicted(t *testing.T) {
	t.Parallel()
	tt := newTester(t, `mutable_patterns: ["."]`, "negative_ttl: 60")
	tt.origin.file("/a", "old")
	tt.get("/api/r/a").wantMiss()
	tt.advance(2 * 3600e9)
	tt.origin.file("/a", "").answering(404)
	tt.origin.forget()
	tt.get("/api/r/a").wantStatus(404)
	tt.get("/api/r/a").wantStatus(404)
	tt.wantRequests("/a", 1)
}

// What net/http still has in its buffer when the handler is done meets a
// client that takes nothing, too.
func TestClientThatTakesNoShortAnswerIsDropped(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		for _, request := range []string{
			"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
			"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
			"PUT /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n",
		} {
			conn, err := tt.client.DialContext(t.Context(), "tcp", "front:80")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, request); err != nil {
				t.Fatal(err)
			}
			tt.advance(patience + time.Second)
			if b, err := io.ReadAll(conn); len(b) > 0 {
				t.Errorf("after all that time there was still someone who wrote: %q, %v", b, err)
			}
			conn.Close()
		}
	})
}

// watchedBody is read from for ever and notices that it is closed meanwhile.
type watchedBody struct {
	io.ReadSeekCloser
	begun, goOn, closed chan struct{}
	once                sync.Once
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.once.Do(func() { close(b.begun) })
	<-b.goOn
	return b.ReadSeekCloser.Read(p)
}

func (b *watchedBody) Close() error {
	close(b.closed)
	return b.ReadSeekCloser.Close()
}

type watchedObjects struct {
	objects
	body *watchedBody
}

func (o *watchedObjects) open(ctx context.Context, key string, off int64) (*object, error) {
	obj, err := o.objects.open(ctx, key, off)
	if err != nil || obj.body == nil {
		return obj, err
	}
	o.body.ReadSeekCloser = obj.body
	return &object{rec: obj.rec, body: o.body}, nil
}

// goneWriter is a client that leaves.
type goneWriter struct {
	*httptest.ResponseRecorder
	when chan struct{}
}

func (w goneWriter) Write([]byte) (int, error) {
	<-w.when
	return 0, io.ErrClosedPipe
}

// ServeContent reads the parts of a multi-range answer in a goroutine of its
// own, which it leaves behind when the client goes.
func TestMultiRangeClientLeaves(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", noise(1, 1<<20))
	tt.get("/api/r/a").wantStatus(200)
	body := &watchedBody{begun: make(chan struct{}), goOn: make(chan struct{}), closed: make(chan struct{})}
	tt.cache.objects = &watchedObjects{tt.cache.objects, body}
	var done sync.WaitGroup
	done.Go(func() {
		defer func() { _ = recover() }() // the aborted connection
		r := httptest.NewRequest("GET", "/api/r/a", nil)
		r.Header.Set("Range", "bytes=0-500000,600000-1000000")
		tt.api.ServeHTTP(goneWriter{httptest.NewRecorder(), body.begun}, r)
	})
	select {
	case <-body.closed:
		t.Error("closed while it is read")
	case <-time.After(200 * time.Millisecond):
	}
	close(body.goOn)
	done.Wait()
	<-body.closed
}

func TestChunkedBodyOverMaxSizeIsNotStored(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "cache: {max_size: 100KiB}")
	text := noise(1, 200_000)
	tt.origin.file("/a", text).chunked()
	tt.get("/api/r/a").wantBody(text)
	tt.wantStored("a", false)
	tt.wantLog("larger than cache.max_size")
}

// An operator who runs verify after a power failure is not to be told of
// losses where there are none.
func TestVerifyIsNotAlarmedByACrashedFirstCommit(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.origin.file("/a", "text")
	tt.get("/api/r/a").wantMiss()
	body := tt.fileOf("a")
	dir := filepath.Dir(body)
	if err := errors.Join(os.Remove(body), os.Rename(dir+"/"+recordFile, dir+"/"+recordNext)); err != nil {
		t.Fatal(err)
	}
	_, dropped, err := tt.disk.verify(t.Context(), func(key string, err error) { t.Errorf("%s: %v", key, err) })
	if dropped != 0 || err != nil {
		t.Errorf("%d dropped, %v", dropped, err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("the leftover is still there")
	}
}

// net/http reads what is left of a request's body before it answers, to keep
// the connection. A body that never comes keeps nobody waiting.
func TestBodyThatNeverComesIsNotAwaited(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		tt.origin.file("/a", "body")
		tt.get("/api/r/a").wantMiss()
		for request, status := range map[string]int{
			"GET /health": 200, "GET /api/r/a": 200, "HEAD /api/r/a": 200, "GET /api/r/none": 404, "GET /artifacts/r": 200,
			"DELETE /artifacts/r/a": 403, "PUT /api/r/a": 405,
		} {
			for _, length := range []string{"Content-Length: 10", "Transfer-Encoding: chunked"} {
				conn, err := tt.client.DialContext(t.Context(), "tcp", "front:80")
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				go io.WriteString(conn, request+" HTTP/1.1\r\nHost: x\r\n"+length+"\r\n\r\n")
				method, _, _ := strings.Cut(request, " ")
				in := bufio.NewReader(conn)
				res, err := http.ReadResponse(in, &http.Request{Method: method})
				if err != nil {
					t.Fatalf("%s, %s: %v", request, length, err)
				}
				_, err = io.ReadAll(res.Body)
				if d := time.Since(began); d > 0 || err != nil || res.StatusCode != status || !res.Close {
					t.Errorf("%s, %s: %d after %v, closes %v, %v", request, length, res.StatusCode, d, res.Close, err)
				}
				if _, err := in.ReadByte(); err != io.EOF || time.Since(began) > lastWords && method != "PUT" {
					t.Errorf("%s, %s: the connection ended with %v after %v", request, length, err, time.Since(began))
				}
				conn.Close()
			}
		}
	})
}

// A client that was sent a part of the spool by the kernel goes on without it.
func TestFullSpoolOfABodyOfUnknownLength(t *testing.T) {
	t.Parallel()
	text := noise(1, roomEvery+300_000)
	spools := &brokenSpools{}
	tt := setup{spools: spools.wrap}.start(t)
	tt.origin.file("/a", text).etag(`"1"`).chunked().acts(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") != "" {
			http.ServeContent(w, r, "", longAgo, strings.NewReader(text))
			return
		}
		_, _ = io.WriteString(w, text[:200_000])
		_ = http.NewResponseController(w).Flush()
		for spools.isFine() {
			time.Sleep(time.Millisecond)
		}
		_, _ = io.WriteString(w, text[200_000:])
	})
	s := tt.open("/api/r/a")
	defer s.leave()
	s.read(100_000)
	spools.mu.Lock()
	spools.noRoom = errNoSpace
	spools.mu.Unlock()
	s.rest().wantStatus(200).wantBody(text)
}

func (b *brokenSpools) isFine() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.noRoom == nil
}

// Where upstream has no ranges a spool that fills up cuts its clients off. The
// next ones must not meet the same end for ever.
func TestFullSpoolWithoutRangesIsNotTriedAgainAtOnce(t *testing.T) {
	t.Parallel()
	spools := &brokenSpools{}
	tt := setup{spools: spools.wrap}.start(t)
	cut := noise(1, roomEvery+300_000)
	release := tt.origin.file("/a", cut).noRanges().undated().stallAt(1000)
	defer release()
	s := tt.open("/api/r/a")
	defer s.leave()
	spools.mu.Lock()
	spools.noRoom = errNoSpace
	spools.mu.Unlock()
	release()
	s.rest().wantAborted()
	spools.heal() // small files still fit: it is this one that does not
	tt.get("/api/r/a").wantUnstored().wantBody(cut)
	tt.advance(2 * time.Minute)
	tt.get("/api/r/a").wantMiss()
}
