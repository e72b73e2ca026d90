package encap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Socket options missing from older headers; values from linux/udp.h and in.h.
const (
	ipPMTUDiscOmit = 5
	// socketBuffer is asked for in both directions. One queued super-packet is
	// charged about 64 KiB, so the system default of 208 KiB holds only three.
	socketBuffer = 8 << 20
)

type rawSockaddr = unix.RawSockaddrInet4

func makeSockaddr(ep netip.AddrPort) rawSockaddr {
	sa := rawSockaddr{Family: unix.AF_INET, Addr: ep.Addr().As4()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:], ep.Port())
	return sa
}

// SocketConfig says how a Socket is opened.
type SocketConfig struct {
	// Addr is the local IPv4 address and port; port 0 takes a free one.
	Addr netip.AddrPort
	// Shared lets the sockets of several workers share one port
	// (SO_REUSEPORT). The kernel then spreads arriving flows over them.
	Shared bool
	// Offload asks for UDP_SEGMENT on send and UDP_GRO on receive.
	Offload bool
	// SendOnly makes the kernel drop whatever arrives, so that nobody can fill
	// a receive buffer that is never read.
	SendOnly bool
}

// Socket is an unconnected IPv4 UDP socket for batches. Send and Recv may be
// used at the same time by one goroutine each; Close by any.
type Socket struct {
	fd  int
	gso atomic.Bool
	// hasGSO says that gso was true once.
	hasGSO bool
	gro    bool
	// closing tells a woken Recv that the wake-up is not data.
	closing atomic.Bool
	// impatient says that a Recv without data returns after restAfter (SO_RCVTIMEO).
	// Only the receiver touches it.
	impatient bool
	restAfter time.Duration

	// sendmmsg is the system call, a field so that a test can script partial
	// sends and errors.
	sendmmsg func(fd int, msgs []mmsghdr) (int, syscall.Errno)
}

// Listen opens a Socket. A port in use, an address that is not local and a
// missing permission come back as errors naming the address.
func Listen(cfg SocketConfig) (*Socket, error) {
	if a := cfg.Addr.Addr(); !a.Is4() && !a.Is4In6() {
		return nil, fmt.Errorf("encap: UDP %v: expected an IPv4 address and port", cfg.Addr)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
	if err != nil {
		return nil, fmt.Errorf("encap: open UDP socket: %w", err)
	}
	s := &Socket{fd: fd, sendmmsg: sendmmsg, restAfter: restAfter}
	if err := s.configure(cfg); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return s, nil
}

func (s *Socket) configure(cfg SocketConfig) error {
	if cfg.Shared {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
			return fmt.Errorf("encap: share port %d: %w", cfg.Addr.Port(), err)
		}
	}
	// The outer header carries no DF and learns nothing from ICMP, as a kernel
	// vxlan device: a forged "fragmentation needed" cannot shrink the path.
	if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, ipPMTUDiscOmit); err != nil {
		return fmt.Errorf("encap: set path MTU policy: %w", err)
	}
	if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_IP, unix.IP_RECVTOS, 1); err != nil {
		return fmt.Errorf("encap: ask for the type of service: %w", err)
	}
	for _, o := range [][2]int{{unix.SO_RCVBUF, unix.SO_RCVBUFFORCE}, {unix.SO_SNDBUF, unix.SO_SNDBUFFORCE}} {
		// Without CAP_NET_ADMIN the system limit applies: less buffer, no error.
		if unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, o[1], socketBuffer) != nil {
			_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, o[0], socketBuffer)
		}
	}
	if cfg.SendOnly {
		drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
		if err := unix.SetsockoptSockFprog(s.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop}); err != nil {
			return fmt.Errorf("encap: attach filter: %w", err)
		}
	}
	if cfg.Offload {
		s.gro = unix.SetsockoptInt(s.fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
		// Setting the size to 0 changes nothing and fails where it is unknown.
		s.hasGSO = unix.SetsockoptInt(s.fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 0) == nil
		s.gso.Store(s.hasGSO)
	}
	sa := &unix.SockaddrInet4{Port: int(cfg.Addr.Port()), Addr: cfg.Addr.Addr().As4()}
	if err := unix.Bind(s.fd, sa); err != nil {
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			return fmt.Errorf("encap: UDP %v is in use by another program or a vxlan device of the kernel: stop or delete it (see: ss -lun, ip -d link show type vxlan), or give the network another port", cfg.Addr)
		case errors.Is(err, unix.EADDRNOTAVAIL):
			return fmt.Errorf("encap: UDP %v: %v is no address of this host", cfg.Addr, cfg.Addr.Addr())
		}
		return fmt.Errorf("encap: bind UDP %v: %w", cfg.Addr, err)
	}
	return nil
}

// LocalAddr returns the bound address.
func (s *Socket) LocalAddr() (netip.AddrPort, error) {
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("encap: local address: %w", err)
	}
	in, ok := sa.(*unix.SockaddrInet4)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("encap: local address: not IPv4")
	}
	return netip.AddrPortFrom(netip.AddrFrom4(in.Addr), uint16(in.Port)), nil
}

// Offloads reports whether UDP_SEGMENT and UDP_GRO are in use. UDP_SEGMENT is
// given up at run time when the kernel refuses a segmented send.
func (s *Socket) Offloads() (gso, gro bool) { return s.gso.Load(), s.gro }

// RetrySegmentation makes a socket that has given up UDP_SEGMENT try it with the
// next batch, for the device underneath may be another one now; should the kernel
// refuse again, nothing is lost. It reports whether it was given up.
func (s *Socket) RetrySegmentation() bool { return s.hasGSO && s.gso.CompareAndSwap(false, true) }

// Dropped returns how many datagrams the kernel dropped at this socket because
// its receive buffer was full, since it was opened (SO_MEMINFO).
func (s *Socket) Dropped() uint64 {
	var info [9]uint32 // SK_MEMINFO_VARS, include/uapi/linux/sock_diag.h
	n := uint32(unsafe.Sizeof(info))
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s.fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		return 0
	}
	return uint64(info[8]) // SK_MEMINFO_DROPS
}

// Shutdown makes a blocked or later Recv return ErrClosed. Sending still works.
func (s *Socket) Shutdown() {
	s.closing.Store(true)
	// On an unconnected socket this answers ENOTCONN and wakes the reader all
	// the same.
	_ = unix.Shutdown(s.fd, unix.SHUT_RD)
}

// Close releases the socket. No Send or Recv may be running.
func (s *Socket) Close() error {
	s.closing.Store(true)
	if err := unix.Close(s.fd); err != nil {
		return fmt.Errorf("encap: close UDP socket: %w", err)
	}
	return nil
}

// mmsghdr is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [4]byte
}

func sendmmsg(fd int, msgs []mmsghdr) (int, syscall.Errno) {
	n, _, e := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs)), 0, 0, 0)
	return int(n), e
}
