// Package engine is the data plane: it wires the queues of a TUN device to
// batched UDP sockets through a table of peers, and keeps the ledger of what
// became of every packet.
//
//	transmit:  queue i -> table -> prefix -> sendmmsg
//	receive:   recvmmsg -> checks -> coalescer -> queue i
//
// Both run to completion on locked threads: between reading and sending there
// is no channel, lock, allocation or log line. The engine is fed
// complete snapshots and never sees etcd. While nobody applies a new snapshot,
// it goes on with the last one.
package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"tweed/encap"
	"tweed/engine/impair"
	"tweed/engine/table"
	"tweed/engine/tap"
	"tweed/tun"
)

// Listen is one framing and the address its sockets are bound to.
type Listen struct {
	Framing encap.Framing
	// Addr is the underlay address and UDP port. An unspecified address
	// (0.0.0.0) receives on every interface.
	Addr netip.AddrPort
}

// Config is what an Engine is made of. All of it is fixed for its lifetime.
type Config struct {
	// Device is the opened TUN device; one worker pair serves each of its
	// queues. Nil means that the host is not part of the overlay: only attached
	// ports are served.
	Device *tun.Device
	// Offload is the highest rung for the sockets when there is no Device.
	Offload tun.Offload
	// MTU is the device's MTU in bytes.
	MTU int
	// Listen has one entry for each framing to receive. The udp framing is
	// sent from its listening port, as flannel does; a node that does not
	// listen for it sends it from a port of the kernel's choice.
	Listen []Listen
	// Source is the underlay address outgoing datagrams carry.
	Source netip.Addr
	// Impair treats what is sent as a bad network would, for tests.
	Impair impair.Spec
	// Log receives rare events only, never one per packet. Nil means slog.Default.
	Log *slog.Logger
}

// Snapshot is the complete state of the overlay at one revision.
type Snapshot struct {
	Revision int64
	Local    table.Local
	Peers    []table.Peer
}

// view is a snapshot in the form the workers read.
type view struct {
	snapshot Snapshot
	table    *table.Table
	// base and mask are our subnet, addr the TUN's address, host byte order.
	base, mask, addr uint32
	vxlan            encap.VXLANReceiver
	ports            map[uint32]*port // by address; nil without any
}

// Engine forwards packets. Its methods are safe for concurrent use, but Start
// and Close may each be called once.
type Engine struct {
	cfg  Config
	log  *slog.Logger
	view atomic.Pointer[view]
	tap  atomic.Pointer[tap.Set]
	// apply serialises what replaces the view, the tap and the workers.
	apply sync.Mutex

	ports    *portSource // serves ports; nil until there are any
	lastPort PortID
	replay   replayWorkers
	observed atomic.Bool // see observe

	bypass   Bypass       // nil without one
	blind    string       // why the bypass cannot be observed, while it has to be
	bypassed [2]Direction // sums of earlier bypasses, sent and received

	sockets []*encap.Socket // all of them
	tx      []*txWorker
	rx      []*rxWorker
	pairs   []*pair
	started bool
	running sync.WaitGroup
	failed  chan error
	closing atomic.Bool
}

// New opens the sockets and prepares the workers. The error of a port in use,
// a foreign address or a missing permission names the address.
func New(cfg Config) (*Engine, error) {
	if !cfg.Source.Is4() {
		return nil, fmt.Errorf("engine: source address %v: expected IPv4", cfg.Source)
	}
	cfg.Listen = slices.Clone(cfg.Listen)
	e := &Engine{cfg: cfg, log: cfg.Log, failed: make(chan error, 1)}
	if e.log == nil {
		e.log = slog.Default()
	}
	e.view.Store(&view{})
	if err := e.open(); err != nil {
		e.free()
		return nil, err
	}
	return e, nil
}

// open makes a pair for each queue of the device, or one for the ports.
func (e *Engine) open() error {
	var sources []source
	if e.cfg.Device != nil {
		for _, q := range e.cfg.Device.Queues() {
			sources = append(sources, deviceSource{q})
		}
	} else {
		src, err := newPortSource()
		if err != nil {
			return err
		}
		e.ports = src
		sources = append(sources, src)
	}
	shared := len(sources) > 1
	for i := range e.cfg.Listen {
		if shared {
			// SO_REUSEPORT would let us share the port of another program of
			// the same user, so see first that it is free.
			if err := e.probe(&e.cfg.Listen[i]); err != nil {
				return err
			}
		}
	}
	for _, src := range sources {
		var rx []*rxWorker
		var udp *encap.Socket
		for i := range e.cfg.Listen {
			w, err := e.listen(&e.cfg.Listen[i], shared, src)
			if err != nil {
				return err
			}
			if w.framing == encap.FramingUDP {
				udp = w.sock
			}
			rx = append(rx, w)
		}
		if _, err := e.addPair(src, rx, udp); err != nil {
			return err
		}
	}
	return nil
}

// listen makes a receive worker.
func (e *Engine) listen(l *Listen, shared bool, src source) (*rxWorker, error) {
	s, err := e.socket(encap.SocketConfig{Addr: l.Addr, Shared: shared})
	if err != nil {
		return nil, err
	}
	if l.Addr.Port() == 0 {
		if l.Addr, err = s.LocalAddr(); err != nil {
			return nil, err
		}
	}
	var q *tun.Queue
	if d, ok := src.(deviceSource); ok {
		q = d.Queue
	}
	w, err := newRxWorker(e, *l, s, q)
	if err == nil {
		e.rx = append(e.rx, w)
	}
	return w, err
}

// addPair makes the pair of a source and its receive workers.
func (e *Engine) addPair(src source, rx []*rxWorker, udp *encap.Socket) (*pair, error) {
	w, err := newTxWorker(e, src, udp)
	if err != nil {
		return nil, err
	}
	e.tx = append(e.tx, w)
	if e.cfg.Impair.Active() {
		if err := impairWorker(w, e.cfg.Impair, uint64(len(e.tx))); err != nil {
			return nil, err
		}
	}
	p, err := newPair(w, rx)
	if err != nil {
		return nil, err
	}
	e.pairs = append(e.pairs, p)
	return p, nil
}

// probe binds the address alone for a moment, and settles port 0.
func (e *Engine) probe(l *Listen) error {
	s, err := encap.Listen(encap.SocketConfig{Addr: l.Addr})
	if err != nil {
		return err
	}
	defer s.Close()
	l.Addr, err = s.LocalAddr()
	return err
}

func (e *Engine) socket(cfg encap.SocketConfig) (*encap.Socket, error) {
	cfg.Offload = e.offload() != tun.OffloadNone
	s, err := encap.Listen(cfg)
	if err == nil {
		e.sockets = append(e.sockets, s)
	}
	return s, err
}

// offload returns the rung in use.
func (e *Engine) offload() tun.Offload {
	if e.cfg.Device != nil {
		return e.cfg.Device.Offload()
	}
	return e.cfg.Offload
}

// Listening returns the framings received and the addresses they are bound to.
func (e *Engine) Listening() []Listen { return e.cfg.Listen }

// Apply makes s the snapshot in force. When s is refused, the last one stays.
func (e *Engine) Apply(s Snapshot) error {
	e.apply.Lock()
	defer e.apply.Unlock()
	if !s.Local.Subnet.Addr().Is4() || !s.Local.Addr.Is4() {
		return fmt.Errorf("engine: own subnet %v and address %v: expected IPv4", s.Local.Subnet, s.Local.Addr)
	}
	t, err := table.Build(s.Local, s.Peers, e.view.Load().table)
	if err != nil {
		return fmt.Errorf("engine: snapshot %d: %w", s.Revision, err)
	}
	if e.bypass != nil {
		e.bypass.Retract(s.Local, s.Peers)
	}
	e.view.Store(&view{
		snapshot: s,
		table:    t,
		base:     addrBits(s.Local.Subnet.Masked().Addr()),
		mask:     ^uint32(uint64(1)<<(32-s.Local.Subnet.Bits()) - 1),
		addr:     addrBits(s.Local.Addr),
		vxlan:    encap.NewVXLANReceiver(s.Local.VNI, s.Local.MAC),
		ports:    e.view.Load().ports,
	})
	if e.bypass != nil {
		e.bypass.Follow(s.Local, s.Peers)
	}
	return nil
}

// Snapshot returns the snapshot in force. The caller must not change its peers.
func (e *Engine) Snapshot() Snapshot { return e.view.Load().snapshot }

// Table returns the table in force.
func (e *Engine) Table() *table.Table { return e.view.Load().table }

// Lookup returns the peer a packet to addr is sent to.
func (e *Engine) Lookup(addr netip.Addr) (table.Peer, bool) {
	if !addr.Is4() {
		return table.Peer{}, false
	}
	if p := e.view.Load().table.Lookup(addrBits(addr)); p != nil {
		return p.Peer, true
	}
	return table.Peer{}, false
}

// RetrySegmentation lets the sockets and the destinations that gave up UDP_SEGMENT
// try it again. It reports whether there were any. A try that fails costs a system
// call and loses nothing.
func (e *Engine) RetrySegmentation() (retried bool) {
	e.apply.Lock()
	defer e.apply.Unlock()
	for _, s := range e.sockets {
		retried = s.RetrySegmentation() || retried
	}
	entries := e.Table().Entries()
	for i := range entries {
		retried = entries[i].Dest.RetrySegmentation() || retried
	}
	return retried
}

// Start starts the workers.
func (e *Engine) Start() error {
	e.apply.Lock()
	defer e.apply.Unlock()
	e.started = true
	for _, p := range e.pairs {
		e.startPair(p)
	}
	return nil
}

func (e *Engine) startPair(p *pair) {
	// Each worker occupies a thread, mostly inside a system call. With fewer
	// processors than that, a packet waits until the scheduler notices.
	if need := len(e.tx) + len(e.rx) + 2; runtime.GOMAXPROCS(0) < need {
		runtime.GOMAXPROCS(need)
	}
	e.work(p.transmit)
	for i := range p.rx {
		e.work(func() error { return p.receive(i) })
	}
}

func (e *Engine) work(run func() error) {
	e.running.Go(func() {
		runtime.LockOSThread()
		err := run()
		if err == nil || e.closing.Load() || errors.Is(err, encap.ErrClosed) {
			return
		}
		select {
		case e.failed <- err:
		default:
		}
	})
}

// Failed delivers the error of the first worker that had to stop, such as
// tun.ErrGone. The engine forwards nothing useful after that and should be
// closed and made anew.
func (e *Engine) Failed() <-chan error { return e.failed }

// Close stops the workers and closes the sockets and the ports' queues. The
// device stays open.
func (e *Engine) Close() error {
	e.apply.Lock()
	defer e.apply.Unlock()
	e.closing.Store(true)
	for _, p := range e.pairs {
		p.stop()
	}
	e.replay.stop()
	e.running.Wait()
	return e.free()
}

func (e *Engine) free() error {
	var errs []error
	for _, w := range e.tx {
		errs = append(errs, w.batch.Free())
		if w.impaired != nil {
			errs = append(errs, w.impaired.close())
		}
	}
	for _, w := range e.rx {
		if w.batch != nil {
			errs = append(errs, w.batch.Free())
		}
	}
	if e.replay.in != nil {
		errs = append(errs, e.replay.in.Free())
	}
	for _, p := range e.pairs {
		errs = append(errs, p.free())
	}
	for _, s := range e.sockets {
		errs = append(errs, s.Close())
	}
	for _, p := range e.view.Load().ports {
		errs = append(errs, p.Queue.Close())
	}
	if e.ports != nil {
		errs = append(errs, e.ports.close())
	}
	e.tx, e.rx, e.pairs, e.sockets = nil, nil, nil, nil
	return errors.Join(errs...)
}

func addrBits(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}
