package tap

import (
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
)

const reason = 7

func ring(t testing.TB, points Points, snap, size int) *Ring {
	t.Helper()
	s, err := NewSet(1, points, snap, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Free)
	return s.Ring(0)
}

// take reads everything there is, with the data copied.
func take(r *Ring) []Record {
	var out []Record
	var rec Record
	for r.Next(&rec) {
		rec.Data = slices.Clone(rec.Data)
		out = append(out, rec)
		r.Release()
	}
	return out
}

func TestRecordsComeOutAsTheyWerePut(t *testing.T) {
	r := ring(t, AllPoints, 100, 0)
	h := Header{Time: 5, ID: 9, Points: Of(TunIn, WireOut), Flags: TTLLowered, PrefixLen: 22, ECN: 2, Segments: 1,
		Peer: 0x0a000001, PeerPort: 8472, Local: 0x0a000002, LocalPort: 1234}
	head, tail := make([]byte, 60), make([]byte, 50)
	for i := range head {
		head[i] = byte(i)
	}
	tail[39], tail[40] = 0xaa, 0xbb
	r.Put(&h, head, tail)
	if got := take(r); len(got) != 0 {
		t.Fatalf("%d records before Commit", len(got))
	}
	r.Commit()
	got := take(r)
	if len(got) != 1 {
		t.Fatalf("%d records, want 1", len(got))
	}
	want := h
	want.Length = 110
	if got[0].Header != want {
		t.Errorf("header\n have %+v\n want %+v", got[0].Header, want)
	}
	if d := got[0].Data; len(d) != 100 || !slices.Equal(d[:60], head) || d[99] != 0xaa {
		t.Errorf("data % x", d)
	}
}

func TestOnlyWantedPointsAreKept(t *testing.T) {
	r := ring(t, Of(TunIn, Drop), 64, 0)
	r.Put(&Header{ID: 1, Points: Of(TunIn, WireOut)}, []byte{1}, nil)
	r.Put(&Header{ID: 2, Points: Of(WireIn)}, []byte{2}, nil)
	r.Put(&Header{ID: 3, Points: Of(WireIn, Drop)}, []byte{3}, nil)
	r.Commit()
	got := take(r)
	if len(got) != 2 || got[0].ID != 1 || got[0].Points != Of(TunIn) || got[1].ID != 3 || got[1].Points != Of(Drop) {
		t.Errorf("%+v", got)
	}
}

func TestFailTurnsARecordIntoADrop(t *testing.T) {
	for _, c := range []struct {
		name         string
		points, want Points
	}{
		{"all points wanted", AllPoints, Of(TunIn, Drop)},
		{"drops not wanted", Of(TunIn, WireOut), Of(TunIn)},
		{"the point not wanted", Of(TunIn, Drop), Of(TunIn, Drop)},
		{"only drops wanted", Of(Drop), Of(Drop)},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := ring(t, c.points, 64, 0)
			for id := uint64(1); id <= 3; id++ {
				r.Put(&Header{ID: id, Points: Of(TunIn, WireOut)}, []byte{byte(id)}, nil)
			}
			r.Fail(2, 0, WireOut, reason, 1)
			r.Commit()
			found := false
			for _, rec := range take(r) {
				switch {
				case rec.ID == 2:
					found = rec.Points == c.want && (rec.Reason == reason) && rec.Data[0] == 2
				case rec.Points != Of(TunIn, WireOut)&c.points:
					t.Errorf("record %d: points %b", rec.ID, rec.Points)
				}
			}
			if !found {
				t.Error("the failed record is missing or wrong")
			}
			if n := r.Lost(Drop, false); n != 0 {
				t.Errorf("%d lost", n)
			}
		})
	}
}

func TestRecordsOnlyADropWouldNeedTakeNoSpace(t *testing.T) {
	r := ring(t, Of(Drop), 1500, 0)
	p := make([]byte, 1500)
	for id := range uint64(1000) { // more than the ring holds
		r.Put(&Header{ID: id + 1, Points: Of(TunIn, WireOut)}, p, nil)
		r.Commit()
	}
	r.Put(&Header{ID: 5000, Points: Of(TunIn, Drop)}, p, nil)
	r.Commit()
	if got := take(r); len(got) != 1 || got[0].ID != 5000 || r.Lost(Drop, false) != 0 {
		t.Errorf("%d records, %d lost", len(got), r.Lost(Drop, false))
	}
}

func TestFailOfALostRecordMovesTheLoss(t *testing.T) {
	r := ring(t, AllPoints, 1500, 0)
	p := make([]byte, 1500)
	id := uint64(0)
	for r.Lost(TunIn, false) == 0 {
		id++
		r.Put(&Header{ID: id, Points: Of(TunIn, WireOut), Segments: 3}, p, nil)
	}
	r.Fail(id, 0, WireOut, reason, 3)
	r.Commit()
	if r.Lost(TunIn, false) != 3 || r.Lost(WireOut, false) != 0 || r.Lost(Drop, false) != 3 {
		t.Errorf("lost: tun-in %d, wire-out %d, drop %d; want 3, 0, 3", r.Lost(TunIn, false), r.Lost(WireOut, false), r.Lost(Drop, false))
	}
}

// TestWhatIsPutIsReadOrCountedAsLost plays at random and compares with the sum
// of everything put, for every point.
func TestWhatIsPutIsReadOrCountedAsLost(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		points := Points(rnd.IntN(int(AllPoints)) + 1)
		r := ring(t, points, 16+rnd.IntN(3000), 0)
		var put, got [NumPoints]uint64
		id := uint64(0)
		buf := make([]byte, 3000)
		count := func(sum *[NumPoints]uint64, ps Points, n uint64) {
			for p := range NumPoints {
				if ps.Has(p) {
					sum[p] += n
				}
			}
		}
		read := func(limit int) {
			var rec Record
			for range limit {
				if !r.Next(&rec) {
					return
				}
				if id := binary.LittleEndian.Uint64(rec.Data); id != rec.ID {
					t.Fatalf("seed %d: data of record %d in record %d", seed, id, rec.ID)
				}
				count(&got, rec.Points, uint64(max(rec.Segments, 1)))
				r.Release()
			}
		}
		for range 300 {
			type sent struct{ id, n uint64 }
			var batch []sent
			for range rnd.IntN(20) {
				id++
				n := uint64(rnd.IntN(5))
				ps := [...]Points{Of(TunIn, WireOut), Of(TunIn, Drop), Of(WireIn, TunOut), Of(WireIn, Drop)}[rnd.IntN(4)]
				binary.LittleEndian.PutUint64(buf, id)
				r.Put(&Header{ID: id, Points: ps, Segments: uint16(n)}, buf[:8+rnd.IntN(2900)], nil)
				n = max(n, 1)
				count(&put, ps&points, n)
				if ps == Of(TunIn, WireOut) {
					batch = append(batch, sent{id, n})
				}
			}
			for _, s := range batch {
				if rnd.IntN(3) == 0 {
					r.Fail(s.id, 0, WireOut, reason, s.n)
					count(&put, Of(WireOut)&points, -s.n)
					count(&put, Of(Drop)&points, s.n)
				}
			}
			r.Commit()
			read(rnd.IntN(15))
		}
		read(1 << 30)
		for p := range NumPoints {
			if got[p]+r.Lost(p, false) != put[p] {
				t.Fatalf("seed %d: %s: %d read + %d lost, %d put", seed, p, got[p], r.Lost(p, false), put[p])
			}
		}
	}
}

func TestReaderAndWriterAtTheSameTime(t *testing.T) {
	r := ring(t, AllPoints, 2000, 0)
	const total = 200_000
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		rnd := rand.New(rand.NewPCG(1, 2))
		buf := make([]byte, 2000)
		for id := uint64(1); id <= total; id++ {
			binary.LittleEndian.PutUint64(buf, id)
			r.Put(&Header{ID: id, Points: Of(WireIn, TunOut)}, buf[:8+rnd.IntN(1900)], nil)
			if id%16 == 0 {
				r.Commit()
			}
			if id%1024 == 0 {
				runtime.Gosched()
			}
		}
		r.Commit()
	})
	var rec Record
	var last, n uint64
	for open := true; open; {
		select {
		case <-done:
			open = false
		default:
			runtime.Gosched()
		}
		for r.Next(&rec) {
			if rec.ID <= last || binary.LittleEndian.Uint64(rec.Data) != rec.ID {
				t.Fatalf("record %d after %d", rec.ID, last)
			}
			last = rec.ID
			n++
			r.Release()
		}
	}
	wg.Wait()
	if n+r.Lost(WireIn, false) != total || n+r.Lost(TunOut, false) != total {
		t.Errorf("%d read + %d lost, %d put", n, r.Lost(WireIn, false), total)
	}
}

func TestPutDoesNotAllocate(t *testing.T) {
	r := ring(t, AllPoints, 128, 1<<20)
	p := make([]byte, 1400)
	var rec Record
	n := testing.AllocsPerRun(1000, func() {
		h := Header{ID: 1, Points: Of(TunIn, WireOut)}
		r.Put(&h, p, nil)
		r.Commit()
		r.Next(&rec)
		r.Release()
	})
	if n != 0 {
		t.Errorf("%v allocations a record", n)
	}
}

func TestPointNames(t *testing.T) {
	for p := range NumPoints {
		if q, err := ParsePoint(p.String()); err != nil || q != p {
			t.Errorf("%s: %v, %v", p, q, err)
		}
	}
	if _, err := ParsePoint("tun"); err == nil {
		t.Error("tun: no error")
	}
}

func BenchmarkPut(b *testing.B) {
	r := ring(b, AllPoints, 128, 1<<20)
	p := make([]byte, 1400)
	var rec Record
	b.ReportAllocs()
	for b.Loop() {
		h := Header{ID: 1, Points: Of(TunIn, WireOut)}
		r.Put(&h, p, nil)
		r.Commit()
		r.Next(&rec)
		r.Release()
	}
}
