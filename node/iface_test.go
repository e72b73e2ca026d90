package node

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// testHost has a NAT interface that every machine shares, as VirtualBox makes
// it, a second one between the nodes, and one without an address.
func testHost() *hostNet {
	perm := func(s string) hostAddr { return hostAddr{ip: addr(s), permanent: true} }
	return &hostNet{
		ifaces: []hostIface{
			{index: 1, name: "lo", mtu: 65536, addrs: []hostAddr{perm("127.0.0.1")}},
			{index: 2, name: "eth0", mtu: 1500, addrs: []hostAddr{{ip: addr("10.0.2.15")}}},
			{index: 3, name: "eth1", mtu: 1400, addrs: []hostAddr{perm("169.254.3.3"), {ip: addr("192.168.56.4")}, perm("192.168.56.5")}},
			{index: 4, name: "bare0", mtu: 1500},
			{index: 5, name: "zero0", mtu: 0, addrs: []hostAddr{perm("10.9.9.9")}},
		},
		routes: []hostRoute{
			{dst: netip.MustParsePrefix("10.0.2.0/24"), link: 2},
			{dst: netip.MustParsePrefix("0.0.0.0/0"), link: 2},
			{dst: netip.MustParsePrefix("0.0.0.0/0"), link: 3},
		},
		routeTo: func(ip netip.Addr) (int, netip.Addr, error) {
			if netip.MustParsePrefix("192.168.56.0/24").Contains(ip) {
				return 3, addr("192.168.56.4"), nil
			}
			return 0, netip.Addr{}, errors.New("network is unreachable")
		},
	}
}

func TestUnderlayIsChosenByFlannelsRules(t *testing.T) {
	for _, c := range []struct {
		name       string
		choice     ifaceChoice
		iface      string
		addr       string
		public     string
		wantWarned int
	}{
		{"nothing given: first default route", ifaceChoice{}, "eth0", "10.0.2.15", "10.0.2.15", 0},
		{"by name: best address first", ifaceChoice{names: []string{"eth1"}}, "eth1", "192.168.56.5", "192.168.56.5", 0},
		{"by address: that address", ifaceChoice{names: []string{"192.168.56.4"}}, "eth1", "192.168.56.4", "192.168.56.4", 0},
		{"first name that exists", ifaceChoice{names: []string{"eth9", "bare0", "eth1"}}, "eth1", "192.168.56.5", "192.168.56.5", 2},
		{"names before regexps", ifaceChoice{names: []string{"eth0"}, regexps: []string{"eth1"}}, "eth0", "10.0.2.15", "10.0.2.15", 0},
		{"regexp on an address", ifaceChoice{regexps: []string{`\.56\.4$`}}, "eth1", "192.168.56.4", "192.168.56.4", 0},
		{"regexp: addresses of all before any name", ifaceChoice{regexps: []string{"eth0|192"}}, "eth1", "192.168.56.5", "192.168.56.5", 0},
		{"regexp on a name", ifaceChoice{regexps: []string{"eth[1-9]"}}, "eth1", "192.168.56.5", "192.168.56.5", 0},
		{"can-reach: the route's source", ifaceChoice{canReach: "192.168.56.77"}, "eth1", "192.168.56.4", "192.168.56.4", 0},
		{"can-reach comes last", ifaceChoice{names: []string{"eth9"}, regexps: []string{"nothing"}, canReach: "192.168.56.77"}, "eth1", "192.168.56.4", "192.168.56.4", 2},
		{"public IP alone: its owner", ifaceChoice{publicIP: addr("192.168.56.4")}, "eth1", "192.168.56.4", "192.168.56.4", 0},
		{"public IP behind NAT", ifaceChoice{names: []string{"eth0"}, publicIP: addr("203.0.113.7")}, "eth0", "10.0.2.15", "203.0.113.7", 0},
	} {
		warned := 0
		u, err := chooseUnderlay(c.choice, testHost(), func(error) { warned++ })
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if u.name != c.iface || u.addr != addr(c.addr) || u.publicIP != addr(c.public) || warned != c.wantWarned {
			t.Errorf("%s: got %+v and %d warnings", c.name, u, warned)
		}
	}
}

func TestUnderlayErrorsNameTheThingAndTheChoice(t *testing.T) {
	noDefault := testHost()
	noDefault.routes = noDefault.routes[:1]
	multipath := testHost()
	multipath.routes = []hostRoute{{multipath: true}}
	for _, c := range []struct {
		host   *hostNet
		choice ifaceChoice
		want   string
	}{
		{testHost(), ifaceChoice{names: []string{"eth9"}}, "--iface eth9: no such interface (have: lo, eth0, eth1, bare0, zero0)"},
		{testHost(), ifaceChoice{names: []string{"10.1.1.1"}}, "--iface 10.1.1.1: no interface has this address (have: lo 127.0.0.1, eth0 10.0.2.15,"},
		{testHost(), ifaceChoice{names: []string{"bare0"}}, "--iface bare0: interface bare0 has no usable IPv4 address"},
		{testHost(), ifaceChoice{names: []string{"lo"}}, "--iface lo: interface lo has no usable IPv4 address"},
		{testHost(), ifaceChoice{names: []string{"zero0"}}, "interface zero0: MTU is 0"},
		{testHost(), ifaceChoice{regexps: []string{"^x"}}, "--iface-regex ^x: matches no interface address or name"},
		{testHost(), ifaceChoice{canReach: "8.8.8.8"}, "--iface-can-reach 8.8.8.8: no route to it"},
		{testHost(), ifaceChoice{canReach: "dns"}, "--iface-can-reach dns: expected an IPv4 address"},
		{testHost(), ifaceChoice{publicIP: addr("203.0.113.7")}, "--public-ip 203.0.113.7: no interface has this address; behind NAT give --iface too"},
		{noDefault, ifaceChoice{}, "no default route: choose the interface between the nodes with --iface"},
		{multipath, ifaceChoice{}, "the default route has several next hops"},
		{testHost(), ifaceChoice{names: []string{"a", "b"}}, "--iface a: no such interface (have: lo, eth0, eth1, bare0, zero0); --iface b: no such"},
	} {
		_, err := chooseUnderlay(c.choice, c.host, func(error) { t.Errorf("%+v: warned although nothing matched", c.choice) })
		if err == nil || !strings.HasPrefix(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got  %v\nwant %s", err, c.want)
		}
	}
}

func TestDeprecatedAndTemporaryAddressesComeLast(t *testing.T) {
	i := hostIface{addrs: []hostAddr{
		{ip: addr("10.0.0.1"), deprecated: true, permanent: true},
		{ip: addr("169.254.0.1"), permanent: true},
		{ip: addr("10.0.0.2"), temporary: true},
		{ip: addr("10.0.0.3")},
		{ip: addr("224.0.0.1"), permanent: true},
		{ip: addr("10.0.0.4"), permanent: true},
	}}
	want := []netip.Addr{addr("10.0.0.4"), addr("10.0.0.3"), addr("10.0.0.2"), addr("169.254.0.1")}
	got := i.usable()
	if len(got) != len(want) {
		t.Fatalf("got %v, expected %v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("got %v, expected %v", got, want)
		}
	}
}

func TestSocketsBindThePublicAddressOnlyWhenThisHostHasIt(t *testing.T) {
	h := testHost()
	for _, c := range []struct{ addr, public, want string }{
		{"192.168.56.4", "192.168.56.4", "192.168.56.4"},
		{"10.0.2.15", "192.168.56.5", "192.168.56.5"},
		{"10.0.2.15", "203.0.113.7", "10.0.2.15"},
	} {
		if got := bindAddr(underlay{addr: addr(c.addr), publicIP: addr(c.public)}, h); got != addr(c.want) {
			t.Errorf("address %s, public %s: bound to %s, expected %s", c.addr, c.public, got, c.want)
		}
	}
}
