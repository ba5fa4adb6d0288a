// cache_local.go: files of local repositories, and what removes files: purging
// and eviction, here and announced by other replicas.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
)

// keyLock lets one writer at a time change a key of a local repository; refs
// counts who holds or waits for it.
type keyLock struct {
	mu   sync.Mutex
	refs int
}

// lockKey makes the caller key's only writer until unlock is called.
func (c *cache) lockKey(key string) (unlock func()) {
	c.mu.Lock()
	l := c.writing[key]
	if l == nil {
		l = &keyLock{}
		c.writing[key] = l
	}
	l.refs++
	c.mu.Unlock()
	l.mu.Lock()
	return func() {
		l.mu.Unlock()
		c.mu.Lock()
		if l.refs--; l.refs == 0 {
			delete(c.writing, key)
		}
		c.mu.Unlock()
	}
}

// upload is the body of a PUT to a local repository and what it must be.
type upload struct {
	body   io.Reader
	size   int64 // -1: not known
	create bool  // If-None-Match: *
}

// errExists: create found a file; errChecksum: the body is another, says who
// reads it.
var (
	errExists   = &problem{status: http.StatusPreconditionFailed, detail: "the file exists already"}
	errChecksum = &problem{status: http.StatusUnprocessableEntity, detail: "the body does not have the checksum that was sent with it"}
)

// put stores an upload; created says that there was no such file. When it
// returns nil the file is durable; otherwise the old one is still there.
func (c *cache) put(ctx context.Context, q want, u upload) (created bool, err error) {
	spool, err := c.spools.spool()
	if err != nil {
		return false, err
	}
	defer spool.Close()
	defer os.Remove(spool.Name())
	rec := c.newRecord(q, http.Header{})
	if err := c.receive(spool, u, rec); err != nil {
		return false, err
	}
	key := q.key()
	defer c.lockKey(key)()
	_, err = c.objects.open(ctx, key, -1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if created = err != nil; !created && u.create {
		return false, errExists
	}
	rec.create = u.create
	return created, c.store(ctx, key, rec, spool)
}

// receive spools an upload and completes its record.
func (c *cache) receive(spool *os.File, u upload, rec *record) error {
	if err := c.spools.room(max(0, u.size)); err != nil {
		return err
	}
	sums, buf := newSums(""), make([]byte, copyBufferSize)
	for {
		n, err := u.body.Read(buf)
		if rec.Size/roomEvery != (rec.Size+int64(n))/roomEvery {
			if err := c.spools.room(0); err != nil {
				return err
			}
		}
		if _, err := spool.Write(buf[:n]); err != nil {
			return fmt.Errorf("%w: %w", errNoSpace, err)
		}
		sums.write(buf[:n])
		rec.Size += int64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: reading the upload: %w", errBadRequest, err)
		}
	}
	rec.SHA256 = sums.hex()
	return nil
}

// purge removes key from the store; fs.ErrNotExist when nothing was there. A
// fill of it in progress serves its clients and is not stored.
func (c *cache) purge(ctx context.Context, remote, key string) error {
	defer c.lockKey(key)()
	c.negative.delete(key)
	if err := c.purgeFill(ctx, key); err != nil {
		return err
	}
	return c.remove(ctx, remote, key)
}

// purgeFill keeps what is being filled here under key from being stored.
func (c *cache) purgeFill(ctx context.Context, key string) error {
	if f := c.ground(key); f != nil {
		return f.neverStore(ctx)
	}
	return nil
}

// ground takes key's flight out of the table, so that later requests begin
// another.
func (c *cache) ground(key string) *flight {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.flights[key]
	if f != nil {
		c.land(f)
	}
	return f
}

// purgeFills keeps what is being filled of a remote, here or on another replica,
// from being stored if pattern is found in its path: it has no row yet.
func (c *cache) purgeFills(ctx context.Context, remote string, pattern *regexp.Regexp) error {
	for _, key := range c.fillsOf(remote, pattern) {
		if err := c.purgeFill(ctx, key); err != nil {
			return err
		}
	}
	c.announce(ctx, fillsMark+remote+" "+pattern.String())
	return nil
}

// fillsOf are the keys of those fills.
func (c *cache) fillsOf(remote string, pattern *regexp.Regexp) (keys []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, f := range c.flights {
		if f.want.remote.name == remote && pattern.MatchString(decodePath(f.want.spelling)) {
			keys = append(keys, key)
		}
	}
	return keys
}

// remove deletes key everywhere.
func (c *cache) remove(ctx context.Context, remote, key string) error {
	err := c.objects.delete(ctx, key)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c.announce(ctx, removedMark+key)
	if ierr := c.index.delete(ctx, remote, key); ierr != nil && !errors.Is(ierr, fs.ErrNotExist) {
		c.storeFailed("database", "deleting", key, ierr)
	}
	if ferr := c.fresh.delete(ctx, key); ferr != nil && !errors.Is(ferr, fs.ErrNotExist) {
		c.storeFailed("redis", "deleting", key, ferr)
	}
	return err
}

// evict makes room: the least recently used files of a remote above its
// cache.max_size, and of all above most (CACHE_MAX_SIZE; 0: none), go until 90 %
// is left. Files of local repositories stay.
func (c *cache) evict(ctx context.Context, cfg *config, most int64) {
	c.flush(ctx) // the order is by last access
	totals, err := c.index.totals(ctx)
	if err != nil {
		c.storeFailed("database", "adding up", "", err)
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
		p, err := c.index.page(ctx, q)
		if err != nil {
			c.storeFailed("database", "listing for eviction", "", err)
			return freed
		}
		for _, r := range p.rows {
			if freed >= bytes {
				break
			}
			if r.Class == local || c.flying(r.Key) {
				continue
			}
			if err := c.purge(ctx, r.Remote, r.Key); err != nil && !errors.Is(err, fs.ErrNotExist) {
				c.storeFailed("storage", "evicting", r.Key, err)
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

// removedMark begins the announcement of a key that was removed, fillsMark that
// of a pattern, behind a remote's name, whose fills were purged. No key does.
const (
	removedMark = "-"
	fillsMark   = "?"
)

// changed is what another replica announced: key was replaced or removed. A
// fill of it that goes on here began before that, and is not stored.
func (c *cache) changed(told string) {
	if what, ok := strings.CutPrefix(told, fillsMark); ok {
		remote, text, _ := strings.Cut(what, " ")
		if pattern, err := regexp.Compile(text); err == nil {
			for _, key := range c.fillsOf(remote, pattern) {
				c.changed(removedMark + key)
			}
		}
		return
	}
	key, gone := strings.CutPrefix(told, removedMark)
	c.negative.delete(key)
	if f, ok := c.objects.(forgetter); ok {
		f.forget(key)
	}
	if f := c.ground(key); f != nil {
		f.mu.Lock()
		f.purged, f.gone = true, f.gone || gone
		f.mu.Unlock()
	}
}

// missed: announcements may have been lost.
func (c *cache) missed() {
	if f, ok := c.objects.(forgetter); ok {
		f.forgetAll()
	}
}

// maxUntold bounds the announcements that wait for Redis.
const maxUntold = 100_000

// announce tells the other replicas to drop what they keep of key. They may
// hear each other while we cannot be heard: what fails is told by flush later.
func (c *cache) announce(ctx context.Context, key string) {
	if c.replicas == nil {
		return
	}
	err := c.replicas.announce(ctx, key)
	if err == nil {
		return
	}
	c.storeFailed("redis", "announcing", key, err)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.untold) < maxUntold {
		c.untold[key] = true
	}
}

// tell makes up for announcements that failed.
func (c *cache) tell(ctx context.Context) {
	if c.replicas == nil || !c.replicas.online() {
		return
	}
	c.mu.Lock()
	untold := c.untold
	c.untold = map[string]bool{}
	c.mu.Unlock()
	for key := range untold {
		if c.replicas.announce(ctx, key) != nil {
			break
		}
		delete(untold, key)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.Copy(c.untold, untold)
}
