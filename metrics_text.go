// metrics_text.go: the exposition of metrics in Prometheus' text format 0.0.4
// (prometheus.io/docs/instrumenting/exposition_formats).

package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// metricsType is the Content-Type of the text that writeExposition writes.
const metricsType = "text/plain; version=0.0.4; charset=utf-8"

// family is a metric family with at most one label.
type family struct {
	name, kind, help string             // kind is counter or gauge
	label            string             // "": values has one value, of ""
	values           map[string]float64 // by the value of the label
}

// newGauge and newCounter make a family of one value without a label.
func newGauge(name, help string, v float64) family {
	return family{name, "gauge", help, "", map[string]float64{"": v}}
}

func newCounter(name, help string, v float64) family {
	return family{name, "counter", help, "", map[string]float64{"": v}}
}

// writeExposition writes all counters, and the families that are known elsewhere, in
// Prometheus' text format. The remotes have their usual series although nothing was
// counted for them yet. Its error is w's.
func (m *metrics) writeExposition(w io.Writer, remoteNames []string, known []family) error {
	for _, name := range remoteNames {
		m.countsOf(name)
	}
	e, remotes := &exposition{}, *m.remotes.Load()
	for _, f := range slices.Concat(known, m.families(remotes), processFamilies()) {
		e.beginFamily(f.name, f.kind, f.help)
		for _, v := range sortedKeys(f.values) {
			e.writeSample(f.name, f.values[v], f.label, v)
		}
	}
	e.writeRequests(remotes)
	e.writeUpstreamErrors(remotes)
	e.writeHistograms("artifactapi_request_duration_seconds", "Time from the arrival of a request to the end of its answer.", "result", resultLabels[:], m.durations[:])
	e.writeHistograms("artifactapi_first_byte_seconds", "Time from the arrival of a request to the headers of its answer.", "result", resultLabels[:], m.firstBytes[:])
	e.writeHistograms("artifactapi_upstream_request_duration_seconds", "Time from a request to an upstream to the headers of its answer.", "", []string{""}, m.upstream[:])
	e.writeHistograms("artifactapi_backend_duration_seconds", "Length of the checks of a backend.", "backend", backendLabels, m.checks[:])
	e.writeCollections()
	_, err := w.Write(e.text.Bytes())
	return err
}

// families returns the counters that have at most one label.
func (m *metrics) families(remotes map[string]*remoteCounts) []family {
	served, failed := map[string]float64{}, map[string]float64{}
	for i, r := range resultLabels {
		served[r] = float64(m.served[i].Load())
	}
	for i, s := range storeLabels {
		failed[s] = float64(m.stores[i].Load())
	}
	fetched, asked := map[string]float64{}, map[string]float64{}
	for name, c := range remotes {
		if name != "" {
			fetched[name], asked[name] = float64(c.fetched.Load()), float64(c.asked.Load())
		}
	}
	return []family{
		{"artifactapi_served_bytes_total", "counter", "Body bytes sent to clients; those of hits were saved.", "result", served},
		{"artifactapi_fetched_bytes_total", "counter", "Body bytes received from upstreams.", "remote", fetched},
		newCounter("artifactapi_peer_bytes_total", "Body bytes received from other replicas.", float64(m.peers.Load())),
		{"artifactapi_upstream_requests_total", "counter", "Requests sent to upstreams.", "remote", asked},
		{"artifactapi_store_errors_total", "counter", "Failures of storage, database, redis and spool.", "store", failed},
	}
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
				n := remotes[r].requests[i][j].Load()
				if n > 0 || (r != "" && usualSeries[[2]string{result, status}]) {
					e.writeSample(name, float64(n), "remote", r, "result", result, "status_class", status)
				}
			}
		}
	}
}

// writeUpstreamErrors writes the failed requests to upstreams by remote and kind.
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

// writeHistograms writes a family with one histogram for each value of a label. The
// buckets of the format are cumulative: each counts all durations up to its bound.
func (e *exposition) writeHistograms(name, help, label string, values []string, histograms []histogram) {
	e.beginFamily(name, "histogram", help)
	for i, value := range values {
		h := &histograms[i]
		var n int64
		for b := range h.buckets {
			n += h.buckets[b].Load()
			bound := math.Inf(1)
			if b < len(durationBounds) {
				bound = durationBounds[b]
			}
			e.writeSample(name+"_bucket", float64(n), label, value, "le", formatNumber(bound))
		}
		e.writeSample(name+"_sum", float64(h.sum.Load())/1e6, label, value)
		e.writeSample(name+"_count", float64(n), label, value)
	}
}

// beginFamily begins a metric family. kind is counter, gauge, histogram or summary. help
// must not contain a backslash or a line feed, since it is not escaped.
func (e *exposition) beginFamily(name, kind, help string) {
	fmt.Fprintf(&e.text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// writeSample writes the value of one series. labels are alternately names and
// values; a label without a name is left out. What can occur in a value (the names of
// remotes are ASCII) is escaped by Go as by the format.
func (e *exposition) writeSample(name string, v float64, labels ...string) {
	e.text.WriteString(name)
	sep := "{"
	for i := 0; i+1 < len(labels); i += 2 {
		if labels[i] != "" {
			fmt.Fprintf(&e.text, "%s%s=%q", sep, labels[i], labels[i+1])
			sep = ","
		}
	}
	if sep == "," {
		e.text.WriteByte('}')
	}
	fmt.Fprintf(&e.text, " %s\n", formatNumber(v))
}

// runtimeFamilies are what the Go runtime tells about itself, under the names that
// Prometheus' own client gives it.
var runtimeFamilies = []struct{ name, kind, help, sample string }{
	{"go_goroutines", "gauge", "Goroutines that exist.", "/sched/goroutines:goroutines"},
	{"go_sched_gomaxprocs_threads", "gauge", "GOMAXPROCS.", "/sched/gomaxprocs:threads"},
	{"go_memstats_alloc_bytes", "gauge", "Bytes of objects on the heap, under its older name.", "/memory/classes/heap/objects:bytes"},
	{"go_memstats_heap_alloc_bytes", "gauge", "Bytes of objects on the heap.", "/memory/classes/heap/objects:bytes"},
	{"go_memstats_next_gc_bytes", "gauge", "Heap size at which the next collection ends.", "/gc/heap/goal:bytes"},
	{"go_memstats_sys_bytes", "gauge", "Memory that the runtime has from the system.", "/memory/classes/total:bytes"},
	{"go_gc_cycles_total_gc_cycles_total", "counter", "Collections so far.", "/gc/cycles/total:gc-cycles"},
}

// processFamilies are what every Go program exposes, go_* and process_*. Where there is
// no /proc, the values from there are left out.
func processFamilies() []family {
	all := []family{
		{"go_info", "gauge", "The version of Go; always 1.", "version", map[string]float64{runtime.Version(): 1}},
		newGauge("go_threads", "Threads that were created.", float64(pprof.Lookup("threadcreate").Count())),
	}
	samples := make([]runtimemetrics.Sample, len(runtimeFamilies))
	for i, f := range runtimeFamilies {
		samples[i].Name = f.sample
	}
	runtimemetrics.Read(samples)
	for i, f := range runtimeFamilies {
		if samples[i].Value.Kind() == runtimemetrics.KindUint64 {
			all = append(all, family{f.name, f.kind, f.help, "", map[string]float64{"": float64(samples[i].Value.Uint64())}})
		}
	}
	var files syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files) == nil {
		all = append(all, newGauge("process_max_fds", "File descriptors that may be open.", float64(files.Cur)))
	}
	var memory syscall.Rlimit // the largest number: no limit
	if syscall.Getrlimit(syscall.RLIMIT_AS, &memory) == nil {
		all = append(all, newGauge("process_virtual_memory_max_bytes", "Virtual memory that may be used.", float64(memory.Cur)))
	}
	if open, err := os.ReadDir("/proc/self/fd"); err == nil {
		all = append(all, newGauge("process_open_fds", "File descriptors that are open.", float64(len(open))))
	}
	return append(all, statFamilies()...)
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
	e.writeSample(name+"_sum", stats.PauseTotal.Seconds())
	e.writeSample(name+"_count", float64(stats.NumGC))
}

// statFamilies reads /proc/self/stat (proc_pid_stat(5)). Its numbered fields begin
// behind the name of the program, which is in parentheses, with field 3. Linux counts
// CPU time in hundredths of a second on every architecture that Go has.
func statFamilies() []family {
	text, _ := os.ReadFile("/proc/self/stat")
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 22 {
		return nil
	}
	number := func(field int) float64 {
		v, _ := strconv.ParseFloat(fields[field-3], 64)
		return v
	}
	return []family{
		newCounter("process_cpu_seconds_total", "CPU time used, user and system.", (number(14)+number(15))/100),
		newGauge("process_virtual_memory_bytes", "Virtual memory.", number(23)),
		newGauge("process_resident_memory_bytes", "Resident memory.", number(24)*float64(os.Getpagesize())),
	}
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
