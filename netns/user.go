package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// elevated marks the second run of a program started by Elevate, so that a
// user namespace that grants nothing does not make it start itself for ever.
// Its value is the uid outside.
const elevated = "TWEED_USERNS_OF"

// CheckPrivileges returns nil if the process may make network namespaces,
// configure them and come back to its own: it has CAP_SYS_ADMIN and
// CAP_NET_ADMIN, as root or as root of a user namespace that its network
// namespace belongs to.
func CheckPrivileges() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("netns: capabilities: %w", err)
	}
	var missing []string
	for _, c := range []struct {
		bit  uint
		name string
	}{{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}} {
		if data[0].Effective&(1<<c.bit) == 0 {
			missing = append(missing, c.name)
		}
	}
	if missing != nil {
		return fmt.Errorf("netns: no %s", strings.Join(missing, " and "))
	}
	return mayComeBack()
}

// mayComeBack enters the namespace the thread is in, which changes nothing but
// is refused to root of a user namespace that has kept its host's network.
func mayComeBack() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := Current()
	if err != nil {
		return err
	}
	defer home.Close()
	if err := home.join(); err != nil {
		return fmt.Errorf("the network namespace belongs to another user namespace: %w", err)
	}
	return nil
}

// OutsideUID returns the uid the program was started with when it runs in a
// user namespace made by [Elevate].
func OutsideUID() (uid string, inside bool) {
	uid = os.Getenv(elevated)
	return uid, uid != ""
}

// Elevate makes sure the program can make network namespaces. With the
// privileges already there it returns done == false at once. Otherwise it runs
// the program again, same arguments and standard files, as root of new user
// and network namespaces, with loopback up, passes signals on, waits, and returns done == true
// and the exit status (128 + signal if a signal ended it); the caller exits
// with that. Outside the namespace the program has no more rights than before.
// Call it before anything else in main or TestMain.
func Elevate() (done bool, status int, err error) {
	if _, inside := OutsideUID(); CheckPrivileges() == nil && !inside {
		return false, 0, nil
	}
	return EnterUserNamespace()
}

// EnterUserNamespace is Elevate for a program that wants a user namespace even
// if it has all privileges: to measure or test what others have there.
func EnterUserNamespace() (done bool, status int, err error) {
	if _, inside := OutsideUID(); inside {
		if missing := CheckPrivileges(); missing != nil {
			return true, 1, fmt.Errorf("%w inside the new user namespace: %s", missing, hostGates().withheld())
		}
		return false, 0, loopbackUp()
	}
	self, err := os.Executable()
	if err != nil {
		return true, 1, fmt.Errorf("netns: own program: %w", err)
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", elevated, os.Getuid()))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   unix.SIGTERM,
	}
	// Pdeathsig follows this thread, so it must not go away before the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return true, 1, explainUser(err)
	}
	go func() {
		for s := range signals {
			cmd.Process.Signal(s)
		}
	}()
	err = cmd.Wait()
	signal.Stop(signals)
	close(signals)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return true, 1, fmt.Errorf("netns: wait for %s: %w", self, err)
	}
	ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return true, 128 + int(ws.Signal()), nil
	}
	return true, ws.ExitStatus(), nil
}
