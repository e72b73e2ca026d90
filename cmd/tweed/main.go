// Command tweed runs and inspects a userspace overlay network. It is thin:
// every subcommand parses, makes one call and prints.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"tweed/attach"
	"tweed/cmd/internal/daemon"
)

// Exit statuses, the same for every subcommand.
const (
	exitGood   = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	switch {
	case attach.IsHelper():
		os.Exit(attach.HelperMain())
	case len(os.Args) > 1 && os.Args[1] == runInit:
		os.Exit(becomeCommand(os.Args[2:]))
	case len(os.Args) == 3 && os.Args[1] == sweeperArg:
		os.Exit(sweepAfterDemo(os.Args[2]))
	case len(os.Args) == 2 && os.Args[1] == holdArg:
		os.Exit(hold())
	case len(os.Args) == 2 && os.Args[1] == probeArg:
		os.Exit(probeUserNamespace())
	}
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// run executes one command line and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRootCommand(stdout, stderr)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitGood
	}
	var status exitStatus
	if errors.As(err, &status) {
		return int(status)
	}
	err = asUsageError(cmd, err)
	fmt.Fprintln(stderr, "tweed:", daemon.ErrorLine(err))
	var usage *usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

// Command groups, in the order the help shows them.
const (
	groupRun    = "run"
	groupAttach = "attach"
	groupLook   = "look"
	groupEtcd   = "etcd"
)

// commands make the subcommands. Each returns a fresh command, so that a test
// can run many command lines in one process.
var commands = []func() *cobra.Command{
	newUpCommand,
	newDemoCommand,
	newRunCommand,
	newAttachCommand,
	newPsCommand,
	newDetachCommand,
	newProxyCommand,
	newStatusCommand,
	newPeersCommand,
	newRoutesCommand,
	newRouteCommand,
	newLeasesCommand,
	newCaptureCommand,
	newReplayCommand,
	newDoctorCommand,
	newBugreportCommand,
	newExtcapCommand,
	newEtcdCommand,
	newNetworkCommand,
	newVersionCommand,
}

func newRootCommand(stdout, stderr io.Writer) *cobra.Command {
	root := &cobra.Command{
		Use:   "tweed",
		Short: "A userspace overlay network that speaks flannel",
		Long: `tweed connects the containers of several hosts over UDP or VXLAN, from the
leases a flannel cluster keeps in etcd, without flannel's kernel needs.

Every flag can be given as an environment variable: --etcd-endpoints is
TWEED_ETCD_ENDPOINTS. The command line wins over the environment.

Exit status: 0 good, 1 failed, 2 wrong usage.`,
		Version:       daemon.Version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		// The error for an unknown command is made in asUsageError, on one line.
		DisableSuggestions:         true,
		SuggestionsMinimumDistance: 2,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return setFromEnv(cmd.Flags(), os.LookupEnv)
		},
	}
	// The completion command takes its output over when it is made.
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetVersionTemplate("tweed {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return newUsageError(cmd, explainFlagError(cmd, err))
	})
	root.AddGroup(
		&cobra.Group{ID: groupRun, Title: "Run a node:"},
		&cobra.Group{ID: groupAttach, Title: "Connect containers, without privileges:"},
		&cobra.Group{ID: groupLook, Title: "Look into a running node:"},
		&cobra.Group{ID: groupEtcd, Title: "Keep the network in etcd:"},
	)
	for _, newCommand := range commands {
		root.AddCommand(newCommand())
	}
	root.SetHelpCommand(newHelpCommand())
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			group(c)
		}
	}
	return root
}
