package engine

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/encap"
	"tweed/tun/tuntest"
)

var framings = []encap.Framing{encap.FramingUDP, encap.FramingVXLAN}

// holder is a peer that a packet of the framing may come from.
func holder(f encap.Framing) int {
	if f == encap.FramingVXLAN {
		return vxlanPeer
	}
	return udpPeer
}

func TestPacketsReachTheHost(t *testing.T) {
	h := newHarness(t)
	for _, f := range framings {
		for i := range numPeers { // any holder may use any framing we listen for
			p := from(i, udp(100))
			h.transmit(h.peers[i], f, 0, framed(f, i, p.Bytes()))
			if got := h.delivered(); len(got) != 1 || !bytes.Equal(got[0], p.Bytes()) {
				t.Errorf("%v from peer %d: % x", f, i, got)
			}
			n := uint64(len(p.Bytes()))
			if s := h.change(); s.Rx != (Direction{Packets: 1, Bytes: n, Delivered: 1, DeliveredBytes: n}) {
				t.Errorf("%v from peer %d: %+v", f, i, s.Rx)
			}
		}
	}
}

// The spoof matrix: of all combinations of outer source, inner source and inner
// destination exactly one class passes, and each other is dropped for the first
// rule it breaks. Nothing of it reaches the TUN.
func TestSpoofMatrix(t *testing.T) {
	h := newHarness(t)
	type place struct {
		name string
		addr netip.Addr
	}
	at := netip.MustParseAddr
	passed, tried := 0, 0
	for _, f := range framings {
		own := holder(f)
		sources := []place{
			{"holder", inside(own, 5)}, {"holder's first", inside(own, 0)}, {"holder's last", inside(own, 255)},
			{"other peer", inside(narrowPeer, 5)}, {"our subnet", inside(-1, 5)}, {"our tunnel", inside(-1, 0)},
			{"this network", at("0.0.0.0")}, {"loopback", at("127.0.0.1")}, {"multicast", at("224.0.0.5")},
			{"reserved", at("240.0.0.1")}, {"broadcast", at("255.255.255.255")}, {"outside", at("8.8.8.8")},
			{"unleased", inside(100, 1)}, {"underlay of the holder", peerAddr(own)},
		}
		destinations := []place{
			{"ours", inside(-1, 9)}, {"our tunnel", inside(-1, 0)}, {"our last", inside(-1, 255)},
			{"the sender's", inside(own, 6)}, {"other peer's", inside(narrowPeer, 6)}, {"multicast", at("224.0.0.5")},
			{"broadcast", at("255.255.255.255")}, {"loopback", at("127.0.0.1")}, {"outside", at("8.8.8.8")}, {"unleased", inside(100, 1)},
		}
		for _, outer := range []int{own, narrowPeer, stranger} {
			for _, src := range sources {
				for _, dst := range destinations {
					p := udp(20)
					p.Src, p.Dst = src.addr, dst.addr
					h.transmit(h.peers[outer], f, 0, framed(f, outer, p.Bytes()))
					name := fmt.Sprintf("%v from peer %d, %s to %s", f, outer, src.name, dst.name)
					tried++

					holds := outer != stranger && src.addr.As4()[2] == inside(outer, 0).As4()[2] && src.addr.As4()[0] == 10
					forUs := ourSubnet.Contains(dst.addr)
					var want Reason
					switch {
					case outer == stranger:
						want = RxUnknownSource
					case ourSubnet.Contains(src.addr), src.name == "this network", src.name == "loopback", src.name == "multicast",
						src.name == "reserved", src.name == "broadcast", src.name == "underlay of the holder":
						want = RxMartian
					case !holds:
						want = RxSpoofedSource
					case !forUs:
						want = RxNotForUs
					default:
						passed++
						if s := h.change(); s.Rx.Delivered != 1 || len(h.written()) != 1 {
							t.Errorf("%s: %+v", name, s.Rx)
						}
						continue
					}
					if s := h.change(); s.Rx.Drops != drops(want, 1) || s.Rx.Delivered != 0 || s.Rx.Packets != 1 {
						t.Errorf("%s: %+v, want %v", name, s.Rx, want)
					}
					h.quiet()
				}
			}
		}
	}
	// 2 framings; per framing 3 sources of the holder, 1 of the other peer, 3 destinations.
	if passed != 2*(3+1)*3 || tried != 840 {
		t.Errorf("%d of %d combinations passed", passed, tried)
	}
}

// Every length of a good datagram, from nothing on.
func TestTruncatedDatagrams(t *testing.T) {
	h := newHarness(t)
	for _, f := range framings {
		i := holder(f)
		full := framed(f, i, from(i, tuntest.Packet{Proto: tuntest.UDP, IPOptions: make([]byte, 4), Payload: make([]byte, 9)}).Bytes())
		for n := range len(full) + 1 {
			h.transmitRaw(i, f, full[:n])
			want := Direction{Packets: 1, Bytes: uint64(max(n-f.PrefixLen(), 0))}
			switch inner := n - f.PrefixLen(); {
			case inner < 20:
				want.Drops = drops(RxTruncated, 1)
			case inner < 24:
				want.Drops = drops(RxBadIHL, 1)
			case n < len(full):
				want.Drops = drops(RxBadLength, 1)
			default:
				want.Delivered, want.DeliveredBytes = 1, want.Bytes
			}
			if s := h.change(); s.Rx != want {
				t.Errorf("%v, %d of %d bytes: %+v, want %+v", f, n, len(full), s.Rx, want)
			}
			if w := h.written(); len(w) != int(want.Delivered) {
				t.Errorf("%v, %d bytes: %d packets reached the TUN", f, n, len(w))
			}
		}
	}
}

// transmitRaw sends one datagram, which may be empty, without package encap.
func (h *harness) transmitRaw(from int, f encap.Framing, data []byte) {
	h.t.Helper()
	w := h.worker(f)
	at, _ := w.sock.LocalAddr()
	if err := unix.Sendto(h.peers[from].FD(), data, 0, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}); err != nil {
		h.t.Fatal(err)
	}
	h.receive(w)
}

func TestEveryReceiveReasonOfTheInnerHeader(t *testing.T) {
	h := newHarness(t)
	type edit = func(b []byte) []byte
	set := func(at int, v ...byte) edit {
		return func(b []byte) []byte { copy(b[at:], v); return b }
	}
	total := func(n int) edit {
		return func(b []byte) []byte { binary.BigEndian.PutUint16(b[2:], uint16(n)); return b }
	}
	for _, f := range framings {
		i := holder(f)
		cases := map[string]struct {
			edit   edit
			reason Reason
		}{
			"TTL 0":                   {set(8, 0), RxTTLZero},
			"total length 0":          {total(0), RxBadLength},
			"total length 19":         {total(19), RxBadLength},
			"total length 1 too much": {total(129), RxBadLength},
			"total length of 64 KiB":  {total(65535), RxBadLength},
			"total length below IHL":  {func(b []byte) []byte { b[0] = 0x4f; return total(59)(b) }, RxBadLength},
		}
		for v := range byte(16) {
			if v != 4 {
				cases[fmt.Sprintf("version %d", v)] = struct {
					edit   edit
					reason Reason
				}{set(0, v<<4|5), RxNotIPv4}
			}
		}
		for ihl := range byte(5) {
			cases[fmt.Sprintf("IHL %d", ihl)] = struct {
				edit   edit
				reason Reason
			}{set(0, 4<<4|ihl), RxBadIHL}
		}
		for name, c := range cases {
			b := c.edit(from(i, udp(100)).Bytes())
			h.transmit(h.peers[i], f, 0, framed(f, i, b))
			if s := h.change(); s.Rx.Drops != drops(c.reason, 1) || s.Rx.Packets != 1 {
				t.Errorf("%v, %s: %+v, want %v", f, name, s.Rx, c.reason)
			}
			h.quiet()
		}
		for ttl := 1; ttl <= 2; ttl++ { // passes, and is not lowered here
			p := from(i, udp(5))
			p.TTL = uint8(ttl)
			h.transmit(h.peers[i], f, 0, framed(f, i, p.Bytes()))
			if got := h.delivered(); len(got) != 1 || !bytes.Equal(got[0], p.Bytes()) {
				t.Errorf("%v, TTL %d: % x", f, ttl, got)
			}
		}
		// Fragments pass untouched; only the IPv4 header is looked at.
		for _, frag := range []uint16{tuntest.MoreFragments, 100, tuntest.MoreFragments | 8190} {
			p := from(i, udp(40))
			p.Frag, p.Sum = frag, tuntest.Bad
			h.transmit(h.peers[i], f, 0, framed(f, i, p.Bytes()))
			if got := h.delivered(); len(got) != 1 || !bytes.Equal(got[0], p.Bytes()) {
				t.Errorf("%v, fragment %#x: % x", f, frag, got)
			}
		}
		h.change()
	}
}

func TestEveryReceiveReasonOfTheVXLANHeader(t *testing.T) {
	h := newHarness(t)
	at := func(i int, v ...byte) func(b []byte) { return func(b []byte) { copy(b[i:], v) } }
	for name, c := range map[string]struct {
		edit   func(b []byte)
		reason Reason
	}{
		"no I flag":          {at(0, 0), RxBadVXLANFlags},
		"another flag":       {at(0, 0x0c), RxBadVXLANFlags},
		"group policy":       {at(0, 0x88), RxBadVXLANFlags},
		"reserved":           {at(3, 1), RxBadVXLANFlags},
		"reserved, at end":   {at(7, 1), RxBadVXLANFlags},
		"VNI":                {at(6, 8), RxWrongVNI},
		"somebody's frame":   {at(8, 2, 0, 0, 0, 2, 4), RxWrongMAC},
		"broadcast":          {at(8, 255, 255, 255, 255, 255, 255), RxWrongMAC},
		"multicast source":   {at(14, 3), RxWrongMAC},
		"our own source":     {at(14, ourMAC[:]...), RxWrongMAC},
		"ARP":                {at(20, 8, 6), RxNotIPv4},
		"IPv6":               {at(20, 0x86, 0xdd), RxNotIPv4},
		"VLAN":               {at(20, 0x81, 0), RxNotIPv4},
		"IPv6 inside IPv4's": {at(22, 0x60), RxNotIPv4},
	} {
		b := framed(encap.FramingVXLAN, vxlanPeer, from(vxlanPeer, udp(50)).Bytes())
		c.edit(b)
		h.transmit(h.peers[vxlanPeer], encap.FramingVXLAN, 0, b)
		if s := h.change(); s.Rx.Drops != drops(c.reason, 1) || s.Rx.Packets != 1 {
			t.Errorf("%s: %+v, want %v", name, s.Rx, c.reason)
		}
		h.quiet()
	}
}

func TestPaddingIsTrimmed(t *testing.T) {
	h := newHarness(t)
	for _, f := range framings {
		i := holder(f)
		p := from(i, udp(1))
		h.transmit(h.peers[i], f, 0, append(framed(f, i, p.Bytes()), make([]byte, 17)...))
		if got := h.delivered(); len(got) != 1 || !bytes.Equal(got[0], p.Bytes()) {
			t.Errorf("%v: % x", f, got)
		}
	}
}

// RFC 6040 figure 4, as Linux implements it.
func TestECNTable(t *testing.T) {
	const notECT, ect1, ect0, ce, drop = 0, 1, 2, 3, 4
	table := map[byte][4]byte{ // inner: by outer not-ECT, ECT(1), ECT(0), CE
		notECT: {notECT, notECT, notECT, drop},
		ect1:   {ect1, ect1, ect1, ce},
		ect0:   {ect0, ect1, ect0, ce},
		ce:     {ce, ce, ce, ce},
	}
	h := newHarness(t)
	for _, f := range framings {
		i := holder(f)
		for inner, row := range table {
			for outer, want := range row {
				for _, train := range []int{1, 3} { // alone, and merged
					var in, expect [][]byte
					for k := range train {
						p := from(i, tcp(100))
						p.TOS, p.ID, p.Seq, p.Sum = 0xb8|inner, uint16(k), uint32(100*k), tuntest.Partial
						in = append(in, framed(f, i, p.Bytes()))
						p.TOS, p.Sum = 0xb8|want, tuntest.Good
						expect = append(expect, p.Bytes())
					}
					if want == drop {
						expect = nil
					}
					h.transmit(h.segmenting(i), f, byte(outer), in...)
					if got := h.delivered(); !equalPackets(got, expect) {
						t.Errorf("%v, outer %d, inner %d, %d packets:\n have % .22x\n want % .22x", f, outer, inner, train, got, expect)
					}
					if s := h.change(); want == drop && s.Rx.Drops != drops(RxECN, uint64(train)) {
						t.Errorf("%v, outer %d, inner %d: %+v", f, outer, inner, s.Rx)
					}
				}
			}
		}
	}
}

func TestDeviceThatTakesNothing(t *testing.T) {
	h := newHarness(t)
	if err := unix.Shutdown(h.host, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	var in [][]byte
	for k := range 5 {
		p := from(udpPeer, tcp(100))
		p.Seq = uint32(100 * k)
		in = append(in, p.Bytes())
	}
	h.transmit(h.segmenting(udpPeer), encap.FramingUDP, 0, append(in, from(udpPeer, udp(7)).Bytes())...)
	if s := h.change(); s.Rx.Drops != drops(RxTUNError, 6) || s.Rx.Packets != 6 {
		t.Errorf("%+v", s.Rx)
	}
}

// Before the first snapshot, and for peers that have left, every source is a stranger.
func TestSourcesComeAndGoWithTheSnapshot(t *testing.T) {
	h := newHarness(t)
	send := func(i int) Direction {
		h.transmit(h.peers[i], encap.FramingUDP, 0, from(i, udp(10)).Bytes())
		h.written()
		return h.change().Rx
	}
	all := h.snap.Peers
	if d := send(udpPeer); d.Delivered != 1 {
		t.Errorf("%+v", d)
	}
	h.snap.Peers = all[1:]
	h.apply()
	if d := send(udpPeer); d.Drops != drops(RxUnknownSource, 1) {
		t.Errorf("peer gone: %+v", d)
	}
	// Another lease of the same host does not let it speak for its old one.
	other := all[udpPeer]
	other.Subnet = netip.MustParsePrefix("10.77.0.0/24")
	h.snap.Peers = append([]tablePeer{other}, all[1:]...)
	h.apply()
	if d := send(udpPeer); d.Drops != drops(RxSpoofedSource, 1) {
		t.Errorf("peer moved: %+v", d)
	}
	h.snap.Peers = all
	h.apply()
	if d := send(udpPeer); d.Delivered != 1 {
		t.Errorf("peer back: %+v", d)
	}
	h.e.view.Store(&view{})
	if d := send(udpPeer); d.Drops != drops(RxUnknownSource, 1) {
		t.Errorf("no snapshot: %+v", d)
	}
}

func TestReceiveRoundsAllocateNothing(t *testing.T) {
	h := newHarness(t)
	for _, f := range framings {
		i, w := holder(f), h.worker(f)
		at, _ := w.sock.LocalAddr()
		s, b, dst := h.segmenting(i), encap.NewSendBatch(), encap.NewDest(at)
		b.Reset(s)
		var in [][]byte
		for k := range 20 {
			p := from(i, tcp(1000))
			p.Seq, p.Sum = uint32(1000*k), tuntest.Partial
			in = append(in, framed(f, i, p.Bytes()))
		}
		in = append(in, framed(f, i, from(i, udp(30)).Bytes()), []byte("junk"), framed(f, narrowPeer, from(narrowPeer, udp(9)).Bytes()))
		buf := make([]byte, 70000)
		var res encap.SendResult
		if n := testing.AllocsPerRun(50, func() {
			for _, d := range in {
				b.Add(dst, 0, 0, d, nil)
			}
			s.Send(b, &res)
			for {
				n, err := w.sock.TryRecv(w.batch)
				if err != nil || n == 0 {
					break
				}
				w.round(n)
			}
			for n := 1; n > 0; {
				n, _ = unix.Read(h.host, buf)
			}
		}); n != 0 {
			t.Errorf("%v: %v allocations a round", f, n)
		}
	}
}
