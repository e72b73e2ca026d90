package lease

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/goleak"
	"go.uber.org/zap"
)

// patience bounds every wait. It is generous: it only has to happen.
const patience = time.Minute

// sharedEtcd is the etcd of all tests that do not stop, fill or secure theirs;
// each test has a prefix of its own in it.
var sharedEtcd *etcdServer

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "tweed-lease-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	sharedEtcd, err = startEtcd(dir, nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, "shared etcd:", err)
		return 1
	}
	code := m.Run()
	sharedEtcd.stop()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// etcdServer is an etcd in this process.
type etcdServer struct {
	dir      string
	endpoint string
	server   *embed.Etcd
	// cut breaks the connections of a link while the server stops, which waits
	// for its streams to end otherwise.
	cut func()
}

// startEtcd starts an etcd with its data in dir on a free loopback port.
func startEtcd(dir string, change func(*embed.Config)) (*etcdServer, error) {
	s := &etcdServer{dir: dir}
	client, peer, err := freePorts()
	if err != nil {
		return nil, err
	}
	s.endpoint = "http://" + client
	return s, s.start(peer, change)
}

func (s *etcdServer) start(peer string, change func(*embed.Config)) error {
	cfg := embed.NewConfig()
	cfg.Dir = s.dir
	clientURL, err := url.Parse(s.endpoint)
	if err != nil {
		return err
	}
	peerURL := url.URL{Scheme: "http", Host: peer}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*clientURL}, []url.URL{*clientURL}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peerURL}, []url.URL{peerURL}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.UnsafeNoFsync = true
	cfg.TickMs, cfg.ElectionMs = 20, 200
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	if change != nil {
		change(cfg)
	}
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(patience):
		server.Close()
		return fmt.Errorf("etcd at %s is not ready", s.endpoint)
	}
	s.server = server
	return nil
}

func (s *etcdServer) stop() {
	if s.server == nil {
		return
	}
	closed := make(chan struct{})
	go func() {
		s.server.Close()
		close(closed)
	}()
	for {
		select {
		case <-closed:
			s.server = nil
			return
		case <-time.After(50 * time.Millisecond):
			if s.cut != nil {
				s.cut()
			}
		}
	}
}

func freePorts() (client, peer string, err error) {
	var addrs [2]string
	for i := range addrs {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", "", err
		}
		defer l.Close()
		addrs[i] = l.Addr().String()
	}
	return addrs[0], addrs[1], nil
}

// ownEtcd starts an etcd for one test.
func ownEtcd(t *testing.T, change func(*embed.Config)) *etcdServer {
	t.Helper()
	s, err := startEtcd(t.TempDir(), change)
	if err != nil {
		t.Fatal("start etcd:", err)
	}
	t.Cleanup(s.stop)
	return s
}

// restart stops the etcd, runs the function while it is down, and starts it again
// with the same data and address.
func (s *etcdServer) restart(t *testing.T, change func(*embed.Config), down func()) {
	t.Helper()
	s.stop()
	if down != nil {
		down()
	}
	_, peer, err := freePorts()
	if err == nil {
		err = s.start(peer, change)
	}
	if err != nil {
		t.Fatal("restart etcd:", err)
	}
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// world is one overlay in one etcd, with a client of the test's own.
type world struct {
	t        *testing.T
	prefix   string
	endpoint string
	etcd     *clientv3.Client
	log      *slog.Logger
}

var prefixes atomic.Int64

func newWorld(t *testing.T) *world { return newWorldAt(t, sharedEtcd.endpoint) }

func newWorldAt(t *testing.T, endpoint string) *world {
	t.Helper()
	w := &world{
		t:        t,
		prefix:   fmt.Sprintf("/test/%d", prefixes.Add(1)),
		endpoint: endpoint,
		etcd:     plainClient(t, endpoint),
		log:      quiet,
	}
	return w
}

func plainClient(t *testing.T, endpoint string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	w.t.Cleanup(cancel)
	return ctx
}

func (w *world) config(json string) { w.t.Helper(); w.putRaw(w.prefix+"/config", json) }

func (w *world) put(name, value string, opts ...clientv3.OpOption) int64 {
	w.t.Helper()
	return w.putRaw(w.prefix+"/subnets/"+name, value, opts...)
}

func (w *world) putRaw(key, value string, opts ...clientv3.OpOption) int64 {
	w.t.Helper()
	resp, err := w.etcd.Put(w.ctx(), key, value, opts...)
	if err != nil {
		w.t.Fatalf("put %s: %v", key, err)
	}
	return resp.Header.Revision
}

func (w *world) del(name string) {
	w.t.Helper()
	if _, err := w.etcd.Delete(w.ctx(), w.prefix+"/subnets/"+name); err != nil {
		w.t.Fatalf("delete %s: %v", name, err)
	}
}

func (w *world) get(name string) *mvccpb.KeyValue {
	w.t.Helper()
	resp, err := w.etcd.Get(w.ctx(), w.prefix+"/subnets/"+name)
	if err != nil {
		w.t.Fatalf("get %s: %v", name, err)
	}
	if len(resp.Kvs) == 0 {
		return nil
	}
	return resp.Kvs[0]
}

// keys lists what is below subnets/.
func (w *world) keys() []*mvccpb.KeyValue {
	w.t.Helper()
	resp, err := w.etcd.Get(w.ctx(), w.prefix+"/subnets/", clientv3.WithPrefix())
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.Kvs
}

func (w *world) grant(ttl int64) clientv3.LeaseID {
	w.t.Helper()
	resp, err := w.etcd.Grant(w.ctx(), ttl)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.ID
}

func (w *world) leased(ttl int64) clientv3.OpOption { return clientv3.WithLease(w.grant(ttl)) }

// history is every event of a key since its prefix was first used.
func (w *world) history(name string) []*clientv3.Event {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx())
	defer cancel()
	mark := w.putRaw(w.prefix+"/mark", "")
	var events []*clientv3.Event
	for resp := range w.etcd.Watch(ctx, w.prefix+"/", clientv3.WithPrefix(), clientv3.WithRev(1)) {
		if err := resp.Err(); err != nil {
			w.t.Fatal("history:", err)
		}
		for _, ev := range resp.Events {
			if string(ev.Kv.Key) == w.prefix+"/subnets/"+name {
				events = append(events, ev)
			}
			if ev.Kv.ModRevision == mark {
				return events
			}
		}
	}
	w.t.Fatal("history: the watch ended")
	return nil
}

// registry opens the overlay as a node does.
func (w *world) registry() *Registry { return w.registryAt(w.endpoint) }

func (w *world) registryAt(endpoint string) *Registry {
	w.t.Helper()
	r, err := Open(EtcdConfig{Endpoints: []string{endpoint}, Prefix: w.prefix, Log: w.log})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { r.Close() })
	return r
}

// node is a manager for node number i, 1..40, with the address 192.0.2.i. It was
// in 10.77.(200+i).0/24 before, so that tests know which subnets are others'.
func (w *world) node(i int, change ...func(*ManagerConfig)) *Manager {
	w.t.Helper()
	cfg := ManagerConfig{
		NodeID:   fmt.Sprintf("id-%d", i),
		NodeName: fmt.Sprintf("node-%d", i),
		PublicIP: testIP(i),
		Previous: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(200 + i), 0}), 24),
		Log:      w.log,
	}
	for _, f := range change {
		f(&cfg)
	}
	if cfg.Registry == nil {
		cfg.Registry = w.registry()
	}
	m := NewManager(cfg)
	m.timing.progress = 100 * time.Millisecond
	m.timing.stall = 3 * time.Second
	m.timing.hold, m.timing.massHold = 0, 0 // what is deleted goes at once
	m.timing.retryMin, m.timing.retryMax = 20*time.Millisecond, 200*time.Millisecond
	return m
}

// eventually repeats what a busy machine may make run into a short deadline,
// until it reports no fault.
func eventually(t *testing.T, attempt func() (fault string)) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		fault := attempt()
		if fault == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Error(fault)
			return
		}
	}
}

func testIP(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}) }

func withTTL(d time.Duration) func(*ManagerConfig) { return func(c *ManagerConfig) { c.TTL = d } }

func withPrevious(s string) func(*ManagerConfig) {
	return func(c *ManagerConfig) { c.Previous = netip.MustParsePrefix(s) }
}

// running is a node that acquired its lease and follows the others.
type running struct {
	*Manager
	t    *testing.T
	stop func()
}

func (w *world) run(m *Manager) *running {
	w.t.Helper()
	if _, err := m.Acquire(w.ctx()); err != nil {
		w.t.Fatal("acquire:", err)
	}
	return w.rerun(m)
}

// rerun runs a manager that holds a lease, and stops it at the end of the test.
func (w *world) rerun(m *Manager) *running {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	r := &running{Manager: m, t: w.t}
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				w.t.Errorf("run: %v", err)
			}
		case <-time.After(patience):
			w.t.Error("run does not end")
		}
	})
	w.t.Cleanup(r.stop)
	r.until("synced and connected", func(s State) bool { return s.Synced && s.Connected })
	return r
}

// until waits for a state.
func (r *running) until(what string, good func(State) bool) State {
	r.t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		s := r.State()
		if good(s) {
			return s
		}
		select {
		case <-r.Updates():
		case <-tick.C:
		case <-deadline:
			r.t.Fatalf("never: %s; state %+v", what, s)
		}
	}
}

// caughtUp waits until everything written up to now is applied, by way of a
// marker lease.
func (r *running) caughtUp(w *world) State {
	w.t.Helper()
	rev := w.put("10.77.250.0-24", `{"PublicIP":"192.0.2.250"}`)
	return r.until("caught up", func(s State) bool { return s.Revision >= rev })
}

func (s State) peer(subnet string) (Lease, bool) {
	for _, l := range s.Peers {
		if l.Subnet.String() == subnet {
			return l, true
		}
	}
	return Lease{}, false
}

func hasPeer(subnet string) func(State) bool {
	return func(s State) bool { _, ok := s.peer(subnet); return ok }
}

func lacksPeer(subnet string) func(State) bool {
	return func(s State) bool { _, ok := s.peer(subnet); return !ok }
}

// logBuffer collects log lines.
type logBuffer struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// lines counts the lines that contain s.
func (b *logBuffer) lines(s string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for line := range strings.Lines(b.buf.String()) {
		if strings.Contains(line, s) {
			n++
		}
	}
	return n
}
