// cache_counts.go: uses of stored files, gathered in memory until the index has
// them. They heal the index: a used file without a row gets one.

package main

import (
	"context"
	"errors"
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
	// maxHealedRows bounds the records that one flush reads. After the loss of a
	// database every used file lacks its row, and in S3 each record may be a request.
	maxHealedRows = usesBatch
	// healTimeout bounds the same in time: a flush follows every 2 s, and the last one
	// is a part of the shutdown.
	healTimeout = 2 * time.Second
	// healPause is how long a key is left alone that could not get a row.
	healPause = 10 * time.Minute
)

// countUse counts an answer from the store. flushCounts writes it to the index.
func (c *cache) countUse(remote, key string) { c.uses.add(fileUse{remote, key, 1, c.now()}) }

// flushCounts writes the gathered uses to the index.
func (c *cache) flushCounts(ctx context.Context) {
	c.announcer.announceLost(ctx)
	err := c.uses.flush(ctx, c.index, c.objects)
	if err != nil && !errors.Is(err, errStoreDown) { // an outage has a log line already, and nothing is lost
		c.reportStoreError("database", "counting uses", "", err)
	}
}

// useCounts gathers how often files were served, so that the index is written every few
// seconds and not with every hit. The zero useCounts is ready to use. Its methods may be
// called concurrently.
type useCounts struct {
	mu        sync.Mutex // guards the fields below; never held across I/O
	byKey     map[string]*fileUse
	healAfter map[string]time.Time // by key: no row could be added, it is not tried again until then
}

// add counts more uses of a file.
func (u *useCounts) add(use fileUse) {
	u.mu.Lock()
	defer u.mu.Unlock()
	sum := u.byKey[use.key]
	switch {
	case sum != nil:
		sum.hits += use.hits
		if use.last.After(sum.last) {
			sum.last = use.last
		}
	case len(u.byKey) < maxUses:
		if u.byKey == nil {
			u.byKey = map[string]*fileUse{}
		}
		first := use // use itself stays off the heap: most hits end above
		u.byKey[use.key] = &first
	}
}

func (u *useCounts) addAll(batch []fileUse) {
	for _, use := range batch {
		u.add(use)
	}
}

func (u *useCounts) take() []fileUse {
	u.mu.Lock()
	byKey := u.byKey
	u.byKey = nil
	u.mu.Unlock()
	all := make([]fileUse, 0, len(byKey))
	for _, use := range byKey {
		all = append(all, *use)
	}
	return all
}

// flush writes the gathered uses to the index and heals it: a file without a row,
// because another process stored it or a crash lost the row, gets it from its stored
// record. While the index is down, the uses stay for the next flush.
func (u *useCounts) flush(ctx context.Context, to index, from objects) error {
	var unknown []fileUse
	for rest := u.take(); len(rest) > 0; {
		batch := rest[:min(len(rest), usesBatch)]
		found, err := to.countUses(ctx, batch)
		if errors.Is(err, errStoreDown) {
			u.addAll(rest)
		}
		if err != nil {
			u.addAll(unknown)
			return err
		}
		unknown, rest = append(unknown, found...), rest[len(batch):]
	}
	healed := u.heal(ctx, unknown, to, from)
	_, err := to.countUses(ctx, healed) // a row that is missing again was removed meanwhile
	if errors.Is(err, errStoreDown) {
		u.addAll(healed)
	}
	return err
}

// heal adds the rows of used files that the index does not know, and returns the
// uses that can be counted now. Those that it has no time for stay for the next
// flush. A file that is gone needs no row.
func (u *useCounts) heal(ctx context.Context, unknown []fileUse, to index, from objects) (healed []fileUse) {
	ctx, cancel := context.WithTimeout(ctx, healTimeout)
	defer cancel()
	reads := 0
	for i, use := range unknown {
		if reads == maxHealedRows || ctx.Err() != nil {
			u.addAll(unknown[i:])
			break
		}
		if !u.mayHeal(use) {
			continue
		}
		reads++
		obj, err := from.open(ctx, use.key, -1)
		if err == nil {
			err = to.saveRow(ctx, newIndexRow(use.key, obj.rec))
		}
		switch {
		case err == nil:
			healed = append(healed, use)
		case errors.Is(err, errStoreDown) || ctx.Err() != nil:
			u.add(use)
		default:
			u.delayHeal(use)
		}
	}
	return healed
}

func (u *useCounts) mayHeal(use fileUse) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return !use.last.Before(u.healAfter[use.key])
}

// delayHeal leaves a key alone for healPause, so that one that is used all the time
// does not cost a read with every flush.
func (u *useCounts) delayHeal(use fileUse) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.healAfter == nil || len(u.healAfter) >= maxUses {
		u.healAfter = map[string]time.Time{}
	}
	u.healAfter[use.key] = use.last.Add(healPause)
}
