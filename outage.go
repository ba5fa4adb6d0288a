// outage.go: what is known about something outside of this process that may be
// down: an upstream, S3, Redis, PostgreSQL, a disk.

package main

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"
)

// circuitState says how a circuit treats those that want to use the thing
// behind it:
//
//	closed     everyone may
//	open       nobody may, until the pause is over
//	half-open  one probe may, and finds out whether the outage is over
//
//	closed -fail-> open -admit, after the pause-> half-open -succeed-> closed
//
// From half-open, fail leads to open and a new pause; the end of the probe's
// context without a result leads to open without one.
type circuitState string

const (
	circuitClosed   circuitState = "closed"
	circuitOpen     circuitState = "open"
	circuitHalfOpen circuitState = "half-open"
)

// circuit makes an outage cost one short wait now and then instead of one for
// each request. Its methods may be called concurrently.
type circuit struct {
	now                func() time.Time
	minPause, maxPause time.Duration // the pause doubles with each failed probe

	mu          sync.Mutex // guards the fields below; no other lock is taken under it
	state       circuitState
	cause       error // of the outage; nil while closed
	openedAt    time.Time
	retryAt     time.Time // when a probe is admitted
	pause       time.Duration
	succeededAt time.Time
	probes      int // so far: the end of an old probe must not end a new one
}

func newCircuit(now func() time.Time, minPause, maxPause time.Duration) *circuit {
	return &circuit{now: now, minPause: minPause, maxPause: maxPause, state: circuitClosed}
}

// admit reports whether to go on: nil, or the cause of the outage. After the
// pause one caller is admitted as the probe: it must call succeed or fail, or
// its ctx must end.
func (c *circuit) admit(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == circuitClosed {
		return nil
	}
	if c.state == circuitHalfOpen || c.now().Before(c.retryAt) {
		return c.cause
	}
	c.state = circuitHalfOpen
	c.probes++
	probe := c.probes
	context.AfterFunc(ctx, func() { // one that found out nothing gives its place to the next
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.state == circuitHalfOpen && c.probes == probe {
			c.state = circuitOpen
		}
	})
	return nil
}

// outageCause is the error that keeps the circuit open, or nil while it is closed.
// Unlike admit it never makes its caller the probe.
func (c *circuit) outageCause() error {
	_, cause := c.outage()
	return cause
}

// outage is when the outage began and its cause, which is nil while there is none.
func (c *circuit) outage() (began time.Time, cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.openedAt, c.cause
}

// hasSucceededSince reports whether anything succeeded after t.
func (c *circuit) hasSucceededSince(t time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.succeededAt.After(t)
}

// succeed closes the circuit. If that ends an outage, recovered is true and
// lasted is its length.
func (c *circuit) succeed() (lasted time.Duration, recovered bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	c.succeededAt = now
	if c.state == circuitClosed {
		return 0, false
	}
	c.state, c.cause, c.pause = circuitClosed, nil, 0
	return now.Sub(c.openedAt), true
}

// fail opens the circuit because of cause, which must not be nil. It reports
// whether that begins an outage. A success after the time since means that the
// thing is up: the failure then says nothing about it and changes nothing.
func (c *circuit) fail(cause error, since time.Time) (began bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if c.succeededAt.After(since) {
		return false
	}
	// Requests that were already under way fail together: they count once.
	if c.state != circuitOpen || !now.Before(c.retryAt) {
		c.pause = min(max(2*c.pause, c.minPause), c.maxPause)
	}
	began = c.state == circuitClosed
	if began {
		c.openedAt = now
	}
	c.state, c.cause, c.retryAt = circuitOpen, cause, now.Add(c.pause)
	return began
}

// backgroundCheck runs at most one check at a time. A check may hang, as on a
// dead disk; whoever asks for its result waits only as long as its own context
// allows, and leaves no goroutine behind for each question.
type backgroundCheck struct {
	running sync.WaitGroup

	mu   sync.Mutex    // guards the fields below
	done chan struct{} // closed when the check that runs has ended; nil: none runs
	err  error         // of the last check
}

// result starts check unless one runs already, and returns the error of the one
// that runs, or ctx's if that ends first.
func (b *backgroundCheck) result(ctx context.Context, check func() error) error {
	b.mu.Lock()
	if b.done == nil {
		b.done = make(chan struct{})
		b.running.Go(func() {
			err := check()
			b.mu.Lock()
			defer b.mu.Unlock()
			b.err = err
			close(b.done)
			b.done = nil
		})
	}
	done := b.done
	b.mu.Unlock()
	select {
	case <-done:
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// last returns the error of the last check.
func (b *backgroundCheck) last() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// wait waits for the check that runs.
func (b *backgroundCheck) wait() { b.running.Wait() }

// staleErrors are the errors of a connection that the other side has ended, as a server
// does that is restarted.
var staleErrors = []error{io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, syscall.ECONNRESET, syscall.EPIPE}

func isStaleConn(err error) bool {
	return slices.ContainsFunc(staleErrors, func(stale error) bool { return errors.Is(err, stale) })
}
