package main

import (
	"io"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func TestWrongUsageExits2AndSaysWhatToType(t *testing.T) {
	for _, c := range []struct {
		args string
		want string
	}{
		{"stauts", `unknown command "stauts"; did you mean: tweed status`},
		{"zzz", `unknown command "zzz" (see: tweed --help)`},
		{"help zzz", `unknown command "zzz"`},
		{"--zzz", "unknown flag: --zzz (see: tweed --help)"},
		{"up extra", `"extra": expected no argument (see: tweed up --help)`},
		{"up -etcd-prefix=/x", "-etcd-prefix: expected two dashes: --etcd-prefix"},
		{"up --workers many", `--workers "many": expected a whole number`},
		{"up --ip-masq=perhaps", `--ip-masq "perhaps": expected true or false`},
		{"up --lease-ttl 1day", `--lease-ttl "1day": expected a time such as 30s`},
		{"up --lease-ttl 0", `--lease-ttl 0: expected a time such as 30s`},
		{"up --iptables-resync 0", `--iptables-resync 0: expected 1 second or more`},
		{"up --mtu huge", `--mtu huge: expected max or a number of bytes`},
		{"up --offload all", `--offload "all": expected auto, full, tso or none`},
		{"up --log-level loud", `--log-level "loud": expected debug, info, warn or error`},
		{"up --iface-can-reach 10.0.0", "--iface-can-reach 10.0.0: expected an IPv4 address"},
		{"up --etcd-endpoints 10.0.0.5", `etcd endpoint "10.0.0.5" is not scheme://host:port`},
		{"up --etcd-username root", "must be given together"},
		{"up --etcd-certfile c.pem", "must be given together"},
		{"up --public-ip", "flag needs an argument: --public-ip"},
		{"status -o yaml", `--output "yaml": expected table or json`},
		{"status extra", `"extra": expected no argument`},
		{"route", "expected a subcommand; type: tweed route get"},
		{"route gte", `unknown command "gte"; did you mean: tweed route get`},
		{"route get", "expected an IPv4 address; type: tweed route get IP"},
		{"route get here", `"here": expected an IPv4 address`},
		{"route get fd00::1", `"fd00::1": expected an IPv4 address`},
		{"route get 10.0.0.1 10.0.0.2", `"10.0.0.2": expected nothing after`},
		{"network", "type: tweed network get or tweed network set"},
		{"network set", "expected the network, such as 10.244.0.0/16; type: tweed network set CIDR"},
		{"network set 10.244.0.0", `"10.244.0.0": expected an IPv4 network such as 10.244.0.0/16`},
		{"network set fd00::/48", `"fd00::/48": expected an IPv4 network`},
		{"network set 10.244.1.0/16", `"10.244.1.0/16": host bits are set; type: 10.244.0.0/16`},
		{"network get --etcd-endpoints ftp://127.0.0.1:2379", `etcd endpoint "ftp://127.0.0.1:2379" has scheme "ftp"`},
		{"network get --etcd-endpoints http://127.0.0.1", `etcd endpoint "http://127.0.0.1" is not scheme://host:port`},
		{"etcd --listen-client 127.0.0.1:2379", `--listen-client "127.0.0.1:2379": expected a URL`},
		{"etcd --listen-client http://etcd.example:2379", "expected an IP address of this machine"},
		{"etcd --listen-client https://127.0.0.1:2379", "expected https with --certfile and --keyfile"},
		{"etcd --cafile ca.pem", `--cafile "ca.pem"`},
		{"etcd --log-level loud", `--log-level "loud"`},
		{"etcd --ready-fd 0", "--ready-fd 0: expected a descriptor open for writing"},
		{"attach --pid -5", "--pid -5: expected a positive number"},
		{"attach", "expected exactly one of --pid and --netns"},
		{"attach --pid 1 --tier foo", `--tier "foo": expected auto, tun or veth`},
		{"attach --pid 0", "--pid 0: expected a positive number"},
		{"attach --pid 1 --ready-fd -3", "--ready-fd -3: expected the number of an open descriptor"},
		{"run --address 10.0.0 -- true", `--address "10.0.0": expected an IPv4 address`},
		{"proxy --socks5 1080", `--socks5: address "1080": expected HOST:PORT`},
		{"proxy --http 127.0.0.1:99999", `--http: address "127.0.0.1:99999": expected HOST:PORT, with a port from 0 (any) to 65535`},
		{"proxy -R 80:80:80:80", `--remote "80:80:80:80": expected PORT:HOST:HOSTPORT`},
		{"demo ssh n1 --backend host-gw", `--backend "host-gw": expected udp or vxlan`},
		{"completion tcsh", `unknown command "tcsh"`},
	} {
		t.Run(c.args, func(t *testing.T) {
			oneErrorLine(t, inProcess(strings.Fields(c.args)...), exitUsage, c.want)
		})
	}
}

func TestHelpAndVersionSucceedOnStdout(t *testing.T) {
	for args, want := range map[string]string{
		"":                "Run a node:",
		"--help":          "Run a node:",
		"help route get":  "tweed route get IP",
		"up --help":       "--listen-framings",
		"--version":       "tweed ",
		"version":         "tweed ",
		"version -o json": `"schema": 1`,
		"completion bash": "bash completion",
	} {
		o := inProcess(strings.Fields(args)...)
		if o.status != exitGood || !strings.Contains(o.stdout, want) || o.stderr != "" {
			t.Errorf("%q: status %d, stderr %q, stdout lacks %q", args, o.status, o.stderr, want)
		}
	}
}

func TestExitStatusesOfTheProcess(t *testing.T) {
	if o := execute(t, nil, "version"); o.status != exitGood || o.stderr != "" {
		t.Errorf("version: %+v", o)
	}
	oneErrorLine(t, execute(t, nil, "stauts"), exitUsage, "did you mean: tweed status")
	oneErrorLine(t, execute(t, nil, "status", "--socket", "/nonexistent/api.sock"), exitFailed, "/nonexistent/api.sock: no such socket")
}

func TestEnvironmentOfEveryFlag(t *testing.T) {
	for _, c := range []struct {
		env  string
		args []string
		want string
	}{
		{"TWEED_WORKERS=many", []string{"up"}, `TWEED_WORKERS="many": expected a whole number`},
		{"TWEED_IP_MASQ=perhaps", []string{"up"}, `TWEED_IP_MASQ="perhaps": expected true or false`},
		{"TWEED_LEASE_TTL=1day", []string{"up"}, `TWEED_LEASE_TTL="1day": expected a time such as`},
		{"TWEED_OUTPUT=yaml", []string{"status"}, `TWEED_OUTPUT="yaml": expected table or json`},
	} {
		oneErrorLine(t, execute(t, []string{c.env}, c.args...), exitUsage, c.want)
	}
	if o := execute(t, []string{"TWEED_OUTPUT=json"}, "version"); o.status != exitGood || !strings.HasPrefix(o.stdout, "{") {
		t.Errorf("environment not used: %+v", o)
	}
	if o := execute(t, []string{"TWEED_OUTPUT=json"}, "version", "-o", "table"); !strings.HasPrefix(o.stdout, "tweed ") {
		t.Errorf("command line does not win: %+v", o)
	}
	if o := execute(t, []string{"TWEED_OUTPUT="}, "version"); !strings.HasPrefix(o.stdout, "tweed ") {
		t.Errorf("empty variable is not unset: %+v", o)
	}
	oneErrorLine(t, execute(t, []string{"TWEED_SOCKET=/nonexistent/env.sock"}, "peers"), exitFailed, "/nonexistent/env.sock")
}

// A flag that another one's environment variable would set as well cannot be
// told apart, and a flag without a help text is a flag nobody finds.
func TestEveryFlagHasItsOwnVariableAndAHelpText(t *testing.T) {
	var visit func(*cobra.Command)
	visit = func(cmd *cobra.Command) {
		seen := map[string]string{}
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if other, dup := seen[envName(f.Name)]; dup {
				t.Errorf("%s: --%s and --%s share %s", cmd.CommandPath(), f.Name, other, envName(f.Name))
			}
			seen[envName(f.Name)] = f.Name
			if f.Usage == "" {
				t.Errorf("%s: --%s has no help text", cmd.CommandPath(), f.Name)
			}
		})
		if cmd.Short == "" {
			t.Errorf("%s has no short description", cmd.CommandPath())
		}
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	visit(newRootCommand(io.Discard, io.Discard))
}
