// s3client.go: a client for S3 and what speaks like it (MinIO, Ceph, R2, Garage,
// rclone, versitygw): the few operations that a store of whole objects needs. It
// knows nothing of the rest of the program.
//
// A method has succeeded only when the server said so, or when the object was
// seen in place afterwards. Each attempt is built and signed anew, with the
// region and the clock that earlier answers taught.

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
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
