// cache_evict.go: eviction: which files go when there is too much, or too little space,
// and which stay while something else can go: those that stored roots and manifests name.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

const (
	// unusedShare is the part of a limit, as a divisor, above which the files that were
	// never used again since they were stored go first. Most files that are asked for
	// once are never asked for again: they must not push out what is used.
	unusedShare = 4
	// evictPage is how many rows eviction reads at a time: few files may suffice, but the
	// embedded index goes through all rows for each page.
	evictPage = 2000
	// maxVariants is how many files with a query are stored for one path.
	maxVariants = 64
	// namedBudget bounds the bytes of the hashes that are remembered: those of 100,000 images.
	namedBudget = 32 << 20
	// maxEvictFailures ends an eviction: so many files that cannot be removed are no bad
	// sectors, it is the store.
	maxEvictFailures = 100
)

// evictor removes files of remotes. Files of local repositories neither go nor count,
// nor does a file go that is read or filled. Its methods may be called concurrently.
type evictor struct {
	cache  *cache
	config func() *config // the configuration in force
	limit  int64          // CACHE_MAX_SIZE, of all remotes together; 0: none
	// alone calls f unless another replica evicts at the moment.
	alone func(ctx context.Context, f func(context.Context)) error
	named *lru[[]uint64] // what stored roots name, see readRoot

	running sync.Mutex // one eviction at a time; held across I/O

	evictedFiles, evictedBytes atomic.Int64 // since the start
}

func entryCost(size int64) int64 { return size + entryOverhead }

func (t remoteTotal) cost() int64 { return t.Bytes + t.Files*entryOverhead }

// evictFiles keeps the remotes to their cache.max_size and all of them to the limit.
func (e *evictor) evictFiles(ctx context.Context) {
	e.cache.flushCounts(ctx) // the order is by use
	err := e.alone(ctx, func(ctx context.Context) {
		e.running.Lock()
		defer e.running.Unlock()
		var all int64
		for name, t := range e.storedOfRemotes(ctx) {
			cost := t.cost()
			if rem := e.config().remotes[name]; rem != nil {
				cost = e.evictAbove(ctx, name, "cache.max_size", cost, rem.maxSize)
			}
			all += cost
		}
		e.evictAbove(ctx, "", "CACHE_MAX_SIZE", all, e.limit)
	})
	e.cache.reportStoreError("database", "evicting", "", err)
}

// evictAbove lets files of a remote ("": of all) that take cost go until 90 % of limit is
// left, if they take more than that (0: any). It returns what they take then.
func (e *evictor) evictAbove(ctx context.Context, remote, reason string, cost, limit int64) (left int64) {
	if limit <= 0 || cost <= limit {
		return cost
	}
	v := &eviction{evictor: e, remote: remote, reason: reason, need: room{bytes: cost - limit/10*9}, maxUnused: limit / unusedShare}
	v.evict(ctx)
	return cost - v.freed.bytes
}

// storedOfRemotes is what is stored of each remote that is no local repository. One that
// is not configured any more is what its first file is.
func (e *evictor) storedOfRemotes(ctx context.Context) map[string]remoteTotal {
	totals, err := e.cache.index.totals(ctx, false)
	maps.DeleteFunc(totals, func(name string, _ remoteTotal) bool {
		if rem := e.config().remotes[name]; rem != nil || err != nil {
			return rem != nil && rem.local
		}
		var p indexPage
		p, err = e.cache.index.listPage(ctx, pageQuery{remote: name, limit: 1})
		return err != nil || len(p.rows) == 0 || p.rows[0].Class == local
	})
	e.cache.reportStoreError("database", "adding up", "", err)
	return totals
}

// reclaimable: see reclaimer. What is in use does not go, nor does the most recent file.
func (e *evictor) reclaimable() (all room) {
	c := e.cache
	for _, t := range e.storedOfRemotes(c.ctx) {
		all.bytes += t.cost()
		all.inodes += t.Files * inodesPerFile
	}
	c.uses.mu.Lock()
	stays := map[string]bool{c.uses.newest.key: true}
	c.uses.mu.Unlock()
	c.readers.mu.Lock()
	for key := range c.readers.byKey {
		stays[key] = true
	}
	c.readers.mu.Unlock()
	c.fills.mu.Lock()
	for key := range c.fills.byKey {
		stays[key] = true
	}
	c.fills.mu.Unlock()
	for key := range stays {
		if obj, err := c.objects.open(c.ctx, key, -1); err == nil && obj.rec.Class != local {
			all.bytes -= entryCost(obj.rec.Size)
			all.inodes -= inodesPerFile
		}
	}
	return all
}

// reclaim: see reclaimer.
func (e *evictor) reclaim(need room, removing func(bytes int64)) (freed room) {
	e.running.Lock()
	defer e.running.Unlock()
	e.cache.flushCounts(e.cache.ctx)
	var all int64
	for _, t := range e.storedOfRemotes(e.cache.ctx) {
		all += t.cost()
	}
	v := &eviction{evictor: e, reason: "MIN_FREE", need: need, removing: removing, maxUnused: all / unusedShare}
	v.evict(e.cache.ctx)
	return v.freed
}

// eviction removes files of a remote until need is freed. What a stored root names goes
// when nothing else is left. The most recent file stays. One goroutine uses it.
type eviction struct {
	*evictor
	remote    string // "": of all
	reason    string // for the log
	need      room
	removing  func(bytes int64) // see reclaimer; may be nil
	maxUnused int64             // bytes

	freed  room
	files  int64
	from   map[string]bool            // the remotes that had these files
	unused int64                      // what files take that were never used again
	named  map[string]map[uint64]bool // what stored roots name: by remote, the hashes of keys
	failed bool                       // the index failed, or the store
	kept   int                        // files that could not be removed
}

func (v *eviction) evict(ctx context.Context) {
	v.from = map[string]bool{}
	unused, err := v.cache.index.totals(ctx, true)
	for name, t := range unused {
		if v.remote == "" || v.remote == name {
			v.unused += t.cost()
		}
	}
	// What was named by a root that went may go in the next run; what is named by one that
	// stays goes in the last, when nothing else is left.
	for before := int64(-1); err == nil && v.files > before && !v.isDone(ctx); {
		before = v.files
		if v.named, err = v.findNamed(ctx); err == nil {
			v.run(ctx)
		}
	}
	if err == nil {
		v.named = nil
		v.run(ctx)
	}
	v.cache.reportStoreError("storage", "choosing what to evict", "", err)
	if v.files > 0 {
		v.cache.log.Info("evicted files", "reason", v.reason, "remotes", sortedKeys(v.from), "files", v.files, "bytes", v.freed.bytes)
	}
}

func (v *eviction) isDone(ctx context.Context) bool {
	return v.failed || ctx.Err() != nil || (v.freed.bytes >= v.need.bytes && v.freed.inodes >= v.need.inodes)
}

// run goes through the files that were never used again since they were stored, as long as
// they take more than maxUnused, and then through all.
func (v *eviction) run(ctx context.Context) {
	v.removeOldest(ctx, pageQuery{remote: v.remote, oldest: true, limit: evictPage})
	v.removeOldest(ctx, pageQuery{remote: v.remote, oldest: true, used: true, limit: evictPage})
}

// removeOldest removes the files that q finds, but for the last one and what is named.
func (v *eviction) removeOldest(ctx context.Context, q pageQuery) {
	for more := true; more; more = q.after != "" {
		p, err := v.cache.index.listPage(ctx, q)
		if err != nil {
			v.failed = true
			v.cache.reportStoreError("database", "listing for eviction", "", err)
		}
		for i, row := range p.rows {
			isLast := p.next == "" && i == len(p.rows)-1
			if isLast || v.isDone(ctx) || (!q.used && v.unused <= v.maxUnused) {
				return
			}
			if !v.named[row.Remote][keyHash(row.Key)] {
				v.remove(ctx, row)
			}
		}
		q.after = p.next
	}
}

// remove removes a file, unless it is in use.
func (v *eviction) remove(ctx context.Context, row indexRow) {
	switch err := v.removeUnlessBusy(ctx, row, v.removing); {
	case errors.Is(err, errBusy), err != nil && ctx.Err() != nil:
		return
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		v.kept++
		v.failed = v.kept == maxEvictFailures || v.cache.storageIsDown()
		v.cache.reportStoreError("storage", "evicting", row.Key, err)
		return
	}
	v.files++
	v.from[row.Remote] = true
	v.freed.bytes += entryCost(row.Size)
	v.freed.inodes += inodesPerFile
	if row.Hits == 0 {
		v.unused -= entryCost(row.Size)
	}
	v.evictedFiles.Add(1)
	v.evictedBytes.Add(row.Size)
}

// removeUnlessBusy removes a file, and calls removing before, which may be nil. errBusy:
// it is read or filled, and so it is not old, or it is being purged, which may take long.
func (e *evictor) removeUnlessBusy(ctx context.Context, row indexRow, removing func(bytes int64)) error {
	if !e.cache.changing.tryLock(row.Key) {
		return errBusy
	}
	defer e.cache.changing.unlock(row.Key)
	if e.cache.fills.isFilling(row.Key) || e.cache.readers.isRead(row.Key) {
		return errBusy
	}
	if removing != nil {
		removing(entryCost(row.Size))
	}
	return e.cache.removeFile(ctx, row.Remote, row.Key, copiesPrefix)
}

// trimVariants removes query variants of the path of t, which was just stored, until
// maxVariants are left: first those that were never used again since they were stored.
func (e *evictor) trimVariants(ctx context.Context, t target) {
	this, query, _ := strings.Cut(t.spelling, "?")
	if query == "" || t.remote.query == allQueries || t.remote.sealed {
		return
	}
	e.cache.flushCounts(ctx) // the order is by use
	p, err := e.cache.index.listPage(ctx, pageQuery{remote: t.remote.name, prefix: t.path, limit: listPageSize})
	e.cache.reportStoreError("database", "listing variants", t.key(), err)
	variants := slices.DeleteFunc(p.rows, func(row indexRow) bool { // those of the path itself come first
		path, query, _ := strings.Cut(row.Path, "?")
		return path != this || query == ""
	})
	slices.SortFunc(variants, func(a, b indexRow) int {
		return cmp.Or(cmp.Compare(min(a.Hits, 1), min(b.Hits, 1)), a.LastAccess.Compare(b.LastAccess))
	})
	for _, row := range variants[:max(0, len(variants)-maxVariants)] {
		if row.Key == t.key() {
			continue // the most recent one stays
		}
		if err := e.removeUnlessBusy(ctx, row, nil); !errors.Is(err, errBusy) && !errors.Is(err, fs.ErrNotExist) {
			e.cache.reportStoreError("storage", "evicting", row.Key, err)
		}
	}
}

// rootPatterns find roots by their decoded path, by package.
var rootPatterns = map[string]*regexp.Regexp{
	"docker": regexp.MustCompile(`/manifests/`),
	"rpm":    regexp.MustCompile(`(?:^|/)repodata/repomd\.xml$`),
	"deb":    regexp.MustCompile(`(?:^|/)(?:In)?Release$`),
}

// findNamed returns the files that stored roots name. Hashes of keys take less memory.
func (e *evictor) findNamed(ctx context.Context) (named map[string]map[uint64]bool, err error) {
	named = map[string]map[uint64]bool{}
	for name, rem := range e.config().remotes {
		named[name] = map[uint64]bool{}
		q := pageQuery{remote: name, pattern: rootPatterns[rem.packageType], limit: listPageSize}
		for more := q.pattern != nil; more; more = q.after != "" {
			p, err := e.cache.index.listPage(ctx, q)
			if err != nil {
				return nil, err
			}
			for _, row := range p.rows {
				hashes, err := e.readRoot(ctx, rem, row)
				if !errors.Is(err, fs.ErrNotExist) {
					e.cache.reportStoreError("storage", "reading", row.Key, err)
				}
				if err != nil && e.cache.storageIsDown() { // else one bad sector would end all eviction
					return nil, err
				}
				for _, hash := range hashes {
					named[name][hash] = true
				}
			}
			q.after = p.next
		}
	}
	return named, nil
}

// readRoot returns the hashes of the files that a stored root names, and remembers them.
func (e *evictor) readRoot(ctx context.Context, rem *remote, row indexRow) (hashes []uint64, err error) {
	id := row.Key + row.SHA256
	if hashes, found := e.named.get(id); found || row.Size > maxMetadata {
		return hashes, nil
	}
	spellings, err := e.readNames(ctx, rem, row)
	if err != nil {
		return nil, err
	}
	for _, spelling := range spellings {
		hashes = append(hashes, keyHash(storageKey(row.Remote, spelling)))
	}
	e.named.put(id, int64(len(id)+8*len(hashes)), hashes)
	return hashes, nil
}

// readNames returns the spellings under which the files are stored that a root names.
func (e *evictor) readNames(ctx context.Context, rem *remote, row indexRow) (spellings []string, err error) {
	if rem.packageType != "docker" {
		g := e.cache.generations
		root, err := g.openRoot(ctx, rem.rootAt(row.Path))
		if err != nil {
			return nil, err
		}
		for _, f := range root.files {
			for _, req := range g.requestsFor(root, f) {
				spellings = append(spellings, req.spelling)
			}
		}
		return spellings, nil
	}
	obj, err := e.cache.objects.open(ctx, row.Key, 0)
	if err != nil {
		return nil, err
	}
	defer obj.body.Close()
	body, err := io.ReadAll(io.LimitReader(obj.body, maxMetadata))
	var m imageDocument
	_ = json.Unmarshal(body, &m) // what is no manifest names nothing
	for _, d := range append(m.Layers, m.Config) {
		spellings = append(spellings, "blobs/"+d.Digest)
	}
	image := row.Path[:strings.LastIndex(row.Path, "/")+1]
	if !strings.Contains(row.Path, ":") { // a tag: who asks for it asks for its digest next
		m.Manifests = append(m.Manifests, imagePart{Digest: "sha256:" + row.SHA256})
	}
	for _, d := range m.Manifests {
		spellings = append(spellings, image+d.Digest)
	}
	return spellings, err
}

// imageDocument holds what a manifest, an index, or a list of tags or referrers names.
type imageDocument struct {
	Config            imagePart
	Layers, Manifests []imagePart
	Tags              []string
}

// imagePart is a descriptor (OCI image specification).
type imagePart struct {
	Digest   string
	Size     int64
	URLs     []string // of a layer that registries do not have themselves
	Platform *struct{ OS, Architecture, Variant string }
}
