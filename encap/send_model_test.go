package encap

import (
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// kernel is a wire whose answers are drawn: any message may be refused with any
// error, calls are cut short and interrupted.
type kernel struct {
	t      *rapid.T
	w      *wire
	noGSO  bool           // every segmented message gets EIO
	narrow map[string]int // largest datagram to a destination that may be segmented
	dead   map[string]syscall.Errno
}

func (k *kernel) answer(m *sent) syscall.Errno {
	to := m.dst.String()
	if e := k.dead[to]; e != 0 {
		return e
	}
	if m.segLen > 0 && k.noGSO {
		return unix.EIO
	}
	if n, ok := k.narrow[to]; ok && m.segLen > n {
		return unix.EMSGSIZE
	}
	return 0
}

func checkSend(t *rapid.T) {
	w, s := newWire(t)
	s.gso.Store(rapid.Bool().Draw(t, "segmentation"))
	dests := []*Dest{NewDest(destA), NewDest(destB)}
	k := &kernel{t: t, w: w, narrow: map[string]int{}, dead: map[string]syscall.Errno{}}
	w.answer = k.answer
	b := NewSendBatch()
	b.Reset(s)
	var slab []byte
	serial := 0
	for range rapid.IntRange(1, 4).Draw(t, "batches") {
		w.limit = rapid.IntRange(0, 3).Draw(t, "limit")
		w.interrupt = rapid.Bool().Draw(t, "interrupt")
		k.noGSO = rapid.IntRange(0, 4).Draw(t, "no GSO") == 0
		clear(k.narrow)
		clear(k.dead)
		for _, d := range dests {
			switch rapid.IntRange(0, 5).Draw(t, "fate") {
			case 0:
				k.dead[d.Endpoint().String()] = rapid.SampledFrom([]syscall.Errno{unix.EPERM, unix.ENETUNREACH, unix.ENOBUFS, unix.EINVAL, unix.EIO, unix.EMSGSIZE, unix.EPIPE}).Draw(t, "errno")
			case 1:
				k.narrow[d.Endpoint().String()] = 60
			}
		}
		w.datagrams = nil
		var want []datagram
		lost := map[uint64]bool{}
		res := SendResult{Refused: func(tag uint64, _ SendError) {
			if lost[tag] {
				t.Fatalf("tag %d refused twice", tag)
			}
			lost[tag] = true
		}}
		var all Count
		slab = make([]byte, 0, 1<<16) // pieces may touch each other here
		for range rapid.IntRange(0, 40).Draw(t, "segments") {
			d := rapid.SampledFrom(dests).Draw(t, "dest")
			tos := rapid.SampledFrom([]uint8{0, 0, 0, 1, 3}).Draw(t, "tos")
			size := rapid.SampledFrom([]int{1, 22, 59, 60, 61, 100, 100, 100, 101, 1000}).Draw(t, "size")
			data := seg{size: size}.bytes(serial)
			serial++
			start := len(slab)
			slab = append(slab, data...)
			head, tail := slab[start:], []byte(nil)
			if cut := rapid.IntRange(1, size).Draw(t, "cut"); cut < size {
				head, tail = slab[start:start+cut], slices.Clone(data[cut:])
				if rapid.Bool().Draw(t, "touching") {
					tail = slab[start+cut:]
				}
			}
			if !b.Add(d, tos, uint64(len(want)), head, tail) {
				t.Fatal("full")
			}
			want = append(want, datagram{d.Endpoint(), tos, string(data)})
			all.add(1, uint64(size))
		}
		s.Send(b, &res)
		// Exactly what was not refused is on the wire, in the order it was added.
		var arrived []datagram
		var got Count
		for i, d := range want {
			if !lost[uint64(i)] {
				arrived = append(arrived, d)
				got.add(1, uint64(len(d.data)))
			}
		}
		if !slices.Equal(w.datagrams, arrived) {
			t.Fatalf("%d datagrams on the wire, want %d of %d", len(w.datagrams), len(arrived), len(want))
		}
		if res.Sent != got || total(&res) != all {
			t.Fatalf("%+v, want %+v sent of %+v", res, got, all)
		}
		for i, d := range want {
			if lost[uint64(i)] && k.dead[d.dst.String()] == 0 {
				t.Fatalf("segment %d to %v was refused for no reason", i, d.dst)
			}
		}
		if b.Len() != 0 {
			t.Fatalf("%d messages left", b.Len())
		}
	}
}

// Whatever the kernel answers, every segment is sent once or counted and named
// once, and order is kept.
func TestEverySegmentIsSentOrCountedOnce(t *testing.T) { rapid.Check(t, checkSend) }

func FuzzSend(f *testing.F) { f.Fuzz(rapid.MakeFuzz(checkSend)) }
