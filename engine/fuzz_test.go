package engine

import (
	"bytes"
	"net/netip"
	"testing"

	"tweed/encap"
	"tweed/tun/tuntest"
)

// Whatever a socket delivers, the ledger holds, and what reaches the TUN is for
// us and from the sender's own lease.
func FuzzReceive(f *testing.F) {
	train := func(fr encap.Framing, n int) (b []byte) {
		for k := range n {
			p := from(holder(fr), tcp(50))
			p.Seq, p.Sum = uint32(50*k), tuntest.Partial
			b = append(b, framed(fr, holder(fr), p.Bytes())...)
		}
		return b
	}
	whole := from(vxlanPeer, udp(5000))
	whole.Sum = tuntest.Partial
	f.Add(train(encap.FramingUDP, 3), uint16(90), uint8(3), false, uint8(udpPeer))
	f.Add(train(encap.FramingVXLAN, 3), uint16(112), uint8(1), true, uint8(vxlanPeer))
	f.Add(train(encap.FramingUDP, 2), uint16(1), uint8(0), false, uint8(udpPeer))
	f.Add(framed(encap.FramingVXLAN, vxlanPeer, whole.Bytes()), uint16(500), uint8(0), true, uint8(vxlanPeer))
	f.Add([]byte{}, uint16(0), uint8(0), true, uint8(stranger))
	h := newHarness(f)
	f.Fuzz(func(t *testing.T, data []byte, segment uint16, tos uint8, vxlan bool, source uint8) {
		h.t = t
		defer func() { h.t = f }()
		if len(data) > 65507 {
			return
		}
		w := h.worker(encap.FramingUDP)
		if vxlan {
			w = h.worker(encap.FramingVXLAN)
		}
		source %= stranger + 1
		m := encap.Message{Data: bytes.Clone(data), TOS: tos, Source: addrBits(peerAddr(int(source)))}
		if int(segment) < len(data) { // as encap.RecvBatch guarantees
			m.SegmentLen = int(segment)
		}
		h.change()
		h.message(w, m)
		raw := h.written()
		s := h.change()
		if s.Rx.Packets == 0 || s.Rx.Delivered < uint64(len(raw)) {
			t.Fatalf("%+v, %d writes", s.Rx, len(raw))
		}
		for _, r := range raw {
			_, b, err := tuntest.Read(r)
			if err != nil || len(b) < 20 || b[0]>>4 != 4 || b[8] == 0 {
				t.Fatalf("% x reached the TUN", r)
			}
			src, dst := netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
			if source >= numPeers || !h.snap.Peers[source].Subnet.Contains(src) || !ourSubnet.Contains(dst) {
				t.Fatalf("from peer %d: %v to %v reached the TUN", source, src, dst)
			}
		}
	})
}

// Whatever the host hands over, the ledger holds, and what reaches a peer is
// for its lease.
func FuzzTransmit(f *testing.F) {
	f.Add(plain(to(udpPeer, udp(9))), uint8(udpPeer), true)
	f.Add(to(vxlanPeer, tcp(3000)).Super(900), uint8(vxlanPeer), true)
	f.Add(to(udpTweed, udp(3000)).Super(900), uint8(udpTweed), true)
	f.Add(tuntest.Virtio{Flags: 1, CsumStart: 20, CsumOffset: 6}.Prepend(to(vxlanTweed, udp(9)).Bytes()), uint8(vxlanTweed), false)
	f.Add(tuntest.Virtio{Flags: 1, GSOType: 4, GSOSize: 9}.Prepend([]byte{0x60}), uint8(0), false)
	h := newHarness(f)
	f.Fuzz(func(t *testing.T, raw []byte, peer uint8, aim bool) {
		h.t = t
		defer func() { h.t = f }()
		if len(raw) <= tuntest.VirtioLen || len(raw) > tuntest.VirtioLen+65535 {
			return
		}
		raw = bytes.Clone(raw)
		if v, b, _ := tuntest.Read(raw); v.GSOType != 0 && len(b)/max(int(v.GSOSize), 1) > 1000 {
			return // more datagrams than a socket buffers
		} else if aim && len(b) >= 20 {
			copy(b[16:], inside(int(peer%numPeers), 5).AsSlice())
		}
		h.change()
		h.send(raw)
		h.written()
		arrived := uint64(0)
		for i := range numPeers {
			for _, b := range h.inner(i) {
				arrived++
				if len(b) < 20 || b[0]>>4 != 4 || b[8] == 0 || !h.snap.Peers[i].Subnet.Contains(netip.AddrFrom4([4]byte(b[16:]))) {
					t.Fatalf("% x reached peer %d", b[:min(len(b), 60)], i)
				}
			}
		}
		if s := h.change(); s.Tx.Packets == 0 || s.Tx.Delivered != arrived {
			t.Fatalf("%+v, %d arrived", s.Tx, arrived)
		}
	})
}
