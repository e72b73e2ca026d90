package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"tweed/netns"
)

// patience bounds every wait. It is generous: what takes how long is measured
// elsewhere, here it only has to happen.
const patience = time.Minute

const prefix = "/coreos.com/network"

// world is an underlay with an etcd in it. Everything in it is gone after the
// test, which fails if something resists.
type world struct {
	t        *testing.T
	dir      string
	lan      *netns.LAN
	launcher *netns.Launcher
	etcd     *process
	etcdArgv []string
	client   *clientv3.Client
	as       string // etcd auth token, where needed
}

// newWorld builds an underlay of n nodes and starts `tweed etcd` on it.
func newWorld(t *testing.T, n int) *world {
	t.Helper()
	w := newUnderlay(t, n)
	w.etcdArgv = []string{tweedBin, "etcd", "--data-dir", filepath.Join(w.dir, "etcd"), "--listen-client", w.endpoint()}
	w.startEtcd()
	return w
}

// newUnderlay builds the namespaces only.
func newUnderlay(t *testing.T, n int) *world {
	t.Helper()
	lan, err := netns.NewLAN(netns.LANConfig{Nodes: n})
	if err != nil {
		t.Fatal(err)
	}
	// Unix socket paths are short: t.TempDir with its long names does not do.
	dir, err := os.MkdirTemp("", "e2e-")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir, lan: lan, launcher: netns.NewLauncher()}
	t.Cleanup(func() {
		w.launcher.Close()
		if err := lan.Close(); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *world) endpoint() string { return fmt.Sprintf("http://%s:2379", w.lan.Gateway) }

// startEtcd starts the etcd of w.etcdArgv and waits until it answers.
func (w *world) startEtcd() {
	w.t.Helper()
	w.etcd = w.launch(w.lan.Switch, "etcd", w.etcdArgv...)
	if w.client == nil {
		client, err := clientv3.New(clientv3.Config{
			Endpoints: []string{w.endpoint()}, DialTimeout: time.Second, Logger: zap.NewNop(),
			// etcd can be reached from inside the underlay only.
			DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, _ string) (c net.Conn, err error) {
				err = w.lan.Switch.Do(func() error {
					var d net.Dialer
					c, err = d.DialContext(ctx, "tcp4", fmt.Sprintf("%s:2379", w.lan.Gateway))
					return err
				})
				return c, err
			})},
		})
		if err != nil {
			w.t.Fatal(err)
		}
		w.client = client
		w.t.Cleanup(func() { client.Close() })
	}
	w.await("etcd answers", func() bool {
		ctx, cancel := context.WithTimeout(w.t.Context(), time.Second)
		defer cancel()
		_, err := w.client.Get(ctx, "health")
		return err == nil
	})
}

func (w *world) put(key, value string) {
	w.t.Helper()
	if _, err := w.client.Put(w.t.Context(), key, value); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) get(key string) string {
	w.t.Helper()
	r, err := w.client.Get(w.t.Context(), key)
	if err != nil {
		w.t.Fatal(err)
	}
	if len(r.Kvs) != 1 {
		w.t.Fatalf("%s: %d keys in etcd, want 1", key, len(r.Kvs))
	}
	return string(r.Kvs[0].Value)
}

// in is the same world inside a subtest.
func (w *world) in(t *testing.T) *world {
	sub := *w
	sub.t = t
	return &sub
}

// ctx is the test's context with the auth token in it.
func (w *world) ctx() context.Context {
	if w.as == "" {
		return w.t.Context()
	}
	return metadata.AppendToOutgoingContext(w.t.Context(), "token", w.as)
}

// keys are all keys of the network in etcd with their values.
func (w *world) keys() map[string]string {
	w.t.Helper()
	r, err := w.client.Get(w.ctx(), prefix, clientv3.WithPrefix())
	if err != nil {
		w.t.Fatal(err)
	}
	m := map[string]string{}
	for _, kv := range r.Kvs {
		m[string(kv.Key)] = string(kv.Value)
	}
	return m
}

// config writes the network config.
func (w *world) config(json string) { w.put(prefix+"/config", json) }

// await polls until the condition holds.
func (w *world) await(what string, holds func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: not within %s", what, patience)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// process is a started command with its output in a file.
type process struct {
	t     *testing.T
	name  string
	log   string
	cmd   *exec.Cmd
	ended chan struct{}
}

// launch starts a command inside a namespace and sees to it that it is gone at
// the end of the test and has never crashed.
func (w *world) launch(where *netns.Namespace, name string, argv ...string) *process {
	w.t.Helper()
	return w.launchEnv(where, name, nil, argv...)
}

func (w *world) launchEnv(where *netns.Namespace, name string, env []string, argv ...string) *process {
	w.t.Helper()
	log, err := os.CreateTemp(w.dir, name+"-*.log")
	if err != nil {
		w.t.Fatal(err)
	}
	defer log.Close()
	p := &process{t: w.t, name: name, log: log.Name(), ended: make(chan struct{})}
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env = append(cleanEnvironment(), env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := w.launcher.Start(where, p.cmd); err != nil {
		w.t.Fatal(err)
	}
	go func() {
		p.cmd.Wait()
		close(p.ended)
	}()
	w.t.Cleanup(func() {
		p.signal(unix.SIGCONT) // a test that failed may have frozen it
		p.signal(unix.SIGTERM)
		select {
		case <-p.ended:
		case <-time.After(patience):
			w.t.Errorf("%s did not end on SIGTERM", name)
			p.signal(unix.SIGQUIT) // for the goroutines in the log
			<-p.ended
		}
		p.reportLog()
	})
	return p
}

// cleanEnvironment is ours without what would configure a command unasked.
func cleanEnvironment() []string {
	return slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "TWEED_") || strings.HasPrefix(e, "FLANNELD_")
	})
}

func (p *process) signal(s os.Signal) { p.cmd.Process.Signal(s) }

// end sends a signal and returns the exit status, -1 if a signal ended it.
func (p *process) end(s os.Signal) int {
	p.t.Helper()
	p.signal(s)
	return p.wait()
}

// wait returns the exit status once the process has ended.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Fatalf("%s still runs after %s", p.name, patience)
	}
	return p.cmd.ProcessState.ExitCode()
}

// output is everything the process wrote so far.
func (p *process) output() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b)
}

var crash = regexp.MustCompile(`(?m)^(panic:|fatal error:|WARNING: DATA RACE|unexpected fault)`)

func (p *process) reportLog() {
	out := p.output()
	if crash.MatchString(out) {
		p.t.Errorf("%s crashed", p.name)
	}
	if p.t.Failed() {
		p.t.Logf("log of %s:\n%s", p.name, lastLines(out, 40))
	}
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// netlinkIn calls f with a netlink handle inside the namespace.
func netlinkIn(t *testing.T, where *netns.Namespace, f func(*netlink.Handle)) {
	t.Helper()
	h, err := where.Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	f(h)
}

// traces lists the links and IPv4 routes of a namespace: what a node could
// leave behind.
func traces(t *testing.T, where *netns.Namespace) []string {
	t.Helper()
	var found []string
	netlinkIn(t, where, func(h *netlink.Handle) {
		links, err := h.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range links {
			found = append(found, fmt.Sprintf("link %s up=%t", l.Attrs().Name, l.Attrs().Flags&net.FlagUp != 0))
		}
		routes, err := h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range routes {
			found = append(found, fmt.Sprintf("route %s via %s table %d type %d link %d", r.Dst, r.Gw, r.Table, r.Type, r.LinkIndex))
		}
	})
	slices.Sort(found)
	return found
}

// overlayRoute is the device the namespace routes addr to.
func overlayRoute(t *testing.T, where *netns.Namespace, addr netip.Addr) string {
	t.Helper()
	name := ""
	netlinkIn(t, where, func(h *netlink.Handle) {
		routes, err := h.RouteGet(addr.AsSlice())
		if err != nil || len(routes) == 0 {
			return
		}
		if l, err := h.LinkByIndex(routes[0].LinkIndex); err == nil {
			name = l.Attrs().Name
		}
	})
	return name
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
