package main

import (
	"errors"
	"fmt"
	"testing"
)

// bareFill is a fill without a goroutine, in that phase.
func bareFill(c *cache, spelling string, phase fillPhase) *fill {
	f := &fill{c: c, key: "r/0000000000000000/a", phase: phase, cancel: func(error) {}}
	f.file.spelling, f.file.remote = spelling, &remote{name: "r"}
	return f
}

var allPhases = []fillPhase{phaseQueued, phaseAsking, phaseFilling, phaseComplete, phaseStoring, phaseDone}

// TestFillPhases takes a fill from each phase through each event.
func TestFillPhases(t *testing.T) {
	t.Parallel()
	type result struct {
		phase   fillPhase
		fate    bodyFate
		refused bool // the move is a mistake of the program
	}
	move := func(to fillPhase) func(*fill) { return func(f *fill) { f.advance(to) } }
	next := map[fillPhase]fillPhase{phaseQueued: phaseAsking, phaseAsking: phaseFilling, phaseFilling: phaseComplete, phaseComplete: phaseStoring}
	for _, from := range allPhases {
		events := map[string]struct {
			event func(*fill)
			want  result
		}{
			"may be stored":               {func(f *fill) { f.setFate(fateKeep) }, result{phase: from}},
			"may not be stored":           {func(f *fill) { f.setFate(fatePassOn) }, result{phase: from, fate: fatePassOn}},
			"purged here":                 {func(f *fill) { f.setFate(fatePurgedHere) }, result{phase: from, fate: fatePurgedHere}},
			"purged elsewhere":            {func(f *fill) { f.setFate(fatePurgedElsewhere) }, result{phase: from, fate: fatePurgedElsewhere}},
			"purged elsewhere, then here": {func(f *fill) { f.setFate(fatePurgedElsewhere); f.setFate(fatePurgedHere) }, result{phase: from, fate: fatePurgedElsewhere}},
			"purged, then may be stored":  {func(f *fill) { f.setFate(fatePurgedHere); f.setFate(fateKeep) }, result{phase: from, fate: fatePurgedHere}},
		}
		for _, to := range allPhases {
			want := result{phase: to}
			if next[from] != to && (to != phaseDone || from == phaseDone) || to == phaseQueued {
				want = result{phase: from, refused: true}
			}
			events[fmt.Sprintf("to %v", to)] = struct {
				event func(*fill)
				want  result
			}{move(to), want}
		}
		for name, c := range events {
			f := bareFill(nil, "a", from)
			changed := f.changed.next()
			got := result{refused: panics(func() { c.event(f) })}
			got.phase, got.fate = f.phase, f.fate
			if got != c.want {
				t.Errorf("%v, %s: %+v; want %+v", from, name, got, c.want)
			}
			woken := false
			select {
			case <-changed:
				woken = true
			default:
			}
			if woken != (f.phase != from) {
				t.Errorf("%v, %s: those that wait were woken: %v", from, name, woken)
			}
		}
	}
}

func panics(f func()) (panicked bool) {
	defer func() { panicked = recover() != nil }()
	f()
	return false
}

// TestLastClientLeaves says for each phase and fate whether the fill goes on.
func TestLastClientLeaves(t *testing.T) {
	t.Parallel()
	for _, phase := range allPhases {
		for _, fate := range []bodyFate{fateKeep, fatePassOn, fatePurgedHere, fatePurgedElsewhere} {
			table := newFillTable()
			var cause error
			f, created := table.join("r/0000000000000000/a", "a", func() *fill {
				f := bareFill(nil, "a", phase)
				f.fate, f.cancel = fate, func(err error) { cause = err }
				return f
			})
			if _, again := table.join(f.key, "a", func() *fill { t.Error("there is one"); return nil }); !created || again {
				t.Error("the second client did not join the fill of the first")
			}
			table.leave(f, 1)
			if cause != nil {
				t.Errorf("%v, %v: ended while a client was there", phase, fate)
			}
			table.leave(f, 1)
			ends := phase == phaseQueued || phase == phaseFilling && fate != fateKeep
			if got := errors.Is(cause, errAbandoned); got != ends || table.isFilling(f.key) == ends {
				t.Errorf("%v, %v: ended %v, still in the table %v", phase, fate, got, table.isFilling(f.key))
			}
		}
	}
}

// Two spellings whose hashes collide have one key and are two files.
func TestFillsAreFoundByTheirSpelling(t *testing.T) {
	t.Parallel()
	table := newFillTable()
	key := "r/0000000000000000/a"
	a, _ := table.join(key, "a", func() *fill { return bareFill(nil, "a", phaseAsking) })
	b, created := table.join(key, "b/a", func() *fill { return bareFill(nil, "b/a", phaseAsking) })
	if a == b || !created {
		t.Fatal("a request for one file joined the fill of another")
	}
	table.finish(a, fillOutcome{})
	if table.purge(key, fatePurgedHere) != b || table.isFilling(key) {
		t.Error("the end of one took the other out of the table")
	}
}
