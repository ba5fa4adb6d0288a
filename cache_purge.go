// cache_purge.go: what removes files: purging, eviction, and what other replicas
// announce.

package main

import (
	"context"
	"errors"
	"io/fs"
	"regexp"
	"strings"
)

// purgeFile removes key from the store; fs.ErrNotExist when nothing was there. A
// fill of it in progress serves its clients and is not stored.
func (c *cache) purgeFile(ctx context.Context, remote, key string) error {
	if err := c.changing.lock(ctx, key); err != nil {
		return err
	}
	defer c.changing.unlock(key)
	c.missing.delete(key)
	if err := c.stopFills(ctx, key); err != nil {
		return err
	}
	return c.removeFile(ctx, remote, key)
}

// stopFills keeps what is being filled here under key from being stored.
func (c *cache) stopFills(ctx context.Context, key string) error {
	for _, f := range c.fills.take(key) {
		if err := f.preventStoring(ctx); err != nil {
			return err
		}
	}
	return nil
}

// purgeMatchingFills keeps what is being filled of a remote, here or on another
// replica, from being stored if pattern is found in its path: it has no index row
// by which a purge could find it.
func (c *cache) purgeMatchingFills(ctx context.Context, remote string, pattern *regexp.Regexp) error {
	for _, key := range c.fills.matching(remote, pattern) {
		if err := c.stopFills(ctx, key); err != nil {
			return err
		}
	}
	c.announceChange(ctx, fillsPrefix+remote+" "+pattern.String())
	return nil
}

// removeFile removes key from the store, the index and the freshness marks, and
// announces that. fs.ErrNotExist: nothing was stored.
func (c *cache) removeFile(ctx context.Context, remote, key string) error {
	err := c.objects.delete(ctx, key)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c.announceChange(ctx, removedPrefix+key)
	if ierr := c.index.delete(ctx, remote, key); ierr != nil && !errors.Is(ierr, fs.ErrNotExist) {
		c.noteStoreError("database", "deleting", key, ierr)
	}
	if ferr := c.marks.delete(ctx, key); ferr != nil && !errors.Is(ferr, fs.ErrNotExist) {
		c.noteStoreError("redis", "deleting", key, ferr)
	}
	return err
}

// evictFiles makes room: the least recently used files of a remote above its
// cache.max_size, and of all above most (CACHE_MAX_SIZE; 0: none), go until 90 %
// is left. Files of local repositories stay.
func (c *cache) evictFiles(ctx context.Context, cfg *config, most int64) {
	c.flushCounts(ctx) // the order is by last access
	totals, err := c.index.totals(ctx)
	if err != nil {
		c.noteStoreError("database", "adding up", "", err)
		return
	}
	var all int64
	for name, t := range totals {
		all += t.Bytes
		if rem := cfg.remotes[name]; rem != nil && rem.maxSize > 0 && t.Bytes > rem.maxSize {
			all -= c.evictOldest(ctx, name, t.Bytes-rem.maxSize/10*9)
		}
	}
	if most > 0 && all > most {
		c.evictOldest(ctx, "", all-most/10*9)
	}
}

// evictOldest removes files of one remote ("" is all) until bytes are freed.
func (c *cache) evictOldest(ctx context.Context, remote string, bytes int64) (freed int64) {
	q := pageQuery{remote: remote, oldest: true, limit: 1000}
	files := 0
	for freed < bytes {
		p, err := c.index.listPage(ctx, q)
		if err != nil {
			c.noteStoreError("database", "listing for eviction", "", err)
			return freed
		}
		for _, r := range p.rows {
			if freed >= bytes {
				break
			}
			if r.Class == local || c.fills.isFilling(r.Key) {
				continue
			}
			if err := c.purgeFile(ctx, r.Remote, r.Key); err != nil && !errors.Is(err, fs.ErrNotExist) {
				c.noteStoreError("storage", "evicting", r.Key, err)
				return freed
			}
			freed += r.Size
			files++
		}
		if q.after = p.next; q.after == "" {
			break
		}
	}
	c.log.Info("evicted least recently used files", "remote", remote, "files", files, "bytes", freed)
	return freed
}

// An announcement is a key that was replaced, or begins with one of these. No key
// does.
const (
	removedPrefix  = "-" // a key that was removed
	fillsPrefix    = "?" // a remote's name, a blank and a pattern: fills that were purged
	everythingSign = "*" // announcements were lost: anything may have changed
)

// onChange applies what another replica announced. A fill of that key that goes on
// here began before the change, and is not stored.
func (c *cache) onChange(announced string) {
	if announced == everythingSign {
		c.onMissedChanges()
		return
	}
	if what, ok := strings.CutPrefix(announced, fillsPrefix); ok {
		remote, text, _ := strings.Cut(what, " ")
		if pattern, err := regexp.Compile(text); err == nil {
			for _, key := range c.fills.matching(remote, pattern) {
				c.onChange(removedPrefix + key)
			}
		}
		return
	}
	key, removed := strings.CutPrefix(announced, removedPrefix)
	fate := fatePurgedHere
	if removed {
		fate = fatePurgedElsewhere
	}
	c.missing.delete(key)
	if f, ok := c.objects.(cachingObjects); ok {
		f.invalidate(key)
	}
	for _, f := range c.fills.take(key) {
		f.purge(fate)
	}
}

// onMissedChanges has everything looked at again: announcements may have been
// lost.
func (c *cache) onMissedChanges() {
	if f, ok := c.objects.(cachingObjects); ok {
		f.invalidateAll()
	}
}

// announceChange tells the other replicas to drop what they keep of a key. They
// may hear each other while this one is not heard: then announceMissed makes up
// for it.
func (c *cache) announceChange(ctx context.Context, announcement string) {
	if c.replicas == nil {
		return
	}
	if err := c.replicas.announceChange(ctx, announcement); err != nil {
		c.noteStoreError("redis", "announcing", announcement, err)
		c.unannounced.Store(true)
	}
}

// announceMissed announces that anything may have changed, if an announcement was
// lost and Redis is back.
func (c *cache) announceMissed(ctx context.Context) {
	if c.replicas == nil || !c.replicas.hearsChanges() || !c.unannounced.Swap(false) {
		return
	}
	if c.replicas.announceChange(ctx, everythingSign) != nil {
		c.unannounced.Store(true)
	}
}
