package encap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

var (
	ourMAC  = [6]byte{0x02, 0x11, 0x22, 0x33, 0x44, 0x55}
	peerMAC = [6]byte{0x02, 0xaa, 0xbb, 0xcc, 0xdd, 0xee}
)

const testVNI = 0xabcdef

// incoming is a good datagram of the vxlan framing, sent by the peer to us.
func incoming() []byte {
	b := make([]byte, MaxPrefixLen+20)
	PutVXLANPrefix(b, testVNI, ourMAC, peerMAC)
	b[MaxPrefixLen] = 0x45
	return b
}

func TestPrefixIsWhatGopacketReads(t *testing.T) {
	for _, vni := range []uint32{0, 1, 4096, testVNI, 1<<24 - 1} {
		b := bytes.Repeat([]byte{0xff}, MaxPrefixLen+20) // what stood there before must not matter
		PutVXLANPrefix(b, vni, peerMAC, ourMAC)
		copy(b[MaxPrefixLen:], []byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 99, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2})
		pkt := gopacket.NewPacket(b, layers.LayerTypeVXLAN, gopacket.Default)
		vx, _ := pkt.Layer(layers.LayerTypeVXLAN).(*layers.VXLAN)
		eth, _ := pkt.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
		if vx == nil || eth == nil || pkt.Layer(layers.LayerTypeIPv4) == nil {
			t.Fatalf("VNI %d: decoded as %v", vni, pkt)
		}
		if !vx.ValidIDFlag || vx.VNI != vni || vx.GBPExtension || vx.GBPDontLearn || vx.GBPApplied || vx.GBPGroupPolicyID != 0 {
			t.Errorf("VNI %d: %+v", vni, vx)
		}
		if !bytes.Equal(eth.DstMAC, peerMAC[:]) || !bytes.Equal(eth.SrcMAC, ourMAC[:]) || eth.EthernetType != layers.EthernetTypeIPv4 {
			t.Errorf("VNI %d: %+v", vni, eth)
		}
	}
}

func TestCheckAcceptsWhatAPeerSends(t *testing.T) {
	for _, vni := range []uint32{0, 1, testVNI, 1<<24 - 1} {
		r := NewVXLANReceiver(vni, ourMAC)
		b := incoming()
		PutVXLANPrefix(b, vni, ourMAC, peerMAC)
		if v := r.Check(b); v != OK {
			t.Errorf("VNI %d: verdict %d", vni, v)
		}
	}
}

// Every bit of the prefix but the source address's matters, and each has its verdict.
func TestCheckNoticesEveryBit(t *testing.T) {
	r := NewVXLANReceiver(testVNI, ourMAC)
	for bit := range MaxPrefixLen * 8 {
		b := incoming()
		b[bit/8] ^= 0x80 >> (bit % 8)
		var want Verdict
		switch at := bit / 8; {
		case at < 4 || at == 7: // flags and reserved
			want = BadFlags
		case at < 7:
			want = WrongVNI
		case at < 14:
			want = WrongMAC
		case bit == 14*8+7: // multicast source
			want = WrongMAC
		case at < 20:
			want = OK // any other unicast source: whose it is the table knows
		default:
			want = NotIPv4
		}
		if got := r.Check(b); got != want {
			t.Errorf("byte %d, bit %d flipped: verdict %d, want %d", bit/8, bit%8, got, want)
		}
	}
}

func TestCheckVerdicts(t *testing.T) {
	r := NewVXLANReceiver(testVNI, ourMAC)
	edit := func(f func(b []byte)) []byte {
		b := incoming()
		f(b)
		return b
	}
	for name, c := range map[string]struct {
		b    []byte
		want Verdict
	}{
		"group policy extension":  {edit(func(b []byte) { b[0] = 0x88; b[3] = 7 }), BadFlags},
		"no I flag, all zero":     {edit(func(b []byte) { clear(b[:8]) }), BadFlags},
		"broadcast destination":   {edit(func(b []byte) { copy(b[8:], "\xff\xff\xff\xff\xff\xff") }), WrongMAC},
		"multicast destination":   {edit(func(b []byte) { copy(b[8:], "\x01\x00\x5e\x00\x00\x01") }), WrongMAC},
		"destination is the peer": {edit(func(b []byte) { copy(b[8:], peerMAC[:]) }), WrongMAC},
		"source is us":            {edit(func(b []byte) { copy(b[14:], ourMAC[:]) }), WrongMAC},
		"source is zero":          {edit(func(b []byte) { clear(b[14:20]) }), WrongMAC},
		"source is broadcast":     {edit(func(b []byte) { copy(b[14:], "\xff\xff\xff\xff\xff\xff") }), WrongMAC},
		"ARP":                     {edit(func(b []byte) { binary.BigEndian.PutUint16(b[20:], 0x0806) }), NotIPv4},
		"IPv6":                    {edit(func(b []byte) { binary.BigEndian.PutUint16(b[20:], 0x86dd) }), NotIPv4},
		"VLAN tag":                {edit(func(b []byte) { binary.BigEndian.PutUint16(b[20:], 0x8100) }), NotIPv4},
		// The first rule that fails gives the name.
		"flags before VNI": {edit(func(b []byte) { b[1], b[4] = 1, 0 }), BadFlags},
		"VNI before MAC":   {edit(func(b []byte) { b[4], b[8] = 0, 9 }), WrongVNI},
		"MAC before type":  {edit(func(b []byte) { b[8], b[20] = 9, 9 }), WrongMAC},
	} {
		if got := r.Check(c.b); got != c.want {
			t.Errorf("%s: verdict %d, want %d", name, got, c.want)
		}
	}
	for n := range MaxPrefixLen {
		if got := r.Check(incoming()[:n:n]); got != Short {
			t.Errorf("%d bytes: verdict %d, want Short", n, got)
		}
	}
	if got := r.Check(incoming()[:MaxPrefixLen]); got != OK {
		t.Errorf("prefix alone: verdict %d", got)
	}
}

// Check is a handful of word compares; the oracle looks at one field after the
// other.
func slowCheck(b []byte, vni uint32, mac [6]byte) Verdict {
	switch {
	case len(b) < 22:
		return Short
	case !bytes.Equal(b[:4], []byte{8, 0, 0, 0}) || b[7] != 0:
		return BadFlags
	case fmt.Sprintf("%x", b[4:7]) != fmt.Sprintf("%06x", vni):
		return WrongVNI
	case !bytes.Equal(b[8:14], mac[:]), bytes.Equal(b[14:20], mac[:]), bytes.Equal(b[14:20], make([]byte, 6)), b[14]%2 == 1:
		return WrongMAC
	case string(b[20:22]) != "\x08\x00":
		return NotIPv4
	}
	return OK
}

func FuzzVXLANCheck(f *testing.F) {
	f.Add(incoming(), uint32(testVNI))
	f.Add([]byte{8, 0, 0, 0, 0, 0, 1, 0}, uint32(1))
	f.Add([]byte{}, uint32(0))
	f.Fuzz(func(t *testing.T, b []byte, vni uint32) {
		vni &= 1<<24 - 1
		r := NewVXLANReceiver(vni, ourMAC)
		if got, want := r.Check(b), slowCheck(b, vni, ourMAC); got != want {
			t.Fatalf("verdict %d, want %d", got, want)
		}
		if len(b) >= 20 { // and the good prefix with pieces of b in it
			g := incoming()
			copy(g[int(b[0])%MaxPrefixLen:], b[1:1+int(b[1])%8])
			r := NewVXLANReceiver(testVNI, ourMAC)
			if got, want := r.Check(g), slowCheck(g, testVNI, ourMAC); got != want {
				t.Fatalf("verdict %d, want %d: % x", got, want, g)
			}
		}
	})
}

func TestVXLANAllocatesNothing(t *testing.T) {
	b := incoming()
	r := NewVXLANReceiver(testVNI, ourMAC)
	if n := testing.AllocsPerRun(100, func() {
		PutVXLANPrefix(b, testVNI, ourMAC, peerMAC)
		if r.Check(b) != OK {
			t.Fatal("refused")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
