// api_scan.go: finds the files that a text names, whatever the text is: what package
// managers print, lock files, lists of images, logs, and the lists that artifactapi
// itself makes.

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
)

// wantedFile is a file that a request or a text names.
type wantedFile struct {
	remote string // "": no remote has it
	path   string // as it was named: without a query, which may be a secret
	way    string // its path here, escaped and with its query; "": it has none
	// hadQuery: it was asked for with a query that is not known.
	hadQuery bool
}

// textScanner collects the files that a text names, each once.
type textScanner struct {
	cfg     *config
	ownHost string // at which clients reach this server
	files   []wantedFile
	seen    map[wantedFile]struct{}
}

// maxTextPiece is how much of a text is looked at at once, in bytes: a line, or as much
// of a longer one.
const maxTextPiece = 64 << 10

// scan reads a text. Its error is the reader's, or a problem.
func (s *textScanner) scan(r io.Reader) error {
	pieces := bufio.NewScanner(r)
	pieces.Buffer(nil, 2*maxTextPiece)
	pieces.Split(splitText)
	for pieces.Scan() {
		if err := s.addPiece(pieces.Text()); err != nil {
			return err
		}
	}
	return pieces.Err()
}

// splitText is the bufio.SplitFunc of lines. It cuts a longer piece behind a character
// that is in no URL.
func splitText(data []byte, atEOF bool) (advance int, token []byte, err error) {
	i := bytes.IndexByte(data, '\n')
	if i < 0 && len(data) >= maxTextPiece {
		if i = bytes.LastIndexAny(data, " \t\"'<>"); i < 0 {
			i = len(data) - 1
		}
	}
	if i < 0 && atEOF {
		i = len(data) - 1
	}
	if i < 0 {
		return 0, nil, nil // the end, or more is to come
	}
	return i + 1, data[:i+1], nil
}

// addPiece adds what a piece of a text names. A line that is a JSON object with a remote
// and a path (of /missed, of a run's events, of the log) names that file.
func (s *textScanner) addPiece(piece string) error {
	var listed struct {
		Remote, Path string
		Query        bool
	}
	if strings.HasPrefix(piece, "{") && json.Unmarshal([]byte(piece), &listed) == nil && listed.Path != "" {
		if r := s.cfg.remotes[listed.Remote]; r != nil {
			return s.add(wantedFile{r.name, listed.Path, r.pathHere(listed.Path), listed.Query})
		}
		if listed.Remote != "" {
			return s.add(wantedFile{listed.Remote, listed.Path, (&url.URL{Path: "/api/" + listed.Remote + "/" + listed.Path}).EscapedPath(), false})
		}
	}
	piece = strings.ReplaceAll(piece, `\/`, "/") // as some write a slash in JSON
	for _, token := range strings.FieldsFunc(piece, endsToken) {
		if f, ok := s.readToken(token); ok {
			if err := s.add(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// endsToken reports whether c is in no URL and in no image reference: RFC 3986 allows
// the apostrophe, but texts quote with it.
func endsToken(c rune) bool { return c <= ' ' || strings.ContainsRune("\"'`<>{}|\\^[]\x7f", c) }

var (
	// schemePattern finds the begin of a URL within a token such as url=https://...
	schemePattern      = regexp.MustCompile(`(?i)https?://`)
	credentialsPattern = regexp.MustCompile(`(?i)^(https?://)[^/]*@`)
)

// readToken returns the file that a word of a text names, if it is a URL, or an image
// reference that begins with the name of a registry.
func (s *textScanner) readToken(token string) (f wantedFile, ok bool) {
	token = strings.TrimRight(token, ".,;:!?)")
	if at := schemePattern.FindStringIndex(token); at != nil {
		return s.readURL(token[at[0]:]), true
	}
	token = token[strings.LastIndexByte(token, '=')+1:]
	for _, scheme := range []string{"docker://", "oci://"} {
		token = strings.TrimPrefix(token, scheme)
	}
	host, image, _ := strings.Cut(token, "/")
	if image == "" {
		return f, false
	}
	r := s.cfg.remoteByRegistry(host)
	_, public, _ := strings.Cut(s.cfg.publicURL, "://")
	if r == nil && (strings.EqualFold(host, s.ownHost) || host == public) {
		var name string
		name, image, _ = strings.Cut(image, "/")
		r = s.cfg.remotes[name]
	}
	if r == nil || r.packageType != "docker" {
		return f, false
	}
	path := manifestPath(image)
	return wantedFile{r.name, path, r.urlPath() + path, false}, true
}

// readURL returns the file at a URL, as one of no remote if there is none.
func (s *textScanner) readURL(u string) wantedFile {
	u, _, _ = strings.Cut(u, "#")
	shown, _, _ := strings.Cut(u, "?")
	if base := s.cfg.urls.find(u); base != nil {
		return wantedFile{base.remote.name, decodePath(strings.TrimLeft(shown[len(base.url):], "/")), base.pathHere(u), false}
	}
	f := wantedFile{path: credentialsPattern.ReplaceAllString(shown, "$1")}
	_, rest, _ := strings.Cut(u, "://")
	if host, path, _ := strings.Cut(rest, "/"); strings.EqualFold(host, s.ownHost) {
		f.way = "/" + path
	} else if path, ok := strings.CutPrefix(u, s.cfg.publicURL+"/"); ok && s.cfg.publicURL != "" {
		f.way = "/" + path
	}
	return f
}

// add adds a file, once.
func (s *textScanner) add(f wantedFile) error {
	if s.seen == nil {
		s.seen = map[wantedFile]struct{}{}
	}
	if _, twice := s.seen[f]; twice {
		return nil
	}
	if len(s.seen) == maxPrefetchFiles {
		return newProblem(http.StatusRequestEntityTooLarge, "the text names more than %d files: send it in parts", maxPrefetchFiles)
	}
	s.seen[f] = struct{}{}
	s.files = append(s.files, f)
	return nil
}
