package tun

import (
	"testing"

	"pgregory.net/rapid"

	"tweed/tun/tuntest"
)

func TestVirtioHeaderIsTheKernels(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := tuntest.Virtio{
			Flags: rapid.Byte().Draw(t, "flags"), GSOType: rapid.Byte().Draw(t, "type"),
			HdrLen: rapid.Uint16().Draw(t, "hdrLen"), GSOSize: rapid.Uint16().Draw(t, "gsoSize"),
			CsumStart: rapid.Uint16().Draw(t, "csumStart"), CsumOffset: rapid.Uint16().Draw(t, "csumOffset"),
		}
		var h vnetHdr
		h.decode(want.Prepend(nil))
		if h != (vnetHdr{want.Flags, want.GSOType, want.HdrLen, want.GSOSize, want.CsumStart, want.CsumOffset}) {
			t.Fatalf("decoded %+v, want %+v", h, want)
		}
		var b [vnetHdrLen]byte
		h.encode(b[:])
		if got, _, err := tuntest.Read(b[:]); err != nil || got != want {
			t.Fatalf("encoded %+v, error %v, want %+v", got, err, want)
		}
	})
}

func header(v tuntest.Virtio) *Header {
	var h Header
	h.vnet.decode(v.Prepend(nil))
	return &h
}

func TestHeaderTellsSuperAndPartial(t *testing.T) {
	for _, c := range []struct {
		v              tuntest.Virtio
		super, partial bool
	}{
		{tuntest.Virtio{}, false, false},
		{tuntest.Virtio{Flags: tuntest.NeedsCsum}, false, true},
		{tuntest.Virtio{Flags: 2}, false, false}, // DATA_VALID
		{tuntest.Virtio{Flags: 1, GSOType: tuntest.GSOTCPv4, GSOSize: 9}, true, true},
		{tuntest.Virtio{Flags: 1, GSOType: tuntest.GSOTCPv4 | tuntest.GSOECN}, true, true},
		{tuntest.Virtio{Flags: 1, GSOType: tuntest.GSOUDP}, true, true},
		{tuntest.Virtio{GSOType: tuntest.GSOECN}, false, false},
	} {
		h := header(c.v)
		if h.Super() != c.super || h.Partial() != c.partial || h.SegmentPayload() != int(c.v.GSOSize) {
			t.Errorf("%+v: super %v, partial %v, segment %d", c.v, h.Super(), h.Partial(), h.SegmentPayload())
		}
	}
}

func TestCompleteMakesTheChecksumRight(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPacket(t, rapid.SampledFrom([]uint8{tuntest.TCP, tuntest.UDP}).Draw(t, "proto"))
		p.Sum = tuntest.Partial
		b := p.Bytes()
		h := header(partialHeader(b))
		if !h.Elidable(b) {
			t.Fatalf("not elidable: % x", b)
		}
		if !h.Complete(b) {
			t.Fatalf("not completed: % x", b)
		}
		if err := tuntest.Check(b); err != nil {
			t.Fatal(err)
		}
	})
}

// partialHeader is what the kernel puts before a packet whose checksum is partial.
func partialHeader(b []byte) tuntest.Virtio {
	v := tuntest.Virtio{Flags: tuntest.NeedsCsum, CsumStart: uint16(b[0]&0xf) * 4, CsumOffset: 16}
	if b[9] == tuntest.UDP {
		v.CsumOffset = 6
	}
	return v
}

// A UDP checksum that comes out as 0 must be sent as 0xffff: 0 means none.
func TestCompleteNeverTurnsUDPChecksumOff(t *testing.T) {
	p := tuntest.Packet{Proto: tuntest.UDP, Sum: tuntest.Partial, Payload: make([]byte, 2)}
	found := false
	for v := range 1 << 16 {
		put16(p.Payload, uint16(v))
		b := p.Bytes()
		header(partialHeader(b)).Complete(b)
		if be16(b[26:]) == 0 {
			t.Fatalf("payload %#04x: checksum 0", v)
		}
		found = found || be16(b[26:]) == 0xffff
	}
	if !found {
		t.Fatal("no payload had the checksum 0xffff")
	}
}

func TestCompleteAndElidableRefuseStrangeOffsets(t *testing.T) {
	good := tuntest.Packet{Proto: tuntest.TCP, Flags: tuntest.ACK, Sum: tuntest.Partial, Payload: []byte("x")}.Bytes()
	n := uint16(len(good))
	for _, v := range []tuntest.Virtio{
		{}, {CsumStart: 12}, {CsumStart: 10, CsumOffset: 20}, {CsumStart: 19, CsumOffset: 1}, // would rewrite the IPv4 header, or sum it
		{CsumStart: n}, {CsumStart: n - 1, CsumOffset: 0}, {CsumStart: 20, CsumOffset: n - 21},
		{CsumStart: 0xffff, CsumOffset: 0xffff}, {CsumStart: 20, CsumOffset: 0xffff},
	} {
		b := append([]byte(nil), good...)
		h := header(v)
		if h.Complete(b) || string(b) != string(good) {
			t.Errorf("%+v: completed or changed", v)
		}
		if h.Elidable(b) {
			t.Errorf("%+v: elidable", v)
		}
	}
	for name, c := range map[string]struct {
		v tuntest.Virtio
		p tuntest.Packet
	}{
		"start not the transport header": {tuntest.Virtio{CsumStart: 24, CsumOffset: 16}, tuntest.Packet{Proto: tuntest.TCP}},
		"UDP's offset in TCP":            {tuntest.Virtio{CsumStart: 20, CsumOffset: 6}, tuntest.Packet{Proto: tuntest.TCP}},
		"TCP's offset in UDP":            {tuntest.Virtio{CsumStart: 20, CsumOffset: 16}, tuntest.Packet{Proto: tuntest.UDP, Payload: make([]byte, 20)}},
		"another protocol":               {tuntest.Virtio{CsumStart: 20, CsumOffset: 16}, tuntest.Packet{Proto: 132, Payload: make([]byte, 20)}},
		"first fragment":                 {tuntest.Virtio{CsumStart: 20, CsumOffset: 6}, tuntest.Packet{Proto: tuntest.UDP, Frag: tuntest.MoreFragments}},
		"later fragment":                 {tuntest.Virtio{CsumStart: 20, CsumOffset: 6}, tuntest.Packet{Proto: tuntest.UDP, Frag: 5}},
	} {
		if header(c.v).Elidable(c.p.Bytes()) {
			t.Errorf("%s: elidable", name)
		}
	}
	if p := (tuntest.Packet{Proto: tuntest.UDP, Frag: tuntest.DontFragment}); !header(tuntest.Virtio{CsumStart: 20, CsumOffset: 6}).Elidable(p.Bytes()) {
		t.Error("DF alone: not elidable")
	}
}

func FuzzComplete(f *testing.F) {
	b := tuntest.Packet{Proto: tuntest.UDP, Sum: tuntest.Partial, Payload: []byte("x")}.Bytes()
	f.Add(uint16(20), uint16(6), b)
	f.Add(uint16(0xffff), uint16(0xffff), b)
	f.Fuzz(func(t *testing.T, start, off uint16, b []byte) {
		if len(b) < 20 {
			return
		}
		h := header(tuntest.Virtio{Flags: tuntest.NeedsCsum, CsumStart: start, CsumOffset: off})
		h.Elidable(b)
		before := append([]byte(nil), b...)
		if !h.Complete(b) && string(before) != string(b) {
			t.Fatal("refused, but changed")
		}
	})
}

func TestOffloadNames(t *testing.T) {
	for _, o := range []Offload{OffloadNone, OffloadTSO, OffloadFull, OffloadAuto} {
		if got, err := ParseOffload(o.String()); err != nil || got != o {
			t.Errorf("%v: parsed as %v, error %v", o, got, err)
		}
	}
	if _, err := ParseOffload("fast"); err == nil {
		t.Error(`"fast" is accepted`)
	}
	if !(OffloadNone < OffloadTSO && OffloadTSO < OffloadFull && OffloadFull < OffloadAuto) {
		t.Error("higher rungs must compare higher")
	}
}
