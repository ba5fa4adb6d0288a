// upstream_auth.go: authorization at container registries: challenges, token services, and
// which of them get the credentials. The protocol is distribution's "Token Authentication
// Specification" (https://distribution.github.io/distribution/spec/auth/token/).

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// sendAuthorized sends req to origin i, with the authorization that the origin wants. A
// registry asks for it in a 401; it is remembered for the next request. The caller closes
// the body.
func (u *upstream) sendAuthorized(ctx context.Context, req upstreamRequest, i int) (*upstreamResponse, error) {
	o := req.remote.origins[i].url
	if req.remote.packageType == "docker" {
		req.wire = "v2/" + req.wire
	}
	start, err := joinURL(o, req.wire)
	if err != nil {
		return nil, err
	}
	addr, _ := netip.ParseAddr(o.Hostname()) // an address is known even if a proxy dials; a name is found out later
	x := &exchange{upstreamRequest: req, start: start, index: i, origin: o, reach: u.kindOf(addr)}
	if req.remote.packageType != "docker" {
		return u.followRedirects(ctx, x)
	}
	x.auth, _ = u.authorizations.get(x.registryKey())
	for last, n := false, 0; ; n++ { // a remembered token may be refused, and so may another request's new one
		resp, err := u.followRedirects(ctx, x)
		if err != nil || resp.StatusCode != http.StatusUnauthorized {
			return resp, err
		}
		switch at := resp.Request.URL; {
		case sameServer(at, x.start):
			if last || n == 2 {
				return resp, nil
			}
		case !x.redirected: // by another registry, which is asked itself from now on
			target := *x
			target.start, target.auth, target.redirected = at, "", true
			x, n = &target, 0
		default:
			return resp, nil
		}
		auth, fresh, err := u.chooseAuthorization(ctx, x, resp.Header.Values("WWW-Authenticate"))
		if err == nil && auth == "" {
			return resp, nil
		}
		if p, ok := errors.AsType[*problem](err); ok && p.status == http.StatusTooManyRequests {
			// Our callers treat it in the same way as a 429 of the registry.
			resp.StatusCode, resp.Header = p.status, p.headers
			return resp, nil
		}
		resp.discardBody()
		if err != nil {
			return nil, err
		}
		x.auth, last = auth, fresh // the answer to a fresh token is final
	}
}

// chooseAuthorization returns the Authorization header for the challenges of a 401, or ""
// if there is none but the one that was just refused. A token that is not fresh, which
// means made for this request, may be refused although a new one would be accepted. A
// token is preferred to Basic: it expires, and the password is not sent with every request.
func (u *upstream) chooseAuthorization(ctx context.Context, x *exchange, headers []string) (auth string, fresh bool, err error) {
	challenges := parseChallenges(headers)
	bearer, registry := challenges["bearer"], x.registryKey()
	if bearer["realm"] == "" {
		if challenges["basic"] == nil || x.auth == registry.basic {
			return "", true, nil
		}
		u.authorizations.put(registry, registry.basic)
		return registry.basic, true, nil
	}
	service, err := x.newTokenURL(bearer, registry)
	if err != nil { // nobody will be asked any more
		u.endOutage(x.remote)
		return "", true, err
	}
	auth, err = u.asking.call(ctx, registry, func() (string, error) {
		if known, _ := u.authorizations.get(registry); known != "" && known != x.auth {
			return known, nil
		}
		fresh = true
		token, life, err := u.requestToken(ctx, x, registry.basic, service)
		if err == nil {
			u.authorizations.putFor(registry, "Bearer "+token, life)
		}
		return "Bearer " + token, err
	})
	return auth, fresh, err
}

// registryKey stands for one image of one registry as one user. With a changed password
// it is another user. No other server is sent its tokens: a mirror without auth may name
// the token service of base_url.
type registryKey struct {
	remote string
	server string // scheme and host
	scope  string // of the image
	basic  string // the Basic authorization that the registry may get; "" if none
}

// registryKey returns the key of the registry that x asks. One that a redirect leads to
// gets no credentials, whoever it is.
func (x *exchange) registryKey() registryKey {
	k := registryKey{remote: x.remote.name, server: x.start.Scheme + "://" + x.start.Host, scope: x.scope}
	if !x.redirected && x.remote.sendsCredentialsTo(x.origin) {
		k.basic = x.remote.basicAuthorization()
	}
	return k
}

// pullScope matches a scope that lets one image be pulled: another one than was asked for,
// where a registry maps paths.
var pullScope = regexp.MustCompile(`^repository:[^ ,]+:pull$`)

// newTokenURL makes the URL of the token that a challenge asks for. It refuses a service
// that must not get the credentials, if there are any. Of the challenge's scope only what
// we need is believed.
func (x *exchange) newTokenURL(challenge map[string]string, k registryKey) (*url.URL, error) {
	realm, err := url.Parse(challenge["realm"])
	if err != nil || realm.Host == "" || (realm.Scheme != "https" && realm.Scheme != "http") {
		return nil, x.newUnusableError(x.origin, "its token realm is not an http or https URL")
	}
	realm.User, realm.Fragment = nil, ""
	if k.basic != "" && !x.remote.trustsRealm(realm) {
		return nil, x.newUnusableError(x.origin, fmt.Sprintf(
			"its token realm is at another server, which must not get the credentials; if it may, set token_realm: %s://%s%s",
			realm.Scheme, realm.Host, realm.EscapedPath()))
	}
	if scope := challenge["scope"]; pullScope.MatchString(scope) {
		k.scope = scope
	}
	query := realm.Query()
	for name, value := range map[string]string{"service": challenge["service"], "scope": k.scope} {
		if value != "" {
			query.Set(name, value)
		}
	}
	realm.RawQuery = query.Encode()
	return realm, nil
}

// trustsRealm reports whether the credentials may be sent to realm: if it is
// token_realm, or shares the domain of base_url or of a mirror with auth. It must use
// https, unless that origin uses http too.
func (r *remote) trustsRealm(realm *url.URL) bool {
	return r.isTokenRealm(realm) || slices.ContainsFunc(r.origins, func(o origin) bool {
		return o.auth && (realm.Scheme == "https" || realm.Scheme == o.url.Scheme) &&
			sharesDomain(lowerHost(o.url), lowerHost(realm))
	})
}

// isTokenRealm reports whether realm is token_realm, whatever the queries are.
func (r *remote) isTokenRealm(realm *url.URL) bool {
	return r.tokenRealm != nil && sameServer(r.tokenRealm, realm) &&
		cmp.Or(r.tokenRealm.EscapedPath(), "/") == cmp.Or(realm.EscapedPath(), "/")
}

// lowerHost returns the host of u in lower case, without the dot of the root domain.
func lowerHost(u *url.URL) string { return strings.TrimSuffix(strings.ToLower(u.Hostname()), ".") }

// sharesDomain reports whether the host realm belongs to the host registry: it is the
// same, or the parent domain of registry or below that, as auth.docker.io is for
// registry-1.docker.io. A parent domain below which anybody can have a name does not count.
func sharesDomain(registry, realm string) bool {
	if registry == realm {
		return true
	}
	if net.ParseIP(registry) != nil || net.ParseIP(realm) != nil {
		return false
	}
	_, parent, _ := strings.Cut(registry, ".")
	second, top, hasTwo := strings.Cut(parent, ".")
	isPublic := (len(top) == 2 && slices.Contains(countrySuffixes, second)) || slices.Contains(hosterSuffixes, parent)
	return hasTwo && !isPublic && (realm == parent || strings.HasSuffix(realm, "."+parent))
}

// countrySuffixes are public below the domains of many countries: co.uk, com.au. One that
// is listed by mistake costs a line token_realm; one that is missing may cost a password.
var countrySuffixes = strings.Fields("ac co com edu go gob gov gv id ltd me mil ne net nom or org plc sch")

// hosterSuffixes are domains below which a hoster gives names to its customers.
var hosterSuffixes = strings.Fields(`appspot.com azurecr.io azurewebsites.net cloudfront.net
	duckdns.org fly.dev github.io gitlab.io herokuapp.com hf.space jfrog.io netlify.app
	ngrok.io onrender.com pages.dev pkg.dev run.app vercel.app web.app workers.dev`)

// requestToken asks the token service at realm for a token, with the authorization basic.
// It takes at most the remote's timeout, redirects included. life is how long the token
// may be used. The error is a problem with status 429, errCredentials for a 401 or 403, or
// one of send's.
func (u *upstream) requestToken(ctx context.Context, x *exchange, basic string, realm *url.URL) (token string, life time.Duration, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, x.remote.timeout, errTimeout)
	defer cancel()
	service := *x
	service.start, service.auth = realm, basic
	service.method, service.header, service.digestKnown = http.MethodGet, http.Header{"Accept": {"application/json"}}, false
	service.anywhere = basic != "" || x.remote.isTokenRealm(realm) // it is trusted, or the administrator named it
	resp, err := u.followRedirects(ctx, &service)
	if err != nil {
		return "", 0, err
	}
	defer resp.discardBody()
	// An answer without a token counts as unreachable, because it says nothing about the file.
	noToken := func(reason string) error {
		return x.newExchangeProblem(errUnreachable, realm, "the token service gave no token", &transportError{kind: errUnreachable, reason: reason})
	}
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusTooManyRequests:
		return "", 0, &problem{status: resp.StatusCode, headers: http.Header{"Retry-After": {resp.Header.Get("Retry-After")}}}
	case http.StatusUnauthorized, http.StatusForbidden:
		text := errCredentials.Error()
		if x.redirected {
			text = "the registry that a redirect leads to gives no anonymous token"
		}
		return "", 0, x.newExchangeProblem(errDenied, realm, text, errCredentials)
	default:
		return "", 0, noToken("status " + strconv.Itoa(resp.StatusCode))
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenAnswer))
	if err != nil {
		return "", 0, err
	}
	if token, life, err = parseTokenAnswer(text); err != nil {
		return "", 0, noToken(err.Error())
	}
	return token, life, nil
}

// parseTokenAnswer takes the token out of an answer. life is a tenth less than expires_in,
// so that the token does not expire on its way.
func parseTokenAnswer(text []byte) (token string, life time.Duration, err error) {
	var answer struct {
		Token       string      `json:"token"`
		AccessToken string      `json:"access_token"` // the name that OAuth 2.0 has for token
		ExpiresIn   json.Number `json:"expires_in"`   // seconds
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return "", 0, errors.New("its answer is not JSON with a token")
	}
	token = cmp.Or(answer.Token, answer.AccessToken)
	if token == "" || len(token) > maxToken || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return "", 0, errors.New("its answer has no usable token")
	}
	life = time.Minute // without expires_in
	if seconds, err := answer.ExpiresIn.Float64(); err == nil && seconds > 0 {
		life = time.Duration(min(seconds, maxTokenLife.Seconds()) * float64(time.Second))
	}
	return token, life - life/10, nil
}

// challengePart matches the next part of a WWW-Authenticate header: a parameter (1: its
// name, 2: its quoted value, or 3: its bare value, since some registries do not quote
// URLs), or a scheme that we know (4).
var challengePart = regexp.MustCompile(`(?i)([\w-]+)\s*=\s*(?:"([^"]*)"|([^\s,"]+))|\b(bearer|basic)\b`)

// parseChallenges parses WWW-Authenticate headers (RFC 9110 section 11.6.1). It returns the
// parameters of the schemes that we know; schemes and names are in lower case. Of what is
// repeated the first counts. A header that is too long is ignored.
func parseChallenges(headers []string) map[string]map[string]string {
	challenges := map[string]map[string]string{}
	for _, header := range headers {
		if len(header) > maxChallenge {
			continue
		}
		params := map[string]string{} // of the last scheme
		for _, part := range challengePart.FindAllStringSubmatch(header, -1) {
			name, scheme := strings.ToLower(part[1]), strings.ToLower(part[4])
			if scheme != "" {
				params = map[string]string{}
				if challenges[scheme] == nil {
					challenges[scheme] = params
				}
			} else if params[name] == "" {
				params[name] = part[2] + part[3]
			}
		}
	}
	return challenges
}
