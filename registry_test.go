package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// hub is the upstream of the tests: a scripted container registry with a token service.
type hub struct {
	t    testing.TB
	addr string

	mu        sync.Mutex // guards the fields below
	srv       *http.Server
	repos     map[string]*hubRepo
	seen      []string // "GET /v2/app/manifests/v1"
	accepts   []string // Accept headers of requests for manifests
	tokens    bool     // requests need a Bearer token
	exchanges int
	noAPI     bool                                                // has no referrers API
	noHEAD    int                                                 // the status of each HEAD; 0: as GET
	silent    bool                                                // sends no Docker-Content-Digest
	script    map[string]func(http.ResponseWriter, *http.Request) // by path
}

type hubRepo struct {
	manifests map[string]hubManifest // by digest
	tags      map[string]string
	blobs     map[string][]byte
}

type hubManifest struct {
	mediaType string
	body      []byte
}

func newHub(t testing.TB) *hub {
	h := &hub{t: t, repos: map[string]*hubRepo{}, script: map[string]func(http.ResponseWriter, *http.Request){}}
	h.up()
	t.Cleanup(h.down)
	return h
}

// up starts listening, at the old address if there was one.
func (h *hub) up() {
	l, err := net.Listen("tcp", cmp.Or(h.addr, "127.0.0.1:0"))
	if err != nil {
		h.t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	h.addr, h.srv = l.Addr().String(), srv
	go srv.Serve(l)
}

// down refuses connections from now on.
func (h *hub) down() { h.srv.Close() }

func (h *hub) url() string { return "http://" + h.addr }

func (h *hub) repo(name string) *hubRepo {
	if h.repos[name] == nil {
		h.repos[name] = &hubRepo{map[string]hubManifest{}, map[string]string{}, map[string][]byte{}}
	}
	return h.repos[name]
}

func (h *hub) blob(name string, body []byte) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := sha256Of(body)
	h.repo(name).blobs[d] = body
	return d
}

// manifest stores body under digest ("": its SHA-256) and under tags.
func (h *hub) manifest(name, digest, mediaType string, body []byte, tags ...string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	digest = cmp.Or(digest, sha256Of(body))
	r := h.repo(name)
	r.manifests[digest] = hubManifest{mediaType, body}
	for _, tag := range tags {
		r.tags[tag] = digest
	}
	return digest
}

// hubImage is an image that a hub has.
type hubImage struct {
	digest string
	body   []byte
	blobs  map[string][]byte
	order  []string // digests of the blobs, the configuration first
}

// image stores an image with layers of these sizes.
func (h *hub) image(name, tag string, sizes ...int) *hubImage {
	im := &hubImage{blobs: map[string][]byte{}}
	add := func(mediaType string, body []byte) string {
		d := h.blob(name, body)
		im.blobs[d] = body
		im.order = append(im.order, d)
		return descriptorOf(mediaType, d, len(body))
	}
	conf := add("application/vnd.oci.image.config.v1+json", fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","name":%q,"tag":%q}`, name, tag))
	var layers []string
	for i, n := range sizes {
		layers = append(layers, add("application/vnd.oci.image.layer.v1.tar+gzip", layerOf(name+tag+strconv.Itoa(i), n)))
	}
	// Odd white space shows a program that decodes and encodes the manifest.
	im.body = fmt.Appendf(nil, "{ \"schemaVersion\": 2,\n\t\"mediaType\":%q,\"config\":%s,\r\n\"layers\":[%s]}\n", typeManifest, conf, strings.Join(layers, " , "))
	im.digest = h.manifest(name, "", typeManifest, im.body, tag)
	return im
}

func descriptorOf(mediaType, digest string, size int) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mediaType, digest, size)
}

func layerOf(seed string, n int) []byte {
	var s [32]byte
	copy(s[:], seed)
	b := make([]byte, n)
	rand.NewChaCha8(s).Read(b)
	return b
}

func sha256Of(b []byte) string {
	s := newBodyHash("")
	s.Write(b)
	return "sha256:" + s.sumHex()
}

func sha512Of(b []byte) string {
	s := sha512.Sum512(b)
	return "sha512:" + hex.EncodeToString(s[:])
}

// on sets the script of a path; a nil f removes it.
func (h *hub) on(path string, f func(http.ResponseWriter, *http.Request)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.script[path] = f
}

// regAnswers makes a script that sends this answer.
func regAnswers(status int, mediaType, body string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", mediaType)
		if body != "" {
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// count returns how many requests had that method and path; "" is any.
func (h *hub) count(method, path string) (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.seen {
		m, p, _ := strings.Cut(s, " ")
		if (method == "" || m == method) && (path == "" || p == path) {
			n++
		}
	}
	return n
}

// forget empties the list of requests.
func (h *hub) forget() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seen = nil
}

func (h *hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	h.seen = append(h.seen, r.Method+" "+r.URL.RequestURI())
	script := h.script[r.URL.Path]
	h.mu.Unlock()
	switch {
	case script != nil && r.URL.Path == "/token":
		script(w, r)
	case r.URL.Path == "/token":
		h.serveToken(w, r)
	case h.challenged(w, r):
	case script != nil:
		script(w, r)
	default:
		h.serve(w, r)
	}
}

func (h *hub) serveToken(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	h.exchanges++
	h.mu.Unlock()
	fmt.Fprintf(w, `{"token":%q,"expires_in":60}`, "for-"+r.URL.Query().Get("scope"))
}

// challenged answers 401 to a request without a token for the repository's scope, and
// reports whether it did.
func (h *hub) challenged(w http.ResponseWriter, r *http.Request) bool {
	name, _, _ := hubPath(r.URL.Path)
	scope := "repository:" + name + ":pull"
	h.mu.Lock()
	wants := h.tokens
	h.mu.Unlock()
	if !wants || r.Header.Get("Authorization") == "Bearer for-"+scope {
		return false
	}
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="hub",scope=%q`, h.url(), scope))
	w.WriteHeader(http.StatusUnauthorized)
	return true
}

// hubPath splits an upstream path into image, route and reference.
func hubPath(p string) (name, what, ref string) {
	p = strings.TrimPrefix(p, "/v2/")
	if name, ok := strings.CutSuffix(p, "/tags/list"); ok {
		return name, "tags", ""
	}
	e := strings.Split(p, "/")
	if len(e) < 3 {
		return "", "", ""
	}
	return strings.Join(e[:len(e)-2], "/"), e[len(e)-2], e[len(e)-1]
}

func (h *hub) serve(w http.ResponseWriter, r *http.Request) {
	name, what, ref := hubPath(r.URL.Path)
	h.mu.Lock()
	defer h.mu.Unlock()
	repo := h.repos[name]
	if repo == nil {
		repo = &hubRepo{}
	}
	if r.Method == http.MethodHead && h.noHEAD != 0 {
		w.WriteHeader(h.noHEAD)
		return
	}
	switch what {
	case "manifests":
		h.accepts = append(h.accepts, r.Header.Get("Accept"))
		digest := ref
		if !strings.Contains(ref, ":") {
			digest = repo.tags[ref]
		}
		m, ok := repo.manifests[digest]
		h.send(w, r, digest, m.mediaType, m.body, ok)
	case "blobs":
		b, ok := repo.blobs[ref]
		h.send(w, r, ref, typeBinary, b, ok)
	case "tags":
		h.sendTags(w, r, name, repo)
	case "referrers":
		h.sendReferrers(w, r, repo, ref)
	default:
		http.NotFound(w, r)
	}
}

func (h *hub) send(w http.ResponseWriter, r *http.Request, digest, mediaType string, body []byte, ok bool) {
	if !ok {
		http.Error(w, `{"errors":[{"code":"SAID_BY_UPSTREAM"}]}`, http.StatusNotFound)
		return
	}
	if !h.silent {
		w.Header().Set("Docker-Content-Digest", digest)
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("ETag", `"`+digest+`"`)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
}

func (h *hub) sendTags(w http.ResponseWriter, r *http.Request, name string, repo *hubRepo) {
	tags := []string{}
	for tag := range repo.tags {
		if tag > r.URL.Query().Get("last") {
			tags = append(tags, tag)
		}
	}
	slices.Sort(tags)
	if n, err := strconv.Atoi(r.URL.Query().Get("n")); err == nil && n < len(tags) {
		tags = tags[:n]
		w.Header().Set("Link", fmt.Sprintf(`<%s/v2/%s/tags/list?n=%d&last=%s>; rel="next"`, h.url(), name, n, tags[n-1]))
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	json.NewEncoder(w).Encode(map[string]any{"name": name, "tags": tags})
}

func (h *hub) sendReferrers(w http.ResponseWriter, r *http.Request, repo *hubRepo, subject string) {
	if h.noAPI {
		http.NotFound(w, r)
		return
	}
	wanted, list := r.URL.Query().Get("artifactType"), []string{}
	for digest, m := range repo.manifests {
		var v struct {
			ArtifactType string
			Subject      struct{ Digest string }
		}
		if json.Unmarshal(m.body, &v) == nil && v.Subject.Digest == subject && (wanted == "" || wanted == v.ArtifactType) {
			list = append(list, descriptorOf(m.mediaType, digest, len(m.body)))
		}
	}
	if wanted != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	w.Header().Set("Content-Type", typeIndex)
	fmt.Fprintf(w, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, typeIndex, strings.Join(list, ","))
}

// mirror is the registry under test, over a disk store, behind the front and a
// listener.
type mirror struct {
	t      testing.TB
	dir    string
	yaml   string
	cache  *cache
	disk   *diskStore
	reg    *registry
	srv    *httptest.Server
	client *http.Client
	ahead  *atomic.Int64 // nanoseconds by which the clock was advanced
	ends   []func()
}

// newMirror starts a mirror whose remote "reg" has base_url and these keys.
func newMirror(t testing.TB, baseURL string, keys ...string) *mirror {
	t.Helper()
	return newMirrorOf(t, registryYAML("reg", "docker", baseURL, keys...))
}

func registryYAML(name, pkg, baseURL string, keys ...string) string {
	y := fmt.Sprintf("  %s:\n    base_url: %q\n    package: %q\n", name, baseURL, pkg)
	for _, k := range keys {
		y += "    " + k + "\n"
	}
	return y
}

func newMirrorOf(t testing.TB, remotes ...string) *mirror {
	t.Helper()
	m := &mirror{t: t, dir: t.TempDir(), yaml: "remotes:\n" + strings.Join(remotes, ""), ahead: &atomic.Int64{}}
	m.start()
	t.Cleanup(m.stop)
	return m
}

// start starts a process over the directory.
func (m *mirror) start() {
	m.t.Helper()
	cfg, err := parseConfig("remotes.yaml", []byte(m.yaml), func(string) (string, bool) { return "", false })
	if err != nil {
		m.t.Fatal(err)
	}
	began := time.Now()
	now := func() time.Time { return began.Add(time.Since(began) + time.Duration(m.ahead.Load())) }
	log, met := slog.New(slog.DiscardHandler), newMetrics()
	m.disk = newDiskStore(m.dir, now, log)
	up := newUpstream(func(reach addressKind) http.RoundTripper { return newTransport(reach) }, now, log, met)
	m.cache = newCache(cacheStores{objects: m.disk, index: newEmbeddedIndex(m.dir, log), marks: newLocalFreshness(m.dir, now, log),
		space: &spoolSpace{createFile: m.disk.newSpool, diskSpace: m.disk.freeSpace, now: now, isBroken: func() bool { return false }}}, up, now, log, met)
	m.reg = newRegistry(m.cache, func() *config { return cfg }, &responder{now: now, log: log, count: met.countRequest})
	m.srv = httptest.NewServer(&api{cache: m.cache, config: m.reg.config, responder: m.reg.responder, metrics: met, now: now, token: "t",
		origin: http.NewCrossOriginProtection(), registry: m.reg, runs: &prefetchRuns{stopping: context.Background()}})
	m.client = &http.Client{Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 100}}
	m.ends = append(m.ends, up.Close)
}

func (m *mirror) stop() {
	m.client.CloseIdleConnections()
	m.srv.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	m.cache.Close(ctx)
	for _, end := range m.ends {
		end()
	}
	m.ends = nil
}

// restart replaces the process by another over the same data, without its freshness.
func (m *mirror) restart() {
	m.stop()
	m.start()
}

func (m *mirror) advance(d time.Duration) {
	m.waitUntilStored()
	m.ahead.Add(int64(d))
}

// waitUntilStored waits until each file that was sent whole is stored.
func (m *mirror) waitUntilStored() {
	for m.storing() {
		time.Sleep(time.Millisecond)
	}
}

// registryReply is an answer of the mirror.
type registryReply struct {
	t      testing.TB
	what   string
	status int
	header http.Header
	body   []byte
	err    error // of reading the body
}

// ask sends a request; pairs are names and values of headers. It first waits until
// fills that sent everything are stored: a client that joins one is answered with the
// source "remote", which tests do not expect.
func (m *mirror) ask(method, path string, pairs ...string) *registryReply {
	m.t.Helper()
	m.waitUntilStored()
	req, err := http.NewRequest(method, m.srv.URL+path, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		req.Header.Add(pairs[i], pairs[i+1])
	}
	a := &registryReply{t: m.t, what: method + " " + path}
	res, err := m.client.Do(req)
	if err != nil {
		a.err = err
		return a
	}
	defer res.Body.Close()
	a.status, a.header = res.StatusCode, res.Header
	a.body, a.err = io.ReadAll(res.Body)
	return a
}

func (m *mirror) get(path string, pairs ...string) *registryReply {
	m.t.Helper()
	return m.ask(http.MethodGet, path, pairs...)
}

func (m *mirror) head(path string, pairs ...string) *registryReply {
	m.t.Helper()
	return m.ask(http.MethodHead, path, pairs...)
}

func (a *registryReply) want(status int) *registryReply {
	a.t.Helper()
	if a.err != nil || a.status != status {
		a.t.Errorf("%s: status %d, error %v, body %.300s; want status %d", a.what, a.status, a.err, a.body, status)
	}
	return a
}

func (a *registryReply) wantHeader(name, value string) *registryReply {
	a.t.Helper()
	if got := a.header.Get(name); got != value {
		a.t.Errorf("%s: %s is %q, want %q", a.what, name, got, value)
	}
	return a
}

func (a *registryReply) wantBody(body []byte) *registryReply {
	a.t.Helper()
	if a.want(http.StatusOK); !bytes.Equal(a.body, body) {
		a.t.Errorf("%s: a body of %d bytes, want another of %d", a.what, len(a.body), len(body))
	}
	return a
}

// wantManifest wants a whole manifest with its headers.
func (a *registryReply) wantManifest(mediaType, digest string, body []byte) *registryReply {
	a.t.Helper()
	return a.wantBody(body).wantHeader("Content-Type", mediaType).wantHeader("Docker-Content-Digest", digest).
		wantHeader("Content-Length", strconv.Itoa(len(body))).wantHeader("Docker-Distribution-Api-Version", "registry/2.0")
}

func (a *registryReply) wantFrom(source string) *registryReply {
	a.t.Helper()
	return a.wantHeader("X-Artifact-Source", source)
}

// wantError wants an error in the form of the specification.
func (a *registryReply) wantError(status int, code string) *registryReply {
	a.t.Helper()
	a.want(status).wantHeader("Content-Type", "application/json").wantHeader("Docker-Distribution-Api-Version", "registry/2.0")
	var e struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.Unmarshal(a.body, &e); err != nil || len(e.Errors) != 1 || e.Errors[0].Code != code || e.Errors[0].Message == "" {
		a.t.Errorf("%s: %s; want the one error %s with a message", a.what, a.body, code)
	}
	return a
}

// wantBroken wants an answer that no client can take for a whole one.
func (a *registryReply) wantBroken() *registryReply {
	a.t.Helper()
	if a.err == nil && a.status < 500 {
		a.t.Errorf("%s: a clean answer %d with %d bytes", a.what, a.status, len(a.body))
	}
	return a
}

// wantAsked wants n requests at the hub so far.
func (h *hub) wantAsked(n int, method, path string) {
	h.t.Helper()
	if got := h.count(method, path); got != n {
		h.t.Errorf("%d upstream requests %s %s, want %d", got, method, path, n)
	}
}

// pull gets an image as clients do: the tag, the manifest, all blobs.
func (m *mirror) pull(prefix, tag string, im *hubImage) {
	m.t.Helper()
	m.head(prefix+"/manifests/"+tag).want(http.StatusOK).wantHeader("Docker-Content-Digest", im.digest)
	m.get(prefix+"/manifests/"+im.digest).wantManifest(typeManifest, im.digest, im.body)
	for d, b := range im.blobs {
		m.get(prefix+"/blobs/"+d).wantBody(b).wantHeader("Docker-Content-Digest", d)
	}
}

func TestRegistryPings(t *testing.T) {
	t.Parallel()
	m := newMirror(t, "http://127.0.0.1:1", `registry: "docker.io"`) // no upstream is asked
	for _, path := range []string{"/v2", "/v2/", "/v2/reg", "/v2/reg/", "/reg/v2", "/reg/v2/", "/v2/reg/v2/", "/v2/?ns=docker.io", "/v2/reg/?ns=docker.io", "//v2/", "/./v2/reg/", "//reg/v2/", "/v2//reg/", "/v2/./reg", "/reg//v2/", "/v2/reg//", "/v2/reg/./v2//"} {
		a := m.get(path).want(http.StatusOK).wantHeader("Docker-Distribution-Api-Version", "registry/2.0").wantHeader("WWW-Authenticate", "")
		if string(a.body) != "{}" {
			t.Errorf("%s: %q, want {}", path, a.body)
		}
		if a := m.head(path).want(http.StatusOK); len(a.body) != 0 {
			t.Errorf("HEAD %s has a body", path)
		}
	}
	for ns, want := range map[string]string{"docker.io": "docker.io", "quay.io%3A443": "quay.io:443", "[::1]%3A5000": "[::1]:5000",
		"": "", "<script>": "", "a%20b": "", "a/b": "", "https%3A%2F%2Fdocker.io": "", strings.Repeat("x", 256): ""} {
		m.get("/v2/reg/?ns="+ns).wantHeader("OCI-Namespace", want)
	}
}

// The paths of images are not escaped in their keys, which a remote that is gone does not
// say.
func TestRegistryThatWasRemovedIsPurged(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("team/app", "v1", 1000)
	m := newMirror(t, h.url())
	m.pull("/v2/reg/team/app", "v1", im)
	m.waitUntilStored()
	a := *m.srv.Config.Handler.(*api)
	none := mustParse(t, "remotes: {l: {type: local}}")
	a.config = func() *config { return none }
	for _, path := range []string{"team/app/manifests/v1", "blobs/" + im.order[1]} {
		r := httptest.NewRequest("DELETE", "/artifacts/reg/"+path, nil)
		r.Header.Set("Authorization", "Bearer t")
		w := httptest.NewRecorder()
		if a.ServeHTTP(w, r); w.Code != http.StatusNoContent {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}
}

func TestRegistryPullTwiceAsksUpstreamOnce(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("team/app", "v1", 300_000, 10, 0)
	m := newMirror(t, h.url())
	m.pull("/v2/reg/team/app", "v1", im)
	h.forget()
	m.pull("/v2/reg/team/app", "v1", im)
	h.wantAsked(0, "", "")
	m.get("/v2/reg/team/app/manifests/v1").wantFrom("cache")
	m.get("/v2/reg/team/app/blobs/"+im.order[1]).wantFrom("cache").wantHeader("Cache-Status", "artifactapi; hit")
}

func TestRegistryPullWithTheRegistryDown(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("team/app", "v1", 30_000)
	m := newMirror(t, h.url())
	m.pull("/v2/reg/team/app", "v1", im)
	h.down()
	m.pull("/v2/reg/team/app", "v1", im)
	m.advance(2 * time.Hour)
	m.restart()
	m.pull("/v2/reg/team/app", "v1", im)
	m.get("/v2/reg/other/manifests/v1").wantError(http.StatusBadGateway, "UNAVAILABLE")
	m.get("/v2/reg/other/referrers/"+im.digest).wantError(http.StatusBadGateway, "UNAVAILABLE")
	h.up()
	m.advance(time.Minute)
	other := h.image("other", "v1", 10)
	m.pull("/v2/reg/other", "v1", other)
}

func TestRegistryStartsWithTheRegistryDown(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 10)
	h.down()
	m := newMirror(t, h.url())
	m.get("/v2/").want(http.StatusOK)
	m.get("/v2/reg/app/manifests/v1").wantError(http.StatusBadGateway, "UNAVAILABLE")
	h.up()
	m.pull("/v2/reg/app", "v1", im)
}

func TestRegistryTagIsStoredUnderItsDigestToo(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 10)
	m := newMirror(t, h.url())
	m.head("/v2/reg/app/manifests/v1").want(http.StatusOK).wantFrom("remote")
	key := target{remote: m.reg.config().remotes["reg"], spelling: "app/manifests/" + im.digest}.key()
	if _, err := m.disk.open(t.Context(), key, -1); err != nil {
		t.Errorf("when the tag was answered, its digest was not stored: %v", err)
	}
	h.wantAsked(1, "", "") // only the tag was asked for, not the digest
	h.down()
	m.get("/v2/reg/app/manifests/"+im.digest).wantManifest(typeManifest, im.digest, im.body).wantFrom("cache")
	m.get("/v2/reg/app/manifests/v1").wantManifest(typeManifest, im.digest, im.body).wantFrom("cache")
}

// A tag's answer says of the manifest by digest too that upstream has it still.
func TestRegistryTagRefreshesItsDigest(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 10)
	m := newMirror(t, h.url(), "cache: {immutable_ttl: 60, mutable_ttl: 60}")
	m.get("/v2/reg/app/manifests/v1").want(http.StatusOK)
	m.advance(2 * time.Minute)
	m.head("/v2/reg/app/manifests/v1").want(http.StatusOK).wantFrom("remote")
	h.forget()
	m.get("/v2/reg/app/manifests/"+im.digest).wantManifest(typeManifest, im.digest, im.body).wantFrom("cache")
	h.wantAsked(0, "", "")
}

// Clients pull an image of an image index with these requests. They were recorded; those
// of RKE2 and k3s were read from the source.
func TestRegistryRequestsOfClients(t *testing.T) {
	t.Parallel()
	const ours = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, " +
		"application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json, */*;q=0.5"
	ggcr := []string{"application/vnd.docker.distribution.manifest.v1+json,application/vnd.docker.distribution.manifest.v1+prettyjws," +
		typeDocker + "," + typeManifest + "," + typeDockerList + "," + typeIndex}
	containerd := []string{typeDocker + ", " + typeDockerList + ", " + typeManifest + ", " + typeIndex + ", */*"}
	engine := []string{"application/json", typeDockerList, "application/vnd.docker.distribution.manifest.v1+prettyjws", typeDocker, typeIndex, typeManifest}
	for name, c := range map[string]struct {
		ping, prefix, query string
		head                bool     // asks for the tag with HEAD, then for its digest
		tag                 []string // Accept
		typed               string   // Accept for a digest; "": as for the tag
		coding              string   // Accept-Encoding
	}{
		"RKE2 and k3s at their start": {"/v2/dockerhub/?ns=docker.io", "/v2/dockerhub/", "?ns=docker.io", false, ggcr, "%s", "gzip"},
		"the same with a rewrite":     {"/v2/?ns=docker.io", "/v2/dockerhub/", "?ns=docker.io", false, ggcr, "%s", "gzip"},
		"containerd":                  {"", "/v2/", "?ns=docker.io", true, containerd, "%s, */*", "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5"},
		"containerd under RKE2":       {"", "/v2/dockerhub/", "?ns=docker.io", true, containerd, "%s, */*", "gzip"},
		"Docker":                      {"/dockerhub/v2/", "/dockerhub/v2/", "", true, engine, "", "gzip"},
		"Docker with a full name":     {"/v2/", "/v2/dockerhub/", "", true, engine, "", "gzip"},
		"Docker over containerd":      {"", "/dockerhub/v2/", "?ns=docker.io", true, containerd, "%s, */*", "gzip"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			im := h.image("rancher/rke2-runtime", "amd64", 5000)
			index := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, typeIndex, descriptorOf(typeManifest, im.digest, len(im.body)))
			digest := h.manifest("rancher/rke2-runtime", "", typeIndex, index, "v1.30.1-rke2r1")
			m := newMirrorOf(t, registryYAML("dockerhub", "docker", h.url(), `registry: "docker.io"`))
			pairs := func(accept []string) []string {
				p := []string{"Accept-Encoding", c.coding}
				for _, a := range accept {
					p = append(p, "Accept", a)
				}
				return p
			}
			of := func(mediaType string) []string {
				if c.typed == "" {
					return pairs(c.tag)
				}
				return pairs([]string{fmt.Sprintf(c.typed, mediaType)})
			}
			at := func(path string) string { return c.prefix + "rancher/rke2-runtime/" + path + c.query }
			for range 2 {
				if c.ping != "" {
					m.get(c.ping).want(http.StatusOK)
				}
				ref, accept := "v1.30.1-rke2r1", pairs(c.tag)
				if c.head {
					m.head(at("manifests/"+ref), accept...).want(http.StatusOK).wantHeader("Docker-Content-Digest", digest).
						wantHeader("Content-Type", typeIndex).wantHeader("Content-Length", strconv.Itoa(len(index)))
					ref, accept = digest, of(typeIndex)
				}
				a := m.get(at("manifests/"+ref), accept...).wantManifest(typeIndex, digest, index)
				if c.query != "" {
					a.wantHeader("OCI-Namespace", "docker.io")
				}
				m.get(at("manifests/"+im.digest), of(typeManifest)...).wantManifest(typeManifest, im.digest, im.body)
				for _, d := range im.order {
					m.get(at("blobs/"+d), of("application/vnd.oci.image.layer.v1.tar+gzip")...).wantBody(im.blobs[d]).wantHeader("Content-Encoding", "")
				}
			}
			want := []string{"manifests/v1.30.1-rke2r1", "manifests/" + im.digest, "blobs/" + im.order[0], "blobs/" + im.order[1]}
			for i := range want {
				want[i] = "GET /v2/rancher/rke2-runtime/" + want[i]
			}
			if !slices.Equal(h.seen, want) {
				t.Errorf("upstream was asked %q, want %q", h.seen, want)
			}
			if !slices.Equal(h.accepts, []string{ours, ours}) {
				t.Errorf("upstream was asked with Accept %q, want our own", h.accepts)
			}
		})
	}
}

func TestRegistryShapesAreOneEntry(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("library/nginx", "1", 1000)
	for _, tag := range []string{"2", "3"} {
		h.repos["library/nginx"].tags[tag] = im.digest
	}
	m := newMirrorOf(t, registryYAML("hub", "docker", h.url(), `registry: "docker.io"`))
	for _, shape := range []string{"/v2/hub/library/nginx/", "/v2/hub/nginx/", "/hub/v2/nginx/", "/v2/hub/v2/nginx/", "/v2/nginx/?ns=docker.io",
		"/v2/library/nginx/?ns=docker.io", "/v2/hub/nginx/?ns=quay.io", "/hub/v2/library/nginx/?ns=docker.io"} {
		base, query, asked := strings.Cut(shape, "?")
		if asked {
			query = "?" + query
		}
		m.get(base+"manifests/1"+query).wantManifest(typeManifest, im.digest, im.body)
		m.get(base + "blobs/" + im.order[1] + query).wantBody(im.blobs[im.order[1]])
		page := base + "tags/list" + cmp.Or(query, "?") + "&n=2"
		a := m.get(page).want(http.StatusOK)
		link := a.header.Get("Link")
		target, ok := strings.CutSuffix(link, `>; rel="next"`)
		if !ok || !strings.HasPrefix(target, "<"+base+"tags/list?") {
			t.Fatalf("%s: Link %q is not of the client's shape", page, link)
		}
		if a := m.get(target[1:]).want(http.StatusOK); !strings.Contains(string(a.body), `"tags":["3"]`) {
			t.Errorf("%s: the next page is %s", page, a.body)
		}
	}
	h.wantAsked(1, "GET", "/v2/library/nginx/manifests/1")
	h.wantAsked(1, "GET", "/v2/library/nginx/blobs/"+im.order[1])
	h.wantAsked(1, "GET", "/v2/library/nginx/tags/list?n=2")
	h.wantAsked(1, "GET", "/v2/library/nginx/tags/list?last=2&n=2")
	h.wantAsked(4, "", "") // ns is not sent upstream
}

func TestRegistryImageNamespaceIsNeverDialled(t *testing.T) {
	t.Parallel()
	h, stranger := newHub(t), newHub(t)
	m := newMirrorOf(t, registryYAML("hub", "docker", h.url(), `registry: "docker.io"`))
	m.get("/v2/app/manifests/v1?ns="+url.QueryEscape(stranger.addr)).wantError(http.StatusNotFound, "NAME_UNKNOWN")
	m.get("/v2/app/manifests/v1?ns=").wantError(http.StatusNotFound, "NAME_UNKNOWN")
	stranger.wantAsked(0, "", "")
	h.wantAsked(0, "", "")
}

func TestRegistryHundredClientsPullOneColdImage(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("big", "v1", 1<<20, 1<<20, 2<<20)
	m := newMirror(t, h.url())
	var clients sync.WaitGroup
	for range 100 {
		clients.Go(func() { m.pull("/v2/reg/big", "v1", im) })
	}
	clients.Wait()
	for _, d := range im.order {
		h.wantAsked(1, "", "/v2/big/blobs/"+d)
	}
	h.wantAsked(1, "", "/v2/big/manifests/v1")
	h.wantAsked(0, "", "/v2/big/manifests/"+im.digest)
}

// containerd fetches a blob in parallel parts. For each part it asks for the range from
// its beginning to the end of the blob, reads the part and closes the connection. Other
// clients ask for the exact range.
func TestRegistryParallelRangesOfAColdBlob(t *testing.T) {
	t.Parallel()
	const size, part = 24 << 20, 4 << 20
	h := newHub(t)
	m := newMirror(t, h.url())
	for name, open := range map[string]bool{"containerd": true, "closed ranges": false} {
		body := layerOf(name, size)
		d := h.blob("app", body)
		got := make([]byte, size)
		var parts sync.WaitGroup
		for off := 0; off < size; off += part {
			parts.Go(func() {
				last, spec := size-1, ""
				switch {
				case !open:
					last = off + part - 1
					spec = fmt.Sprintf("bytes=%d-%d", off, last)
				case off > 0:
					spec = fmt.Sprintf("bytes=%d-", off)
				}
				m.part("/v2/reg/app/blobs/"+d, spec, fmt.Sprintf("bytes %d-%d/%d", off, last, size), got[off:off+part])
			})
		}
		parts.Wait()
		if !bytes.Equal(got, body) {
			t.Errorf("%s: the parts do not make the blob", name)
		}
		m.get("/v2/reg/app/blobs/" + d).wantBody(body)
		m.get("/v2/reg/app/blobs/"+d, "Range", "bytes=-5").want(http.StatusPartialContent)
		m.get("/v2/reg/app/blobs/"+d, "Range", fmt.Sprintf("bytes=%d-", size)).want(http.StatusRequestedRangeNotSatisfiable)
	}
	body := layerOf("suffix", 100_000)
	a := m.get("/v2/reg/app/blobs/"+h.blob("app", body), "Range", "bytes=-5").want(http.StatusPartialContent).wantHeader("Content-Range", "bytes 99995-99999/100000")
	if !bytes.Equal(a.body, body[99_995:]) {
		t.Error("the end of a cold blob is not the blob's")
	}
}

// part asks for a Range ("": none), reads as much as into holds and closes.
func (m *mirror) part(path, spec, contentRange string, into []byte) {
	req, err := http.NewRequest(http.MethodGet, m.srv.URL+path, nil)
	if err != nil {
		m.t.Error(err)
		return
	}
	req.Header.Set("Accept", "application/vnd.oci.image.layer.v1.tar+gzip, */*")
	status := http.StatusOK
	if spec != "" {
		req.Header.Set("Range", spec)
		status = http.StatusPartialContent
	} else {
		contentRange = ""
	}
	res, err := m.client.Do(req)
	if err != nil {
		m.t.Error(err)
		return
	}
	defer res.Body.Close()
	if got := res.Header.Get("Content-Range"); res.StatusCode != status || got != contentRange {
		m.t.Errorf("%s: status %d, Content-Range %q", spec, res.StatusCode, got)
	}
	if _, err := io.ReadFull(res.Body, into); err != nil {
		m.t.Error(err)
	}
}

// The key of a blob does not hold the image, so one copy and one fill serve all images.
func TestRegistryBlobIsStoredOnceForAllImages(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	body := layerOf("shared", 5000)
	d := h.blob("one", body)
	h.blob("two", body)
	m := newMirror(t, h.url(), "negative_ttl: 60")
	m.get("/v2/reg/none/blobs/"+d).wantError(http.StatusNotFound, "BLOB_UNKNOWN")
	m.get("/v2/reg/one/blobs/" + d).wantBody(body)
	m.get("/v2/reg/two/blobs/" + d).wantBody(body).wantFrom("cache")
	h.wantAsked(1, "HEAD", "/v2/two/blobs/"+d)
	h.wantAsked(0, "GET", "/v2/two/blobs/"+d)
}

func TestRegistryRefusalOfOneImageIsNotAnothers(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	body := layerOf("flight", 5000)
	d := h.blob("has", body)
	asked, hold := make(chan struct{}), make(chan struct{})
	h.on("/v2/hasnot/blobs/"+d, func(w http.ResponseWriter, r *http.Request) {
		close(asked)
		<-hold
		http.NotFound(w, r)
	})
	m := newMirror(t, h.url())
	var both sync.WaitGroup
	both.Go(func() { m.get("/v2/reg/hasnot/blobs/"+d).wantError(http.StatusNotFound, "BLOB_UNKNOWN") })
	<-asked
	both.Go(func() { m.get("/v2/reg/has/blobs/" + d).wantBody(body) })
	for m.waiters("blobs/"+d) < 2 {
		time.Sleep(time.Millisecond)
	}
	close(hold)
	both.Wait()
}

// A client gets a blob that its image has, however many other images the upstream refuses
// the blob to first.
func TestRegistryRefusalsOfManyImages(t *testing.T) {
	t.Parallel()
	const images = 9 // the last one has the blob
	h := newHub(t)
	m := newMirror(t, h.url())
	for round := range 10 { // the order of the clients is up to the scheduler
		body := layerOf("many", 5000+round)
		d := h.blob(fmt.Sprintf("app%d", images-1), body)
		var served atomic.Bool
		var all sync.WaitGroup
		for i := range images {
			path := fmt.Sprintf("app%d/blobs/%s", i, d)
			if i == images-1 {
				all.Go(func() {
					m.get("/v2/reg/" + path).wantBody(body)
					served.Store(true)
				})
				continue
			}
			h.on("/v2/"+path, func(w http.ResponseWriter, r *http.Request) {
				for r.Method == http.MethodGet && m.waiters("blobs/"+d) < 2 && !served.Load() {
					time.Sleep(time.Millisecond) // until another client waits for this refusal
				}
				http.NotFound(w, r)
			})
			all.Go(func() { m.get("/v2/reg/"+path).wantError(http.StatusNotFound, "BLOB_UNKNOWN") })
		}
		all.Wait()
	}
}

// storing reports whether a fill has sent everything and is not stored yet.
func (m *mirror) storing() bool {
	return slices.ContainsFunc(m.cache.fills.all(), func(f *fill) bool { phase, _ := f.state(); return phase >= phaseComplete })
}

// waiters returns how many clients wait for a fill.
func (m *mirror) waiters(spelling string) int {
	key := target{remote: m.reg.config().remotes["reg"], spelling: spelling}.key()
	m.cache.fills.mu.Lock()
	defer m.cache.fills.mu.Unlock()
	if f := m.cache.fills.byKey[key]; f != nil {
		return f.clients
	}
	return 0
}

func TestRegistryHEADOfABlobKnowsItsImage(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 4321)
	h.image("other", "v1", 1)
	m := newMirror(t, h.url())
	m.get("/v2/reg/app/manifests/v1").want(http.StatusOK)
	h.forget()
	m.head("/v2/reg/app/blobs/"+im.order[1]).want(http.StatusOK).wantHeader("Content-Length", "4321").
		wantHeader("Docker-Content-Digest", im.order[1]).wantHeader("ETag", `"sha256-`+im.order[1][7:]+`"`)
	h.wantAsked(0, "", "")
	m.head("/v2/reg/other/blobs/" + im.order[1]).want(http.StatusNotFound)
	h.wantAsked(1, "HEAD", "/v2/other/blobs/"+im.order[1])
	m.restart()
	m.head("/v2/reg/app/blobs/"+im.order[1]).want(http.StatusOK).wantHeader("Content-Length", "4321")
	h.noHEAD = http.StatusForbidden
	m.head("/v2/reg/app/blobs/"+im.order[0]).want(http.StatusOK).wantHeader("Content-Length", strconv.Itoa(len(im.blobs[im.order[0]])))
}

func TestRegistrySHA512(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	body := layerOf("512", 200_000)
	d := sha512Of(body)
	h.repo("app").blobs[d] = body
	text := []byte(`{"schemaVersion":2,"mediaType":"` + typeManifest + `","config":` + descriptorOf("a/b", d, len(body)) + `,"layers":[]}`)
	md := h.manifest("app", sha512Of(text), typeManifest, text, "v1")
	m := newMirror(t, h.url(), "check_builtin_updates: true")
	m.get("/v2/reg/app/manifests/v1").wantManifest(typeManifest, md, text)
	h.forget()
	m.get("/v2/reg/app/manifests/"+md).wantManifest(typeManifest, md, text).wantFrom("cache")
	h.wantAsked(0, "", "")
	m.get("/v2/reg/app/blobs/" + d).wantBody(body)
	m.get("/v2/reg/app/blobs/" + d).wantBody(body).wantFrom("cache")
	m.advance(2 * time.Hour)
	m.get("/v2/reg/app/manifests/v1").wantManifest(typeManifest, md, text).wantFrom("cache")
	h.wantAsked(1, "HEAD", "/v2/app/manifests/v1")
	h.wantAsked(0, "GET", "/v2/app/manifests/v1")
	lie := sha512Of([]byte("another"))
	h.repo("app").blobs[lie] = body
	m.get("/v2/reg/app/blobs/" + lie).wantBroken()
}

func TestRegistryTagRecheckIsAHEAD(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 10)
	m := newMirror(t, h.url(), "check_builtin_updates: true")
	m.get("/v2/reg/app/manifests/v1").wantFrom("remote")
	// Docker's registry answers 405 to HEAD of a list, which says nothing about tags.
	h.on("/v2/app/tags/list", func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		io.WriteString(w, `{"tags":["v1"]}`)
	})
	m.get("/v2/reg/app/tags/list").want(200)
	m.advance(2 * time.Hour)
	m.get("/v2/reg/app/tags/list").want(200)
	h.forget()
	m.get("/v2/reg/app/manifests/v1").wantManifest(typeManifest, im.digest, im.body).wantFrom("cache")
	h.wantAsked(1, "HEAD", "")
	h.wantAsked(0, "GET", "")
	next := h.image("app", "v1", 11)
	m.advance(2 * time.Hour)
	m.get("/v2/reg/app/manifests/v1").wantManifest(typeManifest, next.digest, next.body).wantFrom("remote")
	m.get("/v2/reg/app/manifests/"+im.digest).wantManifest(typeManifest, im.digest, im.body).wantFrom("cache")
}

func TestRegistryTagThatMoved(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	first := h.image("app", "latest", 10)
	m := newMirror(t, h.url())
	m.get("/v2/reg/app/manifests/latest").wantManifest(typeManifest, first.digest, first.body)
	second := h.image("app", "latest", 20)
	m.get("/v2/reg/app/manifests/latest").wantManifest(typeManifest, first.digest, first.body)
	m.advance(2 * time.Hour)
	m.head("/v2/reg/app/manifests/latest").wantHeader("Docker-Content-Digest", second.digest)
	// A client that began before the tag moved gets the old image, later ones the new one.
	m.pull("/v2/reg/app", "latest", second)
	m.get("/v2/reg/app/manifests/"+first.digest).wantManifest(typeManifest, first.digest, first.body).wantFrom("cache")
	for d, b := range first.blobs {
		m.get("/v2/reg/app/blobs/" + d).wantBody(b)
	}
}

func TestRegistryMissingLayerIsFetchedAgain(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 70_000)
	m := newMirror(t, h.url())
	m.pull("/v2/reg/app", "v1", im)
	m.waitUntilStored()
	key := target{remote: m.reg.config().remotes["reg"], spelling: "blobs/" + im.order[1]}.key()
	if err := os.RemoveAll(filepath.Join(m.dir, filepath.Dir(key))); err != nil {
		t.Fatal(err)
	}
	m.restart()
	m.pull("/v2/reg/app", "v1", im)
	h.wantAsked(2, "GET", "/v2/app/blobs/"+im.order[1])
	h.wantAsked(1, "GET", "/v2/app/blobs/"+im.order[0])
}

func TestRegistryAllowListIsByImage(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	nginx, redis := h.image("library/nginx", "1", 100), h.image("library/redis", "1", 100)
	m := newMirror(t, h.url(), `registry: "docker.io"`, `immutable_patterns: ["^library/nginx"]`)
	m.pull("/v2/reg/nginx", "1", nginx)
	m.get("/v2/reg/nginx/tags/list").want(http.StatusOK)
	m.get("/v2/reg/nginx/referrers/" + nginx.digest).want(http.StatusOK)
	h.forget()
	for _, path := range []string{"manifests/1", "manifests/" + redis.digest, "blobs/" + redis.order[1], "blobs/" + nginx.order[1], "tags/list", "referrers/" + redis.digest} {
		m.get("/v2/reg/redis/"+path).wantError(http.StatusForbidden, "DENIED")
	}
	h.wantAsked(0, "", "")
}

func TestRegistryReferrers(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 10)
	sig := h.manifest("app", "", typeManifest, []byte(`{"schemaVersion":2,"artifactType":"a/sig","subject":`+descriptorOf(typeManifest, im.digest, 1)+`}`))
	m := newMirror(t, h.url())
	path := "/v2/reg/app/referrers/" + im.digest
	for _, source := range []string{"remote", "cache"} {
		a := m.get(path).want(http.StatusOK).wantHeader("Content-Type", typeIndex).wantHeader("OCI-Filters-Applied", "").wantFrom(source)
		if !strings.Contains(string(a.body), sig) {
			t.Errorf("referrers: %s", a.body)
		}
		a = m.get(path+"?artifactType=a%2Fother").want(http.StatusOK).wantHeader("OCI-Filters-Applied", "artifactType").wantFrom("remote") // none
		if strings.Contains(string(a.body), sig) {
			t.Errorf("filtered referrers: %s", a.body)
		}
		m.restart()
	}
	// Without the API the tag decides. Its failure is not an empty list.
	subject := sha256Of([]byte("subject"))
	h.on("/v2/app/referrers/"+subject, http.NotFound)
	for status, want := range map[int]int{401: 403, 403: 403, 429: 503, 500: 502} {
		h.on("/v2/app/manifests/"+strings.Replace(subject, ":", "-", 1), regAnswers(status, "text/plain", ""))
		m.get("/v2/reg/app/referrers/" + subject).want(want)
	}
	h.on("/v2/app/referrers/"+im.digest, regAnswers(http.StatusServiceUnavailable, "text/plain", "tired"))
	m.advance(2 * time.Hour)
	m.get(path).want(http.StatusOK).wantFrom("cache")
	m.get(path+"?artifactType=never-asked").wantError(http.StatusBadGateway, "UNAVAILABLE")
}

// Referrers have pages as tags have, and some registries number them with parameters of
// their own.
func TestRegistryReferrersHavePages(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	subject := sha256Of([]byte("subject"))
	h.on("/v2/app/referrers/"+subject, func(w http.ResponseWriter, r *http.Request) {
		page := r.URL.Query().Get("nextToken")
		if page == "" {
			w.Header().Set("Link", `<`+r.URL.Path+`?artifactType=a%2Fsig&nextToken=t%2B1>; rel="next"`)
		}
		w.Header().Set("Content-Type", typeJSON) // as some do
		fmt.Fprintf(w, `{"schemaVersion":2,"manifests":[{}],"annotations":{"page":%q}}`, page)
	})
	m := newMirror(t, h.url())
	for range 2 {
		a := m.get("/v2/reg/app/referrers/"+subject+"?artifactType=a/sig").want(http.StatusOK).wantHeader("Content-Type", typeIndex)
		next, ok := strings.CutSuffix(strings.TrimPrefix(a.header.Get("Link"), "<"), `>; rel="next"`)
		if !ok {
			t.Fatalf("Link is %q", a.header.Get("Link"))
		}
		if a := m.get(next).want(http.StatusOK).wantHeader("Link", ""); !strings.Contains(string(a.body), `"page":"t+1"`) {
			t.Errorf("the next page is %s", a.body)
		}
	}
	h.wantAsked(2, "", "")
}

// An empty list is a negative answer, however the registry gives it: negative_ttl rules it.
// Signatures come after the first look for them.
func TestRegistryEmptyReferrersAreANegativeAnswer(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		noAPI bool
		keys  []string
		fresh time.Duration
	}{
		{false, nil, 0}, {true, nil, 0}, {false, []string{"negative_ttl: 60"}, time.Minute}, {true, []string{"negative_ttl: 60"}, time.Minute},
	} {
		h := newHub(t)
		h.noAPI = c.noAPI
		im := h.image("app", "v1", 10)
		m := newMirror(t, h.url(), c.keys...)
		path := "/v2/reg/app/referrers/" + im.digest
		m.get(path).want(http.StatusOK).wantFrom("remote")
		h.on("/v2/app/referrers/"+im.digest, regAnswers(http.StatusServiceUnavailable, "", ""))
		m.advance(2 * time.Minute)
		m.get(path).want(http.StatusOK).wantFrom("cache") // it was learned
		h.on("/v2/app/referrers/"+im.digest, nil)
		m.get(path).want(http.StatusOK).wantFrom("remote")
		sig := descriptorOf(typeManifest, sha256Of(nil), 1)
		signed := []byte(`{"schemaVersion":2,"manifests":[` + sig + `]}`)
		h.on("/v2/app/referrers/"+im.digest, regAnswers(http.StatusOK, typeIndex, string(signed)))
		if c.fresh > 0 {
			m.advance(c.fresh / 2)
			m.get(path).want(http.StatusOK).wantFrom("cache")
			m.advance(c.fresh / 2)
		}
		m.get(path).wantBody(signed).wantFrom("remote")
		m.advance(30 * time.Minute) // a list with something in it has the TTL of all lists
		m.get(path).wantBody(signed).wantFrom("cache")
	}
}

func TestRegistryReferrersWithoutTheAPI(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.noAPI = true
	im := h.image("app", "v1", 10)
	none := h.image("app", "v2", 20)
	index := []byte(`{"schemaVersion":2,"mediaType":"` + typeIndex + `","manifests":[` + descriptorOf(typeManifest, im.digest, 1) + `]}`)
	h.manifest("app", "", typeIndex, index, strings.Replace(im.digest, ":", "-", 1))
	m := newMirror(t, h.url(), "check_builtin_updates: true", "negative_ttl: 60")
	m.get("/v2/reg/app/referrers/"+im.digest).wantBody(index).wantHeader("Content-Type", typeIndex)
	m.get("/v2/reg/app/referrers/" + none.digest).wantBody([]byte(emptyIndex)).wantFrom("remote")
	m.get("/v2/reg/app/referrers/" + sha512Of(index)).wantBody([]byte(emptyIndex))
	m.get("/v2/reg/app/referrers/" + none.digest).wantBody([]byte(emptyIndex)).wantFrom("cache")
	// A list that was fetched once is served in an outage.
	m.advance(2 * time.Hour)
	h.down()
	m.get("/v2/reg/app/referrers/" + im.digest).wantBody(index).wantFrom("cache")
	m.get("/v2/reg/app/referrers/" + none.digest).wantBody([]byte(emptyIndex)).wantFrom("cache")
	m.get("/v2/reg/app/referrers/"+sha256Of([]byte("new"))).wantError(http.StatusBadGateway, "UNAVAILABLE")
}

// Everything that a registry holds is served byte for byte: indexes of indexes, artifacts,
// layers of any coding, large ones, and images whose name has ten parts.
func TestRegistryKeepsEveryKindAsItIs(t *testing.T) {
	t.Parallel()
	const name = "a/b/c/d/e/f/g/h/i/j"
	h := newHub(t)
	zstd := h.blob(name, layerOf("zstd", 3000))
	empty := h.blob(name, nil)
	type kind struct{ mediaType, digest, body string }
	var kinds []kind
	add := func(mediaType, body string, tags ...string) string {
		d := h.manifest(name, "", mediaType, []byte(body), tags...)
		kinds = append(kinds, kind{mediaType, d, body})
		return descriptorOf(mediaType, d, len(body))
	}
	oci := add(typeManifest, `{ "schemaVersion":2,"mediaType":"`+typeManifest+`","config":`+descriptorOf("application/vnd.oci.empty.v1+json", empty, 0)+
		`,"layers":[`+descriptorOf("application/vnd.oci.image.layer.v1.tar+zstd", zstd, 3000)+"]}\n")
	schema2 := add(typeDocker, `{"schemaVersion":2,"mediaType":"`+typeDocker+`","config":`+descriptorOf("a/b", empty, 0)+`,"layers":[]}`)
	list := add(typeDockerList, `{"schemaVersion":2,"mediaType":"`+typeDockerList+`","manifests":[`+schema2+`]}`)
	nested := add(typeIndex, `{"schemaVersion":2,"mediaType":"`+typeIndex+`","manifests":[`+oci+`]}`)
	add(typeIndex, `{"schemaVersion":2,"manifests":[`+nested+`, `+list+`]}`, "outer")
	add(typeManifest, `{"schemaVersion":2,"artifactType":"a/sig","config":`+descriptorOf("a/b", empty, 0)+`,"layers":[],"subject":`+oci+`}`)
	add(typeManifest, `{"schemaVersion":2,"config":{},"annotations":{"x":"`+strings.Repeat("x", 4<<20)+`"}}`, "large")
	m := newMirror(t, h.url())
	for _, source := range []string{"remote", "cache"} {
		m.get("/v2/reg/"+name+"/manifests/outer").wantManifest(typeIndex, kinds[4].digest, []byte(kinds[4].body)).wantFrom(source)
		m.get("/v2/reg/"+name+"/manifests/large").wantManifest(typeManifest, kinds[6].digest, []byte(kinds[6].body)).wantFrom(source)
		for _, k := range kinds {
			m.get("/v2/reg/"+name+"/manifests/"+k.digest, "Accept", "text/plain").wantManifest(k.mediaType, k.digest, []byte(k.body))
		}
		m.get("/v2/reg/" + name + "/blobs/" + zstd).wantBody(layerOf("zstd", 3000)).wantFrom(source)
		m.get("/v2/reg/"+name+"/blobs/"+empty).wantBody(nil).wantHeader("Content-Length", "0").wantFrom(source)
		h.down()
	}
}

func TestRegistryTypesOfManifests(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	m := newMirror(t, h.url())
	for i, c := range []struct{ upstream, body, want string }{
		{typeDocker, `{"schemaVersion":2}`, typeDocker},
		{"", `{"schemaVersion":2,"mediaType":"` + typeDocker + `"}`, typeDocker},
		{"application/octet-stream", `{"schemaVersion":2,"mediaType":"` + typeDockerList + `"}`, typeDockerList},
		{"text/plain; charset=utf-8", `{"schemaVersion":2,"manifests":[]}`, typeIndex},
		{"application/json", `{"schemaVersion":2,"config":{}}`, typeManifest},
		{"application/json", `{"schemaVersion":2,"mediaType":"no type\u0000"}`, "application/json"},
		{"", `{ "schemaVersion":2}`, typeJSON},
	} {
		tag := "t" + strconv.Itoa(i)
		h.on("/v2/app/manifests/"+tag, func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Content-Type"] = []string{c.upstream}
			if c.upstream == "" {
				w.Header()["Content-Type"] = nil
			}
			w.Header().Set("Content-Length", strconv.Itoa(len(c.body)))
			io.WriteString(w, c.body)
		})
		m.get("/v2/reg/app/manifests/"+tag).wantManifest(c.want, sha256Of([]byte(c.body)), []byte(c.body))
		m.get("/v2/reg/app/manifests/"+sha256Of([]byte(c.body))).wantManifest(c.want, sha256Of([]byte(c.body)), []byte(c.body))
	}
}

// ParseMediaType takes white space at the end, a line break too. S3 must not look as if it
// were away because of a header that net/http does not send.
func TestRegistryTypeThatIsNoHeader(t *testing.T) {
	t.Parallel()
	h, b := newHub(t), newS3Bench(t)
	m := newMirror(t, h.url())
	m.cache.useObjects(b.store)
	for i, declared := range []string{`application/json\n`, `application/json;\n a=b`, `application/json; a=\"\u0001\"`} {
		body := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"%s","n":%d}`, declared, i)
		path := "/v2/reg/app/manifests/v" + strconv.Itoa(i)
		h.on(strings.Replace(path, "reg/", "", 1), regAnswers(http.StatusOK, "text/plain", string(body)))
		for _, source := range []string{"remote", "cache"} {
			m.get(path).wantManifest(typeJSON, sha256Of(body), body).wantFrom(source)
		}
	}
	if cause := b.store.outage.outageCause(); cause != nil {
		t.Error(cause)
	}
}

func TestRegistryTokens(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.tokens = true
	im := h.image("team/app", "v1", 500, 600)
	m := newMirror(t, h.url())
	var clients sync.WaitGroup
	for range 50 {
		clients.Go(func() { m.pull("/v2/reg/team/app", "v1", im) })
	}
	clients.Wait()
	if h.exchanges != 1 {
		t.Errorf("%d exchanges for one image, want 1", h.exchanges)
	}
}

// What a failing token service means for a new tag and for a stored one: an outage serves
// the copy stale, a denial does not.
func TestRegistryTokenServiceInTrouble(t *testing.T) {
	t.Parallel()
	const stale = http.StatusOK
	for name, c := range map[string]struct {
		service func(http.ResponseWriter, *http.Request)
		copy    int
		status  int
		code    string
	}{
		"unreachable": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, stale, 502, "UNAVAILABLE"},
		"500":         {regAnswers(500, "", ""), stale, 502, "UNAVAILABLE"},
		"nonsense":    {regAnswers(200, "text/html", "<html>"), stale, 502, "UNAVAILABLE"},
		"429":         {regAnswers(429, "", ""), stale, 503, "TOOMANYREQUESTS"},
		"401":         {regAnswers(401, "", ""), 403, 403, "DENIED"},
		"403":         {regAnswers(403, "", ""), 403, 403, "DENIED"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			h.tokens = true
			im := h.image("app", "v1", 500)
			m := newMirror(t, h.url())
			m.pull("/v2/reg/app", "v1", im)
			m.advance(2 * time.Hour) // the token has expired as well
			h.on("/token", c.service)
			a := m.get("/v2/reg/app/manifests/new").wantError(c.status, c.code)
			if c.code == "DENIED" && !strings.Contains(string(a.body), `\"reg\"`) {
				t.Errorf("%s does not name the remote", a.body)
			}
			if c.code == "TOOMANYREQUESTS" {
				a.wantHeader("Retry-After", "1")
			}
			m.get("/v2/reg/app/manifests/v1").want(c.copy)
			m.get("/v2/reg/app/manifests/"+im.digest).wantManifest(typeManifest, im.digest, im.body)
			m.get("/v2/reg/app/blobs/" + im.order[1]).wantBody(im.blobs[im.order[1]])
			h.on("/token", nil)
			m.advance(2 * time.Hour)
			m.get("/v2/reg/app/manifests/v1").wantManifest(typeManifest, im.digest, im.body).wantFrom("remote")
		})
	}
}
