// fill_peer.go: one fetch of a file across replicas. The replica that holds
// the lease fills; the others follow its growing spool over plain HTTP, and
// take over by Range when it dies. No failure here reaches a client.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

const (
	// replicaPath is where a replica is asked for a fill of its own. No remote's
	// name begins with a dot.
	replicaPath = "/.fill/"
	// leaseHeader carries the lease's token, there and back: a request with
	// another one is for another program or another time.
	leaseHeader = "Artifactapi-Lease"
	// replicaHeartbeat is how often a filling replica shows that it lives while it has
	// nothing to send; replicaTimeout is when it is given up.
	replicaHeartbeat = 2 * time.Second
	replicaTimeout   = 5 * time.Second
	// maxReplicaFrame bounds what is read for one frame.
	maxReplicaFrame = 1 << 20
)

// errReplica is a filling replica that cannot be followed any further.
var errReplica = errors.New("the filling replica is gone")

// The frames of a followed fill: one byte of kind, four of length, payload.
const (
	frameHeartbeat byte = 'b' // nothing, but alive
	frameHead      byte = 'h' // replicaHead: upstream's headers are there
	frameData      byte = 'd' // a piece of the body
	frameEnd       byte = 'e' // record: the body is whole and verified; beats follow until it is stored
	frameOutcome   byte = 'o' // replicaOutcome: there will be no body
)

// replicaHead is what clients of a follower need before the body.
type replicaHead struct {
	Record    *record `json:"Record"`
	Total     int64   `json:"Total"`
	Validator string  `json:"Validator"`
	Origin    int     `json:"Origin"`
	Storable  bool    `json:"Storable"`
}

// replicaOutcome is how a fill ended without a body.
type replicaOutcome struct {
	Kind   string        `json:"Kind"`   // unchanged, again, unreachable, timeout, broken, self, or "" with the rest
	Status int           `json:"Status"` // for the client
	Detail string        `json:"Detail"`
	Code   int           `json:"Code"`  // upstream's
	Retry  time.Duration `json:"Retry"` // in ns
	Copy   string        `json:"Copy"`  // the sha256 of what is unchanged
}

// newReplicaClient makes the client for other replicas: never through a proxy,
// and not verifying a certificate, which names the outside and not the address
// that replicas know each other by; the token is what they trust.
func newReplicaClient() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:           (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
		TLSClientConfig:       &tls.Config{InsecureSkipVerify: true},
		ResponseHeaderTimeout: replicaTimeout,
		DisableCompression:    true,
		MaxIdleConnsPerHost:   16,
		IdleConnTimeout:       time.Minute,
	}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// acquireLease makes this process the one that fills f's key. other is the
// process that does already. Without Redis there is no lease, and everyone
// fills for himself.
func (f *fill) acquireLease() (other *leaseHolder) {
	if f.c.replicas == nil {
		return nil
	}
	token := rand.Text()
	f.mu.Lock()
	f.token = token // first: who reads the lease may be here before its taker knows
	f.mu.Unlock()
	release, other, err := f.c.replicas.acquireLease(f.ctx, f.key, token)
	f.mu.Lock()
	if f.release = release; release == nil {
		f.token = ""
	}
	f.mu.Unlock()
	if err != nil {
		f.c.noteStoreError("redis", "leasing", f.key, err)
	}
	return other
}

// followReplica brings the body from the replica p into f's own spool, and keeps it
// there until p has stored it. errReplica says that p can do no more and what it
// sent, if anything, is in the spool.
func (f *fill) followReplica(p *leaseHolder) error {
	if err := f.openSpool(); err != nil {
		return err
	}
	f.mu.Lock()
	f.followed = true
	f.mu.Unlock()
	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	silence := time.AfterFunc(replicaTimeout, cancel)
	defer silence.Stop()
	body, err := f.c.openReplicaStream(ctx, p, f.key)
	if err != nil {
		return fmt.Errorf("%w: %w", errReplica, err)
	}
	defer body.Close()
	r := bufio.NewReaderSize(body, largeBufferSize)
	var payload []byte
	for {
		kind, data, err := readFrame(r, payload)
		if err == nil {
			payload = data
			silence.Reset(replicaTimeout)
			err = f.applyFrame(kind, data)
		} else {
			err = fmt.Errorf("%w: %w", errReplica, err)
		}
		switch {
		case err != nil && !f.complete:
			return err
		case errors.Is(err, io.EOF), f.ctx.Err() != nil: // it has stored the file, as far as it could
			return nil
		case err != nil: // it died over that
			return f.completeFill()
		}
	}
}

// applyFrame applies one frame.
func (f *fill) applyFrame(kind byte, data []byte) error {
	switch kind {
	case frameHead:
		var h replicaHead
		if err := json.Unmarshal(data, &h); err != nil || h.Record == nil || f.rec != nil {
			return fmt.Errorf("%w: its head cannot be read, or is the second", errReplica)
		}
		f.publishHeaders(h.Record, h.Total, h.Origin, h.Validator, h.Storable)
	case frameData:
		if f.rec == nil {
			return fmt.Errorf("%w: data before its head", errReplica)
		}
		if f.size >= 0 && f.written+int64(len(data)) > f.size {
			return fmt.Errorf("%w: %w: the body is longer than it said", errReplica, errDigest)
		}
		return f.appendToSpool(data)
	case frameEnd:
		var rec record
		if err := json.Unmarshal(data, &rec); err != nil || rec.Size != f.written || rec.SHA256 != f.hash.sumHex() {
			return fmt.Errorf("%w: %w: the body is not what it says", errReplica, errDigest)
		}
		if err := f.hash.verifyDigest(f.file.digest); err != nil {
			return fmt.Errorf("%w: %w", errReplica, err)
		}
		f.publishBody(&rec) // storing, as far as a purge here is concerned
	case frameOutcome:
		var v replicaOutcome
		if err := json.Unmarshal(data, &v); err != nil {
			return fmt.Errorf("%w: its verdict cannot be read", errReplica)
		}
		switch {
		case v.Kind == "" && f.file.sharedKey:
			return fmt.Errorf("%w: its way to the file is refused, ours may not be", errReplica)
		case v.Kind == "unchanged" && f.oldRecord != nil && f.oldRecord.SHA256 != v.Copy:
			return fmt.Errorf("%w: it has another copy", errReplica)
		}
		return v.toError()
	}
	return nil
}

// takeOver fetches what is missing of a body whose replica is gone: by Range,
// or as a whole where upstream has no ranges or what came is in doubt.
func (f *fill) takeOver(cause error) error {
	f.mu.Lock()
	f.storable, f.followed = true, false
	f.mu.Unlock()
	var resp *upstreamResponse
	err := cause
	if !errors.Is(cause, errDigest) {
		resp, err = f.resumeBody(cause, 0)
	}
	if err != nil && !errors.Is(err, errUnreachable) && !errors.Is(err, errTimeout) && f.ctx.Err() == nil {
		resp, err = f.refetchWhole()
	}
	if err != nil {
		return err
	}
	return f.receiveBody(resp, 1)
}

// refetchWhole asks for the whole body and reads over what the spool has already,
// which clients have seen: it must be the same.
func (f *fill) refetchWhole() (*upstreamResponse, error) {
	resp, err := f.c.requestBody(f.ctx, f.file, f.file.newUpstreamRequest(http.MethodGet, nil))
	if err != nil {
		return nil, err
	}
	if err = f.c.statusError(f.file, resp); err == nil {
		err = f.compareWithSpool(resp)
	}
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	storable := f.mayBeStored(resp)
	f.mu.Lock()
	f.storable = storable
	f.mu.Unlock()
	return resp, nil
}

func (f *fill) compareWithSpool(resp *upstreamResponse) error {
	now := f.c.newRecord(f.file, resp.Header)
	if resp.ContentLength != f.size || now.ETag != f.rec.ETag || now.LastModified != f.rec.LastModified {
		return fmt.Errorf("%w: it has changed since", errBroken)
	}
	got, had := make([]byte, copyBufferSize), make([]byte, copyBufferSize)
	for off := int64(0); off < f.written; {
		n, err := io.ReadFull(resp.Body, got[:min(copyBufferSize, f.written-off)])
		if err != nil {
			return fmt.Errorf("%w: %w", errBroken, err)
		}
		if _, err := f.spool.ReadAt(had[:n], off); err != nil {
			return fmt.Errorf("reading the spool: %w", err)
		}
		if !bytes.Equal(got[:n], had[:n]) {
			return fmt.Errorf("%w: another replica sent other bytes than upstream has", errBroken)
		}
		off += int64(n)
	}
	return nil
}

// openReplicaStream opens the stream of p's fill of key.
func (c *cache) openReplicaStream(ctx context.Context, p *leaseHolder, key string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.addr+replicaPath+key, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set(leaseHeader, p.token)
	res, err := c.replicaClient.Do(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK || res.Header.Get(leaseHeader) != p.token {
		res.Body.Close()
		return nil, fmt.Errorf("%s answered %d and not with the lease's token", p.addr, res.StatusCode)
	}
	return res.Body, nil
}

// readFrame reads one frame; its payload lives in buf until the next call.
func readFrame(r io.Reader, buf []byte) (kind byte, payload []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, buf, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxReplicaFrame {
		return 0, buf, fmt.Errorf("a frame of %d bytes", n)
	}
	if cap(buf) < int(n) {
		buf = make([]byte, n)
	}
	payload = buf[:n]
	_, err = io.ReadFull(r, payload)
	return head[0], payload, err
}

func writeFrame(w io.Writer, kind byte, payload []byte) error {
	var head [5]byte
	head[0] = kind
	binary.BigEndian.PutUint32(head[1:], uint32(len(payload)))
	if _, err := w.Write(head[:]); err != nil {
		return err
	}
	_, err := w.Write(payload)
	return err
}

func writeJSONFrame(w io.Writer, kind byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeFrame(w, kind, b)
}

// newReplicaOutcome turns the end of a flight into what followers are told.
func newReplicaOutcome(err error) replicaOutcome {
	p, _ := errors.AsType[*problem](err)
	status, _ := errors.AsType[*upstreamStatus](err)
	v := replicaOutcome{Kind: "self"} // what is this replica's own trouble, another may not have
	switch {
	case errors.Is(err, errUnchanged):
		v.Kind = "unchanged"
	case errors.Is(err, errLookAgain):
		v.Kind = "again"
	case errors.Is(err, errUnreachable):
		v.Kind = "unreachable"
	case errors.Is(err, errTimeout):
		v.Kind = "timeout"
	case p != nil && status != nil:
		v = replicaOutcome{Status: p.status, Detail: p.detail, Code: status.code, Retry: p.retryAfter}
	}
	return v
}

// toError is newReplicaOutcome's inverse.
func (v replicaOutcome) toError() error {
	const found = "as the filling replica found"
	switch v.Kind {
	case "":
		return &problem{status: v.Status, detail: v.Detail, retryAfter: v.Retry, cause: &upstreamStatus{v.Code}}
	case "unchanged":
		return errUnchanged
	case "again":
		return errLookAgain
	case "unreachable":
		return fmt.Errorf("%w, %s", errUnreachable, found)
	case "timeout":
		return fmt.Errorf("%w, %s", errTimeout, found)
	}
	return fmt.Errorf("%w: it could not fill", errReplica)
}

// serveReplica streams this replica's fill of key to another, which shows by the
// token that it read the lease. The caller has routed replicaPath here.
func (c *cache) serveReplica(w *response, r *http.Request, key string) error {
	w.quiet = true
	token := r.Header.Get(leaseHeader)
	f := c.joinLeasedFill(key, token)
	if f == nil {
		return newProblem(http.StatusNotFound, "no such fill")
	}
	defer f.leave()
	w.Header().Set(leaseHeader, token)
	w.Header().Set("Content-Type", "application/octet-stream")
	w.WriteHeader(http.StatusOK)
	return f.streamFrames(r.Context(), w)
}

// joinLeasedFill joins the flight of key if it holds the lease with that token.
func (c *cache) joinLeasedFill(key, token string) *fill {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.fills[key]
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if token == "" || subtle.ConstantTimeCompare([]byte(f.token), []byte(token)) != 1 {
		return nil
	}
	f.waiters++
	return f
}

// streamFrames writes the flight's frames until it ends.
func (f *fill) streamFrames(ctx context.Context, w *response) error {
	beat := time.NewTicker(replicaHeartbeat)
	defer beat.Stop()
	var off int64
	headed, ending := false, false
	buf := largeBuffers.Get().(*[largeBufferSize]byte)
	defer largeBuffers.Put(buf)
	for {
		f.mu.Lock()
		rec, written, complete, done, ended, changed := f.rec, f.written, f.complete, f.done, f.err, f.changed
		head := replicaHead{rec, f.size, f.validator, f.origin, f.storable}
		f.mu.Unlock()
		var err error
		switch {
		case rec != nil && !headed:
			headed = true
			err = writeJSONFrame(w, frameHead, head)
		case off < written:
			n := min(written-off, largeBufferSize)
			if _, err := f.spool.ReadAt(buf[:n], off); err != nil {
				return fmt.Errorf("reading the spool: %w", err)
			}
			off += n
			err = writeFrame(w, frameData, buf[:n])
		case complete && !ending:
			ending = true
			err = writeJSONFrame(w, frameEnd, rec)
		case complete && done:
			return nil
		case done:
			v := newReplicaOutcome(ended)
			if f.oldRecord != nil {
				v.Copy = f.oldRecord.SHA256
			}
			return writeJSONFrame(w, frameOutcome, v)
		default:
			if err := w.controller.Flush(); err != nil {
				return fmt.Errorf("%w: %w", errClientGone, err)
			}
			select {
			case <-changed:
			case <-beat.C:
				err = writeFrame(w, frameHeartbeat, nil)
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err != nil {
			return err
		}
	}
}
