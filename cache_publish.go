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
	text, err := readMetadata(io.NewSectionReader(body, 0, rec.Size))
	if err != nil {
		return err
	}
	lock := d.root.remote.name + "/" + d.folder
	if err := d.g.locks.lock(ctx, lock); err != nil {
		return err
	}
	defer d.g.locks.unlock(lock)
	p := &publication{g: d.g, next: &storedRoot{d.root, parseRoot(d.root.path, text, rec.SHA256), d.folder, rec}}
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

// needs notes what next has to wait for, if err says that it is not there.
func (p *publication) needs(name string, err error) {
	if err == nil {
		return
	}
	p.g.c.log.Debug("a file of the new generation is missing", "remote", p.next.remote.name, "path", name, "error", err)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.missing = append(p.missing, name)
}

// publish returns nil when next may be stored.
func (p *publication) publish(ctx context.Context) error {
	g := p.g
	if len(p.next.files) == 0 {
		return &problem{status: http.StatusBadGateway, cause: errBadUpstream,
			detail: fmt.Sprintf("the upstream of remote %q answers something that names no files instead of %s", p.next.remote.name, path.Base(p.next.path))}
	}
	p.fetchSuccessors(ctx)
	sibling, text := p.fetchSibling(ctx)
	p.fetchSignature(ctx, p.next)
	p.fetchSignature(ctx, sibling)
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if len(p.missing) > 0 {
		if err := g.hold(ctx, p.old, p.next, p.missing); err != nil {
			return err
		}
	}
	if sibling != nil {
		g.c.storeUnderSecondKey(ctx, sibling.target, sibling.rec, bytes.NewReader(text))
	}
	g.endHold(p.next.key())
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
		successor, now, found := p.next.successorOf(name, was)
		if !found || now.sha256 == was.sha256 && successor == name {
			continue
		}
		places <- struct{}{}
		running.Go(func() {
			defer func() { <-places }()
			p.fetchSuccessor(ctx, p.old.requestsFor(name, p.g), p.next.requestsFor(successor, p.g), now.holdsGeneration())
		})
	}
	running.Wait()
}

func (p *publication) fetchSuccessor(ctx context.Context, old, now []fileRequest, holds bool) {
	for i, was := range old {
		req := now[min(i, len(now)-1)]
		switch stored := p.g.openRecord(ctx, was.target) != nil; {
		case stored && holds:
			p.needs(req.path, p.g.fetchFile(ctx, req))
		case stored:
			p.mu.Lock()
			p.ahead = append(p.ahead, req)
			p.mu.Unlock()
		}
	}
}

// fetchSibling fetches the other root of the folder if it is stored: InRelease and
// Release name the same files.
func (p *publication) fetchSibling(ctx context.Context) (sibling *storedRoot, text []byte) {
	for _, t := range p.next.remote.rootsIn(p.next.folder) {
		if t.spelling == p.next.spelling || p.g.openRecord(ctx, t) == nil {
			continue
		}
		var err error
		sibling, text, err = p.g.fetchRoot(ctx, t, p.next.folder)
		if err == nil && !maps.Equal(sibling.files, p.next.files) {
			err = errAgreeing
		}
		p.needs(t.path, err)
		if err != nil {
			sibling = nil
		}
	}
	return sibling, text
}

// fetchRoot asks upstream what a root is now, without storing it.
func (g *generations) fetchRoot(ctx context.Context, t target, folder string) (*storedRoot, []byte, error) {
	file := fileRequest{target: t}
	resp, err := g.c.upstream.send(ctx, file.newUpstreamRequest(http.MethodGet, nil))
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	if err := g.c.statusError(file, resp); err != nil {
		return nil, nil, err
	}
	text, err := readMetadata(resp.Body)
	if err != nil {
		return nil, nil, err
	}
	hash := newBodyHash("")
	_, _ = hash.Write(text)
	rec := file.newRecord(resp.Header, g.c.now())
	rec.Size, rec.SHA256 = int64(len(text)), hash.sumHex()
	return &storedRoot{t, parseRoot(t.path, text, rec.SHA256), folder, rec}, text, nil
}

// fetchSignature fetches the signature of a new root if that of the old one is stored.
func (p *publication) fetchSignature(ctx context.Context, next *storedRoot) {
	if next == nil || signatureOf(next.target) == "" {
		return
	}
	old := p.g.openRoot(ctx, next.folder, next.target)
	if old == nil || old.sum == next.sum {
		return
	}
	if signature := p.g.openRecord(ctx, p.g.signatureRequest(old, "").target); signature != nil {
		p.needs(decodePath(signature.Path), p.g.fetchFile(ctx, p.g.signatureRequest(next, signature.SHA256)))
	}
}

// checkBody refuses a signature of another root: upstream may have published one
// between the two requests.
func (d *signatureDownload) checkBody(ctx context.Context, rec *record, _ io.ReaderAt) error {
	if rec.SHA256 == d.before {
		return fmt.Errorf("%w: the signature is still the old one", errAgreeing)
	}
	now, _, err := d.g.fetchRoot(ctx, d.root.target, d.root.folder)
	if err == nil && now.sum != d.root.sum {
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
			keep[f.sha256], folders[path.Dir(name)] = true, true
		}
	}
	prefix, now := decodePath(p.next.folder), p.g.c.now()
	if p.next.remote.packageType == "rpm" {
		prefix += "repodata/"
	}
	_, err := p.g.c.purgeRows(ctx, pageQuery{remote: p.next.remote.name, prefix: prefix}, func(row indexRow) (match, more bool) {
		name := decodePath(row.Path)
		_, sum, _ := strings.Cut(row.Path, "#")
		if digest, _ := p.next.remote.digestInName(name); digest != "" {
			_, sum, _ = strings.Cut(digest, ":")
		}
		return sum != "" && !keep[sum] && folders[p.next.folderOf(name)] && now.Sub(row.LastAccess) > oldGenerationLife, true
	})
	if err != nil && !errors.Is(err, errStoreDown) && ctx.Err() == nil {
		p.g.c.reportStoreError("database", "listing old metadata of", p.next.remote.name, err)
	}
}
