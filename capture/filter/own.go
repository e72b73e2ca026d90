package filter

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// ownTables holds what tests on Meta refer to by number.
type ownTables struct {
	peers [][]netip.Addr
}

// maxVNI is the largest VXLAN network identifier (RFC 7348 section 5).
const maxVNI = 1<<24 - 1

// lowerKind is the condition of a word that stands alone.
func lowerKind(k keyword) cond {
	switch k {
	case keyInner:
		return &test{jump: jLayer, k: uint32(LayerInner)}
	case keyOuter:
		return &test{jump: jLayer, k: uint32(LayerOuter)}
	case keyInbound:
		return &test{jump: jDir, k: uint32(DirIn)}
	}
	return &test{jump: jDir, k: uint32(DirOut)}
}

// lowerOwn handles the words decided on Meta.
func (w *lowerer) lowerOwn(e *primExpr) (cond, *Error) {
	v := e.value
	switch e.q.qty {
	case qtyPeer:
		return w.lowerPeer(v)
	case qtyVNI:
		if v.kind != tokNumber || v.num > maxVNI {
			return nil, w.errAt(v.span(), "", "a VNI is a number from 0 to %d, not %s", maxVNI, v.describe())
		}
		return &test{jump: jVNI, k: v.num}, nil
	case qtyReason:
		return w.lowerName(v, "drop reason", w.opt.Reasons, jReason)
	case qtyPoint:
		return w.lowerName(v, "tap point", w.opt.Points, jPoint)
	}
	switch v.text {
	case "in":
		return lowerKind(keyInbound), nil
	case "out":
		return lowerKind(keyOutbound), nil
	}
	return nil, w.errAt(v.span(), "in or out", "unknown direction %q", v.text)
}

// lowerName looks v up in a list whose index is the number Meta carries.
func (w *lowerer) lowerName(v token, what string, names []string, jump opcode) (cond, *Error) {
	i := slices.Index(names, v.text)
	if i < 0 {
		hint := didYouMean(v.text, names)
		if hint == "" && len(names) > 0 {
			hint = "one of " + strings.Join(names, ", ")
		}
		return nil, w.errAt(v.span(), hint, "unknown %s %q", what, v.text)
	}
	return &test{jump: jump, k: uint32(i)}, nil
}

func (w *lowerer) lowerPeer(v token) (cond, *Error) {
	var addrs []netip.Addr
	literal, parseErr := netip.ParseAddr(v.text)
	if w.opt.Peers != nil {
		var err error
		if addrs, err = w.opt.Peers(v.text); err != nil && parseErr != nil {
			return nil, w.errAt(v.span(), "", "%s", strings.TrimPrefix(fmt.Sprint(err), "filter: "))
		}
	}
	if len(addrs) == 0 {
		if parseErr != nil {
			return nil, w.errAt(v.span(), "a node name or an address", "unknown peer %q", v.text)
		}
		addrs = []netip.Addr{literal}
	}
	addrs = slices.Clone(addrs)
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	w.own.peers = append(w.own.peers, addrs)
	return &test{jump: jPeer, k: uint32(len(w.own.peers) - 1)}, nil
}
