package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
)

// datagramPatience is how long a datagram and its echo may be under way before
// they count as lost.
const datagramPatience = 10 * time.Second

// Datagrams sends one UDP datagram of each size (bytes of payload, 1 to 65507)
// from src to dst, where it is checked and echoed, and checks the echo. One is
// under way at a time. The error names the sizes that got lost, or the first
// one that came back altered.
func Datagrams(ctx context.Context, from, to Place, src, dst netip.Addr, sizes []int) error {
	fail := func(err error) error {
		return fmt.Errorf("probe: datagrams %s to %s: %w", src, dst, err)
	}
	server, err := listenUDP(to, dst)
	if err != nil {
		return fail(err)
	}
	defer server.Close()
	client, err := listenUDP(from, src)
	if err != nil {
		return fail(err)
	}
	defer client.Close()

	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, peer, err := server.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			server.WriteToUDPAddrPort(buf[:n], peer)
		}
	}()

	var lost []int
	buf := make([]byte, 64<<10)
	for _, size := range sizes {
		if err := ctx.Err(); err != nil {
			return fail(context.Cause(ctx))
		}
		want := pattern(uint64(size), size)
		if _, err := client.WriteToUDPAddrPort(want, portOf(server)); err != nil {
			return fail(fmt.Errorf("size %d: %w", size, err))
		}
		client.SetReadDeadline(time.Now().Add(datagramPatience))
		n, _, err := client.ReadFromUDPAddrPort(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if lost = append(lost, size); len(lost) == 5 {
				return fail(fmt.Errorf("lost at sizes %v, then gave up", lost))
			}
		case err != nil:
			return fail(fmt.Errorf("size %d: %w", size, err))
		case !bytes.Equal(buf[:n], want):
			return fail(fmt.Errorf("size %d: came back altered, %d bytes long", size, n))
		}
	}
	if lost != nil {
		return fail(fmt.Errorf("lost at sizes %v", lost))
	}
	return nil
}
