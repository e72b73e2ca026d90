// Package filter compiles the expressions people type after tcpdump into
// programs that decide, without allocating, whether a capture keeps a packet.
//
// The language is that of pcap-filter(7) as far as an IPv4 overlay needs it:
//
//	host net port portrange proto, src dst (src or dst) (src and dst)
//	ip ip6 arp rarp tcp udp sctp icmp icmp6 igmp igrp pim vrrp carp ah esp ether
//	less N, greater N, len, broadcast, multicast
//	PROTO[EXPR:SIZE] with + - * / % & | ^ << >> and > < >= <= = == !=
//	tcpflags, tcp-syn, icmptype, icmp-echo and their kin; port and protocol names
//	and or not && || !, parentheses, carried qualifiers ("port 80 or 443")
//
// and five words of our own, decided on what the engine knows about a packet
// (Meta) instead of on its bytes:
//
//	peer NAME|IP   vni N   reason NAME   point NAME   dir in|out
//
// The words "inner" and "outer" alone say which kind of record it is. Before a
// primitive or a parenthesis they choose the bytes it looks at: the packet in
// the tunnel or the datagram around it, whichever record is being judged.
//
//	tcp port 80 and peer n2
//	outer host 192.0.2.7 and inner (icmp or tcp[tcpflags] & tcp-syn != 0)
//	reason no-route or spoofed-source
//
// # Semantics
//
// Meaning follows libpcap 1.10 to the letter for what both accept, quirks
// included, because people compare the two side by side: "and" and "or" have
// the same precedence, "port 80" means TCP, UDP or SCTP, port tests skip
// fragments, and a load beyond the end of the packet rejects the packet
// whatever the rest of the expression says (also under "not").
//
// That last rule makes the order of loads visible on a packet cut short inside a
// header, and libpcap's optimiser reorders them. The compiler regroups tests by
// the same rule (regroup), so the verdict is that of plain tcpdump, not that of
// tcpdump -O, where the two differ.
//
// # Stages
//
// lexer (token.go) -> parser (parse.go, arith.go) -> tree (ast.go) -> tests
// (lower.go, primitives.go, relation.go, own.go) -> flow graph (graph.go,
// regroup.go) -> instructions (emit.go) -> Match (eval.go). A Program without own words is also available as classic BPF.
//
// Glossary: a primitive is a qualified value ("tcp dst port 80"); a test is one
// load and one comparison; a block is a test with its two ways on; a scope is
// the choice of bytes made by "inner" or "outer".
package filter
