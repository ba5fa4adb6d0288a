// upstream_hop.go: one way to an answer: the requests along redirects, who may be
// dialled for them, and the body that ends when nothing arrives.

package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// newTransport makes a transport for upstreams. The strict one dials public
// addresses only. Neither has timeouts of its own that matter, since remotes
// differ: hop has them. How many connections there are is bounded by how many
// questions the cache asks at once.
func newTransport(strict bool) *http.Transport {
	d := &net.Dialer{Timeout: maxDialTime, KeepAlive: 30 * time.Second}
	if strict {
		d.ControlContext = refusePrivate
	}
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            d.DialContext,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    maxDialTime,
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
	if err != nil || isPrivateAddress(ap.Addr()) {
		return errPrivateAddress
	}
	return nil
}

// isPrivateAddress reports whether a names this machine or its neighbourhood.
func isPrivateAddress(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsLoopback() || a.IsPrivate() || a.IsUnspecified() ||
		a.IsLinkLocalUnicast() || a.IsLinkLocalMulticast() || a.IsInterfaceLocalMulticast()
}

// exchange is one way to an answer: a URL and the redirects behind it.
type exchange struct {
	remote         *remote
	method         string
	start          *url.URL
	header         http.Header // ours: goes everywhere
	auth           string      // docker's Authorization: goes to start's scheme, host and port alone
	origin         *url.URL    // the origin it is made for, whose host may be anywhere
	mayDialPrivate bool        // private addresses may be dialled for other hosts too
}

// newExchange makes the trip to wire below r's origin i.
func newExchange(req upstreamRequest, i int) (*exchange, error) {
	o := req.remote.origins[i].url
	start, err := joinURL(o, req.wire)
	if err != nil {
		return nil, err
	}
	return &exchange{remote: req.remote, method: req.method, start: start, header: req.header, origin: o}, nil
}

// joinURL is base + "/" + wire with exactly those bytes on the wire.
func joinURL(base *url.URL, wire string) (*url.URL, error) {
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

// sendsCredentialsTo reports whether r's credentials and headers may go to at.
func (r *remote) sendsCredentialsTo(at *url.URL) bool {
	for i, o := range r.origins {
		if (i == 0 || o.auth) && sameServer(o.url, at) {
			return true
		}
	}
	return false
}

// basicAuthorization is the Authorization that r's credentials make, or "".
func (r *remote) basicAuthorization() string {
	if r.username == "" {
		return ""
	}
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(r.username+":"+string(r.password)))
}

// sameServer reports whether a and b have one scheme, host and port.
func sameServer(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && sameHost(a, b) && effectivePort(a) == effectivePort(b)
}

func sameHost(a, b *url.URL) bool { return strings.EqualFold(a.Hostname(), b.Hostname()) }

func effectivePort(u *url.URL) string {
	if u.Scheme == "https" {
		return cmp.Or(u.Port(), "443")
	}
	return cmp.Or(u.Port(), "80")
}

// followRedirects goes from t.start along redirects to an answer. It does by hand what
// http.Client would: that one keeps Authorization on sub-domains, adds Referer,
// and puts whole URLs into errors.
func (u *upstream) followRedirects(ctx context.Context, x *exchange) (*http.Response, error) {
	at := x.start
	for n := 0; ; n++ {
		resp, err := u.roundTrip(ctx, x, at, n == 0)
		if err != nil || !isRedirect(resp.StatusCode) {
			return resp, err
		}
		next, reason := resolveLocation(at, resp.Header.Get("Location"))
		discardResponse(resp)
		if n == maxRedirects {
			reason = "redirect loop"
		}
		if reason != "" {
			return nil, x.newUnusableError(at, reason)
		}
		at = next
	}
}

func isRedirect(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// resolveLocation resolves a Location, or says why it is refused. The reason never
// holds the location, whose query may be a signature.
func resolveLocation(at *url.URL, location string) (next *url.URL, reason string) {
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

// roundTrip makes one request. The remote's timeout covers all up to the response
// header; then the body watches itself.
func (u *upstream) roundTrip(ctx context.Context, x *exchange, at *url.URL, first bool) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	name := x.remote.name
	answers := u.breaker.answers(name)
	var c connectionTrace
	req := x.newRequest(c.withTrace(ctx), at, u.version)
	proxied := u.usesProxy(req)
	timer := time.AfterFunc(x.remote.headerTimeout(), func() { cancel(errTimeout) })
	resp, err := u.chooseTransport(x, at, proxied).RoundTrip(req)
	if !timer.Stop() && err == nil { // too late by a hair: the body is cut off already
		resp.Body.Close()
		err = errTimeout
	}
	if err != nil {
		err = x.explainFailure(ctx, at, err)
		var e *transportError
		if errors.As(err, &e) {
			e.countsAsDown = first && (c.neverConnected(e) || answers == u.breaker.answers(name))
		}
		cancel(nil)
		return nil, err
	}
	u.breaker.answered(name)
	if sameHost(at, x.origin) && !proxied && c.wentTo(u.isPrivate) {
		x.mayDialPrivate = true
	}
	resp.Request = req
	resp.Body = u.newUpstreamBody(ctx, cancel, name, at.Host, resp.Body)
	return resp, nil
}

// newRequest builds the request for one hop. Nothing of a client's request is in
// it but what the question took over. What is ours wins over configured
// headers where an answer would be unusable otherwise.
func (x *exchange) newRequest(ctx context.Context, at *url.URL, version string) *http.Request {
	h := http.Header{"User-Agent": {"artifactapi/" + version}}
	req := &http.Request{
		Method: x.method, URL: at, Host: at.Host, Header: h,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	if x.remote.sendsCredentialsTo(at) {
		maps.Copy(h, x.remote.headers)
		req.Host = cmp.Or(h.Get("Host"), at.Host)
		if basic := x.remote.basicAuthorization(); basic != "" && x.remote.packageType != "docker" {
			h["Authorization"] = []string{basic}
		}
	}
	maps.Copy(h, x.header)
	h["Accept-Encoding"] = []string{"identity"}
	if x.auth != "" && sameServer(at, x.start) {
		h["Authorization"] = []string{x.auth}
	}
	return req.WithContext(ctx)
}

// usesProxy reports whether a proxy dials for req: then addresses are its matter.
func (u *upstream) usesProxy(req *http.Request) bool {
	p, err := u.proxyFor(req)
	return err == nil && p != nil
}

// chooseTransport picks who dials for a hop to at. An upstream may not point us at
// our own neighbourhood, unless it lives there itself.
func (u *upstream) chooseTransport(x *exchange, at *url.URL, proxied bool) http.RoundTripper {
	if proxied || x.mayDialPrivate || sameHost(at, x.origin) || u.hasPrivateAddress(x.origin) {
		return u.transport
	}
	return u.publicTransport
}

// hasPrivateAddress reports whether at's host is written as a private address: known
// even where a proxy dials.
func (u *upstream) hasPrivateAddress(at *url.URL) bool {
	a, err := netip.ParseAddr(at.Hostname())
	return err == nil && u.isPrivate(a)
}

// connectionTrace is what the transport told about the connection of one hop.
type connectionTrace struct {
	addr atomic.Value // net.Addr as a string; unset: there was none
}

func (c *connectionTrace) withTrace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) { c.addr.Store(i.Conn.RemoteAddr().String()) },
	})
}

// wentTo reports whether the connection went to a private address.
func (c *connectionTrace) wentTo(private func(netip.Addr) bool) bool {
	s, _ := c.addr.Load().(string)
	ap, err := netip.ParseAddrPort(s)
	return err == nil && private(ap.Addr())
}

// neverConnected reports whether dial, DNS or TLS failed outright: no connection came
// about, and it was neither silence nor a reset that ended it.
func (c *connectionTrace) neverConnected(e *transportError) bool {
	return c.addr.Load() == nil && e.kind == errUnreachable && !e.reset
}

// transportError is how a hop failed. It is one of the error kinds, and its text is the
// library's, which holds hosts and addresses but no URL.
type transportError struct {
	kind         error
	reason       string
	reset        bool // cut by the other side
	countsAsDown bool // counts for the breaker
}

func (e *transportError) Error() string { return e.reason }

func (e *transportError) Unwrap() error { return e.kind }

// countsAsDown reports whether err, an origin's failure, counts for the breaker.
func countsAsDown(err error) bool {
	var e *transportError
	return errors.As(err, &e) && e.countsAsDown
}

// explainFailure says what err, the transport's, means for a hop to at under ctx. An
// answer that is no HTTP counts as unreachable: a captive portal or a wrong
// port is no verdict about a file. err itself is not wrapped, so that a
// context error inside of it is not taken for the client's.
func (x *exchange) explainFailure(ctx context.Context, at *url.URL, err error) error {
	e := &transportError{kind: errUnreachable, reason: clipText(err.Error()), reset: isReset(err)}
	switch cause := context.Cause(ctx); {
	case errors.Is(err, errPrivateAddress):
		return x.newUnusableError(at, errPrivateAddress.Error())
	case errors.Is(cause, errTimeout), errors.Is(err, errTimeout):
		e.kind, e.reason = errTimeout, "no answer in time"
	case cause != nil:
		return ctx.Err()
	}
	return x.newExchangeProblem(e.kind, at, e.kind.Error(), e)
}

// newUnusableError makes the error for an answer that cannot be used.
func (x *exchange) newUnusableError(at *url.URL, reason string) error {
	return x.newExchangeProblem(errBadUpstream, at, reason, errBadUpstream)
}

func (x *exchange) newExchangeProblem(kind error, at *url.URL, text string, cause error) error {
	p := newProblem(statusOf(kind), "remote %q: %s: %s", x.remote.name, clipText(at.Host), clipText(text))
	p.cause = cause
	return p
}

// clipText bounds a foreign text.
func clipText(s string) string {
	if len(s) > maxErrorText {
		return strings.ToValidUTF8(s[:maxErrorText], "") + "..."
	}
	return s
}

// isReset reports whether the other side ended the connection.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// upstreamBody is a response body that ends its request when nothing arrives for
// bodyIdleTimeout. The clock runs during Read alone: a slow reader is not a silent
// upstream.
type upstreamBody struct {
	io.ReadCloser
	u            *upstream
	ctx          context.Context
	cancel       context.CancelCauseFunc
	release      context.CancelCauseFunc // of the attempt's context; may be nil
	idle         *time.Timer
	remote, host string
}

func (u *upstream) newUpstreamBody(ctx context.Context, cancel context.CancelCauseFunc, remote, host string, rc io.ReadCloser) *upstreamBody {
	idle := time.AfterFunc(bodyIdleTimeout, func() { cancel(errTimeout) })
	idle.Stop()
	return &upstreamBody{ReadCloser: rc, u: u, ctx: ctx, cancel: cancel, idle: idle, remote: remote, host: host}
}

func (b *upstreamBody) Read(p []byte) (int, error) {
	b.idle.Reset(bodyIdleTimeout)
	n, err := b.ReadCloser.Read(p)
	b.idle.Stop()
	b.u.metrics.countFetchedBytes(b.remote, int64(n))
	if err == nil || err == io.EOF {
		return n, err
	}
	return n, b.explainReadError(err)
}

// explainReadError says what a broken Read means. A body that breaks is no answer, so
// its error is of no other kind than errTimeout, errUnreachable or the
// context's.
func (b *upstreamBody) explainReadError(err error) error {
	kind, reason := errUnreachable, clipText(err.Error())
	switch cause := context.Cause(b.ctx); {
	case errors.Is(cause, errTimeout):
		kind, reason = errTimeout, "no byte in time"
	case cause != nil:
		return b.ctx.Err()
	}
	b.u.metrics.countUpstreamError(b.remote, "broken")
	return fmt.Errorf("remote %q: reading from %s: %w", b.remote, b.host, &transportError{kind: kind, reason: reason})
}

// Close releases all that the request held.
func (b *upstreamBody) Close() error {
	err := b.ReadCloser.Close()
	b.idle.Stop()
	b.cancel(nil)
	if b.release != nil {
		b.release(nil)
	}
	return err
}

// drainRest reads the rest of b if it is short and there.
func (b *upstreamBody) drainRest() {
	b.idle.Reset(drainTime)
	io.CopyN(io.Discard, b.ReadCloser, drainBytes)
	b.idle.Stop()
}

// discardResponse drains resp a little, so that its connection can be used again, and
// closes it.
func discardResponse(resp *http.Response) {
	if b, ok := resp.Body.(*upstreamBody); ok && resp.ContentLength <= drainBytes {
		b.drainRest()
	}
	resp.Body.Close()
}
