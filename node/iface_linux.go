package node

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// FindUnderlay returns the interface a node of this configuration would choose
// in the calling thread's network namespace, without starting one. It reads
// Iface, IfaceRegex and IfaceCanReach only.
func FindUnderlay(c Config) (UnderlayStatus, error) {
	nl, err := netlink.NewHandle()
	if err != nil {
		return UnderlayStatus{}, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	h, err := readHostNet(nl)
	if err != nil {
		return UnderlayStatus{}, err
	}
	u, err := chooseUnderlay(ifaceChoice{names: c.Iface, regexps: c.IfaceRegex, canReach: c.IfaceCanReach}, h, func(error) {})
	if err != nil {
		return UnderlayStatus{}, err
	}
	return UnderlayStatus{Interface: u.name, Address: u.addr, MTU: u.mtu, Chosen: u.why}, nil
}

// readHostNet reads the interfaces, their IPv4 addresses and the main routing
// table of nl's network namespace.
func readHostNet(nl *netlink.Handle) (*hostNet, error) {
	links, err := retryDump(nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	h := &hostNet{routeTo: func(ip netip.Addr) (int, netip.Addr, error) { return routeTo(nl, ip) }}
	at := make(map[int]int, len(links))
	for _, l := range links {
		a := l.Attrs()
		at[a.Index] = len(h.ifaces)
		h.ifaces = append(h.ifaces, hostIface{index: a.Index, name: a.Name, mtu: a.MTU})
	}
	addrs, err := retryDump(func() ([]netlink.Addr, error) { return nl.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		i, known := at[a.LinkIndex]
		ip, ok := netip.AddrFromSlice(a.IP.To4())
		if !known || !ok {
			continue
		}
		h.ifaces[i].addrs = append(h.ifaces[i].addrs, hostAddr{
			ip:         ip,
			deprecated: a.Flags&unix.IFA_F_DEPRECATED != 0,
			permanent:  a.Flags&unix.IFA_F_PERMANENT != 0,
			temporary:  a.Flags&unix.IFA_F_TEMPORARY != 0,
		})
	}
	routes, err := retryDump(func() ([]netlink.Route, error) {
		return nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		h.routes = append(h.routes, hostRoute{
			dst:       prefixOf(r.Dst),
			link:      r.LinkIndex,
			multipath: len(r.MultiPath) > 0,
		})
	}
	return h, nil
}

// dumpTries bounds how often an interrupted netlink dump is repeated.
const dumpTries = 5

// retryDump repeats a netlink dump that the kernel reports as inconsistent
// because the table changed meanwhile; the last answer is used in any case.
func retryDump[T any](dump func() ([]T, error)) ([]T, error) {
	var out []T
	var err error
	for range dumpTries {
		out, err = dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, nil
}

func routeTo(nl *netlink.Handle, ip netip.Addr) (link int, src netip.Addr, err error) {
	rs, err := nl.RouteGet(ip.AsSlice())
	if err != nil {
		return 0, netip.Addr{}, err
	}
	if len(rs) == 0 {
		return 0, netip.Addr{}, unix.ENETUNREACH
	}
	src, _ = netip.AddrFromSlice(rs[0].Src.To4())
	return rs[0].LinkIndex, src, nil
}

// prefixOf converts; nil, the netlink library's older way to say default
// route, gives the invalid prefix.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	ip, ok := netip.AddrFromSlice(n.IP.To4())
	if !ok {
		return netip.Prefix{}
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(ip, bits)
}

func ipNetOf(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
