// Package encap is the underlay side of tweed: the framings a packet can
// travel in, the MTU arithmetic that follows from them, and batched UDP sockets.
//
// The framings and the arithmetic are pure; only the files ending in _linux
// touch file descriptors. encap knows nothing of leases, TUN devices or tables.
package encap

import (
	"fmt"
	"strings"
)

// Framing says what stands between the outer UDP header and the inner IPv4
// packet. The zero value is FramingUDP.
type Framing uint8

const (
	// FramingUDP carries the bare IPv4 packet as the UDP payload, as flannel's
	// udp backend does (flannel pkg/backend/udp).
	FramingUDP Framing = iota
	// FramingVXLAN carries an 8-byte VXLAN header (RFC 7348 section 5) and a
	// 14-byte Ethernet header before the IPv4 packet.
	FramingVXLAN

	// NumFramings is the number of framings, for arrays indexed by Framing.
	NumFramings = 2
)

// Default UDP ports: flannel's udp backend and Linux's vxlan driver.
const (
	DefaultUDPPort   = 8285
	DefaultVXLANPort = 8472
)

const (
	outerHeaderLen = 20 + 8 // IPv4 without options, UDP
	vxlanHeaderLen = 8
	etherHeaderLen = 14

	// MaxPrefixLen is the longest prefix of any framing, in bytes.
	MaxPrefixLen = vxlanHeaderLen + etherHeaderLen
)

// String returns the framing's name as flags, leases and status spell it.
func (f Framing) String() string {
	switch f {
	case FramingUDP:
		return "udp"
	case FramingVXLAN:
		return "vxlan"
	}
	return fmt.Sprintf("framing(%d)", uint8(f))
}

// MarshalText implements encoding.TextMarshaler.
func (f Framing) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (f *Framing) UnmarshalText(text []byte) error {
	v, err := ParseFraming(string(text))
	if err != nil {
		return err
	}
	*f = v
	return nil
}

// ParseFraming reads a framing's name. The match ignores case, as flannel's
// backend lookup does.
func ParseFraming(s string) (Framing, error) {
	switch strings.ToLower(s) {
	case "udp":
		return FramingUDP, nil
	case "vxlan":
		return FramingVXLAN, nil
	}
	return 0, fmt.Errorf("framing %q: expected udp or vxlan", s)
}

// PrefixLen is the number of bytes between the outer UDP header and the inner
// packet: 0 for udp, 22 for vxlan.
func (f Framing) PrefixLen() int {
	if f == FramingVXLAN {
		return MaxPrefixLen
	}
	return 0
}

// Overhead is the number of underlay bytes a packet grows by: 28 for udp, 50
// for vxlan (outer IPv4 without options).
func (f Framing) Overhead() int { return outerHeaderLen + f.PrefixLen() }

// DefaultPort is the UDP port of the framing when the network names none.
func (f Framing) DefaultPort() uint16 {
	if f == FramingVXLAN {
		return DefaultVXLANPort
	}
	return DefaultUDPPort
}
