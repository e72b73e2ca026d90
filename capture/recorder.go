package capture

import (
	"encoding/binary"
	"slices"

	"tweed/engine/tap"
)

// recorder keeps the newest packets of a session instead of streaming them:
// those dropped apart from the others, so that a busy engine does not push out
// what went wrong.
type recorder struct{ passed, dropped wheel }

// wheel keeps the newest frames. What is empty in it are places not yet used.
type wheel struct {
	frames [][]byte
	next   int
	bytes  int // of memory
}

// put adds a packet, and drops the oldest for it while there are as many as
// there may be, or more bytes than limit, unless that is 0.
func (w *wheel) put(p *Packet, limit int, dropped func(tap.Point, uint64)) {
	need := frameLen(p)
	for i := w.next; limit > 0 && w.bytes+need > limit && i < w.next+len(w.frames); i++ {
		if f := &w.frames[i%len(w.frames)]; len(*f) > 0 {
			dropped(pointOf(*f), countOf(*f))
			w.bytes -= cap(*f)
			*f = nil
		}
	}
	f := w.frames[w.next]
	if len(f) > 0 {
		dropped(pointOf(f), countOf(f))
	}
	w.bytes -= cap(f)
	f = appendPacket(f[:0], p)
	w.bytes += cap(f)
	w.frames[w.next] = f
	w.next = (w.next + 1) % len(w.frames)
}

// pointOf is the tap point in a packet's frame.
func pointOf(frame []byte) tap.Point { return tap.Point(frame[headLen+24]) }

// countOf is the number of packets a frame stands for.
func countOf(frame []byte) uint64 {
	return uint64(max(binary.LittleEndian.Uint32(frame[headLen+32:]), 1))
}

func newRecorder(keep int) *recorder {
	return &recorder{wheel{frames: make([][]byte, keep)}, wheel{frames: make([][]byte, keep)}}
}

// put adds a packet and tells the points of those that had to go. limit bounds
// the memory of both halves, in bytes, unless it is 0.
func (r *recorder) put(p *Packet, limit int, gone func(tap.Point, uint64)) {
	w := &r.passed
	if p.Point == tap.Drop {
		w = &r.dropped
	}
	w.put(p, limit/2, gone)
}

// frames returns everything kept in the order of time.
func (r *recorder) frames() []byte {
	all := slices.Concat(r.passed.frames, r.dropped.frames)
	all = slices.DeleteFunc(all, func(f []byte) bool { return len(f) == 0 })
	when := func(f []byte) int64 { return int64(binary.LittleEndian.Uint64(f[headLen:])) }
	slices.SortStableFunc(all, func(a, b []byte) int {
		if c := when(a) - when(b); c != 0 {
			return int(max(min(c, 1), -1))
		}
		return int(pointOf(a)) - int(pointOf(b))
	})
	return slices.Concat(all...)
}

// Dump returns what a session with Keep holds, as frames of a stream, and its
// counts: what has been pushed out is in Overrun.
func (s *Session) Dump() ([]byte, Stats) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keep == nil {
		return nil, s.stats
	}
	return s.keep.frames(), s.stats
}
