// store_lock.go: the right to change one directory, among goroutines and among
// processes.

package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// turns lets one caller at a time go on per name.
type turns struct {
	mu   sync.Mutex // guards held
	held map[string]chan struct{}
}

func (t *turns) take(ctx context.Context, name string) error {
	for {
		t.mu.Lock()
		busy, held := t.held[name]
		if !held {
			if t.held == nil {
				t.held = map[string]chan struct{}{}
			}
			t.held[name] = make(chan struct{})
		}
		t.mu.Unlock()
		if !held {
			return nil
		}
		select {
		case <-busy:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (t *turns) give(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.held[name])
	delete(t.held, name)
}

// folderLock is the right to change one directory: among the goroutines of
// this process by turn, among processes by flock on the directory.
type folderLock struct {
	d    *diskStore
	path string
	f    *os.File
}

// lockFolder waits for the right to change a directory. Without create it is
// fs.ErrNotExist when there is none.
func (d *diskStore) lockFolder(ctx context.Context, path string, create bool) (*folderLock, error) {
	if err := d.turns.take(ctx, path); err != nil {
		return nil, err
	}
	for {
		f, err := openAndLock(ctx, path, create)
		if err != nil {
			d.turns.give(path)
			return nil, err
		}
		// Another process may have removed the directory before we had its lock.
		if isLinked(f) {
			return &folderLock{d, path, f}, nil
		}
		f.Close()
	}
}

func openAndLock(ctx context.Context, path string, create bool) (*os.File, error) {
	if create {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return nil, err
		}
	}
	f, err := os.Open(path)
	if create && errors.Is(err, fs.ErrNotExist) {
		return openAndLock(ctx, path, create) // removed in between
	}
	if err != nil {
		return nil, err
	}
	if err := waitForFlock(ctx, f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// waitForFlock polls, so that waiting takes no thread and ends with ctx; only
// another process can be in the way, and not for long. Where a file system has
// no flock (some network ones), turns alone must do.
func waitForFlock(ctx context.Context, f *os.File) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		if free, err := tryFlock(f); free || err != nil {
			return nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tryFlock takes the lock on f if nobody has it. It is held until f is closed.
// An error means that locks do not work here.
func tryFlock(f *os.File) (bool, error) {
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, syscall.EWOULDBLOCK):
			return false, nil
		case !errors.Is(err, syscall.EINTR):
			return false, err
		}
	}
}

func (l *folderLock) unlock() {
	l.f.Close() // which ends the flock
	l.d.turns.give(l.path)
}

// removeEmpty removes the directory if nothing is in it. Who waits for its
// lock looks again (lock).
func (l *folderLock) removeEmpty() {
	if os.Remove(l.path) == nil {
		l.d.syncDir(filepath.Dir(l.path))
	}
}
