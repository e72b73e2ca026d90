package tun

import (
	"encoding/binary"
	"errors"
)

// Splitter cuts a super-packet into the segments that travel one to a
// datagram. It makes the headers; payload is never copied: a segment is a
// header written elsewhere and a slice of the super-packet.
//
// A Splitter belongs to one goroutine and is meant to be reused. The rules are
// those of the kernel's tcp_gso_segment and __udp_gso_segment: the IPv4 ID
// counts up, sequence numbers advance, FIN and PSH stay on the last segment
// only, CWR on the first only.
type Splitter struct {
	hdr     [120]byte // headers of the super-packet, the template
	hdrLen  int
	ihl     int
	payload []byte
	size    int // payload bytes a segment
	next    int // index of the next segment
	count   int
	udp     bool
	partial bool

	id    uint16
	seq   uint32
	flags uint8
	ipSum uint64 // IPv4 header without length, ID and checksum
	l4Sum uint64 // transport header without sequence, flags and checksum
}

var (
	errNotSuper   = errors.New("tun: super-packet is not TCP or UDP over IPv4")
	errBadHeaders = errors.New("tun: super-packet's headers do not fit")
	errTooMany    = errors.New("tun: super-packet of too many tiny segments")
)

// Nobody's stack makes more than maxTiny segments of less than minSegment bytes of
// one super-packet, but whoever may open a packet socket in a container can: with
// one byte each, one packet would become 65,000. Linux sends TCP segments of 48
// bytes less up to 40 of options at least (tcp_min_snd_mss, TCP_MIN_SND_MSS), and
// at most 128 UDP datagrams of any size (UDP_MAX_SEGMENTS).
const (
	minSegment = 8
	maxTiny    = 128
)

// Start measures the super-packet pkt, which is borrowed until the last segment
// has been used. It returns an error when the headers do not fit the packet.
func (s *Splitter) Start(pkt []byte, h *Header) error {
	if h.vnet.gsoSize == 0 || len(pkt) < minIPv4 {
		return errBadHeaders
	}
	ihl := headerLen(pkt)
	s.udp = h.vnet.gsoType&^gsoECN == gsoUDPL4
	l4 := udpLen
	switch {
	case ihl < minIPv4 || len(pkt) < ihl+minTCP && !s.udp || len(pkt) < ihl+udpLen:
		return errBadHeaders
	case s.udp && pkt[9] == protoUDP:
	case !s.udp && pkt[9] == protoTCP:
		// The kernel's hdr_len can be the whole linear part of a forwarded
		// packet; the TCP header says its own length.
		l4 = int(pkt[ihl+12]>>4) * 4
	default:
		return errNotSuper
	}
	hl := ihl + l4
	if l4 < udpLen || !s.udp && l4 < minTCP || len(pkt) <= hl {
		return errBadHeaders
	}
	s.hdrLen, s.ihl = hl, ihl
	s.payload = pkt[hl:]
	s.size = int(h.vnet.gsoSize)
	s.next = 0
	s.count = (len(s.payload) + s.size - 1) / s.size
	if s.size < minSegment && s.count > maxTiny {
		return errTooMany
	}
	return nil
}

// Begin takes the headers as they are now for the template of all segments.
// partial leaves the transport checksums to the receiver: each segment then
// holds the folded sum of its pseudo header, as the kernel's CHECKSUM_PARTIAL.
func (s *Splitter) Begin(pkt []byte, partial bool) {
	hl, ihl := s.hdrLen, s.ihl
	s.partial = partial
	copy(s.hdr[:], pkt[:hl])
	s.id = be16(s.hdr[4:])
	put16(s.hdr[2:], 0)
	put16(s.hdr[4:], 0)
	put16(s.hdr[10:], 0)
	s.ipSum = Sum(s.hdr[:ihl], 0)
	t := s.hdr[ihl:hl]
	if s.udp {
		put16(t[4:], 0)
		put16(t[6:], 0)
	} else {
		s.seq = be32(t[4:])
		s.flags = t[13]
		put32(t[4:], 0)
		t[13] = 0
		put16(t[16:], 0)
	}
	s.l4Sum = Sum(t, pseudoSum(s.hdr[:], s.hdr[9], 0))
}

// Count returns the number of segments.
func (s *Splitter) Count() int { return s.count }

// SegmentLen returns the length in bytes of a full segment.
func (s *Splitter) SegmentLen() int { return s.hdrLen + s.size }

// HeaderLen returns the length in bytes of every segment's IPv4 and transport header.
func (s *Splitter) HeaderLen() int { return s.hdrLen }

// Next writes the next segment's headers to dst, which must hold HeaderLen
// bytes, and returns its payload. It reports false after the last segment.
func (s *Splitter) Next(dst []byte) (payload []byte, ok bool) {
	if s.next == s.count {
		return nil, false
	}
	i := s.next
	s.next++
	payload = s.payload[i*s.size:]
	last := i == s.count-1
	if !last {
		payload = payload[:s.size]
	}
	copy(dst, s.hdr[:s.hdrLen])

	total := uint16(s.hdrLen + len(payload))
	id := s.id + uint16(i)
	put16(dst[2:], total)
	put16(dst[4:], id)
	put16(dst[10:], ^Fold(s.ipSum+word(total)+word(id)))

	t := dst[s.ihl:s.hdrLen]
	l4Len := len(t) + len(payload)
	sum := s.l4Sum + word(uint16(l4Len))
	csum := t[udpCsumOff:]
	if s.udp {
		put16(t[4:], uint16(l4Len))
		sum += word(uint16(l4Len))
	} else {
		csum = t[tcpCsumOff:]
		put32(t[4:], s.seq+uint32(i*s.size))
		sum += uint64(binary.LittleEndian.Uint32(t[4:]))
		t[13] = s.flags
		if !last {
			t[13] &^= flagFIN | flagPSH
		}
		if i > 0 {
			t[13] &^= flagCWR
		}
		sum += word(uint16(t[13]))
	}
	if s.partial {
		put16(csum, Fold(pseudoSum(dst, dst[9], l4Len)))
		return payload, true
	}
	c := ^Fold(Sum(payload, sum))
	if c == 0 && s.udp {
		c = 0xffff // 0 means no checksum (RFC 768)
	}
	put16(csum, c)
	return payload, true
}
