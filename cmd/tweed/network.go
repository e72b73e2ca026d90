package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"tweed/cmd/internal/daemon"
	"tweed/encap"
	"tweed/lease"
	"tweed/node"
)

// networkAnswer is what `network get -o json` and `network set -o json` print.
type networkAnswer struct {
	Schema int    `json:"schema"`
	Key    string `json:"key"`
	// Before is the config that was replaced; only set prints it.
	Before json.RawMessage `json:"before,omitempty"`
	// Config is the config in flannel's form.
	Config json.RawMessage `json:"config"`
	// SubnetLen to Subnets are what follows from it.
	SubnetLen int    `json:"subnet_len"`
	SubnetMin string `json:"subnet_min"`
	SubnetMax string `json:"subnet_max"`
	Subnets   int    `json:"subnets"`
	// Changed says whether something was written; only set prints it.
	Changed *bool `json:"changed,omitempty"`
	// Notes are what tweed does another way than the config asks.
	Notes []string `json:"notes,omitempty"`
}

func newNetworkCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:     "network",
		Short:   "Read or write the network config that all nodes share",
		GroupID: groupEtcd,
	}, newNetworkGetCommand(), newNetworkSetCommand())
}

// etcdCommand holds what both subcommands need to reach etcd.
type etcdCommand struct {
	output
	flags daemon.Flags
}

func (e *etcdCommand) register(cmd *cobra.Command) {
	e.output.register(cmd)
	fs := flag.NewFlagSet(cmd.Name(), flag.ContinueOnError)
	e.flags.RegisterEtcd(fs, upDefaults)
	cmd.Flags().AddGoFlagSet(fs)
}

// do calls f with the registry of the network. Each of its calls has its own
// deadline.
func (e *etcdCommand) do(cmd *cobra.Command, f func(context.Context, *lease.Registry) error) error {
	cfg := e.flags.Etcd()
	etcd := lease.EtcdConfig{
		Endpoints: cfg.EtcdEndpoints, Prefix: cfg.EtcdPrefix,
		CertFile: cfg.EtcdCertFile, KeyFile: cfg.EtcdKeyFile, CAFile: cfg.EtcdCAFile,
		Username: cfg.EtcdUsername, Password: cfg.EtcdPassword,
		Log: slog.New(slog.DiscardHandler),
	}
	if err := etcd.Check(); err != nil {
		return newUsageError(cmd, err)
	}
	r, err := lease.Open(etcd)
	if err != nil {
		return err
	}
	defer r.Close()
	return f(cmd.Context(), r)
}

func newNetworkGetCommand() *cobra.Command {
	var e etcdCommand
	cmd := &cobra.Command{
		Use:   "get",
		Short: "Print the network config",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.do(cmd, func(ctx context.Context, r *lease.Registry) error {
				cfg, err := r.ReadNetworkConfig(ctx)
				if err != nil {
					return err
				}
				a, err := answerFor(r.ConfigKey(), cfg)
				if err != nil {
					return err
				}
				return e.print(cmd.OutOrStdout(), a, func(w io.Writer) { printNetworkConfig(w, a, cfg) })
			})
		},
	}
	e.register(cmd)
	return cmd
}

func newNetworkSetCommand() *cobra.Command {
	var e etcdCommand
	var f networkFlags
	var force bool
	cmd := &cobra.Command{
		Use:   "set CIDR",
		Short: "Write the network config, after checking it",
		Long: `set writes the network config. Flags that are not given keep what is in force.
Running nodes follow a wider network at once. What they cannot follow while they
run, such as another backend or a smaller network, is refused unless --force is
given; they then keep the old config until they are started again.`,
		Example: `  tweed network set 10.244.0.0/16 --backend vxlan
  tweed network set 10.240.0.0/12`,
		Args: oneArg("the network, such as 10.244.0.0/16"),
		RunE: func(cmd *cobra.Command, args []string) error {
			network, err := parseNetwork(args[0])
			if err != nil {
				return newUsageError(cmd, err)
			}
			return e.do(cmd, func(ctx context.Context, r *lease.Registry) error {
				return setNetwork(ctx, cmd, &e, r, force, func(current *lease.NetworkConfig) (lease.NetworkConfig, error) {
					return f.build(network, current, cmd.Flags().Changed)
				})
			})
		},
	}
	e.register(cmd)
	f.register(cmd.Flags())
	cmd.Flags().BoolVar(&force, "force", false, "write also what running nodes cannot follow")
	completeWords(cmd, "backend", lease.BackendUDP, lease.BackendVXLAN)
	return cmd
}

// setNetwork writes what build makes of the config in force, unless that stops
// running nodes from following and force is not given.
func setNetwork(ctx context.Context, cmd *cobra.Command, e *etcdCommand, r *lease.Registry, force bool,
	build func(*lease.NetworkConfig) (lease.NetworkConfig, error),
) error {
	current, err := currentConfig(ctx, r, force)
	if err != nil {
		return err
	}
	next, err := build(current)
	if err != nil {
		return newUsageError(cmd, err)
	}
	a, err := answerFor(r.ConfigKey(), next)
	if err != nil {
		return err
	}
	changed := current == nil || *current != next
	a.Changed = &changed
	if current != nil {
		if a.Before, err = current.Marshal(); err != nil {
			return err
		}
		if err := refuseObstacles(ctx, r, *current, next, force); err != nil {
			return err
		}
	}
	if changed {
		if err := r.WriteNetworkConfig(ctx, next); err != nil {
			return err
		}
	}
	return e.print(cmd.OutOrStdout(), a, func(w io.Writer) { printNetworkChange(w, a, next) })
}

// currentConfig is the config in force, nil if there is none. With force, one
// that cannot be read counts as none.
func currentConfig(ctx context.Context, r *lease.Registry, force bool) (*lease.NetworkConfig, error) {
	cfg, err := r.ReadNetworkConfig(ctx)
	var etcd *lease.EtcdError
	switch {
	case err == nil:
		return &cfg, nil
	case errors.Is(err, lease.ErrNoConfig):
		return nil, nil
	case errors.As(err, &etcd):
		return nil, err
	case force:
		return nil, nil
	}
	return nil, fmt.Errorf("the config in force is not valid: %w; repeat with --force to replace it", err)
}

// refuseObstacles returns an error if nodes are running that cannot follow.
func refuseObstacles(ctx context.Context, r *lease.Registry, current, next lease.NetworkConfig, force bool) error {
	if force {
		return nil
	}
	leases, _, err := r.ListLeases(ctx)
	if err != nil || len(leases) == 0 {
		return err
	}
	if why := obstacles(current, next, leases); len(why) > 0 {
		return fmt.Errorf("not changed: %s; running nodes (%s) cannot follow until they are started again; repeat with --force to write it all the same",
			strings.Join(why, ", "), count(uint64(len(leases)), "lease"))
	}
	return nil
}

func answerFor(key string, cfg lease.NetworkConfig) (networkAnswer, error) {
	text, err := cfg.Marshal()
	return networkAnswer{
		Schema: node.Schema, Key: key, Config: text,
		SubnetLen: cfg.SubnetLen, SubnetMin: cfg.SubnetMin.String(), SubnetMax: cfg.SubnetMax.String(),
		Subnets: cfg.Subnets(), Notes: cfg.Notes(),
	}, err
}

func printNetworkConfig(w io.Writer, a networkAnswer, cfg lease.NetworkConfig) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "key\t%s\n", a.Key)
	fmt.Fprintf(tw, "config\t%s\n", a.Config)
	printDerived(tw, a, cfg)
	tw.Flush()
}

func printNetworkChange(w io.Writer, a networkAnswer, cfg lease.NetworkConfig) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "key\t%s\n", a.Key)
	switch {
	case a.Before == nil:
		fmt.Fprintf(tw, "before\tnot set\n")
	case !*a.Changed:
		fmt.Fprintf(tw, "unchanged\t%s\n", a.Config)
	default:
		fmt.Fprintf(tw, "before\t%s\n", a.Before)
	}
	if *a.Changed {
		fmt.Fprintf(tw, "after\t%s\n", a.Config)
	}
	printDerived(tw, a, cfg)
	tw.Flush()
}

// printDerived writes what the config means for the nodes.
func printDerived(w io.Writer, a networkAnswer, cfg lease.NetworkConfig) {
	fmt.Fprintf(w, "subnets\t%d of /%d, %s to %s\n", a.Subnets, a.SubnetLen, a.SubnetMin, a.SubnetMax)
	port := cfg.Backend.Port
	if f, err := encap.ParseFraming(cfg.Backend.Type); err == nil && port == 0 {
		port = f.DefaultPort()
	}
	fmt.Fprintf(w, "traffic\t%s on UDP port %d\n", cfg.Backend.Type, port)
	for _, note := range a.Notes {
		fmt.Fprintf(w, "note\t%s\n", note)
	}
}
