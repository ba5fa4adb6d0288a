// metrics.go: counters, and their exposition in Prometheus' text format 0.0.4
// (prometheus.io/docs/instrumenting/exposition_formats).

package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"math"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// metricsType is the Content-Type of the text that writeExposition writes.
const metricsType = "text/plain; version=0.0.4; charset=utf-8"

// otherLabel is the last value of each list below.
const otherLabel = "other"

// The values of the labels. A value that is not listed is counted as otherLabel:
// a caller's mistake is visible there, and the number of series stays bounded. The
// label remote is bounded by the configuration, since callers name configured
// remotes only and use "" for everything else.
var (
	resultLabels = [...]string{"hit", "miss", "stale", "revalidated", "none", otherLabel}
	statusLabels = [...]string{"1xx", "2xx", "3xx", "4xx", "5xx", otherLabel}
	kindLabels   = [...]string{"unreachable", "timeout", "status", "broken", "digest", "refused", otherLabel}
	storeLabels  = [...]string{"storage", "database", "redis", "spool", otherLabel}
)

// durationBounds are the upper bounds of the histogram's buckets, in seconds. A hit
// takes well under a millisecond, a large file over a slow line takes minutes.
var durationBounds = [...]float64{0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10, 60, 600}

// metrics counts what the process does. All methods may be called concurrently.
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
	// sum is in microseconds. Nanoseconds would overflow within months while
	// thousands of long downloads run at once.
	sum atomic.Int64
}

// gauges are the values of a scrape that are not counted here.
type gauges struct {
	version string
	started time.Time
	// configLoaded is when the configuration in force was loaded, in seconds since
	// 1970. configRejected reports that a later one was rejected.
	configLoaded   int64
	configRejected bool
	backends       map[string]bool       // whether storage, database and redis can be used
	stored         map[string]storedSize // by remote
	held           map[string]int64      // generations that are held, by remote
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
	class := len(statusLabels) - 1
	if status >= 100 && status <= 599 {
		class = status/100 - 1
	}
	r := labelIndex(resultLabels[:], cmp.Or(result, "none"))
	c := m.countsOf(remote)
	c.requests[r][class].Add(1)
	c.served.Add(bytes)
	m.durations[r].observe(d)
}

// countFetchedBytes counts body bytes that came from a remote's upstream.
func (m *metrics) countFetchedBytes(remote string, n int64) { m.countsOf(remote).fetched.Add(n) }

// countUpstreamError counts a failed request to an upstream by its kind, one of
// kindLabels.
func (m *metrics) countUpstreamError(remote, kind string) {
	m.countsOf(remote).failures[labelIndex(kindLabels[:], kind)].Add(1)
}

// countStoreError counts a failure of a store, one of storeLabels.
func (m *metrics) countStoreError(store string) {
	m.stores[labelIndex(storeLabels[:], store)].Add(1)
}

// addFillsInFlight adds n to the number of a remote's fills that run now. n is 1 or
// -1.
func (m *metrics) addFillsInFlight(remote string, n int64) { m.countsOf(remote).fills.Add(n) }

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

// observe counts one duration.
func (h *histogram) observe(d time.Duration) {
	seconds := d.Seconds()
	i := 0
	for i < len(durationBounds) && seconds > durationBounds[i] {
		i++
	}
	h.buckets[i].Add(1)
	h.sum.Add(d.Round(time.Microsecond).Microseconds())
}

// labelIndex returns the index of a label value in its list, or the last index if
// the value is not listed.
func labelIndex(values []string, value string) int {
	if i := slices.Index(values, value); i >= 0 {
		return i
	}
	return len(values) - 1
}

// writeExposition writes all counters and g in Prometheus' text format. Its error
// is w's.
func (m *metrics) writeExposition(w io.Writer, g gauges) error {
	e := &exposition{}
	e.beginFamily("artifactapi_build_info", "gauge", "What is running; always 1.")
	e.writeSample("artifactapi_build_info", 1, "version", g.version, "goversion", runtime.Version())
	e.beginFamily("process_start_time_seconds", "gauge", "When the process started, in seconds since 1970.")
	e.writeSample("process_start_time_seconds", float64(g.started.UnixMilli())/1000)
	e.beginFamily("artifactapi_config_last_reload_successful", "gauge", "1 unless the last reload of the configuration was rejected.")
	e.writeSample("artifactapi_config_last_reload_successful", boolNumber(!g.configRejected))
	e.beginFamily("artifactapi_config_last_reload_success_timestamp_seconds", "gauge", "When the configuration in force was loaded, in seconds since 1970.")
	e.writeSample("artifactapi_config_last_reload_success_timestamp_seconds", float64(g.configLoaded))
	e.beginFamily("go_goroutines", "gauge", "Goroutines that exist.")
	e.writeSample("go_goroutines", float64(runtime.NumGoroutine()))

	remotes := *m.remotes.Load()
	e.writeRequests(remotes)
	writeFamily(e, "artifactapi_served_bytes_total", "counter", "Body bytes sent to clients.",
		"remote", remotes, func(c *remoteCounts) float64 { return float64(c.served.Load()) })
	writeFamily(e, "artifactapi_fetched_bytes_total", "counter", "Body bytes received from upstreams.",
		"remote", remotes, func(c *remoteCounts) float64 { return float64(c.fetched.Load()) })
	writeFamily(e, "artifactapi_fills_in_flight", "gauge", "Downloads running now.",
		"remote", remotes, func(c *remoteCounts) float64 { return float64(c.fills.Load()) })
	e.writeUpstreamErrors(remotes)
	e.beginFamily("artifactapi_store_errors_total", "counter", "Failures of storage, database, redis and spool.")
	for i, s := range storeLabels {
		e.writeSample("artifactapi_store_errors_total", float64(m.stores[i].Load()), "store", s)
	}
	e.writeDurations(&m.durations)

	writeFamily(e, "artifactapi_backend_up", "gauge", "1 if the backend can be used, else 0.",
		"backend", g.backends, boolNumber)
	writeFamily(e, "artifactapi_stored_bytes", "gauge", "Bytes stored.",
		"remote", g.stored, func(s storedSize) float64 { return float64(s.Bytes) })
	writeFamily(e, "artifactapi_stored_files", "gauge", "Files stored.",
		"remote", g.stored, func(s storedSize) float64 { return float64(s.Files) })
	writeFamily(e, "artifactapi_held_generations", "gauge", "New metadata that is held back until the upstream has all of its files.",
		"remote", g.held, func(n int64) float64 { return float64(n) })
	_, err := w.Write(e.text.Bytes())
	return err
}

// exposition builds the text of one scrape, one metric family after the other.
type exposition struct{ text bytes.Buffer }

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
		var n int64
		for b := range h.buckets {
			n += h.buckets[b].Load()
			bound := math.Inf(1)
			if b < len(durationBounds) {
				bound = durationBounds[b]
			}
			e.writeSample(name+"_bucket", float64(n), "result", result, "le", formatNumber(bound))
		}
		e.writeSample(name+"_sum", float64(h.sum.Load())/1e6, "result", result)
		e.writeSample(name+"_count", float64(n), "result", result)
	}
}

// writeFamily writes a family that has one label and a sample for each of its values.
func writeFamily[V any](e *exposition, name, kind, help, label string, values map[string]V, number func(V) float64) {
	e.beginFamily(name, kind, help)
	for _, v := range sortedKeys(values) {
		e.writeSample(name, number(values[v]), label, v)
	}
}

// beginFamily begins a metric family. kind is counter, gauge or histogram. help
// must not contain a backslash or a line feed, since it is not escaped.
func (e *exposition) beginFamily(name, kind, help string) {
	fmt.Fprintf(&e.text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// writeSample writes the value of one series. labels are alternately names and
// values. What can occur in a value (the names of remotes are ASCII) is escaped by
// Go as by the format.
func (e *exposition) writeSample(name string, v float64, labels ...string) {
	e.text.WriteString(name)
	sep := "{"
	for i := 0; i+1 < len(labels); i += 2 {
		fmt.Fprintf(&e.text, "%s%s=%q", sep, labels[i], labels[i+1])
		sep = ","
	}
	if len(labels) > 0 {
		e.text.WriteByte('}')
	}
	fmt.Fprintf(&e.text, " %s\n", formatNumber(v))
}

// boolNumber returns 1 for true, else 0.
func boolNumber(v bool) float64 {
	if v {
		return 1
	}
	return 0
}

// formatNumber formats a value without an exponent, which is easier to read.
func formatNumber(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }

// sortedKeys returns the keys of a map in order, so that two scrapes differ in their
// values only.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
