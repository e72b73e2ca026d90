package lease

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
)

// bcryptMinCost is the lowest cost etcd takes.
const bcryptMinCost = 4

// authority makes certificates.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T, name string) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key, a.file, _ = a.issue(name, nil, &x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) issue(name string, parent *authority, tmpl *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, string, string) {
	a.t.Helper()
	must := func(err error) {
		if err != nil {
			a.t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	tmpl.SerialNumber = big.NewInt(time.Now().UnixNano())
	tmpl.Subject = pkix.Name{CommonName: name}
	tmpl.NotBefore, tmpl.BasicConstraintsValid = time.Now().Add(-time.Hour), true
	if tmpl.NotAfter.IsZero() {
		tmpl.NotAfter = time.Now().Add(time.Hour)
	}
	signer, signKey := tmpl, key
	if parent != nil {
		signer, signKey = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, signer, &key.PublicKey, signKey)
	must(err)
	cert, err := x509.ParseCertificate(der)
	must(err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	must(err)
	certFile, keyFile := filepath.Join(a.dir, name+".pem"), filepath.Join(a.dir, name+".key")
	must(os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600))
	return cert, key, certFile, keyFile
}

// leaf issues a certificate for 127.0.0.1, for servers and clients.
func (a *authority) leaf(name string, notAfter time.Time) (certFile, keyFile string) {
	_, _, certFile, keyFile = a.issue(name, a, &x509.Certificate{
		NotAfter:    notAfter,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	return certFile, keyFile
}

// secureEtcd starts an etcd with TLS; clientCA asks clients for a certificate.
func secureEtcd(t *testing.T, certFile, keyFile, clientCA string) string {
	t.Helper()
	client, peer, err := freePorts()
	if err != nil {
		t.Fatal(err)
	}
	s := &etcdServer{dir: t.TempDir(), endpoint: "https://" + client}
	err = s.start(peer, func(c *embed.Config) {
		c.ClientTLSInfo.CertFile, c.ClientTLSInfo.KeyFile = certFile, keyFile
		if clientCA != "" {
			c.ClientTLSInfo.TrustedCAFile, c.ClientTLSInfo.ClientCertAuth = clientCA, true
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	return s.endpoint
}

func TestTLSWithACAFileAlone(t *testing.T) {
	t.Parallel()
	ours, theirs := newAuthority(t, "ours"), newAuthority(t, "theirs")
	cert, key := ours.leaf("server", time.Time{})
	endpoint := secureEtcd(t, cert, key, "")
	open := func(cfg EtcdConfig) *Registry {
		cfg.Endpoints, cfg.Log = []string{endpoint}, quiet
		r, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		r.readTimeout = 500 * time.Millisecond
		t.Cleanup(func() { r.Close() })
		return r
	}
	if err := open(EtcdConfig{CAFile: ours.file}).WriteNetworkConfig(t.Context(), genericConfig(t)); err != nil {
		t.Errorf("CA file alone: %v", err)
	}
	for _, cfg := range []EtcdConfig{{CAFile: theirs.file}, {}} {
		m := NewManager(ManagerConfig{Registry: open(cfg), NodeID: "a", PublicIP: testIP(1), Log: quiet})
		_, err := m.AwaitConfig(t.Context())
		if !errors.Is(err, ErrAccess) || !strings.Contains(err.Error(), "signed by an authority that is not trusted here: give its CA with --etcd-cafile") {
			t.Errorf("%+v: got %v", cfg, err)
		}
	}
	plain := strings.Replace(endpoint, "https://", "http://", 1)
	r, err := Open(EtcdConfig{Endpoints: []string{plain}, CAFile: ours.file, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	r.readTimeout = 500 * time.Millisecond
	eventually(t, func() string {
		if _, err := r.ReadNetworkConfig(t.Context()); !errors.Is(err, ErrAccess) || !strings.Contains(err.Error(), "it wants TLS: write https://") {
			return fmt.Sprintf("plain HTTP: got %v", err)
		}
		return ""
	})
	// The right CA is put in place under a registry that is open: no restart.
	file := filepath.Join(t.TempDir(), "ca.pem")
	copyFile(t, theirs.file, file)
	r = open(EtcdConfig{CAFile: file})
	eventually(t, func() string {
		if _, err := r.ReadNetworkConfig(t.Context()); !errors.Is(err, ErrAccess) {
			return fmt.Sprintf("wrong CA: got %v", err)
		}
		return ""
	})
	copyFile(t, ours.file, file)
	eventually(t, func() string {
		if _, err := r.ReadNetworkConfig(t.Context()); err != nil {
			return fmt.Sprintf("after the CA file was replaced: %v", err)
		}
		return ""
	})
}

func TestTLSClientCertificatesAndBadServerCertificates(t *testing.T) {
	t.Parallel()
	ours, theirs := newAuthority(t, "ours"), newAuthority(t, "theirs")
	cert, key := ours.leaf("server", time.Time{})
	mutual := secureEtcd(t, cert, key, ours.file)
	good, goodKey := ours.leaf("client", time.Time{})
	bad, badKey := theirs.leaf("client", time.Time{})
	oldCert, oldKey := ours.leaf("old", time.Now().Add(-time.Minute))
	expired := secureEtcd(t, oldCert, oldKey, "")
	for _, tc := range []struct {
		endpoint string
		cfg      EtcdConfig
		want     string
	}{
		{mutual, EtcdConfig{CAFile: ours.file, CertFile: good, KeyFile: goodKey}, ""},
		{mutual, EtcdConfig{CAFile: ours.file}, "wants a client certificate"},
		{mutual, EtcdConfig{CAFile: ours.file, CertFile: bad, KeyFile: badKey}, "certificate"},
		{expired, EtcdConfig{CAFile: ours.file}, "certificate is not valid"},
	} {
		tc.cfg.Endpoints, tc.cfg.Log = []string{tc.endpoint}, quiet
		r, err := Open(tc.cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		r.readTimeout = time.Second
		eventually(t, func() string {
			_, _, err := r.ListLeases(t.Context())
			if tc.want == "" && err != nil || tc.want != "" && (!errors.Is(err, ErrAccess) || !strings.Contains(err.Error(), tc.want)) {
				return fmt.Sprintf("%+v: got %v, want %s", tc.cfg, err, tc.want)
			}
			return ""
		})
	}
}

func TestPasswordsAndPermissions(t *testing.T) {
	t.Parallel()
	// The check of a password is slow on purpose; as fast as possible here.
	w := newWorldAt(t, ownEtcd(t, func(c *embed.Config) { c.BcryptCost = bcryptMinCost }).endpoint)
	w.config(config16)
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(w.etcd.UserAdd(w.ctx(), "root", "r"))
	must(w.etcd.UserGrantRole(w.ctx(), "root", "root"))
	must(w.etcd.UserAdd(w.ctx(), "node", "secret"))
	must(w.etcd.UserAdd(w.ctx(), "guest", "g"))
	must(w.etcd.RoleAdd(w.ctx(), "overlay"))
	must(w.etcd.RoleGrantPermission(w.ctx(), "overlay", w.prefix+"/", clientv3.GetPrefixRangeEnd(w.prefix+"/"), clientv3.PermissionType(clientv3.PermReadWrite)))
	must(w.etcd.UserGrantRole(w.ctx(), "node", "overlay"))
	must(w.etcd.AuthEnable(w.ctx()))

	open := func(user, password string) *Registry {
		r, err := Open(EtcdConfig{Endpoints: []string{w.endpoint}, Prefix: w.prefix, Username: user, Password: password, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		return r
	}
	for _, tc := range []struct{ user, password, want string }{
		{"node", "wrong", `wrong user name or password for user "node": check --etcd-username and --etcd-password`},
		{"nobody", "x", `wrong user name or password for user "nobody"`},
		{"", "", "it asks for a user: give --etcd-username and --etcd-password"},
		{"guest", "g", `user "guest" may not read and write ` + w.prefix + "/: grant its role readwrite"},
	} {
		m := w.node(1, func(c *ManagerConfig) { c.Registry = open(tc.user, tc.password) })
		if _, err := m.AwaitConfig(w.ctx()); !errors.Is(err, ErrAccess) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %s", tc.user, err, tc.want)
		}
	}
	// A role for the overlay's own prefix alone is enough for everything.
	r := w.run(w.node(1, func(c *ManagerConfig) { c.Registry = open("node", "secret") }))
	own := r.State().Own
	if _, _, err := r.reg.ListLeases(w.ctx()); err != nil {
		t.Error(err)
	}
	other := w.run(w.node(2, func(c *ManagerConfig) { c.Registry = open("node", "secret") }))
	r.until("the other", hasPeer(other.State().Own.Subnet.String()))
	r.stop()
	if err := r.Release(w.ctx()); err != nil {
		t.Error(err)
	}
	other.until("it gone", lacksPeer(own.Subnet.String()))
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}
