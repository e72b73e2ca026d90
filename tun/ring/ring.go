// Package ring carries packets between two processes through shared memory: no
// system call for a packet, and one copy on each side.
//
// Words: the memory of a pair has two lanes, one for each direction. A lane has
// slots, which say where packets lie, and data, where they do. A position counts
// bytes of data ever used; its place in the data is the position modulo its
// size. A process that finds its lane empty goes to sleep, and says so in the
// lane, so that the other side knows to wake it, by means outside of this package.
//
// Neither side trusts the other: what the other side writes is read once, checked
// against the bounds of the lane, and used from a private copy. Whatever it
// writes, it can only spoil packets of its own. The packets themselves may change
// while they are read.
package ring

import (
	"errors"
	"sync/atomic"
	"unsafe"
)

const (
	// Slots is how many packets a lane holds at most, a power of two.
	Slots = 1024
	// ToEngine and ToProgram are how many bytes of packets the lanes hold, powers of
	// two. A program waits for room. The engine waits for nobody and drops what does
	// not fit, so there must be room for what a few connections of a program send
	// while it does not get its turn.
	ToEngine  = 2 << 20
	ToProgram = 16 << 20
	// MaxPacket is the longest packet, in bytes, with what stands before it.
	MaxPacket = 65535 + 64

	// align is what packets are aligned to: a line of the cache.
	align = 64

	consumedAt = 0
	asleepAt   = align
	slotsAt    = 2 * align
	slotLen    = 16
	dataAt     = 4096 * ((slotsAt + Slots*slotLen + 4095) / 4096)

	// Size is how many bytes of memory the two lanes of a pair take.
	Size = 2*dataAt + ToEngine + ToProgram
)

// ErrCorrupt is returned when the other side has written nonsense.
var ErrCorrupt = errors.New("ring: the other side has written what cannot be")

// slot is one packet. Its fields are in host byte order.
type slot struct {
	// seq is the packet's number, from 1, once the packet is there.
	seq atomic.Uint32
	// length is in bytes; end is the position behind the packet, a multiple of align.
	length, end atomic.Uint32
	_           uint32
}

// lane is one direction.
type lane struct {
	// consumed has the number of packets taken in the high half, and the position
	// behind the last of them in the low half.
	consumed *atomic.Uint64
	// asleep is 1 while the consumer waits to be woken.
	asleep *atomic.Uint32
	slots  *[Slots]slot
	data   []byte
	size   uint32 // of data
}

// newLane makes a lane of memory that is aligned to a page.
func newLane(mem []byte) lane {
	return lane{
		consumed: (*atomic.Uint64)(unsafe.Pointer(&mem[consumedAt])),
		asleep:   (*atomic.Uint32)(unsafe.Pointer(&mem[asleepAt])),
		slots:    (*[Slots]slot)(unsafe.Pointer(&mem[slotsAt])),
		data:     mem[dataAt:],
		size:     uint32(len(mem) - dataAt),
	}
}

func padded(n uint32) uint32 { return (n + align - 1) &^ (align - 1) }

func pack(count, position uint32) uint64 { return uint64(count)<<32 | uint64(position) }

func unpack(v uint64) (count, position uint32) { return uint32(v >> 32), uint32(v) }

// Producer is the sending end of a lane. Any number of goroutines may use it at
// once, without waiting for each other.
type Producer struct {
	lane
	// reserved is as consumed, of what was reserved.
	reserved atomic.Uint64
}

// Slot is room for one packet.
type Slot struct {
	// Bytes is where the packet goes.
	Bytes []byte

	count, end uint32
}

// Reserve makes room for a packet of n bytes. It reports false when the lane is
// full, or n is more than MaxPacket.
func (p *Producer) Reserve(n int) (Slot, bool) {
	if n <= 0 || n > MaxPacket {
		return Slot{}, false
	}
	for {
		// Consumed goes first: what is reserved is never behind it then.
		taken, free := unpack(p.consumed.Load())
		was := p.reserved.Load()
		count, position := unpack(was)
		if count-taken >= Slots {
			return Slot{}, false
		}
		start := position
		at := start & (p.size - 1)
		if at+uint32(n) > p.size {
			start, at = start+p.size-at, 0 // packets lie in one piece
		}
		end := start + padded(uint32(n))
		if end-free > p.size {
			return Slot{}, false
		}
		if p.reserved.CompareAndSwap(was, pack(count+1, end)) {
			return Slot{Bytes: p.data[at : at+uint32(n) : at+uint32(n)], count: count, end: end}, true
		}
	}
}

// Commit hands the packet over. It reports whether the consumer sleeps and is to
// be woken.
func (p *Producer) Commit(s Slot) (wake bool) {
	to := &p.slots[s.count%Slots]
	to.length.Store(uint32(len(s.Bytes)))
	to.end.Store(s.end)
	to.seq.Store(s.count + 1)
	return p.asleep.Load() != 0 && p.asleep.Swap(0) != 0
}

// Consumer is the receiving end of a lane. It belongs to one goroutine.
type Consumer struct {
	lane
	count, position uint32
}

// Next returns the next packet, of 1 to MaxPacket bytes. ok is false when there
// is none. The packet is borrowed until Release, and may change while the other
// side is up to no good.
func (c *Consumer) Next() (packet []byte, ok bool, err error) {
	s := &c.slots[c.count%Slots]
	if s.seq.Load() != c.count+1 {
		return nil, false, nil
	}
	n, end := s.length.Load(), s.end.Load()
	if n == 0 || n > MaxPacket {
		return nil, false, ErrCorrupt
	}
	at := (end - padded(n)) & (c.size - 1)
	if at+n > c.size {
		return nil, false, ErrCorrupt
	}
	c.count++
	c.position = end
	return c.data[at : at+n : at+n], true, nil
}

// Release gives all packets back that Next has returned.
func (c *Consumer) Release() { c.consumed.Store(pack(c.count, c.position)) }

// Sleep announces that the consumer will wait until it is woken. It reports false
// when there is a packet already, and then nothing is announced.
func (c *Consumer) Sleep() bool {
	c.asleep.Store(1)
	if c.slots[c.count%Slots].seq.Load() == c.count+1 {
		c.asleep.Store(0)
		return false
	}
	return true
}

// Awake takes the announcement back, for a consumer that was woken otherwise.
func (c *Consumer) Awake() { c.asleep.Store(0) }
