package node

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// pathInfo is what the kernel's routing table says of the way to a peer.
type pathInfo struct {
	mtu   int  // bytes, 0 when there is no way now
	loops bool // the way leads into our own TUN
	// link is the index of the interface the way leads through, 0 when there are
	// several, or when the accelerator's packets would not take the way that the
	// sockets' do.
	link int
	// hop is the gateway or the peer itself; invalid when that is not all that
	// there is to say of the way.
	hop netip.Addr
}

// pathCache remembers the way to every peer, because asking costs a system
// call per peer and the answer changes only with links and routes.
type pathCache struct {
	nl   *netlink.Handle
	tun  int        // index of our own device
	from netip.Addr // source of the datagrams, which rules may route by
	// links are the MTUs of interfaces by index, filled on demand.
	links map[int]int
	paths map[netip.Addr]pathInfo
	rules pathRules
}

func newPathCache(nl *netlink.Handle, tun int, from netip.Addr) *pathCache {
	return &pathCache{nl: nl, tun: tun, from: from, links: map[int]int{}, paths: map[netip.Addr]pathInfo{}}
}

// leave is called when the datagrams have another source: all ways may be others.
func (c *pathCache) leave(from netip.Addr) {
	c.from = from
	clear(c.paths)
}

// get answers from memory when it can.
func (c *pathCache) get(ip netip.Addr) (mtu int, loops bool) {
	p, ok := c.paths[ip]
	if !ok {
		p = c.ask(ip)
		c.paths[ip] = p
	}
	return p.mtu, p.loops
}

// refresh asks again for every address in use, forgets the others, and reports
// whether an answer changed.
func (c *pathCache) refresh(inUse map[netip.Addr]bool) bool {
	clear(c.links)
	c.rules.known = false
	changed := false
	for ip, old := range c.paths {
		if !inUse[ip] {
			delete(c.paths, ip)
			continue
		}
		p := c.ask(ip)
		// A way that is gone for the moment keeps what was known of it: the
		// socket will say so for each packet, and the MTU comes back with it.
		// Only the interface is not known any more.
		if p.mtu == 0 && !p.loops {
			old.link, old.hop = 0, netip.Addr{}
			c.paths[ip] = old
			continue
		}
		if p != old {
			c.paths[ip] = p
			changed = true
		}
	}
	return changed
}

// ask looks in the routing table itself, not in what the kernel learnt from
// ICMP: a forged "fragmentation needed" must not shrink the path.
func (c *pathCache) ask(ip netip.Addr) pathInfo {
	rs, err := c.nl.RouteGetWithOptions(ip.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true, SrcAddr: c.from.AsSlice()})
	if err != nil || len(rs) == 0 {
		return pathInfo{}
	}
	r := rs[0]
	links := []int{r.LinkIndex}
	if len(r.MultiPath) > 0 {
		links = links[:0]
		for _, hop := range r.MultiPath {
			links = append(links, hop.LinkIndex)
		}
	}
	p := pathInfo{mtu: r.MTU}
	if p.link = onlyLink(&r); p.link != 0 && c.sameForAll(ip, p.link) {
		p.hop = firstHop(&r, ip)
	} else {
		p.link = 0
	}
	for _, index := range links {
		p.loops = p.loops || c.tun != 0 && index == c.tun
		if mtu := c.linkMTU(index); mtu > 0 && (p.mtu == 0 || mtu < p.mtu) {
			p.mtu = mtu
		}
	}
	return p
}

// onlyLink returns the interface that a route puts packets on as they are. A route
// to an address of this host does not, although it names an interface, and neither
// does one with an encapsulation: the accelerator's packets would not get it.
func onlyLink(r *netlink.Route) int {
	if len(r.MultiPath) > 0 || r.Encap != nil || r.NewDst != nil || r.Type != unix.RTN_UNICAST {
		return 0
	}
	return r.LinkIndex
}

// firstHop returns the neighbour on a route to ip that has one interface.
func firstHop(r *netlink.Route, ip netip.Addr) netip.Addr {
	switch {
	case onlyLink(r) == 0 || r.Via != nil:
		return netip.Addr{}
	case r.Gw == nil:
		return ip
	}
	gw, _ := netip.AddrFromSlice(r.Gw)
	return gw.Unmap()
}

func (c *pathCache) linkMTU(index int) int {
	if mtu, ok := c.links[index]; ok {
		return mtu
	}
	l, err := c.nl.LinkByIndex(index)
	if err != nil {
		return 0
	}
	c.links[index] = l.Attrs().MTU
	return l.Attrs().MTU
}
