package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/netns"
	"tweed/node"
)

// guarded is a command of `tweed run` that ends when its gate is opened.
type guarded struct {
	*process
	gate string
}

func startGuarded(w *world, name string, flags ...string) *guarded {
	w.t.Helper()
	c := &guarded{gate: filepath.Join(w.dir, name+".gate")}
	command(w.t, w.lan.Nodes[0], "mkfifo", c.gate)
	argv := append([]string{tweedBin, "run", "--name", name}, flags...)
	c.process = w.launch(w.lan.Nodes[0], name, append(argv, "--", "sh", "-c", "echo runs; cat "+c.gate)...)
	w.await(name+" runs", func() bool { return strings.Contains(c.output(), "runs") })
	return c
}

// finish opens the gate.
func (c *guarded) finish(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(c.gate, nil, 0); err != nil {
		t.Fatal(err)
	}
	if status := c.wait(); status != 0 {
		t.Errorf("%s: status %d: %s", c.name, status, c.output())
	}
}

// host is where the command runs, as the engine knows it.
func (c *guarded) host(t *testing.T, api *node.Client) host {
	t.Helper()
	a, err := api.Attachments(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range a.Attachments {
		if s.Name != c.name {
			continue
		}
		ns, err := netns.OfProcess(s.PID)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns.Close() })
		return host{name: c.name, ns: ns, addr: s.Addr}
	}
	t.Fatalf("%s is not attached: %+v", c.name, a.Attachments)
	return host{}
}

// TestCommandsAreTakenBackWhenTheirEngineIsKilled: one of those who use it starts it
// again, and all keep their addresses.
func TestCommandsAreTakenBackWhenTheirEngineIsKilled(t *testing.T) {
	for _, tier := range []string{"tun", "veth"} {
		t.Run(tier, func(t *testing.T) {
			if tier == "tun" {
				needTUN(t)
			}
			w := newWorld(t, 1)
			w.config(udpConfig)
			state := filepath.Join(w.dir, "state")
			flags := []string{"--etcd-endpoints", w.endpoint(), "--iface", netns.LANInterface, "--tier", tier, "--state-dir", state}
			first := startGuarded(w, "first", flags...)
			second := startGuarded(w, "second", flags...)
			api := node.Dial(filepath.Join(state, "api.sock"))
			defer api.Close()
			a, b := first.host(t, api), second.host(t, api)
			assertPing(t, a, b, 56)
			for kill := 1; kill <= 2; kill++ {
				engines := enginesOf(t, state)
				if len(engines) != 1 {
					t.Fatalf("engines %v, want one", engines)
				}
				pid, err := strconv.Atoi(engines[0])
				if err != nil {
					t.Fatal(err)
				}
				if err := syscall.Kill(pid, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				for _, c := range []*guarded{first, second} {
					w.await(c.name+" is taken back", func() bool {
						return strings.Count(c.output(), "was killed; pid ") == kill && strings.Count(c.output(), "has taken sh back") == kill
					})
				}
				w.await("one engine runs", func() bool { return len(enginesOf(t, state)) == 1 })
				if now := first.host(t, api); now.addr != a.addr {
					t.Errorf("first has address %s, had %s", now.addr, a.addr)
				}
				assertPing(t, a, b, 56)
				assertPing(t, b, a, 56)
			}
			first.finish(t)
			second.finish(t)
			if left := enginesOf(t, state); left != nil {
				t.Errorf("engines left: %v", left)
			}
		})
	}
}

// TestRunSaysThatItsEngineHasEnded where it is not for run to start it again.
func TestRunSaysThatItsEngineHasEnded(t *testing.T) {
	w := newWorld(t, 1)
	w.config(udpConfig)
	e := w.prepare(0, "--attach-only", "--release-on-exit")
	e.process = w.launch(e.ns, e.name, e.argv...)
	e.await("ready and running", func(s node.Status) bool { return s.Ready && s.Phase == node.PhaseRunning })
	c := startGuarded(w, "c", "--tier", "veth", "--socket", e.api.Path())
	where := c.host(t, e.api)
	e.end(unix.SIGKILL)
	w.await("a word about the engine", func() bool {
		return strings.Contains(c.output(), "has ended, and sh has no network until it runs again; type: tweed up ")
	})
	e.again()
	w.await("a word about the next one", func() bool { return strings.Contains(c.output(), "has taken sh back") })
	if now := c.host(t, e.api); now.addr != where.addr {
		t.Errorf("address %s, was %s", now.addr, where.addr)
	}
	c.finish(t)
}

// TestRunSaysThatItsCommandWasDetached, and does not start an engine for it again.
func TestRunSaysThatItsCommandWasDetached(t *testing.T) {
	w := newWorld(t, 1)
	w.config(udpConfig)
	state := filepath.Join(w.dir, "state")
	c := startGuarded(w, "d", "--etcd-endpoints", w.endpoint(), "--iface", netns.LANInterface, "--tier", "veth", "--state-dir", state)
	if status, _, errs := run(t, tweedBin, "detach", "--socket", filepath.Join(state, "api.sock"), "d"); status != 0 {
		t.Fatalf("detach: %s", errs)
	}
	w.await("a word about the detached command", func() bool { return strings.Contains(c.output(), "has let go of sh") })
	c.finish(t)
	if n := strings.Count(c.output(), "tweed: run: "); n != 1 {
		t.Errorf("%d lines, want one: %s", n, c.output())
	}
	if left := enginesOf(t, state); left != nil {
		t.Errorf("engines left: %v", left)
	}
}
