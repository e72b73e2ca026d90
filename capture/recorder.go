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

// wheel keeps the newest frames.
type wheel struct {
	frames [][]byte
	next   int
}

// put adds a packet. It returns the point of the one that had to go.
func (w *wheel) put(p *Packet) (gone tap.Point, full bool) {
	f := w.frames[w.next]
	if full = len(f) > 0; full {
		gone = tap.Point(f[headLen+24])
	}
	w.frames[w.next] = appendPacket(f[:0], p)
	w.next = (w.next + 1) % len(w.frames)
	return gone, full
}

func newRecorder(keep int) *recorder {
	return &recorder{wheel{frames: make([][]byte, keep)}, wheel{frames: make([][]byte, keep)}}
}

func (r *recorder) put(p *Packet) (gone tap.Point, full bool) {
	if p.Point == tap.Drop {
		return r.dropped.put(p)
	}
	return r.passed.put(p)
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
		return int(a[headLen+24]) - int(b[headLen+24])
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
