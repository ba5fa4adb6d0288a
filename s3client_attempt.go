// s3client_attempt.go: how the S3 client sends one operation: its attempts, which
// errors are worth another attempt, what a refusal means, and what ends an attempt
// that hangs.

package main

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// s3Operation is one operation. Every attempt makes a new request of it. It is
// used by one goroutine.
type s3Operation struct {
	doing      string // begins the error text, before the key: "getting"
	method     string
	key        string // "" means the bucket
	query      url.Values
	header     http.Header
	body       io.ReaderAt // size bytes; nil means no body
	size       int64
	sum        string        // the SHA-256 of body, in hex
	write      bool          // gets more attempts, and a missing bucket is created
	timeout    time.Duration // for the response header; 0 means the default of reads or writes
	decodeInto any           // where the XML answer is decoded to, if not nil
	keepBody   bool          // the caller reads and closes the body of the answer
	attempts   int           // attempts so far
}

// mayHaveApplied reports whether an operation that ended in err may have taken
// effect: the last attempt got no answer, or an earlier attempt failed, which may
// have had no answer either.
func (op *s3Operation) mayHaveApplied(err error) bool {
	_, refused := errors.AsType[*s3Error](err)
	return op.attempts > 1 || !refused
}

// headerTimeout returns how long an attempt waits for the response header after
// the request was sent.
func (op *s3Operation) headerTimeout() time.Duration {
	switch {
	case op.timeout > 0:
		return op.timeout
	case op.write:
		return s3WriteTimeout
	}
	return s3ReadTimeout
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
		var pause time.Duration
		switch {
		case n >= tries || ctx.Err() != nil:
			return nil, fmt.Errorf("%s %q: %w", op.doing, op.key, err)
		case c.learnRegion(err) || c.prepareRetry(ctx, op, err):
		case isTransientS3(err):
			pause = retryDelay(n)
		default:
			return nil, fmt.Errorf("%s %q: %w", op.doing, op.key, err)
		}
		if c.cfg.sleep(ctx, pause) != nil {
			return nil, fmt.Errorf("%s %q: %w (%w)", op.doing, op.key, context.Cause(ctx), err)
		}
	}
}

// prepareRetry sends another request if that lets the next attempt of op succeed,
// and reports whether it does. For a write it creates a bucket that is missing.
// For a HEAD, whose refusal has no body that would name the region, it learns the
// region from the refusal of a listing.
func (c *s3Client) prepareRetry(ctx context.Context, op *s3Operation, err error) bool {
	if op.write && errors.Is(err, errS3NoBucket) {
		return c.createBucket(ctx) == nil
	}
	refused, ok := errors.AsType[*s3Error](err)
	if !ok || op.method != http.MethodHead || refused.status != http.StatusBadRequest {
		return false
	}
	c.listObjectsPage(ctx, "", "", 1) // only so that learnRegion sees its refusal
	return c.endpoint.Load().region != refused.endpoint.region
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
	return refused.status >= 500 || refused.status == http.StatusTemporaryRedirect
}

// retryDelay returns the pause after attempt n, counted from 1. It doubles from
// 100 ms to 5 s. Half of it is random, so that replicas do not come back all at
// once.
func retryDelay(n int) time.Duration {
	d := min(100*time.Millisecond<<min(n-1, 10), 5*time.Second)
	return d/2 + rand.N(d/2)
}

// s3pause waits for d, or until ctx ends, which is its error.
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

// learnRegion takes the bucket's region from a refusal and reports whether
// another attempt will be signed for another region than the refused one was.
// It compares with the region of that attempt, since a concurrent operation may
// have learned the region meanwhile.
func (c *s3Client) learnRegion(err error) bool {
	refused, ok := errors.AsType[*s3Error](err)
	if !ok || refused.region == "" || refused.region == refused.endpoint.region {
		return false
	}
	c.endpoint.Store(&s3Endpoint{host: regionHost(refused.endpoint, refused.region), region: refused.region})
	c.cfg.log.Warn("the bucket is in another region than configured: set the right one", "configured", c.cfg.region, "region", refused.region)
	return true
}

// regionHost returns the host of another region. Only Amazon has one host for
// each region. The host that a redirect names is not used: a signed request must
// not be sent to any host that an answer names.
func regionHost(used s3Endpoint, region string) string {
	if used.host == "s3.amazonaws.com" || used.host == "s3."+used.region+".amazonaws.com" {
		return "s3." + region + ".amazonaws.com"
	}
	return used.host
}

// sendOnce sends op once. With op.keepBody the caller closes the body of the
// response. Any other body was read as far as needed and is closed.
func (c *s3Client) sendOnce(ctx context.Context, op *s3Operation) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &s3Watchdog{ctx: ctx, cancel: cancel}
	w.timer = time.AfterFunc(op.headerTimeout(), func() { cancel(errS3Timeout) })
	endpoint, at := *c.endpoint.Load(), c.cfg.now()
	resp, err := c.cfg.transport.RoundTrip(c.buildRequest(ctx, op, endpoint, at, w))
	if err != nil {
		err = w.causeOf(err)
		w.stop()
		return nil, err
	}
	w.timer.Stop() // each read of the body starts it again
	resp.Body = &s3ResponseBody{ReadCloser: resp.Body, watch: w}
	if resp.StatusCode/100 != 2 {
		err = readRefusal(resp, endpoint, at)
	} else if op.decodeInto != nil {
		err = readXML(resp, op.decodeInto, endpoint, at)
	}
	if err != nil || !op.keepBody {
		io.CopyN(io.Discard, resp.Body, s3TextLimit) // so that the connection can be used again
		resp.Body.Close()
	}
	return resp, err
}

// buildRequest builds and signs one attempt.
func (c *s3Client) buildRequest(ctx context.Context, op *s3Operation, endpoint s3Endpoint, at time.Time, w *s3Watchdog) *http.Request {
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
		req.Header[name] = v
	}
	sum := op.sum
	if op.size > 0 {
		req.ContentLength = op.size
		req.GetBody = func() (io.ReadCloser, error) {
			return &s3RequestBody{r: io.NewSectionReader(op.body, 0, op.size), watch: w, headerTimeout: op.headerTimeout()}, nil
		}
		req.Body, _ = req.GetBody()
	} else {
		sum = emptySHA256 // Body stays nil: net/http would send an empty reader chunked
	}
	if op.size > 1<<20 {
		// A refusal then comes before the body is sent. Without this the server may
		// reset the connection while we send, and the refusal would be lost.
		req.Header.Set("Expect", "100-continue")
	}
	c.signRequest(req, endpoint.region, sum, at)
	return req
}

// s3Error is a server's refusal. errors.Is finds fs.ErrNotExist,
// fs.ErrPermission and the errS3 values in it.
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
	if e.code == "RequestTimeTooSkewed" {
		return true
	}
	withoutCode := e.code == "" && e.status == http.StatusForbidden && !e.date.IsZero()
	return withoutCode && e.date.Sub(e.sent).Abs() > s3ClockTolerance
}

// Is decides by the code and not by the status. A 404 without a code comes from a proxy in front
// of S3, not from S3, and does not prove that an object is missing.
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

// readRefusal reads the error in a response. Answers to HEAD and 304 have no body;
// there the status gives the code.
func readRefusal(resp *http.Response, endpoint s3Endpoint, at time.Time) error {
	err := readXML(resp, &struct{}{}, endpoint, at)
	if refused, ok := errors.AsType[*s3Error](err); ok && refused.code != "" {
		return refused
	}
	e := newS3Error(resp, s3ErrorBody{}, endpoint, at)
	head := resp.Request != nil && resp.Request.Method == http.MethodHead
	switch {
	case resp.StatusCode == http.StatusNotModified:
		e.code = "NotModified"
	case head && resp.StatusCode == http.StatusNotFound:
		e.code = "NoSuchKey"
	}
	return e
}

// s3ErrorBody is the body of a refusal, without the fields that repeat the request.
type s3ErrorBody struct{ Code, Message, RequestId, Region string }

// newS3Error makes the error of a refusal from its headers and its body. endpoint and
// at are where the request was sent and when it was signed.
func newS3Error(resp *http.Response, body s3ErrorBody, endpoint s3Endpoint, at time.Time) *s3Error {
	e := &s3Error{status: resp.StatusCode, code: cleanText(body.Code), message: cleanText(body.Message), requestID: cleanText(body.RequestId),
		region: body.Region, endpoint: endpoint, sent: at}
	if id := resp.Header.Get("X-Amz-Request-Id"); id != "" {
		e.requestID = cleanText(id)
	}
	if r := resp.Header.Get("X-Amz-Bucket-Region"); r != "" && resp.StatusCode/100 != 2 {
		e.region = r
	}
	if uriEncode(e.region, false) != e.region {
		e.region = "" // it would go into a host name and a header
	}
	e.date, _ = http.ParseTime(resp.Header.Get("Date"))
	return e
}

// readXML decodes an answer into the value that into points to. An Error in the
// body is returned as an s3Error whatever the status is: CompleteMultipartUpload
// sends the status 200 before it knows the outcome.
func readXML(resp *http.Response, into any, endpoint s3Endpoint, at time.Time) error {
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
		var body s3ErrorBody
		if err := d.DecodeElement(&body, &start); err != nil {
			return fmt.Errorf("reading the error: %w", err)
		}
		return newS3Error(resp, body, endpoint, at)
	}
}

// cleanText makes a server's text fit for a line of a log: no control characters,
// and at most s3TextLimit bytes.
func cleanText(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return -1
		}
		return r
	}, s[:min(len(s), 4*s3TextLimit)])
	return strings.ToValidUTF8(s[:min(len(s), s3TextLimit)], "")
}

// s3Watchdog ends an attempt when no byte moved for the time that timer is set to.
// The whole attempt has no limit: 50 GB over a slow line must pass.
type s3Watchdog struct {
	ctx    context.Context // of the attempt
	cancel context.CancelCauseFunc
	timer  *time.Timer // cancels ctx with errS3Timeout
}

// stop ends the attempt and its timer.
func (w *s3Watchdog) stop() { w.timer.Stop(); w.cancel(nil) }

// causeOf returns errS3Timeout if the watchdog ended the attempt, else err.
func (w *s3Watchdog) causeOf(err error) error {
	if context.Cause(w.ctx) == errS3Timeout {
		return errS3Timeout
	}
	return err
}

// s3RequestBody is the body of a request. Each read by the transport shows that the
// request moves, and sets the watchdog's timer anew.
type s3RequestBody struct {
	r             io.Reader
	watch         *s3Watchdog
	headerTimeout time.Duration // what the wait for the header may take after the last read
}

func (s *s3RequestBody) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.watch.timer.Reset(max(s3BodyTimeout, s.headerTimeout))
	return n, err
}

func (s *s3RequestBody) Close() error { return nil }

// s3ResponseBody is the body of a response. The watchdog's timer runs during reads
// only: the time between two reads is the caller's.
type s3ResponseBody struct {
	io.ReadCloser
	watch *s3Watchdog
}

func (b *s3ResponseBody) Read(p []byte) (int, error) {
	b.watch.timer.Reset(s3BodyTimeout)
	n, err := b.ReadCloser.Read(p)
	b.watch.timer.Stop()
	if err != nil && err != io.EOF {
		err = b.watch.causeOf(err)
	}
	return n, err
}

func (b *s3ResponseBody) Close() error {
	err := b.ReadCloser.Close()
	b.watch.stop()
	return err
}
