// store_s3.go: artifacts in S3. An object's metadata holds its record, so that
// one GET brings both. The local copies in front of it are in store_hot.go.

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf16"
)

const (
	// s3RecordField is the metadata field that makes an object ours.
	s3RecordField   = "artifact"
	s3RecordVersion = 1
	// s3MaxRecord bounds the field: S3 allows 2,048 bytes for all names and
	// values, and MinIO counts the prefix of the name too.
	s3MaxRecord = 2000
	// s3ProbeKey is asked for to see whether S3 answers, and written to see
	// whether the bucket can be. The dot keeps it apart from artifacts.
	s3ProbeKey = ".artifactapi-probe"

	// s3OpenTimeout is how long a client waits for S3 before it is sent on to the
	// upstream; s3FlakyTimeout the same while an outage is known.
	s3OpenTimeout  = 3 * time.Second
	s3FlakyTimeout = 2 * time.Second
	// s3CheckTimeout bounds a background check, and s3RetryAfter is when one
	// request may find out for itself. It is longer than a check and the pause
	// before it, so that where checks run no client ever waits for a dead S3.
	s3CheckTimeout = 1500 * time.Millisecond
	s3RetryAfter   = 2500 * time.Millisecond
	// s3WriteThrough is how long into an outage uploads are still begun: over
	// a restart of S3. Later they would only hold up the fills behind them.
	s3WriteThrough = 10 * time.Second
	// s3WriteCheckInterval is how often a bucket that refuses writes is tried again.
	s3WriteCheckInterval = 10 * time.Second

	// s3MaxBreaks bounds how often one body may break off. The pauses before them
	// add up to 10 s, a restart of S3.
	s3MaxBreaks = 4
	// s3MaxSkip is read over rather than asked for anew: about what arrives
	// in the time of a request.
	s3MaxSkip = 128 << 10
	// s3MaxDrain is read to its end, so that the connection stays usable.
	s3MaxDrain = 64 << 10
	// s3ParallelHeads ask for records at once in a walk: a listing has none, and one
	// after the other a million would take an hour.
	s3ParallelHeads = 16
	s3UploadAge     = 24 * time.Hour

	// recheckAfter is how long copies of immutable files are used without
	// asking S3 while announcements do not arrive.
	recheckAfter = time.Minute
	// maxRecordsInMemory bounds the records in memory, at 2 KB or less each.
	maxRecordsInMemory = 8192
)

var (
	_ objects        = (*s3Store)(nil)
	_ cachingObjects = (*s3Store)(nil)

	errS3ReadOnly = errors.New("the bucket refuses writes")
	errS3Outage   = fmt.Errorf("%w: S3 did not answer a moment ago", errStoreDown)
)

// s3Store implements objects in a bucket. All methods may be called
// concurrently, and by several replicas. A body that is open and small enough
// to be on its way outlives its object; a larger one then ends in an error.
type s3Store struct {
	client       *s3Client
	hearsChanges func() bool // announcements of other replicas arrive
	now          func() time.Time
	log          *slog.Logger
	wait         time.Duration // s3OpenTimeout but in tests

	seed    maphash.Seed
	resets  atomic.Uint64      // times that announcements may have been missed
	changes [256]atomic.Uint64 // replacements and removals, by hash of the key
	records *recency           // of immutable files

	outage outage
	check  s3Check
}

// newS3Store keeps objects in client's bucket; it asks nothing yet. online
// says whether the other replicas' announcements arrive at the moment; nil is
// never. The caller closes it after all users.
func newS3Store(client *s3Client, online func() bool) *s3Store {
	if online == nil {
		online = func() bool { return false }
	}
	return &s3Store{client: client, hearsChanges: online, now: client.cfg.now, log: client.cfg.log, wait: s3OpenTimeout,
		seed: maphash.MakeSeed(), records: newRecency(maxRecordsInMemory, maxRecordsInMemory)}
}

// Close waits for the check that runs.
func (s *s3Store) Close() { s.check.wg.Wait() }

// changeStamp is the state of a key's announcements at one moment. It is taken
// before S3 is asked: what the answer teaches is kept only if nothing was
// announced since, or an old version would be kept that arrived late.
type changeStamp struct {
	resets, changes uint64
	at              time.Time
}

func (s *s3Store) changeCounter(key string) *atomic.Uint64 {
	return &s.changes[maphash.String(s.seed, key)%uint64(len(s.changes))]
}

func (s *s3Store) stampOf(key string) changeStamp {
	// Resets begin at one, so that the zero ticket is never trusted.
	return changeStamp{s.resets.Load() + 1, s.changeCounter(key).Load(), s.now()}
}

func (s *s3Store) isCurrent(key string, stamp changeStamp) bool {
	return s.changeCounter(key).Load() == stamp.changes
}

// trustsCopy says whether what was true at t may be used without asking S3
// (SPEC.md section 8).
func (s *s3Store) trustsCopy(c class, stamp changeStamp) bool {
	if stamp.resets != s.resets.Load()+1 {
		return false
	}
	return s.hearsChanges() || c == immutable && s.now().Sub(stamp.at) < recheckAfter
}

// invalidate drops what is known of key: it was replaced or removed.
func (s *s3Store) invalidate(key string) {
	s.changeCounter(key).Add(1)
	s.records.drop(key)
}

// invalidateAll has everything asked for again: announcements may have been missed.
func (s *s3Store) invalidateAll() { s.resets.Add(1) }

// open: see objects. With a body it is one GET, whose answer decides: an
// object that vanished is a miss though its record is known.
func (s *s3Store) open(ctx context.Context, key string, off int64) (*object, error) {
	if !validKey(key) {
		return nil, fmt.Errorf("opening %q: %w", key, fs.ErrNotExist)
	}
	if off < 0 {
		rec, err := s.recordOf(ctx, key)
		if err != nil {
			return nil, err
		}
		return &object{rec: rec}, nil
	}
	stamp := s.stampOf(key)
	r := &s3Reader{s: s, key: key, off: off, at: off}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	rec, err := r.openBody(stamp)
	if err != nil {
		r.Close()
		return nil, err
	}
	return &object{rec: rec, body: r}, nil
}

// recordOf is key's record alone, from memory where that may be.
func (s *s3Store) recordOf(ctx context.Context, key string) (*record, error) {
	if k, ok := s.records.get(key); ok && s.trustsCopy(immutable, k.stamp) {
		return k.rec, nil
	}
	return s.headRecord(ctx, key)
}

// headRecord asks S3 for key's record.
func (s *s3Store) headRecord(ctx context.Context, key string) (*record, error) {
	stamp := s.stampOf(key)
	o, err := s.headObject(ctx, key)
	if err != nil {
		return nil, err
	}
	return s.readObjectRecord(key, o, stamp)
}

func (s *s3Store) headObject(ctx context.Context, key string) (*s3Object, error) {
	return s.askS3(ctx, key, func(ctx context.Context) (*s3Object, error) { return s.client.headObject(ctx, key) })
}

// getObject asks for a part of an object. What it holds on to is given back when ctx
// ends.
func (s *s3Store) getObject(ctx context.Context, key string, g s3GetInput) (*s3Object, error) {
	return s.askS3(ctx, key, func(ctx context.Context) (*s3Object, error) { return s.client.getObject(ctx, key, g) })
}

// askS3 bounds what a client waits for an answer's header, all attempts
// together, and fails at once while S3 is known to be down.
func (s *s3Store) askS3(ctx context.Context, key string, f func(context.Context) (*s3Object, error)) (*s3Object, error) {
	began := s.now()
	flaky, err := s.outage.enter(began)
	if err != nil {
		return nil, err
	}
	wait := s.wait
	if flaky {
		wait = min(wait, s3FlakyTimeout)
	}
	inner, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(wait, func() { cancel(errS3Timeout) })
	o, err := f(inner)
	timer.Stop()
	if o == nil || o.body == nil {
		cancel(nil)
	}
	err = s.classifyError(ctx, began, err)
	if errors.Is(err, fs.ErrNotExist) {
		s.records.drop(key)
	}
	return o, err
}

// classifyError gives an error of the client its kind, and notes what it says about
// the state of S3. Only a caller who left, a miss and a condition that was not
// met keep theirs.
func (s *s3Store) classifyError(ctx context.Context, began time.Time, err error) error {
	refused, _ := errors.AsType[*s3Error](err)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, errS3PreconditionFailed), isBehindEnd(err):
		s.outage.answered(s.now())
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	case refused != nil && refused.status == http.StatusInsufficientStorage:
		return fmt.Errorf("%w: %v", errNoSpace, err)
	case refused == nil: // no answer at all
		s.outage.failed(began, s.now())
	case refused.status < http.StatusInternalServerError:
		s.outage.answered(s.now())
	}
	return fmt.Errorf("%w: %v", errStoreDown, err)
}

// isBehindEnd says whether a range was refused because the object ends before.
func isBehindEnd(err error) bool {
	refused, ok := errors.AsType[*s3Error](err)
	return ok && refused.status == http.StatusRequestedRangeNotSatisfiable
}

// readObjectRecord reads the record that came with o and keeps an immutable file's. An
// object without a sound one of this key is a miss.
func (s *s3Store) readObjectRecord(key string, o *s3Object, stamp changeStamp) (*record, error) {
	k, known := s.records.get(key)
	if text := o.meta[s3RecordField]; !known || k.text != text {
		rec, err := decodeS3Record(key, o)
		if err != nil {
			s.records.drop(key)
			s.log.Warn("object in S3 is of no use", "key", key, "reason", err)
			return nil, fmt.Errorf("opening %s: %w: %w", key, err, fs.ErrNotExist)
		}
		k = keptEntry{key: key, cost: 1, rec: rec, text: text}
	}
	if k.stamp = stamp; k.rec.Class == immutable {
		s.records.add(k, func() bool { return s.isCurrent(key, stamp) })
	}
	return k.rec, nil
}

// s3Record is the content of the metadata field. Put is another one for each
// upload: it tells whether one arrived whose acknowledgement was lost.
type s3Record struct {
	Version int `json:"v"`
	record
	Put string `json:"i"`
}

// encodeS3Record makes a record fit for a header: ASCII, of bounded length. An
// ETag or type that makes it too long is left out: the one costs a fetch, the
// other is mostly told by the file's name.
func encodeS3Record(rec *record) (string, error) {
	r := s3Record{s3RecordVersion, *rec, strconv.FormatUint(rand.Uint64(), 36)}
	text, err := encodeASCIIJSON(r)
	for _, drop := range []*string{&r.ETag, &r.ContentType} {
		if err == nil && len(text) > s3MaxRecord {
			*drop = ""
			text, err = encodeASCIIJSON(r)
		}
	}
	if err == nil && len(text) > s3MaxRecord {
		err = fmt.Errorf("record of %d bytes: %w", len(text), errS3Metadata)
	}
	return text, err
}

// encodeASCIIJSON escapes what not every server keeps: all but printable ASCII, and
// the second of two spaces.
func encodeASCIIJSON(v any) (string, error) {
	var plain, out strings.Builder
	e := json.NewEncoder(&plain)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return "", err
	}
	last := rune(0)
	for _, r := range strings.TrimSuffix(plain.String(), "\n") {
		switch {
		case r > 0xffff:
			hi, lo := utf16.EncodeRune(r)
			fmt.Fprintf(&out, `\u%04x\u%04x`, hi, lo)
		case r > '~' || r == ' ' && last == ' ':
			fmt.Fprintf(&out, `\u%04x`, r)
		default:
			out.WriteRune(r)
		}
		last = r
	}
	return out.String(), nil
}

func decodeS3Record(key string, o *s3Object) (*record, error) {
	text, ours := o.meta[s3RecordField]
	if !ours {
		return nil, errors.New("no record of ours")
	}
	r := new(s3Record)
	err := json.Unmarshal([]byte(text), r)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %v", errDamaged, err)
	case r.Version != s3RecordVersion:
		return nil, errVersion
	case !isSHA256(r.SHA256) || r.Size != o.size:
		return nil, fmt.Errorf("%w: of %d bytes with sha256 %q, the object has %d", errDamaged, r.Size, cleanText(r.SHA256), o.size)
	case storageKey(r.Remote, r.Path) != key:
		return nil, fmt.Errorf("%w: of another file", errDamaged)
	}
	return &r.record, nil
}

// put: see objects. S3 replaces an object in one step, when it acknowledges
// it; a crash before leaves the old one, and at most an unfinished upload that
// sweep aborts.
func (s *s3Store) put(ctx context.Context, key string, rec *record, spool *os.File) error {
	_, err := s.putStamped(ctx, key, rec, spool)
	return err
}

// putStamped is put. Its ticket is valid as long as no other replica announced a
// change since the upload began.
func (s *s3Store) putStamped(ctx context.Context, key string, rec *record, spool *os.File) (changeStamp, error) {
	if err := ctx.Err(); err != nil {
		return changeStamp{}, err
	}
	if err := checkPut(key, rec, spool); err != nil {
		return changeStamp{}, err
	}
	text, err := encodeS3Record(rec)
	if err != nil {
		return changeStamp{}, fmt.Errorf("storing %s: %w", key, err)
	}
	stamp := s.stampOf(key)
	if s.outage.lasts(stamp.at) > s3WriteThrough {
		return changeStamp{}, errS3Outage
	}
	p := s3PutInput{body: spool, size: rec.Size, sha256: rec.SHA256,
		meta: map[string]string{s3RecordField: text}, contentType: contentTypeOf(path.Base(key), rec.ContentType)}
	if rec.create {
		p.ifNoneMatch = "*"
	}
	_, err = s.client.putObject(ctx, key, p)
	s.noteWrite(err)
	stamp = s.noteOwnChange(key, stamp) // without an answer it may have arrived all the same
	if err := s.classifyError(ctx, stamp.at, err); errors.Is(err, errS3PreconditionFailed) {
		return changeStamp{}, errFileExists
	} else if err != nil {
		return changeStamp{}, err
	}
	if rec.Class == immutable {
		s.records.add(keptEntry{key: key, cost: 1, rec: rec, text: text, stamp: stamp}, func() bool { return s.isCurrent(key, stamp) })
	}
	return stamp, nil
}

// noteOwnChange is forget for a change of our own: t is renewed, unless another
// change was announced meanwhile and nobody knows which was last.
func (s *s3Store) noteOwnChange(key string, stamp changeStamp) changeStamp {
	if s.changeCounter(key).CompareAndSwap(stamp.changes, stamp.changes+1) {
		stamp.changes++
	} else {
		s.changeCounter(key).Add(1)
	}
	s.records.drop(key)
	return stamp
}

// delete: see objects. S3 itself does not say whether there was something.
func (s *s3Store) delete(ctx context.Context, key string) error {
	if !validKey(key) {
		return fmt.Errorf("deleting %q: %w", key, fs.ErrNotExist)
	}
	if _, err := s.headObject(ctx, key); err != nil {
		return err
	}
	began := s.now()
	err := s.client.deleteObject(ctx, key)
	s.invalidate(key)
	return s.classifyError(ctx, began, err)
}

// walk: see objects. It costs a HEAD per object.
func (s *s3Store) walk(ctx context.Context, f func(key string, rec *record) error) error {
	var stop error // guarded by one: f is not called after it failed
	return s.eachKey(ctx, s3ParallelHeads, func(ctx context.Context, one *sync.Mutex, key string) error {
		rec, err := s.headRecord(ctx, key)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // foreign, or removed meanwhile
		}
		one.Lock()
		defer one.Unlock()
		if err == nil && stop == nil {
			stop = f(key, rec)
		}
		return errors.Join(err, stop)
	})
}

// eachKey calls f with each artifact's key, several at once; one is for what
// they may do only one at a time. The first error ends it.
func (s *s3Store) eachKey(ctx context.Context, workers int, f func(ctx context.Context, one *sync.Mutex, key string) error) error {
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var one sync.Mutex
	var wg sync.WaitGroup
	keys := make(chan string)
	for range workers {
		wg.Go(func() {
			for key := range keys {
				if inner.Err() != nil {
					continue
				}
				if err := f(inner, &one, key); err != nil {
					cancel(err)
				}
			}
		})
	}
	began := s.now()
	err := s.client.listObjects(inner, "", func(item s3ListedObject) error {
		if !validKey(item.key) {
			return nil // not ours
		}
		select {
		case keys <- item.key:
			return nil
		case <-inner.Done():
			return context.Cause(inner)
		}
	})
	close(keys)
	wg.Wait()
	if cause := context.Cause(inner); cause != nil {
		return cause
	}
	return s.classifyError(ctx, began, err)
}

// verify reads and hashes all that is stored and drops what its record does
// not describe, beside running servers. report is told of each object that was
// dropped or could not be read; dropped counts the former.
func (s *s3Store) verify(ctx context.Context, report func(key string, err error)) (checked, dropped int, err error) {
	err = s.eachKey(ctx, s3ParallelParts, func(ctx context.Context, one *sync.Mutex, key string) error {
		err := s.verifyObject(ctx, key)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		one.Lock()
		defer one.Unlock()
		checked++
		if errors.Is(err, errDropped) {
			dropped++
		}
		if err != nil {
			report(key, err)
		}
		return nil
	})
	return checked, dropped, err
}

// verifyObject drops an object of ours whose record or body is damaged. What
// is not ours, or a later version's, stays.
func (s *s3Store) verifyObject(ctx context.Context, key string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	o, err := s.getObject(ctx, key, s3GetInput{})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	rec, err := decodeS3Record(key, o)
	if err != nil {
		o.body.Close()
		if !errors.Is(err, errDamaged) {
			return err
		}
		return s.dropIfUnchanged(ctx, key, o.etag, err)
	}
	r := &s3Reader{s: s, key: key, etag: o.etag, size: o.size, body: o.body, ctx: ctx, cancel: cancel}
	defer r.Close()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return err
	}
	if sum := hex.EncodeToString(h.Sum(nil)); sum != rec.SHA256 {
		return s.dropIfUnchanged(ctx, key, o.etag, fmt.Errorf("the body has sha256 %s, its record %s", sum, rec.SHA256))
	}
	return nil
}

// dropIfUnchanged removes an object unless it was replaced since it had etag. Between
// the look and the removal it still may be: that one is fetched again.
func (s *s3Store) dropIfUnchanged(ctx context.Context, key, etag string, reason error) error {
	o, err := s.headObject(ctx, key)
	if err != nil || o.etag != etag {
		return nil
	}
	if err := s.delete(ctx, key); err != nil {
		return err
	}
	s.log.Warn("stored object is dropped", "key", key, "reason", reason)
	return fmt.Errorf("%w: %w", errDropped, reason)
}

// sweep aborts uploads that were never finished.
func (s *s3Store) sweep(ctx context.Context) error {
	n, err := s.client.abortOldUploads(ctx, "", s3UploadAge)
	if n > 0 {
		s.log.Info("unfinished uploads were aborted", "uploads", n)
	}
	return err
}
