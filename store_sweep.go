// store_sweep.go: the upkeep of the disk store. walk lists what is stored, sweep
// removes what crashes left, verify hashes what is stored, lockData owns DATA_DIR,
// freeSpace and ping look at the disk below it.

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// orphanAge is the age from which a file that belongs to nothing is removed. It is
// long because a restore from a backup may write bodies long before their records.
const orphanAge = 24 * time.Hour

// walk implements objects. It leaves out a body that no record describes or has the size
// of. It does not hash: a restored body of the right size is listed, and open decides
// later whether a record describes it. A folder or a record that cannot be read is left
// out too, and logged, or with listsAll ends it.
func (d *diskStore) walk(ctx context.Context, f func(key string, rec *record) error) error {
	leaveOut := func(key string, err error) error {
		if err = ignoreMiss(err); err == nil || d.listsAll {
			return openError(key, err)
		}
		d.log.Warn("stored file is not listed", "key", key, "error", err)
		return nil
	}
	return d.eachFolder(ctx, func(folder string) error {
		var ended error
		err := eachName(d.pathOf(folder), func(name string) error {
			if name[0] == '.' {
				return nil
			}
			key := folder + "/" + name
			var rec *record
			var similar []*record
			fi, err := os.Stat(d.pathOf(key))
			if err == nil {
				rec, similar, err = d.readRecords(key, identityOf(fi))
			}
			if rec == nil && len(similar) > 0 {
				rec = similar[0]
			}
			if ended = leaveOut(key, err); ended == nil && rec != nil {
				ended = f(key, rec)
			}
			return ended
		})
		if ended == nil {
			ended = leaveOut(folder, err)
		}
		return ended
	})
}

// eachFolder calls f with {remote}/{hash} for each directory of files, until f or ctx
// ends it. It skips other names (lost+found, or what was in DATA_DIR before).
func (d *diskStore) eachFolder(ctx context.Context, f func(folder string) error) error {
	return eachName(d.dir, func(name string) error {
		if !namePattern.MatchString(name) {
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

// eachName calls f with each name in a directory. It reads them in parts, since there
// may be millions. A missing directory and a file have no names. f's error ends it and
// is returned.
func eachName(dir string, f func(name string) error) error {
	h, err := os.Open(dir)
	if err != nil {
		return ignoreMiss(openError(dir, err))
	}
	defer h.Close()
	for err == nil {
		var names []string
		names, err = h.Readdirnames(1000)
		for _, name := range names {
			if err := f(name); err != nil {
				return err
			}
		}
	}
	if err == io.EOF || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return storeError("listing", err)
}

// newSpool makes an empty temporary file in the directory of spools. The caller
// closes it and removes its name, unless put has renamed it. The file is locked while
// it is open, so that no process sweeps it.
func (d *diskStore) newSpool() (f *os.File, err error) {
	dir := d.dir + "/" + spoolDir
	if err = os.MkdirAll(dir, 0o755); err == nil {
		f, err = openFile(dir+"/"+rand.Text(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	}
	if err != nil {
		return nil, storeError("making a temporary file", err)
	}
	tryFlock(f)
	return f, nil
}

// freeSpace returns the space that this process may still fill, and the size of the
// file system.
func (d *diskStore) freeSpace() (diskUsage, error) {
	var st syscall.Statfs_t
	err := syscall.Statfs(d.dir, &st)
	if errors.Is(err, fs.ErrNotExist) { // it will be made there
		err = syscall.Statfs(filepath.Dir(d.dir), &st)
	}
	if err != nil {
		return diskUsage{}, storeError("reading the free space", err)
	}
	return diskUsage{free: room{int64(st.Bavail) * int64(st.Bsize), int64(st.Ffree)}, size: room{int64(st.Blocks) * int64(st.Bsize), int64(st.Files)}}, nil
}

// lockData makes this process the owner of DATA_DIR until Close, and reports whether
// it is. It is not when another process is the owner. It must not be called
// concurrently, or again once it has succeeded.
func (d *diskStore) lockData() (locked bool, err error) {
	err = os.MkdirAll(d.dir, 0o755)
	if err == nil {
		d.owner, err = os.OpenFile(d.dir+"/"+lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	}
	if err == nil {
		locked, err = tryFlock(d.owner)
	}
	if !locked && d.owner != nil {
		d.owner.Close()
		d.owner = nil
	}
	return locked, storeError("locking DATA_DIR", err)
}

// Close unlocks DATA_DIR. It waits for a ping that still runs.
func (d *diskStore) Close() error {
	d.probe.running.Wait()
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
	report := func(key string, err error) {
		d.log.Warn("sweeping found a file that cannot be used", "key", key, "error", err)
	}
	return errors.Join(err, d.eachFolder(ctx, func(folder string) error {
		files, err := os.ReadDir(d.pathOf(folder))
		isTidy := len(files) == 2 && slices.ContainsFunc(files, func(f fs.DirEntry) bool { return f.Name() == recordFile })
		if err == nil && !isTidy && isOld(d.pathOf(folder), d.now()) {
			d.tidyFolder(ctx, folder, report)
		}
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
		if (all && unused) || (isOld(f.Name(), d.now()) && (unused || err != nil)) {
			os.RemoveAll(f.Name()) // an import's is a directory
		}
		return nil
	})
}

// isOld reports whether a file, or the list of names in a directory, was last changed
// more than orphanAge ago.
func isOld(name string, now time.Time) bool {
	fi, err := os.Stat(name)
	return err == nil && now.Sub(fi.ModTime()) > orphanAge
}

// verify implements verifiableObjects: it tidies each directory and hashes the body that
// its record describes.
func (d *diskStore) verify(ctx context.Context, report func(key string, err error)) (checked int, err error) {
	err = d.eachFolder(ctx, func(folder string) error {
		e, found := d.tidyFolder(ctx, folder, report)
		checked += found
		if e != nil && !e.isHashed {
			if err := d.verifyBody(ctx, e); err != nil && ctx.Err() == nil {
				report(e.key, err)
			}
		}
		return ctx.Err()
	})
	return checked, err
}

// ping returns nil if a file can be made in DATA_DIR. It ends with ctx even if the
// disk hangs. Calls that overlap share one check, since each occupies a thread until
// such a disk answers.
func (d *diskStore) ping(ctx context.Context) error {
	return d.probe.result(ctx, func() error {
		f, err := d.newSpool()
		if err != nil {
			return err
		}
		return storeError("removing a file", errors.Join(f.Close(), os.Remove(f.Name())))
	})
}

// tidyFolder repairs or drops the body of a directory, removes what a crash left
// there, and removes the directory if it is empty then. Strays beside a body are left
// alone; it calls report for them, and for each file that was dropped or cannot be read.
// It returns the entry of the body that is left, or nil, and how many bodies it has found
// good or dropped. It holds the directory's lock, so no put is between two of its steps.
func (d *diskStore) tidyFolder(ctx context.Context, folder string, report func(key string, err error)) (left *memoryEntry, checked int) {
	unlock, err := d.lockFolder(ctx, d.pathOf(folder), false)
	if err == nil {
		defer unlock()
	}
	files, readErr := os.ReadDir(d.pathOf(folder))
	if err = errors.Join(err, readErr); err != nil {
		gone := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
		if !gone && ctx.Err() == nil {
			report(folder, storeError("listing", err))
		}
		return nil, 0
	}
	isEmpty, aside := true, ""
	for _, file := range files {
		name := file.Name()
		key := folder + "/" + name
		switch {
		case strings.HasPrefix(name, asideMark):
			aside = folder + "/" + asideMark + "*" // its record, too
		case name == recordFile || name == recordNext:
		case name == bodyNext || name == recordFile+tempSuffix:
			os.Remove(d.pathOf(key))
		case name[0] == '.':
			report(key, errStray)
		default:
			f, e, err := d.openRepaired(ctx, key)
			isDropped := errors.Is(err, errDropped)
			isEmpty = isEmpty && isDropped
			if e != nil || isDropped {
				checked++
			}
			if e == nil {
				report(key, err)
				continue
			}
			f.Close()
			left = e
		}
	}
	if !isEmpty {
		return left, checked
	}
	if aside != "" {
		report(aside, errAside)
	}
	// A crash during the first put of a key leaves a .record.next. Nothing that was
	// stored is lost with it, so it is not reported.
	os.Remove(d.pathOf(folder) + "/" + recordNext)
	switch err := os.Remove(d.pathOf(folder) + "/" + recordFile); {
	case err == nil:
		report(folder, fmt.Errorf("%w: a record without a body", errDropped))
	case !errors.Is(err, fs.ErrNotExist):
		report(folder, storeError("removing a record", err))
	}
	os.Remove(d.pathOf(folder)) // if it is empty
	return nil, checked
}

// verifyBody hashes e's body and drops it if the record says otherwise. It takes the
// directory's lock only to drop: a put must not wait for the hash of a large body. A
// body that was replaced meanwhile is not the one that was hashed.
func (d *diskStore) verifyBody(ctx context.Context, e *memoryEntry) error {
	f, err := os.Open(d.pathOf(e.key))
	if err != nil {
		return ignoreMiss(openError(e.key, err)) // it may have been removed meanwhile
	}
	defer f.Close()
	sum, err := hashBody(ctx, f)
	if err != nil || sum == e.rec.SHA256 {
		return storeError("reading", err)
	}
	unlock, err := d.lockFolder(ctx, d.folderOf(e.key), false)
	if err != nil {
		return ignoreMiss(openError(e.key, err)) // it may have been removed meanwhile
	}
	defer unlock()
	if fi, err := os.Stat(d.pathOf(e.key)); err != nil || identityOf(fi) != e.id {
		return nil
	}
	defer os.Remove(d.folderOf(e.key)) // if it is empty
	return d.dropDamaged(e.key, "the body has sha256 "+sum+", but its record says "+e.rec.SHA256)
}
