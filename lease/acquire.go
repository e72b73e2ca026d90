package lease

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// maxRaces is how often a claim that somebody else won is tried again with
// another subnet.
const maxRaces = 10

// ErrPublicIPTaken says that another node holds a lease with our public IP. It is
// always wrapped in a *PublicIPTakenError.
var ErrPublicIPTaken = errors.New("public IP is taken")

// PublicIPTakenError names both nodes that claim one public IP.
type PublicIPTakenError struct {
	// Holder is the lease of the other node.
	Holder Lease
	// NodeID and NodeName are this node.
	NodeID, NodeName string
}

func (e *PublicIPTakenError) Error() string {
	return fmt.Sprintf("lease: public IP %s is already used by node %q (id %s) for subnet %s; this is node %q (id %s): "+
		"give one of them another address with --iface or --public-ip, or, if this is that node and it lost its state, start it once with --take-over",
		e.Holder.PublicIP, e.Holder.NodeName, e.Holder.NodeID, e.Holder.Subnet, e.NodeName, e.NodeID)
}

// Unwrap returns ErrPublicIPTaken.
func (e *PublicIPTakenError) Unwrap() error { return ErrPublicIPTaken }

// errRaced says that a fenced write found the key changed: look again.
var errRaced = errors.New("another node was faster")

// claimant is what the choice of a subnet depends on besides the leases.
type claimant struct {
	nodeID, nodeName string
	publicIP         netip.Addr
	previous         netip.Prefix
	takeOver         bool
}

// claim is a decision: a subnet and the key that is there already, if any.
type claim struct {
	subnet netip.Prefix
	// now is the existing key to continue, nil to create it.
	now *keyValue
	// obsolete are own keys, by node id or address, that are not used any more.
	obsolete []keyValue
}

// choose decides which subnet the node claims, by flannel's rules
// (pkg/subnet/etcd/local_manager.go) and one before them: a lease with our node
// id is ours whatever address it holds. A lease with our public IP and another
// node id is somebody else's; it stops us unless ours is the older one.
func choose(cfg NetworkConfig, list []keyValue, me claimant, pick func(n int) int) (claim, error) {
	var (
		taken    []netip.Prefix
		mine     []keyValue // by node id first, then by public IP
		byID     int        // how many of mine are ours by node id
		oldest   int64      // when the first of those was created
		strange  []keyValue // our public IP under another node id
		holder   Lease      // the first created of them
		stranger bool
	)
	for _, kv := range list {
		subnet, err := parseSubnetKey(kv.name)
		if err != nil {
			continue
		}
		// A key with a broken value is taken all the same.
		taken = append(taken, subnet)
		l, _, valueErr := kv.lease()
		switch {
		case valueErr != nil:
		case l.NodeID == me.nodeID:
			mine = slices.Insert(mine, byID, kv)
			if byID++; oldest == 0 || kv.create < oldest {
				oldest = kv.create
			}
		case l.PublicIP != me.publicIP:
		case l.NodeID == "":
			mine = append(mine, kv)
		default:
			strange = append(strange, kv)
			if !stranger || l.CreateRevision < holder.CreateRevision {
				holder, stranger = l, true
			}
		}
	}
	if stranger && !me.takeOver && (byID == 0 || holder.CreateRevision < oldest) {
		return claim{}, &PublicIPTakenError{Holder: holder, NodeID: me.nodeID, NodeName: me.nodeName}
	}
	if me.takeOver {
		mine = append(mine, strange...)
	}
	var c claim
	for _, kv := range mine {
		subnet, _ := parseSubnetKey(kv.name)
		switch {
		case c.now == nil && cfg.Compatible(subnet):
			c.subnet, c.now = subnet, &kv
		case kv.leaseID != 0:
			c.obsolete = append(c.obsolete, kv)
		}
	}
	if c.now != nil {
		return c, nil
	}
	var err error
	c.subnet, err = allocate(cfg, taken, me.previous, pick)
	return c, err
}

// Acquire claims a subnet for this node and returns the lease: the one it already
// holds, its previous subnet, or a free one. Nothing is written that another node
// holds. While etcd is unreachable it tries again for as long as ctx lasts. The
// errors to tell apart are ErrOutOfSubnets, ErrPublicIPTaken and ErrAccess.
func (m *Manager) Acquire(ctx context.Context) (Lease, error) {
	if m.cfg.NodeID == "" {
		return Lease{}, errors.New("lease: acquire: node id is empty")
	}
	if m.cfg.TTL < time.Second {
		return Lease{}, fmt.Errorf("lease: acquire: lease time %s is shorter than 1s: give a longer --lease-ttl", m.cfg.TTL)
	}
	m.mu.Lock()
	configured, cfg := m.configured, m.state.Config
	m.mu.Unlock()
	if !configured {
		var err error
		if cfg, err = m.AwaitConfig(ctx); err != nil {
			return Lease{}, err
		}
	}
	value, err := encodeAttrs(m.attrs(cfg))
	if err != nil {
		return Lease{}, err
	}
	me := claimant{
		nodeID: m.cfg.NodeID, nodeName: m.cfg.NodeName, publicIP: m.address(),
		previous: m.cfg.Previous, takeOver: m.cfg.TakeOver,
	}
	retry := m.newBackoff()
	for races := 0; ; {
		own, err := m.tryAcquire(ctx, cfg, &me, value)
		var etcd *EtcdError
		switch {
		case err == nil:
			m.trouble(&m.ownError, "", nil)
			m.change(func() {
				m.state.Own, m.state.OwnStatus, m.state.OwnProblem = own, OwnHeld, ""
				m.ownValue = value
				if m.spare == own.LeaseID {
					m.spare = 0
				}
			})
			m.dropSpare(m.reg.revoke)
			m.log.Info("lease acquired", "subnet", own.Subnet, "public_ip", own.PublicIP, "reservation", own.Reservation)
			return own, nil
		case ctx.Err() != nil:
			err = ctx.Err()
		case errors.Is(err, errRaced) && races+1 < maxRaces:
			races++
			continue
		case errors.Is(err, errRaced):
			err = fmt.Errorf("lease: acquire: lost the race for a subnet %d times; try again", maxRaces)
		case errors.As(err, &etcd) && !etcd.Access, errors.Is(err, errLeaseGone), errors.Is(err, errCompacted):
			m.trouble(&m.ownError, "waiting for etcd to acquire a lease", err)
			if err = retry.wait(ctx); err == nil {
				continue
			}
		}
		if errors.Is(err, ErrPublicIPTaken) {
			// Ends what we created before we saw the other node as well.
			m.dropSpare(m.reg.revoke)
		} else {
			m.dropSpare(m.reg.revokeUnused)
		}
		return Lease{}, err
	}
}

// attrs are the attributes of our lease under a configuration.
func (m *Manager) attrs(cfg NetworkConfig) Attrs {
	var a Attrs
	if m.cfg.Attrs != nil {
		a = m.cfg.Attrs(cfg)
	}
	a.PublicIP, a.NodeID, a.NodeName = m.address(), m.cfg.NodeID, m.cfg.NodeName
	if a.BackendType == "" {
		a.BackendType = BackendUDP
	}
	return a
}

// tryAcquire looks at all leases and makes one claim. After a write whose fate is
// not known it returns the error; the next look finds the key under our node id,
// or finds it free and claims the same subnet with the same etcd lease again, so
// that a write which is still on its way can do no harm.
func (m *Manager) tryAcquire(ctx context.Context, cfg NetworkConfig, me *claimant, value []byte) (Lease, error) {
	snap, err := m.reg.list(ctx)
	if err != nil {
		return Lease{}, err
	}
	c, err := choose(cfg, snap.leases, *me, randomPick)
	if err != nil {
		return Lease{}, err
	}
	var kv keyValue
	if c.now != nil {
		kv, err = m.adopt(ctx, *c.now, value)
	} else {
		kv, err = m.create(ctx, c.subnet, value)
		if err == nil {
			err = m.yieldToFirst(ctx, cfg, *me)
		} else if !errors.Is(err, errRaced) {
			me.previous = c.subnet
		}
	}
	if err != nil {
		return Lease{}, err
	}
	m.removeObsolete(ctx, c.obsolete)
	own, keyErr, valueErr := kv.lease()
	if err := errors.Join(keyErr, valueErr); err != nil {
		return Lease{}, fmt.Errorf("lease: acquire: %w", err)
	}
	return own, nil
}

// create claims a free subnet.
func (m *Manager) create(ctx context.Context, subnet netip.Prefix, value []byte) (keyValue, error) {
	id, err := m.spareLease(ctx)
	if err != nil {
		return keyValue{}, err
	}
	name := subnetKey(subnet)
	out, err := m.reg.put(ctx, m.reg.ifAbsent(name), name, value, id)
	if err != nil {
		return keyValue{}, err
	}
	if !out.done {
		return keyValue{}, errRaced
	}
	return keyValue{name: name, value: value, create: out.rev, mod: out.rev, leaseID: id}, nil
}

// adopt continues an existing key: its etcd lease if that can be continued, and
// its value unless it is ours to the byte. A reservation stays one.
func (m *Manager) adopt(ctx context.Context, now keyValue, value []byte) (keyValue, error) {
	id := now.leaseID
	if id != 0 {
		info, err := m.reg.leaseInfo(ctx, id)
		if err != nil {
			return keyValue{}, err
		}
		l, _, _ := now.lease()
		takenOver := l.NodeID != "" && l.NodeID != m.cfg.NodeID
		if takenOver || !info.alive || !m.grantedAsAsked(info.granted) {
			if id, err = m.spareLease(ctx); err != nil {
				return keyValue{}, err
			}
		}
	}
	if id == now.leaseID && bytes.Equal(now.value, value) {
		return now, nil
	}
	out, err := m.reg.put(ctx, m.reg.ifUnchanged(now.name, now.mod), now.name, value, id)
	if err != nil {
		return keyValue{}, err
	}
	if !out.done {
		return keyValue{}, errRaced
	}
	if id != now.leaseID {
		m.reg.revokeUnused(ctx, now.leaseID)
	}
	return keyValue{name: now.name, value: value, create: now.create, mod: out.rev, leaseID: id}, nil
}

// yieldToFirst settles two nodes with one public IP that claimed at the same
// time, when neither could see the other: looking again, the first one stays.
func (m *Manager) yieldToFirst(ctx context.Context, cfg NetworkConfig, me claimant) error {
	snap, err := m.reg.list(ctx)
	if err != nil {
		return err
	}
	_, err = choose(cfg, snap.leases, me, randomPick)
	if errors.Is(err, ErrPublicIPTaken) {
		return err
	}
	return nil
}

// removeObsolete deletes own leases that do not fit the configuration, as flannel
// does, once there is a new one. A failure only delays it to their expiry.
func (m *Manager) removeObsolete(ctx context.Context, keys []keyValue) {
	for _, kv := range keys {
		out, err := m.reg.remove(ctx, m.reg.ifUnchanged(kv.name, kv.mod), kv.name)
		if err == nil && out.done {
			m.log.Warn("own lease that does not fit the network config removed", "key", kv.name)
			m.reg.revokeUnused(ctx, kv.leaseID)
		}
	}
}

// ttl is the lease time in whole seconds, as etcd counts.
func (m *Manager) ttl() time.Duration {
	return (m.cfg.TTL + time.Second - 1).Truncate(time.Second)
}

// grantedAsAsked reports whether an etcd lease has our time to live. etcd raises
// those shorter than 1.5 election timeouts, so a short one may be longer.
func (m *Manager) grantedAsAsked(granted time.Duration) bool {
	const raised = 10 * time.Second
	return granted == m.ttl() || m.ttl() < granted && granted <= raised
}

// spareLease returns an etcd lease without a key; it is granted once and kept
// until it is used.
func (m *Manager) spareLease(ctx context.Context) (int64, error) {
	m.mu.Lock()
	id := m.spare
	m.mu.Unlock()
	if id != 0 {
		if info, err := m.reg.leaseInfo(ctx, id); err != nil || info.alive {
			return id, err
		}
	}
	id, err := m.reg.grant(ctx, m.ttl())
	if err != nil {
		return 0, err
	}
	m.mu.Lock()
	m.spare = id
	m.mu.Unlock()
	return id, nil
}

// dropSpare gives back an etcd lease that was not used. The context of the caller
// may have ended already, and it must not wait long for an etcd that is away.
// Failure is not reported: the lease ends by itself.
func (m *Manager) dropSpare(giveBack func(context.Context, int64) error) {
	m.mu.Lock()
	id := m.spare
	m.spare = 0
	m.mu.Unlock()
	if id == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	giveBack(ctx, id)
}

// Release gives the subnet back: the key is deleted if it is still ours, and the
// etcd lease revoked. A reservation stays. Call it after Run has returned.
func (m *Manager) Release(ctx context.Context) error {
	m.mu.Lock()
	own, status := m.state.Own, m.state.OwnStatus
	m.mu.Unlock()
	m.dropSpare(m.reg.revoke)
	if status == "" || own.LeaseID == 0 {
		return nil
	}
	name := subnetKey(own.Subnet)
	if _, err := m.reg.remove(ctx, m.reg.ifAttached(name, own.LeaseID), name); err != nil {
		return fmt.Errorf("lease: release %s: %w", own.Subnet, err)
	}
	if err := m.reg.revoke(ctx, own.LeaseID); err != nil {
		return fmt.Errorf("lease: release %s: %w", own.Subnet, err)
	}
	m.change(func() { m.state.OwnStatus, m.state.OwnProblem = "", "" })
	m.log.Info("lease released", "subnet", own.Subnet)
	return nil
}
