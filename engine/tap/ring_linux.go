package tap

import (
	"fmt"
	"math"
	"math/bits"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// slot is a record in a ring, followed by its data, padded to slotAlign.
type slot struct {
	size   uint32 // of slot and data, padded; 0: the rest of the ring is unused
	stored uint32 // bytes of data
	hdr    Header
}

const (
	slotAlign = 8
	slotLen   = (int(unsafe.Sizeof(slot{})) + slotAlign - 1) &^ (slotAlign - 1)
	minRing   = 1 << 16
)

// Ring is a ring of records with one writer and one reader.
type Ring struct {
	buf    []byte // mapped, not Go heap; a power of two long
	worker uint8
	points Points
	snap   int
	// whole and split say which readers there are.
	whole, split bool

	// head and tail count bytes ever written and read; only their difference
	// and their low bits matter. next is the writer's uncommitted head.
	next uint64
	// kept says that a record put since the last Commit is wanted; found is
	// where the last one was that had to be amended.
	kept  bool
	found uint64
	// horizon is the moment, ns since 1970, up to which the ring is complete.
	horizon atomic.Int64
	head    atomic.Uint64
	_       [64]byte // the reader's line
	tail    atomic.Uint64
	_       [64]byte
	lost    [numReaders][NumPoints]counter
}

// Who misses a lost packet: every reader, or one kind of them.
const (
	readersAll = iota
	readersSplit
	readersWhole
	numReaders
)

// readers tells who is shown a record with these flags at p.
func readers(f Flags, p Point) int {
	switch {
	case f&Whole != 0:
		return readersWhole
	case f&Segment != 0 && innerPoints.Has(p):
		return readersSplit
	}
	return readersAll
}

// Whole reports whether a reader wants super-packets in one piece.
func (r *Ring) Whole() bool { return r.whole }

func newRing(worker uint8, points Points, snap, size int) (*Ring, error) {
	size = 1 << bits.Len(uint(max(size, minRing)-1))
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("tap: map a ring of %d bytes: %w", size, err)
	}
	r := &Ring{buf: buf, worker: worker, points: points, snap: snap, split: true}
	r.SetHorizon(math.MaxInt64)
	return r, nil
}

// SetHorizon says up to which moment, in ns since 1970, the ring holds
// everything there is. A writer that learns of packets late moves it along, so
// that a reader of several rings does not get ahead of it; for all others it
// stays at the end of time.
func (r *Ring) SetHorizon(ns int64) { r.horizon.Store(ns) }

// Horizon returns what SetHorizon said last.
func (r *Ring) Horizon() int64 { return r.horizon.Load() }

func (r *Ring) free() {
	if r.buf != nil {
		_ = unix.Munmap(r.buf)
		r.buf = nil
	}
}

func (r *Ring) slot(at uint64) *slot {
	return (*slot)(unsafe.Pointer(&r.buf[at&uint64(len(r.buf)-1)]))
}

// canFail are the points a packet may turn out not to have reached.
const canFail = Points(1<<WireOut | 1<<TunOut)

// Put adds a record of the packet head + tail, visible after Commit. Points
// nobody wants are taken out of h.Points; with none left, the record stays
// only if Fail makes it one of Drop.
func (r *Ring) Put(h *Header, head, tail []byte) {
	data := r.reserve(h, len(head)+len(tail))
	copy(data[copy(data, head):], tail)
}

// PutPieces is Put for a packet in any number of pieces.
func (r *Ring) PutPieces(h *Header, length int, pieces []unix.Iovec) {
	data := r.reserve(h, length)
	for i := 0; i < len(pieces) && len(data) > 0; i++ {
		data = data[copy(data, unsafe.Slice(pieces[i].Base, pieces[i].Len)):]
	}
}

// PutCut is Put for a packet of length bytes of which only the first are at
// hand, at least as many as the snap length.
func (r *Ring) PutCut(h *Header, length int, data []byte) {
	room := r.reserve(h, length)
	clear(room[copy(room, data):])
}

// Miss says that n packets passed the points without a record.
func (r *Ring) Miss(points Points, n uint64) { r.lose(0, points&r.points, n) }

// reserve makes a record and returns the place for the head of its packet,
// which is empty when it is not wanted or does not fit.
func (r *Ring) reserve(h *Header, length int) []byte {
	want := h.Points & r.points
	if h.Flags&Segment != 0 && !r.split {
		want &^= innerPoints
	}
	if want == 0 && (h.Points&canFail == 0 || !r.points.Has(Drop)) {
		return nil
	}
	stored := min(length, r.snap)
	size := uint64(slotLen + (stored+slotAlign-1)&^(slotAlign-1))
	mask := uint64(len(r.buf) - 1)
	// A record does not wrap: what is left at the end is skipped.
	skip := uint64(0)
	if end := uint64(len(r.buf)) - r.next&mask; end < size {
		skip = end
	}
	if r.next+skip+size-r.tail.Load() > uint64(len(r.buf)) {
		r.lose(h.Flags, want, uint64(max(h.Segments, 1)))
		return nil
	}
	if skip >= uint64(slotLen) {
		r.slot(r.next).size = 0
	}
	r.next += skip
	s := r.slot(r.next)
	s.size, s.stored, s.hdr = uint32(size), uint32(stored), *h
	s.hdr.Points, s.hdr.Worker, s.hdr.Length = want, r.worker, uint32(length)
	data := r.buf[r.next&mask+uint64(slotLen):][:stored]
	r.next += size
	r.kept = r.kept || want != 0
	return data
}

// lose adds n to the loss counters of the points.
func (r *Ring) lose(f Flags, points Points, n uint64) {
	for p := range NumPoints {
		if points.Has(p) {
			r.lost[readers(f, p)][p].Add(n)
		}
	}
}

// Fail amends the uncommitted record with the given ID, which has these flags
// and stands for n packets: they did not reach point p but were dropped for
// reason. When the record was lost, the loss counters are amended instead.
func (r *Ring) Fail(id uint64, f Flags, p Point, reason uint8, n uint64) {
	if !r.points.Has(p) && !r.points.Has(Drop) {
		return
	}
	if s := r.find(id); s != nil {
		s.hdr.Points = s.hdr.Points&^Of(p) | Of(Drop)&r.points
		s.hdr.Reason = reason
		r.kept = r.kept || s.hdr.Points != 0
		return
	}
	if r.points.Has(p) && (r.split || readers(f, p) != readersSplit) {
		r.lost[readers(f, p)][p].Add(-n)
	}
	if r.points.Has(Drop) {
		r.lost[readersAll][Drop].Add(n)
	}
}

// Join amends the uncommitted record with the given ID: it became a segment of
// the super-packet of.
func (r *Ring) Join(id, of uint64) {
	if s := r.find(id); s != nil {
		s.hdr.Of = of
	}
}

// find returns the uncommitted record with an ID, nil when it was lost.
func (r *Ring) find(id uint64) *slot {
	// What is amended comes in the order of the records, so the next is near.
	from := max(r.found, r.head.Load())
	if s := r.findBetween(from, r.next, id); s != nil {
		return s
	}
	return r.findBetween(r.head.Load(), from, id)
}

func (r *Ring) findBetween(from, to, id uint64) *slot {
	for from < to {
		var s *slot
		s, from = r.at(from)
		if s.hdr.ID == id {
			r.found = from
			return s
		}
		from += uint64(s.size)
	}
	return nil
}

// at returns the record at pos and its position, which is further on when pos
// is the unused end of the ring.
func (r *Ring) at(pos uint64) (*slot, uint64) {
	size := uint64(len(r.buf))
	end := size - pos&(size-1)
	if end < uint64(slotLen) || r.slot(pos).size == 0 {
		pos += end
	}
	return r.slot(pos), pos
}

// Commit makes everything put so far visible to the reader.
func (r *Ring) Commit() {
	switch head := r.head.Load(); {
	case r.next == head:
	case r.kept:
		r.head.Store(r.next)
	default:
		r.next = head // nothing in it came to be wanted
	}
	r.kept, r.found = false, 0
}

// Record is one record as the reader sees it.
type Record struct {
	Header
	// Data is the stored head of the packet, borrowed until Release.
	Data []byte
}

// Next fills rec with the oldest unread record and reports whether there was one.
// Release frees its space. A record may have no points left; it is then of no
// interest.
func (r *Ring) Next(rec *Record) bool {
	pos, head := r.tail.Load(), r.head.Load()
	if pos == head {
		return false
	}
	s, pos := r.at(pos)
	rec.Header = s.hdr
	rec.Data = r.buf[pos&uint64(len(r.buf)-1)+uint64(slotLen):][:s.stored:s.stored]
	return true
}

// Release frees the space of the record that Next returned last.
func (r *Ring) Release() {
	pos := r.tail.Load()
	if pos == r.head.Load() {
		return
	}
	s, pos := r.at(pos)
	r.tail.Store(pos + uint64(s.size))
}

// Lost returns how many packets at p did not fit this ring so far, for readers
// who want super-packets whole or for the others.
func (r *Ring) Lost(p Point, whole bool) uint64 {
	own := readersSplit
	if whole {
		own = readersWhole
	}
	return r.lost[readersAll][p].Load() + r.lost[own][p].Load()
}
