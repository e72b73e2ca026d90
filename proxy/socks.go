package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// SOCKS5 numbers (RFC 1928).
const (
	socksVersion = 5

	methodNone      = 0x00
	methodsRefused  = 0xff
	cmdConnect      = 1
	cmdUDPAssociate = 3

	addrIPv4   = 1
	addrDomain = 3
	addrIPv6   = 4

	replyGood               = 0
	replyFailed             = 1
	replyNetworkUnreachable = 3
	replyHostUnreachable    = 4
	replyRefused            = 5
	replyNoCommand          = 7
	replyNoAddressType      = 8
)

const (
	// udpIdle ends the way to one destination of a UDP association.
	udpIdle = 2 * time.Minute
	// maxUDPPeers bounds the destinations of one association.
	maxUDPPeers = 256
	maxDatagram = 65535
)

// ServeSOCKS5 serves SOCKS5 on l.
func ServeSOCKS5(l net.Listener, dial Dial, log *slog.Logger) *Server {
	return serve(l, log, func(ctx context.Context, c net.Conn) error { return socks(ctx, c, dial) })
}

func socks(ctx context.Context, c net.Conn, dial Dial) error {
	_ = c.SetDeadline(time.Now().Add(handshakeTime))
	if err := socksGreet(c); err != nil {
		return err
	}
	var head [3]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return err
	}
	if head[0] != socksVersion {
		return fmt.Errorf("proxy: SOCKS version %d", head[0])
	}
	address, err := readSocksAddr(c)
	if err != nil {
		return errors.Join(err, socksReply(c, replyNoAddressType, nil))
	}
	switch head[1] {
	case cmdConnect:
		return socksConnect(ctx, c, dial, address)
	case cmdUDPAssociate:
		return socksAssociate(ctx, c, dial)
	}
	return errors.Join(fmt.Errorf("proxy: SOCKS command %d", head[1]), socksReply(c, replyNoCommand, nil))
}

func socksGreet(c net.Conn) error {
	var head [2]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return err
	}
	if head[0] != socksVersion {
		return fmt.Errorf("proxy: SOCKS version %d, expected 5", head[0])
	}
	methods := make([]byte, head[1])
	if _, err := io.ReadFull(c, methods); err != nil {
		return err
	}
	for _, m := range methods {
		if m == methodNone {
			_, err := c.Write([]byte{socksVersion, methodNone})
			return err
		}
	}
	_, err := c.Write([]byte{socksVersion, methodsRefused})
	return errors.Join(errors.New("proxy: the client wants to log in; there is nothing to log in to"), err)
}

// readSocksAddr reads ATYP, address and port as HOST:PORT.
func readSocksAddr(r io.Reader) (string, error) {
	var t [1]byte
	if _, err := io.ReadFull(r, t[:]); err != nil {
		return "", err
	}
	n := 0
	switch t[0] {
	case addrIPv4:
		n = 4
	case addrIPv6:
		n = 16
	case addrDomain:
		if _, err := io.ReadFull(r, t[:]); err != nil {
			return "", err
		}
		n, t[0] = int(t[0]), addrDomain
	default:
		return "", fmt.Errorf("proxy: SOCKS address type %d", t[0])
	}
	b := make([]byte, n+2)
	if _, err := io.ReadFull(r, b); err != nil {
		return "", err
	}
	host := string(b[:n])
	if t[0] != addrDomain {
		ip, _ := netip.AddrFromSlice(b[:n])
		host = ip.Unmap().String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(binary.BigEndian.Uint16(b[n:])))), nil
}

// appendSocksAddr appends an address as readSocksAddr reads it; nil and what is
// no IP address are 0.0.0.0:0.
func appendSocksAddr(b []byte, a net.Addr) []byte {
	ap := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	if a != nil {
		if p, err := netip.ParseAddrPort(a.String()); err == nil {
			ap = netip.AddrPortFrom(p.Addr().Unmap().WithZone(""), p.Port())
		}
	}
	if ap.Addr().Is4() {
		b = append(b, addrIPv4)
	} else {
		b = append(b, addrIPv6)
	}
	b = append(b, ap.Addr().AsSlice()...)
	return binary.BigEndian.AppendUint16(b, ap.Port())
}

func socksReply(c net.Conn, code byte, bound net.Addr) error {
	_, err := c.Write(appendSocksAddr([]byte{socksVersion, code, 0}, bound))
	return err
}

// replyFor tells the client why, as far as SOCKS can.
func replyFor(err error) byte {
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return replyRefused
	case errors.Is(err, unix.ENETUNREACH):
		return replyNetworkUnreachable
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, context.DeadlineExceeded):
		return replyHostUnreachable
	}
	return replyFailed
}

func socksConnect(ctx context.Context, c net.Conn, dial Dial, address string) error {
	_ = c.SetDeadline(time.Time{})
	dctx, cancel := context.WithTimeout(ctx, dialTime)
	out, err := dial(dctx, "tcp", address)
	cancel()
	if err != nil {
		return errors.Join(err, socksReply(c, replyFor(err), nil))
	}
	defer out.Close()
	if err := socksReply(c, replyGood, out.LocalAddr()); err != nil {
		return err
	}
	return joinConns(ctx, c, out)
}

// association is one UDP ASSOCIATE: datagrams of the client go to any number of
// destinations, until its TCP connection ends.
type association struct {
	dial   Dial
	client *net.UDPConn
	from   netip.AddrPort // the client, once it has sent
	mu     sync.Mutex
	peers  map[string]net.Conn
}

func socksAssociate(ctx context.Context, c net.Conn, dial Dial) error {
	local, ok := c.LocalAddr().(*net.TCPAddr)
	if !ok {
		return errors.Join(errors.New("proxy: UDP ASSOCIATE over a unix socket: there is no address to send datagrams to"), socksReply(c, replyNoCommand, nil))
	}
	client, err := net.ListenUDP("udp", &net.UDPAddr{IP: local.IP, Zone: local.Zone})
	if err != nil {
		return errors.Join(err, socksReply(c, replyFailed, nil))
	}
	a := &association{dial: dial, client: client, peers: map[string]net.Conn{}}
	defer a.close()
	stop := context.AfterFunc(ctx, func() { client.Close() })
	defer stop()
	if err := socksReply(c, replyGood, client.LocalAddr()); err != nil {
		return err
	}
	_ = c.SetDeadline(time.Time{})
	remote := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	go a.run(ctx, remote)
	_, err = io.Copy(io.Discard, c) // until the client hangs up
	return err
}

// run passes the client's datagrams on; those of other senders are dropped.
func (a *association) run(ctx context.Context, client netip.Addr) {
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := a.client.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		if from.Addr() != client || n < 4 || buf[2] != 0 {
			continue // somebody else's, or a fragment, which nobody sends
		}
		r := &sliceReader{buf[3:n]}
		address, err := readSocksAddr(r)
		if err != nil {
			continue
		}
		a.mu.Lock()
		a.from = from
		out := a.peers[address]
		full := len(a.peers) >= maxUDPPeers
		a.mu.Unlock()
		if out == nil {
			if full {
				continue
			}
			if out, err = a.open(ctx, address); err != nil {
				continue
			}
		}
		_, _ = out.Write(r.rest)
	}
}

func (a *association) open(ctx context.Context, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	out, err := a.dial(ctx, "udp", address)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.peers == nil {
		out.Close()
		return nil, net.ErrClosed
	}
	a.peers[address] = out
	go a.back(address, out)
	return out, nil
}

// back passes the answers of one destination to the client.
func (a *association) back(address string, out net.Conn) {
	defer func() {
		out.Close()
		a.mu.Lock()
		delete(a.peers, address)
		a.mu.Unlock()
	}()
	buf := make([]byte, maxDatagram)
	for {
		_ = out.SetReadDeadline(time.Now().Add(udpIdle))
		n, err := out.Read(buf)
		if err != nil {
			return
		}
		a.mu.Lock()
		to := a.from
		a.mu.Unlock()
		msg := append(appendSocksAddr([]byte{0, 0, 0}, out.RemoteAddr()), buf[:n]...)
		_, _ = a.client.WriteToUDPAddrPort(msg, to)
	}
}

func (a *association) close() {
	a.client.Close()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.peers {
		c.Close()
	}
	a.peers = nil
}

// sliceReader reads from the front of rest.
type sliceReader struct{ rest []byte }

func (r *sliceReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}
