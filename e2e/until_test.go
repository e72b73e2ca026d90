package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/engine/tap"
)

// TestCaptureUntil: the file holds what led to the packet, the past before the
// capture included, and ends with it.
func TestCaptureUntil(t *testing.T) {
	w := newWorld(t, 2)
	w.config(udpConfig)
	a, b := w.up(0, "--flight-recorder", "1000"), w.up(1)
	awaitPeers(1, a, b)
	for range 5 {
		assertPing(t, a.host(), b.host(), 100) // before anybody captures
	}
	file, echo := filepath.Join(w.dir, "why.pcapng"), filepath.Join(w.dir, "echo.pcapng")
	c := a.capture("--until", "reason no-route", "-w", file)
	d := a.capture("--until", "reason no-route", "--before", "4", "-w", echo, "icmp[icmptype] == icmp-echo and point tun-in")
	lines := a.capture("--until", "reason no-route", "--point", "drop")
	for range 7 {
		assertPing(t, a.host(), b.host(), 100)
	}
	a.sendTo(t, "10.244.255.9:9") // nobody's
	for _, p := range []*process{c, d, lines} {
		if status := p.wait(); status != 0 {
			t.Errorf("exit status %d: %s", status, p.output())
		}
	}
	// A ping is a packet out and one in, at two points each.
	f := readCapture(t, file)
	if want := [tap.NumPoints]uint64{13, 12, 12, 12, 1}; f.packets != want {
		t.Errorf("in the file %v, want %v", f.packets, want)
	}
	opensEverywhere(t, file)
	if f := readCapture(t, echo); f.packets != [tap.NumPoints]uint64{tap.TunIn: 4, tap.Drop: 1} {
		t.Errorf("with a filter and 4 before: %v", f.packets)
	}
	if out := lines.output(); strings.Count(out, "DROP no-route") != 1 || !strings.Contains(out, "1 packet captured") {
		t.Errorf("without -w: %s", out)
	}

	// Ended before its time: what it kept is there, and it says so.
	for i, end := range []struct {
		args   []string
		status int
	}{{nil, 0}, {[]string{"-a", "duration:1"}, 1}} {
		file := filepath.Join(w.dir, fmt.Sprint("early", i, ".pcapng"))
		c := b.capture(append([]string{"--until", "reason no-route", "-w", file}, end.args...)...)
		assertPing(t, a.host(), b.host(), 100)
		w.await("the capture sees it", func() bool { return b.status().Ledger.Tx.Packets > 0 })
		status := 0
		if end.args == nil {
			status = c.end(unix.SIGINT)
		} else {
			status = c.wait()
		}
		if status != end.status || !strings.Contains(c.output(), "no packet matched --until 'reason no-route'") {
			t.Errorf("exit status %d, want %d: %s", status, end.status, c.output())
		}
		if f := readCapture(t, file); end.args == nil && f.packets != [tap.NumPoints]uint64{1, 1, 1, 1, 0} {
			t.Errorf("in the file %v", f.packets)
		}
	}
	for _, c := range []struct {
		words string
		args  []string
	}{
		{"--until: filter: column 8", []string{"--until", "reason bad-luck"}},
		{"expected a filter", []string{"--until", " "}},
		{"expected --until", []string{"--before", "5"}},
		{"expected 1 to 100000", []string{"--until", "icmp", "--before", "0"}},
		{"expected one of them", []string{"--until", "icmp", "--recorder"}},
	} {
		status, _, errs := run(t, tweedBin, append([]string{"capture", "--state-dir", a.dir}, c.args...)...)
		if status != 2 || !strings.Contains(errs, c.words) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%v: exit status %d, expected 2 and %q: %s", c.args, status, c.words, errs)
		}
	}
}
