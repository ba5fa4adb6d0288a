package main

import (
	"context"
	"crypto/sha512"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// testArchive is an upstream with metadata that changes from version to version.
type testArchive struct {
	*tester
	root    string            // path of the root at the origin
	files   map[string]string // the metadata beside and below it, by path from the root's folder
	folder  string
	release func(a *testArchive) string
}

// repomdOf is a repomd.xml that names files by their type, which is the name up to the
// first dot, behind a hash if there is one.
func repomdOf(a *testArchive) string {
	text := `<?xml version="1.0" encoding="UTF-8"?><repomd xmlns="http://linux.duke.edu/metadata/repo">`
	for _, name := range slices.Sorted(maps.Keys(a.files)) {
		kind, _, _ := strings.Cut(name[strings.LastIndexAny(name, "-/")+1:], ".")
		text += fmt.Sprintf(`<data type="%s"><checksum type="sha256">%s</checksum><location href="%s"/><size>%d</size></data>`,
			kind, sha256Hex([]byte(a.files[name])), name, len(a.files[name]))
	}
	return text + "</repomd>"
}

// releaseOf is a Release that names the files, with more fields in front.
func releaseOf(fields string) func(a *testArchive) string {
	return func(a *testArchive) string {
		text := "Origin: test\n" + fields + "SHA256:\n"
		for _, name := range slices.Sorted(maps.Keys(a.files)) {
			text += fmt.Sprintf(" %s %d %s\n", sha256Hex([]byte(a.files[name])), len(a.files[name]), name)
		}
		return text + " " + sha256Hex([]byte("")) + " 0 Release\n"
	}
}

// rpmArchive and debArchive are in front of a server with a TTL of a minute.
func rpmArchive(t testing.TB, keys ...string) *testArchive {
	t.Helper()
	return &testArchive{tester: newTester(t, append(keys, "package: rpm", "cache: {mutable_ttl: 60}")...), root: "/os/repodata/repomd.xml", folder: "/os/", release: repomdOf}
}

func debArchive(t testing.TB, fields string, keys ...string) *testArchive {
	t.Helper()
	return &testArchive{tester: newTester(t, append(keys, "package: deb", "cache: {mutable_ttl: 60}")...), root: "/dists/t/InRelease", folder: "/dists/t/", release: releaseOf(fields)}
}

// publish puts another version there: the root, and of the files that it names those
// that are not missing. Files of before that are not in it are gone.
func (a *testArchive) publish(files map[string]string, missing ...string) {
	for name := range a.files {
		a.origin.remove(a.folder + name)
	}
	a.files = files
	for name, text := range files {
		if !slices.Contains(missing, name) {
			a.origin.file(a.folder+name, text)
		}
	}
	a.publishRoot(a.root)
}

// publishRoot puts a root there. Versions may be of the same second, so it has an ETag.
func (a *testArchive) publishRoot(path string) {
	a.origin.file(path, a.release(a)).etag(`"` + sha256Hex([]byte(a.release(a))) + `"`)
}

// held is how many generations are held, as the metric says.
func (a *testArchive) held() float64 {
	return a.cache.generations.families(a.server.config.Load())[0].values["r"]
}

func (a *testArchive) arrive(names ...string) {
	for _, name := range names {
		a.origin.file(a.folder+name, a.files[name])
	}
}

// in is a file's or the root's path here; a name with a slash in front is the root's
// own at the origin.
func (a *testArchive) in(name string) string {
	if strings.HasPrefix(name, "/") {
		return "/api/r" + name
	}
	return "/api/r" + a.folder + name
}

func (a *testArchive) getRoot() *got { a.Helper(); return a.get(a.in(a.root)) }

// wantGeneration gets the root and files, which must be these.
func (a *testArchive) wantGeneration(root string, files map[string]string) {
	a.Helper()
	a.getRoot().wantStatus(200).wantBody(root)
	for name, text := range files {
		a.get(a.in(name)).wantStatus(200).wantBody(text)
	}
}

const agreeing = "hit; ttl=-N; detail=agreeing"

func rpmFiles(version string) map[string]string {
	return map[string]string{"repodata/primary.xml.gz": "primary " + version, "repodata/filelists.xml.gz": "filelists " + version}
}

func rpmHashed(version string) map[string]string {
	files := map[string]string{}
	for name, text := range rpmFiles(version) {
		files["repodata/"+sha256Hex([]byte(text))+"-"+strings.TrimPrefix(name, "repodata/")] = text
	}
	return files
}

const packages, packagesGz = "main/binary-amd64/Packages", "main/binary-amd64/Packages.gz"

func debFiles(version string) map[string]string {
	return map[string]string{packagesGz: "packages " + version, "main/source/Sources.gz": "sources " + version, "main/i18n/Translation-en.gz": "translation " + version}
}

// archives are the two kinds with two versions of their files.
func archives(t *testing.T, f func(t *testing.T, a *testArchive, one, two map[string]string)) {
	t.Parallel()
	for name, kind := range map[string]struct {
		make  func(testing.TB, ...string) *testArchive
		files func(string) map[string]string
	}{
		"rpm":            {rpmArchive, rpmFiles},
		"rpm with names": {rpmArchive, rpmHashed},
		"deb":            {func(t testing.TB, keys ...string) *testArchive { return debArchive(t, "", keys...) }, debFiles},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := kind.make(t)
			one, two := kind.files("one"), kind.files("two and more")
			a.publish(one)
			a.wantGeneration(a.release(a), one)
			f(t, a, one, two)
		})
	}
}

func TestMetadataStaysWithItsRoot(t *testing.T) {
	archives(t, func(t *testing.T, a *testArchive, one, two map[string]string) {
		a.advance(40 * time.Second)
		root := a.release(a)
		a.publish(two)
		a.advance(21 * time.Second) // the files are past their TTL, if the root is not
		a.configure(remoteYAML(a.origin.url, "package: "+a.server.config.Load().remotes["r"].packageType, "cache: {mutable_ttl: 3600, immutable_ttl: 1}"))
		a.wantGeneration(root, one)
		a.wantRequests(a.root, 1)
	})
}

func TestNewRootComesWithItsFiles(t *testing.T) {
	archives(t, func(t *testing.T, a *testArchive, one, two map[string]string) {
		a.publish(two)
		a.advance(61 * time.Second)
		a.origin.forget()
		a.getRoot().wantStatus(200).wantBody(a.release(a))
		a.awaitAhead()
		a.origin.forget()
		a.wantGeneration(a.release(a), two)
		if asked := a.origin.all(); len(asked) != 0 {
			t.Errorf("the files of the new root are not there, asked %v", asked)
		}
	})
}

// awaitAhead waits for what is fetched behind a publication.
func (a *testArchive) awaitAhead() {
	a.cache.fills.running.Wait()
}

func TestNewRootWaitsForItsFiles(t *testing.T) {
	archives(t, func(t *testing.T, a *testArchive, one, two map[string]string) {
		old := a.release(a)
		late := slices.Sorted(maps.Keys(two))[0]
		a.publish(two, late)
		for range 3 {
			a.advance(61 * time.Second)
			a.getRoot().wantFrom("cache", agreeing).wantBody(old)
			a.wantGeneration(old, one)
		}
		a.get("/metrics").wantStatus(200)
		if text := a.get("/metrics").text; !strings.Contains(text, `artifactapi_held_generations{remote="r"} 1`) {
			t.Error("the metric does not say that the generation is held")
		}
		asked := a.origin.requests(a.root)
		a.getRoot().wantFrom("cache", agreeing)
		if a.origin.requests(a.root) != asked {
			t.Error("the upstream was asked more often than once a minute")
		}
		a.arrive(late)
		a.advance(61 * time.Second)
		a.wantGeneration(a.release(a), two)
		a.wantLog("not held back any more")
		if text := a.get("/metrics").text; !strings.Contains(text, `artifactapi_held_generations{remote="r"} 0`) {
			t.Error("the metric does not say that the hold is over")
		}
	})
}

func TestHoldEnds(t *testing.T) {
	t.Parallel()
	t.Run("after a day", func(t *testing.T) {
		t.Parallel()
		a := rpmArchive(t)
		wantIncomplete := func(n int) {
			t.Helper()
			if g := a.get("/metrics"); !g.has(fmt.Sprintf("artifactapi_incomplete_generations_total{remote=\"r\"} %d\n", n)) {
				t.Errorf("the metric does not say that %d generations were incomplete", n)
			}
		}
		wantIncomplete(0)
		a.publish(rpmFiles("one"))
		a.wantGeneration(a.release(a), a.files)
		a.publish(rpmFiles("two"), "repodata/primary.xml.gz")
		a.advance(61 * time.Second)
		a.getRoot().wantFrom("cache", agreeing)
		wantIncomplete(0)
		a.advance(24*time.Hour + time.Minute)
		a.getRoot().wantBody(a.release(a))
		a.wantLog("without some of its files")
		wantIncomplete(1)
	})
	for name, c := range map[string]struct{ validFor, held, more time.Duration }{ // held when a root is asked for, and over when one is that much later
		"at Valid-Until": {time.Hour, 50 * time.Minute, 11 * time.Minute},
		"at Valid-Until, however soon after a try": {80 * time.Second, 61 * time.Second, 20 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := debArchive(t, "Valid-Until: "+time.Now().Add(c.validFor).UTC().Format(time.RFC1123)+"\n")
			a.publish(debFiles("one"))
			a.wantGeneration(a.release(a), a.files)
			a.publish(debFiles("two"), packagesGz)
			a.advance(c.held)
			a.getRoot().wantFrom("cache", agreeing)
			a.advance(c.more)
			a.getRoot().wantBody(a.release(a))
		})
	}
	t.Run("at Valid-Until, where a file made the root be asked", func(t *testing.T) {
		t.Parallel()
		a := debArchive(t, "Valid-Until: "+time.Now().Add(70*time.Second).UTC().Format(time.RFC1123)+"\n")
		a.publish(debFiles("one"))
		a.getRoot().wantStatus(200)
		a.get(a.in(packagesGz)).wantStatus(200)
		a.publish(debFiles("two"), packagesGz)
		a.advance(30 * time.Second)
		a.get(a.in("main/source/Sources.gz")).wantStatus(502) // upstream has that of two: the root is asked, and held
		a.advance(31 * time.Second)
		a.getRoot().wantFrom("cache", agreeing)
		a.advance(10 * time.Second)
		a.getRoot().wantBody(a.release(a))
	})
	t.Run("at a Valid-Until that is over", func(t *testing.T) {
		t.Parallel()
		a := debArchive(t, "Valid-Until: "+longAgo.Format(time.RFC1123)+"\n")
		a.publish(debFiles("one"))
		a.wantGeneration(a.release(a), a.files)
		a.publish(debFiles("two"), packagesGz)
		a.advance(61 * time.Second)
		a.getRoot().wantBody(a.release(a))
	})
	t.Run("for the metric, where nobody asks any more", func(t *testing.T) {
		t.Parallel()
		a := rpmArchive(t)
		a.publish(rpmFiles("one"))
		a.wantGeneration(a.release(a), a.files)
		a.publish(rpmFiles("two"), "repodata/primary.xml.gz")
		a.advance(61 * time.Second)
		a.getRoot().wantFrom("cache", agreeing)
		for _, want := range []float64{1, 0} {
			if n := a.held(); n != want {
				t.Errorf("%v generations are held, want %v", n, want)
			}
			a.advance(maxHold)
		}
	})
	t.Run("for a file without successor", func(t *testing.T) {
		t.Parallel()
		a := debArchive(t, "")
		a.publish(debFiles("one"))
		a.wantGeneration(a.release(a), a.files)
		two := debFiles("two")
		delete(two, "main/source/Sources.gz")
		a.publish(two, "main/i18n/Translation-en.gz") // which holds nothing
		a.advance(61 * time.Second)
		a.getRoot().wantBody(a.release(a))
	})
	t.Run("for what nobody has used", func(t *testing.T) {
		t.Parallel()
		a := rpmArchive(t)
		a.publish(rpmFiles("one"))
		a.getRoot().wantMiss()
		a.publish(rpmFiles("two"), "repodata/primary.xml.gz")
		a.advance(61 * time.Second)
		a.getRoot().wantBody(a.release(a))
	})
}

func TestRootIsAskedWhenItsFileIsGone(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	a.publish(debFiles("one"))
	a.getRoot().wantMiss()
	second := debFiles("two")
	second[packagesGz] = noise(2, 300<<10)
	a.publish(second)
	var asked atomic.Int64
	a.origin.file(a.folder+packagesGz, "").acts(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(second[packagesGz])))
		if asked.Add(1) == 1 { // the length says enough: nobody waits for the body
			_ = http.NewResponseController(w).Flush()
			a.origin.stalls(w, r)
		}
		_, _ = w.Write([]byte(second[packagesGz]))
	})
	a.get(a.in(packagesGz)).wantStatus(200).wantBody(second[packagesGz])
	a.getRoot().wantHit().wantBody(a.release(a))
	a.origin.remove(a.folder + "main/source/Sources.gz")
	a.get(a.in("main/source/Sources.gz")).wantStatus(404)
	a.get(a.in("main/source/Sources.gz")).wantStatus(404)
	a.wantRequests("HEAD "+a.root, 1) // once a minute, and it was asked just before
}

func TestRootIsAskedWhenAFileByHashIsGone(t *testing.T) {
	t.Parallel()
	for _, status := range []int{404, 403} { // S3 says the second to whom it does not let list
		a := rpmArchive(t)
		a.publish(rpmHashed("one"))
		a.getRoot().wantMiss()
		name := slices.Sorted(maps.Keys(a.files))[0]
		a.publish(rpmHashed("two"))
		a.origin.file(a.folder+name, "").acts(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
		a.get(a.in(name)).wantStatus(status)
		a.getRoot().wantHit().wantBody(a.release(a))
	}
}

// Bytes of the right length show their age only at their end.
// What upstream lacked of one generation it may have of the next.
func TestMissingFileIsAskedForUnderAnotherRoot(t *testing.T) {
	t.Parallel()
	for _, fields := range []string{"", "Acquire-By-Hash: yes\n"} {
		a := debArchive(t, fields, "negative_ttl: 86400")
		a.publish(debFiles("one"), packagesGz)
		a.getRoot().wantMiss()
		a.get(a.in(packagesGz)).wantStatus(404)
		a.get(a.in(packagesGz)).wantFrom("cache", "hit; detail=negative")
		a.publish(debFiles("two"))
		a.advance(61 * time.Second)
		a.wantGeneration(a.release(a), a.files)
	}
}

func TestRootIsAskedAfterAMismatch(t *testing.T) {
	t.Parallel()
	a := rpmArchive(t)
	a.publish(map[string]string{"repodata/primary.xml.gz": noise(1, 200<<10)})
	a.getRoot().wantMiss()
	a.publish(map[string]string{"repodata/primary.xml.gz": noise(2, 200<<10)})
	if g := a.get(a.in("repodata/primary.xml.gz")); g.err == nil {
		g.wantBody(a.files["repodata/primary.xml.gz"]) // it was found out before anything was sent
	}
	a.awaitAhead()
	a.wantGeneration(a.release(a), a.files)
}

func TestOtherBytesAreNeverServed(t *testing.T) {
	t.Parallel()
	for name, keys := range map[string][]string{"upstream's": nil, "a mirror's": {"mirrors: [{url: 'MIRROR', verified: true}]"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := debArchive(t, "")
			mirror := a.another()
			for i := range keys {
				keys[i] = strings.ReplaceAll(keys[i], "MIRROR", mirror.url)
			}
			a.configure(remoteYAML(a.origin.url, append(keys, "package: deb", "cache: {mutable_ttl: 60}")...))
			a.publish(debFiles("one"))
			a.getRoot().wantMiss()
			wrong := "packages two"
			a.origin.file(a.folder+packagesGz, wrong)
			if keys != nil {
				a.origin.file(a.folder+packagesGz, "").answering(500)
				mirror.file(a.folder+packagesGz, wrong)
				mirror.file(a.root, "Origin: mirror\n")
			}
			a.get(a.in(packagesGz)).wantDetail(502, "other bytes")
			a.wantStored("dists/t/"+packagesGz, false)
			if keys != nil {
				mirror.file(a.folder+packagesGz, "packages one")
				a.get(a.in(packagesGz)).wantStatus(200).wantBody("packages one")
				a.down()
				a.advance(61 * time.Second)
				a.getRoot().wantStale().wantBody(a.release(a))
				if mirror.requests(a.root) != 0 {
					t.Error("a mirror that is only good for verified bodies was asked for a root")
				}
			}
		})
	}
}

func TestRootThatNamesNothingIsNotPublished(t *testing.T) {
	archives(t, func(t *testing.T, a *testArchive, one, two map[string]string) {
		old := a.release(a)
		a.origin.file(a.root, "<html>please log in</html>").says("Content-Type", "text/html").etag(`"page"`)
		a.advance(61 * time.Second)
		a.getRoot().wantDetail(502, "names no files")
		a.publish(one)
		a.wantGeneration(old, one)
	})
}

// Upstream may give up SHA-256: then its new root rules no file, and is none to be refused.
func TestRootWithOtherHashesIsPublished(t *testing.T) {
	archives(t, func(t *testing.T, a *testArchive, one, two map[string]string) {
		a.files = two
		root := strings.NewReplacer(`type="sha256"`, `type="sha512"`, "SHA256:", "SHA512:").Replace(a.release(a))
		a.files, a.release = one, func(*testArchive) string { return root }
		a.publish(two)
		a.advance(61 * time.Second)
		a.wantGeneration(root, two)
	})
}

// The bytes that a root names answer however they were stored, when upstream has lost the
// files but not the root: by name and by hash.
func TestMetadataAnswersByItsOtherName(t *testing.T) {
	t.Parallel()
	inSHA256 := func(text string) string { return "main/binary-amd64/by-hash/SHA256/" + sha256Hex([]byte(text)) }
	inSHA512 := func(text string) string {
		return "main/binary-amd64/by-hash/SHA512/" + fmt.Sprintf("%x", sha512.Sum512([]byte(text)))
	}
	for name, c := range map[string]struct{ stored, asked func(string) string }{
		"by name, then by hash":       {func(string) string { return packagesGz }, inSHA256},
		"by hash, then by name":       {inSHA256, func(string) string { return packagesGz }},
		"by name, then by SHA-512":    {func(string) string { return packagesGz }, inSHA512},
		"by SHA-512, then by SHA-256": {inSHA512, inSHA256},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := debArchive(t, "Acquire-By-Hash: yes\n")
			sha256Only := a.release
			a.release = func(a *testArchive) string {
				text := sha256Only(a) + "SHA512:\n"
				for name, body := range a.files {
					text += fmt.Sprintf(" %x %d %s\n", sha512.Sum512([]byte(body)), len(body), name)
				}
				return text
			}
			publish := func(version string) {
				a.publish(map[string]string{packagesGz: "packages " + version})
				a.origin.file(a.folder+inSHA256("packages "+version), "packages "+version)
				a.origin.file(a.folder+inSHA512("packages "+version), "packages "+version)
			}
			lose := func(version string) {
				for _, file := range []string{packagesGz, inSHA256("packages " + version), inSHA512("packages " + version)} {
					a.origin.remove(a.folder + file)
				}
			}
			publish("one")
			a.getRoot().wantMiss()
			a.get(a.in(c.stored("packages one"))).wantMiss()
			lose("one")
			a.get(a.in(c.asked("packages one"))).wantHit().wantBody("packages one")
			publish("two")
			a.advance(61 * time.Second)
			a.getRoot().wantStatus(200).wantBody(a.release(a))
			a.awaitAhead()
			lose("two")
			a.get(a.in(c.asked("packages two"))).wantHit().wantBody("packages two")
			a.get(a.in("main/binary-amd64/by-hash/SHA256/" + sha256Hex([]byte("none")))).wantStatus(404)
		})
	}
}

// A file may be stored before the root that names it: by a client that asks in another
// order, or while the remote was of another package.
func TestMetadataStoredBeforeItsRootAnswers(t *testing.T) {
	t.Parallel()
	for _, next := range []string{"packages one", "packages two"} {
		a := debArchive(t, "")
		a.publish(map[string]string{packagesGz: "packages one"})
		a.get(a.in(packagesGz)).wantMiss()
		a.publish(map[string]string{packagesGz: next})
		a.getRoot().wantMiss()
		old := a.release(a)
		a.moveUpstream(a.origin.url, "package: deb", "sealed: true")
		if next == "packages two" {
			a.get(a.in(packagesGz)).wantStatus(404)
			continue
		}
		a.get(a.in(packagesGz)).wantSealed().wantBody(next)
		a.moveUpstream(a.origin.url, "package: deb", "cache: {mutable_ttl: 60}")
		a.publish(map[string]string{packagesGz: "packages two"}, packagesGz)
		a.advance(61 * time.Second)
		a.getRoot().wantFrom("cache", agreeing).wantBody(old)
	}
}

// TestMetadataIsFetchedOnceByAllItsNames: what is being fetched or stored by one name
// answers by the other, too.
func TestMetadataIsFetchedOnceByAllItsNames(t *testing.T) {
	t.Parallel()
	byHash := "main/binary-amd64/by-hash/SHA256/" + sha256Hex([]byte("packages one"))
	for _, names := range [][2]string{{packagesGz, byHash}, {byHash, packagesGz}} {
		gated := &heldObjects{gate: make(chan struct{}, 1)}
		a := &testArchive{tester: setup{objects: func(o objects) objects { gated.objects = o; return gated }, keys: []string{"package: deb"}}.start(t),
			root: "/dists/t/InRelease", folder: "/dists/t/", release: releaseOf("Acquire-By-Hash: yes\n")}
		a.publish(map[string]string{packagesGz: "packages one"})
		a.origin.file(a.folder+byHash, "packages one")
		gated.gate <- struct{}{}
		a.getRoot().wantMiss()
		for _, name := range names {
			s := a.start(t.Context(), "GET", a.in(name), nil) // get would wait for the store
			s.rest().wantStatus(200).wantBody("packages one")
			s.leave()
		}
		a.wantRequests(a.folder+byHash, 1)
		a.wantRequests(a.folder+packagesGz, 0)
		close(gated.gate)
		a.settle()
	}
}

func TestMetadataByHash(t *testing.T) {
	t.Parallel()
	hashed := func(text string) string { return "main/binary-amd64/by-hash/SHA256/" + sha256Hex([]byte(text)) }
	for _, c := range []struct {
		name             string
		client           string // how the client asks
		byHash, byName   bool   // how upstream has the file
		asked            string
		status, requests int
	}{
		{"by hash where it is", hashed("packages one"), true, true, packagesGz, 200, 0},
		{"by hash where only the name is", hashed("packages one"), false, true, packagesGz, 200, 1},
		{"by name where both are", packagesGz, true, true, packagesGz, 200, 0},
		{"by name where the hash is not", packagesGz, false, true, packagesGz, 200, 1},
		{"by name where the name is of the next", packagesGz, true, false, packagesGz, 200, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := debArchive(t, "Acquire-By-Hash: yes\n")
			a.publish(debFiles("one"))
			if c.byHash {
				a.origin.file(a.folder+hashed("packages one"), "packages one")
			}
			if !c.byName {
				a.origin.file(a.folder+packagesGz, "packages two")
			}
			a.getRoot().wantMiss()
			a.head(a.in(packagesGz)).wantStatus(200)
			a.origin.forget()
			a.get(a.in(c.client)).wantStatus(c.status).wantBody("packages one")
			a.wantRequests(a.folder+c.asked, c.requests)
			a.advance(2 * time.Hour)
			a.origin.remove(a.folder + c.asked)
			a.get(a.in(c.client)).wantHit()
		})
	}
}

func TestByHashOutlivesUpstreamsPruning(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "Acquire-By-Hash: yes\n", "immutable_patterns: ['^pool/']")
	name := "main/binary-amd64/by-hash/SHA256/" + sha256Hex([]byte("packages one"))
	a.publish(debFiles("one"))
	a.origin.file(a.folder+name, "packages one")
	a.getRoot().wantMiss()
	a.get(a.in(name)).wantStatus(200)
	two := debFiles("two")
	a.publish(two)
	a.origin.remove(a.folder + name)
	a.advance(61 * time.Second)
	a.getRoot().wantBody(a.release(a))
	a.get(a.in("main/binary-amd64/by-hash/SHA256/" + sha256Hex([]byte("packages two")))).wantHit()
	a.get(a.in(name)).wantHit()
	a.publish(debFiles("two again"))
	a.advance(61 * time.Second)
	a.getRoot().wantBody(a.release(a))
	a.awaitAhead()
	a.wantStored("dists/t/"+name, true) // of the third generation, but used just now
	// Two generations are kept, the others go once nobody has used them for three days.
	for i, version := range []string{"three", "four"} {
		a.publish(debFiles(version))
		a.cache.flushCounts(t.Context())
		a.advance(4 * 24 * time.Hour)
		a.getRoot().wantBody(a.release(a))
		a.awaitAhead()
		a.wantStored("dists/t/"+name, false)
		a.wantStored("dists/t/main/binary-amd64/by-hash/SHA256/"+sha256Hex([]byte("packages two again")), i == 0)
	}
}

// Clients that hold the root of a generation that was replaced may still ask for its
// files, however long nobody had used them before.
func TestReplacedGenerationsStayForThreeDays(t *testing.T) {
	t.Parallel()
	for name, quick := range map[string]time.Duration{"soon": 2 * 24 * time.Hour, "at last": 4 * 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := rpmArchive(t)
			flip := func(version string) {
				t.Helper()
				a.publish(rpmHashed(version))
				a.advance(61 * time.Second)
				a.wantGeneration(a.release(a), a.files)
				a.awaitAhead()
			}
			flip("one")
			one := a.files
			a.cache.flushCounts(t.Context())
			a.advance(30 * 24 * time.Hour)
			flip("two")
			two := a.files
			flip("three")
			for name, text := range one {
				a.get(a.in(name)).wantHit().wantBody(text)
			}
			a.advance(quick)
			flip("four")
			for name := range one {
				a.wantStored("os/"+name, quick < oldGenerationLife)
			}
			for name := range two {
				a.wantStored("os/"+name, quick < oldGenerationLife)
			}
		})
	}
}

// The root is fetched again and again while upstream has nothing new.
func TestGenerationBeforeIsKept(t *testing.T) {
	t.Parallel()
	a := rpmArchive(t)
	a.publish(rpmHashed("one"))
	a.wantGeneration(a.release(a), a.files)
	one := a.files
	a.publish(rpmHashed("two"))
	for range 3 {
		a.advance(4 * 24 * time.Hour)
		a.getRoot().wantBody(a.release(a))
		a.awaitAhead()
	}
	for name, text := range one {
		a.get(a.in(name)).wantHit().wantBody(text)
	}
}

func TestSignatureBelongsToItsRoot(t *testing.T) {
	t.Parallel()
	a := rpmArchive(t)
	sign := func(of string) { a.origin.file(a.root+".asc", of) }
	a.publish(rpmFiles("one"))
	sign("signature of one")
	a.wantGeneration(a.release(a), a.files)
	a.get(a.in(a.root + ".asc")).wantStatus(200).wantBody("signature of one")
	old := a.release(a)
	a.publish(rpmFiles("two")) // the signature is not there yet
	a.advance(61 * time.Second)
	a.getRoot().wantFrom("cache", agreeing).wantBody(old)
	a.get(a.in(a.root+".asc")).wantFrom("cache", agreeing).wantBody("signature of one")
	sign("signature of two")
	a.advance(61 * time.Second)
	a.getRoot().wantBody(a.release(a))
	a.get(a.in(a.root + ".asc")).wantHit().wantBody("signature of two")
}

// Upstream signs a root some moments after it, and may sign it once more.
func TestSignatureHasATTL(t *testing.T) {
	t.Parallel()
	a := rpmArchive(t)
	sign := func(of string) { a.origin.file(a.root+".asc", of) }
	signature := a.in(a.root + ".asc")
	a.publish(rpmFiles("two"))
	sign("signature of one")
	a.getRoot().wantMiss()
	a.get(signature).wantStatus(200).wantBody("signature of one") // nothing is known that tells
	sign("signature of two")
	a.advance(61 * time.Second)
	a.get(signature).wantRefetched().wantBody("signature of two")
	a.get(signature).wantHit()
	a.origin.remove(a.root + ".asc") // the next root is on its way
	a.advance(61 * time.Second)
	a.get(signature).wantFrom("cache", agreeing).wantBody("signature of two")
}

// Behind a hold that ended without it the old signature is still not that of the new root.
func TestOldSignatureIsNotStoredBehindAHold(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "Valid-Until: "+longAgo.Format(time.RFC1123)+"\n") // which holds nothing
	a.root = "/dists/t/Release"
	signature := a.in(a.root + ".gpg")
	a.publish(debFiles("one"))
	a.origin.file(a.root+".gpg", "signature of one")
	a.wantGeneration(a.release(a), a.files)
	a.get(signature).wantStatus(200).wantBody("signature of one")
	a.publish(debFiles("two"))
	a.advance(61 * time.Second)
	a.getRoot().wantBody(a.release(a))
	a.get(signature).wantDetail(503, "is not complete yet")
	a.origin.file(a.root+".gpg", "signature of two")
	a.get(signature).wantStatus(200).wantBody("signature of two")
}

func TestSignatureOfTheNextRootBringsThatRoot(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	a.root = "/dists/t/Release"
	a.publish(debFiles("one"))
	a.getRoot().wantMiss()
	a.publish(debFiles("two"))
	a.origin.file(a.root+".gpg", "signature of two")
	a.get(a.in(a.root + ".gpg")).wantStatus(200).wantBody("signature of two")
	a.getRoot().wantHit().wantBody(a.release(a))
}

// A long TTL begins with the new generation.
func TestHoldIsNotAsLongAsTheTTL(t *testing.T) {
	archives(t, func(t *testing.T, a *testArchive, one, two map[string]string) {
		a.configure(remoteYAML(a.origin.url, "package: "+a.server.config.Load().remotes["r"].packageType, "cache: {mutable_ttl: 36000}"))
		old, late := a.release(a), slices.Sorted(maps.Keys(two))[0]
		a.publish(two, late)
		a.advance(11 * time.Hour)
		a.getRoot().wantFrom("cache", agreeing).wantBody(old)
		a.arrive(late)
		a.advance(30 * time.Second)
		a.getRoot().wantFrom("cache", agreeing).wantBody(old)
		a.advance(31 * time.Second)
		a.wantGeneration(a.release(a), two)
	})
}

// Whatever else is asked for meanwhile, a held root is tried again after a minute.
func TestHoldIsTriedAgain(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	a.root = "/dists/t/Release"
	a.publish(debFiles("one"))
	a.wantGeneration(a.release(a), a.files)
	a.publish(debFiles("two"), packagesGz)
	a.origin.file(a.root+".gpg", "signature of two")
	a.advance(61 * time.Second)
	a.getRoot().wantFrom("cache", agreeing)
	a.advance(50 * time.Second)
	a.get(a.in(a.root+".gpg")).wantDetail(503, "is changing its metadata")
	a.arrive(packagesGz)
	a.advance(11 * time.Second)
	a.getRoot().wantBody(a.release(a))
}

func TestBothReleasesFlipTogether(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	other := a.folder + "Release"
	a.publish(debFiles("one"))
	a.publishRoot(other)
	a.wantGeneration(a.release(a), a.files)
	a.get(a.in(other)).wantMiss()
	old := a.release(a)
	a.publish(debFiles("two")) // Release is still the old one
	a.advance(61 * time.Second)
	a.getRoot().wantFrom("cache", agreeing).wantBody(old)
	a.publishRoot(other)
	a.advance(61 * time.Second)
	a.get(a.in(other)).wantStatus(200).wantBody(a.release(a))
	a.getRoot().wantHit().wantBody(a.release(a))
}

func TestReleaseThatUpstreamHasNoMoreHoldsNothing(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	other := a.folder + "Release"
	a.publish(debFiles("one"))
	a.publishRoot(other)
	a.wantGeneration(a.release(a), a.files)
	a.get(a.in(other)).wantMiss()
	a.publish(debFiles("two"))
	a.origin.remove(other)
	a.advance(61 * time.Second)
	a.wantGeneration(a.release(a), a.files)
	a.get(a.in(other)).wantStatus(404)
}

// A first Release is of the generation that is held: there is no old one to answer with.
func TestFirstReleaseDuringAHold(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	other := a.folder + "Release"
	a.publish(debFiles("one"))
	a.wantGeneration(a.release(a), a.files)
	a.publish(debFiles("two"), packagesGz)
	a.publishRoot(other)
	a.advance(61 * time.Second)
	a.getRoot().wantFrom("cache", agreeing)
	a.origin.forget()
	for range 2 {
		a.get(a.in(other)).wantDetail(503, "is changing its metadata")
	}
	if asked := a.origin.all(); len(asked) != a.origin.requests(other) {
		t.Errorf("within the minute after a try upstream was asked for %v", asked)
	}
	if n := a.held(); n != 1 {
		t.Errorf("%v generations are held, want 1", n)
	}
	a.arrive(packagesGz)
	a.advance(61 * time.Second)
	a.get(a.in(other)).wantMiss().wantBody(a.release(a))
	a.wantGeneration(a.release(a), a.files)
}

// apt asks for InRelease first, and where there is none for Release.
func TestRootThatUpstreamDoesNotHaveIsNotHeld(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	a.root = "/dists/t/Release"
	a.publish(debFiles("one"))
	a.wantGeneration(a.release(a), a.files)
	a.publish(debFiles("two"), packagesGz)
	a.advance(61 * time.Second)
	a.getRoot().wantFrom("cache", agreeing)
	a.get(a.in("InRelease")).wantStatus(404)
	a.advance(61 * time.Second)
	a.getRoot().wantFrom("cache", agreeing)
	a.get(a.in("InRelease")).wantStatus(404)
}

// Who purges a root wants what the upstream has.
func TestPurgedRootIsNotHeld(t *testing.T) {
	archives(t, func(t *testing.T, a *testArchive, one, two map[string]string) {
		a.publish(two, slices.Collect(maps.Keys(two))...)
		a.advance(61 * time.Second)
		a.getRoot().wantFrom("cache", agreeing)
		if err := a.cache.purgeFile(t.Context(), "r", a.key(strings.TrimPrefix(a.root, "/"))); err != nil {
			t.Fatal(err)
		}
		a.getRoot().wantMiss().wantBody(a.release(a))
		if n := a.held(); n != 0 {
			t.Errorf("%v generations are held, want none", n)
		}
	})
}

// Some archives have stronger hashes too, and apt asks by the strongest.
func TestMetadataBySHA512(t *testing.T) {
	t.Parallel()
	hashed := func(text string) string {
		return "main/binary-amd64/by-hash/SHA512/" + fmt.Sprintf("%x", sha512.Sum512([]byte(text)))
	}
	a := debArchive(t, "Acquire-By-Hash: yes\n")
	a.release = func(a *testArchive) string {
		text := releaseOf("Acquire-By-Hash: yes\n")(a) + "SHA512:\n"
		for _, name := range slices.Sorted(maps.Keys(a.files)) {
			text += fmt.Sprintf(" %x %d %s\n", sha512.Sum512([]byte(a.files[name])), len(a.files[name]), name)
		}
		return text
	}
	a.publish(debFiles("one"))
	old := a.release(a)
	a.getRoot().wantMiss()
	a.get(a.in(hashed("packages one"))).wantStatus(200).wantBody("packages one") // which upstream has by name
	a.publish(debFiles("two"), packagesGz)
	a.advance(61 * time.Second)
	a.getRoot().wantFrom("cache", agreeing).wantBody(old)
	a.arrive(packagesGz)
	a.advance(61 * time.Second)
	a.getRoot().wantBody(a.release(a))
	a.get(a.in(hashed("packages two"))).wantHit().wantBody("packages two")
	a.awaitAhead()
	three := debFiles("three")
	three[packagesGz] = "packages two"
	a.publish(three)
	a.advance(4 * 24 * time.Hour)
	a.getRoot().wantBody(a.release(a))
	a.awaitAhead()
	a.wantStored("dists/t/"+hashed("packages two"), true)
	a.wantStored("dists/t/"+hashed("packages one"), false)
}

func TestPurgingMetadata(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	a.setup.env = map[string]string{"API_TOKEN": "t"}
	a.publish(debFiles("one"))
	a.wantGeneration(a.release(a), a.files)
	a.restart()
	old := a.release(a)
	a.wantGeneration(old, a.files)
	a.publish(debFiles("two"))
	a.advance(61 * time.Second)
	a.getRoot().wantBody(a.release(a))
	a.awaitAhead()
	listed := a.get("/artifacts/r?prefix=dists/t/" + packagesGz).text
	if n := strings.Count(listed, `"path": "dists/t/`+packagesGz+`"`); n != 2 || strings.Contains(listed, "#") {
		t.Errorf("%d generations are listed by their path, want 2: %s", n, listed)
	}
	a.delete("/artifacts/r/dists/t/"+packagesGz, "Authorization: Bearer t").wantStatus(204)
	a.get(a.in(packagesGz)).wantMiss().wantBody("packages two")
	if listed = a.get("/artifacts/r?prefix=dists/t/" + packagesGz).text; strings.Count(listed, `"path"`) != 1 {
		t.Errorf("a generation outlives its purge: %s", listed)
	}
	// Without a stored root everything is as upstream has it.
	a.publish(debFiles("three"))
	a.delete("/artifacts/r/dists/t/InRelease", "Authorization: Bearer t").wantStatus(204)
	a.get(a.in(packagesGz)).wantMiss().wantBody("packages three")
	a.wantGeneration(a.release(a), a.files)
}

func TestMetadataWhileUpstreamIsDown(t *testing.T) {
	archives(t, func(t *testing.T, a *testArchive, one, two map[string]string) {
		old := a.release(a)
		a.down()
		a.advance(2 * time.Hour)
		a.wantGeneration(old, one)
		a.upAgain()
		a.publish(two, slices.Collect(maps.Keys(two))...) // nothing but the root arrived
		a.advance(2 * time.Hour)
		a.getRoot().wantFrom("cache", agreeing)
		a.down()
		a.advance(2 * time.Hour)
		a.wantGeneration(old, one)
		a.restart()
		a.wantGeneration(old, one)
	})
}

func TestManyClientsDuringAFlip(t *testing.T) {
	archives(t, func(t *testing.T, a *testArchive, one, two map[string]string) {
		old := a.release(a)
		a.publish(two)
		next := a.release(a)
		a.advance(61 * time.Second)
		var clients sync.WaitGroup
		for range 20 {
			clients.Go(func() {
				for range 3 {
					switch root := a.getRoot(); root.text {
					case next:
						for name, text := range two {
							a.get(a.in(name)).wantStatus(200).wantBody(text)
						}
					case old:
					default:
						a.Errorf("%s: status %d, neither the old root nor the new one", root.what, root.status)
					}
				}
			})
		}
		clients.Wait()
	})
}

func TestReplicasFlipTogether(t *testing.T) {
	t.Parallel()
	for name, hot := range map[string]int64{"one store": -1, "S3": 0, "S3 with hot copies": hotTestLimit} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, 2, "package: deb", "cache: {mutable_ttl: 60}")
			if hot >= 0 {
				s3 := newFakeS3(t)
				for _, tt := range f.all {
					tt.cache.useObjects(newHotBenchAt(t, s3, hot).tier)
				}
			}
			a := &testArchive{tester: f.tester, root: "/dists/t/InRelease", folder: "/dists/t/", release: releaseOf("")}
			b := *a
			b.tester = f.all[1]
			a.publish(debFiles("one"))
			a.wantGeneration(a.release(a), a.files)
			b.wantGeneration(a.release(a), a.files)
			a.publish(debFiles("two"), packagesGz)
			for _, tt := range f.all {
				tt.advance(61 * time.Second)
			}
			b.getRoot().wantFrom("cache", agreeing)
			a.getRoot().wantFrom("cache", agreeing)
			a.arrive(packagesGz)
			for _, tt := range f.all {
				tt.advance(61 * time.Second)
			}
			b.getRoot().wantBody(a.release(a))
			a.wantGeneration(a.release(a), a.files)
			b.wantGeneration(a.release(a), a.files)
			b.awaitAhead()
		})
	}
}

// A root that its replica could not store rules nowhere.
func TestRootThatAnotherReplicaCannotStore(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, "package: deb", "cache: {mutable_ttl: 60}")
	a := &testArchive{tester: f.tester, root: "/dists/t/InRelease", folder: "/dists/t/", release: releaseOf("")}
	a.publish(debFiles("one"))
	old := a.release(a)
	a.wantGeneration(old, a.files)
	a.publish(debFiles("two"))
	full := &fullForRoots{a.cache.objects, make(chan struct{})}
	replies := make(chan *got, 2)
	for i, tt := range f.all {
		tt.cache.useObjects(full)
		tt.advance(61 * time.Second)
		go func() { replies <- tt.get(a.in(a.root)) }()
		a.eventually("the clients", func() bool { return a.waiting("dists/t/InRelease") == i+1 })
	}
	close(full.gate)
	for range f.all {
		(<-replies).wantFrom("cache", agreeing).wantBody(old)
	}
}

// fullForRoots stores no root: when it is let, it finds out that it is full.
type fullForRoots struct {
	objects
	gate chan struct{}
}

func (o *fullForRoots) put(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error {
	if strings.HasSuffix(rec.Path, "InRelease") {
		<-o.gate
		return errNoSpace
	}
	return o.objects.put(ctx, key, rec, spool, when)
}

func TestNestedRelease(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	files := debFiles("one")
	files["main/binary-amd64/Release"] = "Archive: t\n"
	a.publish(files)
	a.wantGeneration(a.release(a), files)
	a.advance(61 * time.Second)
	a.origin.remove("/dists/t/main/binary-amd64/Release")
	a.get(a.in("main/binary-amd64/Release")).wantHit()
}

func TestFlatRepository(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	a.root, a.folder = "/flat/Release", "/flat/"
	a.publish(map[string]string{"Packages.gz": "packages one"})
	a.wantGeneration(a.release(a), a.files)
	old := a.release(a)
	a.publish(map[string]string{"Packages.gz": "packages two"}, "Packages.gz")
	a.advance(61 * time.Second)
	a.getRoot().wantFrom("cache", agreeing)
	a.wantGeneration(old, map[string]string{"Packages.gz": "packages one"})
}

func TestHoldSurvivesAnOutage(t *testing.T) {
	t.Parallel()
	a := rpmArchive(t)
	a.publish(rpmFiles("one"))
	a.wantGeneration(a.release(a), a.files)
	a.publish(rpmFiles("two"), "repodata/primary.xml.gz")
	a.advance(61 * time.Second)
	a.getRoot().wantFrom("cache", agreeing)
	a.down()
	a.advance(61 * time.Second)
	a.getRoot().wantStale()
	a.getRoot().wantHit() // as after any outage
	a.upAgain()
	if n := a.held(); n != 1 {
		t.Errorf("%v roots are held, want 1", n)
	}
	a.publish(rpmFiles("one")) // upstream takes it back
	a.advance(61 * time.Second)
	a.getRoot().wantStatus(200).wantBody(a.release(a))
	if n := a.held(); n != 0 {
		t.Errorf("%v roots are held, want none", n)
	}
}

func TestRootThatCannotBeStoredIsNotPublished(t *testing.T) {
	t.Parallel()
	a := rpmArchive(t)
	a.publish(rpmFiles("one"))
	old := a.release(a)
	a.wantGeneration(old, a.files)
	a.publish(rpmFiles("two"))
	a.advance(61 * time.Second)
	a.cache.space.diskSpace = func() (diskUsage, error) { return diskUsage{size: room{bytes: 1 << 40}}, nil }
	a.getRoot().wantFrom("cache", agreeing)
	a.wantGeneration(old, rpmFiles("one"))
}

// refusingObjects stores nothing under a key.
type refusingObjects struct {
	objects
	key string
}

func (o *refusingObjects) put(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) error {
	if key == o.key {
		return errStoreDown
	}
	return o.objects.put(ctx, key, rec, spool, when)
}

func TestRootThatTheStoreRefusesIsNotPublished(t *testing.T) {
	t.Parallel()
	a := rpmArchive(t)
	a.publish(rpmFiles("one"))
	old := a.release(a)
	a.wantGeneration(old, a.files)
	a.publish(rpmFiles("two"))
	a.advance(61 * time.Second)
	a.cache.useObjects(&refusingObjects{a.cache.objects, a.key("os/repodata/repomd.xml")})
	a.getRoot().wantFrom("cache", agreeing)
	a.wantGeneration(old, rpmFiles("one"))
}

// unreadableObjects cannot open a key, though the store is not known to be down.
type unreadableObjects struct {
	objects
	key string
}

func (o *unreadableObjects) open(ctx context.Context, key string, off int64) (*object, error) {
	if key == o.key {
		return nil, errStoreDown
	}
	return o.objects.open(ctx, key, off)
}

// What cannot be read may be there, and a new root waits for it as for what is.
func TestRootWaitsForAStoreThatCannotBeRead(t *testing.T) {
	t.Parallel()
	unreadable := func(a *testArchive, path string) {
		a.cache.useObjects(&unreadableObjects{a.cache.objects, a.key(path)})
	}
	t.Run("the other root", func(t *testing.T) {
		t.Parallel()
		a := debArchive(t, "")
		a.publish(debFiles("one"))
		a.publishRoot(a.folder + "Release")
		a.get(a.in(a.folder + "Release")).wantMiss()
		old := a.release(a)
		a.getRoot().wantMiss()
		a.publish(debFiles("two")) // Release is still the old one
		a.advance(61 * time.Second)
		unreadable(a, "dists/t/Release")
		a.getRoot().wantFrom("cache", agreeing).wantBody(old)
	})
	t.Run("a file", func(t *testing.T) {
		t.Parallel()
		a := rpmArchive(t)
		one, two := rpmHashed("one"), rpmHashed("two")
		primaryOf := func(files map[string]string) string {
			names := slices.Sorted(maps.Keys(files))
			return names[slices.IndexFunc(names, func(name string) bool { return strings.HasSuffix(name, "-primary.xml.gz") })]
		}
		a.publish(one)
		a.wantGeneration(a.release(a), one)
		old := a.release(a)
		a.publish(two, primaryOf(two))
		a.advance(61 * time.Second)
		unreadable(a, "os/"+primaryOf(one))
		a.getRoot().wantFrom("cache", agreeing).wantBody(old)
	})
	t.Run("the root itself", func(t *testing.T) {
		t.Parallel()
		a := rpmArchive(t)
		a.publish(rpmFiles("one"))
		unreadable(a, "os/repodata/repomd.xml")
		a.getRoot().wantUnstored().wantStatus(200).wantBody(a.release(a))
	})
}

func TestEvictionKnowsTheFilesOfAGeneration(t *testing.T) {
	archives(t, func(t *testing.T, a *testArchive, one, two map[string]string) {
		named, err := a.cache.evictor.findNamed(t.Context())
		must(t, err)
		page, err := a.cache.index.listPage(t.Context(), pageQuery{remote: "r", limit: 100})
		if err != nil || len(page.rows) != 1+len(one) {
			t.Fatalf("%d rows, %v", len(page.rows), err)
		}
		for _, row := range page.rows {
			if named["r"][keyHash(row.Key)] == (row.Path == strings.TrimPrefix(a.root, "/")) {
				t.Errorf("%s is stored, and not among what the root names, or is the root", row.Path)
			}
		}
	})
}

func TestRootsAreRead(t *testing.T) {
	t.Parallel()
	sum, other := strings.Repeat("a", 64), strings.Repeat("b", 64)
	data := func(attr, algorithm, hash string) string {
		return `<repomd><data type="primary"><checksum type="` + algorithm + `">` + hash + `</checksum><location ` + attr + `/></data></repomd>`
	}
	for _, c := range []struct {
		name, path, text string
		want             string // of the files that are named
	}{
		{"a Release", "Release", "SHA256:\n " + sum + " 12 main/Packages\n", "main/Packages " + sum + " 12"},
		{"signed", "InRelease", "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\nSHA256:\n " + sum + " 1 a\n-----BEGIN PGP SIGNATURE-----\n\n " + other + " 1 b\n", "a " + sum + " 1"},
		{"itself", "Release", "SHA256:\n " + sum + " 1 Release\n " + sum + " 1 InRelease\n " + sum + " 1 Release.gpg\n " + other + " 2 x/Release\n", "x/Release " + other + " 2"},
		{"weak hashes", "Release", "MD5Sum:\n " + sum[:32] + " 1 a\nSHA1:\n " + sum[:40] + " 1 a\n", ""},
		{"two hashes", "Release", "SHA256:\n " + sum + " 1 a\nSHA512:\n " + sum + " 1 b\n", "a " + sum + " 1"},
		{"a way out", "Release", "SHA256:\n " + sum + " 1 ../a\n " + other + " 1 ./b\n", "b " + other + " 1"},
		{"a page", "Release", "<html>\nSHA256:\n</html>", ""},
		{"a repomd", "repodata/repomd.xml", data(`href="repodata/p"`, "sha256", sum), "repodata/p " + sum + " 0"},
		{"xml:base", "repodata/repomd.xml", data(`xml:base="http://x/" href="repodata/p"`, "sha256", sum), ""},
		{"SHA-1", "repodata/repomd.xml", data(`href="repodata/p"`, "sha", sum[:40]), ""},
		{"a page for a repomd", "repodata/repomd.xml", "<html><body>" + data(`href="p"`, "sha256", sum) + "</body></html>", ""},
		{"a cut repomd", "repodata/repomd.xml", data(`href="p"`, "sha256", sum)[:120], ""},
	} {
		n := parseRoot(c.path, []byte(c.text), "")
		var got []string
		for _, name := range slices.Sorted(maps.Keys(n.files)) {
			f := n.files[name]
			got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %d", name, f.sha256, f.size)))
		}
		if strings.Join(got, ", ") != c.want {
			t.Errorf("%s: names %v, want %s", c.name, got, c.want)
		}
	}
}

// FuzzRoots: whatever an upstream calls a root names files below its folder, by hashes.
func FuzzRoots(f *testing.F) {
	sum := strings.Repeat("a", 64)
	f.Add("dists/t/InRelease", "Acquire-By-Hash: yes\nValid-Until: Fri, 2 Jan 2026 03:04:05 GMT\nSHA256:\n "+sum+" 12 main/Packages\n")
	f.Add("os/repodata/repomd.xml", `<repomd><data type="primary"><checksum type="sha256">`+sum+`</checksum><location href="repodata/p"/></data></repomd>`)
	f.Fuzz(func(t *testing.T, at, text string) {
		_, spelling, err := spellPath(at, "")
		if err != nil || spelling == "" {
			return
		}
		folder := decodePath(rootFolder(spelling))
		for name, named := range parseRoot(spelling, []byte(text), sum).files {
			if !strings.HasPrefix(name, folder) || named.path != name || decodePath(named.spelling) != name || !isHex(named.sha256, 64) {
				t.Errorf("%q names %+v", spelling, named)
			}
		}
	})
}

// Who purges a file by its name does not want to get its bytes by their hash.
func TestPurgingByNamePurgesByHash(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "Acquire-By-Hash: yes\n")
	a.publish(debFiles("one"))
	a.getRoot().wantStatus(200)
	byHash := "main/binary-amd64/by-hash/SHA256/" + sha256Hex([]byte(a.files[packagesGz]))
	a.origin.file(a.folder+byHash, a.files[packagesGz])
	a.get(a.in(byHash)).wantMiss()
	a.get(a.in(packagesGz)).wantHit()
	name := a.folder[1:] + packagesGz
	n, err := a.cache.purgePath(t.Context(), target{remote: a.server.config.Load().remotes["r"], path: name, spelling: name, wire: name})
	if n != 1 || err != nil {
		t.Errorf("%d files were purged, %v", n, err)
	}
	a.get(a.in(packagesGz)).wantMiss()
}

func TestValidUntilIsRead(t *testing.T) {
	t.Parallel()
	want := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, date := range []string{"Fri, 02 Jan 2026 03:04:05 UTC", "Fri, 2 Jan 2026 03:04:05 GMT", "Fri, 02 Jan 2026 05:04:05 +0200", "Fri, 02 Jan 2026 03:04:05 Z"} {
		if n := parseRoot("Release", []byte("Valid-Until: "+date+"\n"), ""); !n.validUntil.Equal(want) {
			t.Errorf("%s: %v", date, n.validUntil)
		}
	}
}

func TestSlowPublicationKeepsNobodyWaiting(t *testing.T) {
	t.Parallel()
	for _, ttl := range []time.Duration{0, time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			a := &testArchive{tester: newBubbleTester(t, "package: rpm", fmt.Sprintf("cache: {mutable_ttl: %d}", ttl/time.Second)), root: "/os/repodata/repomd.xml", folder: "/os/", release: repomdOf}
			a.publish(rpmFiles("one"))
			a.wantGeneration(a.release(a), a.files)
			old := a.release(a)
			a.publish(rpmFiles("two"))
			a.origin.file("/os/repodata/primary.xml.gz", "primary two").acts(func(w http.ResponseWriter, r *http.Request) {
				time.Sleep(25 * time.Second)
				_, _ = w.Write([]byte("primary two"))
			})
			a.advance(61 * time.Second)
			for range 2 { // the second one comes while the new root is complete and waits for its files
				begin := time.Now()
				client := a.open(a.in(a.root))
				client.rest().wantFrom("cache", agreeing).wantBody(old)
				if took := time.Since(begin); took != maxWholeBodyWait {
					t.Errorf("with a TTL of %v a client of the root waited for %v", ttl, took)
				}
				client.leave()
			}
			a.advance(10 * time.Second)
			a.getRoot().wantBody(a.release(a)) // the try has gone on
		})
	}
}

// BenchmarkHitBesideRoots is BenchmarkHitSmall for a file elsewhere in a repository
// whose metadata agrees, and for one that its root names.
func BenchmarkHitBesideRoots(b *testing.B) {
	const elsewhere = "pool/main/a/app_1.2.3-4_amd64.deb"
	for _, c := range []struct{ name, keys, root, file string }{
		{"generic", "package: generic", "dists/t/InRelease", elsewhere},
		{"deb", "package: deb", "dists/t/InRelease", elsewhere},
		{"rpm", "package: rpm", "repodata/repomd.xml", elsewhere},
		{"deb, named", "package: deb", "dists/t/InRelease", "dists/t/" + packagesGz},
	} {
		b.Run(c.name, func(b *testing.B) {
			tt := newBenchTester(b, c.keys)
			text := noise(1, 1<<10)
			a := &testArchive{tester: tt, files: map[string]string{packagesGz: text}}
			root := releaseOf("")(a)
			if strings.HasSuffix(c.root, "xml") {
				root = repomdOf(a)
			}
			tt.origin.file("/"+c.root, root)
			tt.origin.file("/"+c.file, text)
			tt.get("/api/r/" + c.root).wantMiss()
			tt.get("/api/r/" + c.file).wantMiss()
			r := httptest.NewRequest("GET", "/api/r/"+c.file, nil)
			w := &nowhere{header: http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				clear(w.header)
				tt.api.ServeHTTP(w, r)
			}
			if w.status != 200 {
				b.Fatalf("status %d", w.status)
			}
		})
	}
}

// A file that upstream has by name alone is resumed by name.
func TestMetadataByNameIsResumed(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "Acquire-By-Hash: yes\n")
	text := noise(1, 300_000)
	a.publish(map[string]string{packagesGz: text})
	a.origin.file(a.folder+packagesGz, text).cut(150_000)
	a.getRoot().wantMiss()
	a.get(a.in(packagesGz)).wantStatus(200).wantBody(text)
}

// A file that a root names has a key of its own.
func TestEvictionSparesMetadataThatIsRead(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		a := &testArchive{tester: newBubbleTester(t, "package: deb", "cache: {mutable_ttl: 60}"), root: "/dists/t/InRelease", folder: "/dists/t/", release: releaseOf("")}
		text := noise(1, 1_000_000)
		a.publish(map[string]string{packagesGz: text})
		a.wantGeneration(a.release(a), a.files)
		a.getFile("last")
		reader := a.open(a.in(packagesGz))
		reader.read(1)
		a.advance(time.Second)
		a.get("/api/r/last").wantHit()
		a.cache.evictor.limit = 1000
		a.cache.evictor.evictFiles(t.Context())
		a.wantListed("r", "dists/t/"+packagesGz, "last")
		if rest := reader.rest(); rest.text != text {
			t.Errorf("the reader got %d bytes, %v", len(rest.text), rest.err)
		}
	})
}

func TestRootThatMayNotBeStoredIsNotPublished(t *testing.T) {
	t.Parallel()
	a := debArchive(t, "")
	a.publish(debFiles("one"))
	a.publishRoot("/dists/t/Release")
	old := a.release(a)
	a.wantGeneration(old, a.files)
	a.get(a.in("Release")).wantMiss()
	a.publish(debFiles("two"))
	a.publishRoot("/dists/t/Release")
	a.origin.file(a.root, a.release(a)).closeDelimited()
	a.advance(61 * time.Second)
	a.getRoot().wantFrom("cache", agreeing)
	a.wantGeneration(old, debFiles("one"))
	a.get(a.in("Release")).wantBody(old)
}
