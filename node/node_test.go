package node

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"

	"tweed/encap"
	"tweed/lease"
	"tweed/netns"
)

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
		{"second engine on the port", "UDP port 8472 of 192.0.2.11 is in use by another engine (pid ", nil, func() func() {
			var k *nsLock
			err := ns.Do(func() (err error) {
				k, err = lockNamespace("udp/192.0.2.11:8472", "UDP port 8472 of 192.0.2.11")
				return err
			})
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
			case <-time.After(patience):
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

// TestNewUnderlayAddressIsFollowed, by the options that leave the choice to the
// host; an address that was asked for is waited for.
func TestNewUnderlayAddressIsFollowed(t *testing.T) {
	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.244.0.0/16"}`)
	l := lan(t, netns.LANConfig{Nodes: 2})
	a := up(t, l.Nodes[0], baseConfig(t, te, "a"))
	fixed := baseConfig(t, te, "b")
	fixed.Iface = []string{"192.0.2.12"}
	b := up(t, l.Nodes[1], fixed)
	a.untilPeers(1)
	b.untilPeers(1)
	before, to := a.get(), b.echo()
	change := func(ns *netns.Namespace, from, to string) {
		t.Helper()
		nl, err := ns.Netlink()
		if err != nil {
			t.Fatal(err)
		}
		defer nl.Close()
		eth := mustLink(t, nl, netns.LANInterface)
		at := func(ip string) *netlink.Addr { return &netlink.Addr{IPNet: ipNetOf(netip.MustParsePrefix(ip + "/24"))} }
		if err := errors.Join(nl.AddrDel(eth, at(from)), nl.AddrAdd(eth, at(to))); err != nil {
			t.Fatal(err)
		}
	}
	for _, next := range []string{"192.0.2.77", "192.0.2.78", "192.0.2.11"} {
		change(l.Nodes[0], a.get().Underlay.Address.String(), next)
		s := a.until(next, func(s Status) bool {
			return s.Lease.PublicIP.String() == next && s.Underlay.Address.String() == next && len(s.Problems) == 0
		})
		if s.Lease.Subnet != before.Lease.Subnet || s.Device != before.Device || s.Listen[0].Addr.String() != next+":8285" {
			t.Errorf("status %+v, was %+v", s, before)
		}
		if err := a.reach(to, 1000); err != nil {
			t.Error(err)
		}
	}
	checkLedger(t, a.get())

	change(l.Nodes[1], "192.0.2.12", "192.0.2.99")
	const want = "no longer has the address 192.0.2.12: give it back, or an address the options allow, which is then used (--iface 192.0.2.12: no interface has this address"
	b.until("the problem", func(s Status) bool { return strings.Contains(strings.Join(s.Problems, "\n"), want) })
	change(l.Nodes[1], "192.0.2.99", "192.0.2.12")
	b.until("no problem", func(s Status) bool { return len(s.Problems) == 0 })
	if err := a.reach(to, 1000); err != nil {
		t.Error(err)
	}
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
