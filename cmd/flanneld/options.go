package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"tweed/cmd/internal/daemon"
	"tweed/node"
)

// defaults are flannel's (flannel main.go).
var defaults = daemon.Defaults{
	EtcdEndpoints: "http://127.0.0.1:4001,http://127.0.0.1:2379",
	TUNName:       "flannel%d",
}

// The renewal margin has to leave some of the 24 hours of a lease (flannel main.go).
const (
	minRenewMargin = 1
	maxRenewMargin = 24*60 - 1
)

// options is the command line: the node's flags and those that only flannel has.
type options struct {
	fs   *flag.FlagSet
	node daemon.Flags

	version       bool
	renewMargin   int
	kubeSubnetMgr bool
	publicIPv6    string
	verbosity     int
}

func newOptions(stderr io.Writer) *options {
	o := &options{fs: flag.NewFlagSet("flanneld", flag.ContinueOnError)}
	o.fs.SetOutput(stderr)
	o.fs.Usage = func() {
		fmt.Fprintln(stderr, "Usage: flanneld [OPTION]...")
		o.fs.PrintDefaults()
	}
	o.node.Register(o.fs, defaults)
	o.fs.BoolVar(&o.version, "version", false, "print version and exit")
	o.fs.IntVar(&o.renewMargin, "subnet-lease-renew-margin", 60, "`minutes` before the end of the lease in which flannel renews it, 1 to 1439; the lease is kept alive all the time here")
	o.fs.StringVar(&o.publicIPv6, "public-ipv6", "", "accepted and ignored: the overlay is IPv4")
	o.registerKube()
	o.registerKlog()
	return o
}

// registerKube accepts the flags of flannel's Kubernetes mode. Units and
// manifests carry them with their defaults; only the mode itself is refused.
func (o *options) registerKube() {
	const ignored = "accepted and ignored: it belongs to -kube-subnet-mgr"
	o.fs.BoolVar(&o.kubeSubnetMgr, "kube-subnet-mgr", false, "not supported: leases come from etcd")
	o.fs.String("kube-api-url", "", ignored)
	o.fs.String("kube-annotation-prefix", "flannel.alpha.coreos.com", ignored)
	o.fs.String("kubeconfig-file", "", ignored)
	o.fs.Bool("set-node-network-unavailable", true, ignored)
	o.fs.String("net-config-path", "/etc/kube-flannel/net-conf.json", ignored)
}

// registerKlog accepts the flags of klog and glog. Only -v has a meaning here.
func (o *options) registerKlog() {
	const ignored = "accepted and ignored: the log goes to stderr"
	o.fs.IntVar(&o.verbosity, "v", 0, "log `level`; 1 and more log at debug level")
	for _, name := range []string{"vmodule", "log_backtrace_at", "stderrthreshold", "log_dir", "log_file"} {
		o.fs.String(name, "", ignored)
	}
	o.fs.Uint64("log_file_max_size", 1800, ignored)
	o.fs.Bool("logtostderr", true, ignored)
	for _, name := range []string{"alsologtostderr", "add_dir_header", "skip_headers", "skip_log_headers", "one_output"} {
		o.fs.Bool(name, false, ignored)
	}
}

func (o *options) logger(w io.Writer) (*slog.Logger, error) {
	level := o.node.LogLevel()
	if o.verbosity > 0 {
		level = "debug"
	}
	return daemon.NewLogger(w, level, o.node.LogFormat())
}

func (o *options) config(log *slog.Logger) (node.Config, error) {
	if o.kubeSubnetMgr {
		return node.Config{}, errors.New("-kube-subnet-mgr is not supported: leases come from etcd; leave the flag out and set -etcd-endpoints")
	}
	if o.renewMargin < minRenewMargin || o.renewMargin > maxRenewMargin {
		return node.Config{}, fmt.Errorf("-subnet-lease-renew-margin %d: expected %d to %d minutes", o.renewMargin, minRenewMargin, maxRenewMargin)
	}
	if o.publicIPv6 != "" {
		log.Warn("flag ignored", "flag", "public-ipv6", "value", o.publicIPv6, "reason", "the overlay is IPv4")
	}
	if o.fs.NArg() > 0 {
		log.Warn("arguments ignored", "arguments", o.fs.Args())
	}
	cfg, err := o.node.Config()
	if err != nil {
		return node.Config{}, err
	}
	cfg.RenewMargin = time.Duration(o.renewMargin) * time.Minute
	cfg.Program = "flanneld"
	cfg.Version = daemon.Version()
	cfg.Log = log
	return cfg, nil
}

// setFromEnv sets every flag that the command line left alone from its
// environment variable: prefix, an underscore and the name in capitals with
// "-" and "." as "_" (coreos/pkg flagutil). An empty variable counts as unset.
// All variables are tried; the error is that of the last one that does not
// parse, and its flag keeps the default.
func setFromEnv(fs *flag.FlagSet, prefix string, lookup func(string) (string, bool)) error {
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var last error
	fs.VisitAll(func(f *flag.Flag) {
		if given[f.Name] {
			return
		}
		key := prefix + "_" + strings.ToUpper(strings.NewReplacer("-", "_", ".", "_").Replace(f.Name))
		value, ok := lookup(key)
		if !ok || value == "" {
			return
		}
		// A failed Set may have written: flag.Int stores what strconv made of
		// the text. Put the default back by hand.
		if err := f.Value.Set(value); err != nil {
			if resetErr := f.Value.Set(f.DefValue); resetErr != nil {
				err = errors.Join(err, resetErr)
			}
			last = fmt.Errorf("%s=%s: %w, keeping %s", key, strconv.Quote(value), err, f.DefValue)
		}
	})
	return last
}
