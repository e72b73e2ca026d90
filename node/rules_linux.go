package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"
	"sigs.k8s.io/knftables"
)

// ruleTimeout bounds one run of iptables or nft; both wait for a lock.
const ruleTimeout = 10 * time.Second

// bridgeCall is the switch that sends bridged packets through iptables.
const bridgeCall = "/proc/sys/net/bridge/bridge-nf-call-iptables"

// ruleTool puts a ruleSet in force. All methods run in the namespace's thread.
type ruleTool interface {
	// apply makes the rules what s says, in one step per chain.
	apply(s ruleSet) error
	// missing reports whether a rule of s is gone.
	missing(s ruleSet) (bool, error)
}

// newRuleTool finds the programs; the error says which is missing.
func newRuleTool(nft bool) (ruleTool, error) {
	if nft {
		n, err := knftables.New(knftables.IPv4Family, nftTable)
		if err != nil {
			return nil, fmt.Errorf("nftables: %w (install nft, or remove EnableNFTables from the network config)", err)
		}
		return nftTool{n}, nil
	}
	if _, err := exec.LookPath("iptables"); err != nil {
		return nil, errors.New("iptables is not installed")
	}
	ipt, err := iptables.New(iptables.IPFamily(iptables.ProtocolIPv4), iptables.Timeout(int(ruleTimeout.Seconds())))
	if err != nil {
		return nil, fmt.Errorf("iptables: %w", err)
	}
	restore, err := exec.LookPath("iptables-restore")
	if err != nil {
		return nil, errors.New("iptables-restore is not installed")
	}
	return iptablesTool{ipt: ipt, restore: restore}, nil
}

type iptablesTool struct {
	ipt     *iptables.IPTables
	restore string
}

func (t iptablesTool) chains(s ruleSet) []chainRules {
	s.randomFully = s.randomFully && t.ipt.HasRandomFully()
	return iptablesChains(s)
}

func (t iptablesTool) apply(s ruleSet) error {
	for _, c := range t.chains(s) {
		if err := t.replace(c); err != nil {
			return err
		}
		// The jump comes last: it must not lead to a chain that is not there.
		if err := t.ipt.AppendUnique(c.table, c.base, c.jump...); err != nil {
			return fmt.Errorf("iptables: add the jump from %s to %s: %w", c.base, c.chain, oneLine(err))
		}
	}
	return nil
}

func (t iptablesTool) replace(c chainRules) error {
	ctx, cancel := context.WithTimeout(context.Background(), ruleTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, t.restore, "--noflush", "--wait")
	cmd.Stdin = strings.NewReader(c.restoreInput())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("iptables-restore: table %s, chain %s: %w: %s", c.table, c.chain, err, strings.Join(strings.Fields(stderr.String()), " "))
	}
	return nil
}

func (t iptablesTool) missing(s ruleSet) (bool, error) {
	for _, c := range t.chains(s) {
		ok, err := t.ipt.Exists(c.table, c.base, c.jump...)
		if err != nil || !ok {
			// A chain that does not exist is an error too, and means the same.
			return true, nil
		}
		for _, r := range c.rules {
			if ok, err := t.ipt.Exists(c.table, c.chain, r...); err != nil || !ok {
				return true, nil
			}
		}
	}
	return false, nil
}

// oneLine flattens the output of a program that an error carries.
func oneLine(err error) error {
	return errors.New(strings.Join(strings.Fields(err.Error()), " "))
}

type nftTool struct{ nft knftables.Interface }

func (t nftTool) apply(s ruleSet) error {
	tx := t.nft.NewTransaction()
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("rules of the overlay's IPv4 traffic")})
	chain := func(name string, typ knftables.BaseChainType, hook knftables.BaseChainHook, prio knftables.BaseChainPriority, rules []string) {
		tx.Add(&knftables.Chain{
			Name: name, Type: knftables.PtrTo(typ), Hook: knftables.PtrTo(hook), Priority: knftables.PtrTo(prio),
		})
		tx.Flush(&knftables.Chain{Name: name})
		for _, r := range rules {
			tx.Add(&knftables.Rule{Chain: name, Rule: r})
		}
	}
	if s.masq {
		chain(nftMasqChain, knftables.NATType, knftables.PostroutingHook, knftables.SNATPriority, nftMasqRules(s))
	}
	if s.forward {
		chain(nftFwdChain, knftables.FilterType, knftables.ForwardHook, knftables.FilterPriority, nftForwardRules(s))
	}
	ctx, cancel := context.WithTimeout(context.Background(), ruleTimeout)
	defer cancel()
	if err := t.nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("nftables: %w", oneLine(err))
	}
	return nil
}

// missing looks for the chains only: who empties one of them means it.
func (t nftTool) missing(s ruleSet) (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), ruleTimeout)
	defer cancel()
	have, err := t.nft.List(ctx, "chains")
	if err != nil && !knftables.IsNotFound(err) {
		return false, fmt.Errorf("nftables: %w", oneLine(err))
	}
	found := map[string]bool{}
	for _, c := range have {
		found[c] = true
	}
	return s.masq && !found[nftMasqChain] || s.forward && !found[nftFwdChain], nil
}

// bridgeFiltered reports whether bridged packets pass iptables; without it
// masquerading of containers on one bridge behaves differently.
func bridgeFiltered() bool {
	_, err := os.Stat(bridgeCall)
	return err == nil
}
