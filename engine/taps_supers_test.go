package engine

import (
	"cmp"
	"testing"

	"tweed/encap"
	"tweed/engine/tap"
	"tweed/tun/tuntest"
)

// tapped gives the engine a set for the readers there are, lets do happen, and
// returns the records.
func (h *harness) tapped(split bool, do func()) (records []tap.Record) {
	h.t.Helper()
	set, err := tap.NewSet(h.e.TapWorkers(), tap.AllPoints, 70000, 1<<21)
	if err != nil {
		h.t.Fatal(err)
	}
	defer set.Free()
	set.Supers(split)
	h.e.SetTap(set)
	do()
	h.e.SetTap(nil)
	for _, ring := range set.Rings() {
		for rec := (tap.Record{}); ring.Next(&rec); ring.Release() {
			one := rec
			one.Data = append([]byte(nil), rec.Data...)
			records = append(records, one)
		}
	}
	return records
}

// A super-packet is recorded in one piece for those who want it so, and in
// segments for the others; the name of the whole is in every segment.
func TestTapShowsSuperPacketsBothWays(t *testing.T) {
	inner := tap.Of(tap.TunIn, tap.TunOut)
	for _, split := range []bool{true, false} {
		h := newHarness(t)
		// Transmit: five segments.
		super := tuntest.Packet{Src: inside(-1, 5), Dst: inside(udpPeer, 9), Proto: tuntest.TCP, Flags: tuntest.ACK, Payload: make([]byte, 4500)}
		got := h.tapped(split, func() { h.send(super.Super(1000)) })
		if len(got) != 6 {
			t.Fatalf("split %v: %d records, want the whole and 5 segments", split, len(got))
		}
		whole := got[0]
		if whole.Flags&tap.Whole == 0 || whole.Points != tap.Of(tap.TunIn) || whole.Segments != 5 || whole.SegmentPayload != 1000 ||
			len(whole.Data) != 4540 || whole.Peer != addrBits(peerAddr(udpPeer)) {
			t.Errorf("split %v: %+v", split, whole.Header)
		}
		for _, s := range got[1:] {
			want := tap.Of(tap.WireOut)
			if split {
				want |= tap.Of(tap.TunIn)
			}
			if s.Flags&tap.Segment == 0 || s.Of != whole.ID || s.ID == whole.ID || s.Points != want {
				t.Errorf("split %v: segment %+v", split, s.Header)
			}
		}
		// A small packet is one record for everybody.
		got = h.tapped(split, func() {
			h.send(plain(tuntest.Packet{Src: inside(-1, 5), Dst: inside(udpPeer, 9), Proto: tuntest.UDP}))
		})
		if len(got) != 1 || got[0].Flags&(tap.Whole|tap.Segment|tap.Super) != 0 || got[0].Points != tap.Of(tap.TunIn, tap.WireOut) {
			t.Errorf("split %v: small packet %+v", split, got)
		}

		// Receive: three segments that are merged, and one of another flow.
		train := tuntest.Packet{Src: inside(udpPeer, 9), Dst: inside(-1, 0), Proto: tuntest.TCP, Flags: tuntest.ACK, Payload: make([]byte, 1000)}
		w := h.e.rx[0]
		got = h.tapped(split, func() {
			v := w.begin()
			for i := range 3 {
				p := train
				p.Seq, p.ID = uint32(i*1000), uint16(i)
				w.message(v, &encap.Message{Source: addrBits(peerAddr(udpPeer)), SourcePort: 9, Data: p.Bytes()})
				if i == 1 {
					q := train
					q.SrcPort = 77
					w.message(v, &encap.Message{Source: addrBits(peerAddr(udpPeer)), SourcePort: 9, Data: q.Bytes()})
				}
			}
			w.end()
		})
		var wholes []tap.Record
		segments := map[uint64]int{}
		for _, r := range got {
			if r.Flags&tap.Whole != 0 {
				wholes = append(wholes, r)
				continue
			}
			segments[cmp.Or(r.Of, r.ID)]++ // the first has the name of the whole
			if r.Flags&tap.Segment == 0 || !r.Points.Has(tap.WireIn) || (r.Points&inner != 0) != split {
				t.Errorf("split %v: datagram %+v", split, r.Header)
			}
		}
		if len(wholes) != 2 || wholes[0].Segments != 3 || wholes[0].SegmentPayload != 1000 || len(wholes[0].Data) != 3040 || wholes[1].Segments != 1 {
			t.Fatalf("split %v: %d wholes: %+v", split, len(wholes), wholes)
		}
		for _, r := range wholes {
			if r.Points != tap.Of(tap.TunOut) || r.Peer != addrBits(peerAddr(udpPeer)) || !r.Receive {
				t.Errorf("split %v: %+v", split, r.Header)
			}
		}
		if segments[wholes[0].ID] != 3 || segments[wholes[1].ID] != 1 || len(segments) != 2 {
			t.Errorf("split %v: datagrams by super-packet: %v, want 3 of %d and 1 of %d", split, segments, wholes[0].ID, wholes[1].ID)
		}
	}
}

// What no queue takes is no super-packet that was written, and is shown as
// dropped to everybody.
func TestTapOfSuperPacketsThatWereNotWritten(t *testing.T) {
	h := newHarness(t)
	closed, _ := pairQueue(t, h.queue.Offload())
	closed.Close()
	w := h.e.rx[0]
	w.queue = closed
	p := tuntest.Packet{Src: inside(udpPeer, 9), Dst: inside(-1, 0), Proto: tuntest.UDP, Payload: make([]byte, 100)}
	for _, split := range []bool{true, false} {
		got := h.tapped(split, func() {
			v := w.begin()
			for range 2 {
				w.message(v, &encap.Message{Source: addrBits(peerAddr(udpPeer)), Data: p.Bytes()})
			}
			w.end()
		})
		for _, r := range got {
			if r.Points != tap.Of(tap.WireIn, tap.Drop) || r.Reason != uint8(RxTUNError) {
				t.Errorf("split %v: %+v", split, r.Header)
			}
		}
		if len(got) != 2 {
			t.Errorf("split %v: %d records", split, len(got))
		}
	}
}
