package lease

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// adoptPause is the shortest time between two times that a value without a node
// id, as flannel writes, is replaced by ours on our own key. A flannel daemon
// that runs beside us would otherwise be fought at full speed.
const adoptPause = time.Minute

// keep renews the own lease and repairs it until ctx ends. It is the only one
// that changes the own lease after Acquire.
func (m *Manager) keep(ctx context.Context) {
	retry := m.newBackoff()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-m.kick:
		}
		err := m.tend(ctx)
		if ctx.Err() != nil {
			return
		}
		switch {
		case errors.Is(err, errRaced), errors.Is(err, errLeaseGone):
			timer.Reset(retry.take()) // the next look tells what happened
		case err != nil:
			m.trouble(&m.ownError, "own lease not renewed", err)
			m.count(func(c *Counters) { c.KeepAliveErrors++ })
			timer.Reset(retry.take())
		case m.mustMove():
			timer.Reset(0) // what was repaired still names the old address
		default:
			m.trouble(&m.ownError, "", nil)
			retry.reset()
			timer.Reset(m.renewEvery())
		}
	}
}

// renewEvery is the time to the next look at the own lease: early enough for two
// misses within the TTL, and jittered so that nodes spread out.
func (m *Manager) renewEvery() time.Duration {
	every := min(m.ttl()/3, m.timing.renewMax)
	return every - rand.N(every/10+1)
}

// tend looks at the own key once and does what it needs. An error means that
// nothing is known, so that nothing changed.
func (m *Manager) tend(ctx context.Context) error {
	m.mu.Lock()
	own, value, next := m.state.Own, m.ownValue, m.nextValue
	m.mu.Unlock()

	now, err := m.reg.get(ctx, subnetKey(own.Subnet))
	if now != nil && next != nil && now.leaseID == own.LeaseID && bytes.Equal(now.value, next) {
		own, value = m.moved(own, *now), next
	}
	switch {
	case err != nil:
		return err
	case now == nil:
		return m.retake(ctx, own, value)
	case now.leaseID == own.LeaseID && bytes.Equal(now.value, value):
		if m.address() != own.PublicIP {
			return m.move(ctx, own, *now)
		}
		return m.renew(ctx, own, *now)
	}
	return m.changed(ctx, own, value, *now)
}

// renew keeps the etcd lease of a key that is ours.
func (m *Manager) renew(ctx context.Context, own Lease, now keyValue) error {
	if own.LeaseID != 0 {
		err := m.reg.keepAlive(ctx, own.LeaseID)
		if errors.Is(err, errLeaseGone) {
			// etcd deletes the key together with the lease; the next look finds it gone.
			m.setOwn(own, OwnReacquiring, "its etcd lease ended; claiming the subnet again")
		}
		if err != nil {
			return err
		}
	}
	own.CreateRevision, own.ModRevision = now.create, now.mod
	m.setOwn(own, OwnHeld, "")
	return nil
}

// retake claims the own subnet again after its key disappeared: the same subnet,
// and the same etcd lease if that is still there. If somebody else is faster,
// the next look finds out who.
func (m *Manager) retake(ctx context.Context, own Lease, value []byte) error {
	m.setOwn(own, OwnReacquiring, fmt.Sprintf("the key of %s was deleted or expired; claiming it again, forwarding goes on", own.Subnet))
	id := own.LeaseID
	if id != 0 {
		info, err := m.reg.leaseInfo(ctx, id)
		if err != nil {
			return err
		}
		if !info.alive {
			id = 0
		}
	}
	if id == 0 {
		var err error
		if id, err = m.spareLease(ctx); err != nil {
			return err
		}
	}
	// From here on a write whose fate is not known is recognized as ours.
	own.LeaseID, own.Reservation = id, false
	m.mu.Lock()
	m.state.Own.LeaseID, m.state.Own.Reservation = id, false
	m.built = nil
	m.mu.Unlock()

	name := subnetKey(own.Subnet)
	out, err := m.reg.put(ctx, m.reg.ifAbsent(name), name, value, id)
	if err != nil {
		return err
	}
	if !out.done {
		return errRaced
	}
	m.count(func(c *Counters) { c.LeaseRetaken++ })
	own.CreateRevision, own.ModRevision = out.rev, out.rev
	m.setOwn(own, OwnHeld, "")
	return nil
}

// changed decides about an own key that is not as we wrote it. A reservation with
// our node id, or with our address and no node id, is continued as one; so is a
// value with our address and no node id that is attached to an etcd lease, as
// flannel writes. Anything else is somebody else's and left alone, even under our
// node id: we never write the same key twice with different content, so that was
// another engine.
func (m *Manager) changed(ctx context.Context, own Lease, value []byte, now keyValue) error {
	l, _, valueErr := now.lease()
	nameless := valueErr == nil && l.NodeID == "" && l.PublicIP == m.address()
	reserved := now.leaseID == 0 && (nameless || valueErr == nil && l.NodeID == m.cfg.NodeID)
	same := bytes.Equal(now.value, value)
	if !reserved && !nameless || !same && !m.mayAdopt() {
		return m.lose(ctx, own, now)
	}
	if now.leaseID != 0 {
		info, err := m.reg.leaseInfo(ctx, now.leaseID)
		if err != nil {
			return err
		}
		if !info.alive {
			return errRaced
		}
	}
	mod := now.mod
	if !same {
		out, err := m.reg.put(ctx, m.reg.ifUnchanged(now.name, now.mod), now.name, value, now.leaseID)
		if err != nil {
			return err
		}
		if !out.done {
			return errRaced
		}
		m.mu.Lock()
		m.adoptedAt = time.Now()
		m.mu.Unlock()
		mod = out.rev
	}
	old := own.LeaseID
	own.LeaseID, own.Reservation = now.leaseID, now.leaseID == 0
	own.CreateRevision, own.ModRevision = now.create, mod
	m.setOwn(own, OwnHeld, "")
	if old != 0 && old != own.LeaseID {
		return m.reg.revokeUnused(ctx, old)
	}
	return nil
}

// mayAdopt limits how often a foreign value on our key is replaced.
func (m *Manager) mayAdopt() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.adoptedAt.IsZero() || time.Since(m.adoptedAt) >= adoptPause
}

// lose records that somebody else holds the own subnet. Nothing is written; the
// key is taken back when it becomes free.
func (m *Manager) lose(ctx context.Context, own Lease, now keyValue) error {
	m.setOwn(own, OwnLost, lossProblem(own, m.cfg.NodeID, now))
	if own.LeaseID == 0 || own.LeaseID == now.leaseID {
		return nil
	}
	// Our etcd lease has no key any more.
	if err := m.reg.revokeUnused(ctx, own.LeaseID); err != nil {
		return err
	}
	own.LeaseID = 0
	m.setOwn(own, OwnLost, lossProblem(own, m.cfg.NodeID, now))
	return nil
}

// lossProblem says who holds our subnet and what the operator can do.
func lossProblem(own Lease, nodeID string, now keyValue) string {
	const advice = "this node does not overwrite it, keeps delivering what still arrives, and takes the subnet back when it becomes free; "
	l, _, valueErr := now.lease()
	switch {
	case valueErr != nil:
		return fmt.Sprintf("the key of %s was overwritten at revision %d with a value that is not a lease (%v): %s"+
			"delete the key to give it back", own.Subnet, now.mod, valueErr, advice)
	case l.NodeID == nodeID:
		return fmt.Sprintf("the lease of %s was written at revision %d by another engine with this node's id (public IP %s): %s"+
			"stop the other engine, and if its state directory is a copy of this one delete node.json there", own.Subnet, now.mod, l.PublicIP, advice)
	case l.NodeID == "":
		return fmt.Sprintf("subnet %s is held since revision %d by a node with public IP %s that names no id (flannel?): %s"+
			"restart this node to claim another subnet, or stop the other one", own.Subnet, now.mod, l.PublicIP, advice)
	}
	return fmt.Sprintf("subnet %s is held since revision %d by node %q (id %s, public IP %s): %s"+
		"restart this node to claim another subnet, or stop the other one", own.Subnet, now.mod, l.NodeName, l.NodeID, l.PublicIP, advice)
}

// setOwn publishes the own lease and its status, and logs a change of status.
func (m *Manager) setOwn(own Lease, status, problem string) {
	m.mu.Lock()
	was := m.state.OwnStatus
	same := was == status && m.state.OwnProblem == problem && m.state.Own.ModRevision == own.ModRevision &&
		m.state.Own.LeaseID == own.LeaseID
	m.mu.Unlock()
	if same {
		return
	}
	m.change(func() {
		m.state.Own.LeaseID, m.state.Own.Reservation = own.LeaseID, own.Reservation
		m.state.Own.CreateRevision, m.state.Own.ModRevision = own.CreateRevision, own.ModRevision
		m.state.OwnStatus, m.state.OwnProblem = status, problem
		if m.spare == own.LeaseID {
			m.spare = 0
		}
	})
	switch {
	case was == status:
	case status == OwnHeld:
		m.log.Info("own lease held again", "subnet", own.Subnet)
	default:
		m.log.Warn("own lease "+status, "subnet", own.Subnet, "problem", problem)
	}
}

// ownEvent looks at a watched or listed state of the own key, nil if it is gone,
// and wakes the keeper unless it is as we know it. Called under the lock.
func (m *Manager) ownEvent(now *keyValue) {
	if now != nil && m.state.OwnStatus == OwnHeld && now.leaseID == m.state.Own.LeaseID && bytes.Equal(now.value, m.ownValue) {
		return
	}
	select {
	case m.kick <- struct{}{}:
	default:
	}
}
