package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
)

const (
	nebulaPort = 4242
	nebulaDev  = "nebula1"
	// nebulaMTU is the underlay's less IPv4, UDP, nebula's header and its tag:
	// larger than nebula's cautious default of 1300.
	nebulaMTU = underlayMTU - 60
)

// nebula is nebula with two hosts that know each other's address, no
// lighthouse, and a firewall that lets everything through.
type nebula struct {
	path string
	// cert is nebula-cert, which makes the certificates.
	cert string
}

// newNebula looks for nebula-cert beside nebula, then on PATH.
func newNebula(path string) (subject, error) {
	beside := filepath.Join(filepath.Dir(path), "nebula-cert")
	cert, err := exec.LookPath(beside)
	if err != nil {
		cert, err = exec.LookPath("nebula-cert")
	}
	if err != nil {
		return nil, fmt.Errorf("nebula: needs nebula-cert for its certificates: expected it as %s or on PATH", beside)
	}
	return nebula{path, cert}, nil
}

func (n nebula) version(ctx context.Context, _ *bench) string {
	return versionOf(ctx, n.path, "-version")
}

func (n nebula) up(ctx context.Context, b *bench, p *pair, dir string) (*overlay, error) {
	o := &overlay{subject: peerNebula, pair: p, dev: [2]string{nebulaDev, nebulaDev}}
	in := func(name string) string { return filepath.Join(dir, name) }
	if _, err := b.output(ctx, nil, n.cert, "ca", "-name", "tweed perf",
		"-out-crt", in("ca.crt"), "-out-key", in("ca.key")); err != nil {
		return o, err
	}
	for side := range p.ns {
		o.addr[side] = overlaySubnet(side).Addr().Next()
		host := fmt.Sprintf("host%d", side)
		if _, err := b.output(ctx, nil, n.cert, "sign", "-ca-crt", in("ca.crt"), "-ca-key", in("ca.key"),
			"-name", host, "-ip", netip.PrefixFrom(o.addr[side], 16).String(),
			"-out-crt", in(host+".crt"), "-out-key", in(host+".key")); err != nil {
			return o, err
		}
	}
	for side := range p.ns {
		config := in(fmt.Sprintf("host%d.yml", side))
		if err := os.WriteFile(config, []byte(nebulaConfig(dir, side, o.addr[1-side])), 0o600); err != nil {
			return o, err
		}
		if err := o.engine(b, side, n.path, "-config", config); err != nil {
			return o, err
		}
	}
	return o, o.waitUp(ctx, startLimit, func() error {
		for side := range p.ns {
			if _, err := p.rt[side].LinkByName(nebulaDev); err != nil {
				return fmt.Errorf("%s: %w", nebulaDev, err)
			}
		}
		return nil
	})
}

// nebulaConfig is the configuration file of one side.
func nebulaConfig(dir string, side int, other netip.Addr) string {
	return fmt.Sprintf(`pki:
  ca: %[1]s/ca.crt
  cert: %[1]s/host%[2]d.crt
  key: %[1]s/host%[2]d.key
static_host_map:
  "%[3]s": ["%[4]s:%[5]d"]
lighthouse:
  am_lighthouse: false
listen:
  host: %[6]s
  port: %[5]d
tun:
  dev: %[7]s
  mtu: %[8]d
logging:
  level: warning
firewall:
  outbound:
    - {port: any, proto: any, host: any}
  inbound:
    - {port: any, proto: any, host: any}
`, dir, side, other, underlayAddr[1-side], nebulaPort, underlayAddr[side], nebulaDev, nebulaMTU)
}
