package accel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tweed/engine"
	"tweed/engine/table"
)

// netlinkTimeout is how long the kernel's answer to one question is waited for.
const netlinkTimeout = 5 * time.Second

// ErrUnsupported is wrapped by the errors of a kernel that is too old or lacks BPF.
var ErrUnsupported = errors.New("not supported by this kernel")

// Config is what an Accelerator is made of. All of it is fixed for its lifetime.
type Config struct {
	// TUN and Underlay are the interface indexes of the two ends, in the network
	// namespace of the thread that calls New.
	TUN, Underlay int
	// Local is the IPv4 address datagrams come from and are received at.
	Local netip.Addr
	// VXLANPort and UDPPort are the UDP ports of the framings that are
	// received; 0 stands for a framing that is not.
	VXLANPort, UDPPort uint16
	// Sources are the source ports of what is sent, those of the workers.
	Sources engine.SourcePorts
	// Whole says that the underlay link carries super-packets without cutting
	// them. On other links they are left to the workers, whose datagrams the
	// receiver's kernel can merge again.
	Whole bool
	// MTU is the overlay's, in bytes.
	MTU int
	// Source is the underlay's Ethernet address.
	Source [6]byte
	// Way returns the index of the interface the route to an underlay address
	// leads through, and the neighbour it leads to first; an invalid one leaves
	// that to the kernel. Peers that are not reached through Underlay are not served.
	Way func(netip.Addr) (index int, hop netip.Addr)
	// Refused counts the writes to the TUN device that the kernel has among the
	// packets it dropped there; nil for none.
	Refused func() uint64
}

// Accelerator is a pair of attached programs and their maps. Its methods are
// safe for concurrent use. It implements engine.Bypass.
type Accelerator struct {
	cfg   Config
	objs  accelObjects
	links []link.Link
	nl    *netlink.Handle

	mu     sync.Mutex
	local  table.Local
	peers  []table.Peer
	mirror mirror
	hops   hops
	// watching is closed to end the subscription to the kernel's neighbours; nil
	// without one.
	watching chan struct{}
	duty     engine.Duty
	holds    []string
	config   accelConfig // as last written
	// watched is the observation that runs, nil without one, and snap what it wants.
	watched *observation
	snap    uint32
	// lost is the TUN's count of packets dropped before delivery when we came,
	// dropped the one last read.
	lost, dropped uint64
	failed        error  // of the last write to a map
	settle        func() // settle, but for tests
}

// New loads and attaches the programs. They serve nobody until Follow is
// called. The error says what the host lacks.
func New(cfg Config) (*Accelerator, error) {
	a := &Accelerator{cfg: cfg, settle: settle}
	if err := a.open(); err != nil {
		a.Close()
		return nil, fmt.Errorf("accelerator: %w", err)
	}
	return a, nil
}

func (a *Accelerator) open() error {
	_ = rlimit.RemoveMemlock() // needed before Linux 5.11 only
	if err := loadAccelObjects(&a.objs, nil); err != nil {
		return explain("load BPF programs", err)
	}
	a.mirror = newMirror(a.objs.Peers)
	if err := a.hops.open(a.objs.Hops.FD(), a.objs.Hops.MaxEntries()); err != nil {
		return err
	}
	for _, at := range []struct {
		what   string
		index  int
		prog   *ebpf.Program
		attach ebpf.AttachType
	}{
		{"egress of the TUN device", a.cfg.TUN, a.objs.Send, ebpf.AttachTCXEgress},
		{"ingress of the underlay interface", a.cfg.Underlay, a.objs.Receive, ebpf.AttachTCXIngress},
	} {
		l, err := link.AttachTCX(link.TCXOptions{Interface: at.index, Program: at.prog, Attach: at.attach})
		if err != nil {
			return explain("attach to the "+at.what, err)
		}
		a.links = append(a.links, l)
	}
	var err error
	if a.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	if err := a.nl.SetSocketTimeout(netlinkTimeout); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	a.lost = a.backlogDrops()
	a.dropped = a.lost
	a.watchNeighbours()
	return nil
}

// explain turns the usual errors into what is missing.
func explain(what string, err error) error {
	var verifier *ebpf.VerifierError
	switch {
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) && (!errors.As(err, &verifier) || !mayComparePointers()):
		return fmt.Errorf("%s: %w (needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN in the initial user namespace)", what, unix.EPERM)
	case errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%s: %w (needs Linux 6.6 with tcx)", what, ErrUnsupported)
	case errors.As(err, &verifier):
		return fmt.Errorf("%s: %w (refused by the verifier: %w)", what, ErrUnsupported, verifier.Cause)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// mayComparePointers reports whether the verifier lets the calling thread's
// programs do what ours do: without CAP_PERFMON it takes a comparison of a
// pointer for a leak.
func mayComparePointers() bool {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&head, &data[0]) != nil {
		return true
	}
	return data[1].Effective&(1<<(unix.CAP_PERFMON-32)) != 0 || data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

// Close detaches the programs. Packets on their way are not lost.
func (a *Accelerator) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unobserve()
	if a.watching != nil {
		close(a.watching)
		a.watching = nil
	}
	var errs []error
	for _, l := range a.links {
		errs = append(errs, l.Close())
	}
	if a.nl != nil {
		a.nl.Close()
	}
	a.links, a.nl = nil, nil
	a.hops.close()
	return errors.Join(append(errs, a.objs.Close())...)
}

// Retract implements engine.Bypass.
func (a *Accelerator) Retract(local table.Local, peers []table.Peer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if local != a.local {
		// What all entries rest on changes: nothing is a hit until Follow.
		a.local = table.Local{}
		a.configure()
	}
	a.retract(a.entries(peers))
}

// retract takes away what want says otherwise, and waits for the programs that
// may still hold such an entry.
func (a *Accelerator) retract(want map[netip.Prefix]accelPeer) {
	a.check(a.mirror.retract(want))
	if a.mirror.took {
		a.mirror.took = false
		a.settle()
	}
}

// Follow implements engine.Bypass.
func (a *Accelerator) Follow(local table.Local, peers []table.Peer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.local, a.peers = local, slices.Clone(peers)
	a.enter(a.entries(peers))
	a.configure()
}

// enter adds what is missing after retract.
func (a *Accelerator) enter(want map[netip.Prefix]accelPeer) {
	a.check(a.mirror.enter(want))
	used := map[uint32]bool{}
	for _, e := range a.mirror.entered {
		used[e.Hop] = true
	}
	a.hops.release(used)
	if a.hops.added {
		a.learnNeighbours()
	}
}

// Refresh looks again at the ways to all peers, from a thread in the network
// namespace of New.
func (a *Accelerator) Refresh() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hops.doubted = false
	if a.watching == nil {
		a.watchNeighbours()
	}
	want := a.entries(a.peers)
	a.retract(want)
	a.enter(want)
	a.learnNeighbours()
}

// check takes the programs off duty for good when a map could not be written:
// their table is not what it should be.
func (a *Accelerator) check(err error) {
	if err != nil && a.failed == nil {
		a.failed = err
		a.configure()
	}
}

// SetDuty implements engine.Bypass.
func (a *Accelerator) SetDuty(d engine.Duty) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.duty = d
	a.configure()
}

// Hold takes the programs off duty for the given reasons, and back on duty when
// there are none.
func (a *Accelerator) Hold(reasons []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.holds = slices.Clone(reasons)
	a.configure()
}

// configure writes the config if it changed. When a program goes off duty, it
// returns after the last packet it carried.
func (a *Accelerator) configure() {
	c := a.configFor()
	if c == a.config {
		return
	}
	if err := a.objs.Configs.Put(uint32(0), c); err != nil {
		if a.failed == nil {
			a.failed = err
		}
		return
	}
	off := a.config.Flags &^ c.Flags & (flagSending | flagReceiving)
	a.config = c
	if off != 0 {
		a.settle()
	}
}

// settle waits until no program runs that could have read an old config: the
// global barrier is an RCU grace period (membarrier(2)).
func settle() {
	const membarrierCmdGlobal = 1 << 0
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierCmdGlobal, 0, 0); errno != 0 {
		time.Sleep(20 * time.Millisecond) // nohz_full refuses it
	}
}

// State says whether the programs are on duty and, if not, why.
func (a *Accelerator) State() (on bool, why string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.failed != nil:
		return false, a.failed.Error()
	case len(a.holds) > 0:
		return false, strings.Join(a.holds, "; ")
	case !a.duty.Send:
		return false, a.duty.Why
	}
	return true, a.duty.Why
}

// Traffic implements engine.Bypass.
func (a *Accelerator) Traffic() (tx, rx engine.Direction) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var perCPU []accelCounters
	if err := a.objs.Counted.Lookup(uint32(0), &perCPU); err != nil {
		return tx, rx
	}
	for _, c := range perCPU {
		tx.Delivered += c.Sent
		tx.DeliveredBytes += c.SentBytes
		tx.Drops[engine.TxEncapError] += c.Failed
		rx.Packets += c.Received
		rx.Bytes += c.ReceivedBytes
	}
	tx.Packets, tx.Bytes = tx.Delivered+tx.Drops[engine.TxEncapError], tx.DeliveredBytes
	a.dropped = max(a.dropped, a.backlogDrops())
	lost := min(a.dropped-a.lost, rx.Packets)
	rx.Drops[engine.RxBacklog] = lost
	rx.Delivered, rx.DeliveredBytes = rx.Packets-lost, rx.Bytes
	return tx, rx
}

// backlogDrops is how many packets the kernel dropped between the receive
// program and the stack, because the CPU's backlog was full or the device down,
// as far as is known: a device that is gone tells nothing.
func (a *Accelerator) backlogDrops() uint64 {
	if a.nl == nil {
		return a.dropped
	}
	l, err := a.nl.LinkByIndex(a.cfg.TUN)
	if err != nil || l.Attrs().Statistics == nil {
		return a.dropped
	}
	n := l.Attrs().Statistics.RxDropped
	if a.cfg.Refused != nil {
		n -= min(n, a.cfg.Refused())
	}
	return n
}

var _ engine.Bypass = (*Accelerator)(nil)
