// Package proxy lets ordinary programs use an overlay that is reached by a dial
// function and not by an interface: SOCKS5 (RFC 1928: CONNECT and UDP ASSOCIATE,
// no authentication), HTTP (RFC 9110: CONNECT, and forwarding of plain
// requests), and port forwards in both directions.
//
// It knows nothing of tweed: where a connection goes is the dialer's affair.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// dialTime bounds reaching a destination.
	dialTime = 15 * time.Second
	// handshakeTime bounds what a client may take to say what it wants.
	handshakeTime = 10 * time.Second
	// maxConns bounds the connections of one server at a time.
	maxConns = 4096
)

// Dial connects to an address, HOST:PORT, where HOST may be a name.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// Server serves one listener until Close.
type Server struct {
	l      net.Listener
	handle func(context.Context, net.Conn) error
	log    *slog.Logger
	ctx    context.Context
	end    context.CancelFunc
	slots  chan struct{}

	mu      sync.Mutex
	conns   map[net.Conn]struct{}
	running sync.WaitGroup
}

// serve starts a server. What handle returns is logged at debug level: it is
// the client's affair.
func serve(l net.Listener, log *slog.Logger, handle func(context.Context, net.Conn) error) *Server {
	s := &Server{l: l, handle: handle, log: log, slots: make(chan struct{}, maxConns), conns: map[net.Conn]struct{}{}}
	if s.log == nil {
		s.log = slog.Default()
	}
	s.ctx, s.end = context.WithCancel(context.Background())
	s.running.Go(s.accept)
	return s
}

// Addr is where the server listens.
func (s *Server) Addr() net.Addr { return s.l.Addr() }

func (s *Server) accept() {
	for {
		s.slots <- struct{}{}
		c, err := s.l.Accept()
		if err != nil {
			<-s.slots
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			select { // out of descriptors, most likely
			case <-s.ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		s.mu.Lock()
		s.conns[c] = struct{}{}
		s.mu.Unlock()
		s.running.Go(func() {
			if err := s.handle(s.ctx, c); err != nil && s.ctx.Err() == nil {
				s.log.Debug("proxy connection", "client", c.RemoteAddr(), "err", err)
			}
			c.Close()
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
			<-s.slots
		})
	}
}

// Close stops the server and cuts its connections.
func (s *Server) Close() error {
	s.end()
	err := s.l.Close()
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.running.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// CheckAddress says what is wrong with an address for [Listen] by its looks.
func CheckAddress(address string) error {
	path, isUnix := strings.CutPrefix(address, "unix:")
	if isUnix && path != "" {
		return nil
	}
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil || isUnix {
		return fmt.Errorf("address %q: expected HOST:PORT, with a port from 0 (any) to 65535, or unix:PATH", address)
	}
	return nil
}

// Listen opens a listener at a TCP address, or at unix:PATH, which only its
// owner can connect to. A socket that a dead program left is replaced.
func Listen(address string) (net.Listener, error) {
	if err := CheckAddress(address); err != nil {
		return nil, err
	}
	path, isUnix := strings.CutPrefix(address, "unix:")
	if !isUnix {
		return net.Listen("tcp", address)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode()&os.ModeSocket != 0 {
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, fmt.Errorf("socket %s is in use by another program", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	// The mode must be right from the start, not a moment later. The umask is
	// the whole process's, so this is for the beginning of a program.
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	return l, err
}

// joinConns copies both ways until both sides have ended, or ctx has. Each
// side's end is passed on, so that half-closed connections work.
func joinConns(ctx context.Context, a, b net.Conn) error {
	stop := context.AfterFunc(ctx, func() { a.Close(); b.Close() })
	defer stop()
	result := make(chan error, 2)
	one := func(to, from net.Conn) {
		err := carry(to, from)
		if c, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
			_ = c.CloseWrite()
		} else {
			to.Close()
		}
		if err != nil {
			from.Close()
		}
		result <- err
	}
	go one(a, b)
	go one(b, a)
	return errors.Join(<-result, <-result)
}

// copyBuffer is how much is read at a time, in bytes: a few super-packets.
const copyBuffer = 256 << 10

// carry copies until from ends. Between sockets of the host the kernel does it;
// a connection that is no socket may know a better way to or from one.
func carry(to, from net.Conn) error {
	_, a := to.(*net.TCPConn)
	_, b := from.(*net.TCPConn)
	if a && b {
		_, err := io.Copy(to, from)
		return err
	}
	// The host's sockets have these methods too, which copy 32 KiB at a time.
	if f, ok := from.(io.WriterTo); ok && !onHost(from) {
		_, err := f.WriteTo(to)
		return err
	}
	if t, ok := to.(io.ReaderFrom); ok && !onHost(to) {
		_, err := t.ReadFrom(from)
		return err
	}
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, copyBuffer))
	return err
}

// onHost reports whether c is a socket of the host.
func onHost(c net.Conn) bool {
	switch c.(type) {
	case *net.TCPConn, *net.UnixConn:
		return true
	}
	return false
}

// Forward is a -L argument, [BIND:]PORT:HOST:HOSTPORT as ssh has it, or a -R
// argument, PORT:HOST:HOSTPORT.
type Forward struct {
	Listen string
	To     string
}

// ParseForward reads one. Without BIND, it listens at bind; where that is empty,
// there is only one address to listen at, and BIND is refused.
func ParseForward(s, bind string) (Forward, error) {
	fail := func() (Forward, error) {
		expected := "[BIND:]PORT:HOST:HOSTPORT, such as 8080:10.244.7.2:80"
		if bind == "" {
			expected = "PORT:HOST:HOSTPORT, such as 8080:127.0.0.1:80"
		}
		return Forward{}, fmt.Errorf("%q: expected %s, with ports up to 65535", s, expected)
	}
	parts := strings.Split(s, ":")
	if len(parts) == 4 && bind == "" {
		return fail()
	}
	if len(parts) == 3 {
		parts = append([]string{bind}, parts...)
	}
	if len(parts) != 4 || parts[2] == "" {
		return fail()
	}
	for _, p := range []string{parts[1], parts[3]} {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 && p == parts[3] {
			return fail()
		}
	}
	return Forward{Listen: net.JoinHostPort(parts[0], parts[1]), To: net.JoinHostPort(parts[2], parts[3])}, nil
}

// ServeForward connects whoever connects to l with address to.
func ServeForward(l net.Listener, dial Dial, to string, log *slog.Logger) *Server {
	return serve(l, log, func(ctx context.Context, c net.Conn) error {
		dctx, cancel := context.WithTimeout(ctx, dialTime)
		out, err := dial(dctx, "tcp", to)
		cancel()
		if err != nil {
			return err
		}
		defer out.Close()
		return joinConns(ctx, c, out)
	})
}
