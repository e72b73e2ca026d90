package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/encap"
)

func newDemoSSHCommand(o *demoOptions) *cobra.Command {
	var framing string
	cmd := &cobra.Command{
		Use:   "ssh NODE [-- COMMAND [ARG...]]",
		Short: "Run a shell or a command in a node of the kept demo",
		Long: `ssh runs a command, or a shell, in the network namespace of a node of the demo
that ` + "`tweed demo --keep`" + ` left running; where the nodes have containers, in the
container's. Its exit status is passed on.`,
		Example: `  tweed demo ssh n1
  tweed demo ssh n1 -- ping -c 3 10.77.41.0`,
		Args: func(cmd *cobra.Command, args []string) error {
			if dash := cmd.ArgsLenAtDash(); len(args) == 0 || dash == 0 || dash < 0 && len(args) > 1 || dash > 1 {
				return newUsageError(cmd, errors.New("expected a node such as n1, and a command after --"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return inKeptDemo(cmd, o.runDir, func(_ context.Context, d *keptDemo) error {
				nodes, err := d.nodes(args[0], framing)
				if err != nil {
					return err
				}
				return d.shell(nodes[0], args[1:])
			})
		},
	}
	completeFraming(cmd, &framing, "the node of this overlay (default: the first one)")
	return cmd
}

func completeFraming(cmd *cobra.Command, framing *string, usage string) {
	cmd.Flags().StringVar(framing, "backend", "", usage+": `framing` udp or vxlan")
	completeWords(cmd, "backend", "udp", "vxlan")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if *framing == "" {
			return nil
		}
		if _, err := encap.ParseFraming(*framing); err != nil {
			return newUsageError(cmd, fmt.Errorf("--backend %q: expected udp or vxlan", *framing))
		}
		return nil
	}
}

// shell runs a command in a node and passes its status on.
func (d *keptDemo) shell(n keptNode, argv []string) error {
	ns, err := d.place(n)
	if err != nil {
		return fmt.Errorf("demo ssh %s: %w", n.Name, err)
	}
	defer ns.Close()
	if len(argv) == 0 {
		argv = []string{os.Getenv("SHELL")}
		if argv[0] == "" {
			argv[0] = "/bin/sh"
		}
	}
	path, unfound, err := lookCommand(argv[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, "tweed: demo ssh:", err)
		return unfound
	}
	cmd := exec.Command(path, argv[1:]...)
	cmd.Args[0] = argv[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = demoEnvironment(os.Environ())
	// What the terminal sends the command gets as well.
	terminal, others := make(chan os.Signal, 1), make(chan os.Signal, 4)
	signal.Notify(terminal, unix.SIGINT, unix.SIGQUIT)
	signal.Notify(others, unix.SIGTERM, unix.SIGHUP)
	defer signal.Stop(terminal)
	if err := ns.Start(cmd); err != nil {
		return fmt.Errorf("demo ssh %s: %w", n.Name, err)
	}
	go func() {
		for s := range others {
			_ = cmd.Process.Signal(s) // it may have ended
		}
	}()
	err = cmd.Wait()
	signal.Stop(others)
	close(others)
	if err != nil && cmd.ProcessState == nil {
		return fmt.Errorf("demo ssh %s: %w", n.Name, err)
	}
	return statusOf(cmd)
}
