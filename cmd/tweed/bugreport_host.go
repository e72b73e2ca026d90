package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tweed/cmd/internal/daemon"
	"tweed/node"
)

const (
	// maxStateFile is how much of a file is taken into a bug report, in bytes.
	maxStateFile = 4 << 20
	// factTimeout bounds a program that is asked for facts.
	factTimeout = 5 * time.Second
)

// buildFacts are what this program is.
func buildFacts() map[string]any {
	m := map[string]any{"schema": node.Schema, "version": daemon.Version(), "go": runtime.Version(), "os": runtime.GOOS, "arch": runtime.GOARCH, "cpus": runtime.NumCPU()}
	if info, ok := debug.ReadBuildInfo(); ok {
		settings := map[string]string{}
		for _, s := range info.Settings {
			settings[s.Key] = s.Value
		}
		m["build"] = settings
	}
	return m
}

// stateDir takes the state directory, which a dead engine leaves as well.
func (r *report) stateDir(c *client, s *node.Status) {
	dirs := []string{c.stateDir}
	if c.stateDir == "" {
		dirs = node.StateDirs()
	}
	if s != nil && s.StateDir != "" {
		dirs = []string{s.StateDir}
	}
	if len(dirs) == 0 {
		r.missing = append(r.missing, "state: no engine has left a state directory in its usual place; name it with --state-dir DIR")
	}
	for i, dir := range dirs {
		name := "state"
		if i > 0 {
			name = fmt.Sprint("state", i+1)
		}
		entries, err := os.ReadDir(dir)
		var list strings.Builder
		fmt.Fprintln(&list, dir)
		for _, e := range entries {
			fi, err := e.Info()
			if err != nil {
				continue // it was removed just now
			}
			fmt.Fprintf(&list, "%s %10d %s %s\n", fi.Mode(), fi.Size(), fi.ModTime().Format(time.RFC3339), e.Name())
			if fi.Mode().IsRegular() && filepath.Ext(e.Name()) == ".json" {
				b, err := readUpTo(filepath.Join(dir, e.Name()), maxStateFile)
				r.add(name+"/"+e.Name(), "from the state directory", b, err)
			}
		}
		r.add(name+".txt", "files of the state directory", []byte(list.String()), err)
	}
}

func readUpTo(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most))
}

// hostFiles are facts the kernel tells in files.
var hostFiles = []string{
	"/proc/version", "/proc/meminfo", "/proc/loadavg", "/proc/uptime", "/proc/self/limits", "/etc/os-release",
	"/proc/net/dev", "/proc/net/snmp", "/proc/net/netstat", "/proc/net/softnet_stat", "/proc/net/udp", "/proc/modules",
	"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/conf/all/rp_filter", "/proc/sys/net/ipv4/conf/default/rp_filter",
	"/proc/sys/net/core/rmem_max", "/proc/sys/net/core/wmem_max", "/proc/sys/net/core/netdev_max_backlog",
	"/proc/sys/kernel/unprivileged_userns_clone", "/proc/sys/user/max_user_namespaces", "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
}

// host takes facts about the kernel and the network of the namespace the
// command runs in.
func (r *report) host(ctx context.Context, s *node.Status) {
	var facts bytes.Buffer
	fmt.Fprintln(&facts, "kernel", osName(), runtime.GOARCH)
	fmt.Fprintln(&facts, "cpus", runtime.NumCPU(), "uid", os.Geteuid())
	fmt.Fprintln(&facts, "network namespace of this command", readLink("/proc/self/ns/net"))
	if s != nil {
		fmt.Fprintln(&facts, "network namespace of the engine", readLink(fmt.Sprintf("/proc/%d/ns/net", s.PID)))
	}
	fmt.Fprintln(&facts, "/dev/net/tun", tunFact())
	r.add("host/facts.txt", "kernel, namespaces, /dev/net/tun", facts.Bytes(), nil)
	files := hostFiles
	if s != nil {
		files = append([]string{fmt.Sprintf("/proc/%d/status", s.PID), fmt.Sprintf("/proc/%d/limits", s.PID), fmt.Sprintf("/proc/%d/cgroup", s.PID)}, files...)
	}
	var all bytes.Buffer
	for _, path := range files {
		b, err := readUpTo(path, 1<<20)
		if errors.Is(err, os.ErrNotExist) {
			continue // another kernel
		}
		fmt.Fprintf(&all, "== %s\n%s\n", path, bytes.TrimRight(b, "\n"))
		if err != nil {
			fmt.Fprintln(&all, err)
		}
	}
	r.add("host/kernel.txt", "what the kernel tells in files", all.Bytes(), nil)
	r.links()
	argvs := [][]string{
		{"ip", "-d", "-s", "address"}, {"ip", "route", "show", "table", "all"}, {"ip", "rule"}, {"ip", "neigh"},
		{"nft", "list", "ruleset"}, {"iptables-save", "-c"}, {"ss", "-uanpm"},
	}
	if s != nil {
		for _, dev := range []string{s.Underlay.Interface, s.Device.Name} {
			if dev != "" {
				argvs = append(argvs, []string{"ethtool", "-k", dev}, []string{"ethtool", "-i", dev})
			}
		}
	}
	for _, argv := range argvs {
		r.program(ctx, argv)
	}
}

// links takes the interfaces, which need no program.
func (r *report) links() {
	var b bytes.Buffer
	links, err := netlink.LinkList()
	for _, l := range links {
		a := l.Attrs()
		fmt.Fprintf(&b, "%d %s %s mtu %d gso_max_size %d gso_max_segs %d gro_max_size %d txqlen %d %s\n",
			a.Index, a.Name, l.Type(), a.MTU, a.GSOMaxSize, a.GSOMaxSegs, a.GROMaxSize, a.TxQLen, a.OperState)
		if s := a.Statistics; s != nil {
			fmt.Fprintf(&b, "  rx %d packets %d dropped %d errors, tx %d packets %d dropped %d errors\n", s.RxPackets, s.RxDropped, s.RxErrors, s.TxPackets, s.TxDropped, s.TxErrors)
		}
		addrs, _ := netlink.AddrList(l, netlink.FAMILY_ALL) // it may have gone
		for _, x := range addrs {
			fmt.Fprintf(&b, "  %s\n", x.IPNet)
		}
	}
	r.add("host/links.txt", "interfaces, their limits and counters", b.Bytes(), err)
}

// program takes what a program says, if there is such a program.
func (r *report) program(ctx context.Context, argv []string) {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, factTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, argv[1:]...).CombinedOutput()
	if err != nil {
		out = fmt.Appendf(out, "%v\n", err)
	}
	name := "host/" + strings.Trim(strings.ReplaceAll(strings.Join(argv, "_"), "_-", "_"), "_") + ".txt"
	r.add(name, strings.Join(argv, " "), out, nil)
}

func readLink(path string) string {
	l, err := os.Readlink(path)
	if err != nil {
		return err.Error()
	}
	return l
}

// tunFact says whether this user could make a TUN device.
func tunFact() string {
	fi, err := os.Stat("/dev/net/tun")
	if err != nil {
		return err.Error()
	}
	text := fi.Mode().String()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return text + ", open: " + err.Error()
	}
	unix.Close(fd)
	return text + ", opens"
}
