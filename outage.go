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

// circuit makes an outage cost one short wait now and then instead of one for
// each request. Its methods may be called concurrently.
//
//	closed     everyone may use the thing behind it
//	open       nobody may, until the pause is over
//	half-open  one probe may, and finds out whether the outage is over
//
//	closed -fail-> open -admit, after the pause-> half-open -succeed-> closed
//
// From half-open, fail leads to open and a new pause; the end of the probe's
// context without a result leads to open without one.
type circuit struct {
	now                func() time.Time
	minPause, maxPause time.Duration // the pause doubles with each failed probe

	mu          sync.Mutex      // guards the fields below; no other lock is taken under it
	cause       error           // of the outage; nil while closed
	probe       context.Context // half-open until it ends; nil: no probe was admitted
	openedAt    time.Time
	retryAt     time.Time // when a probe is admitted
	pause       time.Duration
	succeededAt time.Time
}

func newCircuit(now func() time.Time, minPause, maxPause time.Duration) *circuit {
	return &circuit{now: now, minPause: minPause, maxPause: maxPause}
}

// admit returns nil, or the cause of the outage. After the pause one caller is admitted
// as the probe: it must call succeed or fail, or its ctx must end.
func (c *circuit) admit(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause == nil {
		return nil
	}
	if c.now().Before(c.retryAt) || (c.probe != nil && c.probe.Err() == nil) {
		return c.cause
	}
	c.probe = ctx
	return nil
}

// outageCause is the error that keeps the circuit open, or nil. Unlike admit it never
// makes its caller the probe.
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

// succeed closes the circuit. If that ends an outage, lasted is its length.
func (c *circuit) succeed() (lasted time.Duration, recovered bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.succeededAt = c.now()
	if c.cause == nil {
		return 0, false
	}
	c.cause, c.probe, c.pause = nil, nil, 0
	return c.succeededAt.Sub(c.openedAt), true
}

// fail opens the circuit because of cause, which must not be nil, unless anything has
// succeeded after the time since. It reports whether that begins an outage.
func (c *circuit) fail(cause error, since time.Time) (began bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if c.succeededAt.After(since) {
		return false
	}
	began = c.cause == nil
	if began {
		c.openedAt = now
	}
	// Requests that were already under way fail together: they count once.
	if began || !now.Before(c.retryAt) {
		c.pause = min(max(2*c.pause, c.minPause), c.maxPause)
	}
	c.cause, c.probe, c.retryAt = cause, nil, now.Add(c.pause)
	return began
}

// backgroundCheck runs at most one check at a time. A check may hang, as on a dead
// disk; whoever asks for its result waits as long as its own context allows.
type backgroundCheck struct {
	running sync.WaitGroup

	mu   sync.Mutex    // guards the fields below
	done chan struct{} // closed when the check that runs has ended; nil: none runs
	err  error         // of the last check
}

// result starts check unless one runs already, and returns its error, or ctx's if that ends
// first.
func (b *backgroundCheck) result(ctx context.Context, check func() error) error {
	b.mu.Lock()
	if b.done == nil {
		b.done = make(chan struct{})
		b.running.Go(func() {
			err := check()
			b.mu.Lock()
			defer b.mu.Unlock()
			close(b.done)
			b.done, b.err = nil, err
		})
	}
	done := b.done
	b.mu.Unlock()
	select {
	case <-done:
		return b.last()
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

// staleErrors are the errors of a connection that the other side has ended, as a server
// does that is restarted.
var staleErrors = []error{io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, syscall.ECONNRESET, syscall.EPIPE}

func isStaleConn(err error) bool {
	return slices.ContainsFunc(staleErrors, func(stale error) bool { return errors.Is(err, stale) })
}
