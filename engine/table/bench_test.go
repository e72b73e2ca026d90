package table

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"
)

type atomicTable = atomic.Pointer[Table]

var sink *Entry

// benchLookup looks up random addresses, so that the caches hold what they can.
func benchLookup(b *testing.B, tab *Table, addr func(rng *rand.Rand) uint32) {
	rng := rand.New(rand.NewPCG(1, 2))
	addrs := make([]uint32, 1<<16)
	for i := range addrs {
		addrs[i] = addr(rng)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		sink = tab.Lookup(addrs[i&(1<<16-1)])
	}
}

func BenchmarkLookup65536Leases(b *testing.B) {
	benchLookup(b, build(b, network(65536)...), func(rng *rand.Rand) uint32 { return 10<<24 | rng.Uint32N(1<<24) })
}

func BenchmarkLookupOneFlow(b *testing.B) {
	benchLookup(b, build(b, network(65536)...), func(*rand.Rand) uint32 { return 10<<24 | 77<<8 | 9 })
}

func BenchmarkLookupTrie(b *testing.B) {
	peers := append(network(65536), peer("200.0.0.0/32", "192.0.2.1:1"))
	tab := build(b, peers...)
	if tab.trie == nil {
		b.Fatal("no trie")
	}
	benchLookup(b, tab, func(rng *rand.Rand) uint32 { return 10<<24 | rng.Uint32N(1<<24) })
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
