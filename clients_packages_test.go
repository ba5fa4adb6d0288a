// clients_packages_test.go: real clients that install packages (see clients_test.go),
// with the smallest repositories that they take.

package main

import (
	"archive/zip"
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
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
	return slices.Concat([]realClient{dnfClient(), goClient(), npmClient(), pipClient()}, aptClients())
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

// ---- npm

func npmClient() realClient {
	return realClient{
		name: "npm", needs: []string{"npm"}, keys: "    package: npm\n",
		publish: func(d *desk, version string) {
			number := packageVersions[version]
			tarball := gz(tarOf("package/package.json", `{"name":"hello","version":"`+number+`"}`) + tarOf("package/version", version) + strings.Repeat("\x00", 1024))
			d.write("hello/-/hello-"+number+".tgz", tarball)
			d.write("hello/index.html", fmt.Sprintf(`{"name":"hello","dist-tags":{"latest":%q},"versions":{%q:{"name":"hello","version":%q,"dist":{"tarball":"%s/hello/-/hello-%s.tgz","shasum":"%x"}}}}`,
				number, number, number, d.up.url, number, sha1.Sum([]byte(tarball))))
		},
		fetch: func(d *desk) string {
			writeFile(d, d.home+"/package.json", `{"name":"test","version":"1.0.0"}`)
			d.run("npm", "install", "--silent", "--no-audit", "--no-fund", "--no-update-notifier", "--registry", d.url(""), "--cache", d.home+"/cache", "hello")
			return d.read("node_modules/hello/version")
		},
	}
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
