package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Names of the subjects that are always there.
const (
	subjectRaw    = "raw"
	subjectKernel = "vxlan"
)

// subject is one way to carry packets between the two sides.
type subject interface {
	// up puts the subject on a pair and returns when it is configured, though
	// not before the far side answers. dir is an empty folder of its own. On an
	// error it leaves the overlay it got that far, to be taken down.
	up(ctx context.Context, b *bench, p *pair, dir string) (*overlay, error)
	// version describes what is measured, for the report.
	version(ctx context.Context, b *bench) string
}

// overlay is a subject that is up on a pair.
type overlay struct {
	subject string
	pair    *pair
	// addr are the addresses of the two sides inside the overlay, dev the
	// devices its packets have to cross.
	addr [2]netip.Addr
	dev  [2]string
	// way is how connections get from side 0 to side 1 where that is not simply
	// from address to address. Sides without a device have an empty dev.
	way *way
	// past counts what does not show in dev because the kernel carries it past
	// the device; nil when everything shows.
	past func(side int) (counters, error)
	// engines are the processes that carry packets, one for each side; none
	// when the kernel does.
	engines []*process
	// capture is the program that captures on side 0, and its flags that choose
	// the engine; none for subjects that cannot.
	capture []string
	// cleanup undoes what the end of the processes and of the pair does not.
	cleanup []func()
}

// running returns an error when an engine has ended.
func (o *overlay) running() error {
	for _, e := range o.engines {
		if err := e.running(); err != nil {
			return err
		}
	}
	return nil
}

// down stops the engines and removes the pair.
func (o *overlay) down() {
	// The last first: a proxy whose engine has gone would start another one.
	for _, e := range slices.Backward(o.engines) {
		e.stop(stopGrace)
	}
	for _, f := range o.cleanup {
		f()
	}
	o.pair.close()
}

// logs are the last lines of every engine, for an error message.
func (o *overlay) logs() string {
	out := ""
	for _, e := range o.engines {
		if t := e.tail(); t != "" {
			out += "\n    " + e.name + ":" + t
		}
	}
	return out
}

// mtu is the MTU of the overlay's device on side 0, in bytes.
func (o *overlay) mtu() (int, error) {
	if o.dev[0] == "" {
		return o.way.mtu, nil
	}
	l, err := o.pair.rt[0].LinkByName(o.dev[0])
	if err != nil {
		return 0, fmt.Errorf("%s: %w", o.dev[0], err)
	}
	return l.Attrs().MTU, nil
}

// engine starts the engine of one side and remembers it.
func (o *overlay) engine(b *bench, side int, path string, args ...string) error {
	name := fmt.Sprintf("%s-%c", o.subject, 'a'+side)
	p, err := b.start(o.pair.ns[side], name, path, args...)
	if err != nil {
		return err
	}
	o.engines = append(o.engines, p)
	return nil
}

// waitUp waits for something the engines do while they start.
func (o *overlay) waitUp(ctx context.Context, limit time.Duration, try func() error) error {
	return waitFor(ctx, limit, func() error {
		if err := o.running(); err != nil {
			return &giveUp{err}
		}
		return try()
	})
}

// Peers: the programs of others that can be subjects.
const (
	peerFlanneld  = "flanneld"
	peerWireGuard = "wireguard-go"
	peerNebula    = "nebula"
)

var peerNames = []string{peerFlanneld, peerWireGuard, peerNebula}

// chosen is a subject and the name of its column.
type chosen struct {
	name string
	subject
}

// isTweed tells the columns that are ours.
func isTweed(name string) bool { return strings.HasPrefix(name, "tweed") }

// twin is the column of the first binary that a column of the second (--against)
// is compared with; empty for any other column.
func twin(name string) string {
	if rest, ok := strings.CutPrefix(name, "tweed-b-"); ok {
		return "tweed-" + rest
	}
	return ""
}

// chooseSubjects makes the subjects of a run, in the order of the columns: those
// that are asked for, or else raw veth, the kernel's vxlan, tweed in both
// framings and once without its accelerator, and every peer that is given or on PATH. With a second binary every
// tweed column gets its twin. The error names what does not exist.
func chooseSubjects(asked []string, peers map[string]string, against bool) ([]chosen, error) {
	if len(asked) == 0 {
		asked = []string{subjectRaw, subjectKernel, "tweed", "tweed-vxlan@" + onlyWorkers}
		for _, name := range peerNames {
			if peers[name] != "" {
				asked = append(asked, name)
			}
		}
	}
	var out []chosen
	for _, name := range expand(asked, against) {
		s, err := newSubject(name, peers, against)
		if err != nil {
			return nil, err
		}
		out = append(out, chosen{name, s})
	}
	return out, nil
}

// expand replaces tweed and tweed-b, with or without a rung, by both framings,
// and adds the twins when there is a second binary. Every name is kept once.
func expand(asked []string, against bool) []string {
	var out []string
	add := func(name string) {
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	for _, name := range asked {
		base, rung, cut := strings.Cut(name, "@")
		if cut {
			rung = "@" + rung
		}
		names := []string{name}
		if base == "tweed" || base == "tweed-b" {
			names = []string{base + "-udp" + rung, base + "-vxlan" + rung}
		}
		for _, n := range names {
			add(n)
			if rest, ok := strings.CutPrefix(n, "tweed-"); ok && against && twin(n) == "" {
				add("tweed-b-" + rest)
			}
		}
	}
	return out
}

func newSubject(name string, peers map[string]string, against bool) (subject, error) {
	base, rung, _ := strings.Cut(name, "@")
	switch base {
	case "tweed-udp", "tweed-vxlan":
		return newTweed(name, strings.TrimPrefix(base, "tweed-"), rung, false)
	case "tweed-b-udp", "tweed-b-vxlan":
		if !against {
			return nil, fmt.Errorf("--subjects %s: needs a second binary: --against PATH", name)
		}
		return newTweed(name, strings.TrimPrefix(base, "tweed-b-"), rung, true)
	}
	switch name {
	case subjectRaw:
		return raw{}, nil
	case subjectKernel:
		return kernelVXLAN{}, nil
	case peerFlanneld, peerWireGuard, peerNebula:
		path := peers[name]
		if path == "" {
			return nil, fmt.Errorf("--subjects %s: not on PATH: give it with --peer %s=/path", name, name)
		}
		switch name {
		case peerFlanneld:
			return flanneld{path}, nil
		case peerWireGuard:
			return wireGuard{path}, nil
		}
		return newNebula(path)
	}
	return nil, fmt.Errorf("--subjects %q: expected some of %s, %s, tweed, tweed-udp, tweed-vxlan, "+
		"tweed-b, each tweed with a rung if wanted (tweed-vxlan@tso, tweed-vxlan@workers), %s",
		name, subjectRaw, subjectKernel, strings.Join(peerNames, ", "))
}

// findPeers completes the peers given as name=/path by those on PATH.
func findPeers(given []string) (map[string]string, error) {
	peers := map[string]string{}
	for _, g := range given {
		name, path, ok := strings.Cut(g, "=")
		if !ok || !slices.Contains(peerNames, name) {
			return nil, fmt.Errorf("--peer %q: expected NAME=/path with NAME one of %s", g, strings.Join(peerNames, ", "))
		}
		full, err := exec.LookPath(path)
		if err != nil {
			return nil, fmt.Errorf("--peer %s: %w", g, err)
		}
		if peers[name], err = filepath.Abs(full); err != nil {
			return nil, err
		}
	}
	for _, name := range peerNames {
		if peers[name] != "" {
			continue
		}
		path, err := exec.LookPath(name)
		if err == nil && name == peerNebula {
			_, err = newNebula(path) // of no use without nebula-cert
		}
		if err == nil {
			peers[name] = path
		}
	}
	return peers, nil
}

// versionOf runs a program for its version and returns the first line, which
// some print on standard error.
func versionOf(ctx context.Context, path string, args ...string) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "unknown"
	}
	if line := firstLine(string(out)); line != "" {
		return line
	}
	return "unknown"
}
