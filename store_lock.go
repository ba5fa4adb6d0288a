// store_lock.go: locks on directories, between goroutines and between processes.

package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"syscall"
	"time"
)

// lockFolder locks a directory: diskStore.folders keeps out the other goroutines of this
// process, flock(2) on the directory keeps out other processes. It waits for the goroutine
// or process that has the lock, at most until ctx ends. With create it makes the
// directory; without, a missing directory is fs.ErrNotExist. The caller calls unlock once.
// It may remove the directory before: who waits for the lock sees that. Directories are
// locked one at a time, so there is no order among them.
func (d *diskStore) lockFolder(ctx context.Context, path string, create bool) (unlock func(), err error) {
	if err := d.folders.lock(ctx, path); err != nil {
		return nil, err
	}
	for {
		f, err := openAndLock(ctx, path, create)
		if err != nil {
			d.folders.unlock(path)
			return nil, err
		}
		// Another process may have removed the directory while we waited. Then the
		// lock is on a directory without a name, and a new one must be locked.
		if isLinked(f) {
			return func() {
				f.Close() // ends the flock
				d.folders.unlock(path)
			}, nil
		}
		f.Close()
	}
}

// openAndLock opens a directory, made first with create, and takes its flock. It polls,
// because a blocking flock(2) occupies a thread and does not end with ctx. Only another
// process can have the lock, and not for long. On a file system without flock (some
// network ones) it takes none: diskStore.folders still keeps the goroutines of this
// process apart.
func openAndLock(ctx context.Context, path string, create bool) (*os.File, error) {
	if create {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return nil, err
		}
	}
	f, err := openFile(path, os.O_RDONLY, 0)
	if create && errors.Is(err, fs.ErrNotExist) {
		return openAndLock(ctx, path, create) // another process removed it after MkdirAll
	}
	for pause := time.Millisecond; err == nil; pause = min(2*pause, 100*time.Millisecond) {
		if locked, flockErr := tryFlock(f); locked || flockErr != nil {
			return f, nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			f.Close()
			err = ctx.Err()
		}
	}
	return nil, err
}

// tryFlock takes the flock on f if nobody has it, and reports whether it did. The
// lock is held until f is closed. An error says that the file system has no locks.
func tryFlock(f *os.File) (locked bool, err error) {
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}
