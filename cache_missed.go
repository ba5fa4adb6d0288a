// cache_missed.go: which files were asked for that a sealed remote does not have, or
// that a remote with would_miss would not have if it were sealed.

package main

import (
	"cmp"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// maxMissedFiles bounds the list, since clients can ask for any name.
const maxMissedFiles = 100_000

// missedFile is a file that was asked for and not stored. Its JSON is part of the API.
type missedFile struct {
	missedKey
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
	Count int64     `json:"count"`
}

// missedKey tells missed files apart. The query is not kept: it may be a secret.
type missedKey struct {
	Remote string `json:"remote"`
	Path   string `json:"path"` // decoded
	// Escaped is the path as it is asked for, where a slash within a name hides that (%2F).
	Escaped string `json:"escaped,omitempty"`
	Query   bool   `json:"query,omitempty"` // it was asked for with one
}

// missedFiles are files that were missed. Its methods may be called concurrently.
type missedFiles struct {
	changed atomic.Bool // there is something that was not saved

	mu    sync.Mutex                // guards files; no other lock is taken under it
	files map[missedKey]*missedFile // whose values are replaced, never changed
}

// recordMiss records a file whose lookup ended with storeErr, if that is a miss and its
// remote wants to know. It returns storeErr, or what a client gets of a sealed remote.
func (m *missedFiles) recordMiss(file fileRequest, storeErr error, now time.Time) error {
	r := file.remote
	if (!r.sealed && !r.wouldMiss) || !errors.Is(storeErr, fs.ErrNotExist) {
		return storeErr
	}
	now = now.UTC()
	key := missedKey{Remote: r.name, Path: file.path, Query: strings.Contains(file.spelling, "?")}
	if escaped := trimSuffixes(file.spelling); strings.Contains(escaped, "%2F") {
		key.Escaped = escaped
	}
	m.addMisses(missedFile{key, now, now, 1})
	if r.sealed {
		return r.newSealedError()
	}
	return storeErr
}

// addMisses adds misses of a file.
func (m *missedFiles) addMisses(f missedFile) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.changed.Store(true)
	if old := m.files[f.missedKey]; old != nil {
		m.files[old.missedKey] = &missedFile{old.missedKey, old.First, f.Last, old.Count + f.Count}
		return
	}
	f.Path, f.Escaped = strings.Clone(f.Path), strings.Clone(f.Escaped) // they may be parts of a request's whole URL
	m.files[f.missedKey] = &f
	if len(m.files) <= maxMissedFiles {
		return
	}
	rarest := slices.SortedFunc(maps.Values(m.files), func(a, b *missedFile) int { // and missed longest ago
		return cmp.Or(cmp.Compare(a.Count, b.Count), a.Last.Compare(b.Last))
	})
	for _, f := range rarest[:maxMissedFiles/10] { // many at once, since it takes long
		delete(m.files, f.missedKey)
	}
}

// forget removes the files of a remote ("": of all).
func (m *missedFiles) forget(remote string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.changed.Store(true)
	maps.DeleteFunc(m.files, func(key missedKey, _ *missedFile) bool { return remote == "" || key.Remote == remote })
}

func (m *missedFiles) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.files)
}

// list returns the files of a remote ("": of all) by remote and path.
func (m *missedFiles) list(remote string) (files []*missedFile) {
	m.mu.Lock()
	for key, f := range m.files {
		if remote == "" || key.Remote == remote {
			files = append(files, f)
		}
	}
	m.mu.Unlock()
	slices.SortFunc(files, func(a, b *missedFile) int {
		return cmp.Or(cmp.Compare(a.Remote, b.Remote), cmp.Compare(a.Path, b.Path))
	})
	return files
}
