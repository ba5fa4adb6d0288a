// api_prefetch_run.go: a prefetch run: its files, the workers that fetch them, and the
// events that tell of them.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxPrefetchRuns bounds the runs at once: a long one and another beside it.
	maxPrefetchRuns = 2
	// prefetchWorkers is how many files a run fetches at once: a fraction of the
	// places that a remote has for all its clients.
	prefetchWorkers = 8
	// maxPrefetchFiles bounds the files of a run, which take some 300 bytes of memory
	// each. Large repositories have a quarter of it for one architecture.
	maxPrefetchFiles = 250_000
)

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
	mu      sync.Mutex // guards the fields below
	runs    []*prefetchRun
	stopped bool
}

// errStopped ends the runs when the server stops.
var errStopped = newProblem(http.StatusServiceUnavailable, "the server stops: what is missing is fetched by another run")

// stop ends all runs: they could take hours, and clients can repeat them.
func (s *prefetchRuns) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
	for _, p := range s.runs {
		p.cancel(errStopped)
	}
}

// begin adds a run. Its error is a problem: there are enough, or the server stops.
func (s *prefetchRuns) begin(p *prefetchRun) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopped:
		return errStopped
	case len(s.runs) >= maxPrefetchRuns:
		return &problem{status: http.StatusTooManyRequests, retryAfter: 10 * time.Second, detail: "two prefetch runs go on already: try again when one has ended"}
	}
	s.runs = append(s.runs, p)
	return nil
}

func (s *prefetchRuns) end(p *prefetchRun) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.runs = slices.DeleteFunc(s.runs, func(other *prefetchRun) bool { return other == p })
}

// list returns the runs that have read their request, the oldest first. Of each its
// remote (nil: several), started, dryRun and progress may be used.
func (s *prefetchRuns) list() []*prefetchRun {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.runs), func(p *prefetchRun) bool { return !p.isRunning() })
}

// prefetchRun is one run. One goroutine finds files, workers fetch them, and the
// goroutine of the request writes what they tell it.
type prefetchRun struct {
	api       *api
	cfg       *config // of the whole run
	ctx       context.Context
	cancel    context.CancelCauseFunc
	remote    *remote // nil: several
	platforms []string
	dryRun    bool
	started   time.Time

	jobs   jobQueue
	events chan any
	read   byteCounter // from upstream, of files that are not done too

	mu      sync.Mutex // guards the fields below
	running bool
	sum     summaryEvent // what was told so far; Found is the queue's
	rate    int64        // bytes a second
}

func (p *prefetchRun) isRunning() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.running
}

// byteCounter is an io.Writer that counts.
type byteCounter struct{ atomic.Int64 }

func (c *byteCounter) Write(p []byte) (int, error) {
	c.Add(int64(len(p)))
	return len(p), nil
}

// run fetches what find finds, and answers.
func (p *prefetchRun) run(w *response, find func(), withEvents bool) error {
	p.jobs.init(p.ctx)
	p.mu.Lock()
	p.running = true
	p.mu.Unlock()
	var running sync.WaitGroup
	running.Go(func() {
		defer p.jobs.finish()
		find()
	})
	for range prefetchWorkers {
		running.Go(p.work)
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
		w.Header().Set("X-Content-Type-Options", "nosniff")
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
	for lastRead := int64(0); ; {
		var err error
		select {
		case e, more := <-p.events:
			switch {
			case more:
				p.count(e)
				err = write(e)
			case p.ctx.Err() != nil:
				return context.Cause(p.ctx)
			case withEvents:
				return write(p.summary())
			default:
				return writeJSON(w, p.summary())
			}
		case <-ticker.C:
			read := p.read.Load()
			p.mu.Lock()
			p.rate = read - lastRead
			p.mu.Unlock()
			lastRead = read
			err = write(p.progress())
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errClientGone, err)
		}
	}
}

// count counts an event.
func (p *prefetchRun) count(e any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch e := e.(type) {
	case foundEvent:
		if p.dryRun && e.Size != nil {
			p.sum.Bytes += *e.Size
		}
	case doneEvent:
		if e.Source == "cache" {
			p.sum.Cached++
		} else {
			p.sum.Fetched++
		}
		p.sum.Bytes += e.Bytes
	case failedEvent:
		p.sum.Failed++
	}
}

// summary says what the run has done so far.
func (p *prefetchRun) summary() summaryEvent {
	found := p.jobs.found()
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.sum
	s.Event, s.Found, s.DryRun = "summary", found, p.dryRun
	s.Seconds = math.Round(p.api.now().Sub(p.started).Seconds()*1000) / 1000
	return s
}

// progress says how far the run is.
func (p *prefetchRun) progress() progressEvent {
	s := p.summary()
	p.mu.Lock()
	defer p.mu.Unlock()
	return progressEvent{"progress", s.Found, s.Fetched + s.Cached, s.Failed, s.Bytes, p.rate}
}

// emit hands an event to the goroutine that writes it.
func (p *prefetchRun) emit(e any) {
	select {
	case p.events <- e:
	case <-p.ctx.Done():
	}
}

// fail tells of a file that cannot be had.
func (p *prefetchRun) fail(remote, path string, err error) {
	status, detail := statusAndDetail(err)
	p.emit(failedEvent{fileEvent{"failed", remote, path}, status, detail})
}

// findFile returns the file at a path here, which is escaped and may have a query. Its
// errors are those that a GET would get; with an error the file has what is known.
func (p *prefetchRun) findFile(way string) (fileRequest, error) {
	escaped, query, _ := strings.Cut(way, "?")
	first, rest, _ := strings.Cut(trimEmptySegments(escaped), "/")
	if first != "api" {
		u, err := url.Parse(way)
		if err != nil {
			return fileRequest{}, newProblem(http.StatusBadRequest, "this is not the path of a URL")
		}
		return p.api.registry.findFile(p.cfg, u)
	}
	name, escaped, _ := strings.Cut(trimEmptySegments(strings.TrimPrefix(rest, "v1/remote/")), "/")
	t, err := p.cfg.resolveTarget(name, escaped, query)
	switch {
	case err != nil:
	case t.path == "":
		err = newProblem(http.StatusBadRequest, "this names no file of remote %q", name)
	default:
		err = t.classify()
	}
	return fileRequest{target: t}, err
}

// addNamed adds files that were named one by one.
func (p *prefetchRun) addNamed(files []wantedFile) {
	for _, f := range files {
		file, err := p.findFile(f.way)
		switch {
		case f.hadQuery:
			err = newProblem(http.StatusBadRequest, "it was asked for with a query, which is not in this list: give its URL")
		case f.way == "":
			err = newProblem(http.StatusNotFound, "no remote has a base_url that this URL begins with")
		case err == nil:
			err = p.jobs.push(file.key(), job{f.way, 0})
		}
		if f.remote == "" && file.remote != nil { // it was named by its URL here
			f.remote, f.path = file.remote.name, cmp.Or(file.path, f.path)
		}
		if err != nil {
			p.fail(f.remote, f.path, err)
		}
	}
}

// work does jobs until there are no more.
func (p *prefetchRun) work() {
	for {
		j, ok := p.jobs.take()
		if !ok {
			return
		}
		if file, err := p.findFile(j.way); err == nil { // it was nil when the job was added
			p.fetch(file, j.size)
		}
		p.jobs.finish()
	}
}

// fetch fetches a file that was found. Of a manifest it adds what that names. A dry run
// fetches manifests only.
func (p *prefetchRun) fetch(file fileRequest, declared int64) {
	name, image := file.remote.name, imageOfManifest(file)
	rec := storedRecord(p.ctx, p.api.cache, file)
	found := foundEvent{fileEvent{"found", name, file.path}, nil, rec != nil}
	if rec != nil {
		found.Size = &rec.Size
	} else if declared > 0 {
		found.Size = &declared
	}
	p.emit(found)
	if p.dryRun && image == "" {
		return
	}
	var to io.Writer = &p.read
	var text bytes.Buffer
	if image != "" {
		to = &text
	}
	size, fromRemote, err := prefetch(p.ctx, p.api.cache, file, to, image != "")
	if err != nil {
		p.fail(name, file.path, err)
		return
	}
	if !p.dryRun {
		source := "cache"
		if fromRemote {
			source = "remote"
		}
		p.emit(doneEvent{fileEvent{"done", name, file.path}, size, source})
	}
	if image != "" {
		p.addParts(file, image, text.Bytes())
	}
}

// job is a file of a run: its path here, and its size, or 0 if that is not known.
type job struct {
	way  string
	size int64
}

// jobQueue has the files of a run. Its methods may be called concurrently.
type jobQueue struct {
	ctx     context.Context
	mu      sync.Mutex // guards the fields below
	changed *sync.Cond
	seen    map[string]struct{} // keys
	jobs    []job
	open    int // jobs that are not finished, and the finder
}

// init makes a queue that ends with ctx, and whose finder has not finished.
func (q *jobQueue) init(ctx context.Context) {
	q.ctx, q.changed, q.seen, q.open = ctx, sync.NewCond(&q.mu), map[string]struct{}{}, 1
	context.AfterFunc(ctx, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.changed.Broadcast()
	})
}

// push adds a job, unless there was one for its key.
func (q *jobQueue) push(key string, j job) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, twice := q.seen[key]; twice {
		return nil
	}
	if len(q.seen) == maxPrefetchFiles {
		return newProblem(http.StatusRequestEntityTooLarge, "a run has at most %d files: narrow it by prefix or pattern", maxPrefetchFiles)
	}
	q.seen[key] = struct{}{}
	q.jobs = append(q.jobs, j)
	q.open++
	q.changed.Signal()
	return nil
}

// take waits for a job. ok is false when there will be no more. finish follows each.
func (q *jobQueue) take() (j job, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.ctx.Err() == nil && q.open > 0 {
		if len(q.jobs) > 0 {
			j, q.jobs = q.jobs[0], q.jobs[1:]
			return j, true
		}
		q.changed.Wait()
	}
	return j, false
}

// finish is called when a job is done, and by the finder at its end.
func (q *jobQueue) finish() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.open--; q.open == 0 {
		q.changed.Broadcast()
	}
}

// found is how many files were found.
func (q *jobQueue) found() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return int64(len(q.seen))
}
