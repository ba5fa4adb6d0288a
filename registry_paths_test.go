package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
)

func TestRegistryImageNames(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"app": true, "a/b/c/d/e/f/g/h/i/j": true, "a.b_c__d-e/f--g": true, "0": true, "tags": true,
		"": false, "/": false, "/a": false, "a/": false, "a//b": false, "A": false, "a..b": false, "a___b": false,
		"a._b": false, "-a": false, "a-": false, "a-/b": false, "a/-b": false, "a b": false, "a\x00": false, "é": false, "a:b": false, "..": false,
	} {
		if got := imagePattern.MatchString(name); got != want {
			t.Errorf("%q as the name of an image: %v", name, got)
		}
	}
	for tag, want := range map[string]bool{
		"v1": true, "_x": true, "1.0_a-B": true, strings.Repeat("t", 128): true,
		"": false, ".a": false, "-a": false, "a/b": false, "a:b": false, "a~b": false, "a b": false, strings.Repeat("t", 129): false,
	} {
		if got := isTag(tag); got != want {
			t.Errorf("isTag(%q) is %v", tag, got)
		}
	}
}

func TestRegistryPathsAreReadFromTheRight(t *testing.T) {
	t.Parallel()
	cfg := registryConfig(t)
	d := sha256Of(nil)
	for path, want := range map[string]string{
		"/v2/reg/tags/tags/list":                  "reg tags tags ",
		"/v2/reg/x/tags/list/manifests/v1":        "reg x/tags/list manifests v1",
		"/v2/reg/foo/manifests/bar/manifests/v1":  "reg foo/manifests/bar manifests v1",
		"/v2/reg/manifests/manifests/manifests":   "reg manifests manifests manifests",
		"/v2/reg/blobs/blobs/" + d:                "reg blobs blobs " + d,
		"/v2/reg/v2/manifests/x":                  "reg v2 manifests x",
		"/v2/reg/v2/app/manifests/x":              "reg app manifests x",
		"/reg/v2/v2/app/manifests/x":              "reg v2/app manifests x",
		"/reg//v2/app/manifests/x":                "reg app manifests x",
		"/v2/reg/.//v2//app/manifests/x":          "reg app manifests x",
		"/v2/reg//app/manifests/x":                "reg app manifests x",
		"/v2/hub/app/manifests/x":                 "hub library/app manifests x",
		"/v2/hub/a/b/manifests/x?ns=reg.example":  "hub a/b manifests x",
		"/v2/hub/manifests/x?ns=docker.io":        "hub library/hub manifests x",
		"/v2/app/manifests/x?ns=Docker.IO":        "hub library/app manifests x",
		"/v2/reg/app/referrers/sha256%3A" + d[7:]: "reg app referrers " + d,
		"/v2/reg/a%2Fb/manifests/x":               "reg a/b manifests x",
		"/v2/reg/app/manifests/_catalog":          "reg app manifests _catalog",
	} {
		u, err := url.Parse(path)
		if err != nil {
			t.Fatal(err)
		}
		c, err := parseCall(cfg, u)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if got := c.remote.name + " " + c.image + " " + c.route + " " + c.reference; got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}

func registryConfig(t testing.TB) *config {
	y := "remotes:\n" + registryYAML("reg", "docker", "https://reg.example") + registryYAML("hub", "docker", "https://registry-1.docker.io") + registryYAML("files", "generic", "https://files.example")
	cfg, err := parseConfig("remotes.yaml", []byte(y), func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestRegistryLinks(t *testing.T) {
	t.Parallel()
	for link, want := range map[string]string{
		`</v2/a/tags/list?n=2&last=b>; rel="next"`:                          "last=b&n=2",
		`<https://h.example/v2/a/tags/list?last=b&n=2>; rel=next`:           "last=b&n=2",
		`<?last=b%2Bc>;rel="next"`:                                          "last=b%2Bc",
		`</x?a=1>; rel="prev", </x?b=2>; title="n,e;x"; REL = "first NEXT"`: "b=2",
		`</x?page=op%3D%2Faque+l&ns=docker.io>; rel="next"`:                 "page=op%3D%2Faque+l",
		`</x?a=1>; rel="nextish"`:                                           "",
		`</x?a=1`:                                                           "",
		`</x?a=1>`:                                                          "",
		`rel="next"`:                                                        "",
		`<>; rel="next"`:                                                    "",
		"<:\x01?a=1>; rel=next":                                             "",
		`</x?a=1&b=%zz>; rel="next"`:                                        "a=1",
		``:                                                                  "",
	} {
		if got := nextPageQuery([]string{link}); got != want {
			t.Errorf("%s: %q, want %q", link, got, want)
		}
	}
	if got := nextPageQuery([]string{`<x?a=1>; rel=prev`, `<x?b=1>; rel=next`}); got != "b=1" {
		t.Errorf("next page of two Link headers: %q", got)
	}
}

func TestRegistrySizesAreBounded(t *testing.T) {
	t.Parallel()
	sizes := newRegistry(&cache{}, nil, nil).blobs
	for i := range 2 * maxBlobs {
		sizes.put(strconv.Itoa(i), int64(i))
	}
	if n := len(sizes.keys()); n != maxBlobs {
		t.Errorf("%d sizes are kept", n)
	}
	if size, _ := sizes.get(strconv.Itoa(2*maxBlobs - 1)); size != 2*maxBlobs-1 {
		t.Error("the latest size is lost")
	}
}

func FuzzRegistryPath(f *testing.F) {
	d := sha256Of(nil)
	for _, s := range []string{"/v2/", "/v2/reg/app/manifests/v1", "/reg/v2/a/b/blobs/" + d, "/v2/app/tags/list?ns=docker.io&n=1&last=%00", "/v2/reg/v2/app/referrers/" + d + "?artifactType=a/b",
		"/v2/files/x/manifests/v1", "/v2//", "/v2/reg/..%2f../manifests/v1", "/v2/v2/v2/v2/manifests/v2"} {
		f.Add(s)
	}
	cfg := registryConfig(f)
	g := newRegistry(&cache{}, func() *config { return cfg }, nil)
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.ParseRequestURI(s)
		if err != nil || !strings.HasPrefix(u.Path, "/") {
			return
		}
		c, err := parseCall(cfg, u)
		if err != nil {
			if coded, ok := errors.AsType[*registryError](err); !ok || statusOf(coded) < 400 || statusOf(coded) >= 500 {
				t.Fatalf("%q: error %v", s, err)
			}
			return
		}
		if c.route == routePing {
			return
		}
		file, err := g.newFileRequest(c)
		if err != nil {
			if statusOf(err) != http.StatusRequestURITooLong {
				t.Fatalf("%q: error %v", s, err)
			}
			return
		}
		for _, bad := range []string{"..", "//", "\\", " ", "\x00", "\n", "%2F", "%2f", "#"} {
			path, _, _ := strings.Cut(file.wire, "?")
			if strings.Contains(path, bad) {
				t.Fatalf("%q: wire %q", s, file.wire)
			}
		}
		if wire, err := joinURL(file.remote.origins[0].url, file.wire); err != nil || wire.String() != file.remote.origins[0].url.String()+"/"+file.wire {
			t.Fatalf("%q: %q goes out as %v, %v", s, file.wire, wire, err)
		}
		if query, _ := url.ParseQuery(c.query); query.Has("ns") {
			t.Fatalf("%q: the query %q has ns", s, c.query)
		}
		// The path /{remote}/v2/... is parsed to the same call.
		again, err := parseCall(cfg, &url.URL{Path: "/" + c.remote.name + "/" + "v2/" + file.path, RawQuery: c.query})
		if err != nil {
			t.Fatalf("%q: its canonical shape fails: %v", s, err)
		}
		if w, err := g.newFileRequest(again); err != nil || w.target != file.target {
			t.Fatalf("%q is %+v, its canonical shape %+v (%v)", s, file.target, w.target, err)
		}
	})
}

func FuzzLink(f *testing.F) {
	for _, s := range []string{`</v2/a/tags/list?n=2&last=b>; rel="next"`, `<x?a=1>; rel=prev, <y?b=%zz>;rel="a next"`, `<`, `<>`, `<?>;rel=next`, `<//[::1?a=b>; rel=next`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		q := nextPageQuery([]string{s})
		if strings.ContainsAny(q, "<>\" \r\n\x00;,#") {
			t.Fatalf("%q: query %q would break out of a Link", s, q)
		}
		if q == "" {
			return
		}
		w := &response{ResponseWriter: httptest.NewRecorder()}
		(&registryFile{call: &registryCall{path: "/v2/r/a/tags/list", ns: "h:5"}}).setHeaders(w, "", &record{Link: q})
		if again := nextPageQuery(w.Header()["Link"]); again != q {
			t.Fatalf("%q: %q becomes %q", s, q, again)
		}
	})
}
