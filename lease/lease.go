package lease

import (
	"net/netip"
	"time"
)

// Lease is one node's claim of a subnet, as it stands in etcd.
type Lease struct {
	// Subnet is the claimed subnet, masked; its key is <prefix>/subnets/<addr>-<bits>.
	Subnet netip.Prefix
	Attrs
	// CreateRevision and ModRevision are the etcd revisions at which the key was
	// created and last written.
	CreateRevision, ModRevision int64
	// LeaseID is the etcd lease the key is attached to; 0 for a reservation.
	LeaseID int64
	// Reservation says that the key is attached to no etcd lease: it stays until
	// somebody deletes it.
	Reservation bool
	// HeldUntil is set when the key is gone from etcd but the lease is kept for a
	// moment, until then at most, so that its node can take it back without losing
	// packets. The zero time is any other lease.
	HeldUntil time.Time
}

// Values of State.OwnStatus.
const (
	// OwnHeld: the own lease is ours as far as etcd ever told us.
	OwnHeld = "held"
	// OwnReacquiring: the own lease was deleted or expired and is being claimed
	// again, the same subnet. Forwarding goes on meanwhile.
	OwnReacquiring = "reacquiring"
	// OwnLost: somebody else holds the subnet. It is not overwritten; it is
	// claimed again as soon as it becomes free.
	OwnLost = "lost"
)

// State is everything the control plane knows at one moment. It is immutable and
// complete: a consumer needs the last one only.
type State struct {
	// Revision is the etcd revision up to which the leases are applied.
	Revision int64
	// Synced says that the leases were read completely at least once.
	Synced bool
	// Connected says that a watch is established.
	Connected bool
	// LastError is what keeps the engine from being connected, or from renewing
	// its lease, in one line; empty if nothing does.
	LastError string
	// Config is the network configuration in force.
	Config NetworkConfig
	// PendingConfig says why a newer configuration in etcd is not in force, and
	// what differs; empty if the newest one is in force.
	PendingConfig string
	// Own is the lease of this node, zero before Acquire. It stays what it last
	// was when the lease is lost.
	Own Lease
	// OwnStatus is OwnHeld, OwnReacquiring or OwnLost, or empty before Acquire.
	OwnStatus string
	// OwnProblem says what is wrong with the own lease and what to do about it;
	// empty while it is held.
	OwnProblem string
	// Peers are the usable leases of other nodes, sorted by subnet, without
	// overlaps. The own lease is never among them. Those with HeldUntil are no
	// longer in etcd.
	Peers []Lease
	// Ignored are the keys that are not used, sorted by key.
	Ignored []Ignored
	// Counters count since NewManager.
	Counters Counters
}

// Ignored is a key below <prefix>/subnets/ that is not used as a peer, wholly or
// in its newest value.
type Ignored struct {
	// Key is the name below <prefix>/subnets/, shortened and printable.
	Key string
	// Revision is the etcd revision of the value that is not used.
	Revision int64
	// Reason says why, in a few words.
	Reason string
}

// Counters count what happened to the control plane. A healthy overlay counts
// Relists and AntiEntropyRuns only.
type Counters struct {
	// BadKeys and BadValues count keys and values that did not parse, once per
	// key and revision.
	BadKeys, BadValues uint64
	// Relists counts complete lists that were applied, the first one included;
	// Compactions those that a compaction forced.
	Relists, Compactions uint64
	// WatchRestarts counts watches that ended and were started again;
	// WatchStalls those that ended because the connection went silent.
	WatchRestarts, WatchStalls uint64
	// StaleEvents counts events dropped because they were not newer than what
	// was applied already. A healthy etcd sends none.
	StaleEvents uint64
	// AntiEntropyRuns counts periodic comparisons with etcd, AntiEntropyDiffs
	// the differences they found: each one is a change the watch never delivered.
	AntiEntropyRuns, AntiEntropyDiffs uint64
	// KeepAliveErrors counts renewals without an answer.
	KeepAliveErrors uint64
	// LeaseRetaken counts how often the own lease was gone and claimed again.
	LeaseRetaken uint64
	// Rollbacks counts how often etcd came back older than before, or as another
	// cluster: restored from a backup, or replaced.
	Rollbacks uint64
}
