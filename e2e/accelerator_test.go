package e2e

import (
	"context"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tweed/netns"
	"tweed/node"
	"tweed/probe"
)

// accelerated starts two nodes whose packets are carried inside the kernel.
func accelerated(t *testing.T, config string) (w *world, a, b *daemon) {
	t.Helper()
	w = newWorld(t, 2)
	w.config(config)
	a, b = w.up(0), w.up(1)
	awaitPeers(1, a, b)
	if s := a.status().Device; s.Accelerator != "on" {
		if os.Getenv("CI") == "true" {
			t.Fatalf("accelerator %s: %s", s.Accelerator, s.AcceleratorReason)
		}
		t.Skipf("accelerator %s: %s", s.Accelerator, s.AcceleratorReason)
	}
	return w, a, b
}

// awaitAccelerator waits until the node says so, with a word of the reason.
func awaitAccelerator(e *daemon, state, reason string) {
	e.w.t.Helper()
	e.await("accelerator "+state+" "+reason, func(s node.Status) bool {
		return s.Device.Accelerator == state && strings.Contains(s.Device.AcceleratorReason, reason)
	})
}

// assertInKernel sends a ping and tells whether node a carried it inside the kernel.
func assertInKernel(t *testing.T, a, b *daemon, want bool) {
	t.Helper()
	before := a.status().Ledger
	assertPing(t, a.host(), b.host(), 56)
	// A worker counts at the end of a round, after the answer has been delivered.
	after := a.await("the ping in the ledger", func(s node.Status) bool {
		return s.Ledger.Tx.Packets > before.Tx.Packets && s.Ledger.Rx.Packets > before.Rx.Packets
	}).Ledger
	if got := after.Tx.Accelerated > before.Tx.Accelerated; got != want {
		t.Errorf("the packet was carried inside the kernel: %t, want %t", got, want)
	}
}

// TestAcceleratorStepsBack for whoever must see every packet, and comes back.
// Traffic goes on throughout.
func TestAcceleratorStepsBack(t *testing.T) {
	w, a, b := accelerated(t, vxlanConfig)
	s := stream(t, a.host(), b.host())
	awaitFlow(w, s, 200)
	assertInKernel(t, a, b, true)
	for _, c := range []struct {
		reason string
		begin  func() (end func())
	}{
		{"promiscuous", func() func() {
			setPromisc(t, a, true)
			return func() { setPromisc(t, a, false) }
		}},
		{"IPsec", func() func() { return addPolicy(t, a) }},
	} {
		end := c.begin()
		awaitAccelerator(a, "paused", c.reason)
		assertInKernel(t, a, b, false)
		awaitFlow(w, s, 200)
		end()
		awaitAccelerator(a, "on", "")
		assertInKernel(t, a, b, true)
	}
	assertClean(t, s)
	assertNoDrops(t, a, b)
	a.down()
	b.down()
}

// TestAcceleratorLosesNothingSilentlyWhenTheUnderlayIsDown: it stands back, and
// the workers say of each packet why it was not sent.
func TestAcceleratorLosesNothingSilentlyWhenTheUnderlayIsDown(t *testing.T) {
	w, a, b := accelerated(t, udpConfig)
	assertInKernel(t, a, b, true)
	set := func(up bool) {
		netlinkIn(t, a.ns, func(h *netlink.Handle) {
			l, err := h.LinkByName("eth0")
			if err == nil && up {
				err = h.LinkSetUp(l)
			} else if err == nil {
				err = h.LinkSetDown(l)
			}
			if err != nil {
				t.Fatal(err)
			}
		})
	}
	set(false)
	awaitAccelerator(a, "paused", "eth0 is down")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // for an answer that cannot come
	defer cancel()
	if _, err := probe.Ping(ctx, a.ns, a.addr(), b.addr(), 56); err == nil {
		t.Error("an answer came over an interface that is down")
	}
	a.await("a drop for send-unreachable", func(s node.Status) bool { return s.Ledger.Tx.Drops["send-unreachable"] > 0 })
	set(true)
	awaitAccelerator(a, "on", "")
	// The way to the peer is looked up again a moment later.
	w.await("packets are carried inside the kernel again", func() bool {
		before := a.status().Ledger.Tx.Accelerated
		assertPing(t, a.host(), b.host(), 56)
		return a.status().Ledger.Tx.Accelerated > before
	})
}

// TestPublicAddressElsewhereOnTheHost, as where each host announces an address
// of its loopback: datagrams come from it, whoever carries them, or the others
// take them for forged.
func TestPublicAddressElsewhereOnTheHost(t *testing.T) {
	w := newWorld(t, 2)
	w.config(vxlanConfig)
	const public = "198.51.100.1"
	command(t, w.lan.Nodes[0], "ip", "address", "add", public+"/32", "dev", "lo")
	for _, ns := range []*netns.Namespace{w.lan.Switch, w.lan.Nodes[1]} {
		command(t, ns, "ip", "route", "add", public+"/32", "via", w.lan.Addr(0).String())
	}
	a, b := w.up(0, "--public-ip", public), w.up(1)
	awaitPeers(1, a, b)
	if got := a.status(); got.Listen[0].Addr.Addr().String() != public {
		t.Fatalf("listens at %v, expected %s", got.Listen, public)
	}
	assertTraffic(t, a.host(), b.host(), 1<<20, []int{1, 1000, 9000})
	assertNoDrops(t, a, b)
}

// TestAcceleratorWaitsForTheDevice: packets that arrive while a node starts are
// dropped for what it is, a device that is not up, not for a full queue.
func TestAcceleratorWaitsForTheDevice(t *testing.T) {
	w, a, b := accelerated(t, vxlanConfig)
	s := stream(t, b.host(), a.host())
	awaitFlow(w, s, 200)
	for range 3 {
		a.end(syscall.SIGKILL)
		a.again()
		awaitFlow(w, s, 200)
		awaitAccelerator(a, "on", "")
		if l := a.status().Ledger.Rx; l.Drops["backlog-full"] != 0 {
			t.Fatalf("received: %+v", l)
		}
		assertInKernel(t, a, b, true)
	}
	s.Stop()
}

// TestAcceleratorComesBackWithTheInterface that was removed and made anew, as
// drivers and hypervisors do with network cards.
func TestAcceleratorComesBackWithTheInterface(t *testing.T) {
	w, a, b := accelerated(t, vxlanConfig)
	assertInKernel(t, a, b, true)
	netlinkIn(t, w.lan.Switch, func(h *netlink.Handle) {
		l, err := h.LinkByName(w.lan.Port(0))
		if err == nil {
			err = h.LinkDel(l) // and its other end with it
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	awaitAccelerator(a, "off", "underlay eth0 is gone")
	command(t, w.lan.Switch, "ip", "link", "add", w.lan.Port(0), "master", netns.LANBridge, "type", "veth", "peer", "name", "fresh")
	command(t, w.lan.Switch, "ip", "link", "set", w.lan.Port(0), "up")
	netlinkIn(t, w.lan.Switch, func(h *netlink.Handle) {
		l, err := h.LinkByName("fresh")
		if err == nil {
			err = h.LinkSetNsFd(l, int(a.ns.File().Fd()))
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	command(t, a.ns, "ip", "link", "set", "fresh", "name", netns.LANInterface)
	command(t, a.ns, "ip", "address", "add", a.underlay().String()+"/24", "dev", netns.LANInterface)
	command(t, a.ns, "ip", "link", "set", netns.LANInterface, "up")
	awaitAccelerator(a, "on", "")
	w.await("packets are carried inside the kernel again", func() bool {
		before := a.status().Ledger.Tx.Accelerated
		assertPing(t, a.host(), b.host(), 56)
		return a.status().Ledger.Tx.Accelerated > before
	})
	assertBalance(t, a)
}

// setPromisc does what a sniffer does on the TUN device.
func setPromisc(t *testing.T, e *daemon, on bool) {
	t.Helper()
	netlinkIn(t, e.ns, func(h *netlink.Handle) {
		l, err := h.LinkByName("tweed0")
		if err == nil && on {
			err = h.SetPromiscOn(l)
		} else if err == nil {
			err = h.SetPromiscOff(l)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
}

// addPolicy installs an IPsec policy for a network far away. The kernel tells
// nobody of it: the node looks by itself.
func addPolicy(t *testing.T, e *daemon) (remove func()) {
	t.Helper()
	far := &net.IPNet{IP: net.IPv4(198, 51, 100, 0), Mask: net.CIDRMask(24, 32)}
	policy := &netlink.XfrmPolicy{Src: far, Dst: far, Dir: netlink.XFRM_DIR_OUT}
	change := func(what func(*netlink.Handle, *netlink.XfrmPolicy) error) {
		err := e.ns.Do(func() error {
			h, err := netlink.NewHandle(unix.NETLINK_XFRM)
			if err != nil {
				return err
			}
			defer h.Close()
			return what(h, policy)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	change((*netlink.Handle).XfrmPolicyAdd)
	return func() { change((*netlink.Handle).XfrmPolicyDel) }
}

// TestAcceleratorFollowsTheTable: a peer that moves is followed while traffic
// runs, and a peer whose lease is gone is not sent to.
func TestAcceleratorFollowsTheTable(t *testing.T) {
	w, a, b := accelerated(t, udpConfig)
	s := stream(t, a.host(), b.host())
	awaitFlow(w, s, 200)
	// A wider lease of somebody else around b's must not catch b's packets.
	w.put(prefix+"/subnets/10.244.128.0-20", `{"PublicIP":"192.0.2.99","PublicIPv6":null}`)
	awaitPeers(2, a, b)
	awaitFlow(w, s, 200)
	assertClean(t, s)
	assertInKernel(t, a, b, true)

	// What has no lease is refused by the workers, under its reason.
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // for an answer that never comes
	defer cancel()
	nobody := netip.MustParseAddr("10.244.99.77")
	if _, err := probe.Ping(ctx, a.ns, a.addr(), nobody, 56); err == nil {
		t.Errorf("%s answers, nobody has it", nobody)
	}
	a.await("a drop for no-route", func(s node.Status) bool { return s.Ledger.Tx.Drops["no-route"] > 0 })
	assertBalance(t, a)
}
