package main

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tweed/lease"
)

func mustConfig(t *testing.T, text string) lease.NetworkConfig {
	t.Helper()
	cfg, err := lease.ParseNetworkConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// buildFrom parses flags as the command does and builds the new config.
func buildFrom(t *testing.T, network string, current *lease.NetworkConfig, args ...string) (lease.NetworkConfig, error) {
	t.Helper()
	cmd := newNetworkSetCommand()
	var f networkFlags
	cmd.ResetFlags()
	f.register(cmd.Flags())
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	return f.build(netip.MustParsePrefix(network), current, cmd.Flags().Changed)
}

func TestNetworkSetBuildsFlannelsConfig(t *testing.T) {
	vxlan := `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":4789,"MTU":9000},"EnableNFTables":true}`
	narrow := `{"Network":"10.244.0.0/16","SubnetLen":26,"SubnetMin":"10.244.1.0","SubnetMax":"10.244.9.192"}`
	for _, c := range []struct {
		name, network, current string
		args                   []string
		want                   string
	}{
		{"defaults", "10.244.0.0/16", "", nil, `{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}`},
		{"vxlan", "10.244.0.0/16", "", []string{"--backend", "vxlan"}, `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":1}}`},
		{"case of the backend", "10.244.0.0/16", "", []string{"--backend", "VXLAN"}, `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":1}}`},
		{
			"everything", "10.0.0.0/8", "",
			[]string{"--backend", "vxlan", "--port", "4789", "--vni", "9", "--mtu", "1400", "--subnet-len", "20", "--subnet-min", "10.16.0.0", "--subnet-max", "10.32.0.0"},
			`{"Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.16.0.0","SubnetMax":"10.32.0.0","Backend":{"Type":"vxlan","VNI":9,"Port":4789,"MTU":1400}}`,
		},
		{
			"growing keeps the backend and what is not a flag", "10.240.0.0/12", vxlan, nil,
			`{"Network":"10.240.0.0/12","EnableNFTables":true,"Backend":{"Type":"vxlan","VNI":7,"Port":4789,"MTU":9000}}`,
		},
		{
			"one field of the backend", "10.244.0.0/16", vxlan, []string{"--mtu", "0"},
			`{"Network":"10.244.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan","VNI":7,"Port":4789}}`,
		},
		{
			"another backend starts from its own defaults", "10.244.0.0/16", vxlan, []string{"--backend", "udp"},
			`{"Network":"10.244.0.0/16","EnableNFTables":true,"Backend":{"Type":"udp"}}`,
		},
		{
			"explicit bounds stay", "10.240.0.0/12", narrow, nil,
			`{"Network":"10.240.0.0/12","SubnetLen":26,"SubnetMin":"10.244.1.0","SubnetMax":"10.244.9.192","Backend":{"Type":"udp"}}`,
		},
		{"derived bounds are derived again", "10.240.0.0/12", `{"Network":"10.244.0.0/16"}`, nil, `{"Network":"10.240.0.0/12","Backend":{"Type":"udp"}}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var current *lease.NetworkConfig
			if c.current != "" {
				cfg := mustConfig(t, c.current)
				current = &cfg
			}
			got, err := buildFrom(t, c.network, current, c.args...)
			if err != nil {
				t.Fatal(err)
			}
			if got != mustConfig(t, c.want) {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestNetworkSetRefusesWhatNoNodeCouldRun(t *testing.T) {
	for _, c := range []struct {
		network string
		args    []string
		want    string
	}{
		{"10.244.0.0/29", nil, "10.244.0.0/29 is too small"},
		{"10.244.0.0/16", []string{"--backend", "host-gw"}, `backend type "host-gw" is not supported`},
		{"10.244.0.0/16", []string{"--subnet-len", "31"}, "SubnetLen 31"},
		{"10.244.0.0/16", []string{"--subnet-len", "17"}, "SubnetLen 17"},
		{"10.244.0.0/16", []string{"--subnet-min", "10.1.0.0"}, "SubnetMin 10.1.0.0 is outside"},
		{"10.244.0.0/16", []string{"--subnet-min", "10.244.0.0/24"}, "SubnetMin"},
		{"10.244.0.0/16", []string{"--subnet-max", "10.244.9.7"}, "SubnetMax 10.244.9.7"},
		{"10.244.0.0/16", []string{"--port", "70000"}, "Port 70000"},
		{"10.244.0.0/16", []string{"--port", "-1"}, "Port"},
		{"10.244.0.0/16", []string{"--backend", "vxlan", "--vni", "16777216"}, "VNI 16777216"},
		{"10.244.0.0/16", []string{"--vni", "2"}, "--vni: expected --backend vxlan"},
	} {
		if _, err := buildFrom(t, c.network, nil, c.args...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %q: got %v, want %q", c.network, c.args, err, c.want)
		}
	}
}

func TestOnlyChangesThatRunningNodesCanFollowArePassed(t *testing.T) {
	leases := []lease.Lease{
		{Subnet: netip.MustParsePrefix("10.244.3.0/24"), Attrs: lease.Attrs{PublicIP: netip.MustParseAddr("10.250.0.3")}},
		{Subnet: netip.MustParsePrefix("10.244.200.0/24")},
	}
	for _, c := range []struct {
		name, old, next string
		want            []string
	}{
		{"same", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.244.0.0/16"}`, nil},
		{"wider", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.244.0.0/15"}`, nil},
		{
			"over the underlay", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.240.0.0/12"}`,
			[]string{"10.240.0.0/12 contains the underlay address 10.250.0.3 of the node with 10.244.3.0/24"},
		},
		{"other bounds that hold all leases", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.244.0.0/16","SubnetMin":"10.244.3.0"}`, nil},
		{"backend", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`, []string{"the backend changes from udp to vxlan"}},
		{"port", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Port":9000}}`, []string{"the port changes from the default to 9000"}},
		{"VNI", `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`, `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":2}}`, []string{"the VNI changes from 1 to 2"}},
		{"MTU", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.244.0.0/16","Backend":{"Type":"udp","MTU":1400}}`, []string{"Backend.MTU changes from 0 to 1400"}},
		{
			"narrower", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.244.0.0/17"}`,
			[]string{"10.244.0.0/17 does not contain the old network 10.244.0.0/16", "1 of 2 leases, such as 10.244.200.0/24, are outside 10.244.1.0 to 10.244.127.0"},
		},
		{
			"elsewhere", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.0.0.0/16"}`,
			[]string{"10.0.0.0/16 does not contain the old network 10.244.0.0/16", "2 of 2 leases, such as 10.244.3.0/24, are outside 10.0.1.0 to 10.0.255.0"},
		},
		{"subnet length", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.244.0.0/16","SubnetLen":25}`, []string{"the subnet length changes from 24 to 25"}},
		{"bounds that shut a lease out", `{"Network":"10.244.0.0/16"}`, `{"Network":"10.244.0.0/16","SubnetMin":"10.244.4.0"}`, []string{"1 of 2 leases, such as 10.244.3.0/24, are outside 10.244.4.0 to 10.244.255.0"}},
	} {
		if got := obstacles(mustConfig(t, c.old), mustConfig(t, c.next), leases); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}
