package e2e

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"tweed/probe"
)

// TestSendersAreTold what becomes of their packets, on the node itself and in a
// container behind it: that there is no way, and how much fits the way. The
// node's kernel must take the errors for what they are.
func TestSendersAreTold(t *testing.T) {
	for framing, config := range map[string]string{"udp": udpConfig, "vxlan": vxlanConfig} {
		for _, accelerate := range []string{"auto", "off"} {
			t.Run(framing+" accelerate "+accelerate, func(t *testing.T) {
				w := newWorld(t, 2)
				w.config(config)
				a, b := w.up(0, "--accelerate", accelerate), w.up(1, "--accelerate", accelerate)
				awaitPeers(1, a, b)
				ca := newBridged(t, a)
				command(t, a.ns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1")
				for _, from := range []host{a.host(), ca.host} {
					assertToldNoRoute(t, from, a.addr())
				}
				narrow(a, b.underlay(), 1000)
				for _, from := range []host{a.host(), ca.host} {
					assertTransfer(t, from, b.host())
				}
				for _, e := range []*daemon{a, b} {
					assertBalance(t, e)
				}
				if d := a.status().Ledger.Tx.Drops["too-big"]; d == 0 {
					t.Error("nothing was too big: the transfers did not meet the narrow way")
				}
			})
		}
	}
}

// assertToldNoRoute pings until the answer is an error: one echo request may
// meet the limit of such errors.
func assertToldNoRoute(t *testing.T, from host, teller netip.Addr) {
	t.Helper()
	nobody := teller.As4()
	nobody[2] ^= 0x80
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		once, stop := context.WithTimeout(ctx, time.Second)
		_, err := probe.Ping(once, from.ns, from.addr, netip.AddrFrom4(nobody), 56)
		stop()
		if err != nil && strings.Contains(err.Error(), teller.String()+" says unreachable (code 0)") {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%s was not told that there is no way: %v", from.name, err)
		}
	}
}

// narrow gives node e a way to addr on the underlay that carries mtu bytes, and
// waits until the node knows.
func narrow(e *daemon, addr netip.Addr, mtu int) {
	t := e.w.t
	t.Helper()
	netlinkIn(t, e.ns, func(h *netlink.Handle) {
		l, err := h.LinkByName("eth0")
		if err == nil {
			err = h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, MTU: mtu, Dst: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(32, 32)}})
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	e.w.await("the way is known to be narrow", func() bool {
		got, err := e.api.Peers(t.Context())
		return err == nil && len(got.Peers) == 1 && got.Peers[0].MTU < mtu
	})
}

// assertTransfer: TCP, which sets DF on every packet, gets through.
func assertTransfer(t *testing.T, from, to host) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := probe.Transfer(ctx, from.ns, to.ns, from.addr, to.addr, 1<<20); err != nil {
		t.Errorf("%s to %s: %v", from.name, to.name, err)
	}
}
