package tun

import (
	"fmt"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/tun/tuntest"
)

func BenchmarkSum(b *testing.B) {
	for _, n := range []int{20, 64, 1400, 65495} {
		buf := make([]byte, n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			sum := uint64(0)
			for b.Loop() {
				sum = Sum(buf, sum)
			}
		})
	}
}

// A full super-packet into segments: with complete checksums all payload is
// read, with partial ones none of it.
func BenchmarkSplit(b *testing.B) {
	p := tuntest.Packet{Proto: tuntest.TCP, Flags: tuntest.ACK, TCPOptions: make([]byte, 12), Payload: make([]byte, 44*1374)}
	v, pkt, _ := tuntest.Read(p.Super(1374))
	h := header(v)
	for name, partial := range map[string]bool{"complete": false, "partial": true} {
		b.Run(name, func(b *testing.B) {
			s, dst := new(Splitter), make([]byte, 120)
			b.SetBytes(int64(len(pkt)))
			b.ReportAllocs()
			for b.Loop() {
				if err := s.Start(pkt, h); err != nil {
					b.Fatal(err)
				}
				s.Begin(pkt, partial)
				for ok := true; ok; {
					_, ok = s.Next(dst)
				}
			}
		})
	}
}

// 44 segments of one TCP flow, or of 8 flows in turn, into super-packets; the
// write itself is left out.
func BenchmarkCoalesce(b *testing.B) {
	for _, flows := range []int{1, 8} {
		for name, sum := range map[string]tuntest.Checksum{"complete": tuntest.Good, "partial": tuntest.Partial} {
			b.Run(fmt.Sprintf("%s/flows=%d", name, flows), func(b *testing.B) {
				q := newQueue(-1, OffloadFull)
				q.writev = func(int, []unix.Iovec) syscall.Errno { return 0 }
				c, w := NewCoalescer(1426), NewWriter()
				var in, heads [][]byte
				for i := range 44 {
					p := tcpSegment(i/flows, 1374)
					p.SrcPort, p.Sum = uint16(i%flows), sum
					in = append(in, p.Bytes())
					heads = append(heads, p.Bytes()[:52])
				}
				var res Written
				b.SetBytes(44 * 1426)
				b.ReportAllocs()
				for b.Loop() {
					for i, p := range in {
						copy(p, heads[i]) // the last round rewrote the first packet's
						if !c.Continue(p, 0) {
							c.Add(q, p, 0, 0)
						}
					}
					w.Flush(c, &res)
				}
			})
		}
	}
}
