// store.go: where artifacts stay. diskStore keeps bodies and their records
// under DATA_DIR; the embedded index is in store_index.go and the freshness
// without Redis in store_fresh.go.

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	recordFile = ".record"      // describes the body beside it
	recordNext = ".record.next" // describes the body that is about to take its place
	bodyNext   = ".body.next"   // a body on its way in by copying
	damagedDir = ".damaged-*"   // what was precious and cannot be served
	spoolDir   = ".spool"       // bodies that are being fetched
	lockFile   = ".lock"        // held by the server that owns DATA_DIR
	tempSuffix = ".tmp"         // of a small file on its way in

	// maxRecord bounds what is read as a record. Real ones have about 500
	// bytes; the longest path and all headers at their usual limits fit.
	maxRecord = 64 << 10
	// maxSmallBody is the largest body kept in memory: metadata and manifests,
	// which are asked for most, and for which an open costs more than a read.
	maxSmallBody = 64 << 10
	// memoryBudget bounds the memory for records and small bodies together, small
	// enough for a container of 256 MiB.
	memoryBudget = 64 << 20
	// memoryEntryCost is charged for a record and its place in the cache.
	memoryEntryCost = 1 << 10
	// orphanAge is when something without an owner is garbage. A restore from
	// a backup may lay bodies down long before their records.
	orphanAge = 24 * time.Hour
)

var (
	_ objects = (*diskStore)(nil)

	errDamaged = errors.New("damaged record")
	// errVersion is a record of another version of the program. It is a miss,
	// but its files are left alone: after a rollback they are good again.
	errVersion = errors.New("record of another version")
	// errDropped is a miss (fs.ErrNotExist) whose files were removed, or set
	// aside, because they are damaged.
	errDropped error = droppedError{}

	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

type droppedError struct{}

func (droppedError) Error() string        { return "dropped" }
func (droppedError) Is(target error) bool { return target == fs.ErrNotExist }

// fileWriter writes small files so that a crash leaves the old or the new one whole,
// and is the one place that renames and fsyncs.
type fileWriter struct {
	fsync func(*os.File) error // (*os.File).Sync but in tests
	step  func(name string)    // told after each step of a commit; nil but in tests
}

func newDisk() *fileWriter { return &fileWriter{fsync: (*os.File).Sync} }

func (k *fileWriter) noteStep(step string) {
	if k.step != nil {
		k.step(step)
	}
}

// writeFile makes a file of what fill writes and fsyncs it. Nothing is left behind
// when it fails.
func (k *fileWriter) writeFile(name string, fill func(io.Writer) error) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(name)
		}
	}()
	return errors.Join(fill(f), k.fsync(f), f.Close())
}

// replaceFile writes a file beside name and renames it into place, durably.
// Callers keep each other away from one name.
func (k *fileWriter) replaceFile(name string, fill func(io.Writer) error) error {
	temp := name + tempSuffix
	if err := k.writeFile(temp, fill); err != nil {
		return err
	}
	k.noteStep("temporary file written")
	if err := k.renameFile(temp, name); err != nil {
		os.Remove(temp)
		return err
	}
	k.noteStep("temporary file renamed")
	return k.syncDir(filepath.Dir(name))
}

func (k *fileWriter) renameFile(from, to string) error { return os.Rename(from, to) }

// syncDir makes the names in a directory durable. Where a file system cannot
// do that there is nothing to be had (EINVAL, ENOTSUP).
func (k *fileWriter) syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	err = k.fsync(f)
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTSUP) {
		return nil
	}
	return err
}

// storeError gives an I/O error its kind: errNoSpace for a full disk, quota or
// file size limit, errStoreDown otherwise. The cause is kept as text alone: a
// missing directory must not read as a missing artifact (fs.ErrNotExist).
func storeError(doing string, err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, errStoreDown), errors.Is(err, errNoSpace):
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return fmt.Errorf("%w: %s: %v", errNoSpace, doing, err)
	}
	return fmt.Errorf("%w: %s: %v", errStoreDown, doing, err)
}

// fileBody is a stored body that is read from its file.
type fileBody struct{ f *os.File }

func (b *fileBody) Read(p []byte) (int, error)                { return b.f.Read(p) }
func (b *fileBody) Seek(off int64, whence int) (int64, error) { return b.f.Seek(off, whence) }
func (b *fileBody) Close() error                              { return b.f.Close() }

// nextFile and skip make it a source, whose bytes the kernel sends.
func (b *fileBody) nextFile(limit int64) (*os.File, int64, error) { return b.f, limit, nil }
func (b *fileBody) advanceBy(int64)                               {}

// diskStore implements objects under one directory. {key} is the body, .record
// beside it describes it. All methods may be called concurrently, and from
// several processes. The directory is made when it is first written to, so one
// that becomes writable later is used without a restart.
type diskStore struct {
	*fileWriter
	dir           string
	now           func() time.Time
	log           *slog.Logger
	memory        *hotCache
	turns         turns    // by directory
	syncedRemotes sync.Map // remotes whose directory is durable
	// isIrreplaceable says whether a remote's files are nowhere else. What is damaged
	// of them is set aside. nil: none are. Set before the first use.
	isIrreplaceable func(remote string) bool

	owner *os.File // .lock while we hold it
	probe diskProbe
	swept time.Time // when the tree was last swept; sweep's alone
}

func newDiskStore(dir string, now func() time.Time, log *slog.Logger) *diskStore {
	return &diskStore{fileWriter: newDisk(), dir: filepath.Clean(dir), now: now, log: log, memory: newHotCache(memoryBudget)}
}

func (d *diskStore) pathOf(key string) string { return d.dir + "/" + key }

// folderOf is the directory that holds key's body and records.
func (d *diskStore) folderOf(key string) string { return filepath.Dir(d.pathOf(key)) }

// open: see objects. A hit in memory costs one stat; a larger body an open and
// a stat; record files are read only when memory does not know them.
func (d *diskStore) open(ctx context.Context, key string, off int64) (*object, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	e := d.memory.get(key)
	if e != nil && (off < 0 || e.body != nil) {
		if fi, err := os.Stat(e.name); err == nil && identityOf(fi) == e.id {
			return e.newObject(off), nil
		}
	}
	f, e, err := d.openMatching(ctx, key, e)
	if err != nil {
		return nil, err
	}
	switch {
	case off < 0:
		f.Close()
		return e.newObject(off), nil
	case e.id.size <= maxSmallBody:
		return d.openSmall(f, e, off)
	}
	return openLarge(f, e, off)
}

// openMatching opens key's body and the entry that fits it: the one given, one made of
// the record files, or of a repair.
func (d *diskStore) openMatching(ctx context.Context, key string, hot *memoryEntry) (*os.File, *memoryEntry, error) {
	if hot == nil {
		if !validKey(key) {
			return nil, nil, fmt.Errorf("opening %q: %w", key, fs.ErrNotExist)
		}
		hot = &memoryEntry{key: key, name: d.pathOf(key)}
	}
	f, id, err := openBody(hot.name)
	if err != nil {
		return nil, nil, openError(key, err)
	}
	if hot.rec != nil && hot.id == id {
		return f, hot, nil
	}
	fits, _, err := d.readRecords(key, id)
	if err == nil && fits != nil {
		e := &memoryEntry{key: key, name: hot.name, id: id, rec: fits}
		d.memory.add(e)
		return f, e, nil
	}
	f.Close()
	if err != nil {
		return nil, nil, openError(key, err)
	}
	return d.repairCopy(ctx, key)
}

// openBody opens a body and takes the identity of what was opened: the name
// may be another file's a moment later.
func openBody(name string) (*os.File, fileIdentity, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fileIdentity{}, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file: %w", name, fs.ErrNotExist)
	}
	if err != nil {
		f.Close()
		return nil, fileIdentity{}, err
	}
	return f, identityOf(fi), nil
}

// openError is a miss when a name does not exist, and else a store that
// cannot be asked.
func openError(key string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("opening %s: %w", key, err)
	}
	return storeError("opening "+key, err)
}

// openSmall reads a small body into memory and answers from there.
func (d *diskStore) openSmall(f *os.File, e *memoryEntry, off int64) (*object, error) {
	defer f.Close()
	full := *e
	full.body = make([]byte, e.id.size)
	if _, err := io.ReadFull(f, full.body); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			// Cut in place since the stat. The next open sees the new identity.
			return nil, fmt.Errorf("reading %s: body was cut: %w", e.key, fs.ErrNotExist)
		}
		return nil, storeError("reading "+e.key, err)
	}
	d.memory.add(&full)
	return full.newObject(off), nil
}

func openLarge(f *os.File, e *memoryEntry, off int64) (*object, error) {
	if off > 0 {
		if _, err := f.Seek(off, io.SeekStart); err != nil {
			f.Close()
			return nil, storeError("opening "+e.key, err)
		}
	}
	o := new(struct {
		object
		file fileBody
	})
	o.file.f = f
	o.object = object{rec: e.rec, body: &o.file}
	return &o.object, nil
}

// readRecords reads key's record files. fits is the one whose body has id; all are
// the sound ones when none fits. errVersion is returned only then.
func (d *diskStore) readRecords(key string, id fileIdentity) (fits *record, all []*diskRecord, err error) {
	var foreign error
	for _, name := range []string{recordFile, recordNext} {
		e, of, err := readRecord(d.folderOf(key) + "/" + name)
		if err == nil && of != key {
			err = fmt.Errorf("%w: of another file", errDamaged)
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case errors.Is(err, errVersion):
			foreign = err
		case errors.Is(err, errDamaged):
			d.log.Warn("stored record is of no use", "key", key, "file", name, "reason", err)
		case err != nil:
			return nil, nil, err
		case e.bodyIdentity() == id:
			return &e.record, nil, nil
		default:
			all = append(all, e)
		}
	}
	if foreign != nil {
		d.log.Warn("stored record is left alone", "key", key, "reason", foreign)
		return nil, nil, fmt.Errorf("%w: %w", foreign, fs.ErrNotExist)
	}
	return nil, all, nil
}

// repairCopy finds the record of a body that none fits, by its hash, and writes it
// anew with the body's identity; without one the files are dropped. Bodies
// come to this by a restored backup, a crash or damage. The directory's lock
// makes one of many callers do the work.
func (d *diskStore) repairCopy(ctx context.Context, key string) (*os.File, *memoryEntry, error) {
	l, err := d.lockFolder(ctx, d.folderOf(key), false)
	if err != nil {
		return nil, nil, openError(key, err)
	}
	defer l.unlock()
	f, e, err := d.repairLocked(ctx, key)
	if err != nil {
		return nil, nil, openError(key, err)
	}
	d.memory.add(e)
	return f, e, nil
}

// repairLocked leaves key with a body and a .record that fits it, or with nothing
// (fs.ErrNotExist). The caller holds the directory's lock.
func (d *diskStore) repairLocked(ctx context.Context, key string) (*os.File, *memoryEntry, error) {
	f, e, err := d.openCurrent(ctx, key)
	if err != nil {
		return nil, nil, err
	}
	if err := d.repairRecordFile(e); err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, e, nil
}

// openCurrent opens key's body with the record that describes it; it drops a body
// without one. The caller holds the directory's lock.
func (d *diskStore) openCurrent(ctx context.Context, key string) (_ *os.File, _ *memoryEntry, err error) {
	f, id, err := openBody(d.pathOf(key))
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	rec, others, err := d.readRecords(key, id)
	if err == nil && rec == nil {
		rec, err = d.matchByHash(ctx, f, id, others)
	}
	if err == nil && rec == nil {
		err = d.dropDamaged(key, "no record describes the body")
	}
	return f, &memoryEntry{key: key, name: d.pathOf(key), id: id, rec: rec}, err
}

// matchByHash hashes a body for the record among others that describes it, and
// leaves f at its beginning. It does not end with the request that caused it:
// impatient clients would else have a large body hashed again and again.
func (d *diskStore) matchByHash(ctx context.Context, f *os.File, id fileIdentity, others []*diskRecord) (*record, error) {
	others = slices.DeleteFunc(others, func(e *diskRecord) bool { return e.Size != id.size })
	if len(others) == 0 {
		return nil, nil
	}
	sum, err := hashFile(context.WithoutCancel(ctx), f)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	for _, e := range others {
		if e.SHA256 == sum {
			return &e.record, nil
		}
	}
	return nil, nil
}

// repairRecordFile makes e's record the one of its directory. What is there stays
// until the new .record is in place: a crash leaves what can be repaired.
func (d *diskStore) repairRecordFile(e *memoryEntry) error {
	name := d.folderOf(e.key) + "/" + recordFile
	if old, of, err := readRecord(name); err != nil || of != e.key || old.bodyIdentity() != e.id {
		data, err := encodeRecord(e.rec, e.id)
		if err != nil {
			return err
		}
		if err := d.replaceFile(name, writeBytes(data)); err != nil {
			return err
		}
		d.log.Info("stored record was put in order", "key", e.key)
	}
	return removeIfExists(d.folderOf(e.key) + "/" + recordNext)
}

// removeIfExists removes a file that may be gone already.
func removeIfExists(name string) error {
	if err := os.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func writeBytes(data []byte) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	}
}

// hashFile is the SHA-256 in hex of f from its beginning to its end.
func hashFile(ctx context.Context, f *os.File) (string, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	h := sha256.New()
	for {
		// Steps bound what a cancelled caller waits for.
		_, err := io.CopyN(h, f, 4<<20)
		if err == io.EOF {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err = errors.Join(err, ctx.Err()); err != nil {
			return "", err
		}
	}
}

// put: see objects. The order of its steps and what a crash between two leaves:
//
//	spool synced     a file in .spool: sweep
//	directory made   an empty directory: sweep, or the next put uses it
//	record written   .record.next that fits no body, the old copy whole: sweep,
//	                 or the next put overwrites it
//	body moved       .record.next fits the new body and .record none: open
//	                 takes it, the next put or sweep (settle) renames it
//	record moved     nothing is left over, but for a power failure the names
//	                 may still be as after any earlier step
//	folder synced    nothing
//
// An error before "body moved" leaves the old copy, one after it the new one.
func (d *diskStore) put(ctx context.Context, key string, rec *record, spool *os.File) error {
	if err := checkPut(key, rec, spool); err != nil {
		return err
	}
	if err := d.fsync(spool); err != nil {
		return storeError("syncing the spool of "+key, err)
	}
	d.noteStep("spool synced")
	l, err := d.lockFolder(ctx, d.folderOf(key), true)
	if err != nil {
		return storeError("storing "+key, err)
	}
	defer l.unlock()
	d.noteStep("directory made")
	if err := d.commitBody(ctx, key, rec, spool); err != nil {
		l.removeEmpty()
		return storeError("storing "+key, err)
	}
	return storeError("storing "+key, d.syncParents(key))
}

// checkPut refuses what could be stored but never be found again.
func checkPut(key string, rec *record, spool *os.File) error {
	fi, err := spool.Stat()
	switch {
	case err != nil:
		return storeError("storing "+key, err)
	case !validKey(key) || storageKey(rec.Remote, rec.Path) != key:
		return fmt.Errorf("storing %q: record of another file: %s/%s", key, rec.Remote, rec.Path)
	case !isSHA256(rec.SHA256) || fi.Size() != rec.Size:
		return fmt.Errorf("storing %s: spool of %d bytes, record of %d, sha256 %q", key, fi.Size(), rec.Size, rec.SHA256)
	}
	return nil
}

// commitBody puts spool and record in place, see put. The lock is held.
func (d *diskStore) commitBody(ctx context.Context, key string, rec *record, spool *os.File) error {
	replaces, err := d.keepOldRecord(ctx, key)
	if err = errors.Join(err, ctx.Err()); err != nil {
		return err
	}
	defer d.memory.drop(key)
	if isLinked(spool) {
		err := d.installBody(key, rec, spool, spool.Name(), replaces)
		if !errors.Is(err, syscall.EXDEV) {
			return err
		}
	}
	return d.installCopy(key, rec, spool, replaces)
}

// keepOldRecord makes sure that the present copy's record, if there is a copy, is in
// .record: a crashed commit or a restored backup may have it in .record.next
// alone, which is about to be overwritten.
func (d *diskStore) keepOldRecord(ctx context.Context, key string) (there bool, err error) {
	old, e, err := d.openCurrent(ctx, key)
	switch {
	case err == nil:
		old.Close()
		return true, d.repairRecordFile(e)
	case !errors.Is(err, fs.ErrNotExist):
		d.log.Warn("stored file cannot be read and is replaced", "key", key, "err", err)
	}
	return false, nil
}

// isLinked reports whether f's name still leads to f.
func isLinked(f *os.File) bool {
	fi, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(f.Name())
	return err == nil && os.SameFile(fi, named)
}

// installBody moves the file at name, which body is the descriptor of, into place
// as key's body, with its record.
func (d *diskStore) installBody(key string, rec *record, body *os.File, name string, replaces bool) error {
	fi, err := body.Stat()
	if err != nil {
		return err
	}
	data, err := encodeRecord(rec, identityOf(fi))
	if err != nil {
		return err
	}
	folder := d.folderOf(key)
	next := folder + "/" + recordNext
	if err := d.writeFile(next, writeBytes(data)); err != nil {
		return err
	}
	d.noteStep("record written")
	if replaces {
		// The name .record.next must not be lost if the body's is kept.
		err = d.syncDir(folder)
	}
	if err == nil {
		err = d.renameFile(name, d.pathOf(key))
	}
	if err != nil {
		os.Remove(next)
		return err
	}
	d.noteStep("body moved")
	if err := d.renameFile(next, folder+"/"+recordFile); err != nil {
		return err
	}
	d.noteStep("record moved")
	if err := d.syncDir(folder); err != nil {
		return err
	}
	d.noteStep("folder synced")
	return nil
}

// installCopy is install for a spool on another file system or without a name.
func (d *diskStore) installCopy(key string, rec *record, spool *os.File, replaces bool) error {
	name := d.folderOf(key) + "/" + bodyNext
	err := d.writeFile(name, func(w io.Writer) error {
		_, err := io.Copy(w, io.NewSectionReader(spool, 0, rec.Size))
		return err
	})
	if err != nil {
		return err
	}
	f, err := os.Open(name)
	if err == nil {
		err = d.installBody(key, rec, f, name, replaces)
		f.Close()
	}
	if err != nil {
		os.Remove(name)
	}
	return err
}

// syncParents makes the names of key's directory and of those above durable.
// The ones above a remote's are synced once: they change with remotes.yaml.
func (d *diskStore) syncParents(key string) error {
	name, _, _ := strings.Cut(key, "/")
	if err := d.syncDir(d.dir + "/" + name); err != nil {
		return err
	}
	if _, known := d.syncedRemotes.Load(name); known {
		return nil
	}
	if err := d.syncDir(d.dir); err != nil {
		return err
	}
	// Whoever may not read the directory above did not make DATA_DIR either.
	err := d.syncDir(filepath.Dir(filepath.Clean(d.dir)))
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	d.syncedRemotes.Store(name, true)
	return nil
}

// delete: see objects. Records go first: a crash leaves a body without one,
// which is a miss and swept.
func (d *diskStore) delete(ctx context.Context, key string) error {
	if !validKey(key) {
		return fmt.Errorf("deleting %q: %w", key, fs.ErrNotExist)
	}
	l, err := d.lockFolder(ctx, d.folderOf(key), false)
	if err != nil {
		return openError(key, err)
	}
	defer l.unlock()
	if _, err := os.Lstat(d.pathOf(key)); err != nil {
		return openError(key, err)
	}
	d.memory.drop(key)
	if err := d.removeFiles(key); err != nil {
		return storeError("deleting "+key, err)
	}
	l.removeEmpty()
	return nil
}

// removeFiles removes key's records and body, durably. The lock is held.
func (d *diskStore) removeFiles(key string) error {
	for _, name := range []string{recordNext, recordFile, filepath.Base(key)} {
		if err := removeIfExists(d.folderOf(key) + "/" + name); err != nil {
			return err
		}
		d.noteStep("removed " + name)
	}
	return d.syncDir(d.folderOf(key))
}

// dropDamaged removes what is stored of key because it is damaged, and says so. Its
// error is a miss. The lock is held.
func (d *diskStore) dropDamaged(key, reason string) error {
	d.memory.drop(key)
	if name, _, _ := strings.Cut(key, "/"); d.isIrreplaceable != nil && d.isIrreplaceable(name) {
		return d.setAside(key, reason)
	}
	d.log.Warn("stored file is dropped", "key", key, "reason", reason)
	if err := d.removeFiles(key); err != nil {
		return err
	}
	return fmt.Errorf("%w: %s", errDropped, reason)
}

// setAside takes a damaged file that cannot be fetched again out of the way and
// leaves it to a person: that its bytes are right is what nobody knows any more,
// but they may be. A crash in between leaves a part where it was, for the next
// open. The lock is held.
func (d *diskStore) setAside(key, reason string) error {
	aside, err := os.MkdirTemp(d.folderOf(key), damagedDir)
	if err != nil {
		return err
	}
	for _, name := range []string{recordNext, recordFile, filepath.Base(key)} {
		err := d.renameFile(d.folderOf(key)+"/"+name, aside+"/"+name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := errors.Join(d.syncDir(aside), d.syncDir(d.folderOf(key))); err != nil {
		return err
	}
	d.log.Error("damaged file that is nowhere else was set aside: store it again", "key", key, "reason", reason, "at", aside)
	return fmt.Errorf("%w: %s (it is kept in %s)", errDropped, reason, aside)
}
