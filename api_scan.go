// api_scan.go: finds the files that a text names, whatever the text is: what package
// managers print, lock files, lists of images, logs, and the lists that artifactapi
// itself makes.

package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"regexp"
	"strings"
)

// wantedFile is a file that a request or a text names.
type wantedFile struct {
	remote string // "": it is not known, or no remote has it
	path   string // as it was named: without a query, which may be a secret
	way    string // its path here, escaped and with its query
	err    error  // why it has none
}

var (
	errNoRemote     = newProblem(http.StatusNotFound, "no remote has a base_url that this URL begins with")
	errQueryLost    = newProblem(http.StatusBadRequest, "it was asked for with a query, which is not in this list: give its URL")
	errTooManyNames = newProblem(http.StatusRequestEntityTooLarge, "the body names files more than %d times: send it in parts", maxPrefetchFiles)
	schemePattern   = regexp.MustCompile(`(?i)https?://`) // within a token such as url=https://...
	userPattern     = regexp.MustCompile(`^([^:]*://)[^/]*@`)
)

// maxTextLine bounds a line of a text, in bytes: lock files may be one line as a whole.
const maxTextLine = 16 << 20

// scan collects the files that a text names. Its error is the reader's, or a problem.
func (p *prefetchRun) scan(r io.Reader) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxTextLine)
	for lines.Scan() {
		p.addLine(lines.Text())
		if len(p.named) > maxPrefetchFiles {
			return errTooManyNames
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return newProblem(http.StatusRequestEntityTooLarge, "a line of the text has more than %d bytes: break it at blanks", maxTextLine)
	}
	return lines.Err()
}

// addLine adds what a line of a text names. A JSON object with a remote and a path (of
// /missed, of a run's events, of the log) names that file.
func (p *prefetchRun) addLine(line string) {
	var listed struct {
		Remote, Path, Escaped string
		Query                 bool
	}
	if strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &listed) == nil && listed.Remote != "" && listed.Path != "" {
		r := cmp.Or(p.cfg.remotes[listed.Remote], &remote{name: listed.Remote})
		f := wantedFile{r.name, listed.Path, r.pathHere(listed.Path), nil}
		if listed.Escaped != "" {
			f.way = r.urlPath() + listed.Escaped
		}
		if listed.Query {
			f.err = errQueryLost
		}
		p.named = append(p.named, f)
		return
	}
	line = strings.ReplaceAll(line, `\/`, "/") // as some write a slash in JSON
	for token := range strings.FieldsFuncSeq(line, endsToken) {
		if len(p.named) > maxPrefetchFiles {
			return // one more than scan allows: a line may name millions
		}
		if f, ok := p.readToken(strings.TrimRight(token, ".,;:!?)")); ok {
			p.named = append(p.named, f)
		}
	}
}

// endsToken reports whether c is in no URL and in no image reference: RFC 3986 allows
// the apostrophe, but texts quote with it.
func endsToken(c rune) bool { return c <= ' ' || strings.ContainsRune("\"'`<>{}|\\^[]\x7f", c) }

// readToken returns the file that a word of a text names, if it is a URL, or an image
// reference that begins with the name of a registry.
func (p *prefetchRun) readToken(token string) (f wantedFile, ok bool) {
	if at := schemePattern.FindStringIndex(token); at != nil {
		return p.readURL(token[at[0]:]), true
	}
	token = token[strings.LastIndexByte(token, '=')+1:]
	token = strings.TrimPrefix(strings.TrimPrefix(token, "docker://"), "oci://")
	host, image, _ := strings.Cut(token, "/")
	if image == "" {
		return f, false
	}
	f = p.readURL("https://" + host + "/v2/" + manifestPath(image))
	name, _, _ := strings.Cut(strings.TrimPrefix(f.way, "/v2/"), "/")
	r := p.cfg.remotes[name]
	return f, r != nil && r.packageType == "docker"
}

// readURL returns the file at a URL.
func (p *prefetchRun) readURL(u string) wantedFile {
	u, _, _ = strings.Cut(u, "#")
	shown, _, _ := strings.Cut(u, "?")
	if base := p.cfg.urls.find([]byte(u), nil); base != nil {
		return wantedFile{base.remote.name, decodePath(strings.TrimLeft(shown[len(base.url):], "/")), base.pathHere(u), nil}
	}
	f := wantedFile{path: userPattern.ReplaceAllString(shown, "$1"), err: errNoRemote}
	_, rest, _ := strings.Cut(u, "://")
	_, public, _ := strings.Cut(p.cfg.publicURL, "://")
	for _, own := range []string{p.ownHost, public} {
		if n := len(own); n > 0 && len(rest) > n && strings.EqualFold(rest[:n], own) && rest[n] == '/' {
			f.way, f.err = rest[n:], nil
		}
	}
	return f
}
