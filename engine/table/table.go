// Package table maps IPv4 destinations to peers.
//
// A Table is an immutable value built from a complete list of peers. The
// packet loop, route explanations and any later accelerator read the same
// value; a change builds a new one and swaps a pointer. All methods of a Table
// are safe for concurrent use and allocate nothing.
//
// Look-up is one array index: the bits of the address that subnets of the common
// prefix length can differ in select a slot, which points to an entry. Leases nearly
// always share one prefix length inside one network, so a /16 network of /24 subnets
// takes 256 pointers of 8 bytes. Shorter prefixes are expanded when the table is
// built. A slot that holds longer prefixes leads to an array of its own, indexed by
// the next bits. Peers so many, so long and so scattered that this would take more
// than maxCells are kept in a compressed trie instead.
package table

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"tweed/encap"
)

const (
	// maxIndex bounds the slots of the direct index, 8 bytes each, and maxCells
	// what all slots of longer prefixes lead to.
	maxIndex = 1 << 20
	maxCells = 1 << 21
)

// A slot of longer prefixes says how many address bits select one of its cells, in
// the upper bits, and where they begin, in the lower ones; 0 is any other slot.
const (
	offBits = 26
	offMask = 1<<offBits - 1
)

// Entry is a Peer with what the packet loop needs ready-made.
type Entry struct {
	Peer
	// Dest is the peer's socket address and what was learnt of the way to it.
	// Entries of one endpoint share one Dest, across table generations.
	Dest *encap.Dest
	// Prefix[:PrefixLen] stands before every packet to this peer.
	Prefix    [encap.MaxPrefixLen]byte
	PrefixLen int
	// Addr is the underlay address of the peer, host byte order.
	Addr uint32
}

// Table is an immutable set of peers. The zero value and nil hold no peer.
type Table struct {
	base    uint32   // first covered address
	shift   uint32   // address bits below one slot, 0 to 31
	index   []*Entry // slots; nil where nobody is, or longer prefixes are
	deeper  []uint32 // slots of longer prefixes; nil if there are none
	cells   []*Entry
	entries []Entry
	addrs   map[uint32]struct{}
	trie    *bart.Table[*Entry]
}

// Build makes a table of the peers as seen from local. prev, which may be nil,
// is the table being replaced: what was learnt of an endpoint is kept.
// Build returns an error, and no table, when a peer is not usable IPv4 or two
// peers hold the same subnet.
func Build(local Local, peers []Peer, prev *Table) (*Table, error) {
	t := &Table{
		entries: make([]Entry, 0, len(peers)),
		addrs:   make(map[uint32]struct{}, len(peers)),
	}
	dests := prev.dests()
	for _, p := range peers {
		if err := check(p); err != nil {
			return nil, err
		}
		d := dests[p.Endpoint]
		if d == nil {
			d = encap.NewDest(p.Endpoint)
			dests[p.Endpoint] = d
		}
		e := Entry{Peer: p, Dest: d, Addr: addrBits(p.Endpoint.Addr())}
		if p.Framing == encap.FramingVXLAN {
			encap.PutVXLANPrefix(e.Prefix[:], p.VNI, p.MAC, local.MAC)
		}
		e.PrefixLen = p.Framing.PrefixLen()
		t.entries = append(t.entries, e)
		t.addrs[e.Addr] = struct{}{}
	}
	if err := t.fill(); err != nil {
		return nil, err
	}
	return t, nil
}

func check(p Peer) error {
	switch {
	case !p.Subnet.IsValid() || !p.Subnet.Addr().Is4() || p.Subnet != p.Subnet.Masked():
		return fmt.Errorf("table: peer %v: subnet is not a masked IPv4 prefix", p.Subnet)
	case p.Subnet.Bits() == 0:
		return fmt.Errorf("table: peer %v: a peer cannot hold every address", p.Subnet)
	case !p.Endpoint.Addr().Is4() || p.Endpoint.Port() == 0:
		return fmt.Errorf("table: peer %v: endpoint %v is not an IPv4 address and port", p.Subnet, p.Endpoint)
	}
	return nil
}

// fill chooses the shape of the index and enters every peer.
func (t *Table) fill() error {
	if len(t.entries) == 0 {
		return nil
	}
	leases := make([]lease, len(t.entries))
	seen := make(map[netip.Prefix]struct{}, len(t.entries))
	for i := range t.entries {
		p := t.entries[i].Subnet
		if _, dup := seen[p]; dup {
			return fmt.Errorf("table: subnet %v is held by two peers", p)
		}
		seen[p] = struct{}{}
		leases[i] = lease{first: addrBits(p.Addr()), bits: p.Bits(), number: i}
	}
	bits, ok := chooseBits(leases)
	if !ok {
		t.enterTrie()
		return nil
	}
	t.enter(leases, bits)
	return nil
}

func (t *Table) enterTrie() {
	t.trie = new(bart.Table[*Entry])
	for i := range t.entries {
		t.trie.Insert(t.entries[i].Subnet, &t.entries[i])
	}
}

// enter fills the index with slots of so many bits.
func (t *Table) enter(leases []lease, bits int) {
	lo, slots := extent(leases, bits)
	t.base, t.shift = lo, uint32(32-bits)
	t.index = make([]*Entry, slots)
	depth := depths(leases, bits)
	if len(depth) > 0 {
		t.deeper = make([]uint32, slots)
	}
	// Shorter prefixes first, so that a longer one overwrites its part.
	slices.SortFunc(leases, func(a, b lease) int { return a.bits - b.bits })
	for _, l := range leases {
		e := &t.entries[l.number]
		slot := (l.first - lo) >> t.shift
		if l.bits <= bits {
			fill(t.index[slot:((l.last()-lo)>>t.shift)+1], e)
			continue
		}
		n := uint32(depth[l.first>>t.shift])
		if t.deeper[slot] == 0 {
			off := len(t.cells)
			t.cells = slices.Grow(t.cells, 1<<n)[:off+1<<n]
			fill(t.cells[off:], t.index[slot])
			t.index[slot], t.deeper[slot] = nil, n<<offBits|uint32(off)
		}
		cells := t.cells[t.deeper[slot]&offMask:][:1<<n]
		below := t.shift - n
		fill(cells[l.first>>below&(1<<n-1):l.last()>>below&(1<<n-1)+1], e)
	}
}

func fill(to []*Entry, e *Entry) {
	for i := range to {
		to[i] = e
	}
}

// Lookup returns the entry whose subnet holds addr (host byte order), or nil.
// The entry is valid as long as the caller keeps it and must not be changed.
func (t *Table) Lookup(addr uint32) *Entry {
	if e := t.Direct(addr); e != nil {
		return e
	}
	return t.Deeper(addr)
}

// Direct is the first half of Lookup: the entry if one step finds it, as it does for
// every lease of a network whose leases are of one length. The packet loop calls the
// halves itself, because this one is compiled into it, and a call takes longer than
// the step.
func (t *Table) Direct(addr uint32) *Entry {
	if t == nil {
		return nil
	}
	// An address below base wraps round and is outside as well.
	if i := uint(addr-t.base) >> (t.shift & 31); i < uint(len(t.index)) {
		return t.index[i]
	}
	return nil
}

// Deeper is the second half of Lookup, for addresses Direct returns nil for.
func (t *Table) Deeper(addr uint32) *Entry {
	if t == nil {
		return nil
	}
	if i := uint(addr-t.base) >> (t.shift & 31); i < uint(len(t.deeper)) {
		if d := t.deeper[i]; d != 0 {
			n := d >> offBits & 31
			return t.cells[d&offMask+addr>>((t.shift-n)&31)&(1<<n-1)]
		}
	}
	if t.trie != nil {
		return t.lookupTrie(addr)
	}
	return nil
}

func (t *Table) lookupTrie(addr uint32) *Entry {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], addr)
	e, _ := t.trie.Lookup(netip.AddrFrom4(b))
	return e
}

// HasAddr reports whether some peer's underlay address is addr (host byte order).
func (t *Table) HasAddr(addr uint32) bool {
	if t == nil {
		return false
	}
	_, ok := t.addrs[addr]
	return ok
}

// Entries returns the peers in the order they were given to Build. The caller
// must not change them.
func (t *Table) Entries() []Entry {
	if t == nil {
		return nil
	}
	return t.entries
}

// dests returns what is known of every endpoint, as a map the caller owns.
func (t *Table) dests() map[netip.AddrPort]*encap.Dest {
	m := make(map[netip.AddrPort]*encap.Dest)
	for i := range t.Entries() {
		e := &t.entries[i]
		m[e.Endpoint] = e.Dest
	}
	return m
}

func addrBits(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// hostMask has the address bits set that a prefix of that length leaves free.
func hostMask(bits int) uint32 { return uint32(uint64(1)<<(32-bits) - 1) }
