package node

import (
	"net/netip"
	"time"

	"tweed/encap"
)

// Schema is the version of the JSON the API answers with. A field is added
// without changing it; it grows when a field is removed or changes its meaning.
const Schema = 1

// Phase is where a node is in its life.
type Phase string

const (
	// PhaseStarting: local preparations, nothing on the wire yet.
	PhaseStarting Phase = "starting"
	// PhaseWaiting: etcd does not answer or holds no usable network config, and
	// there is no snapshot to forward from.
	PhaseWaiting Phase = "waiting"
	// PhaseCached: forwarding from the last good snapshot, etcd not yet heard.
	PhaseCached Phase = "cached"
	// PhaseRunning: forwarding under a lease held in etcd.
	PhaseRunning Phase = "running"
	// PhaseStopping: on the way out.
	PhaseStopping Phase = "stopping"
)

// Status is everything one node knows about itself.
type Status struct {
	Schema  int       `json:"schema"`
	Program string    `json:"program"`
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Phase   Phase     `json:"phase"`
	// Ready is what /readyz says.
	Ready bool `json:"ready"`
	// EndsWhenIdle says that the engine ends with the last attachment.
	EndsWhenIdle bool `json:"ends_when_idle,omitempty"`
	// Problems are what an operator should look at, one line each, empty when
	// all is well.
	Problems []string `json:"problems"`

	Node     NodeStatus     `json:"node"`
	Underlay UnderlayStatus `json:"underlay"`
	// Network is absent before the first network config or snapshot.
	Network *NetworkStatus `json:"network,omitempty"`
	Device  DeviceStatus   `json:"device"`
	// Framing is the framing of our own lease.
	Framing encap.Framing  `json:"framing"`
	Listen  []ListenStatus `json:"listen"`
	// Lease is absent before a subnet is claimed or read from the snapshot.
	Lease *OwnLeaseStatus `json:"lease,omitempty"`
	Etcd  EtcdStatus      `json:"etcd"`
	// Peers is the number of peers by framing.
	Peers map[string]int `json:"peers"`
	// Skipped are leases the data plane cannot use, with the reason.
	Skipped  []SkippedLease `json:"skipped"`
	Ledger   Ledger         `json:"ledger"`
	Counters LeaseCounters  `json:"lease_counters"`
	// Ignored are keys in etcd that are not used, wholly or in their newest value.
	Ignored    []IgnoredKey `json:"ignored_keys"`
	Rules      RulesStatus  `json:"traffic_rules"`
	SubnetFile string       `json:"subnet_file,omitempty"`
	StateDir   string       `json:"state_dir,omitempty"`
	// Attachments are the containers connected to this node.
	Attachments []AttachmentStatus `json:"attachments"`
	// StateError is why the last good table could not be saved or read.
	StateError string `json:"state_error,omitempty"`
}

// NodeStatus is the node's identity.
type NodeStatus struct {
	ID       string     `json:"id"`
	Name     string     `json:"name"`
	PublicIP netip.Addr `json:"public_ip,omitzero"`
	VtepMAC  string     `json:"vtep_mac"`
}

// UnderlayStatus is the interface between the nodes.
type UnderlayStatus struct {
	Interface string     `json:"interface"`
	Address   netip.Addr `json:"address,omitzero"`
	// MTU is in bytes.
	MTU int `json:"mtu"`
	// Chosen says why this interface, for instance "default route".
	Chosen string `json:"chosen"`
}

// NetworkStatus is the network config in force.
type NetworkStatus struct {
	Network   netip.Prefix `json:"network"`
	SubnetLen int          `json:"subnet_len"`
	SubnetMin netip.Addr   `json:"subnet_min,omitzero"`
	SubnetMax netip.Addr   `json:"subnet_max,omitzero"`
	Backend   string       `json:"backend"`
	Port      uint16       `json:"port"`
	VNI       uint32       `json:"vni,omitempty"`
	// Pending says why a newer config in etcd is not in force.
	Pending string `json:"pending,omitempty"`
}

// DeviceStatus is the TUN device.
type DeviceStatus struct {
	// AttachOnly says that the host has no device and only attached containers
	// are part of the overlay; Name is empty then.
	AttachOnly bool       `json:"attach_only,omitempty"`
	Name       string     `json:"name"`
	Address    netip.Addr `json:"address,omitzero"`
	// MTU is in bytes.
	MTU int  `json:"mtu"`
	Up  bool `json:"up"`
	// Workers is the number of queues, each with its own packet worker.
	Workers int `json:"workers"`
	// Offload is the rung of the offload ladder in use and OffloadReason why
	// it is not a higher one.
	Offload       string `json:"offload"`
	OffloadReason string `json:"offload_reason,omitempty"`
	// SendSegmented and ReceiveMerged say whether the sockets use UDP_SEGMENT
	// and UDP_GRO.
	SendSegmented bool `json:"send_segmented"`
	ReceiveMerged bool `json:"receive_merged"`
	// Accelerator is "on" while the kernel carries what it can past the packet
	// workers, "paused" or "off"; AcceleratorReason says why.
	Accelerator       string `json:"accelerator,omitempty"`
	AcceleratorReason string `json:"accelerator_reason,omitempty"`
	// GSOMaxSize is the largest super-packet the host hands us, in bytes.
	GSOMaxSize int `json:"gso_max_size,omitempty"`
	// Recreated counts how often the device was made again after it vanished.
	Recreated int `json:"recreated"`
}

// ListenStatus is one framing being received.
type ListenStatus struct {
	Framing encap.Framing  `json:"framing"`
	Addr    netip.AddrPort `json:"address"`
}

// LeaseStatus is one lease as etcd holds it.
type LeaseStatus struct {
	Subnet      netip.Prefix `json:"subnet"`
	PublicIP    netip.Addr   `json:"public_ip"`
	BackendType string       `json:"backend_type"`
	VNI         uint32       `json:"vni,omitempty"`
	VtepMAC     string       `json:"vtep_mac,omitempty"`
	NodeID      string       `json:"node_id,omitempty"`
	NodeName    string       `json:"node_name,omitempty"`
	// Own is true for the lease of the node that answers.
	Own bool `json:"own"`
	// Reservation is true for a key without an etcd lease: it never expires.
	Reservation bool  `json:"reservation"`
	ModRevision int64 `json:"mod_revision,omitempty"`
	// Source is "etcd", "snapshot" for one read from the state directory, or
	// "held" for one that was deleted from etcd a moment ago.
	Source string `json:"source"`
}

// OwnLeaseStatus is our own lease and how firmly we hold it.
type OwnLeaseStatus struct {
	LeaseStatus
	// State is held, reacquiring, lost or cached.
	State string `json:"state"`
	// Problem says what is wrong and what to do about it.
	Problem string `json:"problem,omitempty"`
}

// EtcdStatus is the connection to the control plane.
type EtcdStatus struct {
	Endpoints []string `json:"endpoints"`
	Prefix    string   `json:"prefix"`
	Connected bool     `json:"connected"`
	// Synced is true when the table is complete at Revision.
	Synced    bool   `json:"synced"`
	Revision  int64  `json:"revision"`
	LastError string `json:"last_error,omitempty"`
}

// SkippedLease is a lease the data plane cannot use.
type SkippedLease struct {
	Subnet      netip.Prefix `json:"subnet"`
	BackendType string       `json:"backend_type"`
	NodeName    string       `json:"node_name,omitempty"`
	Why         string       `json:"why"`
}

// Ledger is the account of every packet: in each direction, Packets equals
// Delivered plus the sum of Drops.
type Ledger struct {
	// Tx is from the TUN to the underlay, Rx the other way.
	Tx DirectionLedger `json:"tx"`
	Rx DirectionLedger `json:"rx"`
	// ICMPSent counts ICMP errors written to the TUN, ICMPLimited those the
	// rate limit held back. They are in no direction's account.
	ICMPSent    uint64 `json:"icmp_sent"`
	ICMPLimited uint64 `json:"icmp_limited"`
	// SocketDropped counts datagrams the kernel dropped because a receive
	// buffer was full, before they could be entered.
	SocketDropped uint64 `json:"socket_dropped"`
}

// DirectionLedger is one direction of the ledger. Drops has one entry for each
// reason that occurred.
type DirectionLedger struct {
	Packets        uint64            `json:"packets"`
	Bytes          uint64            `json:"bytes"`
	Delivered      uint64            `json:"delivered"`
	DeliveredBytes uint64            `json:"delivered_bytes"`
	Dropped        uint64            `json:"dropped"`
	Drops          map[string]uint64 `json:"drops"`
	// Accelerated and AcceleratedBytes are the part of Packets and Bytes that was
	// carried inside the kernel.
	Accelerated      uint64 `json:"accelerated"`
	AcceleratedBytes uint64 `json:"accelerated_bytes"`
}

// LeaseCounters count what the control plane saw; the fields are explained at
// lease.Counters.
type LeaseCounters struct {
	BadKeys          uint64 `json:"bad_keys"`
	BadValues        uint64 `json:"bad_values"`
	Relists          uint64 `json:"relists"`
	Compactions      uint64 `json:"compactions"`
	WatchRestarts    uint64 `json:"watch_restarts"`
	WatchStalls      uint64 `json:"watch_stalls"`
	StaleEvents      uint64 `json:"stale_events"`
	AntiEntropyRuns  uint64 `json:"anti_entropy_runs"`
	AntiEntropyDiffs uint64 `json:"anti_entropy_diffs"`
	KeepAliveErrors  uint64 `json:"keepalive_errors"`
	LeaseRetaken     uint64 `json:"lease_retaken"`
	Rollbacks        uint64 `json:"rollbacks"`
}

// IgnoredKey is a key below <prefix>/subnets/ that is not used as a peer.
type IgnoredKey struct {
	Key      string `json:"key"`
	Revision int64  `json:"revision"`
	Reason   string `json:"reason"`
}

// RulesStatus is the state of the masquerade and forward rules.
type RulesStatus struct {
	// Mode is none, iptables or nftables.
	Mode    string `json:"mode"`
	Masq    bool   `json:"masquerade"`
	Forward bool   `json:"forward"`
	// Restored counts how often missing rules were put back.
	Restored int    `json:"restored"`
	Problem  string `json:"problem,omitempty"`
}

// PeerStatus is one peer as the data plane uses it.
type PeerStatus struct {
	Subnet   netip.Prefix   `json:"subnet"`
	Endpoint netip.AddrPort `json:"endpoint"`
	Framing  encap.Framing  `json:"framing"`
	VNI      uint32         `json:"vni,omitempty"`
	VtepMAC  string         `json:"vtep_mac,omitempty"`
	NodeID   string         `json:"node_id,omitempty"`
	NodeName string         `json:"node_name,omitempty"`
	// MTU is the largest inner packet, in bytes, that reaches the peer unfragmented.
	MTU int `json:"mtu"`
	// Source is "etcd", "snapshot" for one read from the state directory, or
	// "held" for a peer whose lease was deleted from etcd: it is used until
	// HeldUntil at most, and until another node claims its subnet or its address.
	Source    string    `json:"source"`
	HeldUntil time.Time `json:"held_until,omitzero"`
}

// RouteStatus is one entry of the overlay's routing table.
type RouteStatus struct {
	Dst netip.Prefix `json:"dst"`
	// Via is "local" for our own subnet, else the peer's endpoint.
	Via      string        `json:"via"`
	Framing  encap.Framing `json:"framing"`
	NodeName string        `json:"node_name,omitempty"`
	MTU      int           `json:"mtu"`
}

// RouteAnswer explains what happens to a packet for one address.
type RouteAnswer struct {
	Schema int        `json:"schema"`
	Dst    netip.Addr `json:"dst"`
	// Result is "peer", "local", "outside" (not the overlay's network) or "drop".
	Result string `json:"result"`
	// Peer is set when Result is peer.
	Peer *PeerStatus `json:"peer,omitempty"`
	// Reason is the drop reason's name when Result is drop, and Explain one
	// line for a person.
	Reason  string `json:"reason,omitempty"`
	Explain string `json:"explain"`
}

// PeersAnswer, RoutesAnswer and LeasesAnswer are the lists the API answers with.
type (
	PeersAnswer struct {
		Schema int          `json:"schema"`
		Peers  []PeerStatus `json:"peers"`
	}
	RoutesAnswer struct {
		Schema int           `json:"schema"`
		Routes []RouteStatus `json:"routes"`
	}
	LeasesAnswer struct {
		Schema int           `json:"schema"`
		Leases []LeaseStatus `json:"leases"`
	}
)
