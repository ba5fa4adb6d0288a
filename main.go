// Artifactapi is a caching proxy for artifacts: it stands between a fleet and
// the internet, keeps every file it was asked for, and goes on serving when the
// upstream is gone.
//
// Usage:
//
//	artifactapi [serve]      serve remotes.yaml
//	artifactapi check [FILE] validate the configuration; exit 0 or 1
//	artifactapi healthcheck  ask the local server's /health; exit 0 or 1
//	artifactapi verify       hash everything stored, drop what does not match
//	artifactapi version
//	artifactapi help
//
// remotes.yaml names the upstreams; README.md describes it. The environment
// gives the rest (default in parentheses):
//
//	CONFIG_PATH (remotes.yaml)  the configuration file
//	LISTEN_ADDR (:8000)         where to listen
//	DATA_DIR (data)             where files, index and spools are
//	MIN_FREE (1GiB or 5 %)      free space that storing leaves alone
//	CACHE_MAX_SIZE              least recently used files go above it
//	API_TOKEN                   allows PUT, DELETE and purging
//	TLS_CERT_FILE, TLS_KEY_FILE serve HTTPS; read again when they change
//	DRAIN_DELAY (0s)            how long /health says 503 before the end
//	LOG_LEVEL (info)            debug, info, warn or error
//	LOG_FORMAT                  text (on a terminal) or json (otherwise)
//	HTTPS_PROXY, HTTP_PROXY, NO_PROXY, SSL_CERT_FILE  as everywhere; for upstreams
//
// It listens on one address and serves /api/{remote}/{path}, /v2/ (registry),
// /, /health, /config, /metrics and /artifacts/{remote}.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// version is set by the build: -ldflags "-X main.version=1.2.3".
var version = "dev"

const usage = `usage: artifactapi [COMMAND]

  serve          serve remotes.yaml (the default)
  check [FILE]   validate the configuration; exit 0 or 1
  healthcheck    ask the local server's /health; exit 0 or 1
  verify         hash everything stored and drop what does not match; exit 0 = all well
  version        print the version
  help           print this
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// run is the program; its result is the exit status.
func run(ctx context.Context, args []string, env lookup, stdout, stderr io.Writer) int {
	command, rest := "serve", []string(nil)
	if len(args) > 0 {
		command, rest = args[0], args[1:]
	}
	limits := map[string]int{"serve": 0, "check": 1, "healthcheck": 0, "verify": 0, "version": 0, "help": 0, "-h": 0, "--help": 0}
	if most, ok := limits[command]; !ok || len(rest) > most {
		fmt.Fprint(stderr, usage)
		return 2
	}
	switch command {
	case "version":
		fmt.Fprintln(stdout, "artifactapi", version)
		return 0
	case "help", "-h", "--help":
		fmt.Fprint(stdout, usage)
		return 0
	}
	set, err := parseSettings(env)
	if err == nil {
		switch command {
		case "check":
			err = check(set, rest, env, stdout)
		case "healthcheck":
			err = healthcheck(ctx, set)
		case "verify":
			err = verify(ctx, set, stdout)
		default:
			err = serve(ctx, set, env, stderr)
		}
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

// check validates a configuration file.
func check(set *settings, args []string, env lookup, stdout io.Writer) error {
	name := set.configPath
	if len(args) == 1 {
		name = args[0]
	}
	cfg, err := loadConfig(name, env)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s: %d remotes, all well\n", name, len(cfg.names))
	return nil
}

func loadConfig(name string, env lookup) (*config, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w (CONFIG_PATH names it)", err)
	}
	return parseConfig(name, data, env)
}

// healthcheck asks the server on this machine, for HEALTHCHECK in an image
// without a shell.
func healthcheck(ctx context.Context, set *settings) error {
	host, port, err := net.SplitHostPort(set.listen)
	if err != nil {
		return fmt.Errorf("LISTEN_ADDR: %w", err)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	scheme := "http"
	if set.tlsCert != "" {
		scheme = "https"
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+net.JoinHostPort(host, port)+"/health", nil)
	if err != nil {
		return fmt.Errorf("asking /health: %w", err)
	}
	// The certificate names the outside; a proxy is for upstreams.
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	res, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("asking /health: %w", err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("/health answered %s", res.Status)
	}
	return nil
}

// verify hashes what is stored, beside a running server too.
func verify(ctx context.Context, set *settings, stdout io.Writer) error {
	disk := newDiskStore(set.dataDir, time.Now, slog.New(slog.DiscardHandler))
	reported := 0
	checked, dropped, err := disk.verify(ctx, func(key string, err error) {
		reported++
		fmt.Fprintf(stdout, "%s: %v\n", key, err)
	})
	fmt.Fprintf(stdout, "%d checked, %d dropped\n", checked, dropped)
	if err == nil && reported > 0 {
		err = fmt.Errorf("%d files were dropped or could not be read; what was dropped is fetched again when it is asked for", reported)
	}
	return err
}

// server is what serve wires together.
type server struct {
	set    *settings
	env    lookup
	log    *slog.Logger
	disk   *diskStore
	index  *embeddedIndex
	fresh  *localFreshness
	cache  *cache
	config atomic.Pointer[config]
	cert   atomic.Pointer[tls.Certificate]

	draining atomic.Bool
	storage  atomic.Bool // the last ping of the store went well
	held     bool        // DATA_DIR is ours alone
}

// serve runs the server until ctx ends.
func serve(ctx context.Context, set *settings, env lookup, stderr io.Writer) error {
	cfg, err := loadConfig(set.configPath, env)
	if err != nil {
		return err
	}
	log := newLogger(set, stderr)
	s := &server{set: set, env: env, log: log}
	s.config.Store(cfg)
	if err := s.loadCertificate(); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", set.listen)
	if err != nil {
		return fmt.Errorf("listening on LISTEN_ADDR %s: %w", set.listen, err)
	}
	handler := s.wire()
	log.Info("artifactapi starts", "version", version, "address", listener.Addr().String(), "remotes", len(cfg.names), "config", set.configPath,
		"storage", "local disk "+set.dataDir, "database", "embedded", "redis", "embedded")
	return s.run(ctx, listener, handler)
}

// wire makes the stores, the cache and the handler.
func (s *server) wire() http.Handler {
	metrics := newMetrics()
	s.disk = newDiskStore(s.set.dataDir, time.Now, s.log)
	s.openData(context.Background())
	s.index = newEmbeddedIndex(s.set.dataDir, s.log)
	s.fresh = newLocalFreshness(s.set.dataDir, time.Now, s.log)
	up := newUpstream(func(strict bool) http.RoundTripper { return newTransport(strict) }, time.Now, s.log, metrics)
	up.version = version
	spools := &diskSpools{disk: s.disk, minFree: s.set.minFree}
	s.cache = newCache(s.disk, s.index, s.fresh, spools, up, time.Now, s.log, metrics)
	responder := &responder{now: time.Now, log: s.log, metrics: metrics}
	return &api{cache: s.cache, config: s.config.Load, health: s.health, responder: responder, metrics: metrics,
		now: time.Now, version: version, started: time.Now(), token: s.set.apiToken, origin: http.NewCrossOriginProtection(),
		registry: newRegistry(s.cache, s.config.Load, responder)}
}

// run serves until ctx ends, then stops in order: say so on /health, stop
// accepting, drain requests, drain fills, write the accounting, close stores.
func (s *server) run(ctx context.Context, listener net.Listener, handler http.Handler) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var loops sync.WaitGroup
	s.background(background, &loops)

	srv := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 30 * time.Second, // a client that dribbles its headers
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10, // more is 431
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		TLSConfig:         s.tlsConfig(),
	}
	failed := make(chan error, 1)
	loops.Go(func() {
		if srv.TLSConfig != nil {
			failed <- srv.ServeTLS(listener, "", "")
			return
		}
		failed <- srv.Serve(listener)
	})
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
		s.drain(srv)
	}
	stop()
	loops.Wait()
	s.closeStores()
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving: %w", err)
	}
	s.log.Info("artifactapi has stopped")
	return nil
}

// drainFor bounds how long requests and fills in flight may take at the end;
// Kubernetes kills after 30 s unless told otherwise.
const drainFor = 25 * time.Second

func (s *server) drain(srv *http.Server) {
	s.draining.Store(true)
	s.log.Info("draining", "delay", s.set.drainDelay)
	if s.set.drainDelay > 0 {
		<-time.After(s.set.drainDelay)
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainFor)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		s.log.Warn("requests in flight were cut off", "error", err)
		srv.Close()
	}
	s.cache.close(ctx)
}

func (s *server) closeStores() {
	if err := s.index.close(); err != nil {
		s.log.Warn("saving the index", "error", err)
	}
	if err := s.fresh.close(); err != nil {
		s.log.Warn("saving the freshness", "error", err)
	}
	if err := s.disk.close(); err != nil {
		s.log.Warn("closing DATA_DIR", "error", err)
	}
}

// background starts the loops: each is a ticker around one step.
func (s *server) background(ctx context.Context, loops *sync.WaitGroup) {
	s.checkStorage()
	loops.Go(func() { s.loadIndex(ctx) })
	every := func(d time.Duration, step func()) {
		loops.Go(func() {
			t := time.NewTicker(d)
			defer t.Stop()
			for {
				select {
				case <-t.C:
					step()
				case <-ctx.Done():
					return
				}
			}
		})
	}
	every(500*time.Millisecond, s.checkStorage)
	every(2*time.Second, func() { s.cache.flush(ctx) })
	every(5*time.Second, func() { s.cache.evict(ctx, s.config.Load(), s.set.maxSize) })
	every(5*time.Minute, func() {
		if err := s.index.flush(); err != nil {
			s.log.Warn("saving the index", "error", err)
		}
	})
	every(time.Hour, func() { s.openData(ctx); s.sweep(ctx, false) })
	loops.Go(func() { s.watchFiles(ctx) })
}

// loadIndex reads what is stored into the embedded index; a disk that cannot
// be read yet is tried again.
func (s *server) loadIndex(ctx context.Context) {
	for {
		err := s.index.load(ctx, s.disk)
		if err == nil || ctx.Err() != nil {
			return
		}
		s.log.Warn("loading the index, will try again", "error", err)
		select {
		case <-time.After(10 * time.Second):
		case <-ctx.Done():
		}
	}
}

// openData takes DATA_DIR for us, so that what an earlier process left behind
// may be swept. Another process there is unusual but harmless.
func (s *server) openData(ctx context.Context) {
	if s.held {
		return
	}
	held, err := s.disk.lockData()
	switch {
	case err != nil:
		s.log.Error("DATA_DIR cannot be used: files are passed on and not stored", "dir", s.set.dataDir, "error", err)
	case !held:
		s.log.Warn("another process uses DATA_DIR: its temporary files are left alone", "dir", s.set.dataDir)
	default:
		s.sweep(ctx, true)
	}
	s.held = held
}

func (s *server) sweep(ctx context.Context, all bool) {
	if err := s.disk.sweep(ctx, all); err != nil && ctx.Err() == nil {
		s.log.Warn("sweeping temporary files", "error", err)
	}
}

// checkStorage asks the store whether it can be used and notes the answer for
// /health.
func (s *server) checkStorage() {
	ctx, cancel := context.WithTimeout(context.Background(), 400*time.Millisecond)
	defer cancel()
	err := s.disk.ping(ctx)
	if was := s.storage.Swap(err == nil); was && err != nil {
		s.log.Error("storage is down", "error", err)
	} else if !was && err == nil {
		s.log.Info("storage is usable", "dir", s.set.dataDir)
	}
}

// health is the state of the backends as the last look found it.
func (s *server) health() healthReport {
	h := healthReport{Status: "healthy", Backends: map[string]string{"storage": "embedded", "database": "embedded", "redis": "embedded"}, draining: s.draining.Load()}
	if !s.storage.Load() {
		h.Status, h.Backends["storage"] = "degraded", "down"
	}
	return h
}

// watchFiles reloads the configuration on SIGHUP and when its content changes,
// and the certificate likewise.
func (s *server) watchFiles(ctx context.Context) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	t := time.NewTicker(3 * time.Second)
	defer t.Stop()
	seen := s.contents()
	for {
		asked := false
		select {
		case <-ctx.Done():
			return
		case <-hup:
			asked = true
		case <-t.C:
		}
		if now := s.contents(); asked || now != seen {
			seen = now
			s.reload()
		}
	}
}

// contents is a sum over the files that are watched: their times would miss a
// change within a second, and an atomic exchange of a mounted directory.
func (s *server) contents() (sum [sha256.Size]byte) {
	var all bytes.Buffer
	for _, name := range []string{s.set.configPath, s.set.tlsCert, s.set.tlsKey} {
		if name == "" {
			continue
		}
		data, err := os.ReadFile(name)
		fmt.Fprintf(&all, "%s %d %v\n", name, len(data), err)
		all.Write(data)
	}
	return sha256.Sum256(all.Bytes())
}

// reload takes a new configuration, or reports why it is not taken.
func (s *server) reload() {
	cfg, err := loadConfig(s.set.configPath, s.env)
	if err != nil {
		s.log.Error("the new configuration is not taken, the old one stays in force", "error", err)
	} else {
		s.config.Store(cfg)
		s.log.Info("configuration loaded", "remotes", len(cfg.names))
	}
	if err := s.loadCertificate(); err != nil {
		s.log.Error("the new certificate is not taken, the old one stays in force", "error", err)
	}
}

func (s *server) loadCertificate() error {
	if s.set.tlsCert == "" {
		return nil
	}
	cert, err := tls.LoadX509KeyPair(s.set.tlsCert, s.set.tlsKey)
	if err != nil {
		return fmt.Errorf("TLS_CERT_FILE and TLS_KEY_FILE: %w", err)
	}
	s.cert.Store(&cert)
	return nil
}

// tlsConfig is nil where plain HTTP is served.
func (s *server) tlsConfig() *tls.Config {
	if s.set.tlsCert == "" {
		return nil
	}
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.cert.Load(), nil },
	}
}

// diskSpools are spools on the data disk that leave MIN_FREE alone.
type diskSpools struct {
	disk    *diskStore
	minFree int64 // -1: the default for the disk's size
}

func (d *diskSpools) spool() (*os.File, error) { return d.disk.spool() }

func (d *diskSpools) room(n int64) error {
	free, size, err := d.disk.free()
	if err != nil {
		return err
	}
	keep := uint64(d.minFree)
	if d.minFree < 0 {
		keep = defaultMinFree(size)
	}
	if free < keep+uint64(n) {
		return fmt.Errorf("%w: %d bytes are free, MIN_FREE is %d, %d are wanted", errNoSpace, free, keep, n)
	}
	return nil
}

// newLogger logs to w as LOG_LEVEL and LOG_FORMAT say.
func newLogger(set *settings, w io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: set.logLevel}
	text := set.logFormat == "text"
	if f, ok := w.(*os.File); ok && set.logFormat == "" {
		info, err := f.Stat()
		text = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	if text {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}

// lookup is os.LookupEnv.
type lookup = func(string) (string, bool)

// settings are what the environment says.
type settings struct {
	configPath, listen, dataDir string
	minFree                     int64 // -1: by the disk's size
	maxSize                     int64 // CACHE_MAX_SIZE; 0: none
	apiToken                    secret
	tlsCert, tlsKey             string
	drainDelay                  time.Duration
	logLevel                    slog.Level
	logFormat                   string // "": by what it is written to
}

// groups are variables of which the first needs the others.
var groups = [][]string{
	{"MINIO_ENDPOINT", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", "MINIO_BUCKET"},
	{"DBHOST", "DBUSER", "DBNAME"},
	{"TLS_CERT_FILE", "TLS_KEY_FILE"},
	{"TLS_KEY_FILE", "TLS_CERT_FILE"},
}

// unbuilt are variables of parts that this version does not have: silently
// ignoring one would lose data that its user believes shared.
var unbuilt = []string{"MINIO_ENDPOINT", "DBHOST", "REDIS_URL", "ADVERTISE_URL"}

// parseSettings reads the environment. Its error is one line naming the first
// variable that is missing or wrong.
func parseSettings(env lookup) (*settings, error) {
	p := &envReader{env: env}
	p.groups()
	set := &settings{
		configPath: p.text("CONFIG_PATH", "remotes.yaml"),
		listen:     p.text("LISTEN_ADDR", ":8000"),
		dataDir:    p.text("DATA_DIR", "data"),
		minFree:    p.size("MIN_FREE", -1),
		maxSize:    p.size("CACHE_MAX_SIZE", 0),
		apiToken:   secret(p.text("API_TOKEN", "")),
		tlsCert:    p.text("TLS_CERT_FILE", ""),
		tlsKey:     p.text("TLS_KEY_FILE", ""),
		drainDelay: p.duration("DRAIN_DELAY", 0),
		logFormat:  p.oneOf("LOG_FORMAT", "", "text", "json"),
	}
	level := p.oneOf("LOG_LEVEL", "info", "debug", "info", "warn", "error")
	if p.err == nil {
		p.fail("LOG_LEVEL", set.logLevel.UnmarshalText([]byte(level)))
	}
	if _, port, err := net.SplitHostPort(set.listen); err != nil || port == "" {
		p.fail("LISTEN_ADDR", fmt.Errorf("%q is not an address like :8000 or 127.0.0.1:8000", set.listen))
	}
	if dir, err := filepath.Abs(set.dataDir); err == nil {
		set.dataDir = dir
	}
	p.backends()
	return set, p.err
}

// envReader reads variables and keeps the first mistake.
type envReader struct {
	env lookup
	err error
}

func (p *envReader) fail(name string, err error) {
	if p.err == nil && err != nil {
		p.err = fmt.Errorf("environment: %s: %w", name, err)
	}
}

// text is a variable's value; empty counts as unset.
func (p *envReader) text(name, otherwise string) string {
	if v, _ := p.env(name); v != "" {
		return v
	}
	return otherwise
}

func (p *envReader) size(name string, otherwise int64) int64 {
	v := p.text(name, "")
	if v == "" {
		return otherwise
	}
	n, err := parseSize(v)
	p.fail(name, err)
	return n
}

func (p *envReader) duration(name string, otherwise time.Duration) time.Duration {
	v := p.text(name, "")
	if v == "" {
		return otherwise
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < 0 {
		p.fail(name, fmt.Errorf("%q is not a duration like 10s or 1m30s", v))
	}
	return d
}

func (p *envReader) oneOf(name, otherwise string, values ...string) string {
	v := p.text(name, otherwise)
	for _, x := range append(values, otherwise) {
		if strings.EqualFold(v, x) {
			return x
		}
	}
	p.fail(name, fmt.Errorf("%q is not one of %s", v, strings.Join(values, ", ")))
	return v
}

func (p *envReader) groups() {
	for _, g := range groups {
		if p.text(g[0], "") == "" {
			continue
		}
		for _, name := range g[1:] {
			if p.text(name, "") == "" {
				p.fail(name, fmt.Errorf("is not set, but %s is: they belong together", g[0]))
			}
		}
	}
}

// backends judges the variables of S3, PostgreSQL and Redis.
func (p *envReader) backends() {
	p.size("HOT_CACHE_SIZE", 0)
	p.endpoint()
	if port := p.text("DBPORT", "5432"); p.err == nil {
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
			p.fail("DBPORT", fmt.Errorf("%q is not a port number", port))
		}
	}
	if v := p.text("REDIS_URL", ""); v != "" {
		if u, err := url.Parse(v); err != nil || u.Host == "" || u.Scheme != "redis" && u.Scheme != "rediss" {
			p.fail("REDIS_URL", errors.New("is not a URL like redis://:PASSWORD@HOST:6379/0 or the same with rediss"))
		}
	}
	for _, name := range unbuilt {
		if p.text(name, "") != "" {
			p.fail(name, errors.New("is set, but this version does not have what it configures yet: unset it"))
		}
	}
}

// endpoint judges MINIO_ENDPOINT (host:port or a URL) against MINIO_SECURE.
func (p *envReader) endpoint() {
	secure := p.oneOf("MINIO_SECURE", "", "true", "false", "1", "0")
	p.oneOf("MINIO_VIRTUAL_HOST", "false", "true", "false", "1", "0")
	v := p.text("MINIO_ENDPOINT", "")
	scheme, _, isURL := strings.Cut(v, "://")
	if !isURL {
		return
	}
	switch {
	case scheme != "http" && scheme != "https":
		p.fail("MINIO_ENDPOINT", errors.New("is neither host:port nor an http or https URL"))
	case secure != "" && (secure == "true" || secure == "1") != (scheme == "https"):
		p.fail("MINIO_SECURE", fmt.Errorf("%s contradicts the scheme %s of MINIO_ENDPOINT", secure, scheme))
	}
}
