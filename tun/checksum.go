package tun

import (
	"encoding/binary"
	"math/bits"
)

// The Internet checksum (RFC 1071) as running one's complement sums. A sum is
// kept in 64 bits, in the byte order of the packet read as little-endian
// words, and folded once at the end; the order does not matter until then.

// Sum adds the bytes of b to the running sum acc. All pieces of one sum but
// the last must have an even length.
func Sum(b []byte, acc uint64) uint64 {
	var carry uint64
	for len(b) >= 64 {
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b), 0)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[8:]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[16:]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[24:]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[32:]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[40:]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[48:]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[56:]), carry)
		acc += carry
		b = b[64:]
	}
	for len(b) >= 8 {
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b), 0)
		acc += carry
		b = b[8:]
	}
	if len(b) >= 4 {
		acc, carry = bits.Add64(acc, uint64(binary.LittleEndian.Uint32(b)), 0)
		acc += carry
		b = b[4:]
	}
	if len(b) >= 2 {
		acc, carry = bits.Add64(acc, uint64(binary.LittleEndian.Uint16(b)), 0)
		acc += carry
		b = b[2:]
	}
	if len(b) == 1 {
		acc, carry = bits.Add64(acc, uint64(b[0]), 0)
		acc += carry
	}
	return acc
}

// Fold reduces a running sum to the 16 bits that stand in a packet, network
// byte order value, not complemented.
func Fold(acc uint64) uint16 {
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	return bits.ReverseBytes16(uint16(acc))
}

// word is a 16-bit field's contribution to a running sum.
func word(v uint16) uint64 { return uint64(bits.ReverseBytes16(v)) }

// pseudoSum is the running sum of the pseudo header of an IPv4 packet with a
// 20-byte or longer header (RFC 9293 section 3.1), for l4Len bytes of proto.
func pseudoSum(ip []byte, proto uint8, l4Len int) uint64 {
	_ = ip[19]
	return uint64(binary.LittleEndian.Uint32(ip[12:])) + uint64(binary.LittleEndian.Uint32(ip[16:])) +
		word(uint16(proto)) + word(uint16(l4Len))
}

// putIPChecksum computes the header checksum of the IPv4 header ip[:ihl].
func putIPChecksum(ip []byte, ihl int) {
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], ^Fold(Sum(ip[:ihl], 0)))
}

// DecrementTTL lowers the TTL of an IPv4 packet by one and updates its header
// checksum incrementally (RFC 1624). The TTL must not be 0.
func DecrementTTL(ip []byte) {
	ip[8]--
	// The TTL is the high byte of its word, so the complemented sum grows by
	// 0x0100, with the carry brought round.
	c := uint32(binary.BigEndian.Uint16(ip[10:])) + 0x0100
	if c >= 0xffff { // as the kernel's ip_decrease_ttl, which never leaves 0xffff
		c++
	}
	binary.BigEndian.PutUint16(ip[10:], uint16(c))
}

// SetECN replaces the ECN bits of an IPv4 packet and updates its header
// checksum incrementally (RFC 1624 equation 3).
func SetECN(ip []byte, ecn uint8) {
	old := binary.BigEndian.Uint16(ip[0:])
	ip[1] = ip[1]&^3 | ecn&3
	sum := uint32(^binary.BigEndian.Uint16(ip[10:])) + uint32(^old) + uint32(binary.BigEndian.Uint16(ip[0:]))
	sum = sum>>16 + sum&0xffff
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
}

// PartialChecksum reports whether the transport checksum of an IPv4 packet, of
// which at least the transport header is there, is only the folded sum of its
// pseudo header: computing it has been left to the receiver.
func PartialChecksum(ip []byte) bool {
	if len(ip) < minIPv4 || be16(ip[6:])&fragMask != 0 {
		return false
	}
	ihl, off := headerLen(ip), tcpCsumOff
	switch ip[9] {
	case protoTCP:
	case protoUDP:
		off = udpCsumOff
	default:
		return false
	}
	if ihl < minIPv4 || len(ip) < ihl+off+2 {
		return false
	}
	return be16(ip[ihl+off:]) == Fold(pseudoSum(ip, ip[9], int(be16(ip[2:]))-ihl))
}
