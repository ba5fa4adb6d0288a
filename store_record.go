// store_record.go: the record file beside a body on disk.

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
)

// fileIdentity tells a file from every other file, and from itself after a change of
// its content. A record holds the identity of its body, so that one stat shows
// whether they belong together.
type fileIdentity struct {
	size, mtime int64 // in bytes; in nanoseconds since 1970
	inode       uint64
}

// identityOf returns the identity of the file that fi describes.
func identityOf(fi fs.FileInfo) fileIdentity {
	id := fileIdentity{size: fi.Size(), mtime: fi.ModTime().UnixNano()}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		id.inode = uint64(st.Ino)
	}
	return id
}

// diskRecord is the content of a record file: a record and the identity of its body.
// Its JSON is on users' disks; a change of its meaning needs another recordMagic.
type diskRecord struct {
	record
	MTime int64  `json:"mt"`
	Inode uint64 `json:"i"`
}

func (e *diskRecord) bodyIdentity() fileIdentity { return fileIdentity{e.Size, e.MTime, e.Inode} }

// recordMagic begins a record file and names the version of its format. The CRC-32C
// of the JSON ends the first line, the JSON is the second. Without the CRC, a flipped
// bit in the JSON could pass unseen.
const recordMagic = "artifactapi record 1 "

// encodeRecord returns the content of the record file of a body with that identity.
// It refuses a record that decodeRecord would.
func encodeRecord(rec *record, id fileIdentity) ([]byte, error) {
	body, err := json.Marshal(diskRecord{*rec, id.mtime, id.inode})
	if err != nil {
		return nil, err
	}
	data := fmt.Appendf(nil, "%s%08x\n%s\n", recordMagic, crc32.Checksum(body, castagnoli), body)
	if len(data) > maxRecord {
		return nil, fmt.Errorf("the record has %d bytes, %d are allowed", len(data), maxRecord)
	}
	return data, nil
}

// decodeRecord reads the content of a record file. Its error is errVersion for a
// record of another version and errDamaged for everything else.
func decodeRecord(data []byte) (*diskRecord, error) {
	firstLine, rest, _ := bytes.Cut(data, []byte("\n"))
	sum, hasMagic := bytes.CutPrefix(firstLine, []byte(recordMagic))
	switch {
	case !hasMagic && bytes.HasPrefix(firstLine, []byte("artifactapi record ")):
		return nil, errVersion
	case !hasMagic || len(data) > maxRecord || len(rest) == 0 || rest[len(rest)-1] != '\n':
		return nil, fmt.Errorf("%w: its frame is wrong", errDamaged)
	}
	body := rest[:len(rest)-1]
	if string(sum) != fmt.Sprintf("%08x", crc32.Checksum(body, castagnoli)) {
		return nil, fmt.Errorf("%w: its checksum is wrong", errDamaged)
	}
	e := new(diskRecord)
	if err := json.Unmarshal(body, e); err != nil {
		return nil, fmt.Errorf("%w: %v", errDamaged, err)
	}
	if !isSHA256(e.SHA256) || e.Size < 0 {
		return nil, fmt.Errorf("%w: its size or sha256 is malformed", errDamaged)
	}
	return e, nil
}

// isSHA256 reports whether s is a SHA-256 in lower-case hexadecimal.
func isSHA256(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size && s == strings.ToLower(s)
}

// readRecord reads a record file and returns the record with the key that it
// describes. Its error is fs.ErrNotExist, errDamaged, errVersion or one of I/O.
func readRecord(name string) (_ *diskRecord, key string, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return nil, "", err
	}
	e, err := decodeRecord(data)
	if err != nil {
		return nil, "", err
	}
	return e, storageKey(e.Remote, e.Path), nil
}

// validKey reports whether key is {remote}/{hash}/{filename} and can be used as a
// path. A file name that begins with a dot is refused: those are the store's own.
func validKey(key string) bool {
	name, rest, _ := strings.Cut(key, "/")
	hash, file, _ := strings.Cut(rest, "/")
	return isRemoteName(name) && isHash(hash) && file != "" && file[0] != '.' && !strings.ContainsAny(file, "/\x00")
}

// isRemoteName reports whether s can be a remote's directory: letters, digits and
// ._- without a dot at the beginning.
func isRemoteName(s string) bool {
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	return s != "" && s[0] != '.' && strings.Trim(s, allowed) == ""
}

// isHash reports whether s can be the path_hash of a key.
func isHash(s string) bool { return len(s) == 16 && strings.Trim(s, "0123456789abcdef") == "" }
