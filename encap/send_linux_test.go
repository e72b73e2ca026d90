package encap

import (
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRunsAreBuiltByTheRules(t *testing.T) {
	a, b := NewDest(destA), NewDest(destB)
	for name, c := range map[string]struct {
		segs []seg
		want []int // segments of each message
	}{
		"one":                       {[]seg{{a, 0, 100, 0}}, []int{1}},
		"equal":                     {repeat(5, seg{a, 0, 100, 0}), []int{5}},
		"shorter last closes":       {[]seg{{a, 0, 100, 0}, {a, 0, 100, 0}, {a, 0, 99, 0}, {a, 0, 99, 0}, {a, 0, 100, 0}}, []int{3, 1, 1}},
		"longer starts a run":       {[]seg{{a, 0, 100, 0}, {a, 0, 101, 0}, {a, 0, 101, 0}}, []int{1, 2}},
		"another destination":       {[]seg{{a, 0, 100, 0}, {b, 0, 100, 0}, {a, 0, 100, 0}}, []int{1, 1, 1}},
		"another type of service":   {[]seg{{a, 0, 100, 0}, {a, 1, 100, 0}, {a, 1, 100, 0}, {a, 0, 100, 0}}, []int{1, 2, 1}},
		"64 segments":               {repeat(130, seg{a, 0, 100, 0}), []int{64, 64, 2}},
		"65507 bytes":               {repeat(45, seg{a, 0, 1472, 22}), []int{44, 1}},
		"65507 bytes, shorter last": {append(repeat(44, seg{a, 0, 1472, 22}), seg{a, 0, 739, 0}), []int{45}},
		"one byte too many":         {append(repeat(44, seg{a, 0, 1472, 22}), seg{a, 0, 740, 0}), []int{44, 1}},
		"two of the largest":        {repeat(2, seg{a, 0, 65507, 22}), []int{1, 1}},
		"gathered super-packet":     {repeat(46, seg{a, 2, 1400, 62}), []int{46}},
	} {
		w, s := newWire(t)
		batch := NewSendBatch()
		batch.Reset(s)
		want := load(t, batch, c.segs...)
		if batch.Len() != len(c.want) {
			t.Errorf("%s: Len %d, want %d", name, batch.Len(), len(c.want))
		}
		var res SendResult
		s.Send(batch, &res)
		var got []int
		for _, m := range w.tried {
			got = append(got, len(m.datagrams))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: messages of %v segments, want %v", name, got, c.want)
		}
		if !slices.Equal(w.datagrams, want) {
			t.Errorf("%s: the datagrams are not those that were added", name)
		}
		if res.Sent.Segments != uint64(len(want)) || total(&res) != res.Sent || w.calls != 1 || batch.Len() != 0 {
			t.Errorf("%s: %+v in %d calls, %d left", name, res, w.calls, batch.Len())
		}
	}
}

// Packets read one behind the other into one buffer, with exactly the prefix
// between them, leave as one piece.
func TestAdjacentPiecesBecomeOne(t *testing.T) {
	w, s := newWire(t)
	b, d := NewSendBatch(), NewDest(destA)
	b.Reset(s)
	slab := make([]byte, 10*100)
	for i := range slab {
		slab[i] = byte(i % 251)
	}
	for i := range 10 {
		p := slab[i*100 : (i+1)*100]
		if !b.Add(d, 0, 0, p[:40], p[40:]) {
			t.Fatal("full")
		}
	}
	s.Send(b, new(SendResult))
	if m := w.tried[0]; len(w.tried) != 1 || m.pieces != 1 || string(m.data) != string(slab) {
		t.Errorf("%d messages, the first of %d pieces", len(w.tried), m.pieces)
	}
	// The last piece of one message and the first of the next stay apart.
	e := NewDest(destB)
	b.Add(d, 0, 0, slab[:100], nil)
	b.Add(e, 0, 0, slab[100:200], nil)
	w.tried = nil
	s.Send(b, new(SendResult))
	if len(w.tried) != 2 || len(w.tried[0].data) != 100 || len(w.tried[1].data) != 100 {
		t.Errorf("%+v", w.tried)
	}
}

func TestWithoutSegmentationEverySegmentIsAMessage(t *testing.T) {
	w, s := newWire(t)
	s.gso.Store(false)
	b, d := NewSendBatch(), NewDest(destA)
	b.Reset(s)
	want := load(t, b, repeat(20, seg{d, 1, 100, 10})...)
	s.Send(b, new(SendResult))
	if len(w.tried) != 20 || !slices.Equal(w.datagrams, want) {
		t.Errorf("%d messages", len(w.tried))
	}
	for _, m := range w.tried {
		if m.segLen != 0 {
			t.Fatalf("UDP_SEGMENT %d", m.segLen)
		}
	}
}

func TestFullBatchTakesNothingMore(t *testing.T) {
	d := NewDest(destA)
	for name, c := range map[string]struct {
		s   seg
		gso bool
		max int
	}{
		"messages": {seg{d, 0, 100, 0}, false, maxMessages},
		"pieces":   {seg{d, 0, 100, 50}, true, maxPieces / 2},
		"segments": {seg{d, 0, 2, 0}, true, maxBatch},
	} {
		w, s := newWire(t)
		s.gso.Store(c.gso)
		b := NewSendBatch()
		b.Reset(s)
		var want []datagram
		slab := make([]byte, 1<<20) // adjacent, so that pieces are few
		n := 0
		for ; n < 5000; n++ {
			data := slab[n*c.s.size : (n+1)*c.s.size]
			copy(data, c.s.bytes(n))
			head, tail := data, []byte(nil)
			if c.s.head > 0 {
				head, tail = slices.Clone(data[:c.s.head]), data[c.s.head:]
			}
			if !b.Add(d, 0, uint64(n), head, tail) {
				break
			}
			want = append(want, datagram{destA, 0, string(data)})
		}
		if n < c.max-1 || n > c.max {
			t.Errorf("%s: full after %d, want %d", name, n, c.max)
		}
		var res SendResult
		s.Send(b, &res)
		if res.Sent.Segments != uint64(n) || !slices.Equal(w.datagrams, want) {
			t.Errorf("%s: %d of %d sent", name, res.Sent.Segments, n)
		}
		if !b.Add(d, 0, 0, slab[:1], nil) {
			t.Errorf("%s: still full after Send", name)
		}
	}
}

// mixed is a batch of five messages: segmented to A, single to B, segmented to
// A again, single to B, segmented to B.
func mixed(a, b *Dest) []seg {
	return slices.Concat(
		repeat(3, seg{a, 0, 100, 30}), []seg{{a, 0, 50, 0}}, []seg{{b, 2, 70, 22}},
		repeat(2, seg{a, 0, 80, 0}), []seg{{b, 0, 60, 0}}, repeat(3, seg{b, 1, 90, 22}))
}

func TestPartialSendsAreResumed(t *testing.T) {
	for limit := 1; limit <= 5; limit++ {
		for _, interrupt := range []bool{false, true} {
			w, s := newWire(t)
			w.limit, w.interrupt = limit, interrupt
			batch := NewSendBatch()
			batch.Reset(s)
			want := load(t, batch, mixed(NewDest(destA), NewDest(destB))...)
			var res SendResult
			s.Send(batch, &res)
			if !slices.Equal(w.datagrams, want) || res.Sent.Segments != uint64(len(want)) || total(&res) != res.Sent {
				t.Errorf("%d messages a call, interrupted %v: %+v", limit, interrupt, res)
			}
		}
	}
}

// A dead peer costs its own packets only, in place, and under the right name.
func TestRefusedMessageIsSkippedAndCounted(t *testing.T) {
	for e, class := range map[syscall.Errno]SendError{
		unix.EPERM: SendRefused, unix.EACCES: SendRefused,
		unix.ENETUNREACH: SendUnreachable, unix.EHOSTUNREACH: SendUnreachable, unix.ENETDOWN: SendUnreachable,
		unix.EHOSTDOWN: SendUnreachable, unix.EADDRNOTAVAIL: SendUnreachable,
		unix.ENOBUFS: SendNoBuffer, unix.EAGAIN: SendNoBuffer, unix.ENOMEM: SendNoBuffer,
		unix.EBADF: SendOther, unix.EPIPE: SendOther,
	} {
		w, s := newWire(t)
		w.answer = func(m *sent) syscall.Errno {
			if m.dst == destB {
				return e
			}
			return 0
		}
		batch := NewSendBatch()
		batch.Reset(s)
		a, b := NewDest(destA), NewDest(destB)
		want := load(t, batch, mixed(a, b)...)
		lost := Count{}
		var lostTags []uint64
		want = slices.DeleteFunc(want, func(d datagram) bool { return d.dst == destB })
		for i, m := range mixed(a, b) {
			if m.dst == b {
				lost.add(1, uint64(m.size))
				lostTags = append(lostTags, uint64(i))
			}
		}
		var tags []uint64
		res := SendResult{Refused: func(tag uint64, c SendError) {
			tags = append(tags, tag)
			if c != class {
				t.Errorf("%v: tag %d refused as %d, want %d", e, tag, c, class)
			}
		}}
		s.Send(batch, &res)
		if !slices.Equal(w.datagrams, want) {
			t.Errorf("%v: the other destination's datagrams changed", e)
		}
		if res.Failed[class] != lost || total(&res).Segments != uint64(len(mixed(a, b))) || !slices.Equal(tags, lostTags) {
			t.Errorf("%v: %+v, want %+v failed; tags %v, want %v", e, res, lost, tags, lostTags)
		}
		if gso, _ := s.Offloads(); !gso || !b.Segmented() {
			t.Errorf("%v: segmentation given up", e)
		}
	}
}

// refuseSegmented answers e to segmented messages, as an egress without
// checksum offload does.
func refuseSegmented(e syscall.Errno) func(m *sent) syscall.Errno {
	return func(m *sent) syscall.Errno {
		if m.segLen > 0 {
			return e
		}
		return 0
	}
}

func TestSegmentationIsGivenUpAndReplayed(t *testing.T) {
	for _, e := range []syscall.Errno{unix.EIO, unix.EINVAL} {
		for _, interrupt := range []bool{false, true} {
			w, s := newWire(t)
			w.answer, w.interrupt = refuseSegmented(e), interrupt
			a, b := NewDest(destA), NewDest(destB)
			batch := NewSendBatch()
			batch.Reset(s)
			want := load(t, batch, mixed(a, b)...)
			res := SendResult{Refused: func(tag uint64, _ SendError) { t.Errorf("%v: tag %d refused", e, tag) }}
			s.Send(batch, &res)
			if !slices.Equal(w.datagrams, want) {
				t.Errorf("%v: replayed datagrams differ:\n have %.300v\n want %.300v", e, w.datagrams, want)
			}
			if res.Sent.Segments != uint64(len(want)) || total(&res) != res.Sent {
				t.Errorf("%v: %+v", e, res)
			}
			if gso, _ := s.Offloads(); gso || !a.Segmented() {
				t.Errorf("%v: socket segments: %v, destination: %v", e, gso, a.Segmented())
			}
			// From the next batch on nothing is segmented.
			w.tried = nil
			load(t, batch, repeat(3, seg{a, 0, 100, 0})...)
			if s.Send(batch, &res); len(w.tried) != 3 {
				t.Errorf("%v: %d messages in the next batch", e, len(w.tried))
			}
		}
	}
}

// What made the kernel refuse may have passed; if not, it is noticed again.
func TestSegmentationIsTriedAgainWhenTold(t *testing.T) {
	w, s := newWire(t)
	d := NewDest(destA)
	batch := NewSendBatch()
	send := func() {
		t.Helper()
		batch.Reset(s)
		w.datagrams = nil
		want := load(t, batch, repeat(3, seg{d, 0, 100, 0})...)
		var res SendResult
		if s.Send(batch, &res); !slices.Equal(w.datagrams, want) || res.Sent.Segments != 3 {
			t.Errorf("have %.300v\nwant %.300v", w.datagrams, want)
		}
	}
	if s.RetrySegmentation() || d.RetrySegmentation() {
		t.Error("nothing was given up")
	}
	for _, e := range []syscall.Errno{unix.EIO, unix.EMSGSIZE, unix.EIO} {
		w.answer = refuseSegmented(e)
		send()
		if gso, _ := s.Offloads(); gso && d.Segmented() {
			t.Errorf("%v: not given up", e)
		}
		if s.RetrySegmentation() == d.RetrySegmentation() {
			t.Errorf("%v: either the socket or the destination had given up", e)
		}
	}
	w.answer, w.tried = nil, nil
	if send(); len(w.tried) != 1 {
		t.Errorf("%d messages for three segments", len(w.tried))
	}
}

// Only the messages not yet sent are replayed when segmentation fails midway.
func TestWhatWasSentIsNotReplayed(t *testing.T) {
	w, s := newWire(t)
	w.answer = func(m *sent) syscall.Errno {
		if m.segLen > 0 && m.dst == destB {
			return unix.EIO
		}
		return 0
	}
	batch := NewSendBatch()
	batch.Reset(s)
	want := load(t, batch, mixed(NewDest(destA), NewDest(destB))...)
	s.Send(batch, new(SendResult))
	if !slices.Equal(w.datagrams, want) {
		t.Errorf("have %.300v\nwant %.300v", w.datagrams, want)
	}
}

// EINVAL is also the answer to a destination that no packet can go to, such as
// 0.0.0.9. A lease must not be able to slow down everybody else.
func TestDestinationThatTakesNothingLeavesSegmentationOn(t *testing.T) {
	for _, e := range []syscall.Errno{unix.EINVAL, unix.EIO} {
		w, s := newWire(t)
		w.answer = func(m *sent) syscall.Errno {
			if m.dst == destB {
				return e
			}
			return 0
		}
		a, b := NewDest(destA), NewDest(destB)
		batch := NewSendBatch()
		batch.Reset(s)
		load(t, batch, append(repeat(3, seg{b, 0, 100, 0}), repeat(3, seg{a, 0, 100, 0})...)...)
		var res SendResult
		s.Send(batch, &res)
		if gso, _ := s.Offloads(); !gso {
			t.Errorf("%v: segmentation given up although single datagrams fail as well", e)
		}
		if res.Sent.Segments != 3 || res.Failed[SendOther] != (Count{3, 300}) {
			t.Errorf("%v: %+v", e, res)
		}
	}
}

// EMSGSIZE means the way to one destination is narrow: its datagrams go singly
// and are fragmented by the kernel; the others keep their runs.
func TestNarrowPathMarksItsDestinationOnly(t *testing.T) {
	w, s := newWire(t)
	w.answer = func(m *sent) syscall.Errno {
		if m.segLen > 0 && m.dst == destB {
			return unix.EMSGSIZE
		}
		return 0
	}
	a, b := NewDest(destA), NewDest(destB)
	batch := NewSendBatch()
	batch.Reset(s)
	want := load(t, batch, mixed(a, b)...)
	var res SendResult
	s.Send(batch, &res)
	if !slices.Equal(w.datagrams, want) || res.Sent.Segments != uint64(len(want)) {
		t.Errorf("%+v", res)
	}
	if gso, _ := s.Offloads(); !gso || !a.Segmented() || b.Segmented() {
		t.Errorf("socket segments: %v, A: %v, B: %v", gso, a.Segmented(), b.Segmented())
	}
	w.tried = nil
	load(t, batch, append(repeat(3, seg{b, 0, 100, 0}), repeat(3, seg{a, 0, 100, 0})...)...)
	if s.Send(batch, &res); len(w.tried) != 4 {
		t.Errorf("%d messages, want 3 single and 1 segmented", len(w.tried))
	}
}

// A single datagram that is too big is counted so.
func TestSingleDatagramTooBig(t *testing.T) {
	w, s := newWire(t)
	w.answer = func(m *sent) syscall.Errno { return unix.EMSGSIZE }
	d := NewDest(destA)
	batch := NewSendBatch()
	batch.Reset(s)
	load(t, batch, append(repeat(3, seg{d, 0, 100, 30}), seg{d, 3, 5, 0}, seg{d, 0, 400, 0})...)
	var tags []uint64
	res := SendResult{Refused: func(tag uint64, c SendError) { tags = append(tags, tag) }}
	s.Send(batch, &res)
	if res.Failed[SendTooBig] != (Count{5, 705}) || res.Sent != (Count{}) || !slices.Equal(tags, []uint64{0, 1, 2, 3, 4}) {
		t.Errorf("%+v, tags %v", res, tags)
	}
}

// The type of service stands behind UDP_SEGMENT in the control data and must
// survive the replay without it.
func TestReplayKeepsTheTypeOfService(t *testing.T) {
	w, s := newWire(t)
	w.answer = refuseSegmented(unix.EIO)
	batch := NewSendBatch()
	batch.Reset(s)
	d := NewDest(destA)
	want := load(t, batch, append(repeat(3, seg{d, 2, 100, 30}), repeat(3, seg{d, 0, 100, 30})...)...)
	s.Send(batch, new(SendResult))
	if !slices.Equal(w.datagrams, want) {
		t.Errorf("have %.300v\nwant %.300v", w.datagrams, want)
	}
}

// A call that claims success without a message must not hang the worker.
func TestZeroMessagesSentIsAnError(t *testing.T) {
	s := &Socket{fd: -1, sendmmsg: func(int, []mmsghdr) (int, syscall.Errno) { return 0, 0 }}
	batch := NewSendBatch()
	batch.Reset(s)
	load(t, batch, repeat(2, seg{NewDest(destA), 0, 10, 0})...)
	var res SendResult
	if s.Send(batch, &res); res.Failed[SendOther] != (Count{2, 20}) {
		t.Errorf("%+v", res)
	}
}

func TestSendAllocatesNothing(t *testing.T) {
	for _, gso := range []bool{true, false} {
		for _, e := range []syscall.Errno{0, unix.EPERM, unix.EIO} {
			s := &Socket{fd: -1, sendmmsg: func(_ int, m []mmsghdr) (int, syscall.Errno) { return len(m), 0 }}
			if e != 0 {
				s.sendmmsg = func(_ int, m []mmsghdr) (int, syscall.Errno) { return -1, e }
			}
			b, d := NewSendBatch(), NewDest(destA)
			head, tail := make([]byte, 62), make([]byte, 1400)
			var res SendResult
			if n := testing.AllocsPerRun(20, func() {
				s.gso.Store(gso)
				b.Reset(s)
				for i := range 64 {
					b.Add(d, uint8(i/32), 0, head, tail)
				}
				s.Send(b, &res)
			}); n != 0 {
				t.Errorf("segmentation %v, error %v: %v allocations a batch", gso, e, n)
			}
		}
	}
}
