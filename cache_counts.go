// cache_counts.go: uses of stored files, gathered in memory until the index has
// them. They heal the index: a used file without a row gets one.

package main

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	// maxUses bounds the files whose uses are remembered while the index cannot be
	// written.
	maxUses = 100_000
	// usesBatch is how many uses the index counts in one call: many for one
	// statement, few for the time that writers of the embedded index wait.
	usesBatch = 1000
	// healTimeout bounds how long one flush adds rows, a batch at most: after the loss of a
	// database every used file lacks its row, and in S3 each record may be a request. A
	// flush follows every 2 s, and the last one is a part of the shutdown.
	healTimeout = 2 * time.Second
	// briefAnswer is how long an answer may be, in bytes, and not be worth counting while
	// it is sent: it fits the buffers of its connection.
	briefAnswer = 64 << 10
)

// countUse counts an answer from the store. flushCounts writes it to the index.
func (c *cache) countUse(remote, key string) { c.uses.addUses(fileUse{remote, key, 1, c.now()}) }

// flushCounts writes the gathered uses to the index.
func (c *cache) flushCounts(ctx context.Context) {
	c.announceLost(ctx)
	if err := c.uses.flush(ctx, c.index, c.objects); !errors.Is(err, errStoreDown) { // then nothing is lost
		c.reportStoreError("database", "counting uses", "", err)
	}
}

// openFiles counts the answers that are being sent of each stored file. Its methods may be
// called concurrently.
type openFiles struct {
	mu    sync.Mutex // guards byKey; no other lock is taken under it
	byKey map[string]int
}

func (o *openFiles) countReaders(key string, n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byKey[key] += n; o.byKey[key] == 0 {
		delete(o.byKey, key)
	}
}

func (o *openFiles) isRead(key string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.byKey[key] > 0
}

// useCounts gathers how often files were served, so that the index is not written with
// every hit. The zero value is ready to use. Its methods may be called concurrently.
type useCounts struct {
	mu     sync.Mutex // guards the fields below; never held across I/O
	byKey  map[string]fileUse
	newest fileUse // the last use, or the last file that was stored
}

func (u *useCounts) noteNewest(key string, at time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.newest = newestUse(u.newest, fileUse{key: key, last: at})
}

func newestUse(a, b fileUse) fileUse {
	if b.last.Before(a.last) {
		return a
	}
	return b
}

// addUses counts more uses of files.
func (u *useCounts) addUses(uses ...fileUse) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.byKey == nil {
		u.byKey = map[string]fileUse{}
	}
	for _, use := range uses {
		u.newest = newestUse(u.newest, use)
		sum, found := u.byKey[use.key]
		if !found && len(u.byKey) >= maxUses {
			continue
		}
		use.last = newestUse(sum, use).last
		use.hits += sum.hits
		u.byKey[use.key] = use
	}
}

func (u *useCounts) take() []fileUse {
	u.mu.Lock()
	byKey := u.byKey
	u.byKey = nil
	u.mu.Unlock()
	return slices.Collect(maps.Values(byKey))
}

// flush writes the gathered uses to the index and heals it: a file without a row,
// because another process stored it or a crash lost the row, gets it from its stored
// record. While the index is down, and when ctx ends, the uses stay for the next flush.
func (u *useCounts) flush(ctx context.Context, to index, from objects) (failed error) {
	var unknown []fileUse
	for batch := range slices.Chunk(u.take(), usesBatch) {
		found, err := to.countUses(ctx, batch)
		if errors.Is(err, errStoreDown) || (err != nil && ctx.Err() != nil) {
			u.addUses(batch...)
		}
		failed, unknown = cmp.Or(failed, err), append(unknown, found...)
	}
	u.heal(ctx, unknown, to, from)
	return failed
}

// heal adds the rows of used files that the index does not know, with their uses. Those
// that it has no time for stay for the next flush, and so do those of a store that is
// down. Other uses are lost: their file is gone, or its row is refused.
func (u *useCounts) heal(ctx context.Context, unknown []fileUse, to index, from objects) {
	ctx, cancel := context.WithTimeout(ctx, healTimeout)
	defer cancel()
	for i, use := range unknown {
		if i == usesBatch || ctx.Err() != nil {
			u.addUses(unknown[i:]...)
			return
		}
		obj, err := from.stat(ctx, use.key)
		if err == nil {
			row := newIndexRow(use.key, obj.rec)
			row.Hits, row.LastAccess = use.hits, use.last
			err = to.saveRow(ctx, row)
		}
		if errors.Is(err, errStoreDown) || (err != nil && ctx.Err() != nil) {
			u.addUses(use)
		}
	}
}
