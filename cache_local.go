// cache_local.go: files of local repositories.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
)

// upload is the body of a PUT to a local repository and what it must be.
type upload struct {
	body   io.Reader
	size   int64 // -1: not known
	create bool  // If-None-Match: *
}

// errFileExists is for an upload with create of a file that exists. errChecksum is what
// the reader of an upload's body returns if it does not have its checksum.
var (
	errFileExists = &problem{status: http.StatusPreconditionFailed, detail: "the file exists already"}
	errChecksum   = &problem{status: http.StatusUnprocessableEntity, detail: "the body does not have the checksum that was sent with it"}
)

// putFile stores an upload; created reports that there was no such file. When it
// returns nil the file is durable; otherwise the old one is still there.
func (c *cache) putFile(ctx context.Context, file fileRequest, u upload) (created bool, err error) {
	spool, err := c.space.newSpool("")
	if err != nil {
		return false, err
	}
	defer spool.discard()
	if err := receiveUpload(spool, u); err != nil {
		return false, err
	}
	rec := file.newRecord(http.Header{}, c.now())
	rec.Size, _ = spool.progress()
	rec.SHA256 = spool.hash.sumHex()
	key := file.key()
	if err := c.changing.lock(ctx, key); err != nil {
		return false, err
	}
	defer c.changing.unlock(key)
	_, err = c.objects.open(ctx, key, -1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if created = err != nil; !created && u.create {
		return false, errFileExists
	}
	return created, c.storeBody(ctx, key, rec, spool.file, u.create)
}

// receiveUpload spools an upload. errNoSpace: there is not enough for it.
func receiveUpload(spool *spool, u upload) error {
	if err := spool.setSize(u.size); err != nil {
		return err
	}
	buf := copyBuffers.Get().(*[copyBufferSize]byte)
	defer copyBuffers.Put(buf)
	for {
		n, err := u.body.Read(buf[:])
		if n > 0 {
			if _, err := spool.Write(buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: reading the upload: %w", errBadRequest, err)
		}
	}
}
