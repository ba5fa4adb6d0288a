package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	metaLine   = regexp.MustCompile(`^# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)$`)
	sampleLine = regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[a-z_]+="(?:[^"\\]|\\["\\n])*"(?:,[a-z_]+="(?:[^"\\]|\\["\\n])*")*\})? (\S+)$`)
)

// scrape writes m and reads the text as strictly as Prometheus does.
func scrape(t *testing.T, m *metrics, known ...family) map[string]float64 {
	t.Helper()
	var b bytes.Buffer
	if err := m.writeExposition(&b, []string{"idle"}, known); err != nil {
		t.Fatal(err)
	}
	return readExposition(t, b.String())
}

// readExposition returns the values by series. It checks that each family begins with
// one HELP and then one TYPE, and that its samples follow them.
func readExposition(t *testing.T, text string) map[string]float64 {
	t.Helper()
	if !strings.HasSuffix(text, "\n") {
		t.Error("no line feed at the end")
	}
	series, seen, current := map[string]float64{}, map[string]int{}, ""
	for line := range strings.SplitSeq(strings.TrimSuffix(text, "\n"), "\n") {
		if k := metaLine.FindStringSubmatch(line); k != nil {
			seen[k[1]+k[2]]++
			if seen[k[1]+k[2]] > 1 || (k[1] == "TYPE" && current != k[2]) {
				t.Errorf("%s of %s is not there once, HELP first", k[1], k[2])
			}
			current = k[2]
			continue
		}
		k := sampleLine.FindStringSubmatch(line)
		if k == nil {
			t.Errorf("not a line of the format: %q", line)
			continue
		}
		v, err := strconv.ParseFloat(k[3], 64)
		if err != nil {
			t.Errorf("bad value in %q", line)
		}
		if _, twice := series[k[1]+k[2]]; twice {
			t.Errorf("series %s%s is there twice", k[1], k[2])
		}
		series[k[1]+k[2]] = v
		if suffix, of := strings.CutPrefix(k[1], current); !of || (suffix != "" && suffix != "_bucket" && suffix != "_sum" && suffix != "_count") {
			t.Errorf("%s stands below %s", k[1], current)
		}
	}
	return series
}

func wantSeries(t *testing.T, got, want map[string]float64) {
	t.Helper()
	for name, v := range want {
		if g, ok := got[name]; !ok || g != v {
			t.Errorf("%s: want %v, got %v (there: %t)", name, v, g, ok)
		}
	}
}

func TestMetricsCount(t *testing.T) {
	t.Parallel()
	m := newMetrics()
	m.countRequest("alpine", "hit", 200, 10, 200*time.Microsecond, 300*time.Microsecond)
	m.countRequest("alpine", "hit", 206, 5, 600*time.Microsecond, 2*time.Millisecond)
	m.countRequest("alpine", "miss", 502, 7, time.Second, 90*time.Second)
	m.countRequest("", "", 404, 1, 0, time.Hour)
	m.countRequest("alpine", "stale", 999, 0, 0, 0)
	m.countFetchedBytes("alpine", 100)
	m.countUpstreamRequest("alpine", time.Second)
	m.countUpstreamError("alpine", "timeout")
	m.countStoreError("redis")
	m.countCheck("redis", 2*time.Millisecond)
	got := scrape(t, m, newGauge("artifactapi_a", "A gauge.", 1.5), family{"artifactapi_b_total", "counter", "A counter.", "remote", map[string]float64{"x": 1 << 40}})
	wantSeries(t, got, map[string]float64{
		`artifactapi_requests_total{remote="alpine",result="hit",status_class="2xx"}`:   2,
		`artifactapi_requests_total{remote="alpine",result="miss",status_class="5xx"}`:  1,
		`artifactapi_requests_total{remote="",result="none",status_class="4xx"}`:        1,
		`artifactapi_requests_total{remote="alpine",result="stale",status_class="5xx"}`: 1,
		`artifactapi_requests_total{remote="idle",result="hit",status_class="2xx"}`:     0,
		`artifactapi_upstream_errors_total{remote="idle",kind="unreachable"}`:           0,
		`artifactapi_served_bytes_total{result="hit"}`:                                  15,
		`artifactapi_served_bytes_total{result="stale"}`:                                0,
		`artifactapi_upstream_requests_total{remote="alpine"}`:                          1,
		`artifactapi_upstream_request_duration_seconds_bucket{le="0.5"}`:                0,
		`artifactapi_upstream_request_duration_seconds_count`:                           1,
		`artifactapi_backend_duration_seconds_sum{backend="redis"}`:                     0.002,
		`artifactapi_first_byte_seconds_bucket{result="hit",le="0.0005"}`:               1,
		`artifactapi_first_byte_seconds_sum{result="miss"}`:                             1,
		`artifactapi_a`:                                                         1.5,
		`artifactapi_b_total{remote="x"}`:                                       1 << 40,
		`artifactapi_fetched_bytes_total{remote="alpine"}`:                      100,
		`artifactapi_upstream_errors_total{remote="alpine",kind="timeout"}`:     1,
		`artifactapi_upstream_errors_total{remote="alpine",kind="refused"}`:     0,
		`artifactapi_store_errors_total{store="redis"}`:                         1,
		`artifactapi_store_errors_total{store="spool"}`:                         0,
		`artifactapi_request_duration_seconds_bucket{result="hit",le="0.0005"}`: 1,
		`artifactapi_request_duration_seconds_bucket{result="hit",le="0.001"}`:  1,
		`artifactapi_request_duration_seconds_bucket{result="hit",le="0.005"}`:  2,
		`artifactapi_request_duration_seconds_bucket{result="hit",le="+Inf"}`:   2,
		`artifactapi_request_duration_seconds_count{result="hit"}`:              2,
		`artifactapi_request_duration_seconds_sum{result="hit"}`:                0.0023,
		`artifactapi_request_duration_seconds_bucket{result="miss",le="60"}`:    0,
		`artifactapi_request_duration_seconds_bucket{result="miss",le="600"}`:   1,
		`artifactapi_request_duration_seconds_bucket{result="none",le="600"}`:   0,
		`artifactapi_request_duration_seconds_bucket{result="none",le="+Inf"}`:  1,
	})
	for _, name := range []string{"go_goroutines", "go_threads", "go_memstats_heap_alloc_bytes", "go_memstats_alloc_bytes",
		"process_resident_memory_bytes", "process_virtual_memory_bytes", "process_virtual_memory_max_bytes", "process_open_fds", "process_max_fds"} {
		if got[name] < 1 {
			t.Errorf("%s is %v", name, got[name])
		}
	}
	runtime.GC()
	got = scrape(t, m)
	for _, name := range []string{"_count", "_sum", `{quantile="0"}`, `{quantile="0.5"}`, `{quantile="1"}`} {
		if got["go_gc_duration_seconds"+name] <= 0 {
			t.Errorf("go_gc_duration_seconds%s is %v after a collection", name, got["go_gc_duration_seconds"+name])
		}
	}
	if v := got["process_resident_memory_bytes"]; v > got["process_virtual_memory_bytes"] {
		t.Errorf("%v bytes are resident, of fewer virtual ones", v)
	}
}

func TestMetricsAreTheSameSeriesEachTime(t *testing.T) {
	t.Parallel()
	m := newMetrics()
	m.countRequest("a", "hit", 200, 1, 0, 0)
	m.countRequest("b", "hit", 200, 1, 0, 0)
	before := scrape(t, m)
	for range 100 {
		m.countRequest("a", "hit", 200, 1, 0, time.Minute)
	}
	after := scrape(t, m)
	for name := range maps.Keys(after) {
		if _, ok := before[name]; !ok {
			t.Errorf("%s is new", name)
		}
	}
}

func TestMetricsEscapeLabels(t *testing.T) {
	t.Parallel()
	m := newMetrics()
	m.countFetchedBytes("a\"b\\c\nd", 1)
	wantSeries(t, scrape(t, m), map[string]float64{
		`artifactapi_fetched_bytes_total{remote="a\"b\\c\nd"}`: 1,
	})
}

func TestMetricsReportAFailedWrite(t *testing.T) {
	t.Parallel()
	gone := errors.New("gone")
	r, w := io.Pipe()
	r.CloseWithError(gone)
	if err := newMetrics().writeExposition(w, nil, nil); !errors.Is(err, gone) {
		t.Errorf("want %v, got %v", gone, err)
	}
}

func TestMetricsLoseNothingUnderConcurrency(t *testing.T) {
	t.Parallel()
	const workers, each = 8, 500
	m := newMetrics()
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range each {
				m.countRequest(fmt.Sprintf("r%d", i%50), "hit", 200, 1, 0, time.Second)
				if i%100 == 0 {
					_ = m.writeExposition(io.Discard, nil, nil)
				}
			}
		})
	}
	wg.Wait()
	got := scrape(t, m)
	wantSeries(t, got, map[string]float64{
		`artifactapi_request_duration_seconds_count{result="hit"}`:                workers * each,
		`artifactapi_request_duration_seconds_sum{result="hit"}`:                  workers * each,
		`artifactapi_requests_total{remote="r7",result="hit",status_class="2xx"}`: workers * each / 50,
	})
}

func TestMetricsCountWithoutAllocating(t *testing.T) {
	m := newMetrics()
	m.countRequest("alpine", "hit", 200, 1, 0, 0)
	if n := testing.AllocsPerRun(100, func() { countOne(m) }); n != 0 {
		t.Errorf("a request counted: want 0 allocations, got %v", n)
	}
}

func countOne(m *metrics) {
	m.countRequest("alpine", "hit", 200, 4096, 70*time.Microsecond, 80*time.Microsecond)
	m.countFetchedBytes("alpine", 4096)
}

func BenchmarkMetrics(b *testing.B) {
	m := newMetrics()
	for i := range 50 {
		m.countFetchedBytes(fmt.Sprintf("remote%d", i), 1)
	}
	b.ReportAllocs()
	for b.Loop() {
		countOne(m)
	}
}

func BenchmarkMetricsParallel(b *testing.B) {
	m := newMetrics()
	b.ReportAllocs()
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			countOne(m)
		}
	})
}
