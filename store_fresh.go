// store_fresh.go: what is kept without a server over an orderly restart: freshness
// marks, missed files, and the format of the snapshots of them and of the embedded
// index. A snapshot is a sequence of frames (length, checksum, payload); the first frame names the
// format.

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
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

// The first field of a mark is 1. Earlier versions kept a log in this format, in which
// 0 and a mark without a hash, which fits no copy, stand for a mark that was deleted.
func appendMark(b []byte, key string, m freshnessMark) []byte {
	b = appendString(binary.AppendVarint(b, 1), key)
	return appendString(binary.AppendVarint(b, m.GoodAt.UnixNano()), m.SHA256)
}

func (l *localFreshness) restoreMark(payload []byte) error {
	p := fieldReader{b: payload}
	_, key := p.readInt(), p.readString()
	m := freshnessMark{GoodAt: time.Unix(0, p.readInt()).UTC(), SHA256: p.readString()}
	if !p.atEnd() {
		return errDamaged
	}
	l.marks.put(key, m)
	return nil
}

// missedSnapshot keeps the missed files of a cache: those of a sealed site may be
// collected for weeks. A frame is the JSON of one. nil keeps nothing.
type missedSnapshot struct {
	snapshotFile
	missed *missedFiles
}

// newMissedSnapshot adds those of the snapshot in dir, if there is one, to missed.
func newMissedSnapshot(dir string, missed *missedFiles, log *slog.Logger) *missedSnapshot {
	s := &missedSnapshot{snapshotFile{fileWriter: newDisk(), name: dir + "/.missed", magic: "artifactapi missed 1"}, missed}
	err := s.load(func(payload []byte) error {
		var f missedFile
		if json.Unmarshal(payload, &f) != nil {
			return errDamaged
		}
		missed.add(f)
		return nil
	})
	if err != nil {
		log.Warn("the snapshot of missed files is damaged: /missed lacks some of them", "error", err)
	}
	return s
}

// saveSnapshot writes the snapshot if the list has changed since the last one.
func (s *missedSnapshot) saveSnapshot() error {
	if s == nil {
		return nil
	}
	if s.missed.changed.Swap(false) {
		s.changed.Store(true)
	}
	return s.save(func(add func(payload []byte)) {
		for f := range s.missed.list("") {
			b, _ := json.Marshal(f) // strings, numbers and times always encode
			add(b)
		}
	})
}

// maxFrame is far above the size of any row or mark. A larger length is damage,
// and must not become an allocation.
const maxFrame = 1 << 20

// snapshotFile is a snapshot of data that its owner keeps in memory.
type snapshotFile struct {
	*fileWriter
	name, magic string      // magic is the payload of the first frame
	changed     atomic.Bool // the data differs from the file; set by the owner after each change

	saving sync.Mutex // one save at a time; taken before the lock of the owner's data
}

// save replaces the file if the data has changed. each calls add with the payload
// of every frame; add does not keep it. The error is errStoreDown or errNoSpace,
// and then the old file is still there.
func (s *snapshotFile) save(each func(add func(payload []byte))) error {
	s.saving.Lock()
	defer s.saving.Unlock()
	if !s.changed.Swap(false) {
		return nil
	}
	err := s.replaceFile(s.name, func(w io.Writer) error {
		b := bufio.NewWriter(w) // keeps its first error until Flush
		var frame []byte
		add := func(payload []byte) {
			frame = appendFrame(frame[:0], payload)
			b.Write(frame)
		}
		add([]byte(s.magic))
		each(add)
		return b.Flush()
	})
	if err != nil {
		s.changed.Store(true)
	}
	return storeError("saving "+s.name, err)
}

// load calls restore with the payload of every frame. The error of a file that is
// damaged comes after the frames before the damage. A missing file has no frames.
func (s *snapshotFile) load(restore func(payload []byte) error) error {
	f, err := os.Open(s.name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	return readFrames(f, s.magic, restore)
}

// fieldReader reads the fields that appendString and binary.AppendVarint wrote.
// After damage the fields mean nothing, see atEnd.
type fieldReader struct {
	b   []byte // what is left
	bad bool   // there was damage
}

// atEnd reports whether all fields were read and there was no damage.
func (p *fieldReader) atEnd() bool { return !p.bad && len(p.b) == 0 }

func (p *fieldReader) readInt() int64 {
	v, n := binary.Varint(p.b)
	p.bad = p.bad || n <= 0
	p.b = p.b[max(n, 0):]
	return v
}

func (p *fieldReader) readString() string {
	n := p.readInt()
	if n < 0 || n > int64(len(p.b)) {
		p.bad = true
		return ""
	}
	s := string(p.b[:n])
	p.b = p.b[n:]
	return s
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendVarint(b, int64(len(s))), s...)
}

// appendFrame appends payload behind its length and CRC-32C, 4 bytes each.
func appendFrame(b, payload []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(payload, castagnoli))
	return append(b, payload...)
}

// readFrames calls f with the payload of each frame behind the first, which must
// be magic; f does not keep it. The first frame that is not whole ends it with
// errDamaged. An error of f ends it too and is returned.
func readFrames(r io.Reader, magic string, f func(payload []byte) error) error {
	br := bufio.NewReaderSize(r, 64<<10)
	var head [8]byte
	var payload []byte
	for first := true; ; first = false {
		if _, err := io.ReadFull(br, head[:]); err == io.EOF && !first {
			return nil
		} else if err != nil {
			return fmt.Errorf("%w: %w", errDamaged, err)
		}
		n := binary.LittleEndian.Uint32(head[:])
		if n > maxFrame {
			return fmt.Errorf("%w: frame of %d bytes", errDamaged, n)
		}
		payload = slices.Grow(payload[:0], int(n))[:n]
		if _, err := io.ReadFull(br, payload); err != nil {
			return fmt.Errorf("%w: %w", errDamaged, err)
		}
		if crc32.Checksum(payload, castagnoli) != binary.LittleEndian.Uint32(head[4:]) {
			return fmt.Errorf("%w: bad checksum", errDamaged)
		}
		var err error
		if !first {
			err = f(payload)
		} else if string(payload) != magic {
			err = fmt.Errorf("%w: %.40q is not %q", errDamaged, payload, magic)
		}
		if err != nil {
			return err
		}
	}
}
