package node

import (
	"net/netip"
	"os"
	"slices"

	"tweed/engine"
	"tweed/lease"
)

// view is what the API reads: an immutable picture that the goroutine of Run
// replaces whenever something changed. What changes without that goroutine is read
// live beside it: counters, etcd's revision, the state of the accelerator.
type view struct {
	phase    Phase
	node     NodeStatus
	underlay UnderlayStatus
	network  *NetworkStatus
	device   DeviceStatus
	listen   []ListenStatus
	lease    *OwnLeaseStatus
	etcd     EtcdStatus
	ignored  []IgnoredKey
	problems []string
	table    *tableView
	stateDir string

	rules *rulesKeeper
	saver *saver
	mgr   *lease.Manager // nil before prepare has made it
	acc   accelerator
}

// tableView is the part of a view that grows with the overlay; it is shared by
// successive views while the leases stay the same.
type tableView struct {
	peers    []PeerStatus // in subnet order
	bySubnet map[netip.Prefix]int
	leases   []LeaseStatus
	skipped  []SkippedLease
	held     int // peers whose lease is gone from etcd
}

func (t *tableView) peer(subnet netip.Prefix) (PeerStatus, bool) {
	if t == nil {
		return PeerStatus{}, false
	}
	i, ok := t.bySubnet[subnet]
	if !ok {
		return PeerStatus{}, false
	}
	return t.peers[i], true
}

// status assembles the whole answer of /v1/status.
func (n *Node) status() Status {
	v := n.view.Load()
	s := Status{
		Schema: Schema, Program: n.cfg.Program, Version: n.cfg.Version,
		PID: os.Getpid(), Started: n.started.UTC(),
		Phase: v.phase, Ready: n.readyz.Load(), EndsWhenIdle: n.cfg.EndsWhenIdle,
		Node: v.node, Underlay: v.underlay, Network: v.network, Device: v.device,
		Listen: emptyNotNil(v.listen), Lease: v.lease, Etcd: v.etcd,
		Peers: map[string]int{}, Skipped: []SkippedLease{},
		Ignored:    emptyNotNil(v.ignored),
		SubnetFile: n.cfg.SubnetFile, StateDir: v.stateDir,
		Problems: slices.Clone(emptyNotNil(v.problems)),
		Rules:    RulesStatus{Mode: "none"},
	}
	if len(v.listen) > 0 {
		s.Framing = v.listen[0].Framing
	}
	if v.table != nil {
		s.Skipped = emptyNotNil(v.table.skipped)
		for _, p := range v.table.peers {
			s.Peers[p.Framing.String()]++
		}
	}
	st := n.data.stats()
	s.Ledger = ledgerOf(st)
	if st.Workers > 0 {
		s.Device.Workers = st.Workers
		s.Device.Offload, s.Device.OffloadReason = st.Offload.String(), st.OffloadReason
		s.Device.SendSegmented, s.Device.ReceiveMerged = st.SendSegmented, st.ReceiveMerged
	}
	if v.mgr != nil {
		st := v.mgr.State()
		s.Etcd.Revision, s.Counters = st.Revision, LeaseCounters(st.Counters)
	}
	if s.Device.Accelerator != "" {
		s.Device.Accelerator, s.Device.AcceleratorReason = v.acc.state()
	}
	if v.rules != nil {
		s.Rules = v.rules.current()
		if s.Rules.Problem != "" {
			s.Problems = append(s.Problems, "traffic rules: "+s.Rules.Problem)
		}
	}
	var problems []string
	s.Attachments, problems = n.attached.Load().snapshot()
	s.Problems = append(s.Problems, problems...)
	if v.saver != nil {
		if err := v.saver.lastError(); err != nil {
			s.StateError = err.Error()
			s.Problems = append(s.Problems, "snapshot not saved: "+s.StateError)
		}
	}
	return s
}

func emptyNotNil[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func ledgerOf(st engine.Stats) Ledger {
	l := Ledger{
		Tx: directionOf(&st.Tx), Rx: directionOf(&st.Rx),
		ICMPSent: st.ICMPSent, ICMPLimited: st.ICMPLimited,
		SocketDropped: st.SocketDropped,
	}
	l.Tx.Accelerated, l.Tx.AcceleratedBytes = st.BypassTx.Packets, st.BypassTx.Bytes
	l.Rx.Accelerated, l.Rx.AcceleratedBytes = st.BypassRx.Packets, st.BypassRx.Bytes
	return l
}

func directionOf(d *engine.Direction) DirectionLedger {
	l := DirectionLedger{
		Packets: d.Packets, Bytes: d.Bytes,
		Delivered: d.Delivered, DeliveredBytes: d.DeliveredBytes,
		Dropped: d.Dropped(), Drops: map[string]uint64{},
	}
	for r, v := range d.Drops {
		if v > 0 {
			l.Drops[engine.Reason(r).String()] = v
		}
	}
	return l
}

// routes lists the overlay's routing table, our own subnet first.
func (v *view) routes() []RouteStatus {
	out := []RouteStatus{}
	if v.lease != nil {
		out = append(out, RouteStatus{Dst: v.lease.Subnet, Via: "local", NodeName: v.node.Name, MTU: v.device.MTU})
		if len(v.listen) > 0 {
			out[0].Framing = v.listen[0].Framing
		}
	}
	if v.table == nil {
		return out
	}
	for _, p := range v.table.peers {
		out = append(out, RouteStatus{Dst: p.Subnet, Via: p.Endpoint.String(), Framing: p.Framing, NodeName: p.NodeName, MTU: p.MTU})
	}
	return out
}

// route explains what happens to a packet from this host to dst.
func (n *Node) route(dst netip.Addr) RouteAnswer {
	v := n.view.Load()
	a := RouteAnswer{Schema: Schema, Dst: dst, Result: "drop"}
	if !dst.Is4() {
		a.Reason = engine.TxNotIPv4.String()
		a.Explain = "the overlay carries IPv4 only"
		return a
	}
	if v.lease != nil && v.lease.Subnet.Contains(dst) {
		a.Result = "local"
		a.Explain = "it is in our own subnet " + v.lease.Subnet.String() + "; this host delivers it without the overlay"
		return a
	}
	if p, ok := n.data.lookup(dst); ok {
		a.Result = "peer"
		ps, known := v.table.peer(p.Subnet)
		if !known {
			ps = PeerStatus{Subnet: p.Subnet, Endpoint: p.Endpoint, Framing: p.Framing, NodeID: p.NodeID, MTU: v.device.MTU}
		}
		a.Peer = &ps
		a.Explain = explainPeer(ps)
		return a
	}
	if v.network == nil || !v.network.Network.Contains(dst) {
		a.Result = "outside"
		a.Explain = "it is outside the overlay's network; the host's own routing table decides"
		if v.network != nil {
			a.Explain = "it is outside the overlay's network " + v.network.Network.String() + "; the host's own routing table decides"
		}
		return a
	}
	a.Reason = engine.TxNoRoute.String()
	a.Explain = engine.TxNoRoute.Doc() + ": the sender gets an ICMP network unreachable"
	if v.table != nil {
		for _, s := range v.table.skipped {
			if s.Subnet.Contains(dst) {
				a.Explain = "the lease " + s.Subnet.String() + " covers it but cannot be used: " + s.Why
			}
		}
	}
	return a
}

func explainPeer(p PeerStatus) string {
	who := p.NodeName
	if who == "" {
		who = "the node at " + p.Endpoint.Addr().String()
	}
	return "sent to " + who + " in " + p.Framing.String() + " framing, to " + p.Endpoint.String() + ", subnet " + p.Subnet.String()
}
