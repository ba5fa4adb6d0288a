// store_s3.go: objects in S3, and the body of one. The metadata of an object holds its
// record, so that one GET brings both. The hot copies in front are in store_hot.go.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf16"
)

const (
	// s3RecordField is the metadata field that marks an object as ours.
	s3RecordField   = "artifact"
	s3RecordVersion = 1
	// s3MaxRecord bounds that field. S3 allows 2,048 bytes for the names and values
	// of all fields, and MinIO counts the prefix of the name too.
	s3MaxRecord = 2000
	// s3ProbeKey is read to see whether S3 answers, and written to see whether the
	// bucket takes writes. The dot keeps it apart from artifacts.
	s3ProbeKey = ".artifactapi-probe"

	// s3OpenTimeout is how long a client waits for S3 before its file is fetched
	// from the upstream.
	s3OpenTimeout = 3 * time.Second
	// s3CheckTimeout bounds a background check. s3RetryAfter is when a request may
	// find out whether an outage is over. It is longer than a check and the pause
	// between two checks (0.5 s), and each failed check renews it: where checks run,
	// no client waits for a dead S3.
	s3CheckTimeout = 1500 * time.Millisecond
	s3RetryAfter   = 2500 * time.Millisecond
	// s3WriteThrough is how long into an outage uploads are still begun: a restart
	// of S3 takes that long. Later they would only delay the fills behind them.
	s3WriteThrough = 10 * time.Second
	// s3WriteCheckInterval is how often a bucket that refuses writes is tried again.
	s3WriteCheckInterval = 10 * time.Second

	// s3MaxInterruptions bounds how often the body of one answer may break off. The
	// pauses before the new requests add up to 10 s, a restart of S3.
	s3MaxInterruptions = 4
	// s3MaxSkip is how much is read and discarded to reach a range instead of asking
	// for it: about what arrives in the time of a request. It doubles with each request
	// up to s3MaxManySkips: dnf asks for up to 256 ranges of one zchunk file at once,
	// others for 1,000, and an answer that is broken off was sent in good part already.
	s3MaxSkip      = 128 << 10
	s3MaxManySkips = 8 << 20
	// s3MaxDrain is how much of a body is read at its close, which costs less than a
	// new connection. Clients ask for metadata on a condition, and the answer to
	// them has no body.
	s3MaxDrain = 64 << 10
	// s3ParallelHeads ask for records at once in a walk. A listing has no metadata,
	// and a million HEAD requests one after the other take an hour.
	s3ParallelHeads = 16
	// s3UploadAge is when an unfinished upload was left by a crash: no upload of ours
	// takes a day.
	s3UploadAge = 24 * time.Hour

	// recheckAfter is how long copies of immutable files are used without asking
	// S3 while announcements do not arrive.
	recheckAfter = time.Minute
	// maxRecordsInMemory bounds the records in memory, at 2 KB or less each.
	maxRecordsInMemory = 8192
)

var errS3ReadOnly = errors.New("the bucket refuses writes")

// s3Store keeps objects in a bucket, for the tieredStore before it. All methods may be called
// concurrently, and by several replicas. An open body that is small enough to be on its way
// survives the removal of its object; a larger one then ends in an error.
type s3Store struct {
	client       *s3Client
	hearsChanges func() bool // announcements of other replicas arrive; nil: never
	now          func() time.Time
	log          *slog.Logger
	openTimeout  time.Duration // s3OpenTimeout but in tests

	// Replacements and removals that were announced or are our own are counted.
	seed    maphash.Seed
	resets  atomic.Uint64      // times that announcements may have been missed, from 1
	changes [256]atomic.Uint64 // by hash of the key

	records *lru[cachedRecord] // of immutable files

	outage *circuit
	check  backgroundCheck
	// lastWrite is the last write that was accepted or refused. An outage of S3 resets
	// it to nil: the bucket may come back with other permissions.
	lastWrite atomic.Pointer[s3Write]
}

// cachedRecord is a record in memory.
type cachedRecord struct {
	validity
	rec  *record
	text string // the metadata field that rec was read from
}

// validity is what was known of a key's changes at one moment. It is taken before
// S3 is asked, and what S3 answers is kept only while the state is the same: the
// answer may be older than the change that was announced.
type validity struct {
	resets, changes uint64 // the counts at that moment; the zero validity never holds
	at              time.Time
}

// newS3Store keeps objects in client's bucket. It sends no request yet. hearsChanges
// reports whether the announcements of other replicas arrive at the moment. The caller
// closes the store after its last use.
func newS3Store(client *s3Client, hearsChanges func() bool) *s3Store {
	s := &s3Store{client: client, hearsChanges: hearsChanges, now: client.cfg.now, log: client.cfg.log, openTimeout: s3OpenTimeout,
		seed: maphash.MakeSeed(), records: newLRU[cachedRecord](maxRecordsInMemory, 0),
		outage: newCircuit(client.cfg.now, s3RetryAfter, s3RetryAfter)}
	s.resets.Store(1)
	return s
}

// Close waits for the check that runs.
func (s *s3Store) Close() { s.check.running.Wait() }

func (s *s3Store) changesOf(key string) *atomic.Uint64 {
	return &s.changes[maphash.String(s.seed, key)%uint64(len(s.changes))]
}

// isCurrent reports whether key was not invalidated since v.
func (s *s3Store) isCurrent(key string, v validity) bool { return s.changesOf(key).Load() == v.changes }

// validityNow is taken before S3 is asked for key.
func (s *s3Store) validityNow(key string) validity {
	return validity{s.resets.Load(), s.changesOf(key).Load(), s.now()}
}

// trustsCopy reports whether a copy of that class, valid at v and not invalidated
// since, may be used without asking S3: forever while announcements arrive, for
// recheckAfter without them if the file never changes, else not at all.
func (s *s3Store) trustsCopy(c class, v validity) bool {
	hears := s.hearsChanges != nil && s.hearsChanges()
	return v.resets == s.resets.Load() && (hears || (c == immutable && s.now().Sub(v.at) < recheckAfter))
}

// invalidate implements objects.
func (s *s3Store) invalidate(key string) {
	if key == "" {
		s.resets.Add(1)
		return
	}
	s.changesOf(key).Add(1)
	s.records.remove(key)
}

// open implements objects. With a body it is one GET, whose answer decides: an
// object that vanished is a miss even if its record is in memory.
func (s *s3Store) open(ctx context.Context, key string, off int64) (*object, error) {
	if off < 0 {
		if known, found := s.records.get(key); found && s.trustsCopy(immutable, known.validity) {
			return &object{rec: known.rec}, nil
		}
		return s.openRecord(ctx, key)
	}
	v := s.validityNow(key)
	r := &s3Reader{s: s, key: key, off: off, bodyOff: off}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	o, err := s.askS3(r.ctx, key, off, "")
	if isBehindEnd(err) { // there is no body to get
		o, err = s.askS3(r.ctx, key, -1, "")
	}
	var rec *record
	if err == nil {
		r.etag, r.size, r.body = o.etag, o.size, o.body
		rec, err = s.readObjectRecord(key, o, v)
	}
	if err != nil {
		r.Close()
		return nil, err
	}
	return &object{rec: rec, body: r}, nil
}

// stat: see objects. That S3 refuses one object is no outage.
func (s *s3Store) stat(ctx context.Context, key string) (*object, error) {
	obj, err := s.openRecord(ctx, key)
	if errors.Is(err, errStoreDown) && s.outage.outageCause() == nil {
		err = errors.New(err.Error())
	}
	return obj, err
}

// openRecord asks S3 for key's record. The object has no body.
func (s *s3Store) openRecord(ctx context.Context, key string) (*object, error) {
	v := s.validityNow(key)
	o, err := s.askS3(ctx, key, -1, "")
	if err != nil {
		return nil, err
	}
	rec, err := s.readObjectRecord(key, o, v)
	if err != nil {
		return nil, err
	}
	return &object{rec: rec}, nil
}

// askS3 is getObject, or headObject if off is negative. It bounds how long a client waits
// for the header of an answer, all attempts together, and fails at once while S3 is known
// to be down. What the answer holds is released when ctx ends.
func (s *s3Store) askS3(ctx context.Context, key string, off int64, ifMatch string) (o *s3Object, err error) {
	began := s.now()
	inner, cancel := context.WithCancelCause(ctx)
	if err := s.outage.admit(inner); err != nil {
		cancel(nil)
		return nil, err
	}
	timer := time.AfterFunc(s.openTimeout, func() { cancel(errS3Timeout) })
	if off < 0 {
		o, err = s.client.headObject(inner, key)
	} else {
		o, err = s.client.getObject(inner, key, off, ifMatch)
	}
	timer.Stop()
	err = s.classifyError(ctx, began, err)
	if o == nil || o.body == nil {
		cancel(nil)
	}
	if errors.Is(err, fs.ErrNotExist) {
		s.records.remove(key)
	}
	return o, err
}

// classifyError makes err, of a request that began then, errStoreDown or errNoSpace,
// and tells the circuit what it means for S3. A miss, a condition that was not met,
// and the error of a caller that left stay what they are.
func (s *s3Store) classifyError(ctx context.Context, began time.Time, err error) error {
	refused, _ := errors.AsType[*s3Error](err)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, errS3PreconditionFailed), isBehindEnd(err):
		s.outage.succeed()
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	case errors.Is(err, errS3Full):
		return fmt.Errorf("%w: %v", errNoSpace, err)
	}
	down := fmt.Errorf("%w: %v", errStoreDown, err) // nobody takes a timeout of S3 for one of the client
	if errors.Is(err, errS3NoBucket) {
		down = fmt.Errorf("%w: %w", errStoreDown, err)
	}
	switch {
	case errors.Is(err, errS3Busy): // it was not asked
	case refused == nil:
		s.outage.fail(down, began)
	case refused.status < http.StatusInternalServerError:
		s.outage.succeed()
	}
	return down
}

// isBehindEnd reports whether a range was refused because the object ends before it.
func isBehindEnd(err error) bool {
	refused, ok := errors.AsType[*s3Error](err)
	return ok && refused.status == http.StatusRequestedRangeNotSatisfiable
}

// readObjectRecord returns the record that came with o, the answer to a request that began
// at v, and keeps an immutable file's in memory. An object without a sound record of
// key is a miss, and so is one whose size is not its record's, as after a write by
// another program.
func (s *s3Store) readObjectRecord(key string, o *s3Object, v validity) (*record, error) {
	text := o.meta[s3RecordField]
	known, found := s.records.get(key)
	rec := known.rec
	if !found || known.text != text || rec.Size != o.size { // else it need not be parsed again
		var err error
		if rec, err = decodeS3Record(key, o); err != nil {
			s.records.remove(key)
			s.log.Warn("object in S3 cannot be used: its file counts as missing", "key", key, "error", err)
			return nil, fmt.Errorf("opening %s: %w: %w", key, err, fs.ErrNotExist)
		}
	}
	s.cacheRecord(key, cachedRecord{v, rec, text})
	return rec, nil
}

// cacheRecord keeps the record of an immutable file, unless key was invalidated
// meanwhile.
func (s *s3Store) cacheRecord(key string, known cachedRecord) {
	if known.rec.Class == immutable {
		s.records.putIf(key, 1, known, func() bool { return s.isCurrent(key, known.validity) })
	}
}

// s3Record is the content of the metadata field. Put is different for each upload:
// after a lost answer it shows whether the upload arrived.
type s3Record struct {
	Version int `json:"v"`
	record
	Put string `json:"i"`
}

// encodeS3Record makes a record fit for a header: of bounded length, and without what
// some servers change there, all but printable ASCII and several spaces.
func encodeS3Record(rec *record) (string, error) {
	var plain, out strings.Builder
	e := json.NewEncoder(&plain)
	e.SetEscapeHTML(false)
	if err := e.Encode(s3Record{s3RecordVersion, *rec, strconv.FormatUint(rand.Uint64(), 36)}); err != nil {
		return "", err
	}
	for _, r := range strings.TrimSuffix(plain.String(), "\n") {
		if r > ' ' && r <= '~' {
			out.WriteRune(r)
			continue
		}
		for _, unit := range utf16.AppendRune(nil, r) {
			fmt.Fprintf(&out, `\u%04x`, unit)
		}
	}
	if out.Len() > s3MaxRecord {
		return "", fmt.Errorf("its record of %d bytes does not fit into the metadata of an object", out.Len())
	}
	return out.String(), nil
}

// decodeS3Record returns the record in o's metadata. Its errors are errDamaged, and
// without a kind for an object that is not ours or of another version.
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
		return nil, errors.New("a record of another version of artifactapi")
	case !isSHA256(r.SHA256) || r.Size != o.size:
		return nil, fmt.Errorf("%w: of %d bytes with sha256 %q, the object has %d", errDamaged, r.Size, cleanText(r.SHA256), o.size)
	case storageKey(r.Remote, r.Path) != key:
		return nil, fmt.Errorf("%w: of another file", errDamaged)
	}
	return &r.record, nil
}

// upload is put of objects. S3 replaces an object in one step, when it acknowledges it. A
// crash before that leaves the old one, and at most an unfinished upload that sweep aborts.
// The validity that it returns holds as long as no other replica announces a change after
// the upload began.
func (s *s3Store) upload(ctx context.Context, key string, rec *record, spool io.ReaderAt, when putCondition) (validity, error) {
	text, err := encodeS3Record(rec)
	if err != nil {
		return validity{}, fmt.Errorf("storing %s: %w", key, err)
	}
	if began, cause := s.outage.outage(); cause != nil && s.client.cfg.now().Sub(began) > s3WriteThrough {
		return validity{}, cause
	}
	v := s.validityNow(key)
	in := s3PutInput{body: spool, size: rec.Size, sha256: rec.SHA256,
		meta: map[string]string{s3RecordField: text}, contentType: contentTypeOf(path.Base(key), rec.ContentType)}
	refusal := errCondition
	if when.isNew {
		in.ifNoneMatch, refusal = "*", errFileExists
	}
	if when.old != nil {
		if in.ifMatch, err = s.etagOf(ctx, key, when.old); err != nil {
			return validity{}, err
		}
	}
	err = s.noteWrite(s.client.putObject(ctx, key, in))
	s.invalidate(key) // also after a failure: the upload may have arrived
	v.changes++       // current if that was the only change since
	err = s.classifyError(ctx, v.at, err)
	if errors.Is(err, errS3PreconditionFailed) || (when.old != nil && errors.Is(err, fs.ErrNotExist)) {
		err = refusal
	}
	if err == nil {
		s.cacheRecord(key, cachedRecord{v, rec, text})
	}
	return v, err
}

// etagOf returns the ETag of key's object if that is still old's, else errCondition.
func (s *s3Store) etagOf(ctx context.Context, key string, old *record) (string, error) {
	o, err := s.askS3(ctx, key, -1, "")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err == nil {
		now, err := decodeS3Record(key, o)
		if err == nil && now.SHA256 == old.SHA256 && now.Fetched.Equal(old.Fetched) {
			return o.etag, nil
		}
	}
	s.invalidate(key) // what is cached is not what is there
	return "", errCondition
}

// delete implements objects. It asks first, since S3 does not say whether there was
// something to delete.
func (s *s3Store) delete(ctx context.Context, key string) error {
	if _, err := s.askS3(ctx, key, -1, ""); err != nil {
		return err
	}
	began := s.now()
	err := s.client.deleteObject(ctx, key)
	s.invalidate(key)
	return s.classifyError(ctx, began, err)
}

// walk implements objects. It costs a HEAD request for each object.
func (s *s3Store) walk(ctx context.Context, f func(key string, rec *record) error) error {
	return s.eachKey(ctx, s3ParallelHeads, s.openRecord, func(key string, o *object, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // not ours, or removed meanwhile
		}
		if err != nil {
			return err
		}
		return f(key, o.rec)
	})
}

// eachKey calls look for each artifact, that many at once, and report for each result,
// one at a time. The first error of report ends it and is returned.
func (s *s3Store) eachKey(ctx context.Context, parallel int, look func(ctx context.Context, key string) (*object, error), report func(key string, o *object, err error) error) error {
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	var mu sync.Mutex // held while report runs
	slots := make(chan struct{}, parallel)
	began := s.now()
	err := s.client.listObjects(inner, "", func(item s3ListedEntry) error {
		if !validKey(item.Key) {
			return nil // not ours
		}
		select {
		case slots <- struct{}{}:
		case <-inner.Done():
			return context.Cause(inner)
		}
		running.Go(func() {
			defer func() { <-slots }()
			o, err := look(inner, item.Key)
			mu.Lock()
			defer mu.Unlock()
			if inner.Err() == nil {
				if err := report(item.Key, o, err); err != nil {
					cancel(err)
				}
			}
		})
		return nil
	})
	running.Wait()
	if cause := context.Cause(inner); cause != nil {
		return cause
	}
	return s.classifyError(ctx, began, err)
}

// verify implements verifiableObjects. It may run beside servers.
func (s *s3Store) verify(ctx context.Context, report func(key string, err error)) (checked int, err error) {
	look := func(ctx context.Context, key string) (*object, error) { return nil, s.verifyObject(ctx, key) }
	err = s.eachKey(ctx, s3ParallelParts, look, func(key string, _ *object, err error) error {
		checked++
		if err != nil {
			report(key, err)
		}
		return nil
	})
	return checked, err
}

// verifyObject drops an object of ours whose record or body is damaged. One that is
// replaced just before the removal is lost and fetched again. An object that is not
// ours, or of a later version of the program, stays.
func (s *s3Store) verifyObject(ctx context.Context, key string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	o, err := s.askS3(ctx, key, 0, "")
	if errors.Is(err, fs.ErrNotExist) {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	r := &s3Reader{s: s, key: key, etag: o.etag, size: o.size, body: o.body, ctx: ctx, cancel: cancel}
	defer r.closeBody()
	rec, damage := decodeS3Record(key, o)
	if damage == nil {
		damage = copyBody(ctx, io.Discard, r, rec.Size, rec.SHA256)
	}
	if !errors.Is(damage, errDamaged) && !errors.Is(damage, errDamagedBody) {
		return damage
	}
	if now, err := s.askS3(ctx, key, -1, ""); err != nil || now.etag != o.etag {
		return ignoreMiss(err) // or it was replaced
	}
	if err := s.delete(ctx, key); err != nil {
		return err
	}
	s.log.Warn("stored object was dropped", "key", key, "reason", damage)
	return fmt.Errorf("%w: %w", errDropped, damage)
}

// sweep aborts our uploads that were never finished: other programs may use the bucket
// too. Our clock decides; it differs from the server's by minutes at most, or that refuses.
func (s *s3Store) sweep(ctx context.Context) error {
	before := s.now().Add(-s3UploadAge)
	n, err := s.client.abortUploads(ctx, "", func(u s3ListedEntry) bool { return validKey(u.Key) && u.Initiated.Before(before) })
	if n > 0 {
		s.log.Info("unfinished uploads were aborted", "uploads", n)
	}
	return err
}

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
	skip          int64         // how much may be discarded to reach off; grows from s3MaxSkip
	noSocket      bool          // sendFromSocket failed: the client is slow, or one of both is gone
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
		if errors.Is(err, errS3PreconditionFailed) || r.ctx.Err() != nil || r.interruptions == s3MaxInterruptions {
			return 0, fmt.Errorf("reading %s at %d: %w", r.key, r.off, err)
		}
		pause := time.Duration(r.interruptions*(r.interruptions+1)/2) * time.Second
		r.interruptions++
		_ = r.s.client.cfg.sleep(r.ctx, pause) // once r.ctx has ended, seekBody fails
	}
	return 0, io.EOF
}

// sendFromSocket: see socketSource. What failed here the next Read tries again, at the same
// offset.
func (r *s3Reader) sendFromSocket(w io.Writer, limit int64) int64 {
	a, ok := r.body.(*s3Attempt)
	if !ok || r.bodyOff != r.off || r.noSocket {
		return 0
	}
	n, err := a.sendFromSocket(w, limit)
	r.off, r.bodyOff = r.off+n, r.bodyOff+n
	if err != nil && r.off < r.size {
		r.noSocket = true
		r.closeBody()
	}
	return n
}

// seekBody leaves r.body open at r.off: it reads on over a short gap, and asks again
// for anything else.
func (r *s3Reader) seekBody() error {
	r.skip = max(r.skip, s3MaxSkip)
	if gap := r.off - r.bodyOff; r.body != nil && gap > 0 && gap <= r.skip {
		n, _ := io.CopyN(io.Discard, r.body, gap)
		r.bodyOff += n
	}
	if r.body != nil && r.bodyOff == r.off {
		return nil
	}
	r.closeBody()
	o, err := r.s.askS3(r.ctx, r.key, r.off, r.etag)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: it is gone", errS3PreconditionFailed)
	case err != nil:
		return err
	case o.etag != r.etag || o.etag == "" || o.size != r.size: // not all servers know If-Match
		o.body.Close()
		return fmt.Errorf("%w: it was replaced", errS3PreconditionFailed)
	}
	r.body, r.bodyOff, r.skip = o.body, r.off, min(2*r.skip, s3MaxManySkips)
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
	r.off = seekOffset(off, whence, r.off, r.size)
	return r.off, nil
}

// Close reads what is left of a body first, if that arrives in 0.1 s, see s3MaxDrain.
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
