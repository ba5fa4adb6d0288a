// main_stores.go: opens and closes the backends that the environment chose.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"
)

// stores holds what the environment chose. Objects, index and freshness are chosen
// independently of each other.
type stores struct {
	disk       *diskStore  // DATA_DIR: spools, and without S3 the objects
	space      *spoolSpace // of the disk that has DATA_DIR
	objects    verifiableObjects
	index      index
	freshness  freshness
	replicas   replicas // nil unless objects and Redis are shared
	replicaKey replicaKey
	sql        *sqlIndex      // index, if it is in PostgreSQL; else nil
	embedded   *embeddedIndex // index, if it is not; else nil
	hot        *tieredStore   // hot copies; nil without S3
	disks      []*diskStore   // disk, and with S3 that of the hot copies
	backends   []*backend     // in the order in which they were opened
	snapshots  []func() error // each writes what is in memory alone
}

// verifiableObjects is a store of objects that can hash everything in it.
type verifiableObjects interface {
	objects
	// verify hashes each object and drops those that do not match their record. It
	// may run beside writers. report is called for each object that was dropped
	// (errDropped) or could not be read, and for strays, one at a time.
	verify(ctx context.Context, report func(key string, err error)) (checked int, err error)
}

// backend is one of the three backends that /health shows: what main needs to know of
// it. Functions that a backend does not need are nil.
type backend struct {
	name     string                      // storage, database or redis
	kind     string                      // what it is, for the log
	okWord   string                      // what /health calls it while it works: ok or embedded
	ping     func(context.Context) error // nil: it cannot be down
	outage   *circuit                    // that logs when it goes and when it is back; nil: checkBackend does
	seenDown func() error                // why requests find it down, before a ping may; nil: outage knows
	tasks    []task                      // that run as long as the server
	close    func() error                // nil: it has nothing open
	found    atomic.Pointer[string]      // by the last ping: down, full or okWord; nil: there was none yet

	// The checks alone use these.
	changedAt time.Time // when a ping found another state than the one before
	advice    advice    // of the last ping
}

// state is what the last ping says of the backend, which is down until there was one.
func (b *backend) state() string {
	if found := b.found.Load(); found != nil {
		return *found
	}
	return "down"
}

// isSeenDown reports whether requests find the backend down.
func (b *backend) isSeenDown() bool {
	return (b.outage != nil && b.outage.outageCause() != nil) || (b.seenDown != nil && b.seenDown() != nil)
}

// isInTrouble reports whether the log says already that a store, as metrics call it,
// cannot be used.
func (st *stores) isInTrouble(store string) bool {
	if store == "spool" {
		store = "storage" // spools are on one disk with it, or are checked with it
	}
	return slices.ContainsFunc(st.backends, func(b *backend) bool { return b.name == store && (b.state() != b.okWord || b.isSeenDown()) })
}

// storageIsDown reports whether nothing can be stored. A disk that is full takes what fits.
func (st *stores) storageIsDown() bool {
	return slices.ContainsFunc(st.backends, func(b *backend) bool {
		return b.name == "storage" && (b.isSeenDown() || (b.found.Load() != nil && b.state() == "down"))
	})
}

// task is a step that runs in the background, again and again.
type task struct {
	doing string        // for the log: "saving snapshots"
	every time.Duration // 0: once, and again after a while until it succeeds
	step  func(context.Context) error
}

// openStores makes the stores without connecting to any of them, so that a backend
// that is down does not stop the start. Its caller closes them.
func openStores(set *settings, now func() time.Time, log *slog.Logger) *stores {
	disk := newDiskStore(set.dataDir, now, log)
	st := &stores{disk: disk, disks: []*diskStore{disk}}
	st.space = &spoolSpace{createFile: disk.newSpool, diskSpace: disk.freeSpace, minFree: set.minFree, now: now,
		isBroken: func() bool { return errors.Is(disk.probe.last(), errStoreDown) }} // a full one makes room
	st.replicaKey = newReplicaKey(set.s3.secretKey, set.s3.bucket)
	redis := st.openFreshness(set, now, log)
	st.openIndex(set, now, log)
	if set.s3.bucket != "" {
		st.openS3(set, redis, now, log)
		return st
	}
	st.objects = disk
	st.backends = append(st.backends, &backend{name: "storage", kind: "local disk " + set.dataDir, okWord: "embedded", ping: st.pingDisk, close: disk.Close,
		tasks: []task{{doing: "removing hot copies of an earlier store in S3", step: func(context.Context) error {
			_ = os.RemoveAll(filepath.Join(set.dataDir, hotDir)) // what stays is tried again at the next start
			return nil
		}}}})
	return st
}

// openFreshness makes what keeps freshness marks: Redis if REDIS_URL is set, which is
// returned too, else this process.
func (st *stores) openFreshness(set *settings, now func() time.Time, log *slog.Logger) *redisStore {
	if set.redis == nil {
		local := newLocalFreshness(set.dataDir, now, log)
		st.freshness = local
		st.snapshots = append(st.snapshots, local.saveSnapshot)
		st.backends = append(st.backends, &backend{name: "redis", kind: "embedded", okWord: "embedded"})
		return nil
	}
	advertise := func(localIP string) string { return cmp.Or(set.advertise, set.urlAt(localIP)) }
	redis := newRedisStore(set.redis, set.redisPrefix(), st.replicaKey, advertise, now, log)
	st.freshness = redis
	st.backends = append(st.backends, &backend{name: "redis", kind: "Redis", okWord: "ok", ping: redis.ping, outage: redis.outage, close: redis.Close,
		tasks: []task{{doing: "keeping leases", every: leaseInterval, step: redis.renewLeases}}})
	return redis
}

// openIndex makes the index: in PostgreSQL if DBHOST is set, else embedded.
func (st *stores) openIndex(set *settings, now func() time.Time, log *slog.Logger) {
	if set.db.host == "" {
		st.embedded = newEmbeddedIndex(set.dataDir, log)
		st.index = st.embedded
		st.snapshots = append(st.snapshots, st.embedded.saveSnapshot)
		st.backends = append(st.backends, &backend{name: "database", kind: "embedded", okWord: "embedded",
			tasks: []task{{doing: "loading the index", every: 5 * time.Second,
				step: func(ctx context.Context) error { return st.embedded.followStore(ctx, st.objects) }}}})
		return
	}
	log = log.With("database", net.JoinHostPort(set.db.host, set.db.port))
	st.sql = newSQLIndex(&sqlConnector{set.db.dsn()}, set.db.password, now, log)
	st.index = st.sql
	st.backends = append(st.backends, &backend{name: "database", kind: "PostgreSQL " + set.db.host, okWord: "ok", ping: st.sql.ping, outage: st.sql.outage, close: st.sql.Close,
		tasks: []task{{doing: "writing index rows that wait", every: time.Second, step: st.sql.writePending}}})
}

// openS3 makes the objects in S3, with hot copies on the disk in front of them.
func (st *stores) openS3(set *settings, redis *redisStore, now func() time.Time, log *slog.Logger) {
	set.s3.now, set.s3.log = now, log
	var hearsChanges func() bool
	if redis != nil {
		hearsChanges, st.replicas, redis.announces = redis.hearsChanges, redis, true
	}
	s3 := newS3Store(newS3Client(set.s3), hearsChanges)
	copies := newDiskStore(filepath.Join(set.dataDir, hotDir), now, log)
	hot := newTiered(s3, copies, set.hotSize, st.space)
	st.space.reclaimer = hot
	st.objects, st.hot = hot, hot
	if st.sql != nil {
		st.sql.shared = hot
	}
	st.disks = append(st.disks, copies)
	st.backends = append(st.backends, &backend{name: "storage", kind: "S3 " + set.s3.String(), okWord: "ok", seenDown: s3.whyDown,
		ping: func(ctx context.Context) error {
			return cmp.Or(s3.ping(ctx), st.pingDisk(ctx)) // spools are in DATA_DIR, which is not to blame for an S3 that took all of the time
		},
		tasks: []task{
			{doing: "finding hot copies", step: hot.findCopies},
			{doing: "looking for an earlier store", step: st.reportEarlierStore},
			{doing: "sweeping unfinished uploads", every: time.Hour, step: s3.sweep},
		},
		close: func() error {
			hot.Close()
			s3.Close()
			return errors.Join(copies.Close(), st.disk.Close())
		}})
}

// gauges is what /metrics shows of disk and hot copies.
func (st *stores) gauges() (all []family) {
	if disk, err := st.disk.freeSpace(); err == nil {
		all = append(all, newGauge("artifactapi_disk_free_bytes", "Free bytes of the disk that has DATA_DIR.", float64(disk.free.bytes)))
	}
	files, bytes := 0, int64(0) // there are none without S3
	if st.hot != nil {
		files, bytes = st.hot.copies.size()
	}
	return append(all, newGauge("artifactapi_hot_files", "Hot copies of objects in S3.", float64(files)),
		newGauge("artifactapi_hot_bytes", "Bytes of hot copies.", float64(bytes)))
}

// reportEarlierStore logs an error if DATA_DIR holds files although they are in S3 now.
func (st *stores) reportEarlierStore(ctx context.Context) error {
	n := 0
	_ = st.disk.walk(ctx, func(string, *record) error { // where nothing can be read there is nothing to say
		n++
		return nil
	})
	if n > 0 {
		st.disk.log.Error("DATA_DIR holds files of an earlier store on disk, which are not served: bring them to S3 with artifactapi export (without MINIO_ENDPOINT) and artifactapi import",
			"files", n, "dir", st.disk.dir)
	}
	return nil
}

// pingDisk returns nil if files can be stored in DATA_DIR, and errNoSpace if it is full.
func (st *stores) pingDisk(ctx context.Context) error {
	if err := st.disk.ping(ctx); err != nil {
		return fmt.Errorf("DATA_DIR: %w", err)
	}
	return st.space.check() // a disk that answers a ping answers this too
}

// saveSnapshots writes what the stores keep in memory alone, so that a crash loses
// less of it.
func (st *stores) saveSnapshots(context.Context) error {
	var errs []error
	for _, save := range st.snapshots {
		errs = append(errs, save())
	}
	return errors.Join(errs...)
}

// Close saves the snapshots, closes all stores and returns the errors of all of them.
func (st *stores) Close() error {
	errs := []error{st.saveSnapshots(context.Background())}
	for _, b := range slices.Backward(st.backends) {
		if b.close != nil {
			errs = append(errs, b.close())
		}
	}
	return errors.Join(errs...)
}
