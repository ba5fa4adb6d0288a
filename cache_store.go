// cache_store.go: how a complete body gets into the store, the index and the freshness
// marks, and how a file is fetched ahead of any client.

package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"regexp"
	"strings"
	"time"
)

// storeBody stores a complete body: the object, then its index row; the caller then
// sets the freshness mark. A crash behind the object leaves one without a row, which
// gets it with its next use or by reindex; a crash behind the row leaves a copy whose
// freshness counts from its fetch.
func (c *cache) storeBody(ctx context.Context, key string, rec *record, body io.ReaderAt, when putCondition) error {
	if err := c.objects.put(ctx, key, rec, body, when); err != nil {
		if errors.Is(err, errFileExists) || errors.Is(err, errCondition) {
			return err
		}
		c.reportStoreError("storage", "storing", key, err)
		if rec.Class == local { // it may have arrived, and a copy of the old one would never expire
			c.announce(ctx, key)
		}
		return err
	}
	c.announce(ctx, key)
	c.missing.delete(key)
	if rec.Class != local {
		c.uses.noteNewest(key, rec.Fetched)
	}
	c.reportStoreError("database", "indexing", key, c.index.saveRow(ctx, newIndexRow(key, rec)))
	return nil
}

// wellKnownIndexes match files that change in every repository that has them. Each pattern
// is also what mutable_patterns should have. It is matched where its word is found in the
// path, since every stored file is looked at.
var wellKnownIndexes = []struct {
	word    string
	pattern *regexp.Regexp
}{
	{"Release", regexp.MustCompile(`(^|/)(InRelease|Release(\.gpg)?)$`)},
	{"Packages", regexp.MustCompile(`(^|/)Packages(\.(gz|xz|bz2|lzma|zst))?$`)},
	{"Sources", regexp.MustCompile(`(^|/)Sources(\.(gz|xz|bz2|lzma|zst))?$`)},
	{"repomd", regexp.MustCompile(`(^|/)repomd\.xml(\.asc)?$`)},
	{"APKINDEX", regexp.MustCompile(`(^|/)APKINDEX\.tar\.gz$`)},
	{"index.", regexp.MustCompile(`(^|/)index\.yaml$`)},
	{"maven-metadata", regexp.MustCompile(`(^|/)maven-metadata\.xml`)},
	{"/@v/list", regexp.MustCompile(`/@v/list$`)},
	{"simple/", regexp.MustCompile(`^simple/`)},
	{".db", pacmanPattern}, {".files", pacmanPattern},
}

var (
	pacmanPattern = regexp.MustCompile(`\.(db|files)(\.tar\.[a-z]+)?(\.sig)?$`)
	// packumentPattern is npm's index of a package, which its type tells from other files.
	packumentPattern = regexp.MustCompile(`^(@[^/]+/)?[^/.]+$`)
)

// warnOfIndex tells once for each remote that an index was stored forever.
func warnOfIndex(f *fill, rec *record) {
	rem, path := f.file.remote, f.file.path
	if rec.Class != immutable || f.file.digest != "" || rem.immutableTTL > 0 {
		return
	}
	var found *regexp.Regexp
	if strings.Contains(rec.ContentType, "json") && packumentPattern.MatchString(path) {
		found = packumentPattern
	}
	for _, index := range wellKnownIndexes {
		if strings.Contains(path, index.word) && index.pattern.MatchString(path) {
			found = index.pattern
		}
	}
	if found == nil {
		return
	}
	if _, warned := f.c.warnedOf.LoadOrStore(rem.name, true); !warned {
		f.c.log.Warn("an index is stored as immutable, so its new versions are never seen: add the pattern to mutable_patterns and purge the file",
			"remote", rem.name, "path", path, "pattern", found.String())
	}
}

// storeUnderSecondKey stores a complete body under a second target too, from a spool of
// its own, since the store may take the first one's name. A failure is only logged.
func (c *cache) storeUnderSecondKey(ctx context.Context, t target, rec *record, body io.ReaderAt) {
	key := t.key()
	if old, err := c.objects.open(ctx, key, -1); err == nil && old.rec.Path == t.spelling && old.rec.SHA256 == rec.SHA256 {
		c.refreshMark(ctx, t, rec, c.now())
		return
	}
	spool := c.space.newSpool("")
	defer spool.discard()
	err := spool.setSize(rec.Size)
	if err == nil {
		_, err = io.Copy(spool, io.NewSectionReader(body, 0, rec.Size))
	}
	if err != nil {
		c.reportStoreError("spool", "growing", key, err)
		return
	}
	second := *rec
	second.Path, second.Class = t.spelling, t.class
	if c.storeBody(ctx, key, &second, spool.body(), putCondition{}) == nil { // it has logged its failure
		c.refreshMark(ctx, t, rec, c.now())
	}
}

func newIndexRow(key string, rec *record) indexRow {
	return indexRow{Remote: rec.Remote, Path: rec.Path, Key: key, SHA256: rec.SHA256, ContentType: rec.ContentType,
		Class: rec.Class, Size: rec.Size, Fetched: rec.Fetched, LastAccess: rec.Fetched}
}

// refreshMark remembers that the copy of t was found good at that time.
func (c *cache) refreshMark(ctx context.Context, t target, rec *record, at time.Time) {
	if _, forever := t.remote.ttlOf(t.class); forever {
		return
	}
	key := t.key()
	err := c.marks.setMark(ctx, key, freshnessMark{GoodAt: at.UTC(), SHA256: rec.SHA256})
	c.reportStoreError("redis", "refreshing", key, err)
}

// asStored is the request for a file under the key that it is stored by: a file that a
// stored root names has one of its own.
func (file fileRequest) asStored(ctx context.Context, c *cache) fileRequest {
	if file.behavior == nil && file.mayHaveRoot() {
		return c.generations.resolve(ctx, file)
	}
	return file
}

// storedRecord returns the record of a file's copy, however old it is. Its errors are those
// of objects.open.
func storedRecord(ctx context.Context, c *cache, file fileRequest) (*record, error) {
	file = file.asStored(ctx, c)
	cp, err := c.findCopy(ctx, file.key(), file, byteRange{head: true})
	if err != nil {
		return nil, err
	}
	return cp.rec, nil
}

// prefetch brings a file into the store, if it is not there and fresh. It returns its
// record, and whether it came from remote or cache. The body is written to w: that of a
// stored file only if whole says so. A file that was fetched and is not stored is an
// error: whoever fetches ahead wants to have it later.
func prefetch(ctx context.Context, c *cache, file fileRequest, w io.Writer, whole bool) (rec *record, source string, err error) {
	before := file.asStored(ctx, c).key()
	reply, err := c.findOrFetch(ctx, file, byteRange{to: -1, ahead: true})
	if err != nil {
		return nil, "", err
	}
	defer reply.body.Close()
	fromRemote := reply.result == "MISS"
	if fromRemote || whole {
		if _, err := io.Copy(w, reply.body); err != nil {
			return nil, "", errors.Join(context.Cause(ctx), errBadUpstream, err)
		}
	}
	if !fromRemote {
		return reply.rec, "cache", nil
	}
	stored := file.asStored(ctx, c)
	if f, _ := c.fills.join(stored.key(), stored.spelling, nil); f != nil {
		if _, err := f.awaitEnd(ctx); err != nil {
			return nil, "", err
		}
	}
	switch rec, err = storedRecord(ctx, c, file); {
	case err != nil && file.asStored(ctx, c).key() != before: // a root that names it was stored meanwhile
		return prefetch(ctx, c, file, w, whole)
	case err != nil:
		return nil, "", newProblem(http.StatusInsufficientStorage, "it arrived and was not stored: the server's log says why, and /health if nothing can be")
	}
	return rec, "remote", nil
}
