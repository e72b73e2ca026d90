package table

import (
	"net/netip"

	"tweed/encap"
)

// MAC is an Ethernet address.
type MAC [6]byte

// Peer is one lease of another node, as the data plane needs it.
type Peer struct {
	// Subnet is the leased IPv4 subnet, masked.
	Subnet netip.Prefix
	// Endpoint is the underlay address and UDP port packets are sent to.
	Endpoint netip.AddrPort
	// Framing is the framing the lease names.
	Framing encap.Framing
	// VNI is the VXLAN network identifier, 24 bits; used with FramingVXLAN only.
	VNI uint32
	// MAC is the peer's VtepMAC; used with FramingVXLAN only.
	MAC MAC
	// PartialChecksums says that the peer's lease announces that it completes
	// inner checksums itself, so that they need not be computed here.
	PartialChecksums bool
	// MTU is the largest inner packet, in bytes, that the way to the peer
	// carries unfragmented. 0 means the overlay's MTU.
	MTU int
	// NodeID is the node id in the lease, empty for a foreign implementation.
	NodeID string
}

// Local is what the data plane must know of the node it runs on.
type Local struct {
	// Subnet is our own leased subnet.
	Subnet netip.Prefix
	// Addr is the address of the TUN device, the source of the ICMP errors we send.
	Addr netip.Addr
	// MAC is our VTEP MAC: the inner Ethernet source of what we send and the
	// only inner Ethernet destination we accept.
	MAC MAC
	// VNI is the only VXLAN network identifier we accept, 24 bits.
	VNI uint32
}
