package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Renounce gives up, for the rest of the process's life, every capability and
// the ability to gain one by running another program (no_new_privs). Root keeps
// its capabilities, since it is asked to enter other users' containers. Call
// it early in main: where the kernel can only be told thread by thread and the
// program is built with cgo, it runs the program again from the start, with
// the same arguments and descriptors.
func Renounce() error {
	done, err := renounced()
	if err != nil || done {
		return err
	}
	if _, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); e != 0 {
		if e == syscall.ENOTSUP {
			return renounceAndExec()
		}
		return fmt.Errorf("netns: no_new_privs: %w", e)
	}
	if os.Geteuid() == 0 {
		return nil
	}
	// Ambient capabilities cannot outlive the permitted ones.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if _, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0); e != 0 {
		return fmt.Errorf("netns: drop capabilities: %w", e)
	}
	return nil
}

// renounced reports whether there is nothing left to give up.
func renounced() (bool, error) {
	set, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil || set == 0 || os.Geteuid() == 0 {
		return set == 1, err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return false, fmt.Errorf("netns: capabilities: %w", err)
	}
	return have == [2]unix.CapUserData{}, nil
}

// renounceAndExec does it for this thread and runs the program again on it.
func renounceAndExec() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("netns: no_new_privs: %w", err)
	}
	if os.Geteuid() != 0 {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			return fmt.Errorf("netns: drop capabilities: %w", err)
		}
	}
	err := syscall.Exec("/proc/self/exe", os.Args, os.Environ())
	return errors.Join(errors.New("netns: run the program again without privileges"), err)
}
