package node

import (
	"fmt"
	"net/netip"
	"strings"
)

// ruleSet is what the traffic rules are made from.
type ruleSet struct {
	network, subnet netip.Prefix
	masq, forward   bool
	// randomFully masquerades with random source ports, where the tool can.
	randomFully bool
	nft         bool
}

func (s ruleSet) mode() string {
	switch {
	case !s.masq && !s.forward:
		return "none"
	case s.nft:
		return "nftables"
	}
	return "iptables"
}

// Names and texts are flannel's (pkg/trafficmngr/iptables/iptables.go), so that
// tools that look for them, and a flanneld before or after us, find their own.
const (
	masqChain    = "FLANNEL-POSTRTG"
	forwardChain = "FLANNEL-FWD"
	masqComment  = "flanneld masq"
	fwdComment   = "flanneld forward"
	// kubeMark is on packets kube-proxy masquerades itself.
	kubeMark      = "0x4000"
	multicastNet  = "224.0.0.0/4"
	nftTable      = "flannel-ipv4"
	nftMasqChain  = "postrtg"
	nftFwdChain   = "forward"
	masqBaseChain = "POSTROUTING"
	fwdBaseChain  = "FORWARD"
)

// chainRules are the rules of one of our chains and the jump that leads to it.
type chainRules struct {
	table, base, chain string
	jump               []string
	rules              [][]string
}

// iptablesChains returns the rules in order (FC 8.1, 8.2).
func iptablesChains(s ruleSet) []chainRules {
	c, p := s.network.String(), s.subnet.String()
	var out []chainRules
	if s.masq {
		rule := func(spec ...string) []string { return spec }
		tail := func(spec []string, target ...string) []string {
			return append(append(spec, "-m", "comment", "--comment", masqComment, "-j"), target...)
		}
		masquerade := []string{"MASQUERADE"}
		if s.randomFully {
			masquerade = append(masquerade, "--random-fully")
		}
		out = append(out, chainRules{
			table: "nat", base: masqBaseChain, chain: masqChain,
			jump: tail(nil, masqChain),
			rules: [][]string{
				tail(rule("-m", "mark", "--mark", kubeMark+"/"+kubeMark), "RETURN"),
				tail(rule("-s", p, "-d", c), "RETURN"),
				tail(rule("-s", c, "-d", p), "RETURN"),
				tail(rule("!", "-s", c, "-d", p), "RETURN"),
				tail(rule("-s", c, "!", "-d", multicastNet), masquerade...),
				tail(rule("!", "-s", c, "-d", c), masquerade...),
			},
		})
	}
	if s.forward {
		tail := func(target string, spec ...string) []string {
			return append(spec, "-m", "comment", "--comment", fwdComment, "-j", target)
		}
		out = append(out, chainRules{
			table: "filter", base: fwdBaseChain, chain: forwardChain,
			jump:  tail(forwardChain),
			rules: [][]string{tail("ACCEPT", "-s", c), tail("ACCEPT", "-d", c)},
		})
	}
	return out
}

// restoreInput is what iptables-restore --noflush reads to replace the content
// of one chain in a single step, so that traffic never sees half of it.
func (r chainRules) restoreInput() string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n:%s - [0:0]\n", r.table, r.chain)
	for _, rule := range r.rules {
		fmt.Fprintf(&b, "-A %s %s\n", r.chain, quoteRule(rule))
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// quoteRule joins the words of a rule; only the comments have blanks.
func quoteRule(words []string) string {
	out := make([]string, len(words))
	for i, w := range words {
		if strings.ContainsAny(w, " \t") {
			w = `"` + w + `"`
		}
		out[i] = w
	}
	return strings.Join(out, " ")
}

// nftMasqRules are the nftables rules of the postrtg chain. Flannel's fourth
// rule reads "not from our subnet to the network", which keeps its sixth from
// ever matching (FC 8.4); here it is what the iptables rule says.
func nftMasqRules(s ruleSet) []string {
	c, p := s.network.String(), s.subnet.String()
	masquerade := "masquerade"
	if s.randomFully {
		masquerade += " fully-random"
	}
	return []string{
		"meta mark " + kubeMark + " return",
		"ip saddr " + p + " ip daddr " + c + " return",
		"ip saddr " + c + " ip daddr " + p + " return",
		"ip saddr != " + c + " ip daddr " + p + " return",
		"ip saddr " + c + " ip daddr != " + multicastNet + " " + masquerade,
		"ip saddr != " + c + " ip daddr " + c + " " + masquerade,
	}
}

func nftForwardRules(s ruleSet) []string {
	c := s.network.String()
	return []string{"ip saddr " + c + " accept", "ip daddr " + c + " accept"}
}
