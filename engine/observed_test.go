package engine

import (
	"bytes"
	"fmt"
	"testing"

	"tweed/encap"
	"tweed/engine/tap"
	"tweed/tun/tuntest"
)

// records lets an observer put packets into a ring and returns what is in it.
func records(t *testing.T, snap int, whole bool, packets ...Carried) (out []tap.Record, lost [tap.NumPoints]uint64) {
	t.Helper()
	set, err := tap.NewSet(4, tap.AllPoints, snap, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Free()
	if whole {
		set.Supers(true)
	}
	o := &observer{worker: 3, ring: set.Ring(3)}
	for i := range packets {
		o.Carried(&packets[i])
	}
	o.Missed(true, 7)
	o.Flush(5)
	var rec tap.Record
	for set.Ring(3).Next(&rec) {
		r := rec
		r.Data = bytes.Clone(rec.Data)
		out = append(out, r)
		set.Ring(3).Release()
	}
	if h := set.Ring(3).Horizon(); h != 5 {
		t.Errorf("the ring is complete until %d, want 5", h)
	}
	return out, set.Lost(false)
}

func carried(packet []byte, payload int, receive bool) Carried {
	data := make([]byte, encap.MaxPrefixLen, encap.MaxPrefixLen+len(packet))
	encap.PutVXLANPrefix(data, 7, ourMAC, peerMAC(vxlanPeer))
	data = append(data, packet...)
	return Carried{Time: 1000, Receive: receive, Peer: 1, Local: 2, PeerPort: 3, LocalPort: 4, PrefixLen: encap.MaxPrefixLen, SegmentPayload: payload, Length: len(data), Data: data}
}

// TestBypassedPacketsAreRecordedAsTheWorkersRecordThem: one packet is one
// record at both points of its direction; a cut one keeps its length.
func TestBypassedPacketsAreRecordedAsTheWorkersRecordThem(t *testing.T) {
	packet := tuntest.Packet{Proto: tuntest.UDP, Payload: make([]byte, 500)}.Bytes()
	for _, receive := range []bool{false, true} {
		c := carried(packet, 0, receive)
		c.Data = c.Data[:100]
		got, lost := records(t, 100, false, c)
		points := tap.Of(tap.TunIn, tap.WireOut)
		if receive {
			points = tap.Of(tap.WireIn, tap.TunOut)
		}
		if len(got) != 1 || got[0].Points != points || got[0].Length != uint32(c.Length) || !bytes.Equal(got[0].Data, c.Data) ||
			got[0].Receive != receive || got[0].Peer != 1 || got[0].Local != 2 || got[0].Flags != tap.NoChecksum || got[0].Segments != 1 || got[0].ID>>56 != 3 {
			t.Errorf("receive %t: %+v", receive, got)
		}
		if want := ([tap.NumPoints]uint64{tap.WireIn: 7, tap.TunOut: 7}); lost != want {
			t.Errorf("lost %v, want %v", lost, want)
		}
	}
	open := tuntest.Packet{Proto: tuntest.UDP, Payload: make([]byte, 50), Sum: tuntest.Partial}.Bytes()
	if got, _ := records(t, 1000, false, carried(open, 0, false)); len(got) != 1 || got[0].Flags&tap.Partial == 0 {
		t.Errorf("an unfinished checksum is not marked: %+v", got)
	}
}

// TestBypassedSuperPacketsAreRecordedSegmentBySegment, each with the framing
// before it and a name of its own; and whole for those who want that.
func TestBypassedSuperPacketsAreRecordedSegmentBySegment(t *testing.T) {
	const payload = 400
	packet := tuntest.Packet{Proto: tuntest.TCP, Flags: tuntest.ACK, Seq: 9, Payload: bytes.Repeat([]byte("tweed"), 300), Sum: tuntest.Partial}.Bytes()
	got, _ := records(t, 1<<16, false, carried(packet, payload, false))
	if len(got) != 4 {
		t.Fatalf("%d records, want 4 segments", len(got))
	}
	var data []byte
	names := map[uint64]bool{}
	for i, r := range got {
		names[r.ID] = true
		prefix, segment := r.Data[:encap.MaxPrefixLen], r.Data[encap.MaxPrefixLen:]
		want := carried(packet, 0, false).Data[:encap.MaxPrefixLen]
		if !bytes.Equal(prefix, want) || r.Flags != tap.Partial|tap.NoChecksum || int(r.Length) != len(r.Data) {
			t.Errorf("segment %d: %+v", i, r.Header)
		}
		if err := tuntest.Check(tuntest.Complete(bytes.Clone(segment))); err != nil {
			t.Errorf("segment %d: %v", i, err)
		}
		data = append(data, segment[40:]...)
	}
	if !bytes.Equal(data, packet[40:]) || len(names) != 4 {
		t.Errorf("the segments hold %d bytes and %d names, want %d and 4", len(data), len(names), len(packet)-40)
	}

	got, _ = records(t, 1<<16, true, carried(packet, payload, true))
	if len(got) != 5 {
		t.Fatalf("%d records, want the whole and 4 segments", len(got))
	}
	w := got[0]
	if w.Flags&(tap.Whole|tap.Super|tap.Inner) != tap.Whole|tap.Super|tap.Inner || w.Points != tap.Of(tap.TunOut) || w.Segments != 4 ||
		w.SegmentPayload != payload || !bytes.Equal(w.Data, packet) {
		t.Errorf("the whole: %s", fmt.Sprintf("%+v", w.Header))
	}
	for _, r := range got[1:] {
		if r.Of != w.ID || r.Flags&tap.Segment == 0 {
			t.Errorf("a segment of %d: %+v", w.ID, r.Header)
		}
	}
}
