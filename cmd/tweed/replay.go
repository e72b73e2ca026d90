package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/capture"
	"tweed/capture/pcapng"
	"tweed/engine/tap"
	"tweed/node"
)

// replayOptions are the flags of tweed replay.
type replayOptions struct {
	point       string
	rate, speed float64
	count       uint64
	loop        int
	all         bool
}

const replayLong = `replay puts the packets of a capture file, pcapng or pcap, into a running engine as
if they had come once more: at tun-in as if the host had sent them, at wire-in
as if they had been received. They pass every check, are counted in the ledger,
shown by captures, and sent or delivered for good, so the other side gets them,
too. ICMP errors they cause are counted, not sent.

Of a file made by tweed capture the packets of that tap point are taken, with
--all those of every one; of other files every IPv4 packet. Packets that are not
all there (tcpdump -s) are skipped and counted.

At the end it says what became of the packets, in the words of the ledger. Only
root and the user of the engine may replay, one replay at a time.`

const replayExample = `  tweed replay x.pcapng
  tweed replay x.pcapng --rate 1000 --loop
  tweed replay x.pcapng --speed 0.1 --count 5
  tweed replay forged.pcap --point wire-in --speed 0`

func newReplayCommand() *cobra.Command {
	var c client
	var o replayOptions
	cmd := &cobra.Command{
		Use: "replay FILE", Short: "Put the packets of a capture file into the engine again",
		Long: replayLong, Example: replayExample, GroupID: groupLook, Args: oneArg("a capture FILE, or - for standard input"),
	}
	c.register(cmd)
	fs := cmd.Flags()
	fs.StringVar(&o.point, "point", tap.TunIn.String(), "tap `point` to put them in: tun-in or wire-in")
	fs.Float64Var(&o.rate, "rate", 0, "packets per second (default: as fast as in the file)")
	fs.Float64Var(&o.speed, "speed", 1, "how many times as fast as in the file; 0 is as fast as the engine takes them")
	fs.Uint64Var(&o.count, "count", 0, "stop after `N` packets")
	fs.IntVar(&o.loop, "loop", 1, "go through the file `N` times, without =N until stopped")
	fs.Lookup("loop").NoOptDefVal = "0"
	fs.BoolVar(&o.all, "all", false, "take the packets of every tap point in the file")
	completeWords(cmd, "point", tap.TunIn.String(), tap.WireIn.String())
	cmd.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return []string{"pcapng", "pcap", "cap"}, cobra.ShellCompDirectiveFilterFileExt
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := o.check(args[0], fs.Changed("rate"), fs.Changed("speed")); err != nil {
			return newUsageError(cmd, err)
		}
		return runReplay(cmd, &c, &o, args[0])
	}
	return cmd
}

func (o *replayOptions) check(file string, rate, speed bool) error {
	point, err := tap.ParsePoint(o.point)
	switch {
	case err != nil || point != tap.TunIn && point != tap.WireIn:
		return fmt.Errorf("--point %q: expected tun-in or wire-in", o.point)
	case rate && speed:
		return errors.New("--rate and --speed: expected one of them")
	case rate && (!(o.rate > 0) || math.IsInf(o.rate, 0)):
		return fmt.Errorf("--rate %v: expected packets per second above 0", o.rate)
	case !(o.speed >= 0) || math.IsInf(o.speed, 0):
		return fmt.Errorf("--speed %v: expected a number from 0, such as 2 for twice as fast", o.speed)
	case o.loop < 0:
		return fmt.Errorf("--loop=%d: expected a number of times, or --loop alone for no end", o.loop)
	case file == "-" && o.loop != 1:
		return errors.New("--loop: standard input can be read once only: expected a file")
	}
	return nil
}

// replayAnswer is what tweed replay -o json prints.
type replayAnswer struct {
	Schema   int               `json:"schema"`
	File     string            `json:"file"`
	Point    string            `json:"point"`
	Node     string            `json:"node"`
	Replayed uint64            `json:"replayed"`
	Skipped  map[string]uint64 `json:"skipped"`
	Engine   node.ReplayResult `json:"engine"`
}

func runReplay(cmd *cobra.Command, c *client, o *replayOptions, file string) error {
	// A wrong file is told before the engine is asked for anything.
	first, close, err := openCapture(cmd.InOrStdin(), file)
	if err != nil {
		return err
	}
	defer func() { close() }()
	api, err := c.dial()
	if err != nil {
		return err
	}
	defer api.Close()
	rep, err := api.Replay(cmd.Context(), o.point)
	if err != nil {
		return err
	}
	ctx, release := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer release()
	context.AfterFunc(ctx, release) // a second signal ends it at once
	stderr := cmd.ErrOrStderr()
	fmt.Fprintf(stderr, "replaying %s at %s of %s\n", file, o.point, rep.Hello.Node)
	point, _ := tap.ParsePoint(o.point) // checked
	f := feeder{name: file, rep: rep, options: o, sel: capture.Selector{Point: point, All: o.all, Ports: rep.Hello.Ports}}
	err = f.passes(ctx, first, func() (*pcapng.Reader, error) {
		close()
		r, again, err := openCapture(nil, file)
		if err == nil {
			close = again
		}
		return r, err
	})
	res, rerr := rep.End()
	if rerr != nil {
		err = rerr
	}
	a := replayAnswer{Schema: node.Schema, File: file, Point: o.point, Node: rep.Hello.Node, Replayed: f.put, Skipped: map[string]uint64{}, Engine: res}
	for why, n := range f.sel.Skipped {
		if n > 0 {
			a.Skipped[capture.Skip(why).String()] = n
		}
	}
	if c.format == "json" {
		enc := json.NewEncoder(cmd.OutOrStdout())
		enc.SetIndent("", "  ")
		err = errors.Join(err, enc.Encode(a))
	} else {
		a.print(stderr)
	}
	if err == nil && f.put == 0 && ctx.Err() == nil {
		err = fmt.Errorf("replay: %s: nothing to replay at %s", file, o.point)
		if f.sel.Skipped[capture.SkipPoint] > 0 {
			err = fmt.Errorf("%w: --all takes the packets of other tap points", err)
		}
	}
	return err
}

// print is the summary for people.
func (a *replayAnswer) print(w io.Writer) {
	fmt.Fprintf(w, "%s replayed", count(a.Replayed, "packet"))
	if len(a.Skipped) > 0 {
		fmt.Fprintf(w, ", skipped %s", listCounts(a.Skipped))
	}
	fmt.Fprintf(w, "\n%s received by the engine: %d delivered", count(a.Engine.Packets, "packet"), a.Engine.Delivered)
	if len(a.Engine.Dropped) > 0 {
		fmt.Fprintf(w, ", dropped %s", listCounts(a.Engine.Dropped))
	}
	fmt.Fprintln(w)
	if n := a.Engine.Answered; n > 0 {
		fmt.Fprintf(w, "%s caused, not sent\n", count(n, "ICMP error"))
	}
}

// listCounts is "2 this, 1 that" in the order of the names.
func listCounts(m map[string]uint64) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprint(m[name], " ", name))
	}
	return strings.Join(parts, ", ")
}

// openCapture opens a capture file and reads its head.
func openCapture(stdin io.Reader, name string) (*pcapng.Reader, func(), error) {
	in, close := stdin, func() {}
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, nil, fmt.Errorf("replay: %w", err)
		}
		in, close = f, func() { f.Close() }
	}
	r, err := pcapng.NewReader(in)
	if err != nil {
		close()
		return nil, nil, replayFileError(name, err)
	}
	return r, close, nil
}

// replayFileError names the file and the place.
func replayFileError(name string, err error) error {
	var bad *pcapng.FormatError
	if errors.As(err, &bad) {
		return fmt.Errorf("replay: %s: byte %d: %s", name, bad.Offset, bad.Msg)
	}
	return fmt.Errorf("replay: %s: %w", name, err)
}

// feeder sends the packets of a file to the engine at their time.
type feeder struct {
	name    string
	rep     *node.Replay
	options *replayOptions
	sel     capture.Selector
	put     uint64
	start   time.Time
}

// errReplayed ends a replay that is complete.
var errReplayed = errors.New("replayed")

// passes goes through the file as often as it shall.
func (f *feeder) passes(ctx context.Context, r *pcapng.Reader, again func() (*pcapng.Reader, error)) error {
	f.start = time.Now()
	for n := 1; ; n++ {
		before := f.put
		err := f.pass(ctx, r)
		if err == errReplayed {
			return nil
		}
		if err != nil {
			return err
		}
		if n == f.options.loop || f.put == before {
			return nil
		}
		if r, err = again(); err != nil {
			return err
		}
	}
}

// pass goes through the file once.
func (f *feeder) pass(ctx context.Context, r *pcapng.Reader) error {
	f.sel.Open(r)
	var p capture.Chosen
	var first int64
	began := time.Now()
	for i := 0; ; i++ {
		err := f.sel.Next(&p)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return replayFileError(f.name, err)
		}
		if i == 0 {
			first = p.Time
		}
		var due time.Time
		switch o := f.options; {
		case o.rate > 0:
			due = f.start.Add(time.Duration(float64(f.put) / o.rate * float64(time.Second)))
		case o.speed > 0:
			due = began.Add(time.Duration(min(float64(p.Time-first)/o.speed, math.MaxInt64/2)))
		}
		if err := f.await(ctx, due); err != nil {
			return err
		}
		if f.rep.Put(p.Data, p.SegmentPayload) != nil {
			return errReplayed // the result says why
		}
		f.put++
		if f.put == f.options.count {
			return errReplayed
		}
	}
}

// await waits until due, or until there is nothing to wait for any more.
func (f *feeder) await(ctx context.Context, due time.Time) error {
	pause := time.Until(due)
	if pause <= 0 {
		select {
		case <-ctx.Done():
			return errReplayed
		case <-f.rep.Ended:
			return errReplayed
		default:
			return nil
		}
	}
	if f.rep.Flush() != nil {
		return errReplayed
	}
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return errReplayed
	case <-f.rep.Ended:
		return errReplayed
	}
}
