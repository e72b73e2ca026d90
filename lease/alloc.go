package lease

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
)

// maxCandidates is how many free subnets a new node chooses among. It is
// flannel's number: small networks fill from the low end, and two nodes that
// start together seldom choose the same one.
const maxCandidates = 100

// ErrOutOfSubnets says that every subnet nodes may claim is taken. It is always
// wrapped in an *OutOfSubnetsError.
var ErrOutOfSubnets = errors.New("out of subnets")

// OutOfSubnetsError tells which network is full and how large it is.
type OutOfSubnetsError struct {
	// Config is the configuration in force.
	Config NetworkConfig
	// Leases is the number of leases found, of whatever size.
	Leases int
}

func (e *OutOfSubnetsError) Error() string {
	return fmt.Sprintf("lease: %v: network %s holds %d subnets of /%d (%s to %s) and none is free (%d leases); "+
		"write a larger Network or a longer SubnetLen to the config key, or release leases of nodes that are gone",
		ErrOutOfSubnets, e.Config.Network, e.Config.Subnets(), e.Config.SubnetLen,
		e.Config.SubnetMin, e.Config.SubnetMax, e.Leases)
}

// Unwrap returns ErrOutOfSubnets.
func (e *OutOfSubnetsError) Unwrap() error { return ErrOutOfSubnets }

// allocate chooses the subnet a node without a lease claims: its previous one if
// that may still be held and nobody took it, otherwise one of the first
// maxCandidates free ones at random. taken is every subnet that is leased, in
// any order. pick returns a number from 0 to n-1.
func allocate(cfg NetworkConfig, taken []netip.Prefix, previous netip.Prefix, pick func(n int) int) (netip.Prefix, error) {
	used := newIntervals(taken)
	if cfg.Compatible(previous) && previous == previous.Masked() && !used.overlaps(previous) {
		return previous, nil
	}
	free := freeSubnets(cfg, used, maxCandidates)
	if len(free) == 0 {
		return netip.Prefix{}, &OutOfSubnetsError{Config: cfg, Leases: len(taken)}
	}
	return free[pick(len(free))], nil
}

func randomPick(n int) int { return rand.IntN(n) }

// freeSubnets lists the first max subnets from SubnetMin to SubnetMax that
// overlap none in use. It costs one step per lease or candidate, not per subnet
// of the network.
func freeSubnets(cfg NetworkConfig, used intervals, max int) []netip.Prefix {
	var free []netip.Prefix
	size := uint64(1) << (32 - cfg.SubnetLen)
	last := uint64(addrBits(cfg.SubnetMax))
	for at := uint64(addrBits(cfg.SubnetMin)); at <= last && len(free) < max; {
		if end, taken := used.find(uint32(at), uint32(at+size-1)); taken {
			at = (uint64(end)/size + 1) * size
			continue
		}
		free = append(free, netip.PrefixFrom(bitsAddr(uint32(at)), cfg.SubnetLen))
		at += size
	}
	return free
}

// intervals is a set of address ranges, sorted, disjoint.
type intervals []interval

// interval is an address range, both ends inclusive.
type interval struct{ lo, hi uint32 }

func newIntervals(subnets []netip.Prefix) intervals {
	all := make(intervals, 0, len(subnets))
	for _, p := range subnets {
		if !p.IsValid() || !p.Addr().Is4() {
			continue
		}
		lo := addrBits(p.Masked().Addr())
		all = append(all, interval{lo, lo | hostMask(p.Bits())})
	}
	slices.SortFunc(all, func(a, b interval) int {
		return cmp.Or(cmp.Compare(a.lo, b.lo), cmp.Compare(b.hi, a.hi))
	})
	// Prefixes nest or are apart: what is inside its predecessor adds nothing.
	out := all[:0]
	for _, i := range all {
		if len(out) == 0 || i.lo > out[len(out)-1].hi {
			out = append(out, i)
		}
	}
	return out
}

// find returns the end of a range that shares an address with lo..hi.
func (s intervals) find(lo, hi uint32) (end uint32, ok bool) {
	i, _ := slices.BinarySearchFunc(s, lo, func(r interval, lo uint32) int {
		if r.hi < lo {
			return -1
		}
		return 1
	})
	if i < len(s) && s[i].lo <= hi {
		return s[i].hi, true
	}
	return 0, false
}

func (s intervals) overlaps(p netip.Prefix) bool {
	lo := addrBits(p.Masked().Addr())
	_, ok := s.find(lo, lo|hostMask(p.Bits()))
	return ok
}
