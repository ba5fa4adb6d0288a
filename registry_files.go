// registry_files.go: what manifests, blobs, lists of tags and referrers do in their
// own way when they are fetched, stored and answered.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// registryFile is the behavior of a blob, and what the others have in common.
type registryFile struct {
	download
	call *registryCall
}

// setHeaders sets the headers that registry clients expect.
func (f *registryFile) setHeaders(h *headerSetter, _ string, rec *record) {
	c, mediaType := f.call, rec.ContentType
	switch c.route {
	case routeManifest, routeBlob:
		h.set("Docker-Content-Digest", cmp.Or(c.digest, rec.Digest))
		mediaType = cmp.Or(mediaType, typeBinary)
	case routeTags:
		if !strings.Contains(mediaType, "json") {
			mediaType = typeJSON
		}
	case routeReferrers:
		mediaType = typeIndex
	}
	h.set("Content-Type", mediaType)
	if rec.Link != "" {
		h.set("Link", c.nextLink(rec.Link))
	}
	if rec.Filters != "" {
		h.h["Oci-Filters-Applied"] = filterApplied
	}
}

// servesStale reports a 429. Clients retry it at once, so a stale tag is better than
// none.
func (f *registryFile) servesStale(status int) bool { return status == http.StatusTooManyRequests }

// manifestFile is the behavior of a manifest.
type manifestFile struct {
	registryFile
	g *registry
}

// keepHeaders keeps the upstream's Docker-Content-Digest in the record, if it is one.
func (f *manifestFile) keepHeaders(rec *record, h http.Header) {
	if rec.Digest = h.Get("Docker-Content-Digest"); !isDigest(rec.Digest) {
		rec.Digest = ""
	}
}

// checkBody checks a complete manifest and completes its record. A manifest that
// was asked for by tag must look like a manifest, since no digest proves it. It is
// stored under its digest as well, before the tag is answered, because clients ask
// for the digest next.
func (f *manifestFile) checkBody(ctx context.Context, rec *record, body io.ReaderAt) error {
	c, g := f.call, f.g
	text, err := readWholeBody(rec, body)
	if err != nil {
		return err
	}
	var m manifest
	_ = json.Unmarshal(text, &m) // m stays empty if the text is not JSON
	if c.digest == "" && len(m.SchemaVersion) == 0 {
		return &registryError{codeManifestInvalid, nil, &problem{status: http.StatusBadGateway, cause: errBadUpstream,
			detail: fmt.Sprintf("the upstream of remote %q did not answer with a manifest (its content type is %.100q)", rec.Remote, rec.ContentType)}}
	}
	rec.ContentType = m.mediaType(rec.ContentType)
	g.rememberSizes(c, &m)
	if c.digest != "" {
		rec.Digest = c.digest
		return nil
	}
	sum := newBodyHash(rec.Digest)
	sum.Write(text)
	if rec.Digest == "" || sum.verifyDigest(rec.Digest) != nil { // the upstream's may be a SHA-512
		rec.Digest = "sha256:" + sum.sumHex()
	}
	t := c.newTarget(rec.Digest)
	t.class = immutable
	g.cache.storeUnderSecondKey(ctx, t, rec, body)
	return nil
}

// listFile is the behavior of a list: a JSON object whose member of that name is an
// array, or null, which some registries send for an empty repository.
type listFile struct {
	registryFile
	member string
}

// keepHeaders keeps the headers that belong to a page of a list in its record:
// the next page, and whether the upstream has filtered referrers.
func (f *listFile) keepHeaders(rec *record, h http.Header) {
	rec.Link = nextPageQuery(h.Values("Link"))
	if h.Get("OCI-Filters-Applied") == filterApplied[0] {
		rec.Filters = filterApplied[0]
	}
}

// checkBody refuses what is not such a list, and a link to the next page that cannot
// be stored.
func (f *listFile) checkBody(_ context.Context, rec *record, body io.ReaderAt) error {
	text, err := readWholeBody(rec, body)
	if err != nil {
		return err
	}
	var o map[string]json.RawMessage
	err = json.Unmarshal(text, &o)
	list, found := o[f.member]
	if err != nil || !found || (list[0] != '[' && string(list) != "null") {
		return newRegistryError(codeUnknown, http.StatusBadGateway, "the upstream of remote %q did not answer with a list of %s (its content type is %.100q)", rec.Remote, f.member, rec.ContentType)
	}
	if len(rec.Link)+len(rec.Path) > maxNextLink {
		return newRegistryError(codeUnknown, http.StatusBadGateway, "the upstream of remote %q sent a link to the next page that is too long to be stored", rec.Remote)
	}
	return nil
}

// referrersFile is the behavior of a list of referrers. A signature check that gets
// an old list is better than one that fails.
type referrersFile struct{ listFile }

func (f *referrersFile) servesStale(status int) bool {
	return status >= 500 || f.listFile.servesStale(status)
}

// requestBody asks the upstream for referrers. A registry without the referrers API
// has them under a tag made from the digest (the OCI distribution specification's
// referrers tag schema). One that has neither has no referrers. A denial, a 429 and a
// failure do not say that there are none and are returned.
func (f *referrersFile) requestBody(ctx context.Context, up *upstream, req upstreamRequest) (*upstreamResponse, error) {
	resp, err := up.send(ctx, req)
	if err != nil || !saysAbsent(resp.StatusCode) {
		return resp, err
	}
	resp.discardBody()
	algorithm, sum, _ := strings.Cut(f.call.digest, ":")
	req.wire = "v2/" + f.call.image + "/manifests/" + algorithm + "-" + sum[:64] // 64: the schema's bound for a hash
	resp, err = up.send(ctx, req)
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
