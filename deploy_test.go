package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"
)

// deployDocuments returns the documents of a YAML file below deploy. Decoding refuses a
// key that is there twice.
func deployDocuments(t *testing.T, name string) (docs []map[string]any) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var doc map[string]any
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return docs
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		docs = append(docs, doc)
	}
}

// at follows keys and indexes into a decoded document; nil if there is nothing.
func at(v any, path ...any) any {
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[p]
		case int:
			l, _ := v.([]any)
			if p >= len(l) {
				return nil
			}
			v = l[p]
		}
	}
	return v
}

// deployed finds an object of Kubernetes by its kind and name.
func deployed(t *testing.T, kind, name string) map[string]any {
	t.Helper()
	files, err := filepath.Glob("deploy/kubernetes/*.yaml")
	if err != nil || len(files) < 8 {
		t.Fatalf("%d manifests: %v", len(files), err)
	}
	for _, f := range files {
		for _, doc := range deployDocuments(t, strings.TrimPrefix(f, "deploy/")) {
			if doc["kind"] == kind && at(doc, "metadata", "name") == name {
				return doc
			}
		}
	}
	t.Fatalf("there is no %s %s", kind, name)
	return nil
}

// podEnvironment is the environment of the server in Kubernetes, values from the secret
// included.
func podEnvironment(t *testing.T) map[string]string {
	t.Helper()
	secrets := deployed(t, "Secret", "artifactapi")
	env := map[string]string{}
	list, _ := at(deployed(t, "Deployment", "artifactapi"), "spec", "template", "spec", "containers", 0, "env").([]any)
	for _, e := range list {
		name, _ := at(e, "name").(string)
		value, _ := at(e, "value").(string)
		if key, ok := at(e, "valueFrom", "secretKeyRef", "key").(string); ok {
			if value, ok = at(secrets, "stringData", key).(string); !ok {
				t.Errorf("%s is taken from the secret's key %s, which is not there", name, key)
			}
		}
		if at(e, "valueFrom", "fieldRef", "fieldPath") == "status.podIP" {
			value = "10.0.0.7"
		}
		for known, v := range env {
			value = strings.ReplaceAll(value, "$("+known+")", v)
		}
		env[name] = value
	}
	return env
}

// wantKnownVariables reports what is set and not read. others are read by others.
func wantKnownVariables(t *testing.T, where string, env map[string]string, others ...string) {
	t.Helper()
	names, _ := environmentOf(t)
	for name := range env {
		if !slices.Contains(names, name) && !slices.Contains(others, name) {
			t.Errorf("%s sets %s, which nothing reads", where, name)
		}
	}
}

func TestKubernetesManifestsFitTheServer(t *testing.T) {
	t.Parallel()
	env := podEnvironment(t)
	wantKnownVariables(t, "Kubernetes", env, "POD_IP", "REDIS_PASSWORD", "FILES_TOKEN")
	set, err := parseSettings(envOf(env))
	if err != nil {
		t.Fatal(err)
	}
	if set.advertise != "http://10.0.0.7:8000" {
		t.Errorf("replicas find each other at %q", set.advertise)
	}
	config, _ := at(deployed(t, "ConfigMap", "artifactapi"), "data", "remotes.yaml").(string)
	if _, err := parseConfig("remotes.yaml", []byte(config), envOf(env)); err != nil {
		t.Error(err)
	}
	pod := at(deployed(t, "Deployment", "artifactapi"), "spec", "template", "spec")
	limit, _ := at(pod, "volumes", 0, "emptyDir", "sizeLimit").(string)
	if size, err := parseSize(limit); err != nil || size < 2*set.hotSize {
		t.Errorf("the volume of DATA_DIR has %s, want twice HOT_CACHE_SIZE: %v", limit, err)
	}
	if at(pod, "terminationGracePeriodSeconds") != 45 || at(pod, "securityContext", "runAsUser") != 65532 ||
		at(pod, "containers", 0, "securityContext", "readOnlyRootFilesystem") != true {
		t.Errorf("the pod is %v", pod)
	}
	for _, mount := range at(pod, "containers", 0, "volumeMounts").([]any) {
		if at(mount, "subPath") != nil {
			t.Error("a subPath is never updated")
		}
	}
	for _, name := range at(deployDocuments(t, "kubernetes/kustomization.yaml")[0], "resources").([]any) {
		deployDocuments(t, "kubernetes/"+name.(string))
	}
}

// The way to make passwords that the secret advises makes such that the environment
// takes, whatever the dice say: one of them becomes part of a URL.
func TestAdvisedPasswordsFitTheServer(t *testing.T) {
	t.Parallel()
	needCommands(t, "/bin/sh", "head", "base64", "tr")
	secrets, err := os.ReadFile("deploy/kubernetes/secret.yaml")
	must(t, err)
	advice := regexp.MustCompile(`# Replace each value: head -c 24 /dev/urandom \| (.+)\n`).FindSubmatch(secrets)
	if advice == nil {
		t.Fatal("the secret does not say how to make a password")
	}
	for _, random := range []byte{0, 0xfb, 0xff} { // base64 makes A, + and / of them
		sh := exec.Command("/bin/sh", "-c", string(advice[1]))
		sh.Stdin = bytes.NewReader(bytes.Repeat([]byte{random}, 24))
		password, err := sh.Output()
		must(t, err)
		env := podEnvironment(t)
		env["REDIS_URL"] = strings.Replace(env["REDIS_URL"], env["REDIS_PASSWORD"], strings.TrimSpace(string(password)), 1)
		if _, err := parseSettings(envOf(env)); err != nil {
			t.Errorf("the password %s: %v", password, err)
		}
	}
}

func TestComposeFitsTheServer(t *testing.T) {
	t.Parallel()
	services := at(deployDocuments(t, "compose.yaml")[0], "services")
	env := map[string]string{}
	for name, v := range at(services, "artifactapi", "environment").(map[string]any) {
		env[name], _ = v.(string)
	}
	wantKnownVariables(t, "compose", env)
	if _, err := parseSettings(envOf(env)); err != nil {
		t.Error(err)
	}
	if at(services, "minio", "environment", "MINIO_ROOT_PASSWORD") != env["MINIO_SECRET_KEY"] || at(services, "postgresql", "environment", "POSTGRES_PASSWORD") != env["DBPASS"] {
		t.Error("a service has another password than artifactapi")
	}
}

// The file for systemd has every setting, as a comment; what the unit sets itself is not
// in it.
func TestSystemdHasEverySetting(t *testing.T) {
	t.Parallel()
	file, err := os.ReadFile("deploy/artifactapi.env")
	if err != nil {
		t.Fatal(err)
	}
	env := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^#?([A-Z][A-Z_]+)=(.*)$`).FindAllStringSubmatch(string(file), -1) {
		env[m[1]] = m[2]
	}
	unit, err := os.ReadFile("deploy/artifactapi.service")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`([A-Z_]+)=/`).FindAllStringSubmatch(string(unit), -1) {
		env[m[1]] = ""
	}
	env["KUBERNETES_SERVICE_HOST"] = "" // no setting of an operator's
	wantKnownVariables(t, "systemd", env)
	names, _ := environmentOf(t)
	for _, name := range names {
		if _, ok := env[name]; !ok {
			t.Errorf("deploy/artifactapi.env does not have %s", name)
		}
	}
}

// Rules and dashboard name metrics that the server has.
func TestMonitoringNamesMetricsThatExist(t *testing.T) {
	t.Parallel()
	tt := newTester(t)
	text := tt.get("/metrics").wantStatus(200).text
	text += "artifactapi_held_generations 0\n" // with packages rpm and deb
	series := map[string]bool{}
	for line := range strings.Lines(text) {
		series[regexp.MustCompile(`^[a-z_]+`).FindString(line)] = true
	}
	var expressions []string
	groups, _ := at(deployDocuments(t, "monitoring/alerts.yaml")[0], "groups", 0, "rules").([]any)
	for _, rule := range groups {
		expr, _ := at(rule, "expr").(string)
		summary, _ := at(rule, "annotations", "summary").(string)
		if expr == "" || summary == "" {
			t.Errorf("%v has no expression or no summary", rule)
		}
		expressions = append(expressions, expr)
	}
	data, err := os.ReadFile("deploy/monitoring/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct{ Targets []struct{ Expr string } }
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			expressions = append(expressions, target.Expr)
		}
	}
	if len(expressions) < 20 {
		t.Errorf("only %d expressions were found", len(expressions))
	}
	named := map[string]bool{}
	for _, e := range expressions {
		for _, name := range regexp.MustCompile(`\b(?:artifactapi|process)_[a-z_]+`).FindAllString(e, -1) {
			named[name] = true
		}
	}
	for name := range maps.Keys(named) {
		if !series[name] {
			t.Errorf("%s is in a rule or a panel and not in /metrics", name)
		}
	}
	if docs := deployDocuments(t, "monitoring/scrape.yaml"); at(docs[0], "scrape_configs", 0, "job_name") != "artifactapi" {
		t.Errorf("the rules count on the job artifactapi: %v", docs)
	}
}

// shownCommands has a shell read the sh blocks of a document as a person's would, with
// other programs in place of those that it names, and returns what was called with which
// arguments.
func shownCommands(t *testing.T, document string) (calls [][]string) {
	t.Helper()
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	const stub = "#!/bin/sh\nfor a in \"${0##*/}\" \"$@\"; do printf '%s\\n' \"$a\"; done >../called/$$\n"
	for _, name := range []string{"artifactapi", "curl", "go", "docker", "crane", "skopeo", "zstd", "apt-get", "dnf", "helm"} {
		writeFile(t, dir+"/bin/"+name, stub)
		if err := os.Chmod(dir+"/bin/"+name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, dir+"/here/rke2-images.txt", "")
	writeFile(t, dir+"/called/none", "")
	for _, block := range regexp.MustCompile("(?s)\n```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		cmd := exec.Command("/bin/sh", "-euc", block[1])
		cmd.Dir = dir + "/here"
		cmd.Env = []string{"PATH=" + dir + "/bin:/usr/bin:/bin", "API_TOKEN=" + deskToken, "PWD=" + cmd.Dir}
		// A block may end in a grep, which finds nothing in what such a program prints.
		if out, err := cmd.CombinedOutput(); err != nil && (len(out) > 0 || !strings.Contains(block[1], "| grep")) {
			t.Errorf("%s: %v\n%s\n%s", document, err, block[1], out)
		}
	}
	files, err := filepath.Glob(dir + "/called/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		called, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		calls = append(calls, strings.Split(strings.TrimSuffix(string(called), "\n"), "\n"))
	}
	return calls
}

// TestShownCommandsWork does what the documents tell people to type, as far as that is
// about artifactapi: its commands know their arguments, and a server with the shipped
// remotes.yaml answers curl well.
func TestShownCommandsWork(t *testing.T) {
	t.Parallel()
	needCommands(t, "/bin/sh", "grep", "env")
	shipped, err := os.ReadFile("remotes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	yaml := regexp.MustCompile(`https://([^/"\s]+)`).ReplaceAllString(string(shipped), "ORIGIN/$1")
	open := setup{yaml: yaml}.start(t)
	guarded := setup{yaml: yaml, env: map[string]string{"API_TOKEN": deskToken}}.start(t)
	open.origin.file("/github.com/gruntwork-io/terragrunt/releases/download/v0.96.1/terragrunt_linux_amd64.tar.gz", "body")
	did := map[string]int{}
	for _, call := range shownCommands(t, "README.md") {
		did[call[0]]++
		switch {
		case call[0] == "artifactapi" && len(call) > 1:
			env := envOf(map[string]string{"DATA_DIR": t.TempDir(), "LISTEN_ADDR": refusingAddress(t)})
			var out bytes.Buffer
			ended, end := context.WithCancel(t.Context())
			end()
			if code := run(ended, call[1:], env, io.Discard, &out); code == 2 {
				t.Errorf("%q is not understood: %s", call, out.String())
			}
		case call[0] == "curl":
			server := open
			if strings.Contains(strings.Join(call, " "), "Bearer "+deskToken) {
				server = guarded
			}
			if got := sendAsCurl(server, call[1:]); got.status/100 != 2 {
				t.Errorf("%q is answered with %d: %s", call, got.status, got.text)
			}
		}
	}
	if did["artifactapi"] < 15 || did["curl"] < 8 {
		t.Errorf("only these were found: %v", did)
	}
}

// sendAsCurl sends the request that curl sends with these arguments.
func sendAsCurl(tt *tester, args []string) *got {
	method, path, body := http.MethodGet, "", ""
	var headers []string
	for i := 0; i < len(args); i++ {
		next := ""
		if i+1 < len(args) {
			next = args[i+1]
		}
		switch args[i] {
		case "-s", "-sD-":
			continue
		case "-o":
		case "-X":
			method = next
		case "-T":
			method, body = http.MethodPut, next
		case "-d", "--data-binary":
			method, body = http.MethodPost, next
		case "-H":
			headers = append(headers, next)
		default:
			path = strings.TrimPrefix(args[i], "localhost:8000")
			continue
		}
		i++
	}
	return tt.send(method, path, strings.NewReader(body), headers...)
}

// names are those in a list of objects that have one.
func names(list any) (all []string) {
	items, _ := list.([]any)
	for _, item := range items {
		if name, ok := at(item, "name").(string); ok {
			all = append(all, name)
		}
	}
	return all
}

// What manifests name in others is there: a selector finds a pod, a mount its volume, a
// probe and a service their port, the environment its services.
func TestKubernetesManifestsFindEachOther(t *testing.T) {
	t.Parallel()
	want := func(has bool, what, where string) {
		t.Helper()
		if !has {
			t.Errorf("%s names %s, which is not there", where, what)
		}
	}
	for kind, pods := range map[string][]string{"Deployment": {"artifactapi", "redis"}, "StatefulSet": {"minio", "postgresql"}} {
		for _, name := range pods {
			spec := at(deployed(t, kind, name), "spec")
			pod, container := at(spec, "template", "spec"), at(spec, "template", "spec", "containers", 0)
			ports := names(at(container, "ports"))
			service := deployed(t, "Service", name)
			for _, selector := range []any{at(spec, "selector", "matchLabels"), at(service, "spec", "selector")} {
				for label, value := range selector.(map[string]any) {
					want(at(spec, "template", "metadata", "labels", label) == value, label, name)
				}
			}
			if port, ok := at(service, "spec", "ports", 0, "targetPort").(string); ok {
				want(slices.Contains(ports, port), port, "the service "+name)
			}
			for _, probe := range []string{"readinessProbe", "livenessProbe"} {
				for _, way := range []string{"httpGet", "tcpSocket"} {
					if port, ok := at(container, probe, way, "port").(string); ok {
						want(slices.Contains(ports, port), port, name+"'s "+probe)
					}
				}
				want(at(container, probe) != nil, probe, name)
			}
			volumes := names(at(pod, "volumes"))
			claims, _ := at(spec, "volumeClaimTemplates").([]any)
			for _, claim := range claims {
				volumes = append(volumes, at(claim, "metadata", "name").(string))
			}
			for _, mount := range names(at(container, "volumeMounts")) {
				want(slices.Contains(volumes, mount), mount, name)
			}
			env, _ := at(container, "env").([]any)
			for _, e := range env {
				if ref := at(e, "valueFrom", "secretKeyRef"); ref != nil {
					key := at(ref, "key").(string)
					want(at(deployed(t, "Secret", at(ref, "name").(string)), "stringData", key) != nil, key, name)
				}
			}
		}
	}
	env := podEnvironment(t)
	redis := parseHostURL(env["REDIS_URL"], "redis")
	for _, address := range []string{env["MINIO_ENDPOINT"], env["DBHOST"] + ":5432", redis.Host} {
		host, port, _ := strings.Cut(address, ":")
		want(fmt.Sprint(at(deployed(t, "Service", host), "spec", "ports", 0, "port")) == port, address, "the environment")
	}
	backend := at(deployed(t, "Ingress", "artifactapi"), "spec", "rules", 0, "http", "paths", 0, "backend", "service")
	service := deployed(t, "Service", at(backend, "name").(string))
	want(slices.Contains(names(at(service, "spec", "ports")), at(backend, "port", "name").(string)), "a port", "the ingress")
}
