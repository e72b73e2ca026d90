package node

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
)

// reconcile compares everything on the host with what it shall be and repairs
// it, whoever changed it. It reports whether it has to be called again soon.
func (r *runner) reconcile() (again bool) {
	start := time.Now()
	defer func() { r.reconTook = time.Since(start) }()
	if r.watch.broken.Load() {
		r.renewWatch()
	}
	r.lookAtUnderlay()
	if r.dataProblem != "" || r.dev == nil {
		return false
	}
	if _, err := r.link.get(); errors.Is(err, errLinkGone) {
		r.note(&r.dataProblem, "TUN device was deleted; making it again", err)
		return false
	}
	if !r.started {
		return false
	}
	again = !r.refreshPaths()
	r.note(&r.linkProblem, "device not configured, trying again", r.forward())
	if r.cfg.BlackholeRoute {
		r.setBlackhole()
	}
	if r.fileProblem != "" {
		r.announce()
	}
	return again
}

// refreshPaths looks again at the ways to all peers, unless it did so a moment
// ago.
func (r *runner) refreshPaths() bool {
	if time.Since(r.pathsAt) < pathInterval {
		return false
	}
	r.pathsAt = time.Now()
	inUse := make(map[netip.Addr]bool, len(r.peers))
	for _, p := range r.peers {
		inUse[p.PublicIP] = true
	}
	if r.path.refresh(inUse) {
		r.log.Info("path MTU to peers changed")
	}
	return true
}

func (r *runner) renewWatch() {
	w, err := watchNet(r.log)
	if err != nil {
		return // the periodic look goes on; the next one tries again
	}
	r.watch.close()
	r.watch = w
}

// settleDelay is how long changes are collected. It grows with what a look
// costs, so that a host with a million routes that flap is not kept busy.
func (r *runner) settleDelay() time.Duration { return max(netSettle, reconcileShare*r.reconTook) }

// repairDelay makes the first attempt to repair the data plane an immediate one
// and paces those that follow.
func (r *runner) repairDelay() time.Duration {
	if time.Since(r.rebuiltAt) > 2*repairRetry {
		return 0
	}
	return repairRetry
}

// lookAtUnderlay follows the interface's MTU and notices when the address the
// sockets are bound to is gone.
func (r *runner) lookAtUnderlay() {
	err := func() error {
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
		return fmt.Errorf("interface %s no longer has the address %s: give it back, or restart to use another", r.u.name, r.u.addr)
	}()
	r.note(&r.underlayProblem, "underlay", err)
}

// logUnderlay says once what the choice of the interface came to.
func (r *runner) logUnderlay() {
	if r.told {
		return
	}
	r.told = true
	r.log.Info("underlay chosen", "interface", r.u.name, "address", r.u.addr, "public_ip", r.u.publicIP, "mtu", r.u.mtu, "by", r.u.why)
}
