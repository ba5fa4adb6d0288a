// cache_publish.go: how a new root is published: once the successors of the files that
// clients use are in the store.

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
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
	// oldGenerationLife is how long a file stays that neither the root nor the one before
	// names, after it was replaced or last used: clients may still hold its root.
	oldGenerationLife = 3 * 24 * time.Hour
)

// publication is the step of a folder from one generation to the next.
type publication struct {
	g        *generations
	next     *storedRoot   // to be stored by its fill
	old      []*storedRoot // the stored roots of its folder, the one that rules first
	siblings []siblingRoot // the new roots that are published with next

	mu      sync.Mutex    // guards the fields below
	missing []string      // what next has to wait for
	ahead   []fileRequest // what is fetched when next is published
}

// siblingRoot is the other root of a folder: InRelease and Release name the same files.
type siblingRoot struct {
	*storedRoot
	rec      *record
	text     []byte
	mayBeCut bool // and so it must not be stored
}

// checkBody publishes the root: the fill stores it when nil is returned.
func (d *rootDownload) checkBody(ctx context.Context, rec *record, body io.ReaderAt) error {
	text, err := readMetadata(io.NewSectionReader(body, 0, rec.Size))
	if err != nil {
		return err
	}
	g, t := d.g, d.root
	if err := g.locks.lock(ctx, t.folderID()); err != nil {
		return err
	}
	defer g.locks.unlock(t.folderID())
	var old []*storedRoot
	for _, at := range t.remote.rootsIn(rootFolder(t.spelling)) {
		switch root, err := g.openRoot(ctx, at); {
		case errors.Is(err, errStoreDown): // it cannot be told what the root would take the place of
			return errors.Join(newAgreeingError(t), err)
		case err != nil:
		case root.sum == rec.SHA256: // upstream has the stored generation, or has gone back to it
			return nil
		default:
			old = append(old, root)
		}
	}
	next := &storedRoot{t, parseRoot(t.spelling, text, rec.SHA256)}
	switch {
	case len(old) == 0:
		return nil
	case !next.isRoot:
		return &problem{status: http.StatusBadGateway, cause: errBadUpstream,
			detail: fmt.Sprintf("the upstream of remote %q answers something that names no files instead of %s", t.remote.name, path.Base(t.path))}
	case d.isHeld():
		return newAgreeingError(t)
	}
	return (&publication{g: g, next: next, old: old}).publish(ctx)
}

// publish returns nil when next may be stored.
func (p *publication) publish(ctx context.Context) error {
	p.fetchSuccessors(ctx)
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if len(p.missing) > 0 {
		if err := p.g.hold(p.old[0].validUntil, p.next, p.missing); err != nil {
			return err
		}
	}
	c := p.g.c
	for _, s := range p.siblings {
		c.storeUnderSecondKey(ctx, s.target, s.rec, bytes.NewReader(s.text))
	}
	c.fills.running.Go(func() {
		for _, req := range p.ahead {
			_ = p.g.fetchFile(c.ctx, req)
		}
		p.dropOld(c.ctx)
	})
	return nil
}

// nextOf returns the root that takes the place of old. Where that is not next it is
// fetched, and has to agree with next.
func (p *publication) nextOf(ctx context.Context, old *storedRoot) *storedRoot {
	if old.spelling == p.next.spelling {
		return p.next
	}
	switch sibling, err := p.g.fetchRoot(ctx, old.target); {
	case errors.Is(err, fs.ErrNotExist): // it holds nothing
		p.needs(old.path, p.g.c.purgeFile(ctx, old.remote.name, old.key()))
	case err != nil:
		p.needs(old.path, err)
	case sibling.mayBeCut, !p.next.agreesWith(sibling.rootNames):
		p.needs(old.path, errAgreeing)
	default:
		p.siblings = append(p.siblings, sibling)
		return sibling.storedRoot
	}
	return p.next // which names the same files
}

// fetchRoot asks upstream what a root is now, without storing it.
func (g *generations) fetchRoot(ctx context.Context, t target) (root siblingRoot, err error) {
	file := fileRequest{target: t}
	reply, resp, err := file.askUnstored(ctx, g.c, file.newUpstreamRequest(http.MethodGet, nil))
	if err != nil {
		return root, err
	}
	defer resp.Body.Close()
	text, err := readMetadata(resp.Body)
	if err != nil {
		return root, err
	}
	rec := reply.rec
	rec.Size, rec.SHA256 = int64(len(text)), fmt.Sprintf("%x", sha256.Sum256(text))
	return siblingRoot{&storedRoot{t, parseRoot(t.spelling, text, rec.SHA256)}, rec, text, !resp.hasKnownEnd()}, nil
}

// fetchSuccessors fetches what takes the place of the stored files of the old roots.
func (p *publication) fetchSuccessors(ctx context.Context) {
	fetches := map[string]func(){} // by path: two roots of a folder name the same files
	for _, old := range p.old {
		next := p.nextOf(ctx, old)
		for _, was := range old.files {
			if now, found := next.successorOf(was); found && (now.path != was.path || now.sha256 != was.sha256) {
				fetches[was.path] = func() {
					p.fetchSuccessor(ctx, p.g.requestsFor(old, was), p.g.requestsFor(next, now), now.holdsGeneration())
				}
			}
		}
	}
	var running sync.WaitGroup
	places := make(chan struct{}, maxSuccessorFetches)
	for _, fetch := range fetches {
		places <- struct{}{}
		running.Go(func() {
			defer func() { <-places }()
			fetch()
		})
	}
	running.Wait()
}

// fetchSuccessor fetches a file in the ways in which the one before it was fetched.
func (p *publication) fetchSuccessor(ctx context.Context, old, now []fileRequest, holds bool) {
	for i, was := range old {
		req := now[min(i, len(now)-1)]
		rec, err := storedRecord(ctx, p.g.c, was)
		if errors.Is(err, fs.ErrNotExist) && was.digest != "" {
			rec, err = storedRecord(ctx, p.g.c, was.beforeRoot())
		}
		if holds && errors.Is(err, errStoreDown) { // it may be there
			p.needs(req.path, err)
		}
		if err != nil || (was.digest != "" && was.digest != "sha256:"+rec.SHA256) {
			continue
		}
		if req.rulesOthers() {
			p.g.before.put(req.key(), rec.SHA256)
		}
		if holds {
			p.needs(req.path, p.g.fetchFile(ctx, req))
			continue
		}
		p.mu.Lock()
		p.ahead = append(p.ahead, req)
		p.mu.Unlock()
	}
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

// requestBody takes a signature that is gone for that of a root that upstream is replacing,
// as long as there is a copy.
func (d *signatureDownload) requestBody(ctx context.Context, up *upstream, req upstreamRequest) (*upstreamResponse, error) {
	resp, err := up.send(ctx, req)
	if err == nil && req.hasCopy && slices.Contains(refusals, resp.StatusCode) {
		resp.discardBody()
		return nil, newAgreeingError(d.root.target)
	}
	return resp, err
}

// checkBody refuses a signature of another root: upstream may have published one
// between the two requests.
func (d *signatureDownload) checkBody(ctx context.Context, rec *record, _ io.ReaderAt) error {
	if before, _ := d.g.before.get(storageKey(rec.Remote, rec.Path)); rec.SHA256 == before {
		return newAgreeingError(d.root.target)
	}
	now, err := d.g.fetchRoot(ctx, d.root.target)
	if err == nil && now.sum != d.root.sum {
		err = newAgreeingError(d.root.target)
	}
	return err
}

// dropOld removes what neither generation names any more and nobody has used for long.
// What p replaces counts as used now.
func (p *publication) dropOld(ctx context.Context) {
	named, replaced, folders := map[string]bool{}, map[string]bool{}, map[string]bool{}
	note := func(root *storedRoot, sums map[string]bool) {
		for _, f := range root.files {
			sums[f.sha256], sums[f.sha512], folders[path.Dir(f.path)] = true, true, true
		}
	}
	note(p.next, named)
	for _, s := range p.siblings {
		note(s.storedRoot, named)
	}
	for _, root := range p.old {
		note(root, replaced)
	}
	c, r, now := p.g.c, p.next.remote, p.g.c.now()
	c.flushCounts(ctx) // what was used just now stays
	_, err := c.purgeRows(ctx, pageQuery{remote: r.name, prefix: p.next.path[:strings.LastIndexByte(p.next.path, '/')+1]}, func(row indexRow) bool {
		name := decodePath(row.Path)
		_, sum, _ := strings.Cut(row.Path, "#")
		if digest, _ := r.digestInName(name); digest != "" {
			_, sum, _ = strings.Cut(digest, ":")
		}
		switch {
		case sum == "", named[sum], !folders[metadataFolder(name)]:
			return false
		case replaced[sum]:
			c.uses.addUses(fileUse{remote: r.name, key: row.Key, last: now})
			return false
		}
		return now.Sub(row.LastAccess) > oldGenerationLife
	})
	if err != nil && !errors.Is(err, errStoreDown) && ctx.Err() == nil {
		c.reportStoreError("database", "listing old metadata of", r.name, err)
	}
}
