// metrics.go: counters, and their exposition in Prometheus' text format 0.0.4
// (prometheus.io/docs/instrumenting/exposition_formats).

package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The values of the labels. Callers use no others, so that the number of series is bounded;
// as the label remote they use the names of configured ones, and "" for everything else.
var (
	resultLabels = [...]string{"hit", "miss", "stale", "revalidated", "none"}
	statusLabels = [...]string{"1xx", "2xx", "3xx", "4xx", "5xx"}
	kindLabels   = [...]string{"unreachable", "timeout", "status", "broken", "digest", "refused"}
	storeLabels  = [...]string{"storage", "database", "redis", "spool"}

	backendLabels = storeLabels[:3]
)

// usualSeries are the requests that every remote has sooner or later. They are there
// from the start, with 0: Prometheus' increase() does not see the first event of a
// series that appears with it.
var usualSeries = map[string]bool{"hit2xx": true, "miss2xx": true, "miss4xx": true, "miss5xx": true, "stale2xx": true, "revalidated2xx": true}

// isFromStore says which results are answered from the store.
var isFromStore = [len(resultLabels)]bool{0: true, 2: true, 3: true}

// durationBounds are the upper bounds of the histogram's buckets, in seconds. A hit
// takes well under a millisecond, a large file over a slow line takes minutes.
var durationBounds = [...]float64{0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10, 60, 600, math.Inf(1)}

// metrics counts what the process does. All methods may be called concurrently.
type metrics struct {
	// remotes is by name. The map is replaced by a larger one when a name is added and
	// never changed, so counting for a known name takes no lock.
	remotes    atomic.Pointer[map[string]*remoteCounts]
	addMu      sync.Mutex // held while remotes is replaced; no other lock is taken under it
	stores     [len(storeLabels)]atomic.Int64
	served     [len(resultLabels)]atomic.Int64 // body bytes sent to clients
	durations  [len(resultLabels)]histogram
	firstBytes [len(resultLabels)]histogram
	peers      atomic.Int64             // body bytes received from other replicas
	upstream   [1]histogram             // from a request to the headers of its answer
	checks     [3]histogram             // of backendLabels
	trendMu    sync.Mutex               // guards trend; no other lock is taken under it
	trend      []map[string]remoteUsage // of all remotes at the ends of the last steps, oldest first
}

// remoteCounts are the counters of one remote. Arrays are indexed by label value.
type remoteCounts struct {
	requests   [len(resultLabels)][len(statusLabels)]atomic.Int64
	failures   [len(kindLabels)]atomic.Int64
	saved      atomic.Int64 // body bytes sent from the store
	fetched    atomic.Int64 // body bytes received from the upstream
	asked      atomic.Int64 // requests sent to the upstream
	incomplete atomic.Int64 // generations that were published although files were missing
}

// histogram counts durations. Each duration is counted in one bucket only; the
// exposition adds them up.
type histogram struct {
	buckets [len(durationBounds)]atomic.Int64
	// sum is in microseconds. Nanoseconds of thousands of long downloads would overflow.
	sum atomic.Int64
}

func newMetrics() *metrics {
	m := &metrics{}
	m.remotes.Store(&map[string]*remoteCounts{})
	return m
}

// countRequest counts one answered request. result is one of resultLabels, or "" for an
// answer that the cache did not decide. bytes are those of the body that were sent.
// firstByte is the time from the request to the headers of the answer, took that to its end.
func (m *metrics) countRequest(remote, result string, status int, bytes int64, firstByte, took time.Duration) {
	class := min(max(status/100, 1), len(statusLabels)) - 1
	r := slices.Index(resultLabels[:], cmp.Or(result, "none"))
	c := m.countsOf(remote)
	c.requests[r][class].Add(1)
	if isFromStore[r] {
		c.saved.Add(bytes)
	}
	m.served[r].Add(bytes)
	m.firstBytes[r].observe(firstByte)
	m.durations[r].observe(took)
}

// countUpstreamRequest counts a request to a remote's upstream. d is the time to the
// headers of its answer, or to its failure.
func (m *metrics) countUpstreamRequest(remote string, d time.Duration) {
	m.countsOf(remote).asked.Add(1)
	m.upstream[0].observe(d)
}

// countCheck counts a check of a backend, one of backendLabels, by its length.
func (m *metrics) countCheck(backend string, d time.Duration) {
	m.checks[slices.Index(backendLabels, backend)].observe(d)
}

func (m *metrics) countFetchedBytes(remote string, n int64) { m.countsOf(remote).fetched.Add(n) }

// countUpstreamError counts a failed request by its kind, one of kindLabels.
func (m *metrics) countUpstreamError(remote, kind string) {
	m.countsOf(remote).failures[slices.Index(kindLabels[:], kind)].Add(1)
}

// countStoreError counts a failure of a store, one of storeLabels.
func (m *metrics) countStoreError(store string) {
	m.stores[slices.Index(storeLabels[:], store)].Add(1)
}

// countsOf returns the counters of a remote, and makes them for a new name.
func (m *metrics) countsOf(name string) *remoteCounts {
	if c := (*m.remotes.Load())[name]; c != nil {
		return c
	}
	m.addMu.Lock()
	defer m.addMu.Unlock()
	all := maps.Clone(*m.remotes.Load())
	if all[name] == nil { // else another goroutine was faster
		all[name] = &remoteCounts{}
		m.remotes.Store(&all)
	}
	return all[name]
}

func (h *histogram) observe(d time.Duration) {
	seconds := d.Seconds()
	i := slices.IndexFunc(durationBounds[:], func(bound float64) bool { return seconds <= bound })
	h.buckets[i].Add(1)
	h.sum.Add(d.Round(time.Microsecond).Microseconds())
}

const (
	// trendStep and trendLength bound what the page plots: six hours.
	trendStep   = 5 * time.Minute
	trendLength = 72
)

// remoteUsage is what the page says of a remote's requests.
type remoteUsage struct {
	hits, misses int64 // answered from the store, and by the upstream
	saved        int64 // body bytes of hits
}

// usageOf is the usage of a remote since the start.
func (m *metrics) usageOf(remote string) (u remoteUsage) {
	c := (*m.remotes.Load())[remote]
	if c == nil {
		return u
	}
	for r := range c.requests {
		for s := range c.requests[r] {
			switch n := c.requests[r][s].Load(); {
			case isFromStore[r]:
				u.hits += n
			case resultLabels[r] == "miss":
				u.misses += n
			}
		}
	}
	u.saved = c.saved.Load()
	return u
}

// sampleTrend ends a step. It is called every trendStep.
func (m *metrics) sampleTrend() {
	now := map[string]remoteUsage{}
	for name := range *m.remotes.Load() {
		now[name] = m.usageOf(name)
	}
	m.trendMu.Lock()
	defer m.trendMu.Unlock()
	m.trend = append(m.trend, now)
	m.trend = m.trend[max(0, len(m.trend)-trendLength):]
}

// trendOf returns a remote's usage in each of the last steps, oldest first; the last
// has just begun.
func (m *metrics) trendOf(remote string) []remoteUsage {
	m.trendMu.Lock()
	defer m.trendMu.Unlock()
	samples := append(slices.Clone(m.trend), map[string]remoteUsage{remote: m.usageOf(remote)})
	steps, before := make([]remoteUsage, trendLength-min(trendLength, len(samples))), remoteUsage{}
	for _, sample := range samples {
		s := sample[remote]
		steps = append(steps, remoteUsage{s.hits - before.hits, s.misses - before.misses, s.saved - before.saved})
		before = s
	}
	return steps[len(steps)-trendLength:]
}

// family is a metric family without histograms.
type family struct {
	name, kind, help string             // kind is counter or gauge
	label            string             // "": values has one value, of ""; several are separated by commas
	values           map[string]float64 // by the value of the label; those of several are separated by NUL
}

// newGauge and newCounter make a family of one value without a label.
func newGauge(name, help string, v float64) family {
	return family{name, "gauge", help, "", map[string]float64{"": v}}
}

func newCounter(name, help string, v float64) family {
	return family{name, "counter", help, "", map[string]float64{"": v}}
}

// writeExposition writes all counters, and the families that are known elsewhere. The
// remotes have their usual series although nothing was counted for them yet.
func (m *metrics) writeExposition(w io.Writer, remoteNames []string, known []family) error {
	for _, name := range remoteNames {
		m.countsOf(name)
	}
	e, remotes := &exposition{}, *m.remotes.Load()
	for _, f := range slices.Concat(known, m.families(remotes), processFamilies()) {
		e.beginFamily(f.name, f.kind, f.help)
		for _, v := range sortedKeys(f.values) {
			e.writeSample(f.name, f.values[v], f.label, strings.Split(v, "\x00")...)
		}
	}
	e.writeHistograms("artifactapi_request_duration_seconds", "Time from the arrival of a request to the end of its answer.", "result", resultLabels[:], m.durations[:])
	e.writeHistograms("artifactapi_first_byte_seconds", "Time from the arrival of a request to the headers of its answer.", "result", resultLabels[:], m.firstBytes[:])
	e.writeHistograms("artifactapi_upstream_request_duration_seconds", "Time from a request to an upstream to the headers of its answer.", "", []string{""}, m.upstream[:])
	e.writeHistograms("artifactapi_backend_duration_seconds", "Length of the checks of a backend.", "backend", backendLabels, m.checks[:])
	e.writeCollections()
	_, err := w.Write(e.text.Bytes())
	return err
}

// families returns all counters but the histograms.
func (m *metrics) families(remotes map[string]*remoteCounts) []family {
	served, failed := map[string]float64{}, map[string]float64{}
	for i, r := range resultLabels {
		served[r] = float64(m.served[i].Load())
	}
	for i, s := range storeLabels {
		failed[s] = float64(m.stores[i].Load())
	}
	fetched, asked, requests, failures := map[string]float64{}, map[string]float64{}, map[string]float64{}, map[string]float64{}
	for name, c := range remotes {
		for i, result := range resultLabels {
			for j, status := range statusLabels {
				if n := c.requests[i][j].Load(); n > 0 || (name != "" && usualSeries[result+status]) {
					requests[name+"\x00"+result+"\x00"+status] = float64(n)
				}
			}
		}
		for i, kind := range kindLabels {
			if n := c.failures[i].Load(); n > 0 || name != "" {
				failures[name+"\x00"+kind] = float64(n)
			}
		}
		if name != "" {
			fetched[name], asked[name] = float64(c.fetched.Load()), float64(c.asked.Load())
		}
	}
	return []family{
		{"artifactapi_requests_total", "counter", "Requests answered; remote is empty if the request names none.", "remote,result,status_class", requests},
		{"artifactapi_upstream_errors_total", "counter", "Requests to upstreams that failed.", "remote,kind", failures},
		{"artifactapi_served_bytes_total", "counter", "Body bytes sent to clients; those of hits were saved.", "result", served},
		{"artifactapi_fetched_bytes_total", "counter", "Body bytes received from upstreams.", "remote", fetched},
		newCounter("artifactapi_peer_bytes_total", "Body bytes received from other replicas.", float64(m.peers.Load())),
		{"artifactapi_upstream_requests_total", "counter", "Requests sent to upstreams.", "remote", asked},
		{"artifactapi_store_errors_total", "counter", "Failures of storage, database, redis and spool.", "store", failed},
	}
}

// exposition builds the text of one scrape, one metric family after the other.
type exposition struct{ text bytes.Buffer }

// writeHistograms writes a family with one histogram for each value of a label. Each
// bucket of the format counts all durations up to its bound.
func (e *exposition) writeHistograms(name, help, label string, values []string, histograms []histogram) {
	e.beginFamily(name, "histogram", help)
	for i, value := range values {
		h := &histograms[i]
		var n int64
		for b := range h.buckets {
			n += h.buckets[b].Load()
			e.writeSample(name+"_bucket", float64(n), label+",le", value, formatNumber(durationBounds[b]))
		}
		e.writeSample(name+"_sum", float64(h.sum.Load())/1e6, label, value)
		e.writeSample(name+"_count", float64(n), label, value)
	}
}

// beginFamily begins a metric family. help has no backslash or line feed: it is not escaped.
func (e *exposition) beginFamily(name, kind, help string) {
	fmt.Fprintf(&e.text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// writeSample writes the value of one series. labels are separated by commas; one without
// a name is left out. What occurs in values is escaped by Go as by the format.
func (e *exposition) writeSample(name string, v float64, labels string, values ...string) {
	e.text.WriteString(name)
	sep := "{"
	for i, label := range strings.Split(labels, ",") {
		if label != "" {
			fmt.Fprintf(&e.text, "%s%s=%q", sep, label, values[i])
			sep = ","
		}
	}
	if sep == "," {
		e.text.WriteByte('}')
	}
	fmt.Fprintf(&e.text, " %s\n", formatNumber(v))
}

// processFamilies are what every Go program exposes, go_* and process_*, under the names
// that Prometheus' own client has. Where there is no /proc, the values from there are left
// out.
func processFamilies() []family {
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	all := []family{
		{"go_info", "gauge", "The version of Go; always 1.", "version", map[string]float64{runtime.Version(): 1}},
		newGauge("go_threads", "Threads that were created.", float64(pprof.Lookup("threadcreate").Count())),
		newGauge("go_goroutines", "Goroutines that exist.", float64(runtime.NumGoroutine())),
		newGauge("go_sched_gomaxprocs_threads", "GOMAXPROCS.", float64(runtime.GOMAXPROCS(0))),
		newGauge("go_memstats_alloc_bytes", "Bytes of objects on the heap, under its older name.", float64(memory.Alloc)),
		newGauge("go_memstats_heap_alloc_bytes", "Bytes of objects on the heap.", float64(memory.HeapAlloc)),
		newGauge("go_memstats_next_gc_bytes", "Heap size at which the next collection ends.", float64(memory.NextGC)),
		newGauge("go_memstats_sys_bytes", "Memory that the runtime has from the system.", float64(memory.Sys)),
		newCounter("go_gc_cycles_total_gc_cycles_total", "Collections so far.", float64(memory.NumGC)),
	}
	var files, space syscall.Rlimit // the largest number: no limit
	var used syscall.Rusage
	if errors.Join(syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files), syscall.Getrlimit(syscall.RLIMIT_AS, &space),
		syscall.Getrusage(syscall.RUSAGE_SELF, &used)) == nil {
		all = append(all, newGauge("process_max_fds", "File descriptors that may be open.", float64(files.Cur)),
			newGauge("process_virtual_memory_max_bytes", "Virtual memory that may be used.", float64(space.Cur)),
			newCounter("process_cpu_seconds_total", "CPU time used, user and system.", float64(used.Utime.Nano()+used.Stime.Nano())/1e9))
	}
	if open, err := os.ReadDir("/proc/self/fd"); err == nil {
		all = append(all, newGauge("process_open_fds", "File descriptors that are open.", float64(len(open))))
	}
	text, _ := os.ReadFile("/proc/self/statm") // proc_pid_statm(5): in pages
	var virtual, resident float64
	if n, _ := fmt.Sscan(string(text), &virtual, &resident); n == 2 {
		page := float64(os.Getpagesize())
		all = append(all, newGauge("process_virtual_memory_bytes", "Virtual memory.", virtual*page),
			newGauge("process_resident_memory_bytes", "Resident memory.", resident*page))
	}
	return all
}

// writeCollections writes the pauses of the garbage collector as Prometheus' own client
// does: a summary with five quantiles of the last collections.
func (e *exposition) writeCollections() {
	const name = "go_gc_duration_seconds"
	stats := debug.GCStats{PauseQuantiles: make([]time.Duration, 5)}
	debug.ReadGCStats(&stats)
	e.beginFamily(name, "summary", "Pauses of the garbage collector.")
	for i, pause := range stats.PauseQuantiles {
		e.writeSample(name, pause.Seconds(), "quantile", formatNumber(float64(i)/4))
	}
	e.writeSample(name+"_sum", stats.PauseTotal.Seconds(), "")
	e.writeSample(name+"_count", float64(stats.NumGC), "")
}

func boolNumber(v bool) float64 {
	if v {
		return 1
	}
	return 0
}

// formatNumber formats a value without an exponent.
func formatNumber(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }

// sortedKeys returns the keys of a map in order, so that two scrapes differ in their
// values only.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
