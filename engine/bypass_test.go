package engine

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tweed/engine/table"
	"tweed/engine/tap"
)

// fakeBypass writes down what it is told, with the peers in force at that time.
type fakeBypass struct {
	e     *Engine
	calls []string
	duty  Duty
	blind error
	sent  Direction
}

func (b *fakeBypass) note(format string, args ...any) {
	b.calls = append(b.calls, fmt.Sprintf(format, args...))
}

func (b *fakeBypass) inForce() int { return len(b.e.view.Load().snapshot.Peers) }

func (b *fakeBypass) Retract(_ table.Local, peers []table.Peer) {
	b.note("retract to %d, %d in force", len(peers), b.inForce())
}

func (b *fakeBypass) Follow(_ table.Local, peers []table.Peer) {
	b.note("follow %d, %d in force", len(peers), b.inForce())
}

func (b *fakeBypass) SetDuty(d Duty) { b.duty = d }

func (b *fakeBypass) Observe(o Observer, snap int) error {
	b.note("observe %t %d, tap %t", o != nil, snap, b.e.tap.Load() != nil)
	if o == nil {
		return nil
	}
	return b.blind
}

func (b *fakeBypass) Traffic() (tx, rx Direction) { return b.sent, Direction{} }

func (b *fakeBypass) take() string {
	s := strings.Join(b.calls, "; ")
	b.calls = nil
	return s
}

// TestBypassIsToldAroundEverySnapshot: before it is in force, so that nothing
// is carried by an old entry afterwards, and after it.
func TestBypassIsToldAroundEverySnapshot(t *testing.T) {
	h := newHarness(t)
	b := &fakeBypass{e: h.e}
	h.e.SetBypass(b)
	n := len(h.snap.Peers)
	if got, want := b.take(), fmt.Sprintf("observe false 0, tap false; follow %d, %d in force", n, n); got != want {
		t.Errorf("at the beginning: %s, want %s", got, want)
	}
	if d := (Duty{Send: true, Receive: true}); b.duty != d {
		t.Errorf("duty %+v, want %+v", b.duty, d)
	}
	h.snap.Peers = h.snap.Peers[:1]
	h.apply()
	if got, want := b.take(), fmt.Sprintf("retract to 1, %d in force; follow 1, 1 in force", n); got != want {
		t.Errorf("at a new snapshot: %s, want %s", got, want)
	}
	bad := h.snap
	bad.Peers = append(slices.Clone(bad.Peers), table.Peer{Subnet: netip.MustParsePrefix("::/0")})
	if err := h.e.Apply(bad); err == nil || b.take() != "" {
		t.Errorf("a refused snapshot (%v) reached the bypass", err)
	}
}

// TestBypassShowsWhatItCarriesToATap, before the tap is in force and until
// after it is not; one that cannot goes off duty, so that nothing escapes.
func TestBypassShowsWhatItCarriesToATap(t *testing.T) {
	h := newHarness(t)
	b := &fakeBypass{e: h.e}
	h.e.SetBypass(b)
	b.take()
	set, err := tap.NewSet(h.e.TapWorkers(), tap.AllPoints, 77, 1<<16)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Free()
	h.e.SetTap(set)
	if got := b.take(); got != "observe true 77, tap false" || !b.duty.Send {
		t.Errorf("at a tap: %s, duty %+v", got, b.duty)
	}
	h.e.SetTap(nil)
	if got := b.take(); got != "observe false 0, tap true" {
		t.Errorf("at its end: %s", got)
	}
	b.blind = errors.New("no memory")
	h.e.SetTap(set)
	if b.duty.Send || b.duty.Receive || !strings.Contains(b.duty.Why, "no memory") {
		t.Errorf("one that cannot be observed: duty %+v", b.duty)
	}
	h.e.SetTap(nil)
	if !b.duty.Send || !b.duty.Receive {
		t.Errorf("after the tap: duty %+v", b.duty)
	}
}

// TestBypassedPacketsAreInTheLedger, also after the bypass has gone.
func TestBypassedPacketsAreInTheLedger(t *testing.T) {
	h := newHarness(t)
	b := &fakeBypass{e: h.e}
	b.sent = Direction{Packets: 10, Bytes: 1000, Delivered: 9, DeliveredBytes: 900}
	b.sent.Drops[TxEncapError] = 1
	h.e.SetBypass(b)
	for _, when := range []string{"with it", "after it"} {
		s := h.e.Stats()
		if s.BypassTx != b.sent || s.Tx.Packets != 10 || s.Tx.Packets != s.Tx.Delivered+s.Tx.Dropped() {
			t.Errorf("%s: %+v", when, s.Tx)
		}
		h.e.SetBypass(nil)
	}
}
