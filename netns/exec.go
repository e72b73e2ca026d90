package netns

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Exec runs a command inside the target's user and network namespaces, as root
// there and with our standard files, and waits for it. The status is the command's
// own, or 128 and the number of the signal that ended it. SIGINT and SIGQUIT,
// which a terminal sends to both, are left to the command; SIGTERM and SIGHUP are
// passed on. The error is why the command could not be started.
func (t *Target) Exec(argv, env []string) (status int, err error) {
	if t.Foreign() {
		// The command is in a user namespace of ours, as after Elevate.
		env = append(slices.Clone(env), fmt.Sprintf("%s=%d", elevated, os.Getuid()))
	}
	p, err := t.planExec(argv, env)
	if err != nil {
		return 0, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, &JoinError{t.String(), "socket", err, ""}
	}
	defer unix.Close(pair[0])
	p.sock = uintptr(pair[1])
	pid, err := p.start(t.String())
	unix.Close(pair[1])
	if err != nil {
		return 0, err
	}
	// The child's end of the socket closes when the command has been started.
	var report [8]byte
	if n, _ := unix.Read(pair[0], report[:]); n == len(report) {
		reap(pid)
		s := p.stages[report[1]]
		return 0, &JoinError{t.String(), s.name, syscall.Errno(binary.LittleEndian.Uint16(report[2:])), s.fix}
	}
	terminal, ours := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(terminal, unix.SIGINT, unix.SIGQUIT)
	signal.Notify(ours, unix.SIGTERM, unix.SIGHUP)
	defer signal.Stop(terminal)
	defer signal.Stop(ours)
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case s := <-ours:
				_ = unix.Kill(pid, s.(syscall.Signal)) // not reaped before done
			case <-terminal:
			case <-done:
				return
			}
		}
	}()
	var ws unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &ws, 0, nil); err == unix.EINTR {
			continue
		} else if err != nil {
			return 0, fmt.Errorf("netns: wait for %s: %w", argv[0], err)
		}
		break
	}
	if ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return ws.ExitStatus(), nil
}

func (t *Target) planExec(argv, env []string) (*plan, error) {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return nil, fmt.Errorf("netns: %w", err)
	}
	p := &plan{}
	if p.path, err = unix.BytePtrFromString(path); err != nil {
		return nil, fmt.Errorf("netns: %q: %w", path, err)
	}
	for _, list := range []struct {
		from []string
		to   *[]*byte
	}{{argv, &p.argv}, {env, &p.envv}} {
		for _, s := range list.from {
			b, err := unix.BytePtrFromString(s)
			if err != nil {
				return nil, fmt.Errorf("netns: %q: %w", s, err)
			}
			*list.to = append(*list.to, b)
		}
		*list.to = append(*list.to, nil)
	}
	t.joining(p)
	p.must("descriptors", "the kernel is older than Linux 5.11", unix.SYS_CLOSE_RANGE, 3, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC)
	p.must("signals", "", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&p.mask)), 0, 8)
	p.must("run "+path, "", unix.SYS_EXECVE, uintptr(unsafe.Pointer(p.path)),
		uintptr(unsafe.Pointer(&p.argv[0])), uintptr(unsafe.Pointer(&p.envv[0])))
	return p, nil
}
