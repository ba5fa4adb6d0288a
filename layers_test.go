package main

import (
	"errors"
	"fmt"
	goast "go/ast"
	goparser "go/parser"
	gotoken "go/token"
	gotypes "go/types"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// rung is a file, or a family of files, and where it stands in the ladder.
type rung struct {
	file    string // or prefix_*.go
	layer   int
	subject string
}

// ladder holds every file: a file names what is declared in itself and in lower
// layers, nothing else. Files of one subject count as one file.
var ladder = []rung{
	{"respond.go", 0, "respond"},
	{"metrics.go", 0, "metrics"},
	{"outage.go", 0, "outage"},
	{"bounded.go", 0, "bounded"},
	{"s3sig.go", 0, "s3"},
	{"s3client.go", 0, "s3"},
	{"s3client_*.go", 0, "s3"},
	{"remotes.go", 1, "remotes"},
	{"remotes_*.go", 1, "remotes"},
	{"spool.go", 1, "spool"},
	{"upstream.go", 2, "upstream"},
	{"upstream_*.go", 2, "upstream"},
	{"cache.go", 3, "cache"},
	{"cache_*.go", 3, "cache"},
	{"fill.go", 3, "cache"},
	{"fill_*.go", 3, "cache"},
	{"registry.go", 4, "registry"},
	{"registry_*.go", 4, "registry"},
	{"api.go", 4, "api"},
	{"api_*.go", 4, "api"},
	{"store.go", 4, "store"},
	{"store_*.go", 4, "store"},
	{"main.go", 5, "main"},
	{"main_*.go", 5, "main"},
}

// allowedModules is everything that artifactapi is built from beside Go.
var allowedModules = []string{"gopkg.in/yaml.v3", "github.com/lib/pq", "github.com/gomodule/redigo"}

// confinedNames says which files may name a thing. time.Since and time.Until read
// the clock as time.Now does.
var confinedNames = []struct {
	pkg, name string // name may end in *
	files     []string
}{
	{"time", "Now", []string{"main.go"}},
	{"time", "Since", []string{"main.go"}},
	{"time", "Until", []string{"main.go"}},
	{"time", "Sleep", nil},
	{"net/http", "Error", []string{"respond.go"}},
	{"os", "Exit", []string{"main.go"}},
	{"log", "Fatal*", []string{"main.go"}},
}

const longestFunction = 120

func TestLayers(t *testing.T) {
	t.Parallel()
	for _, f := range layerFaults(readProgram(t)) {
		t.Error(f)
	}
}

func TestFunctionsAreShort(t *testing.T) {
	t.Parallel()
	for _, f := range lengthFaults(readProgram(t)) {
		t.Error(f)
	}
}

func TestClockAndExitsStayInTheirFiles(t *testing.T) {
	t.Parallel()
	for _, f := range confinementFaults(readProgram(t)) {
		t.Error(f)
	}
}

func TestGoMod(t *testing.T) {
	t.Parallel()
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range modFaults(string(mod)) {
		t.Error(f)
	}
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range importFaults(parseProgram(t, readSources(t, names))) {
		t.Error(f)
	}
}

// parsedProgram is a package's sources, parsed and resolved.
type parsedProgram struct {
	fset  *gotoken.FileSet
	files map[string]*goast.File
	info  *gotypes.Info
	pkg   *gotypes.Package
}

// readProgram reads the production files of this directory.
func readProgram(t *testing.T) *parsedProgram {
	t.Helper()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	names = slices.DeleteFunc(names, func(n string) bool { return strings.HasSuffix(n, "_test.go") })
	if len(names) == 0 {
		t.Fatal("no production files here")
	}
	return parseProgram(t, readSources(t, names))
}

func readSources(t *testing.T, names []string) map[string]string {
	t.Helper()
	texts := map[string]string{}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil {
			t.Fatal(err)
		}
		texts[n] = string(b)
	}
	return texts
}

// noImporter gives nothing: go/types then makes an empty package and takes
// what is named in it as unknown, which is enough to resolve our own names.
type noImporter struct{}

func (noImporter) Import(string) (*gotypes.Package, error) { return nil, errors.New("not imported") }

func parseProgram(t *testing.T, texts map[string]string) *parsedProgram {
	t.Helper()
	p := &parsedProgram{
		fset:  gotoken.NewFileSet(),
		files: map[string]*goast.File{},
		info:  &gotypes.Info{Defs: map[*goast.Ident]gotypes.Object{}, Uses: map[*goast.Ident]gotypes.Object{}},
	}
	var list []*goast.File
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		f, err := goparser.ParseFile(p.fset, name, texts[name], goparser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		p.files[name] = f
		list = append(list, f)
	}
	conf := gotypes.Config{Importer: noImporter{}, Error: func(error) {}}
	p.pkg, _ = conf.Check("main", p.fset, list, p.info) // errors: see noImporter
	return p
}

func (p *parsedProgram) file(pos gotoken.Pos) string { return p.fset.Position(pos).Filename }

// each calls f for every node of every file, in order.
func (p *parsedProgram) each(f func(name string, n goast.Node)) {
	for _, name := range slices.Sorted(maps.Keys(p.files)) {
		goast.Inspect(p.files[name], func(n goast.Node) bool {
			f(name, n)
			return true
		})
	}
}

func rungOf(file string) (layer int, subject string, known bool) {
	for _, l := range ladder {
		if ok, _ := filepath.Match(l.file, file); ok {
			return l.layer, l.subject, true
		}
	}
	return 0, "", false
}

// layerFaults lists files that the ladder does not know, and references to
// what a file may not name.
func layerFaults(p *parsedProgram) []string {
	var faults []string
	for _, name := range slices.Sorted(maps.Keys(p.files)) {
		if _, _, known := rungOf(name); !known {
			faults = append(faults, name+" is not in the ladder")
		}
	}
	member := map[*goast.Ident]bool{} // x in a.x and {x: 1}: found by its type or not at all
	p.each(func(from string, n goast.Node) {
		switch n := n.(type) {
		case *goast.SelectorExpr:
			member[n.Sel] = true
		case *goast.KeyValueExpr:
			if id, ok := n.Key.(*goast.Ident); ok {
				member[id] = true
			}
		}
		id, ok := n.(*goast.Ident)
		if !ok {
			return
		}
		obj := p.ours(id, member[id])
		if obj == nil {
			return
		}
		to := p.file(obj.Pos())
		if !mayName(from, to) {
			faults = append(faults, fmt.Sprintf("%s names %s of %s", p.fset.Position(id.Pos()), id.Name, to))
		}
	})
	return faults
}

func mayName(from, to string) bool {
	a, subjectA, okA := rungOf(from)
	b, subjectB, okB := rungOf(to)
	return from == to || !okA || !okB || subjectA == subjectB || b < a
}

// ours is the declaration in this package that id refers to, nil when it
// refers to anything else. Methods and fields are where they are declared.
func (p *parsedProgram) ours(id *goast.Ident, member bool) gotypes.Object {
	if o := p.info.Uses[id]; o != nil {
		if _, isImport := o.(*gotypes.PkgName); isImport || o.Pkg() != p.pkg {
			return nil
		}
		return o
	}
	// go/types does not look at the type arguments of a type it does not know,
	// as all imported ones here: atomic.Pointer[ours].
	if _, defined := p.info.Defs[id]; !defined && !member {
		if o, ok := p.pkg.Scope().Lookup(id.Name).(*gotypes.TypeName); ok {
			return o
		}
	}
	return nil
}

func lengthFaults(p *parsedProgram) []string {
	var faults []string
	p.each(func(_ string, n goast.Node) {
		f, ok := n.(*goast.FuncDecl)
		if !ok {
			return
		}
		begin, end := p.fset.Position(f.Pos()), p.fset.Position(f.End())
		if lines := end.Line - begin.Line + 1; lines > longestFunction {
			faults = append(faults, fmt.Sprintf("%s: %s has %d lines, more than %d", begin, f.Name.Name, lines, longestFunction))
		}
	})
	return faults
}

func confinementFaults(p *parsedProgram) []string {
	var faults []string
	p.each(func(file string, n goast.Node) {
		if i, ok := n.(*goast.ImportSpec); ok && i.Name != nil && i.Name.Name == "." {
			faults = append(faults, fmt.Sprintf("%s: a dot import hides where names come from", p.fset.Position(i.Pos())))
		}
		sel, ok := n.(*goast.SelectorExpr)
		if !ok {
			return
		}
		pkg := p.imported(sel.X)
		for _, c := range confinedNames {
			if named, _ := filepath.Match(c.name, sel.Sel.Name); named && c.pkg == pkg && !slices.Contains(c.files, file) {
				faults = append(faults, fmt.Sprintf("%s: %s.%s belongs in %v", p.fset.Position(sel.Pos()), pkg, sel.Sel.Name, c.files))
			}
		}
	})
	return faults
}

// imported is the path of the package that x names, "" when it names none.
func (p *parsedProgram) imported(x goast.Expr) string {
	if id, ok := x.(*goast.Ident); ok {
		if pkg, ok := p.info.Uses[id].(*gotypes.PkgName); ok {
			return pkg.Imported().Path()
		}
	}
	return ""
}

// modFaults reads a go.mod. It lists the modules of every package in the
// build, indirect ones too, so that what it does not name is not built.
func modFaults(mod string) []string {
	var faults []string
	block := ""
	for i, line := range strings.Split(mod, "\n") {
		line, _, _ = strings.Cut(line, "//")
		words := strings.Fields(line)
		switch {
		case len(words) == 0:
			continue
		case words[0] == ")":
			block = ""
			continue
		case block != "":
			words = append([]string{block}, words...)
		case len(words) == 2 && words[1] == "(":
			block = words[0]
			continue
		}
		switch words[0] {
		case "module", "go", "toolchain":
		case "require":
			if len(words) != 3 || !slices.Contains(allowedModules, words[1]) {
				faults = append(faults, fmt.Sprintf("go.mod:%d: %s is not one of %v", i+1, strings.Join(words[1:], " "), allowedModules))
			}
		default: // replace, tool, exclude ...
			faults = append(faults, fmt.Sprintf("go.mod:%d: no use for %s", i+1, words[0]))
		}
	}
	return faults
}

// importFaults lists imports, of tests too, that are neither Go's own (no dot
// in the first element) nor of the three modules.
func importFaults(p *parsedProgram) []string {
	var faults []string
	p.each(func(_ string, n goast.Node) {
		i, ok := n.(*goast.ImportSpec)
		if !ok {
			return
		}
		path, err := strconv.Unquote(i.Path.Value)
		first, _, _ := strings.Cut(path, "/")
		inModule := func(m string) bool { return path == m || strings.HasPrefix(path, m+"/") }
		if err != nil || path == "C" || strings.Contains(first, ".") && !slices.ContainsFunc(allowedModules, inModule) {
			faults = append(faults, fmt.Sprintf("%s imports %s", p.fset.Position(i.Pos()), i.Path.Value))
		}
	})
	return faults
}

// TestRulesCanFail shows each rule a program that breaks it, and one beside it
// that does not.
func TestRulesCanFail(t *testing.T) {
	t.Parallel()
	type texts map[string]string
	long := func(lines int) string { return "package main\nfunc f() {\n" + strings.Repeat("\n", lines-2) + "}\n" }
	for _, c := range []struct {
		name  string
		rule  func(*parsedProgram) []string
		files texts
		want  string // in the only fault; "" = none
	}{
		{"a file names itself and lower ones", layerFaults, texts{
			"metrics.go": "package main; func low() {}",
			"cache.go":   "package main; func mid() { low(); mid() }",
		}, ""},
		{"an upward call", layerFaults, texts{
			"metrics.go": "package main; func low() { high() }",
			"main.go":    "package main; func high() {}",
		}, "metrics.go:1:28 names high of main.go"},
		{"an upward type", layerFaults, texts{
			"upstream.go": "package main; type low struct { f *high }",
			"cache.go":    "package main; type high struct{}",
		}, "names high of cache.go"},
		{"an upward method on a lower type", layerFaults, texts{
			"upstream.go": "package main; type low struct{}; func use(l low) { l.m() }",
			"cache.go":    "package main; func (low) m() {}",
		}, "names m of cache.go"},
		{"an upward field", layerFaults, texts{
			"cache.go": "package main; type low struct{ f int }; func use() { var l low; l.f++ }",
			"main.go":  "package main; type high struct{ low }; func f(h high) { h.f++ }",
		}, ""},
		{"an upward constant in a composite literal", layerFaults, texts{
			"remotes.go": "package main; var l = map[string]int{\"a\": high}",
			"api.go":     "package main; const high = 1",
		}, "names high of api.go"},
		{"an upward type as an argument of an imported one", layerFaults, texts{
			"remotes.go": "package main; import \"sync/atomic\"; type l struct { p atomic.Pointer[high] }",
			"api.go":     "package main; type high struct{}",
		}, "names high of api.go"},
		{"an upward name as an argument of an imported function", layerFaults, texts{
			"remotes.go": "package main; import \"fmt\"; func l() { fmt.Println(high) }",
			"api.go":     "package main; var high int",
		}, "names high of api.go"},
		{"an upward method of what an imported function returned", layerFaults, texts{
			"remotes.go": "package main; import \"sync\"; func l() { f := sync.OnceValue(func() int { return high() }); f() }",
			"api.go":     "package main; func high() int { return 0 }",
		}, "names high of api.go"},
		{"a neighbour of the same layer", layerFaults, texts{
			"respond.go": "package main; func a() { b() }",
			"metrics.go": "package main; func b() {}",
		}, "respond.go:1:26 names b of metrics.go"},
		{"api and store", layerFaults, texts{
			"api.go":   "package main; func a() { b() }",
			"store.go": "package main; func b() {}",
		}, "names b of store.go"},
		{"registry and api", layerFaults, texts{
			"registry.go": "package main; func a() { b() }",
			"api.go":      "package main; func b() {}",
		}, "names b of api.go"},
		{"cache and fill are one subject", layerFaults, texts{
			"cache.go": "package main; func a() { b() }",
			"fill.go":  "package main; func b() { a() }",
		}, ""},
		{"store and its parts are one subject", layerFaults, texts{
			"store.go":    "package main; func a() { b() }",
			"store_s3.go": "package main; func b() { a() }",
		}, ""},
		{"local names and labels are not references", layerFaults, texts{
			"respond.go": "package main; func a(high any) { type t struct{ high any }; _ = t{high: high}; switch high := high.(type) { case int: _ = high } }",
			"main.go":    "package main; type high int",
		}, ""},
		{"an unknown file", layerFaults, texts{"util.go": "package main"}, "util.go is not in the ladder"},

		{"a function of 120 lines", lengthFaults, texts{"cache.go": long(120)}, ""},
		{"a function of 121 lines", lengthFaults, texts{"cache.go": long(121)}, "f has 121 lines"},

		{"the clock in main", confinementFaults, texts{
			"main.go": "package main; import \"time\"; var now = time.Now",
		}, ""},
		{"the clock elsewhere", confinementFaults, texts{
			"cache.go": "package main; import \"time\"; var now = time.Now",
		}, "cache.go:1:40: time.Now belongs in [main.go]"},
		{"the clock under another name", confinementFaults, texts{
			"cache.go": "package main; import clock \"time\"; func f(t clock.Time) { _ = clock.Since(t) }",
		}, "time.Since"},
		{"a field called Now", confinementFaults, texts{
			"cache.go": "package main; import _ \"time\"; type s struct{ Now func() }; func f(time s) { time.Now() }",
		}, ""},
		{"a sleep, even in main", confinementFaults, texts{
			"main.go": "package main; import \"time\"; func f() { time.Sleep(1) }",
		}, "time.Sleep"},
		{"http.Error in a handler", confinementFaults, texts{
			"api.go": "package main; import \"net/http\"; func f() { http.Error(nil, \"\", 500) }",
		}, "net/http.Error"},
		{"http.Error in respond", confinementFaults, texts{
			"respond.go": "package main; import \"net/http\"; func f() { http.Error(nil, \"\", 500) }",
		}, ""},
		{"an exit below main", confinementFaults, texts{
			"store.go": "package main; import \"os\"; func f() { os.Exit(1) }",
		}, "os.Exit"},
		{"a fatal log below main", confinementFaults, texts{
			"store.go": "package main; import \"log\"; func f() { log.Fatalf(\"\") }",
		}, "log.Fatalf"},
		{"a dot import", confinementFaults, texts{
			"main.go": "package main; import . \"time\"",
		}, "dot import"},

		{"imports of Go and of the three", importFaults, texts{
			"main.go": "package main; import (_ \"net/http\"; _ \"gopkg.in/yaml.v3\"; _ \"github.com/gomodule/redigo/redis\")",
		}, ""},
		{"another import", importFaults, texts{
			"main.go": "package main; import _ \"github.com/other/thing\"",
		}, "github.com/other/thing"},
		{"an import whose name begins alike", importFaults, texts{
			"main.go": "package main; import _ \"github.com/lib/pqx\"",
		}, "github.com/lib/pqx"},
		{"cgo", importFaults, texts{"main.go": "package main; import \"C\""}, "\"C\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			wantFault(t, c.rule(parseProgram(t, c.files)), c.want)
		})
	}
}

func TestGoModRuleCanFail(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, mod, want string }{
		{"the three", "module m\n\ngo 1.26\n\nrequire (\n\tgithub.com/lib/pq v1.0.0\n\tgopkg.in/yaml.v3 v3.0.1 // why\n)\nrequire github.com/gomodule/redigo v1.9.0\n", ""},
		{"another", "module m\nrequire github.com/other/thing v1.0.0\n", "github.com/other/thing"},
		{"another in a block", "module m\nrequire (\n\tgithub.com/other/thing v1.0.0 // indirect\n)\n", "go.mod:3: github.com/other/thing"},
		{"a replacement", "module m\nreplace github.com/lib/pq => ../pq\n", "replace"},
		{"a tool", "module m\ntool (\n\tgithub.com/other/thing\n)\n", "tool"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			wantFault(t, modFaults(c.mod), c.want)
		})
	}
}

func wantFault(t *testing.T, faults []string, want string) {
	t.Helper()
	switch {
	case want == "" && len(faults) > 0:
		t.Errorf("want no fault, got %q", faults)
	case want != "" && (len(faults) != 1 || !strings.Contains(faults[0], want)):
		t.Errorf("want one fault with %q, got %q", want, faults)
	}
}
