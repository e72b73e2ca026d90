package accel

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// askInterval is ASK of bpf/accel.c.
const askInterval = 250 * time.Millisecond

// destination returns where the frame of the next packet to the first peer goes.
func (b *bench) destination() string {
	b.t.Helper()
	p := to(b.peers[0]).Bytes()
	wire, _ := b.send(b.t, p, 0)
	if wire == nil {
		b.t.Fatal("the packet went to the workers")
	}
	b.assertDatagram(b.t, wire, p, b.peers[0])
	if b.a.cfg.Source != [6]byte(b.frame[6:12]) || !bytes.Equal(b.frame[12:], []byte{8, 0}) {
		b.t.Fatalf("frame header %x", b.frame)
	}
	return net.HardwareAddr(b.frame[:6]).String()
}

// assertGoes waits until frames go to mac. It looks at several in a row, since
// one of them may be asked to take the kernel's way.
func (b *bench) assertGoes(why, mac string) {
	b.t.Helper()
	got := ""
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if b.destination(); b.destination() == mac {
			return
		}
		got = net.HardwareAddr(b.frame[:6]).String()
	}
	b.t.Fatalf("%s: frames go to %s, want %s", why, got, mac)
}

func (b *bench) setNeighbour(addr netip.Addr, mac string) {
	b.t.Helper()
	hw, err := net.ParseMAC(mac)
	if err == nil {
		err = b.nl.NeighSet(&netlink.Neigh{
			LinkIndex: b.a.cfg.Underlay, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: hw,
		})
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// TestFramesGoToTheFirstHop: the bench's kernel has no gateway, so frames show
// whether the table of neighbours or the kernel chose where they go.
func TestFramesGoToTheFirstHop(t *testing.T) {
	b := newBench(t, true)
	far, gateway := b.peers[0].Endpoint.Addr(), netip.MustParseAddr("192.0.2.99")
	const first, second = "02:00:00:00:99:01", "02:00:00:00:99:02"
	b.assertGoes("gateway not known", b.macOf(far))
	kernels := b.macOf(far)

	b.hop = func(netip.Addr) netip.Addr { return gateway }
	b.a.Refresh()
	b.assertGoes("the gateway's address is not known", kernels)
	b.setNeighbour(gateway, first)
	b.assertGoes("gateway", first)
	b.setNeighbour(gateway, second)
	b.assertGoes("the gateway has another address", second)

	b.a.Doubt()
	for range 3 {
		if got := b.destination(); got != kernels {
			t.Fatalf("in doubt, a frame goes to %s", got)
		}
	}
	b.setNeighbour(gateway, first)
	b.a.Follow(local, b.peers)
	if got := b.destination(); got != kernels {
		t.Fatalf("in doubt, after news of a neighbour, a frame goes to %s", got)
	}
	b.a.Refresh()
	b.assertGoes("asked again", first)
	if err := b.nl.NeighDel(&netlink.Neigh{LinkIndex: b.a.cfg.Underlay, IP: gateway.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	b.assertGoes("the gateway is gone", kernels)
}

// TestKernelIsAskedAboutTheHop: packets that pass it by would let it forget, or
// never notice that a neighbour is gone.
func TestKernelIsAskedAboutTheHop(t *testing.T) {
	b := newBench(t, true)
	gateway := netip.MustParseAddr("192.0.2.99")
	const mac = "02:00:00:00:99:01"
	b.hop = func(netip.Addr) netip.Addr { return gateway }
	b.setNeighbour(gateway, mac)
	b.a.Refresh()
	b.assertGoes("gateway", mac)
	kernels := b.macOf(b.peers[0].Endpoint.Addr())
	seen := map[string]int{}
	for start := time.Now(); time.Since(start) < 3*askInterval || seen[kernels] == 0 && time.Since(start) < patience; {
		seen[b.destination()]++
	}
	if seen[kernels] == 0 || seen[mac] == 0 || len(seen) != 2 {
		t.Errorf("frames by destination: %v; want some to the hop and a few the kernel's way to %s", seen, kernels)
	}
}

// macOf returns what the kernel of the node knows of a neighbour it has.
func (b *bench) macOf(addr netip.Addr) string {
	b.t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); b.destination() {
		known, err := b.nl.NeighList(b.a.cfg.Underlay, netlink.FAMILY_V4)
		if err != nil {
			b.t.Fatal(err)
		}
		for _, n := range known {
			if n.IP.Equal(addr.AsSlice()) && len(n.HardwareAddr) == 6 {
				return n.HardwareAddr.String()
			}
		}
	}
	b.t.Fatalf("%s is not among the neighbours", addr)
	return ""
}

func TestIndexesOfHopsAreUsedAgain(t *testing.T) {
	h := hops{memory: make([]byte, 3*hopSize), index: map[netip.Addr]uint32{}, next: 1}
	one, two, three := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3")
	known := func(a netip.Addr) *netlink.Neigh {
		return &netlink.Neigh{IP: a.AsSlice(), State: netlink.NUD_REACHABLE, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9}}
	}
	if h.of(netip.Addr{}) != 0 || h.of(one) != 1 || h.of(two) != 2 || h.of(one) != 1 {
		t.Fatalf("indexes %v", h.index)
	}
	if h.of(three) != 0 {
		t.Error("an index where there is no room")
	}
	h.learn(known(one))
	h.learn(known(three))
	if h.word(1).Load() == 0 || h.word(0).Load() != 0 {
		t.Errorf("memory %x", h.memory)
	}
	h.release(map[uint32]bool{2: true})
	if h.word(1).Load() != 0 {
		t.Error("a hop that is not used any more is still known")
	}
	if h.of(three) != 1 || h.of(two) != 2 {
		t.Errorf("indexes %v", h.index)
	}
}

func TestFrameAddressIsThatOfAUsableNeighbour(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	for _, c := range []struct {
		state int
		mac   net.HardwareAddr
		ok    bool
	}{
		{netlink.NUD_REACHABLE, mac, true},
		{netlink.NUD_STALE, mac, true},
		{netlink.NUD_PERMANENT, mac, true},
		{netlink.NUD_FAILED, mac, false},
		{netlink.NUD_INCOMPLETE, nil, false},
		{netlink.NUD_NOARP, mac, false},
		{netlink.NUD_REACHABLE, net.HardwareAddr{1, 0, 0x5e, 0, 0, 1}, false},
		{netlink.NUD_REACHABLE, make(net.HardwareAddr, 20), false},
	} {
		if got := frameAddress(&netlink.Neigh{State: c.state, HardwareAddr: c.mac}); (got != 0) != c.ok {
			t.Errorf("state %#x, %v: %#x", c.state, c.mac, got)
		}
	}
}
