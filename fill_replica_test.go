package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// board is what replicas share instead of Redis: leases and announcements.
type board struct {
	mu      sync.Mutex // guards all below
	down    bool
	holders map[string]*leaseHolder
	ended   map[string]bool // keys of which a lease has ended
	members []*member
	wait    chan struct{}                       // announcements wait for it, unless nil
	decided func(m *member, other *leaseHolder) // runs between a lease's decision and its answer, unless nil
}

// member is one replica's access to a board.
type member struct {
	*board
	cache *cache
	url   string
}

var _ replicas = (*member)(nil)

func newBoard() *board { return &board{holders: map[string]*leaseHolder{}, ended: map[string]bool{}} }

func (m *member) acquireLease(_ context.Context, key, token string) (l lease, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch holder := m.holders[key]; {
	case m.down:
		return l, errStoreDown
	case holder == nil:
		mine := &leaseHolder{addr: m.url, token: token}
		m.holders[key] = mine
		l.wasHeld = m.ended[key]
		l.release = func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.holders[key] == mine {
				delete(m.holders, key)
				m.ended[key] = true
			}
		}
	case holder.addr != m.url:
		l.other = holder
	}
	if decided := m.decided; decided != nil {
		m.mu.Unlock()
		decided(m, l.other)
		m.mu.Lock()
	}
	return l, nil
}

func (m *member) announceChange(_ context.Context, key string) error {
	m.mu.Lock()
	members, down, wait := m.members, m.down, m.wait
	m.mu.Unlock()
	if down {
		return errStoreDown
	}
	if wait != nil {
		<-wait
	}
	for _, other := range members {
		if other != m {
			other.cache.onChange(key)
		}
	}
	return nil
}

func (m *member) watchChanges(context.Context, func(string), func()) {}
func (m *member) hearsChanges() bool                                 { return true }

func (b *board) set(change func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change()
}

// leaseTo gives a lease to whatever is at addr.
func (b *board) leaseTo(key, addr string) {
	b.set(func() { b.holders[key] = &leaseHolder{addr, "the-token"} })
}

// fleet is replicas over one store and one board, in front of one origin. Its
// tester is the first of them.
type fleet struct {
	*tester
	board *board
	all   []*tester
}

func newFleet(t testing.TB, n int, keys ...string) *fleet {
	t.Helper()
	f := &fleet{board: newBoard()}
	for i := range n {
		tt := setup{keys: keys, env: map[string]string{"API_TOKEN": "t"}}.start(t)
		f.all = append(f.all, tt)
		if i > 0 {
			tt.origin = f.all[0].origin
			tt.configure(remoteYAML(tt.origin.url, keys...))
			first := f.all[0].cache
			tt.cache.objects, tt.cache.index, tt.cache.marks = first.objects, first.index, first.marks
		}
		f.join(tt)
	}
	f.tester = f.all[0]
	return f
}

// join makes tt a replica of f.
func (f *fleet) join(tt *tester) {
	m := &member{board: f.board, cache: tt.cache, url: tt.url}
	f.board.members = append(f.board.members, m)
	tt.cache.joinReplicas(m)
	tt.Cleanup(tt.cache.replicaClient.CloseIdleConnections)
}

// key is /api/r/path's.
func (tt *tester) key(path string) string {
	tt.Helper()
	t, err := tt.server.config.Load().resolveTarget("r/"+path, "")
	if err != nil {
		tt.Fatal(err)
	}
	return t.key()
}

// settled waits until no replica fills any more.
func (f *fleet) settled() {
	f.Helper()
	f.eventually("the fills to end", func() bool {
		for _, tt := range f.all {
			if tt.flying() > 0 {
				return false
			}
		}
		return true
	})
}

// awaitEnds waits for the nth fill of a replica to end, purged ones included.
func (tt *tester) awaitEnds(n int64) {
	tt.Helper()
	tt.eventually("fills to end", func() bool { return tt.ended() >= n })
}

// ended is how many fills have ended.
func (tt *tester) ended() (n int64) {
	for i := range tt.cache.fills.ended {
		n += tt.cache.fills.ended[i].Load()
	}
	return n
}

func TestOneFetchForAllReplicas(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3)
	const size = 3 << 20
	text := noise(1, size)
	release := f.origin.file("/a", text).etag(`"1"`).stallAt(size / 2)
	defer release()
	var clients []*stream
	for i := range 30 {
		s := f.all[i%3].open("/api/r/a")
		defer s.leave()
		s.read(size / 3) // long before the fill has ended
		clients = append(clients, s)
	}
	f.all[1].get("/api/r/a", "Range: bytes=1000-1999").wantStatus(206).wantBody(text[1000:2000])
	release()
	for i, s := range clients {
		s.rest().wantStatus(200).wantBody(text)
		if i == 0 {
			s.wantMiss()
		} else {
			s.wantJoined()
		}
	}
	f.settled()
	f.wantRequests("/a", 1)
	if text := f.all[1].get("/metrics").text; !strings.Contains(text, fmt.Sprintf("artifactapi_peer_bytes_total %d\n", size)) {
		t.Errorf("a follower does not count the %d bytes of its leader", size)
	}
	for _, tt := range f.all {
		tt.get("/api/r/a").wantHit().wantBody(text)
		tt.wantNoSpools()
	}
	f.wantRequests("/a", 1)
}

// A replica looks into the store once for a miss, and again only if another may have stored
// the file since then: in S3 each look is a request.
func TestReplicaLooksAgainOnlyBehindALease(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1)
	hooked := &hookedObjects{objects: f.cache.objects}
	f.cache.objects = hooked
	var misses atomic.Int64
	count := func() { misses.Add(1) }
	hooked.missed.Store(&count)
	f.board.ended[f.key("held")] = true
	for path, want := range map[string]int64{"free": 1, "held": 2} {
		f.origin.file("/"+path, "body")
		misses.Store(0)
		f.get("/api/r/" + path).wantMiss().wantBody("body")
		if n := misses.Load(); n != want {
			t.Errorf("%s: %d looks, want %d", path, n, want)
		}
	}
}

// A lease can be read before its taker knows that it is his, and shown to him
// when his fill has ended.
func TestLeaseThatIsReadTooEarlyOrTooLate(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	replies := make(chan *got, 2)
	ask := func(tt *tester, path string) { go func() { replies <- tt.get(path) }() }
	f.origin.file("/early", "x")
	f.board.decided = func(m *member, other *leaseHolder) {
		if other != nil {
			return
		}
		ask(f.all[1], "/api/r/early")
		f.eventually("the follower", func() bool { return f.all[0].waiting("early") == 2 || f.origin.requests("/early") > 0 })
	}
	f.all[0].get("/api/r/early").wantMiss()
	(<-replies).wantStatus(200).wantBody("x")
	f.wantRequests("/early", 1)
	f.settled()

	release := f.origin.file("/late", "x").stallAt(0)
	defer release()
	f.board.set(func() {
		f.board.decided = func(m *member, other *leaseHolder) {
			if other != nil {
				release()
				f.all[0].eventually("the end of the fill", func() bool { return f.all[0].flying() == 0 })
			}
		}
	})
	ask(f.all[0], "/api/r/late")
	f.eventually("the lease", func() bool { return f.holder("late") != nil })
	ask(f.all[1], "/api/r/late")
	for range 2 {
		(<-replies).wantStatus(200).wantBody("x")
	}
	f.wantRequests("/late", 1)
}

// A base_url that leads to the replicas themselves, by the balancer before them: the one that
// is asked must not wait for the one that asks.
func TestLoopOverReplicasIs508(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	for _, tt := range f.all {
		tt.configure("remotes: {r: {base_url: " + f.all[1].url + "/api/r}}")
	}
	f.get("/api/r/a").wantDetail(508, "come back")
	f.head("/api/r/a").wantStatus(508)
	f.all[1].get("/api/r/a").wantDetail(508, "come back")
}

// A replica that dies is followed no more: the rest comes by Range.
func TestReplicaThatDies(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3)
	const size = 2 << 20
	text := noise(1, size)
	release := f.origin.file("/a", text).etag(`"1"`).stallAt(size / 2)
	defer release()
	f.all[0].open("/api/r/a").leave()
	f.origin.awaitRequests("/a", 1)
	var clients []*stream
	for _, tt := range f.all[1:] {
		s := tt.open("/api/r/a")
		defer s.leave()
		s.read(size / 2)
		clients = append(clients, s)
	}
	f.origin.file("/a", text).etag(`"1"`) // which does not stall
	_ = f.all[0].front.Close()
	for _, s := range clients {
		s.rest().wantStatus(200).wantJoined().wantBody(text)
	}
	release()
	f.settled()
	if r := f.origin.last("/a").header.Get("Range"); r != fmt.Sprintf("bytes=%d-", size/2) {
		t.Errorf("taken over with Range %q", r)
	}
	f.wantRequests("/a", 3)
	f.all[1].get("/api/r/a").wantHit().wantBody(text)
}

// A page in the place of an archive is one for those who follow its fill, and for who takes it over.
func TestPageOfAnotherReplica(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	text := "<html>" + noise(1, 2<<20)
	for _, dies := range []bool{false, true} {
		release := f.origin.file("/a.zip", text).etag(`"1"`).says("Content-Type", "text/html").stallAt(1 << 20)
		defer release()
		leader := f.all[0].open("/api/r/a.zip")
		defer leader.leave()
		s := f.all[1].open("/api/r/a.zip")
		defer s.leave()
		s.read(1 << 20)
		f.origin.file("/a.zip", text).etag(`"1"`).says("Content-Type", "text/html")
		if dies {
			_ = f.all[0].front.Close()
		}
		release()
		s.rest().wantFrom("remote", "fwd=miss; collapsed").wantBody(text).wantHeader("Content-Type", "text/html")
		leader.leave()
		f.settled()
		f.all[1].get("/api/r/a.zip").wantUnstored()
		f.eventually("its lease to end", func() bool { return f.holder("a.zip") == nil })
	}
}

// peerScript is a process that a lease names, as a test wants it.
type peerScript struct {
	testing.TB
	http.ResponseWriter
	r *http.Request
	*replicaStream
}

// newPeer is a peer that knows the secret and is asked by r.
func newPeer(t testing.TB, w http.ResponseWriter, r *http.Request) *peerScript {
	stream, token := newReplicaKey("", "").acceptStream(strings.TrimPrefix(r.URL.Path, replicaPath), r.Header.Get(leaseHeader))
	if token != "the-token" {
		t.Errorf("another replica was asked for %s with %q", r.URL, r.Header.Get(leaseHeader))
		stream = replicaKey("").newStream("", "", "")
	}
	return &peerScript{t, w, r, stream}
}

// Who is told nonsense may hang up before the end of it.
func (p *peerScript) json(kind byte, v any) error {
	b, _ := json.Marshal(v)
	return p.writeFrame(p, kind, b)
}
func (p *peerScript) head(rec *record, total int64, validator string) {
	_ = p.json(frameHead, replicaHead{rec, total, validator, 0, true})
}
func (p *peerScript) frame(kind byte, text string) { _ = p.writeFrame(p, kind, []byte(text)) }
func (p *peerScript) data(text string)             { p.frame(frameData, text) }
func (p *peerScript) end(rec *record)              { _ = p.json(frameEnd, rec) }
func (p *peerScript) over(v replicaOutcome)        { _ = p.json(frameOutcome, v) }
func (p *peerScript) raw(text string)              { _, _ = io.WriteString(p, text) }

// cut breaks the connection.
func (p *peerScript) cut() {
	_ = http.NewResponseController(p.ResponseWriter).Flush()
	panic(http.ErrAbortHandler)
}

// script makes play what holds the lease of /api/r/a. It says the token unless
// play takes it back.
func (f *fleet) script(play func(p *peerScript)) (asked func() int) {
	var mu sync.Mutex
	n := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		n++
		mu.Unlock()
		p := newPeer(f, w, r)
		w.Header().Set(leaseHeader, p.answer)
		play(p)
	}))
	f.Cleanup(srv.Close)
	f.board.leaseTo(f.key("a"), srv.URL)
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return n
	}
}

const peerSize = 300_000

// peerRecord is what a filling replica knows of text.
func peerRecord(text string) *record {
	return &record{Remote: "r", Path: "a", Size: int64(len(text)), SHA256: strings.TrimPrefix(sha256Of([]byte(text)), "sha256:"), Class: immutable,
		ContentType: "application/x-origin", ETag: `"1"`, LastModified: longAgo.Format(http.TimeFormat), Modified: longAgo, Fetched: longAgo}
}

// Whatever the process at the lease's address does, clients get the right bytes: by
// Range from where it stopped, or all from upstream. Where bytes that a client has
// already are in doubt, or upstream cannot continue them, the client is cut off and
// the next one gets the file.
func TestReplicaThatGoesWrong(t *testing.T) {
	t.Parallel()
	text := noise(1, peerSize)
	rec, half := peerRecord(text), text[:peerSize/2]
	const rest, cutOff = "GET /a bytes=150000-", "the client is cut off"
	begin := func(p *peerScript) {
		p.head(rec, peerSize, `"1"`)
		p.data(half)
	}
	for _, c := range []struct {
		name string
		play func(p *peerScript)
		want string // requests upstream
	}{
		{"does what it should", func(p *peerScript) { begin(p); p.data(text[len(half):]); p.end(rec) }, ""},
		{"says more than is known", func(p *peerScript) { begin(p); p.frame('?', ""); p.data(text[len(half):]); p.end(rec) }, ""},
		{"is cut", func(p *peerScript) { begin(p); p.cut() }, rest},
		{"is cut in a frame", func(p *peerScript) { begin(p); p.raw("d\x00\x01\x00\x00abc"); p.cut() }, rest},
		{"ends without an end", func(p *peerScript) { begin(p) }, rest},
		{"has no such fill", func(p *peerScript) { p.WriteHeader(404) }, "GET /a"},
		{"does not show the secret", func(p *peerScript) { p.Header().Del(leaseHeader); begin(p) }, "GET /a"},
		{"says the token", func(p *peerScript) { p.Header().Set(leaseHeader, "the-token"); begin(p) }, "GET /a"},
		{"says what it was shown", func(p *peerScript) { p.Header().Set(leaseHeader, p.request); begin(p) }, "GET /a"},
		{"has another secret", func(p *peerScript) { p.mac = replicaKey("x").newStream("a", "b", "c").mac; begin(p) }, "GET /a"},
		{"has no secret from the middle on", func(p *peerScript) { begin(p); p.mac = sha256.New(); p.data(text[len(half):]); p.end(rec) }, rest},
		{"plays another file", func(p *peerScript) {
			p.mac = newReplicaKey("", "").newStream("r/other/b", "the-token", strings.Fields(p.request)[1]).mac
			begin(p)
		}, "GET /a"},
		{"plays what it sent before", func(p *peerScript) {
			p.mac = newReplicaKey("", "").newStream(strings.TrimPrefix(p.r.URL.Path, replicaPath), "the-token", "an older nonce").mac
			begin(p)
		}, "GET /a"},
		{"sends a frame twice", func(p *peerScript) {
			var frame bytes.Buffer
			p.head(rec, peerSize, `"1"`)
			_ = p.writeFrame(&frame, frameData, []byte(half))
			p.raw(frame.String() + frame.String())
			p.end(rec)
		}, rest},
		{"leaves out a frame", func(p *peerScript) { begin(p); p.frames++; p.data(text[len(half):]); p.end(rec) }, rest},
		{"is another program", func(p *peerScript) { p.Header().Del(leaseHeader); p.raw("<html>Welcome to nginx!") }, "GET /a"},
		{"sends away", func(p *peerScript) { p.Header().Set("Location", "/elsewhere"); p.WriteHeader(302) }, "GET /a"},
		{"talks nonsense", func(p *peerScript) { begin(p); p.raw("<html>Bad gateway</html>") }, rest},
		{"sends too large a frame", func(p *peerScript) {
			begin(p)
			p.raw("?\x00\x10\x00\x01x" + strings.Repeat("x", maxReplicaFrame))
			p.data(text[len(half):])
			p.end(rec)
		}, rest},
		{"sends data before the head", func(p *peerScript) { p.data(half); begin(p) }, "GET /a"},
		{"sends a head that is none", func(p *peerScript) { p.frame(frameHead, "{}") }, "GET /a"},
		{"sends two heads", func(p *peerScript) { begin(p); p.head(rec, 7, ""); p.data(half) }, rest},
		{"has another sha256", func(p *peerScript) { begin(p); p.data(text[len(half):]); p.end(peerRecord("x")) }, cutOff},
		{"ends too early", func(p *peerScript) { begin(p); p.end(rec) }, cutOff},
		{"sends too much", func(p *peerScript) { begin(p); p.data(text) }, cutOff},
		{"has an end that is none", func(p *peerScript) { begin(p); p.frame(frameEnd, "[") }, cutOff},
		{"gives up", func(p *peerScript) { begin(p); p.over(replicaOutcome{Kind: "self"}) }, rest},
		{"cannot fill", func(p *peerScript) { p.over(replicaOutcome{Kind: "self"}) }, "GET /a"},
		{"has a verdict that is none", func(p *peerScript) { p.frame(frameOutcome, "[") }, "GET /a"},
		{"gives no validator", func(p *peerScript) { p.head(rec, peerSize, ""); p.data(half); p.cut() }, cutOff},
		{"does not know the length", func(p *peerScript) { p.head(rec, -1, `"1"`); p.data(half); p.cut() }, rest},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, 1)
			f.origin.file("/a", text).etag(`"1"`)
			asked := f.script(c.play)
			g := f.get("/api/r/a")
			if c.want == cutOff {
				if !strings.HasPrefix(text, g.text) {
					t.Error("the client has wrong bytes")
				}
				f.settled()
				if g.err != nil { // it has a part: one that had nothing yet has begun anew
					f.wantStored("a", false)
				}
				f.get("/api/r/a").wantStatus(200).wantBody(text)
				return
			}
			g.wantStatus(200).wantBody(text)
			if got := strings.Join(f.origin.all(), ", "); got != c.want || asked() != 1 {
				t.Errorf("upstream was asked %q, want %q; the replica %d times", got, c.want, asked())
			}
			f.settled()
			f.wantStored("a", c.want != "")
		})
	}
}

func TestReplicaThatIsNotThere(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1)
	f.origin.file("/a", "text")
	f.board.leaseTo(f.key("a"), "http://"+f.origin.dead)
	f.get("/api/r/a").wantMiss().wantBody("text")
	f.board.leaseTo(f.key("b"), "no address at all\x7f")
	f.origin.file("/b", "text")
	f.get("/api/r/b").wantMiss().wantBody("text")
}

// A body cannot be continued without ranges. Clients that have a part of it are cut
// off; those that have nothing yet begin anew.
func TestTakingOverWithoutRanges(t *testing.T) {
	t.Parallel()
	text := noise(1, peerSize)
	for _, needsWhole := range []bool{false, true} {
		t.Run(fmt.Sprintf("needs the whole body: %v", needsWhole), func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, 1)
			if needsWhole {
				f.digested(func(file *fileRequest) { file.maxBytes = 1 << 20 })
			}
			f.origin.file("/a", text).noRanges().undated()
			begun := make(chan struct{})
			f.script(func(p *peerScript) {
				p.head(peerRecord(text), peerSize, "")
				p.data(text[:peerSize/2])
				_ = http.NewResponseController(p.ResponseWriter).Flush()
				<-begun
				p.cut()
			})
			if needsWhole {
				close(begun)
				f.get("/api/r/a").wantStatus(200).wantBody(text)
			} else {
				s := f.open("/api/r/a")
				defer s.leave()
				s.read(peerSize / 2)
				close(begun)
				s.rest().wantAborted()
			}
			f.settled()
			f.wantStored("a", needsWhole)
			f.get("/api/r/a").wantStatus(200).wantBody(text)
		})
	}
}

// Of a body with a digest a follower shows no byte of the end that did not
// verify, whatever its replica says.
func TestReplicaThatLiesAboutADigest(t *testing.T) {
	t.Parallel()
	text, lie := noise(1, peerSize), noise(2, peerSize)
	half := text[:peerSize/2] + lie[peerSize/2:] // right in the beginning
	for name, sent := range map[string]string{"all": lie, "half": half, "end": text[:peerSize-1] + "!"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, 1)
			f.digested(func(q *fileRequest) { q.digest = sha256Of([]byte(text)) })
			f.origin.file("/a", text).etag(`"1"`)
			f.script(func(p *peerScript) {
				rec := peerRecord(sent)
				p.head(rec, peerSize, `"1"`)
				p.data(sent)
				p.end(rec)
			})
			g := f.get("/api/r/a")
			if f.settled(); g.err == nil && g.text != text {
				t.Errorf("a body without its digest was completed")
			}
			if g.err != nil && len(g.text) > peerSize-heldBackBytes {
				t.Errorf("%d of %d bytes were sent", len(g.text), peerSize)
			}
			f.wantStored("a", g.err == nil)
			f.get("/api/r/a").wantStatus(200).wantBody(text)
		})
	}
}

// A replica that neither sends nor shows that it lives is given up after 5 s;
// one that shows it is waited for.
func TestSilentReplica(t *testing.T) {
	text := noise(1, peerSize)
	half := text[:peerSize/2]
	head := func(p *peerScript) {
		p.head(peerRecord(text), peerSize, `"1"`)
		p.data(half)
	}
	for _, c := range []struct {
		name string
		play func(p *peerScript)
		want time.Duration
		asks int
	}{
		{"before its headers", nil, replicaTimeout, 1},
		{"after its headers", func(p *peerScript) { <-p.r.Context().Done() }, replicaTimeout, 1},
		{"in the middle", func(p *peerScript) { head(p); <-p.r.Context().Done() }, replicaTimeout, 1},
		{"in a frame", func(p *peerScript) { head(p); p.raw("d\x00\x00\x00\xffabc"); <-p.r.Context().Done() }, replicaTimeout, 1},
		{"but for its heart", func(p *peerScript) {
			head(p)
			for range 30 {
				time.Sleep(replicaHeartbeat)
				p.frame(frameHeartbeat, "")
			}
			p.data(text[len(half):])
			p.end(peerRecord(text))
		}, 30 * replicaHeartbeat, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				tt := newBubbleTester(t)
				f := &fleet{tester: tt, board: newBoard(), all: []*tester{tt}}
				f.join(tt)
				f.board.leaseTo(f.key("a"), "http://peer")
				tt.cache.replicaClient.Transport = playedBy(t, c.play)
				f.origin.file("/a", text).etag(`"1"`)
				began := time.Now()
				tt.get("/api/r/a").wantStatus(200).wantBody(text)
				if took := time.Since(began); took != c.want {
					t.Errorf("it took %v, want %v", took, c.want)
				}
				tt.wantRequests("/a", c.asks)
			})
		})
	}
}

// playedBy is the way to a peer without sockets; play is nil where there never
// is an answer.
func playedBy(t *testing.T, play func(p *peerScript)) http.RoundTripper {
	return transportFunc(func(r *http.Request) (*http.Response, error) {
		if play == nil {
			<-r.Context().Done()
			return nil, r.Context().Err()
		}
		in, out := io.Pipe()
		p := newPeer(t, pipeWriter{out}, r)
		stop := context.AfterFunc(r.Context(), func() { out.CloseWithError(r.Context().Err()) })
		go func() {
			play(p)
			stop()
			out.Close()
		}()
		return &http.Response{StatusCode: 200, Header: http.Header{leaseHeader: {p.answer}}, Body: in, Request: r}, nil
	})
}

type pipeWriter struct{ io.Writer }

func (pipeWriter) Header() http.Header { return nil }
func (pipeWriter) WriteHeader(int)     {}

// What upstream answers to the filling replica is the answer of all.
func TestVerdictsAreHandedOver(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		answer func(o *testOrigin) http.HandlerFunc
		status int
		detail string
		asks   int
	}{
		{"404", func(*testOrigin) http.HandlerFunc { return answers(404) }, 404, "answered 404", 1},
		{"429", func(*testOrigin) http.HandlerFunc { return answers(429, "Retry-After: 7") }, 503, "429", 1},
		{"401", func(*testOrigin) http.HandlerFunc { return answers(401) }, 502, "credentials", 1},
		{"403", func(*testOrigin) http.HandlerFunc { return answers(403) }, 403, "403", 1},
		{"500", func(*testOrigin) http.HandlerFunc { return answers(500) }, 502, "answered 500", 1},
		{"folder", func(*testOrigin) http.HandlerFunc { return answers(301, "Location: /a/") }, 302, "folder", 2},
		{"unreachable", func(o *testOrigin) http.HandlerFunc { return o.resets }, 502, "reach", 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, 2)
			answer, gate := c.answer(f.origin), make(chan struct{})
			f.origin.troubled(func(w http.ResponseWriter, r *http.Request) {
				<-gate
				answer(w, r)
			})
			replies := f.askBoth("/api/r/a")
			close(gate)
			for range 2 {
				g := <-replies
				g.wantDetail(c.status, c.detail)
				switch c.name {
				case "429":
					g.wantHeader("Retry-After", "7")
				case "folder":
					g.wantHeader("Location", "a/")
				}
			}
			f.wantRequests("/a", c.asks)
		})
	}
}

// askBoth has the first replica fill and the second follow it.
func (f *fleet) askBoth(path string) chan *got {
	f.Helper()
	replies := make(chan *got, 2)
	ask := func(tt *tester) { go func() { replies <- tt.get(path) }() }
	ask(f.all[0])
	f.eventually("the fill", func() bool { return f.all[0].flying() == 1 && f.holder("a") != nil })
	ask(f.all[1])
	f.eventually("the follower", func() bool { return f.all[0].waiting("a") == 2 })
	return replies
}

func (f *fleet) holder(path string) *leaseHolder {
	f.board.mu.Lock()
	defer f.board.mu.Unlock()
	return f.board.holders[f.key(path)]
}

// One question whether a copy is still good serves all replicas.
func TestRevalidationIsShared(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, `mutable_patterns: ["."]`, "check_mutable_updates: true")
	file := f.origin.file("/a", "one").etag(`"1"`)
	f.all[0].get("/api/r/a").wantMiss()
	expire := func() {
		for _, tt := range f.all {
			tt.advance(2 * time.Hour)
		}
		f.origin.forget()
	}
	hold := func() (release func()) {
		gate := make(chan struct{})
		f.origin.troubled(func(w http.ResponseWriter, r *http.Request) {
			<-gate
			file.serve(w, r)
		})
		return func() { close(gate) }
	}
	expire()
	release := hold()
	replies := f.askBoth("/api/r/a")
	release()
	for range 2 {
		(<-replies).wantRevalidated().wantBody("one")
	}
	f.wantRequests("/a", 1)
	for _, tt := range f.all {
		tt.get("/api/r/a").wantHit().wantBody("one")
	}
	expire()
	file = f.origin.file("/a", "two").etag(`"2"`)
	release = hold()
	replies = f.askBoth("/api/r/a")
	release()
	for range 2 {
		(<-replies).wantStatus(200).wantBody("two").wantHeader("X-Artifact-Source", "remote")
	}
	f.wantRequests("GET /a", 1)
	f.settled()
	for _, tt := range f.all {
		tt.get("/api/r/a").wantHit().wantBody("two")
	}
}

// "Unchanged" is said of a version: who has another one asks himself.
func TestUnchangedIsSaidOfAVersion(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1, `mutable_patterns: ["."]`, "check_mutable_updates: true")
	f.origin.file("/a", "one").etag(`"1"`)
	f.get("/api/r/a").wantMiss()
	f.advance(2 * time.Hour)
	f.origin.file("/a", "two").etag(`"2"`)
	f.script(func(p *peerScript) { p.over(replicaOutcome{Kind: "unchanged", Copy: peerRecord("two").SHA256}) })
	f.get("/api/r/a").wantStatus(200).wantBody("two")
	f.settled()
	f.advance(2 * time.Hour)
	f.script(func(p *peerScript) { p.over(replicaOutcome{Kind: "unchanged", Copy: peerRecord("two").SHA256}) })
	f.origin.forget()
	f.get("/api/r/a").wantRevalidated().wantBody("two")
	f.wantRequests("/a", 0)
}

// That upstream refuses one image's way to a blob says nothing about another's.
func TestRefusalOfASharedFileIsNotHandedOver(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1)
	f.origin.file("/a", "text")
	f.digested(func(q *fileRequest) { q.sharedKey = true })
	f.script(func(p *peerScript) { p.over(replicaOutcome{Status: 404, Code: 404, Detail: "not there"}) })
	f.get("/api/r/a").wantMiss().wantBody("text")
}

// What a replica fetches is not for a request that upstream would refuse.
func TestFollowingNeedsPermission(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1)
	f.digested(func(q *fileRequest) { q.behavior = refusingFile{} })
	f.script(func(p *peerScript) { p.over(replicaOutcome{Kind: "unreachable"}) })
	f.get("/api/r/a").wantStatus(http.StatusForbidden)
	f.wantRequests("/a", 0)
}

// refusingFile is the behavior of a file that is not permitted.
type refusingFile struct{ download }

func (refusingFile) permit(context.Context, fileRequest, *record) error { return errDenied }

// A purge on one replica keeps the fill on another from being stored.
func TestPurgeDuringAFillElsewhere(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	old, next := noise(1, 500_000), noise(2, 500_000)
	release := f.origin.file("/a", old).etag(`"1"`).stallAt(1000)
	defer release()
	var clients []*stream
	for _, tt := range f.all {
		s := tt.open("/api/r/a")
		defer s.leave()
		s.read(1000)
		clients = append(clients, s)
	}
	f.all[1].delete("/artifacts/r/a", "Authorization: Bearer t")
	f.origin.file("/a", next).etag(`"2"`)
	f.all[0].get("/api/r/a").wantMiss().wantBody(next) // not what was purged
	f.all[1].get("/api/r/a").wantHit().wantBody(next)
	release()
	for _, s := range clients {
		s.rest().wantStatus(200).wantBody(old) // who has begun gets it all
	}
	f.all[0].awaitEnds(2)
	f.all[1].awaitEnds(1)
	for _, tt := range f.all {
		tt.get("/api/r/a").wantHit().wantBody(next)
		tt.wantNoSpools()
	}
}

// What is being filled has no row yet by which a purge could find it.
func TestPurgeFindsFillsWithoutRows(t *testing.T) {
	t.Parallel()
	for _, query := range []string{"?pattern=^a.b$", "/a%2Bb"} { // all variants, that is
		for by := range 2 {
			f := newFleet(t, 2)
			text := noise(1, peerSize)
			release := f.origin.file("/a%2Bb?v=1", text).stallAt(1000)
			defer release()
			releaseOther := f.origin.file("/a", text).stallAt(1000)
			defer releaseOther()
			s, other := f.open("/api/r/a+b?v=1"), f.open("/api/r/a")
			defer s.leave()
			defer other.leave()
			s.read(1000)
			other.read(1000)
			f.all[by].delete("/artifacts/r"+query, "Authorization: Bearer t")
			release()
			releaseOther()
			s.rest().wantStatus(200).wantBody(text)
			other.rest().wantStatus(200).wantBody(text)
			f.awaitEnds(2)
			if left, _ := f.page(""); len(left) != 1 || left[0] != "a" {
				t.Errorf("%s on replica %d left %q", query, by, left)
			}
			f.wantStored("a", true)
		}
	}
}

// An eviction on one replica takes the old copy, and not what another one has been fetching
// for an hour to replace it.
func TestEvictionDuringAFillElsewhere(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, `mutable_patterns: ["^a$"]`)
	f.origin.file("/a", noise(1, 100_000))
	f.get("/api/r/a").wantMiss()
	for _, tt := range f.all {
		tt.advance(2 * time.Hour)
	}
	f.origin.file("/b", "recent")
	f.get("/api/r/b").wantMiss()
	next := noise(2, 500_000)
	release := f.origin.file("/a", next).stallAt(1000)
	defer release()
	answered := make(chan *got)
	go func() { answered <- f.all[1].get("/api/r/a") }()
	f.eventually("the other to fill", func() bool { return f.all[1].filled("a") == 1000 })
	f.cache.evictor.limit = 20_000
	f.cache.evictor.evictFiles(t.Context())
	f.wantStored("a", false)
	release()
	(<-answered).wantStatus(200).wantBody(next)
	f.all[1].awaitEnds(1)
	f.wantStored("a", true)
}

// gatedObjects are heldObjects that say when they are asked, once.
type gatedObjects struct {
	heldObjects
	putting chan struct{}
}

func (g *gatedObjects) put(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error {
	close(g.putting)
	return g.heldObjects.put(ctx, key, rec, spool, when)
}

// gateFirst has the first replica store when it is let.
func (f *fleet) gateFirst() *gatedObjects {
	g := &gatedObjects{heldObjects{f.all[0].cache.objects, make(chan struct{})}, make(chan struct{})}
	f.all[0].cache.useObjects(g)
	return g
}

func TestPurgeWhileAnotherStores(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	g := f.gateFirst()
	f.origin.file("/a", "old")
	s := f.all[0].open("/api/r/a")
	defer s.leave()
	s.rest().wantMiss().wantBody("old")
	<-g.putting
	f.all[1].delete("/artifacts/r/a", "Authorization: Bearer t")
	close(g.gate)
	f.all[0].awaitEnds(1)
	f.wantStored("a", false)
}

// A purge waits for what is being stored, which may be 50 GB on the way to S3. Eviction has
// other files meanwhile.
func TestEvictionDoesNotWaitForAPurge(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1)
	g := f.gateFirst()
	f.origin.file("/a", "text")
	s := f.open("/api/r/a")
	defer s.leave()
	s.rest().wantMiss()
	<-g.putting
	purged := make(chan *got)
	go func() { purged <- f.delete("/artifacts/r/a", "Authorization: Bearer t") }()
	f.eventually("the purge to wait", func() bool { return !f.cache.fills.isFilling(f.key("a")) })
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if err := f.cache.evictor.removeUnlessBusy(ctx, indexRow{Remote: "r", Key: f.key("a")}, nil); !errors.Is(err, errBusy) || ctx.Err() != nil {
		t.Errorf("evicting: %v", err)
	}
	close(g.gate)
	(<-purged).wantStatus(204)
}

// While one replica stores, the others have the file in their own spools.
func TestFollowersKeepTheFileUntilItIsStored(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	g := f.gateFirst()
	text := noise(1, peerSize)
	f.origin.file("/a", text)
	s := f.all[0].open("/api/r/a")
	defer s.leave()
	s.rest().wantMiss().wantBody(text)
	<-g.putting
	for n := range 3 {
		s := f.all[1].open("/api/r/a")
		defer s.leave()
		if g := s.rest().wantBody(text); n == 0 {
			g.wantJoined()
		} else {
			g.wantHit() // it is all there, and as good as stored
		}
		if n := f.all[1].ended(); n > 0 || f.all[1].flying() != 1 {
			t.Fatalf("%d copies were made and dropped", n)
		}
	}
	close(g.gate)
	f.settled()
	f.all[1].get("/api/r/a").wantHit().wantBody(text)
	f.wantRequests("/a", 1)
}

// A replica that dies over a new version says nothing about the old one: upstream is asked.
func TestReplicaThatDiesOverANewVersion(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1, `mutable_patterns: ["."]`)
	f.origin.file("/a", "old")
	f.get("/api/r/a").wantMiss()
	f.advance(2 * time.Hour)
	text := noise(1, peerSize)
	f.origin.file("/a", text)
	f.script(func(p *peerScript) {
		p.head(peerRecord(text), peerSize, "")
		p.data(text[:peerSize/2])
		p.cut()
	})
	f.get("/api/r/a").wantStatus(200).wantBody(text)
}

// A replica is not silent while a follower makes room for what it said.
func TestFollowerThatIsSlowItself(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		f := &fleet{tester: tt, board: newBoard(), all: []*tester{tt}}
		f.join(tt)
		text := noise(1, peerSize)
		tt.cache.space.diskSpace = func() (diskUsage, error) { return diskUsage{free: room{bytes: peerSize}}, nil } // MIN_FREE is more
		tt.cache.space.reclaimer = &slowReclaimer{}
		f.board.leaseTo(f.key("a"), "http://peer")
		tt.cache.replicaClient.Transport = playedBy(t, func(p *peerScript) {
			p.head(peerRecord(text), peerSize, `"1"`)
			p.data(text)
			p.end(peerRecord(text))
		})
		f.origin.file("/a", text).etag(`"1"`)
		tt.get("/api/r/a").wantStatus(200).wantBody(text)
		tt.wantRequests("/a", 0)
	})
}

// What the leader may not store is not worth what is stored.
func TestFollowerMakesNoRoomForWhatIsNotStored(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		f := &fleet{tester: tt, board: newBoard(), all: []*tester{tt}}
		f.join(tt)
		text := noise(1, peerSize)
		reclaimer := &slowReclaimer{}
		tt.cache.space.reclaimer = reclaimer
		tt.cache.space.diskSpace = func() (diskUsage, error) { return diskUsage{free: room{bytes: peerSize}}, nil }
		f.board.leaseTo(f.key("a"), "http://peer")
		tt.cache.replicaClient.Transport = playedBy(t, func(p *peerScript) {
			_ = p.json(frameHead, replicaHead{peerRecord(text), peerSize, `"1"`, 0, false})
		})
		f.origin.file("/a", text)
		tt.get("/api/r/a").wantStatus(200).wantBody(text)
		if reclaimer.asked > 0 {
			t.Error("something was removed for it")
		}
	})
}

// slowReclaimer frees all that is asked for, and takes its time.
type slowReclaimer struct{ asked int }

func (*slowReclaimer) reclaimable() room { return room{1 << 30, 1 << 20} }
func (s *slowReclaimer) reclaim(need room, _ func(int64)) room {
	s.asked++
	time.Sleep(2 * replicaTimeout)
	return need
}

// A body that is all there needs nothing from upstream when its replica dies, and cannot
// have it by Range.
func TestReplicaThatDiesBeforeItsLastWord(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1)
	text := noise(1, peerSize)
	f.script(func(p *peerScript) {
		p.head(peerRecord(text), peerSize, `"1"`)
		p.data(text)
		p.cut()
	})
	f.get("/api/r/a").wantStatus(200).wantBody(text)
	f.settled()
	f.wantStored("a", true)
	f.wantRequests("/a", 0)
}

// What a replica died over storing, those who followed it store.
func TestReplicaThatDiesWhileItStores(t *testing.T) {
	t.Parallel()
	text := noise(1, peerSize)
	for _, storable := range []bool{true, false} {
		f := newFleet(t, 1)
		f.script(func(p *peerScript) {
			_ = p.json(frameHead, replicaHead{peerRecord(text), peerSize, `"1"`, 0, storable})
			p.data(text)
			p.end(peerRecord(text))
			p.frame(frameHeartbeat, "")
			p.cut()
		})
		f.get("/api/r/a").wantJoined().wantBody(text)
		f.settled()
		f.wantStored("a", storable)
	}
}

// A version that another replica stored meanwhile is not undone.
func TestReplacedWhileAnotherStores(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	g := f.gateFirst()
	f.origin.file("/a", "text")
	s := f.all[0].open("/api/r/a")
	defer s.leave()
	s.rest().wantMiss()
	<-g.putting
	f.board.set(func() { delete(f.board.holders, f.key("a")) }) // the lease is lost
	f.all[1].get("/api/r/a").wantMiss()
	f.eventually("the second to be stored", func() bool { return f.all[1].flying() == 0 })
	close(g.gate)
	f.all[0].awaitEnds(1)
	f.wantStored("a", true)
}

// Without Redis, and with a lease that is lost, replicas fetch for themselves.
func TestReplicasWithoutALease(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	text := noise(1, peerSize)
	release := f.origin.file("/a", text).stallAt(1000)
	defer release()
	f.board.set(func() { f.board.down = true })
	first := f.all[0].open("/api/r/a")
	defer first.leave()
	first.read(1000)
	second := f.all[1].open("/api/r/a")
	defer second.leave()
	second.read(1000)
	release()
	first.rest().wantMiss().wantBody(text)
	second.rest().wantMiss().wantBody(text)
	f.wantRequests("/a", 2)
	f.settled()
	f.board.set(func() { f.board.down = false })
	f.all[1].get("/api/r/a").wantHit().wantBody(text)
}

// Who comes between a lookup that missed and the lease finds what was stored
// in between.
func TestLeaseThatWasFreeFindsTheFileStored(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	f.origin.file("/a", "text")
	missed := &missOnce{objects: f.all[1].cache.objects}
	f.all[1].cache.useObjects(missed)
	f.all[0].get("/api/r/a").wantMiss()
	f.settled()
	f.all[1].get("/api/r/a").wantHit().wantBody("text")
	f.wantRequests("/a", 1)
}

// missOnce has not heard of its first key yet.
type missOnce struct {
	objects
	once sync.Once
}

func (m *missOnce) open(ctx context.Context, key string, off int64) (obj *object, err error) {
	m.once.Do(func() { err = fs.ErrNotExist })
	if err != nil {
		return nil, err
	}
	return m.objects.open(ctx, key, off)
}

// The way between replicas is for who knows the lease's token, and nothing but
// that way heeds it.
func TestTokenOfALease(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1)
	text := noise(1, peerSize)
	release := f.origin.file("/a", text).etag(`"1"`).stallAt(1000)
	defer release()
	s := f.open("/api/r/a")
	defer s.leave()
	s.read(1000)
	token := f.holder("a").token
	show := func(key, token string) string {
		return leaseHeader + ": " + f.cache.replicaKey.newStream(key, token, "nonce").request
	}
	good := show(f.key("a"), token)
	forged := replicaKey("another secret").newStream(f.key("a"), token, "nonce").request
	for _, bad := range []string{leaseHeader + ": ", leaseHeader + ": x", leaseHeader + ": " + token, leaseHeader + ": " + forged, good + "0", show(f.key("a"), token+"x"), show(f.key("a"), ""), show(f.key("b"), token)} {
		g := f.open(replicaPath+f.key("a"), bad)
		g.wantStatus(404).wantHeader(leaseHeader, "")
		g.leave()
	}
	f.get(replicaPath+f.key("b"), show(f.key("b"), token)).wantStatus(404)
	f.get(replicaPath, show("", token)).wantStatus(404)
	stream := f.cache.replicaKey.newStream(f.key("a"), token, "nonce")
	p := f.open(replicaPath+f.key("a"), good)
	defer p.leave()
	p.wantStatus(200).wantHeader(leaseHeader, stream.answer)
	q := f.open("/api/r/a", good)
	defer q.leave()
	release()
	q.rest().wantJoined().wantBody(text)
	s.rest().wantMiss().wantBody(text)
	frames := p.rest().text
	var kinds []byte
	body, r := "", strings.NewReader(frames)
	for r.Len() > 0 {
		kind, payload, err := stream.readFrame(r)
		must(t, err)
		if kind == frameData {
			body += string(payload)
		}
		if kind != frameHeartbeat { // these stand where their time comes, behind the end too
			kinds = append(kinds, kind)
		}
	}
	if body != text || kinds[0] != frameHead || kinds[len(kinds)-1] != frameEnd {
		t.Errorf("frames %q with %d bytes", kinds, len(body))
	}
	f.settled()
	f.get(replicaPath+f.key("a"), good).wantStatus(404) // it has ended
	f.wantRequests("/a", 1)
}

func TestOutcomesSurviveTheWay(t *testing.T) {
	t.Parallel()
	for _, o := range []replicaOutcome{{Kind: "unchanged"}, {Kind: "again"}, {Kind: "unreachable"}, {Kind: "timeout"},
		{Status: 503, Code: 429, Detail: "limits", Retry: 7 * time.Second}} {
		outcome, ok := o.toOutcome()
		if got := newReplicaOutcome(outcome); got != o || !ok {
			t.Errorf("%+v came as %+v, %v", o, got, ok)
		}
	}
	for _, own := range []fillOutcome{failedOutcome(errDigest), {kind: outcomeNoSpool}, failedOutcome(errAbandoned)} {
		o := newReplicaOutcome(own)
		if _, ok := o.toOutcome(); o.Kind != "self" || ok {
			t.Errorf("%+v is told as %+v", own, o)
		}
	}
}

func FuzzPeerFrames(f *testing.F) {
	f.Add([]byte("b\x00\x00\x00\x00d\x00\x00\x00\x03abc"), uint16(40))
	f.Add([]byte("d\x00\x10\x00\x00short"), uint16(0))
	f.Add([]byte("e\xff\xff\xff\xff"), uint16(5))
	f.Fuzz(func(t *testing.T, in []byte, at uint16) {
		newStream := func() *replicaStream { return replicaKey("secret").newStream("key", "token", "nonce") }
		if _, _, err := newStream().readFrame(bytes.NewReader(in)); err == nil {
			t.Fatalf("%q was read without a seal", in)
		}
		var out bytes.Buffer
		from, to := newStream(), newStream()
		for range 2 {
			must(t, from.writeFrame(&out, frameData, in))
		}
		wire := bytes.Clone(out.Bytes())
		for range 2 {
			if kind, payload, err := to.readFrame(&out); err != nil || kind != frameData || !bytes.Equal(payload, in) {
				t.Fatalf("%q came back as %q, %v", in, payload, err)
			}
		}
		wire[int(at)%len(wire)]++
		r, to, intact := bytes.NewReader(wire), newStream(), 0
		for ; intact < 2; intact++ {
			if _, _, err := to.readFrame(r); err != nil {
				break
			}
		}
		if intact == 2 {
			t.Errorf("changed at %d, both frames were read", int(at)%len(wire))
		}
		var o replicaOutcome
		if json.Unmarshal(in, &o) != nil {
			return
		}
		if outcome, ok := o.toOutcome(); ok && (outcome.kind == outcomeBody || (outcome.kind == outcomeFailed) != (outcome.err != nil)) {
			t.Errorf("%+v is %+v", o, outcome)
		}
	})
}
