package engine

import (
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed/engine/impair"
)

// impaired is a harness whose host is impaired.
func impaired(t *testing.T, s impair.Spec) *harness {
	t.Helper()
	h := newHarness(t)
	if err := impairWorker(h.tx, s, 1); err != nil {
		t.Fatal(err)
	}
	return h
}

// numbered sends n packets that are told apart by their length.
func (h *harness) numbered(n int) {
	h.t.Helper()
	for i := range n {
		h.send(plain(to(vxlanPeer, udp(i))))
	}
}

// numbers are the numbers of what has arrived, in order.
func (h *harness) numbers() []int {
	h.t.Helper()
	var numbers []int
	for _, p := range h.inner(vxlanPeer) {
		numbers = append(numbers, len(p)-28)
	}
	return numbers
}

// awaitHeld serves the worker whenever its descriptor says so, until it holds
// nothing back.
func (h *harness) awaitHeld() {
	h.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); len(h.tx.impaired.held) > 0; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(h.tx.source.FD()), Events: unix.POLLIN}}, 1000)
		if err == nil && n == 1 {
			h.serve()
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%d packets are still held back", len(h.tx.impaired.held))
		}
	}
}

func TestLostPacketsAreCountedAndTheSameForOneSeed(t *testing.T) {
	lose := func(seed uint64) []int {
		h := impaired(t, impair.Spec{Loss: 0.2, Seed: seed})
		h.numbered(400)
		got := h.numbers()
		s := h.change()
		if s.Tx.Drops != drops(TxImpaired, uint64(400-len(got))) || s.Tx.Packets != 400 || len(got) == 400 || len(got) < 200 {
			t.Errorf("%d of 400 arrived, ledger %+v", len(got), s.Tx)
		}
		if !slices.IsSorted(got) {
			t.Error("what was not lost arrived in another order")
		}
		return got
	}
	a, b, c := lose(1), lose(1), lose(2)
	if !slices.Equal(a, b) || slices.Equal(a, c) {
		t.Error("the seed does not say which packets are lost")
	}
}

func TestDelayedPacketsArriveLaterInOrder(t *testing.T) {
	const delay = 150 * time.Millisecond
	h := impaired(t, impair.Spec{Delay: delay})
	began := time.Now()
	h.numbered(100)
	if got := h.numbers(); len(got) > 0 && time.Since(began) < delay {
		t.Errorf("%d packets arrived at once", len(got))
	}
	h.awaitHeld()
	if since := time.Since(began); since < delay {
		t.Errorf("they were let go after %s", since)
	}
	if s := h.change(); s.Tx.Packets != 100 || s.Tx.Delivered != 100 {
		t.Errorf("ledger %+v", s.Tx)
	}
	if got := h.numbers(); !slices.IsSorted(got) {
		t.Errorf("order: %v", got)
	}
}

func TestReorderedPacketsAreOvertakenAndNotLost(t *testing.T) {
	h := impaired(t, impair.Spec{Reorder: 0.1, Seed: 3})
	h.numbered(200)
	h.awaitHeld()
	got := h.numbers()
	if s := h.change(); s.Tx.Delivered != 200 || len(got) != 200 {
		t.Errorf("%d arrived, ledger %+v", len(got), s.Tx)
	}
	if slices.IsSorted(got) {
		t.Error("no packet was overtaken")
	}
	slices.Sort(got)
	if len(slices.Compact(got)) != 200 {
		t.Error("packets arrived twice")
	}
}

func TestHeldPacketsOfAPortThatLeavesAreDropped(t *testing.T) {
	h := newHarness(t)
	a := h.attach("a", inside(-1, 20))
	h.tx.source = h.e.ports
	if err := impairWorker(h.tx, impair.Spec{Delay: 20 * time.Millisecond}, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(a.fd, plain(a.packet(to(vxlanPeer, udp(100))))); err != nil {
		t.Fatal(err)
	}
	h.serve()
	if n := len(h.tx.impaired.held); n != 1 {
		t.Fatalf("%d packets are held", n)
	}
	if err := h.e.Detach(a.id); err != nil {
		t.Fatal(err)
	}
	h.awaitHeld()
	if s := h.change(); s.Tx.Drops != drops(TxImpaired, 1) || s.Tx.Packets != 1 {
		t.Errorf("ledger %+v", s.Tx)
	}
}

func TestMoreThanASlowLinkHoldsIsLost(t *testing.T) {
	h := impaired(t, impair.Spec{Delay: impair.MaxDelay})
	h.tx.impaired.held = make(heldPackets, maxHeld)
	for i := range h.tx.impaired.held {
		h.tx.impaired.held[i].at = time.Now().Add(time.Hour)
	}
	h.numbered(3)
	if s := h.change(); s.Tx.Drops != drops(TxImpaired, 3) {
		t.Errorf("ledger %+v", s.Tx)
	}
}

// A program's port that is awake rings for nothing, so a worker whose packets were
// all lost must look again before it waits.
func TestAWorkerThatLosesAllItReadsLooksAgain(t *testing.T) {
	h := newHarness(t)
	h.shared = true
	a := h.attach("a", inside(-1, 20))
	h.tx.source = h.e.ports
	if err := impairWorker(h.tx, impair.Spec{Loss: 1}, 1); err != nil {
		t.Fatal(err)
	}
	if err := h.e.Start(); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(20) {
		a.write(t, plain(a.packet(to(vxlanPeer, udp(100)))))
		eventually(t, "the packet is read", func() bool { return h.e.Stats().Tx.Drops[TxImpaired] == i+1 })
	}
}
