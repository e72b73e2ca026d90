package tun

// Keep removes the packets for which keep says no from the batch. The bytes of
// the others stay where they are.
func (b *ReadBatch) Keep(keep func(*Packet) bool) {
	n := 0
	for i := range b.n {
		if p := &b.packets[i]; keep(p) {
			b.packets[n] = *p
			n++
		}
	}
	b.n = n
}

// AppendRaw appends a packet to dst with its virtio header in front, as Load
// takes it.
func (b *ReadBatch) AppendRaw(dst []byte, p *Packet) []byte {
	var h [vnetHdrLen]byte
	p.vnet.encode(h[:])
	return append(append(dst, h[:]...), b.Bytes(p, 0)...)
}
