package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// nic is the number of the stack's only interface.
const nic = 1

// Buffers of a TCP connection, in bytes: what it starts with and what it grows
// to. The largest windows keep 1 Gbit/s busy over 60 ms.
const (
	tcpBuffer        = 1 << 20
	tcpReceiveBuffer = 8 << 20
	tcpSendBuffer    = 6 << 20
)

// newStack makes a stack with one address on one interface, which everything
// is routed to.
func newStack(l *link, addr netip.Addr) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
		HandleLocal:        true,
	})
	// gVisor's loss detection by time (RACK) takes the delays of a busy machine
	// for losses and sends again what arrived.
	sack, recovery := tcpip.TCPSACKEnabled(true), tcpip.TCPRecovery(0)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBuffer, Max: tcpReceiveBuffer}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBuffer, Max: tcpSendBuffer}
	for _, option := range []tcpip.SettableTransportProtocolOption{&sack, &recovery, &receive, &send} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			s.Close()
			return nil, fmt.Errorf("netstack: TCP option %T: %s", option, err)
		}
	}
	if err := s.CreateNIC(nic, l); err != nil {
		s.Close()
		return nil, fmt.Errorf("netstack: interface: %s", err)
	}
	if err := s.AddProtocolAddress(nic, tcpip.ProtocolAddress{
		Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddrFromSlice(addr.AsSlice()).WithPrefix(),
	}, stack.AddressProperties{}); err != nil {
		s.Close()
		return nil, fmt.Errorf("netstack: address %s: %s", addr, err)
	}
	s.AddRoute(tcpip.Route{Destination: header.IPv4EmptySubnet, NIC: nic})
	return s, nil
}

func fullAddress(ap netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(ap.Addr().AsSlice()), Port: ap.Port()}
}

// Ping sends an echo request with size bytes of payload to an overlay address and
// returns the time until the answer.
func (n *Net) Ping(ctx context.Context, to netip.Addr, size int) (time.Duration, error) {
	fail := func(err error) (time.Duration, error) { return 0, fmt.Errorf("netstack: ping %s: %w", to, err) }
	var wq waiter.Queue
	ep, err := n.stack.NewEndpoint(icmp.ProtocolNumber4, ipv4.ProtocolNumber, &wq)
	if err != nil {
		return fail(errors.New(err.String()))
	}
	// The datagram functions of a UDP connection do for echo as well.
	c := gonet.NewUDPConn(&wq, ep)
	defer c.Close()
	if err := ep.Bind(fullAddress(netip.AddrPortFrom(n.status.Addr, 0))); err != nil {
		return fail(errors.New(err.String()))
	}
	if err := ep.Connect(fullAddress(netip.AddrPortFrom(to, 0))); err != nil {
		return fail(errors.New(err.String()))
	}
	if t, ok := ctx.Deadline(); ok {
		if err := c.SetReadDeadline(t); err != nil {
			return fail(err)
		}
	}
	request := make([]byte, 8+size)
	request[0], request[7] = 8, 1 // echo request, sequence 1
	start := time.Now()
	if _, err := c.Write(request); err != nil {
		return fail(err)
	}
	answer := make([]byte, 8+size+64)
	if _, err := c.Read(answer); err != nil {
		return fail(fmt.Errorf("no answer: %w", err))
	}
	return time.Since(start), nil
}

// dialUDP connects to ap.
func (n *Net) dialUDP(ap netip.AddrPort) (net.Conn, error) {
	to := fullAddress(ap)
	return gonet.DialUDP(n.stack, nil, &to, ipv4.ProtocolNumber)
}
