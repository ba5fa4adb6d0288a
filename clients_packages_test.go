// clients_packages_test.go: real clients that install packages (see clients_test.go),
// with the smallest repositories that they take.

package main

import (
	"archive/zip"
	"bytes"
	"cmp"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// packageVersions are the versions of the package hello that are published as "one"
// and "two".
var packageVersions = map[string]string{"one": "1.0.0", "two": "1.1.0"}

// versionNamed is which version a text names, "" for none.
func versionNamed(text string) string {
	for name, number := range packageVersions {
		if strings.Contains(text, number) {
			return name
		}
	}
	return ""
}

func packageClients() []realClient {
	return slices.Concat([]realClient{dnfClient(), goClient(), pipClient(), helmClient(), mavenClient(), cargoClient(), terraformClient(), terraformMirrorClient()}, aptClients(), npmClients())
}

// onlyFile is the one file below the home that has this suffix.
func (d *desk) onlyFile(suffix string) string {
	d.Helper()
	var found []string
	_ = filepath.WalkDir(d.home, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() && strings.HasSuffix(path, suffix) {
			found = append(found, path)
		}
		return nil
	})
	if len(found) != 1 {
		d.Fatalf("the client has left %q, want one file %s", found, suffix)
	}
	return found[0]
}

// ---- rpm

const helloSpec = `Name: hello
Version: %s
Release: 1
Summary: hello
License: MIT
BuildArch: noarch
%%description
hello
%%install
mkdir -p %%{buildroot}/usr/share/hello
echo %s >%%{buildroot}/usr/share/hello/version
%%files
/usr/share/hello/version
`

func dnfClient() realClient {
	return realClient{
		name: "dnf", needs: []string{"dnf", "createrepo_c", "rpmbuild"}, mounts: true, keys: "    package: rpm\n",
		publish: func(d *desk, version string) {
			number := packageVersions[version]
			spec := filepath.Join(d.home, "hello.spec")
			writeFile(d, spec, fmt.Sprintf(helloSpec, number, number))
			d.run("rpmbuild", "-bb", "--quiet", "--define", "_topdir "+d.home+"/rpm", "--define", "_rpmdir "+d.up.dir, spec)
			d.run("createrepo_c", "-q", d.up.dir)
		},
		fetch: func(d *desk) string {
			d.run("dnf", "-q", "-y", "--installroot="+d.home+"/root", "--releasever=1", "--repofrompath=r,"+d.url(""), "--repo=r",
				"--setopt=reposdir=/nonexistent", "--setopt=varsdir=/nonexistent", "--setopt=cachedir="+d.home+"/cache", "--setopt=logdir="+d.home,
				"--setopt=zchunk=0", "--nogpgcheck", "--noplugins", "install", "--downloadonly", "--downloaddir="+d.home+"/got", "hello")
			return versionNamed(filepath.Base(d.onlyFile(".rpm")))
		},
	}
}

// ---- deb

// aptRepository is one of the shapes that a repository of deb has.
type aptRepository struct {
	name   string
	flat   bool
	byHash string // "yes", "no": Acquire-By-Hash
	signed bool   // InRelease; else Release alone
}

func aptClients() (clients []realClient) {
	for _, repo := range []aptRepository{
		{"apt, pool, by hash, signed", false, "yes", true},
		{"apt, pool, by name", false, "no", false},
		{"apt, flat", true, "no", false},
	} {
		needs := []string{"apt-get", "dpkg-deb"}
		if repo.signed {
			needs = append(needs, "gpg")
		}
		clients = append(clients, realClient{name: repo.name, needs: needs, keys: "    package: deb\n", publish: repo.publish, fetch: repo.fetch})
	}
	return clients
}

// debName has what URLs are written in different ways for.
func debName(version string) string {
	return "hello_" + packageVersions[version] + "+dfsg~1-1_all.deb"
}

func (a aptRepository) publish(d *desk, version string) {
	tree := filepath.Join(d.home, "deb-"+version)
	control := fmt.Sprintf("Package: hello\nVersion: %s+dfsg~1-1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: hello\n", packageVersions[version])
	writeFile(d, tree+"/DEBIAN/control", control)
	writeFile(d, tree+"/usr/share/hello/version", version)
	pool := "pool/main/h/" + debName(version)
	if a.flat {
		pool = "./" + debName(version)
	}
	deb := filepath.Join(d.up.dir, pool)
	writeFile(d, deb, "")
	d.run("dpkg-deb", "--root-owner-group", "-b", tree, deb)
	text := d.read(deb)
	packages := fmt.Sprintf("%sFilename: %s\nSize: %d\nSHA256: %x\n\n", control, pool, len(text), sha256.Sum256([]byte(text)))
	a.publishIndexes(d, map[string]string{"Packages": packages, "Packages.gz": gz(packages)})
}

// publishIndexes writes the files that a Release names, and it.
func (a aptRepository) publishIndexes(d *desk, files map[string]string) {
	top, folder := "dists/stable", "main/binary-"+debArch()+"/"
	if a.flat {
		top, folder = ".", ""
	}
	release := "Origin: test\nSuite: stable\nCodename: stable\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nArchitectures: " + debArch() + "\nComponents: main\nAcquire-By-Hash: " + a.byHash + "\nSHA256:\n"
	for name, text := range files {
		sum := fmt.Sprintf("%x", sha256.Sum256([]byte(text)))
		d.write(top+"/"+folder+name, text)
		if a.byHash == "yes" {
			d.write(top+"/"+folder+"by-hash/SHA256/"+sum, text)
		}
		release += fmt.Sprintf(" %s %d %s%s\n", sum, len(text), folder, name)
	}
	if !a.signed {
		d.write(top+"/Release", release)
		return
	}
	writeFile(d, d.home+"/Release", release)
	d.gpg("--clearsign", "-o", filepath.Join(d.up.dir, top, "InRelease"), d.home+"/Release")
}

// gpg runs gpg with the upstream's key, which is made with its first use. Its public
// part is .key.gpg there.
func (d *desk) gpg(args ...string) {
	d.Helper()
	ring := filepath.Join(d.up.dir, ".gnupg")
	gpg := []string{"--homedir", ring, "--batch", "-q", "--yes"}
	if _, err := os.Stat(ring); err != nil {
		if err := os.Mkdir(ring, 0o700); err != nil {
			d.Fatal(err)
		}
		d.Cleanup(func() { _ = exec.Command("gpgconf", "--homedir", ring, "--kill", "all").Run() })
		d.run("gpg", append(gpg, "--passphrase", "", "--quick-generate-key", "test", "ed25519")...)
		d.run("gpg", append(gpg, "-o", d.up.dir+"/.key.gpg", "--export")...)
	}
	d.run("gpg", append(gpg, args...)...)
}

func (a aptRepository) fetch(d *desk) string {
	options, what := "[trusted=yes]", "stable main"
	if a.signed {
		options = "[signed-by=" + d.up.dir + "/.key.gpg]"
	}
	if a.flat {
		what = "./"
	}
	writeFile(d, d.home+"/sources.list", "deb "+options+" http://"+d.host+"/api/r "+what+"\n")
	writeFile(d, d.home+"/status", "")
	for _, dir := range []string{"lists/partial", "cache/archives/partial", "trusted"} {
		if err := os.MkdirAll(filepath.Join(d.home, dir), 0o755); err != nil {
			d.Fatal(err)
		}
	}
	apt := []string{"-qq", "-o", "Dir::State=" + d.home, "-o", "Dir::State::status=" + d.home + "/status", "-o", "Dir::Cache=" + d.home + "/cache",
		"-o", "Dir::Etc=" + d.home, "-o", "Dir::Etc::sourcelist=sources.list", "-o", "Dir::Etc::sourceparts=-", "-o", "Dir::Etc::trustedparts=trusted",
		"-o", "APT::Sandbox::User=", "-o", "Acquire::Languages=none", "-o", "Acquire::Retries=0", "-o", "APT::Architecture=" + debArch(),
		"-o", "APT::Update::Error-Mode=any", "-o", "Acquire::http::Proxy=DIRECT"}
	d.run("apt-get", append(apt, "update")...)
	d.run("apt-get", append(apt, "download", "hello")...)
	tree := shortDir(d)
	d.run("dpkg-deb", "-x", d.onlyFile(".deb"), tree)
	return d.read(tree + "/usr/share/hello/version")
}

func debArch() string {
	if runtime.GOARCH == "386" {
		return "i386"
	}
	return runtime.GOARCH
}

// ---- go

func goClient() realClient {
	return realClient{
		name: "go", needs: []string{"go"}, keys: "    package: go\n",
		publish: func(d *desk, version string) {
			v := "v" + packageVersions[version]
			list, at := "v1.0.0\n", "example.com/hello/@v/"
			if version == "two" {
				list += v + "\n"
			}
			const mod = "module example.com/hello\n\ngo 1.20\n"
			d.write(at+"list", list)
			d.write(at+v+".info", `{"Version":"`+v+`","Time":"2026-01-01T00:00:00Z"}`)
			d.write(at+v+".mod", mod)
			d.write(at+v+".zip", zipOf("example.com/hello@"+v+"/go.mod", mod, "example.com/hello@"+v+"/hello.go", "package hello // "+version+"\n"))
		},
		fetch: func(d *desk) string {
			var module struct{ Version, Dir string }
			out := d.runWith([]string{"GOPROXY=http://" + d.host + "/api/r", "GONOSUMDB=*", "GOFLAGS=-mod=mod -modcacherw", "GOTOOLCHAIN=local", "GOMODCACHE=" + d.home + "/mod", "GOTELEMETRY=off"},
				"go", "mod", "download", "-json", "example.com/hello@latest")
			if err := json.Unmarshal([]byte(out), &module); err != nil {
				d.Fatal(err)
			}
			if !strings.Contains(d.read(module.Dir+"/hello.go"), versionNamed(module.Version)) {
				return "other bytes than those of " + module.Version
			}
			return versionNamed(module.Version)
		},
	}
}

// zipOf makes a zip of names and texts.
func zipOf(pairs ...string) string {
	var out bytes.Buffer
	z := zip.NewWriter(&out)
	for i := 0; i < len(pairs); i += 2 {
		w, err := z.Create(pairs[i])
		if err == nil {
			_, err = w.Write([]byte(pairs[i+1]))
		}
		if err != nil {
			panic(err) // of memory
		}
	}
	_ = z.Close()
	return out.String()
}

// ---- npm, yarn, pnpm

// npmClients are those of one packument, whose tarball they fetch where it says.
func npmClients() []realClient {
	client := func(name string, fetch func(d *desk)) realClient {
		return realClient{
			name: name, needs: []string{name}, keys: "    package: npm\n", publish: publishPackument,
			fetch: func(d *desk) string {
				writeFile(d, d.home+"/package.json", `{"name":"test","version":"1.0.0"}`)
				writeFile(d, d.home+"/.npmrc", "registry="+d.url("")+"\n")
				fetch(d)
				return d.read("node_modules/hello/version")
			},
		}
	}
	return []realClient{
		client("npm", func(d *desk) {
			d.run("npm", "install", "--silent", "--no-audit", "--no-fund", "--no-update-notifier", "--cache", d.home+"/cache", "hello")
		}),
		client("yarn", func(d *desk) {
			d.run("yarn", "add", "hello", "--silent", "--non-interactive", "--cache-folder", d.home+"/cache")
		}),
		client("yarn4", func(d *desk) {
			writeFile(d, d.home+"/.yarnrc.yml", "npmRegistryServer: "+d.url("")+"\nunsafeHttpWhitelist: [127.0.0.1]\nnodeLinker: node-modules\nenableTelemetry: false\nenableGlobalCache: false\n")
			d.run("yarn4", "add", "hello")
		}),
		client("pnpm", func(d *desk) {
			d.run("pnpm", "add", "hello", "--silent", "--store-dir", d.home+"/store", "--cache-dir", d.home+"/cache", "--state-dir", d.home+"/state")
		}),
	}
}

func publishPackument(d *desk, version string) {
	number := packageVersions[version]
	tarball := tgzOf("package/package.json", `{"name":"hello","version":"`+number+`"}`, "package/version", version)
	d.write("hello/-/hello-"+number+".tgz", tarball)
	d.write("hello/index.html", fmt.Sprintf(`{"name":"hello","dist-tags":{"latest":%q},"versions":{%q:{"name":"hello","version":%q,"dist":{"tarball":"%s/hello/-/hello-%s.tgz","shasum":"%x"}}},"time":{%q:"2020-01-01T00:00:00.000Z"}}`,
		number, number, number, d.up.url, number, sha1.Sum([]byte(tarball)), number))
}

// TestRealLinksFollowTheTable has npm's files on another host, whose remote is there,
// removed, and there by another name: each time npm's index leads there at once.
func TestRealLinksFollowTheTable(t *testing.T) {
	t.Parallel()
	if os.Getenv("TEST_CLIENTS") == "" {
		t.Skip("TEST_CLIENTS is not set")
	}
	needCommands(t, "npm")
	d, files := newDesk(t, "    package: npm\n"), newRealUpstream(t)
	files.dir = d.up.dir
	publishPackument(d, "one")
	d.write("hello/index.html", strings.ReplaceAll(d.read(d.up.dir+"/hello/index.html"), d.up.url, files.url))
	npm := npmClients()[0]
	for _, act := range []struct {
		remote        string // of files
		asksUp, asked bool   // upstream for the index, and the host of the files
	}{
		{"files", true, true},
		{"files", false, false},
		{"", true, true}, // by npm itself: no remote could
		{"archive", true, true},
		{"archive", false, false},
	} {
		d.keys = "    package: npm\n"
		if act.remote != "" {
			d.keys += "  " + act.remote + ":\n    base_url: " + files.url + "\n    mutable_patterns: [latest]\n"
		}
		d.setTTL(3600)
		d.up.forget()
		files.forget()
		d.home = shortDir(d)
		if got := npm.fetch(d); got != "one" {
			t.Fatalf("remote %q: npm got %q", act.remote, got)
		}
		if up, at := d.up.asked(), files.asked(); len(up) > 0 != act.asksUp || len(at) > 0 != act.asked {
			t.Errorf("remote %q: upstream was asked for %q, the host of the files for %q", act.remote, up, at)
		}
		d.settle()
	}
}

// tgzOf makes a tar in gzip of names and texts.
func tgzOf(pairs ...string) string {
	var out strings.Builder
	for i := 0; i < len(pairs); i += 2 {
		out.WriteString(tarOf(pairs[i], pairs[i+1]))
	}
	return gz(out.String() + strings.Repeat("\x00", 1024))
}

// ---- pip

func pipClient() realClient {
	return realClient{
		name: "pip", needs: []string{"pip3"}, keys: "    package: pypi\n",
		publish: func(d *desk, version string) {
			number := packageVersions[version]
			wheel, info := "hello-"+number+"-py3-none-any.whl", "hello-"+number+".dist-info/"
			record := ""
			files := []string{"hello.py", "version = '" + version + "'\n",
				info + "METADATA", "Metadata-Version: 2.1\nName: hello\nVersion: " + number + "\n",
				info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
			for i := 0; i < len(files); i += 2 {
				sum := sha256.Sum256([]byte(files[i+1]))
				record += fmt.Sprintf("%s,sha256=%s,%d\n", files[i], base64.RawURLEncoding.EncodeToString(sum[:]), len(files[i+1]))
			}
			text := zipOf(append(files, info+"RECORD", record)...)
			d.write("packages/"+wheel, text)
			d.write("simple/hello/index.html", fmt.Sprintf(`<!DOCTYPE html><html><body><a href="%s/packages/%s#sha256=%x">%s</a></body></html>`, d.up.url, wheel, sha256.Sum256([]byte(text)), wheel))
		},
		fetch: func(d *desk) string {
			d.run("pip3", "--isolated", "download", "-q", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "-d", "got", "-i", d.url("simple/"), "hello")
			return versionNamed(filepath.Base(d.onlyFile(".whl")))
		},
	}
}

// ---- helm

func helmClient() realClient {
	return realClient{
		name: "helm", needs: []string{"helm"}, keys: "    package: helm\n",
		publish: func(d *desk, version string) {
			number := packageVersions[version]
			chart := "apiVersion: v2\nname: hello\nversion: " + number + "\n"
			text := tgzOf("hello/Chart.yaml", chart)
			d.write("charts/hello-"+number+".tgz", text)
			d.write("index.yaml", fmt.Sprintf("apiVersion: v1\nentries:\n  hello:\n  - apiVersion: v2\n    name: hello\n    version: %s\n    digest: %x\n    urls:\n    - %s/charts/hello-%s.tgz\n",
				number, sha256.Sum256([]byte(text)), d.up.url, number))
		},
		fetch: func(d *desk) string {
			d.run("helm", "repo", "add", "r", d.url(""))
			d.run("helm", "repo", "update")
			d.run("helm", "pull", "r/hello")
			return versionNamed(filepath.Base(d.onlyFile(".tgz")))
		},
	}
}

// ---- maven

const (
	mavenParent = `<project><modelVersion>4.0.0</modelVersion>
<groupId>test</groupId><artifactId>parent</artifactId><version>%s</version><packaging>pom</packaging>
<build><extensions><extension><groupId>test</groupId><artifactId>hello</artifactId><version>%[1]s</version></extension></extensions></build>
</project>`
	mavenProject = `<project><modelVersion>4.0.0</modelVersion>
<parent><groupId>test</groupId><artifactId>parent</artifactId><version>[1,2)</version><relativePath/></parent>
<artifactId>app</artifactId><version>1</version><packaging>pom</packaging>
</project>`
	mavenSettings = `<settings><localRepository>%s/repository</localRepository>
<mirrors><mirror><id>cache</id><mirrorOf>*</mirrorOf><url>%s</url></mirror></mirrors>
</settings>`
)

// mavenClient is maven without any of its plugins, which are not on loopback: a
// project has the newest parent, which has the jar as an extension of the build.
// Upstream has no checksums, which maven asks for with each file.
func mavenClient() realClient {
	return realClient{
		name: "maven", needs: []string{"mvn"}, keys: "    package: maven\n    negative_ttl: 3600\n",
		publish: func(d *desk, version string) {
			number := packageVersions[version]
			d.write("test/parent/maven-metadata.xml", "<metadata><groupId>test</groupId><artifactId>parent</artifactId><versioning><versions><version>"+number+"</version></versions></versioning></metadata>")
			d.write("test/parent/"+number+"/parent-"+number+".pom", fmt.Sprintf(mavenParent, number))
			d.write("test/hello/"+number+"/hello-"+number+".pom", "<project><modelVersion>4.0.0</modelVersion><groupId>test</groupId><artifactId>hello</artifactId><version>"+number+"</version></project>")
			d.write("test/hello/"+number+"/hello-"+number+".jar", zipOf("version", version))
			d.write("org/codehaus/plexus/plexus-utils/1.1/plexus-utils-1.1.jar", zipOf("empty", "")) // of every extension
		},
		fetch: func(d *desk) string {
			writeFile(d, d.home+"/pom.xml", mavenProject)
			writeFile(d, d.home+"/settings.xml", fmt.Sprintf(mavenSettings, d.home, d.url("")))
			d.runWith([]string{"MAVEN_OPTS=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}, "mvn", "-q", "-B", "-s", "settings.xml", "validate")
			return versionNamed(filepath.Base(d.onlyFile(".0.jar")))
		},
	}
}

// ---- cargo

func cargoClient() realClient {
	return realClient{
		name: "cargo", needs: []string{"cargo"}, keys: "    package: cargo\n",
		publish: func(d *desk, version string) {
			number := packageVersions[version]
			top := "hello-" + number + "/"
			crate := tgzOf(top+"Cargo.toml", "[package]\nname = \"hello\"\nversion = \""+number+"\"\n", top+"src/lib.rs", "// "+version+"\n")
			d.write("files/hello/"+number, crate)
			d.write("config.json", `{"dl":"`+d.up.url+`/files/{crate}/{version}"}`)
			d.write("he/ll/hello", fmt.Sprintf(`{"name":"hello","vers":%q,"deps":[],"cksum":"%x","features":{},"yanked":false}`+"\n", number, sha256.Sum256([]byte(crate))))
		},
		fetch: func(d *desk) string {
			writeFile(d, d.home+"/Cargo.toml", "[package]\nname = \"app\"\nversion = \"1.0.0\"\n[dependencies]\nhello = \"1\"\n")
			writeFile(d, d.home+"/src/main.rs", "")
			writeFile(d, d.home+"/.cargo/config.toml", "[source.crates-io]\nreplace-with = \"cache\"\n[source.cache]\nregistry = \"sparse+"+d.url("")+"\"\n")
			d.runWith([]string{"RUSTUP_HOME=" + cmp.Or(os.Getenv("RUSTUP_HOME"), os.Getenv("HOME")+"/.rustup")}, "cargo", "fetch", "-q")
			return strings.Trim(d.read(d.onlyFile("/lib.rs")), "/ \n")
		},
	}
}

// ---- terraform

// terraformClient installs a provider by the protocol of registries, which names its
// file, the checksums and their signature by full URLs.
func terraformClient() realClient {
	return realClient{
		name: "terraform", needs: []string{"terraform", "gpg"}, keys: "    package: terraform\n",
		publish: func(d *desk, version string) {
			number := packageVersions[version]
			at, platform := "v1/providers/test/hello/", runtime.GOOS+"_"+runtime.GOARCH
			name := "terraform-provider-hello_" + number
			file := zipOf("terraform-provider-hello_v"+number, version)
			sum := fmt.Sprintf("%x", sha256.Sum256([]byte(file)))
			sums := sum + "  " + name + "_" + platform + ".zip\n"
			d.write("files/"+name+"_"+platform+".zip", file)
			d.write("files/"+name+"_SHA256SUMS", sums)
			d.gpg("--armor", "-o", d.home+"/key.asc", "--export")
			d.gpg("-o", d.up.dir+"/files/"+name+"_SHA256SUMS.sig", "--detach-sign", d.up.dir+"/files/"+name+"_SHA256SUMS")
			d.write(at+"versions/index.html", `{"versions":[{"version":"`+number+`","protocols":["5.0"],"platforms":[{"os":"`+runtime.GOOS+`","arch":"`+runtime.GOARCH+`"}]}]}`)
			download := map[string]any{
				"protocols": []string{"5.0"}, "os": runtime.GOOS, "arch": runtime.GOARCH, "filename": name + "_" + platform + ".zip", "shasum": sum,
				"download_url": d.up.url + "/files/" + name + "_" + platform + ".zip",
				"shasums_url":  d.up.url + "/files/" + name + "_SHA256SUMS", "shasums_signature_url": d.up.url + "/files/" + name + "_SHA256SUMS.sig",
				"signing_keys": map[string]any{"gpg_public_keys": []any{map[string]string{"key_id": "test", "ascii_armor": d.read("key.asc")}}},
			}
			text, err := json.Marshal(download)
			if err != nil {
				d.Fatal(err)
			}
			d.write(at+number+"/download/"+runtime.GOOS+"/"+runtime.GOARCH+"/index.html", string(text))
		},
		fetch: func(d *desk) string {
			return initTerraform(d, `host "registry.terraform.io" { services = { "providers.v1" = "`+d.url("v1/providers/")+`" } }`)
		},
	}
}

// initTerraform installs the provider by terraform's configuration rc, and returns what
// it is.
func initTerraform(d *desk, rc string, env ...string) string {
	d.Helper()
	writeFile(d, d.home+"/main.tf", "terraform {\n  required_providers {\n    hello = { source = \"test/hello\" }\n  }\n}\n")
	writeFile(d, d.home+"/rc", rc)
	d.runWith(append(env, "TF_CLI_CONFIG_FILE="+d.home+"/rc", "CHECKPOINT_DISABLE=1"), "terraform", "init", "-no-color")
	return d.read(d.onlyFile(".0"))
}

// terraformMirrorClient installs a provider by the protocol of mirrors, which terraform
// speaks over HTTPS alone.
func terraformMirrorClient() realClient {
	return realClient{
		name: "terraform, a mirror", needs: []string{"terraform"}, keys: "    package: terraform\n",
		publish: func(d *desk, version string) {
			number := packageVersions[version]
			at, platform := "registry.terraform.io/test/hello/", runtime.GOOS+"_"+runtime.GOARCH
			d.write("files/"+number+".zip", zipOf("terraform-provider-hello_v"+number, version))
			d.write(at+"index.json", `{"versions":{"`+number+`":{}}}`)
			d.write(at+number+".json", `{"archives":{"`+platform+`":{"url":"`+d.up.url+`/files/`+number+`.zip"}}}`)
		},
		fetch: func(d *desk) string {
			pair := newTLSPair(d)
			front := httptest.NewUnstartedServer(httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: d.host}))
			front.TLS = &tls.Config{Certificates: []tls.Certificate{pair.cert}}
			front.StartTLS()
			defer front.Close()
			writeFile(d, d.home+"/ca.pem", string(pair.certPEM))
			return initTerraform(d, `provider_installation { network_mirror { url = "`+front.URL+`/api/r/" } }`, "SSL_CERT_FILE="+d.home+"/ca.pem")
		},
	}
}
