package engine

import (
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// onThread runs f on a thread of its own, which ends with it.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread is not used again
		f()
	}()
	<-done
}

// nice returns the calling thread's.
func nice(t *testing.T) int {
	t.Helper()
	p, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	return 20 - p // as the system call counts
}

// Whatever the privileges: after a flood the thread is as urgent as before.
func TestPriorityIsLoweredDuringAFloodOnly(t *testing.T) {
	for _, base := range []int{0, 3, 12} {
		onThread(func() {
			if err := unix.Setpriority(unix.PRIO_PROCESS, 0, base); err != nil {
				t.Error(err)
				return
			}
			c, low := newCourtesy(), max(lowNice, base)
			if n := nice(t); n != base {
				t.Errorf("nice %d after looking around, was %d", n, base)
			}
			for range floodRounds - 1 {
				c.round(true)
			}
			c.round(false)
			c.round(true)
			if n := nice(t); n != base {
				t.Errorf("nice %d before there was a flood, was %d", n, base)
			}
			for range 2 * floodRounds {
				c.round(true)
			}
			if n := nice(t); c.able && n != low || !c.able && n != base {
				t.Errorf("able %v: nice %d in a flood", c.able, n)
			}
			for range calmRounds - 1 {
				c.round(false)
			}
			c.round(true)
			if n := nice(t); c.able && n != low {
				t.Errorf("nice %d though the flood goes on", n)
			}
			for range calmRounds {
				c.round(false)
			}
			if n := nice(t); n != base {
				t.Errorf("able %v: nice %d after the flood, was %d", c.able, n, base)
			}
		})
	}
}

// Inside a user namespace CAP_SYS_NICE is there but counts for nothing: what
// is lowered stays low.
func TestPriorityInAUserNamespace(t *testing.T) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestPriorityIsLoweredDuringAFloodOnly$", "-test.count=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if _, failed := err.(*exec.ExitError); err != nil && !failed {
		impossible(t, err)
	}
	if err != nil {
		t.Errorf("%v:\n%s", err, out)
	}
}
