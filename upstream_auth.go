// upstream_auth.go: authorization at container registries: challenges, the token
// exchange, and who may have the credentials.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// sendAuthorized asks origin i with what authorization it wants. A registry says
// so in a 401; what it said is remembered, and so are the tokens.
func (u *upstream) sendAuthorized(ctx context.Context, req upstreamRequest, i int) (*http.Response, error) {
	x, err := newExchange(req, i)
	if err != nil {
		return nil, err
	}
	if req.remote.packageType != "docker" {
		return u.followRedirects(ctx, x)
	}
	x.auth = u.tokens.cachedAuthorization(x.registryKeyOf(), req.scope, u.now())
	for last, n := false, 0; ; n++ {
		resp, err := u.followRedirects(ctx, x)
		// A 401 from elsewhere is blob storage's: its realm is not the registry's.
		if err != nil || last || n == 2 || resp.StatusCode != http.StatusUnauthorized || !sameServer(resp.Request.URL, x.origin) {
			return resp, err
		}
		auth, fresh, err := u.chooseAuthorization(ctx, x, req.scope, resp.Header.Values("WWW-Authenticate"))
		if err == nil && auth == "" {
			return resp, nil
		}
		discardResponse(resp)
		if busy, ok := errors.AsType[*tokenServiceBusy](err); ok {
			return busy.asResponse(resp.Request), nil
		}
		if err != nil {
			return nil, err
		}
		x.auth, last = auth, fresh
	}
}

// chooseAuthorization finds the Authorization that challenges ask for, "" when there is
// none that was not just refused. It is fresh unless an earlier request used
// it already: then one more try is worth while.
func (u *upstream) chooseAuthorization(ctx context.Context, x *exchange, scope string, challenges []string) (auth string, fresh bool, err error) {
	k := x.registryKeyOf()
	c, ok := chooseChallenge(parseChallenges(challenges))
	switch {
	case !ok, c.scheme == "basic" && x.auth == k.basic:
		return "", true, nil
	case c.scheme == "basic":
		u.tokens.rememberChallenge(k, c)
		return k.basic, true, nil
	}
	realm, err := x.parseRealm(c.params["realm"], k.basic != "")
	if err != nil {
		return "", true, err
	}
	value, fresh, err := u.fetchToken(ctx, x, k.tokenKeyFor(c, scope), realm, strings.TrimPrefix(x.auth, "Bearer "))
	if err != nil {
		return "", true, err
	}
	u.tokens.rememberChallenge(k, c)
	return "Bearer " + value, fresh, nil
}

// chooseChallenge chooses a challenge that we can meet: a token is worth more than a
// password.
func chooseChallenge(cs []authChallenge) (authChallenge, bool) {
	for _, scheme := range []string{"bearer", "basic"} {
		for _, c := range cs {
			if c.scheme == scheme && (scheme == "basic" || c.params["realm"] != "") {
				return c, true
			}
		}
	}
	return authChallenge{}, false
}

// registryKey is one registry as one user. A changed password is another user.
type registryKey struct{ remote, place, basic string }

// tokenKey is one token. Credentials are part of it so that a mirror without
// auth cannot name base_url's realm and be sent a token they bought.
type tokenKey struct{ remote, realm, service, scope, basic string }

func (x *exchange) registryKeyOf() registryKey {
	k := registryKey{remote: x.remote.name, place: x.origin.Scheme + "://" + x.origin.Host}
	if x.remote.sendsCredentialsTo(x.origin) {
		k.basic = x.remote.basicAuthorization()
	}
	return k
}

func (k registryKey) tokenKeyFor(c authChallenge, scope string) tokenKey {
	return tokenKey{k.remote, c.params["realm"], c.params["service"], scope, k.basic}
}

// parseRealm reads the token service's URL and refuses one that may not have the
// credentials, if there are any.
func (x *exchange) parseRealm(s string, credentials bool) (*url.URL, error) {
	realm, err := url.Parse(s)
	if err != nil || realm.Host == "" || (realm.Scheme != "https" && realm.Scheme != "http") {
		return nil, x.newUnusableError(x.origin, "its token realm is no URL")
	}
	realm.User, realm.Fragment = nil, ""
	if credentials && !x.remote.trustsRealm(realm) {
		return nil, x.newUnusableError(x.origin, fmt.Sprintf(
			"its realm may not have the credentials; if it should, set token_realm: %s://%s%s",
			realm.Scheme, realm.Host, realm.EscapedPath()))
	}
	return realm, nil
}

// trustsRealm reports whether the credentials may go to realm (SPEC.md section 6).
func (r *remote) trustsRealm(realm *url.URL) bool {
	if r.isTokenRealm(realm) {
		return true
	}
	for i, o := range r.origins {
		if (i == 0 || o.auth) && (realm.Scheme == "https" || realm.Scheme == o.url.Scheme) &&
			sharesDomain(lowerHost(o.url), lowerHost(realm)) {
			return true
		}
	}
	return false
}

// isTokenRealm reports whether realm is the configured token_realm.
func (r *remote) isTokenRealm(realm *url.URL) bool {
	return r.tokenRealm != nil && sameServer(r.tokenRealm, realm) &&
		cmp.Or(r.tokenRealm.EscapedPath(), "/") == cmp.Or(realm.EscapedPath(), "/")
}

func lowerHost(u *url.URL) string { return strings.TrimSuffix(strings.ToLower(u.Hostname()), ".") }

// sharesDomain reports whether realm is registry's host, or equals or lies under
// that host less its first label, as auth.docker.io does for
// registry-1.docker.io. Where anyone may register that rest, it proves nothing.
func sharesDomain(registry, realm string) bool {
	if registry == realm {
		return true
	}
	for _, host := range []string{registry, realm} {
		if _, err := netip.ParseAddr(host); err == nil {
			return false
		}
	}
	_, parent, _ := strings.Cut(registry, ".")
	if !strings.Contains(parent, ".") || isPublicSuffix(parent) {
		return false
	}
	return realm == parent || strings.HasSuffix(realm, "."+parent)
}

// isPublicSuffix knows the usual names of two labels under which anyone can have
// a name. Too many here costs a token_realm line, too few a password.
func isPublicSuffix(host string) bool {
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

// tokenCache remembers what registries asked for and what token services gave.
type tokenCache struct {
	mu         sync.Mutex // guards the maps; never held while asking
	valid      map[tokenKey]bearerToken
	pending    map[tokenKey]*tokenRequest
	challenges map[registryKey]authChallenge
}

type bearerToken struct {
	value string
	until time.Time
}

// tokenRequest is a request for a token that others wait for. Its fields are
// written before done is closed.
type tokenRequest struct {
	done      chan struct{}
	token     bearerToken
	err       error
	abandoned bool // its asker's context ended: the next one asks
}

// cachedAuthorization is the Authorization that a registry is likely to want; "" when a
// challenge has to tell.
func (ts *tokenCache) cachedAuthorization(k registryKey, scope string, now time.Time) string {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	c := ts.challenges[k]
	if c.scheme == "basic" {
		return k.basic
	}
	if tok := ts.valid[k.tokenKeyFor(c, scope)]; now.Before(tok.until) {
		return "Bearer " + tok.value
	}
	return ""
}

func (ts *tokenCache) rememberChallenge(k registryKey, c authChallenge) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if len(ts.challenges) >= maxRemembered {
		clear(ts.challenges)
	}
	ts.challenges[k] = c
}

// fetchToken gets a token for k that is not the refused one. However many want it,
// one asks; they share its outcome, unless it was only that asker who gave up.
func (u *upstream) fetchToken(ctx context.Context, x *exchange, k tokenKey, realm *url.URL, refused string) (value string, fresh bool, err error) {
	for {
		tok, pending, lead := u.tokens.claimToken(k, refused, u.now())
		if pending == nil {
			return tok.value, false, nil
		}
		if lead {
			u.runTokenRequest(ctx, x, k, realm, pending)
			return pending.token.value, true, pending.err
		}
		select {
		case <-pending.done:
		case <-ctx.Done():
			return "", true, x.explainFailure(ctx, realm, ctx.Err())
		}
		if !pending.abandoned {
			return pending.token.value, true, pending.err
		}
	}
}

// claimToken finds a live token, or the exchange that will bring one; lead tells the
// caller to make it.
func (ts *tokenCache) claimToken(k tokenKey, refused string, now time.Time) (tok bearerToken, pending *tokenRequest, lead bool) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if tok = ts.valid[k]; now.Before(tok.until) && tok.value != refused {
		return tok, nil, false
	}
	if pending = ts.pending[k]; pending != nil {
		return tok, pending, false
	}
	pending = &tokenRequest{done: make(chan struct{}), abandoned: true}
	ts.pending[k] = pending
	return tok, pending, true
}

// runTokenRequest makes the exchange that others wait for, and tells them.
func (u *upstream) runTokenRequest(ctx context.Context, x *exchange, k tokenKey, realm *url.URL, pending *tokenRequest) {
	defer u.tokens.finishTokenRequest(k, pending, u.now) // a panic leaves it abandoned, not stuck
	pending.token, pending.err = u.requestToken(ctx, x, k, realm)
	pending.abandoned = ctx.Err() != nil
}

// finishTokenRequest ends an exchange and keeps its token.
func (ts *tokenCache) finishTokenRequest(k tokenKey, pending *tokenRequest, now func() time.Time) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	delete(ts.pending, k)
	delete(ts.valid, k)
	if pending.err == nil && now().Before(pending.token.until) {
		if len(ts.valid) >= maxRemembered {
			maps.DeleteFunc(ts.valid, func(_ tokenKey, t bearerToken) bool { return !now().Before(t.until) })
		}
		if len(ts.valid) >= maxRemembered {
			clear(ts.valid)
		}
		ts.valid[k] = pending.token
	}
	close(pending.done)
}

// requestToken asks realm for the token k (distribution's token specification).
func (u *upstream) requestToken(ctx context.Context, x *exchange, k tokenKey, realm *url.URL) (bearerToken, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer time.AfterFunc(x.remote.headerTimeout(), func() { cancel(errTimeout) }).Stop()
	errand := &exchange{
		remote: x.remote, method: http.MethodGet, start: k.tokenURL(realm),
		header: http.Header{"Accept": {"application/json"}},
		auth:   k.basic, origin: x.origin,
		// Only a trusted realm is asked with credentials, and the person who
		// configured token_realm knows where it lives.
		mayDialPrivate: x.mayDialPrivate || k.basic != "" || x.remote.isTokenRealm(realm),
	}
	began := u.now()
	resp, err := u.followRedirects(ctx, errand)
	if err != nil {
		return bearerToken{}, err
	}
	defer discardResponse(resp)
	switch resp.StatusCode {
	case http.StatusOK:
		return errand.readTokenResponse(resp, began)
	case http.StatusTooManyRequests:
		return bearerToken{}, &tokenServiceBusy{resp.Header.Get("Retry-After")}
	case http.StatusUnauthorized, http.StatusForbidden:
		return bearerToken{}, errand.newExchangeProblem(errDenied, realm, errCredentials.Error(), errCredentials)
	}
	return bearerToken{}, errand.newTokenError("status " + strconv.Itoa(resp.StatusCode))
}

// tokenURL is realm with k's service and scope in the query.
func (k tokenKey) tokenURL(realm *url.URL) *url.URL {
	u, q := *realm, realm.Query()
	for name, value := range map[string]string{"service": k.service, "scope": k.scope} {
		if value != "" {
			q.Set(name, value)
		}
	}
	u.RawQuery = q.Encode()
	return &u
}

// readTokenResponse takes a token out of the token service's answer.
func (x *exchange) readTokenResponse(resp *http.Response, began time.Time) (bearerToken, error) {
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenBytes))
	if err != nil {
		return bearerToken{}, err
	}
	var g tokenResponse
	if err := json.Unmarshal(text, &g); err != nil {
		return bearerToken{}, x.newTokenError("no JSON with a token")
	}
	value := cmp.Or(g.Token, g.AccessToken)
	if value == "" || strings.ContainsFunc(value, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return bearerToken{}, x.newTokenError("no usable token")
	}
	sent, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		sent = began
	}
	return bearerToken{value, began.Add(g.lifetime(sent))}, nil
}

// newTokenError is an answer of the token service that is as good as none.
func (x *exchange) newTokenError(what string) error {
	e := &transportError{kind: errUnreachable, reason: what}
	return x.newExchangeProblem(errUnreachable, x.start, "the token service gave no token", e)
}

// tokenResponse is the token service's answer.
type tokenResponse struct {
	Token       string      `json:"token"`
	AccessToken string      `json:"access_token"` // OAuth's name for the same
	ExpiresIn   json.Number `json:"expires_in"`   // seconds from issued_at
	IssuedAt    any         `json:"issued_at"`    // RFC 3339, if at all
}

// lifetime is how long the token may be used after it was asked for: less a tenth,
// so that it does not run out on its way. A service that caches tokens issued
// this one before it sent it; both times are by its own clock.
func (g tokenResponse) lifetime(sent time.Time) time.Duration {
	life := defaultTokenLife
	if s, err := g.ExpiresIn.Float64(); err == nil && s > 0 {
		life = time.Duration(min(s, maxTokenLife.Seconds()) * float64(time.Second))
	}
	issued, _ := g.IssuedAt.(string)
	if at, err := time.Parse(time.RFC3339, issued); err == nil {
		life -= max(0, sent.Sub(at))
	}
	return life - life/10
}

// tokenServiceBusy is a 429 of the token service.
type tokenServiceBusy struct{ retryAfter string }

func (b *tokenServiceBusy) Error() string { return "the token service has too many requests" }

// asResponse makes of it what the registry would have said.
func (b *tokenServiceBusy) asResponse(req *http.Request) *http.Response {
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

// authChallenge is one way to authorize that a WWW-Authenticate header offers.
type authChallenge struct {
	scheme string            // lower case
	params map[string]string // names in lower case
}

// parseChallenges reads WWW-Authenticate headers (RFC 9110 section 11.6.1). A
// header may hold several challenges, split by the same commas as their
// parameters. What follows a fault is ignored.
func parseChallenges(values []string) []authChallenge {
	var cs []authChallenge
	for _, v := range values {
		for p := (headerCursor{v}); ; {
			c, ok := p.readChallenge()
			if !ok {
				break
			}
			cs = append(cs, c)
		}
	}
	return cs
}

// headerCursor is the rest of a header that is being read.
type headerCursor struct{ s string }

func (p *headerCursor) readChallenge() (authChallenge, bool) {
	p.skipAny(" \t,")
	c := authChallenge{scheme: strings.ToLower(p.readToken()), params: map[string]string{}}
	if c.scheme == "" {
		return c, false
	}
	p.skipAny(" \t")
	p.skipToken68()
	for {
		name, value, ok := p.readParam()
		if !ok {
			return c, true
		}
		if _, twice := c.params[name]; !twice {
			c.params[name] = value
		}
	}
}

// readParam reads name=value. If that is not what follows, nothing is read: a name
// without value is the next challenge's scheme.
func (p *headerCursor) readParam() (name, value string, ok bool) {
	before := p.s
	p.skipAny(" \t,")
	name = strings.ToLower(p.readToken())
	p.skipAny(" \t")
	if name != "" && p.skipByte('=') {
		p.skipAny(" \t")
		if value, ok = p.readValue(); ok {
			return name, value, true
		}
		before = "" // an unfinished string: no more of this header
	}
	p.s = before
	return "", "", false
}

// readValue reads a quoted string, or what stands before a blank or comma: real
// registries leave URLs unquoted.
func (p *headerCursor) readValue() (string, bool) {
	if !p.skipByte('"') {
		return p.takeWhile(func(c byte) bool { return !strings.ContainsRune(" \t,\"", rune(c)) }), true
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
func (p *headerCursor) skipToken68() {
	rest := headerCursor{p.s}
	word := rest.takeWhile(func(c byte) bool { return isTokenByte(c) || c == '/' })
	rest.skipAny("=")
	rest.skipAny(" \t")
	if word != "" && (rest.s == "" || rest.s[0] == ',') {
		*p = rest
	}
}

func (p *headerCursor) skipAny(set string) { p.s = strings.TrimLeft(p.s, set) }

func (p *headerCursor) skipByte(c byte) bool {
	if p.s == "" || p.s[0] != c {
		return false
	}
	p.s = p.s[1:]
	return true
}

func (p *headerCursor) takeWhile(of func(byte) bool) string {
	n := 0
	for n < len(p.s) && of(p.s[n]) {
		n++
	}
	word := p.s[:n]
	p.s = p.s[n:]
	return word
}

func (p *headerCursor) readToken() string { return p.takeWhile(isTokenByte) }

// isTokenByte is RFC 9110's tchar.
func isTokenByte(c byte) bool {
	return (c >= '0' && c <= '9') || (c|0x20 >= 'a' && c|0x20 <= 'z') ||
		strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}
