package netstack

import (
	"context"
	"errors"
	"net"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// backlog is how many connections may wait to be accepted on one port.
const backlog = 1024

// conn is a TCP connection. Beside what a net.Conn can, it exchanges data with
// sockets of the host without memory in between; see [conn.ReadFrom] and
// [conn.WriteTo].
type conn struct {
	*gonet.TCPConn
	ep tcpip.Endpoint
}

func newConn(wq *waiter.Queue, ep tcpip.Endpoint) *conn {
	return &conn{TCPConn: gonet.NewTCPConn(wq, ep), ep: ep}
}

func (n *Net) newEndpoint() (tcpip.Endpoint, *waiter.Queue, error) {
	wq := new(waiter.Queue)
	ep, err := n.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, wq)
	if err != nil {
		return nil, nil, systemError(err)
	}
	return ep, wq, nil
}

// dialTCP connects to an address.
func (n *Net) dialTCP(ctx context.Context, to tcpip.FullAddress) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ep, wq, err := n.newEndpoint()
	if err != nil {
		return nil, err
	}
	entry, done := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	terr := ep.Connect(to)
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			ep.Close()
			return nil, ctx.Err()
		case <-done:
		}
		terr = ep.LastError()
	}
	if terr != nil {
		ep.Close()
		return nil, systemError(terr)
	}
	return newConn(wq, ep), nil
}

// listener accepts TCP connections.
type listener struct {
	ep      tcpip.Endpoint
	wq      *waiter.Queue
	addr    net.Addr
	closed  chan struct{}
	closing sync.Once
}

func (n *Net) listenTCP(here tcpip.FullAddress) (net.Listener, error) {
	ep, wq, err := n.newEndpoint()
	if err != nil {
		return nil, err
	}
	terr := ep.Bind(here)
	if terr == nil {
		terr = ep.Listen(backlog)
	}
	var local tcpip.FullAddress
	if terr == nil {
		local, terr = ep.GetLocalAddress()
	}
	if terr != nil {
		ep.Close()
		return nil, systemError(terr)
	}
	addr := &net.TCPAddr{IP: net.IP(local.Addr.AsSlice()), Port: int(local.Port)}
	return &listener{ep: ep, wq: wq, addr: addr, closed: make(chan struct{})}, nil
}

func (l *listener) Addr() net.Addr { return l.addr }

// Close makes Accept return net.ErrClosed. Accepted connections stay.
func (l *listener) Close() error {
	l.closing.Do(func() {
		close(l.closed)
		l.ep.Close()
	})
	return nil
}

func (l *listener) Accept() (net.Conn, error) {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	l.wq.EventRegister(&entry)
	defer l.wq.EventUnregister(&entry)
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: err}
	}
	for {
		ep, wq, err := l.ep.Accept(nil)
		if err == nil {
			return newConn(wq, ep), nil
		}
		select {
		case <-l.closed:
			return fail(net.ErrClosed)
		default:
		}
		if _, wait := err.(*tcpip.ErrWouldBlock); !wait {
			return fail(systemError(err))
		}
		select {
		case <-l.closed:
			return fail(net.ErrClosed)
		case <-ready:
		}
	}
}

// systemError is the error of package unix that says the same, as the host's
// sockets would return it.
func systemError(err tcpip.Error) error {
	switch err.(type) {
	case *tcpip.ErrConnectionRefused:
		return unix.ECONNREFUSED
	case *tcpip.ErrConnectionReset:
		return unix.ECONNRESET
	case *tcpip.ErrConnectionAborted:
		return unix.ECONNABORTED
	case *tcpip.ErrTimeout:
		return unix.ETIMEDOUT
	case *tcpip.ErrHostUnreachable:
		return unix.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable:
		return unix.ENETUNREACH
	case *tcpip.ErrPortInUse:
		return unix.EADDRINUSE
	case *tcpip.ErrBadLocalAddress:
		return unix.EADDRNOTAVAIL
	}
	return errors.New(err.String())
}
