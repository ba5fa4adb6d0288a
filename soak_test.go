// soak_test.go: a server in a process of its own among clients, faults of upstream and
// of backends, reloads, purges and a disk that fills and empties, for as long as
// TEST_SOAK says ("60s", "10m"). Every byte that a client got must be one that the
// source had at that place; at the end all is well again and nothing is left over.
//
// Each actor decides by a generator of its own, made from the seed that is printed;
// TEST_SOAK_SEED repeats it. What the scheduler does between them no seed repeats.

package main

import (
	"cmp"
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const (
	soakClients = 8
	soakFiles   = 12       // of each kind: never changing, changing, blobs
	soakLargest = 3 << 20  // bytes of a file
	soakDisk    = 64 << 20 // bytes of the disk, less than the clients ask for in time
)

func TestSoak(t *testing.T) {
	t.Parallel()
	if os.Getenv("TEST_SOAK") == "" {
		t.Skip("TEST_SOAK is not set")
	}
	lasts, err := time.ParseDuration(os.Getenv("TEST_SOAK"))
	if err != nil {
		t.Fatal(err)
	}
	seed, err := strconv.ParseUint(os.Getenv("TEST_SOAK_SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	t.Logf("TEST_SOAK_SEED=%d", seed)
	t.Run("disk", func(t *testing.T) {
		t.Parallel()
		newSoak(t, seed).run(lasts)
	})
	t.Run("backends", func(t *testing.T) {
		t.Parallel()
		s := newSoak(t, seed)
		s.useBackends()
		s.run(lasts)
	})
}

// soak is one such run.
type soak struct {
	testing.TB
	seed   uint64
	up     *realUpstream
	dir    string
	disk   string // where DATA_DIR is mounted; "": not a disk of its own
	env    []string
	wires  []*wire // to the backends
	server *child
	client *http.Transport

	calm     atomic.Bool              // upstream makes no more faults
	asked    atomic.Uint64            // requests that reached upstream
	versions [soakFiles]atomic.Uint64 // of the files that change
	ended    context.Context          // no more faults and clients
	actors   sync.WaitGroup

	mu      sync.Mutex     // guards endings
	endings map[string]int // how often an answer ended so
}

func newSoak(t testing.TB, seed uint64) *soak {
	t.Helper()
	s := &soak{TB: t, seed: seed, up: newRealUpstream(t), dir: t.TempDir(), endings: map[string]int{}}
	s.up.passOn(http.HandlerFunc(s.serveSource))
	s.client = &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: soakClients}
	t.Cleanup(s.client.CloseIdleConnections)
	s.mountDisk()
	return s
}

// mountDisk makes DATA_DIR a small disk of its own, where that is permitted.
func (s *soak) mountDisk() {
	disk := s.dir + "/disk"
	if err := os.MkdirAll(disk, 0o755); err != nil {
		s.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size="+strconv.Itoa(soakDisk)); err != nil {
		s.Logf("the disk does not fill: mounting one: %v", err)
	} else {
		s.disk = disk
		s.Cleanup(func() { _ = syscall.Unmount(disk, syscall.MNT_DETACH) })
	}
	if err := errors.Join(os.Mkdir(disk+"/data", 0o755), os.Symlink("disk/data", s.dir+"/data")); err != nil {
		s.Fatal(err)
	}
}

// useBackends puts what TEST_POSTGRES, TEST_REDIS and TEST_S3 name behind wires that
// can be cut, as a restart of theirs does. Without any of them the test is skipped.
func (s *soak) useBackends() {
	s.Helper()
	s.usePostgres()
	s.useS3()
	if raw := os.Getenv("TEST_REDIS"); raw != "" {
		u := s.behindWire(raw, "6379")
		s.env = append(s.env, "REDIS_URL="+u.String())
	}
	if len(s.wires) == 0 {
		s.Skip("none of TEST_POSTGRES, TEST_REDIS and TEST_S3 is set")
	}
}

// behindWire is a URL with the address of a new wire to where it leads.
func (s *soak) behindWire(raw, port string) *url.URL {
	s.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		s.Fatal("the URL of a backend is none")
	}
	w := newWire(s, net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), port)))
	s.wires = append(s.wires, w)
	u.Host = w.address()
	return u
}

// usePostgres gives the server a database of its own.
func (s *soak) usePostgres() {
	s.Helper()
	raw := os.Getenv("TEST_POSTGRES")
	if raw == "" {
		return
	}
	name := "test_" + strings.ToLower(crand.Text())
	db, err := sql.Open("postgres", raw)
	if err == nil {
		_, err = db.Exec("CREATE DATABASE " + name)
	}
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		_, _ = db.Exec("DROP DATABASE " + name + " WITH (FORCE)")
		db.Close()
	})
	u := s.behindWire(raw, "5432")
	password, _ := u.User.Password()
	s.env = append(s.env, "DBHOST="+u.Hostname(), "DBPORT="+u.Port(), "DBUSER="+u.User.Username(), "DBPASS="+password, "DBNAME="+name,
		"DBSSLMODE="+cmp.Or(u.Query().Get("sslmode"), "disable"))
}

// useS3 gives the server a bucket of its own, which stays behind.
func (s *soak) useS3() {
	s.Helper()
	raw := os.Getenv("TEST_S3")
	if raw == "" {
		return
	}
	u := s.behindWire(raw, "80")
	key, _ := u.User.Password()
	s.env = append(s.env, "MINIO_ENDPOINT="+u.Scheme+"://"+u.Host, "MINIO_ACCESS_KEY="+u.User.Username(), "MINIO_SECRET_KEY="+key,
		fmt.Sprintf("MINIO_BUCKET=%s-%x", strings.Trim(u.Path, "/"), rand.Uint64()))
}

func (s *soak) count(ending string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endings[ending]++
}

func (s *soak) random(actor uint64) *rand.Rand { return rand.New(rand.NewPCG(s.seed, actor)) }

func (s *soak) run(lasts time.Duration) {
	s.server = childSetup{yaml: s.yaml(1), dir: s.dir, env: append(s.env, "API_TOKEN="+deskToken, "LOG_LEVEL=info", "MIN_FREE=6MiB", "HOT_CACHE_SIZE=32MiB")}.start(s)
	before := s.measure()
	ended, end := context.WithTimeout(context.Background(), lasts)
	defer end()
	s.ended = ended
	for i := range uint64(soakClients) {
		s.actors.Go(func() { s.beClient(s.random(i), i) })
	}
	s.actors.Go(func() { s.disturb(s.random(1000)) })
	var middle soakMeasure
	select {
	case <-time.After(lasts / 2):
		middle = s.measure()
	case <-s.server.exited:
	}
	s.actors.Wait()
	s.calm.Store(true)
	s.wantAllWell()
	s.up.stop() // its idle connections end
	s.client.CloseIdleConnections()
	s.server.client.CloseIdleConnections()
	s.wantNothingLeft(before, middle)
	s.Logf("upstream was asked %d times; answers: %v", s.asked.Load(), s.endings)
}

func (s *soak) yaml(ttl int) string {
	return fmt.Sprintf(`remotes:
  r:
    base_url: %[1]s/r
    mutable_patterns: ["^changing/"]
    check_mutable_updates: %[2]t
    stale_if_error: %[2]t
    timeout: 2
    cache: {mutable_ttl: %[3]d}
  img: {base_url: "%[1]s", package: docker, registry: registry.test, timeout: 2}
  here: {type: local}
`, s.up.url, ttl%2 == 0, ttl)
}

// ---- what the source has

// sourceText is a version of a file. Three in a row have the same size: a length
// alone does not tell them apart.
func (s *soak) sourceText(path string, version uint64) string {
	name := uint64(crc32.ChecksumIEEE([]byte(path)))
	bytes, sizes := rand.New(rand.NewPCG(name, version)), rand.New(rand.NewPCG(name, version/3+1<<40))
	size := 1 + sizes.IntN(20_000)
	if sizes.IntN(3) == 0 { // most files are small
		size = 1 + sizes.IntN(soakLargest)
	}
	return noise(bytes.Uint64()>>40, size)
}

// currentVersion is that of "kind/number".
func (s *soak) currentVersion(path string) uint64 {
	kind, number, _ := strings.Cut(path, "/")
	i, err := strconv.Atoi(number)
	if kind != "changing" || err != nil {
		return 0
	}
	return s.versions[i].Load()
}

func (s *soak) nextVersion(path string) {
	_, number, _ := strings.Cut(path, "/")
	i, _ := strconv.Atoi(number)
	s.versions[i].Add(1)
}

// serveSource is upstream: it serves the current version, well or not.
func (s *soak) serveSource(w http.ResponseWriter, r *http.Request) {
	n := s.asked.Add(1)
	path, isFile := strings.CutPrefix(r.URL.Path, "/r/")
	if !isFile {
		digest := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		for i := range soakFiles {
			if name := fmt.Sprintf("blob/%d", i); digestOf(s.sourceText(name, 0)) == digest {
				path = name
			}
		}
	}
	kind, _, _ := strings.Cut(path, "/")
	if kind != "fixed" && kind != "changing" && kind != "blob" {
		http.NotFound(w, r)
		return
	}
	version := s.currentVersion(path)
	text := s.sourceText(path, version)
	w.Header().Set("ETag", fmt.Sprintf(`"%s-%d"`, path, version))
	modified := time.Unix(1_700_000_000+int64(version), 0) // another second for each version
	plan := &faultyResponse{ResponseWriter: w, left: -1}
	if !s.calm.Load() {
		r := s.random(1_000_000 + n)
		plan.choose(r, kind, len(text))
		if kind == "changing" && r.IntN(2) == 0 {
			plan.broken = func() { s.nextVersion(path) }
		}
	}
	if plan.status != 0 {
		w.Header().Del("ETag")
		w.WriteHeader(plan.status)
		return
	}
	if version%2 == 1 { // there are such upstreams, which give a part of another version
		r.Header.Del("If-Range")
	}
	http.ServeContent(plan, r, "", modified, strings.NewReader(text))
}

// faultyResponse is an answer of upstream's with a fault.
type faultyResponse struct {
	http.ResponseWriter
	status  int           // instead of all else
	left    int           // bytes before the connection breaks; -1: it does not
	broken  func()        // called when it breaks
	stall   time.Duration // before the first byte
	damage  bool          // of the first byte
	chunked bool
}

func (f *faultyResponse) choose(r *rand.Rand, kind string, size int) {
	switch r.IntN(30) {
	case 0:
		f.status = []int{500, 502, 503, 429, 403}[r.IntN(5)]
	case 1:
		f.status = http.StatusNotFound
	case 2, 3, 4, 5, 6:
		f.left = r.IntN(size)
	case 7:
		panic(http.ErrAbortHandler)
	case 8:
		f.stall = time.Duration(r.IntN(1500)) * time.Millisecond
	case 9, 10:
		f.chunked = true
	case 11:
		f.Header().Del("ETag")
	case 12:
		f.damage = kind == "blob" // only there can anyone tell
	}
}

func (f *faultyResponse) WriteHeader(status int) {
	if f.chunked && status == http.StatusOK {
		f.Header().Del("Content-Length")
	}
	f.ResponseWriter.WriteHeader(status)
}

func (f *faultyResponse) Write(p []byte) (int, error) {
	time.Sleep(f.stall)
	f.stall = 0
	if f.damage {
		f.damage = false
		p = append([]byte{^p[0]}, p[1:]...)
	}
	if f.left < 0 {
		return f.ResponseWriter.Write(p)
	}
	n, err := f.ResponseWriter.Write(p[:min(len(p), f.left)])
	f.left -= n
	if f.left == 0 {
		_ = http.NewResponseController(f.ResponseWriter).Flush()
		if f.broken != nil {
			f.broken() // the rest is asked for when there is another version
		}
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// ---- what happens

// disturb is who does things to the server and around it until the end, and then puts
// all back.
func (s *soak) disturb(r *rand.Rand) {
	mend := func() {}
	for s.pause(time.Duration(50+r.IntN(300)) * time.Millisecond) {
		if r.IntN(3) == 0 {
			mend()
			mend = func() {}
		}
		switch r.IntN(10) {
		case 0, 1, 2:
			s.versions[r.IntN(soakFiles)].Add(1)
		case 3, 4:
			s.server.configure(s.yaml(r.IntN(3)))
			_ = s.server.cmd.Process.Signal(syscall.SIGHUP)
		case 5:
			s.ask("DELETE", "/artifacts/r/"+soakPath(r), nil)
		case 6:
			s.ask("DELETE", "/artifacts/r?pattern="+fmt.Sprintf("/%d", r.IntN(10)), nil)
		default:
			mend()
			mend = s.breakSomething(r)
		}
	}
	mend()
	s.server.configure(s.yaml(0))
	_ = s.server.cmd.Process.Signal(syscall.SIGHUP)
}

// breakSomething takes upstream, space or a backend away, and returns what gives it
// back.
func (s *soak) breakSomething(r *rand.Rand) (mend func()) {
	switch n := r.IntN(2 + len(s.wires)); n {
	case 0:
		s.up.stop()
		return s.up.start
	case 1:
		s.fillDisk()
		return func() { _ = os.Remove(s.disk + "/filler") }
	default:
		s.wires[n-2].cut()
		return s.wires[n-2].mend
	}
}

func soakPath(r *rand.Rand) string {
	return fmt.Sprintf("%s/%d", []string{"fixed", "changing"}[r.IntN(2)], r.IntN(soakFiles))
}

// pause waits, and reports whether the run goes on.
func (s *soak) pause(d time.Duration) bool {
	select {
	case <-s.ended.Done():
	case <-s.server.exited:
	case <-time.After(d):
		return true
	}
	return false
}

// fillDisk takes all but 2 MiB of the disk.
func (s *soak) fillDisk() {
	if s.disk == "" {
		return
	}
	f, err := os.Create(s.disk + "/filler")
	if err != nil {
		return // it is full already
	}
	defer f.Close()
	var st syscall.Statfs_t
	if err := syscall.Statfs(s.disk, &st); err == nil {
		_ = syscall.Fallocate(int(f.Fd()), 0, 0, max(1, int64(st.Bavail)*int64(st.Bsize)-(2<<20)))
	}
}

// beClient asks for files in all manners until the end.
func (s *soak) beClient(r *rand.Rand, number uint64) {
	mine := map[string][]string{} // what files of this client's may hold; "": nothing
	for s.pause(time.Duration(r.IntN(20)) * time.Millisecond) {
		switch r.IntN(8) {
		case 0:
			name := fmt.Sprintf("blob/%d", r.IntN(soakFiles))
			s.askForFile(r, name, "/v2/img/x/blobs/"+digestOf(s.sourceText(name, 0)))
		case 1:
			s.useLocal(r, fmt.Sprintf("/api/here/%d/%d", number, r.IntN(4)), mine)
		default:
			path := soakPath(r)
			s.askForFile(r, path, "/api/r/"+path)
		}
	}
}

// askForFile asks in one of the manners that clients have, and judges the answer.
func (s *soak) askForFile(r *rand.Rand, path, at string) {
	method, headers, most := "GET", []string{}, int64(1<<40)
	switch r.IntN(8) {
	case 0:
		method = "HEAD"
	case 1:
		from := r.IntN(soakLargest / 2)
		headers = []string{"Range", fmt.Sprintf("bytes=%d-%d", from, from+r.IntN(100_000))}
	case 2:
		headers = []string{"Range", fmt.Sprintf("bytes=-%d", 1+r.IntN(1000))}
	case 3:
		most = int64(r.IntN(200_000)) // it hangs up
	case 4:
		headers = []string{"If-None-Match", fmt.Sprintf(`"sha256-%x"`, sha256.Sum256([]byte(s.sourceText(path, s.currentVersion(path)))))}
	case 5:
		headers = []string{"Connection", "close"}
	}
	a := s.ask(method, at, nil, append(headers, "Most", strconv.FormatInt(most, 10))...)
	if a == nil || method == "HEAD" {
		return
	}
	s.judge(path, a)
}

// soakAnswer is what a client got.
type soakAnswer struct {
	status int
	header http.Header
	length int64
	text   string
	whole  bool // it ended as an answer ends
	left   bool // the client hung up
}

// ask sends a request. A header "Most" stays here: the client hangs up after as many
// bytes. It is nil when there was no answer.
func (s *soak) ask(method, at string, body io.Reader, headers ...string) *soakAnswer {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, s.server.url+at, body)
	if err != nil {
		s.Error(err)
		return nil
	}
	req.Header.Set("Authorization", "Bearer "+deskToken)
	most := int64(1 << 40)
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Most" {
			most, _ = strconv.ParseInt(headers[i+1], 10, 64)
			continue
		}
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := s.client.RoundTrip(req)
	if err != nil {
		s.Errorf("%s %s: no answer: %v", method, at, err)
		return nil
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, most))
	left := int64(len(text)) == most
	return &soakAnswer{res.StatusCode, res.Header, res.ContentLength, string(text), err == nil && !left, left}
}

var soakRange = regexp.MustCompile(`^bytes (\d+)-(\d+)/(\d+)$`)

// judge wants what was served to be what some version of the source has there.
func (s *soak) judge(path string, a *soakAnswer) {
	from, total, length := 0, -1, int(a.length)
	switch a.status {
	case http.StatusOK:
		total = length
		if a.whole {
			total = len(a.text)
		}
	case http.StatusPartialContent:
		m := soakRange.FindStringSubmatch(a.header.Get("Content-Range"))
		if m == nil {
			s.Errorf("%s: 206 with Content-Range %q", path, a.header.Get("Content-Range"))
			return
		}
		from, _ = strconv.Atoi(m[1])
		total, _ = strconv.Atoi(m[3])
	case http.StatusNotModified:
		s.count("not modified")
		return
	default:
		s.count(strconv.Itoa(a.status))
		if a.status == 500 || a.status == 508 {
			s.Errorf("%s: status %d: %s", path, a.status, a.text)
		}
		return
	}
	switch {
	case a.left:
		s.count("left")
	case !a.whole:
		s.count("cut")
	case a.status == http.StatusOK:
		s.count("whole")
	default:
		s.count("part")
	}
	if !a.whole && strings.HasPrefix(path, "blob/") {
		return // cut because its digest is wrong
	}
	if a.status == http.StatusPartialContent && strings.HasPrefix(path, "blob/") {
		a.text = s.withoutDamage(path, from, a.text) // a part cannot be verified
	}
	if !s.hadThere(path, from, total, a.text) {
		s.Errorf("%s: status %d: %d bytes from %d of %d, whole %v, are of no version up to %d", path, a.status, len(a.text), from, total, a.whole, s.currentVersion(path))
	}
}

// withoutDamage is a part of a blob with the bytes mended that upstream inverted.
func (s *soak) withoutDamage(path string, from int, text string) string {
	source, mended := s.sourceText(path, 0), []byte(text)
	for i := range mended {
		if at := from + i; at < len(source) && mended[i] == ^source[at] {
			mended[i] = source[at]
		}
	}
	return string(mended)
}

// hadThere reports whether a version of a file with this size, where it is known, has
// the text at a place.
func (s *soak) hadThere(path string, from, total int, text string) bool {
	for version := int64(s.currentVersion(path)); version >= 0; version-- {
		source := s.sourceText(path, uint64(version))
		if (total < 0 || total == len(source)) && from+len(text) <= len(source) && source[from:from+len(text)] == text {
			return true
		}
	}
	return false
}

// useLocal writes, reads or removes a file of the local repository. Nobody else does.
func (s *soak) useLocal(r *rand.Rand, at string, mine map[string][]string) {
	if mine[at] == nil {
		mine[at] = []string{""}
	}
	next := ""
	method := []string{"PUT", "GET", "GET", "DELETE"}[r.IntN(4)]
	var body io.Reader
	switch method {
	case "GET":
		a := s.ask(method, at, nil)
		if a == nil || a.status >= 500 || !a.whole {
			return
		}
		if a.status == http.StatusNotFound {
			a.text = ""
		}
		for _, may := range mine[at] {
			if may == a.text {
				mine[at] = []string{may}
				return
			}
		}
		s.Errorf("%s: status %d with %d bytes that were not written last", at, a.status, len(a.text))
		return
	case "PUT":
		next = s.sourceText(at, r.Uint64())
		body = struct{ io.Reader }{strings.NewReader(next)} // of unknown length
		if r.IntN(2) == 0 {
			body = strings.NewReader(next)
		}
	}
	a := s.ask(method, at, body)
	switch {
	case a != nil && (a.status/100 == 2 || a.status == http.StatusNotFound):
		s.count("written")
		mine[at] = []string{next}
	default: // whoever says no may have done it
		s.count("not written")
		mine[at] = append(mine[at], next)
	}
}

// ---- the end

// wantAllWell wants each file in its current version from a server that is healthy.
func (s *soak) wantAllWell() {
	s.Helper()
	for i := range soakFiles {
		for _, kind := range []string{"fixed", "changing", "blob"} {
			path := fmt.Sprintf("%s/%d", kind, i)
			want, at := s.sourceText(path, s.currentVersion(path)), "/api/r/"+path
			if kind == "blob" {
				at = "/v2/img/x/blobs/" + digestOf(want)
			}
			awaitThat(s, path+" in its current version", func() bool {
				a := s.ask("GET", at, nil)
				return a != nil && a.status == http.StatusOK && a.whole && a.text == want
			})
		}
	}
	awaitThat(s, "health", func() bool {
		a := s.ask("GET", "/health", nil)
		return a != nil && a.status == http.StatusOK && strings.Contains(a.text, `"healthy"`)
	})
}

// soakMeasure is what must not grow.
type soakMeasure struct{ goroutines, files, memory float64 }

func (s *soak) measure() soakMeasure {
	s.Helper()
	a := s.ask("GET", "/metrics", nil)
	if a == nil {
		return soakMeasure{}
	}
	value := func(name string) float64 {
		m := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindStringSubmatch(a.text)
		if m == nil {
			s.Errorf("no %s in /metrics", name)
			return 0
		}
		v, _ := strconv.ParseFloat(m[1], 64)
		return v
	}
	return soakMeasure{value("go_goroutines"), value("process_open_fds"), value("process_resident_memory_bytes")}
}

// wantNothingLeft wants no more goroutines and descriptors than before but for pools
// of connections, no spools, memory as in the middle of the run, and a store without
// faults.
func (s *soak) wantNothingLeft(before, middle soakMeasure) {
	s.Helper()
	const pools = 16
	var now soakMeasure
	for range 100 {
		if now = s.measure(); now.goroutines <= before.goroutines+pools && now.files <= before.files+pools {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	s.Logf("before %.0f, in the middle %.0f, at the end %.0f", before, middle, now)
	if now.goroutines > before.goroutines+pools || now.files > before.files+pools {
		s.Errorf("left over: %.0f goroutines and %.0f descriptors, before %.0f and %.0f", now.goroutines, now.files, before.goroutines, before.files)
	}
	if now.memory > middle.memory*1.5+(32<<20) {
		s.Errorf("memory grows: %.0f bytes, %.0f in the middle of the run", now.memory, middle.memory)
	}
	s.server.wantNoLeftovers()
	if code := s.server.stop(); code != 0 {
		s.Errorf("exit status %d", code)
	}
	if len(s.wires) == 0 {
		s.server.wantVerified()
	}
}
