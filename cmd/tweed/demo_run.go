package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tweed/attach"
	"tweed/encap"
	"tweed/netns"
	"tweed/node"
	"tweed/probe"
)

const (
	// demoTransfer is the size of each transfer, in bytes.
	demoTransfer = 64 << 20
	// impairedTransfer is the same where packets are lost on purpose.
	impairedTransfer = 1 << 20
	// impairedPings are tried where an echo may be lost on purpose.
	impairedPings = 20
	// demoPatience bounds each step; all of them together take some seconds.
	demoPatience = 30 * time.Second
	// demoWALSegment is the size of the log files etcd sets space aside for, in
	// bytes: by itself it takes 64 MB for each of two.
	demoWALSegment = "1000000"
	// demoLogLines is how much of a log is shown after a failure.
	demoLogLines = 15
)

// demo is one running demonstration.
type demo struct {
	o         demoOptions
	out       printer
	dir       *demoDir
	launcher  *netns.Launcher
	lan       *netns.LAN
	endpoint  string
	processes []*demoProcess
	// containers are the namespaces of contain.
	containers []*netns.Namespace
	// fail ends the demo's context with a cause; it does nothing afterwards.
	fail context.CancelCauseFunc
}

// overlay is one of the demo's networks. Two of them can lie on one underlay:
// their prefixes in etcd, ports, devices and address ranges differ.
type overlay struct {
	framing encap.Framing
	network netip.Prefix
	prefix  string // in etcd
	tunName string
	nodes   []*demoNode
}

// demoNode is one `tweed up`.
type demoNode struct {
	name    string
	index   int
	args    []string
	ns      *netns.Namespace
	process *demoProcess
	dir     string
	api     *node.Client
	status  node.Status
	// address is where the node is pinged, in ns; container holds ns where that
	// is not the node's own.
	address   netip.Addr
	container *demoProcess
}

func newOverlay(f encap.Framing) *overlay {
	if f == encap.FramingVXLAN {
		return &overlay{framing: f, network: netip.MustParsePrefix("10.78.0.0/16"), prefix: node.DefaultEtcdPrefix + "-vxlan", tunName: "tweed1"}
	}
	return &overlay{framing: f, network: netip.MustParsePrefix("10.77.0.0/16"), prefix: node.DefaultEtcdPrefix, tunName: "tweed0"}
}

// runDemo shows everything and cleans up. With keep it cleans up only after an
// error.
func runDemo(ctx context.Context, o demoOptions, stdout, stderr io.Writer) error {
	sweeper, err := startDemoSweeper(o.runDir)
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	defer sweeper.dismiss()
	dir, err := newDemoDir(o.runDir, o.keep)
	if err != nil {
		return err
	}
	sweeper.follow(dir)
	d := &demo{o: o, out: printer{stdout}, dir: dir, launcher: netns.NewLauncher()}
	defer d.launcher.Close()
	running, fail := context.WithCancelCause(ctx)
	d.fail = fail
	overlays, err := d.show(running)
	if cause := context.Cause(running); err != nil && cause != nil {
		err = cause // why a step was cut short, rather than that it was
	}
	fail(nil)
	if err == nil && o.keep {
		if err = d.record(overlays); err == nil {
			d.closeHandles()
			d.out.blank()
			d.out.next(d.keptAdvice(overlays))
			return nil
		}
	}
	var failed *demoProcessError
	if ctx.Err() == nil && errors.As(err, &failed) {
		fmt.Fprintf(stderr, "The end of %s's log:\n%s\n", failed.process.Name, failed.process.tail(demoLogLines))
	}
	if rerr := d.remove(); rerr != nil {
		err = errors.Join(err, fmt.Errorf("clean up: %w", rerr))
	}
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	d.out.done("removed", "processes, namespaces and files")
	d.out.blank()
	d.out.next(advice())
	return nil
}

// show builds the demo and proves that it works.
func (d *demo) show(ctx context.Context) ([]*overlay, error) {
	if uid, inside := netns.OutsideUID(); inside {
		d.out.done("user namespace", "uid %s is root inside", uid)
	}
	for _, v := range d.o.passed {
		d.out.done("tier "+string(d.o.tier), "since tier %s is not possible: %s", v.Tier, v.Why)
		d.out.block(func(w io.Writer) { fmt.Fprintln(w, "to get it:", v.Fix) })
	}
	var err error
	if d.o.keep {
		if err := d.note(); err != nil {
			return nil, err
		}
	}
	if d.lan, err = netns.NewLAN(netns.LANConfig{Nodes: d.o.nodes, MTU: d.o.mtu}); err != nil {
		return nil, err
	}
	d.out.done("underlay", "%s, MTU %d, %d nodes", d.lan.Network(), d.lan.MTU(), d.o.nodes)
	if d.o.impair.Active() {
		d.out.done("impairments", "%s, by the nodes themselves to all they send", d.o.impair)
	}
	if err := d.startEtcd(ctx); err != nil {
		return nil, err
	}
	d.out.done("etcd", "%s, in the demo only", d.endpoint)
	var overlays []*overlay
	for _, f := range d.o.framings {
		o := newOverlay(f)
		overlays = append(overlays, o)
		d.out.blank()
		if err := d.up(ctx, o); err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		if err := d.prove(ctx, o); err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
	}
	return overlays, nil
}

// etcdNetnsFD is the first of the nodes' namespaces among etcd's descriptors,
// after the standard ones, the pipe and the lock.
const etcdNetnsFD = 5

// startEtcd starts etcd on the underlay's gateway address and waits until it
// answers. When the demo is kept, etcd also holds the lock and the namespaces.
func (d *demo) startEtcd(ctx context.Context) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	files := []*os.File{w}
	if d.o.keep {
		files = append(files, d.dir.lock)
		for _, n := range d.lan.Nodes {
			files = append(files, n.File())
		}
	}
	p, err := d.serve(d.lan.Switch, "etcd", files, "etcd",
		"--data-dir", filepath.Join(d.dir.path, "etcd"), "--wal-segment-size", demoWALSegment,
		"--listen-client", fmt.Sprintf("http://%s:2379", d.lan.Gateway), "--ready-fd", "3")
	w.Close()
	if err != nil {
		return err
	}
	line := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(r)
		line <- strings.TrimSpace(string(b))
	}()
	return p.await(ctx, demoPatience, func(context.Context) (bool, error) {
		select {
		case d.endpoint = <-line:
			return d.endpoint != "", nil
		default:
			return false, nil
		}
	})
}

// up writes the network config and starts a node in every namespace, and waits
// until each is ready and knows all the others.
func (d *demo) up(ctx context.Context, o *overlay) error {
	if err := d.configure(ctx, o); err != nil {
		return err
	}
	d.out.done("network "+o.framing.String(), "%s in %s/config", o.network, o.prefix)
	began := time.Now()
	for i, ns := range d.lan.Nodes {
		n := &demoNode{name: fmt.Sprintf("n%d", i+1), index: i, ns: ns}
		n.dir = filepath.Join(d.dir.path, o.framing.String()+"-"+n.name)
		var err error
		n.args = []string{"up",
			"--etcd-endpoints", d.endpoint, "--etcd-prefix", o.prefix,
			"--iface", netns.LANInterface, "--tun-name", o.tunName,
			"--state-dir", n.dir, "--subnet-file", filepath.Join(n.dir, "subnet.env"),
			"--node-name", n.name, "--iptables-forward-rules=false",
			fmt.Sprintf("--attach-only=%t", d.o.tier != attach.TierTUN)}
		if s := d.o.impair; s.Active() {
			s.Seed += uint64(i)
			n.args = append(n.args, "--impair", s.String())
		}
		n.process, err = d.serve(ns, filepath.Base(n.dir), nil, n.args...)
		if err != nil {
			return err
		}
		n.api = node.Dial(filepath.Join(n.dir, "api.sock"))
		defer n.api.Close()
		o.nodes = append(o.nodes, n)
	}
	for _, n := range o.nodes {
		err := n.process.await(ctx, demoPatience, func(ctx context.Context) (bool, error) {
			var err error
			n.status, err = n.api.Status(ctx)
			return n.status.Ready && n.status.Peers[o.framing.String()] == len(o.nodes)-1, err
		})
		if err != nil {
			return err
		}
		s := n.status
		on := s.Device.Name
		if on == "" {
			on = "no device"
		}
		d.out.done(n.name, "%s on %s, MTU %d, pid %d, ready after %.2f s",
			s.Lease.Subnet, on, s.Device.MTU, s.PID, time.Since(began).Seconds())
		n.address = s.Device.Address
		if d.o.tier != attach.TierTUN {
			if err := d.contain(ctx, n); err != nil {
				return err
			}
		}
	}
	leases, err := o.nodes[0].api.Leases(ctx)
	if err != nil {
		return err
	}
	d.out.done("leases", "as %s reads them from etcd", o.nodes[0].name)
	d.out.block(func(w io.Writer) { printLeases(w, leases) })
	return nil
}

// configure writes the network config, from inside the switch's namespace, the
// only one beside the nodes' that etcd can be reached from.
func (d *demo) configure(ctx context.Context, o *overlay) error {
	return d.call(ctx, d.lan.Switch, "network-set-"+o.framing.String(),
		"network", "set", o.network.String(), "--backend", o.framing.String(),
		"--etcd-endpoints", d.endpoint, "--etcd-prefix", o.prefix)
}

// prove pings and transfers around the ring of nodes, so that each sends and
// receives, and shows that every packet was accounted for.
func (d *demo) prove(ctx context.Context, o *overlay) error {
	ctx, cancel := context.WithTimeoutCause(ctx, demoPatience, fmt.Errorf("not done within %s", demoPatience))
	defer cancel()
	for i, from := range o.nodes {
		to := o.nodes[(i+1)%len(o.nodes)]
		way := from.name + " → " + to.name
		rtt, lost, err := d.ping(ctx, from, to)
		if err != nil {
			return &demoProcessError{to.process, err}
		}
		d.out.done("ping "+way, "%s to %s: %.2f ms%s", from.addr(), to.addr(), float64(rtt.Microseconds())/1000, lost)
		size := demoTransfer
		if d.o.impair.Active() {
			size = impairedTransfer
		}
		t, err := probe.Transfer(ctx, from.ns, to.ns, from.addr(), to.addr(), size)
		if err != nil {
			return &demoProcessError{to.process, err}
		}
		d.out.done("TCP  "+way, "%d MB in %.2f s, %.1f Gbit/s, sha256 equal (%x…)",
			t.Bytes>>20, t.Elapsed.Seconds(), t.BitsPerSecond()/1e9, t.SHA256[:4])
	}
	for _, n := range o.nodes {
		s, err := n.api.Status(ctx)
		if err != nil {
			return &demoProcessError{n.process, err}
		}
		d.out.done("ledger "+n.name, "sent %s, received %s",
			demoLedger(s.Ledger.Tx), demoLedger(s.Ledger.Rx))
	}
	return nil
}

// ping sends echo requests until one is answered; without impairments the first
// one has to be.
func (d *demo) ping(ctx context.Context, from, to *demoNode) (rtt time.Duration, lost string, err error) {
	if !d.o.impair.Active() {
		rtt, err = probe.Ping(ctx, from.ns, from.addr(), to.addr(), 56)
		return rtt, "", err
	}
	for i := range impairedPings {
		once, cancel := context.WithTimeout(ctx, 2*maxDemoDelay+time.Second)
		rtt, err = probe.Ping(once, from.ns, from.addr(), to.addr(), 56)
		cancel()
		if err == nil {
			if i > 0 {
				lost = fmt.Sprintf(", after %d lost", i)
			}
			return rtt, lost, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	return 0, "", err
}

func demoLedger(l node.DirectionLedger) string {
	text := fmt.Sprintf("%d of %d packets, %d dropped", l.Delivered, l.Packets, l.Dropped)
	var reasons []string
	for _, name := range slices.Sorted(maps.Keys(l.Drops)) {
		if n := l.Drops[name]; n > 0 {
			reasons = append(reasons, fmt.Sprintf("%s %d", name, n))
		}
	}
	if reasons != nil {
		text += " (" + strings.Join(reasons, ", ") + ")"
	}
	return text
}

// addr is the node's address on the overlay.
func (n *demoNode) addr() netip.Addr { return n.address }

// record writes down what `demo down` has to end, nodes before etcd, and what
// the other commands have to know of the nodes.
func (d *demo) record(overlays []*overlay) error {
	r := record{Impaired: d.o.impair.Active()}
	for _, o := range overlays {
		for _, n := range o.nodes {
			k := keptNode{
				Name: n.name, Framing: o.framing.String(), Address: n.address, Dir: n.dir,
				Process: n.process.Name, Args: n.args, Index: n.index, NetnsFD: etcdNetnsFD + n.index,
			}
			if n.container != nil {
				k.Container = n.container.Name
			}
			r.Nodes = append(r.Nodes, k)
		}
	}
	var err error
	if r.Processes, err = d.running(); err != nil {
		return err
	}
	return d.dir.writeRecord(r)
}

// remove ends everything, the last started first.
func (d *demo) remove() error {
	for i := len(d.processes) - 1; i >= 0; i-- {
		d.processes[i].stop()
	}
	var err error
	if d.lan != nil {
		err = d.lan.Close()
	}
	for _, c := range d.containers {
		c.Close()
	}
	return errors.Join(err, d.dir.remove())
}

// closeHandles gives up our own hold on the namespaces and the lock.
func (d *demo) closeHandles() {
	d.lan.Switch.Close()
	for _, n := range d.lan.Nodes {
		n.Close()
	}
	for _, c := range d.containers {
		c.Close()
	}
	d.dir.lock.Close()
}

func advice() [][2]string {
	self := selfName()
	return [][2]string{
		{self + " demo --keep", "leave it running and look around inside"},
		{self + " demo --nodes 4 --backend vxlan", "more nodes, one framing"},
		{self + " up --etcd-endpoints http://HOST:2379", "join a flannel cluster from this machine"},
	}
}

func (d *demo) keptAdvice(overlays []*overlay) [][2]string {
	self := selfName()
	a, b := overlays[0].nodes[0], overlays[0].nodes[1]
	run := func(command string) string {
		before, after, _ := strings.Cut(downCommand(d.o.runDir), " down")
		if name, rest, ok := strings.Cut(command, " -- "); ok {
			return before + " " + name + after + " -- " + rest
		}
		return before + " " + command + after
	}
	return [][2]string{
		{run("ssh n1"), "a shell in node n1"},
		{run("ssh n1 -- ping " + b.addr().String()), "reach n2 over the overlay"},
		{run("bench"), "measure between the nodes"},
		{run("break n2 --kill"), "or --partition; and then: demo heal n2"},
		{self + " status --state-dir " + a.dir, "what n1 knows about itself"},
		{self + " peers --state-dir " + a.dir, "and about the others"},
		{downCommand(d.o.runDir), "remove everything"},
	}
}
