package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A helper is this program again, started inside a target's namespaces. A user
// namespace can be joined only by a process of one thread, and a Go program
// never is one, so the way in is: clone, setns, exec of ourselves. Between clone and
// exec the child runs a list of system calls prepared beforehand, and nothing
// else: no allocation, no Go scheduler, no stack growth.

const (
	// HelperArg is the first argument of a helper; a program that uses
	// [Target.Run] calls [Helper] when it finds it in os.Args[1].
	HelperArg = "__netns-helper"

	// helperFD is the helper's end of the socket.
	helperFD = 3
	// helperTime bounds a helper, from clone to the end.
	helperTime = 10 * time.Second
	// maxMessage bounds a message between helper and parent, in bytes.
	maxMessage = 64 << 10
	// maxFDs is the most descriptors in one message.
	maxFDs = 16
)

// JoinError is why a target's namespaces could not be entered: the step that
// failed and what the kernel said.
type JoinError struct {
	Target string
	// Stage is the step: "socket", "clone", "join user namespace", ...
	Stage string
	Err   error
	fix   string
}

func (e *JoinError) Error() string {
	s := fmt.Sprintf("netns: %s: %s: %v", e.Target, e.Stage, e.Err)
	if e.fix != "" {
		s += ": " + e.fix
	}
	return s
}

func (e *JoinError) Unwrap() error { return e.Err }

// stage is one system call of the child.
type stage struct {
	nr, a, b, c, d, e uintptr
	// must says that the child ends when the call fails.
	must bool
	name string
	fix  string
}

// Run starts a helper inside the target's namespaces, hands it request, and
// returns its answer and the descriptors that came with it, which the caller
// closes. The helper has CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN over the
// namespace and no other capability from here, whoever the user is inside.
// The caller's own namespaces and capabilities do not change.
func (t *Target) Run(ctx context.Context, request []byte) (answer []byte, files []*os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &JoinError{t.String(), "socket", err, ""}
	}
	ours := os.NewFile(uintptr(pair[0]), "helper")
	defer ours.Close()
	p, err := t.prepare(pair[1])
	if err == nil {
		var pid int
		pid, err = p.start(t.String())
		unix.Close(pair[1])
		if err == nil {
			answer, files, err = t.converse(ctx, pid, pair[0], request, p)
		}
	} else {
		unix.Close(pair[1])
	}
	return answer, files, err
}

// plan is everything the child needs, in memory that is not moved or collected
// while it is being made.
type plan struct {
	stages []stage
	argv   []*byte
	envv   []*byte
	path   *byte
	header unix.CapUserHeader
	caps   [2]unix.CapUserData
	mask   uint64 // of signals in the helper: none blocked
	report [8]byte
	sock   uintptr
}

// helperCaps is what a helper needs: to make interfaces and sockets, and a
// private network namespace.
var helperCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SYS_ADMIN}

func (t *Target) prepare(sock int) (*plan, error) {
	p := &plan{sock: uintptr(sock), header: unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}}
	args := []string{"tweed", HelperArg}
	for _, a := range args {
		b, err := unix.BytePtrFromString(a)
		if err != nil {
			return nil, err
		}
		p.argv = append(p.argv, b)
	}
	p.argv = append(p.argv, nil)
	// A short life on two threads: the helper's speed is that of its start.
	env, _ := unix.BytePtrFromString("GOMAXPROCS=2")
	p.envv = []*byte{env, nil}
	var err error
	if p.path, err = unix.BytePtrFromString("/proc/self/exe"); err != nil {
		return nil, err
	}
	for _, c := range helperCaps {
		p.caps[c/32].Effective |= 1 << (c % 32)
	}
	for i := range p.caps {
		p.caps[i].Permitted, p.caps[i].Inheritable = p.caps[i].Effective, p.caps[i].Effective
	}
	t.joining(p)
	must := p.must
	must("capabilities", "CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN are needed: run the engine as root, or attach a container of your own",
		unix.SYS_CAPSET, uintptr(unsafe.Pointer(&p.header)), uintptr(unsafe.Pointer(&p.caps[0])))
	for _, c := range helperCaps {
		// Without root's uid inside, exec keeps ambient capabilities only.
		must("ambient capabilities", "", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, c)
	}
	if sock == helperFD {
		must("descriptors", "", unix.SYS_FCNTL, uintptr(sock), unix.F_SETFD, 0)
	} else {
		must("descriptors", "", unix.SYS_DUP3, uintptr(sock), helperFD, 0)
	}
	must("descriptors", "the kernel is older than Linux 5.11", unix.SYS_CLOSE_RANGE, helperFD+1, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC)
	must("signals", "", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&p.mask)), 0, 8)
	must("run the helper", "", unix.SYS_EXECVE, uintptr(unsafe.Pointer(p.path)),
		uintptr(unsafe.Pointer(&p.argv[0])), uintptr(unsafe.Pointer(&p.envv[0])))
	return p, nil
}

// must adds a system call that has to succeed.
func (p *plan) must(name, fix string, nr uintptr, args ...uintptr) {
	s := stage{nr: nr, must: true, name: name, fix: fix}
	for i, to := range []*uintptr{&s.a, &s.b, &s.c, &s.d, &s.e}[:len(args)] {
		*to = args[i]
	}
	p.stages = append(p.stages, s)
}

// joining adds the calls that enter the target's namespaces.
func (t *Target) joining(p *plan) {
	if t.user != nil {
		p.must("join user namespace", "it was made by another user: run the engine as that user or as root",
			unix.SYS_SETNS, t.user.Fd(), unix.CLONE_NEWUSER)
	}
	fix := "it belongs to root of the engine's own user namespace: run the engine as root"
	if t.user != nil {
		fix = "CAP_SYS_ADMIN over it is missing: " + hostGates().withheld()
	}
	p.must("join network namespace", fix, unix.SYS_SETNS, t.net.file.Fd(), unix.CLONE_NEWNET)
}

// start clones. Signals are blocked around it, so that no handler of the Go
// runtime ever runs in the child.
func (p *plan) start(target string) (pid int, err error) {
	syscall.ForkLock.Lock()
	defer syscall.ForkLock.Unlock()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	all, old := ^uint64(0), uint64(0)
	if _, _, e := unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&old)), 8, 0, 0); e != 0 {
		return 0, &JoinError{target, "signals", e, ""}
	}
	child, e := cloneAndRun(&p.stages[0], len(p.stages), p.sock, &p.report)
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&old)), 0, 8, 0, 0)
	runtime.KeepAlive(p)
	if e != 0 {
		return 0, &JoinError{target, "clone", e, ""}
	}
	return int(child), nil
}

// cloneAndRun returns in the parent only. The child has one thread and a copy
// of our memory, of which it touches nothing but the stages.
//
//go:noinline
//go:norace
//go:nosplit
func cloneAndRun(stages *stage, n int, sock uintptr, report *[8]byte) (pid uintptr, err syscall.Errno) {
	pid, _, err = syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if err != 0 || pid != 0 {
		return pid, err
	}
	for i := 0; i < n; i++ {
		s := (*stage)(unsafe.Add(unsafe.Pointer(stages), uintptr(i)*unsafe.Sizeof(stage{})))
		_, _, e := syscall.RawSyscall6(s.nr, s.a, s.b, s.c, s.d, s.e, 0)
		if e != 0 && s.must {
			report[1] = byte(i)
			report[2], report[3] = byte(e), byte(e>>8)
			syscall.RawSyscall6(unix.SYS_WRITE, sock, uintptr(unsafe.Pointer(report)), 8, 0, 0, 0)
			break
		}
	}
	for {
		syscall.RawSyscall6(unix.SYS_EXIT_GROUP, 1, 0, 0, 0, 0, 0)
	}
}

// converse sends the request, waits for the answer and for the helper's end.
func (t *Target) converse(ctx context.Context, pid, sock int, request []byte, p *plan) (answer []byte, files []*os.File, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, helperTime, fmt.Errorf("no answer within %s", helperTime))
	defer cancel()
	type outcome struct {
		b     []byte
		files []*os.File
		err   error
	}
	done := make(chan outcome, 1)
	go func() {
		// What is wrong when this fails is told by the read that follows.
		_, _ = unix.SendmsgN(sock, request, nil, nil, unix.MSG_NOSIGNAL)
		b, files, err := receive(sock)
		done <- outcome{b, files, err}
	}()
	var o outcome
	killed := false
	select {
	case o = <-done:
	case <-ctx.Done():
		// Its death closes its end of the socket, which ends the read.
		killed = true
		_ = unix.Kill(pid, unix.SIGKILL)
		o = <-done
	}
	if o.err == nil {
		_ = unix.Kill(pid, unix.SIGKILL) // it has nothing left to do
	}
	status := reap(pid)
	switch {
	case len(o.b) == 8 && o.b[0] == 0:
		s := p.stages[o.b[1]]
		return nil, nil, &JoinError{t.String(), s.name, syscall.Errno(binary.LittleEndian.Uint16(o.b[2:])), s.fix}
	case o.err == nil:
		return o.b, o.files, nil
	case killed:
		return nil, nil, &JoinError{t.String(), "helper", context.Cause(ctx), ""}
	}
	return nil, nil, &JoinError{t.String(), "helper", fmt.Errorf("%w (%s)", o.err, status), ""}
}

func reap(pid int) string {
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err.Error()
		case ws.Signaled():
			return "killed by " + ws.Signal().String()
		default:
			return fmt.Sprintf("exit status %d", ws.ExitStatus())
		}
	}
}

// receive reads one message and its descriptors. A peer that ended without
// reading what it was sent makes one call fail with ECONNRESET; the message it
// left behind is still there for the next one.
func receive(sock int) ([]byte, []*os.File, error) {
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxFDs))
	var n, oobn int
	for reset := false; ; {
		var err error
		n, oobn, _, _, err = unix.Recvmsg(sock, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.ECONNRESET) && !reset {
			reset = true
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		break
	}
	var files []*os.File
	if msgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
		for _, m := range msgs {
			fds, err := unix.ParseUnixRights(&m)
			if err != nil {
				continue
			}
			for _, fd := range fds {
				files = append(files, os.NewFile(uintptr(fd), "from helper"))
			}
		}
	}
	if n == 0 {
		for _, f := range files {
			f.Close()
		}
		return nil, nil, io.ErrUnexpectedEOF
	}
	return buf[:n], files, nil
}

// Helper is the helper's main: it answers the one request with what do makes
// of it, and returns the exit status. The files are closed after they were
// passed on.
func Helper(do func(request []byte) (answer []byte, files []*os.File)) (status int) {
	request, _, err := receive(helperFD)
	if err != nil {
		return 1
	}
	answer, files := do(request)
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(helperFD, answer, oob, nil, unix.MSG_NOSIGNAL); err != nil {
		return 1
	}
	return 0
}
