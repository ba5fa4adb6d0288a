// remotes_urls.go: which remote has the file at a URL, and the path of that file here:
// for texts that name files by the address of their upstream.

package main

import (
	"bytes"
	"cmp"
	"net/url"
	"slices"
	"strings"
)

// urlTable finds the remote that a URL lies in: the bases by their host. The longest
// base comes first, since one remote may lie in another; of two with one URL base_url
// comes before a mirror.
type urlTable map[string][]urlBase

// urlBase is a URL below which a remote has its files.
type urlBase struct {
	url    string // without a slash at its end
	remote *remote
}

// newURLTable makes the table of all remotes in cfg that have an upstream. That forLinks
// leads links in documents: it has no mirrors and no registries.
func newURLTable(cfg *config, forLinks bool) urlTable {
	t := urlTable{}
	add := func(r *remote, base string) {
		if r.packageType == "docker" {
			base += "/v2" // what follows it follows urlPath here
		}
		host := string(appendHost(nil, []byte(base)))
		t[host] = append(t[host], urlBase{base, r})
	}
	for _, mirrors := range []bool{false, true} {
		for _, name := range cfg.names {
			r := cfg.remotes[name]
			for i, o := range r.origins {
				if (i > 0) == mirrors && !(forLinks && (mirrors || r.packageType == "docker")) {
					add(r, o.url.String())
				}
			}
		}
	}
	if !forLinks {
		for _, registry := range sortedKeys(cfg.registries) {
			add(cfg.registries[registry], "https://"+registry)
		}
	}
	for _, bases := range t {
		slices.SortStableFunc(bases, func(a, b urlBase) int {
			return cmp.Or(len(b.url)-len(a.url), strings.Compare(a.url, b.url))
		})
	}
	return t
}

// find returns the base that s begins with, or nil. Behind the base s ends, or goes on
// with a slash or with what cannot continue a URL's path element: s may be a text that
// a URL is only the begin of. Of remotes with one URL it is one that allows the path,
// rather own than another, rather the first than the second.
func (t urlTable) find(s []byte, own *remote) (found *urlBase) {
	var buf [maxHostBytes]byte
	host := appendHost(buf[:0], s) // of which the case does not matter
	bases, best := t[string(host)], 0
	for i := range bases {
		b := &bases[i]
		if found != nil && found.url != b.url {
			break
		}
		rest, isBelow := bytes.CutPrefix(s[len(host):], []byte(b.url[len(host):]))
		if !isBelow || (len(rest) > 0 && rest[0] != '/' && continuesElement(rest[0])) {
			continue
		}
		rank := 1
		if b.allows(rest) {
			rank += 2
		}
		if b.remote == own {
			rank++
		}
		if rank > best {
			found, best = b, rank
		}
	}
	return found
}

// allows reports whether b's remote allows the path that s begins with. It chooses among
// remotes; whether a file may be had is decided when it is asked for.
func (b *urlBase) allows(s []byte) bool {
	if b.remote.immutable == nil {
		return true
	}
	end := 0
	for end < len(s) && continuesElement(s[end]) {
		end++
	}
	t := target{remote: b.remote, path: decodePath(strings.TrimLeft(string(s[:end]), "/"))}
	return t.classify() == nil
}

// maxHostBytes bounds scheme and host of a URL, with its port (RFC 1035 section 2.3.4).
const maxHostBytes = len("https://") + 255 + len(":65535")

// appendHost appends scheme and host of the URL that s begins with, in lower case; of
// another text it appends no host that a remote has.
func appendHost(to, s []byte) []byte {
	s = s[:min(len(s), maxHostBytes)]
	scheme := bytes.Index(s[:min(len(s), len("https://"))], []byte("://")) + len("://")
	end := 0
	for end < len(s) && (end < scheme || (s[end] != '/' && (unescapedBytes[s[end]] || strings.IndexByte(":[]", s[end]) >= 0))) {
		end++
	}
	to = append(to, s[:end]...)
	for i, c := range to {
		if 'A' <= c && c <= 'Z' {
			to[i] += 'a' - 'A'
		}
	}
	return to
}

// continuesElement reports whether c may stand within a path element or a host with
// its port (RFC 3986 section 3.3). The apostrophe is left out: texts quote with it.
func continuesElement(c byte) bool {
	return unescapedBytes[c] || strings.IndexByte("%:@!$&()*+,;=", c) >= 0
}

// pathHere returns the path here, with the query, of a URL that b was found for.
func (b *urlBase) pathHere(u string) string {
	return b.remote.urlPath() + strings.TrimLeft(u[len(b.url):], "/")
}

// pathHere returns the escaped path here of the file with that decoded path.
func (r *remote) pathHere(path string) string {
	return r.urlPath() + strings.TrimLeft((&url.URL{Path: "/" + path}).EscapedPath(), "/")
}

// manifestPath returns the path below a registry of the manifest that an image
// reference without its registry names: IMAGE, IMAGE:TAG or IMAGE@DIGEST. Without a
// tag it is "latest", as for all clients. Where there are both, the digest counts.
func manifestPath(image string) string {
	image, digest, _ := strings.Cut(image, "@")
	tag := ""
	if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
		image, tag = image[:i], image[i+1:]
	}
	return image + "/manifests/" + cmp.Or(digest, tag, "latest")
}
