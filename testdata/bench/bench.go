// Bench loads this program and its peers on loopback, in turns (A B A B), and prints
// a table of ratios. It takes a quiet machine, wrk and nginx; with the registry of the
// CNCF's distribution in PATH, and zot, the registry mirror is compared, too.
//
//	go run testdata/bench/bench.go [-rounds 5] [-seconds 2]
//
// Everything it makes is in a temporary directory, and each process that it starts ends
// with it.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"log"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// entrant is one server in a row of the table.
type entrant struct {
	name string
	pid  int    // of its first process
	url  string // what is loaded, or for cold rows what the numbers are put behind
}

// sample is what one slice of load gave.
type sample struct{ perSecond, cpu float64 } // cpu is in microseconds a request

// bench is one run of this program.
type bench struct {
	ctx     context.Context
	dir     string
	seconds int
	rounds  int
	table   strings.Builder
	slices  int // of load so far: cold files have names of their own
}

func main() {
	log.SetFlags(0)
	b := &bench{}
	flag.IntVar(&b.rounds, "rounds", 5, "how often each server is loaded")
	flag.IntVar(&b.seconds, "seconds", 2, "how long it is loaded each time")
	bare := flag.Bool("bare", false, "serve 4 KiB with a plain handler (the program runs itself so)")
	flag.Parse()
	if *bare {
		serveBare()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	b.ctx = ctx
	var err error
	if b.dir, err = os.MkdirTemp("", "bench-*"); err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(b.dir)
	if err := b.run(); err != nil {
		log.Print(err)
	}
}

const small, image = 4 << 10, "library/app"

func (b *bench) run() error {
	up := newUpstream()
	originURL, err := serve(up)
	if err != nil {
		return err
	}
	us, err := b.startUs(originURL)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	bareAddress := freeAddress()
	bare, err := b.start("bare handler", bareAddress, nil, self, "-bare", bareAddress)
	if err != nil {
		return err
	}
	nginx, err := b.startNginx(originURL)
	if err != nil {
		return err
	}
	return b.compareAll(up, originURL, us, nginx, bare)
}

// compareAll makes the rows and prints the table.
func (b *bench) compareAll(up *upstream, originURL string, us, nginx, bare entrant) error {
	fmt.Fprintf(&b.table, "%s, %d processors, %s, rounds %d of %d s; medians (CPU a request in brackets)\n\n", time.Now().Format(time.DateOnly), runtime.NumCPU(), runtime.Version(), b.rounds, b.seconds)
	b.table.WriteString("| work | artifactapi | peer | ratio |\n|---|---|---|---|\n")
	for _, row := range []struct {
		work        string
		size, conns int
	}{{"warm 4 KiB file", small, 32}, {"warm 1 MiB file", 1 << 20, 8}, {"warm 64 MiB file", 64 << 20, 4}} {
		path := fmt.Sprintf("/s/%d/f.bin", row.size)
		peers := []entrant{us.at("/api/files" + path), nginx.at(path)}
		if row.size == small {
			peers = append(peers, bare.at("/"))
		}
		if err := b.compare(row.work, row.conns, false, peers...); err != nil {
			return err
		}
	}
	if err := b.compare("cold 4 KiB files", 16, true, us.at("/api/files/s/4096/cold"), nginx.at("/s/4096/cold")); err != nil {
		return err
	}
	registries := []entrant{us}
	for _, start := range []func(string) (entrant, error){b.startDistribution, b.startZot} {
		e, err := start(originURL)
		if err != nil {
			fmt.Fprintf(os.Stderr, "left out: %v\n", err)
			continue
		}
		registries = append(registries, e)
	}
	for _, row := range []struct{ work, path string }{{"manifest by digest", "/manifests/" + up.digest(up.manifest)}, {"manifest by tag", "/manifests/1"}, {"blob of 2 KiB", "/blobs/" + up.digest(up.blob)}} {
		peers := []entrant{us.at("/v2/hub/" + image + row.path)}
		for _, e := range registries[1:] {
			peers = append(peers, e.at("/v2/"+image+row.path))
		}
		if err := b.compare(row.work, 32, false, peers...); err != nil {
			return err
		}
	}
	fmt.Print(b.table.String())
	return nil
}

// compare loads the entrants in turns and adds a row for each peer of the first.
func (b *bench) compare(work string, conns int, cold bool, all ...entrant) error {
	got := map[string][]sample{}
	for round := range b.rounds + 1 {
		for _, e := range all {
			s, err := b.load(e, conns, cold)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", work, e.name, err)
			}
			if round > 0 { // the first one warms
				got[e.name] = append(got[e.name], s)
			}
		}
	}
	us := got[all[0].name]
	for _, peer := range all[1:] {
		ratios := make([]float64, b.rounds)
		for i := range ratios { // what disturbs a round disturbs both
			ratios[i] = us[i].perSecond / got[peer.name][i].perSecond
		}
		row := fmt.Sprintf("| %s | %s | %s %s | %.2f |\n", work, shown(us), peer.name, shown(got[peer.name]), median(ratios))
		b.table.WriteString(row)
		fmt.Fprint(os.Stderr, row)
	}
	return nil
}

func shown(all []sample) string {
	var rates, cpu []float64
	for _, s := range all {
		rates, cpu = append(rates, s.perSecond), append(cpu, s.cpu)
	}
	return fmt.Sprintf("%.0f/s (%.0f us)", median(rates), median(cpu))
}

func median(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}

var wrkRequests = regexp.MustCompile(`(\d+) requests in ([0-9.]+)(m?s)`)

// load has wrk ask an entrant for some seconds. A cold row asks for another file each time.
func (b *bench) load(e entrant, conns int, cold bool) (sample, error) {
	args := []string{"-H", "Accept: " + manifestType, "-t1", fmt.Sprintf("-c%d", conns), fmt.Sprintf("-d%ds", b.seconds)}
	if cold {
		b.slices++
		script := fmt.Sprintf("local n = 0\nrequest = function() n = n + 1; return wrk.format('GET', wrk.path .. '%d/' .. n) end\n", b.slices)
		name := filepath.Join(b.dir, "cold.lua")
		if err := os.WriteFile(name, []byte(script), 0o600); err != nil {
			return sample{}, err
		}
		args = append(args, "-s", name)
	}
	before := cpuOf(e.pid)
	out, err := exec.CommandContext(b.ctx, "wrk", append(args, e.url)...).CombinedOutput()
	used := cpuOf(e.pid) - before
	m := wrkRequests.FindSubmatch(out)
	if err != nil || m == nil || bytes.Contains(out, []byte("Non-2xx")) {
		return sample{}, fmt.Errorf("wrk: %v: %s", err, out)
	}
	n, _ := strconv.ParseFloat(string(m[1]), 64)
	took, _ := strconv.ParseFloat(string(m[2]), 64)
	return sample{n / took, used.Seconds() * 1e6 / max(n, 1)}, nil
}

// cpuOf is the CPU time of a process and its children.
func cpuOf(pid int) (used time.Duration) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, task := range tasks {
		stat, _ := os.ReadFile(task + "/schedstat")
		ns, _, _ := strings.Cut(string(stat), " ")
		n, _ := strconv.ParseInt(ns, 10, 64)
		used += time.Duration(n)
		children, _ := os.ReadFile(task + "/children")
		for child := range strings.FieldsSeq(string(children)) {
			n, _ := strconv.Atoi(child)
			used += cpuOf(n)
		}
	}
	return used
}

func (e entrant) at(path string) entrant {
	e.url += path
	return e
}

// start runs a server until the end and waits until it listens.
func (b *bench) start(name, address string, env []string, command string, args ...string) (entrant, error) {
	c := exec.CommandContext(b.ctx, command, args...)
	c.Env = append(os.Environ(), env...)
	out, err := os.Create(filepath.Join(b.dir, strings.ReplaceAll(name, " ", "-")+".log"))
	if err != nil {
		return entrant{}, err
	}
	c.Stdout, c.Stderr = out, out
	c.Dir = b.dir
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := c.Start(); err != nil {
		return entrant{}, fmt.Errorf("%s: %w", name, err)
	}
	go c.Wait() // it ends with this process
	for range 100 {
		if conn, err := net.Dial("tcp", address); err == nil {
			conn.Close()
			return entrant{name, c.Process.Pid, "http://" + address}, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	text, _ := os.ReadFile(out.Name())
	return entrant{}, fmt.Errorf("%s does not listen: %s", name, text)
}

func (b *bench) startUs(origin string) (entrant, error) {
	binary, address := filepath.Join(b.dir, "artifactapi"), freeAddress()
	if out, err := exec.CommandContext(b.ctx, "go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		return entrant{}, fmt.Errorf("building: %w: %s", err, out)
	}
	config := fmt.Sprintf("remotes:\n  files: {base_url: %q}\n  hub: {base_url: %q, package: docker}\n", origin, origin)
	if err := os.WriteFile(filepath.Join(b.dir, "remotes.yaml"), []byte(config), 0o600); err != nil {
		return entrant{}, err
	}
	return b.start("artifactapi", address, []string{"LISTEN_ADDR=" + address, "DATA_DIR=" + b.dir + "/data", "CONFIG_PATH=" + b.dir + "/remotes.yaml"}, binary)
}

func (b *bench) startNginx(origin string) (entrant, error) {
	address := freeAddress()
	config := strings.NewReplacer("DIR", b.dir, "ORIGIN", strings.TrimPrefix(origin, "http://"), "ADDRESS", address).Replace(`
worker_processes auto; daemon off; pid DIR/nginx.pid; error_log DIR/nginx.err;
events { worker_connections 1024; }
http {
  access_log DIR/nginx.access; sendfile on; tcp_nopush on; keepalive_requests 1000000;
  client_body_temp_path DIR/n1; proxy_temp_path DIR/n2; fastcgi_temp_path DIR/n3; uwsgi_temp_path DIR/n4; scgi_temp_path DIR/n5;
  proxy_cache_path DIR/cache levels=1:2 keys_zone=c:50m max_size=10g use_temp_path=off;
  upstream origin { server ORIGIN; keepalive 32; }
  server {
    listen ADDRESS;
    location / {
      proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_cache c; proxy_cache_lock on; proxy_cache_valid 200 1d;
    }
  }
}`)
	name := filepath.Join(b.dir, "nginx.conf")
	if err := os.WriteFile(name, []byte(config), 0o600); err != nil {
		return entrant{}, err
	}
	return b.start("nginx proxy_cache", address, nil, "nginx", "-p", b.dir, "-c", name, "-g", "user "+cmp.Or(os.Getenv("USER"), "root")+";")
}

func (b *bench) startDistribution(origin string) (entrant, error) {
	address, name := freeAddress(), filepath.Join(b.dir, "distribution.yml")
	config := fmt.Sprintf("version: 0.1\nlog: {accesslog: {disabled: true}, level: error}\nstorage: {filesystem: {rootdirectory: %s/distribution}}\nhttp: {addr: %q}\nproxy: {remoteurl: %q}\n", b.dir, address, origin)
	if err := os.WriteFile(name, []byte(config), 0o600); err != nil {
		return entrant{}, err
	}
	return b.start("distribution", address, nil, "registry", "serve", name)
}

func (b *bench) startZot(origin string) (entrant, error) {
	address, name := freeAddress(), filepath.Join(b.dir, "zot.json")
	host, port, _ := net.SplitHostPort(address)
	config := fmt.Sprintf(`{"storage":{"rootDirectory":"%s/zot"},"http":{"address":%q,"port":%q},"log":{"level":"error"},
"extensions":{"sync":{"enable":true,"registries":[{"urls":[%q],"onDemand":true,"tlsVerify":false}]}}}`, b.dir, host, port, origin)
	if err := os.WriteFile(name, []byte(config), 0o600); err != nil {
		return entrant{}, err
	}
	return b.start("zot", address, nil, "zot", "serve", name)
}

// upstream is the origin of everything: /s/SIZE/NAME is a file of that size, and below
// /v2/ there is one image.
type upstream struct{ manifest, config, blob []byte }

func newUpstream() *upstream {
	u := &upstream{config: []byte("{}"), blob: make([]byte, 2<<10)}
	_, _ = rand.NewChaCha8([32]byte{1}).Read(u.blob)
	u.manifest = fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":%q,"size":%d}]}`,
		manifestType, u.digest(u.config), len(u.config), u.digest(u.blob), len(u.blob))
	return u
}

const manifestType = "application/vnd.oci.image.manifest.v1+json"

func (*upstream) digest(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	send := func(contentType string, body []byte) {
		w.Header().Set("Content-Type", contentType)
		w.Header().Set("Docker-Content-Digest", u.digest(body))
		http.ServeContent(w, r, "", time.Unix(1e9, 0), bytes.NewReader(body))
	}
	var size int
	var name string
	switch _, err := fmt.Sscanf(r.URL.Path, "/s/%d/%s", &size, &name); {
	case err == nil:
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "f.bin", time.Unix(1e9, 0), bytes.NewReader(make([]byte, size)))
	case r.URL.Path == "/v2/":
	case strings.HasSuffix(r.URL.Path, "/manifests/1"), strings.HasSuffix(r.URL.Path, u.digest(u.manifest)):
		send(manifestType, u.manifest)
	case strings.HasSuffix(r.URL.Path, u.digest(u.blob)):
		send("application/octet-stream", u.blob)
	case strings.HasSuffix(r.URL.Path, u.digest(u.config)):
		send("application/octet-stream", u.config)
	default:
		http.NotFound(w, r)
	}
}

func serve(h http.Handler) (url string, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go http.Serve(ln, h)
	return "http://" + ln.Addr().String(), nil
}

// serveBare answers with as many headers as a hit has, and 4 KiB.
func serveBare() {
	headers, body := http.Header{"Content-Type": {"application/octet-stream"}, "Content-Length": {strconv.Itoa(small)}}, make([]byte, small)
	for _, name := range strings.Fields("Accept-Ranges Age Cache-Control Cache-Status Connection Content-Disposition Content-Security-Policy Cross-Origin-Resource-Policy Etag Last-Modified X-Artifact-Source X-Content-Type-Options X-Request-Id") {
		headers[name] = []string{"a value of the usual length"}
	}
	headers["Connection"] = []string{"keep-alive"}
	log.Fatal(http.ListenAndServe(flag.Arg(0), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		maps.Copy(w.Header(), headers)
		_, _ = w.Write(body)
	})))
}

// freeAddress is an address on loopback that nobody listens at.
func freeAddress() string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}
