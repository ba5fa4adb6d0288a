// store_bundle.go: bundles, which carry what is stored from one store to another: the
// tar that is one, how it is written, and how it is read, all of it or nothing.

package main

import (
	"archive/tar"
	"bufio"
	"bytes"
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
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
)

// The entries of a bundle, in this order; unpacked it is an OCI image layout. A file that
// is stored, replaced or removed while its bundle is written makes the first four follow
// again at the end, and as in any tar the last ones count.
const (
	bundleHeadFile    = "artifactapi-bundle.json"
	bundleLayoutFile  = "oci-layout"
	bundleIndexFile   = "index.json"
	bundleRecordsFile = "records.ndjson" // a record a line
	bundleBodies      = "blobs/sha256/"  // and the digits of the body's SHA-256

	bundleFormat  = "artifactapi bundle 1"
	maxBundleHead = 1 << 20 // in bytes: the names of ten thousand remotes
	// importWorkers store at once: each waits for the disk to sync, or for S3.
	importWorkers = 8
	// importMark is written in DATA_DIR behind an import, see followStore.
	importMark = ".imported"
)

// bundleHead is the content of bundleHeadFile. Bodies and bytes are those in the bundle.
type bundleHead struct {
	Format  string    `json:"format"`
	Time    time.Time `json:"time"`
	Remotes []string  `json:"remotes"`
	Counts  struct {
		Records int   `json:"records"`
		Bodies  int   `json:"bodies"`
		Bytes   int64 `json:"bytes"`
	} `json:"counts"`
}

// errDamagedBody is a body that is not the one that its record or its name says.
var errDamagedBody = errors.New("damaged body")

// taggedImage returns image and tag of a manifest that is stored by its tag. Records of
// manifests alone have a digest, and a digest in a path has a colon.
func taggedImage(rec *record) (image, tag string, ok bool) {
	const route = "/manifests/"
	i := strings.LastIndex(rec.Path, route)
	if i < 0 || rec.Digest == "" {
		return "", "", false
	}
	image, tag = rec.Path[:i], rec.Path[i+len(route):]
	return image, tag, !strings.Contains(tag, ":")
}

// ignoreMiss is err, or nil for an object that is not there.
func ignoreMiss(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// copyBody copies a body. It ends with ctx. errDamagedBody: it does not have that size and
// SHA-256.
func copyBody(ctx context.Context, to io.Writer, from io.Reader, size int64, digits string) error {
	buf := copyBuffers.Get().(*[copyBufferSize]byte)
	defer copyBuffers.Put(buf)
	h := sha256.New()
	n, err := io.CopyBuffer(io.MultiWriter(to, h, contextWriter{ctx}), from, buf[:])
	if sum := hex.EncodeToString(h.Sum(nil)); err == nil && (n != size || sum != digits) {
		err = fmt.Errorf("%w: it has %d bytes with sha256 %s, not %d with %s", errDamagedBody, n, sum, size, digits)
	}
	return err
}

// recordList is a list of records in a temporary file, a line each. There may be
// millions.
type recordList struct {
	file *os.File
	out  *bufio.Writer
	*json.Encoder
}

// newRecordList makes an empty list in a file that createFile makes. The caller closes
// it.
func newRecordList(createFile func() (*os.File, error)) (*recordList, error) {
	f, err := createFile()
	if err != nil {
		return nil, err
	}
	os.Remove(f.Name()) // open, it can be used all the same
	out := bufio.NewWriter(f)
	return &recordList{f, out, json.NewEncoder(out)}, nil
}

// open returns a reader of the whole list, to which nothing is added any more.
func (l *recordList) open() (*io.SectionReader, error) {
	err := l.out.Flush()
	size, seekErr := l.file.Seek(0, io.SeekEnd)
	return io.NewSectionReader(l.file, 0, size), storeError("writing a list of records", errors.Join(err, seekErr))
}

// each is eachRecord of the whole list.
func (l *recordList) each(ctx context.Context, workers int, f func(*record) error) error {
	from, err := l.open()
	if err != nil {
		return err
	}
	return eachRecord(ctx, from, workers, f)
}

// eachRecord calls f with each record of a list, that many at once; one worker keeps the
// order. The first error ends it and is returned.
func eachRecord(ctx context.Context, from io.Reader, workers int, f func(*record) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	slots := make(chan struct{}, workers)
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, maxRecord)
	for lines.Scan() {
		rec := new(record)
		if err := json.Unmarshal(lines.Bytes(), rec); err != nil {
			cancel(fmt.Errorf("%w: %w", errDamaged, err))
		}
		if slots <- struct{}{}; ctx.Err() != nil {
			break
		}
		running.Go(func() {
			defer func() { <-slots }()
			if err := f(rec); err != nil {
				cancel(err)
			}
		})
	}
	running.Wait()
	return errors.Join(context.Cause(ctx), lines.Err())
}

// bundleWriter writes what is stored as a bundle. It runs beside servers.
type bundleWriter struct {
	objects    objects
	createFile func() (*os.File, error) // a temporary file
	config     *config                  // knows registries; empty: nothing is known
	remotes    []string                 // that are wanted; nil: all
	leaveOut   map[string]bool          // sums of bodies that the other side has
	time       time.Time
	tar        *tar.Writer
}

// write writes the bundle. After an error what it has written is none. What a root names
// is stored before it is: all else is listed again when roots and tags were written.
func (b *bundleWriter) write(ctx context.Context, to io.Writer) error {
	out := bufio.NewWriterSize(to, copyBufferSize)
	b.tar = tar.NewWriter(out)
	var lists [3]*recordList
	for i := range lists {
		l, err := newRecordList(b.createFile)
		if err != nil {
			return err
		}
		defer l.file.Close()
		lists[i] = l
	}
	listed, rest, kept := lists[0], lists[1], lists[2]
	seed, changed, written := maphash.MakeSeed(), uint64(0), map[string]bool{} // changed: 0 if listed is what is kept
	add := func(to *recordList, rec *record) error {
		changed ^= maphash.String(seed, rec.Remote+"/"+rec.Path+" "+rec.SHA256)
		return to.Encode(rec)
	}
	keep := func(rec *record) error {
		now, err := b.writeBody(ctx, rec, written)
		if now == nil || err != nil {
			return err
		}
		return add(kept, now)
	}
	err := b.walk(ctx, func(rec *record) error { return add(listed, rec) })
	if err == nil {
		err = b.writeDocuments(ctx, listed)
	}
	for _, pass := range []func() error{
		func() error { return listed.each(ctx, 1, ifRoot(true, keep)) },
		func() error { return b.walk(ctx, ifRoot(false, func(rec *record) error { return rest.Encode(rec) })) },
		func() error { return rest.each(ctx, 1, keep) },
	} {
		if err == nil {
			err = pass()
		}
	}
	if err == nil && changed != 0 {
		err = b.writeDocuments(ctx, kept)
	}
	if err != nil {
		return err
	}
	return errors.Join(b.tar.Close(), out.Flush())
}

// walk calls f with each record that is wanted.
func (b *bundleWriter) walk(ctx context.Context, f func(*record) error) error {
	return b.objects.walk(ctx, func(_ string, rec *record) error {
		if b.remotes != nil && !slices.Contains(b.remotes, rec.Remote) {
			return nil
		}
		return f(rec)
	})
}

// ifRoot is f for records of roots and tags alone, or of all else: a signature, with a hash
// in its path, is what a root names.
func ifRoot(roots bool, f func(*record) error) func(*record) error {
	return func(rec *record) error {
		if isRoot := importRank(rec) == importRanks-1 && !strings.Contains(rec.Path, "#"); isRoot != roots {
			return nil
		}
		return f(rec)
	}
}

// writeDocuments writes the entries before the bodies for these records.
func (b *bundleWriter) writeDocuments(ctx context.Context, list *recordList) error {
	head := bundleHead{Format: bundleFormat, Time: b.time.UTC(), Remotes: []string{}}
	images := []any{} // descriptors, as the OCI image layout has them
	counted := map[string]bool{}
	err := list.each(ctx, 1, func(rec *record) error {
		if i, found := slices.BinarySearch(head.Remotes, rec.Remote); !found {
			head.Remotes = slices.Insert(head.Remotes, i, rec.Remote)
		}
		head.Counts.Records++
		if !counted[rec.SHA256] && !b.leaveOut[rec.SHA256] {
			counted[rec.SHA256] = true
			head.Counts.Bodies++
			head.Counts.Bytes += rec.Size
		}
		if image, tag, ok := taggedImage(rec); ok {
			names := map[string]string{"org.opencontainers.image.ref.name": tag}
			if r := b.config.remotes[rec.Remote]; r != nil && r.registry != "" {
				names["io.containerd.image.name"] = r.registry + "/" + image + ":" + tag
			}
			images = append(images, map[string]any{"mediaType": rec.ContentType, "digest": "sha256:" + rec.SHA256, "size": rec.Size, "annotations": names})
		}
		return nil
	})
	for _, name := range b.remotes {
		if err == nil && !slices.Contains(head.Remotes, name) && b.config.remotes[name] == nil {
			err = fmt.Errorf("there is no remote %q, and nothing is stored of one", name)
		}
	}
	if err != nil {
		return err
	}
	headText, _ := json.Marshal(head) // strings and numbers always encode
	indexText, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": images})
	records, err := list.open()
	return errors.Join(err,
		b.writeEntry(bundleHeadFile, bytes.NewReader(headText)),
		b.writeEntry(bundleLayoutFile, strings.NewReader(`{"imageLayoutVersion":"1.0.0"}`)),
		b.writeEntry(bundleIndexFile, bytes.NewReader(indexText)),
		b.writeEntry(bundleRecordsFile, records))
}

// writeEntry writes an entry of the tar, the whole of content.
func (b *bundleWriter) writeEntry(name string, content interface {
	io.Reader
	Size() int64
}) error {
	err := b.writeHeader(name, content.Size())
	if err == nil {
		_, err = io.Copy(b.tar, content)
	}
	return err
}

func (b *bundleWriter) writeHeader(name string, size int64) error {
	return b.tar.WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o644, ModTime: b.time})
}

// writeBody writes the body of a record, unless it is written already or left out. It
// returns the record that is stored now: rec, one that has replaced it, or nil.
func (b *bundleWriter) writeBody(ctx context.Context, rec *record, written map[string]bool) (*record, error) {
	if written[rec.SHA256] || b.leaveOut[rec.SHA256] {
		return rec, nil
	}
	key := storageKey(rec.Remote, rec.Path)
	obj, err := b.objects.open(ctx, key, 0)
	if err != nil {
		return nil, ignoreMiss(err)
	}
	defer obj.body.Close()
	if obj.rec.SHA256 != rec.SHA256 {
		return b.writeBody(ctx, obj.rec, written)
	}
	written[rec.SHA256] = true
	err = b.writeHeader(bundleBodies+rec.SHA256, rec.Size)
	if err == nil {
		err = copyBody(ctx, b.tar, obj.body, rec.Size, rec.SHA256)
	}
	if errors.Is(err, errDamagedBody) {
		err = fmt.Errorf("%w: run artifactapi verify, then export again", err)
	}
	if err != nil {
		return nil, fmt.Errorf("exporting %s: %w", key, err)
	}
	return rec, nil
}

// bundleReader reads a bundle and stores what the store lacks. It runs beside servers.
// Bodies are staged first, and none is stored before all are there.
type bundleReader struct {
	cacheStores                   // of which it uses objects, index, space and replicas
	missing     func(rec *record) // called for each record whose body is nowhere

	dir   string      // of the staged bodies; a body's name is the digits of its SHA-256
	head  *bundleHead // nil: not read yet
	todo  *recordList // of what the store lacks; nil: not known yet
	ahead int64       // bytes reserved for bodies that are not staged yet
	files int64       // that the account of space knows, of todo

	stored atomic.Int64               // records
	mu     sync.Mutex                 // guards the fields below while workers run
	uses   map[string]int             // by sum, how many records of todo have the body; 0: listed, and nobody lacks it
	there  map[[sha256.Size]byte]bool // hashes of records that need not be stored
}

// readAndStore reads a bundle and stores it. It is called once.
func (b *bundleReader) readAndStore(ctx context.Context, from io.Reader) error {
	defer func() {
		b.space.add(account{reserved: -b.ahead, growing: -b.files})
		if b.todo != nil {
			b.todo.file.Close()
		}
	}()
	if err := b.readAll(ctx, tar.NewReader(from)); err != nil {
		return fmt.Errorf("importing: %w (nothing was changed)", err)
	}
	defer b.announceAll(context.WithoutCancel(ctx))
	for rank := range importRanks {
		err := b.todo.each(ctx, importWorkers, func(rec *record) error {
			if importRank(rec) != rank {
				return nil
			}
			return b.store(ctx, rec)
		})
		if err != nil {
			return fmt.Errorf("importing: %w (%d files are stored: import the bundle again for the rest)", err, b.stored.Load())
		}
	}
	return nil
}

// announceAll announces that anything may have changed: some changes were not heard, or an
// earlier import died before it announced one. Where Redis is down for longer than its
// pause, replicas that connect to it again check all that they keep.
func (b *bundleReader) announceAll(ctx context.Context) {
	if b.replicas != nil && b.replicas.announceChange(ctx, copiesPrefix) != nil && sleepFor(ctx, redisPause) == nil {
		_ = b.replicas.announceChange(ctx, copiesPrefix)
	}
}

// readAll reads a bundle to its end and makes all ready to be stored, or returns an
// error.
func (b *bundleReader) readAll(ctx context.Context, in *tar.Reader) error {
	for {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		if err == nil {
			err = b.readEntry(ctx, h, in)
		}
		if err != nil {
			return err
		}
	}
	if b.head == nil || b.todo == nil {
		return fmt.Errorf("this is no bundle: it lacks %s or %s", bundleHeadFile, bundleRecordsFile)
	}
	return b.findBodies(ctx)
}

// importRanks is the number of ranks. Files are stored behind those of lower ranks,
// which they may name.
const importRanks = 3

func importRank(rec *record) int {
	roots := []string{"repomd.xml", "repomd.xml.asc", "InRelease", "Release", "Release.gpg"}
	if _, _, isTag := taggedImage(rec); isTag || slices.Contains(roots, path.Base(decodePath(rec.Path))) {
		return 2
	} else if rec.Class == mutable {
		return 1
	}
	return 0
}

// readEntry reads an entry of the tar. Others than ours are passed over, and no name in
// a tar becomes the name of a file.
func (b *bundleReader) readEntry(ctx context.Context, h *tar.Header, body io.Reader) error {
	name := strings.TrimPrefix(h.Name, "./")
	digits, isBody := strings.CutPrefix(name, bundleBodies)
	switch {
	case h.Typeflag != tar.TypeReg:
	case name == bundleHeadFile:
		b.head = new(bundleHead)
		err := json.NewDecoder(io.LimitReader(body, maxBundleHead)).Decode(b.head)
		if err == nil && b.head.Format != bundleFormat {
			err = fmt.Errorf("its format is %.100q, and this version knows %q", b.head.Format, bundleFormat)
		}
		return err
	case name == bundleRecordsFile:
		return b.compare(ctx, body)
	case isBody && isSHA256(digits):
		if lacking, listed := b.uses[digits]; listed && lacking == 0 {
			return nil
		}
		return b.stage(ctx, digits, h.Size, body)
	}
	return nil
}

// compare compares records with what is stored, and reserves the space for what the
// store lacks. Of two copies the one that was fetched later stays. What was there by the
// list before is not lacking if somebody has removed it since: its body was passed over.
func (b *bundleReader) compare(ctx context.Context, records io.Reader) (err error) {
	if b.todo != nil {
		b.todo.file.Close()
	}
	if b.todo, err = newRecordList(b.space.createFile); err != nil {
		return err
	}
	lacking, files := int64(0), int64(0)
	before := b.there
	b.uses, b.there = map[string]int{}, map[[sha256.Size]byte]bool{}
	err = eachRecord(ctx, records, importWorkers, func(rec *record) error {
		if !isSoundRecord(rec) {
			return fmt.Errorf("%w of %.100q", errDamaged, rec.Remote+"/"+rec.Path)
		}
		old, err := b.objects.open(ctx, storageKey(rec.Remote, rec.Path), -1)
		if ignoreMiss(err) != nil {
			return err
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		id := sha256.Sum256([]byte(rec.Remote + "/" + rec.Path + " " + rec.SHA256))
		if before[id] || err == nil && (old.rec.SHA256 == rec.SHA256 || !rec.Fetched.After(old.rec.Fetched)) {
			b.uses[rec.SHA256] += 0
			b.there[id] = true
			return nil
		}
		b.uses[rec.SHA256]++
		if _, err := os.Stat(b.dir + "/" + rec.SHA256); err != nil || b.uses[rec.SHA256] > 1 { // else the disk accounts for it already
			lacking += rec.Size
		}
		files++
		return b.todo.Encode(rec)
	})
	if err != nil {
		return err
	}
	b.space.add(account{growing: files - b.files})
	b.files = files
	return b.reserve(lacking)
}

// isSoundRecord reports whether a record, which was made elsewhere, can be stored.
func isSoundRecord(rec *record) bool {
	return slices.Contains([]class{immutable, mutable, local}, rec.Class) && isSHA256(rec.SHA256) && rec.Size >= 0 &&
		len(rec.Remote) <= maxName && len(rec.Path) <= maxSpelling && validKey(storageKey(rec.Remote, rec.Path)) &&
		!strings.ContainsFunc(decodePath(rec.Path), unicode.IsControl)
}

// reserve has n bytes reserved ahead.
func (b *bundleReader) reserve(n int64) error {
	if n <= b.ahead {
		return nil
	}
	_, err := b.space.reserve(n-b.ahead, false)
	if err == nil {
		b.ahead = n
	}
	return err
}

// stage makes a body ready to be stored, unless it is.
func (b *bundleReader) stage(ctx context.Context, digits string, size int64, from io.Reader) error {
	if err := b.reserve(size); err != nil {
		return err
	}
	f, err := os.OpenFile(b.dir+"/"+digits, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	} else if err != nil {
		return storeError("staging", err)
	}
	err = errors.Join(copyBody(ctx, f, from, size, digits), f.Close())
	b.ahead -= size // the disk accounts for it now
	b.space.add(account{reserved: -size})
	return err
}

// findBodies takes bodies that were not in the bundle from what is stored under other
// keys. A body that is in neither place, or not of its record's size, is an error.
func (b *bundleReader) findBodies(ctx context.Context) error {
	wanted := map[string]bool{}
	for sum, lacking := range b.uses {
		if _, err := os.Stat(b.dir + "/" + sum); lacking > 0 && err != nil {
			wanted[sum] = true
		}
	}
	takeBody := func(key string, rec *record) error {
		if !wanted[rec.SHA256] {
			return nil
		}
		obj, err := b.objects.open(ctx, key, 0)
		if err != nil {
			return ignoreMiss(err)
		}
		defer obj.body.Close()
		delete(wanted, obj.rec.SHA256)
		return b.stage(ctx, obj.rec.SHA256, obj.rec.Size, obj.body)
	}
	if len(wanted) > 0 {
		if err := b.objects.walk(ctx, takeBody); err != nil {
			return err
		}
	}
	missing := 0
	err := b.todo.each(ctx, 1, func(rec *record) error {
		if fi, err := os.Stat(b.dir + "/" + rec.SHA256); err != nil || fi.Size() != rec.Size {
			missing++
			b.missing(rec)
		}
		return nil
	})
	if err == nil && missing > 0 {
		err = fmt.Errorf("the bodies of %d files are neither in the bundle nor in this store", missing)
	}
	return err
}

// store stores an object with its staged body, whose file the last user of a body gives
// away. The others' files have no name, so that the store copies them.
func (b *bundleReader) store(ctx context.Context, rec *record) error {
	key, staged, name := storageKey(rec.Remote, rec.Path), b.dir+"/"+rec.SHA256, ""
	b.mu.Lock()
	b.uses[rec.SHA256]--
	if b.uses[rec.SHA256] == 0 {
		name = staged
	}
	fd, err := syscall.Open(staged, syscall.O_RDONLY|syscall.O_CLOEXEC, 0) // before the last user can move it
	b.mu.Unlock()
	if err != nil {
		return storeError("opening a staged body", err)
	}
	body := os.NewFile(uintptr(fd), name)
	defer body.Close()
	if err := b.objects.put(ctx, key, rec, body, putCondition{}); err != nil {
		return err
	}
	if b.replicas != nil {
		_ = b.replicas.announceChange(ctx, key) // it logs an outage, and announceAll follows
	}
	_ = b.index.saveRow(ctx, newIndexRow(key, rec)) // it logs an outage; the next use of the file adds the row
	b.stored.Add(1)
	return nil
}

// newStagingDir makes a directory for staged bodies beside the spools. The caller
// removes and closes it; until then it is locked, so that no process sweeps it.
func (d *diskStore) newStagingDir() (dir *os.File, err error) {
	spools, name := d.dir+"/"+spoolDir, ""
	if err = os.MkdirAll(spools, 0o755); err == nil {
		name, err = os.MkdirTemp(spools, "import-*")
	}
	if err == nil {
		dir, err = os.Open(name)
	}
	if err != nil {
		return nil, storeError("making a temporary directory", err)
	}
	tryFlock(dir)
	return dir, nil
}

// announceImport has a server with the same DATA_DIR compare its index with what is
// stored.
func (x *embeddedIndex) announceImport() error {
	return x.replaceFile(path.Dir(x.name)+"/"+importMark, func(io.Writer) error { return nil })
}

// followStore compares the index with what is stored, until that has succeeded once and
// after each import by another process. One goroutine calls it.
func (x *embeddedIndex) followStore(ctx context.Context, from objects) error {
	var at time.Time // of the last import
	if fi, err := os.Stat(path.Dir(x.name) + "/" + importMark); err == nil {
		at = fi.ModTime()
	}
	if x.complete.Load() && at.Equal(x.importSeen) {
		return nil
	}
	x.importSeen = at
	err := x.reconcile(ctx, from)
	if err != nil && ctx.Err() == nil {
		level := slog.LevelWarn
		if errors.Is(err, errStoreDown) { // the check of the backend tells of it
			level = slog.LevelDebug
		}
		x.log.Log(ctx, level, "the index cannot be compared with what is stored, listings are not complete", "error", err)
	}
	return err
}
