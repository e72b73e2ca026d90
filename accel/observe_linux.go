package accel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"tweed/engine"
)

const (
	// tapRing is the size of the ring between the programs and an observer, in
	// bytes: room for 32 super-packets.
	tapRing = 2 << 20
	// tapIdle is how long the observer's thread sleeps when the ring is empty.
	// Nobody wakes it, because that would cost the programs time.
	tapIdle = time.Millisecond
	// tapLag is how long a program may take from reading the clock to making its
	// record visible.
	tapLag = time.Millisecond
	// tapNice is the niceness of that thread, that of package capture's.
	tapNice = 19
)

// observation is what runs while somebody observes.
type observation struct {
	observer engine.Observer
	ring     *ebpf.Map
	reader   *ringbuf.Reader
	// epoch is the wall clock less the clock of the programs, in ns.
	epoch   int64
	carried engine.Carried // shown last
	lost    [2]uint64      // told to the observer so far: sent, received
	thread  atomic.Int32   // of run, once it is at work
	stop    chan struct{}
	done    chan struct{}
}

// Observe implements engine.Bypass.
func (a *Accelerator) Observe(o engine.Observer, snap int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unobserve()
	if o == nil {
		return nil
	}
	ob := &observation{observer: o, stop: make(chan struct{}), done: make(chan struct{})}
	err := ob.open(&a.objs)
	if err != nil {
		return fmt.Errorf("accelerator: observe: %w", err)
	}
	ob.lost[0], ob.lost[1] = a.unseen()
	a.watched, a.snap = ob, uint32(max(snap, 1))
	a.configure()
	go ob.run(a)
	return nil
}

// unobserve ends an observation after every packet carried under it was handed
// over or counted.
func (a *Accelerator) unobserve() {
	ob := a.watched
	if ob == nil {
		return
	}
	a.watched, a.snap = nil, 0
	a.configure()
	settle()
	close(ob.stop)
	// The caller waits, and snapshots wait for the caller: not at low priority.
	if tid := ob.thread.Load(); tid != 0 {
		_ = unix.Setpriority(unix.PRIO_PROCESS, int(tid), 0)
	}
	<-ob.done
	ob.close(&a.objs)
}

func (ob *observation) open(objs *accelObjects) (err error) {
	var wall, mono unix.Timespec
	if err := errors.Join(unix.ClockGettime(unix.CLOCK_REALTIME, &wall), unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono)); err != nil {
		return err
	}
	ob.epoch = wall.Nano() - mono.Nano()
	if ob.ring, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: tapRing}); err != nil {
		return fmt.Errorf("ring of %d bytes: %w", tapRing, err)
	}
	if ob.reader, err = ringbuf.NewReader(ob.ring); err != nil {
		return errors.Join(err, ob.ring.Close())
	}
	ob.reader.SetDeadline(time.Unix(1, 0)) // never wait for the programs to wake us
	if err := objs.Taps.Put(uint32(0), ob.ring); err != nil {
		return errors.Join(err, ob.reader.Close(), ob.ring.Close())
	}
	return nil
}

func (ob *observation) close(objs *accelObjects) {
	_ = objs.Taps.Delete(uint32(0))
	_ = ob.reader.Close()
	_ = ob.ring.Close()
}

// run hands packets over until stop, and then what is left.
func (ob *observation) run(a *Accelerator) {
	// The thread is not unlocked, so it ends with the goroutine and takes its
	// priority along.
	runtime.LockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, tapNice)
	ob.thread.Store(int32(unix.Gettid()))
	defer close(ob.done)
	var rec ringbuf.Record
	for stopping := false; ; {
		n, until := 0, time.Now().Add(-tapLag).UnixNano()
		for ; n < 256; n++ {
			if err := ob.reader.ReadInto(&rec); err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					return
				}
				break
			}
			ob.hand(rec.RawSample)
		}
		ob.tellLost(a)
		if n > 0 {
			// Not empty yet: complete only up to the last one.
			ob.observer.Flush(ob.carried.Time)
			continue
		}
		if stopping {
			ob.observer.Flush(math.MaxInt64)
			return
		}
		ob.observer.Flush(until)
		select {
		case <-ob.stop:
			stopping = true // what came before is in the ring
		case <-time.After(tapIdle):
		}
	}
}

// hand gives one sample to the observer.
func (ob *observation) hand(raw []byte) {
	const head = int(unsafe.Sizeof(accelSample{}))
	if len(raw) < head {
		return
	}
	s, data := (*accelSample)(unsafe.Pointer(unsafe.SliceData(raw))), raw[head:]
	ob.carried = engine.Carried{
		Time:    int64(s.Time) + ob.epoch,
		Receive: s.Receive != 0,
		Peer:    host32(s.Peer), PeerPort: host16(s.PeerPort),
		Local: host32(s.Local), LocalPort: host16(s.LocalPort),
		ECN: s.Ecn, PrefixLen: int(s.Prefix), SegmentPayload: int(s.Gso),
		Length: int(s.Length), Data: data[:min(len(data), int(s.Stored))],
	}
	ob.observer.Carried(&ob.carried)
}

// tellLost tells the observer what the ring had no room for.
func (ob *observation) tellLost(a *Accelerator) {
	sent, received := a.unseen()
	if n := sent - ob.lost[0]; n > 0 {
		ob.observer.Missed(false, n)
	}
	if n := received - ob.lost[1]; n > 0 {
		ob.observer.Missed(true, n)
	}
	ob.lost = [2]uint64{sent, received}
}

// unseen are the packets a capture missed since the beginning.
func (a *Accelerator) unseen() (sent, received uint64) {
	var perCPU []accelCounters
	if err := a.objs.Counted.Lookup(uint32(0), &perCPU); err != nil {
		return 0, 0
	}
	for _, c := range perCPU {
		sent += c.UnseenSent
		received += c.UnseenReceived
	}
	return sent, received
}

// host32 and host16 return the value of a field in network byte order.
func host32(v uint32) uint32 {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], v)
	return binary.BigEndian.Uint32(b[:])
}

func host16(v uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], v)
	return binary.BigEndian.Uint16(b[:])
}
