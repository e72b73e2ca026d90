package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Names of the interfaces of a [LAN].
const (
	// LANBridge is the bridge in the switch namespace.
	LANBridge = "br0"
	// LANInterface is the interface of every node.
	LANInterface = "eth0"
)

// DefaultLANNetwork is the network of a [LAN] that names none: TEST-NET-1
// (RFC 5737), which no real underlay uses.
var DefaultLANNetwork = netip.MustParsePrefix("192.0.2.0/24")

// LANConfig describes a [LAN].
type LANConfig struct {
	// Nodes is the number of nodes, 1 to 200.
	Nodes int
	// Network is the /24 of the switch (.1) and the nodes (.11, .12, ...);
	// the zero value means DefaultLANNetwork.
	Network netip.Prefix
	// MTU of every interface in bytes; 0 means 1500.
	MTU int
}

// LAN is an underlay: a namespace that holds a bridge, and node namespaces
// each joined to it by a veth pair named eth0 on the node's side. Nothing of it
// is visible in the namespace of the program, there is no default route, and
// IPv6 is off so that the only packets are those somebody sent.
type LAN struct {
	// Switch holds the bridge; its address is Gateway.
	Switch  *Namespace
	Gateway netip.Addr
	// Nodes are the namespaces of the nodes, in order.
	Nodes []*Namespace

	network netip.Prefix
	mtu     int
}

// NewLAN builds a LAN. On an error nothing is left behind.
func NewLAN(c LANConfig) (*LAN, error) {
	if c.Nodes < 1 || c.Nodes > 200 {
		return nil, fmt.Errorf("netns: lan: %d nodes: expected 1 to 200", c.Nodes)
	}
	if !c.Network.IsValid() {
		c.Network = DefaultLANNetwork
	}
	if !c.Network.Addr().Is4() || c.Network.Bits() != 24 {
		return nil, fmt.Errorf("netns: lan: network %s: expected an IPv4 /24", c.Network)
	}
	if c.MTU == 0 {
		c.MTU = 1500
	}
	l := &LAN{network: c.Network.Masked(), mtu: c.MTU}
	l.Gateway = l.host(1)
	if err := l.build(c.Nodes); err != nil {
		return nil, errors.Join(fmt.Errorf("netns: lan: %w", err), l.Close())
	}
	return l, nil
}

// Addr is the underlay address of node i, counted from 0.
func (l *LAN) Addr(i int) netip.Addr { return l.host(byte(11 + i)) }

// Network is the underlay's network.
func (l *LAN) Network() netip.Prefix { return l.network }

// MTU is the underlay's MTU in bytes.
func (l *LAN) MTU() int { return l.mtu }

// Port is the name of the bridge's end of node i's link, in the namespace
// Switch.
func (l *LAN) Port(i int) string { return fmt.Sprintf("n%d", i+1) }

// Close removes the links and gives the namespaces up. Processes still running
// inside keep theirs, without a link.
func (l *LAN) Close() error {
	if l.Switch == nil {
		return nil
	}
	// Links go explicitly: the kernel tears a namespace down some time after
	// its last user has gone.
	errs := []error{l.removeLinks()}
	for _, n := range l.Nodes {
		errs = append(errs, n.Close())
	}
	errs = append(errs, l.Switch.Close())
	l.Switch, l.Nodes = nil, nil
	return errors.Join(errs...)
}

func (l *LAN) host(last byte) netip.Addr {
	a := l.network.Addr().As4()
	a[3] = last
	return netip.AddrFrom4(a)
}

func (l *LAN) build(nodes int) error {
	var err error
	if l.Switch, err = newWithoutIPv6(); err != nil {
		return err
	}
	h, err := l.Switch.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	bridge := &netlink.Bridge{LinkAttrs: attrs(LANBridge, l.mtu)}
	if err := h.LinkAdd(bridge); err != nil {
		return fmt.Errorf("bridge: %w (needs the kernel's bridge driver: `modprobe bridge`)", err)
	}
	if err := configure(h, LANBridge, l.Gateway); err != nil {
		return err
	}
	for i := range nodes {
		n, err := newWithoutIPv6()
		if err != nil {
			return err
		}
		l.Nodes = append(l.Nodes, n)
		if err := l.plug(h, i, n); err != nil {
			return fmt.Errorf("node %d: %w", i+1, err)
		}
	}
	return nil
}

// plug joins node i to the bridge.
func (l *LAN) plug(h *netlink.Handle, i int, n *Namespace) error {
	veth := &netlink.Veth{
		LinkAttrs:     attrs(l.Port(i), l.mtu),
		PeerName:      LANInterface,
		PeerMTU:       uint32(l.mtu),
		PeerNamespace: netlink.NsFd(int(n.file.Fd())),
	}
	if err := h.LinkAdd(veth); err != nil {
		return fmt.Errorf("veth: %w (needs the kernel's veth driver: `modprobe veth`)", err)
	}
	port, err := h.LinkByName(l.Port(i))
	if err != nil {
		return err
	}
	bridge, err := h.LinkByName(LANBridge)
	if err != nil {
		return err
	}
	if err := h.LinkSetMaster(port, bridge); err != nil {
		return fmt.Errorf("veth into bridge: %w", err)
	}
	if err := h.LinkSetUp(port); err != nil {
		return fmt.Errorf("veth up: %w", err)
	}
	inner, err := n.Netlink()
	if err != nil {
		return err
	}
	defer inner.Close()
	return configure(inner, LANInterface, l.Addr(i))
}

func (l *LAN) removeLinks() error {
	h, err := l.Switch.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return fmt.Errorf("netns: lan: list links: %w", err)
	}
	var errs []error
	for _, link := range links {
		if link.Attrs().Name == "lo" {
			continue
		}
		var gone netlink.LinkNotFoundError
		if err := h.LinkDel(link); err != nil && !errors.As(err, &gone) && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("netns: lan: remove %s: %w", link.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

func attrs(name string, mtu int) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU = name, mtu
	return a
}

// configure gives a link its /24 address and sets it up.
func configure(h *netlink.Handle, name string, addr netip.Addr) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(netip.PrefixFrom(addr, 24).String())
	if err != nil {
		return err
	}
	if err := h.AddrAdd(link, a); err != nil {
		return fmt.Errorf("address %s on %s: %w", addr, name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("%s up: %w", name, err)
	}
	return nil
}

// newWithoutIPv6 is New with IPv6 off for every interface to come, so that
// neighbour and router discovery do not mix into what tests count. A kernel
// without IPv6 has nothing to switch off, and a container with a read-only
// /proc/sys works all the same, only less quietly.
func newWithoutIPv6() (*Namespace, error) {
	n, err := New()
	if err != nil {
		return nil, err
	}
	err = n.Do(func() error {
		for _, scope := range []string{"all", "default"} {
			err := os.WriteFile("/proc/sys/net/ipv6/conf/"+scope+"/disable_ipv6", []byte("1"), 0)
			if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EROFS) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		n.Close()
		return nil, fmt.Errorf("switch IPv6 off: %w", err)
	}
	return n, nil
}
