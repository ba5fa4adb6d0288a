// upstream_auth.go: authorization at container registries: the challenges of a
// registry, the requests to its token service, and which token services get the
// credentials. The protocol is distribution's "Token Authentication Specification"
// (https://distribution.github.io/distribution/spec/auth/token/).

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// sendAuthorized sends req to origin i, with the authorization that the origin wants. A
// registry asks for it in a 401. Its challenge is remembered, and so are the tokens, so
// that the next request has an Authorization at once. The caller closes the body.
func (u *upstream) sendAuthorized(ctx context.Context, req upstreamRequest, i int) (*http.Response, error) {
	x, err := u.newExchange(req, i)
	if err != nil {
		return nil, err
	}
	if req.remote.packageType != "docker" {
		return u.followRedirects(ctx, x)
	}
	x.auth = u.tokens.cachedAuthorization(x.registryKeyOf(), req.scope)
	for last, n := false, 0; ; n++ {
		resp, err := u.followRedirects(ctx, x)
		if err != nil || last || n == 2 || resp.StatusCode != http.StatusUnauthorized {
			return resp, err
		}
		if !sameServer(resp.Request.URL, x.origin) {
			return resp, nil // a 401 of the blob storage behind a redirect: its realm is not the registry's
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
		x.auth, last = auth, fresh // the answer to a fresh token is final
	}
}

// chooseAuthorization returns the Authorization header for the challenges of a 401. It
// is "" if there is none except the one that was just refused. fresh reports whether it
// was made for this request. A token that is not fresh may be refused although a new
// one would be accepted.
func (u *upstream) chooseAuthorization(ctx context.Context, x *exchange, scope string, challenges []string) (auth string, fresh bool, err error) {
	registry := x.registryKeyOf()
	challenge, ok := chooseChallenge(parseChallenges(challenges))
	switch {
	case !ok, challenge.scheme == "basic" && x.auth == registry.basic:
		return "", true, nil
	case challenge.scheme == "basic":
		u.tokens.challenges.put(registry, challenge)
		return registry.basic, true, nil
	}
	realm, err := x.parseRealm(challenge.params["realm"], registry.basic != "")
	if err != nil {
		return "", true, err
	}
	value, fresh, err := u.fetchToken(ctx, x, registry.tokenKeyFor(challenge, scope), realm, strings.TrimPrefix(x.auth, "Bearer "))
	if err != nil {
		return "", true, err
	}
	u.tokens.challenges.put(registry, challenge)
	return "Bearer " + value, fresh, nil
}

// chooseChallenge returns a challenge that we can answer. A token is preferred: it
// expires, and the password is not sent with every request.
func chooseChallenge(challenges []authChallenge) (authChallenge, bool) {
	for _, scheme := range []string{"bearer", "basic"} {
		for _, c := range challenges {
			if c.scheme == scheme && (scheme == "basic" || c.params["realm"] != "") {
				return c, true
			}
		}
	}
	return authChallenge{}, false
}

// registryKey stands for one registry as one user. With a changed password it is
// another user.
type registryKey struct {
	remote string
	server string // scheme and host
	basic  string // the Basic authorization that the registry may get; "" if none
}

// tokenKey stands for one token. The credentials are part of it: otherwise a mirror
// without auth could name the realm of base_url and would be sent a token that was got
// with the credentials.
type tokenKey struct{ remote, realm, service, scope, basic string }

// registryKeyOf returns the key of the registry that x asks.
func (x *exchange) registryKeyOf() registryKey {
	k := registryKey{remote: x.remote.name, server: x.origin.Scheme + "://" + x.origin.Host}
	if x.remote.sendsCredentialsTo(x.origin) {
		k.basic = x.remote.basicAuthorization()
	}
	return k
}

// tokenKeyFor returns the key of the token that a challenge asks for.
func (k registryKey) tokenKeyFor(c authChallenge, scope string) tokenKey {
	return tokenKey{k.remote, c.params["realm"], c.params["service"], scope, k.basic}
}

// parseRealm parses the URL of a token service. If there are credentials to send, it
// refuses a token service that must not get them.
func (x *exchange) parseRealm(s string, hasCredentials bool) (*url.URL, error) {
	realm, err := url.Parse(s)
	if err != nil || realm.Host == "" || (realm.Scheme != "https" && realm.Scheme != "http") {
		return nil, x.newUnusableError(x.origin, "its token realm is not an http or https URL")
	}
	realm.User, realm.Fragment = nil, ""
	if hasCredentials && !x.remote.trustsRealm(realm) {
		return nil, x.newUnusableError(x.origin, fmt.Sprintf(
			"its token realm is at another server, which must not get the credentials; if it may, set token_realm: %s://%s%s",
			realm.Scheme, realm.Host, realm.EscapedPath()))
	}
	return realm, nil
}

// trustsRealm reports whether the credentials may be sent to realm: if it is
// token_realm, or shares the domain of base_url or of a mirror with auth. It must use
// https, unless that origin uses http too.
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

// isTokenRealm reports whether realm is token_realm, whatever the queries are.
func (r *remote) isTokenRealm(realm *url.URL) bool {
	return r.tokenRealm != nil && sameServer(r.tokenRealm, realm) &&
		cmp.Or(r.tokenRealm.EscapedPath(), "/") == cmp.Or(realm.EscapedPath(), "/")
}

// lowerHost returns the host of u in lower case, without the dot of the root domain.
func lowerHost(u *url.URL) string { return strings.TrimSuffix(strings.ToLower(u.Hostname()), ".") }

// sharesDomain reports whether the host realm belongs to the host registry: it is the
// same, or it is the parent domain of registry or below that, as auth.docker.io is for
// registry-1.docker.io. A parent domain below which anybody can have a name does not
// count.
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

// isPublicSuffix reports whether host is one of the usual domains of two labels below
// which anybody can have a name. A domain that is listed by mistake costs its users a
// line token_realm; one that is missing may cost a password.
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

// tokenCache remembers the challenges of registries and the tokens of token services.
type tokenCache struct {
	valid      *boundedMap[tokenKey, bearerToken]
	challenges *boundedMap[registryKey, authChallenge]

	mu      sync.Mutex                 // guards pending; no request is sent under it, and of the other locks only the maps' are taken
	pending map[tokenKey]*tokenRequest // requests that run now
}

// bearerToken is a token and the time until which it is used. It is the zero value if
// there is none.
type bearerToken struct {
	value string
	until time.Time
}

// tokenRequest is a request for a token. The goroutine that sends it writes the fields
// and then closes done. Other goroutines that need the token wait for done before they
// read the fields.
type tokenRequest struct {
	done      chan struct{}
	token     bearerToken
	err       error
	abandoned bool // the context of the sender ended: one of those that wait sends a new one
}

// cachedAuthorization returns the Authorization header that a registry will probably
// want, or "" if its challenge must be awaited.
func (ts *tokenCache) cachedAuthorization(k registryKey, scope string) string {
	c, _ := ts.challenges.get(k)
	if c.scheme == "basic" {
		return k.basic
	}
	if token, found := ts.valid.get(k.tokenKeyFor(c, scope)); found {
		return "Bearer " + token.value
	}
	return ""
}

// fetchToken returns a token for k that is not the refused one. fresh is false if it
// was remembered. One of all goroutines that need the token sends the request. The
// others share its outcome, unless the context of the one that sent it ended.
func (u *upstream) fetchToken(ctx context.Context, x *exchange, k tokenKey, realm *url.URL, refused string) (value string, fresh bool, err error) {
	for {
		token, pending, mustSend := u.tokens.claimToken(k, refused)
		if pending == nil {
			return token.value, false, nil
		}
		if mustSend {
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

// claimToken returns a valid token, or the request that will bring one. mustSend means
// that the request is new and the caller must run it (runTokenRequest).
func (ts *tokenCache) claimToken(k tokenKey, refused string) (token bearerToken, pending *tokenRequest, mustSend bool) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if token, found := ts.valid.get(k); found && token.value != refused {
		return token, nil, false
	}
	if pending = ts.pending[k]; pending != nil {
		return token, pending, false
	}
	pending = &tokenRequest{done: make(chan struct{}), abandoned: true}
	ts.pending[k] = pending
	return token, pending, true
}

// runTokenRequest sends the request that others wait for and gives them its outcome.
func (u *upstream) runTokenRequest(ctx context.Context, x *exchange, k tokenKey, realm *url.URL, pending *tokenRequest) {
	defer u.tokens.finishTokenRequest(k, pending) // after a panic too: then it is abandoned
	pending.token, pending.err = u.requestToken(ctx, x, k, realm)
	pending.abandoned = ctx.Err() != nil
}

// finishTokenRequest ends a request, remembers its token and wakes those that wait.
func (ts *tokenCache) finishTokenRequest(k tokenKey, pending *tokenRequest) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	delete(ts.pending, k)
	ts.valid.delete(k)
	if pending.err == nil {
		ts.valid.putFor(k, pending.token, pending.token.until.Sub(ts.valid.now()))
	}
	close(pending.done)
}

// requestToken asks the token service at realm for the token k. It takes at most the
// remote's timeout, redirects included. The error is a tokenServiceBusy for a 429,
// errCredentials for a 401 or 403, or one of send's.
func (u *upstream) requestToken(ctx context.Context, x *exchange, k tokenKey, realm *url.URL) (bearerToken, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer time.AfterFunc(x.remote.timeout, func() { cancel(errTimeout) }).Stop()
	tokenExchange := &exchange{
		remote: x.remote, method: http.MethodGet, start: k.tokenURL(realm),
		header: http.Header{"Accept": {"application/json"}},
		auth:   k.basic, origin: x.origin,
		// A realm that gets credentials is trusted, and a realm in token_realm was
		// named by the administrator. Both may be in a private network.
		mayDialPrivate: x.mayDialPrivate || k.basic != "" || x.remote.isTokenRealm(realm),
	}
	began := u.now()
	resp, err := u.followRedirects(ctx, tokenExchange)
	if err != nil {
		return bearerToken{}, err
	}
	defer discardResponse(resp)
	switch resp.StatusCode {
	case http.StatusOK:
		return tokenExchange.readTokenResponse(resp, began)
	case http.StatusTooManyRequests:
		return bearerToken{}, &tokenServiceBusy{resp.Header.Get("Retry-After")}
	case http.StatusUnauthorized, http.StatusForbidden:
		return bearerToken{}, tokenExchange.newExchangeProblem(errDenied, realm, errCredentials.Error(), errCredentials)
	}
	return bearerToken{}, tokenExchange.newTokenError("status " + strconv.Itoa(resp.StatusCode))
}

// tokenURL returns realm with the service and the scope of k in its query.
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

// readTokenResponse takes the token out of the answer of a token service. began is when
// the request was sent.
func (x *exchange) readTokenResponse(resp *http.Response, began time.Time) (bearerToken, error) {
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenBytes))
	if err != nil {
		return bearerToken{}, err
	}
	var answer tokenResponse
	if err := json.Unmarshal(text, &answer); err != nil {
		return bearerToken{}, x.newTokenError("its answer is not JSON with a token")
	}
	value := cmp.Or(answer.Token, answer.AccessToken)
	if value == "" || strings.ContainsFunc(value, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return bearerToken{}, x.newTokenError("its answer has no usable token")
	}
	sent, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		sent = began
	}
	return bearerToken{value, began.Add(answer.lifetime(sent))}, nil
}

// newTokenError makes the error for an answer of the token service without a token. It
// counts as unreachable, because it says nothing about the file. reason is only logged.
func (x *exchange) newTokenError(reason string) error {
	e := &transportError{kind: errUnreachable, reason: reason}
	return x.newExchangeProblem(errUnreachable, x.start, "the token service gave no token", e)
}

// tokenResponse is the answer of a token service.
type tokenResponse struct {
	Token       string      `json:"token"`
	AccessToken string      `json:"access_token"` // the name that OAuth 2.0 has for token
	ExpiresIn   json.Number `json:"expires_in"`   // seconds from issued_at
	IssuedAt    any         `json:"issued_at"`    // RFC 3339; some services send none, or a number
}

// lifetime returns how long the token may be used after it was asked for. It is a tenth
// less than expires_in, so that the token does not expire on its way. A service that
// caches tokens may have issued this one long before sent, when it sent the answer;
// both times are by the clock of the service.
func (t tokenResponse) lifetime(sent time.Time) time.Duration {
	life := defaultTokenLife
	if seconds, err := t.ExpiresIn.Float64(); err == nil && seconds > 0 {
		life = time.Duration(min(seconds, maxTokenLife.Seconds()) * float64(time.Second))
	}
	issued, _ := t.IssuedAt.(string)
	if at, err := time.Parse(time.RFC3339, issued); err == nil {
		life -= max(0, sent.Sub(at))
	}
	return life - life/10
}

// tokenServiceBusy is the error for a 429 of the token service. retryAfter is its
// Retry-After header.
type tokenServiceBusy struct{ retryAfter string }

func (b *tokenServiceBusy) Error() string { return "the token service limits its requests (429)" }

// asResponse returns the 429 as if the registry had sent it, so that the cache treats
// the two in the same way.
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

// parseChallenges parses WWW-Authenticate headers (RFC 9110 section 11.6.1). A header
// may have several challenges, which are separated by commas as their parameters are.
// What follows a syntax error in a header is ignored.
func parseChallenges(values []string) []authChallenge {
	var challenges []authChallenge
	for _, v := range values {
		for p := (headerCursor{v}); ; {
			c, ok := p.readChallenge()
			if !ok {
				break
			}
			challenges = append(challenges, c)
		}
	}
	return challenges
}

// headerCursor holds the rest of a header that is being parsed.
type headerCursor struct{ s string }

// readChallenge reads a scheme and its parameters. Of a repeated parameter the first
// value counts. ok is false at the end of the header.
func (p *headerCursor) readChallenge() (c authChallenge, ok bool) {
	p.skipAny(" \t,")
	c = authChallenge{scheme: strings.ToLower(p.readToken()), params: map[string]string{}}
	if c.scheme == "" {
		return c, false
	}
	p.skipAny(" \t")
	p.skipToken68()
	for {
		name, value, found := p.readParam()
		if !found {
			return c, true
		}
		if _, repeated := c.params[name]; !repeated {
			c.params[name] = value
		}
	}
}

// readParam reads name=value. If something else follows, it reads nothing: a name
// without a value is the scheme of the next challenge.
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
		before = "" // a string without an end: the rest of the header is ignored
	}
	p.s = before
	return "", "", false
}

// readValue reads a quoted string, or everything up to a blank or a comma: some
// registries do not quote URLs. ok is false for a quoted string without an end.
func (p *headerCursor) readValue() (value string, ok bool) {
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

// skipToken68 skips the other form that the data of a challenge may have, a token68
// ("Negotiate YII=", RFC 9110 section 11.2).
func (p *headerCursor) skipToken68() {
	rest := headerCursor{p.s}
	word := rest.takeWhile(func(c byte) bool { return isTokenByte(c) || c == '/' })
	rest.skipAny("=")
	rest.skipAny(" \t")
	if word != "" && (rest.s == "" || rest.s[0] == ',') {
		*p = rest
	}
}

// skipAny skips all bytes that are in set.
func (p *headerCursor) skipAny(set string) { p.s = strings.TrimLeft(p.s, set) }

// skipByte skips c and reports whether it was the next byte.
func (p *headerCursor) skipByte(c byte) bool {
	if p.s == "" || p.s[0] != c {
		return false
	}
	p.s = p.s[1:]
	return true
}

// takeWhile reads the bytes up to the first one that is not accepted.
func (p *headerCursor) takeWhile(accept func(byte) bool) string {
	n := 0
	for n < len(p.s) && accept(p.s[n]) {
		n++
	}
	word := p.s[:n]
	p.s = p.s[n:]
	return word
}

// readToken reads a token (RFC 9110 section 5.6.2), which may be empty.
func (p *headerCursor) readToken() string { return p.takeWhile(isTokenByte) }

// isTokenByte reports whether c may be in a token: it is a tchar of RFC 9110 section
// 5.6.2.
func isTokenByte(c byte) bool {
	return (c >= '0' && c <= '9') || (c|0x20 >= 'a' && c|0x20 <= 'z') ||
		strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}
