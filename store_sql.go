// store_sql.go: the index in PostgreSQL, which all replicas share: its statements,
// changes, those that wait for a database that is down, listings, and reindex.

package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

const (
	// sqlWriteTimeout bounds a change of a row. A fill waits for it, and a change
	// that takes longer can wait in memory.
	sqlWriteTimeout = 2 * time.Second
	// sqlReadTimeout bounds every other use of a connection. The largest page from
	// cold disks takes much less.
	sqlReadTimeout = 5 * time.Second
	// sqlRecountTimeout bounds counting all rows, which reindex does once.
	sqlRecountTimeout = time.Minute
	// sqlConns bounds the connections of one replica. A server has 100 for all
	// replicas by default.
	sqlConns = 8
	// sqlIdleTimeout closes idle connections before a firewall forgets them.
	sqlIdleTimeout = time.Minute
	// sqlMaxRows bounds the rows that one statement reads: a pattern that matches
	// few of them must not hold a connection while a whole remote is searched.
	sqlMaxRows = 1000
	// A database that is down is asked again after a second, then after longer pauses:
	// often enough for people who watch it come back.
	sqlPauseMin = time.Second
	sqlPauseMax = 5 * time.Second
	// maxPendingChanges bounds the memory that an outage takes: about 50 MB.
	maxPendingChanges = 100_000
	// changeBatch is how many changes a transaction writes: enough to be fast, few
	// enough to end within sqlReadTimeout on a slow database.
	changeBatch = 100
	// These are the first halves of advisory locks: of migrations, of evicting, and of
	// writing many changes. The second half is made of the schema's name.
	sqlLockKey    = 0x61727466
	sqlEvictKey   = sqlLockKey + 2
	sqlChangesKey = sqlLockKey + 3
)

var _ index = (*sqlIndex)(nil)

// The statements. A change is made as soon as its object is stored or removed, and
// then it replaces whatever row there is, because the clocks of replicas differ.
// Changes that have waited, and those of reindex, do not replace a row whose object
// was fetched later: that is the last parameter but one of sqlDelete, the last of
// sqlSave.
//
// A trigger keeps the totals: counting a million rows takes 0.1 s at best, and
// sqlTouch spoils the visibility map that would make it fast. The totals of a remote
// are spread over 16 rows, so that its fills do not wait for each other's commits. What
// empties or restores a table goes past the trigger: sqlRecount adds what is missing then.
//
// sqlIsUnused and sqlIsUsed are the conditions of the partial indexes, too.
//
// sqlTouch locks its rows in the order of their keys, so that two replicas that
// count the same keys do not deadlock. It returns the keys that have a row.
const (
	sqlSave = `INSERT INTO artifactapi_files AS f
		(key, remote, path, spelling, sha256, content_type, class, size, hits, fetched_at, last_access)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
		ON CONFLICT (key) DO UPDATE SET remote = excluded.remote, path = excluded.path, spelling = excluded.spelling,
			sha256 = excluded.sha256, content_type = excluded.content_type, class = excluded.class, size = excluded.size,
			fetched_at = excluded.fetched_at, last_access = greatest(f.last_access, excluded.last_access)
		WHERE NOT $12::boolean OR f.fetched_at <= excluded.fetched_at`
	sqlDelete = `DELETE FROM artifactapi_files
		WHERE key = $1 AND (NOT $2::boolean OR fetched_at <= $3::timestamptz)`
	sqlTouch = `WITH uses AS (
			SELECT key, sum(hits)::bigint AS hits, max(last) AS last
			FROM unnest($1::text[], $2::bigint[], $3::timestamptz[]) AS u (key, hits, last) GROUP BY key
		), held AS (
			SELECT f.key FROM artifactapi_files f JOIN uses USING (key) ORDER BY f.key FOR UPDATE OF f
		)
		UPDATE artifactapi_files f
		SET hits = f.hits + uses.hits, last_access = greatest(f.last_access, uses.last)
		FROM uses JOIN held USING (key) WHERE f.key = uses.key RETURNING f.key`
	sqlIsUnused = `hits = 0 AND class <> 'local'`
	sqlIsUsed   = `hits > 0 AND class <> 'local'`
	sqlColumns  = `SELECT key, remote, spelling, sha256, content_type, class, size, hits, fetched_at, last_access
		FROM artifactapi_files `
	sqlByKey  = sqlColumns + `WHERE key > $1 ORDER BY key LIMIT $2`
	sqlByPath = sqlColumns + `WHERE remote = $1 AND (path, key) > ($2, $3) ORDER BY path, key LIMIT $4`
	sqlByAge  = ` AND ($1::text = '' OR remote = $1) AND (last_access, key) > ($2::timestamptz, $3)
		ORDER BY last_access, key LIMIT $4`
	sqlUnusedByAge  = sqlColumns + `WHERE ` + sqlIsUnused + sqlByAge
	sqlAllByAge     = `(` + sqlUnusedByAge + `) UNION ALL (` + sqlColumns + `WHERE ` + sqlIsUsed + sqlByAge + `) ORDER BY last_access, key LIMIT $4`
	sqlUnusedTotals = `SELECT remote, count(*), coalesce(sum(size), 0)::bigint FROM artifactapi_files WHERE ` + sqlIsUnused + ` GROUP BY remote`
	sqlTotals       = `SELECT remote, sum(files)::bigint, sum(bytes)::bigint FROM artifactapi_totals GROUP BY remote HAVING sum(files) > 0`
	sqlPing         = `SELECT current_setting('transaction_read_only')::boolean` // a standby's is on, too
	sqlLock         = `SELECT pg_advisory_xact_lock($1::integer, hashtext(current_schema()))`
	sqlTryLock      = `SELECT pg_try_advisory_xact_lock($1::integer, hashtext(current_schema()))`
	sqlHasSchema    = `SELECT to_regclass('artifactapi_schema') IS NOT NULL`
	sqlVersion      = `SELECT version FROM artifactapi_schema
		WHERE version > 1 OR (to_regclass('artifactapi_files'), to_regclass('artifactapi_totals')) IS NOT NULL`
	sqlRecount = `SET LOCAL statement_timeout = 0; INSERT INTO artifactapi_totals AS t (remote, slot, files, bytes)
		SELECT remote, slot, sum(files), sum(bytes) FROM (
			SELECT remote, hashtext(key) & 15 AS slot, 1 AS files, size AS bytes FROM artifactapi_files
			UNION ALL SELECT remote, slot, -files, -bytes FROM artifactapi_totals
		) AS missing GROUP BY remote, slot HAVING sum(files) <> 0 OR sum(bytes) <> 0
		ON CONFLICT (remote, slot) DO UPDATE SET files = t.files + excluded.files, bytes = t.bytes + excluded.bytes`
	sqlSession = `SET statement_timeout = '5s'; SET idle_in_transaction_session_timeout = '10s'`
)

// sqlIndex implements index. While the database is down, changes wait in memory and
// everything else is errStoreDown. What a crash loses of the changes comes back with
// the next use of the file, or with reindex.
type sqlIndex struct {
	db       *sql.DB
	outage   *circuit
	pending  pendingChanges
	now      func() time.Time
	log      *slog.Logger
	password secret      // kept out of errors
	shared   objects     // what other processes change, too; nil: none does
	ready    atomic.Bool // the schema is up to date
}

// newSQLIndex makes the index without connecting, so that a database that is down
// does not stop the start.
func newSQLIndex(c driver.Connector, password secret, now func() time.Time, log *slog.Logger) *sqlIndex {
	db := sql.OpenDB(c)
	db.SetMaxOpenConns(sqlConns)
	db.SetMaxIdleConns(sqlConns)
	db.SetConnMaxIdleTime(sqlIdleTimeout)
	return &sqlIndex{db: db, outage: newCircuit(now, sqlPauseMin, sqlPauseMax), now: now, log: log, password: password}
}

// redact returns the text of err without the password.
func redact(err error, password secret) string {
	if password == "" {
		return err.Error()
	}
	return strings.ReplaceAll(err.Error(), string(password), password.String())
}

// saveRow: see index.
func (x *sqlIndex) saveRow(ctx context.Context, r indexRow) error {
	return x.changeRow(ctx, rowChange{row: r})
}

// delete: see index.
func (x *sqlIndex) delete(ctx context.Context, remote, key string) error {
	return x.changeRow(ctx, rowChange{row: indexRow{Key: key, Fetched: x.now()}, deletes: true})
}

// forget: see index. A row that waits follows the store once it is written.
func (x *sqlIndex) forget(string) {}

// execer is a connection or a transaction.
type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

// rowChange saves or deletes one row of the index.
type rowChange struct {
	row     indexRow
	deletes bool // the row with that key; row.Fetched is when it was to go
}

// execute makes the change. With keepNewer it leaves a row alone whose object was
// fetched later.
func (c *rowChange) execute(ctx context.Context, on execer, keepNewer bool) error {
	r := c.row
	if c.deletes {
		_, err := on.ExecContext(ctx, sqlDelete, r.Key, keepNewer, r.Fetched.UTC())
		return err
	}
	_, err := on.ExecContext(ctx, sqlSave, r.Key, r.Remote, toSQLText(decodePath(r.Path)), toSQLText(r.Path), r.SHA256,
		toSQLText(r.ContentType), string(r.Class), r.Size, r.Hits, roundForSQL(r.Fetched), r.LastAccess.UTC(), keepNewer)
	return err
}

// roundForSQL rounds to what a row can hold. PostgreSQL would round the half of a
// microsecond in its own way, and hashRow would take the row for another object's.
func roundForSQL(t time.Time) time.Time { return t.Round(time.Microsecond).UTC() }

// changeRow makes a change in the database. While the database is down the change
// waits, and behind it all others, so that their order is kept. The object of the
// row is stored or removed already: the change does not end with ctx.
func (x *sqlIndex) changeRow(ctx context.Context, c rowChange) error {
	if waiting, _ := x.pending.state(); waiting == 0 {
		err := x.withConn(context.WithoutCancel(ctx), sqlWriteTimeout, func(ctx context.Context, conn *sql.Conn) error {
			return c.execute(ctx, conn, false)
		})
		if !errors.Is(err, errStoreDown) {
			return err
		}
	}
	if x.pending.add(c) {
		x.log.Error("too many index rows wait for the database: further ones are dropped, and come back with the next use of their file or with reindex", "waiting", maxPendingChanges)
	}
	return nil
}

// pendingChanges is a bounded queue of changes that the database has not taken yet. Its
// methods may be called concurrently, but for first and removeFirst.
type pendingChanges struct {
	mu      sync.Mutex // guards the fields below; no other lock is taken under it
	queue   []rowChange
	dropped bool // since the start, a change found the queue full
}

// add appends a change, or drops it if the queue is full: the first time it returns
// true. That costs a row, until the next use of the file or reindex; for a deletion it
// leaves a row without an object, until reindex.
func (p *pendingChanges) add(c rowChange) (firstDropped bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == maxPendingChanges {
		firstDropped, p.dropped = !p.dropped, true
		return firstDropped
	}
	p.queue = append(p.queue, c)
	return false
}

// state returns the number of changes that wait, and whether no other change is
// missing in the database either.
func (p *pendingChanges) state() (waiting int, complete bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.queue), len(p.queue) == 0 && !p.dropped
}

// first returns the n changes that have waited longest, or all if there are fewer.
func (p *pendingChanges) first(n int) []rowChange {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.queue[:min(n, len(p.queue))]
}

// removeFirst removes what first returned, once it is written.
func (p *pendingChanges) removeFirst(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.queue = p.queue[n:]; len(p.queue) == 0 {
		p.queue = nil // frees the memory
	}
}

// writePending is the step of a background loop. It asks whether a database that is
// down is back, and writes the changes that wait. A change that the database refuses is
// dropped. One goroutine calls it.
func (x *sqlIndex) writePending(ctx context.Context) error {
	if x.outage.outageCause() != nil {
		if err := x.withConn(ctx, sqlReadTimeout, execPing); err != nil {
			return err
		}
	}
	written := 0
	for batch := x.pending.first(changeBatch); len(batch) > 0; batch = x.pending.first(changeBatch) {
		err := x.writeChanges(ctx, batch)
		if err != nil && !errors.Is(err, errStoreDown) && len(batch) > 1 {
			batch = batch[:1] // find out which one is refused
			err = x.writeChanges(ctx, batch)
		}
		for i := 0; err == nil && x.shared != nil && i < len(batch); i++ {
			if c := batch[i]; !c.deletes {
				if _, failed := x.follow(ctx, c.row, x.shared); errors.Is(failed, errStoreDown) {
					err = failed
				}
			}
		}
		if errors.Is(err, errStoreDown) {
			return err
		}
		if err != nil {
			x.log.Error("the database refuses an index row: the file is not listed", "key", batch[0].row.Key, "error", err)
		}
		x.pending.removeFirst(len(batch))
		written += len(batch)
	}
	if written > 0 {
		x.log.Info("index rows that waited for the database are written", "rows", written)
	}
	return nil
}

// follow makes row r, unless a later one has replaced it, what the store says of its object
// by now: another replica may have removed or replaced that, with the row of then.
func (x *sqlIndex) follow(ctx context.Context, r indexRow, store objects) (dropped bool, err error) {
	changes := []rowChange{{row: r, deletes: true}}
	obj, err := store.stat(ctx, r.Key)
	switch {
	case err == nil:
		is := newIndexRow(r.Key, obj.rec)
		is.Hits, is.LastAccess = r.Hits, r.LastAccess
		if roundForSQL(is.Fetched).Equal(roundForSQL(r.Fetched)) && is.SHA256 == r.SHA256 {
			return false, nil
		}
		changes = append(changes, rowChange{row: is})
	case !errors.Is(err, fs.ErrNotExist):
		return false, err
	}
	return err != nil, x.writeChanges(ctx, changes)
}

// writeChanges makes changes in one transaction, unless the database has a row of
// an object that was fetched later. All of them are safe to repeat, as after a
// commit whose answer was lost. Replicas do that one at a time, since they would deadlock
// over the totals, and in the order of sqlTouch.
func (x *sqlIndex) writeChanges(ctx context.Context, changes []rowChange) error {
	changes = slices.Clone(changes)
	slices.SortStableFunc(changes, func(a, b rowChange) int { return strings.Compare(a.row.Key, b.row.Key) })
	return x.withConn(ctx, sqlReadTimeout, func(ctx context.Context, conn *sql.Conn) error {
		return inTransaction(ctx, conn, func(tx *sql.Tx) error {
			if _, err := tx.ExecContext(ctx, sqlLock, sqlChangesKey); err != nil {
				return err
			}
			for _, c := range changes {
				if err := c.execute(ctx, tx, true); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// Close ends all connections. Changes that wait have one more attempt.
func (x *sqlIndex) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), sqlWriteTimeout)
	defer cancel()
	if waiting, _ := x.pending.state(); waiting > 0 {
		if err := x.writePending(ctx); err != nil {
			waiting, _ = x.pending.state()
			x.log.Warn("index rows are lost: they come back with the next use of their file or with reindex", "rows", waiting, "error", err)
		}
	}
	return x.db.Close()
}

// countUses: see index. It is errStoreDown while rows wait to be written. A
// connection that is lost before the answer counts the uses twice; they are
// statistics.
func (x *sqlIndex) countUses(ctx context.Context, batch []fileUse) (unknown []fileUse, err error) {
	if n, _ := x.pending.state(); n > 0 {
		return nil, fmt.Errorf("%w: database: %d rows wait to be written", errStoreDown, n)
	}
	keys, hits, last := make(pq.StringArray, len(batch)), make(pq.Int64Array, len(batch)), make(pq.StringArray, len(batch))
	for i, use := range batch {
		keys[i], hits[i], last[i] = use.key, use.hits, use.last.UTC().Format(time.RFC3339Nano)
	}
	known := map[string]bool{}
	_, err = queryAll(ctx, x, func(row *sql.Rows) (key string, err error) {
		err = row.Scan(&key)
		known[key] = true
		return key, err
	}, sqlTouch, keys, hits, last)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(batch), func(use fileUse) bool { return known[use.key] }), nil
}

// toSQLText replaces what PostgreSQL's type text cannot hold. Paths have no such
// bytes, but tokens of clients and headers of an upstream may.
func toSQLText(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "")
}

// listPage: see index. It is incomplete while rows wait to be written, and from the
// first row on that was dropped.
func (x *sqlIndex) listPage(ctx context.Context, q pageQuery) (indexPage, error) {
	_, complete := x.pending.state()
	return findPage(ctx, q, complete, x.findByPath, x.findByAge)
}

// findByPath returns the first n rows of q. Each of its statements reads sqlMaxRows at
// most.
func (x *sqlIndex) findByPath(ctx context.Context, q pageQuery, n int) (found []indexRow, err error) {
	path, key := q.start()
	step := min(n, sqlMaxRows)
	if q.pattern != nil {
		step = sqlMaxRows
	}
	for {
		rows, err := queryAll(ctx, x, scanRow, sqlByPath, q.remote, toSQLText(path), toSQLText(key), step)
		for _, r := range rows {
			path, key = decodePath(r.Path), r.Key
			if !strings.HasPrefix(path, q.prefix) || len(found) == n {
				return found, err
			}
			if q.pattern == nil || q.pattern.MatchString(path) {
				found = append(found, r)
			}
		}
		if err != nil || len(rows) < step || len(found) == n {
			return found, err
		}
	}
}

// findByAge returns the first n rows that q asks for by last access.
func (x *sqlIndex) findByAge(ctx context.Context, q pageQuery, n int) ([]indexRow, error) {
	lastAccess, key := q.startByAge()
	statement := sqlUnusedByAge
	if q.used {
		statement = sqlAllByAge
	}
	return queryAll(ctx, x, scanRow, statement, q.remote, lastAccess, toSQLText(key), n)
}

// scanRow reads a row of sqlColumns.
func scanRow(row *sql.Rows) (r indexRow, err error) {
	err = row.Scan(&r.Key, &r.Remote, &r.Path, &r.SHA256, &r.ContentType, &r.Class, &r.Size, &r.Hits, &r.Fetched, &r.LastAccess)
	r.Fetched, r.LastAccess = r.Fetched.UTC(), r.LastAccess.UTC()
	return r, err
}

// totals: see index.
func (x *sqlIndex) totals(ctx context.Context, unused bool) (map[string]remoteTotal, error) {
	all, statement := map[string]remoteTotal{}, sqlTotals
	if unused {
		statement = sqlUnusedTotals
	}
	_, err := queryAll(ctx, x, func(row *sql.Rows) (name string, err error) {
		var t remoteTotal
		err = row.Scan(&name, &t.Files, &t.Bytes)
		all[name] = t
		return name, err
	}, statement)
	return all, err
}

// whileAlone runs f unless another replica runs its own at the moment. The context of
// f ends after sqlReadTimeout: before idle_in_transaction_session_timeout ends the
// transaction.
func (x *sqlIndex) whileAlone(ctx context.Context, f func(context.Context)) error {
	return x.withConn(ctx, 2*sqlReadTimeout, func(ctx context.Context, conn *sql.Conn) error {
		return inTransaction(ctx, conn, func(tx *sql.Tx) error {
			var alone bool
			if err := tx.QueryRowContext(ctx, sqlTryLock, sqlEvictKey).Scan(&alone); err != nil || !alone {
				return err
			}
			ctx, cancel := context.WithTimeout(ctx, sqlReadTimeout)
			defer cancel()
			f(ctx)
			return nil
		})
	})
}

// queryAll runs a statement and returns its rows as scan reads them.
func queryAll[T any](ctx context.Context, x *sqlIndex, scan func(*sql.Rows) (T, error), query string, args ...any) (all []T, err error) {
	err = x.withConn(ctx, sqlReadTimeout, func(ctx context.Context, conn *sql.Conn) error {
		all = nil // forget an attempt that failed
		rows, err := conn.QueryContext(ctx, query, args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			v, err := scan(rows)
			if err != nil {
				return err
			}
			all = append(all, v)
		}
		return rows.Err()
	})
	return all, err
}

// reindex gives each stored object its row, drops each row that was there before and has
// no object, and counts the rows anew. What replicas write meanwhile wins. It calls report
// for each row, with "added" or "dropped".
func reindex(ctx context.Context, from objects, to *sqlIndex, report func(change, key string)) error {
	if err := to.recount(ctx); err != nil {
		return fmt.Errorf("counting the rows of the index: %w", err)
	}
	seed := maphash.MakeSeed()
	// rows holds the hash of each row whose object is not found yet: a million take 20 MB.
	// They are read before the objects: what is saved meanwhile is not in it, and is left alone.
	rows := map[uint64]bool{}
	err := to.eachRow(ctx, func(r indexRow) error {
		rows[hashRow(seed, r)] = true
		return nil
	})
	if err != nil {
		return err
	}
	var due []rowChange // rows to be added
	addDue := func() error {
		if err := to.writeChanges(ctx, due); err != nil {
			return fmt.Errorf("adding rows: %w", err)
		}
		for _, c := range due {
			report("added", c.row.Key)
		}
		due = due[:0]
		return nil
	}
	err = from.walk(ctx, func(key string, rec *record) error {
		r := newIndexRow(key, rec)
		r.ContentType = toSQLText(r.ContentType)
		if hash := hashRow(seed, r); rows[hash] {
			delete(rows, hash)
		} else {
			due = append(due, rowChange{row: r})
		}
		if len(due) < changeBatch {
			return nil
		}
		return addDue()
	})
	if err == nil {
		err = addDue()
	}
	if err != nil {
		return fmt.Errorf("comparing the index with what is stored: %w", err)
	}
	return to.eachRow(ctx, func(r indexRow) error {
		if !rows[hashRow(seed, r)] {
			return nil
		}
		dropped, err := to.follow(ctx, r, from) // an older object than the row's did not replace it
		if err != nil {
			return fmt.Errorf("correcting the row of %s: %w", r.Key, err)
		}
		if dropped {
			report("dropped", r.Key)
		}
		return nil
	})
}

// recount makes the totals those of the rows.
func (x *sqlIndex) recount(ctx context.Context) error {
	return x.withConn(ctx, sqlRecountTimeout, func(ctx context.Context, conn *sql.Conn) error {
		_, err := conn.ExecContext(ctx, sqlRecount)
		return err
	})
}

// hashRow hashes what a row says about its object.
func hashRow(seed maphash.Seed, r indexRow) uint64 {
	r.Hits, r.LastAccess, r.Fetched = 0, time.Time{}, roundForSQL(r.Fetched)
	return maphash.Comparable(seed, r)
}

// eachRow calls f with all rows. One that is added meanwhile may be left out.
func (x *sqlIndex) eachRow(ctx context.Context, f func(indexRow) error) error {
	for after, more := "", true; more; {
		rows, err := queryAll(ctx, x, scanRow, sqlByKey, after, sqlMaxRows)
		if err != nil {
			return fmt.Errorf("reading the index: %w", err)
		}
		for _, r := range rows {
			if err := f(r); err != nil {
				return err
			}
			after = r.Key
		}
		more = len(rows) == sqlMaxRows
	}
	return nil
}
