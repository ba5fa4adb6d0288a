// s3client.go: a client for S3 and for servers that speak its protocol (MinIO,
// Ceph, R2, Garage, rclone, versitygw). It has the few operations that a store of
// whole objects needs, each under the name that the S3 API gives it, and knows
// nothing of the rest of the program.
//
// A method returns no error only when the server confirmed the operation, or,
// for a conditional put, when the object was found in place afterwards. Each
// attempt is built and signed anew, for the region that an earlier refusal named.

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
	// s3PartSize is the size of a part, and of the largest object that is sent by
	// one PutObject. A failed part of 64 MiB costs little, and s3MaxParts of them
	// are 640 GB.
	s3PartSize = 64 << 20
	// s3MaxParts is the limit of the S3 API. A larger object gets larger parts.
	s3MaxParts = 10_000
	// s3ParallelParts parts are sent at once. Four fill a line that has round
	// trips of 100 ms, and cost no memory but their buffers.
	s3ParallelParts = 4
	// s3ReadTries is small because a client waits for every read.
	s3ReadTries = 3
	// s3WriteTries attempts take 6 to 11 s, longer than a server's restart. A
	// write that is given up costs the download.
	s3WriteTries = 8
	// s3BodyTimeout ends an attempt whose body does not move. TCP recovers from
	// lost packets in less than a minute.
	s3BodyTimeout = 60 * time.Second
	// s3ReadTimeout is how long a read waits for the response header, and a dial
	// for its connection. A store that is slower than this is slower than most
	// upstreams.
	s3ReadTimeout = 5 * time.Second
	// s3WriteTimeout is how long a write waits for the response header after the
	// body was sent: servers hash and replicate before they answer.
	s3WriteTimeout = 60 * time.Second
	// s3CompleteTimeout is s3WriteTimeout for CompleteMultipartUpload. Some
	// servers copy all parts together before they send the header.
	s3CompleteTimeout = 10 * time.Minute
	// s3CleanupTimeout bounds aborting an upload and confirming a put, which are
	// done even after the caller's context has ended.
	s3CleanupTimeout = 30 * time.Second
	// s3ClockTolerance: a refusal without a code is put down to the clocks if they
	// differ by more than this. Servers accept 15 minutes.
	s3ClockTolerance = 5 * time.Minute
	// s3XMLLimit bounds an answer in XML. The largest page of a listing, with 1,000
	// keys of 1,024 bytes, each byte spelled %XX, has about 4 MiB.
	s3XMLLimit = 8 << 20
	// s3TextLimit is how many bytes of each text in a server's refusal get into
	// our errors and logs. Real texts are shorter.
	s3TextLimit = 200
)

// What an operation can fail with, beside fs.ErrNotExist (no such object) and
// fs.ErrPermission.
var (
	errS3NoBucket           = errors.New("no such bucket")            // not fs.ErrNotExist: nothing can be stored there
	errS3NoUpload           = errors.New("no such upload")            // not fs.ErrNotExist: it says nothing about the object
	errS3NotModified        = errors.New("the object is unchanged")   // If-None-Match of a get
	errS3PreconditionFailed = errors.New("a condition was not met")   // If-Match of a get, any condition of a put
	errS3Timeout            = errors.New("no byte moved in time")     // no header, or a body that stopped
	errS3Clock              = errors.New("the clocks differ")         // by more than the server accepts
	errS3BadAnswer          = errors.New("unexpected answer")         // not what the S3 API says
	errS3Metadata           = errors.New("metadata cannot be stored") // see checkMetadata
)

// s3Config says where objects are stored. All fields up to secretKey are needed,
// and now; the others have defaults.
type s3Config struct {
	host      string // of the endpoint, with a port if it is not the scheme's
	secure    bool   // https
	bucket    string
	accessKey string
	secretKey string

	region      string // default us-east-1
	virtualHost bool   // bucket.host/key instead of host/bucket/key
	partSize    int64  // default s3PartSize; tests use less

	now       func() time.Time
	sleep     func(ctx context.Context, d time.Duration) error // between attempts; default s3pause
	transport http.RoundTripper                                // default newS3Transport
	log       *slog.Logger                                     // default none
}

// String keeps the secret key out of a configuration that is printed.
func (c s3Config) String() string { return c.host + "/" + c.bucket }

// s3Client is a client of one bucket. All methods may be called concurrently.
type s3Client struct {
	cfg       s3Config                     // not changed after newS3Client
	endpoint  atomic.Pointer[s3Endpoint]   // replaced by learnRegion
	cachedKey atomic.Pointer[s3SigningKey] // the last one that signed
}

// s3Endpoint is where requests are sent and the region that they are signed for.
// The refusal of a server may correct both.
type s3Endpoint struct{ host, region string }

// s3Object is an object as a server describes it. A caller of getObject closes
// body. A body that breaks off ends in io.ErrUnexpectedEOF.
type s3Object struct {
	size     int64 // of the whole object, also when a range was asked for
	etag     string
	modified time.Time         // zero if the server did not say it
	meta     map[string]string // names in lower case
	body     io.ReadCloser     // nil from headObject
}

// s3GetInput says which part of an object is wanted, and on which condition.
type s3GetInput struct {
	off, n      int64  // n <= 0 means up to the end
	ifMatch     string // an ETag; another one is errS3PreconditionFailed
	ifNoneMatch string // an ETag; the same one is errS3NotModified
}

// s3PutInput is an object to store.
type s3PutInput struct {
	body        io.ReaderAt // read several times: parts are hashed first, and sent again after a fault
	size        int64
	sha256      string            // in hex, of the whole body
	meta        map[string]string // printable ASCII, 2 KB in all; with ifNoneMatch something in it must be unique to this object
	contentType string
	ifMatch     string // the ETag of the object that may be replaced
	ifNoneMatch string // "*" means: only if there is no object
}

// s3ListedObject is one object of a listing.
type s3ListedObject struct {
	key, etag string
	size      int64
	modified  time.Time
}

// newS3Client checks cfg, sets its defaults and makes a client. It sends nothing.
func newS3Client(cfg s3Config) (*s3Client, error) {
	if cfg.host == "" || strings.ContainsAny(cfg.host, "/?#@ ") {
		return nil, fmt.Errorf("s3: the endpoint must be HOST or HOST:PORT, not %q", cfg.host)
	}
	if cfg.bucket == "" || uriEncode(cfg.bucket, false) != cfg.bucket {
		return nil, fmt.Errorf("s3: a bucket name has only letters, digits, '.', '_' and '-', not %q", cfg.bucket)
	}
	if cfg.accessKey == "" || cfg.secretKey == "" || cfg.now == nil {
		return nil, errors.New("s3: the access key, the secret key or the clock is missing")
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

// newS3Transport makes the transport of a client. It speaks HTTP/1 only, because
// one HTTP/2 connection would share its flow-control window among all bodies, and
// uses no proxy. Response headers and bodies have no timeout here: s3Watchdog
// has them, since they differ by operation.
func newS3Transport() *http.Transport {
	return &http.Transport{
		DialContext:           (&net.Dialer{Timeout: s3ReadTimeout}).DialContext,
		TLSHandshakeTimeout:   s3ReadTimeout,
		ExpectContinueTimeout: time.Second, // some servers never send 100 Continue
		MaxIdleConnsPerHost:   64,          // the default of 2 redials all the time under load
		MaxConnsPerHost:       1000,        // file descriptors are limited
		IdleConnTimeout:       60 * time.Second,
		DisableCompression:    true,     // a body must have the bytes and the length of its object
		ReadBufferSize:        64 << 10, // bodies are large: fewer system calls than with the default of 4 KiB
		WriteBufferSize:       64 << 10,
	}
}

// getObject opens an object: its metadata, its whole size and its body from g.off
// come with one request. The caller closes the body.
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

// rangeHeader returns the Range header, or "" for a whole object: for an empty
// object a server would refuse even bytes=0-.
func (g s3GetInput) rangeHeader() string {
	switch {
	case g.n > 0:
		return fmt.Sprintf("bytes=%d-%d", g.off, g.off+g.n-1)
	case g.off > 0:
		return fmt.Sprintf("bytes=%d-", g.off)
	}
	return ""
}

// headObject returns what getObject returns, without a body.
func (c *s3Client) headObject(ctx context.Context, key string) (*s3Object, error) {
	resp, err := c.sendWithRetries(ctx, &s3Operation{doing: "asking for", method: "HEAD", key: key})
	if err != nil {
		return nil, err
	}
	return objectFromResponse(resp), nil
}

// objectFromResponse reads what the headers of a response say about its object.
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

// readContentRange takes the size of the whole object from Content-Range (RFC
// 9110 section 14.4). It refuses an answer with another range than the one that
// was asked for, because its bytes would be taken for others.
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

// deleteObject removes an object. A missing object is no error: S3 does not say
// whether there was one.
func (c *s3Client) deleteObject(ctx context.Context, key string) error {
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "deleting", method: "DELETE", key: key, timeout: s3WriteTimeout})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // some servers do say it, also when an earlier attempt removed the object
	}
	return err
}

// putObject stores an object and returns its ETag, an opaque name of this
// version. An object larger than one part is uploaded in parts. After a refusal
// (an s3Error) of the only attempt the old object is still in place; after any
// other error either object may be.
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

// cleanupContext returns a context for work that is done although the caller's
// context may have ended.
func cleanupContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), s3CleanupTimeout)
}

// checkMetadata refuses metadata that not every server returns unchanged. Servers
// treat bytes beyond ASCII, and blanks at the ends of a value, in different ways.
func checkMetadata(meta map[string]string) error {
	for name, v := range meta {
		unprintable := strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r > '~' })
		if unprintable || strings.TrimSpace(v) != v || name == "" || uriEncode(name, false) != name {
			return fmt.Errorf("field %q: %w", cleanText(name), errS3Metadata)
		}
	}
	return nil
}

// objectHeader returns the headers that describe the object: Content-Type and
// metadata.
func (p s3PutInput) objectHeader() http.Header {
	h := http.Header{}
	setNonEmptyHeader(h, "Content-Type", p.contentType)
	for name, v := range p.meta {
		h.Set("X-Amz-Meta-"+name, v)
	}
	return h
}

// setConditions adds If-Match and If-None-Match. Of a multipart upload they
// belong to CompleteMultipartUpload, which replaces the object.
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

// putMultipart is putObject by a multipart upload. An upload that was not
// completed is aborted, whatever happened. An upload that cannot be aborted, or
// whose id never reached us, is left for abortOldUploads.
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
		c.cfg.log.Warn("an unfinished upload could not be aborted: a later sweep removes it", "key", key, "error", aerr)
	}
	if p.ifNoneMatch != "" && mayHaveApplied {
		return c.confirmPut(ctx, key, p, err)
	}
	return "", err
}

// createMultipartUpload begins an upload and returns its id.
func (c *s3Client) createMultipartUpload(ctx context.Context, key string, p s3PutInput) (id string, err error) {
	var out struct{ UploadId string }
	_, err = c.sendWithRetries(ctx, &s3Operation{doing: "beginning to upload", method: "POST", key: key, query: url.Values{"uploads": {""}},
		header: p.objectHeader(), decodeInto: &out, write: true})
	if err == nil && out.UploadId == "" {
		err = fmt.Errorf("beginning to upload %q: the answer has no UploadId: %w", key, errS3BadAnswer)
	}
	return out.UploadId, err
}

// s3CompletedPart names a part in the body of CompleteMultipartUpload.
type s3CompletedPart struct {
	PartNumber int
	ETag       string
}

// uploadParts sends all parts, several at once. All but the last have the same
// size, as R2 demands. The first error ends the others; the function returns when
// none of its goroutines runs any more.
func (c *s3Client) uploadParts(ctx context.Context, key, id string, p s3PutInput) ([]s3CompletedPart, error) {
	size := choosePartSize(p.size, c.cfg.partSize)
	parts := make([]s3CompletedPart, (p.size+size-1)/size)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64 // the first part that no goroutine has taken
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
				parts[i] = s3CompletedPart{int(i) + 1, etag} // written by this goroutine alone
			}
		})
	}
	wg.Wait()
	return parts, context.Cause(ctx)
}

// choosePartSize returns the size of a part of an object: preferred, or as many
// whole MiB as are needed to have no more than s3MaxParts parts.
func choosePartSize(size, preferred int64) int64 {
	const mib = 1 << 20
	if least := (size + s3MaxParts - 1) / s3MaxParts; least > preferred {
		return (least + mib - 1) / mib * mib
	}
	return preferred
}

// uploadPart hashes and sends part n, counted from 1, and returns its ETag.
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

// completeMultipartUpload makes an object of the parts. mayHaveApplied reports
// whether the object may be in place in spite of an error.
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

// abortMultipartUpload ends an upload and removes its parts. A missing upload is
// no error.
func (c *s3Client) abortMultipartUpload(ctx context.Context, key, id string) error {
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "aborting the upload of", method: "DELETE", key: key,
		query: url.Values{"uploadId": {id}}, timeout: s3WriteTimeout})
	if errors.Is(err, errS3NoUpload) || errors.Is(err, fs.ErrNotExist) {
		return nil // it was completed or aborted before
	}
	return err
}

// listObjects calls f with each object whose key begins with prefix, in the
// server's order. An error of f ends the listing and is returned as it is.
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
			return fmt.Errorf("listing %q: the answer has no new token for the next page: %w", prefix, errS3BadAnswer)
		}
		token = page.NextContinuationToken
	}
}

// s3ObjectsPage is an answer to ListObjectsV2.
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

// listObjectsPage asks for the page of a listing that begins at token ("" for the
// first page), with at most maxKeys objects (0: as many as the server likes).
func (c *s3Client) listObjectsPage(ctx context.Context, prefix, token string, maxKeys int) (*s3ObjectsPage, error) {
	// With encoding-type keys are escaped: XML cannot hold every byte.
	q := url.Values{"list-type": {"2"}, "encoding-type": {"url"}, "prefix": {prefix}}
	if token != "" {
		q.Set("continuation-token", token)
	}
	if maxKeys > 0 {
		q.Set("max-keys", strconv.Itoa(maxKeys))
	}
	page := &s3ObjectsPage{}
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "listing", method: "GET", query: q, decodeInto: page, timeout: s3WriteTimeout})
	return page, err
}

// decodeListedKey undoes encoding-type=url, if the answer says that the server
// used it. Some servers write a space as "+", and all write a "+" as %2B, so
// QueryUnescape reads them all.
func decodeListedKey(s, encoding string) (string, error) {
	if encoding != "url" {
		return s, nil
	}
	return url.QueryUnescape(s)
}

// abortOldUploads aborts the uploads below prefix that were begun longer than age
// ago and neither completed nor aborted, and returns how many it aborted. Our
// clock decides; it differs from the server's by minutes at most, or the server
// refuses. MinIO lists an upload only under its exact key, but removes old ones
// itself after a day.
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
		sameMarks := next == keyMark && page.NextUploadIdMarker == idMark // a listing that would never end
		if err != nil || !page.IsTruncated || sameMarks {
			return n, nil
		}
		keyMark, idMark = next, page.NextUploadIdMarker
	}
}

// s3UploadsPage is an answer to ListMultipartUploads.
type s3UploadsPage struct {
	IsTruncated                                     bool
	NextKeyMarker, NextUploadIdMarker, EncodingType string
	Upload                                          []struct {
		Key, UploadId string
		Initiated     time.Time
	}
}

// listMultipartUploads asks for the page of uploads behind the two marks, which
// are those of the page before ("" for the first page).
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

// ensureBucket checks that the bucket is there and can be listed, and creates it
// if it is missing. It lists instead of HeadBucket, because the refusal of a HEAD
// has no body that would name the right region.
func (c *s3Client) ensureBucket(ctx context.Context) error {
	_, err := c.listObjectsPage(ctx, "", "", 1)
	if errors.Is(err, errS3NoBucket) {
		return c.createBucket(ctx)
	}
	return err
}

// createBucket creates the bucket. Another replica may do the same at the same
// time, so a 409 (Conflict) is no error if the bucket can be listed then.
func (c *s3Client) createBucket(ctx context.Context) error {
	var body []byte
	if region := c.endpoint.Load().region; region != "us-east-1" { // S3 refuses us-east-1 as a LocationConstraint
		body = fmt.Appendf(nil, "<CreateBucketConfiguration><LocationConstraint>%s</LocationConstraint></CreateBucketConfiguration>", region)
	}
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "creating bucket", method: "PUT", body: bytes.NewReader(body), size: int64(len(body)),
		sum: sha256Hex(body), timeout: s3WriteTimeout})
	if refused, ok := errors.AsType[*s3Error](err); ok && refused.status == http.StatusConflict {
		if refused.code == "BucketAlreadyOwnedByYou" {
			return nil
		}
		if _, lerr := c.listObjectsPage(ctx, "", "", 1); lerr == nil {
			return nil
		}
	}
	if err == nil {
		c.cfg.log.Info("the bucket was missing and has been created", "bucket", c.cfg.bucket)
	}
	return err
}

// withoutDefaultPort removes the scheme's port from a host. Proxies in front of a
// server remove it from the Host header after it was signed, which would break
// the signature.
func withoutDefaultPort(host string, secure bool) string {
	if secure {
		return strings.TrimSuffix(host, ":443")
	}
	return strings.TrimSuffix(host, ":80")
}

// setNonEmptyHeader sets a header unless its value is empty.
func setNonEmptyHeader(h http.Header, name, value string) {
	if value != "" {
		h.Set(name, value)
	}
}
