// registry.go: serves container registries below /v2/, a read-only part of the OCI
// distribution specification. It decides what a registry request asks for and what
// its answer looks like; the cache fetches, stores and expires the files.

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
	// maxManifest bounds a manifest in bytes. It is twice the 4 MiB that the
	// specification wants registries to accept, since some accept more.
	maxManifest = 8 << 20
	// maxList bounds a page of tags or referrers in bytes. Some registries send
	// all tags of an image in one page.
	maxList = 32 << 20
	// maxTag is the longest tag that the specification allows.
	maxTag = 128
	// maxNextLink bounds the path of a list plus the query of its next page, in
	// bytes: both are in the record, which must fit the 2 KB of metadata of an S3
	// object. A list with a longer link is an error, because without the link
	// clients would take a part of the list for all of it.
	maxNextLink = 1024
	// maxBlobSizes bounds each of the two tables of blob sizes. An entry has some
	// 250 bytes; 10,000 are the layers of about a thousand images.
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

// acceptManifests is the Accept header for every manifest, whatever the client
// accepts: a tag has one stored copy, which must not depend on the client that asked
// for it first.
const acceptManifests = typeIndex + ", " + typeManifest + ", " + typeDockerList + ", " + typeDocker + ", */*;q=0.5"

// emptyIndex is the list of referrers where the upstream has none.
const emptyIndex = `{"schemaVersion":2,"mediaType":"` + typeIndex + `","manifests":[]}`

// The error codes of the specification. UNAVAILABLE and UNKNOWN are Docker's own
// additions to it.
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

// registryRoute says what a registry path asks for. Its value is the path element
// that names it.
type registryRoute string

const (
	routePing      registryRoute = ""
	routeManifest  registryRoute = "manifests"
	routeBlob      registryRoute = "blobs"
	routeTags      registryRoute = "tags"
	routeReferrers registryRoute = "referrers"
)

// registryCall is one parsed request to the registry.
type registryCall struct {
	remote    *remote
	image     string // as the upstream names it
	route     registryRoute
	reference string // tag or digest
	digest    string // reference, if that is a digest; else ""
	query     string // the query to send upstream, normalised
	ns        string // the client's ns parameter: the registry that a mirror stands for
	path      string // escaped, as the client sent it
}

// registry serves /v2/... and /{remote}/v2/.... Its fields do not change after
// newRegistry.
type registry struct {
	cache     *cache
	config    func() *config // the configuration in force; a request calls it once
	responder *responder
	sizes     *blobSizes
}

// newRegistry makes a registry over the cache c.
func newRegistry(c *cache, config func() *config, s *responder) *registry {
	return &registry{cache: c, config: config, responder: s, sizes: &blobSizes{}}
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.responder.serveRequest(w, r, g.serveCall, writeRegistryError)
}

// serveCall answers one request. It asks no client for credentials: reading is open.
func (g *registry) serveCall(w *response, r *http.Request) error {
	w.Header()["Docker-Distribution-Api-Version"] = apiVersion
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return &registryError{codeUnsupported, nil, &problem{status: http.StatusMethodNotAllowed, allow: "GET, HEAD",
			detail: "this registry is a read-only mirror: push images to the registry behind it"}}
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
		_, _ = io.WriteString(w, "{}") // without a line break, as other registries send it
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

// newFileRequest returns the cache's request for c. Its error is a problem: the path
// is too long or not allowed.
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

// newTarget returns c's file; path is the decoded path that patterns see. It is its
// own spelling: a ":" is not escaped, because some registries refuse "%3A".
func (c *registryCall) newTarget(path string) target {
	t := target{remote: c.remote, path: path, spelling: path}
	if c.query != "" {
		t.spelling += "?" + c.query
	}
	t.wire = "v2/" + t.spelling
	return t
}

// manifestRequest asks for a manifest, by tag or by digest.
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

// blobRequest asks for a blob. All images of a remote share one stored copy of it.
func (g *registry) blobRequest(c *registryCall) fileRequest {
	file := fileRequest{target: c.newTarget(c.image + "/blobs/" + c.reference), digest: c.digest, sharedKey: true, dress: c.setHeaders}
	file.spelling = "blobs/" + c.reference
	file.knownSize = g.sizes.get(c.sizeKey(c.digest))
	return file
}

// tagsRequest asks for a page of the list of an image's tags.
func (g *registry) tagsRequest(c *registryCall) fileRequest {
	return fileRequest{target: c.newTarget(c.image + "/tags/list"), accept: typeJSON, maxBytes: maxList, needsWholeBody: true,
		staleOn429: true, note: keepPageHeaders, check: checkList("tags"), dress: c.setHeaders}
}

// referrersRequest asks for the list of manifests that refer to a digest.
func (g *registry) referrersRequest(c *registryCall) fileRequest {
	return fileRequest{target: c.newTarget(c.image + "/referrers/" + c.reference), accept: acceptManifests, maxBytes: maxList, needsWholeBody: true,
		staleOn429: true, staleOn5xx: true, note: keepPageHeaders, check: checkList("manifests"), dress: c.setHeaders,
		ask: func(ctx context.Context, req upstreamRequest) (*upstreamResponse, error) {
			return g.askReferrers(ctx, c, req)
		}}
}

// askReferrers asks the upstream for referrers. A registry without the referrers API
// has them under a tag made from the digest (the specification's referrers tag
// schema). One that has neither has no referrers. A denial, a 429 and a failure do
// not say that there are none and are returned.
func (g *registry) askReferrers(ctx context.Context, c *registryCall, req upstreamRequest) (*upstreamResponse, error) {
	resp, err := g.cache.upstream.send(ctx, req)
	if err != nil || !saysAbsent(resp.StatusCode) {
		return resp, err
	}
	resp.discardBody()
	algorithm, sum, _ := strings.Cut(c.digest, ":")
	req.wire = "v2/" + c.image + "/manifests/" + algorithm + "-" + sum[:64] // 64: the schema's bound for a hash
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

// saysAbsent reports whether a status says that the registry has no such content, or
// no such API.
func saysAbsent(status int) bool {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests:
		return false
	}
	return status >= 400 && status < 500
}

// keepDigest keeps the upstream's Docker-Content-Digest in the record, if it is one.
func keepDigest(rec *record, h http.Header) {
	if rec.Digest = h.Get("Docker-Content-Digest"); !isDigest(rec.Digest) {
		rec.Digest = ""
	}
}

// keepPageHeaders keeps the headers that belong to a page of a list in its record:
// the next page, and whether the upstream has filtered referrers.
func keepPageHeaders(rec *record, h http.Header) {
	rec.Link = nextPageQuery(h.Values("Link"))
	if h.Get("OCI-Filters-Applied") == filterApplied[0] {
		rec.Filters = filterApplied[0]
	}
}

// nextPageQuery returns the normalised query of the link with rel=next in Link headers
// (RFC 8288), or "" if there is none. The link's path is not needed: the next page
// has the path of the list itself.
func nextPageQuery(links []string) string {
	for _, l := range links {
		for {
			_, rest, opened := strings.Cut(l, "<")
			ref, rest, closed := strings.Cut(rest, ">")
			if !opened || !closed {
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

// hasRelNext reports whether the parameters of a link include rel=next.
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

// queryOfReference returns the query of a URI reference, sorted and without ns, which
// clients send to mirrors and mirrors do not send upstream.
func queryOfReference(ref string) string {
	u, err := url.Parse(ref)
	if err != nil {
		return ""
	}
	query, _ := url.ParseQuery(u.RawQuery)
	query.Del("ns")
	return query.Encode()
}

// manifest holds the members of a manifest or an index that the registry reads.
type manifest struct {
	SchemaVersion json.RawMessage `json:"schemaVersion"`
	MediaType     string          `json:"mediaType"`
	Config        *descriptor     `json:"config"`
	Layers        []descriptor    `json:"layers"`
	Manifests     json.RawMessage `json:"manifests"`
}

// descriptor refers to a blob (OCI image specification).
type descriptor struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// checkManifest checks a complete manifest and completes its record. A manifest that
// was asked for by tag must look like a manifest, since no digest proves it. It is
// stored under its digest as well, before the tag is answered, because clients ask
// for the digest next.
func (g *registry) checkManifest(ctx context.Context, c *registryCall, rec *record, body io.ReaderAt) error {
	text, err := readWholeBody(rec, body)
	if err != nil {
		return err
	}
	var m manifest
	_ = json.Unmarshal(text, &m) // m stays empty if the text is not JSON
	if c.digest == "" && len(m.SchemaVersion) == 0 {
		return newNotAManifestError(c.remote, rec)
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

// readWholeBody returns a whole body, which fileRequest.maxBytes has kept small.
func readWholeBody(rec *record, body io.ReaderAt) ([]byte, error) {
	text, err := io.ReadAll(io.NewSectionReader(body, 0, rec.Size))
	if err != nil {
		return nil, fmt.Errorf("%w: reading a temporary file: %w", errStoreDown, err)
	}
	return text, nil
}

// newNotAManifestError returns the error for a body with status 200 that is not a
// manifest. Often it is a login page.
func newNotAManifestError(r *remote, rec *record) error {
	return &registryError{codeManifestInvalid, nil, &problem{status: http.StatusBadGateway, cause: errBadUpstream,
		detail: fmt.Sprintf("the upstream of remote %q did not answer with a manifest (its content type is %.100q)", r.name, rec.ContentType)}}
}

// mediaType returns a manifest's type: the upstream's if that is specific, else the
// type that the manifest declares, else the one that its members suggest.
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

// manifestDigest returns the digest of a manifest that was asked for by tag. It is
// the digest that the upstream sent if the text has it (it may be a SHA-512), else
// the SHA-256 of the text.
func manifestDigest(text []byte, upstream string) string {
	s := newBodyHash(upstream)
	s.Write(text)
	if upstream != "" && s.verifyDigest(upstream) == nil {
		return upstream
	}
	return "sha256:" + s.sumHex()
}

// rememberSizes keeps the sizes of an image's blobs, with which a HEAD of a blob that
// is not stored is answered.
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

// sizeKey returns the key of a blob's size. It includes the image: another image may
// not have the blob, and then its HEAD must be 404.
func (c *registryCall) sizeKey(digest string) string {
	return c.remote.name + "/" + c.image + "@" + digest
}

// blobSizes holds the sizes of blobs in bytes as manifests declared them, at least
// the maxBlobSizes that were added last. It is lost in a restart; without it, HEAD of
// a blob that is not stored asks the upstream.
type blobSizes struct {
	mu         sync.Mutex       // guards the fields below
	young, old map[string]int64 // by sizeKey; young becomes old when it is full
}

func (s *blobSizes) put(key string, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.young == nil || len(s.young) >= maxBlobSizes {
		s.young, s.old = map[string]int64{}, s.young
	}
	s.young[key] = size
}

// get returns the size of a blob, or 0 if it is not known.
func (s *blobSizes) get(key string) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.young[key]; n > 0 {
		return n
	}
	return s.old[key]
}

// checkList returns a check for fileRequest that accepts a JSON object whose member of
// that name is an array, or null, which some registries send for an empty repository.
func checkList(member string) func(context.Context, *record, io.ReaderAt) error {
	return func(_ context.Context, rec *record, body io.ReaderAt) error {
		text, err := readWholeBody(rec, body)
		if err != nil {
			return err
		}
		var o map[string]json.RawMessage
		err = json.Unmarshal(text, &o)
		list, found := o[member]
		if err != nil || !found || (list[0] != '[' && string(list) != "null") {
			return newRegistryError(codeUnknown, http.StatusBadGateway, "the upstream of remote %q did not answer with a list of %s (its content type is %.100q)", rec.Remote, member, rec.ContentType)
		}
		if len(rec.Link)+len(rec.Path) > maxNextLink {
			return newRegistryError(codeUnknown, http.StatusBadGateway, "the upstream of remote %q sent a link to the next page that is too long to be stored", rec.Remote)
		}
		return nil
	}
}

// setHeaders sets the headers that registry clients expect of an answer from rec.
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

// nextLink returns the Link header that names a list's next page, with the path that
// the client used. It has the whole path because some clients (skopeo) do not resolve
// relative references.
func (c *registryCall) nextLink(query string) string {
	if c.ns != "" {
		query += "&ns=" + url.QueryEscape(c.ns)
	}
	return "<" + c.path + "?" + query + `>; rel="next"`
}

// registryError is an error with its code of the specification.
type registryError struct {
	code   string
	detail any   // the member "detail" of the answer; may be nil
	err    error // gives the status and the message
}

func (e *registryError) Error() string { return e.err.Error() }
func (e *registryError) Unwrap() error { return e.err }

// newRegistryError makes an error with a code, a status and a message for the client.
func newRegistryError(code string, status int, format string, args ...any) error {
	return &registryError{code, nil, newProblem(status, format, args...)}
}

// newNoRouteError returns the error for a path that is not one of the registry API.
func newNoRouteError() error {
	return newRegistryError(codeUnsupported, http.StatusNotFound, "the registry API has no such path: images are below /v2/REMOTE/")
}

// newUnknownNameError returns the error for a path whose first element is not a docker
// remote, when ns names none either. For a remote of another package it says where
// the remote is served.
func newUnknownNameError(cfg *config, name, ns string) error {
	p := &problem{status: http.StatusNotFound, cause: fs.ErrNotExist}
	e := &registryError{code: codeNameUnknown, err: p}
	switch r := cfg.remotes[name]; {
	case r != nil && r.packageType == "docker":
		p.detail = fmt.Sprintf("the path names no image: use /v2/%s/IMAGE/...", name)
	case r != nil:
		p.detail = fmt.Sprintf("remote %q is not a container registry: its files are below %s", name, r.urlPath())
		e.detail = map[string]string{"location": r.urlPath()}
	case ns != "":
		p.detail = fmt.Sprintf("no docker remote is named %.100q, and none has the registry %.100q", name, ns)
	default:
		p.detail = fmt.Sprintf("there is no docker remote %.100q", name)
	}
	return e
}

// withErrorCode returns an error of the cache with its code, and with the status that
// the specification wants for that code.
func (c *registryCall) withErrorCode(err error) error {
	if _, ok := errors.AsType[*registryError](err); ok {
		return err
	}
	status, detail := statusAndDetail(err)
	upstream, _ := errors.AsType[*upstreamStatus](err)
	e := &registryError{code: codeUnknown, err: err}
	newStatus := status
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.code, newStatus = c.notFoundCode(), http.StatusNotFound
	case upstream != nil && upstream.code == http.StatusUnauthorized, status == http.StatusForbidden:
		e.code, newStatus = codeDenied, http.StatusForbidden
	case upstream != nil && upstream.code == http.StatusTooManyRequests, errors.Is(err, errBusy):
		e.code = codeTooManyRequests
	case errors.Is(err, errTooLarge) && c.route == routeManifest:
		e.code = codeManifestInvalid
	case errors.Is(err, errTooLong):
		e.code = codeNameInvalid
	case status >= 500 && status != http.StatusInternalServerError:
		e.code = codeUnavailable
	}
	if newStatus != status {
		e.err = &problem{status: newStatus, detail: detail, cause: err}
	}
	return e
}

// notFoundCode returns the code of a 404 for c.
func (c *registryCall) notFoundCode() string {
	switch c.route {
	case routeManifest:
		return codeManifestUnknown
	case routeBlob:
		return codeBlobUnknown
	}
	return codeNameUnknown
}

// writeRegistryError is the registry's errorWriter: it sends an error in the form of
// the specification.
func writeRegistryError(w http.ResponseWriter, status int, message string, err error) {
	type errorItem struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Detail  any    `json:"detail"`
	}
	e := errorItem{Code: codeUnknown, Message: message}
	if c, ok := errors.AsType[*registryError](err); ok {
		e.Code, e.Detail = c.code, c.detail
	}
	b, _ := json.Marshal(map[string][]errorItem{"errors": {e}}) // strings and maps of them always encode
	w.Header()["Docker-Distribution-Api-Version"] = apiVersion
	sendJSON(w, status, b)
}
