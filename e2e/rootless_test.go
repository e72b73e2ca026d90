package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed/netns"
	"tweed/node"
)

// ordinaryUID is who engines and containers run as when the tests are root.
const ordinaryUID = "54321"

// container is a process in a user and a network namespace of its own, as any
// user can make one, attached to an engine.
type container struct {
	*process
	host
	engine *daemon
	pid    int    // of its first process
	kill   func() // ends it with SIGKILL
}

// asOrdinaryUser is what to put before a command so that it has no privilege.
// Inside a user namespace there is no other user to be.
func asOrdinaryUser() []string {
	if _, inside := netns.OutsideUID(); inside {
		return nil
	}
	return []string{"setpriv", "--reuid", ordinaryUID, "--regid", ordinaryUID, "--clear-groups"}
}

// ordinaryEngine starts `tweed up --attach-only` on node i without privilege.
func ordinaryEngine(w *world, i int, flags ...string) *daemon {
	w.t.Helper()
	e := w.prepare(i, append([]string{"--attach-only", "--release-on-exit"}, flags...)...)
	forOrdinaryUser(w.t, e.dir)
	e.argv = append(asOrdinaryUser(), e.argv...)
	e.process = w.launch(e.ns, e.name, e.argv...)
	e.await("ready and running", func(s node.Status) bool { return s.Ready && s.Phase == node.PhaseRunning })
	return e
}

// forOrdinaryUser gives a directory to the ordinary user and lets it reach the
// directory and the commands.
func forOrdinaryUser(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, parent := range []string{filepath.Dir(dir), filepath.Dir(tweedBin)} {
		if err := os.Chmod(parent, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if asOrdinaryUser() == nil {
		return
	}
	if err := os.Chown(dir, 54321, 54321); err != nil {
		t.Fatal(err)
	}
}

// newContainer starts a container on node i, not attached yet.
func newContainer(w *world, i int, name string) *container {
	w.t.Helper()
	where := w.lan.Nodes[i]
	c := &container{process: w.launch(where, name, append(asOrdinaryUser(), "unshare", "-Urn", "sleep", "600")...)}
	c.pid, c.kill = c.cmd.Process.Pid, func() { c.end(unix.SIGKILL) }
	outer, err := where.ID()
	if err != nil {
		w.t.Fatal(err)
	}
	w.await(name+" has its namespace", func() bool {
		ns, err := netns.OfProcess(c.pid)
		if err != nil {
			return false
		}
		id, err := ns.ID()
		// unshare runs sleep only after its namespaces are complete.
		cmdline, rerr := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", c.pid))
		if err != nil || rerr != nil || id == outer || !strings.HasPrefix(string(cmdline), "sleep") {
			ns.Close()
			return false
		}
		c.host = host{name: name, ns: ns}
		return true
	})
	w.t.Cleanup(func() { c.ns.Close() })
	return c
}

// attach attaches the container with the command.
func (c *container) attach(t *testing.T, e *daemon, flags ...string) {
	t.Helper()
	status, _, stderr := run(t, tweedBin, append([]string{"attach", "--socket", e.api.Path(), "--pid", fmt.Sprint(c.pid), "--name", c.host.name}, flags...)...)
	if status != 0 {
		t.Fatalf("attach %s: %s", c.host.name, stderr)
	}
	c.engine = e
	c.addr = c.status(t).Addr
}

func (c *container) status(t *testing.T) node.AttachmentStatus {
	t.Helper()
	for _, s := range attached(t, c.engine) {
		if s.Name == c.host.name {
			return s
		}
	}
	t.Fatalf("%s is not attached to %s", c.host.name, c.engine.name)
	return node.AttachmentStatus{}
}

func attached(t *testing.T, e *daemon) []node.AttachmentStatus {
	t.Helper()
	a, err := e.api.Attachments(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a.Attachments
}

func TestContainersWithoutPrivilegeReachEverybody(t *testing.T) {
	needTool(t, "setpriv", "unshare")
	for _, tier := range []string{"tun", "veth"} {
		t.Run(tier, func(t *testing.T) {
			w := newWorld(t, 4)
			w.config(vxlanConfig)
			kernel := newKernelPeer(w, 3, "10.244.240.0/24")
			a, b := ordinaryEngine(w, 0), ordinaryEngine(w, 1)
			engines := []*daemon{a, b}
			if tunUsable() {
				engines = append(engines, w.up(2))
			} else {
				t.Log("without a node that has a TUN device: /dev/net/tun may not be opened")
			}
			awaitPeers(len(engines), engines...)
			for _, e := range engines {
				kernel.know(e)
			}
			var all []*container
			for i, e := range []*daemon{a, a, b, b} {
				c := newContainer(w, e.i, fmt.Sprintf("c%d", i+1))
				if tier == "tun" && !tunForEverybody() {
					refusedTUN(t, c, e)
					return
				}
				c.attach(t, e, "--tier", tier)
				all = append(all, c)
			}
			for i, from := range all {
				if s := from.status(t); string(s.Tier) != tier || s.Offload != "full" {
					t.Errorf("%s: tier %s, offload %s (%s): want %s, full", s.Name, s.Tier, s.Offload, s.OffloadReason, tier)
				}
				for _, to := range all[i+1:] {
					assertTraffic(t, from.host, to.host, transferBytes()/4, []int{1, 1398, 1399, 9000, 60000})
				}
			}
			for _, root := range engines[2:] {
				assertTraffic(t, all[0].host, root.host(), transferBytes()/4, []int{1, 1398, 9000})
			}
			assertTraffic(t, all[3].host, kernel.host, transferBytes()/4, []int{1, 1398, 9000})
			for _, e := range []*daemon{a, b} {
				assertUnprivileged(t, e)
				assertBalance(t, e)
			}
		})
	}
}

// tunForEverybody reports whether the device node can be opened by others than
// its owner.
func tunForEverybody() bool {
	fi, err := os.Stat("/dev/net/tun")
	return asOrdinaryUser() == nil && tunUsable() || err == nil && fi.Mode().Perm()&0o006 == 0o006
}

// refusedTUN checks what an ordinary user is told where the node is closed.
func refusedTUN(t *testing.T, c *container, e *daemon) {
	t.Helper()
	status, _, stderr := run(t, tweedBin, "attach", "--socket", e.api.Path(), "--pid", fmt.Sprint(c.pid), "--tier", "tun")
	if status != 1 || !strings.Contains(stderr, "chmod 0666 /dev/net/tun") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("--tier tun with a closed device node: status %d, %q", status, stderr)
	}
	if n := len(attached(t, e)); n != 0 {
		t.Errorf("%d attachments after a refusal", n)
	}
}

// assertUnprivileged reads the engine's capabilities from the kernel.
func assertUnprivileged(t *testing.T, e *daemon) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", e.status().PID))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"NoNewPrivs:\t1"}
	if asOrdinaryUser() != nil {
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapAmb"} {
			want = append(want, set+":\t0000000000000000")
		}
	}
	for _, line := range want {
		if !slices.Contains(strings.Split(string(b), "\n"), line) {
			t.Errorf("%s: %q is not in its status:\n%s", e.name, line, b)
		}
	}
}

func TestAttachmentsEndWithTheirContainers(t *testing.T) {
	needTool(t, "setpriv", "unshare", "nsenter", "ip")
	w := newWorld(t, 1)
	w.config(udpConfig)
	e := ordinaryEngine(w, 0)
	stays := newContainer(w, 0, "stays")
	stays.attach(t, e)

	second := []string{"attach", "--socket", e.api.Path(), "--pid", fmt.Sprint(stays.pid), "--name", "again"}
	if status, _, stderr := run(t, tweedBin, second...); status != 1 || !strings.Contains(stderr, "tweed detach stays") {
		t.Errorf("second attach: status %d, %q", status, stderr)
	}

	seen := map[netip.Addr]bool{stays.addr: true}
	for i := range 3 {
		c := newContainer(w, 0, fmt.Sprintf("dies-%d", i))
		c.attach(t, e)
		if seen[c.addr] {
			t.Errorf("address %s given away twice although others were never used", c.addr)
		}
		seen[c.addr] = true
		assertPing(t, stays.host, c.host, 56)
		c.kill()
		w.await("the engine lets go", func() bool { return len(attached(t, e)) == 1 })
	}
	cut := newContainer(w, 0, "cut")
	cut.attach(t, e)
	if status, _, stderr := run(t, "nsenter", "-t", fmt.Sprint(cut.pid), "-n",
		"ip", "link", "del", "dev", node.DefaultIfName); status != 0 {
		t.Fatalf("delete the interface in the container: %s", stderr)
	}
	w.await("the engine lets go of a container without interface", func() bool { return len(attached(t, e)) == 1 })
	// Only what is attached is taken: the released addresses can be asked for.
	c := newContainer(w, 0, "wants")
	c.attach(t, e, "--address", stays.addr.Next().String())
	if c.addr != stays.addr.Next() {
		t.Errorf("address %s, want %s", c.addr, stays.addr.Next())
	}
	if status, _, stderr := run(t, tweedBin, "detach", "--socket", e.api.Path(), "wants"); status != 0 {
		t.Errorf("detach: %s", stderr)
	}
	w.await("the interface is removed", func() bool {
		return !slices.ContainsFunc(traces(t, c.ns), func(s string) bool { return strings.Contains(s, node.DefaultIfName) })
	})
}

func TestContainersAreTakenBackAfterACrash(t *testing.T) {
	needTool(t, "setpriv", "unshare")
	w := newWorld(t, 2)
	w.config(udpConfig)
	a, b := ordinaryEngine(w, 0), ordinaryEngine(w, 1)
	awaitPeers(1, a, b)
	here, there, dies := newContainer(w, 0, "here"), newContainer(w, 1, "there"), newContainer(w, 0, "dies")
	here.attach(t, a)
	there.attach(t, b)
	dies.attach(t, a)
	s := stream(t, there.host, here.host)
	defer s.Stop()
	awaitFlow(w, s, 100)

	a.end(unix.SIGKILL)
	w.await("no stale interface", func() bool {
		return !slices.ContainsFunc(traces(t, here.ns), func(s string) bool { return strings.Contains(s, node.DefaultIfName) })
	})
	dies.kill()
	a.again()
	a.await("taken back", func(s node.Status) bool {
		return len(s.Attachments) == 1 && s.Attachments[0].State == "up" && s.Attachments[0].Addr == here.addr
	})
	awaitFlow(w, s, 100)
	if p := a.status().Problems; !slices.ContainsFunc(p, func(s string) bool { return strings.Contains(s, "attachment dies") }) {
		t.Errorf("the container that ended meanwhile is not reported: %q", p)
	}
}

func TestRunPassesTheStatusOnAndLeavesNothing(t *testing.T) {
	needTool(t, "setpriv", "unshare")
	w := newWorld(t, 1)
	w.config(udpConfig)
	dir := filepath.Join(w.dir, "home")
	forOrdinaryUser(t, dir)
	before := traces(t, w.lan.Nodes[0])
	for i, c := range []struct {
		command []string
		status  int
		output  string
	}{
		{[]string{"sh", "-c", "cat /proc/net/route /proc/net/dev; exit 7"}, 7, node.DefaultIfName},
		{[]string{"sh", "-c", "kill -USR1 $$"}, 128 + int(unix.SIGUSR1), ""},
		{[]string{"true"}, 0, ""}, // over before its engine looks
		{[]string{"/no/such/command"}, 127, "no such command"},
		{[]string{"/etc/passwd"}, 126, "permission denied"},
	} {
		argv := append(asOrdinaryUser(), "env", "HOME="+dir, "XDG_RUNTIME_DIR="+dir, "XDG_STATE_HOME="+dir, "TMPDIR="+dir,
			tweedBin, "run", "--etcd-endpoints", w.endpoint(), "--iface", netns.LANInterface, "--tier", "veth",
			"--state-dir", filepath.Join(dir, "state"), "--")
		p := w.launch(w.lan.Nodes[0], fmt.Sprintf("run-%d", i), append(argv, c.command...)...)
		if status := p.wait(); status != c.status || !strings.Contains(p.output(), c.output) {
			t.Errorf("%q: status %d, want %d; output: %s", c.command, status, c.status, p.output())
		}
		if after := traces(t, w.lan.Nodes[0]); !slices.Equal(after, before) {
			t.Errorf("%q left something behind: %q", c.command, after)
		}
		if left := enginesOf(t, filepath.Join(dir, "state")); left != nil {
			t.Errorf("%q left engines behind: %v", c.command, left)
		}
	}
}

// TestRunSaysWhatItWaitsFor, and goes on when it is there.
func TestRunSaysWhatItWaitsFor(t *testing.T) {
	w := newWorld(t, 1)
	p := w.launch(w.lan.Nodes[0], "run", tweedBin, "run", "--etcd-endpoints", w.endpoint(), "--iface", netns.LANInterface,
		"--tier", "veth", "--state-dir", filepath.Join(w.dir, "state"), "--", "echo", "runs")
	w.await("a word about the missing config", func() bool {
		return strings.Contains(p.output(), "waiting for the overlay") && strings.Contains(p.output(), "tweed network set")
	})
	w.config(udpConfig)
	if status := p.wait(); status != 0 || !strings.Contains(p.output(), "runs") {
		t.Errorf("status %d, output: %s", status, p.output())
	}
}

// TestLastOfTwoCommandsWaitsForTheEngine that the first one started: who looks at
// the processes after it finds none.
func TestLastOfTwoCommandsWaitsForTheEngine(t *testing.T) {
	needTool(t, "unshare")
	w := newWorld(t, 1)
	w.config(udpConfig)
	state := filepath.Join(w.dir, "state")
	start := func(name string) (p *process, gate string) {
		gate = filepath.Join(w.dir, name+".gate")
		command(t, w.lan.Nodes[0], "mkfifo", gate)
		p = w.launch(w.lan.Nodes[0], name, tweedBin, "run", "--etcd-endpoints", w.endpoint(), "--iface", netns.LANInterface,
			"--tier", "veth", "--state-dir", state, "--", "sh", "-c", "echo runs; cat "+gate)
		w.await(name+" runs", func() bool { return strings.Contains(p.output(), "runs") })
		return p, gate
	}
	first, endFirst := start("first")
	second, endSecond := start("second")
	for _, c := range []struct {
		p    *process
		gate string
		left int
	}{{first, endFirst, 1}, {second, endSecond, 0}} {
		if err := os.WriteFile(c.gate, nil, 0); err != nil {
			t.Fatal(err)
		}
		if status := c.p.wait(); status != 0 {
			t.Errorf("%s: status %d: %s", c.p.name, status, c.p.output())
		}
		if left := enginesOf(t, state); len(left) != c.left {
			t.Errorf("after the %s command: engines %v, want %d", c.p.name, left, c.left)
		}
	}
}

// TestEngineStartedForACommandEndsWithoutEtcd: the command that started it was
// killed, so nobody ever attaches, and there is no overlay.
func TestEngineStartedForACommandEndsWithoutEtcd(t *testing.T) {
	w := newUnderlay(t, 1)
	state := filepath.Join(w.dir, "state")
	p := w.launch(w.lan.Nodes[0], "proxy", tweedBin, "proxy", "--etcd-endpoints", w.endpoint(), "--iface", netns.LANInterface,
		"--state-dir", state, "--socks5", "127.0.0.1:0")
	socket := filepath.Join(state, "api.sock")
	w.await("the engine waits for etcd", func() bool {
		api := node.Dial(socket)
		defer api.Close()
		s, err := api.Status(t.Context())
		return err == nil && s.Phase == node.PhaseWaiting
	})
	if n := len(enginesOf(t, state)); n != 1 {
		t.Fatalf("%d engines, want 1", n)
	}
	p.end(unix.SIGKILL)
	w.await("the engine ends", func() bool { return enginesOf(t, state) == nil })
	if _, err := os.Stat(socket); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", socket, err)
	}
}

// enginesOf are the processes that run an engine with a state directory.
func enginesOf(t *testing.T, dir string) (pids []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range all {
		b, err := os.ReadFile(file) // empty of one that has ended
		argv := strings.Split(string(b), "\x00")
		if err == nil && slices.Contains(argv, "up") && slices.Contains(argv, "--state-dir="+dir) {
			pids = append(pids, filepath.Base(filepath.Dir(file)))
		}
	}
	return pids
}

// TestAttachingAgainAndAgainLeaksNothing attaches and detaches one container,
// TWEED_E2E_CYCLES times (100), and compares the engine before and after.
func TestAttachingAgainAndAgainLeaksNothing(t *testing.T) {
	needTool(t, "setpriv", "unshare")
	w := newWorld(t, 1)
	w.config(udpConfig)
	e := ordinaryEngine(w, 0)
	c := newContainer(w, 0, "c")
	cycle := func(n int) {
		for range n {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			s, err := e.api.Attach(ctx, node.AttachRequest{PID: c.pid, Tier: "veth"})
			if err == nil {
				err = e.api.Detach(ctx, s.Name)
			}
			cancel()
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	cycle(10)
	before := inventory(t, e)
	cycle(envInt("TWEED_E2E_CYCLES", 100))
	w.await("descriptors and threads are back", func() bool {
		now := inventory(t, e)
		return now.fds <= before.fds && now.threads <= before.threads+2
	})
	after := inventory(t, e)
	t.Logf("before %+v, after %+v", before, after)
	if after.rss > before.rss+16<<10 {
		t.Errorf("resident memory grew from %d to %d KiB", before.rss, after.rss)
	}
}

// counts are what a process holds; rss is in KiB.
type counts struct{ fds, threads, rss int }

func inventory(t *testing.T, e *daemon) counts {
	t.Helper()
	pid := e.status().PID
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	c := counts{fds: len(fds)}
	for line := range strings.Lines(readFile(t, fmt.Sprintf("/proc/%d/status", pid))) {
		fmt.Sscanf(line, "Threads: %d", &c.threads)
		fmt.Sscanf(line, "VmRSS: %d", &c.rss)
	}
	return c
}

// TestDemoWithoutPrivilege runs the demo as an ordinary user in the tiers that
// need no device node.
func TestDemoWithoutPrivilege(t *testing.T) {
	needTool(t, "setpriv")
	for tier, want := range map[string]string{"veth": "container", "netstack": "nodes inside this program"} {
		t.Run(tier, func(t *testing.T) {
			w := newUnderlay(t, 1)
			dir := filepath.Join(w.dir, "home")
			forOrdinaryUser(t, dir)
			argv := append(asOrdinaryUser(), "env", "HOME="+dir, "TMPDIR="+dir, "XDG_RUNTIME_DIR="+dir,
				tweedBin, "demo", "--tier", tier, "--run-dir", filepath.Join(dir, "run"))
			p := w.launch(nil, "demo", argv...)
			select {
			case <-p.ended:
			case <-time.After(3 * patience):
				t.Fatalf("the demo still runs: %s", p.output())
			}
			out := p.output()
			if status := p.wait(); status != 0 || !strings.Contains(out, want) || strings.Count(out, "sha256 equal") != 4 {
				t.Errorf("status %d: %s", status, out)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
				t.Errorf("left in the home directory: %v, %v", left, err)
			}
		})
	}
}

// TestDemoInsideAUserNamespace: its root has all capabilities, but the network
// is still the host's, and it may be forbidden to make more user namespaces.
func TestDemoInsideAUserNamespace(t *testing.T) {
	needTool(t, "setpriv", "unshare")
	for name, c := range map[string]struct{ before, want string }{
		"more are allowed": {"true", "underlay"},
		"none is allowed":  {"echo 0 >/proc/sys/user/max_user_namespaces", "user.max_user_namespaces is 0"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newUnderlay(t, 1)
			dir := filepath.Join(w.dir, "home")
			forOrdinaryUser(t, dir)
			p := w.launch(nil, "demo", append(asOrdinaryUser(), "env", "HOME="+dir, "TMPDIR="+dir, "XDG_RUNTIME_DIR="+dir,
				"unshare", "-Ur", "sh", "-c", c.before+`&& exec "$0" demo --backend udp --run-dir "$1"`, tweedBin, filepath.Join(dir, "run"))...)
			status := p.wait()
			if out := p.output(); status != 0 || !strings.Contains(out, c.want) || strings.Count(out, "sha256 equal") != 2 {
				t.Errorf("status %d: %s", status, out)
			}
		})
	}
}
