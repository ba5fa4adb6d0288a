// cache_counts.go: what the cache remembers in memory: uses of stored files until
// the index has them, and files that upstream does not have.

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
	c.sendUnsentAnnouncements(ctx)
	batch := c.uses.take()
	if len(batch) == 0 {
		return
	}
	if err := c.index.countUses(ctx, batch); err != nil {
		c.noteStoreError("database", "counting uses of", batch[0].key, err)
	}
}

// uses gathers how often keys were served, so that the index is written every
// few seconds and not with every hit.
type uses struct {
	mu sync.Mutex // guards m; held for a map write only
	m  map[string]*fileUse
}

// maxUses bounds the map where the index cannot be written for long.
const maxUses = 100_000

func (u *uses) add(remote, key string, now time.Time) {
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

func (u *uses) take() []fileUse {
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

// negatives remembers files that upstream does not have (negative_ttl).
type negatives struct {
	mu sync.Mutex // guards m
	m  map[string]negative
}

type negative struct {
	err   *problem
	until time.Time
}

// maxNegatives bounds what a crawler of missing files can pile up.
const maxNegatives = 100_000

func (n *negatives) get(key string, now time.Time) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	v, ok := n.m[key]
	if !ok {
		return nil
	}
	if !now.Before(v.until) {
		delete(n.m, key)
		return nil
	}
	return v.err
}

func (n *negatives) put(key string, err *problem, now time.Time, ttl time.Duration) {
	if ttl <= 0 {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.m == nil {
		n.m = map[string]negative{}
	}
	for k := range n.m { // any one makes room
		if len(n.m) < maxNegatives {
			break
		}
		delete(n.m, k)
	}
	n.m[key] = negative{err, now.Add(ttl)}
}

func (n *negatives) delete(key string) {
	n.mu.Lock()
	delete(n.m, key)
	n.mu.Unlock()
}
