package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// fakePG is a database for sqlIndex on a bare machine: it knows the statements
// by their text and does what they do. Transactions are undone as a whole, so
// tests use one at a time.
type fakePG struct {
	mu      sync.Mutex
	rows    map[string]indexRow
	version int
	emptied bool // the tables are there without rows
	calls   int
	standby bool
	refuse  func(query string, args []driver.Value) error // asked before each statement
	dropped func(query string) bool                       // the answer is lost, the work is done
}

func newFakePG() *fakePG { return &fakePG{rows: map[string]indexRow{}, version: -1} }

// set changes what happens, under the lock.
func (f *fakePG) set(refuse func(string, []driver.Value) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refuse = refuse
}

func (f *fakePG) down() {
	f.set(func(string, []driver.Value) error { return syscall.ECONNREFUSED })
}

func (f *fakePG) counted() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

func (f *fakePG) row(key string) (indexRow, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.rows[key]
	return r, ok
}

func (f *fakePG) Driver() driver.Driver { return nil }
func (f *fakePG) Connect(context.Context) (driver.Conn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.refuse != nil {
		if err := f.refuse("connect", nil); err != nil {
			return nil, err
		}
	}
	return &fakeConn{fakePG: f}, nil
}

// errAnswerLost is a statement that did its work and did not say so.
var errAnswerLost = errors.New("the answer is lost")

type fakeConn struct {
	*fakePG
	undo func()
}

func (c *fakeConn) Prepare(string) (driver.Stmt, error) { return nil, errors.New("no statements here") }
func (c *fakeConn) Close() error                        { return nil }
func (c *fakeConn) Begin() (driver.Tx, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	rows, version := maps.Clone(c.rows), c.version
	c.undo = func() { c.rows, c.version = rows, version }
	return c, nil
}
func (c *fakeConn) Commit() error {
	_, err := c.ask("commit", nil)
	if err != nil && err != errAnswerLost {
		c.Rollback()
	}
	return err
}
func (c *fakeConn) Rollback() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.undo()
	return nil
}

func (c *fakeConn) ExecContext(_ context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	_, err := c.ask(query, args)
	return driver.RowsAffected(1), err
}

func (c *fakeConn) QueryContext(_ context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	rows, err := c.ask(query, args)
	if err != nil {
		return nil, err
	}
	return &fakeRows{rows}, nil
}

type fakeRows struct{ rows [][]driver.Value }

func (r *fakeRows) Columns() []string {
	if len(r.rows) == 0 {
		return nil
	}
	return make([]string, len(r.rows[0]))
}
func (r *fakeRows) Close() error { return nil }
func (r *fakeRows) Next(dest []driver.Value) error {
	if len(r.rows) == 0 {
		return io.EOF
	}
	copy(dest, r.rows[0])
	r.rows = r.rows[1:]
	return nil
}

// ask answers one statement.
func (c *fakeConn) ask(query string, named []driver.NamedValue) (rows [][]driver.Value, err error) {
	args := make([]driver.Value, len(named))
	for i, v := range named {
		args[i] = v.Value
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	if c.refuse != nil {
		if err := c.refuse(query, args); err != nil {
			return nil, err
		}
	}
	switch query {
	case sqlSave:
		c.save(args)
	case sqlDelete:
		if r, ok := c.rows[args[0].(string)]; ok && !(args[1].(bool) && r.Fetched.After(args[2].(time.Time))) {
			delete(c.rows, r.Key)
		}
	case sqlTouch:
		rows, err = c.touch(args)
	case sqlTotals, sqlUnusedTotals:
		rows = c.totals(query == sqlUnusedTotals)
	case sqlByKey:
		for _, key := range slices.Sorted(maps.Keys(c.rows)) {
			if key > args[0].(string) && len(rows) < int(args[1].(int64)) {
				rows = append(rows, c.rows[key].values())
			}
		}
	case sqlByPath, sqlUnusedByAge, sqlAllByAge:
		rows = c.page(query, args)
	default:
		rows, err = c.keep(query)
	}
	if c.dropped != nil && c.dropped(query) {
		return nil, errAnswerLost
	}
	return rows, err
}

// keep answers what is about the schema.
func (f *fakePG) keep(query string) ([][]driver.Value, error) {
	switch query {
	case sqlHasSchema:
		return [][]driver.Value{{f.version >= 0}}, nil
	case sqlSchema:
		f.version, f.emptied = 1, false
	case sqlVersion:
		if f.emptied {
			return nil, nil
		}
		return [][]driver.Value{{int64(f.version)}}, nil
	case sqlPing:
		return [][]driver.Value{{f.standby}}, nil
	case sqlLock, sqlRecount, "commit":
	default:
		return nil, fmt.Errorf("the fake does not know %s", query)
	}
	return nil, nil
}

func (f *fakePG) save(a []driver.Value) {
	r := indexRow{
		Key: a[0].(string), Remote: a[1].(string), Path: a[3].(string), SHA256: a[4].(string), ContentType: a[5].(string),
		Class: class(a[6].(string)), Size: a[7].(int64), Hits: a[8].(int64),
		Fetched: roundAsPG(a[9].(time.Time)), LastAccess: roundAsPG(a[10].(time.Time)),
	}
	if old, ok := f.rows[r.Key]; ok {
		if a[11].(bool) && old.Fetched.After(r.Fetched) {
			return
		}
		r.Hits = old.Hits
		if old.LastAccess.After(r.LastAccess) {
			r.LastAccess = old.LastAccess
		}
	}
	f.rows[r.Key] = r
}

// roundAsPG rounds to microseconds, and the half of one to an even number.
func roundAsPG(t time.Time) time.Time {
	return time.UnixMicro(int64(math.RoundToEven(float64(t.UnixNano()) / 1000))).UTC()
}

func (f *fakePG) touch(a []driver.Value) (known [][]driver.Value, err error) {
	var keys, last pq.StringArray
	var hits pq.Int64Array
	if err := errors.Join(keys.Scan(a[0]), hits.Scan(a[1]), last.Scan(a[2])); err != nil {
		return nil, err
	}
	for i, key := range keys {
		r, ok := f.rows[key]
		if !ok {
			continue
		}
		r.Hits += hits[i]
		if at, _ := time.Parse(time.RFC3339Nano, last[i]); at.After(r.LastAccess) {
			r.LastAccess = at
		}
		f.rows[key] = r
		known = append(known, []driver.Value{key})
	}
	return known, nil
}

func (f *fakePG) totals(unused bool) (rows [][]driver.Value) {
	all := map[string]remoteTotal{}
	for _, r := range f.rows {
		if unused && (r.Hits > 0 || r.Class == local) {
			continue
		}
		t := all[r.Remote]
		all[r.Remote] = remoteTotal{t.Files + 1, t.Bytes + r.Size}
	}
	for name, t := range all {
		rows = append(rows, []driver.Value{name, t.Files, t.Bytes})
	}
	return rows
}

func (f *fakePG) page(query string, a []driver.Value) (rows [][]driver.Value) {
	byAge := query != sqlByPath
	order := func(x, y indexRow) int {
		if byAge {
			return cmp.Or(x.LastAccess.Compare(y.LastAccess), strings.Compare(x.Key, y.Key))
		}
		return cmp.Or(strings.Compare(decodePath(x.Path), decodePath(y.Path)), strings.Compare(x.Key, y.Key))
	}
	var found []indexRow
	for _, r := range f.rows {
		path := decodePath(r.Path)
		switch {
		case r.Remote != a[0].(string) && !(byAge && a[0] == ""):
		case byAge && (r.Class == local || (r.Hits > 0 && query == sqlUnusedByAge)):
		case byAge && cmp.Or(r.LastAccess.Compare(a[1].(time.Time)), strings.Compare(r.Key, a[2].(string))) <= 0:
		case !byAge && cmp.Or(strings.Compare(path, a[1].(string)), strings.Compare(r.Key, a[2].(string))) <= 0:
		default:
			found = append(found, r)
		}
	}
	slices.SortFunc(found, order)
	for _, r := range found[:min(len(found), int(a[3].(int64)))] {
		rows = append(rows, r.values())
	}
	return rows
}

// values are the columns of sqlColumns.
func (r indexRow) values() []driver.Value {
	return []driver.Value{r.Key, r.Remote, r.Path, r.SHA256, r.ContentType, string(r.Class), r.Size, r.Hits, r.Fetched, r.LastAccess}
}

// sqlTester is an index over a fake database, with a clock.
type sqlTester struct {
	*testing.T
	*sqlIndex
	db  *fakePG
	at  *atomic.Int64 // seconds after testDay
	out *bytes.Buffer // the log
}

func newSQLTester(t *testing.T) *sqlTester {
	s := &sqlTester{T: t, db: newFakePG(), at: new(atomic.Int64), out: new(bytes.Buffer)}
	s.start()
	return s
}

func (s *sqlTester) start() {
	now := func() time.Time { return testDay.Add(time.Duration(s.at.Load()) * time.Second) }
	s.sqlIndex = newSQLIndex(s.db, "hunter2", now, slog.New(slog.NewTextHandler(s.out, nil)))
	x := s.sqlIndex
	s.Cleanup(func() { x.Close() })
}

// restart is the end of the process and its next start.
func (s *sqlTester) restart() {
	s.Helper()
	s.must(s.sqlIndex.Close())
	s.start()
}

// waiting is the number of changes that wait for the database.
func (x *sqlIndex) waiting() int {
	n, _ := x.pending.state()
	return n
}

func (s *sqlTester) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *sqlTester) save(spelling string) indexRow {
	s.Helper()
	r := testRow("r", spelling)
	s.must(s.sqlIndex.saveRow(s.Context(), r))
	return r
}

// wantRows are the paths in the database.
func (s *sqlTester) wantRows(want ...string) {
	s.Helper()
	var got []string
	s.db.mu.Lock()
	for _, r := range s.db.rows {
		got = append(got, r.Path)
	}
	s.db.mu.Unlock()
	slices.Sort(got)
	if !slices.Equal(got, want) {
		s.Errorf("the database has %q, want %q", got, want)
	}
}

// back brings the database back and lets the background notice.
func (s *sqlTester) back() {
	s.Helper()
	s.db.set(nil)
	s.at.Add(10)
	s.must(s.writePending(s.Context()))
}

func TestSQLIndexOverFake(t *testing.T) {
	t.Parallel()
	testIndex(t, func(t *testing.T) index { return newSQLTester(t).sqlIndex })
}

func TestSQLSurvivesTextThatIsNone(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	for _, p := range []string{"a", "%C3%A9", "z"} {
		s.save(p)
	}
	for q, want := range map[*pageQuery]string{
		{prefix: "\xc3"}:                        "", // no client sends half a character
		{prefix: "\xc3\xa9"}:                    "%C3%A9",
		{prefix: "\xff"}:                        "",
		{prefix: "a\x00"}:                       "",
		{after: "a\xff"}:                        "z %C3%A9",
		{after: "\xc3"}:                         "",
		{after: "a\x00\nkey"}:                   "a z %C3%A9",
		{after: "\xff"}:                         "",
		{after: "nonsense", oldest: true}:       "a z %C3%A9",
		{prefix: string(rune(0x10FFFF))}:        "",
		{pattern: regexp.MustCompile("^[a-z]")}: "a z",
	} {
		q.remote, q.limit = "r", 10
		p, err := s.listPage(t.Context(), *q)
		var got []string
		for _, r := range p.rows {
			got = append(got, r.Path)
		}
		slices.SortFunc(got, func(a, b string) int { return strings.Compare(decodePath(a), decodePath(b)) })
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("page %+v: %q, %v; want %q", *q, got, err, want)
		}
	}
}

func TestSQLScanIsBounded(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	for i := range sqlMaxRows*2 + 10 {
		s.save(fmt.Sprintf("f%05d", i))
	}
	s.db.set(func(query string, args []driver.Value) error {
		if query == sqlByPath && args[3].(int64) > sqlMaxRows {
			t.Errorf("a statement for %d rows", args[3])
		}
		return nil
	})
	before := s.db.counted()
	p, err := s.listPage(t.Context(), pageQuery{remote: "r", limit: 10000, pattern: regexp.MustCompile("7$")})
	if err != nil || len(p.rows) != 201 || s.db.counted()-before != 3 {
		t.Errorf("%d rows with %d statements, %v", len(p.rows), s.db.counted()-before, err)
	}
	before = s.db.counted()
	p, err = s.listPage(t.Context(), pageQuery{remote: "r", limit: 5})
	if err != nil || len(p.rows) != 5 || p.next != "f00004" || s.db.counted()-before != 1 {
		t.Errorf("a page costs %d statements: %+v, %v", s.db.counted()-before, p.next, err)
	}
	before = s.db.counted()
	p, err = s.listPage(t.Context(), pageQuery{remote: "r", prefix: "f0000", pattern: regexp.MustCompile("7$"), limit: 5})
	if err != nil || len(p.rows) != 1 || p.next != "" || s.db.counted()-before != 1 {
		t.Errorf("a page of few files among many costs %d statements: %d rows, %v", s.db.counted()-before, len(p.rows), err)
	}
}

func TestSQLChangesWaitInOrder(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	a := s.save("a")
	s.db.down()
	s.must(s.delete(t.Context(), "r", a.Key))
	b := s.save("b")
	s.save("c")
	s.must(s.delete(t.Context(), "r", b.Key))
	s.save("b")
	s.wantRows("a")
	uses := []fileUse{{"r", b.Key, 3, testDay.Add(time.Hour)}}
	for _, err := range []error{second(s.listPage(t.Context(), pageQuery{remote: "r", limit: 1})), second(s.totals(t.Context(), false)),
		second(s.countUses(t.Context(), uses)), s.ping(t.Context())} {
		if !errors.Is(err, errStoreDown) {
			t.Errorf("while the database is down: %v", err)
		}
	}
	s.back()
	s.wantRows("b", "c")
	s.save("d")
	s.wantRows("b", "c", "d")
	if n := s.waiting(); n != 0 {
		t.Errorf("%d changes still wait", n)
	}
}

func second[T any](_ T, err error) error { return err }

func TestSQLKnownDownAsksNothing(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	s.db.down()
	s.save("a")
	before := s.db.counted()
	s.save("b")
	s.listPage(t.Context(), pageQuery{remote: "r", limit: 1})
	s.countUses(t.Context(), []fileUse{{"r", testKey("a"), 1, testDay}})
	s.ping(t.Context())
	if s.writePending(t.Context()) == nil || s.db.counted() != before {
		t.Errorf("%d calls to a database that is known to be down", s.db.counted()-before)
	}
	for range 5 {
		s.at.Add(1)
		s.ping(t.Context())
		s.writePending(t.Context())
	}
	if n := s.db.counted() - before; n < 2 || n > 4 {
		t.Errorf("%d probes in five seconds, want fewer and fewer", n)
	}
	if strings.Count(s.out.String(), "level=ERROR") != 1 {
		t.Errorf("the outage should be told once:\n%s", s.out)
	}
	s.back()
	s.wantRows("a", "b")
	if !strings.Contains(s.out.String(), `msg="database is up again" after=15s`) {
		t.Errorf("the end of the outage is not told:\n%s", s.out)
	}
}

// Replicas flush their uses each 2 s, and most of the time there are none to add a row for.
func TestSQLIsNotAskedForNoUses(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	r := s.save("a")
	var uses useCounts
	before := s.db.counted()
	s.must(uses.flush(t.Context(), s, &fakeObjects{}))
	if n := s.db.counted() - before; n > 0 {
		t.Errorf("%d calls without a use", n)
	}
	uses.addUses(fileUse{"r", r.Key, 1, testDay})
	s.must(uses.flush(t.Context(), s, &fakeObjects{}))
	if n := s.db.counted() - before; n != 1 {
		t.Errorf("%d calls for the uses of a file with a row, want 1", n)
	}
}

func TestDatabaseThatIsDownIsNamed(t *testing.T) {
	t.Parallel()
	c := childSetup{yaml: "remotes: {here: {type: local}}\n", env: []string{"DBHOST=127.0.0.1", "DBPORT=1", "DBUSER=u", "DBNAME=n"}}.start(t)
	c.wantLog(`"msg":"database is down: files are stored and served, their index rows wait","database":"127.0.0.1:1"`)
}

// A probe that ends without an answer, as at the end of the process, leaves its place
// to the next one.
func TestSQLProbeThatIsCutOff(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	s.db.down()
	s.save("a")
	s.at.Add(10)
	ctx, cancel := context.WithCancel(t.Context())
	s.db.set(func(string, []driver.Value) error { cancel(); return ctx.Err() })
	if err := s.writePending(ctx); !errors.Is(err, errStoreDown) {
		t.Errorf("a probe that was cut off: %v", err)
	}
	s.db.set(nil)
	awaitThat(t, "the next probe", func() bool { return s.writePending(t.Context()) == nil })
	s.wantRows("a")
}

// lib/pq itself heeds no context while it logs in: a check of health would last as long.
func TestSQLLoginEndsWithItsCaller(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	host, port, _ := net.SplitHostPort(l.Addr().String())
	dsn := strings.Replace(sqlSettings{host: host, port: port, user: "u", name: "n", sslmode: "disable"}.dsn(), "connect_timeout=2", "connect_timeout=30", 1)
	x := newSQLIndex(&sqlConnector{dsn}, "", time.Now, slog.New(slog.DiscardHandler))
	defer x.Close()
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	go func() {
		if c, err := l.Accept(); err == nil {
			defer c.Close()
			c.Read(make([]byte, 1)) // it logs in, and gets no answer
			leave()
			io.Copy(io.Discard, c)
		}
	}()
	mustEnd(t, func() {
		if err := x.ping(ctx); !errors.Is(err, errStoreDown) || x.outage.outageCause() != nil {
			t.Errorf("%v; an outage: %v", err, x.outage.outageCause())
		}
	})
}

// The end of a wait closes the connection: the cause of the outage is the wait.
func TestSQLOutageOfAHangingServerNamesItsCause(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close() // it accepts, and nobody answers
	host, port, _ := net.SplitHostPort(l.Addr().String())
	logs := &testLogs{}
	x := newSQLIndex(&sqlConnector{sqlSettings{host: host, port: port, user: "u", name: "n", sslmode: "disable"}.dsn()}, "", time.Now, slog.New(slog.NewJSONHandler(logs, nil)))
	defer x.Close()
	if err := x.withConn(t.Context(), 50*time.Millisecond, execPing); !errors.Is(err, errStoreDown) {
		t.Errorf("a server that hangs: %v", err)
	}
	if lines := logs.lines("database is down"); len(lines) != 1 || !strings.Contains(lines[0], context.DeadlineExceeded.Error()) {
		t.Errorf("the log says %q", lines)
	}
}

func TestSQLChangesQueueBehindThoseThatWait(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	s.db.down()
	r := s.save("a")
	s.db.set(nil)
	s.at.Add(10)
	s.must(second(s.totals(t.Context(), false))) // up, and not written yet
	s.must(s.delete(t.Context(), "r", r.Key))
	if p, err := s.listPage(t.Context(), pageQuery{remote: "r", limit: 1}); err != nil || p.complete {
		t.Errorf("a page says that it is complete while rows wait: %v", err)
	}
	// The row of a use may be among those that wait.
	if _, err := s.countUses(t.Context(), []fileUse{{"r", r.Key, 1, testDay}}); !errors.Is(err, errStoreDown) {
		t.Errorf("uses are counted before the rows that wait are written: %v", err)
	}
	s.back()
	s.wantRows()
	if p, err := s.listPage(t.Context(), pageQuery{remote: "r", limit: 1}); err != nil || !p.complete {
		t.Errorf("a page says that it is not complete: %v", err)
	}
}

// The replica that removed a file deletes its row, in a database that is back before the
// row which waited here is written. What it announced may not have been heard.
func TestSQLRowThatWaitsForARemovedFile(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	var stored fakeObjects
	s.shared = &stored
	s.db.down()
	for _, spelling := range []string{"gone", "stays", "older"} {
		s.save(spelling)
	}
	s.must(s.delete(t.Context(), "r", testKey("deleted")))
	r := testRow("r", "stays")
	stored.add("stays", "").SHA256 = r.SHA256
	stored.recs[testKey("stays")].Fetched = r.Fetched
	older := stored.add("older", "other content")
	older.Fetched = testDay.Add(-time.Hour)
	stored.down = true
	s.db.set(nil)
	s.at.Add(10)
	if err := s.writePending(t.Context()); !errors.Is(err, errStoreDown) || s.waiting() == 0 {
		t.Errorf("while the store is down: %v, %d changes wait", err, s.waiting())
	}
	stored.down = false
	s.back()
	s.wantRows("older", "stays")
	if row, _ := s.db.row(testKey("older")); row.SHA256 != older.SHA256 {
		t.Errorf("the row does not follow what another replica stored: %+v", row)
	}
}

// Two replicas that do not hear of each other store a file: the row may be of the other one.
// A bucket may be restored from a backup, too.
func TestReindexOfAnOlderObject(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	var stored fakeObjects
	is := stored.add("older", "content")
	is.Fetched = testDay.Add(-time.Hour)
	s.save("older")
	s.must(second(s.countUses(t.Context(), []fileUse{{"r", testKey("older"), 5, testDay}})))
	for _, want := range []int{1, 0} {
		n := 0
		s.must(reindex(t.Context(), &stored, s.sqlIndex, func(string, string) { n++ }))
		if row, _ := s.db.row(testKey("older")); n != want || row.SHA256 != is.SHA256 || row.Hits != 5 {
			t.Errorf("%d rows corrected, want %d: %+v", n, want, row)
		}
	}
}

// Transactions that change many rows would deadlock with those of other replicas: over the
// totals of a remote, and over rows with what counts uses.
func TestSQLReplicasWriteWhatWaitedInTurn(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	s.save("a")
	s.db.down()
	for _, spelling := range []string{"c", "a", "d", "b", "a"} {
		s.save(spelling)
	}
	s.must(s.delete(t.Context(), "r", testKey("c")))
	var asked, keys []string
	s.db.set(func(query string, args []driver.Value) error {
		asked = append(asked, query)
		if query == sqlSave || query == sqlDelete {
			keys = append(keys, args[0].(string))
		}
		return nil
	})
	s.at.Add(1)
	s.must(s.writePending(t.Context()))
	if n := slices.Index(asked, sqlLock); n < 0 || slices.IndexFunc(asked, func(q string) bool { return q == sqlSave || q == sqlDelete }) < n {
		t.Errorf("rows are written without a lock: %q", asked)
	}
	if !slices.IsSorted(keys) || len(keys) != 6 {
		t.Errorf("keys in the order %q", keys)
	}
	s.wantRows("a", "b", "d")
}

// After a failover the old connections lead to a standby, as may new ones for a while:
// the database is down until a new connection leads to the new primary.
func TestSQLStandbyIsDown(t *testing.T) {
	t.Parallel()
	for name, code := range map[string]pqerror.Code{"read only": "25006", "starting up": "57P03", "not supported": "0A000", "seen by the ping": ""} {
		t.Run(name, func(t *testing.T) {
			s := newSQLTester(t)
			s.save("a")
			s.db.set(func(query string, _ []driver.Value) error {
				if query == sqlSave && code != "" {
					return &pq.Error{Code: code, Message: "it is a standby"}
				}
				return nil
			})
			s.db.standby = true
			if code == "" {
				if err := s.ping(t.Context()); !errors.Is(err, errStoreDown) || !strings.Contains(err.Error(), "primary") {
					t.Errorf("ping: %v", err)
				}
			}
			s.save("b")
			if s.outage.outageCause() == nil || s.waiting() != 1 {
				t.Errorf("a standby is not down, %d rows wait", s.waiting())
			}
			for range 3 {
				for _, ask := range []func() error{
					func() error { return second(s.totals(t.Context(), false)) }, // which a standby could answer
					func() error { return s.writePending(t.Context()) },
				} {
					s.at.Add(10)
					if err := ask(); !errors.Is(err, errStoreDown) {
						t.Errorf("a standby counts as up again: %v", err)
					}
				}
			}
			if n := s.sqlIndex.db.Stats().OpenConnections; n != 0 {
				t.Errorf("%d connections to a standby are kept", n)
			}
			s.db.standby = false
			s.back()
			s.wantRows("a", "b")
		})
	}
}

// Rows that wait are lost with the process. They come back with the next use of their
// files, and with them the uses of the time without a database.
func TestSQLRowsLostInARestartComeBackByUse(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	var stored fakeObjects
	var heard useCounts
	s.db.down()
	for _, spelling := range []string{"a", "b", "c"} {
		s.must(s.saveRow(t.Context(), newIndexRow(testKey(spelling), stored.add(spelling, "x"))))
	}
	s.restart()
	if !strings.Contains(s.out.String(), "rows=3") {
		t.Errorf("the end does not say how many rows are lost:\n%s", s.out)
	}
	use := func(spelling string, hits int64) {
		heard.addUses(fileUse{"r", testKey(spelling), hits, testDay.Add(time.Hour)})
	}
	use("a", 2)
	if err := heard.flush(t.Context(), s.sqlIndex, &stored); !errors.Is(err, errStoreDown) {
		t.Errorf("uses without a database: %v", err)
	}
	use("a", 1)
	use("b", 1)
	use("never stored", 1)
	s.back()
	s.must(heard.flush(t.Context(), s.sqlIndex, &stored))
	s.wantRows("a", "b")
	if r, _ := s.db.row(testKey("a")); r.Hits != 3 || !r.LastAccess.Equal(testDay.Add(time.Hour)) {
		t.Errorf("the row of a: %+v", r)
	}
	s.must(reindex(t.Context(), &stored, s.sqlIndex, func(string, string) {}))
	s.wantRows("a", "b", "c")
}

func TestSQLCloseWritesWhatWaits(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	s.db.down()
	s.save("a")
	s.db.set(nil)
	s.at.Add(10)
	s.restart()
	s.wantRows("a")
	if strings.Contains(s.out.String(), "lost") {
		t.Errorf("rows that were written are called lost:\n%s", s.out)
	}
}

// The connection ends in the middle of a write, or the database's answer to a commit
// is lost: the rows are the same as if nothing had happened.
func TestSQLPendingChangesMayBeWrittenTwice(t *testing.T) {
	t.Parallel()
	for name, stop := range map[string]func(*fakePG){
		"not committed": func(db *fakePG) {
			db.refuse = func(query string, _ []driver.Value) error {
				if query == "commit" && len(db.rows) > 0 {
					return syscall.ECONNRESET
				}
				return nil
			}
		},
		"committed, the answer is lost": func(db *fakePG) {
			db.refuse = nil
			db.dropped = func(query string) bool { return query == "commit" && len(db.rows) > 0 }
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSQLTester(t)
			s.db.down()
			r := testRow("r", "a")
			r.Hits = 2
			s.must(s.saveRow(t.Context(), r))
			s.must(s.delete(t.Context(), "r", s.save("b").Key))
			s.at.Add(10)
			stop(s.db)
			if err := s.writePending(t.Context()); !errors.Is(err, errStoreDown) {
				t.Errorf("a write that was cut off: %v", err)
			}
			s.db.dropped = nil
			s.back()
			s.wantRows("a")
			if r, _ := s.db.row(r.Key); r.Hits != 2 {
				t.Errorf("%d hits, want 2", r.Hits)
			}
			if n := s.waiting(); n != 0 {
				t.Errorf("%d changes still wait", n)
			}
		})
	}
}

func TestSQLPendingChangesGiveWayToNews(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	s.db.down()
	old := s.save("a")
	gone := testRow("r", "b")
	s.must(s.delete(t.Context(), "r", gone.Key))
	// Another replica, which reaches the database, is ahead.
	newer := old
	newer.SHA256, newer.Fetched = "new", testDay.Add(time.Minute)
	gone.Fetched = testDay.Add(time.Minute)
	s.db.rows[old.Key], s.db.rows[gone.Key] = newer, gone
	s.back()
	s.wantRows("a", "b")
	if r, _ := s.db.row(old.Key); r.SHA256 != "new" {
		t.Error("an old row has replaced a new one")
	}
}

func TestSQLRefusedRowsStopNobody(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	s.db.down()
	for i := range changeBatch + 50 {
		s.save(fmt.Sprintf("f%03d", i))
	}
	s.db.set(func(query string, args []driver.Value) error {
		if query == sqlSave && strings.HasSuffix(args[0].(string), "f007") {
			return &pq.Error{Code: "22021", Message: "poison"}
		}
		return nil
	})
	s.at.Add(10)
	s.must(s.writePending(t.Context()))
	if n := len(s.db.rows); n != changeBatch+49 || s.waiting() != 0 {
		t.Errorf("%d rows, %d changes wait", n, s.waiting())
	}
	if !strings.Contains(s.out.String(), "key="+testKey("f007")) {
		t.Errorf("the log does not name the row:\n%s", s.out)
	}
	if s.save("f999"); s.outage.outageCause() != nil {
		t.Error("a refused row is taken for an outage")
	}
	if err := s.sqlIndex.saveRow(t.Context(), testRow("r", "f007")); err == nil || errors.Is(err, errStoreDown) {
		t.Errorf("a refused row: %v", err)
	}
}

func TestSQLPendingChangesAreBounded(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	s.db.down()
	s.save("a")
	for s.waiting() < maxPendingChanges {
		s.pending.add(rowChange{row: indexRow{Key: testKey("b")}, deletes: true})
	}
	s.save("c")
	s.save("d")
	if n := s.waiting(); n != maxPendingChanges {
		t.Errorf("%d changes wait", n)
	}
	if out := s.out.String(); strings.Count(out, "reindex") != 1 {
		t.Errorf("dropped rows should be told once, with the cure:\n%s", out)
	}
	s.pending.removeFirst(maxPendingChanges - 1)
	s.back()
	if p, err := s.listPage(t.Context(), pageQuery{remote: "r", limit: 1}); err != nil || p.complete {
		t.Errorf("a page says that it is complete after rows were dropped: %v", err)
	}
	// Uses bring the rows back.
	var stored fakeObjects
	stored.add("c", "x")
	var heard useCounts
	heard.addUses(fileUse{"r", testKey("c"), 1, testDay})
	s.must(heard.flush(t.Context(), s.sqlIndex, &stored))
	s.wantRows("c")
}

func TestSQLCallerThatLeaves(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.listPage(ctx, pageQuery{remote: "r", limit: 1}); !errors.Is(err, context.Canceled) {
		t.Errorf("page: %v", err)
	}
	if s.outage.outageCause() != nil {
		t.Error("a client that left is taken for an outage")
	}
	// The object is stored: its row has to follow.
	s.must(s.sqlIndex.saveRow(ctx, testRow("r", "a")))
	s.wantRows("a")
}

func TestSQLSecretsStaySecret(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	s.db.set(func(string, []driver.Value) error { return errors.New("cannot use password hunter2") })
	err := s.ping(t.Context())
	if s.save("a"); strings.Contains(fmt.Sprint(err, s.out, s.outage.outageCause()), "hunter2") {
		t.Errorf("the password is told: %v\n%s", err, s.out)
	}
	set := sqlSettings{host: "h", port: "1", user: "u", name: "n", sslmode: "nonsense", password: `p'w\d x`}
	x := newSQLIndex(&sqlConnector{set.dsn()}, set.password, time.Now, slog.New(slog.DiscardHandler))
	defer x.Close()
	if err := x.ping(t.Context()); err == nil || strings.Contains(err.Error(), "p'w") {
		t.Errorf("bad sslmode: %v", err)
	}
	set.sslmode = "disable"
	if cfg, err := pq.NewConfig(set.dsn()); err != nil || cfg.Password != `p'w\d x` || cfg.Host != "h" || cfg.User != "u" {
		t.Errorf("%+v, %v", cfg, err)
	}
}

// fakeObjects are records without bodies.
type fakeObjects struct {
	objects
	recs   map[string]*record
	walked func() // before the end of a walk
	down   bool
}

func (f *fakeObjects) stat(_ context.Context, key string) (*object, error) {
	rec := f.recs[key]
	if f.down {
		return nil, errStoreDown
	}
	if rec == nil {
		return nil, fs.ErrNotExist
	}
	return &object{rec: rec}, nil
}

func (f *fakeObjects) walk(_ context.Context, each func(string, *record) error) error {
	for key, rec := range f.recs {
		if err := each(key, rec); err != nil {
			return err
		}
	}
	if f.walked != nil {
		f.walked()
	}
	return nil
}

func (f *fakeObjects) add(spelling, content string) *record {
	if f.recs == nil {
		f.recs = map[string]*record{}
	}
	rec := testRecord(spelling, content)
	f.recs[testKey(spelling)] = rec
	return rec
}

func TestReindex(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	testReindex(t, s.sqlIndex)
	s.db.down()
	err := reindex(t.Context(), &fakeObjects{}, s.sqlIndex, func(string, string) {})
	if !errors.Is(err, errStoreDown) || s.waiting() > 0 {
		t.Errorf("reindex without a database: %v", err)
	}
}

func testReindex(t *testing.T, x *sqlIndex) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var stored fakeObjects
	for i := range changeBatch + 20 {
		stored.add(fmt.Sprintf("missing%04d", i), "x")
	}
	same := stored.add("same", "x")
	same.Fetched = time.Date(2024, 2, 29, 12, 0, 0, 123456500, time.UTC) // PostgreSQL rounds it down
	must(x.saveRow(t.Context(), newIndexRow(testKey("same"), same)))
	must(second(x.countUses(t.Context(), []fileUse{{"r", testKey("same"), 5, testDay}})))
	must(x.saveRow(t.Context(), testRow("r", "stale")))
	stored.add("stale", "other content").Fetched = testDay.Add(time.Hour)
	for i := range changeBatch + 20 {
		must(x.saveRow(t.Context(), testRow("r", fmt.Sprintf("lost%04d", i))))
	}
	stored.walked = func() { // what replicas write meanwhile
		must(x.saveRow(t.Context(), testRow("r", "news")))
		again := testRow("r", "lost0003")
		again.Fetched = testDay.Add(time.Minute)
		must(x.saveRow(t.Context(), again))
	}
	n := map[string]int{}
	must(reindex(t.Context(), &stored, x, func(what, key string) { n[what]++ }))
	if n["added"] != changeBatch+21 || n["dropped"] != changeBatch+19 {
		t.Errorf("%v", n)
	}
	paths := (&indexTester{t, x}).paths(pageQuery{remote: "r", limit: 300})
	if len(paths) != changeBatch+24 || !slices.Contains(paths, "news") || !slices.Contains(paths, "lost0003") {
		t.Errorf("%d rows", len(paths))
	}
	p, err := x.listPage(t.Context(), pageQuery{remote: "r", prefix: "same", limit: 1})
	if err != nil || p.rows[0].Hits != 5 {
		t.Errorf("uses are lost: %v, %+v", err, p.rows)
	}
	stored.walked = nil
	clear(n)
	stored.add("news", "x")
	stored.add("lost0003", "x")
	must(reindex(t.Context(), &stored, x, func(what, key string) { n[what]++ }))
	if n["dropped"] != 0 {
		t.Errorf("a second run drops %v", n)
	}
}

// What follows needs a PostgreSQL: TEST_POSTGRES is its URL.

// realPG are the settings for a schema of the test's own in a real server,
// through a wire that can be broken.
func realPG(t testing.TB) (set sqlSettings, w *wire, db *sql.DB) {
	t.Helper()
	raw := os.Getenv("TEST_POSTGRES")
	if raw == "" {
		t.Skip("TEST_POSTGRES is not set")
	}
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal("TEST_POSTGRES is not a URL")
	}
	w = newWire(t, net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "5432")))
	host, port, _ := net.SplitHostPort(w.address())
	password, _ := u.User.Password()
	set = sqlSettings{
		host: host, port: port, user: u.User.Username(), name: strings.Trim(u.Path, "/"), password: secret(password),
		sslmode: cmp.Or(u.Query().Get("sslmode"), "disable"), schema: "test_" + strings.ToLower(rand.Text()),
	}
	if db, err = sql.Open("postgres", raw); err == nil {
		_, err = db.Exec("CREATE SCHEMA " + set.schema)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		db.Exec("DROP SCHEMA " + set.schema + " CASCADE")
		db.Close()
	})
	return set, w, db
}

func startSQL(t testing.TB, set sqlSettings) *sqlIndex {
	t.Helper()
	x := newSQLIndex(&sqlConnector{set.dsn()}, set.password, time.Now, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { x.Close() })
	return x
}

// wire is a TCP proxy to a server. It can be cut (refuse), or go silent:
// accept and never answer.
type wire struct {
	t      testing.TB
	to     string
	name   string
	mu     sync.Mutex
	ln     net.Listener
	conns  map[net.Conn]bool
	silent chan struct{} // closed: bytes flow
	wg     sync.WaitGroup
}

func newWire(t testing.TB, to string) *wire {
	w := &wire{t: t, to: to, name: "127.0.0.1:0", conns: map[net.Conn]bool{}, silent: make(chan struct{})}
	close(w.silent)
	w.mend()
	t.Cleanup(func() {
		w.speak()
		w.cut()
		w.wg.Wait()
	})
	return w
}

func (w *wire) address() string { return w.name }

// mend lets connections through.
func (w *wire) mend() {
	w.t.Helper()
	ln, err := net.Listen("tcp", w.name)
	if err != nil {
		w.t.Fatal(err)
	}
	w.ln, w.name = ln, ln.Addr().String()
	w.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			w.wg.Go(func() { w.pass(c) })
		}
	})
}

// cut closes all connections and refuses new ones.
func (w *wire) cut() {
	w.ln.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.conns {
		c.Close()
	}
}

// hush stops all bytes, speak lets them flow again.
func (w *wire) hush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.silent = make(chan struct{})
}

func (w *wire) speak() {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-w.silent:
	default:
		close(w.silent)
	}
}

func (w *wire) flows() chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.silent
}

func (w *wire) keep(c net.Conn, is bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conns[c] = is; !is {
		delete(w.conns, c)
	}
}

func (w *wire) pass(c net.Conn) {
	defer c.Close()
	server, err := net.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer server.Close()
	for _, end := range []net.Conn{c, server} {
		w.keep(end, true)
		defer w.keep(end, false)
	}
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{c, server}, {server, c}} {
		both.Go(func() {
			defer way[0].Close()
			defer way[1].Close()
			buf := make([]byte, 32<<10)
			for {
				n, err := way[0].Read(buf)
				<-w.flows()
				if _, werr := way[1].Write(buf[:n]); err != nil || werr != nil {
					return
				}
			}
		})
	}
	both.Wait()
}

func TestPostgresIndex(t *testing.T) {
	t.Parallel()
	realPG(t)
	testIndex(t, func(t *testing.T) index {
		set, _, _ := realPG(t)
		return startSQL(t, set)
	})
}

func TestPostgresReplicasStartAtOnce(t *testing.T) {
	t.Parallel()
	set, _, db := realPG(t)
	var wg sync.WaitGroup
	for i := range 6 {
		x := startSQL(t, set)
		wg.Go(func() {
			if err := x.ping(t.Context()); err != nil {
				t.Errorf("ping: %v", err)
			}
			if err := x.saveRow(t.Context(), testRow("r", fmt.Sprint("f", i))); err != nil || x.waiting() > 0 {
				t.Errorf("save: %v", err)
			}
		})
	}
	wg.Wait()
	var version, rows int
	err := db.QueryRow("SELECT (SELECT version FROM "+set.schema+".artifactapi_schema), (SELECT count(*) FROM "+set.schema+".artifactapi_files)").Scan(&version, &rows)
	if err != nil || version != 1 || rows != 6 {
		t.Errorf("version %d, %d rows, %v", version, rows, err)
	}
}

// A program refuses a schema that is newer than itself: files are served and their rows
// wait.
// A server that only reads for another reason than being a standby is down as well.
func TestPostgresReadOnlyIsDown(t *testing.T) {
	t.Parallel()
	set, _, _ := realPG(t)
	err := startSQL(t, set).withConn(t.Context(), sqlReadTimeout, func(ctx context.Context, conn *sql.Conn) error {
		_, err := conn.ExecContext(ctx, "SET default_transaction_read_only = on")
		return errors.Join(err, execPing(ctx, conn))
	})
	if !errors.Is(err, errStoreDown) || !strings.Contains(err.Error(), "it takes no rows") {
		t.Errorf("ping: %v", err)
	}
}

func TestPostgresNewerSchemaIsRefused(t *testing.T) {
	t.Parallel()
	set, _, db := realPG(t)
	x := startSQL(t, set)
	ix := &indexTester{t, x}
	ix.save(testRow("r", "a"))
	must(t, second(db.Exec("UPDATE "+set.schema+".artifactapi_schema SET version = 2")))
	ix.save(testRow("r", "b")) // a replica that runs goes on
	ix.wantPaths(pageQuery{remote: "r", limit: 9}, "a", "b")
	old := startSQL(t, set)
	_, err := old.totals(t.Context(), false)
	if !errors.Is(err, errStoreDown) || !strings.Contains(err.Error(), "run the newer artifactapi") {
		t.Errorf("a schema from the future: %v", err)
	}
	must(t, old.saveRow(t.Context(), testRow("r", "c")))
	if old.waiting() != 1 {
		t.Error("the row does not wait")
	}
}

func TestPostgresOneReplicaEvicts(t *testing.T) {
	t.Parallel()
	set, _, _ := realPG(t)
	a, b := startSQL(t, set), startSQL(t, set)
	ran := ""
	must(t, a.whileAlone(t.Context(), func(ctx context.Context) {
		ran += "a"
		must(t, b.whileAlone(ctx, func(context.Context) { ran += "b" }))
	}))
	must(t, b.whileAlone(t.Context(), func(context.Context) { ran += "c" }))
	if ran != "ac" {
		t.Errorf("ran %s, want a and then c", ran)
	}
}

// TestPostgresPlans: with many rows no statement may read them all.
func TestPostgresPlans(t *testing.T) {
	t.Parallel()
	set, _, _ := realPG(t)
	x := startSQL(t, set)
	err := x.withConn(t.Context(), time.Minute, func(ctx context.Context, conn *sql.Conn) error {
		_, err := conn.ExecContext(ctx, `SET statement_timeout = 0; INSERT INTO artifactapi_files
			SELECT r || '/' || lpad(to_hex(i), 16, '0') || '/f', r, 'dir' || i % 100 || '/f' || i, 'f' || i, '', '', '', 1, 0,
				now() - i * interval '1 second', now() - i * interval '1 second'
			FROM generate_series(1, 20000) i, unnest(ARRAY['a', 'b', 'c']) r; ANALYZE artifactapi_files`)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	keys := pq.StringArray{"a/0000000000000001/f", "b/0000000000000002/f"}
	for _, q := range []struct {
		query, index string
		args         []any
	}{
		{sqlByPath, "artifactapi_files_by_path", []any{"b", "dir5/", "", 1000}},
		{sqlUnusedByAge, "artifactapi_files_unused", []any{"", testDay, "a", 1000}},
		{sqlAllByAge, "artifactapi_files_used", []any{"", testDay, "a", 1000}},
		{sqlUnusedByAge, "artifactapi_files_", []any{"b", testDay, "a", 1000}},
		{sqlDelete, "artifactapi_files_pkey", []any{keys[0], false, testDay}},
		{sqlTouch, "artifactapi_files_pkey", []any{keys, pq.Int64Array{1, 2}, pq.StringArray{"2024-01-01", "2024-01-01"}}},
		{sqlTotals, "", nil},
	} {
		plan := x.plan(t, q.query, q.args)
		if !strings.Contains(plan, q.index) || strings.Contains(plan, "Seq Scan on artifactapi_files") || (strings.Contains(plan, "Sort Key: artifactapi_files") && !strings.Contains(plan, "Merge Append")) {
			t.Errorf("%s\n%s", q.query, plan)
		}
		if q.query == sqlByPath && !strings.Contains(plan, "ROW(path, key) >") {
			t.Errorf("paging is not by the index:\n%s", plan)
		}
	}
}

func (x *sqlIndex) plan(t *testing.T, query string, args []any) string {
	t.Helper()
	var lines []string
	err := x.withConn(t.Context(), sqlReadTimeout, func(ctx context.Context, conn *sql.Conn) error {
		rows, err := conn.QueryContext(ctx, "EXPLAIN "+query, args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var line string
			if err := rows.Scan(&line); err != nil {
				return err
			}
			lines = append(lines, line)
		}
		return rows.Err()
	})
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return strings.Join(lines, "\n")
}

func TestPostgresOutage(t *testing.T) {
	t.Parallel()
	set, w, _ := realPG(t)
	x := startSQL(t, set)
	ix := &indexTester{t, x}
	ix.save(testRow("r", "a"))
	w.cut()
	ix.save(testRow("r", "b"))
	if _, err := x.totals(t.Context(), false); !errors.Is(err, errStoreDown) {
		t.Errorf("totals: %v", err)
	}
	x.delete(t.Context(), "r", testKey("a"))
	w.mend()
	awaitWritten(t, x)
	ix.wantPaths(pageQuery{remote: "r", limit: 9}, "b")
	ix.save(testRow("r", "c"))
	ix.wantPaths(pageQuery{remote: "r", limit: 9}, "b", "c")
	// Connections that were cut while they were idle are no outage.
	w.cut()
	w.mend()
	ix.wantPaths(pageQuery{remote: "r", limit: 9}, "b", "c")
}

// awaitWritten calls writePending until it is done, as the loop does.
func awaitWritten(t *testing.T, x *sqlIndex) {
	t.Helper()
	var err error
	for range 100 {
		if err = x.writePending(t.Context()); err == nil && x.waiting() == 0 {
			return
		}
		<-time.After(100 * time.Millisecond)
	}
	t.Fatalf("%d changes still wait: %v", x.waiting(), err)
}

func TestPostgresThatNeverAnswers(t *testing.T) {
	t.Parallel()
	set, w, _ := realPG(t)
	x := startSQL(t, set)
	ix := &indexTester{t, x}
	ix.save(testRow("r", "a"))
	for name, ask := range map[string]func(context.Context) error{
		"a ping":      x.ping,
		"a statement": func(ctx context.Context) error { return second(x.totals(ctx, false)) },
		"the middle of a transaction": func(ctx context.Context) error {
			return x.withConn(ctx, sqlReadTimeout, func(ctx context.Context, conn *sql.Conn) error {
				return inTransaction(ctx, conn, func(tx *sql.Tx) error {
					w.hush()
					return second(tx.ExecContext(ctx, sqlPing))
				})
			})
		},
		"a new connection": func(ctx context.Context) error {
			x.db.SetMaxIdleConns(0)
			return x.ping(ctx)
		},
	} {
		if name != "the middle of a transaction" {
			w.hush()
		}
		mustEnd(t, func() {
			ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
			defer cancel()
			if err := ask(ctx); !errors.Is(err, errStoreDown) || x.outage.outageCause() != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		w.speak()
		if err := x.ping(t.Context()); err != nil {
			t.Errorf("after %s: %v", name, err)
		}
	}
	w.hush()
	mustEnd(t, func() { ix.save(testRow("r", "b")) })
	mustEnd(t, func() { // as they would not, did each wait for sqlWriteTimeout
		for range 100 {
			ix.save(testRow("r", "c"))
			if _, err := x.totals(t.Context(), false); !errors.Is(err, errStoreDown) {
				t.Errorf("totals: %v", err)
			}
		}
	})
	w.speak()
	awaitWritten(t, x)
	ix.wantPaths(pageQuery{remote: "r", limit: 9}, "a", "b", "c")
}

// mustEnd fails where f hangs, or waits for a timeout again and again: its limit
// is far from what the slowest machine needs and from what a hundred timeouts last.
func mustEnd(t *testing.T, f func()) {
	t.Helper()
	began := time.Now()
	f()
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestPostgresReindex(t *testing.T) {
	t.Parallel()
	set, _, _ := realPG(t)
	testReindex(t, startSQL(t, set))
}

// A table that somebody emptied, or filled past the trigger, is not counted by it.
func TestPostgresReindexCountsAnew(t *testing.T) {
	t.Parallel()
	set, _, db := realPG(t)
	x := startSQL(t, set)
	ix := &indexTester{t, x}
	var stored fakeObjects
	for _, name := range []string{"a", "b"} {
		ix.save(newIndexRow(testKey(name), stored.add(name, "x")))
	}
	ix.save(testRow("gone", "c"))
	want, err := x.totals(t.Context(), false)
	delete(want, "gone")
	for _, statement := range []string{"TRUNCATE %s.artifactapi_files", "TRUNCATE %s.artifactapi_totals", "UPDATE %s.artifactapi_totals SET files = -3", "DROP TABLE %s.artifactapi_files"} {
		_, dbErr := db.Exec(fmt.Sprintf(statement, set.schema))
		err = errors.Join(err, dbErr, reindex(t.Context(), &stored, x, func(string, string) {}))
		if got, totalsErr := x.totals(t.Context(), false); err != nil || totalsErr != nil || !maps.Equal(got, want) {
			t.Errorf("after %s: %v, want %v; %v, %v", statement, got, want, err, totalsErr)
		}
	}
}

func TestPostgresTotalsBesideManyWriters(t *testing.T) {
	t.Parallel()
	set, _, _ := realPG(t)
	var wg sync.WaitGroup
	for range 3 {
		x := startSQL(t, set)
		for w := range 3 {
			wg.Go(func() {
				var uses []fileUse
				for i := range 40 {
					r := testRow("r", fmt.Sprint("f", i))
					r.Size = int64(i + w)
					uses = append(uses, fileUse{"r", r.Key, 1, testDay})
					if err := errors.Join(x.saveRow(t.Context(), r), second(x.countUses(t.Context(), uses))); err != nil || x.waiting() > 0 {
						t.Errorf("%v", err)
					}
					if i%3 == 0 {
						x.delete(t.Context(), "r", r.Key)
					}
				}
			})
		}
	}
	wg.Wait()
	x := startSQL(t, set)
	var want remoteTotal
	p, err := x.listPage(t.Context(), pageQuery{remote: "r", limit: 100})
	for _, r := range p.rows {
		want.Files++
		want.Bytes += r.Size
	}
	got, terr := x.totals(t.Context(), false)
	if err != nil || terr != nil || got["r"] != want {
		t.Errorf("totals %v, want %v; %v, %v", got["r"], want, err, terr)
	}
}

func TestPostgresMadeAnew(t *testing.T) {
	t.Parallel()
	set, _, db := realPG(t)
	x := startSQL(t, set)
	ix := &indexTester{t, x}
	ix.save(testRow("r", "a"))
	tables := ""
	for _, name := range []string{"files", "totals", "schema"} {
		tables += ", " + set.schema + ".artifactapi_" + name
	}
	for name, statements := range map[string]string{
		"b": "DROP SCHEMA " + set.schema + " CASCADE; CREATE SCHEMA " + set.schema,
		"c": "DROP TABLE " + tables[2:],
		"e": "DROP TABLE " + set.schema + ".artifactapi_files",
	} {
		if _, err := db.Exec(statements); err != nil {
			t.Fatal(err)
		}
		ix.save(testRow("r", name))
		ix.wantPaths(pageQuery{remote: "r", limit: 9}, name)
	}
	if _, err := db.Exec("TRUNCATE " + tables[2:]); err != nil {
		t.Fatal(err)
	}
	for _, x := range []*sqlIndex{startSQL(t, set), x} {
		ix := &indexTester{t, x}
		ix.save(testRow("r", "d"))
		ix.wantPaths(pageQuery{remote: "r", limit: 9}, "d")
	}
	if _, err := db.Exec("TRUNCATE " + set.schema + ".artifactapi_schema"); err != nil { // as in the middle of a restore
		t.Fatal(err)
	}
	if err := startSQL(t, set).ping(t.Context()); err == nil || !strings.Contains(err.Error(), "artifactapi_files has rows") {
		t.Errorf("tables without their version: %v", err)
	}
	(&indexTester{t, x}).wantPaths(pageQuery{remote: "r", limit: 9}, "d")
}

// A schema whose tables were emptied does not say its version: it is made anew.
func TestEmptiedSchemaIsMadeAnew(t *testing.T) {
	t.Parallel()
	s := newSQLTester(t)
	s.db.version, s.db.emptied = 1, true
	s.save("a")
	if err := s.ping(t.Context()); err != nil || s.waiting() > 0 || s.db.version != 1 || s.db.emptied {
		t.Errorf("version %d, %d rows wait, %v", s.db.version, s.waiting(), err)
	}
	if lines := s.out.String(); strings.Count(lines, "artifactapi reindex") != 1 {
		t.Errorf("nobody is told that files may not be listed: %s", lines)
	}
}

func TestPostgresOddValues(t *testing.T) {
	t.Parallel()
	set, _, _ := realPG(t)
	x := startSQL(t, set)
	r := testRow("r", "%F0%9F%98%80/"+strings.Repeat("%C3%A9", 300))
	r.ContentType = "bad\xff\x00type"
	if err := x.saveRow(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	(&indexTester{t, x}).wantPaths(pageQuery{remote: "r", prefix: "\U0001F600/é", limit: 1}, r.Path)
	for _, q := range []pageQuery{{prefix: "\xf0"}, {prefix: "\x00"}, {after: "\xff\x00"}, {after: "a\n\x00"}, {after: "1\n\xff", oldest: true}} {
		q.remote, q.limit = "r", 1
		if _, err := x.listPage(t.Context(), q); err != nil {
			t.Errorf("%+v: %v", q, err)
		}
	}
}

// BenchmarkIndexPage reads pages of a million rows, in memory and, with TEST_POSTGRES,
// in PostgreSQL. A page of a listing has to take less than 50 ms.
func BenchmarkIndexPage(b *testing.B) {
	const rows = 1_000_000
	b.Run("embedded", func(b *testing.B) {
		x := newTestIndex(b, b.TempDir(), newTestDisk(b))
		r := testRow("r", "f")
		for i := range rows {
			r.Path = fmt.Sprintf("dir%d/file%d", i%100, i)
			r.Key, r.Hits, r.LastAccess = storageKey("r", r.Path), int64(i%2), testDay.Add(time.Duration(i)*time.Second)
			must(b, x.saveRow(b.Context(), r))
		}
		benchPages(b, x)
	})
	b.Run("PostgreSQL", func(b *testing.B) {
		set, _, _ := realPG(b)
		x := startSQL(b, set)
		must(b, x.withConn(b.Context(), 5*time.Minute, func(ctx context.Context, conn *sql.Conn) error {
			_, err := conn.ExecContext(ctx, fmt.Sprintf(`SET statement_timeout = 0; ALTER TABLE artifactapi_files DISABLE TRIGGER USER;
				INSERT INTO artifactapi_totals VALUES ('r', 0, %[2]d, %[2]d); INSERT INTO artifactapi_files
				SELECT 'r/' || lpad(to_hex(i), 16, '0') || '/f', 'r', 'dir' || i %% 100 || '/file' || i, 'dir' || i %% 100 || '/file' || i, '', '', 'immutable', 1, i %% 2,
					to_timestamp(%[1]d), to_timestamp(%[1]d + i) FROM generate_series(1, %[2]d) i; ANALYZE artifactapi_files; SET statement_timeout = '5s'`, testDay.Unix(), rows))
			return err
		}))
		benchPages(b, x)
	})
}

func benchPages(b *testing.B, x index) {
	middle := strconv.FormatInt(testDay.Add(500_000*time.Second).UnixNano(), 10)
	for _, c := range []struct {
		name string
		q    pageQuery
	}{
		{"First", pageQuery{remote: "r", limit: 1000}},
		{"Middle", pageQuery{remote: "r", limit: 1000, after: "dir50/file5"}},
		{"Prefix", pageQuery{remote: "r", prefix: "dir50/", limit: 1000}},
		{"Path", pageQuery{remote: "r", prefix: "dir50/file50", limit: 1000}}, // what purges one path
		{"Unused", pageQuery{oldest: true, limit: 1000}},
		{"All", pageQuery{oldest: true, used: true, after: middle, limit: 1000}},
		{"UnusedOfRemote", pageQuery{remote: "r", oldest: true, after: middle, limit: 1000}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if p, err := x.listPage(b.Context(), c.q); err != nil || len(p.rows) < 100 {
					b.Fatal(len(p.rows), err)
				}
			}
		})
	}
	for name, unused := range map[string]bool{"Totals": false, "UnusedTotals": true} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				must(b, second(x.totals(b.Context(), unused)))
			}
		})
	}
}
