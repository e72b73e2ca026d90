package node

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tweed/netns"
	"tweed/tun"
)

// testLink is a TUN device in a namespace of its own.
func testLink(t *testing.T) (*overlayLink, *netlink.Handle, *tun.Device) {
	t.Helper()
	needTUN(t)
	l := lan(t, netns.LANConfig{Nodes: 1})
	nl, err := l.Nodes[0].Netlink()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nl.Close)
	var d *tun.Device
	err = l.Nodes[0].Do(func() (err error) {
		d, err = tun.Open(tun.Config{Name: "tweed0", MTU: 1400, Queues: 1})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	var o *overlayLink
	err = l.Nodes[0].Do(func() (err error) {
		o, err = newOverlayLink(nl, "tweed0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	o.sysctl = t.TempDir()
	return o, nl, d
}

func testWant() linkWant {
	return linkWant{addr: addr("10.1.2.0"), network: netip.MustParsePrefix("10.1.0.0/16"), mtu: 1426, gso: 60000}
}

func TestDeviceIsConfiguredOnceAndThenLeftAlone(t *testing.T) {
	o, nl, _ := testLink(t)
	dir := filepath.Join(o.sysctl, "ipv6", "conf", "tweed0")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	changed, err := o.ensure(testWant())
	if err != nil || len(changed) == 0 {
		t.Fatal(changed, err)
	}
	a := mustLink(t, nl, "tweed0").Attrs()
	if a.MTU != 1426 || a.TxQLen != txQueueLen || a.GSOMaxSize != 60000 || a.Flags&1 == 0 {
		t.Errorf("link %+v", a)
	}
	addrs, err := nl.AddrList(mustLink(t, nl, "tweed0"), netlink.FAMILY_V4)
	if err != nil || len(addrs) != 1 || prefixOf(addrs[0].IPNet).String() != "10.1.2.0/32" {
		t.Errorf("addresses %v, %v", addrs, err)
	}
	for _, f := range []string{"accept_ra", "disable_ipv6"} {
		if _, err := os.ReadFile(filepath.Join(dir, f)); err != nil {
			t.Errorf("%s was not set: %v", f, err)
		}
	}
	if changed, err := o.ensure(testWant()); err != nil || len(changed) != 0 {
		t.Errorf("the second time changed %v, %v", changed, err)
	}
}

func TestWiderRouteComesBeforeTheNarrowerGoes(t *testing.T) {
	o, nl, _ := testLink(t)
	if _, err := o.ensure(testWant()); err != nil {
		t.Fatal(err)
	}
	wide := testWant()
	wide.network = netip.MustParsePrefix("10.0.0.0/12")
	changed, err := o.ensure(wide)
	want := []string{"route 10.0.0.0/12", "removed route 10.1.0.0/16"}
	if err != nil || !slices.Equal(changed, want) {
		t.Errorf("changed %v, %v, expected %v in this order", changed, err, want)
	}
	if got := ourRoutes(t, nl); len(got) != 1 || got[0] != wide.network {
		t.Errorf("routes %v", got)
	}
}

func TestForeignRoutesAndAddressesStay(t *testing.T) {
	o, nl, _ := testLink(t)
	// A route of the same network that somebody else made is a conflict ...
	r := foreignRoute(t, nl, "10.1.0.0/16")
	_, err := o.ensure(testWant())
	if err == nil || !strings.Contains(err.Error(), "route 10.1.0.0/16 exists already, dev eth0: remove it (ip route del 10.1.0.0/16 dev eth0)") {
		t.Errorf("conflict: %v", err)
	}
	if err := nl.RouteDel(r); err != nil {
		t.Fatal(err)
	}
	// ... and one of another engine is not to be removed.
	r.Protocol = routeProtocol
	if err := nl.RouteAdd(r); err != nil {
		t.Fatal(err)
	}
	_, err = o.ensure(testWant())
	if err == nil || !strings.Contains(err.Error(), "network 10.1.0.0/16 is routed by another engine on this host, dev eth0") {
		t.Errorf("conflict with another engine: %v", err)
	}
	if err := nl.RouteDel(r); err != nil {
		t.Fatal(err)
	}
	// ... one inside it, or on our device under another protocol, is not.
	foreignRoute(t, nl, "10.1.9.0/24")
	onOurs := &netlink.Route{LinkIndex: o.index, Dst: ipNetOf(netip.MustParsePrefix("10.9.0.0/16")), Scope: netlink.SCOPE_LINK, Protocol: unix.RTPROT_STATIC}
	outside := &netlink.Addr{IPNet: ipNetOf(netip.MustParsePrefix("172.31.0.1/32"))}
	if _, err := o.ensure(testWant()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(nl.RouteAdd(onOurs), nl.AddrAdd(mustLink(t, nl, "tweed0"), outside)); err != nil {
		t.Fatal(err)
	}
	moved := testWant()
	moved.addr = addr("10.1.3.0")
	changed, err := o.ensure(moved)
	if err != nil || !slices.Equal(changed, []string{"address 10.1.3.0/32", "removed address 10.1.2.0/32"}) {
		t.Errorf("changed %v, %v", changed, err)
	}
	rs, err := mainRoutes(nl)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"10.1.9.0/24", "10.9.0.0/16"} {
		if !slices.ContainsFunc(rs, func(r netlink.Route) bool { return prefixOf(r.Dst).String() == p }) {
			t.Errorf("foreign route %s was removed", p)
		}
	}
}

func TestAnIdenticalRouteOfAnotherMakerIsTolerated(t *testing.T) {
	o, nl, _ := testLink(t)
	if err := nl.LinkSetUp(mustLink(t, nl, "tweed0")); err != nil {
		t.Fatal(err)
	}
	if err := nl.RouteAdd(&netlink.Route{LinkIndex: o.index, Dst: ipNetOf(testWant().network), Protocol: unix.RTPROT_STATIC}); err != nil {
		t.Fatal(err)
	}
	if _, err := o.ensure(testWant()); err != nil {
		t.Error(err)
	}
	if got := ourRoutes(t, nl); len(got) != 0 {
		t.Errorf("a second route was made: %v", got)
	}
}

func TestADeviceThatIsGoneIsToldApartFromOneWithItsName(t *testing.T) {
	o, nl, d := testLink(t)
	d.Close()
	bridge := netlink.NewLinkAttrs()
	bridge.Name = "tweed0"
	if err := nl.LinkAdd(&netlink.Bridge{LinkAttrs: bridge}); err != nil {
		t.Fatal(err)
	}
	if _, err := o.ensure(testWant()); !errors.Is(err, errLinkGone) {
		t.Errorf("got %v", err)
	}
	if err := nl.LinkDel(mustLink(t, nl, "tweed0")); err != nil {
		t.Fatal(err)
	}
}

func TestBlackholeRouteIsAddedOnceAndRemoved(t *testing.T) {
	_, nl, _ := testLink(t)
	subnet := netip.MustParsePrefix("10.1.2.0/24")
	for _, add := range []bool{true, true, false, false} {
		if err := blackhole(nl, subnet, add); err != nil {
			t.Fatalf("add %t: %v", add, err)
		}
		if got := len(ourRoutes(t, nl)) == 1; got != add {
			t.Errorf("add %t: present %t", add, got)
		}
	}
}

func TestABlackholeRouteInForceIsNotTouched(t *testing.T) {
	l := lan(t, netns.LANConfig{Nodes: 1})
	nl, err := l.Nodes[0].Netlink()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nl.Close)
	updates, done := make(chan netlink.RouteUpdate, 64), make(chan struct{})
	defer close(done)
	err = l.Nodes[0].Do(func() error { return netlink.RouteSubscribe(updates, done) })
	if err != nil {
		t.Fatal(err)
	}
	first, second := netip.MustParsePrefix("10.1.2.0/24"), netip.MustParsePrefix("10.1.3.0/24")
	r := &runner{Node: &Node{log: slog.Default()}, nl: nl}
	for _, subnet := range []netip.Prefix{first, first, first, second} {
		r.own.Subnet = subnet
		if r.setBlackhole(); r.holeProblem != "" || r.blackholed != subnet {
			t.Fatal(r.holeProblem, r.blackholed)
		}
	}
	var seen []string
	for len(seen) < 3 {
		u := <-updates
		if u.Route.Type != unix.RTN_BLACKHOLE {
			continue
		}
		what := "add "
		if u.Type == unix.RTM_DELROUTE {
			what = "del "
		}
		seen = append(seen, what+prefixOf(u.Dst).String())
	}
	want := []string{"add 10.1.2.0/24", "del 10.1.2.0/24", "add 10.1.3.0/24"}
	if !slices.Equal(seen, want) {
		t.Errorf("got %v, want %v", seen, want)
	}
}

func TestPathMTUComesFromRouteOrInterfaceAndSeesLoops(t *testing.T) {
	o, nl, _ := testLink(t)
	if _, err := o.ensure(testWant()); err != nil {
		t.Fatal(err)
	}
	c := newPathCache(nl, o.index, addr("192.0.2.11"))
	check := func(ip string, mtu int, loops bool) {
		t.Helper()
		if m, l := c.get(addr(ip)); m != mtu || l != loops {
			t.Errorf("%s: MTU %d, loops %t, expected %d, %t", ip, m, l, mtu, loops)
		}
	}
	check("192.0.2.77", 1500, false)
	check("10.1.77.1", 1426, true)
	check("203.0.113.1", 0, false)
	inUse := map[netip.Addr]bool{addr("192.0.2.77"): true}
	if c.refresh(inUse) {
		t.Error("nothing changed")
	}
	r := foreignRoute(t, nl, "192.0.2.77/32")
	r.MTU = 1300
	if err := nl.RouteReplace(r); err != nil {
		t.Fatal(err)
	}
	if !c.refresh(inUse) {
		t.Error("the new route was not seen")
	}
	check("192.0.2.77", 1300, false)
	lan := mustLink(t, nl, netns.LANInterface).Attrs().Index
	checkWay := func(why string, index int, hop netip.Addr) {
		t.Helper()
		if i, h := c.way(addr("192.0.2.77")); i != index || h != hop {
			t.Errorf("%s: the way leads through interface %d to %v, want %d and %v", why, i, h, index, hop)
		}
	}
	checkWay("on the link", lan, addr("192.0.2.77"))
	r.Gw = addr("192.0.2.12").AsSlice()
	r.Scope = netlink.SCOPE_UNIVERSE
	r.SetFlag(netlink.FLAG_ONLINK)
	if err := nl.RouteReplace(r); err != nil {
		t.Fatal(err)
	}
	c.refresh(inUse)
	checkWay("behind a gateway", lan, addr("192.0.2.12"))
	if err := nl.LinkSetDown(mustLink(t, nl, netns.LANInterface)); err != nil {
		t.Fatal(err)
	}
	if c.refresh(inUse) {
		t.Error("a flapping link changed the MTU")
	}
	check("192.0.2.77", 1300, false)
	checkWay("gone", 0, netip.Addr{})
	if len(c.paths) != 1 {
		t.Errorf("%d addresses are remembered, 1 is in use", len(c.paths))
	}
}

// TestOnlyAPlainRouteHasAFirstHop: of the others the kernel knows more than that.
func TestOnlyAPlainRouteHasAFirstHop(t *testing.T) {
	peer, gw := addr("192.0.2.77"), addr("192.0.2.12")
	for _, c := range []struct {
		what  string
		route netlink.Route
		want  netip.Addr
	}{
		{"on the link", netlink.Route{LinkIndex: 3, Type: unix.RTN_UNICAST}, peer},
		{"gateway", netlink.Route{LinkIndex: 3, Type: unix.RTN_UNICAST, Gw: gw.AsSlice()}, gw},
		{"gateway in 16 bytes", netlink.Route{LinkIndex: 3, Type: unix.RTN_UNICAST, Gw: net.IP(gw.AsSlice()).To16()}, gw},
		{"several", netlink.Route{LinkIndex: 3, Type: unix.RTN_UNICAST, MultiPath: []*netlink.NexthopInfo{{LinkIndex: 3}}}, netip.Addr{}},
		{"IPv6 gateway", netlink.Route{LinkIndex: 3, Type: unix.RTN_UNICAST, Via: &netlink.Via{}}, netip.Addr{}},
		{"encapsulated", netlink.Route{LinkIndex: 3, Type: unix.RTN_UNICAST, Encap: &netlink.BpfEncap{}}, netip.Addr{}},
		{"MPLS", netlink.Route{LinkIndex: 3, Type: unix.RTN_UNICAST, NewDst: &netlink.MPLSDestination{}}, netip.Addr{}},
		{"blackhole", netlink.Route{LinkIndex: 3, Type: unix.RTN_BLACKHOLE}, netip.Addr{}},
	} {
		if got := firstHop(&c.route, peer); got != c.want {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
	}
}

// TestAcceleratorWaitsForASmallerMTU to be in the table: the programs send what
// is too long for the interface without making fragments of it.
func TestAcceleratorWaitsForASmallerMTU(t *testing.T) {
	o, nl, _ := testLink(t)
	if _, err := o.ensure(testWant()); err != nil {
		t.Fatal(err)
	}
	lan := mustLink(t, nl, netns.LANInterface)
	peer := addr("192.0.2.77")
	r := &runner{nl: nl, link: o, path: newPathCache(nl, o.index, addr("192.0.2.11"))}
	r.u.name, r.u.index = netns.LANInterface, lan.Attrs().Index
	check := func(when, want string) {
		t.Helper()
		if holds := strings.Join(r.accelHolds(mustLink(t, nl, netns.LANInterface)), "; "); holds != want {
			t.Errorf("%s: %q, want %q", when, holds, want)
		}
	}
	r.path.get(peer)
	check("at first", "")
	for _, c := range []struct {
		mtu  int
		want string
	}{{1400, "the MTU of underlay eth0 went from 1500 to 1400"}, {1500, ""}} {
		if err := nl.LinkSetMTU(lan, c.mtu); err != nil {
			t.Fatal(err)
		}
		check(fmt.Sprintf("MTU %d", c.mtu), c.want)
		r.path.refresh(map[netip.Addr]bool{peer: true})
		check("looked again", "")
	}
}

// TestPathIsThatOfTheSource: hosts with two uplinks route by the source address.
func TestPathIsThatOfTheSource(t *testing.T) {
	o, nl, _ := testLink(t)
	peer := addr("192.0.2.77")
	c := newPathCache(nl, o.index, addr("192.0.2.11"))
	if mtu, _ := c.get(peer); mtu != 1500 {
		t.Fatalf("MTU %d, expected 1500", mtu)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "uplink2", 1400
	uplink := &netlink.Veth{LinkAttrs: attrs, PeerName: "far2"}
	rule := netlink.NewRule()
	rule.Src, rule.Table, rule.Priority = ipNetOf(netip.MustParsePrefix("192.0.2.11/32")), 100, 100
	err := errors.Join(nl.LinkAdd(uplink), nl.LinkSetUp(uplink), nl.LinkSetUp(mustLink(t, nl, "far2")), nl.RuleAdd(rule))
	if err == nil {
		err = nl.RouteAdd(&netlink.Route{LinkIndex: uplink.Index, Table: 100, Dst: ipNetOf(netip.PrefixFrom(peer, 32))})
	}
	if err != nil {
		t.Fatal(err)
	}
	if !c.refresh(map[netip.Addr]bool{peer: true}) {
		t.Error("the rule was not seen")
	}
	mtu, _ := c.get(peer)
	if index, _ := c.way(peer); mtu != 1400 || index != uplink.Index {
		t.Errorf("MTU %d through interface %d, expected 1400 through %d", mtu, index, uplink.Index)
	}
	c.leave(addr("192.0.2.12")) // not ours: no way, and nothing remembered
	if mtu, _ := c.get(peer); mtu != 0 {
		t.Errorf("MTU %d from an address that the host does not have", mtu)
	}
}

func TestNetWatchReportsLinksRoutesAndRules(t *testing.T) {
	l := lan(t, netns.LANConfig{Nodes: 1})
	nl, err := l.Nodes[0].Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	var w *netWatch
	if err := l.Nodes[0].Do(func() (err error) { w, err = watchNet(quiet()); return err }); err != nil {
		t.Fatal(err)
	}
	defer w.close()
	foreignRoute(t, nl, "10.5.0.0/16")
	<-w.changed
	if err := nl.LinkSetMTU(mustLink(t, nl, netns.LANInterface), 1400); err != nil {
		t.Fatal(err)
	}
	<-w.changed
	rule := netlink.NewRule()
	rule.Table, rule.Priority = 100, 100
	if err := nl.RuleAdd(rule); err != nil {
		t.Fatal(err)
	}
	<-w.changed
	if w.broken.Load() {
		t.Error("the subscription ended")
	}
}

func TestLocksNameTheHolderAndEndWithIt(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	take := func(ns *netns.Namespace) (k *nsLock, err error) {
		err = ns.Do(func() (err error) { k, err = lockNamespace("udp/8285", "UDP port 8285"); return err })
		return k, err
	}
	first, err := take(ns)
	if err != nil {
		t.Fatal(err)
	}
	conns := []net.Conn{}
	for range 300 { // more than the accept queue holds
		var c net.Conn
		if err := ns.Do(func() (err error) { c, err = net.Dial("unix", "@tweed/udp/8285"); return err }); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	for _, c := range conns {
		c.Close()
	}
	for range 2 {
		if _, err := take(ns); err == nil || !strings.HasPrefix(err.Error(), "UDP port 8285 is in use by another engine (pid ") {
			t.Fatalf("second: %v", err)
		}
	}
	other, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	k, err := take(other)
	if err != nil {
		t.Errorf("another namespace: %v", err)
	}
	k.release()
	// A start that finds an engine on its way out waits for it.
	go func() {
		time.Sleep(lockInterval)
		first.release()
	}()
	if k, err = take(ns); err != nil {
		t.Errorf("after release: %v", err)
	}
	k.release()
}
