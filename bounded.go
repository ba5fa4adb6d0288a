// bounded.go: what is remembered within bounds: a map whose entries expire, an
// LRU, and locks by key.

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

// putFor keeps value for that long at most; not at all if that is no time.
func (m *boundedMap[K, V]) putFor(key K, value V, life time.Duration) {
	if life <= 0 {
		return
	}
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

// lru keeps the entries used last within a budget. Its methods may be called
// concurrently. What has to go is returned to the caller, which removes what the
// entry stood for outside of the lock.
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

func (l *lru[V]) contains(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.byKey[key] != nil
}

// put adds or replaces an entry and returns those that had to go for it.
func (l *lru[V]) put(key string, cost int64, value V) (evicted []lruEntry[V]) {
	_, evicted = l.putIf(key, cost, value, func() bool { return true })
	return evicted
}

// putIf is put if valid still says so. valid runs under the lock that remove
// takes, so that an entry is not added behind the back of a remove.
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

// putOldest adds an entry whose last use is not known, behind all others. An
// entry that is there already stays as it is.
func (l *lru[V]) putOldest(key string, cost int64, value V) (evicted []lruEntry[V]) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byKey[key] == nil {
		l.byKey[key] = l.order.PushBack(&lruEntry[V]{key, cost, value})
		l.cost += cost
	}
	return l.trim(0)
}

// update changes the value of key, if there is one.
func (l *lru[V]) update(key string, change func(*V)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if el := l.byKey[key]; el != nil {
		change(&el.Value.(*lruEntry[V]).value)
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

// reserve takes n of the budget for something that is to be added later, and
// returns what had to go for it. release gives it back.
func (l *lru[V]) reserve(n int64) (evicted []lruEntry[V]) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cost += n
	return l.trim(0)
}

func (l *lru[V]) release(n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cost -= n
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

// sharedCalls lets those that ask the same at the same time share one answer. The zero
// sharedCalls is ready to use.
type sharedCalls[K comparable, V any] struct {
	mu      sync.Mutex // guards running; no other lock is taken under it
	running map[K]*sharedCall[V]
}

type sharedCall[V any] struct {
	done  chan struct{} // closed when the rest is set
	value V
	err   error
	ended bool // ask has returned, and its caller still wanted that
}

// call returns what ask does, or what that of another caller does, which has the same
// key and runs already. A caller whose ctx ends leaves the others alone: one of them
// asks again.
func (s *sharedCalls[K, V]) call(ctx context.Context, key K, ask func() (V, error)) (V, error) {
	for {
		s.mu.Lock()
		c := s.running[key]
		if c == nil {
			break
		}
		s.mu.Unlock()
		select {
		case <-c.done:
			if c.ended {
				return c.value, c.err
			}
		case <-ctx.Done():
			var none V
			return none, context.Cause(ctx)
		}
	}
	c := &sharedCall[V]{done: make(chan struct{})}
	if s.running == nil {
		s.running = map[K]*sharedCall[V]{}
	}
	s.running[key] = c
	s.mu.Unlock()
	defer func() { // also if ask panics
		s.mu.Lock()
		delete(s.running, key)
		s.mu.Unlock()
		close(c.done)
	}()
	c.value, c.err = ask()
	c.ended = ctx.Err() == nil
	return c.value, c.err
}

// keyedLock lets one holder at a time go on for each key. The zero keyedLock is
// ready to use.
type keyedLock struct {
	mu   sync.Mutex // guards held; no other lock is taken under it
	held map[string]chan struct{}
}

// lock waits for key. Its error is ctx's, and then key is not locked. The holder
// calls unlock.
func (k *keyedLock) lock(ctx context.Context, key string) error {
	for {
		k.mu.Lock()
		busy, held := k.held[key]
		if !held {
			if k.held == nil {
				k.held = map[string]chan struct{}{}
			}
			k.held[key] = make(chan struct{})
			k.mu.Unlock()
			return nil
		}
		k.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (k *keyedLock) unlock(key string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	close(k.held[key])
	delete(k.held, key)
}
