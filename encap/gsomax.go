package encap

// The largest TCP super-packet the kernel builds for a device is its
// gso_max_size less MAX_TCP_HEADER + 1 (net/core/sock.c, sk_dst_gso_max_size),
// which is 320 + 1 with 64-byte cache lines.
const tcpHeaderReserve = 321

// tcpHeaders are an IPv4 and a TCP header with timestamps, the common case.
const tcpHeaders = 20 + 32

// GSOMaxSize returns the gso_max_size in bytes for a TUN of the given MTU, so
// that a whole super-packet leaves as one UDP_SEGMENT message. A super-packet
// of one segment more would leave as two messages, arrive as two, be written
// twice and be acknowledged twice, which costs about a third of the throughput.
func (f Framing) GSOMaxSize(mtu int) int {
	segments := min(maxPayload/(mtu+f.PrefixLen()), maxSegments)
	size := segments*(mtu-tcpHeaders) + tcpHeaders + tcpHeaderReserve
	return min(size, 65536)
}
