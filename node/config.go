package node

import (
	"log/slog"
	"time"

	"tweed/encap"
	"tweed/engine/impair"
	"tweed/tun"
)

// Config is everything an operator can say about one overlay node. The two
// commands fill it from their flags; tests fill it directly.
type Config struct {
	// EtcdEndpoints are URLs; EtcdPrefix is the key prefix, default
	// /coreos.com/network.
	EtcdEndpoints []string
	EtcdPrefix    string
	// EtcdCertFile, EtcdKeyFile and EtcdCAFile are PEM files, each optional.
	EtcdCertFile, EtcdKeyFile, EtcdCAFile string
	EtcdUsername, EtcdPassword            string

	// Iface, IfaceRegex and IfaceCanReach choose the underlay interface, in
	// that order (flannel main.go, pkg/ipmatch). Empty means the default route's.
	Iface, IfaceRegex []string
	IfaceCanReach     string
	// PublicIP is the IPv4 address put in the lease; empty means the interface's.
	PublicIP string

	// SubnetFile is where subnet.env is written; empty means none.
	SubnetFile string
	// LeaseTTL is the lifetime of the etcd lease; it is kept alive at a third of it.
	LeaseTTL time.Duration
	// RenewMargin is flannel's subnet-lease-renew-margin. A kept-alive lease
	// needs none; the value is validated and reported only.
	RenewMargin time.Duration
	// TakeOver lets this node take a lease with our public IP that carries
	// another node id.
	TakeOver bool
	// ReleaseOnExit deletes our lease on a clean exit.
	ReleaseOnExit bool

	// IPMasq, IPMasqRandomFully, IPTablesForward and IPTablesResync are
	// flannel's traffic rules (flannel pkg/trafficmngr).
	IPMasq, IPMasqRandomFully, IPTablesForward bool
	IPTablesResync                             time.Duration
	// BlackholeRoute keeps a blackhole route for our subnet.
	BlackholeRoute bool

	// FlightRecorder keeps the heads of so many packets, and of as many dropped
	// ones, for whoever asks later; 0 keeps none.
	FlightRecorder int
	// Impair treats what the node sends as a bad network would, for tests. Packets
	// are single ones then, whatever Offload says, so that each has its own fate,
	// and the accelerator is off.
	Impair impair.Spec
	// AttachOnly leaves the host out of the overlay: no TUN device, no routes and
	// no traffic rules, only attached containers. It needs no privilege at all.
	AttachOnly bool
	// EndsWhenIdle is for Status: who runs the node ends it once nothing is
	// attached any more.
	EndsWhenIdle bool
	// TUNName is the device name, at most 15 bytes; a trailing %d picks a free number.
	TUNName string
	// MTU is "" (derived), "max" or a number of bytes.
	MTU string
	// Workers is the number of packet workers, each with a TUN queue and a
	// socket per framing; 0 chooses from the number of CPUs.
	Workers int
	// Offload is the highest rung of the offload ladder to use.
	Offload tun.Offload
	// Accelerate lets packets be carried inside the kernel where it can (package accel).
	Accelerate bool
	// ListenFramings are the framings to receive; empty means the network's own.
	ListenFramings []encap.Framing

	// StateDir holds everything of one engine; empty means the defaults for
	// the user (DESIGN 4.1). Socket overrides the API socket's path.
	StateDir, Socket string
	// MetricsAddr is a TCP address for Prometheus; empty means none.
	MetricsAddr string
	// HealthzIP and HealthzPort serve flannel's health endpoints; port 0 means none.
	HealthzIP   string
	HealthzPort int

	// NodeName is the name in the lease and in status; empty means the host name.
	NodeName string
	// Program is the name of the command, for logs and status.
	Program string
	// Version is the build's version, for logs and status.
	Version string
	// Log receives every event; nil means slog.Default.
	Log *slog.Logger
}
