package encap

// Words used here:
//
//	segment  one datagram: a prefix and one inner packet
//	run      consecutive segments to one destination, equally long but for a
//	         shorter last one
//	message  a run as the kernel takes it: one msghdr, with UDP_SEGMENT when it
//	         holds more than one segment
//	batch    the messages of one sendmmsg

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxMessages and maxPieces bound one batch. 64 small packets need 64
	// messages at worst, a super-packet 2 pieces a segment.
	maxMessages = 256
	maxPieces   = 1024
	// maxBatch bounds the segments of one batch.
	maxBatch = 1024
	// maxSegments is UDP_MAX_SEGMENTS before Linux 6.9; later kernels take 128.
	maxSegments = 64
	// maxPayload is the largest UDP payload over IPv4 without options.
	maxPayload = 65507

	segmentSpace = 24 // CMSG_SPACE(sizeof(uint16))
	tosSpace     = 24 // CMSG_SPACE(sizeof(int))
)

// SendError says what became of a message that the kernel did not take.
type SendError uint8

// Send errors, by what an operator would do about them.
const (
	// SendOther: an error with no class of its own.
	SendOther SendError = iota
	// SendRefused: a local firewall rule (EPERM, EACCES).
	SendRefused
	// SendUnreachable: no route to the destination.
	SendUnreachable
	// SendNoBuffer: a full buffer or device queue.
	SendNoBuffer
	// SendTooBig: the datagram exceeds what the way carries (EMSGSIZE).
	SendTooBig

	// NumSendErrors is the number of classes, for arrays indexed by SendError.
	NumSendErrors
)

func classify(e syscall.Errno) SendError {
	switch e {
	case unix.EPERM, unix.EACCES:
		return SendRefused
	case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN, unix.EHOSTDOWN, unix.EADDRNOTAVAIL:
		return SendUnreachable
	case unix.ENOBUFS, unix.EAGAIN, unix.ENOMEM:
		return SendNoBuffer
	case unix.EMSGSIZE:
		return SendTooBig
	}
	return SendOther
}

// Count is a number of segments and of their bytes, prefixes included.
type Count struct{ Segments, Bytes uint64 }

// SendResult says what became of a batch. Every segment added since the last
// Send is in Sent or in one of Failed.
type SendResult struct {
	Sent   Count
	Failed [NumSendErrors]Count
	// Refused, unless nil, is called for each failed segment with its tag.
	Refused func(tag uint64, class SendError)
}

func (r *SendResult) fail(class SendError, bytes uint64, tags []uint64) {
	r.Failed[class].add(uint64(len(tags)), bytes)
	if r.Refused != nil {
		for _, t := range tags {
			r.Refused(t, class)
		}
	}
}

type message struct {
	dst      *Dest
	segLen   uint32
	bytes    uint32
	segments uint32
	first    uint32 // index of its first segment in the batch
	// closed: a shorter segment ended the run.
	closed bool
	tos    uint8
}

type control [segmentSpace + tosSpace]byte

// SendBatch collects segments into messages. It belongs to one goroutine.
// What is added is borrowed until Send returns.
type SendBatch struct {
	msgs [maxMessages]message
	hdrs [maxMessages]mmsghdr
	ctrl [maxMessages]control
	iovs [maxPieces]unix.Iovec
	tags [maxBatch]uint64
	// one and few are a single segment's message: head and tail are two pieces
	// at most.
	one    [1]mmsghdr
	few    [2]unix.Iovec
	n      int // messages
	pieces int
	segs   int
	gso    bool
}

// NewSendBatch returns an empty batch.
func NewSendBatch() *SendBatch { return new(SendBatch) }

// Reset forgets everything added and takes up the socket's current rung.
func (b *SendBatch) Reset(s *Socket) {
	b.n, b.pieces, b.segs = 0, 0, 0
	b.gso = s.gso.Load()
}

// Len returns the number of messages.
func (b *SendBatch) Len() int { return b.n }

// Add appends one segment made of head and tail (which may be empty) to the
// current run or starts a new one. tos is the outer type of service, tag what
// Refused is called with. It reports false, and adds nothing, when the batch is
// full and must be sent first.
func (b *SendBatch) Add(dst *Dest, tos uint8, tag uint64, head, tail []byte) bool {
	size := uint32(len(head) + len(tail))
	if b.pieces+2 > maxPieces || b.segs == maxBatch {
		return false
	}
	m := b.current(dst, tos, size)
	if m == nil {
		if b.n == maxMessages {
			return false
		}
		m = &b.msgs[b.n]
		*m = message{dst: dst, segLen: size, tos: tos, first: uint32(b.segs)}
		h := &b.hdrs[b.n].hdr
		h.Iov, h.Iovlen = &b.iovs[b.pieces], 0
		b.n++
	}
	b.tags[b.segs] = tag
	b.segs++
	m.bytes += size
	m.segments++
	m.closed = size < m.segLen
	h := &b.hdrs[b.n-1].hdr
	b.piece(h, head)
	if len(tail) > 0 {
		b.piece(h, tail)
	}
	return true
}

// current returns the last message when the segment may join it.
func (b *SendBatch) current(dst *Dest, tos uint8, size uint32) *message {
	if b.n == 0 || !b.gso {
		return nil
	}
	m := &b.msgs[b.n-1]
	if m.dst != dst || m.closed || size > m.segLen || m.tos != tos ||
		m.segments == maxSegments || m.bytes+size > maxPayload || !dst.Segmented() {
		return nil
	}
	return m
}

// piece appends p to the message of h, extending the last piece when p follows
// it in memory: a train of small packets read one behind the other becomes one
// piece.
func (b *SendBatch) piece(h *unix.Msghdr, p []byte) {
	base := unsafe.SliceData(p)
	if h.Iovlen > 0 {
		last := &b.iovs[b.pieces-1]
		if uintptr(unsafe.Pointer(last.Base))+uintptr(last.Len) == uintptr(unsafe.Pointer(base)) {
			last.Len += uint64(len(p))
			return
		}
	}
	b.iovs[b.pieces] = unix.Iovec{Base: base, Len: uint64(len(p))}
	b.pieces++
	h.Iovlen++
}

// Send hands the batch to the kernel and empties it. A message that is refused
// is skipped in place and counted, the rest is sent. When a segmented message
// is refused for being segmented, its segments are sent one by one, and the
// socket (EIO, EINVAL) or the destination (EMSGSIZE) gives up segmentation.
func (s *Socket) Send(b *SendBatch, res *SendResult) {
	for i := range b.n {
		b.finish(i)
	}
	for i := 0; i < b.n; {
		n, e := s.sendmmsg(s.fd, b.hdrs[i:b.n])
		if e == 0 && n > 0 {
			for _, m := range b.msgs[i : i+n] {
				res.Sent.add(uint64(m.segments), uint64(m.bytes))
			}
			i += n
			continue
		}
		if e == unix.EINTR {
			continue
		}
		s.refused(b, i, e, res)
		i++
	}
	b.Reset(s)
}

// finish completes the msghdr of message i.
func (b *SendBatch) finish(i int) {
	m, h := &b.msgs[i], &b.hdrs[i].hdr
	h.Name = (*byte)(unsafe.Pointer(&m.dst.sockaddr))
	h.Namelen = unix.SizeofSockaddrInet4
	c := &b.ctrl[i]
	n := 0
	if m.segments > 1 {
		cm := (*unix.Cmsghdr)(unsafe.Pointer(&c[n]))
		cm.Level, cm.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
		cm.SetLen(unix.CmsgLen(2))
		*(*uint16)(unsafe.Pointer(&c[n+unix.SizeofCmsghdr])) = uint16(m.segLen)
		n += segmentSpace
	}
	if m.tos != 0 {
		cm := (*unix.Cmsghdr)(unsafe.Pointer(&c[n]))
		cm.Level, cm.Type = unix.IPPROTO_IP, unix.IP_TOS
		cm.SetLen(unix.CmsgLen(4))
		*(*int32)(unsafe.Pointer(&c[n+unix.SizeofCmsghdr])) = int32(m.tos)
		n += tosSpace
	}
	h.Control, h.Controllen = nil, 0
	if n > 0 {
		h.Control = &c[0]
		h.SetControllen(n)
	}
}

// refused deals with message i, which the kernel answered with e.
func (s *Socket) refused(b *SendBatch, i int, e syscall.Errno, res *SendResult) {
	m := &b.msgs[i]
	if m.segments > 1 {
		switch e {
		case unix.EIO, unix.EINVAL:
			before := res.Sent.Segments
			s.sendSegments(b, i, res)
			if res.Sent.Segments > before {
				// Single datagrams go the same way, so segmentation is to blame and
				// not the destination: a bad lease slows down nobody else.
				s.gso.Store(false)
			}
			return
		case unix.EMSGSIZE:
			m.dst.noGSO.Store(true)
			s.sendSegments(b, i, res)
			return
		}
	}
	res.fail(classify(e), uint64(m.bytes), b.tags[m.first:m.first+m.segments])
}

// sendSegments sends the segments of message i one datagram each.
func (s *Socket) sendSegments(b *SendBatch, i int, res *SendResult) {
	m := &b.msgs[i]
	all := unsafe.Slice(b.hdrs[i].hdr.Iov, b.hdrs[i].hdr.Iovlen)
	b.one[0] = b.hdrs[i]
	h := &b.one[0].hdr
	if h.Controllen > 0 { // drop UDP_SEGMENT, which comes first, keep IP_TOS
		rest := int(h.Controllen) - segmentSpace
		h.Control = &b.ctrl[i][segmentSpace]
		h.SetControllen(rest)
		if rest == 0 {
			h.Control = nil
		}
	}
	at, off := 0, uint64(0)
	tags := b.tags[m.first : m.first+m.segments]
	for left := m.bytes; left > 0; tags = tags[1:] {
		size := min(m.segLen, left)
		n := 0
		for need := uint64(size); need > 0; n++ {
			p := &all[at]
			take := min(need, p.Len-off)
			b.few[n] = unix.Iovec{Base: (*byte)(unsafe.Add(unsafe.Pointer(p.Base), off)), Len: take}
			need -= take
			if off += take; off == p.Len {
				at, off = at+1, 0
			}
		}
		h.Iov, h.Iovlen = &b.few[0], uint64(n)
		s.sendOne(b.one[:], uint64(size), tags[:1], res)
		left -= size
	}
}

func (s *Socket) sendOne(one []mmsghdr, size uint64, tag []uint64, res *SendResult) {
	for {
		n, e := s.sendmmsg(s.fd, one)
		switch {
		case e == unix.EINTR:
			continue
		case e == 0 && n == 1:
			res.Sent.add(1, size)
		default:
			res.fail(classify(e), size, tag)
		}
		return
	}
}

func (c *Count) add(segments, bytes uint64) {
	c.Segments += segments
	c.Bytes += bytes
}
