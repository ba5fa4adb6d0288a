// store_index.go: the embedded index, a sorted table in memory with a row for each
// stored object. It takes about 200 bytes of memory an object; a larger cache uses
// PostgreSQL.

package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
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
	indexFile  = ".index"
	indexMagic = "artifactapi index 1"
	// chunkRows bounds the pointers that an insertion moves: 4 KiB.
	chunkRows = 512
	// batchRows bounds how long a scan makes writers wait: about 0.1 ms.
	batchRows = 1024
)

var _ index = (*embeddedIndex)(nil)

// indexEntry is a row as it is held in memory. Its key is derived from remote and
// spelling.
type indexEntry struct {
	sortKey
	spelling                        string
	sha256                          [32]byte
	size, hits, fetched, lastAccess int64 // times in ns since 1970
	typeAndClass                    unique.Handle[typeAndClass]
	generation                      uint32 // the last reconcile that found the object
}

// typeAndClass holds the two values that many rows share, so that each combination
// is in memory once.
type typeAndClass struct {
	contentType string
	class       class
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

// successor is the least position behind p.
func (p sortKey) successor() sortKey {
	if p.hash == 1<<64-1 {
		return sortKey{p.path + "\x00", 0}
	}
	return sortKey{p.path, p.hash + 1}
}

// keyHash returns the path hash in a storage key.
func keyHash(key string) (uint64, bool) {
	_, rest, _ := strings.Cut(key, "/")
	digits, _, _ := strings.Cut(rest, "/")
	n, err := strconv.ParseUint(digits, 16, 64)
	return n, err == nil && len(digits) == 16
}

func (e *indexEntry) toRow(remote string) indexRow {
	k := e.typeAndClass.Value()
	return indexRow{
		Remote: remote, Path: e.spelling, Key: storageKey(remote, e.spelling), SHA256: hex.EncodeToString(e.sha256[:]),
		ContentType: k.contentType, Class: k.class, Size: e.size, Hits: e.hits,
		Fetched: time.Unix(0, e.fetched).UTC(), LastAccess: time.Unix(0, e.lastAccess).UTC(),
	}
}

// newEntry is the inverse of toRow. The last access of a row is at least the time
// of its fetch.
func newEntry(r indexRow) (*indexEntry, error) {
	hash, ok := keyHash(r.Key)
	sum, err := hex.DecodeString(r.SHA256)
	if !ok || err != nil || len(sum) != 32 {
		return nil, fmt.Errorf("indexing %q: the key or the sha256 %q is malformed", r.Key, r.SHA256)
	}
	if r.LastAccess.Before(r.Fetched) {
		r.LastAccess = r.Fetched
	}
	e := &indexEntry{
		spelling: r.Path, sha256: [32]byte(sum), size: r.Size, hits: r.Hits,
		fetched: r.Fetched.UnixNano(), lastAccess: r.LastAccess.UnixNano(),
		typeAndClass: unique.Make(typeAndClass{r.ContentType, r.Class}),
	}
	e.sortKey = sortKey{decodePath(r.Path), hash}
	if e.path == e.spelling {
		e.path = e.spelling // one string in memory, not two
	}
	return e, nil
}

// remoteRows holds the rows of one remote in order, cut into chunks.
type remoteRows struct {
	chunks [][]*indexEntry // no chunk is empty
	byHash map[uint64]*indexEntry
	bytes  int64 // of all objects
}

// search finds the first row at or behind p: chunk and place in it.
func (s *remoteRows) search(p sortKey) (chunk, i int) {
	chunk = sort.Search(len(s.chunks), func(n int) bool {
		c := s.chunks[n]
		return c[len(c)-1].compareTo(p) >= 0
	})
	if chunk == len(s.chunks) {
		return chunk, 0
	}
	i, _ = slices.BinarySearchFunc(s.chunks[chunk], p, func(e *indexEntry, p sortKey) int { return e.compareTo(p) })
	return chunk, i
}

func (s *remoteRows) insertEntry(e *indexEntry) {
	s.byHash[e.hash] = e
	s.bytes += e.size
	c, i := s.search(e.sortKey)
	if c == len(s.chunks) {
		if c == 0 {
			s.chunks = append(s.chunks, []*indexEntry{e})
			return
		}
		c--
		i = len(s.chunks[c])
	}
	s.chunks[c] = slices.Insert(s.chunks[c], i, e)
	if rows := s.chunks[c]; len(rows) > chunkRows {
		half := len(rows) / 2
		s.chunks = slices.Insert(s.chunks, c+1, slices.Clone(rows[half:]))
		s.chunks[c] = slices.Delete(rows, half, len(rows))
	}
}

func (s *remoteRows) removeEntry(e *indexEntry) {
	delete(s.byHash, e.hash)
	s.bytes -= e.size
	c, i := s.search(e.sortKey)
	s.chunks[c] = slices.Delete(s.chunks[c], i, i+1)
	if len(s.chunks[c]) == 0 {
		s.chunks = slices.Delete(s.chunks, c, c+1)
	}
}

// putEntry inserts e or replaces the row with its hash; hits and last access of
// the old row stay.
func (s *remoteRows) putEntry(e *indexEntry) {
	if old := s.byHash[e.hash]; old != nil {
		e.hits, e.lastAccess = old.hits, max(old.lastAccess, e.lastAccess)
		s.removeEntry(old)
	}
	s.insertEntry(e)
}

// embeddedIndex implements index in memory, with a snapshot in DATA_DIR. It is
// complete once reconcile has compared it with what is stored. Rows of objects that
// other processes store in the same DATA_DIR come with their first use here.
type embeddedIndex struct {
	snapshotFile
	log *slog.Logger

	complete     atomic.Bool // changed under mu
	snapshotRead bool        // reconcile's alone

	mu          sync.RWMutex // guards the fields below; never held across I/O
	rows        map[string]*remoteRows
	generation  uint32          // counts calls of reconcile
	deletedKeys map[string]bool // deleted while reconcile runs
}

func newEmbeddedIndex(dir string, log *slog.Logger) *embeddedIndex {
	return &embeddedIndex{log: log, rows: map[string]*remoteRows{}, deletedKeys: map[string]bool{},
		snapshotFile: snapshotFile{fileWriter: newDisk(), name: dir + "/" + indexFile, magic: indexMagic}}
}

// saveRow: see index.
func (x *embeddedIndex) saveRow(ctx context.Context, r indexRow) error {
	e, err := newEntry(r)
	if err = cmp.Or(ctx.Err(), err); err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	e.generation = x.generation
	delete(x.deletedKeys, r.Key)
	x.rowsOf(r.Remote).putEntry(e)
	x.changed.Store(true)
	return nil
}

// rowsOf returns the rows of a remote, and makes them for its first row. mu is held.
func (x *embeddedIndex) rowsOf(remote string) *remoteRows {
	s := x.rows[remote]
	if s == nil {
		s = &remoteRows{byHash: map[uint64]*indexEntry{}}
		x.rows[remote] = s
	}
	return s
}

// delete: see index.
func (x *embeddedIndex) delete(ctx context.Context, remote, key string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
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

// findEntry returns the entry of a key, or nil. mu is held.
func (x *embeddedIndex) findEntry(remote, key string) *indexEntry {
	s := x.rows[remote]
	hash, ok := keyHash(key)
	if s == nil || !ok {
		return nil
	}
	return s.byHash[hash]
}

// countUses: see index.
func (x *embeddedIndex) countUses(ctx context.Context, batch []fileUse) (unknown []fileUse, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, use := range batch {
		e := x.findEntry(use.remote, use.key)
		if e == nil {
			unknown = append(unknown, use)
			continue
		}
		e.hits += use.hits
		e.lastAccess = max(e.lastAccess, use.last.UnixNano())
		x.changed.Store(true)
	}
	return unknown, nil
}

// totals: see index.
func (x *embeddedIndex) totals(ctx context.Context) (map[string]remoteTotal, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	all := map[string]remoteTotal{}
	for name, s := range x.rows {
		if len(s.byHash) > 0 {
			all[name] = remoteTotal{int64(len(s.byHash)), s.bytes}
		}
	}
	return all, ctx.Err()
}

// listPage: see index.
func (x *embeddedIndex) listPage(ctx context.Context, q pageQuery) (indexPage, error) {
	q.limit = max(q.limit, 1)
	if q.oldest {
		return x.oldestPage(ctx, q)
	}
	var found []indexEntry
	err := x.eachEntry(ctx, q.remote, firstSortKey(q), func(e *indexEntry) bool {
		if !strings.HasPrefix(e.path, q.prefix) {
			return false
		}
		if q.matchesPattern(e.path) {
			found = append(found, *e)
		}
		return len(found) <= q.limit // one more, to see whether there is a next page
	})
	p := indexPage{complete: x.complete.Load()}
	for i := range min(len(found), q.limit) {
		p.rows = append(p.rows, found[i].toRow(q.remote))
	}
	if len(found) > q.limit {
		p.next = nextPage(found[q.limit-1].path, p.rows[q.limit-1].Key, found[q.limit].path)
	}
	return p, err
}

// nextPage returns the token of the page that begins behind the row of path and
// key: its path, and its key only if the following row has the same path. So people
// can write tokens by hand.
func nextPage(path, key, following string) string {
	if path == following {
		return path + "\n" + key
	}
	return path
}

// firstSortKey returns the position at which a page begins. A token with a line
// break holds a key too: no path has a line break.
func firstSortKey(q pageQuery) sortKey {
	if q.after == "" {
		return sortKey{q.prefix, 0}
	}
	path, key, variant := strings.Cut(q.after, "\n")
	start := sortKey{path + "\x00", 0}
	if hash, ok := keyHash(key); variant && ok {
		start = sortKey{path, hash}.successor()
	}
	if start.path < q.prefix {
		return sortKey{q.prefix, 0}
	}
	return start
}

func (q *pageQuery) matchesPattern(path string) bool {
	return q.pattern == nil || q.pattern.MatchString(path)
}

// eachEntry calls f with the entries of a remote in order, beginning at from, until
// f returns false. f runs under mu, which is released now and then.
func (x *embeddedIndex) eachEntry(ctx context.Context, remote string, from sortKey, f func(*indexEntry) bool) error {
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return err
		}
		from, more = x.eachInBatch(remote, from, f)
	}
	return nil
}

func (x *embeddedIndex) eachInBatch(remote string, from sortKey, f func(*indexEntry) bool) (next sortKey, more bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	s := x.rows[remote]
	if s == nil {
		return sortKey{}, false
	}
	c, i := s.search(from)
	for range batchRows {
		if c == len(s.chunks) {
			return sortKey{}, false
		}
		e := s.chunks[c][i]
		if !f(e) {
			return sortKey{}, false
		}
		next = e.successor()
		if i++; i == len(s.chunks[c]) {
			c, i = c+1, 0
		}
	}
	return next, true
}

// remoteNames lists the remotes that have rows.
func (x *embeddedIndex) remoteNames() []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var names []string
	for name, s := range x.rows {
		if len(s.chunks) > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// evictionEntry is an entry in the order of eviction: by last access.
type evictionEntry struct {
	indexEntry
	remote string
}

func (a *evictionEntry) compareTo(b *evictionEntry) int {
	return cmp.Or(cmp.Compare(a.lastAccess, b.lastAccess), strings.Compare(a.remote, b.remote), cmp.Compare(a.hash, b.hash))
}

// oldestEntries collects the n oldest entries behind after. It holds 2n at most.
type oldestEntries struct {
	n     int
	after *evictionEntry // nil: from the beginning
	found []evictionEntry
	full  bool // the first n of found are sorted: an entry behind them is too young
}

func (k *oldestEntries) addEntry(a evictionEntry) {
	isBefore := k.after != nil && a.compareTo(k.after) <= 0
	isTooYoung := k.full && a.compareTo(&k.found[k.n-1]) > 0
	if isBefore || isTooYoung {
		return
	}
	if k.found = append(k.found, a); len(k.found) >= 2*k.n {
		k.trim()
	}
}

func (k *oldestEntries) trim() {
	slices.SortFunc(k.found, func(a, b evictionEntry) int { return a.compareTo(&b) })
	k.full = len(k.found) >= k.n
	k.found = k.found[:min(len(k.found), k.n)]
}

// oldestPage is listPage by last access. It reads every row of the remotes that q
// asks for. A token is a last access in ns and a key.
func (x *embeddedIndex) oldestPage(ctx context.Context, q pageQuery) (indexPage, error) {
	names := []string{q.remote}
	if q.remote == "" {
		names = x.remoteNames()
	}
	first := oldestEntries{n: q.limit + 1, after: oldestAfter(q.after)} // one more, as in listPage
	for _, name := range names {
		err := x.eachEntry(ctx, name, sortKey{q.prefix, 0}, func(e *indexEntry) bool {
			more := strings.HasPrefix(e.path, q.prefix)
			if more && q.matchesPattern(e.path) {
				first.addEntry(evictionEntry{*e, name})
			}
			return more
		})
		if err != nil {
			return indexPage{}, err
		}
	}
	first.trim()
	p := indexPage{complete: x.complete.Load()}
	for _, a := range first.found[:min(len(first.found), q.limit)] {
		p.rows = append(p.rows, a.toRow(a.remote))
	}
	if len(first.found) > q.limit {
		p.next = fmt.Sprintf("%d\n%s", first.found[q.limit-1].lastAccess, p.rows[q.limit-1].Key)
	}
	return p, nil
}

// oldestAfter reads a token of oldestPage. nil stands for the beginning.
func oldestAfter(token string) *evictionEntry {
	at, key, _ := strings.Cut(token, "\n")
	last, err := strconv.ParseInt(at, 10, 64)
	hash, ok := keyHash(key)
	if err != nil || !ok {
		return nil
	}
	remote, _, _ := strings.Cut(key, "/")
	return &evictionEntry{indexEntry{sortKey: sortKey{hash: hash}, lastAccess: last}, remote}
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
	if !x.snapshotRead {
		x.snapshotRead = true
		if err := x.load(x.restoreEntry); err != nil {
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
	x.finishReconcile()
	return nil
}

// addFound adds the row of an object that reconcile has found. A row that was saved
// meanwhile stays.
func (x *embeddedIndex) addFound(key string, rec *record) {
	e, err := newEntry(newIndexRow(key, rec))
	if err != nil {
		x.log.Warn("a stored file is not indexed", "error", err)
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	old := x.findEntry(rec.Remote, key)
	if x.deletedKeys[key] || (old != nil && old.generation == x.generation) {
		return
	}
	e.generation = x.generation
	if old != nil && old.sha256 == e.sha256 && old.fetched == e.fetched && old.sortKey == e.sortKey {
		old.generation = x.generation
		return
	}
	x.rowsOf(rec.Remote).putEntry(e)
	x.changed.Store(true)
}

// finishReconcile removes the rows whose object was not found, and makes the index
// complete.
func (x *embeddedIndex) finishReconcile() {
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
}

// saveSnapshot writes the snapshot if a row has changed since the last one. It does
// nothing before reconcile has ended: uses that are only in the old snapshot would
// be lost.
func (x *embeddedIndex) saveSnapshot() error {
	if !x.complete.Load() {
		return nil
	}
	return x.save(func(add func(payload []byte)) {
		var batch []indexEntry // mu is not held while the disk is slow
		for _, name := range x.remoteNames() {
			for from, more := (sortKey{}), true; more; batch = batch[:0] {
				from, more = x.eachInBatch(name, from, func(e *indexEntry) bool {
					batch = append(batch, *e)
					return true
				})
				for i := range batch {
					add(batch[i].appendTo(nil, name))
				}
			}
		}
	})
}

// Close saves the snapshot.
func (x *embeddedIndex) Close() error { return x.saveSnapshot() }

// restoreEntry takes a row of the snapshot into the index. A row that was saved
// since the start stays, and the hits of both are added up.
func (x *embeddedIndex) restoreEntry(payload []byte) error {
	remote, e := decodeEntry(payload)
	if e == nil {
		return errDamaged
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.deletedKeys[storageKey(remote, e.spelling)] {
		return nil
	}
	s := x.rowsOf(remote)
	if newer := s.byHash[e.hash]; newer != nil {
		newer.hits += e.hits
		newer.lastAccess = max(newer.lastAccess, e.lastAccess)
		return nil
	}
	s.insertEntry(e)
	return nil
}

func (e *indexEntry) appendTo(b []byte, remote string) []byte {
	k := e.typeAndClass.Value()
	for _, s := range []string{remote, e.spelling, string(e.sha256[:]), k.contentType, string(k.class)} {
		b = appendString(b, s)
	}
	for _, n := range []int64{e.size, e.hits, e.fetched, e.lastAccess} {
		b = binary.AppendVarint(b, n)
	}
	return b
}

// decodeEntry reads what appendTo wrote. It returns nil for anything else.
func decodeEntry(payload []byte) (remote string, e *indexEntry) {
	p := fieldReader{b: payload}
	r := indexRow{Remote: p.readString(), Path: p.readString(), SHA256: hex.EncodeToString([]byte(p.readString())), ContentType: p.readString()}
	r.Class, r.Size, r.Hits = class(p.readString()), p.readInt(), p.readInt()
	r.Fetched, r.LastAccess = time.Unix(0, p.readInt()), time.Unix(0, p.readInt())
	if p.bad || len(p.b) > 0 {
		return "", nil
	}
	r.Key = storageKey(r.Remote, r.Path)
	e, err := newEntry(r)
	if err != nil {
		return "", nil
	}
	return r.Remote, e
}
