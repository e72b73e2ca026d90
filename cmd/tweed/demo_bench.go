package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"tweed/netns"
	"tweed/probe"
)

// Sizes of `demo bench`.
const (
	benchPings    = 20
	benchTransfer = 256 << 20 // bytes
	benchRate     = 5000      // UDP packets per second
	benchTime     = 2 * time.Second
)

// benchSchema is the version of benchAnswer.
const benchSchema = 1

// benchAnswer is what `demo bench -o json` prints.
type benchAnswer struct {
	Schema int        `json:"schema"`
	Pairs  []benchRow `json:"pairs"`
}

// benchRow is what was measured from one node to the next.
type benchRow struct {
	Framing string `json:"framing"`
	From    string `json:"from"`
	To      string `json:"to"`
	// Pings lost of Pings, and the median round trip of the others in
	// microseconds.
	Pings     int     `json:"pings"`
	PingsLost int     `json:"pings_lost"`
	RTT       float64 `json:"rtt_us"`
	// TCP is in 10^9 bit/s of payload, of Bytes whose SHA-256 was compared.
	TCP   float64 `json:"tcp_gbit_per_s"`
	Bytes int     `json:"tcp_bytes"`
	// UDP packets of 200 bytes of payload.
	UDPSent      uint64 `json:"udp_sent"`
	UDPReceived  uint64 `json:"udp_received"`
	UDPReordered uint64 `json:"udp_reordered"`
}

func newDemoBenchCommand(o *demoOptions) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure across the kept demo",
		Long: `bench measures from each node of the kept demo to the next: round trips, one TCP
connection, and a steady flow of UDP packets. All of them share one machine: the
figures say what this machine can do for all nodes together. perf compares.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return inKeptDemo(cmd, o.runDir, func(ctx context.Context, d *keptDemo) error {
				a, err := d.bench(ctx)
				if err != nil {
					return fmt.Errorf("demo bench: %w", err)
				}
				return out.print(cmd.OutOrStdout(), a, func(w io.Writer) { printBench(w, a) })
			})
		},
	}
	out.register(cmd)
	return cmd
}

// bench measures around the ring of every overlay.
func (d *keptDemo) bench(ctx context.Context) (benchAnswer, error) {
	a := benchAnswer{Schema: benchSchema, Pairs: []benchRow{}}
	for _, framing := range []string{"udp", "vxlan"} {
		var ring []keptNode
		for _, n := range d.record.Nodes {
			if n.Framing == framing {
				ring = append(ring, n)
			}
		}
		for i, from := range ring {
			row, err := d.benchPair(ctx, from, ring[(i+1)%len(ring)])
			if err != nil {
				return a, fmt.Errorf("%s, %s to %s: %w", framing, row.From, row.To, err)
			}
			a.Pairs = append(a.Pairs, row)
		}
	}
	return a, nil
}

func (d *keptDemo) benchPair(ctx context.Context, from, to keptNode) (benchRow, error) {
	row := benchRow{Framing: from.Framing, From: from.Name, To: to.Name, Pings: benchPings, Bytes: benchTransfer}
	if d.record.Impaired {
		row.Bytes = impairedTransfer
	}
	a, err := d.place(from)
	if err != nil {
		return row, err
	}
	defer a.Close()
	b, err := d.place(to)
	if err != nil {
		return row, err
	}
	defer b.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*demoPatience)
	defer cancel()
	var trips []time.Duration
	for range benchPings {
		rtt, err := pingOnce(ctx, a, from, to)
		if err == nil {
			trips = append(trips, rtt)
		}
	}
	if len(trips) == 0 {
		return row, fmt.Errorf("none of %d pings was answered", benchPings)
	}
	slices.Sort(trips)
	row.PingsLost, row.RTT = benchPings-len(trips), float64(trips[len(trips)/2])/float64(time.Microsecond)
	t, err := probe.Transfer(ctx, a, b, from.Address, to.Address, row.Bytes)
	if err != nil {
		return row, err
	}
	row.TCP = t.BitsPerSecond() / 1e9
	s, err := probe.StartStream(probe.StreamConfig{From: a, To: b, Src: from.Address, Dst: to.Address, Rate: benchRate})
	if err != nil {
		return row, err
	}
	select {
	case <-ctx.Done():
	case <-time.After(benchTime):
	}
	l := s.Stop()
	row.UDPSent, row.UDPReceived, row.UDPReordered = l.Sent, l.Received, l.Reordered
	return row, ctx.Err()
}

// pingOnce gives one echo request a second.
func pingOnce(ctx context.Context, at *netns.Namespace, from, to keptNode) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return probe.Ping(ctx, at, from.Address, to.Address, 56)
}

func printBench(w io.Writer, a benchAnswer) {
	var rows [][]string
	for _, r := range a.Pairs {
		rows = append(rows, []string{
			r.Framing, r.From, r.To, fmt.Sprintf("%.0f us", r.RTT), fmt.Sprintf("%d of %d", r.PingsLost, r.Pings),
			fmt.Sprintf("%.2f Gbit/s", r.TCP), fmt.Sprint(r.UDPSent), fmt.Sprint(r.UDPSent - r.UDPReceived), fmt.Sprint(r.UDPReordered),
		})
	}
	writeTable(w, []string{"FRAMING", "FROM", "TO", "RTT", "PINGS LOST", "TCP", "UDP SENT", "LOST", "OVERTAKEN"}, rows)
}
