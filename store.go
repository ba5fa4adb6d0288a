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
	// maxSmall is the largest body kept in memory: metadata and manifests,
	// which are asked for most, and for which an open costs more than a read.
	maxSmall = 64 << 10
	// hotBytes bounds the memory for records and small bodies together, small
	// enough for a container of 256 MiB.
	hotBytes = 64 << 20
	// entryCost is charged for a record and its place in the cache.
	entryCost = 1 << 10
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

// disk writes small files so that a crash leaves the old or the new one whole,
// and is the one place that renames and fsyncs.
type disk struct {
	fsync func(*os.File) error // (*os.File).Sync but in tests
	step  func(name string)    // told after each step of a commit; nil but in tests
}

func newDisk() *disk { return &disk{fsync: (*os.File).Sync} }

func (k *disk) did(step string) {
	if k.step != nil {
		k.step(step)
	}
}

// write makes a file of what fill writes and fsyncs it. Nothing is left behind
// when it fails.
func (k *disk) write(name string, fill func(io.Writer) error) (err error) {
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

// replace writes a file beside name and renames it into place, durably.
// Callers keep each other away from one name.
func (k *disk) replace(name string, fill func(io.Writer) error) error {
	temp := name + tempSuffix
	if err := k.write(temp, fill); err != nil {
		return err
	}
	k.did("temporary file written")
	if err := k.rename(temp, name); err != nil {
		os.Remove(temp)
		return err
	}
	k.did("temporary file renamed")
	return k.syncDir(filepath.Dir(name))
}

func (k *disk) rename(from, to string) error { return os.Rename(from, to) }

// syncDir makes the names in a directory durable. Where a file system cannot
// do that there is nothing to be had (EINVAL, ENOTSUP).
func (k *disk) syncDir(dir string) error {
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
	*disk
	dir   string
	now   func() time.Time
	log   *slog.Logger
	hot   *hotCache
	turns turns    // by directory
	known sync.Map // remotes whose directory is durable
	// precious says whether a remote's files are nowhere else. What is damaged
	// of them is set aside. nil: none are. Set before the first use.
	precious func(remote string) bool

	owner *os.File // .lock while we hold it
	probe probe
	swept time.Time // when the tree was last swept; sweep's alone
}

func newDiskStore(dir string, now func() time.Time, log *slog.Logger) *diskStore {
	return &diskStore{disk: newDisk(), dir: filepath.Clean(dir), now: now, log: log, hot: newHotCache(hotBytes)}
}

func (d *diskStore) path(key string) string { return d.dir + "/" + key }

// folder is the directory that holds key's body and records.
func (d *diskStore) folder(key string) string { return filepath.Dir(d.path(key)) }

// open: see objects. A hit in memory costs one stat; a larger body an open and
// a stat; record files are read only when memory does not know them.
func (d *diskStore) open(ctx context.Context, key string, off int64) (*object, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	e := d.hot.get(key)
	if e != nil && (off < 0 || e.body != nil) {
		if fi, err := os.Stat(e.name); err == nil && identityOf(fi) == e.id {
			return e.object(off), nil
		}
	}
	f, e, err := d.find(ctx, key, e)
	if err != nil {
		return nil, err
	}
	switch {
	case off < 0:
		f.Close()
		return e.object(off), nil
	case e.id.size <= maxSmall:
		return d.load(f, e, off)
	}
	return fromFile(f, e, off)
}

// find opens key's body and the entry that fits it: the one given, one made of
// the record files, or of a repair.
func (d *diskStore) find(ctx context.Context, key string, hot *hotEntry) (*os.File, *hotEntry, error) {
	if hot == nil {
		if !validKey(key) {
			return nil, nil, fmt.Errorf("opening %q: %w", key, fs.ErrNotExist)
		}
		hot = &hotEntry{key: key, name: d.path(key)}
	}
	f, id, err := openBody(hot.name)
	if err != nil {
		return nil, nil, openError(key, err)
	}
	if hot.rec != nil && hot.id == id {
		return f, hot, nil
	}
	fits, _, err := d.records(key, id)
	if err == nil && fits != nil {
		e := &hotEntry{key: key, name: hot.name, id: id, rec: fits}
		d.hot.add(e)
		return f, e, nil
	}
	f.Close()
	if err != nil {
		return nil, nil, openError(key, err)
	}
	return d.repair(ctx, key)
}

// openBody opens a body and takes the identity of what was opened: the name
// may be another file's a moment later.
func openBody(name string) (*os.File, identity, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, identity{}, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file: %w", name, fs.ErrNotExist)
	}
	if err != nil {
		f.Close()
		return nil, identity{}, err
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

// load reads a small body into memory and answers from there.
func (d *diskStore) load(f *os.File, e *hotEntry, off int64) (*object, error) {
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
	d.hot.add(&full)
	return full.object(off), nil
}

func fromFile(f *os.File, e *hotEntry, off int64) (*object, error) {
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

// records reads key's record files. fits is the one whose body has id; all are
// the sound ones when none fits. errVersion is returned only then.
func (d *diskStore) records(key string, id identity) (fits *record, all []*envelope, err error) {
	var foreign error
	for _, name := range []string{recordFile, recordNext} {
		e, of, err := readRecord(d.folder(key) + "/" + name)
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
		case e.identity() == id:
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

// repair finds the record of a body that none fits, by its hash, and writes it
// anew with the body's identity; without one the files are dropped. Bodies
// come to this by a restored backup, a crash or damage. The directory's lock
// makes one of many callers do the work.
func (d *diskStore) repair(ctx context.Context, key string) (*os.File, *hotEntry, error) {
	l, err := d.lock(ctx, d.folder(key), false)
	if err != nil {
		return nil, nil, openError(key, err)
	}
	defer l.unlock()
	f, e, err := d.settle(ctx, key)
	if err != nil {
		return nil, nil, openError(key, err)
	}
	d.hot.add(e)
	return f, e, nil
}

// settle leaves key with a body and a .record that fits it, or with nothing
// (fs.ErrNotExist). The caller holds the directory's lock.
func (d *diskStore) settle(ctx context.Context, key string) (*os.File, *hotEntry, error) {
	f, e, err := d.current(ctx, key)
	if err != nil {
		return nil, nil, err
	}
	if err := d.settleRecord(e); err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, e, nil
}

// current opens key's body with the record that describes it; it drops a body
// without one. The caller holds the directory's lock.
func (d *diskStore) current(ctx context.Context, key string) (_ *os.File, _ *hotEntry, err error) {
	f, id, err := openBody(d.path(key))
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	rec, others, err := d.records(key, id)
	if err == nil && rec == nil {
		rec, err = d.matching(ctx, f, id, others)
	}
	if err == nil && rec == nil {
		err = d.drop(key, "no record describes the body")
	}
	return f, &hotEntry{key: key, name: d.path(key), id: id, rec: rec}, err
}

// matching hashes a body for the record among others that describes it, and
// leaves f at its beginning. It does not end with the request that caused it:
// impatient clients would else have a large body hashed again and again.
func (d *diskStore) matching(ctx context.Context, f *os.File, id identity, others []*envelope) (*record, error) {
	others = slices.DeleteFunc(others, func(e *envelope) bool { return e.Size != id.size })
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

// settleRecord makes e's record the one of its directory. What is there stays
// until the new .record is in place: a crash leaves what can be repaired.
func (d *diskStore) settleRecord(e *hotEntry) error {
	name := d.folder(e.key) + "/" + recordFile
	if old, of, err := readRecord(name); err != nil || of != e.key || old.identity() != e.id {
		data, err := encodeRecord(e.rec, e.id)
		if err != nil {
			return err
		}
		if err := d.replace(name, writing(data)); err != nil {
			return err
		}
		d.log.Info("stored record was put in order", "key", e.key)
	}
	return remove(d.folder(e.key) + "/" + recordNext)
}

// remove removes a file that may be gone already.
func remove(name string) error {
	if err := os.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func writing(data []byte) func(io.Writer) error {
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
	d.did("spool synced")
	l, err := d.lock(ctx, d.folder(key), true)
	if err != nil {
		return storeError("storing "+key, err)
	}
	defer l.unlock()
	d.did("directory made")
	if err := d.commit(ctx, key, rec, spool); err != nil {
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

// commit puts spool and record in place, see put. The lock is held.
func (d *diskStore) commit(ctx context.Context, key string, rec *record, spool *os.File) error {
	replaces, err := d.keepOld(ctx, key)
	if err = errors.Join(err, ctx.Err()); err != nil {
		return err
	}
	defer d.hot.drop(key)
	if linked(spool) {
		err := d.install(key, rec, spool, spool.Name(), replaces)
		if !errors.Is(err, syscall.EXDEV) {
			return err
		}
	}
	return d.copyIn(key, rec, spool, replaces)
}

// keepOld makes sure that the present copy's record, if there is a copy, is in
// .record: a crashed commit or a restored backup may have it in .record.next
// alone, which is about to be overwritten.
func (d *diskStore) keepOld(ctx context.Context, key string) (there bool, err error) {
	old, e, err := d.current(ctx, key)
	switch {
	case err == nil:
		old.Close()
		return true, d.settleRecord(e)
	case !errors.Is(err, fs.ErrNotExist):
		d.log.Warn("stored file cannot be read and is replaced", "key", key, "err", err)
	}
	return false, nil
}

// linked reports whether f's name still leads to f.
func linked(f *os.File) bool {
	fi, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(f.Name())
	return err == nil && os.SameFile(fi, named)
}

// install moves the file at name, which body is the descriptor of, into place
// as key's body, with its record.
func (d *diskStore) install(key string, rec *record, body *os.File, name string, replaces bool) error {
	fi, err := body.Stat()
	if err != nil {
		return err
	}
	data, err := encodeRecord(rec, identityOf(fi))
	if err != nil {
		return err
	}
	folder := d.folder(key)
	next := folder + "/" + recordNext
	if err := d.write(next, writing(data)); err != nil {
		return err
	}
	d.did("record written")
	if replaces {
		// The name .record.next must not be lost if the body's is kept.
		err = d.syncDir(folder)
	}
	if err == nil {
		err = d.rename(name, d.path(key))
	}
	if err != nil {
		os.Remove(next)
		return err
	}
	d.did("body moved")
	if err := d.rename(next, folder+"/"+recordFile); err != nil {
		return err
	}
	d.did("record moved")
	if err := d.syncDir(folder); err != nil {
		return err
	}
	d.did("folder synced")
	return nil
}

// copyIn is install for a spool on another file system or without a name.
func (d *diskStore) copyIn(key string, rec *record, spool *os.File, replaces bool) error {
	name := d.folder(key) + "/" + bodyNext
	err := d.write(name, func(w io.Writer) error {
		_, err := io.Copy(w, io.NewSectionReader(spool, 0, rec.Size))
		return err
	})
	if err != nil {
		return err
	}
	f, err := os.Open(name)
	if err == nil {
		err = d.install(key, rec, f, name, replaces)
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
	if _, known := d.known.Load(name); known {
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
	d.known.Store(name, true)
	return nil
}

// delete: see objects. Records go first: a crash leaves a body without one,
// which is a miss and swept.
func (d *diskStore) delete(ctx context.Context, key string) error {
	if !validKey(key) {
		return fmt.Errorf("deleting %q: %w", key, fs.ErrNotExist)
	}
	l, err := d.lock(ctx, d.folder(key), false)
	if err != nil {
		return openError(key, err)
	}
	defer l.unlock()
	if _, err := os.Lstat(d.path(key)); err != nil {
		return openError(key, err)
	}
	d.hot.drop(key)
	if err := d.removeFiles(key); err != nil {
		return storeError("deleting "+key, err)
	}
	l.removeEmpty()
	return nil
}

// removeFiles removes key's records and body, durably. The lock is held.
func (d *diskStore) removeFiles(key string) error {
	for _, name := range []string{recordNext, recordFile, filepath.Base(key)} {
		if err := remove(d.folder(key) + "/" + name); err != nil {
			return err
		}
		d.did("removed " + name)
	}
	return d.syncDir(d.folder(key))
}

// drop removes what is stored of key because it is damaged, and says so. Its
// error is a miss. The lock is held.
func (d *diskStore) drop(key, reason string) error {
	d.hot.drop(key)
	if name, _, _ := strings.Cut(key, "/"); d.precious != nil && d.precious(name) {
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
	aside, err := os.MkdirTemp(d.folder(key), damagedDir)
	if err != nil {
		return err
	}
	for _, name := range []string{recordNext, recordFile, filepath.Base(key)} {
		err := d.rename(d.folder(key)+"/"+name, aside+"/"+name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := errors.Join(d.syncDir(aside), d.syncDir(d.folder(key))); err != nil {
		return err
	}
	d.log.Error("damaged file that is nowhere else was set aside: store it again", "key", key, "reason", reason, "at", aside)
	return fmt.Errorf("%w: %s (it is kept in %s)", errDropped, reason, aside)
}
