package tun

import (
	"bytes"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"tweed/tun/tuntest"
)

// segments runs the splitter over what a queue delivered, as the transmit
// worker does: the first segment's headers are rewritten in place, the others
// written elsewhere, and every segment is put together only at the end.
func segments(t testing.TB, raw []byte, partial bool) [][]byte {
	t.Helper()
	v, pkt, err := tuntest.Read(raw)
	if err != nil {
		t.Fatal(err)
	}
	pkt = bytes.Clone(pkt)
	var s Splitter
	if err := s.Start(pkt, header(v)); err != nil {
		t.Fatalf("start: %v", err)
	}
	s.Begin(pkt, partial)
	var heads, payloads [][]byte
	for {
		head := make([]byte, s.HeaderLen())
		if len(heads) == 0 {
			head = pkt[:s.HeaderLen()]
		}
		payload, ok := s.Next(head)
		if !ok {
			break
		}
		heads, payloads = append(heads, head), append(payloads, payload)
	}
	if len(heads) != s.Count() {
		t.Fatalf("%d segments, Count says %d", len(heads), s.Count())
	}
	out := make([][]byte, len(heads))
	for i := range heads {
		out[i] = append(bytes.Clone(heads[i]), payloads[i]...)
		if i < len(heads)-1 && len(out[i]) != s.SegmentLen() {
			t.Fatalf("segment %d has %d bytes, SegmentLen says %d", i, len(out[i]), s.SegmentLen())
		}
	}
	return out
}

// drawSuper draws a super-packet of at least two segments and its segment size.
func drawSuper(t *rapid.T) (tuntest.Packet, int) {
	p := drawPacket(t, rapid.SampledFrom([]uint8{tuntest.TCP, tuntest.UDP}).Draw(t, "proto"))
	size := rapid.IntRange(1, 200).Draw(t, "size")
	n := rapid.IntRange(size+1, min(64*size, 4000)+1).Draw(t, "length")
	p.Payload = make([]byte, min(n, 64*size))
	for i := range p.Payload {
		p.Payload[i] = byte(i*7 + i>>8)
	}
	if len(p.Payload) <= size {
		p.Payload = append(p.Payload, 1)
	}
	return p, size
}

// The kernel's rules, written a second time in tuntest, give the same bytes:
// payload in order, lengths, IDs, sequence numbers, FIN, PSH and CWR, checksums.
func TestSegmentsAreThoseTheKernelMakes(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p, size := drawSuper(rt)
		raw := p.Super(size)
		want, err := tuntest.Split(raw)
		if err != nil {
			rt.Fatal(err)
		}
		got := segments(t, raw, false)
		if len(got) != len(want) {
			rt.Fatalf("%d segments, want %d", len(got), len(want))
		}
		for i := range got {
			if !bytes.Equal(got[i], want[i]) {
				rt.Fatalf("segment %d of %d:\n have % x\n want % x", i, len(got), got[i], want[i])
			}
			if err := tuntest.Check(got[i]); err != nil {
				rt.Fatalf("segment %d: %v", i, err)
			}
		}
	})
}

func TestSegmentsDecodeInGopacket(t *testing.T) {
	payload := make([]byte, 5000)
	for name, p := range map[string]tuntest.Packet{
		"tcp":            {Proto: tuntest.TCP, Flags: tuntest.ACK | tuntest.PSH | tuntest.FIN | tuntest.CWR, Seq: 1<<32 - 2000, ID: 0xfffe},
		"tcp timestamps": {Proto: tuntest.TCP, Flags: tuntest.ACK, TCPOptions: []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}, TOS: 2},
		"ip options":     {Proto: tuntest.TCP, Flags: tuntest.ACK, IPOptions: []byte{148, 4, 0, 0}},
		"udp":            {Proto: tuntest.UDP, SrcPort: 53, DstPort: 53, Frag: tuntest.DontFragment},
	} {
		p.Payload = payload
		segs := segments(t, p.Super(1398), false)
		var all []byte
		for i, s := range segs {
			if err := tuntest.CheckDecoded(s); err != nil {
				t.Errorf("%s: segment %d: %v", name, i, err)
			}
			all = append(all, s[len(p.Bytes())-len(payload):]...)
		}
		if !bytes.Equal(all, payload) {
			t.Errorf("%s: payload changed", name)
		}
	}
}

func TestFlagsOfSegments(t *testing.T) {
	const all = tuntest.FIN | tuntest.PSH | tuntest.ACK | tuntest.URG | tuntest.ECE | tuntest.CWR
	p := tuntest.Packet{Proto: tuntest.TCP, Flags: all, ID: 0xffff, Seq: 0xffffff00, Payload: make([]byte, 250)}
	segs := segments(t, p.Super(100), false)
	want := []struct {
		flags byte
		id    uint16
		seq   uint32
	}{
		{all &^ (tuntest.FIN | tuntest.PSH), 0xffff, 0xffffff00},
		{all &^ (tuntest.FIN | tuntest.PSH | tuntest.CWR), 0, 0xffffff64},
		{all &^ tuntest.CWR, 1, 0xffffffc8},
	}
	for i, w := range want {
		if s := segs[i]; s[33] != w.flags || be16(s[4:]) != w.id || be32(s[24:]) != w.seq {
			t.Errorf("segment %d: flags %#x, ID %#x, sequence %#x, want %+v", i, s[33], be16(s[4:]), be32(s[24:]), w)
		}
	}
	// One segment is first and last.
	if segs := segments(t, p.Super(250), false); len(segs) != 1 || segs[0][33] != all {
		t.Errorf("single segment: %d, flags %#x", len(segs), segs[0][33])
	}
}

func TestPartialSegmentsHoldThePseudoHeadersSum(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p, size := drawSuper(rt)
		raw := p.Super(size)
		want := segments(t, raw, false)
		for i, s := range segments(t, raw, true) {
			if bytes.Equal(s, want[i]) && !bytes.Equal(tuntest.Complete(s), s) {
				rt.Fatalf("segment %d is complete already", i)
			}
			if got := tuntest.Complete(s); !bytes.Equal(got, want[i]) {
				rt.Fatalf("segment %d, completed:\n have % x\n want % x", i, got, want[i])
			}
		}
	})
}

// A UDP checksum that comes out as 0 would mean that there is none.
func TestSegmentsAlwaysHaveAUDPChecksum(t *testing.T) {
	p := tuntest.Packet{Proto: tuntest.UDP, Payload: make([]byte, 4)}
	found := false
	for v := range 1 << 16 {
		put16(p.Payload, uint16(v))
		s := segments(t, p.Super(2), false)[0]
		if be16(s[26:]) == 0 {
			t.Fatalf("payload %#04x: checksum 0", v)
		}
		found = found || be16(s[26:]) == 0xffff
	}
	if !found {
		t.Fatal("no payload had the checksum 0xffff")
	}
}

// Between Start and Begin the worker lowers the TTL: the segments show it.
func TestBeginTakesTheHeadersAsTheyAreThen(t *testing.T) {
	p := tuntest.Packet{Proto: tuntest.UDP, TTL: 9, Payload: make([]byte, 30)}
	_, pkt, _ := tuntest.Read(p.Super(10))
	var s Splitter
	if err := s.Start(pkt, header(tuntest.Virtio{Flags: 1, GSOType: tuntest.GSOUDP, GSOSize: 10})); err != nil {
		t.Fatal(err)
	}
	DecrementTTL(pkt)
	s.Begin(pkt, false)
	dst := make([]byte, s.HeaderLen())
	for {
		payload, ok := s.Next(dst)
		if !ok {
			return
		}
		if seg := append(bytes.Clone(dst), payload...); seg[8] != 8 || tuntest.Check(seg) != nil {
			t.Errorf("TTL %d, check: %v", seg[8], tuntest.Check(seg))
		}
	}
}

// hdr_len of a forwarded packet is the kernel's linear part, up to the whole
// packet; csum_start is where the kernel says. Neither decides where we cut.
func TestHeaderLengthsOfTheKernelAreNotTrusted(t *testing.T) {
	p := tuntest.Packet{Proto: tuntest.TCP, Flags: tuntest.ACK, Payload: make([]byte, 300), TCPOptions: make([]byte, 12)}
	raw := p.Super(100)
	want := segments(t, raw, false)
	for _, hdrLen := range []uint16{0, 1, 52, 53, 352, 0xffff} {
		v, pkt, _ := tuntest.Read(raw)
		v.HdrLen, v.CsumStart = hdrLen, hdrLen
		if got := segments(t, v.Prepend(pkt), false); !equalPackets(got, want) {
			t.Errorf("hdr_len %d changes the segments", hdrLen)
		}
	}
}

func equalPackets(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}

func TestStartRefusesWhatDoesNotFit(t *testing.T) {
	tcp := tuntest.Packet{Proto: tuntest.TCP, Flags: tuntest.ACK, Payload: make([]byte, 300)}
	udp := tuntest.Packet{Proto: tuntest.UDP, Payload: make([]byte, 300)}
	tcpV := tuntest.Virtio{Flags: 1, GSOType: tuntest.GSOTCPv4, GSOSize: 100}
	udpV := tuntest.Virtio{Flags: 1, GSOType: tuntest.GSOUDP, GSOSize: 100}
	edit := func(p tuntest.Packet, change func(b []byte) []byte) []byte { return change(p.Bytes()) }
	set := func(at int, v byte) func(b []byte) []byte {
		return func(b []byte) []byte { b[at] = v; return b }
	}
	cut := func(n int) func(b []byte) []byte { return func(b []byte) []byte { return b[:n] } }
	for name, c := range map[string]struct {
		v   tuntest.Virtio
		pkt []byte
		err error
	}{
		"too many tiny":         {tuntest.Virtio{Flags: 1, GSOType: tuntest.GSOTCPv4, GSOSize: 7}, tuntest.Packet{Proto: tuntest.TCP, Payload: make([]byte, 128*7+1)}.Bytes(), errTooMany},
		"no segment size":       {tuntest.Virtio{Flags: 1, GSOType: tuntest.GSOTCPv4}, tcp.Bytes(), errBadHeaders},
		"empty":                 {tcpV, nil, errBadHeaders},
		"short IPv4":            {tcpV, edit(tcp, cut(19)), errBadHeaders},
		"IHL 4":                 {tcpV, edit(tcp, set(0, 0x44)), errBadHeaders},
		"IHL beyond":            {tcpV, edit(udp, func(b []byte) []byte { b[0] = 0x4f; return b[:59] }), errBadHeaders},
		"short TCP":             {tcpV, edit(tcp, cut(39)), errBadHeaders},
		"TCP offset 4":          {tcpV, edit(tcp, set(32, 0x40)), errBadHeaders},
		"TCP offset 0":          {tcpV, edit(tcp, set(32, 0x00)), errBadHeaders},
		"TCP offset beyond":     {tcpV, edit(tcp, func(b []byte) []byte { b[32] = 0xf0; return b[:79] }), errBadHeaders},
		"TCP without payload":   {tcpV, edit(tcp, cut(40)), errBadHeaders},
		"short UDP":             {udpV, edit(udp, cut(27)), errBadHeaders},
		"UDP without payload":   {udpV, edit(udp, cut(28)), errBadHeaders},
		"UDP marked TCP":        {tcpV, udp.Bytes(), errNotSuper},
		"TCP marked UDP":        {udpV, tcp.Bytes(), errNotSuper},
		"unknown type":          {tuntest.Virtio{Flags: 1, GSOType: 3, GSOSize: 100}, udp.Bytes(), errNotSuper},
		"IPv6":                  {tuntest.Virtio{Flags: 1, GSOType: 4, GSOSize: 100}, edit(tcp, set(0, 0x60)), errBadHeaders},
		"ICMP":                  {tcpV, tuntest.Packet{Proto: tuntest.ICMP, Payload: make([]byte, 100)}.Bytes(), errNotSuper},
		"TCP, payload one byte": {tcpV, edit(tcp, cut(41)), nil},
		"UDP, payload one byte": {udpV, edit(udp, cut(29)), nil},
	} {
		var s Splitter
		if err := s.Start(c.pkt, header(c.v)); !errors.Is(err, c.err) {
			t.Errorf("%s: error %v, want %v", name, err, c.err)
		}
	}
}

func FuzzSplit(f *testing.F) {
	f.Add(tuntest.Packet{Proto: tuntest.TCP, Flags: 0xff, Payload: make([]byte, 100), TCPOptions: make([]byte, 40), IPOptions: make([]byte, 40)}.Super(7), true)
	f.Add(tuntest.Packet{Proto: tuntest.UDP, Payload: make([]byte, 100)}.Super(1), false)
	f.Add(tuntest.Packet{Proto: tuntest.UDP, Payload: make([]byte, 1)}.Super(0xffff), false)
	f.Fuzz(func(t *testing.T, raw []byte, partial bool) {
		v, pkt, err := tuntest.Read(raw)
		if err != nil || len(pkt) > maxPacket {
			return
		}
		var s Splitter
		if s.Start(pkt, header(v)) != nil {
			return
		}
		want := bytes.Clone(pkt[s.HeaderLen():])
		s.Begin(pkt, partial)
		dst := make([]byte, s.HeaderLen())
		var all []byte
		for n := 0; ; n++ {
			payload, ok := s.Next(dst)
			if !ok {
				if n != s.Count() {
					t.Fatalf("%d segments, Count says %d", n, s.Count())
				}
				break
			}
			all = append(all, payload...)
			seg := append(bytes.Clone(dst), payload...)
			if partial {
				seg = tuntest.Complete(seg)
			}
			if seg[0]>>4 != 4 { // Start leaves the version to the router
				seg[0] = 4<<4 | seg[0]&0xf
				tuntest.SetIPChecksum(seg)
			}
			if err := tuntest.Check(seg); err != nil {
				t.Fatalf("segment %d of %d: %v", n, s.Count(), err)
			}
		}
		if !bytes.Equal(all, want) {
			t.Fatal("payload changed")
		}
	})
}

func TestSplitAllocatesNothing(t *testing.T) {
	p := tuntest.Packet{Proto: tuntest.TCP, Flags: tuntest.ACK, Payload: make([]byte, 60000)}
	v, pkt, _ := tuntest.Read(p.Super(1398))
	h := header(v)
	dst := make([]byte, 120)
	s := new(Splitter)
	if n := testing.AllocsPerRun(100, func() {
		if err := s.Start(pkt, h); err != nil {
			t.Fatal(err)
		}
		s.Begin(pkt, false)
		for ok := true; ok; {
			_, ok = s.Next(dst)
		}
	}); n != 0 {
		t.Errorf("%v allocations a super-packet", n)
	}
}
