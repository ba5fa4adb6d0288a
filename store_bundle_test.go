// store_bundle_test.go: a store that is carried to another one, and bundles that are
// damaged on the way.

package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// bundleSite is a machine with a store, and with the commands.
type bundleSite struct {
	testing.TB
	env map[string]string
}

// newBundleSite makes a site with an empty DATA_DIR.
func newBundleSite(t testing.TB) *bundleSite {
	dir := t.TempDir()
	yaml := "remotes:\n  r: {base_url: http://127.0.0.1:1}\n  hub: {base_url: \"https://registry-1.docker.io\", package: docker}\n  own: {type: local}\n"
	if err := os.WriteFile(dir+"/remotes.yaml", []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	return &bundleSite{t, map[string]string{"CONFIG_PATH": dir + "/remotes.yaml", "DATA_DIR": dir + "/data", "MIN_FREE": "1MiB"}}
}

// withS3 makes a site whose files are in S3.
func (s *bundleSite) withS3() *bundleSite { return s.over(newFakeS3(s)) }

func (s *bundleSite) over(f *fakeS3) *bundleSite {
	maps.Copy(s.env, map[string]string{"MINIO_ENDPOINT": f.srv.Listener.Addr().String(), "MINIO_BUCKET": f.bucket, "MINIO_ACCESS_KEY": f.access, "MINIO_SECRET_KEY": f.secret})
	return s
}

func (s *bundleSite) settings() *settings {
	s.Helper()
	set, err := parseSettings(envOf(s.env))
	if err != nil {
		s.Fatal(err)
	}
	return set
}

// do runs a command and returns its exit status and what it wrote.
func (s *bundleSite) do(stdin []byte, args ...string) (code int, out, said string) {
	s.Helper()
	var stdout, stderr bytes.Buffer
	if args[0] != "import" {
		code := run(s.Context(), args, envOf(s.env), &stdout, &stderr)
		return code, stdout.String(), stderr.String()
	}
	c := &bundleCommand{s.settings(), envOf(s.env), time.Now, bytes.NewReader(stdin), &stdout, &stderr}
	if err := c.importStored(s.Context()); err != nil {
		return 1, stdout.String(), err.Error()
	}
	return 0, stdout.String(), stderr.String()
}

// wantDone fails unless a command succeeds. It returns what it wrote to stdout.
func (s *bundleSite) wantDone(stdin []byte, args ...string) []byte {
	s.Helper()
	code, out, said := s.do(stdin, args...)
	if code != 0 {
		s.Fatalf("%s exits with %d: %s", args, code, said)
	}
	return []byte(out)
}

// objects calls f with the site's store.
func (s *bundleSite) objects(f func(objects)) {
	s.Helper()
	st := openStores(s.settings(), time.Now, slog.New(slog.DiscardHandler))
	f(st.objects)
	if err := st.Close(); err != nil {
		s.Fatal(err)
	}
}

// bundleRecord is the record of a file, and of a tag if its path is one's.
func bundleRecord(name, content string) *record {
	remote, spelling, _ := strings.Cut(name, "/")
	rec := testRecord(spelling, content)
	rec.Remote = remote
	if remote == "hub" && strings.Contains(spelling, "/manifests/") {
		rec.ContentType, rec.Digest, rec.Class = typeManifest, "sha256:"+rec.SHA256, mutable
	}
	return rec
}

// put stores files, named remote/path.
func (s *bundleSite) put(files map[string]string) {
	s.Helper()
	s.objects(func(o objects) {
		for name, content := range files {
			rec := bundleRecord(name, content)
			if err := o.put(s.Context(), storageKey(rec.Remote, rec.Path), rec, tempSpool(s, s.TempDir(), content), putCondition{}); err != nil {
				s.Fatal(err)
			}
		}
	})
}

// stored is all that is stored: bodies and records by remote/path.
func (s *bundleSite) stored() map[string]string {
	s.Helper()
	all := map[string]string{}
	s.objects(func(o objects) {
		if err := o.walk(s.Context(), func(key string, rec *record) error {
			obj, err := o.open(s.Context(), key, 0)
			if err != nil {
				return err
			}
			defer obj.body.Close()
			body, err := io.ReadAll(obj.body)
			text, _ := json.Marshal(obj.rec)
			all[rec.Remote+"/"+rec.Path] = string(body) + string(text)
			return err
		}); err != nil {
			s.Fatal(err)
		}
	})
	return all
}

// wantSame fails unless another site has the same files.
func (s *bundleSite) wantSame(other *bundleSite) {
	s.Helper()
	here, there := s.stored(), other.stored()
	if !maps.Equal(here, there) {
		s.Errorf("stored are %q, and there %q", slices.Sorted(maps.Keys(here)), slices.Sorted(maps.Keys(there)))
	}
}

// wantNothing fails if an import has left anything.
func (s *bundleSite) wantNothing() {
	s.Helper()
	_ = filepath.WalkDir(s.env["DATA_DIR"], func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() || strings.Contains(name, "import-") {
			s.Errorf("there is %s", name)
		}
		return nil
	})
}

// carried are files of each kind: a root, twins, an image, an upload, an empty one.
var carried = map[string]string{
	"r/a%2Bb.rpm?arch=x":                 noise(1, 200_000),
	"r/twin":                             noise(2, 70_000),
	"hub/library/one/manifests/1.0":      `{"schemaVersion":2}`,
	"hub/blobs/sha256:" + sha64:          noise(2, 70_000),
	"hub/library/one/manifests/" + "x:y": `{"schemaVersion":2}`,
	"own/dir/upload":                     "mine",
	"own/empty":                          "",
	"r/repodata/repomd.xml":              "<repomd/>",
}

var sha64 = strings.Repeat("0123456789abcdef", 4)

// entry is a file of a tar.
type entry struct {
	name, content string
}

func untar(t testing.TB, bundle []byte) (entries []entry) {
	t.Helper()
	in := tar.NewReader(bytes.NewReader(bundle))
	for {
		h, err := in.Next()
		if err == io.EOF {
			return entries
		}
		content, readErr := io.ReadAll(in)
		if err = errors.Join(err, readErr); err != nil {
			t.Fatal(err)
		}
		entries = append(entries, entry{h.Name, string(content)})
	}
}

func makeTar(entries []entry) []byte {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		_ = w.WriteHeader(&tar.Header{Name: e.name, Size: int64(len(e.content)), Mode: 0o644})
		_, _ = io.WriteString(w, e.content)
	}
	w.Close()
	return out.Bytes()
}

func TestBundleCarriesAStoreAnywhere(t *testing.T) {
	t.Parallel()
	disk, s3, back := newBundleSite(t), newBundleSite(t).withS3(), newBundleSite(t)
	disk.put(carried)
	s3.wantDone(disk.wantDone(nil, "export"), "import")
	s3.wantSame(disk)
	bundle := s3.wantDone(nil, "export")
	back.wantDone(bundle, "import")
	back.wantSame(disk)
	if out := back.wantDone(bundle, "import"); string(out) != "0 files imported, 8 were there\n" {
		t.Errorf("a second import says %q", out)
	}
	if out := back.wantDone(nil, "verify"); !strings.HasPrefix(string(out), "8 checked, 0 dropped") {
		t.Errorf("verify says %q", out)
	}
	s3.wantDone(bundle, "import")
	entries := untar(t, bundle)
	slices.Reverse(entries) // bodies before records, as another tar may have them
	again := newBundleSite(t)
	again.wantDone(makeTar(entries), "import")
	again.wantSame(disk)
	only := newBundleSite(t)
	only.wantDone(disk.wantDone(nil, "export", "own"), "import")
	if got := slices.Sorted(maps.Keys(only.stored())); !slices.Equal(got, []string{"own/dir/upload", "own/empty"}) {
		t.Errorf("the export of own has %q", got)
	}
}

func TestBundleIsAnOCILayout(t *testing.T) {
	t.Parallel()
	s := newBundleSite(t)
	s.put(carried)
	var names []string
	documents := map[string]string{}
	for _, e := range untar(t, s.wantDone(nil, "export")) {
		if digits, isBody := strings.CutPrefix(e.name, bundleBodies); isBody {
			if testRecord("", e.content).SHA256 != digits {
				t.Errorf("%s has other bytes", e.name)
			}
			names = append(names, digits)
			continue
		}
		documents[e.name] = e.content
	}
	slices.Sort(names)
	if len(names) != 6 || len(slices.Compact(names)) != 6 {
		t.Errorf("%d bodies, want 6 different ones", len(names))
	}
	manifest := testRecord("", `{"schemaVersion":2}`).SHA256
	for name, want := range map[string]string{
		"oci-layout": `{"imageLayoutVersion":"1.0.0"}`,
		"index.json": `{"manifests":[{"annotations":{"io.containerd.image.name":"docker.io/library/one:1.0","org.opencontainers.image.ref.name":"1.0"},"digest":"sha256:` + manifest +
			`","mediaType":"` + typeManifest + `","size":19}],"mediaType":"` + typeIndex + `","schemaVersion":2}`,
		"artifactapi-bundle.json": `"remotes":["hub","own","r"],"counts":{"records":8,"bodies":6,"bytes":270032}}`,
	} {
		if !strings.HasSuffix(documents[name], want) {
			t.Errorf("%s is %s", name, documents[name])
		}
	}
	if n := strings.Count(documents["records.ndjson"], "\n"); n != 8 {
		t.Errorf("%d records", n)
	}
}

// A bundle that is damaged in any way is refused whole, and the reason names the damage.
func TestDamagedBundleChangesNothing(t *testing.T) {
	t.Parallel()
	from := newBundleSite(t)
	from.put(carried)
	bundle := from.wantDone(nil, "export")
	entries := untar(t, bundle)
	big := testRecord("", noise(1, 200_000)).SHA256
	at := slices.IndexFunc(entries, func(e entry) bool { return e.name == bundleBodies+big })
	begin := bytes.Index(bundle, []byte(entries[at].content[:512]))
	edit := func(name string, change func(string) string) []byte {
		edited := slices.Clone(entries)
		for i, e := range edited {
			if e.name == name {
				edited[i].content = change(e.content)
			}
		}
		return makeTar(edited)
	}
	replace := func(name, old, with string) []byte {
		return edit(name, func(s string) string {
			if !strings.Contains(s, old) {
				t.Fatalf("%s has no %s: %s", name, old, s)
			}
			return strings.Replace(s, old, with, 1)
		})
	}
	for name, c := range map[string]struct {
		bundle []byte
		says   string
	}{
		"a flipped byte":         {slices.Concat(bundle[:begin+1000], []byte{bundle[begin+1000] ^ 1}, bundle[begin+1001:]), big},
		"a missing body":         {makeTar(slices.Delete(slices.Clone(entries), at, at+1)), big},
		"cut in a body":          {bundle[:begin+1000], "EOF"},
		"cut between entries":    {bundle[:begin-512], "neither in the bundle nor in this store"},
		"cut in its records":     {bundle[:bytes.Index(bundle, []byte("repomd.xml"))], "EOF"},
		"nothing":                {nil, "no bundle"},
		"another file":           {[]byte(noise(3, 5000)), "tar"},
		"an empty tar":           {makeTar(nil), "no bundle"},
		"another format":         {replace(bundleHeadFile, bundleFormat, "artifactapi bundle 2"), "artifactapi bundle 2"},
		"a size that is wrong":   {replace(bundleRecordsFile, `"n":200000`, `"n":200001`), "neither in the bundle"},
		"a record that is none":  {replace(bundleRecordsFile, `"r":"r"`, `"r":7`), "damaged"},
		"a remote that leads up": {replace(bundleRecordsFile, `"r":"r"`, `"r":"../r"`), "damaged record"},
		"a path with a break":    {replace(bundleRecordsFile, `repodata/`, `repodata%0A`), "damaged record"},
		"a hash that is none":    {replace(bundleRecordsFile, big, "../"+big[3:]), "damaged record"},
		"an unknown class":       {replace(bundleRecordsFile, `"c":"immutable"`, `"c":"eternal"`), "damaged record"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newBundleSite(t)
			code, out, said := s.do(c.bundle, "import")
			if code != 1 || !strings.Contains(out+said, c.says) || !strings.Contains(said, "nothing was changed") {
				t.Errorf("exit %d: %s%s; want 1 and %q", code, out, said, c.says)
			}
			s.wantNothing()
		})
	}
}

func TestNoEntryOfABundleLeadsOutside(t *testing.T) {
	t.Parallel()
	from, s := newBundleSite(t), newBundleSite(t)
	from.put(carried)
	entries := untar(t, from.wantDone(nil, "export"))
	outside := s.TempDir() + "/outside"
	for _, name := range []string{outside, "../outside", bundleBodies + "../../../../outside", bundleBodies + strings.Repeat("/", 64)} {
		entries = append(entries, entry{name, "x"})
	}
	s.wantDone(makeTar(entries), "import")
	s.wantSame(from)
	for _, name := range []string{outside, s.env["DATA_DIR"] + "/../outside", s.env["DATA_DIR"] + "/outside"} {
		if _, err := os.Lstat(name); err == nil {
			t.Errorf("the import wrote %s", name)
		}
	}
}

func TestBundleLeavesOutWhatTheOtherSideHas(t *testing.T) {
	t.Parallel()
	from, to, empty := newBundleSite(t), newBundleSite(t), newBundleSite(t)
	from.put(carried)
	to.wantDone(from.wantDone(nil, "export"), "import")
	list := t.TempDir() + "/have"
	have := to.wantDone(nil, "have")
	if n := len(slices.Compact(slices.Sorted(strings.Lines(string(have))))); n != 6 || bytes.Count(have, []byte("\n")) != 6 {
		t.Errorf("have prints %s", have)
	}
	if err := os.WriteFile(list, have, 0o600); err != nil {
		t.Fatal(err)
	}
	// A body that the other side has under another key is taken from there.
	from.put(map[string]string{"r/new": "news", "r/moved": noise(1, 200_000), "r/moved2": noise(1, 200_000)})
	delta := from.wantDone(nil, "export", "--have", list)
	if n := strings.Count(string(delta), bundleBodies); n != 1 {
		t.Errorf("the delta has %d bodies", n)
	}
	to.wantDone(delta, "import")
	to.wantSame(from)
	code, out, said := empty.do(delta, "import")
	if code != 1 || !strings.Contains(out, testRecord("", noise(1, 200_000)).SHA256+" of r/moved\n") || strings.Contains(out, "r/new") {
		t.Errorf("exit %d: %s%s", code, out, said)
	}
	empty.wantNothing()
	if err := os.WriteFile(list, []byte("nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, said := from.do(nil, "export", "--have", list); code != 1 || !strings.Contains(said, "nonsense") {
		t.Errorf("exit %d: %s", code, said)
	}
}

// A record with the wrong size is found before anything is stored, though the store has
// its body.
func TestBodyOfAnotherSizeIsMissing(t *testing.T) {
	t.Parallel()
	from, to := newBundleSite(t), newBundleSite(t)
	from.put(map[string]string{"r/f": "the body", "r/g": "another"})
	to.put(map[string]string{"own/f": "the body"})
	bundle := bytes.Replace(from.wantDone(nil, "export"), []byte(`"n":8,`), []byte(`"n":9,`), 1)
	if code, out, _ := to.do(bundle, "import"); code != 1 || !strings.Contains(out, "of r/f\n") || len(to.stored()) != 1 {
		t.Errorf("exit %d: %s", code, out)
	}
}

func TestImportKeepsTheCopyThatWasFetchedLater(t *testing.T) {
	t.Parallel()
	for content, c := range map[string]struct {
		fetched  time.Duration // after the copy that is there
		replaces bool
	}{"old": {-time.Hour, false}, "new": {time.Hour, true}, "here": {time.Hour, false}} {
		from, to := newBundleSite(t), newBundleSite(t)
		to.put(map[string]string{"r/f": "here"})
		before := to.stored()
		from.objects(func(o objects) {
			rec := bundleRecord("r/f", content)
			rec.Fetched = rec.Fetched.Add(c.fetched)
			if err := o.put(t.Context(), testKey("f"), rec, tempSpool(t, t.TempDir(), content), putCondition{}); err != nil {
				t.Fatal(err)
			}
		})
		to.wantDone(from.wantDone(nil, "export"), "import")
		want := before
		if c.replaces {
			want = from.stored()
		}
		if got := to.stored(); !maps.Equal(got, want) {
			t.Errorf("%s: after the import there is %q", content, got)
		}
	}
}

// changingObjects are a store in which somebody changes something while it is walked,
// and that notes what is put.
type changingObjects struct {
	objects
	walked func()
	mu     sync.Mutex // guards puts
	puts   []string
	fails  error
}

func (c *changingObjects) walk(ctx context.Context, f func(string, *record) error) error {
	err := c.objects.walk(ctx, f)
	if c.walked != nil {
		c.walked()
	}
	return err
}

func (c *changingObjects) put(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error {
	c.mu.Lock()
	c.puts = append(c.puts, rec.Path)
	c.mu.Unlock()
	if c.fails != nil {
		return c.fails
	}
	return c.objects.put(ctx, key, rec, spool, when)
}

func TestExportBesideWriters(t *testing.T) {
	t.Parallel()
	from, to := newBundleSite(t), newBundleSite(t)
	from.put(map[string]string{"r/stays": "as it is", "r/index": "old", "r/gone": "evicted", "r/dists/x/Release": "one"})
	var bundle bytes.Buffer
	walks := 0
	from.objects(func(o objects) {
		b := &bundleWriter{createFile: o.(*diskStore).newSpool, config: new(config), time: testDay,
			objects: &changingObjects{objects: o, walked: func() {
				if walks++; walks == 1 { // what a root names is there before it is
					from.put(map[string]string{"r/dists/x/Packages#two": "packages", "r/dists/x/Release.gpg#two": "signature"})
					from.put(map[string]string{"r/dists/x/Release": "two"})
					return
				}
				from.put(map[string]string{"r/index": "new"})
				if err := o.delete(t.Context(), testKey("gone")); err != nil {
					t.Fatal(err)
				}
			}}}
		if err := b.write(t.Context(), &bundle); err != nil {
			t.Fatal(err)
		}
	})
	to.wantDone(bundle.Bytes(), "import")
	to.wantSame(from)
	if n := len(to.stored()); n != 5 {
		t.Errorf("%d files", n)
	}
}

func TestExportRefusesADamagedBody(t *testing.T) {
	t.Parallel()
	s := newBundleSite(t)
	s.put(carried)
	name := s.env["DATA_DIR"] + "/" + testKey("twin")
	info, err := os.Stat(name)
	if err == nil {
		err = os.WriteFile(name, []byte(noise(9, 70_000)), 0o600)
	}
	if err = errors.Join(err, os.Chtimes(name, info.ModTime(), info.ModTime())); err != nil {
		t.Fatal(err)
	}
	code, out, said := s.do(nil, "export", "r")
	if code != 1 || !strings.Contains(said, testKey("twin")) || !strings.Contains(said, "artifactapi verify") {
		t.Errorf("exit %d: %s", code, said)
	}
	if code, _, _ := newBundleSite(t).do([]byte(out), "import"); code != 1 {
		t.Error("what was written is a bundle")
	}
}

// A bundle without the files whose records cannot be read would pass for a backup.
func TestExportFailsWhereARecordCannotBeRead(t *testing.T) {
	t.Parallel()
	s := newBundleSite(t)
	s.put(carried)
	name := s.env["DATA_DIR"] + "/" + filepath.Dir(testKey("twin")) + "/" + recordFile
	if err := errors.Join(os.Remove(name), os.Mkdir(name, 0o755)); err != nil { // it cannot be read by root either
		t.Fatal(err)
	}
	if code, _, said := s.do(nil, "export"); code != 1 || !strings.Contains(said, testKey("twin")) {
		t.Errorf("exit %d: %s", code, said)
	}
	s.wantDone(nil, "have")
}

// A new site says what it has before its first import, which makes the bucket. Without one
// there is nothing to back up, and a backup of nothing must not pass for one.
func TestHaveWithoutABucket(t *testing.T) {
	t.Parallel()
	f := newFakeS3(t)
	f.drop("")
	s := newBundleSite(t).over(f)
	if sums := s.wantDone(nil, "have"); len(sums) > 0 {
		t.Errorf("it has %s", sums)
	}
	if code, _, said := s.do(nil, "export"); code != 1 || !strings.Contains(said, "bucket") {
		t.Errorf("export: exit %d: %s", code, said)
	}
}

// newBundleReader makes a reader that imports into a disk store through o.
func newBundleReader(t *testing.T, o objects, d *diskStore) *bundleReader {
	dir, err := d.newStagingDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	space := &spoolSpace{createFile: d.newSpool, diskSpace: d.freeSpace, now: time.Now}
	return &bundleReader{dir: dir.Name(),
		cacheStores: cacheStores{objects: o, index: newEmbeddedIndex(d.dir, d.log), space: space}, missing: func(*record) {}}
}

func TestImportWritesRootsAndTagsLast(t *testing.T) {
	t.Parallel()
	from := newBundleSite(t)
	files := map[string]string{"r/dists/x/InRelease": "names Packages", "r/Release.gpg": "s", "hub/one/manifests/latest": "tag", "hub/one/manifests/sha256:" + sha64: "tag", "hub/repodata/repomd.xml": "root"}
	for i := range 12 {
		files[fmt.Sprintf("r/pool/%d.deb", i)] = noise(uint64(i), 100)
	}
	from.put(files)
	d := newTestDisk(t)
	o := &changingObjects{objects: d}
	b := newBundleReader(t, o, d)
	if err := b.readAndStore(t.Context(), bytes.NewReader(from.wantDone(nil, "export"))); err != nil {
		t.Fatal(err)
	}
	last := slices.Sorted(slices.Values(o.puts[len(o.puts)-4:]))
	if want := []string{"Release.gpg", "dists/x/InRelease", "one/manifests/latest", "repodata/repomd.xml"}; len(o.puts) != 17 || !slices.Equal(last, want) {
		t.Errorf("%d files were stored, at last %q", len(o.puts), last)
	}
	if b.space.reserved != 0 {
		t.Errorf("%d bytes stay reserved", b.space.reserved)
	}
}

// What somebody removes beside an import is not missing: it was there. The second list of
// a bundle that was written beside a busy server is compared after that.
func TestImportBesideAPurge(t *testing.T) {
	t.Parallel()
	from := newBundleSite(t)
	from.put(map[string]string{"r/stays": "one", "r/purged": "two", "r/new": "three"})
	entries := untar(t, from.wantDone(nil, "export"))
	lists := slices.DeleteFunc(slices.Clone(entries), func(e entry) bool { return strings.HasPrefix(e.name, bundleBodies) })
	d := newTestDisk(t)
	b := newBundleReader(t, d, d)
	for name, content := range map[string]string{"stays": "one", "purged": "two"} {
		must(t, d.put(t.Context(), testKey(name), bundleRecord("r/"+name, content), tempSpool(t, t.TempDir(), content), putCondition{}))
	}
	purge := readerFunc(func([]byte) (int, error) { return 0, cmp.Or(d.delete(t.Context(), testKey("purged")), io.EOF) })
	first := makeTar(entries)
	in := io.MultiReader(bytes.NewReader(first[:len(first)-1024]), purge, bytes.NewReader(makeTar(lists)))
	must(t, b.readAndStore(t.Context(), in))
	if n := len(b.there); b.stored.Load() != 1 || n != 2 {
		t.Errorf("%d files were stored and %d were there", b.stored.Load(), n)
	}
	if _, err := d.open(t.Context(), testKey("purged"), -1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the purged file: %v", err)
	}
}

// deafReplicas do not take the first announcements.
type deafReplicas struct {
	toldReplicas
	refusals int
}

func (r *deafReplicas) announceChange(ctx context.Context, key string) error {
	if r.refusals--; r.refusals >= 0 {
		return errStoreDown
	}
	return r.toldReplicas.announceChange(ctx, key)
}

// A replica would serve its old copy of a local file for ever, after an import whose
// announcement was lost or that died before it.
func TestImportAnnouncesWhatWasNotHeard(t *testing.T) {
	t.Parallel()
	from := newBundleSite(t)
	from.put(map[string]string{"own/f": "new"})
	bundle := from.wantDone(nil, "export")
	synctest.Test(t, func(t *testing.T) {
		d := newTestDisk(t)
		for range 2 { // the second time nothing is stored
			r := &deafReplicas{refusals: 1}
			b := newBundleReader(t, d, d)
			b.replicas = r
			if err := b.readAndStore(t.Context(), bytes.NewReader(bundle)); err != nil {
				t.Fatal(err)
			}
			if !slices.Contains(r.told, copiesPrefix) {
				t.Errorf("%d stored, %d kept, told %q", b.stored.Load(), len(b.there), r.told)
			}
		}
	})
}

func TestImportThatCannotStore(t *testing.T) {
	t.Parallel()
	from := newBundleSite(t)
	from.put(carried)
	bundle := from.wantDone(nil, "export")
	d := newTestDisk(t)
	b := newBundleReader(t, &changingObjects{objects: d, fails: errStoreDown}, d)
	if err := b.readAndStore(t.Context(), bytes.NewReader(bundle)); !errors.Is(err, errStoreDown) || !strings.Contains(err.Error(), "import the bundle again") {
		t.Errorf("a store that is down: %v", err)
	}
	bodies := int64(0)
	for _, text := range carried {
		bodies += int64(len(text))
	}
	// The space is reserved before the first body is read, with what records take.
	for _, free := range []room{{bytes: bodies, inodes: 100}, {bytes: 1 << 30, inodes: 11}} {
		b = newBundleReader(t, d, d)
		b.space.diskSpace = func() (diskUsage, error) { return diskUsage{free: free, size: room{1 << 30, 500}}, nil }
		if err := b.readAndStore(t.Context(), bytes.NewReader(bundle)); !errors.Is(err, errNoSpace) || bytesBelow(t, b.dir) > 0 {
			t.Errorf("with %+v, after %d bytes: %v", free, bytesBelow(t, b.dir), err)
		}
		if (b.space.account != account{}) {
			t.Errorf("behind an import the account is %+v", b.space.account)
		}
	}
	if names, _ := filepath.Glob(d.dir + "/r/*"); len(names) > 0 {
		t.Errorf("there is %q", names)
	}
	// Records that follow again at the end take no more space.
	entries := untar(t, bundle)
	b = newBundleReader(t, d, d)
	before := bytesBelow(t, d.dir)
	b.space.diskSpace = func() (diskUsage, error) {
		return diskUsage{free: room{bodies*3/2 + before + entryCost(0)*int64(len(carried)) - bytesBelow(t, d.dir), 500}, size: room{1 << 30, 500}}, nil
	}
	if err := b.readAndStore(t.Context(), bytes.NewReader(makeTar(append(entries, entries[:4]...)))); err != nil {
		t.Error(err)
	}
}

// bytesBelow is the size of all files below dir together.
func bytesBelow(t *testing.T, dir string) (n int64) {
	must(t, filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			fi, err := d.Info()
			must(t, err)
			n += fi.Size()
		}
		return err
	}))
	return n
}

// unlistable is a store that is down.
type unlistable struct{ objects }

func (unlistable) walk(context.Context, func(string, *record) error) error { return errStoreDown }

// It is tried every few seconds, and the log has a line about the store already.
func TestIndexIsNotComparedWithAStoreThatIsDown(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	x := newEmbeddedIndex(t.TempDir(), slog.New(slog.NewTextHandler(&out, nil)))
	if err := x.followStore(t.Context(), unlistable{}); !errors.Is(err, errStoreDown) || out.Len() > 0 {
		t.Errorf("got %v and the log says %s", err, out.String())
	}
}

func TestImportBesideARunningServerIsSeen(t *testing.T) {
	t.Parallel()
	from := newBundleSite(t)
	from.put(map[string]string{"r/one": "1", "r/two": "2"})
	bundle := from.wantDone(nil, "export")
	tt := newTester(t)
	tt.down()
	tt.get("/api/r/one").wantStatus(502)
	here := newBundleSite(t)
	here.env["DATA_DIR"] = tt.disk.dir
	look := func() { // as the server's loop does
		if err := tt.server.stores.embedded.followStore(t.Context(), tt.disk); err != nil {
			t.Fatal(err)
		}
	}
	look()
	here.wantDone(bundle, "import")
	tt.get("/api/r/one").wantHit().wantBody("1")
	look()
	if l := tt.list("r"); len(l) != 2 {
		t.Errorf("listed are %v", l)
	}
	// Without another import nothing is looked at again.
	here.put(map[string]string{"r/three": "3"})
	look()
	if l := tt.list("r"); len(l) != 2 {
		t.Errorf("listed are %v", l)
	}
}

// A server that starts beside an import sweeps the spools of a process that has died,
// and not the bodies that are staged.
func TestStagedBodiesAreNotSwept(t *testing.T) {
	t.Parallel()
	d := newTestDisk(t)
	dir, err := d.newStagingDir()
	if err == nil {
		err = os.WriteFile(dir.Name()+"/"+sha64, []byte("x"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.sweepSpools(true); err != nil {
			t.Fatal(err)
		}
		_, err := os.Stat(dir.Name() + "/" + sha64)
		if isOpen := dir.Fd() != ^uintptr(0); isOpen != (err == nil) {
			t.Errorf("the import runs: %v; its body: %v", isOpen, err)
		}
		dir.Close()
	}
}

func TestBundleArguments(t *testing.T) {
	t.Parallel()
	s := newBundleSite(t)
	for args, want := range map[string]struct {
		code int
		says string
	}{
		"export --have":         {2, "usage:"},
		"export --all":          {2, "usage:"},
		"have all":              {2, "usage:"},
		"import r":              {2, "usage:"},
		"export --have /absent": {1, "/absent"},
		"export r nobody":       {1, `no remote "nobody"`},
		"export r":              {0, ""},
		"have":                  {0, ""},
	} {
		fields := strings.Fields(args)
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), fields, envOf(s.env), &stdout, &stderr); code != want.code || !strings.Contains(stderr.String(), want.says) {
			t.Errorf("%s: exit %d: %s", args, code, &stderr)
		}
	}
	device, err := os.OpenFile("/dev/zero", os.O_RDWR, 0) // not a terminal, but a device as a terminal is
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	c := &bundleCommand{s.settings(), envOf(s.env), time.Now, device, device, io.Discard}
	if err := c.exportStored(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "> bundle.tar") {
		t.Errorf("export to a terminal: %v", err)
	}
	if err := c.importStored(t.Context()); err == nil || !strings.Contains(err.Error(), "< bundle.tar") {
		t.Errorf("import from a terminal: %v", err)
	}
}
