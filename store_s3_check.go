// store_s3_check.go: the background check of S3, which finds out whether the bucket
// can be read and written.

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"
)

// s3Write is a write that was accepted or refused.
type s3Write struct {
	refusal error // errS3ReadOnly or errS3Full; nil: it was accepted
	at      time.Time
}

// noteWrite takes the result of a write as what is known of write access, and returns
// it: a refusal is errS3ReadOnly or errS3Full. Other errors say nothing about write access.
func (s *s3Store) noteWrite(err error) error {
	switch {
	case err == nil, errors.Is(err, errS3Full):
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("%w: %w", errS3ReadOnly, err)
	default:
		return err
	}
	s.lastWrite.Store(&s3Write{err, s.now()})
	return err
}

// whyDown returns why requests found S3 of no use last, nil if they did not.
func (s *s3Store) whyDown() error {
	if last := s.lastWrite.Load(); last != nil && last.refusal != nil {
		return last.refusal
	}
	return s.outage.outageCause()
}

// ping reports whether S3 can be used: errNoSpace, or errStoreDown with advice, if not. It
// ends with ctx even if S3 hangs.
func (s *s3Store) ping(ctx context.Context) error {
	err := s.check.result(ctx, s.checkNow)
	if errors.Is(err, errS3Full) {
		return fmt.Errorf("%w: %w", errNoSpace, err)
	} else if err != nil {
		return fmt.Errorf("%w: %w: %w", errStoreDown, adviceOn(err), err)
	}
	return nil
}

// checkNow finds out whether the bucket can be read and written. Its requests are not
// admitted by the circuit, and their results open and close it.
func (s *s3Store) checkNow() error {
	ctx, cancel := context.WithTimeout(context.Background(), s3CheckTimeout)
	defer cancel()
	began := s.now()
	err := s.checkRead(ctx)
	_ = s.classifyError(context.Background(), began, err)
	if err != nil {
		s.lastWrite.Store(nil)
		return err
	}
	return s.checkWrite(ctx)
}

// checkRead asks for an object that does not exist: of the requests that show
// credentials and bucket to be right, it costs the least. A missing bucket is made.
func (s *s3Store) checkRead(ctx context.Context) error {
	o, err := s.client.getObject(ctx, s3ProbeKey, 0, "")
	switch {
	case err == nil:
		o.body.Close()
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, errS3NoBucket):
		if cerr := s.client.createBucket(ctx); cerr != nil {
			return fmt.Errorf("%w: %w", err, cerr)
		}
		return nil
	}
	return err
}

// checkWrite writes and removes an empty object, once after each outage and every
// s3WriteCheckInterval while writes are refused.
func (s *s3Store) checkWrite(ctx context.Context) error {
	last := s.lastWrite.Load()
	if last != nil && (last.refusal == nil || s.now().Sub(last.at) < s3WriteCheckInterval) {
		return last.refusal
	}
	err := s.client.putObject(ctx, s3ProbeKey, s3PutInput{body: strings.NewReader(""), sha256: emptySHA256})
	if err == nil {
		_ = s.client.deleteObject(ctx, s3ProbeKey) // what stays is harmless
	}
	return s.noteWrite(err)
}

// advice is the part of an error that says what the operator has to look at.
type advice string

func (a advice) Error() string { return string(a) }

// adviceOn returns the advice on err, of a check.
func adviceOn(err error) advice {
	switch {
	case errors.Is(err, errS3ReadOnly):
		return "S3 refuses writes to the bucket: new files are passed on and not stored; allow s3:PutObject and s3:DeleteObject"
	case errors.Is(err, errS3Busy):
		return "all connections to S3 are in use: more files are passed on and not stored"
	case errors.Is(err, errS3NoBucket):
		return "the bucket does not exist and cannot be created: check MINIO_BUCKET"
	case errors.Is(err, errS3Clock):
		return "S3 refuses all requests because the clocks differ: set the clock of this machine"
	case errors.Is(err, fs.ErrPermission):
		return "S3 refuses the credentials: check MINIO_ACCESS_KEY and MINIO_SECRET_KEY, and that they may read and list the bucket"
	}
	return "S3 cannot be reached: files are passed on and not stored"
}
