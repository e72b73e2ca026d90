package engine

import (
	"encoding/binary"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"tweed/tun"
)

// icmpKind is the type and code of an ICMP error (RFC 792, RFC 1191).
type icmpKind struct{ typ, code uint8 }

var (
	icmpNetUnreachable = icmpKind{3, 0}
	icmpFragNeeded     = icmpKind{3, 4}
	icmpTimeExceeded   = icmpKind{11, 0}
)

const (
	protoICMP = 1
	icmpTTL   = 64
	// icmpQuote is the payload quoted beyond the offender's IPv4 header.
	icmpQuote = 8

	// A worker answers at most icmpRate errors a second, and one host at most
	// icmpHostRate, with bursts of the same size. Each second starts with a
	// few tokens less, by chance: a fixed limit can be used as a side channel
	// (CVE-2020-25705).
	icmpRate     = 500
	icmpHostRate = 50
	icmpHosts    = 256
)

// icmpSender writes ICMP errors back to the sender. It belongs to one goroutine;
// its counters may be read by any.
type icmpSender struct {
	buf    [20 + 8 + 60 + icmpQuote]byte
	id     uint16
	second int64
	left   int
	hosts  [icmpHosts]uint8 // answers given this second, by hash of the host
	seed   uint32
	now    func() int64 // seconds, monotonic

	sent, limited atomic.Uint64
}

func (s *icmpSender) init() {
	start := time.Now()
	s.seed = rand.Uint32() | 1
	s.now = func() int64 { return int64(time.Since(start) / time.Second) }
	s.second = -1
}

// send answers the packet ip of queue q, whose header has been checked, with an error
// from the address src (host byte order). mtu is used by icmpFragNeeded. It
// stays silent about ICMP errors, later fragments, and packets whose source or
// destination is no unicast address (RFC 1122 section 3.2.2).
func (s *icmpSender) send(q *tun.Queue, src uint32, ip []byte, kind icmpKind, mtu uint16) {
	if !answerable(ip) || src == 0 {
		return
	}
	host := binary.BigEndian.Uint32(ip[12:])
	if !s.allow(host) {
		s.limited.Add(1)
		return
	}
	pkt := s.build(src, ip, kind, mtu)
	if q.WritePacket(pkt) == nil {
		s.sent.Add(1)
	}
}

func answerable(ip []byte) bool {
	ihl := int(ip[0]&0xf) * 4
	if binary.BigEndian.Uint16(ip[6:])&0x1fff != 0 || len(ip) < ihl+icmpQuote {
		return false
	}
	if ip[9] == protoICMP {
		switch ip[ihl] {
		case 0, 8, 13, 14: // echo and timestamp are no errors
		default:
			return false
		}
	}
	return unicast(binary.BigEndian.Uint32(ip[12:])) && unicast(binary.BigEndian.Uint32(ip[16:]))
}

// unicast reports whether a can be one host: not 0/8, 127/8 or 224/3.
func unicast(a uint32) bool { return !martian(a) }

// allow takes a token for the host.
func (s *icmpSender) allow(host uint32) bool {
	if now := s.now(); now != s.second {
		s.second = now
		s.left = icmpRate - int(rand.Uint32N(32))
		clear(s.hosts[:])
	}
	h := &s.hosts[(host*s.seed)>>24]
	if s.left == 0 || *h >= icmpHostRate {
		return false
	}
	s.left--
	*h++
	return true
}

// build makes the error in the sender's buffer.
func (s *icmpSender) build(src uint32, ip []byte, kind icmpKind, mtu uint16) []byte {
	quote := int(ip[0]&0xf)*4 + icmpQuote
	p := s.buf[:20+8+quote]
	s.id++
	p[0], p[1] = 0x45, 0xc0 // precedence internetwork control (RFC 1812 section 4.3.2.5)
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	binary.BigEndian.PutUint16(p[4:], s.id)
	binary.BigEndian.PutUint16(p[6:], 0)
	p[8], p[9] = icmpTTL, protoICMP
	binary.BigEndian.PutUint16(p[10:], 0)
	binary.BigEndian.PutUint32(p[12:], src)
	copy(p[16:20], ip[12:16])
	binary.BigEndian.PutUint16(p[10:], ^tun.Fold(tun.Sum(p[:20], 0)))

	m := p[20:]
	m[0], m[1] = kind.typ, kind.code
	binary.BigEndian.PutUint16(m[2:], 0)
	binary.BigEndian.PutUint16(m[4:], 0)
	binary.BigEndian.PutUint16(m[6:], mtu)
	copy(m[8:], ip[:quote])
	binary.BigEndian.PutUint16(m[2:], ^tun.Fold(tun.Sum(m, 0)))
	return p
}
