// cache_prefetch.go: fetching files ahead of any client, in the way in which a GET
// fetches them.

package main

import (
	"context"
	"errors"
	"io"
)

// asStored is the request for a file under the key that it is stored by: a file that a
// stored root names has one of its own.
func (file fileRequest) asStored(ctx context.Context, c *cache) fileRequest {
	if file.behavior == nil && file.mayHaveRoot() {
		return c.generations.resolve(ctx, file)
	}
	return file
}

// storedRecord returns the record of a file's copy, however old it is, or nil.
func storedRecord(ctx context.Context, c *cache, file fileRequest) *record {
	file = file.asStored(ctx, c)
	obj, err := c.objects.open(ctx, file.key(), -1)
	if err != nil || obj.rec.Path != file.spelling || obj.rec.Remote != file.remote.name {
		return nil
	}
	return obj.rec
}

// prefetch brings a file into the store, if it is not there and fresh. It returns its
// record, and whether it came from remote or cache. The body is written to w: that of a
// stored file only if whole says so. A file that was fetched and is not stored is an
// error: whoever fetches ahead wants to have it later.
func prefetch(ctx context.Context, c *cache, file fileRequest, w io.Writer, whole bool) (rec *record, source string, err error) {
	reply, err := c.findOrFetch(ctx, file, byteRange{to: -1, ahead: true})
	if err != nil {
		return nil, "", err
	}
	defer reply.body.Close()
	fromRemote := reply.result == "MISS"
	if fromRemote || whole {
		if _, err := io.Copy(w, reply.body); err != nil {
			return nil, "", errors.Join(context.Cause(ctx), errBadUpstream, err)
		}
	}
	if !fromRemote {
		return reply.rec, "cache", nil
	}
	if err := c.fills.awaitEnd(ctx, file.asStored(ctx, c)); err != nil {
		return nil, "", err
	}
	if rec = storedRecord(ctx, c, file); rec == nil {
		return nil, "", errNoSpace
	}
	return rec, "remote", nil
}

// awaitEnd waits until the fill of a file has ended, if there is one.
func (t *fillTable) awaitEnd(ctx context.Context, file fileRequest) error {
	t.mu.Lock()
	f := t.byKey[file.key()]
	if f != nil {
		f.clients++
	}
	t.mu.Unlock()
	if f == nil {
		return nil
	}
	_, err := f.awaitEnd(ctx)
	return err
}
