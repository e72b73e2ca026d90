package tun

import (
	"testing"

	"tweed/tun/tuntest"
)

func TestContinueTakesTheSegmentsOfATrain(t *testing.T) {
	for name, segment := range map[string]func(i, size int) tuntest.Packet{"tcp": tcpSegment, "udp": udpDatagram} {
		t.Run(name, func(t *testing.T) {
			r, q := newRecorder(t, OffloadFull)
			c := NewCoalescer(1426)
			var want []tuntest.Packet
			for i := range 8 {
				size := 1000
				if i == 7 {
					size = 300 // the last one of a super-packet
				}
				p := segment(i, 1000)
				p.Payload, p.Sum = p.Payload[:size], tuntest.Partial
				want = append(want, p)
				if i == 0 {
					c.Add(q, p.Bytes(), 0, 0)
				} else if !c.Continue(p.Bytes(), uint64(i)) {
					t.Fatalf("segment %d does not continue the train", i)
				}
			}
			p := segment(8, 1000)
			p.Sum = tuntest.Partial
			if c.Continue(p.Bytes(), 8) {
				t.Error("a train went on after its short segment")
			}
			var res Written
			NewWriter().Flush(c, &res)
			if r.calls != 1 {
				t.Errorf("%d writes, want 1", r.calls)
			}
			sameBytes(t, r.packets(), want...)
			if c.Continue(p.Bytes(), 8) {
				t.Error("a train went on after the flush")
			}
		})
	}
}

func TestContinueLeavesTheRestToAdd(t *testing.T) {
	change := map[string]func(p *tuntest.Packet){
		"another source":     func(p *tuntest.Packet) { p.Src = mustAddr("10.1.1.9") },
		"another TTL":        func(p *tuntest.Packet) { p.TTL = 9 },
		"another TOS":        func(p *tuntest.Packet) { p.TOS = 3 },
		"a fragment":         func(p *tuntest.Packet) { p.Frag = tuntest.MoreFragments },
		"another port":       func(p *tuntest.Packet) { p.DstPort = 81 },
		"a gap":              func(p *tuntest.Packet) { p.Seq++ },
		"another ack":        func(p *tuntest.Packet) { p.Ack++ },
		"another window":     func(p *tuntest.Packet) { p.Window++ },
		"FIN":                func(p *tuntest.Packet) { p.Flags |= tuntest.FIN },
		"other options":      func(p *tuntest.Packet) { p.TCPOptions = []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 3} },
		"longer":             func(p *tuntest.Packet) { p.Payload = make([]byte, 1001) },
		"empty":              func(p *tuntest.Packet) { p.Payload = nil },
		"a full checksum":    func(p *tuntest.Packet) { p.Sum = tuntest.Good },
		"a bad checksum":     func(p *tuntest.Packet) { p.Sum = tuntest.Bad },
		"a bad IP checksum":  func(p *tuntest.Packet) { p.BadIPSum = true },
		"IPv4 options":       func(p *tuntest.Packet) { p.IPOptions = []byte{1, 1, 1, 0} },
		"no DF and a new ID": func(p *tuntest.Packet) { p.Frag, p.ID = 0, 99 },
	}
	for name, f := range change {
		t.Run(name, func(t *testing.T) {
			_, q := newRecorder(t, OffloadFull)
			c := NewCoalescer(1426)
			a, b := tcpSegment(0, 1000), tcpSegment(1, 1000)
			a.Sum, b.Sum = tuntest.Partial, tuntest.Partial
			c.Add(q, a.Bytes(), 0, 0)
			f(&b)
			if c.Continue(b.Bytes(), 1) {
				t.Error("taken for the next segment")
			}
		})
	}
}

// Where the ID counts it must count up; lengths must agree with the datagram's.
func TestContinueChecksIDAndLengths(t *testing.T) {
	for name, c := range map[string]struct {
		segment func(i, size int) tuntest.Packet
		change  func(p *tuntest.Packet)
		edit    func(b []byte) []byte
	}{
		"no DF, ID not in step": {tcpSegment, func(p *tuntest.Packet) { p.ID = 99 }, nil},
		"short UDP length":      {udpDatagram, func(p *tuntest.Packet) { p.UDPLen = 50 }, nil},
		"long UDP length":       {udpDatagram, func(p *tuntest.Packet) { p.UDPLen = 500 }, nil},
		"padding behind it":     {tcpSegment, nil, func(b []byte) []byte { return append(b[:len(b)-1:len(b)-1], 0, 0)[:len(b)+1] }},
		"shorter than it says":  {tcpSegment, nil, func(b []byte) []byte { return b[:len(b)-1] }},
		"headers only":          {tcpSegment, nil, func(b []byte) []byte { return b[:52] }},
		"half the headers":      {tcpSegment, nil, func(b []byte) []byte { return b[:30] }},
		"nothing":               {udpDatagram, nil, func(b []byte) []byte { return nil }},
	} {
		a, b := c.segment(0, 100), c.segment(1, 100)
		a.Frag, b.Frag, a.Sum, b.Sum = 0, 0, tuntest.Partial, tuntest.Partial
		if c.change != nil {
			c.change(&b)
		}
		raw := b.Bytes()
		if c.edit != nil {
			// The checksum is partial for the length there is, so that it alone
			// does not give the packet away.
			raw = c.edit(raw)
			if len(raw) > 52 {
				put16(raw[36:], tuntest.Sum(raw[12:20], []byte{0, 6, byte((len(raw) - 20) >> 8), byte(len(raw) - 20)}))
			}
		}
		co := NewCoalescer(1426)
		_, q := newRecorder(t, OffloadFull)
		co.Add(q, a.Bytes(), 0, 0)
		if co.Continue(raw, 1) {
			t.Errorf("%s: taken for the next segment", name)
		}
	}
}

func TestPushEndsATrain(t *testing.T) {
	c := NewCoalescer(1426)
	r, q := newRecorder(t, OffloadFull)
	var pkts []tuntest.Packet
	for i := range 4 {
		p := tcpSegment(i, 100)
		p.Sum = tuntest.Partial
		if i == 1 {
			p.Flags |= tuntest.PSH
		}
		pkts = append(pkts, p)
	}
	continued(c, q, pkts...)
	NewWriter().Flush(c, new(Written))
	if len(r.raw) != 2 {
		t.Errorf("%d writes, want two of two", len(r.raw))
	}
	sameBytes(t, r.packets(), pkts...)
}

// A packet that could not be merged stands between a train and its next packet.
func TestTrainEndsAtAnUnmergedPacket(t *testing.T) {
	c := NewCoalescer(1426)
	r, q := newRecorder(t, OffloadFull)
	a, odd, b := udpDatagram(0, 100), udpDatagram(7, 100), udpDatagram(1, 100)
	a.Sum, odd.Sum, b.Sum = tuntest.Partial, tuntest.Zero, tuntest.Partial
	continued(c, q, a, odd, b)
	NewWriter().Flush(c, new(Written))
	sameBytes(t, r.packets(), a, odd, b)
}
