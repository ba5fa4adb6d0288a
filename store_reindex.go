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

// reindex gives each stored object its row, and drops each row that was there before
// and has no object. What replicas write meanwhile wins. It calls report for each
// row, with "added" or "dropped".
func reindex(ctx context.Context, from objects, to *sqlIndex, report func(change, key string)) error {
	seed := maphash.MakeSeed()
	// By the hash of its key, rows holds the hash of each row whose object is not found
	// yet: a million take about 40 MB. They are read before the objects: a row that is
	// saved meanwhile is then not among them, and is left alone.
	rows := map[uint64]uint64{}
	err := to.eachRow(ctx, func(r indexRow) error {
		rows[maphash.String(seed, r.Key)] = hashRow(seed, r)
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
			report("added", c.key)
		}
		due = due[:0]
		return nil
	}
	err = from.walk(ctx, func(key string, rec *record) error {
		r, hash := newIndexRow(key, rec), maphash.String(seed, key)
		r.ContentType = toSQLText(r.ContentType)
		if sum, found := rows[hash]; !found || sum != hashRow(seed, r) {
			due = append(due, rowChange{key: key, save: &r})
		}
		delete(rows, hash)
		if len(due) < reindexBatch {
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
		if sum, isLost := rows[maphash.String(seed, r.Key)]; !isLost || sum != hashRow(seed, r) {
			return nil
		}
		// The walk took long, and an object may have been replaced under it.
		if _, err := from.open(ctx, r.Key, -1); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := to.writeChanges(ctx, []rowChange{{key: r.Key, madeAt: r.Fetched}}); err != nil {
			return fmt.Errorf("dropping the row of %s: %w", r.Key, err)
		}
		report("dropped", r.Key)
		return nil
	})
}

// hashRow hashes what a row says about its object. PostgreSQL keeps microseconds.
func hashRow(seed maphash.Seed, r indexRow) uint64 {
	r.Hits, r.LastAccess, r.Fetched = 0, time.Time{}, r.Fetched.Round(time.Microsecond).UTC()
	return maphash.Comparable(seed, r)
}

// eachRow calls f with all rows, those that were not used for the longest time first. A
// row that is used meanwhile may come twice.
func (x *sqlIndex) eachRow(ctx context.Context, f func(indexRow) error) error {
	q := pageQuery{oldest: true, limit: reindexBatch}
	for more := true; more; more = q.after != "" {
		p, err := x.listPage(ctx, q)
		if err != nil {
			return fmt.Errorf("reading the index: %w", err)
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
