// store_reindex.go: reindex corrects the index in PostgreSQL from what is stored,
// beside running replicas.

package main

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"time"
)

// reindexBatch is how many rows are read and written at a time: a transaction of
// them ends within sqlReadTimeout on a slow database.
const reindexBatch = 500

// reindexer compares an index with what is stored. It holds two hashes for each
// row, so that a million rows take about 40 MB.
type reindexer struct {
	from   objects
	to     *sqlIndex
	report func(change, key string)
	seed   maphash.Seed
	rows   map[uint64]uint64 // hash of the key: hash of the row, until its object is found
	due    []rowChange       // rows to be added
}

// reindex gives each stored object its row, and drops each row that was there before
// and has no object. What replicas write meanwhile wins. It calls report for each
// row, with "added" or "dropped".
func reindex(ctx context.Context, from objects, to *sqlIndex, report func(change, key string)) error {
	x := &reindexer{from: from, to: to, report: report, seed: maphash.MakeSeed(), rows: map[uint64]uint64{}}
	// The rows are read before the objects: a row that is saved meanwhile is then
	// not among them, and is left alone.
	err := x.eachRow(ctx, func(r indexRow) error {
		x.rows[x.hashKey(r.Key)] = x.hashRow(r)
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the index: %w", err)
	}
	err = from.walk(ctx, func(key string, rec *record) error { return x.checkObject(ctx, newIndexRow(key, rec)) })
	if err != nil {
		return fmt.Errorf("reading what is stored: %w", err)
	}
	if err := x.addDue(ctx); err != nil {
		return fmt.Errorf("adding rows: %w", err)
	}
	if len(x.rows) == 0 {
		return nil
	}
	if err := x.eachRow(ctx, func(r indexRow) error { return x.dropIfLost(ctx, r) }); err != nil {
		return fmt.Errorf("dropping rows: %w", err)
	}
	return nil
}

func (x *reindexer) hashKey(key string) uint64 { return maphash.String(x.seed, key) }

// hashRow hashes what a row says about its object. PostgreSQL keeps microseconds.
func (x *reindexer) hashRow(r indexRow) uint64 {
	r.Hits, r.LastAccess, r.Fetched = 0, time.Time{}, r.Fetched.Round(time.Microsecond).UTC()
	return maphash.Comparable(x.seed, r)
}

// eachRow calls f with all rows, those that were not used for the longest time first. A
// row that is used meanwhile may come twice.
func (x *reindexer) eachRow(ctx context.Context, f func(indexRow) error) error {
	q := pageQuery{oldest: true, limit: reindexBatch}
	for more := true; more; more = q.after != "" {
		p, err := x.to.listPage(ctx, q)
		if err != nil {
			return err
		}
		for _, r := range p.rows {
			if err := f(r); err != nil {
				return err
			}
		}
		q.after = p.next
	}
	return nil
}

// checkObject compares a stored object with its row, and takes the row off the list.
func (x *reindexer) checkObject(ctx context.Context, r indexRow) error {
	r.ContentType = toSQLText(r.ContentType)
	k := x.hashKey(r.Key)
	sum, found := x.rows[k]
	delete(x.rows, k)
	if found && sum == x.hashRow(r) {
		return nil
	}
	if x.due = append(x.due, rowChange{key: r.Key, save: &r}); len(x.due) >= reindexBatch {
		return x.addDue(ctx)
	}
	return nil
}

func (x *reindexer) addDue(ctx context.Context) error {
	if err := x.to.writeChanges(ctx, x.due); err != nil {
		return err
	}
	for _, c := range x.due {
		x.report("added", c.key)
	}
	x.due = x.due[:0]
	return nil
}

// dropIfLost drops r if it was there from the start, is unchanged and still has no
// object: the walk took long, and an object may have been replaced under it.
func (x *reindexer) dropIfLost(ctx context.Context, r indexRow) error {
	if sum, listed := x.rows[x.hashKey(r.Key)]; !listed || sum != x.hashRow(r) {
		return nil
	}
	_, err := x.from.open(ctx, r.Key, -1)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := x.to.writeChanges(ctx, []rowChange{{key: r.Key, madeAt: r.Fetched}}); err != nil {
		return err
	}
	x.report("dropped", r.Key)
	return nil
}
