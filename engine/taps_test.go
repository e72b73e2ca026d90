package engine

import (
	"testing"

	"tweed/engine/tap"
)

// TestTapNamesEverySegment: a super-packet takes as many ids as it has segments.
func TestTapNamesEverySegment(t *testing.T) {
	set, err := tap.NewSet(4, tap.AllPoints, 64, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Free()
	w := tapper{worker: 3}
	w.begin(set)
	ids := map[uint64]bool{}
	for _, segments := range []uint16{1, 5, 0, 2, 1} {
		h := tap.Header{Points: tap.Of(tap.TunIn, tap.Drop), Segments: segments}
		w.put(&h, []byte{1}, nil)
		for i := range uint64(max(segments, 1)) {
			if id := h.ID + i; ids[id] || id>>56 != 3 {
				t.Errorf("id %#x is taken, or another worker's", id)
			} else {
				ids[id] = true
			}
		}
	}
	w.end()
	var rec tap.Record
	for last := int64(0); set.Ring(3).Next(&rec); set.Ring(3).Release() {
		if rec.Time <= last {
			t.Errorf("time %d after %d", rec.Time, last)
		}
		last = rec.Time
	}
}

// A worker made after the set has no ring in it.
func TestTapWithoutARingIsOff(t *testing.T) {
	set, err := tap.NewSet(1, tap.AllPoints, 64, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Free()
	w := tapper{worker: 1}
	if w.begin(set); w.ring != nil {
		t.Error("another worker's ring")
	}
	w.end()
}

// BenchmarkTapOff is what a batch pays while nobody captures.
func BenchmarkTapOff(b *testing.B) {
	var e Engine
	var w tapper
	b.ReportAllocs()
	for b.Loop() {
		w.begin(e.tap.Load())
		w.end()
	}
}

// BenchmarkTapOn is what each packet pays while all points are captured with
// 128 bytes of it, the reader included.
func BenchmarkTapOn(b *testing.B) {
	set, err := tap.NewSet(1, tap.AllPoints, 128, 8<<20)
	if err != nil {
		b.Fatal(err)
	}
	defer set.Free()
	var e Engine
	e.tap.Store(set)
	var w tapper
	head, tail := make([]byte, 62), make([]byte, 1364)
	var rec tap.Record
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		if n%64 == 0 {
			w.end()
			for set.Ring(0).Next(&rec) {
				set.Ring(0).Release()
			}
			w.begin(e.tap.Load())
		}
		h := tap.Header{ID: w.nextID(), Points: tap.Of(tap.TunIn, tap.WireOut), PrefixLen: 22, Segments: 1}
		w.put(&h, head, tail)
	}
	w.end()
}
