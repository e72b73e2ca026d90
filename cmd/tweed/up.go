package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"unsafe"

	"github.com/google/gopacket/layers"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/cmd/internal/daemon"
	"tweed/netns"
	"tweed/node"
)

// upDefaults differ from flannel's where flannel's serve its history: the
// second endpoint is the port of etcd before 2.0.
var upDefaults = daemon.Defaults{EtcdEndpoints: "http://127.0.0.1:2379", TUNName: "tweed0"}

func newUpCommand() *cobra.Command {
	var flags daemon.Flags
	var attachOnly, exitWhenIdle bool
	cmd := &cobra.Command{
		Use:     "up",
		Short:   "Join the overlay and carry its traffic until stopped",
		GroupID: groupRun,
		Long: `up claims a subnet in etcd, creates the TUN device and carries traffic between
this node and the others until SIGINT or SIGTERM, which end it with status 0.
It needs CAP_NET_ADMIN and /dev/net/tun.

With --attach-only the host itself is left out: there is no TUN device, and the
overlay is for the containers of tweed attach and tweed run. That needs no
privilege, and the process gives up all it has.`,
		Example: `  tweed up --etcd-endpoints http://10.0.0.5:2379 --iface eth0
  tweed up --iface eth0 --listen-framings udp,vxlan`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := flags.Config()
			if err != nil {
				return newUsageError(cmd, err)
			}
			log, err := daemon.NewLogger(cmd.ErrOrStderr(), flags.LogLevel(), flags.LogFormat())
			if err != nil {
				return newUsageError(cmd, err)
			}
			cfg.Program, cfg.Version, cfg.Log = "tweed", daemon.Version(), log
			cfg.EndsWhenIdle = exitWhenIdle
			if attachOnly {
				forAttachOnly(&cfg, cmd.Flags().Changed)
				if err := netns.Renounce(); err != nil {
					return err
				}
			}
			n, err := node.New(cfg)
			if err != nil {
				return newUsageError(cmd, err)
			}
			ctx, end := context.WithCancel(cmd.Context())
			defer end()
			if exitWhenIdle {
				go endWhenIdle(ctx, n, end)
			}
			forgetDecoders()
			stopSaving := saveRecorderOnSignal(n, log)
			err = daemon.Run(ctx, n)
			stopSaving()
			if errors.Is(err, os.ErrPermission) && !attachOnly && os.Geteuid() != 0 {
				err = fmt.Errorf("%w (or leave the host out of the overlay, which needs no privilege: tweed up --attach-only)", err)
			}
			return err
		},
	}
	fs := flag.NewFlagSet("up", flag.ContinueOnError)
	flags.Register(fs, upDefaults)
	cmd.Flags().AddGoFlagSet(fs)
	cmd.Flags().BoolVar(&attachOnly, "attach-only", false, "serve attached containers only, without any privilege and without a TUN device of the host's")
	cmd.Flags().BoolVar(&exitWhenIdle, "exit-when-idle", false, "end after the last container was detached")
	_ = cmd.Flags().MarkHidden("exit-when-idle")
	completeWords(cmd, "offload", "auto", "full", "tso", "none")
	completeWords(cmd, "accelerate", "auto", "off")
	completeWords(cmd, "listen-framings", "udp", "vxlan", "udp,vxlan")
	completeWords(cmd, "log-level", "debug", "info", "warn", "error")
	completeWords(cmd, "log-format", "text", "json")
	return cmd
}

// forgetDecoders empties tables that gopacket fills when a program starts, 65,536
// entries each, and returns their 5 MiB: a node decodes nothing, tweed capture does.
func forgetDecoders() {
	for _, table := range [][]layers.EnumMetadata{layers.EthernetTypeMetadata[:], layers.PPPTypeMetadata[:]} {
		clear(table)
		// Pages of zeros are the same when they are gone.
		first := uintptr(unsafe.Pointer(unsafe.SliceData(table)))
		size := uintptr(len(table)) * unsafe.Sizeof(table[0])
		page := uintptr(os.Getpagesize())
		start, end := (first+page-1)&^(page-1), (first+size)&^(page-1)
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, start, end-start, unix.MADV_DONTNEED)
	}
}

// forAttachOnly leaves out what is for the host, unless it was asked for; then
// the node says why that cannot be.
func forAttachOnly(c *node.Config, given func(string) bool) {
	c.AttachOnly = true
	if !given("iptables-forward-rules") {
		c.IPTablesForward = false
	}
	if !given("subnet-file") {
		c.SubnetFile = ""
	}
}
