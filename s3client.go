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
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
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
	// one PutObject. A failed part of 64 MiB costs little, and 10,000 of them, the limit
	// of the S3 API, are 640 GB.
	s3PartSize = 64 << 20
	// s3ParallelParts parts are sent at once. Four fill a line that has round
	// trips of 100 ms, and cost no memory but their buffers.
	s3ParallelParts = 4
	// s3BufferSize is the size of the transport's buffers.
	s3BufferSize = 64 << 10
	// s3SocketStep is how much of a body the kernel moves at once: what fits into the pipe
	// that it uses. With 128 KiB a MB costs a third more CPU; 2 MiB bring nothing.
	s3SocketStep = 1 << 20
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
	errS3NoBucket           = errors.New("no such bucket")          // not fs.ErrNotExist: nothing can be stored there
	errS3NoUpload           = errors.New("no such upload")          // not fs.ErrNotExist: it says nothing about the object
	errS3PreconditionFailed = errors.New("a condition was not met") // If-Match of a get, any condition of a put
	errS3Timeout            = errors.New("no byte moved in time")   // no header, or a body that stopped
	errS3Busy               = errors.New("no connection is free")   // all that there may be are in use: S3 was not asked
	errS3Clock              = errors.New("the clocks differ")       // by more than the server accepts
	errS3Full               = errors.New("no space left in S3")     // on the server's disks, or of a quota
	errS3BadAnswer          = errors.New("unexpected answer")       // not what the S3 API says
)

// s3Config says where objects are stored. Who makes it has checked it: a host is HOST or
// HOST:PORT, a bucket has no character that is escaped. All fields are needed, but for
// those with a default.
type s3Config struct {
	host        string // of the endpoint, with a port if it is not the scheme's
	secure      bool   // https
	virtualHost bool   // bucket.host/key instead of host/bucket/key
	bucket      string
	region      string // us-east-1 where the server has no regions
	accessKey   string
	secretKey   string

	now       func() time.Time
	log       *slog.Logger                                     // default none
	partSize  int64                                            // default s3PartSize; tests use less
	sleep     func(ctx context.Context, d time.Duration) error // between attempts; default sleepFor
	transport http.RoundTripper                                // default newS3Transport
}

// String keeps the secret key out of a configuration that is printed.
func (c s3Config) String() string { return c.host + "/" + c.bucket }

// s3Client is a client of one bucket. All methods may be called concurrently.
type s3Client struct {
	cfg      s3Config                   // not changed after newS3Client
	endpoint atomic.Pointer[s3Endpoint] // replaced by learnRegion
	key      atomic.Pointer[signingKey] // of the last request
}

// s3Endpoint is where requests are sent and the region that they are signed for.
// The refusal of a server may correct both.
type s3Endpoint struct{ host, region string }

// s3Object is an object as a server describes it. A caller of getObject closes
// body. A body that breaks off ends in io.ErrUnexpectedEOF.
type s3Object struct {
	size int64 // of the whole object, also when a range was asked for
	etag string
	meta map[string]string // names in lower case
	body io.ReadCloser     // nil from headObject
}

// s3PutInput is an object to store.
type s3PutInput struct {
	body        io.ReaderAt // read several times: parts are hashed first, and sent again after a fault
	size        int64
	sha256      string            // in hex, of the whole body
	meta        map[string]string // printable ASCII, since servers change the rest, without blanks at the ends, 2 KB in all; with ifNoneMatch something in it is unique to this put
	contentType string
	ifMatch     string // the ETag of the object that may be replaced
	ifNoneMatch string // "*" means: only if there is no object
}

// newS3Client sets the defaults of cfg and makes a client. It sends nothing.
func newS3Client(cfg s3Config) *s3Client {
	cfg.partSize = cmp.Or(cfg.partSize, s3PartSize)
	cfg.log = cmp.Or(cfg.log, slog.New(slog.DiscardHandler))
	if cfg.sleep == nil {
		cfg.sleep = sleepFor
	}
	if cfg.transport == nil {
		cfg.transport = newS3Transport()
	}
	// Proxies in front of a server remove the scheme's port from the Host header
	// after it was signed, which would break the signature.
	port := ":80"
	if cfg.secure {
		port = ":443"
	}
	c := &s3Client{cfg: cfg}
	c.endpoint.Store(&s3Endpoint{host: strings.TrimSuffix(cfg.host, port), region: cfg.region})
	return c
}

// newS3Transport makes the transport of a client. It speaks HTTP/1 only, because
// one HTTP/2 connection would share its flow-control window among all bodies, and
// uses no proxy. Response headers and bodies have no timeout here: s3Attempt
// has them, since they differ by operation.
func newS3Transport() *http.Transport {
	return &http.Transport{
		DialContext:           dialS3,
		TLSHandshakeTimeout:   s3ReadTimeout,
		ExpectContinueTimeout: time.Second, // some servers never send 100 Continue
		MaxIdleConnsPerHost:   64,          // the default of 2 redials all the time under load
		MaxConnsPerHost:       1000,        // 130 MB of buffers; see errS3Busy
		IdleConnTimeout:       60 * time.Second,
		DisableCompression:    true,         // a body must have the bytes and the length of its object
		ReadBufferSize:        s3BufferSize, // bodies are large: fewer system calls than with the default of 4 KiB
		WriteBufferSize:       s3BufferSize,
	}
}

// getObject opens an object: its metadata, its whole size and its body from off come
// with one request. The caller closes the body. An object that does not have the ETag
// ifMatch, if there is one, is errS3PreconditionFailed. An answer with other bytes than
// those that were asked for is refused (RFC 9110 section 14.4).
func (c *s3Client) getObject(ctx context.Context, key string, off int64, ifMatch string) (*s3Object, error) {
	header := map[string]string{"If-Match": ifMatch}
	if off > 0 { // of an empty object a server would refuse even bytes=0-
		header["Range"] = fmt.Sprintf("bytes=%d-", off)
	}
	resp, err := c.sendWithRetries(ctx, &s3Operation{doing: "getting", method: "GET", key: key, header: header,
		timeout: s3ReadTimeout, keepBody: true})
	if err != nil {
		return nil, err
	}
	o := objectFromResponse(resp)
	o.size += off
	o.body = resp.Body
	valid, contentRange := resp.StatusCode == http.StatusOK, resp.Header.Get("Content-Range")
	if off > 0 {
		valid = resp.StatusCode == http.StatusPartialContent && contentRange == fmt.Sprintf("bytes %d-%d/%d", off, o.size-1, o.size)
	}
	if !valid || resp.ContentLength < 0 {
		resp.Body.Close()
		return nil, fmt.Errorf("getting %q: status %d, length %d, content range %q: %w",
			key, resp.StatusCode, resp.ContentLength, cleanText(contentRange), errS3BadAnswer)
	}
	return o, nil
}

// headObject returns what getObject returns, without a body.
func (c *s3Client) headObject(ctx context.Context, key string) (*s3Object, error) {
	resp, err := c.sendWithRetries(ctx, &s3Operation{doing: "asking for", method: "HEAD", key: key, timeout: s3ReadTimeout})
	if err != nil {
		return nil, err
	}
	return objectFromResponse(resp), nil
}

// objectFromResponse reads what the headers of a response say about its object.
func objectFromResponse(resp *http.Response) *s3Object {
	o := &s3Object{size: resp.ContentLength, etag: resp.Header.Get("Etag"), meta: map[string]string{}}
	for name, values := range resp.Header {
		if m, ok := strings.CutPrefix(name, "X-Amz-Meta-"); ok {
			o.meta[strings.ToLower(m)] = values[0]
		}
	}
	return o
}

// deleteObject removes an object. A missing object is no error: S3 does not say
// whether there was one.
func (c *s3Client) deleteObject(ctx context.Context, key string) error {
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "deleting", method: "DELETE", key: key})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // some servers do say it, also when an earlier attempt removed the object
	}
	return err
}

// putObject stores an object. One larger than a part is uploaded in parts. After a refusal
// (an s3Error) of the only attempt the old object is still in place; after any
// other error either object may be.
func (c *s3Client) putObject(ctx context.Context, key string, p s3PutInput) error {
	if p.size > c.cfg.partSize {
		return c.putMultipart(ctx, key, p)
	}
	op := &s3Operation{doing: "putting", method: "PUT", key: key, header: p.objectHeader(), body: p.body, size: p.size, sum: p.sha256, write: true}
	op.header["If-Match"], op.header["If-None-Match"] = p.ifMatch, p.ifNoneMatch
	_, err := c.sendWithRetries(ctx, op)
	return c.confirmPut(ctx, key, p, op, err)
}

// objectHeader returns the headers that describe the object.
func (p s3PutInput) objectHeader() map[string]string {
	h := map[string]string{"Content-Type": p.contentType}
	for name, v := range p.meta {
		h["X-Amz-Meta-"+name] = v
	}
	return h
}

// confirmPut looks whether a put with a condition took place although op, which
// would have stored the object, ended in err, and returns err if it did not; nil is
// nil. A client that uploads a file to a local repository needs this: when the answer
// to the first attempt is lost, the second attempt is refused because of the object
// that the first one stored, and the client would be told that somebody else's
// file exists already. A put without that condition is simply done again.
//
// It compares size and metadata, never the ETag, which is an MD5 on some servers
// and for some objects only. Without metadata nothing tells the new object from
// an older one.
func (c *s3Client) confirmPut(ctx context.Context, key string, p s3PutInput, op *s3Operation, err error) error {
	_, refused := errors.AsType[*s3Error](err)
	cannotHaveApplied := op.attempts == 0 || (op.attempts == 1 && refused)
	if err == nil || (p.ifNoneMatch == "" && p.ifMatch == "") || len(p.meta) == 0 || cannotHaveApplied {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s3CleanupTimeout)
	defer cancel()
	o, headErr := c.headObject(ctx, key)
	if headErr != nil || o.size != p.size {
		return err
	}
	for name, v := range p.meta { // servers add fields: rclone has mtime
		if o.meta[strings.ToLower(name)] != v {
			return err
		}
	}
	return nil
}

// putMultipart is putObject by a multipart upload. An upload that was not
// completed is aborted, whatever happened. An upload that cannot be aborted, or
// whose id never reached us, is left for abortUploads.
func (c *s3Client) putMultipart(ctx context.Context, key string, p s3PutInput) error {
	id, err := c.createMultipartUpload(ctx, key, p)
	if err != nil {
		return err
	}
	conditions := map[string]string{"If-Match": p.ifMatch, "If-None-Match": p.ifNoneMatch} // for what replaces the object
	op := &s3Operation{doing: "completing", method: "POST", key: key, query: url.Values{"uploadId": {id}}, header: conditions,
		decodeInto: &struct{}{}, timeout: s3CompleteTimeout, write: true}
	list, err := c.uploadParts(ctx, key, id, p)
	if err == nil {
		op.body, op.size, op.sum = bytes.NewReader(list), int64(len(list)), sha256Hex(list)
		_, err = c.sendWithRetries(ctx, op)
	}
	if err == nil {
		return nil
	}
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), s3CleanupTimeout)
	defer cancel()
	// Abort first: once that is answered, a late complete cannot take effect.
	if abortErr := c.abortMultipartUpload(cleanup, key, id); abortErr != nil {
		c.cfg.log.Warn("an unfinished upload could not be aborted: a later sweep removes it", "key", key, "error", abortErr)
	}
	return c.confirmPut(ctx, key, p, op, err)
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

// uploadParts sends all parts, several at once, and returns the body of
// CompleteMultipartUpload, which lists them. All but the last have the same size,
// as R2 demands. The first error ends the others; the function returns when none
// of its goroutines runs any more.
func (c *s3Client) uploadParts(ctx context.Context, key, id string, p s3PutInput) ([]byte, error) {
	type completedPart struct {
		PartNumber int64
		ETag       string
	}
	size := c.cfg.partSize
	parts := make([]completedPart, (p.size+size-1)/size)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var taken atomic.Int64 // so many parts are sent, or being sent
	var wg sync.WaitGroup
	for range min(s3ParallelParts, len(parts)) {
		wg.Go(func() {
			for n := taken.Add(1); n <= int64(len(parts)) && ctx.Err() == nil; n = taken.Add(1) {
				off := (n - 1) * size
				etag, err := c.uploadPart(ctx, key, id, n, io.NewSectionReader(p.body, off, min(size, p.size-off)))
				if err != nil {
					cancel(err)
				}
				parts[n-1] = completedPart{n, etag} // written by this goroutine alone
			}
		})
	}
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	return xml.Marshal(struct {
		XMLName xml.Name `xml:"CompleteMultipartUpload"`
		Part    []completedPart
	}{Part: parts})
}

// uploadPart hashes and sends part n, counted from 1, and returns its ETag.
func (c *s3Client) uploadPart(ctx context.Context, key, id string, n int64, part *io.SectionReader) (etag string, err error) {
	h := sha256.New()
	if _, err := io.Copy(h, part); err != nil {
		return "", fmt.Errorf("reading part %d of %q: %w", n, key, err)
	}
	number := strconv.FormatInt(n, 10)
	resp, err := c.sendWithRetries(ctx, &s3Operation{doing: "putting part " + number + " of", method: "PUT", key: key,
		query: url.Values{"partNumber": {number}, "uploadId": {id}},
		body:  part, size: part.Size(), sum: hex.EncodeToString(h.Sum(nil)), write: true})
	if err != nil {
		return "", err
	}
	return resp.Header.Get("Etag"), nil
}

// abortMultipartUpload ends an upload and removes its parts. A missing upload is
// no error.
func (c *s3Client) abortMultipartUpload(ctx context.Context, key, id string) error {
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "aborting the upload of", method: "DELETE", key: key, query: url.Values{"uploadId": {id}}})
	if errors.Is(err, errS3NoUpload) || errors.Is(err, fs.ErrNotExist) {
		return nil // it was completed or aborted before
	}
	return err
}

// listObjects calls f with each object whose key begins with prefix, in the
// server's order. An error of f ends the listing and is returned as it is.
func (c *s3Client) listObjects(ctx context.Context, prefix string, f func(s3ListedEntry) error) error {
	return c.listPages(ctx, "listing", url.Values{"list-type": {"2"}, "prefix": {prefix}}, f)
}

// abortUploads aborts the uploads below prefix that were neither completed nor aborted
// and that isLeft says are nobody's, and returns how many it aborted. MinIO lists an
// upload only under its exact key, but removes old ones itself after a day.
func (c *s3Client) abortUploads(ctx context.Context, prefix string, isLeft func(s3ListedEntry) bool) (n int, err error) {
	err = c.listPages(ctx, "listing uploads", url.Values{"uploads": {""}, "prefix": {prefix}}, func(u s3ListedEntry) error {
		if !isLeft(u) {
			return nil
		}
		err := c.abortMultipartUpload(ctx, u.Key, u.UploadId)
		if err == nil {
			n++
		}
		return err
	})
	return n, err
}

// s3ListedEntry is an object or an unfinished upload in a listing.
type s3ListedEntry struct {
	Key, UploadId string
	Initiated     time.Time // of an upload
}

// listPages calls f with each entry of a listing, page by page: of ListObjectsV2
// or ListMultipartUploads, as query says. An error of f ends the listing.
func (c *s3Client) listPages(ctx context.Context, doing string, query url.Values, f func(s3ListedEntry) error) error {
	query.Set("encoding-type", "url") // keys are escaped: XML cannot hold every byte
	for {
		var page struct {
			EncodingType                                             string // "url" if the server did it
			Contents, Upload                                         []s3ListedEntry
			IsTruncated                                              bool
			NextContinuationToken, NextKeyMarker, NextUploadIdMarker string
		}
		_, err := c.sendWithRetries(ctx, &s3Operation{doing: doing, method: "GET", query: query, decodeInto: &page})
		if err != nil {
			return err
		}
		// Some servers write a space as "+", and all write a "+" as %2B, so QueryUnescape
		// reads them all.
		decode := url.QueryUnescape
		if page.EncodingType != "url" {
			decode = func(s string) (string, error) { return s, nil }
		}
		for _, e := range append(page.Contents, page.Upload...) {
			if e.Key, err = decode(e.Key); err != nil {
				return fmt.Errorf("%s: key %q: %w", doing, cleanText(e.Key), errS3BadAnswer)
			}
			if err := f(e); err != nil {
				return err
			}
		}
		if !page.IsTruncated {
			return nil
		}
		marks := map[string]string{"continuation-token": page.NextContinuationToken, "upload-id-marker": page.NextUploadIdMarker}
		if marks["key-marker"], err = decode(page.NextKeyMarker); err != nil {
			return fmt.Errorf("%s: mark %q: %w", doing, cleanText(page.NextKeyMarker), errS3BadAnswer)
		}
		thisPage := query.Encode()
		for name, mark := range marks {
			if mark != "" {
				query.Set(name, mark)
			}
		}
		if query.Encode() == thisPage {
			return fmt.Errorf("%s: the answer names no next page: %w", doing, errS3BadAnswer)
		}
	}
}

// createBucket creates the bucket, unless another replica has just done so.
func (c *s3Client) createBucket(ctx context.Context) error {
	var body []byte
	if region := c.endpoint.Load().region; region != "us-east-1" { // S3 refuses us-east-1 as a LocationConstraint
		body = fmt.Appendf(nil, "<CreateBucketConfiguration><LocationConstraint>%s</LocationConstraint></CreateBucketConfiguration>", region)
	}
	_, err := c.sendWithRetries(ctx, &s3Operation{doing: "creating bucket", method: "PUT", body: bytes.NewReader(body), size: int64(len(body)),
		sum: sha256Hex(body)})
	if refused, ok := errors.AsType[*s3Error](err); ok && refused.code == "BucketAlreadyOwnedByYou" {
		return nil
	}
	if err == nil {
		c.cfg.log.Info("the bucket was missing and has been created", "bucket", c.cfg.bucket)
	}
	return err
}
