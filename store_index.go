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

// entry is a row as memory holds it; the key is made of the spelling.
type entry struct {
	place
	spelling                  string
	sum                       [32]byte
	size, hits, fetched, last int64 // times in ns
	kind                      unique.Handle[kind]
	gen                       uint32 // the load that saw it, see embeddedIndex.load
}

// kind is what few different values of are shared by many rows.
type kind struct {
	contentType string
	class       class
}

// place is where a row stands in its remote: by decoded path, then by key, of
// which the hash is the part that differs.
type place struct {
	path string
	hash uint64
}

func (p place) compare(q place) int {
	return cmp.Or(strings.Compare(p.path, q.path), cmp.Compare(p.hash, q.hash))
}

// behind is the first place that may follow p.
func (p place) behind() place {
	if p.hash == 1<<64-1 {
		return place{p.path + "\x00", 0}
	}
	return place{p.path, p.hash + 1}
}

// keyHash is the hash in a storage key.
func keyHash(key string) (uint64, bool) {
	_, rest, _ := strings.Cut(key, "/")
	digits, _, _ := strings.Cut(rest, "/")
	n, err := strconv.ParseUint(digits, 16, 64)
	return n, err == nil && len(digits) == 16
}

func (e *entry) row(remote string) indexRow {
	k := e.kind.Value()
	return indexRow{
		Remote: remote, Path: e.spelling, Key: storageKey(remote, e.spelling), SHA256: hex.EncodeToString(e.sum[:]),
		ContentType: k.contentType, Class: k.class, Size: e.size, Hits: e.hits,
		Fetched: time.Unix(0, e.fetched).UTC(), LastAccess: time.Unix(0, e.last).UTC(),
	}
}

// newEntry takes a row apart. A row that was never used was used when it was
// fetched.
func newEntry(r indexRow) (*entry, error) {
	hash, ok := keyHash(r.Key)
	sum, err := hex.DecodeString(r.SHA256)
	if !ok || err != nil || len(sum) != 32 {
		return nil, fmt.Errorf("indexing %q: bad key or sha256 %q", r.Key, r.SHA256)
	}
	if r.LastAccess.Before(r.Fetched) {
		r.LastAccess = r.Fetched
	}
	e := &entry{
		spelling: r.Path, sum: [32]byte(sum), size: r.Size, hits: r.Hits,
		fetched: r.Fetched.UnixNano(), last: r.LastAccess.UnixNano(),
		kind: unique.Make(kind{r.ContentType, r.Class}),
	}
	e.place = place{decodePath(r.Path), hash}
	if e.path == e.spelling {
		e.path = e.spelling // one string in memory, not two
	}
	return e, nil
}

// shelf has the rows of one remote, in order, in chunks.
type shelf struct {
	chunks [][]*entry // none is empty
	byHash map[uint64]*entry
	bytes  int64
}

// seek is the first position at or behind p.
func (s *shelf) seek(p place) (chunk, i int) {
	chunk = sort.Search(len(s.chunks), func(n int) bool {
		c := s.chunks[n]
		return c[len(c)-1].compare(p) >= 0
	})
	if chunk == len(s.chunks) {
		return chunk, 0
	}
	i, _ = slices.BinarySearchFunc(s.chunks[chunk], p, func(e *entry, p place) int { return e.compare(p) })
	return chunk, i
}

func (s *shelf) insert(e *entry) {
	s.byHash[e.hash] = e
	s.bytes += e.size
	c, i := s.seek(e.place)
	if c == len(s.chunks) {
		if c == 0 {
			s.chunks = append(s.chunks, []*entry{e})
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

func (s *shelf) remove(e *entry) {
	delete(s.byHash, e.hash)
	s.bytes -= e.size
	c, i := s.seek(e.place)
	s.chunks[c] = slices.Delete(s.chunks[c], i, i+1)
	if len(s.chunks[c]) == 0 {
		s.chunks = slices.Delete(s.chunks, c, c+1)
	}
}

// set inserts e or replaces the row with its hash, whose use is kept.
func (s *shelf) set(e *entry) {
	if old := s.byHash[e.hash]; old != nil {
		e.hits, e.last = old.hits, max(old.last, e.last)
		s.remove(old)
	}
	s.insert(e)
}

// embeddedIndex implements index in memory, with a snapshot in DATA_DIR. It is
// complete once load has compared it with what is stored.
type embeddedIndex struct {
	*disk
	dir string
	log *slog.Logger

	saving sync.Mutex // one flush at a time; taken before mu

	mu       sync.RWMutex // guards the rest; nothing waits for I/O under it
	shelves  map[string]*shelf
	complete bool
	dirty    bool
	read     bool   // the snapshot was loaded
	gen      uint32 // of the load that runs or ran last
	gone     map[string]bool
	late     []fileUse
}

func newEmbeddedIndex(dir string, log *slog.Logger) *embeddedIndex {
	return &embeddedIndex{disk: newDisk(), dir: dir, log: log, shelves: map[string]*shelf{}, gone: map[string]bool{}}
}

// saveRow: see index.
func (x *embeddedIndex) saveRow(ctx context.Context, r indexRow) error {
	e, err := newEntry(r)
	if err = cmp.Or(ctx.Err(), err); err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	e.gen = x.gen
	delete(x.gone, r.Key)
	x.shelf(r.Remote).set(e)
	x.dirty = true
	return nil
}

// shelf is a remote's, made when it is the first row's. mu is held.
func (x *embeddedIndex) shelf(remote string) *shelf {
	s := x.shelves[remote]
	if s == nil {
		s = &shelf{byHash: map[uint64]*entry{}}
		x.shelves[remote] = s
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
		x.gone[key] = true
	}
	if e := x.find(remote, key); e != nil {
		x.shelves[remote].remove(e)
		x.dirty = true
	}
	return nil
}

// find is the entry of a key, or nil. mu is held.
func (x *embeddedIndex) find(remote, key string) *entry {
	s := x.shelves[remote]
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
		switch e := x.find(t.remote, t.key); {
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
	for name, s := range x.shelves {
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
		return x.oldest(ctx, q)
	}
	var found []entry
	err := x.each(ctx, q.remote, startOf(q), func(e *entry) bool {
		if !strings.HasPrefix(e.path, q.prefix) {
			return false
		}
		if q.matches(e.path) {
			found = append(found, *e)
		}
		return len(found) <= q.limit // one more, to see whether there is a next page
	})
	p := indexPage{complete: x.isComplete()}
	for i := range min(len(found), q.limit) {
		p.rows = append(p.rows, found[i].row(q.remote))
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

// startOf is the first place of a page. Paths hold no control characters, so
// that a token has one meaning.
func startOf(q pageQuery) place {
	if q.after == "" {
		return place{q.prefix, 0}
	}
	path, key, variant := strings.Cut(q.after, "\n")
	start := place{path + "\x00", 0}
	if hash, ok := keyHash(key); variant && ok {
		start = place{path, hash}.behind()
	}
	if start.path < q.prefix {
		return place{q.prefix, 0}
	}
	return start
}

func (q *pageQuery) matches(path string) bool {
	return q.pattern == nil || q.pattern.MatchString(path)
}

func (x *embeddedIndex) isComplete() bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.complete
}

// each calls f with a remote's entries in order from a place on, until f says
// no. f runs under mu, of which each lets go now and then.
func (x *embeddedIndex) each(ctx context.Context, remote string, from place, f func(*entry) bool) error {
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return err
		}
		from, more = x.batch(remote, from, f)
	}
	return nil
}

func (x *embeddedIndex) batch(remote string, from place, f func(*entry) bool) (next place, more bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	s := x.shelves[remote]
	if s == nil {
		return place{}, false
	}
	c, i := s.seek(from)
	for range batchRows {
		if c == len(s.chunks) {
			return place{}, false
		}
		e := s.chunks[c][i]
		if !f(e) {
			return place{}, false
		}
		next = e.behind()
		if i++; i == len(s.chunks[c]) {
			c, i = c+1, 0
		}
	}
	return next, true
}

// names are the remotes that have rows.
func (x *embeddedIndex) names() []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var names []string
	for name, s := range x.shelves {
		if len(s.chunks) > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// aged is an entry in the order of eviction.
type aged struct {
	entry
	remote string
}

func (a *aged) compare(b *aged) int {
	return cmp.Or(cmp.Compare(a.last, b.last), strings.Compare(a.remote, b.remote), cmp.Compare(a.hash, b.hash))
}

// eldest keeps the n first of the entries it is given, behind one.
type eldest struct {
	n     int
	after *aged // nil: from the first
	kept  []aged
	full  bool // n were found: what is behind kept[n-1] is of no interest
}

func (k *eldest) add(a aged) {
	if k.after != nil && a.compare(k.after) <= 0 || k.full && a.compare(&k.kept[k.n-1]) > 0 {
		return
	}
	if k.kept = append(k.kept, a); len(k.kept) >= 2*k.n {
		k.shrink()
	}
}

func (k *eldest) shrink() {
	slices.SortFunc(k.kept, func(a, b aged) int { return a.compare(&b) })
	k.full = len(k.kept) >= k.n
	k.kept = k.kept[:min(len(k.kept), k.n)]
}

// oldest is a page by last access. It looks at every row of the remotes asked
// for and keeps twice the page at most. A token is a time and a key.
func (x *embeddedIndex) oldest(ctx context.Context, q pageQuery) (indexPage, error) {
	names := []string{q.remote}
	if q.remote == "" {
		names = x.names()
	}
	first := eldest{n: q.limit + 1, after: oldestAfter(q.after)} // one more, as in page
	for _, name := range names {
		err := x.each(ctx, name, place{q.prefix, 0}, func(e *entry) bool {
			more := strings.HasPrefix(e.path, q.prefix)
			if more && q.matches(e.path) {
				first.add(aged{*e, name})
			}
			return more
		})
		if err != nil {
			return indexPage{}, err
		}
	}
	first.shrink()
	p := indexPage{complete: x.isComplete()}
	for _, a := range first.kept[:min(len(first.kept), q.limit)] {
		p.rows = append(p.rows, a.row(a.remote))
	}
	if len(first.kept) > q.limit {
		p.next = fmt.Sprintf("%d\n%s", first.kept[q.limit-1].last, p.rows[q.limit-1].Key)
	}
	return p, nil
}

// oldestAfter reads a token of oldest; nil begins.
func oldestAfter(token string) *aged {
	at, key, _ := strings.Cut(token, "\n")
	last, err := strconv.ParseInt(at, 10, 64)
	hash, ok := keyHash(key)
	if err != nil || !ok {
		return nil
	}
	remote, _, _ := strings.Cut(key, "/")
	return &aged{entry{place: place{hash: hash}, last: last}, remote}
}

// load fills the index from the snapshot and then compares it with what is
// stored: rows without an object go, objects without a row come. Saves and
// deletes that arrive meanwhile win. After an error it may be called again; it
// runs once at a time.
func (x *embeddedIndex) load(ctx context.Context, from objects) error {
	x.mu.Lock()
	x.gen++
	x.complete = false
	read := x.read
	x.mu.Unlock()
	if !read {
		x.readSnapshot()
	}
	err := from.walk(ctx, func(key string, rec *record) error {
		x.found(key, rec)
		return nil
	})
	if err != nil {
		return fmt.Errorf("comparing the index with what is stored: %w", err)
	}
	x.finish()
	return nil
}

// found takes a stored record into the index, unless the row is newer.
func (x *embeddedIndex) found(key string, rec *record) {
	e, err := newEntry(newIndexRow(key, rec))
	if err != nil {
		x.log.Warn("stored file is not indexed", "err", err)
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	old := x.find(rec.Remote, key)
	if x.gone[key] || old != nil && old.gen == x.gen {
		return
	}
	e.gen = x.gen
	if old != nil && old.sum == e.sum && old.fetched == e.fetched && old.place == e.place {
		old.gen = x.gen
		return
	}
	x.shelf(rec.Remote).set(e)
	x.dirty = true
}

// finish drops what the walk did not see and makes the index complete.
func (x *embeddedIndex) finish() {
	x.mu.Lock()
	for _, s := range x.shelves {
		for _, e := range s.unseen(x.gen) {
			s.remove(e)
			x.dirty = true
		}
	}
	late := x.late
	x.complete, x.late = true, nil
	clear(x.gone)
	x.mu.Unlock()
	x.countUses(context.Background(), late)
}

func (s *shelf) unseen(gen uint32) (es []*entry) {
	for _, e := range s.byHash {
		if e.gen != gen {
			es = append(es, e)
		}
	}
	return es
}

// flush writes the snapshot if there is news. A snapshot made before load is
// done would lose the uses that are still to be loaded.
func (x *embeddedIndex) flush() error {
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
		err = x.replace(x.dir+"/"+indexFile, x.writeRows)
	}
	if err != nil {
		x.mu.Lock()
		x.dirty = true
		x.mu.Unlock()
	}
	return storeError("saving the index", err)
}

// close saves what is new.
func (x *embeddedIndex) close() error { return x.flush() }

func (x *embeddedIndex) writeRows(w io.Writer) error {
	b := bufio.NewWriter(w) // keeps its first error until Flush
	b.Write(appendFrame(nil, []byte(indexMagic)))
	var payload, frame []byte
	for _, name := range x.names() {
		x.each(context.Background(), name, place{}, func(e *entry) bool {
			payload = e.append(payload[:0], name)
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
		err = readFrames(f, indexMagic, x.restore)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		x.log.Warn("index snapshot is not read to its end", "err", err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.read = true
}

func (x *embeddedIndex) restore(payload []byte) error {
	remote, e := decodeEntry(payload)
	if e == nil {
		return errDamaged
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.gone[storageKey(remote, e.spelling)] {
		return nil
	}
	s := x.shelf(remote)
	if newer := s.byHash[e.hash]; newer != nil { // saved since we began
		newer.hits += e.hits
		newer.last = max(newer.last, e.last)
		return nil
	}
	s.insert(e)
	return nil
}

func (e *entry) append(b []byte, remote string) []byte {
	k := e.kind.Value()
	for _, s := range []string{remote, e.spelling, string(e.sum[:]), k.contentType, string(k.class)} {
		b = appendString(b, s)
	}
	for _, n := range []int64{e.size, e.hits, e.fetched, e.last} {
		b = binary.AppendVarint(b, n)
	}
	return b
}

// decodeEntry is nil for what append did not write.
func decodeEntry(payload []byte) (remote string, e *entry) {
	p := fields{b: payload}
	r := indexRow{Remote: p.str(), Path: p.str(), SHA256: hex.EncodeToString([]byte(p.str())), ContentType: p.str()}
	r.Class, r.Size, r.Hits = class(p.str()), p.num(), p.num()
	r.Fetched, r.LastAccess = time.Unix(0, p.num()), time.Unix(0, p.num())
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
