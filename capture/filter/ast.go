package filter

// The tree the parser makes and the lowering step reads. Every node that can
// be refused later knows the bytes of the expression it came from.

// span is a range of bytes of the expression.
type span struct{ start, end int }

// scope says which bytes a primitive looks at.
type scope uint8

const (
	scopeRecord scope = iota // the record itself
	scopeInner               // the packet in the tunnel
	scopeOuter               // the datagram around it
)

// direction is a src/dst qualifier.
type direction uint8

const (
	dirDefault direction = iota
	dirSrc
	dirDst
	dirSrcOrDst
	dirSrcAndDst
)

// quantity is what kind of thing a value is: the type qualifier.
type quantity uint8

const (
	qtyUndefined quantity = iota // nothing to carry over: a bare value is an error
	qtyDefault                   // "src 10.1.2.3": a host unless the value says otherwise
	qtyHost
	qtyNet
	qtyPort
	qtyPortrange
	qtyProto
	qtyPeer
	qtyVNI
	qtyReason
	qtyPoint
	qtyDir
)

// own reports whether the quantity is decided on Meta.
func (q quantity) own() bool { return q >= qtyPeer }

// qualifier is everything before a value, and what a later bare value inherits.
type qualifier struct {
	proto proto
	dir   direction
	qty   quantity
	scope scope
	at    span
}

type expr interface{ isExpr() }

type andExpr struct{ l, r expr }
type orExpr struct{ l, r expr }
type notExpr struct{ x expr }

// primExpr is a qualified value.
type primExpr struct {
	q     qualifier
	value token
	// mask is the token after "/" or "mask"; its kind is tokEnd without one.
	mask token
}

// protoExpr is a protocol name alone.
type protoExpr struct {
	proto proto
	scope scope
	at    span
}

// castExpr is "broadcast" or "multicast", after an optional protocol.
type castExpr struct {
	key   keyword
	proto proto
	scope scope
	at    span
}

// sizeExpr is "less N" (greater false) or "greater N".
type sizeExpr struct {
	greater bool
	n       uint32
	scope   scope
}

// relExpr compares two arithmetic expressions; op is a punct.
type relExpr struct {
	op    byte
	l, r  *arith
	scope scope
	at    span
}

// kindExpr is "inner", "outer", "inbound" or "outbound" alone.
type kindExpr struct{ key keyword }

func (*andExpr) isExpr()   {}
func (*orExpr) isExpr()    {}
func (*notExpr) isExpr()   {}
func (*primExpr) isExpr()  {}
func (*protoExpr) isExpr() {}
func (*castExpr) isExpr()  {}
func (*sizeExpr) isExpr()  {}
func (*relExpr) isExpr()   {}
func (*kindExpr) isExpr()  {}

// arith is an arithmetic expression on unsigned 32-bit numbers.
type arith struct {
	op arithOp
	at span
	// l and r are the operands; l alone for arithNeg and, as the index, arithLoad.
	l, r *arith
	num  uint32 // arithNum
	// proto and size (1, 2 or 4 bytes) belong to arithLoad.
	proto proto
	size  uint8
}

// arithOp is a punct for a binary operator, or one of these.
type arithOp byte

const (
	arithNum  arithOp = 'n'
	arithLen  arithOp = 'l'
	arithLoad arithOp = '['
	arithNeg  arithOp = '~'
)
