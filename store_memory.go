// store_memory.go: keeps the disk store's records and small bodies in memory.

package main

import (
	"bytes"
	"container/list"
	"hash/maphash"
	"io"
	"sync"
)

// memBody is a small stored body that is read from memory. Closing it does nothing.
type memBody struct{ bytes.Reader }

func (b *memBody) Close() error { return nil }

// memoryEntry is the record, and perhaps the body, of one key in memory. It is used
// only while the file name still has the identity id, so another process that
// changes the file need not invalidate it. It is not changed after it was added.
type memoryEntry struct {
	key, name string       // name is the body's file name, kept so that a hit need not make it
	id        fileIdentity // of the body that the entry was made from
	rec       *record
	body      []byte // nil: larger than maxSmallBody, or not read yet
}

// newObject returns the entry as an object that reads from off, or without a body if
// off is negative (see objects.open). One allocation holds all of it: this runs for
// each hit.
func (e *memoryEntry) newObject(off int64) *object {
	if off < 0 {
		return &object{rec: e.rec}
	}
	o := new(struct {
		object
		mem memBody
	})
	o.mem.Reset(e.body)
	if off > 0 {
		o.mem.Seek(off, io.SeekStart)
	}
	o.object = object{rec: e.rec, body: &o.mem}
	return &o.object
}

// hotCache keeps the most recently used entries within a budget of bytes. It is
// divided into shards, so that requests seldom wait for each other's lock.
type hotCache struct {
	seed   maphash.Seed
	shards [16]hotShard // more than processors that serve at once, as a rule
}

// hotShard holds the entries of a part of the keys.
type hotShard struct {
	mu    sync.Mutex               // guards the fields below; never held across I/O, no other lock is taken under it
	byKey map[string]*list.Element // elements of order
	order list.List                // of *memoryEntry, most recently used first
	room  int64                    // bytes of the budget that are left
}

// newHotCache makes an empty cache with a budget of that many bytes.
func newHotCache(bytes int64) *hotCache {
	c := &hotCache{seed: maphash.MakeSeed()}
	for i := range c.shards {
		c.shards[i].byKey = map[string]*list.Element{}
		c.shards[i].room = bytes / int64(len(c.shards))
	}
	return c
}

func (c *hotCache) shard(key string) *hotShard {
	return &c.shards[maphash.String(c.seed, key)%uint64(len(c.shards))]
}

// get returns key's entry, or nil, and makes it the most recently used one.
func (c *hotCache) get(key string) *memoryEntry {
	s := c.shard(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	el := s.byKey[key]
	if el == nil {
		return nil
	}
	s.order.MoveToFront(el)
	return el.Value.(*memoryEntry)
}

// add adds an entry in place of an older one of its key. The least recently used
// entries of the shard go until it is within its budget.
func (c *hotCache) add(e *memoryEntry) {
	s := c.shard(e.key)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(s.byKey[e.key])
	s.byKey[e.key] = s.order.PushFront(e)
	s.room -= e.memoryCost()
	for s.room < 0 {
		s.remove(s.order.Back())
	}
}

// drop removes key's entry if there is one.
func (c *hotCache) drop(key string) {
	s := c.shard(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(s.byKey[key])
}

func (s *hotShard) remove(el *list.Element) {
	if el == nil {
		return
	}
	e := s.order.Remove(el).(*memoryEntry)
	delete(s.byKey, e.key)
	s.room += e.memoryCost()
}

// memoryCost returns what the entry costs of the budget, in bytes.
func (e *memoryEntry) memoryCost() int64 { return memoryEntryCost + int64(len(e.body)) }
