// registry.go: serves container registries below /v2/, a read-only part of the OCI
// distribution specification. It decides what a registry request asks for and what
// its answer looks like; the cache fetches, stores and expires the files.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"regexp"
	"strings"
)

const (
	// maxManifest bounds a manifest in bytes. It is twice the 4 MiB that the
	// specification wants registries to accept, since some accept more.
	maxManifest = 8 << 20
	// maxList bounds a page of tags or referrers in bytes. Some registries send
	// all tags of an image in one page.
	maxList = 32 << 20
	// maxNextLink bounds the path of a list plus the query of its next page, in bytes:
	// both are in the record, which must fit the 2 KB of metadata of an S3 object. Without
	// the link clients would take a part of the list for all of it.
	maxNextLink = 1024
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

// acceptManifests is the Accept header for every manifest: a tag has one stored copy,
// which must not depend on what the client accepts that asked for it first.
const acceptManifests = typeIndex + ", " + typeManifest + ", " + typeDockerList + ", " + typeDocker + ", */*;q=0.5"

// emptyIndex is the list of referrers where the upstream has none.
const emptyIndex = `{"schemaVersion":2,"mediaType":"` + typeIndex + `","manifests":[]}`

// Routes: the path element that says what a registry path asks for.
const (
	routePing      = ""
	routeManifest  = "manifests"
	routeBlob      = "blobs"
	routeTags      = "tags"
	routeReferrers = "referrers"
)

// registryCall is one parsed request to the registry.
type registryCall struct {
	remote    *remote
	image     string // as the upstream names it
	route     string
	reference string // tag or digest
	digest    string // reference, if that is a digest; else ""
	query     string // the query to send upstream, normalised
	ns        string // the client's ns parameter: the registry that a mirror stands for
	path      string // escaped, as the client sent it, without the slash in front
}

// registry serves /v2/... and /{remote}/v2/.... Its fields do not change after
// newRegistry.
type registry struct {
	cache     *cache
	config    func() *config // the configuration in force; a request calls it once
	responder *responder
	// blobs holds the blobs that images have, by blobKey, and their sizes in bytes as
	// manifests declared them; 0 is not known. What it has lost the freshness marks know.
	blobs *boundedMap[string, int64]
	// searches look through the stored manifests of an image, searched are those that were
	// lately.
	searches sharedCalls[string, struct{}]
	searched *boundedMap[string, struct{}]
}

func newRegistry(c *cache, config func() *config, s *responder) *registry {
	return &registry{cache: c, config: config, responder: s, blobs: newBoundedMap[string, int64](maxBlobs, nil), searched: newBoundedMap[string, struct{}](maxBlobs, c.now)}
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.responder.serveRequest(w, r, g.serveCall, writeRegistryError)
}

// serveCall answers one request. It asks no client for credentials: reading is open.
func (g *registry) serveCall(w *response, r *http.Request) error {
	w.setHeader("Docker-Distribution-Api-Version", "registry/2.0")
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return &registryError{"UNSUPPORTED", nil, &problem{status: http.StatusMethodNotAllowed, headers: http.Header{"Allow": {"GET, HEAD"}},
			detail: "this registry is a read-only mirror: push images to the registry behind it"}}
	}
	c, err := parseCall(g.config(), r.URL)
	if c.remote != nil {
		w.remote, w.path = c.remote.name, c.image
	}
	if err != nil {
		return err
	}
	if len(c.ns) <= 255 && registryPattern.MatchString(c.ns) { // the client's text comes back only if it can be a name
		w.setHeader("Oci-Namespace", c.ns)
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
	return c.withErrorCode(err)
}

// findFile returns the cache's request for the file at u, for fetching it ahead; with an
// error one that has the remote, if that is known.
func (g *registry) findFile(cfg *config, u *url.URL) (fileRequest, error) {
	c, err := parseCall(cfg, u)
	if err != nil {
		return fileRequest{target: target{remote: c.remote}}, err
	}
	file, err := g.newFileRequest(c)
	return file, c.withErrorCode(err)
}

// newFileRequest returns the cache's request for c. Its error: the path is too long, not
// allowed, or that of the registry itself.
func (g *registry) newFileRequest(c *registryCall) (fileRequest, error) {
	file := fileRequest{target: c.newTarget(cmp.Or(c.reference, "list")), scope: "repository:" + c.image + ":pull"}
	common := registryFile{call: c, g: g}
	switch c.route {
	case routePing:
		return fileRequest{target: target{remote: c.remote}}, errNoRoute
	case routeManifest:
		file.behavior, file.digest = &manifestFile{common}, c.digest
		file.accept, file.maxBytes = acceptManifests, maxManifest
	case routeBlob:
		file.behavior, file.digest = &blobFile{common}, c.digest
		file.knownSize, _ = g.blobs.get(c.blobKey(c.digest))
		file.spelling, file.sharedKey = "blobs/"+c.reference, true // all images of a remote share one stored copy
	case routeTags:
		file.behavior = &listFile{common, "tags"}
		file.accept, file.maxBytes = typeJSON, maxList
	case routeReferrers:
		file.behavior, file.alwaysRefetched = &listFile{common, "manifests"}, true
		file.accept, file.maxBytes = acceptManifests, maxList
	}
	if len(file.wire) > maxSpelling {
		return file, errTooLong
	}
	return file, file.classify()
}

// newTarget returns the file of c's route with that reference. Its decoded path, which
// patterns see, is its own spelling: a ":" is not escaped, because some registries
// refuse "%3A".
func (c *registryCall) newTarget(reference string) target {
	path := c.image + "/" + c.route + "/" + reference
	spelling := path
	if c.query != "" {
		spelling += "?" + c.query
	}
	return target{remote: c.remote, path: path, spelling: spelling, wire: spelling}
}

// registryFile is what the behaviors have in common.
type registryFile struct {
	download
	call *registryCall
	g    *registry
}

func (f *registryFile) setHeaders(w *response, _ string, rec *record) {
	c, mediaType := f.call, rec.ContentType
	switch c.route {
	case routeManifest, routeBlob:
		w.setHeader("Docker-Content-Digest", cmp.Or(c.digest, rec.Digest))
		mediaType = cmp.Or(mediaType, typeBinary)
	case routeTags:
		if !strings.Contains(mediaType, "json") {
			mediaType = typeJSON
		}
	case routeReferrers:
		mediaType = typeIndex
	}
	w.setHeader("Content-Type", mediaType)
	if query := rec.Link; query != "" {
		if c.ns != "" {
			query += "&ns=" + url.QueryEscape(c.ns)
		}
		// The whole path that the client used: some (skopeo) do not resolve relative references.
		w.setHeader("Link", "</"+c.path+"?"+query+`>; rel="next"`)
	}
	if rec.Filters != "" {
		w.setHeader("Oci-Filters-Applied", rec.Filters)
	}
}

// servesStale reports a 429: clients retry it at once, so a stale tag is better. A signature
// check that gets an old list of referrers is better than one that fails.
func (f *registryFile) servesStale(status int) bool {
	return status == http.StatusTooManyRequests || (f.call.route == routeReferrers && status >= 500)
}

// manifestFile is the behavior of a manifest.
type manifestFile struct{ registryFile }

// checkBody completes the record of a manifest. One that was asked for by tag must look
// like a manifest, since no digest proves it. It is stored under its digest as well,
// before the tag is answered, because clients ask for the digest next.
func (f *manifestFile) checkBody(ctx context.Context, rec *record, body io.ReaderAt) error {
	c, g := f.call, f.g
	m, err := readManifest(io.NewSectionReader(body, 0, rec.Size))
	if c.digest == "" && err != nil {
		return newRegistryError("MANIFEST_INVALID", http.StatusBadGateway, "the upstream of remote %q did not answer with a manifest (its content type is %.100q)", rec.Remote, rec.ContentType)
	}
	rec.ContentType = m.mediaType(rec.ContentType)
	g.grantNamed(ctx, c, m, rec.SHA256)
	if c.digest != "" {
		rec.Digest = c.digest
		return nil
	}
	if !strings.HasPrefix(rec.Digest, "sha512:") || !isDigestOf(rec.Digest, io.NewSectionReader(body, 0, rec.Size)) {
		rec.Digest = "sha256:" + rec.SHA256 // whatever the upstream says
	}
	t := c.newTarget(rec.Digest)
	t.class = immutable
	g.cache.storeUnderSecondKey(ctx, t, rec, body)
	return nil
}

// isDigestOf reports whether digest is that of all that r has.
func isDigestOf(digest string, r io.Reader) bool {
	sum := newBodyHash(digest)
	_, err := io.Copy(sum, r)
	return err == nil && sum.verify() == nil
}

// listFile is the behavior of a list: a JSON object whose member of that name is an
// array, or null, which some registries send for an empty repository.
type listFile struct {
	registryFile
	member string
}

// keepHeaders keeps what belongs to a page of a list: the next page, and whether the
// upstream has filtered referrers.
func (f *listFile) keepHeaders(rec *record, h http.Header) {
	rec.Link = nextPageQuery(h.Values("Link"))
	if h.Get("OCI-Filters-Applied") == "artifactType" {
		rec.Filters = "artifactType"
	}
}

// checkBody refuses what is no such list. Without referrers the answer is a negative one:
// signatures often come after the first look for them.
func (f *listFile) checkBody(_ context.Context, rec *record, body io.ReaderAt) error {
	n, err := countList(io.NewSectionReader(body, 0, rec.Size), f.member)
	if err != nil {
		return newRegistryError("UNKNOWN", http.StatusBadGateway, "the upstream of remote %q did not answer with a list of %s (its content type is %.100q)", rec.Remote, f.member, rec.ContentType)
	}
	if len(rec.Link)+len(rec.Path) > maxNextLink {
		return newRegistryError("UNKNOWN", http.StatusBadGateway, "the upstream of remote %q sent a link to the next page that is too long to be stored", rec.Remote)
	}
	rec.Negative = f.call.route == routeReferrers && n == 0 && rec.Link == ""
	return nil
}

// requestBody asks for a list. A registry without the referrers API has them under a
// tag made from the digest (OCI distribution specification, referrers tag schema). One
// that has neither has no referrers. A denial, a 429 and a failure do not say that.
func (f *listFile) requestBody(ctx context.Context, up *upstream, req upstreamRequest) (*upstreamResponse, error) {
	if f.call.route == routeTags {
		return up.send(ctx, req)
	}
	algorithm, sum, _ := strings.Cut(f.call.digest, ":")
	tag := f.call.image + "/manifests/" + algorithm + "-" + sum[:64] // 64: the schema's bound for a hash
	var resp *upstreamResponse
	for _, wire := range []string{req.wire, tag} {
		req.wire = wire
		var err error
		if resp, err = up.send(ctx, req); err != nil {
			return resp, err
		}
		switch code := resp.StatusCode; {
		case code < 400, code >= 500, code == http.StatusUnauthorized, code == http.StatusForbidden, code == http.StatusTooManyRequests:
			return resp, nil
		}
		resp.discardBody()
	}
	return &upstreamResponse{origin: resp.origin, Response: &http.Response{
		StatusCode: http.StatusOK, ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{"Content-Type": {typeIndex}},
		ContentLength: int64(len(emptyIndex)), Body: io.NopCloser(strings.NewReader(emptyIndex)),
	}}, nil
}

// nextLinkPattern finds the target of a link with rel=next in a Link header (RFC 8288).
var nextLinkPattern = regexp.MustCompile(`(?i)<([^<>]*)>[^<]*;\s*rel\s*=\s*"?[^"<;,]*\bnext\b`)

// nextPageQuery returns the query of the link with rel=next in Link headers, or "" if
// there is none. It is sorted and without ns, which mirrors do not send upstream. The
// next page has the path of the list itself.
func nextPageQuery(links []string) string {
	found := nextLinkPattern.FindStringSubmatch(strings.Join(links, ", "))
	if found == nil {
		return ""
	}
	u, err := url.Parse(found[1])
	if err != nil {
		return ""
	}
	query := u.Query()
	query.Del("ns")
	return query.Encode()
}

// registryError is an error with its code of the specification.
type registryError struct {
	code   string // of the specification; UNAVAILABLE and UNKNOWN are Docker's additions to it
	detail any    // the member "detail" of the answer; may be nil
	err    error  // gives the status and the message
}

func (e *registryError) Error() string { return e.err.Error() }
func (e *registryError) Unwrap() error { return e.err }

func newRegistryError(code string, status int, format string, args ...any) *registryError {
	return &registryError{code, nil, newProblem(status, format, args...)}
}

// errNoRoute is the error for a path that is not one of the registry API.
var errNoRoute = newRegistryError("UNSUPPORTED", http.StatusNotFound, "the registry API has no such path: images are below /v2/REMOTE/")

// errNoCatalog: a mirror's catalogue would tell what clients have asked for.
var errNoCatalog = newRegistryError("UNSUPPORTED", http.StatusNotFound, "a mirror has no catalogue (_catalog): ask for an image by its name, /v2/REMOTE/IMAGE/tags/list")

// withErrorCode returns an error of the cache with its code, and with the status that
// the specification wants for that code; nil for nil.
func (c *registryCall) withErrorCode(err error) error {
	if _, ok := errors.AsType[*registryError](err); ok || err == nil {
		return err
	}
	status, detail := statusAndDetail(err)
	upstream, _ := errors.AsType[*upstreamStatus](err)
	e := &registryError{code: "UNKNOWN", err: err}
	newStatus := status
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.code, newStatus = cmp.Or(notFoundCodes[c.route], "NAME_UNKNOWN"), http.StatusNotFound
	case upstream != nil && upstream.code == http.StatusUnauthorized, status == http.StatusForbidden:
		e.code, newStatus = "DENIED", http.StatusForbidden
	case upstream != nil && upstream.code == http.StatusTooManyRequests, errors.Is(err, errBusy):
		e.code = "TOOMANYREQUESTS"
	case errors.Is(err, errTooLarge) && c.route == routeManifest:
		e.code = "MANIFEST_INVALID"
	case errors.Is(err, errTooLong):
		e.code = "NAME_INVALID"
	case status >= 500 && status != http.StatusInternalServerError:
		e.code = "UNAVAILABLE"
	}
	if newStatus != status {
		e.err = &problem{status: newStatus, detail: detail, cause: err}
	}
	return e
}

// notFoundCodes are the codes of a 404; "NAME_UNKNOWN" for the other routes.
var notFoundCodes = map[string]string{routeManifest: "MANIFEST_UNKNOWN", routeBlob: "BLOB_UNKNOWN"}

// writeRegistryError is the registry's errorWriter.
func writeRegistryError(w http.ResponseWriter, status int, message string, err error) {
	e := &registryError{code: "UNKNOWN"}
	if coded, ok := errors.AsType[*registryError](err); ok {
		e = coded
	}
	item := map[string]any{"code": e.code, "message": message, "detail": e.detail}
	b, _ := json.Marshal(map[string]any{"errors": []any{item}}) // strings and maps of them always encode
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	sendJSON(w, status, b)
}
