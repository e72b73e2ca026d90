package accel

import (
	"errors"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

// prefixMap is the kernel's longest-prefix map as a slow model, which looks at
// every answer after every write.
type prefixMap struct {
	entries map[accelKey]accelPeer
	watch   func()
	fail    error
}

func (m *prefixMap) Put(k, v any) error {
	if m.fail != nil {
		return m.fail
	}
	m.entries[k.(accelKey)] = v.(accelPeer)
	m.watch()
	return nil
}

func (m *prefixMap) Delete(k any) error {
	delete(m.entries, k.(accelKey))
	m.watch()
	return nil
}

// lookup answers as the programs do: nil for a miss and for a closed entry.
func lookup(find func(netip.Prefix) (accelPeer, bool), a netip.Addr) *accelPeer {
	for bits := 32; bits > 0; bits-- {
		p, _ := a.Prefix(bits)
		if e, ok := find(p); ok {
			if e == closed {
				return nil
			}
			return &e
		}
	}
	return nil
}

func (m *prefixMap) find(p netip.Prefix) (accelPeer, bool) {
	e, ok := m.entries[keyOf(p)]
	return e, ok
}

func same(a, b *accelPeer) bool { return a == nil && b == nil || a != nil && b != nil && *a == *b }

// drawEntries makes a table of subnets that lie inside each other.
func drawEntries(t *rapid.T, name string) map[netip.Prefix]accelPeer {
	m := map[netip.Prefix]accelPeer{}
	for range rapid.IntRange(0, 6).Draw(t, name) {
		bits := rapid.SampledFrom([]int{26, 28, 29, 30}).Draw(t, "bits")
		a := netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(0, 63).Draw(t, "host"))})
		p, _ := a.Prefix(bits)
		e := accelPeer{Addr: uint32(rapid.IntRange(1, 3).Draw(t, "peer"))}
		if rapid.IntRange(0, 4).Draw(t, "closed") == 0 {
			e = closed
		}
		m[p] = e
	}
	return m
}

// TestNoAnswerBetweenTwoTables: at every moment of a change an address is
// answered as by the old table, as by the new one, or not at all; after retract
// not by the old one where the new one differs; after enter as by the new one.
func TestNoAnswerBetweenTwoTables(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pm := &prefixMap{entries: map[accelKey]accelPeer{}, watch: func() {}}
		m := newMirror(pm)
		var before map[netip.Prefix]accelPeer
		for range rapid.IntRange(1, 4).Draw(t, "tables") {
			want := drawEntries(t, "entries")
			answers := func(table map[netip.Prefix]accelPeer, a netip.Addr) *accelPeer {
				return lookup(func(p netip.Prefix) (accelPeer, bool) { e, ok := table[p]; return e, ok }, a)
			}
			each := func(judge func(a netip.Addr, got *accelPeer)) {
				for host := range 64 {
					a := netip.AddrFrom4([4]byte{10, 0, 0, byte(host)})
					judge(a, lookup(pm.find, a))
				}
			}
			pm.watch = func() {
				each(func(a netip.Addr, got *accelPeer) {
					if got != nil && !same(got, answers(before, a)) && !same(got, answers(want, a)) {
						t.Fatalf("%v is answered by %+v, which is in neither table", a, got)
					}
				})
			}
			if err := m.retract(want); err != nil {
				t.Fatal(err)
			}
			each(func(a netip.Addr, got *accelPeer) {
				if got != nil && !same(got, answers(want, a)) {
					t.Fatalf("%v is still answered by %+v after retract", a, got)
				}
			})
			if err := m.enter(want); err != nil {
				t.Fatal(err)
			}
			each(func(a netip.Addr, got *accelPeer) {
				if !same(got, answers(want, a)) {
					t.Fatalf("%v is answered by %+v, want %+v", a, got, answers(want, a))
				}
			})
			before = want
		}
	})
}

// TestUnchangedEntriesAreLeftAlone: a new table that changes one peer writes
// that one only, so the others are hits throughout.
func TestUnchangedEntriesAreLeftAlone(t *testing.T) {
	writes := 0
	pm := &prefixMap{entries: map[accelKey]accelPeer{}, watch: func() { writes++ }}
	m := newMirror(pm)
	table := map[netip.Prefix]accelPeer{}
	for i := range 100 {
		table[netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(i), 0}), 24)] = accelPeer{Addr: uint32(i) + 1}
	}
	if err := errors.Join(m.retract(table), m.enter(table)); err != nil || writes != 100 {
		t.Fatalf("%d writes, %v, want 100", writes, err)
	}
	table[netip.MustParsePrefix("10.1.7.0/24")] = accelPeer{Addr: 999}
	writes = 0
	if err := errors.Join(m.retract(table), m.enter(table)); err != nil || writes != 2 {
		t.Errorf("%d writes, %v, want one that closes the entry and one that opens it", writes, err)
	}
}

func TestMapThatRefusesIsReported(t *testing.T) {
	full := errors.New("full")
	m := newMirror(&prefixMap{entries: map[accelKey]accelPeer{}, watch: func() {}, fail: full})
	want := map[netip.Prefix]accelPeer{netip.MustParsePrefix("10.1.7.0/24"): {Addr: 1}}
	if err := m.enter(want); !errors.Is(err, full) {
		t.Errorf("enter: %v, want %v", err, full)
	}
}
