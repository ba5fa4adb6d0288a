// s3client_attempt.go: how one operation of the S3 client is sent: attempts,
// what may be tried again, what a refusal means, and what ends a hung attempt.

package main

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// s3Operation is one operation, of which every attempt makes a new request.
type s3Operation struct {
	doing      string // for errors: gerund before the key
	method     string
	key        string // "": the bucket
	query      url.Values
	header     http.Header
	body       io.ReaderAt // size bytes whose SHA-256 is sum; nil: none
	size       int64
	sum        string
	write      bool          // worth more tries, and a bucket
	timeout    time.Duration // for the response header; 0: by write
	decodeInto any           // decode the XML answer into this
	keepBody   bool          // hand the body to the caller
	attempts   int           // attempts so far
}

// mayHaveApplied says whether a failed write may have taken effect: an attempt got no
// answer, or a refusal came only after an earlier attempt that did not get one.
func (op *s3Operation) mayHaveApplied(err error) bool {
	var e *s3Error
	return op.attempts > 1 || !errors.As(err, &e)
}

func (op *s3Operation) headerTimeout() time.Duration {
	switch {
	case op.timeout > 0:
		return op.timeout
	case op.write:
		return s3WriteTimeout
	}
	return s3ReadTimeout
}

// sendWithRetries makes attempts until one succeeds, or fails in a way that will not pass.
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
			n += tries / 2 // hung twice is down, and took long enough
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

// prepareRetry asks something else first, where that lets the next attempt succeed: a
// write gets its bucket back, and a HEAD, whose refusal has no body to name the
// region in, learns it from a listing's.
func (c *s3Client) prepareRetry(ctx context.Context, op *s3Operation, err error) bool {
	if op.write && errors.Is(err, errS3NoBucket) {
		return c.createBucket(ctx) == nil
	}
	var e *s3Error
	if op.method != http.MethodHead || !errors.As(err, &e) || e.status != http.StatusBadRequest {
		return false
	}
	c.listObjectsPage(ctx, "", "", 1) // for what it teaches
	return c.endpoint.Load().region != e.endpoint.region
}

// isTransientS3 says whether an error may be gone in a moment. What is no answer of
// the server's (refused, reset, cut, hung) may be.
func isTransientS3(err error) bool {
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

// retryDelay doubles from 100 ms up to 5 s, half of it by chance so that
// replicas do not come back in step.
func retryDelay(n int) time.Duration {
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

// regionHost is where another region answers. Only Amazon has a host for each;
// where an answer points is not followed, it could be anywhere.
func regionHost(used s3Endpoint, region string) string {
	if used.host == "s3.amazonaws.com" || used.host == "s3."+used.region+".amazonaws.com" {
		return "s3." + region + ".amazonaws.com"
	}
	return used.host
}

// sendOnce sends op once. The response of a kept body must be closed; every
// other body is already read.
func (c *s3Client) sendOnce(ctx context.Context, op *s3Operation) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &s3Watchdog{ctx: ctx, cancel: cancel}
	w.timer = time.AfterFunc(op.headerTimeout(), func() { cancel(errS3Timeout) })
	place, at := *c.endpoint.Load(), c.cfg.now()
	resp, err := c.cfg.transport.RoundTrip(c.buildRequest(ctx, op, place, at, w))
	if err != nil {
		err = w.causeOf(err)
		w.stop()
		return nil, err
	}
	w.timer.Stop() // reads of the body start it again
	resp.Body = &s3ResponseBody{ReadCloser: resp.Body, watch: w}
	if resp.StatusCode/100 != 2 {
		err = readRefusal(resp, place, at)
	} else if op.decodeInto != nil {
		err = readXML(resp, op.decodeInto, place, at)
	}
	if err != nil || !op.keepBody {
		io.CopyN(io.Discard, resp.Body, s3TextLimit) // so that the connection can be used again
		resp.Body.Close()
	}
	return resp, err
}

// buildRequest builds and signs one attempt.
func (c *s3Client) buildRequest(ctx context.Context, op *s3Operation, place s3Endpoint, at time.Time, w *s3Watchdog) *http.Request {
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
			return &s3RequestBody{r: io.NewSectionReader(op.body, 0, op.size), watch: w, headerTimeout: op.headerTimeout()}, nil
		}
		req.Body, _ = req.GetBody()
	} else {
		sum = emptySHA256 // and no body at all: a reader would go out chunked
	}
	if op.size > 1<<20 {
		req.Header.Set("Expect", "100-continue") // a refusal then costs no upload, nor arrives as a reset
	}
	c.signingKey(place.region, at).signRequest(req, c.cfg.accessKey, sum, at)
	return req
}

// readRefusal reads the error in a response. Where there cannot be a body the
// status must do.
func readRefusal(resp *http.Response, place s3Endpoint, at time.Time) error {
	var e *s3Error
	if err := readXML(resp, &struct{}{}, place, at); errors.As(err, &e) && e.code != "" {
		return e
	}
	e = newS3Error(resp, s3ErrorBody{}, place, at)
	head := resp.Request != nil && resp.Request.Method == http.MethodHead
	switch {
	case resp.StatusCode == http.StatusNotModified:
		e.code = "NotModified"
	case head && resp.StatusCode == http.StatusNotFound:
		e.code = "NoSuchKey"
	}
	return e
}

// s3ErrorBody is the body of a refusal, without what it repeats of the request.
type s3ErrorBody struct{ Code, Message, RequestId, Region string }

func newS3Error(resp *http.Response, f s3ErrorBody, place s3Endpoint, at time.Time) *s3Error {
	e := &s3Error{status: resp.StatusCode, code: cleanText(f.Code), message: cleanText(f.Message), requestID: cleanText(f.RequestId),
		region: f.Region, endpoint: place, sent: at}
	if id := resp.Header.Get("X-Amz-Request-Id"); id != "" {
		e.requestID = cleanText(id)
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
func readXML(resp *http.Response, into any, place s3Endpoint, at time.Time) error {
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
		var f s3ErrorBody
		if err := d.DecodeElement(&f, &start); err != nil {
			return fmt.Errorf("reading the error: %w", err)
		}
		return newS3Error(resp, f, place, at)
	}
}

// cleanText makes a server's text fit for one line of a log.
func cleanText(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return -1
		}
		return r
	}, s[:min(len(s), 4*s3TextLimit)])
	return strings.ToValidUTF8(s[:min(len(s), s3TextLimit)], "")
}

// s3Watchdog ends an attempt in which nothing moves. There is no limit to the
// whole: 50 GB over a slow line must pass.
type s3Watchdog struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

func (w *s3Watchdog) stop() { w.timer.Stop(); w.cancel(nil) }

// causeOf is err, or why there was one.
func (w *s3Watchdog) causeOf(err error) error {
	if context.Cause(w.ctx) == errS3Timeout {
		return errS3Timeout
	}
	return err
}

// s3RequestBody is a request's body. While it is read the request moves.
type s3RequestBody struct {
	r             io.Reader
	watch         *s3Watchdog
	headerTimeout time.Duration // for the header, after the end
}

func (s *s3RequestBody) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.watch.timer.Reset(max(s3BodyTimeout, s.headerTimeout))
	return n, err
}

func (s *s3RequestBody) Close() error { return nil }

// s3ResponseBody is a response's body. The watch runs during reads only: between them
// it is the caller who takes his time.
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
