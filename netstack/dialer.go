package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
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
