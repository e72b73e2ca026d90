package node

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// hostAddr is one IPv4 address of an interface.
type hostAddr struct {
	ip                               netip.Addr
	deprecated, permanent, temporary bool
}

// hostIface is one interface, as the choice needs it.
type hostIface struct {
	index int
	name  string
	mtu   int
	addrs []hostAddr
}

// usable returns the addresses that can be an underlay address, best first:
// global before link-local, permanent before not, not temporary before
// temporary; deprecated ones never (flannel pkg/ip/iface.go).
func (i *hostIface) usable() []netip.Addr {
	as := slices.DeleteFunc(slices.Clone(i.addrs), func(a hostAddr) bool {
		return a.deprecated || !(a.ip.IsGlobalUnicast() || a.ip.IsLinkLocalUnicast())
	})
	slices.SortStableFunc(as, func(a, b hostAddr) int {
		return cmp.Or(
			cmpBool(b.ip.IsGlobalUnicast(), a.ip.IsGlobalUnicast()),
			cmpBool(b.permanent, a.permanent),
			cmpBool(a.temporary, b.temporary),
		)
	})
	ips := make([]netip.Addr, len(as))
	for i, a := range as {
		ips[i] = a.ip
	}
	return ips
}

// owns reports whether the interface has the address. The kernel takes all of
// 127/8 for its own as soon as loopback has one address of it.
func (i *hostIface) owns(ip netip.Addr) bool {
	if ip.IsLoopback() && len(i.addrs) > 0 && i.addrs[0].ip.IsLoopback() {
		return true
	}
	return slices.ContainsFunc(i.addrs, func(a hostAddr) bool { return a.ip == ip })
}

func cmpBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// hostRoute is one route of the main table, in the kernel's order.
type hostRoute struct {
	dst       netip.Prefix // invalid for a default route given without one
	link      int          // 0 for a multipath route
	multipath bool
}

// hostNet is what the choice reads of the host. A test fills it by hand.
type hostNet struct {
	ifaces []hostIface
	routes []hostRoute
	// routeTo asks the kernel for the way to ip.
	routeTo func(ip netip.Addr) (link int, src netip.Addr, err error)
}

// ifaceChoice is what the operator said about the underlay interface.
type ifaceChoice struct {
	names, regexps []string
	canReach       string
	publicIP       netip.Addr // invalid: the interface's address
}

func (c *ifaceChoice) empty() bool {
	return len(c.names) == 0 && len(c.regexps) == 0 && c.canReach == ""
}

// underlay is the chosen interface.
type underlay struct {
	index int
	name  string
	mtu   int // bytes
	// addr is the address on the interface: what the udp framing binds.
	addr netip.Addr
	// publicIP is the address in the lease; it differs from addr behind NAT.
	publicIP netip.Addr
	// why says which rule chose it, for the log and the status.
	why string
}

func (h *hostNet) byIndex(index int) (*hostIface, bool) {
	for i := range h.ifaces {
		if h.ifaces[i].index == index {
			return &h.ifaces[i], true
		}
	}
	return nil, false
}

func (h *hostNet) byIP(ip netip.Addr) (*hostIface, bool) {
	for i := range h.ifaces {
		if h.ifaces[i].owns(ip) {
			return &h.ifaces[i], true
		}
	}
	return nil, false
}

func (h *hostNet) names() string {
	var s []string
	for _, i := range h.ifaces {
		s = append(s, i.name)
	}
	return strings.Join(s, ", ")
}

// addresses lists "name ip" for error messages.
func (h *hostNet) addresses() string {
	var s []string
	for _, i := range h.ifaces {
		for _, a := range i.addrs {
			s = append(s, i.name+" "+a.ip.String())
		}
	}
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(s, ", ")
}

// chooseUnderlay picks the interface between the nodes by flannel's rules
// (main.go and pkg/ipmatch): every --iface in order, every --iface-regex in
// order, --iface-can-reach; with none of them the owner of --public-ip, else
// the first default route. warn is called for every option that did not match
// although a later one did.
func chooseUnderlay(c ifaceChoice, h *hostNet, warn func(error)) (underlay, error) {
	u, err := pickUnderlay(c, h, warn)
	if err != nil {
		return underlay{}, err
	}
	if u.mtu == 0 {
		return underlay{}, fmt.Errorf("interface %s: MTU is 0: set one with ip link set %s mtu 1500", u.name, u.name)
	}
	u.publicIP = u.addr
	if c.publicIP.IsValid() {
		u.publicIP = c.publicIP
	}
	return u, nil
}

func pickUnderlay(c ifaceChoice, h *hostNet, warn func(error)) (underlay, error) {
	if c.empty() {
		if c.publicIP.IsValid() {
			return pickByPublicIP(c.publicIP, h)
		}
		return pickByDefaultRoute(h)
	}
	var errs []error
	attempt := func(u underlay, err error) (underlay, bool) {
		if err != nil {
			errs = append(errs, err)
			return underlay{}, false
		}
		for _, e := range errs {
			warn(e)
		}
		return u, true
	}
	for _, name := range c.names {
		if u, ok := attempt(pickByName(name, h)); ok {
			return u, nil
		}
	}
	for _, re := range c.regexps {
		if u, ok := attempt(pickByRegexp(re, h)); ok {
			return u, nil
		}
	}
	if c.canReach != "" {
		if u, ok := attempt(pickByReach(c.canReach, h)); ok {
			return u, nil
		}
	}
	return underlay{}, joinLine(errs)
}

// joinLine joins errors into one line; errors.Join would make several.
func joinLine(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	var s []string
	for _, e := range errs {
		s = append(s, e.Error())
	}
	return errors.New(strings.Join(s, "; "))
}

// on makes the result for an interface and one of its addresses; an invalid
// addr means the best one.
func on(i *hostIface, addr netip.Addr, why string) (underlay, error) {
	if !addr.IsValid() {
		ips := i.usable()
		if len(ips) == 0 {
			return underlay{}, fmt.Errorf("%s: interface %s has no usable IPv4 address", why, i.name)
		}
		addr = ips[0]
	}
	return underlay{index: i.index, name: i.name, mtu: i.mtu, addr: addr, why: why}, nil
}

func pickByName(name string, h *hostNet) (underlay, error) {
	why := "--iface " + name
	if ip, err := netip.ParseAddr(name); err == nil {
		i, ok := h.byIP(ip)
		if !ok {
			return underlay{}, fmt.Errorf("%s: no interface has this address (have: %s)", why, h.addresses())
		}
		return on(i, ip, why)
	}
	for i := range h.ifaces {
		if h.ifaces[i].name == name {
			return on(&h.ifaces[i], netip.Addr{}, why)
		}
	}
	return underlay{}, fmt.Errorf("%s: no such interface (have: %s)", why, h.names())
}

// pickByRegexp tries the addresses of all interfaces before any name.
func pickByRegexp(expr string, h *hostNet) (underlay, error) {
	why := "--iface-regex " + expr
	re, err := regexp.Compile(expr)
	if err != nil {
		return underlay{}, fmt.Errorf("%s: %w", why, err)
	}
	for i := range h.ifaces {
		for _, ip := range h.ifaces[i].usable() {
			if re.MatchString(ip.String()) {
				return on(&h.ifaces[i], ip, why)
			}
		}
	}
	for i := range h.ifaces {
		if re.MatchString(h.ifaces[i].name) {
			return on(&h.ifaces[i], netip.Addr{}, why)
		}
	}
	return underlay{}, fmt.Errorf("%s: matches no interface address or name (have: %s)", why, h.addresses())
}

func pickByReach(target string, h *hostNet) (underlay, error) {
	why := "--iface-can-reach " + target
	ip, err := netip.ParseAddr(target)
	if err != nil || !ip.Is4() {
		return underlay{}, fmt.Errorf("%s: expected an IPv4 address", why)
	}
	link, src, err := h.routeTo(ip)
	if err != nil {
		return underlay{}, fmt.Errorf("%s: no route to it: %w", why, err)
	}
	i, ok := h.byIndex(link)
	if !ok {
		return underlay{}, fmt.Errorf("%s: the route to it uses an unknown interface (index %d)", why, link)
	}
	return on(i, src, why)
}

func pickByPublicIP(ip netip.Addr, h *hostNet) (underlay, error) {
	why := "--public-ip " + ip.String()
	i, ok := h.byIP(ip)
	if !ok {
		return underlay{}, fmt.Errorf("%s: no interface has this address; behind NAT give --iface too (have: %s)", why, h.addresses())
	}
	return on(i, ip, why)
}

func pickByDefaultRoute(h *hostNet) (underlay, error) {
	const why = "default route"
	for _, r := range h.routes {
		if r.dst.IsValid() && (r.dst.Bits() != 0 || !r.dst.Addr().IsUnspecified()) {
			continue
		}
		if r.multipath || r.link == 0 {
			return underlay{}, fmt.Errorf("the default route has several next hops: choose with --iface NAME or IP (have: %s)", h.addresses())
		}
		i, ok := h.byIndex(r.link)
		if !ok {
			return underlay{}, fmt.Errorf("the default route uses an unknown interface (index %d)", r.link)
		}
		return on(i, netip.Addr{}, why)
	}
	return underlay{}, fmt.Errorf("no default route: choose the interface between the nodes with --iface NAME or IP (have: %s)", h.addresses())
}
