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

// authorized asks origin i with what authorization it wants. A registry says
// so in a 401; what it said is remembered, and so are the tokens.
func (u *upstream) authorized(ctx context.Context, q question, i int) (*http.Response, error) {
	t, err := tripTo(q, i)
	if err != nil {
		return nil, err
	}
	if q.remote.packageType != "docker" {
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
