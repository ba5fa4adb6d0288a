// api_index.go: finds the files of a prefetch run that match a pattern, in the index
// that the remote itself has of them.

package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/xml"
	"errors"
	"html"
	"io"
	"io/fs"
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
	// maxListingBytes bounds an HTML listing, which is read into memory. A folder of
	// 100,000 files has about as much.
	maxListingBytes = 16 << 20
	// maxIndexItem bounds a line or an element of an index, in bytes. The longest
	// real ones, lists of dependencies, have some 100 KB.
	maxIndexItem = 1 << 20
)

// indexFinder finds the files of a run that match a pattern. One goroutine uses it.
type indexFinder struct {
	*prefetchRun
	pattern *regexp.Regexp
	prefix  string // of decoded paths; "", or with a slash at its end
	refused int    // files that match, but the remote's patterns refuse
}

// find adds the files of the remote that match.
func (p *indexFinder) find() {
	find := p.crawl
	switch dists := strings.HasPrefix(p.prefix, "dists/") || strings.Contains(p.prefix, "/dists/"); {
	case p.remote.packageType == "alpine":
		find = p.findAPKs
	case p.remote.packageType == "rpm":
		find = p.findRPMs
	case p.remote.packageType == "deb" || dists:
		find = p.findDebs
	}
	find()
	if p.refused > 0 && p.jobs.found() == 0 {
		p.fail(p.remote.name, p.prefix, newProblem(http.StatusForbidden, "%d files match, but the patterns of remote %q allow none of them", p.refused, p.remote.name))
	}
}

// addMatching adds the file at a path here, which an index names, if it matches the
// pattern. What the remote's own patterns refuse counts as not there.
func (p *indexFinder) addMatching(way string, size int64) {
	file, err := p.findFile(way)
	name := file.path
	if name == "" { // its path is not a good one
		name = strings.TrimPrefix(way, p.remote.urlPath())
	}
	switch {
	case !p.pattern.MatchString(name):
		return
	case errors.Is(err, errDenied):
		p.refused++
		return
	case err == nil:
		err = p.jobs.push(file.key(), job{way, size})
	}
	if err != nil {
		p.fail(p.remote.name, name, err)
	}
}

// addHref adds the file that an index names by a reference, relative to the prefix.
func (p *indexFinder) addHref(href string, size int64, isElsewhere bool) {
	if isElsewhere || strings.HasPrefix(href, "/") || strings.Contains(href, "://") {
		if p.pattern.MatchString(href) {
			p.fail(p.remote.name, href, newProblem(http.StatusBadRequest, "the index says that it is elsewhere: name it by its URL, and its server in a remote"))
		}
		return
	}
	p.addMatching(p.remote.pathHere(p.prefix)+escapeHref(href), size)
}

// escapeHref escapes what would end the path of a reference that is a path alone.
func escapeHref(href string) string {
	return strings.NewReplacer("?", "%3F", "#", "%23").Replace(href)
}

// readIndex reads the index file at a path here by a function that gets it decompressed.
func (p *indexFinder) readIndex(way string, read func(io.Reader) error) error {
	file, err := p.findFile(way)
	allowed := !errors.Is(err, errDenied)
	if way == p.remote.urlPath() { // the listing of base_url itself, which a GET here does not ask for
		file, allowed, err = fileRequest{target: target{remote: p.remote}}, false, nil
	}
	if err != nil && allowed {
		return err
	}
	body, err := openIndex(p.ctx, p.api.cache, file, allowed)
	if err != nil {
		return err
	}
	defer body.Close()
	plain, err := decompress(body)
	if err == nil {
		err = read(plain)
	}
	if _, isProblem := errors.AsType[*problem](err); err != nil && !isProblem {
		err = &problem{status: http.StatusBadGateway, cause: err, detail: "this index cannot be read: it broke off or is damaged"}
	}
	return err
}

// failIndex tells that the index at a path here could not be read.
func (p *indexFinder) failIndex(way string, err error) {
	if err != nil {
		p.fail(p.remote.name, decodePath(strings.TrimPrefix(way, p.remote.urlPath())), err)
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

// parseIndexSize parses a size that an index gives; 0 for nonsense.
func parseIndexSize(s string) int64 {
	n, _ := strconv.ParseInt(s, 10, 64)
	return n
}

// findAPKs reads APKINDEX.tar.gz of the folder prefix. It is several gzip members: of
// the signature and of the index.
func (p *indexFinder) findAPKs() {
	folder := p.remote.pathHere(p.prefix)
	p.failIndex(folder+"APKINDEX.tar.gz", p.readIndex(folder+"APKINDEX.tar.gz", func(r io.Reader) error {
		for archive := tar.NewReader(r); ; {
			h, err := archive.Next()
			if err != nil {
				return err
			}
			if h.Name == "APKINDEX" {
				return readStanzas(archive, func(v []string) {
					p.addMatching(p.remote.pathHere(p.prefix+v[0]+"-"+v[1]+".apk"), parseIndexSize(v[2]))
				}, "P", "V", "S")
			}
		}
	}))
}

// findRPMs reads repodata below prefix: repomd.xml, and the primary.xml that it names.
func (p *indexFinder) findRPMs() {
	folder := p.remote.pathHere(p.prefix)
	primary, kind := "", ""
	err := p.readIndex(folder+"repodata/repomd.xml", func(r io.Reader) error {
		err := readElements(r, func(name string, attr func(string) string) {
			switch {
			case name == "data":
				kind = attr("type")
			case name == "location" && kind == "primary":
				primary = attr("href")
			}
		})
		if err == nil && primary == "" {
			err = newProblem(http.StatusBadGateway, "it names no primary.xml")
		}
		return err
	})
	if err != nil {
		p.failIndex(folder+"repodata/repomd.xml", err)
		return
	}
	primary = folder + escapeHref(primary)
	p.failIndex(primary, p.readIndex(primary, func(r io.Reader) error {
		var size int64
		return readElements(r, func(name string, attr func(string) string) {
			switch name {
			case "package":
				size = 0
			case "size":
				size = parseIndexSize(attr("package"))
			case "location":
				p.addHref(attr("href"), size, attr("base") != "")
			}
		})
	}))
}

// readElements calls f for each element of an XML document with its name, without a
// name space, and a function that returns its attributes. It holds one at a time.
func readElements(r io.Reader, f func(name string, attr func(string) string)) error {
	bounded := &io.LimitedReader{R: r}
	d := xml.NewDecoder(bounded)
	for {
		bounded.N = maxIndexItem
		t, err := d.Token() // it notices a document that is cut
		switch {
		case bounded.N <= 0:
			return newProblem(http.StatusBadGateway, "an element of this index is larger than %d bytes", maxIndexItem)
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
		if e, ok := t.(xml.StartElement); ok {
			f(e.Name.Local, func(name string) string {
				for _, a := range e.Attr {
					if a.Name.Local == name {
						return a.Value
					}
				}
				return ""
			})
		}
	}
}

// suffixesRead are those of the Packages that can be read, the smallest first.
var suffixesRead = []string{".gz", ".bz2", ""}

// findDebs reads Packages of the folder prefix, or those that the Release of the suite
// prefix names. A suite may be named without "dists/".
func (p *indexFinder) findDebs() {
	if strings.HasPrefix(path.Base(p.prefix), "binary-") {
		p.findPackages(p.prefix, suffixesRead)
		return
	}
	for _, folder := range []string{p.prefix, "dists/" + p.prefix} {
		for _, name := range []string{"InRelease", "Release"} {
			lists := map[string][]string{} // suffixes of Packages, by folder
			err := p.readIndex(p.remote.pathHere(folder+name), func(r io.Reader) error { return readRelease(r, lists) })
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				p.failIndex(p.remote.pathHere(folder+name), err)
				return
			}
			for _, sub := range sortedKeys(lists) {
				p.findPackages(folder+sub, lists[sub])
			}
			if len(lists) > 0 {
				return
			}
		}
	}
	p.findPackages(p.prefix, suffixesRead)
}

// readRelease collects which Packages a Release names: their suffixes, those that are
// read first, by their folders.
func readRelease(r io.Reader, lists map[string][]string) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxIndexItem)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) != 3 || !strings.HasPrefix(lines.Text(), " ") {
			continue
		}
		folder, name := path.Split(fields[2])
		suffix, ok := strings.CutPrefix(name, "Packages")
		if ok && !slices.Contains(lists[folder], suffix) && len(lists) < maxIndexPages {
			lists[folder] = append(lists[folder], suffix)
		}
	}
	rank := func(suffix string) int {
		if i := slices.Index(suffixesRead, suffix); i >= 0 {
			return i
		}
		return len(suffixesRead)
	}
	for _, suffixes := range lists {
		slices.SortFunc(suffixes, func(a, b string) int { return rank(a) - rank(b) })
	}
	return lines.Err()
}

// findPackages reads Packages of a folder, by the first of these suffixes that is there.
// Its paths count from the archive's root: the folder that has dists, or else, in a flat
// repository, the folder itself unless they begin with it.
func (p *indexFinder) findPackages(folder string, suffixes []string) {
	root := folder
	if i := strings.Index("/"+folder, "/dists/"); i >= 0 {
		root = folder[:i]
	}
	var first error
	for _, suffix := range suffixes {
		way := p.remote.pathHere(folder + "Packages" + suffix)
		err := p.readIndex(way, func(r io.Reader) error {
			return readStanzas(r, func(v []string) {
				name := strings.TrimPrefix(v[0], "./")
				if !strings.HasPrefix(name, root) {
					name = root + name
				}
				p.addMatching(p.remote.pathHere(name), parseIndexSize(v[1]))
			}, "Filename", "Size")
		})
		if first == nil {
			first = err
		}
		if err == nil {
			return
		}
		if !errors.Is(err, fs.ErrNotExist) {
			p.failIndex(way, err)
			return
		}
	}
	p.failIndex(p.remote.pathHere(folder+"Packages"), first)
}

// hrefPattern finds the targets of an HTML page's links.
var hrefPattern = regexp.MustCompile(`(?i)<a\s[^<>]*?href\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'<>]+))`)

// crawl reads the HTML listing of the folder prefix and of those below it.
func (p *indexFinder) crawl() {
	top := p.remote.pathHere(p.prefix)
	pages, known := []string{top}, map[string]bool{top: true}
	tooDeep := false
	for n := 0; n < len(pages) && p.ctx.Err() == nil; n++ {
		page := pages[n]
		if n == maxIndexPages {
			p.failIndex(page, newProblem(http.StatusRequestEntityTooLarge, "a run reads at most %d listings: narrow it by prefix", maxIndexPages))
			return
		}
		p.failIndex(page, p.readIndex(page, func(r io.Reader) error {
			text, err := io.ReadAll(io.LimitReader(r, maxListingBytes+1))
			if err == nil && len(text) > maxListingBytes {
				err = newProblem(http.StatusBadGateway, "this listing has more than %d bytes", maxListingBytes)
			}
			for _, way := range p.linksBelow(page, text) {
				isFolder := strings.HasSuffix(way, "/")
				deep := strings.Count(way[len(top):], "/") > maxIndexDepth
				switch {
				case !isFolder:
					p.addMatching(way, 0)
				case deep && !tooDeep:
					tooDeep = true
					p.failIndex(way, newProblem(http.StatusRequestEntityTooLarge, "a run reads at most %d levels of listings: give a longer prefix", maxIndexDepth))
				case !deep && !known[way] && len(pages) <= maxIndexPages:
					known[way] = true
					pages = append(pages, way)
				}
			}
			return err
		}))
	}
}

// linksBelow returns the paths here of what a listing links to and what is below it.
// Links with a query sort the listing. A link whose path is refused everywhere is none.
func (p *indexFinder) linksBelow(page string, text []byte) (ways []string) {
	base, err := url.Parse(p.remote.origins[0].url.String() + "/" + strings.TrimPrefix(page, p.remote.urlPath()))
	if err != nil {
		return nil
	}
	for _, m := range hrefPattern.FindAllSubmatch(text, -1) {
		link, err := base.Parse(strings.TrimSpace(html.UnescapeString(string(bytes.Join(m[1:], nil)))))
		if err != nil || link.RawQuery != "" {
			continue
		}
		link.Fragment, link.RawFragment = "", ""
		below, ok := strings.CutPrefix(link.String(), base.String())
		if !ok || below == "" {
			continue
		}
		if _, err := p.findFile(page + below); err == nil || errors.Is(err, errDenied) {
			ways = append(ways, page+below)
		}
	}
	return ways
}
