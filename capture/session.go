package capture

import (
	"context"
	"sync"

	"tweed/capture/filter"
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
	keep   *recorder // nil but in a flight recorder
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
	s.view.show(r, s.cfg.Points, func(p *Packet) {
		s.stats.Seen[p.Point]++
		if len(s.cfg.Filters) > 0 {
			s.describe(p, int(r.PrefixLen))
			s.meta.VNI, s.meta.Tagged = number, tagged
			for _, f := range s.cfg.Filters {
				if !f.Match(&s.meta, p.Data) {
					return
				}
			}
		}
		s.stats.Matched[p.Point]++
		p.Data = p.Data[:min(len(p.Data), s.cfg.Snap)]
		if s.keep != nil {
			if gone, full := s.keep.put(p); full {
				s.stats.Overrun[gone]++
			}
			return
		}
		if len(s.filled)+frameLen(p) > s.limit {
			s.stats.Overrun[p.Point]++
			s.gap[p.Point]++
			return
		}
		p.Lost = s.gap[p.Point]
		s.gap[p.Point] = 0
		s.filled = appendPacket(s.filled, p)
	})
	s.signal()
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
	s.closed = true
	s.mu.Unlock()
	s.signal()
}
