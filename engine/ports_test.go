package engine

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/encap"
	"tweed/tun"
	"tweed/tun/ring"
	"tweed/tun/tuntest"
)

// container is a port and the far end of its queue.
type container struct {
	Port
	id PortID
	fd int
	// out and in are nil without shared memory.
	out *ring.Producer
	in  *ring.Consumer
}

// attach adds a port with the test's hands on the worker that serves it.
func (h *harness) attach(name string, addr netip.Addr) *container {
	return h.attachAt(name, addr, tun.OffloadFull)
}

func (h *harness) attachAt(name string, addr netip.Addr, rung tun.Offload) *container {
	h.t.Helper()
	c := &container{Port: Port{Name: name, Addr: addr}}
	if h.shared {
		c.share(h.t, rung)
	} else {
		c.Queue, c.fd = pairQueue(h.t, rung)
	}
	var err error
	if c.id, err = h.e.Attach(c.Port); err != nil {
		h.t.Fatal(err)
	}
	return c
}

// share makes a port with shared memory, and the program at its other end.
func (c *container) share(t testing.TB, rung tun.Offload) {
	t.Helper()
	r, memory, err := tun.NewRing()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(memory)
	defer r.Close()
	m, err := ring.Map(memory)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Release)
	c.out, c.in = m.Ends(ring.Program)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[1]) })
	c.fd = fds[1]
	if c.Queue, err = tun.QueueFromFD(fds[0], tun.FDConfig{Offload: rung, Ring: r}); err != nil {
		t.Fatal(err)
	}
}

// bell is what wakes the engine.
var bell = []byte{0}

// write sends from the container.
func (c *container) write(t testing.TB, raw []byte) {
	t.Helper()
	if c.out == nil {
		if _, err := unix.Write(c.fd, raw); err != nil {
			t.Fatal(err)
		}
		return
	}
	s, ok := c.out.Reserve(len(raw))
	if !ok {
		t.Fatal("no room")
	}
	copy(s.Bytes, raw)
	if c.out.Commit(s) {
		if _, err := unix.Write(c.fd, bell); err != nil {
			t.Fatal(err)
		}
	}
}

// read returns what has come to the container.
func (c *container) read(t testing.TB) (out [][]byte) {
	t.Helper()
	if c.in == nil {
		return readAll(t, c.fd)
	}
	for {
		b, ok, err := c.in.Next()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return out
		}
		out = append(out, bytes.Clone(b))
		c.in.Release()
	}
}

// fromPort puts what a container sends into its port and serves the ports.
func (h *harness) fromPort(c *container, raw ...[]byte) {
	h.t.Helper()
	for _, r := range raw {
		c.write(h.t, r)
	}
	host := h.tx.source
	h.tx.source = h.e.ports
	defer func() { h.tx.source = host }()
	h.serve()
}

// eachWay runs a test with ports that are sockets, and that are shared memory.
func eachWay(t *testing.T, test func(*testing.T, *harness)) {
	for _, shared := range []bool{false, true} {
		t.Run(map[bool]string{false: "socket", true: "shared memory"}[shared], func(t *testing.T) {
			h := newHarness(t)
			h.shared = shared
			test(t, h)
		})
	}
}

func (c *container) packet(p tuntest.Packet) tuntest.Packet {
	p.Src = c.Addr
	return p
}

// The harness's engine has no device of its own, so its only pair serves the
// ports; the test serves the host from it as well.
func TestPortsReachPeersAndEachOther(t *testing.T) { eachWay(t, portsReachPeersAndEachOther) }

func portsReachPeersAndEachOther(t *testing.T, h *harness) {
	a, b := h.attach("a", inside(-1, 20)), h.attach("b", inside(-1, 21))
	// To a peer, and from it.
	p := a.packet(to(vxlanPeer, udp(100)))
	h.fromPort(a, plain(p))
	if got := h.inner(vxlanPeer); len(got) != 1 || !bytes.Equal(got[0], p.Bytes()) {
		t.Errorf("to a peer: % x", got)
	}
	p = from(vxlanPeer, udp(100))
	p.Dst = a.Addr
	h.transmit(h.peers[vxlanPeer], encap.FramingVXLAN, 0, framed(encap.FramingVXLAN, vxlanPeer, p.Bytes()))
	if w := a.read(t); len(w) != 1 || !bytes.Equal(w[0], plain(p)) {
		t.Errorf("from a peer: % x", w)
	}
	// To each other: single, partial and super, as they came.
	super := a.packet(tcp(9000))
	super.Dst = b.Addr
	partial := a.packet(udp(10))
	partial.Dst, partial.Sum = b.Addr, tuntest.Partial
	sent := [][]byte{plain(a.packet(tuntest.Packet{Dst: b.Addr, Proto: tuntest.UDP, TTL: 1})), super.Super(1000),
		tuntest.Virtio{Flags: 1, CsumStart: 20, CsumOffset: 6}.Prepend(partial.Bytes())}
	h.change()
	h.fromPort(a, sent...)
	if w := b.read(t); !equalPackets(w, sent) {
		t.Errorf("to each other: %d packets of %d, or changed", len(w), len(sent))
	}
	if s := h.change(); s.Tx.Delivered != 1+9+1 || s.Tx.Packets != 11 || s.Tx.Bytes != s.Tx.DeliveredBytes {
		t.Errorf("%+v", s.Tx)
	}
	// From the host, and an address of ours that nobody has goes to the host.
	h.send(plain(tuntest.Packet{Src: inside(-1, 0), Dst: a.Addr, Proto: 99}))
	if w := a.read(t); len(w) != 1 {
		t.Errorf("from the host: %d", len(w))
	}
	p.Dst = inside(-1, 77)
	h.transmit(h.peers[vxlanPeer], encap.FramingVXLAN, 0, framed(encap.FramingVXLAN, vxlanPeer, p.Bytes()))
	if got := h.delivered(); len(got) != 1 {
		t.Errorf("to the host: %d", len(got))
	}
	h.quiet()
}

func TestPortMaySendFromItsAddressOnly(t *testing.T) { eachWay(t, portMaySendFromItsAddressOnly) }

func portMaySendFromItsAddressOnly(t *testing.T, h *harness) {
	a, b := h.attach("a", inside(-1, 20)), h.attach("b", inside(-1, 21))
	h.change()
	for _, src := range []netip.Addr{b.Addr, inside(-1, 0), inside(udpPeer, 5), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("8.8.8.8")} {
		for _, dst := range []netip.Addr{inside(udpPeer, 5), b.Addr, inside(100, 1)} {
			p, s := udp(10), tcp(3000)
			p.Src, p.Dst, s.Src, s.Dst = src, dst, src, dst
			h.fromPort(a, plain(p), s.Super(1000))
			if s := h.change(); s.Tx.Drops != drops(TxForeignSource, 4) || s.Tx.Packets != 4 || s.ICMPSent != 0 {
				t.Errorf("%v to %v: %+v", src, dst, s.Tx)
			}
			if n := len(a.read(t)) + len(b.read(t)); n > 0 {
				t.Errorf("%v to %v: %d packets", src, dst, n)
			}
		}
	}
	h.quiet()
}

func TestPortDoesNotHearItself(t *testing.T) { eachWay(t, portDoesNotHearItself) }

func portDoesNotHearItself(t *testing.T, h *harness) {
	a := h.attach("a", inside(-1, 20))
	p := a.packet(tuntest.Packet{Proto: 99}) // 8 bytes short of an answer
	p.Dst = a.Addr
	h.change()
	h.fromPort(a, plain(p))
	if s := h.change(); s.Tx.Drops != drops(TxNoRoute, 1) || len(a.read(t)) != 0 {
		t.Errorf("%+v", s.Tx)
	}
}

// A container whose side takes no super-packets gets segments with checksums.
func TestPlainPortGetsPlainPackets(t *testing.T) { eachWay(t, plainPortGetsPlainPackets) }

func plainPortGetsPlainPackets(t *testing.T, h *harness) {
	a, b := h.attach("a", inside(-1, 20)), h.attachAt("b", inside(-1, 21), tun.OffloadNone)
	super, partial := a.packet(tcp(9300)), a.packet(udp(10))
	super.Dst, partial.Dst, partial.Sum = b.Addr, b.Addr, tuntest.Partial
	h.fromPort(a, super.Super(1000), tuntest.Virtio{Flags: 1, CsumStart: 20, CsumOffset: 6}.Prepend(partial.Bytes()))
	want, err := tuntest.Split(super.Super(1000))
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, tuntest.Complete(partial.Bytes()))
	for i, w := range want {
		want[i] = tuntest.Virtio{}.Prepend(w)
	}
	if w := b.read(t); !equalPackets(w, want) {
		t.Errorf("%d packets, want %d, or changed", len(w), len(want))
	}
	// And what a peer sends in a train is not merged for it.
	var in [][]byte
	for k := range 5 {
		p := from(udpPeer, tcp(100))
		p.Dst, p.Seq, p.Sum = b.Addr, uint32(100*k), tuntest.Partial
		in = append(in, p.Bytes())
	}
	h.transmit(h.segmenting(udpPeer), encap.FramingUDP, 0, in...)
	if w := b.read(t); len(w) != 5 {
		t.Errorf("%d packets from a train of 5", len(w))
	}
}

// A container with a packet socket writes the virtio header itself: it must not
// get its source address rewritten after it has been checked.
func TestPortCannotForgeThroughTheChecksum(t *testing.T) {
	eachWay(t, portCannotForgeThroughTheChecksum)
}

func portCannotForgeThroughTheChecksum(t *testing.T, h *harness) {
	a, b := h.attach("a", inside(-1, 20)), h.attachAt("b", inside(-1, 21), tun.OffloadNone)
	for off := uint16(0); off < 20; off += 2 {
		remote, local := a.packet(to(udpPeer, udp(10))), a.packet(udp(10))
		local.Dst = b.Addr
		v := tuntest.Virtio{Flags: tuntest.NeedsCsum, CsumOffset: off}
		h.fromPort(a, v.Prepend(remote.Bytes()), v.Prepend(local.Bytes()))
		if n := len(b.read(t)); n > 0 {
			t.Errorf("field at %d: %d packets at the other port", off, n)
		}
		h.quiet()
	}
	if s := h.change(); s.Tx.Delivered != 0 || s.Tx.Drops[TxMalformed] != 10 || s.Tx.Drops[TxLocalError] != 10 {
		t.Errorf("%+v", s.Tx)
	}
}

func TestBrokenPortCostsItsOwnPacketsOnly(t *testing.T) { eachWay(t, brokenPortCostsItsOwnPacketsOnly) }

func brokenPortCostsItsOwnPacketsOnly(t *testing.T, h *harness) {
	a, b := h.attach("a", inside(-1, 20)), h.attach("b", inside(-1, 21))
	if err := unix.Shutdown(b.fd, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	h.change()
	p, s := a.packet(udp(10)), a.packet(tcp(3000))
	p.Dst, s.Dst = b.Addr, b.Addr
	h.fromPort(a, plain(p), s.Super(1000), plain(a.packet(to(udpPeer, udp(5)))))
	if s := h.change(); s.Tx.Drops != drops(TxLocalError, 4) || s.Tx.Delivered != 1 {
		t.Errorf("%+v", s.Tx)
	}
	gone := map[string]bool{}
	for _, i := range h.e.Ports() {
		gone[i.Name] = i.Gone
	}
	if gone["a"] || !gone["b"] {
		t.Errorf("gone: %v", gone)
	}
}

func TestDetachClosesAndForgets(t *testing.T) { eachWay(t, detachClosesAndForgets) }

func detachClosesAndForgets(t *testing.T, h *harness) {
	a := h.attach("a", inside(-1, 20))
	if err := h.e.Detach(a.id); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Read(a.fd, make([]byte, 10)); n != 0 || err != nil {
		t.Errorf("the queue is still open: %d, %v", n, err)
	}
	if err := h.e.Detach(a.id); err == nil {
		t.Error("detached twice")
	}
	if len(h.e.Ports()) != 0 {
		t.Errorf("%v", h.e.Ports())
	}
	// The address is the host's again, and free for another port with a new ID.
	p := from(udpPeer, udp(10))
	p.Dst = a.Addr
	h.transmit(h.peers[udpPeer], encap.FramingUDP, 0, p.Bytes())
	if got := h.delivered(); len(got) != 1 {
		t.Errorf("%d packets at the host", len(got))
	}
	if b := h.attach("b", a.Addr); b.id == a.id {
		t.Error("an ID was used again")
	}
}

func TestAttachRefuses(t *testing.T) {
	h := newHarness(t)
	q, _ := pairQueue(t, tun.OffloadFull)
	defer q.Close()
	h.attach("first", inside(-1, 20))
	for name, p := range map[string]Port{
		"taken":   {"x", inside(-1, 20), q},
		"outside": {"x", inside(udpPeer, 5), q},
		"none":    {"x", netip.Addr{}, q},
		"IPv6":    {"x", netip.MustParseAddr("fd00::1"), q},
	} {
		if _, err := h.e.Attach(p); err == nil {
			t.Errorf("%s: attached", name)
		} else if p.Addr.IsValid() && !strings.Contains(err.Error(), p.Addr.String()) {
			t.Errorf("%s: %q does not name the address", name, err)
		}
	}
	closed, _ := pairQueue(t, tun.OffloadFull)
	closed.Close()
	if _, err := h.e.Attach(Port{"closed", inside(-1, 30), closed}); err == nil {
		t.Error("a closed queue is attached")
	}
	if n := len(h.e.Ports()); n != 1 {
		t.Errorf("%d ports", n)
	}
}

// A new snapshot keeps the ports.
func TestPortsSurviveASnapshot(t *testing.T) {
	h := newHarness(t)
	a := h.attach("a", inside(-1, 20))
	h.apply()
	p := from(udpPeer, udp(10))
	p.Dst = a.Addr
	h.transmit(h.peers[udpPeer], encap.FramingUDP, 0, p.Bytes())
	if w := a.read(t); len(w) != 1 {
		t.Errorf("%d packets", len(w))
	}
}

// Without a device of the host, an address that is no port's is nobody's.
func TestWithoutHostUnknownAddressIsNotForUs(t *testing.T) {
	h := newHarness(t)
	for _, w := range h.e.rx {
		w.queue = nil
	}
	h.transmit(h.peers[udpPeer], encap.FramingUDP, 0, from(udpPeer, udp(10)).Bytes())
	if s := h.change(); s.Rx.Drops != drops(RxNotForUs, 1) {
		t.Errorf("%+v", s.Rx)
	}
}
