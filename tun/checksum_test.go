package tun

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"tweed/tun/tuntest"
)

func TestSumAgreesWithTheSlowOneAtEveryLengthAndAlignment(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 300)
	for i := range buf {
		buf[i] = byte(rng.Uint32())
	}
	for off := range 9 {
		for n := 0; n+off <= len(buf); n++ {
			b := buf[off : off+n]
			if got, want := Fold(Sum(b, 0)), tuntest.Sum(b); got != want {
				t.Fatalf("%d bytes at offset %d: sum %#04x, want %#04x", n, off, got, want)
			}
		}
	}
}

// The end-around carry is lost most easily where every addition overflows.
func TestSumCarries(t *testing.T) {
	for _, fill := range []byte{0x00, 0x01, 0x80, 0xfe, 0xff} {
		for _, n := range []int{1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1500, 65535} {
			b := bytes.Repeat([]byte{fill}, n)
			for _, start := range []uint64{0, 1, 0xffff, 0xffffffff, 1<<63 - 1, ^uint64(0) - 1, ^uint64(0)} {
				var head [8]byte
				binary.LittleEndian.PutUint64(head[:], start)
				if got, want := Fold(Sum(b, start)), tuntest.Sum(head[:], b); got != want {
					t.Errorf("%d bytes of %#x from %#x: sum %#04x, want %#04x", n, fill, start, got, want)
				}
			}
		}
	}
}

func TestSumOfPiecesIsSumOfTheWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOfN(rapid.Byte(), 0, 400).Draw(t, "bytes")
		acc := uint64(0)
		for rest := b; ; {
			n := rapid.IntRange(0, len(rest)).Draw(t, "cut")
			if n < len(rest) {
				n &^= 1
			}
			acc = Sum(rest[:n], acc)
			rest = rest[n:]
			if len(rest) == 0 {
				break
			}
		}
		if got, want := Fold(acc), tuntest.Sum(b); got != want {
			t.Fatalf("sum %#04x, want %#04x", got, want)
		}
	})
}

func FuzzSum(f *testing.F) {
	f.Add([]byte{}, uint64(0))
	f.Add([]byte{1}, ^uint64(0))
	f.Add(bytes.Repeat([]byte{0xff}, 200), uint64(1))
	f.Fuzz(func(t *testing.T, b []byte, start uint64) {
		var head [8]byte
		binary.LittleEndian.PutUint64(head[:], start)
		if got, want := Fold(Sum(b, start)), tuntest.Sum(head[:], b); got != want {
			t.Fatalf("sum %#04x, want %#04x", got, want)
		}
	})
}

func TestPseudoSumAndHeaderChecksum(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPacket(t, tuntest.TCP)
		p.Sum = tuntest.Partial
		b := p.Bytes()
		ihl := headerLen(b)
		if got, want := Fold(pseudoSum(b, b[9], len(b)-ihl)), be16(b[ihl+tcpCsumOff:]); got != want {
			t.Fatalf("pseudo sum %#04x, want %#04x", got, want)
		}
		want := be16(b[10:])
		put16(b[10:], 0xdead)
		putIPChecksum(b, ihl)
		if got := be16(b[10:]); got != want {
			t.Fatalf("header checksum %#04x, want %#04x", got, want)
		}
	})
}

// allSums returns headers whose checksum fields take every value that matters
// for the carry, by way of the ID.
func allSums(yield func(b []byte) bool) {
	b := tuntest.Packet{Proto: 99}.Bytes()
	for id := range 1 << 16 {
		put16(b[4:], uint16(id))
		tuntest.SetIPChecksum(b)
		if !yield(append([]byte(nil), b...)) {
			return
		}
	}
}

func TestDecrementTTLKeepsTheHeaderChecksumRight(t *testing.T) {
	for b := range allSums {
		for _, ttl := range []byte{1, 2, 64, 128, 255} {
			b[8] = ttl
			tuntest.SetIPChecksum(b)
			DecrementTTL(b)
			got := be16(b[10:])
			if tuntest.SetIPChecksum(b); b[8] != ttl-1 || got != be16(b[10:]) {
				t.Fatalf("TTL %d -> %d, checksum %#04x, right is %#04x", ttl, b[8], got, be16(b[10:]))
			}
		}
	}
}

func TestDecrementTTLKeepsAWrongChecksumWrong(t *testing.T) {
	for b := range allSums {
		put16(b[10:], be16(b[10:])+1)
		if tuntest.Sum(b[:20]) == 0xffff { // 0xfffe + 1 and 0xffff + 1 mean the same
			continue
		}
		DecrementTTL(b)
		if tuntest.Sum(b[:20]) == 0xffff {
			t.Fatalf("a wrong checksum became right: % x", b[:20])
		}
	}
}

func TestSetECNKeepsTheHeaderChecksumRight(t *testing.T) {
	for b := range allSums {
		for ecn := range uint8(4) {
			for _, tos := range []byte{0, 1, 2, 3, 0xb8, 0xff} {
				b[1] = tos
				tuntest.SetIPChecksum(b)
				SetECN(b, ecn)
				got := be16(b[10:])
				if tuntest.SetIPChecksum(b); b[1] != tos&^3|ecn || got != be16(b[10:]) {
					t.Fatalf("TOS %#x, ECN %d -> %#x, checksum %#04x, right is %#04x", tos, ecn, b[1], got, be16(b[10:]))
				}
			}
		}
	}
}
