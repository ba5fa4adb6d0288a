// store_pending.go: changes of the index that PostgreSQL has not taken yet. They
// wait in memory and are written in order when the database is back. What a crash
// loses of them comes back with the next use of the file, or with reindex.

package main

import (
	"context"
	"database/sql"
	"errors"
	"sync"
	"time"
)

const (
	// maxPendingChanges bounds the memory that an outage takes: about 50 MB.
	maxPendingChanges = 100_000
	// pendingBatch is how many changes a transaction writes: enough to be fast, few
	// enough to end within sqlReadTimeout on a slow database.
	pendingBatch = 100
)

// rowChange saves or deletes one row of the index.
type rowChange struct {
	key    string
	save   *indexRow // the new row; nil deletes
	madeAt time.Time
}

// pendingChanges is a bounded queue. Its methods may be called concurrently, but
// only one goroutine at a time may call first and removeFirst.
type pendingChanges struct {
	mu      sync.Mutex // guards the fields below; no other lock is taken under it
	queue   []rowChange
	dropped bool // since the start, a change found the queue full
}

// add appends a change and reports whether there was room. A change that is dropped
// costs a row, until the next use of the file or reindex; a deletion that is dropped
// leaves a row without an object, until reindex.
func (p *pendingChanges) add(c rowChange) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) >= maxPendingChanges {
		p.dropped = true
		return false
	}
	p.queue = append(p.queue, c)
	return true
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

func (p *pendingChanges) removeFirst(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.queue = p.queue[n:]; len(p.queue) == 0 {
		p.queue = nil // frees the memory
	}
}

// changeRow makes a change in the database. While the database is down the change
// waits, and behind it all others, so that their order is kept. The object of the
// row is stored or removed already: the change does not end with ctx.
func (x *sqlIndex) changeRow(ctx context.Context, c rowChange) error {
	c.madeAt = x.now()
	if waiting, _ := x.pending.state(); waiting == 0 && x.downError() == nil {
		err := x.withConn(context.WithoutCancel(ctx), sqlWriteTimeout, func(ctx context.Context, conn *sql.Conn) error {
			return c.execute(ctx, conn, false)
		})
		if !errors.Is(err, errStoreDown) {
			return err
		}
	}
	if !x.pending.add(c) {
		x.dropping.Do(func() {
			x.log.Error("too many index rows wait for the database: further ones are dropped, and come back with the next use of their file or with reindex", "waiting", maxPendingChanges)
		})
	}
	return nil
}

// writePending is the step of a background loop. It probes a database that is down,
// and writes the changes that wait. A change that the database refuses is dropped.
func (x *sqlIndex) writePending(ctx context.Context) error {
	x.writing.Lock()
	defer x.writing.Unlock()
	if err := x.probe(ctx); err != nil {
		return err
	}
	written := 0
	for {
		batch := x.pending.first(pendingBatch)
		if len(batch) == 0 {
			break
		}
		err := x.writeChanges(ctx, batch)
		if err != nil && !errors.Is(err, errStoreDown) && len(batch) > 1 {
			batch = batch[:1] // find out which one is refused
			err = x.writeChanges(ctx, batch)
		}
		if errors.Is(err, errStoreDown) {
			return err
		}
		if err != nil {
			x.log.Error("the database refuses an index row: the file is not listed", "key", batch[0].key, "error", err)
		}
		x.pending.removeFirst(len(batch))
		written += len(batch)
	}
	if written > 0 {
		x.log.Info("index rows that waited for the database are written", "rows", written)
	}
	return nil
}

// writeChanges makes changes in one transaction, unless the database has a row of
// an object that was fetched later. All of them are safe to repeat, as after a
// commit whose answer was lost.
func (x *sqlIndex) writeChanges(ctx context.Context, changes []rowChange) error {
	return x.whileUp(ctx, func(ctx context.Context, conn *sql.Conn) error {
		return inTransaction(ctx, conn, func(tx *sql.Tx) error {
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
	if waiting, _ := x.pending.state(); waiting > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), sqlWriteTimeout)
		defer cancel()
		if err := x.writePending(ctx); err != nil {
			waiting, _ = x.pending.state()
			x.log.Warn("index rows are lost: they come back with the next use of their file or with reindex", "rows", waiting, "error", err)
		}
	}
	return x.db.Close()
}
