package main

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestCircuit takes a circuit from each state through each event.
func TestCircuit(t *testing.T) {
	t.Parallel()
	first, second := errors.New("first"), errors.New("second")
	closed := func(*testing.T, *circuit) {}
	open := func(t *testing.T, c *circuit) {
		if !c.fail(first, time.Now()) {
			t.Error("the first failure does not begin an outage")
		}
	}
	halfOpen := func(t *testing.T, c *circuit) {
		open(t, c)
		time.Sleep(time.Second)
		if err := c.admit(t.Context()); err != nil {
			t.Errorf("nobody is admitted after the pause: %v", err)
		}
	}
	for _, c := range []struct {
		name  string
		begin func(*testing.T, *circuit)
		event func(*testing.T, *circuit)
		want  string
		cause error
	}{
		{"closed, admit", closed, func(t *testing.T, c *circuit) { wantAdmit(t, c, nil) }, "closed", nil},
		{"closed, succeed", closed, func(t *testing.T, c *circuit) { wantRecovery(t, c, false, 0) }, "closed", nil},
		{"closed, fail", closed, open, "open", first},
		{"closed, fail of a request that waited while another one succeeded", closed, func(t *testing.T, c *circuit) {
			began := time.Now()
			time.Sleep(time.Second)
			c.succeed()
			if c.fail(first, began) {
				t.Error("it begins an outage")
			}
		}, "closed", nil},
		{"open, admit", open, func(t *testing.T, c *circuit) { wantAdmit(t, c, first) }, "open", first},
		{"open, admit after the pause", open, func(t *testing.T, c *circuit) {
			time.Sleep(time.Second)
			wantAdmit(t, c, nil)
		}, "half-open", first},
		{"open, succeed", open, func(t *testing.T, c *circuit) {
			time.Sleep(time.Minute)
			wantRecovery(t, c, true, time.Minute)
		}, "closed", nil},
		{"open, fail", open, func(t *testing.T, c *circuit) {
			if c.fail(second, time.Now()) {
				t.Error("it begins a second outage")
			}
			time.Sleep(time.Second) // the pause has not doubled
			wantAdmit(t, c, nil)
		}, "half-open", second},
		{"half-open, admit", halfOpen, func(t *testing.T, c *circuit) { wantAdmit(t, c, first) }, "half-open", first},
		{"half-open, succeed", halfOpen, func(t *testing.T, c *circuit) { wantRecovery(t, c, true, time.Second) }, "closed", nil},
		{"half-open, fail", halfOpen, func(t *testing.T, c *circuit) {
			c.fail(second, time.Now())
			time.Sleep(2*time.Second - 1) // the pause has doubled
			wantAdmit(t, c, second)
		}, "open", second},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				x := newCircuit(time.Now, time.Second, 3*time.Second)
				c.begin(t, x)
				c.event(t, x)
				state := "closed"
				if x.probe != nil {
					state = "half-open"
				} else if x.cause != nil {
					state = "open"
				}
				if state != c.want || !errors.Is(x.outageCause(), c.cause) {
					t.Errorf("it is %s because of %v; want %s because of %v", state, x.outageCause(), c.want, c.cause)
				}
			})
		})
	}
}

func wantAdmit(t *testing.T, c *circuit, want error) {
	t.Helper()
	if err := c.admit(t.Context()); !errors.Is(err, want) {
		t.Errorf("admit says %v; want %v", err, want)
	}
}

func wantRecovery(t *testing.T, c *circuit, want bool, after time.Duration) {
	t.Helper()
	if began, cause := c.outage(); cause != nil && time.Since(began) != after {
		t.Errorf("the outage is %v old; want %v", time.Since(began), after)
	}
	if lasted, recovered := c.succeed(); recovered != want || lasted != after {
		t.Errorf("succeed says %v, %v; want %v, %v", lasted, recovered, after, want)
	}
}

// newProbe opens a circuit, waits for the end of its pause and is admitted as the probe,
// until leave. It belongs into a bubble.
func newProbe(t *testing.T) (c *circuit, leave func(), down error) {
	t.Helper()
	down = errors.New("down")
	c = newCircuit(time.Now, time.Second, time.Second)
	c.fail(down, time.Now())
	time.Sleep(time.Second)
	ctx, leave := context.WithCancel(t.Context())
	if err := c.admit(ctx); err != nil {
		t.Fatal(err)
	}
	return c, leave, down
}

func TestProbeEndsWithItsContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, leave, down := newProbe(t)
		wantAdmit(t, c, down) // one at a time
		leave()
		synctest.Wait()
		wantAdmit(t, c, nil) // at once: nothing was found out
		wantAdmit(t, c, down)
	})
}

// TestOldProbeDoesNotEndANewOne: the context of a probe that had its result ends
// while the next probe is under way.
func TestOldProbeDoesNotEndANewOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, leave, down := newProbe(t)
		c.fail(down, time.Now())
		time.Sleep(time.Second)
		wantAdmit(t, c, nil)
		leave()
		synctest.Wait()
		wantAdmit(t, c, down)
	})
}

func TestBackgroundCheckRunsOnceAtATime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var b backgroundCheck
		hang := make(chan struct{})
		var runs atomic.Int64
		failed := errors.New("failed")
		check := func() error {
			runs.Add(1)
			<-hang
			return failed
		}
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := b.result(ctx, check); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a check that hangs says %v", err)
			}
			cancel()
		}
		if n := runs.Load(); n != 1 {
			t.Errorf("%d checks run; want 1", n)
		}
		close(hang)
		b.running.Wait()
		if err := b.result(t.Context(), func() error { return nil }); err != nil {
			t.Errorf("the next check says %v", err)
		}
	})
}
