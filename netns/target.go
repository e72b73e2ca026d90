package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrGone is returned for a target that has ended or whose path was removed.
var ErrGone = errors.New("gone")

// errGone is ErrGone where the text says it already.
var errGone error = silent{ErrGone}

type silent struct{ is error }

func (silent) Error() string   { return "" }
func (s silent) Unwrap() error { return s.is }

// pathInterval is how often the path of a [Target] is looked at. A process is
// watched without polling.
const pathInterval = time.Second

// TargetConfig names a network namespace to attach to. Exactly one of PID and
// Path is set.
type TargetConfig struct {
	// PID is a process inside, in our pid namespace.
	PID int
	// Path is a bind-mounted namespace file, or the name of one in
	// /run/netns (iproute2) or $XDG_RUNTIME_DIR/netns (podman).
	Path string
}

// Target is the open network namespace of a container, together with what
// tells whether it is still there. It may be used by several goroutines at
// once. While it is open it keeps the namespace alive.
type Target struct {
	net *Namespace
	// user is the user namespace that owns net, nil when it is our own.
	user *os.File
	// process is a pidfd, nil for a target named by path.
	process *os.File
	pid     int
	start   uint64
	path    string
	id      uint64
}

// OpenTarget opens the namespace c names. The error says which of the possible
// causes it was: no such process, somebody else's, in our own namespace, no
// namespace at all.
func OpenTarget(c TargetConfig) (*Target, error) {
	t := &Target{}
	var err error
	switch {
	case c.PID != 0 && c.Path != "":
		return nil, errors.New("netns: both a pid and a path: give one")
	case c.Path != "":
		err = t.openPath(c.Path)
	case c.PID > 0:
		err = t.openProcess(c.PID)
	default:
		err = fmt.Errorf("netns: pid %d: expected a positive number", c.PID)
	}
	if err == nil {
		err = t.check()
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func (t *Target) openProcess(pid int) error {
	t.pid = pid
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	switch {
	case errors.Is(err, unix.ESRCH):
		return fmt.Errorf("netns: pid %d: no such process%w", pid, errGone)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("netns: pid %d: not a process (the id of a thread?)", pid)
	case err != nil:
		return fmt.Errorf("netns: pid %d: pidfd: %w", pid, err)
	}
	t.process = os.NewFile(uintptr(fd), "pidfd")
	if t.start, err = startTime(pid); err != nil {
		return fmt.Errorf("netns: pid %d: it has ended%w", pid, errGone)
	}
	t.net, err = OfProcess(pid)
	if err != nil {
		return explainOpen(pid, err)
	}
	// The pid may have been given to another process before the pidfd was
	// opened, but not after: alive now means that what was opened is its own.
	if t.ended() {
		return fmt.Errorf("netns: pid %d: it has ended%w", pid, errGone)
	}
	return nil
}

func explainOpen(pid int, err error) error {
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		owner := "another user"
		var st unix.Stat_t
		if unix.Stat(fmt.Sprintf("/proc/%d", pid), &st) == nil {
			owner = fmt.Sprintf("uid %d", st.Uid)
		}
		return fmt.Errorf("netns: pid %d: it belongs to %s, and uid %d may not enter its namespaces: run the engine as that user or as root: %w", pid, owner, os.Geteuid(), err)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ESRCH):
		return fmt.Errorf("netns: pid %d: it has ended%w", pid, errGone)
	}
	return fmt.Errorf("netns: pid %d: %w", pid, err)
}

func (t *Target) openPath(name string) error {
	var tried []string
	for _, path := range candidatePaths(name) {
		n, err := Open(path)
		if err == nil {
			t.net, t.path = n, path
			return nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			if errors.Is(err, unix.EACCES) {
				return fmt.Errorf("netns: %s: uid %d may not open it: %w", path, os.Geteuid(), err)
			}
			return err
		}
		tried = append(tried, path)
	}
	return fmt.Errorf("netns: %s: no such namespace (looked at %s)%w", name, strings.Join(tried, ", "), errGone)
}

// candidatePaths are the places a namespace's name can stand for.
func candidatePaths(name string) []string {
	if strings.Contains(name, "/") {
		if abs, err := filepath.Abs(name); err == nil {
			name = abs
		}
		return []string{name}
	}
	paths := []string{filepath.Join("/run/netns", name)}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		paths = append(paths, filepath.Join(dir, "netns", name))
	}
	return paths
}

// check finds the user namespace to join and refuses our own network
// namespace.
func (t *Target) check() error {
	var err error
	if t.id, err = t.net.ID(); err != nil {
		return err
	}
	home, err := Current()
	if err != nil {
		return err
	}
	defer home.Close()
	if id, err := home.ID(); err != nil || id == t.id {
		return errors.Join(err, fmt.Errorf("netns: %s is in the engine's own network namespace: nothing to attach (expected a container with a network namespace of its own, such as from `podman run --network none` or `unshare -Urn`)", t))
	}
	fd, err := unix.IoctlRetInt(int(t.net.file.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("netns: %s: its namespace was made outside of our user namespace, so uid %d has no rights over it: run the engine as the user that made the container, or as root: %w", t, os.Geteuid(), err)
		}
		return fmt.Errorf("netns: %s: owner of the namespace: %w", t, err)
	}
	owner := os.NewFile(uintptr(fd), "userns")
	unix.CloseOnExec(fd)
	same, err := ownUserNamespace(owner)
	if err != nil || same {
		owner.Close()
		return err
	}
	t.user = owner
	return nil
}

// ownUserNamespace reports whether f is the user namespace we are in: joining
// it again is refused by the kernel, and not needed.
func ownUserNamespace(f *os.File) (bool, error) {
	var a, b unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &a); err != nil {
		return false, fmt.Errorf("netns: %w", err)
	}
	if err := unix.Stat("/proc/self/ns/user", &b); err != nil {
		return false, fmt.Errorf("netns: %w", err)
	}
	return a.Dev == b.Dev && a.Ino == b.Ino, nil
}

// Foreign reports whether another user namespace than ours owns the target: it
// can be changed only from inside that.
func (t *Target) Foreign() bool { return t.user != nil }

// String names the target as the user did.
func (t *Target) String() string {
	if t.path != "" {
		return t.path
	}
	return "pid " + strconv.Itoa(t.pid)
}

// ID is the inode number of the network namespace; see [Namespace.ID].
func (t *Target) ID() uint64 { return t.id }

// PID is the process that stands for the target, 0 if a path does.
func (t *Target) PID() int { return t.pid }

// Start is the start time of that process in clock ticks since boot, which
// tells it from a later one with the same pid.
func (t *Target) Start() uint64 { return t.start }

// Path is the namespace's path, empty if a process stands for it.
func (t *Target) Path() string { return t.path }

// Wait blocks until the target has gone, then returns nil, or until ctx is
// done or the target is closed, then an error. A process is gone when it has
// ended, a path when it is removed or leads to another namespace.
func (t *Target) Wait(ctx context.Context) error {
	if t.process == nil {
		return t.waitPath(ctx)
	}
	conn, err := t.process.SyscallConn()
	if err != nil {
		return fmt.Errorf("netns: %s: %w", t, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = t.process.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err = conn.Read(func(fd uintptr) bool { return readable(int(fd)) })
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (t *Target) waitPath(ctx context.Context) error {
	tick := time.NewTicker(pathInterval)
	defer tick.Stop()
	for t.pathLeadsHere() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	return nil
}

func (t *Target) pathLeadsHere() bool {
	n, err := Open(t.path)
	if err != nil {
		return false
	}
	defer n.Close()
	id, err := n.ID()
	return err == nil && id == t.id
}

// ended asks without taking the pidfd out of the network poller, as File.Fd
// would.
func (t *Target) ended() bool {
	if t.process == nil {
		return false
	}
	conn, err := t.process.SyscallConn()
	if err != nil {
		return true
	}
	over := false
	err = conn.Control(func(fd uintptr) { over = readable(int(fd)) })
	return over || err != nil
}

// Close gives everything up. Waiting ends with an error. Closing twice does
// nothing.
func (t *Target) Close() {
	if t.net != nil {
		t.net.Close()
	}
	if t.user != nil {
		t.user.Close()
	}
	if t.process != nil {
		t.process.Close()
	}
}

func readable(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n > 0
	}
}

// startTime is field 22 of /proc/PID/stat: clock ticks since boot.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field may hold blanks and parentheses; the last one closes it.
	_, rest, _ := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat: too short", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
