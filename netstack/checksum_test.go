package netstack_test

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"tweed/netstack"
	"tweed/tun"
)

// datagram is a UDP packet from 10.0.0.2:7 to 10.0.0.1:port as the engine gives
// it, with right checksums.
func datagram(port uint16, payload string) []byte {
	b := make([]byte, headerLen+28, headerLen+28+len(payload))
	b = append(b, payload...)
	ip := b[headerLen:]
	ip[0], ip[8], ip[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], []byte{10, 0, 0, 2, 10, 0, 0, 1})
	headerSum(ip)
	udp := ip[20:]
	binary.BigEndian.PutUint16(udp, 7)
	binary.BigEndian.PutUint16(udp[2:], port)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	binary.BigEndian.PutUint16(udp[6:], pseudo(ip))
	binary.BigEndian.PutUint16(udp[6:], ^tun.Fold(tun.Sum(udp, 0)))
	return b
}

func headerSum(ip []byte) {
	binary.BigEndian.PutUint16(ip[10:], 0)
	binary.BigEndian.PutUint16(ip[10:], ^tun.Fold(tun.Sum(ip[:20], 0)))
}

// fragments are the two that a datagram becomes, as if both were partial.
func fragments(b []byte) (first, second []byte) {
	const headers, some = headerLen + 20, 24
	first = slices.Clone(b[:headers+some])
	second = append(slices.Clone(b[:headers]), b[headers+some:]...)
	first[headerLen+6] = 0x20 // more fragments
	second[headerLen+7] = some / 8
	for _, f := range [][]byte{first, second} {
		binary.BigEndian.PutUint16(f[headerLen+2:], uint16(len(f)-headerLen))
		headerSum(f[headerLen:])
	}
	return first, second
}

// pseudo is the sum of the pseudo header (RFC 768).
func pseudo(ip []byte) uint16 {
	sum := tun.Sum(ip[12:20], 0)
	return tun.Fold(tun.Sum([]byte{0, 17, ip[24], ip[25]}, sum))
}

// partial leaves the checksum of a datagram to whoever receives it.
func partial(b []byte) []byte {
	b[0] = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	binary.NativeEndian.PutUint16(b[6:], 20)
	binary.NativeEndian.PutUint16(b[8:], 6)
	binary.BigEndian.PutUint16(b[headerLen+26:], pseudo(b[headerLen:]))
	return b
}

func TestOnlyPacketsWithGoodOrPartialChecksumsReachApplications(t *testing.T) {
	c := &cable{t: t}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	n, err := netstack.New(ctx, netstack.Config{Engine: c})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	p, err := n.ListenPacket("udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	port := netip.MustParseAddrPort(p.LocalAddr().String()).Port()
	change := func(b []byte, at int) []byte {
		b[headerLen+at] ^= 0x10
		return b
	}
	at := func(b []byte, start, offset uint16) []byte {
		binary.NativeEndian.PutUint16(b[6:], start)
		binary.NativeEndian.PutUint16(b[8:], offset)
		return b
	}
	first, second := fragments(partial(datagram(port, "bad: fragments that are partial.")))
	for _, b := range [][]byte{
		datagram(port, "complete"),
		partial(datagram(port, "partial")),
		// After each packet that is trusted, the next one must be looked at.
		change(datagram(port, "bad: payload"), 30),
		partial(datagram(port, "partial again")),
		change(datagram(port, "bad: port"), 20),
		change(datagram(port, "bad: header"), 8),
		change(partial(datagram(port, "bad: header of a partial one")), 8),
		at(partial(datagram(port, "bad: starts elsewhere")), 24, 2),
		at(partial(datagram(port, "bad: field elsewhere")), 20, 16),
		at(partial(datagram(port, "bad: beyond the end")), 60000, 60000),
		first, second,
		partial(datagram(port, "a"))[:headerLen+19],
		partial(datagram(port, "a"))[:headerLen],
		datagram(port, "last"),
	} {
		if _, err := c.engineEnd().Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	var got []string
	for !slices.Contains(got, "last") {
		buf := make([]byte, 100)
		size, _, err := p.ReadFrom(buf)
		if err != nil {
			t.Fatalf("after %q: %v", got, err)
		}
		got = append(got, string(buf[:size]))
	}
	if want := []string{"complete", "partial", "partial again", "last"}; !slices.Equal(got, want) {
		t.Errorf("%q arrived, want %q", got, want)
	}
	// A packet without a byte does not count; the two fragments count once more
	// as one.
	if s, want := n.Stats(), (netstack.Stats{Received: 14, BadChecksum: 6, Malformed: 3}); s != want {
		t.Errorf("%+v, want %+v", s, want)
	}
}

// engineEnd is the engine's end of the first program's socket.
func (c *cable) engineEnd() *net.UnixConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conns[0]
}
