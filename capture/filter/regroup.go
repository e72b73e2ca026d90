package filter

// Regrouping of tests. "host a or host b" asks for the source, the destination,
// and the source again; asked in the order source, source, destination, the
// second load of the source can be left out. libpcap regroups by the same rule
// (its opt.c calls it pulling up), and doing as it does keeps the verdict on a
// packet that ends between two of the loads the same as tcpdump's.

// maxRegroup bounds the graphs that are regrouped, in blocks, since the work
// grows with the square of their size.
const maxRegroup = 2048

// regroup reorders the tests of a graph once and reports whether it did.
func regroup(root *block) bool {
	blocks := order(root)
	if len(blocks) > maxRegroup {
		return false
	}
	preds := predecessors(blocks)
	dom := dominators(blocks, preds)
	changed := false
	// From the verdicts up.
	for i := len(blocks) - 1; i > 0; i-- {
		b := blocks[i]
		for _, side := range []side{onTrue, onFalse} {
			if pullUp(b, preds[b], dom, side) {
				changed = true
			}
		}
	}
	return changed
}

// side is which way of a chain of tests all lead to the same block: the true
// way of the parts of an "or", the false way of those of an "and".
type side bool

const (
	onTrue  side = true
	onFalse side = false
)

// out is the way that leaves the chain.
func (s side) out(b *block) *block {
	if s == onTrue {
		return b.t
	}
	return b.f
}

// along is the way to the next test of the chain.
func (s side) along(b *block) **block {
	if s == onTrue {
		return &b.f
	}
	return &b.t
}

// value is what A holds after a block's test; unknown after arithmetic.
func value(b *block) (load, bool) {
	if b.test == nil || b.test.load.kind == loadCode || b.test.load.kind == loadNone {
		return load{}, false
	}
	return b.test.load, true
}

// pullUp looks, in the chain of tests that starts at b, for one on the number
// every way to b has just loaded, behind one on another number, and puts it
// first.
func pullUp(b *block, preds []*block, dom dominance, s side) bool {
	if len(preds) == 0 {
		return false
	}
	val, ok := value(preds[0])
	if !ok {
		return false
	}
	for _, p := range preds[1:] {
		if v, ok := value(p); !ok || v != val {
			return false
		}
	}
	inChain := func(x *block) bool {
		return x.test != nil && s.out(x) == s.out(b) && dom.has(x, b)
	}
	same := func(x *block) bool {
		v, ok := value(x)
		return ok && v == val
	}

	// differs is the first test of another number.
	var before *block
	differs := b
	for same(differs) {
		before, differs = differs, *s.along(differs)
		if !inChain(differs) {
			return false
		}
	}
	link := s.along(differs)
	for {
		if !inChain(*link) {
			return false
		}
		if same(*link) {
			break
		}
		link = s.along(*link)
	}
	pulled := *link
	*link = *s.along(pulled)
	*s.along(pulled) = differs
	if before != nil {
		*s.along(before) = pulled
		return true
	}
	for _, p := range preds {
		if p.t == b {
			p.t = pulled
		}
		if p.f == b {
			p.f = pulled
		}
	}
	return true
}

func predecessors(blocks []*block) map[*block][]*block {
	preds := map[*block][]*block{}
	for _, b := range blocks {
		preds[b.t] = append(preds[b.t], b)
		if b.f != b.t {
			preds[b.f] = append(preds[b.f], b)
		}
	}
	return preds
}

// dominance says which blocks lie on every way to a block, itself included, as
// a set of bits per block.
type dominance struct {
	index map[*block]int
	sets  [][]uint64
}

// has reports whether every way to x passes d.
func (m dominance) has(x, d *block) bool {
	i, ok := m.index[x]
	j := m.index[d]
	return ok && m.sets[i][j/64]>>(j%64)&1 != 0
}

// dominators computes the dominance of blocks listed each before those it
// leads to.
func dominators(blocks []*block, preds map[*block][]*block) dominance {
	m := dominance{index: make(map[*block]int, len(blocks)), sets: make([][]uint64, len(blocks))}
	for i, b := range blocks {
		m.index[b] = i
		set := make([]uint64, (len(blocks)+63)/64)
		for n, p := range preds[b] {
			for w, bits := range m.sets[m.index[p]] {
				if n == 0 {
					set[w] = bits
				} else {
					set[w] &= bits
				}
			}
		}
		set[i/64] |= 1 << (i % 64)
		m.sets[i] = set
	}
	return m
}
