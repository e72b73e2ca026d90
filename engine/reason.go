package engine

import "fmt"

// Reason names why a packet was not delivered. One list serves the counters,
// the status command, the metrics and the capture, so a name read in one
// place can be searched for in every other.
type Reason uint8

// Reasons of the transmit direction (TUN to underlay) and of the receive
// direction (underlay to TUN). The order is the order of the checks.
const (
	// TxImpaired: Config.Impair asked for the packet to be lost.
	TxImpaired Reason = iota
	// TxNotIPv4: the host sent something other than IPv4 into the TUN.
	TxNotIPv4
	// TxMalformed: the IPv4 header from the TUN is inconsistent.
	TxMalformed
	// TxForeignSource: a port sent from an address that is not its own.
	TxForeignSource
	// TxNoRoute: no lease covers the destination.
	TxNoRoute
	// TxTTLExpired: the TTL would reach 0 at encapsulation.
	TxTTLExpired
	// TxTooBig: DF is set and the packet exceeds what the way to the peer carries.
	TxTooBig
	// TxRefused: the local firewall refused the datagram (EPERM, EACCES).
	TxRefused
	// TxUnreachable: the underlay has no route to the peer.
	TxUnreachable
	// TxNoBuffer: the socket or the device queue was full (ENOBUFS, EAGAIN).
	TxNoBuffer
	// TxSendError: any other error of the send call.
	TxSendError
	// TxEncapError: the kernel had no memory for the headers of a packet that a
	// Bypass was about to send.
	TxEncapError
	// TxLocalError: a port of this node refused the packet.
	TxLocalError

	// RxTruncated: the datagram is shorter than the framing and an IPv4 header.
	RxTruncated
	// RxUnknownSource: the outer source address holds no lease.
	RxUnknownSource
	// RxBadVXLANFlags: the I flag is missing, or a flag or reserved bit is set
	// (Linux vxlan_rcv drops these as well).
	RxBadVXLANFlags
	// RxWrongVNI: the VNI is not this network's.
	RxWrongVNI
	// RxWrongMAC: the inner destination MAC is not ours or the source MAC is no
	// valid unicast address of another node.
	RxWrongMAC
	// RxNotIPv4: the inner ethertype or IP version is not IPv4.
	RxNotIPv4
	// RxBadIHL: the inner header length is below 20 bytes or beyond the datagram.
	RxBadIHL
	// RxBadLength: the inner total length is below its header or beyond the datagram.
	RxBadLength
	// RxTTLZero: the inner TTL is 0.
	RxTTLZero
	// RxMartian: the inner source can never be a source address (RFC 1812
	// section 5.3.7), or is our own.
	RxMartian
	// RxSpoofedSource: the inner source is not in a lease the outer source holds.
	RxSpoofedSource
	// RxNotForUs: the inner destination is outside our subnet.
	RxNotForUs
	// RxECN: the outer header says congestion experienced and the inner packet
	// is not ECN capable (RFC 6040 section 4.2).
	RxECN
	// RxTUNError: the TUN device refused the packet.
	RxTUNError
	// RxBacklog: the kernel dropped a packet that a Bypass received, because the
	// CPU's queue of packets for the stack was full or the TUN device is down.
	RxBacklog

	// NumReasons is the number of reasons, for arrays indexed by Reason.
	NumReasons
)

// firstRx is the first reason of the receive direction.
const firstRx = RxTruncated

type reasonText struct{ name, doc string }

var reasonTexts = [NumReasons]reasonText{
	TxImpaired:      {"impaired", "lost on purpose, as --impair asks"},
	TxNotIPv4:       {"not-ipv4", "the host sent something other than IPv4 into the overlay"},
	TxMalformed:     {"malformed", "the IPv4 header is inconsistent"},
	TxForeignSource: {"foreign-source", "an attached container sent from an address that is not its own"},
	TxNoRoute:       {"no-route", "no lease covers the destination"},
	TxTTLExpired:    {"ttl-expired", "the TTL ran out at encapsulation"},
	TxTooBig:        {"too-big", "DF is set and the packet exceeds the path to the peer"},
	TxRefused:       {"send-refused", "the local firewall refused the datagram"},
	TxUnreachable:   {"send-unreachable", "the underlay has no route to the peer"},
	TxNoBuffer:      {"send-no-buffer", "the socket or device queue was full"},
	TxSendError:     {"send-error", "the send call failed"},
	TxEncapError:    {"encap-error", "the kernel had no memory for the headers"},
	TxLocalError:    {"port-write-error", "an attached container's interface refused the packet"},
	RxTruncated:     {"truncated", "the datagram is shorter than its headers"},
	RxBadVXLANFlags: {"bad-vxlan-flags", "the I flag is missing or a reserved bit is set"},
	RxWrongVNI:      {"wrong-vni", "the VNI is not this network's"},
	RxUnknownSource: {"unknown-source", "the outer source address holds no lease"},
	RxWrongMAC:      {"wrong-mac", "the inner destination MAC is not this node's, or the source can be no other node's"},
	RxNotIPv4:       {"rx-not-ipv4", "the inner packet is not IPv4"},
	RxBadIHL:        {"bad-ihl", "the inner header length is impossible"},
	RxBadLength:     {"bad-length", "the inner total length does not fit the datagram"},
	RxTTLZero:       {"ttl-zero", "the inner TTL is 0"},
	RxMartian:       {"martian-source", "the inner source can never be a source address"},
	RxSpoofedSource: {"spoofed-source", "the inner source is not leased to the outer source"},
	RxNotForUs:      {"not-for-us", "the inner destination is outside our subnet"},
	RxECN:           {"ecn-mismatch", "congestion was marked on a packet that cannot carry the mark"},
	RxTUNError:      {"tun-write-error", "the TUN device refused the packet"},
	RxBacklog:       {"backlog-full", "the kernel's queue of received packets was full"},
}

// String returns the reason's name, stable across releases.
func (r Reason) String() string {
	if r < NumReasons {
		return reasonTexts[r].name
	}
	return fmt.Sprintf("reason(%d)", uint8(r))
}

// Doc returns one line that says what the reason means.
func (r Reason) Doc() string {
	if r < NumReasons {
		return reasonTexts[r].doc
	}
	return ""
}

// Receive reports whether the reason belongs to the receive direction.
func (r Reason) Receive() bool { return r >= firstRx && r < NumReasons }

// ParseReason finds a reason by its name.
func ParseReason(name string) (Reason, error) {
	for r := range NumReasons {
		if reasonTexts[r].name == name {
			return r, nil
		}
	}
	return 0, fmt.Errorf("drop reason %q: unknown", name)
}
