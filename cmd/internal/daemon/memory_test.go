package daemon

import (
	"runtime"
	"runtime/metrics"
	"sync/atomic"
	"testing"
	"time"
)

func TestCollectorFollowsTheSizeOfTheHeap(t *testing.T) {
	var percent atomic.Int64
	tuner := &collectorTuner{
		set:    func(p int) int { return int(percent.Swap(int64(p))) },
		sample: []metrics.Sample{{Name: "/gc/heap/live:bytes"}},
	}
	tuner.onCollection()
	await := func(want int64) {
		t.Helper()
		deadline := time.Now().Add(30 * time.Second)
		for percent.Load() != want {
			if time.Now().After(deadline) {
				t.Fatalf("GOGC %d, want %d", percent.Load(), want)
			}
			runtime.GC()
			time.Sleep(time.Millisecond)
		}
	}
	await(smallPercent)
	leases := make([]byte, smallHeap)
	await(largePercent)
	runtime.KeepAlive(leases)
	await(smallPercent)
}
