package capture

import (
	"encoding/binary"
	"net/netip"

	"tweed/encap"
	"tweed/engine"
	"tweed/engine/tap"
	"tweed/tun"
)

const (
	outerLen = 20 + 8
	outerTTL = 64
	protoUDP = 17
	protoTCP = 6
	minIPv4  = 20
	ecnCE    = 3 // congestion experienced (RFC 3168 section 5)
)

// blank is the place of the outer headers.
var blank [outerLen]byte

// viewer shows records as packets at their points. It belongs to one goroutine;
// a packet's Data is borrowed until the next call.
type viewer struct {
	inner, outer []byte
	split        tun.Splitter
	whole        []byte // a super-packet, padded to its full length
	seg          []byte // one segment of it
	pkt          Packet
}

// show calls emit for each wanted point the record passed, and for each segment
// of a super-packet.
// If whole, super-packets are shown in one piece.
func (v *viewer) show(r *tap.Record, want tap.Points, whole bool, emit func(*Packet)) {
	switch {
	case r.Flags&tap.Whole != 0:
		if !whole {
			return
		}
	case r.Flags&tap.Segment != 0 && whole:
		want &^= tap.Of(tap.TunIn, tap.TunOut)
	case r.Flags&tap.Super != 0 && !whole:
		v.segments(r, want, emit)
		return
	}
	for p := range tap.NumPoints {
		if r.Points.Has(p) && want.Has(p) {
			v.packet(r, p)
			if whole && r.Of != 0 {
				v.pkt.ID = r.Of
			}
			emit(&v.pkt)
		}
	}
}

// packet makes v.pkt the record as it was at p.
func (v *viewer) packet(r *tap.Record, p tap.Point) {
	pkt := &v.pkt
	*pkt = Packet{
		Time: r.Time, ID: r.ID, Point: p, Reason: engine.Reason(r.Reason), Receive: r.Receive, Worker: r.Worker,
		Peer: addrPort(r.Peer, r.PeerPort), Local: addrPort(r.Local, r.LocalPort), VXLAN: r.PrefixLen > 0, Segments: 1,
	}
	if r.Flags&tap.Super != 0 {
		pkt.Segments, pkt.SegmentPayload = int(r.Segments), int(r.SegmentPayload)
	}
	prefix := int(r.PrefixLen)
	// What was dropped on receipt is shown as it arrived: its inner part may
	// be no packet at all.
	pkt.Outer = r.Flags&tap.Inner == 0 && (p == tap.WireOut || p == tap.WireIn || p == tap.Drop && r.Receive)
	if !pkt.Outer {
		data := r.Data[min(prefix, len(r.Data)):]
		pkt.Length = int(r.Length) - prefix
		if total := ipTotal(data); p == tap.TunOut && total >= minIPv4 && total < pkt.Length {
			pkt.Length = total // the rest padded the frame
			data = data[:min(len(data), total)]
		}
		v.inner = append(v.inner[:0], data...)
		if p == tap.TunOut && r.Receive && r.ECN == ecnCE && len(v.inner) >= minIPv4 {
			tun.SetECN(v.inner, ecnCE)
		}
		if r.Flags&tap.TTLLowered != 0 && p == tap.TunIn {
			raiseTTL(v.inner)
		}
		pkt.Unfinished = partial(r, v.inner) && !finish(v.inner, pkt.Length)
		pkt.Data = v.inner
		return
	}
	pkt.Length = outerLen + int(r.Length)
	v.outer = append(append(v.outer[:0], blank[:]...), r.Data...)
	if inner := v.outer[min(outerLen+prefix, len(v.outer)):]; partial(r, inner) {
		pkt.Unfinished = !finish(inner, int(r.Length)-prefix)
	}
	putOuter(v.outer, r, pkt.Length)
	pkt.Data = v.outer
}

// segments shows a super-packet that was dropped, or switched to a neighbour,
// before it was split.
func (v *viewer) segments(r *tap.Record, want tap.Points, emit func(*Packet)) {
	v.whole = append(v.whole[:0], r.Data...)
	v.whole = append(v.whole, make([]byte, int(r.Length)-len(r.Data))...)
	h := tun.SuperHeader(v.whole, int(r.SegmentPayload))
	one := *r
	one.Flags &^= tap.Super
	if err := v.split.Start(v.whole, &h); err != nil {
		v.show(&one, want, false, emit)
		return
	}
	v.split.Begin(v.whole, false)
	hl := v.split.HeaderLen()
	v.seg = append(v.seg[:0], make([]byte, v.split.SegmentLen())...)
	seg := v.seg
	for at := hl; ; {
		payload, ok := v.split.Next(seg[:hl])
		if !ok {
			return
		}
		// Only what was stored is real; the rest of the payload is padding.
		stored := min(max(len(r.Data)-at, 0), len(payload))
		at += len(payload)
		n := hl + copy(seg[hl:], payload[:stored])
		one.Data, one.Length = seg[:n], uint32(hl+len(payload))
		if stored == len(payload) {
			one.Flags &^= tap.Partial
		} else {
			one.Flags |= tap.Partial
		}
		v.show(&one, want, false, emit)
		one.ID++
		one.Time++
	}
}

// partial reports whether the inner transport checksum is still to be computed.
// Of what we send we know; a peer may have left it to us without saying so.
func partial(r *tap.Record, inner []byte) bool {
	return r.Flags&tap.Partial != 0 || r.Receive && !r.Points.Has(tap.Drop) && tun.PartialChecksum(inner)
}

// ipTotal is the total length an IPv4 header claims, 0 without one.
func ipTotal(ip []byte) int {
	if len(ip) < minIPv4 {
		return 0
	}
	return int(binary.BigEndian.Uint16(ip[2:]))
}

func addrPort(a uint32, port uint16) netip.AddrPort {
	if a == 0 {
		return netip.AddrPort{}
	}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], a)
	return netip.AddrPortFrom(netip.AddrFrom4(b), port)
}

// raiseTTL undoes tun.DecrementTTL.
func raiseTTL(ip []byte) {
	if len(ip) < minIPv4 {
		return
	}
	ip[8]++
	ip[10], ip[11] = 0, 0
	if ihl := int(ip[0]&0xf) * 4; ihl >= 20 && ihl <= len(ip) {
		binary.BigEndian.PutUint16(ip[10:], ^tun.Fold(tun.Sum(ip[:ihl], 0)))
	}
}

// finish computes the transport checksum of a packet whose field holds the
// pseudo header's sum. It reports false when the packet is not all there.
func finish(ip []byte, length int) bool {
	if total := ipTotal(ip); len(ip) == length && total >= minIPv4 && total <= length {
		ip = ip[:total]
	} else {
		return false
	}
	ihl := int(ip[0]&0xf) * 4
	at := ihl + 16
	if ip[9] == protoUDP {
		at = ihl + 6
	} else if ip[9] != protoTCP {
		return true
	}
	if ihl < 20 || at+2 > len(ip) {
		return false
	}
	sum := ^tun.Fold(tun.Sum(ip[ihl:], 0))
	if sum == 0 && ip[9] == protoUDP {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(ip[at:], sum)
	return true
}

// putOuter writes the outer IPv4 and UDP headers of a datagram of the given
// length to b, whose payload is in place.
func putOuter(b []byte, r *tap.Record, length int) {
	src, dst, sport, dport := r.Local, r.Peer, r.LocalPort, r.PeerPort
	if r.Receive {
		src, dst, sport, dport = dst, src, dport, sport
	}
	b[0], b[1] = 0x45, r.ECN
	binary.BigEndian.PutUint16(b[2:], uint16(length))
	b[8], b[9] = outerTTL, protoUDP
	binary.BigEndian.PutUint32(b[12:], src)
	binary.BigEndian.PutUint32(b[16:], dst)
	binary.BigEndian.PutUint16(b[10:], ^tun.Fold(tun.Sum(b[:20], 0)))
	u := b[20:]
	binary.BigEndian.PutUint16(u, sport)
	binary.BigEndian.PutUint16(u[2:], dport)
	binary.BigEndian.PutUint16(u[4:], uint16(length-20))
	if len(b) != length || r.Flags&tap.NoChecksum != 0 {
		return // cut short, or never there: 0 stands for no checksum (RFC 768)
	}
	var pseudo [12]byte
	copy(pseudo[:8], b[12:20])
	pseudo[9] = protoUDP
	binary.BigEndian.PutUint16(pseudo[10:], uint16(length-20))
	sum := ^tun.Fold(tun.Sum(u, tun.Sum(pseudo[:], 0)))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(u[6:], sum)
}

// vni returns the VXLAN network identifier of a record with a prefix.
func vni(r *tap.Record) (uint32, bool) {
	if int(r.PrefixLen) < encap.FramingVXLAN.PrefixLen() {
		return 0, false
	}
	return vniAt(r.Data)
}

// vniAt returns the VNI of a VXLAN header.
func vniAt(b []byte) (uint32, bool) {
	if len(b) < 8 {
		return 0, false
	}
	return binary.BigEndian.Uint32(b[4:]) >> 8, true
}
