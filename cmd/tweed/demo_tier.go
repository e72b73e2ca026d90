package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"tweed/attach"
	"tweed/netns"
	"tweed/node"
)

// holdArg is the first argument of a process that does nothing: it is the
// container of a demo whose nodes have no TUN device.
const holdArg = "__hold"

// hold is its main.
func hold() int {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	<-stop
	return exitGood
}

// chooseDemoTier settles how the nodes of a demo are connected: each by a TUN
// device of its own, or, where there can be none, each through one attached
// container. It says so when that was not what the best tier would be.
func chooseDemoTier(want attach.Tier) (attach.Tier, []attach.Verdict, error) {
	passed := attach.CheckDevice()
	switch want {
	case attach.TierTUN:
		if passed != nil {
			return "", nil, fmt.Errorf("demo: --tier tun: %s; type: %s", passed.Why, passed.Fix)
		}
		return attach.TierTUN, nil, nil
	case attach.TierAuto:
		if passed == nil {
			return attach.TierTUN, nil, nil
		}
		return attach.TierVeth, []attach.Verdict{*passed}, nil
	}
	return want, nil, nil
}

// contain gives a node that leaves its host out of the overlay a container to
// be pinged in.
func (d *demo) contain(ctx context.Context, n *demoNode) error {
	c, err := netns.New()
	if err != nil {
		return err
	}
	d.containers = append(d.containers, c)
	n.ns = c
	if n.container, err = d.serve(c, n.process.Name+"-container", nil, holdArg); err != nil {
		return err
	}
	s, err := n.api.Attach(ctx, node.AttachRequest{PID: n.container.cmd.Process.Pid, Name: n.name, Tier: string(d.o.tier)})
	if err != nil {
		return &demoProcessError{n.process, err}
	}
	n.address = s.Addr
	d.out.done(n.name+" container", "%s on %s, tier %s, pid %d", s.Addr, s.Interface, s.Tier, s.PID)
	return nil
}
