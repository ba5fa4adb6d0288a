// fakes3_test.go: an S3 server in memory that is stricter than most, goes
// wrong on demand, and fails the test whose client breaks a rule. It shares no
// code with s3sig.go, or it would agree with its mistakes.

package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeS3 is one bucket on one server. Set the fields before the first request,
// or use the methods.
type fakeS3 struct {
	t   testing.TB
	srv *httptest.Server

	access, secret, bucket, region string

	now          func() time.Time // the server's clock
	largeParts   bool             // refuse parts below 5 MiB but the last, as most servers do
	readOnly     bool             // AccessDenied on writes
	foreign      bool             // CreateBucket answers BucketAlreadyExists: somebody else's
	badSignature bool             // the test sends wrong signatures on purpose
	pageSize     int              // of listings

	mu      sync.Mutex // guards all below
	fault   func(op, key string) (apply bool, f *fakeFault)
	exists  bool // the bucket
	objects map[string]*fakeObject
	uploads map[string]*fakeUpload
	lost    map[string]bool // uploads whose id the client never learned, or that it was not let abort
	counts  map[string]int
	serial  int
	release chan struct{} // closed at the end: lets hung requests go
}

// fakeFault is how an answer goes wrong; the operation itself may have been
// applied or not. The zero value breaks the connection.
type fakeFault struct {
	status int    // with code: answer so. 200 too, for complete
	code   string // of the error body
	region string // in the error body and header
	cut    int64  // break the true answer off after so many bytes of its body
	hang   bool   // accept and never answer
}

type fakeObject struct {
	data     []byte
	etag     string
	meta     http.Header // Content-Type and X-Amz-Meta-*
	modified time.Time
}

type fakeUpload struct {
	key       string
	meta      http.Header
	parts     map[int]*fakeObject
	initiated time.Time
}

// fakeError is what an operation answers instead.
type fakeError struct {
	status  int
	code    string
	message string
}

func newFakeS3(t testing.TB) *fakeS3 {
	f := &fakeS3{t: t, access: "fake-access", secret: "fake/secret+key", bucket: "cache", region: "us-east-1",
		now: time.Now, pageSize: 1000, exists: true,
		objects: map[string]*fakeObject{}, uploads: map[string]*fakeUpload{}, lost: map[string]bool{},
		counts: map[string]int{}, release: make(chan struct{})}
	f.srv = httptest.NewServer(f)
	t.Cleanup(f.end)
	return f
}

// end checks that nothing was left behind.
func (f *fakeS3) end() {
	close(f.release)
	f.srv.Close()
	for id, u := range f.uploads {
		if !f.lost[id] {
			f.t.Errorf("fake S3: the upload of %q was neither completed nor aborted", u.key)
		}
	}
}

// config is a client's configuration for this server, without waits between
// attempts. Connections go to the server whatever the host is called.
func (f *fakeS3) config() s3Config {
	addr := f.srv.Listener.Addr().String()
	tr := newS3Transport()
	tr.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return dialS3(ctx, network, addr)
	}
	f.t.Cleanup(tr.CloseIdleConnections)
	return s3Config{host: addr, bucket: f.bucket, accessKey: f.access, secretKey: f.secret, region: "us-east-1",
		partSize: 64 << 10, now: time.Now, transport: tr, log: slog.New(slog.DiscardHandler),
		sleep: func(ctx context.Context, _ time.Duration) error { return ctx.Err() }}
}

// fail sets how operations go wrong from now on; nil heals the server.
func (f *fakeS3) fail(fault func(op, key string) (apply bool, f *fakeFault)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = fault
}

// failOnce makes the next n requests of one operation go wrong.
func (f *fakeS3) failOnce(op string, n int, apply bool, fault fakeFault) {
	f.fail(func(o, _ string) (bool, *fakeFault) {
		if o != op || n == 0 {
			return true, nil
		}
		n--
		return apply, &fault
	})
}

// count says how often an operation was asked for, "" all of them, and begins
// again at zero.
func (f *fakeS3) count(op string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, c := range f.counts {
		if op == "" || op == name {
			n += c
			delete(f.counts, name)
		}
	}
	return n
}

// object returns what is stored under a key, or nil.
func (f *fakeS3) object(key string) *fakeObject {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.objects[key]
}

// drop removes an object behind the client's back; "" removes the bucket.
func (f *fakeS3) drop(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if key == "" {
		f.exists = false
		clear(f.objects)
	}
	delete(f.objects, key)
}

// pending is the number of unfinished uploads.
func (f *fakeS3) pending() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.uploads)
}

func (f *fakeS3) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key, q := f.locate(r)
	op := operation(r.Method, key, q)
	apply, fault := f.arrive(op, key)
	if fault != nil && !apply {
		f.breakOff(w, r, fault, nil)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client gave up
	}
	rec := httptest.NewRecorder()
	if e := f.check(r, body); e != nil {
		f.refuse(rec, r, e)
	} else if e := f.apply(rec, r, op, key, q, body); e != nil {
		f.refuse(rec, r, e)
	}
	if fault != nil {
		if op == "CreateMultipartUpload" {
			f.forget(key)
		}
		f.breakOff(w, r, fault, rec)
		return
	}
	f.answer(w, r, rec)
}

func (f *fakeS3) answer(w http.ResponseWriter, r *http.Request, rec *httptest.ResponseRecorder) {
	maps.Copy(w.Header(), rec.Header())
	w.Header().Set("Date", f.now().UTC().Format(http.TimeFormat))
	w.Header().Set("X-Amz-Request-Id", "REQ1")
	if w.Header().Get("Content-Length") == "" {
		w.Header().Set("Content-Length", strconv.Itoa(rec.Body.Len()))
	}
	w.WriteHeader(rec.Code)
	w.Write(rec.Body.Bytes())
}

// arrive counts a request and asks how it will go.
func (f *fakeS3) arrive(op, key string) (bool, *fakeFault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.counts[op]++
	if f.fault == nil {
		return true, nil
	}
	apply, fault := f.fault(op, key)
	if op == "AbortMultipartUpload" && fault != nil {
		for id, u := range f.uploads {
			f.lost[id] = f.lost[id] || u.key == key
		}
	}
	return apply, fault
}

// forget notes that a client was never told of its uploads.
func (f *fakeS3) forget(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, u := range f.uploads {
		f.lost[id] = f.lost[id] || u.key == key
	}
}

func (f *fakeS3) breakOff(w http.ResponseWriter, r *http.Request, fault *fakeFault, rec *httptest.ResponseRecorder) {
	switch {
	case fault.hang:
		io.Copy(io.Discard, r.Body) // or the server never sees the client leave
		select {
		case <-r.Context().Done():
		case <-f.release:
		}
	case fault.cut > 0 && rec != nil:
		maps.Copy(w.Header(), rec.Header())
		w.Header().Set("Content-Length", strconv.Itoa(rec.Body.Len()))
		w.WriteHeader(rec.Code)
		w.Write(rec.Body.Bytes()[:min(fault.cut, int64(rec.Body.Len()))])
		http.NewResponseController(w).Flush()
	case fault.status != 0:
		out := httptest.NewRecorder()
		if fault.region != "" {
			out.Header().Set("X-Amz-Bucket-Region", fault.region)
		}
		writeFakeError(out, r, fakeError{fault.status, fault.code, "as the test asked"}, fault.region)
		f.answer(w, r, out)
		return
	}
	panic(http.ErrAbortHandler)
}

func (f *fakeS3) refuse(w *httptest.ResponseRecorder, r *http.Request, e *fakeError) {
	region := ""
	if e.code == "AuthorizationHeaderMalformed" {
		region = f.region
	}
	writeFakeError(w, r, *e, region)
}

func writeFakeError(w http.ResponseWriter, r *http.Request, e fakeError, region string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(e.status)
	if r.Method == http.MethodHead || e.status == http.StatusNotModified {
		return
	}
	fmt.Fprintf(w, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>%s</Code><Message>%s</Message><AWSAccessKeyId>AKID</AWSAccessKeyId>", e.code, e.message)
	if region != "" {
		fmt.Fprintf(w, "<Region>%s</Region>", region)
	}
	fmt.Fprint(w, "<RequestId>REQ1</RequestId></Error>")
}

// locate reads the key and the query from the wire, bucket in path or host.
func (f *fakeS3) locate(r *http.Request) (key string, q url.Values) {
	path, query, _ := strings.Cut(r.RequestURI, "?")
	q, err := url.ParseQuery(query)
	if err != nil {
		f.t.Errorf("fake S3: bad query %q", query)
	}
	path, err = url.PathUnescape(path)
	if err != nil {
		f.t.Errorf("fake S3: bad path %q", path)
	}
	if strings.HasPrefix(r.Host, f.bucket+".") {
		return path[1:], q
	}
	bucket, key, _ := strings.Cut(path[1:], "/")
	if bucket != f.bucket {
		f.t.Errorf("fake S3: bucket %q was asked for", bucket)
	}
	return key, q
}

func operation(method, key string, q url.Values) string {
	switch {
	case method == "GET" && key == "" && q.Has("uploads"):
		return "ListMultipartUploads"
	case method == "GET" && key == "" && q.Get("list-type") == "2":
		return "ListObjectsV2"
	case method == "PUT" && key == "":
		return "CreateBucket"
	case method == "HEAD" && key == "":
		return "HeadBucket"
	case method == "POST" && q.Has("uploads"):
		return "CreateMultipartUpload"
	case method == "POST" && q.Has("uploadId"):
		return "CompleteMultipartUpload"
	case method == "DELETE" && q.Has("uploadId"):
		return "AbortMultipartUpload"
	case method == "PUT" && q.Has("uploadId"):
		return "UploadPart"
	case key != "" && len(q) == 0:
		return map[string]string{"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject", "DELETE": "DeleteObject"}[method]
	}
	return ""
}

// check verifies framing, clock, region and signature.
func (f *fakeS3) check(r *http.Request, body []byte) *fakeError {
	hash := r.Header.Get("X-Amz-Content-Sha256")
	if strings.HasPrefix(hash, "STREAMING") || strings.Contains(r.Header.Get("Content-Encoding"), "aws-chunked") || len(r.TransferEncoding) > 0 {
		f.t.Errorf("fake S3: %s %s has chunk framing", r.Method, r.URL)
	}
	var access, day, region, signed, sig string
	auth := strings.NewReplacer("/", " ", ",", " ", "SignedHeaders=", "", "Signature=", "", "Credential=", "").Replace(r.Header.Get("Authorization"))
	if n, _ := fmt.Sscanf(auth, "AWS4-HMAC-SHA256 %s %s %s s3 aws4_request %s %s", &access, &day, &region, &signed, &sig); n != 5 {
		f.t.Errorf("fake S3: %s %s is not signed: %q", r.Method, r.URL, r.Header.Get("Authorization"))
		return &fakeError{403, "AccessDenied", "no signature"}
	}
	date, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	sum := sha256.Sum256(body)
	switch {
	case access != f.access:
		return &fakeError{403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."}
	case err != nil || date.Sub(f.now()).Abs() > 15*time.Minute:
		return &fakeError{403, "RequestTimeTooSkewed", "The difference between the request time and the server's time is too large."}
	case region != f.region || day != date.Format("20060102"):
		return &fakeError{400, "AuthorizationHeaderMalformed", "The authorization header is malformed; expecting '" + f.region + "'"}
	case hash != hex.EncodeToString(sum[:]):
		return &fakeError{400, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match what was computed."}
	case sig != f.signature(r, hash, day, signed):
		if !f.badSignature {
			f.t.Errorf("fake S3: wrong signature on %s %s", r.Method, r.RequestURI)
		}
		return &fakeError{403, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided."}
	}
	return nil
}

// signature is what the wire should have been signed with.
func (f *fakeS3) signature(r *http.Request, hash, day, signed string) string {
	path, query, _ := strings.Cut(r.RequestURI, "?")
	plain, _ := url.PathUnescape(path)
	if fakeEncode(plain, "/") != path {
		f.t.Errorf("fake S3: the path %q is not in canonical spelling", path)
	}
	var headers strings.Builder
	for name := range strings.SplitSeq(signed, ";") {
		value := strings.Join(r.Header.Values(name), ",")
		switch name {
		case "host":
			value = r.Host
		case "accept-encoding", "user-agent", "expect", "connection":
			f.t.Errorf("fake S3: %s is signed, which proxies may change", name)
		}
		headers.WriteString(name + ":" + strings.Join(strings.Fields(value), " ") + "\n")
	}
	for name := range r.Header {
		if strings.HasPrefix(name, "X-Amz-") && !slices.Contains(strings.Split(signed, ";"), strings.ToLower(name)) {
			f.t.Errorf("fake S3: %s is not signed", name)
		}
	}
	canonical := strings.Join([]string{r.Method, fakeEncode(plain, "/"), fakeQuery(query), headers.String(), signed, hash}, "\n")
	sum := sha256.Sum256([]byte(canonical))
	mac := []byte("AWS4" + f.secret)
	for _, s := range []string{day, f.region, "s3", "aws4_request", "AWS4-HMAC-SHA256\n" + r.Header.Get("X-Amz-Date") + "\n" +
		day + "/" + f.region + "/s3/aws4_request\n" + hex.EncodeToString(sum[:])} {
		h := hmac.New(sha256.New, mac)
		h.Write([]byte(s))
		mac = h.Sum(nil)
	}
	return hex.EncodeToString(mac)
}

// fakeQuery decodes, encodes and sorts a query.
func fakeQuery(query string) string {
	if query == "" {
		return ""
	}
	var pairs []string
	for pair := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(pair, "=")
		name, _ = url.PathUnescape(name) // a raw + is a plus sign in a signature
		value, _ = url.PathUnescape(value)
		pairs = append(pairs, fakeEncode(name, "")+"\x00="+fakeEncode(value, "")) // NUL: shorter names first
	}
	slices.Sort(pairs)
	return strings.ReplaceAll(strings.Join(pairs, "&"), "\x00", "")
}

func fakeEncode(s, also string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if strings.IndexByte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"+also, c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// apply carries one operation out.
func (f *fakeS3) apply(w http.ResponseWriter, r *http.Request, op, key string, q url.Values, body []byte) *fakeError {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(key) > 1024 {
		return &fakeError{400, "KeyTooLongError", "Your key is too long"}
	}
	if f.readOnly && r.Method != "GET" && r.Method != "HEAD" {
		return &fakeError{403, "AccessDenied", "Access Denied."}
	}
	if !f.exists && op != "CreateBucket" {
		return &fakeError{404, "NoSuchBucket", "The specified bucket does not exist"}
	}
	do, ok := map[string]func(http.ResponseWriter, *http.Request, string, url.Values, []byte) *fakeError{
		"GetObject": f.getObject, "HeadObject": f.getObject, "PutObject": f.putObject, "DeleteObject": f.deleteObject,
		"ListObjectsV2": f.listObjects, "CreateBucket": f.createBucket, "HeadBucket": f.headBucket,
		"CreateMultipartUpload": f.createUpload, "UploadPart": f.uploadPart, "CompleteMultipartUpload": f.completeUpload,
		"AbortMultipartUpload": f.abortUpload, "ListMultipartUploads": f.listUploads,
	}[op]
	if !ok {
		f.t.Errorf("fake S3: %s %s is no operation", r.Method, r.URL)
		return &fakeError{501, "NotImplemented", "no such operation"}
	}
	return do(w, r, key, q, body)
}

func (f *fakeS3) headBucket(http.ResponseWriter, *http.Request, string, url.Values, []byte) *fakeError {
	return nil
}

func (f *fakeS3) createBucket(w http.ResponseWriter, r *http.Request, _ string, _ url.Values, body []byte) *fakeError {
	if f.foreign {
		return &fakeError{409, "BucketAlreadyExists", "The requested bucket name is not available."}
	}
	if f.exists {
		return &fakeError{409, "BucketAlreadyOwnedByYou", "Your previous request to create the named bucket succeeded."}
	}
	if want := f.region != "us-east-1"; want != bytes.Contains(body, []byte("<LocationConstraint>"+f.region+"</LocationConstraint>")) {
		return &fakeError{400, "IllegalLocationConstraintException", "The location constraint is wrong"}
	}
	f.exists = true
	return nil
}

func (f *fakeS3) getObject(w http.ResponseWriter, r *http.Request, key string, _ url.Values, _ []byte) *fakeError {
	o := f.objects[key]
	if o == nil {
		return &fakeError{404, "NoSuchKey", "The specified key does not exist."}
	}
	if e := f.conditions(r, o); e != nil {
		return e
	}
	var first, last = int64(0), int64(len(o.data)) - 1
	status := http.StatusOK
	if spec, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
		a, b, _ := strings.Cut(spec, "-")
		first, _ = strconv.ParseInt(a, 10, 64)
		if b != "" {
			n, _ := strconv.ParseInt(b, 10, 64)
			last = min(n, last)
		}
		if first >= int64(len(o.data)) {
			return &fakeError{416, "InvalidRange", "The requested range is not satisfiable"}
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(o.data)))
		status = http.StatusPartialContent
	}
	maps.Copy(w.Header(), o.meta)
	w.Header().Set("ETag", o.etag)
	w.Header().Set("Last-Modified", o.modified.UTC().Format(http.TimeFormat))
	w.Header().Set("Content-Length", strconv.FormatInt(last+1-first, 10))
	w.WriteHeader(status)
	if r.Method == "GET" {
		w.Write(o.data[first : last+1])
	}
	return nil
}

// conditions are those of reads and writes; o may be nil.
func (f *fakeS3) conditions(r *http.Request, o *fakeObject) *fakeError {
	etag := ""
	if o != nil {
		etag = o.etag
	}
	if m := r.Header.Get("If-Match"); m != "" && m != etag {
		return &fakeError{412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold"}
	}
	if m := r.Header.Get("If-None-Match"); m != "" && o != nil && (m == "*" || m == etag) {
		if r.Method == "GET" || r.Method == "HEAD" {
			return &fakeError{304, "", ""}
		}
		return &fakeError{412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold"}
	}
	return nil
}

// newObject gives data an ETag that is no MD5, as encrypted buckets do.
func (f *fakeS3) newObject(data []byte, meta http.Header, suffix string) *fakeObject {
	f.serial++
	return &fakeObject{data: data, meta: meta, etag: fmt.Sprintf(`"%032x%s"`, f.serial, suffix), modified: f.now()}
}

func fakeMeta(r *http.Request) (http.Header, *fakeError) {
	h, size := http.Header{}, 0
	for name, v := range r.Header {
		if strings.HasPrefix(name, "X-Amz-Meta-") {
			size += len(name) - len("X-Amz-Meta-") + len(v[0])
			h[name] = v
		} else if name == "Content-Type" {
			h[name] = v
		}
	}
	if size > 2048 {
		return nil, &fakeError{400, "MetadataTooLarge", "Your metadata headers exceed the maximum allowed metadata size."}
	}
	return h, nil
}

func (f *fakeS3) putObject(w http.ResponseWriter, r *http.Request, key string, _ url.Values, body []byte) *fakeError {
	meta, e := fakeMeta(r)
	if e == nil {
		e = f.conditions(r, f.objects[key])
	}
	if e != nil {
		return e
	}
	o := f.newObject(body, meta, "")
	f.objects[key] = o
	w.Header().Set("ETag", o.etag)
	return nil
}

func (f *fakeS3) deleteObject(w http.ResponseWriter, _ *http.Request, key string, _ url.Values, _ []byte) *fakeError {
	delete(f.objects, key)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// fakeKey is a key as encoding-type=url spells it, with Amazon's "+".
func fakeKey(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "%2F", "/") }

func (f *fakeS3) listObjects(w http.ResponseWriter, r *http.Request, _ string, q url.Values, _ []byte) *fakeError {
	if q.Get("encoding-type") != "url" {
		f.t.Errorf("fake S3: a listing without encoding-type=url")
	}
	after, _ := hex.DecodeString(q.Get("continuation-token"))
	size := f.pageSize
	if n, err := strconv.Atoi(q.Get("max-keys")); err == nil {
		size = min(size, n)
	}
	fmt.Fprint(w, "<ListBucketResult><EncodingType>url</EncodingType>")
	n, last := 0, ""
	for _, key := range slices.Sorted(maps.Keys(f.objects)) {
		if !strings.HasPrefix(key, q.Get("prefix")) || len(after) > 0 && key <= string(after) {
			continue
		}
		if n == size {
			fmt.Fprintf(w, "<IsTruncated>true</IsTruncated><NextContinuationToken>%x</NextContinuationToken>", last)
			break
		}
		n, last = n+1, key
		o := f.objects[key]
		fmt.Fprintf(w, "<Contents><Key>%s</Key><LastModified>%s</LastModified><ETag>%s</ETag><Size>%d</Size></Contents>",
			fakeKey(key), o.modified.UTC().Format(time.RFC3339Nano), o.etag, len(o.data))
	}
	fmt.Fprint(w, "</ListBucketResult>")
	return nil
}

func (f *fakeS3) createUpload(w http.ResponseWriter, r *http.Request, key string, _ url.Values, _ []byte) *fakeError {
	meta, e := fakeMeta(r)
	if e != nil {
		return e
	}
	f.serial++
	id := fmt.Sprintf("id+%d/=", f.serial)
	f.uploads[id] = &fakeUpload{key: key, meta: meta, parts: map[int]*fakeObject{}, initiated: f.now()}
	fmt.Fprintf(w, "<InitiateMultipartUploadResult><Key>%s</Key><UploadId>%s</UploadId></InitiateMultipartUploadResult>", fakeKey(key), id)
	return nil
}

func (f *fakeS3) upload(key string, q url.Values) (*fakeUpload, *fakeError) {
	u := f.uploads[q.Get("uploadId")]
	if u == nil || u.key != key {
		return nil, &fakeError{404, "NoSuchUpload", "The specified multipart upload does not exist."}
	}
	return u, nil
}

func (f *fakeS3) uploadPart(w http.ResponseWriter, r *http.Request, key string, q url.Values, body []byte) *fakeError {
	u, e := f.upload(key, q)
	if e != nil {
		return e
	}
	n, err := strconv.Atoi(q.Get("partNumber"))
	if err != nil || n < 1 || n > 10_000 {
		return &fakeError{400, "InvalidArgument", "Part number must be an integer between 1 and 10000"}
	}
	u.parts[n] = f.newObject(body, nil, "")
	w.Header().Set("ETag", u.parts[n].etag)
	return nil
}

func (f *fakeS3) completeUpload(w http.ResponseWriter, r *http.Request, key string, q url.Values, body []byte) *fakeError {
	u, e := f.upload(key, q)
	if e == nil {
		e = f.conditions(r, f.objects[key])
	}
	if e != nil {
		return e
	}
	var list struct {
		XMLName xml.Name `xml:"CompleteMultipartUpload"`
		Part    []struct {
			PartNumber int
			ETag       string
		}
	}
	if xml.Unmarshal(body, &list) != nil || len(list.Part) == 0 {
		return &fakeError{400, "MalformedXML", "The XML you provided was not well-formed"}
	}
	var data []byte
	for i, p := range list.Part {
		part := u.parts[p.PartNumber]
		if part == nil || part.etag != p.ETag || p.PartNumber != i+1 {
			return &fakeError{400, "InvalidPart", "One or more of the specified parts could not be found."}
		}
		first, last := len(u.parts[list.Part[0].PartNumber].data), i == len(list.Part)-1
		if n := len(part.data); !last && n != first || last && n > first {
			f.t.Errorf("fake S3: part %d of %q has %d bytes, the first %d", p.PartNumber, key, n, first)
			return &fakeError{400, "InvalidPart", "All non-trailing parts must have the same length."}
		}
		if f.largeParts && !last && len(part.data) < 5<<20 {
			return &fakeError{400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed object size."}
		}
		data = append(data, part.data...)
	}
	o := f.newObject(data, u.meta, fmt.Sprintf("-%d", len(list.Part)))
	f.objects[key] = o
	delete(f.uploads, q.Get("uploadId"))
	fmt.Fprintf(w, "<CompleteMultipartUploadResult><Key>%s</Key><ETag>%s</ETag></CompleteMultipartUploadResult>", fakeKey(key), o.etag)
	return nil
}

func (f *fakeS3) abortUpload(w http.ResponseWriter, _ *http.Request, key string, q url.Values, _ []byte) *fakeError {
	if _, e := f.upload(key, q); e != nil {
		return e
	}
	delete(f.uploads, q.Get("uploadId"))
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (f *fakeS3) listUploads(w http.ResponseWriter, _ *http.Request, _ string, q url.Values, _ []byte) *fakeError {
	ids := slices.SortedFunc(maps.Keys(f.uploads), func(a, b string) int {
		return strings.Compare(f.uploads[a].key+"\x00"+a, f.uploads[b].key+"\x00"+b)
	})
	fmt.Fprint(w, "<ListMultipartUploadsResult><EncodingType>url</EncodingType>")
	mark := q.Get("key-marker") + "\x00" + q.Get("upload-id-marker")
	n, lastKey, lastID := 0, "", ""
	for _, id := range ids {
		u := f.uploads[id]
		if !strings.HasPrefix(u.key, q.Get("prefix")) || u.key+"\x00"+id <= mark {
			continue
		}
		if n == f.pageSize {
			fmt.Fprintf(w, "<IsTruncated>true</IsTruncated><NextKeyMarker>%s</NextKeyMarker><NextUploadIdMarker>%s</NextUploadIdMarker>", fakeKey(lastKey), lastID)
			break
		}
		n, lastKey, lastID = n+1, u.key, id
		fmt.Fprintf(w, "<Upload><Key>%s</Key><UploadId>%s</UploadId><Initiated>%s</Initiated></Upload>",
			fakeKey(u.key), id, u.initiated.UTC().Format(time.RFC3339Nano))
	}
	fmt.Fprint(w, "</ListMultipartUploadsResult>")
	return nil
}
