package tun

import "encoding/binary"

const (
	protoTCP  = 6
	protoUDP  = 17
	minIPv4   = 20
	minTCP    = 20
	udpLen    = 8
	flagFIN   = 0x01
	flagPSH   = 0x08
	flagACK   = 0x10
	flagECE   = 0x40
	flagCWR   = 0x80
	fragMask  = 0x3fff // MF and the fragment offset
	dontFrag  = 0x4000
	maxPacket = 65535
)

func be16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }
func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }

func put16(b []byte, v uint16) { binary.BigEndian.PutUint16(b, v) }
func put32(b []byte, v uint32) { binary.BigEndian.PutUint32(b, v) }

// headerLen returns the length of the IPv4 header in bytes, without any check.
func headerLen(ip []byte) int { return int(ip[0]&0xf) * 4 }
