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
	Prefix         string   `json:"prefix"`    // of pattern: the folder to search, or the image
	Platforms      []string `json:"platforms"` // OS/ARCHITECTURE[/VARIANT]; none: all
	DryRun         bool     `json:"dry_run"`
	// Arguments are the command's, which does not know what the remote is: images of a
	// docker remote, else patterns.
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
	p := &prefetchRun{api: a, cfg: a.config(), ctx: ctx, cancel: cancel, started: a.now()}
	if err := a.runs.addRun(p); err != nil {
		return err
	}
	defer a.runs.remove(p)
	if err := p.readBody(w, r, mediaType == "application/json"); err != nil {
		return newBodyError(err)
	}
	a.runs.begin(p)
	return p.run(w, !strings.Contains(r.Header.Get("Accept"), "application/json"))
}

// newBodyError makes the answer to a body that is not what it should be.
func newBodyError(err error) error {
	if _, ok := errors.AsType[*problem](err); ok {
		return err
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

// readBody reads a request, and checks it.
func (p *prefetchRun) readBody(w http.ResponseWriter, r *http.Request, isJSON bool) (err error) {
	if s := r.URL.Query().Get("dry_run"); s != "" {
		if p.dryRun, err = strconv.ParseBool(s); err != nil {
			return newProblem(http.StatusBadRequest, "dry_run must be true or false")
		}
	}
	scanner := &textScanner{cfg: p.cfg, ownHost: r.Host}
	if !isJSON {
		err = scanner.scan(http.MaxBytesReader(w, r.Body, maxPrefetchText))
		p.named = scanner.files
		return err
	}
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxPrefetchJSON))
	d.DisallowUnknownFields()
	var req prefetchRequest
	if err := d.Decode(&req); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return newProblem(http.StatusBadRequest, "the body must be one JSON object")
	}
	if err := p.readRequest(&req); err != nil {
		return err
	}
	for _, u := range req.URLs {
		f, ok := scanner.readToken(u)
		if !ok {
			f = scanner.readURL(u)
		}
		p.named = append(p.named, f)
	}
	for _, path := range req.Paths {
		p.named = append(p.named, wantedFile{remote: req.Remote, path: path, way: p.remote.pathHere(path)})
	}
	for _, image := range req.Images {
		path := manifestPath(image)
		p.named = append(p.named, wantedFile{remote: req.Remote, path: path, way: p.remote.urlPath() + path})
	}
	return nil
}

// readRequest checks req and takes it over, but for the files that it names. Its error
// is a problem that names the field.
func (p *prefetchRun) readRequest(req *prefetchRequest) (err error) {
	p.remote = p.cfg.remotes[req.Remote]
	isDocker := p.remote != nil && p.remote.packageType == "docker"
	if isDocker && req.Prefix == "" {
		req.Images = append(req.Images, req.Arguments...)
	} else if len(req.Arguments) > 0 {
		req.Pattern += "(?:" + strings.Join(req.Arguments, ")|(?:") + ")"
	}
	given := 0
	for _, n := range []int{len(req.Pattern), len(req.IncludePattern), len(req.Paths), len(req.Images), len(req.URLs)} {
		given += min(n, 1)
	}
	if p.pattern, err = compilePattern(req.Pattern + req.IncludePattern); err != nil {
		return err
	}
	p.dryRun, p.platforms = p.dryRun || req.DryRun, req.Platforms
	if p.prefix = strings.Trim(req.Prefix, "/"); p.prefix != "" {
		p.prefix += "/"
	}
	_, _, err = spellPath((&remote{}).pathHere(p.prefix), "")
	refuse := func(format string, args ...any) error { return newProblem(http.StatusBadRequest, format, args...) }
	switch {
	case given != 1:
		return refuse("give exactly one of pattern (or include_pattern), paths, images and urls")
	case len(req.URLs) > 0 && req.Remote+req.Prefix != "":
		return refuse("urls: remote and prefix have no meaning beside it, the URLs say where the files are")
	case req.Remote == "" && len(req.URLs) == 0:
		return refuse("remote: name the remote")
	case p.remote == nil && len(req.URLs) == 0:
		return newProblem(http.StatusNotFound, "remote: there is no remote %.100q", req.Remote)
	case p.remote != nil && p.remote.local:
		return refuse("remote: %q is a local repository, which has nothing to fetch from", req.Remote)
	case len(req.Images) > 0 && !isDocker:
		return refuse("images: remote %q is not a container registry: give pattern or paths", req.Remote)
	case len(req.Platforms) > 0 && !isDocker && len(req.URLs) == 0:
		return refuse("platforms: remote %q is not a container registry", req.Remote)
	case isDocker && p.pattern != nil && p.prefix == "":
		return refuse("pattern: remote %q is a container registry: give images, or as prefix the image whose tags to search", req.Remote)
	case p.prefix != "" && p.pattern == nil:
		return refuse("prefix has a meaning with pattern only")
	case err != nil:
		return refuse("prefix: %v", err)
	}
	for _, s := range p.platforms {
		if n := strings.Count(s, "/"); n != 1 && n != 2 {
			return refuse("platforms: %.60q is not OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, such as linux/amd64", s)
		}
	}
	return nil
}
