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
	"io"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
)

const (
	// sqlWriteWait bounds a change: a fill waits for it, and what takes longer
	// is as well kept in the journal.
	sqlWriteWait = 2 * time.Second
	// sqlReadWait bounds one statement that reads. A page of the largest size
	// from cold disks stays far below.
	sqlReadWait = 5 * time.Second
	// sqlConns bounds what one replica takes of the server's connections, of
	// which there are 100 unless told otherwise.
	sqlConns = 8
	// sqlIdle closes connections before middle boxes forget them.
	sqlIdle = time.Minute
	// sqlStep is how many rows one statement reads at most: a pattern that
	// matches little must not hold a connection while a remote is searched.
	sqlStep = 1000
	// sqlTouches is how many uses one statement counts.
	sqlTouches = 1000
	// A database that is down is tried again after a second, and then after
	// ever longer pauses: soon enough for people who watch it come back.
	sqlPauseMin = time.Second
	sqlPauseMax = 5 * time.Second
	// sqlLockKey is the first half of the advisory lock that migrations hold;
	// the second is the schema's.
	sqlLockKey = 0x61727466
	// behindKeys sorts behind all keys, whose bytes are below it.
	behindKeys = "\x7f"
)

var _ index = (*sqlIndex)(nil)

// sqlMigrations make the schema, one version each. Replicas of the version
// before go on working beside a new one, so that a migration may add things
// and must not take any away. One that takes long on many rows (an index)
// needs a step of its own, outside of the transaction: sqlReadWait bounds it.
var sqlMigrations = []string{`
CREATE TABLE artifactapi_files (
	key text COLLATE "C" PRIMARY KEY,
	remote text COLLATE "C" NOT NULL,
	path text COLLATE "C" NOT NULL,
	spelling text NOT NULL,
	sha256 text NOT NULL,
	content_type text NOT NULL,
	class text NOT NULL,
	size bigint NOT NULL,
	hits bigint NOT NULL,
	fetched_at timestamptz NOT NULL,
	last_access timestamptz NOT NULL
);
COMMENT ON COLUMN artifactapi_files.path IS 'decoded: what listings sort and choose by, in byte order';
CREATE INDEX artifactapi_files_by_path ON artifactapi_files (remote, path, key);
CREATE INDEX artifactapi_files_by_age ON artifactapi_files (last_access, key);
CREATE INDEX artifactapi_files_by_remote_age ON artifactapi_files (remote, last_access, key);

CREATE TABLE artifactapi_totals (
	remote text COLLATE "C" NOT NULL,
	slot integer NOT NULL,
	files bigint NOT NULL,
	bytes bigint NOT NULL,
	PRIMARY KEY (remote, slot)
);
CREATE FUNCTION artifactapi_count() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	f artifactapi_files%ROWTYPE;
	n bigint := 0;
	b bigint := 0;
BEGIN
	IF TG_OP <> 'INSERT' THEN f := OLD; n := n - 1; b := b - OLD.size; END IF;
	IF TG_OP <> 'DELETE' THEN f := NEW; n := n + 1; b := b + NEW.size; END IF;
	IF n <> 0 OR b <> 0 THEN
		INSERT INTO artifactapi_totals AS t (remote, slot, files, bytes)
		VALUES (f.remote, hashtext(f.key) & 15, n, b)
		ON CONFLICT (remote, slot) DO UPDATE
		SET files = t.files + excluded.files, bytes = t.bytes + excluded.bytes;
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER artifactapi_count AFTER INSERT OR DELETE OR UPDATE OF size
ON artifactapi_files FOR EACH ROW EXECUTE FUNCTION artifactapi_count();

CREATE TABLE artifactapi_journals (
	id text PRIMARY KEY,
	done bigint NOT NULL,
	at timestamptz NOT NULL
);
COMMENT ON TABLE artifactapi_journals IS 'how far the journal of a replica has been written, in the transaction that wrote it';`,
}

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

// sqlSettings say where the database is.
type sqlSettings struct {
	host, port, user, name, sslmode string
	password                        secret
	schema                          string // "": where the user's tables go by default
}

// dsn is what lib/pq connects with. binary_parameters spares a round trip a
// statement, and named statements, which poolers such as PgBouncer dislike.
func (s sqlSettings) dsn() string {
	quote := strings.NewReplacer(`\`, `\\`, `'`, `\'`)
	var b strings.Builder
	for _, kv := range [][2]string{
		{"host", s.host}, {"port", s.port}, {"user", s.user}, {"password", string(s.password)}, {"dbname", s.name},
		{"sslmode", s.sslmode}, {"search_path", s.schema}, {"connect_timeout", "2"},
		{"binary_parameters", "yes"}, {"fallback_application_name", "artifactapi"},
	} {
		if kv[1] != "" {
			fmt.Fprintf(&b, "%s='%s' ", kv[0], quote.Replace(kv[1]))
		}
	}
	return b.String()
}

// pqConn is all that lib/pq's connections can do.
type pqConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.NamedValueChecker
	driver.Pinger
	driver.QueryerContext
	driver.SessionResetter
	driver.Validator
}

// wiredConn is a connection that can be cut: lib/pq waits for an answer to a
// statement whatever its context says.
type wiredConn struct {
	pqConn
	wire net.Conn
}

// cut ends all waiting for the server. A deadline would not do: lib/pq sets its
// own during the handshake.
func (c *wiredConn) cut() { c.wire.Close() }

// wiredConnector makes wiredConns.
type wiredConnector struct{ dsn string }

func (w *wiredConnector) Driver() driver.Driver { return &pq.Driver{} }

// Connect: see driver.Connector. It ends with ctx.
func (w *wiredConnector) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := pq.NewConnector(w.dsn)
	if err != nil {
		return nil, err
	}
	d := &wireDialer{}
	c.Dialer(d)
	stop := context.AfterFunc(ctx, d.cut)
	raw, err := c.Connect(ctx)
	if err != nil {
		stop()
		return nil, err
	}
	conn, ok := raw.(pqConn)
	if !ok {
		err = errors.New("this version of lib/pq is not the one this was written for")
	} else {
		// Sent behind the start and not with it, where PgBouncer refuses them.
		_, err = conn.ExecContext(ctx, sqlSession, nil)
	}
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		raw.Close()
		return nil, err
	}
	return &wiredConn{conn, d.wire}, nil
}

// wireDialer dials for one connection and remembers what it dialled first:
// lib/pq dials again to cancel a statement.
type wireDialer struct {
	net.Dialer
	mu     sync.Mutex // guards the rest
	wire   net.Conn
	closed bool
}

// DialContext: see pq.DialerContext.
func (d *wireDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := d.Dialer.DialContext(ctx, network, address)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil && d.wire == nil {
		d.wire = c
	}
	if err == nil && d.closed {
		c.Close()
	}
	return c, err
}

// DialTimeout: see pq.Dialer, which prefers DialContext.
func (d *wireDialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout(network, address, timeout)
}

// cut ends the handshake.
func (d *wireDialer) cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	if d.wire != nil {
		d.wire.Close()
	}
}

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
	return newSQLIndexOn(&wiredConnector{set.dsn()}, set.password, dataDir, now, log), nil
}

func newSQLIndexOn(c driver.Connector, password secret, dataDir string, now func() time.Time, log *slog.Logger) *sqlIndex {
	db := sql.OpenDB(c)
	db.SetMaxOpenConns(sqlConns)
	db.SetMaxIdleConns(sqlConns)
	db.SetConnMaxIdleTime(sqlIdle)
	return &sqlIndex{db: db, journal: newJournal(dataDir), now: now, log: log, password: password}
}

// redact is err's text without the password.
func redact(err error, password secret) string {
	if password == "" {
		return err.Error()
	}
	return strings.ReplaceAll(err.Error(), string(password), password.String())
}

// save: see index.
func (x *sqlIndex) save(ctx context.Context, r row) error {
	return x.change(ctx, change{Save: &r})
}

// delete: see index. A row that is not there is no error.
func (x *sqlIndex) delete(ctx context.Context, remote, key string) error {
	return x.change(ctx, change{Delete: key})
}

// touch: see index. A connection that is lost between the work and its answer
// counts uses twice; they are statistics.
func (x *sqlIndex) touch(ctx context.Context, batch []touch) error {
	for part := range slices.Chunk(batch, sqlTouches) {
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
	if x.known() != nil || x.journal.pending() {
		return x.journal.append(c)
	}
	err := x.attempt(context.WithoutCancel(ctx), sqlWriteWait, func(ctx context.Context, conn *sql.Conn) error {
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
		_, err = on.ExecContext(ctx, sqlSave, r.Key, r.Remote, clean(decodedPath(r.Path)), clean(r.Path), r.SHA256,
			clean(r.ContentType), string(r.Class), r.Size, r.Hits, r.Fetched.UTC(), r.LastAccess.UTC(), late)
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

// clean drops what a text of PostgreSQL cannot hold. Paths have none of it;
// header values that we were sent may.
func clean(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "")
}

// page: see index. It is complete unless rows wait in the journal.
func (x *sqlIndex) page(ctx context.Context, q pageQuery) (page, error) {
	q.limit = max(q.limit, 1)
	scan := newSQLScan(q)
	p := page{complete: !x.journal.pending()}
	for {
		rows, err := x.rows(ctx, scan)
		if err != nil {
			return page{}, err
		}
		for _, r := range rows {
			if !scan.takes(r) {
				continue
			}
			if len(p.rows) == q.limit {
				p.next = scan.token(p.rows[q.limit-1], r)
				return p, nil
			}
			p.rows = append(p.rows, r)
		}
		if len(rows) < scan.step {
			return p, nil
		}
		scan.behind(rows[len(rows)-1])
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
	s := &sqlScan{q: q, step: min(q.limit+1, sqlStep)} // one more, to see whether there is a next page
	if q.pattern != nil || q.oldest && q.prefix != "" {
		s.step = sqlStep
	}
	at, key, variant := strings.Cut(q.after, "\n")
	if q.oldest {
		if micros, err := strconv.ParseInt(at, 10, 64); err == nil {
			s.last, s.key = time.UnixMicro(micros), clean(key)
		}
		return s
	}
	s.path, s.key = at, key
	if !variant {
		s.key = behindKeys
	}
	if q.after == "" || s.path < q.prefix {
		s.path, s.key = q.prefix, ""
	}
	// What is no text begins where the text before it ends; takes does the rest.
	if text := textOf(s.path); text != s.path {
		s.path, s.key = text, ""
	}
	s.key = clean(s.key)
	return s
}

// textOf is the beginning of s that can be a text of PostgreSQL.
func textOf(s string) string {
	for i, r := range s {
		if r == 0 || r == utf8.RuneError && !strings.HasPrefix(s[i:], "\uFFFD") {
			return s[:i]
		}
	}
	return s
}

// above is the least text behind all that begin with prefix, if there is one.
// UTF-8 sorts as its code points do.
func above(prefix string) (string, bool) {
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
	switch limit, has := above(textOf(s.q.prefix)); {
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

// behind moves on to what follows r.
func (s *sqlScan) behind(r row) {
	s.path, s.key, s.last = clean(decodedPath(r.Path)), r.Key, r.LastAccess
}

// takes tells whether a row belongs on the page.
func (s *sqlScan) takes(r row) bool {
	path := decodedPath(r.Path)
	after, _, variant := strings.Cut(s.q.after, "\n")
	if !s.q.oldest && !variant && after != "" && path <= after {
		return false
	}
	return strings.HasPrefix(path, s.q.prefix) && (s.q.pattern == nil || s.q.pattern.MatchString(path))
}

// token is the page's next: the last row's path, with its key only when the
// following row has the same path, so that tokens can be written by hand.
func (s *sqlScan) token(last, following row) string {
	if s.q.oldest {
		return strconv.FormatInt(last.LastAccess.UnixMicro(), 10) + "\n" + last.Key
	}
	path := decodedPath(last.Path)
	if path == decodedPath(following.Path) {
		return path + "\n" + last.Key
	}
	return path
}

// rows reads a step.
func (x *sqlIndex) rows(ctx context.Context, s *sqlScan) (all []row, err error) {
	query, args := s.statement()
	err = x.read(ctx, func(ctx context.Context, conn *sql.Conn) error {
		all = nil // of an attempt that failed
		found, err := conn.QueryContext(ctx, query, args...)
		if err != nil {
			return err
		}
		defer found.Close()
		for found.Next() {
			var r row
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
func (x *sqlIndex) totals(ctx context.Context) (all map[string]total, err error) {
	err = x.read(ctx, func(ctx context.Context, conn *sql.Conn) error {
		all = map[string]total{}
		found, err := conn.QueryContext(ctx, sqlTotals)
		if err != nil {
			return err
		}
		defer found.Close()
		for found.Next() {
			var name string
			var t total
			if err := found.Scan(&name, &t.Files, &t.Bytes); err != nil {
				return err
			}
			all[name] = t
		}
		return found.Err()
	})
	return all, err
}

// read is attempt for statements that read.
func (x *sqlIndex) read(ctx context.Context, f func(context.Context, *sql.Conn) error) error {
	if err := x.known(); err != nil {
		return err
	}
	return x.attempt(ctx, sqlReadWait, f)
}

// ping asks the database whether it answers: errStoreDown if not. One that is
// known to be down is asked when its pause is over.
func (x *sqlIndex) ping(ctx context.Context) error {
	if err := x.waiting(); err != nil {
		return err
	}
	return x.attempt(ctx, sqlReadWait, func(ctx context.Context, conn *sql.Conn) error {
		_, err := conn.ExecContext(ctx, sqlPing)
		return err
	})
}

// close ends all connections. What is journalled stays for the next start.
func (x *sqlIndex) close() error {
	return errors.Join(x.db.Close(), x.journal.close())
}

// known is why the database is down, or nil.
func (x *sqlIndex) known() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.broken == nil {
		return nil
	}
	return fmt.Errorf("%w: database: %v", errStoreDown, x.broken)
}

// waiting is known until it is time to try again.
func (x *sqlIndex) waiting() error {
	err := x.known()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.now().Before(x.next) {
		return err
	}
	return nil
}

// attempt runs f on a connection, within wait, and learns from it whether the
// database is up. Only errors of our own are told from it: errStoreDown, that
// of the caller's context, or one of the data that f sent.
func (x *sqlIndex) attempt(ctx context.Context, wait time.Duration, f func(context.Context, *sql.Conn) error) error {
	inner, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	var err error
	for range 3 { // a stale connection, a deadlock; then it is something else
		if err = x.on(inner, f); err == nil || inner.Err() != nil || !x.again(err) {
			break
		}
	}
	switch {
	case err == nil:
		x.up()
		return nil
	case ctx.Err() != nil: // the caller was in a hurry, which says nothing about the database
		return fmt.Errorf("%w: database: %w", errStoreDown, ctx.Err())
	case badData(err):
		return fmt.Errorf("database: %s", redact(err, x.password))
	}
	text := errors.New(redact(err, x.password))
	x.down(text)
	return fmt.Errorf("%w: database: %v", errStoreDown, text)
}

// on runs f on a connection of its own, over an up to date schema. The
// connection is cut when ctx ends.
func (x *sqlIndex) on(ctx context.Context, f func(context.Context, *sql.Conn) error) error {
	conn, err := x.db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	var wired *wiredConn
	_ = conn.Raw(func(c any) error {
		wired, _ = c.(*wiredConn)
		return nil
	})
	if wired != nil {
		stop := context.AfterFunc(ctx, wired.cut)
		defer func() {
			if !stop() {
				_ = conn.Raw(func(any) error { return driver.ErrBadConn }) // which drops it
			}
		}()
	}
	if err := x.migrate(ctx, conn); err != nil {
		return err
	}
	return f(ctx, conn)
}

// staleErrors are what a connection says whose server was started again.
var staleErrors = []error{driver.ErrBadConn, io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, syscall.ECONNRESET, syscall.EPIPE}

func stale(err error) bool {
	return slices.ContainsFunc(staleErrors, func(e error) bool { return errors.Is(err, e) })
}

// again tells whether it is worth to try again at once, and prepares for it.
func (x *sqlIndex) again(err error) bool {
	e, ok := errors.AsType[*pq.Error](err)
	switch {
	case !ok: // connections die together: the next must be a new one
		x.db.SetMaxIdleConns(0)
		x.db.SetMaxIdleConns(sqlConns)
		return stale(err)
	case e.Code == "42P01": // a table is gone: somebody made the database anew
		x.setReady(false)
		return true
	}
	// Deadlocks, and what a restart says on old connections.
	return e.Code.Class() == "40" || e.Code.Class() == "57"
}

// badData tells that the database is well and will never take this: malformed
// values, broken constraints, too large for an index.
func badData(err error) bool {
	e, ok := errors.AsType[*pq.Error](err)
	return ok && slices.Contains([]pq.ErrorClass{"22", "23", "54"}, e.Code.Class())
}

func (x *sqlIndex) up() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.broken != nil {
		x.log.Info("database is usable again")
	}
	x.broken, x.pause, x.next = nil, 0, time.Time{}
}

// down notes that the database cannot be used. Of many requests that find out
// together, one counts.
func (x *sqlIndex) down(err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.broken == nil {
		x.log.Error("database is down: what is stored is indexed when it is back", "error", err)
	} else if x.now().Before(x.next) {
		return
	}
	x.broken = err
	x.pause = min(max(2*x.pause, sqlPauseMin), sqlPauseMax)
	x.next = x.now().Add(x.pause)
}

func (x *sqlIndex) setReady(ready bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ready = ready
}

// migrate brings the schema up to date, once. Replicas that start together
// wait for each other.
func (x *sqlIndex) migrate(ctx context.Context, conn *sql.Conn) error {
	x.mu.Lock()
	ready := x.ready
	x.mu.Unlock()
	if ready {
		return nil
	}
	err := inTx(ctx, conn, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, sqlLock, sqlLockKey); err != nil {
			return err
		}
		return migrateTo(ctx, tx, sqlMigrations)
	})
	if err != nil {
		return fmt.Errorf("preparing the schema: %w", err)
	}
	x.setReady(true)
	return nil
}

// migrateTo runs the steps that the schema does not have. A schema that is
// newer than the program is left to it: see sqlMigrations.
func migrateTo(ctx context.Context, tx *sql.Tx, steps []string) error {
	var has bool
	var encoding string
	if err := tx.QueryRowContext(ctx, sqlHasSchema).Scan(&has, &encoding); err != nil {
		return err
	}
	if encoding != "UTF8" && encoding != "SQL_ASCII" {
		return fmt.Errorf("the database's encoding is %s: make one with UTF8", encoding)
	}
	if !has {
		if _, err := tx.ExecContext(ctx, sqlMakeSchema); err != nil {
			return err
		}
	}
	var version int
	if err := tx.QueryRowContext(ctx, sqlVersion).Scan(&version); err != nil {
		return err
	}
	for ; version < len(steps); version++ {
		if _, err := tx.ExecContext(ctx, steps[version]); err != nil {
			return fmt.Errorf("version %d: %w", version+1, err)
		}
		if _, err := tx.ExecContext(ctx, sqlSetVersion, version+1); err != nil {
			return err
		}
	}
	return nil
}

// inTx runs f in a transaction, which is undone when f fails.
func inTx(ctx context.Context, conn *sql.Conn, f func(*sql.Tx) error) error {
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		_ = tx.Rollback() // f's error counts
		return err
	}
	return tx.Commit()
}
