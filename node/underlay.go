package node

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

// lookAtUnderlay follows the interface's MTU, and the address the sockets are
// bound to when it is gone.
func (r *runner) lookAtUnderlay() {
	err := r.underlayGone()
	if err != nil && r.joined {
		if err = r.moveUnderlay(err); err == nil {
			return
		}
	}
	r.note(&r.underlayProblem, "underlay", err)
}

// underlayGone says that the interface or its address is no longer there.
func (r *runner) underlayGone() error {
	l, err := r.nl.LinkByName(r.u.name)
	if err != nil {
		return fmt.Errorf("interface %s is gone", r.u.name)
	}
	r.u.index, r.u.mtu = l.Attrs().Index, l.Attrs().MTU
	addrs, err := retryDump(func() ([]netlink.Addr, error) { return r.nl.AddrList(l, netlink.FAMILY_V4) })
	if err != nil {
		return nil // not known: no news
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok && ip == r.u.addr {
			return nil
		}
	}
	return fmt.Errorf("interface %s no longer has the address %s", r.u.name, r.u.addr)
}

// moveUnderlay goes over to the address that a start would choose now: other
// sockets on the same device, and the same subnet under the new address. gone is
// why; it is returned, with what is in the way, when there is no such address.
func (r *runner) moveUnderlay(gone error) error {
	h, err := readHostNet(r.nl)
	var u underlay
	if err == nil {
		u, err = chooseUnderlay(r.choice, h, func(error) {})
	}
	if err == nil && r.overlay.cfg.Network.Contains(u.publicIP) {
		err = fmt.Errorf("%s is inside the overlay's network", u.publicIP)
	}
	if err != nil {
		return fmt.Errorf("%w: give it back, or an address the options allow, which is then used (%w)", gone, err)
	}
	r.log.Warn("underlay address changed", "why", gone, "interface", u.name, "address", u.addr, "public_ip", u.publicIP)
	r.u, r.host, r.told = u, h, false
	r.path.leave(bindAddr(r.u, r.host))
	from := r.overlay.listen
	r.overlay.listen = slices.Clone(from)
	for i := range r.overlay.listen {
		l := &r.overlay.listen[i]
		l.Addr = netip.AddrPortFrom(bindAddr(r.u, r.host), l.Addr.Port())
		if l.Addr != from[i].Addr {
			r.unlock("udp/" + from[i].Addr.String())
		}
	}
	r.next = r.overlay
	r.restartEngine()
	r.logUnderlay()
	r.note(&r.underlayProblem, "underlay", nil)
	r.mgr.SetPublicIP(u.publicIP)
	return nil
}

// restartEngine makes the engine again for the overlay in force, on the device
// that is there.
func (r *runner) restartEngine() {
	r.rebuiltAt = time.Now()
	r.closeEngine()
	err := r.openEngine(r.overlay)
	if err == nil {
		err = r.forward()
	}
	r.note(&r.dataProblem, "data plane is down, trying again", err)
}

// logUnderlay says once what the choice of the interface came to.
func (r *runner) logUnderlay() {
	if r.told {
		return
	}
	r.told = true
	r.log.Info("underlay chosen", "interface", r.u.name, "address", r.u.addr, "public_ip", r.u.publicIP, "mtu", r.u.mtu, "by", r.u.why)
}
