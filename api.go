// api.go: files below /api/, local repositories, and the management endpoints.

package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"html/template"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"regexp"
	"regexp/syntax"
	"strconv"
	"strings"
	"time"
)

// api serves everything but the registry. Its fields do not change.
type api struct {
	cache     *cache
	config    func() *config // the one in force; a request asks once
	health    func() healthReport
	responder *responder
	metrics   *metrics
	now       func() time.Time
	version   string
	started   time.Time
	token     secret // API_TOKEN
	origin    *http.CrossOriginProtection
	registry  http.Handler // below /v2/ and /{remote}/v2/
}

// healthReport is what /health says.
type healthReport struct {
	Status   string            `json:"status"` // healthy or degraded
	Backends map[string]string `json:"backends"`
	draining bool
}

// ServeHTTP routes by prefix on the path as it was sent: ServeMux would
// redirect paths with "//" or "/./", and decode what must stay escaped.
func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p := rawPath(r.URL)
	if a.registry != nil && isRegistryPath(p) {
		a.registry.ServeHTTP(w, r)
		return
	}
	var h handler
	switch first, rest, _ := strings.Cut(strings.TrimPrefix(p, "/"), "/"); first {
	case "api":
		h = func(w *response, r *http.Request) error {
			return a.serveFile(w, r, strings.TrimPrefix(rest, "v1/remote/"))
		}
	case ".fill": // another replica follows a fill of ours
		h = func(w *response, r *http.Request) error { return a.cache.serveReplica(w, r, rest) }
	case "artifacts":
		h = func(w *response, r *http.Request) error { return a.serveArtifacts(w, r, rest) }
	default:
		h = a.fixedEndpoint(p)
	}
	if a.origin.Check(r) != nil { // reading passes
		h = func(*response, *http.Request) error {
			return newProblem(http.StatusForbidden, "cross-origin requests by browsers may not write")
		}
	}
	a.responder.serveRequest(w, r, h, writeJSONError)
}

// rawPath is u's path as it was on the wire.
func rawPath(u *url.URL) string {
	if u.RawPath != "" {
		return u.RawPath
	}
	return u.EscapedPath()
}

// isRegistryPath: /v2, /v2/... and /{remote}/v2/... belong to the registry.
func isRegistryPath(p string) bool {
	first, rest, _ := strings.Cut(strings.TrimPrefix(p, "/"), "/")
	if first == "v2" {
		return true
	}
	second, _, _ := strings.Cut(rest, "/")
	return second == "v2" && first != "api" && first != "artifacts"
}

// fixedEndpoint finds the handler of a fixed path.
func (a *api) fixedEndpoint(p string) handler {
	var h handler
	switch p {
	case "/":
		h = a.serveRoot
	case "/health":
		h = a.serveHealth
	case "/config":
		h = a.serveConfig
	case "/metrics":
		h = a.serveMetrics
	default:
		return func(*response, *http.Request) error { return newProblem(http.StatusNotFound, "no such path") }
	}
	return func(w *response, r *http.Request) error {
		if err := allowMethods(r, http.MethodGet, http.MethodHead); err != nil {
			return err
		}
		return h(w, r)
	}
}

// allowMethods refuses every method but those.
func allowMethods(r *http.Request, methods ...string) error {
	for _, m := range methods {
		if r.Method == m {
			return nil
		}
	}
	p := newProblem(http.StatusMethodNotAllowed, "method %s is not allowed here", r.Method)
	p.allow = strings.Join(methods, ", ")
	return p
}

// serveFile serves /api/{remote}/{path}; rest is behind /api/ or
// /api/v1/remote/.
func (a *api) serveFile(w *response, r *http.Request, rest string) error {
	name, escaped, _ := strings.Cut(rest, "/")
	t, err := a.config().resolveTarget(name, escaped, r.URL.RawQuery)
	if t.remote != nil {
		w.remote, w.path = t.remote.name, t.path
	}
	if err != nil {
		return err
	}
	writable := t.remote.local
	switch {
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		if t.spelling == "" {
			return a.serveList(w, r, t.remote)
		}
		return a.cache.serveFile(w, r, fileRequest{target: t})
	case writable && r.Method == http.MethodPut:
		return a.servePut(w, r, t)
	case writable && r.Method == http.MethodDelete:
		return a.serveLocalDelete(w, r, t)
	case writable:
		return allowMethods(r, http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete)
	}
	return allowMethods(r, http.MethodGet, http.MethodHead)
}

// serveLocalDelete removes a file of a local repository.
func (a *api) serveLocalDelete(w *response, r *http.Request, t target) error {
	if err := a.authorizeWrite(r, t.remote.writeToken); err != nil {
		return err
	}
	if t.spelling == "" {
		return newProblem(http.StatusBadRequest, "name the file to delete: /api/%s/PATH", t.remote.name)
	}
	return a.purgeKey(w, r, t)
}

func (a *api) purgeKey(w *response, r *http.Request, t target) error {
	if err := a.cache.purgeFile(r.Context(), t.remote.name, t.key()); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// servePut stores a file of a local repository (SPEC.md section 9).
func (a *api) servePut(w *response, r *http.Request, t target) error {
	if err := a.authorizeWrite(r, t.remote.writeToken); err != nil {
		return err
	}
	if t.spelling == "" {
		return newProblem(http.StatusBadRequest, "name the file to store: /api/%s/PATH", t.remote.name)
	}
	if r.Header.Get("Content-Range") != "" { // RFC 9110 section 14.5: a piece is not the file
		return newProblem(http.StatusBadRequest, "a part of a file cannot be stored: send all of it, without Content-Range")
	}
	sums, err := parseDeclaredDigests(r.Header)
	if err != nil {
		return err
	}
	u := upload{body: &uploadBody{r.Body, w, a.now, sums}, size: r.ContentLength, create: r.Header.Get("If-None-Match") == "*"}
	created, err := a.cache.putFile(r.Context(), fileRequest{target: t}, u)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Length", "0")
	if created {
		w.WriteHeader(http.StatusCreated)
		return nil
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

// uploadBody reads an upload, gives its client new time with each piece, and
// fails at the end of a body that is another than was promised.
type uploadBody struct {
	io.Reader
	w        *response
	now      func() time.Time
	declared []declaredDigest
}

func (b *uploadBody) Read(p []byte) (int, error) {
	_ = b.w.controller.SetReadDeadline(b.now().Add(clientTimeout))
	n, err := b.Reader.Read(p)
	for _, s := range b.declared {
		s.Write(p[:n])
		if err == io.EOF && !bytes.Equal(s.Sum(nil), s.want) {
			return n, errChecksum
		}
	}
	return n, err
}

// declaredDigest is a digest that an upload says it has.
type declaredDigest struct {
	hash.Hash
	want []byte
}

// parseDeclaredDigests are the digests that h names: X-Checksum-Sha256, Content-Digest
// (RFC 9530; other algorithms than its two are ignored).
func parseDeclaredDigests(h http.Header) (sums []declaredDigest, err error) {
	if v := h.Get("X-Checksum-Sha256"); v != "" {
		b, err := hex.DecodeString(v)
		if err != nil || len(b) != sha256.Size {
			return nil, newProblem(http.StatusBadRequest, "X-Checksum-Sha256 is not 64 hexadecimal digits")
		}
		sums = append(sums, declaredDigest{sha256.New(), b})
	}
	for part := range strings.SplitSeq(strings.Join(h.Values("Content-Digest"), ","), ",") {
		name, v, _ := strings.Cut(strings.TrimSpace(part), "=")
		s := declaredDigest{}
		switch name {
		case "sha-256":
			s.Hash = sha256.New()
		case "sha-512":
			s.Hash = sha512.New()
		default:
			continue
		}
		s.want, err = base64.StdEncoding.DecodeString(strings.Trim(v, ":"))
		if err != nil || len(s.want) != s.Size() {
			return nil, newProblem(http.StatusBadRequest, "Content-Digest: %s is not the base64 of %d bytes between colons", name, s.Size())
		}
		sums = append(sums, s)
	}
	return sums, nil
}

// authorizeWrite lets a writing request pass with API_TOKEN or a repository's own
// token (SPEC.md section 9).
func (a *api) authorizeWrite(r *http.Request, own secret) error {
	if a.token == "" && own == "" {
		return newProblem(http.StatusForbidden, "writing is off: set API_TOKEN in the server's environment (or write_token of a local repository)")
	}
	given := tokenOf(r)
	if sameToken(given, a.token) || sameToken(given, own) {
		return nil
	}
	return &problem{status: http.StatusUnauthorized, detail: "a valid token is needed: Authorization: Bearer TOKEN",
		challenge: `Bearer realm="artifactapi"`, cause: errUnauthorized}
}

// tokenOf is the token of a request: Bearer, or Basic's password.
func tokenOf(r *http.Request) string {
	if _, password, ok := r.BasicAuth(); ok {
		return password
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	return ""
}

// sameToken compares in a time that tells nothing about either.
func sameToken(given string, token secret) bool {
	if token == "" || given == "" {
		return false
	}
	x, y := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// serveArtifacts is /artifacts/{remote}[/{path}]: listing and purging.
func (a *api) serveArtifacts(w *response, r *http.Request, rest string) error {
	name, escaped, _ := strings.Cut(rest, "/")
	rem := a.config().remotes[name]
	if rem == nil {
		return newProblem(http.StatusNotFound, "no remote %q in remotes.yaml", name)
	}
	w.remote = name
	switch {
	case escaped == "":
		if err := allowMethods(r, http.MethodGet, http.MethodHead, http.MethodDelete); err != nil {
			return err
		}
		if r.Method == http.MethodDelete {
			return a.servePurgeMatching(w, r, rem)
		}
		return a.serveList(w, r, rem)
	case r.Method == http.MethodDelete:
		return a.servePurge(w, r, rem, escaped)
	}
	return allowMethods(r, http.MethodDelete)
}

// listedArtifact is one entry of a listing.
type listedArtifact struct {
	Path        string     `json:"path"`
	Key         string     `json:"key"`
	Size        int64      `json:"size"`
	SHA256      string     `json:"sha256"`
	ContentType string     `json:"content_type"`
	Source      string     `json:"source,omitempty"` // base_url + path; none for local files
	FetchedAt   time.Time  `json:"fetched_at"`
	LastAccess  time.Time  `json:"last_access"`
	Hits        int64      `json:"hits"`
	Class       class      `json:"class"`
	ExpiresAt   *time.Time `json:"expires_at"` // null: never
	Fresh       bool       `json:"fresh"`
}

// listing is a page of them.
type listing struct {
	Remote    string           `json:"remote"`
	Artifacts []listedArtifact `json:"artifacts"`
	Next      *string          `json:"next"` // null at the end
	Complete  *bool            `json:"complete,omitempty"`
}

const (
	defaultPage = 1000
	maxPage     = 10000
)

// serveList lists what is stored of a remote.
func (a *api) serveList(w *response, r *http.Request, rem *remote) error {
	q, err := listQuery(r.URL.Query(), rem.name)
	if err != nil {
		return err
	}
	p, err := a.cache.index.listPage(r.Context(), q)
	if err != nil {
		return err
	}
	l := listing{Remote: rem.name, Artifacts: make([]listedArtifact, 0, len(p.rows))}
	for _, row := range p.rows {
		l.Artifacts = append(l.Artifacts, a.newListedArtifact(r, rem, row))
	}
	if p.next != "" {
		l.Next = &p.next
	}
	if !p.complete {
		l.Complete = new(bool)
	}
	return writeJSON(w, l)
}

func listQuery(v url.Values, name string) (pageQuery, error) {
	q := pageQuery{remote: name, prefix: v.Get("prefix"), after: v.Get("after"), limit: defaultPage}
	if s := v.Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > maxPage {
			return q, newProblem(http.StatusBadRequest, "limit must be a number from 1 to %d", maxPage)
		}
		q.limit = n
	}
	var err error
	q.pattern, err = compilePattern(v.Get("pattern"))
	return q, err
}

// compilePattern compiles a client's regular expression; nil for none.
func compilePattern(s string) (*regexp.Regexp, error) {
	if s == "" {
		return nil, nil
	}
	re, err := regexp.Compile(s)
	if err == nil {
		return re, nil
	}
	reason := "" // without its text, which is a query's
	if e, ok := errors.AsType[*syntax.Error](err); ok {
		reason = ": " + string(e.Code)
	}
	return nil, newProblem(http.StatusBadRequest, "pattern is not a regular expression (RE2)%s", reason)
}

// newListedArtifact is a row as a listing shows it.
func (a *api) newListedArtifact(r *http.Request, rem *remote, row indexRow) listedArtifact {
	e := listedArtifact{Path: decodePath(row.Path), Key: row.Key, Size: row.Size, SHA256: row.SHA256,
		ContentType: contentTypeOf(decodePath(row.Path), row.ContentType), FetchedAt: row.Fetched.UTC(),
		LastAccess: row.LastAccess.UTC(), Hits: row.Hits, Class: row.Class, Fresh: true}
	if len(rem.origins) > 0 {
		base := rem.origins[0].url.String() + "/"
		if rem.packageType == "docker" {
			base += "v2/"
		}
		e.Source = base + row.Path
	}
	if until, forever := a.cache.expiryOf(r.Context(), rem, row); !forever {
		e.ExpiresAt, e.Fresh = &until, a.now().Before(until)
	}
	return e
}

// servePurge removes one path, with all its query variants.
func (a *api) servePurge(w *response, r *http.Request, rem *remote, escaped string) error {
	if err := a.authorizeWrite(r, ""); err != nil {
		return err
	}
	path, spelling, err := spellPath(escaped, "")
	if err != nil {
		return err
	}
	if rem.packageType == "docker" {
		spelling = path // registries' paths are not escaped
	}
	w.path = path
	found := false
	err = a.cache.purgeFile(r.Context(), rem.name, target{remote: rem, spelling: spelling}.key())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	found = err == nil
	if err := a.cache.purgeMatchingFills(r.Context(), rem.name, regexp.MustCompile("^"+regexp.QuoteMeta(path)+"$")); err != nil {
		return err
	}
	n, err := a.purgeRows(r, pageQuery{remote: rem.name, prefix: w.path}, func(row indexRow) bool {
		path, _, query := strings.Cut(row.Path, "?")
		return query && path == spelling
	})
	if err != nil {
		return err
	}
	if !found && n == 0 {
		return newProblem(http.StatusNotFound, "nothing is stored at this path")
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// servePurgeMatching removes what matches ?pattern=.
func (a *api) servePurgeMatching(w *response, r *http.Request, rem *remote) error {
	if err := a.authorizeWrite(r, ""); err != nil {
		return err
	}
	re, err := compilePattern(r.URL.Query().Get("pattern"))
	if err != nil {
		return err
	}
	if re == nil {
		return newProblem(http.StatusBadRequest, "say what to purge: ?pattern=REGEX (\".\" purges everything)")
	}
	if err := a.cache.purgeMatchingFills(r.Context(), rem.name, re); err != nil {
		return err
	}
	n, err := a.purgeRows(r, pageQuery{remote: rem.name, pattern: re}, func(indexRow) bool { return true })
	if err != nil {
		return err
	}
	return writeJSON(w, map[string]int{"purged": n})
}

// purgeRows purges the rows of q for which is holds, page by page.
func (a *api) purgeRows(r *http.Request, q pageQuery, is func(indexRow) bool) (n int, err error) {
	q.limit = defaultPage
	for {
		p, err := a.cache.index.listPage(r.Context(), q)
		if err != nil {
			return n, err
		}
		for _, row := range p.rows {
			if !is(row) {
				continue
			}
			switch err := a.cache.purgeFile(r.Context(), row.Remote, row.Key); {
			case err == nil:
				n++
			case !errors.Is(err, fs.ErrNotExist):
				return n, err
			}
		}
		if p.next == "" {
			return n, nil
		}
		q.after = p.next
	}
}

// serveHealth is 200 as long as files can be served; 503 only while draining.
func (a *api) serveHealth(w *response, _ *http.Request) error {
	h := a.health()
	w.quiet = true
	if h.draining {
		return newProblem(http.StatusServiceUnavailable, "draining: shutting down")
	}
	return writeJSON(w, h)
}

// serveConfig shows the configuration in force, without its secrets.
func (a *api) serveConfig(w *response, _ *http.Request) error {
	return writeJSON(w, a.config().publicView())
}

// serveMetrics is the Prometheus exposition.
func (a *api) serveMetrics(w *response, r *http.Request) error {
	w.quiet = true
	g := gauges{version: a.version, started: a.started, backends: map[string]bool{}, stored: map[string]storedSize{}}
	for name, state := range a.health().Backends {
		g.backends[name] = state != "down"
	}
	totals, err := a.cache.index.totals(r.Context())
	if err != nil {
		totals = nil // the counters are worth having without it
	}
	for name, t := range totals {
		g.stored[name] = storedSize(t)
	}
	w.Header().Set("Content-Type", metricsType)
	return a.metrics.writeExposition(w, g)
}

// overview is what / says.
type overview struct {
	Name    string           `json:"name"`
	Version string           `json:"version"`
	Remotes []remoteOverview `json:"remotes"`
}

type remoteOverview struct {
	Name        string `json:"name"`
	Type        string `json:"type"`
	Package     string `json:"package"`
	Description string `json:"description"`
	URL         string `json:"url"`
	Artifacts   int64  `json:"artifacts"`
	Bytes       int64  `json:"bytes"`
}

// serveRoot is the overview: JSON, or a page for a browser.
func (a *api) serveRoot(w *response, r *http.Request) error {
	totals, err := a.cache.index.totals(r.Context())
	if err != nil {
		totals = nil // the remotes are worth showing without
	}
	cfg := a.config()
	v := overview{Name: "artifactapi", Version: a.version, Remotes: make([]remoteOverview, 0, len(cfg.names))}
	for _, name := range cfg.names {
		rem, t := cfg.remotes[name], totals[name]
		e := remoteOverview{Name: name, Type: "remote", Package: rem.packageType, Description: rem.description, Artifacts: t.Files, Bytes: t.Bytes}
		if rem.local {
			e.Type = "local"
		} else {
			e.URL = rem.origins[0].url.String()
		}
		v.Remotes = append(v.Remotes, e)
	}
	w.Header().Set("Vary", "Accept")
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		return a.servePage(w, v)
	}
	return writeJSON(w, v)
}

// pageCSS is the page's only style; the policy allows it by its hash.
const pageCSS = `body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #ddd}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}code{background:#f3f3f3;padding:.1rem .3rem}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}th,td{border-color:#333}code{background:#262626}}`

var pageTemplate = template.Must(template.New("page").Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>artifactapi</title>
<style>{{.CSS}}</style>
<h1>artifactapi <small>{{.Version}}</small></h1>
<p>Files are at <code>/api/REMOTE/PATH</code>, images at <code>/v2/REMOTE/IMAGE</code>. <a href="health">health</a> <a href="config">config</a> <a href="metrics">metrics</a></p>
<table><tr><th>Remote<th>Package<th>Upstream<th class="n">Files<th class="n">Bytes<th>About</tr>
{{range .Remotes}}<tr><td><a href="artifacts/{{.Name}}">{{.Name}}</a><td>{{.Package}}<td>{{if eq .Type "local"}}local{{else}}{{.URL}}{{end}}<td class="n">{{.Artifacts}}<td class="n">{{.Bytes}}<td>{{.Description}}</tr>
{{end}}</table></html>
`))

// servePage shows v to a browser.
func (a *api) servePage(w *response, v overview) error {
	sum := sha256.Sum256([]byte(pageCSS))
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'")
	h.Set("X-Content-Type-Options", "nosniff")
	data := struct {
		overview
		CSS template.CSS
	}{v, pageCSS}
	if err := pageTemplate.Execute(w, data); err != nil {
		return fmt.Errorf("writing the page: %w", err)
	}
	return nil
}
