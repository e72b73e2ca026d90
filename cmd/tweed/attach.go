package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/attach"
	"tweed/node"
)

// watchInterval is how often a command that waits for the end of an attachment
// looks.
const watchInterval = 200 * time.Millisecond

// noFD stands for a descriptor that was not passed.
const noFD = -1

func newAttachCommand() *cobra.Command {
	var (
		r               node.AttachRequest
		address         string
		readyFD, exitFD int
		ready, exit     *os.File
		wait            bool
	)
	cmd := newClientCommand(&cobra.Command{
		Use:   "attach {--pid PID | --netns PATH|NAME}",
		Short: "Give a running container an address in the overlay",
		Long: `attach connects the network namespace of a container to the overlay through a
running engine: the container gets an interface and an address of the node's
subnet, until it ends or tweed detach. The container's user is enough; neither
this command nor the engine needs a capability.

The container can reach the overlay and nothing else through this interface:
for the way out, start it with pasta or slirp4netns and attach it as well.`,
		Example: `  tweed attach --pid $(podman inspect --format '{{.State.Pid}}' web)
  tweed attach --netns blue --ifname eth1 --name blue
  tweed attach --pid 4711 --ready-fd 3 --exit-fd 4`,
	}, func(cmd *cobra.Command, c *client, api *node.Client, _ []string) error {
		s, err := api.Attach(cmd.Context(), r)
		if err != nil {
			return err
		}
		if ready != nil {
			// The byte and the close are slirp4netns's way to say it.
			_, err := ready.Write([]byte("1"))
			if err = errors.Join(err, ready.Close()); err != nil {
				return errors.Join(fmt.Errorf("--ready-fd %d: %w", readyFD, err), api.Detach(cmd.Context(), s.Name))
			}
		}
		err = c.print(cmd.OutOrStdout(), node.AttachmentsAnswer{Schema: node.Schema, Attachments: []node.AttachmentStatus{s}}, func(w io.Writer) {
			printAttached(w, s)
		})
		if err != nil || exit == nil && !wait {
			return err
		}
		return holdAttachment(cmd.Context(), api, s, exit)
	})
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		err := checkAttach(cmd, address, &r)
		if err == nil {
			ready, exit, err = callerFDs(readyFD, exitFD)
		}
		if err != nil {
			return newUsageError(cmd, err)
		}
		return nil
	}
	cmd.GroupID = groupAttach
	fs := cmd.Flags()
	fs.IntVar(&r.PID, "pid", 0, "a `process` of the container")
	fs.StringVar(&r.Path, "netns", "", "the container's network namespace: a `path`, or a name in /run/netns or $XDG_RUNTIME_DIR/netns")
	fs.StringVar(&r.Name, "name", "", "`name` for tweed ps and tweed detach (default: pid-PID, or the namespace's)")
	fs.StringVar(&r.IfName, "ifname", node.DefaultIfName, "`name` of the interface inside")
	fs.StringVar(&address, "address", "", "ask for this `address` of the node's subnet")
	fs.StringVar(&r.Tier, "tier", "auto", "force a `tier`: tun or veth (default: the best that works)")
	fs.IntVar(&readyFD, "ready-fd", noFD, "write the byte 1 to this `descriptor` and close it when the network is up")
	fs.IntVar(&exitFD, "exit-fd", noFD, "stay, and detach when this `descriptor` is hung up")
	fs.BoolVar(&wait, "wait", false, "stay until the container ends; detach when interrupted")
	completeWords(cmd, "tier", "auto", "tun", "veth")
	return cmd
}

// checkAttach says what is wrong with the flags, before an engine is looked for.
func checkAttach(cmd *cobra.Command, address string, r *node.AttachRequest) error {
	if cmd.Flags().Changed("pid") && r.PID <= 0 {
		return fmt.Errorf("--pid %d: expected a positive number", r.PID)
	}
	if (r.PID == 0) == (r.Path == "") {
		return errors.New("expected exactly one of --pid and --netns")
	}
	if _, err := attach.ParseTier(r.Tier); err != nil {
		return fmt.Errorf("--tier %q: expected auto, tun or veth", r.Tier)
	}
	return parseAddress(address, r)
}

// callerFDs opens the descriptors a caller passed by number; noFD is none.
func callerFDs(readyFD, exitFD int) (ready, exit *os.File, err error) {
	for _, f := range []struct {
		flag string
		fd   int
		to   **os.File
	}{{"--ready-fd", readyFD, &ready}, {"--exit-fd", exitFD, &exit}} {
		if f.fd == noFD {
			continue
		}
		if f.fd < 0 {
			return nil, nil, fmt.Errorf("%s %d: expected the number of an open descriptor", f.flag, f.fd)
		}
		if _, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFD, 0); err != nil {
			return nil, nil, fmt.Errorf("%s %d: expected an open descriptor: %w", f.flag, f.fd, err)
		}
		unix.CloseOnExec(f.fd)
		*f.to = os.NewFile(uintptr(f.fd), f.flag)
	}
	return ready, exit, nil
}

// holdAttachment stays until the attachment has gone, exit is hung up or a
// signal comes; the latter two detach.
func holdAttachment(ctx context.Context, api *node.Client, s node.AttachmentStatus, exit *os.File) error {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	if exit != nil {
		go func() {
			defer stop()
			p := []unix.PollFd{{Fd: int32(exit.Fd()), Events: 0}} // POLLHUP is always reported
			for {
				if _, err := unix.Poll(p, -1); err == nil || !errors.Is(err, unix.EINTR) {
					return
				}
			}
		}()
	}
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			return api.Detach(ctx, s.Name)
		case <-tick.C:
		}
		a, err := api.Attachments(ctx)
		if ctx.Err() != nil {
			continue
		}
		if err != nil {
			return err
		}
		if !attachedStill(a, s) {
			return nil
		}
	}
}

func attachedStill(a node.AttachmentsAnswer, s node.AttachmentStatus) bool {
	for _, o := range a.Attachments {
		if o.Name == s.Name && o.Since.Equal(s.Since) {
			return true
		}
	}
	return false
}

func printAttached(w io.Writer, s node.AttachmentStatus) {
	fmt.Fprintf(w, "%s attached: %s on %s, MTU %d, tier %s\n", s.Name, s.Addr, s.Interface, s.MTU, s.Tier)
	for _, v := range s.Passed {
		fmt.Fprintf(w, "  tier %s was not possible: %s\n", v.Tier, v.Why)
		if v.Fix != "" {
			fmt.Fprintf(w, "    to get it: %s\n", v.Fix)
		}
	}
}

// printAttachedCount is the line of tweed status about attachments.
func printAttachedCount(line lineFunc, list []node.AttachmentStatus) {
	if len(list) == 0 {
		return
	}
	tiers := map[attach.Tier]uint64{}
	for _, s := range list {
		tiers[s.Tier]++
	}
	var parts []string
	for _, t := range []attach.Tier{attach.TierTUN, attach.TierVeth, attach.TierNetstack} {
		if tiers[t] > 0 {
			parts = append(parts, fmt.Sprintf("%d by tier %s", tiers[t], t))
		}
	}
	line("attached", "%s (tweed ps lists them)", strings.Join(parts, ", "))
	seen := map[string]bool{}
	for _, s := range list {
		for _, v := range s.Passed {
			if text := v.String(); !seen[text] {
				seen[text] = true
				line("", "no tier %s", text)
			}
		}
	}
}

func newPsCommand() *cobra.Command {
	cmd := newClientCommand(&cobra.Command{
		Use:   "ps",
		Short: "List the attached containers",
	}, func(cmd *cobra.Command, c *client, api *node.Client, _ []string) error {
		a, err := api.Attachments(cmd.Context())
		if err != nil {
			return err
		}
		return c.print(cmd.OutOrStdout(), a, func(w io.Writer) { printAttachments(w, a) })
	})
	cmd.GroupID = groupAttach
	return cmd
}

func printAttachments(w io.Writer, a node.AttachmentsAnswer) {
	var rows [][]string
	for _, s := range a.Attachments {
		target := s.Path
		switch {
		case s.PID != 0:
			target = "pid " + strconv.Itoa(s.PID)
		case s.Socket != "":
			target = "program"
		}
		rows = append(rows, []string{s.Name, s.Addr.String(), s.State, string(s.Tier), s.Interface, target, s.Offload, s.Since.Local().Format(time.DateTime)})
	}
	writeTable(w, []string{"NAME", "ADDRESS", "STATE", "TIER", "INTERFACE", "CONTAINER", "OFFLOAD", "SINCE"}, rows)
	for _, s := range a.Attachments {
		if s.Program != nil {
			fmt.Fprintf(w, "packets of %s: %s\n", s.Name, s.Program)
		}
	}
}

func newDetachCommand() *cobra.Command {
	cmd := newClientCommand(&cobra.Command{
		Use:     "detach NAME",
		Short:   "Take a container's address and interface away",
		Example: "  tweed detach pid-4711",
		Args:    oneArg("the name of an attachment, as tweed ps shows it"),
	}, func(cmd *cobra.Command, c *client, api *node.Client, args []string) error {
		return api.Detach(cmd.Context(), args[0])
	})
	cmd.GroupID = groupAttach
	return cmd
}
