package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// wantUngranted wants that no way to a blob leads through an image that does not have it.
func (m *mirror) wantUngranted(path string) {
	m.t.Helper()
	m.get(path).wantError(http.StatusNotFound, "BLOB_UNKNOWN")
	m.get(path, "Range", "bytes=0-9").wantError(http.StatusNotFound, "BLOB_UNKNOWN")
	m.get(path, "If-None-Match", "*").wantError(http.StatusNotFound, "BLOB_UNKNOWN")
	m.head(path).want(http.StatusNotFound)
}

func TestRegistryBlobIsServedThroughItsImages(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	body := layerOf("shared", 5000)
	d := h.blob("one", body)
	h.blob("other", nil)
	m := newMirror(t, h.url(), `username: "u"`) // so that only manifests and grants decide in an outage
	one, other := "/v2/reg/one/blobs/"+d, "/v2/reg/other/blobs/"+d
	m.get(one).wantBody(body).wantFrom("remote")
	m.wantUngranted(other)
	h.forget()
	h.blob("other", body)
	m.get(other).wantBody(body).wantFrom("cache")
	h.wantAsked(1, "HEAD", "/v2/other/blobs/"+d)
	for _, path := range []string{one, other} { // both are remembered
		m.get(path).wantBody(body).wantFrom("cache")
		m.get(path, "Range", "bytes=-5").want(http.StatusPartialContent)
		m.head(path).want(http.StatusOK).wantFrom("cache")
	}
	h.wantAsked(1, "", "")
	if err := m.cache.marks.(*localFreshness).saveSnapshot(); err != nil {
		t.Fatal(err)
	}
	m.restart()
	h.down()
	m.get(one).wantBody(body)
	m.get(other).wantBody(body)
	h.up()
	delete(h.repos["other"].blobs, d) // what was granted stays
	m.get(other).wantBody(body)
}

// What a manifest names belongs to its image, and that is known again after a crash when
// the manifest is read. A lost grant costs one HEAD.
func TestRegistryManifestsGrantTheirBlobs(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("one", "v1", 5000)
	h.manifest("two", "", typeManifest, im.body, "v1") // and no blobs: nothing but the manifest names them
	h.manifest("three", "", typeManifest, im.body, "v1")
	m := newMirror(t, h.url(), `username: "u"`)
	path := func(image string) string { return "/v2/reg/" + image + "/blobs/" + im.order[1] }
	m.pull("/v2/reg/one", "v1", im)
	m.get("/v2/reg/two/manifests/v1").want(http.StatusOK)
	m.get("/v2/reg/three/manifests/" + im.digest).want(http.StatusOK)
	h.forget()
	for _, image := range []string{"two", "three"} {
		m.get(path(image)).wantBody(im.blobs[im.order[1]]).wantFrom("cache")
	}
	h.wantAsked(0, "", "")
	m.restart() // without its grants
	h.down()
	m.head("/v2/reg/two/manifests/v1").want(http.StatusOK)
	m.get(path("two")).wantBody(im.blobs[im.order[1]])
	must(t, m.cache.index.(*embeddedIndex).reconcile(t.Context(), m.disk))
	m.get(path("three")).wantBody(im.blobs[im.order[1]]) // its manifest is read for that
	m.get(path("four")).wantError(http.StatusBadGateway, "UNAVAILABLE")
	if _, found := m.reg.searched.get("reg/four"); !found {
		t.Error("each request for a blob that no manifest names looks through all of them")
	}
	m.restart()
	must(t, m.cache.index.(*embeddedIndex).reconcile(t.Context(), m.disk))
	m.get(path("three")).wantBody(im.blobs[im.order[1]]) // by the request that finds the outage, too
	h.up()
	m.restart()
	h.forget()
	m.get(path("one")).wantBody(im.blobs[im.order[1]]).wantFrom("cache")
	h.wantAsked(1, "HEAD", "")
	h.wantAsked(1, "", "")
	must(t, m.cache.index.(*embeddedIndex).reconcile(t.Context(), m.disk))
	m.get(path("two")).wantBody(im.blobs[im.order[1]]) // whatever the registry says: the store has manifest and blob
	m.wantUngranted(path("four"))
}

// leavingIndex is an index during whose first listing the client leaves.
type leavingIndex struct {
	index
	leaves func()
}

func (x *leavingIndex) listPage(ctx context.Context, q pageQuery) (indexPage, error) {
	if x.leaves != nil {
		x.leaves()
		x.leaves = nil
		<-ctx.Done()
		return indexPage{}, ctx.Err()
	}
	return x.index.listPage(ctx, q)
}

// A client that leaves while the stored manifests are looked through leaves nobody else
// without their grants.
func TestRegistryGrantSearchIsGivenUp(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("one", "v1", 5000)
	m := newMirror(t, h.url(), `username: "u"`)
	m.pull("/v2/reg/one", "v1", im)
	m.restart() // without its grants
	h.down()
	must(t, m.cache.index.(*embeddedIndex).reconcile(t.Context(), m.disk))
	ctx, leave := context.WithCancel(t.Context())
	m.cache.index = &leavingIndex{m.cache.index, leave}
	path := "/v2/reg/one/blobs/" + im.order[1]
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.srv.URL+path, nil)
	must(t, err)
	if _, err := m.client.Do(req); err == nil {
		t.Fatal("the client did not leave")
	}
	m.get(path).wantBody(im.blobs[im.order[1]])
}

// brokenOnce is a store of which the first body cannot be read.
type brokenOnce struct {
	objects
	isWhole bool
}

func (o *brokenOnce) open(ctx context.Context, key string, off int64) (*object, error) {
	obj, err := o.objects.open(ctx, key, off)
	if err == nil && off >= 0 && !o.isWhole {
		o.isWhole = true
		obj.body = &brokenBody{obj.body}
	}
	return obj, err
}

type brokenBody struct{ io.ReadSeekCloser }

func (*brokenBody) Read([]byte) (int, error) { return 0, errStoreDown }

// A stored manifest that cannot be read now grants its blobs when it can.
func TestRegistryManifestThatCannotBeReadNow(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("one", "v1", 5000)
	m := newMirror(t, h.url(), `username: "u"`)
	m.pull("/v2/reg/one", "v1", im)
	m.restart() // without its grants
	h.down()
	m.cache.useObjects(&brokenOnce{objects: m.cache.objects})
	for range 2 {
		m.head("/v2/reg/one/manifests/v1").want(http.StatusOK)
	}
	m.get("/v2/reg/one/blobs/" + im.order[1]).wantBody(im.blobs[im.order[1]])
}

// Where HEAD is refused, a GET for one byte under the image's scope decides.
func TestRegistryRefusedHEADGrantsNothing(t *testing.T) {
	t.Parallel()
	for _, status := range []int{400, 401, 403, 405, 501} {
		h := newHub(t)
		body := layerOf("shared", 500)
		d := h.blob("one", body)
		h.blob("two", body)
		m := newMirror(t, h.url())
		m.get("/v2/reg/one/blobs/" + d).wantBody(body)
		h.noHEAD = status
		h.forget()
		m.wantUngranted("/v2/reg/other/blobs/" + d)
		m.get("/v2/reg/two/blobs/" + d).wantBody(body).wantFrom("cache")
		h.wantAsked(1, "GET", "/v2/two/blobs/"+d)
		h.on("/v2/denied/blobs/"+d, regAnswers(http.StatusForbidden, "", ""))
		m.get("/v2/reg/denied/blobs/"+d).wantError(http.StatusForbidden, "DENIED")
	}
}

// While the registry is away, an open remote serves what it has through every image; one
// with patterns or credentials does not. An answer of the registry is never that.
func TestRegistryUngrantedBlobInAnOutage(t *testing.T) {
	t.Parallel()
	for key, away := range map[string]int{
		"description: open":           http.StatusOK,
		`mutable_patterns: ["x"]`:     http.StatusOK,
		`immutable_patterns: ["one"]`: http.StatusForbidden,
		`immutable_patterns: ["."]`:   http.StatusBadGateway,
		`username: "u"`:               http.StatusBadGateway,
		`headers: {X-Key: "k"}`:       http.StatusBadGateway,
	} {
		h := newHub(t)
		body := layerOf("shared", 500)
		d := h.blob("one", body)
		m := newMirror(t, h.url(), key)
		m.get("/v2/reg/one/blobs/" + d).wantBody(body)
		if away != http.StatusForbidden {
			h.on("/v2/other/blobs/"+d, regAnswers(http.StatusInternalServerError, "", ""))
			m.get("/v2/reg/other/blobs/"+d).wantError(http.StatusBadGateway, "UNAVAILABLE")
		}
		h.down()
		for range 2 { // the second time the remote is known to be down
			m.get("/v2/reg/other/blobs/" + d).want(away)
			m.head("/v2/reg/other/blobs/" + d).want(away)
			m.get("/v2/reg/one/blobs/" + d).wantBody(body)
		}
		h.up()
		h.on("/v2/other/blobs/"+d, nil)
		m.advance(time.Minute)
		if away == http.StatusOK { // that it was served grants nothing
			m.wantUngranted("/v2/reg/other/blobs/" + d)
		}
	}
}

// A registry that hangs keeps nobody waiting for a stored blob longer than for any copy.
func TestRegistryUngrantedBlobBehindAHang(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := setup{bubble: true, yaml: "remotes:\n  d: {base_url: ORIGIN, package: docker}\n"}.start(t)
		path := "/blobs/" + sha256Of([]byte("layer"))
		tt.origin.file("/v2/one"+path, "layer")
		tt.get("/v2/d/one" + path).wantMiss()
		tt.origin.troubled(tt.origin.stalls)
		began := time.Now()
		tt.get("/v2/d/two" + path).wantHit().wantBody("layer")
		if d := time.Since(began); d != copyTimeout {
			t.Errorf("the blob came after %v", d)
		}
	})
}

// A request joins the fill of another image only if its own has the blob.
func TestRegistryFillOfAnotherImage(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	body := layerOf("shared", 300_000)
	d := h.blob("two", body)
	m := newMirror(t, h.url())
	begun, release := make(chan struct{}), make(chan struct{})
	h.on("/v2/one/blobs/"+d, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		w.Write(body[:200_000])
		w.(http.Flusher).Flush()
		close(begun)
		<-release
		w.Write(body[200_000:])
	})
	var clients sync.WaitGroup
	clients.Go(func() { m.get("/v2/reg/one/blobs/" + d).wantBody(body) })
	<-begun
	m.wantUngranted("/v2/reg/other/blobs/" + d)
	clients.Go(func() { m.get("/v2/reg/two/blobs/" + d).wantBody(body) })
	for m.waiters("blobs/"+d) < 2 {
		time.Sleep(time.Millisecond)
	}
	close(release)
	clients.Wait()
	h.wantAsked(0, "GET", "/v2/two/blobs/"+d)
}

// A manifest of a million layers must not push out all freshness marks.
func TestRegistryGrantsOfAManifestAreBounded(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	var layers []string
	for i := range maxNamedBlobs + 100 {
		layers = append(layers, descriptorOf("a/b", sha256Of(fmt.Append(nil, i)), 1))
	}
	h.manifest("app", "", typeManifest, []byte(`{"schemaVersion":2,"layers":[`+strings.Join(layers, ",")+`]}`), "v1")
	m := newMirror(t, h.url())
	m.get("/v2/reg/app/manifests/v1").want(http.StatusOK)
	if n := len(m.cache.marks.(*localFreshness).marks.keys()); n < maxNamedBlobs || n > maxNamedBlobs+2 {
		t.Errorf("%d marks, want %d and that of the tag", n, maxNamedBlobs)
	}
}

// A question about another image's blob is the client's: it must end a loop as well.
func TestRegistryGrantIsAskedForOnBehalfOfTheClient(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: "remotes:\n  d: {base_url: ORIGIN, package: docker}\n"}.start(t)
	path := "/blobs/" + sha256Of([]byte("layer"))
	tt.origin.file("/v2/one"+path, "layer")
	tt.origin.file("/v2/two"+path, "layer")
	tt.get("/v2/d/one" + path).wantMiss()
	const via = "1.1 artifactapi-0000000000000001"
	tt.get("/v2/d/two"+path, "Via: "+via).wantHit()
	if got, want := tt.origin.last("/v2/two"+path).header.Get("Via"), via+", "+tt.up.via; got != want {
		t.Errorf("Via %q, want %q", got, want)
	}
}

// That one image has lost a blob says nothing about the others that have it.
func TestRegistryBlobThatOneImageHasLost(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	body := layerOf("shared", 5000)
	d := h.blob("one", body)
	h.blob("two", body)
	m := newMirror(t, h.url(), "cache: {immutable_ttl: 60}")
	for _, image := range []string{"one", "two"} {
		m.get("/v2/reg/" + image + "/blobs/" + d).wantBody(body)
	}
	m.advance(2 * time.Minute)
	delete(h.repo("one").blobs, d)
	m.get("/v2/reg/one/blobs/"+d).wantError(http.StatusNotFound, "BLOB_UNKNOWN")
	h.down()
	m.get("/v2/reg/two/blobs/" + d).wantBody(body)
}
