package main

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tweed/capture"
	"tweed/capture/filter"
	"tweed/engine"
	"tweed/engine/tap"
	"tweed/node"
)

// captureOptions are the flags of tweed capture.
type captureOptions struct {
	write, format string
	points        []string
	outer, drops  bool
	peers         []string
	reasons       []string
	flow          string
	snap          int
	packets       uint64
	stop, ring    captureLimits
	rotateSeconds int // -G
	rotateCount   int // -W
	rotateSize    int // -C, millions of bytes
	wireshark     string
	recorder      bool
	segments      bool
	supers        bool
	until         string
	before        int
}

const captureLong = `capture shows the packets of a running engine, inside and outside the tunnel, and
those it dropped with the reason. It needs no root, only the user the engine
runs as, and it never makes the engine wait: what does not fit is lost, and
counted to the packet.

Tap points, in the order a packet passes them:
  tun-in     read from the TUN device, leaving this node    } inner
  wire-out   sent to a peer                                 } outer
  wire-in    received from the underlay                     } outer
  tun-out    written to the TUN device                      } inner
  drop       given up, in either direction, with the reason
The default is inner. The engine does not see the outer IP and UDP headers: they
are made from the addresses. Inner and outer of one packet share a packet id.

FILTER is tcpdump's language (host net port proto tcp udp icmp, tcp[tcpflags],
len, and or not ...) and words of ours: peer NAME|IP, vni N, reason NAME,
point NAME, dir in|out. It looks at the packet as it is at its tap point; inner
or outer before a term chooses the other part: inner icmp, outer host 192.0.2.2.

Without -w, one decoded line a packet: time, tap point, direction (> out, < in),
peer, packet. With -w the file is pcapng, or pcap if its name says so: mode 0600,
one interface a tap point, nanoseconds, direction, frame.packet_id, drop reasons
as comments (frame.comment contains "drop:no-route"), losses and counters.

The host and the engine move TCP and UDP in super-packets of up to 64 KB. By default
each segment is a record, as on the wire. --super-packets has one record for
each super-packet, and the same packet id for it and its datagrams; the counters
count segments all the same, as the ledger does.

With --until FILTER nothing is written until a packet matches: then what led to it,
the flight recorder's packets first, if there is one, and the packet itself at
the end. FILTER... on its own still chooses which packets are kept.

-a and -b take the words of dumpcap, -G, -W and -C are tcpdump's.`

const captureExample = `  tweed capture icmp
  tweed capture --outer -w x.pcapng host 10.244.7.12
  tweed capture --drops -c 10
  tweed capture --reason spoofed-source -w forged.pcapng
  tweed capture --until 'reason no-route' -w why.pcapng
  tweed capture -b filesize:10000 -b files:5 -w ring.pcapng
  tweed capture --outer -w - | tcpdump -T vxlan -nr -
  tweed capture --outer --wireshark`

func newCaptureCommand() *cobra.Command {
	var c client
	var o captureOptions
	cmd := &cobra.Command{
		Use: "capture [flags] [FILTER...]", Short: "Show or record packets, inside and outside the tunnel, and why they were dropped",
		Long: captureLong, Example: captureExample, GroupID: groupLook, Args: cobra.ArbitraryArgs,
	}
	c.register(cmd)
	o.register(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return runCapture(cmd, &c, &o, strings.Join(args, " "))
	}
	return cmd
}

func (o *captureOptions) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.SetInterspersed(true)
	fs.StringVarP(&o.write, "write", "w", "", "write to `FILE`, or to standard output with -")
	fs.StringVar(&o.format, "format", "", "file `format`: pcapng or pcap (default: by the name of the file, else pcapng)")
	fs.StringSliceVar(&o.points, "point", nil, "tap `points`: tun-in, wire-out, wire-in, tun-out, drop, or inner, outer, all (default inner)")
	fs.BoolVar(&o.outer, "outer", false, "add wire-out and wire-in")
	fs.BoolVar(&o.drops, "drops", false, "add drop")
	fs.StringSliceVar(&o.peers, "peer", nil, "only packets to and from this `node`: its name, id, address or subnet")
	fs.StringSliceVar(&o.reasons, "reason", nil, "only packets dropped for this `reason`, such as no-route")
	fs.StringVar(&o.flow, "flow", "", "only this conversation inside the tunnel: `HOST[:PORT],HOST[:PORT]`")
	fs.Uint64VarP(&o.packets, "count", "c", 0, "stop after `N` packets")
	fs.IntVarP(&o.snap, "snapshot-length", "s", 0, "keep `BYTES` of each packet (default and 0: 262144)")
	fs.VarP(&o.stop, "autostop", "a", "stop at a `limit`: duration:SECONDS, filesize:KB, packets:N, files:N (repeatable)")
	fs.VarP(&o.ring, "ring-buffer", "b", "begin the next file at a `limit`: duration:SECONDS, filesize:KB, packets:N; keep the last files:N (repeatable)")
	fs.IntVarP(&o.rotateSeconds, "rotate-seconds", "G", 0, "begin the next file every `SECONDS`, its name from strftime")
	fs.IntVarP(&o.rotateSize, "file-size", "C", 0, "begin the next file after `MILLIONS` of bytes")
	fs.IntVarP(&o.rotateCount, "file-count", "W", 0, "with -C, write over `N` files in turn; with -G, stop after N files")
	fs.BoolVar(&o.segments, "segments", false, "one record a segment of a super-packet (the default)")
	fs.BoolVar(&o.supers, "super-packets", false, "one record a super-packet at the inner points, with the length it had")
	fs.BoolVar(&o.recorder, "recorder", false, "show what the flight recorder of the engine holds (tweed up --flight-recorder N)")
	fs.StringVar(&o.until, "until", "", "capture until a packet matches this `filter`, such as 'reason no-route', then show what led to it and end; --point all is the default")
	fs.IntVar(&o.before, "before", 1000, "with --until, how many `packets` before that one to keep, and as many dropped ones")
	fs.StringVar(&o.wireshark, "wireshark", "", "show the packets live in Wireshark, or in another `PROGRAM` that takes its flags")
	fs.Lookup("wireshark").NoOptDefVal = "wireshark"
	completeWords(cmd, "format", formatPcapng, formatPcap)
	completeWords(cmd, "point", append(namesOf(tap.AllPoints), "inner", "outer", "all")...)
	completeWords(cmd, "reason", capture.ReasonNames()...)
}

// request turns flags into what the engine is asked for.
func (o *captureOptions) request(expression string) (node.CaptureRequest, error) {
	r := node.CaptureRequest{Snap: o.snap, Peers: o.peers, Reasons: o.reasons}
	points, err := parsePoints(o.points)
	if err != nil {
		return r, err
	}
	switch {
	case points != 0:
	case o.until != "":
		points = tap.AllPoints
	case len(o.reasons) == 0:
		points = pointGroups["inner"]
	}
	if o.outer {
		points |= pointGroups["outer"]
	}
	if o.drops || len(o.reasons) > 0 {
		points |= tap.Of(tap.Drop)
	}
	if o.recorder {
		return node.CaptureRequest{Recorder: true}, nil
	}
	r.Points, r.Until, r.Before, r.SuperPackets = namesOf(points), o.until, o.before, o.supers
	if o.snap < 0 || o.snap > capture.MaxSnap {
		return r, fmt.Errorf("-s %d: expected 1 to %d bytes, or 0 for all", o.snap, capture.MaxSnap)
	}
	for _, name := range o.reasons {
		if _, err := engine.ParseReason(name); err != nil {
			return r, fmt.Errorf("--reason %q: expected one of %s", name, strings.Join(capture.ReasonNames(), ", "))
		}
	}
	if strings.TrimSpace(expression) != "" {
		r.Filters = append(r.Filters, expression)
	}
	if o.flow != "" {
		text, err := flowFilter(o.flow)
		if err != nil {
			return r, err
		}
		r.Filters = append(r.Filters, text)
	}
	return r, nil
}

// plan checks the flags about files.
func (o *captureOptions) plan(fs *pflag.FlagSet) (filePlan, error) {
	p := filePlan{path: o.write, format: o.format, next: o.ring, stopFiles: o.stop.files}
	tcpdumps := o.rotateSeconds != 0 || o.rotateSize != 0 || o.rotateCount != 0
	dumpcaps := fs.Changed("ring-buffer")
	switch p.format {
	case "":
		p.format = formatPcapng
		if ext := filepath.Ext(o.write); ext == ".pcap" || ext == ".cap" {
			p.format = formatPcap
		}
	case formatPcap, formatPcapng:
	default:
		return p, fmt.Errorf("--format %q: expected pcapng or pcap", o.format)
	}
	switch {
	case o.write == "" && (tcpdumps || dumpcaps || o.format != "" && o.wireshark == "" || o.stop.filesize > 0 || o.stop.files > 0):
		return p, errors.New("-a filesize, -a files, -b, -C, -G, -W and --format are about files: expected -w FILE")
	case o.write == "-" && (tcpdumps || dumpcaps || o.stop.files > 0):
		return p, errors.New("-w -: standard output is one stream: -a files, -b, -C, -G and -W need -w FILE")
	case tcpdumps && dumpcaps:
		return p, errors.New("-b and -C, -G, -W are two ways to the same thing: expected one of them")
	case o.rotateSeconds < 0 || o.rotateSize < 0 || o.rotateCount < 0:
		return p, errors.New("-C, -G and -W: expected numbers above 0")
	case o.rotateCount > 0 && o.rotateSeconds == 0 && o.rotateSize == 0:
		return p, errors.New("-W: expected -C or -G with it")
	case dumpcaps && o.ring.duration == 0 && o.ring.filesize == 0 && o.ring.packets == 0 && o.stop.filesize == 0:
		return p, errors.New("-b files: expected when to begin the next file as well: -b filesize:KB, -b duration:SECONDS or -b packets:N")
	case o.stop.files > 0 && !dumpcaps:
		return p, errors.New("-a files: expected -b with it, which says when to begin the next file")
	}
	if tcpdumps {
		p.naming = tcpdumpRing
		p.next = captureLimits{duration: time.Duration(o.rotateSeconds) * time.Second, filesize: int64(o.rotateSize) * 1_000_000}
		if o.rotateSize > 0 {
			p.wrap = o.rotateCount
		} else {
			p.stopFiles = o.rotateCount
		}
	}
	if dumpcaps {
		p.naming = dumpcapRing
		// With several files -a filesize means the size of each, as dumpcap has it.
		if p.next.filesize == 0 {
			p.next.filesize = o.stop.filesize
		}
	}
	return p, nil
}

// check refuses what makes no sense together.
func (o *captureOptions) check(fs *pflag.FlagSet) error {
	given := fs.Changed("until")
	switch {
	case given && strings.TrimSpace(o.until) == "":
		return errors.New("--until: expected a filter, such as 'reason no-route'")
	case o.segments && o.supers:
		return errors.New("--segments and --super-packets: expected one of them")
	case o.supers && o.recorder:
		return errors.New("--super-packets: the flight recorder has segments only")
	case given && o.recorder:
		return errors.New("--recorder and --until: expected one of them: --until begins with what the recorder holds")
	case !given && fs.Changed("before"):
		return errors.New("--before: expected --until with it")
	case o.before < 1 || o.before > maxBefore:
		return fmt.Errorf("--before %d: expected 1 to %d packets", o.before, maxBefore)
	}
	return nil
}

// maxBefore is the engine's limit.
const maxBefore = 100_000

func runCapture(cmd *cobra.Command, c *client, o *captureOptions, expression string) error {
	if o.wireshark != "" && o.write != "" {
		return newUsageError(cmd, errors.New("--wireshark and -w: expected one of them"))
	}
	if o.recorder && (strings.TrimSpace(expression) != "" || len(o.points)+len(o.peers)+len(o.reasons)+o.snap > 0 || o.flow != "") {
		return newUsageError(cmd, errors.New("--recorder: it has recorded already, all points and 128 bytes: choose from the file, with tshark -Y"))
	}
	if err := o.check(cmd.Flags()); err != nil {
		return newUsageError(cmd, err)
	}
	req, err := o.request(expression)
	if err != nil {
		return newUsageError(cmd, err)
	}
	plan, err := o.plan(cmd.Flags())
	if err != nil {
		return newUsageError(cmd, err)
	}
	if o.write == "-" && isTerminal(cmd.OutOrStdout()) {
		return newUsageError(cmd, errors.New("-w -: standard output is a terminal: expected a pipe or a file"))
	}
	api, err := c.dial()
	if err != nil {
		return err
	}
	defer api.Close()
	signals, release := catchSignals()
	defer release()
	run := &captureRun{req: req, stop: o.stop, signals: signals}
	if o.packets > 0 && (run.stop.packets == 0 || o.packets < run.stop.packets) {
		run.stop.packets = o.packets
	}
	if plan.naming == dumpcapRing {
		run.stop.filesize = 0
	}
	stderr := cmd.ErrOrStderr()
	out := cmd.OutOrStdout()
	run.started = func(h *capture.Hello) {
		fmt.Fprintf(stderr, "capturing on %s of %s, link-type IPV4, snapshot length %d bytes\n", strings.Join(h.Points, ", "), h.Node, h.Snap)
	}
	run.open = func(h *capture.Hello) (packetSink, error) {
		return newPacketPrinter(out, h, c.format == "json", wantsColour(out)), nil
	}
	switch {
	case o.wireshark != "":
		return captureLive(cmd.Context(), o.wireshark, run, api, plan, stderr)
	case o.write != "":
		plan.out = out
		run.open = func(h *capture.Hello) (packetSink, error) {
			f, err := newCaptureFiles(plan, *h)
			if err != nil {
				return nil, err
			}
			return f, nil
		}
	}
	stats, err := run.run(cmd.Context(), api)
	if run.sink != nil {
		run.printSummary(stderr, &stats)
		if err == nil && o.until != "" && !stats.Until {
			fmt.Fprintf(stderr, "no packet matched --until '%s'\n", o.until)
			if !run.told {
				err = exitStatus(exitFailed) // a limit ended it, not its user
			}
		}
		if f, ok := run.sink.(*captureFiles); ok && err == nil && o.write != "-" && run.taken > 0 {
			fmt.Fprintln(stderr, "look at it:", viewCommand(f))
		}
	}
	return captureUsage(cmd, err, o.until, stderr)
}

// captureUsage makes a wrong filter a usage error, with the place underlined
// for a person.
func captureUsage(cmd *cobra.Command, err error, until string, stderr io.Writer) error {
	var bad *filter.Error
	if !errors.As(err, &bad) {
		return err
	}
	if isTerminal(stderr) {
		fmt.Fprintln(stderr, bad.Caret())
	}
	if until != "" && bad.Expr == until {
		return newUsageError(cmd, fmt.Errorf("--until: %w", bad))
	}
	return newUsageError(cmd, bad)
}

// viewCommand is what to type to see a file right: the ports of an overlay are
// not those the tools know.
func viewCommand(f *captureFiles) string {
	name := f.name
	if strings.ContainsAny(name, " '\"\\$&;()*?") {
		name = "'" + strings.ReplaceAll(name, "'", `'\''`) + "'"
	}
	return strings.Join(slices.Concat([]string{"tshark", "-r", name}, decodeAs(&f.hello)), " ")
}
