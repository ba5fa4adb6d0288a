// cache_roots.go: roots, which are stored files that name other files of their remote:
// what a root names stays in the store while something else can go.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"regexp"
	"strings"
)

// namedBudget bounds the bytes of the hashes that are remembered: those of 100,000 images.
const namedBudget = 32 << 20

// rootPatterns find roots by their decoded path, by package.
var rootPatterns = map[string]*regexp.Regexp{
	"docker": regexp.MustCompile(`/manifests/`),
	"rpm":    regexp.MustCompile(`(?:^|/)repodata/repomd\.xml$`),
	"deb":    regexp.MustCompile(`(?:^|/)(?:In)?Release$`),
}

// fileID tells files apart in less memory than their keys take.
type fileID struct {
	remote string
	hash   uint64 // keyHash
}

// findNamed returns the files that stored roots name.
func (e *evictor) findNamed(ctx context.Context) (named map[fileID]bool, err error) {
	named = map[fileID]bool{}
	for name, rem := range e.config().remotes {
		q := pageQuery{remote: name, pattern: rootPatterns[rem.packageType], limit: listPageSize}
		for more := q.pattern != nil; more; more = q.after != "" {
			p, err := e.cache.index.listPage(ctx, q)
			if err != nil {
				return nil, err
			}
			for _, row := range p.rows {
				hashes, err := e.readRoot(ctx, rem, row)
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					return nil, err
				}
				for _, hash := range hashes {
					named[fileID{name, hash}] = true
				}
			}
			q.after = p.next
		}
	}
	return named, nil
}

// readRoot returns the hashes of the files that a stored root names, and remembers them.
func (e *evictor) readRoot(ctx context.Context, rem *remote, row indexRow) (hashes []uint64, err error) {
	id := row.Key + row.SHA256
	if hashes, found := e.named.get(id); found || row.Size > maxMetadata {
		return hashes, nil
	}
	spellings, err := e.readNames(ctx, rem, row)
	if err != nil {
		return nil, err
	}
	for _, spelling := range spellings {
		hashes = append(hashes, keyHash(storageKey(row.Remote, spelling)))
	}
	e.named.put(id, int64(len(id)+8*len(hashes)), hashes)
	return hashes, nil
}

// readNames returns the spellings under which the files are stored that a root names.
func (e *evictor) readNames(ctx context.Context, rem *remote, row indexRow) (spellings []string, err error) {
	if rem.packageType != "docker" {
		g := e.cache.generations
		root, err := g.openRoot(ctx, rem.rootAt(row.Path))
		if err != nil {
			return nil, err
		}
		for _, f := range root.files {
			for _, req := range g.requestsFor(root, f) {
				spellings = append(spellings, req.spelling)
			}
		}
		return spellings, nil
	}
	obj, err := e.cache.objects.open(ctx, row.Key, 0)
	if err != nil {
		return nil, err
	}
	defer obj.body.Close()
	body, err := io.ReadAll(io.LimitReader(obj.body, maxMetadata))
	return readManifestNames(decodePath(row.Path), body), err
}

// readManifestNames returns what a manifest names: its blobs, and the manifests of an index.
func readManifestNames(path string, body []byte) (spellings []string) {
	type descriptor struct{ Digest string }
	var m struct {
		Config            descriptor
		Layers, Manifests []descriptor
	}
	_ = json.Unmarshal(body, &m) // what is no manifest names nothing
	for _, d := range append(m.Layers, m.Config) {
		spellings = append(spellings, "blobs/"+d.Digest)
	}
	image := path[:strings.LastIndex(path, "/")+1]
	for _, d := range m.Manifests {
		spellings = append(spellings, image+d.Digest)
	}
	return spellings
}
