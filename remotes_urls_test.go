package main

import (
	"os"
	"testing"
)

func TestURLsFindTheirRemote(t *testing.T) {
	t.Parallel()
	cfg := mustParse(t, `remotes:
  short: {base_url: "https://Files.example/pub", mirrors: ["http://mirror.example:8080/copy"]}
  deep: {base_url: "https://files.example/pub/deep"}
  root: {base_url: "https://root.example"}
  twin: {base_url: "http://mirror.example:8080/copy"}
  own: {type: local}
  tags: {base_url: "https://git.example", immutable_patterns: ["/releases/"]}
  other: {base_url: "https://git.example/0"}
  trees: {base_url: "https://git.example", immutable_patterns: ["/archive/"], mutable_patterns: ["/latest/"]}
  hub: {base_url: "https://registry-1.docker.io", package: docker}
  quay: {base_url: "https://quay.example/base", package: docker, registry: "quay.io"}
`)
	for _, c := range []struct{ url, want string }{
		{"https://files.example/pub/a.bin", "/api/short/a.bin"},
		{"HTTPS://FILES.example/pub/A.bin?x=1", "/api/short/A.bin?x=1"},
		{"https://files.example/PUB/a.bin", ""},
		{"https://files.example/pub/deep/b/c", "/api/deep/b/c"},
		{"https://files.example/pub/deeper/c", "/api/short/deeper/c"},
		{"https://files.example/public", ""},
		{"https://files.example/pub", "/api/short/"},
		{`https://files.example/pub/deep">`, `/api/deep/">`}, // a text goes on behind the base
		{"https://files.example/pub/deep' x", "/api/deep/' x"},
		{"https://files.example/", ""},
		{"http://files.example/pub/a", ""},
		{"https://root.example:8443/a", ""},
		{"https://root.example.org/a", ""},
		{"https://root.example/a%2Fb//c", "/api/root/a%2Fb//c"},
		{"http://mirror.example:8080/copy/a", "/api/twin/a"}, // a base_url, and a mirror of another
		{"https://registry-1.docker.io/v2/library/nginx/manifests/1", "/v2/hub/library/nginx/manifests/1"},
		{"https://docker.io/v2/library/nginx/tags/list", "/v2/hub/library/nginx/tags/list"},
		{"https://quay.example/base/v2/a/blobs/b", "/v2/quay/a/blobs/b"},
		{"https://quay.io/v2/a/blobs/b", "/v2/quay/a/blobs/b"},
		{"https://quay.io/repository/a", ""},
		{"https://git.example/a/releases/b", "/api/tags/a/releases/b"}, // of remotes with one URL, one that allows the path
		{"https://git.example/a/archive/b.tar.gz", "/api/trees/a/archive/b.tar.gz"},
		{"https://git.example/a/latest/b?c#d", "/api/trees/a/latest/b?c#d"},
		{"https://git.example/a", "/api/tags/a"},
		{"https://git.example/a\" /archive/", "/api/tags/a\" /archive/"},
		{"", ""},
	} {
		got := ""
		if b := cfg.urls.find([]byte(c.url), nil); b != nil {
			got = b.pathHere(c.url)
		}
		if got != c.want {
			t.Errorf("%s: found %q, want %q", c.url, got, c.want)
		}
	}
}

func TestPathsHereAreEscaped(t *testing.T) {
	t.Parallel()
	r := &remote{name: "r"}
	for path, want := range map[string]string{
		"a/b.bin": "/api/r/a/b.bin", "a b+c?d#e%20": "/api/r/a%20b+c%3Fd%23e%2520", "/x": "/api/r/x", "": "/api/r/", "*": "/api/r/%2A", "a/": "/api/r/a/",
	} {
		if got := r.pathHere(path); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
}

func TestImageReferences(t *testing.T) {
	t.Parallel()
	for ref, want := range map[string]string{
		"nginx": "nginx/manifests/latest", "a/b:1.0": "a/b/manifests/1.0", "a/b@sha256:ff": "a/b/manifests/sha256:ff",
		"a/b:1@sha256:ff": "a/b/manifests/sha256:ff", "host:80/a": "host:80/a/manifests/latest",
	} {
		if got := manifestPath(ref); got != want {
			t.Errorf("%s: %s, want %s", ref, got, want)
		}
	}
}

// The shipped remotes.yaml has two remotes for one host: a URL leads to the one that has
// the file.
func TestURLsOfTheShippedRemotes(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("remotes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	cfg := mustParse(t, string(data))
	for u, want := range map[string]string{
		"https://github.com/o/r/archive/refs/tags/v1.tar.gz": "github-archive", "https://github.com/o/r/releases/download/v1/r.tar.gz": "github",
		"https://github.com/o/r/releases/latest/download/r.tar.gz": "github", "https://github.com/o/r": "github",
	} {
		if b := cfg.urls.find([]byte(u), nil); b == nil || b.remote.name != want {
			t.Errorf("%s leads to %v, want %s", u, b, want)
		}
	}
}
