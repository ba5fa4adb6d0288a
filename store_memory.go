// store_memory.go: records and small bodies of the disk store in memory.

package main

import (
	"bytes"
	"container/list"
	"hash/maphash"
	"io"
	"sync"
)

// memBody is a small stored body that is read from memory.
type memBody struct{ bytes.Reader }

func (b *memBody) Close() error { return nil }

// memoryEntry is what memory knows of one key. It answers only while the file at
// name still is the one it was made from, so nobody has to invalidate it.
type memoryEntry struct {
	key, name string // name is the body's path, kept to spare making it
	id        fileIdentity
	rec       *record
	body      []byte // nil: larger than maxSmallBody, or not read yet
}

// newObject makes the entry an answer; one allocation holds all of it.
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

// hotCache keeps the entries used last within a budget of bytes. It is sharded
// so that requests seldom wait for each other; no lock is held across I/O.
type hotCache struct {
	seed   maphash.Seed
	shards [16]hotShard
}

type hotShard struct {
	mu    sync.Mutex // guards all of the shard
	byKey map[string]*list.Element
	order list.List // of *memoryEntry, used last in front
	room  int64
}

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

func (e *memoryEntry) memoryCost() int64 { return memoryEntryCost + int64(len(e.body)) }
