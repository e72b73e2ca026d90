package inproc_test

import (
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tweed/encap"
	"tweed/inproc"
	"tweed/netstack"
	"tweed/proxy"
)

func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// twoNodes starts a network of two nodes.
func twoNodes(t *testing.T, c inproc.NetworkConfig) (a, b *inproc.Node) {
	t.Helper()
	ctx := deadline(t)
	w, err := inproc.NewNetwork(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	var nodes []*inproc.Node
	for _, name := range []string{"a", "b"} {
		n, err := w.Start(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, n)
	}
	if err := w.Await(ctx); err != nil {
		t.Fatal(err)
	}
	return nodes[0], nodes[1]
}

// echo answers on a TCP and a UDP port of n.
func echo(t *testing.T, n *netstack.Net) (tcp, udp string) {
	t.Helper()
	l, err := n.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := n.ListenPacket("udp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); p.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	go func() {
		b := make([]byte, 65535)
		for {
			k, from, err := p.ReadFrom(b)
			if err != nil {
				return
			}
			p.WriteTo(b[:k], from)
		}
	}()
	return l.Addr().String(), net.JoinHostPort(n.Addr().String(), "7")
}

// exchange sends a text over c and expects it back.
func exchange(t *testing.T, c net.Conn, size int) {
	t.Helper()
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	text := strings.Repeat("0123456789abcdef", size/16)
	go c.Write([]byte(text))
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Errorf("%d bytes came back changed, %v", len(got), err)
	}
}

func TestNodesTalkInBothFramings(t *testing.T) {
	for _, f := range []encap.Framing{encap.FramingUDP, encap.FramingVXLAN} {
		for _, mtu := range []string{"", "1426"} {
			t.Run(f.String()+mtu, func(t *testing.T) {
				a, b := twoNodes(t, inproc.NetworkConfig{Framing: f, MTU: mtu})
				tcp, udp := echo(t, b.Net)
				ctx := deadline(t)
				if _, err := a.Ping(ctx, b.Addr(), 1000); err != nil {
					t.Error(err)
				}
				c, err := a.Dial(ctx, "tcp", tcp)
				if err != nil {
					t.Fatal(err)
				}
				exchange(t, c, 1<<20)
				c, err = a.Dial(ctx, "udp", udp)
				if err != nil {
					t.Fatal(err)
				}
				exchange(t, c, 1024)
			})
		}
	}
}

func TestAnAddressThatIsLostComesBack(t *testing.T) {
	a, b := twoNodes(t, inproc.NetworkConfig{})
	ctx := deadline(t)
	lost := make(chan error, 4)
	n, err := netstack.New(ctx, netstack.Config{Engine: b.Node, Name: "second", Lost: func(err error) { lost <- err }})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	addr := n.Addr()
	tcp, _ := echo(t, n)
	c, err := a.Dial(ctx, "tcp", tcp)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Node.Detach(ctx, "second"); err != nil {
		t.Fatal(err)
	}
	if err := <-lost; err == nil {
		t.Error("back before it was lost")
	}
	if err := <-lost; err != nil {
		t.Errorf("not back: %v", err)
	}
	if n.Addr() != addr {
		t.Errorf("address %s, was %s", n.Addr(), addr)
	}
	exchange(t, c, 64<<10) // the connection has survived
}

func TestClosingEndsTheAttachment(t *testing.T) {
	_, b := twoNodes(t, inproc.NetworkConfig{})
	n, err := netstack.New(deadline(t), netstack.Config{Engine: b.Node})
	if err != nil {
		t.Fatal(err)
	}
	if len(b.Node.Attachments()) != 2 {
		t.Errorf("attachments %+v, want 2", b.Node.Attachments())
	}
	n.Close()
	n.Close()
	if len(b.Node.Attachments()) != 1 {
		t.Errorf("attachments %+v, want 1", b.Node.Attachments())
	}
	if _, err := n.Dial(t.Context(), "tcp", net.JoinHostPort(b.Addr().String(), "1")); err == nil {
		t.Error("dialled from a closed stack")
	}
}

func TestTheDialerChoosesTheWay(t *testing.T) {
	a, b := twoNodes(t, inproc.NetworkConfig{})
	tcp, _ := echo(t, b.Net)
	host, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	l, err := proxy.Listen("unix:" + filepath.Join(shortDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	d := &netstack.Dialer{Net: a.Net}
	s := proxy.ServeForward(l, d.DialContext, tcp, nil)
	defer s.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, c, 4096)
	if c, err = d.DialContext(deadline(t), "tcp", host.Addr().String()); err != nil {
		t.Errorf("an address of the host: %v", err)
	} else {
		c.Close()
	}
	if _, err := d.DialContext(deadline(t), "tcp", "no.such.name.invalid:80"); err == nil {
		t.Error("a name that does not exist was dialled")
	}
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tweed-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestAStartThatFailsSaysWhyAndLeavesNothing(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := inproc.Start(ctx, inproc.Config{EtcdEndpoints: []string{"http://127.0.0.1:1"}, Underlay: netip.MustParseAddr("127.99.0.1")})
	if err == nil || !strings.Contains(err.Error(), "not ready") {
		t.Errorf("error %v", err)
	}
	_, err = inproc.Start(t.Context(), inproc.Config{Underlay: netip.MustParseAddr("192.0.2.77")})
	if err == nil || !strings.Contains(err.Error(), "192.0.2.77") {
		t.Errorf("error %v", err)
	}
}
