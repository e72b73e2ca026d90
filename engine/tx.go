package engine

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"tweed/encap"
	"tweed/engine/table"
	"tweed/engine/tap"
	"tweed/tun"
)

const (
	// vxlanSources is how many source ports a worker spreads vxlan flows over,
	// a power of two: the underlay and the receiver balance by them.
	vxlanSources = 4
	// headerSlab holds the headers of the segments of one send.
	headerSlab = 64 << 10
)

// sender is what transmitting needs of an encap.Socket; a test can put itself in
// its place.
type sender interface {
	Send(*encap.SendBatch, *encap.SendResult)
	Offloads() (gso, gro bool)
}

// out is a socket and the batch it will send. All peers of an out have the
// same framing.
type out struct {
	sock      sender
	batch     *encap.SendBatch
	prefixLen uint64
	port      uint16 // local
}

// txWorker carries packets from its queues to the sockets.
type txWorker struct {
	engine *Engine
	source source
	// impaired is source if that is one, to be closed.
	impaired *impairedSource
	queue    *tun.Queue // the batch came from it
	from     *port      // and from this port; nil for the host's device
	batch    *tun.ReadBatch
	split    tun.Splitter
	outs     [1 + vxlanSources]out // 0: udp framing
	hdrs     []byte
	hdrPos   int
	scratch  tun.Scratch
	local    uint32 // underlay address, host byte order
	// refused tells the tap of a segment that was not sent.
	refused func(id uint64, class encap.SendError)

	tally  tally
	ledger ledger
	icmp   icmpSender
	busy   busy
	result encap.SendResult
	tap    tapper
}

func newTxWorker(e *Engine, src source, udp *encap.Socket) (*txWorker, error) {
	w := &txWorker{engine: e, source: src, hdrs: make([]byte, headerSlab), local: addrBits(e.cfg.Source)}
	for i := range w.outs {
		s := udp
		if i > 0 || udp == nil {
			var err error
			s, err = e.socket(encap.SocketConfig{Addr: netip.AddrPortFrom(e.cfg.Source, 0), SendOnly: true})
			if err != nil {
				return nil, err
			}
		}
		local, err := s.LocalAddr()
		if err != nil {
			return nil, err
		}
		o := out{sock: s, batch: encap.NewSendBatch(), port: local.Port()}
		if i > 0 {
			o.prefixLen = uint64(encap.FramingVXLAN.PrefixLen())
		}
		o.batch.Reset(s)
		w.outs[i] = o
	}
	var err error
	if w.batch, err = tun.NewReadBatch(); err != nil {
		return nil, err
	}
	w.icmp.init()
	w.tap.worker = e.taps()
	w.refused = func(id uint64, class encap.SendError) {
		if w.tap.ring != nil {
			w.tap.ring.Fail(id, 0, tap.WireOut, uint8(sendReasons[class]), 1)
		}
	}
	return w, nil
}

// serve reads from one queue and sends what it brought. It returns the number
// of packets, 0 when there were none.
func (w *txWorker) serve() (int, error) {
	w.busy.enter()
	defer w.busy.leave()
	var err error
	if w.queue, w.from, err = w.source.TryRead(w.batch); err != nil {
		return 0, fmt.Errorf("engine: transmit: %w", err)
	}
	n := len(w.batch.Packets())
	if n > 0 {
		w.round()
	}
	w.batch.GiveBack() // while the port is ours
	return n, nil
}

// round sends the batch.
func (w *txWorker) round() {
	v := w.engine.view.Load()
	w.tap.begin(w.engine.tap.Load())
	packets := w.batch.Packets()
	for i := range packets {
		w.packet(v, &packets[i])
	}
	w.send()
	w.hdrPos = 0
	w.tap.end()
	w.ledger.publish(&w.tally)
}

// packet checks one packet and adds its segments to a batch. Before its end is
// fetched from where it may lie, only its headers are looked at.
func (w *txWorker) packet(v *view, p *tun.Packet) {
	room, tail := w.batch.Headers(p, tun.Headroom)
	if len(tail) > 0 && (v.ports == nil || w.tap.ring != nil) {
		room, tail = w.batch.Bytes(p, tun.Headroom), nil
	}
	ip := room[tun.Headroom:]
	segments, bytes := uint64(1), uint64(len(ip))
	super := p.Super()
	if super {
		if err := w.split.Start(ip, &p.Header); err != nil {
			w.tally.Packets++
			w.tally.Bytes += bytes
			reason, ok := w.admit(ip) // IPv6 has super-packets too
			if ok {
				reason = TxMalformed
			}
			w.drop(p, ip, reason, 1)
			return
		}
		segments = uint64(w.split.Count())
		bytes += (segments - 1) * uint64(w.split.HeaderLen())
	}
	w.tally.Packets += segments
	w.tally.Bytes += bytes
	reason, ok := w.admit(ip)
	if !ok {
		w.drop(p, ip, reason, segments)
		return
	}
	if v.ports != nil && w.switched(v, p, ip, tail, segments, bytes) {
		return
	}
	room = w.batch.Bytes(p, tun.Headroom) // the tail with it
	e, reason := w.route(v, ip, super)
	if e == nil {
		w.drop(p, ip, reason, segments)
		return
	}
	if super {
		w.splitTo(e, room)
		return
	}
	elide := p.Partial() && e.PartialChecksums && p.Elidable(ip)
	if p.Partial() && !elide && !p.Complete(ip) {
		w.drop(p, ip, TxMalformed, 1)
		return
	}
	head := room[tun.Headroom-e.PrefixLen:]
	copy(head, e.Prefix[:e.PrefixLen])
	w.add(w.outOf(e, ip), e, segment{ecn: ip[1] & 3, partial: elide, head: head})
}

// drop counts a packet that gets no further, and shows it to the tap.
func (w *txWorker) drop(p *tun.Packet, ip []byte, reason Reason, segments uint64) {
	w.tally.drop(reason, segments)
	if w.tap.ring == nil {
		return
	}
	h := tap.Header{Points: tap.Of(tap.TunIn, tap.Drop), Reason: uint8(reason), Flags: tap.Inner}
	w.show(&h, p, ip, segments)
}

// show gives the tap a packet that has not been split.
func (w *txWorker) show(h *tap.Header, p *tun.Packet, ip []byte, segments uint64) {
	h.Segments = uint16(segments)
	if p.Partial() {
		h.Flags |= tap.Partial
	}
	if p.Super() {
		h.Flags |= tap.Super
		h.SegmentPayload = uint16(p.SegmentPayload())
	}
	w.tap.put(h, ip, nil)
}

// admit checks the header of a packet from a queue.
func (w *txWorker) admit(ip []byte) (Reason, bool) {
	if len(ip) > 0 && ip[0]>>4 != 4 {
		return TxNotIPv4, false
	}
	if len(ip) < 20 {
		return TxMalformed, false
	}
	ihl, total := int(ip[0]&0xf)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if ihl < 20 || total < ihl || total > len(ip) {
		return TxMalformed, false
	}
	if w.from != nil && binary.BigEndian.Uint32(ip[12:]) != w.from.addr {
		return TxForeignSource, false
	}
	return 0, true
}

// route finds the peer of a packet, or the reason there is none, and answers
// the sender where it is due. It decrements the TTL as flannel's proxy does.
func (w *txWorker) route(v *view, ip []byte, super bool) (*table.Entry, Reason) {
	dst := binary.BigEndian.Uint32(ip[16:])
	e := v.table.Direct(dst)
	if e == nil {
		e = v.table.Deeper(dst)
	}
	if e == nil {
		w.icmp.send(w.queue, v.addr, ip, icmpNetUnreachable, 0)
		return nil, TxNoRoute
	}
	lowest := byte(1)
	if e.Framing == encap.FramingUDP {
		lowest = 2
	}
	if ip[8] < lowest {
		w.icmp.send(w.queue, v.addr, ip, icmpTimeExceeded, 0)
		return nil, TxTTLExpired
	}
	if e.MTU > 0 && ip[6]&0x40 != 0 {
		size := len(ip)
		if super {
			size = min(size, w.split.SegmentLen())
		}
		if size > e.MTU {
			w.icmp.send(w.queue, v.addr, ip, icmpFragNeeded, uint16(e.MTU))
			return nil, TxTooBig
		}
	}
	if e.Framing == encap.FramingUDP {
		tun.DecrementTTL(ip)
	}
	return e, 0
}

// splitTo adds the segments of the super-packet the splitter was started with;
// room is the packet with its headroom.
func (w *txWorker) splitTo(e *table.Entry, room []byte) {
	ip := room[tun.Headroom:]
	o := w.outOf(e, ip)
	s := segment{ecn: ip[1] & 3, partial: e.PartialChecksums}
	if w.tap.ring != nil && w.tap.ring.Whole() {
		s.of = w.showWhole(e, ip)
	}
	w.split.Begin(ip, e.PartialChecksums)
	hl := w.split.HeaderLen()
	need := e.PrefixLen + hl

	// The first segment stays where it is: its headers are rewritten in place
	// and its payload follows them.
	first, _ := w.split.Next(ip[:hl])
	s.head = room[tun.Headroom-e.PrefixLen : tun.Headroom+hl+len(first)]
	copy(s.head, e.Prefix[:e.PrefixLen])
	w.add(o, e, s)
	for {
		if w.hdrPos+need > len(w.hdrs) {
			w.send()
			w.hdrPos = 0
		}
		s.head = w.hdrs[w.hdrPos : w.hdrPos+need]
		payload, ok := w.split.Next(s.head[e.PrefixLen:])
		if !ok {
			return
		}
		copy(s.head, e.Prefix[:e.PrefixLen])
		s.tail = payload
		w.hdrPos += need
		w.add(o, e, s)
	}
}

// showWhole gives the tap the super-packet the splitter was started with, on
// its way to e, and returns its name.
func (w *txWorker) showWhole(e *table.Entry, ip []byte) uint64 {
	h := tap.Header{
		Points: tap.Of(tap.TunIn), Flags: tap.Inner | tap.Super | tap.Whole | tap.Partial, Peer: e.Addr, PeerPort: e.Endpoint.Port(), Local: w.local,
		Segments: uint16(w.split.Count()), SegmentPayload: uint16(w.split.SegmentLen() - w.split.HeaderLen()),
	}
	if e.Framing == encap.FramingUDP {
		h.Flags |= tap.TTLLowered
	}
	w.tap.put(&h, ip, nil)
	return h.ID
}

// segment is one datagram to be sent: prefix and packet in one or two pieces.
type segment struct {
	head, tail []byte
	ecn        uint8
	partial    bool   // inner checksum left to the receiver
	of         uint64 // the super-packet it is of, when the tap wants to know
}

func (w *txWorker) add(o *out, e *table.Entry, s segment) {
	id := w.tap.nextID()
	if w.tap.ring != nil {
		h := tap.Header{ID: id, Points: tap.Of(tap.TunIn, tap.WireOut), PrefixLen: uint8(e.PrefixLen), ECN: s.ecn,
			Peer: e.Addr, PeerPort: e.Endpoint.Port(), Local: w.local, LocalPort: o.port, Segments: 1}
		if s.partial {
			h.Flags |= tap.Partial
		}
		if s.of != 0 {
			h.Of, h.Flags = s.of, h.Flags|tap.Segment
		}
		if e.Framing == encap.FramingUDP {
			h.Flags |= tap.TTLLowered
		}
		w.tap.put(&h, s.head, s.tail)
	}
	if !o.batch.Add(e.Dest, s.ecn, id, s.head, s.tail) {
		w.send()
		o.batch.Add(e.Dest, s.ecn, id, s.head, s.tail)
	}
}

// outOf chooses the socket. A flow always leaves from the same source port.
func (w *txWorker) outOf(e *table.Entry, ip []byte) *out {
	if e.Framing != encap.FramingVXLAN {
		return &w.outs[0]
	}
	h := binary.BigEndian.Uint32(ip[12:]) ^ binary.BigEndian.Uint32(ip[16:])
	// Ports exist in the first fragment only, so fragments hash without them.
	if ihl := int(ip[0]&0xf) * 4; (ip[9] == 6 || ip[9] == 17) && binary.BigEndian.Uint16(ip[6:])&0x3fff == 0 && len(ip) >= ihl+4 {
		h ^= binary.BigEndian.Uint32(ip[ihl:])
	}
	h *= 0x9e3779b1
	return &w.outs[1+h>>30]
}

// send hands every batch to the kernel and enters the outcome.
func (w *txWorker) send() {
	for i := range w.outs {
		o := &w.outs[i]
		if o.batch.Len() == 0 {
			continue
		}
		w.result = encap.SendResult{Refused: w.refused}
		o.sock.Send(o.batch, &w.result)
		w.tally.Delivered += w.result.Sent.Segments
		w.tally.DeliveredBytes += w.result.Sent.Bytes - w.result.Sent.Segments*o.prefixLen
		for class, c := range w.result.Failed {
			if c.Segments > 0 {
				w.tally.drop(sendReasons[class], c.Segments)
			}
		}
	}
}

var sendReasons = [encap.NumSendErrors]Reason{
	encap.SendOther:       TxSendError,
	encap.SendRefused:     TxRefused,
	encap.SendUnreachable: TxUnreachable,
	encap.SendNoBuffer:    TxNoBuffer,
	encap.SendTooBig:      TxTooBig,
}
