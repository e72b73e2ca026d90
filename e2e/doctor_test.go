package e2e

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/netns"
	"tweed/node"
)

// diagnosis is what `tweed doctor -o json` prints, by check.
type diagnosis struct {
	status int
	State  string `json:"state"`
	Schema int    `json:"schema"`
	Checks []struct{ Name, State, Text, Next string }
}

func doctor(w *world, where *netns.Namespace, flags ...string) (d diagnosis) {
	w.t.Helper()
	p := w.launch(where, "doctor", append([]string{tweedBin, "doctor", "-o", "json"}, flags...)...)
	d.status = p.wait()
	if err := json.Unmarshal([]byte(p.output()), &d); err != nil || d.Schema != node.Schema {
		w.t.Fatalf("%v: %s", err, p.output())
	}
	return d
}

// has checks the state of a check and that its text and hint have the words.
func (d *diagnosis) has(t *testing.T, name, state, words string) {
	t.Helper()
	for _, c := range d.Checks {
		if c.Name == name && c.State == state && strings.Contains(c.Text+"; "+c.Next, words) {
			return
		}
	}
	t.Errorf("no line %s %s with %q in %+v", state, name, words, d.Checks)
}

func TestDoctorWithAndWithoutAnEngine(t *testing.T) {
	w := newWorld(t, 2)
	where := w.lan.Nodes[0]
	before := []string{"--etcd-endpoints", w.endpoint(), "--iface", netns.LANInterface, "--state-dir", filepath.Join(w.dir, "n1")}
	d := doctor(w, where, before...)
	d.has(t, "etcd", "fail", "tweed network set")
	w.config(vxlanConfig)
	d = doctor(w, where, before...)
	d.has(t, "engine", "fail", "no such socket")
	d.has(t, "etcd", "ok", "backend vxlan")
	d.has(t, "ports", "ok", "8472 (vxlan) is free")
	d.has(t, "underlay", "ok", netns.LANInterface)
	if d.status != 1 || d.State != "fail" {
		t.Errorf("exit status %d, %s", d.status, d.State)
	}

	a, b := w.up(0), w.up(1)
	awaitPeers(1, a, b)
	elsewhere := doctor(w, where, "--state-dir", filepath.Join(w.dir, "none"), "--etcd-endpoints", w.endpoint(), "--iface", netns.LANInterface)
	elsewhere.has(t, "ports", "fail", "8472 (vxlan) is not free")
	d = doctor(w, where, "--state-dir", a.dir)
	d.has(t, "engine", "ok", "forwards")
	d.has(t, "etcd", "ok", "connected")
	d.has(t, "ports", "ok", "vxlan "+a.underlay().String()+":8472")
	d.has(t, "peers", "ok", "all answer an echo through the overlay (1)")
	if d.status != 0 || d.State == "fail" {
		t.Errorf("exit status %d, %+v", d.status, d)
	}

	addr := b.addr()
	b.end(unix.SIGKILL) // its lease stays
	d = doctor(w, where, "--state-dir", a.dir)
	d.has(t, "peers", "fail", "1 of 1 do not answer an echo: "+addr.String()+" n2")
	if d.status != 1 {
		t.Errorf("exit status %d with a silent peer", d.status)
	}
}
