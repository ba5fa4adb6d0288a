// s3sig_test.go: the signatures that Amazon published, the client against the fake
// server and its faults, and one suite for the fake server and, with
// TEST_S3=http://KEY:SECRET@host:port/bucket, for a real one.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// vector is an example of Amazon's "Authenticating Requests".
type vector struct {
	method, path string
	query        url.Values
	header       http.Header
	body         string
	want         string
}

func vectors() map[string]vector {
	return map[string]vector{
		"get with a range": {method: "GET", path: "/test.txt", header: http.Header{"Range": {"bytes=0-9"}},
			want: "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"},
		"put with an odd name": {method: "PUT", path: "/test$file.text", body: "Welcome to Amazon S3.",
			header: http.Header{"Date": {"Fri, 24 May 2013 00:00:00 GMT"}, "X-Amz-Storage-Class": {"REDUCED_REDUNDANCY"}},
			want:   "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"},
		"query without value": {method: "GET", path: "/", query: url.Values{"lifecycle": {""}},
			want: "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"},
		"list": {method: "GET", path: "/", query: url.Values{"prefix": {"J"}, "max-keys": {"2"}},
			want: "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"},
	}
}

const (
	vectorKey    = "AKIAIOSFODNN7EXAMPLE"
	vectorSecret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
)

func (v vector) request() *http.Request {
	u := &url.URL{Scheme: "https", Host: "examplebucket.s3.amazonaws.com", Path: v.path, RawPath: uriEncode(v.path, true), RawQuery: encodeQuery(v.query)}
	h := maps.Clone(v.header)
	if h == nil {
		h = http.Header{}
	}
	return &http.Request{Method: v.method, URL: u, Header: h}
}

func TestSignVectors(t *testing.T) {
	t.Parallel()
	c := &s3Client{cfg: s3Config{accessKey: vectorKey, secretKey: vectorSecret}}
	at := time.Date(2013, 5, 24, 0, 0, 0, 0, time.UTC)
	for name, v := range vectors() {
		req := v.request()
		req.Header.Set("Accept-Encoding", "identity") // never part of a signature
		c.signRequest(req, "us-east-1", sha256Hex([]byte(v.body)), at)
		auth := req.Header.Get("Authorization")
		if !strings.HasSuffix(auth, "Signature="+v.want) || strings.Contains(auth, "accept-encoding") {
			t.Errorf("%s: %s, want signature %s", name, auth, v.want)
		}
	}
}

func BenchmarkSign(b *testing.B) {
	v := vectors()["get with a range"]
	c := &s3Client{cfg: s3Config{accessKey: vectorKey, secretKey: vectorSecret}}
	at := time.Date(2013, 5, 24, 0, 0, 0, 0, time.UTC)
	b.ReportAllocs()
	for b.Loop() {
		c.signRequest(v.request(), "us-east-1", emptySHA256, at)
	}
}

func TestURIEncode(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"":                   "",
		"AZaz09-._~":         "AZaz09-._~",
		"a b":                "a%20b",
		"a+b":                "a%2Bb",
		"a%2fb":              "a%252fb",
		"!'()*;:@&=$,?#[]\"": "%21%27%28%29%2A%3B%3A%40%26%3D%24%2C%3F%23%5B%5D%22",
		"ä/\u6f22":           "%C3%A4/%E6%BC%A2",
		"\x00\xff":           "%00%FF",
		"//x":                "//x",
	} {
		if got := uriEncode(in, true); got != want {
			t.Errorf("uriEncode(%q) = %q, want %q", in, got, want)
		}
	}
	if got := uriEncode("a/b", false); got != "a%2Fb" {
		t.Errorf("a slash in a query became %q", got)
	}
}

func TestEncodeQuerySortsByName(t *testing.T) {
	t.Parallel()
	q := url.Values{"z": {"+ ~/ä"}, "a-b": {""}, "a": {"2"}}
	if got, want := encodeQuery(q), "a=2&a-b=&z=%2B%20~%2F%C3%A4"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func FuzzURIEncode(f *testing.F) {
	for _, s := range []string{"", "a b+c~d%e", "ä/ö", "\x00\xff", "../.."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		enc := uriEncode(s, true)
		if back, err := url.PathUnescape(enc); err != nil || back != s {
			t.Fatalf("%q became %q and then %q, %v", s, enc, back, err)
		}
		if enc != fakeEncode(s, "/") {
			t.Fatalf("%q is spelled %q", s, enc)
		}
		u := url.URL{Path: "/" + s, RawPath: "/" + enc}
		if u.EscapedPath() != "/"+enc {
			t.Fatalf("net/url would put %q on the wire, not %q", u.EscapedPath(), enc)
		}
	})
}

// FuzzS3Answer gives answers of servers to the parsers. They must not panic, and
// their errors must fit a log line.
func FuzzS3Answer(f *testing.F) {
	f.Add(500, "<Error><Code>InternalError</Code><Message>m\nn</Message><Region>eu</Region></Error>")
	f.Add(200, "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
	f.Add(502, "<html>Bad Gateway")
	f.Fuzz(func(t *testing.T, status int, body string) {
		resp := &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}
		refused, ok := errors.AsType[*s3Error](readAnswer(resp, &struct{ Contents []s3ListedEntry }{}))
		if !ok {
			return
		}
		if text := refused.Error(); len(text) > 4*s3TextLimit || strings.ContainsAny(text, "\r\n\x00") {
			t.Fatalf("error text %q", text)
		}
	})
}

func TestS3ConfigHidesItsSecret(t *testing.T) {
	t.Parallel()
	cfg := s3Config{host: "h:9000", bucket: "b", region: "r", accessKey: "a", secretKey: "s3cr3t"}
	if s := fmt.Sprintf("%v %+v", cfg, cfg); strings.Contains(s, "s3cr3t") {
		t.Errorf("the configuration prints as %s", s)
	}
}

// client makes a client of a fake server.
func (f *fakeS3) client(change ...func(*s3Config)) *s3Client {
	cfg := f.config()
	for _, ch := range change {
		ch(&cfg)
	}
	return newS3Client(cfg)
}

// putOf returns an object to store, with metadata that only this content has.
func putOf(data []byte) s3PutInput {
	return s3PutInput{body: bytes.NewReader(data), size: int64(len(data)), sha256: sha256Hex(data), contentType: "text/plain",
		meta: map[string]string{"record": `{"s":"` + sha256Hex(data) + `"}`}}
}

// pattern returns n bytes that differ from one part to the next.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>16 ^ i>>8 ^ i*7)
	}
	return b
}

func wantObject(t *testing.T, c *s3Client, key string, data []byte) *s3Object {
	t.Helper()
	o, err := c.getObject(t.Context(), key, 0, "")
	if err != nil {
		t.Fatal(err)
	}
	defer o.body.Close()
	got, err := io.ReadAll(o.body)
	if err != nil || !bytes.Equal(got, data) || o.size != int64(len(data)) {
		t.Fatalf("%q: read %d of %d bytes (size %d), right: %v, error %v", key, len(got), len(data), o.size, bytes.Equal(got, data), err)
	}
	return o
}

// mustPut stores an object and returns its ETag.
func mustPut(t *testing.T, c *s3Client, key string, p s3PutInput) string {
	t.Helper()
	must(t, c.putObject(t.Context(), key, p))
	o, err := c.headObject(t.Context(), key)
	must(t, err)
	return o.etag
}

// testS3 checks what the client needs of every server.
func testS3(t *testing.T, c *s3Client, partSize int) {
	t.Run("bucket", func(t *testing.T) { testS3Bucket(t, c) })
	t.Run("keys", func(t *testing.T) { testS3Keys(t, c) })
	t.Run("ranges", func(t *testing.T) { testS3Ranges(t, c) })
	t.Run("conditions", func(t *testing.T) { testS3Conditions(t, c) })
	t.Run("metadata", func(t *testing.T) { testS3Metadata(t, c) })
	t.Run("parts", func(t *testing.T) { testS3Parts(t, c, partSize) })
	t.Run("sweep", func(t *testing.T) { testS3Sweep(t, c) })
	t.Run("missing", func(t *testing.T) { testS3Missing(t, c) })
	t.Run("cancelled", func(t *testing.T) { testS3Cancelled(t, c) })
	t.Run("corrected", func(t *testing.T) { testS3Corrected(t, c) })
}

func testS3Bucket(t *testing.T, c *s3Client) {
	var wg sync.WaitGroup
	for range 4 { // replicas that start together
		wg.Go(func() {
			err := listNothing(t, c)
			if errors.Is(err, errS3NoBucket) {
				err = c.createBucket(t.Context())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := c.createBucket(t.Context()); err != nil {
		t.Errorf("creating it again: %v", err)
	}
}

// listNothing lists no object, which shows that the bucket can be used.
func listNothing(t *testing.T, c *s3Client) error {
	return c.listObjects(t.Context(), "nobody/", func(i s3ListedEntry) error { return errors.New("there is " + i.Key) })
}

// oddKeys returns keys that servers and clients escape in different ways.
func oddKeys() []string {
	return []string{"k/plain", "k/a b", "k/a+b", "k/a~b", "k/a%2Fb", "k/a%b", "k/ä漢", "k/!'()*;:@&=$,?#[]", "k/" + strings.Repeat("x", 200)}
}

func testS3Keys(t *testing.T, c *s3Client) {
	keys := oddKeys()
	for _, key := range keys {
		mustPut(t, c, key, putOf([]byte(key)))
		wantObject(t, c, key, []byte(key))
	}
	var listed []string
	err := c.listObjects(t.Context(), "k/", func(i s3ListedEntry) error {
		listed = append(listed, i.Key)
		return nil
	})
	slices.Sort(keys)
	slices.Sort(listed)
	if err != nil || !slices.Equal(listed, keys) {
		t.Errorf("listed %q, %v, want %q", listed, err, keys)
	}
	stop := errors.New("enough")
	if err := c.listObjects(t.Context(), "k/", func(s3ListedEntry) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("the callback's error came back as %v", err)
	}
	for _, key := range keys {
		if err := cmp.Or(c.deleteObject(t.Context(), key), c.deleteObject(t.Context(), key)); err != nil {
			t.Errorf("deleting %q twice: %v", key, err)
		}
	}
	if err := c.listObjects(t.Context(), "k/", func(i s3ListedEntry) error { t.Errorf("left: %q", i.Key); return nil }); err != nil {
		t.Error(err)
	}
}

func testS3Ranges(t *testing.T, c *s3Client) {
	data := pattern(1000)
	mustPut(t, c, "range", putOf(data))
	for _, off := range []int64{0, 1, 990, 999} {
		o, err := c.getObject(t.Context(), "range", off, "")
		if err != nil {
			t.Fatalf("%d: %v", off, err)
		}
		got, err := io.ReadAll(o.body)
		o.body.Close()
		if err != nil || !bytes.Equal(got, data[off:]) || o.size != 1000 || o.meta["record"] == "" {
			t.Errorf("%d: %d bytes, size %d, meta %v, error %v", off, len(got), o.size, o.meta, err)
		}
	}
	_, err := c.getObject(t.Context(), "range", 1000, "")
	if refused, ok := errors.AsType[*s3Error](err); !ok || refused.status != 416 {
		t.Errorf("beyond the end: %v", err)
	}
	mustPut(t, c, "empty", putOf(nil))
	wantObject(t, c, "empty", nil)
}

func testS3Conditions(t *testing.T, c *s3Client) {
	old := mustPut(t, c, "cond", putOf([]byte("old")))
	if o := wantObject(t, c, "cond", []byte("old")); o.etag != old {
		t.Errorf("put said ETag %s, get %s", old, o.etag)
	}
	news := mustPut(t, c, "cond", putOf([]byte("new!")))
	if _, err := c.getObject(t.Context(), "cond", 1, old); !errors.Is(err, errS3PreconditionFailed) {
		t.Errorf("If-Match with the old: %v", err)
	}
	o, err := c.getObject(t.Context(), "cond", 1, news)
	if err != nil {
		t.Fatal(err)
	}
	o.body.Close()
}

// testS3PutConditions is not part of testS3, because not every server has conditions
// for puts.
func testS3PutConditions(t *testing.T, c *s3Client, size int) {
	p := putOf(pattern(size))
	p.ifNoneMatch = "*"
	etag := mustPut(t, c, "once", p)
	if err := c.putObject(t.Context(), "once", p); !errors.Is(err, errS3PreconditionFailed) {
		t.Errorf("replaced against If-None-Match: %v", err)
	}
	p.ifNoneMatch, p.ifMatch = "", etag
	mustPut(t, c, "once", p)
	if err := c.deleteObject(t.Context(), "once"); err != nil {
		t.Error(err)
	}
}

func testS3Metadata(t *testing.T, c *s3Client) {
	p := putOf([]byte("x"))
	p.meta = map[string]string{"record": `{"p":"a  b, c","q":"\\u00e4"}` + strings.Repeat("y", 1900)}
	mustPut(t, c, "meta", p)
	o, err := c.headObject(t.Context(), "meta")
	if err != nil || o.meta["record"] != p.meta["record"] || o.size != 1 {
		t.Fatalf("head: %+v, %v", o, err)
	}
	p.meta["record"] += strings.Repeat("y", 9000)
	if err := c.putObject(t.Context(), "meta", p); err == nil {
		t.Error("metadata beyond the limit was taken")
	}
}

func testS3Parts(t *testing.T, c *s3Client, partSize int) {
	for _, n := range []int{partSize, partSize + 1, 2 * partSize, 5*partSize + 3} {
		key := fmt.Sprintf("parts/a +%d", n)
		p := putOf(pattern(n))
		etag := mustPut(t, c, key, p)
		o := wantObject(t, c, key, pattern(n))
		if o.etag != etag || o.meta["record"] != p.meta["record"] {
			t.Errorf("%d bytes: ETag %s then %s, meta %v", n, etag, o.etag, o.meta)
		}
		if err := c.deleteObject(t.Context(), key); err != nil {
			t.Error(err)
		}
	}
}

func olderThan(age time.Duration) func(s3ListedEntry) bool {
	before := time.Now().Add(-age)
	return func(u s3ListedEntry) bool { return u.Initiated.Before(before) }
}

func testS3Sweep(t *testing.T, c *s3Client) {
	const key = "sweep/a +b"
	for range 3 {
		if _, err := c.createMultipartUpload(t.Context(), key, s3PutInput{}); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := c.abortUploads(t.Context(), key, olderThan(time.Hour)); n != 0 || err != nil {
		t.Errorf("young uploads: %d swept, %v", n, err)
	}
	if n, err := c.abortUploads(t.Context(), key, olderThan(-time.Hour)); n != 3 || err != nil {
		t.Errorf("old uploads: %d swept, %v", n, err)
	}
	if n, err := c.abortUploads(t.Context(), key, olderThan(-time.Hour)); n != 0 || err != nil {
		t.Errorf("again: %d swept, %v", n, err)
	}
}

func testS3Missing(t *testing.T, c *s3Client) {
	if _, err := c.getObject(t.Context(), "nobody/here", 5, ""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("get: %v", err)
	}
	if _, err := c.headObject(t.Context(), "nobody/here"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("head: %v", err)
	}
	if err := c.abortMultipartUpload(t.Context(), "nobody/here", "bm9uZQ"); err != nil {
		t.Errorf("aborting what is not there: %v", err)
	}
}

func testS3Cancelled(t *testing.T, c *s3Client) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.getObject(ctx, "x", 0, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("get: %v", err)
	}
	if err := c.putObject(ctx, "x", putOf([]byte("x"))); !errors.Is(err, context.Canceled) {
		t.Errorf("put: %v", err)
	}
}

// testS3Corrected: each operation whose refusal has a body, as the first of a client,
// succeeds with a wrong region and names a wrong clock.
func testS3Corrected(t *testing.T, c *s3Client) {
	for name, tt := range map[string]struct {
		spoil func(*s3Config)
		want  error
	}{
		"clock ahead":  {func(cfg *s3Config) { cfg.now = func() time.Time { return time.Now().Add(6 * time.Hour) } }, errS3Clock},
		"clock behind": {func(cfg *s3Config) { cfg.now = func() time.Time { return time.Now().Add(-60 * 24 * time.Hour) } }, errS3Clock},
		"region":       {func(cfg *s3Config) { cfg.region = "no-where-1" }, nil},
	} {
		for op, do := range map[string]func(*s3Client) error{
			"put": func(c *s3Client) error { err := c.putObject(t.Context(), "fix", putOf([]byte("x"))); return err },
			"parts": func(c *s3Client) error {
				_, err := c.createMultipartUpload(t.Context(), "fix", s3PutInput{})
				return err
			},
			"list": func(c *s3Client) error { return listNothing(t, c) },
			"get": func(c *s3Client) error {
				_, err := c.getObject(t.Context(), "nobody/here", 0, "")
				return notMissing(err)
			},
		} {
			cfg := c.cfg
			tt.spoil(&cfg)
			err := do(newS3Client(cfg))
			if !errors.Is(err, tt.want) || errors.Is(err, fs.ErrPermission) {
				t.Errorf("%s, %s: %v, want %v", name, op, err, tt.want)
			}
		}
	}
	if _, err := c.abortUploads(t.Context(), "fix", olderThan(-time.Hour)); err != nil {
		t.Error(err)
	}
}

func notMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func TestS3Fake(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*fakeS3, *s3Config){
		"path style":     func(*fakeS3, *s3Config) {},
		"virtual host":   func(_ *fakeS3, c *s3Config) { c.virtualHost, c.host = true, "s3.test:80" },
		"another region": func(f *fakeS3, c *s3Config) { f.region = "eu-test-1" },
		"small pages":    func(f *fakeS3, c *s3Config) { f.pageSize = 2 },
		"clock a bit off": func(f *fakeS3, c *s3Config) {
			f.now = func() time.Time { return time.Now().Add(-10 * time.Minute) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFakeS3(t)
			f.drop("")
			c := f.client(func(cfg *s3Config) { change(f, cfg) })
			testS3(t, c, 64<<10)
			testS3PutConditions(t, c, 10)
			testS3PutConditions(t, c, 200<<10)
		})
	}
}

// TestS3Real runs the suite against TEST_S3. It checks the conditions of puts only
// with TEST_S3_CONDITIONS, because not every server has them.
func TestS3Real(t *testing.T) {
	c := realS3(t, 5<<20)
	testS3(t, c, 5<<20)
	cfg := c.cfg
	cfg.secretKey = "not-the-secret"
	if err := listNothing(t, newS3Client(cfg)); !errors.Is(err, fs.ErrPermission) || strings.Contains(err.Error(), cfg.secretKey) {
		t.Errorf("wrong credentials: %v", err)
	}
	if os.Getenv("TEST_S3_CONDITIONS") != "" {
		testS3PutConditions(t, c, 10)
		testS3PutConditions(t, c, 6<<20)
	}
}

func realS3(t testing.TB, partSize int64) *s3Client {
	u, err := url.Parse(os.Getenv("TEST_S3"))
	if err != nil || u.Host == "" {
		t.Skip("TEST_S3 is not set")
	}
	secret, _ := u.User.Password()
	c := newS3Client(s3Config{host: u.Host, secure: u.Scheme == "https", bucket: strings.Trim(u.Path, "/"), accessKey: u.User.Username(),
		secretKey: secret, region: "us-east-1", partSize: partSize, now: time.Now, transport: newS3Transport()})
	t.Cleanup(c.cfg.transport.(*http.Transport).CloseIdleConnections)
	return c
}

func TestS3LargePartsAreEqual(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	f.largeParts = true
	c := f.client(func(cfg *s3Config) { cfg.partSize = 5 << 20 })
	data := pattern(11 << 20)
	if etag := mustPut(t, c, "large", putOf(data)); !strings.HasSuffix(etag, `-3"`) {
		t.Errorf("ETag %s", etag)
	}
	wantObject(t, c, "large", data)
}

func TestS3FaultsPass(t *testing.T) {
	t.Parallel()
	faults := map[string]fakeFault{
		"slow down":      {status: 503, code: "SlowDown"},
		"internal error": {status: 500, code: "InternalError"},
		"bad gateway":    {status: 502},
		"time-out":       {status: 400, code: "RequestTimeout"},
		"error in a 200": {status: 200, code: "InternalError"},
		"reset":          {},
		"cut answer":     {cut: 40},
	}
	sizes := map[string]int{"PutObject": 1000, "CreateMultipartUpload": 300 << 10, "UploadPart": 300 << 10, "CompleteMultipartUpload": 300 << 10}
	for op, size := range sizes {
		for name, fault := range faults {
			for _, applied := range []bool{false, true} {
				inside := op == "PutObject" || op == "UploadPart" // their answers have no body
				if inside && (fault.status == 200 || fault.cut > 0) {
					continue
				}
				t.Run(fmt.Sprintf("%s %s applied %v", op, name, applied), func(t *testing.T) {
					t.Parallel()
					f := newFakeS3(t)
					c := f.client()
					f.failOnce(op, 2, applied, fault)
					p := putOf(pattern(size))
					if op == "CompleteMultipartUpload" && applied {
						p.ifNoneMatch = "*"
					}
					mustPut(t, c, "k", p)
					wantObject(t, c, "k", pattern(size))
				})
			}
		}
	}
}

// TestS3FaultsStay lists the faults that end a put: the old object is still there, the
// upload is aborted, and a refusal is not tried again.
func TestS3FaultsStay(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		op     string
		fault  fakeFault
		tries  int
		target error
	}{
		"denied":          {"PutObject", fakeFault{status: 403, code: "AccessDenied"}, 1, fs.ErrPermission},
		"denied begin":    {"CreateMultipartUpload", fakeFault{status: 403, code: "AccessDenied"}, 1, fs.ErrPermission},
		"denied complete": {"CompleteMultipartUpload", fakeFault{status: 200, code: "AccessDenied"}, 1, fs.ErrPermission},
		"too large":       {"PutObject", fakeFault{status: 400, code: "EntityTooLarge"}, 1, nil},
		"down":            {"PutObject", fakeFault{status: 503, code: "SlowDown"}, s3WriteTries, nil},
		"down in parts":   {"CompleteMultipartUpload", fakeFault{status: 500, code: "InternalError"}, s3WriteTries, nil},
		"resets":          {"CompleteMultipartUpload", fakeFault{}, s3WriteTries, nil},
		"not S3":          {"PutObject", fakeFault{status: 404}, 1, nil},
		"not built":       {"PutObject", fakeFault{status: 501, code: "NotImplemented"}, 1, nil},
		"odd redirect":    {"PutObject", fakeFault{status: 301, code: "PermanentRedirect"}, 1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFakeS3(t)
			c := f.client()
			old := pattern(10)
			mustPut(t, c, "k", putOf(old))
			f.count("")
			f.failOnce(tt.op, 100, false, tt.fault)
			size := 300 << 10
			if tt.op == "PutObject" {
				size = 1000
			}
			err := c.putObject(t.Context(), "k", putOf(pattern(size)))
			if err == nil || (tt.target != nil && !errors.Is(err, tt.target)) || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("error %v, want %v", err, tt.target)
			}
			if n := f.count(tt.op); n != tt.tries {
				t.Errorf("%d attempts, want %d", n, tt.tries)
			}
			wantObject(t, c, "k", old)
			if f.pending() > 0 {
				t.Error("the upload was not aborted")
			}
		})
	}
}

// TestS3LostAcknowledgement: every answer to complete is lost, yet the object
// is there, and the condition did not refuse it.
func TestS3LostAcknowledgement(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	c := f.client()
	for name, fault := range map[string]fakeFault{"reset": {}, "500": {status: 500, code: "InternalError"}} {
		f.failOnce("CompleteMultipartUpload", 100, true, fault)
		p := putOf(pattern(200 << 10))
		p.ifNoneMatch = "*"
		if etag := mustPut(t, c, name, p); etag != f.object(name).etag {
			t.Errorf("%s: ETag %s", name, etag)
		}
		wantObject(t, c, name, pattern(200<<10))
	}
	// The same size with other metadata is another object.
	f.failOnce("CompleteMultipartUpload", 100, false, fakeFault{})
	p := putOf(pattern(200 << 10))
	p.ifNoneMatch = "*"
	p.meta["record"] = "another"
	if err := c.putObject(t.Context(), "reset", p); err == nil {
		t.Error("an old object was taken for the new one")
	}
}

func TestS3ConditionalPutWithLostAnswer(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	c := f.client()
	p := putOf([]byte("first"))
	p.ifNoneMatch = "*"
	f.failOnce("PutObject", 1, true, fakeFault{})
	mustPut(t, c, "k", p)
	other := putOf([]byte("later"))
	other.ifNoneMatch = "*"
	f.failOnce("PutObject", 1, false, fakeFault{})
	if err := c.putObject(t.Context(), "k", other); !errors.Is(err, errS3PreconditionFailed) {
		t.Errorf("replaced against the condition: %v", err)
	}
}

// TestS3OnlyConditionalPutsAreConfirmed: a put that may be repeated ends in the
// error of its last attempt. Nobody looks whether an earlier one took effect, and
// the next put of the same object succeeds.
func TestS3OnlyConditionalPutsAreConfirmed(t *testing.T) {
	t.Parallel()
	for op, size := range map[string]int{"PutObject": 1000, "CompleteMultipartUpload": 200 << 10} {
		f := newFakeS3(t)
		c := f.client()
		f.failOnce(op, s3WriteTries, true, fakeFault{})
		err := c.putObject(t.Context(), "k", putOf(pattern(size)))
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", op, err)
		}
		if f.count("HeadObject") > 0 || f.pending() > 0 {
			t.Errorf("%s: the client looked for the object, or left %d uploads", op, f.pending())
		}
		wantObject(t, c, "k", pattern(size))
		mustPut(t, c, "k", putOf(pattern(size)))
	}
	f := newFakeS3(t)
	c := f.client()
	f.failOnce("CompleteMultipartUpload", 1, true, fakeFault{})
	if err := c.putObject(t.Context(), "k", putOf(pattern(200<<10))); !errors.Is(err, errS3NoUpload) || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a complete whose first answer was lost: %v", err)
	}
}

func TestS3AbortsWhenTheCallerLeaves(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	c := f.client()
	ctx, cancel := context.WithCancel(t.Context())
	f.fail(func(op, _ string) (bool, *fakeFault) {
		if op == "UploadPart" {
			cancel()
			return false, &fakeFault{hang: true}
		}
		return true, nil
	})
	if err := c.putObject(ctx, "k", putOf(pattern(400<<10))); !errors.Is(err, context.Canceled) {
		t.Errorf("put: %v", err)
	}
	if f.count("AbortMultipartUpload") != 1 || f.pending() > 0 {
		t.Error("the upload was not aborted")
	}
}

func TestS3AbortThatFailsIsSwept(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	c := f.client()
	f.fail(func(op, _ string) (bool, *fakeFault) {
		return false, map[string]*fakeFault{"UploadPart": {status: 403, code: "AccessDenied"}, "AbortMultipartUpload": {status: 503, code: "SlowDown"}}[op]
	})
	if err := c.putObject(t.Context(), "k", putOf(pattern(400<<10))); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("put: %v", err)
	}
	f.fail(nil)
	if n, err := c.abortUploads(t.Context(), "", olderThan(-time.Minute)); n != 1 || err != nil || f.pending() > 0 {
		t.Errorf("%d swept, %v", n, err)
	}
}

func TestS3ReadsPassFaults(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	c := f.client()
	mustPut(t, c, "k", putOf(pattern(1000)))
	for _, fault := range []fakeFault{{}, {status: 503, code: "SlowDown"}} {
		f.failOnce("GetObject", 2, true, fault)
		wantObject(t, c, "k", pattern(1000))
		f.failOnce("ListObjectsV2", 2, true, fault)
		if err := c.listObjects(t.Context(), "", func(s3ListedEntry) error { return nil }); err != nil {
			t.Error(err)
		}
		f.failOnce("DeleteObject", 1, true, fault)
		if err := c.deleteObject(t.Context(), "x"); err != nil {
			t.Error(err)
		}
	}
	f.failOnce("ListObjectsV2", 2, true, fakeFault{cut: 60})
	if err := c.listObjects(t.Context(), "", func(s3ListedEntry) error { return nil }); err != nil {
		t.Errorf("a page that was cut: %v", err)
	}
}

func TestS3CutBodyIsNoCleanEnd(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	c := f.client()
	mustPut(t, c, "k", putOf(pattern(1000)))
	f.failOnce("GetObject", 1, true, fakeFault{cut: 500})
	o, err := c.getObject(t.Context(), "k", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	defer o.body.Close()
	got, err := io.ReadAll(o.body)
	if len(got) != 500 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestS3LearnsTheRegion(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	f.region = "eu-test-1"
	c := f.client()
	mustPut(t, c, "k", putOf(pattern(10)))
	if n := f.count("PutObject"); n != 2 {
		t.Errorf("%d attempts, want 2", n)
	}
	mustPut(t, c, "k", putOf(pattern(10)))
	if n := f.count("PutObject"); n != 1 {
		t.Errorf("%d attempts once it is known, want 1", n)
	}
	g := newFakeS3(t)
	g.region = "eu-test-2"
	c = g.client()
	g.failOnce("GetObject", 1, false, fakeFault{status: 301, code: "PermanentRedirect", region: "eu-test-2"})
	if _, err := c.getObject(t.Context(), "k", 0, ""); !errors.Is(err, fs.ErrNotExist) || g.count("GetObject") != 2 {
		t.Errorf("after a redirect: %v", err)
	}
}

func TestS3HostOfARegion(t *testing.T) {
	t.Parallel()
	for _, tt := range [][4]string{
		{"s3.amazonaws.com", "us-east-1", "eu-west-1", "s3.eu-west-1.amazonaws.com"},
		{"s3.us-west-2.amazonaws.com", "us-west-2", "eu-west-1", "s3.eu-west-1.amazonaws.com"},
		{"minio:9000", "us-east-1", "eu-west-1", "minio:9000"},
	} {
		c := timedClient(nil)
		refusal := &s3Error{endpoint: s3Endpoint{tt[0], tt[1]}, region: tt[2]}
		if !c.learnRegion(refusal) || *c.endpoint.Load() != (s3Endpoint{tt[3], tt[2]}) {
			t.Errorf("%s for %s: %v, want %s", tt[0], tt[2], *c.endpoint.Load(), tt[3])
		}
	}
}

func TestS3NamesAWrongClock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		attempts := 0
		c := timedClient(func(r *http.Request) (*http.Response, error) {
			attempts++
			body := "<Error><Code>RequestTimeTooSkewed</Code><Message>too large</Message></Error>"
			return &http.Response{StatusCode: 403, Request: r, Body: io.NopCloser(strings.NewReader(body))}, nil
		})
		err := c.putObject(t.Context(), "k", putOf(pattern(10)))
		if !errors.Is(err, errS3Clock) || errors.Is(err, fs.ErrPermission) || attempts != 1 {
			t.Errorf("%v after %d attempts, want errS3Clock after one", err, attempts)
		}
	})
}

func TestS3Bucket(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	c := f.client()
	f.drop("")
	if _, err := c.getObject(t.Context(), "k", 0, ""); !errors.Is(err, errS3NoBucket) || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("get without a bucket: %v", err)
	}
	for _, size := range []int{10, 200 << 10} {
		if err := c.putObject(t.Context(), "k", putOf(pattern(size))); !errors.Is(err, errS3NoBucket) {
			t.Errorf("put without a bucket: %v", err)
		}
	}
	must(t, c.createBucket(t.Context()))
	mustPut(t, c, "k", putOf(pattern(200<<10)))
	wantObject(t, c, "k", pattern(200<<10))
	f.drop("")
	f.foreign = true
	if err := c.createBucket(t.Context()); err == nil {
		t.Error("somebody else's bucket is ready")
	}
	if err := c.putObject(t.Context(), "k", putOf(pattern(10))); !errors.Is(err, errS3NoBucket) {
		t.Errorf("put into somebody else's: %v", err)
	}
}

func TestS3ReadOnlyBucket(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	c := f.client()
	mustPut(t, c, "k", putOf(pattern(10)))
	f.readOnly = true
	for _, size := range []int{10, 200 << 10} {
		if err := c.putObject(t.Context(), "k", putOf(pattern(size))); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("put: %v", err)
		}
	}
	wantObject(t, c, "k", pattern(10))
}

func TestS3WrongCredentials(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	f.badSignature = true
	for _, change := range []func(*s3Config){
		func(c *s3Config) { c.accessKey = "nobody" }, func(c *s3Config) { c.secretKey = "wrong-secret" },
	} {
		_, err := f.client(change).getObject(t.Context(), "k", 0, "")
		if !errors.Is(err, fs.ErrPermission) || f.count("") != 1 {
			t.Errorf("get: %v", err)
		}
		if s := err.Error(); strings.Contains(s, "wrong-secret") || strings.Contains(s, "AKID") || !strings.Contains(s, "REQ1") {
			t.Errorf("the error says %s", s)
		}
	}
}

func TestS3AnswersThatMakeNoSense(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]*http.Response{
		"range ignored": {StatusCode: 200, ContentLength: 10},
		"other range":   {StatusCode: 206, ContentLength: 5, Header: http.Header{"Content-Range": {"bytes 0-4/10"}}},
		"other length":  {StatusCode: 206, ContentLength: 4, Header: http.Header{"Content-Range": {"bytes 5-9/10"}}},
		"size unknown":  {StatusCode: 206, ContentLength: 5, Header: http.Header{"Content-Range": {"bytes 5-9/*"}}},
		"no length":     {StatusCode: 206, ContentLength: -1, Header: http.Header{"Content-Range": {"bytes 5-9/10"}}},
		"beyond size":   {StatusCode: 206, ContentLength: 5, Header: http.Header{"Content-Range": {"bytes 5-9/9"}}},
	} {
		c := &s3Client{cfg: s3Config{now: time.Now, transport: roundTrip(func(*http.Request) (*http.Response, error) {
			answer.Body = io.NopCloser(strings.NewReader("0123456789"))
			return answer, nil
		})}}
		c.endpoint.Store(&s3Endpoint{"h", "r"})
		if _, err := c.getObject(t.Context(), "k", 5, ""); !errors.Is(err, errS3BadAnswer) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// roundTrip is a transport without a network, as synctest wants it.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func timedClient(rt roundTrip) *s3Client {
	return newS3Client(s3Config{host: "h", bucket: "b", region: "r", accessKey: "a", secretKey: "s", now: time.Now, transport: rt})
}

func TestS3HangIsGivenUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := 0
		c := timedClient(func(r *http.Request) (*http.Response, error) {
			n++
			<-r.Context().Done()
			return nil, r.Context().Err()
		})
		begin := time.Now()
		_, err := c.getObject(t.Context(), "k", 0, "")
		if took := time.Since(begin); !errors.Is(err, errS3Timeout) || n != 2 || took > 3*s3ReadTimeout {
			t.Errorf("%d attempts in %v: %v", n, took, err)
		}
	})
}

// TestS3SlowIsNotHung: a body may take an hour as long as bytes arrive, and the caller
// may take any time between two reads.
func TestS3SlowIsNotHung(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		body := &slowBody{n: 100, pause: 50 * time.Second}
		c := timedClient(func(r *http.Request) (*http.Response, error) {
			body.ctx = r.Context()
			return &http.Response{StatusCode: 200, ContentLength: 101, Body: body}, nil
		})
		o, err := c.getObject(t.Context(), "k", 0, "")
		if err != nil {
			t.Fatal(err)
		}
		defer o.body.Close()
		time.Sleep(time.Hour)
		if b, err := io.ReadAll(io.LimitReader(o.body, 100)); len(b) != 100 || err != nil {
			t.Errorf("%d bytes, %v", len(b), err)
		}
		body.pause = 70 * time.Second
		if _, err := o.body.Read(make([]byte, 1)); !errors.Is(err, errS3Timeout) {
			t.Errorf("silence of 70 s: %v", err)
		}
	})
}

// slowBody sends one byte at a time, after a pause.
type slowBody struct {
	ctx   context.Context
	n     int
	pause time.Duration
}

func (b *slowBody) Read(p []byte) (int, error) {
	if err := sleepFor(b.ctx, b.pause); err != nil {
		return 0, err
	}
	return min(1, len(p)), nil
}

func (b *slowBody) Close() error { return nil }

// TestS3SlowUpload: a part may take any time while the transport reads it.
func TestS3SlowUpload(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := timedClient(func(r *http.Request) (*http.Response, error) {
			for p := make([]byte, 1); ; {
				if err := sleepFor(r.Context(), 50*time.Second); err != nil {
					return nil, err
				}
				if _, err := r.Body.Read(p); err == io.EOF {
					return &http.Response{StatusCode: 200, Header: http.Header{"Etag": {`"e"`}}, Body: http.NoBody}, nil
				}
			}
		})
		if err := c.putObject(t.Context(), "k", putOf(pattern(200))); err != nil {
			t.Error(err)
		}
	})
}

func TestS3BacksOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var stamps []string
		c := timedClient(func(r *http.Request) (*http.Response, error) {
			stamps = append(stamps, r.Header.Get("Authorization"))
			return nil, io.ErrUnexpectedEOF
		})
		begin := time.Now()
		c.cfg.now = func() time.Time { return begin.Add(time.Duration(len(stamps)) * time.Second) }
		if err := c.putObject(t.Context(), "k", putOf(pattern(10))); err == nil || len(stamps) != s3WriteTries {
			t.Errorf("%d attempts: %v", len(stamps), err)
		}
		if took := time.Since(begin); took < 5*time.Second || took > 12*time.Second {
			t.Errorf("the attempts took %v", took)
		}
		if stamps[0] == stamps[len(stamps)-1] {
			t.Error("an attempt was not signed anew")
		}
	})
	for n := range 70 {
		if d := retryDelay(n + 1); d < 50*time.Millisecond || d > 5*time.Second {
			t.Errorf("backoff(%d) = %v", n+1, d)
		}
	}
}

// TestS3PartsOverlap: several parts are sent at once, but no more than the limit.
func TestS3PartsOverlap(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var now, most atomic.Int64
		c := timedClient(func(r *http.Request) (*http.Response, error) {
			body := "<R><UploadId>u</UploadId><ETag>e</ETag></R>"
			if r.Method == "PUT" {
				most.Store(max(most.Load(), now.Add(1)))
				time.Sleep(time.Second)
				now.Add(-1)
				body = ""
			}
			return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}, nil
		})
		c.cfg.partSize = 10
		begin := time.Now()
		if err := c.putObject(t.Context(), "k", putOf(pattern(200))); err != nil {
			t.Error(err)
		}
		if most.Load() != s3ParallelParts || time.Since(begin) != 20/s3ParallelParts*time.Second {
			t.Errorf("%d parts at once, %v in all", most.Load(), time.Since(begin))
		}
	})
}
