package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// gates are the settings of a host that can keep ordinary users from user
// namespaces. What the kernel says when one of them is closed does not tell
// them apart; what they are set to does.
type gates struct {
	// sysctls is the folder of the settings, /proc/sys.
	sysctls string
	// program is our own path, for AppArmor.
	program string
}

func hostGates() gates {
	self, err := os.Executable()
	if err != nil {
		self = "/usr/local/bin/tweed"
	}
	return gates{"/proc/sys", self}
}

// is reports whether a setting exists and has the value.
func (g gates) is(name, value string) bool {
	b, err := os.ReadFile(filepath.Join(g.sysctls, strings.ReplaceAll(name, ".", "/")))
	return err == nil && strings.TrimSpace(string(b)) == value
}

// Settings, as sysctl names them.
const (
	sysctlMaxUserNS = "user.max_user_namespaces"
	sysctlClone     = "kernel.unprivileged_userns_clone" // of Debian's and Arch's kernels
	sysctlAppArmor  = "kernel.apparmor_restrict_unprivileged_userns"
)

// open is what to type to set a setting.
func open(name, value string) string {
	return fmt.Sprintf("run as root, or `sudo sysctl -w %s=%s`", name, value)
}

// explainUser says which of the usual gates closed a user namespace to us.
func explainUser(err error) error { return hostGates().explain(err) }

func (g gates) explain(err error) error {
	return fmt.Errorf("netns: user namespace: %w: %s", err, g.advice(err))
}

func (g gates) advice(err error) string {
	switch {
	case errors.Is(err, unix.ENOSPC) && g.is(sysctlMaxUserNS, "0"):
		return sysctlMaxUserNS + " is 0: " + open(sysctlMaxUserNS, "16384")
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		return sysctlMaxUserNS + " is used up, or user namespaces are nested too deeply (32): " + open(sysctlMaxUserNS, "16384")
	case errors.Is(err, os.ErrPermission) && g.is(sysctlClone, "0"):
		return sysctlClone + " is 0: " + open(sysctlClone, "1")
	case errors.Is(err, os.ErrPermission) && g.is(sysctlAppArmor, "1"), errors.Is(err, unix.EACCES):
		return g.withheld()
	case errors.Is(err, unix.EPERM):
		return "something forbids it, such as a container's seccomp profile: run as root, or start the container with " +
			"--security-opt seccomp=unconfined"
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return "this kernel has no user namespaces (CONFIG_USER_NS): run as root"
	}
	return "run as root"
}

// withheld says why a user namespace came without capabilities.
func (g gates) withheld() string {
	if !g.is(sysctlAppArmor, "1") {
		return "a security module (AppArmor, SELinux) withholds its capabilities: run as root, or allow user namespaces for " + g.program
	}
	return "AppArmor restricts unprivileged user namespaces here: " + open(sysctlAppArmor, "0") +
		", or put this into /etc/apparmor.d/tweed and type `sudo systemctl reload apparmor`: " +
		"abi <abi/4.0>, profile tweed " + g.program + " flags=(unconfined) { userns, }"
}
