package node

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"tweed/lease"
	"tweed/netns"
	"tweed/tun"
)

// patience bounds every wait. It is generous: it only has to happen.
const patience = time.Minute

// testPrefix is the etcd prefix of every test; each has its own etcd.
const testPrefix = "/coreos.com/network"

// testEtcd is an embedded etcd that can be stopped and started again.
type testEtcd struct {
	t        *testing.T
	dir      string
	endpoint url.URL
	e        *embed.Etcd
}

func startEtcd(t *testing.T) *testEtcd {
	t.Helper()
	te := &testEtcd{t: t, dir: t.TempDir(), endpoint: url.URL{Scheme: "http", Host: "127.0.0.1:0"}}
	te.start()
	t.Cleanup(te.stop)
	return te
}

func (te *testEtcd) start() {
	te.t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = te.dir
	cfg.LogLevel = "panic"
	cfg.UnsafeNoFsync = true
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{te.endpoint}, []url.URL{te.endpoint}
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		te.t.Fatal(err)
	}
	te.e = e
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(patience):
		te.t.Fatal("etcd did not start")
	}
	te.endpoint.Host = e.Clients[0].Addr().String()
}

func (te *testEtcd) stop() {
	if te.e != nil {
		te.e.Close()
		te.e = nil
	}
}

// registry opens a registry that the test closes.
func (te *testEtcd) registry() *lease.Registry {
	te.t.Helper()
	r, err := lease.Open(lease.EtcdConfig{Endpoints: []string{te.endpoint.String()}, Prefix: testPrefix, Log: quiet()})
	if err != nil {
		te.t.Fatal(err)
	}
	te.t.Cleanup(func() { r.Close() })
	return r
}

func (te *testEtcd) setNetwork(config string) {
	te.t.Helper()
	cfg, err := lease.ParseNetworkConfig([]byte(config))
	if err != nil {
		te.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := te.registry().WriteNetworkConfig(ctx, cfg); err != nil {
		te.t.Fatal(err)
	}
}

func (te *testEtcd) leases() []lease.Lease {
	te.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ls, _, err := te.registry().ListLeases(ctx)
	if err != nil {
		te.t.Fatal(err)
	}
	return ls
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// testLog writes a node's log lines to the test's, for when it fails.
func testLog(t *testing.T, name string) *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})).With("node", name)
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimRight(string(b), "\n"))
	return len(b), nil
}

// testNode is a running node.
type testNode struct {
	*Node
	t      *testing.T
	cfg    Config
	ns     *netns.Namespace
	client *Client
	cancel context.CancelFunc
	ended  chan error
}

func baseConfig(t *testing.T, te *testEtcd, name string) Config {
	t.Helper()
	needTUN(t)
	dir := t.TempDir()
	return Config{
		EtcdEndpoints: []string{te.endpoint.String()}, EtcdPrefix: testPrefix,
		Iface: []string{netns.LANInterface}, NodeName: name,
		SubnetFile: filepath.Join(dir, "run", "subnet.env"), StateDir: filepath.Join(dir, "state"),
		Workers: 1, Offload: tun.OffloadAuto, Log: testLog(t, name),
	}
}

// begin runs a node in a namespace without waiting for it.
func begin(t *testing.T, ns *netns.Namespace, cfg Config) *testNode {
	t.Helper()
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	tn := &testNode{
		Node: n, t: t, cfg: cfg, ns: ns, cancel: cancel, ended: make(chan error, 1),
		client: Dial(filepath.Join(cfg.StateDir, socketName)),
	}
	go func() {
		tn.ended <- ns.Do(func() error { return n.Run(ctx) })
		close(tn.ended)
	}()
	t.Cleanup(func() { _ = tn.stop() })
	return tn
}

// up runs a node and waits until it forwards.
func up(t *testing.T, ns *netns.Namespace, cfg Config) *testNode {
	t.Helper()
	tn := begin(t, ns, cfg)
	select {
	case <-tn.Ready():
	case err := <-tn.ended:
		t.Fatalf("node ended: %v", err)
	case <-time.After(patience):
		t.Fatalf("node is not ready: %+v", tn.status())
	}
	return tn
}

func (tn *testNode) stop() error {
	tn.cancel()
	tn.client.Close()
	select {
	case err := <-tn.ended:
		return err
	case <-time.After(patience):
		tn.t.Fatal("node does not stop")
		return nil
	}
}

func (tn *testNode) get() Status {
	tn.t.Helper()
	s, err := tn.client.Status(context.Background())
	if err != nil {
		tn.t.Fatal(err)
	}
	return s
}

// until waits for a condition on the status.
func (tn *testNode) until(what string, ok func(Status) bool) Status {
	tn.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		s := tn.get()
		if ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			tn.t.Fatalf("%s: not reached: %+v", what, s)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (tn *testNode) untilPeers(n int) Status {
	tn.t.Helper()
	return tn.until("peers", func(s Status) bool { return s.Etcd.Synced && s.Peers["udp"]+s.Peers["vxlan"] == n })
}

func lan(t *testing.T, c netns.LANConfig) *netns.LAN {
	t.Helper()
	l, err := netns.NewLAN(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// echo answers every datagram at the node's overlay address until the test ends.
func (tn *testNode) echo() netip.AddrPort {
	tn.t.Helper()
	addr := netip.AddrPortFrom(tn.get().Device.Address, 7)
	var c *net.UDPConn
	err := tn.ns.Do(func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(addr))
		return err
	})
	if err != nil {
		tn.t.Fatal(err)
	}
	tn.t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	return addr
}

// reach sends datagrams from the node's overlay address until one is answered.
func (tn *testNode) reach(to netip.AddrPort, size int) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := tn.tryReach(to, size)
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

func (tn *testNode) tryReach(to netip.AddrPort, size int) error {
	var c *net.UDPConn
	err := tn.ns.Do(func() (err error) {
		c, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write(make([]byte, size)); err != nil {
		return err
	}
	if err := c.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		return err
	}
	n, err := c.Read(make([]byte, 65536))
	if err == nil && n != size {
		err = errors.New("answer of another size")
	}
	return err
}

func checkLedger(t *testing.T, s Status) {
	t.Helper()
	for name, d := range map[string]DirectionLedger{"tx": s.Ledger.Tx, "rx": s.Ledger.Rx} {
		sum := d.Delivered
		for _, v := range d.Drops {
			sum += v
		}
		if sum != d.Packets {
			t.Errorf("%s ledger: %d packets, %d accounted for: %+v", name, d.Packets, sum, d)
		}
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range es {
		// etcd keeps opening its own database files; count what a node opens.
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && (strings.Contains(target, "tun") || strings.HasPrefix(target, "net:[") || target == "anon_inode:[eventfd]") {
			n++
		}
	}
	return n
}
