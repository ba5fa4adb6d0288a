// cache_list.go: what is stored, for listings and statistics.

package main

import (
	"context"
	"net/http"
	"strings"
	"time"
)

// listPageSize is how many rows the cache itself reads of a listing at a time.
const listPageSize = 1000

// maxFreeSearch is how many files a search by pattern goes through whoever else searches.
const maxFreeSearch = 10_000

// listFiles returns a page of what is stored. A pattern may be matched with all files of
// the remote for a page of a few: where those are many, one search runs at a time, and
// the others get a 429 problem.
func (c *cache) listFiles(ctx context.Context, q pageQuery) (indexPage, error) {
	if q.pattern != nil {
		totals, err := c.index.totals(ctx, false)
		if err == nil && totals[q.remote].Files > maxFreeSearch {
			if !c.searching.TryLock() {
				return indexPage{}, &problem{status: http.StatusTooManyRequests, retryAfter: time.Second,
					detail: "another search by pattern goes through many files: try again, or narrow it by prefix"}
			}
			defer c.searching.Unlock()
		}
	}
	return c.index.listPage(ctx, q)
}

// expiryOf is when a listed file stops being fresh.
func (c *cache) expiryOf(ctx context.Context, rem *remote, r indexRow) (until time.Time, forever bool) {
	ttl, forever := rem.ttlOf(r.Class)
	_, own := rem.digestInName(decodePath(r.Path))
	if forever || own || strings.Contains(r.Path, "#") {
		return time.Time{}, true
	}
	m, _ := c.marks.getMark(ctx, r.Key) // none if it cannot be had
	return lastGood(r.Fetched, r.SHA256, m, c.now(), ttl).Add(ttl).UTC(), false
}
