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
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Variables of a child: what it is and how it is to fail.
const (
	childMark  = "ARTIFACTAPI_TEST_CHILD" // "1": be the real server
	childStep  = "ARTIFACTAPI_TEST_STEP"  // kill -9 at this step of the disk store ...
	childCount = "ARTIFACTAPI_TEST_COUNT" // ... the nth time it is reached
	childFSize = "ARTIFACTAPI_TEST_FSIZE" // RLIMIT_FSIZE
)

// childMain is the test binary as the real server.
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

// serveUntilStep is serve with a process that kills itself at a step of the
// disk store. The step "list" prints their names as they are taken.
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
	if s.stores, err = openStores(set, s.log); err != nil {
		return err
	}
	handler := s.wire()
	count, _ := strconv.Atoi(os.Getenv(childCount))
	var mu sync.Mutex // guards count
	s.stores.disk.step = func(name string) {
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
	return s.run(ctx, listener, handler)
}

// child is a server in a process of its own.
type child struct {
	testing.TB
	cmd    *exec.Cmd
	url    string
	dir    string
	client *http.Transport
	exited chan struct{} // closed when the process is gone
	err    error         // of its end

	mu  sync.Mutex // guards out
	out bytes.Buffer
}

// childSetup is what a child runs over.
type childSetup struct {
	yaml string
	dir  string // with remotes.yaml and data; "": a new one
	env  []string
	args []string
}

// start runs a child until its test ends.
func (s childSetup) start(t testing.TB) *child {
	t.Helper()
	if s.dir == "" {
		s.dir = t.TempDir()
	}
	c := &child{TB: t, dir: s.dir, exited: make(chan struct{}), client: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 256}}
	c.configure(s.yaml)
	c.cmd = exec.Command(os.Args[0], s.args...)
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

// configure writes remotes.yaml, in one step as editors and mounts do.
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

// read collects what the child says and finds its address in it.
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

// kill is kill -9.
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

// stop ends the child as Kubernetes does and returns its exit status.
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

// asker makes the verbs of a tester speak to the child.
func (c *child) tester() *tester {
	return &tester{TB: c.TB, url: c.url, client: c.client}
}

// memory is a line of /proc/PID/status in bytes.
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

// wantNoLeftovers says that nothing temporary is in DATA_DIR.
func (c *child) wantNoLeftovers() {
	c.Helper()
	if names, _ := filepath.Glob(c.dir + "/data/.spool/*"); len(names) > 0 {
		c.Errorf("spools are left: %v", names)
	}
}
