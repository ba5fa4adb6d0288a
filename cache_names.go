// cache_names.go: roots, the files that name the SHA-256 of a repository's metadata:
// repomd.xml of package rpm, InRelease and Release of package deb. How they are read,
// and which of the stored ones names a file.

package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// maxMetadata bounds a root in bytes. The largest known one has under 1 MiB.
	maxMetadata = 16 << 20
	// parsedRootsBudget bounds the bytes of the roots that are kept parsed. Debian's
	// InRelease has 140 KB.
	parsedRootsBudget = 16 << 20
	// maxRootFolders bounds in how many folders below dists/ a root is looked for.
	// Names of suites have one or two elements, security.debian.org's have two.
	maxRootFolders = 4
)

// rootNames is what a root says. It is not changed after parseRoot.
type rootNames struct {
	sum        string               // SHA-256 of the root itself
	files      map[string]namedFile // by decoded path below the root's folder
	byHash     bool                 // Acquire-By-Hash: yes
	validUntil time.Time            // zero: it does not say
}

// namedFile is a file as a root names it.
type namedFile struct {
	spelling string // below the root's folder
	sha256   string
	size     int64  // 0: not given
	kind     string // rpm: the type, such as primary; "" for deb
}

// parseRoot reads a root with the SHA-256 sum. What cannot be read names nothing.
func parseRoot(name string, text []byte, sum string) *rootNames {
	n := &rootNames{sum: sum, files: map[string]namedFile{}}
	if path.Base(name) == "repomd.xml" {
		n.readRepomd(text)
	} else {
		n.readRelease(string(text))
	}
	return n
}

// readRepomd reads rpm's metadata index. A location with xml:base is somewhere else.
func (n *rootNames) readRepomd(text []byte) {
	var doc struct {
		XMLName xml.Name `xml:"repomd"`
		Data    []struct {
			Type     string `xml:"type,attr"`
			Checksum struct {
				Type string `xml:"type,attr"`
				Hex  string `xml:",chardata"`
			} `xml:"checksum"`
			Location struct {
				Href string `xml:"href,attr"`
				Base string `xml:"http://www.w3.org/XML/1998/namespace base,attr"`
			} `xml:"location"`
			Size int64 `xml:"size"`
		} `xml:"data"`
	}
	if xml.NewDecoder(bytes.NewReader(text)).Decode(&doc) != nil {
		return
	}
	for _, d := range doc.Data {
		if d.Checksum.Type == "sha256" && d.Location.Base == "" {
			n.add(d.Location.Href, namedFile{sha256: strings.TrimSpace(d.Checksum.Hex), size: d.Size, kind: d.Type})
		}
	}
}

// readRelease reads the fields of a Debian archive's Release, which may be within a
// signed message (InRelease). It may name itself, which cannot be right.
func (n *rootNames) readRelease(text string) {
	field := ""
	for line := range strings.Lines(text) {
		if line[0] != ' ' {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
			switch field = strings.ToLower(name); field {
			case "acquire-by-hash":
				n.byHash = strings.TrimSpace(value) == "yes"
			case "valid-until":
				n.validUntil, _ = time.Parse(time.RFC1123, strings.TrimSpace(value))
			}
			continue
		}
		words := strings.Fields(line)
		if field == "sha256" && len(words) == 3 && !slices.Contains([]string{"InRelease", "Release", "Release.gpg"}, words[2]) {
			size, _ := strconv.ParseInt(words[1], 10, 64)
			n.add(words[2], namedFile{sha256: words[0], size: size})
		}
	}
}

// add adds a file by its escaped path, unless path or hash cannot be used.
func (n *rootNames) add(escaped string, f namedFile) {
	path, spelling, err := spellPath(escaped, "")
	if err == nil && path != "" && isHex(f.sha256, 64) {
		f.spelling = spelling
		n.files[path] = f
	}
}

// successorOf returns the file of n that takes the place of an older root's file: the
// one of that type for rpm, whose names may have a hash in them, else the one of that
// path.
func (n *rootNames) successorOf(path string, old namedFile) (name string, f namedFile, found bool) {
	if old.kind == "" {
		f, found = n.files[path]
		return path, f, found
	}
	for name, f := range n.files {
		if f.kind == old.kind {
			return name, f, true
		}
	}
	return "", namedFile{}, false
}

// holdsGeneration reports whether clients cannot do without the file.
func (f namedFile) holdsGeneration() bool {
	kind := strings.TrimSuffix(strings.TrimSuffix(f.kind, "_db"), "_zck")
	if f.kind == "" {
		kind, _, _ = strings.Cut(path.Base(f.spelling), ".")
	}
	return slices.Contains([]string{"Packages", "Sources", "primary", "filelists", "updateinfo", "modules"}, kind)
}

// mayHaveRoot reports whether a root may name the file of t, or it is one. It is asked
// for every request, and other files pay a search in their path for it.
func (t *target) mayHaveRoot() bool {
	switch {
	case t.remote.local:
		return false
	case t.remote.packageType == "rpm":
		return strings.Contains(t.spelling, "repodata/")
	case t.remote.packageType == "deb": // in a flat repository built-in patterns find the metadata
		return t.builtin || strings.Contains(t.spelling, "dists/") || strings.Contains(t.spelling, "by-hash/")
	}
	return false
}

// rootFolders are the spellings of the folders in which a root of t may be, from the
// top: a root that names another root rules over it.
func (t *target) rootFolders() (folders []string) {
	dir := "/" + t.spelling[:strings.LastIndexByte(t.spelling, '/')+1]
	if t.remote.packageType == "rpm" {
		if i := strings.LastIndex(dir, "/repodata/"); i >= 0 {
			return []string{dir[1 : i+1]}
		}
		return nil
	}
	if i := strings.Index(dir, "/by-hash/"); i >= 0 {
		dir = dir[:i+1]
	}
	const dists = "/dists/"
	i := strings.Index(dir, dists)
	if i < 0 {
		return []string{dir[1:]}
	}
	for at := i + len(dists); at < len(dir) && len(folders) < maxRootFolders; {
		at += strings.IndexByte(dir[at:], '/') + 1
		folders = append(folders, dir[1:at])
	}
	return folders
}

// rootsIn are the roots that may be in a folder, the one that rules first.
func (r *remote) rootsIn(folder string) (roots []target) {
	names := []string{"InRelease", "Release"}
	if r.packageType == "rpm" {
		names = []string{"repodata/repomd.xml"}
	}
	for _, name := range names {
		roots = append(roots, target{remote: r, path: decodePath(folder) + name, spelling: folder + name, wire: folder + name, class: mutable, builtin: true})
	}
	return roots
}

// signatureOf returns the path of the root's signature in a file of its own: "" for
// InRelease, which has it inside.
func signatureOf(root target) string {
	switch path.Base(root.spelling) {
	case "repomd.xml":
		return root.spelling + ".asc"
	case "Release":
		return root.spelling + ".gpg"
	}
	return ""
}

// storedRoot is a root at its place. What the stored one names is the generation that
// clients see.
type storedRoot struct {
	target
	*rootNames
	folder string // spelling; the names count from here
	rec    *record
}

// openRoot returns a root if it is stored, whether or not it is fresh.
func (g *generations) openRoot(ctx context.Context, folder string, t target) *storedRoot {
	key := t.key()
	cp, err := g.c.findCopy(ctx, key, fileRequest{target: t}, byteRange{head: true})
	if err != nil {
		return nil
	}
	if names, found := g.parsed.get(key + cp.rec.SHA256); found {
		return &storedRoot{t, names, folder, cp.rec}
	}
	obj, err := g.c.objects.open(ctx, key, 0)
	if err != nil {
		return nil
	}
	defer obj.body.Close()
	text, err := readMetadata(obj.body)
	if err != nil {
		return nil
	}
	names := parseRoot(t.path, text, obj.rec.SHA256)
	g.parsed.put(key+names.sum, int64(len(text)), names)
	return &storedRoot{t, names, folder, obj.rec}
}

// readMetadata reads a root, which is not larger than maxMetadata.
func readMetadata(body io.Reader) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(body, maxMetadata+1))
	if err == nil && len(text) > maxMetadata {
		err = fmt.Errorf("%w: a root of more than %d bytes", errBadUpstream, maxMetadata)
	}
	return text, err
}

// rulingRoot is the stored root in a folder that names anything, or nil.
func (g *generations) rulingRoot(ctx context.Context, r *remote, folder string) *storedRoot {
	for _, t := range r.rootsIn(folder) {
		if root := g.openRoot(ctx, folder, t); root != nil && len(root.files) > 0 {
			return root
		}
	}
	return nil
}

// nameOf returns the name that a file of the root has, by its path or, for a name that
// is its own hash, by that.
func (root *storedRoot) nameOf(t *target, digest string) (name string, found bool) {
	name, below := strings.CutPrefix(t.path, decodePath(root.folder))
	if _, found = root.files[name]; below && found {
		return name, true
	}
	for name, f := range root.files {
		if digest == "sha256:"+f.sha256 && path.Dir(name) == root.folderOf(t.path) {
			return name, true
		}
	}
	return "", false
}

// folderOf is the folder of a file below the root's, or for a name below by-hash/ the
// one of the files that it stands for.
func (root *storedRoot) folderOf(p string) string {
	p = strings.TrimPrefix(p, decodePath(root.folder))
	if before, _, found := strings.Cut(p, "by-hash/"); found {
		return path.Clean(before)
	}
	return path.Dir(p)
}

// readMetadataNames returns the spellings under which the files are stored that the
// root at a decoded path names.
func readMetadataNames(path string, body []byte) (spellings []string) {
	hash := newBodyHash("")
	_, _ = hash.Write(body)
	names := parseRoot(path, body, hash.sumHex())
	_, spelling, _ := spellPath(strings.ReplaceAll(path, "%", "%25"), "")
	root := target{remote: &remote{packageType: "deb"}, spelling: spelling}
	folder := spelling[:strings.LastIndexByte(spelling, '/')+1]
	if strings.HasSuffix(spelling, "/repomd.xml") {
		root.remote.packageType = "rpm"
		folder = strings.TrimSuffix(folder, "repodata/")
	}
	stored := &storedRoot{root, names, folder, nil}
	for name := range names.files {
		for _, req := range stored.requestsFor(name, nil) {
			spellings = append(spellings, req.spelling)
		}
	}
	return append(spellings, namedSpelling(signatureOf(root), names.sum))
}
