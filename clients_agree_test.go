// clients_agree_test.go: real dnf and apt in front of a repository whose upstream is
// somewhere between two generations of its metadata (see clients_test.go and
// cache_generations_test.go). The server is in the test's own process, because its
// clock is moved. Each client has fresh state each time.

package main

import (
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// realRepository is a repository as real tools make it, in the versions "one" and
// "two", and the client that reads it.
type realRepository struct {
	realClient
	root      string                       // at the origin
	signature string                       // of the root, if it is a file of its own
	needed    string                       // what the name of a file has that a client cannot do without
	upstream  *realUpstream                // has the directory where it was made; it is not started
	versions  map[string]map[string]string // the files of each, by path at the origin
}

// realRepositories are those that the tests are about.
func realRepositories() (all []*realRepository) {
	repodata := func(name string, more func(d *desk)) *realRepository {
		r := &realRepository{realClient: dnfClient(), root: "/repodata/repomd.xml", needed: "primary"}
		publish := r.publish
		r.name, r.keys = r.name+name, "package: rpm"
		r.publish = func(d *desk, version string) {
			publish(d, version)
			more(d)
		}
		return r
	}
	plain := repodata("", func(d *desk) { d.run("createrepo_c", "-q", "--simple-md-filenames", d.up.dir) })
	hashed := repodata(", by hash", func(*desk) {})
	signed := repodata(", signed", func(d *desk) {
		d.gpg("--armor", "--detach-sign", "-o", d.up.dir+"/repodata/repomd.xml.asc", d.up.dir+"/repodata/repomd.xml")
	})
	signed.needs, signed.signature, signed.fetch = append(signed.needs, "gpg"), signed.root+".asc", fetchSigned
	all = append(all, plain, hashed, signed)
	for _, c := range aptClients() {
		r := &realRepository{realClient: c, root: "/dists/stable/Release", needed: "Packages"}
		r.keys = "package: deb"
		if slices.Contains(c.needs, "gpg") {
			r.root = "/dists/stable/InRelease"
			all = append(all, r.detached())
		}
		if c.name != "apt, flat" {
			all = append(all, r)
		}
	}
	return all
}

// fetchSigned is dnf that takes a root only with its signature.
func fetchSigned(d *desk) string {
	d.run("dnf", "-q", "-y", "--installroot="+d.home+"/root", "--releasever=1", "--repofrompath=r,"+d.url(""), "--repo=r",
		"--setopt=reposdir=/nonexistent", "--setopt=varsdir=/nonexistent", "--setopt=cachedir="+d.home+"/cache", "--setopt=logdir="+d.home,
		"--setopt=zchunk=0", "--setopt=r.repo_gpgcheck=1", "--setopt=r.gpgcheck=0", "--setopt=r.gpgkey=file://"+d.up.dir+"/.key.gpg", "--noplugins",
		"install", "--downloadonly", "--downloaddir="+d.home+"/got", "hello")
	return versionNamed(filepath.Base(d.onlyFile(".rpm")))
}

// detached is a repository that has Release and Release.gpg instead of InRelease.
func (r *realRepository) detached() *realRepository {
	d := *r
	d.name, d.root, d.signature = "apt, signed apart", "/dists/stable/Release", "/dists/stable/Release.gpg"
	d.publish = func(desk *desk, version string) {
		r.publish(desk, version)
		dir := desk.up.dir + "/dists/stable/"
		writeFile(desk, dir+"Release", desk.read("Release"))
		desk.gpg("--armor", "--detach-sign", "-o", dir+"Release.gpg", dir+"Release")
		must(desk, os.Remove(dir+"InRelease"))
	}
	return &d
}

// make makes the versions. Its test ends after all that use them.
func (r *realRepository) make(t *testing.T) {
	needCommands(t, r.needs...)
	if r.mounts && exec.Command("unshare", "--mount", "true").Run() != nil {
		t.Skipf("%s needs root that may mount", r.name)
	}
	r.upstream, r.versions = &realUpstream{TB: t, dir: shortDir(t)}, map[string]map[string]string{}
	d := &desk{TB: t, up: r.upstream, home: shortDir(t)}
	for _, version := range []string{"one", "two"} {
		must(t, os.RemoveAll(r.upstream.dir+"/dists"), os.RemoveAll(r.upstream.dir+"/repodata"))
		r.publish(d, version)
		r.versions[version] = r.read(t)
	}
}

// isMetadata tells metadata from packages.
func isMetadata(name string) bool {
	return strings.HasPrefix(name, "/repodata/") || strings.HasPrefix(name, "/dists/")
}

// read returns all files of the directory.
func (r *realRepository) read(t *testing.T) map[string]string {
	files := map[string]string{}
	err := filepath.WalkDir(r.upstream.dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || strings.Contains(name, "/.") {
			return err
		}
		text, err := os.ReadFile(name)
		files[strings.TrimPrefix(name, r.upstream.dir)] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// shelf is a server in front of such a repository.
type shelf struct {
	*testArchive
	repo *realRepository
}

// newShelf puts the repository in front of a server, whose TTL is a minute.
func (r *realRepository) newShelf(tt *tester) *shelf {
	s := &shelf{repo: r, testArchive: &testArchive{tester: tt, root: r.root}}
	for _, files := range r.versions {
		for name, text := range files {
			if !isMetadata(name) {
				_, spelling, err := spellPath(strings.TrimPrefix(name, "/"), "")
				must(s, err)
				s.origin.file("/"+spelling, text)
			}
		}
	}
	return s
}

// has makes the upstream have the metadata of a version, but for the files that are
// missing, and nothing of the other.
func (s *shelf) has(version string, missing ...string) {
	metadata := maps.Clone(s.repo.versions[version])
	maps.DeleteFunc(metadata, func(name, _ string) bool { return !isMetadata(name) || name == s.root })
	s.release = func(*testArchive) string { return s.repo.versions[version][s.root] }
	s.publish(metadata, missing...)
}

// needed are the files of a version, by name and by hash, that clients cannot do without.
func (s *shelf) needed(version string) (names []string) {
	files := s.repo.versions[version]
	var texts []string
	for name, text := range files {
		if strings.Contains(path.Base(name), s.repo.needed) {
			texts = append(texts, text)
		}
	}
	for name, text := range files {
		if slices.Contains(texts, text) {
			names = append(names, name)
		}
	}
	return names
}

// client is a new one, in front of the server or of what else is at that URL.
func (s *shelf) client(t testing.TB, url string) *desk {
	return &desk{TB: t, up: s.repo.upstream, host: strings.TrimPrefix(url, "http://"), home: shortDir(t)}
}

// wantClient wants a new client to get that version, with all that it checks.
func (s *shelf) wantClient(version string) {
	s.Helper()
	if got := s.repo.fetch(s.client(s, s.url)); got != version {
		s.Fatalf("the client got %q, want %q", got, version)
	}
	s.settle()
}

// wantRefused wants a new client to fail because of an answer with that status. dnf
// does not say why.
func (s *shelf) wantRefused(status int) {
	s.Helper()
	if got, failure := s.tryClient(s.url); failure == "" {
		s.Fatalf("the client got %q, want it to fail", got)
	}
	s.wantLog(fmt.Sprintf(`"status":%d,`, status))
}

// tryClient returns what a new client got, or how it failed.
func (s *shelf) tryClient(url string) (got, failure string) {
	f := &failedStep{TB: s}
	done := make(chan struct{})
	go func() {
		defer close(done)
		got = s.repo.fetch(s.client(f, url))
	}()
	<-done
	return got, f.text
}

// failedStep is for a step of a test that may fail without its test.
type failedStep struct {
	testing.TB
	text string
}

func (f *failedStep) Helper() {}

func (f *failedStep) Fatal(args ...any) {
	f.text = fmt.Sprint(args...)
	runtime.Goexit()
}

func (f *failedStep) Fatalf(format string, args ...any) { f.Fatal(fmt.Sprintf(format, args...)) }

// TestRealMetadata wants that no client fails where it would not fail with the upstream.
func TestRealMetadata(t *testing.T) {
	t.Parallel()
	if os.Getenv("TEST_CLIENTS") == "" {
		t.Skip("TEST_CLIENTS is not set")
	}
	for _, repo := range realRepositories() {
		t.Run(repo.name, func(t *testing.T) {
			t.Parallel()
			repo.make(t)
			stories := map[string]func(*testing.T, *realRepository){
				"between two generations": playBetweenGenerations,
				"end of a hold":           playEndOfHold,
				"outage and purge":        playOutageAndPurge,
				"a mirror of its own":     playOtherBytes,
			}
			switch {
			case repo.signature != "":
				stories = map[string]func(*testing.T, *realRepository){"signature": playSignature}
			case strings.Contains(repo.name, "by hash"):
				stories["a crowd"], stories["pruned"] = playCrowd, playPruning
				stories["names alone"], stories["two replicas"] = playNamesAlone, playReplicas
			}
			for name, story := range stories {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					story(t, repo)
				})
			}
		})
	}
}

func (r *realRepository) newTester(t *testing.T, keys ...string) *tester {
	t.Helper()
	return setup{keys: append(keys, r.keys, "cache: {mutable_ttl: 60}"), env: map[string]string{"API_TOKEN": "t"}}.start(t)
}

// The upstream has a new root, and then nothing else for an hour.
func playBetweenGenerations(t *testing.T, repo *realRepository) {
	s := repo.newShelf(repo.newTester(t))
	s.has("one")
	s.wantClient("one")
	s.has("two", s.needed("two")...)
	s.wantClient("one") // the TTL is not over
	for range 60 {
		s.advance(61 * time.Second)
		s.getRoot().wantFrom("cache", agreeing)
	}
	s.wantClient("one")
	s.has("two")
	s.advance(61 * time.Second)
	s.wantClient("two")
}

// The same for a day.
func playEndOfHold(t *testing.T, repo *realRepository) {
	s := repo.newShelf(repo.newTester(t))
	s.has("one")
	s.wantClient("one")
	s.has("two", s.needed("two")...)
	s.advance(61 * time.Second)
	s.getRoot().wantFrom("cache", agreeing)
	s.advance(maxHold)
	s.wantRefused(404) // as from the upstream
	s.has("two")
	s.advance(61 * time.Second) // a 404 of apt's is remembered for a minute
	s.wantClient("two")
}

func playOutageAndPurge(t *testing.T, repo *realRepository) {
	s := repo.newShelf(repo.newTester(t))
	s.has("one")
	s.getRoot().wantStatus(200)
	s.down()
	s.wantRefused(502) // there is the root alone
	s.upAgain()
	s.wantClient("one")
	s.has("two", s.needed("two")...)
	s.advance(61 * time.Second)
	s.down()
	s.getRoot().wantStale() // who finds an outage is told so, where there is no copy; apt asks for InRelease
	s.wantClient("one")
	s.upAgain()
	s.advance(61 * time.Second)
	s.wantClient("one")
	s.has("two")
	s.delete("/artifacts/r"+s.root, "Authorization: Bearer t").wantStatus(204)
	s.wantClient("two")
}

// A mirror stands in for what base_url fails to give, with bytes of another generation.
func playOtherBytes(t *testing.T, repo *realRepository) {
	tt := repo.newTester(t)
	mirror := tt.another()
	s := repo.newShelf(tt)
	s.configure(remoteYAML(s.origin.url, repo.keys, "mirrors: [{url: '"+mirror.url+"', verified: true}]"))
	s.has("one")
	wrong, right := slices.Sorted(slices.Values(s.needed("two"))), slices.Sorted(slices.Values(s.needed("one")))
	for i, name := range right {
		s.origin.file(name, "").answering(500)
		mirror.file(name, repo.versions["two"][wrong[i]])
	}
	s.wantRefused(502)
	for _, name := range right {
		mirror.file(name, repo.versions["one"][name])
	}
	s.wantClient("one")
}

// Many clients come while the server goes from one generation to the next. A file that
// has its hash in its name is there for who holds the root of before.
func playCrowd(t *testing.T, repo *realRepository) {
	s := repo.newShelf(repo.newTester(t))
	s.has("one")
	s.wantClient("one")
	var clients sync.WaitGroup
	for i := range crowdOfClients {
		if i == crowdOfClients/2 {
			s.has("two")
			s.advance(61 * time.Second)
		}
		clients.Go(func() {
			if got, failure := s.tryClient(s.url); failure != "" {
				s.Errorf("a client failed: %s", failure)
			} else if got == "one" && i >= crowdOfClients/2 {
				s.Error("a client got the generation before, after the flip")
			}
		})
	}
	clients.Wait()
	s.wantClient("two")
}

// crowdOfClients is how many come at once.
const crowdOfClients = 8

// The upstream does not have by hash what its root says that it has.
func playNamesAlone(t *testing.T, repo *realRepository) {
	s := repo.newShelf(repo.newTester(t))
	isByHash := func(name string) bool { return strings.Contains(name, "/by-hash/") }
	s.has("one", slices.DeleteFunc(s.needed("one"), func(name string) bool { return !isByHash(name) })...)
	s.wantClient("one")
	if asked := slices.ContainsFunc(s.origin.all(), isByHash); asked != (repo.keys == "package: deb") {
		t.Errorf("asked by hash: %v; %q", asked, s.origin.all())
	}
}

// The server flips, and the upstream has nothing of the old generation any more, when a
// client has read the root and not yet what it names.
func playPruning(t *testing.T, repo *realRepository) {
	s := repo.newShelf(repo.newTester(t))
	s.has("one")
	s.wantClient("one")
	var flip sync.Once
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isMetadata(strings.TrimPrefix(r.URL.Path, "/api/r")) && r.URL.Path != "/api/r"+s.root {
			flip.Do(func() {
				s.has("two")
				s.advance(61 * time.Second)
				s.getRoot().wantBody(s.release(s.testArchive))
			})
		}
		s.ServeHTTP(w, r)
	}))
	defer front.Close()
	if got, failure := s.tryClient(front.URL); got != "one" {
		t.Fatalf("the client got %q %s", got, failure)
	}
	s.wantClient("two")
}

// The signature is that of the generation before for a while, and then not there.
func playSignature(t *testing.T, repo *realRepository) {
	s := repo.newShelf(repo.newTester(t))
	s.has("one")
	s.wantClient("one")
	s.has("two")
	s.origin.file(repo.signature, repo.versions["one"][repo.signature])
	s.advance(61 * time.Second)
	s.wantClient("one")
	s.origin.remove(repo.signature)
	s.advance(61 * time.Second)
	s.wantClient("one")
	s.getRoot().wantFrom("cache", agreeing)
	s.has("two")
	s.advance(61 * time.Second)
	s.wantClient("two")
}

// Two replicas share S3, the real one if there is one, and have hot copies.
func playReplicas(t *testing.T, repo *realRepository) {
	var bucket *s3Client
	if os.Getenv("TEST_S3") != "" {
		bucket = realBucket(t)
	} else {
		bucket = newFakeS3(t).client()
	}
	f := newFleet(t, 2, repo.keys, "cache: {mutable_ttl: 60}")
	var replicas []*shelf
	for _, tt := range f.all {
		store, disk := newS3Store(bucket, func() bool { return true }), newTestDisk(t)
		t.Cleanup(store.Close)
		tier := newTiered(store, disk, hotTestLimit, spaceOf(disk))
		t.Cleanup(tier.Close)
		tt.cache.useObjects(tier)
		replicas = append(replicas, repo.newShelf(tt))
	}
	a, b := replicas[0], replicas[1]
	advance := func() {
		for _, tt := range f.all {
			tt.advance(61 * time.Second)
		}
	}
	a.has("one")
	b.wantClient("one")
	a.has("two", a.needed("two")...)
	advance()
	a.wantClient("one")
	a.has("two")
	advance()
	b.wantClient("two")
	a.wantClient("two")
}
