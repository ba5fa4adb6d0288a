// store_s3_reader.go: the body of one version of an object in S3.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"time"
)

// s3Reader is the body of one version of an object. It reads on from where its
// answer stands; sought elsewhere, or broken off, it asks again when bytes are
// wanted, for the same version only.
type s3Reader struct {
	s         *s3Store
	key, etag string
	size      int64
	ctx       context.Context // ends with the reader
	cancel    context.CancelCauseFunc

	// mu guards what follows: http.ServeContent reads several ranges in a
	// goroutine of its own, which may still read when the body is closed.
	mu     sync.Mutex
	off    int64         // where the reader stands
	body   io.ReadCloser // nil: to be asked for
	at     int64         // where body stands
	breaks int
}

// openBody opens the object at r.off and tells its record. Behind the end there
// is nothing to get, and the record is asked for alone.
func (r *s3Reader) openBody(stamp changeStamp) (*record, error) {
	o, err := r.s.getObject(r.ctx, r.key, s3GetInput{off: r.off})
	if isBehindEnd(err) {
		o, err = r.s.headObject(r.ctx, r.key)
	}
	if err != nil {
		return nil, err
	}
	r.etag, r.size, r.body = o.etag, o.size, o.body
	return r.s.readObjectRecord(r.key, o, stamp)
}

func (r *s3Reader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.off < r.size {
		err := r.seekBody()
		if err == nil {
			var n int
			n, err = r.body.Read(p)
			r.off, r.at = r.off+int64(n), r.at+int64(n)
			if err != nil {
				r.closeBody()
			}
			if n > 0 || err == nil {
				return n, nil
			}
		}
		if err := r.pauseAfterBreak(err); err != nil {
			return 0, fmt.Errorf("reading %s at %d: %w", r.key, r.off, err)
		}
	}
	return 0, io.EOF
}

// seekBody leaves r.body where r.off is.
func (r *s3Reader) seekBody() error {
	if gap := r.off - r.at; r.body != nil && gap > 0 && gap <= s3MaxSkip {
		n, _ := io.CopyN(io.Discard, r.body, gap)
		r.at += n
	}
	if r.body != nil && r.at == r.off {
		return nil
	}
	r.closeBody()
	o, err := r.s.getObject(r.ctx, r.key, s3GetInput{off: r.off, ifMatch: r.etag})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: it is gone", errS3PreconditionFailed)
	case err != nil:
		return err
	case o.etag != r.etag || o.etag == "" || o.size != r.size: // If-Match is not for all servers
		o.body.Close()
		return fmt.Errorf("%w: it was replaced", errS3PreconditionFailed)
	}
	r.body, r.at = o.body, r.off
	return nil
}

// pauseAfterBreak is nil when it is worth going on after err.
func (r *s3Reader) pauseAfterBreak(err error) error {
	if errors.Is(err, errS3PreconditionFailed) || r.ctx.Err() != nil || r.breaks == s3MaxBreaks {
		return err
	}
	pause := time.Duration(r.breaks*(r.breaks+1)/2) * time.Second
	r.breaks++
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

func (r *s3Reader) Seek(off int64, whence int) (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
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

// Close ends a Read that is under way.
func (r *s3Reader) Close() error {
	if !r.mu.TryLock() {
		r.cancel(fs.ErrClosed)
		r.mu.Lock()
	}
	defer r.mu.Unlock()
	if left := r.size - r.at; r.body != nil && left <= s3MaxDrain {
		// It is on its way and costs less than a new connection.
		t := time.AfterFunc(100*time.Millisecond, func() { r.cancel(fs.ErrClosed) })
		_, _ = io.Copy(io.Discard, r.body)
		t.Stop()
	}
	r.closeBody()
	r.cancel(fs.ErrClosed)
	return nil
}
