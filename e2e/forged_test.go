package e2e

import (
	"encoding/binary"
	"encoding/json"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/vishvananda/netlink"

	"tweed/engine"
)

// forgery is one kind of bad datagram and the reason it has to be counted under.
type forgery struct {
	name   string
	reason engine.Reason
	// outer is the sender's underlay address; the zero value is the peer's.
	stranger bool
	payload  []byte
}

// innerPacket is a UDP packet from src to dst, changed by edit afterwards.
func innerPacket(t *testing.T, src, dst netip.Addr, edit func([]byte)) []byte {
	t.Helper()
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	udp := &layers.UDP{SrcPort: 4242, DstPort: 9}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, udp, gopacket.Payload("forged"))
	if err != nil {
		t.Fatal(err)
	}
	p := slices.Clone(buf.Bytes())
	if edit != nil {
		edit(p)
	}
	return p
}

// frame puts a packet into a VXLAN frame.
func frame(p []byte, vni uint32, src, dst net.HardwareAddr, edit func([]byte)) []byte {
	b := make([]byte, 22, 22+len(p))
	b[0] = 0x08
	binary.BigEndian.PutUint32(b[4:], vni<<8)
	copy(b[8:], dst)
	copy(b[14:], src)
	b[20], b[21] = 0x08, 0x00
	b = append(b, p...)
	if edit != nil {
		edit(b)
	}
	return b
}

// innerForgeries are the bad inner packets, the same in both framings.
func innerForgeries(t *testing.T, victim, peer, third netip.Addr) []forgery {
	inside := func(edit func([]byte)) []byte { return innerPacket(t, peer, victim, edit) }
	from := func(src string) []byte { return innerPacket(t, netip.MustParseAddr(src), victim, nil) }
	to := func(dst string) []byte { return innerPacket(t, peer, netip.MustParseAddr(dst), nil) }
	return []forgery{
		{name: "good packet, stranger's outer source", reason: engine.RxUnknownSource, stranger: true, payload: inside(nil)},
		{name: "inner source of another peer", reason: engine.RxSpoofedSource, payload: innerPacket(t, third, victim, nil)},
		{name: "inner source outside the overlay", reason: engine.RxSpoofedSource, payload: from("198.51.100.7")},
		{name: "inner source without a lease", reason: engine.RxSpoofedSource, payload: from("10.244.250.1")},
		{name: "inner source of the victim itself", reason: engine.RxMartian, payload: innerPacket(t, victim.Next(), victim, nil)},
		{name: "inner source loopback", reason: engine.RxMartian, payload: from("127.0.0.1")},
		{name: "inner source multicast", reason: engine.RxMartian, payload: from("224.0.0.1")},
		{name: "inner source 0.0.0.0", reason: engine.RxMartian, payload: from("0.0.0.0")},
		{name: "inner source broadcast", reason: engine.RxMartian, payload: from("255.255.255.255")},
		{name: "inner destination of another node", reason: engine.RxNotForUs, payload: innerPacket(t, peer, third, nil)},
		{name: "inner destination outside the overlay", reason: engine.RxNotForUs, payload: to("198.51.100.7")},
		{name: "inner destination loopback", reason: engine.RxNotForUs, payload: to("127.0.0.1")},
		{name: "inner destination multicast", reason: engine.RxNotForUs, payload: to("224.0.0.1")},
		{name: "inner destination on the underlay", reason: engine.RxNotForUs, payload: to("192.0.2.12")},
		{name: "truncated to nothing", reason: engine.RxTruncated, payload: inside(nil)[:0]},
		{name: "truncated in the header", reason: engine.RxTruncated, payload: inside(nil)[:19]},
		{name: "truncated after the header", reason: engine.RxBadLength, payload: inside(nil)[:20]},
		{name: "one byte short", reason: engine.RxBadLength, payload: inside(nil)[:33]},
		{name: "IHL 0", reason: engine.RxBadIHL, payload: inside(func(p []byte) { p[0] = 0x40 })},
		{name: "IHL 4", reason: engine.RxBadIHL, payload: inside(func(p []byte) { p[0] = 0x44 })},
		{name: "IHL 15 in a short packet", reason: engine.RxBadIHL, payload: inside(func(p []byte) { p[0] = 0x4f })},
		{name: "total length 0", reason: engine.RxBadLength, payload: inside(func(p []byte) { p[2], p[3] = 0, 0 })},
		{name: "total length 65535", reason: engine.RxBadLength, payload: inside(func(p []byte) { p[2], p[3] = 0xff, 0xff })},
		{name: "IP version 6", reason: engine.RxNotIPv4, payload: inside(func(p []byte) { p[0] = 0x65 })},
		{name: "TTL 0", reason: engine.RxTTLZero, payload: inside(func(p []byte) { p[8] = 0 })},
	}
}

// vxlanForgeries are the bad inner packets in good frames, and bad frames.
func vxlanForgeries(t *testing.T, inner []forgery, good []byte, ours, theirs net.HardwareAddr) []forgery {
	var all []forgery
	for _, f := range inner {
		f.payload = frame(f.payload, 1, theirs, ours, nil)
		all = append(all, f)
	}
	framed := func(edit func([]byte)) []byte { return frame(good, 1, theirs, ours, edit) }
	all = append(all,
		forgery{name: "no I flag", reason: engine.RxBadVXLANFlags, payload: framed(func(b []byte) { b[0] = 0 })},
		forgery{name: "wrong VNI", reason: engine.RxWrongVNI, payload: frame(good, 2, theirs, ours, nil)},
		forgery{name: "VNI 0", reason: engine.RxWrongVNI, payload: frame(good, 0, theirs, ours, nil)},
		forgery{name: "destination MAC of somebody else", reason: engine.RxWrongMAC, payload: frame(good, 1, theirs, net.HardwareAddr{2, 9, 9, 9, 9, 9}, nil)},
		forgery{name: "destination MAC broadcast", reason: engine.RxWrongMAC, payload: frame(good, 1, theirs, net.HardwareAddr{255, 255, 255, 255, 255, 255}, nil)},
		forgery{name: "source MAC multicast", reason: engine.RxWrongMAC, payload: frame(good, 1, net.HardwareAddr{1, 0, 0, 0, 0, 1}, ours, nil)},
		forgery{name: "source MAC zero", reason: engine.RxWrongMAC, payload: frame(good, 1, make(net.HardwareAddr, 6), ours, nil)},
		forgery{name: "source MAC our own", reason: engine.RxWrongMAC, payload: frame(good, 1, ours, ours, nil)},
		forgery{name: "ARP", reason: engine.RxNotIPv4, payload: framed(func(b []byte) { b[21] = 0x06 })},
		forgery{name: "VLAN tag", reason: engine.RxNotIPv4, payload: framed(func(b []byte) { b[20], b[21] = 0x81, 0x00 })},
		forgery{name: "cut in the VXLAN header", reason: engine.RxTruncated, payload: framed(nil)[:7]},
		forgery{name: "cut in the Ethernet header", reason: engine.RxTruncated, payload: framed(nil)[:21]},
	)
	// Every reserved bit of both words.
	for bit := range 64 {
		if bit == 4 || (bit >= 32 && bit < 56) { // the I flag, the VNI
			continue
		}
		all = append(all, forgery{name: "reserved bit", reason: engine.RxBadVXLANFlags,
			payload: framed(func(b []byte) { b[bit/8] ^= 0x80 >> (bit % 8) })})
	}
	return all
}

// TestForgedDatagrams sends every forgery, from a peer's own address and from
// a stranger's, and good packets behind them on the same flows. None of the
// forged ones may reach the TUN, each has its reason, and the ledger is exact.
func TestForgedDatagrams(t *testing.T) {
	for _, c := range []struct {
		framing, config string
		port            uint16
	}{{"udp", udpConfig, 8285}, {"vxlan", vxlanConfig, 8472}} {
		t.Run(c.framing, func(t *testing.T) {
			w := newWorld(t, 4)
			w.config(c.config)
			victim, peer, third := w.up(0), w.up(1), w.up(2)
			awaitPeers(2, victim, peer, third)
			sv, sp := victim.status(), peer.status()
			ours, theirs := mustMAC(t, sv.Node.VtepMAC), mustMAC(t, sp.Node.VtepMAC)
			forged := innerForgeries(t, victim.addr(), peer.addr(), third.addr())
			good := innerPacket(t, peer.addr(), victim.addr(), nil)
			sentinel := good
			if c.framing == "vxlan" {
				forged = vxlanForgeries(t, forged, good, ours, theirs)
				sentinel = frame(good, 1, theirs, ours, nil)
			}
			const times = 5
			before, tunBefore := assertBalance(t, victim), tunReceived(t, victim)
			fromPeer, fromStranger := newSender(t, w, 1, victim, c.port), newSender(t, w, 3, victim, c.port)
			want := map[string]uint64{}
			for _, f := range forged {
				sender := fromPeer
				if f.stranger {
					sender = fromStranger
				}
				for range times {
					sender(f.payload)
				}
				want[f.reason.String()] += times
			}
			// The barrier: what comes after the forged ones on the same socket.
			const sentinels = 7
			for range sentinels {
				fromPeer(sentinel)
			}
			total := before.Rx.Packets + uint64(len(forged))*times + sentinels
			w.await("every datagram entered", func() bool { return assertBalance(t, victim).Rx.Packets >= total })

			after := assertBalance(t, victim)
			got := map[string]uint64{}
			for reason, n := range after.Rx.Drops {
				if n -= before.Rx.Drops[reason]; n > 0 {
					got[reason] = n
				}
			}
			if asJSON(t, got) != asJSON(t, want) {
				t.Errorf("drops\n%s\nwant\n%s", asJSON(t, got), asJSON(t, want))
			}
			if n := after.Rx.Delivered - before.Rx.Delivered; n != sentinels {
				t.Errorf("%d packets delivered, want the %d good ones", n, sentinels)
			}
			if n := tunReceived(t, victim) - tunBefore; n != sentinels {
				t.Errorf("%d packets came out of the TUN, want the %d good ones", n, sentinels)
			}
			if after.SocketDropped != 0 || after.Rx.Packets != total {
				t.Errorf("%d packets entered, want %d; the socket dropped %d", after.Rx.Packets, total, after.SocketDropped)
			}
			// The command an operator would use says the same.
			status, out, errs := run(t, tweedBin, "status", "-o", "json", "--state-dir", victim.dir)
			if status != 0 || !jsonHasDrops(t, out, want) {
				t.Errorf("tweed status -o json: exit status %d, %s%s", status, errs, out)
			}
			t.Logf("%d kinds of forgery, %d datagrams, drops %s", len(forged), len(forged)*times, asJSON(t, got))
		})
	}
}

func mustMAC(t *testing.T, s string) net.HardwareAddr {
	t.Helper()
	m, err := net.ParseMAC(s)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// newSender returns a function that sends a payload from node i to the
// engine's port, always through one socket.
func newSender(t *testing.T, w *world, i int, to *daemon, port uint16) func([]byte) {
	t.Helper()
	var c net.Conn
	err := w.lan.Nodes[i].Do(func() (err error) {
		c, err = net.Dial("udp4", netip.AddrPortFrom(to.underlay(), port).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return func(p []byte) {
		if _, err := c.Write(p); err != nil {
			t.Fatal(err)
		}
	}
}

// tunReceived is the kernel's own count of packets that came out of the TUN.
func tunReceived(t *testing.T, e *daemon) uint64 {
	t.Helper()
	var n uint64
	netlinkIn(t, e.ns, func(h *netlink.Handle) {
		link, err := h.LinkByName("tweed0")
		if err != nil {
			t.Fatal(err)
		}
		n = link.Attrs().Statistics.RxPackets
	})
	return n
}

// jsonHasDrops reports whether a status answer names these receive drops.
func jsonHasDrops(t *testing.T, out string, want map[string]uint64) bool {
	t.Helper()
	var s struct {
		Schema int
		Ledger struct {
			Rx struct{ Drops map[string]uint64 }
		}
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil || s.Schema != 1 {
		return false
	}
	for reason, n := range want {
		if s.Ledger.Rx.Drops[reason] != n {
			return false
		}
	}
	return true
}
