package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

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
	ever  int        // how many were attached by request since the start
	// lost says what an earlier run's attachments became that could not be
	// taken back.
	lost []string
	// problem is why the state file is not up to date.
	problem string
	closed  bool
	// memoryLimit is how much memory there is, in bytes.
	memoryLimit func() uint64
}

// attachment is one container, or one program with a network stack of its own.
type attachment struct {
	savedAttachment
	target *netns.Target // nil for a program
	// superPackets says that a program takes them.
	superPackets bool
	// sharedMemory says that a program takes a ring.
	sharedMemory bool
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
	a := &attachments{log: log, path: filepath.Join(dir, attachmentsFile), all: map[string]*attachment{}, kick: make(chan struct{}, 1),
		memoryLimit: func() uint64 { return memoryLimit("/") }}
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
		var look <-chan time.Time
		if a.any() {
			look = tick.C
		}
		select {
		case <-a.ctx.Done():
			return
		case <-a.kick:
		case <-look:
		}
		a.reconcile()
	}
}

// any reports whether there is an attachment. One that is added wakes run.
func (a *attachments) any() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.all) > 0
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
	}, superPackets: r.SuperPackets, sharedMemory: r.SharedMemory}
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
	a.ever++
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
	a.wake()
	return nil
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
