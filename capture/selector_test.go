package capture

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"testing"

	"tweed/capture/pcapng"
	"tweed/engine/tap"
	"tweed/tun/tuntest"
)

// fileOf is a pcapng file with the packets, each on the interface it names.
func fileOf(t testing.TB, link uint16, names []string, packets ...pcapng.Packet) []byte {
	t.Helper()
	h := &pcapng.Header{Link: link}
	for _, n := range names {
		h.Interfaces = append(h.Interfaces, pcapng.Interface{Name: n})
	}
	var b bytes.Buffer
	w, err := pcapng.NewWriter(&b, h)
	if err != nil {
		t.Fatal(err)
	}
	for i := range packets {
		if err := w.WritePacket(&packets[i]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// chosen is what a Selector takes of a file, and the error at its end.
func chosen(s *Selector, file []byte) (out []Chosen, err error) {
	r, err := pcapng.NewReader(bytes.NewReader(file))
	if err != nil {
		return nil, err
	}
	s.Open(r)
	for {
		var c Chosen
		if err := s.Next(&c); err != nil {
			return out, err
		}
		c.Data = bytes.Clone(c.Data)
		out = append(out, c)
	}
}

func TestSelectorTakesWhatCanBeReplayed(t *testing.T) {
	inner := tuntest.Packet{Proto: tuntest.UDP, Payload: []byte("inner")}.Bytes()
	wire := tuntest.Packet{Proto: tuntest.UDP, DstPort: 8472, Payload: make([]byte, 50)}.Bytes()
	other := tuntest.Packet{Proto: tuntest.UDP, DstPort: 53, Payload: make([]byte, 50)}.Bytes()
	fragment := tuntest.Packet{Proto: tuntest.UDP, DstPort: 8472, Frag: 0x2000}.Bytes()
	ports := map[uint16]string{8472: "vxlan"}
	six := append([]byte{0x60}, make([]byte, 40)...)
	points := PointNames()
	on := func(p tap.Point, data []byte) pcapng.Packet { return pcapng.Packet{Interface: int(p), Data: data} }
	super := pcapng.Packet{Data: inner, Flags: pcapng.FlagSuperPacket, Comment: "drop:no-route; super-packet: 2 segments of 3 bytes"}
	ether := func(kind uint16, body []byte, tags ...uint16) []byte {
		b := make([]byte, 12)
		for _, tag := range tags {
			b = binary.BigEndian.AppendUint16(b, tag)
			b = append(b, 0, 7)
		}
		return append(binary.BigEndian.AppendUint16(b, kind), body...)
	}
	for name, c := range map[string]struct {
		s       Selector
		file    []byte
		want    [][]byte
		skipped [NumSkips]uint64
	}{
		"ours, that tap only": {Selector{Point: tap.TunIn}, fileOf(t, 228, points, on(tap.TunIn, inner), on(tap.TunOut, inner), on(tap.WireOut, wire), on(tap.Drop, inner)),
			[][]byte{inner}, [NumSkips]uint64{SkipPoint: 3}},
		"ours, all": {Selector{Point: tap.TunIn, All: true}, fileOf(t, 228, points, on(tap.TunIn, inner), on(tap.TunOut, wire), on(tap.Drop, six)),
			[][]byte{inner, wire}, [NumSkips]uint64{SkipNotIPv4: 1}},
		"cut short": {Selector{Point: tap.TunIn}, fileOf(t, 228, []string{"eth0"}, pcapng.Packet{Data: inner[:30], Length: len(inner)}, pcapng.Packet{Data: inner[:10]}),
			nil, [NumSkips]uint64{SkipCut: 1, SkipNotIPv4: 1}},
		"too long": {Selector{Point: tap.TunIn}, fileOf(t, 228, []string{""}, pcapng.Packet{Data: append(inner, make([]byte, 1<<16)...)}),
			nil, [NumSkips]uint64{SkipTooLong: 1}},
		"datagrams": {Selector{Point: tap.WireIn, Ports: ports}, fileOf(t, 228, []string{"any"}, pcapng.Packet{Data: wire}, pcapng.Packet{Data: other}, pcapng.Packet{Data: fragment}, pcapng.Packet{Data: wire[:25]}),
			[][]byte{wire}, [NumSkips]uint64{SkipForeign: 3}},
		"ethernet": {Selector{Point: tap.TunIn}, fileOf(t, 1, []string{"eth0"},
			pcapng.Packet{Data: ether(0x0800, append(slices.Clone(inner), 0, 0, 0))}, pcapng.Packet{Data: ether(0x0800, inner, 0x88a8, 0x8100)},
			pcapng.Packet{Data: ether(0x0806, inner)}, pcapng.Packet{Data: ether(0x86dd, six)}, pcapng.Packet{Data: []byte{1}}),
			[][]byte{inner, inner}, [NumSkips]uint64{SkipNotIPv4: 3}},
		"tcpdump -i any": {Selector{Point: tap.TunIn}, fileOf(t, 113, []string{"any"}, pcapng.Packet{Data: append(append(make([]byte, 14), 8, 0), inner...)}),
			[][]byte{inner}, [NumSkips]uint64{}},
		"newer tcpdump -i any": {Selector{Point: tap.TunIn}, fileOf(t, 276, []string{"any"}, pcapng.Packet{Data: append(append([]byte{8, 0}, make([]byte, 18)...), inner...)}),
			[][]byte{inner}, [NumSkips]uint64{}},
		"USB": {Selector{Point: tap.TunIn}, fileOf(t, 189, []string{"usb"}, pcapng.Packet{Data: inner}), nil, [NumSkips]uint64{SkipNotIPv4: 1}},
	} {
		got, err := chosen(&c.s, c.file)
		var data [][]byte
		for _, g := range got {
			data = append(data, g.Data)
		}
		if err != io.EOF || !slices.EqualFunc(data, c.want, bytes.Equal) || c.s.Skipped != c.skipped {
			t.Errorf("%s: %d packets, error %v, skipped %v, want %d and %v", name, len(got), err, c.s.Skipped, len(c.want), c.skipped)
		}
	}
	got, _ := chosen(&Selector{Point: tap.TunIn}, fileOf(t, 228, []string{"tun-in"}, super, pcapng.Packet{Data: inner, Comment: super.Comment}))
	if len(got) != 2 || got[0].SegmentPayload != 3 || got[1].SegmentPayload != 0 {
		t.Errorf("super-packet: %+v", got)
	}
}

func TestSuperCommentIsReadBack(t *testing.T) {
	p := Packet{Segments: 46, SegmentPayload: 1386}
	if n := parseSuper(SuperComment(&p), 64000); n != 1386 {
		t.Errorf("%q is read as %d", SuperComment(&p), n)
	}
	for _, text := range []string{"", "super-packet:", "super-packet: 1 segments of 0 bytes", "super-packet: 1 segments of -4 bytes", "super-packet: 9 segments of 70000 bytes"} {
		if n := parseSuper(text, 64000); n != 0 {
			t.Errorf("%q is read as %d", text, n)
		}
	}
}

// FuzzSelector reads any file as tweed replay does: what it lets through is a
// packet an engine can be given.
func FuzzSelector(f *testing.F) {
	wire := tuntest.Packet{Proto: tuntest.UDP, DstPort: 8472, Payload: make([]byte, 50)}.Bytes()
	f.Add(fileOf(f, 228, PointNames(), pcapng.Packet{Data: wire}, pcapng.Packet{Interface: 2, Data: wire, Flags: pcapng.FlagSuperPacket, Comment: "super-packet: 3 segments of 20 bytes"}), true)
	for _, link := range []uint16{1, 113, 276} {
		f.Add(fileOf(f, link, []string{"x"}, pcapng.Packet{Data: append([]byte{8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0}, wire...)}), false)
	}
	f.Add([]byte("\xd4\xc3\xb2\xa1\x02\x00\x04\x00"), false)
	f.Fuzz(func(t *testing.T, file []byte, at bool) {
		s := Selector{Point: tap.TunIn, All: at, Ports: map[uint16]string{8472: "vxlan"}}
		if at {
			s.Point = tap.WireIn
		}
		got, err := chosen(&s, file)
		var bad *pcapng.FormatError
		if err != io.EOF && !errors.As(err, &bad) {
			t.Fatalf("error %v", err)
		}
		for _, c := range got {
			if len(c.Data) < 20 || len(c.Data) > 65535 || c.Data[0]>>4 != 4 || c.SegmentPayload < 0 || c.SegmentPayload > len(c.Data) {
				t.Errorf("%d bytes in segments of %d: % x", len(c.Data), c.SegmentPayload, c.Data[:min(len(c.Data), 20)])
			}
			if at {
				if ihl := int(c.Data[0]&0xf) * 4; len(c.Data) < ihl+8 {
					t.Errorf("no datagram: % x", c.Data)
				}
			}
		}
	})
}
