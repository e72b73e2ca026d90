package tun

import "encoding/binary"

// A train is what one super-packet of a sender arrives as: consecutive packets
// that agree in every header field but length, ID, sequence number, PSH and
// checksums. Continue appends such a packet to the item of the one before it
// with a handful of word comparisons; Add decides everything else.

func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }

// Continue appends pkt to the item the last Add or Continue put its packet in,
// if it is the next packet of that item's train, and reports whether it did. A
// packet that continues a train has the addresses, protocol, TTL and TOS of
// the packet before it, and has been checked by comparison with it: a length
// that fits, no fragment, the same transport header.
func (c *Coalescer) Continue(pkt []byte, tag uint64) bool {
	if c.last < 0 || c.nparts == maxParts {
		return false
	}
	it := &c.items[c.last]
	hl := int(it.hl)
	size := len(pkt) - hl
	a := it.pkt
	// Both headers are at least 28 bytes long, and a[:hl] is there.
	if it.closed || it.parts == maxItemParts || size <= 0 || size > int(it.size) || it.total+size > maxPacket || it.csum != csumPartial ||
		binary.LittleEndian.Uint16(pkt) != binary.LittleEndian.Uint16(a) || int(be16(pkt[2:])) != len(pkt) ||
		le32(pkt[6:]) != le32(a[6:]) || le64(pkt[12:]) != le64(a[12:]) || le32(pkt[20:]) != le32(a[20:]) ||
		pkt[6]&(dontFrag>>8) == 0 && be16(pkt[4:]) != it.id || Fold(Sum(pkt[:minIPv4], 0)) != 0xffff {
		return false
	}
	push := false
	l4, b4 := a[minIPv4:hl], pkt[minIPv4:hl]
	sum := b4[udpCsumOff:]
	if it.proto == protoTCP {
		sum = b4[tcpCsumOff:]
		push = b4[13]&flagPSH != 0
		if be32(b4[4:]) != it.seq || le32(b4[8:]) != le32(l4[8:]) || l4[12] != b4[12] ||
			(l4[13]^b4[13])&^flagPSH != 0 || le16(b4[14:]) != le16(l4[14:]) || !sameOptions(l4, b4) {
			return false
		}
	} else if it.parts == maxUDPParts || int(be16(b4[4:])) != udpLen+size {
		return false
	}
	if be16(sum) != Fold(pseudoSum(pkt, pkt[9], len(b4)+size)) {
		return false
	}
	c.append(it, pkt[hl:], tag)
	it.seq += uint32(size)
	it.id = be16(pkt[4:]) + 1
	it.push = it.push || push
	it.closed = push || size < int(it.size)
	return true
}

func le16(b []byte) uint16 { return binary.LittleEndian.Uint16(b) }

// sameOptions compares the TCP options of two headers of one length, which is a
// multiple of 4.
func sameOptions(a, b []byte) bool {
	for i := minTCP; i < len(a); i += 4 {
		if le32(a[i:]) != le32(b[i:]) {
			return false
		}
	}
	return true
}
