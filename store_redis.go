// store_redis.go: what replicas share through Redis: freshness marks, leases of
// fills, and announcements of changes. All of it may be lost at any time, which
// costs a revalidation or a second download.

package main

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	// redisTimeout bounds each use of Redis, the connection included, because a
	// client waits for it.
	redisTimeout = 500 * time.Millisecond
	// redisPause is how long Redis is not asked after a failure. /health has to see
	// within a second that it is back.
	redisPause = time.Second
	// redisConns bounds the connections of one replica. redisIdle closes those that
	// are left of a burst, before a firewall forgets them.
	redisConns = 64
	redisIdle  = time.Minute
	// markLife is when a mark that is not renewed is forgotten; its file is then as
	// old as its record says. It removes the marks of files that are gone, and few
	// TTLs are longer.
	markLife = 30 * 24 * time.Hour
	// leaseLife is when a lease that is not renewed ends. leaseInterval is how often
	// renewLeases should be called, so that two calls may fail.
	leaseLife     = 15 * time.Second
	leaseInterval = 5 * time.Second
	// watchInterval is how often a subscription is pinged, and watchTimeout how long
	// it may be silent: a purge has to be seen by all replicas within a second, or
	// be known to be missed. It is the pause between two attempts to subscribe, too.
	watchInterval = 300 * time.Millisecond
	watchTimeout  = time.Second
	// watchPatience is how often it fails before the log says so: until then it says whether
	// Redis itself is down.
	watchPatience = 5
)

var (
	_ freshness = (*redisStore)(nil)
	_ replicas  = (*redisStore)(nil)
)

// outageRefusal matches the refusals of a server that cannot be used: it is a replica
// since a failover, another node of a cluster, still loading, full, or not ours to write
// to. Before version 7 the refusal of a script stands behind another text.
var outageRefusal = regexp.MustCompile(`(?:^|-)(?:READONLY|MOVED|CLUSTERDOWN|LOADING|MASTERDOWN|NOREPLICAS|OOM|MISCONF|NOPERM|NOAUTH) `)

// leaseScript takes or renews a lease, unless another value has it. Its answer is the
// value that has it then, and what releaseScript may have left.
var leaseScript = redis.NewScript(1, `local v = redis.call('GET', KEYS[1])
if v and v ~= ARGV[1] then return {v, ''} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {ARGV[1], redis.call('GET', KEYS[1] .. ':ended') or ''}`)

// releaseScript ends a lease if it still is the caller's, and leaves a note of that.
var releaseScript = redis.NewScript(1, `if redis.call('GET', KEYS[1]) == ARGV[1] then
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1] .. ':ended', 'ended', 'PX', ARGV[2])
end`)

// redisStore implements freshness and replicas. After a failure everything fails at
// once with errStoreDown, for redisPause; then one call, usually ping's, finds out by a
// write whether Redis is back. Its methods may be called concurrently.
type redisStore struct {
	address    string // host:port
	options    []redis.DialOption
	prefix     string // of all keys and of the channel
	channel    string
	announces  bool   // there may be replicas; it is set before the first use
	self       string // names this process in leases and announcements
	password   secret // is kept out of errors
	key        replicaKey
	unverified sync.Once // the first lease that does not verify is logged
	advertise  func(localIP string) string
	now        func() time.Time
	log        *slog.Logger
	timeout    time.Duration // redisTimeout but in tests
	outage     *circuit
	subscribed atomic.Bool // announcements arrive, as far as the subscription knows
	pool       atomic.Pointer[redis.Pool]
	inUse      chan struct{} // holds one for each connection in use; a pool's own limit panics when the pool is closed
	localIP    atomic.Value  // a string: our end of the connection that was made last, where others most likely reach us
	leases     sync.Map      // that we hold: value by key of Redis, both strings
}

// newRedisStore does not connect yet. u is what parseSettings has checked. prefix separates
// caches that share a Redis, key authenticates leases.
// advertise returns the address at which other replicas reach this one, given the
// local IP of its connection to Redis; it is called for each lease.
func newRedisStore(u *url.URL, prefix string, key replicaKey, advertise func(localIP string) string, now func() time.Time, log *slog.Logger) *redisStore {
	db, _ := strconv.Atoi(strings.Trim(u.Path, "/")) // 0 without a path
	password, _ := u.User.Password()
	r := &redisStore{
		address: net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "6379")), prefix: "artifactapi:" + prefix + ":", self: rand.Text(),
		password: secret(password), key: key, advertise: advertise, now: now, log: log, timeout: redisTimeout, outage: newCircuit(now, redisPause, redisPause),
		inUse: make(chan struct{}, redisConns),
	}
	// Channels belong to all databases of a server, keys to one.
	r.channel = r.prefix + strconv.Itoa(db) + ":changed"
	r.options = []redis.DialOption{
		redis.DialUsername(u.User.Username()), redis.DialPassword(password), redis.DialDatabase(db),
		redis.DialUseTLS(u.Scheme == "rediss"),
		redis.DialContextFunc(func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := (&net.Dialer{Timeout: r.timeout}).DialContext(ctx, network, address)
			if err == nil {
				r.localIP.Store(c.LocalAddr().(*net.TCPAddr).IP.String())
			}
			return c, err
		}),
	}
	r.pool.Store(r.newPool())
	return r
}

func (r *redisStore) newPool() *redis.Pool {
	return &redis.Pool{DialContext: r.dialRedis, MaxIdle: redisConns, IdleTimeout: redisIdle}
}

// dialRedis makes a connection and logs in.
func (r *redisStore) dialRedis(ctx context.Context) (redis.Conn, error) {
	timeouts := []redis.DialOption{redis.DialReadTimeout(r.timeout), redis.DialWriteTimeout(r.timeout), redis.DialTLSHandshakeTimeout(r.timeout)}
	return redis.DialContext(ctx, "tcp", r.address, append(timeouts, r.options...)...)
}

// getMark implements freshness. A mark that cannot be parsed counts as missing.
func (r *redisStore) getMark(ctx context.Context, key string) (m freshnessMark, err error) {
	err = r.withConn(ctx, func(ctx context.Context, c redis.Conn) error {
		v, err := redis.String(redis.DoContext(c, ctx, "GET", r.markKey(key)))
		if err != nil && !errors.Is(err, redis.ErrNil) {
			return err
		}
		at, sum, _ := strings.Cut(v, " ")
		nanos, err := strconv.ParseInt(at, 10, 64)
		if err != nil {
			return fs.ErrNotExist
		}
		m = freshnessMark{time.Unix(0, nanos).UTC(), sum}
		return nil
	})
	if err != nil {
		return freshnessMark{}, fmt.Errorf("freshness of %s: %w", key, err)
	}
	return m, nil
}

// setMark implements freshness.
func (r *redisStore) setMark(ctx context.Context, key string, m freshnessMark) error {
	value := strconv.FormatInt(m.GoodAt.UnixNano(), 10) + " " + m.SHA256
	return r.runCommand(ctx, "SET", r.markKey(key), value, "PX", markLife.Milliseconds())
}

// delete implements freshness. A missing mark is no error.
func (r *redisStore) delete(ctx context.Context, key string) error {
	return r.runCommand(ctx, "DEL", r.markKey(key))
}

func (r *redisStore) markKey(key string) string { return r.prefix + "fresh:" + key }

// acquireLease implements replicas. A key that this process has leased already is
// not leased again: its fill was purged and goes on for its clients.
func (r *redisStore) acquireLease(ctx context.Context, key, token string) (l lease, err error) {
	at := r.prefix + "lease:" + key
	err = r.withConn(ctx, func(ctx context.Context, c redis.Conn) error {
		value := r.signLease(key, r.self+" "+token+" "+r.advertise(r.localIP.Load().(string))) // there is a connection
		holder, wasHeld, err := takeLease(ctx, c, at, value)
		if err != nil {
			return err
		}
		if holder == value {
			r.leases.Store(at, value)
			l = lease{release: func() { r.releaseLease(at, value) }, wasHeld: wasHeld}
		} else {
			l = lease{other: r.readLease(key, holder)}
		}
		return nil
	})
	if err != nil {
		return lease{}, fmt.Errorf("leasing %s: %w", key, err)
	}
	return l, nil
}

// takeLease takes or renews a lease, and returns the value that has it then.
func takeLease(ctx context.Context, c redis.Conn, at, value any) (holder string, wasHeld bool, err error) {
	ended := ""
	answer, err := redis.Values(leaseScript.DoContext(ctx, c, at, value, leaseLife.Milliseconds()))
	if err == nil {
		_, err = redis.Scan(answer, &holder, &ended)
	}
	return holder, ended != "", err
}

// signLease returns the value of a lease of key: process, token, address and their seal.
func (r *redisStore) signLease(key, lease string) string {
	return lease + " " + hex.EncodeToString(r.key.sign("lease", key, lease))
}

// readLease returns who has the lease of key with that value. It is nil for a lease of
// this process, and for one that no replica with our secret has made.
func (r *redisStore) readLease(key, value string) *leaseHolder {
	parts := strings.Split(value, " ")
	if len(parts) != 4 || !isReplicaAddress(parts[2]) || !hmac.Equal([]byte(value), []byte(r.signLease(key, strings.Join(parts[:3], " ")))) {
		r.unverified.Do(func() {
			r.log.Warn("a lease in Redis does not verify and is ignored: replicas must have the same secret (MINIO_SECRET_KEY), bucket and version, and nobody else may write there",
				"redis", r.address, "lease", key)
		})
		return nil
	}
	if parts[0] == r.self {
		return nil
	}
	return &leaseHolder{token: parts[1], addr: parts[2]}
}

// releaseLease ends a lease that is held. While Redis is down the lease ends by itself.
func (r *redisStore) releaseLease(at, value any) {
	if !r.leases.CompareAndDelete(at, value) {
		return
	}
	err := r.withConn(context.Background(), func(ctx context.Context, c redis.Conn) error {
		_, err := releaseScript.DoContext(ctx, c, at, value, leaseMemory.Milliseconds())
		return err
	})
	if err != nil {
		r.log.Debug("a lease was not released and will expire", "lease", at, "error", err)
	}
}

// renewLeases renews all leases that we hold, and takes again those that Redis has lost.
// It is to be called each leaseInterval. A lease that another process has taken is given
// up: both go on filling. One that is released meanwhile may be made again: for leaseLife
// other replicas ask here in vain, and fetch for themselves.
func (r *redisStore) renewLeases(ctx context.Context) (err error) {
	r.leases.Range(func(at, value any) bool {
		var holder string
		err = r.withConn(ctx, func(ctx context.Context, c redis.Conn) (err error) {
			holder, _, err = takeLease(ctx, c, at, value)
			return err
		})
		if err != nil {
			return false
		}
		if holder != value {
			r.leases.CompareAndDelete(at, value)
		}
		return true
	})
	return err
}

// announceChange implements replicas.
func (r *redisStore) announceChange(ctx context.Context, key string) error {
	return r.runCommand(ctx, "PUBLISH", r.channel, r.self+" "+key)
}

// hearsChanges implements replicas.
func (r *redisStore) hearsChanges() bool {
	return r.subscribed.Load() && r.outage.outageCause() == nil
}

// watchChanges implements replicas. It subscribes again until ctx ends.
func (r *redisStore) watchChanges(ctx context.Context, changed func(key string), reset func()) {
	failures, lostAt := 0, time.Time{} // since announcements arrived last
	for ctx.Err() == nil {
		err := r.subscribe(ctx, changed, func() {
			if failures >= watchPatience {
				r.log.Info("announcements of other replicas arrive again", "redis", r.address, "after", r.now().Sub(lostAt).Round(time.Second).String())
			}
			failures = 0
			reset()
		})
		r.subscribed.Store(false)
		if ctx.Err() == nil && !errors.Is(err, errStoreDown) { // else the log tells of Redis
			failures++
			if failures == watchPatience {
				lostAt = r.now()
				r.log.Warn("announcements of other replicas do not arrive: hot copies are checked before use",
					"redis", r.address, "error", redact(err, r.password))
			}
		}
		_ = sleepFor(ctx, watchInterval)
	}
}

// subscribe subscribes once and returns the error that ends the subscription. An outage
// ends it too: the connection may lead to a server that is not the primary any more.
func (r *redisStore) subscribe(ctx context.Context, changed func(key string), reset func()) error {
	if err := r.outage.outageCause(); err != nil {
		return err
	}
	c, err := r.dialRedis(ctx) // the options bound each step of it
	if err != nil {
		return err
	}
	ps := redis.PubSubConn{Conn: c}
	defer ps.Close()
	if err = r.writeProbe(ctx, c); err == nil {
		err = ps.Subscribe(r.channel)
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var pinging sync.WaitGroup
	pinging.Go(func() {
		defer ps.Close() // ends the wait for a message
		// Without pings a dead connection and one without announcements look the same.
		for sleepFor(ctx, watchInterval) == nil && r.outage.outageCause() == nil && ps.Ping("") == nil {
		}
	})
	defer pinging.Wait()
	defer cancel()
	for {
		switch m := ps.ReceiveWithTimeout(watchTimeout).(type) {
		case error:
			return m
		case redis.Subscription:
			// From now on nothing is missed, but something may have been before.
			reset()
			r.subscribed.Store(true)
		case redis.Message:
			if sender, key, _ := strings.Cut(string(m.Data), " "); sender != r.self {
				changed(key)
			}
		}
	}
}

// ping reports whether Redis can be used: errStoreDown if not. It finds out that Redis
// is back, so it should be called twice a second.
func (r *redisStore) ping(ctx context.Context) error { return r.withConn(ctx, r.writeProbe) }

// writeProbe writes a key that expires soon: a replica answers everything else. With
// replicas it speaks where nobody listens, too: a user of Redis may lack the right to channels.
func (r *redisStore) writeProbe(ctx context.Context, c redis.Conn) error {
	_, err := redis.DoContext(c, ctx, "SET", r.prefix+"probe", r.self, "PX", redisPause.Milliseconds())
	if err == nil && r.announces {
		_, err = redis.DoContext(c, ctx, "PUBLISH", r.prefix+"probe", r.self)
	}
	return err
}

// Close releases the leases and closes the connections, but for watchChanges', whose
// ctx closes it.
func (r *redisStore) Close() error {
	r.leases.Range(func(at, value any) bool {
		r.releaseLease(at, value)
		return true
	})
	return r.pool.Load().Close()
}

// runCommand is withConn for one command whose answer does not matter.
func (r *redisStore) runCommand(ctx context.Context, command string, args ...any) error {
	return r.withConn(ctx, func(ctx context.Context, c redis.Conn) error {
		_, err := redis.DoContext(c, ctx, command, args...)
		return err
	})
}

// withConn calls f with a connection, within redisTimeout, and learns from it whether
// Redis is up. f may be called twice. The error is fs.ErrNotExist if f's is, and
// errStoreDown otherwise.
func (r *redisStore) withConn(ctx context.Context, f func(context.Context, redis.Conn) error) error {
	began := r.now()
	inner, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	isProbe := r.outage.outageCause() != nil // if it is admitted
	if err := r.outage.admit(inner); err != nil {
		return err
	}
	pool, got, err := r.useConn(inner, isProbe, f)
	if got && isStaleConn(err) { // Redis was restarted, or closes idle connections (its "timeout")
		r.replacePool(pool)
		pool, got, err = r.useConn(inner, isProbe, f)
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		// Of what began before an outage nothing is learned: a replica answers reads.
		if isProbe || r.outage.outageCause() == nil {
			if lasted, recovered := r.outage.succeed(); recovered {
				r.log.Info("Redis is up again", "redis", r.address, "after", lasted.Round(time.Second).String())
			}
		}
		return err
	}
	if isCallerTimeout(ctx, inner, err) { // which says nothing about Redis
		return fmt.Errorf("%w: Redis: %w", errStoreDown, cmp.Or(ctx.Err(), context.DeadlineExceeded))
	}
	down := fmt.Errorf("%w: Redis at %s: %s", errStoreDown, r.address, redact(err, r.password))
	if refused, ok := errors.AsType[redis.Error](err); ok && got {
		if !outageRefusal.MatchString(refused.Error()) {
			return down // Redis is up and refuses this command
		}
		began = r.now() // reads that succeeded meanwhile do not count
	}
	r.replacePool(pool)
	if r.outage.fail(down, began) {
		r.log.Error("Redis is down: each replica fetches for itself, and freshness counts from what the records say",
			"redis", r.address, "error", down)
	}
	return down
}

// useConn calls f with a connection of pool, if it got one, for a probe after writeProbe.
func (r *redisStore) useConn(ctx context.Context, isProbe bool, f func(context.Context, redis.Conn) error) (pool *redis.Pool, got bool, err error) {
	select {
	case r.inUse <- struct{}{}:
		defer func() { <-r.inUse }()
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	pool = r.pool.Load() // now: while we waited it may have been replaced
	c, err := pool.GetContext(ctx)
	if err != nil {
		return pool, false, err
	}
	defer c.Close()
	if isProbe {
		if err := r.writeProbe(ctx, c); err != nil {
			return pool, true, err
		}
	}
	return pool, true, f(ctx, c)
}

// isCallerTimeout reports whether err comes from the caller's ctx and not from
// redisTimeout, which ends inner: the background check has 0.4 s, and a request ends
// when its client leaves. redigo's deadline may pass a moment before that of the
// context.
func isCallerTimeout(ctx, inner context.Context, err error) bool {
	callers, has := ctx.Deadline()
	earliest, _ := inner.Deadline()
	isTimeout := errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
	return ctx.Err() != nil || (has && callers.Equal(earliest) && isTimeout)
}

// replacePool closes the connections of a pool in which one was found dead: they die
// together. nil is none.
func (r *redisStore) replacePool(used *redis.Pool) {
	if r.pool.CompareAndSwap(used, r.newPool()) {
		used.Close() // the connections in use are closed when they are given back
	}
}
