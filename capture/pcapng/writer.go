package pcapng

import (
	"errors"
	"fmt"
	"io"
	"math"
)

// bufferSize is how much a writer collects before it writes, in bytes.
const bufferSize = 64 << 10

// sink collects what is appended and writes it out in large pieces. After a
// failed write it stays failed.
type sink struct {
	w    io.Writer
	buf  []byte
	size int64
	err  error
}

func newSink(w io.Writer) sink { return sink{w: w, buf: make([]byte, 0, bufferSize+8<<10)} }

// took accounts for what was appended to s.buf after n bytes and writes when
// enough has come together.
func (s *sink) took(b []byte, n int) error {
	s.buf = b
	s.size += int64(len(b) - n)
	if len(b) >= bufferSize {
		return s.Flush()
	}
	return nil
}

// Flush writes out what has been collected.
func (s *sink) Flush() error {
	if s.err != nil || len(s.buf) == 0 {
		return s.err
	}
	n, err := s.w.Write(s.buf)
	if err == nil && n < len(s.buf) {
		err = io.ErrShortWrite
	}
	s.err = err
	s.buf = s.buf[:0]
	return err
}

// Size returns the size of the file in bytes, with what Flush has yet to write.
func (s *sink) Size() int64 { return s.size }

// Writer writes a pcapng file of one section. It is not safe for concurrent use.
// It allocates when made and for packets longer than any before, no more.
type Writer struct {
	sink
	snapLen    int
	interfaces int
}

// NewWriter starts a file with the blocks of h. Nothing reaches w before Flush,
// or before some 64 KiB have come together. The caller closes w, after Flush.
func NewWriter(w io.Writer, h *Header) (*Writer, error) {
	switch {
	case len(h.Interfaces) == 0:
		return nil, errors.New("pcapng: a file needs at least one interface")
	case h.SnapLen > MaxSnapLen:
		return nil, fmt.Errorf("pcapng: snap length %d, the most is %d", h.SnapLen, MaxSnapLen)
	case h.Link == LinkRaw && len(h.Interfaces) > 1:
		return nil, errors.New("pcapng: tcpdump reads link type 101 with one interface only; use 228 for IPv4")
	}
	n := &Writer{sink: newSink(w), snapLen: int(h.snapLen()), interfaces: len(h.Interfaces)}
	return n, n.took(AppendHeader(n.buf, h), 0)
}

// WritePacket adds a packet, cut to the snap length. It keeps nothing of p.
func (w *Writer) WritePacket(p *Packet) error {
	if w.err != nil {
		return w.err
	}
	if err := w.check(p.Interface); err != nil {
		return err
	}
	q := *p
	q.Length = p.length()
	q.Data = p.Data[:min(len(p.Data), w.snapLen)]
	return w.took(AppendPacket(w.buf, &q), len(w.buf))
}

// WriteStatistics adds the counters of an interface, usually at the end.
func (w *Writer) WriteStatistics(s *Statistics) error {
	if w.err != nil {
		return w.err
	}
	if err := w.check(s.Interface); err != nil {
		return err
	}
	return w.took(AppendStatistics(w.buf, s), len(w.buf))
}

// WriteNames adds names for addresses. Tools use them from here on.
func (w *Writer) WriteNames(names []Name) error {
	if w.err != nil {
		return w.err
	}
	return w.took(AppendNames(w.buf, names), len(w.buf))
}

func (w *Writer) check(i int) error {
	if i < 0 || i >= w.interfaces {
		return fmt.Errorf("pcapng: interface %d, the file has %d", i, w.interfaces)
	}
	return nil
}

// PcapWriter writes a classic pcap file, little endian. It is not safe for
// concurrent use, and allocates as Writer does.
type PcapWriter struct {
	sink
	snapLen int
	unit    int64 // nanoseconds
}

// Magic numbers of the classic format, by the unit of its timestamps.
const (
	magicMicros = 0xa1b2c3d4
	magicNanos  = 0xa1b23c4d
)

// NewPcapWriter starts a file. nanos chooses timestamps in nanoseconds, which
// tools older than 2013 do not read, instead of microseconds. snapLen 0 means
// MaxSnapLen. The rest is as with NewWriter.
func NewPcapWriter(w io.Writer, link uint16, snapLen uint32, nanos bool) (*PcapWriter, error) {
	if snapLen > MaxSnapLen {
		return nil, fmt.Errorf("pcapng: snap length %d, the most is %d", snapLen, MaxSnapLen)
	}
	if snapLen == 0 {
		snapLen = MaxSnapLen
	}
	n := &PcapWriter{sink: newSink(w), snapLen: int(snapLen), unit: 1000}
	magic := uint32(magicMicros)
	if nanos {
		magic, n.unit = magicNanos, 1
	}
	b := le.AppendUint32(n.buf, magic)
	b = le.AppendUint16(b, 2) // version 2.4
	b = le.AppendUint16(b, 4)
	b = le.AppendUint64(b, 0) // time zone and accuracy, always 0
	b = le.AppendUint32(b, snapLen)
	b = le.AppendUint32(b, uint32(link))
	return n, n.took(b, 0)
}

// WritePacket adds the time and the data of a packet, cut to the snap length.
// The format has no room for the rest. Times outside 1970 to 2106 are moved to
// the nearer end.
func (w *PcapWriter) WritePacket(p *Packet) error {
	if w.err != nil {
		return w.err
	}
	t := min(max(p.Time, 0), math.MaxUint32*int64(1e9)+999_999_999)
	data := p.Data[:min(len(p.Data), w.snapLen)]
	b := le.AppendUint32(w.buf, uint32(t/1e9))
	b = le.AppendUint32(b, uint32(t%1e9/w.unit))
	b = le.AppendUint32(b, uint32(len(data)))
	b = le.AppendUint32(b, uint32(p.length()))
	return w.took(append(b, data...), len(w.buf))
}
