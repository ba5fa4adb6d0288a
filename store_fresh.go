// store_fresh.go: freshness marks without Redis: in memory, with a snapshot in
// DATA_DIR that keeps them over an orderly restart.

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"log/slog"
	"time"
)

const (
	freshFile  = ".freshness"
	freshMagic = "artifactapi freshness 1"
	// maxMarks bounds the memory for marks: about 250 MB. When they are that many,
	// any mark makes room for a new one, at the price of a revalidation.
	maxMarks = 1 << 20
)

var _ freshness = (*localFreshness)(nil)

// localFreshness implements freshness in memory. A crash loses the marks that were
// set since the last snapshot; their files are revalidated. Its methods may be
// called concurrently.
type localFreshness struct {
	snapshotFile
	marks *boundedMap[string, freshnessMark]
}

// newLocalFreshness reads the snapshot in dir, if there is one.
func newLocalFreshness(dir string, now func() time.Time, log *slog.Logger) *localFreshness {
	l := &localFreshness{marks: newBoundedMap[string, freshnessMark](maxMarks, now),
		snapshotFile: snapshotFile{fileWriter: newDisk(), name: dir + "/" + freshFile, magic: freshMagic}}
	if err := l.load(l.restoreMark); err != nil {
		log.Warn("the freshness snapshot is damaged: some files are revalidated early", "error", err)
	}
	return l
}

// getMark: see freshness.
func (l *localFreshness) getMark(ctx context.Context, key string) (freshnessMark, error) {
	m, found := l.marks.get(key)
	if !found {
		return freshnessMark{}, fmt.Errorf("freshness of %s: %w", key, fs.ErrNotExist)
	}
	return m, nil
}

// setMark: see freshness. It cannot fail.
func (l *localFreshness) setMark(ctx context.Context, key string, m freshnessMark) error {
	m.GoodAt = m.GoodAt.Round(0).UTC() // as restoreMark reads it
	l.marks.put(key, m)
	l.changed.Store(true)
	return nil
}

// delete: see freshness. It cannot fail.
func (l *localFreshness) delete(ctx context.Context, key string) error {
	l.marks.delete(key)
	l.changed.Store(true)
	return nil
}

// saveSnapshot writes the snapshot if a mark has changed since the last one.
func (l *localFreshness) saveSnapshot() error {
	return l.save(func(add func(payload []byte)) {
		for _, key := range l.marks.keys() {
			if m, found := l.marks.get(key); found {
				add(appendMark(nil, key, m))
			}
		}
	})
}

// Close saves the snapshot.
func (l *localFreshness) Close() error { return l.saveSnapshot() }

// The first field of a mark is 1. Earlier versions kept a log in this format, in
// which 0 deletes the mark of a key.
func appendMark(b []byte, key string, m freshnessMark) []byte {
	b = appendString(binary.AppendVarint(b, 1), key)
	return appendString(binary.AppendVarint(b, m.GoodAt.UnixNano()), m.SHA256)
}

func (l *localFreshness) restoreMark(payload []byte) error {
	p := fieldReader{b: payload}
	set, key := p.readInt(), p.readString()
	m := freshnessMark{GoodAt: time.Unix(0, p.readInt()).UTC(), SHA256: p.readString()}
	if p.bad || len(p.b) > 0 {
		return errDamaged
	}
	if set == 0 {
		l.marks.delete(key)
	} else {
		l.marks.put(key, m)
	}
	return nil
}
