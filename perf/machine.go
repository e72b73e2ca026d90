package main

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"tweed/netns"
)

// machineMTU of the machine's interface leaves containers of a vxlan overlay the
// 1500 bytes that those of pasta and slirp4netns have.
const (
	machineMTU   = containerMTU + 50
	containerMTU = 1500
)

// newPair builds the underlay of a link.
func (b *bench) newPair(link string) (*pair, error) {
	if link != linkMachine {
		return newPair(link)
	}
	p := &pair{link: link}
	err := p.buildMachine()
	for side := range p.ns {
		if err == nil {
			err = b.contain(p, side)
		}
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("machine: %w", err)
	}
	return p, nil
}

// contain starts a container as any user can make one: a process in a user and
// a network namespace of its own.
func (b *bench) contain(p *pair, side int) error {
	c, err := b.startContained(p.host, fmt.Sprintf("container-%d", side), "sleep", "86400")
	if err != nil {
		return err
	}
	p.containers[side] = c
	if p.ns[side], err = netns.OfProcess(c.pid()); err != nil {
		return err
	}
	if err := p.ns[side].Do(quietIPv6); err != nil {
		return err
	}
	p.rt[side], err = p.ns[side].Netlink()
	return err
}

// buildMachine makes a namespace with one interface and a default route over it
// that leads nowhere.
func (p *pair) buildMachine() error {
	var err error
	if p.host, err = netns.New(); err != nil {
		return err
	}
	if err := p.host.Do(quietIPv6); err != nil {
		return err
	}
	h, err := p.host.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = underlayDev, machineMTU
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "far", PeerMTU: machineMTU}); err != nil {
		return fmt.Errorf("veth: %w (needs the kernel's veth driver: modprobe veth)", err)
	}
	for _, name := range []string{"far", underlayDev} {
		l, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if name == underlayDev {
			if err := h.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(underlayAddr[0], 24))}); err != nil {
				return fmt.Errorf("address of %s: %w", name, err)
			}
		}
		if err := h.LinkSetUp(l); err != nil {
			return fmt.Errorf("%s up: %w", name, err)
		}
	}
	// pasta copies the interface with the default route.
	everywhere := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	if err := h.RouteAdd(&netlink.Route{Dst: everywhere, Gw: underlayAddr[1].AsSlice()}); err != nil {
		return fmt.Errorf("default route: %w", err)
	}
	return nil
}

// way is how iperf3's connections get from its client to its server.
type way struct {
	// ns are where the client and the server run.
	ns [2]*netns.Namespace
	// from is the client's address, empty for any; the client connects to to
	// and port, and the server listens on listen and iperf3Port.
	from, to, listen string
	port             int
	// mtu of a side without a device.
	mtu int
}

// between is the way of the overlay: straight, unless the subject says
// otherwise.
func (o *overlay) between() way {
	if o.way != nil {
		return *o.way
	}
	return way{
		ns: o.pair.ns, from: o.addr[0].String(), to: o.addr[1].String(), listen: o.addr[1].String(), port: iperf3Port,
	}
}
