// store_reindex.go: reindex makes the index follow from what is stored, beside
// replicas that go on.

package main

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"time"
)

// reindexBatch is how many rows are read and written at a time: a transaction
// of them ends within its time on a slow database.
const reindexBatch = 500

// rebuildableIndex is an index that reindex corrects while others write to it.
type rebuildableIndex interface {
	listPage(ctx context.Context, q pageQuery) (indexPage, error)
	totals(ctx context.Context) (map[string]remoteTotal, error)
	// restoreRows saves rows of what is stored, unless the one there was fetched
	// later.
	restoreRows(ctx context.Context, rows []indexRow) error
	// dropRow deletes a row, unless the one there was fetched later.
	dropRow(ctx context.Context, r indexRow) error
}

var _ rebuildableIndex = (*sqlIndex)(nil)

// reindexer compares an index with what is stored. It remembers two hashes a
// row, so that a million rows are about 40 MB.
type reindexer struct {
	from   objects
	to     rebuildableIndex
	report func(what, key string)
	seed   maphash.Seed
	rows   map[uint64]uint64 // of the key: of the row, until its object is found
	due    []indexRow        // to be restored
}

// reindex gives each stored object its row and drops rows that were there
// before and have no object. Replicas may go on: what they write meanwhile
// wins. report hears of each change ("added", "dropped").
func reindex(ctx context.Context, from objects, to rebuildableIndex, report func(what, key string)) error {
	x := &reindexer{from: from, to: to, report: report, seed: maphash.MakeSeed(), rows: map[uint64]uint64{}}
	// The rows come first: one that is saved during the run is not among them
	// and is left alone.
	err := x.eachRow(ctx, func(r indexRow) error {
		x.rows[x.hashText(r.Key)] = x.hashRow(r)
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the index: %w", err)
	}
	if err := from.walk(ctx, func(key string, rec *record) error { return x.checkObject(ctx, newIndexRow(key, rec)) }); err != nil {
		return fmt.Errorf("reading what is stored: %w", err)
	}
	if err := x.restoreDue(ctx); err != nil {
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

func (x *reindexer) hashText(s string) uint64 { return maphash.String(x.seed, s) }

// hashRow is of what a row says about its object. A database keeps microseconds.
func (x *reindexer) hashRow(r indexRow) uint64 {
	return x.hashText(fmt.Sprint(r.Path, "\n", r.SHA256, "\n", r.ContentType, "\n", r.Class, r.Size, r.Fetched.Round(time.Microsecond).UnixMicro()))
}

// eachRow calls f with all rows, some twice or not where they change meanwhile.
func (x *reindexer) eachRow(ctx context.Context, f func(indexRow) error) error {
	names, err := x.to.totals(ctx)
	if err != nil {
		return err
	}
	for name := range names {
		q := pageQuery{remote: name, limit: reindexBatch}
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
	}
	return nil
}

// checkObject takes a stored object off the list, and restores its row if it is
// another.
func (x *reindexer) checkObject(ctx context.Context, r indexRow) error {
	r.ContentType = toSQLText(r.ContentType)
	k := x.hashText(r.Key)
	sum, has := x.rows[k]
	delete(x.rows, k)
	if has && sum == x.hashRow(r) {
		return nil
	}
	if x.due = append(x.due, r); len(x.due) >= reindexBatch {
		return x.restoreDue(ctx)
	}
	return nil
}

func (x *reindexer) restoreDue(ctx context.Context) error {
	if len(x.due) == 0 {
		return nil
	}
	if err := x.to.restoreRows(ctx, x.due); err != nil {
		return err
	}
	for _, r := range x.due {
		x.report("added", r.Key)
	}
	x.due = x.due[:0]
	return nil
}

// dropIfLost drops r if it was there from the start, is what it was and still
// has no object: listing what is stored takes long, and an object may have
// been replaced under it.
func (x *reindexer) dropIfLost(ctx context.Context, r indexRow) error {
	if sum, listed := x.rows[x.hashText(r.Key)]; !listed || sum != x.hashRow(r) {
		return nil
	}
	_, err := x.from.open(ctx, r.Key, -1)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := x.to.dropRow(ctx, r); err != nil {
		return err
	}
	x.report("dropped", r.Key)
	return nil
}
