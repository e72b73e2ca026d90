package tun

import (
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"tweed/tun/ring"
)

// headersLen is how much of a packet is copied out of a ring at once, in bytes, to
// be looked at: the longest headers of IPv4 and TCP, 60 bytes each, and so those
// of every protocol that anything is looked at of.
const headersLen = 128

// RingSize is how many bytes of memory a Ring takes when all of it has been used.
const RingSize = ring.Size

// Ring is memory that carries packets to and from a program, the engine's side.
type Ring struct {
	memory *ring.Memory
	out    *ring.Producer
	in     *ring.Consumer
}

// NewRing makes the memory and returns a descriptor of it for the program.
func NewRing() (*Ring, int, error) {
	m, fd, err := ring.New()
	if err != nil {
		return nil, -1, err
	}
	r := &Ring{memory: m}
	r.out, r.in = m.Ends(ring.Engine)
	return r, fd, nil
}

// Report returns what the program says of itself. It may be used until Close.
func (r *Ring) Report() *ring.Report { return r.memory.Report() }

// Close lets go of the memory once no Queue holds it.
func (r *Ring) Close() { r.memory.Release() }

// ringEnd is a Ring in use by a Queue.
type ringEnd struct {
	*Ring
	// dead is set when the other side has gone: nobody would read what is written.
	dead atomic.Bool
}

func (r *ringEnd) die() error {
	r.dead.Store(true)
	return ErrGone
}

// HasRing reports whether packets come through shared memory. The descriptor then
// becomes readable only after Sleep.
func (q *Queue) HasRing() bool { return q.ring != nil }

// Sleep asks the other side to make the descriptor readable when there is a
// packet. It reports false when there is one already.
func (q *Queue) Sleep() bool { return q.ring.in.Sleep() }

// Rung takes note that the descriptor became readable. It returns ErrGone when the
// other side has closed its end.
func (q *Queue) Rung() error {
	var b [1]byte
	n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(q.fd), uintptr(unsafe.Pointer(&b[0])), 1, unix.MSG_DONTWAIT, 0, 0)
	if e == unix.EAGAIN || e == unix.EINTR || e == 0 && n > 0 {
		q.ring.in.Awake()
		return nil
	}
	return q.ring.die()
}

// readRing is TryRead. The packets' tails stay where they are.
func (q *Queue) readRing(b *ReadBatch) error {
	for at := 0; b.n < maxRead && b.fits(at); {
		raw, ok, err := q.ring.in.Next()
		if ok && (len(raw) <= q.hdr || len(raw) > q.hdr+maxPacket) {
			// No packet. A program that writes nothing else could keep us here for
			// as long as it likes if it was passed over.
			ok, err = false, ring.ErrCorrupt
		}
		if err != nil && b.n == 0 {
			return q.ring.die()
		}
		if !ok {
			break
		}
		b.lender = q.ring
		start := at + Headroom - q.hdr
		head := copy(b.slab[start:], raw[:min(len(raw), q.hdr+headersLen)])
		at = b.take(start, len(raw), q.hdr)
		if head < len(raw) {
			b.packets[b.n-1].tail = &raw[head]
		}
	}
	if b.n == 0 {
		b.GiveBack()
	}
	return nil
}

// writeRing copies the pieces of one packet into the ring, and wakes the other
// side when it sleeps.
func (q *Queue) writeRing(iovs []unix.Iovec) syscall.Errno {
	size := 0
	for i := range iovs {
		size += int(iovs[i].Len)
	}
	if q.ring.dead.Load() {
		return unix.EPIPE
	}
	s, ok := q.ring.out.Reserve(size)
	if !ok {
		return unix.ENOBUFS
	}
	at := 0
	for i := range iovs {
		at += copy(s.Bytes[at:], unsafe.Slice(iovs[i].Base, iovs[i].Len))
	}
	if q.ring.out.Commit(s) {
		q.ringBell()
	}
	return 0
}

// ringBell wakes the other side. When the socket is full, it has been woken.
func (q *Queue) ringBell() {
	b := [1]byte{1}
	_, _, _ = unix.RawSyscall6(unix.SYS_SENDTO, uintptr(q.fd), uintptr(unsafe.Pointer(&b[0])), 1, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
}
