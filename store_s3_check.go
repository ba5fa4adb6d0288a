// store_s3_check.go: the background check of S3, which finds out whether the bucket
// can be read and written.

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

// s3WriteAccess is what is known of whether the bucket takes writes. An outage of
// S3 resets it.
type s3WriteAccess struct {
	mu        sync.Mutex // guards the fields below; no other lock is taken under it
	logged    string     // the state of S3 that was logged last
	accepted  bool       // the last write was not refused
	refusedAt time.Time  // when the last write was refused; zero: it was not
}

// noteWrite takes the result of a write as the state of write access. Errors other
// than a refusal say nothing about it.
func (w *s3WriteAccess) noteWrite(err error, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case err == nil:
		w.accepted, w.refusedAt = true, time.Time{}
	case errors.Is(err, fs.ErrPermission):
		w.accepted, w.refusedAt = false, now
	}
}

// isCheckDue reports whether it is time to try a write for the check's sake.
func (w *s3WriteAccess) isCheckDue(now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.accepted && now.Sub(w.refusedAt) >= s3WriteCheckInterval
}

// ping reports whether S3 can be used: errStoreDown if not. A change of that is
// logged. ping ends with ctx even if S3 hangs.
func (s *s3Store) ping(ctx context.Context) error {
	err := s.check.result(ctx, s.checkNow)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", errStoreDown, err)
	}
	return err
}

// checkNow finds out whether the bucket can be read and written. Its requests are not
// admitted by the circuit, and their results open and close it.
func (s *s3Store) checkNow() error {
	ctx, cancel := context.WithTimeout(context.Background(), s3CheckTimeout)
	defer cancel()
	began := s.now()
	err := s.checkRead(ctx)
	down := s.classifyError(context.Background(), began, err)
	if err == nil {
		if err = s.checkWrite(ctx); err != nil {
			down = fmt.Errorf("%w: %w", errStoreDown, err)
		}
	}
	s.logState(err)
	return down
}

// checkRead asks for an object that does not exist: of the requests that show
// credentials and bucket to be right, it costs the least. A missing bucket is made.
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

// checkWrite writes and removes an empty object, once after each outage and every
// s3WriteCheckInterval while writes are refused.
func (s *s3Store) checkWrite(ctx context.Context) error {
	if !s.writes.isCheckDue(s.now()) {
		if s.refusesWrites() {
			return errS3ReadOnly
		}
		return nil
	}
	_, err := s.client.putObject(ctx, s3ProbeKey, s3PutInput{body: strings.NewReader(""), sha256: emptySHA256,
		meta: map[string]string{"probe": strconv.FormatUint(rand.Uint64(), 36)}})
	if err == nil {
		_ = s.client.deleteObject(ctx, s3ProbeKey) // what stays is harmless
	}
	s.writes.noteWrite(err, s.now())
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: %w", errS3ReadOnly, err)
	}
	return err
}

// refusesWrites implements cachingObjects.
func (s *s3Store) refusesWrites() bool {
	s.writes.mu.Lock()
	defer s.writes.mu.Unlock()
	return !s.writes.refusedAt.IsZero()
}

// logState logs the state of S3 that err, of a check, shows and what to do about it,
// if it is not the state that was logged last.
func (s *s3Store) logState(err error) {
	// Each text names what the operator has to look at.
	text, level := "S3 cannot be reached: files are passed on and not stored", slog.LevelError
	switch {
	case err == nil:
		text, level = "S3 can be used", slog.LevelInfo
	case errors.Is(err, errS3ReadOnly):
		text = "S3 refuses writes to the bucket: new files are passed on and not stored; allow s3:PutObject and s3:DeleteObject"
	case errors.Is(err, errS3NoBucket):
		text = "the bucket does not exist and cannot be created: check MINIO_BUCKET"
	case errors.Is(err, errS3Clock):
		text = "S3 refuses all requests because the clocks differ: set the clock of this machine"
	case errors.Is(err, fs.ErrPermission):
		text = "S3 refuses the credentials: check MINIO_ACCESS_KEY and MINIO_SECRET_KEY, and that they may read and list the bucket"
	}
	w := &s.writes
	w.mu.Lock()
	changed := w.logged != text
	w.logged = text
	if err != nil && !errors.Is(err, errS3ReadOnly) {
		w.accepted, w.refusedAt = false, time.Time{} // it may come back with other permissions
	}
	w.mu.Unlock()
	if !changed {
		return
	}
	attrs := []any{"endpoint", s.client.cfg.host, "bucket", s.client.cfg.bucket}
	if err != nil {
		attrs = append(attrs, "error", err)
	}
	s.log.Log(context.Background(), level, text, attrs...)
}
