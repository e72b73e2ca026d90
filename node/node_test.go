package node

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/goleak"

	"tweed/encap"
	"tweed/lease"
	"tweed/netns"
	"tweed/tun"
)

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
	case <-time.After(60 * time.Second):
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
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := te.registry().WriteNetworkConfig(ctx, cfg); err != nil {
		te.t.Fatal(err)
	}
}

func (te *testEtcd) leases() []lease.Lease {
	te.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
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
	case <-time.After(20 * time.Second):
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
	case <-time.After(20 * time.Second):
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
	deadline := time.Now().Add(20 * time.Second)
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
	var err error
	for range 100 {
		if err = tn.tryReach(to, size); err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
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

func TestTwoNodesForwardInBothFramings(t *testing.T) {
	for _, backend := range []string{"udp", "vxlan"} {
		t.Run(backend, func(t *testing.T) {
			te := startEtcd(t)
			te.setNetwork(`{"Network":"10.244.0.0/16","Backend":{"Type":"` + backend + `"}}`)
			l := lan(t, netns.LANConfig{Nodes: 2})
			a := up(t, l.Nodes[0], baseConfig(t, te, "a"))
			b := up(t, l.Nodes[1], baseConfig(t, te, "b"))
			s := a.untilPeers(1)
			b.untilPeers(1)
			to := b.echo()
			for _, size := range []int{1, 1000, 20000} {
				if err := a.reach(to, size); err != nil {
					t.Fatalf("%d bytes: %v", size, err)
				}
			}
			want, _ := encap.ParseFraming(backend)
			if mtu := want.DefaultMTU(1500); s.Device.MTU != mtu || !s.Ready || s.Phase != PhaseRunning {
				t.Errorf("status %+v: expected MTU %d, ready and running", s, mtu)
			}
			if len(s.Problems) != 0 {
				t.Errorf("problems: %v", s.Problems)
			}
			p, err := a.client.Peers(context.Background())
			if err != nil || len(p.Peers) != 1 || p.Peers[0].Framing != want || p.Peers[0].NodeName != "b" || p.Peers[0].Source != "etcd" {
				t.Errorf("peers %+v, %v", p, err)
			}
			ra, err := a.client.Route(context.Background(), to.Addr())
			if err != nil || ra.Result != "peer" || ra.Peer.Subnet != p.Peers[0].Subnet {
				t.Errorf("route %+v, %v", ra, err)
			}
			f, err := lease.ReadSubnetFile(a.cfg.SubnetFile)
			if err != nil || f.MTU != s.Device.MTU || f.Subnet != s.Lease.Subnet || f.Network.String() != "10.244.0.0/16" {
				t.Errorf("subnet file %+v, %v", f, err)
			}
			checkLedger(t, a.get())
			checkLedger(t, b.get())
		})
	}
}

func TestStopRemovesDeviceAndRoutesAndKeepsTheLease(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16"}`)
	l := lan(t, netns.LANConfig{Nodes: 1})
	before := snapshotNet(t, l.Nodes[0])
	a := up(t, l.Nodes[0], baseConfig(t, te, "a"))
	own := a.get().Lease.Subnet
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	if after := snapshotNet(t, l.Nodes[0]); after != before {
		t.Errorf("left behind:\nbefore %s\nafter  %s", before, after)
	}
	if ls := te.leases(); len(ls) != 1 || ls[0].Subnet != own {
		t.Errorf("leases %+v, expected %s to be kept", ls, own)
	}
	if _, err := os.Stat(filepath.Join(a.cfg.StateDir, socketName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket is still there: %v", err)
	}
	b := up(t, l.Nodes[0], a.cfg)
	if got := b.get().Lease.Subnet; got != own {
		t.Errorf("subnet %s after a restart, expected %s", got, own)
	}
}

func TestReleaseOnExitGivesTheLeaseBack(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16"}`)
	l := lan(t, netns.LANConfig{Nodes: 1})
	cfg := baseConfig(t, te, "a")
	cfg.ReleaseOnExit = true
	a := up(t, l.Nodes[0], cfg)
	a.untilPeers(0)
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	if ls := te.leases(); len(ls) != 0 {
		t.Errorf("leases %+v, expected none", ls)
	}
	if _, err := os.Stat(filepath.Join(cfg.StateDir, snapshotFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("snapshot of a released lease is still there: %v", err)
	}
}

func TestForwardsFromTheSnapshotWithoutEtcdAndKeepsTheSubnet(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`)
	l := lan(t, netns.LANConfig{Nodes: 2})
	a := up(t, l.Nodes[0], baseConfig(t, te, "a"))
	b := up(t, l.Nodes[1], baseConfig(t, te, "b"))
	a.untilPeers(1)
	b.untilPeers(1)
	own := a.get().Lease.Subnet
	to := b.echo()
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	te.stop()
	a = up(t, l.Nodes[0], a.cfg)
	s := a.get()
	if s.Phase != PhaseCached || s.Lease.Subnet != own || s.Lease.State != ownCached || len(s.Problems) == 0 {
		t.Errorf("status %+v: expected phase cached with subnet %s and a problem", s, own)
	}
	if err := a.reach(to, 100); err != nil {
		t.Fatal(err)
	}
	te.start()
	s = a.until("joined", func(s Status) bool { return s.Phase == PhaseRunning && s.Etcd.Synced })
	if s.Lease.Subnet != own || s.Lease.Source != "etcd" {
		t.Errorf("lease %+v, expected %s from etcd", s.Lease, own)
	}
	if err := a.reach(to, 100); err != nil {
		t.Fatal(err)
	}
	checkLedger(t, a.get())
}

func TestDeletedOrDisturbedDeviceIsRestored(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16"}`)
	l := lan(t, netns.LANConfig{Nodes: 2})
	a := up(t, l.Nodes[0], baseConfig(t, te, "a"))
	b := up(t, l.Nodes[1], baseConfig(t, te, "b"))
	a.untilPeers(1)
	b.untilPeers(1)
	to := b.echo()
	nl, err := l.Nodes[0].Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	disturb := map[string]func() error{
		"set down": func() error { return nl.LinkSetDown(mustLink(t, nl, DefaultTUNName)) },
		"route deleted": func() error {
			rs, err := mainRoutes(nl)
			if err != nil {
				return err
			}
			for _, r := range rs {
				if r.Protocol == routeProtocol {
					return nl.RouteDel(&r)
				}
			}
			return errors.New("no route of ours")
		},
		"MTU changed":    func() error { return nl.LinkSetMTU(mustLink(t, nl, DefaultTUNName), 1000) },
		"device deleted": func() error { return nl.LinkDel(mustLink(t, nl, DefaultTUNName)) },
	}
	for what, do := range disturb {
		before := a.get().Ledger.Tx.Packets
		if err := do(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if err := a.reach(to, 1300); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if now := a.get().Ledger.Tx.Packets; now < before {
			t.Errorf("%s: the ledger went back from %d to %d packets", what, before, now)
		}
		a.until(what, func(s Status) bool { return mustLink(t, nl, DefaultTUNName).Attrs().MTU == s.Device.MTU })
	}
	if s := a.get(); s.Device.Recreated != 1 {
		t.Errorf("device made again %d times, expected 1", s.Device.Recreated)
	}
}

func TestGrownNetworkIsAppliedLive(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.64.0.0/16"}`)
	l := lan(t, netns.LANConfig{Nodes: 1})
	a := up(t, l.Nodes[0], baseConfig(t, te, "a"))
	a.untilPeers(0)
	te.setNetwork(`{"Network":"10.64.0.0/12"}`)
	want := netip.MustParsePrefix("10.64.0.0/12")
	a.until("wider network", func(s Status) bool { return s.Network.Network == want })
	nl, err := l.Nodes[0].Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	if got := ourRoutes(t, nl); len(got) != 1 || got[0] != want {
		t.Errorf("routes %v, expected %s alone", got, want)
	}
	if f, err := lease.ReadSubnetFile(a.cfg.SubnetFile); err != nil || f.Network != want {
		t.Errorf("subnet file %+v, %v", f, err)
	}
}

// TestFailedStartsLeaveNothing tries what an operator gets wrong: one line,
// naming the thing, and nothing on disk, in etcd or in the namespace.
func TestFailedStartsLeaveNothing(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`)
	l := lan(t, netns.LANConfig{Nodes: 1})
	ns := l.Nodes[0]
	for _, c := range []struct {
		name   string
		want   string
		change func(*Config)
		setup  func() (undo func())
	}{
		{"no such interface", "--iface eth9: no such interface (have: lo, eth0)", func(c *Config) { c.Iface = []string{"eth9"} }, nil},
		{"no default route", "no default route", func(c *Config) { c.Iface = nil }, nil},
		{"MTU above the limit", "MTU 1451 is above the limit of 1450", func(c *Config) { c.MTU = "1451" }, nil},
		{"port in use", "8472 is in use", nil, func() func() {
			var c *net.UDPConn
			err := ns.Do(func() (err error) { c, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 8472}); return err })
			if err != nil {
				t.Fatal(err)
			}
			return func() { c.Close() }
		}},
		{"second engine on the port", "UDP port 8472 is in use by another engine (pid ", nil, func() func() {
			var k *nsLock
			err := ns.Do(func() (err error) { k, err = lockNamespace("udp/8472", "UDP port 8472"); return err })
			if err != nil {
				t.Fatal(err)
			}
			return k.release
		}},
		{"route conflict", "route 10.244.0.0/16 exists already, dev eth0", nil, func() func() {
			nl, err := ns.Netlink()
			if err != nil {
				t.Fatal(err)
			}
			r := foreignRoute(t, nl, "10.244.0.0/16")
			return func() { _ = nl.RouteDel(r); nl.Close() }
		}},
		{"socket path too long", "longer than", func(c *Config) { c.Socket = filepath.Join(c.StateDir, strings.Repeat("x", 120)) }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := baseConfig(t, te, "a")
			if c.change != nil {
				c.change(&cfg)
			}
			before := snapshotNet(t, ns)
			if c.setup != nil {
				defer c.setup()()
				before = snapshotNet(t, ns)
			}
			tn := begin(t, ns, cfg)
			var err error
			select {
			case err = <-tn.ended:
			case <-time.After(20 * time.Second):
				t.Fatalf("node goes on: %+v", tn.status())
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q, expected one line with %q", err, c.want)
			}
			if after := snapshotNet(t, ns); after != before {
				t.Errorf("left behind:\nbefore %s\nafter  %s", before, after)
			}
			for _, p := range []string{filepath.Dir(cfg.SubnetFile), cfg.StateDir} {
				if _, err := os.Stat(p); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s was written", p)
				}
			}
		})
	}
	if ls := te.leases(); len(ls) != 0 {
		t.Errorf("leases %+v, expected none", ls)
	}
}

func TestStopWhileWaitingForEtcdLeavesNothing(t *testing.T) {
	te := startEtcd(t)
	te.stop()
	l := lan(t, netns.LANConfig{Nodes: 1})
	before := snapshotNet(t, l.Nodes[0])
	cfg := baseConfig(t, te, "a")
	a := begin(t, l.Nodes[0], cfg)
	for {
		if s, err := a.client.Status(context.Background()); err == nil && s.Phase == PhaseWaiting && s.Etcd.LastError != "" {
			if s.Ready || len(s.Problems) == 0 {
				t.Errorf("status %+v: expected not ready and a problem", s)
			}
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	if after := snapshotNet(t, l.Nodes[0]); after != before {
		t.Errorf("left behind:\nbefore %s\nafter  %s", before, after)
	}
	if _, err := os.Stat(cfg.StateDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the state directory was written")
	}
}

func TestBackendChangedWhileAwayIsTakenUpAfterACachedStart(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16"}`)
	l := lan(t, netns.LANConfig{Nodes: 2})
	a := up(t, l.Nodes[0], baseConfig(t, te, "a"))
	a.untilPeers(0)
	own := a.get().Lease.Subnet
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	te.setNetwork(`{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`)
	b := up(t, l.Nodes[1], baseConfig(t, te, "b"))
	b.untilPeers(1)
	to := b.echo()
	te.stop()
	a = up(t, l.Nodes[0], a.cfg)
	if s := a.get(); s.Phase != PhaseCached || s.Framing != encap.FramingUDP {
		t.Errorf("status %+v: expected cached and udp", s)
	}
	te.start()
	s := a.until("joined", func(s Status) bool { return s.Phase == PhaseRunning && s.Peers["vxlan"] == 1 })
	if s.Framing != encap.FramingVXLAN || s.Lease.Subnet != own || s.Device.MTU != 1450 || s.Lease.BackendType != "vxlan" {
		t.Errorf("status %+v: expected vxlan, MTU 1450 and subnet %s", s, own)
	}
	if err := a.reach(to, 1400); err != nil {
		t.Error(err)
	}
}

func TestPublicIPOfAnotherNodeIsRefused(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16"}`)
	site1, site2 := lan(t, netns.LANConfig{Nodes: 1}), lan(t, netns.LANConfig{Nodes: 1})
	up(t, site1.Nodes[0], baseConfig(t, te, "first"))
	cfg := baseConfig(t, te, "second")
	err := <-begin(t, site2.Nodes[0], cfg).ended
	if !errors.Is(err, lease.ErrPublicIPTaken) || !strings.Contains(err.Error(), `"first"`) || !strings.Contains(err.Error(), `"second"`) || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v, expected one line naming both nodes", err)
	}
	if _, err := os.Stat(cfg.StateDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the state directory was written")
	}
}

func TestLostUnderlayAddressIsAProblemAndNothingMore(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16"}`)
	l := lan(t, netns.LANConfig{Nodes: 1})
	a := up(t, l.Nodes[0], baseConfig(t, te, "a"))
	nl, err := l.Nodes[0].Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	eth := mustLink(t, nl, netns.LANInterface)
	addrs, err := nl.AddrList(eth, netlink.FAMILY_V4)
	if err != nil || len(addrs) != 1 {
		t.Fatal(addrs, err)
	}
	if err := nl.AddrDel(eth, &addrs[0]); err != nil {
		t.Fatal(err)
	}
	a.until("problem", func(s Status) bool {
		return strings.Contains(strings.Join(s.Problems, "\n"), "no longer has the address 192.0.2.11")
	})
	addrs[0].Flags = 0
	if err := nl.AddrAdd(eth, &addrs[0]); err != nil {
		t.Fatal(err)
	}
	a.until("no problem", func(s Status) bool { return len(s.Problems) == 0 })
}

func TestSecondEngineNamesTheFirst(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16"}`)
	l := lan(t, netns.LANConfig{Nodes: 2})
	a := up(t, l.Nodes[0], baseConfig(t, te, "a"))
	second := baseConfig(t, te, "b")
	if err := <-begin(t, l.Nodes[0], second).ended; err == nil || !strings.Contains(err.Error(), "TUN device tweed0 is in use by another engine (pid ") {
		t.Errorf("same name: %v", err)
	}
	second.TUNName = "other0"
	second.StateDir = a.cfg.StateDir
	if err := <-begin(t, l.Nodes[1], second).ended; err == nil || !strings.Contains(err.Error(), "is in use by another engine (pid ") {
		t.Errorf("same state directory: %v", err)
	}
}

func TestNothingRunsAfterRun(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16"}`)
	l := lan(t, netns.LANConfig{Nodes: 1})
	ignore := goleak.IgnoreCurrent()
	fds := openFiles(t)
	a := up(t, l.Nodes[0], baseConfig(t, te, "a"))
	a.untilPeers(0)
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	goleak.VerifyNone(t, ignore)
	if now := openFiles(t); now > fds {
		t.Errorf("%d open files after the run, %d before", now, fds)
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
