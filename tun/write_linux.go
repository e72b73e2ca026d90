package tun

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Written says what became of the packets of a Flush. Packets and Bytes count
// what was added, so a merged item counts as the packets it was made of.
type Written struct {
	Packets, Bytes uint64
	// Failed counts packets the device refused: it is down, gone or short of
	// memory.
	Failed, FailedBytes uint64
	// Writes is the number of system calls.
	Writes uint64
	// Refused, unless nil, is called with the tag of each failed packet.
	Refused func(tag uint64)
	// Wrote, unless nil, is called for each write that succeeded, and Joined
	// then for each packet but the first of it. Merged is borrowed.
	Wrote  func(*Merged)
	Joined func(tag, first uint64)
}

// Merged is what was written at once: one packet, or several under the headers
// of the first.
type Merged struct {
	// Tag names the first packet.
	Tag uint64
	// Parts is the number of packets, Payload the payload bytes of each but the
	// last, Length the bytes of all as one packet.
	Parts, Payload, Length int
	// Partial says that the transport checksum is the sum of the pseudo header.
	Partial bool
	// Pieces are the packet, the headers in the first.
	Pieces []unix.Iovec
}

func (r *Written) fail(tag, bytes uint64) {
	r.Failed++
	r.FailedBytes += bytes
	if r.Refused != nil {
		r.Refused(tag)
	}
}

// Writer writes the items of a Coalescer to their queues. It belongs to one
// goroutine.
type Writer struct {
	iovs   [1 + maxParts]unix.Iovec
	hdr    [maxHdr]byte
	merged Merged
}

// NewWriter returns a Writer.
func NewWriter() *Writer { return new(Writer) }

// Flush writes everything added to the coalescer, in the order of the items'
// first packets, and empties it.
func (w *Writer) Flush(c *Coalescer, res *Written) {
	for i := range c.n {
		it := &c.items[i]
		switch {
		case it.parts > 1 && it.queue.noGSO.Load():
			w.flushParts(c, it, res)
		case w.item(c, it, res):
			res.Packets += uint64(it.parts)
			res.Bytes += uint64(it.total + (it.parts-1)*int(it.hl))
		case it.parts > 1 && it.queue.noGSO.Load():
			w.flushParts(c, it, res)
		default:
			res.fail(it.tag, uint64(len(it.pkt)))
			for p := it.head; p >= 0; p = c.parts[p].next {
				res.fail(c.parts[p].tag, uint64(int(it.hl)+len(c.parts[p].payload)))
			}
		}
	}
	if c.n > 0 {
		clear(c.buckets[:])
		c.n, c.nparts, c.last = 0, 0, -1
	}
}

// item writes one item. It reports false when the device refused it, and turns
// super-packets off when it refused it for being one.
func (w *Writer) item(c *Coalescer, it *item, res *Written) bool {
	var h vnetHdr
	it.header(&h)
	n := w.start(it.queue, &h, it.pkt)
	for p := it.head; p >= 0; p = c.parts[p].next {
		w.iovs[n].Base = unsafe.SliceData(c.parts[p].payload)
		w.iovs[n].Len = uint64(len(c.parts[p].payload))
		n++
	}
	res.Writes++
	e := it.queue.put(w.iovs[:n])
	if e == unix.EINVAL && it.parts > 1 {
		// Some kernels refuse coalesced writes (e269d79c7d35 and its backports,
		// until 89add40066f9); the packets themselves are good.
		it.queue.noGSO.Store(true)
	}
	if e == 0 && res.Wrote != nil {
		w.merged = Merged{Tag: it.tag, Parts: it.parts, Payload: int(it.size), Length: it.total, Partial: h.flags&needsCsum != 0, Pieces: w.iovs[1:n]}
		res.Wrote(&w.merged)
		for p := it.head; p >= 0; p = c.parts[p].next {
			res.Joined(c.parts[p].tag, it.tag)
		}
	}
	return e == 0
}

func (w *Writer) start(q *Queue, h *vnetHdr, pkt []byte) int {
	q.link(h, w.hdr[:q.hdr])
	w.iovs[0].Base, w.iovs[0].Len = &w.hdr[0], uint64(q.hdr)
	w.iovs[1].Base, w.iovs[1].Len = unsafe.SliceData(pkt), uint64(len(pkt))
	return 2
}

// flushParts writes the packets of a merged item one by one. Each still has its
// own headers in front of its payload, but for the first, whose headers were
// rewritten.
func (w *Writer) flushParts(c *Coalescer, it *item, res *Written) {
	first := it.pkt
	l4 := first[it.ihl:]
	put16(first[2:], uint16(len(first)))
	putIPChecksum(first, int(it.ihl))
	off := uint16(tcpCsumOff)
	if it.proto == protoUDP {
		off = udpCsumOff
		put16(l4[4:], uint16(len(l4)))
	} else if it.parts > 1 {
		l4[13] &^= flagPSH // only the last packet of an item may carry it
	}
	put16(l4[off:], Fold(pseudoSum(first, it.proto, len(l4))))

	pkt, tag := first, it.tag
	for p := it.head; ; p = c.parts[p].next {
		h := vnetHdr{flags: needsCsum, csumStart: uint16(it.ihl), csumOffset: off}
		l4 := pkt[it.ihl:]
		if be16(l4[off:]) != Fold(pseudoSum(pkt, it.proto, len(l4))) {
			h = vnetHdr{}
		}
		res.Writes++
		if e := it.queue.put(w.iovs[:w.start(it.queue, &h, pkt)]); e == 0 {
			res.Packets++
			res.Bytes += uint64(len(pkt))
			if res.Wrote != nil {
				w.merged = Merged{Tag: tag, Parts: 1, Length: len(pkt), Partial: h.flags&needsCsum != 0, Pieces: w.iovs[1:2]}
				res.Wrote(&w.merged)
			}
		} else {
			res.fail(tag, uint64(len(pkt)))
		}
		if p < 0 {
			return
		}
		payload := c.parts[p].payload
		tag = c.parts[p].tag
		base := unsafe.Add(unsafe.Pointer(unsafe.SliceData(payload)), -int(it.hl))
		pkt = unsafe.Slice((*byte)(base), int(it.hl)+len(payload))
	}
}
