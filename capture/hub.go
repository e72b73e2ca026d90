package capture

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tweed/capture/filter"
	"tweed/encap"
	"tweed/engine"
	"tweed/engine/tap"
)

const (
	// MaxSnap is the longest snap length, in bytes: tcpdump's.
	MaxSnap = 262144
	// MaxSessions bounds the captures at one time.
	MaxSessions = 64

	// Nice is the niceness of the threads that move captured packets.
	Nice = 19

	// ringBytes is the size of a worker's ring.
	ringBytes = 8 << 20
	// bufferBytes is the size of a session's buffer, buffersBytes that of all
	// together; the smaller share counts.
	bufferBytes  = 16 << 20
	buffersBytes = 128 << 20
	// filterSnap is how many bytes of a packet filters see at the least.
	filterSnap = 256
	// idle is how long the hub sleeps when the rings are empty.
	idle = 5 * time.Millisecond
	// burst is how many records the hub handles before it looks at its orders.
	// On a busy machine its thread gets little time, and who wants to start or
	// end a capture waits for a burst.
	burst = 256
)

// Tapped is what a Hub captures from: an engine.
type Tapped interface {
	TapWorkers() int
	SetTap(*tap.Set)
}

// Config says what a session wants.
type Config struct {
	Points tap.Points
	// Snap is how many bytes of a packet to keep, 0 for MaxSnap.
	Snap int
	// Supers shows super-packets in one piece, at the inner points and at
	// tap.Drop, instead of segment by segment.
	Supers bool
	// Filters keep only the packets that all of them match.
	Filters []*filter.Program
	// Keep makes the session a flight recorder: it keeps the newest packets and
	// the newest dropped ones, this many of each, for Dump; its stream is empty.
	Keep int
	// Until makes the session keep packets in the same way until one matches,
	// whatever Filters say. Then, or at Close, what it kept becomes its stream,
	// and it takes nothing more. Keep must be set.
	Until *filter.Program
	// Before is a flight recorder whose packets come before the session's own;
	// for a session with Until.
	Before *Session
}

// Hub runs the captures of one engine. The zero value has no engine yet. It is
// safe for concurrent use.
type Hub struct {
	mu       sync.Mutex
	source   Tapped
	sessions map[*Session]struct{}
	set      *tap.Set
	counted  [2]Counts // of set's losses, what the sessions have been told; [1] those with Supers
	running  bool
	heads    []tap.Record // of each ring of set, when full says so
	full     []bool
}

// SetSource makes t the engine to capture from; nil while there is none. When
// it returns, the hub has let go of the one before.
func (h *Hub) SetSource(t Tapped) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.uninstall()
	h.source = t
	// Without memory for the rings the sessions get nothing and say so.
	_ = h.install()
}

// Sessions returns the number of running sessions.
func (h *Hub) Sessions() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.sessions)
}

// Start begins a session. Close ends it.
func (h *Hub) Start(c Config) (*Session, error) {
	if c.Points == 0 {
		return nil, errors.New("capture: no tap point chosen")
	}
	if c.Snap <= 0 || c.Snap > MaxSnap {
		c.Snap = MaxSnap
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.sessions) >= MaxSessions {
		return nil, fmt.Errorf("capture: %d captures are running, the limit: end one of them first", MaxSessions)
	}
	s := newSession(h, c)
	s.limit = bufferBytes
	h.uninstall()
	if h.sessions == nil {
		h.sessions = make(map[*Session]struct{})
	}
	if c.Before != nil {
		// Everything up to here is in the recorder, and nothing after it yet.
		s.seed(c.Before)
	}
	h.sessions[s] = struct{}{}
	if err := h.install(); err != nil {
		delete(h.sessions, s)
		return nil, errors.Join(err, h.install())
	}
	if !h.running {
		h.running = true
		go h.run()
	}
	return s, nil
}

// stop takes a session out, after everything captured so far reached it.
func (h *Hub) stop(s *Session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.sessions[s]; !ok {
		return
	}
	h.uninstall()
	delete(h.sessions, s)
	_ = h.install()
}

// install gives the engine rings that hold what any session wants.
func (h *Hub) install() error {
	if h.source == nil || len(h.sessions) == 0 {
		return nil
	}
	var points tap.Points
	snap := 0
	whole, split := false, false
	for s := range h.sessions {
		whole, split = whole || s.cfg.Supers, split || !s.cfg.Supers
		points |= s.cfg.Points
		// A record holds the framing's prefix before what is inside.
		snap = max(snap, s.cfg.Snap+encap.MaxPrefixLen)
		if len(s.cfg.Filters) > 0 {
			snap = max(snap, filterSnap)
		}
		s.limit = min(bufferBytes, buffersBytes/len(h.sessions))
	}
	set, err := tap.NewSet(h.source.TapWorkers(), points, snap, ringBytes)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	if whole {
		set.Supers(split)
	}
	h.set, h.counted = set, [2]Counts{}
	h.heads, h.full = make([]tap.Record, len(set.Rings())), make([]bool, len(set.Rings()))
	h.source.SetTap(set)
	return nil
}

// uninstall takes the rings away from the engine and hands what they still
// hold to the sessions.
func (h *Hub) uninstall() {
	if h.set == nil {
		return
	}
	h.source.SetTap(nil)
	for h.drain(burst) == burst {
	}
	h.tellLost()
	h.set.Free()
	h.set = nil
}

// run moves records to the sessions while there are any.
func (h *Hub) run() {
	// The thread is not unlocked, so it ends with the goroutine and takes its
	// priority along. Capturing must not take time from forwarding.
	runtime.LockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, Nice)
	for {
		h.mu.Lock()
		if len(h.sessions) == 0 {
			h.running = false
			h.mu.Unlock()
			return
		}
		n := h.drain(burst)
		h.tellLost()
		h.mu.Unlock()
		if n < burst {
			// Waking up for every packet would cost the engine more.
			time.Sleep(idle)
		}
	}
}

// drain hands up to limit records to the sessions, oldest first, and returns
// how many there were.
func (h *Hub) drain(limit int) int {
	if h.set == nil {
		return 0
	}
	rings := h.set.Rings()
	heads, full := h.heads, h.full
	clear(full)
	for n := range limit {
		oldest := -1
		for i, r := range rings {
			if !full[i] {
				full[i] = r.Next(&heads[i])
			}
			if full[i] && (oldest < 0 || heads[i].Time < heads[oldest].Time) {
				oldest = i
			}
		}
		if oldest < 0 || h.early(heads[oldest].Time) {
			return n
		}
		for s := range h.sessions {
			s.record(&heads[oldest])
		}
		rings[oldest].Release()
		full[oldest] = false
	}
	return limit
}

// early reports whether a ring that is empty may still get a record from before
// the moment.
func (h *Hub) early(ns int64) bool {
	for i, r := range h.set.Rings() {
		if !h.full[i] && r.Horizon() < ns {
			return true
		}
	}
	return false
}

// tellLost tells the sessions what the rings have lost since the last time.
func (h *Hub) tellLost() {
	if h.set == nil {
		return
	}
	lost := [2]Counts{h.set.Lost(false), h.set.Lost(true)}
	if lost == h.counted {
		return
	}
	for s := range h.sessions {
		kind := 0
		if s.cfg.Supers {
			kind = 1
		}
		s.lost(&lost[kind], &h.counted[kind])
	}
	h.counted = lost
}

// ReasonNames and PointNames are what filter.Options needs: the names whose
// index a packet carries.
func ReasonNames() []string {
	names := make([]string, engine.NumReasons)
	for r := range engine.NumReasons {
		names[r] = r.String()
	}
	return names
}

// PointNames returns the names of the tap points by number.
func PointNames() []string {
	names := make([]string, tap.NumPoints)
	for p := range tap.NumPoints {
		names[p] = p.String()
	}
	return names
}
