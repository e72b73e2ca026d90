package lease

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// slowFree is the rule of freeSubnets written plainly.
func slowFree(cfg NetworkConfig, taken []netip.Prefix, max int) []netip.Prefix {
	var free []netip.Prefix
	size := uint64(1) << (32 - cfg.SubnetLen)
	for at := uint64(addrBits(cfg.SubnetMin)); at <= uint64(addrBits(cfg.SubnetMax)) && len(free) < max; at += size {
		p := netip.PrefixFrom(bitsAddr(uint32(at)), cfg.SubnetLen)
		if !slices.ContainsFunc(taken, p.Overlaps) {
			free = append(free, p)
		}
	}
	return free
}

// genTaken draws leases, most of them of the configured size, some larger or
// smaller, some elsewhere.
func genTaken(t *rapid.T, cfg NetworkConfig) []netip.Prefix {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix {
		bits := rapid.SampledFrom([]int{cfg.SubnetLen, cfg.SubnetLen, cfg.SubnetLen, cfg.SubnetLen - 1, 30, 8}).Draw(t, "bits")
		off := rapid.Uint32Range(0, hostMask(cfg.Network.Bits())).Draw(t, "offset")
		if rapid.IntRange(0, 9).Draw(t, "near") < 8 {
			off &= 0xfff
		}
		return netip.PrefixFrom(bitsAddr(addrBits(cfg.Network.Addr())|off), bits).Masked()
	}), 0, 60).Draw(t, "taken")
}

func TestAllocateChoosesAmongTheFirstHundredFreeSubnets(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := genConfig(t)
		taken := genTaken(t, cfg)
		want := slowFree(cfg, taken, maxCandidates)
		if got := freeSubnets(cfg, newIntervals(taken), maxCandidates); !slices.Equal(got, want) {
			t.Fatalf("%s, taken %v:\ngot  %v\nwant %v", cfg, taken, got, want)
		}
		offered := 0
		pick := func(n int) int { offered = n; return rapid.IntRange(0, n-1).Draw(t, "pick") }
		got, err := allocate(cfg, taken, netip.Prefix{}, pick)
		if len(want) == 0 {
			if !errors.Is(err, ErrOutOfSubnets) {
				t.Fatalf("full network: got %s, %v", got, err)
			}
			return
		}
		if err != nil || offered != len(want) || !slices.Contains(want, got) || !cfg.Compatible(got) {
			t.Fatalf("got %s of %d, %v", got, offered, err)
		}
	})
}

func TestAllocatePrefersThePreviousSubnet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := genConfig(t)
		taken := genTaken(t, cfg)
		previous := rapid.OneOf(
			rapid.SampledFrom(append(slowFree(cfg, nil, 300), netip.Prefix{})),
			rapid.SampledFrom(append(taken, netip.Prefix{})),
		).Draw(t, "previous")
		got, err := allocate(cfg, taken, previous, func(int) int { return 0 })
		usable := cfg.Compatible(previous) && !slices.ContainsFunc(taken, previous.Overlaps)
		if usable && (err != nil || got != previous) {
			t.Fatalf("previous %s is free, got %s, %v", previous, got, err)
		}
		if err == nil && slices.ContainsFunc(taken, got.Overlaps) {
			t.Fatalf("%s overlaps a lease", got)
		}
	})
}

func TestOutOfSubnetsTellsTheNetworkItsSizeAndWhatToChange(t *testing.T) {
	cfg, err := ParseNetworkConfig([]byte(`{"Network":"10.9.0.0/21","SubnetLen":24,"SubnetMin":"10.9.0.0"}`))
	if err != nil {
		t.Fatal(err)
	}
	_, err = allocate(cfg, slowFree(cfg, nil, 100), netip.Prefix{}, func(int) int { return 0 })
	var out *OutOfSubnetsError
	if !errors.As(err, &out) || !errors.Is(err, ErrOutOfSubnets) {
		t.Fatalf("got %v", err)
	}
	for _, want := range []string{"out of subnets", "10.9.0.0/21", "8 subnets of /24", "larger Network or a longer SubnetLen", "8 leases"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
}
