// fill_table.go: the table of the fills that requests may join, and the bounds on
// how many fills a remote has.

package main

import (
	"context"
	"maps"
	"math"
	"regexp"
	"sync"
	"sync/atomic"
)

const (
	// maxPerRemote bounds what one slow upstream can pile up: fills, and beside them as many
	// HEADs of files that are not stored, and bodies that are passed on without a spool.
	maxPerRemote = 64
	// maxQueuedPerRemote bounds the fills that wait for a place.
	maxQueuedPerRemote = 256
	// maxAbandonedPerRemote is how many fills without a client may go on: clients that come
	// and go must not leave an endless queue behind.
	maxAbandonedPerRemote = 8
)

// fillTable finds the fill of a file. Its methods may be called concurrently.
type fillTable struct {
	running sync.WaitGroup // the goroutines of all fills
	// ended counts the fills that have ended, by the hash of their key: a lookup in the
	// store before may be out of date.
	ended [256]atomic.Int64

	// mu guards the fields below and the clients of every fill. Of the other
	// locks a fill's may be taken under it, and a spool's under that.
	mu    sync.Mutex
	byKey map[string]*fill
	slots map[string]*fillSlots // by remote
}

// fillSlots are the places for the fills of one remote, and for what is asked beside
// them. A channel has one element for each that has a place.
type fillSlots struct {
	places  chan struct{}
	queue   chan struct{} // fills that have a place or wait for one
	heads   chan struct{}
	passOns chan struct{}
}

func newFillTable() *fillTable {
	return &fillTable{byKey: map[string]*fill{}, slots: map[string]*fillSlots{}}
}

func (t *fillTable) slotsOf(remote string) *fillSlots {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.slots[remote]
	if s == nil {
		s = &fillSlots{places: make(chan struct{}, maxPerRemote), queue: make(chan struct{}, maxPerRemote+maxQueuedPerRemote),
			heads: make(chan struct{}, maxPerRemote), passOns: make(chan struct{}, maxPerRemote)}
		t.slots[remote] = s
	}
	return s
}

// join returns the fill of a file, which create makes if there is none; where create is
// nil that is nil. Each join of a fill is paired with a leave.
func (t *fillTable) join(key, spelling string, create func() *fill) (f *fill, created bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f = t.byKey[key]
	if f == nil || f.file.spelling != spelling { // hashes of spellings may collide
		if create == nil {
			return nil, false
		}
		f, created = create(), true
		t.byKey[key] = f
	}
	f.clients++
	return f, created
}

// endedOf counts the fills of key that have ended, and those of some other keys.
func (t *fillTable) endedOf(key string) *atomic.Int64 {
	return &t.ended[keyHash(key)%uint64(len(t.ended))]
}

// joinWhole joins the fills of a remote whose bodies are all there.
func (t *fillTable) joinWhole(remote string) (all []*fill) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.byKey {
		if f.file.remote.name == remote && f.hasAll() {
			f.clients++
			all = append(all, f)
		}
	}
	return all
}

// joinLeased joins the fill of key if it holds the lease with that token, which is
// authentic; no lease has the token "".
func (t *fillTable) joinLeased(key, token string) *fill {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.byKey[key]
	if f == nil || token == "" {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.leaseToken != token {
		return nil
	}
	f.clients++
	return f
}

func (t *fillTable) isFilling(key string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byKey[key] != nil
}

// purge takes the fill of key out of the table, so that later requests begin another, and
// decides that its body is not stored: without a client it ends. It returns it, or nil.
func (t *fillTable) purge(key string, fate bodyFate) *fill {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.byKey[key]
	if f != nil {
		delete(t.byKey, key)
		f.setFate(fate)
		if phase, _ := f.state(); f.clients == 0 && phase < phaseComplete {
			f.cancel(errAbandoned)
		}
	}
	return f
}

// stop keeps what is being filled under key from being stored, and waits for what is
// being stored right now.
func (t *fillTable) stop(ctx context.Context, key string) error {
	f := t.purge(key, fatePurgedHere)
	if f == nil {
		return nil
	}
	return f.await(ctx, func() bool { return f.phase != phaseStoring })
}

// drop takes f out, if it is still there. mu is held.
func (t *fillTable) drop(f *fill) {
	if t.byKey[f.key] == f {
		delete(t.byKey, f.key)
	}
}

// matching returns the keys of a remote's fills in whose path pattern is found.
func (t *fillTable) matching(remote string, pattern *regexp.Regexp) (keys []string) {
	t.mu.Lock()
	fills := maps.Clone(t.byKey)
	t.mu.Unlock()
	for key, f := range fills { // without the lock: a pattern may take seconds for all
		if f.file.remote.name == remote && pattern.MatchString(decodePath(f.file.spelling)) {
			keys = append(keys, key)
		}
	}
	return keys
}

// leave is the end of so many clients' interest in f. A fill that has not begun to ask
// ends with its last client, and so does one whose body is not to be stored; the others
// go on, but not too many of them.
func (t *fillTable) leave(f *fill, clients int) {
	t.mu.Lock()
	f.clients -= clients
	var victim *fill
	phase, fate := f.state()
	switch {
	case f.clients > 0:
	case phase == phaseQueued, phase == phaseFilling && fate != fateKeep:
		victim = f
	case t.byKey[f.key] == f:
		victim = t.pickAbandoned(f.file.remote.name)
	}
	if victim != nil {
		t.drop(victim)
	}
	unused := f.clients == 0 && phase == phaseDone
	t.mu.Unlock()
	if victim != nil {
		victim.cancel(errAbandoned)
	}
	if unused {
		f.releaseSpool()
	}
}

// pickAbandoned picks the fill of a remote to drop: of those without clients, if
// they are too many, the one furthest from its end. mu is held.
func (t *fillTable) pickAbandoned(remote string) *fill {
	var victim *fill
	var most int64
	abandoned := 0
	for _, f := range t.byKey {
		left := int64(math.MaxInt64) // more than of any other, where the length is not known
		if written, size := f.progress(); size >= 0 {
			left = size - written
		}
		if f.clients > 0 || f.file.remote.name != remote || left == 0 { // 0: it is being stored
			continue
		}
		abandoned++
		if left > most {
			victim, most = f, left
		}
	}
	if abandoned <= maxAbandonedPerRemote {
		return nil
	}
	return victim
}

// finish takes a fill that ends out of the table, lets everyone know how it ended, and
// reports whether it has no client any more. That is one step, so that either the fill or
// its last client releases the spool.
func (t *fillTable) finish(f *fill, outcome fillOutcome) (unused bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	t.endedOf(f.key).Add(1)
	t.drop(f)
	f.outcome = outcome
	f.advance(phaseDone)
	return f.clients == 0
}

// gauges is how many fills there are, 0 for those of remotes that had none yet, and
// what their spools take.
func (t *fillTable) gauges(remotes []string) []family {
	t.mu.Lock()
	defer t.mu.Unlock()
	inFlight, waiting, storing, spooled := map[string]float64{}, 0, 0, int64(0)
	for _, name := range remotes {
		inFlight[name] = 0
	}
	for remote, s := range t.slots {
		running := len(s.places)
		inFlight[remote] = float64(running)
		waiting += len(s.queue) - running
	}
	for _, f := range t.byKey {
		written, _ := f.progress()
		spooled += written
		if phase, _ := f.state(); phase == phaseStoring {
			storing++
		}
	}
	return []family{
		{"artifactapi_fills_in_flight", "gauge", "Downloads running now.", "remote", inFlight},
		newGauge("artifactapi_fills_waiting", "Downloads that wait for a place among those of their remote.", float64(max(0, waiting))),
		newGauge("artifactapi_fills_storing", "Complete bodies on their way to the store.", float64(storing)),
		newGauge("artifactapi_spool_bytes", "Bytes in the temporary files of downloads.", float64(spooled)),
	}
}

// waitIdle waits until no fill runs any more, and reports false if ctx ends first.
func (t *fillTable) waitIdle(ctx context.Context) bool {
	idle := make(chan struct{})
	go func() {
		t.running.Wait()
		close(idle)
	}()
	select {
	case <-idle:
		return true
	case <-ctx.Done():
		return false
	}
}
