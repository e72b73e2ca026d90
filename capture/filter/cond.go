package filter

// cond is a boolean expression of tests, what the tree of the expression is
// lowered to. A nil cond is an error.
type cond interface{ isCond() }

type condBool bool
type condAnd struct{ l, r cond }
type condOr struct{ l, r cond }
type condNot struct{ x cond }

func (condBool) isCond() {}
func (*condAnd) isCond() {}
func (*condOr) isCond()  {}
func (*condNot) isCond() {}
func (*test) isCond()    {}

// and joins conditions that are tested in order. "x and false" keeps x, whose
// loads may reject the packet before "not" turns the false around.
func and(conds ...cond) cond {
	c := conds[0]
	for _, r := range conds[1:] {
		switch l := c.(type) {
		case condBool:
			if !l {
				return l
			}
			c = r
			continue
		}
		if b, ok := r.(condBool); ok && bool(b) {
			continue
		}
		c = &condAnd{c, r}
	}
	return c
}

// or joins conditions that are tested in order.
func or(conds ...cond) cond {
	c := conds[0]
	for _, r := range conds[1:] {
		if l, ok := c.(condBool); ok {
			if l {
				return l
			}
			c = r
			continue
		}
		if b, ok := r.(condBool); ok && !bool(b) {
			continue
		}
		c = &condOr{c, r}
	}
	return c
}

func not(c cond) cond {
	switch x := c.(type) {
	case condBool:
		return !x
	case *condNot:
		return x.x
	}
	return &condNot{c}
}

// countTests returns the number of tests in c.
func countTests(c cond) int {
	switch c := c.(type) {
	case *condAnd:
		return countTests(c.l) + countTests(c.r)
	case *condOr:
		return countTests(c.l) + countTests(c.r)
	case *condNot:
		return countTests(c.x)
	case *test:
		return 1
	}
	return 0
}

// loadKind says where a test takes its number from.
type loadKind uint8

const (
	loadNone   loadKind = iota // a test on Meta
	loadAbs                    // bytes at a fixed offset
	loadBehind                 // bytes at an offset from the end of the IPv4 header
	loadLength                 // the length of the packet
	loadCode                   // the result of arithmetic, in test.code
)

// load is one number taken from the packet. Equal loads yield equal numbers.
type load struct {
	kind  loadKind
	scope scope
	size  uint8  // bytes: 1, 2 or 4
	off   uint32 // loadAbs: from the start; loadBehind: header start + offset behind the header
	base  uint32 // loadBehind: where the IPv4 header starts
	mask  uint32
}

const noMask = 0xffffffff

// test compares a load, or something Meta knows, with a constant.
type test struct {
	load load
	jump opcode // one of the jumps
	k    uint32
	code []instr // loadCode: leaves its result in A, and in X for a jump on X
}

// layer is the view of one scope: where its headers start.
type layer struct {
	link  LinkType
	scope scope
	nl    uint32 // offset of the network header
}

func (y layer) test(l load, jump opcode, k uint32) cond {
	l.scope = y.scope
	if l.mask == 0 {
		return condBool(holds(jump, 0, k))
	}
	return &test{load: l, jump: jump, k: k}
}

// linkAt compares size bytes at off from the link-layer header.
func (y layer) linkAt(off uint32, size uint8, k uint32) cond {
	return y.test(load{kind: loadAbs, size: size, off: off, mask: noMask}, jeqK, k)
}

// at compares size bytes at off from the network header under mask.
func (y layer) at(off uint32, size uint8, mask, k uint32) cond {
	return y.test(load{kind: loadAbs, size: size, off: y.nl + off, mask: mask}, jeqK, k)
}

// behind makes the load of size bytes at off behind the IPv4 header.
func (y layer) behind(off uint32, size uint8) load {
	return load{kind: loadBehind, scope: y.scope, size: size, off: y.nl + off, base: y.nl, mask: noMask}
}

// ethertype tests which protocol the link layer names, as libpcap does: from
// the version nibble for raw IP, and not at all where there is only IPv4.
func (y layer) ethertype(v uint32) cond {
	switch y.link {
	case LinkEthernet:
		return y.linkAt(12, 2, v)
	case LinkRaw:
		switch v {
		case etherIPv4:
			return y.at(0, 1, 0xf0, 0x40)
		case etherIPv6:
			return y.at(0, 1, 0xf0, 0x60)
		}
		return condBool(false)
	}
	return condBool(v == etherIPv4)
}

// unfragmented is true where the transport header is: fragment offset 0.
func (y layer) unfragmented() cond {
	return not(y.test(load{kind: loadAbs, size: 2, off: y.nl + 6, mask: noMask}, jsetK, 0x1fff))
}

// ip4Proto tests the protocol field of IPv4, ethertype not included.
func (y layer) ip4Proto(v uint32) cond { return y.at(9, 1, noMask, v) }

// ip6Proto tests the next header of IPv6, also behind a fragment header.
func (y layer) ip6Proto(v uint32) cond {
	return or(y.at(6, 1, noMask, v),
		and(y.at(6, 1, noMask, ip6Fragment), y.at(40, 1, noMask, v)))
}

// ipProto tests the transport protocol, in the IP versions asked for.
func (y layer) ipProto(v uint32, v4, v6 bool) cond {
	four := and(y.ethertype(etherIPv4), y.ip4Proto(v))
	six := and(y.ethertype(etherIPv6), y.ip6Proto(v))
	switch {
	case !v6:
		return four
	case !v4:
		return six
	}
	return or(four, six)
}
