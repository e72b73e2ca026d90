package table

import "slices"

// lease is a peer's subnet while the index is made: its first address, its prefix
// length and the number of its entry.
type lease struct {
	first        uint32
	bits, number int
}

func (l lease) last() uint32 { return l.first | hostMask(l.bits) }

const (
	// small is a number of slots not worth saving on: a look-up touches those in
	// use only.
	small = 1 << 16
	// deepWeight is how many slots one cell is worth, for it costs a second step.
	deepWeight = 8
)

// chooseBits returns the prefix length of the slots: the one with which the index
// is smallest, among the lengths in use and some between them. It reports false
// when none is small enough.
func chooseBits(leases []lease) (bits int, ok bool) {
	candidates := []int{4, 8, 12, 16, 20, 24, 28}
	for _, l := range leases {
		if !slices.Contains(candidates, l.bits) {
			candidates = append(candidates, l.bits)
		}
	}
	slices.SortFunc(leases, func(a, b lease) int {
		if a.first != b.first {
			return compare(a.first, b.first)
		}
		return a.bits - b.bits
	})
	var best, bestSlots uint64
	for _, c := range candidates {
		_, slots := extent(leases, c)
		cells := countCells(leases, c)
		if slots > maxIndex || cells > maxCells {
			continue
		}
		cost := max(slots, small) + deepWeight*cells
		if !ok || cost < best || cost == best && slots < bestSlots {
			best, bestSlots, bits, ok = cost, slots, c, true
		}
	}
	return bits, ok
}

// extent returns the first address that slots of so many bits have to cover, and
// their number.
func extent(leases []lease, bits int) (lo uint32, slots uint64) {
	lo, hi := ^uint32(0), uint32(0)
	for _, l := range leases {
		lo, hi = min(lo, l.first), max(hi, l.last())
	}
	shift := 32 - bits
	return lo &^ hostMask(bits), uint64(hi>>shift) - uint64(lo>>shift) + 1
}

// countCells is the number of cells below slots of so many bits; the leases are
// sorted by address.
func countCells(leases []lease, bits int) (cells uint64) {
	shift := 32 - bits
	deepest, at := 0, uint32(0)
	for _, l := range leases {
		if l.bits <= bits {
			continue
		}
		if slot := l.first >> shift; deepest == 0 || slot != at {
			cells += cellsOf(deepest, bits)
			deepest, at = 0, slot
		}
		deepest = max(deepest, l.bits)
	}
	return cells + cellsOf(deepest, bits)
}

func cellsOf(deepest, bits int) uint64 {
	if deepest == 0 {
		return 0
	}
	return 1 << (deepest - bits)
}

// depths tells, for each slot with longer prefixes, how many more bits the longest
// of them has.
func depths(leases []lease, bits int) map[uint32]int {
	d := map[uint32]int{}
	for _, l := range leases {
		if l.bits > bits {
			slot := l.first >> (32 - bits)
			d[slot] = max(d[slot], l.bits-bits)
		}
	}
	return d
}

func compare(a, b uint32) int {
	if a < b {
		return -1
	}
	return 1
}
