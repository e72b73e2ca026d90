package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"tweed/attach"
	"tweed/engine"
	"tweed/netns"
	"tweed/tun"
)

// socketBuffer is what a program's socket asks for, in bytes.
const socketBuffer = 4 << 20

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
		return a.connectProgram(t, t.superPackets && link.GSOMaxSize > 0)
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
		if r := t.made.Queue.Ring; r != nil {
			r.Close()
		}
		t.made = nil
	}
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

// connectProgram connects to a program, with shared memory if it takes that and
// there is any.
func (a *attachments) connectProgram(t *attachment, super bool) (*attach.Made, error) {
	made, err := connectSocket(t.Socket, super)
	if err != nil || !t.sharedMemory {
		return made, err
	}
	if err := a.roomForRing(); err != nil {
		a.log.Warn("no shared memory; packets take the socket", "name", t.Name, "err", err)
		return made, nil
	}
	ring, memory, err := tun.NewRing()
	if err == nil {
		// One message, of one byte, with the descriptor.
		err = unix.Sendmsg(int(made.File.Fd()), []byte{0}, unix.UnixRights(memory), nil, unix.MSG_NOSIGNAL)
		unix.Close(memory)
		if err != nil {
			ring.Close()
		}
	}
	if err != nil {
		a.log.Warn("no shared memory; packets take the socket", "name", t.Name, "err", err)
		return made, nil
	}
	made.Queue.Ring = ring
	return made, nil
}

// connectSocket connects to a program that has a network stack of its own and
// listens for us.
func connectSocket(path string, super bool) (*attach.Made, error) {
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
	made := &attach.Made{
		File: os.NewFile(uintptr(fd), path), Tier: attach.TierNetstack,
		Queue:         tun.FDConfig{Offload: tun.OffloadNone},
		OffloadReason: "the program's own network stack takes single packets",
	}
	if super {
		made.Queue.Offload = tun.OffloadTSO
		made.OffloadReason = "the program's own network stack takes super-packets of TCP"
	}
	return made, nil
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
