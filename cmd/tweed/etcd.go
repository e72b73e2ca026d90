package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"golang.org/x/sys/unix"
)

func newEtcdCommand() *cobra.Command {
	var o etcdOptions
	var readyFD int
	cmd := &cobra.Command{
		Use:     "etcd",
		Short:   "Run a single-node etcd for the network",
		GroupID: groupEtcd,
		Long: `etcd runs one member of etcd in this process, for a network that has none. It
listens on loopback unless told otherwise, compacts its history every hour and
keeps at most 256 MiB. The endpoint is printed on standard output when it answers.`,
		Example: `  tweed etcd --data-dir /var/lib/tweed/etcd
  tweed etcd --listen-client http://10.0.0.5:2379`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := parseListenURL(o); err != nil {
				return newUsageError(cmd, err)
			}
			if _, ok := etcdLogLevels[o.logLevel]; !ok {
				return newUsageError(cmd, fmt.Errorf("--log-level %q: expected debug, info, warn or error", o.logLevel))
			}
			ready, err := readyFile(readyFD)
			if err != nil {
				return newUsageError(cmd, err)
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			context.AfterFunc(ctx, stop)
			return runEtcd(ctx, o, ready, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&o.dataDir, "data-dir", "", "`directory` of the data, mode 0700 (default: a temporary one, removed at exit)")
	fs.StringVar(&o.listen, "listen-client", "http://127.0.0.1:2379", "`URL` to serve clients at; port 0 picks a free one")
	fs.StringVar(&o.certFile, "certfile", "", "server certificate `file` (PEM); needs an https URL")
	fs.StringVar(&o.keyFile, "keyfile", "", "server key `file` (PEM)")
	fs.StringVar(&o.caFile, "cafile", "", "`file` with the CA that signs client certificates; clients need one then")
	fs.StringVar(&o.logLevel, "log-level", "error", "lowest `level` of etcd's own log: debug, info, warn or error")
	fs.IntVar(&readyFD, "ready-fd", -1, "open file descriptor `number` the endpoint is written to when ready")
	fs.Int64Var(&wal.SegmentSizeBytes, "wal-segment-size", wal.SegmentSizeBytes, "size of etcd's log files in `bytes`")
	_ = fs.MarkHidden("wal-segment-size") // for data that is thrown away
	completeWords(cmd, "log-level", "debug", "info", "warn", "error")
	return cmd
}

var etcdLogLevels = map[string]struct{}{"debug": {}, "info": {}, "warn": {}, "error": {}}

func runEtcd(ctx context.Context, o etcdOptions, ready *os.File, stdout, stderr io.Writer) (err error) {
	s, err := startEtcd(ctx, o)
	if err != nil {
		if ctx.Err() != nil {
			return nil // told to stop before it was ready
		}
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if open, why := openToOthers(o); open {
		fmt.Fprintf(stderr, "tweed: warning: %s: %s\n", s.Endpoint, why)
	}
	fmt.Fprintln(stdout, s.Endpoint)
	if ready != nil {
		if _, err := fmt.Fprintln(ready, s.Endpoint); err != nil {
			return fmt.Errorf("--ready-fd: %w", err)
		}
		if err := ready.Close(); err != nil {
			return fmt.Errorf("--ready-fd: %w", err)
		}
	}
	return s.Wait(ctx)
}

// openToOthers reports whether other machines can write to this etcd without
// showing a certificate.
func openToOthers(o etcdOptions) (bool, string) {
	u, err := url.Parse(o.listen)
	if err != nil || o.caFile != "" || u.Hostname() == "localhost" {
		return false, ""
	}
	ip, err := netip.ParseAddr(u.Hostname())
	if err != nil || ip.IsLoopback() {
		return false, ""
	}
	return true, "whoever reaches this address can change the network; ask for client certificates with --cafile or keep others out with a firewall"
}

// readyFile is the file descriptor of --ready-fd, nil for -1.
func readyFile(fd int) (*os.File, error) {
	if fd == -1 {
		return nil, nil
	}
	if fd < 1 {
		return nil, fmt.Errorf("--ready-fd %d: expected a descriptor open for writing, such as 3", fd)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_ACCMODE == unix.O_RDONLY {
		return nil, fmt.Errorf("--ready-fd %d: expected a descriptor open for writing", fd)
	}
	return os.NewFile(uintptr(fd), "ready-fd"), nil
}
