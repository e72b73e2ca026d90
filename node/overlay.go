package node

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"tweed/encap"
	"tweed/engine"
	"tweed/engine/table"
	"tweed/lease"
	"tweed/tun"
)

// overlay is what follows from the network config on this node.
type overlay struct {
	cfg     lease.NetworkConfig
	framing encap.Framing
	listen  []engine.Listen
	mtu     int // bytes, of the TUN device
	gso     int // bytes, largest super-packet the host hands us
}

// sameData reports whether one engine can serve both: its sockets and MTU are
// fixed for its lifetime.
func (o *overlay) sameData(p *overlay) bool {
	return o.mtu == p.mtu && slices.Equal(o.listen, p.listen)
}

// design derives the overlay from a network config and says what is in the way
// of it on this host, before anything is claimed.
func (r *runner) design(cfg lease.NetworkConfig) (overlay, error) {
	o := overlay{cfg: cfg}
	var err error
	if o.framing, err = framingOf(cfg); err != nil {
		return o, err
	}
	if o.listen, err = listenFor(cfg, r.cfg.ListenFramings, bindAddr(r.u, r.host)); err != nil {
		return o, err
	}
	if o.mtu, err = overlayMTU(r.mtu, o.framing, cfg.Backend.MTU, r.u); err != nil {
		return o, err
	}
	o.gso = 65536
	for f := encap.Framing(0); f < encap.NumFramings; f++ {
		// Peers of either framing are sent super-packets of one size.
		o.gso = min(o.gso, f.GSOMaxSize(o.mtu))
	}
	if r.offload() == tun.OffloadNone {
		o.gso = 0
	}
	if err := checkRules(r.ruleSet(cfg, netip.Prefix{})); err != nil {
		return o, err
	}
	if r.cfg.AttachOnly {
		return o, nil
	}
	routes, err := mainRoutes(r.nl)
	if err != nil {
		return o, err
	}
	return o, routeConflict(r.nl, routes, cfg.Network, r.link.index)
}

// plan prepares for a config from etcd: with no engine yet it opens the
// sockets, so that a port in use is found before a lease is claimed.
func (r *runner) plan(cfg lease.NetworkConfig) error {
	o, err := r.design(cfg)
	if err != nil {
		return err
	}
	if r.eng != nil {
		// Forwarding from the snapshot: what has to change does so in join.
		r.next = o
		return nil
	}
	r.next = o
	return r.openEngine(o)
}

// openDevice makes the TUN device, still down.
func (r *runner) openDevice() error {
	if r.cfg.AttachOnly {
		r.path = newPathCache(r.nl, 0, bindAddr(r.u, r.host))
		return nil
	}
	mtu := r.overlay.mtu
	if mtu == 0 {
		mtu = max(encap.FramingUDP.DefaultMTU(r.u.mtu), encap.MinMTU) // until the config is known
	}
	dev, err := tun.Open(tun.Config{Name: r.name, MTU: mtu, Queues: r.cfg.Workers, Offload: r.cfg.Offload})
	if err != nil {
		return err
	}
	link, err := newOverlayLink(r.nl, dev.Name())
	if err != nil {
		dev.Close()
		return err
	}
	r.dev, r.link, r.events = dev, link, dev.Events()
	r.path = newPathCache(r.nl, link.index, bindAddr(r.u, r.host))
	return nil
}

// openEngine opens the sockets of o on the open device; nothing runs yet.
func (r *runner) openEngine(o overlay) error {
	for _, l := range o.listen {
		port := l.Addr.Port()
		if err := r.lock("udp/"+l.Addr.String(), fmt.Sprintf("UDP port %d of %s", port, l.Addr.Addr())); err != nil {
			return err
		}
	}
	// The engine reckons with the device's MTU, so it has to be true.
	if r.link != nil {
		if err := r.link.setMTU(o.mtu); err != nil {
			return err
		}
	}
	eng, err := engine.New(engine.Config{
		Device: r.dev, Offload: r.cfg.Offload, Impair: r.cfg.Impair, MTU: o.mtu, Listen: o.listen, Source: bindAddr(r.u, r.host), Log: r.log,
	})
	if err != nil {
		return err
	}
	r.eng, r.overlay, r.started, r.applied = eng, o, false, nil
	r.data.replace(eng)
	r.captures.hub.SetSource(eng)
	r.openAccelerator()
	return nil
}

// closeData takes the data plane down; the TUN device, its address and its
// routes go with it.
func (r *runner) closeData() {
	r.closeEngine()
	if r.dev != nil {
		if err := r.dev.Close(); err != nil && !errors.Is(err, errLinkGone) {
			r.log.Debug("close device", "device", r.name, "err", err)
		}
	}
	r.dev, r.events, r.linkUp = nil, nil, false
}

// closeEngine stops forwarding; the device stays as it is.
func (r *runner) closeEngine() {
	if r.att != nil {
		r.att.forget()
	}
	r.captures.hub.SetSource(nil)
	r.closeAccelerator()
	if eng := r.data.replace(nil); eng != nil {
		if err := eng.Close(); err != nil {
			r.log.Warn("close engine", "err", err)
		}
	}
	r.eng, r.started, r.applied = nil, false, nil
}

// forward brings the data plane to what own, peers and overlay say. It can be
// repeated at any time.
func (r *runner) forward() error {
	if err := r.applyTable(); err != nil {
		return err
	}
	if !r.started {
		if err := r.eng.Start(); err != nil {
			return err
		}
		r.started = true
	}
	r.att.follow(r.plane())
	if r.link == nil {
		return nil
	}
	changed, err := r.link.ensure(r.linkWant())
	if err != nil {
		return err
	}
	r.linkUp = true
	if len(changed) > 0 {
		r.lookAtHolds() // it waits for the device to be up
		r.log.Info("device configured", "device", r.name, "changed", strings.Join(changed, ", "))
	}
	return nil
}

func (r *runner) linkWant() linkWant {
	return linkWant{
		addr:    r.own.Subnet.Addr(),
		network: r.overlay.cfg.Network,
		mtu:     r.overlay.mtu,
		gso:     r.overlay.gso,
	}
}

// applyTable hands the leases to the engine, if they make a difference.
func (r *runner) applyTable() error {
	c := converter{
		cfg: r.overlay.cfg, publicIP: r.u.publicIP, own: r.own.Subnet,
		mtu: r.overlay.mtu, path: r.path.get,
	}
	peers, skipped := c.convert(r.peers)
	snap := engine.Snapshot{
		Revision: r.revision,
		Local: table.Local{
			Subnet: r.own.Subnet, Addr: r.own.Subnet.Addr(), VNI: localVNI(r.overlay.cfg),
		},
		Peers: peers,
	}
	copy(snap.Local.MAC[:], r.id.MAC)
	if r.applied == nil || r.applied.Local != snap.Local || !slices.Equal(r.applied.Peers, snap.Peers) {
		if err := r.eng.Apply(snap); err != nil {
			return err
		}
		r.applied = &snap
	}
	r.table = r.newTableView(peers, skipped)
	return nil
}

// rebuild makes device and engine again, after the device was deleted or a
// worker stopped, or when a config needs other sockets.
func (r *runner) rebuild() {
	o := r.overlay
	if r.next.mtu != 0 {
		o = r.next
	}
	r.rebuiltAt = time.Now()
	r.closeData()
	err := r.openDevice()
	if err == nil {
		err = r.openEngine(o)
	}
	if err == nil && r.own.Subnet.IsValid() {
		err = r.forward()
	}
	if err != nil {
		r.note(&r.dataProblem, "data plane is down, trying again", err)
		return
	}
	r.recreated++
	r.note(&r.dataProblem, "", nil)
	r.log.Info("data plane is up again", "device", r.name)
}

// note records a problem, or that it is over, and logs a new one once.
func (r *runner) note(place *string, event string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text == *place {
		return
	}
	*place = text
	if text != "" {
		r.log.Warn(event, "err", text)
	}
}
