// main_stores.go: which backends the environment chose, and how they are opened
// and closed.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"time"
)

// stores are the backends that the environment chose, each on its own.
type stores struct {
	space    *spoolSpace // of DATA_DIR
	disk     *diskStore  // DATA_DIR: spools, and the objects without S3
	objects  verifiableObjects
	s3       *s3Store        // nil: local disk
	hot      *tieredStore    // with S3: copies on disk before it
	sql      *sqlIndex       // nil: embedded
	embedded *embeddedIndex  // nil: PostgreSQL
	redis    *redisStore     // nil: in process
	local    *localFreshness // nil: Redis
	backends []*backend
}

// verifiableObjects is an objects that can hash all that it has.
type verifiableObjects interface {
	objects
	verify(ctx context.Context, report func(key string, err error)) (checked, dropped int, err error)
}

// backend is one of the three as /health shows it.
type backend struct {
	name   string // storage, database, redis
	kind   string // what it is, for the log
	okWord string // how /health calls it while it works
	ping   func(context.Context) error
	up     atomic.Bool // the last ping went well
}

// openStores connects to nothing yet: a backend that is down does not stop the
// start.
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

func (st *stores) openIndex(set *settings, now func() time.Time, log *slog.Logger) (err error) {
	if set.db.host == "" {
		st.embedded = newEmbeddedIndex(set.dataDir, log)
		st.addBackend(&backend{name: "database", kind: "embedded", okWord: "embedded"})
		return nil
	}
	st.sql, err = newSQLIndex(set.db, set.dataDir, now, log)
	if err == nil {
		st.addBackend(&backend{name: "database", kind: "PostgreSQL " + set.db.host, okWord: "ok", ping: st.sql.ping})
	}
	return err
}

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

// chosenIndex and fresh are what was chosen, as the cache knows it.
func (st *stores) chosenIndex() index {
	if st.sql != nil {
		return st.sql
	}
	return st.embedded
}

func (st *stores) chosenFreshness() freshness {
	if st.redis != nil {
		return st.redis
	}
	return st.local
}

// sharedReplicas are there where both the store and Redis are shared.
func (st *stores) sharedReplicas() replicas {
	if st.redis == nil || st.s3 == nil {
		return nil
	}
	return st.redis
}

// Close ends everything in the order of use.
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
