// api_index.go: finds the files of a prefetch run: those that are named, and those that
// match a pattern in the index that the remote itself has of them.

package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"compress/bzip2"
	"compress/gzip"
	"encoding/xml"
	"errors"
	"html"
	"io"
	"io/fs"
	"iter"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

const (
	// maxIndexPages and maxIndexDepth bound a crawl: an upstream's listings may have
	// no end.
	maxIndexPages = 10_000
	maxIndexDepth = 32
	// maxIndexItem bounds a line or a package of an index, in bytes. The longest
	// real ones, with lists of dependencies, have some 100 KB.
	maxIndexItem = 1 << 20
)

// prefetchFinder finds the files of a run, each once. One goroutine uses it.
type prefetchFinder struct {
	*prefetchRun
	seen      map[string]struct{} // keys, and remotes and paths of what has none
	manifests []job               // to be read here, since they name other files
	refused   int                 // files that match, but the remote's patterns refuse
}

// find finds all. Manifests come last, one after the other, while other files are
// fetched.
func (p *prefetchFinder) find() {
	for _, f := range p.named {
		p.addFound(f, 0)
	}
	if p.pattern != nil {
		p.findMatching()
	}
	for len(p.manifests) > 0 && p.ctx.Err() == nil {
		j := p.manifests[0]
		p.manifests = p.manifests[1:]
		p.readManifest(j)
	}
}

// addFound adds a file, once, or tells why it cannot be had.
func (p *prefetchFinder) addFound(f wantedFile, size int64) {
	file, err := fileRequest{}, f.err
	if err == nil {
		file, err = p.findFile(f.way)
	}
	key := f.remote + " " + f.path
	if err == nil {
		key = file.key()
	}
	if _, twice := p.seen[key]; twice {
		return
	}
	if len(p.seen) < maxPrefetchFiles {
		p.seen[key] = struct{}{}
	} else if err == nil {
		err = newProblem(http.StatusRequestEntityTooLarge, "a run has at most %d files: narrow it by prefix or pattern", maxPrefetchFiles)
	}
	if err != nil {
		if f.remote == "" && file.remote != nil { // it was named by its URL here
			f.remote, f.path = file.remote.name, cmp.Or(file.path, f.path)
		}
		p.fail(f.remote, f.path, err)
		return
	}
	p.mu.Lock()
	p.sum.Found++
	p.mu.Unlock()
	switch stored := file.asStored(p.ctx, p.api.cache); {
	case imageOfManifest(file) != "":
		p.manifests = append(p.manifests, job{f.way, size})
	case stored.rulesOthers(): // before the files behind it are asked for
		p.fetch(job{f.way, size}, &p.read, false)
	default:
		p.jobs <- job{f.way, size}
	}
}

// findMatching adds the files of the remote that match.
func (p *prefetchFinder) findMatching() {
	switch {
	case p.remote.packageType == "docker":
		p.findTags()
	case p.remote.packageType == "alpine":
		p.findAPKs()
	case p.remote.packageType == "rpm":
		p.findRPMs()
	case p.remote.packageType == "deb" || strings.Contains("/"+p.prefix, "/dists/"):
		p.findDebs()
	default:
		p.crawl()
	}
	if p.refused > 0 && len(p.seen) == 0 {
		p.fail(p.remote.name, p.prefix, newProblem(http.StatusForbidden, "%d files match, but the patterns of remote %q allow none of them", p.refused, p.remote.name))
	}
}

// addMatching adds the file at a path here, which an index names, if it matches the
// pattern. What the remote's own patterns refuse counts as not there. A size that is no
// number is not known.
func (p *prefetchFinder) addMatching(way, size string) {
	file, err := p.findFile(way)
	name := cmp.Or(file.path, strings.TrimPrefix(way, p.remote.urlPath()))
	switch {
	case !p.pattern.MatchString(name):
	case errors.Is(err, errDenied):
		p.refused++
	default:
		n, _ := strconv.ParseInt(size, 10, 64)
		p.addFound(wantedFile{p.remote.name, name, way, nil}, n)
	}
}

// here returns the path here of what lies below the prefix.
func (p *prefetchFinder) here(name string) string { return p.remote.pathHere(p.prefix + name) }

// openIndex opens what findFile has found, for reading what it names. Where no pattern
// allows it, it is read from upstream and not stored. The caller closes the body.
func (p *prefetchFinder) openIndex(file fileRequest, err error) (*fileReply, error) {
	switch {
	case err == nil:
		return p.api.cache.findOrFetch(p.ctx, file, byteRange{to: -1, ahead: true})
	case errors.Is(err, errDenied):
		return p.api.cache.passOnReply(p.ctx, file, false)
	}
	return nil, err
}

// readIndex reads the index at a path here by a function that gets it decompressed.
func (p *prefetchFinder) readIndex(way string, read func(io.Reader) error) error {
	file, err := p.findFile(way)
	if way == p.remote.urlPath() { // the listing of base_url itself, which a GET here does not ask for
		file, err = fileRequest{target: target{remote: p.remote}}, errDenied
	}
	reply, err := p.openIndex(file, err)
	if err != nil {
		return err
	}
	defer reply.body.Close()
	plain, err := decompress(reply.body)
	if err == nil {
		err = read(plain)
	}
	return newDamagedError(err)
}

// newDamagedError is the problem of an index that cannot be read; nil for nil.
func newDamagedError(err error) error {
	if _, isProblem := errors.AsType[*problem](err); err == nil || isProblem {
		return err
	}
	return &problem{status: http.StatusBadGateway, cause: err, detail: "this index cannot be read: it broke off, is damaged or too large"}
}

// failIndex tells that the index at a path here could not be read, if err says so.
func (p *prefetchFinder) failIndex(r *remote, way string, err error) {
	if err != nil {
		p.fail(r.name, decodePath(strings.TrimPrefix(way, r.urlPath())), err)
	}
}

// compressions are those that are not read here, by what a file begins with.
var compressions = map[string]string{"\x28\xb5\x2f\xfd": "zstd", "\xfd7zXZ": "xz", "\x04\x22\x4d\x18": "lz4", "\x5d\x00\x00": "lzma"}

// decompress returns the plain text of r, whose first bytes say how it is compressed.
// A compression that is not read here is a problem that says what else to do.
func decompress(r io.Reader) (io.Reader, error) {
	b := bufio.NewReaderSize(r, copyBufferSize)
	begin, _ := b.Peek(6) // an error comes again
	switch {
	case bytes.HasPrefix(begin, []byte("\x1f\x8b")):
		return gzip.NewReader(b)
	case bytes.HasPrefix(begin, []byte("BZh")):
		return bzip2.NewReader(b), nil
	}
	for magic, name := range compressions {
		if bytes.HasPrefix(begin, []byte(magic)) {
			return nil, newProblem(http.StatusNotImplemented, "this index is compressed with %s, which is not read here: give paths, or as text the URLs that the package manager prints (dnf download --url, apt-get --print-uris)", name)
		}
	}
	return b, nil
}

// readStanzas reads a text of stanzas with "KEY: VALUE" lines, and calls f with the
// values of these keys for each stanza that has the first.
func readStanzas(r io.Reader, f func(values []string), keys ...string) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxIndexItem)
	values := make([]string, len(keys))
	end := func() {
		if values[0] != "" {
			f(values)
		}
		clear(values)
	}
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		if i := slices.Index(keys, key); i >= 0 { // the line of a longer value begins with a space
			values[i] = strings.TrimSpace(value)
		} else if key == "" {
			end()
		}
	}
	end()
	return lines.Err()
}

// findAPKs reads APKINDEX.tar.gz. It is several gzip members: of the signature and of
// the index.
func (p *prefetchFinder) findAPKs() {
	way := p.here("APKINDEX.tar.gz")
	p.failIndex(p.remote, way, p.readIndex(way, func(r io.Reader) error {
		for archive := tar.NewReader(r); ; {
			h, err := archive.Next()
			if err != nil {
				return err
			}
			if h.Name == "APKINDEX" {
				return readStanzas(archive, func(v []string) { p.addMatching(p.here(v[0]+"-"+v[1]+".apk"), v[2]) }, "P", "V", "S")
			}
		}
	}))
}

// rpmElement is a "data" of repomd.xml, or a "package" of primary.xml.
type rpmElement struct {
	Type     string `xml:"type,attr"`
	Location struct {
		Href string `xml:"href,attr"`
	} `xml:"location"`
	Size struct {
		Package string `xml:"package,attr"`
	} `xml:"size"`
}

// findRPMs reads repodata: repomd.xml, and the primary.xml that it names.
func (p *prefetchFinder) findRPMs() {
	way, primary := p.here("repodata/repomd.xml"), ""
	err := p.readIndex(way, func(r io.Reader) error {
		return readElements(r, "data", func(data *rpmElement) {
			if data.Type == "primary" {
				primary = data.Location.Href
			}
		})
	})
	if err == nil && primary == "" {
		err = newProblem(http.StatusBadGateway, "it names no primary.xml")
	}
	if err == nil {
		way = p.here("") + primary
		err = p.readIndex(way, func(r io.Reader) error {
			return readElements(r, "package", func(e *rpmElement) { p.addMatching(p.here("")+e.Location.Href, e.Size.Package) })
		})
	}
	p.failIndex(p.remote, way, err)
}

// readElements calls f for each element of that name in an XML document. It holds one
// at a time.
func readElements(r io.Reader, name string, f func(*rpmElement)) error {
	bounded := &io.LimitedReader{R: r}
	d := xml.NewDecoder(bounded)
	for {
		bounded.N = maxIndexItem
		t, err := d.Token() // it notices a document that is cut, here or by the bound
		if err == io.EOF {
			return nil
		}
		if e, ok := t.(xml.StartElement); ok && err == nil && e.Name.Local == name {
			var element rpmElement
			if err = d.DecodeElement(&element, &e); err == nil {
				f(&element)
			}
		}
		if err != nil {
			return err
		}
	}
}

// findDebs reads the Packages that the Release of the suite prefix names, which may be
// named without "dists/", or else the one in the folder prefix.
func (p *prefetchFinder) findDebs() {
	suite := p.prefix
	for _, name := range []string{suite + "InRelease", suite + "Release", "dists/" + suite + "InRelease", "dists/" + suite + "Release"} {
		folders := map[string]bool{}
		err := p.readIndex(p.remote.pathHere(name), func(r io.Reader) error {
			text, err := readMetadata(r)
			for file := range parseRoot(name, text, "").files {
				if folder, list := path.Split(file); strings.HasPrefix(list, "Packages") {
					folders[folder] = true
				}
			}
			return err
		})
		if status, _ := errors.AsType[*upstreamStatus](err); err != nil && !errors.Is(err, fs.ErrNotExist) && (status == nil || status.code != http.StatusForbidden) {
			p.failIndex(p.remote, p.remote.pathHere(name), err)
			return // 403 is what S3 says of a missing file to whom it does not let list
		}
		for _, folder := range sortedKeys(folders) {
			p.findPackages(folder)
		}
		if len(folders) > 0 {
			return
		}
	}
	p.findPackages(p.prefix)
}

// findPackages reads Packages of a folder, in the first form that can be read. Its paths
// count from the archive's root: the folder that has dists, or else, in a flat
// repository, the folder itself unless they begin with it.
func (p *prefetchFinder) findPackages(folder string) {
	root := folder
	if i := strings.Index("/"+folder, "/dists/"); i >= 0 {
		root = folder[:i]
	}
	var failed string
	var why error
	for _, suffix := range []string{".gz", ".bz2", "", ".xz"} {
		way := p.remote.pathHere(folder + "Packages" + suffix)
		err := p.readIndex(way, func(r io.Reader) error {
			return readStanzas(r, func(v []string) {
				name := strings.TrimPrefix(v[0], "./")
				p.addMatching(p.remote.pathHere(root+strings.TrimPrefix(name, root)), v[1])
			}, "Filename", "Size")
		})
		if err == nil {
			return
		}
		if why == nil || !errors.Is(err, fs.ErrNotExist) {
			failed, why = way, err
		}
	}
	p.failIndex(p.remote, failed, why)
}

// crawl reads the HTML listing of the folder prefix and of those below it.
func (p *prefetchFinder) crawl() {
	top := p.here("")
	listings, known, left := []string{top}, map[string]bool{top: true}, ""
	for n := 0; n < len(listings) && p.ctx.Err() == nil; n++ {
		way := listings[n]
		p.failIndex(p.remote, way, p.readIndex(way, func(r io.Reader) error {
			text, err := readMetadata(r)
			for link := range p.linksBelow(way, text) {
				switch {
				case !strings.HasSuffix(link, "/"):
					p.addMatching(link, "")
				case known[link]:
				case len(listings) == maxIndexPages, strings.Count(link[len(top):], "/") > maxIndexDepth:
					left = link
				default:
					known[link] = true
					listings = append(listings, link)
				}
			}
			return err
		}))
	}
	if left != "" {
		p.failIndex(p.remote, left, newProblem(http.StatusRequestEntityTooLarge, "a run reads at most %d listings, %d levels deep: narrow it by prefix", maxIndexPages, maxIndexDepth))
	}
}

// hrefPattern finds the targets of an HTML page's links.
var hrefPattern = regexp.MustCompile(`(?i)<a\s[^<>]*?href\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'<>]+))`)

// linksBelow yields the paths here of what a listing links to and what is below it.
// Links with a query sort the listing. A link whose path is refused everywhere is none.
func (p *prefetchFinder) linksBelow(page string, text []byte) iter.Seq[string] {
	return func(yield func(string) bool) {
		base, err := url.Parse(p.remote.origins[0].url.String() + "/" + strings.TrimPrefix(page, p.remote.urlPath()))
		if err != nil {
			return
		}
		for m := hrefPattern.FindSubmatchIndex(text); m != nil; m = hrefPattern.FindSubmatchIndex(text) { // all at once would take 20 times the text's memory
			target := string(text[max(m[2], m[4], m[6]):max(m[3], m[5], m[7])]) // of three groups one has matched
			text = text[m[1]:]
			link, err := base.Parse(strings.TrimSpace(html.UnescapeString(target)))
			if err != nil || link.RawQuery != "" {
				continue
			}
			link.Fragment, link.RawFragment = "", ""
			below, ok := strings.CutPrefix(link.String(), base.String())
			if !ok || below == "" {
				continue
			}
			if _, err := p.findFile(page + below); (err == nil || errors.Is(err, errDenied)) && !yield(page+below) {
				return
			}
		}
	}
}
