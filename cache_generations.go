// cache_generations.go: metadata that agrees. A stored root and the files that it names
// are a generation; clients see one generation at a time, whatever upstream publishes
// in the middle of it. Replacing the stored root is what publishes the next one, here
// and on every replica.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"strings"
	"time"
)

const (
	// rootPause is how long a root is left alone after a try that failed, or after it
	// was asked out of turn.
	rootPause = time.Minute
	// maxHold ends a hold: what is missing for so long does not come any more.
	maxHold = 24 * time.Hour
)

// errAgreeing: upstream has a new root, but not all of the files that clients need with
// it.
var errAgreeing = errors.New("the metadata of the upstream does not agree yet")

// generations finds what stored roots name, and publishes new roots. Its methods may be
// called concurrently.
type generations struct {
	c      *cache
	parsed *lru[*rootNames]              // by key and SHA-256
	asked  *boundedMap[string, struct{}] // keys of roots that were asked out of turn
	tried  *boundedMap[string, struct{}] // keys of roots whose successor could not be published just now
	held   *boundedMap[string, heldRoot] // roots whose successors are held, by key
	locks  keyedLock                     // folders whose root is being published, and keys of roots that are asked out of turn
}

// heldRoot is a root whose successor is held, and since when.
type heldRoot struct {
	sum   string
	since time.Time
}

func newGenerations(c *cache, now func() time.Time) *generations {
	return &generations{
		c:      c,
		parsed: newLRU[*rootNames](parsedRootsBudget, 0),
		asked:  newBoundedMap[string, struct{}](maxRemembered, now),
		tried:  newBoundedMap[string, struct{}](maxRemembered, now),
		held:   newBoundedMap[string, heldRoot](maxRemembered, now),
	}
}

// rootDownload is the behavior of a root: it is published only when what it names is
// there.
type rootDownload struct {
	download
	g      *generations
	root   target
	folder string
}

// signatureDownload is the behavior of a root's signature in a file of its own.
type signatureDownload struct {
	download
	g      *generations
	root   *storedRoot
	before string // SHA-256 of the signature of another root, which this one is not; may be ""
}

// namedDownload is the behavior of a file that a root names, or whose name is its own
// hash.
type namedDownload struct {
	download
	g      *generations
	file   target      // as the client named it
	root   *storedRoot // nil: it is looked up when it is needed
	size   int64       // 0: not known
	byName string      // the wire path where upstream does not have the first one; "": none is known
}

// rulesOthers reports whether the file must be in the store before a client has it: the
// client asks for other files next, and the store says which are right.
func (file *fileRequest) rulesOthers() bool {
	switch file.behavior.(type) {
	case *rootDownload, *signatureDownload:
		return true
	}
	return false
}

// findOrFetch is cache.findOrFetch for a file that a root may name. Where upstream turns
// out to be in another generation the root is asked, and if that publishes a new one the
// file is answered under it.
func (g *generations) findOrFetch(ctx context.Context, file fileRequest, rng byteRange) (*fileReply, error) {
	for again := false; ; again = true {
		req := g.resolve(ctx, file)
		named, isNamed := req.behavior.(*namedDownload)
		if isNamed && rng.head && named.byName != "" {
			req.wire = named.byName // a HEAD has no second way
		}
		reply, err := g.c.findOrFetch(ctx, req, rng)
		if err == nil {
			g.noteReply(&req, reply)
			return reply, nil
		}
		changed := false
		if signature, ok := req.behavior.(*signatureDownload); ok && errors.Is(err, errAgreeing) {
			changed = g.askAgain(ctx, signature.root, true)
		} else if isNamed && isOutdated(err) {
			if root, _ := named.findRoot(ctx); root != nil {
				changed = g.askAgain(ctx, root, false)
			}
		}
		switch {
		case changed && !again:
		case isNamed && errors.Is(err, errDigest):
			return nil, &problem{status: http.StatusBadGateway, cause: err,
				detail: fmt.Sprintf("the upstream of remote %q has other bytes under this name than its metadata says", file.remote.name)}
		default:
			return nil, err
		}
	}
}

// isOutdated reports whether upstream's answer says that it is in another generation.
func isOutdated(err error) bool {
	status, _ := errors.AsType[*upstreamStatus](err)
	return (status != nil && status.isGone()) || errors.Is(err, errDigest)
}

// resolve returns the request for what file is in the stored generation.
func (g *generations) resolve(ctx context.Context, file fileRequest) fileRequest {
	file.behavior = download{}
	if digest, own := file.remote.digestInName(file.path); own {
		if digest != "" {
			file.digest, file.remote = digest, file.remote.keepingImmutable()
			file.behavior = &namedDownload{g: g, file: file.target}
		}
		return file
	}
	if strings.Contains(file.spelling, "?") {
		return file
	}
	for _, folder := range file.rootFolders() {
		for _, t := range file.remote.rootsIn(folder) {
			if t.spelling == file.spelling {
				file.behavior = &rootDownload{g: g, root: file.target, folder: folder}
				return file
			}
			root := g.openRoot(ctx, folder, t)
			if root == nil || len(root.files) == 0 {
				continue
			}
			if signatureOf(t) == file.spelling {
				return g.signatureRequest(root, "")
			}
			if name, found := root.nameOf(&file.target, ""); found && len(file.spelling)+65 <= maxSpelling {
				return root.requestsFor(name, g)[0]
			}
		}
	}
	return file
}

// keepingImmutable is r without immutable_ttl, for files that cannot change.
func (r *remote) keepingImmutable() *remote {
	if r.immutableTTL == 0 {
		return r
	}
	kept := *r
	kept.immutableTTL = 0
	return &kept
}

// signatureRequest is the request for the signature of exactly that root.
func (g *generations) signatureRequest(root *storedRoot, before string) fileRequest {
	t := target{remote: root.remote.keepingImmutable(), class: immutable}
	t.wire = signatureOf(root.target)
	t.path, t.spelling = decodePath(t.wire), namedSpelling(t.wire, root.sum)
	return fileRequest{target: t, behavior: &signatureDownload{g: g, root: root, before: before}}
}

// requestsFor are the requests for a file of the root: by name and, if it has it so, by
// hash. Upstream may be past this generation by name and is asked by hash first.
func (root *storedRoot) requestsFor(name string, g *generations) []fileRequest {
	f := root.files[name]
	t := target{remote: root.remote.keepingImmutable(), path: decodePath(root.folder) + name, spelling: root.folder + f.spelling, class: immutable}
	t.wire = t.spelling
	named := &namedDownload{g: g, file: t, root: root, size: f.size, byName: t.wire}
	byName := fileRequest{target: t, digest: "sha256:" + f.sha256, behavior: named}
	if _, own := t.remote.digestInName(t.path); !own {
		byName.spelling = namedSpelling(t.spelling, f.sha256)
	}
	if !root.byHash {
		return []fileRequest{byName}
	}
	byHash := byName
	byHash.spelling = t.spelling[:strings.LastIndexByte(t.spelling, '/')+1] + "by-hash/SHA256/" + f.sha256
	byHash.path, byHash.wire, byName.wire = decodePath(byHash.spelling), byHash.spelling, byHash.spelling
	return []fileRequest{byName, byHash}
}

// openRecord returns the record of a stored file, or nil.
func (g *generations) openRecord(ctx context.Context, t target) *record {
	obj, err := g.c.objects.open(ctx, t.key(), -1)
	if err != nil || obj.rec.Path != t.spelling {
		return nil
	}
	return obj.rec
}

// requestBody asks by hash first and by name second: upstream keeps what it has by hash
// for some generations. What has another size than the root says need not be read.
func (n *namedDownload) requestBody(ctx context.Context, up *upstream, req upstreamRequest) (*upstreamResponse, error) {
	resp, err := n.requestSized(ctx, up, req)
	if err != nil && !errors.Is(err, errDigest) {
		return nil, err
	}
	if err == nil && resp.StatusCode != http.StatusNotFound && resp.StatusCode != http.StatusGone && resp.StatusCode != http.StatusForbidden {
		return resp, nil
	}
	if byName := n.findName(ctx); byName != "" && byName != req.wire {
		resp.discardBody()
		req.wire = byName
		return n.requestSized(ctx, up, req)
	}
	return resp, err
}

// requestSized asks for the file; a body of another size is errDigest.
func (n *namedDownload) requestSized(ctx context.Context, up *upstream, req upstreamRequest) (*upstreamResponse, error) {
	resp, err := up.send(ctx, req)
	if err == nil && resp.StatusCode == http.StatusOK && n.size > 0 && resp.ContentLength >= 0 && resp.ContentLength != n.size {
		err = fmt.Errorf("%w: it has %d bytes, the root says %d", errDigest, resp.ContentLength, n.size)
		resp.discardBody()
		return nil, err
	}
	return resp, err
}

// findName returns the wire path by name of a file that was asked for by hash.
func (n *namedDownload) findName(ctx context.Context) string {
	if n.root != nil {
		return n.byName
	}
	if root, name := n.findRoot(ctx); root != nil {
		return root.folder + root.files[name].spelling
	}
	return ""
}

// findRoot returns the stored root that names the file, and its name there.
func (n *namedDownload) findRoot(ctx context.Context) (*storedRoot, string) {
	if n.root != nil {
		return n.root, ""
	}
	digest, _ := n.file.remote.digestInName(n.file.path)
	for _, folder := range n.file.rootFolders() {
		if root := n.g.rulingRoot(ctx, n.file.remote, folder); root != nil {
			if name, found := root.nameOf(&n.file, digest); found {
				return root, name
			}
		}
	}
	return nil, ""
}

// askAgain asks upstream for a root whatever its TTL, but not often unless it must be,
// and reports whether there is another one by now.
func (g *generations) askAgain(ctx context.Context, root *storedRoot, must bool) (changed bool) {
	key := root.key()
	if g.locks.lock(ctx, key) != nil { // who comes second sees what the first has found
		return false
	}
	defer g.locks.unlock(key)
	if _, asked := g.asked.get(key); must || !asked || g.c.fills.isFilling(key) {
		g.asked.putFor(key, struct{}{}, rootPause)
		expired := *root.remote
		expired.mutableTTL = 0
		file := fileRequest{target: root.target, behavior: &rootDownload{g: g, root: root.target, folder: root.folder}}
		file.remote = &expired
		if reply, err := g.c.findOrFetch(ctx, file, byteRange{head: true}); err == nil {
			reply.body.Close()
		}
	}
	now := g.openRoot(ctx, root.folder, root.target)
	return now != nil && now.sum != root.sum
}

// askAfterMismatch asks for the root of a file whose clients have been cut off already,
// because it turned out to be of another generation.
func (g *generations) askAfterMismatch(file *fileRequest) {
	if n, ok := file.behavior.(*namedDownload); ok {
		g.c.fills.running.Go(func() {
			if root, _ := n.findRoot(g.c.ctx); root != nil {
				g.askAgain(g.c.ctx, root, false)
			}
		})
	}
}

// fetchFile brings a file into the store, unless it is there.
func (g *generations) fetchFile(ctx context.Context, file fileRequest) error {
	for range maxLookAgains {
		ended := g.c.fills.ended.Load()
		if g.openRecord(ctx, file.target) != nil {
			return nil
		}
		f, _ := g.c.joinFill(file.key(), file, nil, ended)
		outcome, err := f.awaitEnd(ctx)
		switch {
		case err != nil:
			return err
		case outcome.kind == outcomeNoSpool:
			return errNoSpace
		case outcome.kind == outcomeFailed:
			return outcome.err
		}
	}
	return errStoreDown // it was fetched and is not there
}

// heldRoots counts the roots whose successors are held, for each remote that may have
// any.
func (g *generations) heldRoots(cfg *config) map[string]float64 {
	counts := map[string]float64{}
	for name, r := range cfg.remotes {
		if !r.local && (r.packageType == "rpm" || r.packageType == "deb") {
			counts[name] = 0
			for _, key := range g.held.keys() {
				if strings.HasPrefix(key, name+"/") {
					counts[name]++
				}
			}
		}
	}
	return counts
}

// isHeld reports whether the successor of a root could not be published just now.
func (g *generations) isHeld(file *fileRequest, key string) bool {
	if _, isRoot := file.behavior.(*rootDownload); !isRoot {
		return false
	}
	_, tried := g.tried.get(key)
	return tried
}

// hold keeps next from being published while files are missing: its error is
// errAgreeing. It is nil once that has lasted for too long.
func (g *generations) hold(ctx context.Context, old, next *storedRoot, missing []string) error {
	key, now := next.key(), g.c.now()
	h, held := g.held.get(key)
	if !held {
		h.since = now
		if rec := g.openRecord(ctx, next.target); rec != nil {
			h.sum = rec.SHA256
		}
	}
	if !old.validUntil.IsZero() && !now.Before(old.validUntil) || now.Sub(h.since) >= maxHold {
		g.c.log.Warn("new metadata is published without some of its files, because clients cannot use the old one any more",
			"remote", next.remote.name, "path", next.path, "missing", missing)
		return nil
	}
	if !held {
		g.held.put(key, h)
		g.c.log.Warn("new metadata is held back until the upstream has all of its files: clients get the old generation",
			"remote", next.remote.name, "path", next.path, "missing", missing)
	}
	g.tried.putFor(key, struct{}{}, rootPause)
	return &problem{status: http.StatusServiceUnavailable, cause: errAgreeing, retryAfter: rootPause,
		detail: fmt.Sprintf("the upstream of remote %q is changing its metadata: %s is not complete yet", next.remote.name, path.Base(next.path))}
}

// noteReply ends the hold of a root if upstream has gone back to it, or if another
// replica has published its successor.
func (g *generations) noteReply(file *fileRequest, reply *fileReply) {
	if _, isRoot := file.behavior.(*rootDownload); !isRoot {
		return
	}
	key := file.key()
	if h, held := g.held.get(key); held && (reply.result == "REVALIDATED" || reply.hashKnown && reply.rec.SHA256 != h.sum) {
		g.endHold(key)
	}
}

// endHold is called when the successor of a root is published or not wanted any more.
func (g *generations) endHold(key string) {
	if h, held := g.held.get(key); held {
		g.held.delete(key)
		g.tried.delete(key)
		g.c.log.Info("metadata is not held back any more", "key", key, "after", g.c.now().Sub(h.since).Round(time.Second).String())
	}
}
