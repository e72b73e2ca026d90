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
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/attach"
	"tweed/cmd/internal/daemon"
	"tweed/encap"
	"tweed/engine/impair"
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
	// impair is what the nodes do to the packets they send; the n-th node's seed is
	// n more.
	impair impair.Spec
	// mtu is the underlay's, in bytes.
	mtu int
	// tier is how the nodes are connected; passed are the better ones, with what
	// was wrong with them.
	tier   attach.Tier
	passed []attach.Verdict
	// runDir is the folder that holds the folder of each demo.
	runDir string
}

func newDemoCommand() *cobra.Command {
	var o demoOptions
	var f demoFlags
	cmd := &cobra.Command{
		Use:     "demo",
		Short:   "Show a whole overlay on this machine, in network namespaces",
		GroupID: groupRun,
		Long: `demo builds an underlay and two or more nodes in network namespaces, starts an
etcd and a node in each, and pings and transfers across the overlay. It needs
nothing installed; without root it works in a user namespace, and where
/dev/net/tun cannot be used each node has a container with a veth pair instead.
Where user namespaces are forbidden the nodes are part of the program.
Everything is removed at the end, also after an error, Ctrl-C or kill -9.

--loss, --reorder and --delay are done by the nodes themselves to every packet they
send into the overlay. The same --seed treats the same packets alike, and what was
lost stands in the ledger as impaired.`,
		Example: `  tweed demo
  tweed demo --nodes 4 --backend vxlan
  tweed demo --loss 5% --delay 20ms --seed 7
  tweed demo --keep
  tweed demo ssh n1 -- ip addr
  tweed demo break n2 --kill && tweed demo heal n2
  tweed demo down`,
		Args: demoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			want, err := f.complete(&o)
			if err != nil {
				return newUsageError(cmd, err)
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
	f.register(cmd, &o)
	down := &cobra.Command{
		Use:   "down",
		Short: "Remove what `tweed demo --keep` left running",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demoDown(cmd.Context(), o.runDir, cmd.OutOrStdout())
		},
	}
	children := []*cobra.Command{down, newDemoSSHCommand(&o), newDemoBenchCommand(&o), newDemoBreakCommand(&o), newDemoHealCommand(&o)}
	for _, c := range append(children, cmd) {
		c.Flags().StringVar(&o.runDir, "run-dir", defaultDemoDir(), "`directory` for the demo's files")
	}
	cmd.SuggestionsMinimumDistance = 2
	cmd.AddCommand(children...)
	return cmd
}

// demoFlags are the flags that have to be understood first.
type demoFlags struct {
	backend, tier, loss, reorder string
	delay                        time.Duration
	seed                         uint64
}

func (f *demoFlags) register(cmd *cobra.Command, o *demoOptions) {
	fs := cmd.Flags()
	fs.IntVar(&o.nodes, "nodes", 2, "`number` of nodes, 2 to 16")
	fs.StringVar(&f.backend, "backend", "both", "`framing` of the overlay: udp, vxlan or both, one beside the other")
	fs.BoolVar(&o.keep, "keep", false, "leave it running until tweed demo down")
	fs.StringVar(&f.tier, "tier", "auto", "force a `tier`: tun, veth or netstack (default: the best that works)")
	fs.StringVar(&f.loss, "loss", "0%", "lose this `share` of the packets, up to 50%")
	fs.StringVar(&f.reorder, "reorder", "0%", "let this `share` of the packets be overtaken")
	fs.DurationVar(&f.delay, "delay", 0, "delay every packet by this `time`, up to 500ms")
	fs.Uint64Var(&f.seed, "seed", 1, "`number` that chooses the packets to lose and to reorder")
	fs.IntVar(&o.mtu, "mtu", defaultDemoMTU, "MTU of the underlay in `bytes`")
	completeWords(cmd, "tier", "auto", "tun", "veth", "netstack")
	completeWords(cmd, "backend", "udp", "vxlan", "both")
}

// complete fills in the options, but for the tier, and says which was asked for.
func (f *demoFlags) complete(o *demoOptions) (want attach.Tier, err error) {
	if o.nodes < minDemoNodes || o.nodes > maxDemoNodes {
		return "", fmt.Errorf("--nodes %d: expected %d to %d", o.nodes, minDemoNodes, maxDemoNodes)
	}
	if o.framings, err = demoFramings(f.backend); err != nil {
		return "", err
	}
	if want, err = attach.ParseTier(f.tier); err != nil {
		return "", fmt.Errorf("--tier %q: expected auto, tun, veth or netstack", f.tier)
	}
	if o.impair, err = demoImpairments(f.loss, f.reorder, f.delay, f.seed); err != nil {
		return "", err
	}
	least := 0
	for _, framing := range o.framings {
		least = max(least, encap.MinMTU+framing.Overhead())
	}
	if o.mtu < least || o.mtu > maxDemoMTU {
		return "", fmt.Errorf("--mtu %d: expected %d to %d bytes", o.mtu, least, maxDemoMTU)
	}
	return want, nil
}

// Bounds of the impairments: the demo's own traffic has to get through.
const (
	maxDemoLoss    = 0.5
	maxDemoDelay   = 500 * time.Millisecond
	maxDemoMTU     = 9216
	defaultDemoMTU = 1500
)

func demoImpairments(loss, reorder string, delay time.Duration, seed uint64) (impair.Spec, error) {
	s := impair.Spec{Delay: delay, Seed: seed}
	var err error
	if s.Loss, err = impair.ParseProbability(loss); err != nil {
		return s, fmt.Errorf("--loss %w", err)
	}
	if s.Loss > maxDemoLoss {
		return s, fmt.Errorf("--loss %q: expected at most 50%%, or the demo's own traffic does not get through", loss)
	}
	if s.Reorder, err = impair.ParseProbability(reorder); err != nil {
		return s, fmt.Errorf("--reorder %w", err)
	}
	if delay < 0 || delay > maxDemoDelay {
		return s, fmt.Errorf("--delay %s: expected 0s to %s", delay, maxDemoDelay)
	}
	return s, nil
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
