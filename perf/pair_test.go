package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"tweed/netns"
)

// newBench is a bench without etcd, iperf3 and tweed.
func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{
		opt: &options{rounds: 1, seconds: 1, pings: 20, idle: 1}, dir: t.TempDir(),
		launcher: netns.NewLauncher(), progress: io.Discard, report: &Report{},
	}
	t.Cleanup(b.close)
	return b
}

// The kernel's subjects come up on both links, carry pings, and the counters
// see them; a pair holds no default route.
func TestKernelSubjects(t *testing.T) {
	needNamespaces(t)
	for _, link := range []string{linkVirtual, linkWire} {
		for _, name := range []string{subjectRaw, subjectKernel} {
			t.Run(link+"/"+name, func(t *testing.T) {
				b := newBench(t)
				s, err := newSubject(name, nil, false)
				if err != nil {
					t.Fatal(err)
				}
				o, err := b.bring(t.Context(), chosen{name, s}, 1, link)
				if err != nil {
					t.Fatal(err)
				}
				defer o.down()
				for side := range o.pair.rt {
					routes, err := o.pair.rt[side].RouteList(nil, 4)
					if err != nil {
						t.Fatal(err)
					}
					for _, r := range routes {
						if r.Dst == nil || r.Dst.IP.IsUnspecified() {
							t.Errorf("side %d has a default route: %v", side, r)
						}
					}
				}
				var got Sample
				b.measure(t.Context(), load{name: "ping", kind: loadPing}, o, &got)
				if got.Discarded != "" || got.Values[metricPingAvg] <= 0 {
					t.Errorf("%+v", got)
				}
			})
		}
	}
}

func TestTrafficPastTheSubjectIsDiscarded(t *testing.T) {
	needNamespaces(t)
	b := newBench(t)
	o, err := b.bring(t.Context(), chosen{subjectKernel, kernelVXLAN{}}, 1, linkVirtual)
	if err != nil {
		t.Fatal(err)
	}
	defer o.down()
	o.addr = underlayAddr // as a broken subject would: the peer answers, but not through vxlan
	var got Sample
	b.measure(t.Context(), load{name: "ping", kind: loadPing}, o, &got)
	if !strings.Contains(got.Discarded, "did not cross "+kernelVXLANDev) {
		t.Errorf("%+v", got)
	}
}

func TestForwardTCPReachesTheHarness(t *testing.T) {
	needNamespaces(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
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
			io.Copy(c, c)
			c.Close()
		}
	}()
	p, err := newPair(linkVirtual)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if err := p.forwardTCP(1, etcdForwardPort, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	err = p.ns[1].Do(func() error {
		c, err := net.DialTimeout("tcp4", "127.0.0.1:2379", 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write([]byte("echo")); err != nil {
			return err
		}
		buf := make([]byte, 4)
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "echo" {
			t.Errorf("%q, %v", buf, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestProcessesAreStopped(t *testing.T) {
	b := newBench(t)
	p, err := b.start(nil, "engine", "/bin/sh", "-c", "trap '' TERM; echo stubborn; while :; do sleep 0.1; done")
	if err != nil {
		t.Fatal(err)
	}
	if err := waitFor(t.Context(), 5*time.Second, func() error {
		if !strings.Contains(p.tail(), "stubborn") {
			return errors.New("nothing printed")
		}
		return p.running()
	}); err != nil {
		t.Fatal(err)
	}
	p.stop(50 * time.Millisecond)
	if err := p.running(); err == nil || !strings.Contains(err.Error(), "stubborn") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", p.pid())); err == nil {
		t.Error("it is still there")
	}
}

func TestOutputIsBounded(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("too slow"))
	defer cancel()
	if _, err := b.output(ctx, nil, "/bin/sleep", "60"); err == nil || !strings.Contains(err.Error(), "too slow") {
		t.Errorf("%v", err)
	}
	out, err := b.output(t.Context(), nil, "/bin/sh", "-c", "echo fine; echo bad >&2; exit 3")
	if string(out) != "fine\n" || err == nil || !strings.Contains(err.Error(), "bad") {
		t.Errorf("%q, %v", out, err)
	}
}

func TestWaitForGivesUp(t *testing.T) {
	calls := 0
	err := waitFor(t.Context(), time.Minute, func() error {
		calls++
		return &giveUp{errors.New("it is dead")}
	})
	if calls != 1 || err == nil || err.Error() != "it is dead" {
		t.Errorf("%d calls, %v", calls, err)
	}
	if err := waitFor(t.Context(), time.Millisecond, func() error { return errors.New("not yet") }); err == nil || !strings.Contains(err.Error(), "not yet") {
		t.Errorf("%v", err)
	}
}
