// store_sweep.go: the disk store's upkeep: what is there (walk), what does not
// belong there (sweep), whether it is as it was (verify), and whether there is
// room and a working disk below it.

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
	"sync"
	"syscall"
)

// walk: see objects. A record whose body is gone or has another size is left
// out; one that only open could tell to be good (a restored backup) is told.
func (d *diskStore) walk(ctx context.Context, f func(key string, rec *record) error) error {
	return d.eachFolder(ctx, func(folder string) error {
		key, rec := d.describeFolder(folder)
		if rec == nil {
			return nil
		}
		return f(key, rec)
	})
}

// describeFolder is what the records of a directory say is there.
func (d *diskStore) describeFolder(folder string) (key string, rec *record) {
	for _, name := range []string{recordFile, recordNext} {
		e, of, err := readRecord(d.pathOf(folder) + "/" + name)
		if err != nil || filepath.Dir(of) != folder {
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				d.log.Warn("stored record is of no use", "folder", folder, "file", name, "reason", err)
			}
			continue
		}
		fi, err := os.Stat(d.pathOf(of))
		if err != nil || fi.Size() != e.Size {
			continue
		}
		if rec == nil || identityOf(fi) == e.bodyIdentity() {
			key, rec = of, &e.record
		}
		if identityOf(fi) == e.bodyIdentity() {
			break
		}
	}
	return key, rec
}

// eachFolder calls f with {remote}/{hash} of all directories that hold files.
// Other names are not ours (lost+found, or a DATA_DIR that was somebody's home).
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

// eachName calls f with the names in a directory, without those that begin
// with a dot, some at a time: there may be millions. What is not there or is no
// directory has none.
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

// newSpool makes a temporary file for a body that is being fetched. The caller
// closes and removes it; put takes its name. It is locked while it is open, so
// that sweep knows what is in use, whosever it is.
func (d *diskStore) newSpool() (*os.File, error) {
	dir := d.dir + "/" + spoolDir
	for made := false; ; {
		f, err := os.CreateTemp(dir, "*")
		if errors.Is(err, fs.ErrNotExist) && !made {
			made = true
			if err = os.MkdirAll(dir, 0o755); err == nil {
				continue
			}
		}
		if err != nil {
			return nil, storeError("making a spool", err)
		}
		tryFlock(f)
		if isLinked(f) { // not swept before it was locked
			return f, nil
		}
		f.Close()
	}
}

// freeSpace is the space that is left to us, and the size of the file system.
func (d *diskStore) freeSpace() (free, size uint64, err error) {
	var st syscall.Statfs_t
	dir := filepath.Clean(d.dir)
	err = syscall.Statfs(dir, &st)
	for errors.Is(err, fs.ErrNotExist) && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir) // it will be made here
		err = syscall.Statfs(dir, &st)
	}
	if err != nil {
		return 0, 0, storeError("asking for free space", err)
	}
	return uint64(st.Bavail) * uint64(st.Bsize), uint64(st.Blocks) * uint64(st.Bsize), nil
}

// lockData makes this process the owner of DATA_DIR, until close. held is
// false when another one is.
func (d *diskStore) lockData() (held bool, err error) {
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
	held, err = tryFlock(f)
	if !held {
		f.Close()
		return false, storeError("locking DATA_DIR", err)
	}
	d.owner = f
	return true, nil
}

// Close gives DATA_DIR up. It waits for a ping that runs.
func (d *diskStore) Close() error {
	d.probe.wg.Wait()
	if d.owner == nil {
		return nil
	}
	return d.owner.Close()
}

// sweep removes what crashes left and is older than a day: spools that nobody
// has open, and in the directories of files, once a day since it reads all of
// them, what does not belong there. It is called at start and hourly, by one
// goroutine.
func (d *diskStore) sweep(ctx context.Context) error {
	err := d.sweepSpools(false)
	if d.now().Sub(d.swept) < orphanAge {
		return err
	}
	d.swept = d.now()
	return errors.Join(err, d.eachFolder(ctx, func(folder string) error {
		_, odd, err := d.listFolder(folder)
		if err != nil || !odd || !d.isOld(d.pathOf(folder)) {
			return nil
		}
		d.tidyFolder(ctx, folder, func(key string, err error) {
			d.log.Warn("sweeping", "key", key, "err", err)
		})
		return nil
	}))
}

// sweepSpools removes spools that nobody has open: those older than a day, or
// all where we own DATA_DIR and are starting.
func (d *diskStore) sweepSpools(all bool) error {
	dir := d.dir + "/" + spoolDir
	return eachName(dir, func(name string) error {
		f, err := os.Open(dir + "/" + name)
		if err != nil {
			return nil // gone
		}
		defer f.Close()
		// Where locks do not work, age alone must do.
		free, err := tryFlock(f)
		if d.isOld(f.Name()) && (free || err != nil) || all && free {
			os.Remove(f.Name())
		}
		return nil
	})
}

// isOld reports whether nothing was done to a file, or to the names in a
// directory, for orphanAge.
func (d *diskStore) isOld(name string) bool {
	fi, err := os.Stat(name)
	return err == nil && d.now().Sub(fi.ModTime()) > orphanAge
}

// listFolder tells the bodies in a directory, and whether anything else is there
// than one body and its .record.
func (d *diskStore) listFolder(folder string) (bodies []string, odd bool, err error) {
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
	odd = len(bodies) != 1 || len(names) != 2 || !slices.Contains(names, recordFile)
	return bodies, odd, err
}

// tidyFolder leaves a directory with bodies that have their record, or removes it.
// Under its lock whatever no record describes is an orphan.
func (d *diskStore) tidyFolder(ctx context.Context, folder string, report func(key string, err error)) {
	l, err := d.lockFolder(ctx, d.pathOf(folder), false)
	if err != nil {
		return // removed meanwhile
	}
	defer l.unlock()
	bodies, _, err := d.listFolder(folder)
	if err != nil {
		report(folder, storeError("listing", err))
		return
	}
	left := len(bodies)
	for _, name := range bodies {
		f, _, err := d.repairLocked(ctx, folder+"/"+name)
		switch {
		case err == nil:
			f.Close()
		case errors.Is(err, errDropped):
			left--
			fallthrough
		default:
			report(folder+"/"+name, err)
		}
	}
	for _, name := range []string{bodyNext, recordFile + tempSuffix} {
		removeIfExists(d.pathOf(folder) + "/" + name)
	}
	if left == 0 {
		d.tidyRecords(folder, report)
		l.removeEmpty()
	}
}

// tidyRecords removes the records of a directory without bodies. A .record.next
// is what a crash leaves of a first commit: nothing was stored, nothing is lost.
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

// verify hashes all that is stored and drops what its record does not
// describe, beside a running server. report is told of each file that was
// dropped or could not be read; dropped counts the former.
func (d *diskStore) verify(ctx context.Context, report func(key string, err error)) (checked, dropped int, err error) {
	tell := func(key string, err error) {
		if errors.Is(err, errDropped) {
			dropped++
		}
		report(key, err)
	}
	err = d.eachFolder(ctx, func(folder string) error {
		bodies, odd, err := d.listFolder(folder)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			return nil
		} else if err != nil {
			tell(folder, storeError("listing", err))
			return nil
		}
		for _, name := range bodies {
			checked++
			err := d.verifyBody(ctx, folder+"/"+name)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				tell(folder+"/"+name, err)
				odd = true
			}
		}
		if odd {
			d.tidyFolder(ctx, folder, tell)
		}
		return nil
	})
	return checked, dropped, err
}

// verifyBody hashes one body. The lock is taken only to drop: the hash of a
// large one would keep a commit waiting.
func (d *diskStore) verifyBody(ctx context.Context, key string) error {
	f, id, err := openBody(d.pathOf(key))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // deleted meanwhile
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
	return d.dropIfUnchanged(ctx, key, id, "the body has sha256 "+sum+", its record "+rec.SHA256)
}

// repairNow is settle for who has no lock. A key that is deleted meanwhile is
// no error.
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

// dropIfUnchanged drops key unless it was replaced since it had id.
func (d *diskStore) dropIfUnchanged(ctx context.Context, key string, id fileIdentity, reason string) error {
	l, err := d.lockFolder(ctx, d.folderOf(key), false)
	if err != nil {
		return nil // removed meanwhile
	}
	defer l.unlock()
	if fi, err := os.Stat(d.pathOf(key)); err != nil || identityOf(fi) != id {
		return nil
	}
	return d.dropDamaged(key, reason)
}

// diskProbe is at most one check of the directory at a time: on a disk that hangs
// it would else leave a thread per question.
type diskProbe struct {
	wg   sync.WaitGroup
	mu   sync.Mutex // guards the rest
	done chan struct{}
	err  error
}

// ping reports whether files can be made in DATA_DIR. It ends with ctx though
// the disk may hang.
func (d *diskStore) ping(ctx context.Context) error {
	p := &d.probe
	p.mu.Lock()
	if p.done == nil {
		p.done = make(chan struct{})
		done := p.done
		p.wg.Go(func() { d.probeWrite(done) })
	}
	done := p.done
	p.mu.Unlock()
	select {
	case <-done:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errStoreDown, ctx.Err())
	}
}

func (d *diskStore) probeWrite(done chan struct{}) {
	f, err := d.newSpool()
	if err == nil {
		err = storeError("removing a file", errors.Join(f.Close(), os.Remove(f.Name())))
	}
	d.probe.mu.Lock()
	defer d.probe.mu.Unlock()
	d.probe.err, d.probe.done = err, nil
	close(done)
}
