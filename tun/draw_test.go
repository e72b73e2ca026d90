package tun

import (
	"net/netip"

	"pgregory.net/rapid"

	"tweed/tun/tuntest"
)

// drawPacket draws an unfragmented packet of the protocol with everything else
// arbitrary, payload of at least a byte.
func drawPacket(t *rapid.T, proto uint8) tuntest.Packet {
	p := tuntest.Packet{
		Proto: proto,
		TOS:   rapid.Byte().Draw(t, "tos"), TTL: rapid.Uint8Min(1).Draw(t, "ttl"),
		ID:        rapid.Uint16().Draw(t, "id"),
		Frag:      rapid.SampledFrom([]uint16{0, tuntest.DontFragment, tuntest.Reserved}).Draw(t, "frag"),
		IPOptions: drawOptions(t, "ip options"),
		SrcPort:   rapid.Uint16().Draw(t, "src port"), DstPort: rapid.Uint16().Draw(t, "dst port"),
		Payload: rapid.SliceOfN(rapid.Byte(), 1, 300).Draw(t, "payload"),
	}
	if proto == tuntest.TCP {
		p.Seq, p.Ack = rapid.Uint32().Draw(t, "seq"), rapid.Uint32().Draw(t, "ack")
		p.Flags, p.Low4 = rapid.Byte().Draw(t, "flags"), rapid.ByteRange(0, 15).Draw(t, "low4")
		p.Window, p.Urgent = rapid.Uint16().Draw(t, "window"), rapid.Uint16().Draw(t, "urgent")
		p.TCPOptions = drawOptions(t, "tcp options")
	}
	return p
}

func drawOptions(t *rapid.T, label string) []byte {
	words := rapid.SampledFrom([]int{0, 0, 0, 1, 3, 10}).Draw(t, label)
	return rapid.SliceOfN(rapid.Byte(), 4*words, 4*words).Draw(t, label+" bytes")
}

func mustAddr(s string) netip.Addr { return netip.MustParseAddr(s) }
