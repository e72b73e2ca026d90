package engine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"tweed/encap"
	"tweed/engine/tap"
	"tweed/tun"
	"tweed/tun/tuntest"
)

// replayHarness is a harness whose engine takes replays and delivers them to
// the test's host.
func replayHarness(t *testing.T) *harness {
	t.Helper()
	h := newHarness(t)
	h.e.started = true // the pairs stay idle: the test moves what is not replayed
	if err := h.inNamespace(h.e.openReplay); err != nil {
		t.Fatal(err)
	}
	for _, w := range h.e.replay.rx {
		w.queue = h.queue
	}
	return h
}

func (h *harness) replay(point tap.Point, packets ...[]byte) Replayed {
	h.t.Helper()
	r, err := h.e.StartReplay(point)
	if err != nil {
		h.t.Fatal(err)
	}
	for _, p := range packets {
		if err := r.Put(p, 0); err != nil {
			h.t.Fatal(err)
		}
	}
	return r.Close()
}

// outer puts the IPv4 and UDP headers of the underlay around a datagram.
func outer(src, dst netip.AddrPort, tos uint8, payload []byte) []byte {
	p := tuntest.Packet{Src: src.Addr(), Dst: dst.Addr(), SrcPort: src.Port(), DstPort: dst.Port(), Proto: tuntest.UDP, TOS: tos, Payload: payload}
	return p.Bytes()
}

func TestReplayAtTunInIsSentAndCounted(t *testing.T) {
	h := replayHarness(t)
	set, err := tap.NewSet(h.e.TapWorkers(), tap.AllPoints, 64, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Free()
	if h.e.Stats().Observed {
		t.Error("observed by nobody")
	}
	h.e.SetTap(set)
	if !h.e.Stats().Observed {
		t.Error("a tap does not observe")
	}
	good := tuntest.Packet{Src: inside(-1, 5), Dst: inside(udpPeer, 9), Proto: tuntest.UDP, Payload: []byte("again")}.Bytes()
	lost := tuntest.Packet{Src: inside(-1, 5), Dst: netip.MustParseAddr("10.9.9.9"), Proto: tuntest.UDP, Payload: make([]byte, 8)}.Bytes()
	got := h.replay(tap.TunIn, good, lost, []byte{0x60, 1, 2}, good)
	h.e.SetTap(nil)
	if h.e.Stats().Observed {
		t.Error("still observed")
	}

	want := Direction{Packets: 4, Bytes: uint64(2*len(good) + len(lost) + 3), Delivered: 2, DeliveredBytes: uint64(2 * len(good))}
	want.Drops[TxNoRoute], want.Drops[TxNotIPv4] = 1, 1
	if got.Ledger != want || got.Answered != 1 || got.Foreign != 0 {
		t.Errorf("got %+v\nwant ledger %+v and 1 answer", got, want)
	}
	if c := h.change(); c.Tx != want {
		t.Errorf("the engine counted %+v", c.Tx)
	}
	if in := h.inner(udpPeer); len(in) != 2 || !bytes.Contains(in[0], []byte("again")) {
		t.Errorf("the peer got %q", in)
	}
	if w := h.written(); len(w) != 0 {
		t.Errorf("the host got % x, the answer to a packet it did not send", w)
	}
	var points []tap.Points
	for _, ring := range set.Rings() {
		for rec := (tap.Record{}); ring.Next(&rec); ring.Release() {
			points = append(points, rec.Points)
		}
	}
	sent, dropped := tap.Of(tap.TunIn, tap.WireOut), tap.Of(tap.TunIn, tap.Drop)
	if len(points) != 4 || points[0] != sent || points[1] != dropped || points[2] != dropped || points[3] != sent {
		t.Errorf("the capture has %v", points)
	}
}

func TestReplayedSuperPacketsAreSplit(t *testing.T) {
	h := replayHarness(t)
	r, err := h.e.StartReplay(tap.TunIn)
	if err != nil {
		t.Fatal(err)
	}
	super := tuntest.Packet{Src: inside(-1, 5), Dst: inside(vxlanPeer, 9), Proto: tuntest.TCP, Flags: tuntest.ACK, Payload: make([]byte, 5000)}.Bytes()
	if err := r.Put(super, 1000); err != nil {
		t.Fatal(err)
	}
	if got := r.Close(); got.Ledger.Packets != 5 || got.Ledger.Delivered != 5 {
		t.Errorf("%+v", got.Ledger)
	}
	if in := h.inner(vxlanPeer); len(in) != 5 || len(in[0]) != 1040 {
		t.Errorf("%d segments", len(in))
	}
}

func TestReplayAtWireInPassesTheReceiveRules(t *testing.T) {
	h := replayHarness(t)
	from := netip.AddrPortFrom(peerAddr(udpPeer), 4000)
	to := h.e.Listening()[0].Addr
	inner := func(src netip.Addr) []byte {
		return tuntest.Packet{Src: src, Dst: inside(-1, 0), Proto: tuntest.UDP, Payload: []byte("once more")}.Bytes()
	}
	good := inner(inside(udpPeer, 1))
	fragment := outer(from, to, 0, good)
	binary.BigEndian.PutUint16(fragment[6:], 0x2000)
	foreign := [][]byte{
		outer(from, netip.AddrPortFrom(to.Addr(), 1), 0, good), fragment, {0x45}, good[:20],
		tuntest.Packet{Src: peerAddr(udpPeer), Dst: to.Addr(), Proto: tuntest.TCP, DstPort: to.Port(), Flags: tuntest.ACK}.Bytes(),
	}
	packets := append([][]byte{
		outer(from, to, 0, good),
		outer(from, to, 3, good), // congestion, which the inner packet cannot carry
		outer(from, to, 0, inner(inside(vxlanPeer, 1))),
		outer(netip.AddrPortFrom(peerAddr(stranger), 1), to, 0, good),
		outer(from, to, 0, good[:10]),
		outer(netip.AddrPortFrom(peerAddr(vxlanPeer), 1), h.e.Listening()[1].Addr, 0, make([]byte, 60)),
	}, foreign...)
	got := h.replay(tap.WireIn, packets...)

	want := [NumReasons]uint64{RxECN: 1, RxSpoofedSource: 1, RxUnknownSource: 1, RxTruncated: 1, RxBadVXLANFlags: 1}
	if d := got.Ledger; d.Packets != 6 || d.Delivered != 1 || d.Drops != want {
		t.Errorf("%d packets, %d delivered, drops %v", d.Packets, d.Delivered, d.Drops)
	}
	if got.Foreign != uint64(len(foreign)) {
		t.Errorf("%d foreign packets, want %d", got.Foreign, len(foreign))
	}
	if w := h.written(); len(w) != 1 || !bytes.Contains(w[0], []byte("once more")) {
		t.Errorf("the host got % x", w)
	}
	if c := h.change(); c.Rx.Packets != 6 {
		t.Errorf("the engine counted %d packets", c.Rx.Packets)
	}
}

// A second replay leaves its worker and the ledger of the first in place.
func TestReplaysFollowEachOther(t *testing.T) {
	h := replayHarness(t)
	p := tuntest.Packet{Src: inside(-1, 5), Dst: inside(udpPeer, 9), Proto: tuntest.UDP}.Bytes()
	workers := h.e.TapWorkers()
	for n := range uint64(3) {
		r, err := h.e.StartReplay(tap.TunIn)
		if err != nil {
			t.Fatal(err)
		}
		if !h.e.Stats().Observed {
			t.Error("a replay does not observe")
		}
		if _, err := h.e.StartReplay(tap.WireIn); !errors.Is(err, ErrReplaying) {
			t.Errorf("a second replay at the same time: %v", err)
		}
		for range n + 1 {
			if err := r.Put(p, 0); err != nil {
				t.Fatal(err)
			}
		}
		if got := r.Close(); got.Ledger.Delivered != n+1 {
			t.Errorf("replay %d delivered %d", n, got.Ledger.Delivered)
		}
	}
	if c := h.change(); c.Tx.Delivered != 6 || h.e.TapWorkers() != workers {
		t.Errorf("delivered %d, %d workers after %d", c.Tx.Delivered, h.e.TapWorkers(), workers)
	}
	if _, err := h.e.StartReplay(tap.Drop); err == nil {
		t.Error("a replay at drop")
	}
}

func TestReplayEndsWithItsEngine(t *testing.T) {
	h := replayHarness(t)
	p := tuntest.Packet{Src: inside(-1, 5), Dst: inside(udpPeer, 9), Proto: tuntest.UDP}.Bytes()
	e, err := New(Config{Offload: tun.OffloadFull, MTU: testMTU, Source: ourAddr, Listen: []Listen{{encap.FramingUDP, netip.AddrPortFrom(ourAddr, 0)}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.StartReplay(tap.TunIn); err == nil {
		t.Error("a replay before the engine runs")
	}
	if err := e.Apply(h.snap); err != nil {
		t.Fatal(err)
	}
	if err := e.Start(); err != nil {
		t.Fatal(err)
	}
	r, err := e.StartReplay(tap.TunIn)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Put(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	for range 10000 {
		if err = r.Put(p, 0); err != nil {
			break
		}
	}
	if err == nil {
		t.Error("packets go nowhere and nobody says so")
	}
	if got := r.Close(); got.Ledger.Packets != got.Ledger.Delivered+got.Ledger.Dropped() {
		t.Errorf("%+v", got.Ledger)
	}
	if _, err := e.StartReplay(tap.TunIn); err == nil {
		t.Error("a replay into a closed engine")
	}
}
