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
//	artifactapi reindex      make the index follow from what is stored
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
//	MINIO_ENDPOINT, MINIO_ACCESS_KEY, MINIO_SECRET_KEY, MINIO_BUCKET
//	                            keep files in S3 instead of on disk
//	MINIO_SECURE (false), MINIO_REGION (us-east-1), MINIO_VIRTUAL_HOST (false)
//	HOT_CACHE_SIZE (10GiB)      of the copies on disk before S3; 0 is none
//	DBHOST, DBPORT (5432), DBUSER, DBPASS, DBNAME, DBSSLMODE (disable)
//	                            keep the index in PostgreSQL
//	REDIS_URL                   share freshness and leases through Redis
//	ADVERTISE_URL               where other replicas reach this one
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
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
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
  reindex        make the index follow from what is stored; exit 0 or 1
  version        print the version
  help           print this
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// run is the program; its result is the exit status.
func run(ctx context.Context, args []string, env lookupEnv, stdout, stderr io.Writer) int {
	command, rest := "serve", []string(nil)
	if len(args) > 0 {
		command, rest = args[0], args[1:]
	}
	limits := map[string]int{"serve": 0, "check": 1, "healthcheck": 0, "verify": 0, "reindex": 0, "version": 0, "help": 0, "-h": 0, "--help": 0}
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
			err = checkConfig(set, rest, env, stdout)
		case "healthcheck":
			err = askHealth(ctx, set)
		case "verify":
			err = verifyStored(ctx, set, env, stdout)
		case "reindex":
			err = reindexStored(ctx, set, stdout)
		default:
			err = runServer(ctx, set, env, stderr)
		}
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

// checkConfig validates a configuration file.
func checkConfig(set *settings, args []string, env lookupEnv, stdout io.Writer) error {
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

func loadConfig(name string, env lookupEnv) (*config, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w (CONFIG_PATH names it)", err)
	}
	return parseConfig(name, data, env)
}

// askHealth asks the server on this machine, for HEALTHCHECK in an image
// without a shell.
func askHealth(ctx context.Context, set *settings) error {
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

// verifyStored hashes what is stored, beside a running server too.
func verifyStored(ctx context.Context, set *settings, env lookupEnv, stdout io.Writer) error {
	st, err := openStores(set, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer st.Close()
	cfg, unknown := loadConfig(set.configPath, env)
	st.disk.isIrreplaceable = func(remote string) bool { return unknown != nil || cfg.isIrreplaceable(remote) }
	reported := 0
	checked, dropped, err := st.objects.verify(ctx, func(key string, err error) {
		reported++
		fmt.Fprintf(stdout, "%s: %v\n", key, err)
	})
	fmt.Fprintf(stdout, "%d checked, %d dropped\n", checked, dropped)
	if err == nil && reported > 0 {
		err = fmt.Errorf("%d files were dropped or could not be read; what was dropped is fetched again when it is asked for", reported)
	}
	return err
}

// reindexStored is reindex: rows for objects without one, and no rows without an
// object. PostgreSQL's index is corrected beside running replicas; the embedded
// one is in the server's memory, so the server must not run.
func reindexStored(ctx context.Context, set *settings, stdout io.Writer) error {
	st, err := openStores(set, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer st.Close()
	if st.sql != nil {
		changed := 0
		err := reindex(ctx, st.objects, st.sql, func(what, key string) {
			changed++
			fmt.Fprintln(stdout, what, key)
		})
		fmt.Fprintf(stdout, "%d rows corrected\n", changed)
		return err
	}
	switch held, err := st.disk.lockData(); {
	case err != nil:
		return err
	case !held:
		return errors.New("a server uses DATA_DIR, and its index is in its memory: stop it first (it reconciles the index at each start anyway)")
	}
	if err := st.embedded.reconcile(ctx, st.objects); err != nil {
		return err
	}
	totals, err := st.embedded.totals(ctx)
	for name, t := range totals {
		fmt.Fprintf(stdout, "%s: %d files, %d bytes\n", name, t.Files, t.Bytes)
	}
	return errors.Join(err, st.embedded.saveSnapshot())
}

// server is what serve wires together.
type server struct {
	set    *settings
	env    lookupEnv
	log    *slog.Logger
	stores *stores
	cache  *cache
	config atomic.Pointer[config]
	cert   atomic.Pointer[tls.Certificate]

	hup          chan os.Signal // SIGHUP
	draining     atomic.Bool
	seenContents [sha256.Size]byte // contents of what is in force; the start and one loop use it
	ownsDataDir  bool              // DATA_DIR is ours alone; the start and one loop use it
}

// runServer runs the server until ctx ends.
func runServer(ctx context.Context, set *settings, env lookupEnv, stderr io.Writer) error {
	log.SetOutput(io.Discard) // net/http's client would write there what an upstream sends unasked
	log := newLogger(set, stderr)
	s := &server{set: set, env: env, log: log, hup: make(chan os.Signal, 1)}
	signal.Notify(s.hup, syscall.SIGHUP) // first of all: it would end the program
	defer signal.Stop(s.hup)
	s.seenContents = s.hashWatchedFiles() // before it is read: what changes from now on is noticed
	cfg, err := loadConfig(set.configPath, env)
	if err != nil {
		return err
	}
	s.config.Store(cfg)
	if err := s.loadCertificate(); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", set.listen)
	if err != nil {
		return fmt.Errorf("listening on LISTEN_ADDR %s: %w", set.listen, err)
	}
	if s.stores, err = openStores(set, time.Now, log); err != nil {
		return err
	}
	attrs := []any{"version", version, "address", listener.Addr().String(), "remotes", len(cfg.names), "config", set.configPath}
	for _, b := range s.stores.backends {
		attrs = append(attrs, b.name, b.kind)
	}
	log.Info("artifactapi starts", attrs...)
	return s.serveUntilDone(ctx, listener, s.newHandler())
}

// newHandler makes the cache over the stores, and the handler.
func (s *server) newHandler() http.Handler {
	metrics := newMetrics()
	st := s.stores
	st.disk.isIrreplaceable = func(remote string) bool { return s.config.Load().isIrreplaceable(remote) }
	s.openData()
	up := newUpstream(func(strict bool) http.RoundTripper { return newTransport(strict) }, time.Now, s.log, metrics)
	up.version = version
	s.cache = newCache(st.objects, st.chosenIndex(), st.chosenFreshness(), st.space, up, time.Now, s.log, metrics)
	s.cache.replicas = st.sharedReplicas()
	responder := &responder{now: time.Now, log: s.log, metrics: metrics}
	return &api{cache: s.cache, config: s.config.Load, health: s.reportHealth, responder: responder, metrics: metrics,
		now: time.Now, version: version, started: time.Now(), token: s.set.apiToken, origin: http.NewCrossOriginProtection(),
		registry: newRegistry(s.cache, s.config.Load, responder)}
}

// serveUntilDone serves until ctx ends, then stops in order: say so on /health, stop
// accepting, drain requests, drain fills, write the accounting, close stores.
func (s *server) serveUntilDone(ctx context.Context, listener net.Listener, handler http.Handler) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var loops sync.WaitGroup
	s.startLoops(background, &loops)

	srv := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 30 * time.Second, // a client that dribbles its headers
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    60 << 10, // and net/http's 4 KiB: more than 64 KiB is 431
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
		s.announceEnd()
	}
	ended, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err == nil {
		s.drain(ended, srv)
	}
	s.cache.Close(ended)
	stop()
	loops.Wait()
	if err := s.stores.Close(); err != nil {
		s.log.Warn("closing the stores", "error", err)
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving: %w", err)
	}
	s.log.Info("artifactapi has stopped")
	return nil
}

// drainTimeout bounds how long requests and fills in flight may take at the end,
// together; Kubernetes kills after 30 s unless told otherwise.
const drainTimeout = 25 * time.Second

// announceEnd lets load balancers see on /health that this is the end.
func (s *server) announceEnd() {
	s.draining.Store(true)
	s.log.Info("draining", "delay", s.set.drainDelay)
	if s.set.drainDelay > 0 {
		<-time.After(s.set.drainDelay)
	}
}

// drain stops accepting and lets requests in flight finish.
func (s *server) drain(ctx context.Context, srv *http.Server) {
	if err := srv.Shutdown(ctx); err != nil {
		s.log.Warn("requests in flight were cut off", "error", err)
		srv.Close()
	}
}

// startLoops starts the loops: each is a ticker around one step.
func (s *server) startLoops(ctx context.Context, loops *sync.WaitGroup) {
	loop := func(first func(), d time.Duration, step func()) {
		loops.Go(func() {
			first()
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
	every := func(d time.Duration, step func()) { loop(func() {}, d, step) }
	atOnceAndEvery := func(d time.Duration, step func()) { loop(step, d, step) }
	st := s.stores
	for _, b := range st.backends {
		atOnceAndEvery(checkEvery, func() { s.checkBackend(b) })
	}
	every(2*time.Second, func() { s.cache.flushCounts(ctx) })
	every(5*time.Second, func() { s.cache.evictFiles(ctx, s.config.Load(), s.set.maxSize) })
	// It looks at all directories, which the first request is not to wait for.
	loop(func() { s.sweepDisks(ctx) }, time.Hour, func() { s.openData(); s.sweepDisks(ctx) })
	loops.Go(func() { s.watchFiles(ctx) })
	if st.embedded != nil {
		loops.Go(func() {
			s.retryStep(ctx, "loading the index", func() error { return st.embedded.reconcile(ctx, st.objects) })
		})
		every(5*time.Minute, func() { s.tryStep(ctx, "saving the index", st.embedded.saveSnapshot) })
	} else {
		every(time.Second, func() {
			s.tryStep(ctx, "writing the journal to the database", func() error { return st.sql.replay(ctx) })
		})
	}
	if st.redis != nil {
		every(leaseInterval, func() { s.tryStep(ctx, "keeping leases", func() error { return st.redis.renewLeases(ctx) }) })
		loops.Go(func() { st.redis.watchChanges(ctx, s.cache.onChange, s.cache.onMissedChanges) })
	}
	if st.hot != nil {
		loops.Go(func() { s.retryStep(ctx, "finding hot copies", func() error { return st.hot.findCopies(ctx) }) })
		atOnceAndEvery(time.Hour, func() {
			s.tryStep(ctx, "sweeping unfinished uploads", func() error { return st.s3.sweep(ctx) })
		})
	}
}

// tryStep logs a step that failed; its loop will try again.
func (s *server) tryStep(ctx context.Context, what string, step func() error) {
	if err := step(); err != nil && ctx.Err() == nil {
		s.log.Debug("failed, will try again", "doing", what, "error", err)
	}
}

// retryStep repeats what has to succeed once.
func (s *server) retryStep(ctx context.Context, what string, step func() error) {
	for {
		err := step()
		if err == nil || ctx.Err() != nil {
			return
		}
		s.log.Warn("failed, will try again in 10 s", "doing", what, "error", err)
		select {
		case <-time.After(10 * time.Second):
		case <-ctx.Done():
		}
	}
}

// openData takes DATA_DIR for us, so that what an earlier process left of its
// fills may be swept. Another process there is unusual but harmless.
func (s *server) openData() {
	if s.ownsDataDir {
		return
	}
	held, err := s.stores.disk.lockData()
	switch {
	case err != nil:
		s.log.Error("DATA_DIR cannot be used: files are passed on and not stored", "dir", s.set.dataDir, "error", err)
	case !held:
		s.log.Warn("another process uses DATA_DIR: its temporary files are left alone", "dir", s.set.dataDir)
	default:
		s.eachDisk(context.Background(), func(d *diskStore) error { return d.sweepSpools(true) })
	}
	s.ownsDataDir = held
}

// sweepDisks removes what crashes left.
func (s *server) sweepDisks(ctx context.Context) {
	s.eachDisk(ctx, func(d *diskStore) error { return d.sweep(ctx) })
}

func (s *server) eachDisk(ctx context.Context, sweep func(*diskStore) error) {
	s.tryStep(ctx, "sweeping temporary files", func() error { return sweep(s.stores.disk) })
	if s.stores.hot != nil {
		s.tryStep(ctx, "sweeping temporary files", func() error { return sweep(s.stores.hot.disk) })
	}
}

// checkEvery and checkTimeout: /health has to tell within a second.
const (
	checkEvery   = 500 * time.Millisecond
	checkTimeout = 400 * time.Millisecond
)

// checkBackend asks a backend whether it can be used and notes the answer for
// /health.
func (s *server) checkBackend(b *backend) {
	if b.ping == nil {
		b.up.Store(true)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
	defer cancel()
	err := b.ping(ctx)
	if was := b.up.Swap(err == nil); was && err != nil {
		s.log.Error("backend is down", "backend", b.name, "kind", b.kind, "error", err)
	} else if !was && err == nil {
		s.log.Info("backend is usable", "backend", b.name, "kind", b.kind)
	}
}

// reportHealth is the state of the backends as the last look found it.
func (s *server) reportHealth() healthReport {
	h := healthReport{Status: "healthy", Backends: map[string]string{}, draining: s.draining.Load()}
	for _, b := range s.stores.backends {
		h.Backends[b.name] = b.okWord
		if !b.up.Load() {
			h.Status, h.Backends[b.name] = "degraded", "down"
		}
	}
	return h
}

// watchFiles reloads the configuration on SIGHUP and when its content changes,
// and the certificate likewise.
func (s *server) watchFiles(ctx context.Context) {
	t := time.NewTicker(2 * time.Second) // within 3 s is the promise
	defer t.Stop()
	for {
		asked := false
		select {
		case <-ctx.Done():
			return
		case <-s.hup:
			asked = true
		case <-t.C:
		}
		if now := s.hashWatchedFiles(); asked || now != s.seenContents {
			s.seenContents = now
			s.reloadConfig()
		}
	}
}

// hashWatchedFiles is a sum over the files that are watched: their times would miss a
// change within a second, and an atomic exchange of a mounted directory.
func (s *server) hashWatchedFiles() (sum [sha256.Size]byte) {
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

// reloadConfig takes a new configuration, or reports why it is not taken.
func (s *server) reloadConfig() {
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
