// s3sig.go: a client for S3 and what speaks like it (MinIO, Ceph, R2, Garage,
// rclone, versitygw): Signature Version 4 and the few operations that a store
// of whole objects needs. It knows nothing of the rest of the program.
//
// A method has succeeded only when the server said so, or when the object was
// seen in place afterwards. Each attempt is built and signed anew, with the
// region and the clock that earlier answers taught.
package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	s3PartSize    = 64 << 20 // one PUT up to here; then 10,000 parts reach 640 GB and a failed part costs little
	s3MaxParts    = 10_000   // S3's limit; a larger object gets larger parts
	s3Parallel    = 4        // parts at once: fills a line with 100 ms round trips, holds no memory but buffers
	s3ReadTries   = 3        // a client waits for a read
	s3WriteTries  = 8        // 6 to 11 s: over a server's restart. Giving up costs the download
	s3Idle        = 60 * time.Second
	s3ReadWait    = 5 * time.Second  // for a read's header: a store this slow had better be passed by
	s3WriteWait   = 60 * time.Second // for a write's header, once the body is sent
	s3JoinWait    = 10 * time.Minute // for complete's header: some servers copy the parts together first
	s3CleanupWait = 30 * time.Second // to abort and look again when the caller's context is over
	s3SkewLimit   = 5 * time.Minute  // servers refuse at 15; less is no reason to distrust our clock
	s3XMLLimit    = 8 << 20          // a page of 1,000 keys of 1,024 bytes, each byte as %XX, is 4 MiB
	s3TextLimit   = 200              // of a server's message in our errors and logs
)

var (
	errS3NoBucket = errors.New("no such bucket")           // not fs.ErrNotExist: nothing can be kept there
	errS3Same     = errors.New("the object is unchanged")  // If-None-Match of a get
	errS3Changed  = errors.New("a condition was not met")  // If-Match of a get, any condition of a put
	errS3Idle     = errors.New("no byte moved in time")    // header or body
	errS3Answer   = errors.New("unexpected answer")        // no S3 server says such a thing
	errS3Metadata = errors.New("metadata is not sendable") // see checkMeta
)

// s3config says where objects are kept. The fields after secretKey may be left
// zero, but for now.
type s3config struct {
	host      string // of the endpoint, with its port if any
	secure    bool   // https
	bucket    string
	accessKey string
	secretKey string

	region      string // us-east-1
	virtualHost bool   // bucket.host/key instead of host/bucket/key
	partSize    int64  // s3PartSize; tests use less

	now       func() time.Time
	sleep     func(ctx context.Context, d time.Duration) error // between attempts
	transport http.RoundTripper
	log       *slog.Logger
}

// String keeps the secret key out of whatever prints a configuration.
func (c s3config) String() string { return c.host + "/" + c.bucket }

// s3client is one bucket. All methods may be called concurrently.
type s3client struct {
	cfg   s3config
	place atomic.Pointer[s3place]
	skew  atomic.Int64 // nanoseconds that the server's clock is ahead of ours
	day   atomic.Pointer[s3dayKey]
}

// s3place is what a server may correct.
type s3place struct{ host, region string }

// s3object is what a server has under a key. The holder of a got one closes
// body; a body that ends early says io.ErrUnexpectedEOF.
type s3object struct {
	size     int64 // of the whole object, whatever range was asked for
	etag     string
	modified time.Time
	meta     map[string]string // names in lower case
	body     io.ReadCloser     // nil from head
}

// s3get is the part of an object that is wanted, under which conditions.
type s3get struct {
	off, n      int64  // n <= 0: to the end
	ifMatch     string // ETag; else errS3Changed
	ifNoneMatch string // ETag; if so errS3Same
}

// s3put is an object to store.
type s3put struct {
	body        io.ReaderAt // read more than once: hashed by parts, sent again
	size        int64
	sha256      string            // hex, of the whole body
	meta        map[string]string // printable ASCII, 2 KB in all; something unique in it lets a lost answer be cleared up
	contentType string
	ifMatch     string // ETag of what may be replaced
	ifNoneMatch string // "*": do not replace
}

// s3item is one line of a listing.
type s3item struct {
	key, etag string
	size      int64
	modified  time.Time
}

// s3Error is a server's refusal. errors.Is finds fs.ErrNotExist,
// fs.ErrPermission and the sentinels above in it.
type s3Error struct {
	status                   int
	code, message, requestID string

	region string    // that the server says is right
	date   time.Time // its clock
	used   s3place   // by the request
	sent   time.Time // the request's signing time
}

func (e *s3Error) Error() string {
	text := strings.TrimSpace(e.code + " " + e.message)
	if e.requestID != "" {
		text += " (request " + e.requestID + ")"
	}
	return fmt.Sprintf("s3: %d %s", e.status, text)
}

// Is goes by the code alone: a 404 without one does not come from S3 but from
// something in front of it, and is no proof that an object is missing.
func (e *s3Error) Is(target error) bool {
	switch e.code {
	case "NoSuchKey", "NoSuchUpload", "NotFound":
		return target == fs.ErrNotExist
	case "NoSuchBucket":
		return target == errS3NoBucket
	case "NotModified":
		return target == errS3Same
	case "PreconditionFailed", "ConditionalRequestConflict":
		return target == errS3Changed
	}
	return target == fs.ErrPermission && (e.status == http.StatusForbidden || e.code == "AccessDenied")
}

// newS3 makes a client; it asks nothing yet.
func newS3(cfg s3config) (*s3client, error) {
	if cfg.host == "" || strings.ContainsAny(cfg.host, "/?#@ ") {
		return nil, fmt.Errorf("s3: bad endpoint host %q", cfg.host)
	}
	if cfg.bucket == "" || uriEncode(cfg.bucket, false) != cfg.bucket {
		return nil, fmt.Errorf("s3: bad bucket name %q", cfg.bucket)
	}
	if cfg.accessKey == "" || cfg.secretKey == "" || cfg.now == nil {
		return nil, errors.New("s3: access key, secret key and clock are needed")
	}
	if cfg.region == "" {
		cfg.region = "us-east-1"
	}
	if cfg.partSize <= 0 {
		cfg.partSize = s3PartSize
	}
	if cfg.sleep == nil {
		cfg.sleep = s3pause
	}
	if cfg.log == nil {
		cfg.log = slog.New(slog.DiscardHandler)
	}
	if cfg.transport == nil {
		cfg.transport = s3transport()
	}
	c := &s3client{cfg: cfg}
	c.place.Store(&s3place{host: bareHost(cfg.host, cfg.secure), region: cfg.region})
	return c, nil
}

// s3transport speaks HTTP/1 only (one HTTP/2 connection would share a window
// among all bodies), through no proxy, and leaves timeouts to the watch of each
// attempt, since a read and a complete have very different patience.
func s3transport() *http.Transport {
	return &http.Transport{
		DialContext:           (&net.Dialer{Timeout: s3ReadWait}).DialContext,
		TLSHandshakeTimeout:   s3ReadWait,
		ExpectContinueTimeout: time.Second,
		MaxIdleConnsPerHost:   64,
		MaxConnsPerHost:       1000, // descriptors are finite
		IdleConnTimeout:       60 * time.Second,
		DisableCompression:    true,
		ReadBufferSize:        64 << 10,
		WriteBufferSize:       64 << 10,
	}
}

// get opens an object. Metadata, total size and body from off come with one
// request.
func (c *s3client) get(ctx context.Context, key string, g s3get) (*s3object, error) {
	h := http.Header{}
	setHeader(h, "Range", g.rangeHeader())
	setHeader(h, "If-Match", g.ifMatch)
	setHeader(h, "If-None-Match", g.ifNoneMatch)
	resp, err := c.do(ctx, &s3op{doing: "getting", method: "GET", key: key, header: h, keep: true})
	if err != nil {
		return nil, err
	}
	o := objectOf(resp)
	if err := o.readRange(resp, g); err != nil {
		resp.Body.Close()
		return nil, fmt.Errorf("getting %q: %w", key, err)
	}
	o.body = resp.Body
	return o, nil
}

// rangeHeader leaves Range out for a whole object: of an empty one even
// bytes=0- cannot be had.
func (g s3get) rangeHeader() string {
	switch {
	case g.n > 0:
		return fmt.Sprintf("bytes=%d-%d", g.off, g.off+g.n-1)
	case g.off > 0:
		return fmt.Sprintf("bytes=%d-", g.off)
	}
	return ""
}

// head asks what is under a key.
func (c *s3client) head(ctx context.Context, key string) (*s3object, error) {
	resp, err := c.do(ctx, &s3op{doing: "asking for", method: "HEAD", key: key})
	if err != nil {
		return nil, err
	}
	return objectOf(resp), nil
}

func objectOf(resp *http.Response) *s3object {
	o := &s3object{size: resp.ContentLength, etag: resp.Header.Get("Etag"), meta: map[string]string{}}
	o.modified, _ = http.ParseTime(resp.Header.Get("Last-Modified"))
	for name, values := range resp.Header {
		if m, ok := strings.CutPrefix(name, "X-Amz-Meta-"); ok {
			o.meta[strings.ToLower(m)] = values[0]
		}
	}
	return o
}

// readRange takes the whole size from Content-Range, and refuses an answer that
// is not the range that was asked for: its bytes would be taken for others.
func (o *s3object) readRange(resp *http.Response, g s3get) error {
	ranged := g.rangeHeader() != ""
	if ranged != (resp.StatusCode == http.StatusPartialContent) || resp.ContentLength < 0 {
		return fmt.Errorf("status %d, length %d: %w", resp.StatusCode, resp.ContentLength, errS3Answer)
	}
	if !ranged {
		return nil
	}
	var first, last int64
	cr := resp.Header.Get("Content-Range")
	_, err := fmt.Sscanf(cr, "bytes %d-%d/%d", &first, &last, &o.size)
	if err != nil || first != g.off || last-first+1 != resp.ContentLength || last >= o.size {
		return fmt.Errorf("content range %q: %w", limitText(cr), errS3Answer)
	}
	return nil
}

// delete removes an object. S3 does not say whether there was one.
func (c *s3client) delete(ctx context.Context, key string) error {
	_, err := c.do(ctx, &s3op{doing: "deleting", method: "DELETE", key: key, wait: s3WriteWait})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // some servers do say; after a lost answer it means nothing
	}
	return err
}

// put stores an object and returns its ETag, an opaque name of this version.
// Large ones go up in parts. On an error the old object is still in place,
// unless the server could not be asked.
func (c *s3client) put(ctx context.Context, key string, p s3put) (etag string, err error) {
	if err := checkMeta(p.meta); err != nil {
		return "", fmt.Errorf("putting %q: %w", key, err)
	}
	if p.size > c.cfg.partSize {
		return c.putParts(ctx, key, p)
	}
	h := p.header()
	p.conditions(h)
	op := &s3op{doing: "putting", method: "PUT", key: key, header: h, body: p.body, size: p.size, sum: p.sha256, write: true}
	resp, err := c.do(ctx, op)
	if err == nil {
		return resp.Header.Get("Etag"), nil
	}
	if op.unsure(err) {
		ctx, cancel := afterwards(ctx)
		defer cancel()
		return c.landed(ctx, key, p, err)
	}
	return "", err
}

// afterwards is a context to clean up in when the caller's may be over.
func afterwards(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), s3CleanupWait)
}

// checkMeta lets only text through that reaches every server unchanged: beyond
// ASCII, and at the ends of a value, each has habits of its own.
func checkMeta(meta map[string]string) error {
	for name, v := range meta {
		odd := strings.IndexFunc(v, func(r rune) bool { return r < ' ' || r > '~' }) >= 0
		if odd || strings.TrimSpace(v) != v || name == "" || uriEncode(name, false) != name {
			return fmt.Errorf("field %q: %w", limitText(name), errS3Metadata)
		}
	}
	return nil
}

func (p s3put) header() http.Header {
	h := http.Header{}
	setHeader(h, "Content-Type", p.contentType)
	for name, v := range p.meta {
		h.Set("X-Amz-Meta-"+name, v)
	}
	return h
}

func (p s3put) conditions(h http.Header) {
	setHeader(h, "If-Match", p.ifMatch)
	setHeader(h, "If-None-Match", p.ifNoneMatch)
}

// landed looks whether a put took place whose answer was lost or an error, and
// returns that error if not. It goes by size and metadata, never by ETag: that
// is an MD5 on some servers and for some objects only. Without metadata nothing
// tells the new object from an old one.
func (c *s3client) landed(ctx context.Context, key string, p s3put, err error) (string, error) {
	o, herr := c.head(ctx, key)
	if herr != nil || o.size != p.size || len(p.meta) == 0 {
		return "", err
	}
	for name, v := range p.meta { // servers add fields: rclone has mtime
		if o.meta[strings.ToLower(name)] != v {
			return "", err
		}
	}
	return o.etag, nil
}

// putParts is a multipart upload. Whatever happens it is aborted unless it was
// completed; what cannot be aborted either is left for sweep, as is an upload
// whose begin was answered into the void.
func (c *s3client) putParts(ctx context.Context, key string, p s3put) (string, error) {
	id, err := c.begin(ctx, key, p)
	if err != nil {
		return "", err
	}
	unsure := false
	parts, err := c.sendParts(ctx, key, id, p)
	if err == nil {
		var etag string
		if etag, unsure, err = c.join(ctx, key, id, p, parts); err == nil {
			return etag, nil
		}
	}
	ctx, cancel := afterwards(ctx)
	defer cancel()
	// Abort first: once it is answered nothing can land behind our back.
	if aerr := c.abort(ctx, key, id); aerr != nil {
		c.cfg.log.Warn("an unfinished upload is left behind", "key", key, "error", aerr)
	}
	if unsure {
		return c.landed(ctx, key, p, err)
	}
	return "", err
}

func (c *s3client) begin(ctx context.Context, key string, p s3put) (id string, err error) {
	var out struct{ UploadId string }
	_, err = c.do(ctx, &s3op{doing: "beginning to upload", method: "POST", key: key, query: url.Values{"uploads": {""}},
		header: p.header(), into: &out, write: true})
	if err == nil && out.UploadId == "" {
		err = fmt.Errorf("beginning to upload %q: no id: %w", key, errS3Answer)
	}
	return out.UploadId, err
}

// s3part is a part as complete names it.
type s3part struct {
	PartNumber int
	ETag       string
}

// sendParts sends equal parts but for the last (R2 wants that), several at
// once, and returns when all are in or none is under way any more.
func (c *s3client) sendParts(ctx context.Context, key, id string, p s3put) ([]s3part, error) {
	size := partSize(p.size, c.cfg.partSize)
	parts := make([]s3part, (p.size+size-1)/size)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(s3Parallel, len(parts)) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(parts)) && ctx.Err() == nil; i = next.Add(1) - 1 {
				part := io.NewSectionReader(p.body, i*size, min(size, p.size-i*size))
				etag, err := c.sendPart(ctx, key, id, int(i)+1, part)
				if err != nil {
					cancel(err)
					return
				}
				parts[i] = s3part{int(i) + 1, etag}
			}
		})
	}
	wg.Wait()
	return parts, context.Cause(ctx)
}

// partSize keeps to the wanted size unless that makes too many parts.
func partSize(size, want int64) int64 {
	const mib = 1 << 20
	if least := (size + s3MaxParts - 1) / s3MaxParts; least > want {
		return (least + mib - 1) / mib * mib
	}
	return want
}

func (c *s3client) sendPart(ctx context.Context, key, id string, n int, part *io.SectionReader) (etag string, err error) {
	h := sha256.New()
	if _, err := io.Copy(h, part); err != nil {
		return "", fmt.Errorf("reading part %d of %q: %w", n, key, err)
	}
	resp, err := c.do(ctx, &s3op{doing: "putting part " + strconv.Itoa(n) + " of", method: "PUT", key: key,
		query: url.Values{"partNumber": {strconv.Itoa(n)}, "uploadId": {id}},
		body:  part, size: part.Size(), sum: hex.EncodeToString(h.Sum(nil)), write: true})
	if err != nil {
		return "", err
	}
	return resp.Header.Get("Etag"), nil
}

func (c *s3client) join(ctx context.Context, key, id string, p s3put, parts []s3part) (etag string, unsure bool, err error) {
	body, err := xml.Marshal(struct {
		XMLName xml.Name `xml:"CompleteMultipartUpload"`
		Part    []s3part
	}{Part: parts})
	if err != nil {
		return "", false, err
	}
	h := http.Header{}
	p.conditions(h)
	var out struct{ ETag string }
	op := &s3op{doing: "completing", method: "POST", key: key, query: url.Values{"uploadId": {id}},
		header: h, body: bytes.NewReader(body), size: int64(len(body)), sum: sha256Hex(body), into: &out, wait: s3JoinWait, write: true}
	_, err = c.do(ctx, op)
	return out.ETag, op.unsure(err), err
}

func (c *s3client) abort(ctx context.Context, key, id string) error {
	_, err := c.do(ctx, &s3op{doing: "aborting the upload of", method: "DELETE", key: key,
		query: url.Values{"uploadId": {id}}, wait: s3WriteWait})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// list calls f with each object below prefix, in the server's order. f's error
// ends it and is returned.
func (c *s3client) list(ctx context.Context, prefix string, f func(s3item) error) error {
	for token := ""; ; {
		page, err := c.listPage(ctx, prefix, token, 0)
		if err != nil {
			return err
		}
		for _, o := range page.Contents {
			key, err := decodeKey(o.Key, page.EncodingType)
			if err != nil {
				return fmt.Errorf("listing %q: key %q: %w", prefix, limitText(o.Key), errS3Answer)
			}
			if err := f(s3item{key: key, etag: o.ETag, size: o.Size, modified: o.LastModified}); err != nil {
				return err
			}
		}
		if !page.IsTruncated {
			return nil
		}
		if page.NextContinuationToken == "" || page.NextContinuationToken == token {
			return fmt.Errorf("listing %q: the next page has no token: %w", prefix, errS3Answer)
		}
		token = page.NextContinuationToken
	}
}

type s3page struct {
	IsTruncated           bool
	NextContinuationToken string
	EncodingType          string
	Contents              []struct {
		Key, ETag    string
		Size         int64
		LastModified time.Time
	}
}

func (c *s3client) listPage(ctx context.Context, prefix, token string, most int) (*s3page, error) {
	// encoding-type: XML cannot hold every key.
	q := url.Values{"list-type": {"2"}, "encoding-type": {"url"}, "prefix": {prefix}}
	if token != "" {
		q.Set("continuation-token", token)
	}
	if most > 0 {
		q.Set("max-keys", strconv.Itoa(most))
	}
	page := &s3page{}
	_, err := c.do(ctx, &s3op{doing: "listing", method: "GET", query: q, into: page, wait: s3WriteWait})
	return page, err
}

// decodeKey undoes encoding-type=url, if the server says that it did that.
// QueryUnescape, because some write a space as "+" (and "+" always as %2B).
func decodeKey(s, encoding string) (string, error) {
	if encoding != "url" {
		return s, nil
	}
	return url.QueryUnescape(s)
}

// sweep aborts uploads below prefix that were begun longer than age ago (by the
// server's clock) and never ended, and counts them. MinIO lists none without an
// exact key, but sweeps by itself after a day.
func (c *s3client) sweep(ctx context.Context, prefix string, age time.Duration) (n int, err error) {
	before := c.clock().Add(-age)
	keyMark, idMark := "", ""
	for {
		page, err := c.uploadsPage(ctx, prefix, keyMark, idMark)
		if err != nil {
			return n, err
		}
		for _, u := range page.Upload {
			key, err := decodeKey(u.Key, page.EncodingType)
			if err != nil || !u.Initiated.Before(before) {
				continue
			}
			if err := c.abort(ctx, key, u.UploadId); err != nil {
				return n, err
			}
			n++
		}
		next, err := decodeKey(page.NextKeyMarker, page.EncodingType)
		if err != nil || !page.IsTruncated || next == keyMark && page.NextUploadIdMarker == idMark {
			return n, nil
		}
		keyMark, idMark = next, page.NextUploadIdMarker
	}
}

type s3uploads struct {
	IsTruncated                                     bool
	NextKeyMarker, NextUploadIdMarker, EncodingType string
	Upload                                          []struct {
		Key, UploadId string
		Initiated     time.Time
	}
}

func (c *s3client) uploadsPage(ctx context.Context, prefix, keyMark, idMark string) (*s3uploads, error) {
	q := url.Values{"uploads": {""}, "encoding-type": {"url"}, "prefix": {prefix}}
	if keyMark != "" {
		q.Set("key-marker", keyMark)
		q.Set("upload-id-marker", idMark)
	}
	page := &s3uploads{}
	_, err := c.do(ctx, &s3op{doing: "listing uploads", method: "GET", query: q, into: page, wait: s3WriteWait})
	return page, err
}

// ready makes sure that the bucket is there and can be asked, and creates it if
// not. It lists, because a HEAD's refusal has no body to tell the region by.
func (c *s3client) ready(ctx context.Context) error {
	_, err := c.listPage(ctx, "", "", 1)
	if errors.Is(err, errS3NoBucket) {
		return c.createBucket(ctx)
	}
	return err
}

// createBucket creates the bucket. Another replica may do so at the same time:
// every 409 is fine if the bucket can be used after all.
func (c *s3client) createBucket(ctx context.Context) error {
	var body []byte
	if region := c.place.Load().region; region != "us-east-1" { // which S3 refuses to be told
		body = fmt.Appendf(nil, "<CreateBucketConfiguration><LocationConstraint>%s</LocationConstraint></CreateBucketConfiguration>", region)
	}
	_, err := c.do(ctx, &s3op{doing: "creating bucket", method: "PUT", body: bytes.NewReader(body), size: int64(len(body)),
		sum: sha256Hex(body), wait: s3WriteWait})
	var e *s3Error
	if errors.As(err, &e) && e.status == http.StatusConflict {
		if e.code == "BucketAlreadyOwnedByYou" {
			return nil
		}
		if _, lerr := c.listPage(ctx, "", "", 1); lerr == nil {
			return nil
		}
	}
	if err == nil {
		c.cfg.log.Info("the bucket was missing and is created", "bucket", c.cfg.bucket)
	}
	return err
}

// s3op is one operation, of which every attempt makes a new request.
type s3op struct {
	doing  string // for errors: gerund before the key
	method string
	key    string // "": the bucket
	query  url.Values
	header http.Header
	body   io.ReaderAt // size bytes whose SHA-256 is sum; nil: none
	size   int64
	sum    string
	write  bool          // worth more tries, and a bucket
	wait   time.Duration // for the response header; 0: by write
	into   any           // decode the XML answer into this
	keep   bool          // hand the body to the caller
	tried  int           // attempts so far
}

// unsure says whether a failed write may have taken effect: an attempt got no
// answer, or a refusal came only after an earlier attempt that did not get one.
func (op *s3op) unsure(err error) bool {
	var e *s3Error
	return op.tried > 1 || !errors.As(err, &e)
}

func (op *s3op) patience() time.Duration {
	switch {
	case op.wait > 0:
		return op.wait
	case op.write:
		return s3WriteWait
	}
	return s3ReadWait
}

// do makes attempts until one succeeds, or fails in a way that will not pass.
func (c *s3client) do(ctx context.Context, op *s3op) (*http.Response, error) {
	tries := s3ReadTries
	if op.write {
		tries = s3WriteTries
	}
	for n := 1; ; n++ {
		op.tried++
		resp, err := c.attempt(ctx, op)
		if err == nil {
			return resp, nil
		}
		if errors.Is(err, errS3Idle) {
			n += tries / 2 // hung twice is down, and took long enough
		}
		var pause time.Duration
		switch {
		case n >= tries || ctx.Err() != nil:
			return nil, fmt.Errorf("%s %q: %w", op.doing, op.key, err)
		case c.learn(err) || c.recover(ctx, op, err):
		case s3passing(err):
			pause = backoff(n)
		default:
			return nil, fmt.Errorf("%s %q: %w", op.doing, op.key, err)
		}
		if c.cfg.sleep(ctx, pause) != nil {
			return nil, fmt.Errorf("%s %q: %w (%w)", op.doing, op.key, context.Cause(ctx), err)
		}
	}
}

// recover asks something else first, where that lets the next attempt succeed: a
// write gets its bucket back, and a HEAD, whose refusal has no body to name the
// region in, learns it from a listing's.
func (c *s3client) recover(ctx context.Context, op *s3op, err error) bool {
	if op.write && errors.Is(err, errS3NoBucket) {
		return c.createBucket(ctx) == nil
	}
	var e *s3Error
	if op.method != http.MethodHead || !errors.As(err, &e) || e.status != http.StatusBadRequest {
		return false
	}
	c.listPage(ctx, "", "", 1) // for what it teaches
	return c.place.Load().region != e.used.region
}

// s3passing says whether an error may be gone in a moment. What is no answer of
// the server's (refused, reset, cut, hung) may be.
func s3passing(err error) bool {
	var e *s3Error
	if !errors.As(err, &e) {
		return true
	}
	switch e.code {
	case "SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "TooManyRequests", "OperationAborted", "ConditionalRequestConflict":
		return true
	case "NotImplemented":
		return false
	}
	return e.status >= 500 || e.status == http.StatusTemporaryRedirect
}

// backoff doubles from 100 ms up to 5 s, half of it by chance so that
// replicas do not come back in step.
func backoff(n int) time.Duration {
	d := min(100*time.Millisecond<<min(n-1, 10), 5*time.Second)
	return d/2 + rand.N(d/2)
}

func s3pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return ctx.Err()
	}
}

// learn takes the region or the time from a refusal and says whether another
// attempt will differ for it. It compares with what that request used: another
// one may have learned the same meanwhile.
func (c *s3client) learn(err error) bool {
	var e *s3Error
	if !errors.As(err, &e) {
		return false
	}
	if e.region != "" && e.region != e.used.region {
		c.place.Store(&s3place{host: regionHost(e.used, e.region), region: e.region})
		c.cfg.log.Warn("the bucket is in another region than configured", "configured", c.cfg.region, "region", e.region)
		return true
	}
	// A refused HEAD has no code: then the two clocks must do.
	skewed := e.code == "RequestTimeTooSkewed" || e.code == "" && e.status == http.StatusForbidden
	if skewed && !e.date.IsZero() && e.date.Sub(e.sent).Abs() > s3SkewLimit {
		skew := e.date.Sub(c.cfg.now())
		c.skew.Store(int64(skew))
		c.cfg.log.Warn("the clocks differ, signing by the server's", "server_ahead", skew.Round(time.Second).String())
		return true
	}
	return false
}

// regionHost is where another region answers. Only Amazon has a host for each;
// where an answer points is not followed, it could be anywhere.
func regionHost(used s3place, region string) string {
	if used.host == "s3.amazonaws.com" || used.host == "s3."+used.region+".amazonaws.com" {
		return "s3." + region + ".amazonaws.com"
	}
	return used.host
}

// clock is the server's, as far as we know.
func (c *s3client) clock() time.Time { return c.cfg.now().Add(time.Duration(c.skew.Load())) }

// attempt sends op once. The response of a kept body must be closed; every
// other body is already read.
func (c *s3client) attempt(ctx context.Context, op *s3op) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &s3watch{ctx: ctx, cancel: cancel}
	w.timer = time.AfterFunc(op.patience(), func() { cancel(errS3Idle) })
	place, at := *c.place.Load(), c.clock()
	resp, err := c.cfg.transport.RoundTrip(c.request(ctx, op, place, at, w))
	if err != nil {
		err = w.cause(err)
		w.end()
		return nil, err
	}
	w.timer.Stop() // reads of the body start it again
	resp.Body = &s3body{ReadCloser: resp.Body, watch: w}
	if resp.StatusCode/100 != 2 {
		err = refusal(resp, place, at)
	} else if op.into != nil {
		err = readXML(resp, op.into, place, at)
	}
	if err != nil || !op.keep {
		io.CopyN(io.Discard, resp.Body, s3TextLimit) // so that the connection can be used again
		resp.Body.Close()
	}
	return resp, err
}

// request builds and signs one attempt.
func (c *s3client) request(ctx context.Context, op *s3op, place s3place, at time.Time, w *s3watch) *http.Request {
	u := &url.URL{Scheme: "http", Host: place.host, RawQuery: encodeQuery(op.query)}
	if c.cfg.secure {
		u.Scheme = "https"
	}
	if c.cfg.virtualHost {
		u.Host = c.cfg.bucket + "." + place.host
		u.Path = "/" + op.key
	} else if u.Path = "/" + c.cfg.bucket; op.key != "" {
		u.Path += "/" + op.key
	}
	u.RawPath = uriEncode(u.Path, true) // goes on the wire and into the signature
	req := (&http.Request{Method: op.method, URL: u, Host: u.Host, Header: http.Header{}}).WithContext(ctx)
	for name, v := range op.header {
		req.Header[name] = v
	}
	sum := op.sum
	if op.size > 0 {
		req.ContentLength = op.size
		req.GetBody = func() (io.ReadCloser, error) {
			return &s3sending{r: io.NewSectionReader(op.body, 0, op.size), watch: w, wait: op.patience()}, nil
		}
		req.Body, _ = req.GetBody()
	} else {
		sum = emptySHA256 // and no body at all: a reader would go out chunked
	}
	if op.size > 1<<20 {
		req.Header.Set("Expect", "100-continue") // a refusal then costs no upload, nor arrives as a reset
	}
	c.dayKey(place.region, at).sign(req, c.cfg.accessKey, sum, at)
	return req
}

// refusal reads the error in a response. Where there cannot be a body the
// status must do.
func refusal(resp *http.Response, place s3place, at time.Time) error {
	var e *s3Error
	if err := readXML(resp, &struct{}{}, place, at); errors.As(err, &e) && e.code != "" {
		return e
	}
	e = newS3Error(resp, s3fault{}, place, at)
	head := resp.Request != nil && resp.Request.Method == http.MethodHead
	switch {
	case resp.StatusCode == http.StatusNotModified:
		e.code = "NotModified"
	case head && resp.StatusCode == http.StatusNotFound:
		e.code = "NoSuchKey"
	}
	return e
}

// s3fault is the body of a refusal, without what it repeats of the request.
type s3fault struct{ Code, Message, RequestId, Region string }

func newS3Error(resp *http.Response, f s3fault, place s3place, at time.Time) *s3Error {
	e := &s3Error{status: resp.StatusCode, code: limitText(f.Code), message: limitText(f.Message), requestID: limitText(f.RequestId),
		region: f.Region, used: place, sent: at}
	if id := resp.Header.Get("X-Amz-Request-Id"); id != "" {
		e.requestID = limitText(id)
	}
	if r := resp.Header.Get("X-Amz-Bucket-Region"); r != "" && resp.StatusCode/100 != 2 {
		e.region = r
	}
	if uriEncode(e.region, false) != e.region {
		e.region = "" // no region; it goes into a host name and a header
	}
	e.date, _ = http.ParseTime(resp.Header.Get("Date"))
	return e
}

// readXML decodes an answer, which may be an Error with any status: complete
// begins its 200 before it knows.
func readXML(resp *http.Response, into any, place s3place, at time.Time) error {
	d := xml.NewDecoder(io.LimitReader(resp.Body, s3XMLLimit))
	for {
		tok, err := d.Token()
		if err != nil {
			return fmt.Errorf("reading the answer: %w", err)
		}
		start, ok := tok.(xml.StartElement)
		if !ok {
			continue
		}
		if start.Name.Local != "Error" {
			return d.DecodeElement(into, &start)
		}
		var f s3fault
		if err := d.DecodeElement(&f, &start); err != nil {
			return fmt.Errorf("reading the error: %w", err)
		}
		return newS3Error(resp, f, place, at)
	}
}

// limitText makes a server's text fit for one line of a log.
func limitText(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return -1
		}
		return r
	}, s[:min(len(s), 4*s3TextLimit)])
	return strings.ToValidUTF8(s[:min(len(s), s3TextLimit)], "")
}

// s3watch ends an attempt in which nothing moves. There is no limit to the
// whole: 50 GB over a slow line must pass.
type s3watch struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

func (w *s3watch) end() { w.timer.Stop(); w.cancel(nil) }

// cause is err, or why there was one.
func (w *s3watch) cause(err error) error {
	if context.Cause(w.ctx) == errS3Idle {
		return errS3Idle
	}
	return err
}

// s3sending is a request's body. While it is read the request moves.
type s3sending struct {
	r     io.Reader
	watch *s3watch
	wait  time.Duration // for the header, after the end
}

func (s *s3sending) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.watch.timer.Reset(max(s3Idle, s.wait))
	return n, err
}

func (s *s3sending) Close() error { return nil }

// s3body is a response's body. The watch runs during reads only: between them
// it is the caller who takes his time.
type s3body struct {
	io.ReadCloser
	watch *s3watch
}

func (b *s3body) Read(p []byte) (int, error) {
	b.watch.timer.Reset(s3Idle)
	n, err := b.ReadCloser.Read(p)
	b.watch.timer.Stop()
	if err != nil && err != io.EOF {
		err = b.watch.cause(err)
	}
	return n, err
}

func (b *s3body) Close() error {
	err := b.ReadCloser.Close()
	b.watch.end()
	return err
}

// emptySHA256 is the hash of no bytes, which every request without a body signs.
const emptySHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// s3dayKey is a signing key, good for one day and region. Deriving it costs
// four of the five HMACs of a signature.
type s3dayKey struct {
	day, region string
	key         []byte
}

func (c *s3client) dayKey(region string, at time.Time) *s3dayKey {
	day := at.UTC().Format("20060102")
	if k := c.day.Load(); k != nil && k.day == day && k.region == region {
		return k
	}
	k := newDayKey(c.cfg.secretKey, day, region)
	c.day.Store(k)
	return k
}

func newDayKey(secret, day, region string) *s3dayKey {
	key := []byte("AWS4" + secret)
	for _, s := range []string{day, region, "s3", "aws4_request"} {
		key = hmacSHA256(key, s)
	}
	return &s3dayKey{day: day, region: region, key: key}
}

// sign adds date, payload hash and Authorization to req, whose RawPath and
// RawQuery must be what uriEncode and encodeQuery make. It signs every header
// that is set, but those that hops in between may change. The body is not read.
// (Signature Version 4, "Authenticating Requests: Using the Authorization
// Header".)
func (k *s3dayKey) sign(req *http.Request, accessKey, payload string, at time.Time) {
	stamp := at.UTC().Format("20060102T150405Z")
	req.Header.Set("X-Amz-Date", stamp)
	req.Header.Set("X-Amz-Content-Sha256", payload)
	canonical, signed := canonicalRequest(req, payload)
	scope := k.day + "/" + k.region + "/s3/aws4_request"
	sig := hmacSHA256(k.key, "AWS4-HMAC-SHA256\n"+stamp+"\n"+scope+"\n"+sha256Hex(canonical))
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential="+accessKey+"/"+scope+
		",SignedHeaders="+signed+",Signature="+hex.EncodeToString(sig))
}

func canonicalRequest(req *http.Request, payload string) (canonical []byte, signed string) {
	lines := make([]string, 0, len(req.Header)+1)
	lines = append(lines, "host:"+req.URL.Host)
	for name, values := range req.Header {
		switch name {
		case "Authorization", "Accept-Encoding", "User-Agent", "Expect", "Connection":
			continue
		}
		lines = append(lines, strings.ToLower(name)+":"+strings.Join(strings.Fields(strings.Join(values, ",")), " "))
	}
	slices.SortFunc(lines, func(a, b string) int { return strings.Compare(headerName(a), headerName(b)) })
	b := make([]byte, 0, 1024)
	b = append(b, req.Method...)
	for _, part := range []string{req.URL.EscapedPath(), req.URL.RawQuery} {
		b = append(append(b, '\n'), part...)
	}
	names := make([]byte, 0, 128)
	for i, line := range lines {
		b = append(append(b, '\n'), line...)
		if i > 0 {
			names = append(names, ';')
		}
		names = append(names, headerName(line)...)
	}
	b = append(append(b, '\n', '\n'), names...)
	return append(append(b, '\n'), payload...), string(names)
}

func headerName(line string) string {
	name, _, _ := strings.Cut(line, ":")
	return name
}

// encodeQuery is a query in canonical form: sorted by encoded name, then value.
func encodeQuery(q url.Values) string {
	pairs := make([][2]string, 0, len(q))
	for name, values := range q {
		for _, v := range values {
			pairs = append(pairs, [2]string{uriEncode(name, false), uriEncode(v, false)})
		}
	}
	slices.SortFunc(pairs, func(a, b [2]string) int { return slices.Compare(a[:], b[:]) })
	var b []byte
	for i, p := range pairs {
		if i > 0 {
			b = append(b, '&')
		}
		b = append(append(append(b, p[0]...), '='), p[1]...)
	}
	return string(b)
}

// uriEncode escapes each byte but A-Za-z0-9-._~ and, in paths, the slash. It is
// stricter than net/url, whose spelling the server would not sign.
func uriEncode(s string, path bool) string {
	const upperHex = "0123456789ABCDEF"
	var b []byte
	for i := range len(s) {
		ch := s[i]
		switch {
		case 'a' <= ch && ch <= 'z', 'A' <= ch && ch <= 'Z', '0' <= ch && ch <= '9',
			ch == '-', ch == '.', ch == '_', ch == '~', ch == '/' && path:
			if b != nil {
				b = append(b, ch)
			}
			continue
		}
		if b == nil {
			b = append(make([]byte, 0, len(s)+16), s[:i]...)
		}
		b = append(b, '%', upperHex[ch>>4], upperHex[ch&15])
	}
	if b == nil {
		return s
	}
	return string(b)
}

// bareHost drops the port that the scheme implies: clients leave it out of
// Host, and proxies in front of a server strip it after it was signed.
func bareHost(host string, secure bool) string {
	if secure {
		return strings.TrimSuffix(host, ":443")
	}
	return strings.TrimSuffix(host, ":80")
}

func setHeader(h http.Header, name, value string) {
	if value != "" {
		h.Set(name, value)
	}
}

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func hmacSHA256(key []byte, s string) []byte {
	h := hmac.New(sha256.New, key)
	io.WriteString(h, s)
	return h.Sum(nil)
}
