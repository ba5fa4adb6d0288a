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

// fileIdentity tells one file from another, and from itself after a change. It is
// what binds a record to its body.
type fileIdentity struct {
	size, mtime int64 // mtime in ns
	inode       uint64
}

func identityOf(fi fs.FileInfo) fileIdentity {
	id := fileIdentity{size: fi.Size(), mtime: fi.ModTime().UnixNano()}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		id.inode = uint64(st.Ino)
	}
	return id
}

// diskRecord is the content of a record file.
type diskRecord struct {
	record
	MTime int64  `json:"mt"`
	Inode uint64 `json:"i"`
}

func (e *diskRecord) bodyIdentity() fileIdentity { return fileIdentity{e.Size, e.MTime, e.Inode} }

// recordMagic begins a record file and carries its version; CRC-32C of the
// rest and the JSON follow, a line each. JSON alone does not show every damage.
const recordMagic = "artifactapi record 1 "

func encodeRecord(rec *record, id fileIdentity) ([]byte, error) {
	body, err := json.Marshal(diskRecord{*rec, id.mtime, id.inode})
	if err != nil {
		return nil, err
	}
	data := fmt.Appendf(nil, "%s%08x\n%s\n", recordMagic, crc32.Checksum(body, castagnoli), body)
	if len(data) > maxRecord {
		return nil, fmt.Errorf("record of %d bytes is too long", len(data))
	}
	return data, nil
}

func decodeRecord(data []byte) (*diskRecord, error) {
	head, rest, _ := bytes.Cut(data, []byte("\n"))
	sum, ours := bytes.CutPrefix(head, []byte(recordMagic))
	switch {
	case !ours && bytes.HasPrefix(head, []byte("artifactapi record ")):
		return nil, errVersion
	case !ours || len(data) > maxRecord || len(rest) == 0 || rest[len(rest)-1] != '\n':
		return nil, fmt.Errorf("%w: bad frame", errDamaged)
	}
	body := rest[:len(rest)-1]
	if string(sum) != fmt.Sprintf("%08x", crc32.Checksum(body, castagnoli)) {
		return nil, fmt.Errorf("%w: bad checksum", errDamaged)
	}
	e := new(diskRecord)
	if err := json.Unmarshal(body, e); err != nil {
		return nil, fmt.Errorf("%w: %v", errDamaged, err)
	}
	if !isSHA256(e.SHA256) || e.Size < 0 {
		return nil, fmt.Errorf("%w: bad size or sha256", errDamaged)
	}
	return e, nil
}

func isSHA256(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size && s == strings.ToLower(s)
}

// readRecord reads a record file and names the key it describes. Its errors are
// fs.ErrNotExist, errDamaged, errVersion or of I/O.
func readRecord(name string) (*diskRecord, string, error) {
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

// validKey reports whether key is {remote}/{hash}/{filename} and the last no
// name of our own: nothing else may become a path.
func validKey(key string) bool {
	name, rest, _ := strings.Cut(key, "/")
	hash, file, _ := strings.Cut(rest, "/")
	return isRemoteName(name) && isHash(hash) && file != "" && file[0] != '.' && !strings.ContainsAny(file, "/\x00")
}

func isRemoteName(s string) bool {
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	return s != "" && s[0] != '.' && strings.Trim(s, allowed) == ""
}

func isHash(s string) bool { return len(s) == 16 && strings.Trim(s, "0123456789abcdef") == "" }
