package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Environment variables of a child process: they say how it fails.
const (
	childMark  = "ARTIFACTAPI_TEST_CHILD" // "1": the test binary is a server
	childStep  = "ARTIFACTAPI_TEST_STEP"  // kill -9 at this step of the disk store ...
	childCount = "ARTIFACTAPI_TEST_COUNT" // ... the nth time it is reached
	childFSize = "ARTIFACTAPI_TEST_FSIZE" // RLIMIT_FSIZE
)

// childMain runs the test binary as a server and returns the exit status.
func childMain() int {
	if v := os.Getenv(childFSize); v != "" {
		n, _ := strconv.ParseUint(v, 10, 64)
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 3
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	step := os.Getenv(childStep)
	if step == "" {
		return run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr)
	}
	if err := serveUntilStep(ctx, step); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// serveUntilStep is serve in a process that kills itself at a step of the disk store.
// The step "list" prints the name of each step instead.
func serveUntilStep(ctx context.Context, step string) error {
	set, err := parseSettings(os.LookupEnv)
	if err != nil {
		return err
	}
	cfg, err := loadConfig(set.configPath, os.LookupEnv)
	if err != nil {
		return err
	}
	s := &server{set: set, env: os.LookupEnv, log: newLogger(set, os.Stderr)}
	s.config.Store(cfg)
	listener, err := net.Listen("tcp", set.listen)
	if err != nil {
		return err
	}
	s.stores = openStores(set, time.Now, s.log)
	handler := s.newHandler()
	count, _ := strconv.Atoi(os.Getenv(childCount))
	var mu sync.Mutex // guards count
	s.stores.disk.stepDone = func(name string) {
		mu.Lock()
		defer mu.Unlock()
		if step == "list" {
			s.log.Info("step", "name", name)
			return
		}
		if name != step {
			return
		}
		if count--; count > 0 {
			return
		}
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	s.log.Info("artifactapi starts", "address", listener.Addr().String())
	return s.serveUntilDone(ctx, listener, handler)
}

// child is a server in a process of its own.
type child struct {
	testing.TB
	cmd    *exec.Cmd
	url    string
	dir    string
	client *http.Transport
	exited chan struct{} // closed when the process has ended
	err    error         // of Wait

	mu  sync.Mutex // guards out
	out bytes.Buffer
}

// childSetup describes a child to start.
type childSetup struct {
	yaml string
	dir  string // holds remotes.yaml and data; "": a new directory
	env  []string
	args []string
	bin  string            // the program; "": the test binary
	born func(*os.Process) // called with the process before it listens
}

// start starts a child that runs until its test ends.
func (s childSetup) start(t testing.TB) *child {
	t.Helper()
	if s.dir == "" {
		s.dir = t.TempDir()
	}
	c := &child{TB: t, dir: s.dir, exited: make(chan struct{}), client: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 256}}
	c.configure(s.yaml)
	if s.bin == "" {
		s.bin = os.Args[0]
	}
	c.cmd = exec.Command(s.bin, s.args...)
	c.cmd.Env = append([]string{
		childMark + "=1", "CONFIG_PATH=" + c.dir + "/remotes.yaml", "DATA_DIR=" + c.dir + "/data",
		"LISTEN_ADDR=127.0.0.1:0", "LOG_FORMAT=json", "LOG_LEVEL=debug", "MIN_FREE=1MiB", "GORACE=" + os.Getenv("GORACE"),
	}, s.env...)
	errs, err := c.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if s.born != nil {
		go s.born(c.cmd.Process)
	}
	address := make(chan string, 1)
	go func() {
		defer close(c.exited)
		c.read(errs, address)
		c.err = c.cmd.Wait()
	}()
	t.Cleanup(func() {
		c.kill()
		c.client.CloseIdleConnections()
		if t.Failed() && testing.Verbose() {
			t.Logf("the child said:\n%s", c.logs())
		}
	})
	select {
	case at := <-address:
		c.url = "http://" + at
	case <-c.exited:
		t.Fatalf("the child ended at once: %v\n%s", c.err, c.logs())
	case <-time.After(20 * time.Second):
		t.Fatalf("the child does not listen\n%s", c.logs())
	}
	return c
}

// configure replaces remotes.yaml in one step, as editors and mounts do.
func (c *child) configure(yaml string) {
	c.Helper()
	temp := c.dir + "/next"
	if err := os.WriteFile(temp, []byte(yaml), 0o644); err != nil {
		c.Fatal(err)
	}
	if err := os.Rename(temp, c.dir+"/remotes.yaml"); err != nil {
		c.Fatal(err)
	}
}

// read collects the output of the child and sends the address that it listens on.
func (c *child) read(r interface{ Read([]byte) (int, error) }, address chan<- string) {
	for lines := bufio.NewScanner(r); lines.Scan(); {
		line := lines.Bytes()
		c.mu.Lock()
		c.out.Write(line)
		c.out.WriteByte('\n')
		c.mu.Unlock()
		var said struct{ Msg, Address string }
		if json.Unmarshal(line, &said) == nil && said.Msg == "artifactapi starts" {
			address <- said.Address
		}
	}
}

func (c *child) logs() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.String()
}

// wantLog waits for a line that holds text.
func (c *child) wantLog(text string) {
	c.Helper()
	awaitThat(c, "a child's log line with "+text, func() bool { return strings.Contains(c.logs(), text) })
}

// kill kills the child with SIGKILL and waits for its end.
func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	<-c.exited
}

// awaitDeath waits for the child to kill itself.
func (c *child) awaitDeath() {
	c.Helper()
	select {
	case <-c.exited:
	case <-time.After(20 * time.Second):
		c.Fatalf("the child did not reach its step\n%s", c.logs())
	}
	if ws, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
		c.Fatalf("the child ended by itself: %v\n%s", c.err, c.logs())
	}
}

// stop ends the child with SIGTERM, as Kubernetes does, and returns its exit status.
func (c *child) stop() int {
	c.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		c.Fatal(err)
	}
	select {
	case <-c.exited:
	case <-time.After(40 * time.Second):
		c.Fatalf("the child does not stop\n%s", c.logs())
	}
	return c.cmd.ProcessState.ExitCode()
}

// again starts another child over the same directory.
func (c *child) again(env ...string) *child {
	c.Helper()
	<-c.exited
	yaml, err := os.ReadFile(c.dir + "/remotes.yaml")
	if err != nil {
		c.Fatal(err)
	}
	return childSetup{yaml: string(yaml), dir: c.dir, env: env}.start(c.TB)
}

// tester returns a tester whose requests go to the child.
func (c *child) tester() *tester {
	return &tester{TB: c.TB, url: c.url, client: c.client}
}

// memory returns the value of a line of /proc/PID/status, in bytes.
func (c *child) memory(name string) int64 {
	c.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		c.Skipf("no /proc here: %v", err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				c.Fatal(err)
			}
			return n << 10
		}
	}
	c.Fatalf("no %s in /proc/PID/status", name)
	return 0
}

// wantNoLeftovers wants no temporary file in DATA_DIR.
func (c *child) wantNoLeftovers() {
	c.Helper()
	awaitThat(c, "the spools to be gone", func() bool {
		names, _ := filepath.Glob(c.dir + "/data/.spool/*")
		return len(names) == 0
	})
}

// --- kill -9 at each step of storing ---

// killScene is an operation of a server on its store, and what may be stored if the
// server is killed during it. All is about one file.
type killScene struct {
	name    string
	prepare func(tt *tester, o *testOrigin) // before the operation
	act     func(tt *tester, o *testOrigin)
	old     string            // content before the operation; "": none
	new     string            // content after it; "": none
	point   string            // from its last time on the new content is stored
	remote  string            // of the file
	file    string            // its path
	names   map[string]string // by content, what the file at killNamed then is; nil: none
}

const killYAML = `
remotes:
  r:
    base_url: ORIGIN
    mutable_patterns: ["."]
    stale_if_error: true
    cache: {mutable_ttl: 0}
  deb:
    base_url: ORIGIN
    package: deb
    stale_if_error: true
    cache: {mutable_ttl: 0}
`

// killNamed is a file that a root names.
const killNamed = "dists/t/main/binary-amd64/Packages.gz"

func killScenes() []killScene {
	old, next := noise(1, 300_000), noise(2, 200_000)
	first := func(tt *tester, o *testOrigin) {
		o.file("/a", old)
		tt.get("/api/r/a").wantStatus(200).wantBody(old)
		awaitThat(tt, "the copy to be stored", func() bool { return tt.get("/artifacts/r").has(`"path": "a"`) })
	}
	return []killScene{
		{"commit", func(*tester, *testOrigin) {}, func(tt *tester, o *testOrigin) {
			o.file("/a", next)
			tt.get("/api/r/a")
		}, "", next, "body moved", "r", "a", nil},
		{"small commit", func(*tester, *testOrigin) {}, func(tt *tester, o *testOrigin) {
			o.file("/a", "small")
			tt.get("/api/r/a")
		}, "", "small", "record beside it written", "r", "a", nil},
		{"replacement", first, func(tt *tester, o *testOrigin) {
			o.file("/a", next)
			for n := o.requests("/a"); o.requests("/a") == n; { // the first fill may not be stored yet
				tt.get("/api/r/a")
			}
		}, old, next, "body moved", "r", "a", nil},
		{"purge", first, func(tt *tester, _ *testOrigin) {
			tt.delete("/artifacts/r/a", "Authorization: Bearer t")
		}, old, "", "removed a", "r", "a", nil},
		flipScene(),
	}
}

// flipScene is the step of a repository from one generation to the next: a file that
// the root names is stored, then the root.
func flipScene() killScene {
	const root = "dists/t/InRelease"
	publish := func(o *testOrigin, packages string) {
		o.file("/"+killNamed, packages)
		o.file("/"+root, releaseNaming(packages)).etag(`"` + packages + `"`)
	}
	return killScene{name: "flip", remote: "deb", file: root, old: releaseNaming("one"), new: releaseNaming("two"), point: "body moved",
		names: map[string]string{releaseNaming("one"): "one", releaseNaming("two"): "two"},
		prepare: func(tt *tester, o *testOrigin) {
			publish(o, "one")
			tt.get("/api/deb/" + root).wantStatus(200)
			tt.get("/api/deb/" + killNamed).wantStatus(200).wantBody("one")
			awaitThat(tt, "the copy to be stored", func() bool { return tt.get("/artifacts/deb").has(`"path": "` + killNamed) })
		},
		act: func(tt *tester, o *testOrigin) {
			publish(o, "two")
			tt.get("/api/deb/" + root)
		},
	}
}

// releaseNaming is a root that names a file with that text.
func releaseNaming(packages string) string {
	return fmt.Sprintf("Origin: test\nSHA256:\n %s %d %s\n", sha256Hex([]byte(packages)), len(packages), strings.TrimPrefix(killNamed, "dists/t/"))
}

func (g *got) has(text string) bool { return strings.Contains(g.text, text) }

func TestKilledAtEachStep(t *testing.T) {
	t.Parallel()
	for _, scene := range killScenes() {
		t.Run(scene.name, func(t *testing.T) {
			t.Parallel()
			before, steps := scene.steps(t)
			point := lastIndex(steps, scene.point)
			for i, step := range steps {
				count := 1
				for _, s := range append(before, steps[:i]...) {
					if s == step {
						count++
					}
				}
				t.Run(strings.ReplaceAll(step, " ", "-"), func(t *testing.T) { scene.kill(t, step, count, i >= point) })
			}
			if point < 0 {
				t.Errorf("there is no step %q among %q", scene.point, steps)
			}
		})
	}
}

// steps returns the steps of the disk store during the preparation and the operation.
func (s *killScene) steps(t *testing.T) (before, during []string) {
	o := newTestOrigin(t, setup{})
	c := childSetup{yaml: strings.ReplaceAll(killYAML, "ORIGIN", o.url), env: []string{childStep + "=list", "API_TOKEN=t"}}.start(t)
	s.prepare(c.tester(), o)
	c.tester().get("/prepared") // its log line comes behind those of the steps so far
	awaitThat(t, "the log to be read", func() bool { return strings.Contains(c.logs(), "/prepared") })
	n := len(c.steps())
	s.act(c.tester(), o)
	if code := c.stop(); code != 0 {
		t.Fatalf("exit status %d\n%s", code, c.logs())
	}
	all := c.steps()
	return all[:n], all[n:]
}

func (c *child) steps() (names []string) {
	for line := range strings.Lines(c.logs()) {
		var said struct{ Msg, Name string }
		if json.Unmarshal([]byte(line), &said) == nil && said.Msg == "step" {
			names = append(names, said.Name)
		}
	}
	return names
}

// kill runs the scene, kills the server at a step and checks what the next server finds.
func (s *killScene) kill(t *testing.T, step string, count int, done bool) {
	o := newTestOrigin(t, setup{})
	env := []string{childStep + "=" + step, childCount + "=" + strconv.Itoa(count), "API_TOKEN=t"}
	c := childSetup{yaml: strings.ReplaceAll(killYAML, "ORIGIN", o.url), env: env}.start(t)
	s.prepare(c.tester(), o)
	s.act(c.tester(), o)
	c.awaitDeath()

	o.troubled(answers(500)) // from now on every answer comes from the store
	c = c.again("API_TOKEN=t")
	c.wantNoLeftovers()
	at := "/api/" + s.remote + "/" + s.file
	g := c.tester().get(at)
	switch want := s.expected(done); {
	case want == "":
		g.wantStatus(502)
	default:
		g.wantStatus(200).wantBody(want)
	}
	wantNamed := func(g *got) {
		t.Helper()
		if named, found := s.names[g.text]; found {
			c.tester().get("/api/" + s.remote + "/" + killNamed).wantStatus(200).wantBody(named)
		}
	}
	wantNamed(g)
	c.wantVerified()
	if again := c.tester().get(at); again.status != g.status || again.text != g.text {
		t.Errorf("verify dropped what was good: status %d", again.status)
	}
	o.troubled(nil)
	healthy := s.new
	if s.names == nil {
		healthy = "healthy again"
		o.file("/"+s.file, healthy)
	}
	wantNamed(c.tester().get(at).wantStatus(200).wantBody(healthy))
	awaitThat(t, "it to be stored", func() bool {
		return c.tester().get("/artifacts/" + s.remote).has(fmt.Sprintf(`"size": %d,`, len(healthy)))
	})
	c.wantNoLeftovers()
}

// lastIndex is where x is last among all; -1: nowhere.
func lastIndex(all []string, x string) int {
	for i, one := range slices.Backward(all) {
		if one == x {
			return i
		}
	}
	return -1
}

func (s *killScene) expected(done bool) string {
	if done {
		return s.new
	}
	return s.old
}

// wantVerified wants the sub-command verify to find nothing wrong, after a first run has
// removed what a crash left.
func (c *child) wantVerified() {
	c.Helper()
	var out bytes.Buffer
	env := func(name string) (string, bool) {
		v, found := map[string]string{"DATA_DIR": c.dir + "/data", "CONFIG_PATH": c.dir + "/remotes.yaml"}[name]
		return v, found
	}
	_ = run(context.Background(), []string{"verify"}, env, &out, &out)
	out.Reset()
	if code := run(context.Background(), []string{"verify"}, env, &out, &out); code != 0 {
		c.Errorf("verify: exit status %d: %s", code, out.String())
	}
}

func TestKilledInTheMiddleOfAFill(t *testing.T) {
	t.Parallel()
	o := newTestOrigin(t, setup{})
	c := childSetup{yaml: strings.ReplaceAll(killYAML, "ORIGIN", o.url)}.start(t)
	old, next := noise(1, 100_000), noise(2, 3<<20)
	o.file("/a", old)
	c.tester().get("/api/r/a").wantBody(old)
	awaitThat(t, "the copy to be stored", func() bool { return c.tester().get("/artifacts/r").has(`"path": "a"`) })
	o.file("/a", next).stallAt(1 << 20)
	o.file("/b", next).stallAt(1 << 20)
	s := c.tester().open("/api/r/b")
	s.read(1 << 20)
	go func() { // it replaces the copy, once the fill that fetched it is stored
		for o.requests("/a") < 2 {
			c.tester().start(context.Background(), "GET", "/api/r/a", nil).leave()
		}
	}()
	o.awaitRequests("/a", 2)
	awaitThat(t, "both spools", func() bool {
		names, _ := filepath.Glob(c.dir + "/data/.spool/*")
		return len(names) == 2
	})
	c.kill()
	s.rest().wantAborted()
	s.leave()

	o.troubled(answers(500))
	c = c.again()
	c.wantNoLeftovers()
	c.tester().get("/api/r/a").wantStatus(200).wantBody(old)
	c.tester().get("/api/r/b").wantStatus(502)
	c.wantVerified()
	o.troubled(nil)
	o.file("/a", next)
	o.file("/b", next)
	c.tester().get("/api/r/a").wantStatus(200).wantBody(next)
	c.tester().get("/api/r/b").wantStatus(200).wantBody(next)
}

// --- a disk that fills up in the middle ---

func TestDiskFullInTheMiddleOfAFill(t *testing.T) {
	t.Parallel()
	const limit = 1 << 20
	for _, clients := range []int{1, 20} {
		for _, ranges := range []bool{true, false} {
			t.Run(fmt.Sprintf("%d clients, ranges %v", clients, ranges), func(t *testing.T) {
				t.Parallel()
				o := newTestOrigin(t, setup{})
				c := childSetup{yaml: remoteYAML(o.url), env: []string{childFSize + "=" + strconv.Itoa(limit)}}.start(t)
				text := noise(1, 3<<20)
				f := o.file("/a", text).etag(`"1"`)
				if !ranges {
					f.noRanges()
				}
				release := f.stallAt(limit / 2)
				defer release()
				var begun, all sync.WaitGroup
				begun.Add(clients)
				for range clients {
					all.Go(func() {
						s := c.tester().open("/api/r/a")
						defer s.leave()
						s.read(limit / 4)
						begun.Done()
						if g := s.rest().wantAborted(); !strings.HasPrefix(text, g.text) {
							t.Error("wrong bytes before the abort")
						}
					})
				}
				begun.Wait()
				release()
				all.Wait()
				if n := o.requests("/a"); n != 1 {
					t.Errorf("%d upstream requests: %v", n, o.all())
				}
				c.tester().get("/api/r/a").wantUnstored().wantBody(text) // passed on
				c.wantLog("a store failed")
				c.wantNoLeftovers()
				o.file("/small", "fits")
				c.tester().get("/api/r/small").wantBody("fits")
				awaitThat(t, "what fits to be stored", func() bool { return c.tester().get("/artifacts/r").has(`"path": "small"`) })
				if c.tester().get("/artifacts/r").has(`"path": "a"`) {
					t.Error("half a file is stored")
				}
				c.tester().get("/api/r/small").wantHit().wantBody("fits")
			})
		}
	}
}

// --- damaged files in the store ---

func TestDamageIsAMissAndNeverServed(t *testing.T) {
	t.Parallel()
	write := func(t *testing.T, name string, data []byte) {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(t *testing.T, name string) []byte {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	// The files a and b have the same size; body and record are those of a.
	for what, damage := range map[string]func(t *testing.T, body, record, bodyB, recordB string){
		"body cut":        func(t *testing.T, body, _, _, _ string) { write(t, body, read(t, body)[:100]) },
		"body emptied":    func(t *testing.T, body, _, _, _ string) { write(t, body, nil) },
		"body longer":     func(t *testing.T, body, _, _, _ string) { write(t, body, append(read(t, body), "more"...)) },
		"body changed":    func(t *testing.T, body, _, _, _ string) { d := read(t, body); d[50] ^= 1; write(t, body, d) },
		"body of another": func(t *testing.T, body, _, bodyB, _ string) { write(t, body, read(t, bodyB)) },
		"body gone":       func(t *testing.T, body, _, _, _ string) { _ = os.Remove(body) },
		"bodies swapped": func(t *testing.T, body, _, bodyB, _ string) {
			_ = os.Rename(body, body+".x")
			_ = os.Rename(bodyB, body)
			_ = os.Rename(body+".x", bodyB)
		},
		"record cut":     func(t *testing.T, _, record, _, _ string) { d := read(t, record); write(t, record, d[:len(d)/2]) },
		"record emptied": func(t *testing.T, _, record, _, _ string) { write(t, record, nil) },
		"record garbage": func(t *testing.T, _, record, _, _ string) { write(t, record, bytes.Repeat([]byte("{}\n"), 100)) },
		"record changed": func(t *testing.T, _, record, _, _ string) {
			write(t, record, bytes.Replace(read(t, record), []byte(`"p":"a"`), []byte(`"p":"z"`), 1))
		},
		"record of another": func(t *testing.T, _, record, _, recordB string) { write(t, record, read(t, recordB)) },
		"record gone":       func(t *testing.T, _, record, _, _ string) { _ = os.Remove(record) },
		"body and record of another": func(t *testing.T, body, record, bodyB, recordB string) {
			write(t, body, read(t, bodyB))
			write(t, record, read(t, recordB))
		},
		"whole folders swapped": func(t *testing.T, body, _, bodyB, _ string) {
			a, b := filepath.Dir(body), filepath.Dir(bodyB)
			_ = os.Rename(a, a+"x")
			_ = os.Rename(b, a)
			_ = os.Rename(a+"x", b)
		},
	} {
		for _, size := range []int{1000, 200_000} { // kept in memory, and not
			for _, restarts := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, %d bytes, restart %v", what, size, restarts), func(t *testing.T) {
					t.Parallel()
					tt := newTester(t)
					a, b := noise(1, size), noise(2, size)
					tt.origin.file("/a", a)
					tt.origin.file("/b", b)
					body, bodyB := tt.fileOf("a"), tt.fileOf("b")
					damage(t, body, filepath.Dir(body)+"/.record", bodyB, filepath.Dir(bodyB)+"/.record")
					if restarts {
						tt.restart()
					}
					tt.origin.troubled(answers(500)) // nothing undamaged is left, so nothing may be served
					if g := tt.get("/api/r/a"); g.status == 200 && g.text != a {
						t.Errorf("wrong bytes: %s", g.header.Get("Cache-Status"))
					}
					tt.origin.troubled(nil)
					tt.get("/api/r/a").wantStatus(200).wantBody(a)
					tt.get("/api/r/a").wantHit().wantBody(a)
					tt.get("/api/r/b").wantStatus(200).wantBody(b)
					tt.get("/api/r/b").wantHit().wantBody(b)
				})
			}
		}
	}
}

// fileOf fetches /api/r/path and returns the name of its body's file.
func (tt *tester) fileOf(path string) string {
	tt.Helper()
	tt.get("/api/r/" + path).wantStatus(200)
	for _, a := range tt.list("r") {
		if a.Path == path {
			return tt.disk.dir + "/" + a.Key
		}
	}
	tt.Fatalf("%s is not listed", path)
	return ""
}

// An answer whose file is damaged or removed while it is sent must not end as if it were
// whole.
func TestFileThatVanishesUnderAReader(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := noise(1, 24<<20)
	tt.origin.file("/a", text)
	body := tt.fileOf("a")
	s := tt.open("/api/r/a")
	defer s.leave()
	s.read(10)
	if err := os.Truncate(body, 1<<20); err != nil {
		t.Fatal(err)
	}
	if g := s.rest().wantAborted(); !strings.HasPrefix(text, g.text) {
		t.Error("wrong bytes")
	}
	tt.get("/api/r/a").wantMiss().wantBody(text)
	s = tt.open("/api/r/a")
	defer s.leave()
	s.read(10)
	if err := os.RemoveAll(filepath.Dir(body)); err != nil {
		t.Fatal(err)
	}
	s.rest().wantBody(text) // a file that is open stays readable
	tt.get("/api/r/a").wantMiss().wantBody(text)
}
