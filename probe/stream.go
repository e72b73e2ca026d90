package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Ledger accounts for every packet of a [Stream].
type Ledger struct {
	// Sent counts the packets the sender's kernel accepted, Refused those it
	// did not (no route, device gone). Refused ones are in no other field.
	Sent, Refused uint64
	// Received counts the different packets that arrived intact.
	Received uint64
	// Duplicated counts arrivals of a packet that was there already,
	// Reordered arrivals later than one sent after it, Corrupted arrivals whose
	// content is wrong.
	Duplicated, Reordered, Corrupted uint64
	// Missing is Sent - Received.
	Missing uint64
	// LongestGap is the longest time without an arrival.
	LongestGap time.Duration
}

// Clean returns nil when every packet sent arrived exactly once and intact.
func (l Ledger) Clean() error {
	if l.Sent == 0 {
		return errors.New("probe: stream: nothing was sent")
	}
	if l.Missing != 0 || l.Duplicated != 0 || l.Corrupted != 0 || l.Refused != 0 {
		return fmt.Errorf("probe: stream: %s", l)
	}
	return nil
}

// String gives all the counts on one line.
func (l Ledger) String() string {
	return fmt.Sprintf("sent %d, received %d, missing %d, duplicated %d, reordered %d, corrupted %d, refused %d, longest gap %s",
		l.Sent, l.Received, l.Missing, l.Duplicated, l.Reordered, l.Corrupted, l.Refused, l.LongestGap.Round(time.Millisecond))
}

// StreamConfig describes a [Stream].
type StreamConfig struct {
	From, To Place
	Src, Dst netip.Addr
	// Rate in packets per second; 0 means 1000.
	Rate int
	// Size of the UDP payload in bytes, at least 24; 0 means 200.
	Size int
}

// A packet is: sequence number (8 bytes, from 0), kind (8 bytes), filler, and a
// hash of all that (the last 8 bytes).
const (
	streamOverhead = 24
	kindData       = 1
	kindEnd        = 2
)

// catchUp is how many times its rate a stream sends at most: what a stall of
// the machine held back is made up for gently, for it is not the queues on the
// way that are tested. What a stall of more than maxDebt held back is forgone.
const (
	catchUp = 3
	maxDebt = 500 * time.Millisecond
)

// endPatience bounds the wait for the end packet; lost ones are sent again.
const endPatience = 30 * time.Second

// Stream is a one-way flow of numbered UDP packets at a steady rate. It runs
// from [StartStream] until Stop.
type Stream struct {
	conf     StreamConfig
	seed     maphash.Seed
	out, in  *net.UDPConn
	stop     chan struct{}
	ended    chan struct{} // closed by the receiver at an end packet
	workers  sync.WaitGroup
	sent     atomic.Uint64
	refused  atomic.Uint64
	mu       sync.Mutex // guards what follows
	seen     []uint64   // bitmap over sequence numbers
	highest  uint64
	lastSeen time.Time
	tally    Ledger
}

// StartStream opens both sockets and starts sending.
func StartStream(c StreamConfig) (*Stream, error) {
	if c.Rate == 0 {
		c.Rate = 1000
	}
	if c.Size == 0 {
		c.Size = 200
	}
	if c.Size < streamOverhead {
		return nil, fmt.Errorf("probe: stream: size %d: expected at least %d", c.Size, streamOverhead)
	}
	s := &Stream{conf: c, seed: maphash.MakeSeed(), stop: make(chan struct{}), ended: make(chan struct{})}
	var err error
	if s.in, err = listenUDP(c.To, c.Dst); err != nil {
		return nil, fmt.Errorf("probe: stream: %w", err)
	}
	enlarge(s.in, 4<<20)
	if s.out, err = listenUDP(c.From, c.Src); err != nil {
		s.in.Close()
		return nil, fmt.Errorf("probe: stream: %w", err)
	}
	s.workers.Add(2)
	go s.send()
	go s.receive()
	return s, nil
}

// enlarge makes room for n bytes before the receiver runs; the default holds
// some hundred packets. It takes what it can get: only with CAP_NET_ADMIN may
// that be more than net.core.rmem_max.
func enlarge(c *net.UDPConn, n int) {
	c.SetReadBuffer(n)
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, n) })
	}
}

// Received returns the number of different packets that arrived so far.
func (s *Stream) Received() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tally.Received
}

// Stop stops sending, waits until all that was under way has arrived (an end
// packet behind it on the same flow says so, for at most half a minute), and
// returns the ledger. It may be called once.
func (s *Stream) Stop() Ledger {
	close(s.stop)
	deadline := time.After(endPatience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
wait:
	for {
		select {
		case <-s.ended:
			break wait
		case <-deadline:
			break wait
		case <-tick.C:
			s.write(make([]byte, s.conf.Size), 0, kindEnd)
		}
	}
	// What another path may still carry; nothing on the clean one.
	time.Sleep(50 * time.Millisecond)
	s.out.Close()
	s.in.Close()
	s.workers.Wait()
	l := s.tally
	l.Sent, l.Refused = s.sent.Load(), s.refused.Load()
	l.Missing = l.Sent - l.Received
	return l
}

func (s *Stream) send() {
	defer s.workers.Done()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	buf := make([]byte, s.conf.Size)
	start := time.Now()
	var seq, credit uint64
	perTick := catchUp*s.conf.Rate/1000 + 1
	debt := uint64(maxDebt.Seconds() * float64(s.conf.Rate))
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
		}
		due := uint64(time.Since(start).Seconds() * float64(s.conf.Rate))
		credit = max(credit, due-min(due, debt))
		for n := 0; credit < due && n < perTick; n++ {
			credit++
			if err := s.write(buf, seq, kindData); err != nil {
				s.refused.Add(1)
				continue
			}
			s.sent.Add(1)
			seq++
		}
	}
}

func (s *Stream) write(buf []byte, seq, kind uint64) error {
	binary.BigEndian.PutUint64(buf, seq)
	binary.BigEndian.PutUint64(buf[8:], kind)
	body := len(buf) - 8
	binary.BigEndian.PutUint64(buf[body:], maphash.Bytes(s.seed, buf[:body]))
	_, err := s.out.WriteToUDPAddrPort(buf, portOf(s.in))
	return err
}

func (s *Stream) receive() {
	defer s.workers.Done()
	buf := make([]byte, 64<<10)
	over := false
	for {
		n, _, err := s.in.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		kind := s.count(buf[:n])
		if kind == kindEnd && !over {
			over = true
			close(s.ended)
		}
	}
}

// count books one arrival and returns its kind, 0 if it is not intact.
func (s *Stream) count(p []byte) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	body := len(p) - 8
	if len(p) != s.conf.Size || binary.BigEndian.Uint64(p[body:]) != maphash.Bytes(s.seed, p[:body]) {
		s.tally.Corrupted++
		return 0
	}
	seq, kind := binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[8:])
	if kind != kindData {
		return kind
	}
	now := time.Now()
	if !s.lastSeen.IsZero() {
		s.tally.LongestGap = max(s.tally.LongestGap, now.Sub(s.lastSeen))
	}
	s.lastSeen = now
	for uint64(len(s.seen)) <= seq/64 {
		s.seen = append(s.seen, 0)
	}
	bit := uint64(1) << (seq % 64)
	if s.seen[seq/64]&bit != 0 {
		s.tally.Duplicated++
		return kind
	}
	s.seen[seq/64] |= bit
	s.tally.Received++
	if seq < s.highest {
		s.tally.Reordered++
	}
	s.highest = max(s.highest, seq)
	return kind
}
