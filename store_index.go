// store_index.go: the embedded index, a sorted table in memory with a row for each
// stored object. It takes about 200 bytes of memory an object; a larger cache uses
// PostgreSQL.

package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unique"
)

const (
	// chunkRows bounds the pointers that an insertion moves: 4 KiB.
	chunkRows = 512
	// batchRows bounds the pointers that a scan copies while writers wait: 8 KiB.
	batchRows = 1024
)

// The tokens of pages, which both indexes share. By path, a token is the path of the
// last row, and its key behind a line break only if the following row has the same
// path: so people can write tokens by hand. No path has a line break. By age, it is
// the last access in ns and the key.

// rowFinder finds the first n rows that a query asks for, by path or by age.
type rowFinder = func(ctx context.Context, q pageQuery, n int) ([]indexRow, error)

// findPage finds the page that q asks for.
func findPage(ctx context.Context, q pageQuery, complete bool, byPath, byAge rowFinder) (indexPage, error) {
	find := byPath
	if q.oldest {
		find = byAge
	}
	rows, err := find(ctx, q, q.limit+1) // one more if another page follows
	if len(rows) <= q.limit {
		return indexPage{rows: rows, complete: complete}, err
	}
	last, following := rows[q.limit-1], rows[q.limit]
	next := decodePath(last.Path)
	if q.oldest {
		next = strconv.FormatInt(last.LastAccess.UnixNano(), 10) + "\n" + last.Key
	} else if next == decodePath(following.Path) {
		next += "\n" + last.Key
	}
	return indexPage{rows[:q.limit], next, complete}, err
}

// start returns the position behind which a page by path begins.
func (q *pageQuery) start() (path, key string) {
	path, key, hasKey := strings.Cut(q.after, "\n")
	switch {
	case q.after == "" || path < q.prefix:
		return q.prefix, ""
	case !hasKey:
		return path + "\x01", "" // behind all keys of that path: no path has such a byte
	}
	return path, key
}

// startByAge returns the position behind which a page by age begins.
func (q *pageQuery) startByAge() (lastAccess time.Time, key string) {
	at, key, _ := strings.Cut(q.after, "\n")
	ns, _ := strconv.ParseInt(at, 10, 64) // 0, which is before all rows, for no token
	return time.Unix(0, ns).UTC(), key
}

// indexEntry is a row as it is held in memory. Its key is derived from remote and
// spelling. An entry in the table does not change, except for its atomic fields and
// its generation, and is read without a lock.
type indexEntry struct {
	sortKey
	spelling         string
	sha256           [32]byte
	size, fetched    int64 // times are in ns since 1970
	hits, lastAccess atomic.Int64
	contentType      unique.Handle[string] // few values are shared by many rows
	class            unique.Handle[class]
	generation       uint32 // the last reconcile that found the object; guarded by embeddedIndex.mu
}

// sortKey is the position of a row within its remote: by decoded path, then by
// key. The hash is the part in which the keys of equal paths differ.
type sortKey struct {
	path string
	hash uint64
}

func (p sortKey) compareTo(q sortKey) int {
	return cmp.Or(strings.Compare(p.path, q.path), cmp.Compare(p.hash, q.hash))
}

func (e *indexEntry) toRow(remote string) indexRow {
	return indexRow{
		Remote: remote, Path: e.spelling, Key: storageKey(remote, e.spelling), SHA256: hex.EncodeToString(e.sha256[:]),
		ContentType: e.contentType.Value(), Class: e.class.Value(), Size: e.size, Hits: e.hits.Load(),
		Fetched: time.Unix(0, e.fetched).UTC(), LastAccess: time.Unix(0, e.lastAccess.Load()).UTC(),
	}
}

// newEntry is the inverse of toRow. Key and SHA-256 of a row are well formed: they are
// made here, or were checked with their record.
func newEntry(r indexRow) *indexEntry {
	e := &indexEntry{
		sortKey: sortKey{decodePath(r.Path), keyHash(r.Key)}, spelling: r.Path, size: r.Size, fetched: r.Fetched.UnixNano(),
		contentType: unique.Make(r.ContentType), class: unique.Make(r.Class),
	}
	sum, _ := hex.DecodeString(r.SHA256)
	copy(e.sha256[:], sum)
	e.hits.Store(r.Hits)
	e.lastAccess.Store(r.LastAccess.UnixNano())
	return e
}

// remoteRows holds the rows of one remote in order, cut into chunks.
type remoteRows struct {
	chunks [][]*indexEntry // not empty, except for an only one
	byHash map[uint64]*indexEntry
	bytes  int64 // of all objects
}

// search finds the first row at or behind p: its chunk, and its place there. If there
// is none, the place is the end of the last chunk.
func (s *remoteRows) search(p sortKey) (chunk, i int) {
	chunk = sort.Search(len(s.chunks)-1, func(n int) bool {
		c := s.chunks[n]
		return c[len(c)-1].compareTo(p) >= 0
	})
	i, _ = slices.BinarySearchFunc(s.chunks[chunk], p, (*indexEntry).compareTo)
	return chunk, i
}

// insertEntry adds a row that is not there yet, and cuts a chunk that is too long in two.
func (s *remoteRows) insertEntry(e *indexEntry) {
	s.byHash[e.hash] = e
	s.bytes += e.size
	c, i := s.search(e.sortKey)
	rows := slices.Insert(s.chunks[c], i, e)
	s.chunks[c] = rows
	if len(rows) > chunkRows {
		half := len(rows) / 2
		s.chunks = slices.Insert(s.chunks, c+1, slices.Clone(rows[half:]))
		s.chunks[c] = slices.Delete(rows, half, len(rows))
	}
}

// removeEntry removes a row that is there.
func (s *remoteRows) removeEntry(e *indexEntry) {
	delete(s.byHash, e.hash)
	s.bytes -= e.size
	c, i := s.search(e.sortKey)
	s.chunks[c] = slices.Delete(s.chunks[c], i, i+1)
	if len(s.chunks[c]) == 0 && len(s.chunks) > 1 {
		s.chunks = slices.Delete(s.chunks, c, c+1)
	}
}

// embeddedIndex implements index in memory, with a snapshot in DATA_DIR. It is
// complete once reconcile has compared it with what is stored. Rows of objects that
// other processes store in the same DATA_DIR come with their first use here.
type embeddedIndex struct {
	*snapshotFile
	log *slog.Logger

	complete atomic.Bool // changed under mu

	importSeen time.Time // the import that the rows follow; followStore alone uses it

	mu          sync.RWMutex // guards the fields below; never held across I/O
	rows        map[string]*remoteRows
	generation  uint32          // counts calls of reconcile
	deletedKeys map[string]bool // deleted while reconcile runs
}

func newEmbeddedIndex(dir string, log *slog.Logger) *embeddedIndex {
	x := &embeddedIndex{log: log, rows: map[string]*remoteRows{}, deletedKeys: map[string]bool{}}
	x.snapshotFile = &snapshotFile{fileWriter: newDisk(), name: dir + "/.index", magic: "artifactapi index 2",
		changed: new(atomic.Bool), each: x.eachSavedRow}
	return x
}

// saveRow: see index.
func (x *embeddedIndex) saveRow(ctx context.Context, r indexRow) error {
	e := newEntry(r)
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.deletedKeys, r.Key)
	x.putEntry(r.Remote, e)
	return nil
}

// putEntry inserts a row that is found or saved now, or replaces the row with its hash,
// whose hits and last access stay. mu is held.
func (x *embeddedIndex) putEntry(remote string, e *indexEntry) {
	s := x.rowsOf(remote)
	if old := s.byHash[e.hash]; old != nil {
		e.hits.Store(old.hits.Load())
		e.lastAccess.Store(max(old.lastAccess.Load(), e.lastAccess.Load()))
		s.removeEntry(old)
	}
	e.generation = x.generation
	s.insertEntry(e)
	x.changed.Store(true)
}

// rowsOf returns the rows of a remote, and makes them for its first row. mu is held.
func (x *embeddedIndex) rowsOf(remote string) *remoteRows {
	s := x.rows[remote]
	if s == nil {
		s = &remoteRows{chunks: make([][]*indexEntry, 1), byHash: map[uint64]*indexEntry{}}
		x.rows[remote] = s
	}
	return s
}

// findEntry returns the entry of a key, or nil. mu is held.
func (x *embeddedIndex) findEntry(remote, key string) *indexEntry {
	return x.rowsOf(remote).byHash[keyHash(key)]
}

// delete: see index.
func (x *embeddedIndex) delete(ctx context.Context, remote, key string) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.complete.Load() {
		x.deletedKeys[key] = true
	}
	if e := x.findEntry(remote, key); e != nil {
		x.rows[remote].removeEntry(e)
		x.changed.Store(true)
	}
	return nil
}

// forget: see index.
func (x *embeddedIndex) forget(key string) {
	remote, _, _ := strings.Cut(key, "/")
	_ = x.delete(context.Background(), remote, key)
}

// countUses: see index.
func (x *embeddedIndex) countUses(ctx context.Context, batch []fileUse) (unknown []fileUse, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, use := range batch {
		e := x.findEntry(use.remote, use.key)
		if e == nil {
			unknown = append(unknown, use)
			continue
		}
		e.hits.Add(use.hits)
		e.lastAccess.Store(max(e.lastAccess.Load(), use.last.UnixNano()))
		x.changed.Store(true)
	}
	return unknown, nil
}

// totals: see index.
func (x *embeddedIndex) totals(ctx context.Context, unused bool) (map[string]remoteTotal, error) {
	all := x.allTotals()
	if !unused {
		return all, nil
	}
	for name := range all {
		var t remoteTotal
		err := x.eachEntry(ctx, name, sortKey{}, func(e *indexEntry) bool {
			if e.mayGo(false) {
				t.Files++
				t.Bytes += e.size
			}
			return true
		})
		if err != nil {
			return nil, err
		}
		all[name] = t
	}
	return all, nil
}

func (x *embeddedIndex) allTotals() map[string]remoteTotal {
	x.mu.RLock()
	defer x.mu.RUnlock()
	all := map[string]remoteTotal{}
	for name, s := range x.rows {
		if len(s.byHash) > 0 {
			all[name] = remoteTotal{int64(len(s.byHash)), s.bytes}
		}
	}
	return all
}

// mayGo reports whether a pageQuery with oldest finds the entry.
func (e *indexEntry) mayGo(used bool) bool {
	return (used || e.hits.Load() == 0) && e.class.Value() != local
}

// listPage: see index.
func (x *embeddedIndex) listPage(ctx context.Context, q pageQuery) (indexPage, error) {
	return findPage(ctx, q, x.complete.Load(), x.findByPath, x.findByAge)
}

// findByPath returns the first n rows of q.
func (x *embeddedIndex) findByPath(ctx context.Context, q pageQuery, n int) (rows []indexRow, err error) {
	path, key := q.start()
	err = x.eachEntry(ctx, q.remote, sortKey{path, keyHash(key)}, func(e *indexEntry) bool {
		if !strings.HasPrefix(e.path, q.prefix) {
			return false
		}
		if q.pattern == nil || q.pattern.MatchString(e.path) {
			rows = append(rows, e.toRow(q.remote))
		}
		return len(rows) < n
	})
	return rows, err
}

// agedEntry is an entry in the order of eviction. A copy of the last access keeps the
// order while the entry is used.
type agedEntry struct {
	lastAccess int64
	remote     string
	hash       uint64
	entry      *indexEntry
}

func (a agedEntry) compareTo(b agedEntry) int {
	return cmp.Or(cmp.Compare(a.lastAccess, b.lastAccess), strings.Compare(a.remote, b.remote), cmp.Compare(a.hash, b.hash))
}

// findByAge returns the first n rows that q asks for by last access. It reads every
// entry of its remotes, and holds 2n of them at most.
func (x *embeddedIndex) findByAge(ctx context.Context, q pageQuery, n int) (rows []indexRow, err error) {
	lastAccess, key := q.startByAge()
	remote, _, _ := strings.Cut(key, "/")
	after := agedEntry{lastAccess: lastAccess.UnixNano(), remote: remote, hash: keyHash(key)}
	youngest := agedEntry{lastAccess: math.MaxInt64} // n older entries are found
	var found []agedEntry
	trim := func() {
		slices.SortFunc(found, agedEntry.compareTo)
		if len(found) >= n {
			found = found[:n]
			youngest = found[n-1]
		}
	}
	for name := range x.allTotals() {
		if q.remote != "" && q.remote != name {
			continue
		}
		err := x.eachEntry(ctx, name, sortKey{}, func(e *indexEntry) bool {
			a := agedEntry{e.lastAccess.Load(), name, e.hash, e}
			if e.mayGo(q.used) && a.compareTo(after) > 0 && a.compareTo(youngest) < 0 {
				found = append(found, a)
			}
			if len(found) >= 2*n {
				trim()
			}
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	trim()
	for _, a := range found {
		r := a.entry.toRow(a.remote)
		r.LastAccess = time.Unix(0, a.lastAccess).UTC()
		rows = append(rows, r)
	}
	return rows, nil
}

// eachEntry calls f with the entries of a remote behind after, in order, until f
// returns false. f runs without a lock: a pattern may take long. The error is ctx's.
func (x *embeddedIndex) eachEntry(ctx context.Context, remote string, after sortKey, f func(*indexEntry) bool) error {
	var space [batchRows]*indexEntry
	for {
		batch := x.appendBehind(space[:0], remote, after)
		for _, e := range batch {
			if err := ctx.Err(); err != nil || !f(e) {
				return err
			}
		}
		if len(batch) < batchRows {
			return ctx.Err()
		}
		after = batch[len(batch)-1].sortKey
	}
}

// appendBehind appends the entries of a remote behind after, until batch is full.
func (x *embeddedIndex) appendBehind(batch []*indexEntry, remote string, after sortKey) []*indexEntry {
	x.mu.RLock()
	defer x.mu.RUnlock()
	s := x.rows[remote]
	if s == nil {
		return batch
	}
	for c, i := s.search(after); c < len(s.chunks); c, i = c+1, 0 {
		for _, e := range s.chunks[c][i:] {
			if len(batch) == cap(batch) {
				return batch
			}
			if e.sortKey != after {
				batch = append(batch, e)
			}
		}
	}
	return batch
}

// reconcile fills the index from the snapshot and then compares it with what is
// stored: rows without an object go, objects without a row get one. What is saved
// and deleted meanwhile wins. After an error it may be called again. It runs once at
// a time.
func (x *embeddedIndex) reconcile(ctx context.Context, from objects) error {
	x.mu.Lock()
	x.generation++
	x.complete.Store(false)
	x.mu.Unlock()
	if x.generation == 1 { // only this function changes it
		if err := loadSnapshot(x.snapshotFile, x.restoreRow); err != nil {
			x.log.Warn("the index snapshot is damaged: rows are made again, but some hits and times of use are lost", "error", err)
		}
	}
	err := from.walk(ctx, func(key string, rec *record) error {
		x.addFound(key, rec)
		return nil
	})
	if err != nil {
		return fmt.Errorf("comparing the index with what is stored: %w", err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, s := range x.rows {
		for _, e := range s.byHash {
			if e.generation != x.generation {
				s.removeEntry(e)
				x.changed.Store(true)
			}
		}
	}
	x.complete.Store(true)
	clear(x.deletedKeys)
	return nil
}

// addFound adds the row of an object that reconcile has found. What was saved or
// deleted since it began stays so.
func (x *embeddedIndex) addFound(key string, rec *record) {
	e := newEntry(newIndexRow(key, rec))
	x.mu.Lock()
	defer x.mu.Unlock()
	old := x.findEntry(rec.Remote, key)
	switch {
	case x.deletedKeys[key] || (old != nil && old.generation == x.generation):
	case old != nil && old.sha256 == e.sha256 && old.fetched == e.fetched:
		old.generation = x.generation // nothing has changed that a snapshot would have to save
	default:
		x.putEntry(rec.Remote, e)
	}
}

// saveSnapshot does nothing before reconcile has ended: uses that are only in the old
// snapshot would be lost.
func (x *embeddedIndex) saveSnapshot() error {
	if !x.complete.Load() {
		return nil
	}
	return x.snapshotFile.saveSnapshot()
}

// eachSavedRow calls add with every row as the snapshot has it.
func (x *embeddedIndex) eachSavedRow(add func(v any)) {
	for name := range x.allTotals() {
		_ = x.eachEntry(context.Background(), name, sortKey{}, func(e *indexEntry) bool {
			r := e.toRow(name)
			r.Key = "" // it follows from remote and path
			add(r)
			return true
		})
	}
}

// restoreRow takes a row of the snapshot into the index. A row that was saved since the
// start stays, and the hits of both are added up.
func (x *embeddedIndex) restoreRow(r indexRow) {
	r.Key = storageKey(r.Remote, r.Path)
	e := newEntry(r)
	x.mu.Lock()
	defer x.mu.Unlock()
	s := x.rowsOf(r.Remote)
	if newer := s.byHash[e.hash]; newer != nil {
		newer.hits.Add(e.hits.Load())
		newer.lastAccess.Store(max(newer.lastAccess.Load(), e.lastAccess.Load()))
	} else if !x.deletedKeys[r.Key] {
		s.insertEntry(e)
	}
}
