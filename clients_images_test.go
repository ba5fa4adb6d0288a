// clients_images_test.go: real clients of container images (see clients_test.go),
// with a real registry as upstream where there is one.

package main

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// imageClients are those, in front of one docker-registry, which runs as long as t.
func imageClients(t *testing.T) []realClient {
	t.Helper()
	registry := freeAddress(t)
	if _, err := exec.LookPath("docker-registry"); err == nil {
		dir := t.TempDir()
		writeFile(t, dir+"/config.yml", fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %q}\n", dir+"/store", registry))
		startService(t, registry, "docker-registry", "serve", dir+"/config.yml")
	}
	client := func(name string, push func(d *desk, repo, version string), fetch func(d *desk, repo string) string) realClient {
		return realClient{
			name: name, needs: []string{name, "docker-registry"}, keys: "    package: docker\n    registry: registry.test\n",
			publish: func(d *desk, version string) {
				d.up.passOn(httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry}))
				push(d, "http://"+registry+"/v2/"+name+"/hello", version)
			},
			fetch: func(d *desk) string { return fetch(d, name+"/hello") },
		}
	}
	image := func(name string, mounts bool, fetch func(d *desk, image string) string) realClient {
		c := client(name, pushImage, func(d *desk, repo string) string { return fetch(d, repo+":latest") })
		c.mounts = mounts
		return c
	}
	helm := client("helm", pushChart, func(d *desk, repo string) string {
		d.run("helm", "pull", "oci://"+d.host+"/r/"+repo, "--version", "1.0.0", "--plain-http")
		switch d.read("hello-1.0.0.tgz") {
		case chartOf("one"):
			return "one"
		case chartOf("two"):
			return "two"
		}
		return "a chart that is no version"
	})
	helm.name = "helm, from a registry"
	return []realClient{
		image("skopeo", false, func(d *desk, image string) string {
			writeFile(d, d.home+"/policy.json", `{"default":[{"type":"insecureAcceptAnything"}]}`)
			d.run("skopeo", "--policy", "policy.json", "copy", "-q", "--src-tls-verify=false", "docker://"+d.host+"/r/"+image, "dir:"+d.home+"/image")
			return versionOfImage(d)
		}),
		image("crane", false, func(d *desk, image string) string {
			d.run("crane", "pull", "--insecure", "--format=oci", d.host+"/r/"+image, d.home+"/image")
			return versionOfImage(d)
		}),
		image("oras", false, func(d *desk, image string) string {
			d.run("oras", "copy", "--no-tty", "--from-plain-http", d.host+"/r/"+image, "--to-oci-layout", d.home+"/image:latest")
			return versionOfImage(d)
		}),
		image("ctr", true, fetchByContainerd),
		image("podman", true, fetchByPodman),
		helm,
	}
}

// fetchByContainerd asks the server as a mirror of registry.test, with the path that a
// mirror with a path has.
func fetchByContainerd(d *desk, image string) string {
	socket := d.home + "/c.sock"
	writeFile(d, d.home+"/config.toml", fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n[grpc]\naddress = %q\n[ttrpc]\naddress = %q\n",
		d.home+"/root", d.home+"/state", socket, socket+".ttrpc"))
	writeFile(d, d.home+"/hosts/registry.test/hosts.toml", fmt.Sprintf("server = \"http://registry.test\"\n[host.\"http://%s/v2/r\"]\ncapabilities = [\"pull\", \"resolve\"]\noverride_path = true\n", d.host))
	defer startService(d, socket, "containerd", "--config", d.home+"/config.toml", "-l", "error")()
	ctr := func(args ...string) { d.run("ctr", append([]string{"-a", socket}, args...)...) }
	ctr("images", "pull", "--snapshotter", "native", "--hosts-dir", d.home+"/hosts", "registry.test/"+image)
	ctr("images", "export", d.home+"/image.tar", "registry.test/"+image)
	unpackImage(d, "image.tar")
	return versionOfImage(d)
}

func fetchByPodman(d *desk, image string) string {
	writeFile(d, d.home+"/policy.json", `{"default":[{"type":"insecureAcceptAnything"}]}`)
	writeFile(d, d.home+"/registries.conf", fmt.Sprintf("[[registry]]\nprefix = \"registry.test\"\nlocation = \"registry.test\"\n[[registry.mirror]]\nlocation = \"%s/r\"\ninsecure = true\n", d.host))
	env := []string{"CONTAINERS_REGISTRIES_CONF=" + d.home + "/registries.conf", "XDG_RUNTIME_DIR=" + d.home}
	podman := []string{"--root", d.home + "/root", "--runroot", d.home + "/run", "--tmpdir", d.home + "/tmp", "--storage-driver", "vfs", "--events-backend", "none", "--cgroup-manager", "cgroupfs"}
	d.runWith(env, "podman", append(podman, "pull", "-q", "--signature-policy", "policy.json", "registry.test/"+image)...)
	d.runWith(env, "podman", append(podman, "save", "-q", "--format", "oci-archive", "-o", "image.tar", "registry.test/"+image)...)
	unpackImage(d, "image.tar")
	return versionOfImage(d)
}

func unpackImage(d *desk, name string) {
	d.Helper()
	writeFile(d, d.home+"/image/empty", "")
	d.run("tar", "-xf", name, "-C", "image")
}

// versionOfImage is the version in the layer below the home's folder image, which has
// one file for each blob. Some clients pack layers anew.
func versionOfImage(d *desk) string {
	d.Helper()
	names, _ := filepath.Glob(d.home + "/image/*")
	deeper, _ := filepath.Glob(d.home + "/image/blobs/sha256/*")
	names = append(names, deeper...)
	for _, name := range names {
		text, _ := os.ReadFile(name) // a directory has none
		if z, err := gzip.NewReader(bytes.NewReader(text)); err == nil {
			text, _ = io.ReadAll(z)
		}
		for _, version := range []string{"one", "two"} {
			if string(text) == imageTree(version) {
				return version
			}
		}
	}
	return fmt.Sprintf("no layer among %q", names)
}

// imageTree is the file system of a version, imageLayer its layer.
func imageTree(version string) string {
	return tarOf("version", versionText(version, 3<<20)) + strings.Repeat("\x00", 1024)
}

func imageLayer(version string) string { return gz(imageTree(version)) }

func digestOf(text string) string { return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(text))) }

// pushImage gives the repository the tag latest.
func pushImage(d *desk, repo, version string) {
	d.Helper()
	config := fmt.Sprintf(`{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":[%q]}}`, digestOf(imageTree(version)))
	const oci = "application/vnd.oci.image."
	pushArtifact(d, repo, "latest", oci+"config.v1+json", config, oci+"layer.v1.tar+gzip", imageLayer(version))
}

// chartOf is the package of helm's that is a version.
func chartOf(version string) string {
	return gz(tarOf("hello/Chart.yaml", "apiVersion: v2\nname: hello\nversion: 1.0.0\ndescription: "+version+"\n") + strings.Repeat("\x00", 1024))
}

// pushChart gives the repository the tag 1.0.0.
func pushChart(d *desk, repo, version string) {
	d.Helper()
	const helm = "application/vnd.cncf.helm."
	pushArtifact(d, repo, "1.0.0", helm+"config.v1+json", `{"name":"hello","version":"1.0.0","apiVersion":"v2"}`, helm+"chart.content.v1.tar+gzip", chartOf(version))
}

func pushArtifact(d *desk, repo, tag, configType, config, layerType, layer string) {
	d.Helper()
	part := func(mediaType, text string) string {
		return fmt.Sprintf(`{"mediaType":%q,"size":%d,"digest":%q}`, mediaType, len(text), digestOf(text))
	}
	for _, blob := range []string{layer, config} {
		res := pushPart(d, http.MethodPost, repo+"/blobs/uploads/", "", "")
		at, err := res.Request.URL.Parse(res.Header.Get("Location"))
		if err != nil {
			d.Fatal(err)
		}
		q := at.Query()
		q.Set("digest", digestOf(blob))
		at.RawQuery = q.Encode()
		pushPart(d, http.MethodPut, at.String(), "application/octet-stream", blob)
	}
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	manifest := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s]}`, manifestType, part(configType, config), part(layerType, layer))
	pushPart(d, http.MethodPut, repo+"/manifests/"+tag, manifestType, manifest)
}

func pushPart(d *desk, method, url, contentType, text string) *http.Response {
	d.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(text))
	if err != nil {
		d.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		d.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode/100 != 2 {
		d.Fatalf("%s %s: %s", method, url, res.Status)
	}
	res.Request = req
	return res
}
