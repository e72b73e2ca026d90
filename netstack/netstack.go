// Package netstack is an address of the overlay inside a program: a TCP/IP
// stack in user space, connected to an engine, with the functions of package
// net. It needs no interface, no namespace and no privilege. It carries TCP, UDP
// and echo requests over IPv4.
//
// The stack is gVisor's. It exchanges super-packets with the engine, so that the
// cost of a packet is shared by the segments in it.
package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"tweed/node"
)

const (
	// maxPacket is the longest IPv4 packet, in bytes.
	maxPacket = 65535
	// acceptTime bounds how long the engine takes to connect once it was asked.
	acceptTime = 5 * time.Second
	// detachTime bounds taking leave of the engine.
	detachTime = 2 * time.Second
	// retryTime is the time between attempts to attach again.
	retryTime = 500 * time.Millisecond
	// reportTime is the time between two reports to the engine.
	reportTime = time.Second
	// socketBuffer is asked for, in bytes; net.core.wmem_max is granted.
	socketBuffer = 4 << 20
)

// Engine attaches a program: a *node.Node in this process, or a *node.Client of
// one in another.
type Engine interface {
	Attach(context.Context, node.AttachRequest) (node.AttachmentStatus, error)
	Detach(ctx context.Context, name string) error
}

// Config says what to attach to, and as what.
type Config struct {
	Engine Engine
	// Name is the attachment's name, default netstack.
	Name string
	// Addr asks for one address of the engine's subnet.
	Addr netip.Addr
	// Lost, unless nil, is called whenever the engine has gone, and with nil when
	// it is back. It is called from one goroutine.
	Lost func(error)
}

// Net is an address of the overlay. Its methods are safe for concurrent use.
type Net struct {
	cfg     Config
	status  node.AttachmentStatus
	link    *link
	stack   *stack.Stack
	wire    atomic.Pointer[wire] // nil while there is no engine
	ctx     context.Context
	end     context.CancelCauseFunc
	pumps   sync.WaitGroup
	closing sync.Once
}

// New attaches to the engine. When the engine is started again later, the Net
// attaches to it anew with the same address, and open connections go on.
func New(ctx context.Context, c Config) (*Net, error) {
	n := &Net{cfg: c}
	w, status, err := n.attach(ctx, c.Addr)
	if err != nil {
		return nil, err
	}
	n.status = status
	n.link = &link{mtu: uint32(status.MTU), gso: uint32(status.GSOMaxSize)}
	if n.stack, err = newStack(n.link, status.Addr); err != nil {
		w.close()
		return nil, err
	}
	n.use(w)
	n.ctx, n.end = context.WithCancelCause(context.Background())
	n.pumps.Go(func() { n.in(w) })
	n.pumps.Go(n.report)
	return n, nil
}

// attach listens on a socket of its own and has the engine connect to it.
func (n *Net) attach(ctx context.Context, addr netip.Addr) (*wire, node.AttachmentStatus, error) {
	var status node.AttachmentStatus
	dir, err := os.MkdirTemp("", "tweed-")
	if err != nil {
		return nil, status, fmt.Errorf("netstack: %w", err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "packets")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: path})
	if err != nil {
		return nil, status, fmt.Errorf("netstack: %w", err)
	}
	defer l.Close()
	status, err = n.cfg.Engine.Attach(ctx, node.AttachRequest{
		Socket: path, Name: n.cfg.Name, Addr: addr, SuperPackets: true, SharedMemory: true,
	})
	if err != nil {
		return nil, status, err
	}
	if err := l.SetDeadline(time.Now().Add(acceptTime)); err != nil {
		return nil, status, fmt.Errorf("netstack: %w", err)
	}
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, status, fmt.Errorf("netstack: the engine did not connect: %w", err)
	}
	w, err := newWire(conn, status.SharedMemory)
	return w, status, err
}

// use makes w the way to the engine.
func (n *Net) use(w *wire) {
	n.wire.Store(w)
	n.link.out.Store(w.out)
}

// in carries packets from the engine to the stack, and attaches again when the
// engine has gone.
func (n *Net) in(w *wire) {
	for {
		n.receive(w.in)
		n.link.out.Store(nil)
		n.wire.Store(nil)
		w.close()
		if n.ctx.Err() != nil {
			return
		}
		if w = n.reattach(); w == nil {
			return
		}
		n.use(w)
		if n.ctx.Err() != nil {
			w.conn.Close() // and so the next receive ends
		}
	}
}

// receive carries packets until there are no more to come.
func (n *Net) receive(r *receiver) {
	for {
		p, head, err := r.next()
		if err != nil {
			return
		}
		n.link.deliver(&r.header, p, head)
	}
}

var errEngineGone = errors.New("netstack: the engine has ended, or has detached us")

// reattach tries until it succeeds or the Net is closed.
func (n *Net) reattach() *wire {
	n.lost(errEngineGone)
	for {
		w, status, err := n.attach(n.ctx, n.status.Addr)
		if err == nil && status.MTU != n.status.MTU {
			// The stack's MTU is fixed; a smaller one would lose packets.
			w.close()
			err = fmt.Errorf("netstack: the overlay's MTU is %d now, and was %d", status.MTU, n.status.MTU)
		}
		if err == nil {
			n.lost(nil)
			return w
		}
		select {
		case <-n.ctx.Done():
			return nil
		case <-time.After(retryTime):
		}
	}
}

func (n *Net) lost(err error) {
	if n.cfg.Lost != nil {
		n.cfg.Lost(err)
	}
}

// Close gives the address back and ends all connections. Closing twice does
// nothing.
func (n *Net) Close() error {
	n.closing.Do(func() {
		n.end(net.ErrClosed)
		if w := n.wire.Load(); w != nil {
			// Without it the engine would notice a moment later.
			ctx, cancel := context.WithTimeout(context.Background(), detachTime)
			_ = n.cfg.Engine.Detach(ctx, n.status.Name)
			cancel()
			w.conn.Close()
		}
		n.stack.RemoveNIC(nic)
		n.stack.Close()
		n.pumps.Wait()
	})
	return nil
}

// Addr is the program's address in the overlay.
func (n *Net) Addr() netip.Addr { return n.status.Addr }

// Network is what can be reached: the overlay's network.
func (n *Net) Network() netip.Prefix { return n.status.Network }

// MTU is the largest packet, in bytes.
func (n *Net) MTU() int { return n.status.MTU }

// Name is the attachment's name.
func (n *Net) Name() string { return n.status.Name }

// Stats counts packets since New. A super-packet counts once.
type Stats = node.ProgramStats

// Stats are the stack's own counters.
func (n *Net) Stats() Stats {
	s := n.stack.Stats()
	return Stats{
		Received:      s.IP.PacketsReceived.Value(),
		BadChecksum:   s.TCP.ChecksumErrors.Value() + s.UDP.ChecksumErrors.Value(),
		Malformed:     s.IP.MalformedPacketsReceived.Value(),
		Sent:          s.IP.PacketsSent.Value(),
		Lost:          n.link.lost.Load(),
		Retransmitted: s.TCP.Retransmits.Value(),
	}
}

// report tells the engine the counters now and then, for tweed ps.
func (n *Net) report() {
	tick := time.NewTicker(reportTime)
	defer tick.Stop()
	for {
		n.wire.Load().report(n.Stats())
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Dial connects to an address of the overlay, a literal IPv4 address and port.
// network is tcp, tcp4, udp or udp4.
func (n *Net) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	ap, err := n.parse(network, address)
	if err != nil {
		return nil, err
	}
	if network[0] == 'u' {
		return n.dialUDP(ap)
	}
	c, err := n.dialTCP(ctx, fullAddress(ap))
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: net.TCPAddrFromAddrPort(ap), Err: err}
	}
	return c, nil
}

// Listen accepts TCP connections on a port of our address; address is ":80", or
// has our own address in front. Port 0 chooses one.
func (n *Net) Listen(network, address string) (net.Listener, error) {
	ap, err := n.parse(network, address)
	if err != nil {
		return nil, err
	}
	if network[0] != 't' {
		return nil, &net.OpError{Op: "listen", Net: network, Err: net.UnknownNetworkError(network)}
	}
	l, err := n.listenTCP(fullAddress(ap))
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: net.TCPAddrFromAddrPort(ap), Err: err}
	}
	return l, nil
}

// ListenPacket receives UDP datagrams on a port of our address.
func (n *Net) ListenPacket(network, address string) (net.PacketConn, error) {
	ap, err := n.parse(network, address)
	if err != nil {
		return nil, err
	}
	if network[0] != 'u' {
		return nil, &net.OpError{Op: "listen", Net: network, Err: net.UnknownNetworkError(network)}
	}
	here := fullAddress(ap)
	return gonet.DialUDP(n.stack, &here, nil, ipv4.ProtocolNumber)
}

// parse reads "IP:PORT"; no IP means our own.
func (n *Net) parse(network, address string) (netip.AddrPort, error) {
	fail := func(err error) (netip.AddrPort, error) {
		return netip.AddrPort{}, &net.OpError{Op: "dial", Net: network, Err: fmt.Errorf("%s: %w", address, err)}
	}
	if !slices.Contains([]string{"tcp", "tcp4", "udp", "udp4"}, network) {
		return fail(net.UnknownNetworkError(network))
	}
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return fail(err)
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return fail(errors.New("expected a port from 0 to 65535"))
	}
	ip := n.status.Addr
	if host != "" && host != "0.0.0.0" {
		if ip, err = netip.ParseAddr(host); err != nil || !ip.Is4() {
			return fail(errors.New("expected an IPv4 address: the overlay has no names"))
		}
	}
	return netip.AddrPortFrom(ip, uint16(port)), nil
}
