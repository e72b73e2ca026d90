package engine

import (
	"sync/atomic"
	"time"

	"tweed/engine/tap"
)

// tapper is a worker's end of the tap: one atomic load a batch while nobody
// captures.
type tapper struct {
	worker int
	id     uint64
	ring   *tap.Ring // nil while nobody captures
	now    int64
}

// nextID names the next packet. The worker's number in the top byte makes it
// unique in the engine.
func (t *tapper) nextID() uint64 {
	t.id++
	return uint64(t.worker)<<56 | t.id
}

// begin takes up the set in force. The worker must be busy.
func (t *tapper) begin(s *tap.Set) {
	if s == nil || t.worker >= len(s.Rings()) {
		return
	}
	t.ring = s.Ring(t.worker)
	t.now = time.Now().UnixNano()
}

func (t *tapper) end() {
	if t.ring != nil {
		t.ring.Commit()
		t.ring = nil
	}
}

// segments are the flags of a packet that may become part of a super-packet.
func (t *tapper) segments() tap.Flags {
	if t.ring.Whole() {
		return tap.Segment
	}
	return 0
}

func (t *tapper) put(h *tap.Header, head, tail []byte) {
	h.Time = t.now
	if h.ID == 0 {
		h.ID = t.nextID()
	}
	// Each segment of a super-packet takes a name and a moment of its own.
	t.now += max(int64(h.Segments), 1)
	t.id += uint64(max(h.Segments, 1) - 1)
	t.ring.Put(h, head, tail)
}

// taps returns the number of workers made so far: the next one's ring.
func (e *Engine) taps() int { return len(e.tx) + len(e.rx) }

// TapWorkers returns how many rings a tap.Set for this engine needs.
func (e *Engine) TapWorkers() int {
	e.apply.Lock()
	defer e.apply.Unlock()
	n := e.taps()
	if e.ports == nil {
		n += 2 // the workers that the first attached port will bring
	}
	return n + e.replay.tapWorkers(&e.cfg) + 1 // the last is the bypass's
}

// SetTap makes the workers put records of the packets they handle into s; nil
// stops that. It returns when no worker uses the set before it any more, which
// is within a batch.
func (e *Engine) SetTap(s *tap.Set) {
	e.apply.Lock()
	defer e.apply.Unlock()
	e.watchBypass(s)
	if e.tap.Swap(s) != nil {
		e.settle()
	}
	e.observe()
}

// observe is called, with apply held, after everything that may change whether
// somebody looks at the packets: a capture, the flight recorder or a replay.
func (e *Engine) observe() {
	e.observed.Store(e.tap.Load() != nil || e.replay.current != nil)
	e.setDuty(e.view.Load())
}

// busy tells whether a worker is in a batch: odd while it is.
type busy struct{ n atomic.Uint64 }

func (b *busy) enter() { b.n.Add(1) }
func (b *busy) leave() { b.n.Add(1) }

// batches returns how many batches were begun.
func (b *busy) batches() uint64 { return (b.n.Load() + 1) / 2 }

// settle returns when the batch that may be running now has ended. What was
// replaced before the call is not used after it.
func (b *busy) settle() {
	n := b.n.Load()
	for n&1 == 1 && b.n.Load() == n {
		time.Sleep(20 * time.Microsecond)
	}
}
