package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

// protocolICMP is ICMP's IANA protocol number.
const protocolICMP = 1

// Ping sends one ICMP echo request with size payload bytes from src to dst and
// waits for the answer until ctx ends. It returns the round-trip time. It needs
// CAP_NET_RAW over the place's network namespace. An ICMP error about the
// request is returned as an error that says so.
func Ping(ctx context.Context, from Place, src, dst netip.Addr, size int) (time.Duration, error) {
	var conn *icmp.PacketConn
	err := from.Do(func() (err error) {
		conn, err = icmp.ListenPacket("ip4:icmp", src.String())
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("probe: ping: %w", err)
	}
	defer conn.Close()
	// Ends a blocked read when ctx does.
	defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })()

	echo := &icmp.Echo{ID: rand.IntN(1 << 16), Seq: 1, Data: pattern(uint64(size), size)}
	msg := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: echo}
	wire, err := msg.Marshal(nil)
	if err != nil {
		return 0, fmt.Errorf("probe: ping: %w", err)
	}
	start := time.Now()
	if _, err := conn.WriteTo(wire, &net.IPAddr{IP: dst.AsSlice()}); err != nil {
		return 0, fmt.Errorf("probe: ping %s: %w", dst, err)
	}
	buf := make([]byte, 64<<10)
	for {
		n, peer, err := conn.ReadFrom(buf)
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return 0, fmt.Errorf("probe: ping %s from %s: no answer: %w", dst, src, context.Cause(ctx))
			}
			return 0, fmt.Errorf("probe: ping %s: %w", dst, err)
		}
		answer, err := icmp.ParseMessage(protocolICMP, buf[:n])
		if err != nil {
			continue // a raw socket also sees what is not ours
		}
		switch body := answer.Body.(type) {
		case *icmp.Echo:
			if answer.Type == ipv4.ICMPTypeEchoReply && body.ID == echo.ID {
				if !bytes.Equal(body.Data, echo.Data) {
					return 0, fmt.Errorf("probe: ping %s: the answer's payload differs", dst)
				}
				return time.Since(start), nil
			}
		case *icmp.DstUnreach:
			if quotes(body.Data, dst, echo.ID) {
				return 0, fmt.Errorf("probe: ping %s: %s says unreachable (code %d)", dst, peer, answer.Code)
			}
		case *icmp.TimeExceeded:
			if quotes(body.Data, dst, echo.ID) {
				return 0, fmt.Errorf("probe: ping %s: %s says time exceeded", dst, peer)
			}
		}
	}
}

// quotes reports whether an ICMP error is about the echo request to dst.
func quotes(offender []byte, dst netip.Addr, id int) bool {
	h, err := ipv4.ParseHeader(offender)
	if err != nil || len(offender) < h.Len+8 || !h.Dst.Equal(dst.AsSlice()) {
		return false
	}
	return int(offender[h.Len+4])<<8|int(offender[h.Len+5]) == id
}

// pattern returns n bytes that depend on seed.
func pattern(seed uint64, n int) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}
