// cache_counts.go: uses of stored files, gathered in memory until the index has
// them.

package main

import (
	"context"
	"sync"
	"time"
)

// countUse counts an answer from the store; flush writes the counts.
func (c *cache) countUse(remote, key string) { c.uses.add(remote, key, c.now()) }

// flushCounts writes the uses that have gathered to the index.
func (c *cache) flushCounts(ctx context.Context) {
	c.announcer.announceLost(ctx)
	batch := c.uses.take()
	if len(batch) == 0 {
		return
	}
	if err := c.index.countUses(ctx, batch); err != nil {
		c.reportStoreError("database", "counting uses of", batch[0].key, err)
	}
}

// useCounts gathers how often keys were served, so that the index is written every
// few seconds and not with every hit.
type useCounts struct {
	mu sync.Mutex // guards m; held for a map write only
	m  map[string]*fileUse
}

// maxUses bounds the map where the index cannot be written for long.
const maxUses = 100_000

func (u *useCounts) add(remote, key string, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	t := u.m[key]
	if t == nil {
		if u.m == nil {
			u.m = map[string]*fileUse{}
		}
		if len(u.m) >= maxUses {
			return
		}
		t = &fileUse{remote: remote, key: key}
		u.m[key] = t
	}
	t.hits++
	t.last = now
}

func (u *useCounts) take() []fileUse {
	u.mu.Lock()
	m := u.m
	u.m = nil
	u.mu.Unlock()
	batch := make([]fileUse, 0, len(m))
	for _, t := range m {
		batch = append(batch, *t)
	}
	return batch
}
