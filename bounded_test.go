package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

func TestBoundedMapForgets(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newBoundedMap[string, int](3, time.Now)
		m.put("kept", 1)
		m.putFor("brief", 2, time.Second)
		m.putFor("never", 3, 0)
		want := func(key string, value int, found bool) {
			t.Helper()
			if v, ok := m.get(key); v != value || ok != found {
				t.Errorf("%s is %d, %v; want %d, %v", key, v, ok, value, found)
			}
		}
		want("kept", 1, true)
		want("brief", 2, true)
		want("never", 0, false)
		time.Sleep(time.Second)
		want("brief", 0, false)
		want("kept", 1, true)
		m.delete("kept")
		want("kept", 0, false)
		if n := len(m.keys()); n != 0 {
			t.Errorf("%d entries are left", n)
		}
	})
}

func TestBoundedMapIsBounded(t *testing.T) {
	t.Parallel()
	m := newBoundedMap[int, int](10, time.Now)
	for i := range 100 {
		m.put(i, i)
		if v, found := m.get(i); !found || v != i {
			t.Fatalf("%d is not there right after it was put", i)
		}
	}
	m.put(99, 0) // replaced: nothing has to go
	if n := len(m.keys()); n != 10 {
		t.Errorf("%d entries; want 10", n)
	}
	made := 0
	for range 2 {
		m.getOrPut(1000, func() int { made++; return 7 })
	}
	if v, _ := m.get(1000); v != 7 || made != 1 || len(m.keys()) != 10 {
		t.Errorf("getOrPut left %d, made %d, %d entries", v, made, len(m.keys()))
	}
}

func evictedKeys[V any](entries []lruEntry[V]) (keys string) {
	for _, e := range entries {
		keys += e.key
	}
	return keys
}

func TestLRULetsTheLeastRecentlyUsedGo(t *testing.T) {
	t.Parallel()
	l := newLRU[int](10, 4)
	for i, key := range []string{"a", "b", "c"} {
		if out := l.put(key, 3, i); len(out) > 0 {
			t.Fatalf("%s pushed out %s", key, evictedKeys(out))
		}
	}
	if v, found := l.get("a"); !found || v != 0 {
		t.Fatalf("a is %d, %v", v, found)
	}
	wantEvicted := func(out []lruEntry[int], keys string) {
		t.Helper()
		if got := evictedKeys(out); got != keys {
			t.Errorf("%q had to go; want %q", got, keys)
		}
	}
	wantEvicted(l.put("d", 3, 0), "b")
	wantEvicted(l.put("a", 4, 9), "") // the old cost goes with the old value
	wantEvicted(l.putOldest("e", 1, 0), "e")
	wantEvicted(l.reserve(2), "c")
	l.reserve(-2)
	wantEvicted(l.evict(3), "d")
	wantEvicted(l.put("f", 11, 0), "af") // what is larger than everything does not stay
	if _, found := l.get("f"); found || l.remove("f") {
		t.Error("f is still there")
	}
}

func TestLRUCountsEntries(t *testing.T) {
	t.Parallel()
	l := newLRU[int](1000, 2)
	for i := range 5 {
		l.put(strconv.Itoa(i), 1, i)
	}
	for key, want := range map[string]bool{"2": false, "3": true, "4": true} {
		if _, found := l.get(key); found != want {
			t.Errorf("%s is there: %t", key, found)
		}
	}
	l.update("3", 30)
	l.update("2", 20)
	if v, _ := l.get("3"); v != 30 || l.byKey["2"] != nil {
		t.Errorf("3 is %d; one that was gone is there: %v", v, l.byKey["2"])
	}
	if added, _ := l.putIf("5", 1, 5, func() bool { return false }); added || l.byKey["5"] != nil {
		t.Error("5 was added although it was not valid any more")
	}
}

func TestKeyedLock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var k keyedLock
		for _, key := range []string{"a", "b"} { // one does not wait for the other
			if err := k.lock(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := k.lock(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a lock that is held ends with %v", err)
		}
		var inside, most int
		for i := range 10 {
			go func() {
				if err := k.lock(t.Context(), "a"); err != nil {
					t.Error(fmt.Errorf("%d: %w", i, err))
					return
				}
				inside++
				most = max(most, inside)
				time.Sleep(time.Millisecond)
				inside--
				k.unlock("a")
			}()
		}
		synctest.Wait()
		if most != 0 {
			t.Error("a is held and locked again")
		}
		k.unlock("a")
		time.Sleep(time.Second)
		synctest.Wait()
		if most != 1 || inside != 0 {
			t.Errorf("%d held it at once, %d still do", most, inside)
		}
		k.unlock("b")
		for key := range k.held.Range {
			t.Errorf("%s is remembered though nobody holds it", key)
		}
	})
}
