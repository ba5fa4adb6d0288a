// store_record.go: records of the disk store: the record file beside a body, and records
// and small bodies in memory.

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
)

// maxRecord bounds a record file in bytes. Most have about 500 bytes; the longest
// path and all headers at their usual limits fit.
const maxRecord = 64 << 10

var (
	// errDamaged is a record file that cannot be used. It counts as absent.
	errDamaged = errors.New("damaged record")

	// castagnoli is the polynomial of CRC-32C, which processors compute in hardware.
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// missError is a miss (fs.ErrNotExist) with its reason.
type missError string

func (e missError) Error() string      { return string(e) }
func (missError) Is(target error) bool { return target == fs.ErrNotExist }

// fileIdentity tells a file from every other file, and from itself after a change of
// its content. A record holds the identity of its body, so that one stat shows
// whether they belong together.
type fileIdentity struct {
	size, mtime int64 // in bytes; in nanoseconds since 1970
	inode       uint64
}

// identityOf returns the identity of the file that fi describes.
func identityOf(fi fs.FileInfo) fileIdentity {
	return fileIdentity{fi.Size(), fi.ModTime().UnixNano(), fi.Sys().(*syscall.Stat_t).Ino}
}

// diskRecord is the content of a record file: a record and the identity of its body.
// Its JSON is on users' disks; a change of its meaning needs another recordMagic.
type diskRecord struct {
	record
	MTime int64  `json:"mt"`
	Inode uint64 `json:"i"`
	// Boot is the boot in which body and record were written without fsync; "": both
	// are durable.
	Boot string `json:"b,omitempty"`

	key string // that the record describes
}

func (e *diskRecord) bodyIdentity() fileIdentity { return fileIdentity{e.Size, e.MTime, e.Inode} }

// isDurable reports whether body and record are still what was written: they were
// synced, or boot, the current one, is the one that they were written in.
func (e *diskRecord) isDurable(boot string) bool { return e.Boot == "" || e.Boot == boot }

// recordMagic begins a record file and names the version of its format. The CRC-32C
// of the JSON ends the first line, the JSON is the second. Without the CRC, a flipped
// bit in the JSON could pass unseen.
const recordMagic = "artifactapi record 1 "

// writeRecord returns a function for writeFile that writes the record file of a body
// with that identity; boot is that of diskRecord.
func writeRecord(rec *record, id fileIdentity, boot string) func(io.Writer) error {
	return func(w io.Writer) error {
		body, err := json.Marshal(diskRecord{record: *rec, MTime: id.mtime, Inode: id.inode, Boot: boot})
		if err != nil {
			return err
		}
		_, err = w.Write(fmt.Appendf(nil, "%s%08x\n%s\n", recordMagic, crc32.Checksum(body, castagnoli), body))
		return err
	}
}

// decodeRecord reads the content of a record file. Its error is errDamaged.
func decodeRecord(data []byte) (*diskRecord, error) {
	firstLine, rest, _ := bytes.Cut(data, []byte("\n"))
	body, isEnded := bytes.CutSuffix(rest, []byte("\n"))
	sum, hasMagic := bytes.CutPrefix(firstLine, []byte(recordMagic))
	switch {
	case !hasMagic || !isEnded || len(data) > maxRecord:
		return nil, fmt.Errorf("%w: its frame is wrong", errDamaged)
	case string(sum) != fmt.Sprintf("%08x", crc32.Checksum(body, castagnoli)):
		return nil, fmt.Errorf("%w: its checksum is wrong", errDamaged)
	}
	e := new(diskRecord)
	if err := json.Unmarshal(body, e); err != nil {
		return nil, fmt.Errorf("%w: %v", errDamaged, err)
	}
	if !isSHA256(e.SHA256) || e.Size < 0 {
		return nil, fmt.Errorf("%w: its size or sha256 is malformed", errDamaged)
	}
	e.key = storageKey(e.Remote, e.Path)
	return e, nil
}

// readRecord reads a record file. Its error is fs.ErrNotExist, errDamaged or one of I/O.
func readRecord(name string) (*diskRecord, error) {
	f, err := openFile(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return nil, err
	}
	return decodeRecord(data)
}

// contextWriter beside another writer ends a copy with the context.
type contextWriter struct{ context.Context }

func (w contextWriter) Write(b []byte) (int, error) { return len(b), w.Err() }

// hashBody returns the SHA-256 of a body in hexadecimal. It ends with ctx.
func hashBody(ctx context.Context, body io.ReaderAt) (string, error) {
	h := sha256.New()
	_, err := io.Copy(io.MultiWriter(h, contextWriter{ctx}), io.NewSectionReader(body, 0, math.MaxInt64))
	return hex.EncodeToString(h.Sum(nil)), err
}

// validKey reports whether key is {remote}/{hash}/{filename} and can be used as a
// path. A file name that begins with a dot is refused: those are the store's own.
func validKey(key string) bool {
	name, rest, _ := strings.Cut(key, "/")
	hash, file, _ := strings.Cut(rest, "/")
	return namePattern.MatchString(name) && isHash(hash) && file != "" && file[0] != '.' && !strings.ContainsAny(file, "/\x00")
}

// isHash reports whether s can be the path_hash of a key.
func isHash(s string) bool { return isHex(s, 16) }

// isSHA256 reports whether s can be the sha256 of a record.
func isSHA256(s string) bool { return isHex(s, 64) }

const (
	// memoryBudget bounds the memory of records and small bodies together, in
	// bytes. It leaves enough of a container of 256 MiB to everything else.
	memoryBudget = 64 << 20
	// memoryEntryCost is what an entry costs of the budget beside its body: about
	// 500 bytes of record, 250 of header values, and 500 for its place in the table.
	memoryEntryCost = 1280
)

// memBody is a small stored body that is read from memory. Closing it does nothing.
type memBody struct {
	bytes.Reader
	text []byte
}

func (b *memBody) Close() error { return nil }

// unread: see memorySource.
func (b *memBody) unread() ([]byte, bool) { return b.text[len(b.text)-b.Len():], true }

// memoryEntry is the record, and perhaps the body, of one key in memory. It is used
// only while key's file still has the identity id, so another process that
// changes the file need not invalidate it. But for statAt it is not changed after it was
// added.
type memoryEntry struct {
	key      string
	id       fileIdentity // of the body that the entry was made from
	rec      *record
	headers  *recordHeaders // of rec
	body     []byte         // nil: larger than maxSmallBody, or not read yet
	isHashed bool           // to find rec, the whole body was hashed
	statAt   atomic.Int64   // when the file last had the identity id, in nanoseconds since 1970
}

// newObject returns the entry as an object that reads from off, or without a body if
// off is negative (see objects.open).
func (e *memoryEntry) newObject(off int64) *object {
	if off < 0 {
		return &object{rec: e.rec, headers: e.headers}
	}
	body := &memBody{*bytes.NewReader(e.body), e.body}
	body.Seek(off, io.SeekStart)
	return &object{rec: e.rec, headers: e.headers, body: body}
}

// withBody returns the entry with its body, which is read from f.
func (e *memoryEntry) withBody(f *os.File) (*memoryEntry, error) {
	full := &memoryEntry{key: e.key, id: e.id, rec: e.rec, headers: e.headers, body: make([]byte, e.id.size)}
	_, err := io.ReadFull(f, full.body)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		// Somebody truncated the file after the stat. The next open sees its new identity.
		return nil, fmt.Errorf("reading %s: the body was truncated: %w", e.key, fs.ErrNotExist)
	}
	return full, storeError("reading "+e.key, err)
}

// cost is what the entry takes of memoryBudget.
func (e *memoryEntry) cost() int64 { return memoryEntryCost + int64(len(e.body)) }

// isCurrent reports whether the entry's file in d is still the one that it was made from.
// A stat is a quarter of our own work for a hit from memory: one a tenth of a second
// will do for a body that is asked for all the time. The first use of an entry always
// looks: it may have been made of files that were replaced before it was added.
func (e *memoryEntry) isCurrent(d *diskStore) bool {
	now := d.now().UnixNano()
	if age := now - e.statAt.Load(); age >= 0 && age < int64(d.statEvery) {
		return true
	}
	fi, err := os.Stat(d.pathOf(e.key))
	if err != nil || identityOf(fi) != e.id {
		return false
	}
	e.statAt.Store(now)
	return true
}
