// Package tap carries copies of packets out of the packet loop.
//
// A worker puts a record of each packet it handles into a ring of its own. It
// never waits: when the ring is full, the record is counted as lost, exactly,
// by tap point. One goroutine takes the records out again.
//
// Words used here:
//
//	point   a place in the packet loop a capture can look at
//	record  a copy of (the head of) one packet with what is known of it
//	commit  the moment a batch's records become visible to the reader. Until
//	        then the outcome of a record can be amended, because a packet's
//	        fate is known only after the system call for its batch.
package tap

import (
	"fmt"
	"strings"
	"sync/atomic"
)

// Point is a place a capture can look at.
type Point uint8

// The points, in the order a packet passes them.
const (
	// TunIn: read from the TUN device, leaving this node.
	TunIn Point = iota
	// WireOut: handed to the underlay socket, prefix included.
	WireOut
	// WireIn: received from the underlay, prefix included.
	WireIn
	// TunOut: written to the TUN device.
	TunOut
	// Drop: given up, in either direction.
	Drop

	// NumPoints is the number of points, for arrays indexed by Point.
	NumPoints
)

var pointNames = [NumPoints]string{"tun-in", "wire-out", "wire-in", "tun-out", "drop"}

// String returns the point's name as flags and files spell it.
func (p Point) String() string {
	if p < NumPoints {
		return pointNames[p]
	}
	return fmt.Sprintf("point(%d)", uint8(p))
}

// ParsePoint finds a point by its name.
func ParsePoint(s string) (Point, error) {
	for p, name := range pointNames {
		if s == name {
			return Point(p), nil
		}
	}
	return 0, fmt.Errorf("tap point %q: expected one of %s", s, strings.Join(pointNames[:], ", "))
}

// Points is a set of points.
type Points uint8

// AllPoints holds every point.
const AllPoints Points = 1<<NumPoints - 1

// Of returns the set of the given points.
func Of(points ...Point) Points {
	var s Points
	for _, p := range points {
		s |= 1 << p
	}
	return s
}

// Has reports whether p is in the set.
func (s Points) Has(p Point) bool { return s>>p&1 != 0 }

// Flags say what must be undone or completed to show a record as the packet
// was at one of its points.
type Flags uint8

const (
	// Partial: the inner transport checksum is only the pseudo header's sum.
	Partial Flags = 1 << iota
	// TTLLowered: the inner TTL was decremented after TunIn.
	TTLLowered
	// Super: the record is a super-packet dropped before it was split; it
	// stands for Segments packets.
	Super
	// Inner: the data has no prefix although the point is outside the tunnel,
	// because the packet was dropped before it got one.
	Inner
	// Whole: the record is one super-packet in one piece, for readers who want
	// that. Its segments have records of their own for the others.
	Whole
	// Segment: a part of a super-packet, or what may have become one. Readers
	// who want super-packets whole find its inner points in another record.
	Segment
	// NoChecksum: the datagram has no UDP checksum.
	NoChecksum
)

// innerPoints are inside the tunnel.
const innerPoints = Points(1<<TunIn | 1<<TunOut)

// Header is what is known of a packet.
type Header struct {
	// Time is the moment the batch was read, nanoseconds since 1970; records
	// of one batch count up by one from there.
	Time int64
	// ID is the same for the records of one packet, unique while the engine runs.
	ID uint64
	// Of is the ID of the super-packet this is a Segment of; 0 when it was none.
	Of uint64
	// Points are the points the packet passed with these bytes.
	Points Points
	// Reason is the engine's drop reason; valid when Points has Drop.
	Reason uint8
	// Flags, see there.
	Flags Flags
	// PrefixLen bytes of the data stand before the inner packet.
	PrefixLen uint8
	// Receive is true in the direction underlay to TUN.
	Receive bool
	// Worker is the number of the ring the record came from.
	Worker uint8
	// ECN is the outer header's ECN field.
	ECN uint8
	// Segments is the number of packets a Super or Whole record stands for, else 1.
	Segments uint16
	// SegmentPayload is the payload bytes of each segment of such a record.
	SegmentPayload uint16
	// Peer and PeerPort are the other underlay end, host byte order; Local and
	// LocalPort are ours. 0 when no peer was found.
	Peer, Local         uint32
	PeerPort, LocalPort uint16
	// Length is the length of the packet in bytes, before it was cut to the
	// snap length.
	Length uint32
}

// Set is one capture's rings, one for each worker. Its fields do not change.
type Set struct {
	// Points are the points any reader wants.
	Points Points
	// Snap is how many bytes of a packet are kept.
	Snap  int
	rings []*Ring
}

// NewSet makes a set for the given number of workers. ringBytes is the size of
// each ring, rounded up to a power of two.
func NewSet(workers int, points Points, snap, ringBytes int) (*Set, error) {
	s := &Set{Points: points, Snap: snap}
	for i := range workers {
		r, err := newRing(uint8(i), points, snap, ringBytes)
		if err != nil {
			s.Free()
			return nil, err
		}
		s.rings = append(s.rings, r)
	}
	return s, nil
}

// Supers makes the set one for readers who want super-packets whole, and, if
// split, for others as well. It must be called before any worker has the set.
func (s *Set) Supers(split bool) {
	for _, r := range s.rings {
		r.whole, r.split = true, split
	}
}

// Ring returns worker i's ring.
func (s *Set) Ring(i int) *Ring { return s.rings[i] }

// Rings returns all rings.
func (s *Set) Rings() []*Ring { return s.rings }

// Lost returns, by point, how many packets did not fit the rings so far, for
// readers who want super-packets whole or for the others.
func (s *Set) Lost(whole bool) [NumPoints]uint64 {
	var sum [NumPoints]uint64
	for _, r := range s.rings {
		for p := range sum {
			sum[p] += r.Lost(Point(p), whole)
		}
	}
	return sum
}

// Free unmaps the rings. No worker may hold the set any more (Engine.SetTap
// waits for that), and no reader may read on.
func (s *Set) Free() {
	for _, r := range s.rings {
		r.free()
	}
}

// counter is written by one worker and read by anybody.
type counter = atomic.Uint64
