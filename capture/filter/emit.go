package filter

import "golang.org/x/net/bpf"

// registers is what A and X are known to hold.
type registers struct {
	a load // kind loadNone: unknown
	x load // a loadBehind whose header length X holds, or unknown
}

// merge keeps what two ways to a block agree on.
func (r registers) merge(o registers) registers {
	if r.a != o.a {
		r.a = load{}
	}
	if r.x != o.x {
		r.x = load{}
	}
	return r
}

// headerOf is the part of a load that determines X.
func headerOf(l load) load { return load{kind: loadBehind, base: l.base} }

// emit lays out a graph that tests bytes of the record only, every jump
// forward, the two verdicts last. Loads whose result is still in its register
// are left out.
func emit(root *block) []instr {
	blocks := order(root)
	state := map[*block]registers{root: {}}
	start := map[*block]int{}
	var code []instr
	for _, b := range blocks {
		start[b] = len(code)
		after := state[b]
		code = emitLoad(code, b.test, &after)
		code = append(code, instr{op: b.test.jump, k: b.test.k})
		for _, to := range []*block{b.t, b.f} {
			if known, ok := state[to]; ok {
				state[to] = known.merge(after)
			} else {
				state[to] = after
			}
		}
	}
	verdicts := len(code)
	start[acceptBlock], start[rejectBlock] = verdicts, verdicts+1
	for i, b := range blocks {
		at := verdicts - 1 // the jump is the last instruction of its block
		if i+1 < len(blocks) {
			at = start[blocks[i+1]] - 1
		}
		code[at].jt = start[b.t] - at - 1
		code[at].jf = start[b.f] - at - 1
	}
	if root == rejectBlock {
		return []instr{{op: ret}}
	}
	return append(code, instr{op: ret, k: snapLen}, instr{op: ret})
}

// emitLoad appends what brings the operand of t into A.
func emitLoad(code []instr, t *test, r *registers) []instr {
	l := t.load
	if l.kind != loadCode && r.a == l {
		return code
	}
	switch l.kind {
	case loadCode:
		r.a, r.x = load{}, load{}
		return append(code, t.code...)
	case loadLength:
		code = append(code, instr{op: ldLen})
	case loadAbs:
		code = append(code, instr{op: ldAbs(l.size), k: l.off})
	case loadBehind:
		if r.x != headerOf(l) {
			code = append(code, instr{op: ldxMSH, k: l.base})
			r.x = headerOf(l)
		}
		code = append(code, instr{op: ldInd(l.size), k: l.off})
	}
	if l.mask != noMask {
		code = append(code, instr{op: andK, k: l.mask})
	}
	r.a = l
	return code
}

// toClassic encodes code as classic BPF. Its conditional jumps reach 255 instructions; a longer one goes through an unconditional jump
// placed right behind. The code is walked backwards, so that the distance to
// every target is final when a jump to it is written.
func toClassic(code []instr) []bpf.RawInstruction {
	var out []bpf.RawInstruction // reversed
	written := make([]int, len(code)+1)
	for i := len(code) - 1; i >= 0; i-- {
		in := code[i]
		raw := bpf.RawInstruction{Op: classic[in.op], K: in.k}
		if in.op >= jeqK && in.op <= jgeX {
			// written[n] counts the instructions from n to the end.
			t, f := written[i+1+in.jt], written[i+1+in.jf]
			far := func(target int) int {
				out = append(out, bpf.RawInstruction{Op: classicJump, K: uint32(len(out) - target)})
				return len(out)
			}
			// One of them may push the other out of reach, so both look one ahead.
			if len(out)+1-f > 255 {
				f = far(f)
			}
			if len(out)-t > 255 {
				t = far(t)
			}
			raw.Jt, raw.Jf = uint8(len(out)-t), uint8(len(out)-f)
		}
		out = append(out, raw)
		written[i] = len(out)
	}
	for i, j := 0, len(out)-1; i < j; i, j = i+1, j-1 {
		out[i], out[j] = out[j], out[i]
	}
	return out
}
