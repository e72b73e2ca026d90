package capture

import (
	"encoding/binary"
	"fmt"
	"strings"

	"tweed/capture/pcapng"
	"tweed/engine/tap"
)

// Skip is why a packet of a capture file is not replayed.
type Skip uint8

// Reasons to skip a packet.
const (
	// SkipPoint: it was captured at another tap point.
	SkipPoint Skip = iota
	// SkipCut: the file has its head only.
	SkipCut
	// SkipNotIPv4: it is not IPv4, or its link type is not known here.
	SkipNotIPv4
	// SkipTooLong: it is longer than an IPv4 packet can be.
	SkipTooLong
	// SkipForeign: it is no whole UDP datagram to a port the engine listens on.
	SkipForeign

	// NumSkips is the number of reasons, for arrays indexed by Skip.
	NumSkips
)

var skipTexts = [NumSkips]string{"of other tap points", "cut short", "not IPv4", "too long", "not to a port of the engine"}

// String returns words to follow a number of packets.
func (s Skip) String() string { return skipTexts[s] }

// Selector reads a capture file, of any program, and chooses the packets that
// can be put into an engine at a tap point. It belongs to one goroutine.
type Selector struct {
	// Point is tap.TunIn for inner packets or tap.WireIn for datagrams.
	Point tap.Point
	// All takes the packets of every tap point. Without it, a packet that was
	// captured by tweed has to be of Point.
	All bool
	// Ports are the UDP ports the engine listens on, for tap.WireIn.
	Ports map[uint16]string
	// Skipped counts the packets that were not chosen.
	Skipped [NumSkips]uint64

	r *pcapng.Reader
	p pcapng.Packet
}

// Chosen is a packet to be replayed.
type Chosen struct {
	// Time is in nanoseconds since 1970.
	Time int64
	// Data is a whole IPv4 packet, borrowed until the next call of Next.
	Data []byte
	// SegmentPayload is the payload of each segment of a super-packet, else 0.
	SegmentPayload int
}

// Open makes s read another file. Skipped goes on counting.
func (s *Selector) Open(r *pcapng.Reader) { s.r = r }

// Next finds the next packet to be replayed. It returns io.EOF at the end of
// the file and a *pcapng.FormatError where it is broken.
func (s *Selector) Next(c *Chosen) error {
	for {
		if err := s.r.Next(&s.p); err != nil {
			return err
		}
		why, ok := s.choose(c)
		if ok {
			return nil
		}
		s.Skipped[why]++
	}
}

// choose looks at s.p.
func (s *Selector) choose(c *Chosen) (why Skip, ok bool) {
	p := &s.p
	from := &s.r.Interfaces()[p.Interface]
	if point, err := tap.ParsePoint(from.Name); err == nil && point != s.Point && !s.All {
		return SkipPoint, false
	}
	if p.Length > len(p.Data) {
		return SkipCut, false
	}
	ip := ipv4Of(from.Link, p.Data)
	switch {
	case ip == nil:
		return SkipNotIPv4, false
	case len(ip) > 1<<16-1:
		return SkipTooLong, false
	case s.Point == tap.WireIn && !s.listens(ip):
		return SkipForeign, false
	}
	*c = Chosen{Time: p.Time, Data: ip}
	if p.Flags&pcapng.FlagSuperPacket != 0 {
		c.SegmentPayload = parseSuper(p.Comment, len(ip))
	}
	return 0, true
}

// listens reports whether the engine has a socket for the datagram.
func (s *Selector) listens(ip []byte) bool {
	ihl := int(ip[0]&0xf) * 4
	if ihl < minIPv4 || len(ip) < ihl+8 || ip[9] != protoUDP || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
		return false
	}
	_, ok := s.Ports[binary.BigEndian.Uint16(ip[ihl+2:])]
	return ok
}

// Link types of the files of other programs (LINKTYPE registry), and the
// Ethernet types they tell the content by.
const (
	linkCooked   = 113 // LINUX_SLL
	linkCooked2  = 276 // LINUX_SLL2
	etherIPv4    = 0x0800
	etherVLAN    = 0x8100
	etherService = 0x88a8
)

// ipv4Of returns the IPv4 packet in a packet of the given link type, without
// what pads it, or nil.
func ipv4Of(link uint16, b []byte) []byte {
	kind, at := uint16(etherIPv4), 0
	switch link {
	case pcapng.LinkIPv4, pcapng.LinkRaw:
	case pcapng.LinkEthernet:
		kind, at = typeAt(b, 12), 14
		for range 2 {
			if kind == etherVLAN || kind == etherService {
				kind, at = typeAt(b, at+2), at+4
			}
		}
	case linkCooked:
		kind, at = typeAt(b, 14), 16
	case linkCooked2:
		kind, at = typeAt(b, 0), 20
	default:
		return nil
	}
	if kind != etherIPv4 || at+minIPv4 > len(b) || b[at]>>4 != 4 {
		return nil
	}
	ip := b[at:]
	if total := ipTotal(ip); at > 0 && total >= minIPv4 && total < len(ip) {
		ip = ip[:total] // the shortest frames are padded
	}
	return ip
}

func typeAt(b []byte, at int) uint16 {
	if at+2 > len(b) {
		return 0
	}
	return binary.BigEndian.Uint16(b[at:])
}

const superFormat = "super-packet: %d segments of %d bytes"

// SuperComment says in a file what a super-packet consists of: a Selector
// reads it back.
func SuperComment(p *Packet) string { return fmt.Sprintf(superFormat, p.Segments, p.SegmentPayload) }

// parseSuper returns the payload of the segments of a super-packet of length
// bytes, 0 if the comment does not say it.
func parseSuper(comment string, length int) int {
	var segments, payload int
	i := strings.Index(comment, "super-packet:")
	if i < 0 {
		return 0
	}
	if n, _ := fmt.Sscanf(comment[i:], superFormat, &segments, &payload); n != 2 || payload <= 0 || payload > length {
		return 0
	}
	return payload
}
