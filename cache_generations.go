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
	"slices"
	"strings"
	"time"
)

const (
	// rootPause is how long the roots of a folder are left alone after a try that failed,
	// at most, or after one was asked out of turn.
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
	asked  *boundedMap[string, struct{}] // folders whose roots are left alone for a while
	held   *boundedMap[string, heldRoot] // by folder
	// before has the SHA-256 of signatures of the root before, which are not those of the
	// next one, by the keys of these. They count behind a hold that has ended too.
	before *boundedMap[string, string]
	locks  keyedLock // folders whose root is being published, and keys of roots that are asked out of turn
}

// heldRoot is a root whose successor is held.
type heldRoot struct {
	key   string
	since time.Time
}

// rootDownload is the behavior of a root: it is published only when what it names is
// there.
type rootDownload struct {
	download
	g    *generations
	root target
}

// signatureDownload is the behavior of a root's signature in a file of its own.
type signatureDownload struct {
	download
	g    *generations
	root *storedRoot
}

// namedDownload is the behavior of a file that a root names, or whose name is its own
// hash.
type namedDownload struct {
	download
	g    *generations
	file target      // as the client named it
	root *storedRoot // nil: it is looked up when it is needed
	is   namedFile   // what the file is to the root
}

// rulesOthers reports whether the file must be in the store before a client has it: the
// client asks for other files next, and the store says which are right.
func (file *fileRequest) rulesOthers() bool {
	_, isRoot := file.behavior.(*rootDownload)
	_, isSignature := file.behavior.(*signatureDownload)
	return isRoot || isSignature
}

// findOrFetch is cache.findOrFetch for a file that a root may name. Where upstream turns
// out to be in another generation the root is asked, and if that publishes a new one the
// file is answered under it.
func (g *generations) findOrFetch(ctx context.Context, file fileRequest, rng byteRange) (*fileReply, error) {
	for again := false; ; again = true {
		req := g.resolve(ctx, file)
		reply, err := g.c.findOrFetch(ctx, req, rng)
		if err == nil {
			g.noteReply(&req, reply)
			return reply, nil
		}
		if !again && g.askAfter(ctx, &req, err) {
			continue
		}
		if _, isNamed := req.behavior.(*namedDownload); isNamed && errors.Is(err, errDigest) {
			err = &problem{status: http.StatusBadGateway, cause: err,
				detail: fmt.Sprintf("the upstream of remote %q has other bytes under this name than its metadata says", file.remote.name)}
		}
		return nil, err
	}
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
	switch root, f := g.findRoot(ctx, &file.target); {
	case root == nil:
	case root.spelling == file.spelling:
		file.behavior = &rootDownload{g: g, root: file.target}
	default:
		return g.requestsFor(root, f)[0]
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

// requestsFor are the requests for a file of the root: by name and, if it has them so, by
// hash. Upstream may be past this generation by name and is asked by hash first.
func (g *generations) requestsFor(root *storedRoot, f namedFile) []fileRequest {
	t := target{remote: root.remote.keepingImmutable(), path: f.path, spelling: f.spelling, wire: f.spelling, class: immutable}
	byName := fileRequest{target: t, digest: "sha256:" + f.sha256, behavior: &namedDownload{g: g, file: t, root: root, is: f}}
	if _, own := t.remote.digestInName(f.path); !own {
		byName.spelling = namedSpelling(f.spelling, f.sha256)
	}
	if f.kind == signatureKind { // no hash tells whether it is the root's: it has a TTL
		byName.digest, byName.behavior = "", &signatureDownload{g: g, root: root}
		byName.class, byName.builtin = mutable, true
		return []fileRequest{byName}
	}
	requests := []fileRequest{byName}
	dir := f.spelling[:strings.LastIndexByte(f.spelling, '/')+1] + "by-hash/"
	for _, name := range []string{"SHA256/" + f.sha256, "SHA512/" + f.sha512} {
		if root.byHash && !strings.HasSuffix(name, "/") {
			byHash := byName
			byHash.spelling, byHash.wire, byHash.path = dir+name, dir+name, decodePath(dir+name)
			requests = append(requests, byHash)
			requests[0].wire = requests[1].wire
		}
	}
	return requests
}

// beforeRoot is the request for the file as it may have been stored before the root was.
func (file fileRequest) beforeRoot() fileRequest {
	file.spelling, file.behavior = trimSuffixes(file.spelling), download{}
	return file
}

// refusals are the statuses of a file that is not there any more. 403 is what S3 says of one
// to whom it does not let list.
var refusals = []int{http.StatusForbidden, http.StatusNotFound, http.StatusGone}

// requestBody asks by hash first and by name second: upstream keeps what it has by hash
// for some generations. What has another size than the root says need not be read.
func (n *namedDownload) requestBody(ctx context.Context, up *upstream, req upstreamRequest) (*upstreamResponse, error) {
	_, f := n.findRoot(ctx)
	send := func() (*upstreamResponse, error) {
		resp, err := up.send(ctx, req)
		if err == nil && resp.StatusCode == http.StatusOK && f.size > 0 && resp.ContentLength >= 0 && resp.ContentLength != f.size {
			resp.discardBody()
			return nil, fmt.Errorf("%w: it has %d bytes, the root says %d", errDigest, resp.ContentLength, f.size)
		}
		return resp, err
	}
	resp, err := send()
	refused := err == nil && slices.Contains(refusals, resp.StatusCode)
	if (refused || errors.Is(err, errDigest)) && f.spelling != "" && f.spelling != req.wire {
		resp.discardBody()
		req.wire = f.spelling
		return send()
	}
	return resp, err
}

// findRoot returns the stored root that names the file, and what the file is to it.
func (n *namedDownload) findRoot(ctx context.Context) (*storedRoot, namedFile) {
	if n.root != nil {
		return n.root, n.is
	}
	return n.g.findRoot(ctx, &n.file)
}

// findOtherWay returns the request for another way to the same bytes that has brought them
// or is about to: by name where the file was asked for by hash, the other way round, or as
// upstream had it before a root was stored. nil: there is none.
func (n *namedDownload) findOtherWay(ctx context.Context, key string, rng byteRange) *fileRequest {
	c := n.g.c
	root, f := n.findRoot(ctx)
	if f.sha256 == "" {
		return nil
	}
	hasOwnFill := rng.ahead || c.fills.isFilling(key) // or is to have one, which prefetch waits for
	others := n.g.requestsFor(root, f)
	for _, other := range append(others, others[0].beforeRoot()) {
		otherKey := other.key()
		_, isNamed := other.behavior.(*namedDownload) // else its fill may bring other bytes
		isFilling := c.fills.isFilling(otherKey)
		if otherKey == key || (isFilling && !isNamed) {
			continue
		}
		if isFilling && !hasOwnFill {
			return &other
		}
		if cp, err := c.findCopy(ctx, otherKey, other, byteRange{head: true}); err == nil && cp.rec.SHA256 == f.sha256 && cp.isFresh() {
			return &other
		}
	}
	return nil
}

// namesOf are the requests for the file of t under the names that the stored root gives it.
func (g *generations) namesOf(ctx context.Context, t target) []fileRequest {
	if t.mayHaveRoot() {
		if root, f := g.findRoot(ctx, &t); root != nil && root.spelling != t.spelling {
			return g.requestsFor(root, f)
		}
	}
	return nil
}

// askAfter asks for the root of a file whose request ended with err, if that says that
// upstream is in another generation, and reports whether another root rules now.
func (g *generations) askAfter(ctx context.Context, file *fileRequest, err error) (changed bool) {
	switch b := file.behavior.(type) {
	case *signatureDownload:
		return errors.Is(err, errAgreeing) && g.askAgain(ctx, b.root, true)
	case *namedDownload:
		status, _ := errors.AsType[*upstreamStatus](err)
		if errors.Is(err, errDigest) || (status != nil && slices.Contains(refusals, status.code)) {
			root, _ := b.findRoot(ctx)
			return root != nil && g.askAgain(ctx, root, false)
		}
	}
	return false
}

// askAgain asks upstream for a root whatever its TTL, but not often unless it must be,
// and reports whether there is another one by now.
func (g *generations) askAgain(ctx context.Context, root *storedRoot, must bool) (changed bool) {
	key, folder := root.key(), root.folderID()
	if g.locks.lock(ctx, key) != nil { // the second caller then sees what the first has found
		return false
	}
	defer g.locks.unlock(key)
	if _, asked := g.asked.get(folder); must || !asked || g.c.fills.isFilling(key) {
		expired := *root.remote
		expired.mutableTTL = 0
		file := fileRequest{target: root.target, behavior: &rootDownload{g: g, root: root.target}}
		file.remote = &expired
		if reply, err := g.c.findOrFetch(ctx, file, byteRange{head: true}); err == nil {
			g.noteReply(&file, reply)
			reply.body.Close()
		}
		if _, paused := g.asked.get(folder); !asked && !paused { // else a held folder would be tried too late, or never
			g.asked.putFor(folder, struct{}{}, rootPause)
		}
	}
	now, err := g.openRoot(ctx, root.target)
	return err == nil && now.sum != root.sum
}

// fetchFile brings a file into the store, unless it is there.
func (g *generations) fetchFile(ctx context.Context, file fileRequest) error {
	key := file.key()
	ended := g.c.fills.endedOf(key).Load()
	if _, err := storedRecord(ctx, g.c, file); err == nil {
		return nil
	}
	f, _ := g.c.joinFill(key, file, nil, ended)
	outcome, err := f.awaitEnd(ctx)
	if err == nil && outcome.err == nil {
		_, err = storedRecord(ctx, g.c, file) // if it was not stored the fill's log line says why
	}
	return errors.Join(err, outcome.err)
}

// families is what /metrics shows of generations, for each remote that may have any. A
// hold that nobody's request has ended for too long is none.
func (g *generations) families(cfg *config) []family {
	held, incomplete := map[string]float64{}, map[string]float64{}
	for name, r := range cfg.remotes {
		if !r.local && (r.packageType == "rpm" || r.packageType == "deb") {
			held[name], incomplete[name] = 0, float64(g.c.metrics.countsOf(name).incomplete.Load())
		}
	}
	for _, folder := range g.held.keys() {
		name, _, _ := strings.Cut(folder, "/")
		h, found := g.held.get(folder)
		if _, counted := held[name]; counted && found && g.c.now().Sub(h.since) < maxHold {
			held[name]++
		}
	}
	return []family{
		{"artifactapi_held_generations", "gauge", "New metadata that is held back until the upstream has all of its files.", "remote", held},
		{"artifactapi_incomplete_generations_total", "counter", "New metadata that was published without some of its files.", "remote", incomplete},
	}
}

// isHeld reports whether the root is not to be published at the moment, because the last
// try to publish one of its folder has failed just now.
func (d *rootDownload) isHeld() bool {
	_, held := d.g.held.get(d.root.folderID())
	_, asked := d.g.asked.get(d.root.folderID())
	return held && asked
}

func newAgreeingError(root target) *problem {
	return &problem{status: http.StatusServiceUnavailable, cause: errAgreeing, retryAfter: rootPause,
		detail: fmt.Sprintf("the upstream of remote %q is changing its metadata: %s is not complete yet", root.remote.name, path.Base(root.path))}
}

// hold keeps next from being published while files are missing: its error is
// errAgreeing. It is nil once that has lasted for too long, or from until on (zero: never),
// the old root's Valid-Until.
func (g *generations) hold(until time.Time, next *storedRoot, missing []string) error {
	folder, now := next.folderID(), g.c.now()
	h, held := g.held.get(folder)
	if !held {
		h = heldRoot{key: next.key(), since: now}
	}
	log := func(message string) {
		g.c.log.Warn(message, "remote", next.remote.name, "path", next.path, "missing", missing)
	}
	if (!until.IsZero() && !now.Before(until)) || now.Sub(h.since) >= maxHold {
		g.c.metrics.countsOf(next.remote.name).incomplete.Add(1)
		log("new metadata is published without some of its files, because clients cannot use the old one any more")
		return nil
	}
	if !held {
		g.held.put(folder, h)
		log("new metadata is held back until the upstream has all of its files: clients get the old generation")
	}
	pause := rootPause
	if !until.IsZero() { // the next try ends the hold in time
		pause = min(pause, until.Sub(now))
	}
	g.asked.putFor(folder, struct{}{}, pause)
	return newAgreeingError(next.target)
}

// noteReply ends the hold of a root whose successor was published, here or by another
// replica, or to which upstream has gone back.
func (g *generations) noteReply(file *fileRequest, reply *fileReply) {
	d, isRoot := file.behavior.(*rootDownload)
	if !isRoot {
		return
	}
	folder := d.root.folderID()
	h, held := g.held.get(folder)
	isNews := reply.result == "MISS" || reply.result == "REVALIDATED" || reply.rec.Fetched.After(h.since)
	if held && h.key == file.key() && isNews {
		g.held.delete(folder)
		g.c.log.Info("metadata is not held back any more", "remote", d.root.remote.name, "path", d.root.path, "after", g.c.now().Sub(h.since).Round(time.Second).String())
	}
}
