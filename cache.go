// cache.go: the decision for one file: serve what is stored, ask whether it is
// still good, fill, or serve it stale. The fill itself is in fill.go.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// record describes one stored body and is stored with it. Key and source URL
// are derived, not stored (DESIGN.md, "What is kept").
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
	Modified     time.Time `json:"u"`           // what clients see: the same for every refill of the same bytes
	Fetched      time.Time `json:"f"`
	Digest       string    `json:"d,omitempty"` // Docker-Content-Digest
	Link         string    `json:"l,omitempty"` // below /v2/
	Filters      string    `json:"o,omitempty"` // OCI-Filters-Applied

	create bool // for objects.put: fail if there is something already. Not stored
}

// object is a stored record and, unless only the record was asked for, its
// body. The holder closes body.
type object struct {
	rec  *record // shared: never changed
	body io.ReadSeekCloser
}

// objects keeps bodies with their records, by key.
type objects interface {
	// put stores the spool's bytes (complete and verified, rec.Size long) under
	// key and replaces what was there. On return all is durable, or an error
	// says that the old state still holds. The spool's name may be moved away;
	// its descriptor stays usable and belongs to the caller. Where other
	// processes put as well, rec.create is heeded: errExists.
	put(ctx context.Context, key string, rec *record, spool *os.File) error
	// open returns key's object; reading will begin at off. off < 0 asks for
	// the record alone (body is nil). A miss, damage included, is
	// fs.ErrNotExist; a store that cannot be asked is errStoreDown.
	open(ctx context.Context, key string, off int64) (*object, error)
	// delete removes key; fs.ErrNotExist when nothing was there. Bodies that
	// are open stay readable.
	delete(ctx context.Context, key string) error
	// walk calls f with each stored record of all remotes, in no order, beside
	// writers. f's error ends it and is returned.
	walk(ctx context.Context, f func(key string, rec *record) error) error
}

// forgetter is an objects that keeps copies of what is elsewhere.
type forgetter interface {
	// forget drops what is kept of key: another process replaced or removed it.
	forget(key string)
	// forgetAll has everything looked at again before it is used: something may
	// have been missed.
	forgetAll()
	// refuses says that nothing can be stored, as the last attempt found.
	refuses() bool
}

// row is what the index knows of one object. Its JSON is a line of the journal.
type row struct {
	Remote      string    `json:"Remote"`
	Path        string    `json:"Path"` // upstream spelling
	Key         string    `json:"Key"`
	SHA256      string    `json:"SHA256"`
	ContentType string    `json:"ContentType"`
	Class       class     `json:"Class"`
	Size        int64     `json:"Size"`
	Hits        int64     `json:"Hits"`
	Fetched     time.Time `json:"Fetched"`
	LastAccess  time.Time `json:"LastAccess"`
}

// pageQuery asks the index for rows of one remote ("" = all, with oldest).
type pageQuery struct {
	remote  string
	prefix  string         // of the decoded path
	pattern *regexp.Regexp // searched in the decoded path; nil: all
	after   string         // a page's next; "" begins
	limit   int
	oldest  bool // by last access, oldest first, instead of by decoded path
}

// page is a part of a listing, in byte order of the decoded path.
type page struct {
	rows     []row
	next     string // "" at the end
	complete bool   // false while the embedded index is being loaded
}

// touch counts uses of one key since the last flush.
type touch struct {
	remote, key string
	hits        int64
	last        time.Time
}

// total is what one remote has stored.
type total struct{ Files, Bytes int64 }

// index lists what is stored. It is written after the object and can be
// rebuilt from it. All methods may be called concurrently.
type index interface {
	save(ctx context.Context, r row) error // insert or replace by key, hits kept
	delete(ctx context.Context, remote, key string) error
	page(ctx context.Context, q pageQuery) (page, error)
	touch(ctx context.Context, batch []touch) error // unknown keys are ignored
	totals(ctx context.Context) (map[string]total, error)
}

// mark says when a copy was last found good upstream. It counts only for a
// record with that SHA-256.
type mark struct {
	At     time.Time
	SHA256 string
}

// freshness keeps marks. It is advisory: losing it costs a revalidation.
type freshness interface {
	get(ctx context.Context, key string) (mark, error) // fs.ErrNotExist when unknown; an error has no mark
	set(ctx context.Context, key string, m mark) error
	delete(ctx context.Context, key string) error
}

// replicas is what the processes of one cache tell each other. nil on a single
// machine. No failure of it is ever a reason for a client's error.
type replicas interface {
	// lease makes this process the only one that fills key, until release; a
	// heartbeat keeps it. Others will show token, perhaps before lease returns.
	// A nil release says that there is no lease to be had; other is who has it,
	// if another process does.
	lease(ctx context.Context, key, token string) (release func(), other *filler, err error)
	// announce tells the others that key was replaced, or with removedMark
	// before it that it was removed.
	announce(ctx context.Context, key string) error
	// watch calls changed for each announcement of another process, and reset
	// whenever some may have been missed (a new connection), until ctx ends.
	watch(ctx context.Context, changed func(key string), reset func())
	// online says whether announcements arrive at the moment.
	online() bool
}

// filler is the process that holds a lease: where it can be asked for the
// growing file, and the lease's random token, which the request carries.
type filler struct{ addr, token string }

// spooler makes the temporary files that bodies grow in.
type spooler interface {
	// spool returns a new empty file that objects.put can take; the caller
	// closes it and removes what is left of its name. errNoSpace and
	// errStoreDown say why there is none.
	spool() (*os.File, error)
	// room is nil while n more bytes may be written and MIN_FREE stays free;
	// errNoSpace otherwise.
	room(n int64) error
}

// cache serves files of remotes: from the store, or by filling it. It is safe
// for concurrent use; close ends its fills.
type cache struct {
	objects objects
	index   index
	fresh   freshness
	spools  spooler
	up      *upstream
	now     func() time.Time
	log     *slog.Logger
	metrics *metrics

	// Of several replicas; nil on a single machine. Set before the first request.
	replicas replicas
	peers    *http.Client

	ctx    context.Context // of all fills
	cancel context.CancelFunc
	fills  sync.WaitGroup
	ended  atomic.Int64 // flights that have ended: a lookup before may be out of date

	mu      sync.Mutex // guards what follows; never held across I/O
	flights map[string]*flight
	slots   map[string]chan struct{} // by remote name: fills that run
	noHEAD  map[string]time.Time     // by remote name: HEAD is refused until then
	writing map[string]*keyLock      // keys of local files being changed
	untold  map[string]bool          // keys whose change is still to be announced
	passed  map[string]time.Time     // keys whose bodies are not spooled until then

	negative negatives
	uses     uses
}

// newCache wires a cache; its caller closes it before the stores.
func newCache(o objects, ix index, f freshness, s spooler, up *upstream, now func() time.Time, log *slog.Logger, m *metrics) *cache {
	ctx, cancel := context.WithCancel(context.Background())
	return &cache{
		objects: o, index: ix, fresh: f, spools: s, up: up, now: now, log: log, metrics: m,
		ctx: ctx, cancel: cancel,
		flights: map[string]*flight{}, slots: map[string]chan struct{}{},
		noHEAD: map[string]time.Time{}, writing: map[string]*keyLock{}, untold: map[string]bool{}, passed: map[string]time.Time{}, peers: newPeerClient(),
	}
}

// want is a file to serve and what is known about it beforehand.
type want struct {
	target
	accept string // Accept sent upstream
	scope  string // registry token scope
	digest string // the body must have it ("sha256:HEX"); "" unknown
	limit  int64  // most bytes of a body; 0: any
	// whole: answered only when complete and checked, and HEAD fetches as GET
	// does (manifests).
	whole bool
	// staleOn429: a 429 serves the expired copy even without stale_if_error;
	// staleOn5xx: a 5xx does.
	staleOn429, staleOn5xx bool
	// shared: requests of other wires have this key too (a blob of several
	// images), so the upstream's refusal of one says nothing about another.
	shared bool
	// size answers HEAD while the file is not stored; 0: ask upstream.
	size int64
	// ask replaces the question for the body; the want is never revalidated
	// then, only asked again. nil: upstream.ask.
	ask func(ctx context.Context, req upstreamRequest) (*upstreamResponse, error)
	// note keeps more of an answer's headers in the record. nil: none.
	note func(rec *record, h http.Header)
	// check sees a complete body before it is stored and may add to its
	// record; its error keeps it from being stored and answered. nil: none.
	check func(ctx context.Context, rec *record, body io.ReaderAt) error
	// dress changes the headers of an answer; nil: a download's.
	dress func(h http.Header, rec *record)
}

// reply is an answer that is ready to be sent.
type reply struct {
	rec     *record
	size    int64 // of the whole body; -1: not known yet
	body    io.ReadSeekCloser
	at      time.Time // when the copy was last found good; zero: just fetched
	remote  bool      // X-Artifact-Source: remote
	sum     bool      // rec.SHA256 is known and will be what was sent
	status  string    // Cache-Status, behind the name
	stored  bool      // Cache-Status says "stored": the body is to be kept
	outcome string    // HIT, MISS, STALE, REVALIDATED: for log and counters
}

// asked is what of a client's request matters before the answer: the method
// and a single range, which says where reading will begin.
type asked struct {
	head     bool
	from, to int64 // of a single Range with a known beginning; to is -1 for "to the end"
	suffix   int64 // of a single suffix Range
	ifRange  bool  // the whole may be wanted after all
}

// serve answers GET and HEAD for q.
func (c *cache) serve(w *response, r *http.Request, q want) error {
	w.remote, w.path = q.remote.name, q.path
	if strings.Count(r.Header.Get("Range"), ",") >= maxRanges {
		r.Header.Del("Range")
	}
	ctx := r.Context()
	var cancel context.CancelFunc // of a multi-range answer
	if strings.Contains(r.Header.Get("Range"), ",") {
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
	}
	rep, err := c.get(ctx, q, askedOf(r))
	if err != nil {
		w.result = outcomeOf(err)
		return err
	}
	if cancel != nil {
		rep.body = &sharedBody{body: rep.body, cancel: cancel}
	}
	defer rep.body.Close()
	w.result = rep.outcome
	c.send(w, r, q, rep)
	return nil
}

// stored is a copy found in the store and how good it still is.
type stored struct {
	*object
	at      time.Time     // when it was last found good
	ttl     time.Duration // what is left; negative: expired
	forever bool
	// outdated: a later version was stored, if this one is a copy of a copy.
	outdated bool
}

func (s *stored) fresh() bool { return s.forever || s.ttl > 0 }

// lookAgains bounds how often a request may find that the store has the file
// after all and then not find it there.
const lookAgains = 3

// get finds or fetches q and returns what to send; the caller closes its body.
func (c *cache) get(ctx context.Context, q want, a asked) (*reply, error) {
	key := q.key()
	// A flight may end between a lookup that misses and the next flight: then
	// the store has the file after all, and the flight looks again.
	for n := 0; ; {
		ended := c.ended.Load()
		cp, storeErr := c.lookup(ctx, key, q, a)
		if err := context.Cause(ctx); err != nil && storeErr != nil {
			return nil, err
		}
		if storeErr != nil && !errors.Is(storeErr, fs.ErrNotExist) {
			c.storeFailed("storage", "opening", key, storeErr)
		}
		if cp != nil && cp.fresh() {
			c.used(q.remote.name, key)
			return c.hit(cp, ""), nil
		}
		if q.remote.local {
			return nil, storeErr
		}
		rep, again, err := c.absent(ctx, key, q, a, cp, ended)
		if again && !errors.Is(err, errLookAgain) {
			continue // others were refused: our turn comes
		}
		if again {
			if n++; n <= lookAgains {
				continue
			}
			err = errStoreDown
		}
		if f, ok := c.objects.(forgetter); rep != nil && (errors.Is(storeErr, errStoreDown) || ok && f.refuses()) {
			rep.stored = false // it may be, if the store is back by then
		}
		return rep, joinStoreDown(err, storeErr)
	}
}

// joinStoreDown: with neither the store nor the upstream there is nothing to
// answer with, and it is not the upstream alone that is to blame.
func joinStoreDown(err, storeErr error) error {
	if err == nil || !errors.Is(storeErr, errStoreDown) {
		return err
	}
	if errors.Is(err, errUnreachable) || errors.Is(err, errTimeout) {
		return &problem{status: http.StatusServiceUnavailable, cause: errors.Join(err, storeErr),
			detail: "neither the store nor the upstream can be reached"}
	}
	return err
}

// absent answers when the store has no fresh copy; cp is the expired one or
// nil. again says that get must look again: the store has one now
// (errLookAgain), or the answer was to another way to the file.
func (c *cache) absent(ctx context.Context, key string, q want, a asked, cp *stored, ended int64) (rep *reply, again bool, err error) {
	if cp == nil {
		if err := c.negative.get(key, c.now()); err != nil {
			return nil, false, err
		}
		if a.head && !q.whole && !c.flying(key) {
			if q.size > 0 {
				return c.known(q), false, nil
			}
			rep, err := c.headUpstream(ctx, q)
			return rep, false, err
		}
	} else if c.up.isDown(q.remote) {
		c.used(q.remote.name, key)
		return c.stale(cp, "unreachable"), false, nil
	}
	f, lead := c.join(key, q, cp, ended)
	rep, err = c.await(ctx, f, lead, a, cp)
	return rep, errors.Is(err, errLookAgain) || f.want.wire != q.wire && saidNo(err), err
}

// saidNo: the upstream refused one way to a file. Who joined the flight of
// another way to it (want.shared) asks in his own.
func saidNo(err error) bool {
	_, status := errors.AsType[*upstreamStatus](err)
	return status || errors.Is(err, errCredentials)
}

// known answers HEAD from what is known of q beforehand.
func (c *cache) known(q want) *reply {
	rec := c.newRecord(q, http.Header{})
	sum, ok := strings.CutPrefix(q.digest, "sha256:")
	rec.SHA256 = sum
	return &reply{rec: rec, size: q.size, body: unread(q.size), sum: ok, status: "hit; detail=size-known", outcome: "HIT"}
}

// lookup finds key's copy and judges it. A miss is a nil copy; the error says
// why.
func (c *cache) lookup(ctx context.Context, key string, q want, a asked) (*stored, error) {
	off := a.from
	if a.head {
		off = -1
	}
	s, err := c.look(ctx, key, q, off)
	if f, ok := c.objects.(forgetter); ok && err == nil && s.outdated {
		// Once: an older version in the store itself is all there is.
		s.body.Close()
		f.forget(key)
		return c.look(ctx, key, q, off)
	}
	return s, err
}

func (c *cache) look(ctx context.Context, key string, q want, off int64) (*stored, error) {
	obj, err := c.objects.open(ctx, key, off)
	if err != nil {
		return nil, err
	}
	if obj.body == nil {
		obj.body = unread(obj.rec.Size)
	}
	if obj.rec.Path != q.spelling || obj.rec.Remote != q.remote.name {
		obj.body.Close()
		return nil, fmt.Errorf("key %s holds another path: %w", key, fs.ErrNotExist)
	}
	return c.judge(ctx, key, q, obj), nil
}

// judge tells how fresh obj is.
func (c *cache) judge(ctx context.Context, key string, q want, obj *object) *stored {
	s := &stored{object: obj, at: obj.rec.Fetched}
	ttl, forever := q.remote.ttlOf(q.class)
	if forever {
		s.forever = true
		return s
	}
	m, err := c.fresh.get(ctx, key)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.storeFailed("redis", "reading freshness of", key, err)
	}
	now := c.now()
	s.at = lastGood(obj.rec.Fetched, obj.rec.SHA256, m, now, ttl)
	s.outdated = m.SHA256 != obj.rec.SHA256 && m.At.After(s.at)
	s.ttl = ttl - now.Sub(s.at)
	return s
}

// lastGood is when a copy with that sha256 was last found good: fetched, or
// marked since (a zero mark is none).
func lastGood(fetched time.Time, sum string, m mark, now time.Time, ttl time.Duration) time.Time {
	at := past(fetched, now, ttl)
	if marked := past(m.At, now, ttl); m.SHA256 == sum && marked.After(at) {
		return marked
	}
	return at
}

// past is t, the time at which a copy was good, unless it lies further ahead
// than the TTL: then a clock was wrong, and the copy's age is not known.
func past(t, now time.Time, ttl time.Duration) time.Time {
	if t.Sub(now) > ttl {
		return now.Add(-ttl)
	}
	return t
}

// hit answers with a stored copy.
func (c *cache) hit(s *stored, extra string) *reply {
	status := "hit"
	if !s.forever {
		status += "; ttl=" + strconv.FormatInt(int64(s.ttl/time.Second), 10)
	}
	return &reply{rec: s.rec, size: s.rec.Size, body: s.body, at: s.at, sum: true, status: status + extra, outcome: "HIT"}
}

// stale answers with an expired copy; why goes into Cache-Status.
func (c *cache) stale(s *stored, why string) *reply {
	s.ttl = min(s.ttl, -time.Second) // never the 0 of a copy that is fresh
	rep := c.hit(s, "; detail="+why)
	rep.outcome = "STALE"
	return rep
}

// headUpstream answers HEAD for a file that is not stored; nothing is stored.
// Where HEAD is refused, a GET is asked and its body not read.
func (c *cache) headUpstream(ctx context.Context, q want) (*reply, error) {
	req := q.question(http.MethodHead, nil)
	resp, err := c.up.send(ctx, req)
	if err != nil {
		return nil, err
	}
	if headRefused(resp.StatusCode) {
		resp.Body.Close()
		req.method = http.MethodGet
		if resp, err = c.up.send(ctx, req); err != nil {
			return nil, err
		}
	}
	defer resp.Body.Close()
	if err := c.refused(q, resp); err != nil {
		return nil, err
	}
	rec := c.newRecord(q, resp.Header)
	return &reply{rec: rec, size: resp.ContentLength, body: unread(resp.ContentLength), remote: true, status: "fwd=miss", outcome: "MISS"}, nil
}

// headRefused: presigned and CDN origins refuse HEAD in all these ways.
func headRefused(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return true
	}
	return false
}

// question is what is asked upstream for q.
func (q want) question(method string, header http.Header) upstreamRequest {
	h := http.Header{}
	for k, v := range header {
		h[k] = v
	}
	if q.accept != "" {
		h.Set("Accept", q.accept)
	}
	return upstreamRequest{remote: q.remote, method: method, wire: q.wire, header: h, scope: q.scope}
}

// refused turns an upstream's status other than 200 into the error a client
// gets (SPEC.md section 4, Responses); nil for 200.
func (c *cache) refused(q want, resp *upstreamResponse) error {
	p := &problem{status: resp.StatusCode, cause: &upstreamStatus{resp.StatusCode}}
	name := q.remote.name
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
		return nil
	case code == http.StatusNotFound, code == http.StatusGone:
		p.detail = fmt.Sprintf("not found: the upstream of remote %q answered %d", name, code)
		if !q.shared {
			c.negative.put(q.key(), p, c.now(), q.remote.negativeTTL)
		}
	case code == http.StatusUnauthorized:
		p.status = http.StatusBadGateway
		p.detail = fmt.Sprintf("the upstream of remote %q wants credentials: its username or password is missing or wrong", name)
	case code == http.StatusForbidden:
		p.detail = fmt.Sprintf("the upstream of remote %q answered 403 Forbidden", name)
	case code == http.StatusTooManyRequests:
		p.status = http.StatusServiceUnavailable
		p.retryAfter = max(time.Second, parseRetryAfter(resp.Header, c.now()))
		p.detail = fmt.Sprintf("the upstream of remote %q limits its requests (429)", name)
	case code >= 400 && code < 500:
		p.detail = fmt.Sprintf("the upstream of remote %q answered %d", name, code)
	default:
		p.status = http.StatusBadGateway
		p.detail = fmt.Sprintf("the upstream of remote %q answered %d", name, code)
	}
	return p
}

// upstreamStatus is the cause of a problem that an upstream's status made.
type upstreamStatus struct{ code int }

func (e *upstreamStatus) Error() string { return "upstream status " + strconv.Itoa(e.code) }

// Is: a 404 or 410 upstream is a file that is not there.
func (e *upstreamStatus) Is(target error) bool {
	return target == fs.ErrNotExist && e.gone()
}

func (e *upstreamStatus) gone() bool {
	return e.code == http.StatusNotFound || e.code == http.StatusGone
}

// maxHeaderValue bounds what is kept of an upstream's header: a record must
// fit S3's 2 KB of metadata.
const maxHeaderValue = 128

// newRecord begins the record of a body that is about to be fetched.
func (c *cache) newRecord(q want, h http.Header) *record {
	now := c.now().UTC()
	rec := &record{
		Remote: q.remote.name, Path: q.spelling, Class: q.class, Fetched: now, Modified: now.Truncate(time.Second),
		ContentType: bounded(h.Get("Content-Type")), Encoding: bounded(h.Get("Content-Encoding")),
		ETag: bounded(h.Get("ETag")), LastModified: bounded(h.Get("Last-Modified")),
		Digest: bounded(h.Get("Docker-Content-Digest")),
	}
	if t, err := http.ParseTime(rec.LastModified); err == nil {
		rec.Modified = t.UTC()
	} else {
		rec.LastModified = ""
	}
	if q.note != nil {
		q.note(rec, h)
	}
	return rec
}

func bounded(v string) string {
	if len(v) > maxHeaderValue {
		return ""
	}
	return v
}

// countStoreError logs and counts a failure of a store that the request survives.
func (c *cache) storeFailed(what, doing, key string, err error) {
	c.metrics.countStoreError(what)
	c.log.Warn("store failed, going on without it", "store", what, "doing", doing, "key", key, "error", err)
}

// cleanUp is how long fills that were told to end may take for it: a store that
// hangs would keep the process beyond the time that it is given.
const cleanUp = 2 * time.Second

// close ends all fills, after at most the patience of ctx, and writes what is
// left of the accounting.
func (c *cache) close(ctx context.Context) {
	idle := make(chan struct{})
	go func() {
		c.fills.Wait()
		close(idle)
	}()
	select {
	case <-idle:
	case <-ctx.Done():
		c.cancel()
		select {
		case <-idle:
		case <-time.After(cleanUp):
			c.log.Warn("a fill does not end: what it left is swept later")
		}
	}
	c.cancel()
	c.flush(context.WithoutCancel(ctx))
}

// expires is when a listed file stops being fresh.
func (c *cache) expires(ctx context.Context, rem *remote, r row) (until time.Time, forever bool) {
	ttl, forever := rem.ttlOf(r.Class)
	if forever {
		return time.Time{}, true
	}
	m, _ := c.fresh.get(ctx, r.Key) // none if it cannot be had
	return lastGood(r.Fetched, r.SHA256, m, c.now(), ttl).Add(ttl).UTC(), false
}
