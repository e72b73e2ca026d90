package tun

// Header is what the kernel says of a packet read from a queue.
type Header struct{ vnet vnetHdr }

// Append appends what stands before the packet when it is written to the other
// end of a queue that is a socket pair.
func (h *Header) Append(b []byte) []byte {
	var raw [vnetHdrLen]byte
	h.vnet.encode(raw[:])
	return append(b, raw[:]...)
}

// Super reports whether the packet is a super-packet that must be split.
func (h *Header) Super() bool { return h.vnet.gsoType&^gsoECN != gsoNone }

// SegmentPayload returns the payload bytes of each segment of a super-packet.
func (h *Header) SegmentPayload() int { return int(h.vnet.gsoSize) }

// Partial reports whether the transport checksum of the packet is still the
// sum of its pseudo header only.
func (h *Header) Partial() bool { return h.vnet.flags&needsCsum != 0 }

// Complete computes the transport checksum of a packet for which Partial is
// true and that is no super-packet. pkt must start with a valid IPv4 header. It
// reports false, and changes nothing, when the header's offsets lie outside the
// packet or inside the IPv4 header: a container with a packet socket chooses
// them, and what has been checked must not change.
func (h *Header) Complete(pkt []byte) bool {
	start := int(h.vnet.csumStart)
	at := start + int(h.vnet.csumOffset)
	if start < headerLen(pkt) || start >= len(pkt) || at+2 > len(pkt) {
		return false
	}
	// The field holds the pseudo header's sum, so summing it along is right.
	c := ^Fold(Sum(pkt[start:], 0))
	if c == 0 && h.vnet.csumOffset == udpCsumOff {
		c = 0xffff // 0 means no checksum (RFC 768)
	}
	put16(pkt[at:], c)
	return true
}

// Elidable reports whether the transport checksum of a packet for which Partial
// is true can be left to the receiver: the packet is whole TCP or UDP, and the
// offsets are those the receiver derives from the headers. pkt must start with
// a valid IPv4 header.
func (h *Header) Elidable(pkt []byte) bool {
	if int(h.vnet.csumStart) != headerLen(pkt) || be16(pkt[6:])&fragMask != 0 {
		return false
	}
	return pkt[9] == protoTCP && h.vnet.csumOffset == tcpCsumOff || pkt[9] == protoUDP && h.vnet.csumOffset == udpCsumOff
}

// SuperHeader returns the Header of a TCP or UDP super-packet whose segments
// carry payload bytes each, as the kernel would have written it.
func SuperHeader(pkt []byte, payload int) Header {
	h := Header{vnetHdr{flags: needsCsum, gsoType: gsoTCPv4, gsoSize: uint16(payload), csumOffset: tcpCsumOff}}
	if len(pkt) >= minIPv4 {
		h.vnet.csumStart = uint16(headerLen(pkt))
		if pkt[9] == protoUDP {
			h.vnet.gsoType, h.vnet.csumOffset = gsoUDPL4, udpCsumOff
		}
	}
	return h
}
