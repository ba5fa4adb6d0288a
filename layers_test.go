// layers_test.go: what holds the shape of the program: the ladder of layers, the
// limits on sizes, and the rules on names, comments and log keys. Each rule is a
// function from sources to faults, and TestRulesCanFail shows that it finds one.

package main

import (
	"errors"
	"fmt"
	goast "go/ast"
	godoc "go/doc"
	goparser "go/parser"
	gotoken "go/token"
	gotypes "go/types"
	"maps"
	"os"
	"path/filepath"
	"regexp"
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
	{"respond_*.go", 0, "respond"},
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

// The limits on sizes. What is larger has two subjects, or hides one.
const (
	longestFile     = 700 // lines
	longestFunction = 60  // lines
	mostMethods     = 30  // of a type
	mostBools       = 4   // fields of a struct: more are a state machine without names
)

// EXCEPTIONS THAT MUST SHRINK: what was above a limit when the limit was made,
// with its size at that time. No line may be added and no number raised. A type
// that is back within the limit must leave its list, a test says so.
var (
	methodExceptions = map[string]int{}
	boolExceptions   = map[string]int{}
)

// wantNoFaults reports what a rule complains of.
func wantNoFaults(t *testing.T, faults []string) {
	t.Helper()
	for _, f := range faults {
		t.Error(f)
	}
}

func TestLayers(t *testing.T) {
	t.Parallel()
	wantNoFaults(t, layerFaults(readProgram(t)))
}

func TestFilesAndFunctionsAreShort(t *testing.T) {
	t.Parallel()
	wantNoFaults(t, lengthFaults(readProgram(t)))
}

func TestTypesAreSmall(t *testing.T) {
	t.Parallel()
	wantNoFaults(t, methodFaults(readProgram(t), methodExceptions))
	wantNoFaults(t, boolFaults(readProgram(t), boolExceptions))
}

func TestBuiltinsKeepTheirNames(t *testing.T) {
	t.Parallel()
	wantNoFaults(t, builtinFaults(readProgram(t)))
}

func TestErrorsHaveOneLogKey(t *testing.T) {
	t.Parallel()
	wantNoFaults(t, logKeyFaults(readProgram(t)))
}

// TestManualStandsAlone: what `go doc .` prints first is the comment of main.go.
func TestManualStandsAlone(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	wantNoFaults(t, manualFaults(parseProgram(t, readSources(t, names))))
}

func TestOnlyOwnDocumentsAreNamed(t *testing.T) {
	t.Parallel()
	wantNoFaults(t, documentFaults(readSources(t, listRepository(t))))
}

func TestMapIsComplete(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	wantNoFaults(t, mapFaults(string(text), listRepository(t)))
}

func TestClockAndExitsStayInTheirFiles(t *testing.T) {
	t.Parallel()
	wantNoFaults(t, confinementFaults(readProgram(t)))
}

func TestGoMod(t *testing.T) {
	t.Parallel()
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	wantNoFaults(t, modFaults(string(mod)))
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	wantNoFaults(t, importFaults(parseProgram(t, readSources(t, names))))
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

// listRepository lists the files that people write, by their path in the
// repository: not data, not vendor, not what a build makes.
func listRepository(t *testing.T) []string {
	t.Helper()
	var files []string
	for _, pattern := range []string{"*.go", "*.md", "*.yaml", "Dockerfile", ".ci/*", "testdata/*"} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
				files = append(files, name)
			}
		}
	}
	return files
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
		f, err := goparser.ParseFile(p.fset, name, texts[name], goparser.ParseComments|goparser.SkipObjectResolution)
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

// lengthFaults lists files and functions with too many lines.
func lengthFaults(p *parsedProgram) []string {
	var faults []string
	for _, name := range slices.Sorted(maps.Keys(p.files)) {
		if lines := p.fset.File(p.files[name].Pos()).LineCount(); lines > longestFile {
			faults = append(faults, fmt.Sprintf("%s has %d lines, more than %d", name, lines, longestFile))
		}
	}
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

// methodFaults lists types with too many methods.
func methodFaults(p *parsedProgram, exceptions map[string]int) []string {
	count := map[string]int{}
	p.each(func(_ string, n goast.Node) {
		if f, ok := n.(*goast.FuncDecl); ok && f.Recv != nil {
			count[receiverType(f.Recv.List[0].Type)]++
		}
	})
	return sizeFaults(count, "methods", mostMethods, exceptions)
}

// receiverType returns the name of T in T, *T, T[P] and *T[P, Q].
func receiverType(x goast.Expr) string {
	switch x := x.(type) {
	case *goast.Ident:
		return x.Name
	case *goast.StarExpr:
		return receiverType(x.X)
	case *goast.IndexExpr:
		return receiverType(x.X)
	case *goast.IndexListExpr:
		return receiverType(x.X)
	}
	return "?"
}

// boolFaults lists types with too many boolean fields. Fields of a named
// boolean type, of an atomic.Bool and of structs within the struct count too.
func boolFaults(p *parsedProgram, exceptions map[string]int) []string {
	count := map[string]int{}
	p.each(func(_ string, n goast.Node) {
		spec, ok := n.(*goast.TypeSpec)
		if !ok {
			return
		}
		goast.Inspect(spec.Type, func(n goast.Node) bool {
			if s, ok := n.(*goast.StructType); ok {
				count[spec.Name.Name] += p.countBools(s)
			}
			return true
		})
	})
	return sizeFaults(count, "boolean fields", mostBools, exceptions)
}

func (p *parsedProgram) countBools(s *goast.StructType) (n int) {
	for _, field := range s.Fields.List {
		sel, isSelector := field.Type.(*goast.SelectorExpr)
		atomic := isSelector && p.imported(sel.X) == "sync/atomic" && sel.Sel.Name == "Bool"
		for _, name := range field.Names {
			basic, isBasic := p.info.Defs[name].Type().Underlying().(*gotypes.Basic)
			if atomic || (isBasic && basic.Info()&gotypes.IsBoolean != 0) {
				n++
			}
		}
	}
	return n
}

// sizeFaults compares counts with their limit. An exception allows a larger
// count, and is a fault itself when nothing needs it.
func sizeFaults(count map[string]int, what string, limit int, exceptions map[string]int) []string {
	var faults []string
	for _, name := range slices.Sorted(maps.Keys(count)) {
		if most := max(limit, exceptions[name]); count[name] > most {
			faults = append(faults, fmt.Sprintf("%s has %d %s, more than %d", name, count[name], what, most))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(exceptions)) {
		if count[name] <= limit {
			faults = append(faults, fmt.Sprintf("%s has %d %s: remove it from the exceptions", name, count[name], what))
		}
	}
	return faults
}

// builtinFaults lists functions, methods, variables and types that have the
// name of a builtin function. A field may have one. So may a method that is
// called delete: no other word says it.
func builtinFaults(p *parsedProgram) []string {
	var faults []string
	p.each(func(_ string, n goast.Node) {
		id, ok := n.(*goast.Ident)
		if !ok || p.info.Defs[id] == nil || id.Name == "delete" {
			return
		}
		if v, ok := p.info.Defs[id].(*gotypes.Var); ok && v.IsField() {
			return
		}
		if _, ok := gotypes.Universe.Lookup(id.Name).(*gotypes.Builtin); ok {
			faults = append(faults, fmt.Sprintf("%s: %s is the name of a builtin", p.fset.Position(id.Pos()), id.Name))
		}
	})
	return faults
}

// logCalls names the methods of a slog.Logger, and the functions of slog, whose
// arguments have keys.
var logCalls = []string{"Debug", "DebugContext", "Info", "InfoContext", "Warn", "WarnContext", "Error", "ErrorContext", "Log", "LogAttrs", "With", "Any", "String"}

// logKeyFaults lists log lines that call an error "err": a search for "error"
// has to find them all.
func logKeyFaults(p *parsedProgram) []string {
	var faults []string
	p.each(func(_ string, n goast.Node) {
		call, ok := n.(*goast.CallExpr)
		if !ok {
			return
		}
		sel, ok := call.Fun.(*goast.SelectorExpr)
		if !ok || !slices.Contains(logCalls, sel.Sel.Name) {
			return
		}
		for _, arg := range call.Args {
			if lit, ok := arg.(*goast.BasicLit); ok && lit.Value == `"err"` {
				faults = append(faults, fmt.Sprintf(`%s: the log key of an error is "error"`, p.fset.Position(lit.Pos())))
			}
		}
	})
	return faults
}

// manualFaults lists files beside main.go whose comment touches the package
// clause, and says when go/doc makes anything else of the whole package than
// the comment of main.go.
func manualFaults(p *parsedProgram) []string {
	var faults []string
	var list []*goast.File
	manual := ""
	for _, name := range slices.Sorted(maps.Keys(p.files)) {
		f := p.files[name]
		list = append(list, f)
		switch {
		case name == "main.go":
			manual = f.Doc.Text()
		case f.Doc != nil:
			faults = append(faults, fmt.Sprintf("%s: a blank line belongs between the comment and the package clause", p.fset.Position(f.Doc.Pos())))
		}
	}
	pkg, err := godoc.NewFromFiles(p.fset, list, "artifactapi")
	switch {
	case err != nil:
		faults = append(faults, err.Error())
	case manual == "":
		faults = append(faults, "main.go has no manual")
	case len(faults) == 0 && pkg.Doc != manual:
		faults = append(faults, "the package comment is not that of main.go: "+pkg.Doc)
	}
	return faults
}

// documentName is what a document for people is called here.
var documentName = regexp.MustCompile(`\b[A-Z][A-Z_]*\.md\b`)

// documentFaults lists where a file names a document that is not in the
// repository: a reader cannot look it up. The rule itself, a section of
// README.md or the standard belongs there.
func documentFaults(texts map[string]string) []string {
	var faults []string
	for _, file := range slices.Sorted(maps.Keys(texts)) {
		for i, line := range strings.Split(texts[file], "\n") {
			for _, name := range documentName.FindAllString(line, -1) {
				if _, exists := texts[name]; !exists {
					faults = append(faults, fmt.Sprintf("%s:%d: %s is not in the repository", file, i+1, name))
				}
			}
		}
	}
	return faults
}

// sourceName is a Go file as ARCHITECTURE.md names it, or a family of them.
var sourceName = regexp.MustCompile(`[A-Za-z0-9_.*/-]*[A-Za-z0-9_*]\.go\b`)

// mapFaults compares ARCHITECTURE.md with the files that are there: it names
// each production file in full, and names no file that is missing.
func mapFaults(text string, files []string) []string {
	var faults []string
	names := sourceName.FindAllString(text, -1)
	for _, file := range files {
		if _, _, inLadder := rungOf(file); inLadder && !strings.HasSuffix(file, "_test.go") && !slices.Contains(names, file) {
			faults = append(faults, "ARCHITECTURE.md does not name "+file)
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		exists := func(file string) bool { ok, _ := filepath.Match(name, file); return ok }
		if !slices.ContainsFunc(files, exists) {
			faults = append(faults, "ARCHITECTURE.md names "+name+", which does not exist")
		}
	}
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
	methods := func(name string, n int) (text string) {
		for i := range n {
			text += fmt.Sprintf("; func %s%d() {}", name, i)
		}
		return text
	}
	type sizeRule = func(*parsedProgram, map[string]int) []string
	noExceptions := func(rule sizeRule) func(*parsedProgram) []string {
		return func(p *parsedProgram) []string { return rule(p, nil) }
	}
	exceptA := func(rule sizeRule, most int) func(*parsedProgram) []string {
		return func(p *parsedProgram) []string { return rule(p, map[string]int{"a": most}) }
	}
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

		{"a function of 60 lines", lengthFaults, texts{"cache.go": long(60)}, ""},
		{"a function of 61 lines", lengthFaults, texts{"cache.go": long(61)}, "f has 61 lines"},
		{"a file of 700 lines", lengthFaults, texts{"cache.go": "package main\n" + strings.Repeat("// line\n", 699)}, ""},
		{"a file of 701 lines", lengthFaults, texts{"cache.go": "package main\n" + strings.Repeat("// line\n", 700)}, "cache.go has 701 lines"},

		{"a type of 30 methods", noExceptions(methodFaults), texts{
			"cache.go": "package main; type a struct{}; type b struct{}" + methods("(a) a", 15) + methods("(*a) b", 15) + methods("(b) a", 15),
		}, ""},
		{"a type of 31 methods in two files", noExceptions(methodFaults), texts{
			"cache.go":       "package main; type a struct{}" + methods("(a) a", 15),
			"cache_local.go": "package main" + methods("(x *a) b", 16),
		}, "a has 31 methods, more than 30"},
		{"a generic type of 31 methods", noExceptions(methodFaults), texts{
			"cache.go": "package main; type a[K, V any] struct{}" + methods("(*a[K, V]) a", 31),
		}, "a has 31 methods"},
		{"a type as large as its exception", exceptA(methodFaults, 40), texts{
			"cache.go": "package main; type a struct{}" + methods("(a) a", 40),
		}, ""},
		{"a type that has outgrown its exception", exceptA(methodFaults, 40), texts{
			"cache.go": "package main; type a struct{}" + methods("(a) a", 41),
		}, "a has 41 methods, more than 40"},
		{"an exception that is not needed", exceptA(methodFaults, 40), texts{
			"cache.go": "package main; type a struct{}" + methods("(a) a", 30),
		}, "a has 30 methods: remove it from the exceptions"},

		{"a struct with 4 booleans", noExceptions(boolFaults), texts{
			"fill.go": "package main; type a struct{ a, b bool; c, d bool; f func(x, y bool) bool; g int }",
		}, ""},
		{"a struct with 5 booleans", noExceptions(boolFaults), texts{
			"fill.go": "package main; import \"sync/atomic\"; type flag bool; type a struct{ b, c bool; d flag; s struct{ e bool }; f atomic.Bool }",
		}, "a has 5 boolean fields, more than 4"},
		{"a struct with as many booleans as its exception", exceptA(boolFaults, 5), texts{
			"fill.go": "package main; type a struct{ a, b, c, d, e bool }",
		}, ""},
		{"an exception for a type that is gone", exceptA(boolFaults, 5), texts{
			"fill.go": "package main",
		}, "a has 0 boolean fields: remove it from the exceptions"},

		{"a field with the name of a builtin, and a method delete", builtinFaults, texts{
			"store.go": "package main; type s struct{ copy bool }; func (s) delete() { _ = s{copy: true}; close(make(chan int)) }",
		}, ""},
		{"a method with the name of a builtin", builtinFaults, texts{
			"store.go": "package main; type s struct{}; func (s) close() {}",
		}, "store.go:1:41: close is the name of a builtin"},
		{"a method of an interface with the name of a builtin", builtinFaults, texts{
			"store.go": "package main; type s interface{ copy() }",
		}, "copy is the name of a builtin"},
		{"a function with the name of a builtin", builtinFaults, texts{
			"store.go": "package main; func recover() {}",
		}, "recover is the name of a builtin"},
		{"a variable with the name of a builtin", builtinFaults, texts{
			"store.go": "package main; func f(new int) { _ = new }",
		}, "new is the name of a builtin"},

		{"errors under their key", logKeyFaults, texts{
			"store.go": "package main; func f(log l, err error) { log.Warn(\"err\" + \"or\", \"error\", err); log.get(\"err\") }",
		}, ""},
		{"an error under another key", logKeyFaults, texts{
			"store.go": "package main; func f(s struct{ log l }, err error) { s.log.Warn(\"reading\", \"key\", 1, \"err\", err) }",
		}, `the log key of an error is "error"`},
		{"an error under another key in an attribute", logKeyFaults, texts{
			"store.go": "package main; import \"log/slog\"; func f(err error) slog.Attr { return slog.Any(\"err\", err) }",
		}, `the log key of an error is "error"`},

		{"the manual alone", manualFaults, texts{
			"main.go":      "// Artifactapi caches.\npackage main\n",
			"fill.go":      "// fill.go: the fetch of a file.\n\npackage main\n",
			"fill_test.go": "package main\n",
		}, ""},
		{"no manual", manualFaults, texts{
			"main.go": "// main.go: wiring.\n\npackage main\n",
		}, "main.go has no manual"},
		{"a second package comment", manualFaults, texts{
			"main.go": "// Artifactapi caches.\npackage main\n",
			"fill.go": "// fill.go: the fetch of a file.\npackage main\n",
		}, "fill.go:1:1: a blank line"},
		{"a package comment in a test", manualFaults, texts{
			"main.go":      "// Artifactapi caches.\npackage main\n",
			"fill_test.go": "// Tests of fills.\npackage main\n",
		}, "fill_test.go:1:1: a blank line"},

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

func TestDocumentRuleCanFail(t *testing.T) {
	t.Parallel()
	missing := "NOT_HERE" + ".md" // the rule reads this file too
	for _, c := range []struct {
		name  string
		texts map[string]string
		want  string
	}{
		{"a document that is there", map[string]string{"README.md": "", "cache.go": "// see README.md,\n// \"Limits\""}, ""},
		{"other names that end alike", map[string]string{"cache.go": "x.md, aREADME.mdx"}, ""},
		{"a comment", map[string]string{"README.md": "", "cache.go": "package main\n\n// (" + missing + " section 4)"}, "cache.go:3: " + missing},
		{"a document", map[string]string{"README.md": "[more](" + missing + ")"}, "README.md:1: " + missing},
		{"a script", map[string]string{".ci/run": "# as in " + missing}, ".ci/run:1: " + missing},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			wantFault(t, documentFaults(c.texts), c.want)
		})
	}
}

func TestMapRuleCanFail(t *testing.T) {
	t.Parallel()
	files := []string{"cache.go", "fill.go", "fill_test.go", "README.md", ".ci/origin.go"}
	for _, c := range []struct{ name, text, want string }{
		{"all files", "`cache.go` asks fill.go (fill_*.go: its tests); .ci/origin.go is for runs.", ""},
		{"a file that is not named", "cache.go, fill_test.go", "does not name fill.go"},
		{"a file that is named by its family alone", "cache.go, f*.go", "does not name fill.go"},
		{"a file that does not exist", "cache.go, fill.go, `cache_old.go`", "names cache_old.go, which does not exist"},
		{"a family that does not exist", "cache.go, fill.go, api_*.go", "names api_*.go, which does not exist"},
		{"a file in a directory that does not exist", "cache.go, fill.go, .ci/run.go", "names .ci/run.go, which does not exist"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			wantFault(t, mapFaults(c.text, files), c.want)
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
