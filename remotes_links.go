// remotes_links.go: links in the documents of package managers are led here: a URL
// below a remote's base_url becomes the way to that remote on this server. There is one
// byte search for all formats and no parser.

package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

const (
	// maxRewrittenBytes bounds the documents whose links are rewritten. npm's largest
	// have some 50 MB.
	maxRewrittenBytes = 64 << 20
	// rewriteBufferSize is read at once.
	rewriteBufferSize = 64 << 10
	// linkLookBack bytes before a URL decide whether it begins a value.
	linkLookBack = 256
	// maxHostBytes bounds the host of a URL, with its port (RFC 1035 section 2.3.4).
	maxHostBytes = 262
	// maxLeavingHosts bounds the hosts of which links are counted in one document.
	maxLeavingHosts = 100
)

// linkTable leads links to the remotes of one configuration.
type linkTable struct {
	bases     map[string][]urlBase // by scheme and host in lower case; the longest URL first
	longest   int                  // URL in bases
	publicURL string               // without a slash at its end; "": not known
	id        string               // names the table in records
}

// newLinkTable makes the table of all remotes of cfg that files are fetched from below
// /api/.
func newLinkTable(cfg *config, publicURL string) *linkTable {
	t := &linkTable{bases: map[string][]urlBase{}, publicURL: publicURL}
	h := sha256.New()
	io.WriteString(h, publicURL)
	for _, name := range cfg.names {
		r := cfg.remotes[name]
		if r.local || r.packageType == "docker" {
			continue
		}
		u := r.origins[0].url
		host := u.Scheme + "://" + u.Host // in lower case
		t.bases[host] = append(t.bases[host], urlBase{u.String(), len(host), r})
		t.longest = max(t.longest, len(u.String()))
		io.WriteString(h, "\n"+name+" "+u.String())
	}
	for _, bases := range t.bases {
		slices.SortStableFunc(bases, func(a, b urlBase) int { return cmp.Compare(len(b.url), len(a.url)) })
	}
	t.id = hex.EncodeToString(h.Sum(nil)[:8])
	return t
}

// useLinks leads the links in the documents of cfg's remotes here. publicURL is where
// clients reach this server; "" if that is not known.
func (cfg *config) useLinks(publicURL string) {
	cfg.publicURL = strings.TrimSuffix(publicURL, "/")
	t := newLinkTable(cfg, cfg.publicURL)
	for _, name := range cfg.names {
		r := cfg.remotes[name]
		if r.local || (!linkingPackages[r.packageType] && r.rewrite == nil) {
			continue
		}
		r.links = t
		if absoluteLinks[r.packageType] && t.publicURL == "" {
			cfg.warnings = append(cfg.warnings, fmt.Sprintf("remote %q: PUBLIC_URL is not set, and clients of %s take absolute links only: what its documents link to is fetched past the cache", name, r.packageType))
		}
		for _, l := range linkedHosts {
			if u := r.origins[0].url; u.Hostname() == l.host && t.bases[l.linked] == nil {
				cfg.warnings = append(cfg.warnings, fmt.Sprintf("remote %q: its documents link to files at %s, which clients will fetch past the cache: add a remote with that base_url", name, l.linked))
			}
		}
	}
}

// linkedHosts are hosts whose documents link to files on another one.
var linkedHosts = []struct{ host, linked string }{
	{"pypi.org", "https://files.pythonhosted.org"},
	{"index.crates.io", "https://static.crates.io"},
	{"registry.terraform.io", "https://releases.hashicorp.com"},
}

// documentLinks says how the links of one document are rewritten.
type documentLinks struct {
	table *linkTable
	way   string  // what leads from the document to /api/ here
	from  *remote // of the document; nil: not known
}

// tableID names the table that the links were rewritten by, for the record; "" if they
// were not.
func (d *documentLinks) tableID() string {
	if d == nil {
		return ""
	}
	return d.table.id
}

// linkRewriter reads a document and rewrites its links. One goroutine uses it.
type linkRewriter struct {
	src     io.Reader
	links   *documentLinks
	own     string                       // URL of the document's remote; "": not known
	leaving map[string]int               // links that stay, by host
	atEnd   func(leaving map[string]int) // called once, if it is not nil

	in     []byte // of src; in[:done] was handled and is kept to look back
	done   int
	out    []byte // what in[:done] has become
	unread []byte // of out
	err    error  // of src
}

func newLinkRewriter(src io.Reader, links *documentLinks) *linkRewriter {
	r := &linkRewriter{src: src, links: links, leaving: map[string]int{}, in: make([]byte, 0, 2*rewriteBufferSize)}
	if links.from != nil {
		r.own = links.from.origins[0].url.String()
	}
	return r
}

func (r *linkRewriter) Read(p []byte) (int, error) {
	for len(r.unread) == 0 {
		if r.err != nil && r.done == len(r.in) {
			if r.err == io.EOF && r.atEnd != nil {
				r.atEnd(r.leaving)
				r.atEnd = nil
			}
			return 0, r.err
		}
		r.out = r.out[:0]
		r.readMore()
		r.rewrite()
		r.unread = r.out
	}
	n := copy(p, r.unread)
	r.unread = r.unread[n:]
	return n, nil
}

// readMore drops what nobody looks back to and reads more.
func (r *linkRewriter) readMore() {
	if unused := r.done - linkLookBack; unused > 0 {
		r.in = append(r.in[:0], r.in[unused:]...)
		r.done -= unused
	}
	if r.err != nil {
		return
	}
	r.in = slices.Grow(r.in, rewriteBufferSize)
	var n int
	n, r.err = r.src.Read(r.in[len(r.in) : len(r.in)+rewriteBufferSize])
	r.in = r.in[:len(r.in)+n]
}

// rewrite handles the input as far as a URL that begins there is in it as a whole.
func (r *linkRewriter) rewrite() {
	end := len(r.in)
	if r.err == nil {
		end -= 2*r.links.table.longest + maxHostBytes + len("https://")
	}
	for r.done < end {
		i := bytes.Index(r.in[r.done:], []byte("http"))
		if i < 0 || r.done+i >= end {
			r.out = append(r.out, r.in[r.done:end]...)
			r.done = end
			return
		}
		r.out = append(r.out, r.in[r.done:r.done+i]...)
		r.done += i
		name, length := r.findLink(r.in[r.done:])
		if length == 0 {
			length = len("http")
			r.out = append(r.out, "http"...)
		} else {
			r.out = append(append(append(r.out, r.links.way...), name...), '/')
		}
		r.done += length
	}
}

// findLink returns the name of the remote that a URL at the begin of s leads to, and how
// many bytes of s are replaced by the way there; 0 if the URL stays.
func (r *linkRewriter) findLink(s []byte) (name string, length int) {
	i := len("http")
	if i < len(s) && s[i] == 's' {
		i++
	}
	if i == len(s) || s[i] != ':' || !r.beginsValue() {
		return "", 0
	}
	host := append(make([]byte, 0, maxHostBytes), s[:i+1]...)
	for i++; i < len(s) && len(host) < len("https://") && (s[i] == '/' || s[i] == '\\'); i++ {
		if s[i] == '/' {
			host = append(host, '/')
		}
	}
	if !bytes.HasSuffix(host, []byte("://")) {
		return "", 0
	}
	scheme := len(host)
	for ; i < len(s) && len(host) < maxHostBytes && isHostByte(s[i]); i++ {
		c := s[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		host = append(host, c)
	}
	bases := r.links.table.bases[string(host)]
	for _, b := range bases {
		if n, found := skipBase(s, b); found {
			if b.url == r.own {
				return r.links.from.name, n // of remotes with one URL its own has the right patterns and credentials
			}
			return b.remote.name, n
		}
	}
	if h := string(host[scheme:]); h != "" && bases == nil && (len(r.leaving) < maxLeavingHosts || r.leaving[h] > 0) {
		r.leaving[h]++
	}
	return "", 0
}

// isHostByte reports whether c may be in a host with a port.
func isHostByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._:[]", c) >= 0
}

// skipBase reports whether s begins with b's URL, as urlTable.find has it, and the length
// of that with the slashes behind it. A slash may be written as JSON's \/.
func skipBase(s []byte, b urlBase) (length int, found bool) {
	for k := range len(b.url) {
		if length+1 < len(s) && s[length] == '\\' && s[length+1] == '/' {
			length++
		}
		if length == len(s) || (s[length] != b.url[k] && (k >= b.host || s[length]|0x20 != b.url[k])) {
			return 0, false
		}
		length++
	}
	isSlash := func() int {
		switch rest := s[length:]; {
		case bytes.HasPrefix(rest, []byte("/")):
			return 1
		case bytes.HasPrefix(rest, []byte(`\/`)):
			return 2
		}
		return 0
	}
	if length < len(s) && isSlash() == 0 && continuesElement(s[length]) {
		return 0, false
	}
	for n := isSlash(); n > 0; n = isSlash() {
		length += n
	}
	return length, true
}

// What may stand before a value that is not in double quotes: an attribute of HTML, and
// the key or the dash of YAML.
var (
	attributePattern = regexp.MustCompile(`\s[A-Za-z-]+=$`)
	yamlValuePattern = regexp.MustCompile(`\n *(?:(?:- +)+(?:[\w.-]+: +)?|[\w.-]+: +)$`)
)

// beginsValue reports whether a string, an attribute or a YAML value begins at r.done. A
// URL within a text is not a link that a client follows.
func (r *linkRewriter) beginsValue() bool {
	before := r.in[max(0, r.done-linkLookBack):r.done]
	if len(before) == 0 {
		return false
	}
	switch last := before[len(before)-1]; last {
	case '"':
		outside := bytes.TrimRight(before[:len(before)-1], " \t\r\n")
		return len(outside) > 0 && strings.IndexByte(":[,{=-", outside[len(outside)-1]) >= 0
	case '\'':
		before = before[:len(before)-1]
	case '=', ' ':
	default:
		return false
	}
	return attributePattern.Match(before) || yamlValuePattern.Match(before)
}
