package engine

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A pair is what serves one queue: the transmit worker, the receive workers
// and the threads that run them.
//
// Each receive worker has a thread of its own. The transmit worker is run by
// whoever holds it: its own thread while much is sent, otherwise the thread of
// the first receive worker, on the side. Most of what a quiet node sends is an
// answer to what it just received (acknowledgements, echo replies), and waking
// a second thread for it costs more than sending it.
type pair struct {
	tx *txWorker
	rx []*rxWorker

	holder atomic.Int32
	// quiet counts the light rounds since the last heavy one. Only the holder
	// touches it.
	quiet int
	// bell wakes the transmit thread: it holds the worker again, or must stop.
	bell    signal
	stopped atomic.Bool
	// restAfter is the constant, but for tests.
	restAfter time.Duration
}

// Who holds the transmit worker.
const (
	// heldByTx: the transmit thread is at work.
	heldByTx = iota
	// offered: it has been quiet and the transmit thread waits for packets;
	// either may take it.
	offered
	// heldByRx: the receive thread.
	heldByRx
)

const (
	// A round of heavyPackets or heavyBytes is heavy: it deserves a thread.
	heavyPackets = 16
	heavyBytes   = 16 << 10
	// quietRounds light rounds in a row let the receive thread take over.
	quietRounds = 64

	// yieldEvery is how often a thread gives up its processor. A goroutine that
	// never does is preempted in every system call after 10 ms (sysmon).
	yieldEvery = 5 * time.Millisecond

	// restAfter is how long nothing has to come before a thread gives back the
	// memory its buffers have grown by.
	restAfter = 5 * time.Second
	forever   = time.Duration(-1)
)

func newPair(tx *txWorker, rx []*rxWorker) (*pair, error) {
	// The transmit thread holds it at first: an offer before that thread waits
	// could be taken while it reads.
	p := &pair{tx: tx, rx: rx, quiet: quietRounds, restAfter: restAfter}
	var err error
	p.bell, err = newSignal()
	return p, err
}

// transmit is the transmit thread.
func (p *pair) transmit() error {
	var y yielder
	c := newCourtesy()
	for !p.stopped.Load() {
		if p.holder.Load() == heldByRx {
			if _, _, err := wait(-1, p.bell.fd, forever); err != nil {
				return err
			}
			p.bell.clear()
			continue
		}
		n, err := p.serve()
		if err != nil {
			return err
		}
		y.tick()
		if n > 0 {
			c.round(p.tx.batch.Flooded())
			continue
		}
		if i := p.tx.impaired; i != nil && i.more {
			continue // it kept all that there was, and its ports are not asleep
		}
		patience := p.patience(p.tx.batch.Grown())
		if p.quiet >= quietRounds {
			p.holder.Store(offered)
		}
		ready, rung, err := wait(p.tx.source.FD(), p.bell.fd, patience)
		if err != nil {
			return err
		}
		if rung {
			p.bell.clear() // or the next wait would not wait
		}
		p.holder.CompareAndSwap(offered, heldByTx)
		if !ready && !rung && p.holder.Load() == heldByTx {
			p.tx.batch.Shrink()
		}
	}
	return nil
}

// patience is how long to wait for packets, given whether there is memory to give
// back when none come.
func (p *pair) patience(grown bool) time.Duration {
	if grown {
		return p.restAfter
	}
	return forever
}

// serve reads and sends once. Only the holder may call it.
func (p *pair) serve() (packets int, err error) {
	n, err := p.tx.serve()
	if n > 0 {
		p.quiet++
		if n >= heavyPackets || p.tx.batch.Size() >= heavyBytes {
			p.quiet = 0
		}
	}
	return n, err
}

// receive is the thread of receive worker i.
func (p *pair) receive(i int) error {
	var y yielder
	w := p.rx[i]
	for {
		y.tick()
		if i == 0 && p.holder.Load() == heldByRx {
			if err := p.duplex(w); err != nil {
				return err
			}
			continue
		}
		n, err := w.sock.Recv(w.batch)
		if err != nil {
			return fmt.Errorf("engine: receive: %w", err)
		}
		w.round(n)
		if i == 0 {
			p.holder.CompareAndSwap(offered, heldByRx)
		}
	}
}

// duplex receives and transmits on one thread until a heavy round.
func (p *pair) duplex(w *rxWorker) error {
	in, out := true, true // what may be ready
	for {
		if in {
			n, err := w.sock.TryRecv(w.batch)
			if err != nil {
				return fmt.Errorf("engine: receive: %w", err)
			}
			if n > 0 {
				w.round(n)
				out = true // the host may have answered already
			}
			in = n > 0 && w.batch.Full()
		}
		if out {
			if _, err := p.serve(); err != nil {
				return err
			}
			if p.quiet == 0 {
				p.holder.Store(heldByTx)
				p.bell.ring()
				return nil
			}
			out = p.tx.source.More(p.tx.batch)
		}
		if in || out {
			continue
		}
		var err error
		patience := p.patience(w.batch.Grown() || p.tx.batch.Grown())
		if in, out, err = wait(w.sock.FD(), p.tx.source.FD(), patience); err != nil {
			return err
		}
		if !in && !out {
			w.batch.Shrink()
			p.tx.batch.Shrink()
		}
	}
}

// stop makes the threads return.
func (p *pair) stop() {
	p.stopped.Store(true)
	p.bell.ring()
	for _, w := range p.rx {
		w.sock.Shutdown()
	}
}

func (p *pair) free() error { return p.bell.close() }

// yielder gives up the processor now and then.
type yielder struct{ last time.Time }

func (y *yielder) tick() {
	if now := time.Now(); now.Sub(y.last) > yieldEvery {
		y.last = now
		runtime.Gosched()
	}
}

// wait blocks until one of two descriptors is readable or in error, -1 standing
// for none, or until so much time has passed. Then neither is ready.
func wait(a, b int, patience time.Duration) (aReady, bReady bool, err error) {
	var limit *unix.Timespec
	if patience != forever {
		t := unix.NsecToTimespec(int64(patience))
		limit = &t
	}
	fds := [2]unix.PollFd{{Fd: int32(a), Events: unix.POLLIN}, {Fd: int32(b), Events: unix.POLLIN}}
	for {
		_, _, e := unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), uintptr(len(fds)),
			uintptr(unsafe.Pointer(limit)), 0, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return false, false, fmt.Errorf("engine: poll: %w", e)
		}
		return fds[0].Revents != 0, fds[1].Revents != 0, nil
	}
}

// signal is an eventfd one thread rings and another waits for.
type signal struct{ fd int }

func newSignal() (signal, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return signal{-1}, fmt.Errorf("engine: eventfd: %w", err)
	}
	return signal{fd}, nil
}

func (s signal) ring() {
	one := [8]byte{0: 1, 7: 1} // not 0 in either byte order
	_, _ = unix.Write(s.fd, one[:])
}

func (s signal) clear() {
	var b [8]byte
	_, _ = unix.Read(s.fd, b[:])
}

func (s signal) close() error {
	if s.fd < 0 {
		return nil
	}
	return unix.Close(s.fd)
}
