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

var (
	// ErrClosed is returned by Read after Wake.
	ErrClosed = errors.New("tun: queue is closed")
	// ErrGone is returned when the device has been deleted under the queue.
	ErrGone = errors.New("tun: the device has been deleted")
)

// Packet is one packet of a ReadBatch.
type Packet struct {
	Header
	off, len uint32
}

// ReadBatch holds what one Read drained from a queue. It belongs to one goroutine.
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

// Packets returns what the last Read brought, borrowed until the next Read.
func (b *ReadBatch) Packets() []Packet { return b.packets[:b.n] }

// Bytes returns the packet with room bytes before it, at most Headroom, to
// write a prefix to. The slice is borrowed until the next Read.
func (b *ReadBatch) Bytes(p *Packet, room int) []byte {
	return b.slab[int(p.off)-room : p.off+p.len : p.off+p.len]
}

// Load puts packets into the batch as a Read would, each with its virtio
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

// Queue is one queue of a TUN device. Read may be used by one goroutine, Write
// by any number at the same time.
type Queue struct {
	fd   int
	wake int // eventfd
	// noGSO is set when the kernel refuses super-packets on write.
	noGSO atomic.Bool
	// writev is the system call, a field so that a test can script errors.
	writev func(fd int, iovs []unix.Iovec) syscall.Errno
}

func newQueue(fd int) (*Queue, error) {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("tun: eventfd: %w", err)
	}
	return &Queue{fd: fd, wake: wake, writev: writev}, nil
}

// Read blocks until there is at least one packet, then drains the queue
// without blocking until it is empty or the batch is full. It returns
// ErrClosed after Wake and ErrGone when the device was deleted.
func (q *Queue) Read(b *ReadBatch) error {
	for {
		if err := q.drain(b); err != nil || b.n > 0 {
			return err
		}
		if err := q.wait(); err != nil {
			return err
		}
	}
}

func (q *Queue) drain(b *ReadBatch) error {
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

// wait blocks until the queue is readable or Wake is called.
func (q *Queue) wait() error {
	fds := [2]unix.PollFd{{Fd: int32(q.fd), Events: unix.POLLIN}, {Fd: int32(q.wake), Events: unix.POLLIN}}
	for {
		_, _, e := unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), uintptr(len(fds)), 0, 0, 0, 0)
		switch {
		case e == unix.EINTR:
			continue
		case e != 0:
			return fmt.Errorf("tun: poll: %w", e)
		case fds[1].Revents != 0:
			return ErrClosed
		case fds[0].Revents&(unix.POLLERR|unix.POLLHUP|unix.POLLNVAL) != 0:
			return ErrGone
		}
		return nil
	}
}

// Wake makes a blocked or later Read return ErrClosed.
func (q *Queue) Wake() {
	one := [8]byte{7: 1, 0: 1}
	_, _ = unix.Write(q.wake, one[:])
}

func (q *Queue) close() error {
	unix.Close(q.wake)
	return unix.Close(q.fd)
}

func writev(fd int, iovs []unix.Iovec) syscall.Errno {
	for {
		_, _, e := unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&iovs[0])), uintptr(len(iovs)))
		if e != unix.EINTR {
			return e
		}
	}
}
