package node

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"tweed/encap"
	"tweed/lease"
)

func netConfig(t *testing.T, text string) lease.NetworkConfig {
	t.Helper()
	c, err := lease.ParseNetworkConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func testLease(subnet, ip, backend string) lease.Lease {
	l := lease.Lease{Subnet: netip.MustParsePrefix(subnet)}
	l.PublicIP, l.BackendType = addr(ip), backend
	if backend == lease.BackendVXLAN {
		l.VNI, l.VtepMAC = 7, net.HardwareAddr{2, 0, 0, 0, 0, 9}
	}
	return l
}

func testConverter(t *testing.T, config string) *converter {
	return &converter{
		cfg: netConfig(t, config), publicIP: addr("192.0.2.1"), own: netip.MustParsePrefix("10.1.1.0/24"), mtu: 1450,
		path: func(netip.Addr) (int, bool) { return 1500, false },
	}
}

func TestEachPeerIsSentTheFramingItsLeaseNames(t *testing.T) {
	c := testConverter(t, `{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","Port":9999}}`)
	peers, skipped := c.convert([]lease.Lease{
		testLease("10.1.9.0/24", "192.0.2.9", "vxlan"),
		testLease("10.1.2.0/24", "192.0.2.2", "udp"),
	})
	if len(skipped) != 0 || len(peers) != 2 {
		t.Fatalf("peers %+v, skipped %+v", peers, skipped)
	}
	udp, vx := peers[0], peers[1]
	if udp.Framing != encap.FramingUDP || udp.Endpoint.String() != "192.0.2.2:8285" || udp.VNI != 0 {
		t.Errorf("udp peer %+v: expected flannel's udp port, for the config's is vxlan's", udp)
	}
	if vx.Framing != encap.FramingVXLAN || vx.Endpoint.String() != "192.0.2.9:9999" || vx.VNI != 7 || macText(vx.MAC) != "02:00:00:00:00:09" {
		t.Errorf("vxlan peer %+v: expected the config's port and the lease's VNI and MAC", vx)
	}
}

func TestUnusableLeasesAreSkippedWithAReason(t *testing.T) {
	c := testConverter(t, `{"Network":"10.1.0.0/16"}`)
	c.path = func(ip netip.Addr) (int, bool) { return 1500, ip == addr("10.1.7.7") }
	noMAC := testLease("10.1.6.0/24", "192.0.2.6", "vxlan")
	noMAC.VtepMAC = nil
	for want, l := range map[string]lease.Lease{
		`backend "wireguard" is neither`: testLease("10.1.2.0/24", "192.0.2.2", "wireguard"),
		"our own public IP":              testLease("10.1.3.0/24", "192.0.2.1", "udp"),
		"overlaps our own subnet":        testLease("10.1.1.128/25", "192.0.2.4", "udp"),
		"leads into the overlay":         testLease("10.1.5.0/24", "10.1.7.7", "udp"),
		"has no VtepMAC":                 noMAC,
	} {
		peers, skipped := c.convert([]lease.Lease{l})
		if len(peers) != 0 || len(skipped) != 1 || !strings.Contains(skipped[0].Why, want) {
			t.Errorf("%s: peers %+v, skipped %+v", want, peers, skipped)
		}
	}
}

func TestPathMTULowersOnlyThePeerItIsOn(t *testing.T) {
	for _, c := range []struct {
		framing             encap.Framing
		path, overlay, want int
	}{
		{encap.FramingUDP, 1500, 1426, 0},
		{encap.FramingUDP, 1500, 1472, 0},
		{encap.FramingVXLAN, 1500, 1472, 1450},
		{encap.FramingUDP, 1400, 1426, 1372},
		{encap.FramingVXLAN, 1400, 1450, 1350},
		{encap.FramingVXLAN, 0, 1450, 0},
		{encap.FramingVXLAN, 100, 1450, encap.MinMTU},
	} {
		if got := peerMTU(c.framing, c.path, c.overlay); got != c.want {
			t.Errorf("%s path %d overlay %d: %d, expected %d", c.framing, c.path, c.overlay, got, c.want)
		}
	}
}

func TestListensOnOwnFramingFirstThenThoseAskedFor(t *testing.T) {
	ip := addr("192.0.2.1")
	both := []encap.Framing{encap.FramingUDP, encap.FramingVXLAN}
	for _, c := range []struct {
		config string
		also   []encap.Framing
		want   string
	}{
		{`{"Network":"10.1.0.0/16"}`, nil, "udp 192.0.2.1:8285"},
		{`{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}`, nil, "vxlan 192.0.2.1:8472"},
		{`{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","Port":4789}}`, both, "vxlan 192.0.2.1:4789, udp 192.0.2.1:8285"},
		{`{"Network":"10.1.0.0/16"}`, both[1:], "udp 192.0.2.1:8285, vxlan 192.0.2.1:8472"},
	} {
		ls, err := listenFor(netConfig(t, c.config), c.also, ip)
		var got []string
		for _, l := range ls {
			got = append(got, l.Framing.String()+" "+l.Addr.String())
		}
		if err != nil || strings.Join(got, ", ") != c.want {
			t.Errorf("%s %v: %v, %v, expected %s", c.config, c.also, got, err, c.want)
		}
	}
	_, err := listenFor(netConfig(t, `{"Network":"10.1.0.0/16","Backend":{"Type":"udp","Port":8472}}`), both, ip)
	if err == nil || !strings.Contains(err.Error(), "would share UDP port 8472") {
		t.Errorf("both framings on one port: %v", err)
	}
}

func TestOverlayMTU(t *testing.T) {
	u := func(mtu int) underlay { return underlay{name: "eth0", mtu: mtu} }
	for _, c := range []struct {
		flag    string
		framing encap.Framing
		backend int
		under   int
		want    int
		err     string
	}{
		{"", encap.FramingUDP, 0, 1500, 1426, ""},
		{"", encap.FramingVXLAN, 0, 1500, 1450, ""},
		{"", encap.FramingUDP, 0, 1454, 1426, ""},
		{"", encap.FramingUDP, 0, 1400, 1372, ""},
		{"max", encap.FramingUDP, 0, 1500, 1472, ""},
		{"max", encap.FramingVXLAN, 1400, 1500, 1450, ""},
		{"1300", encap.FramingUDP, 0, 1500, 1300, ""},
		{"1473", encap.FramingUDP, 0, 1500, 0, "MTU 1473 is above the limit of 1472"},
		{"", encap.FramingVXLAN, 1400, 1500, 1350, ""},
		{"", encap.FramingUDP, 1400, 1500, 1372, ""},
		{"", encap.FramingVXLAN, 1501, 1500, 0, "Backend.MTU 1501 is above the MTU of eth0, which is 1500"},
		{"", encap.FramingVXLAN, 500, 1500, 0, "MTU 450 is below the minimum of 576"},
		{"", encap.FramingVXLAN, 0, 600, 0, "MTU 550 is below the minimum of 576"},
	} {
		choice, err := parseMTU(c.flag)
		if err != nil {
			t.Fatal(err)
		}
		got, err := overlayMTU(choice, c.framing, c.backend, u(c.under))
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%+v: error %v", c, err)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("%+v: %d, %v", c, got, err)
		}
	}
	for _, bad := range []string{"min", "-1", "0", "575", "65536", "1500 "} {
		if _, err := parseMTU(bad); err == nil || !strings.Contains(err.Error(), "expected max or") {
			t.Errorf("--mtu %q: %v", bad, err)
		}
	}
}
