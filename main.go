// Artifactapi is a caching proxy for artifacts. It stands between a fleet of
// machines and the internet, stores every file that it is asked for, and keeps
// serving stored files while the upstream cannot be reached.
//
// Usage: artifactapi [COMMAND], which is serve (the default), check, healthcheck, verify,
// reindex, export, have, import, prefetch, version, or help, which describes them all.
//
// remotes.yaml names the upstreams; README.md describes its keys. Environment
// variables give everything else (default in parentheses; empty means unset):
//
//	CONFIG_PATH (remotes.yaml)  the configuration file
//	LISTEN_ADDR (:8000)         the address to listen on
//	DATA_DIR (data)             directory of files, index and temporary files
//	MIN_FREE (1GiB or 5 %)      space that must stay free; less is not used for storing
//	CACHE_MAX_SIZE              above it, the least recently used files are removed
//	MINIO_ENDPOINT, MINIO_ACCESS_KEY, MINIO_SECRET_KEY, MINIO_BUCKET
//	                            store files in S3 instead of on disk
//	MINIO_SECURE (false), MINIO_REGION (us-east-1), MINIO_VIRTUAL_HOST (false)
//	HOT_CACHE_SIZE (10GiB)      size of the local copies in front of S3; 0 is off
//	DBHOST, DBPORT (5432), DBUSER, DBPASS, DBNAME, DBSSLMODE (disable)
//	                            keep the index in PostgreSQL
//	REDIS_URL                   share freshness and leases through Redis
//	ADVERTISE_URL               URL at which other replicas reach this one
//	PUBLIC_URL                  URL at which clients reach this server: for the links in
//	                            documents of npm and cargo
//	API_TOKEN                   token that allows PUT, DELETE and purging
//	SEALED (false)              ask no upstream, serve what is stored whatever its age
//	TLS_CERT_FILE, TLS_KEY_FILE serve HTTPS; the files are reloaded when they change
//	DRAIN_DELAY (0s, or 5s where KUBERNETES_SERVICE_HOST is set)
//	                            how long /health answers 503 before the server stops
//	LOG_LEVEL (info)            debug, info, warn or error
//	LOG_FORMAT                  text (on a terminal) or json (otherwise)
//	HTTPS_PROXY, HTTP_PROXY, NO_PROXY, SSL_CERT_FILE
//	                            used for upstreams, as other programs use them
//
// It listens on one address and serves /api/{remote}/{path}, /v2/ (the container
// registry), /, /health, /config, /metrics, /missed, /artifacts/{remote} and
// /cache-artifact.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// version is set by the build: -ldflags "-X main.version=1.2.3".
var version = "dev"

// buildVersion is version, or for a build that was given none what Go made of its revision:
// v0.0.0-20260102030405-0123456789ab.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && version == "dev" && strings.HasPrefix(info.Main.Version, "v") {
		return info.Main.Version
	}
	return version
}

const usage = `usage: artifactapi [COMMAND]

  serve          serve the remotes of remotes.yaml (the default)
  check [FILE]   validate the configuration; exit 0 or 1
  healthcheck    ask the local server's /health; exit 0 or 1
  verify         hash everything stored and drop what does not match; exit 0 if all was well
  reindex        rebuild the index from what is stored; exit 0 or 1
  export [REMOTE...] [--have FILE] > TAR
                 write what is stored, or of these remotes, as a bundle; exit 0 or 1
  have > FILE    print the sha256 of each stored body; export --have leaves these bodies out
  import < TAR   store a bundle, or nothing of it if it is damaged; exit 0 or 1
  prefetch [--server URL] [--dry-run] REMOTE[/FOLDER] PATTERN|IMAGE...
                 have the running server fetch what matches, or images, or with -
                 alone what any text on standard input names; exit 1 if something failed
  version        print the version
  help           print this text
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// run is the program without its globals, so that tests can call it. It returns
// the exit status: 0 for success, 1 for an error, 2 for wrong arguments. It ends
// when the command has ended; serve ends with ctx.
func run(ctx context.Context, args []string, env lookupEnv, stdout, stderr io.Writer) int {
	name, rest := "serve", []string(nil)
	if len(args) > 0 {
		name, rest = args[0], args[1:]
	}
	set, err := parseSettings(env)
	bundle := &bundleCommand{set, env, time.Now, os.Stdin, stdout, stderr}
	command, known := map[string]struct {
		maxArgs int
		run     func() error
		asOwner bool
	}{
		"serve":       {0, func() error { return runServer(ctx, set, env, stderr) }, false},
		"check":       {1, func() error { return checkConfig(set, rest, env, stdout) }, false},
		"healthcheck": {0, func() error { return askHealth(set) }, false},
		"verify":      {0, func() error { return verifyStored(ctx, set, env, time.Now, stdout) }, true},
		"reindex":     {0, func() error { return reindexStored(ctx, set, time.Now, stdout) }, true},
		"export":      {math.MaxInt, func() error { return bundle.exportStored(ctx, rest) }, true},
		"have":        {0, func() error { return bundle.listSums(ctx) }, true},
		"import":      {0, func() error { return bundle.importStored(ctx) }, true},
		"prefetch":    {math.MaxInt, func() error { return runPrefetch(ctx, set, rest, os.Stdin, stdout) }, false},
		"version":     {}, "--version": {}, "help": {}, "-h": {}, "--help": {},
	}[name]
	if !known {
		command.maxArgs = -1 // not even the command
	}
	switch {
	case len(rest) > command.maxArgs:
		err = fmt.Errorf("%w: %q", errUsage, args[command.maxArgs+1])
	case name == "version" || name == "--version":
		fmt.Fprintln(stdout, "artifactapi", buildVersion())
		return 0
	case command.run == nil:
		fmt.Fprint(stdout, usage)
		return 0
	case err == nil:
		if command.asOwner {
			err = becomeOwner(set.dataDir)
		}
		if err == nil {
			err = command.run()
		}
	}
	if errors.Is(err, errUsage) {
		fmt.Fprintf(stderr, "artifactapi: %v\n%s", err, usage)
		return 2
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

// server is a running artifactapi: its settings, its stores, the cache over them
// and what changes while it runs.
type server struct {
	set       *settings
	env       lookupEnv
	log       *slog.Logger
	stores    *stores
	cache     *cache
	responder *responder
	stopRuns  context.CancelFunc              // of prefetches
	config    atomic.Pointer[config]          // in force; replaced by a reload
	cert      atomic.Pointer[tls.Certificate] // in force; nil without TLS
	loaded    atomic.Int64                    // when config was loaded, in seconds since 1970
	rejected  atomic.Bool                     // the last reload failed, older files are in force

	hup      chan os.Signal // receives SIGHUP
	draining atomic.Bool    // the server is about to stop; /health says so

	// seenContents is the hash of the watched files as they were last read, and
	// loadedContents as they were last loaded. The start writes both, then watchFiles
	// alone.
	seenContents, loadedContents [sha256.Size]byte
}

// runServer runs the server until ctx ends or listening fails.
func runServer(ctx context.Context, set *settings, env lookupEnv, stderr io.Writer) error {
	log.SetOutput(io.Discard) // net/http's client logs there what an upstream sends without a request
	log, flush := newLogger(set, stderr), func() {}
	if !isTerminal(stderr) { // lines are written many at once
		lines := &lineWriter{to: stderr}
		h := newLogger(set, lines).Handler()
		_, isJSON := h.(*slog.JSONHandler)
		log, flush = slog.New(lineHandler{h, lines, isJSON}), lines.flush
	}
	defer flush()
	s := &server{set: set, env: env, log: log, hup: make(chan os.Signal, 1)}
	signal.Notify(s.hup, syscall.SIGHUP) // first of all: an unhandled SIGHUP ends the program
	defer signal.Stop(s.hup)
	signal.Ignore(syscall.SIGPIPE)          // the end of whatever reads the log must not end the server
	s.loadedContents = s.hashWatchedFiles() // before the files are loaded, so that no later change is missed
	s.seenContents = s.loadedContents
	cfg, err := loadConfig(set.configPath, env)
	if err != nil {
		return err
	}
	s.useConfig(cfg)
	if err := s.loadCertificate(); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", set.listen)
	if err != nil {
		return fmt.Errorf("listening on LISTEN_ADDR %s: %w", set.listen, err)
	}
	s.stores = openStores(set, time.Now, log)
	attrs := []any{"version", buildVersion(), "address", listener.Addr().String(), "remotes", len(cfg.names), "config", set.configPath}
	for _, b := range s.stores.backends {
		attrs = append(attrs, b.name, b.kind)
	}
	log.Info("artifactapi starts", attrs...)
	flush() // whoever waits for the first answer looks at what was chosen
	return s.serveUntilDone(ctx, listener, s.newHandler())
}

// newHandler makes the cache over the stores, and the HTTP handler over the cache.
func (s *server) newHandler() http.Handler {
	metrics := newMetrics()
	st := s.stores
	st.disk.delaysSync = true
	for _, d := range st.disks {
		d.statEvery = 100 * time.Millisecond
	}
	st.disk.isIrreplaceable = func(remote string) bool { return s.config.Load().isIrreplaceable(remote) }
	s.openData(true)
	up := newUpstream(func(reach addressKind) http.RoundTripper { return newTransport(reach) }, time.Now, s.log, metrics)
	up.version = buildVersion()
	s.cache = newCache(cacheStores{st.objects, st.index, st.freshness, st.space, st.replicas, st.replicaKey}, up, time.Now, s.log, metrics)
	st.snapshots = append(st.snapshots, newMissedSnapshot(s.set.dataDir, &s.cache.missed, s.log).saveSnapshot)
	s.cache.evictor.config, s.cache.evictor.limit = s.config.Load, s.set.maxSize
	if st.sql != nil { // one replica at a time evicts
		s.cache.evictor.alone = st.sql.whileAlone
	}
	if st.hot == nil { // else hot copies make room
		st.space.reclaimer = s.cache.evictor
	} else {
		st.hot.isInTrouble = func() bool { return st.isInTrouble("storage") }
	}
	s.cache.isInTrouble, s.cache.storageIsDown = st.isInTrouble, st.storageIsDown
	s.responder = &responder{now: time.Now, log: s.log, count: metrics.countRequest, isDown: func(remote string) bool { return s.cache.upstream.isInOutage(remote) }}
	var stopping context.Context
	stopping, s.stopRuns = context.WithCancel(context.Background())
	return &api{cache: s.cache, config: s.config.Load, settings: s.set.shown, health: s.reportHealth, responder: s.responder, metrics: metrics, gauges: s.stores.gauges, disk: st.disk.freeSpace,
		now: time.Now, version: buildVersion(), started: time.Now(), token: s.set.apiToken, origin: http.NewCrossOriginProtection(), runs: &prefetchRuns{stopping: stopping},
		registry: newRegistry(s.cache, s.config.Load, s.responder)}
}

// heapBallast bytes are allocated and never touched, so they take no memory, but count
// as live. A server of files has a live heap of a few MiB, which by Go's own rule is
// collected at twice that, 80 times a second under load: a fifth of what a hit costs.
const heapBallast = 24 << 20

// serveUntilDone serves until ctx ends or the listener fails. Then it stops in this
// order: /health says so, no more connections are accepted, running requests end,
// running fills end, the loops end, the stores write what is left and are closed.
func (s *server) serveUntilDone(ctx context.Context, listener net.Listener, handler http.Handler) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var loops sync.WaitGroup
	s.startLoops(background, &loops)
	if gogc, _ := s.env("GOGC"); gogc == "" { // else the operator has decided
		defer runtime.KeepAlive(make([]byte, heapBallast))
	}

	srv := &http.Server{
		Handler:           handler,
		ConnContext:       addClientConn,
		ReadHeaderTimeout: 30 * time.Second, // a slower client only holds a connection
		IdleTimeout:       2 * time.Minute,  // longer than the pauses between a client's requests
		MaxHeaderBytes:    60 << 10,         // net/http adds 4 KiB: more than 64 KiB is answered 431
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	serve := srv.Serve
	if s.set.tlsCert != "" {
		serve = func(l net.Listener) error { return srv.ServeTLS(l, "", "") }
		srv.TLSConfig = &tls.Config{
			MinVersion:     tls.VersionTLS12,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.cert.Load(), nil }, // each handshake takes the one in force
		}
	}
	serveFailed := make(chan error, 1)
	loops.Go(func() { serveFailed <- serve(clientListener{listener}) })
	var err error
	select {
	case err = <-serveFailed:
	case <-ctx.Done():
		loops.Go(func() {
			if err := s.stores.saveSnapshots(background); err != nil {
				s.log.Warn("the snapshots could not be saved", "error", err)
			}
		})
		s.draining.Store(true) // load balancers have DRAIN_DELAY to send clients elsewhere
		s.log.Info("draining: /health answers 503 from now on", "delay", s.set.drainDelay.String())
		<-time.After(s.set.drainDelay)
	}
	drainCtx, cancel := context.WithTimeout(context.Background(), s.set.drainTime())
	defer cancel()
	s.drain(drainCtx, srv)
	s.cache.Close(drainCtx)
	stop()
	loops.Wait()
	if err := s.stores.Close(); err != nil {
		s.log.Warn("a store could not be closed cleanly", "error", err)
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving: %w", err)
	}
	s.log.Info("artifactapi has stopped")
	return nil
}

// drainTimeout bounds how long the end takes: DRAIN_DELAY, and then what running requests
// and fills get, which is minDrainTime at least. Kubernetes kills a container after 30 s
// by default.
const (
	drainTimeout = 25 * time.Second
	minDrainTime = 10 * time.Second
)

// drainTime is how long running requests and fills together may take.
func (set *settings) drainTime() time.Duration { return max(drainTimeout-set.drainDelay, minDrainTime) }

// drain stops accepting connections, ends prefetches, and waits for the other running
// requests. Those that still run when ctx ends are cut off.
func (s *server) drain(ctx context.Context, srv *http.Server) {
	s.stopRuns()
	if err := srv.Shutdown(ctx); err != nil {
		s.log.Warn("requests that still ran were cut off", "error", err)
		s.responder.cutOff.Store(true)
		srv.Close()
	}
}

// startLoops checks all backends, which takes checkTimeout at most, so that the first
// requests and /health find up what is up. Then it starts the background tasks. They end
// with ctx; loops counts them.
func (s *server) startLoops(ctx context.Context, loops *sync.WaitGroup) {
	var firstChecks sync.WaitGroup
	for _, b := range s.stores.backends {
		firstChecks.Go(func() { s.checkBackend(b) })
	}
	firstChecks.Wait()
	succeeds := func(step func(context.Context)) func(context.Context) error {
		return func(ctx context.Context) error {
			step(ctx)
			return nil
		}
	}
	tasks := []task{
		{doing: "counting uses", every: 2 * time.Second, step: succeeds(s.cache.flushCounts)},
		{doing: "evicting", every: 5 * time.Second, step: succeeds(s.cache.evictor.evictFiles)},
		// A sweep reads all directories: the first request does not wait for it.
		{doing: "sweeping temporary files", every: time.Hour, step: s.sweepDisks},
		{doing: "sampling for the page", every: trendStep, step: succeeds(func(context.Context) { s.cache.metrics.sampleTrend() })},
		{doing: "saving snapshots", every: 5 * time.Minute, step: s.stores.saveSnapshots},
	}
	for _, b := range s.stores.backends {
		check := succeeds(func(context.Context) { s.checkBackend(b) })
		tasks = append(tasks, task{doing: "checking a backend", every: checkEvery, step: check})
		tasks = append(tasks, b.tasks...)
	}
	for _, t := range tasks {
		loops.Go(func() { s.runTask(ctx, t) })
	}
	loops.Go(func() { s.watchFiles(ctx) })
	if r := s.stores.replicas; r != nil {
		loops.Go(func() { r.watchChanges(ctx, s.cache.onChange, func() { s.cache.objects.invalidate("") }) })
	}
}

// runTask runs a task from the start on until ctx ends, or until it has succeeded where
// that is enough. What fails is tried again at the next tick.
func (s *server) runTask(ctx context.Context, t task) {
	once, level := t.every == 0, slog.LevelDebug
	if once {
		t.every, level = 10*time.Second, slog.LevelWarn // a backend that is down needs some time
	}
	ticker := time.NewTicker(t.every)
	defer ticker.Stop()
	for {
		err := t.step(ctx)
		if err != nil && ctx.Err() == nil {
			s.log.Log(ctx, level, "a background task failed and will be tried again", "task", t.doing, "after", t.every.String(), "error", err)
		} else if once {
			return
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// openData locks DATA_DIR unless this process has the lock already. The owner of
// the lock may remove the temporary files that an earlier process left. Another
// process that uses DATA_DIR is unusual but harmless.
func (s *server) openData(isStart bool) {
	if s.stores.disk.owner != nil {
		return
	}
	locked, err := s.stores.disk.lockData()
	switch {
	case !isStart && !locked: // the log says so
	case err != nil: // a disk that cannot be used at all is told of by checkBackend
		s.log.Debug("DATA_DIR cannot be locked", "dir", s.set.dataDir, "error", err)
	case !locked:
		s.log.Warn("another process uses DATA_DIR: its temporary files are left alone", "dir", s.set.dataDir)
	default:
		for _, d := range s.stores.disks {
			if err := d.sweepSpools(true); err != nil {
				s.log.Warn("temporary files of an earlier process could not be removed", "dir", d.dir, "error", err)
			}
		}
	}
}

// sweepDisks removes the files that crashes left in DATA_DIR.
func (s *server) sweepDisks(ctx context.Context) error {
	s.openData(false)
	var errs []error
	for _, d := range s.stores.disks {
		errs = append(errs, d.sweep(ctx))
	}
	return errors.Join(errs...)
}

// /health says within a second that a backend is down: the pause between two
// checks and the longest check together stay below it.
const (
	checkEvery   = 500 * time.Millisecond
	checkTimeout = 400 * time.Millisecond
)

// checkBackend pings a backend and keeps the result for /health. It logs a change of
// state or of advice, unless the backend does that itself.
func (s *server) checkBackend(b *backend) {
	if b.ping == nil {
		b.found.Store(&b.okWord)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
	defer cancel()
	began := time.Now()
	err := b.ping(ctx)
	s.cache.metrics.countCheck(b.name, time.Since(began))
	state := b.okWord
	switch {
	case errors.Is(err, errNoSpace) && !errors.Is(err, errStoreDown):
		state = "full"
	case err != nil:
		state = "down"
	}
	was, isFirst, lasted := b.state(), b.found.Load() == nil, began.Sub(b.changedAt).Round(time.Second).String()
	b.found.Store(&state)
	hasChanged := isFirst || state != was
	if hasChanged {
		b.changedAt = began
	}
	said := b.advice
	b.advice, _ = errors.AsType[advice](err)
	switch {
	case !hasChanged && b.advice == said:
	case state == "full":
		s.log.Error("backend is full: files are served and not stored", "backend", b.name, "kind", b.kind, "error", err)
	case was == "full" && err == nil:
		s.log.Info("backend has space again", "backend", b.name, "kind", b.kind, "after", lasted)
	case b.outage != nil:
	case err != nil:
		s.log.Error("backend is down", "backend", b.name, "kind", b.kind, "error", err)
	case !isFirst:
		s.log.Info("backend is up", "backend", b.name, "kind", b.kind, "after", lasted)
	}
}

// reportHealth returns the state of the backends as the last checks found it. It
// asks no backend, so that /health answers at once whatever hangs.
func (s *server) reportHealth() healthReport {
	h := healthReport{Status: "healthy", Backends: map[string]string{}, draining: s.draining.Load(), configLoaded: s.loaded.Load()}
	if s.rejected.Load() {
		h.Status, h.Configuration = "degraded", "rejected"
	}
	for _, b := range s.stores.backends {
		h.Backends[b.name] = b.state()
		if b.state() != b.okWord {
			h.Status = "degraded"
		}
	}
	return h
}

// watchFiles reloads the configuration and the certificate on SIGHUP and when the
// content of their files changes, until ctx ends.
func (s *server) watchFiles(ctx context.Context) {
	t := time.NewTicker(2 * time.Second) // a file that stood still for so long is not being written any more
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.hup:
			s.checkFiles(true)
		case <-t.C:
			s.checkFiles(false)
		}
	}
}

// checkFiles reloads the watched files if that is wanted now, or if they have changed
// and stood still since the last look: a file may be written in parts.
func (s *server) checkFiles(now bool) {
	contents := s.hashWatchedFiles()
	stable := contents == s.seenContents
	s.seenContents = contents
	if now || (stable && contents != s.loadedContents) {
		s.loadedContents = contents
		s.reloadConfig()
	}
}

// hashWatchedFiles returns a hash over the contents of the watched files. Their
// modification times are no substitute: they miss a second change within a second,
// and Kubernetes replaces a mounted directory by another one whose files may be older.
func (s *server) hashWatchedFiles() (sum [sha256.Size]byte) {
	var all bytes.Buffer
	for _, name := range []string{s.set.configPath, s.set.tlsCert, s.set.tlsKey} {
		data, err := os.ReadFile(name) // a name may be "": its error never changes
		fmt.Fprintf(&all, "%s %d %v\n", name, len(data), err)
		all.Write(data)
	}
	return sha256.Sum256(all.Bytes())
}

// reloadConfig puts the new configuration and the new certificate into force. It
// logs why one of them is rejected; the old one then stays.
func (s *server) reloadConfig() {
	cfg, err := loadConfig(s.set.configPath, s.env)
	if err != nil {
		s.log.Error("the new configuration is rejected, the old one stays in force", "error", err)
	} else {
		attrs, differences := []any{"remotes", len(cfg.names)}, s.useConfig(cfg)
		for _, what := range sortedKeys(differences) {
			attrs = append(attrs, what, differences[what])
		}
		s.log.Info("configuration loaded", attrs...)
	}
	certErr := s.loadCertificate()
	if certErr != nil {
		s.log.Error("the new certificate is rejected, the old one stays in force", "error", certErr)
	}
	s.rejected.Store(err != nil || certErr != nil)
}

// useConfig puts cfg into force, and names the remotes that are others now, see compare.
func (s *server) useConfig(cfg *config) (differences map[string][]string) {
	for _, w := range cfg.warnings {
		s.log.Warn(w)
	}
	for _, r := range cfg.remotes {
		r.sealed = r.sealed || (s.set.sealed && !r.local)
	}
	differences = cfg.compare(cmp.Or(s.config.Swap(cfg), &config{}))
	s.loaded.Store(time.Now().Unix())
	for _, name := range slices.Concat(differences["removed"], differences["changed"]) {
		s.cache.forgetMissing(name)
	}
	return differences
}

// loadCertificate puts the certificate of TLS_CERT_FILE and TLS_KEY_FILE into force.
// It does nothing without TLS.
func (s *server) loadCertificate() error {
	if s.set.tlsCert == "" {
		return nil
	}
	cert, err := tls.LoadX509KeyPair(s.set.tlsCert, s.set.tlsKey)
	if err != nil {
		return fmt.Errorf("TLS_CERT_FILE and TLS_KEY_FILE: %w", err)
	}
	if old := s.cert.Swap(&cert); old != nil && !bytes.Equal(old.Certificate[0], cert.Certificate[0]) {
		s.log.Info("certificate loaded", "subject", cert.Leaf.Subject.String(), "until", cert.Leaf.NotAfter)
	}
	return nil
}

// newLogger returns a logger that writes to w with LOG_LEVEL and LOG_FORMAT.
// Without LOG_FORMAT it writes text to a terminal and JSON to everything else.
func newLogger(set *settings, w io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: set.logLevel}
	text := set.logFormat == "text"
	if text || (set.logFormat == "" && isTerminal(w)) {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}
