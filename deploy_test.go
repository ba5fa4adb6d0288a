package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
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
	for _, name := range []string{"hot_bytes"} { // with S3 only
		text += "artifactapi_" + name + " 0\n"
	}
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
