package lease

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/gaissmai/bart"
)

// keyValue is one key below <prefix>/subnets/ as etcd stores it.
type keyValue struct {
	name        string // below <prefix>/subnets/
	value       []byte
	create, mod int64
	leaseID     int64
}

// lease parses the key and the value. The errors of the two are apart because
// they are counted apart.
func (kv keyValue) lease() (l Lease, keyErr, valueErr error) {
	l.Subnet, keyErr = parseSubnetKey(kv.name)
	if keyErr != nil {
		return Lease{}, keyErr, nil
	}
	l.Attrs, valueErr = decodeAttrs(kv.value)
	if valueErr != nil {
		return Lease{}, nil, valueErr
	}
	l.CreateRevision, l.ModRevision = kv.create, kv.mod
	l.LeaseID, l.Reservation = kv.leaseID, kv.leaseID == 0
	return l, nil, nil
}

// leaseTable is every key below <prefix>/subnets/, our own included, up to one
// revision. It is a plain value without locks or clocks.
type leaseTable struct {
	rev     int64 // revision up to which everything is applied
	records map[string]record
	held    map[string]Lease // deleted keys that are still used, by name
}

// record is one key.
type record struct {
	// lease is the last good value; usable says that there is one.
	lease  Lease
	usable bool
	// mod is the revision of the newest value, good or bad, and create the
	// revision at which the key was created.
	create, mod int64
	// issue says why the newest value is not used, empty if it is.
	issue string
}

// finding is a key or a value that did not parse, seen for the first time.
type finding struct {
	Ignored
	badKey bool
}

func newLeaseTable() *leaseTable {
	return &leaseTable{records: make(map[string]record), held: make(map[string]Lease)}
}

// put applies a new value. What does not parse changes nothing but the key's own
// issue: the last good value of that key stays in use as long as the key was not
// deleted in between. found says that f is to be reported, changed that the key is
// not what it was.
func (t *leaseTable) put(kv keyValue) (f finding, found, changed bool) {
	old := t.records[kv.name]
	l, keyErr, valueErr := kv.lease()
	r := record{lease: l, usable: true, create: kv.create, mod: kv.mod}
	if keyErr != nil || valueErr != nil {
		r.lease, r.usable = old.lease, old.usable && old.create == kv.create
		r.issue = "key: " + text(keyErr)
		if valueErr != nil {
			r.issue = "value: " + text(valueErr)
		}
		found = old.issue == "" || old.mod != kv.mod
		f = finding{Ignored{label(kv.name), kv.mod, r.issue}, keyErr != nil}
	}
	t.records[kv.name] = r
	if r.issue == "" {
		delete(t.held, kv.name) // whoever has the key now
	}
	return f, found, old.mod != kv.mod
}

// del applies the deletion of a key. Its lease is held until it is released.
func (t *leaseTable) del(name string) {
	if r, ok := t.records[name]; ok && r.usable {
		t.held[name] = r.lease
	}
	delete(t.records, name)
}

// holdUntil sets the end of what was not held before and returns the number of
// these leases.
func (t *leaseTable) holdUntil(end time.Time) int {
	n := 0
	for name, l := range t.held {
		if l.HeldUntil.IsZero() {
			l.HeldUntil = end
			t.held[name] = l
			n++
		}
	}
	return n
}

// release forgets the leases held until now or earlier and returns their number.
func (t *leaseTable) release(now time.Time) int {
	n := 0
	for name, l := range t.held {
		if !now.Before(l.HeldUntil) {
			delete(t.held, name)
			n++
		}
	}
	return n
}

// replace makes the table equal to a complete list at one revision and returns
// what did not parse for the first time, and whether anything changed. Keys that
// are not in the list are deleted; with merge they stay.
func (t *leaseTable) replace(list []keyValue, rev int64, merge bool) (findings []finding, changed bool) {
	before := len(t.records)
	if !merge {
		listed := make(map[string]bool, len(list))
		for _, kv := range list {
			listed[kv.name] = true
		}
		for name := range t.records {
			if !listed[name] {
				t.del(name)
				changed = true
			}
		}
	}
	for _, kv := range list {
		f, found, differs := t.put(kv)
		if found {
			findings = append(findings, f)
		}
		changed = changed || differs
	}
	t.rev = rev
	return findings, changed || len(t.records) != before
}

// diff counts the keys in which the table differs from a complete list at rev.
// Keys that changed after rev are not compared: touched tells those that the
// table saw deleted since the list was asked for.
func (t *leaseTable) diff(list []keyValue, rev int64, touched map[string]bool) int {
	n := 0
	listed := make(map[string]bool, len(list))
	for _, kv := range list {
		listed[kv.name] = true
		r, ok := t.records[kv.name]
		if !touched[kv.name] && (!ok || r.mod < kv.mod) {
			n++
		}
	}
	for name, r := range t.records {
		if !listed[name] && !touched[name] && r.mod <= rev {
			n++
		}
	}
	return n
}

// policy is what a lease is measured against to be a peer.
type policy struct {
	network  netip.Prefix
	own      netip.Prefix // own subnet; invalid if there is none yet
	publicIP netip.Addr
	nodeID   string
}

// peers lists the leases of other nodes that can be used, sorted by subnet, and
// the keys that are not, sorted by key. Of overlapping subnets the one created
// first is used. A held lease is used as long as no lease in etcd overlaps it or
// names its address: the address of a node that lives tells where it is now.
func (t *leaseTable) peers(p policy) ([]Lease, []Ignored) {
	peers := make([]Lease, 0, len(t.records))
	var ignored []Ignored
	for name, r := range t.records {
		if r.issue != "" {
			ignored = append(ignored, Ignored{label(name), r.mod, r.issue})
		}
		if !r.usable || r.lease.Subnet == p.own {
			continue
		}
		if reason := p.refuse(r.lease); reason != "" {
			ignored = append(ignored, Ignored{label(name), r.mod, reason})
			continue
		}
		peers = append(peers, r.lease)
	}

	slices.SortFunc(peers, func(a, b Lease) int {
		return cmp.Or(cmp.Compare(a.CreateRevision, b.CreateRevision), compareSubnets(a.Subnet, b.Subnet))
	})
	var used bart.Lite
	kept := peers[:0]
	for _, l := range peers {
		if used.OverlapsPrefix(l.Subnet) {
			ignored = append(ignored, Ignored{subnetKey(l.Subnet), l.ModRevision, "overlaps a subnet that was leased before it"})
			continue
		}
		used.Insert(l.Subnet)
		kept = append(kept, l)
	}
	kept = t.appendHeld(kept, &used, p)
	slices.SortFunc(kept, func(a, b Lease) int { return compareSubnets(a.Subnet, b.Subnet) })
	slices.SortFunc(ignored, func(a, b Ignored) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), cmp.Compare(a.Revision, b.Revision))
	})
	return kept, ignored
}

// appendHeld adds the held leases that nothing in etcd is against; used has the
// subnets of peers.
func (t *leaseTable) appendHeld(peers []Lease, used *bart.Lite, p policy) []Lease {
	if len(t.held) == 0 {
		return peers
	}
	addrs := make(map[netip.Addr]bool, len(t.records))
	for _, r := range t.records {
		if r.usable {
			addrs[r.lease.PublicIP] = true
		}
	}
	for _, l := range t.held {
		if l.Subnet == p.own || addrs[l.PublicIP] || used.OverlapsPrefix(l.Subnet) || p.refuse(l) != "" {
			continue
		}
		used.Insert(l.Subnet)
		peers = append(peers, l)
	}
	return peers
}

// refuse says why a lease that parsed cannot be a peer, or nothing.
func (p policy) refuse(l Lease) string {
	switch {
	case l.Subnet.Bits() <= p.network.Bits() || !p.network.Contains(l.Subnet.Addr()):
		return fmt.Sprintf("outside the network %s", p.network)
	case p.own.IsValid() && p.own.Overlaps(l.Subnet):
		return fmt.Sprintf("overlaps this node's subnet %s", p.own)
	case p.network.Contains(l.PublicIP):
		return fmt.Sprintf("PublicIP %s is inside the network %s", l.PublicIP, p.network)
	case l.PublicIP == p.publicIP:
		return fmt.Sprintf("PublicIP %s is this node's own", l.PublicIP)
	case l.NodeID != "" && l.NodeID == p.nodeID:
		return "another lease of this node"
	}
	return ""
}

func compareSubnets(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// label is a key shortened and made printable, for messages.
func label(name string) string {
	const max = 64
	if len(name) > max {
		name = name[:max] + "..."
	}
	if printable(name) {
		return name
	}
	return fmt.Sprintf("%q", name)
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
