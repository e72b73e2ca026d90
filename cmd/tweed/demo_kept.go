package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"tweed/netns"
	"tweed/node"
)

// keptNode is a node of a kept demo, as its record names it.
type keptNode struct {
	// Name is n1, n2, ...; Framing tells the overlays apart.
	Name    string     `json:"name"`
	Framing string     `json:"framing"`
	Address netip.Addr `json:"address"`
	// Dir is the state directory, Process the name of the node's process, and Args
	// what it is started with.
	Dir     string   `json:"dir"`
	Process string   `json:"process"`
	Args    []string `json:"args"`
	// Index counts the nodes from 0. NetnsFD is the descriptor of the node's
	// namespace in etcd's process.
	Index   int `json:"index"`
	NetnsFD int `json:"netns_fd"`
	// Container is the name of the process whose namespace holds Address, empty
	// if the node's own does.
	Container string `json:"container,omitempty"`
}

// keptDemo is a demo that was left running, seen from inside its user namespace.
type keptDemo struct {
	path   string
	record record
}

const demoEtcd = "etcd"

// insideDemo marks the second run of this program, inside a demo.
const insideDemo = "TWEED_DEMO_INSIDE"

// errNoDemo says what to type.
func errNoDemo(base string) error {
	keep := selfName() + " demo --keep"
	if base != defaultDemoDir() {
		keep += " --run-dir " + base
	}
	return fmt.Errorf("no demo is being kept; type: %s", keep)
}

// openKept finds the kept demo below base.
func openKept(base string) (*keptDemo, error) {
	paths, err := filepath.Glob(filepath.Join(base, demoPrefix+"*"))
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		if !demoRuns(path) {
			continue // left over
		}
		r, err := readRecord(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // runs in another terminal, not kept
		}
		if err != nil {
			return nil, err
		}
		return &keptDemo{path, r}, nil
	}
	return nil, errNoDemo(base)
}

// inKeptDemo calls f where it may do to the demo's namespaces what it wants:
// here, or in a second run of this program inside the demo's user namespace,
// whose exit status this one then takes over.
func inKeptDemo(cmd *cobra.Command, base string, f func(context.Context, *keptDemo) error) error {
	d, err := openKept(base)
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	if os.Getenv(insideDemo) == "" {
		etcd, err := d.process(demoEtcd)
		if err != nil {
			return fmt.Errorf("demo: %w", err)
		}
		t, err := netns.OpenTarget(netns.TargetConfig{PID: etcd.PID})
		if err != nil {
			return fmt.Errorf("demo: %w", err)
		}
		defer t.Close()
		if t.Foreign() {
			self, err := os.Executable()
			if err != nil {
				return err
			}
			status, err := t.Exec(append([]string{self}, os.Args[1:]...), append(os.Environ(), insideDemo+"=1"))
			if err != nil {
				return fmt.Errorf("demo: %w", err)
			}
			if status != exitGood {
				return exitStatus(status)
			}
			return nil
		}
	}
	return f(cmd.Context(), d)
}

// process returns a process of the demo that still runs.
func (d *keptDemo) process(name string) (kept, error) {
	i := slices.IndexFunc(d.record.Processes, func(k kept) bool { return k.Name == name })
	if i < 0 || !d.record.Processes[i].runs() {
		return kept{}, fmt.Errorf("%s does not run", name)
	}
	return d.record.Processes[i], nil
}

// runs reports whether the process is still there.
func (k kept) runs() bool {
	start, err := startTime(k.PID)
	return err == nil && start == k.Start
}

// nodes are those of a name, one for each overlay; framing, unless empty,
// chooses one of them.
func (d *keptDemo) nodes(name, framing string) ([]keptNode, error) {
	var found []keptNode
	var have []string
	for _, n := range d.record.Nodes {
		if n.Name == name && (framing == "" || n.Framing == framing) {
			found = append(found, n)
		}
		if !slices.Contains(have, n.Name) && (framing == "" || n.Framing == framing) {
			have = append(have, n.Name)
		}
	}
	if found == nil {
		of := ""
		if framing != "" {
			of = " in the overlay of framing " + framing
		}
		return nil, fmt.Errorf("demo: %s: no such node%s (have: %s)", name, of, strings.Join(have, ", "))
	}
	return found, nil
}

// underlay opens the namespace of a node.
func (d *keptDemo) underlay(n keptNode) (*netns.Namespace, error) {
	etcd, err := d.process(demoEtcd)
	if err != nil {
		return nil, err
	}
	return netns.Open(fmt.Sprintf("/proc/%d/fd/%d", etcd.PID, n.NetnsFD))
}

// place opens the namespace that holds a node's address.
func (d *keptDemo) place(n keptNode) (*netns.Namespace, error) {
	if n.Container == "" {
		return d.underlay(n)
	}
	c, err := d.process(n.Container)
	if err != nil {
		return nil, err
	}
	return netns.OfProcess(c.PID)
}

// client is the node's API.
func (n keptNode) client() *node.Client { return node.Dial(filepath.Join(n.Dir, "api.sock")) }

// write replaces the record.
func (d *keptDemo) write() error { return d.record.write(d.path) }
