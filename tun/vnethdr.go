package tun

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// vnetHdrLen is the length of struct virtio_net_hdr, which stands before every
// packet read from or written to a queue (include/uapi/linux/virtio_net.h).
const vnetHdrLen = 10

// vnetHdr is struct virtio_net_hdr. Multi-byte fields are in host byte order.
type vnetHdr struct {
	flags      uint8
	gsoType    uint8
	hdrLen     uint16 // headers the receiver should keep linear
	gsoSize    uint16 // payload bytes of a segment
	csumStart  uint16 // where the checksum starts
	csumOffset uint16 // where its field is, from csumStart
}

const (
	needsCsum  = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	gsoNone    = unix.VIRTIO_NET_HDR_GSO_NONE
	gsoTCPv4   = unix.VIRTIO_NET_HDR_GSO_TCPV4
	gsoUDPL4   = unix.VIRTIO_NET_HDR_GSO_UDP_L4
	gsoECN     = unix.VIRTIO_NET_HDR_GSO_ECN
	tcpCsumOff = 16
	udpCsumOff = 6
)

func (h *vnetHdr) decode(b []byte) {
	_ = b[vnetHdrLen-1]
	h.flags = b[0]
	h.gsoType = b[1]
	h.hdrLen = binary.NativeEndian.Uint16(b[2:])
	h.gsoSize = binary.NativeEndian.Uint16(b[4:])
	h.csumStart = binary.NativeEndian.Uint16(b[6:])
	h.csumOffset = binary.NativeEndian.Uint16(b[8:])
}

func (h *vnetHdr) encode(b []byte) {
	_ = b[vnetHdrLen-1]
	b[0] = h.flags
	b[1] = h.gsoType
	binary.NativeEndian.PutUint16(b[2:], h.hdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.gsoSize)
	binary.NativeEndian.PutUint16(b[6:], h.csumStart)
	binary.NativeEndian.PutUint16(b[8:], h.csumOffset)
}
