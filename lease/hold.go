package lease

import "time"

// massLeases is the number of leases that may go at once, beside half of all,
// without looking like a mistake.
const massLeases = 3

// holdDeleted decides how long the leases that were just deleted are still used:
// their nodes may live and claim them again at once, and what they send meanwhile
// is not to be refused. A key that is written again, by whoever, and a lease with
// the same address end that. It returns the number of leases that are held longer
// because most of the overlay went at once. Called under the lock.
func (m *Manager) holdDeleted() (mass int) {
	hold := m.timing.hold
	if n := len(m.table.held); n > max(massLeases, (n+len(m.table.records))/2) {
		hold = m.timing.massHold
	}
	n := m.table.holdUntil(time.Now().Add(hold))
	if n == 0 {
		return 0
	}
	if hold == 0 {
		m.table.release(time.Now())
		return 0
	}
	time.AfterFunc(hold, m.endHolds)
	if hold == m.timing.hold {
		return 0
	}
	return n
}

// endHolds forgets the leases whose time is over. While etcd is not heard there
// is no telling whether they were claimed again, so they stay until it is.
func (m *Manager) endHolds() {
	m.mu.Lock()
	ended := 0
	switch {
	case m.ended:
	case m.state.Connected:
		if ended = m.table.release(time.Now()); ended > 0 {
			m.built = nil
		}
	case len(m.table.held) > 0:
		time.AfterFunc(m.timing.hold, m.endHolds)
	}
	m.mu.Unlock()
	if ended > 0 {
		m.notify()
	}
}
