package encap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// recvSlots messages are received at once. A UDP_GRO message carries up to
	// 64 datagrams.
	recvSlots = 16
	slotLen   = 65536
	// slotStride keeps the first lines of all slots from falling into the same
	// cache sets, as a power of two would.
	slotStride = slotLen + 1152
	recvCtrl   = 64

	// Messages longer than grownLen have filled memory that is worth giving back
	// when nothing has come for restAfter.
	grownLen  = 4096
	restAfter = 5 * time.Second
)

// ErrClosed is returned by Recv after Shutdown or Close.
var ErrClosed = errors.New("encap: socket is closed")

// Message is one received buffer: a datagram, or several of one sender that
// the kernel merged.
type Message struct {
	// Data is borrowed until the next Recv into the batch. The receiver may
	// write to it.
	Data []byte
	// Source is the sender's IPv4 address, host byte order.
	Source uint32
	// SourcePort is the sender's UDP port.
	SourcePort uint16
	// SegmentLen is the length in bytes of each datagram in Data but the last,
	// which may be shorter. It is 0 when Data is one datagram.
	SegmentLen int
	// TOS is the outer type of service.
	TOS uint8
}

// RecvBatch holds the buffers of one recvmmsg. It belongs to one goroutine.
type RecvBatch struct {
	slab []byte // mapped, not Go heap
	hdrs [recvSlots]mmsghdr
	iovs [recvSlots]unix.Iovec
	srcs [recvSlots]rawSockaddr
	ctrl [recvSlots][recvCtrl]byte
	used int // headers the last call filled in
	// grown says that a message was longer than grownLen since the last Shrink.
	grown bool
}

// NewRecvBatch maps the buffers; Free unmaps them.
func NewRecvBatch() (*RecvBatch, error) {
	slab, err := unix.Mmap(-1, 0, recvSlots*slotStride, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("encap: map receive buffers: %w", err)
	}
	b := &RecvBatch{slab: slab, used: recvSlots}
	for i := range recvSlots {
		b.iovs[i] = unix.Iovec{Base: &slab[i*slotStride], Len: slotLen}
		h := &b.hdrs[i].hdr
		h.Name = (*byte)(unsafe.Pointer(&b.srcs[i]))
		h.Iov, h.Iovlen = &b.iovs[i], 1
		h.Control = &b.ctrl[i][0]
	}
	return b, nil
}

// Free unmaps the buffers. The batch and every Message of it are dead then.
func (b *RecvBatch) Free() error {
	if b.slab == nil {
		return nil
	}
	err := unix.Munmap(b.slab)
	b.slab = nil
	return err
}

// Grown reports whether the buffers hold memory that Shrink would give back.
func (b *RecvBatch) Grown() bool { return b.grown }

// Shrink gives the memory of the buffers back to the system, with every Message
// of the batch. The next call takes it anew as it needs it.
func (b *RecvBatch) Shrink() {
	b.used, b.grown = 0, false
	_ = unix.Madvise(b.slab, unix.MADV_DONTNEED) // it cannot fail on a mapping of our own
}

// Recv blocks until at least one message is there and returns how many came.
// While it waits for long, the batch gives back what it has grown by. It returns
// ErrClosed after Shutdown; any other error is permanent.
func (s *Socket) Recv(b *RecvBatch) (int, error) {
	for {
		if b.grown != s.impatient {
			s.setImpatient(b.grown)
		}
		b.prepare()
		n, _, e := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&b.hdrs[0])), recvSlots, unix.MSG_WAITFORONE, 0, 0)
		if done, err := s.received(b, int(n), e); done {
			return b.used, err
		}
		if e == unix.EAGAIN {
			b.Shrink()
		}
	}
}

// setImpatient lets a Recv that waits return after a while, or never.
func (s *Socket) setImpatient(on bool) {
	var limit unix.Timeval
	if on {
		limit = unix.NsecToTimeval(int64(s.restAfter))
	}
	_ = unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit) // else the memory stays
	s.impatient = on
}

// TryRecv is Recv without waiting: it returns 0 when there is no message.
func (s *Socket) TryRecv(b *RecvBatch) (int, error) {
	b.prepare()
	// The call does not block, so the scheduler need not know.
	n, _, e := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&b.hdrs[0])), recvSlots, unix.MSG_DONTWAIT, 0, 0)
	if done, err := s.received(b, int(n), e); done {
		return b.used, err
	}
	return 0, nil
}

// FD returns the descriptor, to wait on.
func (s *Socket) FD() int { return s.fd }

// prepare resets what the last call wrote.
func (b *RecvBatch) prepare() {
	for i := range b.used {
		h := &b.hdrs[i].hdr
		h.Namelen = unix.SizeofSockaddrInet4
		h.SetControllen(recvCtrl)
	}
}

// received takes the outcome of a call: done, with the number of messages in
// b.used, or to be tried again.
func (s *Socket) received(b *RecvBatch, n int, e syscall.Errno) (done bool, err error) {
	b.used = 0
	switch {
	case s.closing.Load():
		// A woken call may claim messages of length 0: only the flag counts.
		return true, ErrClosed
	case e == 0:
		b.used = n
		for i := 0; i < n && !b.grown; i++ {
			b.grown = b.hdrs[i].len > grownLen
		}
		return true, nil
	case e == unix.EINTR || e == unix.EAGAIN || e == unix.ECONNREFUSED || e == unix.ENOMEM || e == unix.ENOBUFS:
		// ECONNREFUSED is the ICMP answer to some earlier send: nobody is there.
		return false, nil
	}
	return true, fmt.Errorf("encap: receive: %w", e)
}

// Full reports whether the last call may have left messages in the socket.
func (b *RecvBatch) Full() bool { return b.used == recvSlots }

// Message returns message i of the last Recv.
func (b *RecvBatch) Message(i int) Message {
	h := &b.hdrs[i]
	m := Message{
		Data:       b.slab[i*slotStride:][:h.len:h.len],
		Source:     binary.BigEndian.Uint32(b.srcs[i].Addr[:]),
		SourcePort: binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&b.srcs[i].Port))[:]),
	}
	ctrl := b.ctrl[i][:min(int(h.hdr.Controllen), recvCtrl)]
	for len(ctrl) >= unix.SizeofCmsghdr {
		cm := (*unix.Cmsghdr)(unsafe.Pointer(&ctrl[0]))
		size := int(cm.Len)
		if size < unix.SizeofCmsghdr || size > len(ctrl) {
			break
		}
		data := ctrl[unix.SizeofCmsghdr:size]
		switch {
		case cm.Level == unix.IPPROTO_UDP && cm.Type == unix.UDP_GRO && len(data) >= 4:
			m.SegmentLen = int(*(*int32)(unsafe.Pointer(&data[0])))
		case cm.Level == unix.IPPROTO_IP && cm.Type == unix.IP_TOS && len(data) >= 1:
			m.TOS = data[0]
		}
		ctrl = ctrl[min(unix.CmsgSpace(size-unix.SizeofCmsghdr), len(ctrl)):]
	}
	if m.SegmentLen <= 0 || m.SegmentLen >= len(m.Data) {
		m.SegmentLen = 0
	}
	return m
}
