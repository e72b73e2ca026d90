package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"tweed/encap"
	"tweed/engine/tap"
	"tweed/tun"
)

// Words used here:
//
//	replay   packets of a capture put into the engine once more
//	feeder   who calls Put; it waits when the engine is behind, never the
//	         other way round

// replayNice is how much a replay's thread steps back behind the traffic.
const replayNice = 5

// ErrReplaying is returned while another replay is running.
var ErrReplaying = errors.New("engine: another replay is running")

// replayWorkers carry replayed packets. They are made for the first replay and
// stay, because their ledgers are part of the engine's; their threads end with
// each replay.
type replayWorkers struct {
	tx *txWorker   // as if read from the TUN
	rx []*rxWorker // as if received, one for each framing
	// current is the running replay.
	current *Replay
	// in is where rx reads.
	in *tun.ReadBatch
}

// Replay is a stretch of time in which packets are put into the engine as if
// they had come by themselves. They pass every check, are counted in the
// ledger, shown by captures, and sent or delivered for good. Its methods
// belong to one goroutine.
type Replay struct {
	engine *Engine
	point  tap.Point
	fd     int // of feed
	feed   *os.File
	queue  *tun.Queue
	ended  chan struct{}
	buf    []byte
	before Stats
	// foreign counts packets that no socket of ours would have received. It is
	// the thread's until ended.
	foreign uint64
	drained chan struct{}
}

// Replayed says what became of the packets of a Replay.
type Replayed struct {
	// Ledger is the part of the engine's ledger that the replay is.
	Ledger Direction
	// Answered is the number of ICMP errors the packets would have caused.
	Answered uint64
	// Foreign are packets at wire-in that are no whole UDP datagram to a port
	// the engine listens on. They are in no ledger.
	Foreign uint64
}

// StartReplay begins a replay at tap.TunIn or tap.WireIn. One can run at a
// time: the error is ErrReplaying otherwise. Close ends it.
func (e *Engine) StartReplay(point tap.Point) (*Replay, error) {
	if point != tap.TunIn && point != tap.WireIn {
		return nil, fmt.Errorf("engine: replay at %v: expected %v or %v", point, tap.TunIn, tap.WireIn)
	}
	e.apply.Lock()
	defer e.apply.Unlock()
	if e.replay.current != nil {
		return nil, ErrReplaying
	}
	if e.closing.Load() || !e.started {
		return nil, errors.New("engine: not running")
	}
	if err := e.openReplay(); err != nil {
		return nil, err
	}
	// A sequence of whole packets, with an end that can be told from a pause.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("engine: replay: %w", err)
	}
	q, err := tun.QueueFromFD(fds[0], tun.FDConfig{Offload: tun.OffloadNone})
	if err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, err
	}
	r := &Replay{engine: e, point: point, queue: q, fd: fds[1], feed: os.NewFile(uintptr(fds[1]), "replay"), ended: make(chan struct{}), drained: make(chan struct{}), before: e.replay.stats()}
	e.replay.current = r
	e.observe()
	run := r.transmit
	if point == tap.WireIn {
		run = r.receive
	} else {
		e.replay.tx.source = deviceSource{q}
	}
	go r.drain()
	e.work(func() error {
		defer close(r.ended)
		// The thread ends with the replay and takes its priority along.
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, replayNice)
		return run()
	})
	return r, nil
}

// openReplay makes the workers of replays, unless they are there.
func (e *Engine) openReplay() error {
	if e.replay.tx != nil {
		return nil
	}
	in, err := tun.NewReadBatch()
	if err != nil {
		return err
	}
	e.replay.in = in
	tx, err := newTxWorker(e, nil, nil)
	if err != nil {
		return err
	}
	e.tx = append(e.tx, tx)
	e.replay.tx = tx
	var q *tun.Queue
	if e.cfg.Device != nil {
		q = e.cfg.Device.Queues()[0]
	}
	for _, l := range e.cfg.Listen {
		w, err := newRxWorker(e, l, nil, q)
		if err != nil {
			return err
		}
		e.rx = append(e.rx, w)
		e.replay.rx = append(e.replay.rx, w)
	}
	if need := len(e.tx) + len(e.rx) + 2; runtime.GOMAXPROCS(0) < need {
		runtime.GOMAXPROCS(need)
	}
	return nil
}

// tapWorkers is how many workers the first replay will bring.
func (r *replayWorkers) tapWorkers(c *Config) int {
	if r.tx != nil {
		return 0
	}
	return 1 + len(c.Listen)
}

// stats are the sums of all replays so far.
func (r *replayWorkers) stats() (s Stats) {
	s.Tx = r.tx.ledger.read()
	s.ICMPSent, s.ICMPLimited = r.tx.icmp.sent.Load(), r.tx.icmp.limited.Load()
	for _, w := range r.rx {
		d := w.ledger.read()
		s.Rx.add(&d)
	}
	return s
}

// transmit is the thread of a replay at tun-in.
func (r *Replay) transmit() error {
	return r.serve(func() (int, error) { return r.engine.replay.tx.serve() })
}

// receive is the thread of a replay at wire-in.
func (r *Replay) receive() error {
	w := &r.engine.replay
	return r.serve(func() (int, error) {
		err := r.queue.TryRead(w.in)
		n := len(w.in.Packets())
		if err == nil && n > 0 {
			r.round(w)
		}
		return n, err
	})
}

// serve calls once again and again until the feeder has gone.
func (r *Replay) serve(once func() (int, error)) error {
	var y yielder
	for {
		y.tick()
		n, err := once()
		if errors.Is(err, tun.ErrGone) {
			return nil
		}
		if err != nil {
			return err
		}
		if n > 0 {
			continue
		}
		if _, _, err := wait(r.queue.FD(), -1, forever); err != nil {
			return err
		}
	}
}

// round receives the datagrams of w.in, whole as they were on the underlay.
func (r *Replay) round(w *replayWorkers) {
	var views [encap.NumFramings]*view
	for i, rx := range w.rx {
		views[i] = rx.begin()
	}
	packets := w.in.Packets()
	for i := range packets {
		m, port, ok := datagramOf(w.in.Bytes(&packets[i], 0))
		to := slices.IndexFunc(w.rx, func(rx *rxWorker) bool { return ok && rx.local.Addr.Port() == port })
		if to < 0 {
			r.foreign++
			continue
		}
		w.rx[to].message(views[to], &m)
	}
	for _, rx := range w.rx {
		rx.end()
	}
}

// datagramOf is the datagram an IPv4 packet holds, as its receiver would have
// got it, and the port it is for.
func datagramOf(ip []byte) (m encap.Message, port uint16, ok bool) {
	if len(ip) < 20 || ip[0]>>4 != 4 || ip[9] != 17 || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
		return m, 0, false
	}
	ihl, total := int(ip[0]&0xf)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if ihl < 20 || total > len(ip) || total < ihl+8 {
		return m, 0, false
	}
	udp := ip[ihl:total]
	length := int(binary.BigEndian.Uint16(udp[4:]))
	if length < 8 || length > len(udp) {
		return m, 0, false
	}
	m.Data, m.TOS = udp[8:length:length], ip[1]
	m.Source, m.SourcePort = binary.BigEndian.Uint32(ip[12:]), binary.BigEndian.Uint16(udp)
	return m, binary.BigEndian.Uint16(udp[2:]), true
}

// Put hands a packet to the engine: at tun-in what the host would have sent, at
// wire-in the whole datagram with its IPv4 header. payload is 0, or the payload
// of each segment of a super-packet. Put waits while the engine is behind, and
// fails when the engine was closed.
func (r *Replay) Put(pkt []byte, payload int) error {
	var h tun.Header
	if payload > 0 && r.point == tap.TunIn {
		h = tun.SuperHeader(pkt, payload)
	}
	r.buf = append(h.Append(r.buf[:0]), pkt...)
	if _, err := r.feed.Write(r.buf); err != nil {
		return fmt.Errorf("engine: replay: %w", err)
	}
	return nil
}

// drain takes the ICMP errors, which the host did not ask for.
func (r *Replay) drain() {
	defer close(r.drained)
	b := make([]byte, 2048)
	for {
		if _, err := r.feed.Read(b); err != nil {
			return
		}
	}
}

// Close returns what became of the packets once all of them have been handled.
func (r *Replay) Close() Replayed {
	_ = unix.Shutdown(r.fd, unix.SHUT_WR)
	<-r.ended
	e := r.engine
	e.apply.Lock()
	defer e.apply.Unlock()
	now := e.replay.stats()
	e.replay.current = nil
	e.observe()
	r.queue.Close()
	<-r.drained
	r.feed.Close()
	out := Replayed{Foreign: r.foreign, Answered: now.ICMPSent + now.ICMPLimited - r.before.ICMPSent - r.before.ICMPLimited}
	ledger, before := now.Tx, r.before.Tx
	if r.point == tap.WireIn {
		ledger, before = now.Rx, r.before.Rx
	}
	ledger.sub(&before)
	out.Ledger = ledger
	return out
}

// stop makes the thread of a running replay end, for an engine that closes.
func (r *replayWorkers) stop() {
	if r.current != nil {
		_ = unix.Shutdown(r.current.queue.FD(), unix.SHUT_RDWR)
	}
}
