package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// cut makes a script whose first answers to GET, times of them, break off after n bytes
// of body. Later ones are complete and serve Ranges.
func cut(body []byte, n, times int) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"cut"`)
		if r.Method != http.MethodGet || times <= 0 {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
			return
		}
		times--
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body[:n])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
}

func TestRegistryWrongDigestIsNeverCompleted(t *testing.T) {
	t.Parallel()
	const held = 64 << 10 // of the end, until the digest is right
	h := newHub(t)
	m := newMirror(t, h.url())
	for _, n := range []int{0, 10, held, held + 1, 1 << 20} {
		bad := layerOf("wrong", n)
		good := append(bad[:max(n-1, 0):max(n-1, 0)], 'x')
		d := h.blob("app", good)
		h.on("/v2/app/blobs/"+d, regAnswers(http.StatusOK, typeBinary, string(bad)))
		a := m.get("/v2/reg/app/blobs/" + d).wantBroken()
		if len(a.body) > len(good)-held && a.status == http.StatusOK {
			t.Errorf("%d of %d wrong bytes were sent", len(a.body), len(good))
		}
		if n <= held { // of a larger one a range is not held back
			m.get("/v2/reg/app/blobs/"+d, "Range", "bytes=-10").wantBroken()
			a.wantError(http.StatusBadGateway, "UNAVAILABLE")
		}
		h.on("/v2/app/blobs/"+d, func(w http.ResponseWriter, _ *http.Request) { // chunked
			w.(http.Flusher).Flush()
			w.Write(bad)
		})
		m.get("/v2/reg/app/blobs/" + d).wantBroken()
		h.on("/v2/app/blobs/"+d, regAnswers(http.StatusOK, "text/html", "<html>please log in</html>"))
		m.get("/v2/reg/app/blobs/"+d).wantError(http.StatusBadGateway, "UNAVAILABLE")
		h.on("/v2/app/blobs/"+d, nil)
		m.get("/v2/reg/app/blobs/" + d).wantBody(good).wantFrom("remote")
	}
	im := h.image("app", "v1", 10)
	h.on("/v2/app/manifests/"+im.digest, regAnswers(http.StatusOK, typeManifest, strings.ToUpper(string(im.body))))
	m.get("/v2/reg/app/manifests/"+im.digest).wantError(http.StatusBadGateway, "UNAVAILABLE")
	m.head("/v2/reg/app/manifests/" + im.digest).want(http.StatusBadGateway)
	h.on("/v2/app/manifests/"+im.digest, nil)
	m.get("/v2/reg/app/manifests/"+im.digest).wantManifest(typeManifest, im.digest, im.body)
}

func TestRegistryLoginPagesAreNotStored(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 10)
	m := newMirror(t, h.url())
	paths := []string{"manifests/v1", "tags/list", "referrers/" + im.digest}
	for _, page := range []string{"<html>please log in</html>", `{"message":"log in"}`, `["tags"]`, `{"tags":{},"manifests":1}`, `{"schemaVersion":2`, `{"schemaVersion":2}<html>`, ""} {
		for _, p := range paths {
			h.on("/v2/app/"+p, regAnswers(http.StatusOK, "text/html", page))
			a := m.get("/v2/reg/app/" + p).want(http.StatusBadGateway)
			if strings.Contains(string(a.body), "log in") {
				t.Errorf("%s: upstream's page was passed on", p)
			}
		}
	}
	for _, p := range paths {
		h.on("/v2/app/"+p, nil)
		m.get("/v2/reg/app/" + p).want(http.StatusOK).wantFrom("remote")
	}
	for i, empty := range []string{`{"name":"e","tags":null}`, `{"name":"e","tags":[]}`} {
		h.on(fmt.Sprintf("/v2/e%d/tags/list", i), regAnswers(http.StatusOK, "", empty))
		m.get(fmt.Sprintf("/v2/reg/e%d/tags/list", i)).wantBody([]byte(empty)).wantHeader("Content-Type", typeJSON)
	}
}

func TestRegistryResumesALayer(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	body := layerOf("cut", 3<<20)
	d := h.blob("app", body)
	m := newMirror(t, h.url())
	h.on("/v2/app/blobs/"+d, cut(body, 1<<20, 1))
	m.get("/v2/reg/app/blobs/" + d).wantBody(body)
	m.get("/v2/reg/app/blobs/" + d).wantBody(body).wantFrom("cache")
}

func TestRegistryLayerThatCannotBeResumed(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	body := layerOf("cut for good", 1<<20)
	d := h.blob("app", body)
	m := newMirror(t, h.url())
	h.on("/v2/app/blobs/"+d, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body[:500_000])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	m.get("/v2/reg/app/blobs/" + d).wantBroken()
	h.on("/v2/app/blobs/"+d, nil)
	m.get("/v2/reg/app/blobs/" + d).wantBody(body).wantFrom("remote")
}

// containerd continues with a Range where its connection broke off.
func TestRegistryClientResumes(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	body := layerOf("resume", 5<<20)
	d := h.blob("app", body)
	m := newMirror(t, h.url())
	res, err := m.client.Get(m.srv.URL + "/v2/reg/app/blobs/" + d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(res.Body, make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	a := m.get("/v2/reg/app/blobs/"+d, "Range", "bytes=100000-").want(http.StatusPartialContent).
		wantHeader("Content-Range", "bytes 100000-5242879/5242880")
	if !bytes.Equal(a.body, body[100_000:]) {
		t.Error("the rest is not the blob's")
	}
	h.wantAsked(1, "GET", "/v2/app/blobs/"+d)
}

func TestRegistryTooManyRequestsUpstream(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 10)
	m := newMirror(t, h.url())
	paths := []string{"manifests/v1", "tags/list", "referrers/" + im.digest}
	for _, p := range paths {
		m.get("/v2/reg/app/" + p).want(http.StatusOK)
	}
	m.advance(2 * time.Hour)
	busy := func(after string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			if after != "" {
				w.Header().Set("Retry-After", after)
			}
			w.WriteHeader(http.StatusTooManyRequests)
		}
	}
	for _, p := range paths {
		h.on("/v2/app/"+p, busy("7"))
		m.get("/v2/reg/app/" + p).want(http.StatusOK).wantFrom("cache")
	}
	h.on("/v2/app/manifests/new", busy("7"))
	m.get("/v2/reg/app/manifests/new").wantError(http.StatusServiceUnavailable, "TOOMANYREQUESTS").wantHeader("Retry-After", "7")
	h.on("/v2/app/blobs/"+im.order[1], busy(""))
	if a := m.get("/v2/reg/app/blobs/"+im.order[1]).wantError(http.StatusServiceUnavailable, "TOOMANYREQUESTS"); a.header.Get("Retry-After") == "" {
		t.Error("a 503 without Retry-After")
	}
}

func TestRegistryManifestOverTheCap(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	m := newMirror(t, h.url())
	text := func(n int) []byte {
		return append(append([]byte(`{"schemaVersion":2,"x":"`), bytes.Repeat([]byte("x"), n-26)...), `"}`...)
	}
	large, over := text(8<<20), text(8<<20+1)
	d := h.manifest("app", "", typeIndex, large, "large")
	m.get("/v2/reg/app/manifests/large").wantManifest(typeIndex, d, large)
	d = h.manifest("app", "", typeIndex, over, "over")
	m.get("/v2/reg/app/manifests/over").wantError(http.StatusBadGateway, "MANIFEST_INVALID")
	m.get("/v2/reg/app/manifests/"+d).wantError(http.StatusBadGateway, "MANIFEST_INVALID")
	h.on("/v2/app/manifests/chunked", func(w http.ResponseWriter, _ *http.Request) {
		w.(http.Flusher).Flush()
		w.Write(over)
	})
	m.get("/v2/reg/app/manifests/chunked").wantError(http.StatusBadGateway, "MANIFEST_INVALID")
}

func TestRegistryErrors(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.image("app", "v1", 10)
	m := newMirrorOf(t, registryYAML("reg", "docker", h.url()), registryYAML("files", "generic", h.url()), registryYAML("dead", "docker", "http://127.0.0.1:1"))
	zeros := strings.Repeat("0", 64)
	for name, c := range map[string]struct {
		path   string
		status int
		code   string
		asks   bool
	}{
		"unknown remote":            {"/v2/nosuch/app/manifests/v1", 404, "NAME_UNKNOWN", false},
		"unknown remote in front":   {"/nosuch/v2/app/manifests/v1", 404, "NAME_UNKNOWN", false},
		"unknown namespace":         {"/v2/app/manifests/v1?ns=nosuch.example", 404, "NAME_UNKNOWN", false},
		"ping of an unknown remote": {"/v2/nosuch/", 404, "NAME_UNKNOWN", false},
		"the same in front":         {"/nosuch/v2/", 404, "NAME_UNKNOWN", false},
		"remote without image":      {"/v2/reg/manifests/v1", 404, "NAME_UNKNOWN", false},
		"files":                     {"/v2/files/app/manifests/v1", 404, "NAME_UNKNOWN", false},
		"files in front":            {"/files/v2/app/manifests/v1", 404, "NAME_UNKNOWN", false},
		"catalog":                   {"/v2/_catalog", 404, "UNSUPPORTED", false},
		"catalog of a remote":       {"/v2/reg/_catalog", 404, "UNSUPPORTED", false},
		"no route":                  {"/v2/reg/app/nosuch/thing", 404, "UNSUPPORTED", false},
		"no route in front":         {"/reg/v2/app/nosuch/thing", 404, "UNSUPPORTED", false},
		"missing tag":               {"/v2/reg/app/manifests/nosuch", 404, "MANIFEST_UNKNOWN", true},
		"missing digest":            {"/v2/reg/app/manifests/sha256:" + zeros, 404, "MANIFEST_UNKNOWN", true},
		"missing blob":              {"/v2/reg/app/blobs/sha256:" + zeros, 404, "BLOB_UNKNOWN", true},
		"bad digest":                {"/v2/reg/app/blobs/sha256:bad", 400, "DIGEST_INVALID", false},
		"bad digest of a manifest":  {"/v2/reg/app/manifests/sha256:bad", 400, "DIGEST_INVALID", false},
		"bad digest of referrers":   {"/v2/reg/app/referrers/v1", 400, "DIGEST_INVALID", false},
		"digest in capitals":        {"/v2/reg/app/blobs/sha256:" + strings.Repeat("A", 64), 400, "DIGEST_INVALID", false},
		"md5":                       {"/v2/reg/app/blobs/md5:" + zeros[:32], 400, "DIGEST_INVALID", false},
		"capitals":                  {"/v2/reg/App/manifests/v1", 400, "NAME_INVALID", false},
		"dots":                      {"/v2/reg/..%2fapp/manifests/v1", 400, "NAME_INVALID", false},
		"empty element":             {"/v2/reg/app//x/manifests/v1", 400, "NAME_INVALID", false},
		"empty tag":                 {"/v2/reg/app/manifests/", 404, "MANIFEST_UNKNOWN", false},
		"long tag":                  {"/v2/reg/app/manifests/" + strings.Repeat("t", 129), 404, "MANIFEST_UNKNOWN", false},
		"odd tag":                   {"/v2/reg/app/manifests/%00", 404, "MANIFEST_UNKNOWN", false},
		"long name":                 {"/v2/reg/" + strings.Repeat("a/", 600) + "b/manifests/v1", 414, "NAME_INVALID", false},
		"a registry that is down":   {"/v2/dead/app/manifests/v1", 502, "UNAVAILABLE", false},
		"a layer that is not there": {"/v2/dead/app/blobs/sha256:" + zeros, 502, "UNAVAILABLE", false},
	} {
		h.forget()
		m.get(c.path).wantError(c.status, c.code)
		if a := m.head(c.path).want(c.status); len(a.body) != 0 {
			t.Errorf("%s: HEAD has a body", name)
		}
		if n := h.count("", ""); (n > 0) != c.asks {
			t.Errorf("%s: %d upstream requests", name, n)
		}
	}
	if e := (&registryCall{}).withErrorCode(errTimeout); statusOf(e) != http.StatusGatewayTimeout || e.(*registryError).code != "UNAVAILABLE" {
		t.Errorf("a registry that is silent is %d, %v", statusOf(e), e)
	}
	for _, p := range []string{"/v2/files/app/manifests/v1", "/files/v2/app/manifests/v1"} {
		if a := m.get(p); !strings.Contains(string(a.body), `"location":"/api/files/"`) {
			t.Errorf("%s does not say where the files are: %s", p, a.body)
		}
	}
}

func TestRegistryStatusesOfTheUpstream(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	m := newMirror(t, h.url())
	d := sha256Of([]byte("any"))
	for _, c := range []struct {
		upstream, status int
		code             string
	}{
		{401, 403, "DENIED"}, {403, 403, "DENIED"}, {410, 404, ""}, {400, 400, "UNKNOWN"},
		{500, 502, "UNAVAILABLE"}, {501, 502, "UNAVAILABLE"}, {204, 502, "UNAVAILABLE"},
	} {
		for path, missing := range map[string]string{"manifests/v1": "MANIFEST_UNKNOWN", "blobs/" + d: "BLOB_UNKNOWN", "tags/list": "NAME_UNKNOWN"} {
			h.on("/v2/app/"+path, regAnswers(c.upstream, "text/html", ""))
			code := c.code
			if code == "" {
				code = missing
			}
			a := m.get("/v2/reg/app/"+path).wantError(c.status, code)
			if c.code == "DENIED" && !strings.Contains(string(a.body), `\"reg\"`) {
				t.Errorf("%d: %s does not name the remote", c.upstream, a.body)
			}
		}
	}
	for status, want := range map[int]int{401: 403, 403: 403, 400: 200, 404: 200, 405: 200, 500: 502} {
		subject := sha256Of(strconv.AppendInt(nil, int64(status), 10))
		h.on("/v2/app/referrers/"+subject, regAnswers(status, "text/plain", ""))
		m.get("/v2/reg/app/referrers/" + subject).want(want)
	}
}

func TestRegistryIsReadOnly(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	m := newMirror(t, h.url())
	for _, c := range [][2]string{{"POST", "/v2/reg/app/blobs/uploads/"}, {"PUT", "/v2/reg/app/manifests/v1"}, {"PATCH", "/reg/v2/app/blobs/uploads/x"}, {"DELETE", "/v2/nosuch/app/manifests/v1"}} {
		m.ask(c[0], c[1]).wantError(http.StatusMethodNotAllowed, "UNSUPPORTED").wantHeader("Allow", "GET, HEAD")
	}
	h.wantAsked(0, "", "")
}

// Images are served, and their digests verified, while the disk is full.
func TestRegistryWithoutASpool(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 300_000)
	m := newMirror(t, h.url())
	m.cache.space.createFile = func() (*os.File, error) { return nil, errNoSpace }
	for range 2 {
		m.pull("/v2/reg/app", "v1", im)
	}
	m.get("/v2/reg/app/referrers/" + im.digest).want(http.StatusOK)
	h.on("/v2/app/manifests/page", regAnswers(http.StatusOK, "text/html", "<html>"))
	m.get("/v2/reg/app/manifests/page").wantError(http.StatusBadGateway, "MANIFEST_INVALID")
}

// A list whose link to the next page cannot be stored is an error: without the link a
// client would take the page for the whole list.
func TestRegistryLinkThatCannotBeKept(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	m := newMirror(t, h.url())
	send := func(token string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Link", `</v2/app/tags/list?page=`+token+`>; rel="next"`)
			io.WriteString(w, `{"tags":["a"]}`)
		}
	}
	h.on("/v2/app/tags/list", send(strings.Repeat("p", 2000)))
	m.get("/v2/reg/app/tags/list").wantError(http.StatusBadGateway, "UNKNOWN")
	long := strings.Repeat("p", 500)
	h.on("/v2/app/tags/list", send(long))
	for range 2 {
		m.get("/v2/reg/app/tags/list").want(http.StatusOK).wantHeader("Link", `</v2/reg/app/tags/list?page=`+long+`>; rel="next"`)
		m.restart()
	}
}

func TestRegistryListing(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("team/app", "v1", 10)
	m := newMirror(t, h.url())
	m.pull("/v2/reg/team/app", "v1", im)
	m.get("/v2/reg/team/app/tags/list?n=5").want(http.StatusOK)
	var l listing
	if err := json.Unmarshal(m.get("/artifacts/reg").want(http.StatusOK).body, &l); err != nil {
		t.Fatal(err)
	}
	slices.Sort(im.order)
	want := []string{"blobs/" + im.order[0] + " immutable", "blobs/" + im.order[1] + " immutable",
		"team/app/manifests/" + im.digest + " immutable", "team/app/manifests/v1 mutable", "team/app/tags/list mutable"}
	var got []string
	for _, e := range l.Artifacts {
		got = append(got, e.Path+" "+string(e.Class))
		if !strings.HasPrefix(e.Source, h.url()+"/v2/"+e.Path) {
			t.Errorf("%s comes from %s", e.Path, e.Source)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("listed %q, want %q", got, want)
	}
}

func TestRegistryPurgeByListedPath(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	im := h.image("app", "v1", 10)
	m := newMirror(t, h.url())
	m.pull("/v2/reg/app", "v1", im)
	m.get("/v2/reg/app/tags/list?n=5").want(http.StatusOK)
	for _, path := range []string{"blobs/" + im.order[1], "app/manifests/" + im.digest, "app/manifests/v1", "app/tags/list"} {
		m.ask(http.MethodDelete, "/artifacts/reg/"+path, "Authorization", "Bearer t").want(http.StatusNoContent)
		m.ask(http.MethodDelete, "/artifacts/reg/"+path, "Authorization", "Bearer t").want(http.StatusNotFound)
	}
	h.forget()
	m.pull("/v2/reg/app", "v1", im)
	h.wantAsked(1, "GET", "/v2/app/blobs/"+im.order[1])
	h.wantAsked(1, "GET", "/v2/app/manifests/v1")
}

func TestRegistryPurgeForgetsWhatIsMissing(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	m := newMirror(t, h.url(), "negative_ttl: 600")
	m.get("/v2/reg/app/manifests/v1").wantError(404, "MANIFEST_UNKNOWN")
	im := h.image("app", "v1", 10)
	m.get("/v2/reg/app/manifests/v1").wantError(404, "MANIFEST_UNKNOWN").wantFrom("cache")
	m.ask("DELETE", "/artifacts/reg/app/manifests/v1", "Authorization", "Bearer t").want(404)
	m.get("/v2/reg/app/manifests/v1").wantManifest(typeManifest, im.digest, im.body)
}

// A registry may redirect to another one, whose token is got without our password. What
// goes wrong there is not blamed on that password.
func TestRegistryRedirectsToAnotherOne(t *testing.T) {
	t.Parallel()
	a, b := newHub(t), newHub(t)
	b.tokens = true
	im := b.image("app", "v1", 500)
	m := newMirror(t, a.url(), `username: "u"`, `password: "p"`)
	for _, p := range []string{"manifests/v1", "blobs/" + im.order[1], "tags/list"} {
		a.on("/v2/app/"+p, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, b.url()+r.URL.Path, http.StatusTemporaryRedirect)
		})
	}
	m.get("/v2/reg/app/manifests/v1").wantManifest(typeManifest, im.digest, im.body)
	m.get("/v2/reg/app/blobs/" + im.order[1]).wantBody(im.blobs[im.order[1]])
	m.advance(2 * time.Hour)
	b.on("/token", regAnswers(http.StatusForbidden, "", ""))
	for _, want := range []string{"no anonymous token", "credentials of its own"} {
		reply := m.get("/v2/reg/app/tags/list").wantError(http.StatusForbidden, "DENIED")
		if text := string(reply.body); !strings.Contains(text, want) || strings.Contains(text, "password") {
			t.Errorf("the error is %s, want one about %s", text, want)
		}
		b.tokens = false
		b.on("/v2/app/tags/list", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Basic realm="b"`)
			w.WriteHeader(http.StatusUnauthorized)
		})
	}
}
