// Package probe sends traffic whose every byte and packet is accounted for:
// echo requests, hashed TCP transfers, datagrams of chosen sizes, and a
// numbered stream with a ledger. The demo shows its results; the tests of the
// whole program assert them.
//
// Each probe opens its sockets in two places, given as [Place], and runs from
// the ordinary threads of the program.
package probe

import (
	"net"
	"net/netip"
)

// Place is where a socket is opened: a *netns.Namespace, or anything else that
// can run a function somewhere. Do returns what the function returned, after it.
type Place interface {
	Do(func() error) error
}

// listenUDP opens a UDP socket on a free port of addr.
func listenUDP(at Place, addr netip.Addr) (*net.UDPConn, error) {
	var c *net.UDPConn
	err := at.Do(func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
		return err
	})
	return c, err
}

// portOf returns the address a UDP socket is bound to.
func portOf(c *net.UDPConn) netip.AddrPort {
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}
