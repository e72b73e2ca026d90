package node

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"tweed/encap"
	"tweed/engine"
	"tweed/engine/table"
	"tweed/lease"
)

// framingOf is the framing of a network config's backend.
func framingOf(cfg lease.NetworkConfig) (encap.Framing, error) {
	f, err := encap.ParseFraming(cfg.Backend.Type)
	if err != nil {
		return 0, fmt.Errorf("network config: Backend.Type: %w", err)
	}
	return f, nil
}

// portOf is the UDP port a framing uses in this network. The config names the
// port of its own backend only; a lease never names one (FC 6.5).
func portOf(f encap.Framing, cfg lease.NetworkConfig) uint16 {
	if own, err := framingOf(cfg); err == nil && own == f && cfg.Backend.Port != 0 {
		return cfg.Backend.Port
	}
	return f.DefaultPort()
}

// localVNI is the VXLAN network identifier accepted from the wire.
func localVNI(cfg lease.NetworkConfig) uint32 {
	if cfg.Backend.Type == lease.BackendVXLAN {
		return cfg.Backend.VNI
	}
	return lease.NewNetworkConfig(cfg.Network).Backend.VNI
}

// listenFor lists what to receive: the network's own framing first, then those
// asked for, all on one address. Flannel binds the udp backend to the
// interface's address and the kernel binds vxlan to all of them; tweed binds
// the one address peers send to, so that it never answers for another.
func listenFor(cfg lease.NetworkConfig, also []encap.Framing, addr netip.Addr) ([]engine.Listen, error) {
	own, err := framingOf(cfg)
	if err != nil {
		return nil, err
	}
	framings := []encap.Framing{own}
	for _, f := range also {
		if !slices.Contains(framings, f) {
			framings = append(framings, f)
		}
	}
	var ls []engine.Listen
	for _, f := range framings {
		l := engine.Listen{Framing: f, Addr: netip.AddrPortFrom(addr, portOf(f, cfg))}
		for _, o := range ls {
			if o.Addr == l.Addr {
				return nil, fmt.Errorf("--listen-framings: %s and %s would share UDP port %d: change Backend.Port", o.Framing, f, l.Addr.Port())
			}
		}
		ls = append(ls, l)
	}
	return ls, nil
}

// bindAddr is the address sockets are bound to and datagrams come from: the
// public address when this host has it, so that peers, which check the source,
// see the one in our lease; behind NAT the interface's.
func bindAddr(u underlay, h *hostNet) netip.Addr {
	if _, ok := h.byIP(u.publicIP); ok {
		return u.publicIP
	}
	return u.addr
}

// converter turns leases into peers.
type converter struct {
	cfg      lease.NetworkConfig
	publicIP netip.Addr
	own      netip.Prefix
	mtu      int // overlay MTU, bytes
	// path is the underlay MTU in bytes on the way to an address, 0 when it is
	// not known, and whether that way leads into the overlay itself.
	path func(netip.Addr) (mtu int, loops bool)
}

// convert returns the peers in subnet order, and the leases that cannot be one.
func (c *converter) convert(leases []lease.Lease) ([]table.Peer, []SkippedLease) {
	peers := make([]table.Peer, 0, len(leases))
	skipped := []SkippedLease{}
	for _, l := range leases {
		p, why := c.peer(l)
		if why != "" {
			skipped = append(skipped, SkippedLease{Subnet: l.Subnet, BackendType: l.BackendType, NodeName: l.NodeName, Why: why})
			continue
		}
		peers = append(peers, p)
	}
	slices.SortFunc(peers, func(a, b table.Peer) int { return comparePrefix(a.Subnet, b.Subnet) })
	return peers, skipped
}

func comparePrefix(a, b netip.Prefix) int {
	if d := a.Addr().Compare(b.Addr()); d != 0 {
		return d
	}
	return a.Bits() - b.Bits()
}

// peer converts one lease; why is empty when it can be used.
func (c *converter) peer(l lease.Lease) (p table.Peer, why string) {
	f, err := encap.ParseFraming(l.BackendType)
	switch {
	case err != nil:
		return p, fmt.Sprintf("backend %q is neither udp nor vxlan", l.BackendType)
	case l.PublicIP == c.publicIP:
		return p, "it has our own public IP " + c.publicIP.String()
	case l.PublicIP.IsLoopback() && !c.publicIP.IsLoopback():
		return p, fmt.Sprintf("its address %s is of its own host only", l.PublicIP)
	case c.own.IsValid() && c.own.Overlaps(l.Subnet):
		return p, "it overlaps our own subnet " + c.own.String()
	}
	mtu, loops := c.path(l.PublicIP)
	if loops {
		return p, fmt.Sprintf("the route to its address %s leads into the overlay itself", l.PublicIP)
	}
	p = table.Peer{
		Subnet:           l.Subnet,
		Endpoint:         netip.AddrPortFrom(l.PublicIP, portOf(f, c.cfg)),
		Framing:          f,
		PartialChecksums: l.PartialChecksums,
		MTU:              peerMTU(f, mtu, c.mtu),
		NodeID:           l.NodeID,
	}
	if f == encap.FramingVXLAN {
		if len(l.VtepMAC) != len(p.MAC) {
			return p, "it has no VtepMAC"
		}
		p.VNI = l.VNI
		copy(p.MAC[:], l.VtepMAC)
	}
	return p, ""
}

func macText(m table.MAC) string { return net.HardwareAddr(m[:]).String() }
