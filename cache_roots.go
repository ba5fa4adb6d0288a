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

// maxRoot bounds a root that is read, in bytes. A larger one names nothing.
const maxRoot = 8 << 20

// rootKind says which files of a package are roots.
type rootKind struct {
	pattern *regexp.Regexp // finds roots by their decoded path
	// readNames returns the spellings of the files that the root at that path names.
	readNames func(path string, body []byte) []string
}

// rootKinds are the kinds of roots by package.
var rootKinds = map[string]rootKind{
	"docker": {regexp.MustCompile(`/manifests/`), readManifestNames},
	"rpm":    {regexp.MustCompile(`repodata/repomd\.xml$`), readMetadataNames},
	"deb":    {regexp.MustCompile(`(?:^|/)(?:In)?Release$`), readMetadataNames},
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
		kind, found := rootKinds[rem.packageType]
		q := pageQuery{remote: name, pattern: kind.pattern, limit: listPageSize}
		for more := found; more; more = q.after != "" {
			p, err := e.cache.index.listPage(ctx, q)
			if err != nil {
				return nil, err
			}
			for _, row := range p.rows {
				hashes, err := e.readRoot(ctx, kind, row)
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
func (e *evictor) readRoot(ctx context.Context, kind rootKind, row indexRow) (hashes []uint64, err error) {
	id := row.Key + " " + row.SHA256
	if hashes, found := e.named.get(id); found || row.Size > maxRoot {
		return hashes, nil
	}
	obj, err := e.cache.objects.open(ctx, row.Key, 0)
	if err != nil {
		return nil, err
	}
	defer obj.body.Close()
	body, err := io.ReadAll(io.LimitReader(obj.body, maxRoot))
	if err != nil {
		return nil, err
	}
	for _, spelling := range kind.readNames(decodePath(row.Path), body) {
		hashes = append(hashes, keyHash(storageKey(row.Remote, spelling)))
	}
	e.named.put(id, hashes)
	return hashes, nil
}

// readManifestNames is readNames of manifests: their blobs, and the manifests that an
// index names.
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
