package lease

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestConfigDerivesWhatIsLeftOut(t *testing.T) {
	for _, tc := range []struct {
		json          string
		len           int
		min, max      string
		subnets       int
		wantedNetwork string
	}{
		{`{"Network":"10.3.0.0/16"}`, 24, "10.3.1.0", "10.3.255.0", 255, "10.3.0.0/16"},
		{`{"Network":"10.0.0.0/24"}`, 26, "10.0.0.64", "10.0.0.192", 3, "10.0.0.0/24"},
		{`{"Network":"10.0.0.0/28"}`, 30, "10.0.0.4", "10.0.0.12", 3, "10.0.0.0/28"},
		{`{"Network":"10.0.0.0/22"}`, 24, "10.0.1.0", "10.0.3.0", 3, "10.0.0.0/22"},
		{`{"Network":"10.0.0.0/23"}`, 25, "10.0.0.128", "10.0.1.128", 3, "10.0.0.0/23"},
		{`{"Network":"10.3.7.9/16"}`, 24, "10.3.1.0", "10.3.255.0", 255, "10.3.0.0/16"},
		{`{"Network":"10.0.0.0/8","SubnetLen":24}`, 24, "10.0.1.0", "10.255.255.0", 65535, "10.0.0.0/8"},
		{`{"Network":"10.3.0.0/16","SubnetLen":20}`, 20, "10.3.16.0", "10.3.240.0", 15, "10.3.0.0/16"},
		{`{"Network":"10.3.0.0/16","SubnetLen":0,"SubnetMin":"0.0.0.0"}`, 24, "10.3.1.0", "10.3.255.0", 255, "10.3.0.0/16"},
		{`{"Network":"10.3.0.0/16","SubnetMin":"10.3.0.0"}`, 24, "10.3.0.0", "10.3.255.0", 256, "10.3.0.0/16"},
		{`{"Network":"10.3.0.0/16","SubnetMin":"10.3.8.0","SubnetMax":"10.3.9.0"}`, 24, "10.3.8.0", "10.3.9.0", 2, "10.3.0.0/16"},
		{`{"Network":"0.0.0.0/0"}`, 24, "0.0.1.0", "255.255.255.0", 1<<24 - 1, "0.0.0.0/0"},
	} {
		c, err := ParseNetworkConfig([]byte(tc.json))
		if err != nil {
			t.Errorf("%s: %v", tc.json, err)
			continue
		}
		if c.SubnetLen != tc.len || c.SubnetMin.String() != tc.min || c.SubnetMax.String() != tc.max ||
			c.Subnets() != tc.subnets || c.Network.String() != tc.wantedNetwork {
			t.Errorf("%s: got %s /%d from %s to %s, %d subnets", tc.json, c.Network, c.SubnetLen, c.SubnetMin, c.SubnetMax, c.Subnets())
		}
		if !c.EnableIPv4 || c.EnableIPv6 || c.EnableNFTables || c.Backend != (Backend{Type: BackendUDP, VNI: 1}) {
			t.Errorf("%s: wrong defaults %+v", tc.json, c)
		}
	}
}

func TestConfigReadsEveryFieldWhateverItsCase(t *testing.T) {
	c, err := ParseNetworkConfig([]byte(`{"network":"10.0.0.0/8","SUBNETLEN":22,"subnetMin":"10.10.0.0","subnetmax":"10.99.0.0",
		"enableipv4":true,"EnableIPv6":false,"enableNFTables":true,"Unknown":{"a":[1]},"IPv6Network":"nonsense",
		"backend":{"type":"VXLAN","port":4789,"vni":7,"mtu":1400,"gbp":true,"learning":true,"directrouting":true,"Other":1}}`))
	if err != nil {
		t.Fatal(err)
	}
	want := NetworkConfig{
		Network: netip.MustParsePrefix("10.0.0.0/8"), SubnetLen: 22,
		SubnetMin: netip.MustParseAddr("10.10.0.0"), SubnetMax: netip.MustParseAddr("10.99.0.0"),
		EnableIPv4: true, EnableNFTables: true,
		Backend: Backend{Type: BackendVXLAN, Port: 4789, VNI: 7, MTU: 1400, GBP: true, Learning: true, DirectRouting: true},
	}
	if c != want {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
	if notes := c.Notes(); len(notes) != 1 || !strings.Contains(notes[0], "DirectRouting") {
		t.Errorf("notes %q do not tell that DirectRouting is not followed", notes)
	}
}

func TestConfigErrorsNameTheFieldTheValueAndTheRemedy(t *testing.T) {
	for _, tc := range []struct{ json, want string }{
		{``, `not valid JSON at byte 0`},
		{`no`, `not valid JSON at byte 2`},
		{`{"Network":"10.0.0.0/8", // comment` + "\n}", `not valid JSON at byte 26`},
		{`"10.0.0.0/8"`, `not a JSON object`},
		{`{}`, `Network is missing: write for example "Network": "10.244.0.0/16"`},
		{`{"Network":""}`, `Network is ""`},
		{`{"Network":"10.0.0.0"}`, `Network is "10.0.0.0": write an address range`},
		{`{"Network":"fd00::/64"}`, `Network fd00::/64 is not IPv4`},
		{`{"Network":10}`, `Network is 10`},
		{`{"Network":"10.0.0.0/16","SubnetLen":"/24"}`, `SubnetLen is "/24": write a plain number, "SubnetLen": 24`},
		{`{"Network":"10.0.0.0/16","SubnetLen":"24"}`, `SubnetLen is "24": write a plain number`},
		{`{"Network":"10.0.0.0/16","SubnetLen":-1}`, `SubnetLen is -1`},
		{`{"Network":"10.0.0.0/16","SubnetLen":24.5}`, `SubnetLen is 24.5`},
		{`{"Network":"10.0.0.0/16","SubnetLen":31}`, `SubnetLen 31 is out of range: it must be from 18 to 30`},
		{`{"Network":"10.0.0.0/16","SubnetLen":17}`, `SubnetLen 17 leaves fewer than 4 subnets in Network 10.0.0.0/16: it must be from 18 to 30`},
		{`{"Network":"10.0.0.0/29"}`, `Network 10.0.0.0/29 is too small: it must be /28 or larger`},
		{`{"Network":"10.0.0.0/16","SubnetMin":"10.1.0.0"}`, `SubnetMin 10.1.0.0 is outside Network 10.0.0.0/16`},
		{`{"Network":"10.0.0.0/16","SubnetMax":"10.1.0.0"}`, `SubnetMax 10.1.0.0 is outside Network 10.0.0.0/16`},
		{`{"Network":"10.0.0.0/16","SubnetMin":"10.0.1.128"}`, `SubnetMin 10.0.1.128 is not on a /24 boundary: the subnet that holds it starts at 10.0.1.0`},
		{`{"Network":"10.0.0.0/16","SubnetMax":"10.0.9.1"}`, `SubnetMax 10.0.9.1 is not on a /24 boundary`},
		{`{"Network":"10.0.0.0/16","SubnetMin":"10.0.1.0/24"}`, `SubnetMin is "10.0.1.0/24": write an IPv4 address without a length`},
		{`{"Network":"10.0.0.0/16","SubnetMin":"10.0.9.0","SubnetMax":"10.0.8.0"}`, `SubnetMin 10.0.9.0 is above SubnetMax 10.0.8.0`},
		{`{"Network":"10.0.0.0/16","EnableIPv6":true}`, `EnableIPv6 is true: the overlay carries IPv4 only`},
		{`{"Network":"10.0.0.0/16","EnableIPv4":false}`, `EnableIPv4 is false: the overlay carries IPv4 only`},
		{`{"Network":"10.0.0.0/16","EnableIPv4":"yes"}`, `EnableIPv4 is "yes": write true or false`},
		{`{"Network":"10.0.0.0/16","Backend":{}}`, `Backend has no Type`},
		{`{"Network":"10.0.0.0/16","Backend":{"Type":""}}`, `Backend has no Type`},
		{`{"Network":"10.0.0.0/16","Backend":{"Type":7}}`, `Backend has no Type`},
		{`{"Network":"10.0.0.0/16","Backend":"vxlan"}`, `Backend is "vxlan": write an object`},
		{`{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan","Port":65536}}`, `Backend.Port 65536 is out of range`},
		{`{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan","Port":"8472"}}`, `Backend.Port is "8472": write a plain number, "Port": 8472`},
		{`{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}`, `Backend.VNI 16777216 is out of range`},
		{`{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan","MTU":70000}}`, `Backend.MTU 70000 is out of range`},
		{`{"Network":"10.0.0.0/16","A":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`, `nests deeper than 8`},
		{`{"Network":"10.0.0.0/16","A":"` + strings.Repeat("x", 70000) + `"}`, `bytes long, more than`},
	} {
		_, err := ParseNetworkConfig([]byte(tc.json))
		if err == nil {
			t.Errorf("%.80s: accepted", tc.json)
			continue
		}
		if msg := err.Error(); !strings.Contains(msg, tc.want) || !strings.HasPrefix(msg, "lease: network config: ") || strings.Contains(msg, "\n") {
			t.Errorf("%.80s:\ngot  %s\nwant %s", tc.json, msg, tc.want)
		}
	}
}

func TestConfigRefusesBackendsThatAreNotSupported(t *testing.T) {
	for _, typ := range []string{"host-gw", "ipip", "wireguard", "ipsec", "extension", "alloc", "tencent-vpc", "gce", "nonsense"} {
		_, err := ParseNetworkConfig(fmt.Appendf(nil, `{"Network":"10.0.0.0/16","Backend":{"Type":%q}}`, typ))
		want := fmt.Sprintf("backend type %q is not supported: use \"udp\" or \"vxlan\"", typ)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", typ, err, want)
		}
	}
}

func TestConfigSurvivesMarshal(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := genConfig(t)
		data, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseNetworkConfig(data)
		if err != nil {
			t.Fatalf("%s: %v", data, err)
		}
		if back != c {
			t.Fatalf("%s\ngot  %+v\nwant %+v", data, back, c)
		}
	})
}

func TestConfigMarshalLeavesOutWhatIsDefault(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{`{"Network":"10.3.0.0/16"}`, `{"Network":"10.3.0.0/16","Backend":{"Type":"udp"}}`},
		{`{"Network":"10.3.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}`, `{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","VNI":1}}`},
		{`{"Network":"10.3.0.0/16","SubnetLen":26,"SubnetMin":"10.3.9.0","Backend":{"Type":"udp","Port":9000,"MTU":1300}}`,
			`{"Network":"10.3.0.0/16","SubnetLen":26,"SubnetMin":"10.3.9.0","Backend":{"Type":"udp","Port":9000,"MTU":1300}}`},
	} {
		c, err := ParseNetworkConfig([]byte(tc.in))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.Marshal(); err != nil || string(got) != tc.want {
			t.Errorf("%s: got %s, %v, want %s", tc.in, got, err, tc.want)
		}
	}
	bad := NewNetworkConfig(netip.MustParsePrefix("10.0.0.0/29"))
	if _, err := bad.Marshal(); err == nil {
		t.Error("an invalid configuration was marshalled")
	}
}

// genConfig draws a valid configuration.
func genConfig(t *rapid.T) NetworkConfig {
	bits := rapid.IntRange(0, 28).Draw(t, "bits")
	base := bitsAddr(rapid.Uint32().Draw(t, "base"))
	c := NewNetworkConfig(netip.PrefixFrom(base, bits).Masked())
	c.SubnetLen = rapid.IntRange(bits+2, 30).Draw(t, "len")
	size := uint64(1) << (32 - c.SubnetLen)
	count := uint64(1) << (c.SubnetLen - bits)
	first := rapid.Uint64Range(0, count-1).Draw(t, "first")
	last := rapid.Uint64Range(first, count-1).Draw(t, "last")
	c.SubnetMin = bitsAddr(addrBits(c.Network.Addr()) + uint32(first*size))
	c.SubnetMax = bitsAddr(addrBits(c.Network.Addr()) + uint32(last*size))
	c.EnableNFTables = rapid.Bool().Draw(t, "nft")
	c.Backend.Type = rapid.SampledFrom([]string{BackendUDP, BackendVXLAN}).Draw(t, "type")
	c.Backend.Port = rapid.Uint16().Draw(t, "port")
	c.Backend.VNI = rapid.Uint32Range(0, maxVNI).Draw(t, "vni")
	c.Backend.MTU = rapid.IntRange(0, 65535).Draw(t, "mtu")
	c.Backend.DirectRouting = rapid.Bool().Draw(t, "direct")
	full, err := c.Complete()
	if err != nil {
		t.Fatalf("%+v: %v", c, err)
	}
	return full
}

func FuzzParseNetworkConfig(f *testing.F) {
	for _, s := range []string{`{}`, `{"Network":"10.0.0.0/16"}`, `{"network":"10.0.0.0/8","SubnetLen":30,"Backend":{"Type":"vxlan","VNI":3}}`,
		`{"Network":"10.0.0.0/16","SubnetLen":"/24"}`, `[[[[`, "{\"\\u0000\":null}", `{"Backend":null}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseNetworkConfig(data)
		if err != nil {
			return
		}
		again, err := c.Complete()
		if err != nil || again != c {
			t.Fatalf("%+v is not complete: %+v, %v", c, again, err)
		}
		if !c.Compatible(netip.PrefixFrom(c.SubnetMin, c.SubnetLen)) || c.Subnets() < 1 {
			t.Fatalf("%+v has no subnet to claim", c)
		}
		text, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := ParseNetworkConfig(text); err != nil || back != c {
			t.Fatalf("%s: %+v, %v, want %+v", text, back, err, c)
		}
	})
}
