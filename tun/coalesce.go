package tun

import "bytes"

// Words used here:
//
//	item   one future write to the queue: a packet as it came, or several
//	       consecutive packets of one flow under one header
//	flow   packets that agree in addresses, protocol and ports
//	open   the newest item of a flow, which the flow's next packet may join

const (
	maxItems = 512
	// maxParts bounds the packets of all items: 16 receive slots of 64.
	maxParts    = 1024
	flowBuckets = 256
	// maxUDPParts is UDP_MAX_SEGMENTS of kernels before 6.9.
	maxUDPParts = 64
	// maxItemParts packets and the virtio header are UIO_MAXIOV pieces.
	maxItemParts = 1023
)

type csumState uint8

const (
	csumUnknown csumState = iota // complete, not verified
	csumPartial                  // pseudo header's sum only
	csumGood                     // complete and verified
	csumNone                     // not TCP or UDP, a fragment, or UDP without checksum
)

type item struct {
	pkt   []byte // first packet, borrowed
	tag   uint64
	queue *Queue // where it goes; a flow goes to one queue
	csum  csumState
	proto uint8 // protoTCP or protoUDP when the item may grow, else 0
	// closed: a short or pushed packet ended the item.
	closed bool
	ihl    uint8
	hl     uint16 // IPv4 and transport header
	size   uint16 // payload bytes of each packet but the last
	gso    uint16 // segment payload of a super-packet that came as one, or 0
	parts  int    // packets
	total  int    // bytes of the item as one packet
	seq    uint32 // next expected TCP sequence number
	id     uint16 // next expected IPv4 ID
	push   bool
	head   int32 // parts after the first, as a list; -1 ends it
	tail   int32
}

type part struct {
	payload []byte
	tag     uint64
	next    int32
}

// Coalescer merges consecutive packets of a flow, by their headers alone, into
// super-packets, up to the rung of the queue they go to. The rules are those the kernel's GRO follows
// (net/ipv4/tcp_offload.c, udp_offload.c); the order within a flow is kept.
//
// Packets are borrowed, and their headers may be rewritten, until Flush. A
// Coalescer belongs to one goroutine.
type Coalescer struct {
	mtu     int
	items   [maxItems]item
	parts   [maxParts]part
	n       int
	nparts  int
	last    int                 // the item of the last packet, if it may grow, or -1
	buckets [flowBuckets]uint16 // open item + 1
}

// NewCoalescer returns an empty coalescer for devices of the given MTU in bytes.
func NewCoalescer(mtu int) *Coalescer { return &Coalescer{mtu: mtu, last: -1} }

// Room reports whether one more packet can be added before a Flush.
func (c *Coalescer) Room() bool { return c.n < maxItems && c.nparts < maxParts }

// Add appends an IPv4 packet that goes to the queue q. Its header length and
// total length have been checked against len(pkt). gso is the segment payload of a UDP super-packet
// that arrived as one packet, otherwise 0. tag names the packet to the caller of
// Flush. There must be Room.
func (c *Coalescer) Add(q *Queue, pkt []byte, gso int, tag uint64) {
	it := item{pkt: pkt, tag: tag, queue: q, csum: csumNone, parts: 1, total: len(pkt), head: -1, tail: -1}
	it.inspect(gso, c.mtu)
	c.last = -1
	if it.proto == 0 || q.rung == OffloadNone || it.proto == protoUDP && q.rung < OffloadFull {
		if it.ends() {
			c.buckets[it.bucket()] = 0
		}
		c.push(&it)
		return
	}
	b := it.bucket()
	if n := c.buckets[b]; n != 0 {
		open := &c.items[n-1]
		if open.sameFlow(&it) && c.join(open, &it) {
			c.last = int(n - 1)
			return
		}
	}
	c.push(&it)
	c.last = c.n - 1
	c.buckets[b] = uint16(c.n)
}

func (c *Coalescer) push(it *item) {
	c.items[c.n] = *it
	c.n++
}

// inspect fills in what the headers say. It leaves proto 0 unless the packet
// may start or join an item.
func (it *item) inspect(gso, mtu int) {
	p := it.pkt
	ihl := headerLen(p)
	it.ihl = uint8(ihl)
	if be16(p[6:])&fragMask != 0 || Fold(Sum(p[:ihl], 0)) != 0xffff {
		// A wrong header checksum must reach the kernel as it is.
		return
	}
	l4 := p[ihl:]
	switch p[9] {
	case protoTCP:
		if len(l4) < minTCP {
			return
		}
		it.csum = state(p, ihl, be16(l4[tcpCsumOff:]))
		it.inspectTCP(l4, mtu)
	case protoUDP:
		if len(l4) < udpLen || be16(l4[4:]) != uint16(len(l4)) {
			return
		}
		sum := be16(l4[udpCsumOff:])
		if sum == 0 {
			return
		}
		it.csum = state(p, ihl, sum)
		it.inspectUDP(gso)
	}
}

func state(p []byte, ihl int, field uint16) csumState {
	if field == Fold(pseudoSum(p, p[9], len(p)-ihl)) {
		return csumPartial
	}
	return csumUnknown
}

func (it *item) inspectTCP(l4 []byte, mtu int) {
	doff := int(l4[12]>>4) * 4
	if doff < minTCP || doff >= len(l4) {
		return
	}
	it.hl = uint16(int(it.ihl) + doff)
	size := len(l4) - doff
	if len(it.pkt) > mtu {
		// A kernel vxlan peer on a virtual link hands over its super-packet
		// whole. The segments it stands for were made for the same MTU.
		it.gso = uint16(max(mtu-int(it.hl), 1))
		return
	}
	flags := l4[13]
	if flags&^(flagPSH|flagECE) != flagACK || it.ihl != minIPv4 {
		return
	}
	it.proto = protoTCP
	it.size = uint16(size)
	it.seq = be32(l4[4:]) + uint32(size)
	it.id = be16(it.pkt[4:]) + 1
	it.push = flags&flagPSH != 0
	it.closed = it.push
}

func (it *item) inspectUDP(gso int) {
	it.hl = uint16(it.ihl) + udpLen
	size := len(it.pkt) - int(it.hl)
	if gso > 0 && size > gso {
		it.gso = uint16(gso)
		return
	}
	if it.ihl != minIPv4 || size == 0 {
		return
	}
	it.proto = protoUDP
	it.size = uint16(size)
	it.id = be16(it.pkt[4:]) + 1
}

// ends reports whether a packet that cannot join an item must keep later
// packets of its flow from joining an earlier item: anything with ports but a
// pure ACK, which carries nothing that data overtakes.
func (it *item) ends() bool {
	p := it.pkt
	l4 := p[it.ihl:]
	switch {
	case p[9] != protoTCP && p[9] != protoUDP || len(l4) < 4:
		return false
	case p[9] == protoUDP || len(l4) < minTCP || be16(p[6:])&fragMask != 0:
		// A later fragment has no ports: some flow loses a merge, no more.
		return true
	}
	return l4[13] != flagACK || int(l4[12]>>4)*4 != len(l4)
}

// bucket hashes addresses and ports of a packet with at least 4 bytes behind
// the IPv4 header.
func (it *item) bucket() uint32 {
	p := it.pkt
	h := be32(p[12:]) ^ be32(p[16:])*0x9e3779b1 ^ be32(p[it.ihl:])*0x85ebca6b ^ uint32(p[9])
	h *= 0xc2b2ae35
	return h >> 24
}

func (it *item) sameFlow(x *item) bool {
	a, b := it.pkt, x.pkt
	return it.proto == x.proto && be32(a[12:]) == be32(b[12:]) && be32(a[16:]) == be32(b[16:]) &&
		be32(a[minIPv4:]) == be32(b[minIPv4:])
}

// join appends x to the open item it of the same flow when every rule allows it.
func (c *Coalescer) join(it, x *item) bool {
	a, b := it.pkt, x.pkt
	switch {
	case it.closed || x.size > it.size || x.hl != it.hl || it.total+int(x.size) > maxPacket || c.nparts == maxParts,
		a[1] != b[1] || a[8] != b[8] || a[6] != b[6],    // TOS, TTL, DF and the reserved bit
		b[6]&(dontFrag>>8) == 0 && be16(b[4:]) != it.id: // without DF the ID counts
		return false
	case it.parts == maxItemParts || it.proto == protoUDP && it.parts == maxUDPParts:
		return false
	case it.proto == protoTCP && !joinsTCP(it, x):
		return false
	case !it.verify() || !x.verify():
		return false
	}
	c.append(it, b[x.hl:], x.tag)
	it.seq, it.id = x.seq, x.id
	it.push = it.push || x.push
	it.closed = x.closed || x.size < it.size
	return true
}

// append adds a packet's payload to the item.
func (c *Coalescer) append(it *item, payload []byte, tag uint64) {
	i := int32(c.nparts)
	c.parts[i] = part{payload: payload, tag: tag, next: -1}
	c.nparts++
	if it.tail < 0 {
		it.head = i
	} else {
		c.parts[it.tail].next = i
	}
	it.tail = i
	it.parts++
	it.total += len(payload)
}

func joinsTCP(it, x *item) bool {
	a, b := it.pkt[minIPv4:it.hl], x.pkt[minIPv4:x.hl]
	return be32(b[4:]) == it.seq &&
		be32(a[8:]) == be32(b[8:]) && // acknowledgement
		a[12] == b[12] && (a[13]^b[13])&flagECE == 0 && // AE (accurate ECN), reserved bits, ECE
		be16(a[14:]) == be16(b[14:]) && // window
		bytes.Equal(a[minTCP:], b[minTCP:]) // options
}

// verify checks the transport checksum once. A merged packet is marked as
// checked, so nobody behind us would notice a wrong one.
func (it *item) verify() bool {
	if it.csum == csumUnknown {
		l4 := it.pkt[it.ihl:]
		if Fold(Sum(l4, pseudoSum(it.pkt, it.pkt[9], len(l4)))) != 0xffff {
			it.closed = true
			return false
		}
		it.csum = csumGood
	}
	return it.csum != csumNone
}

// header makes the virtio header of the item and, for a merged or whole
// super-packet, rewrites the first packet's headers to cover it all.
func (it *item) header(h *vnetHdr) {
	*h = vnetHdr{}
	if it.gso != 0 && !it.verify() {
		it.gso = 0 // a wrong checksum must reach the kernel as it is
	}
	off := uint16(tcpCsumOff)
	if it.pkt[9] == protoUDP {
		off = udpCsumOff
	}
	if it.parts == 1 && it.gso == 0 {
		if it.csum == csumPartial {
			*h = vnetHdr{flags: needsCsum, csumStart: uint16(it.ihl), csumOffset: off}
		}
		return
	}
	p := it.pkt
	l4Len := it.total - int(it.ihl)
	*h = vnetHdr{flags: needsCsum, gsoType: gsoTCPv4, hdrLen: it.hl, gsoSize: it.size, csumStart: uint16(it.ihl), csumOffset: off}
	if it.gso != 0 {
		h.gsoSize = it.gso
	}
	l4 := p[it.ihl:]
	if off == udpCsumOff {
		h.gsoType = gsoUDPL4
		put16(l4[4:], uint16(l4Len))
	} else {
		if it.push {
			l4[13] |= flagPSH
		}
		if l4[13]&flagCWR != 0 {
			h.gsoType |= gsoECN
		}
	}
	put16(p[2:], uint16(it.total))
	putIPChecksum(p, int(it.ihl))
	put16(l4[off:], Fold(pseudoSum(p, p[9], l4Len)))
}
