// cache_publish.go: how a new root is published: once the successors of the files that
// clients use are in the store.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// maxSuccessorFetches is how many files of a new generation are fetched at once.
	maxSuccessorFetches = 8
	// oldGenerationLife is how long a file stays, after its last use, that neither the
	// root nor the one before names.
	oldGenerationLife = 3 * 24 * time.Hour
)

// checkBody publishes the root: the fill stores it when nil is returned.
func (d *rootDownload) checkBody(ctx context.Context, rec *record, body io.ReaderAt) error {
	text, err := readRoot(io.NewSectionReader(body, 0, rec.Size))
	if err != nil {
		return err
	}
	p := &publication{g: d.g, next: &storedRoot{d.root, parseRoot(d.root.path, text, rec.SHA256), d.folder}}
	lock := d.root.remote.name + "/" + d.folder
	if err := d.g.locks.lock(ctx, lock); err != nil {
		return err
	}
	defer d.g.locks.unlock(lock)
	if p.old = d.g.rulingRoot(ctx, d.root.remote, d.folder); p.old == nil {
		return nil
	}
	return p.publish(ctx)
}

// publication is the step from one generation to the next.
type publication struct {
	g         *generations
	old, next *storedRoot

	mu      sync.Mutex    // guards the fields below
	missing []string      // what next has to wait for
	ahead   []fileRequest // what is fetched when next is published
}

func (p *publication) miss(name string, err error) {
	p.g.c.log.Debug("a file of the new generation is missing", "remote", p.next.remote.name, "path", name, "error", err)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.missing = append(p.missing, name)
}

// publish returns nil when next may be stored.
func (p *publication) publish(ctx context.Context) error {
	g, key := p.g, p.next.key()
	if len(p.next.files) == 0 {
		return &problem{status: http.StatusBadGateway, cause: errBadUpstream,
			detail: fmt.Sprintf("the upstream of remote %q answers something that names no files instead of %s", p.next.remote.name, path.Base(p.next.path))}
	}
	p.fetchSuccessors(ctx)
	siblings := p.fetchSiblings(ctx)
	p.fetchSignature(ctx, p.next)
	for _, s := range siblings {
		if s.storedRoot != nil {
			p.fetchSignature(ctx, s.storedRoot)
		}
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	slices.Sort(p.missing)
	if len(p.missing) > 0 {
		if err := g.hold(ctx, key, p.old, p.next, p.missing); err != nil {
			return err
		}
	}
	for _, s := range siblings {
		if s.storedRoot != nil {
			g.c.storeUnderSecondKey(ctx, s.at, s.rec, bytes.NewReader(s.text))
		} else {
			_ = g.c.removeFile(ctx, s.at.remote.name, s.at.key())
		}
		g.endHold(s.at.key())
	}
	g.endHold(key)
	g.c.fills.running.Go(func() {
		for _, req := range p.ahead {
			_ = g.fetchFile(g.c.ctx, req)
		}
		p.dropOld(g.c.ctx)
	})
	return nil
}

// fetchSuccessors fetches what takes the place of the stored files of the old
// generation, in the way in which they were fetched.
func (p *publication) fetchSuccessors(ctx context.Context) {
	var running sync.WaitGroup
	places := make(chan struct{}, maxSuccessorFetches)
	for name, was := range p.old.files {
		successor, f, found := p.next.successorOf(name, was)
		if !found || f.sha256 == was.sha256 && successor == name {
			continue
		}
		places <- struct{}{}
		running.Go(func() {
			defer func() { <-places }()
			p.fetchSuccessor(ctx, name, successor)
		})
	}
	running.Wait()
}

func (p *publication) fetchSuccessor(ctx context.Context, name, successor string) {
	now := p.next.requestsFor(successor, p.g)
	for i, was := range p.old.requestsFor(name, p.g) {
		rec := p.g.openRecord(ctx, was.target)
		if rec == nil && i == 0 { // from before there was a root
			was.spelling = trimSuffixes(was.spelling)
			if rec = p.g.openRecord(ctx, was.target); rec != nil && rec.SHA256 != p.old.files[name].sha256 {
				rec = nil
			}
		}
		if rec == nil {
			continue
		}
		req := now[min(i, len(now)-1)]
		if !p.next.files[successor].holdsGeneration() {
			p.mu.Lock()
			p.ahead = append(p.ahead, req)
			p.mu.Unlock()
		} else if err := p.g.fetchFile(ctx, req); err != nil {
			p.miss(req.path, err)
		}
	}
}

// sibling is the other root of the same generation, as upstream has it now.
type sibling struct {
	*storedRoot // nil: upstream does not have it any more
	at          target
	rec         *record
	text        []byte
}

// fetchSiblings fetches the other roots of the folder that are stored: InRelease and
// Release name the same files.
func (p *publication) fetchSiblings(ctx context.Context) (siblings []sibling) {
	for _, t := range p.next.remote.rootsIn(p.next.folder) {
		if t.spelling == p.next.spelling || p.g.openRecord(ctx, t) == nil {
			continue
		}
		s, err := p.g.fetchRoot(ctx, t, p.next.folder)
		if err == nil && s.storedRoot != nil && !maps.Equal(s.files, p.next.files) {
			err = errAgreeing
		}
		if err != nil {
			p.miss(t.path, err)
			continue
		}
		siblings = append(siblings, s)
	}
	return siblings
}

// fetchRoot asks upstream what a root is now, without storing it.
func (g *generations) fetchRoot(ctx context.Context, t target, folder string) (sibling, error) {
	file := fileRequest{target: t, behavior: download{}}
	resp, err := g.c.upstream.send(ctx, file.newUpstreamRequest(http.MethodGet, nil))
	if err != nil {
		return sibling{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusGone {
		return sibling{at: t}, nil
	}
	if err := g.c.statusError(file, resp); err != nil {
		return sibling{}, err
	}
	text, err := readRoot(resp.Body)
	if err == nil && resp.ContentLength >= 0 && int64(len(text)) != resp.ContentLength {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return sibling{}, err
	}
	rec := file.newRecord(resp.Header, g.c.now())
	hash := newBodyHash("")
	_, _ = hash.Write(text)
	rec.Size, rec.SHA256 = int64(len(text)), hash.sumHex()
	return sibling{&storedRoot{t, parseRoot(t.path, text, rec.SHA256), folder}, t, rec, text}, nil
}

// fetchSignature fetches the signature of a new root if that of the old one is stored.
func (p *publication) fetchSignature(ctx context.Context, next *storedRoot) {
	was := p.g.openRecord(ctx, next.target)
	if was == nil || was.SHA256 == next.sum || signatureOf(next.target) == "" {
		return
	}
	old := &storedRoot{next.target, &rootNames{sum: was.SHA256}, next.folder}
	signature := p.g.openRecord(ctx, p.g.signatureRequest(old, "").target)
	if signature == nil {
		return
	}
	if err := p.g.fetchFile(ctx, p.g.signatureRequest(next, signature.SHA256)); err != nil {
		p.miss(decodePath(signature.Path), err)
	}
}

// checkBody refuses a signature of another root: upstream may have published one
// between the two requests.
func (d *signatureDownload) checkBody(ctx context.Context, rec *record, _ io.ReaderAt) error {
	if rec.SHA256 == d.before {
		return fmt.Errorf("%w: the signature is still the old one", errAgreeing)
	}
	now, err := d.g.fetchRoot(ctx, d.root.target, d.root.folder)
	if err == nil && (now.storedRoot == nil || now.sum != d.root.sum) {
		err = &problem{status: http.StatusServiceUnavailable, cause: errAgreeing, retryAfter: time.Second,
			detail: fmt.Sprintf("the upstream of remote %q has another %s than the one whose signature was asked for", d.root.remote.name, path.Base(d.root.path))}
	}
	return err
}

// dropOld removes what neither generation names any more and nobody has used for long.
func (p *publication) dropOld(ctx context.Context) {
	keep, folders := map[string]bool{}, map[string]bool{".": true}
	for _, root := range []*storedRoot{p.old, p.next} {
		keep[root.sum] = true
		for name, f := range root.files {
			keep[f.sha256], keep[f.sha512], folders[path.Dir(name)] = true, true, true
		}
	}
	prefix, now := decodePath(p.next.folder), p.g.c.now()
	if p.next.remote.packageType == "rpm" {
		prefix += "repodata/"
	}
	_, err := p.g.c.purgeRows(ctx, pageQuery{remote: p.next.remote.name, prefix: prefix}, func(row indexRow) bool {
		name := decodePath(row.Path)
		_, sum, _ := strings.Cut(row.Path, "#")
		if digest, _ := p.next.remote.digestInName(name); digest != "" {
			_, sum, _ = strings.Cut(digest, ":")
		}
		return sum != "" && !keep[sum] && folders[p.next.folderOf(name)] && now.Sub(row.LastAccess) > oldGenerationLife
	})
	if err != nil && !errors.Is(err, errStoreDown) && ctx.Err() == nil {
		p.g.c.reportStoreError("database", "listing old metadata of", p.next.remote.name, err)
	}
}
