package table

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"tweed/encap"
)

var local = Local{Subnet: netip.MustParsePrefix("10.1.0.0/24"), Addr: netip.MustParseAddr("10.1.0.0"), MAC: MAC{2, 0, 0, 0, 0, 1}, VNI: 1}

func bitsOf(s string) uint32 {
	b := netip.MustParseAddr(s).As4()
	return binary.BigEndian.Uint32(b[:])
}

func addrOf(bits uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], bits)
	return netip.AddrFrom4(b)
}

func peer(subnet, endpoint string) Peer {
	return Peer{Subnet: netip.MustParsePrefix(subnet), Endpoint: netip.MustParseAddrPort(endpoint)}
}

func build(t testing.TB, peers ...Peer) *Table {
	t.Helper()
	tab, err := Build(local, peers, nil)
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

// longest is the obvious look-up: the longest of all subnets that hold addr.
func longest(peers []Peer, addr uint32) *Peer {
	var best *Peer
	for i := range peers {
		if peers[i].Subnet.Contains(addrOf(addr)) && (best == nil || peers[i].Subnet.Bits() > best.Subnet.Bits()) {
			best = &peers[i]
		}
	}
	return best
}

func checkLookup(t *rapid.T) {
	// Prefixes near each other nest and fit the direct index; far ones need cells.
	// So few never need the trie, which is compared all the same.
	spread := rapid.SampledFrom([]uint{8, 16, 24, 32}).Draw(t, "spread")
	base := rapid.Uint32().Draw(t, "base")
	if spread < 32 {
		base &^= 1<<spread - 1
	}
	var peers []Peer
	seen := map[netip.Prefix]bool{}
	for i := range rapid.IntRange(0, 30).Draw(t, "peers") {
		bits := rapid.IntRange(max(1, 32-int(spread)), 32).Draw(t, "bits")
		off := rapid.Uint32().Draw(t, "offset")
		if spread < 32 {
			off &= 1<<spread - 1
		}
		p := netip.PrefixFrom(addrOf(base|off), bits).Masked()
		if seen[p] {
			continue
		}
		seen[p] = true
		peers = append(peers, Peer{Subnet: p, Endpoint: netip.AddrPortFrom(addrOf(uint32(i+1)), 8285), NodeID: fmt.Sprint(i)})
	}
	tab, err := Build(local, peers, nil)
	if err != nil {
		t.Fatal(err)
	}
	trie := &Table{entries: tab.entries}
	trie.enterTrie()
	probe := func(addr uint32) {
		want := longest(peers, addr)
		for _, tab := range []*Table{tab, trie} {
			got := tab.Lookup(addr)
			if (got == nil) != (want == nil) || got != nil && got.NodeID != want.NodeID {
				t.Fatalf("%v: %v, want %v", addrOf(addr), got, want)
			}
			if e := tab.Direct(addr); e != nil && e != got {
				t.Fatalf("%v: %v in one step, %v by Lookup", addrOf(addr), e, got)
			}
		}
	}
	for _, p := range peers { // edges of every prefix, inside and outside
		first := bitsOf(p.Subnet.Addr().String())
		last := first | hostMask(p.Subnet.Bits())
		for _, a := range []uint32{first - 1, first, first + 1, last - 1, last, last + 1, first ^ 1<<31} {
			probe(a)
		}
	}
	for range 50 {
		probe(rapid.Uint32().Draw(t, "addr"))
		probe(base | rapid.Uint32().Draw(t, "near")&(1<<min(spread, 31)-1))
	}
	for _, a := range []uint32{0, ^uint32(0), 1 << 31} {
		probe(a)
	}
}

func TestLookupFindsTheLongestPrefix(t *testing.T) { rapid.Check(t, checkLookup) }

func TestLeasesOfOneLengthAreFoundInOneStep(t *testing.T) {
	tab := build(t, network(1000)...)
	for i := range uint32(1001) {
		addr := 10<<24 | i<<8 | 77
		if e := tab.Direct(addr); e != tab.Lookup(addr) || (e != nil) != (i < 1000) {
			t.Fatalf("%v: %v", addrOf(addr), e)
		}
	}
}

func TestNestedSubnets(t *testing.T) {
	tab := build(t,
		peer("10.1.0.0/16", "192.0.2.1:1"), peer("10.1.2.0/24", "192.0.2.2:1"), peer("10.1.2.128/25", "192.0.2.3:1"),
		peer("10.1.2.200/32", "192.0.2.4:1"), peer("10.0.0.0/8", "192.0.2.5:1"))
	for addr, want := range map[string]string{
		"10.1.2.200": "192.0.2.4", "10.1.2.201": "192.0.2.3", "10.1.2.127": "192.0.2.2", "10.1.3.1": "192.0.2.1",
		"10.2.0.0": "192.0.2.5", "10.255.255.255": "192.0.2.5", "11.0.0.0": "", "9.255.255.255": "",
	} {
		e := tab.Lookup(bitsOf(addr))
		if got := ""; e != nil {
			if got = e.Endpoint.Addr().String(); got != want {
				t.Errorf("%s: %s, want %s", addr, got, want)
			}
		} else if want != "" {
			t.Errorf("%s: nobody, want %s", addr, want)
		}
	}
}

// scattered are n hosts, one in each of n slots whatever the slots are: more than
// any index is made for.
func scattered(n int) []Peer {
	peers := make([]Peer, n)
	for i := range peers {
		p := peer("0.0.0.0/32", "192.0.2.1:1")
		p.Subnet = netip.PrefixFrom(addrOf(uint32(uint64(i)*(1<<32/uint64(n)+77))), 32)
		peers[i] = p
	}
	return peers
}

// One shape for ordinary networks, others for mixed and for scattered ones; a
// look-up must not be able to tell.
func TestShapeFollowsTheSpread(t *testing.T) {
	one := func(s ...string) (all []Peer) {
		for _, subnet := range s {
			all = append(all, peer(subnet, "192.0.2.1:1"))
		}
		return all
	}
	for name, c := range map[string]struct {
		peers        []Peer
		trie         bool
		index, cells int
	}{
		"none":                       {nil, false, 0, 0},
		"one":                        {one("10.1.2.0/24"), false, 1, 0},
		"a /16 of /24":               {one("10.1.0.0/24", "10.1.255.0/24"), false, 256, 0},
		"a /8 of /24 and a host":     {append(network(65536), one("10.3.3.3/32")...), false, 65536, 256},
		"and one far away":           {append(network(65536), one("200.0.0.0/32")...), false, 190<<8 + 1, 65536 * 2},
		"a /8 of /28, two of them":   {one("10.0.0.0/28", "10.255.255.240/28"), false, 65536, 32},
		"the whole Internet, so too": {one("0.0.0.0/32", "255.255.255.255/32"), false, 65536, 2 << 16},
		"halves":                     {one("0.0.0.0/1", "128.0.0.0/1"), false, 2, 0},
		"last address":               {one("255.255.255.255/32"), false, 1, 0},
		"too scattered":              {scattered(1 << 12), true, 0, 0},
	} {
		tab := build(t, c.peers...)
		if (tab.trie != nil) != c.trie || len(tab.index) != c.index || len(tab.cells) != c.cells {
			t.Errorf("%s: trie %v, index of %d, %d cells", name, tab.trie != nil, len(tab.index), len(tab.cells))
		}
		for _, p := range c.peers {
			if e := tab.Lookup(bitsOf(p.Subnet.Addr().String())); e == nil || e.Subnet.Bits() < p.Subnet.Bits() {
				t.Fatalf("%s: %v is not found", name, p.Subnet)
			}
		}
	}
}

func TestBuildRefuses(t *testing.T) {
	good := peer("10.1.2.0/24", "192.0.2.1:8285")
	bad := func(f func(p *Peer)) []Peer {
		p := peer("10.1.3.0/24", "192.0.2.2:8285")
		f(&p)
		return []Peer{good, p}
	}
	for name, peers := range map[string][]Peer{
		"the same subnet twice":    bad(func(p *Peer) { p.Subnet = good.Subnet }),
		"no subnet":                bad(func(p *Peer) { p.Subnet = netip.Prefix{} }),
		"IPv6 subnet":              bad(func(p *Peer) { p.Subnet = netip.MustParsePrefix("fd00::/64") }),
		"IPv4 in IPv6's form":      bad(func(p *Peer) { p.Subnet = netip.PrefixFrom(netip.MustParseAddr("::ffff:10.1.3.0"), 120) }),
		"host bits set":            bad(func(p *Peer) { p.Subnet = netip.MustParsePrefix("10.1.3.1/24") }),
		"every address":            bad(func(p *Peer) { p.Subnet = netip.MustParsePrefix("0.0.0.0/0") }),
		"no endpoint":              bad(func(p *Peer) { p.Endpoint = netip.AddrPort{} }),
		"IPv6 endpoint":            bad(func(p *Peer) { p.Endpoint = netip.MustParseAddrPort("[fd00::1]:8285") }),
		"IPv4-mapped endpoint":     bad(func(p *Peer) { p.Endpoint = netip.MustParseAddrPort("[::ffff:192.0.2.2]:8285") }),
		"port 0":                   bad(func(p *Peer) { p.Endpoint = netip.MustParseAddrPort("192.0.2.2:0") }),
		"same subnet, scattered":   append(scattered(1<<12), peer("0.0.0.0/32", "192.0.2.2:1")),
		"same subnet, same holder": {good, good},
	} {
		tab, err := Build(local, peers, nil)
		if err == nil || tab != nil {
			t.Errorf("%s: table %v, error %v", name, tab != nil, err)
		} else if !strings.Contains(err.Error(), peers[len(peers)-1].Subnet.String()) {
			t.Errorf("%s: %q does not name %v", name, err, peers[len(peers)-1].Subnet)
		}
	}
}

func TestEntriesAreReadyToSend(t *testing.T) {
	udp := peer("10.1.2.0/24", "192.0.2.1:8285")
	vx := peer("10.1.3.0/24", "192.0.2.2:8472")
	vx.Framing, vx.VNI, vx.MAC = encap.FramingVXLAN, 77, MAC{2, 0, 0, 0, 0, 9}
	tab := build(t, udp, vx)
	e := tab.Entries()
	if len(e) != 2 || e[0].Peer != udp || e[1].Peer != vx {
		t.Fatalf("%+v", e)
	}
	if e[0].PrefixLen != 0 || e[0].Addr != bitsOf("192.0.2.1") || e[0].Dest.Endpoint() != udp.Endpoint {
		t.Errorf("%+v", e[0])
	}
	r := encap.NewVXLANReceiver(77, vx.MAC)
	if e[1].PrefixLen != 22 || r.Check(e[1].Prefix[:]) != encap.OK || [6]byte(e[1].Prefix[14:20]) != local.MAC {
		t.Errorf("%+v", e[1])
	}
	if !tab.HasAddr(bitsOf("192.0.2.1")) || !tab.HasAddr(bitsOf("192.0.2.2")) || tab.HasAddr(bitsOf("192.0.2.3")) || tab.HasAddr(0) {
		t.Error("HasAddr is wrong")
	}
}

func TestNoTableHoldsNobody(t *testing.T) {
	for name, tab := range map[string]*Table{"nil": nil, "zero": {}, "empty": build(t)} {
		for _, a := range []uint32{0, bitsOf("10.1.2.3"), ^uint32(0)} {
			if tab.Lookup(a) != nil || tab.Direct(a) != nil || tab.HasAddr(a) || len(tab.Entries()) != 0 {
				t.Errorf("%s table knows %v", name, addrOf(a))
			}
		}
	}
}

// What sending to an endpoint has taught survives every change of the table,
// as long as some peer has the endpoint.
func TestDestOutlivesTheTable(t *testing.T) {
	a, b := peer("10.1.2.0/24", "192.0.2.1:8285"), peer("10.1.3.0/24", "192.0.2.2:8285")
	first := build(t, a, b)
	moved := peer("10.9.9.0/24", "192.0.2.1:8285") // another subnet of the same host
	otherPort := peer("10.1.3.0/24", "192.0.2.2:8286")
	second, err := Build(local, []Peer{moved, otherPort, a}, first)
	if err != nil {
		t.Fatal(err)
	}
	d := first.Entries()[0].Dest
	e := second.Entries()
	if e[0].Dest != d || e[2].Dest != d {
		t.Error("one endpoint has several Dests")
	}
	if e[1].Dest == first.Entries()[1].Dest {
		t.Error("another port shares the Dest")
	}
	if _, err := Build(local, []Peer{a, a}, second); err == nil {
		t.Fatal("duplicate accepted")
	}
	if second.Lookup(bitsOf("10.9.9.1")).Dest != d {
		t.Error("a refused table changed the one in force")
	}
}

func TestBuildDoesNotKeepTheCallersSlice(t *testing.T) {
	peers := []Peer{peer("10.1.2.0/24", "192.0.2.1:8285")}
	tab := build(t, peers...)
	peers[0] = peer("10.1.2.0/24", "203.0.113.9:1")
	if tab.Lookup(bitsOf("10.1.2.3")).Endpoint.Addr() != netip.MustParseAddr("192.0.2.1") {
		t.Error("the table changed with the caller's slice")
	}
}

// network returns n leases of /24 in 10.0.0.0/8, as one flannel network has them.
func network(n int) []Peer {
	peers := make([]Peer, n)
	for i := range peers {
		peers[i] = Peer{
			Subnet:   netip.PrefixFrom(addrOf(10<<24|uint32(i)<<8), 24),
			Endpoint: netip.AddrPortFrom(addrOf(172<<24|16<<16+uint32(i)), 8285),
		}
	}
	return peers
}

func TestReadersSeeOneTableOrTheNext(t *testing.T) {
	var current atomicTable
	current.Store(build(t, network(64)...))
	var readers sync.WaitGroup
	stop := make(chan struct{})
	for r := range 2 {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(r), 1))
			for {
				select {
				case <-stop:
					return
				default:
				}
				tab := current.Load()
				i := rng.Uint32N(64)
				e := tab.Lookup(10<<24 | i<<8 | 9)
				if e == nil || e.Addr&0xffff != i || !tab.HasAddr(e.Addr) || !e.Dest.Endpoint().IsValid() {
					t.Errorf("lease %d: %+v", i, e)
					return
				}
			}
		})
	}
	for range 200 {
		peers := network(64)
		rand.Shuffle(len(peers), func(i, j int) { peers[i], peers[j] = peers[j], peers[i] })
		next, err := Build(local, peers, current.Load())
		if err != nil {
			t.Fatal(err)
		}
		current.Store(next)
	}
	close(stop)
	readers.Wait()
}

func TestLookupAllocatesNothing(t *testing.T) {
	index := build(t, network(1000)...)
	deep := build(t, append(network(1000), peer("10.0.3.3/32", "192.0.2.1:1"), peer("10.255.0.0/24", "192.0.2.2:1"))...)
	trie := build(t, scattered(1<<12)...)
	if trie.trie == nil || index.trie != nil || deep.cells == nil {
		t.Fatal("not the shapes this is about")
	}
	found := 0
	if n := testing.AllocsPerRun(100, func() {
		for _, a := range []uint32{10<<24 | 5<<8, 10<<24 | 3<<8 | 3, 1 << 24, 200<<24 | 7, 99 << 24} {
			if index.Lookup(a) != nil || deep.Lookup(a) != nil || trie.Lookup(a) != nil {
				found++
			}
			index.HasAddr(a)
		}
	}); n != 0 || found == 0 {
		t.Errorf("%v allocations, %d found", n, found)
	}
}

func TestEntriesKeepTheirOrder(t *testing.T) {
	peers := network(50)
	slices.Reverse(peers)
	for i, e := range build(t, peers...).Entries() {
		if e.Peer != peers[i] {
			t.Fatalf("entry %d is %v", i, e.Subnet)
		}
	}
}
