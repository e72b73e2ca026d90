package accel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// hops is what the programs know of the neighbours that datagrams go to first:
// an address of the underlay for each index that peers name. An index whose
// Ethernet address is not known, and index 0, are left to the kernel, which
// looks for route and neighbour then.
//
// Its memory is shared with the programs; a word of it is written at once, so
// no packet sees half an address. Everything else is guarded by the
// Accelerator's lock.
type hops struct {
	memory []byte
	index  map[netip.Addr]uint32
	free   []uint32
	next   uint32 // the lowest index that was never used
	// doubted says that a route or an interface has changed since the ways
	// were asked for, so that what is known of neighbours may not be for them.
	doubted bool
	added   bool // neighbours that were not looked for yet
}

const hopSize = uint32(unsafe.Sizeof(accelHop{}))

// open maps the programs' array, which has room for entries of size accelHop.
func (h *hops) open(fd int, entries uint32) error {
	page := unix.Getpagesize()
	size := (int(entries*hopSize) + page - 1) / page * page
	memory, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the table of neighbours: %w", err)
	}
	*h = hops{memory: memory[:entries*hopSize], index: map[netip.Addr]uint32{}, next: 1}
	return nil
}

func (h *hops) close() {
	if h.memory != nil {
		_ = unix.Munmap(h.memory[:cap(h.memory)])
	}
	*h = hops{}
}

// of returns the index of a neighbour, 0 when there is no room for more.
func (h *hops) of(addr netip.Addr) uint32 {
	index, ok := h.index[addr]
	switch n := len(h.free); {
	case ok || !addr.IsValid():
		return index
	case n > 0:
		index, h.free = h.free[n-1], h.free[:n-1]
	case h.next < uint32(len(h.memory))/hopSize:
		index = h.next
		h.next++
	default:
		return 0
	}
	h.index[addr], h.added = index, true
	return index
}

// release forgets the neighbours that no entry of the programs names any more.
func (h *hops) release(used map[uint32]bool) {
	for addr, index := range h.index {
		if !used[index] {
			h.word(index).Store(0)
			delete(h.index, addr)
			h.free = append(h.free, index)
		}
	}
}

// learn notes what the kernel says of a neighbour.
func (h *hops) learn(n *netlink.Neigh) {
	addr, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return
	}
	if index, ok := h.index[addr.Unmap()]; ok {
		h.word(index).Store(frameAddress(n))
	}
}

// forget leaves all neighbours to the kernel.
func (h *hops) forget() {
	for _, index := range h.index {
		h.word(index).Store(0)
	}
}

func (h *hops) word(index uint32) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&h.memory[index*hopSize]))
}

// frameAddress returns the word of struct hop: the neighbour's Ethernet address,
// 0 when the kernel would not send a frame there now.
func frameAddress(n *netlink.Neigh) uint64 {
	const usable = netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE | netlink.NUD_PERMANENT
	if n.State&usable == 0 || len(n.HardwareAddr) != 6 || n.HardwareAddr[0]&1 != 0 {
		return 0
	}
	var b [8]byte
	copy(b[:], n.HardwareAddr)
	return binary.NativeEndian.Uint64(b[:])
}

// Doubt leaves the neighbours to the kernel until Refresh: a route, a rule or an
// interface has changed.
func (a *Accelerator) Doubt() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hops.doubted = true
	a.hops.forget()
}

// learnNeighbours asks the kernel for what it knows. What changes later comes by
// watchNeighbours, without which nothing is learnt.
func (a *Accelerator) learnNeighbours() {
	if a.watching == nil || a.hops.doubted {
		return
	}
	a.hops.added = false
	known, err := a.nl.NeighList(a.cfg.Underlay, netlink.FAMILY_V4)
	if err != nil {
		return // the kernel goes on to look for itself
	}
	for i := range known {
		a.hops.learn(&known[i])
	}
}

// watchNeighbours follows the kernel's neighbour table until a.watching is closed, in the
// network namespace of the calling thread.
func (a *Accelerator) watchNeighbours() {
	updates, done := make(chan netlink.NeighUpdate, 64), make(chan struct{})
	if err := netlink.NeighSubscribeWithOptions(updates, done, netlink.NeighSubscribeOptions{ErrorCallback: func(error) {}}); err != nil {
		close(done)
		return // then the kernel looks for each packet
	}
	a.watching = done
	go func() {
		for u := range updates {
			a.neighbour(done, u)
		}
		a.missedNeighbours(done)
	}()
}

// neighbour takes a change of the kernel's table from the subscription that ends
// with done. What an earlier one had still to say is older than what is known.
func (a *Accelerator) neighbour(done chan struct{}, u netlink.NeighUpdate) {
	if u.LinkIndex != a.cfg.Underlay || u.Family != unix.AF_INET {
		return
	}
	if u.Type == unix.RTM_DELNEIGH {
		u.State = netlink.NUD_FAILED
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.watching == done && !a.hops.doubted {
		a.hops.learn(&u.Neigh)
	}
}

// missedNeighbours is called at the end of a subscription: by Close, or because
// changes came faster than they were read. Refresh makes a new one.
func (a *Accelerator) missedNeighbours(done chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.watching != done {
		return
	}
	close(done)
	a.watching = nil
	a.hops.forget()
}
