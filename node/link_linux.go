package node

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// routeProtocol marks the routes tweed made, so that it never removes one
	// it did not (see /etc/iproute2/rt_protos for those in use elsewhere).
	routeProtocol = 116
	// txQueueLen is the TUN's transmit queue in packets; with the default of
	// 500 a burst of small packets is lost before a worker is scheduled.
	txQueueLen = 2000
)

// errLinkGone says that the TUN device is no longer there.
var errLinkGone = errors.New("device is gone")

// linkWant is how the TUN device shall look.
type linkWant struct {
	// addr is set as a /32: the base address of our subnet (flannel
	// pkg/backend/udp/udp_network_amd64.go).
	addr netip.Addr
	// network is routed to the device.
	network netip.Prefix
	mtu     int // bytes
	gso     int // bytes, 0 leaves the kernel's default
}

// overlayLink keeps the TUN device configured. It is used by one goroutine.
type overlayLink struct {
	nl    *netlink.Handle
	name  string
	index int
	// sysctl is where the kernel's network settings are, /proc/sys/net.
	sysctl string
}

// newOverlayLink finds the device that was just opened under name. The calling
// thread is in the device's network namespace.
func newOverlayLink(nl *netlink.Handle, name string) (*overlayLink, error) {
	l, err := nl.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if err := acceptOwnSource(l.Attrs().Index); err != nil {
		return nil, fmt.Errorf("%s: set accept_local: %w", name, err)
	}
	return &overlayLink{nl: nl, name: name, index: l.Attrs().Index, sysctl: "/proc/sys/net"}, nil
}

// acceptOwnSource sets the device's accept_local. The engine's ICMP errors come
// out of the device with the node's own address as their source, which Linux
// else takes for forged and drops without a word (fib_validate_source in
// net/ipv4/fib_frontend.c). Packets from other nodes with such a source never
// get that far: they are martian-source to the engine.
func acceptOwnSource(index int) error {
	const acceptLocal = 23 // IPV4_DEVCONF_ACCEPT_LOCAL of linux/ip.h
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	inet := spec.AddRtAttr(unix.AF_INET, nil)
	conf := inet.AddRtAttr(unix.IFLA_INET_CONF, nil)
	conf.AddRtAttr(acceptLocal, nl.Uint32Attr(1))
	req.AddData(spec)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// get returns the device as the kernel sees it now, errLinkGone if it was
// deleted, even when another device has its name.
func (o *overlayLink) get() (netlink.Link, error) {
	l, err := o.nl.LinkByIndex(o.index)
	var notFound netlink.LinkNotFoundError
	if errors.As(err, &notFound) || errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("%s: %w", o.name, errLinkGone)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.name, err)
	}
	return l, nil
}

// setMTU sets the MTU in bytes, unless it is set already.
func (o *overlayLink) setMTU(mtu int) error {
	l, err := o.get()
	if err != nil || l.Attrs().MTU == mtu {
		return err
	}
	if err := o.nl.LinkSetMTU(l, mtu); err != nil {
		return fmt.Errorf("%s: set MTU %d: %w", o.name, mtu, err)
	}
	return nil
}

// ensure makes the device look like want and returns what it had to change,
// for the log; it is cheap when nothing is to be done. A wider route is added
// before a narrower one is removed, so that a grown network loses no packet.
func (o *overlayLink) ensure(want linkWant) (changed []string, err error) {
	l, err := o.get()
	if err != nil {
		return nil, err
	}
	a := l.Attrs()
	step := func(what string, needed bool, do func() error) {
		if err != nil || !needed {
			return
		}
		if e := do(); e != nil {
			err = fmt.Errorf("%s: set %s: %w", o.name, what, e)
			return
		}
		changed = append(changed, what)
	}
	step(fmt.Sprintf("MTU %d", want.mtu), a.MTU != want.mtu, func() error { return o.nl.LinkSetMTU(l, want.mtu) })
	step(fmt.Sprintf("txqueuelen %d", txQueueLen), a.TxQLen != txQueueLen, func() error { return o.nl.LinkSetTxQLen(l, txQueueLen) })
	if want.gso > 0 {
		step(fmt.Sprintf("gso_max_size %d", want.gso), int(a.GSOMaxSize) != want.gso, func() error { return o.nl.LinkSetGSOMaxSize(l, want.gso) })
		// Kernels before 6.3 have one limit for both families and no such attribute.
		if err == nil && a.GSOIPv4MaxSize != 0 && int(a.GSOIPv4MaxSize) != want.gso {
			step(fmt.Sprintf("gso_ipv4_max_size %d", want.gso), true, func() error { return o.nl.LinkSetGSOIPv4MaxSize(l, want.gso) })
		}
	}
	if err != nil {
		return changed, err
	}
	if a.Flags&net.FlagUp == 0 {
		// Before the device comes up, or the kernel would start IPv6 on it.
		o.quietIPv6()
	}
	addrChanges, err := o.ensureAddr(l, want)
	changed = append(changed, addrChanges...)
	step("up", a.Flags&net.FlagUp == 0, func() error { return o.nl.LinkSetUp(l) })
	if err != nil {
		return changed, err
	}
	routeChanges, err := o.ensureRoute(want.network)
	return append(changed, routeChanges...), err
}

// quietIPv6 keeps router solicitations and multicast reports out of an overlay
// that carries IPv4 only. A kernel without IPv6 has no such files.
func (o *overlayLink) quietIPv6() {
	dir := filepath.Join(o.sysctl, "ipv6", "conf", o.name)
	_ = os.WriteFile(filepath.Join(dir, "accept_ra"), []byte("0"), 0o644)
	_ = os.WriteFile(filepath.Join(dir, "disable_ipv6"), []byte("1"), 0o644)
}

// ensureAddr sets the address and removes others inside the network, left by
// an earlier subnet; addresses outside of it are somebody else's.
func (o *overlayLink) ensureAddr(l netlink.Link, want linkWant) ([]string, error) {
	addrs, err := retryDump(func() ([]netlink.Addr, error) { return o.nl.AddrList(l, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("%s: list addresses: %w", o.name, err)
	}
	var changed []string
	wanted := netip.PrefixFrom(want.addr, 32)
	have := slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return prefixOf(a.IPNet) == wanted })
	if !have {
		if err := o.nl.AddrAdd(l, &netlink.Addr{IPNet: ipNetOf(wanted)}); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("%s: add address %s: %w", o.name, wanted, err)
		}
		changed = append(changed, "address "+wanted.String())
	}
	for _, a := range addrs {
		p := prefixOf(a.IPNet)
		if p == wanted || !want.network.Contains(p.Addr()) {
			continue
		}
		if err := o.nl.AddrDel(l, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return changed, fmt.Errorf("%s: remove address %s: %w", o.name, p, err)
		}
		changed = append(changed, "removed address "+p.String())
	}
	return changed, nil
}

// ensureRoute routes network to the device and then removes the routes to it
// that we made for another network.
func (o *overlayLink) ensureRoute(network netip.Prefix) ([]string, error) {
	routes, err := mainRoutes(o.nl)
	if err != nil {
		return nil, err
	}
	var changed []string
	if !slices.ContainsFunc(routes, func(r netlink.Route) bool { return prefixOf(r.Dst) == network && r.LinkIndex == o.index }) {
		if err := routeConflict(o.nl, routes, network, o.index); err != nil {
			return nil, err
		}
		err := o.nl.RouteAdd(&netlink.Route{
			LinkIndex: o.index, Dst: ipNetOf(network),
			Scope: netlink.SCOPE_UNIVERSE, Protocol: routeProtocol,
		})
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("%s: add route %s: %w", o.name, network, err)
		}
		changed = append(changed, "route "+network.String())
	}
	for _, r := range routes {
		if r.LinkIndex != o.index || r.Protocol != routeProtocol || prefixOf(r.Dst) == network || r.Type != unix.RTN_UNICAST {
			continue
		}
		if err := o.nl.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return changed, fmt.Errorf("%s: remove route %s: %w", o.name, prefixOf(r.Dst), err)
		}
		changed = append(changed, "removed route "+prefixOf(r.Dst).String())
	}
	return changed, nil
}

func mainRoutes(nl *netlink.Handle) ([]netlink.Route, error) {
	routes, err := retryDump(func() ([]netlink.Route, error) {
		return nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return routes, nil
}

// routeConflict refuses a network that somebody else routes already. More
// specific and less specific routes are no conflict: containers need the former.
func routeConflict(nl *netlink.Handle, routes []netlink.Route, network netip.Prefix, own int) error {
	for _, r := range routes {
		if prefixOf(r.Dst) != network || r.LinkIndex == own || r.Priority != 0 {
			continue
		}
		by := fmt.Sprintf("interface index %d", r.LinkIndex)
		if l, err := nl.LinkByIndex(r.LinkIndex); err == nil {
			by = l.Attrs().Name
		}
		if r.Protocol == routeProtocol {
			return fmt.Errorf("network %s is routed by another engine on this host, dev %s: stop that one, or give this one another network with --etcd-prefix", network, by)
		}
		return fmt.Errorf("route %s exists already, dev %s: remove it (ip route del %s dev %s), or choose another Network", network, by, network, by)
	}
	return nil
}

// blackhole keeps an unreachable-by-design route for our own subnet, of the
// lowest preference, for the addresses no container has (flannel
// --ip-blackhole-route).
func blackhole(nl *netlink.Handle, subnet netip.Prefix, add bool) error {
	r := &netlink.Route{Dst: ipNetOf(subnet), Type: unix.RTN_BLACKHOLE, Protocol: routeProtocol, Priority: 4096}
	if !add {
		if err := nl.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove blackhole route %s: %w", subnet, err)
		}
		return nil
	}
	if err := nl.RouteAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add blackhole route %s: %w", subnet, err)
	}
	return nil
}
