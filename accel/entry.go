package accel

import (
	"encoding/binary"
	"net/netip"

	"tweed/encap"
	"tweed/engine/table"
)

// Flags of the programs' config and peers, as in bpf/accel.c.
const (
	flagSending   = 1
	flagReceiving = 2
	flagWhole     = 4

	flagForeign = 1
)

// closed is the entry of a subnet that is left to the workers.
var closed accelPeer

// entries returns what the peer map shall hold: every peer, because one that
// was left out would fall to a peer with a shorter prefix around it.
func (a *Accelerator) entries(peers []table.Peer) map[netip.Prefix]accelPeer {
	m := make(map[netip.Prefix]accelPeer, len(peers))
	for _, p := range peers {
		m[p.Subnet] = a.entry(p)
	}
	return m
}

// entry returns the map's form of a peer.
func (a *Accelerator) entry(p table.Peer) accelPeer {
	if !servable(p) {
		return closed
	}
	way, hop := a.cfg.Way(p.Endpoint.Addr())
	if way != a.cfg.Underlay {
		return closed
	}
	mtu := p.MTU
	if mtu == 0 {
		mtu = a.cfg.MTU
	}
	e := accelPeer{
		Addr: native32(p.Endpoint.Addr()), Port: native16(p.Endpoint.Port()),
		Framing: framingUDP, Mtu: uint32(mtu), Hop: a.hops.of(hop),
	}
	if p.Framing == encap.FramingVXLAN {
		e.Framing, e.Vni, e.Mac = framingVXLAN, vniWord(p.VNI), p.MAC
		if !p.PartialChecksums {
			e.Flags |= flagForeign
		}
	}
	return e
}

// Framings as in bpf/accel.c.
const (
	framingUDP   = 0
	framingVXLAN = 1
)

// servable reports whether the peer can read what the kernel sends. On a
// virtual link that includes packets whose inner checksum the kernel has not
// computed: a kernel's vxlan device knows, a tweed node knows and says so in
// its lease, flannel's udp proxy would pass them on as they are.
func servable(p table.Peer) bool {
	return p.PartialChecksums || p.Framing == encap.FramingVXLAN
}

// configFor returns what the config map shall hold now.
func (a *Accelerator) configFor() accelConfig {
	c := accelConfig{
		Underlay: uint32(a.cfg.Underlay), Tun: uint32(a.cfg.TUN), Local: native32(a.cfg.Local),
		VxlanPort: native16(a.cfg.VXLANPort), UdpPort: native16(a.cfg.UDPPort), UdpSource: native16(a.cfg.Sources.UDP),
	}
	for i, p := range a.cfg.Sources.VXLAN {
		c.VxlanSources[i] = native16(p)
	}
	c.Source, c.Snap = a.cfg.Source, a.snap
	if a.cfg.Whole {
		c.Flags |= flagWhole
	}
	if !a.local.Subnet.IsValid() {
		return c
	}
	c.Own = native32(a.local.Subnet.Masked().Addr())
	c.Mask = nativeMask(a.local.Subnet.Bits())
	c.Vni, c.Mac = vniWord(a.local.VNI), a.local.MAC
	if a.failed != nil || len(a.holds) > 0 {
		return c
	}
	if a.duty.Send {
		c.Flags |= flagSending
	}
	if a.duty.Receive {
		c.Flags |= flagReceiving
	}
	return c
}

// keyOf returns the key of a subnet in the longest-prefix map.
func keyOf(p netip.Prefix) accelKey {
	return accelKey{Bits: uint32(p.Bits()), Addr: native32(p.Addr())}
}

// native32 and native16 return the value whose bytes in memory are in network
// byte order.
func native32(a netip.Addr) uint32 {
	b := a.As4()
	return binary.NativeEndian.Uint32(b[:])
}

func native16(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

func nativeMask(bits int) uint32 {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], ^uint32(uint64(1)<<(32-bits)-1))
	return binary.NativeEndian.Uint32(b[:])
}

// vniWord is the second word of a VXLAN header (RFC 7348 section 5).
func vniWord(vni uint32) uint32 {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], vni<<8)
	return binary.NativeEndian.Uint32(b[:])
}
