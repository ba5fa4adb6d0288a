// store_pq.go: connections to PostgreSQL, which end when they should, what is
// known about its being up, and the schema.

package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lib/pq"
)

// sqlMigrations make the schema, one version each. Replicas of the version
// before go on working beside a new one, so that a migration may add things
// and must not take any away. One that takes long on many rows (an index)
// needs a step of its own, outside of the transaction: sqlReadTimeout bounds it.
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

// cuttableConn is a connection that can be cut: lib/pq waits for an answer to a
// statement whatever its context says.
type cuttableConn struct {
	pqConn
	netConn net.Conn
}

// cut ends all waiting for the server. A deadline would not do: lib/pq sets its
// own during the handshake.
func (c *cuttableConn) cut() { c.netConn.Close() }

// cuttableConnector makes wiredConns.
type cuttableConnector struct{ dsn string }

func (w *cuttableConnector) Driver() driver.Driver { return &pq.Driver{} }

// Connect: see driver.Connector. It ends with ctx.
func (w *cuttableConnector) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := pq.NewConnector(w.dsn)
	if err != nil {
		return nil, err
	}
	d := &recordingDialer{}
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
	return &cuttableConn{conn, d.netConn}, nil
}

// recordingDialer dials for one connection and remembers what it dialled first:
// lib/pq dials again to cancel a statement.
type recordingDialer struct {
	net.Dialer
	mu      sync.Mutex // guards the rest
	netConn net.Conn
	closed  bool
}

// DialContext: see pq.DialerContext.
func (d *recordingDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := d.Dialer.DialContext(ctx, network, address)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil && d.netConn == nil {
		d.netConn = c
	}
	if err == nil && d.closed {
		c.Close()
	}
	return c, err
}

// DialTimeout: see pq.Dialer, which prefers DialContext.
func (d *recordingDialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout(network, address, timeout)
}

// cut ends the handshake.
func (d *recordingDialer) cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	if d.netConn != nil {
		d.netConn.Close()
	}
}

// ping asks the database whether it answers: errStoreDown if not. One that is
// known to be down is asked when its pause is over.
func (x *sqlIndex) ping(ctx context.Context) error {
	if err := x.retryError(); err != nil {
		return err
	}
	return x.withConn(ctx, sqlReadTimeout, func(ctx context.Context, conn *sql.Conn) error {
		_, err := conn.ExecContext(ctx, sqlPing)
		return err
	})
}

// Close ends all connections. What is journalled stays for the next start.
func (x *sqlIndex) Close() error {
	return errors.Join(x.db.Close(), x.journal.Close())
}

// downError is why the database is down, or nil.
func (x *sqlIndex) downError() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.broken == nil {
		return nil
	}
	return fmt.Errorf("%w: database: %v", errStoreDown, x.broken)
}

// retryError is known until it is time to try again.
func (x *sqlIndex) retryError() error {
	err := x.downError()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.now().Before(x.next) {
		return err
	}
	return nil
}

// withConn runs f on a connection, within wait, and learns from it whether the
// database is up. Only errors of our own are told from it: errStoreDown, that
// of the caller's context, or one of the data that f sent.
func (x *sqlIndex) withConn(ctx context.Context, wait time.Duration, f func(context.Context, *sql.Conn) error) error {
	inner, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	var err error
	for range 3 { // a stale connection, a deadlock; then it is something else
		if err = x.runOnConn(inner, f); err == nil || inner.Err() != nil || !x.mayRetry(err) {
			break
		}
	}
	switch {
	case err == nil:
		x.up()
		return nil
	case ctx.Err() != nil: // the caller was in a hurry, which says nothing about the database
		return fmt.Errorf("%w: database: %w", errStoreDown, ctx.Err())
	case isBadData(err):
		return fmt.Errorf("database: %s", redact(err, x.password))
	}
	text := errors.New(redact(err, x.password))
	x.down(text)
	return fmt.Errorf("%w: database: %v", errStoreDown, text)
}

// runOnConn runs f on a connection of its own, over an up to date schema. The
// connection is cut when ctx ends.
func (x *sqlIndex) runOnConn(ctx context.Context, f func(context.Context, *sql.Conn) error) error {
	conn, err := x.db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	var wired *cuttableConn
	_ = conn.Raw(func(c any) error {
		wired, _ = c.(*cuttableConn)
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

func isStaleConn(err error) bool {
	return slices.ContainsFunc(staleErrors, func(e error) bool { return errors.Is(err, e) })
}

// mayRetry tells whether it is worth to try again at once, and prepares for it.
func (x *sqlIndex) mayRetry(err error) bool {
	e, ok := errors.AsType[*pq.Error](err)
	switch {
	case !ok: // connections die together: the next must be a new one
		x.db.SetMaxIdleConns(0)
		x.db.SetMaxIdleConns(sqlConns)
		return isStaleConn(err)
	case e.Code == "42P01": // a table is gone: somebody made the database anew
		x.setReady(false)
		return true
	}
	// Deadlocks, and what a restart says on old connections.
	return e.Code.Class() == "40" || e.Code.Class() == "57"
}

// isBadData tells that the database is well and will never take this: malformed
// values, broken constraints, too large for an index.
func isBadData(err error) bool {
	e, ok := errors.AsType[*pq.Error](err)
	return ok && slices.Contains([]string{"22", "23", "54"}, string(e.Code.Class()))
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
	err := inTransaction(ctx, conn, func(tx *sql.Tx) error {
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

// inTransaction runs f in a transaction, which is undone when f fails.
func inTransaction(ctx context.Context, conn *sql.Conn, f func(*sql.Tx) error) error {
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
