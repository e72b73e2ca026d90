package inproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"sync"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"tweed/encap"
	"tweed/engine/impair"
	"tweed/lease"
	"tweed/node"
)

// etcdStart bounds the start of the embedded etcd.
const etcdStart = 30 * time.Second

// DefaultNetwork is the network of a [Network] that names none.
var DefaultNetwork = netip.MustParsePrefix("10.99.0.0/16")

// NetworkConfig describes a network of nodes in one program.
type NetworkConfig struct {
	// Network is the overlay's address range, default DefaultNetwork. Every node
	// gets a /24 of it.
	Network netip.Prefix
	// Framing of the network; the zero value is udp.
	Framing encap.Framing
	// MTU of the overlay in bytes, as --mtu takes it; empty derives it from
	// loopback's, "1426" is that of an ordinary network.
	MTU string
	// Impair makes a bad network of the overlay: every node loses, delays and
	// reorders what it sends. The n-th node's seed is n more.
	Impair impair.Spec
	// Log receives the events of all nodes; nil discards them.
	Log *slog.Logger
}

// Network is an etcd of its own and the nodes started in it. Its methods are
// safe for concurrent use.
type Network struct {
	// Endpoint is the URL of its etcd, for programs that are to join.
	Endpoint string

	c    NetworkConfig
	dir  string
	etcd *embed.Etcd

	mu    sync.Mutex
	grpc  []*grpc.Server
	nodes []*Node
	// started counts the calls of Start.
	started int
}

// NewNetwork starts the etcd, on a loopback port of its own, and writes the
// network config. The caller closes the Network.
func NewNetwork(c NetworkConfig) (*Network, error) {
	if !c.Network.IsValid() {
		c.Network = DefaultNetwork
	}
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	w := &Network{c: c}
	if err := w.start(); err != nil {
		return nil, errors.Join(fmt.Errorf("inproc: %w", err), w.Close())
	}
	return w, nil
}

func (w *Network) start() error {
	var err error
	if w.dir, err = os.MkdirTemp("", "tweed-etcd-"); err != nil {
		return err
	}
	cfg := embed.NewConfig()
	any := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	name := url.URL{Scheme: "http", Host: "127.0.0.1:2380"} // of a member without peers
	cfg.Dir = w.dir
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{any}, []url.URL{any}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = nil, []url.URL{name}
	cfg.InitialCluster = cfg.Name + "=" + name.String()
	cfg.EnableGRPCGateway = false
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.UnsafeNoFsync = true // nothing of it outlives the program
	cfg.ServiceRegister = func(g *grpc.Server) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.grpc = append(w.grpc, g)
	}
	if w.etcd, err = embed.StartEtcd(cfg); err != nil {
		return fmt.Errorf("etcd: %w", err)
	}
	select {
	case <-w.etcd.Server.ReadyNotify():
	case err := <-w.etcd.Err():
		return fmt.Errorf("etcd: %w", err)
	case <-time.After(etcdStart):
		return errors.New("etcd did not start")
	}
	w.Endpoint = "http://" + w.etcd.Clients[0].Addr().String()
	return w.configure()
}

// configure writes the network config.
func (w *Network) configure() error {
	reg, err := lease.Open(lease.EtcdConfig{Endpoints: []string{w.Endpoint}, Prefix: node.DefaultEtcdPrefix, Log: w.c.Log})
	if err != nil {
		return err
	}
	defer reg.Close()
	cfg, err := lease.ParseNetworkConfig(fmt.Appendf(nil, `{"Network":%q,"Backend":{"Type":%q}}`, w.c.Network, w.c.Framing))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), etcdStart)
	defer cancel()
	return reg.WriteNetworkConfig(ctx, cfg)
}

// Start starts a node in the network and waits until it is ready, or ctx ends.
func (w *Network) Start(ctx context.Context, name string) (*Node, error) {
	spec := w.c.Impair
	w.mu.Lock()
	spec.Seed += uint64(w.started)
	w.started++
	w.mu.Unlock()
	n, err := Start(ctx, Config{EtcdEndpoints: []string{w.Endpoint}, Name: name, MTU: w.c.MTU, Impair: spec, Log: w.c.Log})
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nodes = append(w.nodes, n)
	return n, nil
}

// Await waits until every node of the network knows all the others, or ctx
// ends. Right after their starts they may not.
func (w *Network) Await(ctx context.Context) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		w.mu.Lock()
		known := true
		for _, n := range w.nodes {
			known = known && n.Node.Peers() >= len(w.nodes)-1
		}
		w.mu.Unlock()
		if known {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("inproc: the nodes do not all know each other: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// Close stops all nodes and the etcd and removes its data.
func (w *Network) Close() error {
	w.mu.Lock()
	nodes := w.nodes
	w.nodes = nil
	servers := w.grpc
	w.mu.Unlock()
	var errs []error
	for _, n := range nodes {
		errs = append(errs, n.Close())
	}
	if w.etcd != nil {
		for _, g := range servers {
			g.Stop() // or etcd would wait for the watches to end by themselves
		}
		w.etcd.Close()
	}
	if w.dir != "" {
		errs = append(errs, os.RemoveAll(w.dir))
	}
	return errors.Join(errs...)
}
