// store.go: diskStore stores bodies and their records as files below DATA_DIR, in
// such an order that a crash loses nothing that was stored before. Its upkeep is in
// store_sweep.go, its locks are in store_lock.go.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
	recordNext = ".record.next" // describes the body that is about to replace the one beside it
	bodyNext   = ".body.next"   // a body that is being copied from a spool that cannot be renamed
	asideMark  = ".damaged-"    // begins the names of damaged files that cannot be fetched again
	spoolDir   = ".spool"       // directory of the spools, in DATA_DIR
	hotDir     = ".hot"         // directory of hot copies, in DATA_DIR
	lockFile   = ".lock"        // locked by the server that owns DATA_DIR
	tempSuffix = ".tmp"         // ends the name of a small file while it is written
)

var (
	_ objects = (*diskStore)(nil)

	// errDropped is a miss whose files were removed, or set aside, because they are
	// damaged.
	errDropped error = missError("dropped")
	// errStray is a miss: a file beside a record that describes another. It is left alone,
	// and it says nothing about the other.
	errStray error = missError("a stray file: it is left alone, the record beside it describes another")
	// errAside is a file that was set aside, and in whose place there is no other yet.
	errAside = errors.New("damaged, cannot be fetched again, and was set aside: upload the file again, or remove these")
)

// fileWriter writes small files so that a crash leaves either the old or the new
// content.
type fileWriter struct {
	fsync      func(*os.File) error // (*os.File).Sync, except in tests; nil: what is written need not be durable
	stepDone   func(name string)    // called after each step of a commit: a test may kill the process there
	recordBoot string               // diskRecord.Boot of the records that it writes: "" with fsync
}

// newDisk returns a fileWriter that fsyncs.
func newDisk() *fileWriter { return &fileWriter{fsync: (*os.File).Sync, stepDone: func(string) {}} }

// writeFile makes the file name with what fill writes, and fsyncs it. When it fails
// it removes the file. The name itself is not durable yet, see syncDir.
func (k *fileWriter) writeFile(name string, fill func(io.Writer) error) error {
	f, err := openFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = fill(f)
	if k.fsync != nil {
		err = errors.Join(err, k.fsync(f))
	}
	err = errors.Join(err, f.Close())
	if err != nil {
		os.Remove(name)
	}
	return err
}

// writeNew writes a small body, which has the name, and its record where they belong:
// renames of names that nobody looks for yet cost more than the writing. A crash in
// between leaves a body without a whole record, which is a miss.
func (k *fileWriter) writeNew(name string, body *bytes.Reader, rec *record) error {
	err := k.writeFile(name, func(to io.Writer) error {
		body.Seek(0, io.SeekStart) // it does not fail
		_, err := body.WriteTo(to)
		return err
	})
	if err != nil {
		return err
	}
	k.stepDone("body written")
	fi, err := os.Stat(name)
	if err == nil {
		err = k.writeFile(filepath.Dir(name)+"/"+recordFile, writeRecord(rec, identityOf(fi), k.recordBoot))
	}
	if err != nil {
		os.Remove(name)
		return err
	}
	k.stepDone("record beside it written")
	return nil
}

// replaceFile writes a file beside name and renames it to name. When it returns
// nil, content and name are durable. Two callers must not replace the same name at
// the same time.
func (k *fileWriter) replaceFile(name string, fill func(io.Writer) error) error {
	temp := name + tempSuffix
	if err := k.writeFile(temp, fill); err != nil {
		return err
	}
	k.stepDone("temporary file written")
	if err := os.Rename(temp, name); err != nil {
		os.Remove(temp)
		return err
	}
	k.stepDone("temporary file renamed")
	return k.syncDir(filepath.Dir(name))
}

// syncDir makes the names in a directory durable. A file system that cannot do
// that (EINVAL, ENOTSUP) is no error: no program can do better there.
func (k *fileWriter) syncDir(dir string) error {
	if k.fsync == nil {
		return nil
	}
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

// storeError wraps an I/O error in its kind: errNoSpace for a full disk, a quota or
// a limit of the file size, errStoreDown otherwise. nil, the end of a context and an
// error that has a kind are returned as they are. The cause is kept as text alone,
// because a missing directory must not look like a missing artifact (fs.ErrNotExist).
func storeError(doing string, err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, errStoreDown), errors.Is(err, errNoSpace):
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return fmt.Errorf("%w: %s: %v", errNoSpace, doing, err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: %s: %v: the server runs as user %d, which must own DATA_DIR and be able to write there", errStoreDown, doing, err, os.Getuid())
	}
	return fmt.Errorf("%w: %s: %v", errStoreDown, doing, err)
}

// fileBody is a stored body that is read from its file. It implements fileSource: the
// kernel sends the bytes from the file to the socket.
type fileBody struct{ *os.File }

func (b *fileBody) nextFile(limit int64) (*os.File, int64, error) { return b.File, limit, nil }
func (b *fileBody) advanceBy(int64)                               {}

// diskStore implements objects below one directory. DIR/{key} is the body and
// .record beside it describes it. All methods of objects may be called concurrently
// and by several processes. The directory is made when it is first written to, so a
// DATA_DIR that becomes writable later is used without a restart.
type diskStore struct {
	*fileWriter
	dir           string
	now           func() time.Time
	log           *slog.Logger
	memory        *lru[*memoryEntry]
	folders       keyedLock // by directory
	syncedRemotes sync.Map  // names of remotes whose directory is durable; no values
	// isIrreplaceable reports whether a remote's files cannot be fetched again. Its
	// damaged files are set aside instead of removed. nil: no remote is. It is set
	// before the first use.
	isIrreplaceable func(remote string) bool

	// statEvery is how long an entry in memory is used without a stat, which hides changes
	// by other processes for so long. It is set before the first use.
	statEvery time.Duration

	// delaysSync: a small file of a remote is not durable at once, see maySkipSync. It is
	// set before the first use.
	delaysSync bool
	boot       string // the kernel's name of the machine's current run; "": not known

	listsAll bool // see walk; it is set before the first use

	owner *os.File        // .lock while this process has it; lockData and Close use it, never concurrently
	probe backgroundCheck // of ping
	swept time.Time       // when sweep last read all directories; sweep alone uses it
}

// newDiskStore makes a store below dir without touching the disk.
func newDiskStore(dir string, now func() time.Time, log *slog.Logger) *diskStore {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return &diskStore{fileWriter: newDisk(), dir: filepath.Clean(dir), now: now, log: log,
		memory: newLRU[*memoryEntry](memoryBudget, 0), boot: strings.TrimSpace(string(boot))}
}

// pathOf returns the name of key's body, or of a folder {remote}/{hash}.
func (d *diskStore) pathOf(key string) string { return d.dir + "/" + key }

// folderOf returns the directory that holds key's body and records.
func (d *diskStore) folderOf(key string) string { return filepath.Dir(d.pathOf(key)) }

// open implements objects. A small body in memory costs a stat now and then, a larger
// body an open and a stat. Record files are read only when memory has no entry for key.
func (d *diskStore) open(ctx context.Context, key string, off int64) (*object, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	e, _ := d.memory.get(key)
	if e != nil && (off < 0 || e.body != nil) && e.isCurrent(d) {
		return e.newObject(off), nil
	}
	f, e, err := d.openMatching(ctx, key, e)
	if err != nil {
		return nil, lookupError(d, key, err)
	}
	switch {
	case off < 0:
		f.Close()
		return e.newObject(off), nil
	case e.id.size <= maxSmallBody:
		defer f.Close()
		full, err := e.withBody(f)
		if err != nil {
			return nil, err
		}
		d.memory.put(key, full.cost(), full)
		return full.newObject(off), nil
	}
	if off > 0 {
		f.Seek(min(off, e.id.size), io.SeekStart) // within a regular file it does not fail
	}
	return &object{rec: e.rec, headers: e.headers, body: &fileBody{f}}, nil
}

// openMatching opens key's body and returns it with the entry that describes it: the
// known one (which may be nil), one made from the record files or, after a restored
// backup, a crash or damage, one made by a repair. The caller closes the file.
func (d *diskStore) openMatching(ctx context.Context, key string, known *memoryEntry) (*os.File, *memoryEntry, error) {
	f, id, err := openBody(d.pathOf(key))
	if err != nil {
		return nil, nil, err
	}
	if known != nil && known.id == id {
		return f, known, nil
	}
	rec, _, err := d.readRecords(key, id)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	e := &memoryEntry{key: key, id: id, rec: rec}
	if rec == nil {
		f.Close()
		unlock, err := d.lockFolder(ctx, d.folderOf(key), false) // one of many callers does the work
		if err != nil {
			return nil, nil, err
		}
		defer unlock()
		if f, e, err = d.openRepaired(ctx, key); e == nil {
			return nil, nil, err
		} else if err != nil { // such as a full disk: /health tells of it
			d.log.Debug("a record could not be written anew", "key", key, "error", err)
		}
	}
	e.headers = newRecordHeaders(e.rec, e.id.size)
	d.memory.put(e.key, e.cost(), e)
	return f, e, nil
}

// openBody opens a body and returns the identity of the opened file. A later stat of
// the name could be of another file. Anything but a regular file is fs.ErrNotExist.
func openBody(name string) (*os.File, fileIdentity, error) {
	f, err := openFile(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, fileIdentity{}, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = missError(name + " is not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, fileIdentity{}, err
	}
	return f, identityOf(fi), nil
}

// openError wraps an error of opening key: a name that does not exist is a miss
// (fs.ErrNotExist), everything else says that the store cannot be used.
func openError(key string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("opening %s: %w", key, err)
	}
	return storeError("opening "+key, err)
}

// lookupError is openError, but nothing counts as missing while DATA_DIR cannot be used
// and lacks what each has: it is gone, or its disk is not mounted.
func lookupError(d *diskStore, key string, err error) error {
	if down := d.probe.last(); errors.Is(err, fs.ErrNotExist) && errors.Is(down, errStoreDown) {
		if _, gone := os.Stat(d.dir + "/" + spoolDir); gone != nil {
			return down
		}
	}
	return openError(key, err)
}

// readRecords reads the record files beside key's body. matching is the record that
// describes the body with that identity. When there is none, similar are the records
// of key for a body of that size, and the error is errStray if one of the records is
// of another file.
func (d *diskStore) readRecords(key string, id fileIdentity) (matching *record, similar []*record, err error) {
	var miss error
	for _, name := range []string{recordFile, recordNext} {
		e, err := readRecord(d.folderOf(key) + "/" + name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case errors.Is(err, errDamaged):
			// Or half written: who has the lock says what becomes of the body.
			d.log.Debug("damaged record is ignored", "key", key, "file", name, "error", err)
		case err != nil:
			return nil, nil, err
		case e.key != key:
			miss = errStray
		case e.bodyIdentity() == id && e.isDurable(d.boot):
			return &e.record, nil, nil
		case e.Size == id.size:
			similar = append(similar, &e.record)
		}
	}
	return nil, similar, miss
}

// openRepaired opens key's body with the record that describes it. It leaves that
// record in .record, and no .record.next. It drops a body without such a record. If
// it returns an entry and an error, the copy is good, but its record could not be
// written. The caller holds the directory's lock and closes the file of an entry.
func (d *diskStore) openRepaired(ctx context.Context, key string) (f *os.File, e *memoryEntry, err error) {
	f, id, err := openBody(d.pathOf(key))
	if err != nil {
		return nil, nil, err
	}
	defer func(opened *os.File) {
		if e == nil {
			opened.Close()
		}
	}(f)
	rec, similar, err := d.readRecords(key, id)
	isHashed := rec == nil && len(similar) > 0
	if err == nil && isHashed {
		// It goes on when the request that caused it ends: otherwise impatient clients
		// would have a large body hashed again and again.
		var sum string
		sum, err = hashBody(context.WithoutCancel(ctx), f)
		if i := slices.IndexFunc(similar, func(r *record) bool { return r.SHA256 == sum }); i >= 0 {
			rec = similar[i]
		}
	}
	if err == nil && rec == nil {
		err = d.dropDamaged(key, "no record describes the body")
	}
	if err != nil {
		return nil, nil, err
	}
	e = &memoryEntry{key: key, id: id, rec: rec, isHashed: isHashed}
	// The old record files stay until the new .record is in place, so that a crash leaves
	// a copy that can be repaired.
	folder := d.folderOf(key) + "/"
	if old, err := readRecord(folder + recordFile); err != nil || old.key != key || old.bodyIdentity() != id || !old.isDurable(d.boot) {
		if err := d.fsync(f); err != nil { // the new record says that the body is durable
			return f, e, err
		}
		if err := d.replaceFile(folder+recordFile, writeRecord(rec, id, "")); err != nil {
			return f, e, err
		}
		d.log.Info("stored record was repaired", "key", key)
	}
	return f, e, ignoreMiss(os.Remove(folder + recordNext))
}

// put implements objects. Its steps, what a crash after each of them leaves, and what
// cleans that up:
//
//	directory made   an empty directory; the next put uses it or sweep removes it
//	spool synced     a file in .spool too; sweep removes it
//	record written   the old copy whole, and a .record.next that describes no
//	                 body; the next put overwrites it or sweep removes it
//	body moved       the new body, described by .record.next and not by .record;
//	                 open reads both, the next put or sweep renames .record.next
//	                 (openRepaired)
//	record moved     nothing after a crash of the process; after a power failure
//	                 the names may be those after any earlier step
//	folder synced    nothing
//
// An error before "body moved" leaves the old copy, one after it the new copy. Where
// maySkipSync allows it nothing is synced: after a power failure any of the files may be
// gone or wrong, and the record, if it is whole, says so (isDurable). Then a small body is
// written in its place (writeNew).
func (d *diskStore) put(ctx context.Context, key string, rec *record, spool io.ReaderAt, _ putCondition) error {
	unlock, err := d.lockFolder(ctx, d.folderOf(key), true)
	if err != nil {
		return storeError("storing "+key, err)
	}
	defer unlock()
	d.stepDone("directory made")
	if err = d.commitBody(ctx, key, rec, spool); err != nil {
		os.Remove(d.folderOf(key)) // if it is empty
	}
	return storeError("storing "+key, err)
}

// maxUnsynced is the largest body that need not be durable at once, in bytes. Four
// fsyncs are most of what storing a small file costs, and little of a larger one.
const maxUnsynced = 1 << 20

// maySkipSync reports whether a file of a remote may be written without fsync where there
// is none yet. A process that dies loses nothing with that. After a power failure the file
// may be wrong or gone, so its record names the boot that it was written in, and in another
// one it is hashed before it is used. What cannot be fetched again is always synced.
func (d *diskStore) maySkipSync(rec *record) bool {
	return d.delaysSync && d.boot != "" && rec.Size <= maxUnsynced && rec.Class != local && (d.isIrreplaceable == nil || !d.isIrreplaceable(rec.Remote))
}

// commitBody puts spool and record in place, see put, without fsync if they need not be
// durable at once. The caller holds the directory's lock.
func (d *diskStore) commitBody(ctx context.Context, key string, rec *record, spool io.ReaderAt) error {
	// A crashed commit or a restored backup may have the old copy's record in
	// .record.next alone, which installBody overwrites: it must be in .record.
	old, oldEntry, err := d.openRepaired(ctx, key)
	switch {
	case oldEntry != nil:
		old.Close()
		if err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		d.log.Warn("stored file cannot be read and is replaced", "key", key, "error", err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	defer d.memory.remove(key)
	if oldEntry == nil && d.maySkipSync(rec) {
		w := &fileWriter{stepDone: d.stepDone, recordBoot: d.boot}
		if body, ok := spool.(*bytes.Reader); ok {
			return w.writeNew(d.pathOf(key), body, rec)
		}
		return d.takeSpool(key, rec, spool, w)
	}
	if file, ok := spool.(*os.File); ok {
		if err := d.fsync(file); err != nil {
			return err
		}
	}
	d.stepDone("spool synced")
	if err := d.takeSpool(key, rec, spool, d.fileWriter); err != nil {
		return err
	}
	// Then the names of key's directory and of those above it. Those of a remote's directory
	// and of DATA_DIR do not change: they are synced once a process.
	remote, _, _ := strings.Cut(key, "/")
	err = d.syncDir(d.dir + "/" + remote)
	if _, synced := d.syncedRemotes.Load(remote); synced || err != nil {
		return err
	}
	if err := d.syncDir(d.dir); err != nil {
		return err
	}
	// A process that may not read the directory above DATA_DIR has not made
	// DATA_DIR, so its name is durable already.
	if err := d.syncDir(filepath.Dir(d.dir)); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	d.syncedRemotes.Store(remote, true)
	return nil
}

// takeSpool makes a spool key's body. One that still has its name is renamed; one without
// a name, in memory or on another file system is copied. w writes the other files,
// without fsync if they need not be durable.
func (d *diskStore) takeSpool(key string, rec *record, spool io.ReaderAt, w *fileWriter) error {
	if file, ok := spool.(*os.File); ok && isLinked(file) {
		err := d.installBody(key, rec, file.Name(), w)
		if !errors.Is(err, syscall.EXDEV) {
			return err
		}
	}
	name := d.folderOf(key) + "/" + bodyNext
	err := w.writeFile(name, func(to io.Writer) error {
		_, err := io.Copy(to, io.NewSectionReader(spool, 0, rec.Size))
		return err
	})
	if err == nil {
		err = d.installBody(key, rec, name, w)
	}
	if err != nil {
		os.Remove(name)
	}
	return err
}

// isLinked reports whether f's name is still the name of f: the file was neither
// removed nor replaced.
func isLinked(f *os.File) bool {
	fi, err := f.Stat()
	named, namedErr := os.Stat(f.Name())
	return err == nil && namedErr == nil && os.SameFile(fi, named)
}

// installBody renames the file name to key's body and writes its record.
func (d *diskStore) installBody(key string, rec *record, name string, w *fileWriter) error {
	fi, err := os.Stat(name)
	if err != nil {
		return err
	}
	folder := d.folderOf(key)
	next := folder + "/" + recordNext
	if err := w.writeFile(next, writeRecord(rec, identityOf(fi), w.recordBoot)); err != nil {
		return err
	}
	d.stepDone("record written")
	// A power failure must not keep the new body's name and lose that of .record.next:
	// .record may describe an old body.
	if err = w.syncDir(folder); err == nil {
		err = os.Rename(name, d.pathOf(key))
	}
	if err != nil {
		os.Remove(next)
		return err
	}
	d.stepDone("body moved")
	if err := os.Rename(next, folder+"/"+recordFile); err != nil {
		return err
	}
	d.stepDone("record moved")
	err = w.syncDir(folder)
	d.stepDone("folder synced")
	return err
}

// delete implements objects. It removes the body first: a crash in between leaves records
// without a body, which are a miss and are removed by sweep. A body without a record would
// look like a damaged upload.
func (d *diskStore) delete(ctx context.Context, key string) error {
	if !validKey(key) {
		return fmt.Errorf("deleting %q: %w", key, fs.ErrNotExist)
	}
	unlock, err := d.lockFolder(ctx, d.folderOf(key), false)
	if err != nil {
		return lookupError(d, key, err)
	}
	defer unlock()
	if _, err := os.Lstat(d.pathOf(key)); err != nil {
		return lookupError(d, key, err)
	}
	defer d.memory.remove(key)
	if err := d.removeFiles(key, false); err != nil {
		return storeError("deleting "+key, err)
	}
	os.Remove(d.folderOf(key)) // if it is empty; sweep removes it if that is not durable
	return nil
}

// invalidate implements objects. Nothing here is a copy of what is elsewhere.
func (d *diskStore) invalidate(string) {}

// stat: see objects.
func (d *diskStore) stat(ctx context.Context, key string) (*object, error) {
	return d.open(ctx, key, -1)
}

// removeFiles durably removes key's body and records, or sets them aside: then
// asideMark begins their names. The caller holds the directory's lock.
func (d *diskStore) removeFiles(key string, setAside bool) error {
	folder := d.folderOf(key) + "/"
	for _, name := range []string{filepath.Base(key), recordNext, recordFile} {
		var err error
		if setAside {
			err = os.Rename(folder+name, folder+asideMark+name)
		} else {
			err = os.Remove(folder + name)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		d.stepDone("removed " + name)
	}
	return d.syncDir(folder)
}

// dropDamaged removes the damaged files of key and logs it. It returns errDropped,
// which is a miss, or an error of I/O. What cannot be fetched again is set aside where a
// person can look at it: its bytes may still be right, but nothing proves it. A crash in
// between leaves records, which sweep removes. The caller holds the directory's lock.
func (d *diskStore) dropDamaged(key, reason string) error {
	defer d.memory.remove(key)
	remote, _, _ := strings.Cut(key, "/")
	setAside := d.isIrreplaceable != nil && d.isIrreplaceable(remote)
	if err := d.removeFiles(key, setAside); err != nil {
		return err
	}
	if setAside {
		kept := d.folderOf(key) + "/" + asideMark + filepath.Base(key)
		d.log.Error("damaged file that cannot be fetched again was set aside: upload it again", "key", key, "reason", reason, "file", kept)
		return fmt.Errorf("%w: %s (it is kept in %s)", errDropped, reason, kept)
	}
	d.log.Warn("damaged file is dropped and will be fetched again", "key", key, "reason", reason)
	return fmt.Errorf("%w: %s", errDropped, reason)
}
