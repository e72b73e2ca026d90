package tuntest

import (
	"encoding/binary"
	"fmt"
)

// Segmentation types of a virtio header (include/uapi/linux/virtio_net.h).
const (
	GSONone  = 0
	GSOTCPv4 = 1
	GSOUDP   = 5
	GSOECN   = 0x80
)

// NeedsCsum is VIRTIO_NET_HDR_F_NEEDS_CSUM.
const NeedsCsum = 1

// VirtioLen is the length in bytes of the header before every packet.
const VirtioLen = 10

// Virtio is struct virtio_net_hdr.
type Virtio struct {
	Flags, GSOType                         uint8
	HdrLen, GSOSize, CsumStart, CsumOffset uint16
}

// Prepend returns the header, encoded, followed by the packet.
func (v Virtio) Prepend(pkt []byte) []byte {
	b := append(make([]byte, 0, VirtioLen+len(pkt)), v.Flags, v.GSOType)
	for _, f := range []uint16{v.HdrLen, v.GSOSize, v.CsumStart, v.CsumOffset} {
		b = binary.NativeEndian.AppendUint16(b, f)
	}
	return append(b, pkt...)
}

// Read takes the header off what was written to a queue.
func Read(raw []byte) (Virtio, []byte, error) {
	if len(raw) < VirtioLen {
		return Virtio{}, nil, fmt.Errorf("%d bytes written: no virtio header", len(raw))
	}
	u16 := binary.NativeEndian.Uint16
	v := Virtio{raw[0], raw[1], u16(raw[2:]), u16(raw[4:]), u16(raw[6:]), u16(raw[8:])}
	return v, raw[VirtioLen:], nil
}

// Super returns what a TUN device hands over for a transfer of p.Payload in
// segments of size bytes: the super-packet behind its virtio header.
func (p Packet) Super(size int) []byte {
	p.Sum = Partial
	b := p.Bytes()
	ihl := 20 + len(p.IPOptions)
	v := Virtio{Flags: NeedsCsum, GSOType: GSOTCPv4, HdrLen: uint16(ihl + 20 + len(p.TCPOptions)), GSOSize: uint16(size),
		CsumStart: uint16(ihl), CsumOffset: 16}
	if p.Proto == UDP {
		v.GSOType, v.HdrLen, v.CsumOffset = GSOUDP, uint16(ihl+8), 6
	} else if p.Flags&CWR != 0 {
		v.GSOType |= GSOECN
	}
	return v.Prepend(b)
}

// Split returns the packets that the kernel makes of what was written to a
// queue, with complete checksums. It is stricter than the kernel: anything in
// the virtio header that does not agree with the packet is an error.
func Split(raw []byte) ([][]byte, error) {
	v, pkt, err := Read(raw)
	if err != nil {
		return nil, err
	}
	if len(pkt) < 20 {
		return nil, fmt.Errorf("%d bytes of packet", len(pkt))
	}
	ihl := int(pkt[0]&0xf) * 4
	if v.Flags&^NeedsCsum != 0 {
		return nil, fmt.Errorf("flags %#x", v.Flags)
	}
	if v.Flags == 0 {
		if v != (Virtio{}) {
			return nil, fmt.Errorf("%+v: fields without a flag", v)
		}
		return [][]byte{append([]byte(nil), pkt...)}, nil
	}
	at := sumOffset(pkt[9])
	switch {
	case at < 0 || int(v.CsumStart) != ihl || int(v.CsumOffset) != at || len(pkt) < ihl+at+2:
		return nil, fmt.Errorf("%+v: checksum offsets do not fit protocol %d, header length %d", v, pkt[9], ihl)
	case binary.BigEndian.Uint16(pkt[ihl+at:]) != pseudoSum(pkt, ihl):
		return nil, fmt.Errorf("%+v: checksum field %#x is not the pseudo header's sum %#x", v, pkt[ihl+at:ihl+at+2], pseudoSum(pkt, ihl))
	case v.GSOType == GSONone && v != (Virtio{Flags: NeedsCsum, CsumStart: v.CsumStart, CsumOffset: v.CsumOffset}):
		return nil, fmt.Errorf("%+v: segmentation fields of a single packet", v)
	case v.GSOType == GSONone:
		return [][]byte{Complete(pkt)}, nil
	}
	if int(binary.BigEndian.Uint16(pkt[2:])) != len(pkt) || Sum(pkt[:ihl]) != 0xffff {
		return nil, fmt.Errorf("super-packet's IPv4 header is wrong: % x of %d bytes", pkt[:ihl], len(pkt))
	}
	return split(v, pkt, ihl)
}

func split(v Virtio, pkt []byte, ihl int) ([][]byte, error) {
	hl, want := ihl+8, uint8(GSOUDP)
	if pkt[9] == TCP {
		hl, want = ihl+int(pkt[ihl+12]>>4)*4, GSOTCPv4
		if pkt[ihl+13]&CWR != 0 {
			want |= GSOECN
		}
	} else if n := int(binary.BigEndian.Uint16(pkt[ihl+4:])); n != len(pkt)-ihl {
		return nil, fmt.Errorf("super-packet's UDP length is %d of %d", n, len(pkt)-ihl)
	}
	size := int(v.GSOSize)
	if v.GSOType != want || int(v.HdrLen) != hl || size == 0 || len(pkt)-hl <= size {
		return nil, fmt.Errorf("%+v: want type %#x, headers of %d bytes and more than one segment in %d bytes", v, want, hl, len(pkt))
	}
	var out [][]byte
	for i, at := 0, hl; at < len(pkt); i, at = i+1, at+size {
		end := min(at+size, len(pkt))
		seg := append(append([]byte(nil), pkt[:hl]...), pkt[at:end]...)
		binary.BigEndian.PutUint16(seg[2:], uint16(len(seg)))
		binary.BigEndian.PutUint16(seg[4:], binary.BigEndian.Uint16(pkt[4:])+uint16(i))
		l4 := seg[ihl:]
		if pkt[9] == UDP {
			binary.BigEndian.PutUint16(l4[4:], uint16(len(l4)))
		} else {
			binary.BigEndian.PutUint32(l4[4:], binary.BigEndian.Uint32(pkt[ihl+4:])+uint32(at-hl))
			if i > 0 {
				l4[13] &^= CWR
			}
			if end < len(pkt) {
				l4[13] &^= FIN | PSH
			}
		}
		SetIPChecksum(seg)
		binary.BigEndian.PutUint16(l4[sumOffset(pkt[9]):], transportSum(seg, ihl))
		out = append(out, seg)
	}
	if pkt[9] == UDP && len(out) > 64 {
		return nil, fmt.Errorf("%d UDP segments: kernels before 6.9 take 64", len(out))
	}
	return out, nil
}
