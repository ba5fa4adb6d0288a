// s3client.go: a client for S3 and what speaks like it (MinIO, Ceph, R2, Garage,
// rclone, versitygw): the few operations that a store of whole objects needs. It
// knows nothing of the rest of the program.
//
// A method has succeeded only when the server said so, or when the object was
// seen in place afterwards. Each attempt is built and signed anew, for the region
// that an earlier refusal named.

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
	s3PartSize        = 64 << 20 // one PUT up to here; then 10,000 parts reach 640 GB and a failed part costs little
	s3MaxParts        = 10_000   // S3's limit; a larger object gets larger parts
	s3ParallelParts   = 4        // parts at once: fills a line with 100 ms round trips, holds no memory but buffers
	s3ReadTries       = 3        // a client waits for a read
	s3WriteTries      = 8        // 6 to 11 s: over a server's restart. Giving up costs the download
	s3BodyTimeout     = 60 * time.Second
	s3ReadTimeout     = 5 * time.Second  // for a read's header: a store this slow had better be passed by
	s3WriteTimeout    = 60 * time.Second // for a write's header, once the body is sent
	s3CompleteTimeout = 10 * time.Minute // for complete's header: some servers copy the parts together first
	s3CleanupTimeout  = 30 * time.Second // to abort and look again when the caller's context is over
	s3ClockTolerance  = 5 * time.Minute  // a refusal without a code is put down to clocks that differ by more; servers refuse at 15
	s3XMLLimit        = 8 << 20          // a page of 1,000 keys of 1,024 bytes, each byte as %XX, is 4 MiB
	s3TextLimit       = 200              // of a server's message in our errors and logs
)

var (
	errS3NoBucket           = errors.New("no such bucket")           // not fs.ErrNotExist: nothing can be kept there
	errS3NoUpload           = errors.New("no such upload")           // not fs.ErrNotExist: it says nothing about the object
	errS3NotModified        = errors.New("the object is unchanged")  // If-None-Match of a get
	errS3PreconditionFailed = errors.New("a condition was not met")  // If-Match of a get, any condition of a put
	errS3Timeout            = errors.New("no byte moved in time")    // header or body
	errS3Clock              = errors.New("the clocks differ")        // too much for the server to accept a signature
	errS3BadAnswer          = errors.New("unexpected answer")        // no S3 server says such a thing
	errS3Metadata           = errors.New("metadata is not sendable") // see checkMetadata
)

// s3Config says where objects are kept. The fields after secretKey may be left
// zero, but for now.
type s3Config struct {
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
func (c s3Config) String() string { return c.host + "/" + c.bucket }

// s3Client is one bucket. All methods may be called concurrently.
type s3Client struct {
	cfg      s3Config
	endpoint atomic.Pointer[s3Endpoint]

	cachedKey atomic.Pointer[s3SigningKey]
}

// s3Endpoint is what a server may correct.
type s3Endpoint struct{ host, region string }

// s3Object is what a server has under a key. The holder of a got one closes
// body; a body that ends early says io.ErrUnexpectedEOF.
type s3Object struct {
	size     int64 // of the whole object, whatever range was asked for
	etag     string
	modified time.Time
	meta     map[string]string // names in lower case
	body     io.ReadCloser     // nil from head
}

// s3GetInput is the part of an object that is wanted, under which conditions.
type s3GetInput struct {
	off, n      int64  // n <= 0: to the end
	ifMatch     string // ETag; else errS3PreconditionFailed
	ifNoneMatch string // ETag; if so errS3NotModified
}

// s3PutInput is an object to store.
type s3PutInput struct {
	body        io.ReaderAt // read more than once: hashed by parts, sent again
	size        int64
	sha256      string            // hex, of the whole body
	meta        map[string]string // printable ASCII, 2 KB in all; with ifNoneMatch something in it must be unique to this object
	contentType string
	ifMatch     string // ETag of what may be replaced
	ifNoneMatch string // "*": do not replace
}

// s3ListedObject is one line of a listing.
type s3ListedObject struct {
	key, etag string
	size      int64
	modified  time.Time
}

// s3Error is a server's refusal. errors.Is finds fs.ErrNotExist,
// fs.ErrPermission and the sentinels above in it.
type s3Error struct {
	status                   int
	code, message, requestID string

	region   string     // the bucket's region, if the server says it
	date     time.Time  // the server's clock when it answered; may be zero
	endpoint s3Endpoint // where the request was sent
	sent     time.Time  // when the request was signed, by our clock
}

func (e *s3Error) Error() string {
	text := "s3: " + strconv.Itoa(e.status)
	if reason := strings.TrimSpace(e.code + " " + e.message); reason != "" {
		text += " " + reason
	}
	if e.requestID != "" {
		text += " (request " + e.requestID + ")"
	}
	if !e.isClockRefusal() {
		return text
	}
	if e.date.IsZero() {
		return text + ": the clock of this machine differs from the server's: set it"
	}
	order, difference := "ahead of", e.sent.Sub(e.date).Round(time.Second)
	if difference < 0 {
		order, difference = "behind", -difference
	}
	return fmt.Sprintf("%s: the clock of this machine is %v %s the server's: set it", text, difference, order)
}

// isClockRefusal reports whether the request was refused because its signing
// time was too far from the server's clock. The refusal of a HEAD has no body
// and so no code; there the two clocks decide.
func (e *s3Error) isClockRefusal() bool {
	if e.code != "" || e.status != http.StatusForbidden || e.date.IsZero() {
		return e.code == "RequestTimeTooSkewed"
	}
	return e.date.Sub(e.sent).Abs() > s3ClockTolerance
}

// Is goes by the code alone: a 404 without one does not come from S3 but from
// something in front of it, and is no proof that an object is missing.
func (e *s3Error) Is(target error) bool {
	switch e.code {
	case "NoSuchKey", "NotFound":
		return target == fs.ErrNotExist
	case "NoSuchUpload":
		return target == errS3NoUpload
	case "NoSuchBucket":
		return target == errS3NoBucket
	case "NotModified":
		return target == errS3NotModified
	case "PreconditionFailed", "ConditionalRequestConflict":
		return target == errS3PreconditionFailed
	}
	if e.isClockRefusal() { // the credentials may be right
		return target == errS3Clock
	}
	return target == fs.ErrPermission && (e.status == http.StatusForbidden || e.code == "AccessDenied")
}

// newS3Client makes a client; it asks nothing yet.
func newS3Client(cfg s3Config) (*s3Client, error) {
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
		cfg.transport = newS3Transport()
	}
	c := &s3Client{cfg: cfg}
	c.endpoint.Store(&s3Endpoint{host: withoutDefaultPort(cfg.host, cfg.secure), region: cfg.region})
	return c, nil
}

// newS3Transport speaks HTTP/1 only (one HTTP/2 connection would share a window
// among all bodies), through no proxy, and leaves timeouts to the watch of each
// attempt, since a read and a complete have very different patience.
func newS3Transport() *http.Transport {
	return &http.Transport{
		DialContext:           (&net.Dialer{Timeout: s3ReadTimeout}).DialContext,
		TLSHandshakeTimeout:   s3ReadTimeout,
		ExpectContinueTimeout: time.Second,
		MaxIdleConnsPerHost:   64,
		MaxConnsPerHost:       1000, // descriptors are finite
		IdleConnTimeout:       60 * time.Second,
		DisableCompression:    true,
		ReadBufferSize:        64 << 10,
		WriteBufferSize:       64 << 10,
	}
}

// getObject opens an object. Metadata, total size and body from off come with one
// request.
func (c *s3Client) getObject(ctx context.Context, key string, g s3GetInput) (*s3Object, error) {
	h := http.Header{}
	setNonEmptyHeader(h, "Range", g.rangeHeader())
	setNonEmptyHeader(h, "If-Match", g.ifMatch)
	setNonEmptyHeader(h, "If-None-Match", g.ifNoneMatch)
	resp, err := c.sendWithRetries(ctx, &s3Operation{doing: "getting", method: "GET", key: key, header: h, keepBody: true})
	if err != nil {
		return nil, err
	}
	o := objectFromResponse(resp)
	if err := o.readContentRange(resp, g); err != nil {
		resp.Body.Close()
		return nil, fmt.Errorf("getting %q: %w", key, err)
	}
	o.body = resp.Body
	return o, nil
}

// rangeHeader leaves Range out for a whole object: of an empty one even
// bytes=0- cannot be had.
func (g s3GetInput) rangeHeader() string {
	switch {
	case g.n > 0:
		return fmt.Sprintf("bytes=%d-%d", g.off, g.off+g.n-1)
	case g.off > 0:
		return fmt.Sprintf("bytes=%d-", g.off)
	}
	return ""
}

// headObject asks what is under a key.
func (c *s3Client) headObject(ctx context.Context, key string) (*s3Object, error) {
	resp, err := c.sendWithRetries(ctx, &s3Operation{doing: "asking for", method: "HEAD", key: key})
	if err != nil {
		return nil, err
	}
	return objectFromResponse(resp), nil
}

func objectFromResponse(resp *http.Response) *s3Object {
	o := &s3Object{size: resp.ContentLength, etag: resp.Header.Get("Etag"), meta: map[string]string{}}
	o.modified, _ = http.ParseTime(resp.Header.Get("Last-Modified"))
	for name, values := range resp.Header {
		if m, ok := strings.CutPrefix(name, "X-Amz-Meta-"); ok {
			o.meta[strings.ToLower(m)] = values[0]
		}
	}
	return o
}

// readContentRange takes the whole size from Content-Range, and refuses an answer that
// is not the range that was asked for: its bytes would be taken for others.
func (o *s3Object) readContentRange(resp *http.Response, g s3GetInput) error {
	ranged := g.rangeHeader() != ""
	if ranged != (resp.StatusCode == http.StatusPartialContent) || resp.ContentLength < 0 {
		return fmt.Errorf("status %d, length %d: %w", resp.StatusCode, resp.ContentLength, errS3BadAnswer)
	}
	if !ranged {
		return nil
	}
	var first, last int64
	cr := resp.Header.Get("Content-Range")
	_, err := fmt.Sscanf(cr, "bytes %d-%d/%d", &first, &last, &o.size)
	if err != nil || first != g.off || last-first+1 != resp.ContentLength || last >= o.size {
		return fmt.Errorf("content range %q: %w", cleanText(cr), errS3BadAnswer)
	}
	return nil
}

// deleteObject removes an object. S3 does not say whether there was one.
func (c *s3Client) deleteObject(ctx context.Context, key string) error {
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "deleting", method: "DELETE", key: key, timeout: s3WriteTimeout})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // some servers do say; after a lost answer it means nothing
	}
	return err
}

// putObject stores an object and returns its ETag, an opaque name of this version.
// Large ones go up in parts. On an error the old object is still in place,
// unless the server could not be asked.
func (c *s3Client) putObject(ctx context.Context, key string, p s3PutInput) (etag string, err error) {
	if err := checkMetadata(p.meta); err != nil {
		return "", fmt.Errorf("putting %q: %w", key, err)
	}
	if p.size > c.cfg.partSize {
		return c.putMultipart(ctx, key, p)
	}
	h := p.objectHeader()
	p.setConditions(h)
	op := &s3Operation{doing: "putting", method: "PUT", key: key, header: h, body: p.body, size: p.size, sum: p.sha256, write: true}
	resp, err := c.sendWithRetries(ctx, op)
	if err == nil {
		return resp.Header.Get("Etag"), nil
	}
	if p.ifNoneMatch != "" && op.mayHaveApplied(err) {
		ctx, cancel := cleanupContext(ctx)
		defer cancel()
		return c.confirmPut(ctx, key, p, err)
	}
	return "", err
}

// cleanupContext is a context to clean up in when the caller's may be over.
func cleanupContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), s3CleanupTimeout)
}

// checkMetadata lets only text through that reaches every server unchanged: beyond
// ASCII, and at the ends of a value, each has habits of its own.
func checkMetadata(meta map[string]string) error {
	for name, v := range meta {
		odd := strings.IndexFunc(v, func(r rune) bool { return r < ' ' || r > '~' }) >= 0
		if odd || strings.TrimSpace(v) != v || name == "" || uriEncode(name, false) != name {
			return fmt.Errorf("field %q: %w", cleanText(name), errS3Metadata)
		}
	}
	return nil
}

func (p s3PutInput) objectHeader() http.Header {
	h := http.Header{}
	setNonEmptyHeader(h, "Content-Type", p.contentType)
	for name, v := range p.meta {
		h.Set("X-Amz-Meta-"+name, v)
	}
	return h
}

func (p s3PutInput) setConditions(h http.Header) {
	setNonEmptyHeader(h, "If-Match", p.ifMatch)
	setNonEmptyHeader(h, "If-None-Match", p.ifNoneMatch)
}

// confirmPut looks whether a put with If-None-Match took place although it ended
// in err, and returns err if it did not. A client that uploads a file to a local
// repository needs this: when the answer to the first attempt is lost, the
// second attempt is refused because of the object that the first one stored,
// and the client would be told that somebody else's file exists already. A put
// without that condition is simply done again.
//
// It compares size and metadata, never the ETag, which is an MD5 on some servers
// and for some objects only. Without metadata nothing tells the new object from
// an older one.
func (c *s3Client) confirmPut(ctx context.Context, key string, p s3PutInput, err error) (string, error) {
	o, herr := c.headObject(ctx, key)
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

// putMultipart is a multipart upload. Whatever happens it is aborted unless it was
// completed; what cannot be aborted either is left for sweep, as is an upload
// whose begin was answered into the void.
func (c *s3Client) putMultipart(ctx context.Context, key string, p s3PutInput) (string, error) {
	id, err := c.createMultipartUpload(ctx, key, p)
	if err != nil {
		return "", err
	}
	mayHaveApplied := false
	parts, err := c.uploadParts(ctx, key, id, p)
	if err == nil {
		var etag string
		if etag, mayHaveApplied, err = c.completeMultipartUpload(ctx, key, id, p, parts); err == nil {
			return etag, nil
		}
	}
	ctx, cancel := cleanupContext(ctx)
	defer cancel()
	// Abort first: once that is answered, a late complete cannot take effect.
	if aerr := c.abortMultipartUpload(ctx, key, id); aerr != nil {
		c.cfg.log.Warn("an unfinished upload is left behind", "key", key, "error", aerr)
	}
	if p.ifNoneMatch != "" && mayHaveApplied {
		return c.confirmPut(ctx, key, p, err)
	}
	return "", err
}

func (c *s3Client) createMultipartUpload(ctx context.Context, key string, p s3PutInput) (id string, err error) {
	var out struct{ UploadId string }
	_, err = c.sendWithRetries(ctx, &s3Operation{doing: "beginning to upload", method: "POST", key: key, query: url.Values{"uploads": {""}},
		header: p.objectHeader(), decodeInto: &out, write: true})
	if err == nil && out.UploadId == "" {
		err = fmt.Errorf("beginning to upload %q: no id: %w", key, errS3BadAnswer)
	}
	return out.UploadId, err
}

// s3CompletedPart is a part as complete names it.
type s3CompletedPart struct {
	PartNumber int
	ETag       string
}

// uploadParts sends equal parts but for the last (R2 wants that), several at
// once, and returns when all are in or none is under way any more.
func (c *s3Client) uploadParts(ctx context.Context, key, id string, p s3PutInput) ([]s3CompletedPart, error) {
	size := choosePartSize(p.size, c.cfg.partSize)
	parts := make([]s3CompletedPart, (p.size+size-1)/size)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(s3ParallelParts, len(parts)) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(parts)) && ctx.Err() == nil; i = next.Add(1) - 1 {
				part := io.NewSectionReader(p.body, i*size, min(size, p.size-i*size))
				etag, err := c.uploadPart(ctx, key, id, int(i)+1, part)
				if err != nil {
					cancel(err)
					return
				}
				parts[i] = s3CompletedPart{int(i) + 1, etag}
			}
		})
	}
	wg.Wait()
	return parts, context.Cause(ctx)
}

// choosePartSize keeps to the wanted size unless that makes too many parts.
func choosePartSize(size, want int64) int64 {
	const mib = 1 << 20
	if least := (size + s3MaxParts - 1) / s3MaxParts; least > want {
		return (least + mib - 1) / mib * mib
	}
	return want
}

func (c *s3Client) uploadPart(ctx context.Context, key, id string, n int, part *io.SectionReader) (etag string, err error) {
	h := sha256.New()
	if _, err := io.Copy(h, part); err != nil {
		return "", fmt.Errorf("reading part %d of %q: %w", n, key, err)
	}
	resp, err := c.sendWithRetries(ctx, &s3Operation{doing: "putting part " + strconv.Itoa(n) + " of", method: "PUT", key: key,
		query: url.Values{"partNumber": {strconv.Itoa(n)}, "uploadId": {id}},
		body:  part, size: part.Size(), sum: hex.EncodeToString(h.Sum(nil)), write: true})
	if err != nil {
		return "", err
	}
	return resp.Header.Get("Etag"), nil
}

func (c *s3Client) completeMultipartUpload(ctx context.Context, key, id string, p s3PutInput, parts []s3CompletedPart) (etag string, mayHaveApplied bool, err error) {
	body, err := xml.Marshal(struct {
		XMLName xml.Name `xml:"CompleteMultipartUpload"`
		Part    []s3CompletedPart
	}{Part: parts})
	if err != nil {
		return "", false, err
	}
	h := http.Header{}
	p.setConditions(h)
	var out struct{ ETag string }
	op := &s3Operation{doing: "completing", method: "POST", key: key, query: url.Values{"uploadId": {id}},
		header: h, body: bytes.NewReader(body), size: int64(len(body)), sum: sha256Hex(body), decodeInto: &out, timeout: s3CompleteTimeout, write: true}
	_, err = c.sendWithRetries(ctx, op)
	return out.ETag, op.mayHaveApplied(err), err
}

func (c *s3Client) abortMultipartUpload(ctx context.Context, key, id string) error {
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "aborting the upload of", method: "DELETE", key: key,
		query: url.Values{"uploadId": {id}}, timeout: s3WriteTimeout})
	if errors.Is(err, errS3NoUpload) || errors.Is(err, fs.ErrNotExist) {
		return nil // it was completed or aborted before
	}
	return err
}

// listObjects calls f with each object below prefix, in the server's order. f's error
// ends it and is returned.
func (c *s3Client) listObjects(ctx context.Context, prefix string, f func(s3ListedObject) error) error {
	for token := ""; ; {
		page, err := c.listObjectsPage(ctx, prefix, token, 0)
		if err != nil {
			return err
		}
		for _, o := range page.Contents {
			key, err := decodeListedKey(o.Key, page.EncodingType)
			if err != nil {
				return fmt.Errorf("listing %q: key %q: %w", prefix, cleanText(o.Key), errS3BadAnswer)
			}
			if err := f(s3ListedObject{key: key, etag: o.ETag, size: o.Size, modified: o.LastModified}); err != nil {
				return err
			}
		}
		if !page.IsTruncated {
			return nil
		}
		if page.NextContinuationToken == "" || page.NextContinuationToken == token {
			return fmt.Errorf("listing %q: the next page has no token: %w", prefix, errS3BadAnswer)
		}
		token = page.NextContinuationToken
	}
}

type s3ObjectsPage struct {
	IsTruncated           bool
	NextContinuationToken string
	EncodingType          string
	Contents              []struct {
		Key, ETag    string
		Size         int64
		LastModified time.Time
	}
}

func (c *s3Client) listObjectsPage(ctx context.Context, prefix, token string, most int) (*s3ObjectsPage, error) {
	// encoding-type: XML cannot hold every key.
	q := url.Values{"list-type": {"2"}, "encoding-type": {"url"}, "prefix": {prefix}}
	if token != "" {
		q.Set("continuation-token", token)
	}
	if most > 0 {
		q.Set("max-keys", strconv.Itoa(most))
	}
	page := &s3ObjectsPage{}
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "listing", method: "GET", query: q, decodeInto: page, timeout: s3WriteTimeout})
	return page, err
}

// decodeListedKey undoes encoding-type=url, if the server says that it did that.
// QueryUnescape, because some write a space as "+" (and "+" always as %2B).
func decodeListedKey(s, encoding string) (string, error) {
	if encoding != "url" {
		return s, nil
	}
	return url.QueryUnescape(s)
}

// abortOldUploads aborts uploads below prefix that were begun longer than age ago (by our
// clock, which differs from the server's by minutes at most) and never ended, and
// counts them. MinIO lists none without an exact key, but sweeps by itself after
// a day.
func (c *s3Client) abortOldUploads(ctx context.Context, prefix string, age time.Duration) (n int, err error) {
	before := c.cfg.now().Add(-age)
	keyMark, idMark := "", ""
	for {
		page, err := c.listMultipartUploads(ctx, prefix, keyMark, idMark)
		if err != nil {
			return n, err
		}
		for _, u := range page.Upload {
			key, err := decodeListedKey(u.Key, page.EncodingType)
			if err != nil || !u.Initiated.Before(before) {
				continue
			}
			if err := c.abortMultipartUpload(ctx, key, u.UploadId); err != nil {
				return n, err
			}
			n++
		}
		next, err := decodeListedKey(page.NextKeyMarker, page.EncodingType)
		if err != nil || !page.IsTruncated || next == keyMark && page.NextUploadIdMarker == idMark {
			return n, nil
		}
		keyMark, idMark = next, page.NextUploadIdMarker
	}
}

type s3UploadsPage struct {
	IsTruncated                                     bool
	NextKeyMarker, NextUploadIdMarker, EncodingType string
	Upload                                          []struct {
		Key, UploadId string
		Initiated     time.Time
	}
}

func (c *s3Client) listMultipartUploads(ctx context.Context, prefix, keyMark, idMark string) (*s3UploadsPage, error) {
	q := url.Values{"uploads": {""}, "encoding-type": {"url"}, "prefix": {prefix}}
	if keyMark != "" {
		q.Set("key-marker", keyMark)
		q.Set("upload-id-marker", idMark)
	}
	page := &s3UploadsPage{}
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "listing uploads", method: "GET", query: q, decodeInto: page, timeout: s3WriteTimeout})
	return page, err
}

// ensureBucket makes sure that the bucket is there and can be asked, and creates it if
// not. It lists, because a HEAD's refusal has no body to tell the region by.
func (c *s3Client) ensureBucket(ctx context.Context) error {
	_, err := c.listObjectsPage(ctx, "", "", 1)
	if errors.Is(err, errS3NoBucket) {
		return c.createBucket(ctx)
	}
	return err
}

// createBucket creates the bucket. Another replica may do so at the same time:
// every 409 is fine if the bucket can be used after all.
func (c *s3Client) createBucket(ctx context.Context) error {
	var body []byte
	if region := c.endpoint.Load().region; region != "us-east-1" { // which S3 refuses to be told
		body = fmt.Appendf(nil, "<CreateBucketConfiguration><LocationConstraint>%s</LocationConstraint></CreateBucketConfiguration>", region)
	}
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "creating bucket", method: "PUT", body: bytes.NewReader(body), size: int64(len(body)),
		sum: sha256Hex(body), timeout: s3WriteTimeout})
	var e *s3Error
	if errors.As(err, &e) && e.status == http.StatusConflict {
		if e.code == "BucketAlreadyOwnedByYou" {
			return nil
		}
		if _, lerr := c.listObjectsPage(ctx, "", "", 1); lerr == nil {
			return nil
		}
	}
	if err == nil {
		c.cfg.log.Info("the bucket was missing and is created", "bucket", c.cfg.bucket)
	}
	return err
}

// withoutDefaultPort drops the port that the scheme implies: clients leave it out of
// Host, and proxies in front of a server strip it after it was signed.
func withoutDefaultPort(host string, secure bool) string {
	if secure {
		return strings.TrimSuffix(host, ":443")
	}
	return strings.TrimSuffix(host, ":80")
}

func setNonEmptyHeader(h http.Header, name, value string) {
	if value != "" {
		h.Set(name, value)
	}
}
