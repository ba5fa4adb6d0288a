// fill_links.go: documents of package managers, whose links are rewritten on their way
// to the spool or, without one, to the client.

package main

import (
	"cmp"
	"context"
	"io"
	"slices"
	"strings"
)

// rewrittenLinks returns how the links of the file are rewritten, or nil if they stay. A
// file whose digest is known stays as it is. Clients of npm and cargo take absolute URLs
// only.
func (file fileRequest) rewrittenLinks() *documentLinks {
	r := file.remote
	if r.links == nil || file.digest != "" || !((file.builtin && linkingPackages[r.packageType]) || matchesAny(r.rewrite, file.path)) {
		return nil
	}
	if absoluteLinks[r.packageType] {
		if r.links.publicURL == "" {
			return nil
		}
		return &documentLinks{r.links, r.links.publicURL + "/api/", r}
	}
	path, _, _ := strings.Cut(file.spelling, "?")
	return &documentLinks{r.links, strings.Repeat("../", 1+strings.Count(path, "/")), r}
}

// rewriteLinks makes resp, the answer to a GET of the whole file, an answer with
// rewritten links, and reports whether it did. A body that breaks off is resumed below
// the rewriting, where its offsets are those of upstream.
func (file fileRequest) rewriteLinks(ctx context.Context, c *cache, resp *upstreamResponse) bool {
	links := file.rewrittenLinks()
	if links == nil {
		return false
	}
	coding := resp.Header.Get("Content-Encoding")
	if resp.ContentLength > maxRewrittenBytes || (coding != "" && coding != "identity") {
		c.log.Warn("the links of a document stay as they are, so that clients follow them past the cache: it is coded or too large",
			"remote", file.remote.name, "path", file.path, "size", resp.ContentLength, "coding", coding)
		return false
	}
	from := *resp.Response
	src := &upstreamReader{up: c.upstream, ctx: ctx, resp: &upstreamResponse{Response: &from, origin: resp.origin},
		part: bodyPart{file: file, validator: rangeValidator(resp), size: resp.ContentLength, to: -1, origin: resp.origin}}
	rewriter := newLinkRewriter(src, links)
	rewriter.atEnd = func(leaving map[string]int) { c.leaving.add(file.remote.name, leaving) }
	resp.Body, resp.ContentLength = struct {
		io.Reader
		io.Closer
	}{rewriter, src}, -1
	return true
}

// leavingCounts counts links in documents that lead past the cache, by remote and host.
type leavingCounts struct{ *boundedMap[string, int] }

// leavingLinks are links in a remote's documents that lead past the cache.
type leavingLinks struct {
	Host  string
	Count int // in the documents that were fetched so far
}

func (l leavingCounts) add(remote string, byHost map[string]int) {
	for host, n := range byHost {
		key := remote + " " + host
		before, _ := l.get(key)
		l.boundedMap.put(key, before+n)
	}
}

// list returns where the links of a remote's documents lead, most first.
func (l leavingCounts) list(remote string) (list []leavingLinks) {
	for _, key := range l.keys() {
		if host, found := strings.CutPrefix(key, remote+" "); found {
			n, _ := l.get(key)
			list = append(list, leavingLinks{host, n})
		}
	}
	slices.SortFunc(list, func(a, b leavingLinks) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(a.Host, b.Host))
	})
	return list
}
