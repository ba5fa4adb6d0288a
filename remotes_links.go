// remotes_links.go: links in the documents of package managers are led here: a URL
// below a remote's base_url becomes the way to that remote on this server. There is one
// byte search for all formats and no parser.

package main

import (
	"bytes"
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
	// maxLeavingHosts bounds the hosts of which links are counted in one document.
	maxLeavingHosts = 100
)

// linkTable leads links to the remotes of one configuration.
type linkTable struct {
	urls      urlTable
	id        string // names the table in records
	lookAhead int    // how many bytes decide where a URL leads
}

func newLinkTable(cfg *config) *linkTable {
	t := &linkTable{urls: newURLTable(cfg, true)}
	h, longest := sha256.New(), maxHostBytes
	io.WriteString(h, cfg.publicURL)
	for _, host := range sortedKeys(t.urls) {
		for i, b := range t.urls[host] {
			longest = max(longest, len(b.url))
			io.WriteString(h, "\n"+b.remote.name+" "+b.url)
			if i > 0 && t.urls[host][i-1].url == b.url { // patterns choose between them
				other := t.urls[host][i-1].remote
				fmt.Fprint(h, other.immutable, other.mutable, b.remote.immutable, b.remote.mutable)
			}
		}
	}
	t.lookAhead = 2 * (longest + 1) // one more, and a backslash before each slash
	t.id = hex.EncodeToString(h.Sum(nil)[:8])
	return t
}

// useLinks leads the links in the documents of cfg's remotes here. publicURL is where
// clients reach this server; "" if that is not known.
func (cfg *config) useLinks(publicURL string) {
	cfg.publicURL = strings.TrimSuffix(publicURL, "/")
	t := newLinkTable(cfg)
	for _, name := range cfg.names {
		r := cfg.remotes[name]
		if r.local || (!packageTypes[r.packageType].links && r.rewrite == nil) {
			continue
		}
		r.links = t
		if packageTypes[r.packageType].absoluteLinks && cfg.publicURL == "" {
			cfg.warnings = append(cfg.warnings, fmt.Sprintf("remote %q: PUBLIC_URL is not set, and clients of %s take absolute links only: what its documents link to is fetched past the cache", name, r.packageType))
		}
		for _, l := range linkedHosts {
			if u := r.origins[0].url; u.Hostname() == l.host && t.urls[l.linked] == nil {
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
	{"registry.terraform.io", "https://github.com"},
	{"registry.opentofu.org", "https://github.com"},
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
	leaving map[string]int               // links that stay, by host
	atEnd   func(leaving map[string]int) // called once, if it is not nil

	in     []byte // of src; in[:done] was handled and is kept to look back
	done   int
	out    []byte // what in[:done] has become
	unread []byte // of out
	err    error  // of src
}

func newLinkRewriter(src io.Reader, links *documentLinks) *linkRewriter {
	in := append(make([]byte, 0, 2*rewriteBufferSize), '\n') // as if a line ended in front of the document
	return &linkRewriter{src: src, links: links, leaving: map[string]int{}, in: in, done: len(in)}
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
		end -= r.links.table.lookAhead
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
// many bytes of s are replaced by the way there; 0 if the URL stays, which
// is counted.
func (r *linkRewriter) findLink(s []byte) (name string, length int) {
	if !(bytes.HasPrefix(s, []byte("http:")) || bytes.HasPrefix(s, []byte("https:"))) || !r.beginsValue() {
		return "", 0
	}
	s = s[:min(len(s), r.links.table.lookAhead)]
	u := s
	if bytes.IndexByte(s[:min(len(s), len(`https:\`))], '\\') > 0 {
		u = bytes.ReplaceAll(s, []byte(`\/`), []byte("/")) // as JSON may have it
	}
	b := r.links.table.urls.find(u, r.links.from)
	if b == nil {
		var buf [maxHostBytes]byte
		_, host, _ := strings.Cut(string(appendHost(buf[:0], u)), "://")
		if host != "" && (len(r.leaving) < maxLeavingHosts || r.leaving[host] > 0) {
			r.leaving[host]++
		}
		return "", 0
	}
	for range len(b.url) {
		if s[length] == '\\' {
			length++
		}
		length++
	}
	for {
		rest, isSlash := bytes.CutPrefix(bytes.TrimPrefix(s[length:], []byte(`\`)), []byte("/"))
		if !isSlash {
			break
		}
		length = len(s) - len(rest)
	}
	return b.remote.name, length
}

// beginsValue reports whether a string, an attribute of HTML or a YAML value begins at
// r.done. A URL within a text is not a link that a client follows.
func (r *linkRewriter) beginsValue() bool {
	before := r.in[max(0, r.done-linkLookBack):r.done]
	if outside, isString := bytes.CutSuffix(before, []byte(`"`)); isString {
		outside = bytes.TrimSpace(outside)
		return len(outside) > 0 && strings.IndexByte(":[,{=-", outside[len(outside)-1]) >= 0
	}
	before = bytes.TrimSuffix(before, []byte("'"))
	if bytes.HasSuffix(before, []byte("=")) {
		return attributePattern.Match(before[max(0, bytes.LastIndexAny(before, " \t\r\n\f")):])
	}
	newLine := bytes.LastIndexByte(before, '\n')
	return newLine >= 0 && yamlValuePattern.Match(before[newLine+1:])
}

var attributePattern = regexp.MustCompile(`^\s[A-Za-z-]+=$`)

// yamlValuePattern matches the begin of a line that is dashes, a key, or both, which may
// begin a list in brackets. Each byte leaves one way to go on, which makes it quick.
var yamlValuePattern = regexp.MustCompile(`^ *(?:- +(?:- +)*(?:` + yamlKey + `)?|` + yamlKey + `)(?:\[ *(?:[^][, ][^][,]*, *)*)?$`)

const yamlKey = `(?:[\w.~/][\w.~/-]*|"[\w.~/-]+"|'[\w.~/-]+'): +`
