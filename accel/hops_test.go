package accel

import (
	"bytes"
	"encoding/binary"
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

// news is what the kernel says of a neighbour on a link.
func (b *bench) news(link int, addr netip.Addr, mac string) netlink.NeighUpdate {
	b.t.Helper()
	hw, err := net.ParseMAC(mac)
	if err != nil {
		b.t.Fatal(err)
	}
	return netlink.NeighUpdate{Type: unix.RTM_NEWNEIGH, Neigh: netlink.Neigh{
		LinkIndex: link, Family: unix.AF_INET, State: netlink.NUD_REACHABLE, IP: addr.AsSlice(), HardwareAddr: hw,
	}}
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
	b.a.neighbour(b.a.watching, b.news(b.a.cfg.Underlay, gateway, first))
	b.a.mu.Lock()
	b.a.hops.added = true // as with a new peer
	b.a.mu.Unlock()
	b.a.Follow(local, b.peers)
	for range 2 { // one may be asked to take the kernel's way
		if got := b.destination(); got != kernels {
			t.Fatalf("in doubt, after news of a neighbour, a frame goes to %s", got)
		}
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

// TestOnlyNeighboursOnTheUnderlayCount: another interface may have one of the same
// address.
func TestOnlyNeighboursOnTheUnderlayCount(t *testing.T) {
	b := newBench(t, true)
	gateway := netip.MustParseAddr("192.0.2.99")
	const mac, other = "02:00:00:00:99:01", "02:00:00:00:99:02"
	b.hop = func(netip.Addr) netip.Addr { return gateway }
	b.a.Refresh()
	b.a.mu.Lock()
	word := b.a.hops.word(b.a.hops.of(gateway))
	b.a.mu.Unlock()
	b.a.neighbour(b.a.watching, b.news(b.a.cfg.TUN, gateway, other))
	if got := word.Load(); got != 0 {
		t.Errorf("learnt %#x from another interface", got)
	}
	b.a.neighbour(b.a.watching, b.news(b.a.cfg.Underlay, gateway, mac))
	want := word.Load()
	gone := b.news(b.a.cfg.TUN, gateway, mac)
	gone.Type = unix.RTM_DELNEIGH
	b.a.neighbour(b.a.watching, gone)
	if got := word.Load(); got != want || got == 0 {
		t.Errorf("%#x became %#x when another interface lost its neighbour", want, got)
	}
	gone.LinkIndex = b.a.cfg.Underlay
	b.a.neighbour(b.a.watching, gone)
	if got := word.Load(); got != 0 {
		t.Errorf("%#x is left of a neighbour that is gone", got)
	}

	// Nobody goes by the gateway any more.
	b.hop = func(netip.Addr) netip.Addr { return netip.Addr{} }
	b.a.Refresh()
	if len(b.a.hops.index) != 0 {
		t.Errorf("hops %v are kept", b.a.hops.index)
	}
}

// TestMissedNewsOfNeighboursIsNotMissed: when the kernel had more to say than was
// read, the neighbours are left to it until all are asked for again.
func TestMissedNewsOfNeighboursIsNotMissed(t *testing.T) {
	b := newBench(t, true)
	gateway := netip.MustParseAddr("192.0.2.99")
	const first, second = "02:00:00:00:99:01", "02:00:00:00:99:02"
	b.hop = func(netip.Addr) netip.Addr { return gateway }
	b.setNeighbour(gateway, first)
	b.a.Refresh()
	b.assertGoes("gateway", first)
	kernels := b.macOf(b.peers[0].Endpoint.Addr())

	// The subscription ends as by an overrun of its socket.
	b.a.mu.Lock()
	watching := b.a.watching
	b.a.mu.Unlock()
	b.a.missedNeighbours(watching)
	for range 2 { // one may be asked to take the kernel's way
		if got := b.destination(); got != kernels {
			t.Fatalf("after missed news a frame goes to %s", got)
		}
	}
	<-watching
	b.setNeighbour(gateway, second)
	if err := b.home.Do(func() error { b.a.Refresh(); return nil }); err != nil {
		t.Fatal(err)
	}
	b.assertGoes("asked again", second)
	b.a.neighbour(watching, b.news(b.a.cfg.Underlay, gateway, first))
	b.assertGoes("what the old subscription says late is no news", second)
	b.setNeighbour(gateway, first)
	b.assertGoes("followed again", first)
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
	one, two, three, four := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3"), netip.MustParseAddr("192.0.2.4")
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
	if h.of(three) != 1 || h.of(two) != 2 || h.of(four) != 0 {
		t.Errorf("indexes %v", h.index)
	}
	h.release(map[uint32]bool{0: true}) // of entries that name none
	if a, b, c := h.of(four), h.of(one), h.of(two); a+b != 3 || a == b || c != 0 {
		t.Errorf("indexes %v, want one for each of two", h.index)
	}
}

func TestFrameAddressIsThatOfAUsableNeighbour(t *testing.T) {
	mac := net.HardwareAddr{2, 1, 3, 5, 7, 9}
	var inMemory [8]byte // struct hop of bpf/accel.c
	copy(inMemory[:], mac)
	word := binary.NativeEndian.Uint64(inMemory[:])
	for _, c := range []struct {
		state int
		mac   net.HardwareAddr
		want  uint64
	}{
		{netlink.NUD_REACHABLE, mac, word},
		{netlink.NUD_STALE, mac, word},
		{netlink.NUD_DELAY, mac, word},
		{netlink.NUD_PROBE, mac, word},
		{netlink.NUD_PERMANENT, mac, word},
		{netlink.NUD_NONE, mac, 0},
		{netlink.NUD_FAILED, mac, 0},
		{netlink.NUD_INCOMPLETE, nil, 0},
		{netlink.NUD_NOARP, mac, 0},
		{netlink.NUD_REACHABLE, net.HardwareAddr{1, 0, 0x5e, 0, 0, 1}, 0},
		{netlink.NUD_REACHABLE, bytes.Repeat([]byte{2}, 20), 0}, // InfiniBand's
		{netlink.NUD_REACHABLE, mac[:4], 0},
	} {
		if got := frameAddress(&netlink.Neigh{State: c.state, HardwareAddr: c.mac}); got != c.want {
			t.Errorf("state %#x, %v: %#x, want %#x", c.state, c.mac, got, c.want)
		}
	}
}
