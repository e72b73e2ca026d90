package engine

import (
	"bytes"
	"encoding/binary"
	"unsafe"

	"tweed/encap"
	"tweed/engine/tap"
	"tweed/tun"
)

// rxWorker carries datagrams from one socket to one queue.
type rxWorker struct {
	engine  *Engine
	framing encap.Framing
	prefix  int
	sock    *encap.Socket // nil with batch when the datagrams are replayed
	batch   *encap.RecvBatch
	merge   *tun.Coalescer
	writer  *tun.Writer
	queue   *tun.Queue // of the host's device; nil without one

	// source and known remember the verdict on the last outer source.
	source uint32
	known  bool
	seen   *view

	tally  tally
	ledger ledger
	busy   busy
	tap    tapper
	local  Listen
	// refused tells the tap of a packet that was not written; wrote and joined
	// tell it of super-packets.
	refused func(id uint64)
	wrote   func(*tun.Merged)
	joined  func(id, of uint64)
}

func newRxWorker(e *Engine, l Listen, s *encap.Socket, q *tun.Queue) (*rxWorker, error) {
	w := &rxWorker{
		engine: e, framing: l.Framing, prefix: l.Framing.PrefixLen(), sock: s, local: l,
		merge: tun.NewCoalescer(e.cfg.MTU), writer: tun.NewWriter(), queue: q,
	}
	if s != nil {
		var err error
		if w.batch, err = encap.NewRecvBatch(); err != nil {
			return nil, err
		}
	}
	w.tap.worker = e.taps()
	w.refused = func(id uint64) {
		if w.tap.ring != nil {
			w.tap.ring.Fail(id, w.tap.segments(), tap.TunOut, uint8(RxTUNError), 1)
		}
	}
	w.wrote, w.joined = w.showWhole, func(id, of uint64) { w.tap.ring.Join(id, of) }
	return w, nil
}

// round delivers the n messages of the last Recv.
func (w *rxWorker) round(n int) {
	v := w.begin()
	for i := range n {
		m := w.batch.Message(i)
		w.message(v, &m)
	}
	w.end()
}

// begin starts a round in the view it returns; end finishes it.
func (w *rxWorker) begin() *view {
	w.busy.enter()
	v := w.engine.view.Load()
	if v != w.seen {
		w.seen, w.known = v, v.table.HasAddr(w.source)
	}
	w.tap.begin(w.engine.tap.Load())
	return v
}

func (w *rxWorker) end() {
	w.flush()
	w.tap.end()
	w.ledger.publish(&w.tally)
	w.busy.leave()
}

func (w *rxWorker) message(v *view, m *encap.Message) {
	if m.Source != w.source {
		w.source, w.known = m.Source, v.table.HasAddr(m.Source)
	}
	if m.SegmentLen == 0 || w.whole(m.Data) {
		w.datagram(v, m, m.Data)
		return
	}
	one := encap.Message{Source: m.Source, SourcePort: m.SourcePort, TOS: m.TOS}
	var before []byte // the datagram before this one, if it was accepted
	for data := m.Data; len(data) > 0; {
		n := min(m.SegmentLen, len(data))
		d := data[:n:n]
		data = data[n:]
		if before != nil && w.continues(before, d) {
			continue
		}
		before = nil
		if w.datagram(v, &one, d) && m.TOS&3 != ecnCE {
			before = d
		}
	}
}

// continues takes a datagram that differs from the accepted one before it, of
// the same sender, only as the next segment of a train does. Everything check
// looks at is equal then.
func (w *rxWorker) continues(before, d []byte) bool {
	if w.tap.ring != nil || len(d) < w.prefix || !bytes.Equal(before[:w.prefix], d[:w.prefix]) ||
		!w.merge.Continue(d[w.prefix:], w.tap.id+1) {
		return false
	}
	w.tap.id++
	w.tally.Packets++
	w.tally.Bytes += uint64(len(d) - w.prefix)
	return true
}

// whole reports whether data is one frame although the kernel calls it merged:
// a kernel vxlan device on a virtual link hands over its super-packets
// unsegmented, and for inner UDP it then reports the inner segment size.
func (w *rxWorker) whole(data []byte) bool {
	return len(data) >= w.prefix+20 && w.prefix+int(binary.BigEndian.Uint16(data[w.prefix+2:])) == len(data)
}

// datagram checks one datagram, adds its packet to the coalescer and reports
// whether it was accepted.
func (w *rxWorker) datagram(v *view, m *encap.Message, data []byte) bool {
	w.tally.Packets++
	w.tally.Bytes += uint64(max(len(data)-w.prefix, 0))
	pkt, reason, ok := w.check(v, m, data)
	q := w.queue
	if ok && (v.ports != nil || q == nil) {
		if q = w.portOf(v, pkt); q == nil {
			reason, ok = RxNotForUs, false
		}
	}
	id := w.tap.nextID()
	if w.tap.ring != nil {
		w.show(m, data, id, reason, ok)
	}
	if !ok {
		w.tally.drop(reason, 1)
		return false
	}
	if ecn := m.TOS & 3; ecn == ecnCE || ecn == ecnECT1 && pkt[1]&3 == ecnECT0 {
		tun.SetECN(pkt, ecn) // RFC 6040 section 4.2, and Linux
	}
	if !w.merge.Room() {
		w.flush()
	}
	w.merge.Add(q, pkt, m.SegmentLen, id)
	return true
}

// portOf returns the queue of the port a packet for our subnet goes to, the
// host's when no port has that address.
func (w *rxWorker) portOf(v *view, pkt []byte) *tun.Queue {
	if p := v.ports[binary.BigEndian.Uint32(pkt[16:])]; p != nil {
		return p.Queue
	}
	return w.queue
}

// show gives a datagram to the tap.
func (w *rxWorker) show(m *encap.Message, data []byte, id uint64, reason Reason, ok bool) {
	h := tap.Header{ID: id, Points: tap.Of(tap.WireIn, tap.TunOut), PrefixLen: uint8(w.prefix), ECN: m.TOS & 3,
		Receive: true, Peer: m.Source, PeerPort: m.SourcePort, Local: addrBits(w.local.Addr.Addr()), LocalPort: w.local.Addr.Port(), Segments: 1}
	if !ok {
		h.Points, h.Reason = tap.Of(tap.WireIn, tap.Drop), uint8(reason)
	} else {
		h.Flags = w.tap.segments()
	}
	w.tap.put(&h, data, nil)
}

// showWhole gives the tap what was written to the TUN at once: a packet, or
// several merged into one.
func (w *rxWorker) showWhole(m *tun.Merged) {
	h := tap.Header{
		ID: m.Tag, Of: m.Tag, Points: tap.Of(tap.TunOut), Flags: tap.Inner | tap.Whole, Receive: true,
		Local: addrBits(w.local.Addr.Addr()), LocalPort: w.local.Addr.Port(), Segments: uint16(m.Parts),
	}
	if m.Parts > 1 {
		h.Flags |= tap.Super
		h.SegmentPayload = uint16(m.Payload)
	}
	if m.Partial {
		h.Flags |= tap.Partial
	}
	ip := unsafe.Slice(m.Pieces[0].Base, m.Pieces[0].Len)
	if e := w.seen.table.Lookup(binary.BigEndian.Uint32(ip[12:])); e != nil {
		h.Peer, h.PeerPort = e.Addr, e.Endpoint.Port()
	}
	h.Time = w.tap.now
	w.tap.now++
	w.tap.ring.PutPieces(&h, m.Length, m.Pieces)
}

// check applies the receive rules, the cheapest first, and returns the inner
// packet without padding.
func (w *rxWorker) check(v *view, m *encap.Message, data []byte) (pkt []byte, reason Reason, ok bool) {
	if len(data) < w.prefix+20 {
		return nil, RxTruncated, false
	}
	if !w.known {
		return nil, RxUnknownSource, false
	}
	if w.framing == encap.FramingVXLAN {
		if verdict := v.vxlan.Check(data); verdict != encap.OK {
			return nil, verdictReasons[verdict], false
		}
		data = data[encap.MaxPrefixLen:]
	}
	ihl, total := int(data[0]&0xf)*4, int(binary.BigEndian.Uint16(data[2:]))
	switch {
	case data[0]>>4 != 4:
		return nil, RxNotIPv4, false
	case ihl < 20 || ihl > len(data):
		return nil, RxBadIHL, false
	case total < ihl || total > len(data):
		return nil, RxBadLength, false
	case data[8] == 0:
		return nil, RxTTLZero, false
	}
	src := binary.BigEndian.Uint32(data[12:])
	if martian(src) || src&v.mask == v.base {
		return nil, RxMartian, false
	}
	e := v.table.Direct(src)
	if e == nil {
		e = v.table.Deeper(src)
	}
	if e == nil || e.Addr != m.Source {
		return nil, RxSpoofedSource, false
	}
	if binary.BigEndian.Uint32(data[16:])&v.mask != v.base {
		return nil, RxNotForUs, false
	}
	if m.TOS&3 == ecnCE && data[1]&3 == ecnNone {
		return nil, RxECN, false
	}
	return data[:total:total], 0, true
}

// ECN codepoints (RFC 3168 section 5).
const (
	ecnNone = 0
	ecnECT1 = 1
	ecnECT0 = 2
	ecnCE   = 3
)

var verdictReasons = [...]Reason{
	encap.Short:    RxTruncated,
	encap.BadFlags: RxBadVXLANFlags,
	encap.WrongVNI: RxWrongVNI,
	encap.WrongMAC: RxWrongMAC,
	encap.NotIPv4:  RxNotIPv4,
}

// martian reports whether a can never be a source: 0/8, 127/8, 224/4 and 240/4.
func martian(a uint32) bool {
	top := a >> 24
	return top == 0 || top == 127 || top >= 224
}

// flush writes what the coalescer holds and enters the outcome.
func (w *rxWorker) flush() {
	res := tun.Written{Refused: w.refused}
	if w.tap.ring != nil && w.tap.ring.Whole() {
		res.Wrote, res.Joined = w.wrote, w.joined
	}
	w.writer.Flush(w.merge, &res)
	w.tally.Delivered += res.Packets
	w.tally.DeliveredBytes += res.Bytes
	if res.Failed > 0 {
		w.tally.drop(RxTUNError, res.Failed)
	}
}
