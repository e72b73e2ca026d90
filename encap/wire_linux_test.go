package encap

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// datagram is one segment as the kernel would put it on the wire.
type datagram struct {
	dst  netip.AddrPort
	tos  uint8
	data string
}

// sent is one message as it was handed to the kernel.
type sent struct {
	dst       netip.AddrPort
	tos       uint8
	segLen    int // of UDP_SEGMENT, or 0
	data      []byte
	pieces    int
	datagrams []datagram
}

// failer is what *testing.T and *rapid.T have in common here.
type failer interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// wire stands in for the kernel behind a socket.
type wire struct {
	t failer
	// answer decides what becomes of a message; nil accepts everything.
	answer func(m *sent) syscall.Errno
	// limit is how many messages one call takes; 0 means all.
	limit int
	// interrupt makes every other call fail with EINTR.
	interrupt bool
	calls     int
	tried     []sent // every message that was looked at
	datagrams []datagram
}

func newWire(t failer) (*wire, *Socket) {
	w := &wire{t: t}
	s := &Socket{fd: -1, sendmmsg: w.sendmmsg}
	s.hasGSO = true
	s.gso.Store(true)
	return w, s
}

// sendmmsg stops at the first refused message, as the system call does: the
// error is reported only when it is the first.
func (w *wire) sendmmsg(fd int, msgs []mmsghdr) (int, syscall.Errno) {
	w.calls++
	if w.interrupt && w.calls%2 == 1 {
		return -1, unix.EINTR
	}
	for i := range msgs {
		if w.limit > 0 && i == w.limit {
			return i, 0
		}
		m := w.decode(&msgs[i].hdr)
		w.tried = append(w.tried, m)
		if w.answer != nil {
			if e := w.answer(&m); e != 0 {
				if i > 0 {
					w.tried = w.tried[:len(w.tried)-1] // it comes again
					return i, 0
				}
				return -1, e
			}
		}
		w.datagrams = append(w.datagrams, m.datagrams...)
	}
	return len(msgs), 0
}

// decode reads a msghdr with the standard tools and holds it to the kernel's rules.
func (w *wire) decode(h *unix.Msghdr) sent {
	w.t.Helper()
	if h.Namelen != unix.SizeofSockaddrInet4 {
		w.t.Fatalf("address of %d bytes", h.Namelen)
	}
	sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(h.Name))
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
	m := sent{dst: netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), port), pieces: int(h.Iovlen)}
	if sa.Family != unix.AF_INET || m.pieces == 0 || m.pieces > 1024 {
		w.t.Fatalf("family %d, %d pieces", sa.Family, m.pieces)
	}
	for _, v := range unsafe.Slice(h.Iov, h.Iovlen) {
		m.data = append(m.data, unsafe.Slice(v.Base, v.Len)...)
	}
	if h.Controllen > 0 {
		cms, err := unix.ParseSocketControlMessage(unsafe.Slice(h.Control, h.Controllen))
		if err != nil {
			w.t.Fatalf("control messages: %v", err)
		}
		for _, cm := range cms {
			switch {
			case cm.Header.Level == unix.IPPROTO_UDP && cm.Header.Type == unix.UDP_SEGMENT && len(cm.Data) >= 2:
				m.segLen = int(binary.NativeEndian.Uint16(cm.Data))
			case cm.Header.Level == unix.IPPROTO_IP && cm.Header.Type == unix.IP_TOS && len(cm.Data) >= 4:
				m.tos = uint8(binary.NativeEndian.Uint32(cm.Data))
			default:
				w.t.Fatalf("control message %+v", cm)
			}
		}
	}
	if len(m.data) > 65507 {
		w.t.Errorf("a message of %d bytes", len(m.data))
	}
	parts := [][]byte{m.data}
	if m.segLen > 0 {
		parts = slices.Collect(slices.Chunk(m.data, m.segLen))
		if len(parts) < 2 || len(parts) > 64 {
			w.t.Errorf("a message of %d segments", len(parts))
		}
	}
	for _, p := range parts {
		m.datagrams = append(m.datagrams, datagram{m.dst, m.tos, string(p)})
	}
	return m
}

var (
	destA = netip.MustParseAddrPort("192.0.2.1:8285")
	destB = netip.MustParseAddrPort("192.0.2.2:8472")
)

// seg is a segment to add: its contents tell it apart from all others.
type seg struct {
	dst  *Dest
	tos  uint8
	size int
	// head is how many of its bytes are in the first piece; 0 means all.
	head int
}

func (s seg) bytes(i int) []byte {
	b := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, s.size/2+1)[:s.size]
	return b
}

// load adds segments with their positions as tags and returns the datagrams
// they should become.
func load(t testing.TB, b *SendBatch, segs ...seg) []datagram {
	t.Helper()
	var want []datagram
	for i, s := range segs {
		data := s.bytes(i)
		head, tail := data, []byte(nil)
		if s.head > 0 && s.head < s.size {
			head, tail = bytes.Clone(data[:s.head]), bytes.Clone(data[s.head:])
		}
		if !b.Add(s.dst, s.tos, uint64(i), head, tail) {
			t.Fatalf("segment %d does not fit", i)
		}
		want = append(want, datagram{s.dst.Endpoint(), s.tos, string(data)})
	}
	return want
}

func repeat(n int, s seg) []seg { return slices.Repeat([]seg{s}, n) }

func total(r *SendResult) (c Count) {
	c = r.Sent
	for _, f := range r.Failed {
		c.add(f.Segments, f.Bytes)
	}
	return c
}
