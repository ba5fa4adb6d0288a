// fill_links.go: documents of package managers, whose links are rewritten on their way
// to the spool or, without one, to the client.

package main

import (
	"cmp"
	"slices"
	"strings"
)

// rewrittenLinks returns how the links of the file are rewritten, or nil if they stay. A
// file whose digest is known stays as it is, and so does a root, which is signed. Clients
// of npm and cargo take absolute URLs only.
func (file fileRequest) rewrittenLinks() *documentLinks {
	r := file.remote
	if r.links == nil || file.digest != "" || file.rulesOthers() || !((file.builtin && packageTypes[r.packageType].links) || matchesAny(r.rewrite, file.path)) {
		return nil
	}
	if packageTypes[r.packageType].absoluteLinks {
		if r.config.publicURL == "" {
			return nil
		}
		return &documentLinks{r.links, r.config.publicURL + "/api/", r}
	}
	path, _, _ := strings.Cut(file.spelling, "?")
	return &documentLinks{r.links, strings.Repeat("../", 1+strings.Count(path, "/")), r}
}

// rewriteLinks has the reader, of the answer to a GET of the whole file, rewrite the
// links, and reports whether it does. A body that breaks off is resumed below the
// rewriting, where its offsets are those of upstream.
func (b *upstreamReader) rewriteLinks() bool {
	file, c := b.file, b.c
	links := file.rewrittenLinks()
	if links == nil {
		return false
	}
	if b.size > maxRewrittenBytes || b.resp.isCoded() {
		c.log.Warn("the links of a document stay as they are, so that clients follow them past the cache: it is coded or too large",
			"remote", file.remote.name, "path", file.path, "size", b.size, "coding", b.resp.Header.Get("Content-Encoding"))
		return false
	}
	rewriter := newLinkRewriter(nextBytes{b}, links)
	rewriter.atEnd = func(leaving map[string]int) {
		for host, n := range leaving {
			key := leavingLinks{remote: file.remote.name, table: links.tableID(), Host: host}
			before, _ := c.leaving.get(key)
			c.leaving.put(key, before+int64(n))
		}
	}
	b.through = rewriter
	return true
}

// leavingLinks are links in a remote's documents that lead to one host past the cache.
type leavingLinks struct {
	remote, table, Host string // table: linkTable.id
	Count               int64  // in the documents that were fetched so far; 0 in a key
}

// leavingOf returns where the links of a remote's documents lead past the cache, most first.
// What another table has left of them counts no more: its documents are fetched again.
func (c *cache) leavingOf(r *remote) (list []leavingLinks) {
	for _, key := range c.leaving.keys() {
		if key.remote == r.name && r.links != nil && key.table == r.links.id {
			key.Count, _ = c.leaving.get(key)
			list = append(list, key)
		}
	}
	slices.SortFunc(list, func(a, b leavingLinks) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(a.Host, b.Host))
	})
	return list
}
