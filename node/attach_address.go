package node

import (
	"fmt"
	"net/netip"
)

// firstHost is the first address of our subnet that is given away, counted
// from its base: the base is the host's own and the next one is where
// flannel's users put a bridge.
const firstHost = 2

// pick chooses an address of the subnet nobody has; with none wanted the next
// after the one given away last, so that a released address rests as long as
// possible.
func (a *attachments) pick(subnet netip.Prefix, want netip.Addr) (netip.Addr, error) {
	taken := map[netip.Addr]string{}
	for _, o := range a.all {
		taken[o.Addr] = o.Name
	}
	base := subnet.Masked().Addr()
	first := base
	for range firstHost {
		first = first.Next()
	}
	usable := func(ip netip.Addr) bool {
		return subnet.Contains(ip) && !ip.Less(first) && subnet.Contains(ip.Next())
	}
	if want.IsValid() {
		switch {
		case !usable(want):
			return want, fmt.Errorf("%w: address %s: expected one of this node's subnet %s, from %s on", errBadRequest, want, subnet, first)
		case taken[want] != "":
			return want, fmt.Errorf("%w: address %s belongs to %s", ErrAttached, want, taken[want])
		}
		a.last = want
		return want, nil
	}
	ip := a.last
	if !usable(ip) {
		ip = first
	} else if ip = ip.Next(); !usable(ip) {
		ip = first
	}
	for start := ip; ; {
		if taken[ip] == "" && usable(ip) {
			a.last = ip
			return ip, nil
		}
		if ip = ip.Next(); !usable(ip) {
			ip = first
		}
		if ip == start {
			return ip, fmt.Errorf("every address of this node's subnet %s is taken by %d attachments: detach some, or use a larger SubnetLen", subnet, len(taken))
		}
	}
}
