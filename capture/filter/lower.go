package filter

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// lowerer turns the tree into conditions and refuses what has no meaning.
type lowerer struct {
	text string
	opt  *Options
	own  ownTables
	// never is the first primitive that can match nothing on this link type.
	never *Error
}

func (w *lowerer) errAt(at span, hint, format string, args ...any) *Error {
	return &Error{Expr: w.text, Start: at.start, End: at.end, Msg: fmt.Sprintf(format, args...), Hint: hint}
}

// layer returns the view of a scope. Inside and outside the tunnel it is
// always an IP packet; only the record itself can have an Ethernet header.
func (w *lowerer) layer(s scope) layer {
	if s != scopeRecord {
		return layer{link: LinkIPv4, scope: s}
	}
	y := layer{link: w.opt.Link}
	if y.link == LinkEthernet {
		y.nl = 14
	}
	return y
}

// scoped guards c so that it is false where the record has no such bytes.
func scoped(s scope, c cond) cond {
	if s == scopeRecord {
		return c
	}
	return and(&test{jump: jHas, k: uint32(s)}, c)
}

func (w *lowerer) lower(e expr) (cond, *Error) {
	switch e := e.(type) {
	case *andExpr:
		return w.lowerPair(e.l, e.r, and)
	case *orExpr:
		return w.lowerPair(e.l, e.r, or)
	case *notExpr:
		c, err := w.lower(e.x)
		if err != nil {
			return nil, err
		}
		return not(c), nil
	case *protoExpr:
		if e.proto == pEther {
			return nil, w.errAt(e.at, "write ether host MAC or ether proto N", `"ether" alone selects nothing`)
		}
		return w.guard(e.scope, e.at, w.layer(e.scope).protocol(e.proto)), nil
	case *sizeExpr:
		return scoped(e.scope, w.layer(e.scope).length(e.greater, e.n)), nil
	case *castExpr:
		return w.lowerCast(e)
	case *relExpr:
		return w.lowerRelation(e)
	case *kindExpr:
		return lowerKind(e.key), nil
	case *primExpr:
		return w.lowerPrim(e)
	}
	panic(fmt.Sprintf("filter: no lowering for %T", e))
}

func (w *lowerer) lowerPair(l, r expr, join func(...cond) cond) (cond, *Error) {
	cl, err := w.lower(l)
	if err != nil {
		return nil, err
	}
	cr, err := w.lower(r)
	if err != nil {
		return nil, err
	}
	return join(cl, cr), nil
}

// guard adds the scope to c and remembers the first primitive that is false
// for every packet.
func (w *lowerer) guard(s scope, at span, c cond) cond {
	if c == cond(condBool(false)) && w.never == nil {
		w.never = w.errAt(at, "the bytes it looks at are always an IPv4 packet",
			"%q matches no packet here", w.text[at.start:at.end])
	}
	return scoped(s, c)
}

func (w *lowerer) lowerCast(e *castExpr) (cond, *Error) {
	y := w.layer(e.scope)
	word := w.text[e.at.start:e.at.end]
	switch {
	case e.key == keyMulticast && (e.proto == pIP || e.proto == pIP6):
		return w.guard(e.scope, e.at, y.multicast(e.proto)), nil
	case e.key == keyBroadcast && e.proto == pIP:
		return nil, w.errAt(e.at, "write dst host and the broadcast address", "%q needs a netmask nobody told", word)
	case e.proto != anyProto && e.proto != pEther:
		return nil, w.errAt(e.at, "", "%q is no primitive", word)
	case y.link != LinkEthernet:
		hint := "write dst host 255.255.255.255"
		if e.key == keyMulticast {
			hint = "write ip multicast"
		}
		return nil, w.errAt(e.at, hint, "%q looks at Ethernet addresses, and these packets have none", word)
	case e.key == keyBroadcast:
		return scoped(e.scope, y.ethernet(dirDst, [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})), nil
	}
	return scoped(e.scope, y.multicast(anyProto)), nil
}

func (w *lowerer) lowerPrim(e *primExpr) (cond, *Error) {
	if e.q.qty.own() {
		return w.lowerOwn(e)
	}
	y := w.layer(e.q.scope)
	var c cond
	var err *Error
	switch e.q.qty {
	case qtyPort, qtyPortrange:
		c, err = w.lowerPort(y, e)
	case qtyProto:
		c, err = w.lowerProto(y, e)
	default:
		c, err = w.lowerHost(y, e)
	}
	if err != nil {
		return nil, err
	}
	at := e.value.span()
	if e.q.at.end <= at.start {
		at.start = e.q.at.start
	}
	return w.guard(e.q.scope, at, c), nil
}

// lowerHost handles host, net and bare src and dst.
func (w *lowerer) lowerHost(y layer, e *primExpr) (cond, *Error) {
	v := e.value
	if v.kind == tokMAC || e.q.proto == pEther {
		return w.lowerEthernet(y, e)
	}
	kind := "host"
	if e.q.qty == qtyNet {
		kind = "net"
	}
	if v.kind == tokWord {
		return nil, w.errAt(v.span(), "write an address, or peer NAME for the traffic of a node",
			"names such as %q are not looked up", v.text)
	}
	switch {
	case e.q.proto == pIP6 && v.kind != tokIPv6, e.q.proto == pIP && v.kind == tokIPv6:
		return nil, w.errAt(v.span(), "", "%q does not fit the address %s", protocols[e.q.proto].name, v.text)
	case e.q.proto > pIP6, e.q.proto > pIP && v.kind == tokIPv6 && e.q.proto != pIP6:
		name := protocols[e.q.proto].name
		return nil, w.errAt(e.q.at, fmt.Sprintf("write %s and %s %s", name, kind, v.text),
			"%q does not say which addresses: %s is no address family", name, name)
	}
	if e.mask.kind != tokEnd && e.q.qty != qtyNet && !(v.kind == tokIPv6 && e.mask.num == 128) {
		return nil, w.errAt(span{v.start, e.mask.end}, "write net "+w.text[v.start:e.mask.end],
			"a prefix belongs to a network")
	}
	if v.kind == tokIPv6 {
		addr := netip.MustParseAddr(v.text)
		bits := 128
		if e.mask.kind != tokEnd {
			bits = int(min(e.mask.num, 129))
		}
		if bits > 128 {
			return nil, w.errAt(e.mask.span(), "", "a prefix length of IPv6 is at most 128, not %s", e.mask.text)
		}
		if netip.PrefixFrom(addr, bits).Masked().Addr() != addr {
			return nil, w.errHostBits(e, netip.PrefixFrom(addr, bits).Masked().String())
		}
		return y.host6(e.q.dir, addr.As16(), bits), nil
	}
	addr, mask, err := w.address4(e)
	if err != nil {
		return nil, err
	}
	return y.host4(e.q.proto, e.q.dir, addr, mask), nil
}

func (w *lowerer) errHostBits(e *primExpr, network string) *Error {
	at := span{e.value.start, e.mask.end}
	return w.errAt(at, "write net "+network, "%s has bits set outside its mask", w.text[at.start:at.end])
}

// address4 reads an IPv4 address or network with its mask. Missing octets of
// the dotted form shorten the mask; a plain number is a whole address after
// "host" and the first octets of a network after "net".
func (w *lowerer) address4(e *primExpr) (addr, mask uint32, err *Error) {
	v := e.value
	if v.kind == tokNumber {
		addr, mask = v.num, noMask
		if e.q.qty == qtyNet {
			for addr != 0 && addr>>24 == 0 {
				addr, mask = addr<<8, mask<<8
			}
		}
	} else if addr, mask, err = w.dotted(v); err != nil {
		return 0, 0, err
	}
	switch {
	case e.mask.kind == tokEnd:
		return addr, mask, nil
	case e.mask.kind == tokDotted && strings.Contains(e.mask.text, "."):
		if mask, _, err = w.dotted(e.mask); err != nil {
			return 0, 0, err
		}
	case e.mask.kind == tokDotted:
		// "mask 255" for "mask 255.0.0.0", as "net 10" for "net 10.0.0.0".
		if e.mask.num > 255 {
			return 0, 0, w.errAt(e.mask.span(), "for example mask 255.255.0.0", "bad mask %s", e.mask.text)
		}
		mask = e.mask.num << 24
	case e.mask.num > 32:
		return 0, 0, w.errAt(e.mask.span(), "", "a prefix length of IPv4 is at most 32, not %s", e.mask.text)
	default:
		mask = prefixMask(int(e.mask.num))
	}
	if addr&^mask != 0 {
		network := netip.AddrFrom4([4]byte{byte(addr & mask >> 24), byte(addr & mask >> 16), byte(addr & mask >> 8), byte(addr & mask)}).String()
		return 0, 0, w.errHostBits(e, network+w.text[v.end:e.mask.end])
	}
	return addr, mask, nil
}

// dotted reads one to four decimal octets into the top of addr.
func (w *lowerer) dotted(t token) (addr, mask uint32, err *Error) {
	octets := strings.Split(t.text, ".")
	for _, o := range octets {
		n, convErr := strconv.ParseUint(o, 10, 8)
		if convErr != nil {
			return 0, 0, w.errAt(t.span(), "each part is a decimal number from 0 to 255", "bad IPv4 address %s", t.text)
		}
		addr = addr<<8 | uint32(n)
	}
	missing := 8 * (4 - len(octets))
	return addr << missing, prefixMask(32 - missing), nil
}

func (w *lowerer) lowerEthernet(y layer, e *primExpr) (cond, *Error) {
	v := e.value
	switch {
	case v.kind != tokMAC:
		return nil, w.errAt(v.span(), "for example ether host 02:00:00:00:00:01", "%q needs an Ethernet address, not %s", "ether", v.text)
	case e.q.proto != pEther || e.q.qty == qtyNet:
		return nil, w.errAt(v.span(), "write ether host "+v.text, "%s is an Ethernet address", v.text)
	case y.link != LinkEthernet:
		return nil, w.errAt(e.q.at, "", "these packets have no Ethernet header")
	}
	return y.ethernet(e.q.dir, parseMAC(v.text)), nil
}

// parseMAC reads the forms macPattern accepts.
func parseMAC(s string) (mac [6]byte) {
	groups := strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(":-.", r) })
	var digits strings.Builder
	for _, g := range groups {
		if len(g) == 1 {
			digits.WriteByte('0')
		}
		digits.WriteString(g)
	}
	n, _ := strconv.ParseUint(digits.String(), 16, 48)
	for i := range mac {
		mac[i] = byte(n >> (40 - 8*i))
	}
	return mac
}

func (w *lowerer) lowerPort(y layer, e *primExpr) (cond, *Error) {
	var number uint32
	switch e.q.proto {
	case anyProto:
	case pTCP, pUDP, pSCTP:
		number = protocols[e.q.proto].number
	default:
		name := protocols[e.q.proto].name
		return nil, w.errAt(e.q.at, "only tcp, udp and sctp have ports; write "+name+" and port "+e.value.text,
			"%q has no ports", name)
	}
	v := e.value
	if e.mask.kind != tokEnd || v.kind != tokNumber && v.kind != tokWord {
		return nil, w.errAt(v.span(), "for example port 80", "%s is not a port", v.text)
	}
	lo, hi, named, ok := v.num, v.num, uint32(0), v.num <= 65535
	if v.kind == tokWord {
		if e.q.qty == qtyPortrange {
			lo, hi, named, ok = lookupPortRange(v.text)
		} else {
			var p port
			p, ok = lookupPort(v.text)
			lo, hi, named = uint32(p.number), uint32(p.number), uint32(p.proto)
		}
	}
	if !ok {
		return nil, w.errPort(e)
	}
	if number != 0 && named != 0 && number != named {
		return nil, w.errAt(v.span(), "write the port as a number", "the port %q is not used with %s", v.text, protocols[e.q.proto].name)
	}
	return y.ports(max(number, named), e.q.dir, lo, hi), nil
}

func (w *lowerer) errPort(e *primExpr) *Error {
	v := e.value
	if e.q.qty == qtyPortrange {
		return w.errAt(v.span(), "for example portrange 8000-8010, without spaces", "%q is not a port range", v.text)
	}
	if v.kind == tokNumber {
		return w.errAt(v.span(), "", "a port is at most 65535, not %s", v.text)
	}
	if _, _, _, ok := lookupPortRange(v.text); ok {
		return w.errAt(v.span(), "write portrange "+v.text, "%q is a port range", v.text)
	}
	hint := didYouMean(v.text, sortedKeys(portNames))
	if hint == "" {
		hint = "write the port as a number"
	}
	return w.errAt(v.span(), hint, "unknown port %q", v.text)
}

func (w *lowerer) lowerProto(y layer, e *primExpr) (cond, *Error) {
	names := ipProtoNames
	v := e.value
	switch e.q.proto {
	case pEther:
		names = etherNames
	case anyProto, pIP, pIP6:
	default:
		name := protocols[e.q.proto].name
		return nil, w.errAt(e.q.at, "write proto, ip proto or ether proto", "%q carries no protocol number", name)
	}
	number, ok := v.num, v.kind == tokNumber && e.mask.kind == tokEnd
	if v.kind == tokWord {
		number, ok = names[v.text]
	}
	if !ok {
		hint := didYouMean(v.text, sortedKeys(names))
		if hint == "" {
			hint = "write the protocol as a number"
		}
		return nil, w.errAt(v.span(), hint, "unknown protocol %q", v.text)
	}
	switch e.q.proto {
	case pEther:
		if number <= 1500 {
			return nil, w.errAt(v.span(), "an ethertype is at least 0x600", "%s is the length of an 802.3 frame", v.text)
		}
		return y.ethertype(number), nil
	case pIP:
		return y.ipProto(number, true, false), nil
	case pIP6:
		return y.ipProto(number, false, true), nil
	}
	return y.ipProto(number, true, true), nil
}
