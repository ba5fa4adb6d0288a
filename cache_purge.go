// cache_purge.go: listing and purging what is stored, and what replicas tell each other
// about files that were replaced or removed.

package main

import (
	"context"
	"errors"
	"io/fs"
	"regexp"
	"strings"
	"time"
)

// listPageSize is how many rows the cache itself reads of a listing at a time.
const listPageSize = 1000

// expiryOf is when a listed file stops being fresh.
func (c *cache) expiryOf(ctx context.Context, rem *remote, r indexRow) (until time.Time, forever bool) {
	ttl, forever := rem.ttlOf(r.Class)
	_, own := rem.digestInName(decodePath(r.Path))
	if forever || own || (r.Class == immutable && strings.Contains(r.Path, "#")) {
		return time.Time{}, true
	}
	m, _ := c.marks.getMark(ctx, r.Key) // none if it cannot be had
	return lastGood(r.Fetched, r.SHA256, m, c.now(), ttl).Add(ttl).UTC(), false
}

// awaitStored waits for the files of a remote that their clients have whole and that are on
// their way to the store.
func (c *cache) awaitStored(ctx context.Context, remote string) {
	ctx, cancel := context.WithTimeout(ctx, time.Second) // a listing does not wait longer for a slow store
	defer cancel()
	for _, f := range c.fills.joinWhole(remote) {
		_, _ = f.awaitEnd(ctx)
	}
}

// purgeFile removes key from the store; fs.ErrNotExist when nothing was there. A
// fill of it in progress serves its clients and is not stored.
func (c *cache) purgeFile(ctx context.Context, remote, key string) error {
	if err := c.changing.lock(ctx, key); err != nil {
		return err
	}
	defer c.changing.unlock(key)
	c.missing.delete(key)
	if err := c.fills.stop(ctx, key); err != nil {
		return err
	}
	return c.removeFile(ctx, remote, key, removedPrefix)
}

// purgePath removes the file of t under all its names, with all its query variants and
// generations, and what is listed under the same decoded path, as npm's @scope%2Fname is.
func (c *cache) purgePath(ctx context.Context, t target) (purged int, err error) {
	for _, file := range append(c.generations.namesOf(ctx, t), fileRequest{target: t}) { // they may have no row
		if err := c.purgeFile(ctx, t.remote.name, file.key()); err == nil {
			purged++
		} else if !errors.Is(err, fs.ErrNotExist) {
			return purged, err
		}
	}
	this := regexp.MustCompile("^" + regexp.QuoteMeta(t.path) + "$")
	variants, err := c.purgeMatching(ctx, pageQuery{remote: t.remote.name, prefix: t.path, pattern: this})
	return purged + variants, err
}

// purgeMatching removes the files of a remote that q finds, and keeps what is being filled
// of it, here or on another replica, from being stored if q's pattern is found in its path:
// it has no index row yet.
func (c *cache) purgeMatching(ctx context.Context, q pageQuery) (purged int, err error) {
	for _, key := range c.fills.matching(q.remote, q.pattern) {
		if err := c.fills.stop(ctx, key); err != nil {
			return 0, err
		}
	}
	c.announce(ctx, fillsPrefix+q.remote+" "+q.pattern.String())
	return c.purgeRows(ctx, q, func(indexRow) bool { return true })
}

// purgeRows removes the files of the rows that q finds and match accepts.
func (c *cache) purgeRows(ctx context.Context, q pageQuery, match func(indexRow) bool) (purged int, err error) {
	q.limit = listPageSize
	for more := true; more; more = q.after != "" {
		page, err := c.index.listPage(ctx, q)
		if err != nil {
			return purged, err
		}
		for _, row := range page.rows {
			if !match(row) {
				continue
			}
			if err := c.purgeFile(ctx, row.Remote, row.Key); err == nil {
				purged++
			} else if !errors.Is(err, fs.ErrNotExist) {
				return purged, err
			}
		}
		q.after = page.next
	}
	return purged, nil
}

// removeFile removes key everywhere and announces that, with removedPrefix or copiesPrefix.
// fs.ErrNotExist: nothing was stored.
func (c *cache) removeFile(ctx context.Context, remote, key, prefix string) error {
	err := c.objects.delete(ctx, key)
	c.announce(ctx, prefix+key) // also after a failure: it may be gone
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c.reportStoreError("database", "deleting", key, c.index.delete(ctx, remote, key))
	c.reportStoreError("redis", "deleting", key, c.marks.delete(ctx, key))
	return err
}

// An announcement is a key that was replaced, or begins with one of these. No key
// does.
const (
	removedPrefix = "-" // a key that was removed
	fillsPrefix   = "?" // a remote's name, a blank and a pattern: fills that were purged
	// A key that was evicted: copies of it are out of date, and not what is being filled.
	// Without a key announcements were lost: any copy may be out of date.
	copiesPrefix = "*"
)

// announce tells the other replicas to drop what they keep of a key, also when the ctx of
// the change has ended meanwhile. They may hear each other while this one is not heard:
// then announceLost makes up for it.
func (c *cache) announce(ctx context.Context, announcement string) {
	if c.replicas == nil {
		return
	}
	if err := c.replicas.announceChange(context.WithoutCancel(ctx), announcement); err != nil {
		c.reportStoreError("redis", "announcing", announcement, err)
		c.lostAnnouncement.Store(true)
	}
}

// announceLost announces that anything may have changed, if an announcement was
// lost and Redis is back.
func (c *cache) announceLost(ctx context.Context) {
	if c.replicas != nil && c.replicas.hearsChanges() && c.lostAnnouncement.Swap(false) && c.replicas.announceChange(ctx, copiesPrefix) != nil {
		c.lostAnnouncement.Store(true)
	}
}

// onChange applies what another replica announced. A fill of that key that goes on
// here began before the change, and is not stored.
func (c *cache) onChange(announced string) {
	if key, ok := strings.CutPrefix(announced, copiesPrefix); ok {
		c.objects.invalidate(key)
		c.index.forget(key)
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
		c.index.forget(key)
	}
	c.missing.delete(key)
	c.objects.invalidate(key)
	c.fills.purge(key, fate)
}
