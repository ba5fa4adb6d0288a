// upstream.go: asking upstreams. One question goes to base_url and its
// mirrors, with retries, redirects, credentials, timeouts and the breaker.

package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// maxRedirects is what curl and browsers roughly allow, halved: real chains
	// have two or three.
	maxRedirects = 10
	// maxRetries is small because clients retry too; more would multiply.
	maxRetries = 2
	// firstRetryDelay doubles twice per retry (200 ms, 800 ms): long enough for a
	// load balancer to drop a dead backend, short enough for a waiting client.
	firstRetryDelay = 200 * time.Millisecond
	// copyTimeout is how long an attempt may take when a copy can answer:
	// package managers give up after 30 s of silence.
	copyTimeout = 10 * time.Second
	// bodyIdleTimeout is how long a body may stay silent. There is no total limit: a
	// 50 GB file over a slow line must work.
	bodyIdleTimeout = 60 * time.Second
	// drainBytes and drainTime bound what is read of a body that nobody wants
	// so that its HTTP/1 connection can be used again.
	drainBytes = 64 << 10
	drainTime  = 250 * time.Millisecond
	// downTime is how long a remote that could not be reached is left alone.
	downTime = 10 * time.Second
	// probeTime frees the probe's place if its caller never asked.
	probeTime = 60 * time.Second
	// maxDialTime ends a dial that its request has long left; the Transport
	// lets those run on. It is over any sensible timeout, which rule otherwise.
	maxDialTime = 5 * time.Minute
	// maxTokenBytes is ample: tokens with many claims have some 10 KiB.
	maxTokenBytes = 1 << 20
	// defaultTokenLife is what the token specification gives a token without
	// expires_in; maxTokenLife keeps absurd ones from overflowing.
	defaultTokenLife = 60 * time.Second
	maxTokenLife     = 24 * time.Hour
	// maxRemembered bounds each table kept about upstreams. Entries are a few
	// KiB at most, and losing one costs a request.
	maxRemembered = 10_000
	// maxRetryAfter bounds what we pass on: a client told to come back
	// tomorrow is as good as broken.
	maxRetryAfter = time.Hour
	// maxErrorText bounds what a library's error, which may quote the upstream,
	// adds to a log line.
	maxErrorText = 300
)

var (
	// errCredentials says that an upstream's token service refused us. It comes
	// in a problem with status 403 that names the remote.
	errCredentials = errors.New("upstream credentials are missing or wrong")
	// errPrivateAddress is the strict transport's refusal to dial.
	errPrivateAddress = errors.New("a redirect may not lead to a private address")
)

// upstream asks the remotes' origins. It is safe for concurrent use.
type upstream struct {
	version         string // for User-Agent; set before the first ask
	transport       http.RoundTripper
	publicTransport http.RoundTripper // refuses private addresses
	now             func() time.Time
	log             *slog.Logger
	metrics         *metrics
	breaker         breaker
	tokens          tokenCache

	// proxyFor tells whether a proxy dials for a request; it must agree with the
	// transports' own. Tests set it, and private.
	proxyFor  func(*http.Request) (*url.URL, error)
	isPrivate func(netip.Addr) bool
}

// upstreamRequest is one request to a remote.
type upstreamRequest struct {
	remote  *remote
	method  string      // GET or HEAD
	wire    string      // target.wire
	header  http.Header // Accept, Range, If-Range, If-None-Match ...; never changed
	scope   string      // registry token scope, "" otherwise
	hasCopy bool        // a stored copy can answer: no retries, headers awaited min(timeout, 10 s)
	first   int         // index in remote.origins of whom to ask first; the others follow in order
}

// upstreamResponse is an upstream's response; the caller closes Body, and the context
// given to ask bounds it too. Reading Body fails with errTimeout when no byte
// arrives for 60 s; its bytes, and that it broke, are counted here. Request.URL
// may hold the secret query of a redirect target: it is not for logs.
type upstreamResponse struct {
	*http.Response
	origin int // index in remote.origins of who answered
}

// newUpstream builds an upstream over rt, which is called once for each kind
// of transport (see newTransport).
func newUpstream(rt func(strict bool) http.RoundTripper, now func() time.Time, log *slog.Logger, m *metrics) *upstream {
	return &upstream{
		version:         "dev",
		transport:       rt(false),
		publicTransport: rt(true),
		now:             now,
		log:             log,
		metrics:         m,
		breaker:         breaker{remotes: make(map[string]*health)},
		tokens: tokenCache{
			valid:      make(map[tokenKey]bearerToken),
			pending:    make(map[tokenKey]*tokenRequest),
			challenges: make(map[registryKey]authChallenge),
		},
		proxyFor:  http.ProxyFromEnvironment,
		isPrivate: isPrivateAddress,
	}
}

// Close drops idle connections; the last thing at shutdown.
func (u *upstream) Close() {
	for _, rt := range []http.RoundTripper{u.transport, u.publicTransport} {
		if c, ok := rt.(interface{ CloseIdleConnections() }); ok {
			c.CloseIdleConnections()
		}
	}
}

// send sends q and returns the first usable answer of any status: all origins
// are tried before anything is tried again. Its error is errUnreachable,
// errTimeout, errBadUpstream, errCredentials or the context's.
func (u *upstream) send(ctx context.Context, req upstreamRequest) (*upstreamResponse, error) {
	if req.hasCopy { // then this may be the probe: it never keeps its place
		defer u.breaker.release(req.remote.name)
	}
	for try := 0; ; try++ {
		resp, again, err := u.tryOrigins(ctx, req)
		if !again || try == maxRetries {
			return resp, err
		}
		resp.discardBody()
		if err := sleepUnlessDone(ctx, firstRetryDelay<<(2*try)); err != nil {
			return nil, err
		}
	}
}

// sleepUnlessDone waits for d or for ctx's end.
func sleepUnlessDone(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// tryOrigins asks each origin once, in order, until one has a usable answer. If
// none has, base_url's own failure decides: a mirror that lacks a file, or
// knows us not, says nothing about the file. again tells whether another round
// makes sense.
func (u *upstream) tryOrigins(ctx context.Context, req upstreamRequest) (own *upstreamResponse, again bool, ownErr error) {
	reached, timedOut := false, false
	for _, i := range req.originOrder() {
		resp, err := u.tryOrigin(ctx, req, i)
		if err != nil && ctx.Err() != nil {
			own.discardBody()
			return nil, false, ctx.Err()
		}
		if (i == 0 && !needsMirror(resp, err)) || (i > 0 && err == nil && resp.StatusCode < 400) {
			own.discardBody()
			return resp, false, err
		}
		reached = reached || !countsAsDown(err)
		timedOut = timedOut || errors.Is(err, errTimeout)
		if i > 0 {
			resp.discardBody()
			continue
		}
		own, ownErr = resp, err
	}
	if !reached {
		u.markDown(req.remote)
	}
	return own, !timedOut && !req.hasCopy && req.method == http.MethodGet && isTransient(own, ownErr), ownErr
}

// originOrder lists the indexes of q's origins as they are to be asked.
func (req upstreamRequest) originOrder() []int {
	var is []int
	for i := range req.remote.origins {
		is = append(is, i)
	}
	if req.first > 0 && req.first < len(is) {
		is = slices.Insert(slices.Delete(is, req.first, req.first+1), 0, req.first)
	}
	return is
}

// needsMirror reports whether base_url failed in a way that sends us to mirrors.
func needsMirror(resp *upstreamResponse, err error) bool {
	if err != nil {
		return errors.Is(err, errUnreachable) || errors.Is(err, errTimeout)
	}
	return resp.StatusCode >= 500
}

// isTransient reports whether a failure may be over in a second.
func isTransient(resp *upstreamResponse, err error) bool {
	if resp == nil {
		return errors.Is(err, errUnreachable)
	}
	switch resp.StatusCode {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// tryOrigin asks origin i. With a copy in hand it may take copyTimeout for all
// of it, redirects and token included.
func (u *upstream) tryOrigin(ctx context.Context, req upstreamRequest, i int) (*upstreamResponse, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	if req.hasCopy {
		limit := min(req.remote.headerTimeout(), copyTimeout)
		defer time.AfterFunc(limit, func() { cancel(errTimeout) }).Stop()
	}
	resp, err := u.sendAuthorized(ctx, req, i)
	u.countFailure(req.remote, resp, err)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	if b, ok := resp.Body.(*upstreamBody); ok {
		b.release = cancel
	} else {
		cancel(nil)
	}
	return &upstreamResponse{Response: resp, origin: i}, nil
}

// headerTimeout is how long connecting and the response header may take.
func (r *remote) headerTimeout() time.Duration { return cmp.Or(r.timeout, defaultTimeout) }

// countFailure counts what went wrong at one origin by kind.
func (u *upstream) countFailure(r *remote, resp *http.Response, err error) {
	switch {
	case err == nil && (resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests):
		u.metrics.countUpstreamError(r.name, "status")
	case errors.Is(err, errTimeout):
		u.metrics.countUpstreamError(r.name, "timeout")
	case errors.Is(err, errUnreachable):
		u.metrics.countUpstreamError(r.name, "unreachable")
	case errors.Is(err, errBadUpstream), errors.Is(err, errCredentials):
		u.metrics.countUpstreamError(r.name, "refused")
	}
}

// discardBody gives up an answer that nobody will read. a may be nil.
func (resp *upstreamResponse) discardBody() {
	if resp != nil {
		discardResponse(resp.Response)
	}
}

// breaker knows which remotes cannot be reached. It is keyed by name so that
// it survives a reload.
type breaker struct {
	mu      sync.Mutex // guards remotes and what they point to
	remotes map[string]*health
}

// health is what the breaker knows of one remote.
type health struct {
	answers uint64    // so far; who waits sees in it that the remote lives
	tripped bool      // since the last answer
	until   time.Time // counts as down; after that one may probe
	probe   time.Time // the probe's place is taken until then
}

// of is the health of a remote. b.mu is held.
func (b *breaker) of(name string) *health {
	h := b.remotes[name]
	if h == nil {
		if len(b.remotes) >= maxRemembered {
			clear(b.remotes)
		}
		h = &health{}
		b.remotes[name] = h
	}
	return h
}

func (b *breaker) answers(name string) uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.of(name).answers
}

// answered clears the breaker: an answer of any status is one.
func (b *breaker) answered(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.of(name)
	*h = health{answers: h.answers + 1}
}

// release frees the probe's place; after a verdict it is free already.
func (b *breaker) release(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.of(name).probe = time.Time{}
}

// markDown counts r as down from now on.
func (u *upstream) markDown(r *remote) {
	u.breaker.mu.Lock()
	h := u.breaker.of(r.name)
	before := h.tripped
	h.tripped, h.until = true, u.now().Add(downTime)
	u.breaker.mu.Unlock()
	if !before {
		u.log.Warn("remote cannot be reached: stored copies answer", "remote", r.name)
	}
}

// isDown reports whether r counts as down, for callers that have a copy. When
// its time is over, the first caller gets false and is the probe: it must ask.
// The others get true until the probe's verdict.
func (u *upstream) isDown(r *remote) bool {
	u.breaker.mu.Lock()
	defer u.breaker.mu.Unlock()
	h, now := u.breaker.of(r.name), u.now()
	if !h.tripped {
		return false
	}
	if now.Before(h.until) || now.Before(h.probe) {
		return true
	}
	h.probe = now.Add(probeTime)
	return false
}

// parseRetryAfter reads Retry-After, seconds or a date, as a wait from now on.
// Without a usable one it is 0; it is never over maxRetryAfter.
func parseRetryAfter(h http.Header, now time.Time) time.Duration {
	v := strings.TrimSpace(h.Get("Retry-After"))
	var d time.Duration
	if s, err := strconv.ParseUint(v, 10, 64); err == nil {
		d = time.Duration(min(s, uint64(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(v); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, 0), maxRetryAfter)
}

// parseContentRange reads the Content-Range of a 206: "bytes FIRST-LAST/SIZE". size
// is -1 where it is "*". A 416's, which has no range, is not ok.
func parseContentRange(s string) (first, last, size int64, ok bool) {
	unit, rest, _ := strings.Cut(strings.TrimSpace(s), " ")
	span, total, found := strings.Cut(strings.TrimSpace(rest), "/")
	from, to, dashed := strings.Cut(span, "-")
	if !strings.EqualFold(unit, "bytes") || !found || !dashed {
		return 0, 0, 0, false
	}
	first, ok1 := parseDigits(from)
	last, ok2 := parseDigits(to)
	size, ok3 := parseDigits(total)
	if total == "*" {
		size, ok3 = -1, true
	}
	if !ok1 || !ok2 || !ok3 || last < first || (size >= 0 && last >= size) {
		return 0, 0, 0, false
	}
	return first, last, size, true
}

// parseDigits reads a number without sign.
func parseDigits(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil
}
