package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/attach"
	"tweed/encap"
	"tweed/lease"
	"tweed/netns"
	"tweed/node"
	"tweed/probe"
)

const (
	// echoPatience is how long a peer has to answer one echo request; each is
	// asked echoTries times.
	echoPatience = time.Second
	echoTries    = 2
	// maxEchoes is how many peers are asked at a time.
	maxEchoes = 32
)

// facts are what doctor found. Absent parts are those that do not apply.
type facts struct {
	// status is nil without an engine, noEngine then says why; named says that
	// the engine was asked for by its place.
	status    *node.Status
	noEngine  error
	named     bool
	elsewhere bool // the engine's network namespace is another
	// privileged says that this command could do what tweed up does.
	privileged bool

	clockSynced bool
	clockErr    error
	tun         *attach.Verdict // nil when the device node opens
	usernsErr   error

	// Without an engine.
	endpoints string
	network   lease.NetworkConfig
	etcdErr   error
	etcdNext  string
	ports     []portFact

	underlay    node.UnderlayStatus
	underlayErr error

	ipForward     string
	forwardPolicy string
	forwardErr    error

	peers, silent []node.PeerStatus
	pingSkipped   string // why no peer was asked
}

type portFact struct {
	framing encap.Framing
	port    uint16
	err     error
}

// doctor is the command line.
type doctor struct {
	etcd  etcdCommand
	iface []string
}

// gather looks at everything. The error is one of usage.
func (d *doctor) gather(cmd *cobra.Command, c *client) (facts, error) {
	ctx := cmd.Context()
	f := facts{privileged: netns.CheckPrivileges() == nil, named: c.socket != "" || c.stateDir != ""}
	api, err := c.dial()
	switch {
	case err == nil:
		defer api.Close()
		s, err := api.Status(ctx)
		if err == nil {
			f.status = &s
			f.askEngine(ctx, api)
		}
		f.noEngine = err
	case errors.Is(err, node.ErrNoEngine):
		f.noEngine = err
	default:
		return f, err
	}
	f.clockSynced, f.clockErr = clockSynced()
	f.tun, f.usernsErr = attach.CheckDevice(), checkUserNamespace()
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err == nil {
		f.ipForward = strings.TrimSpace(string(b))
	}
	if f.hostIsNode() {
		f.forwardPolicy, f.forwardErr = forwardPolicy(ctx)
	}
	if f.status != nil {
		f.underlay = f.status.Underlay
		return f, nil
	}
	f.underlay, f.underlayErr = node.FindUnderlay(node.Config{Iface: d.iface})
	return f, d.askEtcd(cmd, &f)
}

// askEngine reads the peers of the running engine and asks each for an echo.
func (f *facts) askEngine(ctx context.Context, api *node.Client) {
	own, err := os.Readlink("/proc/self/ns/net")
	theirs, terr := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", f.status.PID))
	f.elsewhere = err == nil && terr == nil && own != theirs
	a, err := api.Peers(ctx)
	switch f.peers = a.Peers; {
	case err != nil:
		f.pingSkipped = err.Error()
	case f.status.Device.AttachOnly:
		f.pingSkipped = "this host has no address of the overlay, its containers do"
	case f.elsewhere:
		f.pingSkipped = "the engine is in another network namespace"
	case f.status.Ready:
		f.silent, err = silentPeers(f.peers, func(p node.PeerStatus) error {
			ctx, cancel := context.WithTimeout(ctx, echoPatience)
			defer cancel()
			_, err := probe.Ping(ctx, here{}, f.status.Device.Address, p.Subnet.Addr(), 56)
			return err
		})
		if err != nil {
			f.pingSkipped = "run as root for that"
		}
	}
}

// here is the place of this process.
type here struct{}

func (here) Do(f func() error) error { return f() }

// silentPeers are those that do not answer echo, in order. The error is that of
// a command that may not ask.
func silentPeers(peers []node.PeerStatus, echo func(node.PeerStatus) error) ([]node.PeerStatus, error) {
	errs := make([]error, len(peers))
	slots := make(chan struct{}, maxEchoes)
	var wg sync.WaitGroup
	for i, p := range peers {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			for range echoTries {
				if errs[i] = echo(p); errs[i] == nil || errors.Is(errs[i], os.ErrPermission) {
					return
				}
			}
		})
	}
	wg.Wait()
	var silent []node.PeerStatus
	for i, err := range errs {
		if errors.Is(err, os.ErrPermission) {
			return nil, err
		}
		if err != nil {
			silent = append(silent, peers[i])
		}
	}
	return silent, nil
}

// askEtcd reads the network config, and looks whether its port is free.
func (d *doctor) askEtcd(cmd *cobra.Command, f *facts) error {
	cfg := d.etcd.flags.Etcd()
	f.endpoints = strings.Join(cfg.EtcdEndpoints, ",")
	var usage *usageError
	f.etcdErr = d.etcd.do(cmd, func(ctx context.Context, r *lease.Registry) (err error) {
		f.network, err = r.ReadNetworkConfig(ctx)
		return err
	})
	if errors.As(f.etcdErr, &usage) {
		return f.etcdErr
	}
	f.etcdNext = "tweed doctor --etcd-endpoints URL, or tweed etcd to start one"
	if errors.Is(f.etcdErr, lease.ErrNoConfig) {
		f.etcdNext = "tweed network set 10.244.0.0/16"
	}
	framings := []encap.Framing{encap.FramingUDP, encap.FramingVXLAN}
	port := uint16(0)
	if f.etcdErr == nil {
		if framing, err := encap.ParseFraming(f.network.Backend.Type); err == nil {
			framings, port = []encap.Framing{framing}, f.network.Backend.Port
		}
	}
	for _, framing := range framings {
		p := portFact{framing: framing, port: port}
		if p.port == 0 {
			p.port = framing.DefaultPort()
		}
		p.err = portFree(p.port)
		f.ports = append(f.ports, p)
	}
	return nil
}

// portFree tries a port on all addresses.
func portFree(port uint16) error {
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.IPv4Unspecified(), port)))
	if err != nil {
		var call *os.SyscallError
		if errors.As(err, &call) {
			return call.Err
		}
		return err
	}
	return c.Close()
}

// clockSynced reports whether the kernel's clock is kept in step.
func clockSynced() (bool, error) {
	state, err := unix.Adjtimex(&unix.Timex{})
	return state != unix.TIME_ERROR, err
}

// forwardPolicy is that of iptables' FORWARD chain.
func forwardPolicy(ctx context.Context) (string, error) {
	path, err := exec.LookPath("iptables")
	if err != nil {
		return "ACCEPT", nil // nobody has set another
	}
	ctx, cancel := context.WithTimeout(ctx, factTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "-S", "FORWARD").CombinedOutput()
	first, _, _ := strings.Cut(string(out), "\n")
	policy, found := strings.CutPrefix(first, "-P FORWARD ")
	if err != nil || !found {
		return "", fmt.Errorf("iptables -S FORWARD: %s", orDash(first))
	}
	return policy, nil
}
