// store_sweep.go: the upkeep of the disk store. walk lists what is stored, sweep
// removes what crashes left, verify hashes what is stored, lockData owns DATA_DIR,
// freeSpace and ping look at the disk below it.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// walk implements objects. It leaves out a record whose body is gone or has another
// size. It does not hash: a restored body of the right size is listed, and open
// decides later whether a record describes it.
func (d *diskStore) walk(ctx context.Context, f func(key string, rec *record) error) error {
	return d.eachFolder(ctx, func(folder string) error {
		key, rec := d.describeFolder(folder)
		if rec == nil {
			return nil
		}
		return f(key, rec)
	})
}

// describeFolder returns the key and the record of the file in a directory
// {remote}/{hash}, or a nil record. Of two records it prefers the one with the
// identity of its body.
func (d *diskStore) describeFolder(folder string) (key string, rec *record) {
	for _, name := range []string{recordFile, recordNext} {
		e, describedKey, err := readRecord(d.pathOf(folder) + "/" + name)
		if err != nil || filepath.Dir(describedKey) != folder {
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				d.log.Warn("damaged record is ignored", "folder", folder, "file", name, "error", err)
			}
			continue
		}
		fi, err := os.Stat(d.pathOf(describedKey))
		if err != nil || fi.Size() != e.Size {
			continue
		}
		if rec == nil || identityOf(fi) == e.bodyIdentity() {
			key, rec = describedKey, &e.record
		}
		if identityOf(fi) == e.bodyIdentity() {
			break
		}
	}
	return key, rec
}

// eachFolder calls f with {remote}/{hash} for each directory of files, until f or ctx
// ends it. It skips other names (lost+found, or what was in DATA_DIR before).
func (d *diskStore) eachFolder(ctx context.Context, f func(folder string) error) error {
	return eachName(d.dir, func(name string) error {
		if !isRemoteName(name) {
			return nil
		}
		return eachName(d.pathOf(name), func(hash string) error {
			if err := ctx.Err(); err != nil || !isHash(hash) {
				return err
			}
			return f(name + "/" + hash)
		})
	})
}

// eachName calls f with each name in a directory that does not begin with a dot. It
// reads them in parts, since there may be millions. A missing directory and a file
// have no names. f's error ends it and is returned.
func eachName(dir string, f func(name string) error) error {
	h, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return storeError("listing", err)
	}
	defer h.Close()
	for {
		names, err := h.Readdirnames(1000)
		for _, name := range names {
			if name[0] == '.' {
				continue
			}
			if err := f(name); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF, errors.Is(err, syscall.ENOTDIR), errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return storeError("listing", err)
		}
	}
}

// newSpool makes an empty temporary file in the directory of spools. The caller
// closes it and removes its name, unless put has renamed it. The file is locked while
// it is open, so that no process sweeps it.
func (d *diskStore) newSpool() (*os.File, error) {
	dir := d.dir + "/" + spoolDir
	for triedMkdir := false; ; {
		f, err := os.CreateTemp(dir, "*")
		if errors.Is(err, fs.ErrNotExist) && !triedMkdir {
			triedMkdir = true
			if err = os.MkdirAll(dir, 0o755); err == nil {
				continue
			}
		}
		if err != nil {
			return nil, storeError("making a temporary file", err)
		}
		tryFlock(f)
		if isLinked(f) {
			return f, nil
		}
		f.Close() // another process swept it before it was locked: make another
	}
}

// freeSpace returns the space that this process may still fill, and the size of the
// file system, both in bytes. It may be called before DATA_DIR exists.
func (d *diskStore) freeSpace() (free, size uint64, err error) {
	var st syscall.Statfs_t
	dir := filepath.Clean(d.dir)
	err = syscall.Statfs(dir, &st)
	for errors.Is(err, fs.ErrNotExist) && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir) // DATA_DIR will be made on this file system
		err = syscall.Statfs(dir, &st)
	}
	if err != nil {
		return 0, 0, storeError("reading the free space", err)
	}
	return uint64(st.Bavail) * uint64(st.Bsize), uint64(st.Blocks) * uint64(st.Bsize), nil
}

// lockData makes this process the owner of DATA_DIR until Close, and reports whether
// it is. It is not when another process is the owner. It must not be called
// concurrently.
func (d *diskStore) lockData() (locked bool, err error) {
	if d.owner != nil {
		return true, nil
	}
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return false, storeError("locking DATA_DIR", err)
	}
	f, err := os.OpenFile(d.dir+"/"+lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return false, storeError("locking DATA_DIR", err)
	}
	locked, err = tryFlock(f)
	if !locked {
		f.Close()
		return false, storeError("locking DATA_DIR", err)
	}
	d.owner = f
	return true, nil
}

// Close unlocks DATA_DIR. It waits for a ping that still runs.
func (d *diskStore) Close() error {
	d.probe.wait()
	if d.owner == nil {
		return nil
	}
	return d.owner.Close()
}

// sweep removes what crashes left, once it is older than orphanAge: spools that no
// process has open, and files in the directories of bodies that belong to none. It
// reads those directories once a day only, because it must read all of them. One
// goroutine calls it, at the start and then hourly.
func (d *diskStore) sweep(ctx context.Context) error {
	err := d.sweepSpools(false)
	if d.now().Sub(d.swept) < orphanAge {
		return err
	}
	d.swept = d.now()
	return errors.Join(err, d.eachFolder(ctx, func(folder string) error {
		_, untidy, err := d.listFolder(folder)
		if err != nil || !untidy || !d.isOld(d.pathOf(folder)) {
			return nil
		}
		d.tidyFolder(ctx, folder, func(key string, err error) {
			d.log.Warn("sweeping found a stored file that cannot be used", "key", key, "error", err)
		})
		return nil
	}))
}

// sweepSpools removes spools that no process has open: with all every one, else those
// older than orphanAge. all is for the owner of DATA_DIR while it starts.
func (d *diskStore) sweepSpools(all bool) error {
	dir := d.dir + "/" + spoolDir
	return eachName(dir, func(name string) error {
		f, err := os.Open(dir + "/" + name)
		if err != nil {
			return nil // it was removed meanwhile
		}
		defer f.Close()
		// Without working locks (an error) only the age shows that no process
		// uses the spool.
		unused, err := tryFlock(f)
		if (all && unused) || (d.isOld(f.Name()) && (unused || err != nil)) {
			os.Remove(f.Name())
		}
		return nil
	})
}

// isOld reports whether a file, or the list of names in a directory, was last changed
// more than orphanAge ago.
func (d *diskStore) isOld(name string) bool {
	fi, err := os.Stat(name)
	return err == nil && d.now().Sub(fi.ModTime()) > orphanAge
}

// listFolder returns the names of the bodies in a directory {remote}/{hash}. untidy
// reports whether it holds anything else than one body and its .record.
func (d *diskStore) listFolder(folder string) (bodies []string, untidy bool, err error) {
	h, err := os.Open(d.pathOf(folder))
	if err != nil {
		return nil, false, err
	}
	defer h.Close()
	names, err := h.Readdirnames(-1)
	for _, name := range names {
		if name[0] != '.' {
			bodies = append(bodies, name)
		}
	}
	untidy = len(bodies) != 1 || len(names) != 2 || !slices.Contains(names, recordFile)
	return bodies, untidy, err
}

// tidyFolder repairs or drops each body of a directory, removes everything else that
// a crash left there, and removes the directory if it is empty then. It holds the
// directory's lock, so no put is between two of its steps. report is called for each
// file that was dropped or could not be read.
func (d *diskStore) tidyFolder(ctx context.Context, folder string, report func(key string, err error)) {
	l, err := d.lockFolder(ctx, d.pathOf(folder), false)
	if err != nil {
		return // the directory was removed meanwhile
	}
	defer l.unlock()
	bodies, _, err := d.listFolder(folder)
	if err != nil {
		report(folder, storeError("listing", err))
		return
	}
	bodiesLeft := len(bodies)
	for _, name := range bodies {
		f, _, err := d.repairLocked(ctx, folder+"/"+name)
		switch {
		case err == nil:
			f.Close()
		case errors.Is(err, errDropped):
			bodiesLeft--
			fallthrough
		default:
			report(folder+"/"+name, err)
		}
	}
	for _, name := range []string{bodyNext, recordFile + tempSuffix} {
		removeIfExists(d.pathOf(folder) + "/" + name)
	}
	if bodiesLeft == 0 {
		d.tidyRecords(folder, report)
		l.removeEmpty()
	}
}

// tidyRecords removes the records of a directory without bodies. It does not report
// a .record.next: a crash during the first put of a key leaves one, and nothing that
// was stored is lost.
func (d *diskStore) tidyRecords(folder string, report func(key string, err error)) {
	for _, name := range []string{recordNext, recordFile} {
		err := os.Remove(d.pathOf(folder) + "/" + name)
		switch {
		case err == nil && name == recordNext:
		case err == nil:
			report(folder, fmt.Errorf("%w: %s without a body", errDropped, name))
		case !errors.Is(err, fs.ErrNotExist):
			report(folder, storeError("removing a record", err))
		}
	}
}

// verify implements verifiableObjects: it hashes each body and drops those that
// their record does not describe.
func (d *diskStore) verify(ctx context.Context, report func(key string, err error)) (checked, dropped int, err error) {
	countAndReport := func(key string, err error) {
		if errors.Is(err, errDropped) {
			dropped++
		}
		report(key, err)
	}
	err = d.eachFolder(ctx, func(folder string) error {
		bodies, untidy, err := d.listFolder(folder)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			return nil
		} else if err != nil {
			countAndReport(folder, storeError("listing", err))
			return nil
		}
		for _, name := range bodies {
			checked++
			err := d.verifyBody(ctx, folder+"/"+name)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				countAndReport(folder+"/"+name, err)
				untidy = true
			}
		}
		if untidy {
			d.tidyFolder(ctx, folder, countAndReport)
		}
		return nil
	})
	return checked, dropped, err
}

// verifyBody hashes one body and drops it if its record says otherwise. It takes the
// directory's lock only to drop: a put must not wait for the hash of a large body.
func (d *diskStore) verifyBody(ctx context.Context, key string) error {
	f, id, err := openBody(d.pathOf(key))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it was deleted meanwhile
	}
	if err != nil {
		return storeError("opening", err)
	}
	defer f.Close()
	rec, _, err := d.readRecords(key, id)
	if err != nil {
		return openError(key, err)
	}
	if rec == nil {
		return d.repairNow(ctx, key)
	}
	sum, err := hashFile(ctx, f)
	if err != nil {
		return storeError("reading", err)
	}
	if sum == rec.SHA256 {
		return nil
	}
	return d.dropIfUnchanged(ctx, key, id, "the body has sha256 "+sum+", but its record says "+rec.SHA256)
}

// repairNow is repairCopy for a caller that does not need the body. It is no error
// if key is deleted meanwhile.
func (d *diskStore) repairNow(ctx context.Context, key string) error {
	f, _, err := d.repairCopy(ctx, key)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errDropped) && !errors.Is(err, errVersion):
		return nil
	}
	return err
}

// dropIfUnchanged drops key if its body still has the identity id: a body that was
// replaced meanwhile is not the one that was hashed.
func (d *diskStore) dropIfUnchanged(ctx context.Context, key string, id fileIdentity, reason string) error {
	l, err := d.lockFolder(ctx, d.folderOf(key), false)
	if err != nil {
		return nil // it was removed meanwhile
	}
	defer l.unlock()
	if fi, err := os.Stat(d.pathOf(key)); err != nil || identityOf(fi) != id {
		return nil
	}
	return d.dropDamaged(key, reason)
}

// ping returns nil if a file can be made in DATA_DIR. It ends with ctx even if the
// disk hangs. Calls that overlap share one check, since each occupies a thread until
// such a disk answers.
func (d *diskStore) ping(ctx context.Context) error {
	err := d.probe.result(ctx, d.probeWrite)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", errStoreDown, err)
	}
	return err
}

// probeWrite is the check of ping: it makes a file and removes it.
func (d *diskStore) probeWrite() error {
	f, err := d.newSpool()
	if err != nil {
		return err
	}
	return storeError("removing a file", errors.Join(f.Close(), os.Remove(f.Name())))
}
