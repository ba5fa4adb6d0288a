// cache_evict.go: eviction: which files go when there is too much.

package main

import (
	"context"
	"errors"
	"io/fs"
)

// evictor removes files of remotes for space. Files of local repositories stay.
type evictor struct {
	*cache
	cfg   *config
	limit int64 // CACHE_MAX_SIZE, of all remotes together; 0: none
}

// evictFiles lets the least recently used files go: of a remote above its
// cache.max_size, and of all above the limit, until 90 % is left.
func (e *evictor) evictFiles(ctx context.Context) {
	e.flushCounts(ctx) // the order is by last access
	totals, err := e.index.totals(ctx)
	if err != nil {
		e.reportStoreError("database", "adding up", "", err)
		return
	}
	var all int64
	for name, t := range totals {
		all += t.Bytes
		if rem := e.cfg.remotes[name]; rem != nil && rem.maxSize > 0 && t.Bytes > rem.maxSize {
			all -= e.evictOldest(ctx, name, t.Bytes-rem.maxSize/10*9)
		}
	}
	if e.limit > 0 && all > e.limit {
		e.evictOldest(ctx, "", all-e.limit/10*9)
	}
}

// evictOldest removes files of one remote ("" is all) until bytes are freed.
func (e *evictor) evictOldest(ctx context.Context, remote string, bytes int64) (freed int64) {
	q := pageQuery{remote: remote, oldest: true, limit: 1000}
	files := 0
	for freed < bytes {
		p, err := e.index.listPage(ctx, q)
		if err != nil {
			e.reportStoreError("database", "listing for eviction", "", err)
			return freed
		}
		for _, r := range p.rows {
			if freed >= bytes {
				break
			}
			if r.Class == local || e.fills.isFilling(r.Key) {
				continue
			}
			if err := e.purgeFile(ctx, r.Remote, r.Key); err != nil && !errors.Is(err, fs.ErrNotExist) {
				e.reportStoreError("storage", "evicting", r.Key, err)
				return freed
			}
			freed += r.Size
			files++
		}
		if q.after = p.next; q.after == "" {
			break
		}
	}
	e.log.Info("evicted least recently used files", "remote", remote, "files", files, "bytes", freed)
	return freed
}
