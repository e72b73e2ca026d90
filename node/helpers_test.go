package node

import (
	"fmt"
	"net/netip"
	"os"
	"sort"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"tweed/netns"
)

func mustLink(t *testing.T, nl *netlink.Handle, name string) netlink.Link {
	t.Helper()
	l, err := nl.LinkByName(name)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return l
}

// snapshotNet describes links, addresses and routes of a namespace in one string.
func snapshotNet(t *testing.T, ns *netns.Namespace) string {
	t.Helper()
	nl, err := ns.Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	h, err := readHostNet(nl)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, i := range h.ifaces {
		out = append(out, fmt.Sprintf("%s mtu %d %v", i.name, i.mtu, i.addrs))
	}
	for _, r := range h.routes {
		out = append(out, fmt.Sprintf("%v dev %d", r.dst, r.link))
	}
	sort.Strings(out)
	return strings.Join(out, "; ")
}

// ourRoutes lists the destinations of the routes tweed made.
func ourRoutes(t *testing.T, nl *netlink.Handle) []netip.Prefix {
	t.Helper()
	rs, err := mainRoutes(nl)
	if err != nil {
		t.Fatal(err)
	}
	var out []netip.Prefix
	for _, r := range rs {
		if r.Protocol == routeProtocol {
			out = append(out, prefixOf(r.Dst))
		}
	}
	return out
}

// foreignRoute adds a route that is not tweed's, to eth0.
func foreignRoute(t *testing.T, nl *netlink.Handle, dst string) *netlink.Route {
	t.Helper()
	r := &netlink.Route{
		LinkIndex: mustLink(t, nl, netns.LANInterface).Attrs().Index,
		Dst:       ipNetOf(netip.MustParsePrefix(dst)), Scope: netlink.SCOPE_LINK,
	}
	if err := nl.RouteAdd(r); err != nil {
		t.Fatal(err)
	}
	return r
}

// cannot ends a test that this machine cannot run; in CI that is a failure.
func cannot(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// needTUN ends the test where TUN devices cannot be made: root of a user
// namespace may be kept from the device node.
func needTUN(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		cannot(t, "TUN devices cannot be made here: %v", err)
	}
	f.Close()
}
