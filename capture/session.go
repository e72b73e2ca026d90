package capture

import (
	"context"
	"encoding/binary"
	"sync"

	"tweed/capture/filter"
	"tweed/encap"
	"tweed/engine/tap"
)

// Session is one capture. Read takes its stream; Close ends it.
type Session struct {
	hub *Hub
	cfg Config

	view viewer // used by the hub only
	meta filter.Meta
	// limit is the size of the buffer in bytes; the hub changes it.
	limit int

	mu     sync.Mutex
	stats  Stats
	gap    Counts // lost since the last packet of each point
	filled []byte // frames not yet read
	spare  []byte
	wake   chan struct{}
	closed bool
	keep   *recorder // nil but in a flight recorder, and before Until
}

func newSession(h *Hub, c Config) *Session {
	s := &Session{hub: h, cfg: c, wake: make(chan struct{}, 1)}
	if c.Keep > 0 {
		s.keep = newRecorder(c.Keep)
	}
	return s
}

// record adds what the session wants of r to its buffer.
func (s *Session) record(r *tap.Record) {
	if r.Points&s.cfg.Points == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	number, tagged := vni(r)
	s.view.show(r, s.cfg.Points, s.cfg.Supers, func(p *Packet) {
		hit, ok := s.wants(p, int(r.PrefixLen), number, tagged)
		if !ok {
			return
		}
		s.put(p)
		if hit {
			s.stats.Until = true
			s.handOver()
		}
	})
	s.signal()
}

// wants reports whether the session takes a packet, and whether it is the one
// that the session waits for.
func (s *Session) wants(p *Packet, prefix int, vni uint32, tagged bool) (hit, ok bool) {
	if s.closed {
		return false, false
	}
	s.stats.Seen[p.Point] += p.count()
	if len(s.cfg.Filters) > 0 || s.cfg.Until != nil {
		s.describe(p, prefix)
		s.meta.VNI, s.meta.Tagged = vni, tagged
		hit = s.cfg.Until != nil && s.cfg.Until.Match(&s.meta, p.Data)
		for _, f := range s.cfg.Filters {
			if !hit && !f.Match(&s.meta, p.Data) {
				return false, false
			}
		}
	}
	s.stats.Matched[p.Point] += p.count()
	return hit, true
}

// put adds a packet to the stream, or to what is kept.
func (s *Session) put(p *Packet) {
	p.Data = p.Data[:min(len(p.Data), s.cfg.Snap)]
	if s.keep != nil {
		limit := 0
		if s.cfg.Until != nil {
			limit = s.limit
		}
		s.keep.put(p, limit, func(gone tap.Point, n uint64) { s.stats.Overrun[gone] += n })
		return
	}
	if len(s.filled)+frameLen(p) > s.limit {
		s.stats.Overrun[p.Point] += p.count()
		s.gap[p.Point] += p.count()
		return
	}
	p.Lost = s.gap[p.Point]
	s.gap[p.Point] = 0
	s.filled = appendPacket(s.filled, p)
}

// handOver ends a session with Until: what it kept is its stream.
func (s *Session) handOver() {
	s.filled = append(s.filled, s.keep.frames()...)
	s.keep, s.closed = nil, true
}

// seed gives a session with Until what a flight recorder holds.
func (s *Session) seed(from *Session) {
	frames, _ := from.Dump()
	s.mu.Lock()
	defer s.mu.Unlock()
	var p Packet
	for len(frames) > 0 {
		n := headLen + int(binary.LittleEndian.Uint32(frames))
		if err := decodePacket(frames[headLen:n], &p); err != nil {
			return // of our own making: cannot be
		}
		frames = frames[n:]
		if !s.cfg.Points.Has(p.Point) {
			continue
		}
		prefix, number, tagged := 0, uint32(0), false
		if p.VXLAN && p.Outer {
			prefix = encap.FramingVXLAN.PrefixLen()
			number, tagged = vniAt(p.Data[min(outerLen, len(p.Data)):])
		}
		if _, ok := s.wants(&p, prefix, number, tagged); ok {
			s.put(&p)
		}
	}
}

// describe fills in what the filter may ask beside the bytes.
func (s *Session) describe(p *Packet, prefix int) {
	m := &s.meta
	*m = filter.Meta{Len: p.Length, Peer: p.Peer.Addr(), Point: uint8(p.Point), HasPoint: true, Dir: filter.DirOut, Layer: filter.LayerInner}
	if p.Receive {
		m.Dir = filter.DirIn
	}
	if p.Point == tap.Drop {
		m.Reason, m.Dropped = uint8(p.Reason), true
	}
	if p.Outer {
		m.Layer, m.Outer = filter.LayerOuter, p.Data
		if at := outerLen + prefix; at < len(p.Data) {
			m.Inner = p.Data[at:]
		}
		return
	}
	m.Inner = p.Data
}

// lost adds what the rings lost between two readings.
func (s *Session) lost(now, before *Counts) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	for p := range tap.NumPoints {
		if s.cfg.Points.Has(p) {
			n := now[p] - before[p]
			s.stats.Lost[p] += n
			s.gap[p] += n
		}
	}
}

func (s *Session) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Stats returns the counts so far.
func (s *Session) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// Next waits for frames of the stream and returns all there are, borrowed until
// the next call. After Close it returns the rest, then nil. It returns early
// with the context's error.
func (s *Session) Next(ctx context.Context) ([]byte, error) {
	for {
		s.mu.Lock()
		if len(s.filled) > 0 {
			out := s.filled
			s.filled, s.spare = s.spare[:0], out
			s.mu.Unlock()
			return out, nil
		}
		closed := s.closed
		s.mu.Unlock()
		if closed {
			return nil, nil
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Close ends the session: everything captured so far is in the stream, and
// nothing is added any more.
func (s *Session) Close() {
	s.hub.stop(s)
	s.mu.Lock()
	if s.cfg.Until != nil && !s.closed {
		s.handOver()
	}
	s.closed = true
	s.mu.Unlock()
	s.signal()
}
