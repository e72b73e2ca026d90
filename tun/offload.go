package tun

import "fmt"

// Offload is a rung of the capability ladder: how much segmentation work is
// left to the kernel. Higher rungs include the lower ones.
type Offload uint8

const (
	// OffloadNone: one packet per read, write, send and receive.
	OffloadNone Offload = iota
	// OffloadTSO: TCP super-packets cross the TUN device, and UDP_SEGMENT and
	// UDP_GRO are used on the sockets.
	OffloadTSO
	// OffloadFull: UDP super-packets (USO, Linux 6.2) cross the TUN as well.
	OffloadFull
	// OffloadAuto: the highest rung the kernel accepts.
	OffloadAuto
)

// String returns the rung's name as the --offload flag spells it.
func (o Offload) String() string {
	switch o {
	case OffloadNone:
		return "none"
	case OffloadTSO:
		return "tso"
	case OffloadFull:
		return "full"
	case OffloadAuto:
		return "auto"
	}
	return fmt.Sprintf("offload(%d)", uint8(o))
}

// ParseOffload reads the value of the --offload flag.
func ParseOffload(s string) (Offload, error) {
	for _, o := range []Offload{OffloadNone, OffloadTSO, OffloadFull, OffloadAuto} {
		if s == o.String() {
			return o, nil
		}
	}
	return 0, fmt.Errorf("offload %q: expected auto, full, tso or none", s)
}
