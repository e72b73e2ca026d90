package netstack

import (
	"errors"
	"io"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"tweed/tun/ring"
)

const (
	// headSize bytes of every packet are received into memory of their own. All
	// headers are among them: to look at a header, gVisor copies the memory that
	// it is in when a clone of the packet has it as well.
	headSize = 256
	// keepFrom is how many further bytes a packet must have to keep the memory it
	// was received into. Fewer are copied, or small packets that wait in a queue
	// would hold many times their size.
	keepFrom = 16 << 10
)

// receiver reads the packets of one engine. It is used by one goroutine.
type receiver struct {
	raw    syscall.RawConn
	ring   *ring.Consumer // nil without shared memory
	header [headerLen]byte
	// head and rest are where the next packet goes, of headSize and
	// maxPacket-headSize bytes.
	head, rest *buffer.View
	bufs       [][]byte
	size       int
	err        error
	read, wait func(fd uintptr) bool
}

func newReceiver(raw syscall.RawConn) *receiver {
	r := &receiver{raw: raw, bufs: make([][]byte, 3)}
	r.read = func(fd uintptr) bool {
		for {
			r.size, r.err = unix.Readv(int(fd), r.bufs)
			if !errors.Is(r.err, unix.EINTR) {
				return !errors.Is(r.err, unix.EAGAIN)
			}
		}
	}
	bells := make([]byte, 1)
	r.wait = func(fd uintptr) bool {
		for {
			n, e := recv(int(fd), bells, 0)
			switch {
			case e == unix.EINTR:
				continue
			case e == unix.EAGAIN:
				return false
			case e != 0:
				r.err = e
			case n == 0:
				r.err = io.EOF
			}
			return true
		}
	}
	return r
}

// next waits for a packet. Its header is in r.header until the next call; head
// is the packet's beginning.
func (r *receiver) next() (p *stack.PacketBuffer, head []byte, err error) {
	if r.ring != nil {
		return r.nextShared()
	}
	if r.head == nil {
		r.head = buffer.NewViewSize(headSize)
	}
	if r.rest == nil {
		r.rest = buffer.NewViewSize(maxPacket - headSize)
	}
	r.bufs[0], r.bufs[1], r.bufs[2] = r.header[:], r.head.AsSlice(), r.rest.AsSlice()
	if err := r.raw.Read(r.read); err != nil {
		return nil, nil, err
	}
	if r.err != nil {
		return nil, nil, r.err
	}
	if r.size == 0 {
		return nil, nil, io.EOF
	}
	return r.take(max(r.size-headerLen, 0))
}

// take makes a packet of the first size bytes received.
func (r *receiver) take(size int) (*stack.PacketBuffer, []byte, error) {
	v := r.head
	r.head = nil
	v.CapLength(size)
	head := v.AsSlice()
	payload := buffer.MakeWithView(v)
	switch more := size - headSize; {
	case more >= keepFrom:
		r.rest.CapLength(more)
		_ = payload.Append(r.rest)
		r.rest = nil
	case more > 0:
		_ = payload.Append(buffer.NewViewWithData(r.rest.AsSlice()[:more]))
	}
	return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: payload}), head, nil
}

// packetOf copies a packet, its headers into memory of their own.
func packetOf(raw []byte) (*stack.PacketBuffer, []byte) {
	n := headersOf(raw)
	v := buffer.NewViewWithData(raw[:n])
	head := v.AsSlice()
	payload := buffer.MakeWithView(v)
	if n < len(raw) {
		// Append would fill up the chunk of the headers.
		rest := buffer.MakeWithView(buffer.NewViewWithData(raw[n:]))
		payload.Merge(&rest)
	}
	return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: payload}), head
}

// headersOf is the length of the headers of a packet, at most all of it.
func headersOf(raw []byte) int {
	if len(raw) < header.IPv4MinimumSize {
		return len(raw)
	}
	ip := header.IPv4(raw)
	n := int(ip.HeaderLength())
	switch ip.TransportProtocol() {
	case header.TCPProtocolNumber:
		if len(raw) >= n+header.TCPMinimumSize {
			n += int(header.TCP(raw[n:]).DataOffset())
		}
	default:
		n += header.UDPMinimumSize // echo's are as long
	}
	return min(max(n, header.IPv4MinimumSize), len(raw))
}
