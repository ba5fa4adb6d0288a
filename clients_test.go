// clients_test.go: real clients in front of a server in a process of its own.
// TEST_CLIENTS turns them on: "1", or the path of a built binary to ask instead of
// the test binary. What is not installed is skipped by name; .ci/clients installs.
//
// Each client goes through the same story (playClient) with fresh state of its own
// each time, so that what it gets comes from the server and not from its own cache.
// The clients of packages are in clients_packages_test.go, those of images in
// clients_images_test.go.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// realClient is a client with what an upstream has for it. Its upstream publishes
// "one" and later "two"; the client says which of them it got.
type realClient struct {
	name    string
	needs   []string // commands without which it is skipped
	mounts  bool     // it works as root with mounts of its own
	keys    string   // of its remote r, beside base_url and cache
	publish func(d *desk, version string)
	fetch   func(d *desk) (version string)
}

func TestRealClients(t *testing.T) {
	t.Parallel()
	if os.Getenv("TEST_CLIENTS") == "" {
		t.Skip("TEST_CLIENTS is not set")
	}
	clients := slices.Concat(fileClients(), packageClients(), imageClients(t))
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			needCommands(t, c.needs...)
			if c.mounts && exec.Command("unshare", "--mount", "true").Run() != nil {
				t.Skipf("%s needs root that may mount", c.name)
			}
			playClient(t, c)
		})
	}
}

// needCommands skips a test where a command is missing.
func needCommands(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("%s is not installed", name)
		}
	}
}

// playClient is the story of a client: cold, warm, upstream stopped, TTL over,
// upstream changed, and changed copies while upstream is stopped.
func playClient(t *testing.T, c realClient) {
	d := newDesk(t, c.keys)
	c.publish(d, "one")
	for _, act := range []struct {
		name    string
		prepare func()
		want    string
		asks    bool // upstream is asked
	}{
		{"cold", func() {}, "one", true},
		{"warm", func() {}, "one", false},
		{"upstream stopped", d.up.stop, "one", false},
		{"TTL over", func() { d.up.start(); d.setTTL(0) }, "one", true},
		{"upstream changed", func() { c.publish(d, "two") }, "two", true},
		{"TTL over and upstream stopped", d.up.stop, "two", false},
	} {
		act.prepare()
		d.up.forget()
		d.home = shortDir(d)
		began := time.Now()
		got := c.fetch(d)
		t.Logf("%s: %v", act.name, time.Since(began).Round(time.Millisecond))
		asked := d.up.asked()
		if got != act.want {
			t.Fatalf("%s: it got %q, want %q; upstream was asked for %q", act.name, got, act.want, asked)
		}
		if (len(asked) > 0) != act.asks {
			t.Fatalf("%s: upstream was asked for %q", act.name, asked)
		}
		d.settle()
	}
	if code := d.server.stop(); code != 0 {
		t.Errorf("exit status %d", code)
	}
	d.server.wantVerified()
}

// desk is where a client works: a server with one remote r, the upstream of it, and
// a home directory.
type desk struct {
	testing.TB
	up     *realUpstream
	server *child
	keys   string
	host   string // of the server, with its port
	home   string // of the client, new for each act
}

func newDesk(t testing.TB, keys string) *desk {
	t.Helper()
	d := &desk{TB: t, keys: keys, up: newRealUpstream(t), host: freeAddress(t)}
	d.home = shortDir(d)
	program := os.Getenv("TEST_CLIENTS")
	if program == "1" {
		program = ""
	}
	d.server = childSetup{yaml: d.yaml(3600), bin: program, env: []string{
		"LISTEN_ADDR=" + d.host, "PUBLIC_URL=http://" + d.host, "API_TOKEN=" + deskToken,
		"PATH=" + os.Getenv("PATH"), "HOME=" + d.home,
	}}.start(t)
	return d
}

const deskToken = "token-of-the-desk"

func (d *desk) yaml(ttl int) string {
	return fmt.Sprintf("remotes:\n  r:\n    base_url: %s\n    cache: {mutable_ttl: %d}\n%s  here:\n    type: local\n", d.up.url, ttl, d.keys)
}

// setTTL reloads the configuration with another mutable_ttl, which copies that are
// stored follow: a TTL ends without waiting for it.
func (d *desk) setTTL(ttl int) {
	d.Helper()
	const loaded = `"configuration loaded"`
	n := strings.Count(d.server.logs(), loaded)
	d.server.configure(d.yaml(ttl))
	if err := d.server.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		d.Fatal(err)
	}
	awaitThat(d, "the reload", func() bool { return strings.Count(d.server.logs(), loaded) > n })
}

// settle waits until all that was fetched is stored.
func (d *desk) settle() {
	d.Helper()
	awaitThat(d, "the fills to be stored", func() bool {
		text := d.server.tester().get("/metrics").text
		return strings.Contains(text, "artifactapi_fills_in_flight{remote=\"r\"} 0\n") && strings.Contains(text, "artifactapi_fills_storing 0\n")
	})
}

// url is a file of the remote.
func (d *desk) url(path string) string { return "http://" + d.host + "/api/r/" + path }

// shortDir is a temporary directory with a short and plain name: sockets are below it,
// podman counts, and apt splits at commas.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "desk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// run runs a command in the client's home with little else in its environment, and
// returns what it printed to standard output. It must succeed.
func (d *desk) run(name string, args ...string) string {
	d.Helper()
	return d.runWith(nil, name, args...)
}

func (d *desk) runWith(env []string, name string, args ...string) string {
	d.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = d.home
	cmd.Env = append([]string{"HOME=" + d.home, "PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "NO_PROXY=*"}, env...)
	cmd.WaitDelay = 5 * time.Second // children that keep its output open
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		d.Fatalf("%s %q: %v\n%s%s\nupstream was asked for %q", name, args, err, out.String(), errs.String(), d.up.asked())
	}
	return out.String()
}

// write writes a file below the directory of the upstream.
func (d *desk) write(path string, text string) {
	d.Helper()
	writeFile(d, filepath.Join(d.up.dir, path), text)
}

func writeFile(t testing.TB, name, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// read reads a file of the client's home, or one elsewhere.
func (d *desk) read(name string) string {
	d.Helper()
	if !filepath.IsAbs(name) {
		name = filepath.Join(d.home, name)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		d.Fatal(err)
	}
	return string(text)
}

// startService starts a program that serves until the test ends, and waits for its
// address, of TCP or the path of a socket. It returns what ends it earlier.
func startService(t testing.TB, address, name string, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = cmd.Wait()
	}()
	stop = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-exited
		}
	})
	t.Cleanup(stop)
	network := "tcp"
	if strings.HasPrefix(address, "/") {
		network = "unix"
	}
	awaitThat(t, name+" to listen", func() bool {
		select {
		case <-exited:
			t.Fatalf("%s %q ended: %s", name, args, out.String())
		default:
		}
		c, err := net.Dial(network, address)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return stop
}

// addressesGiven counts what freeAddress has given, so that it gives none twice.
var addressesGiven atomic.Int64

// freeAddress is an address of loopback that nobody listens on. Its port is below those
// that the kernel gives to others (ip_local_port_range), so it stays free until the
// server that it is for listens.
func freeAddress(t testing.TB) string {
	t.Helper()
	for range 100 {
		port := 10_240 + (int64(os.Getpid())*101+addressesGiven.Add(1))%20_000
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no free port")
	return ""
}

// realUpstream serves a directory, or what handler is, at an address that refuses
// connections while it is stopped.
type realUpstream struct {
	testing.TB
	url     string
	address string
	dir     string
	end     func() // of what start began

	mu      sync.Mutex // guards what follows
	handler http.Handler
	seen    []string
}

func newRealUpstream(t testing.TB) *realUpstream {
	t.Helper()
	u := &realUpstream{TB: t, address: freeAddress(t), dir: shortDir(t)}
	u.url = "http://" + u.address
	u.handler = http.HandlerFunc(u.serveFile)
	u.start()
	t.Cleanup(u.stop)
	return u
}

func (u *realUpstream) start() {
	u.Helper()
	var l net.Listener
	awaitThat(u, "the address of upstream to be free", func() bool { // a connection may have its port
		var err error
		l, err = net.Listen("tcp", u.address)
		return err == nil
	})
	server := &http.Server{Handler: u}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	u.end = func() {
		_ = server.Close()
		<-done
	}
}

// stop makes the address refuse connections, and breaks those there are.
func (u *realUpstream) stop() { u.end() }

func (u *realUpstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	u.seen = append(u.seen, r.Method+" "+r.RequestURI)
	handler := u.handler
	u.mu.Unlock()
	handler.ServeHTTP(w, r)
}

// passOn makes h answer instead of the directory.
func (u *realUpstream) passOn(h http.Handler) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.handler = h
}

// serveFile serves with a strong ETag: two versions may be of the same second.
func (u *realUpstream) serveFile(w http.ResponseWriter, r *http.Request) {
	name := filepath.Join(u.dir, filepath.Clean("/"+r.URL.Path))
	if info, err := os.Stat(name); err == nil && info.IsDir() {
		name += "/index.html"
	}
	text, err := os.ReadFile(name)
	if err != nil {
		http.NotFound(w, r)
		return
	}
	info, err := os.Stat(name)
	if err != nil {
		http.NotFound(w, r)
		return
	}
	if bytes.HasPrefix(text, []byte("{")) {
		w.Header().Set("Content-Type", "application/json")
	}
	w.Header().Set("ETag", fmt.Sprintf(`"%x"`, sha256.Sum256(text)))
	http.ServeContent(w, r, name, info.ModTime(), bytes.NewReader(text))
}

func (u *realUpstream) asked() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.seen)
}

func (u *realUpstream) forget() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.seen = nil
}

// ---- clients that fetch files

const pubFile = "pub/file-1.0+b~1.bin"

// versionText is a body of n bytes that is a version.
func versionText(version string, n int) string { return noise(uint64(len(version)+int(version[0])), n) }

const versionSize = 6 << 20

// publishFile is the upstream of those.
func publishFile(d *desk, version string) {
	d.write(pubFile, versionText(version, versionSize))
}

// versionOf says which version a body is.
func (d *desk) versionOf(text string) string {
	for _, version := range []string{"one", "two"} {
		if text == versionText(version, len(text)) && len(text) == versionSize {
			return version
		}
	}
	return fmt.Sprintf("a body of %d bytes that is no version", len(text))
}

func fileClients() []realClient {
	file := func(name, command string, fetch func(d *desk)) realClient {
		return realClient{
			name: name, needs: []string{command}, keys: "    mutable_patterns: ['^pub/']\n    check_mutable_updates: true\n", publish: publishFile,
			fetch: func(d *desk) string {
				fetch(d)
				return d.versionOf(d.read("file"))
			},
		}
	}
	curl := []string{"-sS", "--fail", "-o", "file"}
	return []realClient{
		file("curl", "curl", func(d *desk) { d.run("curl", append(curl, d.url(pubFile))...) }),
		file("curl that resumes", "curl", func(d *desk) {
			d.run("curl", append(curl, "-r", "0-1999999", d.url(pubFile))...)
			d.run("curl", append(curl, "-C", "-", d.url(pubFile))...)
		}),
		file("curl that has it", "curl", func(d *desk) {
			d.run("curl", append(curl, "-R", d.url(pubFile))...)
			code := d.run("curl", append(curl, "-z", "file", "-w", "%{http_code}", d.url(pubFile))...)
			if code != "304" {
				d.Errorf("-z with the file just fetched: status %s, want 304", code)
			}
		}),
		file("wget", "wget", func(d *desk) { d.run("wget", "-q", "-O", "file", d.url(pubFile)) }),
		file("wget that resumes", "wget", func(d *desk) {
			d.run("wget", "-q", "-O", "file", d.url(pubFile))
			writeFile(d, d.home+"/file", d.read("file")[:1_000_000])
			d.run("wget", "-q", "-c", "-O", "file", d.url(pubFile))
		}),
		file("aria2c, in pieces", "aria2c", func(d *desk) {
			d.run("aria2c", "-q", "-x4", "-s4", "-k1M", "-o", "file", d.url(pubFile))
		}),
		apkClient(),
	}
}

// apkClient is the requests of apk as they were recorded: an index and a package
// over one connection, which it keeps only if the answer says so in words.
func apkClient() realClient {
	const index, pkg = "v3.20/main/x86_64/APKINDEX.tar.gz", "v3.20/main/x86_64/hello-%s-r0.apk"
	return realClient{
		name: "apk, its requests", keys: "    package: alpine\n",
		publish: func(d *desk, version string) {
			d.write(index, version)
			d.write(fmt.Sprintf(pkg, version), versionText(version, versionSize))
		},
		fetch: func(d *desk) string {
			conn := newApkConnection(d)
			defer conn.close()
			version := conn.get(index)
			got := d.versionOf(conn.get(fmt.Sprintf(pkg, version)))
			if got != version {
				return "an index of " + version + " and a package that is " + got
			}
			return got
		},
	}
}

// apkConnection is apk's connection to the server.
type apkConnection struct {
	*desk
	conn net.Conn
	r    *bufio.Reader
}

func newApkConnection(d *desk) *apkConnection {
	d.Helper()
	conn, err := net.Dial("tcp", d.host)
	if err != nil {
		d.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	return &apkConnection{d, conn, bufio.NewReader(conn)}
}

func (c *apkConnection) close() { _ = c.conn.Close() }

func (c *apkConnection) get(path string) string {
	c.Helper()
	_, err := fmt.Fprintf(c.conn, "GET /api/r/%s HTTP/1.1\r\nHost: %s\r\nUser-Agent: apk-tools/2.14.4\r\nCache-Control: no-cache\r\n\r\n", path, c.host)
	if err != nil {
		c.Fatal(err)
	}
	res, err := http.ReadResponse(c.r, nil)
	if err != nil {
		c.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 || res.ContentLength < 0 || res.Header.Get("Connection") != "keep-alive" {
		c.Fatalf("%s: %s, length %d, Connection: %s, %v", path, res.Status, res.ContentLength, res.Header.Get("Connection"), err)
	}
	return string(text)
}

// TestRealUploads writes to a local repository with curl -T, of known length and not.
func TestRealUploads(t *testing.T) {
	t.Parallel()
	if os.Getenv("TEST_CLIENTS") == "" {
		t.Skip("TEST_CLIENTS is not set")
	}
	needCommands(t, "curl")
	d := newDesk(t, "")
	text := versionText("one", versionSize)
	writeFile(t, d.home+"/up", text)
	token := []string{"-sS", "--fail", "-H", "Authorization: Bearer " + deskToken}
	at := "http://" + d.host + "/api/here/dir/"
	d.run("curl", append(token, "-T", "up", at)...)
	d.run("curl", append(token, "-T", "up", "-H", "Transfer-Encoding: chunked", at+"chunked")...)
	d.run("curl", append(token, "-T", "up", "-H", "Expect: 100-continue", at+"waited-for")...)
	for _, name := range []string{"up", "chunked", "waited-for"} {
		if d.run("curl", "-sS", "--fail", at+name) != text {
			t.Errorf("%s came back with other bytes", name)
		}
	}
}

const nginxConf = `daemon off;
master_process off;
error_log stderr;
pid nginx.pid;
events {}
http {
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  server {
    listen %s ssl http2;
    ssl_certificate cert.pem;
    ssl_certificate_key key.pem;
    client_max_body_size 0;
    location / {
      proxy_pass http://%s;
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 600s;
    }
  }
}
`

// TestBehindNginx speaks HTTP/2 to an nginx in front of the server: a long body whose
// length nobody knows, cold and from the store, a part of it, and a long upload.
func TestBehindNginx(t *testing.T) {
	t.Parallel()
	if os.Getenv("TEST_CLIENTS") == "" {
		t.Skip("TEST_CLIENTS is not set")
	}
	needCommands(t, "nginx", "curl")
	d := newDesk(t, "")
	long := versionText("one", 48<<20)
	d.up.passOn(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush() // no length
		_, _ = io.WriteString(w, long)
	}))
	front, pair := freeAddress(t), newTLSPair(t)
	writeFile(t, d.home+"/cert.pem", string(pair.certPEM))
	writeFile(t, d.home+"/key.pem", string(pair.keyPEM))
	writeFile(t, d.home+"/nginx.conf", fmt.Sprintf(nginxConf, front, d.host))
	startService(t, front, "nginx", "-p", d.home, "-e", "stderr", "-c", d.home+"/nginx.conf")
	curl := func(args ...string) string {
		return d.run("curl", append([]string{"-sS", "--fail", "--http2", "--insecure"}, args...)...)
	}
	if v := d.run("curl", "-sS", "--http2", "--insecure", "-o", "health", "-w", "%{http_version}", "https://"+front+"/health"); v != "2" {
		t.Fatalf("nginx speaks HTTP %s, want 2", v)
	}
	at := "https://" + front + "/api/r/long.bin"
	for _, act := range []string{"cold", "warm"} {
		if curl(at) != long {
			t.Errorf("%s: other bytes", act)
		}
		d.settle()
	}
	if n := len(d.up.asked()); n != 1 {
		t.Errorf("upstream was asked %d times, want once", n)
	}
	if curl("-r", "40000000-", at) != long[40_000_000:] {
		t.Error("a range has other bytes")
	}
	writeFile(t, d.home+"/up", long)
	at = "https://" + front + "/api/here/up"
	curl("-o", "answer", "-H", "Authorization: Bearer "+deskToken, "-T", "up", at)
	if curl(at) != long {
		t.Error("an upload came back with other bytes")
	}
}
