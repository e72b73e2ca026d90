package encap

import "fmt"

// udpHeadroom is left free under the udp framing so that one more
// encapsulation fits on the way: 1500 - 28 - 46 = 1426.
const udpHeadroom = 46

// MinMTU is the smallest inner MTU accepted: every IPv4 host must take 576
// bytes (RFC 791 section 3.1), less does not carry ordinary traffic.
const MinMTU = 576

// maxIPv4 is the longest IPv4 packet. A loopback underlay has an MTU above it.
const maxIPv4 = 65535

// MaxMTU is the largest inner MTU, in bytes, that fits an underlay MTU.
func (f Framing) MaxMTU(underlay int) int { return min(underlay, maxIPv4) - f.Overhead() }

// DefaultMTU is the inner MTU, in bytes, that tweed picks for an underlay MTU.
// vxlan takes all there is. udp leaves udpHeadroom on an underlay of 1500 or
// more; on a smaller one the headroom is given up first (1454 gives 1426).
func (f Framing) DefaultMTU(underlay int) int {
	limit := f.MaxMTU(underlay)
	if f != FramingUDP {
		return limit
	}
	if underlay >= 1500 {
		return limit - udpHeadroom
	}
	return min(limit, 1500-outerHeaderLen-udpHeadroom)
}

// CheckMTU returns an error naming the limit when mtu, in bytes, does not fit
// the underlay or is below MinMTU.
func (f Framing) CheckMTU(mtu, underlay int) error {
	limit := f.MaxMTU(underlay)
	if mtu > limit {
		return fmt.Errorf("MTU %d is above the limit of %d (underlay MTU %d less %d bytes of %s framing)", mtu, limit, underlay, f.Overhead(), f)
	}
	if mtu < MinMTU {
		return fmt.Errorf("MTU %d is below the minimum of %d", mtu, MinMTU)
	}
	return nil
}
