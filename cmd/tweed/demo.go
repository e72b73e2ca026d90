package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/attach"
	"tweed/cmd/internal/daemon"
	"tweed/encap"
	"tweed/netns"
)

const (
	minDemoNodes = 2
	maxDemoNodes = 16
)

// demoOptions are what the command line says about a demo.
type demoOptions struct {
	nodes    int
	framings []encap.Framing
	keep     bool
	// tier is how the nodes are connected; passed are the better ones, with what
	// was wrong with them.
	tier   attach.Tier
	passed []attach.Verdict
	// runDir is the folder that holds the folder of each demo.
	runDir string
}

func newDemoCommand() *cobra.Command {
	var o demoOptions
	var backend, tier string
	cmd := &cobra.Command{
		Use:     "demo",
		Short:   "Show a whole overlay on this machine, in network namespaces",
		GroupID: groupRun,
		Long: `demo builds an underlay and two or more nodes in network namespaces, starts an
etcd and a node in each, and pings and transfers across the overlay. It needs
nothing installed; without root it works in a user namespace, and where
/dev/net/tun cannot be used each node has a container with a veth pair instead.
Where user namespaces are forbidden the nodes are part of the program.
Everything is removed at the end, also after an error or Ctrl-C.`,
		Example: `  tweed demo
  tweed demo --nodes 4 --backend vxlan
  tweed demo --keep && tweed demo down`,
		Args: demoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.nodes < minDemoNodes || o.nodes > maxDemoNodes {
				return newUsageError(cmd, fmt.Errorf("--nodes %d: expected %d to %d", o.nodes, minDemoNodes, maxDemoNodes))
			}
			var err error
			if o.framings, err = demoFramings(backend); err != nil {
				return newUsageError(cmd, err)
			}
			want, err := attach.ParseTier(tier)
			if err != nil {
				return newUsageError(cmd, fmt.Errorf("--tier %q: expected auto, tun, veth or netstack", tier))
			}
			why := "asked for with --tier netstack"
			if want == attach.TierAuto {
				if err := checkUserNamespace(); err != nil {
					want, why = attach.TierNetstack, daemon.ErrorLine(err)
				}
			}
			if want == attach.TierNetstack {
				ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
				defer stop()
				return runNetstackDemo(ctx, o, why, cmd.OutOrStdout())
			}
			return inDemoNamespace(cmd, func(ctx context.Context) error {
				if o.tier, o.passed, err = chooseDemoTier(want); err != nil {
					return err
				}
				return runDemo(ctx, o, cmd.OutOrStdout(), cmd.ErrOrStderr())
			})
		},
	}
	fs := cmd.Flags()
	fs.IntVar(&o.nodes, "nodes", 2, "`number` of nodes, 2 to 16")
	fs.StringVar(&backend, "backend", "both", "`framing` of the overlay: udp, vxlan or both, one beside the other")
	fs.BoolVar(&o.keep, "keep", false, "leave it running until `tweed demo down`")
	fs.StringVar(&tier, "tier", "auto", "force a `tier`: tun, veth or netstack (default: the best that works)")
	completeWords(cmd, "tier", "auto", "tun", "veth", "netstack")
	completeWords(cmd, "backend", "udp", "vxlan", "both")
	down := &cobra.Command{
		Use:   "down",
		Short: "Remove what `tweed demo --keep` left running",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demoDown(cmd.Context(), o.runDir, cmd.OutOrStdout())
		},
	}
	for _, c := range []*cobra.Command{cmd, down} {
		c.Flags().StringVar(&o.runDir, "run-dir", defaultDemoDir(), "`directory` for the demo's files")
	}
	cmd.SuggestionsMinimumDistance = 2
	cmd.AddCommand(down)
	return cmd
}

// demoArgs refuses arguments; a word after "demo" was meant as a subcommand.
func demoArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return newUsageError(cmd, unknownCommand(cmd, args[0]))
}

func demoFramings(backend string) ([]encap.Framing, error) {
	if backend == "both" {
		return []encap.Framing{encap.FramingUDP, encap.FramingVXLAN}, nil
	}
	f, err := encap.ParseFraming(backend)
	if err != nil {
		return nil, fmt.Errorf("--backend %q: expected udp, vxlan or both", backend)
	}
	return []encap.Framing{f}, nil
}

// inDemoNamespace calls f where it may make network namespaces: here, or in a
// second run of this program inside a user namespace, whose exit status this
// one then takes over.
func inDemoNamespace(cmd *cobra.Command, f func(context.Context) error) error {
	done, status, err := netns.Elevate()
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	if done {
		os.Exit(status)
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	err = f(ctx)
	if ctx.Err() != nil && err != nil {
		return errors.New("demo: interrupted; everything was removed")
	}
	return err
}

// selfName is how the user called this program, to be shown in what to type.
func selfName() string {
	exe, err := os.Executable()
	if err == nil && strings.Contains(exe, "/go-build") {
		return "go run ./cmd/tweed"
	}
	if strings.Contains(os.Args[0], "/") {
		return os.Args[0]
	}
	return filepath.Base(os.Args[0])
}

// printer writes the demo's progress: one line for each thing that works now.
type printer struct{ w io.Writer }

func (p printer) done(what, format string, args ...any) {
	fmt.Fprintf(p.w, "✓ %-16s %s\n", what, fmt.Sprintf(format, args...))
}

// block prints what f writes, indented under the last line.
func (p printer) block(f func(io.Writer)) {
	var b strings.Builder
	f(&b)
	for line := range strings.Lines(b.String()) {
		fmt.Fprint(p.w, "    ", line)
	}
}

func (p printer) blank() { fmt.Fprintln(p.w) }

// next prints what the user can type now.
func (p printer) next(lines [][2]string) {
	head := "Next:"
	wide := 0
	for _, l := range lines {
		wide = max(wide, len(l[0]))
	}
	for _, l := range lines {
		fmt.Fprintf(p.w, "%-6s%-*s  # %s\n", head, wide, l[0], l[1])
		head = ""
	}
}
