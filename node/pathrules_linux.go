package node

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tweed/encap"
	"tweed/engine"
	"tweed/lease"
)

// pathRules are the rules (ip-rule(8)) that choose routes by what not all packets to
// one address have in common: the ports, the interface a packet is bound to, the
// user. The sockets' datagrams have ports and are bound to no interface; the kernel
// routes the accelerator's without looking at their ports, bound to the underlay, and
// as root's (__bpf_redirect_neigh_v4 in net/core/filter.c).
type pathRules struct {
	known  bool
	choose bool // there are such rules
	// flows are the ports of the datagrams that the accelerator sends.
	flows []flow
}

// flow is the ports of a datagram.
type flow struct{ source, dest uint16 }

// flowsTo returns the flows to a peer of either framing.
func flowsTo(from engine.SourcePorts, cfg lease.NetworkConfig) []flow {
	flows := []flow{{from.UDP, portOf(encap.FramingUDP, cfg)}}
	for _, p := range from.VXLAN {
		flows = append(flows, flow{p, portOf(encap.FramingVXLAN, cfg)})
	}
	return flows
}

// carry says which flows the ways are asked for.
func (c *pathCache) carry(flows []flow) {
	if !slices.Equal(flows, c.rules.flows) {
		c.rules.flows = flows
		clear(c.paths)
	}
}

// sameForAll reports whether the accelerator's packets to ip, sent through a link,
// and all flows of the sockets take one and the same route. Mostly that is known
// without asking. The calling thread is in the node's network namespace.
func (c *pathCache) sameForAll(ip netip.Addr, link int) bool {
	if !c.rulesChoose() {
		return true
	}
	const root = 0
	want := c.askExactly(ip, nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(link))), nl.NewRtAttr(unix.RTA_UID, nl.Uint32Attr(root)))
	return want != nil && !slices.ContainsFunc(c.rules.flows, func(f flow) bool {
		got := c.askExactly(ip, portAttr(unix.RTA_SPORT, f.source), portAttr(unix.RTA_DPORT, f.dest))
		return !bytes.Equal(got, want)
	})
}

// rulesChoose looks for such rules once after each change.
func (c *pathCache) rulesChoose() bool {
	if !c.rules.known {
		rules, err := retryDump(func() ([]netlink.Rule, error) { return c.nl.RuleList(netlink.FAMILY_V4) })
		c.rules.known = err == nil
		c.rules.choose = err != nil || slices.ContainsFunc(rules, func(r netlink.Rule) bool {
			return r.Dport != nil || r.Sport != nil || r.OifName != "" || r.UIDRange != nil
		})
	}
	return c.rules.choose
}

// askExactly returns the kernel's answer for UDP datagrams (RTM_GETROUTE of
// rtnetlink(7)), of which nothing but the route depends on the question; nil when
// there is no route.
func (c *pathCache) askExactly(ip netip.Addr, more ...*nl.RtAttr) []byte {
	req := nl.NewNetlinkRequest(unix.RTM_GETROUTE, 0)
	req.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{
		Family: unix.AF_INET, Dst_len: 32, Src_len: 32, Flags: unix.RTM_F_LOOKUP_TABLE | unix.RTM_F_FIB_MATCH,
	}})
	for _, a := range append(more, nl.NewRtAttr(unix.RTA_DST, ip.AsSlice()), nl.NewRtAttr(unix.RTA_SRC, c.from.AsSlice()),
		nl.NewRtAttr(unix.RTA_IP_PROTO, []byte{unix.IPPROTO_UDP})) {
		req.AddData(a)
	}
	answers, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
	if err != nil || len(answers) != 1 {
		return nil
	}
	return answers[0]
}

func portAttr(kind int, port uint16) *nl.RtAttr {
	return nl.NewRtAttr(kind, binary.BigEndian.AppendUint16(nil, port))
}
