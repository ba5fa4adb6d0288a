// store_fresh.go: what is kept without a server over an orderly restart: freshness
// marks, missed files, and the format of the snapshots of them and of the embedded
// index.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// maxMarks bounds the memory for marks: about 250 MB. When they are that many,
// any mark makes room for a new one, at the price of a revalidation.
const maxMarks = 1 << 20

var _ freshness = (*localFreshness)(nil)

// savedMark is a mark in the snapshot.
type savedMark struct {
	Key string
	freshnessMark
}

// localFreshness implements freshness in memory. A crash loses the marks that were
// set since the last snapshot; their files are revalidated. Its methods may be
// called concurrently.
type localFreshness struct {
	*snapshotFile
	marks *boundedMap[string, freshnessMark]
}

// newLocalFreshness reads the snapshot in dir, if there is one.
func newLocalFreshness(dir string, now func() time.Time, log *slog.Logger) *localFreshness {
	l := &localFreshness{marks: newBoundedMap[string, freshnessMark](maxMarks, now)}
	l.snapshotFile = &snapshotFile{fileWriter: newDisk(), name: dir + "/.freshness", magic: "artifactapi freshness 2",
		changed: new(atomic.Bool)}
	l.each = func(add func(v any)) {
		for _, key := range l.marks.keys() {
			if m, found := l.marks.get(key); found {
				add(savedMark{key, m})
			}
		}
	}
	err := loadSnapshot(l.snapshotFile, func(m savedMark) { l.marks.put(m.Key, m.freshnessMark) })
	if err != nil {
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
	m.GoodAt = m.GoodAt.Round(0).UTC() // the monotonic clock stands still while a machine sleeps
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

// newMissedSnapshot adds the missed files of the snapshot in dir, if there is one, to
// missed: those of a sealed site may be collected for weeks.
func newMissedSnapshot(dir string, missed *missedFiles, log *slog.Logger) *snapshotFile {
	s := &snapshotFile{fileWriter: newDisk(), name: dir + "/.missed", magic: "artifactapi missed 2", changed: &missed.changed}
	s.each = func(add func(v any)) {
		for _, f := range missed.list("") {
			add(f)
		}
	}
	if err := loadSnapshot(s, missed.addMisses); err != nil {
		log.Warn("the snapshot of missed files is damaged: /missed lacks some of them", "error", err)
	}
	return s
}

// snapshotFile is a snapshot of data that its owner keeps in memory. Its first line
// names the format, each further line is the CRC-32C and the JSON of one value.
type snapshotFile struct {
	*fileWriter
	name, magic string                // magic is the first line
	changed     *atomic.Bool          // the data differs from the file; set by the owner after each change
	each        func(add func(v any)) // calls add with every value

	saving sync.Mutex // one save at a time; taken before the lock of the owner's data
}

// saveSnapshot replaces the file if the data has changed since the last time. The error
// is errStoreDown or errNoSpace, and then the old file is still there.
func (s *snapshotFile) saveSnapshot() error {
	s.saving.Lock()
	defer s.saving.Unlock()
	if !s.changed.Swap(false) {
		return nil
	}
	err := s.replaceFile(s.name, func(w io.Writer) error {
		b := bufio.NewWriter(w) // keeps its first error until Flush
		fmt.Fprintln(b, s.magic)
		s.each(func(v any) {
			text, _ := json.Marshal(v) // strings, numbers and times always encode
			fmt.Fprintf(b, "%08x %s\n", crc32.Checksum(text, castagnoli), text)
		})
		return b.Flush()
	})
	if err != nil {
		s.changed.Store(true)
	}
	return storeError("saving "+s.name, err)
}

// loadSnapshot calls restore with every value. The error of a file that is damaged comes
// after the values before the damage. A missing file has none.
func loadSnapshot[T any](s *snapshotFile, restore func(T)) error {
	f, err := os.Open(s.name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20) // far above the size of any row or mark: a longer line is damage
	if !lines.Scan() || lines.Text() != s.magic {
		return fmt.Errorf("%w: it begins with %.40q, not with %q", errDamaged, lines.Text(), s.magic)
	}
	for n := 2; lines.Scan(); n++ {
		var v T
		sum, text, _ := bytes.Cut(lines.Bytes(), []byte(" "))
		if string(sum) != fmt.Sprintf("%08x", crc32.Checksum(text, castagnoli)) || json.Unmarshal(text, &v) != nil {
			return fmt.Errorf("%w: line %d", errDamaged, n)
		}
		restore(v)
	}
	return lines.Err()
}
