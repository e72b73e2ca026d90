package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// userHz is the unit of CPU times in /proc, 1/100 s on every architecture Go
// runs on (USER_HZ, include/uapi/asm-generic/param.h).
const userHz = 100

// cpuReading is the CPU time a process had used at one moment. Both clocks
// count the same time: the threads' run times are in nanoseconds but forget
// threads that have ended, the process total keeps those but ticks in 10 ms.
type cpuReading struct {
	threads map[string]time.Duration
	total   time.Duration
}

// readCPU reads /proc/PID/task/*/schedstat and /proc/PID/stat.
func readCPU(pid int) (cpuReading, error) {
	r := cpuReading{threads: map[string]time.Duration{}}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return r, err
	}
	if r.total, err = parseStat(string(text)); err != nil {
		return r, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return r, err
	}
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err != nil {
			continue // the thread has just ended
		}
		run, err := parseSchedstat(string(text))
		if err != nil {
			return r, fmt.Errorf("%s: %w", p, err)
		}
		r.threads[filepath.Base(filepath.Dir(p))] = run
	}
	return r, nil
}

// since is the CPU time used after earlier was read. A thread can be missing
// from a listing made while others end, so the sum of the threads is kept
// within what the coarse clock allows.
func (r cpuReading) since(earlier cpuReading) time.Duration {
	var sum time.Duration
	for tid, run := range r.threads {
		sum += run - earlier.threads[tid]
	}
	const tick = time.Second / userHz
	total := r.total - earlier.total
	// Both totals are cut to whole ticks, user and system time each.
	return max(min(sum, total+2*tick), total-2*tick, 0)
}

// parseStat returns the sum of utime and stime in the text of /proc/PID/stat
// (proc_pid_stat(5), fields 14 and 15). The command name before them may
// contain blanks and parentheses.
func parseStat(text string) (time.Duration, error) {
	end := strings.LastIndexByte(text, ')')
	f := strings.Fields(text[end+1:])
	if end < 0 || len(f) < 13 {
		return 0, errors.New("expected at least 15 fields")
	}
	user, err1 := strconv.ParseUint(f[11], 10, 63)
	system, err2 := strconv.ParseUint(f[12], 10, 63)
	if err := errors.Join(err1, err2); err != nil {
		return 0, err
	}
	return time.Duration(user+system) * (time.Second / userHz), nil
}

// parseSchedstat returns the time on CPU, the first field of
// /proc/PID/task/TID/schedstat in nanoseconds
// (Documentation/scheduler/sched-stats.rst).
func parseSchedstat(text string) (time.Duration, error) {
	f := strings.Fields(text)
	if len(f) < 1 {
		return 0, errors.New("expected three fields")
	}
	ns, err := strconv.ParseInt(f[0], 10, 64)
	return time.Duration(ns), err
}

// readMemory returns the resident set of a process and its peak in bytes.
func readMemory(pid int) (rss, peak float64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	return parseMemory(string(text))
}

// parseMemory reads VmRSS and VmHWM of /proc/PID/status, given in kB.
func parseMemory(text string) (rss, peak float64, err error) {
	if rss, err = statusKB(text, "VmRSS:"); err != nil {
		return 0, 0, err
	}
	peak, err = statusKB(text, "VmHWM:")
	return rss, peak, err
}

func statusKB(text, key string) (float64, error) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == key && f[2] == "kB" {
			kb, err := strconv.ParseUint(f[1], 10, 63)
			return float64(kb) * 1024, err
		}
	}
	return 0, fmt.Errorf("no line %s in kB", key)
}

// machineCPU is the CPU time of the whole machine since it started.
type machineCPU struct {
	// busy is user, nice, system, irq and softirq; stolen is what the
	// hypervisor gave to others.
	busy, stolen, all time.Duration
}

// readMachineCPU reads /proc/stat.
func readMachineCPU() (machineCPU, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return machineCPU{}, err
	}
	m, err := parseMachineCPU(string(text))
	if err != nil {
		return m, fmt.Errorf("/proc/stat: %w", err)
	}
	return m, nil
}

func parseMachineCPU(text string) (machineCPU, error) {
	f := strings.Fields(firstLine(text))
	if len(f) < 9 || f[0] != "cpu" {
		return machineCPU{}, errors.New(`expected a line "cpu" with at least 8 figures`)
	}
	var t [8]time.Duration // user nice system idle iowait irq softirq steal
	var m machineCPU
	for i := range t {
		n, err := strconv.ParseUint(f[i+1], 10, 63)
		if err != nil {
			return m, err
		}
		t[i] = time.Duration(n) * (time.Second / userHz)
		m.all += t[i]
	}
	m.busy = t[0] + t[1] + t[2] + t[5] + t[6]
	m.stolen = t[7]
	return m, nil
}

// Host is the machine and its settings that figures depend on.
type Host struct {
	Kernel string `json:"kernel"`
	Arch   string `json:"arch"`
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	// MemoryMiB is the machine's memory.
	MemoryMiB int `json:"memory_mib"`
	// Virtual is true inside a virtual machine.
	Virtual bool `json:"virtual"`
	// Congestion is net.ipv4.tcp_congestion_control.
	Congestion string `json:"tcp_congestion_control"`
	// Load is the load average over one minute when the run began.
	Load float64 `json:"load_average"`
}

func readHost() Host {
	read := func(path string) string {
		text, err := os.ReadFile(path)
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(text))
	}
	cpuinfo := read("/proc/cpuinfo")
	h := Host{
		Kernel: read("/proc/sys/kernel/osrelease"), Arch: runtime.GOARCH, Cores: runtime.NumCPU(),
		CPU: cpuModel(cpuinfo), Virtual: strings.Contains(cpuinfo, " hypervisor"),
		Congestion: read("/proc/sys/net/ipv4/tcp_congestion_control"),
	}
	if total, err := statusKB(read("/proc/meminfo"), "MemTotal:"); err == nil {
		h.MemoryMiB = int(total / (1 << 20))
	}
	if f := strings.Fields(read("/proc/loadavg")); len(f) > 0 {
		h.Load, _ = strconv.ParseFloat(f[0], 64) // 0 if the kernel ever changes the format
	}
	return h
}

// cpuModel is the processor's name in the text of /proc/cpuinfo; arm64 kernels
// give numbers only.
func cpuModel(cpuinfo string) string {
	part := ""
	for line := range strings.Lines(cpuinfo) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "model name":
			return strings.TrimSpace(value)
		case "CPU part":
			part = "CPU part " + strings.TrimSpace(value)
		}
	}
	if part == "" {
		return "unknown CPU"
	}
	return part
}
