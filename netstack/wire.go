package netstack

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"tweed/tun/ring"
)

// fullPause is how long to wait for the engine to take packets out of shared
// memory that is full.
const fullPause = 50 * time.Microsecond

// wire is the way to one engine and back: a SEQPACKET socket that carries packets,
// or shared memory that does and the socket to wake each other.
type wire struct {
	conn   *net.UnixConn
	memory *ring.Memory // nil without
	out    *sender
	in     *receiver
}

// newWire takes conn over, also when it fails.
func newWire(conn *net.UnixConn, shared bool) (w *wire, err error) {
	defer func() {
		if err != nil {
			conn.Close()
			err = fmt.Errorf("netstack: %w", err)
		}
	}()
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	w = &wire{conn: conn}
	if !shared {
		_ = conn.SetWriteBuffer(socketBuffer)
		_ = conn.SetReadBuffer(socketBuffer)
		w.out, w.in = newSender(raw), newReceiver(raw)
		return w, nil
	}
	if w.memory, err = takeMemory(conn); err != nil {
		return nil, err
	}
	w.out, w.in = newSender(raw), newReceiver(raw)
	w.out.ring, w.in.ring = w.memory.Ends(ring.Program)
	return w, nil
}

// takeMemory receives the descriptor of shared memory and maps it.
func takeMemory(conn *net.UnixConn) (*ring.Memory, error) {
	if err := conn.SetReadDeadline(time.Now().Add(acceptTime)); err != nil {
		return nil, err
	}
	defer conn.SetReadDeadline(time.Time{}) //nolint:errcheck // the connection is open
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(b[:], oob)
	if err != nil {
		return nil, fmt.Errorf("shared memory: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("shared memory: %d control messages, expected 1: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("shared memory: %d descriptors, expected 1: %w", len(fds), err)
	}
	defer unix.Close(fds[0])
	return ring.Map(fds[0])
}

// close ends both ways. The receiver must not be in use, the sender may.
func (w *wire) close() {
	w.out.gone.Store(true)
	w.conn.Close()
	w.out.mu.Lock()
	defer w.out.mu.Unlock()
	if w.memory != nil {
		w.memory.Release()
		w.memory = nil
	}
}

// report writes the counters where the engine finds them, if there is a place.
func (w *wire) report(s Stats) {
	if w == nil {
		return
	}
	w.out.mu.Lock()
	defer w.out.mu.Unlock()
	if w.memory != nil {
		s.Put(w.memory.Report())
	}
}

// sender sends to one engine.
type sender struct {
	raw  syscall.RawConn
	ring *ring.Producer // nil without shared memory
	gone atomic.Bool    // nothing may be sent any more

	mu     sync.Mutex // guards the following, and the memory of the ring
	header [headerLen]byte
	bufs   [][]byte
	write  func(fd uintptr) bool
	wake   func(fd uintptr) bool
}

func newSender(raw syscall.RawConn) *sender {
	s := &sender{raw: raw}
	s.write = func(fd uintptr) bool {
		for {
			_, err := unix.SendmsgBuffers(int(fd), s.bufs, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			if !errors.Is(err, unix.EINTR) {
				return !errors.Is(err, unix.EAGAIN) // the receiver notices a dead engine
			}
		}
	}
	s.wake = func(fd uintptr) bool {
		ringBell(int(fd))
		return true
	}
	return s
}

func (s *sender) send(p *stack.PacketBuffer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone.Load() {
		return // lost
	}
	s.header = virtioHeader(p)
	s.bufs = append(s.bufs[:0], s.header[:])
	s.bufs = append(s.bufs, p.AsSlices()...)
	if s.ring == nil {
		_ = s.raw.Write(s.write) // closed: lost
		return
	}
	slot, ok := s.reserve(headerLen + p.Size())
	if !ok {
		return
	}
	at := 0
	for _, b := range s.bufs {
		at += copy(slot.Bytes[at:], b)
	}
	if s.ring.Commit(slot) {
		_ = s.raw.Write(s.wake)
	}
}

// reserve waits until there is room, or the engine is gone.
func (s *sender) reserve(n int) (ring.Slot, bool) {
	if slot, ok := s.ring.Reserve(n); ok {
		return slot, true
	}
	for n <= ring.MaxPacket && !s.gone.Load() {
		time.Sleep(fullPause)
		if slot, ok := s.ring.Reserve(n); ok {
			return slot, true
		}
	}
	return ring.Slot{}, false
}

// looks is how often other goroutines get their turn before a receiver that has
// found nothing goes to sleep: to be woken costs both sides a system call.
const looks = 2

// nextShared is next, out of shared memory.
func (r *receiver) nextShared() (p *stack.PacketBuffer, head []byte, err error) {
	for look := 0; ; look++ {
		raw, ok, err := r.ring.Next()
		if err != nil {
			return nil, nil, err
		}
		if ok && len(raw) > headerLen {
			copy(r.header[:], raw)
			p, head = packetOf(raw[headerLen:])
		}
		if ok {
			r.ring.Release()
		}
		switch {
		case p != nil:
			return p, head, nil
		case ok:
			look = 0
		case look < looks:
			runtime.Gosched()
		case r.ring.Sleep():
			if err := r.raw.Read(r.wait); err != nil {
				return nil, nil, err
			}
			if r.err != nil {
				return nil, nil, r.err
			}
			r.ring.Awake()
			look = 0
		}
	}
}
