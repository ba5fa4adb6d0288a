// registry_blob.go: blobs, of which all images of a remote share one stored copy, and
// the grants that say through which images it may be served.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"slices"
	"strings"
)

// maxBlobs bounds the table of blobs. An entry has some 250 bytes; 20,000 are the layers
// of about two thousand images.
const maxBlobs = 20_000

// blobFile is the behavior of a blob.
type blobFile struct{ registryFile }

// requestBody asks for the blob through its image. An upstream that has it there grants it.
func (f *blobFile) requestBody(ctx context.Context, up *upstream, req upstreamRequest) (*upstreamResponse, error) {
	resp, err := up.send(ctx, req)
	if err == nil && slices.Contains([]int{http.StatusOK, http.StatusPartialContent, http.StatusNotModified}, resp.StatusCode) {
		f.g.grantBlob(ctx, f.call.blobKey(f.call.digest), 0)
	}
	return resp, err
}

// permit refuses what was stored, or is fetched, for another image, unless this one has
// the blob too. Where the registry does not say so (it cannot be asked, has deleted the
// image, or may not be asked: sealed), a stored manifest may; and while it cannot be asked,
// a remote that nothing restricts is open.
func (f *blobFile) permit(ctx context.Context, file fileRequest, rec *record) error {
	c, g := f.call, f.g
	if g.isGranted(ctx, c.blobKey(c.digest)) {
		return nil
	}
	var err error
	if g.cache.upstream.isDown(ctx, c.remote) {
		err = &problem{status: http.StatusBadGateway, cause: errUnreachable,
			detail: fmt.Sprintf("remote %q cannot be reached, and nothing stored says that image %q has this blob", c.remote.name, c.image)}
	} else {
		file.hasCopy = rec != nil
		_, err = g.cache.headUpstream(ctx, file) // which comes to requestBody
	}
	isOpen := c.remote.immutable == nil && c.remote.username == "" && len(c.remote.headers) == 0
	if err != nil && (isUnreachable(err) && isOpen || g.isNamedByStored(ctx, c)) {
		return nil
	}
	return err
}

// isNamedByStored reports whether a stored manifest of c's image names its blob. A crash
// may have lost the grants of those that this process has not read. They are looked
// through once in outagePause: anybody may ask for what no image has.
func (g *registry) isNamedByStored(ctx context.Context, c *registryCall) bool {
	image := c.remote.name + "/" + c.image
	_, _ = g.searches.call(ctx, image, func() (searched struct{}, err error) {
		if _, found := g.searched.get(image); !found {
			if g.readStoredManifests(ctx, c); ctx.Err() == nil { // else some were not read
				g.searched.putFor(image, searched, outagePause)
			}
		}
		return searched, nil
	})
	return g.isGranted(ctx, c.blobKey(c.digest))
}

// readStoredManifests grants c's image what its stored manifests name.
func (g *registry) readStoredManifests(ctx context.Context, c *registryCall) {
	q := pageQuery{remote: c.remote.name, prefix: c.image + "/" + routeManifest + "/", limit: listPageSize}
	for {
		p, err := g.cache.index.listPage(ctx, q)
		if err != nil && !errors.Is(err, errStoreDown) {
			g.cache.reportStoreError("database", "listing manifests of", c.image, err)
		}
		for _, row := range p.rows {
			call := registryCall{remote: c.remote, image: c.image, route: routeManifest, reference: strings.TrimPrefix(row.Path, q.prefix)}
			file, _ := g.newFileRequest(&call)
			_ = file.behavior.permit(ctx, file, &record{SHA256: row.SHA256}) // refuses nothing
		}
		if p.next == "" || err != nil || ctx.Err() != nil {
			return
		}
		q.after = p.next
	}
}

// blobKey names a blob as one of c's image, in the table of blobs and among the freshness
// marks. No file has such a key: theirs have no colon.
func (c *registryCall) blobKey(digest string) string {
	return c.remote.name + "/" + c.image + "@" + digest
}

// isGranted reports whether this process knows, or a mark says, that an image has a blob.
func (g *registry) isGranted(ctx context.Context, key string) bool {
	if _, known := g.blobs.get(key); known {
		return true
	}
	_, err := g.cache.marks.getMark(ctx, key)
	if err == nil {
		g.blobs.getOrPut(key, func() int64 { return 0 })
	} else if !errors.Is(err, fs.ErrNotExist) {
		g.cache.reportStoreError("redis", "reading the grant of", key, err)
	}
	return err == nil
}

// grantBlob remembers that an image has a blob, and the blob's size if that is known (it
// is 0 otherwise). A mark that is lost costs a HEAD.
func (g *registry) grantBlob(ctx context.Context, key string, size int64) {
	old, granted := g.blobs.get(key)
	g.blobs.put(key, cmp.Or(size, old))
	if granted {
		return
	}
	if err := g.cache.marks.setMark(context.WithoutCancel(ctx), key, freshnessMark{GoodAt: g.cache.now().UTC()}); err != nil {
		g.cache.reportStoreError("redis", "granting", key, err)
	}
}

// grantNamed grants an image the blobs that its manifest names. Their sizes answer HEAD
// while they are not stored. sum is the manifest's SHA-256.
func (g *registry) grantNamed(ctx context.Context, c *registryCall, m *manifest, sum string) {
	for _, b := range m.blobs {
		g.grantBlob(ctx, c.blobKey(b.Digest), max(b.Size, 0))
	}
	g.blobs.put(c.blobKey(sum), 0) // no blob, since its digest has no algorithm: this manifest need not be read again
}

// permit grants what a stored manifest names when it is first read by this process: a
// crash may have lost its grants.
func (f *manifestFile) permit(ctx context.Context, file fileRequest, rec *record) error {
	c, g := f.call, f.g
	if rec == nil {
		return nil
	}
	if _, found := g.blobs.get(c.blobKey(rec.SHA256)); found {
		return nil
	}
	obj, err := g.cache.objects.open(ctx, file.key(), 0)
	if err != nil {
		return nil // the copy in hand answers all the same
	}
	defer obj.body.Close()
	body := io.LimitReader(obj.body, maxManifest)
	m, _ := readManifest(body) // what is none names nothing
	if _, err := io.Copy(io.Discard, body); err != nil {
		return nil // what cannot be read does not count as read
	}
	g.grantNamed(ctx, c, m, obj.rec.SHA256)
	return nil
}
