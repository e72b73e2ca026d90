// Package table maps IPv4 destinations to peers.
//
// A Table is an immutable value built from a complete list of peers. The
// packet loop, route explanations and any later accelerator read the same
// value; a change builds a new one and swaps a pointer. All methods of a Table
// are safe for concurrent use and allocate nothing.
//
// Look-up is one array index: the bits of the address that subnets of the
// longest prefix length in use can differ in select an entry. Leases nearly
// always share one prefix length inside one network, so a /16 network of /24
// subnets takes 256 pointers of 8 bytes. Shorter prefixes are expanded
// when the table is built. Peers whose spread would need more than maxIndex
// slots are kept in a compressed trie instead.
package table

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"tweed/encap"
)

// maxIndex bounds the direct index: 2^20 pointers are 8 MiB.
const maxIndex = 1 << 20

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
	index   []*Entry // nil means no peer
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
	order := make([]*Entry, 0, len(t.entries))
	lo, hi, bits := ^uint32(0), uint32(0), 0
	for i := range t.entries {
		p := t.entries[i].Subnet
		first := addrBits(p.Addr())
		lo, hi = min(lo, first), max(hi, first|hostMask(p.Bits()))
		bits = max(bits, p.Bits())
		order = append(order, &t.entries[i])
	}
	// Shorter prefixes first, so that a longer one overwrites its part.
	slices.SortStableFunc(order, func(a, b *Entry) int { return a.Subnet.Bits() - b.Subnet.Bits() })
	seen := make(map[netip.Prefix]struct{}, len(order))
	for _, e := range order {
		p := e.Subnet
		if _, dup := seen[p]; dup {
			return fmt.Errorf("table: subnet %v is held by two peers", p)
		}
		seen[p] = struct{}{}
	}
	shift := uint32(32 - bits)
	lo &^= hostMask(bits)
	slots := uint64(hi>>shift) - uint64(lo>>shift) + 1
	if slots > maxIndex {
		t.trie = new(bart.Table[*Entry])
		for _, e := range order {
			t.trie.Insert(e.Subnet, e)
		}
		return nil
	}
	t.base, t.shift = lo, shift
	t.index = make([]*Entry, slots)
	for _, e := range order {
		p := e.Subnet
		first := (addrBits(p.Addr()) - lo) >> shift
		last := ((addrBits(p.Addr()) | hostMask(p.Bits())) - lo) >> shift
		for i := first; i <= last; i++ {
			t.index[i] = e
		}
	}
	return nil
}

// Lookup returns the entry whose subnet holds addr (host byte order), or nil.
// The entry is valid as long as the caller keeps it and must not be changed.
func (t *Table) Lookup(addr uint32) *Entry {
	if t == nil {
		return nil
	}
	// An address below base wraps round and fails the same comparison.
	if i := (addr - t.base) >> (t.shift & 31); i < uint32(len(t.index)) {
		return t.index[i]
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
