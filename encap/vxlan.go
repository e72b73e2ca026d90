package encap

import "encoding/binary"

const (
	// vxlanFlags is the first word of a VXLAN header: only the I flag
	// (RFC 7348 section 5).
	vxlanFlags = 0x08000000
	etherIPv4  = 0x0800
)

// Verdict is the result of taking a prefix off a datagram.
type Verdict uint8

// Verdicts, in the order of the checks.
const (
	// OK: the prefix is valid and an IPv4 packet follows it.
	OK Verdict = iota
	// Short: the datagram is shorter than the prefix.
	Short
	// BadFlags: the I flag is missing, or another flag or a reserved bit is
	// set. The RFC says to ignore those; Linux drops them (vxlan_rcv) and so
	// do we, because a bit we do not know may change the meaning of the rest.
	BadFlags
	// WrongVNI: the VNI is not ours.
	WrongVNI
	// WrongMAC: the destination is not ours, or the source is not a unicast
	// address of somebody else.
	WrongMAC
	// NotIPv4: another ethertype, VLAN tags included.
	NotIPv4
)

// PutVXLANPrefix writes the 22 bytes that stand before a packet in the vxlan
// framing: the VXLAN header of the 24-bit vni and an Ethernet header for IPv4.
func PutVXLANPrefix(b []byte, vni uint32, dst, src [6]byte) {
	_ = b[MaxPrefixLen-1]
	binary.BigEndian.PutUint32(b[0:], vxlanFlags)
	binary.BigEndian.PutUint32(b[4:], vni<<8)
	copy(b[8:], dst[:])
	copy(b[14:], src[:])
	binary.BigEndian.PutUint16(b[20:], etherIPv4)
}

// VXLANReceiver is what a received vxlan prefix is checked against.
type VXLANReceiver struct {
	vni uint32 // shifted as on the wire
	mac uint64 // 48 bits
}

// NewVXLANReceiver accepts the 24-bit vni and frames for mac.
func NewVXLANReceiver(vni uint32, mac [6]byte) VXLANReceiver {
	return VXLANReceiver{vni: vni << 8, mac: mac48(mac[:])}
}

// Check examines the first 22 bytes of a datagram.
func (r *VXLANReceiver) Check(b []byte) Verdict {
	if len(b) < MaxPrefixLen {
		return Short
	}
	if binary.BigEndian.Uint32(b) != vxlanFlags || b[7] != 0 {
		return BadFlags
	}
	if binary.BigEndian.Uint32(b[4:]) != r.vni {
		return WrongVNI
	}
	src := mac48(b[14:])
	if mac48(b[8:]) != r.mac || src == 0 || src == r.mac || b[14]&1 != 0 {
		return WrongMAC
	}
	if binary.BigEndian.Uint16(b[20:]) != etherIPv4 {
		return NotIPv4
	}
	return OK
}

func mac48(b []byte) uint64 {
	return uint64(binary.BigEndian.Uint32(b))<<16 | uint64(binary.BigEndian.Uint16(b[4:]))
}
