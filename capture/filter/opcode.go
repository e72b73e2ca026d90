package filter

// opcode is an operation of a program: an instruction of classic BPF under a
// dense number, or, from jHas on, a test on Meta.
type opcode uint8

const (
	ldAbsB opcode = iota // A = packet[k], 1, 2 or 4 bytes, big endian
	ldAbsH
	ldAbsW
	ldIndB // A = packet[X+k]
	ldIndH
	ldIndW
	ldLen  // A = length of the packet
	ldImm  // A = k
	ldMem  // A = M[k]
	ldxMSH // X = 4 * (packet[k] & 15)
	ldxMem // X = M[k]
	st     // M[k] = A
	tax    // X = A

	addK // A += k, and so on
	subK
	mulK
	divK
	modK
	andK
	orK
	xorK
	lshK
	rshK
	addX // A += X, in the order of the K forms
	subX
	mulX
	divX
	modX
	andX
	orX
	xorX
	lshX
	rshX

	jeqK // skip jt instructions if A == k, else jf
	jgtK
	jgeK
	jsetK // A & k != 0
	jeqX  // with X, in the order of the K forms; nothing needs jset with X
	jgtX
	jgeX

	ret // the verdict: k != 0

	jHas    // the record has the bytes of scope k
	jLayer  // Meta.Layer == k
	jDir    // Meta.Dir == k
	jPoint  // Meta.Point == k
	jReason // Meta.Dropped && Meta.Reason == k
	jVNI    // Meta.Tagged && Meta.VNI == k
	jPeer   // Meta.Peer is one of peers[k]
)

const (
	aluXOffset  = addX - addK
	jumpXOffset = jeqX - jeqK
)

// scratchSlots is the number of M registers, as in classic BPF.
const scratchSlots = 16

// instr is one instruction. jt and jf count the instructions to skip.
type instr struct {
	op     opcode
	jt, jf int
	k      uint32
}

var aluK = map[arithOp]opcode{
	'+': addK, '-': subK, '*': mulK, '/': divK, '%': modK,
	'&': andK, '|': orK, '^': xorK, punctShl: lshK, punctShr: rshK,
}

// holds applies a conditional jump to two numbers.
func holds(jump opcode, a, k uint32) bool {
	switch jump {
	case jeqK:
		return a == k
	case jgtK:
		return a > k
	case jgeK:
		return a >= k
	}
	return a&k != 0
}

// Classic BPF encodings (linux/bpf_common.h), by opcode.
var classic = [...]uint16{
	ldAbsB: 0x30, ldAbsH: 0x28, ldAbsW: 0x20,
	ldIndB: 0x50, ldIndH: 0x48, ldIndW: 0x40,
	ldLen: 0x80, ldImm: 0x00, ldMem: 0x60,
	ldxMSH: 0xb1, ldxMem: 0x61, st: 0x02, tax: 0x07,
	addK: 0x04, subK: 0x14, mulK: 0x24, divK: 0x34, modK: 0x94,
	andK: 0x54, orK: 0x44, xorK: 0xa4, lshK: 0x64, rshK: 0x74,
	addX: 0x0c, subX: 0x1c, mulX: 0x2c, divX: 0x3c, modX: 0x9c,
	andX: 0x5c, orX: 0x4c, xorX: 0xac, lshX: 0x6c, rshX: 0x7c,
	jeqK: 0x15, jgtK: 0x25, jgeK: 0x35, jsetK: 0x45,
	jeqX: 0x1d, jgtX: 0x2d, jgeX: 0x3d,
	ret: 0x06,
}

// classicJump is the unconditional jump, which only the classic form needs.
const classicJump = 0x05
