package tun

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Headroom is the number of writable bytes before every packet of a
// ReadBatch: room for the prefix of any framing.
const Headroom = 22

const (
	// maxRead packets, or as many super-packets as the slab holds, are read at
	// once.
	maxRead = 64
	slabLen = 8*(maxPacket+1) + 64*1024
	// grownSize bytes fill memory that is worth giving back.
	grownSize = 64 * 1024
)

// LoadRoom is how many bytes Load has room for, virtio headers included.
const LoadRoom = slabLen - maxRead*Headroom - maxHdr - maxPacket

// Packet is one packet of a ReadBatch.
type Packet struct {
	Header
	off, len uint32
	// tail is what follows the first headersLen bytes while that still lies in a
	// ring; its place in the slab is free.
	tail *byte
}

// inRing returns the tail, nil when all of the packet is in the slab.
func (p *Packet) inRing() []byte {
	if p.tail == nil {
		return nil
	}
	return unsafe.Slice(p.tail, p.len-headersLen)
}

// ReadBatch holds what one TryRead drained from a queue. It belongs to one
// goroutine.
type ReadBatch struct {
	slab    []byte // mapped, not Go heap
	packets [maxRead]Packet
	n       int
	grown   bool     // more than grownSize bytes were read since the last Shrink
	lender  *ringEnd // the packets' tails are borrowed from it; or nil
}

// NewReadBatch maps the buffer; Free unmaps it.
func NewReadBatch() (*ReadBatch, error) {
	slab, err := unix.Mmap(-1, 0, slabLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("tun: map read buffer: %w", err)
	}
	return &ReadBatch{slab: slab}, nil
}

// Free unmaps the buffer. The batch and every slice of it are dead then.
func (b *ReadBatch) Free() error {
	if b.slab == nil {
		return nil
	}
	err := unix.Munmap(b.slab)
	b.slab = nil
	return err
}

// Grown reports whether the buffer holds memory that Shrink would give back.
func (b *ReadBatch) Grown() bool { return b.grown }

// Shrink empties the batch and gives the memory of the buffer back to the system.
// The next call takes it anew as it needs it.
func (b *ReadBatch) Shrink() {
	b.Clear()
	b.grown = false
	_ = unix.Madvise(b.slab, unix.MADV_DONTNEED) // it cannot fail on a mapping of our own
}

// Packets returns what the last TryRead brought, borrowed until the next.
func (b *ReadBatch) Packets() []Packet { return b.packets[:b.n] }

// Clear empties the batch and gives back what it has borrowed from a ring. The
// packets' tails are gone then.
func (b *ReadBatch) Clear() {
	b.n = 0
	b.GiveBack()
}

// GiveBack gives back what the batch has borrowed from a ring, and leaves its
// counts as they are. No packet of it may be used any more.
func (b *ReadBatch) GiveBack() {
	if b.lender != nil {
		b.lender.in.Release()
		b.lender = nil
	}
}

// Bytes returns the packet with room bytes before it, at most Headroom, to
// write a prefix to. The slice is borrowed until the next TryRead.
func (b *ReadBatch) Bytes(p *Packet, room int) []byte {
	whole := b.slab[int(p.off)-room : p.off+p.len : p.off+p.len]
	if p.tail != nil {
		copy(whole[room+headersLen:], p.inRing())
		p.tail = nil
	}
	return whole
}

// Headers returns what Bytes does, but only what comes before the tail holds the
// packet: all of its headers, up to the transport protocol's, and the tail
// follows. The tail may be empty, and may change while it is read: another
// process can write to it.
func (b *ReadBatch) Headers(p *Packet, room int) (whole, tail []byte) {
	return b.slab[int(p.off)-room : p.off+p.len : p.off+p.len], p.inRing()
}

// Full reports whether the last TryRead may have left packets in the queue.
func (b *ReadBatch) Full() bool { return b.n == maxRead || !b.fits(b.Size()) }

// Flooded reports whether the batch was filled by small packets: the sender is
// faster than we are and does not use super-packets.
func (b *ReadBatch) Flooded() bool { return b.n == maxRead }

// fits reports whether one more packet of any size fits behind at.
func (b *ReadBatch) fits(at int) bool { return len(b.slab)-at >= maxHdr+maxPacket }

// Size returns the bytes of all packets, headroom included.
func (b *ReadBatch) Size() int {
	if b.n == 0 {
		return 0
	}
	p := &b.packets[b.n-1]
	return int(p.off + p.len)
}

// Load puts packets into the batch as a TryRead would, each with its virtio
// header in front; for packets that were kept apart for a while, and for tests. The
// caller sees to it that there is room: maxRead packets and [LoadRoom] bytes.
func (b *ReadBatch) Load(raw ...[]byte) {
	b.Clear()
	at := 0
	for _, r := range raw {
		copy(b.slab[at+Headroom-vnetHdrLen:], r)
		at = b.take(at+Headroom-vnetHdrLen, len(r), vnetHdrLen)
	}
}

// take enters the packet that was read into the slab at start, n bytes with
// hdr bytes of headers before it, and returns where the next one's headroom
// begins: right behind, so that prefix and packet of a train lie in memory as
// one run.
func (b *ReadBatch) take(start, n, hdr int) int {
	p := &b.packets[b.n]
	p.vnet.decode(b.slab[start:])
	if link := hdr - vnetHdrLen; link > 0 && p.vnet.flags&needsCsum != 0 {
		p.vnet.csumStart -= uint16(link)
	}
	p.off, p.len, p.tail = uint32(start+hdr), uint32(n-hdr), nil
	b.n++
	if start+n > grownSize {
		b.grown = true
	}
	return start + n
}
