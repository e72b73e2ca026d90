package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// raw is the underlay itself: what the machine can do without an overlay.
type raw struct{}

func (raw) up(_ context.Context, _ *bench, p *pair, _ string) (*overlay, error) {
	return &overlay{subject: subjectRaw, pair: p, addr: underlayAddr, dev: [2]string{underlayDev, underlayDev}}, nil
}

func (raw) version(context.Context, *bench) string { return "veth, no overlay" }

// kernelVXLAN is the kernel's vxlan device, set up as flannel sets up its vxlan
// backend: learning off, and for each peer a permanent neighbour, a permanent
// forwarding entry and an onlink route.
type kernelVXLAN struct{}

const (
	kernelVXLANDev  = "flannel.1"
	kernelVXLANPort = 8472
	kernelVXLANID   = 1
	// vxlanOverhead is IPv4, UDP, VXLAN and the inner Ethernet header.
	vxlanOverhead = 50
)

// overlaySubnet is the subnet of a side where the harness chooses it.
func overlaySubnet(side int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(side + 1), 0}), 24)
}

// overlayNetwork is the network that holds all overlay subnets.
const overlayNetwork = "10.77.0.0/16"

func vtepMAC(side int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x77, 0, 0, 0, byte(side + 1)}
}

func (kernelVXLAN) version(context.Context, *bench) string { return "the kernel's own" }

func (kernelVXLAN) up(_ context.Context, _ *bench, p *pair, _ string) (*overlay, error) {
	o := &overlay{
		subject: subjectKernel, pair: p, dev: [2]string{kernelVXLANDev, kernelVXLANDev},
		addr: [2]netip.Addr{overlaySubnet(0).Addr(), overlaySubnet(1).Addr()},
	}
	for side := range p.ns {
		if err := vxlanSide(p, side); err != nil {
			return o, err
		}
	}
	return o, nil
}

func vxlanSide(p *pair, side int) error {
	rt, other := p.rt[side], 1-side
	under, err := rt.LinkByName(underlayDev)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = kernelVXLANDev, underlayMTU-vxlanOverhead, vtepMAC(side)
	err = rt.LinkAdd(&netlink.Vxlan{
		LinkAttrs: attrs, VxlanId: kernelVXLANID, VtepDevIndex: under.Attrs().Index,
		SrcAddr: underlayAddr[side].AsSlice(), Port: kernelVXLANPort, Learning: false,
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return errors.New("this kernel has no vxlan: load it with modprobe vxlan, or leave it out with --subjects")
	}
	if err != nil {
		return fmt.Errorf("vxlan: %w", err)
	}
	if err := p.configure(side, kernelVXLANDev, netip.PrefixFrom(overlaySubnet(side).Addr(), 32)); err != nil {
		return err
	}
	dev, err := rt.LinkByName(kernelVXLANDev)
	if err != nil {
		return err
	}
	index, gateway := dev.Attrs().Index, overlaySubnet(other).Addr().AsSlice()
	if err := rt.NeighSet(&netlink.Neigh{
		LinkIndex: index, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST,
		IP: gateway, HardwareAddr: vtepMAC(other),
	}); err != nil {
		return fmt.Errorf("vxlan neighbour: %w", err)
	}
	if err := rt.NeighSet(&netlink.Neigh{
		LinkIndex: index, State: netlink.NUD_PERMANENT, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF,
		IP: underlayAddr[other].AsSlice(), HardwareAddr: vtepMAC(other),
	}); err != nil {
		return fmt.Errorf("vxlan forwarding entry: %w", err)
	}
	if err := rt.RouteReplace(&netlink.Route{
		LinkIndex: index, Scope: netlink.SCOPE_UNIVERSE, Flags: int(netlink.FLAG_ONLINK),
		Dst: ipNet(overlaySubnet(other)), Gw: gateway,
	}); err != nil {
		return fmt.Errorf("vxlan route: %w", err)
	}
	return nil
}
