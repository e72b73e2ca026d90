package encap

import (
	"syscall"
	"testing"
)

// A super-packet of 44 segments, headers and payload apart, as one message; the
// system call is left out.
func BenchmarkAddSend(b *testing.B) {
	s := &Socket{fd: -1, sendmmsg: func(_ int, m []mmsghdr) (int, syscall.Errno) { return len(m), 0 }}
	for name, gso := range map[string]bool{"segmented": true, "single": false} {
		b.Run(name, func(b *testing.B) {
			s.gso.Store(gso)
			batch, dst := NewSendBatch(), NewDest(destA)
			batch.Reset(s)
			heads, tail := make([]byte, 44*74), make([]byte, 1374)
			var res SendResult
			b.SetBytes(44 * (74 + 1374))
			b.ReportAllocs()
			for b.Loop() {
				for i := range 44 {
					if !batch.Add(dst, 0, 0, heads[i*74:(i+1)*74], tail) {
						b.Fatal("full")
					}
				}
				s.Send(batch, &res)
			}
		})
	}
}

func BenchmarkVXLANCheck(b *testing.B) {
	d := incoming()
	r := NewVXLANReceiver(testVNI, ourMAC)
	b.ReportAllocs()
	for b.Loop() {
		if r.Check(d) != OK {
			b.Fatal("refused")
		}
	}
}
