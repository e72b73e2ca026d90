package accel

import (
	"bytes"
	"math"
	"sync"
	"testing"
	"time"

	"tweed/engine"
)

// witness remembers what it was shown.
type witness struct {
	mu     sync.Mutex
	seen   []engine.Carried
	missed [2]uint64
	until  int64
}

func (w *witness) Carried(c *engine.Carried) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := *c
	s.Data = bytes.Clone(c.Data)
	w.seen = append(w.seen, s)
}

func (w *witness) Missed(receive bool, n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if receive {
		w.missed[1] += n
	} else {
		w.missed[0] += n
	}
}

func (w *witness) Flush(until int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.until = until
}

// TestObserverSeesWhatIsSent: the payload of every datagram as it is on the
// wire, cut to the snap length, super-packets whole; and nothing afterwards.
func TestObserverSeesWhatIsSent(t *testing.T) {
	b := newBench(t, true)
	var w witness
	if err := b.a.Observe(&w, 64); err != nil {
		t.Fatal(err)
	}
	before := time.Now().UnixNano()
	single := to(b.peers[0]).Bytes()
	first, _ := b.send(t, single, 0)
	packet, gso := super(b.peers[1])
	second, _ := b.send(t, packet, gso)
	if err := b.a.Observe(nil, 0); err != nil {
		t.Fatal(err)
	}
	b.send(t, single, 0)
	if len(w.seen) != 2 || w.missed != [2]uint64{} || w.until != math.MaxInt64 {
		t.Fatalf("saw %d packets, missed %v, complete until %d; want 2, none, the end of time", len(w.seen), w.missed, w.until)
	}
	for i, c := range []struct {
		wire           []byte
		stored, prefix int
		payload        int
	}{{first, 64, 22, 0}, {second, len(second) - 28, 0, gso}} {
		got := w.seen[i]
		if got.Length != len(c.wire)-28 || !bytes.Equal(got.Data, c.wire[28:28+c.stored]) {
			t.Errorf("packet %d: %d bytes %x, want %d bytes %x", i, got.Length, got.Data, len(c.wire)-28, c.wire[28:28+c.stored])
		}
		if got.PrefixLen != c.prefix || got.SegmentPayload != c.payload || got.Receive || got.Time < before || got.Time > time.Now().UnixNano() {
			t.Errorf("packet %d: %+v", i, got)
		}
		if got.Peer != be32(c.wire[16:]) || got.Local != be32(c.wire[12:]) || got.PeerPort != be16(c.wire[22:]) || got.LocalPort != be16(c.wire[20:]) {
			t.Errorf("packet %d: ends %x:%d and %x:%d, on the wire %x", i, got.Local, got.LocalPort, got.Peer, got.PeerPort, c.wire[:28])
		}
	}
}

func be32(b []byte) uint32 {
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}
func be16(b []byte) uint16 { return uint16(b[0])<<8 | uint16(b[1]) }

// TestObserverSeesWhatIsReceived, and is told how much it missed when it does
// not keep up.
func TestObserverSeesWhatIsReceived(t *testing.T) {
	a := loaded(t)
	data := vxlanFrame(testPeers[0], from(testPeers[0]).Bytes()).bytes()
	var w witness
	if err := a.Observe(&w, 2000); err != nil {
		t.Fatal(err)
	}
	if _, hit := receive(t, a, data); !hit {
		t.Fatal("left to the workers")
	}
	if err := a.Observe(nil, 0); err != nil {
		t.Fatal(err)
	}
	if len(w.seen) != 1 || !w.seen[0].Receive || !bytes.Equal(w.seen[0].Data, data[42:]) || w.seen[0].Length != len(data)-42 {
		t.Fatalf("saw %+v, want the payload %x", w.seen, data[42:])
	}

	// The observer holds its lock, so the ring fills.
	w.seen = nil
	if err := a.Observe(&w, 2000); err != nil {
		t.Fatal(err)
	}
	_, before := a.Traffic()
	w.mu.Lock()
	for range tapRing / 256 {
		receive(t, a, data)
	}
	w.mu.Unlock()
	if err := a.Observe(nil, 0); err != nil {
		t.Fatal(err)
	}
	_, after := a.Traffic()
	carried := after.Packets - before.Packets
	if got := uint64(len(w.seen)) + w.missed[1]; got != carried || w.missed[1] == 0 || w.missed[0] != 0 {
		t.Errorf("saw %d and missed %d of %d", len(w.seen), w.missed[1], carried)
	}
}
