// api_page.go: /, the remotes and the state of the server, as JSON and as a page for
// browsers. The page is one document: nothing of it comes from elsewhere, and it is
// whole without its script.

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed" // the three assets
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	// rowsOnPage is how many remotes or files the page shows at once, if they are short.
	rowsOnPage = 80
	// maxPageBytes bounds the page in bytes: it has fewer rows where they are long.
	maxPageBytes = 59_000
)

// remoteOverview is one remote in the answer of /.
type remoteOverview struct {
	Name        string `json:"name"`
	Type        string `json:"type"` // remote or local
	Package     string `json:"package"`
	Description string `json:"description"`
	URL         string `json:"url"`       // base_url; "" for a local repository
	Artifacts   *int64 `json:"artifacts"` // null while the index cannot be asked
	Bytes       *int64 `json:"bytes"`     // likewise
}

// serveRoot serves /: the remotes and what is stored of each, as JSON or, to a client
// that accepts text/html, as a page; with ?remote= that of one remote.
func (a *api) serveRoot(w *response, r *http.Request) error {
	cfg := a.config()
	remotes := a.listRemotes(r.Context(), cfg)
	h := w.Header()
	h.Set("Vary", "Accept")
	if !strings.Contains(r.Header.Get("Accept"), "text/html") {
		return writeJSON(w, map[string]any{"name": "artifactapi", "version": a.version, "remotes": remotes})
	}
	q := r.URL.Query()
	p := &page{Version: a.version, Uptime: formatSpan(a.now().Sub(a.started)), Health: a.health(), Missed: int64(a.cache.missed.count()),
		Search: q.Get("search"), Prefix: q.Get("prefix"), after: q.Get("after")}
	name := q.Get("remote")
	for _, o := range remotes {
		if name == "" || name == o.Name {
			p.Remotes = append(p.Remotes, a.newPageRemote(o, cfg.remotes[o.Name]))
		}
	}
	addRows := p.addRemotes
	if name != "" {
		rem := cfg.remotes[name]
		if rem == nil {
			return newProblem(http.StatusNotFound, "there is no remote %.100q in remotes.yaml", name)
		}
		p.Remote = &p.Remotes[0]
		p.Registry = cmp.Or(rem.masked["registry"], rem.registry)
		p.Origin = &url.URL{Scheme: "http", Host: r.Host}
		if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
			p.Origin.Scheme = "https"
		}
		p.Leaving = a.cache.leavingOf(rem)
		p.Leaving = p.Leaving[:min(len(p.Leaving), 5)]
		addRows = func(most int) { a.addFiles(p, r, rem, most) }
	} else {
		a.addTotals(p)
	}
	text, err := p.render(addRows)
	if err != nil {
		return err
	}
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", pagePolicy)
	_, err = w.Write(text)
	return err
}

// render writes the page with as many rows as there is room for. addRows gives it some,
// at most so many.
func (p *page) render(addRows func(most int)) ([]byte, error) {
	var text bytes.Buffer
	for rows := rowsOnPage; ; rows = min(rows-1, max(1, rows*maxPageBytes/text.Len()*3/4)) { // the rest of the page has to fit too
		text.Reset()
		addRows(rows)
		if err := pageTemplate.Execute(&text, p); err != nil || text.Len() <= maxPageBytes || rows == 1 {
			return text.Bytes(), err
		}
	}
}

// listRemotes returns the remotes by name, with what is stored of each.
func (a *api) listRemotes(ctx context.Context, cfg *config) []remoteOverview {
	totals, err := a.cache.index.totals(ctx, false)
	list := make([]remoteOverview, 0, len(cfg.names))
	for _, name := range cfg.names {
		rem, t := cfg.remotes[name], totals[name]
		o := remoteOverview{Name: name, Type: rem.typeName(), Package: rem.packageType, Description: cmp.Or(rem.masked["description"], rem.description)}
		if err == nil { // without the index, the remotes are still shown
			o.Artifacts, o.Bytes = &t.Files, &t.Bytes
		}
		if !rem.local {
			o.URL = rem.shownURL(0)
		}
		list = append(list, o)
	}
	return list
}

// page is what the template shows: the overview, or one remote.
type page struct {
	Version string
	Uptime  string
	Health  healthReport
	Remotes []pageRemote
	Search  string // searched in the rows
	Prefix  string // of the files' paths
	Next    string // what the next rows follow; "" at the end
	after   string // where the rows begin; "" is the first

	// Of the overview.
	Shown  []pageRemote // the rows
	Total  pageRemote
	Disk   *pageDisk // nil: not known
	Missed int64     // files that /missed lists
	Runs   []pageRun // of prefetches

	// Of one remote.
	Remote     *pageRemote
	Registry   string   // that it mirrors
	Origin     *url.URL // at which the client reached us, through a proxy or not
	Leaving    []leavingLinks
	Files      []pageFile // the rows
	FilesError string
}

// pageRemote is a remote on the page.
type pageRemote struct {
	remoteOverview
	State    string   // in a few words whether the upstream can be used
	Why      []string // it cannot be, or one of its origins fails
	HitRatio string   // "-" without requests
	Saved    int64    // bytes that were answered from the store

	// A plot of the last hours: the outlines of two areas in SVG's path syntax, of all
	// requests and of those answered from the store. "": there were none.
	PlotWidth         int
	PlotAll, PlotHits string
}

// pageDisk is the disk that has DATA_DIR, in bytes.
type pageDisk struct{ Size, Free, Used, High int64 }

// pageRun is a running prefetch.
type pageRun struct {
	progressEvent
	Remote string // "": several
	DryRun bool
	Ended  int64 // files that are done or have failed
	For    string
}

// pageFile is a stored file on the page.
type pageFile struct {
	listedArtifact
	Folder, File  string // the parts of Path; Folder ends in a slash or is ""
	Fetched, Left string // how long ago, and how long it stays fresh or has been expired
}

func (a *api) newPageRemote(o remoteOverview, rem *remote) pageRemote {
	v := pageRemote{remoteOverview: o, State: "up"}
	for _, o := range a.cache.upstream.failingOrigins(rem) { // others stand in
		_, cause := statusAndDetail(o.cause)
		v.State, v.Why = "up in part", append(v.Why, fmt.Sprintf("%s fails for %s: %s", o.url, formatSpan(a.now().Sub(o.since)), cause))
	}
	switch began, cause := a.cache.upstream.circuitOf(o.Name).outage(); {
	case rem.local:
		v.State = "local"
	case rem.sealed:
		v.State = "sealed"
	case cause != nil:
		// What a client would be told: the cause itself may have a host from ${VAR}.
		_, detail := statusAndDetail(cause)
		v.State, v.Why = "down for "+formatSpan(a.now().Sub(began)), append(v.Why, detail)
	}
	v.setUsage(a.metrics.usageOf(o.Name))
	v.setPlot(a.metrics.trendOf(o.Name))
	return v
}

// setUsage sets what is known of the requests since the start.
func (v *pageRemote) setUsage(u remoteUsage) {
	v.Saved, v.HitRatio = u.saved, "-"
	if all := u.hits + u.misses; all > 0 {
		v.HitRatio = fmt.Sprintf("%.0f %%", 100*float64(u.hits)/float64(all))
	}
}

// setPlot draws the steps of a trend, of which each is a unit wide.
func (v *pageRemote) setPlot(steps []remoteUsage) {
	most := int64(0)
	for _, s := range steps {
		most = max(most, s.hits+s.misses)
	}
	if most == 0 {
		return
	}
	const height = 20
	draw := func(count func(remoteUsage) int64) string {
		path := fmt.Sprintf("M0 %d", height)
		for x, s := range steps {
			if x+1 < len(steps) && count(steps[x+1]) == count(s) {
				continue // one line for equal steps
			}
			y := strconv.FormatFloat(height-float64(count(s))*height/float64(most), 'f', 1, 64)
			path += fmt.Sprintf("V%sH%d", strings.TrimSuffix(y, ".0"), x+1)
		}
		return path + fmt.Sprintf("V%dZ", height)
	}
	v.PlotWidth = len(steps)
	v.PlotAll = draw(func(s remoteUsage) int64 { return s.hits + s.misses })
	v.PlotHits = draw(func(s remoteUsage) int64 { return s.hits })
}

// addTotals adds what the overview says of all remotes together.
func (a *api) addTotals(p *page) {
	for _, run := range a.runs.list() {
		v := pageRun{progressEvent: run.progress(), DryRun: run.dryRun, For: formatSpan(a.now().Sub(run.started))}
		if v.Ended = v.Done + v.Failed; run.remote != nil {
			v.Remote = run.remote.name
		}
		p.Runs = append(p.Runs, v)
	}
	var all remoteUsage
	var files, bytes int64
	for _, r := range p.Remotes {
		if r.Bytes != nil { // as of all, or of none
			files, bytes = files+*r.Artifacts, bytes+*r.Bytes
			p.Total.Artifacts, p.Total.Bytes = &files, &bytes
		}
		u := a.metrics.usageOf(r.Name)
		all = remoteUsage{all.hits + u.hits, all.misses + u.misses, all.saved + u.saved}
	}
	p.Total.setUsage(all)
	if disk, err := a.disk(); err == nil {
		free, size := disk.free.bytes, disk.size.bytes
		p.Disk = &pageDisk{Size: size, Free: free, Used: size - free, High: size / 10 * 9}
	}
}

// addRemotes makes the remotes that are searched for the rows of the overview.
func (p *page) addRemotes(most int) {
	p.Shown, p.Next = nil, ""
	word := strings.ToLower(p.Search)
	for _, r := range p.Remotes {
		if r.Name <= p.after || !strings.Contains(strings.ToLower(strings.Join([]string{r.Name, r.Package, r.Description, r.State}, "\n")), word) {
			continue
		}
		if len(p.Shown) == most {
			p.Next = p.Shown[most-1].Name
			return
		}
		p.Shown = append(p.Shown, r)
	}
}

// addFiles makes the files that are searched for the rows of a remote's page.
func (a *api) addFiles(p *page, r *http.Request, rem *remote, most int) {
	p.Files, p.Next, p.FilesError = nil, "", ""
	q := pageQuery{remote: rem.name, prefix: p.Prefix, after: p.after, limit: most}
	var err error
	if p.Search != "" {
		q.pattern, err = compilePattern("(?i)" + regexp.QuoteMeta(p.Search))
	}
	found, listErr := a.cache.index.listPage(r.Context(), q)
	if err := cmp.Or(err, listErr); err != nil {
		_, p.FilesError = statusAndDetail(err)
		return
	}
	p.Next = found.next
	for _, row := range found.rows {
		f := pageFile{listedArtifact: a.newListedArtifact(r, rem, row)}
		f.Fetched = formatSpan(a.now().Sub(f.FetchedAt))
		if f.ExpiresAt != nil {
			f.Left = formatSpan(f.ExpiresAt.Sub(a.now()).Abs())
		}
		slash := strings.LastIndexByte(strings.TrimSuffix(f.Path, "/"), '/') + 1
		f.Folder, f.File = f.Path[:slash], f.Path[slash:]
		p.Files = append(p.Files, f)
	}
}

//go:embed assets/page.html
var pageHTML string

//go:embed assets/page.css
var pageStyle string

//go:embed assets/page.js
var pageScript string

// pageTemplate is the page. html/template escapes what it is given; the style and the
// script are our own.
var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
	"bytes": formatBytes, "count": formatCount,
	"style": func() template.CSS { return template.CSS(pageStyle) }, "script": func() template.JS { return template.JS(pageScript) },
}).Parse(pageHTML))

// pagePolicy allows the page its own style and script, and to ask this server, nothing
// else (CSP level 3).
var pagePolicy = fmt.Sprintf("default-src 'none'; style-src 'sha256-%s'; script-src 'sha256-%s'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
	policyHash(pageStyle), policyHash(pageScript))

// policyHash is how a Content-Security-Policy names an embedded text.
func policyHash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// formatBytes writes a number of bytes for people.
func formatBytes(n int64) string {
	if n < 1<<10 {
		return strconv.FormatInt(n, 10) + " B"
	}
	f, unit := float64(n)/1024, 0
	for ; f >= 1024 && unit < 4; unit++ {
		f /= 1024
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + "KMGTP"[unit:unit+1] + "iB"
}

// formatCount writes a number with thin spaces between groups of three digits.
func formatCount(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u2009" + s[i:]
	}
	return s
}

// formatSpan writes a length of time for people, in its largest unit.
func formatSpan(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d >= day:
		return fmt.Sprintf("%d d", d/day)
	case d >= time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	case d >= time.Minute:
		return fmt.Sprintf("%d min", d/time.Minute)
	}
	return fmt.Sprintf("%d s", max(0, d/time.Second))
}
