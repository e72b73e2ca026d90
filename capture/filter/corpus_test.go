package filter

// corpusEntry is an expression and, where tcpdump needs it spelled otherwise
// (names that depend on its host, forms only we accept), the spelling for it.
type corpusEntry struct{ expr, oracle string }

// corpus holds what people type: from the tcpdump manual, from bug reports and
// from the corners of the grammar. Every expression is compared with tcpdump on
// every link type that has it.
var corpus = append(plain(
	// Protocols.
	"", "ip", "ip6", "tcp", "udp", "icmp", "icmp6", "sctp", "arp", "rarp", "igmp", "igrp", "pim", "vrrp", "carp", "ah", "esp",
	"not ip", "not tcp", "!tcp", "! udp", "not not icmp", "not ip6", "not arp",
	"tcp or udp", "tcp or udp or icmp", "tcp || udp", "tcp||icmp", "ip and not tcp", "ip && !udp",
	"not (tcp or udp)", "not (not tcp and not udp)", "(tcp)", "((udp))", "ip or ip6 or arp",
	"proto 6", "proto 17", "proto 1", "proto 0", "proto 255", "proto 300", "ip proto 17", "ip proto 132", "ip proto 256",
	"ip6 proto 6", "ip6 proto 58", "ip6 proto 44", "proto 6 or 17", "ip proto 47 or 50", "not proto 6", "ip proto 6 or udp",
	`proto \tcp`, `ip proto \udp`, `ip proto \icmp`, `ip6 proto \sctp`, "ip proto gre", "ip proto ospf", "ip proto ipip",
	"ip proto ipv6", `ip proto \vrrp`, "ip proto (6 or 17)", "proto (1 or 2 or 47)",

	// Hosts.
	"host 1.2.3.4", "src host 1.2.3.4", "dst host 1.2.3.4", "src 1.2.3.4", "dst 1.2.3.4",
	"src or dst host 1.2.3.4", "dst or src 1.2.3.4", "src and dst host 1.2.3.4", "dst and src 10.0.0.1",
	"ip host 10.77.2.5", "ip src 10.77.2.5", "ip dst host 10.77.2.5", "ip src and dst 10.0.0.1", "arp host 10.0.0.1",
	"arp src 10.0.0.1", "rarp host 1.2.3.4", "rarp dst 1.2.3.4",
	"host 1.2.3.4 or 5.6.7.8", "host 1.2.3.4 or host 5.6.7.8", "host 1.2.3.4 and 5.6.7.8", "host 10.0.0.1 and host 10.77.2.5",
	"host (1.2.3.4 or 5.6.7.8)", "src (1.2.3.4 or 5.6.7.8)", "not host 1.2.3.4", "host not 1.2.3.4", "host 1.2.3.4 or not 5.6.7.8",
	"not host 1.2.3.4 and not host 5.6.7.8", "src host 10.0.0.1 and dst host 10.77.2.5",
	"src 10.0.0.1 or dst 10.0.0.1", "host 10", "host 10.77", "host 10.77.2", "src 10.77", "dst 192.168", "src 80",
	"host 255.255.255.255", "host 0.0.0.0", "host 0", "dst host 224.0.0.1", "ip host 1.2.3.4 or 5.6.7.8 or 10.0.0.1",
	"host 2001:db8::1", "src host 2001:db8::1", "dst 2001:db8::1", "ip6 host ::1", "ip6 src fe80::1", "host ::1 or ::2",
	"host 1.2.3.4 or host 2001:db8::1", "not host ::1", "host ::ffff:1.2.3.4", "src and dst host ::1",

	// Networks.
	"net 10", "net 10.77", "net 10.77.2", "net 10.77.2.5", "net 192.168", "src net 10", "dst net 192.168", "ip net 10",
	"net 10.0.0.0/8", "net 10.77.0.0/16", "net 192.168.1.0/24", "net 10.77.2.5/32", "net 128.0.0.0/1", "net 0.0.0.0/0",
	"net 0.0.0.0/1", "net 192.168/16", "net 172.16/12", "src net 10.77.0.0/16 and dst net 10.77.0.0/16",
	"net 10.0.0.0 mask 255.0.0.0", "net 192.168.0.0 mask 255.255.0.0", "net 192.168 mask 255.255.0.0", "src net 1.2.3.0 mask 255.255.255.0",
	"net 10.77.0.0 mask 255.255.0.0 or 192.168.0.0/16", "net 10 or 192.168", "src net 10 or 1", "not net 10", "not src net 10.77.0.0/16",
	"src and dst net 10", "src or dst net 192.168.1", "net 0", "net 10.0.0.1 mask 255.0.0.255", "arp net 10", "net 224.0.0.0/4",
	"net 2001:db8::/32", "src net 2001:db8::/33", "dst net fe80::/10", "net ::/0", "net 2001:db8::1", "ip6 net ff00::/8", "host 2001:db8::1/128",
	"net 10 and not net 10.77", "net (10 or 192.168)",

	// Ports.
	"port 80", "src port 80", "dst port 80", "tcp port 80", "udp port 53", "sctp port 80", "tcp src port 443", "tcp dst port 443",
	"udp dst port 53", "src or dst port 80", "src and dst port 80", "tcp src or dst port 80", "udp src and dst port 123",
	"port 80 or 443", "port 80 or 443 or 8080", "tcp port 80 or 443", "tcp port 80 or udp port 53", "port 80 and 443",
	"port (80 or 443)", "tcp port (80 or 443 or 22)", "port ((80))", "dst port (53 or 123)", "port not 80", "port (not 80 and not 443)",
	"not port 80", "not port 80 or 443", "not (port 80 or 443)", "not port 80 and not port 443", "tcp and not port 22",
	"tcp && ! port 80", "tcp port 80 and not 443", "port 0", "port 65535", "port 0x50", "port 0120", "udp port 8472", "udp port 8472 or 8285",
	"portrange 80-90", "tcp portrange 80-90", "src portrange 80-90", "dst portrange 1024-65535", "udp portrange 50-60",
	"portrange 90-80", "portrange 80-90 or 100-110", "portrange 80-90 or 443", "portrange 443", "not portrange 80-90", "portrange 80-80",
	"portrange 0-65535", "sctp src portrange 80-100", "src and dst portrange 80-443", "tcp portrange (22-25 or 80-90)",

	// Mixtures.
	"host 10.77.2.5 and tcp port 80", "tcp port 80 and host 10.0.0.1 and not src 1.2.3.4",
	"host 1.2.3.4 and not port 80 and not 443", "src host 10.0.0.1 and (dst port 80 or dst port 443)",
	"tcp port 80 and (udp port 53) or 22", "tcp port 22 or (icmp and host 1.2.3.4) or 53",
	"(tcp port 80 or udp port 53) and net 10", "tcp and (port 80 or port 443) and not host 1.2.3.4",
	"icmp or udp port 53 or tcp port 80 and net 10", "tcp and port 80 or udp and port 53", "tcp or udp and icmp",
	"udp or icmp and net 10 or host 1.2.3.4", "not tcp port 80", "not tcp and not udp and not icmp", "ip and (tcp or udp) and not net 10",
	"host 10.0.0.1 and (port 80 or 443) and not (src net 192.168 or dst net 192.168)", "tcp and tcp", "tcp and udp", "tcp and not tcp or udp",
	"ip and ip6", "arp or tcp port 80", "(host 1.2.3.4 or host 5.6.7.8) and (tcp or udp) and (port 80 or port 53)",
	"tcp src port 80 and tcp dst port 1024", "ip6 and tcp port 80", "ip and tcp port 80", "ip6 or tcp port 80", "not ip6 and udp",

	// Lengths.
	"less 64", "greater 64", "less 0", "greater 0", "len > 60", "len < 60", "len <= 60", "len >= 60", "len = 60", "len == 60", "len != 60",
	"length > 40 and length < 80", "greater 40 and less 90", "not less 60", "len & 1 = 1", "len % 4 = 0", "len / 10 = 5", "64 > len",

	// Fields.
	"ip[0] & 0xf != 5", "ip[0] & 0xf0 = 0x40", "ip[8] < 10", "ip[8] = 1", "ip[6] & 0x20 != 0", "ip[6:2] & 0x1fff != 0", "ip[6:2] & 0x4000 != 0",
	"ip[2:2] > 60", "ip[2:2] = 40", "ip[9] = 6", "ip[9]=6 or ip[9]=17", "ip[12:4] = 0x0a000001", "ip[16] >= 224", "ip[16:4]=0xffffffff",
	"ip[19] = 0xff", "ip[1] & 0xfc >> 2 = 0", "ip[1] & 3 = 3", "(ip[1] & 0xfc) >> 2 = 0", "ip[0:4] = 0x45000028",
	"tcp[13] & 2 != 0", "tcp[13] = 2", "tcp[13] == 18", "tcp[13] & 7 != 0", "tcp[tcpflags] & tcp-syn != 0", "tcp[tcpflags] == tcp-syn",
	"tcp[tcpflags] & (tcp-syn|tcp-fin) != 0", "tcp[tcpflags] & (tcp-syn|tcp-ack) = tcp-syn", "tcp[tcpflags] & (tcp-syn|tcp-ack) == (tcp-syn|tcp-ack)",
	"tcp[tcpflags] & tcp-rst != 0", "tcp[tcpflags] & tcp-push != 0 and port 80", "tcp[tcpflags] & (tcp-ece|tcp-cwr) != 0", "tcp[tcpflags] & tcp-urg = tcp-urg",
	"tcp[tcpflags] & tcp-syn == 0 and not port 22", "tcp[0:2] = 80", "tcp[2:2] = 443", "tcp[4:4] > 0x80000000", "tcp[12] >> 4 > 5",
	"tcp[12] & 0xf0 >> 2 > 20", "(tcp[12] & 0xf0) >> 2 > 20", "tcp[14:2] = 0", "tcp[0] != tcp[1]", "tcp[((tcp[12:1] & 0xf0) >> 2):4] = 0x47455420",
	"tcp port 80 and (((ip[2:2] - ((ip[0]&0xf)<<2)) - ((tcp[12]&0xf0)>>2)) != 0)", "tcp[(tcp[12]>>4)*4:4]=0x47455420", "tcp[100] = 1", "tcp[100000] = 3",
	"udp[0:2] = 53", "udp[4:2] > 20", "udp[4:2] < 24", "udp[8:4] & 0x08000000 != 0", "udp[2:2] & 1 = 1", "udp[4:2] > ip[2:2] - (ip[0] & 15) * 4",
	"icmp[0] = 8", "icmp[icmptype] = icmp-echo", "icmp[icmptype] = icmp-echoreply", "icmp[icmptype] != icmp-echo and icmp[icmptype] != icmp-echoreply",
	"icmp[icmptype] == icmp-unreach and icmp[icmpcode] = 4", "icmp[icmptype] = icmp-timxceed", "icmp[icmptype] = icmp-redirect", "icmp[icmpcode] != 0", "icmp[4:2] = 1",
	"icmp6[icmp6type] = icmp6-echo", "icmp6[0] = 128", "icmp6[icmp6type] = icmp6-neighborsolicit", "icmp6[1] = 0",
	"sctp[0:2] = 80", "igmp[0] = 0x16", "pim[0] = 0x20", "vrrp[0] & 0xf = 1",
	"ip6[6] = 6", "ip6[7] > 64", "ip6[6] = 44 and ip6[40] = 17", "ip6[0:4] & 0xf0000000 = 0x60000000",
	"arp[6:2] = 1", "arp[7] = 2", "arp[14:4] = 0x0a000001", "rarp[7] = 2",
	"ether[0] & 1 = 0", "ether[12:2] = 0x0800", "ether[6:4] = 0x01020304", "link[0] = 1",
	"ip[ip[0] & 0xf] = 0", "ip[(ip[0] & 0xf) * 4:2] = 80", "ip[ip[8]] = 1", "udp[udp[5]] > 5", "arp[arp[5]] = 8", "tcp[tcp[12] >> 2] = 0x47",

	// Arithmetic.
	"1 = 1", "1 = 2", "10 > 5 and tcp", "tcp or 5 < 3", "2 + 3 * 4 = 14", "(2 + 3) * 4 = 20", "-1 > 3", "0 - 1 = 0xffffffff", "- 1 + 2 = 1", "7 / 2 = 3", "7 % 4 = 3",
	"6 ^ 3 = 5", "1 << 4 = 16", "0x80000000 >> 31 = 1", "ip[8] + ip[9] > 100", "ip[8] - ip[9] > 100", "ip[8] * 2 > ip[2:2]", "ip[8] / 2 = 32", "ip[8] % 5 = 1", "ip[8] % 5 + 1 = 3",
	"ip[8] ^ 5 & 1 = 3", "ip[8] + 1 % 5 = 3", "ip[8] * 3 ^ 1 > 20", "ip[8] ^ ip[9] = 0", "ip[8] | ip[9] = 255", "ip[8] << 1 = 128", "ip[8] >> ip[0] = 0", "ip[8] << ip[1] > 200",
	"ip[8] / ip[1] > 3", "ip[8] % ip[1] = 0", "-ip[8] > 0xffffff00", "ip[8] - -1 = 65", "len - 20 > 40", "ip[2:2] + 14 = len", "ip[2:2] = len", "len > ip[2:2]",
	"ip[8] > ip[9]", "ip[12:4] = ip[16:4]", "ip[12:4] != ip[16:4]", "ip[12:4] < ip[16:4]", "ip[12:4] >= ip[16:4]", "ip[12:4] <= ip[16:4]",
	"tcp[0:2] = tcp[2:2]", "udp[0:2] > udp[2:2]", "udp[0] >= ip[1:2] + 5", "ip[0] + tcp[1] = 85", "5 + tcp[1] = 85", "5 = ip[0] & 15", "0x45 = ip[0]",
	"(ip[0] & 0xf) * 4 + (tcp[12] >> 4) * 4 < ip[2:2]", "ip[0] + ip[1] + ip[2] + ip[3] + ip[4] + ip[5] > 300", "ip[0] + (ip[1] + (ip[2] + (ip[3] + (ip[4] + ip[5])))) > 300",
	"(ip[0] + ip[1]) * (ip[2] + ip[3]) > (ip[4] + ip[5]) * (ip[6] + ip[7])", "not ip[8] = 64", "not (ip[8] > 64)", "! tcp[13] & 2 != 0", "(ip[8]) > (64)",
	"ip[8] & 0 = 0", "ip[8] * 0 = 0", "ip[100] * 0 = 0", "ip[60:4] & 0 = 0 or tcp",
	"len & 0xfffffffc = 60", "1 | 2 & 4 = 1", "1 + 2 << 3 = 24", "16 - 4 - 2 = 10", "100 / 10 / 5 = 2", "2 * 3 % 4 = 6", "ip[8] & 0xf0 & 0x30 = 0x30", "0xf0 & ip[8] = 0x40",

	// Link layer.
	"ether host 01:02:03:04:05:06", "ether src 1:2:3:4:5:6", "ether dst ff:ff:ff:ff:ff:ff", "ether host 0102.0304.0506", "ether host 01-02-03-04-05-06", "ether src host 02:00:00:00:00:01",
	"ether src and dst 1:2:3:4:5:6", "not ether host 1:2:3:4:5:6", "ether host 1:2:3:4:5:6 or 2:0:0:0:0:1", "ether proto 0x0800", "ether proto 0x86dd", "ether proto 0x88cc",
	`ether proto \ip`, `ether proto \arp`, `ether proto \ip6`, "ether proto 0x0800 or 0x0806", "broadcast", "ether broadcast", "multicast", "ether multicast", "ip multicast", "ip6 multicast",
	"not broadcast and not multicast", "ether host 1:2:3:4:5:6 and tcp port 80",
),
	// Names resolve from a table of our own, so tcpdump is given the numbers.
	corpusEntry{"port http", "tcp port 80"},
	corpusEntry{"port ssh or 80", "tcp port 22 or port 80"},
	corpusEntry{"tcp port http", "tcp port 80"},
	corpusEntry{"port domain", "port 53"},
	corpusEntry{"udp port domain", "udp port 53"},
	corpusEntry{"port https", "port 443"},
	corpusEntry{"port ntp", "udp port 123"},
	corpusEntry{"port http or ntp", "tcp port 80 or udp port 123"},
	corpusEntry{"portrange ssh-http", "tcp portrange 22-80"},
	corpusEntry{"portrange ssh-443", "portrange 22-443"},
	corpusEntry{"portrange http-domain", "portrange 53-80"},
	corpusEntry{"udp portrange domain-ntp", "udp portrange 53-123"},
	// Forms libpcap calls syntax errors though they have one meaning.
	corpusEntry{"proto tcp", `proto \tcp`},
	corpusEntry{"ip proto udp or tcp port 80", `ip proto \udp or tcp port 80`},
	corpusEntry{"ether proto arp", `ether proto \arp`},
	corpusEntry{"net 10/8", "net 10.0.0.0/8"},
	corpusEntry{"net 10 mask 255", "net 10.0.0.0 mask 255.0.0.0"},
	corpusEntry{"port 80 or (443 and tcp)", "port 80 or (port 443 and tcp)"},
)

func plain(exprs ...string) []corpusEntry {
	entries := make([]corpusEntry, len(exprs))
	for i, e := range exprs {
		entries[i] = corpusEntry{e, e}
	}
	return entries
}
