package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	etherLen  = 14
	etherIPv4 = 0x0800
	// maxHdr is the longest header before a packet: virtio and Ethernet.
	maxHdr = vnetHdrLen + etherLen
)

// ErrGone is returned when the device has been deleted under the queue.
var ErrGone = errors.New("tun: the device has been deleted")

// Queue is one queue of a TUN device, or a socket that stands in for one.
// TryRead may be used by one goroutine at a time, writing by any number at once.
type Queue struct {
	fd   int
	rung Offload
	// hdr bytes stand before every packet: the virtio header and, on a packet
	// socket, an Ethernet header; ether is what we write there.
	hdr   int
	ether [etherLen]byte
	// refused counts writes that the kernel counted as dropped by the device.
	refused atomic.Uint64
	// noGSO is set when the kernel refuses super-packets on write.
	noGSO atomic.Bool
	// writev is the system call, a field so that a test can script errors.
	writev func(fd int, iovs []unix.Iovec) syscall.Errno
	// ring, unless nil, carries the packets; fd is then the socket that the two
	// sides wake each other by.
	ring *ringEnd
}

func newQueue(fd int, rung Offload) *Queue {
	return &Queue{fd: fd, rung: rung, hdr: vnetHdrLen, writev: writev}
}

// FDConfig describes a descriptor that somebody else opened.
type FDConfig struct {
	// Ethernet says that the descriptor is a packet socket with
	// PACKET_VNET_HDR, bound to one end of a veth pair, instead of a TUN queue
	// or a socket pair that carries virtio header and packet.
	Ethernet bool
	// Self and Peer are the Ethernet source and destination of what is written
	// to a packet socket.
	Self, Peer [6]byte
	// Offload is the rung the other side takes: OffloadNone for one that does
	// not know super-packets.
	Offload Offload
	// Ring, unless nil, is memory shared with the program on the other side of the
	// descriptor, a SEQPACKET socket. It carries the packets as the socket would. A
	// Queue holds it until Close; Queues of one Ring follow each other.
	Ring *Ring
}

// QueueFromFD makes a Queue of an open descriptor and takes ownership of it.
// The descriptor is made non-blocking.
func QueueFromFD(fd int, c FDConfig) (*Queue, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("tun: descriptor %d: %w", fd, err)
	}
	q := newQueue(fd, min(c.Offload, OffloadFull))
	if c.Ring != nil {
		c.Ring.memory.Hold()
		q.ring = &ringEnd{Ring: c.Ring}
	}
	if c.Ethernet {
		q.hdr = maxHdr
		copy(q.ether[0:], c.Peer[:])
		copy(q.ether[6:], c.Self[:])
		binary.BigEndian.PutUint16(q.ether[12:], etherIPv4)
	}
	return q, nil
}

// FD returns the descriptor, to wait on. It becomes readable when TryRead would
// find a packet, and reports an error when the device is gone.
func (q *Queue) FD() int { return q.fd }

// Offload returns the rung the queue takes super-packets up to.
func (q *Queue) Offload() Offload { return q.rung }

// Close closes the descriptor. No read or write may be running or follow.
func (q *Queue) Close() error {
	if q.ring != nil {
		q.ring.memory.Release()
	}
	return unix.Close(q.fd)
}

// TryRead drains the queue without blocking until it is empty or the batch is
// full. An empty batch means that there was nothing. It returns ErrGone when
// the device was deleted or the other side closed.
func (q *Queue) TryRead(b *ReadBatch) error {
	b.Clear()
	if q.ring != nil {
		return q.readRing(b)
	}
	for at := 0; b.n < maxRead && b.fits(at); {
		start := at + max(Headroom-q.hdr, 0)
		buf := b.slab[start:]
		// The descriptor does not block, so the scheduler need not know.
		n, _, e := unix.RawSyscall(unix.SYS_READ, uintptr(q.fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(q.hdr+maxPacket))
		switch {
		case e == 0 && int(n) > q.hdr:
			at = b.take(start, int(n), q.hdr)
		case e == 0 && n > 0, e == unix.EINTR:
			// Too short to be a packet.
		case e == unix.EAGAIN, e == unix.ENETDOWN, b.n > 0:
			// ENETDOWN: a packet socket whose link is down for now. With
			// packets in hand, the next call meets the error again.
			return nil
		default:
			return ErrGone
		}
	}
	return nil
}

func writev(fd int, iovs []unix.Iovec) syscall.Errno {
	for {
		_, _, e := unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&iovs[0])), uintptr(len(iovs)))
		if e != unix.EINTR {
			return e
		}
	}
}

// put writes one packet. Of what it refuses, the kernel counts in the device's
// rx_dropped all that it did not find malformed (tun_get_user of drivers/net/tun.c).
func (q *Queue) put(iovs []unix.Iovec) syscall.Errno {
	if q.ring != nil {
		return q.writeRing(iovs)
	}
	e := q.writev(q.fd, iovs)
	if e != 0 && e != unix.EINVAL && e != unix.EAGAIN {
		q.refused.Add(1)
	}
	return e
}

// link writes what stands before a packet to b, which holds q.hdr bytes.
func (q *Queue) link(h *vnetHdr, b []byte) {
	if q.hdr > vnetHdrLen {
		if h.flags&needsCsum != 0 {
			h.csumStart += etherLen
		}
		if h.hdrLen != 0 {
			h.hdrLen += etherLen
		}
		copy(b[vnetHdrLen:], q.ether[:])
	}
	h.encode(b)
}

// Scratch is what writing needs beside the packet. It belongs to one goroutine.
type Scratch struct {
	hdr  [maxHdr]byte
	iovs [3]unix.Iovec
}

// WritePacket writes one complete IPv4 packet.
func (q *Queue) WritePacket(pkt []byte) error { return q.write(new(Scratch), vnetHdr{}, pkt, nil) }

// Forward writes a packet as it was read from another queue, in two pieces of
// which the second may be empty; the zero Header is that of a complete packet. A
// super-packet needs a queue that takes it.
func (q *Queue) Forward(s *Scratch, h *Header, head, tail []byte) error {
	v := h.vnet
	if v.gsoType != gsoNone && v.hdrLen != 0 {
		v.hdrLen = uint16(min(int(v.hdrLen), len(head)+len(tail)))
	}
	return q.write(s, v, head, tail)
}

func (q *Queue) write(s *Scratch, h vnetHdr, head, tail []byte) error {
	q.link(&h, s.hdr[:q.hdr])
	s.iovs = [3]unix.Iovec{
		{Base: &s.hdr[0], Len: uint64(q.hdr)},
		{Base: unsafe.SliceData(head), Len: uint64(len(head))},
		{Base: unsafe.SliceData(tail), Len: uint64(len(tail))},
	}
	n := 3
	if len(tail) == 0 {
		n = 2
	}
	if e := q.put(s.iovs[:n]); e != 0 {
		return e
	}
	return nil
}
