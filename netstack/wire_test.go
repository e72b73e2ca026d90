package netstack

import (
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"tweed/tun/ring"
)

// sharedWire is a wire to an engine that does nothing but hold the other end.
func sharedWire(t *testing.T) *wire {
	t.Helper()
	memory, fd, err := ring.New()
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Release()
	defer unix.Close(fd)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[1]) })
	f := os.NewFile(uintptr(fds[0]), "engine")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Sendmsg(fds[1], []byte{0}, unix.UnixRights(fd), nil, 0); err != nil {
		t.Fatal(err)
	}
	w, err := newWire(c.(*net.UnixConn), true)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// TestClosingEndsTheWaitForRoom: an engine that is gone takes nothing out of the
// shared memory any more, and nobody may write to it once it is unmapped.
func TestClosingEndsTheWaitForRoom(t *testing.T) {
	w := sharedWire(t)
	send := func() {
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(make([]byte, 1000))})
		defer p.DecRef()
		w.out.send(p)
	}
	for range ring.Slots {
		send()
	}
	if _, ok := w.out.ring.Reserve(headerLen + 1000); ok {
		t.Fatal("there is room yet")
	}
	done := make(chan struct{})
	go func() {
		send() // waits
		w.report(Stats{})
		send()
		close(done)
	}()
	for w.out.mu.TryLock() { // until it does
		w.out.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	closed := make(chan struct{})
	go func() { w.close(); close(closed) }()
	for what, end := range map[string]chan struct{}{"closing": closed, "sending": done} {
		select {
		case <-end:
		case <-time.After(time.Minute):
			t.Fatalf("%s does not end", what)
		}
	}
	send() // the memory is not mapped any more
}
