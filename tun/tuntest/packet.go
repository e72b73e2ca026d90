// Package tuntest is what tests of the packet path check it against: a packet
// builder, checksums, a validator and the splitting of super-packets, all
// written the slow and obvious way and sharing no code with package tun.
package tuntest

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// IP protocol numbers.
const (
	ICMP = 1
	TCP  = 6
	UDP  = 17
)

// TCP flags.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
)

// IPv4 fragment bits, for Packet.Frag.
const (
	Reserved      = 0x8000
	DontFragment  = 0x4000
	MoreFragments = 0x2000
)

// Checksum says what stands in the transport checksum field of a Packet.
type Checksum uint8

// Checksums of a Packet.
const (
	// Good is the right checksum.
	Good Checksum = iota
	// Partial is the folded sum of the pseudo header, as CHECKSUM_PARTIAL.
	Partial
	// Bad is neither Good nor Partial nor Zero.
	Bad
	// Zero is 0, which in UDP means there is none.
	Zero
)

// Packet describes an IPv4 packet. The zero value of a field is that value on
// the wire, but for Src, Dst and TTL, which have usable defaults.
type Packet struct {
	Src, Dst  netip.Addr // 10.1.1.2 and 10.1.2.3
	Proto     uint8
	TOS       uint8
	TTL       uint8 // 64
	ID        uint16
	Frag      uint16 // flags and fragment offset as on the wire
	IPOptions []byte // a multiple of 4 bytes

	SrcPort, DstPort uint16 // TCP and UDP
	Seq, Ack         uint32
	Flags            uint8
	Low4             uint8 // the four bits between data offset and flags
	Window           uint16
	Urgent           uint16
	TCPOptions       []byte // a multiple of 4 bytes
	UDPLen           uint16 // in place of the right length, unless 0

	Payload []byte
	Sum     Checksum
	// BadIPSum makes the header checksum wrong.
	BadIPSum bool
}

var (
	defaultSrc = netip.AddrFrom4([4]byte{10, 1, 1, 2})
	defaultDst = netip.AddrFrom4([4]byte{10, 1, 2, 3})
)

// Bytes returns the packet as on the wire.
func (p Packet) Bytes() []byte {
	l4 := p.transport()
	ihl := 20 + len(p.IPOptions)
	b := make([]byte, ihl, ihl+len(l4))
	b[0] = 4<<4 | byte(ihl/4)
	b[1] = p.TOS
	binary.BigEndian.PutUint16(b[2:], uint16(ihl+len(l4)))
	binary.BigEndian.PutUint16(b[4:], p.ID)
	binary.BigEndian.PutUint16(b[6:], p.Frag)
	b[8] = p.TTL
	if p.TTL == 0 {
		b[8] = 64
	}
	b[9] = p.Proto
	src, dst := p.Src, p.Dst
	if !src.IsValid() {
		src = defaultSrc
	}
	if !dst.IsValid() {
		dst = defaultDst
	}
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	copy(b[20:], p.IPOptions)
	b = append(b, l4...)
	SetIPChecksum(b)
	if p.BadIPSum {
		b[10] ^= 0x55
	}
	p.sum(b, ihl)
	return b
}

func (p Packet) transport() []byte {
	var h []byte
	switch p.Proto {
	case TCP:
		h = make([]byte, 20, 20+len(p.TCPOptions)+len(p.Payload))
		binary.BigEndian.PutUint16(h[0:], p.SrcPort)
		binary.BigEndian.PutUint16(h[2:], p.DstPort)
		binary.BigEndian.PutUint32(h[4:], p.Seq)
		binary.BigEndian.PutUint32(h[8:], p.Ack)
		h[12] = byte((20+len(p.TCPOptions))/4)<<4 | p.Low4&0xf
		h[13] = p.Flags
		binary.BigEndian.PutUint16(h[14:], p.Window)
		binary.BigEndian.PutUint16(h[18:], p.Urgent)
		h = append(h, p.TCPOptions...)
	case UDP:
		h = make([]byte, 8, 8+len(p.Payload))
		binary.BigEndian.PutUint16(h[0:], p.SrcPort)
		binary.BigEndian.PutUint16(h[2:], p.DstPort)
		binary.BigEndian.PutUint16(h[4:], uint16(8+len(p.Payload)))
		if p.UDPLen != 0 {
			binary.BigEndian.PutUint16(h[4:], p.UDPLen)
		}
	}
	return append(h, p.Payload...)
}

func (p Packet) sum(b []byte, ihl int) {
	at := sumOffset(p.Proto)
	if at < 0 {
		return
	}
	field := b[ihl+at:]
	good, partial := transportSum(b, ihl), pseudoSum(b, ihl)
	v := good
	switch p.Sum {
	case Partial:
		v = partial
	case Zero:
		v = 0
	case Bad:
		for v = good + 1; v == partial || v == 0 || v == 0xffff || v == good; v++ {
		}
	}
	binary.BigEndian.PutUint16(field, v)
}

// sumOffset is where the checksum field stands in a transport header, or -1.
func sumOffset(proto uint8) int {
	switch proto {
	case TCP:
		return 16
	case UDP:
		return 6
	}
	return -1
}

// Sum returns the one's complement sum of the bytes of all pieces, folded and
// not complemented. All pieces but the last must have an even length.
func Sum(pieces ...[]byte) uint16 {
	sum := uint32(0)
	for _, b := range pieces {
		for i := range b {
			if i%2 == 0 {
				sum += uint32(b[i]) << 8
			} else {
				sum += uint32(b[i])
			}
			sum = sum&0xffff + sum>>16
		}
	}
	return uint16(sum)
}

func pseudoHeader(b []byte, ihl int) []byte {
	h := append([]byte(nil), b[12:20]...)
	return binary.BigEndian.AppendUint16(append(h, 0, b[9]), uint16(len(b)-ihl))
}

func pseudoSum(b []byte, ihl int) uint16 { return Sum(pseudoHeader(b, ihl)) }

// transportSum returns the right TCP or UDP checksum of the packet.
func transportSum(b []byte, ihl int) uint16 {
	l4 := append([]byte(nil), b[ihl:]...)
	binary.BigEndian.PutUint16(l4[sumOffset(b[9]):], 0)
	c := ^Sum(pseudoHeader(b, ihl), l4)
	if c == 0 && b[9] == UDP {
		c = 0xffff
	}
	return c
}

// SetIPChecksum computes the header checksum of an IPv4 packet.
func SetIPChecksum(b []byte) {
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ^Sum(b[:int(b[0]&0xf)*4]))
}

// Complete returns a copy of the packet in which the TCP or UDP checksum is
// right, if it was the pseudo header's sum; otherwise an unchanged copy.
func Complete(b []byte) []byte {
	b = append([]byte(nil), b...)
	ihl := int(b[0]&0xf) * 4
	at := sumOffset(b[9])
	if at >= 0 && len(b) >= ihl+at+2 && binary.BigEndian.Uint16(b[ihl+at:]) == pseudoSum(b, ihl) {
		binary.BigEndian.PutUint16(b[ihl+at:], transportSum(b, ihl))
	}
	return b
}

// Check returns an error unless b is a whole, unfragmented IPv4 packet with
// right lengths and checksums in all its headers.
func Check(b []byte) error {
	if len(b) < 20 || b[0]>>4 != 4 {
		return fmt.Errorf("not IPv4: % x", b[:min(len(b), 20)])
	}
	ihl := int(b[0]&0xf) * 4
	if ihl < 20 || len(b) < ihl {
		return fmt.Errorf("header length %d of %d bytes", ihl, len(b))
	}
	if total := int(binary.BigEndian.Uint16(b[2:])); total != len(b) {
		return fmt.Errorf("total length %d, have %d bytes", total, len(b))
	}
	if s := Sum(b[:ihl]); s != 0xffff {
		return fmt.Errorf("IPv4 header sums to %#x", s)
	}
	at := sumOffset(b[9])
	if at < 0 {
		return nil
	}
	l4 := b[ihl:]
	if len(l4) < at+2 {
		return fmt.Errorf("transport header of %d bytes", len(l4))
	}
	if b[9] == UDP {
		if n := int(binary.BigEndian.Uint16(l4[4:])); n != len(l4) {
			return fmt.Errorf("UDP length %d, have %d bytes", n, len(l4))
		}
		if l4[6] == 0 && l4[7] == 0 {
			return nil
		}
	}
	if got, want := binary.BigEndian.Uint16(l4[at:]), transportSum(b, ihl); got != want {
		return fmt.Errorf("transport checksum %#04x, right is %#04x", got, want)
	}
	return nil
}
