// Package netns makes and uses network namespaces without any outside tool:
// anonymous ones that live as long as a file descriptor or a process holds
// them, named ones pinned to a path, and the switched network of nodes that
// the demo and the tests run on.
//
// A Go program has many threads and a network namespace belongs to a thread,
// so nothing here changes the namespace of the caller: [Namespace.Do] runs a
// function on a thread of its own, and a [Launcher] starts processes from one.
//
// Everything works as root, and as root of a user namespace: see [Elevate] for
// how a program without privileges becomes that.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNotNamespace is returned for a path that is no network namespace.
var ErrNotNamespace = errors.New("not a network namespace")

// Namespace is an open handle on a network namespace. It may be used by
// several goroutines at once, but not during or after Close.
type Namespace struct {
	file *os.File
}

// New makes an anonymous network namespace with its loopback up. It lasts
// until the last handle is closed and the last process inside has ended.
// It needs CAP_SYS_ADMIN in the current user namespace.
func New() (*Namespace, error) {
	var made *Namespace
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return explainCreate(err)
		}
		var err error
		if made, err = Current(); err != nil {
			return err
		}
		return loopbackUp()
	})
	if err != nil {
		if made != nil {
			made.Close()
		}
		return nil, fmt.Errorf("netns: create: %w", err)
	}
	return made, nil
}

// Open opens the namespace at path: a pin, an entry of /run/netns, or
// /proc/PID/ns/net.
func Open(path string) (*Namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("netns: %w", err)
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("netns: %s: %w", path, ErrNotNamespace)
	}
	return &Namespace{file: f}, nil
}

// OfProcess opens the namespace process pid runs in.
func OfProcess(pid int) (*Namespace, error) {
	return Open(fmt.Sprintf("/proc/%d/ns/net", pid))
}

// Current opens the namespace of the calling thread. Without
// runtime.LockOSThread that is the program's own in all ordinary code.
func Current() (*Namespace, error) { return Open("/proc/thread-self/ns/net") }

// Close gives the handle up. Closing twice does nothing.
func (n *Namespace) Close() error {
	if err := n.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// File is the open handle, to be passed to a child process in
// exec.Cmd.ExtraFiles, which then keeps the namespace alive. It is still owned
// by the Namespace.
func (n *Namespace) File() *os.File { return n.file }

// ID is the namespace's inode number on nsfs, unique among the namespaces that
// exist at one time.
func (n *Namespace) ID() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(n.file.Fd()), &st); err != nil {
		return 0, fmt.Errorf("netns: %w", err)
	}
	return st.Ino, nil
}

// Do runs fn on an operating system thread that is inside the namespace, and
// returns what fn returned. What fn opens there (sockets, TUN devices, netlink
// handles) stays in the namespace and may be used anywhere afterwards; code
// that fn starts on other goroutines does not run in the namespace.
func (n *Namespace) Do(fn func() error) error {
	return onThread(func() error {
		if err := n.join(); err != nil {
			return err
		}
		return fn()
	})
}

// Netlink opens a NETLINK_ROUTE handle inside the namespace. The caller
// closes it.
func (n *Namespace) Netlink() (*netlink.Handle, error) {
	var h *netlink.Handle
	err := n.Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("netns: netlink: %w", err)
	}
	return h, nil
}

// Pin gives the namespace a path by a bind mount, as `ip netns add` does, so
// that it outlives every process and handle until [Unpin]. The parent folder
// must exist; path must not. It needs CAP_SYS_ADMIN over the mount namespace,
// which root of a fresh user namespace does not have.
func (n *Namespace) Pin(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("netns: pin: %w", err)
	}
	f.Close()
	from := fmt.Sprintf("/proc/self/fd/%d", n.file.Fd())
	if err := unix.Mount(from, path, "", unix.MS_BIND, ""); err != nil {
		os.Remove(path)
		return fmt.Errorf("netns: pin at %s: %w", path, err)
	}
	return nil
}

// Unpin undoes [Namespace.Pin]. A path that does not exist is no error.
func Unpin(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("netns: unpin %s: %w", filepath.Clean(path), err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("netns: unpin: %w", err)
	}
	return nil
}

// join moves the calling thread, which must be locked, into the namespace.
func (n *Namespace) join() error {
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("netns: enter: %w", err)
	}
	return nil
}

// onThread runs fn on a locked thread and puts the thread's network namespace
// back afterwards. If that fails the goroutine ends while still locked, which
// makes the runtime discard the thread instead of handing a displaced one to
// other code.
func onThread(fn func() error) error {
	result := make(chan error, 1)
	go func() {
		// fn may end its goroutine (runtime.Goexit, as testing's FailNow does);
		// the caller must not wait for ever then.
		err := errors.New("netns: the function ended its goroutine")
		defer func() { result <- err }()
		runtime.LockOSThread()
		home, herr := Current()
		if herr != nil {
			err = herr
			runtime.UnlockOSThread()
			return
		}
		defer home.Close()
		defer func() {
			if home.join() == nil {
				runtime.UnlockOSThread()
			}
		}()
		err = fn()
	}()
	return <-result
}

func loopbackUp() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	return nil
}

func explainCreate(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w (needs CAP_SYS_ADMIN: run as root or in a user namespace)", err)
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w (limit reached: raise it with `sysctl -w user.max_net_namespaces=16384`)", err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w (this kernel has no network namespaces: CONFIG_NET_NS)", err)
	}
	return err
}
