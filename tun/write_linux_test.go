package tun

import (
	"bytes"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/tun/tuntest"
)

// add adds packets with their positions as tags.
func add(c *Coalescer, q *Queue, pkts ...tuntest.Packet) {
	for i, p := range pkts {
		c.Add(q, p.Bytes(), 0, uint64(i))
	}
}

// continued is how the engine feeds a train: by comparison where it can.
func continued(c *Coalescer, q *Queue, pkts ...tuntest.Packet) {
	for i, p := range pkts {
		if b := p.Bytes(); !c.Continue(b, uint64(i)) {
			c.Add(q, b, 0, uint64(i))
		}
	}
}

func TestUDPItemHoldsAsManyPacketsAsOldKernelsTake(t *testing.T) {
	var pkts []tuntest.Packet
	for i := range 130 {
		p := udpDatagram(i, 10)
		p.Sum = tuntest.Partial
		pkts = append(pkts, p)
	}
	for name, feed := range map[string]func(*Coalescer, *Queue, ...tuntest.Packet){"added": add, "continued": continued} {
		c := NewCoalescer(1426)
		r, q := newRecorder(t, OffloadFull)
		feed(c, q, pkts...)
		NewWriter().Flush(c, new(Written))
		if len(r.raw) != 3 {
			t.Errorf("%s: %d writes for 130 datagrams, want 64 + 64 + 2", name, len(r.raw))
		}
		sameBytes(t, r.packets(), pkts...)
	}
}

func TestItemDoesNotOutgrowAnIPv4Packet(t *testing.T) {
	for _, size := range []int{1000, 1374, 1375, 1394, 1395, 21834, 21835, 32700, 32701} {
		for _, kind := range []func(i, size int) tuntest.Packet{tcpSegment, udpDatagram} {
			var pkts []tuntest.Packet
			for i := range 66000/size + 2 {
				p := kind(i, size)
				p.Sum = tuntest.Checksum(size % 2) // complete or partial
				pkts = append(pkts, p)
			}
			c := NewCoalescer(65535)
			r, q := newRecorder(t, OffloadFull)
			continued(c, q, pkts...)
			NewWriter().Flush(c, new(Written))
			for _, raw := range r.raw {
				if len(raw)-vnetHdrLen > 65535 {
					t.Errorf("size %d: %d bytes in one write", size, len(raw)-vnetHdrLen)
				}
			}
			if len(r.raw) > 3 {
				t.Errorf("size %d: %d writes", size, len(r.raw))
			}
			sameBytes(t, r.packets(), pkts...)
		}
	}
}

// 1100 one-byte segments of one flow are more pieces than a write can take
// (UIO_MAXIOV): anybody who holds a lease can send them.
func TestTinySegmentsDoNotOverflowAWrite(t *testing.T) {
	for name, sum := range map[string]tuntest.Checksum{"added": tuntest.Good, "continued": tuntest.Partial} {
		c := NewCoalescer(1426)
		r, q := newRecorder(t, OffloadFull)
		var pkts []tuntest.Packet
		var res Written
		w := NewWriter()
		for i := range 2100 {
			p := tcpSegment(i, 1)
			p.Sum = sum
			pkts = append(pkts, p)
			if sum == tuntest.Partial && c.Continue(p.Bytes(), 0) {
				continue
			}
			if !c.Room() {
				w.Flush(c, &res)
			}
			c.Add(q, p.Bytes(), 0, 0)
		}
		w.Flush(c, &res)
		if res.Packets != 2100 || res.Failed != 0 || q.noGSO.Load() || len(r.raw) > 5 {
			t.Errorf("%s: %+v in %d writes, super-packets off: %v", name, res, len(r.raw), q.noGSO.Load())
		}
		sameBytes(t, r.packets(), pkts...)
	}
}

func TestRoomEndsBeforeAnArrayDoes(t *testing.T) {
	c := NewCoalescer(1426)
	_, q := newRecorder(t, OffloadFull)
	for n := 0; c.Room(); n++ {
		if n > maxItems {
			t.Fatal("there is always room")
		}
		p := udpDatagram(n, 10)
		p.SrcPort = uint16(n) // all different flows
		c.Add(q, p.Bytes(), 0, 0)
	}
	var res Written
	if NewWriter().Flush(c, &res); res.Packets != maxItems || !c.Room() {
		t.Errorf("%d packets, room after the flush: %v", res.Packets, c.Room())
	}
}

// What a flush left behind must not attract the packets of the next batch: the
// buffers they lived in hold other packets by then.
func TestFlushForgets(t *testing.T) {
	c := NewCoalescer(1426)
	r, q := newRecorder(t, OffloadFull)
	w := NewWriter()
	for i := range 4 {
		add(c, q, tcpSegment(i, 100))
		w.Flush(c, new(Written))
		w.Flush(c, new(Written))
	}
	if len(r.raw) != 4 {
		t.Errorf("%d writes in 4 batches", len(r.raw))
	}
	sameBytes(t, r.packets(), tcpSegment(0, 100), tcpSegment(1, 100), tcpSegment(2, 100), tcpSegment(3, 100))
}

// whole is a super-packet that a kernel vxlan peer on a virtual link hands over
// un-segmented.
func whole(p tuntest.Packet, size int, sum tuntest.Checksum) tuntest.Packet {
	p.Payload = bytes.Repeat([]byte{0x5a}, size)
	p.Sum = sum
	return p
}

func TestWholeSuperPacketsGetTheirHeader(t *testing.T) {
	const mtu = 1426
	cwr := tcpSegment(0, 0)
	cwr.Flags |= tuntest.CWR | tuntest.PSH
	options := tcpSegment(0, 0)
	options.IPOptions = make([]byte, 8)
	for name, c := range map[string]struct {
		p   tuntest.Packet
		gso int
	}{
		"tcp":                    {whole(tcpSegment(0, 0), 40000, tuntest.Partial), 0},
		"tcp, just above MTU":    {whole(tcpSegment(0, 0), mtu-52+1, tuntest.Partial), 0},
		"tcp, complete checksum": {whole(tcpSegment(0, 0), 40000, tuntest.Good), 0},
		"tcp with CWR":           {whole(cwr, 10000, tuntest.Partial), 0},
		"tcp, IPv4 options":      {whole(options, 10000, tuntest.Partial), 0},
		"tcp, size from the kernel is the outer one": {whole(tcpSegment(0, 0), 40000, tuntest.Partial), 77},
		"udp":                    {whole(udpDatagram(0, 0), 12000, tuntest.Partial), 1200},
		"udp, complete checksum": {whole(udpDatagram(0, 0), 12000, tuntest.Good), 1200},
		"udp, shorter last":      {whole(udpDatagram(0, 0), 1201, tuntest.Partial), 1200},
	} {
		co := NewCoalescer(mtu)
		r, q := newRecorder(t, OffloadFull)
		co.Add(q, c.p.Bytes(), c.gso, 0)
		var res Written
		NewWriter().Flush(co, &res)
		segs := r.packets() // checks the virtio header against the packet
		if len(r.raw) != 1 || !isSuper(r.raw[0]) || res.Packets != 1 || len(segs) < 2 {
			t.Errorf("%s: %d writes, %+v, %d segments", name, len(r.raw), res, len(segs))
			continue
		}
		var payload []byte
		for i, s := range segs {
			if err := tuntest.Check(s); err != nil {
				t.Errorf("%s: segment %d: %v", name, i, err)
			}
			if len(s) > mtu {
				t.Errorf("%s: segment %d has %d bytes", name, i, len(s))
			}
			payload = append(payload, s[len(c.p.Bytes())-len(c.p.Payload):]...)
		}
		if !bytes.Equal(payload, c.p.Payload) {
			t.Errorf("%s: payload changed", name)
		}
	}
}

// One datagram that arrived with a segment size is one datagram.
func TestWholePacketOfOneSegmentIsNoSuperPacket(t *testing.T) {
	for _, size := range []int{1199, 1200} {
		p := whole(udpDatagram(0, 0), size, tuntest.Partial)
		c := NewCoalescer(1426)
		r, q := newRecorder(t, OffloadFull)
		c.Add(q, p.Bytes(), 1200, 0)
		NewWriter().Flush(c, new(Written))
		sameBytes(t, r.packets(), p)
	}
}

// Marking a super-packet makes its checksum right. One that was wrong before
// must not get that far, however it came.
func TestWrongChecksumIsNeverLaundered(t *testing.T) {
	for name, c := range map[string]struct {
		pkts []tuntest.Packet
		gso  int
	}{
		"whole tcp":    {[]tuntest.Packet{whole(tcpSegment(0, 0), 40000, tuntest.Bad)}, 0},
		"whole udp":    {[]tuntest.Packet{whole(udpDatagram(0, 0), 12000, tuntest.Bad)}, 1200},
		"in a train":   {[]tuntest.Packet{tcpSegment(0, 100), {}, tcpSegment(2, 100), tcpSegment(3, 100)}, 0},
		"first of two": {[]tuntest.Packet{{}, tcpSegment(1, 100)}, 0},
	} {
		for i, p := range c.pkts {
			if p.Proto == 0 {
				c.pkts[i] = tcpSegment(i, 100)
				c.pkts[i].Sum = tuntest.Bad
			}
		}
		co := NewCoalescer(1426)
		r, q := newRecorder(t, OffloadFull)
		for _, p := range c.pkts {
			co.Add(q, p.Bytes(), c.gso, 0)
		}
		NewWriter().Flush(co, new(Written))
		out := r.packets()
		for _, p := range c.pkts {
			i := slices.IndexFunc(out, func(b []byte) bool { return bytes.Equal(b, p.Bytes()) })
			if i < 0 {
				t.Errorf("%s: a packet with checksum kind %d did not come out as it was", name, p.Sum)
			} else if (tuntest.Check(out[i]) == nil) != (p.Sum == tuntest.Good) {
				t.Errorf("%s: checksum kind %d: %v", name, p.Sum, tuntest.Check(out[i]))
			}
		}
	}
}

// Some kernels refuse merged packets with EINVAL: the packets themselves go out
// one by one, byte for byte, and nothing is merged on that queue any more.
func TestRefusedSuperPacketIsWrittenPacketByPacket(t *testing.T) {
	tcp := []tuntest.Packet{tcpSegment(0, 100), tcpSegment(1, 100), tcpSegment(2, 100)}
	tcp[2].Flags, tcp[2].Payload = tcp[2].Flags|tuntest.PSH, tcp[2].Payload[:60]
	udp := []tuntest.Packet{udpDatagram(0, 100), udpDatagram(1, 100), udpDatagram(2, 7)}
	udp[1].Sum = tuntest.Partial
	refusedAndReplayed(t, append(slices.Clone(tcp), udp...))
	refusedAndReplayed(t, append(slices.Clone(udp), tcp...))
}

func refusedAndReplayed(t *testing.T, all []tuntest.Packet) {
	r, q := newRecorder(t, OffloadFull)
	refused := 0
	r.answer = func(raw []byte) syscall.Errno {
		if isSuper(raw) {
			refused++
			return unix.EINVAL
		}
		return 0
	}
	c, w := NewCoalescer(1426), NewWriter()
	for range 2 {
		var res Written
		r.raw = nil
		bytesIn := uint64(0)
		for i, p := range all {
			c.Add(q, p.Bytes(), 0, uint64(i))
			bytesIn += uint64(len(p.Bytes()))
		}
		w.Flush(c, &res)
		if res.Packets != 6 || res.Bytes != bytesIn || res.Failed != 0 {
			t.Errorf("%+v", res)
		}
		sameBytes(t, r.packets(), all...)
	}
	if refused != 1 {
		t.Errorf("%d super-packets tried, want 1", refused)
	}
}

// EINVAL for one packet alone says nothing about super-packets.
func TestRefusedSinglePacketLeavesSuperPacketsOn(t *testing.T) {
	r, q := newRecorder(t, OffloadFull)
	r.answer = func([]byte) syscall.Errno { return unix.EINVAL }
	c := NewCoalescer(1426)
	add(c, q, tcpSegment(0, 100))
	var res Written
	if NewWriter().Flush(c, &res); res.Failed != 1 || q.noGSO.Load() {
		t.Errorf("%+v, super-packets off: %v", res, q.noGSO.Load())
	}
}

func TestFailedWritesAreCountedAndNamed(t *testing.T) {
	for _, e := range []syscall.Errno{unix.EIO, unix.ENOMEM, unix.EBADFD} {
		r, q := newRecorder(t, OffloadFull)
		r.answer = func(raw []byte) syscall.Errno {
			if isSuper(raw) {
				return e
			}
			return 0
		}
		c := NewCoalescer(1426)
		var tags []uint64
		res := Written{Refused: func(tag uint64) { tags = append(tags, tag) }}
		lost := 0
		for i, p := range []tuntest.Packet{tcpSegment(0, 100), udpDatagram(0, 50), tcpSegment(1, 100), tcpSegment(2, 100)} {
			c.Add(q, p.Bytes(), 0, uint64(i))
			if p.Proto == tuntest.TCP {
				lost += len(p.Bytes())
			}
		}
		NewWriter().Flush(c, &res)
		if res.Packets != 1 || res.Failed != 3 || res.FailedBytes != uint64(lost) || res.Writes != 2 || q.noGSO.Load() {
			t.Errorf("%v: %+v, super-packets off: %v", e, res, q.noGSO.Load())
		}
		if !slices.Equal(tags, []uint64{0, 2, 3}) {
			t.Errorf("%v: tags %v refused", e, tags)
		}
	}
}

// A device that goes down in the middle of the fallback loses what is left of
// the item, and only that.
func TestFallbackThatFailsHalfway(t *testing.T) {
	r, q := newRecorder(t, OffloadFull)
	singles := 0
	r.answer = func(raw []byte) syscall.Errno {
		if isSuper(raw) {
			return unix.EINVAL
		}
		if singles++; singles > 2 {
			return unix.EIO
		}
		return 0
	}
	c := NewCoalescer(1426)
	var tags []uint64
	res := Written{Refused: func(tag uint64) { tags = append(tags, tag) }}
	add(c, q, tcpSegment(0, 10), tcpSegment(1, 10), tcpSegment(2, 10), tcpSegment(3, 10))
	NewWriter().Flush(c, &res)
	if res.Packets != 2 || res.Failed != 2 || !slices.Equal(tags, []uint64{2, 3}) || res.Writes != 5 {
		t.Errorf("%+v, tags %v", res, tags)
	}
	sameBytes(t, r.packets(), tcpSegment(0, 10), tcpSegment(1, 10))
}

func TestCoalesceAllocatesNothing(t *testing.T) {
	q := newQueue(-1, OffloadFull)
	q.writev = func(int, []unix.Iovec) syscall.Errno { return 0 }
	c, w := NewCoalescer(1426), NewWriter()
	var in, scratch [][]byte
	for i := range 64 {
		for _, p := range []tuntest.Packet{tcpSegment(i, 1000), udpDatagram(i, 500)} {
			p.Sum = tuntest.Good
			in = append(in, p.Bytes())
			scratch = append(scratch, p.Bytes())
		}
	}
	var res Written
	for name, off := range map[string]bool{"merging": false, "fallback": true} {
		q.noGSO.Store(off)
		if n := testing.AllocsPerRun(20, func() {
			for i := range in {
				copy(scratch[i], in[i])
				c.Add(q, scratch[i], 0, uint64(i))
			}
			w.Flush(c, &res)
		}); n != 0 {
			t.Errorf("%s: %v allocations a batch", name, n)
		}
	}
}
