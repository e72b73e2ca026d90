// Package daemon is what the two commands that run a node have in common: the
// flags, how they become a node.Config, the logger and the run until a signal.
//
// The flags are registered on a standard flag.FlagSet, which `flanneld` parses
// as Go does and `tweed up` adopts into its own flag set, so a flag has one
// name, one default and one help text.
package daemon

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"time"

	"tweed/encap"
	"tweed/engine/impair"
	"tweed/node"
	"tweed/tun"
)

// Defaults are the values in which the two commands differ.
type Defaults struct {
	// EtcdEndpoints is the comma separated list of URLs.
	EtcdEndpoints string
	// TUNName is the device name, or a pattern with a trailing %d.
	TUNName string
}

// Flags holds the values of the flags that describe a node. Register binds
// them; Config checks and converts them after parsing.
type Flags struct {
	etcdEndpoints, etcdPrefix             string
	etcdCertFile, etcdKeyFile, etcdCAFile string
	etcdUsername, etcdPassword            string

	iface, ifaceRegex       repeated
	ifaceCanReach, publicIP string
	subnetFile              string
	ipMasq, ipMasqNoRandom  bool
	iptablesForward         bool
	iptablesResync          int
	blackhole               bool
	healthzIP               string
	healthzPort             int
	mtu, tunName            string
	workers                 int
	offload, framings       string
	accelerate              string
	leaseTTL                time.Duration
	takeOver, releaseOnExit bool
	stateDir, socket        string
	nodeName                string
	metricsAddr             string
	flightRecorder          int
	impair                  string
	logLevel, logFormat     string
}

// RegisterEtcd binds the flags that say how to reach etcd; commands that talk
// to etcd without being a node use them alone.
func (f *Flags) RegisterEtcd(fs *flag.FlagSet, d Defaults) {
	fs.StringVar(&f.etcdEndpoints, "etcd-endpoints", d.EtcdEndpoints, "comma separated `URLs` of etcd")
	fs.StringVar(&f.etcdPrefix, "etcd-prefix", "/coreos.com/network", "`key` prefix of this network in etcd")
	fs.StringVar(&f.etcdCertFile, "etcd-certfile", "", "client certificate `file` (PEM)")
	fs.StringVar(&f.etcdKeyFile, "etcd-keyfile", "", "client key `file` (PEM)")
	fs.StringVar(&f.etcdCAFile, "etcd-cafile", "", "`file` with the CA certificates that sign etcd's (PEM)")
	fs.StringVar(&f.etcdUsername, "etcd-username", "", "etcd user `name`")
	fs.StringVar(&f.etcdPassword, "etcd-password", "", "etcd `password`; better given through the environment")
}

// Register binds every flag of a node.
func (f *Flags) Register(fs *flag.FlagSet, d Defaults) {
	f.RegisterEtcd(fs, d)
	f.registerFlannel(fs)
	f.registerOwn(fs, d)
}

// registerFlannel binds the rest of flannel's flags (flannel main.go).
func (f *Flags) registerFlannel(fs *flag.FlagSet) {
	fs.Var(&f.iface, "iface", "underlay interface, by `name` or address; repeatable, the first that exists is used")
	fs.Var(&f.ifaceRegex, "iface-regex", "`regexp` for the address or name of the underlay interface; repeatable, tried after --iface")
	fs.StringVar(&f.ifaceCanReach, "iface-can-reach", "", "use the interface that routes to this `address`; tried last")
	fs.StringVar(&f.publicIP, "public-ip", "", "IPv4 `address` other nodes send to (default: the interface's)")
	fs.StringVar(&f.subnetFile, "subnet-file", "/run/flannel/subnet.env", "`file` the subnet and MTU are written to")
	fs.BoolVar(&f.ipMasq, "ip-masq", false, "masquerade traffic that leaves the overlay")
	fs.BoolVar(&f.ipMasqNoRandom, "ip-masq-fully-random-disable", false, "masquerade without --random-fully")
	fs.IntVar(&f.iptablesResync, "iptables-resync", 5, "`seconds` between checks of the iptables rules")
	fs.BoolVar(&f.iptablesForward, "iptables-forward-rules", true, "accept overlay traffic in the FORWARD chain")
	fs.BoolVar(&f.blackhole, "ip-blackhole-route", false, "keep a blackhole route for the own subnet")
	fs.StringVar(&f.healthzIP, "healthz-ip", "0.0.0.0", "`address` of the health server")
	fs.IntVar(&f.healthzPort, "healthz-port", 0, "`port` of the health server; 0 means none")
}

// registerOwn binds what flannel does not have.
func (f *Flags) registerOwn(fs *flag.FlagSet, d Defaults) {
	fs.StringVar(&f.mtu, "mtu", "", "overlay MTU in `bytes`, or max (default: from the underlay)")
	fs.StringVar(&f.tunName, "tun-name", d.TUNName, "`name` of the TUN device; a trailing %d picks a free number")
	fs.IntVar(&f.workers, "workers", 0, "`number` of packet workers; 0 chooses from the CPUs")
	fs.StringVar(&f.offload, "offload", "auto", "highest offload `rung` to use: auto, full, tso or none")
	fs.StringVar(&f.accelerate, "accelerate", "auto", "`whether` to carry packets inside the kernel where it can: auto or off")
	fs.StringVar(&f.framings, "listen-framings", "", "comma separated `framings` to receive, udp and vxlan (default: the network's)")
	fs.DurationVar(&f.leaseTTL, "lease-ttl", 24*time.Hour, "life`time` of the lease when it is not renewed")
	fs.BoolVar(&f.takeOver, "take-over", false, "take the lease with our public IP although another node id holds it")
	fs.BoolVar(&f.releaseOnExit, "release-on-exit", false, "give the lease back on a clean exit")
	fs.StringVar(&f.nodeName, "node-name", "", "`name` of this node in its lease and in status (default: the host name)")
	fs.StringVar(&f.stateDir, "state-dir", "", "`directory` for everything this engine keeps (default: see docs/operating.md)")
	fs.StringVar(&f.socket, "socket", "", "`path` of the API socket (default: api.sock in the state directory)")
	fs.StringVar(&f.metricsAddr, "metrics-addr", "", "`host:port` that serves Prometheus metrics (default: none)")
	fs.IntVar(&f.flightRecorder, "flight-recorder", 0, "keep the heads of the last `N` packets and the last N dropped ones for tweed capture --recorder; 0 keeps none")
	fs.StringVar(&f.impair, "impair", "", "treat what is sent as a bad network would, for tests: some of `loss=5%,reorder=2%,delay=20ms,seed=1`")
	fs.StringVar(&f.logLevel, "log-level", "info", "lowest `level` to log: debug, info, warn or error")
	fs.StringVar(&f.logFormat, "log-format", "text", "`format` of the log: text or json")
}

// LogLevel and LogFormat are the values for NewLogger.
func (f *Flags) LogLevel() string { return f.logLevel }

// LogFormat is the value of --log-format.
func (f *Flags) LogFormat() string { return f.logFormat }

// Etcd fills the part of a node's configuration that RegisterEtcd is about.
// Blanks around the endpoints are dropped; flannel keeps them and fails.
func (f *Flags) Etcd() node.Config {
	var endpoints []string
	for _, e := range strings.Split(f.etcdEndpoints, ",") {
		endpoints = append(endpoints, strings.TrimSpace(e))
	}
	return node.Config{
		EtcdEndpoints: endpoints,
		EtcdPrefix:    f.etcdPrefix,
		EtcdCertFile:  f.etcdCertFile, EtcdKeyFile: f.etcdKeyFile, EtcdCAFile: f.etcdCAFile,
		EtcdUsername: f.etcdUsername, EtcdPassword: f.etcdPassword,
	}
}

// Config makes a node's configuration of the values. Program, Version and Log
// are left to the caller. Only what has to be converted is checked here, by
// errors that name the flag; the rest is checked by node.New.
func (f *Flags) Config() (node.Config, error) {
	cfg := f.Etcd()
	var err error
	if cfg.Offload, err = tun.ParseOffload(f.offload); err != nil {
		return node.Config{}, fmt.Errorf("--offload %q: expected auto, full, tso or none", f.offload)
	}
	switch f.accelerate {
	case "auto":
		cfg.Accelerate = true
	case "off":
	default:
		return node.Config{}, fmt.Errorf("--accelerate %q: expected auto or off", f.accelerate)
	}
	if cfg.ListenFramings, err = parseFramings(f.framings); err != nil {
		return node.Config{}, err
	}
	if cfg.Impair, err = impair.Parse(f.impair); err != nil {
		return node.Config{}, fmt.Errorf("--impair %q: %w", f.impair, err)
	}
	// A node takes 0 for the default, which nobody who writes it means.
	if f.leaseTTL == 0 {
		return node.Config{}, fmt.Errorf("--lease-ttl 0: expected a time such as 30s, 5m or 24h")
	}
	if f.iptablesResync == 0 {
		return node.Config{}, fmt.Errorf("--iptables-resync 0: expected 1 second or more")
	}
	cfg.Iface, cfg.IfaceRegex, cfg.IfaceCanReach = f.iface, f.ifaceRegex, f.ifaceCanReach
	cfg.PublicIP = f.publicIP
	cfg.SubnetFile = f.subnetFile
	cfg.LeaseTTL, cfg.TakeOver, cfg.ReleaseOnExit = f.leaseTTL, f.takeOver, f.releaseOnExit
	cfg.IPMasq, cfg.IPMasqRandomFully = f.ipMasq, !f.ipMasqNoRandom
	cfg.IPTablesForward, cfg.IPTablesResync = f.iptablesForward, time.Duration(f.iptablesResync)*time.Second
	cfg.BlackholeRoute = f.blackhole
	cfg.TUNName, cfg.MTU, cfg.Workers = f.tunName, f.mtu, f.workers
	cfg.NodeName = f.nodeName
	cfg.FlightRecorder = f.flightRecorder
	cfg.StateDir, cfg.Socket = f.stateDir, f.socket
	cfg.MetricsAddr, cfg.HealthzIP, cfg.HealthzPort = f.metricsAddr, f.healthzIP, f.healthzPort
	return cfg, nil
}

func parseFramings(list string) ([]encap.Framing, error) {
	if list == "" {
		return nil, nil
	}
	var out []encap.Framing
	for _, name := range strings.Split(list, ",") {
		f, err := encap.ParseFraming(strings.TrimSpace(name))
		if err != nil {
			return nil, fmt.Errorf("--listen-framings %q: expected udp, vxlan or udp,vxlan", list)
		}
		if !slices.Contains(out, f) {
			out = append(out, f)
		}
	}
	return out, nil
}

// repeated is a flag that may be given more than once, one value each time.
type repeated []string

func (r *repeated) String() string { return strings.Join(*r, ",") }

func (r *repeated) Set(v string) error {
	*r = append(*r, v)
	return nil
}

// Values are the values one by one.
func (r *repeated) Values() []string { return *r }

// Type names the value in help texts, for flag packages that ask.
func (r *repeated) Type() string { return "name" }
