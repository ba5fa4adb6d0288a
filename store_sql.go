// store_sql.go: the index in PostgreSQL, which all replicas share. Its schema
// makes and migrates itself. Changes that the database cannot take are kept in
// the journal (store_journal.go) and written when it is back.

package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
)

const (
	// sqlWriteTimeout bounds a change: a fill waits for it, and what takes longer
	// is as well kept in the journal.
	sqlWriteTimeout = 2 * time.Second
	// sqlReadTimeout bounds one statement that reads. A page of the largest size
	// from cold disks stays far below.
	sqlReadTimeout = 5 * time.Second
	// sqlConns bounds what one replica takes of the server's connections, of
	// which there are 100 unless told otherwise.
	sqlConns = 8
	// sqlIdleTimeout closes connections before middle boxes forget them.
	sqlIdleTimeout = time.Minute
	// sqlMaxRows is how many rows one statement reads at most: a pattern that
	// matches little must not hold a connection while a remote is searched.
	sqlMaxRows = 1000
	// sqlMaxUses is how many uses one statement counts.
	sqlMaxUses = 1000
	// A database that is down is tried again after a second, and then after
	// ever longer pauses: soon enough for people who watch it come back.
	sqlPauseMin = time.Second
	sqlPauseMax = 5 * time.Second
	// sqlLockKey is the first half of the advisory lock that migrations hold;
	// the second is the schema's.
	sqlLockKey = 0x61727466
	// afterAllKeys sorts behind all keys, whose bytes are below it.
	afterAllKeys = "\x7f"
)

var _ index = (*sqlIndex)(nil)

// The statements. Late changes (of the journal and of reindex) give way to a
// row that was fetched after them; others replace whatever is there, since
// clocks of replicas differ.
//
// Totals are kept by a trigger and not counted: an aggregate over a million
// rows takes a tenth of a second at best, and touch spoils the visibility map
// that an index-only one lives on. 16 slots a remote keep fills of one remote
// from waiting for each other's commits.
//
// sqlTouch locks its rows in order of key, or two replicas that count the same
// keys would deadlock.
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
		FROM uses JOIN held USING (key) WHERE f.key = uses.key`
	sqlColumns = `SELECT key, remote, spelling, sha256, content_type, class, size, hits, fetched_at, last_access
		FROM artifactapi_files `
	sqlByPath       = sqlColumns + `WHERE remote = $1 AND (path, key) > ($2, $3) ORDER BY path, key LIMIT $4`
	sqlByPathBelow  = sqlColumns + `WHERE remote = $1 AND (path, key) > ($2, $3) AND path < $5 ORDER BY path, key LIMIT $4`
	sqlByAge        = sqlColumns + `WHERE (last_access, key) > ($1::timestamptz, $2) ORDER BY last_access, key LIMIT $3`
	sqlByAgeOf      = sqlColumns + `WHERE remote = $4 AND (last_access, key) > ($1::timestamptz, $2) ORDER BY last_access, key LIMIT $3`
	sqlTotals       = `SELECT remote, sum(files)::bigint, sum(bytes)::bigint FROM artifactapi_totals GROUP BY remote HAVING sum(files) > 0`
	sqlPing         = `SELECT 1`
	sqlLock         = `SELECT pg_advisory_xact_lock($1::integer, hashtext(current_schema()))`
	sqlHasSchema    = `SELECT to_regclass('artifactapi_schema') IS NOT NULL, current_setting('server_encoding')`
	sqlMakeSchema   = `CREATE TABLE artifactapi_schema (version integer NOT NULL); INSERT INTO artifactapi_schema VALUES (0)`
	sqlVersion      = `SELECT version FROM artifactapi_schema`
	sqlSetVersion   = `UPDATE artifactapi_schema SET version = $1`
	sqlSession      = `SET statement_timeout = '5s'; SET idle_in_transaction_session_timeout = '10s'`
	sqlJournal      = `INSERT INTO artifactapi_journals VALUES ($1, 0, now()) ON CONFLICT (id) DO UPDATE SET at = now() RETURNING done`
	sqlJournalDone  = `UPDATE artifactapi_journals SET done = $2 WHERE id = $1`
	sqlJournalEnded = `DELETE FROM artifactapi_journals WHERE id = $1 OR at < now() - interval '1 year'`
)

// sqlIndex implements index. While the database is down, changes go to the
// journal and reading is errStoreDown; replay notices that it is back.
type sqlIndex struct {
	db       *sql.DB
	journal  *journal
	now      func() time.Time
	log      *slog.Logger
	password secret // kept out of errors

	replaying sync.Mutex // one replay at a time

	mu     sync.Mutex // guards the rest; never held across I/O
	broken error      // why the database is down; nil: it is not, as far as known
	next   time.Time  // when it is to be tried again
	pause  time.Duration
	ready  bool // the schema is up to date
}

// newSQLIndex does not connect yet: a database that is down at the start does
// not stop the start.
func newSQLIndex(set sqlSettings, dataDir string, now func() time.Time, log *slog.Logger) (*sqlIndex, error) {
	if _, err := pq.NewConnector(set.dsn()); err != nil {
		return nil, fmt.Errorf("configuring the database: %s", redact(err, set.password))
	}
	return newSQLIndexOn(&cuttableConnector{set.dsn()}, set.password, dataDir, now, log), nil
}

func newSQLIndexOn(c driver.Connector, password secret, dataDir string, now func() time.Time, log *slog.Logger) *sqlIndex {
	db := sql.OpenDB(c)
	db.SetMaxOpenConns(sqlConns)
	db.SetMaxIdleConns(sqlConns)
	db.SetConnMaxIdleTime(sqlIdleTimeout)
	return &sqlIndex{db: db, journal: newJournal(dataDir), now: now, log: log, password: password}
}

// redact is err's text without the password.
func redact(err error, password secret) string {
	if password == "" {
		return err.Error()
	}
	return strings.ReplaceAll(err.Error(), string(password), password.String())
}

// saveRow: see index.
func (x *sqlIndex) saveRow(ctx context.Context, r indexRow) error {
	return x.change(ctx, change{Save: &r})
}

// delete: see index. A row that is not there is no error.
func (x *sqlIndex) delete(ctx context.Context, remote, key string) error {
	return x.change(ctx, change{Delete: key})
}

// countUses: see index. A connection that is lost between the work and its answer
// counts uses twice; they are statistics.
func (x *sqlIndex) countUses(ctx context.Context, batch []fileUse) error {
	for part := range slices.Chunk(batch, sqlMaxUses) {
		uses := make([]use, len(part))
		for i, t := range part {
			uses[i] = use{t.key, t.hits, t.last}
		}
		if err := x.change(ctx, change{Uses: uses}); err != nil {
			return err
		}
	}
	return nil
}

// change makes a change, or journals it: behind others that wait there already,
// so that their order is kept. The object it is about is stored or gone for
// good, and so the change outlives the request that made it.
func (x *sqlIndex) change(ctx context.Context, c change) error {
	c.At = x.now()
	if x.downError() != nil || x.journal.pending() {
		return x.journal.append(c)
	}
	err := x.withConn(context.WithoutCancel(ctx), sqlWriteTimeout, func(ctx context.Context, conn *sql.Conn) error {
		return c.apply(ctx, conn, false)
	})
	if errors.Is(err, errStoreDown) {
		return x.journal.append(c)
	}
	return err
}

// execer is a connection or a transaction.
type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

// apply makes the change in the database. A late one gives way to news.
func (c *change) apply(ctx context.Context, on execer, late bool) (err error) {
	switch {
	case c.Save != nil:
		r := c.Save
		if r.LastAccess.Before(r.Fetched) {
			r.LastAccess = r.Fetched
		}
		_, err = on.ExecContext(ctx, sqlSave, r.Key, r.Remote, toSQLText(decodePath(r.Path)), toSQLText(r.Path), r.SHA256,
			toSQLText(r.ContentType), string(r.Class), r.Size, r.Hits, r.Fetched.UTC(), r.LastAccess.UTC(), late)
	case c.Delete != "":
		_, err = on.ExecContext(ctx, sqlDelete, c.Delete, late, c.At.UTC())
	case len(c.Uses) > 0:
		keys, hits, last := make([]string, len(c.Uses)), make([]int64, len(c.Uses)), make([]string, len(c.Uses))
		for i, u := range c.Uses {
			keys[i], hits[i], last[i] = u.Key, u.Hits, u.Last.UTC().Format(time.RFC3339Nano)
		}
		_, err = on.ExecContext(ctx, sqlTouch, pq.StringArray(keys), pq.Int64Array(hits), pq.StringArray(last))
	}
	return err
}

// toSQLText drops what a text of PostgreSQL cannot hold. Paths have none of it;
// header values that we were sent may.
func toSQLText(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "")
}

// listPage: see index. It is complete unless rows wait in the journal.
func (x *sqlIndex) listPage(ctx context.Context, q pageQuery) (indexPage, error) {
	q.limit = max(q.limit, 1)
	scan := newSQLScan(q)
	p := indexPage{complete: !x.journal.pending()}
	for {
		rows, err := x.readStep(ctx, scan)
		if err != nil {
			return indexPage{}, err
		}
		for _, r := range rows {
			if !scan.isOnPage(r) {
				continue
			}
			if len(p.rows) == q.limit {
				p.next = scan.nextToken(p.rows[q.limit-1], r)
				return p, nil
			}
			p.rows = append(p.rows, r)
		}
		if len(rows) < scan.step {
			return p, nil
		}
		scan.moveBehind(rows[len(rows)-1])
	}
}

// sqlScan reads a listing step by step.
type sqlScan struct {
	q         pageQuery
	step      int       // rows a statement
	path, key string    // by path: the place behind which the next step begins
	last      time.Time // by age: the same, with key
}

func newSQLScan(q pageQuery) *sqlScan {
	s := &sqlScan{q: q, step: min(q.limit+1, sqlMaxRows)} // one more, to see whether there is a next page
	if q.pattern != nil || q.oldest && q.prefix != "" {
		s.step = sqlMaxRows
	}
	at, key, variant := strings.Cut(q.after, "\n")
	if q.oldest {
		if micros, err := strconv.ParseInt(at, 10, 64); err == nil {
			s.last, s.key = time.UnixMicro(micros), toSQLText(key)
		}
		return s
	}
	s.path, s.key = at, key
	if !variant {
		s.key = afterAllKeys
	}
	if q.after == "" || s.path < q.prefix {
		s.path, s.key = q.prefix, ""
	}
	// What is no text begins where the text before it ends; takes does the rest.
	if text := sqlTextPrefix(s.path); text != s.path {
		s.path, s.key = text, ""
	}
	s.key = toSQLText(s.key)
	return s
}

// sqlTextPrefix is the beginning of s that can be a text of PostgreSQL.
func sqlTextPrefix(s string) string {
	for i, r := range s {
		if r == 0 || r == utf8.RuneError && !strings.HasPrefix(s[i:], "\uFFFD") {
			return s[:i]
		}
	}
	return s
}

// textAbove is the least text behind all that begin with prefix, if there is one.
// UTF-8 sorts as its code points do.
func textAbove(prefix string) (string, bool) {
	for prefix != "" {
		r, n := utf8.DecodeLastRuneInString(prefix)
		prefix = prefix[:len(prefix)-n]
		if r == 0xD7FF {
			r = 0xDFFF // surrogates are no text
		}
		if r < utf8.MaxRune {
			return prefix + string(r+1), true
		}
	}
	return "", false
}

// statement reads the next step.
func (s *sqlScan) statement() (string, []any) {
	switch limit, has := textAbove(sqlTextPrefix(s.q.prefix)); {
	case s.q.oldest && s.q.remote != "":
		return sqlByAgeOf, []any{s.last.UTC(), s.key, s.step, s.q.remote}
	case s.q.oldest:
		return sqlByAge, []any{s.last.UTC(), s.key, s.step}
	case has:
		return sqlByPathBelow, []any{s.q.remote, s.path, s.key, s.step, limit}
	default:
		return sqlByPath, []any{s.q.remote, s.path, s.key, s.step}
	}
}

// moveBehind moves on to what follows r.
func (s *sqlScan) moveBehind(r indexRow) {
	s.path, s.key, s.last = toSQLText(decodePath(r.Path)), r.Key, r.LastAccess
}

// isOnPage tells whether a row belongs on the page.
func (s *sqlScan) isOnPage(r indexRow) bool {
	path := decodePath(r.Path)
	after, _, variant := strings.Cut(s.q.after, "\n")
	if !s.q.oldest && !variant && after != "" && path <= after {
		return false
	}
	return strings.HasPrefix(path, s.q.prefix) && (s.q.pattern == nil || s.q.pattern.MatchString(path))
}

// nextToken is the page's next: the last row's path, with its key only when the
// following row has the same path, so that tokens can be written by hand.
func (s *sqlScan) nextToken(last, following indexRow) string {
	if s.q.oldest {
		return strconv.FormatInt(last.LastAccess.UnixMicro(), 10) + "\n" + last.Key
	}
	path := decodePath(last.Path)
	if path == decodePath(following.Path) {
		return path + "\n" + last.Key
	}
	return path
}

// readStep reads a step.
func (x *sqlIndex) readStep(ctx context.Context, s *sqlScan) (all []indexRow, err error) {
	query, args := s.statement()
	err = x.withReadConn(ctx, func(ctx context.Context, conn *sql.Conn) error {
		all = nil // of an attempt that failed
		found, err := conn.QueryContext(ctx, query, args...)
		if err != nil {
			return err
		}
		defer found.Close()
		for found.Next() {
			var r indexRow
			if err := found.Scan(&r.Key, &r.Remote, &r.Path, &r.SHA256, &r.ContentType, &r.Class, &r.Size, &r.Hits, &r.Fetched, &r.LastAccess); err != nil {
				return err
			}
			r.Fetched, r.LastAccess = r.Fetched.UTC(), r.LastAccess.UTC()
			all = append(all, r)
		}
		return found.Err()
	})
	return all, err
}

// totals: see index.
func (x *sqlIndex) totals(ctx context.Context) (all map[string]remoteTotal, err error) {
	err = x.withReadConn(ctx, func(ctx context.Context, conn *sql.Conn) error {
		all = map[string]remoteTotal{}
		found, err := conn.QueryContext(ctx, sqlTotals)
		if err != nil {
			return err
		}
		defer found.Close()
		for found.Next() {
			var name string
			var t remoteTotal
			if err := found.Scan(&name, &t.Files, &t.Bytes); err != nil {
				return err
			}
			all[name] = t
		}
		return found.Err()
	})
	return all, err
}

// withReadConn is attempt for statements that read.
func (x *sqlIndex) withReadConn(ctx context.Context, f func(context.Context, *sql.Conn) error) error {
	if err := x.downError(); err != nil {
		return err
	}
	return x.withConn(ctx, sqlReadTimeout, f)
}
