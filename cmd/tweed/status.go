package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"tweed/engine"
	"tweed/node"
	"tweed/tun"
)

func newStatusCommand() *cobra.Command {
	return newClientCommand(&cobra.Command{
		Use:   "status",
		Short: "Show the state of a node: lease, network, device, traffic, problems",
	}, func(cmd *cobra.Command, c *client, api *node.Client, _ []string) error {
		s, err := api.Status(cmd.Context())
		if err != nil {
			return err
		}
		if c.format == "json" {
			return c.print(cmd.OutOrStdout(), s, nil)
		}
		peers, err := api.Peers(cmd.Context())
		if err != nil {
			return err
		}
		printStatus(cmd.OutOrStdout(), s, peers.Peers, time.Now())
		return nil
	})
}

// How many of a kind status lists before it points elsewhere.
const (
	maxStatusPeers   = 16
	maxStatusIgnored = 5
)

// printStatus writes one line per part of the node, problems last, where the
// eye rests.
func printStatus(w io.Writer, s node.Status, peers []node.PeerStatus, now time.Time) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(key, format string, args ...any) {
		fmt.Fprintf(tw, "%s\t%s\n", key, fmt.Sprintf(format, args...))
	}
	ready := "not ready"
	if s.Ready {
		ready = "ready"
	}
	line("node", "%s", words(s.Node.Name, addrText(s.Node.PublicIP), s.Node.ID))
	line("program", "%s %s, pid %d, up %s", s.Program, s.Version, s.PID, now.Sub(s.Started).Round(time.Second))
	line("phase", "%s, %s", s.Phase, ready)
	printNetwork(line, s)
	printUnderlay(line, s)
	printDevice(line, s.Device)
	printAttachedCount(line, s.Attachments)
	printEtcd(line, s.Etcd)
	printPeersOf(line, s.Peers, peers)
	if s.Rules.Mode != "" && s.Rules.Mode != "none" {
		line("rules", "%s, masquerade %s, forward %s", s.Rules.Mode, onOff(s.Rules.Masq), onOff(s.Rules.Forward))
	}
	line("sent", "%s", ledgerText(s.Ledger.Tx))
	line("received", "%s", ledgerText(s.Ledger.Rx))
	printDrops(line, "drop sent", s.Ledger.Tx.Drops)
	printDrops(line, "drop received", s.Ledger.Rx.Drops)
	if n := s.Ledger.SocketDropped; n > 0 {
		line("lost before", "%s by the kernel, a receive buffer was full", count(n, "datagram"))
	}
	for _, skip := range s.Skipped {
		line("skipped lease", "%s %s: %s", skip.Subnet, skip.BackendType, skip.Why)
	}
	for i, key := range s.Ignored {
		if i == maxStatusIgnored {
			line("", "and %d more: tweed status -o json", len(s.Ignored)-i)
			break
		}
		line("ignored key", "%s: %s", key.Key, key.Reason)
	}
	for _, p := range s.Problems {
		line("problem", "%s", p)
	}
	if len(s.Problems) == 0 {
		line("problems", "none")
	}
	tw.Flush()
}

type lineFunc func(key, format string, args ...any)

func printNetwork(line lineFunc, s node.Status) {
	switch n := s.Network; {
	case n == nil:
		line("network", "not known yet")
	case n.VNI != 0:
		line("network", "%s, %s port %d VNI %d, a /%d per node", n.Network, n.Backend, n.Port, n.VNI, n.SubnetLen)
	default:
		line("network", "%s, %s port %d, a /%d per node", n.Network, n.Backend, n.Port, n.SubnetLen)
	}
	if s.Lease == nil {
		line("lease", "none yet")
		return
	}
	text := fmt.Sprintf("%s %s", s.Lease.Subnet, s.Lease.State)
	if s.Lease.Reservation {
		text += " (reservation)"
	}
	line("lease", "%s", text)
}

func printUnderlay(line lineFunc, s node.Status) {
	if s.Underlay.Interface == "" {
		line("underlay", "not chosen yet")
		return
	}
	line("underlay", "%s %s, MTU %d (%s)", s.Underlay.Interface, addrText(s.Underlay.Address), s.Underlay.MTU, s.Underlay.Chosen)
	var listen []string
	for _, l := range s.Listen {
		listen = append(listen, l.Framing.String()+" "+l.Addr.String())
	}
	if listen != nil {
		line("listening", "%s", strings.Join(listen, ", "))
	}
}

func printPeersOf(line lineFunc, byFraming map[string]int, peers []node.PeerStatus) {
	line("peers", "%s", peersText(byFraming))
	for i, p := range peers {
		if i == maxStatusPeers {
			line("", "and %d more: tweed peers", len(peers)-i)
			break
		}
		line("", "%s", words(p.Subnet.String(), p.Framing.String(), p.Endpoint.String(), p.NodeName))
	}
}

// words joins what is known.
func words(parts ...string) string {
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), " ")
}

func printDevice(line lineFunc, d node.DeviceStatus) {
	if d.AttachOnly {
		line("device", "none: only attached containers, MTU %d", d.MTU)
		return
	}
	if d.Name == "" {
		line("device", "none yet")
		return
	}
	state := "down"
	if d.Up {
		state = "up"
	}
	offload := d.Offload
	if d.OffloadReason != "" && d.Offload != tun.OffloadFull.String() {
		offload += " (" + d.OffloadReason + ")"
	}
	line("device", "%s %s, %s, MTU %d, %s, offload %s", d.Name, addrText(d.Address), state, d.MTU, count(uint64(d.Workers), "worker"), offload)
	if d.Accelerator == "" {
		return
	}
	text := d.Accelerator
	if d.AcceleratorReason != "" {
		text += ": " + d.AcceleratorReason
	}
	line("accelerator", "%s", text)
}

func printEtcd(line lineFunc, e node.EtcdStatus) {
	state := "not connected"
	if e.Connected {
		state = "connected"
	}
	if e.Synced {
		state += fmt.Sprintf(", complete at revision %d", e.Revision)
	}
	line("etcd", "%s", state)
	line("", "%s", words(strings.Join(e.Endpoints, ","), e.Prefix))
	if e.LastError != "" && !e.Connected {
		line("etcd error", "%s", e.LastError)
	}
}

func peersText(byFraming map[string]int) string {
	var parts []string
	for _, framing := range slices.Sorted(maps.Keys(byFraming)) {
		if n := byFraming[framing]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, framing))
		}
	}
	if parts == nil {
		return "none"
	}
	return strings.Join(parts, ", ")
}

func ledgerText(d node.DirectionLedger) string {
	s := fmt.Sprintf("%s, %s, %d delivered, %d dropped", count(d.Packets, "packet"), bytesText(d.Bytes), d.Delivered, d.Dropped)
	if d.Accelerated > 0 {
		s += fmt.Sprintf(", %d inside the kernel", d.Accelerated)
	}
	return s
}

// printDrops lists the reasons that occurred, the most frequent first.
func printDrops(line lineFunc, key string, drops map[string]uint64) {
	names := slices.SortedFunc(maps.Keys(drops), func(a, b string) int {
		if drops[a] != drops[b] {
			if drops[a] > drops[b] {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	for _, name := range names {
		if drops[name] == 0 {
			continue
		}
		text := fmt.Sprintf("%d %s", drops[name], name)
		if r, err := engine.ParseReason(name); err == nil {
			text += ": " + r.Doc()
		}
		line(key, "%s", text)
	}
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}
