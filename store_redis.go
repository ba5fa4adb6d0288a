// store_redis.go: what replicas share through Redis: when copies were last
// found good, who fills what, and which files have changed. All of it may be
// lost at any time; it costs a revalidation or a second download.

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	// redisTimeout bounds everything asked of Redis, the connection included: a
	// request waits for it.
	redisTimeout = 500 * time.Millisecond
	// redisPause is how long Redis is left alone after it failed.
	redisPause = time.Second
	// redisConns bounds the connections of one replica; redisIdle closes those
	// that a burst left, before middle boxes forget them.
	redisConns = 64
	redisIdle  = time.Minute
	// markLife is when a mark is forgotten that nobody renewed: its file then
	// is as old as its record says. Marks of files that are gone must not
	// stay for ever, and few TTLs are longer.
	markLife = 30 * 24 * time.Hour
	// leaseLife is when a lease without a heartbeat is dead (SPEC.md section
	// 8). leaseInterval is how often beat should be called: two beats may be lost.
	leaseLife     = 15 * time.Second
	leaseInterval = 5 * time.Second
	// maxLeaseTries bounds how often a lease may end between asking for it and
	// asking who has it.
	maxLeaseTries = 3
	// watchInterval is how often a subscription is asked whether it is alive, and
	// watchTimeout how long it may be silent: a purge has to be seen everywhere
	// within a second, or known not to be.
	watchInterval = 300 * time.Millisecond
	watchTimeout  = time.Second
	// watchPause is between two attempts to subscribe.
	watchPause = 300 * time.Millisecond
)

var (
	_ freshness = (*redisStore)(nil)
	_ replicas  = (*redisStore)(nil)
)

// renewScript keeps a lease, and takes it again after Redis has lost it; 0
// says that another process has it.
var renewScript = redis.NewScript(1, `local v = redis.call('GET', KEYS[1])
if v == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) return 1 end
if v then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1`)

// releaseScript ends a lease, if it still is the caller's.
var releaseScript = redis.NewScript(1, `if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0`)

// redisStore implements freshness and replicas. After a failure it answers
// errStoreDown at once for a second; then one call, usually ping's, tries.
type redisStore struct {
	address   string // host:port
	options   []redis.DialOption
	prefix    string // of all keys and of the channel
	channel   string
	self      string // names this process in announcements
	password  secret // kept out of errors
	advertise func(localIP string) string
	now       func() time.Time
	log       *slog.Logger
	pause     time.Duration // watchPause but in tests

	mu         sync.Mutex // guards the rest; never held across I/O
	pool       *redis.Pool
	broken     error     // why Redis is down; nil: it is not, as far as known
	next       time.Time // when one call is to try again
	ip         string    // our end of the connection made last
	subscribed bool
	leases     map[string]string // what we hold: value by key of Redis
}

// newRedisStore does not connect yet. prefix keeps caches apart that share a
// Redis (the bucket's name). advertise makes the address at which other
// replicas reach this one of the local IP of its Redis connection; it is asked
// with each lease.
func newRedisStore(rawURL, prefix string, advertise func(localIP string) string, now func() time.Time, log *slog.Logger) (*redisStore, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Hostname() == "" || u.Scheme != "redis" && u.Scheme != "rediss" {
		// The error of url.Parse would show the password.
		return nil, errors.New("REDIS_URL is not a URL like redis://:PASSWORD@HOST:6379/0 or rediss:// for TLS")
	}
	db := 0
	if name := strings.Trim(u.Path, "/"); name != "" {
		if db, err = strconv.Atoi(name); err != nil || db < 0 {
			return nil, errors.New("REDIS_URL: the path is not a database number") // it may be a piece of a password
		}
	}
	port := u.Port()
	if port == "" {
		port = "6379"
	}
	password, _ := u.User.Password()
	r := &redisStore{
		address: net.JoinHostPort(u.Hostname(), port), prefix: "artifactapi:" + prefix + ":", self: rand.Text(),
		password: secret(password), advertise: advertise, now: now, log: log, pause: watchPause, leases: map[string]string{},
	}
	// Channels are shared by all databases of a server.
	r.channel = r.prefix + strconv.Itoa(db) + ":changed"
	r.options = []redis.DialOption{
		redis.DialUsername(u.User.Username()), redis.DialPassword(password), redis.DialDatabase(db),
		redis.DialUseTLS(u.Scheme == "rediss"), redis.DialTLSHandshakeTimeout(redisTimeout),
		redis.DialReadTimeout(redisTimeout), redis.DialWriteTimeout(redisTimeout),
		redis.DialContextFunc(r.dialTCP),
	}
	r.pool = r.newPool()
	return r, nil
}

func (r *redisStore) newPool() *redis.Pool {
	return &redis.Pool{
		DialContext: r.dialRedis, MaxActive: redisConns, MaxIdle: redisConns, IdleTimeout: redisIdle, Wait: true,
	}
}

// dialRedis makes a connection that is logged in, within ctx.
func (r *redisStore) dialRedis(ctx context.Context) (redis.Conn, error) {
	return redis.DialContext(ctx, "tcp", r.address, r.options...)
}

// dialTCP remembers our end of the connection.
func (r *redisStore) dialTCP(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := (&net.Dialer{Timeout: redisTimeout}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if a, ok := c.LocalAddr().(*net.TCPAddr); ok {
		r.mu.Lock()
		r.ip = a.IP.String()
		r.mu.Unlock()
	}
	return c, nil
}

// localIP is the address of this machine that faces Redis, and so most likely
// the other replicas; "" before the first connection.
func (r *redisStore) localIP() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ip
}

// getMark: see freshness. A mark that cannot be read is none.
func (r *redisStore) getMark(ctx context.Context, key string) (m freshnessMark, err error) {
	err = r.withConn(ctx, func(ctx context.Context, c redis.Conn) error {
		v, err := redis.String(redis.DoContext(c, ctx, "GET", r.markKey(key)))
		if err != nil && !errors.Is(err, redis.ErrNil) {
			return err
		}
		var ok bool
		if m, ok = parseMark(v); !ok {
			return fs.ErrNotExist
		}
		return nil
	})
	if err != nil {
		return freshnessMark{}, fmt.Errorf("freshness of %s: %w", key, err)
	}
	return m, nil
}

// setMark: see freshness.
func (r *redisStore) setMark(ctx context.Context, key string, m freshnessMark) error {
	value := strconv.FormatInt(m.GoodAt.UnixNano(), 10) + " " + m.SHA256
	return r.runCommand(ctx, "SET", r.markKey(key), value, "PX", markLife.Milliseconds())
}

// delete: see freshness. A mark that is not there is no error.
func (r *redisStore) delete(ctx context.Context, key string) error {
	return r.runCommand(ctx, "DEL", r.markKey(key))
}

func (r *redisStore) markKey(key string) string  { return r.prefix + "fresh:" + key }
func (r *redisStore) leaseKey(key string) string { return r.prefix + "lease:" + key }

func parseMark(v string) (freshnessMark, bool) {
	at, sum, ok := strings.Cut(v, " ")
	nanos, err := strconv.ParseInt(at, 10, 64)
	return freshnessMark{time.Unix(0, nanos).UTC(), sum}, ok && err == nil
}

// acquireLease: see replicas. A key that this process has leased already (its fill
// was purged and goes on for its clients) is not leased again.
func (r *redisStore) acquireLease(ctx context.Context, key, token string) (release func(), other *leaseHolder, err error) {
	at := r.leaseKey(key)
	err = r.withConn(ctx, func(ctx context.Context, c redis.Conn) error {
		// The address is known now that there is a connection.
		value := r.self + " " + token + " " + r.advertise(r.localIP())
		for range maxLeaseTries {
			holder, err := setLease(ctx, c, at, value)
			switch {
			case err != nil:
				return err
			case holder == value:
				r.rememberLease(at, value)
				release = func() { r.releaseLease(at, value) }
				return nil
			case strings.HasPrefix(holder, r.self+" "):
				return nil
			case holder != "":
				other = parseLeaseHolder(holder)
				return nil
			}
		}
		return nil // it comes and goes: fill without
	})
	if err != nil {
		return nil, nil, fmt.Errorf("leasing %s: %w", key, err)
	}
	return release, other, nil
}

// acquireLease returns the value that holds the lease: ours, another's, or none
// if the other's has just ended.
func setLease(ctx context.Context, c redis.Conn, at, value string) (string, error) {
	_, err := redis.String(redis.DoContext(c, ctx, "SET", at, value, "NX", "PX", leaseLife.Milliseconds()))
	if !errors.Is(err, redis.ErrNil) {
		return value, err
	}
	holder, err := redis.String(redis.DoContext(c, ctx, "GET", at))
	if errors.Is(err, redis.ErrNil) {
		return "", nil
	}
	return holder, err
}

// parseLeaseHolder reads a lease: process, token and address.
func parseLeaseHolder(v string) *leaseHolder {
	_, rest, _ := strings.Cut(v, " ")
	token, addr, _ := strings.Cut(rest, " ")
	return &leaseHolder{addr: addr, token: token}
}

func (r *redisStore) rememberLease(at, value string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leases[at] = value
}

// forgetLease forgets a lease; it tells whether it was still known.
func (r *redisStore) forgetLease(at, value string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.leases[at] == value
	if known {
		delete(r.leases, at)
	}
	return known
}

// releaseLease ends a lease. Where Redis cannot be told it dies by itself.
func (r *redisStore) releaseLease(at, value string) {
	if r.forgetLease(at, value) {
		r.deleteLease(at, value)
	}
}

func (r *redisStore) deleteLease(at, value string) {
	err := r.withConn(context.Background(), func(ctx context.Context, c redis.Conn) error {
		_, err := releaseScript.DoContext(ctx, c, at, value)
		return err
	})
	if err != nil {
		r.log.Debug("a lease is left to die", "lease", at, "error", err)
	}
}

// renewLeases is the step of the loop that keeps our leases, to be called each
// leaseInterval. A lease that another process has taken is forgotten: both fill.
func (r *redisStore) renewLeases(ctx context.Context) error {
	r.mu.Lock()
	held := make(map[string]string, len(r.leases))
	for at, value := range r.leases {
		held[at] = value
	}
	r.mu.Unlock()
	if len(held) == 0 {
		return nil
	}
	for at, value := range held {
		var kept int
		err := r.withConn(ctx, func(ctx context.Context, c redis.Conn) (err error) {
			kept, err = redis.Int(renewScript.DoContext(ctx, c, at, value, leaseLife.Milliseconds()))
			return err
		})
		if err != nil {
			return fmt.Errorf("keeping leases: %w", err)
		}
		if kept == 0 {
			r.forgetLease(at, value)
		} else if !r.holdsLease(at, value) { // released meanwhile, and brought back by us
			r.deleteLease(at, value)
		}
	}
	return nil
}

func (r *redisStore) holdsLease(at, value string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.leases[at] == value
}

// announceChange: see replicas.
func (r *redisStore) announceChange(ctx context.Context, key string) error {
	return r.runCommand(ctx, "PUBLISH", r.channel, r.self+" "+key)
}

// hearsChanges: see replicas.
func (r *redisStore) hearsChanges() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.subscribed && r.broken == nil
}

// watchChanges: see replicas. It connects again until ctx ends.
func (r *redisStore) watchChanges(ctx context.Context, changed func(key string), reset func()) {
	told := false // of an outage
	for ctx.Err() == nil {
		err := r.subscribe(ctx, changed, func() {
			told = false
			reset()
		})
		r.setSubscribed(false)
		if ctx.Err() != nil {
			return
		}
		if !told {
			r.log.Warn("announcements of other replicas do not arrive: hot copies are checked before use", "error", redact(err, r.password))
		}
		told = true
		wait := time.NewTimer(r.pause)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
		}
	}
}

func (r *redisStore) setSubscribed(is bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.subscribed = is
}

// subscribe is one subscription, to its end.
func (r *redisStore) subscribe(ctx context.Context, changed func(key string), reset func()) error {
	dialing, cancel := context.WithTimeout(ctx, redisTimeout)
	c, err := r.dialRedis(dialing)
	cancel()
	if err != nil {
		return err
	}
	ps := redis.PubSubConn{Conn: c}
	defer ps.Close()
	if err := ps.Subscribe(r.channel); err != nil {
		return err
	}
	ctx, cancel = context.WithCancel(ctx)
	var pinging sync.WaitGroup
	pinging.Go(func() {
		defer ps.Close() // ends the wait for a message when ctx ends
		pingSubscription(ctx, ps)
	})
	defer pinging.Wait()
	defer cancel()
	for {
		switch m := ps.ReceiveWithTimeout(watchTimeout).(type) {
		case error:
			return m
		case redis.Subscription:
			// From here on nothing is missed; what came before may have been.
			reset()
			r.worked()
			r.setSubscribed(true)
		case redis.Message:
			if sender, key, _ := strings.Cut(string(m.Data), " "); sender != r.self {
				changed(key)
			}
		}
	}
}

// pingSubscription pings a subscription, so that its silence means something, until
// ctx or the connection ends.
func pingSubscription(ctx context.Context, ps redis.PubSubConn) {
	t := time.NewTicker(watchInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if ps.Ping("") != nil {
				return
			}
		}
	}
}

// ping asks Redis whether it answers: errStoreDown if not. It is what finds
// out that Redis is back, so it should be called twice a second.
func (r *redisStore) ping(ctx context.Context) error { return r.runCommand(ctx, "PING") }

// Close releases what is leased and ends all connections but watch's.
func (r *redisStore) Close() error {
	r.mu.Lock()
	held := r.leases
	r.leases = map[string]string{}
	r.mu.Unlock()
	for at, value := range held {
		r.deleteLease(at, value)
	}
	return r.currentPool().Close()
}

// runCommand is do for a command whose answer says nothing.
func (r *redisStore) runCommand(ctx context.Context, command string, args ...any) error {
	return r.withConn(ctx, func(ctx context.Context, c redis.Conn) error {
		_, err := redis.DoContext(c, ctx, command, args...)
		return err
	})
}

// withConn runs f with a connection, within redisTimeout, and learns from it whether
// Redis is up. Its errors are fs.ErrNotExist of f and errStoreDown.
func (r *redisStore) withConn(ctx context.Context, f func(context.Context, redis.Conn) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	pool, err := r.turn()
	if err != nil {
		return err
	}
	inner, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	got, err := withPoolConn(inner, pool, f)
	if got && isStaleConn(err) { // Redis was started again, or closed what was idle
		pool = r.replacePool(pool)
		got, err = withPoolConn(inner, pool, f)
	}
	refused, _ := errors.AsType[redis.Error](err)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		r.worked()
		return err
	case isCallerTimeout(ctx, inner, err): // which says nothing about Redis
		return fmt.Errorf("%w: redis: %w", errStoreDown, cmp.Or(ctx.Err(), context.DeadlineExceeded))
	case got && refused != "": // Redis is there and does not like this, such as being full
		return fmt.Errorf("%w: redis: %s", errStoreDown, redact(err, r.password))
	}
	return r.failed(pool, err)
}

// isCallerTimeout tells that err is of the caller's context and not of our own
// patience. redigo's deadline may pass a moment before the context's.
func isCallerTimeout(ctx, inner context.Context, err error) bool {
	theirs, has := ctx.Deadline()
	ours, _ := inner.Deadline()
	late := errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
	return ctx.Err() != nil || has && theirs.Equal(ours) && late
}

// withPoolConn runs f with a connection, if it got one.
func withPoolConn(ctx context.Context, pool *redis.Pool, f func(context.Context, redis.Conn) error) (got bool, err error) {
	c, err := pool.GetContext(ctx)
	if err != nil {
		return false, err
	}
	defer c.Close()
	return true, f(ctx, c)
}

// turn is the pool to use. While Redis is down there is none, but for one call
// a second.
func (r *redisStore) turn() (*redis.Pool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.broken != nil {
		if r.now().Before(r.next) {
			return nil, fmt.Errorf("%w: redis: %w", errStoreDown, r.broken)
		}
		r.next = r.now().Add(redisPause)
	}
	return r.pool, nil
}

// worked notes that Redis answers.
func (r *redisStore) worked() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.broken != nil {
		r.log.Info("redis is usable again")
	}
	r.broken = nil
}

// failed notes that Redis cannot be used.
func (r *redisStore) failed(used *redis.Pool, err error) error {
	text := errors.New(redact(err, r.password))
	r.replacePool(used)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.broken == nil {
		r.log.Error("redis is down: freshness is what the records say, and replicas do not hear of each other", "error", text)
	}
	r.broken, r.next = text, r.now().Add(redisPause)
	return fmt.Errorf("%w: redis: %w", errStoreDown, text)
}

// replacePool drops the connections of a pool in which one was found dead: they die
// together. It returns the pool to use.
func (r *redisStore) replacePool(used *redis.Pool) *redis.Pool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if used == r.pool {
		r.pool = r.newPool()
		used.Close() // closes what is idle; the rest when it is given back
	}
	return r.pool
}

func (r *redisStore) currentPool() *redis.Pool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pool
}
