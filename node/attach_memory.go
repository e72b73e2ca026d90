package node

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"tweed/tun"
)

// sharedMemoryPart is the part of the memory this process may use that the shared
// memory of all programs may take, were all of it touched: one so-manieth. It counts
// to the engine, and others than its programs write into it.
const sharedMemoryPart = 4

// roomForRing says why no more shared memory is given out.
func (a *attachments) roomForRing() error {
	limit := a.memoryLimit()
	a.mu.Lock()
	defer a.mu.Unlock()
	held := uint64(0)
	for _, t := range a.all {
		if t.made != nil && t.made.Queue.Ring != nil {
			held++
		}
	}
	if limit > 0 && (held+1)*tun.RingSize > limit/sharedMemoryPart {
		return fmt.Errorf("%d programs have %d MiB each already, and all of them may have 1/%d of the %d MiB this process may use",
			held, tun.RingSize>>20, sharedMemoryPart, limit>>20)
	}
	return nil
}

// memoryLimit is how much memory this process may use, in bytes: the machine's or
// that of one of its control groups, whichever is least; 0 if nothing says it. root
// is where /proc and /sys are.
func memoryLimit(root string) uint64 {
	limit := uint64(0)
	atMost := func(n uint64) {
		if n > 0 && (limit == 0 || n < limit) {
			limit = n
		}
	}
	if b, err := os.ReadFile(filepath.Join(root, "proc/meminfo")); err == nil {
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "MemTotal:" {
				kB, _ := strconv.ParseUint(f[1], 10, 54) // 0 is none
				atMost(kB << 10)
			}
		}
	}
	b, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return limit
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		// cgroups(7): ID:CONTROLLERS:PATH, without controllers in version 2
		f := strings.SplitN(s.Text(), ":", 3)
		if len(f) != 3 {
			continue
		}
		base, file := "sys/fs/cgroup", "memory.max"
		if f[1] != "" {
			if !slices.Contains(strings.Split(f[1], ","), "memory") {
				continue
			}
			base, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		}
		// In a container the path may be the host's, and the base the container's own.
		for dir := path.Clean("/" + f[2]); ; dir = path.Dir(dir) {
			if b, err := os.ReadFile(filepath.Join(root, base, dir, file)); err == nil {
				n, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64) // max is none
				atMost(n)
			}
			if dir == "/" {
				break
			}
		}
	}
	return limit
}
