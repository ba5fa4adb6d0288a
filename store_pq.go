// store_pq.go: connections to PostgreSQL that end with their context, outages of the
// database, and its schema.

package main

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

// sqlSchema makes the schema of version 1, the only one that there was. Replicas of two
// versions work beside each other: the next version may add something and must not
// remove anything.
//
//go:embed store_pq.sql
var sqlSchema string

// sqlSettings say where the database is.
type sqlSettings struct {
	host, port, user, name, sslmode string
	password                        secret
	schema                          string // "": the user's default
}

// dsn returns the settings as a URL for lib/pq. binary_parameters saves a round trip
// for each statement, and avoids named statements, which poolers such as PgBouncer
// do not support.
func (s sqlSettings) dsn() string {
	return "postgres:///?" + url.Values{
		"host": {s.host}, "port": {s.port}, "user": {s.user}, "password": {string(s.password)}, "dbname": {s.name},
		"sslmode": {s.sslmode}, "search_path": {s.schema}, "connect_timeout": {"2"},
		"binary_parameters": {"yes"}, "fallback_application_name": {"artifactapi"},
	}.Encode()
}

// sqlConnector makes connections of lib/pq that end with the context of their use.
type sqlConnector struct{ dsn string }

// Driver: see driver.Connector.
func (c *sqlConnector) Driver() driver.Driver { return &pq.Driver{} }

// Connect: see driver.Connector.
func (c *sqlConnector) Connect(ctx context.Context) (driver.Conn, error) {
	connector, err := pq.NewConnector(c.dsn)
	if err != nil {
		return nil, err
	}
	d := &cuttingDialer{connecting: ctx}
	connector.Dialer(d)
	conn, err := connector.Connect(ctx) // connect_timeout bounds it
	if err != nil {
		return nil, err
	}
	d.stop() // if ctx has ended already, the next statement fails
	d.connected.Store(true)
	// PgBouncer refuses these settings as part of the start of a connection.
	if _, err = conn.(driver.ExecerContext).ExecContext(ctx, sqlSession, nil); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// cuttingDialer dials for one connection of lib/pq. When the context of a statement
// ends, lib/pq dials again, to ask the server to cancel the statement, and goes on
// waiting for the answer as long as the server likes. Here the second dial ends the
// wait instead. The server ends the statement itself, by statement_timeout. While it logs
// in, lib/pq heeds no context: here the end of connecting ends that, too.
type cuttingDialer struct {
	pq.Dialer  // nil: lib/pq calls DialContext alone
	connecting context.Context
	conn       net.Conn    // not changed once it is connected
	stop       func() bool // ends the watch over connecting
	connected  atomic.Bool // a further dial is for a cancellation
}

// DialContext: see pq.DialerContext.
func (d *cuttingDialer) DialContext(ctx context.Context, network, address string) (c net.Conn, err error) {
	if d.connected.Load() {
		d.conn.Close()
		return nil, net.ErrClosed
	}
	if d.conn, err = (&net.Dialer{}).DialContext(ctx, network, address); err == nil {
		conn := d.conn
		d.stop = context.AfterFunc(d.connecting, func() { conn.Close() })
	}
	return d.conn, err
}

// ping asks the database whether it can be used: errStoreDown if not. While the
// database is down it does not ask: a check of health is too short to connect again.
func (x *sqlIndex) ping(ctx context.Context) error {
	if cause := x.outage.outageCause(); cause != nil {
		return fmt.Errorf("%w: %v", errStoreDown, cause)
	}
	return x.withConn(ctx, sqlReadTimeout, execPing)
}

func execPing(ctx context.Context, conn *sql.Conn) error {
	var isReadOnly bool
	err := conn.QueryRowContext(ctx, sqlPing).Scan(&isReadOnly)
	if err == nil && isReadOnly {
		err = errors.New("it takes no rows: it is a standby server, and DBHOST must name the primary, or default_transaction_read_only is on")
	}
	return err
}

// withConn runs f on a connection, within timeout. It may run f several times. While
// the database is down, one call now and then finds out whether it is back, and the
// others fail at once. The error is errStoreDown, except where the database refuses
// the data that f sent.
func (x *sqlIndex) withConn(ctx context.Context, timeout time.Duration, f func(context.Context, *sql.Conn) error) error {
	inner, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if cause := x.outage.admit(inner); cause != nil {
		return fmt.Errorf("%w: %v", errStoreDown, cause)
	}
	began := x.now()
	mayRetry, err := x.runOnConn(inner, f)
	for n := 1; mayRetry && n < 3; n++ { // after a stale connection and a deadlock it is something else
		mayRetry, err = x.runOnConn(inner, f)
	}
	badData := isBadData(err)
	if err != nil {
		err = errors.New("database: " + redact(cmp.Or(inner.Err(), err), x.password)) // the end of inner closes the connection, which says less
	}
	switch {
	case err != nil && ctx.Err() != nil: // the caller did not wait: the database may be up
		return fmt.Errorf("%w: database: %w", errStoreDown, ctx.Err())
	case err != nil && !badData:
		if x.outage.fail(err, began) {
			x.log.Error("database is down: files are stored and served, their index rows wait", "error", err)
		}
		return fmt.Errorf("%w: %v", errStoreDown, err)
	}
	if lasted, recovered := x.outage.succeed(); recovered {
		x.log.Info("database is up again", "after", lasted.Round(time.Second).String())
	}
	return err
}

// runOnConn runs f on a connection of its own, with the schema up to date. After an
// error mayRetry says whether another connection may do better at once.
func (x *sqlIndex) runOnConn(ctx context.Context, f func(context.Context, *sql.Conn) error) (mayRetry bool, err error) {
	conn, err := x.db.Conn(ctx)
	if err != nil {
		return false, err
	}
	if !x.ready.Load() {
		if err = x.makeSchema(ctx, conn); err != nil {
			err = fmt.Errorf("preparing the schema: %w", err)
		}
		x.ready.Store(err == nil)
	}
	if err == nil && x.outage.outageCause() != nil {
		err = execPing(ctx, conn) // f may work on a standby, and prove nothing
	}
	if err == nil {
		err = f(ctx, conn)
	}
	conn.Close() // its error is that of f
	if err == nil || isBadData(err) || ctx.Err() != nil {
		return false, err
	}
	// What ends one connection ends all: a restart, or a failover after which they lead
	// to a standby. The next one must be new.
	x.db.SetMaxIdleConns(0)
	x.db.SetMaxIdleConns(sqlConns)
	if e, ok := errors.AsType[*pq.Error](err); ok && e.Code == "42P01" {
		x.ready.Store(false) // a table is missing: somebody made the database anew
	}
	return true, err
}

// isBadData reports whether the database works and will always refuse what it was
// sent: malformed values, broken constraints, too large for an index.
func isBadData(err error) bool {
	e, ok := errors.AsType[*pq.Error](err)
	return ok && slices.Contains([]string{"22", "23", "54"}, string(e.Code.Class()))
}

// makeSchema makes the schema, unless it is there. Replicas that start together wait for
// each other. A schema that is newer than the program is refused: its rows may mean what
// the program does not know.
func (x *sqlIndex) makeSchema(ctx context.Context, conn *sql.Conn) error {
	isMade := false
	err := inTransaction(ctx, conn, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, sqlLock, sqlLockKey); err != nil {
			return err
		}
		var has bool
		err := tx.QueryRowContext(ctx, sqlHasSchema).Scan(&has)
		version := 0 // also where all tables were emptied
		if err == nil && has {
			err = tx.QueryRowContext(ctx, sqlVersion).Scan(&version)
		}
		switch {
		case err != nil && !errors.Is(err, sql.ErrNoRows):
			return err
		case version > 1:
			return fmt.Errorf("its version is %d, and this artifactapi knows 1: run the newer artifactapi that made it", version)
		case version == 0:
			_, err = tx.ExecContext(ctx, sqlSchema)
			isMade = err == nil
			return err
		}
		return nil
	})
	if isMade && err == nil {
		x.log.Info("the tables were missing and have been made: what is stored already is listed from its next use on, or after artifactapi reindex")
	}
	return err
}

// inTransaction runs f in a transaction, and undoes it if f fails.
func inTransaction(ctx context.Context, conn *sql.Conn, f func(*sql.Tx) error) error {
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		_ = tx.Rollback() // the error of f says more
		return err
	}
	return tx.Commit()
}
