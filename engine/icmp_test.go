package engine

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"tweed/tun/tuntest"
)

// answer is an ICMP error as gopacket reads it.
type answer struct {
	ip     *layers.IPv4
	icmp   *layers.ICMPv4
	quoted []byte
}

func decodeAnswer(t *testing.T, raw []byte) answer {
	t.Helper()
	v, b, err := tuntest.Read(raw)
	if err != nil || v != (tuntest.Virtio{}) {
		t.Fatalf("%+v, error %v", v, err)
	}
	if err := tuntest.Check(b); err != nil { // lengths and header checksum
		t.Fatal(err)
	}
	pkt := gopacket.NewPacket(b, layers.LayerTypeIPv4, gopacket.Default)
	a := answer{}
	a.ip, _ = pkt.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	a.icmp, _ = pkt.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
	if a.ip == nil || a.icmp == nil {
		t.Fatalf("no ICMP: %v", pkt)
	}
	if s := tuntest.Sum(b[int(a.ip.IHL)*4:]); s != 0xffff {
		t.Errorf("ICMP sums to %#x", s)
	}
	a.quoted = a.icmp.Payload
	return a
}

// noRoute is a packet nobody has a lease for.
func noRoute(p tuntest.Packet) tuntest.Packet {
	p.Src, p.Dst = inside(-1, 9), inside(100, 1)
	return p
}

func TestICMPErrorsAreWhatTheStandardsAskFor(t *testing.T) {
	h := newHarness(t)
	expired := to(udpPeer, udp(50))
	expired.TTL = 1
	options := noRoute(tcp(30))
	options.IPOptions = bytes.Repeat([]byte{1}, 40)
	short := noRoute(tuntest.Packet{Proto: 99, Payload: make([]byte, 8)})
	for name, c := range map[string]struct {
		raw []byte
		is  layers.ICMPv4TypeCode
		mtu uint16
	}{
		"no route":                {plain(noRoute(udp(50))), layers.CreateICMPv4TypeCode(3, 0), 0},
		"no route, options":       {plain(options), layers.CreateICMPv4TypeCode(3, 0), 0},
		"no route, 8 bytes":       {plain(short), layers.CreateICMPv4TypeCode(3, 0), 0},
		"no route, super-packet":  {noRoute(tcp(5000)).Super(1000), layers.CreateICMPv4TypeCode(3, 0), 0},
		"no route, first segment": {plain(noRoute(tuntest.Packet{Proto: tuntest.UDP, Frag: tuntest.MoreFragments, Payload: make([]byte, 80)})), layers.CreateICMPv4TypeCode(3, 0), 0},
		"no route, echo":          {plain(noRoute(tuntest.Packet{Proto: tuntest.ICMP, Payload: []byte{8, 0, 0, 0, 0, 0, 0, 0}})), layers.CreateICMPv4TypeCode(3, 0), 0},
		"TTL":                     {plain(expired), layers.CreateICMPv4TypeCode(11, 0), 0},
		"too big":                 {plain(to(narrowPeer, tcp(1200))), layers.CreateICMPv4TypeCode(3, 4), 1000},
		"super-packet too big":    {to(narrowPeer, tcp(9000)).Super(1200), layers.CreateICMPv4TypeCode(3, 4), 1000},
	} {
		_, offender, _ := tuntest.Read(c.raw)
		h.send(bytes.Clone(c.raw))
		w := h.written()
		if len(w) != 1 {
			t.Errorf("%s: %d answers", name, len(w))
			continue
		}
		a := decodeAnswer(t, w[0])
		if a.icmp.TypeCode != c.is || a.icmp.Id != 0 || a.icmp.Seq != c.mtu {
			t.Errorf("%s: %v, unused %d, MTU %d", name, a.icmp.TypeCode, a.icmp.Id, a.icmp.Seq)
		}
		if !a.ip.SrcIP.Equal(inside(-1, 0).AsSlice()) || !a.ip.DstIP.Equal(offender[12:16]) || a.ip.TTL != 64 || a.ip.TOS != 0xc0 || a.ip.IHL != 5 {
			t.Errorf("%s: %+v", name, a.ip)
		}
		if n := int(offender[0]&0xf)*4 + 8; !bytes.Equal(a.quoted, offender[:n]) {
			t.Errorf("%s: quotes % x, want % x", name, a.quoted, offender[:n])
		}
	}
}

// RFC 1122 section 3.2.2: never about these.
func TestNoICMPErrorAboutWhatMustNotBeAnswered(t *testing.T) {
	h := newHarness(t)
	icmp := func(typ byte) tuntest.Packet {
		return noRoute(tuntest.Packet{Proto: tuntest.ICMP, Payload: []byte{typ, 0, 0, 0, 0, 0, 0, 0}})
	}
	with := func(src, dst string) tuntest.Packet {
		p := udp(50)
		p.Src, p.Dst = netip.MustParseAddr(src), netip.MustParseAddr(dst)
		return p
	}
	later := noRoute(udp(50))
	later.Frag = 1
	cases := map[string]tuntest.Packet{
		"later fragment":        later,
		"seven bytes":           noRoute(tuntest.Packet{Proto: 99, Payload: make([]byte, 7)}),
		"to multicast":          with("10.1.1.9", "224.0.0.251"),
		"to broadcast":          with("10.1.1.9", "255.255.255.255"),
		"from multicast":        with("224.0.0.1", "10.99.0.1"),
		"from nobody":           with("0.0.0.0", "10.99.0.1"),
		"from loopback":         with("127.0.0.1", "10.99.0.1"),
		"from broadcast":        with("255.255.255.255", "10.99.0.1"),
		"from a reserved block": with("240.0.0.1", "10.99.0.1"),
	}
	for _, typ := range []byte{3, 4, 5, 11, 12, 18, 40, 255} {
		cases["ICMP type "+string('0'+rune(typ%10))+"/"+string('0'+rune(typ/10))] = icmp(typ)
	}
	for name, p := range cases {
		h.send(plain(p))
		if w := h.written(); len(w) > 0 {
			t.Errorf("%s: answered", name)
		}
	}
	for _, typ := range []byte{0, 8, 13, 14} {
		h.send(plain(icmp(typ)))
		if w := h.written(); len(w) != 1 {
			t.Errorf("ICMP type %d is a query: not answered", typ)
		}
	}
	if s := h.change(); s.Tx.Drops != drops(TxNoRoute, uint64(len(cases)+4)) || s.ICMPSent != 4 || s.ICMPLimited != 0 {
		t.Errorf("%+v", s)
	}
}

func TestNoICMPErrorWithoutAnAddress(t *testing.T) {
	h := newHarness(t)
	h.e.view.Store(&view{})
	h.send(plain(noRoute(udp(9))))
	h.quiet()
	if s := h.change(); s.Tx.Drops != drops(TxNoRoute, 1) || s.ICMPSent != 0 {
		t.Errorf("%+v", s)
	}
}

// The clock is the test's: a second's answers are bounded for each host and in
// all, whatever the hosts are, and the next second starts afresh.
func TestICMPRateLimits(t *testing.T) {
	h := newHarness(t)
	now := int64(0)
	h.tx.icmp.now = func() int64 { return now }
	flood := func(hosts, n int) (sent, limited uint64) {
		var b [4]byte
		for k := range n {
			p := noRoute(udp(9))
			binary.BigEndian.PutUint32(b[:], 10<<24|1<<16|1<<8+uint32(k%hosts))
			p.Src = netip.AddrFrom4(b)
			h.send(plain(p))
			h.written()
		}
		s := h.change()
		if s.Tx.Drops != drops(TxNoRoute, uint64(n)) || s.ICMPSent+s.ICMPLimited != uint64(n) {
			t.Errorf("%d hosts: %+v", hosts, s)
		}
		return s.ICMPSent, s.ICMPLimited
	}
	if sent, _ := flood(1, 200); sent != icmpHostRate {
		t.Errorf("one host got %d answers in a second, want %d", sent, icmpHostRate)
	}
	if sent, _ := flood(200, 3000); sent > icmpRate-icmpHostRate || sent < icmpRate-icmpHostRate-32 {
		t.Errorf("200 hosts got %d answers in what was left of the second", sent)
	}
	if sent, _ := flood(200, 100); sent != 0 {
		t.Errorf("%d answers beyond the limit", sent)
	}
	now++
	if sent, _ := flood(1, 10); sent != 10 {
		t.Errorf("%d of 10 answers in a new second", sent)
	}
	flood(200, 3000) // to the end of it
	now -= 5         // a clock that jumps back is a new second too, not a lasting silence
	if sent, _ := flood(1, 10); sent != 10 {
		t.Errorf("%d of 10 answers after the clock went back", sent)
	}
}

// Not every second allows the same number: a fixed limit tells a third party
// how often somebody else was answered.
func TestICMPLimitVaries(t *testing.T) {
	h := newHarness(t)
	now := int64(0)
	h.tx.icmp.now = func() int64 { return now }
	seen := map[int]bool{}
	for range 40 {
		now++
		h.tx.icmp.allow(1)
		seen[h.tx.icmp.left] = true
	}
	if len(seen) < 5 {
		t.Errorf("%d different limits in 40 seconds", len(seen))
	}
}

func TestICMPAboutAPacketFromAPortGoesToThePort(t *testing.T) {
	h := newHarness(t)
	c := h.attach("c", inside(-1, 20))
	p := noRoute(udp(9))
	p.Src = inside(-1, 20)
	h.fromPort(c, plain(p))
	if w := readAll(t, c.fd); len(w) != 1 || decodeAnswer(t, w[0]).icmp.TypeCode != layers.CreateICMPv4TypeCode(3, 0) {
		t.Errorf("%d answers", len(w))
	}
	h.quiet()
}

func FuzzICMP(f *testing.F) {
	f.Add(noRoute(udp(9)).Bytes(), uint8(3), uint16(0))
	f.Add(noRoute(tuntest.Packet{Proto: tuntest.ICMP, IPOptions: make([]byte, 40), Payload: make([]byte, 8)}).Bytes(), uint8(11), uint16(576))
	var s icmpSender
	s.init()
	f.Fuzz(func(t *testing.T, ip []byte, typ uint8, mtu uint16) {
		w := &txWorker{}
		if _, ok := w.admit(ip); !ok || !answerable(ip) {
			return
		}
		out := s.build(0x0a010100, ip, icmpKind{typ, 0}, mtu)
		if err := tuntest.Check(out); err != nil {
			t.Fatal(err)
		}
		if n := int(ip[0]&0xf)*4 + 8; tuntest.Sum(out[20:]) != 0xffff || !bytes.Equal(out[28:], ip[:n]) {
			t.Fatalf("% x about % x", out, ip)
		}
	})
}
