// store_frames.go: the file format of snapshots, which keep the embedded index and
// the freshness marks over an orderly restart. A snapshot is a sequence of frames
// (length, checksum, payload); the first frame names the format.

package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
)

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
	err := os.MkdirAll(filepath.Dir(s.name), 0o755)
	if err == nil {
		err = s.replaceFile(s.name, func(w io.Writer) error {
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
	}
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
// After damage every further field is empty or zero.
type fieldReader struct {
	b   []byte // what is left
	bad bool   // there was damage
}

// atEnd reports whether all fields were read and there was no damage.
func (p *fieldReader) atEnd() bool { return !p.bad && len(p.b) == 0 }

func (p *fieldReader) readInt() int64 {
	v, n := binary.Varint(p.b)
	if n <= 0 {
		p.b, p.bad = nil, true
		return 0
	}
	p.b = p.b[n:]
	return v
}

func (p *fieldReader) readString() string {
	n := p.readInt()
	if n < 0 || n > int64(len(p.b)) {
		p.b, p.bad = nil, true
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
