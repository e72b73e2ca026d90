package engine

import (
	"bytes"
	"net/netip"
	"os"
	"slices"
	"testing"

	"tweed/encap"
	"tweed/netns"
	"tweed/tun"
	"tweed/tun/tuntest"
)

// lowered is the packet as the udp framing sends it: one hop further.
func lowered(p tuntest.Packet) []byte {
	if p.TTL == 0 {
		p.TTL = 64
	}
	p.TTL--
	return p.Bytes()
}

// onWire is the packet as it travels to peer i.
func onWire(i int, p tuntest.Packet) []byte {
	if i == vxlanPeer || i == vxlanTweed {
		return p.Bytes()
	}
	return lowered(p)
}

func tcp(n int) tuntest.Packet {
	return tuntest.Packet{Proto: tuntest.TCP, SrcPort: 4000, DstPort: 80, Flags: tuntest.ACK, Window: 9, Seq: 1,
		Frag: tuntest.DontFragment, Payload: bytes.Repeat([]byte("t"), n)}
}

func udp(n int) tuntest.Packet {
	return tuntest.Packet{Proto: tuntest.UDP, SrcPort: 4000, DstPort: 53, Payload: bytes.Repeat([]byte("u"), n)}
}

func TestPacketsGoToTheirPeerInItsFraming(t *testing.T) {
	h := newHarness(t)
	for i := range numPeers {
		p := to(i, udp(100+i))
		h.send(plain(p))
		got := h.inner(i)
		if len(got) != 1 || !bytes.Equal(got[0], onWire(i, p)) {
			t.Errorf("peer %d: % x", i, got)
		}
		h.quiet()
		n := uint64(len(p.Bytes()))
		if s := h.change(); s.Tx != (Direction{Packets: 1, Bytes: n, Delivered: 1, DeliveredBytes: n}) {
			t.Errorf("peer %d: %+v", i, s.Tx)
		}
	}
}

// Reasons of the transmit direction that the packet itself is to blame for.
func TestEveryTransmitReason(t *testing.T) {
	h := newHarness(t)
	edit := func(p tuntest.Packet, f func(b []byte) []byte) []byte {
		return tuntest.Virtio{}.Prepend(f(p.Bytes()))
	}
	set := func(at int, v byte) func(b []byte) []byte {
		return func(b []byte) []byte { b[at] = v; return b }
	}
	cut := func(n int) func(b []byte) []byte { return func(b []byte) []byte { return b[:n] } }
	good := to(udpPeer, udp(100))
	ttl := func(i int, ttl byte) []byte {
		return edit(to(i, udp(10)), func(b []byte) []byte { b[8] = ttl; tuntest.SetIPChecksum(b); return b })
	}
	ipv6Super := tuntest.Virtio{Flags: 1, GSOType: 4, HdrLen: 60, GSOSize: 1000, CsumStart: 40, CsumOffset: 16}.Prepend(append([]byte{0x60}, make([]byte, 3000)...))
	badSuper := func(f func(b []byte)) []byte {
		raw := to(udpPeer, tcp(3000)).Super(1000)
		f(raw)
		return raw
	}
	for name, c := range map[string]struct {
		raw    []byte
		reason Reason
		icmp   bool
	}{
		"IPv6":                         {edit(good, set(0, 0x60)), TxNotIPv4, false},
		"IPv6 super-packet":            {ipv6Super, TxNotIPv4, false},
		"version 0":                    {edit(good, set(0, 0x05)), TxNotIPv4, false},
		"one byte":                     {tuntest.Virtio{}.Prepend([]byte{0x45}), TxMalformed, false},
		"19 bytes":                     {edit(good, cut(19)), TxMalformed, false},
		"IHL 4":                        {edit(good, set(0, 0x44)), TxMalformed, false},
		"IHL beyond total length":      {edit(good, func(b []byte) []byte { b[0], b[2], b[3] = 0x4f, 0, 59; return b }), TxMalformed, false},
		"total length beyond packet":   {edit(good, cut(127)), TxMalformed, false},
		"total length below header":    {edit(good, func(b []byte) []byte { b[2], b[3] = 0, 19; return b }), TxMalformed, false},
		"partial, start beyond":        {tuntest.Virtio{Flags: 1, CsumStart: 200}.Prepend(good.Bytes()), TxMalformed, false},
		"partial, field beyond":        {tuntest.Virtio{Flags: 1, CsumStart: 20, CsumOffset: 107}.Prepend(good.Bytes()), TxMalformed, false},
		"partial, field is the source": {tuntest.Virtio{Flags: 1, CsumStart: 12}.Prepend(good.Bytes()), TxMalformed, false},
		"super-packet, one byte each":  {to(udpPeer, tcp(2000)).Super(1), TxMalformed, false},
		"super-packet, no size":        {badSuper(func(b []byte) { b[4], b[5] = 0, 0 }), TxMalformed, false},
		"super-packet, short TCP":      {badSuper(func(b []byte) { b[10+32] = 0x40 }), TxMalformed, false},
		"no lease":                     {plain(tuntest.Packet{Src: inside(-1, 9), Dst: inside(100, 1), Proto: tuntest.UDP, Payload: make([]byte, 8)}), TxNoRoute, true},
		"our own subnet":               {plain(tuntest.Packet{Src: inside(-1, 9), Dst: inside(-1, 8), Proto: tuntest.UDP, Payload: make([]byte, 8)}), TxNoRoute, true},
		"multicast":                    {plain(tuntest.Packet{Src: inside(-1, 9), Dst: netip.MustParseAddr("224.0.0.251"), Proto: tuntest.UDP}), TxNoRoute, false},
		"TTL 1, udp framing":           {ttl(udpPeer, 1), TxTTLExpired, true},
		"TTL 0, udp framing":           {ttl(udpPeer, 0), TxTTLExpired, true},
		"TTL 0, vxlan framing":         {ttl(vxlanPeer, 0), TxTTLExpired, true},
		"above the peer's MTU":         {plain(to(narrowPeer, tcp(961))), TxTooBig, true},
		"super-packet above it":        {to(narrowPeer, tcp(3000)).Super(961), TxTooBig, true},
	} {
		h.send(c.raw)
		segments := uint64(1)
		if name == "super-packet above it" {
			segments = 4
		}
		s := h.change()
		if s.Tx.Drops != drops(c.reason, segments) || s.Tx.Packets != segments || s.Tx.Delivered != 0 {
			t.Errorf("%s: %+v, want %v", name, s.Tx, c.reason)
		}
		if w := h.written(); (len(w) == 1) != c.icmp || len(w) > 1 || s.ICMPSent != uint64(len(w)) {
			t.Errorf("%s: %d packets to the host, %d counted", name, len(w), s.ICMPSent)
		}
		h.quiet()
	}
}

func TestTTLOfWhatPasses(t *testing.T) {
	h := newHarness(t)
	for i, ttls := range map[int][]byte{udpPeer: {2, 3, 64, 255}, vxlanPeer: {1, 2, 64, 255}} {
		for _, ttl := range ttls {
			p := to(i, udp(10))
			p.TTL = ttl
			h.send(plain(p))
			got := h.inner(i)
			if len(got) != 1 || !bytes.Equal(got[0], onWire(i, p)) {
				t.Errorf("peer %d, TTL %d: % x", i, ttl, got)
			}
		}
	}
}

func TestMTUOfAPeerBindsOnlyWhatMayNotBeFragmented(t *testing.T) {
	h := newHarness(t)
	for name, c := range map[string]struct {
		raw  []byte
		want int
	}{
		"DF, as long as the way takes":   {plain(to(narrowPeer, tcp(960))), 1},
		"no DF, longer":                  {plain(to(narrowPeer, udp(1300))), 1},
		"super-packet that fits":         {to(narrowPeer, tcp(3000)).Super(960), 4},
		"super-packet, short":            {to(narrowPeer, tcp(900)).Super(899), 2},
		"super-packet of one segment":    {to(narrowPeer, tcp(900)).Super(2000), 1},
		"super-packet without DF":        {to(narrowPeer, udp(3000)).Super(1300), 3},
		"DF, longer, to somebody else's": {plain(to(udpPeer, tcp(1300))), 0},
	} {
		h.send(c.raw)
		if got := h.inner(narrowPeer); len(got) != c.want {
			t.Errorf("%s: %d datagrams, want %d", name, len(got), c.want)
		}
		h.arrived(udpPeer)
		h.quiet()
	}
}

func TestECNIsCopiedOutward(t *testing.T) {
	h := newHarness(t)
	for i := range numPeers {
		for _, tos := range []byte{0, 1, 2, 3, 0xb8, 0xb9, 0xff} {
			single, super := to(i, udp(100)), to(i, tcp(1800))
			single.TOS, super.TOS = tos, tos
			h.send(plain(single), super.Super(900))
			got := h.arrived(i)
			if len(got) != 3 {
				t.Fatalf("peer %d: %d datagrams", i, len(got))
			}
			for _, a := range got {
				if a.tos != tos&3 {
					t.Errorf("peer %d, inner %#x: outer %#x", i, tos, a.tos)
				}
			}
		}
	}
}

// Super-packets arrive as the segments the kernel would have made; only a peer
// that says so gets them without checksums.
func TestSuperPacketsAreSplitForTheWire(t *testing.T) {
	h := newHarness(t)
	cwr := tcp(9000)
	cwr.Flags |= tuntest.CWR | tuntest.FIN | tuntest.PSH
	for name, p := range map[string]tuntest.Packet{"tcp": tcp(60000), "tcp flags": cwr, "udp": udp(20000), "two": tcp(1001)} {
		for i := range numPeers {
			size := 1000
			if i == narrowPeer {
				size = 900
			}
			p := to(i, p)
			hop := p
			if i != vxlanPeer && i != vxlanTweed {
				hop.TTL = 63
			}
			want, err := tuntest.Split(hop.Super(size))
			if err != nil {
				t.Fatal(err)
			}
			h.send(p.Super(size))
			got := h.inner(i)
			partial := 0
			for k, b := range got {
				if tuntest.Check(b) != nil {
					partial++
					got[k] = tuntest.Complete(b)
				}
			}
			if !equalPackets(got, want) {
				t.Errorf("%s to peer %d: %d segments differ from the %d expected", name, i, len(got), len(want))
			}
			elided := i == udpTweed || i == vxlanTweed
			if elided && partial < len(got)-1 || !elided && partial > 0 {
				t.Errorf("%s to peer %d: %d of %d without checksum", name, i, partial, len(got))
			}
			n := uint64(len(want))
			if s := h.change(); s.Tx.Packets != n || s.Tx.Delivered != n || s.Tx.Bytes != s.Tx.DeliveredBytes || s.Tx.Bytes != bytesOf(want) {
				t.Errorf("%s to peer %d: %+v", name, i, s.Tx)
			}
		}
	}
}

func equalPackets(a, b [][]byte) bool { return slices.EqualFunc(a, b, bytes.Equal) }

func bytesOf(pkts [][]byte) (n uint64) {
	for _, p := range pkts {
		n += uint64(len(p))
	}
	return n
}

// Single packets whose checksum the host left to us.
func TestPartialChecksums(t *testing.T) {
	h := newHarness(t)
	offset := map[uint8]uint16{tuntest.TCP: 16, tuntest.UDP: 6}
	for i := range numPeers {
		for name, p := range map[string]tuntest.Packet{
			"tcp": tcp(100), "udp": udp(100), "options": {Proto: tuntest.UDP, IPOptions: make([]byte, 8), Payload: []byte("x")},
		} {
			p = to(i, p)
			p.Sum = tuntest.Partial
			b := p.Bytes()
			ihl := uint16(b[0]&0xf) * 4
			v := tuntest.Virtio{Flags: tuntest.NeedsCsum, CsumStart: ihl, CsumOffset: offset[p.Proto]}
			h.send(v.Prepend(b))
			want := onWire(i, p)
			if i != udpTweed && i != vxlanTweed {
				want = tuntest.Complete(want)
			}
			if got := h.inner(i); len(got) != 1 || !bytes.Equal(got[0], want) {
				t.Errorf("%s to peer %d:\n have % x\n want % x", name, i, got, want)
			}
		}
		// A checksum the receiver could not find again is made here: this one
		// starts behind the transport header.
		p := to(i, udp(100))
		b := p.Bytes()
		h.send(tuntest.Virtio{Flags: tuntest.NeedsCsum, CsumStart: 40, CsumOffset: 10}.Prepend(b))
		if got := h.inner(i); len(got) != 1 || bytes.Equal(got[0][50:52], b[50:52]) {
			t.Errorf("peer %d: an odd checksum was left to it", i)
		}
	}
}

// With the udp framing datagrams come from the port we listen on, as flannel's
// do; with vxlan from a few others, and a flow never changes its own.
func TestSourcePorts(t *testing.T) {
	h := newHarness(t)
	listen := h.e.Listening()[0].Addr.Port()
	h.send(plain(to(udpPeer, udp(1))), to(udpPeer, tcp(3000)).Super(1000))
	for _, a := range h.arrived(udpPeer) {
		if a.port != listen {
			t.Errorf("udp framing from port %d, want %d", a.port, listen)
		}
	}
	ports := map[uint16]int{}
	for flow := range 256 {
		p, q := to(vxlanPeer, udp(10)), to(vxlanPeer, tcp(2000))
		p.SrcPort, q.SrcPort, q.DstPort = uint16(flow), uint16(flow), p.DstPort
		h.send(plain(p), q.Super(1000), plain(p))
		got := h.arrived(vxlanPeer)
		var u, s []uint16
		for _, a := range got {
			if a.data[encap.MaxPrefixLen+9] == tuntest.UDP {
				u = append(u, a.port)
			} else {
				s = append(s, a.port)
			}
		}
		if len(u) != 2 || u[0] != u[1] || len(s) != 2 || s[0] != s[1] {
			t.Fatalf("flow %d: ports %v and %v", flow, u, s)
		}
		ports[u[0]]++
	}
	for port, n := range ports {
		if port == listen || n < 20 {
			t.Errorf("port %d carries %d of 256 flows", port, n)
		}
	}
	if len(ports) != vxlanSources {
		t.Errorf("%d source ports, want %d", len(ports), vxlanSources)
	}
	// All fragments of a datagram go one way: only the first has ports.
	first, later := to(vxlanPeer, udp(800)), to(vxlanPeer, udp(800))
	first.Frag, later.Frag, later.SrcPort = tuntest.MoreFragments, 101, 999
	h.send(plain(first), plain(later))
	if got := h.arrived(vxlanPeer); len(got) != 2 || got[0].port != got[1].port {
		t.Errorf("fragments from different ports: %d", len(got))
	}
}

// A burst for everybody at once: nothing is lost or changed, and each flow
// keeps its order.
func TestBurstKeepsOrderWithinAFlow(t *testing.T) {
	h := newHarness(t)
	want := map[int][][]byte{}
	var raw [][]byte
	for n := range 120 {
		i := n * 7 % numPeers
		p := to(i, udp(50+n%3*20))
		p.ID = uint16(n)
		if n%10 == 3 {
			p = to(i, tcp(2500))
			p.ID = uint16(n)
			hop := p
			if i != vxlanPeer && i != vxlanTweed {
				hop.TTL = 63
			}
			segs, err := tuntest.Split(hop.Super(900))
			if err != nil {
				t.Fatal(err)
			}
			raw, want[i] = append(raw, p.Super(900)), append(want[i], segs...)
			continue
		}
		raw, want[i] = append(raw, plain(p)), append(want[i], onWire(i, p))
	}
	h.send(raw...)
	flow := func(pkts [][]byte, proto byte) (out [][]byte) {
		for _, p := range pkts {
			if p[9] == proto {
				out = append(out, tuntest.Complete(p))
			}
		}
		return out
	}
	for i := range numPeers {
		got := h.inner(i)
		for _, proto := range []byte{tuntest.TCP, tuntest.UDP} {
			if !equalPackets(flow(got, proto), flow(want[i], proto)) {
				t.Errorf("peer %d, protocol %d: %d packets, want %d, or not in order", i, proto, len(flow(got, proto)), len(flow(want[i], proto)))
			}
		}
	}
}

// More segments than one batch, or the header slab, holds.
func TestSuperPacketOfVeryManySegments(t *testing.T) {
	h := newHarness(t)
	for i, size := range map[int]int{udpPeer: 20, vxlanPeer: 16} {
		p := to(i, tcp(30000))
		p.TCPOptions, p.IPOptions = make([]byte, 40), make([]byte, 40) // 120 bytes of headers a segment
		hop := p
		if i == udpPeer {
			hop.TTL = 63
		}
		want, err := tuntest.Split(hop.Super(size))
		if err != nil {
			t.Fatal(err)
		}
		h.send(p.Super(size))
		got := h.inner(i)
		if !equalPackets(got, want) {
			t.Errorf("peer %d: %d segments of %d arrived right", i, len(got), len(want))
		}
		if s := h.change(); s.Tx.Delivered != uint64(len(want)) {
			t.Errorf("peer %d: %+v", i, s.Tx)
		}
	}
}

// The kernel's refusals, as far as a kernel can be made to refuse.
func TestKernelsRefusalsAreNamed(t *testing.T) {
	h := newHarness(t)
	for name, c := range map[string]struct {
		endpoint string
		reason   Reason
	}{
		"broadcast is not permitted": {"127.255.255.255:8285", TxRefused},
		"no such network":            {"192.0.2.1:8285", TxUnreachable},
	} {
		if h.ns == nil && c.reason == TxUnreachable {
			impossible(t, netns.CheckPrivileges())
		}
		h.snap.Peers[udpPeer].Endpoint = netip.MustParseAddrPort(c.endpoint)
		h.apply()
		h.send(plain(to(udpPeer, udp(10))), to(udpPeer, tcp(2700)).Super(900), plain(to(udpTweed, udp(10))))
		if s := h.change(); s.Tx.Drops != drops(c.reason, 4) || s.Tx.Delivered != 1 || s.Tx.Packets != 5 {
			t.Errorf("%s: %+v", name, s.Tx)
		}
		if !h.e.Stats().SendSegmented {
			t.Errorf("%s: segmentation given up for everybody", name)
		}
		h.arrived(udpTweed)
		h.quiet()
	}
	h.snap.Peers[udpPeer] = h.peer(udpPeer)
	h.apply()
	h.send(plain(to(udpPeer, udp(65490)))) // more than a datagram holds
	if s := h.change(); s.Tx.Drops != drops(TxTooBig, 1) {
		t.Errorf("more than a datagram holds: %+v", s.Tx)
	}
}

// impossible reports why a test cannot run here. With CI=true that is a failure.
func impossible(t testing.TB, why error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// refusing is a socket whose kernel takes nothing.
type refusing struct {
	sender
	class encap.SendError
	tags  int
}

func (r *refusing) Send(b *encap.SendBatch, res *encap.SendResult) {
	told := res.Refused
	all := encap.SendResult{}
	r.sender.Send(b, &all)
	res.Failed[r.class] = all.Sent
	if told != nil {
		r.tags++
	}
}

func TestEverySendErrorHasItsReason(t *testing.T) {
	for class, reason := range map[encap.SendError]Reason{
		encap.SendOther: TxSendError, encap.SendRefused: TxRefused, encap.SendUnreachable: TxUnreachable,
		encap.SendNoBuffer: TxNoBuffer, encap.SendTooBig: TxTooBig,
	} {
		h := newHarness(t)
		for i := range h.tx.outs {
			h.tx.outs[i].sock = &refusing{sender: h.tx.outs[i].sock, class: class}
		}
		h.send(plain(to(udpPeer, udp(10))), to(vxlanPeer, tcp(2700)).Super(900))
		s := h.change()
		if s.Tx.Drops != drops(reason, 4) || s.Tx.Delivered != 0 || s.Tx.DeliveredBytes != 0 {
			t.Errorf("class %d: %+v", class, s.Tx)
		}
	}
}

func TestTransmitRoundsAllocateNothing(t *testing.T) {
	h := newHarnessAt(t, tun.OffloadFull)
	var raw [][]byte
	for i := range numPeers {
		raw = append(raw, plain(to(i, udp(100))), to(i, tcp(9000)).Super(900), plain(tuntest.Packet{Proto: 99, Dst: netip.MustParseAddr("224.0.0.1")}))
	}
	if n := testing.AllocsPerRun(50, func() {
		h.tx.batch.Load(raw...)
		h.tx.round()
		for i := range numPeers {
			for n := -1; n != 0; {
				n, _ = h.peers[i].TryRecv(h.read)
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations a round", n)
	}
}
