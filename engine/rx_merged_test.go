package engine

import (
	"bytes"
	"testing"

	"tweed/encap"
	"tweed/tun/tuntest"
)

// One bad datagram in a message of many costs itself only, wherever it stands.
func TestBadDatagramInAMergedMessage(t *testing.T) {
	h := newHarness(t)
	const n = 8
	for _, f := range framings {
		i := holder(f)
		spoil := map[string]func(b []byte, pkt []byte){
			"spoofed source": func(b, pkt []byte) { pkt[14] = 99 },
			"not for us":     func(b, pkt []byte) { pkt[18] = 99 },
			"martian":        func(b, pkt []byte) { pkt[12] = 127 },
			"TTL 0":          func(b, pkt []byte) { pkt[8] = 0 },
			"version":        func(b, pkt []byte) { pkt[0] = 0x65 },
			"IHL":            func(b, pkt []byte) { pkt[0] = 0x44 },
			"length":         func(b, pkt []byte) { pkt[2] = 0xff },
		}
		if f == encap.FramingVXLAN {
			spoil["flags"] = func(b, pkt []byte) { b[1] = 1 }
			spoil["VNI"] = func(b, pkt []byte) { b[5] = 9 }
			spoil["destination MAC"] = func(b, pkt []byte) { b[9] = 9 }
			spoil["source MAC"] = func(b, pkt []byte) { b[14] |= 1 }
			spoil["ethertype"] = func(b, pkt []byte) { b[20] = 0x86 }
		}
		for name, change := range spoil {
			for bad := range n {
				var in, want [][]byte
				for k := range n {
					p := from(i, tcp(100))
					p.ID, p.Seq, p.Sum = uint16(k), uint32(100*k), tuntest.Partial
					pkt := p.Bytes()
					b := framed(f, i, pkt)
					if k == bad {
						pkt := b[f.PrefixLen():]
						change(b, pkt)
						tuntest.SetIPChecksum(append(pkt[:0:0], pkt...))
						if pkt[0] == 0x45 {
							tuntest.SetIPChecksum(pkt)
						}
					} else {
						want = append(want, tuntest.Complete(pkt))
					}
					in = append(in, b)
				}
				h.transmit(h.segmenting(i), f, 0, in...)
				if got := h.delivered(); !equalPackets(got, want) {
					t.Errorf("%v, %s at %d: %d packets delivered, want %d", f, name, bad, len(got), len(want))
				}
				if s := h.change(); s.Rx.Dropped() != 1 || s.Rx.Packets != n || s.RxBatches != 1 {
					t.Errorf("%v, %s at %d: %+v", f, name, bad, s.Rx)
				}
			}
		}
	}
}

func TestTrainBecomesOneWrite(t *testing.T) {
	h := newHarness(t)
	for _, f := range framings {
		i := holder(f)
		for _, sum := range []tuntest.Checksum{tuntest.Good, tuntest.Partial} {
			var in, want [][]byte
			for k := range 40 {
				p := from(i, tcp(1000))
				p.ID, p.Seq, p.Sum = uint16(k), uint32(1000*k), sum
				if k == 39 {
					p.Payload, p.Flags = p.Payload[:10], p.Flags|tuntest.PSH
				}
				in = append(in, framed(f, i, p.Bytes()))
				want = append(want, tuntest.Complete(p.Bytes()))
			}
			h.transmit(h.segmenting(i), f, 0, in...)
			raw := h.written()
			if len(raw) != 1 {
				t.Fatalf("%v: %d writes", f, len(raw))
			}
			got, err := tuntest.Split(raw[0])
			if err != nil || !equalPackets(got, want) {
				t.Errorf("%v, checksum kind %d: error %v, %d packets of %d", f, sum, err, len(got), len(want))
			}
			if s := h.change(); s.Rx.Packets != 40 || s.Rx.Delivered != 40 || s.Rx.Bytes != s.Rx.DeliveredBytes {
				t.Errorf("%+v", s.Rx)
			}
		}
	}
}

// A kernel vxlan device on a virtual link hands over its super-packet whole,
// with a partial checksum; for inner UDP the kernel then reports the inner
// segment size as if it were the outer one.
func TestWholeFramesOfAKernelVXLANDevice(t *testing.T) {
	h := newHarness(t)
	w := h.worker(encap.FramingVXLAN)
	for name, c := range map[string]struct {
		p       tuntest.Packet
		segment int // of the control message
		size    int // payload of each packet the host gets
	}{
		"tcp":              {tcp(40000), 0, testMTU - 40},
		"udp":              {udp(12300), 1200, 1200},
		"udp, inner = MTU": {udp(14000), testMTU - 28, testMTU - 28},
	} {
		p := from(vxlanPeer, c.p)
		p.Sum = tuntest.Partial
		data := framed(encap.FramingVXLAN, vxlanPeer, p.Bytes())
		m := encap.Message{Data: data, Source: addrBits(peerAddr(vxlanPeer)), SegmentLen: c.segment}
		h.message(w, m)
		hl := len(p.Bytes()) - len(p.Payload)
		var payload []byte
		pkts := h.delivered()
		for k, b := range pkts {
			if err := tuntest.Check(b); err != nil {
				t.Errorf("%s: packet %d: %v", name, k, err)
			}
			if k < len(pkts)-1 && len(b)-hl != c.size {
				t.Errorf("%s: packet %d carries %d bytes, want %d", name, k, len(b)-hl, c.size)
			}
			payload = append(payload, b[hl:]...)
		}
		if !bytes.Equal(payload, p.Payload) {
			t.Errorf("%s: payload changed", name)
		}
		if s := h.change(); s.Rx.Packets != 1 || s.Rx.Delivered != 1 {
			t.Errorf("%s: %+v", name, s.Rx)
		}
	}
}

// message gives a worker one message as a round would.
func (h *harness) message(w *rxWorker, m encap.Message) {
	v := h.e.view.Load()
	if v != w.seen {
		w.seen, w.known = v, v.table.HasAddr(w.source)
	}
	w.message(v, &m)
	w.flush()
	w.ledger.publish(&w.tally)
	h.ledger()
}
