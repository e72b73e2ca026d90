package netns

import (
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// Contain sets cmd up to start in a user and a network namespace of its own,
// which any user may make. Inside it is root, or, with keepID, the user it is
// outside; either way with full rights over the new namespaces until it runs
// another program, and none over anything else. Mount adds a mount namespace.
func Contain(cmd *exec.Cmd, keepID, mount bool) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	uid, gid := 0, 0
	if keepID {
		uid, gid = os.Getuid(), os.Getgid()
	}
	a := cmd.SysProcAttr
	a.Cloneflags |= unix.CLONE_NEWUSER | unix.CLONE_NEWNET
	if mount {
		a.Cloneflags |= unix.CLONE_NEWNS
	}
	a.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: os.Getuid(), Size: 1}}
	a.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: os.Getgid(), Size: 1}}
}

// ExplainUserNamespace says which of the usual gates closed user namespaces to
// us, for an error of starting a command that [Contain] was called on, and what
// to type to open it.
func ExplainUserNamespace(err error) error { return explainUser(err) }
