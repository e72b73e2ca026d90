package node

import (
	"fmt"
	"strconv"

	"tweed/encap"
)

// mtuChoice is the --mtu flag: the zero value derives the MTU from the underlay.
type mtuChoice struct {
	max   bool
	bytes int
}

func parseMTU(s string) (mtuChoice, error) {
	switch s {
	case "", "auto":
		return mtuChoice{}, nil
	case "max":
		return mtuChoice{max: true}, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		return mtuChoice{}, fmt.Errorf("--mtu %s: expected max or a number of bytes", s)
	}
	if n < encap.MinMTU || n > 65535 {
		return mtuChoice{}, fmt.Errorf("--mtu %s: expected max or %d to 65535 bytes", s, encap.MinMTU)
	}
	return mtuChoice{bytes: n}, nil
}

// overlayMTU is the inner MTU, in bytes, for a framing on an underlay
// interface: --mtu first, then the network's Backend.MTU, then the framing's
// default. Backend.MTU is the underlay MTU to reckon with, as in flannel's
// vxlan backend (FC 3.4), not the inner one.
func overlayMTU(c mtuChoice, f encap.Framing, backendMTU int, u underlay) (int, error) {
	switch {
	case c.max:
		mtu := f.MaxMTU(u.mtu)
		return mtu, onIface("--mtu max", f.CheckMTU(mtu, u.mtu), u)
	case c.bytes > 0:
		return c.bytes, onIface("--mtu", f.CheckMTU(c.bytes, u.mtu), u)
	case backendMTU > u.mtu:
		return 0, fmt.Errorf("network config: Backend.MTU %d is above the MTU of %s, which is %d: lower Backend.MTU, raise the interface's MTU, or give --mtu", backendMTU, u.name, u.mtu)
	case backendMTU > 0:
		mtu := f.DefaultMTU(backendMTU)
		return mtu, onIface("network config: Backend.MTU", f.CheckMTU(mtu, backendMTU), u)
	}
	mtu := f.DefaultMTU(u.mtu)
	return mtu, onIface("MTU", f.CheckMTU(mtu, u.mtu), u)
}

func onIface(what string, err error, u underlay) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w; interface %s", what, err, u.name)
}

// peerMTU is the inner MTU, in bytes, that reaches a peer unfragmented over a
// path of the given underlay MTU; 0 when the overlay's own MTU does. A path
// MTU too small to be true, which anybody can make up with an ICMP error, is
// answered with the minimum rather than believed.
func peerMTU(f encap.Framing, path, overlay int) int {
	if path <= 0 {
		return 0
	}
	limit := max(f.MaxMTU(path), encap.MinMTU)
	if limit >= overlay {
		return 0
	}
	return limit
}
