package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/node"
)

// Nodes take subnets at random, up to SubnetMax; those above it are for the
// leases that a test writes itself.
const (
	udpConfig   = `{"Network":"10.244.0.0/16","SubnetMax":"10.244.99.0"}`
	vxlanConfig = `{"Network":"10.244.0.0/16","SubnetMax":"10.244.99.0","Backend":{"Type":"vxlan"}}`
)

// TestTraffic is the main job: everything between two nodes, in both framings,
// by the workers and inside the kernel.
func TestTraffic(t *testing.T) {
	for framing, config := range map[string]string{"udp": udpConfig, "vxlan": vxlanConfig} {
		for _, accelerate := range []string{"auto", "off"} {
			t.Run(framing+" accelerate "+accelerate, func(t *testing.T) {
				w := newWorld(t, 2)
				w.config(config)
				a, b := w.up(0, "--accelerate", accelerate), w.up(1, "--accelerate", accelerate)
				awaitPeers(1, a, b)
				assertTraffic(t, a.host(), b.host(), transferBytes(), datagramSizes())
				assertNoDrops(t, a, b)
				assertCarriedBy(t, accelerate, a, b)
				a.down()
				b.down()
			})
		}
	}
}

// assertCarriedBy fails the test unless the packets went the way they should:
// nearly all inside the kernel, or none.
func assertCarriedBy(t *testing.T, accelerate string, daemons ...*daemon) {
	t.Helper()
	for _, e := range daemons {
		s := e.status()
		if accelerate == "auto" && s.Device.Accelerator != "on" {
			if os.Getenv("CI") == "true" {
				t.Errorf("%s: accelerator %s: %s", e.name, s.Device.Accelerator, s.Device.AcceleratorReason)
			}
			t.Logf("%s: accelerator %s: %s", e.name, s.Device.Accelerator, s.Device.AcceleratorReason)
			continue
		}
		for dir, d := range map[string]node.DirectionLedger{"sent": s.Ledger.Tx, "received": s.Ledger.Rx} {
			if ok := accelerate == "auto" && d.Accelerated > d.Packets*9/10 || accelerate == "off" && d.Accelerated == 0; !ok || d.Packets == 0 {
				t.Errorf("%s with --accelerate %s: %d of %d packets %s inside the kernel", e.name, accelerate, d.Accelerated, d.Packets, dir)
			}
		}
	}
}

// TestTrafficOnEveryOffloadRung: what the kernel does for us must not matter,
// nor that the two sides differ. One of them is accelerated, too.
func TestTrafficOnEveryOffloadRung(t *testing.T) {
	for framing, config := range map[string]string{"udp": udpConfig, "vxlan": vxlanConfig} {
		t.Run(framing, func(t *testing.T) {
			w := newWorld(t, 3)
			w.config(config)
			none, tso, full := w.up(0, "--offload", "none", "--accelerate", "off"), w.up(1, "--offload", "tso", "--workers", "1", "--accelerate", "off"), w.up(2, "--offload", "full")
			awaitPeers(2, none, tso, full)
			sizes := []int{1, 1000, 1399, 1400, 3000, 30000, 60000}
			assertTraffic(t, none.host(), full.host(), 4<<20, sizes)
			assertTraffic(t, none.host(), tso.host(), 4<<20, sizes)
			assertTraffic(t, tso.host(), full.host(), 4<<20, sizes)
			assertNoDrops(t, none, tso, full)
		})
	}
}

// TestDistributionEtcd runs the network on the etcd of the distribution, which
// is many versions older.
func TestDistributionEtcd(t *testing.T) {
	needTool(t, "etcd")
	version, err := exec.Command("etcd", "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", version)
	w := newUnderlay(t, 2)
	w.etcdArgv = []string{"etcd", "--data-dir", filepath.Join(w.dir, "etcd"),
		"--listen-client-urls", w.endpoint(), "--advertise-client-urls", w.endpoint(),
		"--listen-peer-urls", "http://127.0.0.1:2380", "--logger", "zap", "--log-level", "error"}
	w.startEtcd()
	w.config(udpConfig)
	a, b := w.up(0), w.up(1)
	awaitPeers(1, a, b)
	assertTraffic(t, a.host(), b.host(), 4<<20, []int{1, 1400, 60000})

	// Its compaction and its restart are followed as well.
	s := stream(t, a.host(), b.host())
	awaitFlow(w, s, 100)
	w.etcd.end(unix.SIGKILL)
	awaitFlow(w, s, 500)
	w.startEtcd()
	w.put(prefix+"/subnets/10.244.200.0-24", `{"PublicIP":"192.0.2.200","PublicIPv6":null}`)
	awaitPeers(2, a, b)
	assertClean(t, s)
	assertNoDrops(t, a, b)
}

// TestReleaseOnExit: the lease is kept by default, so that a restart finds its
// subnet again, and given back when asked to.
func TestReleaseOnExit(t *testing.T) {
	w := newWorld(t, 2)
	w.config(udpConfig)
	stays, goes := w.up(0), w.up(1, "--release-on-exit")
	key := leaseKey(stays)
	stays.down()
	goes.down()
	keys := w.keys()
	if _, ok := keys[key]; !ok || len(keys) != 2 {
		t.Errorf("keys after both ended: %v, want the config and %s", keys, key)
	}
}
