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
