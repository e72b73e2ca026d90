package engine

import (
	"container/heap"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"tweed/engine/impair"
	"tweed/engine/tap"
	"tweed/tun"
)

const (
	// maxHeld packets are held back at once; what comes then is lost, as in the
	// queue of a slow link.
	maxHeld = 10000
	// maxDue packets are let go at once.
	maxDue = 32
)

// impairedSource stands between a source and its worker and treats what is sent
// as a bad network would: it loses packets and holds others back. Each counts in
// the ledger when it is lost or let go.
type impairedSource struct {
	source
	w    *txWorker
	dice *impair.Dice
	// epoll is readable when the source is or the timer has run out.
	epoll, timer int
	held         heldPackets
	order        uint64
	due          [][]byte
	more         bool
}

// heldPacket is a packet with its virtio header and where it came from.
type heldPacket struct {
	at    time.Time
	order uint64
	queue *tun.Queue
	from  *port
	raw   []byte
}

// heldPackets is a heap by time.
type heldPackets []heldPacket

func (h heldPackets) Len() int { return len(h) }
func (h heldPackets) Less(i, j int) bool {
	if h[i].at.Equal(h[j].at) {
		return h[i].order < h[j].order
	}
	return h[i].at.Before(h[j].at)
}
func (h heldPackets) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *heldPackets) Push(x any)   { *h = append(*h, x.(heldPacket)) }
func (h *heldPackets) Pop() any {
	last := len(*h) - 1
	p := (*h)[last]
	(*h)[last] = heldPacket{}
	*h = (*h)[:last]
	return p
}

// impairWorker puts an impairedSource before the worker's source; stream tells
// workers apart.
func impairWorker(w *txWorker, spec impair.Spec, stream uint64) error {
	s := &impairedSource{source: w.source, w: w, dice: impair.NewDice(spec, stream), epoll: -1, timer: -1}
	var err error
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err == nil {
		s.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	}
	for _, fd := range []int{s.source.FD(), s.timer} {
		if err == nil {
			err = unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("engine: impairments: %w", err), s.close())
	}
	w.source, w.impaired = s, s
	return nil
}

func (s *impairedSource) close() error {
	var errs []error
	for _, fd := range []int{s.epoll, s.timer} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}

func (s *impairedSource) FD() int { return s.epoll }

func (s *impairedSource) More(b *tun.ReadBatch) bool { return s.more }

// TryRead returns packets whose time has come, and else those of the source
// that go through at once.
func (s *impairedSource) TryRead(b *tun.ReadBatch) (*tun.Queue, *port, error) {
	s.more = true
	if q, p, ok := s.release(b); ok {
		return q, p, nil
	}
	q, p, err := s.source.TryRead(b)
	if err != nil {
		return q, p, err
	}
	s.more = len(b.Packets()) > 0
	if s.more {
		s.treat(b, q, p)
	}
	return q, p, s.arm()
}

// treat loses packets of the batch and holds others back.
func (s *impairedSource) treat(b *tun.ReadBatch, q *tun.Queue, from *port) {
	w := s.w
	w.tap.begin(w.engine.tap.Load())
	now := time.Now()
	b.Keep(func(p *tun.Packet) bool {
		hold, lost := s.dice.Next()
		switch {
		case lost, hold > 0 && len(s.held) >= maxHeld:
			ip := b.Bytes(p, 0)
			w.tally.Packets++
			w.tally.Bytes += uint64(len(ip))
			w.drop(p, ip, TxImpaired, 1)
		case hold > 0:
			s.order++
			heap.Push(&s.held, heldPacket{at: now.Add(hold), order: s.order, queue: q, from: from, raw: b.AppendRaw(nil, p)})
		default:
			return true
		}
		return false
	})
	w.tap.end()
	w.ledger.publish(&w.tally)
}

// release loads what is due, of one queue, into the batch.
func (s *impairedSource) release(b *tun.ReadBatch) (*tun.Queue, *port, bool) {
	now := time.Now()
	s.due = s.due[:0]
	var first heldPacket
	size := 0
	for len(s.held) > 0 && !s.held[0].at.After(now) && len(s.due) < maxDue {
		next := &s.held[0]
		if len(s.due) > 0 && (next.queue != first.queue || size+len(next.raw) > tun.LoadRoom) {
			break
		}
		p := heap.Pop(&s.held).(heldPacket)
		if p.from != nil && s.w.engine.view.Load().ports[p.from.addr] != p.from {
			s.gone(&p)
			continue
		}
		if len(s.due) == 0 {
			first = p
		}
		s.due = append(s.due, p.raw)
		size += len(p.raw)
	}
	if len(s.due) == 0 {
		return nil, nil, false
	}
	b.Load(s.due...)
	return first.queue, first.from, true
}

// gone drops a packet of a port that was detached while it was held.
func (s *impairedSource) gone(p *heldPacket) {
	w := s.w
	w.tap.begin(w.engine.tap.Load())
	w.tally.Packets++
	w.tally.Bytes += uint64(len(p.raw) - virtioHeaderLen)
	w.tally.drop(TxImpaired, 1)
	if w.tap.ring != nil {
		h := tap.Header{Points: tap.Of(tap.TunIn, tap.Drop), Reason: uint8(TxImpaired), Flags: tap.Inner, Segments: 1}
		w.tap.put(&h, p.raw[virtioHeaderLen:], nil)
	}
	w.tap.end()
	w.ledger.publish(&w.tally)
}

// virtioHeaderLen is struct virtio_net_hdr before a held packet.
const virtioHeaderLen = 10

// arm sets the timer to the next packet that becomes due, or off. Reading is
// not needed: setting it clears what has run out.
func (s *impairedSource) arm() error {
	var spec unix.ItimerSpec
	if len(s.held) > 0 {
		// Zero would switch the timer off.
		spec.Value = unix.NsecToTimespec(max(time.Until(s.held[0].at), time.Microsecond).Nanoseconds())
	}
	if err := unix.TimerfdSettime(s.timer, 0, &spec, nil); err != nil {
		return fmt.Errorf("engine: impairments: timer: %w", err)
	}
	return nil
}
