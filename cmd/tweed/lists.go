package main

import (
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"tweed/node"
)

func newPeersCommand() *cobra.Command {
	return newClientCommand(&cobra.Command{
		Use:   "peers",
		Short: "List the other nodes as the data plane reaches them",
	}, func(cmd *cobra.Command, c *client, api *node.Client, _ []string) error {
		a, err := api.Peers(cmd.Context())
		if err != nil {
			return err
		}
		return c.print(cmd.OutOrStdout(), a, func(w io.Writer) { printPeers(w, a) })
	})
}

func printPeers(w io.Writer, a node.PeersAnswer) {
	var rows [][]string
	for _, p := range a.Peers {
		rows = append(rows, []string{p.Subnet.String(), p.Endpoint.String(), p.Framing.String(), strconv.Itoa(p.MTU), p.NodeName, p.Source})
	}
	writeTable(w, []string{"SUBNET", "ENDPOINT", "FRAMING", "MTU", "NODE", "SOURCE"}, rows)
}

func newRoutesCommand() *cobra.Command {
	return newClientCommand(&cobra.Command{
		Use:   "routes",
		Short: "List the overlay's routing table",
	}, func(cmd *cobra.Command, c *client, api *node.Client, _ []string) error {
		a, err := api.Routes(cmd.Context())
		if err != nil {
			return err
		}
		return c.print(cmd.OutOrStdout(), a, func(w io.Writer) { printRoutes(w, a) })
	})
}

func printRoutes(w io.Writer, a node.RoutesAnswer) {
	var rows [][]string
	for _, r := range a.Routes {
		framing := r.Framing.String()
		if r.Via == "local" {
			framing = ""
		}
		rows = append(rows, []string{r.Dst.String(), r.Via, framing, strconv.Itoa(r.MTU), r.NodeName})
	}
	writeTable(w, []string{"DESTINATION", "VIA", "FRAMING", "MTU", "NODE"}, rows)
}

func newLeasesCommand() *cobra.Command {
	return newClientCommand(&cobra.Command{
		Use:   "leases",
		Short: "List all leases of the network, the node's own included",
	}, func(cmd *cobra.Command, c *client, api *node.Client, _ []string) error {
		a, err := api.Leases(cmd.Context())
		if err != nil {
			return err
		}
		return c.print(cmd.OutOrStdout(), a, func(w io.Writer) { printLeases(w, a) })
	})
}

func printLeases(w io.Writer, a node.LeasesAnswer) {
	var rows [][]string
	for _, l := range a.Leases {
		backend := l.BackendType
		if backend == "" {
			backend = "udp" // flannel's udp backend leaves the type out
		}
		vni := ""
		if l.VNI != 0 {
			vni = strconv.FormatUint(uint64(l.VNI), 10)
		}
		rows = append(rows, []string{l.Subnet.String(), addrText(l.PublicIP), backend, vni, l.VtepMAC, l.NodeName, leaseNotes(l)})
	}
	writeTable(w, []string{"SUBNET", "PUBLIC-IP", "BACKEND", "VNI", "VTEP-MAC", "NODE", "NOTES"}, rows)
}

// leaseNotes is what sets a lease apart from an ordinary one of another node.
func leaseNotes(l node.LeaseStatus) string {
	var notes []string
	if l.Own {
		notes = append(notes, "own")
	}
	if l.Reservation {
		notes = append(notes, "reservation")
	}
	if l.Source == "snapshot" {
		notes = append(notes, "from snapshot")
	}
	if l.Source == "held" {
		notes = append(notes, "deleted, held for a moment")
	}
	return strings.Join(notes, ", ")
}

func newRouteCommand() *cobra.Command {
	route := &cobra.Command{
		Use:     "route",
		Short:   "Explain what happens to packets for one address",
		GroupID: groupLook,
	}
	get := newClientCommand(&cobra.Command{
		Use:     "get IP",
		Short:   "Explain what happens to packets for IP",
		Example: "  tweed route get 10.244.7.12",
		Args:    oneArg("an IPv4 address"),
	}, func(cmd *cobra.Command, c *client, api *node.Client, args []string) error {
		a, err := api.Route(cmd.Context(), netip.MustParseAddr(args[0]))
		if err != nil {
			return err
		}
		return c.print(cmd.OutOrStdout(), a, func(w io.Writer) { printRoute(w, a) })
	})
	get.GroupID = ""
	get.PreRunE = func(cmd *cobra.Command, args []string) error {
		if ip, err := netip.ParseAddr(args[0]); err != nil || !ip.Is4() {
			return newUsageError(cmd, fmt.Errorf("%q: expected an IPv4 address", args[0]))
		}
		return nil
	}
	return group(route, get)
}

func printRoute(w io.Writer, a node.RouteAnswer) {
	fmt.Fprintf(w, "%s %s\n", a.Dst, words(a.Result, a.Reason))
	if a.Explain != "" {
		fmt.Fprintf(w, "  %s\n", a.Explain)
	}
	if a.Peer != nil {
		fmt.Fprintf(w, "  packets of up to %d bytes arrive unfragmented\n", a.Peer.MTU)
	}
}
