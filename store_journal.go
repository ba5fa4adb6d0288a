// store_journal.go: changes of the index that the database has not taken yet,
// in DATA_DIR, and how they get there later.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

const (
	journalFile = ".journal"
	// maxJournal bounds the disk that an outage takes: about 200,000 rows.
	// Beyond it rows are missing until reindex.
	maxJournal = 64 << 20
	// maxJournalUses is where uses, which are statistics, leave the rest to
	// rows.
	maxJournalUses = maxJournal / 4
	// replayLines is how many changes a transaction writes: enough to be fast,
	// few enough to end within its time on a slow database.
	replayLines = 100
)

var (
	errJournalFull    = errors.New("journal is full: run reindex when the database is back")
	errJournalChanged = errors.New("another process has written the journal")
)

// change is a line of the journal: one of the three.
type change struct {
	Save   *indexRow `json:"save,omitempty"`
	Delete string    `json:"delete,omitempty"` // a key
	Uses   []use     `json:"uses,omitempty"`
	At     time.Time `json:"at"` // when it was made
}

// use is a touch as the journal has it; the key names its remote.
type use struct {
	Key  string    `json:"k"`
	Hits int64     `json:"n"`
	Last time.Time `json:"t"`
}

// journalHead is the first line. How far the lines behind it have been written
// is noted in the database under its name.
type journalHead struct {
	Journal string `json:"journal"`
}

// journal keeps changes in order, a line of JSON each. It is emptied and never
// removed, and each use of it holds the file's lock, so that an old and a new
// process may share it. It is not fsynced: a power failure costs rows that
// reindex finds again.
type journal struct {
	name string

	mu   sync.Mutex // guards file, and its lock among goroutines; held for one write
	file *os.File   // nil: not opened yet
}

func newJournal(dir string) *journal { return &journal{name: filepath.Join(dir, journalFile)} }

// locked runs f with the file and its size. fs.ErrNotExist if there is none
// and it is not to be made.
func (j *journal) locked(create bool, f func(file *os.File, size int64) error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.open(create); err != nil {
		return err
	}
	for {
		if err := syscall.Flock(int(j.file.Fd()), syscall.LOCK_EX); err == nil {
			break
		} else if !errors.Is(err, syscall.EINTR) {
			return fmt.Errorf("locking the journal: %w", err)
		}
	}
	defer syscall.Flock(int(j.file.Fd()), syscall.LOCK_UN)
	info, err := j.file.Stat()
	if err != nil {
		return err
	}
	return f(j.file, info.Size())
}

func (j *journal) open(create bool) (err error) {
	if j.file != nil {
		return nil
	}
	flags := os.O_RDWR | os.O_APPEND
	if create {
		flags |= os.O_CREATE
		if err := os.MkdirAll(filepath.Dir(j.name), 0o755); err != nil {
			return err
		}
	}
	j.file, err = os.OpenFile(j.name, flags, 0o600)
	return err
}

// pending tells whether changes wait. A journal that cannot be read has none:
// what cannot be written there either is better written to the database.
func (j *journal) pending() (waits bool) {
	_ = j.locked(false, func(_ *os.File, size int64) error {
		waits = size > 0
		return nil
	})
	return waits
}

// append adds a change. Its error is errStoreDown: there is nowhere else.
func (j *journal) append(c change) error {
	line, err := json.Marshal(c)
	if err == nil {
		err = j.locked(true, func(file *os.File, size int64) error {
			if len(c.Uses) > 0 && size > maxJournalUses {
				return nil
			}
			return appendLine(file, size, line)
		})
	}
	if err != nil {
		return fmt.Errorf("%w: database, and journalling for it: %v", errStoreDown, err)
	}
	return nil
}

// appendLine adds a line, or leaves the file as it was.
func appendLine(file *os.File, size int64, line []byte) error {
	if size+int64(len(line)) > maxJournal {
		return errJournalFull
	}
	var head []byte
	last := make([]byte, 1)
	if size == 0 {
		head, _ = json.Marshal(journalHead{rand.Text()})
		head = append(head, '\n')
	} else if _, err := file.ReadAt(last, size-1); err != nil {
		return err
	} else if last[0] != '\n' {
		head = []byte("\n") // a crash cut the last line
	}
	_, err := file.Write(append(append(head, line...), '\n'))
	if err != nil {
		err = errors.Join(err, file.Truncate(size))
	}
	return err
}

// head names the journal; "" when it is empty.
func (j *journal) head() (id string, err error) {
	err = j.locked(false, func(file *os.File, size int64) error {
		id, _, err = readHead(file, size)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return id, err
}

// readHead also tells where the first change begins. A head that is damaged
// has a name all the same, of what is there.
func readHead(file *os.File, size int64) (id string, begin int64, err error) {
	if size == 0 {
		return "", 0, nil
	}
	line, err := bufio.NewReader(io.NewSectionReader(file, 0, min(size, 4096))).ReadBytes('\n')
	if err != nil && err != io.EOF {
		return "", 0, err
	}
	var h journalHead
	if json.Unmarshal(line, &h) != nil || h.Journal == "" {
		return fmt.Sprintf("damaged %x", line[:min(len(line), 32)]), int64(len(line)), nil
	}
	return h.Journal, int64(len(line)), nil
}

// read returns up to n changes of journal id from off on (0: the first), and
// where the next begins. Lines that are damaged are left out.
func (j *journal) read(id string, off int64, n int) (changes []change, next int64, err error) {
	err = j.locked(false, func(file *os.File, size int64) error {
		name, begin, err := readHead(file, size)
		if err != nil {
			return err
		}
		if name != id {
			return errJournalChanged
		}
		next = max(off, begin)
		lines := bufio.NewReader(io.NewSectionReader(file, next, max(0, size-next)))
		for range n {
			line, err := lines.ReadBytes('\n')
			if err != nil && err != io.EOF {
				return err
			}
			if len(line) == 0 {
				break
			}
			next += int64(len(line))
			var c change
			if json.Unmarshal(bytes.TrimSpace(line), &c) == nil {
				changes = append(changes, c)
			}
		}
		return nil
	})
	return changes, next, err
}

// finish empties journal id if nothing is behind off.
func (j *journal) finish(id string, off int64) (empty bool, err error) {
	err = j.locked(false, func(file *os.File, size int64) error {
		name, _, err := readHead(file, size)
		if err != nil || name != id || size > off {
			return err
		}
		empty = true
		return file.Truncate(0)
	})
	return empty, err
}

func (j *journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.file == nil {
		return nil
	}
	defer func() { j.file = nil }()
	return j.file.Close()
}

// replay is the step of the loop in the background: it asks a database that is
// down whether it is back, and then writes what was journalled. It costs
// nothing when there is neither.
func (x *sqlIndex) replay(ctx context.Context) error {
	x.replaying.Lock()
	defer x.replaying.Unlock()
	if x.downError() != nil {
		if err := x.ping(ctx); err != nil {
			return err
		}
	}
	for written := 0; ; {
		n, more, err := x.replaySome(ctx)
		if written += n; err != nil {
			return err
		}
		if !more {
			if written > 0 {
				x.log.Info("journalled rows are in the database", "changes", written)
			}
			return nil
		}
	}
}

// replaySome writes a transaction's worth. The database's own note of how far
// it came is part of the transaction, so that a crash or a lost answer neither
// loses nor repeats anything.
func (x *sqlIndex) replaySome(ctx context.Context) (n int, more bool, err error) {
	id, err := x.journal.head()
	if err != nil || id == "" {
		return 0, false, storeError("reading the journal", err)
	}
	n, next, err := x.replayLines(ctx, id, replayLines, true)
	if err != nil && !errors.Is(err, errStoreDown) { // one of them is refused: which?
		n, next, err = x.replayLines(ctx, id, 1, true)
	}
	if err != nil && !errors.Is(err, errStoreDown) {
		x.log.Error("a journalled row is given up: the database does not take it", "error", err)
		n, next, err = x.replayLines(ctx, id, 1, false)
	}
	if err != nil {
		return 0, false, err
	}
	empty, err := x.journal.finish(id, next)
	if err != nil || !empty {
		return n, err == nil, storeError("emptying the journal", err)
	}
	return n, false, x.withConn(ctx, sqlReadTimeout, func(ctx context.Context, conn *sql.Conn) error {
		_, err := conn.ExecContext(ctx, sqlJournalEnded, id)
		return err
	})
}

// replayLines writes n lines, or passes over them.
func (x *sqlIndex) replayLines(ctx context.Context, id string, n int, write bool) (written int, next int64, err error) {
	var unread error // which is not the database's fault
	err = x.withConn(ctx, sqlReadTimeout, func(ctx context.Context, conn *sql.Conn) error {
		return inTransaction(ctx, conn, func(tx *sql.Tx) error {
			var done int64
			if err := tx.QueryRowContext(ctx, sqlJournal, id).Scan(&done); err != nil { // holds the row
				return err
			}
			changes, end, err := x.journal.read(id, done, n)
			if unread = err; err != nil {
				return nil
			}
			for i := 0; write && i < len(changes); i++ {
				if err := changes[i].apply(ctx, tx, true); err != nil {
					return err
				}
			}
			written, next = len(changes), end
			_, err = tx.ExecContext(ctx, sqlJournalDone, id, end)
			return err
		})
	})
	if err == nil && unread != nil {
		err = storeError("reading the journal", unread)
	}
	return written, next, err
}

// restoreRows saves rows that were found to be stored, unless newer ones are
// there. Nothing is journalled: whoever asks wants to know.
func (x *sqlIndex) restoreRows(ctx context.Context, rows []indexRow) error {
	return x.late(ctx, func(ctx context.Context, tx *sql.Tx) error {
		for i := range rows {
			if err := (&change{Save: &rows[i]}).apply(ctx, tx, true); err != nil {
				return err
			}
		}
		return nil
	})
}

// dropRow deletes r, unless there is a newer row in its place.
func (x *sqlIndex) dropRow(ctx context.Context, r indexRow) error {
	return x.late(ctx, func(ctx context.Context, tx *sql.Tx) error {
		return (&change{Delete: r.Key, At: r.Fetched}).apply(ctx, tx, true)
	})
}

func (x *sqlIndex) late(ctx context.Context, f func(context.Context, *sql.Tx) error) error {
	return x.withReadConn(ctx, func(ctx context.Context, conn *sql.Conn) error {
		return inTransaction(ctx, conn, func(tx *sql.Tx) error { return f(ctx, tx) })
	})
}
