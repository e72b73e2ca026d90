package filter

import (
	"slices"
	"strconv"
)

// IP protocol numbers the compiler needs by name (IANA protocol-numbers).
const (
	protoICMP   = 1
	protoIGMP   = 2
	protoTCP    = 6
	protoIGRP   = 9
	protoUDP    = 17
	protoESP    = 50
	protoAH     = 51
	protoICMPv6 = 58
	protoPIM    = 103
	protoVRRP   = 112
	protoSCTP   = 132

	// ip6Fragment is the next-header value of the IPv6 fragment header.
	ip6Fragment = 44
)

// Ethertypes (IANA ieee-802-numbers).
const (
	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherRARP = 0x8035
	etherIPv6 = 0x86dd
)

// etherNames are the names "ether proto" takes.
var etherNames = map[string]uint32{
	"ip": etherIPv4, "arp": etherARP, "rarp": etherRARP, "ip6": etherIPv6,
	"loopback": 0x9000,
}

// ipProtoNames are the names "proto", "ip proto" and "ip6 proto" take. The
// spelling is that of /etc/protocols, "ipip" included: it is 94 there, not 4.
var ipProtoNames = map[string]uint32{
	"hopopt": 0, "icmp": 1, "igmp": 2, "ipencap": 4, "tcp": 6, "egp": 8, "igp": 9,
	"udp": 17, "dccp": 33, "ipv6": 41, "ipv6-route": 43, "ipv6-frag": 44,
	"rsvp": 46, "gre": 47, "esp": 50, "ah": 51, "ipv6-icmp": 58, "ipv6-nonxt": 59,
	"ipv6-opts": 60, "eigrp": 88, "ospf": 89, "ipip": 94, "etherip": 97,
	"pim": 103, "ipcomp": 108, "vrrp": 112, "l2tp": 115, "sctp": 132, "udplite": 136,
}

// port is a well-known port; proto is 0 when the name is used with more than
// one transport, so that the port is looked for in all of them.
type port struct {
	number uint16
	proto  uint8
}

// portNames are the service names "port" and "portrange" take: what people
// type, with the transports of Debian's /etc/services. A file that differs
// from host to host would make one expression mean different things.
var portNames = map[string]port{
	"echo": {7, 0}, "discard": {9, 0}, "ftp-data": {20, protoTCP}, "ftp": {21, protoTCP},
	"ssh": {22, protoTCP}, "telnet": {23, protoTCP}, "smtp": {25, protoTCP},
	"whois": {43, protoTCP}, "tacacs": {49, 0}, "domain": {53, 0},
	"bootps": {67, protoUDP}, "bootpc": {68, protoUDP}, "tftp": {69, protoUDP},
	"http": {80, protoTCP}, "www": {80, protoTCP}, "kerberos": {88, 0},
	"pop3": {110, protoTCP}, "sunrpc": {111, 0}, "portmapper": {111, 0},
	"auth": {113, protoTCP}, "nntp": {119, protoTCP}, "ntp": {123, protoUDP},
	"netbios-ns": {137, protoUDP}, "netbios-dgm": {138, protoUDP},
	"netbios-ssn": {139, protoTCP}, "imap": {143, protoTCP}, "imap2": {143, protoTCP},
	"snmp": {161, 0}, "snmp-trap": {162, 0}, "snmptrap": {162, 0}, "bgp": {179, protoTCP},
	"ldap": {389, 0}, "https": {443, 0}, "microsoft-ds": {445, protoTCP},
	"submissions": {465, protoTCP}, "smtps": {465, protoTCP}, "isakmp": {500, protoUDP},
	"syslog": {514, protoUDP}, "printer": {515, protoTCP}, "rtsp": {554, 0},
	"submission": {587, protoTCP}, "ipp": {631, protoTCP}, "ldaps": {636, 0},
	"domain-s": {853, 0}, "rsync": {873, protoTCP}, "imaps": {993, protoTCP},
	"pop3s": {995, protoTCP}, "socks": {1080, protoTCP}, "openvpn": {1194, 0},
	"ms-sql-s": {1433, protoTCP}, "radius": {1812, 0}, "nfs": {2049, 0},
	"mysql": {3306, protoTCP}, "ms-wbt-server": {3389, protoTCP},
	"ipsec-nat-t": {4500, protoUDP}, "sip": {5060, 0}, "sip-tls": {5061, 0},
	"mdns": {5353, protoUDP}, "postgresql": {5432, protoTCP}, "amqps": {5671, protoTCP},
	"x11": {6000, protoTCP}, "redis": {6379, protoTCP}, "http-alt": {8080, protoTCP},
	"git": {9418, protoTCP}, "zabbix-agent": {10050, protoTCP},
}

// numberNames are the words that stand for a number anywhere a number may.
var numberNames = map[string]uint32{
	"tcpflags": 13, "tcp-fin": 0x01, "tcp-syn": 0x02, "tcp-rst": 0x04, "tcp-push": 0x08,
	"tcp-ack": 0x10, "tcp-urg": 0x20, "tcp-ece": 0x40, "tcp-cwr": 0x80,
	"icmptype": 0, "icmpcode": 1,
	"icmp-echoreply": 0, "icmp-unreach": 3, "icmp-sourcequench": 4, "icmp-redirect": 5,
	"icmp-echo": 8, "icmp-routeradvert": 9, "icmp-routersolicit": 10,
	"icmp-timxceed": 11, "icmp-paramprob": 12, "icmp-tstamp": 13, "icmp-tstampreply": 14,
	"icmp-ireq": 15, "icmp-ireqreply": 16, "icmp-maskreq": 17, "icmp-maskreply": 18,
	"icmp6type": 0, "icmp6code": 1,
	"icmp6-destinationunreach": 1, "icmp6-packettoobig": 2, "icmp6-timeexceeded": 3,
	"icmp6-parameterproblem": 4, "icmp6-echo": 128, "icmp6-echoreply": 129,
	"icmp6-multicastlistenerquery": 130, "icmp6-multicastlistenerdone": 132,
	"icmp6-routersolicit": 133, "icmp6-routeradvert": 134,
	"icmp6-neighborsolicit": 135, "icmp6-neighboradvert": 136, "icmp6-redirect": 137,
}

// lookupPort finds a port by number or name.
func lookupPort(word string) (port, bool) {
	if p, ok := portNames[word]; ok {
		return p, true
	}
	n, err := strconv.ParseUint(word, 10, 16)
	return port{number: uint16(n)}, err == nil
}

// lookupPortRange splits "A-B" at its first hyphen that leaves a port on both
// sides. Transports of two names that differ cancel out, as in libpcap.
func lookupPortRange(word string) (lo, hi, proto uint32, ok bool) {
	for i := range len(word) {
		if word[i] != '-' {
			continue
		}
		a, okA := lookupPort(word[:i])
		b, okB := lookupPort(word[i+1:])
		if !okA || !okB {
			continue
		}
		if a.proto != b.proto {
			a.proto = 0
		}
		return uint32(min(a.number, b.number)), uint32(max(a.number, b.number)), uint32(a.proto), true
	}
	if p, okP := lookupPort(word); okP {
		return uint32(p.number), uint32(p.number), uint32(p.proto), true
	}
	return 0, 0, 0, false
}

// sortedKeys returns the keys of a name table for hints.
func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
