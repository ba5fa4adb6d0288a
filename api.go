// api.go: serves files below /api/, uploads to local repositories, and the management
// endpoints (README, section "Endpoints").

package main

import (
	"bytes"
	"cmp"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"time"
)

// api is the server's handler: it serves everything but the registry itself. Its
// fields do not change after it serves its first request.
type api struct {
	cache     *cache
	config    func() *config      // the configuration in force; a request calls it once
	settings  map[string]string   // the environment as /config shows it
	health    func() healthReport // answers at once, whatever backend hangs
	responder *responder
	metrics   *metrics
	gauges    func() []family           // what main knows of disk and hot copies, for /metrics
	disk      func() (diskUsage, error) // of DATA_DIR
	now       func() time.Time
	version   string
	started   time.Time
	token     secret                      // API_TOKEN; "": only a write_token allows writing
	origin    *http.CrossOriginProtection // refuses writes that browsers make for other sites
	registry  interface {                 // of /v2/... and /{remote}/v2/...
		http.Handler
		findFile(cfg *config, u *url.URL) (fileRequest, error)
	}
	runs *prefetchRuns
}

// healthReport is the answer of /health.
type healthReport struct {
	Status   string            `json:"status"`   // healthy or degraded
	Backends map[string]string `json:"backends"` // by name: ok, embedded, full or down
	// Configuration is "rejected" if the last reload failed; else "".
	Configuration string `json:"configuration,omitempty"`
	configLoaded  int64  // when the one in force was loaded, in seconds since 1970
	draining      bool   // /health answers 503
}

// ServeHTTP routes a request by the first elements of its path as it was sent.
// http.ServeMux cannot be used: it redirects paths with "//" or "/./" and decodes
// escapes that belong to a file's name.
func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p := r.URL.RawPath // EscapedPath would decode all of it for one character that should be escaped
	if p == "" {
		p = r.URL.EscapedPath()
	}
	first, rest := cutElement(p)
	second, _ := cutElement(rest)
	if first == "v2" || (second == "v2" && first != "api" && first != "artifacts") {
		a.registry.ServeHTTP(w, r)
		return
	}
	a.responder.serveRequest(w, r, func(w *response, r *http.Request) error {
		if a.origin.Check(r) != nil { // it refuses no GET, HEAD or OPTIONS
			return newProblem(http.StatusForbidden, "a browser may not write here from another site (cross-origin request)")
		}
		if slices.Contains(readBySameSite, first) && r.Header.Get("Sec-Fetch-Site") == "cross-site" && r.Header.Get("Sec-Fetch-Mode") != "navigate" {
			return newProblem(http.StatusForbidden, "a page of another site may not read this")
		}
		switch first {
		case "api":
			return a.serveFile(w, r, rest)
		case ".fill": // another replica streams a fill of this one
			return a.cache.serveReplica(w, r, rest)
		case "artifacts":
			return a.serveArtifacts(w, r, rest)
		case "cache-artifact":
			return a.servePrefetch(w, r)
		}
		return a.serveEndpoint(w, r, "/"+trimEmptySegments(p))
	}, writeJSONError)
}

// readBySameSite are the first elements of paths that other sites' pages may not read,
// though a browser follows a link there: they say what is here, and listing it costs.
var readBySameSite = []string{"artifacts", "config", "metrics", "missed"}

// serveEndpoint serves a management endpoint. All but /missed answer GET and HEAD only.
func (a *api) serveEndpoint(w *response, r *http.Request, path string) error {
	serve, found := map[string]handler{"/": a.serveRoot, "/health": a.serveHealth, "/config": a.serveConfig, "/metrics": a.serveMetrics, "/missed": a.serveMissed}[path]
	if !found {
		return newProblem(http.StatusNotFound, "there is no such path: files are below /api/REMOTE/, images below /v2/REMOTE/")
	}
	methods := []string{http.MethodGet, http.MethodHead}
	if path == "/missed" {
		methods = append(methods, http.MethodDelete)
	}
	if err := allowMethods(r, methods...); err != nil {
		return err
	}
	return serve(w, r)
}

// allowMethods returns a 405 problem unless the request has one of the methods.
func allowMethods(r *http.Request, methods ...string) error {
	if slices.Contains(methods, r.Method) {
		return nil
	}
	p := newProblem(http.StatusMethodNotAllowed, "method %s is not allowed here", r.Method)
	p.headers = http.Header{"Allow": {strings.Join(methods, ", ")}}
	return p
}

// serveFile serves /api/{remote}/{path}. rest is the path behind /api/. An empty path
// lists the remote's files. PUT and DELETE write to a local repository.
func (a *api) serveFile(w *response, r *http.Request, rest string) error {
	t, err := a.config().resolveTarget(rest, r.URL.RawQuery)
	if t.remote == nil {
		return err
	}
	w.remote, w.path = t.remote.name, t.path
	methods := []string{http.MethodGet, http.MethodHead}
	if t.remote.local { // only local repositories are written by clients
		methods = append(methods, http.MethodPut, http.MethodDelete)
	}
	if err := cmp.Or(allowMethods(r, methods...), err); err != nil {
		return err
	}
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		if t.path == "" {
			return a.serveList(w, r, t.remote)
		}
		return a.cache.serveFile(w, r, fileRequest{target: t})
	}
	if err := a.authorizeWrite(r, t.remote.writeToken); err != nil {
		return err
	}
	if t.path == "" {
		return newProblem(http.StatusBadRequest, "name the file to store or to delete: /api/%s/PATH", t.remote.name)
	}
	if r.Method == http.MethodPut {
		return a.servePut(w, r, t)
	}
	if err := (localFiles{a.cache}).delete(r.Context(), fileRequest{target: t}, r.Header); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// servePut stores a file of a local repository: 201 for a new file, 200 for one that
// was replaced, once the file is durable. A broken upload leaves the old file.
func (a *api) servePut(w *response, r *http.Request, t target) error {
	mediaType, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	switch deploy := r.Header.Get("X-Checksum-Deploy"); {
	case r.Header.Get("Content-Range") != "": // a partial PUT must be refused (RFC 9110 section 14.5)
		return newProblem(http.StatusBadRequest, "a part of a file cannot be stored: send all of it, without Content-Range")
	case deploy != "" && !strings.EqualFold(deploy, "false"): // the body is empty: it would become the file
		return newProblem(http.StatusNotImplemented, "a file cannot be stored by its checksum alone (X-Checksum-Deploy): send its bytes")
	case mediaType == "multipart/form-data":
		return newProblem(http.StatusUnsupportedMediaType, "a form is not the file: send the file's bytes alone, as curl -T FILE does")
	}
	sums, err := parseDeclaredDigests(r.Header)
	if err != nil {
		return err
	}
	body := &uploadBody{r.Body, w, sums}
	created, err := (localFiles{a.cache}).put(r.Context(), fileRequest{target: t}, body, r.ContentLength, r.Header)
	if created && err == nil { // else net/http sends 200
		w.WriteHeader(http.StatusCreated)
	}
	return err
}

// uploadBody reads the body of an upload. Each read gives the client a new deadline,
// and the last one fails with errChecksum if the body does not have the declared
// digests. One goroutine uses it.
type uploadBody struct {
	io.Reader
	w        *response
	declared []declaredDigest
}

// Read implements io.Reader.
func (b *uploadBody) Read(p []byte) (int, error) {
	_ = b.w.controller.SetReadDeadline(b.w.now().Add(clientTimeout))
	n, err := b.Reader.Read(p)
	for _, s := range b.declared {
		s.Write(p[:n])
		if err == io.EOF && !bytes.Equal(s.Sum(nil), s.want) {
			return n, errChecksum
		}
	}
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%w: reading the upload: %w", errBadRequest, err)
	}
	return n, err
}

// declaredDigest is a digest that an upload's headers declare, and the hash of the
// body so far.
type declaredDigest struct {
	hash.Hash
	want []byte
}

// digestHashes are the algorithms that are verified, by their names in Digest (RFC 3230)
// and in Content-Digest and Repr-Digest (RFC 9530). Others are ignored, as both allow.
var digestHashes = map[string]func() hash.Hash{"md5": md5.New, "sha": sha1.New, "sha-256": sha256.New, "sha-512": sha512.New}

// parseDeclaredDigests returns the digests that h declares, each algorithm once: the
// body is hashed by each. Artifactory's clients send X-Checksum-*.
func parseDeclaredDigests(h http.Header) ([]declaredDigest, error) {
	declared := map[string]declaredDigest{}
	add := func(header, algorithm, value string, decode func(string) ([]byte, error)) error {
		s := declaredDigest{Hash: digestHashes[algorithm]()}
		var err error
		if s.want, err = decode(value); err != nil || len(s.want) != s.Size() {
			return newProblem(http.StatusBadRequest, "%s: the value of %s is not %d bytes in the header's encoding", header, algorithm, s.Size())
		}
		if other, twice := declared[algorithm]; twice && !bytes.Equal(other.want, s.want) {
			return errChecksum // it cannot have both
		}
		declared[algorithm] = s
		return nil
	}
	var errs []error
	for _, d := range []struct {
		header, algorithm string
		decode            func(string) ([]byte, error)
	}{{"X-Checksum-Md5", "md5", hex.DecodeString}, {"X-Checksum-Sha1", "sha", hex.DecodeString}, {"X-Checksum-Sha256", "sha-256", hex.DecodeString}, {"Content-Md5", "md5", base64.StdEncoding.DecodeString}} {
		for _, v := range h.Values(d.header) {
			errs = append(errs, add(d.header, d.algorithm, v, d.decode))
		}
	}
	for _, header := range []string{"Content-Digest", "Repr-Digest", "Digest"} {
		for part := range strings.SplitSeq(strings.Join(h.Values(header), ","), ",") {
			part, _, _ = strings.Cut(part, ";") // parameters have no meaning
			name, v, _ := strings.Cut(strings.TrimSpace(part), "=")
			if name = strings.ToLower(name); digestHashes[name] != nil {
				errs = append(errs, add(header, name, strings.Trim(v, ": "), base64.StdEncoding.DecodeString))
			}
		}
	}
	return slices.Collect(maps.Values(declared)), cmp.Or(errs...)
}

// authorizeWrite returns nil if the request has API_TOKEN or the repository's
// write_token ("": it has none), as the token of Authorization: Bearer or as the
// password of Basic, which more clients can send. Its error is 403 if there is no
// token at all, since no client can then write, else 401. The body is not read.
func (a *api) authorizeWrite(r *http.Request, writeToken secret) error {
	if a.token == "" && writeToken == "" {
		return newProblem(http.StatusForbidden, "writing is disabled: set API_TOKEN in the server's environment (or write_token of a local repository in remotes.yaml)")
	}
	_, given, isBasic := r.BasicAuth()
	if scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " "); !isBasic && strings.EqualFold(scheme, "Bearer") {
		given = strings.TrimSpace(token)
	}
	sum := sha256.Sum256([]byte(given)) // ConstantTimeCompare returns at once for different lengths
	for _, token := range []secret{a.token, writeToken} {
		want := sha256.Sum256([]byte(token))
		if token != "" && subtle.ConstantTimeCompare(sum[:], want[:]) == 1 {
			return nil
		}
	}
	return &problem{status: http.StatusUnauthorized, detail: "a valid token is needed: Authorization: Bearer TOKEN, or the token as the password of Basic",
		headers: http.Header{"Www-Authenticate": {`Bearer realm="artifactapi"`, `Basic realm="artifactapi"`}}}
}

// serveArtifacts serves /artifacts/{remote} and /artifacts/{remote}/{path}: GET
// lists what is stored, DELETE purges. A name that is no remote any more will do as long
// as files of it are stored.
func (a *api) serveArtifacts(w *response, r *http.Request, rest string) error {
	name, escaped := cutElement(rest)
	rem := a.config().remotes[name]
	if rem == nil { // it may have been one
		totals, err := a.cache.index.totals(r.Context(), false)
		if err != nil {
			return err
		}
		if totals[name].Files == 0 { // and not be a label of logs and counters
			return newProblem(http.StatusNotFound, "there is no remote %.100q in remotes.yaml, and nothing is stored under that name", name)
		}
		rem = &remote{name: name}
	}
	w.remote = name
	switch {
	case r.Method == http.MethodDelete:
		return a.servePurge(w, r, rem, escaped)
	case escaped != "":
		return allowMethods(r, http.MethodDelete)
	}
	if err := allowMethods(r, http.MethodGet, http.MethodHead, http.MethodDelete); err != nil {
		return err
	}
	return a.serveList(w, r, rem)
}

// listedArtifact is one file in a listing. Its JSON is part of the API.
type listedArtifact struct {
	Path        string     `json:"path"`
	Key         string     `json:"key"`
	Size        int64      `json:"size"`
	SHA256      string     `json:"sha256"`
	ContentType string     `json:"content_type"`
	Source      string     `json:"source,omitempty"`  // base_url and path, without the query, in which a token may be; "" for a local repository
	Variant     string     `json:"variant,omitempty"` // hash of the query; "": it had none
	FetchedAt   time.Time  `json:"fetched_at"`
	LastAccess  time.Time  `json:"last_access"`
	Hits        int64      `json:"hits"`
	Class       class      `json:"class"`
	ExpiresAt   *time.Time `json:"expires_at"` // null: never
	Fresh       bool       `json:"fresh"`      // it is served without asking the upstream
}

// maxPage bounds the files on a page, which has some 6 MB then.
const maxPage = 10_000

// serveList sends a page of the files that are stored of a remote, in byte order of their
// decoded paths, as the query says with prefix, pattern, limit and after.
func (a *api) serveList(w *response, r *http.Request, rem *remote) error {
	v := r.URL.Query()
	q := pageQuery{remote: rem.name, prefix: v.Get("prefix"), after: v.Get("after")}
	var err error
	if q.limit, err = strconv.Atoi(cmp.Or(v.Get("limit"), "1000")); err != nil || q.limit < 1 || q.limit > maxPage {
		return newProblem(http.StatusBadRequest, "limit must be a number from 1 to %d", maxPage)
	}
	if q.pattern, err = compilePattern(v.Get("pattern")); err != nil {
		return err
	}
	a.cache.awaitStored(r.Context(), rem.name)
	end, sep, incomplete := "],\n", "", ""
	for left := q.limit; left > 0; { // written as it is read: a client that reads slowly holds a part
		q.limit = min(left, listPageSize)
		p, err := a.cache.index.listPage(r.Context(), q)
		if err != nil {
			return err
		}
		if w.status == 0 {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(w, "{\n  \"remote\": %q,\n  \"artifacts\": [", rem.name)
		}
		for _, row := range p.rows {
			text, err := json.MarshalIndent(a.newListedArtifact(r, rem, row), "    ", "  ")
			if err != nil {
				return err
			}
			fmt.Fprintf(w, "%s\n    %s", sep, text)
			end, sep = "\n  ],\n", ","
		}
		if !p.complete {
			incomplete = "  \"complete\": false,\n"
		}
		left, q.after = left-len(p.rows), p.next
		if p.next == "" {
			break
		}
	}
	next := []byte("null")
	if q.after != "" {
		next, _ = json.Marshal(q.after) // ?after= of the next page
	}
	fmt.Fprintf(w, "%s%s  \"next\": %s\n}\n", end, incomplete, next)
	return nil
}

// A client's pattern is bounded, because it is matched with all paths of a remote: in
// bytes, and in instructions of its program, of which 130 bytes can make 100,000.
const (
	maxPatternBytes = 512
	maxPatternSize  = 1000
)

// compilePattern compiles a client's regular expression. It returns nil for "", and a
// 400 problem for a wrong one and for one that is too large.
func compilePattern(s string) (*regexp.Regexp, error) {
	if s == "" {
		return nil, nil
	}
	if len(s) > maxPatternBytes {
		return nil, newProblem(http.StatusBadRequest, "pattern has more than %d bytes", maxPatternBytes)
	}
	tree, err := syntax.Parse(s, syntax.Perl)
	if e, ok := errors.AsType[*syntax.Error](err); ok { // without the pattern: it is from a query, which must not be in the log
		return nil, newProblem(http.StatusBadRequest, "pattern is not a valid regular expression (RE2 syntax): %s", e.Code)
	}
	isTooLarge := countNodes(tree) > 2*maxPatternSize // then its program would be too large, and take 100 MB to make
	if !isTooLarge {
		prog, _ := syntax.Compile(tree.Simplify()) // what is parsed can be compiled
		isTooLarge = len(prog.Inst) > maxPatternSize
	}
	if isTooLarge {
		return nil, newProblem(http.StatusBadRequest, "pattern is too large: shorten its repetitions ({n,m})")
	}
	return regexp.Compile(s)
}

// countNodes counts the characters, classes and operators of a pattern whose repetitions are
// written out. All but a concatenation are an instruction at least.
func countNodes(re *syntax.Regexp) (n int) {
	for _, sub := range re.Sub {
		n += countNodes(sub)
	}
	switch re.Op {
	case syntax.OpRepeat:
		return n * max(re.Min, re.Max, 1)
	case syntax.OpLiteral:
		return len(re.Rune)
	}
	return n + 1
}

// newListedArtifact returns an index row as a listing shows it.
func (a *api) newListedArtifact(r *http.Request, rem *remote, row indexRow) listedArtifact {
	e := listedArtifact{Path: decodePath(row.Path), Key: row.Key, Size: row.Size, SHA256: row.SHA256,
		ContentType: contentTypeOf(decodePath(row.Path), row.ContentType), FetchedAt: row.Fetched.UTC(),
		LastAccess: row.LastAccess.UTC(), Hits: row.Hits, Class: row.Class, Fresh: true}
	if _, query, hasQuery := strings.Cut(row.Path, "?"); hasQuery {
		sum := sha256.Sum256([]byte(query))
		e.Variant = hex.EncodeToString(sum[:8])
	}
	if len(rem.origins) > 0 {
		base := rem.shownURL(0) + "/"
		if rem.packageType == "docker" {
			base += "v2/"
		}
		e.Source = base + trimSuffixes(row.Path)
	}
	if until, forever := a.cache.expiryOf(r.Context(), rem, row); !forever {
		e.ExpiresAt, e.Fresh = &until, a.now().Before(until)
	}
	return e
}

// servePurge removes the file at one path and all its query variants: 204, or 404 if
// nothing was stored there. Without a path it removes the files whose decoded path
// matches ?pattern=, and answers how many. Fills of them that run are not stored.
func (a *api) servePurge(w *response, r *http.Request, rem *remote, escaped string) error {
	if err := a.authorizeWrite(r, ""); err != nil {
		return err
	}
	if escaped == "" {
		query, queryErr := url.ParseQuery(r.URL.RawQuery)
		re, err := compilePattern(query.Get("pattern"))
		if err != nil {
			return err
		}
		if re == nil || queryErr != nil || len(query) > 1 { // ?prefix= of a listing would be passed over
			return newProblem(http.StatusBadRequest, "the query must say what to purge, and nothing else: ?pattern=REGEX (\".\" purges everything)")
		}
		purged, err := a.cache.purgeMatching(r.Context(), pageQuery{remote: rem.name, pattern: re})
		if err != nil {
			return err
		}
		return writeJSON(w, map[string]int{"purged": purged})
	}
	path, spelling, err := spellPath(escaped, "")
	if err != nil {
		return err
	}
	w.path = path
	if rem.packageType == "docker" {
		spelling = path // see newTarget
	}
	switch purged, err := a.cache.purgePath(r.Context(), target{remote: rem, path: path, spelling: spelling}); {
	case err != nil:
		return err
	case purged == 0:
		return newProblem(http.StatusNotFound, "nothing is stored at this path")
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// serveHealth serves /health. It answers 200 even when a backend is down, because
// stored files are still served, and 503 only while the server is draining.
func (a *api) serveHealth(w *response, _ *http.Request) error {
	h := a.health()
	w.quiet = true // probes come every few seconds and would fill the log
	if h.draining {
		return newProblem(http.StatusServiceUnavailable, "draining: the server is shutting down")
	}
	return writeJSON(w, h)
}

// serveConfig serves /config: remotes.yaml and the environment in force, without what is
// secret in them.
func (a *api) serveConfig(w *response, _ *http.Request) error {
	v := a.config().publicView()
	v["settings"] = a.settings
	return writeJSON(w, v)
}

// serveMetrics serves /metrics in Prometheus' text format.
func (a *api) serveMetrics(w *response, r *http.Request) error {
	w.quiet = true // Prometheus asks several times a minute
	health := a.health()
	cfg := a.config()
	up, remoteUp, failing, bytes, files := map[string]float64{}, map[string]float64{}, map[string]float64{}, map[string]float64{}, map[string]float64{}
	for name, state := range health.Backends {
		up[name] = boolNumber(state != "down")
	}
	totals, err := a.cache.index.totals(r.Context(), false)
	for _, name := range cfg.names {
		if !cfg.remotes[name].local {
			remoteUp[name] = boolNumber(cfg.remotes[name].sealed || !a.cache.upstream.isInOutage(name))
			failing[name] = float64(len(a.cache.upstream.failingOrigins(cfg.remotes[name])))
		}
		if err == nil { // without the index, the other series are still sent
			bytes[name], files[name] = 0, 0
		}
	}
	for name, t := range totals {
		bytes[name], files[name] = float64(t.Bytes), float64(t.Files)
	}
	known := slices.Concat(a.gauges(), a.cache.fills.gauges(cfg.names), a.cache.generations.families(cfg))
	known = append(known,
		newGauge("artifactapi_missed_files", "Files that /missed lists: what sealed remotes, and those with would_miss, do not have.", float64(a.cache.missed.count())),
		newCounter("artifactapi_evictions_total", "Files removed for space.", float64(a.cache.evictor.evictedFiles.Load())),
		newCounter("artifactapi_evicted_bytes_total", "Bytes of files removed for space.", float64(a.cache.evictor.evictedBytes.Load())),
		family{"artifactapi_build_info", "gauge", "What is running; always 1.", "version", map[string]float64{a.version: 1}},
		newGauge("process_start_time_seconds", "When the process started, in seconds since 1970.", float64(a.started.UnixMilli())/1000),
		newGauge("artifactapi_config_last_reload_successful", "1 unless the last reload of the configuration was rejected.", boolNumber(health.Configuration == "")),
		newGauge("artifactapi_config_last_reload_success_timestamp_seconds", "When the configuration in force was loaded, in seconds since 1970.", float64(health.configLoaded)),
		family{"artifactapi_backend_up", "gauge", "1 if the backend can be used, else 0.", "backend", up},
		family{"artifactapi_remote_up", "gauge", "1 unless the remote counts as unreachable.", "remote", remoteUp},
		family{"artifactapi_failing_origins", "gauge", "Of base_url and mirrors, those that fail while others stand in.", "remote", failing},
		family{"artifactapi_stored_bytes", "gauge", "Bytes stored.", "remote", bytes},
		family{"artifactapi_stored_files", "gauge", "Files stored.", "remote", files})
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	return a.metrics.writeExposition(w, cfg.names, known)
}

// serveMissed serves /missed: GET lists missed files, a JSON object on each line, and
// DELETE forgets them. ?remote= chooses those of one remote.
func (a *api) serveMissed(w *response, r *http.Request) error {
	name := r.URL.Query().Get("remote")
	if name != "" && a.config().remotes[name] == nil { // an empty list would say that nothing is missing
		return newProblem(http.StatusNotFound, "there is no remote %.100q in remotes.yaml", name)
	}
	if r.Method == http.MethodDelete {
		if err := a.authorizeWrite(r, ""); err != nil {
			return err
		}
		a.cache.missed.forget(name)
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	lines := json.NewEncoder(w)
	for _, f := range a.cache.missed.list(name) {
		if lines.Encode(f) != nil {
			break // the client has left, which w remembers
		}
	}
	return nil
}
