// store_memory.go: keeps the disk store's records and small bodies in memory.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"
)

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
