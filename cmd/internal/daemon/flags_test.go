package daemon

import (
	"flag"
	"io"
	"reflect"
	"strings"
	"testing"
	"time"

	"tweed/encap"
	"tweed/node"
	"tweed/tun"
)

var testDefaults = Defaults{EtcdEndpoints: "http://127.0.0.1:2379", TUNName: "tweed0"}

func parse(t *testing.T, args ...string) (node.Config, error) {
	t.Helper()
	fs := flag.NewFlagSet("test", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	var f Flags
	f.Register(fs, testDefaults)
	if err := fs.Parse(args); err != nil {
		t.Fatalf("parse %q: %v", args, err)
	}
	return f.Config()
}

func TestDefaultsMakeAUsableConfig(t *testing.T) {
	got, err := parse(t)
	if err != nil {
		t.Fatal(err)
	}
	want := node.Config{
		EtcdEndpoints:     []string{"http://127.0.0.1:2379"},
		EtcdPrefix:        "/coreos.com/network",
		SubnetFile:        "/run/flannel/subnet.env",
		LeaseTTL:          24 * time.Hour,
		IPMasqRandomFully: true,
		IPTablesForward:   true,
		IPTablesResync:    5 * time.Second,
		TUNName:           "tweed0",
		Offload:           tun.OffloadAuto,
		Accelerate:        true,
		HealthzIP:         "0.0.0.0",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("config\n got %+v\nwant %+v", got, want)
	}
}

func TestEveryFlagReachesTheConfig(t *testing.T) {
	got, err := parse(t,
		"--etcd-endpoints", "https://a:1, https://b:2", "--etcd-prefix", "/n",
		"--etcd-certfile", "c.pem", "--etcd-keyfile", "k.pem", "--etcd-cafile", "ca.pem",
		"--etcd-username", "u", "--etcd-password", "p",
		"--iface", "eth1", "--iface", "eth0", "--iface-regex", "^10\\.", "--iface-can-reach", "10.0.0.1",
		"--public-ip", "203.0.113.7", "--subnet-file", "/tmp/s.env",
		"--ip-masq", "--ip-masq-fully-random-disable", "--iptables-resync", "7", "--iptables-forward-rules=false",
		"--ip-blackhole-route", "--healthz-ip", "127.0.0.1", "--healthz-port", "8080",
		"--mtu", "max", "--tun-name", "ov%d", "--workers", "3", "--offload", "tso", "--accelerate", "off", "--listen-framings", "udp,vxlan",
		"--lease-ttl", "90s", "--take-over", "--release-on-exit", "--state-dir", "/s", "--socket", "/s/x.sock",
		"--metrics-addr", "127.0.0.1:9100",
	)
	if err != nil {
		t.Fatal(err)
	}
	want := node.Config{
		EtcdEndpoints: []string{"https://a:1", "https://b:2"}, EtcdPrefix: "/n",
		EtcdCertFile: "c.pem", EtcdKeyFile: "k.pem", EtcdCAFile: "ca.pem",
		EtcdUsername: "u", EtcdPassword: "p",
		Iface: []string{"eth1", "eth0"}, IfaceRegex: []string{"^10\\."}, IfaceCanReach: "10.0.0.1",
		PublicIP: "203.0.113.7", SubnetFile: "/tmp/s.env",
		IPMasq: true, IPTablesResync: 7 * time.Second, BlackholeRoute: true,
		HealthzIP: "127.0.0.1", HealthzPort: 8080,
		MTU: "max", TUNName: "ov%d", Workers: 3, Offload: tun.OffloadTSO,
		ListenFramings: []encap.Framing{encap.FramingUDP, encap.FramingVXLAN},
		LeaseTTL:       90 * time.Second, TakeOver: true, ReleaseOnExit: true,
		StateDir: "/s", Socket: "/s/x.sock", MetricsAddr: "127.0.0.1:9100",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("config\n got %+v\nwant %+v", got, want)
	}
}

func TestBadValuesNameFlagAndExpectation(t *testing.T) {
	for _, c := range []struct{ flag, value string }{
		{"--public-ip", "fd00::1"},
		{"--iface-regex", "["},
		{"--mtu", "big"},
		{"--mtu", "12"},
		{"--tun-name", "a-name-too-long-for-it"},
		{"--tun-name", "a%db"},
		{"--workers", "-1"},
		{"--accelerate", "on"},
		{"--workers", "257"},
		{"--offload", "max"},
		{"--listen-framings", "geneve"},
		{"--listen-framings", ","},
		{"--lease-ttl", "1s"},
		{"--healthz-ip", "all"},
		{"--healthz-port", "70000"},
		{"--iptables-resync", "-1"},
		{"--metrics-addr", "9100"},
	} {
		cfg, err := parse(t, c.flag, c.value)
		if err == nil {
			_, err = node.New(cfg)
		}
		if err == nil || !strings.HasPrefix(err.Error(), c.flag) || !strings.Contains(err.Error(), c.value) {
			t.Errorf("%s %s: got error %v, want one that starts with the flag and names the value", c.flag, c.value, err)
		}
	}
}

func TestLoggerRefusesUnknownLevelAndFormat(t *testing.T) {
	if _, err := NewLogger(io.Discard, "loud", "text"); err == nil || !strings.Contains(err.Error(), `--log-level "loud"`) {
		t.Errorf("level: %v", err)
	}
	if _, err := NewLogger(io.Discard, "info", "xml"); err == nil || !strings.Contains(err.Error(), `--log-format "xml"`) {
		t.Errorf("format: %v", err)
	}
	for _, level := range []string{"debug", "info", "warn", "error"} {
		for _, format := range []string{"text", "json"} {
			if _, err := NewLogger(io.Discard, level, format); err != nil {
				t.Errorf("%s %s: %v", level, format, err)
			}
		}
	}
}
