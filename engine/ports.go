package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"tweed/engine/tap"
	"tweed/tun"
)

// Port is an interface of its own inside our subnet: a container attached to
// this engine, with one address.
type Port struct {
	// Name is for people.
	Name string
	// Addr is the port's address, inside our subnet. Packets it sends from any
	// other address are dropped.
	Addr netip.Addr
	// Queue is the port's end; the engine closes it on Detach.
	Queue *tun.Queue
}

// PortID names an attached port. IDs are not used again.
type PortID uint32

// PortInfo is a Port and its state.
type PortInfo struct {
	ID PortID
	Port
	// Gone says that the device behind the queue has been deleted.
	Gone bool
}

type port struct {
	PortInfo
	addr uint32
	gone atomic.Bool
	// greeted is set when the worker has seen a port with shared memory; it is the
	// worker's.
	greeted bool
}

// source is where a transmit worker reads.
type source interface {
	// FD becomes readable when TryRead would find a packet.
	FD() int
	// TryRead drains one queue and returns it, with the port it belongs to. An
	// empty batch means that there was nothing anywhere.
	TryRead(b *tun.ReadBatch) (*tun.Queue, *port, error)
	// More reports whether the last TryRead left something.
	More(b *tun.ReadBatch) bool
}

// deviceSource is one queue of the host's TUN device.
type deviceSource struct{ *tun.Queue }

func (s deviceSource) TryRead(b *tun.ReadBatch) (*tun.Queue, *port, error) {
	return s.Queue, nil, s.Queue.TryRead(b)
}

func (s deviceSource) More(b *tun.ReadBatch) bool { return b.Full() }

// portSource is any number of ports, served in turn.
type portSource struct {
	epoll int
	// ports is replaced, never changed; the worker reads it without a lock.
	ports  atomic.Pointer[map[int32]*port]
	events [32]unix.EpollEvent
	ready  []unix.EpollEvent // of events, not yet served
	// awake are the ports with shared memory that are not asleep: they are looked at
	// without being asked for. next is whose turn it is.
	awake  []*port
	next   int
	looked int // times in vain since the last packet
}

// looks is how often the others on this processor get their turn before ports that
// have nothing go to sleep. Mostly those are who would have to wake them again, with
// a system call on both sides.
const looks = 2

func newPortSource() (*portSource, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("engine: epoll: %w", err)
	}
	s := &portSource{epoll: fd}
	s.ports.Store(&map[int32]*port{})
	return s, nil
}

func (s *portSource) FD() int { return s.epoll }

func (s *portSource) More(b *tun.ReadBatch) bool {
	return b.Full() || len(s.ready) > 0 || len(s.awake) > 0
}

func (s *portSource) TryRead(b *tun.ReadBatch) (*tun.Queue, *port, error) {
	ports := *s.ports.Load()
	for {
		if len(s.ready) == 0 {
			n, err := unix.EpollWait(s.epoll, s.events[:], 0)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return nil, nil, fmt.Errorf("engine: epoll: %w", err)
			}
			s.ready = s.events[:max(n, 0)]
		}
		for len(s.ready) > 0 {
			p := ports[s.ready[0].Fd]
			s.ready = s.ready[1:]
			if p == nil {
				continue
			}
			if p.Queue.HasRing() {
				s.rung(p)
				continue
			}
			if s.read(p, b) {
				return p.Queue, p, nil
			}
		}
		if len(s.awake) == 0 {
			b.Clear()
			return nil, nil, nil
		}
		if p := s.readAwake(ports, b); p != nil {
			return p.Queue, p, nil
		}
	}
}

// read reports whether there were packets. One dead container is no reason to
// stop serving the others.
func (s *portSource) read(p *port, b *tun.ReadBatch) bool {
	if err := p.Queue.TryRead(b); err != nil {
		s.lose(p)
		return false
	}
	return len(b.Packets()) > 0
}

func (s *portSource) lose(p *port) {
	p.gone.Store(true)
	_ = unix.EpollCtl(s.epoll, unix.EPOLL_CTL_DEL, p.Queue.FD(), nil)
}

// rung wakes a port.
func (s *portSource) rung(p *port) {
	err := p.Queue.Rung()
	if err == nil && !p.greeted {
		p.greeted = true
		ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(p.ID)}
		err = unix.EpollCtl(s.epoll, unix.EPOLL_CTL_MOD, p.Queue.FD(), &ev)
	}
	if err != nil {
		s.lose(p)
		return
	}
	if !slices.Contains(s.awake, p) {
		s.awake = append(s.awake, p)
	}
}

// readAwake reads from the ports that are awake, in turn, and returns the one
// that had packets. Those that have none go to sleep.
func (s *portSource) readAwake(ports map[int32]*port, b *tun.ReadBatch) *port {
	for len(s.awake) > 0 {
		s.next %= len(s.awake)
		p := s.awake[s.next]
		if ports[int32(p.ID)] == p && !p.gone.Load() {
			if s.read(p, b) {
				s.next++
				s.looked = 0
				return p
			}
			if s.looked < looks {
				s.looked++
				unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
				continue
			}
			if !p.gone.Load() && !p.Queue.Sleep() {
				continue
			}
		}
		last := len(s.awake) - 1
		s.awake[s.next], s.awake[last] = s.awake[last], nil
		s.awake = s.awake[:last]
	}
	return nil
}

func (s *portSource) add(p *port) error {
	m := maps.Clone(*s.ports.Load())
	m[int32(p.ID)] = p
	s.ports.Store(&m)
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(p.ID)}
	if p.Queue.HasRing() {
		// The socket can be written to, so the worker looks once without being rung
		// for: what came before it was there would wait forever.
		ev.Events |= unix.EPOLLOUT
	}
	if err := unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, p.Queue.FD(), &ev); err != nil {
		s.remove(p)
		return fmt.Errorf("engine: watch port %s: %w", p.Name, err)
	}
	return nil
}

func (s *portSource) remove(p *port) {
	m := maps.Clone(*s.ports.Load())
	delete(m, int32(p.ID))
	s.ports.Store(&m)
	_ = unix.EpollCtl(s.epoll, unix.EPOLL_CTL_DEL, p.Queue.FD(), nil)
}

func (s *portSource) close() error { return unix.Close(s.epoll) }

// Attach adds a port. The address must be inside our subnet and no other
// port's; the subnet must have been applied before. On an error the queue
// still belongs to the caller.
func (e *Engine) Attach(p Port) (PortID, error) {
	e.apply.Lock()
	defer e.apply.Unlock()
	v := e.view.Load()
	switch {
	case !p.Addr.Is4() || !v.snapshot.Local.Subnet.Contains(p.Addr):
		return 0, fmt.Errorf("engine: port %s: address %v is outside our subnet %v", p.Name, p.Addr, v.snapshot.Local.Subnet)
	case p.Addr == v.snapshot.Local.Addr && e.cfg.Device != nil:
		return 0, fmt.Errorf("engine: port %s: address %v is this host's own", p.Name, p.Addr)
	case v.ports[addrBits(p.Addr)] != nil:
		return 0, fmt.Errorf("engine: port %s: address %v belongs to port %s", p.Name, p.Addr, v.ports[addrBits(p.Addr)].Name)
	}
	if err := e.openPorts(); err != nil {
		return 0, err
	}
	e.lastPort++
	n := &port{PortInfo: PortInfo{ID: e.lastPort, Port: p}, addr: addrBits(p.Addr)}
	next := *v
	next.ports = maps.Clone(v.ports)
	if next.ports == nil {
		next.ports = make(map[uint32]*port)
	}
	next.ports[n.addr] = n
	e.setDuty(&next)
	e.view.Store(&next)
	if err := e.ports.add(n); err != nil {
		e.view.Store(v)
		e.settle()
		e.setDuty(v)
		return 0, err
	}
	return n.ID, nil
}

// Detach removes a port and closes its queue once no worker uses it.
func (e *Engine) Detach(id PortID) error {
	e.apply.Lock()
	defer e.apply.Unlock()
	v := e.view.Load()
	for addr, p := range v.ports {
		if p.ID != id {
			continue
		}
		next := *v
		next.ports = maps.Clone(v.ports)
		delete(next.ports, addr)
		if len(next.ports) == 0 {
			next.ports = nil
		}
		e.view.Store(&next)
		e.ports.remove(p)
		e.settle()
		e.setDuty(&next)
		return p.Queue.Close()
	}
	return fmt.Errorf("engine: no port %d", id)
}

// Ports returns the attached ports in no particular order.
func (e *Engine) Ports() []PortInfo {
	var out []PortInfo
	for _, p := range e.view.Load().ports {
		info := p.PortInfo
		info.Gone = p.gone.Load()
		out = append(out, info)
	}
	return out
}

// openPorts makes the worker that serves ports beside a host device, unless it
// is there. Without a host device New has made it.
func (e *Engine) openPorts() error {
	if e.ports != nil {
		return nil
	}
	src, err := newPortSource()
	if err != nil {
		return err
	}
	e.ports = src
	p, err := e.addPair(src, nil, nil)
	if err != nil {
		e.ports = nil
		src.close()
		return err
	}
	if e.started {
		e.startPair(p)
	}
	return nil
}

// settle returns when every worker has finished the batch it was in: none uses
// what was in force before.
func (e *Engine) settle() {
	for _, w := range e.tx {
		w.busy.settle()
	}
	for _, w := range e.rx {
		w.busy.settle()
	}
}

var errOffsets = errors.New("engine: checksum offsets outside the packet")

// switched delivers a packet from a port, or from the host to a port, on this
// node. It reports false when the destination is nobody here. The end of ip lies
// in tail, unless that is empty.
func (w *txWorker) switched(v *view, p *tun.Packet, ip, tail []byte, segments, bytes uint64) bool {
	var q *tun.Queue
	dst := binary.BigEndian.Uint32(ip[16:])
	if to := v.ports[dst]; to != nil && to != w.from {
		q = to.Queue
	} else if dst == v.addr && w.from != nil && w.engine.cfg.Device != nil {
		q = w.engine.cfg.Device.Queues()[0]
	}
	if q == nil {
		return false
	}
	h := tap.Header{Points: tap.Of(tap.TunIn, tap.TunOut), Flags: tap.Inner}
	if w.tap.ring != nil {
		w.show(&h, p, ip, segments)
	}
	var err error
	switch {
	case q.Offload() != tun.OffloadNone:
		err = q.Forward(&w.scratch, &p.Header, ip[:len(ip)-len(tail)], tail)
	case p.Super():
		w.batch.Bytes(p, 0)
		err = w.forwardSplit(q, ip)
	default:
		w.batch.Bytes(p, 0)
		// The other side knows no unfinished checksums.
		if p.Partial() && !p.Complete(ip) {
			err = errOffsets
			break
		}
		err = q.Forward(&w.scratch, &tun.Header{}, ip, nil)
	}
	if err != nil {
		w.tally.drop(TxLocalError, segments)
		if w.tap.ring != nil {
			w.tap.ring.Fail(h.ID, h.Flags, tap.TunOut, uint8(TxLocalError), segments)
		}
		return true
	}
	w.tally.Delivered += segments
	w.tally.DeliveredBytes += bytes
	return true
}

// forwardSplit writes a super-packet to a queue that takes none.
func (w *txWorker) forwardSplit(q *tun.Queue, ip []byte) error {
	w.split.Begin(ip, false)
	if w.split.SegmentLen() > len(w.hdrs)-w.hdrPos {
		w.send()
		w.hdrPos = 0
	}
	scratch := w.hdrs[w.hdrPos:]
	hl := w.split.HeaderLen()
	for {
		payload, ok := w.split.Next(scratch[:hl])
		if !ok {
			return nil
		}
		n := hl + copy(scratch[hl:], payload)
		if err := q.Forward(&w.scratch, &tun.Header{}, scratch[:n], nil); err != nil {
			return err
		}
	}
}
