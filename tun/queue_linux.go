package tun

import (
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Headroom is the number of writable bytes before every packet of a
// ReadBatch: room for the prefix of any framing.
const Headroom = 22

const (
	// maxRead packets, or as many super-packets as the slab holds, are read at
	// once.
	maxRead = 64
	slabLen = 8*(maxPacket+1) + 64*1024
)

// ErrGone is returned when the device has been deleted under the queue.
var ErrGone = errors.New("tun: the device has been deleted")

// Packet is one packet of a ReadBatch.
type Packet struct {
	Header
	off, len uint32
}

// ReadBatch holds what one TryRead drained from a queue. It belongs to one goroutine.
type ReadBatch struct {
	slab    []byte // mapped, not Go heap
	packets [maxRead]Packet
	n       int
}

// NewReadBatch maps the buffer; Free unmaps it.
func NewReadBatch() (*ReadBatch, error) {
	slab, err := unix.Mmap(-1, 0, slabLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("tun: map read buffer: %w", err)
	}
	return &ReadBatch{slab: slab}, nil
}

// Free unmaps the buffer. The batch and every slice of it are dead then.
func (b *ReadBatch) Free() error {
	if b.slab == nil {
		return nil
	}
	err := unix.Munmap(b.slab)
	b.slab = nil
	return err
}

// Packets returns what the last TryRead brought, borrowed until the next.
func (b *ReadBatch) Packets() []Packet { return b.packets[:b.n] }

// Bytes returns the packet with room bytes before it, at most Headroom, to
// write a prefix to. The slice is borrowed until the next
// TryRead.
func (b *ReadBatch) Bytes(p *Packet, room int) []byte {
	return b.slab[int(p.off)-room : p.off+p.len : p.off+p.len]
}

// Full reports whether the last TryRead may have left packets in the queue.
func (b *ReadBatch) Full() bool {
	return b.n == maxRead || len(b.slab)-b.end() < Headroom+maxPacket
}

// Size returns the bytes of all packets, gaps included.
func (b *ReadBatch) Size() int { return b.end() }

func (b *ReadBatch) end() int {
	if b.n == 0 {
		return 0
	}
	p := &b.packets[b.n-1]
	return int(p.off + p.len)
}

// Load puts packets into the batch as a TryRead would, each with its virtio
// header in front; for tests of what consumes a batch.
func (b *ReadBatch) Load(raw ...[]byte) {
	b.n = 0
	at := 0
	for _, r := range raw {
		copy(b.slab[at+Headroom-vnetHdrLen:], r)
		at = b.take(at, len(r))
	}
}

// take enters a packet that was read, virtio header first, into the slab at
// at + Headroom - vnetHdrLen, and returns where the next one may start.
func (b *ReadBatch) take(at, n int) int {
	off := at + Headroom
	p := &b.packets[b.n]
	p.vnet.decode(b.slab[off-vnetHdrLen:])
	p.off, p.len = uint32(off), uint32(n-vnetHdrLen)
	b.n++
	// The next packet's headroom begins right behind this packet, so that
	// prefix and packet of a train lie in memory as one run.
	return off + n - vnetHdrLen
}

// Queue is one queue of a TUN device. TryRead may be used by one goroutine at a
// time, Write by any number at once.
type Queue struct {
	fd int
	// noGSO is set when the kernel refuses super-packets on write.
	noGSO atomic.Bool
	// writev is the system call, a field so that a test can script errors.
	writev func(fd int, iovs []unix.Iovec) syscall.Errno
}

func newQueue(fd int) *Queue { return &Queue{fd: fd, writev: writev} }

// FD returns the descriptor, to wait on. It becomes readable when TryRead would
// find a packet, and reports an error when the device is gone.
func (q *Queue) FD() int { return q.fd }

// TryRead drains the queue without blocking until it is empty or the batch is
// full. An empty batch means that there was nothing. It returns ErrGone when
// the device was deleted.
func (q *Queue) TryRead(b *ReadBatch) error {
	b.n = 0
	for at := 0; b.n < maxRead && len(b.slab)-at >= Headroom+maxPacket; {
		buf := b.slab[at+Headroom-vnetHdrLen:]
		// The descriptor does not block, so the scheduler need not know.
		n, _, e := unix.RawSyscall(unix.SYS_READ, uintptr(q.fd), uintptr(unsafe.Pointer(&buf[0])), vnetHdrLen+maxPacket)
		switch e {
		case 0:
			if n > vnetHdrLen {
				at = b.take(at, int(n))
			}
		case unix.EINTR:
		case unix.EAGAIN:
			return nil
		default:
			if b.n > 0 {
				return nil // the next call meets the error again
			}
			return ErrGone
		}
	}
	return nil
}

func (q *Queue) close() error { return unix.Close(q.fd) }

func writev(fd int, iovs []unix.Iovec) syscall.Errno {
	for {
		_, _, e := unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&iovs[0])), uintptr(len(iovs)))
		if e != unix.EINTR {
			return e
		}
	}
}
