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
	"tweed/probe"
)

// daemon is one running `tweed up` or flanneld on node i of the world.
type daemon struct {
	*process
	w      *world
	i      int
	name   string
	ns     *netns.Namespace
	dir    string
	before []string
	argv   []string
	api    *node.Client
}

// up starts `tweed up` on node i, counted from 0, and waits until it is ready
// under a lease that etcd has confirmed.
// More flags may be given; the tests need no traffic rules.
func (w *world) up(i int, flags ...string) *daemon {
	w.t.Helper()
	e := w.start(i, flags...)
	e.await("ready and running", func(s node.Status) bool { return s.Ready && s.Phase == node.PhaseRunning })
	return e
}

// start is up without the wait.
func (w *world) start(i int, flags ...string) *daemon {
	w.t.Helper()
	e := w.prepare(i, flags...)
	e.process = w.launch(e.ns, e.name, e.argv...)
	w.t.Cleanup(e.reportLedger) // before the process is ended
	return e
}

// reportLedger says where the packets of a test that failed were lost, what the
// node knew of etcd, and what it was doing.
func (e *daemon) reportLedger() {
	if !e.w.t.Failed() {
		return
	}
	if s, err := e.api.Status(context.Background()); err == nil {
		e.w.t.Logf("%s: accelerator %s, etcd %s, counters %s, ledger %s", e.name, s.Device.Accelerator,
			asJSON(e.w.t, s.Etcd), asJSON(e.w.t, s.Counters), asJSON(e.w.t, s.Ledger))
	}
	if d, err := e.api.Debug(context.Background()); err == nil {
		e.w.t.Logf("%s: goroutines: %s", e.name, d.Goroutines)
	}
}

// prepare makes everything of a daemon but the process.
func (w *world) prepare(i int, flags ...string) *daemon {
	w.t.Helper()
	if !slices.Contains(flags, "--attach-only") {
		needTUN(w.t)
	}
	name := fmt.Sprintf("n%d", i+1)
	e := &daemon{w: w, i: i, name: name, ns: w.lan.Nodes[i], dir: filepath.Join(w.dir, name)}
	e.argv = []string{tweedBin, "up", "--etcd-endpoints", w.endpoint(), "--state-dir", e.dir,
		"--subnet-file", e.subnetFile(), "--node-name", name, "--iptables-forward-rules=false"}
	if !slices.Contains(flags, "--iface") {
		e.argv = append(e.argv, "--iface", netns.LANInterface)
	}
	e.argv = append(e.argv, flags...)
	e.before = traces(w.t, e.ns)
	e.api = node.Dial(filepath.Join(e.dir, "api.sock"))
	w.t.Cleanup(e.api.Close)
	return e
}

// again starts the same command once more, after the process has ended, and
// waits until it forwards, from its snapshot or under its lease.
func (e *daemon) again(flags ...string) {
	e.w.t.Helper()
	e.process = e.w.launch(e.ns, e.name, append(slices.Clone(e.argv), flags...)...)
	e.awaitReady()
}

func (e *daemon) subnetFile() string { return filepath.Join(e.dir, "subnet.env") }

func (e *daemon) underlay() netip.Addr { return e.w.lan.Addr(e.i) }

// status asks the API; it fails the test if there is no answer.
func (e *daemon) status() node.Status {
	e.w.t.Helper()
	s, err := e.api.Status(context.Background())
	if err != nil {
		e.w.t.Fatalf("%s: status: %v", e.name, err)
	}
	return s
}

// await polls the status until it holds, and returns it.
func (e *daemon) await(what string, holds func(node.Status) bool) node.Status {
	e.w.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		s, err := e.api.Status(context.Background())
		if err == nil && holds(s) {
			return s
		}
		select {
		case <-e.ended:
			e.w.t.Fatalf("%s ended (%s) before: %s", e.name, e.cmd.ProcessState, what)
		default:
		}
		if time.Now().After(deadline) {
			e.w.t.Fatalf("%s: %s: not within %s (error %v, status %s)", e.name, what, patience, err, asJSON(e.w.t, s))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (e *daemon) awaitReady() {
	e.w.t.Helper()
	e.await("ready", func(s node.Status) bool { return s.Ready })
}

// awaitPeers waits until each daemon knows n peers.
func awaitPeers(n int, daemons ...*daemon) {
	for _, e := range daemons {
		e.w.t.Helper()
		e.await(fmt.Sprintf("%d peers", n), func(s node.Status) bool {
			sum := 0
			for _, k := range s.Peers {
				sum += k
			}
			return sum == n
		})
	}
}

// addr is the node's own address on the overlay.
func (e *daemon) addr() netip.Addr {
	e.w.t.Helper()
	return e.status().Device.Address
}

// down stops the daemon as an operator does and checks that it left nothing.
func (e *daemon) down() {
	e.w.t.Helper()
	if status := e.end(unix.SIGTERM); status != 0 {
		e.w.t.Errorf("%s: exit status %d after SIGTERM, want 0", e.name, status)
	}
	e.assertNothingLeft()
}

func (e *daemon) assertNothingLeft() {
	e.w.t.Helper()
	if after := traces(e.w.t, e.ns); !slices.Equal(after, e.before) {
		e.w.t.Errorf("%s left something behind:\nbefore %s\nafter  %s", e.name, strings.Join(e.before, "; "), strings.Join(after, "; "))
	}
	if _, err := os.Stat(e.api.Path()); err == nil {
		e.w.t.Errorf("%s left its API socket", e.name)
	}
}

// host is a place with an address on the overlay: an daemon's namespace or a
// kernel peer's.
type host struct {
	name string
	ns   *netns.Namespace
	addr netip.Addr
}

func (e *daemon) host() host {
	e.w.t.Helper()
	return host{e.name, e.ns, e.addr()}
}

// assertTraffic carries everything between two hosts, in both directions.
func assertTraffic(t *testing.T, a, b host, bytes int, sizes []int) {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 9*time.Minute, fmt.Errorf("traffic between %s and %s took too long", a.name, b.name))
	defer cancel()
	for _, way := range [][2]host{{a, b}, {b, a}} {
		from, to := way[0], way[1]
		for _, size := range []int{0, 56, 1398, 9000} {
			assertPing(t, from, to, size)
		}
		r, err := probe.Transfer(ctx, from.ns, to.ns, from.addr, to.addr, bytes)
		if err != nil {
			t.Fatalf("%s to %s: %v", from.name, to.name, err)
		}
		t.Logf("%s to %s: %d MB at %.2f Gbit/s, sha256 %x", from.name, to.name, r.Bytes>>20, r.BitsPerSecond()/1e9, r.SHA256[:8])
		if err := probe.Datagrams(ctx, from.ns, to.ns, from.addr, to.addr, sizes); err != nil {
			t.Fatalf("%s to %s: %v", from.name, to.name, err)
		}
	}
}

func assertPing(t *testing.T, from, to host, size int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := probe.Ping(ctx, from.ns, from.addr, to.addr, size); err != nil {
		t.Fatalf("%s to %s, %d bytes: %v", from.name, to.name, size, err)
	}
}

// stream starts a ledger probe of 2000 packets a second.
func stream(t *testing.T, from, to host) *probe.Stream {
	t.Helper()
	s, err := probe.StartStream(probe.StreamConfig{From: from.ns, To: to.ns, Src: from.addr, Dst: to.addr, Rate: 2000})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// awaitFlow waits until n more packets of the stream have arrived.
func awaitFlow(w *world, s *probe.Stream, n uint64) {
	w.t.Helper()
	target := s.Received() + n
	w.await(fmt.Sprintf("%d more packets", n), func() bool { return s.Received() >= target })
}

// assertClean ends a stream of which nothing may be lost.
func assertClean(t *testing.T, s *probe.Stream) {
	t.Helper()
	l := s.Stop()
	t.Logf("probe: %s", l)
	if err := l.Clean(); err != nil {
		t.Error(err)
	}
}

// assertBalance checks the promise that every packet is delivered or counted
// under a reason.
func assertBalance(t *testing.T, e *daemon) node.Ledger {
	t.Helper()
	l := e.status().Ledger
	for name, d := range map[string]node.DirectionLedger{"tx": l.Tx, "rx": l.Rx} {
		var sum uint64
		for _, n := range d.Drops {
			sum += n
		}
		if d.Packets != d.Delivered+sum || sum != d.Dropped {
			t.Errorf("%s: %s ledger: %d packets, %d delivered, %d dropped, drops %v", e.name, name, d.Packets, d.Delivered, d.Dropped, d.Drops)
		}
	}
	return l
}

// assertNoDrops is assertBalance where nothing had a reason to be dropped.
func assertNoDrops(t *testing.T, daemons ...*daemon) {
	t.Helper()
	for _, e := range daemons {
		if l := assertBalance(t, e); l.Tx.Dropped+l.Rx.Dropped+l.SocketDropped != 0 {
			t.Errorf("%s: dropped: tx %v, rx %v, socket %d", e.name, l.Tx.Drops, l.Rx.Drops, l.SocketDropped)
		}
	}
}
