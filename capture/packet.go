package capture

import (
	"net/netip"

	"tweed/engine"
	"tweed/engine/tap"
)

// Packet is one packet as it was at one tap point.
type Packet struct {
	// Time is in nanoseconds since 1970.
	Time int64
	// ID is shared by the records of one packet inside and outside the tunnel.
	ID     uint64
	Point  tap.Point
	Reason engine.Reason // valid at tap.Drop
	// Receive is the direction: underlay to overlay.
	Receive bool
	// Outer says that Data starts with the outer IPv4 header. The engine never
	// sees that header and the UDP header after it: they are made from the
	// addresses, with TTL 64 and a valid checksum.
	Outer bool
	// VXLAN says that the peer is spoken to in vxlan framing, udp otherwise.
	VXLAN bool
	// Unfinished says that the inner transport checksum is not computed,
	// because Data does not hold the whole packet it covers.
	Unfinished bool
	Worker     uint8
	// Peer and Local are the underlay ends; zero when no peer was found.
	Peer, Local netip.AddrPort
	// Segments is 1, or the number of segments of a super-packet kept whole;
	// SegmentPayload is the payload bytes of each.
	Segments, SegmentPayload int
	// Length is the length of the packet in bytes before it was cut.
	Length int
	// Lost is how many packets at this point were lost since the one before.
	Lost uint64
	// Data is an IPv4 packet, cut to the snap length.
	Data []byte
}

// count is the number of packets in the ledger.
func (p *Packet) count() uint64 { return uint64(max(p.Segments, 1)) }

// Counts are numbers of packets by tap point.
type Counts [tap.NumPoints]uint64

// Total returns the sum over all points.
func (c Counts) Total() uint64 {
	var n uint64
	for _, v := range c {
		n += v
	}
	return n
}

// Stats is what a session has seen at each point. Seen + Lost is what the
// engine's ledger counted there while the session ran: a super-packet counts as
// its segments.
type Stats struct {
	// Seen reached the session's filter; Matched passed it.
	Seen, Matched Counts
	// Lost did not fit the engine's rings and were never seen by the filter.
	Lost Counts
	// Overrun passed the filter and did not fit the session's buffer, because
	// its reader was too slow; or newer ones took their place among those kept.
	Overrun Counts
	// Until says that the packet came that a session with Until waited for.
	Until bool `json:",omitempty"`
}
