package main

import (
	"bytes"
	"io"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"

	"tweed/node"
)

func env(vars map[string]string) func(string) (string, bool) {
	return func(k string) (string, bool) { v, ok := vars[k]; return v, ok }
}

func configFrom(t *testing.T, args []string, vars map[string]string) (cfg node.Config, envErr, err error) {
	t.Helper()
	o := newOptions(io.Discard)
	if err := o.fs.Parse(args); err != nil {
		t.Fatalf("parse %q: %v", args, err)
	}
	envErr = setFromEnv(o.fs, "FLANNELD", env(vars))
	cfg, err = o.config(slog.New(slog.DiscardHandler))
	return cfg, envErr, err
}

func TestDefaultsAreFlannels(t *testing.T) {
	cfg, envErr, err := configFrom(t, nil, nil)
	if err != nil || envErr != nil {
		t.Fatal(err, envErr)
	}
	for _, c := range []struct {
		what      string
		got, want any
	}{
		{"endpoints", cfg.EtcdEndpoints, []string{"http://127.0.0.1:4001", "http://127.0.0.1:2379"}},
		{"prefix", cfg.EtcdPrefix, "/coreos.com/network"},
		{"subnet file", cfg.SubnetFile, "/run/flannel/subnet.env"},
		{"TTL", cfg.LeaseTTL, 24 * time.Hour},
		{"renew margin", cfg.RenewMargin, time.Hour},
		{"TUN", cfg.TUNName, "flannel%d"},
		{"masq", cfg.IPMasq, false},
		{"random", cfg.IPMasqRandomFully, true},
		{"forward", cfg.IPTablesForward, true},
		{"resync", cfg.IPTablesResync, 5 * time.Second},
		{"healthz", cfg.HealthzIP, "0.0.0.0"},
		{"health port", cfg.HealthzPort, 0},
		{"program", cfg.Program, "flanneld"},
	} {
		if !reflect.DeepEqual(c.got, c.want) {
			t.Errorf("%s: got %v, want %v", c.what, c.got, c.want)
		}
	}
}

// The table of flannel's flags, to notice one that goes missing or changes.
func TestEveryFlannelFlagHasItsDefault(t *testing.T) {
	want := map[string]string{
		"etcd-endpoints": "http://127.0.0.1:4001,http://127.0.0.1:2379", "etcd-prefix": "/coreos.com/network",
		"etcd-keyfile": "", "etcd-certfile": "", "etcd-cafile": "", "etcd-username": "", "etcd-password": "",
		"iface": "", "iface-regex": "", "iface-can-reach": "", "public-ip": "", "public-ipv6": "",
		"subnet-file": "/run/flannel/subnet.env", "subnet-lease-renew-margin": "60",
		"ip-masq": "false", "ip-masq-fully-random-disable": "false",
		"iptables-resync": "5", "iptables-forward-rules": "true", "ip-blackhole-route": "false",
		"healthz-ip": "0.0.0.0", "healthz-port": "0",
		"kube-subnet-mgr": "false", "kube-api-url": "", "kube-annotation-prefix": "flannel.alpha.coreos.com",
		"kubeconfig-file": "", "set-node-network-unavailable": "true",
		"net-config-path": "/etc/kube-flannel/net-conf.json",
		"v":               "0", "vmodule": "", "log_backtrace_at": "", "version": "false",
	}
	o := newOptions(io.Discard)
	for name, def := range want {
		f := o.fs.Lookup(name)
		if f == nil {
			t.Errorf("flag -%s is missing", name)
			continue
		}
		if f.DefValue != def {
			t.Errorf("-%s: default %q, want %q", name, f.DefValue, def)
		}
	}
}

func TestCommandLineBeatsEnvironmentBeatsDefault(t *testing.T) {
	prefix := func(c node.Config) any { return c.EtcdPrefix }
	iface := func(c node.Config) any { return strings.Join(c.Iface, "|") }
	masq := func(c node.Config) any { return c.IPMasq }
	resync := func(c node.Config) any { return c.IPTablesResync }
	for _, c := range []struct {
		name string
		args []string
		vars map[string]string
		get  func(node.Config) any
		want any
	}{
		{"default", nil, nil, prefix, "/coreos.com/network"},
		{"environment", nil, map[string]string{"FLANNELD_ETCD_PREFIX": "/e"}, prefix, "/e"},
		{"command line", []string{"-etcd-prefix=/c"}, map[string]string{"FLANNELD_ETCD_PREFIX": "/e"}, prefix, "/c"},
		{"two dashes", []string{"--etcd-prefix", "/c"}, nil, prefix, "/c"},
		{"empty is unset", nil, map[string]string{"FLANNELD_ETCD_PREFIX": ""}, prefix, "/coreos.com/network"},
		{"command line that says the default", []string{"-etcd-prefix=/coreos.com/network"}, map[string]string{"FLANNELD_ETCD_PREFIX": "/e"}, prefix, "/coreos.com/network"},
		{"repeatable on the command line", []string{"-iface=a", "-iface", "b"}, nil, iface, "a|b"},
		{"repeatable takes one value from the environment", nil, map[string]string{"FLANNELD_IFACE": "a,b"}, iface, "a,b"},
		{"command line replaces the environment's", []string{"-iface=c"}, map[string]string{"FLANNELD_IFACE": "a"}, iface, "c"},
		{"bool", []string{"-ip-masq"}, nil, masq, true},
		{"bool from the environment", nil, map[string]string{"FLANNELD_IP_MASQ": "true"}, masq, true},
		{"bool switched off", []string{"-ip-masq=false"}, map[string]string{"FLANNELD_IP_MASQ": "true"}, masq, false},
		{"another prefix is not looked at", nil, map[string]string{"FLANNEL_IP_MASQ": "true"}, masq, false},
		{"number", nil, map[string]string{"FLANNELD_IPTABLES_RESYNC": "9"}, resync, 9 * time.Second},
	} {
		cfg, envErr, err := configFrom(t, c.args, c.vars)
		if err != nil || envErr != nil {
			t.Errorf("%s: %v, environment: %v", c.name, err, envErr)
			continue
		}
		if got := c.get(cfg); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

func TestBadEnvironmentIsReportedAndTheDefaultKept(t *testing.T) {
	cfg, envErr, err := configFrom(t, nil, map[string]string{
		"FLANNELD_IP_MASQ":         "perhaps",
		"FLANNELD_IPTABLES_RESYNC": "soon",
		"FLANNELD_ETCD_PREFIX":     "/e",
	})
	if err != nil {
		t.Fatal(err)
	}
	if envErr == nil || !strings.Contains(envErr.Error(), `FLANNELD_IPTABLES_RESYNC="soon"`) {
		t.Errorf("environment error %v, want the last one, naming FLANNELD_IPTABLES_RESYNC", envErr)
	}
	if cfg.IPMasq || cfg.IPTablesResync != 5*time.Second {
		t.Errorf("ip-masq %v, resync %v: want the defaults", cfg.IPMasq, cfg.IPTablesResync)
	}
	if cfg.EtcdPrefix != "/e" {
		t.Errorf("prefix %q: a bad variable must not hide a good one", cfg.EtcdPrefix)
	}
}

func TestRefusedValues(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"-subnet-lease-renew-margin=0"}, "-subnet-lease-renew-margin 0: expected 1 to 1439 minutes"},
		{[]string{"-subnet-lease-renew-margin=1440"}, "expected 1 to 1439"},
		{[]string{"-kube-subnet-mgr"}, "-kube-subnet-mgr is not supported"},
	} {
		_, _, err := configFrom(t, c.args, nil)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: got %v, want %q", c.args, err, c.want)
		}
	}
	for _, args := range [][]string{
		{"-subnet-lease-renew-margin=1"}, {"-subnet-lease-renew-margin=1439"}, {"-kube-subnet-mgr=false"},
		{"-logtostderr", "-alsologtostderr=false", "-v=4", "-vmodule=a=1", "-log_backtrace_at=f.go:1", "-stderrthreshold=INFO"},
		{"-kube-api-url=https://k", "-net-config-path=/n", "-set-node-network-unavailable=false", "-public-ipv6=::1"},
		{"leftover"},
	} {
		if _, _, err := configFrom(t, args, nil); err != nil {
			t.Errorf("%q: %v", args, err)
		}
	}
}

func TestExitStatus(t *testing.T) {
	for _, c := range []struct {
		name   string
		args   []string
		vars   map[string]string
		status int
		want   string
	}{
		{"version", []string{"-version"}, nil, 0, "tweed "},
		{"version before environment", []string{"--version"}, map[string]string{"FLANNELD_IP_MASQ": "x"}, 0, "tweed "},
		{"help", []string{"-h"}, nil, 0, "Usage: flanneld"},
		{"help", []string{"--help"}, nil, 0, "-etcd-endpoints"},
		{"unknown flag", []string{"-listen=:8888"}, nil, 2, "flag provided but not defined: -listen"},
		{"bad value", []string{"-healthz-port=x"}, nil, 2, "healthz-port"},
		{"kube", []string{"-kube-subnet-mgr=true"}, nil, 1, "flanneld: -kube-subnet-mgr is not supported"},
		{"kube from the environment", nil, map[string]string{"FLANNELD_KUBE_SUBNET_MGR": "true"}, 1, "flanneld: -kube-subnet-mgr is not supported"},
		{"a value the node refuses", []string{"-public-ip=::1"}, nil, 1, "flanneld: --public-ip ::1: expected an IPv4 address"},
		{"margin", []string{"-subnet-lease-renew-margin=2000"}, nil, 1, "flanneld: -subnet-lease-renew-margin 2000"},
		{"version from the environment does nothing", []string{"-kube-subnet-mgr"}, map[string]string{"FLANNELD_VERSION": "true"}, 1, "not supported"},
	} {
		var stderr bytes.Buffer
		if got := run(c.args, env(c.vars), &stderr); got != c.status {
			t.Errorf("%s: exit status %d, want %d (%s)", c.name, got, c.status, stderr.String())
		}
		if !strings.Contains(stderr.String(), c.want) {
			t.Errorf("%s: stderr %q, want %q in it", c.name, stderr.String(), c.want)
		}
	}
}
