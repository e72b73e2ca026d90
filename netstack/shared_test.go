package netstack_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"tweed/netstack"
)

// mappings is how often shared memory is mapped in this process.
func mappings(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "tweed-ring")
}

// Programs come and go, with traffic in flight, beside a stream that must not
// notice. When they are gone, so is their memory.
func TestComingAndGoingLeavesNoMemory(t *testing.T) {
	ctx, n := engine(t)
	b := attach(ctx, t, n, "b")
	from, to := connected(ctx, t, n.Net, b)
	streamed := make(chan struct{})
	go func() { stream(t, from, to, 64<<20); close(streamed) }()
	base := mappings(t)
	if base != 4 { // both sides of two programs
		t.Errorf("shared memory is mapped %d times, expected 4", base)
	}
	l, err := b.Listen("tcp", ":99")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 1<<20)
				for {
					if _, err := c.Write(buf); err != nil {
						return
					}
				}
			}()
		}
	}()
	for range 30 {
		g, err := netstack.New(ctx, netstack.Config{Engine: n.Node, Name: "guest"})
		if err != nil {
			t.Fatal(err)
		}
		c, err := g.Dial(ctx, "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 100)); err != nil {
			t.Error(err)
		}
		g.Close()
	}
	<-streamed
	for mappings(t) != base {
		if ctx.Err() != nil {
			t.Fatalf("shared memory is mapped %d times, expected %d", mappings(t), base)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
