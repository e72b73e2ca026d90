package filter

// arith reads an arithmetic expression: operands joined by binary operators.
//
// Precedence is that of libpcap's grammar, which declares one for every
// operator but % and ^. Where one of those two is involved, the operator to
// the right binds tighter whatever it is: "a % b + c" is "a % (b + c)".
func (p *parser) arith() (*arith, *Error) {
	if err := p.enter(); err != nil {
		return nil, err
	}
	defer p.leave()

	var operands []*arith
	var ops []token // binary operators, and '-' with kind tokKeyword for the sign
	reduce := func() {
		op := ops[len(ops)-1]
		ops = ops[:len(ops)-1]
		r := operands[len(operands)-1]
		if op.kind == tokKeyword {
			operands[len(operands)-1] = &arith{op: arithNeg, l: r, at: span{op.start, r.at.end}}
			return
		}
		l := operands[len(operands)-2]
		operands = append(operands[:len(operands)-2],
			&arith{op: arithOp(op.punct), l: l, r: r, at: span{l.at.start, r.at.end}})
	}
	for {
		for p.peek().isPunct('-') {
			sign := p.next()
			sign.kind = tokKeyword
			ops = append(ops, sign)
		}
		x, err := p.arithOperand()
		if err != nil {
			return nil, err
		}
		operands = append(operands, x)
		t := p.peek()
		if precedence(t) < 0 {
			break
		}
		for len(ops) > 0 && bindsBefore(ops[len(ops)-1], t) {
			reduce()
		}
		ops = append(ops, p.next())
	}
	for len(ops) > 0 {
		reduce()
	}
	return operands[0], nil
}

// precedence ranks a binary operator; 0 means undeclared, -1 no operator.
func precedence(t token) int {
	if t.kind == tokKeyword && t.punct == '-' {
		return 6 // the sign
	}
	if t.kind != tokPunct {
		return -1
	}
	switch t.punct {
	case '%', '^':
		return 0
	case '|':
		return 1
	case '&':
		return 2
	case punctShl, punctShr:
		return 3
	case '+', '-':
		return 4
	case '*', '/':
		return 5
	}
	return -1
}

// bindsBefore reports whether left, already read, takes its operands before
// right, just seen.
func bindsBefore(left, right token) bool {
	l, r := precedence(left), precedence(right)
	return l > 0 && r > 0 && l >= r
}

// arithOperand reads a number, len, PROTO[EXPR:SIZE] or a parenthesis.
func (p *parser) arithOperand() (*arith, *Error) {
	t := p.next()
	switch {
	case t.kind == tokNumber:
		return &arith{op: arithNum, num: t.num, at: t.span()}, nil
	case t.isKey(keyLen):
		return &arith{op: arithLen, at: t.span()}, nil
	case t.isPunct('('):
		x, err := p.arith()
		if err != nil {
			return nil, err
		}
		if c := p.next(); !c.isPunct(')') {
			return nil, p.errAt(c, "", "expected %q, not %s", ")", c.describe())
		}
		return x, nil
	case t.isKey(keyProtoName) && p.peek().isPunct('['):
		return p.load(t)
	}
	return nil, p.errAt(t, "a number, len or PROTO[EXPR:SIZE]", "expected a number, not %s", t.describe())
}

// load reads the "[EXPR:SIZE]" of a protocol.
func (p *parser) load(name token) (*arith, *Error) {
	p.next()
	index, err := p.arith()
	if err != nil {
		return nil, err
	}
	x := &arith{op: arithLoad, l: index, proto: name.proto, size: 1}
	t := p.next()
	if t.isPunct(':') {
		n := p.next()
		if n.kind != tokNumber || n.num != 1 && n.num != 2 && n.num != 4 {
			return nil, p.errAt(n, "the size of a field is 1, 2 or 4 bytes", "bad field size %s", n.describe())
		}
		x.size = uint8(n.num)
		t = p.next()
	}
	if !t.isPunct(']') {
		return nil, p.errAt(t, "for example "+name.text+"[2:2]", "expected %q, not %s", "]", t.describe())
	}
	x.at = span{name.start, t.end}
	return x, nil
}
