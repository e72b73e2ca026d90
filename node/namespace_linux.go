package node

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// A network namespace belongs to a thread. A node lives in the namespace of
// the thread that called Run; work that runs elsewhere and opens sockets or
// starts programs (iptables) has to be put there explicitly.

// netNS is an open handle on a network namespace.
type netNS struct {
	f        *os.File
	dev, ino uint64
}

func currentNetNS() (*netNS, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	return &netNS{f: f, dev: st.Dev, ino: st.Ino}, nil
}

func (n *netNS) close() { n.f.Close() }

// run starts f in a goroutine on a thread of the namespace. When the process
// as a whole lives in another one, the thread is moved and dies with f.
func (n *netNS) run(f func(err error)) {
	go func() {
		var st unix.Stat_t
		if err := unix.Stat("/proc/self/ns/net", &st); err == nil && st.Dev == n.dev && st.Ino == n.ino {
			f(nil)
			return
		}
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		f(unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNET))
	}()
}
