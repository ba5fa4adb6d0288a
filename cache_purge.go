// cache_purge.go: what removes files: purging, here and by other replicas.

package main

import (
	"context"
	"errors"
	"io/fs"
	"regexp"
)

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
	return c.removeFile(ctx, remote, key)
}

// purgeMatchingFills keeps what is being filled of a remote, here or on another
// replica, from being stored if pattern is found in its path: it has no index row
// by which a purge could find it.
func (c *cache) purgeMatchingFills(ctx context.Context, remote string, pattern *regexp.Regexp) error {
	for _, key := range c.fills.matching(remote, pattern) {
		if err := c.fills.stop(ctx, key); err != nil {
			return err
		}
	}
	c.announcer.announce(ctx, fillsPrefix+remote+" "+pattern.String())
	return nil
}

// removeFile removes key from the store, the index and the freshness marks, and
// announces that. fs.ErrNotExist: nothing was stored.
func (c *cache) removeFile(ctx context.Context, remote, key string) error {
	err := c.objects.delete(ctx, key)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c.announcer.announce(ctx, removedPrefix+key)
	if ierr := c.index.delete(ctx, remote, key); ierr != nil && !errors.Is(ierr, fs.ErrNotExist) {
		c.noteStoreError("database", "deleting", key, ierr)
	}
	if ferr := c.marks.delete(ctx, key); ferr != nil && !errors.Is(ferr, fs.ErrNotExist) {
		c.noteStoreError("redis", "deleting", key, ferr)
	}
	return err
}
