// metrics.go: counters, and their exposition in Prometheus' text format 0.0.4
// (prometheus.io/docs/instrumenting/exposition_formats).

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

// metricsType is the Content-Type of the text that writeExposition writes.
const metricsType = "text/plain; version=0.0.4; charset=utf-8"

// maxRemotes bounds the values of the label remote. Callers name configured remotes
// only and use "" for everything else, so only reloads with ever new names reach
// it. A thousand remotes make a scrape of about 1 MB.
const maxRemotes = 1000

// otherLabel is the label value of everything that has none of its own: a remote
// beyond maxRemotes, or a value that is not in the lists below.
const otherLabel = "other"

// The values of the other labels. A value that is not listed is counted as the
// last one. A caller's mistake is visible there, and the number of series stays
// bounded.
var (
	resultLabels = [...]string{"hit", "miss", "stale", "revalidated", "none", otherLabel}
	statusLabels = [...]string{"1xx", "2xx", "3xx", "4xx", "5xx", otherLabel}
	kindLabels   = [...]string{"unreachable", "timeout", "status", "broken", "digest", "refused", otherLabel}
	storeLabels  = [...]string{"storage", "database", "redis", "spool", otherLabel}
)

// durationBounds are the upper bounds of the histogram's buckets, in seconds. A hit
// takes well under a millisecond, a large file over a slow line takes minutes.
var durationBounds = [...]float64{0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10, 60, 600}

// metrics counts what the process does. All methods may be called concurrently
// and on a nil receiver.
type metrics struct {
	// remotes holds the counters by the name of the remote. The map is replaced by
	// a larger one when a name is added and never changed, so counting for a known
	// name takes no lock and allocates nothing.
	remotes   atomic.Pointer[map[string]*remoteCounts]
	addMu     sync.Mutex // held while remotes is replaced; no other lock is taken under it
	stores    [len(storeLabels)]atomic.Int64
	durations [len(resultLabels)]histogram
}

// remoteCounts are the counters of one remote. They are arrays indexed by label
// value, because each label has few values.
type remoteCounts struct {
	requests [len(resultLabels)][len(statusLabels)]atomic.Int64
	failures [len(kindLabels)]atomic.Int64
	served   atomic.Int64 // body bytes sent to clients
	fetched  atomic.Int64 // body bytes received from the upstream
	fills    atomic.Int64 // fills that run now
}

// histogram counts durations. Each duration is counted in one bucket only; the
// exposition adds them up. The last bucket has no upper bound.
type histogram struct {
	buckets [len(durationBounds) + 1]atomic.Int64
	// sum holds the bits of a float64, in seconds. Nanoseconds in an int64 would
	// overflow within months while thousands of long downloads run at once.
	sum atomic.Uint64
}

// gauges are the values of a scrape that are not counted here.
type gauges struct {
	version  string
	started  time.Time
	backends map[string]bool       // whether storage, database and redis can be used
	stored   map[string]storedSize // by remote
}

// storedSize is how much of one remote is stored.
type storedSize struct{ Files, Bytes int64 }

// newMetrics makes counters that are all zero.
func newMetrics() *metrics {
	m := &metrics{}
	m.remotes.Store(&map[string]*remoteCounts{})
	return m
}

// countRequest counts one answered request. result is hit, miss, stale or
// revalidated, or "" for an answer that the cache did not decide. bytes are those
// of the body that were sent, d is the time from the request to the end of the
// answer.
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

// countUpstreamError counts a failed request to an upstream by its kind:
// unreachable, timeout, status, broken, digest or refused.
func (m *metrics) countUpstreamError(remote, kind string) {
	if m != nil {
		m.countsOf(remote).failures[labelIndex(kindLabels[:], kind)].Add(1)
	}
}

// countStoreError counts a failure of a store: storage, database, redis or spool.
func (m *metrics) countStoreError(store string) {
	if m != nil {
		m.stores[labelIndex(storeLabels[:], store)].Add(1)
	}
}

// addFillsInFlight adds n to the number of a remote's fills that run now. n is 1 or
// -1.
func (m *metrics) addFillsInFlight(remote string, n int64) {
	if m != nil {
		m.countsOf(remote).fills.Add(n)
	}
}

// countsOf returns the counters of a remote, or those of otherLabel if there are
// too many remotes.
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

// addRemote is countsOf for a name that may be new.
func (m *metrics) addRemote(name string) *remoteCounts {
	name = strings.ToValidUTF8(name, "\uFFFD") // as escapeLabel does: two names must not become one series
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
	all[strings.Clone(name)] = c // name may be a part of a long URL, which would stay in memory
	m.remotes.Store(&all)
	return c
}

// observe counts one duration.
func (h *histogram) observe(d time.Duration) {
	seconds := d.Seconds()
	i := 0
	for i < len(durationBounds) && seconds > durationBounds[i] {
		i++
	}
	h.buckets[i].Add(1)
	for {
		old := h.sum.Load()
		if h.sum.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+seconds)) {
			return
		}
	}
}

// labelIndex returns the index of a label value in its list, or the last index if
// the value is not listed.
func labelIndex(values []string, value string) int {
	if i := slices.Index(values, value); i >= 0 {
		return i
	}
	return len(values) - 1
}

// statusClass returns the index of a status' class in statusLabels.
func statusClass(status int) int {
	if status < 100 || status > 599 {
		return len(statusLabels) - 1
	}
	return status/100 - 1
}

// writeExposition writes all counters and g in Prometheus' text format. Its error
// is w's.
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

// exposition builds the text of one scrape, one metric family after the other.
type exposition struct {
	buf bytes.Buffer
}

// writeProcess writes what is known of the process itself.
func (e *exposition) writeProcess(g gauges) {
	e.beginFamily("artifactapi_build_info", "gauge", "What is running; always 1.")
	e.writeSample("artifactapi_build_info", 1, "version", g.version, "goversion", runtime.Version())
	e.beginFamily("process_start_time_seconds", "gauge", "When the process started, in seconds since 1970.")
	e.writeSample("process_start_time_seconds", float64(g.started.UnixMilli())/1000)
	e.beginFamily("go_goroutines", "gauge", "Goroutines that exist.")
	e.writeSample("go_goroutines", float64(runtime.NumGoroutine()))
}

// writeCounters writes everything that m counts.
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

// writeRequests writes the answered requests by remote, result and status class.
func (e *exposition) writeRequests(remotes map[string]*remoteCounts) {
	const name = "artifactapi_requests_total"
	e.beginFamily(name, "counter", "Requests answered; remote is empty if the request names none.")
	for _, r := range sortedKeys(remotes) {
		for i, result := range resultLabels {
			for j, status := range statusLabels {
				// Zeros are left out: most of the 36 combinations never occur.
				if n := remotes[r].requests[i][j].Load(); n > 0 {
					e.writeSample(name, float64(n), "remote", r, "result", result, "status_class", status)
				}
			}
		}
	}
}

// writeUpstreamErrors writes the failed requests to upstreams by remote and kind. It
// writes zeros too: Prometheus' increase() does not see the first failure of a
// counter that appears with it.
func (e *exposition) writeUpstreamErrors(remotes map[string]*remoteCounts) {
	const name = "artifactapi_upstream_errors_total"
	e.beginFamily(name, "counter", "Requests to upstreams that failed.")
	for _, r := range sortedKeys(remotes) {
		for i, kind := range kindLabels {
			n := remotes[r].failures[i].Load()
			if n > 0 || (r != "" && kind != otherLabel) {
				e.writeSample(name, float64(n), "remote", r, "kind", kind)
			}
		}
	}
}

// writeDurations writes one histogram for each result. The buckets of the format
// are cumulative: each counts all durations up to its bound.
func (e *exposition) writeDurations(durations *[len(resultLabels)]histogram) {
	const name = "artifactapi_request_duration_seconds"
	e.beginFamily(name, "histogram", "Time from the arrival of a request to the end of its answer.")
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

// writeGauges writes the state of the backends and what is stored.
func (e *exposition) writeGauges(g gauges) {
	e.beginFamily("artifactapi_backend_up", "gauge", "1 if the backend can be used, else 0.")
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

// beginFamily begins a metric family. kind is counter, gauge or histogram. help
// must not contain a backslash or a line feed, since it is not escaped.
func (e *exposition) beginFamily(name, kind, help string) {
	e.buf.WriteString("# HELP " + name + " " + help + "\n# TYPE " + name + " " + kind + "\n")
}

// writeSample writes the value of one series. labels are alternately names and
// values.
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

// escapeLabel makes any string fit for a label value.
func escapeLabel(s string) string {
	return labelEscapes.Replace(strings.ToValidUTF8(s, "\uFFFD"))
}

// labelEscapes escapes what the format says about label values.
var labelEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// formatNumber formats a value without an exponent, which is easier to read.
func formatNumber(v float64) string {
	switch {
	case math.IsInf(v, 1):
		return "+Inf"
	case v == math.Trunc(v) && math.Abs(v) < 1<<53:
		return strconv.FormatInt(int64(v), 10)
	}
	return strconv.FormatFloat(v, 'f', -1, 64)
}

// sortedKeys returns the keys of a map in order, so that two scrapes differ in their
// values only.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
