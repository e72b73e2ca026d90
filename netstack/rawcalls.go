package netstack

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The following do not wait, so the scheduler need not know of them. It would give
// the processor to another thread when one of them takes longer than it looks on
// (sysmon), and copying 64 KiB does: all goroutines of a program with few
// processors would go from thread to thread.

// recv reads from a socket.
func recv(fd int, b []byte, flags uintptr) (int, syscall.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)),
		flags|unix.MSG_DONTWAIT, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// sendmsg writes at most two pieces, none of them empty, to a stream.
func sendmsg(fd int, pieces [][]byte) (int, syscall.Errno) {
	var iovs [2]unix.Iovec
	for i, p := range pieces {
		iovs[i].Base = unsafe.SliceData(p)
		iovs[i].SetLen(len(p))
	}
	msg := unix.Msghdr{Iov: &iovs[0]}
	msg.SetIovlen(len(pieces))
	n, _, e := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// inQueue is how many bytes a stream can read.
func inQueue(fd int) (int, syscall.Errno) {
	var n int32
	_, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCINQ, uintptr(unsafe.Pointer(&n)))
	return int(n), e
}

// ringBell wakes the other side of a wire. When its socket is full, it has been woken.
func ringBell(fd int) {
	b := [1]byte{0}
	_, _, _ = unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b)), 1, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
}
