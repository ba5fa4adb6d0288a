// store_index.go: the embedded index, a table in memory that lists what is
// stored, and the framed file format that its snapshot and the freshness log
// share. Who outgrows it (about 200 bytes a file) has PostgreSQL.

package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"
	"unique"
)

const (
	indexFile = ".index"
	// indexMagic is the snapshot's first frame; another version is not read.
	indexMagic = "artifactapi index 1"
	// chunkRows bounds what an insertion moves: 4 KiB of pointers.
	chunkRows = 512
	// batchRows bounds how long a scan keeps writers waiting.
	batchRows = 1024
	// maxLate bounds the uses that are kept for rows which are not loaded yet.
	maxLate = 100_000
	// maxFrame is beyond any row or mark; a larger length is damage.
	maxFrame = 1 << 20
)

var _ index = (*embeddedIndex)(nil)

// indexEntry is a row as memory holds it; the key is made of the spelling.
type indexEntry struct {
	sortKey
	spelling                  string
	sha256                    [32]byte
	size, hits, fetched, last int64 // times in ns
	kind                      unique.Handle[typeAndClass]
	generation                uint32 // the load that saw it, see embeddedIndex.load
}

// typeAndClass is what few different values of are shared by many rows.
type typeAndClass struct {
	contentType string
	class       class
}

// sortKey is where a row stands in its remote: by decoded path, then by key, of
// which the hash is the part that differs.
type sortKey struct {
	path string
	hash uint64
}

func (p sortKey) compareTo(q sortKey) int {
	return cmp.Or(strings.Compare(p.path, q.path), cmp.Compare(p.hash, q.hash))
}

// successor is the first place that may follow p.
func (p sortKey) successor() sortKey {
	if p.hash == 1<<64-1 {
		return sortKey{p.path + "\x00", 0}
	}
	return sortKey{p.path, p.hash + 1}
}

// keyHash is the hash in a storage key.
func keyHash(key string) (uint64, bool) {
	_, rest, _ := strings.Cut(key, "/")
	digits, _, _ := strings.Cut(rest, "/")
	n, err := strconv.ParseUint(digits, 16, 64)
	return n, err == nil && len(digits) == 16
}

func (e *indexEntry) toRow(remote string) indexRow {
	k := e.kind.Value()
	return indexRow{
		Remote: remote, Path: e.spelling, Key: storageKey(remote, e.spelling), SHA256: hex.EncodeToString(e.sha256[:]),
		ContentType: k.contentType, Class: k.class, Size: e.size, Hits: e.hits,
		Fetched: time.Unix(0, e.fetched).UTC(), LastAccess: time.Unix(0, e.last).UTC(),
	}
}

// newEntry takes a row apart. A row that was never used was used when it was
// fetched.
func newEntry(r indexRow) (*indexEntry, error) {
	hash, ok := keyHash(r.Key)
	sum, err := hex.DecodeString(r.SHA256)
	if !ok || err != nil || len(sum) != 32 {
		return nil, fmt.Errorf("indexing %q: bad key or sha256 %q", r.Key, r.SHA256)
	}
	if r.LastAccess.Before(r.Fetched) {
		r.LastAccess = r.Fetched
	}
	e := &indexEntry{
		spelling: r.Path, sha256: [32]byte(sum), size: r.Size, hits: r.Hits,
		fetched: r.Fetched.UnixNano(), last: r.LastAccess.UnixNano(),
		kind: unique.Make(typeAndClass{r.ContentType, r.Class}),
	}
	e.sortKey = sortKey{decodePath(r.Path), hash}
	if e.path == e.spelling {
		e.path = e.spelling // one string in memory, not two
	}
	return e, nil
}

// remoteRows has the rows of one remote, in order, in chunks.
type remoteRows struct {
	chunks [][]*indexEntry // none is empty
	byHash map[uint64]*indexEntry
	bytes  int64
}

// search is the first position at or behind p.
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
		s.chunks[c] = slices.Delete(rows, half, len(rows)) // Delete clears the rest
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

// putEntry inserts e or replaces the row with its hash, whose use is kept.
func (s *remoteRows) putEntry(e *indexEntry) {
	if old := s.byHash[e.hash]; old != nil {
		e.hits, e.last = old.hits, max(old.last, e.last)
		s.removeEntry(old)
	}
	s.insertEntry(e)
}

// embeddedIndex implements index in memory, with a snapshot in DATA_DIR. It is
// complete once load has compared it with what is stored.
type embeddedIndex struct {
	*fileWriter
	dir string
	log *slog.Logger

	saving sync.Mutex // one flush at a time; taken before mu

	mu          sync.RWMutex // guards the rest; nothing waits for I/O under it
	rows        map[string]*remoteRows
	complete    bool
	dirty       bool
	read        bool   // the snapshot was loaded
	generation  uint32 // of the load that runs or ran last
	deletedKeys map[string]bool
	late        []fileUse
}

func newEmbeddedIndex(dir string, log *slog.Logger) *embeddedIndex {
	return &embeddedIndex{fileWriter: newDisk(), dir: dir, log: log, rows: map[string]*remoteRows{}, deletedKeys: map[string]bool{}}
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
	x.dirty = true
	return nil
}

// rowsOf is a remote's, made when it is the first row's. mu is held.
func (x *embeddedIndex) rowsOf(remote string) *remoteRows {
	s := x.rows[remote]
	if s == nil {
		s = &remoteRows{byHash: map[uint64]*indexEntry{}}
		x.rows[remote] = s
	}
	return s
}

// delete: see index. A row that is not there is no error.
func (x *embeddedIndex) delete(ctx context.Context, remote, key string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.complete {
		x.deletedKeys[key] = true
	}
	if e := x.findEntry(remote, key); e != nil {
		x.rows[remote].removeEntry(e)
		x.dirty = true
	}
	return nil
}

// findEntry is the entry of a key, or nil. mu is held.
func (x *embeddedIndex) findEntry(remote, key string) *indexEntry {
	s := x.rows[remote]
	hash, ok := keyHash(key)
	if s == nil || !ok {
		return nil
	}
	return s.byHash[hash]
}

// countUses: see index. While rows are loaded, uses of unknown ones are kept.
func (x *embeddedIndex) countUses(ctx context.Context, batch []fileUse) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, t := range batch {
		switch e := x.findEntry(t.remote, t.key); {
		case e != nil:
			e.hits += t.hits
			e.last = max(e.last, t.last.UnixNano())
			x.dirty = true
		case !x.complete && len(x.late) < maxLate:
			x.late = append(x.late, t)
		}
	}
	return nil
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
	p := indexPage{complete: x.isComplete()}
	for i := range min(len(found), q.limit) {
		p.rows = append(p.rows, found[i].toRow(q.remote))
	}
	if len(found) > q.limit {
		p.next = nextPage(found[q.limit-1].path, p.rows[q.limit-1].Key, found[q.limit].path)
	}
	return p, err
}

// nextPage is the token behind a row: its path, and its key only when the
// following row has the same path, so that tokens can be written by hand.
func nextPage(path, key, following string) string {
	if path == following {
		return path + "\n" + key
	}
	return path
}

// firstSortKey is the first place of a page. Paths hold no control characters, so
// that a token has one meaning.
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

func (x *embeddedIndex) isComplete() bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.complete
}

// eachEntry calls f with a remote's entries in order from a place on, until f says
// no. f runs under mu, of which each lets go now and then.
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

// remoteNames are the remotes that have rows.
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

// agedEntry is an entry in the order of eviction.
type agedEntry struct {
	indexEntry
	remote string
}

func (a *agedEntry) compareTo(b *agedEntry) int {
	return cmp.Or(cmp.Compare(a.last, b.last), strings.Compare(a.remote, b.remote), cmp.Compare(a.hash, b.hash))
}

// oldestEntries keeps the n first of the entries it is given, behind one.
type oldestEntries struct {
	n     int
	after *agedEntry // nil: from the first
	kept  []agedEntry
	full  bool // n were found: what is behind kept[n-1] is of no interest
}

func (k *oldestEntries) addEntry(a agedEntry) {
	if k.after != nil && a.compareTo(k.after) <= 0 || k.full && a.compareTo(&k.kept[k.n-1]) > 0 {
		return
	}
	if k.kept = append(k.kept, a); len(k.kept) >= 2*k.n {
		k.trim()
	}
}

func (k *oldestEntries) trim() {
	slices.SortFunc(k.kept, func(a, b agedEntry) int { return a.compareTo(&b) })
	k.full = len(k.kept) >= k.n
	k.kept = k.kept[:min(len(k.kept), k.n)]
}

// oldestPage is a page by last access. It looks at every row of the remotes asked
// for and keeps twice the page at most. A token is a time and a key.
func (x *embeddedIndex) oldestPage(ctx context.Context, q pageQuery) (indexPage, error) {
	names := []string{q.remote}
	if q.remote == "" {
		names = x.remoteNames()
	}
	first := oldestEntries{n: q.limit + 1, after: oldestAfter(q.after)} // one more, as in page
	for _, name := range names {
		err := x.eachEntry(ctx, name, sortKey{q.prefix, 0}, func(e *indexEntry) bool {
			more := strings.HasPrefix(e.path, q.prefix)
			if more && q.matchesPattern(e.path) {
				first.addEntry(agedEntry{*e, name})
			}
			return more
		})
		if err != nil {
			return indexPage{}, err
		}
	}
	first.trim()
	p := indexPage{complete: x.isComplete()}
	for _, a := range first.kept[:min(len(first.kept), q.limit)] {
		p.rows = append(p.rows, a.toRow(a.remote))
	}
	if len(first.kept) > q.limit {
		p.next = fmt.Sprintf("%d\n%s", first.kept[q.limit-1].last, p.rows[q.limit-1].Key)
	}
	return p, nil
}

// oldestAfter reads a token of oldest; nil begins.
func oldestAfter(token string) *agedEntry {
	at, key, _ := strings.Cut(token, "\n")
	last, err := strconv.ParseInt(at, 10, 64)
	hash, ok := keyHash(key)
	if err != nil || !ok {
		return nil
	}
	remote, _, _ := strings.Cut(key, "/")
	return &agedEntry{indexEntry{sortKey: sortKey{hash: hash}, last: last}, remote}
}

// reconcile fills the index from the snapshot and then compares it with what is
// stored: rows without an object go, objects without a row come. Saves and
// deletes that arrive meanwhile win. After an error it may be called again; it
// runs once at a time.
func (x *embeddedIndex) reconcile(ctx context.Context, from objects) error {
	x.mu.Lock()
	x.generation++
	x.complete = false
	read := x.read
	x.mu.Unlock()
	if !read {
		x.readSnapshot()
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

// addFound takes a stored record into the index, unless the row is newer.
func (x *embeddedIndex) addFound(key string, rec *record) {
	e, err := newEntry(newIndexRow(key, rec))
	if err != nil {
		x.log.Warn("stored file is not indexed", "err", err)
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	old := x.findEntry(rec.Remote, key)
	if x.deletedKeys[key] || old != nil && old.generation == x.generation {
		return
	}
	e.generation = x.generation
	if old != nil && old.sha256 == e.sha256 && old.fetched == e.fetched && old.sortKey == e.sortKey {
		old.generation = x.generation
		return
	}
	x.rowsOf(rec.Remote).putEntry(e)
	x.dirty = true
}

// finishReconcile drops what the walk did not see and makes the index complete.
func (x *embeddedIndex) finishReconcile() {
	x.mu.Lock()
	for _, s := range x.rows {
		for _, e := range s.notSeenBy(x.generation) {
			s.removeEntry(e)
			x.dirty = true
		}
	}
	late := x.late
	x.complete, x.late = true, nil
	clear(x.deletedKeys)
	x.mu.Unlock()
	x.countUses(context.Background(), late)
}

func (s *remoteRows) notSeenBy(gen uint32) (es []*indexEntry) {
	for _, e := range s.byHash {
		if e.generation != gen {
			es = append(es, e)
		}
	}
	return es
}

// saveSnapshot writes the snapshot if there is news. A snapshot made before load is
// done would lose the uses that are still to be loaded.
func (x *embeddedIndex) saveSnapshot() error {
	x.saving.Lock()
	defer x.saving.Unlock()
	x.mu.Lock()
	due := x.dirty && x.complete
	if due {
		x.dirty = false
	}
	x.mu.Unlock()
	if !due {
		return nil
	}
	err := os.MkdirAll(x.dir, 0o755)
	if err == nil {
		err = x.replaceFile(x.dir+"/"+indexFile, x.writeRows)
	}
	if err != nil {
		x.mu.Lock()
		x.dirty = true
		x.mu.Unlock()
	}
	return storeError("saving the index", err)
}

// Close saves what is new.
func (x *embeddedIndex) Close() error { return x.saveSnapshot() }

func (x *embeddedIndex) writeRows(w io.Writer) error {
	b := bufio.NewWriter(w) // keeps its first error until Flush
	b.Write(appendFrame(nil, []byte(indexMagic)))
	var payload, frame []byte
	for _, name := range x.remoteNames() {
		x.eachEntry(context.Background(), name, sortKey{}, func(e *indexEntry) bool {
			payload = e.appendTo(payload[:0], name)
			frame = appendFrame(frame[:0], payload)
			b.Write(frame)
			return true
		})
	}
	return b.Flush()
}

// readSnapshot takes the rows of the snapshot that are not known. What is
// damaged is ignored: the walk that follows tells it again, but for its uses.
func (x *embeddedIndex) readSnapshot() {
	f, err := os.Open(x.dir + "/" + indexFile)
	if err == nil {
		defer f.Close()
		err = readFrames(f, indexMagic, x.restoreEntry)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		x.log.Warn("index snapshot is not read to its end", "err", err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.read = true
}

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
	if newer := s.byHash[e.hash]; newer != nil { // saved since we began
		newer.hits += e.hits
		newer.last = max(newer.last, e.last)
		return nil
	}
	s.insertEntry(e)
	return nil
}

func (e *indexEntry) appendTo(b []byte, remote string) []byte {
	k := e.kind.Value()
	for _, s := range []string{remote, e.spelling, string(e.sha256[:]), k.contentType, string(k.class)} {
		b = appendString(b, s)
	}
	for _, n := range []int64{e.size, e.hits, e.fetched, e.last} {
		b = binary.AppendVarint(b, n)
	}
	return b
}

// decodeEntry is nil for what append did not write.
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
