// api_prefetch.go: POST /cache-artifact, which fetches files before clients ask for
// them: what may be asked for, and the run that does it. One goroutine finds files,
// others fetch them, and the goroutine of the request writes the events that tell of
// them.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxPrefetchJSON and maxPrefetchText bound a request's body in bytes. JSON is in
	// memory as a whole, text is not.
	maxPrefetchJSON = 16 << 20
	maxPrefetchText = 64 << 20
	// maxPrefetchRuns bounds the runs at once: a long one and another beside it.
	maxPrefetchRuns = 2
	// prefetchWorkers is how many files a run fetches at once: a fraction of the
	// places that a remote has for all its clients. Who finds them is one of these.
	prefetchWorkers = 8
	// maxPrefetchFiles bounds the files of a run, which take some 300 bytes of memory
	// each. Large repositories have a quarter of it for one architecture.
	maxPrefetchFiles = 250_000
)

// prefetchRequest says what to fetch: what pattern finds, or paths, or images, of one
// remote; or urls. Its JSON is part of the API.
type prefetchRequest struct {
	Remote         string   `json:"remote"`
	Pattern        string   `json:"pattern"`
	IncludePattern string   `json:"include_pattern"` // another name of pattern
	Paths          nameList `json:"paths"`           // decoded, as listings have them
	Images         nameList `json:"images"`          // IMAGE[:TAG][@DIGEST]
	URLs           nameList `json:"urls"`
	Prefix         string   `json:"prefix"`    // of pattern: the folder to search, or the image
	Platforms      []string `json:"platforms"` // OS/ARCHITECTURE[/VARIANT]; none: all
	DryRun         bool     `json:"dry_run"`
	// Arguments are the command's, which does not know what the remote is: images of a
	// docker remote, else patterns.
	Arguments nameList `json:"arguments"`
}

// nameList is a list of at most maxPrefetchFiles strings: short ones take several times
// as much memory as their JSON.
type nameList []string

func (l *nameList) UnmarshalJSON(text []byte) error {
	if bytes.Count(text, []byte(`"`)) > 2*maxPrefetchFiles {
		return errTooManyNames
	}
	return json.Unmarshal(text, (*[]string)(l))
}

// servePrefetch serves POST /cache-artifact. The whole request is read before the
// answer begins.
func (a *api) servePrefetch(w *response, r *http.Request) error {
	if err := allowMethods(r, http.MethodPost); err != nil {
		return err
	}
	if a.token != "" {
		if err := a.authorizeWrite(r, ""); err != nil {
			return err
		}
	}
	mediaType, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")) // "" is refused as well
	if mediaType != "application/json" && mediaType != "text/plain" {
		return newProblem(http.StatusUnsupportedMediaType, "the Content-Type must be application/json, or text/plain for a text with URLs")
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	stopped := newProblem(http.StatusServiceUnavailable, "the server stops: what is missing is fetched by another run")
	defer context.AfterFunc(a.runs.stopping, func() { cancel(stopped) })()
	p := &prefetchRun{api: a, cfg: a.config(), ownHost: r.Host, ctx: ctx, cancel: cancel, started: a.now()}
	if err := a.runs.addRun(p); err != nil {
		return err
	}
	defer a.runs.remove(p)
	if err := p.readBody(w, r, mediaType == "application/json"); err != nil {
		return newBodyError(err)
	}
	p.begun.Store(true)
	return p.run(w, !strings.Contains(r.Header.Get("Accept"), "application/json"))
}

// newBodyError makes the answer to a body that is not what it should be.
func newBodyError(err error) error {
	if _, ok := errors.AsType[*problem](err); ok {
		return err
	}
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return newProblem(http.StatusRequestEntityTooLarge, "the body has more than %d bytes: send it in parts", tooLarge.Limit)
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return newProblem(http.StatusBadRequest, "%s: this must not be of type %s", cmp.Or(e.Field, "the body"), e.Value)
	}
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return newProblem(http.StatusBadRequest, "unknown field %.60s", name)
	}
	return &problem{status: http.StatusBadRequest, detail: "the body is not valid JSON, or it broke off", cause: err}
}

// readBody reads a request, and checks it.
func (p *prefetchRun) readBody(w http.ResponseWriter, r *http.Request, isJSON bool) (err error) {
	if q, queryErr := url.ParseQuery(r.URL.RawQuery); queryErr != nil || q.Has("dry_run") {
		if p.dryRun, err = strconv.ParseBool(q.Get("dry_run")); err != nil {
			return newProblem(http.StatusBadRequest, "dry_run must be true or false")
		}
	}
	if !isJSON {
		return p.scan(http.MaxBytesReader(w, r.Body, maxPrefetchText))
	}
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxPrefetchJSON))
	d.DisallowUnknownFields()
	var req prefetchRequest
	if err := d.Decode(&req); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return newProblem(http.StatusBadRequest, "the body must be one JSON object")
	}
	if err := p.readRequest(&req); err != nil {
		return err
	}
	for _, u := range req.URLs {
		f, ok := p.readToken(u)
		if !ok {
			f = p.readURL(u)
		}
		p.named = append(p.named, f)
	}
	for _, path := range req.Paths {
		p.named = append(p.named, wantedFile{remote: req.Remote, path: path, way: p.remote.pathHere(path)})
	}
	for _, image := range req.Images {
		path := manifestPath(image)
		p.named = append(p.named, wantedFile{remote: req.Remote, path: path, way: p.remote.urlPath() + path})
	}
	return nil
}

// platformPattern matches OS/ARCHITECTURE[/VARIANT].
var platformPattern = regexp.MustCompile(`^[^/]+(/[^/]+){1,2}$`)

// readRequest checks req and takes it over, but for the files that it names. Its error
// is a problem that names the field.
func (p *prefetchRun) readRequest(req *prefetchRequest) (err error) {
	p.remote = p.cfg.remotes[req.Remote]
	isDocker := p.remote != nil && p.remote.packageType == "docker"
	if isDocker && req.Prefix == "" {
		req.Images = append(req.Images, req.Arguments...)
	} else if len(req.Arguments) > 0 {
		req.Pattern += "(?:" + strings.Join(req.Arguments, ")|(?:") + ")"
	}
	given := 0
	for _, n := range []int{len(req.Pattern), len(req.IncludePattern), len(req.Paths), len(req.Images), len(req.URLs)} {
		given += min(n, 1)
	}
	if p.pattern, err = compilePattern(req.Pattern + req.IncludePattern); err != nil {
		return err
	}
	p.dryRun, p.platforms = p.dryRun || req.DryRun, req.Platforms
	var prefixErr error
	p.prefix, _, prefixErr = spellPath((&url.URL{Path: req.Prefix + "/"}).EscapedPath(), "")
	refuseIf := func(wrong bool, format string, args ...any) { // the first thing that is wrong is the answer
		if wrong && err == nil {
			err = newProblem(http.StatusBadRequest, format, args...)
		}
	}
	hasURLs := len(req.URLs) > 0
	refuseIf(prefixErr != nil, "prefix: %v", prefixErr)
	refuseIf(given != 1, "give exactly one of pattern (or include_pattern), paths, images and urls")
	refuseIf(hasURLs && req.Remote+req.Prefix != "", "urls: remote and prefix have no meaning beside it, the URLs say where the files are")
	refuseIf(req.Remote == "" && !hasURLs, "remote: name the remote")
	if err == nil && p.remote == nil && !hasURLs {
		return newProblem(http.StatusNotFound, "remote: there is no remote %.100q", req.Remote)
	}
	refuseIf(p.remote != nil && p.remote.local, "remote: %q is a local repository, which has nothing to fetch from", req.Remote)
	refuseIf(len(req.Images) > 0 && !isDocker, "images: remote %q is not a container registry: give pattern or paths", req.Remote)
	refuseIf(len(req.Platforms) > 0 && !isDocker && !hasURLs, "platforms: remote %q is not a container registry", req.Remote)
	refuseIf(isDocker && p.pattern != nil && p.prefix == "",
		"pattern: remote %q is a container registry: give images, or as prefix the image whose tags to search", req.Remote)
	refuseIf(p.prefix != "" && p.pattern == nil, "prefix has a meaning with pattern only")
	for _, s := range p.platforms {
		refuseIf(!platformPattern.MatchString(s), "platforms: %.60q is not OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, such as linux/amd64", s)
	}
	return err
}

// The events of a run. Their JSON is part of the API.
type (
	fileEvent struct {
		Event  string `json:"event"`
		Remote string `json:"remote"` // "": the path is a URL of no remote
		Path   string `json:"path"`
	}
	foundEvent struct {
		fileEvent
		Size   *int64 `json:"size"` // null: not known
		Stored bool   `json:"stored"`
	}
	doneEvent struct {
		fileEvent
		Bytes  int64  `json:"bytes"`
		Source string `json:"source"` // remote or cache
	}
	failedEvent struct {
		fileEvent
		Status int    `json:"status"`
		Detail string `json:"detail"`
	}
	progressEvent struct {
		Event          string `json:"event"`
		Found          int64  `json:"found"`
		Done           int64  `json:"done"`
		Failed         int64  `json:"failed"`
		Bytes          int64  `json:"bytes"`
		BytesPerSecond int64  `json:"bytes_per_second"` // from upstream, in the last second
	}
	summaryEvent struct {
		Event   string  `json:"event"`
		Found   int64   `json:"found"`
		Fetched int64   `json:"fetched"`
		Cached  int64   `json:"cached"`
		Failed  int64   `json:"failed"`
		Bytes   int64   `json:"bytes"` // of a dry run: of what was found, as far as known
		Seconds float64 `json:"seconds"`
		DryRun  bool    `json:"dry_run"`
	}
)

// prefetchRuns are the runs that go on. Its methods may be called concurrently.
type prefetchRuns struct {
	stopping context.Context // its end is that of all runs: they could take hours, and clients can repeat them

	mu   sync.Mutex // guards runs
	runs []*prefetchRun
}

// addRun adds a run whose request is still to be read. Its error is a problem: there are
// enough.
func (s *prefetchRuns) addRun(p *prefetchRun) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.runs) >= maxPrefetchRuns {
		return &problem{status: http.StatusTooManyRequests, retryAfter: 10 * time.Second, detail: "two prefetch runs go on already: try again when one has ended"}
	}
	s.runs = append(s.runs, p)
	return nil
}

func (s *prefetchRuns) remove(p *prefetchRun) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.runs = slices.DeleteFunc(s.runs, func(other *prefetchRun) bool { return other == p })
}

// list returns the runs that have begun, the oldest first. Of each remote, dryRun,
// started and progress may be used.
func (s *prefetchRuns) list() []*prefetchRun {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.runs), func(p *prefetchRun) bool { return !p.begun.Load() })
}

// prefetchRun is one run.
type prefetchRun struct {
	api     *api
	cfg     *config // of the whole run
	ownHost string  // at which clients reach this server
	ctx     context.Context
	cancel  context.CancelCauseFunc
	started time.Time
	begun   atomic.Bool // its request was read, and does not change any more

	// What is asked for: files that are named, or what pattern finds in a remote.
	named     []wantedFile
	remote    *remote        // nil: several
	pattern   *regexp.Regexp // nil: the files are named
	prefix    string         // of decoded paths; "", or with a slash at its end
	platforms []string
	dryRun    bool

	jobs   chan job     // it has room for all: sending never blocks
	events chan any     // it ends when all other goroutines have ended
	read   byteCounter  // from upstream in this second
	rate   atomic.Int64 // bytes, in the last second

	mu  sync.Mutex // guards sum
	sum summaryEvent
}

// job is a file of a run: its path here, and its size, or 0 if that is not known.
type job struct {
	way  string
	size int64
}

// byteCounter is an io.Writer that counts.
type byteCounter struct{ atomic.Int64 }

func (c *byteCounter) Write(p []byte) (int, error) {
	c.Add(int64(len(p)))
	return len(p), nil
}

// run fetches what is asked for, and answers.
func (p *prefetchRun) run(w *response, withEvents bool) error {
	p.jobs, p.events = make(chan job, maxPrefetchFiles), make(chan any, 64)
	var running sync.WaitGroup
	fetchFound := func() {
		for j := range p.jobs {
			p.fetch(j, &p.read, false)
		}
	}
	running.Go(func() {
		(&prefetchFinder{prefetchRun: p, seen: map[string]struct{}{}}).find()
		close(p.jobs)
		fetchFound()
	})
	for range prefetchWorkers - 1 {
		running.Go(fetchFound)
	}
	go func() {
		running.Wait()
		close(p.events)
	}()
	err := p.answer(w, withEvents)
	p.cancel(nil)
	for range p.events { // until all have ended
	}
	return err
}

// answer writes the events as they come; without them, the summary at the end.
func (p *prefetchRun) answer(w *response, withEvents bool) error {
	write := func(any) error { return nil }
	if withEvents {
		w.Header().Set("Content-Type", "application/x-ndjson")
		lines := json.NewEncoder(w)
		write = func(e any) error {
			if err := lines.Encode(e); err != nil || len(p.events) > 0 {
				return err
			}
			return w.controller.Flush()
		}
	}
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		var e any // nil: there are no more
		select {
		case e = <-p.events:
		case <-ticker.C:
			p.rate.Store(p.read.Swap(0))
			e = p.progress()
		}
		switch {
		case e != nil:
			if err := write(e); err != nil {
				return fmt.Errorf("%w: %w", errClientGone, err)
			}
		case p.ctx.Err() != nil:
			return context.Cause(p.ctx)
		case withEvents:
			return write(p.summary())
		default:
			return writeJSON(w, p.summary())
		}
	}
}

// tell counts by count, and hands the event to the goroutine that writes it.
func (p *prefetchRun) tell(event any, count func(sum *summaryEvent)) {
	p.mu.Lock()
	count(&p.sum)
	p.mu.Unlock()
	p.events <- event
}

// fail tells of a file that cannot be had.
func (p *prefetchRun) fail(remote, path string, err error) {
	status, detail := statusAndDetail(err)
	p.tell(failedEvent{fileEvent{"failed", remote, path}, status, detail}, func(sum *summaryEvent) { sum.Failed++ })
}

// summary says what the run has done so far.
func (p *prefetchRun) summary() summaryEvent {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.sum
	s.Event, s.DryRun = "summary", p.dryRun
	s.Seconds = math.Round(p.api.now().Sub(p.started).Seconds()*1000) / 1000
	return s
}

// progress says how far the run is.
func (p *prefetchRun) progress() progressEvent {
	s := p.summary()
	return progressEvent{"progress", s.Found, s.Fetched + s.Cached, s.Failed, s.Bytes, p.rate.Load()}
}

// findFile returns the file at a path here, which is escaped and may have a query. Its
// errors are those that a GET would get; with an error the file has what is known.
func (p *prefetchRun) findFile(way string) (fileRequest, error) {
	escaped, query, _ := strings.Cut(way, "?")
	first, rest := cutElement(escaped)
	if first != "api" {
		u, err := url.Parse(way)
		if err != nil {
			return fileRequest{}, newProblem(http.StatusBadRequest, "this is not the path of a URL")
		}
		return p.api.registry.findFile(p.cfg, u)
	}
	t, err := p.cfg.resolveTarget(rest, query)
	if err == nil && t.path == "" {
		err = newProblem(http.StatusBadRequest, "this names no file of remote %q", t.remote.name)
	}
	return fileRequest{target: t}, err
}

// fetch fetches a file that was found, and returns its record, or nil. What comes from
// upstream is written to w. A manifest is written whole wherever it is, in a dry run too.
func (p *prefetchRun) fetch(j job, w io.Writer, isManifest bool) *record {
	file, err := p.findFile(j.way)
	if err != nil || p.ctx.Err() != nil { // err was nil when the job was added
		return nil
	}
	name := file.remote.name
	found := foundEvent{fileEvent{"found", name, file.path}, nil, false}
	if rec, err := storedRecord(p.ctx, p.api.cache, file); err == nil {
		found.Size, found.Stored = &rec.Size, true
	} else if j.size > 0 {
		found.Size = &j.size
	}
	p.tell(found, func(sum *summaryEvent) {
		if p.dryRun && found.Size != nil {
			sum.Bytes += *found.Size
		}
	})
	if p.dryRun && !isManifest {
		return nil
	}
	rec, source, err := prefetch(p.ctx, p.api.cache, file, w, isManifest)
	switch {
	case err != nil:
		p.fail(name, file.path, err)
	case !p.dryRun:
		p.tell(doneEvent{fileEvent{"done", name, file.path}, rec.Size, source}, func(sum *summaryEvent) {
			sum.Bytes += rec.Size
			if source == "cache" {
				sum.Cached++
			} else {
				sum.Fetched++
			}
		})
	}
	return rec
}
