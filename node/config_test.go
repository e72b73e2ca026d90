package node

import (
	"strings"
	"testing"
	"time"

	"tweed/encap"
)

func TestBadConfigsAreRefusedByNameAndValue(t *testing.T) {
	for want, change := range map[string]func(*Config){
		"--public-ip fe80::1: expected an IPv4 address":        func(c *Config) { c.PublicIP = "fe80::1" },
		"--iface-can-reach 10.0.0: expected an IPv4 address":   func(c *Config) { c.IfaceCanReach = "10.0.0" },
		"--iface-can-reach fd00::1: expected an IPv4 address":  func(c *Config) { c.IfaceCanReach = "fd00::1" },
		"lease: etcd endpoint \"ftp://10.0.0.5:2379\"":         func(c *Config) { c.EtcdEndpoints = []string{"ftp://10.0.0.5:2379"} },
		"lease: etcd user name and password must":              func(c *Config) { c.EtcdUsername = "root" },
		"lease: etcd client certificate and key must":          func(c *Config) { c.EtcdKeyFile = "key.pem" },
		"--mtu big: expected max or":                           func(c *Config) { c.MTU = "big" },
		"--iface-regex (: ":                                    func(c *Config) { c.IfaceRegex = []string{"("} },
		"--lease-ttl 1s: expected 5s or more":                  func(c *Config) { c.LeaseTTL = time.Second },
		"--subnet-lease-renew-margin 1440: expected 1 to 1439": func(c *Config) { c.RenewMargin = 1440 * time.Minute },
		`--tun-name "a/b": expected`:                           func(c *Config) { c.TUNName = "a/b" },
		`--tun-name "%d": expected`:                            func(c *Config) { c.TUNName = "%d" },
		`--tun-name "0123456789abcdef": expected`:              func(c *Config) { c.TUNName = "0123456789abcdef" },
		"--workers 257: expected 1 to 256":                     func(c *Config) { c.Workers = 257 },
		"--listen-framings: udp is unknown or given twice":     func(c *Config) { c.ListenFramings = []encap.Framing{0, 0} },
		"--healthz-port 65536: expected 0 to 65535":            func(c *Config) { c.HealthzPort = 65536 },
		"--healthz-ip localhost: expected an IP address":       func(c *Config) { c.HealthzIP = "localhost" },
		"--metrics-addr 9285: expected HOST:PORT":              func(c *Config) { c.MetricsAddr = "9285" },
		"--metrics-addr :http: expected a port":                func(c *Config) { c.MetricsAddr = ":http" },
		"--iptables-resync 1ms: expected 1 second or more":     func(c *Config) { c.IPTablesResync = time.Millisecond },
	} {
		var c Config
		change(&c)
		if _, err := New(c); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

func TestZeroConfigHasFlannelsDefaults(t *testing.T) {
	n, err := New(Config{EtcdPrefix: "/coreos.com/network/"})
	if err != nil {
		t.Fatal(err)
	}
	c := n.cfg
	if c.EtcdPrefix != DefaultEtcdPrefix || c.LeaseTTL != 24*time.Hour || c.RenewMargin != time.Hour ||
		c.TUNName != "tweed0" || c.Workers < 1 || len(c.EtcdEndpoints) != 1 {
		t.Errorf("got %+v", c)
	}
}

func TestTUNNamePatternTriesNumbersInOrder(t *testing.T) {
	names := candidateNames("flannel%d")
	if names[0] != "flannel0" || names[1] != "flannel1" || len(names) != maxTUNNumber+1 {
		t.Errorf("got %v", names[:2])
	}
	if names := candidateNames("averylongname%d"); len(names) != 100 {
		t.Errorf("%d names of at most 15 bytes, expected 100", len(names))
	}
	if names := candidateNames("tweed0"); len(names) != 1 || names[0] != "tweed0" {
		t.Errorf("got %v", names)
	}
}
