package filter

import "slices"

// block is a test and its two ways on. A block without a test is a verdict.
type block struct {
	test *test
	t, f *block
}

// maxFacts bounds what is remembered on a path; more makes compiling slow and
// the program hardly better.
const maxFacts = 24

// build chains the tests of c in front of the blocks t and f.
func build(c cond, t, f *block) *block {
	switch c := c.(type) {
	case condBool:
		if c {
			return t
		}
		return f
	case *condAnd:
		return build(c.l, build(c.r, t, f), f)
	case *condOr:
		return build(c.l, t, build(c.r, t, f))
	case *condNot:
		return build(c.x, f, t)
	}
	return &block{test: c.(*test), t: t, f: f}
}

// order returns the blocks reachable from root, each before those it leads to,
// verdicts excluded.
func order(root *block) []*block {
	seen := map[*block]bool{}
	var out []*block
	var visit func(b *block)
	visit = func(b *block) {
		if b.test == nil || seen[b] {
			return
		}
		seen[b] = true
		visit(b.f)
		visit(b.t)
		out = append(out, b)
	}
	visit(root)
	slices.Reverse(out)
	return out
}

// fact is the outcome of a test on a path.
type fact struct {
	test testKey
	out  bool
}

// testKey identifies a test; tests on arithmetic have none.
type testKey struct {
	load load
	jump opcode
	k    uint32
}

func keyOf(t *test) (testKey, bool) {
	return testKey{t.load, t.jump, t.k}, t.load.kind != loadCode
}

// decided reports the outcome of t where the facts settle it.
func decided(facts []fact, t *test) (out, known bool) {
	key, ok := keyOf(t)
	if !ok {
		return false, false
	}
	for _, f := range facts {
		if f.test == key {
			return f.out, true
		}
		if f.out && f.test.jump == jeqK && f.test.load == key.load && key.load.kind != loadNone {
			return holds(key.jump, f.test.k, key.k), true
		}
	}
	return false, false
}

// learn returns facts and the outcome of t.
func learn(facts []fact, t *test, out bool) []fact {
	key, ok := keyOf(t)
	if !ok {
		return facts
	}
	if len(facts) >= maxFacts {
		facts = facts[len(facts)-maxFacts+1:]
	}
	return append(slices.Clone(facts), fact{key, out})
}

// meet keeps the facts that hold on both ways to a block.
func meet(a, b []fact) []fact {
	var both []fact
	for _, f := range a {
		if slices.Contains(b, f) {
			both = append(both, f)
		}
	}
	return both
}

// maxPasses bounds the rounds of improvement; each finds less than the last.
const maxPasses = 50

// improve shortens a graph in place. Its first block stays the first.
func improve(root *block) {
	for range maxPasses {
		threaded := thread(root)
		if regrouped := regroup(root); !threaded && !regrouped {
			break
		}
	}
}

// thread makes every way skip the tests whose outcome is known on it, and
// reports whether there was one. A known outcome means an equal load earlier on
// the same way, so a packet too short for it is rejected already. A test whose
// two ways meet again stays: its load may still reject the packet.
func thread(root *block) bool {
	blocks := order(root)
	entry := map[*block][]fact{root: nil}
	arrive := func(b *block, facts []fact) {
		if known, ok := entry[b]; ok {
			facts = meet(known, facts)
		}
		entry[b] = facts
	}
	for _, b := range blocks {
		arrive(b.t, learn(entry[b], b.test, true))
		arrive(b.f, learn(entry[b], b.test, false))
	}
	changed := false
	follow := func(to **block, facts []fact) {
		for (*to).test != nil {
			b := *to
			out, known := decided(facts, b.test)
			switch {
			case known && out:
				*to = b.t
			case known:
				*to = b.f
			default:
				return
			}
			changed = true
		}
	}
	for _, b := range blocks {
		follow(&b.t, learn(entry[b], b.test, true))
		follow(&b.f, learn(entry[b], b.test, false))
	}
	return changed
}
