// store_fresh.go: when copies were last found good, without Redis: a map, and
// a log in DATA_DIR so that it survives a restart.

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"sync"
	"time"
)

const (
	freshFile  = ".freshness"
	freshMagic = "artifactapi freshness 1"
	// maxMarks bounds the memory (about 250 bytes each). Beyond it any mark
	// may go, which costs a revalidation.
	maxMarks = 1 << 20
	// deadMarks is how many frames of the log may be outdated, beside as many
	// as are in use, before it is written anew.
	deadMarks = 1000
	// freshRetry is how long a log that failed is left alone.
	freshRetry = time.Minute
)

var _ freshness = (*localFreshness)(nil)

// localFreshness implements freshness. Writes to the log are not fsynced: they
// survive the end of the process, and a power failure costs revalidations.
type localFreshness struct {
	*fileWriter
	dir string
	now func() time.Time
	log *slog.Logger

	mu    sync.RWMutex // guards marks; never held across I/O
	marks map[string]freshnessMark

	logging sync.Mutex // guards the rest; a slow disk keeps only writers waiting
	file    *os.File   // nil: to be written anew before the next frame
	frames  int        // in file
	failed  time.Time  // zero: the log works
}

// newLocalFreshness reads the log that is there, if any.
func newLocalFreshness(dir string, now func() time.Time, log *slog.Logger) *localFreshness {
	l := &localFreshness{fileWriter: newDisk(), dir: dir, now: now, log: log, marks: map[string]freshnessMark{}}
	l.load()
	return l
}

func (l *localFreshness) path() string { return l.dir + "/" + freshFile }

// load reads the log. A damaged one is used up to the damage, and written anew
// with the next mark, since nothing behind the damage would be found.
func (l *localFreshness) load() {
	f, err := os.OpenFile(l.path(), os.O_RDWR|os.O_APPEND, 0)
	if err == nil {
		err = readFrames(f, freshMagic, l.restore)
	}
	switch {
	case err == nil:
		l.file = f
		return
	case errors.Is(err, errDamaged):
		l.log.Info("freshness log is not read to its end", "err", err)
	case !errors.Is(err, fs.ErrNotExist):
		l.fail(err)
	}
	if f != nil {
		f.Close()
	}
}

func (l *localFreshness) restore(payload []byte) error {
	p := fieldReader{b: payload}
	set, key := p.readInt(), p.readString()
	m := freshnessMark{GoodAt: time.Unix(0, p.readInt()).UTC(), SHA256: p.readString()}
	if p.bad || len(p.b) > 0 {
		return errDamaged
	}
	l.frames++
	if set == 0 {
		delete(l.marks, key)
	} else {
		l.keep(key, m)
	}
	return nil
}

// keep sets a mark within the bound. mu is held, or nobody else is there yet.
func (l *localFreshness) keep(key string, m freshnessMark) {
	if _, known := l.marks[key]; !known && len(l.marks) >= maxMarks {
		for any := range l.marks {
			delete(l.marks, any)
			break
		}
	}
	l.marks[key] = m
}

// getMark: see freshness.
func (l *localFreshness) getMark(ctx context.Context, key string) (freshnessMark, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	m, ok := l.marks[key]
	if !ok {
		return freshnessMark{}, fmt.Errorf("freshness of %s: %w", key, fs.ErrNotExist)
	}
	return m, nil
}

// setMark: see freshness. A log that fails is no error: memory has the mark.
func (l *localFreshness) setMark(ctx context.Context, key string, m freshnessMark) error {
	m.GoodAt = m.GoodAt.Round(0).UTC() // as it would be read back
	l.mu.Lock()
	l.keep(key, m)
	l.mu.Unlock()
	l.append(markFrame(1, key, m))
	return nil
}

// delete: see freshness. A mark that is not there is no error.
func (l *localFreshness) delete(ctx context.Context, key string) error {
	l.mu.Lock()
	_, known := l.marks[key]
	delete(l.marks, key)
	l.mu.Unlock()
	if known {
		l.append(markFrame(0, key, freshnessMark{GoodAt: time.Unix(0, 0)}))
	}
	return nil
}

func markFrame(set int64, key string, m freshnessMark) []byte {
	p := binary.AppendVarint(nil, set)
	p = binary.AppendVarint(appendString(p, key), m.GoodAt.UnixNano())
	return appendFrame(nil, appendString(p, m.SHA256))
}

// append adds a frame to the log, or writes the log anew where that is due.
func (l *localFreshness) append(frame []byte) {
	l.logging.Lock()
	defer l.logging.Unlock()
	l.mu.RLock()
	live := len(l.marks)
	l.mu.RUnlock()
	var err error
	switch {
	case l.file != nil && l.frames <= 2*live+deadMarks:
		_, err = l.file.Write(frame)
		l.frames++
	case !l.failed.IsZero() && l.now().Sub(l.failed) < freshRetry:
		return
	default:
		err = l.rewrite() // which has the frame's mark already
	}
	if err != nil {
		l.fail(err)
	} else if !l.failed.IsZero() {
		l.failed = time.Time{}
		l.log.Info("freshness is kept on disk again")
	}
}

// fail goes on in memory alone, and says so once. A part of a frame may have
// been written, so that the log has to be written anew.
func (l *localFreshness) fail(err error) {
	if l.failed.IsZero() {
		l.log.Warn("freshness is kept in memory alone", "err", err)
	}
	l.failed = l.now()
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
}

// rewrite makes the log of what memory has, and opens it.
func (l *localFreshness) rewrite() error {
	l.mu.RLock()
	marks := maps.Clone(l.marks)
	l.mu.RUnlock()
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return err
	}
	err := l.replaceFile(l.path(), func(w io.Writer) error {
		b := bufio.NewWriter(w) // keeps its first error until Flush
		b.Write(appendFrame(nil, []byte(freshMagic)))
		for key, m := range marks {
			b.Write(markFrame(1, key, m))
		}
		return b.Flush()
	})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(l.path(), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.frames = f, len(marks)
	return nil
}

// Close ends the log.
func (l *localFreshness) Close() error {
	l.logging.Lock()
	defer l.logging.Unlock()
	if l.file == nil {
		return nil
	}
	defer func() { l.file = nil }()
	return l.file.Close()
}
