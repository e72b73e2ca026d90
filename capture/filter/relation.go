package filter

import "math/bits"

// maxFixed is the largest constant index made part of an instruction. Larger
// ones are negative numbers in disguise and take the way of computed indexes.
const maxFixed = 1<<31 - 1

// lowerRelation turns a comparison into the protocol checks of the fields it
// reads and one test.
func (w *lowerer) lowerRelation(e *relExpr) (cond, *Error) {
	l, err := w.fold(e.l)
	if err != nil {
		return nil, err
	}
	r, err := w.fold(e.r)
	if err != nil {
		return nil, err
	}
	jump, negate := relationJump(e.op)
	y := w.layer(e.scope)
	checks := and(y.checks(e.l), y.checks(e.r))
	if l.op == arithNum && r.op == arithNum {
		return w.guard(e.scope, e.at, and(checks, condBool(holds(jump, l.num, r.num) != negate))), nil
	}
	t := &test{jump: jump, k: r.num}
	if simple, ok := y.simple(l); ok && r.op == arithNum {
		t.load = simple
	} else {
		t.load = load{kind: loadCode, scope: e.scope}
		g := calc{y: y}
		if r.op == arithNum {
			g.gen(l, 0)
		} else {
			t.jump += jumpXOffset
			g.both(l, r, 0)
		}
		t.code = g.code
		if g.tooDeep {
			return nil, w.errAt(e.at, "split the comparison", "the arithmetic needs more than %d intermediate results", scratchSlots)
		}
	}
	var result cond = t
	if negate {
		result = not(t)
	}
	return w.guard(e.scope, e.at, and(checks, result)), nil
}

// relationJump returns the jump of a relational operator and whether its
// outcome is turned around.
func relationJump(op byte) (jump opcode, negate bool) {
	switch op {
	case '=':
		return jeqK, false
	case punctNE:
		return jeqK, true
	case '>':
		return jgtK, false
	case punctLE:
		return jgtK, true
	case punctGE:
		return jgeK, false
	}
	return jgeK, true // <
}

// fold computes what consists of numbers only and refuses what libpcap does:
// division by zero and shifts by more than 31.
func (w *lowerer) fold(a *arith) (*arith, *Error) {
	if a.op == arithNum || a.op == arithLen {
		return a, nil
	}
	l, err := w.fold(a.l)
	if err != nil {
		return nil, err
	}
	b := *a
	b.l = l
	switch a.op {
	case arithLoad:
		if _, ok := indexable[a.proto]; !ok {
			return nil, w.errAt(a.at, "one of ether, ip, ip6, arp, rarp, tcp, udp, sctp, icmp, icmp6, igmp, igrp, pim, vrrp",
				"the fields of %q cannot be indexed", protocols[a.proto].name)
		}
		return &b, nil
	case arithNeg:
		if l.op == arithNum {
			return &arith{op: arithNum, num: -l.num, at: a.at}, nil
		}
		return &b, nil
	}
	r, err := w.fold(a.r)
	if err != nil {
		return nil, err
	}
	b.r = r
	if r.op == arithNum {
		switch {
		case r.num == 0 && (a.op == '/' || a.op == '%'):
			return nil, w.errAt(r.at, "", "division by zero")
		case r.num > 31 && (a.op == punctShl || a.op == punctShr):
			return nil, w.errAt(r.at, "", "shift by more than 31 bits")
		}
		if l.op == arithNum {
			return &arith{op: arithNum, num: compute(a.op, l.num, r.num), at: a.at}, nil
		}
	}
	if vanishes(a.op, l, r) {
		return &arith{op: arithNum, at: a.at}, nil
	}
	return &b, nil
}

// vanishes reports whether an operation yields 0 whatever the packet says. As
// in libpcap its fields are not loaded then, and may be missing.
func vanishes(op arithOp, l, r *arith) bool {
	switch op {
	case '*', '&':
		return l.op == arithNum && l.num == 0 || r.op == arithNum && r.num == 0
	case '/', '%', punctShl, punctShr:
		return l.op == arithNum && l.num == 0
	}
	return false
}

// compute applies a binary operator to unsigned 32-bit numbers. r is not 0 for
// a division.
func compute(op arithOp, l, r uint32) uint32 {
	switch op {
	case '+':
		return l + r
	case '-':
		return l - r
	case '*':
		return l * r
	case '/':
		return l / r
	case '%':
		return l % r
	case '&':
		return l & r
	case '|':
		return l | r
	case '^':
		return l ^ r
	case punctShl:
		return l << r
	}
	return l >> r
}

// indexable lists the protocols PROTO[EXPR] takes: those with a fixed place.
// The value tells transports, behind the IPv4 header, from the rest.
var indexable = map[proto]bool{
	pEther: false, pIP: false, pIP6: false, pARP: false, pRARP: false, pICMP6: false,
	pTCP: true, pUDP: true, pSCTP: true, pICMP: true, pIGMP: true, pIGRP: true,
	pPIM: true, pVRRP: true,
}

// checks is the condition under which the fields of an arithmetic expression
// exist. As in libpcap, a binary operator contributes that of its left side
// only: "len - tcp[0] > 5" reads where a TCP header would be in any packet.
func (y layer) checks(a *arith) cond {
	switch a.op {
	case arithNum, arithLen:
		return condBool(true)
	case arithLoad:
	default:
		return y.checks(a.l)
	}
	index := y.checks(a.l)
	switch {
	case a.proto == pEther:
		return index
	case a.proto == pICMP6:
		return and(index, y.ethertype(etherIPv6), y.at(6, 1, noMask, protoICMPv6))
	case !indexable[a.proto]:
		return and(index, y.protocol(a.proto))
	}
	return and(y.ethertype(etherIPv4), index, y.protocol(a.proto), y.unfragmented())
}

// simple returns the load that yields a, if one load with a mask can.
func (y layer) simple(a *arith) (load, bool) {
	switch {
	case a.op == arithLen:
		return load{kind: loadLength, scope: y.scope, mask: noMask}, true
	case a.op == arithLoad && a.l.op == arithNum && a.l.num <= maxFixed:
		return y.field(a), true
	case a.op == '&' && a.r.op == arithNum:
		l, ok := y.simple(a.l)
		l.mask &= a.r.num
		return l, ok
	case a.op == '&' && a.l.op == arithNum:
		l, ok := y.simple(a.r)
		l.mask &= a.l.num
		return l, ok
	}
	return load{}, false
}

// field returns the load of PROTO[constant:size].
func (y layer) field(a *arith) load {
	l := y.fieldBase(a)
	l.off += a.l.num
	return l
}

// fieldBase returns the load of PROTO[0:size].
func (y layer) fieldBase(a *arith) load {
	if indexable[a.proto] {
		return y.behind(0, a.size)
	}
	l := load{kind: loadAbs, scope: y.scope, size: a.size, mask: noMask}
	switch a.proto {
	case pEther:
	case pICMP6:
		l.off = y.nl + 40
	default:
		l.off = y.nl
	}
	return l
}

// calc generates the instructions of an arithmetic expression.
type calc struct {
	y       layer
	code    []instr
	tooDeep bool
}

func (g *calc) emit(op opcode, k uint32) { g.code = append(g.code, instr{op: op, k: k}) }

// gen leaves the value of a in A. Scratch slots below slot are taken.
func (g *calc) gen(a *arith, slot uint32) {
	if slot >= scratchSlots {
		g.tooDeep = true
		return
	}
	switch a.op {
	case arithNum:
		g.emit(ldImm, a.num)
	case arithLen:
		g.emit(ldLen, 0)
	case arithNeg:
		g.gen(a.l, slot)
		// Not the negate instruction: bpf.VM has none.
		g.emit(mulK, 0xffffffff)
	case arithLoad:
		g.load(a, slot)
	default:
		if a.r.op == arithNum {
			g.gen(a.l, slot)
			g.emit(aluK[a.op], a.r.num)
			return
		}
		g.both(a.l, a.r, slot)
		g.emit(aluK[a.op]+aluXOffset, 0)
	}
}

// both leaves l in A and r in X. The side that needs more intermediate results
// goes first, which keeps their number logarithmic.
func (g *calc) both(l, r *arith, slot uint32) {
	if slot >= scratchSlots {
		g.tooDeep = true
		return
	}
	if need(r) >= need(l) {
		g.gen(r, slot)
		g.emit(st, slot)
		g.gen(l, slot+1)
		g.emit(ldxMem, slot)
		return
	}
	g.gen(l, slot)
	g.emit(st, slot)
	g.gen(r, slot+1)
	g.emit(tax, 0)
	g.emit(ldMem, slot)
}

// need estimates the scratch slots a takes.
func need(a *arith) int {
	switch {
	case a.op == arithNum || a.op == arithLen:
		return 0
	case a.r == nil || a.r.op == arithNum:
		return need(a.l)
	}
	l, r := need(a.l), need(a.r)
	if l == r {
		return l + 1
	}
	return max(l, r)
}

// load leaves PROTO[EXPR:SIZE] in A.
func (g *calc) load(a *arith, slot uint32) {
	l := g.y.fieldBase(a)
	if a.l.op == arithNum && a.l.num <= maxFixed {
		l.off += a.l.num
		if l.kind == loadAbs {
			g.emit(ldAbs(l.size), l.off)
			return
		}
		g.emit(ldxMSH, l.base)
		g.emit(ldInd(l.size), l.off)
		return
	}
	g.gen(a.l, slot)
	if l.kind == loadBehind {
		g.emit(ldxMSH, l.base)
		g.emit(addX, 0)
	}
	g.emit(tax, 0)
	g.emit(ldInd(l.size), l.off)
}

// ldAbs and ldInd return the opcode for a size of 1, 2 or 4 bytes.
func ldAbs(size uint8) opcode { return ldAbsB + opcode(bits.TrailingZeros8(size)) }
func ldInd(size uint8) opcode { return ldIndB + opcode(bits.TrailingZeros8(size)) }
