// fill_replica.go: one fetch of a file across replicas. The replica that holds
// the lease fills; the others follow its growing spool over plain HTTP, and take
// over by Range when it dies. No failure here reaches a client. What no replica has
// sealed is neither served nor stored.

package main

import (
	"bufio"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// replicaPath is where a replica is asked for a fill of its own. No remote's
	// name begins with a dot.
	replicaPath = "/.fill/"
	// leaseHeader shows that both sides are replicas that know the lease: token, nonce and
	// seal there, a seal back.
	leaseHeader = "Artifactapi-Lease"
	// replicaHeartbeat is how often a filling replica shows that it lives while
	// it has nothing to send; replicaTimeout is when it is given up.
	replicaHeartbeat = 2 * time.Second
	replicaTimeout   = 5 * time.Second
	// failedLeaseTime is how long the leader of a failed fill is not followed again:
	// longer than its lease lives without it.
	failedLeaseTime = time.Minute
)

// replicaHead is what clients need before the body, those of a follower too.
type replicaHead struct {
	Record    *record
	Total     int64 // size of the body; -1: not known
	Validator string
	Origin    int
	Storable  bool
}

// replicaOutcome is how a fill ended without a stored body. The words on the wire are
// older than some names here: replicas of two versions may run side by side.
type replicaOutcome struct {
	// Kind is unchanged or again (see outcomeKind), unreachable, timeout, "" for
	// upstream's refusal, or self for what is this replica's own trouble.
	Kind   string        `json:"Kind"`
	Status int           `json:"Status"` // of the refusal, for the client
	Detail string        `json:"Detail"`
	Code   int           `json:"Code"`  // upstream's status
	Retry  time.Duration `json:"Retry"` // in ns
	Copy   string        `json:"Copy"`  // the SHA-256 of what is unchanged
}

// newReplicaClient makes the client for other replicas. It never uses a proxy. It
// does not verify certificates: they name the service and not the address that
// replicas know each other by, and what replicas trust is a seal (replicaKey). follow
// gives up one that is silent.
func newReplicaClient() *http.Client {
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute}
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// acquireLease makes this process the one that fills f's key, if no other does. Without
// Redis every replica fills for itself.
func (f *fillRun) acquireLease() {
	if f.c.replicas == nil {
		return
	}
	// First: a replica that reads the lease may be here before we know that we have it.
	token := rand.Text()
	f.set(func() { f.leaseToken = token })
	l, err := f.c.replicas.acquireLease(f.ctx, f.key, token)
	if err != nil {
		f.c.reportStoreError("redis", "leasing", f.key, err)
	}
	f.lease = l
}

// fetchFromReplica brings the body from the replica that fills already. If ended
// is false, that replica had nothing for us, and upstream must be asked.
func (f *fillRun) fetchFromReplica(leader *leaseHolder) (outcome fillOutcome, ended bool) {
	if _, failed := f.c.failedLeases.get(leader.token); failed {
		return fillOutcome{}, false
	}
	if !f.openSpool() {
		return fillOutcome{kind: outcomeNoSpool}, true
	}
	outcome, err := f.follow(leader)
	switch {
	case err == nil:
		return outcome, true
	case f.rec == nil && f.isStoredByNow(): // it ended before we asked
		return fillOutcome{kind: outcomeLookAgain}, true
	}
	err = fmt.Errorf("following another replica: %w", err)
	f.c.failedLeases.putFor(leader.token, struct{}{}, failedLeaseTime)
	written, _ := f.spool.progress()
	f.c.log.Info("fetching what another replica began", "key", f.key, "replica", leader.addr, "at", written, "error", err)
	if f.rec != nil {
		return f.takeOver(err), true
	}
	return fillOutcome{}, false
}

// follow reads the leader's stream into f's own spool, and keeps the body there until the
// leader has stored it. With an error the leader can do no more.
func (f *fillRun) follow(leader *leaseHolder) (fillOutcome, error) {
	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	silence := time.AfterFunc(replicaTimeout, cancel)
	defer silence.Stop()
	stream := f.c.replicaKey.newStream(f.key, leader.token, rand.Text())
	body, err := f.openStream(ctx, leader, stream)
	if err != nil {
		return fillOutcome{}, err
	}
	defer body.Close()
	r := bufio.NewReaderSize(body, largeBufferSize)
	for {
		silence.Reset(replicaTimeout)
		kind, payload, err := stream.readFrame(r)
		silence.Stop() // what follows may take long without being the leader's silence
		isWhole := f.phase >= phaseComplete
		switch {
		case isWhole && (errors.Is(err, io.EOF) || f.ctx.Err() != nil): // the leader has stored it
			return fillOutcome{kind: outcomeBody}, nil
		case isWhole && (err != nil || kind == frameOutcome): // it died over that, or failed
			return f.store(), nil
		case err != nil:
			return fillOutcome{}, err
		case kind == frameOutcome:
			return f.readOutcome(payload)
		}
		if err := f.applyFrame(kind, payload); errors.Is(err, errNoSpace) {
			return f.runOutOfSpace(err), nil
		} else if err != nil {
			return fillOutcome{}, err
		}
	}
}

// applyFrame applies a frame that brings the body nearer.
func (f *fillRun) applyFrame(kind byte, payload []byte) error {
	switch kind {
	case frameHead:
		var h replicaHead
		if err := json.Unmarshal(payload, &h); err != nil || h.Record == nil || f.rec != nil {
			return errors.New("its head cannot be read, or is the second")
		}
		f.set(func() { f.isFollower = true })
		return f.publishHeaders(h)
	case frameData:
		if f.rec == nil {
			return errors.New("data before its head")
		}
		f.c.metrics.peers.Add(int64(len(payload)))
		if _, err := f.Write(payload); errors.Is(err, errTooMuch) {
			return fmt.Errorf("%w: it is longer than it said", errDigest)
		} else if err != nil {
			return err
		}
	case frameEnd:
		var rec record
		written, _ := f.spool.progress()
		if err := json.Unmarshal(payload, &rec); err != nil || rec.Size != written || rec.SHA256 != f.spool.hash.sumHex() {
			return fmt.Errorf("%w: it is not what it says", errDigest)
		}
		if err := f.spool.hash.verify(); err != nil {
			return err
		}
		f.publishBody(&rec)
	}
	return nil
}

// readOutcome reads how the leader's fill ended, unless that says nothing about
// ours.
func (f *fillRun) readOutcome(payload []byte) (fillOutcome, error) {
	var o replicaOutcome
	if err := json.Unmarshal(payload, &o); err != nil {
		return fillOutcome{}, errors.New("its outcome cannot be read")
	}
	outcome, ok := o.toOutcome()
	switch {
	case !ok:
		return fillOutcome{}, errors.New("it could not fill")
	case o.Kind == "" && f.file.sharedKey:
		return fillOutcome{}, errors.New("its way to the file is refused, ours may not be")
	case outcome.kind == outcomeUnchanged && f.oldRecord != nil && f.oldRecord.SHA256 != o.Copy:
		return fillOutcome{}, errors.New("it has another copy")
	}
	return outcome, nil
}

// takeOver fetches by Range what is missing of a body whose leader is gone. Where that
// cannot be, or the bytes that came are in doubt, clients that have a part of the body are
// cut off, and those that have nothing yet begin anew.
func (f *fillRun) takeOver(cause error) fillOutcome {
	if errors.Is(cause, errDigest) {
		return fillOutcome{outcomeLookAgain, cause}
	}
	written, size := f.spool.progress()
	body := f.newPartReader(f.ctx, written, -1)
	if written != size { // else only the word is missing that it is whole
		if err := body.resume(written, cause); err != nil {
			return fillOutcome{outcomeLookAgain, err}
		}
	}
	return f.receiveBody(body)
}

// openStream opens the stream of the leader's fill. The caller closes it.
func (f *fillRun) openStream(ctx context.Context, leader *leaseHolder, stream *replicaStream) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, leader.addr+replicaPath+f.key, nil)
	if err != nil {
		return nil, err
	}
	req.Header = http.Header{leaseHeader: {stream.request}, "Via": {f.file.via}}
	res, err := f.c.replicaClient.Do(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK || !hmac.Equal([]byte(res.Header.Get(leaseHeader)), []byte(stream.answer)) {
		res.Body.Close()
		return nil, fmt.Errorf("%s answered %d and not as a replica with our secret", leader.addr, res.StatusCode)
	}
	return res.Body, nil
}

// newReplicaOutcome is what followers are told of an outcome without a body.
func newReplicaOutcome(o fillOutcome) replicaOutcome {
	p, _ := errors.AsType[*problem](o.err)
	status, _ := errors.AsType[*upstreamStatus](o.err)
	switch {
	case o.kind == outcomeUnchanged, o.kind == outcomeLookAgain:
		return replicaOutcome{Kind: string(o.kind)}
	case errors.Is(o.err, errUnreachable):
		return replicaOutcome{Kind: "unreachable"}
	case errors.Is(o.err, errTimeout):
		return replicaOutcome{Kind: "timeout"}
	case p != nil && status != nil && p.headers == nil: // else: where its own clients go from here
		return replicaOutcome{Status: p.status, Detail: p.detail, Code: status.code, Retry: p.retryAfter}
	}
	return replicaOutcome{Kind: "self"} // another replica may not have this one's trouble
}

// toOutcome is the inverse of newReplicaOutcome; ok is false for a replica's own
// trouble.
func (o replicaOutcome) toOutcome() (outcome fillOutcome, ok bool) {
	const found = "as the filling replica found"
	switch o.Kind {
	case "":
		return failedOutcome(&problem{status: o.Status, detail: o.Detail, retryAfter: o.Retry, cause: &upstreamStatus{o.Code}}), true
	case string(outcomeUnchanged), string(outcomeLookAgain):
		return fillOutcome{kind: outcomeKind(o.Kind)}, true
	case "unreachable":
		return failedOutcome(fmt.Errorf("%w, %s", errUnreachable, found)), true
	case "timeout":
		return failedOutcome(fmt.Errorf("%w, %s", errTimeout, found)), true
	}
	return fillOutcome{}, false
}

// serveReplica streams this replica's fill of key to another one, which shows that it
// has read the lease. The caller has routed replicaPath here.
func (c *cache) serveReplica(w *response, r *http.Request, key string) error {
	w.quiet = true
	if _, err := c.upstream.passedVia(r.Header); err != nil {
		return err // our fill asks for what is wanted of it: both would wait
	}
	stream, token := c.replicaKey.acceptStream(key, r.Header.Get(leaseHeader))
	f := c.fills.joinLeased(key, token)
	if f == nil {
		return newProblem(http.StatusNotFound, "no such fill")
	}
	defer f.leave()
	w.Header().Set(leaseHeader, stream.answer)
	w.Header().Set("Content-Type", "application/octet-stream")
	w.WriteHeader(http.StatusOK)
	s := &frameStream{replicaStream: stream, w: w}
	ctx, cancel := context.WithCancel(r.Context())
	var beating sync.WaitGroup
	beating.Go(func() {
		defer cancel() // the follower has left
		for s.send(frameHeartbeat, nil) == nil && sleepFor(ctx, replicaHeartbeat) == nil {
		}
	})
	defer beating.Wait()
	defer cancel()
	err := s.sendBody(ctx, f)
	if err == nil {
		err = f.await(ctx, func() bool { return f.phase == phaseDone })
	}
	if err != nil || f.outcome.kind == outcomeBody {
		return err
	}
	outcome := newReplicaOutcome(f.outcome)
	if f.oldRecord != nil {
		outcome.Copy = f.oldRecord.SHA256
	}
	return s.sendJSON(frameOutcome, outcome)
}

// frameStream is the stream of a fill to one follower.
type frameStream struct {
	*replicaStream
	mu sync.Mutex // held while a frame is sent: heartbeats have a goroutine of their own
	w  *response
}

// send sends a frame at once.
func (s *frameStream) send(kind byte, payload []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writeFrame(s.w, kind, payload); err != nil {
		return err
	}
	if err := s.w.controller.Flush(); err != nil {
		return fmt.Errorf("%w: %w", errClientGone, err)
	}
	return nil
}

func (s *frameStream) sendJSON(kind byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.send(kind, b)
}

// sendBody sends the head and the body, as far as there is one.
func (s *frameStream) sendBody(ctx context.Context, f *fill) error {
	var head replicaHead
	err := f.await(ctx, func() bool {
		head = replicaHead{f.rec, -1, f.validator, f.origin, f.fate == fateKeep}
		return f.phase >= phaseFilling
	})
	if err != nil || head.Record == nil {
		return err
	}
	body := f.spool.newReader(ctx, false)
	defer body.Close()
	head.Total = body.size
	if err := s.sendJSON(frameHead, head); err != nil {
		return err
	}
	buf := largeBuffers.Get().(*[largeBufferSize]byte)
	defer largeBuffers.Put(buf)
	for {
		n, err := body.Read(buf[:])
		if err == io.EOF {
			break
		}
		if err != nil {
			return context.Cause(ctx) // nil: the outcome says why there is no more
		}
		if err := s.send(frameData, buf[:n]); err != nil {
			return err
		}
	}
	if err := f.await(ctx, func() bool {
		head.Record = f.rec
		return f.phase >= phaseComplete
	}); err != nil {
		return err
	}
	return s.sendJSON(frameEnd, head.Record)
}

// The frames of a followed fill: one byte of kind, four of length, the seal, the payload.
const (
	frameHeartbeat byte = 'b' // nothing, but alive
	frameHead      byte = 'h' // replicaHead: upstream's headers are there
	frameData      byte = 'd' // a piece of the body
	frameEnd       byte = 'e' // record: the body is whole and verified; heartbeats follow until it is stored
	frameOutcome   byte = 'o' // replicaOutcome: there will be no body, or it was not stored

	frameHeadSize = 5 // of kind and length
	// maxReplicaFrame bounds what is read for one frame.
	maxReplicaFrame = 1 << 20
)

// replicaKey authenticates leases and what replicas send each other. All of them can
// make it, and nobody who can only write to Redis or listen on the wire.
type replicaKey []byte

func newReplicaKey(secretKey, bucket string) replicaKey {
	return replicaKey(secretKey).sign("artifactapi replicas", bucket)
}

// sign returns the HMAC-SHA256 of parts.
func (k replicaKey) sign(parts ...string) []byte {
	mac := hmac.New(sha256.New, k)
	for _, p := range parts {
		fmt.Fprintf(mac, "%d:%s", len(p), p) // with the length, other parts are other bytes
	}
	return mac.Sum(nil)
}

// isReplicaAddress reports whether s is http://HOST:PORT or https://HOST:PORT, where the
// port may be missing, and nothing else.
func isReplicaAddress(s string) bool {
	u, err := url.Parse(s)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "" && !hasBadPort(u) && s == u.Scheme+"://"+u.Host
}

// replicaStream is one stream of a fill, as leader and follower both know it. Its seals
// hold for the key, the lease's token, the follower's nonce and the place in the stream:
// what was recorded elsewhere or earlier is worth nothing. One goroutine uses it.
type replicaStream struct {
	request, answer string // what follower and leader show in leaseHeader
	mac             hash.Hash
	frames          uint64 // sealed so far
	payload         []byte // of the frame that was read last
}

func (k replicaKey) newStream(key, token, nonce string) *replicaStream {
	sign := func(what string) []byte { return k.sign(what, key, token, nonce) }
	return &replicaStream{
		request: token + " " + nonce + " " + hex.EncodeToString(sign("request")),
		answer:  hex.EncodeToString(sign("answer")),
		mac:     hmac.New(sha256.New, sign("frames")),
	}
}

// acceptStream is newStream for the leader, who gets what the follower shows. The stream
// is nil unless that is a request of a replica for key.
func (k replicaKey) acceptStream(key, shown string) (s *replicaStream, token string) {
	token, rest, _ := strings.Cut(shown, " ")
	nonce, _, _ := strings.Cut(rest, " ")
	if s = k.newStream(key, token, nonce); !hmac.Equal([]byte(s.request), []byte(shown)) {
		return nil, ""
	}
	return s, token
}

// seal returns the seal of the stream's next frame.
func (s *replicaStream) seal(head, payload []byte) []byte {
	s.mac.Reset()
	_ = binary.Write(s.mac, binary.BigEndian, s.frames)
	s.frames++
	s.mac.Write(head)
	s.mac.Write(payload)
	return s.mac.Sum(nil)
}

func (s *replicaStream) writeFrame(w io.Writer, kind byte, payload []byte) error {
	head := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(payload)))
	if _, err := w.Write(append(head, s.seal(head, payload)...)); err != nil {
		return err
	}
	_, err := w.Write(payload)
	return err
}

// readFrame reads the next frame, whose payload is valid until the one after it is read.
// io.EOF is an end between two frames.
func (s *replicaStream) readFrame(r io.Reader) (kind byte, payload []byte, err error) {
	var head [frameHeadSize + sha256.Size]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxReplicaFrame {
		return 0, nil, fmt.Errorf("a frame of %d bytes", n)
	}
	s.payload = slices.Grow(s.payload[:0], int(n))[:n]
	if _, err := io.ReadFull(r, s.payload); err != nil {
		return 0, nil, err
	}
	if !hmac.Equal(s.seal(head[:frameHeadSize], s.payload), head[frameHeadSize:]) {
		return 0, nil, errors.New("a frame that no replica with our secret has sent")
	}
	return head[0], s.payload, nil
}
