// store_frames.go: the framed file format of the embedded index and of the
// freshness kept on disk.

package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
)

// fieldReader reads what appendString and binary.AppendVarint wrote. After damage
// all is zero and bad is set.
type fieldReader struct {
	b   []byte
	bad bool
}

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

// appendFrame adds payload with its length and CRC-32C, each 4 bytes.
func appendFrame(b, payload []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(payload, castagnoli))
	return append(b, payload...)
}

// readFrames calls f with each frame behind the first, which must be magic. It
// ends with errDamaged at the first that is not whole.
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
