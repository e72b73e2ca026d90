package engine

import (
	"testing"

	"golang.org/x/sys/unix"

	"tweed/encap"
	"tweed/engine/impair"
	"tweed/engine/tap"
	"tweed/tun/tuntest"
)

// TestEveryDropIsShownOnceWithItsReason: for each reason there is, what is
// dropped for it is one record at tap.Drop.
func TestEveryDropIsShownOnceWithItsReason(t *testing.T) {
	seen := map[Reason]bool{
		// Counted inside the kernel, by a Bypass, which is off while anybody captures.
		TxEncapError: true, RxBacklog: true,
	}
	check := func(h *harness, want Reason, do func()) {
		t.Helper()
		h.change()
		var n int
		for _, r := range h.tapped(true, do) {
			if !r.Points.Has(tap.Drop) {
				continue
			}
			n++
			if Reason(r.Reason) != want || r.Receive != want.Receive() {
				t.Errorf("%v is shown as %v, receive %v", want, Reason(r.Reason), r.Receive)
			}
		}
		s := h.change()
		if s.Tx.Drops[want]+s.Rx.Drops[want] != 1 || s.Tx.Dropped()+s.Rx.Dropped() != 1 || n != 1 {
			t.Errorf("%v: %d records at drop, ledger tx %v rx %v", want, n, s.Tx.Drops, s.Rx.Drops)
		}
		seen[want] = true
	}

	// Transmit.
	sent := func(p tuntest.Packet) tuntest.Packet { p.Src = inside(-1, 0); return p }
	broken := plain(sent(to(udpPeer, udp(10))))
	broken[10+2] = 0xff // total length
	last, big := sent(to(udpPeer, udp(10))), sent(to(narrowPeer, udp(1200)))
	last.TTL, big.Frag = 1, 0x4000
	nobody := sent(udp(10))
	nobody.Dst = inside(100, 1)
	for reason, raw := range map[Reason][]byte{
		TxNotIPv4: append(make([]byte, 10), 0x60, 0, 0, 0), TxMalformed: broken, TxNoRoute: plain(nobody), TxTTLExpired: plain(last), TxTooBig: plain(big),
	} {
		h := newHarness(t)
		check(h, reason, func() { h.send(raw) })
	}
	for class, reason := range map[encap.SendError]Reason{
		encap.SendOther: TxSendError, encap.SendRefused: TxRefused, encap.SendUnreachable: TxUnreachable, encap.SendNoBuffer: TxNoBuffer,
	} {
		h := newHarness(t)
		for i := range h.tx.outs {
			h.tx.outs[i].sock = &reporting{sender: h.tx.outs[i].sock, class: class, tag: func() uint64 { return uint64(h.tx.tap.worker)<<56 | h.tx.tap.id }}
		}
		check(h, reason, func() { h.send(plain(sent(to(udpPeer, udp(10))))) })
	}
	h := newHarness(t)
	a, b := h.attach("a", inside(-1, 20)), h.attach("b", inside(-1, 21))
	p := udp(10)
	p.Src, p.Dst = inside(-1, 99), inside(udpPeer, 1)
	check(h, TxForeignSource, func() { h.fromPort(a, plain(p)) })
	if err := unix.Shutdown(b.fd, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	p = a.packet(udp(10))
	p.Dst = b.Addr
	check(h, TxLocalError, func() { h.fromPort(a, plain(p)) })

	// Receive.
	h = newHarness(t)
	good := tuntest.Packet{Src: inside(vxlanPeer, 9), Dst: inside(-1, 0), Proto: tuntest.UDP, Payload: make([]byte, 30)}
	wire := func(p tuntest.Packet) []byte { return framed(encap.FramingVXLAN, vxlanPeer, p.Bytes()) }
	edited := func(at int, v byte) []byte { b := wire(good); b[at] = v; return b }
	with := func(edit func(*tuntest.Packet)) []byte { p := good; edit(&p); return wire(p) }
	receive := func(from int, tos uint8, b []byte) func() {
		return func() { h.transmit(h.peers[from], encap.FramingVXLAN, tos, b) }
	}
	const ip = encap.MaxPrefixLen
	for reason, b := range map[Reason][]byte{
		RxTruncated: wire(good)[:30], RxBadVXLANFlags: edited(0, 0), RxWrongVNI: edited(4, 1), RxWrongMAC: edited(8, 9), RxNotIPv4: edited(21, 6),
		RxBadIHL: edited(ip, 0x41), RxBadLength: edited(ip+2, 0xff), RxTTLZero: edited(ip+8, 0),
		RxMartian:       with(func(p *tuntest.Packet) { p.Src = inside(-1, 3) }),
		RxSpoofedSource: with(func(p *tuntest.Packet) { p.Src = inside(udpPeer, 3) }),
		RxNotForUs:      with(func(p *tuntest.Packet) { p.Dst = inside(udpPeer, 3) }),
	} {
		check(h, reason, receive(vxlanPeer, 0, b))
	}
	check(h, RxUnknownSource, receive(stranger, 0, wire(good)))
	check(h, RxECN, receive(vxlanPeer, 3, wire(good)))
	closed, _ := pairQueue(t, h.queue.Offload())
	closed.Close()
	for _, w := range h.e.rx {
		w.queue = closed
	}
	check(h, RxTUNError, receive(vxlanPeer, 0, wire(good)))

	h = impaired(t, impair.Spec{Loss: 1, Seed: 1})
	check(h, TxImpaired, func() { h.send(plain(sent(to(udpPeer, udp(10))))) })
	for r := range NumReasons {
		if !seen[r] {
			t.Errorf("no test shows a packet dropped for %v", r)
		}
	}
}

// reporting is a socket whose kernel takes nothing and that says so of the one
// packet it was given.
type reporting struct {
	sender
	class encap.SendError
	tag   func() uint64
}

func (r *reporting) Send(b *encap.SendBatch, res *encap.SendResult) {
	all := encap.SendResult{}
	r.sender.Send(b, &all)
	res.Failed[r.class] = all.Sent
	res.Refused(r.tag(), r.class)
}
