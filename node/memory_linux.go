package node

import (
	"bytes"
	"fmt"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// giveBackMemory returns what only the start of the process needed: freed memory,
// and the mappings of the program's own pages. Starting touches nearly all of them,
// once; what running needs of them is mapped again from the page cache when it does.
// It is called when the start is over, and takes some ms of CPU.
func giveBackMemory() error {
	debug.FreeOSMemory()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return err
	}
	for _, m := range unchangedFilePages(smaps) {
		// The slice of unix.Madvise would be one the collector must not see.
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("madvise %x-%x: %w", m.start, m.end, errno)
		}
	}
	return nil
}

// addrRange is a range of virtual addresses, without its end.
type addrRange struct{ start, end uintptr }

// unchangedFilePages picks of smaps (proc_pid_smaps(5)) the private mappings of
// files that are not writable and of which no page differs from the file: those
// that relocation or a debugger changed would lose the change.
func unchangedFilePages(smaps []byte) []addrRange {
	var out []addrRange
	var at addrRange
	candidate := false
	for line := range bytes.Lines(smaps) {
		var m addrRange
		var perms string
		if n, _ := fmt.Sscanf(string(line), "%x-%x %s", &m.start, &m.end, &perms); n == 3 {
			at = m
			candidate = (perms == "r-xp" || perms == "r--p") && bytes.ContainsRune(line, '/')
			continue
		}
		var kB int
		if n, _ := fmt.Sscanf(string(line), "Anonymous: %d kB", &kB); n == 1 && kB == 0 && candidate {
			out = append(out, at)
		}
	}
	return out
}
