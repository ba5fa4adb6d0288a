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

// errFileExists: create found a file; errChecksum: the body is another, says who
// reads it.
var (
	errFileExists = &problem{status: http.StatusPreconditionFailed, detail: "the file exists already"}
	errChecksum   = &problem{status: http.StatusUnprocessableEntity, detail: "the body does not have the checksum that was sent with it"}
)

// putFile stores an upload; created says that there was no such file. When it
// returns nil the file is durable; otherwise the old one is still there.
func (c *cache) putFile(ctx context.Context, file fileRequest, u upload) (created bool, err error) {
	spool, err := c.spools.newSpool()
	if err != nil {
		return false, err
	}
	defer spool.Close()
	defer os.Remove(spool.Name())
	rec := c.newRecord(file, http.Header{})
	if err := c.receiveUpload(spool, u, rec); err != nil {
		return false, err
	}
	key := file.key()
	defer c.lockKey(key)()
	_, err = c.objects.open(ctx, key, -1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if created = err != nil; !created && u.create {
		return false, errFileExists
	}
	rec.create = u.create
	return created, c.storeBody(ctx, key, rec, spool)
}

// receiveUpload spools an upload and completes its record.
func (c *cache) receiveUpload(spool *os.File, u upload, rec *record) error {
	if err := c.spools.checkRoom(max(0, u.size)); err != nil {
		return err
	}
	sums, buf := newBodyHash(""), make([]byte, copyBufferSize)
	for {
		n, err := u.body.Read(buf)
		if rec.Size/roomEvery != (rec.Size+int64(n))/roomEvery {
			if err := c.spools.checkRoom(0); err != nil {
				return err
			}
		}
		if _, err := spool.Write(buf[:n]); err != nil {
			return fmt.Errorf("%w: %w", errNoSpace, err)
		}
		sums.Write(buf[:n])
		rec.Size += int64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: reading the upload: %w", errBadRequest, err)
		}
	}
	rec.SHA256 = sums.sumHex()
	return nil
}

// purgeFile removes key from the store; fs.ErrNotExist when nothing was there. A
// fill of it in progress serves its clients and is not stored.
func (c *cache) purgeFile(ctx context.Context, remote, key string) error {
	defer c.lockKey(key)()
	c.negative.delete(key)
	if err := c.stopFill(ctx, key); err != nil {
		return err
	}
	return c.removeFile(ctx, remote, key)
}

// stopFill keeps what is being filled here under key from being stored.
func (c *cache) stopFill(ctx context.Context, key string) error {
	if f := c.takeFill(key); f != nil {
		return f.preventStoring(ctx)
	}
	return nil
}

// takeFill takes key's flight out of the table, so that later requests begin
// another.
func (c *cache) takeFill(key string) *fill {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.fills[key]
	if f != nil {
		c.dropFill(f)
	}
	return f
}

// purgeMatchingFills keeps what is being filled of a remote, here or on another replica,
// from being stored if pattern is found in its path: it has no row yet.
func (c *cache) purgeMatchingFills(ctx context.Context, remote string, pattern *regexp.Regexp) error {
	for _, key := range c.matchingFills(remote, pattern) {
		if err := c.stopFill(ctx, key); err != nil {
			return err
		}
	}
	c.announceChange(ctx, fillsPrefix+remote+" "+pattern.String())
	return nil
}

// matchingFills are the keys of those fills.
func (c *cache) matchingFills(remote string, pattern *regexp.Regexp) (keys []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, f := range c.fills {
		if f.file.remote.name == remote && pattern.MatchString(decodePath(f.file.spelling)) {
			keys = append(keys, key)
		}
	}
	return keys
}

// removeFile deletes key everywhere.
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
			if r.Class == local || c.isFilling(r.Key) {
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

// removedPrefix begins the announcement of a key that was removed, fillsPrefix that
// of a pattern, behind a remote's name, whose fills were purged. No key does.
const (
	removedPrefix = "-"
	fillsPrefix   = "?"
)

// onChange is what another replica announced: key was replaced or removed. A
// fill of it that goes on here began before that, and is not stored.
func (c *cache) onChange(told string) {
	if what, ok := strings.CutPrefix(told, fillsPrefix); ok {
		remote, text, _ := strings.Cut(what, " ")
		if pattern, err := regexp.Compile(text); err == nil {
			for _, key := range c.matchingFills(remote, pattern) {
				c.onChange(removedPrefix + key)
			}
		}
		return
	}
	key, gone := strings.CutPrefix(told, removedPrefix)
	c.negative.delete(key)
	if f, ok := c.objects.(cachingObjects); ok {
		f.invalidate(key)
	}
	if f := c.takeFill(key); f != nil {
		f.mu.Lock()
		f.purged, f.gone = true, f.gone || gone
		f.mu.Unlock()
	}
}

// onMissedChanges: announcements may have been lost.
func (c *cache) onMissedChanges() {
	if f, ok := c.objects.(cachingObjects); ok {
		f.invalidateAll()
	}
}

// maxUnsentAnnouncements bounds the announcements that wait for Redis.
const maxUnsentAnnouncements = 100_000

// announceChange tells the other replicas to drop what they keep of key. They may
// hear each other while we cannot be heard: what fails is told by flush later.
func (c *cache) announceChange(ctx context.Context, key string) {
	if c.replicas == nil {
		return
	}
	err := c.replicas.announceChange(ctx, key)
	if err == nil {
		return
	}
	c.noteStoreError("redis", "announcing", key, err)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.unsentAnnouncements) < maxUnsentAnnouncements {
		c.unsentAnnouncements[key] = true
	}
}

// sendUnsentAnnouncements makes up for announcements that failed.
func (c *cache) sendUnsentAnnouncements(ctx context.Context) {
	if c.replicas == nil || !c.replicas.hearsChanges() {
		return
	}
	c.mu.Lock()
	untold := c.unsentAnnouncements
	c.unsentAnnouncements = map[string]bool{}
	c.mu.Unlock()
	for key := range untold {
		if c.replicas.announceChange(ctx, key) != nil {
			break
		}
		delete(untold, key)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.Copy(c.unsentAnnouncements, untold)
}
