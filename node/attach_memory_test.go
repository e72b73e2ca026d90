package node

import (
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"tweed/tun"
)

// Programs beyond those that there is memory for exchange packets over their
// sockets, and one that leaves makes room for another.
func TestSharedMemoryOfProgramsIsBounded(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unixpacket", filepath.Join(dir, "p"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a := newAttachments(dir, slog.New(slog.NewTextHandler(io.Discard, nil)))
	defer a.close()
	a.memoryLimit = func() uint64 { return 2 * sharedMemoryPart * tun.RingSize }
	connect := func(name string) bool {
		t.Helper()
		at := &attachment{savedAttachment: savedAttachment{Name: name, Socket: l.Addr().String()}, sharedMemory: true}
		made, err := a.connectProgram(at, false)
		if err != nil {
			t.Fatal(err)
		}
		at.made = made
		hold(a, at)
		return at.status().SharedMemory
	}
	if !connect("a") || !connect("b") {
		t.Error("a or b has no shared memory")
	}
	if connect("c") {
		t.Error("c has shared memory")
	}
	a.mu.Lock()
	first := a.all["a"]
	a.mu.Unlock()
	a.remove(first)
	if !connect("d") {
		t.Error("d has no shared memory")
	}
	a.memoryLimit = func() uint64 { return 0 }
	if !connect("e") {
		t.Error("without a known limit there is no shared memory")
	}
	for _, at := range a.list() {
		a.remove(at)
	}
}

func TestMemoryLimitIsTheLeastOfAll(t *testing.T) {
	const total = "MemTotal:       24731664 kB\nMemFree: 1 kB\n"
	for what, c := range map[string]struct {
		files map[string]string
		want  uint64
	}{
		"nothing known": {nil, 0},
		"the machine":   {map[string]string{"proc/meminfo": total}, 24731664 << 10},
		"version 2": {map[string]string{"proc/meminfo": total, "proc/self/cgroup": "0::/a/b\n",
			"sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.max": "536870912\n"}, 512 << 20},
		"version 1": {map[string]string{"proc/meminfo": total, "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/a\n0::/\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "67108864\n"}, 64 << 20},
		"a path of the host": {map[string]string{"proc/self/cgroup": "0::/../host/path\n", "sys/fs/cgroup/memory.max": "1048576\n"}, 1 << 20},
	} {
		t.Run(what, func(t *testing.T) {
			root := t.TempDir()
			for name, text := range c.files {
				file := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got := memoryLimit(root); got != c.want {
				t.Errorf("%d, want %d", got, c.want)
			}
		})
	}
}
