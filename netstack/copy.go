package netstack

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
)

const (
	// copyBuffer is how much is copied at a time between a connection and what is
	// no socket of the host, in bytes: a few super-packets.
	copyBuffer = 256 << 10
	// holdLimit bounds what is moved while the stack cannot work on the
	// connection, in bytes.
	holdLimit = 256 << 10
	// gatherBelow is the size in bytes below which pieces are copied together, so
	// that small segments do not cost a system call each.
	gatherBelow = 16 << 10
	gatherSize  = 64 << 10
	// waitSize is what is read or written, in bytes, when it is time to wait.
	waitSize = 512
)

// hostSocket is the stream socket behind v, if v is one.
func hostSocket(v any) (syscall.RawConn, bool) {
	switch c := v.(type) {
	case *net.TCPConn:
		raw, err := c.SyscallConn()
		return raw, err == nil
	case *net.UnixConn:
		if c.LocalAddr().Network() != "unix" {
			return nil, false
		}
		raw, err := c.SyscallConn()
		return raw, err == nil
	}
	return nil, false
}

// WriteTo writes to w what arrives, until the other side ends. A socket of the
// host is written to from the memory that the packets were received into.
func (c *conn) WriteTo(w io.Writer) (int64, error) {
	raw, ok := hostSocket(w)
	if !ok {
		return io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{c}, make([]byte, copyBuffer))
	}
	o := outlet{ep: c.ep, pending: make([]byte, 0, gatherSize)}
	step := o.step
	first := make([]byte, waitSize)
	for {
		n, err := c.Read(first) // waits, and heeds the deadline
		o.total += int64(n)
		o.pending = append(o.pending, first[:n]...)
		if n > 0 {
			err = errors.Join(err, raw.Write(step), o.err)
		}
		if errors.Is(err, io.EOF) {
			return o.total, nil
		}
		if err != nil {
			return o.total, err
		}
	}
}

// outlet writes an endpoint's data to a socket that does not block. It is the
// io.Writer that the endpoint reads itself to: while it does, the stack cannot
// work on the connection.
type outlet struct {
	ep      tcpip.Endpoint
	fd      int
	pending []byte // not written yet, before everything else
	pieces  [2][]byte
	moved   int  // bytes of this turn
	full    bool // the socket
	err     error
	total   int64
}

var errTurnOver = errors.New("netstack: enough for now")

// step writes until the endpoint is empty, or reports false when the socket
// is full.
func (o *outlet) step(fd uintptr) bool {
	o.fd, o.full = int(fd), false
	for {
		o.moved = 0
		res, err := o.ep.Read(o, tcpip.ReadOptions{})
		o.total += int64(res.Count)
		if res.Count > 0 {
			o.ep.ModerateRecvBuf(res.Count)
		}
		if !o.full && o.err == nil {
			o.send(nil)
		}
		switch {
		case o.err != nil:
			return true
		case o.full:
			return false
		case err != nil || res.Count == 0:
			return true // Read knows what it is
		}
	}
}

// Write takes a piece of the endpoint's data: all of it, or less and an error.
func (o *outlet) Write(p []byte) (int, error) {
	if o.full || o.err != nil || o.moved >= holdLimit {
		return 0, errTurnOver
	}
	o.moved += len(p)
	if len(p) < gatherBelow && len(o.pending)+len(p) <= cap(o.pending) {
		o.pending = append(o.pending, p...)
		return len(p), nil
	}
	n := o.send(p)
	if n < len(p) {
		return n, errTurnOver
	}
	return n, nil
}

// send writes what is pending and then p, and returns how much of p.
func (o *outlet) send(p []byte) int {
	o.pieces = [2][]byte{o.pending, p}
	bufs := o.pieces[:]
	switch {
	case len(o.pending) == 0 && len(p) == 0:
		return 0
	case len(o.pending) == 0:
		bufs = bufs[1:]
	case len(p) == 0:
		bufs = bufs[:1]
	}
	for {
		n, e := sendmsg(o.fd, bufs)
		switch {
		case e == unix.EINTR:
			continue
		case e == unix.EAGAIN:
			o.full = true
			return 0
		case e != 0:
			o.err = fmt.Errorf("netstack: write: %w", e)
			return 0
		}
		had := len(o.pending)
		if n < had+len(p) {
			o.full = true
		}
		if n < had {
			o.pending = o.pending[:copy(o.pending, o.pending[n:])]
			return 0
		}
		o.pending = o.pending[:0]
		return n - had
	}
}

// ReadFrom sends what r has until r ends. A socket of the host is read into the
// memory that packets are sent from.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	raw, ok := hostSocket(r)
	if !ok {
		return io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{r}, make([]byte, copyBuffer))
	}
	in := inlet{ep: c.ep}
	step := in.step
	first := make([]byte, waitSize)
	for {
		if err := raw.Read(step); err != nil || in.err != nil || in.ended {
			return in.total, errors.Join(err, in.err)
		}
		// The send buffer is full.
		n, err := r.Read(first)
		if n > 0 {
			var m int
			m, err = c.Write(first[:n]) // waits, and heeds the deadline
			in.total += int64(m)
		}
		if errors.Is(err, io.EOF) {
			return in.total, nil
		}
		if err != nil {
			return in.total, err
		}
	}
}

// inlet is the tcpip.Payloader that an endpoint takes data from: a socket.
type inlet struct {
	ep    tcpip.Endpoint
	fd    int
	taken int // bytes, from the socket in this turn
	ended bool
	err   error
	total int64
}

// step reads until the endpoint takes no more or the socket has ended, or
// reports false when the socket is empty.
func (in *inlet) step(fd uintptr) bool {
	in.fd = int(fd)
	for {
		in.taken = 0
		n, err := in.ep.Write(in, tcpip.WriteOptions{})
		in.total += n
		switch {
		case in.err != nil:
			return true
		case int64(in.taken) != n:
			in.err = fmt.Errorf("netstack: write: %d bytes are lost: %w", int64(in.taken)-n, unix.ECONNABORTED)
			return true
		case err != nil:
			if _, full := err.(*tcpip.ErrWouldBlock); !full {
				in.err = fmt.Errorf("netstack: write: %w", systemError(err))
			}
			return true
		case n == 0 && in.empty():
			return in.ended || in.err != nil
		}
	}
}

// empty reports whether there is nothing to read, and sees the end.
func (in *inlet) empty() bool {
	var b [1]byte
	for {
		n, e := recv(in.fd, b[:], unix.MSG_PEEK)
		switch {
		case e == unix.EINTR:
			continue
		case e == unix.EAGAIN:
			return true
		case e != 0:
			in.err = fmt.Errorf("netstack: read: %w", e)
			return true
		}
		in.ended = n == 0
		return in.ended
	}
}

// Len implements tcpip.Payloader: how much Read will deliver without waiting.
func (in *inlet) Len() int {
	n, e := inQueue(in.fd)
	if e != 0 {
		in.err = fmt.Errorf("netstack: read: %w", e)
		return 0
	}
	return min(n, holdLimit)
}

// Read implements tcpip.Payloader.
func (in *inlet) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		n, e := recv(in.fd, p, 0)
		if e == unix.EINTR {
			continue
		}
		if e == 0 && n == 0 {
			in.err = fmt.Errorf("netstack: read: %w", io.ErrUnexpectedEOF) // Len has seen more
		} else if e != 0 {
			in.err = fmt.Errorf("netstack: read: %w", e)
		}
		in.taken += n
		return n, in.err
	}
}
