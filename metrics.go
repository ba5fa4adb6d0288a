// metrics.go: counters. Their exposition is in metrics_text.go.

package main

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

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

	backendLabels = storeLabels[:3]
)

// usualSeries are the requests that every remote has sooner or later. They are there
// from the start, with 0: Prometheus' increase() does not see the first event of a
// series that appears with it. Most of the other combinations never occur.
var usualSeries = map[[2]string]bool{{"hit", "2xx"}: true, {"miss", "2xx"}: true, {"miss", "4xx"}: true, {"miss", "5xx"}: true,
	{"stale", "2xx"}: true, {"revalidated", "2xx"}: true}

// isFromStore says which results are answered from the store.
var isFromStore = [len(resultLabels)]bool{0: true, 2: true, 3: true}

// durationBounds are the upper bounds of the histogram's buckets, in seconds. A hit
// takes well under a millisecond, a large file over a slow line takes minutes.
var durationBounds = [...]float64{0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10, 60, 600}

// metrics counts what the process does. All methods may be called concurrently.
type metrics struct {
	// remotes holds the counters by the name of the remote. The map is replaced by
	// a larger one when a name is added and never changed, so counting for a known
	// name takes no lock and allocates nothing.
	remotes    atomic.Pointer[map[string]*remoteCounts]
	addMu      sync.Mutex // held while remotes is replaced; no other lock is taken under it
	stores     [len(storeLabels)]atomic.Int64
	served     [len(resultLabels)]atomic.Int64 // body bytes sent to clients
	durations  [len(resultLabels)]histogram
	firstBytes [len(resultLabels)]histogram
	peers      atomic.Int64 // body bytes received from other replicas
	upstream   [1]histogram // from a request to the headers of its answer
	checks     [3]histogram // of backendLabels
	trend      trend
}

// remoteCounts are the counters of one remote. They are arrays indexed by label
// value, because each label has few values.
type remoteCounts struct {
	requests [len(resultLabels)][len(statusLabels)]atomic.Int64
	failures [len(kindLabels)]atomic.Int64
	saved    atomic.Int64 // body bytes sent from the store
	fetched  atomic.Int64 // body bytes received from the upstream
	asked    atomic.Int64 // requests sent to the upstream
	// incomplete counts generations that were published although files were missing.
	incomplete atomic.Int64
}

// histogram counts durations. Each duration is counted in one bucket only; the
// exposition adds them up. The last bucket has no upper bound.
type histogram struct {
	buckets [len(durationBounds) + 1]atomic.Int64
	// sum is in microseconds. Nanoseconds would overflow within months while
	// thousands of long downloads run at once.
	sum atomic.Int64
}

// newMetrics makes counters that are all zero.
func newMetrics() *metrics {
	m := &metrics{}
	m.remotes.Store(&map[string]*remoteCounts{})
	return m
}

// countRequest counts one answered request. result is hit, miss, stale or
// revalidated, or "" for an answer that the cache did not decide. bytes are those
// of the body that were sent. firstByte is the time from the request to the headers
// of the answer, took the time to its end.
func (m *metrics) countRequest(remote, result string, status int, bytes int64, firstByte, took time.Duration) {
	class := len(statusLabels) - 1
	if status >= 100 && status <= 599 {
		class = status/100 - 1
	}
	r := labelIndex(resultLabels[:], cmp.Or(result, "none"))
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
	m.checks[labelIndex(backendLabels, backend)].observe(d)
}

// countFetchedBytes counts body bytes that came from a remote's upstream.
func (m *metrics) countFetchedBytes(remote string, n int64) { m.countsOf(remote).fetched.Add(n) }

// countPeerBytes counts body bytes that came from another replica.
func (m *metrics) countPeerBytes(n int) { m.peers.Add(int64(n)) }

// countIncompleteGeneration counts a generation of a remote's metadata that was published
// although files were missing.
func (m *metrics) countIncompleteGeneration(remote string) { m.countsOf(remote).incomplete.Add(1) }

// countUpstreamError counts a failed request to an upstream by its kind, one of
// kindLabels.
func (m *metrics) countUpstreamError(remote, kind string) {
	m.countsOf(remote).failures[labelIndex(kindLabels[:], kind)].Add(1)
}

// countStoreError counts a failure of a store, one of storeLabels.
func (m *metrics) countStoreError(store string) {
	m.stores[labelIndex(storeLabels[:], store)].Add(1)
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

// trend remembers the usage of all remotes at the ends of the last steps.
type trend struct {
	mu      sync.Mutex               // guards samples; no other lock is taken under it
	samples []map[string]remoteUsage // oldest first
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
	m.trend.mu.Lock()
	defer m.trend.mu.Unlock()
	m.trend.samples = append(m.trend.samples, now)
	m.trend.samples = m.trend.samples[max(0, len(m.trend.samples)-trendLength):]
}

// trendOf returns a remote's usage in each of the last steps, oldest first; the last
// has just begun.
func (m *metrics) trendOf(remote string) []remoteUsage {
	m.trend.mu.Lock()
	defer m.trend.mu.Unlock()
	steps := make([]remoteUsage, trendLength)
	samples := append(slices.Clone(m.trend.samples), map[string]remoteUsage{remote: m.usageOf(remote)})
	for i := len(samples) - 1; i >= 0 && i > len(samples)-1-trendLength; i-- {
		before := remoteUsage{}
		if i > 0 {
			before = samples[i-1][remote]
		}
		s := samples[i][remote]
		steps[trendLength-len(samples)+i] = remoteUsage{s.hits - before.hits, s.misses - before.misses, s.saved - before.saved}
	}
	return steps
}
