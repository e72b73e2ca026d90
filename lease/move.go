package lease

import (
	"context"
	"net/netip"
)

// SetPublicIP says that the node has another underlay address. The connection to
// etcd is made anew, for the old address may have carried it, and the own lease is
// written with the new one, under the same fence as every write. It may be called
// from any goroutine.
func (m *Manager) SetPublicIP(ip netip.Addr) {
	m.mu.Lock()
	m.publicIP, m.built = ip, nil
	m.mu.Unlock()
	m.reg.Reset()
	m.notify()
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// address is the underlay address peers send to.
func (m *Manager) address() netip.Addr {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.publicIP
}

// mustMove reports whether a lease that is ours names another address than the
// node's.
func (m *Manager) mustMove() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.OwnStatus == OwnHeld && m.state.Own.PublicIP != m.publicIP
}

// move writes our address into our lease, unless another node has a lease with it.
func (m *Manager) move(ctx context.Context, own Lease, now keyValue) error {
	m.mu.Lock()
	to, cfg := m.publicIP, m.state.Config
	for _, r := range m.table.records {
		if l := r.lease; r.usable && l.PublicIP == to && l.NodeID != "" && l.NodeID != m.cfg.NodeID {
			m.mu.Unlock()
			return &PublicIPTakenError{Holder: l, NodeID: m.cfg.NodeID, NodeName: m.cfg.NodeName}
		}
	}
	m.mu.Unlock()
	if err := checkNetwork(cfg, to); err != nil {
		return err
	}
	value, err := encodeAttrs(m.attrs(cfg))
	if err != nil {
		return err
	}
	// From here on a write whose fate is not known is recognized as ours.
	m.mu.Lock()
	m.nextValue = value
	m.mu.Unlock()
	out, err := m.reg.put(ctx, m.reg.ifUnchanged(now.name, now.mod), now.name, value, now.leaseID)
	if err != nil {
		return err
	}
	if !out.done {
		return errRaced
	}
	now.value, now.mod = value, out.rev
	own = m.moved(own, now)
	m.log.Info("own lease has the new address", "subnet", own.Subnet, "public_ip", own.PublicIP)
	own.ModRevision = out.rev
	m.setOwn(own, OwnHeld, "")
	return nil
}

// moved records what our key says since we wrote it.
func (m *Manager) moved(own Lease, now keyValue) Lease {
	l, _, _ := now.lease() // of our own making
	own.Attrs = l.Attrs
	m.change(func() {
		m.state.Own.Attrs = l.Attrs
		m.ownValue, m.nextValue = now.value, nil
	})
	return own
}
