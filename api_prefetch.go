// api_prefetch.go: POST /cache-artifact, which fetches files before clients ask for
// them: what may be asked for, and how it is read.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"regexp"
	"strconv"
	"strings"
)

const (
	// maxPrefetchJSON and maxPrefetchText bound a request's body in bytes. JSON is in
	// memory as a whole, text is not.
	maxPrefetchJSON = 16 << 20
	maxPrefetchText = 64 << 20
)

// prefetchRequest says what to fetch: what pattern finds, or paths, or images, of one
// remote; or urls. Its JSON is part of the API.
type prefetchRequest struct {
	Remote         string   `json:"remote"`
	Pattern        string   `json:"pattern"`
	IncludePattern string   `json:"include_pattern"` // another name of pattern
	Paths          []string `json:"paths"`           // decoded, as listings have them
	Images         []string `json:"images"`          // IMAGE[:TAG][@DIGEST]
	URLs           []string `json:"urls"`
	Prefix         string   `json:"prefix"`    // of pattern: the folder to search
	Platforms      []string `json:"platforms"` // OS/ARCHITECTURE[/VARIANT]; none: all
	DryRun         bool     `json:"dry_run"`
	// Arguments are those of the command: images of a docker remote, else patterns.
	Arguments []string `json:"arguments"`
}

// servePrefetch serves POST /cache-artifact. The whole request is read before the
// answer begins.
func (a *api) servePrefetch(w *response, r *http.Request) error {
	if err := allowMethods(r, http.MethodPost); err != nil {
		return err
	}
	if a.token != "" {
		if err := a.authorizeWrite(r, ""); err != nil {
			return err
		}
	}
	mediaType, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")) // "" is refused as well
	if mediaType != "application/json" && mediaType != "text/plain" {
		return newProblem(http.StatusUnsupportedMediaType, "the Content-Type must be application/json, or text/plain for a text with URLs")
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	p := &prefetchRun{api: a, cfg: a.config(), ctx: ctx, cancel: cancel, events: make(chan any, 64), started: a.now()}
	if err := a.runs.begin(p); err != nil {
		return err
	}
	defer a.runs.end(p)
	find, err := p.parseRequest(w, r, mediaType == "application/json")
	if err != nil {
		return err
	}
	return p.run(w, find, !strings.Contains(r.Header.Get("Accept"), "application/json"))
}

// parseRequest reads the request into p and returns the function that finds its files.
// The errors are problems.
func (p *prefetchRun) parseRequest(w http.ResponseWriter, r *http.Request, isJSON bool) (find func(), err error) {
	query := r.URL.Query()
	if s := query.Get("dry_run"); s != "" {
		if p.dryRun, err = strconv.ParseBool(s); err != nil {
			return nil, newProblem(http.StatusBadRequest, "dry_run must be true or false")
		}
	}
	scanner := &textScanner{cfg: p.cfg, ownHost: r.Host}
	if !isJSON {
		if err := scanner.scan(http.MaxBytesReader(w, r.Body, maxPrefetchText)); err != nil {
			return nil, newBodyError(err)
		}
		return func() { p.addNamed(scanner.files) }, nil
	}
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxPrefetchJSON))
	d.DisallowUnknownFields()
	var req prefetchRequest
	if err := d.Decode(&req); err != nil {
		return nil, newBodyError(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, newProblem(http.StatusBadRequest, "the body must be one JSON object")
	}
	p.dryRun = p.dryRun || req.DryRun
	finder := &indexFinder{prefetchRun: p}
	if err := finder.readRequest(&req); err != nil {
		return nil, err
	}
	switch {
	case len(req.URLs) > 0:
		for _, u := range req.URLs {
			f, ok := scanner.readToken(u)
			if !ok {
				f = wantedFile{path: strings.SplitN(u, "?", 2)[0]}
			}
			if err := scanner.add(f); err != nil {
				return nil, err
			}
		}
		return func() { p.addNamed(scanner.files) }, nil
	case finder.pattern != nil:
		return finder.find, nil
	}
	var files []wantedFile
	for _, path := range req.Paths {
		files = append(files, wantedFile{remote: p.remote.name, path: path, way: p.remote.pathHere(path)})
	}
	for _, image := range req.Images {
		path := manifestPath(image)
		files = append(files, wantedFile{remote: p.remote.name, path: path, way: p.remote.urlPath() + path})
	}
	return func() { p.addNamed(files) }, nil
}

// platformPattern matches OS/ARCHITECTURE and OS/ARCHITECTURE/VARIANT.
var platformPattern = regexp.MustCompile(`^[a-z0-9]+/[a-z0-9_]+(/[a-z0-9.]+)?$`)

// readRequest checks req and takes it over, for the run too. Its error is a problem that names the field.
func (p *indexFinder) readRequest(req *prefetchRequest) (err error) {
	if r := p.cfg.remotes[req.Remote]; len(req.Arguments) > 0 && r != nil && r.packageType == "docker" {
		req.Images = append(req.Images, req.Arguments...)
	} else if len(req.Arguments) > 0 {
		req.Pattern += "(?:" + strings.Join(req.Arguments, ")|(?:") + ")"
	}
	given := 0
	for _, is := range []bool{req.Pattern != "", req.IncludePattern != "", len(req.Paths) > 0, len(req.Images) > 0, len(req.URLs) > 0} {
		if is {
			given++
		}
	}
	if given != 1 {
		return newProblem(http.StatusBadRequest, "give exactly one of pattern (or include_pattern), paths, images and urls")
	}
	pattern := req.Pattern + req.IncludePattern
	if p.pattern, err = compilePattern(pattern); err != nil {
		return err
	}
	p.prefix, p.platforms = strings.Trim(req.Prefix, "/"), req.Platforms
	if p.prefix != "" {
		p.prefix += "/"
	}
	for _, s := range p.platforms {
		if !platformPattern.MatchString(s) {
			return newProblem(http.StatusBadRequest, "platforms: %.60q is not OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, such as linux/amd64", s)
		}
	}
	if len(req.URLs) > 0 {
		if req.Remote != "" || req.Prefix != "" {
			return newProblem(http.StatusBadRequest, "urls: remote and prefix have no meaning beside it, the URLs say where the files are")
		}
		return nil
	}
	if p.remote = p.cfg.remotes[req.Remote]; p.remote == nil {
		return newProblem(http.StatusNotFound, "remote: there is no remote %.100q", req.Remote)
	}
	isDocker := p.remote.packageType == "docker"
	_, _, err = spellPath(p.remote.pathHere(p.prefix), "")
	switch {
	case p.remote.local:
		return newProblem(http.StatusBadRequest, "remote: %q is a local repository, which has nothing to fetch from", req.Remote)
	case len(req.Images) > 0 && !isDocker:
		return newProblem(http.StatusBadRequest, "images: remote %q is not a container registry: give pattern or paths", req.Remote)
	case len(req.Platforms) > 0 && !isDocker:
		return newProblem(http.StatusBadRequest, "platforms: remote %q is not a container registry", req.Remote)
	case req.Prefix != "" && pattern == "":
		return newProblem(http.StatusBadRequest, "prefix has a meaning with pattern only")
	case isDocker && pattern != "":
		return newProblem(http.StatusBadRequest, "pattern: remote %q is a container registry: give images", req.Remote)
	case err != nil:
		return newProblem(http.StatusBadRequest, "prefix: %v", err)
	}
	return nil
}

// newBodyError makes the answer to a body that cannot be read as what it should be.
func newBodyError(err error) error {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return newProblem(http.StatusRequestEntityTooLarge, "the body has more than %d bytes: send it in parts", tooLarge.Limit)
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && e.Field == "" {
		return newProblem(http.StatusBadRequest, "the body must be one JSON object")
	} else if ok {
		return newProblem(http.StatusBadRequest, "%s: this field must not be of type %s", e.Field, e.Value)
	}
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return newProblem(http.StatusBadRequest, "unknown field %.60s", name)
	}
	return &problem{status: http.StatusBadRequest, detail: "the body is not valid JSON, or it broke off", cause: err}
}
