package node

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestHealthEndpointsAnswerAsFlannels(t *testing.T) {
	n, err := New(Config{Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		n.healthHandler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		b, _ := io.ReadAll(w.Result().Body)
		return w.Code, string(b)
	}
	check := func(path string, code int, body string) {
		t.Helper()
		if c, b := get(path); c != code || b != body {
			t.Errorf("%s: %d %q, expected %d %q", path, c, b, code, body)
		}
	}
	check("/healthz", 200, "flanneld is running")
	check("/readyz", 503, "flanneld is not ready yet")
	n.readyz.Store(true)
	check("/readyz", 200, "flanneld is ready")
}

// serveTestAPI serves a node that was never run at path.
func serveTestAPI(t *testing.T, path string) *Node {
	t.Helper()
	n, err := New(Config{Log: quiet(), Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	l, err := listenAPI(path)
	if err != nil {
		t.Fatal(err)
	}
	s := n.apiServer()
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	return n
}

func TestClientReadsWhatTheAPIServes(t *testing.T) {
	path := filepath.Join(t.TempDir(), socketName)
	serveTestAPI(t, path)
	c := Dial(path)
	defer c.Close()
	ctx := context.Background()
	s, err := c.Status(ctx)
	if err != nil || s.Schema != Schema || s.Phase != PhaseStarting || s.Version != "test" || s.PID != os.Getpid() || s.Skipped == nil {
		t.Errorf("status %+v, %v", s, err)
	}
	if p, err := c.Peers(ctx); err != nil || p.Schema != Schema || p.Peers == nil {
		t.Errorf("peers %+v, %v", p, err)
	}
	if r, err := c.Routes(ctx); err != nil || r.Routes == nil {
		t.Errorf("routes %+v, %v", r, err)
	}
	if l, err := c.Leases(ctx); err != nil || l.Leases == nil {
		t.Errorf("leases %+v, %v", l, err)
	}
	if a, err := c.Route(ctx, netip.MustParseAddr("10.1.2.3")); err != nil || a.Result != "outside" {
		t.Errorf("route %+v, %v", a, err)
	}
	if a, err := c.Route(ctx, netip.MustParseAddr("fd00::1")); err != nil || a.Reason != "not-ipv4" {
		t.Errorf("route to IPv6 %+v, %v", a, err)
	}
	m, err := c.Metrics(ctx)
	if err != nil || !strings.Contains(m, `tweed_drops_total{direction="rx",reason="spoofed-source"} 0`) || !strings.Contains(m, "go_goroutines") {
		t.Errorf("metrics: %v\n%s", err, m)
	}
	if _, err := c.do(ctx, "/v1/route?ip=x"); err == nil || err.Error() != `ip "x": expected an IP address` {
		t.Errorf("bad address: %v", err)
	}
	if _, err := c.do(ctx, "/v9/status"); err == nil || !strings.Contains(err.Error(), "has no such call") {
		t.Errorf("unknown call: %v", err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != socketMode {
		t.Errorf("socket mode %v, %v", fi.Mode(), err)
	}
}

func TestAdminCallsAreForTheOwnerAndRootOnly(t *testing.T) {
	h := requireAdmin(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	for uid, want := range map[uint32]int{0: 204, uint32(os.Geteuid()): 204, 65534: 403} {
		r := httptest.NewRequest(http.MethodPost, "/v1/capture", nil)
		r = r.WithContext(context.WithValue(r.Context(), credKey{}, &unix.Ucred{Uid: uid}))
		w := httptest.NewRecorder()
		h(w, r)
		if w.Code != want {
			t.Errorf("uid %d: %d, expected %d", uid, w.Code, want)
		}
	}
	w := httptest.NewRecorder()
	h(w, httptest.NewRequest(http.MethodPost, "/v1/capture", nil))
	if w.Code != 403 {
		t.Errorf("no credentials: %d", w.Code)
	}
}

func TestSocketIsFoundWhenThereIsOneAndListedWhenThereAreSeveral(t *testing.T) {
	root := t.TempDir()
	_, err := scanSockets([]string{root})
	if err == nil || !strings.HasPrefix(err.Error(), "no engine found (looked in "+root) {
		t.Errorf("none: %v", err)
	}
	path := func(name string) string {
		dir := filepath.Join(root, name)
		if err := os.MkdirAll(dir, 0o750); err != nil {
			t.Fatal(err)
		}
		return filepath.Join(dir, socketName)
	}
	a, dead := path("a"), path("dead")
	serveTestAPI(t, a)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if got, err := scanSockets([]string{t.TempDir(), root}); err != nil || got != a {
		t.Errorf("one living, one dead: %q, %v", got, err)
	}
	b := path("b")
	serveTestAPI(t, b)
	if _, err := scanSockets([]string{root}); err == nil || !strings.Contains(err.Error(), "2 engines run here") || !strings.Contains(err.Error(), a+", "+b) {
		t.Errorf("two: %v", err)
	}
	if got, err := FindSocket("", filepath.Join(root, "b")); err != nil || got != b {
		t.Errorf("by state directory: %q, %v", got, err)
	}
	t.Setenv(EnvSocket, a)
	if got, err := FindSocket("", ""); err != nil || got != a {
		t.Errorf("by environment: %q, %v", got, err)
	}
	if got, err := FindSocket(b, "/x"); err != nil || got != b {
		t.Errorf("explicit: %q, %v", got, err)
	}
}

func TestADeadEnginesSocketIsReplacedAndALivingOnesIsNot(t *testing.T) {
	path := filepath.Join(t.TempDir(), socketName)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	serveTestAPI(t, path)
	if _, err := listenAPI(path); err == nil || !strings.Contains(err.Error(), "in use by another engine (pid ") {
		t.Errorf("second engine: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenAPI(file); err == nil || !strings.Contains(err.Error(), "exists and is no socket") {
		t.Errorf("ordinary file: %v", err)
	}
}

func TestClientSaysWhatToDo(t *testing.T) {
	path := filepath.Join(t.TempDir(), socketName)
	_, err := Dial(path).Status(context.Background())
	if err == nil || !strings.Contains(err.Error(), "no such socket: no engine runs") {
		t.Errorf("no socket: %v", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := Dial(path).Status(context.Background()); err == nil || !strings.Contains(err.Error(), "nobody answers") {
		t.Errorf("dead socket: %v", err)
	}
}
