// Package node is one overlay node as a library: it chooses the underlay
// interface, opens the TUN device, claims a subnet through package lease, feeds
// package engine with snapshots, keeps addresses, routes and traffic rules in
// place, and answers for all of it on an API socket. Both commands, the demo
// and the tests start nodes through it.
//
// # Order of a start
//
// Everything that can fail locally is tried before anything is written or
// claimed: interface, locks, TUN device, listening addresses, then the network
// config, MTU, UDP sockets and route conflicts, and only then the lease. A
// start that fails leaves nothing behind.
//
// # Threads and namespaces
//
// A node lives in the network namespace of the thread that calls Run. One
// goroutine, the one in Run, owns the device, the engine and the routing table;
// everything else talks to it through channels and reads an immutable view.
package node

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tweed/capture"
	"tweed/encap"
	"tweed/lease"
	"tweed/tun"
)

// Defaults of Config fields that are left zero.
const (
	DefaultEtcdEndpoint   = "http://127.0.0.1:2379"
	DefaultEtcdPrefix     = "/coreos.com/network"
	DefaultTUNName        = "tweed0"
	DefaultLeaseTTL       = 24 * time.Hour
	DefaultRenewMargin    = time.Hour
	DefaultIPTablesResync = 5 * time.Second
	DefaultHealthzIP      = "0.0.0.0"
)

const (
	minLeaseTTL    = 5 * time.Second
	minRenewMargin = time.Minute
	maxRenewMargin = 1439 * time.Minute
	// maxWorkers is the most queues a TUN device has (MAX_TAP_QUEUES in the
	// kernel's drivers/net/tun.c).
	maxWorkers = 256
	// defaultMaxWorkers bounds the choice from the number of CPUs: beyond it
	// the underlay is the limit.
	defaultMaxWorkers = 8
	// maxRecorder bounds the memory of the flight recorder to some 400 MB.
	maxRecorder = 1_000_000
	// maxIfaceName is IFNAMSIZ less the terminating zero.
	maxIfaceName = 15
)

// Node is one overlay node. Make it with New, start it with Run.
type Node struct {
	cfg      Config
	choice   ifaceChoice
	mtu      mtuChoice
	log      *slog.Logger
	hostname string
	started  time.Time

	ready     chan struct{}
	readyOnce sync.Once
	readyz    atomic.Bool
	ran       atomic.Bool
	view      atomic.Pointer[view]
	data      dataPlane
	attached  atomic.Pointer[attachments]
	captures  captures
	replays   replays
	tail      logTail
	recorder  atomic.Pointer[capture.Session]
}

// New validates cfg and fills in the defaults. Its errors are errors of usage:
// they name the flag, its value and what was expected. Nothing is opened yet.
func New(cfg Config) (*Node, error) {
	n := &Node{ready: make(chan struct{})}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	n.log = newTailed(cfg.Log.Handler(), &n.tail)
	applyDefaults(&cfg)
	if err := checkConfig(&cfg); err != nil {
		return nil, err
	}
	var err error
	if n.mtu, err = parseMTU(cfg.MTU); err != nil {
		return nil, err
	}
	if err := etcdConfig(&cfg).Check(); err != nil {
		return nil, err
	}
	if ip, err := netip.ParseAddr(cfg.IfaceCanReach); cfg.IfaceCanReach != "" && (err != nil || !ip.Is4()) {
		return nil, fmt.Errorf("--iface-can-reach %s: expected an IPv4 address", cfg.IfaceCanReach)
	}
	n.choice = ifaceChoice{names: cfg.Iface, regexps: cfg.IfaceRegex, canReach: cfg.IfaceCanReach}
	if cfg.PublicIP != "" {
		ip, err := netip.ParseAddr(cfg.PublicIP)
		if err != nil || !ip.Is4() {
			return nil, fmt.Errorf("--public-ip %s: expected an IPv4 address", cfg.PublicIP)
		}
		n.choice.publicIP = ip
	}
	if n.hostname = cfg.NodeName; n.hostname == "" {
		if n.hostname, err = os.Hostname(); err != nil || n.hostname == "" {
			n.hostname = "unknown"
		}
	}
	n.cfg = cfg
	n.view.Store(&view{phase: PhaseStarting})
	return n, nil
}

// Ready is closed when the node forwards packets for the first time, from a
// lease or from the last good snapshot.
func (n *Node) Ready() <-chan struct{} { return n.ready }

// Run starts the node in the calling thread's network namespace and blocks
// until ctx is done or the node cannot start. It returns nil after a clean
// stop and one line that says what to do otherwise. It can be called once.
func (n *Node) Run(ctx context.Context) error {
	if n.ran.Swap(true) {
		return fmt.Errorf("node: Run called twice")
	}
	n.started = time.Now()
	r := &runner{Node: n}
	defer r.cleanup()
	return r.run(ctx)
}

// etcdConfig is the part of the configuration that says how to reach etcd.
func etcdConfig(c *Config) lease.EtcdConfig {
	return lease.EtcdConfig{
		Endpoints: c.EtcdEndpoints, Prefix: c.EtcdPrefix,
		CertFile: c.EtcdCertFile, KeyFile: c.EtcdKeyFile, CAFile: c.EtcdCAFile,
		Username: c.EtcdUsername, Password: c.EtcdPassword,
	}
}

func applyDefaults(c *Config) {
	if len(c.EtcdEndpoints) == 0 {
		c.EtcdEndpoints = []string{DefaultEtcdEndpoint}
	}
	if c.EtcdPrefix == "" {
		c.EtcdPrefix = DefaultEtcdPrefix
	}
	// path.Join as flannel does: a trailing slash is dropped, a missing leading
	// one stays missing and is another key.
	c.EtcdPrefix = path.Join(c.EtcdPrefix)
	if c.Impair.Active() {
		c.Offload = tun.OffloadNone
	}
	if c.LeaseTTL == 0 {
		c.LeaseTTL = DefaultLeaseTTL
	}
	if c.RenewMargin == 0 {
		c.RenewMargin = DefaultRenewMargin
	}
	if c.IPTablesResync == 0 {
		c.IPTablesResync = DefaultIPTablesResync
	}
	if c.TUNName == "" {
		c.TUNName = DefaultTUNName
	}
	if c.Workers == 0 {
		// A worker is a thread for each direction, and the programs that make the
		// traffic need processors too.
		c.Workers = max(1, min(runtime.NumCPU()/2, defaultMaxWorkers))
	}
	if c.HealthzIP == "" {
		c.HealthzIP = DefaultHealthzIP
	}
	if c.Program == "" {
		c.Program = "tweed"
	}
}

func checkConfig(c *Config) error {
	for _, re := range c.IfaceRegex {
		if _, err := regexp.Compile(re); err != nil {
			return fmt.Errorf("--iface-regex %s: %w", re, err)
		}
	}
	if c.LeaseTTL < minLeaseTTL {
		return fmt.Errorf("--lease-ttl %s: expected %s or more", c.LeaseTTL, minLeaseTTL)
	}
	if c.RenewMargin < minRenewMargin || c.RenewMargin > maxRenewMargin {
		return fmt.Errorf("--subnet-lease-renew-margin %d: expected 1 to 1439 minutes", int(c.RenewMargin.Minutes()))
	}
	if c.IPTablesResync < time.Second {
		return fmt.Errorf("--iptables-resync %s: expected 1 second or more", c.IPTablesResync)
	}
	if err := checkTUNName(c.TUNName); err != nil {
		return err
	}
	if err := checkAttachOnly(c); err != nil {
		return err
	}
	if c.Workers < 1 || c.Workers > maxWorkers {
		return fmt.Errorf("--workers %d: expected 1 to %d, or 0 for one per two CPUs", c.Workers, maxWorkers)
	}
	if c.FlightRecorder < 0 || c.FlightRecorder > maxRecorder {
		return fmt.Errorf("--flight-recorder %d: expected 0 to %d packets", c.FlightRecorder, maxRecorder)
	}
	for i, f := range c.ListenFramings {
		if f >= encap.NumFramings || slices.Contains(c.ListenFramings[:i], f) {
			return fmt.Errorf("--listen-framings: %s is unknown or given twice", f)
		}
	}
	if c.HealthzPort < 0 || c.HealthzPort > 65535 {
		return fmt.Errorf("--healthz-port %d: expected 0 to 65535", c.HealthzPort)
	}
	if ip, err := netip.ParseAddr(c.HealthzIP); err != nil || ip.Zone() != "" {
		return fmt.Errorf("--healthz-ip %s: expected an IP address", c.HealthzIP)
	}
	if c.MetricsAddr != "" {
		_, port, err := net.SplitHostPort(c.MetricsAddr)
		if err != nil {
			return fmt.Errorf("--metrics-addr %s: expected HOST:PORT, such as 127.0.0.1:9285", c.MetricsAddr)
		}
		if p, err := strconv.Atoi(port); err != nil || p < 0 || p > 65535 {
			return fmt.Errorf("--metrics-addr %s: expected a port from 0 to 65535", c.MetricsAddr)
		}
	}
	return nil
}

// checkTUNName accepts what the kernel accepts as an interface name
// (dev_valid_name in net/core/dev.c), and one %d at the end.
func checkTUNName(name string) error {
	base, _ := strings.CutSuffix(name, "%d")
	if base == "" || base == "." || base == ".." || len(name) > maxIfaceName ||
		strings.ContainsAny(base, "/:% \t\n\v\f\r") {
		return fmt.Errorf("--tun-name %q: expected 1 to %d characters without blank, slash, colon or percent, with %%d allowed at the end", name, maxIfaceName)
	}
	return nil
}
