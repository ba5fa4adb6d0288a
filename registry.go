// registry.go: serves container registries below /v2/, a read-only part of the OCI
// distribution specification. It decides what a registry request asks for and what
// its answer looks like; the cache fetches, stores and expires the files.

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
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
	// maxTag is the longest tag that the specification allows.
	maxTag = 128
	// maxNextLink bounds the path of a list plus the query of its next page, in
	// bytes: both are in the record, which must fit the 2 KB of metadata of an S3
	// object. A list with a longer link is an error, because without the link
	// clients would take a part of the list for all of it.
	maxNextLink = 1024
	// maxBlobSizes bounds the table of blob sizes. An entry has some 250 bytes;
	// 20,000 are the layers of about two thousand images.
	maxBlobSizes = 20_000
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
	// sizes holds the sizes of blobs in bytes as manifests declared them, by sizeKey.
	// Nothing in it expires. Without it, HEAD of a blob that is not stored asks the upstream.
	sizes *boundedMap[string, int64]
}

// newRegistry makes a registry over the cache c.
func newRegistry(c *cache, config func() *config, s *responder) *registry {
	return &registry{cache: c, config: config, responder: s, sizes: newBoundedMap[string, int64](maxBlobSizes, nil)}
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.responder.serveRequest(w, r, g.serveCall, writeRegistryError)
}

// serveCall answers one request. It asks no client for credentials: reading is open.
func (g *registry) serveCall(w *response, r *http.Request) error {
	w.Header()["Docker-Distribution-Api-Version"] = apiVersion
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return &registryError{codeUnsupported, nil, &problem{status: http.StatusMethodNotAllowed, headers: http.Header{"Allow": {"GET, HEAD"}},
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
	file := fileRequest{target: c.newTarget(cmp.Or(c.reference, "list")), scope: "repository:" + c.image + ":pull"}
	common := registryFile{call: c}
	switch c.route {
	case routeManifest:
		file.behavior, file.digest = &manifestFile{common, g}, c.digest
		file.accept, file.maxBytes, file.needsWholeBody = acceptManifests, maxManifest, true
	case routeBlob:
		file.behavior, file.digest = &registryFile{call: c}, c.digest
		file.spelling, file.sharedKey = "blobs/"+c.reference, true // all images of a remote share one stored copy
		file.knownSize, _ = g.sizes.get(c.sizeKey(c.digest))
	case routeTags:
		file.behavior = &listFile{common, "tags"}
		file.accept, file.maxBytes, file.needsWholeBody = typeJSON, maxList, true
	case routeReferrers:
		file.behavior, file.alwaysRefetched = &referrersFile{listFile{common, "manifests"}}, true
		file.accept, file.maxBytes, file.needsWholeBody = acceptManifests, maxList, true
	}
	if len(file.wire) > maxSpelling {
		return file, newTooLongError()
	}
	return file, file.classify()
}

// newTarget returns the file of c's route with that reference. Its decoded path, which
// patterns see, is its own spelling: a ":" is not escaped, because some registries
// refuse "%3A".
func (c *registryCall) newTarget(reference string) target {
	path := c.image + "/" + string(c.route) + "/" + reference
	t := target{remote: c.remote, path: path, spelling: path}
	if c.query != "" {
		t.spelling += "?" + c.query
	}
	t.wire = "v2/" + t.spelling
	return t
}

// nextLinkPattern finds the target of a link with rel=next in a Link header (RFC 8288).
var nextLinkPattern = regexp.MustCompile(`(?i)<([^<>]*)>[^<]*;\s*rel\s*=\s*"?[^"<;,]*\bnext\b`)

// nextPageQuery returns the query of the link with rel=next in Link headers, or "" if
// there is none. It is sorted and without ns, which clients send to mirrors and
// mirrors do not send upstream. The link's path is not needed: the next page has the
// path of the list itself.
func nextPageQuery(links []string) string {
	found := nextLinkPattern.FindStringSubmatch(strings.Join(links, ", "))
	if found == nil {
		return ""
	}
	u, err := url.Parse(found[1])
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

// readWholeBody returns a whole body, which fileRequest.maxBytes has kept small.
func readWholeBody(rec *record, body io.ReaderAt) ([]byte, error) {
	text, err := io.ReadAll(io.NewSectionReader(body, 0, rec.Size))
	if err != nil {
		return nil, fmt.Errorf("%w: reading a temporary file: %w", errStoreDown, err)
	}
	return text, nil
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

// errNoRoute is the error for a path that is not one of the registry API.
var errNoRoute = newRegistryError(codeUnsupported, http.StatusNotFound, "the registry API has no such path: images are below /v2/REMOTE/")

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
		e.code, newStatus = cmp.Or(notFoundCodes[c.route], codeNameUnknown), http.StatusNotFound
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

// notFoundCodes are the codes of a 404; codeNameUnknown for the other routes.
var notFoundCodes = map[registryRoute]string{routeManifest: codeManifestUnknown, routeBlob: codeBlobUnknown}

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
