package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/pflag"

	"tweed/lease"
)

// networkFlags are the parts of the network config that `network set` can
// change. A flag that was not given keeps what is in force.
type networkFlags struct {
	backend              string
	port, mtu, subnetLen int
	vni                  int
	subnetMin, subnetMax string
}

func (f *networkFlags) register(fs *pflag.FlagSet) {
	fs.StringVar(&f.backend, "backend", lease.BackendUDP, "`framing` between the nodes: udp or vxlan")
	fs.IntVar(&f.port, "port", 0, "UDP `port` of the underlay; 0 means 8285 for udp, 8472 for vxlan")
	fs.IntVar(&f.vni, "vni", 1, "VXLAN network `identifier`, 0 to 16777215")
	fs.IntVar(&f.mtu, "mtu", 0, "underlay MTU in `bytes` that all nodes reckon with; 0 means each node's own")
	fs.IntVar(&f.subnetLen, "subnet-len", 0, "prefix `length` of a node's subnet; 0 derives it (24 for a /16)")
	fs.StringVar(&f.subnetMin, "subnet-min", "", "`address` of the first subnet a node may claim (default: the second)")
	fs.StringVar(&f.subnetMax, "subnet-max", "", "`address` of the last subnet a node may claim (default: the last)")
}

// build makes the new network config from the one in force, nil if there is
// none, and the flags that were given. Errors are those of the new config.
func (f *networkFlags) build(network netip.Prefix, current *lease.NetworkConfig, given func(flag string) bool) (lease.NetworkConfig, error) {
	fields := map[string]any{}
	backend := map[string]any{}
	if current != nil {
		// Marshal leaves out what is derived, so that it is derived anew.
		text, err := current.Marshal()
		if err != nil {
			return lease.NetworkConfig{}, err
		}
		if err := json.Unmarshal(text, &fields); err != nil {
			return lease.NetworkConfig{}, err
		}
		if b, ok := fields["Backend"].(map[string]any); ok && (!given("backend") || strings.EqualFold(f.backend, current.Backend.Type)) {
			backend = b
		}
	}
	fields["Network"] = network.String()
	if len(backend) == 0 {
		backend["Type"] = f.backend
	}
	for _, c := range []struct {
		flag  string
		where map[string]any
		field string
		value any
	}{
		{"port", backend, "Port", f.port},
		{"mtu", backend, "MTU", f.mtu},
		{"vni", backend, "VNI", f.vni},
		{"subnet-len", fields, "SubnetLen", f.subnetLen},
		{"subnet-min", fields, "SubnetMin", f.subnetMin},
		{"subnet-max", fields, "SubnetMax", f.subnetMax},
	} {
		if given(c.flag) {
			c.where[c.field] = c.value
		}
	}
	fields["Backend"] = backend
	text, err := json.Marshal(fields)
	if err != nil {
		return lease.NetworkConfig{}, err
	}
	next, err := lease.ParseNetworkConfig(text)
	if err == nil && next.Backend.Type == lease.BackendUDP && given("vni") {
		err = errors.New("--vni: expected --backend vxlan with it")
	}
	return next, err
}

// parseNetwork reads the argument of `network set`.
func parseNetwork(arg string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(arg)
	if err != nil || !p.Addr().Is4() {
		return netip.Prefix{}, fmt.Errorf("%q: expected an IPv4 network such as 10.244.0.0/16", arg)
	}
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("%q: host bits are set; type: %s", arg, p.Masked())
	}
	return p, nil
}

// obstacles lists why nodes that run under old, and the leases they hold,
// cannot follow a change to next while they run. A wider network and other
// bounds for new leases are no obstacle.
func obstacles(old, next lease.NetworkConfig, leases []lease.Lease) []string {
	var why []string
	add := func(format string, args ...any) { why = append(why, fmt.Sprintf(format, args...)) }
	a, b := old.Backend, next.Backend
	switch {
	case a.Type != b.Type:
		add("the backend changes from %s to %s", a.Type, b.Type)
	case a.Port != b.Port:
		add("the port changes from %s to %s", portText(a.Port), portText(b.Port))
	case a.Type == lease.BackendVXLAN && a.VNI != b.VNI:
		add("the VNI changes from %d to %d", a.VNI, b.VNI)
	case a.MTU != b.MTU:
		add("Backend.MTU changes from %d to %d", a.MTU, b.MTU)
	}
	if !next.Network.Contains(old.Network.Addr()) || next.Network.Bits() > old.Network.Bits() {
		add("%s does not contain the old network %s", next.Network, old.Network)
	}
	for _, l := range leases {
		if next.Network.Contains(l.PublicIP) && !old.Network.Contains(l.PublicIP) {
			add("%s contains the underlay address %s of the node with %s", next.Network, l.PublicIP, l.Subnet)
			break
		}
	}
	if old.SubnetLen != next.SubnetLen {
		add("the subnet length changes from %d to %d", old.SubnetLen, next.SubnetLen)
		return why
	}
	outside, example := 0, netip.Prefix{}
	for _, l := range leases {
		if !next.Compatible(l.Subnet) {
			if outside == 0 {
				example = l.Subnet
			}
			outside++
		}
	}
	if outside > 0 {
		add("%d of %d leases, such as %s, are outside %s to %s", outside, len(leases), example, next.SubnetMin, next.SubnetMax)
	}
	return why
}

func portText(port uint16) string {
	if port == 0 {
		return "the default"
	}
	return fmt.Sprint(port)
}
