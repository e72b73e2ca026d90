package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"tweed/netns"
)

// Subjects of --rootless beside tweed-tun, tweed-veth and tweed-netstack.
const (
	subjectPasta = "pasta"
	subjectSlirp = "slirp4netns"
	// subjectSplice is pasta's shortcut between loopbacks. It carries no packets,
	// so it is shown but not what tweed is compared with.
	subjectSplice = "pasta-splice"
)

const (
	rootlessLoads    = "tcp1,tcp4"
	rootlessSubjects = "tweed-tun,tweed-veth,tweed-netstack"
)

// inProgram are the subjects without an interface, which no floor is set for.
var inProgram = []string{"tweed-netstack", "tweed-b-netstack"}

// checkRootless completes the options of --rootless.
func (o *options) checkRootless(peers []string) error {
	for _, l := range o.loads {
		if l.kind != loadTCP {
			return fmt.Errorf("--loads %s: expected tcpN, tcpN-reverse or tcpN-both with --rootless: proxies carry no more", l.name)
		}
	}
	if len(peers) > 0 {
		return fmt.Errorf("--peer %s: pasta and slirp4netns are looked for on PATH", peers[0])
	}
	asked := splitList(o.subjectList)
	if len(asked) == 0 {
		asked = splitList(rootlessSubjects)
		if _, err := exec.LookPath(subjectPasta); err == nil {
			asked = append(asked, subjectPasta, subjectSplice)
		}
		if _, err := exec.LookPath(subjectSlirp); err == nil {
			asked = append(asked, subjectSlirp)
		}
	}
	var names []string
	for _, name := range asked {
		names = append(names, name)
		if rest, ok := strings.CutPrefix(name, "tweed-"); ok && o.against != "" {
			names = append(names, "tweed-b-"+rest)
		}
	}
	for _, name := range names {
		s, err := newRootless(name)
		if err != nil {
			return err
		}
		o.subjects = append(o.subjects, chosen{name, s})
	}
	return nil
}

func newRootless(name string) (subject, error) {
	switch name {
	case subjectPasta, subjectSplice, subjectSlirp:
		program, _, _ := strings.Cut(name, "-splice")
		path, err := exec.LookPath(program)
		if err != nil {
			return nil, fmt.Errorf("--subjects %s: not on PATH: install it, or leave it out", name)
		}
		if name == subjectSlirp {
			return slirp{path}, nil
		}
		return pasta{path: path, splice: name == subjectSplice}, nil
	}
	tier, second := strings.CutPrefix(name, "tweed-b-")
	if !second {
		tier = strings.TrimPrefix(name, "tweed-")
	}
	if !slices.Contains(splitList(rootlessSubjects), "tweed-"+tier) {
		return nil, fmt.Errorf("--subjects %q: expected some of %s, %s, %s, %s with --rootless",
			name, rootlessSubjects, subjectPasta, subjectSplice, subjectSlirp)
	}
	return attached{tweed{name: name, framing: "vxlan", second: second}, tier}, nil
}

// betterNAT is the better of pasta and slirp4netns in each round.
func (r *Report) betterNAT(link string, row Row) byRound {
	best := byRound{}
	for _, name := range []string{subjectPasta, subjectSlirp} {
		for round, v := range r.figures(link, name, row) {
			if had, ok := best[round]; !ok || (v < had) == row.LowerIsBetter {
				best[round] = v
			}
		}
	}
	return best
}

// attached is one `tweed up --attach-only` with both containers attached, or
// with one `tweed proxy` for each side in tier netstack.
type attached struct {
	tweed
	tier string
}

func (a attached) up(ctx context.Context, b *bench, p *pair, dir string) (*overlay, error) {
	o := &overlay{subject: a.name, pair: p}
	path, flags := a.binary(b)
	prefix := b.etcdPrefix()
	if _, err := b.output(ctx, nil, path, "network", "set", overlayNetwork, "--backend", a.framing,
		"--etcd-endpoints", "http://"+b.etcd, "--etcd-prefix", prefix); err != nil {
		return o, err
	}
	if err := p.forward(p.host, etcdForwardPort, b.etcd); err != nil {
		return o, err
	}
	socket := filepath.Join(dir, "api.sock")
	args := []string{
		"up", "--attach-only", "--etcd-endpoints", fmt.Sprintf("http://127.0.0.1:%d", etcdForwardPort), "--etcd-prefix", prefix,
		"--iface", underlayDev, "--state-dir", dir, "--subnet-file", subnetFile(dir, 0), "--log-level", "warn",
	}
	if err := o.program(b, a.name+"-engine", path, append(args, flags...)...); err != nil {
		return o, err
	}
	if err := o.waitUp(ctx, startLimit, func() error {
		out, err := b.output(ctx, nil, path, "status", "-o", "json", "--socket", socket)
		var s struct{ Ready bool }
		if err == nil && json.Unmarshal(out, &s) == nil && !s.Ready {
			err = errors.New("the engine is not ready")
		}
		return err
	}); err != nil {
		return o, err
	}
	if a.tier == "netstack" {
		return o, a.proxies(ctx, b, o, path, socket)
	}
	for side := range p.ns {
		out, err := b.output(ctx, nil, path, "attach", "--socket", socket, "--pid", strconv.Itoa(p.containers[side].pid()),
			"--name", fmt.Sprintf("side%d", side), "--tier", a.tier, "-o", "json")
		if err != nil {
			return o, err
		}
		var answer struct {
			Attachments []struct {
				Address   netip.Addr
				Interface string
			}
		}
		if err := json.Unmarshal(out, &answer); err != nil || len(answer.Attachments) != 1 {
			return o, fmt.Errorf("tweed attach: answer %q: %w", out, err)
		}
		o.addr[side], o.dev[side] = answer.Attachments[0].Address, answer.Attachments[0].Interface
	}
	return o, nil
}

// proxyPort is where the client's proxy listens on the machine's loopback.
const proxyPort = iperf3Port + 1

// proxies starts the one of side 1 first, whose address side 0 has to know.
func (a attached) proxies(ctx context.Context, b *bench, o *overlay, path, socket string) error {
	o.way = &way{
		ns: [2]*netns.Namespace{o.pair.host, o.pair.host},
		to: "127.0.0.1", port: proxyPort, listen: "127.0.0.1", mtu: containerMTU,
	}
	for side := 1; side >= 0; side-- {
		forward := []string{"-R", fmt.Sprintf("%d:127.0.0.1:%d", iperf3Port, iperf3Port)}
		if side == 0 {
			forward = []string{"-L", fmt.Sprintf("%d:%s:%d", proxyPort, o.addr[1], iperf3Port)}
		}
		name := fmt.Sprintf("%s-side%d", a.name, side)
		if err := o.program(b, name, path, append([]string{"proxy", "--socket", socket, "--name", name}, forward...)...); err != nil {
			return err
		}
		p := o.engines[len(o.engines)-1]
		if err := o.waitUp(ctx, startLimit, func() error {
			text, err := os.ReadFile(p.log)
			if err != nil {
				return err
			}
			_, rest, ok := strings.Cut(string(text), "attached: ")
			if !ok || !strings.Contains(rest, "leads to") {
				return errors.New("tweed proxy: not attached yet")
			}
			addr, _, _ := strings.Cut(rest, ",")
			o.addr[side], err = netip.ParseAddr(addr)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// program starts a process on the machine that carries packets.
func (o *overlay) program(b *bench, name, path string, args ...string) error {
	p, err := b.start(o.pair.host, name, path, args...)
	if err == nil {
		o.engines = append(o.engines, p)
	}
	return err
}
