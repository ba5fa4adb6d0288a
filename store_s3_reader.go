// store_s3_reader.go: the body of one version of an object in S3.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"
)

// s3Reader is the body of one version of an object. It reads on in the answer that
// it has. After a Seek, or when the answer breaks off, the next Read asks again, for
// the same version only. It is used by one goroutine at a time; the end of the ctx
// that it was opened with ends a Read that waits.
type s3Reader struct {
	s         *s3Store
	key, etag string
	size      int64
	ctx       context.Context // ends with the reader
	cancel    context.CancelCauseFunc

	off           int64         // where the next Read begins
	body          io.ReadCloser // of the answer; nil: none is open
	bodyOff       int64         // where body is
	interruptions int           // so far
}

// openBody asks for the object at r.off and returns its record. Behind the end there
// is no body to get, and the record is asked for alone.
func (r *s3Reader) openBody(v validity) (*record, error) {
	o, err := r.s.getObject(r.ctx, r.key, s3GetInput{off: r.off})
	if isBehindEnd(err) {
		o, err = r.s.headObject(r.ctx, r.key)
	}
	if err != nil {
		return nil, err
	}
	r.etag, r.size, r.body = o.etag, o.size, o.body
	return r.s.readObjectRecord(r.key, o, v)
}

// Read goes on after an interruption, s3MaxInterruptions times. It ends with
// errS3PreconditionFailed when that version is not in S3 any more.
func (r *s3Reader) Read(p []byte) (int, error) {
	for r.off < r.size {
		err := r.seekBody()
		if err == nil {
			var n int
			n, err = r.body.Read(p)
			r.off, r.bodyOff = r.off+int64(n), r.bodyOff+int64(n)
			if err != nil {
				r.closeBody()
			}
			if n > 0 || err == nil {
				return n, nil
			}
		}
		if err := r.pauseBeforeRetry(err); err != nil {
			return 0, fmt.Errorf("reading %s at %d: %w", r.key, r.off, err)
		}
	}
	return 0, io.EOF
}

// seekBody leaves r.body open at r.off: it reads on over a short gap, and asks again
// for anything else.
func (r *s3Reader) seekBody() error {
	if gap := r.off - r.bodyOff; r.body != nil && gap > 0 && gap <= s3MaxSkip {
		n, _ := io.CopyN(io.Discard, r.body, gap)
		r.bodyOff += n
	}
	if r.body != nil && r.bodyOff == r.off {
		return nil
	}
	r.closeBody()
	o, err := r.s.getObject(r.ctx, r.key, s3GetInput{off: r.off, ifMatch: r.etag})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: it is gone", errS3PreconditionFailed)
	case err != nil:
		return err
	case o.etag != r.etag || o.etag == "" || o.size != r.size: // not all servers know If-Match
		o.body.Close()
		return fmt.Errorf("%w: it was replaced", errS3PreconditionFailed)
	}
	r.body, r.bodyOff = o.body, r.off
	return nil
}

// pauseBeforeRetry returns nil when it is time to ask again after err, and an error
// when that is of no use.
func (r *s3Reader) pauseBeforeRetry(err error) error {
	if errors.Is(err, errS3PreconditionFailed) || r.ctx.Err() != nil || r.interruptions == s3MaxInterruptions {
		return err
	}
	pause := time.Duration(r.interruptions*(r.interruptions+1)/2) * time.Second
	r.interruptions++
	if serr := r.s.client.cfg.sleep(r.ctx, pause); serr != nil {
		return fmt.Errorf("%w: %w", serr, err)
	}
	return nil
}

func (r *s3Reader) closeBody() {
	if r.body != nil {
		r.body.Close()
		r.body = nil
	}
}

// Seek sends no request: the next Read does, if it has to.
func (r *s3Reader) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += r.off
	case io.SeekEnd:
		off += r.size
	}
	if off < 0 {
		return 0, fmt.Errorf("seeking in %s: %w", r.key, fs.ErrInvalid)
	}
	r.off = off
	return off, nil
}

// Close reads what is left of a body first, if that is little and arrives in 0.1 s, so
// that the connection can be used again.
func (r *s3Reader) Close() error {
	if r.body != nil && r.size-r.bodyOff <= s3MaxDrain {
		timer := time.AfterFunc(100*time.Millisecond, func() { r.cancel(fs.ErrClosed) })
		_, _ = io.Copy(io.Discard, r.body)
		timer.Stop()
	}
	r.closeBody()
	r.cancel(fs.ErrClosed)
	return nil
}
