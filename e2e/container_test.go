package e2e

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"tweed/netns"
	"tweed/node"
	"tweed/probe"
)

// bridged is a namespace behind the bridge of a node, the way a CNI plugin
// builds it: its traffic is forwarded by the host into the overlay.
type bridged struct {
	host
	e *daemon
}

const containerPort = "veth0" // the node's end

// newBridged gives node e a bridge with the first address of its subnet and a
// container with the second.
func newBridged(t *testing.T, e *daemon) bridged {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	subnet := netip.PrefixFrom(e.addr(), 24)
	gateway := subnet.Addr().Next()
	c := bridged{host{"container of " + e.name, ns, gateway.Next()}, e}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	up := func(h *netlink.Handle, name, addr string) netlink.Link {
		t.Helper()
		l, err := h.LinkByName(name)
		check(err)
		if addr != "" {
			a, err := netlink.ParseAddr(addr)
			check(err)
			check(h.AddrAdd(l, a))
		}
		check(h.LinkSetUp(l))
		return l
	}
	command(t, e.ns, "sysctl", "-qw", "net.ipv4.ip_forward=1")
	mtu := e.status().Device.MTU
	netlinkIn(t, e.ns, func(h *netlink.Handle) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "cni0", mtu
		check(h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
		bridge := up(h, "cni0", gateway.String()+"/24")
		attrs = netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.MasterIndex = containerPort, mtu, bridge.Attrs().Index
		check(h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(ns.File().Fd())}))
		up(h, containerPort, "")
	})
	netlinkIn(t, ns, func(h *netlink.Handle) {
		l := up(h, "eth0", c.addr.String()+"/24")
		check(h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IP(gateway.AsSlice())}))
	})
	// The kernel takes notice of a carrier a moment later, and drops until then.
	awaitCarrier(e.w, e.ns, "cni0", containerPort)
	awaitCarrier(e.w, ns, "eth0")
	return c
}

// awaitCarrier waits until the kernel has taken links into operation.
func awaitCarrier(w *world, where *netns.Namespace, names ...string) {
	w.t.Helper()
	for _, name := range names {
		w.await(name+" is in operation", func() (up bool) {
			netlinkIn(w.t, where, func(h *netlink.Handle) {
				l, err := h.LinkByName(name)
				if err != nil {
					w.t.Fatal(err)
				}
				up = l.Attrs().OperState == netlink.OperUp
			})
			return up
		})
	}
}

// command runs a command inside a namespace.
func command(t *testing.T, where *netns.Namespace, argv ...string) {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := where.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, &out)
	}
}

// offloads sets those of both ends of the container's link.
func (c bridged) offloads(t *testing.T, features ...string) {
	t.Helper()
	command(t, c.ns, append([]string{"ethtool", "-K", "eth0"}, features...)...)
	command(t, c.e.ns, append([]string{"ethtool", "-K", containerPort}, features...)...)
}

// TestContainersBehindABridge: what the host forwards into the overlay and out of
// it, with the containers' links doing nothing, some or all of the segmentation
// and checksums. Packets that were taken apart inside the kernel are cut there,
// if at all.
func TestContainersBehindABridge(t *testing.T) {
	needTool(t, "ethtool")
	for framing, config := range map[string]string{"udp": udpConfig, "vxlan": vxlanConfig} {
		for _, accelerate := range []string{"auto", "off"} {
			t.Run(framing+" accelerate "+accelerate, func(t *testing.T) {
				w := newWorld(t, 2)
				w.config(config)
				a, b := w.up(0, "--accelerate", accelerate), w.up(1, "--accelerate", accelerate)
				awaitPeers(1, a, b)
				ca, cb := newBridged(t, a), newBridged(t, b)
				sizes := []int{1, 1398, 1399, 1400, 1423, 9000, 60000}
				for _, features := range [][]string{
					nil,
					{"tso", "off", "gso", "off"},
					{"tx", "off", "rx", "off", "gro", "off"},
					{"tx", "on", "rx", "on", "tso", "off", "gso", "on", "gro", "on"},
				} {
					if features != nil {
						ca.offloads(t, features...)
						cb.offloads(t, features...)
					}
					t.Logf("offloads %s", strings.Join(features, " "))
					assertTraffic(t, ca.host, cb.host, 4<<20, sizes)
				}
				assertTraffic(t, ca.host, b.host(), 4<<20, sizes)
				assertPathMTUIsTold(t, ca, cb)
				for _, e := range []*daemon{a, b} {
					assertBalance(t, e)
				}
				assertContainerLedger(t, accelerate, a, b)
			})
		}
	}
}

// assertPathMTUIsTold: hosts whose links carry more than the overlay are told how
// much that is, and their TCP goes on with less.
func assertPathMTUIsTold(t *testing.T, a, b bridged) {
	t.Helper()
	for _, c := range []bridged{a, b} {
		command(t, c.e.ns, "ip", "link", "set", containerPort, "mtu", "1500")
		command(t, c.e.ns, "ip", "link", "set", "cni0", "mtu", "1500")
		command(t, c.ns, "ip", "link", "set", "eth0", "mtu", "1500")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, way := range [][2]host{{a.host, b.host}, {b.host, a.host}} {
		from, to := way[0], way[1]
		if _, err := probe.Transfer(ctx, from.ns, to.ns, from.addr, to.addr, 1<<20); err != nil {
			t.Errorf("%s to %s, beyond the path MTU: %v", from.name, to.name, err)
		}
	}
}

// assertContainerLedger: nothing was dropped, and most went the way it should.
func assertContainerLedger(t *testing.T, accelerate string, daemons ...*daemon) {
	t.Helper()
	for _, e := range daemons {
		l := e.status().Ledger
		for name, d := range map[string]node.DirectionLedger{"sent": l.Tx, "received": l.Rx} {
			if d.Dropped != 0 {
				t.Errorf("%s: %s: dropped %v", e.name, name, d.Drops)
			}
		}
	}
	assertCarriedBy(t, accelerate, daemons...)
}
