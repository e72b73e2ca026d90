package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/netns"
	"tweed/node"
)

func newDemoBreakCommand(o *demoOptions) *cobra.Command {
	var framing string
	var kill, partition bool
	cmd := &cobra.Command{
		Use:   "break NODE {--kill | --partition}",
		Short: "Break a node of the kept demo, to see what the others do",
		Long: `break kills a node's process (SIGKILL), or takes its link to the underlay down.
` + "`tweed demo heal`" + ` undoes both.`,
		Example: `  tweed demo break n2 --kill && tweed demo heal n2
  tweed demo break n2 --partition`,
		Args: oneArg("a node, such as n2"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if kill == partition {
				return newUsageError(cmd, errors.New("expected one of --kill and --partition"))
			}
			if partition && framing != "" {
				return newUsageError(cmd, errors.New("--backend: the link is the same for both overlays; expected it with --kill only"))
			}
			return inKeptDemo(cmd, o.runDir, func(_ context.Context, d *keptDemo) error {
				nodes, err := d.nodes(args[0], framing)
				if err != nil {
					return err
				}
				p := printer{cmd.OutOrStdout()}
				if partition {
					if err := d.setLink(nodes[0], false); err != nil {
						return fmt.Errorf("demo break: %w", err)
					}
					p.done("partitioned", "%s: its link to the underlay is down", args[0])
				} else if err := d.kill(nodes, p); err != nil {
					return fmt.Errorf("demo break: %w", err)
				}
				p.next([][2]string{{d.command(o.runDir, "heal "+args[0]), "undo it"}})
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&kill, "kill", false, "kill the node's process")
	cmd.Flags().BoolVar(&partition, "partition", false, "take the node's link to the underlay down")
	completeFraming(cmd, &framing, "with --kill, only the node of this overlay")
	return cmd
}

func newDemoHealCommand(o *demoOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "heal NODE",
		Short: "Undo `tweed demo break`",
		Args:  oneArg("a node, such as n2"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return inKeptDemo(cmd, o.runDir, func(ctx context.Context, d *keptDemo) error {
				nodes, err := d.nodes(args[0], "")
				if err != nil {
					return err
				}
				if err := d.heal(ctx, nodes, cmd.OutOrStdout()); err != nil {
					return fmt.Errorf("demo heal: %w", err)
				}
				return nil
			})
		},
	}
}

// command is what to type for another subcommand of this demo.
func (d *keptDemo) command(base, rest string) string {
	line := selfName() + " demo " + rest
	if base != defaultDemoDir() {
		line += " --run-dir " + base
	}
	return line
}

// kill ends the nodes' processes at once.
func (d *keptDemo) kill(nodes []keptNode, p printer) error {
	for _, n := range nodes {
		k, err := d.process(n.Process)
		if err != nil {
			return fmt.Errorf("%w: it was broken already", err)
		}
		if err := k.kill(); err != nil {
			return err
		}
		p.done("killed", "%s, pid %d: its peers keep their routes to it until its lease expires", n.Process, k.PID)
	}
	return nil
}

// setLink sets the bridge's end of a node's link up or down.
func (d *keptDemo) setLink(n keptNode, up bool) error {
	etcd, err := d.process(demoEtcd)
	if err != nil {
		return err
	}
	lan, err := netns.OfProcess(etcd.PID)
	if err != nil {
		return err
	}
	defer lan.Close()
	nl, err := lan.Netlink()
	if err != nil {
		return err
	}
	defer nl.Close()
	port := fmt.Sprintf("n%d", n.Index+1)
	l, err := nl.LinkByName(port)
	if err != nil {
		return fmt.Errorf("bridge port %s: %w", port, err)
	}
	if up {
		return nl.LinkSetUp(l)
	}
	return nl.LinkSetDown(l)
}

// heal sets the link up and starts again what does not run, and waits until all
// is as before.
func (d *keptDemo) heal(ctx context.Context, nodes []keptNode, w io.Writer) error {
	p := printer{w}
	if err := d.setLink(nodes[0], true); err != nil {
		return err
	}
	p.done("link", "%s is connected with the underlay", nodes[0].Name)
	for _, n := range nodes {
		_, err := d.process(n.Process)
		if err != nil {
			if err := d.restart(n); err != nil {
				return fmt.Errorf("%s: %w", n.Process, err)
			}
		}
		s, err := d.awaitNode(ctx, n)
		if err != nil {
			return fmt.Errorf("%s: %w", n.Process, err)
		}
		p.done(n.Process, "%s, pid %d, ready, %d peers", s.Lease.Subnet, s.PID, s.Peers[n.Framing])
	}
	return nil
}

// restart starts a node again and enters it in the record.
func (d *keptDemo) restart(n keptNode) error {
	ns, err := d.underlay(n)
	if err != nil {
		return err
	}
	defer ns.Close()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(d.path, n.Process+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(self, n.Args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = demoEnvironment(os.Environ())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := ns.Start(cmd); err != nil {
		return err
	}
	k, err := keep(&demoProcess{Name: n.Process, cmd: cmd})
	if err == nil {
		i := slices.IndexFunc(d.record.Processes, func(k kept) bool { return k.Name == n.Process })
		d.record.Processes[i] = k
		err = d.write()
	}
	if err != nil {
		// Nobody would ever end it.
		return errors.Join(err, cmd.Process.Kill())
	}
	return cmd.Process.Release()
}

// awaitNode waits until the node is ready, knows all the others, and has its
// containers back.
func (d *keptDemo) awaitNode(ctx context.Context, n keptNode) (node.Status, error) {
	others := -1
	for _, o := range d.record.Nodes {
		if o.Framing == n.Framing {
			others++
		}
	}
	api := n.client()
	defer api.Close()
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		s, err := api.Status(ctx)
		if err == nil && s.Ready && s.Peers[n.Framing] == others && (n.Container == "" || connectedAgain(s)) {
			return s, nil
		}
		if err != nil && ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return s, errors.Join(fmt.Errorf("not ready after %s; its log is %s", demoPatience, filepath.Join(d.path, n.Process+".log")), last)
		case <-tick.C:
		}
	}
}

func connectedAgain(s node.Status) bool {
	return len(s.Attachments) == 1 && s.Attachments[0].State == "up"
}

// kill ends a process that is no child of ours, and waits until it has gone.
func (k kept) kill() error {
	fd, err := unix.PidfdOpen(k.PID, 0)
	if err != nil {
		return fmt.Errorf("process %d (%s): %w", k.PID, k.Name, err)
	}
	defer unix.Close(fd)
	if !k.runs() { // with the descriptor open the pid cannot be reused any more
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return fmt.Errorf("process %d (%s): %w", k.PID, k.Name, err)
	}
	gone, err := pidfdWait(fd, demoStopTime)
	if err == nil && !gone {
		err = fmt.Errorf("process %d (%s): still there after SIGKILL", k.PID, k.Name)
	}
	return err
}
