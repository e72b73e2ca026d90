package e2e

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"tweed/netns"
)

// TestAcceleratorFollowsTheWay to a peer: the route, and the neighbour it leads to.
func TestAcceleratorFollowsTheWay(t *testing.T) {
	w, a, b := accelerated(t, vxlanConfig)
	routed := w.lan.Switch
	for _, set := range []string{"ip_forward=1", "conf/all/send_redirects=0", "conf/br0/send_redirects=0"} {
		setIPv4(t, routed, set)
	}
	assertInKernel(t, a, b, true)
	// share sends 50 pings and tells how many datagrams went by the router.
	share := func() int {
		before, carried := forwarded(t, routed), a.status().Ledger.Tx.Accelerated
		for range 50 {
			assertPing(t, a.host(), b.host(), 56)
		}
		if a.status().Ledger.Tx.Accelerated-carried < 50 {
			return -1 // the way is gone for the moment
		}
		return forwarded(t, routed) - before
	}
	const some = 25 // one datagram in 250 ms goes the way the kernel knows, whatever the node says
	// goes looks for longer than the node needs to look at its ways: until then it
	// leaves them to the kernel, which knows them in any case.
	goes := func(where string, right func(share int) bool) {
		w.await(where, func() bool { got := share(); return got >= 0 && right(got) })
		for start := time.Now(); time.Since(start) < 2*time.Second; {
			if got := share(); got >= 0 && !right(got) {
				t.Fatalf("%s: %d of 50 datagrams went by the router", where, got)
			}
		}
	}
	straight := func(share int) bool { return share <= some }
	goes("no route leads to it", straight)
	command(t, a.ns, "ip", "route", "add", b.underlay().String()+"/32", "via", w.lan.Gateway.String())
	goes("the route leads to it", func(share int) bool { return share >= 50 })
	command(t, a.ns, "ip", "route", "del", b.underlay().String()+"/32")
	goes("the route is gone", straight)

	// The peer's interface gets another address, and says so as ARP does.
	const fresh = "02:00:00:00:aa:bb"
	command(t, b.ns, "ip", "link", "set", netns.LANInterface, "address", fresh)
	command(t, a.ns, "ip", "neigh", "replace", b.underlay().String(), "lladdr", fresh, "nud", "reachable", "dev", netns.LANInterface)
	s := stream(t, a.host(), b.host())
	awaitFlow(w, s, 2000)
	assertClean(t, s)
	assertNoDrops(t, a, b)
}

// TestAcceleratorLeavesRoutesByPortToTheWorkers: the kernel does not look at the
// ports of what a program sends.
func TestAcceleratorLeavesRoutesByPortToTheWorkers(t *testing.T) {
	w, a, b := accelerated(t, vxlanConfig)
	routed := w.lan.Switch
	for _, set := range []string{"ip_forward=1", "conf/all/send_redirects=0", "conf/br0/send_redirects=0"} {
		setIPv4(t, routed, set)
	}
	assertInKernel(t, a, b, true)
	command(t, a.ns, "ip", "route", "add", "default", "via", w.lan.Gateway.String(), "table", "100")
	rule := func(do string) {
		command(t, a.ns, "ip", "rule", do, "ipproto", "udp", "dport", "8472", "lookup", "100")
	}
	rule("add")
	// share sends 20 pings and tells how many datagrams went by the router, and how
	// many inside the kernel.
	share := func() (router, kernel int) {
		was, carried := forwarded(t, routed), a.status().Ledger.Tx.Accelerated
		for range 20 {
			assertPing(t, a.host(), b.host(), 56)
		}
		return forwarded(t, routed) - was, int(a.status().Ledger.Tx.Accelerated - carried)
	}
	w.await("the rule is followed", func() bool { router, kernel := share(); return router >= 20 && kernel == 0 })
	for start := time.Now(); time.Since(start) < time.Second; {
		if router, kernel := share(); router < 20 || kernel != 0 {
			t.Fatalf("of 20 datagrams %d went by the router, %d inside the kernel", router, kernel)
		}
	}
	rule("del")
	w.await("the rule is gone", func() bool { router, kernel := share(); return router < 20 && kernel >= 20 })
	assertNoDrops(t, a, b)
}

func setIPv4(t *testing.T, where *netns.Namespace, setting string) {
	t.Helper()
	name, value, _ := strings.Cut(setting, "=")
	if err := where.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0) }); err != nil {
		t.Fatal(err)
	}
}

// forwarded returns how many datagrams a namespace has routed (ForwDatagrams of RFC 4293).
func forwarded(t *testing.T, where *netns.Namespace) int {
	t.Helper()
	var text []byte
	if err := where.Do(func() (err error) { text, err = os.ReadFile("/proc/thread-self/net/snmp"); return err }); err != nil {
		t.Fatal(err)
	}
	var ip [][]string
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "Ip:") {
			ip = append(ip, strings.Fields(line))
		}
	}
	for i, name := range ip[0] {
		if name == "ForwDatagrams" {
			n, err := strconv.Atoi(ip[1][i])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no ForwDatagrams in %q", text)
	return 0
}
