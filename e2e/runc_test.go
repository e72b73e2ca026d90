package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"tweed/netns"
)

// TestContainersOfRuncReachEverybody: two unprivileged engines, each with a
// container of a rootless container runtime and one of unshare.
func TestContainersOfRuncReachEverybody(t *testing.T) {
	needTool(t, "setpriv", "unshare", "runc")
	w := newWorld(t, 2)
	w.config(vxlanConfig)
	engines := []*daemon{ordinaryEngine(w, 0), ordinaryEngine(w, 1)}
	awaitPeers(1, engines...)
	var all []*container
	for i, e := range engines {
		all = append(all, newRuncContainer(w, i, fmt.Sprintf("runc%d", i+1)), newContainer(w, i, fmt.Sprintf("unshare%d", i+1)))
		for _, c := range all[2*i:] {
			c.attach(t, e)
			if s := c.status(t); s.Offload != "full" {
				t.Errorf("%s: tier %s, offload %s (%s): want full", s.Name, s.Tier, s.Offload, s.OffloadReason)
			}
		}
	}
	for i, from := range all {
		for _, to := range all[i+1:] {
			assertTraffic(t, from.host, to.host, transferBytes()/4, []int{1, 1398, 1399, 9000, 60000})
		}
	}
	for _, e := range engines {
		assertUnprivileged(t, e)
		assertBalance(t, e)
	}
	all[0].kill()
	w.await("the engine lets go", func() bool { return len(attached(t, engines[0])) == 1 })
	assertPing(t, all[1].host, all[2].host, 56)
}

// newRuncContainer starts a container with runc, as the ordinary user, in node
// i's network, not attached yet.
func newRuncContainer(w *world, i int, name string) *container {
	w.t.Helper()
	bundle := filepath.Join(w.dir, name)
	root, pidFile := filepath.Join(bundle, "state"), filepath.Join(bundle, "pid")
	for _, dir := range []string{"rootfs/usr", "rootfs/proc", "rootfs/dev", "rootfs/sys", "state"} {
		if err := os.MkdirAll(filepath.Join(bundle, dir), 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	for _, link := range []string{"bin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+link, filepath.Join(bundle, "rootfs", link)); err != nil {
			w.t.Fatal(err)
		}
	}
	forOrdinaryUser(w.t, bundle)
	forOrdinaryUser(w.t, root)
	// In a network of its own, and on the distribution's own files.
	as := asOrdinaryUser()
	if as == nil {
		// runc enters its mount namespace once more, which has to be its user's.
		as = []string{"unshare", "--mount"}
	}
	runc := append(as, "env", "XDG_RUNTIME_DIR="+root, "runc", "--root", root)
	spec := exec.Command(runc[0], append(runc[1:], "spec", "--rootless", "--bundle", bundle)...)
	if out, err := spec.CombinedOutput(); err != nil {
		w.t.Fatalf("runc spec: %v: %s", err, out)
	}
	editSpec(w.t, filepath.Join(bundle, "config.json"))
	c := &container{process: w.launch(w.lan.Nodes[i], name, append(runc, "run", "--bundle", bundle, "--pid-file", pidFile, name)...)}
	c.host.name = name
	c.kill = func() {
		// The first process of a container ignores what it does not handle.
		cmd := exec.Command(runc[0], append(runc[1:], "kill", name, "KILL")...)
		if out, err := cmd.CombinedOutput(); err != nil {
			w.t.Errorf("runc kill: %v: %s", err, out)
		}
		c.wait()
	}
	w.t.Cleanup(func() {
		select {
		case <-c.ended:
		default:
			c.kill()
		}
	})
	w.await(name+" runs", func() bool {
		select {
		case <-c.ended:
			w.t.Fatalf("%s ended: %s", name, c.output())
		default:
		}
		b, _ := os.ReadFile(pidFile) // not there yet
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			return false
		}
		c.pid = pid
		c.ns, err = netns.OfProcess(pid)
		return err == nil
	})
	w.t.Cleanup(func() { c.ns.Close() })
	return c
}

// editSpec makes the container sleep, in a network namespace of its own.
func editSpec(t *testing.T, file string) {
	t.Helper()
	var spec map[string]any
	if err := json.Unmarshal([]byte(readFile(t, file)), &spec); err != nil {
		t.Fatal(err)
	}
	process, linux := spec["process"].(map[string]any), spec["linux"].(map[string]any)
	process["args"], process["terminal"] = []string{"sleep", "600"}, false
	linux["namespaces"] = append(linux["namespaces"].([]any), map[string]any{"type": "network"})
	spec["mounts"] = append(spec["mounts"].([]any), map[string]any{
		"destination": "/usr", "type": "bind", "source": "/usr", "options": []string{"rbind", "ro"},
	})
	if err := os.WriteFile(file, []byte(asJSON(t, spec)), 0o644); err != nil {
		t.Fatal(err)
	}
}
