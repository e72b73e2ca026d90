package accel

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
)

// peerMap is what a mirror writes to: the programs' longest-prefix map.
type peerMap interface {
	Put(key, value any) error
	Delete(key any) error
}

// mirror brings the programs' map from one table to the next so that at no
// moment a packet meets an entry it should not: an address is answered as by
// the old table, as by the new one, or not at all, and after retract not as by
// the old one where the new one differs.
type mirror struct {
	peers   peerMap
	entered map[netip.Prefix]accelPeer // what the map holds
	// took says that an answer was taken away since this was last cleared.
	took bool
}

func newMirror(m peerMap) mirror {
	return mirror{peers: m, entered: map[netip.Prefix]accelPeer{}}
}

// retract closes what want says otherwise and removes what it does not have.
func (m *mirror) retract(want map[netip.Prefix]accelPeer) error {
	nested := m.nested(want)
	for subnet, e := range want {
		old, have := m.entered[subnet]
		if have && old != e || !have && nested {
			m.took = true
			if err := m.put(subnet, closed); err != nil {
				return err
			}
		}
	}
	// Shorter prefixes first, so that none answers for a longer one that left before it.
	gone := slices.Collect(maps.Keys(m.entered))
	gone = slices.DeleteFunc(gone, func(p netip.Prefix) bool { _, ok := want[p]; return ok })
	slices.SortFunc(gone, func(a, b netip.Prefix) int { return a.Bits() - b.Bits() })
	for _, subnet := range gone {
		if err := m.peers.Delete(keyOf(subnet)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove %s: %w", subnet, err)
		}
		delete(m.entered, subnet)
		m.took = true
	}
	return nil
}

// enter adds what is missing, longer prefixes first: a shorter one must not
// answer for them. Call retract with the same entries before.
func (m *mirror) enter(want map[netip.Prefix]accelPeer) error {
	order := slices.SortedFunc(maps.Keys(want), func(a, b netip.Prefix) int { return b.Bits() - a.Bits() })
	for _, subnet := range order {
		if e, ok := m.entered[subnet]; ok && e == want[subnet] {
			continue
		}
		if err := m.put(subnet, want[subnet]); err != nil {
			return err
		}
	}
	return nil
}

func (m *mirror) put(subnet netip.Prefix, e accelPeer) error {
	if err := m.peers.Put(keyOf(subnet), e); err != nil {
		return fmt.Errorf("enter %s: %w", subnet, err)
	}
	m.entered[subnet] = e
	return nil
}

// nested reports whether prefixes of several lengths are about, so that one may
// lie inside another.
func (m *mirror) nested(want map[netip.Prefix]accelPeer) bool {
	bits := -1
	for _, set := range []map[netip.Prefix]accelPeer{want, m.entered} {
		for p := range set {
			if bits >= 0 && p.Bits() != bits {
				return true
			}
			bits = p.Bits()
		}
	}
	return false
}
