package node

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"time"

	"tweed/lease"
)

// refused reports that etcd's content, not its absence, is against this node:
// then a snapshot is no reason to go on.
func refused(err error) bool {
	return errors.Is(err, lease.ErrPublicIPTaken) || errors.Is(err, lease.ErrOutOfSubnets)
}

// configResult and leaseResult are what the goroutines that talk to etcd
// during the start hand to the loop.
type configResult struct {
	cfg lease.NetworkConfig
	err error
}

type leaseResult struct {
	lease lease.Lease
	err   error
}

// startup is the part of the loop's state that the way to the lease needs.
type startup struct {
	configs chan configResult
	leases  chan leaseResult
	// useCache fires when etcd was waited for long enough, rejoin when the next
	// attempt to join is due; nil when there is nothing to wait for.
	useCache, rejoin <-chan time.Time
}

func (r *runner) awaitConfig() {
	r.etcdTasks.Go(func() {
		cfg, err := r.mgr.AwaitConfig(r.etcd)
		r.begin.configs <- configResult{cfg, err}
	})
}

func (r *runner) acquire() {
	// From here on etcd may hold our node id, known to us or not.
	r.claiming = true
	r.etcdTasks.Go(func() {
		l, err := r.mgr.Acquire(r.etcd)
		r.begin.leases <- leaseResult{l, err}
	})
}

// configured goes on with the network config, or with the reason there is none.
func (r *runner) configured(c configResult) error {
	err := c.err
	if err == nil {
		err = r.plan(c.cfg)
	}
	if err != nil {
		return r.late(err)
	}
	r.acquire()
	return nil
}

// leased goes on with the lease, or with the reason there is none.
func (r *runner) leased(l leaseResult) error {
	r.claiming = false
	if l.err != nil {
		return r.late(l.err)
	}
	r.begin.useCache = nil
	return r.join(l.lease)
}

// late decides what an error of the start means: with a snapshot to forward
// from it is reported and tried again, without one it ends the start.
func (r *runner) late(err error) error {
	if r.cached == nil || refused(err) {
		return err
	}
	if r.begin.useCache != nil {
		r.begin.useCache = nil
		if err := r.startCached(); err != nil {
			return err
		}
	}
	r.noteJoinProblem(err)
	r.begin.rejoin = time.After(joinRetry/2 + rand.N(joinRetry))
	return nil
}

// attrs is what our lease says beside address and identity.
func (r *runner) attrs(cfg lease.NetworkConfig) lease.Attrs {
	a := lease.Attrs{BackendType: cfg.Backend.Type, PartialChecksums: true}
	if cfg.Backend.Type == lease.BackendVXLAN {
		a.VNI, a.VtepMAC = cfg.Backend.VNI, r.id.MAC
	}
	return a
}

// previousSubnet is the subnet this node had before: from its own snapshot,
// else from subnet.env, as flannel has it.
func (r *runner) previousSubnet() netip.Prefix {
	if r.cached != nil {
		return r.cached.own.Subnet
	}
	if r.cfg.SubnetFile == "" {
		return netip.Prefix{}
	}
	f, err := lease.ReadSubnetFile(r.cfg.SubnetFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		r.log.Warn("subnet file not readable; the node may get another subnet", "err", err)
	}
	return f.Subnet
}

// startCached forwards from the last good snapshot while etcd is not heard.
func (r *runner) startCached() error {
	c := r.cached
	if r.eng == nil {
		o, err := r.design(c.config)
		if err != nil {
			return err
		}
		if err := r.openEngine(o); err != nil {
			return err
		}
	}
	r.own, r.peers, r.source, r.revision = c.own, c.peers, sourceSnapshot, c.revision
	if err := r.forward(); err != nil {
		return err
	}
	r.setPhase(PhaseCached)
	r.log.Warn("forwarding from the last good snapshot until etcd confirms the lease",
		"subnet", r.own.Subnet, "peers", len(r.peers), "saved", c.saved)
	r.announce()
	return nil
}

const (
	sourceEtcd     = "etcd"
	sourceSnapshot = "snapshot"
	sourceHeld     = "held"
)

// join puts a lease just acquired in force and starts to follow the others.
func (r *runner) join(own lease.Lease) error {
	if r.own.Subnet.IsValid() && r.own.Subnet != own.Subnet {
		r.log.Warn("subnet changed: it belongs to another node now", "old", r.own.Subnet, "new", own.Subnet)
	}
	wasForwarding := r.started
	r.own = own
	if r.peers == nil && r.cached != nil {
		// Until the list is complete the last good peers are better than none.
		r.peers, r.source = r.cached.peers, sourceSnapshot
	}
	if !r.overlay.sameData(&r.next) {
		r.rebuild()
	}
	r.overlay = r.next
	if r.dataProblem == "" {
		if err := r.forward(); err != nil {
			if !wasForwarding {
				r.giveBack()
				return err
			}
			r.note(&r.linkProblem, "device not configured, trying again", err)
		}
	}
	r.joined, r.keep = true, true
	r.note(&r.joinProblem, "", nil)
	r.setPhase(PhaseRunning)
	r.etcdTasks.Go(func() {
		if err := r.mgr.Run(r.etcd); err != nil {
			r.log.Error("lease manager ended", "err", err)
		}
	})
	r.announce()
	r.follow()
	return nil
}

// giveBack releases a lease that this start made and cannot use. One that was
// there before stays, as it would after any other stop.
func (r *runner) giveBack() {
	if r.own.CreateRevision != r.own.ModRevision || r.cached != nil {
		r.keep = true
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	if err := r.mgr.Release(ctx); err != nil {
		r.keep = true // or the next start would not know its own lease
		r.log.Warn("lease not released", "subnet", r.own.Subnet, "err", err)
	}
}

// follow takes over the control plane's newest state.
func (r *runner) follow() {
	if !r.joined {
		return
	}
	st := r.mgr.State()
	grown := st.Config.Network.IsValid() && st.Config != r.overlay.cfg
	if grown {
		r.log.Info("network config changed", "from", r.overlay.cfg.String(), "to", st.Config.String())
		r.overlay.cfg = st.Config
		r.next = r.overlay
	}
	moved := st.Own.Subnet.IsValid() && st.Own.Subnet != r.own.Subnet
	if st.Own.Subnet.IsValid() {
		r.own = st.Own
	}
	if st.Synced {
		r.peers, r.source, r.revision = st.Peers, sourceEtcd, st.Revision
	}
	if r.dataProblem == "" {
		bring := r.applyTable
		if grown || moved {
			bring = r.forward
		}
		r.note(&r.linkProblem, "device or table not up to date, trying again", bring())
	}
	r.announce()
	if st.Synced {
		r.saver.save(r.savedTable())
	}
}

func (r *runner) savedTable() savedTable {
	cfg, err := r.overlay.cfg.Marshal()
	if err != nil {
		cfg = nil // cannot happen for a config in force; the file would be refused when read
	}
	t := savedTable{
		EtcdPrefix: r.cfg.EtcdPrefix, Revision: r.revision,
		NodeID: r.id.NodeID, VtepMAC: r.id.MACText,
		Config: cfg, Own: saveLease(r.own),
	}
	for _, p := range r.peers {
		t.Peers = append(t.Peers, saveLease(p))
	}
	return t
}

func (r *runner) ruleSet(cfg lease.NetworkConfig, subnet netip.Prefix) ruleSet {
	return ruleSet{
		network: cfg.Network, subnet: subnet,
		masq: r.cfg.IPMasq, forward: r.cfg.IPTablesForward,
		randomFully: r.cfg.IPMasqRandomFully, nft: cfg.EnableNFTables,
	}
}

// announce tells the host about the subnet in force: traffic rules, subnet
// file, readiness, in flannel's order. Each is touched only when it changes.
func (r *runner) announce() {
	if set := r.ruleSet(r.overlay.cfg, r.own.Subnet); set != r.rulesSet {
		// Errors are logged and shown by the keeper, which goes on trying.
		applied := r.rules.set(set)
		if r.rulesSet == (ruleSet{}) {
			select {
			case <-applied:
			case <-time.After(firstRules):
				r.log.Warn("traffic rules are not in force yet: another program holds the lock of iptables, or it hangs", "waited", firstRules)
			}
		}
		r.rulesSet = set
		if set.mode() == "iptables" && !bridgeFiltered() {
			r.log.Info("bridged packets do not pass iptables: load br_netfilter if containers of one host use a bridge", "missing", bridgeCall)
		}
	}
	if r.cfg.BlackholeRoute && r.blackholed != r.own.Subnet {
		r.setBlackhole()
	}
	want := lease.SubnetFile{Network: r.overlay.cfg.Network, Subnet: r.own.Subnet, MTU: r.overlay.mtu, IPMasq: r.cfg.IPMasq}
	if r.cfg.SubnetFile != "" && want != r.file {
		err := lease.WriteSubnetFile(r.cfg.SubnetFile, want)
		if err == nil {
			r.file = want
			r.log.Info("subnet file written", "file", r.cfg.SubnetFile, "network", want.Network, "subnet", want.Subnet, "mtu", want.MTU)
		}
		r.note(&r.fileProblem, "subnet file not written; containers cannot be given addresses", err)
	}
	// Who waits for readiness reads the rest of the status next.
	r.publish()
	r.readyz.Store(r.fileProblem == "")
	r.readyOnce.Do(func() {
		r.logUnderlay()
		close(r.ready)
		sdNotify("READY=1")
		r.log.Info("forwarding", "device", r.name, "subnet", r.own.Subnet, "network", r.overlay.cfg.Network,
			"framing", r.overlay.framing, "mtu", r.overlay.mtu, "node_id", r.id.NodeID)
	})
}

// setBlackhole keeps the blackhole route of the subnet in force. A route that is
// there already is left alone: every change of one makes reconcile run again.
func (r *runner) setBlackhole() {
	var gone error
	if r.blackholed.IsValid() && r.blackholed != r.own.Subnet {
		gone = blackhole(r.nl, r.blackholed, false)
	}
	err := blackhole(r.nl, r.own.Subnet, true)
	if err == nil {
		r.blackholed = r.own.Subnet
	}
	r.note(&r.holeProblem, "blackhole route", errors.Join(gone, err))
}

// stop is the clean way out: what was learnt is saved, the lease stays unless
// it shall be released, device and routes go.
func (r *runner) stop() error {
	r.setPhase(PhaseStopping)
	sdNotify("STOPPING=1")
	r.readyz.Store(false)
	r.publish()
	r.log.Info("stopping", "release", r.cfg.ReleaseOnExit)
	if r.blackholed.IsValid() {
		if err := blackhole(r.nl, r.blackholed, false); err != nil {
			r.log.Warn("blackhole route stays", "err", err)
		}
	}
	if !r.joined {
		r.keep = r.cached != nil || r.claiming
		return nil
	}
	if r.cfg.ReleaseOnExit {
		r.release()
	}
	return nil
}

// release gives the lease back and forgets the snapshot that stands on it.
func (r *runner) release() {
	r.endEtcd()
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	if err := r.mgr.Release(ctx); err != nil {
		r.log.Warn("lease not released; it expires by itself", "subnet", r.own.Subnet, "ttl", r.cfg.LeaseTTL, "err", err)
		return
	}
	r.saver.drop()
	if err := removeSnapshot(r.paths.stateDir); err != nil {
		r.log.Warn("snapshot stays", "dir", r.paths.stateDir, "err", err)
	}
}

func (r *runner) noteJoinProblem(err error) {
	r.note(&r.joinProblem, "cannot join; forwarding goes on from the last good snapshot", err)
}

// cutPattern splits a TUN name like flannel%d.
func cutPattern(name string) (base string, pattern bool) { return strings.CutSuffix(name, "%d") }
