package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// Dialer connects to overlay addresses through the overlay and to all others
// from the host, so that a program that knows only one way out reaches both.
type Dialer struct {
	Net *Net
	// Host dials what is not in the overlay.
	Host net.Dialer
}

// DialContext is the common dial function. A name is looked up by the host's
// resolver; when it has addresses in the overlay, those are dialled.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	ips, err := d.resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, ip := range ips {
		if !d.Net.Network().Contains(ip) {
			continue
		}
		c, err := d.Net.Dial(ctx, network, net.JoinHostPort(ip.String(), port))
		if err == nil {
			return c, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", address, err))
	}
	if errs != nil {
		return nil, errors.Join(errs...)
	}
	return d.Host.DialContext(ctx, network, address)
}

// resolve returns the addresses of a name or of an address.
func (d *Dialer) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{ip.Unmap()}, nil
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	for i := range ips {
		ips[i] = ips[i].Unmap()
	}
	return ips, err
}

// Ping sends an echo request with size bytes of payload to an overlay address and
// returns the time until the answer.
func (n *Net) Ping(ctx context.Context, to netip.Addr, size int) (time.Duration, error) {
	c, err := n.net.DialPingAddr(n.status.Addr, to)
	if err != nil {
		return 0, fmt.Errorf("netstack: ping %s: %w", to, err)
	}
	defer c.Close()
	if t, ok := ctx.Deadline(); ok {
		if err := c.SetReadDeadline(t); err != nil {
			return 0, err
		}
	}
	request := make([]byte, 8+size)
	request[0], request[7] = 8, 1 // echo request, sequence 1
	start := time.Now()
	if _, err := c.Write(request); err != nil {
		return 0, fmt.Errorf("netstack: ping %s: %w", to, err)
	}
	answer := make([]byte, 8+size+64)
	if _, err := c.Read(answer); err != nil {
		return 0, fmt.Errorf("netstack: ping %s: no answer: %w", to, err)
	}
	return time.Since(start), nil
}
