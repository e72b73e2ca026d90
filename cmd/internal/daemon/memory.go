package daemon

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// The collector starts when the heap has grown by a percentage of what it found
// alive, constants of the program and stacks included. Go's 100 lets a small node
// grow to three times its size. A small heap is collected in a few ms, however; the
// leases of a large network are not.
const (
	smallHeap    = 16 << 20 // bytes
	smallPercent = 50
	largePercent = 100
)

// tuneCollector adapts GOGC to the heap after each collection, unless the user has
// set it.
func tuneCollector() {
	if os.Getenv("GOGC") != "" {
		return
	}
	t := &collectorTuner{set: debug.SetGCPercent, sample: []metrics.Sample{{Name: "/gc/heap/live:bytes"}}}
	t.adapt()
	t.onCollection()
}

// collectorTuner belongs to the goroutine that runs finalizers.
type collectorTuner struct {
	set     func(percent int) int
	percent int // as set
	sample  []metrics.Sample
}

// onCollection calls adapt after the next collection, and so on.
func (t *collectorTuner) onCollection() {
	type garbage struct{ _ *byte }
	runtime.SetFinalizer(&garbage{}, func(*garbage) {
		t.adapt()
		t.onCollection()
	})
}

func (t *collectorTuner) adapt() {
	metrics.Read(t.sample)
	if t.sample[0].Value.Kind() != metrics.KindUint64 {
		return
	}
	if p := percentFor(t.sample[0].Value.Uint64()); p != t.percent {
		t.set(p)
		t.percent = p
	}
}

// percentFor is the GOGC for so many bytes alive.
func percentFor(live uint64) int {
	if live < smallHeap {
		return smallPercent
	}
	return largePercent
}
