package filter

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
)

// testOptions know two peers, three taps and three reasons.
func testOptions(link LinkType) Options {
	return Options{
		Link:    link,
		Points:  []string{"tun-in", "wire-out", "drop"},
		Reasons: []string{"no-route", "too-big", "spoofed-source"},
		Peers: func(word string) ([]netip.Addr, error) {
			switch word {
			case "n1":
				return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil
			case "n2", "10.244.2.9", "tcp":
				return []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("198.51.100.2")}, nil
			case "192.0.2.7":
				return nil, nil
			}
			return nil, fmt.Errorf("no peer %q (have: n1, n2)", word)
		},
	}
}

func mustCompile(t testing.TB, expr string, opt Options) *Program {
	t.Helper()
	p, err := Compile(expr, opt)
	if err != nil {
		t.Fatalf("%q: %v", expr, err)
	}
	return p
}

func TestErrorsPointAtTheMistake(t *testing.T) {
	for _, c := range []struct {
		expr, at string // at: the part of expr that is underlined
		column   int
		want     string // part of the message with its hint
	}{
		{"tpc port 80", "tpc", 1, `did you mean "tcp"?`},
		{"tcp prot 80", "prot", 5, `did you mean "port"?`},
		{"tcp xyzzy", "xyzzy", 5, `follows a complete primitive`},
		{"tcp and prot 80", "prot", 9, `did you mean "port"?`},
		{"port htttp", "htttp", 6, `did you mean "http"?`},
		{"tcp udp", "udp", 5, `join with "and" or "or"`},
		{"tcp and", "", 8, "the expression ends"},
		{"and tcp", "and", 1, "a primitive is expected"},
		{"(tcp", "(", 1, "never closed"},
		{"tcp)", ")", 4, `")" without "("`},
		{"()", ")", 2, "unexpected"},
		{"10.1.2.3", "10.1.2.3", 1, "write host 10.1.2.3 or net 10.1.2.3"},
		{"80", "80", 1, "write port 80"},
		{"01:02:03:04:05:06", "01:02:03:04:05:06", 1, "write ether host"},
		{"http", "http", 1, "write port http"},
		{"(port 80) or 443", "443", 14, "write port 443"},
		{"tcp or 80", "80", 8, "write port 80"},
		{"less 10 or 20", "20", 12, "without a word"},
		{"host", "", 5, `"host" needs a value`},
		{"host example.org", "example.org", 6, "peer NAME"},
		{"host 1.2.3.400", "1.2.3.400", 6, "0 to 255"},
		{"host 10.0.0.0/8", "10.0.0.0/8", 6, "write net 10.0.0.0/8"},
		{"src 10.0.0.0/8", "10.0.0.0/8", 5, "write net 10.0.0.0/8"},
		{"net 10.1.2.3/24", "10.1.2.3/24", 5, "write net 10.1.2.0/24"},
		{"net 10.0.0.1 mask 255.0.0.0", "10.0.0.1 mask 255.0.0.0", 5, "write net 10.0.0.0 mask 255.0.0.0"},
		{"net 10.0.0.0/33", "33", 14, "at most 32"},
		{"net 2001:db8::/129", "129", 16, "at most 128"},
		{"net 2001:db8::1/64", "2001:db8::1/64", 5, "write net 2001:db8::/64"},
		{"net 10.0.0.0/x", "x", 14, "prefix length"},
		{"net 2001:db8:: mask 255.0.0.0", "255.0.0.0", 21, "IPv4 mask"},
		{"mask 255.0.0.0", "mask", 1, "after a network"},
		{"port 65536", "65536", 6, "at most 65535"},
		{"port 80-90", "80-90", 6, "write portrange 80-90"},
		{"portrange 80 - 90", "-", 14, `unexpected "-"`},
		{"portrange a-b", "a-b", 11, "for example portrange"},
		{"port 1.2.3.4", "1.2.3.4", 6, "is not a port"},
		{"port 08", "08", 6, "octal"},
		{"port 99999999999", "99999999999", 6, "32 bits"},
		{"udp port http", "http", 10, "not used with udp"},
		{"ip port 80", "ip port", 1, "write ip and port 80"},
		{"port", "", 5, "for example 80 or http"},
		{"port tcp", "tcp", 6, `write \tcp`},
		{"tcp host 1.2.3.4", "tcp host", 1, "write tcp and host 1.2.3.4"},
		{"ip6 host 1.2.3.4", "1.2.3.4", 10, "does not fit"},
		{"ip host ::1", "::1", 9, "does not fit"},
		{"ether host 1.2.3.4", "1.2.3.4", 12, "needs an Ethernet address"},
		{"ether", "ether", 1, "ether host MAC"},
		{"host 1:2:3:4:5:6", "1:2:3:4:5:6", 6, "write ether host"},
		{"tcp proto 6", "tcp proto", 1, "carries no protocol number"},
		{"src proto 6", "proto", 5, "no direction"},
		{"ip proto foo", "foo", 10, "unknown protocol"},
		{"proto icpm", "icpm", 7, `did you mean "icmp"?`},
		{"vlan 5", "vlan", 1, "no VLAN tag"},
		{"gateway foo", "gateway", 1, "use host"},
		{"ip broadcast", "ip broadcast", 1, "netmask"},
		{"tcp multicast", "tcp multicast", 1, "no primitive"},
		{"less", "", 5, "takes a length"},
		{"ip[0:3] = 1", "3", 6, "1, 2 or 4"},
		{"ip[0", "", 5, `expected "]"`},
		{"ip[0]", "", 6, "expected a comparison"},
		{"ip[0] = ", "", 9, "expected a number"},
		{"(ip[0])", ")", 7, "expected a comparison"},
		{"tcp[] = 1", "]", 5, "expected a number"},
		{"esp[0] = 1", "esp[0]", 1, "cannot be indexed"},
		{"len / 0 = 1", "0", 7, "division by zero"},
		{"len << 32 = 1", "32", 8, "more than 31"},
		{"len = 5-3", "5-3", 7, "expected a number"},
		{"len > 5 > 3", ">", 9, `unexpected ">"`},
		{"tcp # comment", "#", 5, `'#'`},
		{"reason no-rout", "no-rout", 8, `did you mean "no-route"?`},
		{"reason xyz", "xyz", 8, "one of no-route, too-big, spoofed-source"},
		{"point tunin", "tunin", 7, `did you mean "tun-in"?`},
		{"peer n3", "n3", 6, "have: n1, n2"},
		{"vni 16777216", "16777216", 5, "0 to 16777215"},
		{"vni blue", "blue", 5, "0 to 16777215"},
		{"dir up", "up", 5, "in or out"},
		{"peer", "", 5, "a node name or address"},
		{"inner inner foo", "foo", 13, "unknown word"},
		{"TCP", "TCP", 1, `did you mean "tcp"?`},
	} {
		_, err := Compile(c.expr, testOptions(LinkEthernet))
		var e *Error
		if !errors.As(err, &e) {
			t.Errorf("%q: got %v, want an *Error", c.expr, err)
			continue
		}
		if e.Column() != c.column || c.expr[e.Start:e.End] != c.at {
			t.Errorf("%q: points at column %d, %q; want %d, %q (%v)", c.expr, e.Column(), c.expr[e.Start:e.End], c.column, c.at, e)
		}
		if !strings.Contains(e.Error(), c.want) {
			t.Errorf("%q: %v; want it to contain %q", c.expr, e, c.want)
		}
	}
}

func TestCaretUnderlinesTheMistake(t *testing.T) {
	_, err := Compile("tcp\tand prot 80", Options{})
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want an *Error", err)
	}
	if got, want := e.Caret(), "tcp and prot 80\n        ^~~~"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	_, err = Compile("tcp and", Options{})
	if errors.As(err, &e); e.Caret() != "tcp and\n       ^" {
		t.Errorf("at the end: got\n%s", e.Caret())
	}
	_, err = Compile("tcp and ä", Options{})
	if errors.As(err, &e); e.Caret() != "tcp and ä\n        ^" {
		t.Errorf("not ASCII: got\n%s", e.Caret())
	}
}

func TestEthernetWordsNeedEthernet(t *testing.T) {
	for _, expr := range []string{"ether host 1:2:3:4:5:6", "broadcast", "multicast", "ether broadcast"} {
		if _, err := Compile(expr, Options{Link: LinkIPv4}); err == nil {
			t.Errorf("%q compiles for packets without Ethernet header", expr)
		}
	}
	if _, err := Compile("tcp", Options{Link: 113}); err == nil || !strings.Contains(err.Error(), "113") {
		t.Errorf("link type 113: got %v", err)
	}
}

func TestNeverNamesTheWordThatMatchesNothing(t *testing.T) {
	for expr, want := range map[string]string{
		"ip6":                                `"ip6" matches no packet here`,
		"tcp and host 2001:db8::1":           `"host 2001:db8::1" matches no packet here`,
		"icmp6[0] = 128":                     `"icmp6[0] = 128" matches no packet here`,
		"tcp and udp":                        "no packet can match",
		"1 = 2":                              "matches no packet",
		"inner arp":                          `"arp" matches no packet here`,
		"tcp and not tcp or ether proto arp": `"ether proto arp" matches no packet here`,
	} {
		err := mustCompile(t, expr, Options{}).Never()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", expr, err, want)
		}
	}
	for _, expr := range []string{"", "tcp", "ip6 or tcp", "not ip6", "peer 10.0.0.1"} {
		if err := mustCompile(t, expr, Options{}).Never(); err != nil {
			t.Errorf("%q: got %v, want nil", expr, err)
		}
	}
}

// tcpPacket is an IPv4 packet with a TCP SYN from 10.0.0.1:1024 to 10.77.2.5:80.
var tcpPacket = []byte{0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 77, 2, 5,
	4, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0}

// udpDatagram is an IPv4 datagram from 192.0.2.1 to 192.0.2.2, port 8472.
var udpDatagram = []byte{0x45, 0, 0, 36, 0, 1, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
	0x30, 0x39, 0x21, 0x18, 0, 16, 0, 0, 8, 0, 0, 0, 0, 0, 1, 0}

func TestOwnWords(t *testing.T) {
	m := &Meta{
		Peer: netip.MustParseAddr("192.0.2.2"), VNI: 7, Tagged: true, Reason: 1, Dropped: true,
		Point: 2, HasPoint: true, Dir: DirOut, Layer: LayerOuter, Inner: tcpPacket, Outer: udpDatagram,
	}
	for expr, want := range map[string]bool{
		"peer n2": true, "peer n1": false, "peer n1 or n2": true, "peer 192.0.2.2": true, "peer 192.0.2.7": false,
		"peer 10.244.2.9": true, "peer tcp": true, "not peer n1": true, "peer not n1": true, "peer (n1 or n2)": true, "peer 198.51.100.2 or n1": false,
		"vni 7": true, "vni 8": false, "vni 8 or 7": true, "vni 0x7": true,
		"reason too-big": true, "reason no-route": false, "reason no-route or too-big": true, "reason no-route or spoofed-source": false,
		"point drop": true, "point tun-in": false, "point tun-in or drop": true, "point (tun-in or wire-out)": false,
		"dir out": true, "dir in": false, "outbound": true, "inbound": false, "direction out": true,
		"outer": true, "inner": false, "not inner": true,
		// The record itself is the datagram.
		"udp": true, "tcp": false, "udp port 8472": true, "len = 36": true,
		"inner tcp": true, "inner tcp port 80": true, "inner udp": false, "inner len = 40": true, "outer len = 36": true,
		"outer host 192.0.2.1": true, "outer tcp": false, "inner host 10.77.2.5": true, "inner host 10.77.2.5 or 10.0.0.9": true,
		"inner src 10.0.0.9 or 10.0.0.1": true, "inner (tcp and host 10.0.0.1) and udp": true, "inner not tcp": false,
		"inner tcp and outer udp and peer n2": true, "inner outer udp": true, "inner tcp[tcpflags] = tcp-syn": true,
		"inner and inner tcp": false, "(inner or outer) and inner tcp": true, "port 81 or inner 80": true, "inner port 81 or 80": true,
		"inner less 40": true, "greater 37": false, "udp and inner len > 36 and len = 36": true,
		"peer n1 and tcp or vni 7 and udp": true, "tcp or peer n1 or reason no-route": false,
	} {
		p := mustCompile(t, expr, testOptions(LinkIPv4))
		if got := p.Match(m, udpDatagram); got != want {
			t.Errorf("%q: got %v, want %v", expr, got, want)
		}
		if _, ok := p.Classic(); ok != (expr == "udp" || expr == "tcp" || expr == "udp port 8472" || expr == "len = 36" || expr == "greater 37") {
			t.Errorf("%q: Classic says %v", expr, ok)
		}
	}
}

func TestOwnWordsAreFalseOnUnknownRecords(t *testing.T) {
	for _, expr := range []string{"peer n1", "vni 0", "reason no-route", "point tun-in", "dir in", "dir out", "inner", "outer", "inner tcp", "outer tcp"} {
		p := mustCompile(t, expr, testOptions(LinkIPv4))
		if p.Match(nil, tcpPacket) || p.Match(&Meta{}, tcpPacket) {
			t.Errorf("%q is true of a record nothing is known about", expr)
		}
		if p := mustCompile(t, "not "+expr, testOptions(LinkIPv4)); !p.Match(nil, tcpPacket) {
			t.Errorf("not %q is false of a record nothing is known about", expr)
		}
	}
}

func TestLengthOfAPacketOfWhichOnlyTheHeadIsSeen(t *testing.T) {
	p := mustCompile(t, "len = 1400 and greater 1400", Options{})
	if !p.Match(&Meta{Len: 1400}, tcpPacket) || p.Match(nil, tcpPacket) {
		t.Error("Meta.Len is not what len compares")
	}
}

func TestNegativeIndexReadsBackwards(t *testing.T) {
	// The byte before the TCP header is the last of the destination address.
	if !mustCompile(t, "tcp[-1] = 5", Options{}).Match(nil, tcpPacket) {
		t.Error("tcp[-1] is not the byte before the header")
	}
	for _, expr := range []string{"ip[-1] = 0 or tcp", "ip[0xffffffff] = 0 or tcp", "not ip[-1] = 0"} {
		if mustCompile(t, expr, Options{}).Match(nil, tcpPacket) {
			t.Errorf("%q: a load before the packet does not reject it", expr)
		}
	}
}

func TestLongExpressionsJumpFar(t *testing.T) {
	tool := needTool(t, "tcpdump")
	hosts := make([]string, 300)
	for i := range hosts {
		hosts[i] = fmt.Sprintf("10.%d.%d.7", i/20, i%20)
	}
	list := strings.Join(hosts, " or ")
	for _, link := range allLinks {
		packets := randomPackets(rand.New(rand.NewPCG(3, 3)), link, 500)
		c := comparison{eitherWay: true}
		for _, expr := range []string{
			"tcp and not (src host " + list + ")",
			"dst host " + list + " or udp port 53",
			"not (udp and ip[8] > 3 and (src " + strings.ReplaceAll(list, " or ", " and not ") + ")) and tcp",
		} {
			c.compare(t, tool, link, corpusEntry{expr, expr}, packets)
		}
		if c.expressions != 3 {
			t.Errorf("link %d: %d expressions compared, want 3", link, c.expressions)
		}
	}
}

func manyPorts(n int) string {
	ports := make([]string, n)
	for i := range ports {
		ports[i] = fmt.Sprint(2*i + 1)
	}
	return "port " + strings.Join(ports, " or ")
}

func TestOversizedExpressionsAreRefused(t *testing.T) {
	for name, expr := range map[string]string{
		"instructions": manyPorts(1000),
		"tests":        manyPorts(8000),
		"bytes":        strings.Repeat(" ", maxExpr) + "tcp",
		"parentheses":  strings.Repeat("(", 1000) + "tcp" + strings.Repeat(")", 1000),
		"brackets":     strings.Repeat("ip[", 1000) + "0" + strings.Repeat("]", 1000) + " = 0",
		"not":          strings.Repeat("not ", 1000) + "tcp",
		"values":       "port " + strings.Repeat("(", 1000) + "80" + strings.Repeat(")", 1000),
		"scopes":       strings.Repeat("inner ", 1000) + "tcp",
	} {
		var e *Error
		if _, err := Compile(expr, Options{}); !errors.As(err, &e) {
			t.Errorf("%s: got %v, want an *Error", name, err)
		}
	}
	// What is merely long compiles.
	mustCompile(t, "len = 0"+strings.Repeat(" + 1", 4000), Options{})
	mustCompile(t, "tcp"+strings.Repeat(" or tcp", 4000), Options{})
}

func TestMatchDoesNotAllocate(t *testing.T) {
	m := &Meta{Peer: netip.MustParseAddr("192.0.2.2"), Inner: tcpPacket, Outer: udpDatagram, Layer: LayerOuter}
	for _, expr := range []string{
		"", "tcp port 80", "host 10.77.2.5 and tcp port 80 or udp port 53", "tcp[((tcp[12:1] & 0xf0) >> 2):4] = 0x47455420",
		"peer n2 and inner tcp port 80", "reason no-route or spoofed-source", "ip[8] * ip[9] > ip[0] % ip[8]",
	} {
		p := mustCompile(t, expr, testOptions(LinkIPv4))
		if n := testing.AllocsPerRun(100, func() { p.Match(m, tcpPacket) }); n != 0 {
			t.Errorf("%q: %v allocations per packet, want 0", expr, n)
		}
	}
}

// TestMixedExpressionsAgreeWithTheirParts joins conditions on bytes and on Meta
// and compares with the conditions judged one by one.
func TestMixedExpressionsAgreeWithTheirParts(t *testing.T) {
	parts := []string{"tcp", "udp", "tcp port 80", "src net 10", "host 1.2.3.4", "ip[8] > 99", "len > 60",
		"peer n1", "peer n2", "vni 7", "reason no-route", "reason too-big", "point drop", "dir in", "inner", "outer",
		"inner tcp", "inner port 80", "outer udp", "outer host 192.0.2.1", "inner len > 60"}
	opt := testOptions(LinkIPv4)
	leaf := map[string]*Program{}
	for _, s := range parts {
		leaf[s] = mustCompile(t, s, opt)
	}
	r := rand.New(rand.NewPCG(4, 4))
	var compose func(depth int) (string, func(*Meta, []byte) bool)
	compose = func(depth int) (string, func(*Meta, []byte) bool) {
		if depth == 0 {
			s := pick(r, parts)
			return s, leaf[s].Match
		}
		a, fa := compose(depth - 1)
		b, fb := compose(r.IntN(depth))
		switch r.IntN(3) {
		case 0:
			return "(" + a + " and " + b + ")", func(m *Meta, p []byte) bool { return fa(m, p) && fb(m, p) }
		case 1:
			return "(" + a + " or " + b + ")", func(m *Meta, p []byte) bool { return fa(m, p) || fb(m, p) }
		}
		return "not (" + a + " and " + b + ")", func(m *Meta, p []byte) bool { return !(fa(m, p) && fb(m, p)) }
	}
	peers := []netip.Addr{{}, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.2")}
	bodies := [][]byte{nil, tcpPacket, udpDatagram}
	for range 500 {
		text, want := compose(4)
		p := mustCompile(t, text, opt)
		for range 50 {
			inner, packet := completePacket(r), completePacket(r)
			m := &Meta{Peer: pick(r, peers), VNI: uint32(6 + r.IntN(2)), Tagged: r.IntN(2) == 0, Reason: uint8(r.IntN(3)),
				Dropped: r.IntN(2) == 0, Point: uint8(r.IntN(3)), HasPoint: true, Dir: Dir(r.IntN(3)), Layer: Layer(r.IntN(3)),
				Inner: pick(r, [][]byte{nil, inner}), Outer: pick(r, bodies)}
			if got, want := p.Match(m, packet), want(m, packet); got != want {
				t.Fatalf("%q: got %v, its parts say %v, of %+v and %x", text, got, want, *m, packet)
			}
		}
	}
}

// completePacket makes an IPv4 packet on which no load of the parts fails.
func completePacket(r *rand.Rand) []byte {
	p := append([]byte(nil), pick(r, [][]byte{tcpPacket, udpDatagram})...)
	p = append(p, make([]byte, r.IntN(60))...)
	p[8] = byte(r.Uint32())
	copy(p[12:], pick(r, packetHosts))
	copy(p[16:], pick(r, packetHosts))
	p[21], p[23] = pick(r, []byte{53, 80}), pick(r, []byte{53, 80})
	return p
}

func BenchmarkMatch(b *testing.B) {
	m := &Meta{Peer: netip.MustParseAddr("192.0.2.2"), Inner: tcpPacket, Layer: LayerInner}
	for _, expr := range []string{"", "icmp", "tcp port 80", "host 10.77.2.5 and tcp port 443", "tcp[tcpflags] & (tcp-syn|tcp-fin) != 0", "peer n2 and tcp port 80"} {
		p := mustCompile(b, expr, testOptions(LinkIPv4))
		b.Run(expr, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Match(m, tcpPacket)
			}
		})
	}
}
