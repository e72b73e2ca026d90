package node

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Two engines must not share a UDP port or a TUN name of one network
// namespace: SO_REUSEPORT would silently hand the second one half of the
// first one's datagrams. An abstract unix socket is the lock: its names are
// per network namespace, it vanishes with its process however that ends, and
// the kernel tells who holds it.
type nsLock struct{ l *net.UnixListener }

// An engine that was just killed holds its locks until the kernel has closed
// all its files, which takes as long as removing its TUN device does.
const (
	// lockPatience is how long a start waits for the one before it to be gone.
	lockPatience = time.Second
	lockInterval = 10 * time.Millisecond
	// lockGrace is for what the dying process closes after the lock.
	lockGrace = 50 * time.Millisecond
)

// awaitLock repeats try while it reports that the lock is held, for a while.
func awaitLock(try func() (held bool, err error)) error {
	held, err := try()
	for end := time.Now().Add(lockPatience); held && time.Now().Before(end); {
		time.Sleep(lockInterval)
		if held, err = try(); !held {
			time.Sleep(lockGrace)
		}
	}
	return err
}

// lockNamespace takes the lock called name in the network namespace of the
// calling thread. The error names what is locked and the holder's pid.
func lockNamespace(name, what string) (*nsLock, error) {
	addr := &net.UnixAddr{Net: "unix", Name: "@tweed/" + name}
	var l *net.UnixListener
	err := awaitLock(func() (held bool, err error) {
		l, err = net.ListenUnix("unix", addr)
		return errors.Is(err, unix.EADDRINUSE), err
	})
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("%s is in use by another engine%s in this network namespace", what, holderOf(addr))
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", what, err)
	}
	k := &nsLock{l: l}
	go k.answer()
	return k, nil
}

// answer empties the accept queue: who connects only wants our credentials.
func (k *nsLock) answer() {
	for {
		c, err := k.l.Accept()
		if err != nil {
			return
		}
		c.Close()
	}
}

func (k *nsLock) release() {
	if k != nil {
		k.l.Close()
	}
}

// holderOf returns " (pid N)" for the process listening on addr, or "" when it
// cannot be told (another pid namespace, or gone by now).
func holderOf(addr *net.UnixAddr) string {
	c, err := net.DialUnix("unix", nil, addr)
	if err != nil {
		return ""
	}
	defer c.Close()
	cred, err := peerCred(c)
	if err != nil || cred.Pid == 0 {
		return ""
	}
	return fmt.Sprintf(" (pid %d)", cred.Pid)
}

// peerCred returns who is at the other end of a unix socket: for a client the
// process that called listen, for a server the one that connected.
func peerCred(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var opErr error
	err = raw.Control(func(fd uintptr) {
		cred, opErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return cred, errors.Join(err, opErr)
}

// dirLock keeps two engines in different namespaces from sharing one state
// directory. flock on the directory itself needs no extra file.
type dirLock struct{ f *os.File }

func lockDir(dir, socket string) (*dirLock, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	err = awaitLock(func() (held bool, err error) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		return errors.Is(err, unix.EWOULDBLOCK), err
	})
	if err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("state directory %s is in use by another engine%s: give each engine its own --state-dir or --tun-name",
				dir, holderOf(&net.UnixAddr{Net: "unix", Name: filepath.Clean(socket)}))
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return &dirLock{f: f}, nil
}

func (d *dirLock) release() {
	if d != nil {
		d.f.Close()
	}
}
