package engine

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/engine/tap"
	"tweed/tun"
	"tweed/tun/ring"
)

// What is looked at of a packet must be what is sent on, whatever the program does
// to the shared memory meanwhile.
func TestHeadersAreCheckedInACopy(t *testing.T) {
	h := newHarness(t)
	h.shared = true
	a, b := h.attach("a", inside(-1, 20)), h.attach("b", inside(-1, 21))
	p := a.packet(udp(1200))
	p.Dst = b.Addr
	raw := plain(p)
	s, ok := a.out.Reserve(len(raw))
	if !ok {
		t.Fatal("no room")
	}
	copy(s.Bytes, raw)
	a.out.Commit(s)
	h.change()
	// The worker reads, and then the source in the shared memory changes.
	host := h.tx.source
	h.tx.source = h.e.ports
	defer func() { h.tx.source = host }()
	var err error
	if h.tx.queue, h.tx.from, err = h.e.ports.TryRead(h.tx.batch); err != nil || len(h.tx.batch.Packets()) != 1 {
		t.Fatalf("%d packets, error %v", len(h.tx.batch.Packets()), err)
	}
	copy(s.Bytes[10+12:], []byte{8, 8, 8, 8})
	h.tx.round()
	h.tx.batch.GiveBack()
	if got := b.read(t); len(got) != 1 || !bytes.Equal(got[0], raw) {
		t.Errorf("% x", got)
	}
}

// A full lane costs the packets that do not fit, by name, and nobody waits.
func TestAProgramThatDoesNotReadLosesItsOwnPackets(t *testing.T) {
	h := newHarness(t)
	h.shared = true
	a, b, c := h.attach("a", inside(-1, 20)), h.attach("b", inside(-1, 21)), h.attach("c", inside(-1, 22))
	p, other := a.packet(udp(8)), a.packet(udp(8))
	p.Dst, other.Dst = b.Addr, c.Addr
	h.change()
	for range ring.Slots {
		h.fromPort(a, plain(p))
	}
	h.fromPort(a, plain(p), plain(p), plain(other))
	if s := h.change(); s.Tx.Delivered != ring.Slots+1 || s.Tx.Drops != drops(TxLocalError, 2) {
		t.Errorf("%+v", s.Tx)
	}
	if n := len(c.read(t)); n != 1 {
		t.Errorf("%d packets for the one that reads", n)
	}
	if n := len(b.read(t)); n != ring.Slots {
		t.Errorf("%d packets of %d", n, ring.Slots)
	}
	h.fromPort(a, plain(p))
	if n := len(b.read(t)); n != 1 {
		t.Errorf("%d packets once there is room", n)
	}
}

func TestNonsenseInSharedMemoryEndsThePortOnly(t *testing.T) {
	for what, nonsense := range map[string]func(*ring.Slot){
		"no length": func(s *ring.Slot) { s.Bytes = nil },
		"too short": func(s *ring.Slot) { s.Bytes = s.Bytes[:10] },
		"too long":  func(*ring.Slot) {},
	} {
		t.Run(what, func(t *testing.T) {
			h := newHarness(t)
			h.shared = true
			a, b, c := h.attach("a", inside(-1, 20)), h.attach("b", inside(-1, 21)), h.attach("c", inside(-1, 22))
			h.fromPort(a)
			s, ok := a.out.Reserve(ring.MaxPacket)
			if !ok {
				t.Fatal("no room")
			}
			nonsense(&s)
			if a.out.Commit(s) {
				if _, err := unix.Write(a.fd, bell); err != nil {
					t.Fatal(err)
				}
			}
			p := b.packet(udp(8))
			p.Dst = c.Addr
			h.fromPort(b, plain(p))
			if n := len(c.read(t)); n != 1 {
				t.Errorf("%d packets between the others", n)
			}
			gone := map[string]bool{}
			for _, i := range h.e.Ports() {
				gone[i.Name] = i.Gone
			}
			if !gone["a"] || gone["b"] || gone["c"] {
				t.Errorf("gone: %v", gone)
			}
			if s := h.change(); s.Tx.Packets != 1 {
				t.Errorf("%+v", s.Tx)
			}
		})
	}
}

// Packets that were sent before the engine took the port over are not forgotten.
func TestPacketsFromBeforeAreRead(t *testing.T) {
	h := newHarness(t)
	h.shared = true
	a, b := h.attach("a", inside(-1, 20)), &container{Port: Port{Name: "b", Addr: inside(-1, 21)}}
	b.share(t, tun.OffloadFull)
	p := b.packet(udp(8))
	p.Dst = a.Addr
	b.write(t, plain(p)) // wakes nobody: nobody has gone to sleep
	var err error
	if b.id, err = h.e.Attach(b.Port); err != nil {
		t.Fatal(err)
	}
	fds := []unix.PollFd{{Fd: int32(h.e.ports.FD()), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 10_000); err != nil || n != 1 {
		t.Fatalf("the worker would not be woken: %v", err)
	}
	h.fromPort(b)
	if n := len(a.read(t)); n != 1 {
		t.Errorf("%d packets", n)
	}
}

// A capture shows all of a packet, wherever its end lies.
func TestTapShowsPacketsFromSharedMemoryWhole(t *testing.T) {
	h := newHarness(t)
	h.shared = true
	a, b := h.attach("a", inside(-1, 20)), h.attach("b", inside(-1, 21))
	p := a.packet(udp(1300))
	p.Dst = b.Addr
	records := h.tapped(true, func() { h.fromPort(a, plain(p)) })
	if len(records) != 1 || !bytes.Equal(records[0].Data, p.Bytes()) || records[0].Points != tap.Of(tap.TunIn, tap.TunOut) {
		t.Errorf("%d records: %+v", len(records), records)
	}
}

// forwarding returns what carries one super-packet from a port to another.
func forwarding(t testing.TB, shared bool) (carry func(), bytes int) {
	h := newHarness(t)
	h.shared = shared
	from, to := h.attach("a", inside(-1, 20)), h.attach("b", inside(-1, 21))
	p := from.packet(tcp(60000))
	p.Dst = to.Addr
	raw := p.Super(1400)
	h.tx.source = h.e.ports
	buf := make([]byte, 70000)
	return func() {
		from.write(t, raw)
		h.serve()
		if to.in == nil {
			if _, err := unix.Read(to.fd, buf); err != nil {
				t.Fatal(err)
			}
			return
		}
		if _, ok, err := to.in.Next(); !ok || err != nil {
			t.Fatal("nothing came")
		}
		to.in.Release()
	}, len(raw)
}

func TestForwardingAllocatesNothing(t *testing.T) {
	for _, shared := range []bool{false, true} {
		carry, _ := forwarding(t, shared)
		if n := testing.AllocsPerRun(50, carry); n != 0 {
			t.Errorf("shared memory %v: %v allocations", shared, n)
		}
	}
}

func BenchmarkForward(b *testing.B) {
	for name, shared := range map[string]bool{"socket": false, "shared": true} {
		b.Run(name, func(b *testing.B) {
			carry, n := forwarding(b, shared)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				carry()
			}
		})
	}
}
