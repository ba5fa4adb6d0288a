// main_stores.go: opens and closes the backends that the environment chose.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
)

// stores holds the backends that the environment chose. Objects, index and
// freshness are chosen independently of each other.
type stores struct {
	disk     *diskStore        // DATA_DIR: spools, and without S3 the objects
	space    *spoolSpace       // of the disk that has DATA_DIR
	objects  verifiableObjects // disk or hot
	s3       *s3Store          // nil: objects are on the local disk
	hot      *tieredStore      // hot copies in front of s3; nil when s3 is
	sql      *sqlIndex         // nil: the index is embedded
	embedded *embeddedIndex    // nil: the index is in PostgreSQL
	redis    *redisStore       // nil: freshness is kept in this process
	local    *localFreshness   // nil: freshness is in Redis
	backends []*backend        // for /health: storage, database, redis
}

// verifiableObjects is a store of objects that can hash everything in it.
type verifiableObjects interface {
	objects
	// verify hashes each object and drops those that do not match their record. It
	// may run beside writers. report is called for each object that was dropped
	// or could not be read; dropped counts the former.
	verify(ctx context.Context, report func(key string, err error)) (checked, dropped int, err error)
}

// backend is one of the three backends that /health shows.
type backend struct {
	name   string                      // storage, database or redis
	kind   string                      // what it is, for the log
	okWord string                      // what /health calls it while it works: ok or embedded
	ping   func(context.Context) error // nil: it cannot be down
	up     atomic.Bool                 // the last ping succeeded
}

// openStores makes the stores without connecting to any of them, so that a backend
// that is down does not stop the start. Its caller closes them.
func openStores(set *settings, now func() time.Time, log *slog.Logger) (*stores, error) {
	st := &stores{disk: newDiskStore(set.dataDir, now, log)}
	st.space = &spoolSpace{createFile: st.disk.newSpool, diskSpace: st.disk.freeSpace, minFree: set.minFree}
	if err := st.openRedis(set, now, log); err != nil {
		return nil, err
	}
	if err := st.openIndex(set, now, log); err != nil {
		return nil, err
	}
	if set.s3.bucket == "" {
		st.objects = st.disk
		st.addBackend(&backend{name: "storage", kind: "local disk " + set.dataDir, okWord: "embedded", ping: st.disk.ping})
		return st, nil
	}
	set.s3.now, set.s3.log = now, log
	client, err := newS3Client(set.s3)
	if err != nil {
		return nil, fmt.Errorf("configuring S3: %w", err)
	}
	var online func() bool
	if st.redis != nil {
		online = st.redis.hearsChanges
	}
	st.s3 = newS3Store(client, online)
	copies := newDiskStore(filepath.Join(set.dataDir, ".hot"), now, log)
	st.hot = newTiered(st.s3, copies, set.hotSize, st.space.check)
	st.space.freeUp = st.hot.freeSpace
	st.objects = st.hot
	st.addBackend(&backend{name: "storage", kind: "S3 " + set.s3.String(), okWord: "ok", ping: func(ctx context.Context) error {
		return errors.Join(st.disk.ping(ctx), st.s3.ping(ctx)) // spools are in DATA_DIR
	}})
	return st, nil
}

// openIndex makes the index: in PostgreSQL if DBHOST is set, else embedded.
func (st *stores) openIndex(set *settings, now func() time.Time, log *slog.Logger) (err error) {
	if set.db.host == "" {
		st.embedded = newEmbeddedIndex(set.dataDir, log)
		st.addBackend(&backend{name: "database", kind: "embedded", okWord: "embedded"})
		return nil
	}
	_ = os.Remove(filepath.Join(set.dataDir, ".journal")) // earlier versions kept rows there in an outage
	st.sql, err = newSQLIndex(set.db, now, log)
	if err == nil {
		st.addBackend(&backend{name: "database", kind: "PostgreSQL " + set.db.host, okWord: "ok", ping: st.sql.ping})
	}
	return err
}

// openRedis makes what keeps freshness: Redis if REDIS_URL is set, else this process.
func (st *stores) openRedis(set *settings, now func() time.Time, log *slog.Logger) (err error) {
	if set.redisURL == "" {
		st.local = newLocalFreshness(set.dataDir, now, log)
		st.addBackend(&backend{name: "redis", kind: "embedded", okWord: "embedded"})
		return nil
	}
	st.redis, err = newRedisStore(string(set.redisURL), set.redisPrefix(), set.advertisedURL, now, log)
	if err == nil {
		st.addBackend(&backend{name: "redis", kind: "Redis", okWord: "ok", ping: st.redis.ping})
	}
	return err
}

func (st *stores) addBackend(b *backend) { st.backends = append(st.backends, b) }

// chosenIndex returns the index for the cache.
func (st *stores) chosenIndex() index {
	if st.sql != nil {
		return st.sql
	}
	return st.embedded
}

// chosenFreshness returns what keeps freshness for the cache.
func (st *stores) chosenFreshness() freshness {
	if st.redis != nil {
		return st.redis
	}
	return st.local
}

// sharedReplicas returns what connects the replicas, or nil when there can be only
// one: a cache has replicas when both its objects and Redis are shared.
func (st *stores) sharedReplicas() replicas {
	if st.redis == nil || st.s3 == nil {
		return nil
	}
	return st.redis
}

// saveSnapshots writes what the stores keep in memory alone, so that a crash loses
// less of it.
func (st *stores) saveSnapshots() error {
	var errs []error
	if st.embedded != nil {
		errs = append(errs, st.embedded.saveSnapshot())
	}
	if st.local != nil {
		errs = append(errs, st.local.saveSnapshot())
	}
	return errors.Join(errs...)
}

// Close closes every store, those that use another one first. It returns the
// errors of all of them.
func (st *stores) Close() error {
	var errs []error
	if st.sql != nil {
		errs = append(errs, st.sql.Close())
	} else {
		errs = append(errs, st.embedded.Close())
	}
	if st.redis != nil {
		errs = append(errs, st.redis.Close())
	} else {
		errs = append(errs, st.local.Close())
	}
	if st.s3 != nil {
		st.hot.Close()
		st.s3.Close()
		errs = append(errs, st.hot.disk.Close())
	}
	return errors.Join(append(errs, st.disk.Close())...)
}
