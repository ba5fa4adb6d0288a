// s3client_attempt.go: how the S3 client sends one operation: its attempts, which
// errors are worth another attempt, what a refusal means, and what ends an attempt
// that hangs.

package main

import (
	"cmp"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
)

// s3Operation is one operation. Every attempt makes a new request of it. It is
// used by one goroutine.
type s3Operation struct {
	doing      string // begins the error text, before the key: "getting"
	method     string
	key        string // "" means the bucket
	query      url.Values
	header     map[string]string // an empty value is not sent
	body       io.ReaderAt       // size bytes; nil means no body
	size       int64
	sum        string        // the SHA-256 of body, in hex
	write      bool          // gets more attempts
	timeout    time.Duration // for the response header; 0 means s3WriteTimeout
	decodeInto any           // where the XML answer is decoded to, if not nil
	keepBody   bool          // the caller reads and closes the body of the answer
	attempts   int           // attempts so far
}

// sendWithRetries makes attempts until one succeeds or fails in a way that another
// attempt would not cure. With op.keepBody the caller closes the body of the
// response; otherwise it is closed.
func (c *s3Client) sendWithRetries(ctx context.Context, op *s3Operation) (*http.Response, error) {
	tries := s3ReadTries
	if op.write {
		tries = s3WriteTries
	}
	for n := 1; ; n++ {
		op.attempts++
		resp, err := c.sendOnce(ctx, op)
		if err == nil {
			return resp, nil
		}
		if errors.Is(err, errS3Timeout) {
			n += tries / 2 // a server that hangs twice is down, and the caller waited long enough
		}
		if n < tries && ctx.Err() == nil {
			if c.learnRegion(err) {
				continue
			}
			if isTransientS3(err) {
				if c.cfg.sleep(ctx, retryDelay(n)) == nil {
					continue
				}
				err = fmt.Errorf("%w (%w)", context.Cause(ctx), err)
			}
		}
		return nil, fmt.Errorf("%s %q: %w", op.doing, op.key, err)
	}
}

// learnRegion reports whether err is a refusal that names the right region, so that the
// next attempt may succeed at once.
func (c *s3Client) learnRegion(err error) bool {
	refused, ok := errors.AsType[*s3Error](err)
	if !ok {
		return false
	}
	used, region := refused.endpoint, refused.region
	if region == "" || region == used.region { // used, not c.endpoint: others learn at the same time
		return false
	}
	host := used.host
	if host == "s3.amazonaws.com" || host == "s3."+used.region+".amazonaws.com" {
		// Only Amazon has one host for each region. The host that a redirect names is
		// not used: a signed request must not be sent to any host that an answer names.
		host = "s3." + region + ".amazonaws.com"
	}
	c.endpoint.Store(&s3Endpoint{host: host, region: region})
	c.cfg.log.Warn("the bucket is in another region than configured: set the right one", "configured", c.cfg.region, "region", region)
	return true
}

// isTransientS3 reports whether an error may be over in a moment. An error that is
// no refusal (the connection was refused, reset or cut, or it hung) may be.
func isTransientS3(err error) bool {
	refused, ok := errors.AsType[*s3Error](err)
	if !ok {
		return true
	}
	switch refused.code {
	case "SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "TooManyRequests", "OperationAborted", "ConditionalRequestConflict":
		return true
	case "NotImplemented":
		return false
	}
	return (refused.status >= 500 && !errors.Is(err, errS3Full)) || refused.status == http.StatusTemporaryRedirect
}

// retryDelay returns the pause after attempt n, counted from 1. It doubles from
// 100 ms to 5 s. Half of it is random, so that replicas do not come back all at
// once.
func retryDelay(n int) time.Duration {
	d := min(100*time.Millisecond<<min(n-1, 10), 5*time.Second)
	return d/2 + rand.N(d/2)
}

// sleepFor waits for d, or until ctx ends, which is its error.
func sleepFor(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
	return ctx.Err()
}

// s3Attempt is one attempt of an operation and, once the header is there, the
// body of the response. timer ends it when no byte moved for some time: it runs
// until the header comes, and during reads of the body, not between them, since
// that time is the caller's. The whole attempt has no limit: 50 GB over a slow
// line must pass.
type s3Attempt struct {
	io.ReadCloser // the body, from the transport
	ctx           context.Context
	cancel        context.CancelCauseFunc
	timer         *time.Timer // cancels ctx with errS3Timeout
	conn          *s3Conn     // that the body comes on; nil: a socket does not have its plain bytes
	isUnbuffered  bool        // the transport has nothing of the body in its buffer
	scratch       []byte      // where the transport reads moved bytes to
}

// s3Conn is a connection without TLS. Of the bodies that it brings, moved bytes went past
// the transport, which is to count them all the same: it reads them without their content.
type s3Conn struct {
	*net.TCPConn
	moved int64
}

func (c *s3Conn) Read(p []byte) (int, error) {
	if c.moved == 0 {
		return c.TCPConn.Read(p)
	}
	n := min(int64(len(p)), c.moved)
	c.moved -= n
	return int(n), nil
}

// dialS3 makes the connections of newS3Transport.
func dialS3(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: s3ReadTimeout}).DialContext(ctx, network, addr)
	if tcp, ok := conn.(*net.TCPConn); ok {
		return &s3Conn{TCPConn: tcp}, nil
	}
	return conn, err
}

// sendOnce is one attempt of sendWithRetries.
func (c *s3Client) sendOnce(ctx context.Context, op *s3Operation) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	timeout := cmp.Or(op.timeout, s3WriteTimeout)
	a := &s3Attempt{ctx: ctx, cancel: cancel, timer: time.AfterFunc(timeout, func() { cancel(errS3Timeout) })}
	endpoint := *c.endpoint.Load()
	var hasConn atomic.Bool // or one is being made: it does not wait for a place among MaxConnsPerHost
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		DNSStart:     func(httptrace.DNSStartInfo) { hasConn.Store(true) },
		ConnectStart: func(string, string) { hasConn.Store(true) },
		GotConn: func(info httptrace.GotConnInfo) {
			hasConn.Store(true)
			a.conn, _ = info.Conn.(*s3Conn)
		}})
	req := c.buildRequest(ctx, op, endpoint, c.cfg.now())
	if op.size > 0 { // net/http would send an empty reader chunked
		body := io.NewSectionReader(op.body, 0, op.size)
		req.Body = io.NopCloser(&s3RequestBody{body, a.timer, max(timeout, s3BodyTimeout)})
	}
	resp, err := c.cfg.transport.RoundTrip(req)
	a.timer.Stop()
	if err != nil {
		if err = a.causeOf(err); ctx.Err() != nil && !hasConn.Load() {
			err = fmt.Errorf("%w: %w", errS3Busy, err)
		}
		cancel(nil)
		return nil, err
	}
	a.ReadCloser, resp.Body = resp.Body, a
	err = readAnswer(resp, op.decodeInto)
	if refused, ok := errors.AsType[*s3Error](err); ok {
		refused.endpoint = endpoint
	}
	if err != nil || !op.keepBody {
		io.CopyN(io.Discard, resp.Body, s3TextLimit) // so that the connection can be used again
		resp.Body.Close()
	}
	return resp, err
}

// buildRequest builds and signs the request of one attempt, all but its body.
func (c *s3Client) buildRequest(ctx context.Context, op *s3Operation, endpoint s3Endpoint, at time.Time) *http.Request {
	u := &url.URL{Scheme: "http", Host: endpoint.host, RawQuery: encodeQuery(op.query)}
	if c.cfg.secure {
		u.Scheme = "https"
	}
	if c.cfg.virtualHost {
		u.Host = c.cfg.bucket + "." + endpoint.host
		u.Path = "/" + op.key
	} else if u.Path = "/" + c.cfg.bucket; op.key != "" {
		u.Path += "/" + op.key
	}
	u.RawPath = uriEncode(u.Path, true) // what is sent must be spelled as it is signed
	req := (&http.Request{Method: op.method, URL: u, Host: u.Host, Header: http.Header{}}).WithContext(ctx)
	for name, v := range op.header {
		if v != "" {
			req.Header.Set(name, v)
		}
	}
	req.ContentLength = op.size
	if op.size > 1<<20 {
		// A refusal then comes before the body is sent. Without this the server may
		// reset the connection while we send, and the refusal would be lost.
		req.Header.Set("Expect", "100-continue")
	}
	c.signRequest(req, endpoint.region, cmp.Or(op.sum, emptySHA256), at)
	return req
}

// s3RequestBody is the body of a request. Each read by the transport shows that
// the request moves, and sets the attempt's timer anew.
type s3RequestBody struct {
	io.Reader
	timer   *time.Timer
	timeout time.Duration // after the last read it includes the wait for the header
}

func (b *s3RequestBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.timer.Reset(b.timeout)
	return n, err
}

func (a *s3Attempt) Read(p []byte) (int, error) {
	a.timer.Reset(s3BodyTimeout)
	n, err := a.ReadCloser.Read(p)
	a.timer.Stop()
	a.isUnbuffered = len(p) >= s3BufferSize // bufio.Reader gives all that it has, or reads into p
	return n, a.causeOf(err)
}

// sendFromSocket has the kernel move the next bytes of the body, at most limit, from the
// socket to w (splice(2)), and returns how many. Without an error 0 are left to Read. With
// an error some may be lost, so that the attempt is of no more use.
func (a *s3Attempt) sendFromSocket(w io.Writer, limit int64) (int64, error) {
	if a.conn == nil || !a.isUnbuffered {
		return 0, nil
	}
	a.timer.Reset(s3BodyTimeout) // w's time counts too: a slow client gets the rest by Read
	n, err := io.Copy(w, &io.LimitedReader{R: a.conn.TCPConn, N: min(limit, s3SocketStep)})
	a.timer.Stop()
	a.conn.moved = n
	if a.scratch == nil {
		a.scratch = make([]byte, s3BufferSize) // less would go through the transport's buffer
	}
	for left := n; left > 0 && err == nil; {
		var counted int
		counted, err = a.ReadCloser.Read(a.scratch[:min(left, s3BufferSize)])
		left -= int64(counted)
	}
	return n, err
}

func (a *s3Attempt) Close() error {
	defer a.cancel(nil)
	return a.ReadCloser.Close()
}

// causeOf returns errS3Timeout if err comes from the timer, else err.
func (a *s3Attempt) causeOf(err error) error {
	if err != nil && err != io.EOF && context.Cause(a.ctx) == errS3Timeout {
		return errS3Timeout
	}
	return err
}

// s3Error is a server's refusal. errors.Is finds fs.ErrNotExist,
// fs.ErrPermission and the errS3 values in it.
type s3Error struct {
	status                   int
	code, message, requestID string

	region   string     // the bucket's region, if the server says it
	endpoint s3Endpoint // where the request was sent
}

func (e *s3Error) Error() string {
	text := strings.TrimSpace(fmt.Sprintf("s3: %d %s %s", e.status, e.code, e.message))
	if e.requestID != "" {
		text += " (request " + e.requestID + ")"
	}
	return text
}

// s3CodeErrors says what the codes of refusals mean.
var s3CodeErrors = map[string]error{
	"NoSuchKey":                  fs.ErrNotExist,
	"NotFound":                   fs.ErrNotExist,
	"NoSuchUpload":               errS3NoUpload,
	"NoSuchBucket":               errS3NoBucket,
	"PreconditionFailed":         errS3PreconditionFailed,
	"ConditionalRequestConflict": errS3PreconditionFailed,
	"RequestTimeTooSkewed":       errS3Clock, // the credentials may be right

	"QuotaExceeded":                  errS3Full, // Ceph's
	"XMinioAdminBucketQuotaExceeded": errS3Full,
}

// Is decides by the code and not by the status. A 404 without a code comes from
// a proxy in front of S3, not from S3, and does not prove that an object is
// missing.
func (e *s3Error) Is(target error) bool {
	if known := s3CodeErrors[e.code]; known != nil {
		return target == known
	}
	return (target == fs.ErrPermission && (e.status == http.StatusForbidden || e.code == "AccessDenied")) ||
		(target == errS3Full && e.status == http.StatusInsufficientStorage)
}

// readAnswer decodes an answer into the value that into points to, if that is
// not nil. A refusal is returned as an s3Error: any status but 2xx, and an Error
// in the body whatever the status is, because CompleteMultipartUpload sends the
// status 200 before it knows the outcome.
func readAnswer(resp *http.Response, into any) error {
	succeeded := resp.StatusCode/100 == 2
	if succeeded && into == nil {
		return nil
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, s3XMLLimit))
	var body struct {
		XMLName                          xml.Name `xml:"Error"` // or it is not decoded
		Code, Message, RequestId, Region string
	}
	if isError := xml.Unmarshal(text, &body) == nil; succeeded && !isError {
		if xmlErr := xml.Unmarshal(text, into); xmlErr != nil {
			return fmt.Errorf("reading the answer: %w", cmp.Or(err, xmlErr))
		}
		return nil
	}
	e := &s3Error{status: resp.StatusCode, code: cleanText(body.Code), message: cleanText(body.Message),
		requestID: cleanText(cmp.Or(resp.Header.Get("X-Amz-Request-Id"), body.RequestId)),
		region:    cmp.Or(resp.Header.Get("X-Amz-Bucket-Region"), body.Region)}
	if uriEncode(e.region, false) != e.region {
		e.region = "" // it would go into a host name and a header
	}
	if resp.StatusCode == http.StatusNotFound && resp.Request != nil && resp.Request.Method == http.MethodHead {
		e.code = "NoSuchKey" // this answer has no body
	}
	return e
}

// cleanText makes a server's text fit for a line of a log: no control characters,
// and at most s3TextLimit bytes.
func cleanText(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s[:min(len(s), s3TextLimit)], ""))
}
