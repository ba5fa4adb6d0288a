// upstream.go: requests to upstreams: to base_url and then to the mirrors of a remote,
// with retries. Remotes that cannot be reached are remembered.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// maxRedirects: real chains have two or three.
	maxRedirects = 10
	// maxRetries is small because clients retry too, and the two multiply.
	maxRetries = 2
	// firstRetryDelay is the first pause; the next is four times as long. Meanwhile a load
	// balancer drops a dead backend.
	firstRetryDelay = 200 * time.Millisecond
	// copyTimeout bounds an attempt if a stored copy can be served instead. Package
	// managers give up after 30 s of silence.
	copyTimeout = 10 * time.Second
	// bodyIdleTimeout is how long a body may send nothing. The whole body has no
	// limit: a 50 GB file over a slow line must work.
	bodyIdleTimeout = 60 * time.Second
	// drainBytes and drainTime bound the reading of a body that nobody needs, for the sake
	// of its HTTP/1 connection. Reading more would take longer than a new one.
	drainBytes = 64 << 10
	drainTime  = 250 * time.Millisecond
	// outagePause is how long a remote that could not be reached is left alone where
	// a copy can answer, how long an origin that failed by network is asked last, and how
	// long an answer proves that silence or a reset is not an outage.
	outagePause = 10 * time.Second
	// outageDialTime bounds a dial while the remote is down: there is little hope.
	outageDialTime = 3 * time.Second
	// maxDialTime ends a TLS handshake that http.Transport lets go on after its request's end.
	maxDialTime = 5 * time.Minute
	// maxToken bounds a token in bytes: those with many claims have about 10 KiB. The
	// answer of a token service may have it twice.
	maxToken       = 16 << 10
	maxTokenAnswer = 4 * maxToken
	// maxTokens bounds the tokens that are remembered. A lost one costs two requests.
	maxTokens = 1 << 10
	// maxChallenge bounds a header with challenges in bytes: parsing it takes time.
	maxChallenge = 4 << 10
	// maxTokenLife keeps an absurd expires_in from overflowing a time.Duration.
	maxTokenLife = 24 * time.Hour
	// maxRemembered bounds each table about upstreams. A lost entry costs one request.
	maxRemembered = 10_000
	// maxRetryAfter bounds the Retry-After that is passed on: few clients would wait longer.
	maxRetryAfter = time.Hour
	// maxViaEntries bounds the entries of a client's Via that are passed on.
	maxViaEntries = 16
	// maxErrorText bounds what a library's error, which may quote the upstream, adds to a
	// log line, in characters.
	maxErrorText = 300
)

var (
	// errCredentials means that the token service of an upstream refused us. It comes in a
	// problem that names the remote.
	errCredentials = errors.New("the upstream's credentials are missing or wrong: check username and password")
	// errSealed means that the upstream is never asked. See newSealedError.
	errSealed = fmt.Errorf("the remote is sealed: %w", fs.ErrNotExist)
	// errPrivateAddress is the error of a dial that a transport refuses.
	errPrivateAddress = errors.New("a redirect must not lead to a private address")
)

// contentRange matches a Content-Range, but for that of a 416, which has no range.
var contentRange = regexp.MustCompile(`^(?i)\s*bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\s*$`)

// viaEntry matches the entry of a program like this one in a Via header.
var viaEntry = regexp.MustCompile(`\b1\.1 artifactapi-[0-9a-f]{16}\b`)

// upstream sends requests to the origins of all remotes. Its methods may be called
// concurrently.
type upstream struct {
	version    string                            // for the User-Agent header; set before the first request
	via        string                            // our entry in Via, another one for each start
	transports [anyAddress + 1]http.RoundTripper // by what they reach, see newTransport
	now        func() time.Time
	log        *slog.Logger
	metrics    *metrics
	circuits   *boundedMap[string, *circuit] // of remotes and, where there are mirrors, of their origins

	authorizations *boundedMap[registryKey, string] // that registries have asked for
	asking         sharedCalls[registryKey, string] // one request for a token at a time

	// proxyFor must agree with the Proxy functions of the transports. kindOf is
	// kindOfAddress. Only tests replace the two.
	proxyFor func(*http.Request) (*url.URL, error)
	kindOf   func(netip.Addr) addressKind
}

// upstreamRequest is one request to a remote.
type upstreamRequest struct {
	remote      *remote
	method      string        // GET or HEAD
	wire        string        // target.wire
	header      http.Header   // Accept, Range, If-Range, If-None-Match and so on; never changed
	scope       string        // the scope of the registry token; "" if none is needed
	hasCopy     bool          // a stored copy can be served instead: no retries, at most copyTimeout for an attempt
	digestKnown bool          // the digest of the body is known: a redirect may lead from https to http, and mirrors that are only good for such bodies are asked too
	dialTime    time.Duration // what connecting may take; send sets it
	first       int           // the index in remote.origins that is asked first; the others follow in order
}

// upstreamResponse is the response of an upstream. The caller closes Body, or discards
// it. The context that was given to send ends Body too. Request.URL must not be logged:
// the query of a redirect target may be a signature.
type upstreamResponse struct {
	*http.Response
	origin int // the index in remote.origins of the origin that answered
}

// discardBody closes the body of resp, which may be nil. If the body is short and arrives
// at once, it is read before, so that the connection can be used again.
func (resp *upstreamResponse) discardBody() {
	if resp == nil {
		return
	}
	if b, ok := resp.Body.(*upstreamBody); ok && resp.ContentLength <= drainBytes {
		b.idle.Reset(drainTime)
		io.CopyN(io.Discard, b.ReadCloser, drainBytes)
		b.idle.Stop()
	}
	resp.Body.Close()
}

// newUpstream makes an upstream. It calls rt for each kind of address; see newTransport.
func newUpstream(rt func(reach addressKind) http.RoundTripper, now func() time.Time, log *slog.Logger, m *metrics) *upstream {
	u := &upstream{
		via:      fmt.Sprintf("1.1 artifactapi-%016x", rand.Uint64()),
		now:      now,
		log:      log,
		metrics:  m,
		circuits: newBoundedMap[string, *circuit](maxRemembered, now),

		authorizations: newBoundedMap[registryKey, string](maxTokens, now),

		proxyFor: http.ProxyFromEnvironment,
		kindOf:   kindOfAddress,
	}
	for reach := range u.transports {
		u.transports[reach] = rt(addressKind(reach))
	}
	return u
}

// Close closes idle connections, when no request runs any more.
func (u *upstream) Close() {
	for _, rt := range u.transports {
		(&http.Client{Transport: rt}).CloseIdleConnections()
	}
}

// passedVia returns what of a client's Via (RFC 9110 section 7.6.3) goes upstream. Its
// error is a 508 problem if our own entry is there: a base_url leads back to us.
func (u *upstream) passedVia(h http.Header) (string, error) {
	entries := viaEntry.FindAllString(strings.Join(h["Via"], ","), -1)
	if slices.Contains(entries, u.via) {
		return "", newProblem(http.StatusLoopDetected, "this request comes from this very server: the base_url of a remote leads back to it")
	}
	return strings.Join(entries[max(0, len(entries)-maxViaEntries):], ", "), nil
}

// send sends req and returns a response of any status, whose body the caller closes. All
// origins are tried before one is tried again, and none is while the remote is down. The
// error wraps errUnreachable, errTimeout, errBadUpstream or errCredentials, or is ctx's.
func (u *upstream) send(ctx context.Context, req upstreamRequest) (*upstreamResponse, error) {
	retries := maxRetries
	switch req.dialTime = req.remote.timeout; {
	case req.hasCopy:
		req.dialTime = min(req.dialTime, copyTimeout)
	case u.isDown(ctx, req.remote):
		retries, req.dialTime = 0, outageDialTime
	}
	for try := 0; ; try++ {
		resp, canRetry, err := u.tryOrigins(ctx, req)
		if !canRetry || try == retries {
			return resp, err
		}
		resp.discardBody()
		if err := sleepFor(ctx, firstRetryDelay<<(2*try)); err != nil {
			return nil, err
		}
	}
}

// tryOrigins asks each origin once, in order, until one has a usable answer. If none
// has, the result is the answer or the error of base_url: a mirror that does not have
// the file, or refuses us, says nothing about the file. canRetry reports whether all
// origins are worth another try.
func (u *upstream) tryOrigins(ctx context.Context, req upstreamRequest) (baseResp *upstreamResponse, canRetry bool, baseErr error) {
	reached, timedOut := false, false
	var since time.Time // the earliest of the failures
	for _, i := range u.originOrder(ctx, req) {
		resp, err := u.tryOrigin(ctx, req, i)
		if err != nil && ctx.Err() != nil {
			baseResp.discardBody()
			return nil, false, ctx.Err()
		}
		u.noteOrigin(req.remote, i, resp, err)
		if (i == 0 && !needsMirror(resp, err)) || (i > 0 && err == nil && resp.StatusCode < 400) {
			baseResp.discardBody()
			return resp, false, err
		}
		failure, isTransport := errors.AsType[*transportError](err)
		reached = reached || !isTransport || failure.since.IsZero()
		if !reached && (since.IsZero() || failure.since.Before(since)) {
			since = failure.since
		}
		timedOut = timedOut || errors.Is(err, errTimeout)
		if i > 0 {
			resp.discardBody()
			continue
		}
		baseResp, baseErr = resp, err
	}
	if !reached && u.circuitOf(req.remote.name).fail(baseErr, since) {
		u.log.Warn("a remote cannot be reached: stored copies answer", "remote", req.remote.name, "error", baseErr)
	}
	mayPass := errors.Is(baseErr, errUnreachable)
	if baseResp != nil { // an answer that says when to come back is passed on
		mayPass = isGatewayError(baseResp.StatusCode) && parseRetryAfter(baseResp.Header, u.now()) == 0
	}
	// After a timeout the client has waited long enough.
	return baseResp, mayPass && !timedOut && !req.hasCopy && req.method == http.MethodGet, baseErr
}

// noteOrigin makes it known when an origin begins to fail and when it works again, since
// no client notices where others stand in. A 5xx among answers may be of one file.
func (u *upstream) noteOrigin(r *remote, i int, resp *upstreamResponse, err error) {
	if len(r.origins) == 1 { // then the remote is in an outage, or no other origin stands in
		return
	}
	switch c := u.circuitOfOrigin(r, i); {
	case needsMirror(resp, err):
		since := u.now()
		if err == nil {
			err, since = newProblem(http.StatusBadGateway, "it answers %d", resp.StatusCode), since.Add(-outagePause)
		}
		if c.fail(err, since) {
			u.log.Warn("an origin of a remote fails: the others are asked instead", "remote", r.name, "origin", r.shownURL(i), "error", err)
		}
	case err == nil:
		if lasted, recovered := c.succeed(); recovered {
			u.log.Info("an origin of a remote works again", "remote", r.name, "origin", r.shownURL(i), "after", lasted.Round(time.Second).String())
		}
	}
}

// failingOrigin is an origin for which others stand in.
type failingOrigin struct {
	url   string // as it may be shown
	since time.Time
	cause error
}

// failingOrigins are those of a remote with mirrors, in the order of the configuration.
// What an earlier configuration has left of others says nothing: they may not be asked.
func (u *upstream) failingOrigins(r *remote) (all []failingOrigin) {
	for i := range r.origins {
		if began, cause := u.circuitOfOrigin(r, i).outage(); cause != nil && len(r.origins) > 1 && !r.sealed {
			all = append(all, failingOrigin{r.shownURL(i), began, cause})
		}
	}
	return all
}

// originOrder returns the indexes of the origins in the order in which they are asked:
// those that failed by network a short while ago are last. first may not exist: another
// replica's configuration may have more mirrors.
func (u *upstream) originOrder(ctx context.Context, req upstreamRequest) []int {
	var order, last []int
	for i, o := range req.remote.origins {
		switch {
		case o.verified && !req.digestKnown:
		case len(req.remote.origins) > 1 && failedByNetwork(u.circuitOfOrigin(req.remote, i).admit(ctx)):
			last = append(last, i)
		case i == req.first:
			order = slices.Insert(order, 0, i)
		default:
			order = append(order, i)
		}
	}
	return append(order, last...)
}

// needsMirror reports whether mirrors are asked after that outcome at base_url.
func needsMirror(resp *upstreamResponse, err error) bool {
	return failedByNetwork(err) || (err == nil && resp.StatusCode >= 500)
}

func failedByNetwork(err error) bool {
	return errors.Is(err, errUnreachable) || errors.Is(err, errTimeout)
}

func isGatewayError(status int) bool {
	return status >= http.StatusBadGateway && status <= http.StatusGatewayTimeout
}

// tryOrigin asks origin i and counts a failure by its kind. If a copy can be served,
// everything up to the response header, with redirects and the token, must not take
// longer than copyTimeout.
func (u *upstream) tryOrigin(ctx context.Context, req upstreamRequest, i int) (*upstreamResponse, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	if req.hasCopy {
		defer time.AfterFunc(min(req.remote.timeout, copyTimeout), func() { cancel(errTimeout) }).Stop()
	}
	resp, err := u.sendAuthorized(ctx, req, i)
	switch name := req.remote.name; {
	case err == nil && (resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests):
		u.metrics.countUpstreamError(name, "status")
	case errors.Is(err, errTimeout):
		u.metrics.countUpstreamError(name, "timeout")
	case errors.Is(err, errUnreachable):
		u.metrics.countUpstreamError(name, "unreachable")
	case errors.Is(err, errBadUpstream), errors.Is(err, errCredentials):
		u.metrics.countUpstreamError(name, "refused")
	}
	if err != nil {
		cancel(nil)
		return nil, err
	}
	resp.Body.(*upstreamBody).cancel = cancel // the body needs the context until it is closed
	return resp, nil
}

// circuitOf is what is known about a remote's outages, by its name: it survives a reload.
func (u *upstream) circuitOf(remote string) *circuit {
	return u.circuits.getOrPut(remote, func() *circuit { return newCircuit(u.now, outagePause, outagePause) })
}

// circuitOfOrigin is the same about one origin. No remote's name has a blank.
func (u *upstream) circuitOfOrigin(r *remote, i int) *circuit {
	return u.circuitOf(r.name + " " + r.origins[i].url.String())
}

// isDown reports whether a remote counts as down. Once a pause is over, one caller gets
// false and must send a request: it is the probe, see circuit.admit.
func (u *upstream) isDown(ctx context.Context, r *remote) bool {
	return u.circuitOf(r.name).admit(ctx) != nil
}

// isInOutage reports whether a remote counts as down, which was logged when it began.
func (u *upstream) isInOutage(remote string) bool { return u.circuitOf(remote).outageCause() != nil }

// parseRetryAfter reads Retry-After (RFC 9110 section 10.2.3), a number of seconds or
// a date, and returns how long to wait from now on: 0 without a usable value.
func parseRetryAfter(h http.Header, now time.Time) time.Duration {
	v := strings.TrimSpace(h.Get("Retry-After"))
	var d time.Duration
	if seconds, err := strconv.ParseUint(v, 10, 64); err == nil {
		d = time.Duration(min(seconds, uint64(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(v); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, 0), maxRetryAfter)
}

// parseContentRange reads the Content-Range of a 206, "bytes FIRST-LAST/SIZE" (RFC 9110
// section 14.4). size is -1 if it is "*".
func parseContentRange(s string) (first, last, size int64, ok bool) {
	parts := contentRange.FindStringSubmatch(s)
	if parts == nil {
		return 0, 0, 0, false
	}
	first, _ = strconv.ParseInt(parts[1], 10, 64)
	last, _ = strconv.ParseInt(parts[2], 10, 64)
	size, _ = strconv.ParseInt(strings.Replace(parts[3], "*", "-1", 1), 10, 64)
	return first, last, size, first <= last && (size < 0 || last < size)
}
