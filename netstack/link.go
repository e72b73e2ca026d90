package netstack

import (
	"encoding/binary"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// headerLen is struct virtio_net_hdr, before every packet to and from the
// engine (include/uapi/linux/virtio_net.h). Its fields are in host byte order.
const (
	headerLen = 10

	flagsAt      = 0
	gsoTypeAt    = 1
	headerLenAt  = 2
	gsoSizeAt    = 4
	csumStartAt  = 6
	csumOffsetAt = 8
)

// link is the stack's interface: it carries packets, TCP super-packets among
// them, to and from the engine's socket. While there is no engine they are
// lost, as on a link that is down.
type link struct {
	mtu, gso   uint32 // bytes
	dispatcher atomic.Pointer[stack.NetworkDispatcher]
	out        atomic.Pointer[sender]
	lost       atomic.Uint64 // packets that met no engine
	// trusted says that the checksums of the packet being delivered need no look.
	trusted atomic.Bool
}

// MTU implements stack.LinkEndpoint, as the following methods do.
func (l *link) MTU() uint32 { return l.mtu }

// SetMTU does nothing: the overlay's MTU is the engine's to say.
func (l *link) SetMTU(uint32) {}

func (l *link) MaxHeaderLength() uint16              { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress       { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)     {}
func (l *link) IsAttached() bool                     { return l.dispatcher.Load() != nil }
func (l *link) Wait()                                {}
func (l *link) AddHeader(*stack.PacketBuffer)        {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool { return true }
func (l *link) Close()                               {}
func (l *link) SetOnCloseAction(func())              {}

func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

// Capabilities implements stack.LinkEndpoint. The stack asks for each packet that
// it receives, from the goroutine that delivers it, and looks at RX checksum
// offload nowhere else: so it verifies the packets that are not trusted, and
// counts and drops the bad ones.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	if l.trusted.Load() {
		return stack.CapabilityRXChecksumOffload
	}
	return stack.CapabilityNone
}

// GSOMaxSize implements stack.GSOEndpoint.
func (l *link) GSOMaxSize() uint32 { return l.gso }

// SupportedGSO implements stack.GSOEndpoint.
func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.gso == 0 {
		return stack.GSONotSupported
	}
	return stack.HostGSOSupported
}

func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}

// WritePackets sends to the engine, and waits for it when it has no room: the
// engine always reads on.
func (l *link) WritePackets(packets stack.PacketBufferList) (int, tcpip.Error) {
	list := packets.AsSlice()
	out := l.out.Load()
	if out == nil {
		l.lost.Add(uint64(len(list)))
		return len(list), nil
	}
	for _, p := range list {
		out.send(p)
	}
	return len(list), nil
}

// deliver hands a packet of the engine to the stack, which takes it over.
func (l *link) deliver(h *[headerLen]byte, p *stack.PacketBuffer, head []byte) {
	defer p.DecRef()
	d := l.dispatcher.Load()
	if d == nil || len(head) == 0 || head[0]>>4 != 4 {
		return
	}
	l.trusted.Store(isPartial(h, head))
	(*d).DeliverNetworkPacket(header.IPv4ProtocolNumber, p)
	l.trusted.Store(false)
}

// isPartial says whether a packet was never on a wire, as between containers of
// tweed nodes or after the engine has merged segments, which it verified: its
// transport checksum is still missing, as h says. head holds its headers. What
// does not fit together is left to the stack to refuse.
func isPartial(h *[headerLen]byte, head []byte) bool {
	if h[flagsAt]&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 || len(head) < header.IPv4MinimumSize {
		return false
	}
	ip := header.IPv4(head)
	length := int(ip.HeaderLength())
	if length < header.IPv4MinimumSize || length > len(head) || !ip.IsChecksumValid() || ip.More() || ip.FragmentOffset() != 0 {
		return false
	}
	start, offset := int(binary.NativeEndian.Uint16(h[csumStartAt:])), binary.NativeEndian.Uint16(h[csumOffsetAt:])
	switch ip.TransportProtocol() {
	case header.TCPProtocolNumber:
		return start == length && offset == header.TCPChecksumOffset
	case header.UDPProtocolNumber:
		return start == length && offset == udpChecksumOffset
	}
	return false
}

// udpChecksumOffset is that of the checksum in a UDP header (RFC 768).
const udpChecksumOffset = 6

// virtioHeader says what of the packet is left to the engine.
func virtioHeader(p *stack.PacketBuffer) (h [headerLen]byte) {
	g := &p.GSOOptions
	if g.Type != stack.GSOTCPv4 || !g.NeedsCsum {
		return h
	}
	h[flagsAt] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	binary.NativeEndian.PutUint16(h[csumStartAt:], g.L3HdrLen)
	binary.NativeEndian.PutUint16(h[csumOffsetAt:], g.CsumOffset)
	if p.Data().Size() > int(g.MSS) {
		h[gsoTypeAt] = unix.VIRTIO_NET_HDR_GSO_TCPV4
		binary.NativeEndian.PutUint16(h[headerLenAt:], uint16(p.HeaderSize()))
		binary.NativeEndian.PutUint16(h[gsoSizeAt:], g.MSS)
	}
	return h
}
