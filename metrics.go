// metrics.go: counters and their Prometheus text exposition.

package main

import (
	"bytes"
	"cmp"
	"io"
	"maps"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// metricsType is the Content-Type of what write writes.
const metricsType = "text/plain; version=0.0.4; charset=utf-8"

// maxRemotes bounds the label remote. Callers name configured remotes only and
// give "" for anything else, so it is reached by reloads of ever new names; a
// later name counts as otherLabel. A thousand make about 1 MB of scrape.
const maxRemotes = 1000

const otherLabel = "other"

// The values of the other labels. What is not listed counts as the last one,
// so a caller's slip is seen and makes no series without bound.
var (
	resultLabels = [...]string{"hit", "miss", "stale", "revalidated", "none", otherLabel}
	statusLabels = [...]string{"1xx", "2xx", "3xx", "4xx", "5xx", otherLabel}
	kindLabels   = [...]string{"unreachable", "timeout", "status", "broken", "digest", "refused", otherLabel}
	storeLabels  = [...]string{"storage", "database", "redis", "spool", otherLabel}
)

// durationBounds are the histogram's upper bounds in seconds: a hit takes well
// under a millisecond, a large file over a slow line minutes.
var durationBounds = [...]float64{0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10, 60, 600}

// metrics counts what the process does. All methods may be called concurrently
// and on a nil receiver.
type metrics struct {
	// remotes is copied when a name is added, so counting a known one takes no
	// lock and allocates nothing.
	remotes   atomic.Pointer[map[string]*remoteCounts]
	addMu     sync.Mutex // held while remotes is replaced
	stores    [len(storeLabels)]atomic.Int64
	durations [len(resultLabels)]histogram
}

// remoteCounts are the counters of one remote: arrays by label value, since
// every label but the remote has few.
type remoteCounts struct {
	requests [len(resultLabels)][len(statusLabels)]atomic.Int64
	failures [len(kindLabels)]atomic.Int64
	served   atomic.Int64
	fetched  atomic.Int64
	fills    atomic.Int64
}

// histogram counts durations, each in the one bucket it falls into; the last
// bucket has no bound.
type histogram struct {
	buckets [len(durationBounds) + 1]atomic.Int64
	// sum is a float64's bits: int64 nanoseconds would overflow within months
	// where thousands of long downloads run at once.
	sum atomic.Uint64
}

// gauges is what a scrape shows beside the counters; its caller knows it.
type gauges struct {
	version  string
	started  time.Time
	backends map[string]bool       // storage, database, redis: is it up
	stored   map[string]storedSize // by remote
}

// storedSize is what one remote has stored.
type storedSize struct{ Files, Bytes int64 }

func newMetrics() *metrics {
	m := &metrics{}
	m.remotes.Store(&map[string]*remoteCounts{})
	return m
}

// countRequest counts one answered request: result is hit, miss, stale, revalidated,
// or "" for what no cache decided.
func (m *metrics) countRequest(remote, result string, status int, bytes int64, d time.Duration) {
	if m == nil {
		return
	}
	r := labelIndex(resultLabels[:], cmp.Or(result, "none"))
	c := m.countsOf(remote)
	c.requests[r][statusClass(status)].Add(1)
	c.served.Add(bytes)
	m.durations[r].observe(d)
}

// countFetchedBytes counts body bytes that came from a remote's upstream.
func (m *metrics) countFetchedBytes(remote string, n int64) {
	if m != nil {
		m.countsOf(remote).fetched.Add(n)
	}
}

// countUpstreamError counts a failed question by kind: unreachable, timeout,
// status, broken, digest, refused.
func (m *metrics) countUpstreamError(remote, kind string) {
	if m != nil {
		m.countsOf(remote).failures[labelIndex(kindLabels[:], kind)].Add(1)
	}
}

// countStoreError counts a failure of storage, database, redis or spool.
func (m *metrics) countStoreError(what string) {
	if m != nil {
		m.stores[labelIndex(storeLabels[:], what)].Add(1)
	}
}

// addFillsInFlight adds n to the number of fills in flight of a remote.
func (m *metrics) addFillsInFlight(remote string, n int64) {
	if m != nil {
		m.countsOf(remote).fills.Add(n)
	}
}

// countsOf returns the counters of a name, or those of otherLabel when there are
// too many names.
func (m *metrics) countsOf(name string) *remoteCounts {
	all := *m.remotes.Load()
	if c := all[name]; c != nil {
		return c
	}
	if len(all) >= maxRemotes {
		if c := all[otherLabel]; c != nil {
			return c
		}
		name = otherLabel
	}
	return m.addRemote(name)
}

func (m *metrics) addRemote(name string) *remoteCounts {
	name = strings.ToValidUTF8(name, "\uFFFD") // two names must not become one label
	m.addMu.Lock()
	defer m.addMu.Unlock()
	old := *m.remotes.Load()
	if len(old) >= maxRemotes && old[name] == nil {
		name = otherLabel
	}
	if c := old[name]; c != nil {
		return c
	}
	all := maps.Clone(old)
	c := &remoteCounts{}
	all[strings.Clone(name)] = c // it may be a piece of a long URL
	m.remotes.Store(&all)
	return c
}

func (h *histogram) observe(d time.Duration) {
	s := d.Seconds()
	i := 0
	for i < len(durationBounds) && s > durationBounds[i] {
		i++
	}
	h.buckets[i].Add(1)
	for {
		old := h.sum.Load()
		if h.sum.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+s)) {
			return
		}
	}
}

// labelIndex is the place of a value in its list, the last place when it has none.
func labelIndex(values []string, v string) int {
	if i := slices.Index(values, v); i >= 0 {
		return i
	}
	return len(values) - 1
}

// statusClass is the place of a status in statusLabels.
func statusClass(status int) int {
	if status < 100 || status > 599 {
		return len(statusLabels) - 1
	}
	return status/100 - 1
}

// writeExposition writes everything in Prometheus' text format 0.0.4.
func (m *metrics) writeExposition(w io.Writer, g gauges) error {
	e := &exposition{}
	e.writeProcess(g)
	if m != nil {
		e.writeCounters(m)
	}
	e.writeGauges(g)
	_, err := w.Write(e.buf.Bytes())
	return err
}

// exposition builds one scrape's text, family after family.
type exposition struct {
	buf bytes.Buffer
}

func (e *exposition) writeProcess(g gauges) {
	e.beginFamily("artifactapi_build_info", "gauge", "What is running; always 1.")
	e.writeSample("artifactapi_build_info", 1, "version", g.version, "goversion", runtime.Version())
	e.beginFamily("process_start_time_seconds", "gauge", "When the process started, in seconds since 1970.")
	e.writeSample("process_start_time_seconds", float64(g.started.UnixMilli())/1000)
	e.beginFamily("go_goroutines", "gauge", "Goroutines that exist.")
	e.writeSample("go_goroutines", float64(runtime.NumGoroutine()))
}

func (e *exposition) writeCounters(m *metrics) {
	remotes := *m.remotes.Load()
	e.writeRequests(remotes)
	for _, f := range []struct {
		name, kind, help string
		of               func(*remoteCounts) *atomic.Int64
	}{
		{"artifactapi_served_bytes_total", "counter", "Body bytes sent to clients.",
			func(c *remoteCounts) *atomic.Int64 { return &c.served }},
		{"artifactapi_fetched_bytes_total", "counter", "Body bytes received from upstreams.",
			func(c *remoteCounts) *atomic.Int64 { return &c.fetched }},
		{"artifactapi_fills_in_flight", "gauge", "Downloads running now.",
			func(c *remoteCounts) *atomic.Int64 { return &c.fills }},
	} {
		e.beginFamily(f.name, f.kind, f.help)
		for _, r := range sortedKeys(remotes) {
			e.writeSample(f.name, float64(f.of(remotes[r]).Load()), "remote", r)
		}
	}
	e.writeUpstreamErrors(remotes)
	e.beginFamily("artifactapi_store_errors_total", "counter", "Failures of storage, database, redis and spool.")
	for i, s := range storeLabels {
		e.writeSample("artifactapi_store_errors_total", float64(m.stores[i].Load()), "store", s)
	}
	e.writeDurations(&m.durations)
}

func (e *exposition) writeRequests(remotes map[string]*remoteCounts) {
	const name = "artifactapi_requests_total"
	e.beginFamily(name, "counter", "Requests answered; remote is empty where none was named.")
	for _, r := range sortedKeys(remotes) {
		for i, result := range resultLabels {
			for j, status := range statusLabels {
				// Most of the 36 combinations never occur.
				if n := remotes[r].requests[i][j].Load(); n > 0 {
					e.writeSample(name, float64(n), "remote", r, "result", result, "status_class", status)
				}
			}
		}
	}
}

// writeUpstreamErrors shows zeros too: a counter that appears with its first failure hides
// that failure from increase().
func (e *exposition) writeUpstreamErrors(remotes map[string]*remoteCounts) {
	const name = "artifactapi_upstream_errors_total"
	e.beginFamily(name, "counter", "Questions to upstreams that failed.")
	for _, r := range sortedKeys(remotes) {
		for i, kind := range kindLabels {
			n := remotes[r].failures[i].Load()
			if n > 0 || r != "" && kind != otherLabel {
				e.writeSample(name, float64(n), "remote", r, "kind", kind)
			}
		}
	}
}

func (e *exposition) writeDurations(durations *[len(resultLabels)]histogram) {
	const name = "artifactapi_request_duration_seconds"
	e.beginFamily(name, "histogram", "From a request's arrival to the end of its answer.")
	for i, result := range resultLabels {
		h := &durations[i]
		sum := math.Float64frombits(h.sum.Load())
		var n int64
		for b := range h.buckets {
			n += h.buckets[b].Load()
			bound := math.Inf(1)
			if b < len(durationBounds) {
				bound = durationBounds[b]
			}
			e.writeSample(name+"_bucket", float64(n), "result", result, "le", formatNumber(bound))
		}
		e.writeSample(name+"_sum", sum, "result", result)
		e.writeSample(name+"_count", float64(n), "result", result)
	}
}

func (e *exposition) writeGauges(g gauges) {
	e.beginFamily("artifactapi_backend_up", "gauge", "1 while a backend can be used, else 0.")
	for _, b := range sortedKeys(g.backends) {
		up := 0.0
		if g.backends[b] {
			up = 1
		}
		e.writeSample("artifactapi_backend_up", up, "backend", b)
	}
	e.beginFamily("artifactapi_stored_bytes", "gauge", "Bytes stored.")
	for _, s := range sortedKeys(g.stored) {
		e.writeSample("artifactapi_stored_bytes", float64(g.stored[s].Bytes), "remote", s)
	}
	e.beginFamily("artifactapi_stored_files", "gauge", "Files stored.")
	for _, s := range sortedKeys(g.stored) {
		e.writeSample("artifactapi_stored_files", float64(g.stored[s].Files), "remote", s)
	}
}

// beginFamily begins a metric. help has no backslash and no line feed.
func (e *exposition) beginFamily(name, kind, help string) {
	e.buf.WriteString("# HELP " + name + " " + help + "\n# TYPE " + name + " " + kind + "\n")
}

// writeSample writes one series; labels are names and values in turn.
func (e *exposition) writeSample(name string, v float64, labels ...string) {
	e.buf.WriteString(name)
	sep := "{"
	for i := 0; i+1 < len(labels); i += 2 {
		e.buf.WriteString(sep + labels[i] + `="` + escapeLabel(labels[i+1]) + `"`)
		sep = ","
	}
	if len(labels) > 0 {
		e.buf.WriteByte('}')
	}
	e.buf.WriteString(" " + formatNumber(v) + "\n")
}

// escapeLabel makes a label value of any string.
func escapeLabel(s string) string {
	return labelEscapes.Replace(strings.ToValidUTF8(s, "\uFFFD"))
}

var labelEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// formatNumber writes whole numbers without an exponent, as people read them.
func formatNumber(v float64) string {
	switch {
	case math.IsInf(v, 1):
		return "+Inf"
	case v == math.Trunc(v) && math.Abs(v) < 1<<53:
		return strconv.FormatInt(int64(v), 10)
	}
	return strconv.FormatFloat(v, 'f', -1, 64)
}

// sortedKeys lists a map's keys in order, so that two scrapes differ in values only.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
