package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// linkConfig has remotes that documents link to.
const linkConfig = `remotes:
  npm: {base_url: "https://registry.example.org", package: npm}
  pypi: {base_url: "https://pypi.example.org", package: pypi}
  files: {base_url: "https://files.example.org/", mirrors: ["https://mirror.example.org/pub"]}
  deep: {base_url: "https://files.example.org/deep/er"}
  own: {type: local}
  hub: {base_url: "https://hub.example.org", package: docker}
  mirrored: {base_url: "https://mirrored.example.org", mirrors: ["https://files.example.org/pub"]}
`

// rewriteText rewrites the links of a document whose way to /api/ is that.
func rewriteText(t testing.TB, text, way string, wrap func(io.Reader) io.Reader) (string, map[string]int) {
	t.Helper()
	cfg := mustParse(t, linkConfig)
	r := newLinkRewriter(wrap(strings.NewReader(text)), &documentLinks{newLinkTable(cfg), way, nil})
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(out), r.leaving
}

func whole(r io.Reader) io.Reader { return r }

func TestLinksAreLedHere(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ what, in, want string }{
		{"JSON", `{"tarball":"https://files.example.org/a/b.tgz"}`, `{"tarball":"../files/a/b.tgz"}`},
		{"JSON with blanks", `{"tarball" : "https://files.example.org/a?b=c#d"}`, `{"tarball" : "../files/a?b=c#d"}`},
		{"JSON with escaped slashes", `{"u":"https:\/\/files.example.org\/a\/b"}`, `{"u":"../files/a\/b"}`},
		{"a list", `["https://files.example.org/a", "https://files.example.org/b"]`, `["../files/a", "../files/b"]`},
		{"HTML", `<a href="https://files.example.org/a#sha256=0">a</a>`, `<a href="../files/a#sha256=0">a</a>`},
		{"HTML in single quotes", `<a href='https://files.example.org/a'>`, `<a href='../files/a'>`},
		{"HTML without quotes", `<a href=https://files.example.org/a>`, `<a href=../files/a>`},
		{"YAML", "urls:\n  - https://files.example.org/a\nhome: https://files.example.org/b\n", "urls:\n  - ../files/a\nhome: ../files/b\n"},
		{"YAML in quotes", "urls:\n  - \"https://files.example.org/a\"\n  - 'https://files.example.org/b'\n", "urls:\n  - \"../files/a\"\n  - '../files/b'\n"},
		{"YAML in lists and keys", "\n- - https://files.example.org/a\n-  x.y/z_1-:  https://files.example.org/b\n", "\n- - ../files/a\n-  x.y/z_1-:  ../files/b\n"},
		{"YAML lists in brackets", "urls: [https://files.example.org/a, https://files.example.org/b]\n- [ 'https://files.example.org/a', 'https://files.example.org/b' ]\n", "urls: [../files/a, ../files/b]\n- [ '../files/a', '../files/b' ]\n"},
		{"the longest base", `["https://files.example.org/deep/er/a","https://files.example.org/deep/erx"]`, `["../deep/a","../files/deep/erx"]`},
		{"the base alone", `["https://files.example.org", "https://files.example.org/"]`, `["../files/", "../files/"]`},
		{"a host in capitals", `["HTTPS://files.example.org/a","https://FILES.example.org/a"]`, `["HTTPS://files.example.org/a","../files/a"]`},
		{"a template", `{"dl":"https://files.example.org/{crate}/{version}"}`, `{"dl":"../files/{crate}/{version}"}`},

		{"a mirror", `["https://mirror.example.org/pub/a","https://mirror.example.org/public"]`, ""},

		{"another port", `["https://files.example.org:8443/a"]`, ""},
		{"another scheme", `["http://files.example.org/a"]`, ""},
		{"YAML from the first line on", "url: https://files.example.org/a\n", "url: ../files/a\n"},
		{"keys of YAML in quotes", "x:\n\"a\": https://files.example.org/a\n'artifacthub.io/b': https://files.example.org/b\n", "x:\n\"a\": ../files/a\n'artifacthub.io/b': ../files/b\n"},
		{"a mirror's folder", `["https://files.example.org/pub/a"]`, `["../files/pub/a"]`},
		{"a longer host", `["https://files.example.org.evil/a","https://xfiles.example.org/a"]`, ""},
		{"user info", `["https://files.example.org@evil/a"]`, ""},
		{"a URL in a text", `{"readme":"see https://files.example.org/a or \"https://files.example.org/b\" 'https://files.example.org/c'"}`, ""},
		{"a URL in a text of YAML", "a: see https://files.example.org/a\n see https://files.example.org/a\n : https://files.example.org/a\n - a:https://files.example.org/a\n--- https://files.example.org/a\na:b: https://files.example.org/a\n", ""},
		{"brackets in a text of YAML", "a: see [https://files.example.org/a, https://files.example.org/b]\na: [b](https://files.example.org/a), https://files.example.org/a\n", ""},
		{"a URL in a URL", `["https://other.example/?u=https://files.example.org/a"]`, ""},
		{"git's URL", `["git+https://files.example.org/a"]`, ""},
		{"a registry", `["https://hub.example.org/v2/a"]`, ""},
		{"at the begin", `https://files.example.org/a`, ""},
		{"no URL", `["http","https:","https:/files.example.org","http://"]`, ""},
	} {
		want := c.want
		if want == "" {
			want = c.in
		}
		for name, wrap := range map[string]func(io.Reader) io.Reader{"whole": whole, "a byte at a time": iotest.OneByteReader, "with EOF": iotest.DataErrReader} {
			if got, _ := rewriteText(t, c.in, "../", wrap); got != want {
				t.Errorf("%s, %s: %s became %s, want %s", c.what, name, c.in, got, want)
			}
		}
	}
}

func TestTablesThatLeadElsewhereHaveOtherNames(t *testing.T) {
	t.Parallel()
	id := func(remotes string) string { return newLinkTable(mustParse(t, "remotes:\n"+remotes)).id }
	const a, b = "  a: {base_url: \"https://x.example\", immutable_patterns: [%s]}\n", "  b: {base_url: \"https://x.example\"}\n"
	one := id(fmt.Sprintf(a, "one"))
	if id(fmt.Sprintf(a, "two")) != one {
		t.Error("patterns of one remote count")
	}
	seen := map[string]bool{one: true}
	for _, remotes := range []string{fmt.Sprintf(a, "one") + b, fmt.Sprintf(a, "two") + b, b, strings.ReplaceAll(b, "x.ex", "y.ex")} {
		if n := id(remotes); n == "" || seen[n] {
			t.Errorf("%s: has the name of another", remotes)
		} else {
			seen[n] = true
		}
	}
}

func TestLeavingLinksAreCounted(t *testing.T) {
	t.Parallel()
	_, leaving := rewriteText(t, `["https://a.example/1","https://a.example/2","https://b.example:80","https://files.example.org/x","x https://c.example","https://hub.example.org/v2/a"]`, "../", whole)
	if len(leaving) != 3 || leaving["a.example"] != 2 || leaving["b.example:80"] != 1 || leaving["hub.example.org"] != 1 {
		t.Errorf("counted %v", leaving)
	}
}

// What is no link to a remote is the same, byte for byte, and how the document arrives
// makes no difference.
func FuzzLinks(f *testing.F) {
	for _, s := range []string{`{"a":"https://files.example.org/b"}`, "- https://files.example.org\n", `"https:\/\/files.example.org\/\/a`, strings.Repeat(" ", 300) + `="https://pypi.example.org`, `<a href=https://other/>`, `"https://files.example.org` + strings.Repeat("/", 2000)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, _ := rewriteText(t, text, "\x00", whole)
		if slow, _ := rewriteText(t, text, "\x00", iotest.OneByteReader); slow != got {
			t.Errorf("%q became %q at once and %q byte by byte", text, got, slow)
		}
		if strings.Contains(text, "\x00") {
			return
		}
		// Between the ways that were put in, all is as it was, in order.
		rest := text
		for i, part := range strings.Split(got, "\x00") {
			if i > 0 {
				_, part, _ = strings.Cut(part, "/") // the remote's name
			}
			at := strings.Index(rest, part)
			if at < 0 || (i == 0 && at > 0) {
				t.Fatalf("%q became %q", text, got)
			}
			rest = rest[at+len(part):]
		}
	})
}

// documentOf repeats an entry of a document until it has about that size.
func documentOf(size int, begin, entry, end string) []byte {
	return []byte(begin + strings.Repeat(entry, size/len(entry)) + end)
}

// BenchmarkRewriteLinks has more links than real documents have, where each is looked at.
func BenchmarkRewriteLinks(b *testing.B) {
	cfg := mustParse(b, linkConfig)
	links := &documentLinks{newLinkTable(cfg), "https://artifacts.example/api/", cfg.remotes["npm"]}
	buf := make([]byte, 256<<10)
	for name, text := range map[string][]byte{
		"npm":  documentOf(50<<20, `{"name":"x","versions":{`, `"1.0.0":{"name":"x","description":"some text that is here and there","dist":{"integrity":"sha512-0123456789abcdef","tarball":"https://registry.example.org/x/-/x-1.0.0.tgz"},"repository":{"url":"git+https://other.example/x"}},`, `"z":{}}}`),
		"helm": documentOf(50<<20, "entries:\n  x:\n", "  - apiVersion: v2\n    description: some text that is at http://here.example and there\n    home: https://other.example/\n    urls:\n    - https://files.example.org/x-1.0.0.tgz\n    version: 1.0.0\n", ""),
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(text)))
			b.ReportAllocs()
			for b.Loop() {
				r := newLinkRewriter(bytes.NewReader(text), links)
				for {
					if _, err := r.Read(buf); err != nil {
						break
					}
				}
			}
		})
	}
}

// --- through the cache ---

// The documents of a package manager lead its client here: what is stored is what is
// sent, and it is refreshed by upstream's own validators.
func TestDocumentsLeadHere(t *testing.T) {
	t.Parallel()
	yaml := `remotes:
  r: {base_url: "ORIGIN", package: pypi, cache: {mutable_ttl: 60}}
  files: {base_url: "ORIGIN/files"}
`
	tt := setup{yaml: yaml}.start(t)
	tt.origin.file("/simple/x/", `<a href="`+tt.origin.url+`/files/x-1.whl#sha256=0">x</a>`).etag(`"1"`)
	const want = `<a href="../../../files/x-1.whl#sha256=0">x</a>`
	tt.get("/api/r/simple/x/").wantMiss().wantBody(want)
	tt.get("/api/r/simple/x/").wantHit().wantBody(want).wantHeader("Content-Length", "47")
	tt.origin.file("/simple/y/", `<a href="https://elsewhere.example/y.whl">y</a>`)
	tt.get("/api/r/simple/y/").wantMiss()
	if g := tt.get("/?remote=r", browser); !strings.Contains(g.text, "1 links to <code>elsewhere.example</code>") {
		t.Error("the page does not name the host that links lead to")
	}
	tt.get("/api/r/simple/x/", "Range: bytes=3-8").wantStatus(206).wantBody(want[3:9])
	tt.advance(2 * time.Minute)
	tt.get("/api/r/simple/x/").wantRevalidated().wantBody(want) // the package asks with validators
	// Another table means other links, though upstream has the same document.
	tt.configure(strings.ReplaceAll(strings.ReplaceAll(yaml, "files:", "archive:"), "ORIGIN", tt.origin.url))
	other := strings.Replace(want, "files", "archive", 1)
	tt.get("/api/r/simple/x/").wantRefetched().wantBody(other)
	tt.get("/api/r/simple/x/").wantHit().wantBody(other)
	tt.down()
	tt.configure(strings.ReplaceAll(yaml, "ORIGIN", tt.origin.url))
	tt.get("/api/r/simple/x/").wantStale().wantBody(other)
	tt.get("/api/archive/x-1.whl").wantDetail(404, "archive") // where it leads is no remote any more
}

// A document that nobody can fetch anew answers as it is, whatever its links lead by.
func TestSealedDocumentsOutliveTheirTable(t *testing.T) {
	t.Parallel()
	yaml := "remotes:\n  r: {base_url: \"ORIGIN\", package: pypi}\n"
	tt := setup{yaml: yaml}.start(t)
	tt.origin.file("/simple/x/", `<a href="`+tt.origin.url+`/x.whl">x</a>`)
	const want = `<a href="../../../r/x.whl">x</a>`
	tt.get("/api/r/simple/x/").wantMiss().wantBody(want)
	tt.configure(strings.ReplaceAll(strings.Replace(yaml, "pypi", "pypi, sealed: true", 1)+"  other: {base_url: \"https://other.example\"}\n", "ORIGIN", tt.origin.url))
	tt.get("/api/r/simple/x/").wantBody(want).wantHeader("Cache-Status", "artifactapi; hit; detail=sealed")
	tt.configure("remotes:\n  r: {type: local}\n")
	tt.get("/api/r/simple/x/").wantHit().wantBody(want)
}

// Of remotes with one base_url a document's own is the one that its client may use.
func TestDocumentsLeadToTheirOwnRemote(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: `remotes:
  a: {base_url: "ORIGIN", immutable_patterns: ["^only"]}
  r: {base_url: "ORIGIN", package: pypi}
  z: {base_url: "ORIGIN/z"}
`}.start(t)
	tt.origin.file("/simple/x/", `<a href="`+tt.origin.url+`/x.whl">x</a><a href="`+tt.origin.url+`/z/y.whl">y</a>`)
	tt.get("/api/r/simple/x/").wantMiss().wantBody(`<a href="../../../r/x.whl">x</a><a href="../../../z/y.whl">y</a>`)
}

// What is signed or hashed stays as it is, whatever rewrite says.
func TestSignedDocumentsStay(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "package: deb", `rewrite: ["."]`)
	packages := "Package: a\nHomepage: " + tt.origin.url + "/a\n"
	root := fmt.Sprintf("Origin: a\nURL: %s/x\nSHA256:\n %s %d Packages\n", tt.origin.url, strings.TrimPrefix(sha256Of([]byte(packages)), "sha256:"), len(packages))
	for path, text := range map[string]string{"InRelease": root, "Packages": packages} {
		tt.origin.file("/dists/a/"+path, text)
	}
	tt.get("/api/r/dists/a/InRelease").wantMiss().wantBody(root)
	tt.get("/api/r/dists/a/Packages").wantMiss().wantBody(packages)
	tt.get("/api/r/dists/a/InRelease").wantHit().wantBody(root)
}

// A document that breaks off goes on where upstream's broke off, not where ours did.
func TestDocumentThatBreaksOffIsResumed(t *testing.T) {
	t.Parallel()
	tt := setup{yaml: "remotes:\n  r: {base_url: \"ORIGIN\", rewrite: [json]}\n"}.start(t)
	text := strings.Repeat(`{"a":"`+tt.origin.url+`/x"},`, 5000)
	tt.origin.file("/a.json", text).etag(`"1"`).cut(100_000)
	tt.get("/api/r/a.json").wantMiss().wantBody(strings.ReplaceAll(text, tt.origin.url, "../r"))
	tt.get("/api/r/a.json").wantHit()
}

// What cannot be rewritten stays as it is: a coded document, and npm's while nobody
// knows our address.
func TestDocumentsThatStay(t *testing.T) {
	t.Parallel()
	tt := newTester(t, "package: npm")
	text := `{"tarball":"` + tt.origin.url + `/a/-/a-1.tgz"}`
	tt.origin.file("/a", text)
	tt.get("/api/r/a").wantMiss().wantBody(text)
	if w := tt.server.config.Load().warnings; len(w) != 1 || !strings.Contains(w[0], "PUBLIC_URL") {
		t.Errorf("warnings %q", w)
	}
	cfg, err := parseConfig("remotes.yaml", []byte(remoteYAML(tt.origin.url, "package: npm")), envOf(map[string]string{"PUBLIC_URL": "https://artifacts.example/"}))
	if err != nil || len(cfg.warnings) > 0 {
		t.Fatal(err, cfg.warnings)
	}
	tt.server.config.Store(cfg)
	tt.get("/api/r/a").wantBody(`{"tarball":"https://artifacts.example/api/r/a/-/a-1.tgz"}`)
	tt.origin.file("/b", text).acts(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "br")
		io.WriteString(w, text)
	})
	tt.get("/api/r/b").wantBody(text)
	tt.get("/api/r/b").wantHit().wantBody(text)
	tt.origin.file("/a/-/a-1.tgz", text)
	tt.get("/api/r/a/-/a-1.tgz").wantMiss().wantBody(text) // no document
	tt.origin.file("/c", text)
	if g := tt.head("/api/r/c").wantStatus(200); g.length >= 0 {
		t.Errorf("HEAD gives the length %d of another body", g.length)
	}
}

// What is known to lead to another host is told before clients go there.
func TestKnownLinksThatLeaveAreTold(t *testing.T) {
	t.Parallel()
	const remotes = `remotes:
  pypi: {base_url: "https://pypi.org", package: pypi}
  crates: {base_url: "https://index.crates.io", package: cargo}
  tf: {base_url: "https://registry.terraform.io", package: terraform}
  tofu: {base_url: "https://registry.opentofu.org", package: terraform}
`
	hosts := []string{"https://files.pythonhosted.org", "https://static.crates.io", "https://releases.hashicorp.com", "https://github.com"}
	all, others := mustParse(t, remotes), remotes
	for i, host := range hosts {
		if !strings.Contains(strings.Join(all.warnings, "\n"), "at "+host+", which clients will fetch past the cache: add a remote with that base_url") {
			t.Errorf("nobody is told of %s: %q", host, all.warnings)
		}
		others += fmt.Sprintf("  x%d: {base_url: %q, mutable_patterns: [latest]}\n", i, host+"/")
	}
	for _, w := range mustParse(t, others).warnings {
		if strings.Contains(w, "which clients") {
			t.Errorf("with a remote for each: %s", w)
		}
	}
}

// What each package takes for mutable is what its clients need.
func TestPackagesKnowWhatChanges(t *testing.T) {
	t.Parallel()
	for name, paths := range map[string][2]string{ // mutable and immutable, by blanks
		"rpm": {"9/os/repodata/repomd.xml 9/os/repodata/repomd.xml.asc 9/os/repodata/repomd.xml.key 9/os/.treeinfo media.1/media content " +
			"RPM-GPG-KEY-AlmaLinux-9 mirrorlist/9/baseos/mirrorlist 9/os/repodata/comps.yml.gz 9/os/repodata/productid.gz 9/os/productid 9/os/appdata.yml.gz repodata/filelists.xml.zst repodata/other.sqlite.bz2",
			"9/os/Packages/a-1.x86_64.rpm 9/os/images/boot.iso"},
		"alpine": {"v3.22/main/x86_64/APKINDEX.tar.gz edge/main/x86_64/packages.adb", "v3.22/main/x86_64/a-1.apk"},
		"deb": {"dists/trixie/InRelease dists/trixie/Release dists/trixie/Release.gpg dists/t/main/binary-amd64/Packages.xz dists/t/main/source/Sources.gz " +
			"dists/t/main/Contents-amd64.gz dists/t/main/i18n/Translation-en.bz2 dists/t/main/dep11/Components-amd64.yml.gz dists/t/main/dep11/icons-64x64@2.tar.gz dists/t/main/dep11/CID-Index-amd64.json.gz Packages flat/Packages.gz",
			"pool/main/a/a_1+b~1_amd64.deb pool/main/a/a_1.dsc"},
		"go":        {"golang.org/x/text/@v/list golang.org/x/text/@latest x/@v/main.info x/@v/vnext.info x/@v/v.info x/@v/v1.info x/@v/v1.2.info x/@v/v1.x.info x/@v/v1.2.x.info x/@v/v2-dev.info sumdb/sum.golang.org/latest sumdb/s/tile/8/0/001.p/5", "x/@v/v1.0.0.info x/@v/v12.34.56-rc.1.info x/@v/v2.0.0+incompatible.info x/@v/v0.0.0-20240101000000-abcdef012345.info x/@v/v1.0.0.mod x/@v/v1.0.0.zip sumdb/s/tile/8/0/001"},
		"maven":     {"org/a/maven-metadata.xml org/a/maven-metadata.xml.sha1 org/a/1-SNAPSHOT/a-1.jar", "org/a/1/a-1.jar org/a/1/a-1.pom.sha1"},
		"helm":      {"index.yaml stable/index.yaml", "a-1.tgz a-1.tgz.prov myindex.yaml"},
		"pypi":      {"simple/ simple/requests/", "packages/a/b/x.whl"},
		"npm":       {"lodash @types/node -/v1/search pnpm/latest pnpm/10.1.0-rc.1 @types/node/latest", "lodash/-/lodash-1.tgz @types/node/-/node-1.tgz lodash/lodash-1.0.0.tgz download/@types/node/1.0.0/abc"},
		"cargo":     {"config.json index/se/rd/serde se/rd/serde 1/a 3/a/abc", "crates/serde/1.0.0/download serde/serde-1.0.0.crate"},
		"terraform": {"v1/providers/hashicorp/aws/versions v1/providers/hashicorp/aws/5.0.0/download/linux/amd64 registry.terraform.io/a/b/index.json registry.terraform.io/a/b/5.0.0.json registry.terraform.io/a/b/5.0.0-rc1.json", "a/5.0.0_manifest.json terraform-provider-aws_5.0.0_linux_amd64.zip terraform-provider-aws_5.0.0_SHA256SUMS"},
	} {
		r := mustParse(t, one("    package: "+name+"\n")).remotes["x"]
		if revalidates := name != "rpm" && name != "alpine"; !revalidates {
			r.checkBuiltin, r.negativeTTL = !r.checkBuiltin, r.negativeTTL+time.Minute // false and 0 for these
		}
		if !r.checkBuiltin || r.negativeTTL != time.Minute {
			t.Errorf("%s: check_builtin_updates %t, negative_ttl %v", name, r.checkBuiltin, r.negativeTTL)
		}
		for i, want := range []class{mutable, immutable} {
			for _, p := range strings.Fields(paths[i]) {
				if got, _, err := r.classifyPath(p); err != nil || (got != want && !strings.HasSuffix(p, "/")) {
					t.Errorf("%s: %s is %s, want %s (%v)", name, p, got, want, err)
				}
			}
		}
	}
}

// Whoever keeps an index forever without wanting to is told of it: when its remote is
// read, and once when it is stored, with the pattern that is missing.
func TestIndexesThatAreKeptForEverAreTold(t *testing.T) {
	t.Parallel()
	for path, pattern := range map[string]string{
		"dists/a/InRelease": "InRelease", "dists/a/main/binary-amd64/Packages.xz": "Packages", "9/repodata/repomd.xml": "repomd", "a/APKINDEX.tar.gz": "APKINDEX",
		"stable/index.yaml": "index", "org/a/maven-metadata.xml": "maven-metadata", "x.y/z/@v/list": "@v/list", "simple/requests": "^simple/", "core/os/x86_64/core.db": "db|files", "@types/node": "@[^/]+",
	} {
		tt := newTester(t)
		if w := tt.server.config.Load().warnings; len(w) != 1 || !strings.Contains(w[0], "no mutable_patterns") {
			t.Errorf("warnings %q", w)
		}
		for _, p := range []string{"a/b-1.tar.gz", "b", path, path} { // b is no JSON
			file := tt.origin.file("/"+strings.Replace(p, "@", "%40", 1), "text of "+p)
			if p == "@types/node" {
				file.says("Content-Type", "application/json")
			}
			tt.get("/api/r/" + p).wantStatus(200)
		}
		tt.settle()
		tt.wantLog("stored as immutable")
		told := tt.logs.lines("stored as immutable")
		if len(told) != 1 || !strings.Contains(told[0], pattern) || !strings.Contains(told[0], path) {
			t.Errorf("%s: told %q, want a line with %s", path, told, pattern)
		}
	}
	for _, keys := range []string{"package: npm", "mutable_patterns: ['b$']", "cache: {immutable_ttl: 5}"} {
		if w := strings.Join(newTester(t, keys).server.config.Load().warnings, ""); strings.Contains(w, "never looked at") {
			t.Errorf("%s: %s", keys, w)
		}
	}
}
