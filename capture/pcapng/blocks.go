package pcapng

import (
	"encoding/binary"
	"io"
	"math"
	"math/bits"
	"strings"
)

// clock turns the timestamps of an interface into nanoseconds since 1970.
type clock struct {
	decimals uint8 // units of 10^-decimals s, unless
	binary   bool  // units of 2^-decimals s
	offset   int64 // seconds
}

// nanoseconds converts a timestamp. What does not fit becomes the nearest time
// that does.
func (c clock) nanoseconds(t uint64) int64 {
	var hi, lo uint64
	switch {
	case c.binary:
		hi, lo = bits.Mul64(t, 1e9)
		for range min(c.decimals, 127) {
			lo, hi = lo>>1|hi<<63, hi>>1
		}
	case c.decimals > 9+19:
		// Less than a nanosecond altogether.
	case c.decimals > 9:
		lo = t / pow10(c.decimals-9)
	default:
		hi, lo = bits.Mul64(t, pow10(9-c.decimals))
	}
	if hi != 0 || lo > math.MaxInt64 {
		lo = math.MaxInt64
	}
	const mostSeconds = math.MaxInt64 / 1_000_000_000
	shift := max(min(c.offset, mostSeconds), -mostSeconds) * 1_000_000_000
	if shift > math.MaxInt64-int64(lo) {
		return math.MaxInt64
	}
	return int64(lo) + shift
}

func pow10(n uint8) uint64 {
	p := uint64(1)
	for range n {
		p *= 10
	}
	return p
}

// nextBlock reads blocks of a pcapng file up to the next packet.
func (r *Reader) nextBlock(p *Packet) error {
	for {
		r.start = r.offset
		if end, err := r.atEnd(); err != nil || end {
			return orEOF(err)
		}
		head, err := r.in.Peek(4)
		if err == nil && le.Uint32(head) == blockSection {
			if err := r.section(); err != nil {
				return err
			}
			continue
		}
		kind, body, err := r.block()
		if err != nil {
			return err
		}
		found := true
		switch kind {
		case blockEnhanced:
			err = r.enhanced(p, body)
		case blockSimple:
			err = r.simple(p, body)
		case blockObsolete:
			err = r.obsolete(p, body)
		case blockInterface:
			found, err = false, r.interfaceBlock(body)
		case blockStatistics:
			found, err = false, r.statistics(body)
		default:
			found = false
		}
		if found || err != nil {
			return err
		}
	}
}

// block reads a block other than a section header. The body of a block of no
// interest is passed over and returned as nil.
func (r *Reader) block() (kind uint32, body []byte, err error) {
	head, err := r.take(8, "a block")
	if err != nil {
		return 0, nil, err
	}
	kind, total := r.order.Uint32(head), r.order.Uint32(head[4:])
	if total < 12 || total%4 != 0 {
		return 0, nil, r.errorf("a block of %d bytes: not a multiple of 4 from 12 up", total)
	}
	n := int64(total) - 8 // with the length at the end
	switch kind {
	case blockInterface, blockSimple, blockEnhanced, blockObsolete, blockStatistics:
	default:
		passed, err := r.discard(n - 4)
		if err != nil {
			return 0, nil, err
		}
		if passed < n-4 {
			return 0, nil, r.truncated("a block")
		}
		n = 4
	}
	if n > maxBlock {
		return 0, nil, r.errorf("a block of %d bytes, more than %d", total, maxBlock)
	}
	body, err = r.take(int(n), "a block")
	if err != nil {
		return 0, nil, err
	}
	if again := r.order.Uint32(body[n-4:]); again != total {
		return 0, nil, r.errorf("a block says %d bytes at its start and %d at its end", total, again)
	}
	return kind, body[: n-4 : n-4], nil
}

// discard passes over n bytes, as far as there are that many.
func (r *Reader) discard(n int64) (int64, error) {
	passed, err := io.CopyN(io.Discard, r.in, n)
	r.offset += passed
	if err == io.EOF {
		err = nil
	}
	return passed, err
}

// section reads a section header block, which settles the byte order and
// starts a new list of interfaces.
func (r *Reader) section() error {
	head, err := r.take(12, "a section header")
	if err != nil {
		return err
	}
	switch {
	case le.Uint32(head[8:]) == byteOrderMagic:
		r.order = binary.LittleEndian
	case binary.BigEndian.Uint32(head[8:]) == byteOrderMagic:
		r.order = binary.BigEndian
	default:
		return r.errorf("a section header without the byte-order magic")
	}
	total := r.order.Uint32(head[4:])
	if total < 28 || total%4 != 0 || total > maxBlock {
		return r.errorf("a section header of %d bytes", total)
	}
	body, err := r.take(int(total)-12, "a section header")
	if err != nil {
		return err
	}
	end := len(body) - 4
	if again := r.order.Uint32(body[end:]); again != total {
		return r.errorf("a block says %d bytes at its start and %d at its end", total, again)
	}
	if major := r.order.Uint16(body); major != 1 {
		return r.errorf("pcapng version %d, expected 1", major)
	}
	r.ifs = r.ifs[:0]
	r.header = Header{}
	return r.options(body[12:end], func(code uint16, v []byte) error {
		switch code {
		case optComment:
			r.header.Comment = joinComment(r.header.Comment, v)
		case shbHardware:
			r.header.Hardware = string(v)
		case shbOS:
			r.header.OS = string(v)
		case shbUserAppl:
			r.header.Application = string(v)
		}
		return nil
	})
}

// joinComment puts several comments of one block on a line each.
func joinComment(before string, v []byte) string {
	text := strings.TrimRight(string(v), "\x00")
	if before == "" {
		return text
	}
	return before + "\n" + text
}

// options calls each for every option of a block's tail.
func (r *Reader) options(b []byte, each func(code uint16, v []byte) error) error {
	for len(b) >= 4 {
		code, n := r.order.Uint16(b), int(r.order.Uint16(b[2:]))
		if code == optEnd {
			return nil
		}
		if n > len(b)-4 {
			return r.errorf("option %d of %d bytes is longer than its block", code, n)
		}
		if err := each(code, b[4:4+n]); err != nil {
			return err
		}
		b = b[min(4+(n+3)&^3, len(b)):]
	}
	return nil
}

func (r *Reader) interfaceBlock(b []byte) error {
	if len(b) < 8 {
		return r.errorf("an interface block of %d bytes", len(b))
	}
	if len(r.ifs) >= maxInterfaces {
		return r.errorf("more than %d interfaces", maxInterfaces)
	}
	n := SourceInterface{Link: r.order.Uint16(b), SnapLen: r.order.Uint32(b[4:]), clock: clock{decimals: 6}}
	err := r.options(b[8:], func(code uint16, v []byte) error {
		switch {
		case code == ifName:
			n.Name = string(v[:min(len(v), maxText)])
		case code == ifDescription:
			n.Description = string(v[:min(len(v), maxText)])
		case code == ifFilter && len(v) > 0 && v[0] == 0:
			n.Filter = string(v[1:min(len(v), maxText)])
		case code == ifTSResol && len(v) == 1:
			n.clock.decimals, n.clock.binary = v[0]&0x7f, v[0]&0x80 != 0
		case code == ifTSOffset && len(v) == 8:
			n.clock.offset = int64(r.order.Uint64(v))
		}
		return nil
	})
	r.ifs = append(r.ifs, n)
	if len(r.ifs) == 1 {
		r.header.Link, r.header.SnapLen = n.Link, n.SnapLen
	}
	return err
}

// statistics reads the counters of an interface.
func (r *Reader) statistics(b []byte) error {
	if len(b) < 12 {
		return r.errorf("a statistics block of %d bytes", len(b))
	}
	of, err := r.source(r.order.Uint32(b))
	if err != nil {
		return err
	}
	s := &Statistics{Interface: int(r.order.Uint32(b)), Time: of.clock.nanoseconds(r.time(b[4:]))}
	err = r.options(b[12:], func(code uint16, v []byte) error {
		if code < isbStartTime || code > isbUsrDeliv {
			return nil
		}
		if len(v) != 8 {
			return r.errorf("option %d of statistics has %d bytes, expected 8", code, len(v))
		}
		switch code {
		case isbStartTime:
			s.Start = of.clock.nanoseconds(r.time(v))
		case isbEndTime:
			s.End = of.clock.nanoseconds(r.time(v))
		case isbIfRecv:
			s.Received = r.order.Uint64(v)
		case isbIfDrop:
			s.Dropped = r.order.Uint64(v)
		case isbFilterAccept:
			s.Accepted = r.order.Uint64(v)
		case isbOSDrop:
			s.OSDropped = r.order.Uint64(v)
		case isbUsrDeliv:
			s.Delivered = r.order.Uint64(v)
		}
		return nil
	})
	of.Statistics = s
	return err
}

// time reads a timestamp, the upper half first.
func (r *Reader) time(b []byte) uint64 {
	return uint64(r.order.Uint32(b))<<32 | uint64(r.order.Uint32(b[4:]))
}

// source returns the interface a block names.
func (r *Reader) source(id uint32) (*SourceInterface, error) {
	if uint64(id) >= uint64(len(r.ifs)) {
		return nil, r.errorf("a block for interface %d; %d have been described", id, len(r.ifs))
	}
	return &r.ifs[id], nil
}

// timed reads what the enhanced and the obsolete packet block share, from the
// timestamp on, and returns the options.
func (r *Reader) timed(p *Packet, id uint32, b []byte) ([]byte, error) {
	from, err := r.source(id)
	if err != nil {
		return nil, err
	}
	time := from.clock.nanoseconds(r.time(b))
	captured, length := r.order.Uint32(b[8:]), r.order.Uint32(b[12:])
	b = b[16:]
	if uint64(captured) > uint64(len(b)) {
		return nil, r.errorf("a packet of %d bytes in a block with room for %d", captured, len(b))
	}
	data := b[:captured:captured]
	*p = Packet{Interface: int(id), Time: time, Data: data, Length: wireLength(length, data)}
	return b[min((int(captured)+3)&^3, len(b)):], nil
}

func (r *Reader) enhanced(p *Packet, b []byte) error {
	if len(b) < 20 {
		return r.errorf("a packet block of %d bytes", len(b))
	}
	options, err := r.timed(p, r.order.Uint32(b), b[4:])
	if err != nil {
		return err
	}
	return r.options(options, func(code uint16, v []byte) error {
		if n := optionSize(code); n != 0 && n != len(v) {
			return r.errorf("option %d of a packet has %d bytes, expected %d", code, len(v), n)
		}
		switch code {
		case optComment:
			p.Comment = joinComment(p.Comment, v)
		case epbFlags:
			p.Flags = Flags(r.order.Uint32(v))
		case epbDropCount:
			p.DropCount, p.Has = r.order.Uint64(v), p.Has|HasDropCount
		case epbPacketID:
			p.ID, p.Has = r.order.Uint64(v), p.Has|HasID
		case epbQueue:
			p.Queue, p.Has = r.order.Uint32(v), p.Has|HasQueue
		}
		return nil
	})
}

// optionSize returns the size of a number among the options of a packet.
func optionSize(code uint16) int {
	switch code {
	case epbFlags, epbQueue:
		return 4
	case epbDropCount, epbPacketID:
		return 8
	}
	return 0
}

// simple reads a simple packet block: no time, and the first interface.
func (r *Reader) simple(p *Packet, b []byte) error {
	if len(b) < 4 {
		return r.errorf("a simple packet block of %d bytes", len(b))
	}
	from, err := r.source(0)
	if err != nil {
		return err
	}
	length := r.order.Uint32(b)
	captured := length
	if from.SnapLen != 0 {
		captured = min(captured, from.SnapLen)
	}
	if uint64(captured) > uint64(len(b)-4) {
		return r.errorf("a packet of %d bytes in a block with room for %d", captured, len(b)-4)
	}
	data := b[4 : 4+captured : 4+captured]
	*p = Packet{Data: data, Length: wireLength(length, data)}
	return nil
}

// obsolete reads the packet block that came before the enhanced one. Its drop
// count is 16 bits wide, all ones when unknown.
func (r *Reader) obsolete(p *Packet, b []byte) error {
	if len(b) < 20 {
		return r.errorf("a packet block of %d bytes", len(b))
	}
	options, err := r.timed(p, uint32(r.order.Uint16(b)), b[4:])
	if err != nil {
		return err
	}
	if drops := r.order.Uint16(b[2:]); drops != math.MaxUint16 {
		p.DropCount, p.Has = uint64(drops), HasDropCount
	}
	return r.options(options, func(code uint16, v []byte) error {
		switch {
		case code == optComment:
			p.Comment = joinComment(p.Comment, v)
		case code == epbFlags && len(v) == 4:
			p.Flags = Flags(r.order.Uint32(v))
		}
		return nil
	})
}
