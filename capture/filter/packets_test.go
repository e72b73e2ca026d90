package filter

import (
	"encoding/binary"
	"math/rand/v2"
)

// Values the generated packets and the expressions of the corpus have in
// common, so that either outcome of a test is frequent.
var (
	packetHosts = []string{"\x0a\x00\x00\x01", "\x0a\x4d\x02\x05", "\x0a\x4d\x01\x05", "\x01\x02\x03\x04",
		"\x05\x06\x07\x08", "\xc0\xa8\x01\x0a", "\xc0\xa8\x02\x14", "\xe0\x00\x00\x01", "\xff\xff\xff\xff",
		"\x00\x00\x00\x00", "\xac\x10\x00\x01", "\x00\x00\x00\x0a"}
	packetHosts6 = []string{"\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01",
		"\x20\x01\x0d\xb8\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02",
		"\xfe\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01",
		"\xff\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01",
		"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"}
	packetMACs   = []string{"\x01\x02\x03\x04\x05\x06", "\x02\x00\x00\x00\x00\x01", "\xff\xff\xff\xff\xff\xff", "\x01\x00\x5e\x00\x00\x01"}
	packetPorts  = []uint16{22, 53, 80, 85, 90, 100, 123, 443, 8080, 8472, 1024, 65535, 0}
	packetProtos = []byte{6, 6, 6, 6, 17, 17, 17, 1, 1, 132, 132, 2, 4, 9, 41, 47, 50, 51, 58, 94, 103, 112, 255}
	packetEther  = []uint16{0x0806, 0x8035, 0x8100, 0x9000, 0x0026, 0x05dc, 0x0600, 0x88cc}
)

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// randomPackets makes n packets of a link type: well-formed ones of every
// protocol, fragments, options, impossible headers, noise, and heads cut off
// at any byte.
func randomPackets(r *rand.Rand, link LinkType, n int) [][]byte {
	packets := make([][]byte, n)
	for i := range packets {
		p := randomPacket(r, link)
		if r.IntN(5) == 0 {
			p = p[:r.IntN(len(p)+1)]
		}
		packets[i] = p
	}
	packets[0] = nil
	return packets
}

func randomPacket(r *rand.Rand, link LinkType) []byte {
	kind := r.IntN(20)
	var p []byte
	ethertype := uint16(0x0800)
	switch {
	case kind == 0:
		p = make([]byte, r.IntN(120))
		fill(r, p)
		if len(p) > 0 && r.IntN(2) == 0 {
			p[0] = 0x45
		}
		ethertype = uint16(r.Uint32())
	case kind < 4:
		p, ethertype = randomIPv6(r), 0x86dd
	case kind == 4 && link == LinkEthernet:
		p, ethertype = randomARP(r), pick(r, packetEther[:2])
	case kind == 5 && link == LinkEthernet:
		p, ethertype = randomIPv4(r), pick(r, packetEther)
	default:
		p = randomIPv4(r)
	}
	if link != LinkEthernet {
		return p
	}
	frame := []byte(pick(r, packetMACs) + pick(r, packetMACs))
	return append(binary.BigEndian.AppendUint16(frame, ethertype), p...)
}

func fill(r *rand.Rand, p []byte) {
	for i := range p {
		p[i] = byte(r.Uint32())
	}
}

func randomARP(r *rand.Rand) []byte {
	p := []byte{0, 1, 8, 0, 6, 4, 0, byte(1 + r.IntN(2))}
	p = append(p, pick(r, packetMACs)+pick(r, packetHosts)...)
	return append(p, pick(r, packetMACs)+pick(r, packetHosts)...)
}

func randomIPv4(r *rand.Rand) []byte {
	ihl := 5
	switch r.IntN(8) {
	case 0:
		ihl = r.IntN(16)
	case 1:
		ihl = 6 + r.IntN(3)
	}
	h := make([]byte, max(20, ihl*4))
	fill(r, h[20:])
	h[0] = 0x40 | byte(ihl)
	if r.IntN(30) == 0 {
		h[0] = byte(r.Uint32())
	}
	h[1] = byte(r.IntN(4))
	binary.BigEndian.PutUint16(h[4:], uint16(r.Uint32()))
	switch r.IntN(8) {
	case 0:
		binary.BigEndian.PutUint16(h[6:], 0x2000) // first fragment
	case 1:
		binary.BigEndian.PutUint16(h[6:], uint16(r.IntN(0x2000))|0x2000)
	case 2:
		binary.BigEndian.PutUint16(h[6:], uint16(r.IntN(50)))
	case 3, 4, 5:
		binary.BigEndian.PutUint16(h[6:], 0x4000)
	}
	h[8] = byte(r.IntN(256))
	h[9] = pick(r, packetProtos)
	copy(h[12:], pick(r, packetHosts))
	copy(h[16:], pick(r, packetHosts))
	body := randomTransport(r, h[9])
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(body)))
	if ihl < 5 {
		h = h[:20]
	}
	return append(h, body...)
}

func randomIPv6(r *rand.Rand) []byte {
	h := make([]byte, 40)
	h[0] = 0x60
	h[6] = pick(r, packetProtos)
	h[7] = byte(r.IntN(256))
	copy(h[8:], pick(r, packetHosts6))
	copy(h[24:], pick(r, packetHosts6))
	body := randomTransport(r, h[6])
	if r.IntN(5) == 0 {
		fragment := make([]byte, 8)
		fragment[0], h[6] = h[6], 44
		body = append(fragment, body...)
	}
	binary.BigEndian.PutUint16(h[4:], uint16(len(body)))
	return append(h, body...)
}

func randomTransport(r *rand.Rand, proto byte) []byte {
	var p []byte
	switch proto {
	case 6, 17, 132:
		p = binary.BigEndian.AppendUint16(p, pick(r, packetPorts))
		p = binary.BigEndian.AppendUint16(p, pick(r, packetPorts))
		p = append(p, make([]byte, map[byte]int{6: 16, 17: 4, 132: 8}[proto])...)
		fill(r, p[4:])
		if proto == 6 {
			p[12] = byte(5+r.IntN(4)) << 4
			p[13] = pick(r, []byte{0x02, 0x12, 0x10, 0x18, 0x11, 0x04, 0x14, 0x29, 0xc2, byte(r.Uint32())})
			p = append(p, make([]byte, int(p[12]>>4)*4-20)...)
			if r.IntN(3) == 0 {
				p = append(p, "GET / HTTP/1.1\r\n"...)
			}
		}
	case 1, 58:
		p = []byte{pick(r, []byte{0, 3, 5, 8, 11, 128, 129, 135}), byte(r.IntN(5)), 0, 0, 0, 1, 0, 2}
	}
	tail := make([]byte, r.IntN(60))
	fill(r, tail)
	return append(p, tail...)
}
