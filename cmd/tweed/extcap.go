package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"tweed/capture"
	"tweed/capture/filter"
	"tweed/cmd/internal/daemon"
	"tweed/engine/tap"
	"tweed/node"
)

// extcapOptions are what Wireshark calls an extcap program with, as its manual
// page extcap(4) has it.
type extcapOptions struct {
	interfaces, dlts, config, capture bool
	version, iface, filter, fifo      string
	controlIn, controlOut             string
	points, peers, reasons            []string
	snap                              int
	socket                            string
}

// extcapGroups are the interfaces every engine has.
var extcapGroups = []struct {
	name, display string
	points        tap.Points
}{
	{"inner", "packets of the overlay", pointGroups["inner"]},
	{"outer", "packets inside and outside the tunnel", pointGroups["inner"] | pointGroups["outer"]},
	{"drops", "dropped packets, with the reason", tap.Of(tap.Drop)},
	{"all", "every packet at every point", tap.AllPoints},
}

const extcapLong = `extcap lets Wireshark and tshark capture from running engines as from any other
interface: after tweed extcap install, they list tweed0-inner, tweed0-outer,
tweed0-drops and tweed0-all for an engine with the device tweed0, and take
tweed's filters (man pcap-filter, and peer, reason, vni, point, dir).

Wireshark calls this command with the flags below; nobody else has to.`

func newExtcapCommand() *cobra.Command {
	var o extcapOptions
	cmd := &cobra.Command{
		Use: "extcap", Short: "Be a capture source of Wireshark and tshark", Long: extcapLong, GroupID: groupLook, Args: noArgs,
		Example: "  tweed extcap install\n  tshark -i tweed0-inner -f icmp",
		RunE:    func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	// Versions to come call with flags this one does not know.
	cmd.FParseErrWhitelist.UnknownFlags = true
	fs := cmd.Flags()
	fs.BoolVar(&o.interfaces, "extcap-interfaces", false, "list the interfaces")
	fs.StringVar(&o.version, "extcap-version", "", "`version` of the caller")
	fs.BoolVar(&o.dlts, "extcap-dlts", false, "list the link types")
	fs.BoolVar(&o.config, "extcap-config", false, "list the options")
	fs.StringVar(&o.iface, "extcap-interface", "", "`interface` that is meant")
	fs.StringVar(&o.filter, "extcap-capture-filter", "", "capture `filter`; without --capture, say what is wrong with it")
	fs.BoolVar(&o.capture, "capture", false, "capture")
	fs.StringVar(&o.fifo, "fifo", "", "`file` to write pcapng to")
	fs.StringVar(&o.controlIn, "extcap-control-in", "", "not used")
	fs.StringVar(&o.controlOut, "extcap-control-out", "", "not used")
	fs.StringSliceVar(&o.points, "points", nil, "tap `points` instead of the interface's")
	fs.StringSliceVar(&o.peers, "peer", nil, "only packets to and from this `node`")
	fs.StringSliceVar(&o.reasons, "reason", nil, "only packets dropped for this `reason`")
	fs.IntVar(&o.snap, "snaplen", 0, "keep `BYTES` of each packet")
	fs.StringVar(&o.socket, "socket", "", "`path` of the engine's API socket")
	cmd.AddCommand(newExtcapInstallCommand())
	return cmd
}

func (o *extcapOptions) run(cmd *cobra.Command) error {
	w := cmd.OutOrStdout()
	switch {
	case o.interfaces:
		o.list(cmd.Context(), w)
	case o.dlts:
		fmt.Fprintln(w, "dlt {number=228}{name=IPV4}{display=IPv4}")
	case o.config:
		o.options(w)
	case o.capture:
		return o.record(cmd.Context())
	case o.filter != "":
		// Silence means that the filter is right.
		if err := checkFilter(o.filter); err != nil {
			fmt.Fprintln(w, err)
		}
	default:
		return newUsageError(cmd, errors.New("expected to be called by Wireshark; type: tweed extcap install"))
	}
	return nil
}

// extcapEngine is an engine whose socket this user may use.
type extcapEngine struct{ socket, name, node string }

func (o *extcapOptions) engines(ctx context.Context) []extcapEngine {
	sockets := node.FindSockets()
	if o.socket != "" {
		sockets = []string{o.socket}
	}
	var out []extcapEngine
	for _, socket := range sockets {
		api := node.Dial(socket)
		s, err := api.Status(ctx)
		api.Close()
		if err != nil {
			continue // on its way out, or not ours
		}
		e := extcapEngine{socket: socket, name: s.Device.Name, node: s.Node.Name}
		if e.name == "" {
			e.name = "tweed"
		}
		if slices.ContainsFunc(out, func(x extcapEngine) bool { return x.name == e.name }) {
			e.name += "." + e.node
		}
		out = append(out, e)
	}
	return out
}

func (o *extcapOptions) list(ctx context.Context, w io.Writer) {
	fmt.Fprintf(w, "extcap {version=%s}{display=tweed overlay}\n", extcapText(daemon.Version()))
	for _, e := range o.engines(ctx) {
		for _, g := range extcapGroups {
			fmt.Fprintf(w, "interface {value=%s-%s}{display=%s}\n", e.name, g.name, extcapText(fmt.Sprintf("%s on %s: %s", e.name, e.node, g.display)))
		}
	}
}

// extcapText takes out of a text what the protocol uses itself.
func extcapText(s string) string {
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune("{}=\n", r) {
			return ' '
		}
		return r
	}, s)
}

func (o *extcapOptions) options(w io.Writer) {
	fmt.Fprintln(w, "arg {number=0}{call=--points}{display=Tap points}{type=multicheck}{tooltip=Where to look}")
	_, group := splitInterface(o.iface)
	for _, name := range namesOf(tap.AllPoints) {
		p, _ := tap.ParsePoint(name) // it is one
		fmt.Fprintf(w, "value {arg=0}{value=%s}{display=%s}{default=%t}{enabled=true}\n", name, name, group.Has(p))
	}
	fmt.Fprintln(w, "arg {number=1}{call=--snaplen}{display=Snapshot length}{type=integer}{range=0,262144}{default=0}{tooltip=Bytes to keep of each packet, 0 for all}")
	fmt.Fprintln(w, "arg {number=2}{call=--peer}{display=Peer}{type=string}{tooltip=Only packets to and from this node}")
	fmt.Fprintln(w, "arg {number=3}{call=--reason}{display=Drop reason}{type=string}{tooltip=Only packets dropped for this reason}")
}

// splitInterface returns the engine's name and the tap points of an interface.
func splitInterface(name string) (engine string, points tap.Points) {
	for _, g := range extcapGroups {
		if base, found := strings.CutSuffix(name, "-"+g.name); found {
			return base, g.points
		}
	}
	return "", 0
}

// checkFilter compiles a filter without an engine: any name may be a peer's.
func checkFilter(text string) error {
	_, err := filter.Compile(text, filter.Options{
		Points: capture.PointNames(), Reasons: capture.ReasonNames(),
		Peers: func(string) ([]netip.Addr, error) { return []netip.Addr{netip.IPv4Unspecified()}, nil },
	})
	return err
}

// record captures into Wireshark's pipe.
func (o *extcapOptions) record(ctx context.Context) error {
	name, points := splitInterface(o.iface)
	engines := o.engines(ctx)
	i := slices.IndexFunc(engines, func(e extcapEngine) bool { return e.name == name })
	switch {
	case points == 0:
		return fmt.Errorf("extcap: interface %q: expected a name from --extcap-interfaces, such as tweed0-inner", o.iface)
	case i < 0:
		return fmt.Errorf("extcap: interface %s: no engine %s runs here, or it is another user's", o.iface, name)
	case o.fifo == "":
		return errors.New("extcap: --capture: expected --fifo FILE")
	}
	if len(o.points) > 0 {
		var err error
		if points, err = parsePoints(o.points); err != nil {
			return fmt.Errorf("extcap: %w", err)
		}
	}
	signals, release := catchSignals()
	defer release()
	out, err := os.OpenFile(o.fifo, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("extcap: %w", err)
	}
	defer out.Close()
	run := &captureRun{
		req:     node.CaptureRequest{Points: namesOf(points), Snap: o.snap, Peers: o.peers, Reasons: o.reasons},
		signals: signals, started: func(*capture.Hello) {},
		open: func(h *capture.Hello) (packetSink, error) {
			f, err := newCaptureFiles(filePlan{path: "-", out: out, format: formatPcapng}, *h)
			if err != nil {
				return nil, err
			}
			return f, nil
		},
	}
	if strings.TrimSpace(o.filter) != "" {
		run.req.Filters = []string{o.filter}
	}
	api := node.Dial(engines[i].socket)
	defer api.Close()
	if _, err := run.run(ctx, api); err != nil && !errors.Is(err, errClosedPipe) {
		return err
	}
	return nil
}

const extcapScript = "tweed"

func newExtcapInstallCommand() *cobra.Command {
	var dir string
	var remove bool
	cmd := &cobra.Command{
		Use: "install", Short: "Put tweed where Wireshark looks for capture sources", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				var err error
				if dir, err = extcapDir(); err != nil {
					return err
				}
			}
			path := filepath.Join(dir, extcapScript)
			if remove {
				if err := os.Remove(path); err != nil {
					return fmt.Errorf("extcap: %w", err)
				}
				fmt.Fprintln(cmd.OutOrStdout(), "removed", path)
				return nil
			}
			self, err := os.Executable()
			if err != nil {
				return fmt.Errorf("extcap: %w", err)
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return fmt.Errorf("extcap: %w", err)
			}
			script := "#!/bin/sh\nexec '" + strings.ReplaceAll(self, "'", `'\''`) + "' extcap \"$@\"\n"
			if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
				return fmt.Errorf("extcap: %w", err)
			}
			// WriteFile leaves the mode of a file that was there.
			if err := os.Chmod(path, 0o755); err != nil {
				return fmt.Errorf("extcap: %w", err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "installed %s\nlist the interfaces: tshark -D\n", path)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "`directory` to put it into (default: what tshark -G folders says)")
	cmd.Flags().BoolVar(&remove, "remove", false, "remove it again")
	if err := cmd.MarkFlagDirname("dir"); err != nil {
		panic(err)
	}
	return cmd
}

// extcapDir is the user's own folder for capture sources.
func extcapDir() (string, error) {
	if out, err := exec.Command("tshark", "-G", "folders").Output(); err == nil {
		for line := range strings.Lines(string(out)) {
			if dir, found := strings.CutPrefix(line, "Personal Extcap path:"); found && strings.TrimSpace(dir) != "" {
				return strings.TrimSpace(dir), nil
			}
		}
	}
	home, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("extcap: %w; name the directory with --dir", err)
	}
	return filepath.Join(home, "wireshark", "extcap"), nil
}
