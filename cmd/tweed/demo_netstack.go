package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"time"

	"tweed/attach"
	"tweed/encap"
	"tweed/inproc"
	"tweed/netns"
)

// probeArg is the first argument of a process that only says by its exit status
// whether a user namespace gives it rights: AppArmor lets it be made and
// withholds them.
const probeArg = "__userns-probe"

// probeUserNamespace is its main.
func probeUserNamespace() int {
	if netns.CheckPrivileges() != nil {
		return exitFailed
	}
	return exitGood
}

// checkUserNamespace returns why no user namespace can be used, nil if one can,
// or if none is needed.
func checkUserNamespace() error {
	if netns.CheckPrivileges() == nil {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, probeArg)
	netns.Contain(cmd, false, false)
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &exit):
		return netns.ExplainUserNamespace(os.ErrPermission)
	}
	return netns.ExplainUserNamespace(err)
}

// netstackTransfer is the size of each transfer, in bytes: the stack in user
// space takes its time.
const netstackTransfer = 16 << 20

// runNetstackDemo shows an overlay of nodes inside this program.
func runNetstackDemo(ctx context.Context, o demoOptions, why string, stdout io.Writer) error {
	if o.keep {
		return fmt.Errorf("demo: --keep needs namespaces: in tier netstack the nodes are part of this program: %s", why)
	}
	out := printer{stdout}
	if o.impair.Active() {
		out.done("impairments", "%s, by the nodes themselves to all they send", o.impair)
	}
	out.done("tier "+string(attach.TierNetstack), "nodes inside this program, without any interface: %s", why)
	for _, f := range o.framings {
		out.blank()
		if err := netstackOverlay(ctx, o, f, out); err != nil {
			return fmt.Errorf("demo: %s: %w", f, err)
		}
	}
	out.done("removed", "everything; it was all in this program")
	out.blank()
	out.next(advice()[1:]) // nothing can be kept
	return nil
}

func netstackOverlay(ctx context.Context, o demoOptions, f encap.Framing, out printer) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*demoPatience, fmt.Errorf("not done within %s", 2*demoPatience))
	defer cancel()
	network, err := inproc.NewNetwork(inproc.NetworkConfig{
		Network: newOverlay(f).network, Framing: f, MTU: strconv.Itoa(f.DefaultMTU(o.mtu)), Impair: o.impair,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, network.Close()) }()
	out.done("etcd", "%s, in the demo only", network.Endpoint)
	var nodes []*inproc.Node
	for i := range o.nodes {
		began := time.Now()
		n, err := network.Start(ctx, fmt.Sprintf("n%d", i+1))
		if err != nil {
			return err
		}
		nodes = append(nodes, n)
		s := n.Node.Status()
		out.done(s.Node.Name, "%s in %s at %s, MTU %d, ready after %.2f s",
			n.Addr(), s.Lease.Subnet, s.Node.PublicIP, n.MTU(), time.Since(began).Seconds())
	}
	if err := network.Await(ctx); err != nil {
		return err
	}
	for i, from := range nodes {
		to := nodes[(i+1)%len(nodes)]
		way := fmt.Sprintf("n%d → n%d", i+1, (i+1)%len(nodes)+1)
		var rtt time.Duration
		var err error
		for range impairedPings {
			once, cancel := context.WithTimeout(ctx, 2*maxDemoDelay+time.Second)
			rtt, err = from.Ping(once, to.Addr(), 56)
			cancel()
			if err == nil || !o.impair.Active() {
				break
			}
		}
		if err != nil {
			return err
		}
		out.done("ping "+way, "%s to %s: %.2f ms", from.Addr(), to.Addr(), float64(rtt.Microseconds())/1000)
		size := netstackTransfer
		if o.impair.Active() {
			size = impairedTransfer
		}
		elapsed, err := netstackTransferTo(ctx, from, to, size)
		if err != nil {
			return fmt.Errorf("TCP %s: %w", way, err)
		}
		out.done("TCP  "+way, "%d MB in %.2f s, %.1f Gbit/s, sha256 equal",
			size>>20, elapsed.Seconds(), float64(size)*8/elapsed.Seconds()/1e9)
	}
	for _, n := range nodes {
		s := n.Node.Status()
		out.done("ledger "+s.Node.Name, "sent %s, received %s", demoLedger(s.Ledger.Tx), demoLedger(s.Ledger.Rx))
	}
	return nil
}

// netstackTransferTo sends bytes from one node to the other and compares what
// arrived.
func netstackTransferTo(ctx context.Context, from, to *inproc.Node, size int) (time.Duration, error) {
	l, err := to.Listen("tcp", ":0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	type sum struct {
		sha [32]byte
		err error
	}
	received := make(chan sum, 1)
	go func() {
		h := sha256.New()
		c, err := l.Accept()
		if err == nil {
			_, err = io.Copy(h, c)
			c.Close()
		}
		received <- sum{[32]byte(h.Sum(nil)), err}
	}()
	began := time.Now()
	c, err := from.Dial(ctx, "tcp", l.Addr().String())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close(); l.Close() })
	defer stop()
	block := make([]byte, 64<<10)
	h := sha256.New()
	for i := range size / len(block) {
		for j := range block {
			block[j] = byte(i*7 + j*13 + j>>8)
		}
		h.Write(block)
		if _, err := c.Write(block); err != nil {
			return 0, err
		}
	}
	c.Close()
	got := <-received
	if got.err != nil {
		return 0, got.err
	}
	if got.sha != [32]byte(h.Sum(nil)) {
		return 0, errors.New("what arrived is not what was sent")
	}
	return time.Since(began), nil
}
