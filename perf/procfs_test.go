package main

import (
	"os"
	"testing"
	"time"
)

func TestParseStatSkipsTheName(t *testing.T) {
	const text = "4242 (a) b ) (c) S 1 4242 4242 0 -1 4194560 900 0 0 0 150 50 0 0 20 0 9 0 1 1 1"
	got, err := parseStat(text)
	if err != nil || got != 2*time.Second {
		t.Errorf("%v, %v; want 2s", got, err)
	}
	for _, bad := range []string{"", "1 (x) S 1", "1 (x) S 1 1 1 1 1 1 1 1 1 1 u s 1"} {
		if _, err := parseStat(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestParseMachineCPU(t *testing.T) {
	got, err := parseMachineCPU("cpu  100 10 200 1000 30 5 15 40 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
	want := machineCPU{busy: 3300 * time.Millisecond, stolen: 400 * time.Millisecond, all: 14 * time.Second}
	if err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", "cpu 1 2 3", "intr 1 2 3 4 5 6 7 8 9"} {
		if _, err := parseMachineCPU(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestParseMemory(t *testing.T) {
	rss, peak, err := parseMemory("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
	if err != nil || rss != 1<<20 || peak != 2<<20 {
		t.Errorf("%v, %v, %v", rss, peak, err)
	}
	if _, _, err := parseMemory("VmRSS:\t1 kB\n"); err == nil {
		t.Error("a status without a peak was accepted")
	}
}

func TestCPUSince(t *testing.T) {
	reading := func(total time.Duration, threads map[string]time.Duration) cpuReading {
		return cpuReading{total: total, threads: threads}
	}
	type th = map[string]time.Duration
	for _, c := range []struct {
		name          string
		earlier, then cpuReading
		want          time.Duration
	}{
		{"threads are finer than ticks", reading(0, th{"1": 1000}), reading(0, th{"1": 3000}), 2000},
		{"a new thread counts whole", reading(time.Second, th{"1": 0}), reading(2*time.Second, th{"1": 0, "2": time.Second}), time.Second},
		{"an ended thread is in the total", reading(time.Second, th{"1": time.Second}), reading(3*time.Second, th{}), 1980 * time.Millisecond},
		{"a thread missed at first is not new", reading(9*time.Second, th{}), reading(9*time.Second, th{"1": 9 * time.Second}), 20 * time.Millisecond},
		{"never negative", reading(time.Second, th{"1": time.Second}), reading(time.Second, th{}), 0},
	} {
		if got := c.then.since(c.earlier); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestReadingThisProcess(t *testing.T) {
	if _, err := readCPU(os.Getpid()); err != nil {
		t.Error(err)
	}
	if rss, peak, err := readMemory(os.Getpid()); err != nil || rss <= 0 || peak < rss {
		t.Errorf("rss %v, peak %v, %v", rss, peak, err)
	}
	if _, err := readMachineCPU(); err != nil {
		t.Error(err)
	}
	if h := readHost(); h.Kernel == "" || h.CPU == "" || h.Cores < 1 || h.MemoryMiB < 1 {
		t.Errorf("host %+v", h)
	}
}

func TestCPUModel(t *testing.T) {
	for text, want := range map[string]string{
		"processor\t: 0\nmodel name\t: Fast CPU @ 2GHz\n": "Fast CPU @ 2GHz",
		"processor\t: 0\nCPU part\t: 0xd0c\n":             "CPU part 0xd0c",
		"":                                                "unknown CPU",
	} {
		if got := cpuModel(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
