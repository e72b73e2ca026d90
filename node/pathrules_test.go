package node

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tweed/netns"
)

// TestWayOfAllFlowsOrOfNone: the accelerator's packets are routed without their
// ports, as root's and bound to the underlay; where that makes a difference they
// shall not be sent.
func TestWayOfAllFlowsOrOfNone(t *testing.T) {
	l := lan(t, netns.LANConfig{Nodes: 1})
	nl, err := l.Nodes[0].Netlink()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nl.Close)
	peer, gateway := addr("192.0.2.77"), addr("192.0.2.12")
	under := mustLink(t, nl, netns.LANInterface).Attrs().Index
	const table = 100
	if err := nl.RouteAdd(&netlink.Route{
		LinkIndex: under, Table: table, Dst: ipNetOf(netip.MustParsePrefix("0.0.0.0/0")), Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
	}); err != nil {
		t.Fatal(err)
	}
	c := newPathCache(nl, 0, addr("192.0.2.11"))
	c.carry([]flow{{8285, 8285}, {40001, 8472}, {40002, 8472}})
	c.get(peer) // there are no rules yet
	port := func(p uint16) *netlink.RulePortRange { return netlink.NewRulePortRange(p, p) }
	for _, test := range []struct {
		what string
		rule func(*netlink.Rule)
		// hop is where packets go first; invalid when there is no one way.
		hop netip.Addr
	}{
		{"ports of others", func(r *netlink.Rule) { r.Dport = port(53) }, peer},
		{"our ports, of TCP", func(r *netlink.Rule) { r.IPProto, r.Dport = unix.IPPROTO_TCP, port(8472) }, peer},
		{"one of the source ports", func(r *netlink.Rule) { r.Sport = port(40002) }, netip.Addr{}},
		{"the port of one framing", func(r *netlink.Rule) { r.Dport = port(8472) }, netip.Addr{}},
		{"the port of the other", func(r *netlink.Rule) { r.IPProto, r.Dport = unix.IPPROTO_UDP, port(8285) }, netip.Addr{}},
		{"all UDP", func(r *netlink.Rule) { r.IPProto = unix.IPPROTO_UDP }, gateway},
		{"packets bound to the underlay", func(r *netlink.Rule) { r.OifName = netns.LANInterface }, netip.Addr{}},
		{"packets bound elsewhere", func(r *netlink.Rule) { r.OifName = "lo" }, peer},
		{"all of root", func(r *netlink.Rule) { r.UIDRange = netlink.NewRuleUIDRange(0, 0) }, gateway},
		{"another user's", func(r *netlink.Rule) { r.UIDRange = netlink.NewRuleUIDRange(1234, 1234) }, peer},
	} {
		rule := netlink.NewRule()
		rule.Table, rule.Priority, rule.Family = table, 50, netlink.FAMILY_V4
		test.rule(rule)
		if err := nl.RuleAdd(rule); err != nil {
			t.Fatalf("%s: %v", test.what, err)
		}
		want := 0
		if test.hop.IsValid() {
			want = under
		}
		err := l.Nodes[0].Do(func() error {
			c.refresh(map[netip.Addr]bool{peer: true})
			if index, hop := c.way(peer); index != want || hop != test.hop {
				t.Errorf("%s: the way leads through interface %d to %v, want %d and %v", test.what, index, hop, want, test.hop)
			}
			return nil
		})
		if err = errors.Join(err, nl.RuleDel(rule)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNoWayToOurselves: the table of local addresses names the interface that has
// them, but nobody there answers for them.
func TestNoWayToOurselves(t *testing.T) {
	l := lan(t, netns.LANConfig{Nodes: 1})
	nl, err := l.Nodes[0].Netlink()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nl.Close)
	peer := addr("192.0.2.77")
	c := newPathCache(nl, 0, addr("192.0.2.11"))
	under := mustLink(t, nl, netns.LANInterface)
	if index, _ := c.way(peer); index != under.Attrs().Index {
		t.Fatalf("the way leads through interface %d, want %d", index, under.Attrs().Index)
	}
	if err := nl.AddrAdd(under, &netlink.Addr{IPNet: &net.IPNet{IP: peer.AsSlice(), Mask: net.CIDRMask(24, 32)}}); err != nil {
		t.Fatal(err)
	}
	c.refresh(map[netip.Addr]bool{peer: true})
	if index, hop := c.way(peer); index != 0 || hop.IsValid() {
		t.Errorf("the way leads through interface %d to %v, want none", index, hop)
	}
	if mtu, _ := c.get(peer); mtu != 1500 {
		t.Errorf("MTU %d, want 1500", mtu)
	}
}
