package filter

import "encoding/binary"

// The conditions behind the primitives. Each tests in the order libpcap does,
// which shows where a packet ends early.

// protocols says what a protocol name alone means.
var protocols = map[proto]struct {
	name   string
	ether  uint32 // an ethertype, or
	number uint32 // an IP protocol number,
	v4, v6 bool   // in these versions of IP
}{
	pEther: {name: "ether"},
	pIP:    {name: "ip", ether: etherIPv4},
	pARP:   {name: "arp", ether: etherARP},
	pRARP:  {name: "rarp", ether: etherRARP},
	pIP6:   {name: "ip6", ether: etherIPv6},
	pTCP:   {name: "tcp", number: protoTCP, v4: true, v6: true},
	pUDP:   {name: "udp", number: protoUDP, v4: true, v6: true},
	pSCTP:  {name: "sctp", number: protoSCTP, v4: true, v6: true},
	pICMP:  {name: "icmp", number: protoICMP, v4: true},
	pICMP6: {name: "icmp6", number: protoICMPv6, v6: true},
	pIGMP:  {name: "igmp", number: protoIGMP, v4: true},
	pIGRP:  {name: "igrp", number: protoIGRP, v4: true},
	pPIM:   {name: "pim", number: protoPIM, v4: true, v6: true},
	pVRRP:  {name: "vrrp", number: protoVRRP, v4: true},
	pAH:    {name: "ah", number: protoAH, v4: true, v6: true},
	pESP:   {name: "esp", number: protoESP, v4: true, v6: true},
}

// protocol is the condition of a protocol name alone.
func (y layer) protocol(p proto) cond {
	d := protocols[p]
	if d.ether != 0 {
		return y.ethertype(d.ether)
	}
	return y.ipProto(d.number, d.v4, d.v6)
}

// directed combines the conditions for the source and the destination.
func directed(d direction, src, dst cond) cond {
	switch d {
	case dirSrc:
		return src
	case dirDst:
		return dst
	case dirSrcAndDst:
		return and(src, dst)
	}
	return or(src, dst)
}

// host4 matches an IPv4 address under mask in the protocol p: the header of
// ip, or the addresses inside arp and rarp; in all three for anyProto.
func (y layer) host4(p proto, d direction, addr, mask uint32) cond {
	one := func(ethertype, srcOff, dstOff uint32) cond {
		return directed(d,
			and(y.ethertype(ethertype), y.at(srcOff, 4, mask, addr)),
			and(y.ethertype(ethertype), y.at(dstOff, 4, mask, addr)))
	}
	switch p {
	case pIP:
		return one(etherIPv4, 12, 16)
	case pARP:
		return one(etherARP, 14, 24)
	case pRARP:
		return one(etherRARP, 14, 24)
	}
	return or(one(etherIPv4, 12, 16), one(etherARP, 14, 24), one(etherRARP, 14, 24))
}

// host6 matches an IPv6 address under a prefix of bits bits.
func (y layer) host6(d direction, addr [16]byte, bits int) cond {
	one := func(off uint32) cond {
		c := y.ethertype(etherIPv6)
		for w := range uint32(4) {
			mask := prefixMask(min(max(bits-int(w)*32, 0), 32))
			c = and(c, y.at(off+4*w, 4, mask, binary.BigEndian.Uint32(addr[4*w:])))
		}
		return c
	}
	return directed(d, one(8), one(24))
}

// prefixMask returns a mask of bits leading ones, bits from 0 to 32.
func prefixMask(bits int) uint32 { return uint32(uint64(0xffffffff) << (32 - bits)) }

// ethernet matches an Ethernet address, its last four bytes first.
func (y layer) ethernet(d direction, mac [6]byte) cond {
	one := func(off uint32) cond {
		return and(
			y.linkAt(off+2, 4, binary.BigEndian.Uint32(mac[2:])),
			y.linkAt(off, 2, uint32(binary.BigEndian.Uint16(mac[:]))))
	}
	return directed(d, one(6), one(0))
}

// ports matches the port numbers lo to hi of the transport number, 0 meaning
// any that has ports. IPv6 comes first, and SCTP before TCP before UDP.
func (y layer) ports(number uint32, d direction, lo, hi uint32) cond {
	transports := []uint32{number}
	if number == 0 {
		transports = []uint32{protoSCTP, protoTCP, protoUDP}
	}
	var six, four cond = condBool(false), condBool(false)
	for _, n := range transports {
		six = or(six, and(y.at(6, 1, noMask, n), directed(d,
			y.between(load{kind: loadAbs, size: 2, off: y.nl + 40, mask: noMask}, lo, hi),
			y.between(load{kind: loadAbs, size: 2, off: y.nl + 42, mask: noMask}, lo, hi))))
		four = or(four, and(y.ip4Proto(n), y.unfragmented(), directed(d,
			y.between(y.behind(0, 2), lo, hi),
			y.between(y.behind(2, 2), lo, hi))))
	}
	return or(and(y.ethertype(etherIPv6), six), and(y.ethertype(etherIPv4), four))
}

// between matches a load from lo to hi.
func (y layer) between(l load, lo, hi uint32) cond {
	if lo == hi {
		return y.test(l, jeqK, lo)
	}
	return and(y.test(l, jgeK, lo), not(y.test(l, jgtK, hi)))
}

// multicast matches multicast addresses of p. That "ip multicast" means every
// destination from 224.0.0.0 up is libpcap's.
func (y layer) multicast(p proto) cond {
	one := load{kind: loadAbs, size: 1, mask: noMask}
	switch p {
	case pIP:
		one.off = y.nl + 16
		return and(y.ethertype(etherIPv4), y.test(one, jgeK, 224))
	case pIP6:
		one.off = y.nl + 24
		return and(y.ethertype(etherIPv6), y.test(one, jeqK, 255))
	}
	return y.test(one, jsetK, 1)
}

// length matches packets of at most n bytes, or with greater at least n.
func (y layer) length(greater bool, n uint32) cond {
	l := load{kind: loadLength, mask: noMask}
	if greater {
		return y.test(l, jgeK, n)
	}
	return not(y.test(l, jgtK, n))
}
