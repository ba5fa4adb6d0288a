// registry.go: container registries below /v2/ (OCI distribution
// specification). It says what a registry path means; fetching, storing and
// expiry are the cache's.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
)

const (
	// maxManifest is twice what the specification makes registries take.
	maxManifest = 8 << 20
	// maxList bounds tag lists and referrers: one page may name a great many.
	maxList = 32 << 20
	// maxTag is the specification's.
	maxTag = 128
	// maxNextLink bounds the path of a list plus the query of its next page: a
	// record must fit S3's 2 KB. Dropping the link would cut the list short.
	maxNextLink = 1024
	// maxBlobSizes bounds each of the two tables of blob sizes, some 250 bytes an
	// entry: the layers of a thousand images or so.
	maxBlobSizes = 10_000
)

// Media types of the specification and of Docker before it.
const (
	typeIndex      = "application/vnd.oci.image.index.v1+json"
	typeManifest   = "application/vnd.oci.image.manifest.v1+json"
	typeDockerList = "application/vnd.docker.distribution.manifest.list.v2+json"
	typeDocker     = "application/vnd.docker.distribution.manifest.v2+json"
	typeBinary     = "application/octet-stream"
	typeJSON       = "application/json"
)

// acceptManifests is sent for every manifest, whatever the client accepts: one
// tag is one entry, and what is stored must not depend on who asked first.
const acceptManifests = typeIndex + ", " + typeManifest + ", " + typeDockerList + ", " + typeDocker + ", */*;q=0.5"

// emptyIndex answers for referrers where the upstream has none.
const emptyIndex = `{"schemaVersion":2,"mediaType":"` + typeIndex + `","manifests":[]}`

// The error codes of the specification, and two that Docker's registry added.
const (
	codeManifestUnknown = "MANIFEST_UNKNOWN"
	codeManifestInvalid = "MANIFEST_INVALID"
	codeBlobUnknown     = "BLOB_UNKNOWN"
	codeNameUnknown     = "NAME_UNKNOWN"
	codeNameInvalid     = "NAME_INVALID"
	codeDigestInvalid   = "DIGEST_INVALID"
	codeDenied          = "DENIED"
	codeUnsupported     = "UNSUPPORTED"
	codeTooManyRequests = "TOOMANYREQUESTS"
	codeUnavailable     = "UNAVAILABLE"
	codeUnknown         = "UNKNOWN"
)

// registryRoute is what a registry path asks for.
type registryRoute string

const (
	routePing      registryRoute = ""
	routeManifest  registryRoute = "manifests"
	routeBlob      registryRoute = "blobs"
	routeTags      registryRoute = "tags"
	routeReferrers registryRoute = "referrers"
)

// registryCall is one request to the registry, understood.
type registryCall struct {
	remote    *remote
	image     string // as upstream names it
	route     registryRoute
	reference string // tag or digest
	digest    string // ref, if it is one
	query     string // what goes upstream, normalised
	ns        string // what the client's ns said
	path      string // as the client sent it
}

// registry serves /v2/... and /{remote}/v2/...; its fields do not change.
type registry struct {
	cache     *cache
	config    func() *config // the one in force; a request asks once
	responder *responder
	sizes     *blobSizes
}

func newRegistry(c *cache, config func() *config, s *responder) *registry {
	return &registry{cache: c, config: config, responder: s, sizes: &blobSizes{}}
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.responder.serveRequest(w, r, g.serveCall, writeRegistryError)
}

// serveCall answers one request. Reading is never challenged.
func (g *registry) serveCall(w *response, r *http.Request) error {
	w.Header()["Docker-Distribution-Api-Version"] = apiVersion
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return &registryError{codeUnsupported, nil, &problem{status: http.StatusMethodNotAllowed, allow: "GET, HEAD",
			detail: "this registry is a mirror: images are pushed to the registry behind it"}}
	}
	c, err := parseCall(g.config(), r.URL)
	if c.remote != nil {
		w.remote, w.path = c.remote.name, c.image
	}
	if err != nil {
		return err
	}
	if c.ns != "" {
		w.Header()["Oci-Namespace"] = []string{c.ns}
	}
	if c.route == routePing {
		w.Header().Set("Content-Type", typeJSON)
		_, _ = io.WriteString(w, "{}") // as registries write it, without a line's end
		return nil
	}
	file, err := g.newFileRequest(c)
	if err == nil {
		err = g.cache.serveFile(w, r, file)
	}
	if err != nil {
		return c.withErrorCode(err)
	}
	return nil
}

// Header values that never change, shared by all answers.
var (
	apiVersion    = []string{"registry/2.0"}
	filterApplied = []string{"artifactType"}
)

// newFileRequest is what the cache has to find for c.
func (g *registry) newFileRequest(c *registryCall) (fileRequest, error) {
	var file fileRequest
	switch c.route {
	case routeManifest:
		file = g.manifestRequest(c)
	case routeBlob:
		file = g.blobRequest(c)
	case routeTags:
		file = g.tagsRequest(c)
	default:
		file = g.referrersRequest(c)
	}
	file.scope = "repository:" + c.image + ":pull"
	if len(file.wire) > maxSpelling {
		return file, newTooLongError()
	}
	var err error
	file.class, file.builtin, err = c.remote.classifyPath(file.path)
	return file, err
}

// newTarget is c's file: path is what patterns see. Registries are asked with ":"
// as it is (some refuse it escaped), and the record has it so too.
func (c *registryCall) newTarget(path string) target {
	t := target{remote: c.remote, path: path, spelling: path}
	if c.query != "" {
		t.spelling += "?" + c.query
	}
	t.wire = "v2/" + t.spelling
	return t
}

// manifestRequest wants a manifest, by tag or by digest.
func (g *registry) manifestRequest(c *registryCall) fileRequest {
	return fileRequest{
		target: c.newTarget(c.image + "/manifests/" + c.reference), accept: acceptManifests, digest: c.digest,
		maxBytes: maxManifest, needsWholeBody: true, staleOn429: true, note: keepDigest,
		check: func(ctx context.Context, rec *record, body io.ReaderAt) error {
			return g.checkManifest(ctx, c, rec, body)
		},
		dress: c.setHeaders,
	}
}

// blobRequest wants a blob: one copy for all images of the remote that have it.
func (g *registry) blobRequest(c *registryCall) fileRequest {
	file := fileRequest{target: c.newTarget(c.image + "/blobs/" + c.reference), digest: c.digest, sharedKey: true, dress: c.setHeaders}
	file.spelling = "blobs/" + c.reference
	file.knownSize = g.sizes.get(c.sizeKey(c.digest))
	return file
}

// tagsRequest wants a page of a list of tags.
func (g *registry) tagsRequest(c *registryCall) fileRequest {
	// An empty repository's list is null at some registries.
	return fileRequest{target: c.newTarget(c.image + "/tags/list"), accept: typeJSON, maxBytes: maxList, needsWholeBody: true,
		staleOn429: true, note: keepPageHeaders, check: checkList("tags"), dress: c.setHeaders}
}

// referrersRequest wants the manifests that refer to a digest.
func (g *registry) referrersRequest(c *registryCall) fileRequest {
	return fileRequest{target: c.newTarget(c.image + "/referrers/" + c.reference), accept: acceptManifests, maxBytes: maxList, needsWholeBody: true,
		staleOn429: true, staleOn5xx: true, note: keepPageHeaders, check: checkList("manifests"), dress: c.setHeaders,
		ask: func(ctx context.Context, req upstreamRequest) (*upstreamResponse, error) {
			return g.askReferrers(ctx, c, req)
		}}
}

// askReferrers asks for referrers: by the API, by the tag that stands in for it
// at registries without one, or else there are none. Denials, 429 and failures
// are no such answer.
func (g *registry) askReferrers(ctx context.Context, c *registryCall, req upstreamRequest) (*upstreamResponse, error) {
	resp, err := g.cache.upstream.send(ctx, req)
	if err != nil || !saysAbsent(resp.StatusCode) {
		return resp, err
	}
	resp.discardBody()
	algorithm, sum, _ := strings.Cut(c.digest, ":")
	req.wire = "v2/" + c.image + "/manifests/" + algorithm + "-" + sum[:64]
	resp, err = g.cache.upstream.send(ctx, req)
	if err != nil || !saysAbsent(resp.StatusCode) {
		return resp, err
	}
	resp.discardBody()
	return &upstreamResponse{origin: resp.origin, Response: &http.Response{
		StatusCode: http.StatusOK, ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{"Content-Type": {typeIndex}},
		ContentLength: int64(len(emptyIndex)), Body: io.NopCloser(strings.NewReader(emptyIndex)),
	}}, nil
}

// saysAbsent reports whether a registry said that it has no such thing, or no such
// API.
func saysAbsent(status int) bool {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests:
		return false
	}
	return status >= 400 && status < 500
}

// keepDigest keeps a digest that is longer than most headers may be.
func keepDigest(rec *record, h http.Header) {
	if rec.Digest = h.Get("Docker-Content-Digest"); !isDigest(rec.Digest) {
		rec.Digest = ""
	}
}

// keepPageHeaders keeps what a list says about itself in its headers.
func keepPageHeaders(rec *record, h http.Header) {
	rec.Link = nextPageQuery(h.Values("Link"))
	if h.Get("OCI-Filters-Applied") == filterApplied[0] {
		rec.Filters = filterApplied[0]
	}
}

// nextPageQuery is the query of the page that Link headers (RFC 8288) name as the
// next one, normalised; "" if there is none. Its path is the list's own,
// however upstream writes it.
func nextPageQuery(links []string) string {
	for _, l := range links {
		for {
			_, rest, ok := strings.Cut(l, "<")
			ref, rest, closed := strings.Cut(rest, ">")
			if !ok || !closed {
				break
			}
			params := rest
			if i := strings.IndexByte(rest, '<'); i >= 0 {
				params = rest[:i]
			}
			if hasRelNext(params) {
				return queryOfReference(ref)
			}
			l = rest
		}
	}
	return ""
}

// hasRelNext looks for rel=next among the parameters of a link.
func hasRelNext(params string) bool {
	for p := range strings.FieldsFuncSeq(params, func(r rune) bool { return r == ';' || r == ',' }) {
		name, value, _ := strings.Cut(strings.TrimSpace(p), "=")
		if !strings.EqualFold(strings.TrimSpace(name), "rel") {
			continue
		}
		rels := strings.Fields(strings.Trim(strings.TrimSpace(value), `"`))
		return slices.ContainsFunc(rels, func(rel string) bool { return strings.EqualFold(rel, "next") })
	}
	return false
}

// queryOfReference is the query of a reference, in our order and without ns, which
// is between a client and us.
func queryOfReference(ref string) string {
	u, err := url.Parse(ref)
	if err != nil {
		return ""
	}
	query, _ := url.ParseQuery(u.RawQuery)
	query.Del("ns")
	return query.Encode()
}

// manifest is what is read of a manifest or an index.
type manifest struct {
	SchemaVersion json.RawMessage `json:"schemaVersion"`
	MediaType     string          `json:"mediaType"`
	Config        *descriptor     `json:"config"`
	Layers        []descriptor    `json:"layers"`
	Manifests     json.RawMessage `json:"manifests"`
}

type descriptor struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// checkManifest looks at a complete manifest: a tag's must be one, since no
// digest vouches for it. It is stored under its digest as well, before the tag
// is answered, because that is what clients ask for next.
func (g *registry) checkManifest(ctx context.Context, c *registryCall, rec *record, body io.ReaderAt) error {
	text, err := readWholeBody(rec, body)
	if err != nil {
		return err
	}
	var m manifest
	_ = json.Unmarshal(text, &m) // leaves m empty where the text is no JSON
	if c.digest == "" && len(m.SchemaVersion) == 0 {
		return newNotAManifestError(c.remote, "a manifest", rec)
	}
	rec.ContentType = m.mediaType(rec.ContentType)
	g.rememberSizes(c, &m)
	if c.digest != "" {
		rec.Digest = c.digest
		return nil
	}
	rec.Digest = manifestDigest(text, rec.Digest)
	t := c.newTarget(c.image + "/manifests/" + rec.Digest)
	t.class = immutable
	g.cache.storeUnderSecondKey(ctx, t, rec, body)
	return nil
}

// readWholeBody is a whole body that want.limit has kept small.
func readWholeBody(rec *record, body io.ReaderAt) ([]byte, error) {
	text, err := io.ReadAll(io.NewSectionReader(body, 0, rec.Size))
	if err != nil {
		return nil, fmt.Errorf("%w: reading the spool: %w", errStoreDown, err)
	}
	return text, nil
}

// newNotAManifestError says that a body with status 200 is not what was asked for: a login
// page, as a rule.
func newNotAManifestError(r *remote, what string, rec *record) error {
	return &registryError{codeManifestInvalid, nil, &problem{status: http.StatusBadGateway, cause: errBadUpstream,
		detail: fmt.Sprintf("the upstream of remote %q answered with something else than %s (type %.100q)", r.name, what, rec.ContentType)}}
}

// mediaType is a manifest's type: upstream's where that says something, else
// what the manifest calls itself or looks like.
func (m *manifest) mediaType(upstream string) string {
	if strings.HasPrefix(upstream, "application/vnd.") {
		return upstream
	}
	if _, _, err := mime.ParseMediaType(m.MediaType); err == nil && boundedHeader(m.MediaType) != "" {
		return m.MediaType
	}
	switch {
	case len(m.Manifests) > 0:
		return typeIndex
	case m.Config != nil:
		return typeManifest
	case upstream != "":
		return upstream
	}
	return typeJSON
}

// manifestDigest is the digest of a tag's manifest: by SHA-256, unless upstream knows
// it by its SHA-512. What upstream says otherwise does not count.
func manifestDigest(text []byte, upstream string) string {
	s := newBodyHash(upstream)
	s.Write(text)
	if upstream != "" && s.verifyDigest(upstream) == nil {
		return upstream
	}
	return "sha256:" + s.sumHex()
}

// rememberSizes keeps the sizes of an image's blobs for HEAD.
func (g *registry) rememberSizes(c *registryCall, m *manifest) {
	if m.Config != nil {
		m.Layers = append(m.Layers, *m.Config)
	}
	for _, d := range m.Layers {
		if isDigest(d.Digest) && d.Size > 0 {
			g.sizes.put(c.sizeKey(d.Digest), d.Size)
		}
	}
}

// sizeKey names a blob of one image: another image may not have it.
func (c *registryCall) sizeKey(digest string) string {
	return c.remote.name + "/" + c.image + "@" + digest
}

// blobSizes remembers what manifests say about the size of blobs, the latest
// maxBlobSizes at least. After a restart HEAD of a blob that is not stored asks
// upstream, as it would without.
type blobSizes struct {
	mu         sync.Mutex // guards what follows
	young, old map[string]int64
}

func (s *blobSizes) put(key string, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.young == nil || len(s.young) >= maxBlobSizes {
		s.young, s.old = map[string]int64{}, s.young
	}
	s.young[key] = size
}

// get is the size of a blob, or 0.
func (s *blobSizes) get(key string) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.young[key]; n > 0 {
		return n
	}
	return s.old[key]
}

// checkList keeps anything but a JSON object with that member, an array or
// null, out of the store.
func checkList(member string) func(context.Context, *record, io.ReaderAt) error {
	return func(_ context.Context, rec *record, body io.ReaderAt) error {
		text, err := readWholeBody(rec, body)
		if err != nil {
			return err
		}
		var o map[string]json.RawMessage
		err = json.Unmarshal(text, &o)
		list, ok := o[member]
		if err != nil || !ok || list[0] != '[' && string(list) != "null" {
			return newRegistryError(codeUnknown, http.StatusBadGateway, "the upstream of remote %q answered with something else than %s (type %.100q)", rec.Remote, member, rec.ContentType)
		}
		if len(rec.Link)+len(rec.Path) > maxNextLink {
			return newRegistryError(codeUnknown, http.StatusBadGateway, "the upstream of remote %q has a link to the next page that is too long", rec.Remote)
		}
		return nil
	}
}

// setHeaders sets the headers of an answer.
func (c *registryCall) setHeaders(h http.Header, rec *record) {
	t := rec.ContentType
	switch c.route {
	case routeManifest, routeBlob:
		d := c.digest
		if d == "" {
			d = rec.Digest
		}
		h["Docker-Content-Digest"] = []string{d}
		if t == "" {
			t = typeBinary
		}
	case routeTags:
		if !strings.Contains(t, "json") {
			t = typeJSON
		}
	case routeReferrers:
		t = typeIndex
	}
	h["Content-Type"] = []string{t}
	if rec.Link != "" {
		h["Link"] = []string{c.nextLink(rec.Link)}
	}
	if rec.Filters != "" {
		h["Oci-Filters-Applied"] = filterApplied
	}
}

// nextLink is the Link to a list's next page, in the shape the client used. It has
// the whole path because some clients do not resolve references (skopeo).
func (c *registryCall) nextLink(query string) string {
	if c.ns != "" {
		query += "&ns=" + url.QueryEscape(c.ns)
	}
	return "<" + c.path + "?" + query + `>; rel="next"`
}

// registryError is an error with its code of the specification.
type registryError struct {
	code   string
	detail any // for "detail" of the answer; may be nil
	err    error
}

func (e *registryError) Error() string { return e.err.Error() }
func (e *registryError) Unwrap() error { return e.err }

// newRegistryError makes a coded error.
func newRegistryError(code string, status int, format string, args ...any) error {
	return &registryError{code, nil, newProblem(status, format, args...)}
}

func newNoRouteError() error {
	return newRegistryError(codeUnsupported, http.StatusNotFound, "there is no such path here; images are below /v2/REMOTE/")
}

// newUnknownNameError says that nothing here has that name, and where the remote lives
// that has it but is no registry.
func newUnknownNameError(cfg *config, name, ns string) error {
	p := &problem{status: http.StatusNotFound, cause: fs.ErrNotExist}
	e := &registryError{code: codeNameUnknown, err: p}
	switch r := cfg.remotes[name]; {
	case r != nil && r.packageType == "docker":
		p.detail = fmt.Sprintf("name an image behind the remote: /v2/%s/IMAGE/...", name)
	case r != nil:
		p.detail = fmt.Sprintf("remote %q is no container registry: it is below %s", name, r.urlPath())
		e.detail = map[string]string{"location": r.urlPath()}
	case ns != "":
		p.detail = fmt.Sprintf("there is neither a registry remote %.100q nor one whose registry is %.100q", name, ns)
	default:
		p.detail = fmt.Sprintf("there is no registry remote %.100q", name)
	}
	return e
}

// withErrorCode gives an error of the cache its code, and the status that the
// registry's specification has for it.
func (c *registryCall) withErrorCode(err error) error {
	if _, ok := errors.AsType[*registryError](err); ok {
		return err
	}
	status, detail := statusAndDetail(err)
	upstream, _ := errors.AsType[*upstreamStatus](err)
	e := &registryError{code: codeUnknown, err: err}
	change := status
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.code, change = c.notFoundCode(), http.StatusNotFound
	case upstream != nil && upstream.code == http.StatusUnauthorized, status == http.StatusForbidden:
		e.code, change = codeDenied, http.StatusForbidden
	case upstream != nil && upstream.code == http.StatusTooManyRequests, errors.Is(err, errBusy):
		e.code = codeTooManyRequests
	case errors.Is(err, errTooLarge) && c.route == routeManifest:
		e.code = codeManifestInvalid
	case errors.Is(err, errTooLong):
		e.code = codeNameInvalid
	case status >= 500 && status != http.StatusInternalServerError:
		e.code = codeUnavailable
	}
	if change != status {
		e.err = &problem{status: change, detail: detail, cause: err}
	}
	return e
}

// notFoundCode is the code for what c asks for where it is not there.
func (c *registryCall) notFoundCode() string {
	switch c.route {
	case routeManifest:
		return codeManifestUnknown
	case routeBlob:
		return codeBlobUnknown
	}
	return codeNameUnknown
}

// writeRegistryError is the registry's errorWriter.
func writeRegistryError(w http.ResponseWriter, status int, message string, err error) {
	type one struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Detail  any    `json:"detail"`
	}
	e := one{Code: codeUnknown, Message: message}
	if c, ok := errors.AsType[*registryError](err); ok {
		e.Code, e.Detail = c.code, c.detail
	}
	b, _ := json.Marshal(map[string][]one{"errors": {e}}) // what is ours always encodes
	w.Header()["Docker-Distribution-Api-Version"] = apiVersion
	sendJSON(w, status, b)
}
