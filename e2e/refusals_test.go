package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// assertRefused starts a node that cannot work and checks that it ends with
// the status and with one line that has the words, and has written nothing.
// wrap, if any, is put before the command.
func assertRefused(t *testing.T, w *world, wrap []string, status int, words []string, flags ...string) {
	t.Helper()
	before := w.keys()
	e := w.prepare(0, flags...)
	e.process = w.launch(e.ns, e.name, append(wrap, e.argv...)...)
	if got := e.wait(); got != status {
		t.Errorf("exit status %d, want %d", got, status)
	}
	var said []string
	for line := range strings.Lines(e.output()) {
		if !strings.HasPrefix(line, "time=") {
			said = append(said, strings.TrimSpace(line))
		}
	}
	if len(said) != 1 || !strings.HasPrefix(said[0], "tweed: ") {
		t.Errorf("said %q, want one line that starts with \"tweed: \"", said)
	} else {
		t.Log(said[0])
	}
	for _, word := range words {
		if !strings.Contains(strings.Join(said, "\n"), word) {
			t.Errorf("said %q, want %q in it", said, word)
		}
	}
	if after := w.keys(); !maps.Equal(before, after) {
		t.Errorf("etcd changed from %v to %v", before, after)
	}
	if entries, err := os.ReadDir(e.dir); err == nil && len(entries) > 0 {
		t.Errorf("written in the state directory: %v", entries)
	}
	e.assertNothingLeft()
}

// TestUnusableNetworkConfigIsRefused goes through every config that can never
// work.
func TestUnusableNetworkConfigIsRefused(t *testing.T) {
	w := newWorld(t, 1)
	for _, c := range []struct{ config, word string }{
		{`not JSON`, "JSON"},
		{`{"Network":`, "JSON"},
		{`{}`, "Network"},
		{`{"Network":"10.244.0.0"}`, "10.244.0.0"},
		{`{"Network":"10.244.0.0/16","SubnetLen":"/24"}`, "SubnetLen"},
		{`{"Network":"10.244.0.0/16","SubnetLen":31}`, "SubnetLen"},
		{`{"Network":"10.244.0.0/16","SubnetLen":17}`, "SubnetLen"},
		{`{"Network":"10.244.0.0/29"}`, "/28"},
		{`{"Network":"10.244.0.0/16","SubnetMin":"10.245.1.0"}`, "SubnetMin"},
		{`{"Network":"10.244.0.0/16","SubnetMax":"10.243.1.0"}`, "SubnetMax"},
		{`{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.7"}`, "SubnetMin"},
		{`{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}`, "EnableIPv6"},
		{`{"Network":"10.244.0.0/16","EnableIPv4":false}`, "EnableIPv4"},
		{`{"Network":"10.244.0.0/16","Backend":{}}`, "Backend"},
		{`{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}`, "host-gw"},
		{`{"Network":"10.244.0.0/16","Backend":{"Type":"ipsec"}}`, "ipsec"},
		{`{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard"}}`, "wireguard"},
		{`{"Network":"10.244.0.0/16","Backend":{"Type":"carrier-pigeon"}}`, "carrier-pigeon"},
		{`{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}`, "VNI"},
		{`{"Network":"192.0.0.0/12"}`, "192.0.2.11"},
	} {
		t.Run(c.config, func(t *testing.T) {
			w := w.in(t)
			w.config(c.config)
			assertRefused(t, w, nil, 1, []string{c.word})
		})
	}
}

// TestUnusableHostIsRefused: what the command line and the host can get wrong.
func TestUnusableHostIsRefused(t *testing.T) {
	needTool(t, "unshare", "setpriv")
	w := newWorld(t, 1)
	w.config(udpConfig)
	ca := makeCertificates(t, w.dir, w.lan.Gateway)
	tls := fmt.Sprintf("https://%s:2389", w.lan.Gateway)
	w.launch(w.lan.Switch, "etcd-tls", tweedBin, "etcd", "--listen-client", tls, "--data-dir", filepath.Join(w.dir, "etcd-tls"),
		"--certfile", ca.cert, "--keyfile", ca.key)
	w.await("etcd with TLS listens", func() bool {
		return w.lan.Switch.Do(func() error {
			c, err := net.Dial("tcp4", strings.TrimPrefix(tls, "https://"))
			if err == nil {
				c.Close()
			}
			return err
		}) == nil
	})
	text := filepath.Join(w.dir, "text")
	if err := os.WriteFile(text, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	noDevice := []string{"unshare", "--mount", "sh", "-c", `mount -t tmpfs none /dev/net && exec "$@"`, "sh"}
	noCapability := []string{"setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"}
	for _, c := range []struct {
		name   string
		wrap   []string
		status int
		words  []string
		flags  []string
	}{
		{"CA that did not sign", nil, 1, []string{"--etcd-cafile"}, []string{"--etcd-endpoints", tls, "--etcd-cafile", ca.foreign}},
		{"no CA for a private certificate", nil, 1, []string{"--etcd-cafile"}, []string{"--etcd-endpoints", tls}},
		{"CA file missing", nil, 1, []string{"/no/such/ca.pem"}, []string{"--etcd-endpoints", tls, "--etcd-cafile", "/no/such/ca.pem"}},
		{"CA file without a certificate", nil, 1, []string{text}, []string{"--etcd-endpoints", tls, "--etcd-cafile", text}},
		{"no such interface", nil, 1, []string{"eth9", "eth0"}, []string{"--iface", "eth9"}},
		{"no /dev/net/tun", noDevice, 1, []string{"/dev/net/tun"}, nil},
		{"no CAP_NET_ADMIN", noCapability, 1, []string{"CAP_NET_ADMIN"}, nil},
		{"MTU above the limit", nil, 1, []string{"1473", "1472"}, []string{"--mtu", "1473"}},
		{"MTU below the minimum", nil, 2, []string{"500"}, []string{"--mtu", "500"}},
		{"MTU not a number", nil, 2, []string{"--mtu"}, []string{"--mtu", "big"}},
		{"public IP not an address", nil, 2, []string{"--public-ip"}, []string{"--public-ip", "10.0.0"}},
		{"etcd endpoint without a port", nil, 2, []string{"10.0.0.5"}, []string{"--etcd-endpoints", "http://10.0.0.5"}},
		{"reachable address malformed", nil, 2, []string{"--iface-can-reach 10.0.0"}, []string{"--iface-can-reach", "10.0.0"}},
		{"reachable address without a route", nil, 1, []string{"--iface-can-reach 203.0.113.9"}, []string{"--iface", "eth9", "--iface-can-reach", "203.0.113.9"}},
		{"lease too short", nil, 2, []string{"--lease-ttl"}, []string{"--lease-ttl", "1s"}},
		{"unknown framing", nil, 2, []string{"--listen-framings"}, []string{"--listen-framings", "gre"}},
		{"unknown flag", nil, 2, []string{"--no-such-flag"}, []string{"--no-such-flag"}},
		{"device name too long", nil, 2, []string{"--tun-name"}, []string{"--tun-name", "a-name-of-20-letters"}},
	} {
		t.Run(c.name, func(t *testing.T) { assertRefused(t, w.in(t), c.wrap, c.status, c.words, c.flags...) })
	}

	t.Run("port in use", func(t *testing.T) {
		var c net.PacketConn
		err := w.lan.Nodes[0].Do(func() (err error) {
			c, err = net.ListenPacket("udp4", netip.AddrPortFrom(w.lan.Addr(0), 8285).String())
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		assertRefused(t, w.in(t), nil, 1, []string{"8285"})
	})
}

// TestRefusedByEtcd: a wrong password, and the keys of flannel's first years.
func TestRefusedByEtcd(t *testing.T) {
	t.Run("wrong password", func(t *testing.T) {
		w := newWorld(t, 1)
		w.config(udpConfig)
		ctx := t.Context()
		_, err := w.client.UserAdd(ctx, "root", "right")
		if err == nil {
			_, err = w.client.UserGrantRole(ctx, "root", "root")
		}
		if err == nil {
			_, err = w.client.AuthEnable(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		// The checks of the test go on as root.
		token, err := w.client.Authenticate(ctx, "root", "right")
		if err != nil {
			t.Fatal(err)
		}
		w.as = token.Token
		assertRefused(t, w, nil, 1, []string{"root"}, "--etcd-username", "root", "--etcd-password", "wrong")
		assertRefused(t, w, nil, 1, []string{"--etcd-username"})
		e := w.up(0, "--etcd-username", "root", "--etcd-password", "right")
		if strings.Contains(e.output(), "right") {
			t.Error("the password is in the log")
		}
		e.down()
	})
	t.Run("v2 keys only", func(t *testing.T) {
		needTool(t, "etcd", "etcdctl")
		w := newUnderlay(t, 1)
		w.etcdArgv = []string{"etcd", "--enable-v2", "--data-dir", filepath.Join(w.dir, "etcd"),
			"--listen-client-urls", w.endpoint(), "--advertise-client-urls", w.endpoint(),
			"--listen-peer-urls", "http://127.0.0.1:2380", "--logger", "zap", "--log-level", "error"}
		w.startEtcd()
		set := exec.Command("etcdctl", "--endpoints", w.endpoint(), "set", prefix+"/config", udpConfig)
		set.Env = append(cleanEnvironment(), "ETCDCTL_API=2")
		if err := w.lan.Switch.Start(set); err != nil {
			t.Fatal(err)
		}
		if err := set.Wait(); err != nil {
			t.Fatalf("etcdctl set with the v2 API: %v", err)
		}
		assertRefused(t, w, nil, 1, []string{"v2"})
	})
}

// TestSamePublicIPIsRefused: the second node with one address, and a node that
// has lost its state, which may take its lease over.
func TestSamePublicIPIsRefused(t *testing.T) {
	w := newWorld(t, 2)
	w.config(udpConfig)
	first := w.up(1)
	s := first.status()
	assertRefused(t, w, nil, 1, []string{s.Node.Name, "--iface", "--public-ip", "--take-over"}, "--public-ip", first.underlay().String())
	if got := first.status(); got.Lease.Subnet != s.Lease.Subnet || got.Lease.State != "held" {
		t.Errorf("the first node's lease is now %s, %s", got.Lease.Subnet, got.Lease.State)
	}
	first.end(unix.SIGKILL)
	if err := os.RemoveAll(first.dir); err != nil {
		t.Fatal(err)
	}
	first.again("--take-over")
	if got := first.status(); got.Lease.Subnet != s.Lease.Subnet || got.Node.ID == s.Node.ID {
		t.Errorf("after the loss of its state: subnet %s and node %s, want the old %s under a new node id", got.Lease.Subnet, got.Node.ID, s.Lease.Subnet)
	}
}

// TestSubnetsRunOut: the node for which there is none left says so.
func TestSubnetsRunOut(t *testing.T) {
	w := newWorld(t, 1)
	w.config(`{"Network":"10.244.0.0/24","SubnetLen":27,"SubnetMin":"10.244.0.0"}`)
	for i := range 8 {
		w.put(keyOf(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, 0, byte(32 * i)}), 27)), fmt.Sprintf(`{"PublicIP":"192.0.2.%d","PublicIPv6":null}`, 100+i))
	}
	assertRefused(t, w, nil, 1, []string{"out of subnets", "10.244.0.0/24", "8"})
}

// certificates are the files of a server certificate for one address, and of a
// CA that has nothing to do with it.
type certificates struct{ cert, key, foreign string }

func makeCertificates(t *testing.T, dir string, addr netip.Addr) certificates {
	t.Helper()
	self := func(name string) (certPEM, keyPEM []byte) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{addr.AsSlice()},
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		keyDER, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
	}
	c := certificates{filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "foreign.pem")}
	cert, key := self("etcd")
	foreign, _ := self("somebody else")
	for path, content := range map[string][]byte{c.cert: cert, c.key: key, c.foreign: foreign} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}
