// fill_frames.go: the frames of a followed fill, and the key by which replicas know
// each other: what none of them has sealed is neither served nor stored.

package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/url"
	"slices"
	"strings"
)

// The frames of a followed fill: one byte of kind, four of length, the seal, the payload.
const (
	frameHeartbeat byte = 'b' // nothing, but alive
	frameHead      byte = 'h' // replicaHead: upstream's headers are there
	frameData      byte = 'd' // a piece of the body
	frameEnd       byte = 'e' // record: the body is whole and verified; heartbeats follow until it is stored
	frameOutcome   byte = 'o' // replicaOutcome: there will be no body

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

func (s *replicaStream) writeJSONFrame(w io.Writer, kind byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.writeFrame(w, kind, b)
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
