package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tweed/attach"
	"tweed/engine"
	"tweed/netns"
	"tweed/tun"
)

const (
	// DefaultIfName is the interface a container gets.
	DefaultIfName = "tweed0"
	// attachCheck is how often interfaces are looked at that somebody may have
	// deleted inside a container, and failed connections are tried again.
	attachCheck = time.Second
	// firstHost is the first address of our subnet that is given away, counted
	// from its base: the base is the host's own and the next one is where
	// flannel's users put a bridge.
	firstHost = 2
	// socketBuffer is what a program's socket asks for, in bytes.
	socketBuffer = 4 << 20
)

// Errors of Attach and Detach that a caller can tell apart.
var (
	// ErrNoSubnet: the node does not forward yet.
	ErrNoSubnet = errors.New("no subnet yet")
	// ErrAttached: the container, or the name, is attached already.
	ErrAttached = errors.New("attached already")
	// ErrNotAttached: there is no attachment of that name.
	ErrNotAttached = errors.New("no such attachment")
	// errBadRequest: the request cannot be meant.
	errBadRequest = errors.New("bad request")
)

// plane is what attachments are made from: the running engine and the overlay
// it forwards for.
type plane struct {
	eng     *engine.Engine
	subnet  netip.Prefix
	network netip.Prefix
	mtu     int // bytes
	gso     int // bytes
	offload tun.Offload
}

// attachments are the containers and programs connected to one node. Changes
// happen one at a time, under ops, since each runs a helper; mu guards the
// fields and is held for moments only. ops is taken first.
type attachments struct {
	log     *slog.Logger
	path    string // of the state file
	ctx     context.Context
	end     context.CancelFunc
	running sync.WaitGroup
	kick    chan struct{}

	ops sync.Mutex

	mu    sync.Mutex
	plane plane
	all   map[string]*attachment
	last  netip.Addr // given away last
	// lost says what an earlier run's attachments became that could not be
	// taken back.
	lost []string
	// problem is why the state file is not up to date.
	problem string
	closed  bool
}

// attachment is one container, or one program with a network stack of its own.
type attachment struct {
	savedAttachment
	target *netns.Target // nil for a program
	// made is nil while there is no interface.
	made *attach.Made
	link attach.Link // as made
	// port is valid while attached, to the engine in the plane.
	port     engine.PortID
	attached bool
	problem  string
	cancel   context.CancelFunc // ends the watch
}

func newAttachments(dir string, log *slog.Logger) *attachments {
	a := &attachments{log: log, path: filepath.Join(dir, attachmentsFile), all: map[string]*attachment{}, kick: make(chan struct{}, 1)}
	a.ctx, a.end = context.WithCancel(context.Background())
	a.restore()
	a.running.Go(a.run)
	return a
}

// follow tells what to attach to. It does not block.
func (a *attachments) follow(p plane) {
	a.mu.Lock()
	changed := a.plane != p
	a.plane = p
	a.mu.Unlock()
	if changed {
		a.wake()
	}
}

func (a *attachments) wake() {
	select {
	case a.kick <- struct{}{}:
	default:
	}
}

// forget takes the engine away, which its owner is about to close. When it
// returns, nothing here uses the engine any more.
func (a *attachments) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.plane.eng = nil
	for _, t := range a.all {
		t.attached = false // the engine closes the queue
	}
}

// close lets go of everything. The state file stays, for the next run to take
// the containers back.
func (a *attachments) close() {
	a.end()
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.ops.Lock()
	for _, t := range a.list() {
		a.release(t)
	}
	a.ops.Unlock()
	a.running.Wait()
}

// run keeps attachments as they should be until close.
func (a *attachments) run() {
	tick := time.NewTicker(attachCheck)
	defer tick.Stop()
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-a.kick:
		case <-tick.C:
		}
		a.reconcile()
	}
}

// reconcile connects what is not connected, connects anew what the overlay has
// changed under, and drops what was deleted inside the container.
func (a *attachments) reconcile() {
	a.ops.Lock()
	defer a.ops.Unlock()
	p := a.current()
	if p.eng == nil || a.ctx.Err() != nil {
		return
	}
	gone := map[engine.PortID]bool{}
	for _, port := range p.eng.Ports() {
		gone[port.ID] = port.Gone
	}
	for _, t := range a.list() {
		switch {
		case t.attached && gone[t.port] && t.Socket != "":
			a.drop(t, "the program has ended")
		case t.attached && (gone[t.port] || t.deleted()):
			a.drop(t, "its interface was deleted in the container")
		case t.made == nil, !t.attached, t.link != a.linkOf(t, p):
			a.reconnect(t, p)
		}
	}
}

func (a *attachments) reconnect(t *attachment, p plane) {
	recovered := t.made == nil
	err := a.connect(a.ctx, t, p)
	switch {
	case err == nil && recovered:
		a.log.Info("container taken back", "name", t.Name, "target", t.what(), "address", t.Addr, "tier", t.made.Tier)
	case errors.Is(err, netns.ErrGone), errors.Is(err, errNotTheSame):
		a.mu.Lock()
		a.lost = append(a.lost, fmt.Sprintf("attachment %s (%s) was not taken back: %v", t.Name, t.what(), err))
		a.mu.Unlock()
		a.drop(t, err.Error())
	case err != nil:
		text := err.Error()
		a.mu.Lock()
		known := t.problem == text
		t.problem = text
		a.mu.Unlock()
		if !known {
			a.log.Warn("container not connected, trying again", "name", t.Name, "target", t.what(), "err", text)
		}
	}
}

// current is the plane to work with.
func (a *attachments) current() plane {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.plane
}

// list is all attachments in order of their addresses.
func (a *attachments) list() []*attachment {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []*attachment
	for _, t := range a.all {
		out = append(out, t)
	}
	slices.SortFunc(out, func(x, y *attachment) int { return x.Addr.Compare(y.Addr) })
	return out
}

// attach connects a container or a program that is not connected yet.
func (a *attachments) attach(ctx context.Context, r AttachRequest) (AttachmentStatus, error) {
	tier, err := r.check()
	if err != nil {
		return AttachmentStatus{}, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	a.ops.Lock()
	defer a.ops.Unlock()
	p := a.current()
	if p.eng == nil {
		return AttachmentStatus{}, fmt.Errorf("the node has %w: wait until tweed status says ready", ErrNoSubnet)
	}
	t := &attachment{savedAttachment: savedAttachment{
		Name: r.Name, IfName: r.IfName, Tier: tier, Since: time.Now().UTC(), Socket: r.Socket,
	}}
	if err := a.open(t, r); err != nil {
		return AttachmentStatus{}, err
	}
	if err := a.admit(t, p, r.Addr); err != nil {
		a.release(t)
		return AttachmentStatus{}, err
	}
	if err := a.connect(ctx, t, p); err != nil {
		a.remove(t)
		return AttachmentStatus{}, err
	}
	a.save()
	a.log.Info("container attached", "name", t.Name, "target", t.what(), "address", t.Addr, "interface", t.IfName, "tier", t.made.Tier)
	a.mu.Lock()
	defer a.mu.Unlock()
	return t.status(), nil
}

// open opens the target of a new attachment and completes its name.
func (a *attachments) open(t *attachment, r AttachRequest) error {
	if r.Socket != "" {
		if t.Name == "" {
			t.Name = a.freeName("netstack")
		}
		return nil
	}
	target, err := netns.OpenTarget(netns.TargetConfig{PID: r.PID, Path: r.Path})
	if err != nil {
		return err
	}
	t.target = target
	t.PID, t.Start, t.Path, t.Netns = target.PID(), target.Start(), target.Path(), target.ID()
	if t.Name == "" {
		t.Name = "pid-" + strconv.Itoa(t.PID)
		if t.Path != "" {
			t.Name = a.freeName(unnameable.ReplaceAllString(filepath.Base(t.Path), "-"))
		}
	}
	return nil
}

var unnameable = regexp.MustCompile(`[^a-zA-Z0-9._-]`)

func (a *attachments) freeName(base string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	name := base
	for i := 2; a.all[name] != nil; i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	return name
}

// admit enters an attachment and gives it an address, unless it is there.
func (a *attachments) admit(t *attachment, p plane, want netip.Addr) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return errors.New("the node is stopping")
	}
	if o := a.all[t.Name]; o != nil {
		return fmt.Errorf("%w: the name %s is %s at %s: choose another --name, or tweed detach %s", ErrAttached, t.Name, o.what(), o.Addr, o.Name)
	}
	for _, o := range a.all {
		if t.Netns != 0 && o.Netns == t.Netns {
			return fmt.Errorf("%w: the container of %s has address %s as %s: tweed detach %s first", ErrAttached, t.what(), o.Addr, o.Name, o.Name)
		}
	}
	addr, err := a.pick(p.subnet, want)
	if err != nil {
		return err
	}
	t.Addr = addr
	a.all[t.Name] = t
	return nil
}

// pick chooses an address of the subnet nobody has; with none wanted the next
// after the one given away last, so that a released address rests as long as
// possible.
func (a *attachments) pick(subnet netip.Prefix, want netip.Addr) (netip.Addr, error) {
	taken := map[netip.Addr]string{}
	for _, o := range a.all {
		taken[o.Addr] = o.Name
	}
	base := subnet.Masked().Addr()
	first := base
	for range firstHost {
		first = first.Next()
	}
	usable := func(ip netip.Addr) bool {
		return subnet.Contains(ip) && !ip.Less(first) && subnet.Contains(ip.Next())
	}
	if want.IsValid() {
		switch {
		case !usable(want):
			return want, fmt.Errorf("%w: address %s: expected one of this node's subnet %s, from %s on", errBadRequest, want, subnet, first)
		case taken[want] != "":
			return want, fmt.Errorf("%w: address %s belongs to %s", ErrAttached, want, taken[want])
		}
		a.last = want
		return want, nil
	}
	ip := a.last
	if !usable(ip) {
		ip = first
	} else if ip = ip.Next(); !usable(ip) {
		ip = first
	}
	for start := ip; ; {
		if taken[ip] == "" && usable(ip) {
			a.last = ip
			return ip, nil
		}
		if ip = ip.Next(); !usable(ip) {
			ip = first
		}
		if ip == start {
			return ip, fmt.Errorf("every address of this node's subnet %s is taken by %d attachments: detach some, or use a larger SubnetLen", subnet, len(taken))
		}
	}
}

// linkOf is the interface t is to have.
func (a *attachments) linkOf(t *attachment, p plane) attach.Link {
	return attach.Link{Name: t.IfName, Addr: t.Addr, Network: p.network, MTU: p.mtu, GSOMaxSize: p.gso, Offload: p.offload}
}

// connect makes the interface, unless it is there as it should be, and hands it
// to the engine. On an error the attachment stays, unconnected.
func (a *attachments) connect(ctx context.Context, t *attachment, p plane) error {
	if !p.subnet.Contains(t.Addr) {
		a.disconnect(t)
		a.mu.Lock()
		addr, err := a.pick(p.subnet, netip.Addr{})
		if err == nil {
			t.Addr = addr
		}
		a.mu.Unlock()
		if err != nil {
			return err
		}
	}
	link := a.linkOf(t, p)
	if t.made != nil && t.link != link {
		a.disconnect(t)
	}
	if t.made == nil {
		made, err := a.makeEnd(ctx, t, link)
		if err != nil {
			return err
		}
		a.mu.Lock()
		t.made, t.link = made, link
		a.mu.Unlock()
	}
	if err := a.plug(t); err != nil {
		return err
	}
	a.watch(t)
	return nil
}

func (a *attachments) makeEnd(ctx context.Context, t *attachment, link attach.Link) (*attach.Made, error) {
	if t.Socket != "" {
		return connectSocket(t.Socket)
	}
	if err := t.reopen(); err != nil {
		return nil, err
	}
	return attach.Make(ctx, t.target, link, t.Tier)
}

// plug hands a copy of the descriptor to the engine.
func (a *attachments) plug(t *attachment) error {
	fd, err := unix.FcntlInt(t.made.File.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("attach %s: %w", t.Name, err)
	}
	q, err := tun.QueueFromFD(fd, t.made.Queue)
	if err != nil {
		unix.Close(fd)
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.plane.eng == nil {
		q.Close()
		return fmt.Errorf("the node has %w", ErrNoSubnet)
	}
	id, err := a.plane.eng.Attach(engine.Port{Name: t.Name, Addr: t.Addr, Queue: q})
	if err != nil {
		q.Close()
		return err
	}
	t.port, t.attached, t.problem = id, true, ""
	return nil
}

// watch lets go of the container when it ends.
func (a *attachments) watch(t *attachment) {
	if t.target == nil || t.cancel != nil {
		return
	}
	var ctx context.Context
	ctx, t.cancel = context.WithCancel(a.ctx)
	target := t.target
	a.running.Go(func() {
		if target.Wait(ctx) != nil {
			return
		}
		a.ops.Lock()
		defer a.ops.Unlock()
		if a.ctx.Err() == nil && ctx.Err() == nil {
			a.drop(t, "the container has ended")
		}
	})
}

// detach removes an attachment by name.
func (a *attachments) detach(name string) error {
	a.ops.Lock()
	defer a.ops.Unlock()
	a.mu.Lock()
	t := a.all[name]
	var have []string
	for n := range a.all {
		have = append(have, n)
	}
	a.mu.Unlock()
	if t == nil {
		slices.Sort(have)
		return fmt.Errorf("%w: %s (have: %s)", ErrNotAttached, name, orNone(strings.Join(have, ", ")))
	}
	a.drop(t, "asked for")
	return nil
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// drop removes an attachment for good.
func (a *attachments) drop(t *attachment, why string) {
	a.remove(t)
	a.save()
	a.log.Info("container detached", "name", t.Name, "target", t.what(), "address", t.Addr, "why", why)
}

// remove releases an attachment and its address.
func (a *attachments) remove(t *attachment) {
	a.release(t)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.all[t.Name] == t {
		delete(a.all, t.Name)
	}
}

// release closes everything an attachment holds open; with the last descriptor
// its interface goes, and the container's namespace is ours no longer.
func (a *attachments) release(t *attachment) {
	a.disconnect(t)
	if t.cancel != nil {
		t.cancel()
		t.cancel = nil
	}
	if t.target != nil {
		t.target.Close()
	}
}

// disconnect takes the port from the engine and closes our end.
func (a *attachments) disconnect(t *attachment) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if t.attached && a.plane.eng != nil {
		if err := a.plane.eng.Detach(t.port); err != nil {
			a.log.Warn("detach", "name", t.Name, "err", err)
		}
	}
	t.attached = false
	if t.made != nil {
		t.made.File.Close()
		t.made = nil
	}
}

// snapshot is what the API shows.
func (a *attachments) snapshot() (list []AttachmentStatus, problems []string) {
	if a == nil {
		return []AttachmentStatus{}, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	list = []AttachmentStatus{}
	for _, t := range a.all {
		list = append(list, t.status())
		if t.problem != "" {
			problems = append(problems, "attachment "+t.Name+": "+t.problem)
		}
	}
	slices.SortFunc(list, func(x, y AttachmentStatus) int { return x.Addr.Compare(y.Addr) })
	problems = append(problems, a.lost...)
	if a.problem != "" {
		problems = append(problems, "attachments not saved: "+a.problem)
	}
	return list, problems
}

// what names the target as a person would.
func (t *attachment) what() string {
	switch {
	case t.Socket != "":
		return "socket " + t.Socket
	case t.Path != "":
		return t.Path
	}
	return "pid " + strconv.Itoa(t.PID)
}

var errNotTheSame = errors.New("another container has its place")

// reopen opens the target again after a restart of the engine, and makes sure
// that it is the same.
func (t *attachment) reopen() error {
	if t.target != nil {
		return nil
	}
	target, err := netns.OpenTarget(netns.TargetConfig{PID: t.PID, Path: t.Path})
	if err != nil {
		return err
	}
	if target.Start() != t.Start || target.ID() != t.Netns {
		target.Close()
		return fmt.Errorf("%s: %w", t.what(), errNotTheSame)
	}
	t.target = target
	return nil
}

// connectSocket connects to a program that has a network stack of its own and
// listens for us.
func connectSocket(path string) (*attach.Made, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("attach: socket: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("attach: %s: nobody listens: %w", path, netns.ErrGone)
		}
		return nil, fmt.Errorf("attach: %s: expected a SEQPACKET unix socket: %w", path, err)
	}
	for _, opt := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, socketBuffer) // as much as net.core.wmem_max allows
	}
	return &attach.Made{
		File: os.NewFile(uintptr(fd), path), Tier: attach.TierNetstack,
		Queue:         tun.FDConfig{Offload: tun.OffloadNone},
		OffloadReason: "the program's own network stack takes single packets",
	}, nil
}

// deleted reports whether the far end of a veth pair is gone; a packet socket
// does not say so when it is read.
func (t *attachment) deleted() bool {
	if t.made == nil || t.made.Tier != attach.TierVeth {
		return false
	}
	sa, err := unix.Getsockname(int(t.made.File.Fd()))
	ll, ok := sa.(*unix.SockaddrLinklayer)
	return err == nil && ok && ll.Ifindex < 1
}
