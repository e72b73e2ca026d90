package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed/netns"
)

// demoWorld is a run directory of its own, so that a demo that somebody keeps
// on this machine is left in peace, and what the machine looked like before.
type demoWorld struct {
	t      *testing.T
	runDir string
	home   *netns.Namespace
	before []string
	// as is put before commands.
	as []string
}

func newDemoWorld(t *testing.T) *demoWorld {
	t.Helper()
	dir, err := os.MkdirTemp("", "e2e-")
	if err != nil {
		t.Fatal(err)
	}
	home, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	d := &demoWorld{t: t, runDir: filepath.Join(dir, "run"), home: home, before: traces(t, home)}
	t.Cleanup(func() {
		d.assertNothingLeft()
		home.Close()
		os.RemoveAll(dir)
	})
	return d
}

func (d *demoWorld) args(args ...string) []string {
	return append(append([]string{"demo"}, args...), "--run-dir", d.runDir)
}

// processes are those that run one of the demo's commands.
func (d *demoWorld) processes() []string {
	d.t.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		d.t.Fatal(err)
	}
	var found []string
	for _, e := range entries {
		if b, err := os.ReadFile(e); err == nil && strings.Contains(string(b), d.runDir) {
			found = append(found, strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return found
}

func (d *demoWorld) assertNothingLeft() {
	d.t.Helper()
	if p := d.processes(); p != nil {
		d.t.Errorf("still running: %q", p)
	}
	if entries, err := os.ReadDir(d.runDir); err == nil {
		d.t.Errorf("left in the run directory: %v", entries)
	}
	if after := traces(d.t, d.home); !slices.Equal(d.before, after) {
		d.t.Errorf("links and routes of the host changed:\n%v\n%v", d.before, after)
	}
}

// TestDemo: the main job in one command, with nothing left behind.
func TestDemo(t *testing.T) {
	d := newDemoWorld(t)
	status, out, errs := run(t, tweedBin, d.args("--nodes", "3")...)
	if status != 0 || errs != "" {
		t.Fatalf("exit status %d\n%s%s", status, out, errs)
	}
	for word, times := range map[string]int{
		"sha256 equal": 6, "✓ ping": 6, "MTU 1426": 3, "MTU 1450": 3, "leases": 2, "0 dropped": 12, "✓ removed": 1, "Next:": 1,
	} {
		if n := strings.Count(out, word); n != times {
			t.Errorf("%q stands there %d times, want %d", word, n, times)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
}

// TestKeptDemo stays until it is told to go; another demo beside it is no
// problem, another kept one is refused.
func TestKeptDemo(t *testing.T) {
	d := newDemoWorld(t)
	if status, out, errs := run(t, tweedBin, d.args("--keep", "--backend", "udp")...); status != 0 {
		t.Fatalf("exit status %d\n%s%s", status, out, errs)
	}
	dirs, err := filepath.Glob(filepath.Join(d.runDir, "demo-*", "udp-n1"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("state directories %v, %v", dirs, err)
	}
	status, out, errs := run(t, tweedBin, "status", "-o", "json", "--state-dir", dirs[0])
	var s struct {
		Ready bool
		Peers map[string]int
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil || !s.Ready || s.Peers["udp"] != 1 {
		t.Errorf("status of n1: exit status %d, %s%s", status, out, errs)
	}
	if status, _, errs := run(t, tweedBin, d.args("--keep")...); status != 1 || !strings.Contains(errs, "demo down") || strings.Count(errs, "\n") != 1 {
		t.Errorf("a second kept demo: exit status %d, %q, want one line that names `demo down`", status, errs)
	}
	if status, _, errs := run(t, tweedBin, d.args("--backend", "vxlan")...); status != 0 {
		t.Errorf("a demo beside the kept one: exit status %d, %s", status, errs)
	}
	processes := 3
	if !tunUsable() {
		processes += 2 // each node has a container then
	}
	if n := len(d.processes()); n != 3 {
		t.Errorf("%d processes of the kept demo, want etcd and two nodes", n)
	}
	if status, out, errs := run(t, tweedBin, d.args("down")...); status != 0 || !strings.Contains(out, fmt.Sprintf("processes ended: %d", processes)) {
		t.Errorf("down: exit status %d, %s%s", status, out, errs)
	}
	d.assertNothingLeft()
	if status, out, _ := run(t, tweedBin, d.args("down")...); status != 0 || !strings.Contains(out, "no demo is running") {
		t.Errorf("down with nothing to do: exit status %d, %s", status, out)
	}
}

// TestInterruptedDemo: after Ctrl-C nothing is left when it ends, and after kill -9
// in a moment.
func TestInterruptedDemo(t *testing.T) {
	d := newDemoWorld(t)
	for _, c := range []struct {
		signal syscall.Signal
		status int
	}{{unix.SIGINT, 1}, {unix.SIGTERM, 1}, {unix.SIGKILL, -1}} {
		cmd := exec.Command(tweedBin, d.args("--backend", "udp")...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		d.await("etcd and two nodes run", func() bool { return d.pidOf("etcd") != 0 && d.pidOf("udp-n1") != 0 && d.pidOf("udp-n2") != 0 })
		cmd.Process.Signal(c.signal)
		cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != c.status {
			t.Errorf("after %s: exit status %d, want %d", c.signal, got, c.status)
		}
		if c.signal == unix.SIGKILL {
			d.awaitNothingLeft()
		}
		d.assertNothingLeft()
	}
}

// awaitNothingLeft waits for the end of the processes and the files.
func (d *demoWorld) awaitNothingLeft() {
	d.t.Helper()
	d.await("processes and files are gone", func() bool {
		_, err := os.Stat(d.runDir)
		return os.IsNotExist(err) && d.processes() == nil
	})
}

// TestKilledDemoLeavesNothing: kill -9 of an ordinary user's demo, that is of both
// processes of it, or of the inner one alone.
func TestKilledDemoLeavesNothing(t *testing.T) {
	needTool(t, "setpriv")
	for _, name := range []string{"both", "the inner one"} {
		t.Run(name, func(t *testing.T) {
			d := newDemoWorld(t)
			d.runDir = filepath.Join(filepath.Dir(d.runDir), "home", "run")
			forOrdinaryUser(t, filepath.Dir(d.runDir))
			argv := append(asOrdinaryUser(), append([]string{tweedBin}, d.args("--backend", "udp", "--tier", "veth")...)...)
			cmd := exec.Command(argv[0], argv[1:]...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var inner int
			d.await("a node runs", func() bool { inner = parentOf(d.pidOf("udp-n1")); return inner != 0 })
			if name == "both" && inner != cmd.Process.Pid {
				cmd.Process.Kill()
			}
			if err := syscall.Kill(inner, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				t.Fatal(err)
			}
			cmd.Wait()
			d.awaitNothingLeft()
		})
	}
}

// parentOf is the parent of a process, 0 if it is gone.
func parentOf(pid int) (ppid int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		fmt.Sscanf(line, "PPid: %d", &ppid)
	}
	return ppid
}

// TestDemoKilledBeforeItIsKeptIsRemoved: its processes do not end with it, but are
// ended, those too that have just been started; and if what does that was killed as
// well, down finds them.
func TestDemoKilledBeforeItIsKeptIsRemoved(t *testing.T) {
	for _, c := range []struct {
		newest  string
		sweeper bool
	}{{"etcd", true}, {"udp-n1", true}, {"udp-n2", true}, {"etcd", false}, {"udp-n1", false}} {
		d := newDemoWorld(t)
		cmd := exec.Command(tweedBin, d.args("--keep", "--backend", "udp")...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		d.await(c.newest+" runs", func() bool { return d.pidOf(c.newest) != 0 })
		if !c.sweeper {
			sweeper := d.pidWith("__demo-sweep")
			if sweeper == 0 {
				t.Fatal("no sweeper runs")
			}
			if err := syscall.Kill(sweeper, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		cmd.Process.Kill()
		cmd.Wait()
		if c.sweeper {
			d.awaitNothingLeft()
			continue
		}
		if status, out, errs := run(t, tweedBin, d.args("down")...); status != 0 || !strings.Contains(out, "removed") {
			t.Errorf("down: exit status %d, %s%s", status, out, errs)
		}
		d.assertNothingLeft()
	}
}

func (d *demoWorld) await(what string, holds func() bool) {
	d.t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			d.t.Fatalf("%s: not within %s", what, patience)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestFailedDemoShowsTheLog: a node dies in the middle.
func TestFailedDemoShowsTheLog(t *testing.T) {
	d := newDemoWorld(t)
	cmd := exec.Command(tweedBin, d.args("--backend", "udp")...)
	var errs strings.Builder
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	victim := 0
	d.await("n2 runs", func() bool { victim = d.pidOf("udp-n2"); return victim != 0 })
	if err := syscall.Kill(victim, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 1 {
		t.Errorf("exit status %d, want 1", got)
	}
	if out := errs.String(); !strings.Contains(out, "log:") || !strings.Contains(out, "\ntweed: demo: ") {
		t.Errorf("said %q, want the end of a log and one error line", out)
	}
}

// pidOf finds the node, or etcd, with that directory.
func (d *demoWorld) pidOf(dir string) int { return d.pidWith("/" + dir + "\x00") }

// pidWith finds the process of the demo with a text in its arguments, 0 if there
// is none.
func (d *demoWorld) pidWith(text string) int {
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, e := range entries {
		b, err := os.ReadFile(e)
		if err != nil || !strings.Contains(string(b), d.runDir) || !strings.Contains(string(b), text) {
			continue
		}
		pid := 0
		for _, digit := range filepath.Base(filepath.Dir(e)) {
			pid = pid*10 + int(digit-'0')
		}
		return pid
	}
	return 0
}

// kept runs a command on the kept demo, whose first arguments are a subcommand
// and a node.
func (d *demoWorld) kept(status int, args ...string) string {
	d.t.Helper()
	at := len(args)
	if i := slices.Index(args, "--"); i >= 0 {
		at = i
	}
	line := slices.Insert(append([]string{"demo"}, args...), at+1, "--run-dir", d.runDir)
	argv := append(d.as, append([]string{tweedBin}, line...)...)
	got, out, errs := run(d.t, argv[0], argv[1:]...)
	if got != status {
		d.t.Errorf("%q: exit status %d, want %d\n%s%s", args, got, status, out, errs)
	}
	return out + errs
}

// TestKeptDemoIsEnteredMeasuredBrokenAndHealed goes through what the demo
// advises, as root with TUN devices and without privilege with containers.
func TestKeptDemoIsEnteredMeasuredBrokenAndHealed(t *testing.T) {
	needTool(t, "ping", "setpriv")
	for _, tier := range []string{"tun", "veth"} {
		t.Run(tier, func(t *testing.T) {
			d := newDemoWorld(t)
			if tier == "veth" {
				d.runDir = filepath.Join(filepath.Dir(d.runDir), "home", "run")
				forOrdinaryUser(t, filepath.Dir(d.runDir))
				d.as = append(asOrdinaryUser(), "env", "XDG_RUNTIME_DIR=/nonexistent")
			} else {
				needTUN(t)
			}
			d.kept(0, "--keep", "--backend", "vxlan", "--tier", tier)
			records, err := filepath.Glob(filepath.Join(d.runDir, "demo-*", "demo.json"))
			if err != nil || len(records) != 1 {
				t.Fatalf("records %v, %v", records, err)
			}
			var r struct {
				Nodes []struct{ Name, Address string }
			}
			if err := json.Unmarshal([]byte(readFile(t, records[0])), &r); err != nil || len(r.Nodes) != 2 {
				t.Fatalf("record %+v, %v", r, err)
			}
			other := r.Nodes[1].Address
			reach := func(status int) {
				t.Helper()
				d.kept(status, "ssh", "n1", "--", "ping", "-c", "1", "-W", "5", "-w", "5", other)
			}
			reach(0)
			if out := d.kept(7, "ssh", "n2", "--", "sh", "-c", "cat /proc/net/fib_trie; exit 7"); !strings.Contains(out, other) {
				t.Errorf("n2 has no address %s: %s", other, out)
			}
			if out := d.kept(127, "ssh", "n1", "--", "no-such-command"); !strings.Contains(out, "no-such-command: no such command") {
				t.Errorf("an unknown command: %s", out)
			}
			if out := d.kept(1, "ssh", "n9"); !strings.Contains(out, "n9: no such node (have: n1, n2)") {
				t.Errorf("an unknown node: %s", out)
			}
			var b struct {
				Schema int
				Pairs  []struct {
					TCP         float64 `json:"tcp_gbit_per_s"`
					UDPReceived uint64  `json:"udp_received"`
					RTT         float64 `json:"rtt_us"`
				}
			}
			if out := d.kept(0, "bench", "-o", "json"); json.Unmarshal([]byte(out), &b) != nil || b.Schema != 1 || len(b.Pairs) != 2 ||
				b.Pairs[0].TCP <= 0 || b.Pairs[1].UDPReceived == 0 || b.Pairs[0].RTT <= 0 {
				t.Errorf("bench: %s", out)
			}

			d.kept(0, "break", "n2", "--partition")
			reach(1)
			d.kept(0, "heal", "n2")
			reach(0)
			d.kept(0, "break", "n2", "--kill")
			if out := d.kept(1, "break", "n2", "--kill"); !strings.Contains(out, "broken already") {
				t.Errorf("killed twice: %s", out)
			}
			reach(1)
			d.kept(0, "heal", "n2")
			reach(0)
			if out := d.kept(0, "down"); !strings.Contains(out, "removed") {
				t.Errorf("down: %s", out)
			}
		})
	}
}

// TestImpairedDemoCountsWhatItLoses: nothing is dropped for another reason.
func TestImpairedDemoCountsWhatItLoses(t *testing.T) {
	d := newDemoWorld(t)
	tier := "tun"
	if !tunUsable() {
		tier = "veth"
	}
	out := d.kept(0, "--backend", "udp", "--tier", tier, "--loss", "10%", "--delay", "1ms", "--reorder", "5%", "--seed", "3", "--mtu", "1300")
	for word, times := range map[string]int{
		"loss=10%,delay=1ms,reorder=5%,seed=3": 1, "underlay         192.0.2.0/24, MTU 1300": 1, "MTU 1272": 2, "sha256 equal": 2, "dropped (impaired ": 2,
	} {
		if n := strings.Count(out, word); n != times {
			t.Errorf("%q stands there %d times, want %d\n%s", word, n, times, out)
		}
	}
}
