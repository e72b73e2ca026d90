package table

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"
)

type atomicTable = atomic.Pointer[Table]

var found int

// benchLookup looks up random addresses as the packet loop does, so that the caches
// hold what they can.
func benchLookup(b *testing.B, tab *Table, addr func(rng *rand.Rand) uint32) {
	rng := rand.New(rand.NewPCG(1, 2))
	addrs := make([]uint32, 1<<16)
	for i := range addrs {
		addrs[i] = addr(rng)
	}
	b.ReportAllocs()
	b.ResetTimer()
	// Not b.Loop, which costs as much as what is measured. No pointer is kept, which
	// would cost a write barrier, and nothing counted in memory: each addition there
	// waits for the one before it, 3 ns.
	n := 0
	for i := range b.N {
		addr := addrs[i&(1<<16-1)]
		e := tab.Direct(addr)
		if e == nil {
			e = tab.Deeper(addr)
		}
		if e != nil {
			n++
		}
	}
	found = n
}

func BenchmarkLookup65536Leases(b *testing.B) {
	benchLookup(b, build(b, network(65536)...), func(rng *rand.Rand) uint32 { return 10<<24 | rng.Uint32N(1<<24) })
}

func BenchmarkLookupOneFlow(b *testing.B) {
	benchLookup(b, build(b, network(65536)...), func(*rand.Rand) uint32 { return 10<<24 | 77<<8 | 9 })
}

// One longer prefix among them, and one of another network: the look-ups are
// spread over all leases all the same.
func BenchmarkLookupMixedLengths(b *testing.B) {
	peers := append(network(65536), peer("10.3.3.3/32", "192.0.2.1:1"))
	benchLookup(b, build(b, peers...), func(rng *rand.Rand) uint32 { return 10<<24 | rng.Uint32N(1<<24) })
}

func BenchmarkLookupTwoNetworks(b *testing.B) {
	peers := append(network(65536), peer("200.0.0.0/32", "192.0.2.1:1"))
	benchLookup(b, build(b, peers...), func(rng *rand.Rand) uint32 { return 10<<24 | rng.Uint32N(1<<24) })
}

func BenchmarkLookupTrie(b *testing.B) {
	tab := build(b, scattered(1<<12)...)
	if tab.trie == nil {
		b.Fatal("no trie")
	}
	benchLookup(b, tab, func(rng *rand.Rand) uint32 { return rng.Uint32() })
}

func BenchmarkBuild65536Leases(b *testing.B) {
	peers := network(65536)
	prev := build(b, peers...)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Build(local, peers, prev); err != nil {
			b.Fatal(err)
		}
	}
}
