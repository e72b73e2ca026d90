package main

import (
	"flag"

	"github.com/spf13/cobra"

	"tweed/cmd/internal/daemon"
	"tweed/node"
)

// upDefaults differ from flannel's where flannel's serve its history: the
// second endpoint is the port of etcd before 2.0.
var upDefaults = daemon.Defaults{EtcdEndpoints: "http://127.0.0.1:2379", TUNName: "tweed0"}

func newUpCommand() *cobra.Command {
	var flags daemon.Flags
	cmd := &cobra.Command{
		Use:     "up",
		Short:   "Join the overlay and carry its traffic until stopped",
		GroupID: groupRun,
		Long: `up claims a subnet in etcd, creates the TUN device and carries traffic between
this node and the others until SIGINT or SIGTERM, which end it with status 0.
It needs CAP_NET_ADMIN and /dev/net/tun.`,
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
			n, err := node.New(cfg)
			if err != nil {
				return newUsageError(cmd, err)
			}
			return daemon.Run(cmd.Context(), n)
		},
	}
	fs := flag.NewFlagSet("up", flag.ContinueOnError)
	flags.Register(fs, upDefaults)
	cmd.Flags().AddGoFlagSet(fs)
	completeWords(cmd, "offload", "auto", "full", "tso", "none")
	completeWords(cmd, "listen-framings", "udp", "vxlan", "udp,vxlan")
	completeWords(cmd, "log-level", "debug", "info", "warn", "error")
	completeWords(cmd, "log-format", "text", "json")
	return cmd
}
