// cache_names.go: roots, the files that name the SHA-256 of a repository's metadata:
// repomd.xml of package rpm, InRelease and Release of package deb. Where they are, how
// they are read, and which of the stored ones names a file.

package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"io/fs"
	"net/mail"
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
	// repomdPath is where rpm's root is.
	repomdPath = "repodata/repomd.xml"
)

// rootNames is what a root says. It is not changed after parseRoot.
type rootNames struct {
	sum        string               // SHA-256 of the root itself
	files      map[string]namedFile // by path, with the root's signature if that is a file of its own
	byHash     bool                 // Acquire-By-Hash: yes
	validUntil time.Time            // zero: it does not say
	isRoot     bool                 // it names files, if only by other hashes
}

// namedFile is a file as a root names it.
type namedFile struct {
	path, spelling string
	sha256         string // of a signature: that of the root, which is all that is known
	sha512         string // "": not given
	size           int64  // 0: not given
	kind           string // signatureKind; rpm: the type, such as primary; "" for deb
}

const signatureKind = "signature"

// parseRoot reads a root with the SHA-256 sum. What cannot be read names nothing.
func parseRoot(spelling string, text []byte, sum string) *rootNames {
	n := &rootNames{sum: sum, files: map[string]namedFile{}}
	folder, name := rootFolder(spelling), path.Base(spelling)
	if name == "repomd.xml" {
		n.readRepomd(folder, text)
	} else {
		n.readRelease(folder, string(text))
	}
	// InRelease has its signature inside.
	if signature := map[string]string{"repomd.xml": ".asc", "Release": ".gpg"}[name]; signature != "" && len(n.files) > 0 {
		n.add("", spelling+signature, namedFile{sha256: sum, kind: signatureKind})
	}
	return n
}

// readRepomd reads rpm's metadata index. A location with xml:base is somewhere else.
func (n *rootNames) readRepomd(folder string, text []byte) {
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
	n.isRoot = len(doc.Data) > 0
	for _, d := range doc.Data {
		if d.Checksum.Type == "sha256" && d.Location.Base == "" {
			n.add(folder, d.Location.Href, namedFile{sha256: strings.TrimSpace(d.Checksum.Hex), size: d.Size, kind: d.Type})
		}
	}
}

// readRelease reads the fields of a Debian archive's Release, which may be within a
// signed message (InRelease). It may name itself, which cannot be right.
func (n *rootNames) readRelease(folder, text string) {
	field, files := "", map[string]namedFile{}
	for line := range strings.Lines(text) {
		if line[0] != ' ' {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
			switch field = strings.ToLower(name); field {
			case "acquire-by-hash":
				n.byHash = strings.TrimSpace(value) == "yes"
			case "valid-until":
				value = strings.TrimSpace(value)
				if inUTC, found := strings.CutSuffix(value, " Z"); found {
					value = inUTC + " UTC"
				}
				n.validUntil, _ = mail.ParseDate(value) // zones are written in several ways
			}
			continue
		}
		words := strings.Fields(line)
		if len(words) != 3 || slices.Contains([]string{"InRelease", "Release", "Release.gpg"}, words[2]) {
			continue
		}
		n.isRoot = n.isRoot || slices.Contains([]string{"md5sum", "sha1", "sha256", "sha512"}, field)
		f := files[words[2]]
		switch {
		case field == "sha256":
			f.sha256 = words[0]
			f.size, _ = strconv.ParseInt(words[1], 10, 64)
		case field == "sha512" && isHex(words[0], 128):
			f.sha512 = words[0]
		}
		files[words[2]] = f
	}
	for escaped, f := range files {
		n.add(folder, escaped, f)
	}
}

// add adds a file by its escaped path, unless path or hash cannot be used.
func (n *rootNames) add(folder, escaped string, f namedFile) {
	var err error
	f.path, f.spelling, err = spellPath(folder+escaped, "")
	if err == nil && escaped != "" && isHex(f.sha256, 64) && len(namedSpelling(f.spelling, f.sha256)) <= maxSpelling {
		n.files[f.path] = f
	}
}

// successorOf returns the file of n that takes the place of an older root's file: the
// one of that kind for rpm, whose names may have a hash in them, else the one of that
// path.
func (n *rootNames) successorOf(old namedFile) (f namedFile, found bool) {
	if old.kind == "" {
		f, found = n.files[old.path]
		return f, found
	}
	for _, f := range n.files {
		if f.kind == old.kind {
			return f, true
		}
	}
	return namedFile{}, false
}

// agreesWith reports whether two roots of one folder are of one generation.
func (n *rootNames) agreesWith(other *rootNames) bool {
	for path, f := range n.files {
		if f.kind != signatureKind && f != other.files[path] {
			return false
		}
	}
	return true
}

// holdsGeneration reports whether clients cannot do without the file.
func (f namedFile) holdsGeneration() bool {
	kind := strings.TrimSuffix(strings.TrimSuffix(f.kind, "_db"), "_zck")
	if f.kind == "" {
		kind, _, _ = strings.Cut(path.Base(f.path), ".")
	}
	return slices.Contains([]string{signatureKind, "Packages", "Sources", "primary", "filelists", "updateinfo", "modules"}, kind)
}

// mayHaveRoot reports whether a root may name the file of t, or it is one. It is asked
// for every request, and costs files of other kinds a search in their path.
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

// rootFolder is the folder that the names in a root count from.
func rootFolder(spelling string) string {
	if folder, isRepomd := strings.CutSuffix(spelling, repomdPath); isRepomd {
		return folder
	}
	return spelling[:strings.LastIndexByte(spelling, '/')+1]
}

// folderID tells the folders of roots apart.
func (t *target) folderID() string { return t.remote.name + "/" + rootFolder(t.spelling) }

// rootAt is the root with that spelling.
func (r *remote) rootAt(spelling string) target {
	return target{remote: r, path: decodePath(spelling), spelling: spelling, wire: spelling, class: mutable, builtin: true}
}

// rootsIn are the roots that may be in a folder, the one that rules first.
func (r *remote) rootsIn(folder string) []target {
	if r.packageType == "rpm" {
		return []target{r.rootAt(folder + repomdPath)}
	}
	return []target{r.rootAt(folder + "InRelease"), r.rootAt(folder + "Release")}
}

// storedRoot is a root at its place. What the stored one names is the generation that
// clients see.
type storedRoot struct {
	target
	*rootNames
}

// openRoot returns a root if it is stored and names anything, whether or not it is
// fresh. A miss is fs.ErrNotExist.
func (g *generations) openRoot(ctx context.Context, t target) (*storedRoot, error) {
	key := t.key()
	cp, err := g.c.findCopy(ctx, key, fileRequest{target: t}, byteRange{head: true})
	if err != nil {
		return nil, err
	}
	names, found := g.parsed.get(key + cp.rec.SHA256)
	if !found {
		obj, err := g.c.objects.open(ctx, key, 0)
		if err != nil {
			return nil, err
		}
		defer obj.body.Close()
		text, err := readMetadata(obj.body)
		if err != nil {
			return nil, err
		}
		names = parseRoot(t.spelling, text, obj.rec.SHA256)
		g.parsed.put(key+names.sum, int64(len(text)), names)
	}
	if len(names.files) == 0 {
		return nil, fs.ErrNotExist
	}
	return &storedRoot{t, names}, nil
}

// readMetadata reads a root, which is not larger than maxMetadata.
func readMetadata(body io.Reader) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(body, maxMetadata+1))
	if err == nil && len(text) > maxMetadata {
		err = fmt.Errorf("%w: a root of more than %d bytes", errBadUpstream, maxMetadata)
	}
	return text, err
}

// findRoot returns the stored root that names the file of t, and as what. For a file that
// is a root itself that is the root alone, stored or not.
func (g *generations) findRoot(ctx context.Context, t *target) (*storedRoot, namedFile) {
	for _, folder := range t.rootFolders() {
		for _, at := range t.remote.rootsIn(folder) {
			if at.spelling == t.spelling {
				return &storedRoot{target: at}, namedFile{}
			}
			root, err := g.openRoot(ctx, at)
			if err != nil {
				continue
			}
			if f, found := root.find(t); found {
				return root, f
			}
		}
	}
	return nil, namedFile{}
}

// find returns a file of the root by its path or, for a name that is its own hash, by that.
func (root *storedRoot) find(t *target) (f namedFile, found bool) {
	if f, found = root.files[t.path]; found {
		return f, true
	}
	digest, _ := t.remote.digestInName(t.path)
	_, sum, promised := strings.Cut(digest, ":")
	for _, f := range root.files {
		if promised && (f.sha256 == sum || f.sha512 == sum) && path.Dir(f.path) == metadataFolder(t.path) {
			return f, true
		}
	}
	return namedFile{}, false
}

// metadataFolder is the folder of a file, or for a name below by-hash/ the one of the
// files that it stands for.
func metadataFolder(p string) string {
	if before, _, found := strings.Cut("/"+p, "/by-hash/"); found {
		return path.Clean(strings.TrimPrefix(before, "/"))
	}
	return path.Dir(p)
}
