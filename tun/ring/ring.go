// Package ring carries packets between two processes through shared memory: no
// system call for a packet, and one copy on each side.
//
// Words: the memory of a pair has two lanes, one for each direction. A lane has
// slots, which say where packets lie, and data, where they do, in blocks. Packets
// are numbered, modulo 2^24. A process that finds its lane empty goes to sleep, and
// says so in the lane, so that the other side knows to wake it, by means outside of
// this package.
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

	// blockLen is what packets are aligned to, in bytes.
	blockLen = 256
	// numbers is the mask of a packet's number.
	numbers = 1<<24 - 1
	// line is one of the cache: what different processes write lies in different ones.
	line = 64

	consumedAt = 0
	asleepAt   = line
	reportAt   = 2 * line
	slotsAt    = 3 * line
	slotLen    = 16
	dataAt     = 4096 * ((slotsAt + Slots*slotLen + 4095) / 4096)

	// Size is how many bytes of memory the two lanes of a pair take.
	Size = 2*dataAt + ToEngine + ToProgram
)

// ErrCorrupt is returned when the other side has written nonsense.
var ErrCorrupt = errors.New("ring: the other side has written what cannot be")

// slot is one packet. Its fields are in host byte order.
type slot struct {
	// seq is the packet's number and one, once the packet is there.
	seq atomic.Uint32
	// length is in bytes; at is the block where it begins.
	length, at atomic.Uint32
	_          uint32
}

// Report is what a program tells the engine of itself: counters, of which this
// package knows no more. The engine believes them as far as it believes the program.
type Report [line / 8]atomic.Uint64

// lane is one direction.
type lane struct {
	// consumed has the number of the next packet to take in the high half, and the
	// block behind the last one taken in the low half.
	consumed *atomic.Uint64
	// asleep is 1 while the consumer waits to be woken.
	asleep *atomic.Uint32
	slots  *[Slots]slot
	data   []byte
	blocks uint32 // of data, at most 1<<16
}

// newLane makes a lane of memory that is aligned to a page.
func newLane(mem []byte) lane {
	return lane{
		consumed: (*atomic.Uint64)(unsafe.Pointer(&mem[consumedAt])),
		asleep:   (*atomic.Uint32)(unsafe.Pointer(&mem[asleepAt])),
		slots:    (*[Slots]slot)(unsafe.Pointer(&mem[slotsAt])),
		data:     mem[dataAt:],
		blocks:   uint32(len(mem)-dataAt) / blockLen,
	}
}

// blocksOf is how many blocks n bytes take.
func blocksOf(n uint32) uint32 { return (n + blockLen - 1) / blockLen }

func pack(number, block uint32) uint64 { return uint64(number)<<32 | uint64(block) }

func unpack(v uint64) (number, block uint32) { return uint32(v>>32) & numbers, uint32(v) }

// reservation is the state of a producer, in one word so that it changes at once:
// the number of the next packet, the block where it may begin, and the number of
// the packet that began at block 0 because the lane was empty.
type reservation uint64

func reserved(number, head, restart uint32) reservation {
	return reservation(number&numbers)<<40 | reservation(restart&numbers)<<16 | reservation(head)
}

func (r reservation) fields() (number, head, restart uint32) {
	return uint32(r >> 40), uint32(r & 0xffff), uint32(r>>16) & numbers
}

// Producer is the sending end of a lane. Any number of goroutines may use it at
// once, without waiting for each other.
type Producer struct {
	lane
	state atomic.Uint64 // a reservation
}

// Slot is room for one packet.
type Slot struct {
	// Bytes is where the packet goes.
	Bytes []byte

	number, block uint32
}

// Reserve makes room for a packet of n bytes. It reports false when the lane is
// full, or n is more than MaxPacket.
func (p *Producer) Reserve(n int) (Slot, bool) {
	if n <= 0 || n > MaxPacket {
		return Slot{}, false
	}
	for {
		// What was consumed goes first: it is never ahead of what is reserved then.
		taken, tail := unpack(p.consumed.Load())
		was := p.state.Load()
		number, _, _ := reservation(was).fields()
		at, next, ok := p.place(reservation(was), taken, tail, blocksOf(uint32(n)))
		if !ok {
			return Slot{}, false
		}
		if p.state.CompareAndSwap(was, uint64(next)) {
			from := at * blockLen
			return Slot{Bytes: p.data[from : from+uint32(n) : from+uint32(n)], number: number, block: at}, true
		}
	}
}

// place finds blocks for the next packet. What is in use goes from block tail to the
// head, perhaps around the end of the data. The head never catches up with the
// tail, or a full lane would look like an empty one.
func (p *Producer) place(r reservation, taken, tail, blocks uint32) (at uint32, next reservation, ok bool) {
	number, head, restart := r.fields()
	switch used := (number - taken) & numbers; {
	case used >= Slots:
		return 0, 0, false
	case used == 0:
		// Empty: the first blocks are those most likely to be in the cache.
		return 0, reserved(number+1, blocks, number), true
	case taken == restart:
		tail = 0 // nothing has been taken since
	default:
		restart = taken - 1 // long past
	}
	limit := p.blocks
	switch {
	case tail > p.blocks:
		return 0, 0, false // nonsense
	case head < tail:
		limit = tail
	case head+blocks >= p.blocks:
		head, limit = 0, tail
	}
	if head+blocks >= limit {
		return 0, 0, false
	}
	return head, reserved(number+1, head+blocks, restart), true
}

// Commit hands the packet over. It reports whether the consumer sleeps and is to
// be woken.
func (p *Producer) Commit(s Slot) (wake bool) {
	to := &p.slots[s.number%Slots]
	to.length.Store(uint32(len(s.Bytes)))
	to.at.Store(s.block)
	to.seq.Swap((s.number + 1) & numbers) // not Store: see Sleep
	return p.asleep.Load() != 0 && p.asleep.Swap(0) != 0
}

// Consumer is the receiving end of a lane. It belongs to one goroutine.
type Consumer struct {
	lane
	number uint32 // of the next packet
	block  uint32 // behind the last one
}

// ready reports whether the next packet is there.
func (c *Consumer) ready() bool {
	return c.slots[c.number%Slots].seq.Load() == (c.number+1)&numbers
}

// Next returns the next packet, of 1 to MaxPacket bytes. ok is false when there
// is none. The packet is borrowed until Release, and may change while the other
// side is up to no good.
func (c *Consumer) Next() (packet []byte, ok bool, err error) {
	if !c.ready() {
		return nil, false, nil
	}
	s := &c.slots[c.number%Slots]
	n, at := s.length.Load(), s.at.Load()
	if n == 0 || n > MaxPacket || at >= c.blocks || at+blocksOf(n) > c.blocks {
		return nil, false, ErrCorrupt
	}
	c.number = (c.number + 1) & numbers
	c.block = at + blocksOf(n)
	from := at * blockLen
	return c.data[from : from+n : from+n], true, nil
}

// Release gives all packets back that Next has returned.
func (c *Consumer) Release() { c.consumed.Store(pack(c.number, c.block)) }

// Sleep announces that the consumer will wait until it is woken. It reports false
// when there is a packet already, and then nothing is announced.
//
// A wake-up is lost unless each side's write comes before its read of what the other
// side writes. Store promises that, but under the race detector it does not keep
// the promise for mapped memory (the C library of the detector makes it a plain
// store); Swap does, and costs the same.
func (c *Consumer) Sleep() bool {
	c.asleep.Swap(1)
	if c.ready() {
		c.asleep.Store(0)
		return false
	}
	return true
}

// Awake takes the announcement back, for a consumer that was woken otherwise.
func (c *Consumer) Awake() { c.asleep.Store(0) }
