package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tweed/capture/filter"
	"tweed/engine"
	"tweed/engine/tap"
	"tweed/tun/tuntest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// source is an engine of two workers that carry made-up packets.
type source struct {
	set     atomic.Pointer[tap.Set]
	workers [2]sync.Mutex // held for a batch
	id      uint64
}

func (s *source) TapWorkers() int { return len(s.workers) }

func (s *source) SetTap(set *tap.Set) {
	s.set.Store(set)
	for i := range s.workers {
		s.settle(i)
	}
}

// settle waits for the batch a worker may be in.
func (s *source) settle(worker int) {
	s.workers[worker].Lock()
	defer s.workers[worker].Unlock()
}

var testPacket = tuntest.Packet{Proto: tuntest.UDP, SrcPort: 1, DstPort: 53, Payload: []byte("12345678")}

// batch carries n packets through a worker and reports what the taps were shown.
func (s *source) batch(worker, n int, points tap.Points, data []byte) Counts {
	s.workers[worker].Lock()
	defer s.workers[worker].Unlock()
	var shown Counts
	set := s.set.Load()
	if set == nil {
		return shown
	}
	r := set.Ring(worker)
	now := time.Now().UnixNano()
	for i := range n {
		h := tap.Header{Time: now + int64(i), ID: uint64(worker)<<56 | atomic.AddUint64(&s.id, 1), Points: points, Segments: 1,
			Reason: uint8(engine.TxNoRoute), Peer: there, PeerPort: 8285, Local: here, LocalPort: 8285}
		r.Put(&h, data, nil)
		for p := range tap.NumPoints {
			if (points & set.Points).Has(p) {
				shown[p]++
			}
		}
	}
	r.Commit()
	return shown
}

// drain reads the stream of a closed session and counts its packets by point.
func drain(t testing.TB, s *Session) (Counts, []Packet) {
	t.Helper()
	var b []byte
	hello, err := AppendHello(nil, Hello{Node: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, hello...)
	for {
		frames, err := s.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if frames == nil {
			break
		}
		b = append(b, frames...)
	}
	if b, err = AppendStats(b, s.Stats(), true); err != nil {
		t.Fatal(err)
	}
	r, h, err := NewReader(bytes.NewReader(b))
	if err != nil || h.Node != "n1" {
		t.Fatal(h, err)
	}
	var n Counts
	var all []Packet
	var p Packet
	for {
		if err = r.Next(&p); err != nil {
			break
		}
		n[p.Point]++
		p.Data = bytes.Clone(p.Data)
		all = append(all, p)
	}
	if err != io.EOF || !r.Complete || r.Stats != s.Stats() {
		t.Errorf("end of stream: %v, complete %v", err, r.Complete)
	}
	return n, all
}

func start(t testing.TB, h *Hub, c Config) *Session {
	t.Helper()
	s, err := h.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func compile(t testing.TB, text string) *filter.Program {
	t.Helper()
	p, err := filter.Compile(text, filter.Options{Points: PointNames(), Reasons: ReasonNames()})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestSessionsGetWhatTheyAskedFor(t *testing.T) {
	src, h := &source{}, &Hub{}
	h.SetSource(src)
	inner := start(t, h, Config{Points: tap.Of(tap.TunIn, tap.TunOut), Snap: 30})
	all := start(t, h, Config{Points: tap.AllPoints})
	dns := start(t, h, Config{Points: tap.AllPoints, Snap: 40, Filters: []*filter.Program{compile(t, "inner udp port 53"), compile(t, "dir out")}})
	drops := start(t, h, Config{Points: tap.AllPoints, Filters: []*filter.Program{compile(t, "reason no-route")}})
	data := testPacket.Bytes()
	src.batch(0, 10, tap.Of(tap.TunIn, tap.WireOut), data)
	src.batch(1, 3, tap.Of(tap.TunIn, tap.Drop), data)
	for _, s := range []*Session{inner, all, dns, drops} {
		s.Close()
		s.Close() // does no harm
	}
	if h.Sessions() != 0 {
		t.Errorf("%d sessions", h.Sessions())
	}
	n, pkts := drain(t, inner)
	if n != (Counts{tap.TunIn: 13}) || inner.Stats().Seen != n || len(pkts[0].Data) != 30 || pkts[0].Length != len(data) {
		t.Errorf("inner: %v, %+v", n, pkts[0])
	}
	if n, pkts = drain(t, all); n != (Counts{tap.TunIn: 13, tap.WireOut: 10, tap.Drop: 3}) {
		t.Errorf("all: %v", n)
	}
	ids := map[uint64]int{}
	for _, p := range pkts {
		ids[p.ID]++
		if p.Peer != netip.MustParseAddrPort("192.0.2.2:8285") {
			t.Fatalf("peer %v", p.Peer)
		}
	}
	for id, k := range ids {
		if k != 2 {
			t.Errorf("id %d on %d records, want 2", id, k)
		}
	}
	if n, pkts = drain(t, dns); n != (Counts{tap.TunIn: 13, tap.WireOut: 10, tap.Drop: 3}) || len(pkts[0].Data) > 40 {
		t.Errorf("dns: %v", n)
	}
	if n, _ = drain(t, drops); n != (Counts{tap.Drop: 3}) || drops.Stats().Seen.Total() != 26 {
		t.Errorf("drops: %v, %+v", n, drops.Stats())
	}
}

func TestASlowReaderLosesIntoACounter(t *testing.T) {
	src, h := &source{}, &Hub{}
	h.SetSource(src)
	s := start(t, h, Config{Points: tap.Of(tap.TunIn)})
	data := make([]byte, 60000)
	copy(data, testPacket.Bytes())
	var sent uint64
	for s.Stats().Overrun[tap.TunIn] < 10 {
		shown := src.batch(0, 50, tap.Of(tap.TunIn), data)
		sent += shown[tap.TunIn]
		time.Sleep(time.Millisecond) // lets the ring drain
	}
	s.Close()
	st := s.Stats()
	n, pkts := drain(t, s)
	if st.Seen[tap.TunIn]+st.Lost[tap.TunIn] != sent {
		t.Errorf("%d seen + %d lost, %d sent", st.Seen[tap.TunIn], st.Lost[tap.TunIn], sent)
	}
	if n[tap.TunIn]+st.Overrun[tap.TunIn] != st.Matched[tap.TunIn] || st.Overrun[tap.TunIn] == 0 {
		t.Errorf("%d read + %d overrun, %d matched", n[tap.TunIn], st.Overrun[tap.TunIn], st.Matched[tap.TunIn])
	}
	var told uint64
	for _, p := range pkts {
		told += p.Lost
	}
	if told > st.Lost[tap.TunIn]+st.Overrun[tap.TunIn] {
		t.Errorf("%d told of with packets, lost %d", told, st.Lost[tap.TunIn]+st.Overrun[tap.TunIn])
	}
}

// TestSessionsComeAndGoUnderLoad attaches and detaches 1000 times while two
// workers carry packets. A session that stays has to account for all of them.
func TestSessionsComeAndGoUnderLoad(t *testing.T) {
	src, h := &source{}, &Hub{}
	h.SetSource(src)
	stay := start(t, h, Config{Points: tap.AllPoints, Snap: 64})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var sent [2]Counts
	data := testPacket.Bytes()
	for w := range sent {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				// What is carried while the sets are exchanged is shown to nobody,
				// and batch counts only what was shown.
				n := src.batch(w, 32, tap.Of(tap.TunIn, tap.WireOut), data)
				for p := range n {
					sent[w][p] += n[p]
				}
				// More than this only makes the test longer.
				time.Sleep(200 * time.Microsecond)
			}
		})
	}
	var got Counts
	read := make(chan struct{})
	go func() {
		defer close(read)
		got = countStream(stay)
	}()
	for i := range 300 {
		s := start(t, h, Config{Points: tap.Of(tap.Point(i % int(tap.NumPoints))), Snap: 1 + i})
		for before := atomic.LoadUint64(&src.id); atomic.LoadUint64(&src.id) == before; {
			runtime.Gosched()
		}
		if i%100 == 0 {
			h.SetSource(nil)
			h.SetSource(src)
		}
		s.Close()
		if _, err := s.Next(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	stay.Close()
	<-read
	st := stay.Stats()
	for p := range tap.NumPoints {
		sum := sent[0][p] + sent[1][p]
		if st.Seen[p]+st.Lost[p] != sum {
			t.Errorf("%s: %d seen + %d lost, %d shown", p, st.Seen[p], st.Lost[p], sum)
		}
		if got[p]+st.Overrun[p] != st.Matched[p] {
			t.Errorf("%s: %d read + %d overrun, %d matched", p, got[p], st.Overrun[p], st.Matched[p])
		}
	}
}

// countStream counts the packets of a stream by point, until its end.
func countStream(s *Session) Counts {
	var n Counts
	for {
		b, err := s.Next(context.Background())
		if err != nil || b == nil {
			return n
		}
		for len(b) > 0 {
			size := headLen + int(binary.LittleEndian.Uint32(b))
			n[b[headLen+24]]++
			b = b[size:]
		}
	}
}

func TestStartRefuses(t *testing.T) {
	h := &Hub{}
	if _, err := h.Start(Config{}); err == nil {
		t.Error("no points: no error")
	}
	var all []*Session
	for range MaxSessions {
		all = append(all, start(t, h, Config{Points: tap.AllPoints}))
	}
	if _, err := h.Start(Config{Points: tap.AllPoints}); err == nil {
		t.Error("one too many: no error")
	}
	for _, s := range all {
		s.Close()
	}
}

func TestNextEndsWithTheContext(t *testing.T) {
	h := &Hub{}
	s := start(t, h, Config{Points: tap.AllPoints})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Next(ctx); err != context.Canceled {
		t.Errorf("%v", err)
	}
	s.Close()
}

func TestReaderRefusesWhatIsNoStream(t *testing.T) {
	hello, _ := AppendHello(nil, Hello{})
	other := bytes.Replace(hello, []byte(`"stream":1`), []byte(`"stream":9`), 1)
	for name, b := range map[string][]byte{
		"nothing": nil, "text": []byte("HTTP/1.1 400 Bad"), "another version": other, "no hello": appendHead(nil, kindPacket, 0),
	} {
		if _, _, err := NewReader(bytes.NewReader(b)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for name, b := range map[string][]byte{
		"a short packet": append(appendHead(nil, kindPacket, 3), 1, 2, 3),
		"a huge frame":   appendHead(nil, kindPacket, 1<<30),
		"half a frame":   append(appendHead(nil, kindPacket, 60), 1),
	} {
		r, _, err := NewReader(bytes.NewReader(append(bytes.Clone(hello), b...)))
		if err != nil {
			t.Fatal(err)
		}
		var p Packet
		if err := r.Next(&p); err == nil || err == io.EOF {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func BenchmarkSession(b *testing.B) {
	src, h := &source{}, &Hub{}
	h.SetSource(src)
	for _, text := range []string{"", "tcp port 80"} {
		b.Run(fmt.Sprintf("filter=%q", text), func(b *testing.B) {
			c := Config{Points: tap.AllPoints, Snap: 128}
			if text != "" {
				c.Filters = append(c.Filters, compile(b, text))
			}
			s := newSession(h, c)
			s.limit = bufferBytes
			r := record(tap.Of(tap.TunIn, tap.WireOut), 0, nil, testPacket.Bytes())
			b.ReportAllocs()
			for b.Loop() {
				s.record(r)
				if len(s.filled) > 1<<20 {
					s.filled = s.filled[:0]
				}
			}
		})
	}
}

// BenchmarkReader is the way of a packet out of a stream.
func BenchmarkReader(b *testing.B) {
	stream, err := AppendHello(nil, Hello{})
	if err != nil {
		b.Fatal(err)
	}
	head := len(stream)
	p := Packet{Point: tap.TunIn, Length: 1426, Data: make([]byte, 128)}
	for range 10000 {
		stream = appendPacket(stream, &p)
	}
	r, _, err := NewReader(bytes.NewReader(stream))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := r.Next(&p); err == io.EOF {
			r.held = 0
			r.r.Reset(bytes.NewReader(stream[head:]))
		} else if err != nil {
			b.Fatal(err)
		}
	}
}

func TestAFlightRecorderKeepsTheNewestAndTheDrops(t *testing.T) {
	src, h := &source{}, &Hub{}
	h.SetSource(src)
	s := start(t, h, Config{Points: tap.AllPoints, Snap: 40, Keep: 10})
	data := testPacket.Bytes()
	src.batch(0, 3, tap.Of(tap.TunIn, tap.Drop), data)
	src.batch(1, 50, tap.Of(tap.WireIn, tap.TunOut), data)
	s.Close()
	frames, stats := s.Dump()
	stream, err := AppendHello(nil, Hello{})
	if err != nil {
		t.Fatal(err)
	}
	if stream, err = AppendStats(append(stream, frames...), stats, true); err != nil {
		t.Fatal(err)
	}
	r, _, err := NewReader(bytes.NewReader(stream))
	if err != nil {
		t.Fatal(err)
	}
	var got Counts
	var p Packet
	last := int64(0)
	for err = r.Next(&p); err == nil; err = r.Next(&p) {
		got[p.Point]++
		if p.Time < last {
			t.Errorf("time goes back by %d ns", last-p.Time)
		}
		last = p.Time
	}
	if err != io.EOF || !r.Complete || got != (Counts{tap.WireIn: 5, tap.TunOut: 5, tap.Drop: 3}) {
		t.Errorf("%v, %v", got, err)
	}
	for p := range got {
		if got[p]+stats.Overrun[p] != stats.Matched[p] {
			t.Errorf("%s: %d kept + %d pushed out, %d matched", tap.Point(p), got[p], stats.Overrun[p], stats.Matched[p])
		}
	}
}

// untilSession starts a session that waits for a dropped packet.
func untilSession(t *testing.T, h *Hub, c Config) *Session {
	t.Helper()
	c.Points, c.Until = tap.AllPoints, compile(t, "reason no-route")
	return start(t, h, c)
}

func TestUntilKeepsWhatLedToThePacket(t *testing.T) {
	src, h := &source{}, &Hub{}
	h.SetSource(src)
	s := untilSession(t, h, Config{Keep: 4})
	data := testPacket.Bytes()
	src.batch(0, 10, tap.Of(tap.TunIn), data)
	src.batch(0, 1, tap.Of(tap.TunIn, tap.Drop), data)
	// The stream ends by itself, with the packet last.
	got, packets := drain(t, s)
	src.batch(0, 5, tap.Of(tap.TunIn), data)
	s.Close()
	st := s.Stats()
	if got != (Counts{tap.TunIn: 4, tap.Drop: 1}) || packets[4].Point != tap.Drop || !st.Until {
		t.Errorf("%v, until %v", got, st.Until)
	}
	if st.Seen != (Counts{tap.TunIn: 11, tap.Drop: 1}) || st.Overrun != (Counts{tap.TunIn: 7}) {
		t.Errorf("%+v", st)
	}
}

func TestUntilEndedEarlyHandsOverWhatItKept(t *testing.T) {
	src, h := &source{}, &Hub{}
	h.SetSource(src)
	s := untilSession(t, h, Config{Keep: 4})
	src.batch(0, 3, tap.Of(tap.TunIn), testPacket.Bytes())
	s.Close()
	if got, _ := drain(t, s); got != (Counts{tap.TunIn: 3}) || s.Stats().Until {
		t.Errorf("%v, %+v", got, s.Stats())
	}
}

// TestUntilBeginsWithTheFlightRecorder: neither a gap nor a packet twice, and
// the past does not end it.
func TestUntilBeginsWithTheFlightRecorder(t *testing.T) {
	src, h := &source{}, &Hub{}
	h.SetSource(src)
	recorder := start(t, h, Config{Points: tap.AllPoints, Snap: 40, Keep: 10})
	defer recorder.Close()
	data := testPacket.Bytes()
	src.batch(0, 2, tap.Of(tap.WireIn, tap.Drop), data)
	src.batch(1, 3, tap.Of(tap.TunIn, tap.WireOut), data)
	s := untilSession(t, h, Config{Keep: 100, Before: recorder, Filters: []*filter.Program{compile(t, "point tun-in")}})
	src.batch(0, 2, tap.Of(tap.TunIn, tap.WireOut), data)
	src.batch(0, 1, tap.Of(tap.TunIn, tap.Drop), data)
	s.Close()
	got, packets := drain(t, s)
	// The filter chooses what is kept, but for packets like the one waited for.
	if got != (Counts{tap.TunIn: 6, tap.Drop: 3}) {
		t.Errorf("%v", got)
	}
	ids := map[uint64]bool{}
	for _, p := range packets {
		if p.Point == tap.TunIn && ids[p.ID] {
			t.Errorf("packet %d twice", p.ID)
		}
		ids[p.ID] = true
	}
	if n := len(packets[0].Data); n != len(data) && n != 40 {
		t.Errorf("%d bytes", n)
	}
}

func TestKeptPacketsAreBoundedInBytes(t *testing.T) {
	w := wheel{frames: make([][]byte, 1000)}
	gone := 0
	p := Packet{Data: make([]byte, 1400)}
	for range 5000 {
		w.put(&p, 100_000, func(tap.Point, uint64) { gone++ })
		sum, used := 0, 0
		for _, f := range w.frames {
			sum += cap(f)
			if len(f) > 0 {
				used++
			}
		}
		if sum != w.bytes || sum > 100_000+1400 {
			t.Fatalf("%d bytes, accounted %d", sum, w.bytes)
		}
	}
	if gone < 4900 || gone > 4999 {
		t.Errorf("%d of 5000 are gone", gone)
	}
}
