package tun

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"tweed/tun/tuntest"
)

const ackFlag = tuntest.ACK

// tcp returns segment i of a transfer in segments of size bytes.
func tcpSegment(i, size int) tuntest.Packet {
	return tuntest.Packet{
		Proto: tuntest.TCP, SrcPort: 5000, DstPort: 80, Flags: ackFlag, Window: 500, Ack: 77,
		Seq: 1000 + uint32(i*size), ID: uint16(i), Frag: tuntest.DontFragment,
		TCPOptions: []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2},
		Payload:    bytes.Repeat([]byte{byte(i + 1)}, size),
	}
}

func udpDatagram(i, size int) tuntest.Packet {
	return tuntest.Packet{Proto: tuntest.UDP, SrcPort: 5000, DstPort: 53, ID: uint16(i), Frag: tuntest.DontFragment,
		Payload: bytes.Repeat([]byte{byte(i + 1)}, size)}
}

func TestCoalescerMerges(t *testing.T) {
	type pair = [2]tuntest.Packet
	tcp := func(change func(a, b *tuntest.Packet)) pair {
		a, b := tcpSegment(0, 100), tcpSegment(1, 100)
		change(&a, &b)
		return pair{a, b}
	}
	udp := func(change func(a, b *tuntest.Packet)) pair {
		a, b := udpDatagram(0, 100), udpDatagram(1, 100)
		change(&a, &b)
		return pair{a, b}
	}
	for name, p := range map[string]pair{
		"tcp":                       tcp(func(a, b *tuntest.Packet) {}),
		"tcp, shorter last":         tcp(func(a, b *tuntest.Packet) { b.Payload = b.Payload[:1] }),
		"tcp, pushed last":          tcp(func(a, b *tuntest.Packet) { b.Flags |= tuntest.PSH }),
		"tcp, ECE on both":          tcp(func(a, b *tuntest.Packet) { a.Flags |= tuntest.ECE; b.Flags |= tuntest.ECE }),
		"tcp, sequence wraps":       tcp(func(a, b *tuntest.Packet) { a.Seq = 0xffffffff; b.Seq = 99 }),
		"tcp, no options":           tcp(func(a, b *tuntest.Packet) { a.TCPOptions, b.TCPOptions = nil, nil }),
		"tcp, partial checksums":    tcp(func(a, b *tuntest.Packet) { a.Sum, b.Sum = tuntest.Partial, tuntest.Partial }),
		"tcp, partial and complete": tcp(func(a, b *tuntest.Packet) { a.Sum = tuntest.Partial }),
		"tcp, complete and partial": tcp(func(a, b *tuntest.Packet) { b.Sum = tuntest.Partial }),
		"tcp, same AE bit":          tcp(func(a, b *tuntest.Packet) { a.Low4, b.Low4 = 1, 1 }),
		"tcp, CE marked both":       tcp(func(a, b *tuntest.Packet) { a.TOS, b.TOS = 3, 3 }),
		"tcp, no DF, IDs in step":   tcp(func(a, b *tuntest.Packet) { a.Frag, b.Frag = 0, 0 }),
		"tcp, no DF, IDs wrap":      tcp(func(a, b *tuntest.Packet) { a.Frag, b.Frag, a.ID, b.ID = 0, 0, 0xffff, 0 }),
		"udp":                       udp(func(a, b *tuntest.Packet) {}),
		"udp, shorter last":         udp(func(a, b *tuntest.Packet) { b.Payload = b.Payload[:1] }),
		"udp, partial and complete": udp(func(a, b *tuntest.Packet) { a.Sum = tuntest.Partial }),
		"udp, no DF, IDs in step":   udp(func(a, b *tuntest.Packet) { a.Frag, b.Frag = 0, 0 }),
	} {
		r := flushed(t, OffloadFull, p[0], p[1])
		if len(r.raw) != 1 || !isSuper(r.raw[0]) {
			t.Errorf("%s: written in %d pieces, want one super-packet", name, len(r.raw))
		}
		sameBytes(t, r.packets(), p[0], p[1])
	}
	// With DF set the ID means nothing (RFC 6864), so it does not keep packets apart.
	a, b := tcpSegment(0, 100), tcpSegment(1, 100)
	b.ID = 777
	if r := flushed(t, OffloadFull, a, b); len(r.raw) != 1 {
		t.Error("DF and any ID: not merged")
	}
}

func TestCoalescerKeepsApart(t *testing.T) {
	type change = func(a, b *tuntest.Packet)
	both := map[string]change{
		"different destination":    func(a, b *tuntest.Packet) { b.Dst = a.Src; b.Dst = mustAddr("10.1.2.4") },
		"different source":         func(a, b *tuntest.Packet) { b.Src = mustAddr("10.1.1.3") },
		"different source port":    func(a, b *tuntest.Packet) { b.SrcPort++ },
		"different port":           func(a, b *tuntest.Packet) { b.DstPort++ },
		"ports the other way":      func(a, b *tuntest.Packet) { b.SrcPort, b.DstPort = a.DstPort, a.SrcPort },
		"second larger":            func(a, b *tuntest.Packet) { b.Payload = append(b.Payload, 1) },
		"different TOS":            func(a, b *tuntest.Packet) { b.TOS = 0x20 },
		"different ECN":            func(a, b *tuntest.Packet) { a.TOS, b.TOS = 2, 3 },
		"different TTL":            func(a, b *tuntest.Packet) { b.TTL = 63 },
		"DF on one":                func(a, b *tuntest.Packet) { b.Frag = 0 },
		"reserved bit on one":      func(a, b *tuntest.Packet) { b.Frag |= tuntest.Reserved },
		"no DF and ID not in step": func(a, b *tuntest.Packet) { a.Frag, b.Frag, b.ID = 0, 0, 2 },
		"no DF and same ID":        func(a, b *tuntest.Packet) { a.Frag, b.Frag, b.ID = 0, 0, 0 },
		"IPv4 options":             func(a, b *tuntest.Packet) { a.IPOptions, b.IPOptions = make([]byte, 4), make([]byte, 4) },
		"IPv4 options on second":   func(a, b *tuntest.Packet) { b.IPOptions = make([]byte, 4) },
		"first is a fragment":      func(a, b *tuntest.Packet) { a.Frag = tuntest.MoreFragments },
		"second is a fragment":     func(a, b *tuntest.Packet) { a.Frag, b.Frag = 0, tuntest.MoreFragments },
		"later fragments":          func(a, b *tuntest.Packet) { a.Frag, b.Frag = 10, 10 },
		"first checksum bad":       func(a, b *tuntest.Packet) { a.Sum = tuntest.Bad },
		"second checksum bad":      func(a, b *tuntest.Packet) { b.Sum = tuntest.Bad },
		"first checksum zero":      func(a, b *tuntest.Packet) { a.Sum = tuntest.Zero },
		"second checksum zero":     func(a, b *tuntest.Packet) { b.Sum = tuntest.Zero },
		"first IPv4 checksum bad":  func(a, b *tuntest.Packet) { a.BadIPSum = true },
		"second IPv4 checksum bad": func(a, b *tuntest.Packet) { b.BadIPSum = true },
		"first without payload":    func(a, b *tuntest.Packet) { a.Payload = nil; b.Seq = a.Seq },
	}
	tcp := map[string]change{
		"gap":                      func(a, b *tuntest.Packet) { b.Seq++ },
		"retransmission":           func(a, b *tuntest.Packet) { b.Seq = a.Seq },
		"reordered":                func(a, b *tuntest.Packet) { a.Seq, b.Seq = b.Seq, a.Seq },
		"after a pushed segment":   func(a, b *tuntest.Packet) { a.Flags |= tuntest.PSH },
		"different acknowledgment": func(a, b *tuntest.Packet) { b.Ack++ },
		"different window":         func(a, b *tuntest.Packet) { b.Window++ },
		"different option":         func(a, b *tuntest.Packet) { b.TCPOptions = bytes.Clone(b.TCPOptions); b.TCPOptions[11]++ },
		"options on one":           func(a, b *tuntest.Packet) { b.TCPOptions = nil },
		"AE bit on one":            func(a, b *tuntest.Packet) { b.Low4 = 1 },
		"reserved bits differ":     func(a, b *tuntest.Packet) { a.Low4 = 8 },
		"ECE on one":               func(a, b *tuntest.Packet) { b.Flags |= tuntest.ECE },
	}
	for bit, name := range map[uint8]string{tuntest.FIN: "FIN", tuntest.SYN: "SYN", tuntest.RST: "RST", tuntest.URG: "URG", tuntest.CWR: "CWR"} {
		tcp[name+" on first"] = func(a, b *tuntest.Packet) { a.Flags |= bit }
		tcp[name+" on second"] = func(a, b *tuntest.Packet) { b.Flags |= bit }
		tcp[name+" on both"] = func(a, b *tuntest.Packet) { a.Flags |= bit; b.Flags |= bit }
	}
	tcp["no ACK"] = func(a, b *tuntest.Packet) { a.Flags, b.Flags = 0, 0 }
	check := func(name string, a, b tuntest.Packet) {
		t.Helper()
		r := flushed(t, OffloadFull, a, b)
		if len(r.raw) != 2 || isSuper(r.raw[0]) || isSuper(r.raw[1]) {
			t.Errorf("%s: %d writes, want two single packets", name, len(r.raw))
		}
		sameBytes(t, r.packets(), a, b)
	}
	for name, f := range both {
		a, b := tcpSegment(0, 100), tcpSegment(1, 100)
		f(&a, &b)
		check("tcp, "+name, a, b)
		a, b = udpDatagram(0, 100), udpDatagram(1, 100)
		f(&a, &b)
		check("udp, "+name, a, b)
	}
	for name, f := range tcp {
		a, b := tcpSegment(0, 100), tcpSegment(1, 100)
		f(&a, &b)
		check("tcp, "+name, a, b)
	}
	for name, n := range map[string]uint16{"short": 50, "long": 500, "tiny": 1, "without header": 7} {
		a, b := udpDatagram(0, 100), udpDatagram(1, 100)
		a.UDPLen = n
		check("udp, first of "+name+" UDP length", a, b)
		a.UDPLen, b.UDPLen = 0, n
		check("udp, second of "+name+" UDP length", a, b)
		a.UDPLen = n
		check("udp, both of "+name+" UDP length", a, b)
	}
	check("another protocol", tuntest.Packet{Proto: 132, Payload: make([]byte, 100)}, tuntest.Packet{Proto: 132, Payload: make([]byte, 100)})
}

// Flows are told apart by their addresses and ports, not only by their hash.
func TestFlowsOfOneBucketDoNotMix(t *testing.T) {
	bucket := func(p tuntest.Packet) uint32 {
		b := p.Bytes()
		return (&item{pkt: b, ihl: 20}).bucket()
	}
	for name, change := range map[string]func(p *tuntest.Packet, i int){
		"source":      func(p *tuntest.Packet, i int) { p.Src = netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) },
		"destination": func(p *tuntest.Packet, i int) { p.Dst = netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) },
		"source port": func(p *tuntest.Packet, i int) { p.SrcPort = uint16(i) },
		"port":        func(p *tuntest.Packet, i int) { p.DstPort = uint16(i) },
	} {
		for _, kind := range []func(i, size int) tuntest.Packet{tcpSegment, udpDatagram} {
			a, b := kind(0, 100), kind(1, 100)
			found := false
			for i := 7000; i < 1<<16 && !found; i++ {
				change(&b, i)
				found = bucket(a) == bucket(b)
			}
			if !found {
				t.Fatalf("%s: no two flows share a bucket", name)
			}
			if r := flushed(t, OffloadFull, a, b); len(r.raw) != 2 {
				t.Errorf("%s: two flows were merged", name)
			}
		}
	}
}

// A TCP header shorter than 20 bytes is for the kernel to reject.
func TestImpossibleTCPHeaderIsLeftAlone(t *testing.T) {
	for doff := range byte(16) {
		c := NewCoalescer(1426)
		r, q := newRecorder(t, OffloadFull)
		var want [][]byte
		for i := range 3 {
			b := tcpSegment(i, 30).Bytes()
			b[32] = doff << 4
			put32(b[24:], uint32(i)*uint32(len(b)-20-int(doff)*4)) // in sequence, if one believes it
			b = withTCPSum(b)
			want = append(want, bytes.Clone(b))
			c.Add(q, b, 0, 0)
		}
		NewWriter().Flush(c, new(Written))
		if doff >= 5 && doff*4 < 62 {
			continue // possible: the options just look different
		}
		if got := r.packets(); !equalPackets(got, want) {
			t.Errorf("data offset %d: packets changed", doff)
		}
	}
}

func withTCPSum(b []byte) []byte {
	put16(b[36:], tuntest.Sum(b[12:20], []byte{0, 6}, binary.BigEndian.AppendUint16(nil, uint16(len(b)-20))))
	return tuntest.Complete(b)
}

func TestShortPacketEndsARun(t *testing.T) {
	for _, p := range []func(i, size int) tuntest.Packet{tcpSegment, udpDatagram} {
		a, b, c := p(0, 100), p(1, 100), p(2, 100)
		b.Payload = b.Payload[:99]
		c.Seq--
		r := flushed(t, OffloadFull, a, b, c)
		if len(r.raw) != 2 || !isSuper(r.raw[0]) || isSuper(r.raw[1]) {
			t.Errorf("%d writes, want two merged and one single", len(r.raw))
		}
		sameBytes(t, r.packets(), a, b, c)
	}
}

// What cannot be merged itself must not be overtaken by later packets of its
// flow, whatever kept it from being merged.
func TestNothingOvertakesAnUnmergedPacketOfItsFlow(t *testing.T) {
	for name, change := range map[string]func(p *tuntest.Packet){
		"zero checksum":  func(p *tuntest.Packet) { p.Sum = tuntest.Zero },
		"no payload":     func(p *tuntest.Packet) { p.Payload = nil },
		"IPv4 options":   func(p *tuntest.Packet) { p.IPOptions = make([]byte, 8) },
		"first fragment": func(p *tuntest.Packet) { p.Frag = tuntest.MoreFragments },
		"bad checksum":   func(p *tuntest.Packet) { p.Sum = tuntest.Bad },
	} {
		a, b, c := udpDatagram(0, 100), udpDatagram(9, 100), udpDatagram(2, 100)
		change(&b)
		sameBytes(t, flushed(t, OffloadFull, a, b, c).packets(), a, b, c)
		if name == "no payload" || name == "zero checksum" {
			continue // a pure acknowledgement may be overtaken, and TCP has no zero
		}
		a, b, c = tcpSegment(0, 100), tcpSegment(9, 100), tcpSegment(1, 100)
		change(&b)
		sameBytes(t, flushed(t, OffloadFull, a, b, c).packets(), a, b, c)
	}
	for _, flags := range []uint8{tuntest.SYN, tuntest.FIN | ackFlag, tuntest.RST, tuntest.ACK | tuntest.URG, tuntest.ACK | tuntest.ECE} {
		a, b, c := tcpSegment(0, 100), tcpSegment(9, 0), tcpSegment(1, 100)
		b.Flags = flags
		sameBytes(t, flushed(t, OffloadFull, a, b, c).packets(), a, b, c)
	}
}

// A pure acknowledgement does not keep data from being merged around it, and
// ends up behind that data.
func TestPureAcknowledgementDoesNotBreakARun(t *testing.T) {
	a, ack, b := tcpSegment(0, 100), tcpSegment(1, 0), tcpSegment(1, 100)
	r := flushed(t, OffloadFull, a, ack, b)
	if len(r.raw) != 2 || !isSuper(r.raw[0]) {
		t.Errorf("%d writes", len(r.raw))
	}
	sameBytes(t, r.packets(), a, b, ack)
}

func TestInterleavedFlowsMergeEach(t *testing.T) {
	var pkts []tuntest.Packet
	for i := range 10 {
		for f := range 5 {
			p := tcpSegment(i, 100)
			p.SrcPort = uint16(1000 + f)
			u := udpDatagram(i, 100)
			u.SrcPort = uint16(1000 + f)
			pkts = append(pkts, p, u)
		}
	}
	r := flushed(t, OffloadFull, pkts...)
	if len(r.raw) > 14 { // 10 flows; a few may share a bucket and be cut
		t.Errorf("%d writes for 10 flows", len(r.raw))
	}
	if n := len(r.packets()); n != len(pkts) {
		t.Errorf("%d packets of %d", n, len(pkts))
	}
}

func TestRungsOfTheCoalescer(t *testing.T) {
	pkts := []tuntest.Packet{tcpSegment(0, 100), tcpSegment(1, 100), udpDatagram(0, 100), udpDatagram(1, 100)}
	for rung, writes := range map[Offload]int{OffloadNone: 4, OffloadTSO: 3, OffloadFull: 2} {
		r := flushed(t, rung, pkts...)
		if len(r.raw) != writes {
			t.Errorf("%v: %d writes, want %d", rung, len(r.raw), writes)
		}
		sameBytes(t, r.packets(), pkts...)
	}
}

// A lone packet whose checksum is partial is marked so; one whose checksum is
// complete, right or wrong, is left for the kernel to judge.
func TestSinglePacketsAreWrittenAsTheyCame(t *testing.T) {
	for _, sum := range []tuntest.Checksum{tuntest.Good, tuntest.Partial, tuntest.Bad, tuntest.Zero} {
		for _, p := range []tuntest.Packet{tcpSegment(0, 10), udpDatagram(0, 10)} {
			p.Sum = sum
			r := flushed(t, OffloadFull, p)
			want := tuntest.Virtio{}
			if sum == tuntest.Partial {
				want = partialHeader(p.Bytes())
			}
			v, pkt, _ := tuntest.Read(r.raw[0])
			if v != want || !bytes.Equal(pkt, p.Bytes()) {
				t.Errorf("protocol %d, checksum kind %d: header %+v, want %+v", p.Proto, sum, v, want)
			}
		}
	}
}
