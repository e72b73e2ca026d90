package lease

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestOpenRefusesWhatCannotWork(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty.pem")
	if err := os.WriteFile(empty, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		cfg  EtcdConfig
		want string
	}{
		{EtcdConfig{}, "no etcd endpoint is given: write for example http://127.0.0.1:2379"},
		{EtcdConfig{Endpoints: []string{" ", ""}}, "no etcd endpoint is given"},
		{EtcdConfig{Endpoints: []string{"htp://x:2379"}}, `"htp://x:2379" has scheme "htp"`},
		{EtcdConfig{Endpoints: []string{"http://x"}}, `"http://x" is not scheme://host:port`},
		{EtcdConfig{Endpoints: []string{"http://x:2379/coreos.com"}}, `has a path; the key prefix is given by --etcd-prefix`},
		{EtcdConfig{Endpoints: []string{"http://a:1", "https://b:2"}}, "mix http and https"},
		{EtcdConfig{Endpoints: []string{"http://a:1"}, Username: "u"}, "--etcd-username and --etcd-password"},
		{EtcdConfig{Endpoints: []string{"https://a:1"}, CertFile: "c"}, "--etcd-certfile and --etcd-keyfile"},
		{EtcdConfig{Endpoints: []string{"https://a:1"}, CAFile: filepath.Join(dir, "none")}, "--etcd-cafile: open"},
		{EtcdConfig{Endpoints: []string{"https://a:1"}, CAFile: empty}, "no certificate in it"},
		{EtcdConfig{Endpoints: []string{"https://a:1"}, CertFile: empty, KeyFile: empty}, "--etcd-certfile " + empty},
	} {
		if _, err := Open(tc.cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: got %v, want %s", tc.cfg, err, tc.want)
		}
	}
}

func TestEndpointsAreTrimmedAndCompleted(t *testing.T) {
	w := newWorld(t)
	bare := strings.TrimPrefix(w.endpoint, "http://")
	r, err := Open(EtcdConfig{Endpoints: []string{" " + w.endpoint + "/ ", "", bare}, Prefix: w.prefix, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if len(r.cfg.Endpoints) != 1 || r.cfg.Endpoints[0] != w.endpoint {
		t.Errorf("endpoints %q", r.cfg.Endpoints)
	}
	if _, _, err := r.ListLeases(w.ctx()); err != nil {
		t.Error(err)
	}
	secure, err := checkEndpoints(EtcdConfig{Endpoints: []string{"a:1"}, CAFile: "x"})
	if err != nil || secure[0] != "https://a:1" {
		t.Errorf("got %q, %v", secure, err)
	}
}

func TestNetworkConfigIsWrittenValidatedAndReadBack(t *testing.T) {
	w := newWorld(t)
	r := w.registry()
	_, err := r.ReadNetworkConfig(w.ctx())
	if !errors.Is(err, ErrNoConfig) || errors.Is(err, ErrV2Keys) || !strings.Contains(err.Error(), w.prefix+"/config: write one, for example: tweed network set 10.244.0.0/16 --etcd-prefix "+w.prefix) {
		t.Errorf("got %v", err)
	}
	bare, err := Open(EtcdConfig{Endpoints: []string{w.endpoint}, Prefix: w.prefix[1:], Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer bare.Close()
	if _, err := bare.ReadNetworkConfig(w.ctx()); err == nil || !strings.Contains(err.Error(), "does not begin with a slash") {
		t.Errorf("got %v", err)
	}
	cfg, err := ParseNetworkConfig([]byte(`{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","VNI":5}}`))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.WriteNetworkConfig(w.ctx(), cfg); err != nil {
		t.Fatal(err)
	}
	if got, err := r.ReadNetworkConfig(w.ctx()); err != nil || got != cfg {
		t.Errorf("got %+v, %v", got, err)
	}
	bad := cfg
	bad.SubnetLen = 17
	if err := r.WriteNetworkConfig(w.ctx(), bad); err == nil {
		t.Error("an invalid configuration was written")
	}
	if got, err := r.ReadNetworkConfig(w.ctx()); err != nil || got != cfg {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestLongListsAreReadInPagesAtOneRevision(t *testing.T) {
	w := newWorld(t)
	const n = 2*pageSize + 17
	var ops []clientv3.Op
	for i := range n {
		ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s/subnets/10.%d.%d.0-24", w.prefix, i>>8, i&255), `{"PublicIP":"192.0.2.9"}`))
		if len(ops) == 100 || i == n-1 {
			if _, err := w.etcd.Txn(w.ctx()).Then(ops...).Commit(); err != nil {
				t.Fatal(err)
			}
			ops = nil
		}
	}
	leases, rev, err := w.registry().ListLeases(w.ctx())
	if err != nil || len(leases) != n || rev < leases[n-1].ModRevision {
		t.Fatalf("%d leases at %d, %v", len(leases), rev, err)
	}
	for i, l := range leases {
		if want := fmt.Sprintf("10.%d.%d.0/24", i>>8, i&255); l.Subnet.String() != want {
			t.Fatalf("lease %d is %s, want %s", i, l.Subnet, want)
		}
	}
}

// Every answer of a list that takes several fails once; the table is never less
// than complete.
func TestListThatFailsHalfwayChangesNothing(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	var ops []clientv3.Op
	for i := range 120 {
		ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s/subnets/10.77.%d.0-24", w.prefix, 100+i), `{"PublicIP":"192.0.2.9"}`))
	}
	if _, err := w.etcd.Txn(w.ctx()).Then(ops...).Commit(); err != nil {
		t.Fatal(err)
	}
	for lost := range 6 {
		link := newLink(t, w.endpoint)
		m := w.node(1, func(c *ManagerConfig) { c.Registry = w.registryAt(link.endpoint) })
		if _, err := m.AwaitConfig(w.ctx()); err != nil {
			t.Fatal(err)
		}
		if err := m.relist(w.ctx()); err != nil {
			t.Fatal(err)
		}
		link.cutAfterAnswers(lost)
		err := m.relist(w.ctx())
		if s := m.State(); len(s.Peers) != 120 {
			t.Errorf("lost answer %d (%v): %d peers", lost, err, len(s.Peers))
		}
	}
}

func TestUnreachableEtcdIsExplained(t *testing.T) {
	w := newWorld(t)
	free, _, err := freePorts()
	if err != nil {
		t.Fatal(err)
	}
	web := httpServer(t, func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) })
	old := httpServer(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"etcdserver":"2.3.8","etcdcluster":"2.3.0"}`)
	})
	for _, tc := range []struct {
		endpoint, want string
		access         bool
	}{
		{"http://" + free, "http://" + free + ": connection refused (is etcd running there? check --etcd-endpoints)", false},
		{"http://no-such-host.invalid:2379", `no address for host "no-such-host.invalid"`, false},
		{"http://" + web, "something answers there that is not etcd (HTTP status 404", false},
		{"http://" + old, "etcd 2.3.8 has the v2 API only: version 3.4 or newer is needed", true},
		{"https://" + strings.TrimPrefix(w.endpoint, "http://"), "it does not speak TLS: write http:// instead of https://", true},
	} {
		r := w.registryAt(tc.endpoint)
		r.readTimeout = 300 * time.Millisecond
		eventually(t, func() string {
			_, err := r.ReadNetworkConfig(w.ctx())
			var etcd *EtcdError
			if !errors.As(err, &etcd) || !strings.Contains(err.Error(), tc.want) || errors.Is(err, ErrAccess) != tc.access || strings.Contains(err.Error(), "\n") {
				return fmt.Sprintf("%s: got %v, want %s", tc.endpoint, err, tc.want)
			}
			return ""
		})
	}
}

// httpServer is a plain web server on a loopback port; it returns its address.
func httpServer(t *testing.T, handle http.HandlerFunc) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveHTTP(t, listener, handle)
	return listener.Addr().String()
}

func serveHTTP(t *testing.T, listener net.Listener, handle http.HandlerFunc) {
	server := &http.Server{Handler: handle, ErrorLog: slog.NewLogLogger(quiet.Handler(), slog.LevelError)}
	done := make(chan struct{})
	go func() {
		server.Serve(listener)
		close(done)
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
}

// An etcd 3.4 that serves both APIs: gRPC goes to the embedded one, plain HTTP to
// a handler that knows a v2 key.
func TestConfigUnderTheV2APIOnlyIsExplained(t *testing.T) {
	w := newWorld(t)
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	plain := newConnListener(front.Addr())
	serveHTTP(t, plain, func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v2/keys"+w.prefix+"/config" {
			io.WriteString(rw, `{"action":"get","node":{"key":"/config","value":"{}"}}`)
			return
		}
		http.NotFound(rw, r)
	})
	behind := newLink(t, w.endpoint)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := front.Accept()
			if err != nil {
				return
			}
			b := bufio.NewReader(conn)
			if first, err := b.Peek(3); err != nil || string(first) != "PRI" {
				plain.conns <- peeked{conn, b}
				continue
			}
			up, err := net.Dial("tcp", strings.TrimPrefix(behind.endpoint, "http://"))
			if err != nil {
				conn.Close()
				continue
			}
			go func() { io.Copy(up, b); up.Close() }()
			go func() { io.Copy(conn, up); conn.Close() }()
		}
	}()
	t.Cleanup(func() { front.Close(); <-done })

	m := w.node(1, func(c *ManagerConfig) {
		c.Registry, c.FailFast = w.registryAt("http://"+front.Addr().String()), true
	})
	_, err = m.AwaitConfig(w.ctx())
	if !errors.Is(err, ErrV2Keys) || !errors.Is(err, ErrNoConfig) || !strings.Contains(err.Error(), "ETCDCTL_API=3 etcdctl put "+w.prefix+"/config") {
		t.Errorf("got %v", err)
	}
	if keys := w.keys(); len(keys) != 0 {
		t.Errorf("wrote %v", keys)
	}
}

// peeked is a connection of which the first bytes were looked at.
type peeked struct {
	net.Conn
	r *bufio.Reader
}

func (p peeked) Read(b []byte) (int, error) { return p.r.Read(b) }

// connListener hands over connections that were accepted elsewhere.
type connListener struct {
	conns  chan net.Conn
	closed chan struct{}
	addr   net.Addr
}

func newConnListener(addr net.Addr) *connListener {
	return &connListener{make(chan net.Conn, 16), make(chan struct{}), addr}
}

func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *connListener) Close() error   { close(l.closed); return nil }
func (l *connListener) Addr() net.Addr { return l.addr }

func TestAwaitConfigWaitsThroughWhatMayPass(t *testing.T) {
	w := newWorld(t)
	var logs logBuffer
	w.log = slog.New(slog.NewTextHandler(&logs, nil))
	m := w.node(1)
	type result struct {
		cfg NetworkConfig
		err error
	}
	got := make(chan result, 1)
	go func() {
		cfg, err := m.AwaitConfig(w.ctx())
		got <- result{cfg, err}
	}()
	waitFor := func(problem string) {
		t.Helper()
		deadline := time.Now().Add(patience)
		for !strings.Contains(m.Problem(), problem) {
			if time.Now().After(deadline) {
				t.Fatalf("problem is %q, want %s", m.Problem(), problem)
			}
			time.Sleep(5 * time.Millisecond)
		}
		time.Sleep(200 * time.Millisecond) // several tries
	}
	waitFor("no network configuration")
	w.config(`{"Network":"10.77.0.0/16","Backend":{"Type":"host-gw"}}`)
	waitFor(`backend type "host-gw" is not supported`)
	w.config(`{"Network":"192.0.0.0/16"}`)
	waitFor("contains this node's public IP 192.0.2.1")
	w.config(config16)
	if r := <-got; r.err != nil || r.cfg.Network.String() != "10.77.0.0/16" {
		t.Errorf("got %+v, %v", r.cfg, r.err)
	}
	if n := logs.lines("waiting for network config"); n != 3 {
		t.Errorf("%d log lines for three problems", n)
	}
	if p := m.Problem(); p != "" {
		t.Errorf("problem %q is left", p)
	}
}

func TestAwaitConfigFailsFastWhenTold(t *testing.T) {
	w := newWorld(t)
	w.config(`{"Network":"10.77.0.0/16","SubnetLen":"/24"}`)
	m := w.node(1, func(c *ManagerConfig) { c.FailFast = true })
	if _, err := m.AwaitConfig(w.ctx()); err == nil || !strings.Contains(err.Error(), `SubnetLen is "/24"`) || !strings.Contains(err.Error(), w.prefix+"/config") {
		t.Errorf("got %v", err)
	}
}

func TestEtcdThatComesUpLaterIsFound(t *testing.T) {
	t.Parallel()
	client, peer, err := freePorts()
	if err != nil {
		t.Fatal(err)
	}
	s := &etcdServer{dir: t.TempDir(), endpoint: "http://" + client}
	w := newWorldAt(t, s.endpoint)
	m := w.node(1)
	got := make(chan error, 1)
	go func() {
		if _, err := m.AwaitConfig(w.ctx()); err != nil {
			got <- err
			return
		}
		_, err := m.Acquire(w.ctx())
		got <- err
	}()
	for !strings.Contains(m.Problem(), "connection refused") {
		time.Sleep(5 * time.Millisecond)
	}
	if err := s.start(peer, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	w.config(config16)
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestClosedRegistryRefuses(t *testing.T) {
	w := newWorld(t)
	r := w.registry()
	r.Close()
	if _, err := r.ReadNetworkConfig(w.ctx()); !errors.Is(err, errClosed) {
		t.Errorf("got %v", err)
	}
	m := w.node(1, func(c *ManagerConfig) { c.Registry = r })
	if _, err := m.AwaitConfig(context.Background()); !errors.Is(err, errClosed) {
		t.Errorf("got %v", err)
	}
}

func genericConfig(t *testing.T) NetworkConfig {
	t.Helper()
	cfg, err := ParseNetworkConfig([]byte(config16))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}
