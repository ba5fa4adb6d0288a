// cache_local.go: files of local repositories.

package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"slices"
	"strings"
)

var (
	errFileExists = &problem{status: http.StatusPreconditionFailed, detail: "the file exists already"}
	errCondition  = &problem{status: http.StatusPreconditionFailed, detail: "the file is not, or no longer, the one that the request's condition names"}
	// errChecksum is returned by the reader of an upload's body.
	errChecksum = &problem{status: http.StatusUnprocessableEntity, detail: "the body does not have the checksum that was sent with it"}
)

// checkConditions evaluates the conditions of a request that writes (RFC 9110 section
// 13.2.2). rec is the record of the stored file; nil: there is none.
func checkConditions(when http.Header, rec *record) error {
	lists := func(name, ignored string) bool {
		tags := strings.Split(strings.Join(when.Values(name), ","), ",")
		return rec != nil && slices.ContainsFunc(tags, func(tag string) bool {
			tag = strings.TrimPrefix(strings.TrimSpace(tag), ignored)
			return tag == "*" || tag == `"sha256-`+rec.SHA256+`"`
		})
	}
	at, err := http.ParseTime(when.Get("If-Unmodified-Since"))
	switch hasMatch := when["If-Match"] != nil; {
	case hasMatch && !lists("If-Match", ""), !hasMatch && err == nil && rec != nil && rec.Modified.After(at):
		return errCondition
	case lists("If-None-Match", "W/"): // what a compressing front made weak is the same file
		return errFileExists
	}
	return nil
}

// localFiles are the files of local repositories, as their clients write them.
type localFiles struct{ *cache }

// put stores a body of size bytes (-1: not known) under the conditions of a request;
// created reports that there was no such file. When it returns nil the file is durable;
// otherwise the old one is still there. errNoSpace: it does not fit.
func (c localFiles) put(ctx context.Context, file fileRequest, body io.Reader, size int64, when http.Header) (created bool, err error) {
	key := file.key()
	conditional := when["If-Match"] != nil || when["If-None-Match"] != nil || when["If-Unmodified-Since"] != nil
	if conditional { // before the body, which may be gigabytes for nothing, and again behind it
		if _, err := c.findForWriting(ctx, key, when); err != nil {
			return false, err
		}
	}
	spool := c.space.newSpool("")
	defer spool.discard()
	if err := spool.setSize(size); err != nil {
		return false, err
	}
	buf := copyBuffers.Get().(*[copyBufferSize]byte)
	_, err = io.CopyBuffer(spool, body, buf[:])
	copyBuffers.Put(buf)
	if err != nil {
		return false, err
	}
	rec := file.newRecord(http.Header{}, c.now())
	rec.Size, _ = spool.progress()
	rec.SHA256 = spool.hash.sumHex()
	if err := c.changing.lock(ctx, key); err != nil {
		return false, err
	}
	defer c.changing.unlock(key)
	old, err := c.findForWriting(ctx, key, when)
	if err != nil {
		return false, err
	}
	still := putCondition{isNew: old == nil && when.Get("If-None-Match") == "*"}
	if conditional {
		still.old = old
	}
	return old == nil, c.storeBody(ctx, key, rec, spool.body(), still)
}

// delete removes a file; fs.ErrNotExist when there is none.
func (c localFiles) delete(ctx context.Context, file fileRequest, when http.Header) error {
	key := file.key()
	if err := c.changing.lock(ctx, key); err != nil {
		return err
	}
	defer c.changing.unlock(key)
	if _, err := c.findForWriting(ctx, key, when); err != nil {
		return err
	}
	return c.removeFile(ctx, file.remote.name, key, removedPrefix)
}

// findForWriting returns the record of the file that a request is about to replace or to
// remove, nil if there is none. Its error may be a condition that does not hold.
func (c localFiles) findForWriting(ctx context.Context, key string, when http.Header) (*record, error) {
	old, err := c.objects.open(ctx, key, -1)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, checkConditions(when, nil)
	}
	if err != nil {
		return nil, err
	}
	return old.rec, checkConditions(when, old.rec)
}
