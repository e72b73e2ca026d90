package filter

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// tokenKind classifies a token.
type tokenKind uint8

const (
	tokEnd    tokenKind = iota // the end of the expression
	tokWord                    // a name that is no keyword, or \ and any name
	tokNumber                  // 80, 0x50, 0120, tcp-syn
	tokDotted                  // 10.1, 10.1.2, 10.1.2.3
	tokIPv6                    // 2001:db8::1
	tokMAC                     // 02:00:00:00:00:01
	tokKeyword
	tokPunct
)

// token is a piece of the expression. For tokPunct, punct is the character,
// or one of the punct constants; for tokKeyword, key and proto say which.
type token struct {
	kind       tokenKind
	punct      byte
	key        keyword
	proto      proto
	start, end int
	num        uint32
	text       string
}

// Operators of more than one character, and of words.
const (
	punctAnd = 'A' + iota // and, &&
	punctOr               // or, ||
	punctGE               // >=
	punctLE               // <=
	punctNE               // !=
	punctShl              // <<
	punctShr              // >>
)

// keyword is the grammatical role of a reserved word.
type keyword uint8

const (
	keyNone keyword = iota
	keySrc
	keyDst
	keyHost
	keyNet
	keyMask
	keyPort
	keyPortrange
	keyProto
	keyLess
	keyGreater
	keyLen
	keyBroadcast
	keyMulticast
	keyProtoName // proto says which
	keyPeer
	keyVNI
	keyReason
	keyPoint
	keyDir
	keyInbound
	keyOutbound
	keyInner
	keyOuter
)

// proto is a protocol qualifier.
type proto uint8

const (
	anyProto proto = iota
	pEther
	pIP
	pARP
	pRARP
	pIP6
	pTCP
	pUDP
	pSCTP
	pICMP
	pICMP6
	pIGMP
	pIGRP
	pPIM
	pVRRP
	pAH
	pESP
)

var keywords = map[string]token{
	"src": {key: keySrc}, "dst": {key: keyDst},
	"host": {key: keyHost}, "net": {key: keyNet}, "mask": {key: keyMask},
	"port": {key: keyPort}, "portrange": {key: keyPortrange}, "proto": {key: keyProto},
	"less": {key: keyLess}, "greater": {key: keyGreater},
	"len": {key: keyLen}, "length": {key: keyLen},
	"broadcast": {key: keyBroadcast}, "multicast": {key: keyMulticast},

	"ether": {key: keyProtoName, proto: pEther}, "link": {key: keyProtoName, proto: pEther},
	"ip": {key: keyProtoName, proto: pIP}, "ip6": {key: keyProtoName, proto: pIP6},
	"arp": {key: keyProtoName, proto: pARP}, "rarp": {key: keyProtoName, proto: pRARP},
	"tcp": {key: keyProtoName, proto: pTCP}, "udp": {key: keyProtoName, proto: pUDP},
	"sctp": {key: keyProtoName, proto: pSCTP}, "icmp": {key: keyProtoName, proto: pICMP},
	"icmp6": {key: keyProtoName, proto: pICMP6}, "igmp": {key: keyProtoName, proto: pIGMP},
	"igrp": {key: keyProtoName, proto: pIGRP}, "pim": {key: keyProtoName, proto: pPIM},
	"vrrp": {key: keyProtoName, proto: pVRRP}, "carp": {key: keyProtoName, proto: pVRRP},
	"ah": {key: keyProtoName, proto: pAH}, "esp": {key: keyProtoName, proto: pESP},

	"peer": {key: keyPeer}, "vni": {key: keyVNI}, "reason": {key: keyReason},
	"point": {key: keyPoint}, "dir": {key: keyDir}, "direction": {key: keyDir},
	"inbound": {key: keyInbound}, "outbound": {key: keyOutbound},
	"inner": {key: keyInner}, "outer": {key: keyOuter},
}

// foreign are words of pcap-filter(7) left out on purpose, with the reason.
var foreign = map[string]string{
	"vlan":       "packets of the overlay carry no VLAN tag",
	"mpls":       "packets of the overlay carry no MPLS label",
	"pppoed":     "packets of the overlay are not PPPoE",
	"pppoes":     "packets of the overlay are not PPPoE",
	"geneve":     "packets of the overlay are not Geneve",
	"vxlan":      `the tunnel is already open; select with "vni N", "inner" and "outer"`,
	"gateway":    "no Ethernet address to compare; use host",
	"protochain": "use proto",
	"byte":       "use ether[N]",
	"on":         `select the tap with "point NAME"`,
	"ifname":     `select the tap with "point NAME"`,
	"action":     `use "point drop"`,
	"llc":        "frames of the overlay are Ethernet II",
	"wlan":       "use ether",
	"ppp":        "use ether",
	"iso":        "the overlay carries IPv4 only",
	"stp":        "the overlay carries IPv4 only",
	"ipx":        "the overlay carries IPv4 only",
}

// macPattern matches an Ethernet address: six groups of one or two digits
// joined by one of ":", "-" and ".", three groups of four joined by ".", or
// twelve digits.
var macPattern = func() *regexp.Regexp {
	r := regexp.MustCompile(`^(` +
		`[0-9A-Fa-f]{1,2}(:[0-9A-Fa-f]{1,2}){5}|` +
		`[0-9A-Fa-f]{1,2}(-[0-9A-Fa-f]{1,2}){5}|` +
		`[0-9A-Fa-f]{1,2}(\.[0-9A-Fa-f]{1,2}){5}|` +
		`[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}|` +
		`[0-9A-Fa-f]{12})`)
	r.Longest()
	return r
}()

// lex splits an expression into tokens. The last one is always tokEnd.
func lex(expr string) ([]token, *Error) {
	var toks []token
	for pos := 0; pos < len(expr); {
		switch expr[pos] {
		case ' ', '\t', '\r', '\n':
			pos++
			continue
		}
		t, err := lexOne(expr, pos)
		if err != nil {
			return nil, err
		}
		toks = append(toks, t)
		pos = t.end
	}
	return append(toks, token{kind: tokEnd, start: len(expr), end: len(expr)}), nil
}

// lexOne reads the token at pos: of all the forms that match there the longest
// wins, and of equally long ones the first listed here.
func lexOne(expr string, pos int) (token, *Error) {
	s := expr[pos:]
	best, kind := 0, tokEnd
	consider := func(k tokenKind, n int) {
		if n > best {
			best, kind = n, k
		}
	}
	consider(tokMAC, len(macPattern.FindString(s[:min(len(s), len("ff:ff:ff:ff:ff:ff"))])))
	consider(tokNumber, numberLen(s))
	consider(tokDotted, dottedLen(s))
	consider(tokIPv6, ipv6Len(s))
	consider(tokWord, wordLen(s))
	consider(tokPunct, punctLen(s))

	t := token{kind: kind, start: pos, end: pos + best, text: s[:best]}
	switch kind {
	case tokEnd:
		return t, &Error{Expr: expr, Start: pos, End: pos + 1,
			Msg: fmt.Sprintf("unexpected character %q", firstRune(s))}
	case tokPunct:
		t.punct = punctOf(t.text)
	case tokNumber:
		n, err := strconv.ParseUint(t.text, 0, 32)
		if err != nil {
			return t, numberError(expr, t)
		}
		t.num = uint32(n)
	case tokWord:
		return classifyWord(t), nil
	}
	return t, nil
}

// classifyWord turns a word into a keyword, an operator or a number where it
// stands for one. A backslash keeps it a name.
func classifyWord(t token) token {
	if t.text[0] == '\\' {
		t.text = t.text[1:]
		return t
	}
	switch t.text {
	case "and":
		t.kind, t.punct = tokPunct, punctAnd
		return t
	case "or":
		t.kind, t.punct = tokPunct, punctOr
		return t
	case "not":
		t.kind, t.punct = tokPunct, '!'
		return t
	}
	if k, ok := keywords[t.text]; ok {
		t.kind, t.key, t.proto = tokKeyword, k.key, k.proto
	} else if n, ok := numberNames[t.text]; ok {
		t.kind, t.num = tokNumber, n
	}
	return t
}

func numberError(expr string, t token) *Error {
	e := &Error{Expr: expr, Start: t.start, End: t.end, Msg: "number " + t.text + " does not fit 32 bits"}
	if t.text[0] == '0' && strings.ContainsAny(t.text, "89") && !strings.ContainsAny(t.text, "xX") {
		e.Msg = "number " + t.text + " starts with 0, which makes it octal, but has a digit above 7"
		e.Hint = "drop the leading 0"
	}
	return e
}

// run returns how many bytes at the start of s belong to a class.
func run(s string, class func(byte) bool) int {
	n := 0
	for n < len(s) && class(s[n]) {
		n++
	}
	return n
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func isHex(c byte) bool {
	return isDigit(c) || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

func isAlnum(c byte) bool {
	return isDigit(c) || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// numberLen returns the length of a decimal, octal or hexadecimal number.
func numberLen(s string) int {
	if len(s) > 2 && s[0] == '0' && (s[1] == 'x' || s[1] == 'X') && isHex(s[2]) {
		return 2 + run(s[2:], isHex)
	}
	return run(s, isDigit)
}

// dottedLen returns the length of two to four numbers joined by dots.
func dottedLen(s string) int {
	n, parts := run(s, isDigit), 1
	for n > 0 && parts < 4 && n < len(s) && s[n] == '.' {
		more := run(s[n+1:], isDigit)
		if more == 0 {
			break
		}
		n += 1 + more
		parts++
	}
	if parts == 1 {
		return 0
	}
	return n
}

// wordLen returns the length of a name: letters, digits, dots, and inside it
// hyphens and underscores; or a backslash and anything up to a delimiter.
func wordLen(s string) int {
	if s[0] == '\\' {
		if n := run(s[1:], func(c byte) bool { return !strings.ContainsRune(" !()\n\t", rune(c)) }); n > 0 {
			return 1 + n
		}
		return 0
	}
	if !isAlnum(s[0]) {
		return 0
	}
	n := run(s, func(c byte) bool { return isAlnum(c) || c == '-' || c == '_' || c == '.' })
	for s[n-1] == '-' || s[n-1] == '_' {
		n--
	}
	return n
}

// ipv6Len returns the length of the longest IPv6 address s starts with.
func ipv6Len(s string) int {
	const longestForm = len("ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255")
	n := 0
	for n < len(s) && n < longestForm && (isHex(s[n]) || s[n] == ':' || s[n] == '.') {
		n++
	}
	if !strings.Contains(s[:n], ":") {
		return 0
	}
	for ; n >= 2; n-- {
		if a, err := netip.ParseAddr(s[:n]); err == nil && a.Is6() {
			return n
		}
	}
	return 0
}

func firstRune(s string) rune {
	for _, r := range s {
		return r
	}
	return 0
}

// punctLen returns the length of the operator s starts with, or 0.
func punctLen(s string) int {
	if len(s) >= 2 && punctOf(s[:2]) != 0 {
		return 2
	}
	if punctOf(s[:1]) != 0 {
		return 1
	}
	return 0
}

func punctOf(s string) byte {
	switch s {
	case "&&":
		return punctAnd
	case "||":
		return punctOr
	case ">=":
		return punctGE
	case "<=":
		return punctLE
	case "!=":
		return punctNE
	case "==":
		return '='
	case "<<":
		return punctShl
	case ">>":
		return punctShr
	}
	if len(s) == 1 && strings.Contains("+-*/%:[]!<>()&|^=", s) {
		return s[0]
	}
	return 0
}
