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
	// using is the set the current batch works with, so that SetTap knows when
	// the last worker has let go of it.
	using atomic.Pointer[tap.Set]
}

// nextID names the next packet. The worker's number in the top byte makes it
// unique in the engine.
func (t *tapper) nextID() uint64 {
	t.id++
	return uint64(t.worker)<<56 | t.id
}

func (t *tapper) begin(current *atomic.Pointer[tap.Set]) {
	s := current.Load()
	if s == nil {
		return
	}
	// Announce the set before believing that it is still in force.
	t.using.Store(s)
	if current.Load() != s {
		t.using.Store(nil)
		return
	}
	t.ring = s.Ring(t.worker)
	t.now = time.Now().UnixNano()
}

func (t *tapper) end() {
	if t.ring == nil {
		return
	}
	t.ring.Commit()
	t.ring = nil
	t.using.Store(nil)
}

func (t *tapper) put(h *tap.Header, head, tail []byte) {
	h.Time = t.now
	t.now++
	if h.ID == 0 {
		h.ID = t.nextID()
	}
	t.ring.Put(h, head, tail)
}

// taps returns the number of workers made so far: the next one's ring.
func (e *Engine) taps() int { return len(e.tx) + len(e.rx) }

// TapWorkers returns how many rings a tap.Set for this engine needs.
func (e *Engine) TapWorkers() int { return e.taps() }

// SetTap makes the workers put records of the packets they handle into s; nil
// stops that. It returns when no worker uses the set before it any more, which
// is within a batch.
func (e *Engine) SetTap(s *tap.Set) {
	e.apply.Lock()
	defer e.apply.Unlock()
	old := e.tap.Swap(s)
	if old == nil {
		return
	}
	for _, w := range e.tx {
		w.tap.release(old)
	}
	for _, w := range e.rx {
		w.tap.release(old)
	}
}

func (t *tapper) release(old *tap.Set) {
	for t.using.Load() == old {
		time.Sleep(20 * time.Microsecond)
	}
}
