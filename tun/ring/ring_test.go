package ring

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// patience bounds what is waited for.
const patience = time.Minute

// pair are both ends of one lane, each with a mapping of its own as in two
// processes.
func pair(t *testing.T, from Side) (*Producer, *Consumer) {
	t.Helper()
	m, fd, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	other, err := Map(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Release(); other.Release() })
	out, _ := m.Ends(from)
	_, in := other.Ends(1 - from)
	return out, in
}

func send(p *Producer, b []byte) (sent, wake bool) {
	s, ok := p.Reserve(len(b))
	if !ok {
		return false, false
	}
	copy(s.Bytes, b)
	return true, p.Commit(s)
}

// pattern is a packet that says its number and length.
func pattern(i, n int) []byte {
	b := make([]byte, max(n, 8))
	binary.LittleEndian.PutUint32(b, uint32(i))
	binary.LittleEndian.PutUint32(b[4:], uint32(len(b)))
	for at := 8; at < len(b); at++ {
		b[at] = byte(i + at)
	}
	return b
}

func isPattern(b []byte) (i int, ok bool) {
	if len(b) < 8 || int(binary.LittleEndian.Uint32(b[4:])) != len(b) {
		return 0, false
	}
	i = int(binary.LittleEndian.Uint32(b))
	for at := 8; at < len(b); at++ {
		if b[at] != byte(i+at) {
			return i, false
		}
	}
	return i, true
}

// TestLaneIsAQueue compares a lane with a list of packets. It begins anywhere, so
// that numbers wrap.
func TestLaneIsAQueue(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		out, in := pair(t, Side(rapid.IntRange(0, 1).Draw(rt, "side")))
		in.number = rapid.SampledFrom([]uint32{0, 5, numbers - 1, numbers}).Draw(rt, "first")
		out.state.Store(uint64(reserved(in.number, 0, in.number)))
		in.Release()
		for i := range in.slots {
			in.slots[i].seq.Store(1 << 31) // used before
		}
		var queued, borrowed []int // lengths, and numbers
		next, read := 0, 0
		asleep := false
		for range rapid.IntRange(1, 600).Draw(rt, "steps") {
			switch rapid.IntRange(0, 5).Draw(rt, "step") {
			case 0, 1, 2:
				n := rapid.SampledFrom([]int{8, 60, 64, 1500, 40000, MaxPacket}).Draw(rt, "length")
				sent, wake := send(out, pattern(next, n))
				if !sent {
					held := 0
					for _, n := range append(queued, borrowed...) {
						held += int(blocksOf(uint32(n))) * blockLen
					}
					// What lies behind the last packet that fits is not used.
					if len(queued)+len(borrowed) < Slots && held+2*MaxPacket < int(out.blocks)*blockLen {
						rt.Fatalf("full with %d packets of %d bytes", len(queued)+len(borrowed), held)
					}
					continue
				}
				if wake != asleep {
					rt.Fatalf("asleep %v, but wake %v", asleep, wake)
				}
				asleep = false
				queued = append(queued, n)
				next++
			case 3, 4:
				b, ok, err := in.Next()
				if err != nil || ok != (len(queued) > 0) {
					rt.Fatalf("packet %v, error %v, with %d in the lane", ok, err, len(queued))
				}
				if !ok {
					if asleep = in.Sleep(); !asleep {
						rt.Fatal("there is nothing, but it does not sleep")
					}
					continue
				}
				if i, ok := isPattern(b); !ok || i != read || len(b) != queued[0] {
					rt.Fatalf("packet %d of %d bytes, expected %d of %d", i, len(b), read, queued[0])
				}
				borrowed, queued = append(borrowed, queued[0]), queued[1:]
				read++
			case 5:
				in.Release()
				borrowed = nil
			}
		}
	})
}

// TestProducersDoNotMixTheirPackets sends from several goroutines at once through
// a lane that is full most of the time.
func TestProducersDoNotMixTheirPackets(t *testing.T) {
	out, in := pair(t, Program)
	const producers, each = 4, 5000
	var wg sync.WaitGroup
	for p := range producers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(p)))
			for i := range each {
				b := pattern(p*each+i, 8+r.IntN(1<<r.IntN(16)))
				for {
					if sent, _ := send(out, b); sent {
						break
					}
					runtime.Gosched()
				}
			}
		})
	}
	var last [producers]int
	for range producers * each {
		b, ok, err := in.Next()
		for ; !ok && err == nil; b, ok, err = in.Next() {
			runtime.Gosched()
		}
		if err != nil {
			t.Fatal(err)
		}
		i, ok := isPattern(b)
		if !ok {
			t.Fatalf("packet %d is spoiled", i)
		}
		p := i / each
		if i%each != last[p] {
			t.Fatalf("producer %d: packet %d after %d", p, i%each, last[p]-1)
		}
		last[p]++
		in.Release()
	}
	wg.Wait()
}

// TestNobodySleepsThroughAPacket passes single packets to a consumer that goes to
// sleep each time, and commits them while it does; a wake-up that is lost is missed.
func TestNobodySleepsThroughAPacket(t *testing.T) {
	out, in := pair(t, Engine)
	bell := make(chan struct{}, 1)
	var drowsy atomic.Int64 // the packet that the consumer is about to sleep for, and one
	const packets = 100000
	go func() {
		for i := range packets {
			s, ok := out.Reserve(64)
			if !ok {
				t.Error("an empty lane has no room")
				return
			}
			copy(s.Bytes, pattern(i, 64))
			for tries := 0; drowsy.Load() <= int64(i); tries++ {
				if tries > 10000 {
					runtime.Gosched()
				}
			}
			if out.Commit(s) {
				bell <- struct{}{}
			}
		}
	}()
	r := rand.New(rand.NewPCG(5, 6))
	spun := 0
	defer func() { runtime.KeepAlive(spun) }()
	lost := time.NewTimer(patience)
	for got := 0; got < packets; {
		b, ok, err := in.Next()
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			if i, ok := isPattern(b); !ok || i != got {
				t.Fatalf("packet %d instead of %d", i, got)
			}
			got++
			in.Release()
			continue
		}
		drowsy.Store(int64(got + 1))
		for i := range r.IntN(1500) { // until the other side does its work
			spun ^= i
		}
		if in.Sleep() {
			lost.Reset(patience)
			select {
			case <-bell:
			case <-lost.C:
				t.Fatalf("nobody wakes the consumer; packet %d there: %v", got, in.ready())
			}
			in.Awake()
		}
	}
}

// TestLaneHoldsAsManyPacketsAsItHasSlots, and not one more over the first.
func TestLaneHoldsAsManyPacketsAsItHasSlots(t *testing.T) {
	out, in := pair(t, Program)
	for i := range Slots {
		if sent, _ := send(out, pattern(i, 64)); !sent {
			t.Fatalf("no room for packet %d", i)
		}
	}
	if sent, _ := send(out, pattern(Slots, 64)); sent {
		t.Error("there is no slot for one more")
	}
	for want := range Slots {
		b, ok, err := in.Next()
		if i, whole := isPattern(b); err != nil || !ok || !whole || i != want {
			t.Fatalf("packet %d instead of %d: there %v, whole %v, error %v", i, want, ok, whole, err)
		}
	}
}

// TestOldRestartIsForgotten: numbers come round, and one that marked a packet at the
// first block must not mean another one later.
func TestOldRestartIsForgotten(t *testing.T) {
	out, _ := pair(t, Program)
	const taken = 7
	_, next, ok := out.place(reserved(taken+50, 40, taken+100), taken, 30, 1)
	if !ok {
		t.Fatal("no room")
	}
	if _, _, restart := next.fields(); (restart-taken)&numbers <= Slots {
		t.Errorf("packet %d, which will be taken soon, counts as the one at block 0", restart)
	}
}

// TestNonsenseStaysInBounds writes anything to all that the other side can write
// to. Nothing may be read or written outside of the lane.
func TestNonsenseStaysInBounds(t *testing.T) {
	m, fd, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	defer m.Release()
	out, in := m.Ends(Engine)
	r := rand.New(rand.NewPCG(3, 4))
	odd := func() uint32 {
		edges := []uint32{0, 1, 63, 64, MaxPacket - 1, MaxPacket, MaxPacket + 1, in.blocks - 257, in.blocks - 1, in.blocks,
			out.blocks - 257, out.blocks - 1, out.blocks, ToProgram, 1 << 31, 1<<32 - 1, 1<<32 - 64}
		if r.IntN(4) == 0 {
			return r.Uint32()
		}
		return edges[r.IntN(len(edges))]
	}
	corrupt, packets, reserved := 0, 0, 0
	for range 200000 {
		s := &in.slots[in.number%Slots]
		s.length.Store(odd())
		s.at.Store(odd())
		s.seq.Store(in.number + uint32(r.IntN(3)))
		b, ok, err := in.Next()
		switch {
		case errors.Is(err, ErrCorrupt):
			corrupt++
		case err != nil:
			t.Fatal(err)
		case ok:
			packets++
			if len(b) == 0 || len(b) > MaxPacket {
				t.Fatalf("a packet of %d bytes", len(b))
			}
			b[0], b[len(b)-1] = 1, 1 // faults outside of the mapping
		}
		in.Release()

		out.consumed.Store(pack(odd(), odd()))
		if r.IntN(2) == 0 { // plausible counts get further
			number, _, _ := reservation(out.state.Load()).fields()
			out.consumed.Store(pack(number-uint32(r.IntN(Slots)), odd()))
		}
		if s, ok := out.Reserve(1 + r.IntN(MaxPacket)); ok {
			reserved++
			s.Bytes[0], s.Bytes[len(s.Bytes)-1] = 1, 1
			out.Commit(s)
		}
	}
	if corrupt == 0 || packets == 0 || reserved == 0 {
		t.Errorf("%d corrupt, %d packets, %d reserved: the test tests too little", corrupt, packets, reserved)
	}
}

func TestMemoryCannotBeTakenAway(t *testing.T) {
	m, fd, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	defer m.Release()
	for _, size := range []int64{0, 4096, 2 * Size} {
		if err := unix.Ftruncate(fd, size); !errors.Is(err, unix.EPERM) {
			t.Errorf("resized to %d bytes: %v", size, err)
		}
	}
	loose, err := unix.MemfdCreate("loose", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(loose)
	if err := unix.Ftruncate(loose, Size); err != nil {
		t.Fatal(err)
	}
	if m, err := Map(loose); err == nil {
		m.Release()
		t.Error("memory that can shrink was mapped")
	}
}

func TestTooLongAndEmptyPacketsAreRefused(t *testing.T) {
	out, in := pair(t, Program)
	for _, n := range []int{-1, 0, MaxPacket + 1, ToEngine} {
		if _, ok := out.Reserve(n); ok {
			t.Errorf("%d bytes", n)
		}
	}
	if _, ok, err := in.Next(); ok || err != nil {
		t.Errorf("packet %v, error %v", ok, err)
	}
}
