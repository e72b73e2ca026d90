package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"golang.org/x/sys/unix"

	"tweed/encap"
	"tweed/netns"
	"tweed/node"
	"tweed/probe"
)

// TestMigrationToAnotherFraming: node 1 still runs udp, the config says vxlan,
// node 2 follows it, and node 3 receives both.
func TestMigrationToAnotherFraming(t *testing.T) {
	w := newWorld(t, 3)
	w.config(udpConfig)
	old := w.up(0)
	w.config(vxlanConfig)
	s := old.await("a word about the new config", func(s node.Status) bool { return s.Network.Pending != "" })
	if !strings.Contains(strings.ToLower(s.Network.Pending), "vxlan") || s.Network.Backend != "udp" || !s.Ready {
		t.Errorf("node 1: backend %s, ready %t, pending %q", s.Network.Backend, s.Ready, s.Network.Pending)
	}
	young := w.up(1)
	both := w.up(2, "--listen-framings", "udp,vxlan")
	// All three, not only the one asked: a node refuses what comes from an
	// address whose lease it has not seen yet.
	awaitPeers(2, old, young, both)
	if got := len(both.status().Listen); got != 2 {
		t.Errorf("node 3 listens %d times, want 2", got)
	}
	framings := map[netip.Addr]encap.Framing{}
	peers, err := both.api.Peers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range peers.Peers {
		framings[p.Endpoint.Addr()] = p.Framing
	}
	if framings[old.underlay()] != encap.FramingUDP || framings[young.underlay()] != encap.FramingVXLAN {
		t.Errorf("node 3 sends %v, want udp to node 1 and vxlan to node 2", framings)
	}
	sizes := []int{1, 1400, 30000}
	assertTraffic(t, both.host(), young.host(), 4<<20, sizes)
	assertTraffic(t, both.host(), old.host(), 4<<20, sizes)
	assertBalance(t, both)
}

// TestNetworkGrowsUnderTraffic: from /16 to /12, live.
func TestNetworkGrowsUnderTraffic(t *testing.T) {
	w := newWorld(t, 2)
	w.config(`{"Network":"10.240.0.0/16","SubnetLen":24}`)
	a, b := w.up(0), w.up(1)
	awaitPeers(1, a, b)
	s := stream(t, a.host(), b.host())
	awaitFlow(w, s, 500)
	w.config(`{"Network":"10.240.0.0/12","SubnetLen":24}`)
	for _, e := range []*daemon{a, b} {
		e.await("the wider network", func(s node.Status) bool { return s.Network.Network.Bits() == 12 })
		w.await("subnet.env says so", func() bool { return strings.Contains(readFile(t, e.subnetFile()), "FLANNEL_NETWORK=10.240.0.0/12\n") })
		w.await("the route is wider", func() bool { return overlayRoute(t, e.ns, netip.MustParseAddr("10.255.1.1")) == "tweed0" })
	}
	awaitFlow(w, s, 500)
	assertClean(t, s)
	assertNoDrops(t, a, b)

	// A smaller network cannot be followed live and changes nothing.
	w.config(`{"Network":"10.250.0.0/16","SubnetLen":24}`)
	got := a.await("a word about the smaller network", func(s node.Status) bool { return s.Network.Pending != "" })
	if got.Network.Network.String() != "10.240.0.0/12" {
		t.Errorf("network %s, want the last good one", got.Network.Network)
	}
	assertPing(t, a.host(), b.host(), 56)
	a.down()
	b.down()
}

// TestJunkInEtcd: what cannot be read is counted, logged once and affects
// nobody.
func TestJunkInEtcd(t *testing.T) {
	w := newWorld(t, 2)
	w.config(udpConfig)
	a, b := w.up(0), w.up(1)
	awaitPeers(1, a, b)
	s := stream(t, a.host(), b.host())
	awaitFlow(w, s, 100)
	const badValue = prefix + "/subnets/10.244.222.0-24"
	w.put(prefix+"/subnets/junk", "{")
	w.put(badValue, `{"PublicIP":`)
	w.put(prefix+"/subnets/10.244.223.0-24", `{"PublicIP":"not an address","PublicIPv6":null}`)
	w.put(prefix+"/subnets/10.244.224.0-24", `{"PublicIP":"192.0.2.99","PublicIPv6":null}`) // good, and the last
	awaitPeers(2, a, b)
	// And a value that becomes bad keeps what the good one said.
	w.put(prefix+"/subnets/10.244.224.0-24", `[]`)
	a.await("everything counted and listed", func(s node.Status) bool {
		return s.Counters.BadKeys == 1 && s.Counters.BadValues == 3 && len(s.Ignored) == 4
	})
	awaitPeers(2, a, b)
	awaitFlow(w, s, 500)
	assertClean(t, s)
	if got := strings.Count(a.output(), "key=junk "); got != 1 {
		t.Errorf("%d lines about the junk key, want 1", got)
	}
	assertNoDrops(t, a, b)
}

// TestEtcdOutage: etcd goes away, in two ways, the world changes meanwhile and
// its history is compacted; no packet is lost and the tables follow at once.
func TestEtcdOutage(t *testing.T) {
	w := newWorld(t, 3)
	w.config(vxlanConfig)
	a, b := w.up(0), w.up(1)
	awaitPeers(1, a, b)
	const foreign = prefix + "/subnets/10.244.200.0-24"
	w.put(foreign, vxlanLease("192.0.2.200", "02:00:00:00:00:01"))
	awaitPeers(2, a, b)
	s := stream(t, a.host(), b.host())

	// Killed, and back with a changed peer, the change compacted away.
	w.etcd.end(unix.SIGKILL)
	flowFor(w, s, outage())
	w.startEtcd()
	w.put(foreign, vxlanLease("192.0.2.201", "02:00:00:00:00:02"))
	compact(w)
	for _, e := range []*daemon{a, b} {
		awaitPeer(e, "10.244.200.0/24", "192.0.2.201:8472", "02:00:00:00:00:02")
	}

	// Frozen instead of dead: connections stay open and silent.
	w.etcd.signal(unix.SIGSTOP)
	flowFor(w, s, outage())
	w.etcd.signal(unix.SIGCONT)
	w.put(foreign, vxlanLease("192.0.2.202", "02:00:00:00:00:03"))
	if _, err := w.client.Delete(t.Context(), prefix+"/subnets/none"); err != nil {
		t.Fatal(err)
	}
	compact(w)
	for _, e := range []*daemon{a, b} {
		awaitPeer(e, "10.244.200.0/24", "192.0.2.202:8472", "02:00:00:00:00:03")
		e.await("connected and complete", func(s node.Status) bool { return s.Etcd.Connected && s.Etcd.Synced })
	}
	assertClean(t, s)
	assertNoDrops(t, a, b)
}

// TestLeaseOfALivingNodeDeleted: an operator deletes what is in use. The node
// takes the same subnet back, and the others lose nothing meanwhile.
func TestLeaseOfALivingNodeDeleted(t *testing.T) {
	w := newWorld(t, 2)
	w.config(vxlanConfig)
	a, b := w.up(0), w.up(1)
	awaitPeers(1, a, b)
	to, back := stream(t, a.host(), b.host()), stream(t, b.host(), a.host())
	awaitFlow(w, to, 200)
	key, before := leaseKey(a), a.status().Lease.Subnet
	for i := range 10 {
		if _, err := w.client.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		a.await("the lease is taken back", func(s node.Status) bool {
			return s.Counters.LeaseRetaken == uint64(i+1) && s.Lease.State == "held" && s.Lease.Subnet == before
		})
		awaitFlow(w, to, 100)
		awaitFlow(w, back, 100)
	}
	awaitPeers(1, a, b)
	assertClean(t, to)
	assertClean(t, back)
	assertNoDrops(t, a, b)

	// A node that does not come back is shown for what it is, and gives way to
	// another one at once.
	const foreign = prefix + "/subnets/10.244.200.0-24"
	w.put(foreign, vxlanLease("192.0.2.200", "02:00:00:00:00:01"))
	awaitPeers(2, a, b)
	if _, err := w.client.Delete(t.Context(), foreign); err != nil {
		t.Fatal(err)
	}
	w.await("tweed peers shows it as held", func() bool {
		_, out, _ := run(t, tweedBin, "peers", "--state-dir", a.dir)
		return regexp.MustCompile(`(?m)^10\.244\.200\.0/24 .*held`).MatchString(out)
	})
	w.put(foreign, vxlanLease("192.0.2.201", "02:00:00:00:00:02"))
	awaitPeer(a, "10.244.200.0/24", "192.0.2.201:8472", "02:00:00:00:00:02")
	awaitPeer(b, "10.244.200.0/24", "192.0.2.201:8472", "02:00:00:00:00:02")
}

func vxlanLease(ip, mac string) string {
	return fmt.Sprintf(`{"PublicIP":%q,"PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":%q}}`, ip, mac)
}

// TestUnderlayAddressChanges: the address of node 1 is replaced as by DHCP, the
// one its sockets, its lease and its connection to etcd stand on. The subnet
// stays, and the others follow.
func TestUnderlayAddressChanges(t *testing.T) {
	for framing, config := range map[string]string{"udp": udpConfig, "vxlan": vxlanConfig} {
		t.Run(framing, func(t *testing.T) {
			w := newWorld(t, 2)
			w.config(config)
			a, b := w.up(0), w.up(1)
			awaitPeers(1, a, b)
			before := a.status()
			to, back := stream(t, a.host(), b.host()), stream(t, b.host(), a.host())
			awaitFlow(w, to, 100)
			next := netip.MustParseAddr("192.0.2.111")
			replaceAddress(t, a, next)
			after := a.await("the new address", func(s node.Status) bool {
				return s.Underlay.Address == next && s.Lease.PublicIP == next && s.Etcd.Connected && len(s.Problems) == 0
			})
			if after.Lease.Subnet != before.Lease.Subnet || after.Device != before.Device {
				t.Errorf("lease %+v and device %+v, were %+v and %+v", after.Lease, after.Device, before.Lease, before.Device)
			}
			awaitPeer(b, before.Lease.Subnet.String(), netip.AddrPortFrom(next, before.Listen[0].Addr.Port()).String(), macOf(before))
			awaitFlow(w, to, 500)
			awaitFlow(w, back, 500)
			for _, s := range []*probe.Stream{to, back} {
				l := s.Stop()
				t.Logf("over the change: %s", l)
				if l.Duplicated != 0 || l.Corrupted != 0 {
					t.Error(l)
				}
			}
			// From now on nothing is lost, and changes arrive.
			w.put(prefix+"/subnets/10.244.200.0-24", `{"PublicIP":"192.0.2.200","PublicIPv6":null}`)
			awaitPeers(2, a, b)
			to = stream(t, a.host(), b.host())
			awaitFlow(w, to, 500)
			assertClean(t, to)
			assertBalance(t, a)
			assertBalance(t, b)
		})
	}
}

// macOf is the VTEP MAC peers show for a node, none in the udp framing.
func macOf(s node.Status) string {
	if s.Framing == encap.FramingUDP {
		return ""
	}
	return s.Node.VtepMAC
}

// replaceAddress takes the address of the node's underlay interface away and then
// gives it another one.
func replaceAddress(t *testing.T, e *daemon, next netip.Addr) {
	t.Helper()
	netlinkIn(t, e.ns, func(h *netlink.Handle) {
		link, err := h.LinkByName(netns.LANInterface)
		if err != nil {
			t.Fatal(err)
		}
		addrs, err := h.AddrList(link, netlink.FAMILY_V4)
		if err != nil || len(addrs) != 1 {
			t.Fatal(addrs, err)
		}
		if err := h.AddrDel(link, &addrs[0]); err != nil {
			t.Fatal(err)
		}
		ones, size := addrs[0].Mask.Size()
		if err := h.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: next.AsSlice(), Mask: net.CIDRMask(ones, size)}}); err != nil {
			t.Fatal(err)
		}
	})
}

// compact throws the history away up to now.
func compact(w *world) {
	w.t.Helper()
	r, err := w.client.Put(w.t.Context(), "elsewhere", "")
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.client.Compact(w.t.Context(), r.Header.Revision); err != nil && err != rpctypes.ErrCompacted {
		w.t.Fatal(err)
	}
}

// flowFor waits for as many packets as the stream sends in that time.
func flowFor(w *world, s interface{ Received() uint64 }, d time.Duration) {
	w.t.Helper()
	target := s.Received() + uint64(d.Seconds()*2000)
	deadline := time.Now().Add(d + patience)
	for s.Received() < target {
		if time.Now().After(deadline) {
			w.t.Fatalf("the probe does not arrive any more: %d of %d packets", s.Received(), target)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func awaitPeer(e *daemon, subnet, endpoint, mac string) {
	e.w.t.Helper()
	e.w.await(fmt.Sprintf("%s: %s at %s with %s", e.name, subnet, endpoint, mac), func() bool {
		a, err := e.api.Peers(e.w.t.Context())
		if err != nil {
			return false
		}
		for _, p := range a.Peers {
			if p.Subnet.String() == subnet {
				return p.Endpoint.String() == endpoint && p.VtepMAC == mac
			}
		}
		return false
	})
}

// TestKilledAndStartedAgain: the same subnet, the same identity, and
// forwarding also without etcd.
func TestKilledAndStartedAgain(t *testing.T) {
	w := newWorld(t, 2)
	w.config(vxlanConfig)
	a, b := w.up(0), w.up(1)
	awaitPeers(1, a, b)
	before := b.status()
	s := stream(t, a.host(), b.host())
	awaitFlow(w, s, 200)

	b.end(unix.SIGKILL)
	b.again()
	awaitFlow(w, s, 200)
	after := b.status()
	if after.Lease.Subnet != before.Lease.Subnet || after.Node != before.Node {
		t.Errorf("after a restart: %s %+v, before: %s %+v", after.Lease.Subnet, after.Node, before.Lease.Subnet, before.Node)
	}

	// Once more, with etcd gone too: from the last good snapshot.
	w.etcd.end(unix.SIGKILL)
	b.end(unix.SIGKILL)
	b.again()
	awaitFlow(w, s, 200)
	if st := b.status(); st.Phase != node.PhaseCached || st.Lease.Subnet != before.Lease.Subnet {
		t.Errorf("without etcd: phase %s, subnet %s, want %s and %s", st.Phase, st.Lease.Subnet, node.PhaseCached, before.Lease.Subnet)
	}
	w.startEtcd()
	b.await("the lease is held", func(s node.Status) bool { return s.Phase == node.PhaseRunning && s.Lease.State == "held" })
	awaitFlow(w, s, 200)
	l := s.Stop()
	t.Logf("probe over two kills: %s", l)
	if l.Duplicated != 0 || l.Corrupted != 0 {
		t.Error(l)
	}
	if n := len(w.keys()); n != 3 {
		t.Errorf("%d keys in etcd, want the config and two leases", n)
	}
	a.down()
	b.down()
}
