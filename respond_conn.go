// respond_conn.go: connections of clients, on which the header of an answer and a small
// body leave together.

package main

import (
	"bytes"
	"context"
	"io"
	"net"
)

// clientListener makes the connections of a listener clientConns.
type clientListener struct{ net.Listener }

func (l clientListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok {
		return &clientConn{TCPConn: tcp}, err
	}
	return conn, err
}

// clientConnKey is where the context of a request without TLS has its clientConn.
type clientConnKey struct{}

// addClientConn is http.Server.ConnContext.
func addClientConn(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, clientConnKey{}, conn)
}

// clientConn is the connection of a client. net/http has a buffer of 4 KiB for header and
// body and writes a body of 4 KiB in two pieces, which costs both sides a third more. So
// the header can be held until the body is there, see sendMemory. Those who write to the
// connection do it one after the other.
type clientConn struct {
	*net.TCPConn
	holds bool   // what is written is held
	held  []byte // kept for the next answers
}

// release sends what is still held.
func (c *clientConn) release() (err error) {
	if c.holds = false; len(c.held) > 0 {
		_, err = c.TCPConn.Write(c.held)
		c.held = c.held[:0]
	}
	return err
}

func (c *clientConn) Write(p []byte) (int, error) {
	if c.holds {
		c.held = append(c.held, p...)
		return len(p), nil
	}
	return c.TCPConn.Write(p)
}

// ReadFrom sends what is held with the rest of a buffer. All else is sent as net/http does
// it without a clientConn, files by sendfile.
func (c *clientConn) ReadFrom(src io.Reader) (int64, error) {
	body, ok := src.(*bytes.Buffer)
	if !ok || !c.holds {
		return c.TCPConn.ReadFrom(src)
	}
	header := int64(len(c.held))
	pieces := net.Buffers{c.held, body.Next(body.Len())}
	sent, err := pieces.WriteTo(c.TCPConn) // by writev(2)
	c.holds, c.held = false, c.held[:0]
	return max(0, sent-header), err
}

// memorySource is a body whose bytes may be in memory.
type memorySource interface {
	// unread returns the bytes behind the current position, which are not changed; false:
	// they are not in memory, or not all there yet.
	unread() ([]byte, bool)
}

// minHeld is the smallest body, in bytes, for which the header is held: net/http writes a
// smaller one together with it anyway.
const minHeld = 2 << 10

// sendMemory sends a body that is in memory.
func (w *response) sendMemory(body []byte) (int64, error) {
	to, ok := w.ResponseWriter.(io.ReaderFrom)
	if !ok || w.conn == nil || len(body) < minHeld {
		n, err := w.Write(body)
		return int64(n), err
	}
	w.extendWriteDeadline()
	w.conn.holds = true // the header of the answer
	n, err := to.ReadFrom(bytes.NewBuffer(body))
	if released := w.conn.release(); err == nil {
		err = released
	}
	w.bytes += n
	return n, w.noteWriteError(err)
}
