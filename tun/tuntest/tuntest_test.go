package tuntest

import (
	"bytes"
	"testing"
)

// The reference itself is checked against gopacket, which shares nothing with it.
func TestBuilderAndSplitterAgreeWithGopacket(t *testing.T) {
	payload := bytes.Repeat([]byte("overlay"), 500)
	for name, p := range map[string]Packet{
		"tcp":         {Proto: TCP, Flags: ACK | PSH, Payload: payload, SrcPort: 80, DstPort: 4000, Seq: 1 << 31},
		"tcp options": {Proto: TCP, Flags: ACK | FIN | CWR, Payload: payload, TCPOptions: []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}},
		"udp":         {Proto: UDP, Payload: payload, SrcPort: 80, DstPort: 4000, ID: 0xffff},
		"ip options":  {Proto: UDP, Payload: payload, IPOptions: []byte{148, 4, 0, 0}, TOS: 3, Frag: DontFragment},
	} {
		b := p.Bytes()
		if err := Check(b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := CheckDecoded(b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		segs, err := Split(p.Super(1000))
		if err != nil || len(segs) != 4 {
			t.Errorf("%s: %d segments, error %v", name, len(segs), err)
		}
		for i, s := range segs {
			if err := CheckDecoded(s); err != nil {
				t.Errorf("%s: segment %d: %v", name, i, err)
			}
		}
	}
}

func TestCheckFindsEveryFlippedByte(t *testing.T) {
	good := Packet{Proto: TCP, Flags: ACK, Payload: []byte("payload")}.Bytes()
	for i := range good {
		b := append([]byte(nil), good...)
		b[i] ^= 0x10
		if Check(b) == nil && i != 9 { // another protocol has no checksum we know
			t.Errorf("byte %d flipped: not noticed", i)
		}
	}
}
