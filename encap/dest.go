package encap

import (
	"net/netip"
	"sync/atomic"
)

// Dest is a UDP destination: its ready-made socket address and what sending
// to it has taught us. One Dest per endpoint is shared by all workers and
// kept across table generations; it is safe for concurrent use.
type Dest struct {
	sockaddr rawSockaddr
	endpoint netip.AddrPort
	// noGSO is set when the way to this destination is too narrow for
	// segments of the overlay's MTU (EMSGSIZE): its datagrams are sent one by
	// one, and the kernel fragments them.
	noGSO atomic.Bool
}

// NewDest returns the Dest of an IPv4 address and port.
func NewDest(ep netip.AddrPort) *Dest {
	return &Dest{sockaddr: makeSockaddr(ep), endpoint: ep}
}

// Endpoint returns the address and port.
func (d *Dest) Endpoint() netip.AddrPort { return d.endpoint }

// Segmented reports whether datagrams to this destination may leave as
// UDP_SEGMENT messages.
func (d *Dest) Segmented() bool { return !d.noGSO.Load() }

// RetrySegmentation forgets that the way to the destination was too narrow, for
// it may be another one now. It reports whether it was.
func (d *Dest) RetrySegmentation() bool { return d.noGSO.CompareAndSwap(true, false) }
