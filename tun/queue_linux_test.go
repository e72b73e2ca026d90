package tun

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/tun/tuntest"
)

// pairQueue returns a queue and the descriptor at its other end. Each write at
// one end is one read at the other, as with a TUN device.
func pairQueue(t testing.TB, c FDConfig) (*Queue, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds { // room for some super-packets; as root more than the limit
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20)
		}
	}
	if err := unix.SetNonblock(fds[1], true); err != nil {
		t.Fatal(err)
	}
	q, err := QueueFromFD(fds[0], c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		q.Close()
		unix.Close(fds[1])
	})
	return q, fds[1]
}

func readBatch(t testing.TB) *ReadBatch {
	t.Helper()
	b, err := NewReadBatch()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Free(); err != nil {
			t.Error(err)
		}
		if err := b.Free(); err != nil {
			t.Errorf("second Free: %v", err)
		}
	})
	return b
}

func put(t testing.TB, fd int, raw ...[]byte) {
	t.Helper()
	for _, r := range raw {
		if _, err := unix.Write(fd, r); err != nil {
			t.Fatal(err)
		}
	}
}

// take reads everything that is there.
func take(t testing.TB, fd int) (out [][]byte) {
	t.Helper()
	buf := make([]byte, maxHdr+maxPacket+1)
	for {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, bytes.Clone(buf[:n]))
	}
}

func TestReadDrainsInOrder(t *testing.T) {
	q, fd := pairQueue(t, FDConfig{Offload: OffloadFull})
	b := readBatch(t)
	if err := q.TryRead(b); err != nil || len(b.Packets()) != 0 || b.Full() || b.Size() != 0 {
		t.Fatalf("nothing there: %d packets, error %v", len(b.Packets()), err)
	}
	var want [][]byte
	for i := range maxRead + 5 {
		p := udpDatagram(i, 1+i).Bytes()
		want = append(want, p)
		put(t, fd, partialHeader(p).Prepend(p))
	}
	var got [][]byte
	for _, n := range []int{maxRead, 5, 0} {
		if err := q.TryRead(b); err != nil || len(b.Packets()) != n || b.Full() != (n == maxRead) {
			t.Fatalf("%d packets, full %v, error %v, want %d", len(b.Packets()), b.Full(), err, n)
		}
		for i := range b.Packets() {
			p := &b.Packets()[i]
			if !p.Partial() || p.Super() || !p.Elidable(b.Bytes(p, 0)) {
				t.Errorf("packet %d: header %+v", len(got), p.Header)
			}
			got = append(got, bytes.Clone(b.Bytes(p, 0)))
		}
	}
	if !equalPackets(got, want) {
		t.Error("packets changed")
	}
}

func TestReadTakesTheLargestPackets(t *testing.T) {
	q, fd := pairQueue(t, FDConfig{Offload: OffloadFull})
	b := readBatch(t)
	super := tuntest.Packet{Proto: tuntest.TCP, Flags: tuntest.ACK | tuntest.CWR, Payload: make([]byte, 65535-40)}.Super(1386)
	for range 12 {
		put(t, fd, super)
	}
	for at := 0; at < 12; {
		if err := q.TryRead(b); err != nil {
			t.Fatal(err)
		}
		n := len(b.Packets())
		if n == 0 || n > 9 || b.Full() != (at+n < 12) {
			t.Fatalf("%d packets after %d, full %v", n, at, b.Full())
		}
		for i := range b.Packets() {
			p := &b.Packets()[i]
			if !p.Super() || p.SegmentPayload() != 1386 || !bytes.Equal(b.Bytes(p, 0), super[vnetHdrLen:]) {
				t.Fatalf("packet %d: %+v, %d bytes", at+i, p.Header, len(b.Bytes(p, 0)))
			}
		}
		at += n
	}
}

// The space before a packet is the caller's: writing a prefix there changes no
// packet, and with a full prefix packet follows packet without a gap.
func TestHeadroomIsOurs(t *testing.T) {
	for _, ethernet := range []bool{false, true} {
		q, fd := pairQueue(t, FDConfig{Ethernet: ethernet, Offload: OffloadFull})
		b := readBatch(t)
		var want [][]byte
		for i := range 20 {
			p := udpDatagram(i, 1+i*13%50).Bytes()
			want = append(want, p)
			raw := tuntest.Virtio{}.Prepend(p)
			if ethernet {
				raw = slices.Insert(raw, vnetHdrLen, make([]byte, etherLen)...)
			}
			put(t, fd, raw)
		}
		if err := q.TryRead(b); err != nil || len(b.Packets()) != len(want) {
			t.Fatal(len(b.Packets()), err)
		}
		for i := range b.Packets() {
			room := b.Bytes(&b.Packets()[i], Headroom)
			copy(room, bytes.Repeat([]byte{0xee}, Headroom))
			if cap(room) != len(room) {
				t.Errorf("packet %d can grow into the next", i)
			}
		}
		end := uint32(0)
		for i := range b.Packets() {
			p := &b.Packets()[i]
			if !bytes.Equal(b.Bytes(p, 0), want[i]) {
				t.Errorf("ethernet %v: packet %d was overwritten", ethernet, i)
			}
			if gap := p.off - end; i > 0 && !ethernet && gap != Headroom {
				t.Errorf("packet %d starts %d bytes behind the one before", i, gap)
			}
			end = p.off + p.len
		}
	}
}

func TestLoadIsARead(t *testing.T) {
	q, fd := pairQueue(t, FDConfig{Offload: OffloadFull})
	read, loaded := readBatch(t), readBatch(t)
	p := tcpSegment(0, 10).Bytes()
	raw := [][]byte{partialHeader(p).Prepend(p), tcpSegment(0, 5000).Super(1000), tuntest.Virtio{}.Prepend(p)}
	put(t, fd, raw...)
	if err := q.TryRead(read); err != nil {
		t.Fatal(err)
	}
	loaded.Load(raw...)
	if !slices.Equal(read.Packets(), loaded.Packets()) || read.Size() != loaded.Size() || len(read.Packets()) != 3 {
		t.Errorf("read %+v\nloaded %+v", read.Packets(), loaded.Packets())
	}
	for i := range raw {
		if !bytes.Equal(loaded.Bytes(&loaded.Packets()[i], 0), raw[i][vnetHdrLen:]) {
			t.Errorf("packet %d differs", i)
		}
	}
	if loaded.Clear(); len(loaded.Packets()) != 0 || loaded.Size() != 0 {
		t.Error("not empty after Clear")
	}
}

func TestReadSkipsWhatIsTooShort(t *testing.T) {
	q, fd := pairQueue(t, FDConfig{Offload: OffloadFull})
	b := readBatch(t)
	p := tcpSegment(0, 10).Bytes()
	put(t, fd, make([]byte, 1), make([]byte, vnetHdrLen), tuntest.Virtio{}.Prepend(p), make([]byte, vnetHdrLen-1), tuntest.Virtio{}.Prepend(p[:1]))
	if err := q.TryRead(b); err != nil || len(b.Packets()) != 2 {
		t.Fatalf("%d packets, error %v", len(b.Packets()), err)
	}
	if n := len(b.Bytes(&b.Packets()[1], 0)); n != 1 {
		t.Errorf("%d bytes", n)
	}
}

func TestReadTellsThatTheOtherSideIsGone(t *testing.T) {
	q, fd := pairQueue(t, FDConfig{Offload: OffloadFull})
	b := readBatch(t)
	put(t, fd, tuntest.Virtio{}.Prepend(tcpSegment(0, 10).Bytes()))
	if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	// What was there before is still delivered.
	if err := q.TryRead(b); err != nil || len(b.Packets()) != 1 {
		t.Fatalf("%d packets, error %v", len(b.Packets()), err)
	}
	if err := q.TryRead(b); !errors.Is(err, ErrGone) || len(b.Packets()) != 0 {
		t.Errorf("%d packets, error %v", len(b.Packets()), err)
	}
}

func TestQueueFromFDRefusesWhatIsNotOpen(t *testing.T) {
	if q, err := QueueFromFD(1<<20, FDConfig{}); err == nil {
		t.Errorf("%+v", q)
	}
	if q, _ := pairQueue(t, FDConfig{Offload: OffloadAuto}); q.Offload() != OffloadFull {
		t.Errorf("auto on a foreign descriptor is %v", q.Offload())
	}
}

func TestWritePacket(t *testing.T) {
	q, fd := pairQueue(t, FDConfig{Offload: OffloadNone})
	p := tcpSegment(0, 10).Bytes()
	if err := q.WritePacket(p); err != nil {
		t.Fatal(err)
	}
	if got := take(t, fd); len(got) != 1 || !bytes.Equal(got[0], tuntest.Virtio{}.Prepend(p)) {
		t.Errorf("% x", got)
	}
	if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if err := q.WritePacket(p); err == nil {
		t.Error("a write to nobody succeeds")
	}
}

var (
	selfMAC = [6]byte{2, 0, 0, 0, 0, 1}
	peerMAC = [6]byte{2, 0, 0, 0, 0, 2}
)

// frame checks the Ethernet header that stands behind the virtio header and
// takes it out, with the offsets corrected.
func frame(t *testing.T, raw []byte) []byte {
	t.Helper()
	v, b, err := tuntest.Read(raw)
	want := slices.Concat(peerMAC[:], selfMAC[:], []byte{8, 0})
	if err != nil || len(b) < etherLen || !bytes.Equal(b[:etherLen], want) {
		t.Fatalf("no frame from us to the peer: % x, error %v", b[:min(len(b), 20)], err)
	}
	if v.Flags&tuntest.NeedsCsum != 0 {
		v.CsumStart -= etherLen
	}
	if v.GSOType != tuntest.GSONone {
		v.HdrLen -= etherLen
	}
	return v.Prepend(b[etherLen:])
}

// A packet socket carries an Ethernet header behind the virtio header, whose
// offsets count from the frame's start.
func TestPacketSocketCarriesFrames(t *testing.T) {
	q, fd := pairQueue(t, FDConfig{Ethernet: true, Self: selfMAC, Peer: peerMAC, Offload: OffloadFull})
	b := readBatch(t)
	// In.
	p := udpDatagram(0, 10)
	p.Sum = tuntest.Partial
	raw := p.Bytes()
	v := partialHeader(raw)
	v.CsumStart += etherLen
	put(t, fd, v.Prepend(append(make([]byte, etherLen), raw...)))
	if err := q.TryRead(b); err != nil || len(b.Packets()) != 1 {
		t.Fatal(len(b.Packets()), err)
	}
	in := &b.Packets()[0]
	if got := b.Bytes(in, 0); !bytes.Equal(got, raw) || !in.Elidable(got) || !in.Complete(got) || tuntest.Check(got) != nil {
		t.Errorf("% x, check: %v", got, tuntest.Check(got))
	}
	// Out: merged, partial, plain and forwarded.
	c := NewCoalescer(1426)
	add(c, q, tcpSegment(0, 50), tcpSegment(1, 50), p)
	NewWriter().Flush(c, new(Written))
	_ = q.WritePacket(tcpSegment(0, 7).Bytes())
	var out [][]byte
	for i, f := range take(t, fd) {
		f = frame(t, f)
		if isSuper(f) != (i == 0) {
			t.Errorf("write %d: super-packet %v", i, isSuper(f))
		}
		pkts, err := tuntest.Split(f)
		if err != nil {
			t.Errorf("write %d: %v", i, err)
		}
		out = append(out, pkts...)
	}
	sameBytes(t, out, tcpSegment(0, 50), tcpSegment(1, 50), p, tcpSegment(0, 7))
}

// Forward hands on what one queue read to another, whatever stands before the
// packet at either.
func TestForwardKeepsWhatTheKernelSaid(t *testing.T) {
	for _, fromEther := range []bool{false, true} {
		for _, toEther := range []bool{false, true} {
			from, in := pairQueue(t, FDConfig{Ethernet: fromEther, Offload: OffloadFull})
			to, out := pairQueue(t, FDConfig{Ethernet: toEther, Self: selfMAC, Peer: peerMAC, Offload: OffloadFull})
			partial := udpDatagram(1, 9)
			partial.Sum = tuntest.Partial
			sent := [][]byte{tcpSegment(0, 3000).Super(1000), udpDatagram(0, 300).Super(100),
				partialHeader(partial.Bytes()).Prepend(partial.Bytes()), tuntest.Virtio{}.Prepend(tcpSegment(5, 5).Bytes())}
			b := readBatch(t)
			for _, raw := range sent {
				v, pkt, _ := tuntest.Read(raw)
				if fromEther {
					if v.Flags != 0 {
						v.CsumStart += etherLen
					}
					if v.GSOType != 0 {
						v.HdrLen += etherLen
					}
					pkt = append(make([]byte, etherLen), pkt...)
				}
				put(t, in, v.Prepend(pkt))
			}
			if err := from.TryRead(b); err != nil || len(b.Packets()) != len(sent) {
				t.Fatal(len(b.Packets()), err)
			}
			for i := range b.Packets() {
				p := &b.Packets()[i]
				if err := to.Forward(new(Scratch), &p.Header, b.Bytes(p, 0), nil); err != nil {
					t.Fatal(err)
				}
			}
			for i, raw := range take(t, out) {
				if toEther {
					raw = frame(t, raw)
				}
				got, want := raw, sent[i]
				gv, _, _ := tuntest.Read(got)
				wv, _, _ := tuntest.Read(want)
				if wv.HdrLen, gv.HdrLen = 0, 0; gv != wv || !bytes.Equal(got[vnetHdrLen:], want[vnetHdrLen:]) {
					t.Errorf("ethernet %v to %v, packet %d: %+v, want %+v", fromEther, toEther, i, gv, wv)
				}
			}
		}
	}
}

func TestReadingAllocatesNothing(t *testing.T) {
	q, fd := pairQueue(t, FDConfig{Offload: OffloadFull})
	b := readBatch(t)
	raw := [][]byte{tuntest.Virtio{}.Prepend(tcpSegment(0, 10).Bytes()), tcpSegment(0, 5000).Super(1000)}
	sum := 0
	if n := testing.AllocsPerRun(50, func() {
		put(t, fd, raw...)
		if err := q.TryRead(b); err != nil {
			t.Fatal(err)
		}
		b.Load(raw...)
		for i := range b.Packets() {
			sum += len(b.Bytes(&b.Packets()[i], Headroom))
		}
	}); n != 0 {
		t.Errorf("%v allocations a batch", n)
	}
}

// What a burst has filled is given back, and what comes next is as good as before.
func TestShrunkBatchReadsOn(t *testing.T) {
	q, other := pairQueue(t, FDConfig{Offload: OffloadFull})
	b := readBatch(t)
	big := make([]byte, vnetHdrLen+60000)
	for i := range big[vnetHdrLen:] {
		big[vnetHdrLen+i] = byte(i * 7)
	}
	resident := func() int {
		n, err := tuntest.ResidentPages(b.slab)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for range 2 {
		put(t, other, big[:vnetHdrLen+100])
		if err := q.TryRead(b); err != nil || len(b.Packets()) != 1 || b.Grown() {
			t.Fatalf("a small packet: %d packets, grown %v, %v", len(b.Packets()), b.Grown(), err)
		}
		put(t, other, big, big)
		if err := q.TryRead(b); err != nil || len(b.Packets()) != 2 || !b.Grown() {
			t.Fatalf("two super-packets: %d packets, grown %v, %v", len(b.Packets()), b.Grown(), err)
		}
		for i := range b.Packets() {
			if got := b.Bytes(&b.Packets()[i], 0); !bytes.Equal(got, big[vnetHdrLen:]) {
				t.Errorf("super-packet %d differs", i)
			}
		}
		if n := resident(); n < 2*60000/os.Getpagesize() {
			t.Errorf("%d pages hold two super-packets", n)
		}
		b.Shrink()
		if n := resident(); n != 0 || b.Grown() || len(b.Packets()) != 0 {
			t.Errorf("afterwards %d pages are left, grown %v, %d packets", n, b.Grown(), len(b.Packets()))
		}
	}
}
