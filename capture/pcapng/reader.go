package pcapng

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

const (
	// maxBlock is the largest block, or packet, that is read rather than
	// refused. It bounds the memory a file can make a Reader use.
	maxBlock = 1 << 20
	// maxInterfaces bounds the interfaces of a section for the same reason.
	maxInterfaces = 4096
	// maxText is how much is kept of each text about an interface, in bytes.
	maxText = 1024
)

// FormatError says that a file is not what its format allows.
type FormatError struct {
	// Offset is where, in bytes from the start of the file.
	Offset int64
	Msg    string
	// Err is io.ErrUnexpectedEOF when the file ends in the middle of something.
	Err error
}

func (e *FormatError) Error() string { return fmt.Sprintf("pcapng: byte %d: %s", e.Offset, e.Msg) }

// Unwrap returns e.Err.
func (e *FormatError) Unwrap() error { return e.Err }

// SourceInterface is an interface of a file being read.
type SourceInterface struct {
	Interface
	// Link is the link type of its packets.
	Link uint16
	// SnapLen is in bytes; 0 means no limit.
	SnapLen uint32
	// Statistics are the last counters read for it, nil when there were none.
	// Those that were not told are 0.
	Statistics *Statistics

	clock clock
}

// Reader reads the packets of a capture file. It uses a bounded amount of
// memory whatever it reads, and is not safe for concurrent use.
type Reader struct {
	in     *bufio.Reader
	offset int64 // of the next byte of in
	start  int64 // of the block or record being read
	order  binary.ByteOrder
	header Header
	ifs    []SourceInterface
	buf    []byte
	next   func(*Packet) error
}

// NewReader finds out the format of a file and reads its header.
func NewReader(r io.Reader) (*Reader, error) {
	n := &Reader{in: bufio.NewReaderSize(r, bufferSize)}
	magic, err := n.in.Peek(4)
	if err != nil {
		if errors.Is(err, io.EOF) {
			return nil, &FormatError{Msg: "not a capture file: shorter than a magic number", Err: io.ErrUnexpectedEOF}
		}
		return nil, err
	}
	switch {
	case le.Uint32(magic) == blockSection:
		n.next = n.nextBlock
		return n, n.section()
	case isClassic(le, magic):
		n.order = binary.LittleEndian
	case isClassic(binary.BigEndian, magic):
		n.order = binary.BigEndian
	default:
		return nil, &FormatError{Msg: fmt.Sprintf("not a capture file: it starts with % x, pcapng with 0a 0d 0d 0a, pcap with d4 c3 b2 a1", magic)}
	}
	n.next = n.nextRecord
	return n, n.classicHeader()
}

func isClassic(order binary.ByteOrder, magic []byte) bool {
	m := order.Uint32(magic)
	return m == magicMicros || m == magicNanos
}

// Header returns what the current section says about itself. Its Interfaces
// are those of Interfaces.
func (r *Reader) Header() Header { return r.header }

// Interfaces returns the interfaces of the current section described so far.
// The slice is valid until the next call of Next.
func (r *Reader) Interfaces() []SourceInterface { return r.ifs }

// Next reads the next packet into p. It returns io.EOF at the end of the file,
// and a *FormatError where the file is broken; what came before is good even
// then. p.Data is valid until the next call. p.Interface is an index into
// Interfaces, of the section the packet is in.
func (r *Reader) Next(p *Packet) error { return r.next(p) }

func (r *Reader) errorf(format string, args ...any) error {
	return &FormatError{Offset: r.start, Msg: fmt.Sprintf(format, args...)}
}

// take reads the next n bytes, n up to maxBlock, into r.buf.
func (r *Reader) take(n int, what string) ([]byte, error) {
	if cap(r.buf) < n {
		r.buf = make([]byte, max(n, 2048, min(2*cap(r.buf), maxBlock)))
	}
	b := r.buf[:n]
	got, err := io.ReadFull(r.in, b)
	r.offset += int64(got)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		err = r.truncated(what)
	}
	return b, err
}

func (r *Reader) truncated(what string) error {
	return &FormatError{Offset: r.offset, Msg: "the file ends in the middle of " + what, Err: io.ErrUnexpectedEOF}
}

// atEnd reports whether the file ends here.
func (r *Reader) atEnd() (bool, error) {
	_, err := r.in.Peek(1)
	if err == io.EOF {
		return true, nil
	}
	return false, err
}

// classicHeader reads the rest of a classic file's header.
func (r *Reader) classicHeader() error {
	b, err := r.take(24, "the file header")
	if err != nil {
		return err
	}
	if v := r.order.Uint16(b[4:]); v != 2 {
		return r.errorf("pcap version %d, expected 2", v)
	}
	one := SourceInterface{Link: uint16(r.order.Uint32(b[20:])), SnapLen: r.order.Uint32(b[16:])}
	switch one.Link {
	case 12, 14: // DLT_RAW as some systems number it
		one.Link = LinkRaw
	}
	one.clock = clock{decimals: 6}
	if r.order.Uint32(b) == magicNanos {
		one.clock.decimals = 9
	}
	r.ifs = []SourceInterface{one}
	r.header = Header{Link: one.Link, SnapLen: one.SnapLen}
	return nil
}

// nextRecord reads a packet of a classic file.
func (r *Reader) nextRecord(p *Packet) error {
	r.start = r.offset
	if end, err := r.atEnd(); err != nil || end {
		return orEOF(err)
	}
	b, err := r.take(16, "a packet header")
	if err != nil {
		return err
	}
	sec, frac := r.order.Uint32(b), r.order.Uint32(b[4:])
	captured, length := r.order.Uint32(b[8:]), r.order.Uint32(b[12:])
	if captured > maxBlock {
		return r.errorf("a packet of %d bytes, more than %d", captured, maxBlock)
	}
	data, err := r.take(int(captured), "a packet")
	if err != nil {
		return err
	}
	unit := int64(1)
	if r.ifs[0].clock.decimals == 6 {
		unit = 1000
	}
	*p = Packet{Time: int64(sec)*1e9 + int64(frac)*unit, Data: data, Length: wireLength(length, data)}
	return nil
}

func orEOF(err error) error {
	if err == nil {
		return io.EOF
	}
	return err
}

// wireLength is the length a file claims for a packet, but at least what there
// is of it.
func wireLength(claimed uint32, data []byte) int {
	return max(int(min(claimed, math.MaxInt32)), len(data))
}
