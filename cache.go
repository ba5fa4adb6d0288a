// cache.go: the contracts of the stores, and the decision for one file: serve the
// stored copy, ask whether it is still good, fill, or serve it stale. The fill itself is
// in fill.go.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// record describes one stored body and is stored with it. Key and source URL are not
// in it: they follow from remote and path.
type record struct {
	Remote       string    `json:"r"`
	Path         string    `json:"p"` // upstream spelling, with its query
	Size         int64     `json:"n"`
	SHA256       string    `json:"s"` // hex
	Class        class     `json:"c"`
	ContentType  string    `json:"t,omitempty"` // as upstream said
	Encoding     string    `json:"e,omitempty"` // Content-Encoding
	ETag         string    `json:"g,omitempty"` // upstream's, for revalidation
	LastModified string    `json:"m,omitempty"` // upstream's, for revalidation
	Modified     time.Time `json:"u"`           // Last-Modified for clients: it stays when a refill brings the same bytes
	Fetched      time.Time `json:"f"`
	Digest       string    `json:"d,omitempty"` // Docker-Content-Digest
	Link         string    `json:"l,omitempty"` // below /v2/
	Filters      string    `json:"o,omitempty"` // OCI-Filters-Applied
	Links        string    `json:"k,omitempty"` // the table that the links were rewritten by
	Negative     bool      `json:"v,omitempty"` // it says that there is nothing: negative_ttl rules how long
	IsPage       bool      `json:"h,omitempty"` // in the place of an archive, and so never stored: for other replicas
}

// object is a stored record and, unless only the record was asked for, its body. Its
// holder closes body.
type object struct {
	rec     *record        // shared by all holders, and so never changed
	headers *recordHeaders // of rec, shared too; nil: make them
	body    io.ReadSeekCloser
}

// objects keeps bodies with their records, by key.
type objects interface {
	// put stores the spool's bytes (complete and verified, rec.Size long) under key and
	// replaces what was there. On return all is durable (but for what
	// diskStore.maySkipSync says). After an error the old or the new state holds. spool
	// is a *os.File, whose name may be moved away, or a *bytes.Reader; its caller keeps it
	// and reads it at offsets only.
	put(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error
	// open returns key's object; reading will begin at off. off < 0 asks for
	// the record alone (body is nil). A miss, damage included, is
	// fs.ErrNotExist; a store that cannot be asked is errStoreDown.
	open(ctx context.Context, key string, off int64) (*object, error)
	// stat is open for the record alone, of what is stored by now: no copy answers it, which
	// is trusted for a while after another process has removed the object.
	stat(ctx context.Context, key string) (*object, error)
	// delete removes key; fs.ErrNotExist when nothing was there. Bodies that
	// are open stay readable.
	delete(ctx context.Context, key string) error
	// invalidate drops the store's copy of key, if it keeps copies of what is elsewhere:
	// another process has replaced or removed it. With "" all are checked before they are
	// used again: an announcement may have been missed.
	invalidate(key string)
	// walk calls f with each stored record of all remotes, in no order, beside
	// writers. f's error ends it and is returned.
	walk(ctx context.Context, f func(key string, rec *record) error) error
}

// putCondition is what must be true of a key's object when another one is put. Only the
// S3 stores heed it, because other replicas put there too: on disk the caller, who has
// checked it, has the lock of the key. The zero condition always holds.
type putCondition struct {
	isNew bool    // there is none; else errFileExists
	old   *record // it is still that of this record; else errCondition
}

// indexRow is what the index knows of one object.
type indexRow struct {
	Remote      string
	Path        string // upstream spelling
	Key         string
	SHA256      string
	ContentType string
	Class       class
	Size        int64
	Hits        int64
	Fetched     time.Time
	LastAccess  time.Time
}

// pageQuery asks the index for rows of one remote ("": of all, with oldest).
type pageQuery struct {
	remote  string
	prefix  string         // of the decoded path
	pattern *regexp.Regexp // searched in the decoded path; nil: all
	after   string         // a page's next; "" begins
	limit   int
	// oldest asks for what eviction may remove (no local file), the least recently used
	// first, without prefix and pattern: the files that were never used again since they
	// were stored, and with used the others too.
	oldest, used bool
}

// indexPage is a part of a listing, in byte order of the decoded path.
type indexPage struct {
	rows     []indexRow
	next     string // "" at the end
	complete bool   // false: stored objects may be missing, see index
}

// fileUse counts uses of one key since the last flush.
type fileUse struct {
	remote, key string
	hits        int64
	last        time.Time
}

// remoteTotal is what one remote has stored.
type remoteTotal struct{ Files, Bytes int64 }

// index lists what is stored. A row is written after its object and can be made from
// it again: a crash may lose rows, never objects. An index that cannot be asked is
// errStoreDown. All methods may be called concurrently.
type index interface {
	// saveRow inserts a row, or replaces the row with its key, whose hits stay. It
	// may return before the row is durable, also without an error.
	saveRow(ctx context.Context, r indexRow) error
	// delete removes the row of key. A row that is not there is no error. Like
	// saveRow it may return early.
	delete(ctx context.Context, remote, key string) error
	// forget is delete where another replica has removed the object with its row: it sees
	// to what this process alone knows, and waits for nobody. A key that has no row, ""
	// too, is no error.
	forget(key string)
	// listPage returns the rows that q asks for. The page is not complete while the
	// index is loaded, while rows wait to be written, and after rows were dropped.
	listPage(ctx context.Context, q pageQuery) (indexPage, error)
	// countUses adds uses, at most usesBatch of them, to their rows. It returns those
	// whose key has no row: the caller saves the row and counts them again.
	countUses(ctx context.Context, batch []fileUse) (unknown []fileUse, err error)
	// totals returns the number and the size of the objects of each remote that has any;
	// with unused only of those that a pageQuery with oldest finds, which takes longer.
	totals(ctx context.Context, unused bool) (map[string]remoteTotal, error)
}

// freshnessMark says when a copy was last found good upstream. It counts only for a
// record with that SHA-256.
type freshnessMark struct {
	GoodAt time.Time
	SHA256 string
}

// freshness keeps marks. It is advisory: a mark may be lost at any time, which costs
// a revalidation. Files that never expire have no mark. All methods may be called
// concurrently.
type freshness interface {
	// getMark returns the mark of key. A miss is fs.ErrNotExist.
	getMark(ctx context.Context, key string) (freshnessMark, error)
	// setMark replaces the mark of key. It may return before the mark is durable.
	setMark(ctx context.Context, key string, m freshnessMark) error
	// delete removes the mark of key. A mark that is not there is no error.
	delete(ctx context.Context, key string) error
}

// replicas is what the processes of one cache tell each other. No failure of it is ever
// a reason for a client's error.
type replicas interface {
	// acquireLease makes this process the only one that fills key, until release; a
	// heartbeat keeps it. Others will show token, perhaps before acquireLease returns.
	acquireLease(ctx context.Context, key, token string) (lease, error)
	// announceChange tells the others that key was replaced, or with a prefix before it
	// something else, see removedPrefix.
	announceChange(ctx context.Context, key string) error
	// watchChanges calls changed for each announcement of another process, and reset
	// whenever some may have been missed (a new connection), until ctx ends.
	watchChanges(ctx context.Context, changed func(key string), reset func())
	// hearsChanges says whether announcements arrive at the moment.
	hearsChanges() bool
}

// lease is the answer to who fills a key.
type lease struct {
	release func()       // ends our lease; nil: there is none to be had
	other   *leaseHolder // who has it instead, if that is known
	wasHeld bool         // a lease on the key ended less than leaseMemory ago: the file may be stored by now
}

// leaseMemory is how long it is known that a lease has ended.
const leaseMemory = time.Minute

// leaseHolder is the process that holds a lease: where it can be asked for the
// growing file, and the lease's random token, which the request carries.
type leaseHolder struct{ addr, token string }

// maxRememberedFiles bounds the files that upstream does not have: a crawler of missing
// files must not fill the memory.
const maxRememberedFiles = 100_000

// cache serves files of remotes, from the store or by filling it. Its methods may be
// called concurrently.
type cache struct {
	cacheStores
	upstream *upstream
	now      func() time.Time
	log      *slog.Logger
	metrics  *metrics
	// isInTrouble reports whether it is known, and logged, that a store cannot be used.
	isInTrouble   func(store string) bool
	storageIsDown func() bool // as far as is known; nothing is said to be stored then
	replicaClient *http.Client

	ctx    context.Context // of all fills
	cancel context.CancelFunc
	fills  *fillTable

	missing          *boundedMap[string, missingFile] // what upstream does not have, by fileRequest.wireKey
	heads            sharedCalls[string, fileReply]   // HEADs of files that are not stored
	headRefused      *boundedMap[string, struct{}]    // remotes with what they are to send, and keys of files, that refuse HEAD
	passOn           *boundedMap[string, struct{}]    // keys whose bodies are not spooled for a while
	failedLeases     *boundedMap[string, struct{}]    // tokens of leases whose holder could not be followed
	warnedOf         sync.Map                         // by name, remotes of which an index was stored forever
	changing         keyedLock                        // keys that are being put or purged
	leaving          *boundedMap[leavingLinks, int64] // how many links lead past the cache
	lostAnnouncement atomic.Bool                      // one that the other replicas did not get
	uses             useCounts
	missed           missedFiles
	readers          openFiles
	evictor          *evictor
	generations      *generations
}

// cacheStores is what a cache keeps its files in and by.
type cacheStores struct {
	objects    objects
	index      index
	marks      freshness
	space      *spoolSpace
	replicas   replicas // nil on a single machine
	replicaKey replicaKey
}

// newCache makes a cache over the stores. Its caller closes it before them.
func newCache(st cacheStores, up *upstream, now func() time.Time, log *slog.Logger, m *metrics) *cache {
	c := &cache{cacheStores: st, upstream: up, now: now, log: log, metrics: m, replicaClient: newReplicaClient(), fills: newFillTable(),
		missed: missedFiles{files: map[missedKey]*missedFile{}}, readers: openFiles{byKey: map[string]int{}},
		isInTrouble: func(string) bool { return false }, storageIsDown: func() bool { return false }}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.lostAnnouncement.Store(st.replicas != nil) // of a process that died between a change and its announcement
	clock := func() time.Time { return c.now() } // tests replace c.now
	c.evictor = &evictor{cache: c, named: newLRU[[]uint64](namedBudget, 0), alone: func(ctx context.Context, f func(context.Context)) error {
		f(ctx)
		return nil
	}}
	c.missing = newBoundedMap[string, missingFile](maxRememberedFiles, clock)
	c.headRefused = newBoundedMap[string, struct{}](maxRemembered, clock)
	c.passOn = newBoundedMap[string, struct{}](maxRemembered, clock)
	c.failedLeases = newBoundedMap[string, struct{}](maxRemembered, clock)
	c.leaving = newBoundedMap[leavingLinks, int64](maxRemembered, clock)
	c.generations = &generations{c: c, parsed: newLRU[*rootNames](parsedRootsBudget, 0),
		asked: newBoundedMap[string, struct{}](maxRemembered, clock), held: newBoundedMap[string, heldRoot](maxRemembered, clock),
		before: newBoundedMap[string, string](maxRemembered, clock)}
	return c
}

// fileRequest is a file to serve and what is known about it beforehand.
type fileRequest struct {
	target
	behavior fileBehavior // nil: a download
	accept   string       // Accept sent upstream
	scope    string       // of the token for a container registry
	via      string       // what of the client's Via goes upstream
	digest   string       // that the body must have (sha256:HEX or sha512:HEX); "": not known
	// maxBytes bounds a body that is answered only when it is complete and checked, and
	// that HEAD fetches as GET does (manifests). 0: any other body.
	maxBytes int64
	// alwaysRefetched: an expired copy is never revalidated, only fetched again.
	alwaysRefetched bool
	// sharedKey: requests with another wire path have this key too (a blob of
	// several images), so that upstream's answer to one says nothing about another.
	sharedKey bool
	// knownSize answers HEAD while the file is not stored; 0: ask upstream.
	knownSize int64
	hasCopy   bool // see upstreamRequest
}

// fileBehavior is what one kind of file does in its own way. download has the
// defaults; a kind embeds it and overrides what differs.
type fileBehavior interface {
	// permit is called before anything but upstream's answer to this very request is
	// sent: a stored copy, whose record it gets, or what another request or replica
	// fetches (nil). Its error is the client's.
	permit(ctx context.Context, file fileRequest, rec *record) error
	// requestBody asks upstream for the body, for a part of it or for its headers, as req
	// says. The caller closes what is returned.
	requestBody(ctx context.Context, up *upstream, req upstreamRequest) (*upstreamResponse, error)
	// keepHeaders keeps more of an answer's headers in the record.
	keepHeaders(rec *record, h http.Header)
	// checkBody sees a complete body before it is stored and may add to its
	// record. Its error keeps the body from being stored and answered.
	checkBody(ctx context.Context, rec *record, body io.ReaderAt) error
	// setHeaders sets what describes the body in a reply; path is the decoded one.
	setHeaders(w *response, path string, rec *record)
	// servesStale reports whether an expired copy answers for that status of
	// upstream even without stale_if_error.
	servesStale(status int) bool
}

// download is the behavior of files below /api/.
type download struct{}

func (download) requestBody(ctx context.Context, up *upstream, req upstreamRequest) (*upstreamResponse, error) {
	return up.send(ctx, req)
}
func (download) permit(context.Context, fileRequest, *record) error    { return nil }
func (download) keepHeaders(*record, http.Header)                      {}
func (download) checkBody(context.Context, *record, io.ReaderAt) error { return nil }
func (download) servesStale(int) bool                                  { return false }

// behaves is the file's behavior.
func (file *fileRequest) behaves() fileBehavior {
	if file.behavior == nil {
		return download{}
	}
	return file.behavior
}

// serveFile answers GET and HEAD for a file.
func (c *cache) serveFile(w *response, r *http.Request, file fileRequest) error {
	w.remote, w.path = file.remote.name, file.path
	var err error
	if file.via, err = c.upstream.passedVia(r.Header); err != nil {
		return err
	}
	limitRanges(r)
	ctx := r.Context()
	var cancel context.CancelFunc // of a multi-range answer
	if strings.Contains(r.Header.Get("Range"), ",") {
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
	}
	reply, err := c.findOrFetch(ctx, file, parseByteRange(r))
	if err != nil {
		w.result = "MISS"
		return err
	}
	if cancel != nil {
		reply.body = &closableBody{body: reply.body, cancel: cancel}
	}
	defer reply.body.Close()
	if reply.size > briefAnswer {
		key := storageKey(reply.rec.Remote, reply.rec.Path) // what a root names is stored under another key than file's
		c.readers.countReaders(key, 1)
		defer c.readers.countReaders(key, -1)
	}
	w.result, w.mirror = reply.result, reply.mirror
	if reply.result == "STALE" {
		_, w.detail, _ = strings.Cut(reply.cacheStatus, "detail=")
	}
	reply.send(w, r, file, c.now())
	return nil
}

// ttlOf returns how long a file of a class stays fresh. Nothing newer can come to a sealed
// remote than what it has.
func (r *remote) ttlOf(c class) (d time.Duration, forever bool) {
	switch {
	case r.sealed:
	case c == mutable:
		return r.mutableTTL, false
	case c == immutable:
		return r.immutableTTL, r.immutableTTL == 0
	}
	return 0, true
}

// storedCopy is a file's object and how fresh it is.
type storedCopy struct {
	*object
	goodAt  time.Time     // when it was last found good upstream
	ttlLeft time.Duration // 0 or less: it has expired
	forever bool          // it never expires
	sealed  bool          // it answers whatever its age
}

func (s *storedCopy) isFresh() bool { return s.forever || s.ttlLeft > 0 }

// maxLookAgains bounds how often a request may learn that the store has the file after
// all, and then not find it there. A fill may end between a lookup that misses and the next
// fill, which looks again.
const maxLookAgains = 3

// findOrFetch returns what to send for a file. The caller closes its body.
func (c *cache) findOrFetch(ctx context.Context, file fileRequest, rng byteRange) (*fileReply, error) {
	if file.behavior == nil && file.mayHaveRoot() {
		return c.generations.findOrFetch(ctx, file, rng)
	}
	key := file.key()
	for n, first := 0, true; ; first = false {
		ended := c.fills.endedOf(key).Load()
		cp, storeErr := c.findCopy(ctx, key, file, rng)
		switch named, isNamed := file.behavior.(*namedDownload); {
		case storeErr == nil:
			if err := file.behaves().permit(ctx, file, cp.rec); err != nil {
				cp.body.Close()
				return nil, c.missed.recordMiss(file, err, c.now())
			}
			if cp.isFresh() {
				c.countUse(file.remote.name, key)
				return cp.hitReply(), nil
			}
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case !errors.Is(storeErr, fs.ErrNotExist):
			c.reportStoreError("storage", "opening", key, storeErr)
		case isNamed:
			if other := named.findOtherWay(ctx, key, rng); other != nil {
				return c.findOrFetch(ctx, *other, rng)
			}
		}
		if first && (file.remote.sealed || !rng.ahead) {
			storeErr = c.missed.recordMiss(file, storeErr, c.now())
		}
		if file.remote.local || file.remote.sealed {
			return nil, storeErr
		}
		inOutage := cp == nil && c.upstream.isInOutage(file.remote.name)
		if cp == nil {
			if err := file.recallMissing(ctx, c, rng, storeErr); err != nil {
				return nil, err
			}
		}
		reply, again, err := c.fillOrStale(ctx, key, file, rng, cp, ended, first)
		if again && err != nil {
			continue // another way to the file was refused: ask in our own way
		}
		if again {
			if n++; n <= maxLookAgains {
				continue
			}
			err = errStoreDown
		}
		if reply != nil && (errors.Is(storeErr, errStoreDown) || c.storageIsDown()) {
			reply.willBeStored = false // it may be, if the store is back by then
		}
		if inOutage && failedByNetwork(err) { // the probe; who finds an outage says so
			if missing := file.recallMissing(ctx, c, rng, storeErr); missing != nil {
				return nil, missing
			}
		}
		return reply, withStoreError(err, storeErr)
	}
}

// withStoreError is err, or the error that names both if neither the store nor upstream
// can be reached: upstream alone is not to blame then.
func withStoreError(err, storeErr error) error {
	if !failedByNetwork(err) || !errors.Is(storeErr, errStoreDown) {
		return err
	}
	return &problem{status: http.StatusServiceUnavailable, cause: errors.Join(err, storeErr), detail: "neither the store nor the upstream can be reached"}
}

// fillOrStale answers when the store has no fresh copy; cp is the expired one or
// nil. again says that findOrFetch must look again: the store has the file by now,
// or (with an error) the answer was to another way to the file. first says that it has
// not looked again yet.
func (c *cache) fillOrStale(ctx context.Context, key string, file fileRequest, rng byteRange, cp *storedCopy, ended int64, first bool) (reply *fileReply, again bool, err error) {
	root, isRoot := file.behavior.(*rootDownload)
	switch asksHEAD := cp == nil && rng.head && file.maxBytes == 0 && !c.fills.isFilling(key); {
	case asksHEAD && file.knownSize > 0:
		rec := file.newRecord(http.Header{}, c.now())
		return &fileReply{rec: rec, size: file.knownSize, body: unreadBody(file.knownSize), cacheStatus: "hit; detail=size-known", result: "HIT"}, false, nil
	case asksHEAD:
		reply, err = c.headUpstream(ctx, file)
		return reply, false, err
	case cp == nil:
	case c.upstream.isDown(ctx, file.remote):
		return file.staleReply(c, cp, "unreachable"), false, nil
	case isRoot && root.isHeld():
		return file.staleReply(c, cp, "agreeing"), false, nil
	}
	f, leads := c.joinFill(key, file, cp, ended)
	if ttl, forever := file.remote.ttlOf(file.class); first && ttl == 0 && !forever && !leads && !file.rulesOthers() && f.hasAll() {
		// Upstream was asked before this request came, and is to be asked for each.
		if cp != nil {
			cp.body.Close()
		}
		enough, cancel := context.WithTimeout(ctx, maxWholeBodyWait)
		defer cancel()
		_, _ = f.awaitEnd(enough) // if it takes longer, its body is what the next look finds
		return nil, ctx.Err() == nil, context.Cause(ctx)
	}
	if cp == nil && f.file.wire != file.wire { // upstream is asked in another way than ours
		if err := file.behaves().permit(ctx, file, nil); err != nil {
			f.leave()
			return nil, false, err
		}
	}
	reply, again, err = f.awaitReply(ctx, leads, rng, cp)
	_, refused := errors.AsType[*upstreamStatus](err)
	refused = refused || errors.Is(err, errCredentials)
	return reply, again || (refused && f.file.wire != file.wire), err // see fileRequest.sharedKey
}

// findCopy opens the copy of a file, whose body the caller closes, and finds out how fresh
// it is. Its errors are those of objects.open.
func (c *cache) findCopy(ctx context.Context, key string, file fileRequest, rng byteRange) (*storedCopy, error) {
	off := rng.from
	if rng.head {
		off = -1
	}
	for again := false; ; again = true {
		obj, err := c.objects.open(ctx, key, off)
		if err != nil {
			return nil, err
		}
		if obj.body == nil {
			obj.body = unreadBody(obj.rec.Size)
		}
		if obj.rec.Path != file.spelling || obj.rec.Remote != file.remote.name {
			obj.body.Close()
			return nil, fmt.Errorf("key %s holds another path: %w", key, fs.ErrNotExist)
		}
		s, outdated := c.freshnessOf(ctx, key, file, obj)
		if !outdated || again { // an old version in the store itself is all there is
			return s, nil
		}
		s.body.Close()
		c.objects.invalidate(key)
	}
}

// freshnessOf judges an object by the TTL of the file and by when it was last found good.
// outdated: the freshness mark is about a later version, so that a store's copy of what is
// elsewhere is old.
func (c *cache) freshnessOf(ctx context.Context, key string, file fileRequest, obj *object) (s *storedCopy, outdated bool) {
	rem := file.remote
	s = &storedCopy{object: obj, goodAt: obj.rec.Fetched, sealed: rem.sealed}
	if obj.rec.Links != file.rewrittenLinks().tableID() && !rem.sealed && !rem.local {
		return s, false // expired: its links lead by another table, and upstream can be asked for others
	}
	var ttl time.Duration
	if ttl, s.forever = rem.ttlOf(file.class); s.forever {
		return s, false
	}
	if obj.rec.Negative {
		ttl = rem.negativeTTL
	}
	m, err := c.marks.getMark(ctx, key)
	if !errors.Is(err, fs.ErrNotExist) {
		c.reportStoreError("redis", "reading freshness of", key, err)
	}
	now := c.now()
	s.goodAt = lastGood(obj.rec.Fetched, obj.rec.SHA256, m, now, ttl)
	s.ttlLeft = ttl - now.Sub(s.goodAt)
	return s, m.SHA256 != obj.rec.SHA256 && m.GoodAt.After(s.goodAt)
}

// lastGood is when a copy with that SHA-256 was last found good: when it was fetched,
// or when it was marked since then. The zero mark is older than any fetch.
func lastGood(fetched time.Time, sum string, m freshnessMark, now time.Time, ttl time.Duration) (at time.Time) {
	for _, good := range []freshnessMark{{fetched, sum}, m} {
		if good.GoodAt.Sub(now) > ttl { // a clock was wrong and the age is not known: the copy counts as expired
			good.GoodAt = now.Add(-ttl)
		}
		if good.SHA256 == sum && good.GoodAt.After(at) {
			at = good.GoodAt
		}
	}
	return at
}

// hitReply is the reply with a stored copy.
func (s *storedCopy) hitReply() *fileReply {
	status := "hit"
	if !s.forever {
		status += "; ttl=" + strconv.FormatInt(int64(s.ttlLeft/time.Second), 10)
	}
	if s.sealed {
		status += "; detail=sealed"
	}
	return &fileReply{rec: s.rec, headers: s.headers, size: s.rec.Size, body: s.body, goodAt: s.goodAt, cacheStatus: status, result: "HIT"}
}

// staleReply is the reply with an expired copy; why goes into the Cache-Status.
func (file *fileRequest) staleReply(c *cache, s *storedCopy, why string) *fileReply {
	c.countUse(file.remote.name, file.key())
	s.ttlLeft = min(s.ttlLeft, -time.Second) // ttl=0 would look like a fresh copy
	reply := s.hitReply()
	reply.result, reply.cacheStatus = "STALE", reply.cacheStatus+"; detail="+why
	return reply
}

// reportStoreError logs and counts a failure of a store that the request survives; nil and
// the end of whoever asked are none. In an outage each request has one, and the log has a
// line of its own.
func (c *cache) reportStoreError(what, doing, key string, err error) {
	if err == nil || errors.Is(err, context.Canceled) {
		return
	}
	c.metrics.countStoreError(what)
	level := slog.LevelWarn
	if c.isInTrouble(what) {
		level = slog.LevelDebug
	}
	c.log.Log(c.ctx, level, "a store failed, the request goes on without it", "store", what, "doing", doing, "key", key, "error", err)
}

// Close waits for the fills until ctx ends, then cancels them, and writes the uses that
// were not counted yet.
func (c *cache) Close(ctx context.Context) {
	if !c.fills.waitIdle(ctx) {
		c.cancel()
		// A store that hangs would keep the process beyond the time that it is given.
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if !c.fills.waitIdle(ending) {
			c.log.Warn("a fill does not end: what it leaves behind is swept at the next start")
		}
	}
	c.cancel()
	c.flushCounts(context.WithoutCancel(ctx))
}
