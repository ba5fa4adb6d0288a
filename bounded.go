// bounded.go: what is remembered within bounds: a map whose entries expire, an LRU, locks
// and calls by key.

package main

import (
	"container/list"
	"context"
	"maps"
	"slices"
	"sync"
	"time"
)

// boundedMap is a map of at most limit entries. When it is full, any entry makes
// room for a new one: what is kept in it may be lost at the price of a request.
// Its methods may be called concurrently.
type boundedMap[K comparable, V any] struct {
	limit int
	now   func() time.Time

	mu      sync.Mutex // guards entries; no other lock is taken under it
	entries map[K]boundedEntry[V]
}

type boundedEntry[V any] struct {
	value   V
	expires time.Time // zero: never
}

func newBoundedMap[K comparable, V any](limit int, now func() time.Time) *boundedMap[K, V] {
	return &boundedMap[K, V]{limit: limit, now: now, entries: map[K]boundedEntry[V]{}}
}

// get returns the value of key, unless it has expired.
func (m *boundedMap[K, V]) get(key K) (value V, found bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, found := m.entries[key]
	if found && !e.expires.IsZero() && !m.now().Before(e.expires) {
		delete(m.entries, key)
		return value, false
	}
	return e.value, found
}

// put keeps value until it is replaced, deleted or pushed out.
func (m *boundedMap[K, V]) put(key K, value V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.set(key, boundedEntry[V]{value: value})
}

// putFor keeps value for that long at most.
func (m *boundedMap[K, V]) putFor(key K, value V, life time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.set(key, boundedEntry[V]{value, m.now().Add(life)})
}

// getOrPut returns the value of key, which create makes if there is none.
func (m *boundedMap[K, V]) getOrPut(key K, create func() V) V {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, found := m.entries[key]
	if !found {
		e.value = create()
		m.set(key, e)
	}
	return e.value
}

// set stores an entry within the limit. mu is held.
func (m *boundedMap[K, V]) set(key K, e boundedEntry[V]) {
	if _, found := m.entries[key]; !found && len(m.entries) >= m.limit {
		for other := range m.entries {
			delete(m.entries, other)
			break
		}
	}
	m.entries[key] = e
}

func (m *boundedMap[K, V]) delete(key K) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.entries, key)
}

// keys returns the keys of all entries, expired ones included, in no order.
func (m *boundedMap[K, V]) keys() []K {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Keys(m.entries))
}

// lru keeps the entries used last within a budget. What has to go is returned to the
// caller, which removes what the entry stood for outside of the lock. Its methods may be
// called concurrently.
type lru[V any] struct {
	budget     int64 // for the costs of all entries, in the caller's unit
	maxEntries int   // 0: any number

	mu    sync.Mutex // guards the fields below; no other lock is taken under it but by valid
	byKey map[string]*list.Element
	order list.List // of *lruEntry[V], used last in front
	cost  int64     // of the entries and of what is reserved
}

type lruEntry[V any] struct {
	key   string
	cost  int64
	value V
}

func newLRU[V any](budget int64, maxEntries int) *lru[V] {
	return &lru[V]{budget: budget, maxEntries: maxEntries, byKey: map[string]*list.Element{}}
}

// get returns the value of key and counts as a use of it.
func (l *lru[V]) get(key string) (value V, found bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	el := l.byKey[key]
	if el == nil {
		return value, false
	}
	l.order.MoveToFront(el)
	return el.Value.(*lruEntry[V]).value, true
}

// size is how many entries there are, and what they and what is reserved cost.
func (l *lru[V]) size() (entries int, cost int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.order.Len(), l.cost
}

// put adds or replaces an entry and returns those that had to go for it.
func (l *lru[V]) put(key string, cost int64, value V) (evicted []lruEntry[V]) {
	_, evicted = l.putIf(key, cost, value, func() bool { return true })
	return evicted
}

// putIf is put if valid still says so under the lock that remove takes: no entry is added
// behind the back of a remove.
func (l *lru[V]) putIf(key string, cost int64, value V, valid func() bool) (added bool, evicted []lruEntry[V]) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !valid() {
		return false, nil
	}
	l.drop(l.byKey[key])
	l.byKey[key] = l.order.PushFront(&lruEntry[V]{key, cost, value})
	l.cost += cost
	return true, l.trim(0)
}

// putOldest adds an entry whose last use is not known, unless it is there already.
func (l *lru[V]) putOldest(key string, cost int64, value V) (evicted []lruEntry[V]) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byKey[key] == nil {
		l.byKey[key] = l.order.PushBack(&lruEntry[V]{key, cost, value})
		l.cost += cost
	}
	return l.trim(0)
}

// update replaces the value of key, if there is one. It is no use of it.
func (l *lru[V]) update(key string, value V) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if el := l.byKey[key]; el != nil {
		el.Value.(*lruEntry[V]).value = value
	}
}

// remove reports whether there was an entry of key.
func (l *lru[V]) remove(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	el := l.byKey[key]
	l.drop(el)
	return el != nil
}

// reserve takes n of the budget for something that is to be added later, and returns what
// had to go for it. A negative n gives it back.
func (l *lru[V]) reserve(n int64) (evicted []lruEntry[V]) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cost += n
	return l.trim(0)
}

// evict lets the entries go that were used longest ago, worth n at least.
func (l *lru[V]) evict(n int64) (evicted []lruEntry[V]) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.trim(max(0, l.budget-l.cost) + n)
}

// trim lets the last entries go until spare of the budget is free. mu is held.
func (l *lru[V]) trim(spare int64) (evicted []lruEntry[V]) {
	tooMany := func() bool { return l.maxEntries > 0 && l.order.Len() > l.maxEntries }
	for l.order.Len() > 0 && (l.cost+spare > l.budget || tooMany()) {
		el := l.order.Back()
		evicted = append(evicted, *el.Value.(*lruEntry[V]))
		l.drop(el)
	}
	return evicted
}

// drop takes an entry out; nil is none. mu is held.
func (l *lru[V]) drop(el *list.Element) {
	if el != nil {
		e := l.order.Remove(el).(*lruEntry[V])
		delete(l.byKey, e.key)
		l.cost -= e.cost
	}
}

// sharedCalls lets those that ask the same at the same time share one answer. Its zero
// value is ready to use.
type sharedCalls[K comparable, V any] struct{ running sync.Map } // of *sharedCall[V], by K

type sharedCall[V any] struct {
	done  chan struct{} // closed when the rest is set
	value V
	err   error
	ended bool // ask has returned, and its caller still wanted that
}

// call returns what ask does, or that of another caller with the same key that runs
// already. A caller whose ctx ends leaves the others alone: one of them asks again.
func (s *sharedCalls[K, V]) call(ctx context.Context, key K, ask func() (V, error)) (V, error) {
	own := &sharedCall[V]{done: make(chan struct{})}
	for {
		v, runs := s.running.LoadOrStore(key, own)
		if !runs {
			break
		}
		other := v.(*sharedCall[V])
		select {
		case <-other.done:
			if other.ended {
				return other.value, other.err
			}
		case <-ctx.Done():
			return own.value, context.Cause(ctx)
		}
	}
	defer func() { // also if ask panics
		s.running.Delete(key)
		close(own.done)
	}()
	own.value, own.err = ask()
	own.ended = ctx.Err() == nil
	return own.value, own.err
}

// keyedLock lets one holder at a time go on for each key. Its zero value is ready to use.
type keyedLock struct{ held sync.Map } // of a chan struct{} that unlock closes, by key

// lock waits for key. Its error is ctx's. The holder calls unlock.
func (k *keyedLock) lock(ctx context.Context, key string) error {
	own := make(chan struct{})
	for {
		other, held := k.held.LoadOrStore(key, own)
		if !held {
			return nil
		}
		select {
		case <-other.(chan struct{}):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tryLock is lock where nobody has key; else it is false.
func (k *keyedLock) tryLock(key string) bool {
	_, held := k.held.LoadOrStore(key, make(chan struct{}))
	return !held
}

func (k *keyedLock) unlock(key string) {
	own, _ := k.held.LoadAndDelete(key)
	close(own.(chan struct{}))
}
