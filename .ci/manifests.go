//go:build ignore

// Manifests reads what is in a directory like deploy/. The manifests in kubernetes/ it
// reads as an API server does that validates strictly: each object is of a known
// apiVersion and kind, each field is known, there once and of its type. Then it builds
// their kustomization, as "kubectl apply -k" does, and reads what comes out. compose.yaml
// it reads as "docker compose" does. .ci/run compiles it in a module of its own: what it
// imports is nothing of the program's.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"

	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/types"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 2 {
		log.Fatal("usage: manifests DIR")
	}
	readKubernetes(filepath.Join(os.Args[1], "kubernetes"))
	readCompose(filepath.Join(os.Args[1], "compose.yaml"))
}

func readKubernetes(dir string) {
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		log.Fatal(err)
	}
	n := 0
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			log.Fatal(err)
		}
		if filepath.Base(name) != "kustomization.yaml" { // it is no object of the API
			n += readObjects(name, string(text))
		}
	}
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		log.Fatal(err)
	}
	text, err := built.AsYaml()
	if err != nil {
		log.Fatal(err)
	}
	if m := readObjects("what kustomize builds", string(text)); m != n || n == 0 {
		log.Fatalf("%d objects are in files, and kustomize builds %d", n, m)
	}
	fmt.Println(n, "objects of Kubernetes")
}

func readCompose(name string) {
	project, err := loader.LoadWithContext(context.Background(), types.ConfigDetails{
		WorkingDir:  filepath.Dir(name),
		ConfigFiles: []types.ConfigFile{{Filename: name}},
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(project.Services), "services of compose")
}

// readObjects reads the documents of a text and returns how many there are.
func readObjects(name, text string) (n int) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, networkingv1.AddToScheme, policyv1.AddToScheme} {
		if err := add(scheme); err != nil {
			log.Fatal(err)
		}
	}
	strict := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme, scheme, json.SerializerOptions{Yaml: true, Strict: true})
	for doc := range strings.SplitSeq(text, "\n---\n") {
		n++
		if _, _, err := strict.Decode([]byte(doc), nil, nil); err != nil {
			log.Fatalf("%s, document %d: %v", name, n, err)
		}
	}
	return n
}
