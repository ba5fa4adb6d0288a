// store_s3_check.go: whether S3 can be used: a check in the background, and an
// outage that costs one short wait instead of one a request.

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"
)

// s3Check is at most one background check at a time, and what it found.
type s3Check struct {
	wg      sync.WaitGroup
	mu      sync.Mutex    // guards the rest
	done    chan struct{} // of the check that runs
	err     error
	told    string // what the log said last
	written bool   // a write was not refused since the last outage
	tried   time.Time
}

// ping reports whether S3 can be used, and says in the log when that changes.
// It ends with ctx though S3 may hang.
func (s *s3Store) ping(ctx context.Context) error {
	c := &s.check
	c.mu.Lock()
	if c.done == nil {
		done := make(chan struct{})
		c.done = done
		c.wg.Go(func() {
			err := s.checkNow()
			c.mu.Lock()
			defer c.mu.Unlock()
			c.err, c.done = err, nil
			close(done)
		})
	}
	done := c.done
	c.mu.Unlock()
	select {
	case <-done:
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errStoreDown, ctx.Err())
	}
}

// checkNow finds out whether the bucket can be read and written.
func (s *s3Store) checkNow() error {
	ctx, cancel := context.WithTimeout(context.Background(), s3CheckTimeout)
	defer cancel()
	began := s.now()
	err := s.checkRead(ctx)
	down := s.classifyError(context.Background(), began, err)
	if err == nil {
		if err = s.checkWrite(ctx, began); err != nil {
			down = fmt.Errorf("%w: %w", errStoreDown, err)
		}
	}
	s.logState(err)
	return down
}

// checkRead asks for an object that is not there: of all that shows credentials
// and bucket to be right it costs the least. A missing bucket is made.
func (s *s3Store) checkRead(ctx context.Context) error {
	o, err := s.client.getObject(ctx, s3ProbeKey, s3GetInput{})
	switch {
	case err == nil:
		o.body.Close()
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, errS3NoBucket):
		if cerr := s.client.ensureBucket(ctx); cerr != nil {
			return fmt.Errorf("%w: %w", err, cerr)
		}
		return nil
	}
	return err
}

// checkWrite writes and removes an empty object, once after each outage and now
// and then while writes are refused.
func (s *s3Store) checkWrite(ctx context.Context, now time.Time) error {
	c := &s.check
	c.mu.Lock()
	due := !c.written && now.Sub(c.tried) >= s3WriteCheckInterval
	c.mu.Unlock()
	if !due {
		if s.refusesWrites() {
			return errS3ReadOnly
		}
		return nil
	}
	_, err := s.client.putObject(ctx, s3ProbeKey, s3PutInput{body: strings.NewReader(""), sha256: emptySHA256,
		meta: map[string]string{"probe": strconv.FormatUint(rand.Uint64(), 36)}})
	if err == nil {
		_ = s.client.deleteObject(ctx, s3ProbeKey) // it harms nobody
	}
	s.noteWrite(err)
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: %w", errS3ReadOnly, err)
	}
	return err
}

// noteWrite notes whether the bucket takes writes.
func (s *s3Store) noteWrite(err error) {
	c := &s.check
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		c.written = true
	case errors.Is(err, fs.ErrPermission):
		c.written, c.tried = false, s.now()
	}
}

// refusesWrites: see forgetter.
func (s *s3Store) refusesWrites() bool {
	c := &s.check
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.written && !c.tried.IsZero()
}

// logState logs a state of S3 that is not the one that was logged last, with what
// to do about it.
func (s *s3Store) logState(err error) {
	text, level := "S3 cannot be reached: files are passed on and not stored", slog.LevelError
	switch {
	case err == nil:
		text, level = "S3 can be used", slog.LevelInfo
	case errors.Is(err, errS3ReadOnly):
		text = "S3 refuses writes to the bucket: new files are passed on and not stored; allow s3:PutObject and s3:DeleteObject"
	case errors.Is(err, errS3NoBucket):
		text = "the bucket does not exist and cannot be created: check MINIO_BUCKET"
	case errors.Is(err, fs.ErrPermission):
		text = "S3 refuses the credentials: check MINIO_ACCESS_KEY and MINIO_SECRET_KEY, and that they may read and list the bucket"
	}
	c := &s.check
	c.mu.Lock()
	told := c.told
	c.told = text
	if err != nil && !errors.Is(err, errS3ReadOnly) {
		c.written, c.tried = false, time.Time{} // who knows what comes back
	}
	c.mu.Unlock()
	if told == text {
		return
	}
	attrs := []any{"endpoint", s.client.cfg.host, "bucket", s.client.cfg.bucket}
	if err != nil {
		attrs = append(attrs, "error", err)
	}
	s.log.Log(context.Background(), level, text, attrs...)
}

// outage makes an S3 that does not answer cost one short wait, not one per
// request.
type outage struct {
	mu    sync.Mutex // guards all
	since time.Time  // zero: there is none
	next  time.Time  // when one request may try again
	last  time.Time  // when S3 answered last
	flaky time.Time  // when an outage was last seen
}

// flakyFor is how long after an outage another one is expected.
const flakyFor = time.Minute

// enter says whether S3 may be asked, and whether to be impatient.
func (o *outage) enter(now time.Time) (flaky bool, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.since.IsZero() {
		if now.Before(o.next) {
			return true, errS3Outage
		}
		o.next = now.Add(s3RetryAfter)
	}
	return !o.flaky.IsZero() && now.Sub(o.flaky) < flakyFor, nil
}

func (o *outage) answered(now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.since, o.last = time.Time{}, now
}

// failed notes a request that was not answered. If another one was, while it
// waited, it says nothing about S3.
func (o *outage) failed(began, now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.last.After(began) {
		return
	}
	if o.since.IsZero() {
		o.since = now
	}
	o.next, o.flaky = now.Add(s3RetryAfter), now
}

// lasts is the age of the outage.
func (o *outage) lasts(now time.Time) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.since.IsZero() {
		return 0
	}
	return now.Sub(o.since)
}
