// upstream_hop.go: one exchange with an origin: the requests along its redirects, which
// addresses may be dialled for them, and the body.

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
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// newTransport makes a transport for upstreams that dials public addresses and those of
// the kind reach. roundTrip applies the timeouts of the remote, and the cache limits how
// many requests it sends at once.
func newTransport(reach addressKind) *http.Transport {
	d := &net.Dialer{KeepAlive: 30 * time.Second, ControlContext: reach.refuseOthers}
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         dialWithin(d.DialContext),
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout: maxDialTime,
		DisableCompression:  true, // bodies are stored as the upstream sends them
		ForceAttemptHTTP2:   true, // off by default with a DialContext
		// All requests to a host share one HTTP/2 connection: pings find out that it is dead.
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
		IdleConnTimeout:        90 * time.Second,
		MaxIdleConns:           256,
		ReadBufferSize:         16 << 10,  // a small file comes with its header in one read, not in two of 4 KiB
		MaxIdleConnsPerHost:    32,        // the default of 2 redials all the time during a burst of misses
		MaxResponseHeaderBytes: 256 << 10, // headers are kept in memory and partly in records
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
			if resp.StatusCode != http.StatusOK { // net/http's own error does not tell who has answered
				return newProxyError(resp)
			}
			return nil
		},
	}
}

// dialFunc dials as net.Dialer does.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// dialTimeKey is the key of what a dial may take in the context of a request, whose end
// http.Transport hides from the dial.
type dialTimeKey struct{}

// dialWithin bounds dial. net.Dialer divides the time among the addresses of a name, and
// would try none after one that is silent. roundTrip gives up a second before it, and
// says why.
func dialWithin(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, ctx.Value(dialTimeKey{}).(time.Duration)+time.Second)
		defer cancel()
		return dial(ctx, network, address)
	}
}

// addressKind is the purpose of an address (IANA's registries), and what a redirect may
// lead to beside public addresses.
type addressKind int

const (
	publicAddress    addressKind = iota
	privateAddress               // private, shared by the customers of a carrier, unique local
	loopbackAddress              // this machine's
	linkLocalAddress             // cloud hosts answer there with credentials
	reservedAddress              // this network, protocol assignments, benchmarks, multicast, and what nobody has
	anyAddress                   // no address has this kind: it allows all
)

// specialNetworks are the networks that are not public.
var specialNetworks = map[addressKind][]netip.Prefix{
	privateAddress:   parsePrefixes("10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 fc00::/7"),
	loopbackAddress:  parsePrefixes("127.0.0.0/8 ::1/128"),
	linkLocalAddress: parsePrefixes("169.254.0.0/16 fe80::/10"),
	reservedAddress:  parsePrefixes("0.0.0.0/8 192.0.0.0/24 198.18.0.0/15 224.0.0.0/4 240.0.0.0/4 ::/128 64:ff9b:1::/48 fec0::/10 ff00::/8"),
}

// IPv6 networks with an IPv4 address inside: NAT64 (RFC 6052) and IPv4-compatible, 6to4
// (RFC 3056), Teredo (RFC 4380).
var (
	embeddedLast = parsePrefixes("64:ff9b::/96 ::/96")
	sixToFour    = netip.MustParsePrefix("2002::/16")
	teredo       = netip.MustParsePrefix("2001::/32")
)

func parsePrefixes(s string) (all []netip.Prefix) {
	for p := range strings.FieldsSeq(s) {
		all = append(all, netip.MustParsePrefix(p))
	}
	return all
}

// kindOfAddress returns the kind of a, or of the IPv4 address inside it. What is no
// address counts as public.
func kindOfAddress(a netip.Addr) addressKind {
	a = a.Unmap().WithZone("")
	contains := func(p netip.Prefix) bool { return p.Contains(a) }
	for kind, networks := range specialNetworks {
		if slices.ContainsFunc(networks, contains) {
			return kind
		}
	}
	b := a.As16()
	switch {
	case slices.ContainsFunc(embeddedLast, contains):
		return kindOfAddress(netip.AddrFrom4([4]byte(b[12:])))
	case sixToFour.Contains(a):
		return kindOfAddress(netip.AddrFrom4([4]byte(b[2:])))
	case teredo.Contains(a): // the bits of the client's address are inverted
		return kindOfAddress(netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]}))
	}
	return publicAddress
}

// refuseOthers refuses to dial an address that is neither public nor of the kind reach.
// net.Dialer calls it after the lookup: no name can change its address behind the check.
func (reach addressKind) refuseOthers(_ context.Context, _, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if kind := kindOfAddress(ap.Addr()); err != nil || (kind != publicAddress && kind != reach && reach != anyAddress) {
		return errPrivateAddress
	}
	return nil
}

// exchange is one request to an origin or to its token service, with the requests to
// the targets of its redirects. One goroutine uses it.
type exchange struct {
	upstreamRequest
	start  *url.URL
	auth   string      // docker: Authorization, sent to the scheme, host and port of start only
	index  int         // of the origin it is made for, in remote.origins
	origin *url.URL    // of the same, which may have any address
	reach  addressKind // which other addresses a redirect may lead to: the origin's kind

	anywhere   bool // start may have any address: it is a trusted token service
	redirected bool // a redirect of the origin led to start: it gets no credentials, and its failures say nothing about the remote
}

// joinURL returns the URL base + "/" + wire, whose RawPath net/http sends as it is.
func joinURL(base *url.URL, wire string) (*url.URL, error) {
	path, query, hasQuery := strings.Cut(wire, "?")
	raw := base.EscapedPath() + "/" + path
	plain, err := url.PathUnescape(raw)
	if err != nil {
		return nil, fmt.Errorf("path %q: %w", path, errBadRequest)
	}
	return &url.URL{
		Scheme: base.Scheme, Host: base.Host,
		Path: plain, RawPath: raw,
		RawQuery: query, ForceQuery: hasQuery && query == "",
	}, nil
}

// sendsCredentialsTo reports whether the credentials and headers of r are sent to the
// server of at: one of base_url and the mirrors with auth, whatever a redirect says.
func (r *remote) sendsCredentialsTo(at *url.URL) bool {
	return slices.ContainsFunc(r.origins, func(o origin) bool { return o.auth && sameServer(o.url, at) })
}

// basicAuthorization returns the Authorization header for the credentials of r (RFC
// 7617), or "" without a username.
func (r *remote) basicAuthorization() string {
	if r.username == "" {
		return ""
	}
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(r.username+":"+string(r.password)))
}

// hasServer reports whether the server of at has a base_url or a mirror of c: whoever wrote
// the configuration trusts it.
func (c *config) hasServer(at *url.URL) bool {
	for _, r := range c.remotes {
		if slices.ContainsFunc(r.origins, func(o origin) bool { return sameServer(o.url, at) }) {
			return true
		}
	}
	return false
}

func sameServer(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && sameHost(a, b) && effectivePort(a) == effectivePort(b)
}

// sameHost reports whether a and b have the same host, whatever their ports are. An IPv6
// address has many spellings (RFC 5952 section 2).
func sameHost(a, b *url.URL) bool {
	one, _ := netip.ParseAddr(a.Hostname())
	other, _ := netip.ParseAddr(b.Hostname())
	return strings.EqualFold(a.Hostname(), b.Hostname()) || (one.IsValid() && one == other)
}

// effectivePort returns the port of u, or that of its scheme.
func effectivePort(u *url.URL) string {
	if u.Scheme == "https" {
		return cmp.Or(u.Port(), "443")
	}
	return cmp.Or(u.Port(), "80")
}

// redirectStatuses are those of a redirect with a Location (RFC 9110 section 15.4).
var redirectStatuses = []int{301, 302, 303, 307, 308}

// followRedirects sends x and follows redirects to an answer, or to a redirect that only
// adds a slash to the path. The caller closes its body. http.Client would send
// Authorization to sub-domains and the URL before as Referer, and its errors hold whole
// URLs.
func (u *upstream) followRedirects(ctx context.Context, x *exchange) (*upstreamResponse, error) {
	at := x.start
	for n := 0; ; n++ {
		resp, err := u.roundTrip(ctx, x, at, n == 0 && !x.redirected)
		if err != nil || !slices.Contains(redirectStatuses, resp.StatusCode) {
			return resp, err
		}
		next, reason := resolveLocation(at, resp.Header.Get("Location"))
		if reason == "" && x.addsSlash(next) {
			return resp, nil
		}
		resp.discardBody()
		if reason == "" && at.Scheme == "https" && next.Scheme == "http" && !x.digestKnown {
			reason = "a redirect from https to http"
		}
		if n == maxRedirects {
			reason = "redirect loop"
		}
		if reason != "" {
			return nil, x.newUnusableError(at, reason)
		}
		at = next
	}
}

// addsSlash reports whether a redirect to next says that x.start is a folder: clients must
// know, to resolve the links in a listing. Behind a server that ends TLS such a redirect
// often has the wrong scheme or port.
func (x *exchange) addsSlash(next *url.URL) bool {
	return x.remote.packageType != "docker" && sameHost(next, x.start) && next.Path == x.start.Path+"/" &&
		!strings.HasSuffix(x.start.Path, "/") && (next.RawQuery == "" || next.RawQuery == x.start.RawQuery)
}

// resolveLocation returns the URL that a Location header at the URL at leads to. reason
// says why the redirect is refused, without the location: its query may be a signature.
func resolveLocation(at *url.URL, location string) (next *url.URL, reason string) {
	if location == "" {
		return nil, "a redirect without Location"
	}
	next, err := at.Parse(location)
	switch {
	case err != nil:
		return nil, "a redirect with a malformed Location"
	case (next.Scheme != "http" && next.Scheme != "https") || next.Host == "":
		return nil, "a redirect to a URL that is neither http nor https, or without a host"
	}
	next.Fragment, next.RawFragment, next.User = "", "", nil
	next.RawQuery = strings.ReplaceAll(next.RawQuery, " ", "%20") // a blank would end the target in the request line
	return next, ""
}

// roundTrip sends one request of x to at. first: at is not the target of a redirect. The
// remote's timeout covers everything up to the response header. The caller closes the body.
func (u *upstream) roundTrip(ctx context.Context, x *exchange, at *url.URL, first bool) (*upstreamResponse, error) {
	if x.remote.sealed { // all requests are sent here: to a mirror, along a redirect, for a token too
		return nil, x.remote.newSealedError()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	name, began := x.remote.name, u.now()
	var connected atomic.Pointer[netip.AddrPort] // where the connection goes; a goroutine of the transport may store it
	dialing := time.AfterFunc(x.dialTime, func() { cancel(errTimeout) })
	defer dialing.Stop()
	trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		dialing.Stop()
		addr, _ := netip.ParseAddrPort(i.Conn.RemoteAddr().String())
		connected.Store(&addr)
	}}
	req := x.newRequest(httptrace.WithClientTrace(context.WithValue(ctx, dialTimeKey{}, x.dialTime), trace), at, u)
	// A proxy looks up and dials the address itself, and we cannot check it.
	proxy, err := u.proxyFor(req)
	proxied := err == nil && proxy != nil
	reach := x.reach
	if proxied || x.remote.config.hasServer(at) || (x.anywhere && sameServer(at, x.start)) {
		reach = anyAddress
	}
	timer := time.AfterFunc(x.remote.timeout, func() { cancel(errTimeout) })
	resp, err := u.transports[reach].RoundTrip(req)
	u.metrics.countUpstreamRequest(name, u.now().Sub(began))
	if !timer.Stop() && err == nil { // the header came just after the timeout, which ended the body
		resp.Body.Close()
		err = errTimeout
	}
	if err == nil && proxied && at.Scheme == "http" && (isGatewayError(resp.StatusCode) || resp.StatusCode == http.StatusProxyAuthRequired) {
		resp.Body.Close() // it may be the proxy's own, which cannot be told from the origin's
		err = newProxyError(resp)
	}
	if err != nil {
		explained := x.explainFailure(ctx, at, err)
		if failure, ok := errors.AsType[*transportError](explained); ok && first {
			// Silence or a reset means little if the remote answered another request
			// meanwhile; nor just before, if the path is one that may never answer. A
			// failure of dial, DNS or TLS always counts.
			failure.since = began
			if connected.Load() == nil && failure.kind == errUnreachable && !isStaleConn(err) {
				failure.since = u.now()
			} else if !x.hasCopy && sameServer(at, x.origin) { // a registry answers just before its token service is asked
				failure.since = began.Add(-outagePause)
			}
		}
		cancel(nil)
		return nil, explained
	}
	if !x.isChallenge(resp) {
		u.endOutage(x.remote)
	}
	if a := connected.Load(); first && sameServer(at, x.origin) && !proxied && a != nil {
		x.reach = max(x.reach, u.kindOf(a.Addr())) // a name of the origin's that leads into a private network itself
	}
	resp.Request = req
	resp.Body = &upstreamBody{ReadCloser: resp.Body, u: u, ctx: ctx, cancel: cancel, idle: timer, remote: name, host: at.Host}
	return &upstreamResponse{resp, x.index}, nil
}

// newProxyError makes the error for an answer by which a proxy says that it has no other.
func newProxyError(resp *http.Response) error {
	if resp.StatusCode == http.StatusProxyAuthRequired {
		return fmt.Errorf("the proxy answered %s: check the user and the password in HTTP_PROXY and HTTPS_PROXY", resp.Status)
	}
	return fmt.Errorf("the proxy, or the server behind it, answered %s", resp.Status)
}

// isChallenge reports whether a registry wants a token. That does not end an outage: the
// token service, which may be away, has to answer too.
func (x *exchange) isChallenge(resp *http.Response) bool {
	return x.remote.packageType == "docker" && resp.StatusCode == http.StatusUnauthorized &&
		strings.Contains(strings.ToLower(strings.Join(resp.Header.Values("WWW-Authenticate"), ",")), "bearer")
}

// endOutage ends a remote's outage, if there is one: it has answered.
func (u *upstream) endOutage(r *remote) {
	if lasted, recovered := u.circuitOf(r.name).succeed(); recovered {
		u.log.Info("a remote can be reached again", "remote", r.name, "after", lasted.Round(time.Second).String())
	}
}

// newSealedError makes the answer for a file that a sealed remote has not stored.
func (r *remote) newSealedError() error {
	return &problem{status: http.StatusNotFound, cause: errSealed,
		detail: fmt.Sprintf("remote %q is sealed and has no copy of this: it asks no upstream, and lists what is missing at /missed", r.name)}
}

// newRequest makes the request to at. Our own headers replace configured ones: the answer
// could not be used otherwise.
func (x *exchange) newRequest(ctx context.Context, at *url.URL, u *upstream) *http.Request {
	h := http.Header{"User-Agent": {"artifactapi/" + u.version}}
	req := &http.Request{
		Method: x.method, URL: at, Host: at.Host, Header: h,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	if x.remote.sendsCredentialsTo(at) {
		maps.Copy(h, x.remote.headers)
		if basic := x.remote.basicAuthorization(); basic != "" && x.remote.packageType != "docker" {
			h["Authorization"] = []string{basic}
		}
	}
	maps.Copy(h, x.header)
	h["Accept-Encoding"] = []string{"identity"}
	h["Via"] = []string{u.via}
	if passed := x.header.Get("Via"); passed != "" {
		h["Via"][0] = passed + ", " + u.via
	}
	if x.auth != "" && sameServer(at, x.start) {
		h["Authorization"] = []string{x.auth}
	}
	return req.WithContext(ctx)
}

// transportError says how a request failed. Its text is net/http's, which holds no URL.
type transportError struct {
	kind   error
	reason string
	since  time.Time // it is an outage unless the remote has answered after that; zero: it never is
}

func (e *transportError) Error() string { return e.reason }

func (e *transportError) Unwrap() error { return e.kind }

// newTransportError makes the error for a request or a body that failed with err. It is
// nil if ctx, the request's, was ended from outside. An answer that is not HTTP counts
// as unreachable: a captive portal says nothing about the file. err itself is not wrapped:
// a context error in it may not be the client's.
func newTransportError(ctx context.Context, err error) *transportError {
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errTimeout), errors.Is(err, errTimeout):
		return &transportError{kind: errTimeout, reason: "nothing arrived in time"}
	case cause != nil:
		return nil
	}
	return &transportError{kind: errUnreachable, reason: clipText(err.Error())}
}

// explainFailure makes the error for a request to at that failed with err; ctx is its own.
func (x *exchange) explainFailure(ctx context.Context, at *url.URL, err error) error {
	if errors.Is(err, errPrivateAddress) {
		return x.newUnusableError(at, fmt.Sprintf("%v; if it may, add a remote with base_url: %s://%s", errPrivateAddress, at.Scheme, at.Host))
	}
	if failure := newTransportError(ctx, err); failure != nil {
		return x.newExchangeProblem(failure.kind, at, failure.kind.Error(), failure)
	}
	return ctx.Err()
}

// newUnusableError makes the error for an answer from at that cannot be used.
func (x *exchange) newUnusableError(at *url.URL, reason string) error {
	return x.newExchangeProblem(errBadUpstream, at, reason, errBadUpstream)
}

// newExchangeProblem makes a problem with the status of kind. cause is only logged.
func (x *exchange) newExchangeProblem(kind error, at *url.URL, text string, cause error) error {
	host := at.Host
	if i := slices.IndexFunc(x.remote.origins, func(o origin) bool { return sameServer(o.url, at) }); i >= 0 {
		host = x.remote.shownHost(i)
	}
	status, _ := statusAndDetail(kind)
	return &problem{status: status, cause: cause, detail: fmt.Sprintf("remote %q: %s: %s", x.remote.name, clipText(host), clipText(text))}
}

// clipText cuts a text of an upstream or a library.
func clipText(s string) string { return fmt.Sprintf("%.*s", maxErrorText, s) }

// upstreamBody ends its request if no byte arrives for bodyIdleTimeout during Read: a slow
// reader does not make a silent upstream. One goroutine uses it.
type upstreamBody struct {
	io.ReadCloser
	u            *upstream
	ctx          context.Context         // of the request
	cancel       context.CancelCauseFunc // ends ctx, or that of the attempt, from which ctx comes
	idle         *time.Timer             // cancels ctx with errTimeout
	remote, host string                  // for counters and errors
}

// Read reads and counts bytes. Its error wraps errTimeout or errUnreachable, as if there
// had been no answer, or is the context's.
func (b *upstreamBody) Read(p []byte) (int, error) {
	b.idle.Reset(bodyIdleTimeout)
	n, err := b.ReadCloser.Read(p)
	b.idle.Stop()
	b.u.metrics.countFetchedBytes(b.remote, int64(n))
	if err == nil || err == io.EOF {
		return n, err
	}
	failure := newTransportError(b.ctx, err)
	if failure == nil {
		return n, b.ctx.Err()
	}
	b.u.metrics.countUpstreamError(b.remote, "broken")
	return n, fmt.Errorf("remote %q: reading from %s: %w", b.remote, b.host, failure)
}

func (b *upstreamBody) Close() error {
	defer b.cancel(nil)
	b.idle.Stop()
	return b.ReadCloser.Close()
}
