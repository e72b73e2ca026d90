package capture

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"tweed/encap"
	"tweed/engine"
	"tweed/engine/tap"
	"tweed/tun"
	"tweed/tun/tuntest"
)

const (
	here  = 0xc0000201 // 192.0.2.1
	there = 0xc0000202
)

// vxlanPrefix is what stands before a packet in vxlan framing.
func vxlanPrefix() []byte {
	b := make([]byte, encap.MaxPrefixLen)
	b[0] = 0x08
	binary.BigEndian.PutUint32(b[4:], 7<<8)
	copy(b[8:], []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0})
	return b
}

// seen shows a record at its points and copies the packets.
func seen(v *viewer, r *tap.Record, want tap.Points) []Packet {
	var out []Packet
	v.show(r, want, false, func(p *Packet) {
		q := *p
		q.Data = slices.Clone(p.Data)
		out = append(out, q)
	})
	return out
}

func record(points tap.Points, flags tap.Flags, prefix, pkt []byte) *tap.Record {
	data := append(slices.Clone(prefix), pkt...)
	return &tap.Record{Header: tap.Header{
		Time: 1e18, ID: 42, Points: points, Flags: flags, PrefixLen: uint8(len(prefix)), Segments: 1, ECN: 2,
		Peer: there, PeerPort: 8472, Local: here, LocalPort: 40000, Length: uint32(len(data)),
	}, Data: data}
}

// checkOuter decodes the outer headers with another implementation, checks
// lengths and checksums, and returns the payload.
func checkOuter(t *testing.T, p Packet, src, dst netip.AddrPort) []byte {
	t.Helper()
	if err := tuntest.CheckDecoded(p.Data); err != nil {
		t.Errorf("%s: %v", p.Point, err)
	}
	d := gopacket.NewPacket(p.Data, layers.LayerTypeIPv4, gopacket.NoCopy)
	ip, udp := d.NetworkLayer().(*layers.IPv4), d.TransportLayer().(*layers.UDP)
	a, _ := netip.AddrFromSlice(ip.SrcIP)
	b, _ := netip.AddrFromSlice(ip.DstIP)
	if netip.AddrPortFrom(a, uint16(udp.SrcPort)) != src || netip.AddrPortFrom(b, uint16(udp.DstPort)) != dst {
		t.Errorf("%s: %v:%d -> %v:%d, want %v -> %v", p.Point, a, udp.SrcPort, b, udp.DstPort, src, dst)
	}
	return udp.Payload
}

func TestAPacketIsShownAsItWasAtEachPoint(t *testing.T) {
	ours, theirs := netip.MustParseAddrPort("192.0.2.1:40000"), netip.MustParseAddrPort("192.0.2.2:8472")
	for name, prefix := range map[string][]byte{"udp": nil, "vxlan": vxlanPrefix()} {
		for _, proto := range []uint8{tuntest.TCP, tuntest.UDP, tuntest.ICMP} {
			whole := tuntest.Packet{Proto: proto, SrcPort: 5, DstPort: 6, TTL: 64, Payload: []byte("payload")}
			sent := whole
			sent.Sum = tuntest.Partial
			flags := tap.Partial
			if proto == tuntest.ICMP {
				flags, sent.Sum = 0, tuntest.Good
			}
			lowered := whole
			lowered.TTL = 64
			if name == "udp" {
				sent.TTL, lowered.TTL = 63, 63
				flags |= tap.TTLLowered
			}
			var v viewer
			got := seen(&v, record(tap.Of(tap.TunIn, tap.WireOut), flags, prefix, sent.Bytes()), tap.AllPoints)
			if len(got) != 2 || got[0].Point != tap.TunIn || got[1].Point != tap.WireOut {
				t.Fatalf("%s: %+v", name, got)
			}
			if !bytes.Equal(got[0].Data, whole.Bytes()) {
				t.Errorf("%s/%d: tun-in\n have % x\n want % x", name, proto, got[0].Data, whole.Bytes())
			}
			payload := checkOuter(t, got[1], ours, theirs)
			if want := append(slices.Clone(prefix), lowered.Bytes()...); !bytes.Equal(payload, want) {
				t.Errorf("%s/%d: wire-out\n have % x\n want % x", name, proto, payload, want)
			}
			for _, p := range got {
				if p.Unfinished || p.ID != 42 || p.Length != len(p.Data) || p.VXLAN != (prefix != nil) || p.Receive {
					t.Errorf("%s: %+v", name, p)
				}
			}

			r := record(tap.Of(tap.WireIn, tap.TunOut), 0, prefix, sent.Bytes())
			r.Receive, r.LocalPort = true, 8472
			got = seen(&v, r, tap.AllPoints)
			if len(got) != 2 || got[0].Point != tap.WireIn || got[1].Point != tap.TunOut {
				t.Fatalf("%s: %+v", name, got)
			}
			checkOuter(t, got[0], theirs, netip.MustParseAddrPort("192.0.2.1:8472"))
			if !bytes.Equal(got[1].Data, lowered.Bytes()) {
				t.Errorf("%s/%d: tun-out\n have % x\n want % x", name, proto, got[1].Data, lowered.Bytes())
			}
		}
	}
}

func TestACutPacketSaysWhatIsMissing(t *testing.T) {
	pkt := tuntest.Packet{Proto: tuntest.TCP, Payload: make([]byte, 500), Sum: tuntest.Partial}
	r := record(tap.Of(tap.TunIn, tap.WireOut), tap.Partial, vxlanPrefix(), pkt.Bytes())
	r.Data = r.Data[:100]
	var v viewer
	got := seen(&v, r, tap.AllPoints)
	if len(got) != 2 || !got[0].Unfinished || !got[1].Unfinished {
		t.Fatalf("%+v", got)
	}
	if got[0].Length != 540 || len(got[0].Data) != 78 || got[1].Length != 590 || len(got[1].Data) != 128 {
		t.Errorf("lengths %d/%d, %d/%d", len(got[0].Data), got[0].Length, len(got[1].Data), got[1].Length)
	}
	if sum := got[1].Data[26:28]; sum[0] != 0 || sum[1] != 0 {
		t.Errorf("outer checksum of what is not there: % x", sum)
	}
}

func TestADropIsShownAsItCame(t *testing.T) {
	var v viewer
	pkt := tuntest.Packet{Proto: tuntest.UDP}.Bytes()
	r := record(tap.Of(tap.WireIn, tap.Drop), 0, vxlanPrefix(), pkt)
	r.Receive, r.Reason = true, uint8(engine.RxWrongVNI)
	got := seen(&v, r, tap.Of(tap.Drop))
	if len(got) != 1 || got[0].Point != tap.Drop || !got[0].Outer || got[0].Reason != engine.RxWrongVNI {
		t.Fatalf("%+v", got)
	}
	r = record(tap.Of(tap.TunIn, tap.Drop), tap.Inner, nil, pkt)
	r.Reason, r.Peer, r.Local = uint8(engine.TxNoRoute), 0, 0
	got = seen(&v, r, tap.Of(tap.Drop))
	if len(got) != 1 || got[0].Outer || got[0].Peer.IsValid() || !bytes.Equal(got[0].Data, pkt) {
		t.Errorf("%+v", got)
	}
	for n := range 30 { // rests of packets
		for _, points := range []tap.Points{tap.Of(tap.WireIn, tap.Drop), tap.Of(tap.TunIn, tap.Drop), tap.Of(tap.TunIn, tap.WireOut)} {
			for _, flags := range []tap.Flags{0, tap.Inner, tap.Partial | tap.TTLLowered} {
				r := record(points, flags, nil, pkt[:min(n, len(pkt))])
				r.Receive = points.Has(tap.WireIn)
				r.PrefixLen = uint8(n % 3 * 11)
				if int(r.PrefixLen) > len(r.Data) {
					r.PrefixLen = 0
				}
				seen(&v, r, tap.AllPoints)
			}
		}
	}
}

func TestADroppedSuperPacketIsShownInSegments(t *testing.T) {
	const size = 1000
	super := tuntest.Packet{Proto: tuntest.TCP, Seq: 100, Flags: tuntest.ACK | tuntest.PSH, Payload: make([]byte, 2500), Sum: tuntest.Partial}
	for i := range super.Payload {
		super.Payload[i] = byte(i)
	}
	b := super.Bytes()
	r := record(tap.Of(tap.TunIn, tap.Drop), tap.Inner|tap.Super|tap.Partial, nil, b)
	r.Segments, r.SegmentPayload, r.Peer = 3, size, 0
	var v viewer
	got := seen(&v, r, tap.AllPoints)
	if len(got) != 6 {
		t.Fatalf("%d packets, want 3 at 2 points", len(got))
	}
	var s tun.Splitter
	h := tun.SuperHeader(b, size)
	if err := s.Start(b, &h); err != nil {
		t.Fatal(err)
	}
	s.Begin(b, false)
	for i := range 3 {
		head := make([]byte, s.HeaderLen())
		payload, _ := s.Next(head)
		want := append(head, payload...)
		for _, p := range got[2*i : 2*i+2] {
			if !bytes.Equal(p.Data, want) || p.ID != 42+uint64(i) || p.Length != len(want) || p.Unfinished {
				t.Errorf("segment %d at %s: %d bytes, id %d, length %d", i, p.Point, len(p.Data), p.ID, p.Length)
			}
			if err := tuntest.CheckDecoded(p.Data); err != nil {
				t.Error(err)
			}
		}
	}
	// Cut short, the lengths stay those of the segments.
	r.Data = b[:100]
	lengths := 0
	for _, p := range seen(&v, r, tap.Of(tap.Drop)) {
		lengths += p.Length
		if len(p.Data) < 40 {
			t.Errorf("a segment of %d bytes without its headers", len(p.Data))
		}
	}
	if lengths != 2500+3*40 {
		t.Errorf("segments of %d bytes together", lengths)
	}
}

func TestPaddingOfAFrameDoesNotReachTheInside(t *testing.T) {
	pkt := tuntest.Packet{Proto: tuntest.UDP, Payload: []byte("x"), TOS: 1}
	r := record(tap.Of(tap.WireIn, tap.TunOut), 0, vxlanPrefix(), append(pkt.Bytes(), make([]byte, 17)...))
	r.Receive, r.ECN = true, ecnCE
	var v viewer
	got := seen(&v, r, tap.AllPoints)
	pkt.TOS = ecnCE
	if len(got) != 2 || !bytes.Equal(got[1].Data, pkt.Bytes()) || got[1].Length != 29 || got[0].Length != 28+22+29+17 {
		t.Errorf("%+v", got)
	}
}

// TestADatagramWithoutChecksumIsShownWithout, as it was on the wire.
func TestADatagramWithoutChecksumIsShownWithout(t *testing.T) {
	pkt := tuntest.Packet{Proto: tuntest.UDP, Payload: []byte("x")}.Bytes()
	for flags, with := range map[tap.Flags]bool{0: true, tap.NoChecksum: false} {
		got := seen(&viewer{}, record(tap.Of(tap.WireOut), flags, vxlanPrefix(), pkt), tap.AllPoints)
		if len(got) != 1 || (binary.BigEndian.Uint16(got[0].Data[26:]) != 0) != with {
			t.Errorf("flags %d: %+v, want a checksum %t", flags, got, with)
		}
	}
}
