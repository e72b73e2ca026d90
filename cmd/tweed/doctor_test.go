package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/attach"
	"tweed/encap"
	"tweed/node"
)

// healthy are the facts of a root node without any trouble.
func healthy() facts {
	return facts{
		status: &node.Status{
			PID: 7, Phase: node.PhaseRunning, Ready: true,
			Device: node.DeviceStatus{Name: "tweed0", MTU: 1450, Offload: "full", Accelerator: "on"},
			Etcd:   node.EtcdStatus{Endpoints: []string{"http://192.0.2.1:2379"}, Connected: true, Revision: 9},
			Listen: []node.ListenStatus{{Framing: encap.FramingVXLAN, Addr: netip.MustParseAddrPort("192.0.2.11:8472")}},
			Rules:  node.RulesStatus{Forward: true},
		},
		privileged: true, clockSynced: true, ipForward: "1", forwardPolicy: "ACCEPT",
		underlay: node.UnderlayStatus{Interface: "eth0", Address: netip.MustParseAddr("192.0.2.11"), MTU: 1500, Chosen: "default route"},
		peers: []node.PeerStatus{
			{Subnet: netip.MustParsePrefix("10.244.5.0/24"), NodeName: "n2", MTU: 1450},
			{Subnet: netip.MustParsePrefix("10.244.6.0/24"), NodeName: "n3", MTU: 1450},
		},
	}
}

func withoutEngine(f *facts) {
	f.status, f.noEngine, f.peers, f.endpoints = nil, node.ErrNoEngine, nil, "http://192.0.2.1:2379"
	f.ports = []portFact{{framing: encap.FramingVXLAN, port: 8472}}
}

func TestDoctorFindsNothingOnAHealthyNode(t *testing.T) {
	a := diagnose(healthy())
	if a.State != checkOK || a.Schema != node.Schema {
		t.Errorf("%+v", a)
	}
	for _, name := range []string{"engine", "clock", "tun", "user namespaces", "etcd", "underlay", "ports", "forwarding", "forward policy", "offload", "accelerator", "peers"} {
		if n := len(slices.DeleteFunc(slices.Clone(a.Checks), func(c check) bool { return c.Name != name })); n != 1 {
			t.Errorf("%d lines about %s, want 1", n, name)
		}
	}
}

// Each trouble alone is found, under its name, with what to type, and makes the
// result no worse than it is.
func TestDoctorFindsEachTrouble(t *testing.T) {
	for _, c := range []struct {
		name    string
		trouble func(*facts)
		line    string // check's name
		state   checkState
		words   string // in text and what to type
	}{
		{"no engine", withoutEngine, "engine", checkWarn, "none runs tweed up"},
		{"not the engine named", func(f *facts) { withoutEngine(f); f.named, f.noEngine = true, errors.New("x.sock: nobody") }, "engine", checkFail, "x.sock: nobody"},
		{"not ready", func(f *facts) { f.status.Ready, f.status.Phase = false, node.PhaseWaiting }, "engine", checkFail, "waiting, does not forward"},
		{"a problem", func(f *facts) { f.status.Problems = []string{"subnet file\nnot written"} }, "problem", checkWarn, "subnet file not written"},
		{"another namespace", func(f *facts) { f.elsewhere = true }, "namespace", checkWarn, "nsenter -t 7 -n tweed doctor"},
		{"clock not in step", func(f *facts) { f.clockSynced = false }, "clock", checkWarn, "timedatectl"},
		{"clock unknown", func(f *facts) { f.clockErr = unix.ENOSYS }, "clock", checkWarn, "not known"},
		{"no device node, root", func(f *facts) {
			withoutEngine(f)
			f.tun = &attach.Verdict{Why: "there is no device", Fix: "modprobe tun"}
		}, "tun", checkFail, "modprobe tun"},
		{"no device node, ordinary user", func(f *facts) {
			withoutEngine(f)
			f.privileged, f.tun = false, &attach.Verdict{Why: "closed", Fix: "chmod"}
		}, "tun", checkWarn, "tier veth chmod"},
		{"no user namespaces", func(f *facts) { f.usernsErr = errors.New("max is 0") }, "user namespaces", checkWarn, "max is 0 tweed run --tier netstack"},
		{"etcd lost while it forwards", func(f *facts) { f.status.Etcd.Connected, f.status.Etcd.LastError = false, "connection refused" }, "etcd", checkWarn, "connection refused"},
		{"etcd away, no engine", func(f *facts) { withoutEngine(f); f.etcdErr = errors.New("http://me:secret@192.0.2.1:2379: refused") }, "etcd", checkFail, "http://(redacted)@192.0.2.1:2379: refused"},
		{"no underlay", func(f *facts) { withoutEngine(f); f.underlayErr = errors.New("no default route") }, "underlay", checkFail, "no default route"},
		{"underlay smaller than the overlay", func(f *facts) { f.underlay.MTU = 1400 }, "underlay", checkWarn, "MTU 1400, less than the overlay's 1450"},
		{"port taken", func(f *facts) { withoutEngine(f); f.ports[0].err = unix.EADDRINUSE }, "ports", checkFail, "8472 (vxlan) is not free: address already in use"},
		{"no forwarding", func(f *facts) { f.ipForward = "0" }, "forwarding", checkWarn, "sysctl -w net.ipv4.ip_forward=1"},
		{"policy without rules", func(f *facts) { f.forwardPolicy, f.status.Rules.Forward = "DROP", false }, "forward policy", checkWarn, "DROP"},
		{"policy not readable", func(f *facts) { f.forwardErr = errors.New("denied") }, "forward policy", checkWarn, "denied sudo"},
		{"no super-packets", func(f *facts) { f.status.Device.Offload, f.status.Device.OffloadReason = "none", "old kernel" }, "offload", checkWarn, "none: old kernel"},
		{"narrow path", func(f *facts) { f.peers[1].MTU = 1350 }, "path", checkWarn, "10.244.6.0 n3: packets of 1350 bytes at most, the overlay's MTU is 1450 tweed up --mtu 1350"},
		{"no peers", func(f *facts) { f.peers = nil }, "peers", checkWarn, "none tweed leases"},
		{"a silent peer", func(f *facts) { f.silent = f.peers[1:] }, "peers", checkWarn, "1 of 2 do not answer an echo: 10.244.6.0 n3"},
		{"only silent peers", func(f *facts) { f.silent = f.peers }, "peers", checkFail, "2 of 2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := healthy()
			c.trouble(&f)
			a := diagnose(f)
			i := slices.IndexFunc(a.Checks, func(l check) bool { return l.Name == c.line })
			if i < 0 {
				t.Fatalf("no line about %s: %+v", c.line, a.Checks)
			}
			text := a.Checks[i].Text + " " + a.Checks[i].Next
			for _, w := range strings.Fields(c.words) {
				if !strings.Contains(text, w) {
					t.Errorf("%q lacks %q", text, w)
				}
			}
			if a.Checks[i].State != c.state || a.State != c.state {
				t.Errorf("%s is %s, all is %s, want %s: %q", c.line, a.Checks[i].State, a.State, c.state, text)
			}
			var out bytes.Buffer
			a.table(&out)
			if n := strings.Count(out.String(), "\n"); n != len(a.Checks) {
				t.Errorf("%d lines for %d checks", n, len(a.Checks))
			}
		})
	}
}

func TestDoctorKnowsWhatIsNoTrouble(t *testing.T) {
	for name, change := range map[string]func(*facts){
		"policy with the engine's rules":     func(f *facts) { f.forwardPolicy = "DROP" },
		"node of containers only":            func(f *facts) { f.status.Device.AttachOnly, f.ipForward, f.pingSkipped = true, "0", "no address" },
		"device node closed after the start": func(f *facts) { f.tun = &attach.Verdict{Why: "closed"} },
		"accelerator off":                    func(f *facts) { f.status.Device.Accelerator, f.status.Device.AcceleratorReason = "off", "asked for" },
	} {
		f := healthy()
		change(&f)
		if a := diagnose(f); a.State != checkOK {
			t.Errorf("%s: %+v", name, a)
		}
	}
}

func TestDoctorAsksEveryPeerAndAsksASilentOneAgain(t *testing.T) {
	peers := make([]node.PeerStatus, 3*maxEchoes)
	for i := range peers {
		peers[i].NodeName = fmt.Sprint(i)
	}
	asked := make([]int, len(peers))
	silent, err := silentPeers(peers, func(p node.PeerStatus) error {
		i := slices.IndexFunc(peers, func(q node.PeerStatus) bool { return q.NodeName == p.NodeName })
		asked[i]++
		if i%10 == 3 || i%10 == 4 && asked[i] == 1 {
			return errors.New("no answer")
		}
		return nil
	})
	if err != nil || len(silent) != 10 || silent[0].NodeName != "3" || silent[9].NodeName != "93" {
		t.Errorf("silent %v, %v", silent, err)
	}
	for i, n := range asked {
		if want := map[bool]int{true: 2, false: 1}[i%10 == 3 || i%10 == 4]; n != want {
			t.Errorf("peer %d asked %d times, want %d", i, n, want)
		}
	}
	if _, err := silentPeers(peers, func(node.PeerStatus) error { return os.ErrPermission }); !errors.Is(err, os.ErrPermission) {
		t.Errorf("not allowed to ask: %v", err)
	}
}
