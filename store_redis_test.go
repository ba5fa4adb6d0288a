package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// fakeRedis is a server that speaks as much of the protocol as redisStore
// uses, with a clock of its own.
type fakeRedis struct {
	t    testing.TB
	name string
	auth string // user and password, or none is needed

	mu      sync.Mutex
	ln      net.Listener
	conns   map[net.Conn]*bufio.Writer
	subs    map[net.Conn]string
	values  map[string]fakeValue
	scripts map[string]string
	dbs     map[string]bool
	at      time.Time
	silent  bool
	refuse  string // the answer to all SETs
	deaf    bool   // refuses SUBSCRIBE
	mute    bool   // refuses PUBLISH
	calls   int
	wg      sync.WaitGroup
}

type fakeValue struct {
	text string
	dies time.Time
}

func newFakeRedis(t testing.TB) *fakeRedis {
	f := &fakeRedis{t: t, name: "127.0.0.1:0", at: testDay, conns: map[net.Conn]*bufio.Writer{}, subs: map[net.Conn]string{}, scripts: map[string]string{}, dbs: map[string]bool{}}
	f.start()
	t.Cleanup(func() {
		f.stop()
		f.wg.Wait()
	})
	return f
}

// start serves, empty, as Redis does that keeps nothing on disk.
func (f *fakeRedis) start() {
	f.t.Helper()
	ln, err := net.Listen("tcp", f.name)
	if err != nil {
		f.t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ln, f.name, f.values, f.silent = ln, ln.Addr().String(), map[string]fakeValue{}, false
	clear(f.scripts)
	f.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			f.wg.Go(func() { f.serve(c) })
		}
	})
}

func (f *fakeRedis) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ln.Close()
	for c := range f.conns {
		c.Close()
	}
}

func (f *fakeRedis) with(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeRedis) advance(d time.Duration) { f.with(func() { f.at = f.at.Add(d) }) }

func (f *fakeRedis) serve(c net.Conn) {
	in, out := bufio.NewReader(c), bufio.NewWriter(c)
	f.with(func() { f.conns[c] = out })
	defer func() {
		c.Close()
		f.with(func() { delete(f.conns, c); delete(f.subs, c) })
	}()
	for {
		args, err := readCommand(in)
		if err != nil {
			return
		}
		f.with(func() {
			f.calls++
			if !f.silent {
				f.answer(c, out, args)
				out.Flush()
			}
		})
	}
}

// readCommand reads an array of bulk strings.
func readCommand(in *bufio.Reader) ([]string, error) {
	n, err := readLength(in, "*")
	args := make([]string, n)
	for i := range args {
		size, lerr := readLength(in, "$")
		if err = errors.Join(err, lerr); err != nil {
			break
		}
		b := make([]byte, size+2)
		_, err = io.ReadFull(in, b)
		args[i] = string(b[:size])
	}
	return args, err
}

func readLength(in *bufio.Reader, kind string) (int, error) {
	line, err := in.ReadString('\n')
	text, ok := strings.CutPrefix(strings.TrimSpace(line), kind)
	if err == nil && !ok {
		err = fmt.Errorf("%q is not %s", line, kind)
	}
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(text)
}

func bulk(s string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(s), s) }

// answer runs a command. mu is held.
func (f *fakeRedis) answer(c net.Conn, out *bufio.Writer, args []string) {
	switch reply := f.run(c, args); {
	case reply == "PONG" && f.subs[c] != "":
		io.WriteString(out, "*2\r\n"+bulk("pong")+bulk(""))
	default:
		io.WriteString(out, map[bool]string{true: "+", false: ""}[reply == "OK" || reply == "PONG"]+reply)
		if reply == "OK" || reply == "PONG" {
			io.WriteString(out, "\r\n")
		}
	}
}

func (f *fakeRedis) run(c net.Conn, args []string) string {
	switch name := strings.ToUpper(args[0]); name {
	case "AUTH":
		if f.auth != strings.Join(args[1:], " ") {
			return "-WRONGPASS no\r\n"
		}
		return "OK"
	case "SELECT":
		f.dbs[args[1]] = true
		return "OK"
	case "PING":
		return "PONG"
	case "SET":
		return f.set(args[1], args[2], args[3:])
	case "GET":
		if v, ok := f.get(args[1]); ok {
			return bulk(v)
		}
		return "$-1\r\n"
	case "DEL":
		_, ok := f.get(args[1])
		delete(f.values, args[1])
		return fmt.Sprintf(":%d\r\n", map[bool]int{true: 1}[ok])
	case "EVAL", "EVALSHA":
		return f.eval(name, args)
	case "SUBSCRIBE":
		if f.deaf {
			return "-NOPERM this user has no permissions to access the channel\r\n"
		}
		f.subs[c] = args[1]
		return "*3\r\n" + bulk("subscribe") + bulk(args[1]) + ":1\r\n"
	case "PUBLISH":
		if f.mute {
			return "-NOPERM this user has no permissions to access one of the channels used as arguments\r\n"
		}
		return f.publish(args[1], args[2])
	}
	return "-ERR unknown command " + args[0] + "\r\n"
}

func (f *fakeRedis) get(key string) (string, bool) {
	v, ok := f.values[key]
	return v.text, ok && v.dies.After(f.at)
}

func (f *fakeRedis) set(key, value string, options []string) string {
	if f.refuse != "" {
		return f.refuse
	}
	life := "0"
	for i, o := range options {
		_, taken := f.get(key)
		if o == "NX" && taken {
			return "$-1\r\n"
		}
		if o == "PX" {
			life = options[i+1]
		}
	}
	ms, _ := strconv.Atoi(life)
	f.values[key] = fakeValue{value, f.at.Add(time.Duration(ms) * time.Millisecond)}
	return "OK"
}

// eval knows the two scripts by their text, and by their sum once it has seen
// the text.
func (f *fakeRedis) eval(name string, args []string) string {
	script := args[1]
	if name == "EVALSHA" {
		if script = f.scripts[args[1]]; script == "" {
			return "-NOSCRIPT no\r\n"
		}
	}
	key, value := args[3], args[4]
	held, taken := f.get(key)
	for _, s := range []*redis.Script{leaseScript, releaseScript} {
		f.scripts[s.Hash()] = map[bool]string{true: "'SET'", false: "'DEL'"}[s == leaseScript]
	}
	switch takes := !strings.Contains(script, "'DEL'"); {
	case takes && taken && held != value:
		return "*2\r\n" + bulk(held) + bulk("")
	case takes:
		if refusal := f.set(key, value, []string{"PX", args[5]}); refusal != "OK" {
			return refusal
		}
		ended, isKnown := f.get(key + ":ended")
		return "*2\r\n" + bulk(value) + bulk(map[bool]string{true: ended}[isKnown])
	case held != value:
		return ":0\r\n"
	}
	delete(f.values, key)
	f.set(key+":ended", "ended", []string{"PX", args[5]})
	return ":1\r\n"
}

func (f *fakeRedis) publish(channel, text string) string {
	n := 0
	for c, name := range f.subs {
		if name == channel {
			io.WriteString(f.conns[c], "*3\r\n"+bulk("message")+bulk(channel)+bulk(text))
			f.conns[c].Flush()
			n++
		}
	}
	return fmt.Sprintf(":%d\r\n", n)
}

// redisTester is one replica's store.
type redisTester struct {
	*testing.T
	*redisStore
	out *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func startRedis(t *testing.T, rawURL, prefix, port string) *redisTester {
	t.Helper()
	return startRedisAt(t, rawURL, prefix, port, time.Now)
}

// startRedisAt is startRedis with a clock.
func startRedisAt(t *testing.T, rawURL, prefix, port string, now func() time.Time) *redisTester {
	t.Helper()
	out := new(lockedBuffer)
	u, err := url.Parse(rawURL)
	must(t, err)
	r := newRedisStore(u, prefix, replicaKey(prefix), func(ip string) string { return "http://" + net.JoinHostPort(ip, port) }, now, slog.New(slog.NewTextHandler(out, nil)))
	r.timeout = 20 * time.Second // on a busy machine a fake takes longer than redisTimeout
	t.Cleanup(func() { r.Close() })
	return &redisTester{t, r, out}
}

// heard is what a watch heard, in order.
type heard chan string

func (r *redisTester) listenIn() heard {
	h := make(heard, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { r.watchChanges(ctx, func(key string) { h <- key }, func() { h <- "reset" }) })
	r.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return h
}

func (h heard) want(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-h:
		if got != want {
			t.Fatalf("heard %q, want %q", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("never heard %q", want)
	}
}

// mayLease asks for a lease and wants to get it, or another to have it.
func (r *redisTester) mayLease(key string, wantOther bool) (func(), *leaseHolder) {
	r.Helper()
	l, err := r.acquireLease(r.Context(), key, rand.Text())
	if err != nil || (l.other != nil) != wantOther || (l.release == nil) != wantOther {
		r.Fatalf("lease %s: %v, %v; want another to have it: %v", key, l.other, err, wantOther)
	}
	return l.release, l.other
}

// wantEnded takes a free lease and ends it: whether one has ended before must be known.
func (r *redisTester) wantEnded(key string, want bool) {
	r.Helper()
	l, err := r.acquireLease(r.Context(), key, rand.Text())
	if err != nil || l.release == nil || l.wasHeld != want {
		r.Fatalf("lease %s: %+v, %v; want it to have been held: %v", key, l, err, want)
	}
	l.release()
}

// held is the number of leases that the replica believes to have.
func (r *redisTester) held() (n int) {
	r.leases.Range(func(_, _ any) bool { n++; return true })
	return n
}

func TestRedisFreshnessOverFake(t *testing.T) {
	t.Parallel()
	testFreshness(t, func(t *testing.T) freshness {
		return startRedis(t, "redis://"+newFakeRedis(t).name, "b", "1").redisStore
	})
}

func TestRedisMarksAreSharedAndDie(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	a, b := startRedis(t, "redis://"+f.name, "b", "1"), startRedis(t, "redis://"+f.name, "b", "2")
	c := startRedis(t, "redis://"+f.name, "c", "3")
	m := freshnessMark{testDay, "sum"}
	if err := a.setMark(t.Context(), "k", m); err != nil {
		t.Fatal(err)
	}
	wantMark(t, b, "k", m)
	wantNoMark(t, c, "k") // another cache in the same Redis
	f.with(func() { f.values["artifactapi:b:fresh:bad"] = fakeValue{"what is this", f.at.Add(time.Hour)} })
	wantNoMark(t, a, "bad")
	f.advance(markLife)
	wantNoMark(t, a, "k")
}

func TestRedisLease(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	a, b := startRedis(t, "redis://"+f.name, "", "8001"), startRedis(t, "redis://"+f.name, "", "8002")
	release, _ := a.mayLease("k", false)
	_, other := b.mayLease("k", true)
	if other.addr != "http://127.0.0.1:8001" || len(other.token) < 20 {
		t.Errorf("%+v", other)
	}
	b.mayLease("another", false)
	if again, err := a.acquireLease(t.Context(), "k", rand.Text()); again.release != nil || again.other != nil || err != nil {
		t.Errorf("its own lease is another's: %v, %v", again.other, err)
	}
	b.mayLease("k", true)
	for range 4 {
		f.advance(leaseLife - time.Second)
		if err := a.renewLeases(t.Context()); err != nil {
			t.Fatal(err)
		}
		b.mayLease("k", true)
	}
	release()
	release()
	mine, _ := b.mayLease("k", false)
	release()
	a.mayLease("k", true)
	mine()
}

// Who takes a lease learns whether another has just ended: its file may be stored by now.
func TestRedisLeaseThatHasEnded(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	testEndedLease(startRedis(t, "redis://"+f.name, "", "8001"), startRedis(t, "redis://"+f.name, "", "8002"))
	f.advance(leaseMemory)
	startRedis(t, "redis://"+f.name, "", "8003").wantEnded("brief", false)
}

func testEndedLease(a, b *redisTester) {
	a.Helper()
	a.wantEnded("brief", false)
	b.wantEnded("brief", true)
	b.wantEnded("other", false)
}

// Whoever can write to Redis cannot send a replica anywhere.
func TestRedisLeaseThatNoReplicaMade(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	a, b := startRedis(t, "redis://"+f.name, "b", "8001"), startRedis(t, "redis://"+f.name, "b", "8002")
	at := a.prefix + "lease:k"
	put := func(value string) { f.with(func() { f.values[at] = fakeValue{value, f.at.Add(time.Hour)} }) }
	a.mayLease("another", false)
	others, _ := f.get(a.prefix + "lease:another")
	stranger := startRedis(t, "redis://"+f.name, "b", "8003")
	stranger.key = replicaKey("another secret")
	for _, bad := range []string{"", "x", "self token http://127.0.0.1:9", "self token http://127.0.0.1:9 ", "self token http://127.0.0.1:9 " + strings.Repeat("00", 32),
		others, stranger.signLease("k", "self token http://127.0.0.1:9"),
		a.signLease("k", "self token ftp://127.0.0.1:9"), a.signLease("k", "self token http://127.0.0.1:9/path"), a.signLease("k", "self token http://u:p@127.0.0.1:9"),
		a.signLease("k", "self token //127.0.0.1:9"), a.signLease("k", "self token ")} {
		put(bad)
		if l, err := b.acquireLease(t.Context(), "k", rand.Text()); l.release != nil || l.other != nil || err != nil {
			t.Errorf("%q: %+v, %v, want no lease and no holder", bad, l.other, err)
		}
	}
	put(a.signLease("k", "self token http://127.0.0.1:9"))
	b.mayLease("k", true)
	if n := strings.Count(b.out.String(), "replicas must have the same secret"); n != 1 {
		t.Errorf("%d lines about it, want 1:\n%s", n, b.out)
	}
}

func TestRedisLeaseOfTheDead(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	a, b := startRedis(t, "redis://"+f.name, "", "1"), startRedis(t, "redis://"+f.name, "", "2")
	release, _ := a.mayLease("k", false)
	f.advance(leaseLife - time.Millisecond)
	b.mayLease("k", true)
	f.advance(time.Millisecond)
	b.mayLease("k", false)
	// a was only slow: it finds out and leaves the lease to b.
	if err := a.renewLeases(t.Context()); err != nil || a.held() != 0 {
		t.Errorf("%v, %d leases", err, a.held())
	}
	release()
	a.mayLease("k", true)
}

func TestRedisLeaseOutlivesRedis(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	a, b := startRedis(t, "redis://"+f.name, "", "1"), startRedis(t, "redis://"+f.name, "", "2")
	release, _ := a.mayLease("k", false)
	f.stop()
	f.start() // empty
	if err := a.renewLeases(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.mayLease("k", true)
	release()
	b.mayLease("k", false)
}

func TestRedisCloseReleases(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	a, b := startRedis(t, "redis://"+f.name, "", "1"), startRedis(t, "redis://"+f.name, "", "2")
	a.mayLease("k", false)
	a.Close()
	b.mayLease("k", false)
}

func TestRedisAnnounce(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	a, b := startRedis(t, "redis://"+f.name, "", "1"), startRedis(t, "redis://"+f.name, "", "2")
	if a.hearsChanges() {
		t.Error("online without a subscription")
	}
	testAnnounce(t, a, b, f.stop, f.start)
}

// testAnnounce tells between two stores, over an outage of Redis.
func testAnnounce(t *testing.T, a, b *redisTester, stop, start func()) {
	ha, hb := a.listenIn(), b.listenIn()
	ha.want(t, "reset")
	hb.want(t, "reset")
	announce := func(from *redisTester, key string) {
		t.Helper()
		if err := from.announceChange(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	announce(a, "r/1/of a")
	announce(b, "r/2/of b")
	announce(a, "r/3/of a")
	hb.want(t, "r/1/of a")
	hb.want(t, "r/3/of a")
	ha.want(t, "r/2/of b") // and none of its own
	stop()
	waitUntil(t, "offline", func() bool { return !a.hearsChanges() && !b.hearsChanges() })
	start()
	ha.want(t, "reset")
	hb.want(t, "reset")
	waitUntil(t, "online", func() bool { return a.hearsChanges() && b.hearsChanges() })
	// Just after the outage a request may still be late on a busy machine.
	waitUntil(t, "announced", func() bool { return a.announceChange(t.Context(), "r/4/again") == nil })
	hb.want(t, "r/4/again")
}

// waitUntil waits for what another goroutine is about to do.
func waitUntil(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		<-time.After(5 * time.Millisecond)
	}
	t.Fatalf("never %s", what)
}

func TestRedisDown(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	f.auth = "hunter2"
	at := testDay
	r := startRedisAt(t, "redis://:hunter2@"+f.name, "", "1", func() time.Time { return at })
	if err := r.ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.stop()
	for range 3 {
		_, err := r.getMark(t.Context(), "k")
		_, lerr := r.acquireLease(t.Context(), "k", "token")
		for _, err := range []error{err, lerr, r.setMark(t.Context(), "k", freshnessMark{}), r.announceChange(t.Context(), "k"), r.ping(t.Context())} {
			if !errors.Is(err, errStoreDown) {
				t.Errorf("while it is down: %v", err)
			}
		}
	}
	r.wantLine("level=ERROR", "redis="+f.name, "connection refused")
	f.start()
	if err := r.ping(t.Context()); !errors.Is(err, errStoreDown) || f.calls > 3 {
		t.Errorf("asked again at once: %v", err)
	}
	at = at.Add(redisPause)
	if err := r.ping(t.Context()); err != nil {
		t.Errorf("back, and not used: %v", err)
	}
	if _, err := r.getMark(t.Context(), "k"); errors.Is(err, errStoreDown) {
		t.Errorf("get: %v", err)
	}
	r.wantLine("Redis is up again", "redis="+f.name, "after=1s")
	if strings.Contains(r.out.String(), "hunter2") {
		t.Error("the password is in the log")
	}
}

// wantLine checks that one line of the log has text, and that it has the rest too.
func (r *redisTester) wantLine(text string, rest ...string) {
	r.Helper()
	var lines []string
	for line := range strings.Lines(r.out.String()) {
		if strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	missing := func(part string) bool { return !strings.Contains(lines[0], part) }
	if len(lines) != 1 || slices.ContainsFunc(rest, missing) {
		r.Errorf("the log says %q; want one line with %q and %q", lines, text, rest)
	}
}

// TestRedisSlowRequestIsNoOutage: a request gets no answer while others do.
func TestRedisSlowRequestIsNoOutage(t *testing.T) {
	t.Parallel()
	at := testDay
	r := startRedisAt(t, "redis://"+newFakeRedis(t).name, "", "1", func() time.Time { return at })
	began := at
	at = at.Add(redisTimeout)
	if err := r.ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.outage.fail(errStoreDown, began)
	if err := r.ping(t.Context()); err != nil || strings.Contains(r.out.String(), "down") {
		t.Errorf("it is taken for an outage: %v\n%s", err, r.out)
	}
}

// Connections that died while they were idle are no outage.
func TestRedisStartedAgain(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	r := startRedis(t, "redis://"+f.name, "", "1")
	for range 3 {
		if err := r.setMark(t.Context(), "k", freshnessMark{testDay, "s"}); err != nil {
			t.Fatal(err)
		}
		f.stop()
		f.start()
	}
	if strings.Contains(r.out.String(), "down") {
		t.Errorf("%s", r.out)
	}
}

func TestRedisThatNeverAnswers(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	r := startRedis(t, "redis://"+f.name, "", "1")
	if err := r.ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.timeout = redisTimeout
	f.with(func() { f.silent = true })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.ping(ctx); !errors.Is(err, errStoreDown) || r.outage.outageCause() != nil {
		t.Errorf("a caller with little time: %v, %v", err, r.outage.outageCause())
	}
	mustEnd(t, func() {
		if _, err := r.getMark(t.Context(), "k"); !errors.Is(err, errStoreDown) {
			t.Errorf("get: %v", err)
		}
	})
	mustEnd(t, func() { // as they would not, did each wait for redisTimeout
		for range 100 {
			r.getMark(t.Context(), "k")
		}
	})
}

// Who waits for a connection while dead ones are closed gets a new one.
func TestRedisConnectionsDieUnderManyCallers(t *testing.T) {
	t.Parallel()
	r := startRedis(t, "redis://"+newFakeRedis(t).name, "", "1")
	var using, callers sync.WaitGroup
	die := make(chan struct{})
	using.Add(redisConns)
	for range redisConns {
		first := true
		use := func(context.Context, redis.Conn) error {
			if !first {
				return nil
			}
			first = false
			using.Done()
			<-die
			return io.EOF
		}
		callers.Go(func() {
			if err := r.withConn(t.Context(), use); err != nil {
				t.Errorf("once more: %v", err)
			}
		})
	}
	using.Wait()
	for range redisConns {
		callers.Go(func() {
			if err := r.ping(t.Context()); err != nil {
				t.Errorf("who waited: %v", err)
			}
		})
	}
	close(die)
	callers.Wait()
}

// More callers than there are connections wait when Redis hangs, and all their time ends
// with that of the first, whose failure closes the connections.
func TestRedisHangsUnderManyCallers(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	r := startRedis(t, "redis://"+f.name, "", "1")
	must(t, r.ping(t.Context()))
	r.timeout = 100 * time.Millisecond
	f.with(func() { f.silent = true })
	var callers sync.WaitGroup
	for range 10 * redisConns {
		callers.Go(func() {
			defer func() {
				if p := recover(); p != nil {
					t.Errorf("panic: %v", p)
				}
			}()
			if _, err := r.getMark(t.Context(), "k"); !errors.Is(err, errStoreDown) {
				t.Errorf("get: %v", err)
			}
		})
	}
	callers.Wait()
}

func TestRedisWatchOfSilence(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	r := startRedis(t, "redis://"+f.name, "", "1")
	h := r.listenIn()
	h.want(t, "reset")
	waitUntil(t, "online", r.hearsChanges)
	f.with(func() { f.silent = true })
	waitUntil(t, "offline", func() bool { return !r.hearsChanges() })
	f.with(func() { f.silent = false })
	h.want(t, "reset")
}

// A Redis that works but lets nobody subscribe has a line of its own, and one when it does.
func TestRedisWithoutAnnouncements(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	f.deaf = true
	r := startRedisAt(t, "redis://"+f.name, "", "1", func() time.Time { return testDay })
	h := r.listenIn()
	waitUntil(t, "told", func() bool { return strings.Contains(r.out.String(), "do not arrive") })
	f.with(func() { f.deaf = false })
	h.want(t, "reset")
	r.wantLine("announcements of other replicas do not arrive", f.name, "NOPERM")
	r.wantLine("announcements of other replicas arrive again", f.name, "after=0s")
}

// TestRedisWithoutChannels: other replicas would use what they have for ever where this one
// cannot tell them of a change, so that is an outage until it can.
func TestRedisWithoutChannels(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	f.mute = true
	now := atomic.Pointer[time.Time]{}
	now.Store(&testDay)
	r := startRedisAt(t, "redis://"+f.name, "", "1", func() time.Time { return *now.Load() })
	if err := r.ping(t.Context()); err != nil {
		t.Errorf("ping of a single machine, which tells nobody: %v", err)
	}
	r.announces = true
	for range 3 {
		if err := r.ping(t.Context()); !errors.Is(err, errStoreDown) || !strings.Contains(err.Error(), "channels") {
			t.Errorf("ping: %v; want errStoreDown", err)
		}
		later := now.Load().Add(redisPause)
		now.Store(&later)
	}
	f.with(func() { f.mute = false })
	if err := r.ping(t.Context()); err != nil {
		t.Errorf("ping: %v", err)
	}
	r.wantLine("Redis is down", "NOPERM")
	r.wantLine("Redis is up again")
}

// TestRedisThatRefuses: a server that answers but takes no writes is down, though it
// answers reads, and its connections are given up.
func TestRedisThatRefuses(t *testing.T) {
	t.Parallel()
	for _, refusal := range []string{
		"READONLY You can't write against a read only replica.",
		"MOVED 3999 127.0.0.1:6381",
		"CLUSTERDOWN The cluster is down",
		"LOADING Redis is loading the dataset in memory",
		"MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
		"OOM command not allowed when used memory > 'maxmemory'.",
		"MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
		"NOPERM this user has no permissions to run the 'set' command",
		"ERR Error running script (call to f_0123): @user_script:3: @user_script: 3: -READONLY You can't write against a read only replica.",
	} {
		t.Run(refusal[:8], func(t *testing.T) {
			t.Parallel()
			f := newFakeRedis(t)
			at := atomic.Pointer[time.Time]{}
			at.Store(&testDay)
			r := startRedisAt(t, "redis://"+f.name, "", "1", func() time.Time { return *at.Load() })
			h := r.listenIn()
			h.want(t, "reset")
			wantNoMark(t, r, "k")
			f.with(func() { f.refuse = "-" + refusal + "\r\n" })
			if err := r.setMark(t.Context(), "k", freshnessMark{}); !errors.Is(err, errStoreDown) || !strings.Contains(err.Error(), refusal) {
				t.Errorf("set: %v", err)
			}
			waitUntil(t, "closed", func() (closed bool) { f.with(func() { closed = len(f.conns) == 0 }); return closed })
			for range 3 { // whoever asks first after the pause
				later := at.Load().Add(redisPause)
				at.Store(&later)
				if _, err := r.getMark(t.Context(), "k"); !errors.Is(err, errStoreDown) || r.hearsChanges() {
					t.Errorf("get: %v", err)
				}
				if err := r.ping(t.Context()); !errors.Is(err, errStoreDown) {
					t.Errorf("ping: %v", err)
				}
			}
			r.wantLine("Redis is down", f.name, refusal[:4])
			f.with(func() { f.refuse = "" })
			later := at.Load().Add(redisPause)
			at.Store(&later)
			if err := r.ping(t.Context()); err != nil {
				t.Errorf("ping: %v", err)
			}
			h.want(t, "reset")
			r.wantLine("Redis is up again")
			if strings.Contains(r.out.String(), "announcements") {
				t.Errorf("one outage has more lines than two: %s", r.out)
			}
		})
	}
}

// TestRedisReadsDoNotEndAnOutage: a replica answers reads, also those that were under
// way when the outage began.
func TestRedisReadsDoNotEndAnOutage(t *testing.T) {
	t.Parallel()
	f := newFakeRedis(t)
	r := startRedis(t, "redis://"+f.name, "", "1")
	err := r.withConn(t.Context(), func(context.Context, redis.Conn) error {
		f.with(func() { f.refuse = "-READONLY no\r\n" })
		r.ping(t.Context())
		return nil
	})
	if err != nil || r.outage.outageCause() == nil {
		t.Errorf("%v, %v", err, r.outage.outageCause())
	}
}

// TestRedisRefusesOneCommand: that is no outage.
func TestRedisRefusesOneCommand(t *testing.T) {
	t.Parallel()
	r := startRedis(t, "redis://"+newFakeRedis(t).name, "", "1")
	if err := r.runCommand(t.Context(), "NONSENSE"); !errors.Is(err, errStoreDown) || !strings.Contains(err.Error(), "unknown command") {
		t.Errorf("an unknown command: %v", err)
	}
	if err := r.ping(t.Context()); err != nil || r.out.String() != "" {
		t.Errorf("it is taken for an outage: %v, %s", err, r.out)
	}
}

func TestRedisURL(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{"127.0.0.1:6379", "http://:hunter2@h", "redis://", "redis://:hunter2@h:port", "redis://:hunter2@h/name", "redis://:hunter2@h/-1", "redis://:hunter2%zz@h"} {
		_, err := parseSettings(envOf(map[string]string{"REDIS_URL": bad}))
		if err == nil || !strings.Contains(err.Error(), "REDIS_URL") || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	f := newFakeRedis(t)
	for user, auth := range map[string]string{":hunter2": "hunter2", "joe:hunter2": "joe hunter2", ":a%20b": "a b"} {
		f.with(func() { f.auth = auth })
		r := startRedis(t, "redis://"+user+"@"+f.name+"/3", "", "1")
		if err := r.ping(t.Context()); err != nil || r.localIP.Load() != "127.0.0.1" {
			t.Errorf("%s: %v, %v", user, err, r.localIP.Load())
		}
	}
	if !f.dbs["3"] {
		t.Error("the database number is not used")
	}
	r := startRedis(t, "redis://:wrong-hunter2@"+f.name, "", "1")
	if err := r.ping(t.Context()); !errors.Is(err, errStoreDown) || strings.Contains(fmt.Sprint(err, r.out), "hunter2") {
		t.Errorf("wrong password: %v", err)
	}
	if r := startRedis(t, "rediss://[::1]", "", "1"); r.address != "[::1]:6379" {
		t.Errorf("address %s", r.address)
	}
}

// What follows needs a Redis: TEST_REDIS is its URL.

func realRedis(t *testing.T) (rawURL, prefix string, w *wire) {
	t.Helper()
	raw := os.Getenv("TEST_REDIS")
	if raw == "" {
		t.Skip("TEST_REDIS is not set")
	}
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal("TEST_REDIS is not a URL")
	}
	w = newWire(t, u.Host)
	u.Host = w.address()
	return u.String(), "test-" + rand.Text(), w
}

func TestRealRedisFreshness(t *testing.T) {
	t.Parallel()
	realRedis(t)
	testFreshness(t, func(t *testing.T) freshness {
		u, prefix, _ := realRedis(t)
		return startRedis(t, u, prefix, "1").redisStore
	})
}

func TestRealRedisLease(t *testing.T) {
	t.Parallel()
	u, prefix, _ := realRedis(t)
	a, b := startRedis(t, u, prefix, "8001"), startRedis(t, u, prefix, "8002")
	testEndedLease(a, b)
	release, _ := a.mayLease("k", false)
	if _, other := b.mayLease("k", true); other.addr != "http://127.0.0.1:8001" {
		t.Errorf("%+v", other)
	}
	at := a.prefix + "lease:k"
	life := func() (ms int) {
		t.Helper()
		err := a.withConn(t.Context(), func(ctx context.Context, c redis.Conn) (err error) {
			ms, err = redis.Int(redis.DoContext(c, ctx, "PTTL", at))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return ms
	}
	if err := a.runCommand(t.Context(), "PEXPIRE", at, 100_000); err != nil {
		t.Fatal(err)
	}
	if err := a.renewLeases(t.Context()); err != nil || life() > 15_000 || life() < 10_000 {
		t.Errorf("after a beat: %d ms, %v", life(), err)
	}
	// Redis forgets it.
	if err := errors.Join(a.runCommand(t.Context(), "DEL", at), a.renewLeases(t.Context())); err != nil {
		t.Error(err)
	}
	b.mayLease("k", true)
	// Its holder dies.
	if err := a.runCommand(t.Context(), "DEL", at); err != nil {
		t.Fatal(err)
	}
	mine, _ := b.mayLease("k", false)
	if err := a.renewLeases(t.Context()); err != nil || a.held() != 0 {
		t.Error(err, a.held())
	}
	release()
	a.mayLease("k", true)
	mine()
	a.mayLease("k", false)
}

func TestRealRedisAnnounce(t *testing.T) {
	t.Parallel()
	u, prefix, w := realRedis(t)
	testAnnounce(t, startRedis(t, u, prefix, "1"), startRedis(t, u, prefix, "2"), w.cut, w.mend)
}

func TestRealRedisThatNeverAnswers(t *testing.T) {
	t.Parallel()
	u, prefix, w := realRedis(t)
	r := startRedis(t, u, prefix, "1")
	r.timeout = redisTimeout
	h := r.listenIn()
	h.want(t, "reset")
	w.hush()
	mustEnd(t, func() {
		if err := r.setMark(t.Context(), "k", freshnessMark{testDay, "s"}); !errors.Is(err, errStoreDown) {
			t.Errorf("set: %v", err)
		}
	})
	if r.hearsChanges() {
		t.Error("online while Redis is silent")
	}
	waitUntil(t, "unsubscribed", func() bool { return !r.subscribed.Load() })
	w.speak()
	waitUntil(t, "usable again", func() bool { return r.ping(t.Context()) == nil && r.hearsChanges() })
	h.want(t, "reset")
}

// redisServer is a server of the test's own, on a port of its own.
type redisServer struct {
	t      *testing.T
	binary string
	port   string
	cmd    *exec.Cmd
}

func newRedisServer(t *testing.T) *redisServer {
	t.Helper()
	realRedis(t)
	binary, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("redis-server is not installed")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	ln.Close()
	s := &redisServer{t: t, binary: binary, port: port}
	s.start()
	t.Cleanup(func() { s.stop() })
	return s
}

func (s *redisServer) url() string { return "redis://:hunter2@127.0.0.1:" + s.port + "/5" }

func (s *redisServer) start() {
	s.t.Helper()
	s.cmd = exec.Command(s.binary, "--port", s.port, "--bind", "127.0.0.1", "--save", "", "--dir", s.t.TempDir(),
		"--requirepass", "hunter2", "--masterauth", "hunter2")
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *redisServer) stop() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// TestRedisServerStops runs a server of its own, for real: stopped, started
// again, and suspended.
func TestRedisServerStops(t *testing.T) {
	t.Parallel()
	server := newRedisServer(t)
	a, b := startRedis(t, server.url(), "", "1"), startRedis(t, server.url(), "", "2")
	waitUntil(t, "up", func() bool { return a.ping(t.Context()) == nil && b.ping(t.Context()) == nil })
	testAnnounce(t, a, b, server.stop, server.start)
	a.mayLease("k", false)
	b.mayLease("k", true)
}

// service leads to one of several servers, as a Service of Kubernetes does.
// Connections that exist stay with their server.
type service struct {
	ln net.Listener
	to atomic.Value // the address of the server
}

func newService(t *testing.T, to string) *service {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{ln: ln}
	s.to.Store(to)
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait) // the stores and the servers are closed by then
	t.Cleanup(func() { ln.Close() })
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				server, err := net.Dial("tcp", s.to.Load().(string))
				if err != nil {
					return
				}
				wg.Go(func() {
					io.Copy(server, c)
					server.Close()
				})
				io.Copy(c, server)
			})
		}
	})
	return s
}

// TestRealRedisFailover: the primary becomes a replica, and the service leads to the
// new primary. Neither the connections nor the subscription stay with the old one.
func TestRealRedisFailover(t *testing.T) {
	t.Parallel()
	old, next := newRedisServer(t), newRedisServer(t)
	way := newService(t, "127.0.0.1:"+old.port)
	u := "redis://:hunter2@" + way.ln.Addr().String() + "/5"
	a, b := startRedis(t, u, "", "1"), startRedis(t, u, "", "2")
	admin, other := startRedis(t, old.url(), "", "3"), startRedis(t, next.url(), "", "4")
	waitUntil(t, "up", func() bool { return admin.ping(t.Context()) == nil && other.ping(t.Context()) == nil })
	ha, hb := a.listenIn(), b.listenIn()
	ha.want(t, "reset")
	hb.want(t, "reset")
	if err := errors.Join(a.ping(t.Context()), b.ping(t.Context())); err != nil {
		t.Fatal(err)
	}

	waitUntil(t, "demoted", func() bool { return admin.runCommand(t.Context(), "REPLICAOF", "127.0.0.1", next.port) == nil })
	for range 3 { // nobody promoted the other yet
		if err := a.ping(t.Context()); !errors.Is(err, errStoreDown) || a.hearsChanges() {
			t.Errorf("ping of a replica: %v", err)
		}
		<-time.After(redisPause)
	}
	a.wantLine("Redis is down", "READONLY")
	way.to.Store("127.0.0.1:" + next.port)
	up := func() bool {
		return a.ping(t.Context()) == nil && b.ping(t.Context()) == nil && a.hearsChanges() && b.hearsChanges()
	}
	waitUntil(t, "up again", up)
	ha.want(t, "reset")
	hb.want(t, "reset")
	old.stop()
	// On a busy machine a subscription may have timed out and led to the new primary
	// before the outage was seen, which then ends it once more: another reset, and
	// what is announced in between is lost. So it is announced until it is heard.
	waitUntil(t, "heard of by the other", func() bool {
		if err := a.announceChange(t.Context(), "r/1/f"); err != nil {
			return false
		}
		select {
		case got := <-hb:
			if got != "reset" && got != "r/1/f" {
				t.Fatalf("heard %q", got)
			}
			return got == "r/1/f"
		case <-time.After(redisTimeout):
			return false
		}
	})
}
