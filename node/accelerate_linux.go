package node

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"

	"tweed/accel"
	"tweed/encap"
)

// States of the accelerator in DeviceStatus.
const (
	acceleratorOn     = "on"
	acceleratorPaused = "paused"
	acceleratorOff    = "off"
)

// accelerator is the node's end of package accel: when there is one, and when
// it has to stand back.
type accelerator struct {
	*accel.Accelerator        // nil while there is none
	why                string // there is none
	waits              bool   // for an underlay interface that it can be made for
	host               acceleratorHost
	heldAt             time.Time // when holdAccelerator looked last
}

// holdInterval is the shortest time between two looks of holdAccelerator.
const holdInterval = 10 * time.Millisecond

// acceleratorHost is what an accelerator was made for.
type acceleratorHost struct {
	underlay int        // interface index
	addr     netip.Addr // of the sockets
	whole    bool       // the link carries super-packets without cutting them
	source   [6]byte    // Ethernet address
}

// state returns what DeviceStatus says.
func (a *accelerator) state() (state, why string) {
	if a.Accelerator == nil {
		return acceleratorOff, a.why
	}
	on, why := a.State()
	if on {
		return acceleratorOn, why
	}
	return acceleratorPaused, why
}

// openAccelerator puts an accelerator beside the engine, if the host has what
// it takes. It is never an error that it has not.
func (r *runner) openAccelerator() {
	if err := r.tryAccelerator(); err != nil {
		if r.acc.why != err.Error() {
			r.log.Info("packets are not carried inside the kernel", "why", err)
		}
		r.acc = accelerator{why: err.Error(), waits: errors.Is(err, errNoHost)}
	}
}

func (r *runner) tryAccelerator() error {
	switch {
	case !r.cfg.Accelerate:
		return fmt.Errorf("--accelerate off")
	case r.cfg.Impair.Active():
		return fmt.Errorf("--impair %s is for the packet workers to do", r.cfg.Impair)
	case r.link == nil:
		return fmt.Errorf("no TUN device of the host's own")
	}
	host, underlay, err := r.acceleratorHost()
	if err != nil {
		return err
	}
	r.path.carry(flowsTo(r.eng.SourcePorts(), r.overlay.cfg))
	cfg := accel.Config{
		TUN: r.link.index, Underlay: host.underlay, Local: host.addr,
		Sources: r.eng.SourcePorts(), Whole: host.whole, MTU: r.overlay.mtu,
		Source: host.source, Way: r.path.way, Refused: r.dev.Refused,
	}
	for _, at := range r.eng.Listening() {
		switch at.Framing {
		case encap.FramingVXLAN:
			cfg.VXLANPort = at.Addr.Port()
		case encap.FramingUDP:
			cfg.UDPPort = at.Addr.Port()
		}
	}
	a, err := accel.New(cfg)
	if err != nil {
		return err
	}
	a.Hold(r.accelHolds(underlay))
	r.acc = accelerator{Accelerator: a, host: host}
	r.eng.SetBypass(a)
	return nil
}

// closeAccelerator detaches it. Its counters are in the engine's until then.
func (r *runner) closeAccelerator() {
	if r.acc.Accelerator == nil {
		return
	}
	if r.eng != nil {
		r.eng.SetBypass(nil)
	}
	if err := r.acc.Close(); err != nil {
		r.log.Warn("close accelerator", "err", err)
	}
	r.acc = accelerator{}
}

// checkAccelerator tells the accelerator what has changed on the host; waysAsked
// says that the ways to the peers are among it, and that changes of them are heard of.
func (r *runner) checkAccelerator(waysAsked bool) {
	if r.acc.waits {
		r.openAccelerator()
	}
	if r.acc.Accelerator == nil {
		return
	}
	host, underlay, err := r.acceleratorHost()
	if err != nil || host != r.acc.host {
		r.closeAccelerator()
		r.openAccelerator()
		return
	}
	r.acc.Hold(r.accelHolds(underlay))
	if waysAsked {
		r.acc.Refresh()
	}
}

// holdAccelerator looks at once, not only when changes have settled, whether the
// accelerator has to stand back, unless it did so a moment ago. Until the ways
// to the peers are asked for again, the kernel finds them.
func (r *runner) holdAccelerator() {
	if r.acc.Accelerator != nil {
		r.acc.Doubt()
	}
	if time.Since(r.acc.heldAt) >= holdInterval {
		r.lookAtHolds()
	}
}

func (r *runner) lookAtHolds() {
	if r.acc.Accelerator != nil {
		underlay, _ := r.nl.LinkByIndex(r.u.index)
		r.acc.Hold(r.accelHolds(underlay))
		r.acc.heldAt = time.Now()
	}
}

// errNoHost says that there is nothing to attach to at present.
var errNoHost = errors.New("no interface for it")

// acceleratorHost looks at the underlay interface, which it also returns.
func (r *runner) acceleratorHost() (acceleratorHost, netlink.Link, error) {
	l, err := r.nl.LinkByIndex(r.u.index)
	if err != nil {
		return acceleratorHost{}, nil, fmt.Errorf("%w: underlay %s is gone", errNoHost, r.u.name)
	}
	if kind := l.Attrs().EncapType; kind != "ether" {
		return acceleratorHost{}, nil, fmt.Errorf("%w: underlay %s is not an Ethernet interface but %s", errNoHost, r.u.name, kind)
	}
	host := acceleratorHost{underlay: r.u.index, addr: bindAddr(r.u, r.host), whole: carriesWhole(l)}
	copy(host.source[:], l.Attrs().HardwareAddr)
	return host, l, nil
}

// accelHolds lists why nothing may be carried past the workers at present. The
// underlay is as the kernel sees it now, nil if that is not known.
func (r *runner) accelHolds(underlay netlink.Link) []string {
	var holds []string
	if l, err := r.link.get(); err == nil {
		if l.Attrs().Promisc > 0 {
			holds = append(holds, fmt.Sprintf("%s is promiscuous: whoever listens there shall see every packet", r.link.name))
		}
		if l.Attrs().Flags&net.FlagUp == 0 {
			// The kernel would count what is for it among what found no room.
			holds = append(holds, fmt.Sprintf("%s is down", r.link.name))
		}
	}
	// Of what the underlay does not take a socket says so, or makes fragments; the
	// programs would not hear of it.
	if underlay != nil {
		a := underlay.Attrs()
		if isDown(a) {
			holds = append(holds, fmt.Sprintf("underlay %s is down", r.u.name))
		}
		if known := r.path.links[r.u.index]; a.MTU < known {
			holds = append(holds, fmt.Sprintf("the MTU of underlay %s went from %d to %d", r.u.name, known, a.MTU))
		}
	}
	// The programs send behind the place where the kernel encrypts.
	if policies, err := r.nl.XfrmPolicyList(netlink.FAMILY_ALL); err == nil && len(policies) > 0 {
		holds = append(holds, "the host has IPsec policies, which would not see these packets")
	}
	return holds
}

func isDown(a *netlink.LinkAttrs) bool {
	return a.Flags&net.FlagUp == 0 || a.OperState == netlink.OperDown || a.OperState == netlink.OperLowerLayerDown
}

// carriesWhole reports whether the interface passes super-packets of a tunnel
// on as they are. A veth does, unless it was told not to; a network card cuts
// them into frames without UDP checksum, which its receiver cannot merge.
func carriesWhole(l netlink.Link) bool {
	if l.Type() != "veth" {
		return false
	}
	e, err := ethtool.NewEthtool()
	if err != nil {
		return false
	}
	defer e.Close()
	f, err := e.Features(l.Attrs().Name)
	return err == nil && f["tx-tcp-segmentation"] && f["tx-udp_tnl-segmentation"]
}

// way returns the index of the interface that the accelerator's packets to addr
// leave through as those of the sockets do, 0 when there is none, and the neighbour
// they go to first.
func (c *pathCache) way(addr netip.Addr) (index int, hop netip.Addr) {
	c.get(addr)
	p := c.paths[addr]
	return p.link, p.hop
}
