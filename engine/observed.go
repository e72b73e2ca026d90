package engine

import (
	"tweed/encap"
	"tweed/engine/tap"
	"tweed/tun"
)

// Carried is a packet that a Bypass carried, as an Observer sees it.
type Carried struct {
	// Time is in nanoseconds since 1970.
	Time int64
	// Receive is true in the direction underlay to TUN.
	Receive bool
	// Peer and Local are the two ends on the underlay, host byte order.
	Peer, Local         uint32
	PeerPort, LocalPort uint16
	// ECN is the outer header's ECN field.
	ECN uint8
	// PrefixLen bytes of the framing stand before the inner packet.
	PrefixLen int
	// SegmentPayload is the payload of each segment of a super-packet, in bytes;
	// 0 for one packet.
	SegmentPayload int
	// Length is that of the packet and its framing, in bytes. Data is as much of
	// it as was asked for, and all of a super-packet. It is borrowed.
	Length int
	Data   []byte
}

// Observer is shown what a Bypass carries. One goroutine calls it.
type Observer interface {
	// Carried is called for each packet.
	Carried(*Carried)
	// Missed says that n more packets were carried but not shown.
	Missed(receive bool, n uint64)
	// Flush is called now and then: all packets carried before until, in ns
	// since 1970, have been shown or counted as missed.
	Flush(until int64)
}

// observer puts what a bypass carries into a ring of the tap, in the records in
// which the workers would put it.
type observer struct {
	worker int
	id     uint64
	ring   *tap.Ring
	split  tun.Splitter
	head   [tun.Headroom + 128]byte
}

func (o *observer) next() uint64 {
	o.id++
	return uint64(o.worker)<<56 | o.id
}

// Carried implements Observer.
func (o *observer) Carried(c *Carried) {
	h := o.header(c)
	pkt := c.Data[min(c.PrefixLen, len(c.Data)):]
	if c.SegmentPayload > 0 {
		v := tun.SuperHeader(pkt, c.SegmentPayload)
		if len(c.Data) == c.Length && o.split.Start(pkt, &v) == nil {
			o.super(c, &h, pkt)
			return
		}
	}
	if tun.PartialChecksum(pkt) {
		h.Flags |= tap.Partial
	}
	o.ring.PutCut(&h, c.Length, c.Data)
}

// header is what all records of the packet have in common.
func (o *observer) header(c *Carried) tap.Header {
	h := tap.Header{
		Time: c.Time, ID: o.next(), Points: tap.Of(tap.TunIn, tap.WireOut), PrefixLen: uint8(c.PrefixLen), ECN: c.ECN,
		Receive: c.Receive, Peer: c.Peer, PeerPort: c.PeerPort, Local: c.Local, LocalPort: c.LocalPort, Segments: 1,
		Flags: tap.NoChecksum, // by which nodes tell what was carried inside the kernel
	}
	switch {
	case c.Receive:
		h.Points = tap.Of(tap.WireIn, tap.TunOut)
	case c.PrefixLen == encap.FramingUDP.PrefixLen():
		h.Flags |= tap.TTLLowered
	}
	return h
}

// super puts a record for each segment, and one of the whole for those who want it.
func (o *observer) super(c *Carried, h *tap.Header, pkt []byte) {
	h.Flags |= tap.Partial
	if o.ring.Whole() {
		w := *h
		w.Points, w.PrefixLen, w.Flags = tap.Of(tap.TunIn), 0, w.Flags|tap.Inner|tap.Super|tap.Whole
		if c.Receive {
			w.Points = tap.Of(tap.TunOut)
		}
		w.Of = w.ID
		w.Segments, w.SegmentPayload = uint16(o.split.Count()), uint16(c.SegmentPayload)
		o.ring.Put(&w, pkt, nil)
		h.Of, h.Flags, h.ID = w.ID, h.Flags|tap.Segment, o.next()
	}
	o.split.Begin(pkt, true)
	head := o.head[:c.PrefixLen+o.split.HeaderLen()]
	copy(head, c.Data[:c.PrefixLen])
	for {
		payload, ok := o.split.Next(head[c.PrefixLen:])
		if !ok {
			return
		}
		o.ring.Put(h, head, payload)
		h.ID = o.next()
		h.Time++
	}
}

// Missed implements Observer.
func (o *observer) Missed(receive bool, n uint64) {
	points := tap.Of(tap.TunIn, tap.WireOut)
	if receive {
		points = tap.Of(tap.WireIn, tap.TunOut)
	}
	o.ring.Miss(points, n)
}

// Flush implements Observer.
func (o *observer) Flush(until int64) {
	o.ring.Commit()
	o.ring.SetHorizon(until)
}
