package filter

import (
	"encoding/binary"
	"net/netip"
)

// Layer tells the two kinds of record apart.
type Layer uint8

// Layers. The zero value is neither.
const (
	LayerInner Layer = 1 + iota // a packet of the overlay
	LayerOuter                  // a datagram of the underlay
)

// Dir is the direction of a packet, seen from this node.
type Dir uint8

// Directions. The zero value is neither.
const (
	DirIn  Dir = 1 + iota // from the underlay to the overlay
	DirOut                // from the overlay to the underlay
)

// Meta is what the engine knows about a record beside its bytes. The zero value
// is a record nothing is known about: every word of our own is false on it.
type Meta struct {
	// Inner is the IPv4 packet in the tunnel and Outer the IPv4 datagram around
	// it, from their IPv4 headers on. nil means that the record has none.
	// Either may be the very slice handed to Match.
	Inner, Outer []byte
	// Len is the length of the packet in bytes where Match sees only its head;
	// 0 means the length of the slice.
	Len int
	// Peer is the underlay address of the other node, IPv4 not mapped into IPv6.
	Peer netip.Addr
	// VNI is the VXLAN network identifier; it counts only with Tagged.
	VNI    uint32
	Tagged bool
	// Reason is an index into Options.Reasons; it counts only with Dropped.
	Reason  uint8
	Dropped bool
	// Point is an index into Options.Points.
	Point uint8
	// HasPoint says that Point counts.
	HasPoint bool
	Dir      Dir
	Layer    Layer
}

var noMeta Meta

// bytes returns what a scope other than the record's looks at.
func (m *Meta) bytes(s scope) []byte {
	if s == scopeInner {
		return m.Inner
	}
	return m.Outer
}

// step is a block of the graph in the form Match walks.
type step struct {
	test
	t, f uint32 // the index of the next step, or a verdict
}

// Verdicts, in place of the index of a step.
const (
	accept = 1<<32 - 1 - iota
	reject
)

// toSteps lists the blocks of a graph, its first block first. A graph that is
// but a verdict becomes one step that always reaches it.
func toSteps(root *block) []step {
	if root.test == nil {
		root = &block{test: &test{load: load{kind: loadLength, mask: noMask}, jump: jeqK}, t: root, f: root}
	}
	blocks := order(root)
	index := map[*block]uint32{acceptBlock: accept, rejectBlock: reject}
	for i, b := range blocks {
		index[b] = uint32(i)
	}
	steps := make([]step, len(blocks))
	for i, b := range blocks {
		steps[i] = step{*b.test, index[b.t], index[b.f]}
	}
	return steps
}

// Match reports whether the expression accepts packet, which starts with the
// link-layer header of the program's link type. m may be nil when nothing is
// known beside the bytes. Match does not allocate, and keeps neither argument.
//
// A load beyond the end of the bytes makes it false, as does a division by 0.
func (p *Program) Match(m *Meta, packet []byte) bool {
	if m == nil {
		m = &noMeta
	}
	next := uint32(0)
	for next < reject {
		s := &p.steps[next]
		pkt := packet
		if s.load.scope != scopeRecord {
			pkt = m.bytes(s.load.scope)
		}
		var a, x uint32
		var ok, hit bool
		switch s.load.kind {
		case loadNone:
			ok, hit = true, p.holdsMeta(s, m)
		case loadAbs: // most tests are of this kind, and for equality
			a, ok = fetch(pkt, uint64(s.load.off), s.load.size)
			a &= s.load.mask
			hit = a == s.k
		default:
			a, x, ok = s.operands(m, pkt)
			hit = a == s.k
		}
		if !ok {
			return false
		}
		if s.jump != jeqK && s.load.kind != loadNone {
			hit = s.compare(a, x)
		}
		if hit {
			next = s.t
		} else {
			next = s.f
		}
	}
	return next == accept
}

// compare decides a test on the packet other than jeqK.
func (s *step) compare(a, x uint32) bool {
	switch s.jump {
	case jsetK:
		return a&s.k != 0
	case jgtK:
		return a > s.k
	case jgeK:
		return a >= s.k
	case jeqX:
		return a == x
	case jgtX:
		return a > x
	}
	return a >= x // jgeX
}

// operands loads what a test compares: A, and X after arithmetic on both sides.
// The kinds left are loadBehind, loadLength and loadCode.
func (s *step) operands(m *Meta, pkt []byte) (a, x uint32, ok bool) {
	l := &s.load
	off := uint64(l.off)
	switch l.kind {
	case loadBehind:
		if uint64(l.base) >= uint64(len(pkt)) {
			return 0, 0, false
		}
		off += uint64(pkt[l.base]&15) * 4
	case loadLength:
		return l.mask & packetLength(m, l.scope, pkt), 0, true
	case loadCode:
		return calculate(s.code, packetLength(m, l.scope, pkt), pkt)
	}
	a, ok = fetch(pkt, off, l.size)
	return a & l.mask, 0, ok
}

func packetLength(m *Meta, s scope, pkt []byte) uint32 {
	if s == scopeRecord && m.Len != 0 {
		return uint32(m.Len)
	}
	return uint32(len(pkt))
}

// fetch reads size bytes at off, big endian.
func fetch(pkt []byte, off uint64, size uint8) (uint32, bool) {
	if off+uint64(size) > uint64(len(pkt)) {
		return 0, false
	}
	switch size {
	case 1:
		return uint32(pkt[off]), true
	case 2:
		return uint32(binary.BigEndian.Uint16(pkt[off:])), true
	}
	return binary.BigEndian.Uint32(pkt[off:]), true
}

// calculate runs the instructions of an arithmetic expression, which do not
// jump, and returns A and X. false means a load beyond the end or a division
// by zero.
func calculate(code []instr, length uint32, pkt []byte) (a, x uint32, ok bool) {
	var scratch [scratchSlots]uint32
	for i := range code {
		in := &code[i]
		switch in.op {
		case ldAbsB, ldAbsH, ldAbsW:
			a, ok = fetch(pkt, uint64(in.k), 1<<(in.op-ldAbsB))
		case ldIndB, ldIndH, ldIndW:
			a, ok = fetch(pkt, uint64(x)+uint64(in.k), 1<<(in.op-ldIndB))
		case ldxMSH:
			x, ok = fetch(pkt, uint64(in.k), 1)
			x = x & 15 * 4
		case ldLen:
			a, ok = length, true
		case ldImm:
			a, ok = in.k, true
		case ldMem:
			a, ok = scratch[in.k%scratchSlots], true
		case ldxMem:
			x, ok = scratch[in.k%scratchSlots], true
		case st:
			scratch[in.k%scratchSlots], ok = a, true
		case tax:
			x, ok = a, true
		default:
			if in.op >= addX {
				a, ok = alu(in.op-aluXOffset, a, x)
			} else {
				a, ok = alu(in.op, a, in.k)
			}
		}
		if !ok {
			return 0, 0, false
		}
	}
	return a, x, true
}

// alu applies an operator, by its K form; false means a division by zero.
func alu(op opcode, a, v uint32) (uint32, bool) {
	switch op {
	case addK:
		return a + v, true
	case subK:
		return a - v, true
	case mulK:
		return a * v, true
	case divK, modK:
		if v == 0 {
			return 0, false
		}
		if op == divK {
			return a / v, true
		}
		return a % v, true
	case andK:
		return a & v, true
	case orK:
		return a | v, true
	case xorK:
		return a ^ v, true
	case lshK:
		return a << v, true
	}
	return a >> v, true // rshK
}

// holdsMeta decides a test on Meta.
func (p *Program) holdsMeta(s *step, m *Meta) bool {
	switch s.jump {
	case jHas:
		return m.bytes(scope(s.k)) != nil
	case jLayer:
		return m.Layer == Layer(s.k)
	case jDir:
		return m.Dir == Dir(s.k)
	case jPoint:
		return m.HasPoint && uint32(m.Point) == s.k
	case jReason:
		return m.Dropped && uint32(m.Reason) == s.k
	case jVNI:
		return m.Tagged && m.VNI == s.k
	}
	for _, a := range p.peers[s.k] { // jPeer
		if a == m.Peer {
			return true
		}
	}
	return false
}
