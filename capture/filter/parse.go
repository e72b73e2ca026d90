package filter

import (
	"fmt"
	"strings"
)

const (
	// maxExpr is the longest expression accepted, in bytes.
	maxExpr = 64 << 10
	// maxDepth bounds nested parentheses, brackets and "not".
	maxDepth = 200
)

type parser struct {
	expr  string
	toks  []token
	i     int
	depth int
	// scope is what "inner" or "outer" chose for what is being read now.
	scope scope
}

// parse reads a whole expression. A nil tree stands for the empty expression.
func parse(text string) (expr, *Error) {
	if len(text) > maxExpr {
		return nil, &Error{Expr: text, Start: maxExpr, End: len(text),
			Msg:  fmt.Sprintf("expression of %d bytes is too long", len(text)),
			Hint: fmt.Sprintf("the limit is %d bytes", maxExpr)}
	}
	toks, err := lex(text)
	if err != nil {
		return nil, err
	}
	p := &parser{expr: text, toks: toks}
	if p.peek().kind == tokEnd {
		return nil, nil
	}
	e, _, err := p.list(qualifier{})
	if err != nil {
		return nil, err
	}
	if t := p.peek(); t.kind != tokEnd {
		return nil, p.errAfterOperand(t)
	}
	return e, nil
}

func (p *parser) peek() token { return p.toks[p.i] }

func (p *parser) peekAt(n int) token { return p.toks[min(p.i+n, len(p.toks)-1)] }

func (p *parser) next() token {
	t := p.toks[p.i]
	if t.kind != tokEnd {
		p.i++
	}
	return t
}

func (p *parser) errAt(t token, hint, format string, args ...any) *Error {
	return &Error{Expr: p.expr, Start: t.start, End: t.end, Msg: fmt.Sprintf(format, args...), Hint: hint}
}

// enter counts a level of nesting; leave undoes it.
func (p *parser) enter() *Error {
	if p.depth++; p.depth > maxDepth {
		return p.errAt(p.peek(), "", "nested deeper than %d levels", maxDepth)
	}
	return nil
}

func (p *parser) leave() { p.depth-- }

func (t token) isPunct(c byte) bool  { return t.kind == tokPunct && t.punct == c }
func (t token) isKey(k keyword) bool { return t.kind == tokKeyword && t.key == k }
func (t token) isConnective() bool   { return t.isPunct(punctAnd) || t.isPunct(punctOr) }
func (t token) endsOperand() bool    { return t.kind == tokEnd || t.isConnective() || t.isPunct(')') }
func (t token) span() span           { return span{t.start, t.end} }
func (t token) describe() string {
	if t.kind == tokEnd {
		return "the end"
	}
	return fmt.Sprintf("%q", t.text)
}

// list reads operands joined by "and" and "or". The two bind equally and to
// the left, as in libpcap. A bare value takes the qualifier of the operand
// before it; the qualifier of the last one is returned for the next.
func (p *parser) list(q qualifier) (expr, qualifier, *Error) {
	l, q, err := p.operand(q)
	for err == nil && p.peek().isConnective() {
		and := p.next().isPunct(punctAnd)
		var r expr
		if r, q, err = p.operand(q); err != nil {
			break
		}
		l = join(and, l, r)
	}
	return l, q, err
}

func join(and bool, l, r expr) expr {
	if and {
		return &andExpr{l, r}
	}
	return &orExpr{l, r}
}

// operand reads one primitive, comparison, negation or parenthesis, or a bare
// value under the inherited qualifier q.
func (p *parser) operand(q qualifier) (expr, qualifier, *Error) {
	if err := p.enter(); err != nil {
		return nil, q, err
	}
	defer p.leave()

	t := p.peek()
	switch t.kind {
	case tokPunct:
		switch t.punct {
		case '!':
			p.next()
			x, q, err := p.operand(q)
			return &notExpr{x}, q, err
		case '(', '-':
			return p.relation(q)
		}
	case tokNumber:
		return p.relation(q)
	case tokKeyword:
		return p.keywordOperand(t, q)
	case tokWord, tokDotted, tokIPv6, tokMAC:
		if q.qty != qtyUndefined {
			return p.value(q)
		}
	}
	return nil, q, p.errOperand(t)
}

// keywordOperand reads an operand that starts with the keyword t.
func (p *parser) keywordOperand(t token, q qualifier) (expr, qualifier, *Error) {
	switch t.key {
	case keyInner, keyOuter:
		return p.scoped(q)
	case keyLen:
		return p.relation(q)
	case keyLess, keyGreater:
		p.next()
		n := p.next()
		if n.kind != tokNumber {
			return nil, q, p.errAt(n, "for example "+t.text+" 128", "%q takes a length in bytes, not %s", t.text, n.describe())
		}
		return &sizeExpr{greater: t.key == keyGreater, n: n.num, scope: p.scope}, qualifier{}, nil
	case keyBroadcast, keyMulticast:
		p.next()
		return &castExpr{key: t.key, scope: p.scope, at: t.span()}, qualifier{}, nil
	case keyInbound, keyOutbound:
		p.next()
		return &kindExpr{t.key}, qualifier{}, nil
	case keyPeer, keyVNI, keyReason, keyPoint, keyDir:
		p.next()
		return p.values(qualifier{qty: ownQuantity(t.key), scope: p.scope, at: t.span()})
	case keyProtoName:
		if p.peekAt(1).isPunct('[') {
			return p.relation(q)
		}
		return p.head()
	case keyMask:
		return nil, q, p.errAt(t, "write net 10.1.0.0 mask 255.255.0.0", `"mask" stands after a network only`)
	}
	return p.head()
}

func ownQuantity(k keyword) quantity {
	switch k {
	case keyPeer:
		return qtyPeer
	case keyVNI:
		return qtyVNI
	case keyReason:
		return qtyReason
	case keyPoint:
		return qtyPoint
	}
	return qtyDir
}

// scoped reads "inner" or "outer", alone or with the operand it applies to.
func (p *parser) scoped(q qualifier) (expr, qualifier, *Error) {
	t := p.next()
	if p.peek().endsOperand() {
		return &kindExpr{t.key}, qualifier{}, nil
	}
	outside := p.scope
	p.scope = scopeInner
	if t.key == keyOuter {
		p.scope = scopeOuter
	}
	q.scope = p.scope
	e, q, err := p.operand(q)
	p.scope = outside
	return e, q, err
}

// relation reads a comparison, or what only looks like the start of one: a
// number or a parenthesis that turns out to belong to a primitive.
func (p *parser) relation(q qualifier) (expr, qualifier, *Error) {
	first, start := p.i, p.peek()
	l, err := p.arith()
	if err == nil && isRelation(p.peek()) {
		op := p.next()
		r, err := p.arith()
		if err != nil {
			return nil, q, err
		}
		at := span{start.start, p.toks[p.i-1].end}
		return &relExpr{op: op.punct, l: l, r: r, scope: p.scope, at: at}, qualifier{}, nil
	}
	if err == nil {
		err = p.errAt(p.peek(), "one of = != > < >= <=", "expected a comparison, not %s", p.peek().describe())
	}
	switch {
	case start.kind == tokNumber && q.qty != qtyUndefined:
		p.i = first
		return p.value(q)
	case start.isPunct('('):
		p.i = first
		e, _, err := p.group(q, (*parser).list)
		return e, q, err
	case start.kind == tokNumber && l != nil && l.op == arithNum:
		err = p.errBare(start)
	}
	return nil, q, err
}

func isRelation(t token) bool {
	if t.kind != tokPunct {
		return false
	}
	switch t.punct {
	case '=', '<', '>', punctGE, punctLE, punctNE:
		return true
	}
	return false
}

// group reads "(", what inside reads, and ")".
func (p *parser) group(q qualifier, inside func(*parser, qualifier) (expr, qualifier, *Error)) (expr, qualifier, *Error) {
	open := p.next()
	e, q, err := inside(p, q)
	if err != nil {
		return nil, q, err
	}
	if t := p.peek(); !t.isPunct(')') {
		if t.kind == tokEnd {
			return nil, q, p.errAt(open, "", `"(" is never closed`)
		}
		return nil, q, p.errAfterOperand(t)
	}
	p.next()
	return e, q, nil
}

// head reads the qualifiers of a primitive and its values, or a protocol name
// that stands alone.
func (p *parser) head() (expr, qualifier, *Error) {
	first := p.peek()
	q := qualifier{scope: p.scope, qty: qtyDefault}
	if first.key == keyProtoName {
		q.proto = p.next().proto
	}
	q.dir = p.direction()
	switch t := p.peek(); {
	case t.isKey(keyHost):
		q.qty = qtyHost
	case t.isKey(keyNet):
		q.qty = qtyNet
	case t.isKey(keyPort):
		q.qty = qtyPort
	case t.isKey(keyPortrange):
		q.qty = qtyPortrange
	case t.isKey(keyProto) && q.dir == dirDefault:
		q.qty = qtyProto
	case t.isKey(keyProto):
		return nil, q, p.errAt(t, "", `"proto" has no direction`)
	case (t.isKey(keyBroadcast) || t.isKey(keyMulticast)) && q.dir == dirDefault:
		p.next()
		return &castExpr{key: t.key, proto: q.proto, scope: p.scope, at: span{first.start, t.end}}, qualifier{}, nil
	case q.dir == dirDefault:
		return &protoExpr{proto: q.proto, scope: p.scope, at: first.span()}, qualifier{}, nil
	}
	if q.qty != qtyDefault {
		p.next()
	}
	q.at = span{first.start, p.toks[p.i-1].end}
	return p.values(q)
}

// direction reads src, dst and their combinations.
func (p *parser) direction() direction {
	t := p.peek()
	if !t.isKey(keySrc) && !t.isKey(keyDst) {
		return dirDefault
	}
	other := keyDst
	if t.key == keyDst {
		other = keySrc
	}
	p.next()
	if c := p.peek(); c.isConnective() && p.peekAt(1).isKey(other) {
		p.next()
		p.next()
		if c.isPunct(punctAnd) {
			return dirSrcAndDst
		}
		return dirSrcOrDst
	}
	if t.key == keySrc {
		return dirSrc
	}
	return dirDst
}

// values reads what follows the qualifiers of a primitive: a value, or values
// with "not", "and", "or" in parentheses. Nothing else may stand there, so that
// "port 80 = 80" is not taken for a comparison.
func (p *parser) values(q qualifier) (expr, qualifier, *Error) {
	if err := p.enter(); err != nil {
		return nil, q, err
	}
	defer p.leave()

	t := p.peek()
	switch {
	case t.isPunct('!'):
		p.next()
		x, q, err := p.values(q)
		return &notExpr{x}, q, err
	case t.isPunct('('):
		return p.group(q, (*parser).valueList)
	case t.kind == tokKeyword && (q.qty.own() || q.qty == qtyProto && t.key == keyProtoName):
		// libpcap wants these escaped: proto \tcp. Nothing else can be meant.
		p.toks[p.i].kind = tokWord
		return p.value(q)
	case t.kind == tokEnd || t.kind == tokPunct || t.kind == tokKeyword:
		return nil, q, p.errValue(t, q)
	}
	return p.value(q)
}

func (p *parser) valueList(q qualifier) (expr, qualifier, *Error) {
	l, q, err := p.values(q)
	for err == nil && p.peek().isConnective() {
		and := p.next().isPunct(punctAnd)
		var r expr
		if r, q, err = p.values(q); err != nil {
			break
		}
		l = join(and, l, r)
	}
	return l, q, err
}

// value reads one value under q, with its mask when it is a network.
func (p *parser) value(q qualifier) (expr, qualifier, *Error) {
	prim := &primExpr{q: q, value: p.next()}
	if prim.value.kind == tokMAC || prim.value.kind == tokWord || q.qty.own() {
		return prim, q, nil
	}
	switch t := p.peek(); {
	case t.isPunct('/'):
		p.next()
		if prim.mask = p.next(); prim.mask.kind != tokNumber {
			return nil, q, p.errAt(prim.mask, "for example "+prim.value.text+"/24",
				"expected a prefix length after \"/\", not %s", prim.mask.describe())
		}
	case t.isKey(keyMask):
		p.next()
		prim.mask = p.next()
		if prim.mask.kind != tokDotted && prim.mask.kind != tokNumber || prim.value.kind == tokIPv6 {
			return nil, q, p.errAt(prim.mask, "for example net 10.1.0.0 mask 255.255.0.0",
				"expected an IPv4 mask, not %s", prim.mask.describe())
		}
		prim.mask.kind = tokDotted
	}
	return prim, q, nil
}

// errOperand explains a token that cannot start an operand.
func (p *parser) errOperand(t token) *Error {
	switch {
	case t.kind == tokEnd:
		return p.errAt(t, "for example tcp port 80", "the expression ends where a primitive is expected")
	case t.isPunct('['):
		return p.errAt(t, "write tcp[13], ip[0] or another PROTO[EXPR]", `"[" stands after a protocol only`)
	case t.kind == tokPunct:
		return p.errAt(t, "", "unexpected %s where a primitive is expected", t.describe())
	case t.kind == tokWord:
		if why, ok := foreign[t.text]; ok {
			return p.errAt(t, why, "%q is not part of this filter language", t.text)
		}
		return p.errAt(t, wordHint(t.text), "unknown word %q", t.text)
	}
	return p.errBare(t)
}

// errBare explains a value nobody said the meaning of.
func (p *parser) errBare(t token) *Error {
	hint := "write host " + t.text + " or net " + t.text
	switch t.kind {
	case tokNumber:
		hint = "write port " + t.text + " or proto " + t.text
	case tokMAC:
		hint = "write ether host " + t.text
	}
	return p.errAt(t, hint, "%s without a word that says what it is", t.describe())
}

func wordHint(word string) string {
	if _, ok := portNames[word]; ok {
		return "write port " + word
	}
	if hint := didYouMean(word, sortedKeys(keywords)); hint != "" {
		return hint
	}
	if hint := didYouMean(word, sortedKeys(numberNames)); hint != "" {
		return hint
	}
	return "expected host, net, port, a protocol, peer, vni, reason, point, dir, inner or outer"
}

// errValue explains a token that cannot be a value under q.
func (p *parser) errValue(t token, q qualifier) *Error {
	head := p.expr[q.at.start:q.at.end]
	if t.kind == tokKeyword {
		return p.errAt(t, `write \`+t.text+" if it is a name", "%q is followed by the keyword %q, not by a value", head, t.text)
	}
	hint := map[quantity]string{
		qtyPort: "for example 80 or http", qtyPortrange: "for example 8000-8010",
		qtyNet: "for example 10.1.0.0/16", qtyProto: "for example 17 or udp", qtyVNI: "a number from 0 to 16777215",
		qtyDir: "in or out", qtyPeer: "a node name or address",
	}[q.qty]
	return p.errAt(t, hint, "%q needs a value, found %s", head, t.describe())
}

// errAfterOperand explains a token where the expression could only go on with
// "and" or "or", or end.
func (p *parser) errAfterOperand(t token) *Error {
	switch {
	case t.isPunct(')'):
		return p.errAt(t, "", `")" without "("`)
	case t.kind == tokPunct && t.punct != '(' && t.punct != '!':
		hint := ""
		if strings.ContainsRune("+-*/%&|^", rune(t.punct)) {
			hint = "arithmetic is possible on numbers, len and PROTO[EXPR]"
		}
		return p.errAt(t, hint, "unexpected %s", t.describe())
	}
	if hint := didYouMean(t.text, sortedKeys(keywords)); t.kind == tokWord && hint != "" {
		return p.errAt(t, hint, "unknown word %q", t.text)
	}
	return p.errAt(t, `join with "and" or "or"`, "%s follows a complete primitive", t.describe())
}
