package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fileSize is the size of files of which each costs 20 kB.
const fileSize = 20_000 - entryOverhead

// getFile has a new file of fileSize fetched, a second after the last one.
func (tt *tester) getFile(path string) {
	tt.Helper()
	tt.advance(time.Second)
	tt.origin.file("/"+path, noise(1, fileSize))
	tt.get("/api/r/" + path).wantMiss()
	tt.awaitSpools()
}

// awaitSpools waits until the spools of what was fetched take no space. They give it
// back when the fill has ended already.
func (tt *tester) awaitSpools() {
	tt.Helper()
	tt.eventually("spools to give back their space", func() bool {
		s := tt.cache.space
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.growing == 0
	})
}

func (tt *tester) wantListed(remote string, want ...string) {
	tt.Helper()
	var got []string
	for _, a := range tt.list(remote) {
		got = append(got, a.Path)
	}
	if !slices.Equal(got, want) {
		tt.Errorf("%s has %q; want %q", remote, got, want)
	}
}

func TestEvictionKeepsToItsLimits(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		limit int64
		yaml  string
		used  []int // of the files 0 to 8, before 9 is stored
		last  int   // used in the end
		want  string
	}{
		"CACHE_MAX_SIZE":                 {limit: 100_000, last: -1, want: "6 7 8 9"},
		"max_size":                       {yaml: ", cache: {max_size: 100kB}", last: -1, want: "6 7 8 9"},
		"unused files go first":          {limit: 100_000, used: []int{0, 3, 5}, last: -1, want: "0 3 5 9"},
		"but a quarter of them stays":    {limit: 100_000, used: []int{0, 1, 2, 3, 4, 5, 6, 7, 8}, last: -1, want: "6 7 8 9"},
		"else the least recently used":   {limit: 100_000, used: []int{8, 1, 2, 3, 4, 5, 6, 7, 0}, last: -1, want: "0 6 7 9"},
		"the most recent one stays":      {limit: 1000, last: -1, want: "9"},
		"the most recent one was used":   {limit: 1000, last: 4, want: "4"},
		"nothing goes below a limit":     {limit: 200_000, last: -1, want: "0 1 2 3 4 5 6 7 8 9"},
		"what is charged is what counts": {limit: 10 * fileSize, last: -1, want: "7 8 9"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tt := setup{yaml: "remotes:\n  r: {base_url: ORIGIN" + c.yaml + "}\n  l: {type: local}\n", env: map[string]string{"API_TOKEN": "t"}}.start(t)
			tt.put("/api/l/keep", noise(1, 5_000_000), bearer).wantStatus(201)
			for i := range 9 {
				tt.getFile(fmt.Sprint(i))
			}
			for _, i := range c.used {
				tt.advance(time.Second)
				tt.get(fmt.Sprint("/api/r/", i)).wantHit()
			}
			tt.getFile("9")
			if tt.advance(time.Second); c.last >= 0 {
				tt.get(fmt.Sprint("/api/r/", c.last)).wantHit()
			}
			tt.cache.evictor.limit = c.limit
			tt.cache.evictor.evictFiles(t.Context())
			tt.wantListed("r", strings.Fields(c.want)...)
			tt.wantListed("l", "keep")
			gone := 10 - len(strings.Fields(c.want))
			if m := tt.get("/metrics").text; !strings.Contains(m, fmt.Sprintf("artifactapi_evictions_total %d\n", gone)) || !strings.Contains(m, fmt.Sprintf("artifactapi_evicted_bytes_total %d\n", gone*fileSize)) {
				t.Errorf("the metrics do not say that %d files went", gone)
			}
			reason := `"reason":"CACHE_MAX_SIZE"`
			if c.limit == 0 {
				reason = `"reason":"cache.max_size"`
			}
			if lines := tt.logs.lines("evicted files"); gone > 0 && (len(lines) == 0 || !strings.Contains(lines[0], reason+`,"remotes":["r"]`)) {
				t.Errorf("the log does not say why they went, and whose they were: %q", lines)
			}
		})
	}
}

// Files of a local repository that is not configured any more neither go nor count.
func TestEvictionLeavesAFormerRepositoryAlone(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: "remotes:\n  r: {base_url: ORIGIN}\n  l: {type: local}\n", env: map[string]string{"API_TOKEN": "t"}}.start(t)
	tt.put("/api/l/keep", noise(1, 500_000), bearer).wantStatus(201)
	tt.getFile("f")
	tt.configure("remotes:\n  r: {base_url: " + tt.origin.url + "}\n")
	tt.cache.evictor.limit = 100_000
	tt.cache.evictor.evictFiles(t.Context())
	tt.get("/api/r/f").wantHit()
	tt.configure("remotes:\n  r: {base_url: " + tt.origin.url + "}\n  l: {type: local}\n")
	tt.wantListed("l", "keep")
}

func TestEvictionSparesWhatIsInUse(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tt := newBubbleTester(t)
		big := noise(1, 1_000_000)
		tt.origin.file("/read", big)
		tt.get("/api/r/read").wantMiss()
		tt.getFile("idle")
		tt.getFile("last")
		reader := tt.open("/api/r/read")
		reader.read(1)
		tt.advance(time.Second)
		tt.get("/api/r/last").wantHit()
		tt.cache.evictor.limit = 1000
		tt.cache.evictor.evictFiles(t.Context())
		tt.wantListed("r", "last", "read")
		if rest := reader.rest(); rest.text != big {
			t.Errorf("the reader got %d bytes, %v", len(rest.text), rest.err)
		}
		synctest.Wait() // the server knows too that the answer is all sent
		tt.cache.evictor.evictFiles(t.Context())
		tt.wantListed("r", "last")
	})
}

func TestFilesAboveTheLimitAreNotStored(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	tt.cache.evictor.limit = 100_000
	tt.origin.file("/large", noise(1, 200_000))
	tt.get("/api/r/large").wantUnstored().wantBody(noise(1, 200_000))
	tt.wantStored("large", false)
}

func TestQueriesAreKeptOrDropped(t *testing.T) {
	t.Parallel()
	for key, want := range map[string][]string{"query: keep": {"GET /f?v=1", "GET /f?v=2", "GET /f"}, "query: drop": {"GET /f"}} {
		tt := newTester(t, key)
		for _, query := range []string{"?v=1", "?v=2", ""} {
			tt.origin.file("/f"+query, "text")
		}
		for _, query := range []string{"?v=1", "?v=2", "?v=1", ""} {
			tt.get("/api/r/f" + query).wantStatus(200)
		}
		if got := tt.origin.all(); !slices.Equal(got, want) || len(tt.list("r")) != len(want) {
			t.Errorf("%s: upstream was asked for %q, and %d files are stored; want %q", key, got, len(tt.list("r")), want)
		}
	}
}

func TestVariantsOfAPathAreBounded(t *testing.T) {
	t.Parallel()
	const asked = maxVariants + 3
	for key, want := range map[string]int{"query: keep": maxVariants, "query: all": asked} {
		tt := newTester(t, key)
		tt.origin.file("/f", "text")
		tt.origin.file("/fg?v=1", "another")
		tt.get("/api/r/fg?v=1").wantMiss()
		tt.get("/api/r/f").wantMiss()
		for i := range asked {
			tt.advance(time.Second)
			tt.origin.file(fmt.Sprint("/f?v=", i), "text")
			tt.get(fmt.Sprint("/api/r/f?v=", i)).wantMiss()
			if i == 0 {
				tt.get("/api/r/f?v=0").wantHit()
			}
		}
		tt.settle()
		if n := len(tt.list("r")); n != want+2 {
			t.Errorf("%s: %d files are stored; want %d", key, n, want+2)
		}
		for path, hit := range map[string]bool{"f": true, "fg?v=1": true, "f?v=0": true, "f?v=1": want == asked, fmt.Sprint("f?v=", asked-1): true} {
			tt.wantStored(path, hit)
		}
	}
}

// evictBench is an evictor over an index in memory and a store that has records alone,
// but for the bodies of manifests.
type evictBench struct {
	objects
	*evictor
	t      *testing.T
	now    time.Time
	bodies map[string]string // by key; "" is some other body
}

func newEvictBench(t *testing.T, packageType string, limit int64) *evictBench {
	b := &evictBench{t: t, now: testDay, bodies: map[string]string{}}
	log := slog.New(slog.DiscardHandler)
	x := newEmbeddedIndex(t.TempDir(), log)
	c := newCache(cacheStores{objects: b, index: x, marks: newLocalFreshness(t.TempDir(), time.Now, log)}, nil, func() time.Time { return b.now }, log, newMetrics())
	b.evictor = c.evictor
	b.limit, b.config = limit, func() *config {
		return &config{remotes: map[string]*remote{"r": {name: "r", packageType: packageType}}}
	}
	return b
}

func (b *evictBench) open(_ context.Context, key string, off int64) (*object, error) {
	body, found := b.bodies[key]
	if !found {
		return nil, fs.ErrNotExist
	}
	return &object{rec: &record{}, body: struct {
		io.ReadSeeker
		io.Closer
	}{strings.NewReader(body), io.NopCloser(nil)}}, nil
}

func (b *evictBench) delete(_ context.Context, key string) error {
	delete(b.bodies, key)
	return nil
}

// use stores a file, or uses it again if it is there; hit says which.
func (b *evictBench) use(spelling, body string, size int64) (hit bool) {
	b.now = b.now.Add(time.Second)
	key := storageKey("r", spelling)
	if _, hit = b.bodies[key]; hit {
		b.cache.countUse("r", key)
		return true
	}
	b.bodies[key] = body
	r := testRow("r", spelling)
	r.Size, r.Fetched, r.LastAccess = size, b.now, b.now
	must(b.t, b.cache.index.saveRow(b.t.Context(), r))
	return false
}

// TestEvictionHitsMoreThanLRU replays requests whose files are popular by Zipf's law,
// beside a third that is asked for once, and compares the bytes that hit with those of
// an LRU that goes down to 90 % too.
func TestEvictionHitsMoreThanLRU(t *testing.T) {
	t.Parallel()
	const limit, files, requests = 400 << 20, 4000, 12_000
	rng := rand.New(rand.NewPCG(1, 2))
	popular := rand.NewZipf(rng, 1.05, 20, files)
	sizes := make([]int64, files+1)
	for i := range sizes {
		sizes[i] = 10_000 + int64(rng.ExpFloat64()*rng.ExpFloat64()*500_000)
	}
	b := newEvictBench(t, "generic", limit)
	plain := map[string]int{} // the LRU: when each file was used last
	sizeOf := map[string]int64{}
	var all, hitBytes, plainBytes, plainHeld int64
	for i := range requests {
		n := int(popular.Uint64())
		name, size := fmt.Sprint("f", n), sizes[n]
		if rng.IntN(3) == 0 {
			name = fmt.Sprint("once", i)
		}
		all += size
		sizeOf[name] = size
		if b.use(name, "", size) {
			hitBytes += size
		}
		if _, hit := plain[name]; hit {
			plainBytes += size
		} else {
			plainHeld += entryCost(size)
		}
		plain[name] = i
		if i%50 > 0 {
			continue // a look now and then, as the loop in the background
		}
		b.evictFiles(t.Context())
		if plainHeld > limit {
			byAge := slices.SortedFunc(maps.Keys(plain), func(a, b string) int { return plain[a] - plain[b] })
			for _, name := range byAge {
				if plainHeld <= limit/10*9 {
					break
				}
				plainHeld -= entryCost(sizeOf[name])
				delete(plain, name)
			}
		}
	}
	ours, lru := float64(hitBytes)/float64(all)*100, float64(plainBytes)/float64(all)*100
	t.Logf("%.1f %% of the bytes hit, with LRU %.1f %%", ours, lru)
	if ours < lru+3 {
		t.Errorf("%.1f %% of the bytes hit; LRU has %.1f %%, and 3 more are wanted", ours, lru)
	}
}

// TestEvictionKeepsImagesWhole uses and evicts files of a registry at random. After no
// step a kept manifest lacks a blob that it had while there is a file that no manifest
// names.
func TestEvictionKeepsImagesWhole(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	b := newEvictBench(t, "docker", 0)
	blob := func(i int) string { return fmt.Sprintf("sha256:%064x", i) }
	var images []testImage
	names := map[string][]string{} // by the path of a manifest: its key, and those of what it names
	for i := range 12 {
		m := testImage{path: fmt.Sprintf("team/app/manifests/v%d", i), blobs: []string{blob(i)}}
		for range rng.IntN(4) {
			m.blobs = append(m.blobs, blob(100+rng.IntN(15)))
		}
		names[m.path] = []string{storageKey("r", m.path)}
		var layers []map[string]string
		for _, digest := range m.blobs {
			names[m.path] = append(names[m.path], storageKey("r", "blobs/"+digest))
			layers = append(layers, map[string]string{"digest": digest})
		}
		body, _ := json.Marshal(map[string]any{"config": layers[0], "layers": layers[1:]})
		m.body = string(body)
		images = append(images, m)
	}
	runs := 10_000
	if testing.Short() {
		runs = 1000
	}
	for run := range runs {
		for range rng.IntN(4) {
			m := images[rng.IntN(len(images))]
			b.use(m.path, m.body, int64(rng.IntN(3000)))
			for _, digest := range m.blobs {
				if rng.IntN(2) == 0 {
					b.use("blobs/"+digest, "", int64(rng.IntN(90_000)))
				}
			}
			b.use(fmt.Sprintf("team/app/tags/list?n=%d", rng.IntN(20)), "", 20_000)
		}
		whole := b.wholeOf(names)
		totals, err := b.cache.index.totals(t.Context(), false)
		must(t, err)
		b.limit = totals["r"].cost() * int64(50+rng.IntN(50)) / 100
		b.evictFiles(t.Context())
		kept, unneeded := b.wholeOf(names), b.unneeded(names)
		for path := range whole {
			if _, stays := b.bodies[names[path][0]]; stays && !kept[path] && unneeded > 1 { // the most recent one stays
				t.Fatalf("run %d: %s is left without all of its blobs, beside %d files that nothing needs", run, path, unneeded)
			}
		}
	}
}

// A tag that is asked for day after day, by nodes that have its image, keeps the manifest
// by digest that the next new node asks for, as it keeps the blobs.
func TestEvictionKeepsTheDigestOfATag(t *testing.T) {
	t.Parallel()
	b := newEvictBench(t, "docker", 100_000)
	const body = `{"schemaVersion":2}`
	tag, digest := "team/app/manifests/v1", "team/app/manifests/sha256:"+testRow("r", "team/app/manifests/v1").SHA256
	for range 2 {
		b.use(tag, body, fileSize)
		b.use(digest, body, fileSize)
	}
	for n := range 9 {
		b.use(fmt.Sprintf("team/app/tags/list?n=%d", n), "", fileSize)
		b.use(fmt.Sprintf("team/app/tags/list?n=%d", n), "", fileSize)
		b.use(tag, body, fileSize)
	}
	b.evictFiles(t.Context())
	if _, found := b.bodies[storageKey("r", digest)]; !found {
		t.Error("the tag is kept, the manifest by its digest is not")
	}
}

// unreadable is a store in which the disk has lost the body of one file.
type unreadable struct {
	objects
	key string
}

func (o unreadable) open(ctx context.Context, key string, off int64) (*object, error) {
	if key == o.key && off >= 0 {
		return nil, errStoreDown
	}
	return o.objects.open(ctx, key, off)
}

func TestEvictionGoesOnWithoutARoot(t *testing.T) {
	t.Parallel()
	b := newEvictBench(t, "docker", 100_000)
	b.use("team/app/manifests/bad", "{}", 1000)
	for i := range 20 {
		b.use(fmt.Sprintf("blobs/sha256:%064x", i), "", 20_000)
	}
	b.cache.useObjects(unreadable{b, storageKey("r", "team/app/manifests/bad")})
	b.evictFiles(t.Context())
	totals, err := b.cache.index.totals(t.Context(), false)
	must(t, err)
	if cost := totals["r"].cost(); cost > 100_000 {
		t.Errorf("%d bytes are left", cost)
	}
}

// testImage is a manifest and the digests of its blobs.
// unremovable is a store that cannot remove some files.
type unremovable struct {
	*evictBench
	keys  map[string]bool
	tries int
}

func (o *unremovable) delete(ctx context.Context, key string) error {
	if o.keys[key] {
		o.tries++
		return errStoreDown
	}
	return o.evictBench.delete(ctx, key)
}

func TestEvictionGoesOnWithoutAFile(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		bad, tries int
		left       int64
		isDown     bool
	}{
		"a bad sector":    {1, 1, 100_000, false},
		"a store is down": {1, 1, 400 * 20_000, true},
		"nothing can go":  {200, maxEvictFailures, 400 * 20_000, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newEvictBench(t, "generic", 100_000)
			o := &unremovable{evictBench: b, keys: map[string]bool{}}
			for i := range 200 {
				b.use(fmt.Sprint("f", i), "", 20_000)
				if i < tt.bad {
					o.keys[storageKey("r", fmt.Sprint("f", i))] = true
				}
			}
			b.cache.useObjects(o)
			b.cache.storageIsDown = func() bool { return tt.isDown }
			b.evictFiles(t.Context())
			totals, err := b.cache.index.totals(t.Context(), false)
			must(t, err)
			if cost := totals["r"].cost(); cost > tt.left || o.tries != tt.tries {
				t.Errorf("%d bytes are left after %d tries", cost, o.tries)
			}
		})
	}
}

type testImage struct {
	path, body string
	blobs      []string
}

// wholeOf returns the stored manifests all of whose blobs are stored.
func (b *evictBench) wholeOf(names map[string][]string) map[string]bool {
	whole := map[string]bool{}
	for m, keys := range names {
		if !slices.ContainsFunc(keys, func(key string) bool { _, found := b.bodies[key]; return !found }) {
			whole[m] = true
		}
	}
	return whole
}

// unneeded is how many files are stored that neither are a manifest nor named by one.
func (b *evictBench) unneeded(names map[string][]string) int {
	needed := map[string]bool{}
	for _, keys := range names {
		if _, found := b.bodies[keys[0]]; found {
			for _, key := range keys {
				needed[key] = true
			}
		}
	}
	n := 0
	for key := range b.bodies {
		if !needed[key] {
			n++
		}
	}
	return n
}

// smallDisk is a setup whose disk takes n files of 20 kB beside MIN_FREE, each with its
// overhead, and inodes for them.
func smallDisk(t *testing.T, n int64) *tester {
	tt := setup{yaml: "remotes:\n  r: {base_url: ORIGIN}\n  l: {type: local}\n", env: map[string]string{"API_TOKEN": "t", "MIN_FREE": "1MB"}}.start(t)
	tt.cache.space.now = tt.clock.now
	tt.cache.space.diskSpace = func() (diskUsage, error) {
		u := diskUsage{free: room{1_000_000 + n*20_000, 20 + n*inodesPerFile}, size: room{1 << 40, 1000}}
		err := tt.disk.walk(context.Background(), func(_ string, rec *record) error {
			u.free.bytes -= entryCost(rec.Size)
			u.free.inodes -= inodesPerFile
			return nil
		})
		return u, err
	}
	return tt
}

func (tt *tester) wantHealth(status, storage string) {
	tt.Helper()
	for _, b := range tt.server.stores.backends {
		tt.server.checkBackend(b)
	}
	var h healthReport
	if err := json.Unmarshal([]byte(tt.get("/health").wantStatus(200).text), &h); err != nil || h.Status != status || h.Backends["storage"] != storage {
		tt.Errorf("health %+v, %v; want %s, storage %s", h, err, status, storage)
	}
}

func TestAFullDiskMakesRoom(t *testing.T) {
	t.Parallel()
	tt := smallDisk(t, 5)
	for i := range 8 {
		tt.getFile(fmt.Sprint(i))
	}
	tt.wantListed("r", "3", "4", "5", "6", "7")
	tt.get("/api/r/3").wantHit()
	tt.wantHealth("healthy", "embedded")

	tt.origin.file("/huge", noise(1, 150_000)) // more than eviction may free
	tt.get("/api/r/huge").wantUnstored().wantBody(noise(1, 150_000))
	tt.wantListed("r", "3", "4", "5", "6", "7")
	tt.wantHealth("degraded", "full")
	tt.advance(refusalCounts)
	tt.wantHealth("healthy", "embedded")

	tt.cache.evictor.limit = 50_000
	tt.origin.file("/unstored", noise(1, 60_000))
	tt.get("/api/r/unstored").wantUnstored().wantBody(noise(1, 60_000))
	tt.wantListed("r", "3", "4", "5", "6", "7")

	tt.put("/api/l/a", noise(1, 2*20_000-entryOverhead), bearer).wantStatus(201)
	tt.wantListed("r", "3", "6", "7")
	tt.delete("/api/l/a", bearer).wantStatus(204)
	for i := range 3 { // there are inodes for two
		tt.advance(time.Second)
		tt.origin.file(fmt.Sprint("/empty", i), "")
		tt.get(fmt.Sprint("/api/r/empty", i)).wantMiss()
		tt.awaitSpools()
	}
	tt.wantListed("r", "3", "7", "empty0", "empty1", "empty2")
}

// Nothing goes for a body for which what may not go would have to go too.
func TestNothingGoesInVain(t *testing.T) {
	t.Parallel()
	for _, read := range []bool{false, true} {
		tt := smallDisk(t, 200)
		tt.getFile("small")
		tt.advance(time.Second)
		tt.origin.file("/big", noise(1, 198*20_000))
		tt.get("/api/r/big").wantMiss()
		tt.awaitSpools()
		tt.advance(time.Second)
		if read {
			tt.cache.readers.countReaders(tt.key("big"), 1) // such a file would fit the buffers of its connection
			tt.get("/api/r/small").wantHit()
		}
		tt.origin.file("/body", noise(1, 100_000))
		tt.get("/api/r/body").wantUnstored().wantBody(noise(1, 100_000))
		tt.wantListed("r", "big", "small")
	}
}

func TestADiskFullOfUploadsIsReported(t *testing.T) {
	t.Parallel()
	tt := smallDisk(t, 1)
	tt.wantHealth("healthy", "embedded")
	tt.put("/api/l/a", noise(1, fileSize), bearer).wantStatus(201)
	tt.origin.file("/f", "text")
	tt.get("/api/r/f").wantUnstored().wantBody("text")
	tt.put("/api/l/b", "more", bearer).wantStatus(507)
	tt.wantHealth("degraded", "full")
	tt.wantLog("backend is full")
	warned := len(tt.logs.lines(`"WARN","msg":"a store failed`))
	tt.origin.file("/g", "text")
	tt.get("/api/r/g").wantUnstored()
	if lines := tt.logs.lines(`"WARN","msg":"a store failed`); len(lines) != warned {
		t.Errorf("on a full disk each fill is a warning: %q", lines)
	}
	tt.get("/api/l/a").wantStatus(200)
	tt.delete("/api/l/a", bearer).wantStatus(204)
	tt.wantHealth("healthy", "embedded")
	tt.wantLog("backend has space again")
	tt.get("/api/r/f").wantMiss()
}
