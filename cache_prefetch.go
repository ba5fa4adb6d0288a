// cache_prefetch.go: fetching files ahead of any client, in the way in which a GET
// fetches them.

package main

import (
	"context"
	"errors"
	"io"
	"net/http"
)

// storedRecord returns the record of a file's copy, however old it is, or nil.
func storedRecord(ctx context.Context, c *cache, file fileRequest) *record {
	obj, err := c.objects.open(ctx, file.key(), -1)
	if err != nil || obj.rec.Path != file.spelling || obj.rec.Remote != file.remote.name {
		return nil
	}
	return obj.rec
}

// prefetch brings a file into the store, if it is not there and fresh, and returns its
// size when it is there. fromRemote says that it was fetched now. The body is written to
// w: that of a stored file only if whole says so. A file that was fetched and is not
// stored is an error: whoever fetches ahead wants to have it later.
func prefetch(ctx context.Context, c *cache, file fileRequest, w io.Writer, whole bool) (size int64, fromRemote bool, err error) {
	reply, err := c.findOrFetch(ctx, file, byteRange{to: -1, ahead: true})
	if err != nil {
		return 0, false, err
	}
	defer reply.body.Close()
	size = reply.size
	if reply.fromRemote || whole {
		if size, err = io.Copy(w, reply.body); err != nil {
			return 0, false, errors.Join(context.Cause(ctx), errBadUpstream, err)
		}
	}
	if !reply.fromRemote {
		return size, false, nil
	}
	if err := c.fills.awaitEnd(ctx, file.key(), file.spelling); err != nil {
		return 0, false, err
	}
	if storedRecord(ctx, c, file) == nil {
		return 0, false, newProblem(http.StatusInsufficientStorage, "it was fetched but not stored: the log says why (no space, over max_size, or a body whose end cannot be told)")
	}
	return size, true, nil
}

// openIndex opens a file that names others. Where the patterns allow it, it is read
// and stored as any file; else it is read from upstream and not stored.
func openIndex(ctx context.Context, c *cache, file fileRequest, allowed bool) (body io.ReadCloser, err error) {
	var reply *fileReply
	if allowed {
		reply, err = c.findOrFetch(ctx, file, byteRange{to: -1, ahead: true})
	} else {
		reply, err = c.passOnReply(ctx, file, byteRange{to: -1}, nil)
	}
	if err != nil {
		return nil, err
	}
	return reply.body, nil
}

// awaitEnd waits until no fill of a file runs any more.
func (t *fillTable) awaitEnd(ctx context.Context, key, spelling string) error {
	for {
		t.mu.Lock()
		f := t.find(key, spelling)
		t.mu.Unlock()
		if f == nil {
			return nil
		}
		f.mu.Lock()
		ended, changed := f.phase == phaseDone, f.changed.next()
		f.mu.Unlock()
		if ended {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
