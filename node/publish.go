package node

import (
	"fmt"
	"net/netip"
	"slices"

	"tweed/encap"
	"tweed/engine/table"
	"tweed/lease"
)

// ownCached is the state of a lease read from the snapshot, beside those of
// package lease.
const ownCached = "cached"

// publish makes a new view for the API from what the runner knows.
func (r *runner) publish() {
	v := &view{
		phase: r.phase,
		node: NodeStatus{
			ID: r.id.NodeID, Name: r.hostname, PublicIP: r.u.publicIP, VtepMAC: r.id.MACText,
		},
		underlay: UnderlayStatus{Interface: r.u.name, Address: r.u.addr, MTU: r.u.mtu, Chosen: r.u.why},
		device:   r.deviceStatus(),
		etcd:     EtcdStatus{Endpoints: r.cfg.EtcdEndpoints, Prefix: r.cfg.EtcdPrefix},
		table:    r.table,
		stateDir: r.paths.stateDir,
		rules:    r.rules, saver: r.saver, mgr: r.mgr, acc: r.acc,
	}
	for _, l := range r.overlay.listen {
		v.listen = append(v.listen, ListenStatus{Framing: l.Framing, Addr: l.Addr})
	}
	var st lease.State
	if r.mgr != nil {
		st = r.mgr.State()
		v.etcd.Connected, v.etcd.LastError, v.etcd.Synced = st.Connected, st.LastError, st.Synced
		for _, i := range st.Ignored {
			v.ignored = append(v.ignored, IgnoredKey(i))
		}
	}
	v.network = r.networkStatus(st)
	v.lease = r.ownStatus(st)
	v.problems = r.problems(st)
	r.view.Store(v)
}

func (r *runner) deviceStatus() DeviceStatus {
	d := DeviceStatus{
		Name: r.name, MTU: r.overlay.mtu, Up: r.linkUp, Workers: r.cfg.Workers,
		GSOMaxSize: r.overlay.gso, Recreated: r.recreated,
	}
	if r.cfg.AttachOnly {
		return DeviceStatus{AttachOnly: true, MTU: r.overlay.mtu, GSOMaxSize: r.overlay.gso}
	}
	if r.own.Subnet.IsValid() {
		d.Address = r.own.Subnet.Addr()
	}
	if r.eng != nil {
		d.Accelerator, d.AcceleratorReason = r.acc.state()
	}
	if r.dev != nil {
		d.Offload, d.OffloadReason = r.dev.Offload().String(), r.dev.OffloadReason()
	}
	return d
}

func (r *runner) networkStatus(st lease.State) *NetworkStatus {
	cfg := r.overlay.cfg
	if !cfg.Network.IsValid() {
		return nil
	}
	n := &NetworkStatus{
		Network: cfg.Network, SubnetLen: cfg.SubnetLen, SubnetMin: cfg.SubnetMin, SubnetMax: cfg.SubnetMax,
		Backend: cfg.Backend.Type, Port: portOf(r.overlay.framing, cfg), Pending: st.PendingConfig,
	}
	if r.overlay.framing == encap.FramingVXLAN {
		n.VNI = cfg.Backend.VNI
	}
	return n
}

func (r *runner) ownStatus(st lease.State) *OwnLeaseStatus {
	if !r.own.Subnet.IsValid() {
		return nil
	}
	o := &OwnLeaseStatus{LeaseStatus: leaseStatus(r.own, sourceEtcd), State: st.OwnStatus, Problem: st.OwnProblem}
	o.Own = true
	if !r.joined {
		o.Source, o.State = sourceSnapshot, ownCached
	}
	return o
}

// problems lists what an operator should look at, the worst first.
func (r *runner) problems(st lease.State) []string {
	var out []string
	add := func(what, text string) {
		if text == "" {
			return
		}
		if what != "" {
			text = what + ": " + text
		}
		out = append(out, text)
	}
	add("data plane is down", r.dataProblem)
	add("underlay", r.underlayProblem)
	add("own lease", st.OwnProblem)
	add("device", r.linkProblem)
	add("cannot join", r.joinProblem)
	if r.phase == PhaseCached {
		add("", "forwarding from the snapshot saved "+r.cached.saved.Format("2006-01-02 15:04:05 MST")+"; etcd has not confirmed it")
	}
	if !st.Connected {
		add("", st.LastError) // says etcd itself
	}
	if r.table != nil && r.table.held > 0 {
		add("", fmt.Sprintf("leases deleted from etcd and still used for a moment, unless claimed by others: %d (see: tweed peers)", r.table.held))
	}
	add("network config", st.PendingConfig)
	add("", r.fileProblem)
	add("", r.holeProblem)
	for _, n := range r.overlay.cfg.Notes() {
		add("network config", n)
	}
	return out
}

func leaseStatus(l lease.Lease, source string) LeaseStatus {
	s := LeaseStatus{
		Subnet: l.Subnet, PublicIP: l.PublicIP, BackendType: l.BackendType,
		NodeID: l.NodeID, NodeName: l.NodeName,
		Reservation: l.Reservation, ModRevision: l.ModRevision, Source: source,
	}
	if !l.HeldUntil.IsZero() {
		s.Source = sourceHeld
	}
	if len(l.VtepMAC) > 0 {
		s.VNI, s.VtepMAC = l.VNI, l.VtepMAC.String()
	}
	return s
}

// newTableView makes the part of the view that grows with the overlay.
func (r *runner) newTableView(peers []table.Peer, skipped []SkippedLease) *tableView {
	t := &tableView{
		peers:    make([]PeerStatus, 0, len(peers)),
		bySubnet: make(map[netip.Prefix]int, len(peers)),
		leases:   make([]LeaseStatus, 0, len(r.peers)),
		skipped:  skipped,
	}
	bySubnet := make(map[netip.Prefix]*lease.Lease, len(r.peers))
	for i, l := range r.peers {
		bySubnet[l.Subnet] = &r.peers[i]
		t.leases = append(t.leases, leaseStatus(l, r.source))
	}
	slices.SortFunc(t.leases, func(a, b LeaseStatus) int { return comparePrefix(a.Subnet, b.Subnet) })
	for i, p := range peers {
		l := bySubnet[p.Subnet]
		s := PeerStatus{
			Subnet: p.Subnet, Endpoint: p.Endpoint, Framing: p.Framing,
			NodeID: p.NodeID, NodeName: l.NodeName, MTU: p.MTU, Source: r.source,
		}
		if !l.HeldUntil.IsZero() {
			s.Source, s.HeldUntil = sourceHeld, l.HeldUntil
			t.held++
		}
		if s.MTU == 0 {
			s.MTU = r.overlay.mtu
		}
		if p.Framing == encap.FramingVXLAN {
			s.VNI, s.VtepMAC = p.VNI, macText(p.MAC)
		}
		t.peers = append(t.peers, s)
		t.bySubnet[p.Subnet] = i
	}
	return t
}
