// cache_evict.go: eviction: which files go when there is too much, or too little space.

package main

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

const (
	// entryOverhead is charged for each stored file beside its bytes: the blocks of its
	// directory, its record and the end of its body, which outweigh its index row.
	entryOverhead = 12 << 10
	// unusedShare is the part of a limit, as a divisor, above which the files that were
	// never used again since they were stored go first. Most files that are asked for
	// once are never asked for again: they must not push out what is used.
	unusedShare = 4
	// The first page of rows that eviction reads is small, since few files may suffice.
	// The next ones grow: the embedded index goes through all rows for each.
	minEvictPage = 100
	maxEvictPage = 10_000
	// maxVariants is how many files with a query are stored for one path.
	maxVariants = 64
)

// evictor removes files of remotes. Files of local repositories neither go nor count,
// nor does a file go that is read or filled. Its methods may be called concurrently.
type evictor struct {
	cache  *cache
	config func() *config // the configuration in force
	limit  int64          // CACHE_MAX_SIZE, of all remotes together; 0: none
	// alone calls f unless another replica evicts at the moment.
	alone func(ctx context.Context, f func(context.Context)) error
	named *boundedMap[string, []uint64] // what stored roots name, see readRoot

	running sync.Mutex // one eviction at a time; held across I/O

	evictedFiles, evictedBytes atomic.Int64 // since the start
}

func newEvictor(c *cache) *evictor {
	return &evictor{cache: c, config: func() *config { return &config{} }, named: newBoundedMap[string, []uint64](maxRememberedFiles, nil),
		alone: func(ctx context.Context, f func(context.Context)) error {
			f(ctx)
			return nil
		}}
}

// counters is what /metrics shows of eviction.
func (e *evictor) counters() []family {
	return []family{
		newCounter("artifactapi_evictions_total", "Files removed for space.", float64(e.evictedFiles.Load())),
		newCounter("artifactapi_evicted_bytes_total", "Bytes of files removed for space.", float64(e.evictedBytes.Load())),
	}
}

// entryCost is what a stored file takes.
func entryCost(size int64) int64 { return size + entryOverhead }

func (t remoteTotal) cost() int64 { return t.Bytes + t.Files*entryOverhead }

// excess is what one remote ("": all of them) has above a limit.
type excess struct {
	remote      string
	bytes, over int64 // over: what the limit is
}

// evictFiles is the step of a background loop. It keeps the remotes to their
// cache.max_size and all of them to the limit: above it, files go until 90 % is left.
func (e *evictor) evictFiles(ctx context.Context) {
	e.cache.flushCounts(ctx) // the order is by use
	if len(e.findExcess(ctx)) == 0 {
		return
	}
	err := e.alone(ctx, func(ctx context.Context) {
		e.running.Lock()
		defer e.running.Unlock()
		for _, x := range e.findExcess(ctx) { // another replica may have been faster
			e.evict(ctx, x.remote, room{bytes: x.bytes}, x.over/unusedShare)
		}
	})
	if err != nil && !errors.Is(err, errStoreDown) {
		e.cache.reportStoreError("database", "evicting", "", err)
	}
}

// findExcess returns what has to go, first of single remotes.
func (e *evictor) findExcess(ctx context.Context) (found []excess) {
	totals := e.storedOfRemotes(ctx)
	var all int64
	for _, name := range slices.Sorted(maps.Keys(totals)) {
		cost := totals[name].cost()
		if rem := e.config().remotes[name]; rem != nil && rem.maxSize > 0 && cost > rem.maxSize {
			found = append(found, excess{name, cost - rem.maxSize/10*9, rem.maxSize})
			cost = rem.maxSize / 10 * 9
		}
		all += cost
	}
	if e.limit > 0 && all > e.limit {
		found = append(found, excess{"", all - e.limit/10*9, e.limit})
	}
	return found
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
	if err != nil {
		e.cache.reportStoreError("database", "adding up", "", err)
	}
	return totals
}

// reclaimable: see reclaimer.
func (e *evictor) reclaimable() (all room) {
	for _, t := range e.storedOfRemotes(e.cache.ctx) {
		all.bytes += t.Bytes // the rest frees no more than what a body takes beside its bytes
		all.inodes += t.Files * inodesPerFile
	}
	return all
}

// reclaim: see reclaimer.
func (e *evictor) reclaim(need room) (freed room) {
	e.running.Lock()
	defer e.running.Unlock()
	e.cache.flushCounts(e.cache.ctx)
	var all int64
	for _, t := range e.storedOfRemotes(e.cache.ctx) {
		all += t.cost()
	}
	return e.evict(e.cache.ctx, "", need, all/unusedShare)
}

// evict removes files of a remote ("": of all) until need is freed: while the files that
// were never used again since they were stored take more than maxUnused, the oldest of
// them, and else the least recently used file. What a stored root names goes when
// nothing else is left. The most recent file stays.
func (e *evictor) evict(ctx context.Context, remote string, need room, maxUnused int64) (freed room) {
	unused, err := e.cache.index.totals(ctx, true)
	if err != nil {
		e.cache.reportStoreError("database", "adding up", "", err)
		return freed
	}
	v := &eviction{evictor: e, remote: remote, need: need, unused: -maxUnused}
	for name, t := range unused {
		if remote == "" || remote == name {
			v.unused += t.cost()
		}
	}
	for spares := true; !v.isDone(ctx); {
		v.named = nil
		if spares {
			v.named, err = e.findNamed(ctx)
		}
		if err != nil {
			e.cache.reportStoreError("storage", "reading what manifests name", "", err)
			break
		}
		before := v.files
		v.run(ctx)
		if v.files == before { // what a root names that went may go in the next run
			if !spares {
				break
			}
			spares = false
		}
	}
	if v.files > 0 {
		e.cache.log.Info("evicted files", "remote", remote, "files", v.files, "bytes", v.freed.bytes)
	}
	return v.freed
}

// eviction is one eviction that runs. One goroutine uses it.
type eviction struct {
	*evictor
	remote string // "": of all
	need   room
	freed  room
	files  int64
	unused int64           // what files take that were never used again, above what they may
	named  map[fileID]bool // what stored roots name
	failed bool            // a store failed
}

func (v *eviction) isDone(ctx context.Context) bool {
	return v.failed || ctx.Err() != nil || (v.freed.bytes >= v.need.bytes && v.freed.inodes >= v.need.inodes)
}

// run goes once through the files in the order in which they go.
func (v *eviction) run(ctx context.Context) {
	unused, used := &agedRows{eviction: v}, &agedRows{eviction: v, used: true}
	for !v.isDone(ctx) {
		a, b := unused.first(ctx), used.first(ctx)
		from, other := unused, used
		switch {
		case a == nil && b == nil:
			return
		case a == nil, b != nil && v.unused <= 0 && b.LastAccess.Before(a.LastAccess):
			from, other = used, unused
		}
		row := from.rows[0]
		if !v.named[fileID{row.Remote, keyHash(row.Key)}] && !v.isMostRecent(ctx, from, other) {
			v.remove(ctx, row, from.used)
		}
		from.rows = from.rows[1:]
	}
}

// isMostRecent reports whether no file that may go was used later than from's first.
func (v *eviction) isMostRecent(ctx context.Context, from, other *agedRows) bool {
	if len(from.rows) > 1 || !from.atEnd {
		return false
	}
	p, err := v.cache.index.listPage(ctx, pageQuery{remote: v.remote, oldest: true, used: other.used, after: positionByAge(from.rows[0]), limit: 1})
	return err != nil || len(p.rows) == 0
}

// remove removes a file, unless it is in use.
func (v *eviction) remove(ctx context.Context, row indexRow, used bool) {
	switch err := v.removeUnlessBusy(ctx, row); {
	case errors.Is(err, errBusy), err != nil && ctx.Err() != nil:
		return
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		v.failed = true
		v.cache.reportStoreError("storage", "evicting", row.Key, err)
		return
	}
	v.files++
	v.freed.bytes += entryCost(row.Size)
	v.freed.inodes += inodesPerFile
	if !used {
		v.unused -= entryCost(row.Size)
	}
	v.evictedFiles.Add(1)
	v.evictedBytes.Add(row.Size)
}

// removeUnlessBusy removes a file. errBusy: it is read or filled, and so it is not old.
func (e *evictor) removeUnlessBusy(ctx context.Context, row indexRow) error {
	if err := e.cache.changing.lock(ctx, row.Key); err != nil {
		return err
	}
	defer e.cache.changing.unlock(row.Key)
	if e.cache.fills.isFilling(row.Key) || e.cache.readers.has(row.Key) {
		return errBusy
	}
	return e.cache.removeFile(ctx, row.Remote, row.Key)
}

// agedRows are the files that may go and were used again, or were not, the least
// recently used first.
type agedRows struct {
	*eviction
	used  bool
	rows  []indexRow // read and not looked at yet
	after string     // position behind them
	limit int        // of the last page
	atEnd bool       // no more follow them
}

// first is the first row that was not looked at, or nil.
func (q *agedRows) first(ctx context.Context) *indexRow {
	if len(q.rows) == 0 && !q.atEnd {
		q.limit = min(max(minEvictPage, q.limit*10), maxEvictPage)
		p, err := q.cache.index.listPage(ctx, pageQuery{remote: q.remote, oldest: true, used: q.used, after: q.after, limit: q.limit})
		if err != nil {
			q.failed = true
			q.cache.reportStoreError("database", "listing for eviction", "", err)
		}
		q.rows, q.after, q.atEnd = p.rows, p.next, p.next == ""
	}
	if len(q.rows) == 0 {
		return nil
	}
	return &q.rows[0]
}

// positionByAge is the token of a page by age that begins behind r.
func positionByAge(r indexRow) string {
	return strconv.FormatInt(r.LastAccess.UnixNano(), 10) + "\n" + r.Key
}

// trimVariants removes query variants of the path of t, which was just stored, until
// maxVariants are left: first those that were never used again since they were stored.
func (e *evictor) trimVariants(ctx context.Context, t target) {
	this, query, _ := strings.Cut(t.spelling, "?")
	if query == "" || !t.remote.boundsVariants() {
		return
	}
	list := func() (variants []indexRow, err error) {
		p, err := e.cache.index.listPage(ctx, pageQuery{remote: t.remote.name, prefix: t.path, limit: listPageSize})
		for _, row := range p.rows { // those of the path itself come first
			if path, query, _ := strings.Cut(row.Path, "?"); path == this && query != "" {
				variants = append(variants, row)
			}
		}
		return variants, err
	}
	variants, err := list()
	if len(variants) > maxVariants {
		e.cache.flushCounts(ctx) // the order is by use
		variants, err = list()
	}
	if err != nil {
		e.cache.reportStoreError("database", "listing variants", t.key(), err)
	}
	slices.SortFunc(variants, func(a, b indexRow) int {
		return cmp.Or(cmp.Compare(min(a.Hits, 1), min(b.Hits, 1)), a.LastAccess.Compare(b.LastAccess))
	})
	for _, row := range variants[:max(0, len(variants)-maxVariants)] {
		if row.Key == t.key() {
			continue // the most recent one stays
		}
		if err := e.removeUnlessBusy(ctx, row); err != nil && !errors.Is(err, errBusy) && !errors.Is(err, fs.ErrNotExist) {
			e.cache.reportStoreError("storage", "evicting", row.Key, err)
		}
	}
}
