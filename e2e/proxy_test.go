package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed/node"
)

// proxied is a `tweed proxy` of an ordinary user.
type proxied struct {
	*process
	engine *daemon
	addr   netip.Addr
}

var attachedLine = regexp.MustCompile(`(?m)^attached: ([0-9.]+), `)

func newProxy(e *daemon, name string, flags ...string) *proxied {
	w := e.w
	w.t.Helper()
	argv := append(asOrdinaryUser(), "env", "TMPDIR="+e.dir, tweedBin, "proxy", "--socket", e.api.Path(), "--name", name)
	p := &proxied{process: w.launch(e.ns, name, append(argv, flags...)...), engine: e}
	w.await(name+" is attached", func() bool {
		m := attachedLine.FindStringSubmatch(p.output())
		if m == nil || !strings.Contains(p.output(), "leads to") {
			return false
		}
		p.addr = netip.MustParseAddr(m[1])
		return true
	})
	return p
}

// rings is how much shared memory for packets a process has, in mappings.
func rings(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "tweed-ring")
}

const (
	servedPort  = 18080 // on the server's host
	forwardPort = 18081 // on the client's
	overlayPort = 80
)

// assertProxied sends bytes from a host through the client, the overlay and the
// server to another host, which sends the sum of them back.
func assertProxied(t *testing.T, client, server *proxied, size int) {
	t.Helper()
	var l net.Listener
	err := server.engine.ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", servedPort))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		h := sha256.New()
		if n, err := io.Copy(h, c); err != nil || n != int64(size) {
			t.Errorf("%d of %d bytes arrived: %v", n, size, err)
		}
		c.Write(h.Sum(nil))
	}()
	var c net.Conn
	err = client.engine.ns.Do(func() (err error) {
		c, err = net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", forwardPort))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	data := rand.NewChaCha8([32]byte{1})
	if _, err := io.CopyN(io.MultiWriter(c, h), data, int64(size)); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	sum, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(sum, h.Sum(nil)) {
		t.Errorf("what arrived is not what was sent: %x, %v", sum, err)
	}
}

// Streams between programs that use proxies arrive whole, on one engine and
// between two; a proxy outlives its engine, and leaves nothing in it.
func TestProxiesCarryStreams(t *testing.T) {
	needTool(t, "setpriv")
	w := newWorld(t, 2)
	w.config(vxlanConfig)
	a, b := ordinaryEngine(w, 0), ordinaryEngine(w, 1)
	awaitPeers(1, a, b)
	serve := fmt.Sprintf("%d:127.0.0.1:%d", overlayPort, servedPort)
	forward := func(p *proxied) string { return fmt.Sprintf("%d:%s:%d", forwardPort, p.addr, overlayPort) }

	far := newProxy(b, "far", "-R", serve)
	client := newProxy(a, "client", "-L", forward(far))
	assertProxied(t, client, far, transferBytes())
	client.end(unix.SIGKILL)
	a.await("the killed proxy is gone", func(s node.Status) bool { return len(s.Attachments) == 0 })
	w.await("its memory is gone", func() bool { return rings(t, a.cmd.Process.Pid) == 0 })

	near := newProxy(a, "near", "-R", serve)
	client = newProxy(a, "client", "-L", forward(near))
	for _, s := range attached(t, a) {
		if !s.SharedMemory {
			t.Errorf("%s has no shared memory", s.Name)
		}
	}
	assertProxied(t, client, near, transferBytes())
	for _, e := range []*daemon{a, b} {
		assertBalance(t, e)
	}
	w.await("tweed ps shows what the client counts", func() bool {
		_, stdout, _ := run(t, tweedBin, "ps", "--socket", a.api.Path())
		return regexp.MustCompile(`(?m)^packets of client: received [1-9]\d* `).MatchString(stdout)
	})

	a.end(unix.SIGKILL)
	for _, p := range []*proxied{near, client} {
		w.await("no engine", func() bool { return strings.Contains(p.output(), "no engine") })
		w.await("the engine's memory is gone", func() bool { return rings(t, p.cmd.Process.Pid) == 0 })
	}
	a.again()
	a.await("the proxies are back", func(s node.Status) bool { return len(s.Attachments) == 2 })
	for _, p := range []*proxied{near, client} {
		w.await("attached again", func() bool { return strings.Contains(p.output(), "attached again") })
	}
	assertProxied(t, client, near, transferBytes())

	for _, p := range []*proxied{near, client, far} {
		if status := p.end(unix.SIGTERM); status != 0 {
			t.Errorf("%s: status %d", p.name, status)
		}
		if !regexp.MustCompile(`(?m)^packets: received [1-9]\d* \(bad checksum 0, malformed 0\), sent [1-9]`).MatchString(p.output()) {
			t.Errorf("%s does not say what it received and sent:\n%s", p.name, p.output())
		}
	}
	for _, e := range []*daemon{a, b} {
		e.await("nothing is attached", func(s node.Status) bool { return len(s.Attachments) == 0 })
		w.await("no memory is left", func() bool { return rings(t, e.cmd.Process.Pid) == 0 })
	}
}
