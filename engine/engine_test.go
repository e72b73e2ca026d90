package engine

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tweed/encap"
	"tweed/engine/table"
	"tweed/engine/tap"
	"tweed/netns"
	"tweed/tun"
	"tweed/tun/tuntest"
)

// eventually waits for what other threads bring about. The limit is there to
// end a broken test, not to measure.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func TestNewNamesWhatIsWrong(t *testing.T) {
	if err := (&harness{t: t}).inNamespace(func() error { newNamesWhatIsWrong(t); return nil }); err != nil {
		t.Fatal(err)
	}
}

func newNamesWhatIsWrong(t *testing.T) {
	taken, err := encap.Listen(encap.SocketConfig{Addr: netip.AddrPortFrom(ourAddr, 0)})
	if err != nil {
		t.Error(err)
		return
	}
	defer taken.Close()
	addr, _ := taken.LocalAddr()
	for name, c := range map[string]struct {
		cfg  Config
		want string
	}{
		"port in use":      {Config{Source: ourAddr, Listen: []Listen{{encap.FramingUDP, addr}}}, addr.String()},
		"second in use":    {Config{Source: ourAddr, Listen: []Listen{{encap.FramingVXLAN, netip.AddrPortFrom(ourAddr, 0)}, {encap.FramingUDP, addr}}}, addr.String()},
		"address not ours": {Config{Source: ourAddr, Listen: []Listen{{encap.FramingUDP, netip.MustParseAddrPort("192.0.2.9:8285")}}}, "192.0.2.9"},
		"source not ours":  {Config{Source: netip.MustParseAddr("192.0.2.9")}, "192.0.2.9"},
		"no source":        {Config{}, "source"},
		"IPv6 source":      {Config{Source: netip.MustParseAddr("::1")}, "::1"},
	} {
		if e, err := New(c.cfg); err == nil {
			t.Errorf("%s: no error", name)
			e.Close()
		} else if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q does not name %s", name, err, c.want)
		}
	}
}

func TestRefusedSnapshotLeavesTheLastOne(t *testing.T) {
	h := newHarness(t)
	for name, change := range map[string]func(s *Snapshot){
		"duplicate subnet": func(s *Snapshot) { s.Peers = append(s.Peers[:1:1], s.Peers[0]) },
		"no endpoint":      func(s *Snapshot) { s.Peers = []table.Peer{{Subnet: s.Peers[0].Subnet}} },
		"no own subnet":    func(s *Snapshot) { s.Local.Subnet = netip.Prefix{} },
		"IPv6 own subnet":  func(s *Snapshot) { s.Local.Subnet = netip.MustParsePrefix("fd00::/64") },
		"no own address":   func(s *Snapshot) { s.Local.Addr = netip.Addr{} },
	} {
		s := h.snap
		s.Revision = 99
		change(&s)
		if err := h.e.Apply(s); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if got := h.e.Snapshot(); got.Revision != 1 || len(got.Peers) != numPeers {
			t.Errorf("%s: revision %d with %d peers is in force", name, got.Revision, len(got.Peers))
		}
		h.send(plain(to(udpPeer, udp(5))))
		if got := h.inner(udpPeer); len(got) != 1 {
			t.Errorf("%s: packets no longer go out", name)
		}
	}
	if p, ok := h.e.Lookup(inside(vxlanPeer, 3)); !ok || p != h.snap.Peers[vxlanPeer] {
		t.Errorf("%+v, %v", p, ok)
	}
	for _, a := range []netip.Addr{inside(100, 1), inside(-1, 1), {}, netip.MustParseAddr("::1"), netip.MustParseAddr("::ffff:10.1.2.1")} {
		if p, ok := h.e.Lookup(a); ok {
			t.Errorf("%v is at %v", a, p.Endpoint)
		}
	}
}

func TestCloseWithoutStart(t *testing.T) {
	e, err := New(Config{Source: ourAddr, MTU: testMTU, Offload: tun.OffloadFull, Listen: []Listen{{encap.FramingUDP, netip.AddrPortFrom(ourAddr, 0)}}})
	if err != nil {
		t.Fatal(err)
	}
	if s := e.Stats(); s.Workers != 1 || !s.SendSegmented || !s.ReceiveMerged || s.Offload != tun.OffloadFull || s.OffloadReason == "" {
		t.Errorf("%+v", s)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	// The port is free again.
	addr := e.Listening()[0].Addr
	s, err := encap.Listen(encap.SocketConfig{Addr: addr})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// running is a harness whose threads do run.
func running(t *testing.T) *harness {
	h := newHarness(t)
	if err := h.e.Start(); err != nil {
		t.Fatal(err)
	}
	return h
}

func TestDeletedDeviceIsReported(t *testing.T) {
	h := running(t)
	if err := unix.Shutdown(h.host, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-h.e.Failed():
		if !errors.Is(err, tun.ErrGone) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("nobody says that the device is gone")
	}
}

// Until its thread waits, nobody else may take the transmit worker.
func TestTransmitWorkerIsNotOfferedBeforeItsThreadWaits(t *testing.T) {
	h := newHarness(t)
	if got := h.e.pairs[0].holder.Load(); got != heldByTx {
		t.Errorf("held by %d before the start", got)
	}
}

// A rung bell must be silenced, or the thread it woke never sleeps again.
func TestTransmitThreadSleepsAgain(t *testing.T) {
	h := running(t)
	p := h.e.pairs[0]
	for range 3 {
		p.bell.ring()
		eventually(t, "the bell is silent", func() bool {
			fds := []unix.PollFd{{Fd: int32(p.bell.fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, 0)
			return n == 0 && err == nil
		})
	}
}

// Light traffic moves transmitting to the receive thread, heavy traffic moves
// it back; no packet is lost or doubled on the way.
func TestTransmitWorkerChangesHands(t *testing.T) {
	h := running(t)
	p := h.e.pairs[0]
	at, _ := h.e.rx[0].sock.LocalAddr()
	b, dst := encap.NewSendBatch(), encap.NewDest(at)
	b.Reset(h.peers[udpPeer])
	ping, pong := from(udpPeer, udp(20)).Bytes(), plain(to(udpPeer, udp(20)))
	sent := 0
	for range 3 {
		eventually(t, "the receive thread transmits", func() bool {
			b.Add(dst, 0, 0, ping, nil)
			var res encap.SendResult
			h.peers[udpPeer].Send(b, &res)
			eventually(t, "the host gets it", func() bool { return len(h.written()) == 1 })
			if _, err := unix.Write(h.host, pong); err != nil {
				t.Fatal(err)
			}
			sent++
			eventually(t, "the peer gets it", func() bool { return len(h.arrived(udpPeer)) == 1 })
			return p.holder.Load() == heldByRx
		})
		eventually(t, "the transmit thread takes over", func() bool {
			// A super-packet is a heavy round.
			if _, err := unix.Write(h.host, to(udpPeer, tcp(30000)).Super(1000)); err != nil {
				t.Fatal(err)
			}
			sent += 30
			got := 0
			eventually(t, "the peer gets all of it", func() bool { got += len(h.arrived(udpPeer)); return got == 30 })
			return p.holder.Load() != heldByRx
		})
	}
	if s := h.change(); s.Tx.Packets != uint64(sent) || s.Tx.Delivered != uint64(sent) {
		t.Errorf("%+v, want %d", s.Tx, sent)
	}
}

// Everything that may happen at once does, under the race detector: traffic
// both ways, snapshots, ports coming and going, a capture, readers of the
// ledger.
func TestEverythingAtOnce(t *testing.T) {
	h := running(t)
	stop := make(chan struct{})
	var busy sync.WaitGroup
	loop := func(f func(rng *rand.Rand)) {
		busy.Go(func() {
			rng := rand.New(rand.NewPCG(1, 2))
			for {
				select {
				case <-stop:
					return
				default:
					f(rng)
				}
			}
		})
	}
	raw := [][]byte{plain(noRoute(udp(9))), tuntest.Virtio{}.Prepend([]byte("junk"))}
	for i := range numPeers {
		raw = append(raw, plain(to(i, udp(30))), to(i, tcp(3000)).Super(900))
	}
	loop(func(rng *rand.Rand) { // the host sends
		_, _ = unix.Write(h.host, raw[rng.IntN(len(raw))])
	})
	loop(func(*rand.Rand) { // and reads
		buf := make([]byte, 70000)
		if n, _ := unix.Read(h.host, buf); n > 0 {
			if _, err := tuntest.Split(buf[:n]); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range 2 { // peers and a stranger send in each framing
		w := h.e.rx[i]
		at, _ := w.sock.LocalAddr()
		loop(func(rng *rand.Rand) {
			from1 := []int{udpPeer, vxlanPeer, stranger}[rng.IntN(3)]
			p := framed(w.framing, from1, from(from1, udp(30)).Bytes())
			_ = unix.Sendto(h.peers[from1].FD(), p, unix.MSG_DONTWAIT, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()})
		})
	}
	busy.Go(func() { // snapshots
		all := h.snap.Peers
		// Until everything has happened, however little time a loop is given.
		seen := func() bool {
			s := h.e.Stats()
			return s.Tx.Delivered > 0 && s.Rx.Delivered > 0 && s.Tx.Drops[TxNoRoute] > 0 && s.Rx.Drops[RxUnknownSource] > 0
		}
		end := time.Now().Add(time.Minute)
		for n := 0; n < 40 || !seen() && time.Now().Before(end); n++ {
			s := h.snap
			s.Revision = int64(n)
			s.Peers = all[n%2 : len(all)-n%3]
			if err := h.e.Apply(s); err != nil {
				t.Error(err)
			}
			h.e.Lookup(inside(udpPeer, 1))
			time.Sleep(time.Millisecond)
		}
		close(stop)
	})
	loop(func(rng *rand.Rand) { // ports
		q, _ := pairQueue(t, tun.OffloadFull)
		id, err := h.e.Attach(Port{"p", inside(-1, 50), q})
		if err != nil {
			t.Error(err)
			return
		}
		h.e.Ports()
		if err := h.e.Detach(id); err != nil {
			t.Error(err)
		}
	})
	loop(func(*rand.Rand) { // a capture
		s, err := tap.NewSet(h.e.TapWorkers(), tap.AllPoints, 128, 1<<16)
		if err != nil {
			t.Error(err)
			return
		}
		h.e.SetTap(s)
		time.Sleep(time.Millisecond)
		h.e.SetTap(nil)
		s.Free()
	})
	loop(func(*rand.Rand) { // readers
		s := h.e.Stats()
		for _, d := range []Direction{s.Tx, s.Rx} {
			if d.Packets != d.Delivered+d.Dropped() {
				t.Errorf("a reader sees %d packets, %d delivered + %d dropped", d.Packets, d.Delivered, d.Dropped())
			}
		}
	})
	busy.Wait()
	s := h.e.Stats()
	if s.Tx.Delivered == 0 || s.Rx.Delivered == 0 || s.Tx.Drops[TxNoRoute] == 0 || s.Rx.Drops[RxUnknownSource] == 0 {
		t.Errorf("%+v", s)
	}
}

// The equation holds at every moment, not only when all is quiet.
func TestLedgerIsNeverSeenHalfWritten(t *testing.T) {
	var l ledger
	var writer sync.WaitGroup
	stop := make(chan struct{})
	writer.Go(func() {
		rng := rand.New(rand.NewPCG(3, 4))
		for {
			select {
			case <-stop:
				return
			default:
			}
			var y tally
			y.Delivered = uint64(rng.IntN(9))
			for range rng.IntN(3) {
				y.drop(Reason(rng.IntN(int(NumReasons))), uint64(rng.IntN(5)))
			}
			y.Packets = y.Delivered + y.Dropped()
			y.Bytes, y.DeliveredBytes = 3*y.Packets, 3*y.Delivered
			l.publish(&y)
			if y.Direction != (Direction{}) {
				t.Error("the tally is not empty after it was published")
			}
		}
	})
	last := uint64(0)
	for range 20000 {
		d := l.read()
		if d.Packets != d.Delivered+d.Dropped() || d.Bytes != 3*d.Packets || d.DeliveredBytes != 3*d.Delivered || d.Packets < last {
			t.Fatalf("%+v after %d", d, last)
		}
		last = d.Packets
	}
	close(stop)
	writer.Wait()
}

func TestReasons(t *testing.T) {
	seen := map[string]bool{}
	for r := range NumReasons {
		name := r.String()
		if name == "" || seen[name] || r.Doc() == "" || strings.ToLower(name) != name || strings.Contains(name, " ") {
			t.Errorf("reason %d: name %q, doc %q", r, name, r.Doc())
		}
		seen[name] = true
		if got, err := ParseReason(name); err != nil || got != r {
			t.Errorf("%q: %d, error %v", name, got, err)
		}
		if r.Receive() != (r >= RxTruncated) {
			t.Errorf("%q: receive %v", name, r.Receive())
		}
	}
	if r, err := ParseReason("bad-luck"); err == nil || !strings.Contains(err.Error(), "bad-luck") {
		t.Errorf("%v, %v", r, err)
	}
	if NumReasons.Receive() || NumReasons.Doc() != "" || NumReasons.String() == "" {
		t.Error("a reason beyond the last")
	}
}

// Two queues share the ports; somebody else's port is not shared with them.
func TestEngineOnARealDevice(t *testing.T) {
	if err := netns.CheckPrivileges(); err != nil {
		impossible(t, err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		d, err := tun.Open(tun.Config{Name: "tweed0", MTU: testMTU, Queues: 2, Offload: tun.OffloadAuto})
		if err != nil {
			return err
		}
		defer d.Close()
		cfg := Config{Device: d, MTU: testMTU, Source: ourAddr, Listen: []Listen{
			{encap.FramingUDP, netip.AddrPortFrom(ourAddr, 8285)}, {encap.FramingVXLAN, netip.AddrPortFrom(ourAddr, 0)}}}
		e, err := New(cfg)
		if err != nil {
			return err
		}
		if again, err := New(cfg); err == nil {
			t.Error("two engines share a port")
			again.Close()
		} else if !strings.Contains(err.Error(), "127.0.0.1:8285") {
			t.Error(err)
		}
		if l := e.Listening(); l[0].Addr.Port() != 8285 || l[1].Addr.Port() == 0 {
			t.Errorf("%v", l)
		}
		if s := e.Stats(); s.Workers != 2 || s.Offload != d.Offload() || len(e.rx) != 4 {
			t.Errorf("%+v", s)
		}
		// Ports may come before the start; their worker is started once.
		if err := e.Apply(Snapshot{Local: table.Local{Subnet: ourSubnet, Addr: inside(-1, 0)}}); err != nil {
			return err
		}
		q, fd := pairQueue(t, tun.OffloadFull)
		if _, err := e.Attach(Port{"host's", inside(-1, 0), q}); err == nil {
			t.Error("a port has the host's address")
		}
		if _, err := e.Attach(Port{"early", inside(-1, 5), q}); err != nil {
			return err
		}
		if err := e.Start(); err != nil {
			return err
		}
		for range 50 {
			if _, err := unix.Write(fd, plain(tuntest.Packet{Src: inside(-1, 5), Dst: inside(9, 9), Proto: 99})); err != nil {
				return err
			}
		}
		eventually(t, "the port is served", func() bool { return e.Stats().Tx.Drops[TxNoRoute] == 50 })
		if n := len(e.pairs); n != 3 {
			t.Errorf("%d pairs", n)
		}
		if err := e.Close(); err != nil {
			return err
		}
		// The device outlives the engine, for the next one.
		e, err = New(cfg)
		if err != nil {
			return err
		}
		return e.Close()
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
		impossible(t, err)
	}
	if err != nil {
		t.Error(err)
	}
}

// Threads that wait give back what a burst has filled, each what it holds.
func TestWaitingThreadsGiveMemoryBack(t *testing.T) {
	h := newHarness(t)
	p := h.e.pairs[0]
	p.restAfter = time.Millisecond
	w := h.worker(encap.FramingUDP)
	if w != p.rx[0] {
		t.Fatal("another worker runs on the transmit worker's side")
	}
	received := unsafe.Slice(unsafe.SliceData(w.batch.Message(0).Data), 60000)
	var datagrams [][]byte
	for range 40 {
		datagrams = append(datagrams, from(udpPeer, udp(1000)).Bytes())
	}
	h.transmit(h.segmenting(udpPeer), encap.FramingUDP, 0, datagrams...)
	h.delivered()

	super := to(udpPeer, tcp(60000)).Super(1000)
	for range 3 {
		if _, err := unix.Write(h.host, super); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.tx.serve(); err != nil {
		t.Fatal(err)
	}
	first := h.tx.batch.Bytes(&h.tx.batch.Packets()[0], 0)
	read := unsafe.Slice(unsafe.SliceData(first), 3*60000)
	h.arrived(udpPeer)
	if !w.batch.Grown() || !h.tx.batch.Grown() || pages(t, received) < 8 || pages(t, read) < 40 {
		t.Fatalf("before: receive %v, %d pages, transmit %v, %d pages", w.batch.Grown(), pages(t, received), h.tx.batch.Grown(), pages(t, read))
	}

	p.quiet = 0 // the transmit thread keeps its worker
	if err := h.e.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the transmit thread gives its buffer back", func() bool { return pages(t, read) <= 1 })
	b, dst := encap.NewSendBatch(), encap.NewDest(h.e.Listening()[0].Addr)
	b.Reset(h.peers[udpPeer])
	eventually(t, "the receive thread transmits", func() bool {
		b.Add(dst, 0, 0, from(udpPeer, udp(20)).Bytes(), nil)
		var res encap.SendResult
		h.peers[udpPeer].Send(b, &res)
		eventually(t, "the host gets it", func() bool { return len(h.written()) == 1 })
		if _, err := unix.Write(h.host, plain(to(udpPeer, udp(20)))); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the peer gets it", func() bool { return len(h.arrived(udpPeer)) == 1 })
		return p.holder.Load() == heldByRx
	})
	eventually(t, "the receive thread gives both back", func() bool { return pages(t, received) <= 1 && pages(t, read) <= 1 })
}

func pages(t *testing.T, b []byte) int {
	t.Helper()
	n, err := tuntest.ResidentPages(b)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
