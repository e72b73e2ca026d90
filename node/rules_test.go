package node

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tweed/netns"
)

func testRules() ruleSet {
	return ruleSet{
		network: netip.MustParsePrefix("10.244.0.0/16"), subnet: netip.MustParsePrefix("10.244.3.0/24"),
		masq: true, forward: true, randomFully: true,
	}
}

// The texts are flannel's, which its own end-to-end test compares.
func TestRestoreInputIsFlannelsRules(t *testing.T) {
	chains := iptablesChains(testRules())
	if len(chains) != 2 {
		t.Fatalf("%d chains", len(chains))
	}
	want := `*nat
:FLANNEL-POSTRTG - [0:0]
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.3.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.3.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.3.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
COMMIT
`
	if got := chains[0].restoreInput(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	want = `*filter
:FLANNEL-FWD - [0:0]
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
`
	if got := chains[1].restoreInput(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestNftablesMasqueradesHostToOverlayAsIptablesDoes(t *testing.T) {
	got := strings.Join(nftMasqRules(testRules()), "\n")
	want := `meta mark 0x4000 return
ip saddr 10.244.3.0/24 ip daddr 10.244.0.0/16 return
ip saddr 10.244.0.0/16 ip daddr 10.244.3.0/24 return
ip saddr != 10.244.0.0/16 ip daddr 10.244.3.0/24 return
ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// list runs a listing command inside the namespace.
func list(t *testing.T, ns *netns.Namespace, name string, args ...string) string {
	t.Helper()
	var out []byte
	err := ns.Do(func() (err error) {
		out, err = exec.Command(name, args...).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			cannot(t, "%s is not installed: traffic rules cannot be tried here", p)
		}
	}
}

func TestIptablesRulesAreKeptInForce(t *testing.T) {
	needs(t, "iptables", "iptables-restore")
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	k := startRules(ns, time.Second, quiet())
	defer k.close()
	if err := <-k.set(testRules()); err != nil {
		t.Fatal(err)
	}
	nat := func() string { return list(t, ns, "iptables", "-w", "-t", "nat", "-S") }
	before := nat()
	if !strings.Contains(before, `-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG`) ||
		strings.Count(before, "-A FLANNEL-POSTRTG ") != 6 {
		t.Errorf("nat rules:\n%s", before)
	}
	if f := list(t, ns, "iptables", "-w", "-S"); strings.Count(f, "-A FLANNEL-FWD ") != 2 || !strings.Contains(f, "-A FORWARD -m comment") {
		t.Errorf("filter rules:\n%s", f)
	}
	list(t, ns, "iptables", "-w", "-t", "nat", "-F", "FLANNEL-POSTRTG")
	for deadline := time.Now().Add(patience); k.current().Restored == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("flushed rules are not restored")
		}
	}
	if after := nat(); after != before {
		t.Errorf("flushed rules became:\n%s", after)
	}
	grown := testRules()
	grown.network = netip.MustParsePrefix("10.240.0.0/12")
	if err := <-k.set(grown); err != nil {
		t.Fatal(err)
	}
	if s := nat(); strings.Contains(s, "10.244.0.0/16") || strings.Count(s, "-A POSTROUTING") != 1 {
		t.Errorf("rules of a grown network:\n%s", s)
	}
}

// TestRulesThatCannotBeSetDelayNothing: another program holds the lock of
// iptables all the time. The start waits a moment; leases, a wider network and
// the end do not wait at all.
func TestRulesThatCannotBeSetDelayNothing(t *testing.T) {
	dir := t.TempDir()
	lock := filepath.Join(dir, "xtables.lock")
	script := "#!/bin/sh\n[ \"$1\" = --version ] && echo 'iptables v1.8.9 (legacy)' && exit\nwhile [ -e " + lock + " ]; do sleep 0.1; done\n"
	err := os.WriteFile(lock, nil, 0o600)
	for _, name := range []string{"iptables", "iptables-restore"} {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))

	te := startEtcd(t)
	te.setNetwork(`{"Network":"10.64.0.0/16"}`)
	l := lan(t, netns.LANConfig{Nodes: 2})
	cfg := baseConfig(t, te, "a")
	cfg.IPTablesForward = true
	a := up(t, l.Nodes[0], cfg)
	b := up(t, l.Nodes[1], baseConfig(t, te, "b"))
	a.untilPeers(1)
	te.setNetwork(`{"Network":"10.64.0.0/12"}`)
	a.until("the wider network", func(s Status) bool { return s.Network.Network.Bits() == 12 })
	b.until("the wider network", func(s Status) bool { return s.Network.Network.Bits() == 12 })
	if err := a.reach(b.echo(), 100); err != nil {
		t.Error(err)
	}
	if s := a.get(); s.Rules.Mode != "none" {
		t.Errorf("%+v: in force although the lock is held", s.Rules)
	}
	if err := a.stop(); err != nil {
		t.Error(err)
	}
	a = up(t, l.Nodes[0], cfg)
	if err := os.Remove(lock); err != nil {
		t.Fatal(err)
	}
	a.until("the rules", func(s Status) bool { return s.Rules.Forward && s.Rules.Problem == "" })
}

func TestNftablesRulesAreWritten(t *testing.T) {
	needs(t, "nft")
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	k := startRules(ns, time.Minute, quiet())
	defer k.close()
	s := testRules()
	s.nft = true
	for range 2 { // a second time replaces, it does not add
		if err := <-k.set(s); err != nil {
			t.Fatal(err)
		}
	}
	got := list(t, ns, "nft", "list", "table", "ip", nftTable)
	if strings.Count(got, "masquerade fully-random") != 2 || strings.Count(got, "accept") < 2 || !strings.Contains(got, "hook postrouting priority srcnat") {
		t.Errorf("nft rules:\n%s", got)
	}
	if st := k.current(); st.Mode != "nftables" || !st.Masq || !st.Forward || st.Problem != "" {
		t.Errorf("status %+v", st)
	}
}
