// upstream.go: asking upstreams. One question goes to base_url and its
// mirrors, with retries, redirects, credentials, timeouts and the breaker.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// maxRedirects is what curl and browsers roughly allow, halved: real chains
	// have two or three.
	maxRedirects = 10
	// maxRetries is small because clients retry too; more would multiply.
	maxRetries = 2
	// firstPause doubles twice per retry (200 ms, 800 ms): long enough for a
	// load balancer to drop a dead backend, short enough for a waiting client.
	firstPause = 200 * time.Millisecond
	// copyPatience is how long an attempt may take when a copy can answer:
	// package managers give up after 30 s of silence.
	copyPatience = 10 * time.Second
	// idleLimit is how long a body may stay silent. There is no total limit: a
	// 50 GB file over a slow line must work.
	idleLimit = 60 * time.Second
	// drainBytes and drainTime bound what is read of a body that nobody wants
	// so that its HTTP/1 connection can be used again.
	drainBytes = 64 << 10
	drainTime  = 250 * time.Millisecond
	// downTime is how long a remote that could not be reached is left alone.
	downTime = 10 * time.Second
	// probeTime frees the probe's place if its caller never asked.
	probeTime = 60 * time.Second
	// abandonedDial ends a dial that its request has long left; the Transport
	// lets those run on. It is over any sensible timeout, which rule otherwise.
	abandonedDial = 5 * time.Minute
	// maxTokenBytes is ample: tokens with many claims have some 10 KiB.
	maxTokenBytes = 1 << 20
	// tokenLife is what the token specification gives a token without
	// expires_in; maxTokenLife keeps absurd ones from overflowing.
	tokenLife    = 60 * time.Second
	maxTokenLife = 24 * time.Hour
	// maxRemembered bounds each table kept about upstreams. Entries are a few
	// KiB at most, and losing one costs a request.
	maxRemembered = 10_000
	// maxRetryAfter bounds what we pass on: a client told to come back
	// tomorrow is as good as broken.
	maxRetryAfter = time.Hour
	// maxReason bounds what a library's error, which may quote the upstream,
	// adds to a log line.
	maxReason = 300
)

var (
	// errCredentials says that an upstream's token service refused us. It comes
	// in a problem with status 403 that names the remote.
	errCredentials = errors.New("upstream credentials are missing or wrong")
	// errPrivate is the strict transport's refusal to dial.
	errPrivate = errors.New("a redirect may not lead to a private address")
)

// upstream asks the remotes' origins. It is safe for concurrent use.
type upstream struct {
	version string // for User-Agent; set before the first ask
	anyhow  http.RoundTripper
	strict  http.RoundTripper // refuses private addresses
	now     func() time.Time
	log     *slog.Logger
	metrics *metrics
	breaker breaker
	tokens  tokens

	// proxy tells whether a proxy dials for a request; it must agree with the
	// transports' own. Tests set it, and private.
	proxy   func(*http.Request) (*url.URL, error)
	private func(netip.Addr) bool
}

// question is one request to a remote.
type question struct {
	remote  *remote
	method  string      // GET or HEAD
	wire    string      // target.wire
	header  http.Header // Accept, Range, If-Range, If-None-Match ...; never changed
	scope   string      // registry token scope, "" otherwise
	hasCopy bool        // a stored copy can answer: no retries, headers awaited min(timeout, 10 s)
	first   int         // index in remote.origins of whom to ask first; the others follow in order
}

// answer is an upstream's response; the caller closes Body, and the context
// given to ask bounds it too. Reading Body fails with errTimeout when no byte
// arrives for 60 s; its bytes, and that it broke, are counted here. Request.URL
// may hold the secret query of a redirect target: it is not for logs.
type answer struct {
	*http.Response
	origin int // index in remote.origins of who answered
}

// newUpstream builds an upstream over rt, which is called once for each kind
// of transport (see newTransport).
func newUpstream(rt func(strict bool) http.RoundTripper, now func() time.Time, log *slog.Logger, m *metrics) *upstream {
	return &upstream{
		version: "dev",
		anyhow:  rt(false),
		strict:  rt(true),
		now:     now,
		log:     log,
		metrics: m,
		breaker: breaker{remotes: make(map[string]*health)},
		tokens: tokens{
			live:    make(map[tokenKey]token),
			flights: make(map[tokenKey]*exchange),
			asked:   make(map[registryKey]challenge),
		},
		proxy:   http.ProxyFromEnvironment,
		private: privateAddr,
	}
}

// newTransport makes a transport for upstreams. The strict one dials public
// addresses only. Neither has timeouts of its own that matter, since remotes
// differ: hop has them. How many connections there are is bounded by how many
// questions the cache asks at once.
func newTransport(strict bool) *http.Transport {
	d := &net.Dialer{Timeout: abandonedDial, KeepAlive: 30 * time.Second}
	if strict {
		d.ControlContext = refusePrivate
	}
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            d.DialContext,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    abandonedDial,
		DisableCompression:     true, // bodies are stored as they are sent
		ForceAttemptHTTP2:      true, // off by default with a dialer of our own
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
		IdleConnTimeout:        90 * time.Second,
		MaxIdleConns:           256,
		MaxIdleConnsPerHost:    32, // the default of 2 redials all the time under a burst of misses
		MaxResponseHeaderBytes: 256 << 10,
	}
}

// refusePrivate sees the address that is really dialled, so that a name that
// changes its address between a check and the dial gains nothing.
func refusePrivate(_ context.Context, _, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil || privateAddr(ap.Addr()) {
		return errPrivate
	}
	return nil
}

// privateAddr reports whether a names this machine or its neighbourhood.
func privateAddr(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsLoopback() || a.IsPrivate() || a.IsUnspecified() ||
		a.IsLinkLocalUnicast() || a.IsLinkLocalMulticast() || a.IsInterfaceLocalMulticast()
}

// close drops idle connections; the last thing at shutdown.
func (u *upstream) close() {
	for _, rt := range []http.RoundTripper{u.anyhow, u.strict} {
		if c, ok := rt.(interface{ CloseIdleConnections() }); ok {
			c.CloseIdleConnections()
		}
	}
}

// ask sends q and returns the first usable answer of any status: all origins
// are tried before anything is tried again. Its error is errUnreachable,
// errTimeout, errBadUpstream, errCredentials or the context's.
func (u *upstream) ask(ctx context.Context, q question) (*answer, error) {
	if q.hasCopy { // then this may be the probe: it never keeps its place
		defer u.breaker.release(q.remote.name)
	}
	for try := 0; ; try++ {
		a, again, err := u.round(ctx, q)
		if !again || try == maxRetries {
			return a, err
		}
		a.discard()
		if err := pause(ctx, firstPause<<(2*try)); err != nil {
			return nil, err
		}
	}
}

// pause waits for d or for ctx's end.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// round asks each origin once, in order, until one has a usable answer. If
// none has, base_url's own failure decides: a mirror that lacks a file, or
// knows us not, says nothing about the file. again tells whether another round
// makes sense.
func (u *upstream) round(ctx context.Context, q question) (own *answer, again bool, ownErr error) {
	reached, timedOut := false, false
	for _, i := range q.order() {
		a, err := u.attempt(ctx, q, i)
		if err != nil && ctx.Err() != nil {
			own.discard()
			return nil, false, ctx.Err()
		}
		if i == 0 && !failed(a, err) || i > 0 && err == nil && a.StatusCode < 400 {
			own.discard()
			return a, false, err
		}
		reached = reached || !trips(err)
		timedOut = timedOut || errors.Is(err, errTimeout)
		if i > 0 {
			a.discard()
			continue
		}
		own, ownErr = a, err
	}
	if !reached {
		u.trip(q.remote)
	}
	return own, !timedOut && !q.hasCopy && q.method == http.MethodGet && passing(own, ownErr), ownErr
}

// order lists the indexes of q's origins as they are to be asked.
func (q question) order() []int {
	var is []int
	for i := range q.remote.origins {
		is = append(is, i)
	}
	if q.first > 0 && q.first < len(is) {
		is = slices.Insert(slices.Delete(is, q.first, q.first+1), 0, q.first)
	}
	return is
}

// failed reports whether base_url failed in a way that sends us to mirrors.
func failed(a *answer, err error) bool {
	if err != nil {
		return errors.Is(err, errUnreachable) || errors.Is(err, errTimeout)
	}
	return a.StatusCode >= 500
}

// passing reports whether a failure may be over in a second.
func passing(a *answer, err error) bool {
	if a == nil {
		return errors.Is(err, errUnreachable)
	}
	switch a.StatusCode {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// attempt asks origin i. With a copy in hand it may take copyPatience for all
// of it, redirects and token included.
func (u *upstream) attempt(ctx context.Context, q question, i int) (*answer, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	if q.hasCopy {
		limit := min(q.remote.patience(), copyPatience)
		defer time.AfterFunc(limit, func() { cancel(errTimeout) }).Stop()
	}
	resp, err := u.authorized(ctx, q, i)
	u.countFailure(q.remote, resp, err)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	if b, ok := resp.Body.(*body); ok {
		b.release = cancel
	} else {
		cancel(nil)
	}
	return &answer{Response: resp, origin: i}, nil
}

// patience is how long connecting and the response header may take.
func (r *remote) patience() time.Duration { return cmp.Or(r.timeout, defaultTimeout) }

// countFailure counts what went wrong at one origin by kind.
func (u *upstream) countFailure(r *remote, resp *http.Response, err error) {
	switch {
	case err == nil && (resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests):
		u.metrics.upstreamFailed(r.name, "status")
	case errors.Is(err, errTimeout):
		u.metrics.upstreamFailed(r.name, "timeout")
	case errors.Is(err, errUnreachable):
		u.metrics.upstreamFailed(r.name, "unreachable")
	case errors.Is(err, errBadUpstream), errors.Is(err, errCredentials):
		u.metrics.upstreamFailed(r.name, "refused")
	}
}

// discard gives up an answer that nobody will read. a may be nil.
func (a *answer) discard() {
	if a != nil {
		discard(a.Response)
	}
}

// discard drains resp a little, so that its connection can be used again, and
// closes it.
func discard(resp *http.Response) {
	if b, ok := resp.Body.(*body); ok && resp.ContentLength <= drainBytes {
		b.drain()
	}
	resp.Body.Close()
}

// trip is one way to an answer: a URL and the redirects behind it.
type trip struct {
	remote *remote
	method string
	start  *url.URL
	header http.Header // ours: goes everywhere
	auth   string      // docker's Authorization: goes to start's scheme, host and port alone
	origin *url.URL    // the origin it is made for, whose host may be anywhere
	inside bool        // private addresses may be dialled for other hosts too
}

// tripTo makes the trip to wire below r's origin i.
func tripTo(q question, i int) (*trip, error) {
	o := q.remote.origins[i].url
	start, err := below(o, q.wire)
	if err != nil {
		return nil, err
	}
	return &trip{remote: q.remote, method: q.method, start: start, header: q.header, origin: o}, nil
}

// below is base + "/" + wire with exactly those bytes on the wire.
func below(base *url.URL, wire string) (*url.URL, error) {
	path, query, asked := strings.Cut(wire, "?")
	raw := base.EscapedPath() + "/" + path
	plain, err := url.PathUnescape(raw)
	if err != nil {
		return nil, fmt.Errorf("path %q: %w", path, errBadRequest)
	}
	return &url.URL{
		Scheme: base.Scheme, Host: base.Host,
		Path: plain, RawPath: raw,
		RawQuery: query, ForceQuery: asked && query == "",
	}, nil
}

// gives reports whether r's credentials and headers may go to at.
func (r *remote) gives(at *url.URL) bool {
	for i, o := range r.origins {
		if (i == 0 || o.auth) && samePlace(o.url, at) {
			return true
		}
	}
	return false
}

// basic is the Authorization that r's credentials make, or "".
func (r *remote) basic() string {
	if r.username == "" {
		return ""
	}
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(r.username+":"+string(r.password)))
}

// samePlace reports whether a and b have one scheme, host and port.
func samePlace(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && sameHost(a, b) && portOf(a) == portOf(b)
}

func sameHost(a, b *url.URL) bool { return strings.EqualFold(a.Hostname(), b.Hostname()) }

func portOf(u *url.URL) string {
	if u.Scheme == "https" {
		return cmp.Or(u.Port(), "443")
	}
	return cmp.Or(u.Port(), "80")
}

// walk goes from t.start along redirects to an answer. It does by hand what
// http.Client would: that one keeps Authorization on sub-domains, adds Referer,
// and puts whole URLs into errors.
func (u *upstream) walk(ctx context.Context, t *trip) (*http.Response, error) {
	at := t.start
	for n := 0; ; n++ {
		resp, err := u.hop(ctx, t, at, n == 0)
		if err != nil || !redirects(resp.StatusCode) {
			return resp, err
		}
		next, reason := follow(at, resp.Header.Get("Location"))
		discard(resp)
		if n == maxRedirects {
			reason = "redirect loop"
		}
		if reason != "" {
			return nil, t.unusable(at, reason)
		}
		at = next
	}
}

func redirects(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// follow resolves a Location, or says why it is refused. The reason never
// holds the location, whose query may be a signature.
func follow(at *url.URL, location string) (next *url.URL, reason string) {
	if location == "" {
		return nil, "a redirect without Location"
	}
	next, err := at.Parse(location)
	switch {
	case err != nil:
		return nil, "a redirect with a malformed Location"
	case at.Scheme == "https" && next.Scheme == "http":
		return nil, "a redirect from https to http"
	case next.Scheme != "http" && next.Scheme != "https", next.Host == "":
		return nil, "a redirect to something else than http or https"
	}
	next.Fragment, next.RawFragment, next.User = "", "", nil
	next.RawQuery = strings.ReplaceAll(next.RawQuery, " ", "%20") // else the request line breaks
	return next, ""
}

// hop makes one request. The remote's timeout covers all up to the response
// header; then the body watches itself.
func (u *upstream) hop(ctx context.Context, t *trip, at *url.URL, first bool) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	name := t.remote.name
	answers := u.breaker.answers(name)
	var c contact
	req := t.request(c.trace(ctx), at, u.version)
	proxied := u.proxied(req)
	timer := time.AfterFunc(t.remote.patience(), func() { cancel(errTimeout) })
	resp, err := u.transport(t, at, proxied).RoundTrip(req)
	if !timer.Stop() && err == nil { // too late by a hair: the body is cut off already
		resp.Body.Close()
		err = errTimeout
	}
	if err != nil {
		err = t.failure(ctx, at, err)
		var f *fault
		if errors.As(err, &f) {
			f.trips = first && (c.never(f) || answers == u.breaker.answers(name))
		}
		cancel(nil)
		return nil, err
	}
	u.breaker.answered(name)
	if sameHost(at, t.origin) && !proxied && c.near(u.private) {
		t.inside = true
	}
	resp.Request = req
	resp.Body = u.newBody(ctx, cancel, name, at.Host, resp.Body)
	return resp, nil
}

// request builds the request for one hop. Nothing of a client's request is in
// it but what the question took over. What is ours wins over configured
// headers where an answer would be unusable otherwise.
func (t *trip) request(ctx context.Context, at *url.URL, version string) *http.Request {
	h := http.Header{"User-Agent": {"artifactapi/" + version}}
	req := &http.Request{
		Method: t.method, URL: at, Host: at.Host, Header: h,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	if t.remote.gives(at) {
		maps.Copy(h, t.remote.headers)
		req.Host = cmp.Or(h.Get("Host"), at.Host)
		if basic := t.remote.basic(); basic != "" && t.remote.pkg != "docker" {
			h["Authorization"] = []string{basic}
		}
	}
	maps.Copy(h, t.header)
	h["Accept-Encoding"] = []string{"identity"}
	if t.auth != "" && samePlace(at, t.start) {
		h["Authorization"] = []string{t.auth}
	}
	return req.WithContext(ctx)
}

// proxied reports whether a proxy dials for req: then addresses are its matter.
func (u *upstream) proxied(req *http.Request) bool {
	p, err := u.proxy(req)
	return err == nil && p != nil
}

// transport picks who dials for a hop to at. An upstream may not point us at
// our own neighbourhood, unless it lives there itself.
func (u *upstream) transport(t *trip, at *url.URL, proxied bool) http.RoundTripper {
	if proxied || t.inside || sameHost(at, t.origin) || u.literal(t.origin) {
		return u.anyhow
	}
	return u.strict
}

// literal reports whether at's host is written as a private address: known
// even where a proxy dials.
func (u *upstream) literal(at *url.URL) bool {
	a, err := netip.ParseAddr(at.Hostname())
	return err == nil && u.private(a)
}

// contact is what the transport told about the connection of one hop.
type contact struct {
	addr atomic.Value // net.Addr as a string; unset: there was none
}

func (c *contact) trace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) { c.addr.Store(i.Conn.RemoteAddr().String()) },
	})
}

// near reports whether the connection went to a private address.
func (c *contact) near(private func(netip.Addr) bool) bool {
	s, _ := c.addr.Load().(string)
	ap, err := netip.ParseAddrPort(s)
	return err == nil && private(ap.Addr())
}

// never reports whether dial, DNS or TLS failed outright: no connection came
// about, and it was neither silence nor a reset that ended it.
func (c *contact) never(f *fault) bool {
	return c.addr.Load() == nil && f.kind == errUnreachable && !f.reset
}

// fault is how a hop failed. It is one of the error kinds, and its text is the
// library's, which holds hosts and addresses but no URL.
type fault struct {
	kind   error
	reason string
	reset  bool // cut by the other side
	trips  bool // counts for the breaker
}

func (f *fault) Error() string { return f.reason }
func (f *fault) Unwrap() error { return f.kind }

// trips reports whether err, an origin's failure, counts for the breaker.
func trips(err error) bool {
	var f *fault
	return errors.As(err, &f) && f.trips
}

// failure says what err, the transport's, means for a hop to at under ctx. An
// answer that is no HTTP counts as unreachable: a captive portal or a wrong
// port is no verdict about a file. err itself is not wrapped, so that a
// context error inside of it is not taken for the client's.
func (t *trip) failure(ctx context.Context, at *url.URL, err error) error {
	f := &fault{kind: errUnreachable, reason: clip(err.Error()), reset: isReset(err)}
	switch cause := context.Cause(ctx); {
	case errors.Is(err, errPrivate):
		return t.unusable(at, errPrivate.Error())
	case errors.Is(cause, errTimeout), errors.Is(err, errTimeout):
		f.kind, f.reason = errTimeout, "no answer in time"
	case cause != nil:
		return ctx.Err()
	}
	return t.problem(f.kind, at, f.kind.Error(), f)
}

// unusable makes the error for an answer that cannot be used.
func (t *trip) unusable(at *url.URL, reason string) error {
	return t.problem(errBadUpstream, at, reason, errBadUpstream)
}

func (t *trip) problem(kind error, at *url.URL, text string, cause error) error {
	p := refuse(statusOf(kind), "remote %q: %s: %s", t.remote.name, clip(at.Host), clip(text))
	p.cause = cause
	return p
}

// clip bounds a foreign text.
func clip(s string) string {
	if len(s) > maxReason {
		return strings.ToValidUTF8(s[:maxReason], "") + "..."
	}
	return s
}

// isReset reports whether the other side ended the connection.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// body is a response body that ends its request when nothing arrives for
// idleLimit. The clock runs during Read alone: a slow reader is not a silent
// upstream.
type body struct {
	io.ReadCloser
	u            *upstream
	ctx          context.Context
	cancel       context.CancelCauseFunc
	release      context.CancelCauseFunc // of the attempt's context; may be nil
	idle         *time.Timer
	remote, host string
}

func (u *upstream) newBody(ctx context.Context, cancel context.CancelCauseFunc, remote, host string, rc io.ReadCloser) *body {
	idle := time.AfterFunc(idleLimit, func() { cancel(errTimeout) })
	idle.Stop()
	return &body{ReadCloser: rc, u: u, ctx: ctx, cancel: cancel, idle: idle, remote: remote, host: host}
}

func (b *body) Read(p []byte) (int, error) {
	b.idle.Reset(idleLimit)
	n, err := b.ReadCloser.Read(p)
	b.idle.Stop()
	b.u.metrics.fetched(b.remote, int64(n))
	if err == nil || err == io.EOF {
		return n, err
	}
	return n, b.failure(err)
}

// failure says what a broken Read means. A body that breaks is no answer, so
// its error is of no other kind than errTimeout, errUnreachable or the
// context's.
func (b *body) failure(err error) error {
	kind, reason := errUnreachable, clip(err.Error())
	switch cause := context.Cause(b.ctx); {
	case errors.Is(cause, errTimeout):
		kind, reason = errTimeout, "no byte in time"
	case cause != nil:
		return b.ctx.Err()
	}
	b.u.metrics.upstreamFailed(b.remote, "broken")
	return fmt.Errorf("remote %q: reading from %s: %w", b.remote, b.host, &fault{kind: kind, reason: reason})
}

// Close releases all that the request held.
func (b *body) Close() error {
	err := b.ReadCloser.Close()
	b.idle.Stop()
	b.cancel(nil)
	if b.release != nil {
		b.release(nil)
	}
	return err
}

// drain reads the rest of b if it is short and there.
func (b *body) drain() {
	b.idle.Reset(drainTime)
	io.CopyN(io.Discard, b.ReadCloser, drainBytes)
	b.idle.Stop()
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

// trip counts r as down from now on.
func (u *upstream) trip(r *remote) {
	u.breaker.mu.Lock()
	h := u.breaker.of(r.name)
	before := h.tripped
	h.tripped, h.until = true, u.now().Add(downTime)
	u.breaker.mu.Unlock()
	if !before {
		u.log.Warn("remote cannot be reached: stored copies answer", "remote", r.name)
	}
}

// down reports whether r counts as down, for callers that have a copy. When
// its time is over, the first caller gets false and is the probe: it must ask.
// The others get true until the probe's verdict.
func (u *upstream) down(r *remote) bool {
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

// authorized asks origin i with what authorization it wants. A registry says
// so in a 401; what it said is remembered, and so are the tokens.
func (u *upstream) authorized(ctx context.Context, q question, i int) (*http.Response, error) {
	t, err := tripTo(q, i)
	if err != nil {
		return nil, err
	}
	if q.remote.pkg != "docker" {
		return u.walk(ctx, t)
	}
	t.auth = u.tokens.known(t.registry(), q.scope, u.now())
	for last, n := false, 0; ; n++ {
		resp, err := u.walk(ctx, t)
		// A 401 from elsewhere is blob storage's: its realm is not the registry's.
		if err != nil || last || n == 2 || resp.StatusCode != http.StatusUnauthorized || !samePlace(resp.Request.URL, t.origin) {
			return resp, err
		}
		auth, fresh, err := u.authorize(ctx, t, q.scope, resp.Header.Values("WWW-Authenticate"))
		if err == nil && auth == "" {
			return resp, nil
		}
		discard(resp)
		if busy, ok := errors.AsType[*tokenBusy](err); ok {
			return busy.answer(resp.Request), nil
		}
		if err != nil {
			return nil, err
		}
		t.auth, last = auth, fresh
	}
}

// authorize finds the Authorization that challenges ask for, "" when there is
// none that was not just refused. It is fresh unless an earlier request used
// it already: then one more try is worth while.
func (u *upstream) authorize(ctx context.Context, t *trip, scope string, challenges []string) (auth string, fresh bool, err error) {
	k := t.registry()
	c, ok := pick(parseChallenges(challenges))
	switch {
	case !ok, c.scheme == "basic" && t.auth == k.basic:
		return "", true, nil
	case c.scheme == "basic":
		u.tokens.remember(k, c)
		return k.basic, true, nil
	}
	realm, err := t.realm(c.params["realm"], k.basic != "")
	if err != nil {
		return "", true, err
	}
	value, fresh, err := u.token(ctx, t, k.token(c, scope), realm, strings.TrimPrefix(t.auth, "Bearer "))
	if err != nil {
		return "", true, err
	}
	u.tokens.remember(k, c)
	return "Bearer " + value, fresh, nil
}

// pick chooses a challenge that we can meet: a token is worth more than a
// password.
func pick(cs []challenge) (challenge, bool) {
	for _, scheme := range []string{"bearer", "basic"} {
		for _, c := range cs {
			if c.scheme == scheme && (scheme == "basic" || c.params["realm"] != "") {
				return c, true
			}
		}
	}
	return challenge{}, false
}

// registryKey is one registry as one user. A changed password is another user.
type registryKey struct{ remote, place, basic string }

// tokenKey is one token. Credentials are part of it so that a mirror without
// auth cannot name base_url's realm and be sent a token they bought.
type tokenKey struct{ remote, realm, service, scope, basic string }

func (t *trip) registry() registryKey {
	k := registryKey{remote: t.remote.name, place: t.origin.Scheme + "://" + t.origin.Host}
	if t.remote.gives(t.origin) {
		k.basic = t.remote.basic()
	}
	return k
}

func (k registryKey) token(c challenge, scope string) tokenKey {
	return tokenKey{k.remote, c.params["realm"], c.params["service"], scope, k.basic}
}

// realm reads the token service's URL and refuses one that may not have the
// credentials, if there are any.
func (t *trip) realm(s string, credentials bool) (*url.URL, error) {
	realm, err := url.Parse(s)
	if err != nil || realm.Host == "" || realm.Scheme != "https" && realm.Scheme != "http" {
		return nil, t.unusable(t.origin, "its token realm is no URL")
	}
	realm.User, realm.Fragment = nil, ""
	if credentials && !t.remote.trusts(realm) {
		return nil, t.unusable(t.origin, fmt.Sprintf(
			"its realm may not have the credentials; if it should, set token_realm: %s://%s%s",
			realm.Scheme, realm.Host, realm.EscapedPath()))
	}
	return realm, nil
}

// trusts reports whether the credentials may go to realm (SPEC.md section 6).
func (r *remote) trusts(realm *url.URL) bool {
	if r.names(realm) {
		return true
	}
	for i, o := range r.origins {
		if (i == 0 || o.auth) && (realm.Scheme == "https" || realm.Scheme == o.url.Scheme) &&
			related(hostOf(o.url), hostOf(realm)) {
			return true
		}
	}
	return false
}

// names reports whether realm is the configured token_realm.
func (r *remote) names(realm *url.URL) bool {
	return r.tokenRealm != nil && samePlace(r.tokenRealm, realm) &&
		cmp.Or(r.tokenRealm.EscapedPath(), "/") == cmp.Or(realm.EscapedPath(), "/")
}

func hostOf(u *url.URL) string { return strings.TrimSuffix(strings.ToLower(u.Hostname()), ".") }

// related reports whether realm is registry's host, or equals or lies under
// that host less its first label, as auth.docker.io does for
// registry-1.docker.io. Where anyone may register that rest, it proves nothing.
func related(registry, realm string) bool {
	if registry == realm {
		return true
	}
	for _, host := range []string{registry, realm} {
		if _, err := netip.ParseAddr(host); err == nil {
			return false
		}
	}
	_, parent, _ := strings.Cut(registry, ".")
	if !strings.Contains(parent, ".") || publicSuffix(parent) {
		return false
	}
	return realm == parent || strings.HasSuffix(realm, "."+parent)
}

// publicSuffix knows the usual names of two labels under which anyone can have
// a name. Too many here costs a token_realm line, too few a password.
func publicSuffix(host string) bool {
	second, top, _ := strings.Cut(host, ".")
	if len(top) == 2 {
		switch second {
		case "ac", "co", "com", "edu", "go", "gob", "gov", "gv", "id", "ltd", "me", "mil",
			"ne", "net", "nom", "or", "org", "plc", "sch":
			return true
		}
	}
	switch host {
	case "appspot.com", "azurecr.io", "azurewebsites.net", "cloudfront.net", "duckdns.org", "fly.dev",
		"github.io", "gitlab.io", "herokuapp.com", "hf.space", "jfrog.io", "netlify.app", "ngrok.io",
		"onrender.com", "pages.dev", "pkg.dev", "run.app", "vercel.app", "web.app", "workers.dev":
		return true
	}
	return false
}

// tokens remembers what registries asked for and what token services gave.
type tokens struct {
	mu      sync.Mutex // guards the maps; never held while asking
	live    map[tokenKey]token
	flights map[tokenKey]*exchange
	asked   map[registryKey]challenge
}

type token struct {
	value string
	until time.Time
}

// exchange is a request for a token that others wait for. Its fields are
// written before done is closed.
type exchange struct {
	done      chan struct{}
	token     token
	err       error
	abandoned bool // its asker's context ended: the next one asks
}

// known is the Authorization that a registry is likely to want; "" when a
// challenge has to tell.
func (ts *tokens) known(k registryKey, scope string, now time.Time) string {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	c := ts.asked[k]
	if c.scheme == "basic" {
		return k.basic
	}
	if tok := ts.live[k.token(c, scope)]; now.Before(tok.until) {
		return "Bearer " + tok.value
	}
	return ""
}

func (ts *tokens) remember(k registryKey, c challenge) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if len(ts.asked) >= maxRemembered {
		clear(ts.asked)
	}
	ts.asked[k] = c
}

// token gets a token for k that is not the refused one. However many want it,
// one asks; they share its outcome, unless it was only that asker who gave up.
func (u *upstream) token(ctx context.Context, t *trip, k tokenKey, realm *url.URL, refused string) (value string, fresh bool, err error) {
	for {
		tok, x, lead := u.tokens.join(k, refused, u.now())
		if x == nil {
			return tok.value, false, nil
		}
		if lead {
			u.lead(ctx, t, k, realm, x)
			return x.token.value, true, x.err
		}
		select {
		case <-x.done:
		case <-ctx.Done():
			return "", true, t.failure(ctx, realm, ctx.Err())
		}
		if !x.abandoned {
			return x.token.value, true, x.err
		}
	}
}

// join finds a live token, or the exchange that will bring one; lead tells the
// caller to make it.
func (ts *tokens) join(k tokenKey, refused string, now time.Time) (tok token, x *exchange, lead bool) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if tok = ts.live[k]; now.Before(tok.until) && tok.value != refused {
		return tok, nil, false
	}
	if x = ts.flights[k]; x != nil {
		return tok, x, false
	}
	x = &exchange{done: make(chan struct{}), abandoned: true}
	ts.flights[k] = x
	return tok, x, true
}

// lead makes the exchange that others wait for, and tells them.
func (u *upstream) lead(ctx context.Context, t *trip, k tokenKey, realm *url.URL, x *exchange) {
	defer u.tokens.settle(k, x, u.now) // a panic leaves it abandoned, not stuck
	x.token, x.err = u.exchange(ctx, t, k, realm)
	x.abandoned = ctx.Err() != nil
}

// settle ends an exchange and keeps its token.
func (ts *tokens) settle(k tokenKey, x *exchange, now func() time.Time) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	delete(ts.flights, k)
	delete(ts.live, k)
	if x.err == nil && now().Before(x.token.until) {
		if len(ts.live) >= maxRemembered {
			maps.DeleteFunc(ts.live, func(_ tokenKey, t token) bool { return !now().Before(t.until) })
		}
		if len(ts.live) >= maxRemembered {
			clear(ts.live)
		}
		ts.live[k] = x.token
	}
	close(x.done)
}

// exchange asks realm for the token k (distribution's token specification).
func (u *upstream) exchange(ctx context.Context, t *trip, k tokenKey, realm *url.URL) (token, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer time.AfterFunc(t.remote.patience(), func() { cancel(errTimeout) }).Stop()
	errand := &trip{
		remote: t.remote, method: http.MethodGet, start: k.url(realm),
		header: http.Header{"Accept": {"application/json"}},
		auth:   k.basic, origin: t.origin,
		// Only a trusted realm is asked with credentials, and the person who
		// configured token_realm knows where it lives.
		inside: t.inside || k.basic != "" || t.remote.names(realm),
	}
	began := u.now()
	resp, err := u.walk(ctx, errand)
	if err != nil {
		return token{}, err
	}
	defer discard(resp)
	switch resp.StatusCode {
	case http.StatusOK:
		return errand.read(resp, began)
	case http.StatusTooManyRequests:
		return token{}, &tokenBusy{resp.Header.Get("Retry-After")}
	case http.StatusUnauthorized, http.StatusForbidden:
		return token{}, errand.problem(errDenied, realm, errCredentials.Error(), errCredentials)
	}
	return token{}, errand.nonsense("status " + strconv.Itoa(resp.StatusCode))
}

// url is realm with k's service and scope in the query.
func (k tokenKey) url(realm *url.URL) *url.URL {
	u, q := *realm, realm.Query()
	for name, value := range map[string]string{"service": k.service, "scope": k.scope} {
		if value != "" {
			q.Set(name, value)
		}
	}
	u.RawQuery = q.Encode()
	return &u
}

// read takes a token out of the token service's answer.
func (t *trip) read(resp *http.Response, began time.Time) (token, error) {
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenBytes))
	if err != nil {
		return token{}, err
	}
	var g grant
	if err := json.Unmarshal(text, &g); err != nil {
		return token{}, t.nonsense("no JSON with a token")
	}
	value := cmp.Or(g.Token, g.AccessToken)
	if value == "" || strings.ContainsFunc(value, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return token{}, t.nonsense("no usable token")
	}
	sent, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		sent = began
	}
	return token{value, began.Add(g.life(sent))}, nil
}

// nonsense is an answer of the token service that is as good as none.
func (t *trip) nonsense(what string) error {
	f := &fault{kind: errUnreachable, reason: what}
	return t.problem(errUnreachable, t.start, "the token service gave no token", f)
}

// grant is the token service's answer.
type grant struct {
	Token       string      `json:"token"`
	AccessToken string      `json:"access_token"` // OAuth's name for the same
	ExpiresIn   json.Number `json:"expires_in"`   // seconds from issued_at
	IssuedAt    any         `json:"issued_at"`    // RFC 3339, if at all
}

// life is how long the token may be used after it was asked for: less a tenth,
// so that it does not run out on its way. A service that caches tokens issued
// this one before it sent it; both times are by its own clock.
func (g grant) life(sent time.Time) time.Duration {
	life := tokenLife
	if s, err := g.ExpiresIn.Float64(); err == nil && s > 0 {
		life = time.Duration(min(s, maxTokenLife.Seconds()) * float64(time.Second))
	}
	issued, _ := g.IssuedAt.(string)
	if at, err := time.Parse(time.RFC3339, issued); err == nil {
		life -= max(0, sent.Sub(at))
	}
	return life - life/10
}

// tokenBusy is a 429 of the token service.
type tokenBusy struct{ retryAfter string }

func (b *tokenBusy) Error() string { return "the token service has too many requests" }

// answer makes of it what the registry would have said.
func (b *tokenBusy) answer(req *http.Request) *http.Response {
	h := http.Header{}
	if b.retryAfter != "" {
		h.Set("Retry-After", b.retryAfter)
	}
	const status = http.StatusTooManyRequests
	return &http.Response{
		Status: strconv.Itoa(status) + " " + http.StatusText(status), StatusCode: status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: h, Body: http.NoBody, Request: req,
	}
}

// challenge is one way to authorize that a WWW-Authenticate header offers.
type challenge struct {
	scheme string            // lower case
	params map[string]string // names in lower case
}

// parseChallenges reads WWW-Authenticate headers (RFC 9110 section 11.6.1). A
// header may hold several challenges, split by the same commas as their
// parameters. What follows a fault is ignored.
func parseChallenges(values []string) []challenge {
	var cs []challenge
	for _, v := range values {
		for p := (cursor{v}); ; {
			c, ok := p.challenge()
			if !ok {
				break
			}
			cs = append(cs, c)
		}
	}
	return cs
}

// cursor is the rest of a header that is being read.
type cursor struct{ s string }

func (p *cursor) challenge() (challenge, bool) {
	p.skip(" \t,")
	c := challenge{scheme: strings.ToLower(p.token()), params: map[string]string{}}
	if c.scheme == "" {
		return c, false
	}
	p.skip(" \t")
	p.skipToken68()
	for {
		name, value, ok := p.param()
		if !ok {
			return c, true
		}
		if _, twice := c.params[name]; !twice {
			c.params[name] = value
		}
	}
}

// param reads name=value. If that is not what follows, nothing is read: a name
// without value is the next challenge's scheme.
func (p *cursor) param() (name, value string, ok bool) {
	before := p.s
	p.skip(" \t,")
	name = strings.ToLower(p.token())
	p.skip(" \t")
	if name != "" && p.eat('=') {
		p.skip(" \t")
		if value, ok = p.value(); ok {
			return name, value, true
		}
		before = "" // an unfinished string: no more of this header
	}
	p.s = before
	return "", "", false
}

// value reads a quoted string, or what stands before a blank or comma: real
// registries leave URLs unquoted.
func (p *cursor) value() (string, bool) {
	if !p.eat('"') {
		return p.take(func(c byte) bool { return !strings.ContainsRune(" \t,\"", rune(c)) }), true
	}
	var b strings.Builder
	for i := 0; i < len(p.s); i++ {
		switch c := p.s[i]; {
		case c == '"':
			p.s = p.s[i+1:]
			return b.String(), true
		case c == '\\' && i+1 < len(p.s):
			i++
			b.WriteByte(p.s[i])
		default:
			b.WriteByte(c)
		}
	}
	return "", false
}

// skipToken68 passes over the other form of credentials ("Negotiate YII=").
func (p *cursor) skipToken68() {
	rest := cursor{p.s}
	word := rest.take(func(c byte) bool { return tokenByte(c) || c == '/' })
	rest.skip("=")
	rest.skip(" \t")
	if word != "" && (rest.s == "" || rest.s[0] == ',') {
		*p = rest
	}
}

func (p *cursor) skip(set string) { p.s = strings.TrimLeft(p.s, set) }

func (p *cursor) eat(c byte) bool {
	if p.s == "" || p.s[0] != c {
		return false
	}
	p.s = p.s[1:]
	return true
}

func (p *cursor) take(of func(byte) bool) string {
	n := 0
	for n < len(p.s) && of(p.s[n]) {
		n++
	}
	word := p.s[:n]
	p.s = p.s[n:]
	return word
}

func (p *cursor) token() string { return p.take(tokenByte) }

// tokenByte is RFC 9110's tchar.
func tokenByte(c byte) bool {
	return c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'z' ||
		strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// retryAfter reads Retry-After, seconds or a date, as a wait from now on.
// Without a usable one it is 0; it is never over maxRetryAfter.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := strings.TrimSpace(h.Get("Retry-After"))
	var d time.Duration
	if s, err := strconv.ParseUint(v, 10, 64); err == nil {
		d = time.Duration(min(s, uint64(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(v); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, 0), maxRetryAfter)
}

// contentRange reads the Content-Range of a 206: "bytes FIRST-LAST/SIZE". size
// is -1 where it is "*". A 416's, which has no range, is not ok.
func contentRange(s string) (first, last, size int64, ok bool) {
	unit, rest, _ := strings.Cut(strings.TrimSpace(s), " ")
	span, total, found := strings.Cut(strings.TrimSpace(rest), "/")
	from, to, dashed := strings.Cut(span, "-")
	if !strings.EqualFold(unit, "bytes") || !found || !dashed {
		return 0, 0, 0, false
	}
	first, ok1 := digits(from)
	last, ok2 := digits(to)
	size, ok3 := digits(total)
	if total == "*" {
		size, ok3 = -1, true
	}
	if !ok1 || !ok2 || !ok3 || last < first || size >= 0 && last >= size {
		return 0, 0, 0, false
	}
	return first, last, size, true
}

// digits reads a number without sign.
func digits(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil
}
