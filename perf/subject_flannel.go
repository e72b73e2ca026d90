package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"tweed/node"
	"tweed/tun"
)

const (
	// etcdForwardPort is where nodes reach etcd on their loopback.
	etcdForwardPort = 2379
	// startLimit is what a subject gets to come up, answerLimit how long the
	// first ping may take after that.
	startLimit  = 20 * time.Second
	answerLimit = 10 * time.Second
)

// onlyWorkers in place of a rung: no packet is carried inside the kernel.
const onlyWorkers = "workers"

// tweed is `tweed up` on both sides with an etcd that `tweed etcd` serves.
type tweed struct {
	name, framing, rung string
	// second is true for the binary of --against.
	second bool
}

func newTweed(name, framing, rung string, second bool) (subject, error) {
	if _, err := tun.ParseOffload(rung); strings.Contains(name, "@") && rung != onlyWorkers && err != nil {
		return nil, fmt.Errorf("--subjects %s: %w, or %s", name, err, onlyWorkers)
	}
	return tweed{name, framing, rung, second}, nil
}

// binary is the program and the extra flags to start it with.
func (t tweed) binary(b *bench) (path string, flags []string) {
	if t.second {
		return b.opt.against, strings.Fields(b.opt.againstFlags)
	}
	return b.tweed, strings.Fields(b.opt.tweedFlags)
}

func (t tweed) version(ctx context.Context, b *bench) string {
	path, flags := t.binary(b)
	version := versionOf(ctx, path, "version")
	if !t.second && b.commit != "" {
		version += ", commit " + b.commit
	}
	if len(flags) > 0 {
		version += ", " + strings.Join(flags, " ")
	}
	return version
}

func (t tweed) up(ctx context.Context, b *bench, p *pair, dir string) (*overlay, error) {
	o := &overlay{subject: t.name, pair: p, dev: [2]string{"tweed0", "tweed0"}}
	path, flags := t.binary(b)
	prefix := b.etcdPrefix()
	if _, err := b.output(ctx, nil, path, "network", "set", overlayNetwork, "--backend", t.framing,
		"--etcd-endpoints", "http://"+b.etcd, "--etcd-prefix", prefix); err != nil {
		return o, err
	}
	for side := range p.ns {
		if err := p.forwardTCP(side, etcdForwardPort, b.etcd); err != nil {
			return o, err
		}
		state := filepath.Join(dir, strconv.Itoa(side))
		if err := os.Mkdir(state, 0o700); err != nil {
			return o, err
		}
		args := []string{
			"up", "--etcd-endpoints", fmt.Sprintf("http://127.0.0.1:%d", etcdForwardPort), "--etcd-prefix", prefix,
			"--iface", underlayDev, "--tun-name", o.dev[side], "--state-dir", state, "--subnet-file", subnetFile(dir, side),
			"--iptables-forward-rules=false", "--log-level", "warn",
		}
		if side == 0 {
			o.capture = []string{path, "--state-dir", state}
		}
		if t.rung != "" {
			// A rung is about what the workers do.
			args = append(args, "--accelerate", "off")
			if t.rung != onlyWorkers {
				args = append(args, "--offload", t.rung)
			}
		}
		if err := o.engine(b, side, path, append(args, flags...)...); err != nil {
			return o, err
		}
	}
	o.past = func(side int) (counters, error) {
		return accelerated(filepath.Join(dir, strconv.Itoa(side), "api.sock"))
	}
	return o, o.waitSubnets(ctx, dir)
}

// accelerated asks an engine what its accelerator carried past the device.
func accelerated(socket string) (counters, error) {
	ctx, cancel := context.WithTimeout(context.Background(), answerLimit)
	defer cancel()
	c := node.Dial(socket)
	defer c.Close()
	s, err := c.Status(ctx)
	if err != nil {
		return counters{}, err
	}
	tx, rx := s.Ledger.Tx, s.Ledger.Rx
	return counters{
		txPackets: float64(tx.Accelerated), txBytes: float64(tx.AcceleratedBytes),
		rxPackets: float64(rx.Accelerated), rxBytes: float64(rx.AcceleratedBytes),
	}, nil
}

// flanneld is flannel's own daemon with its udp backend. Its vxlan backend is
// the kernel's vxlan, which is a subject already.
type flanneld struct{ path string }

func (f flanneld) version(ctx context.Context, _ *bench) string {
	return "udp backend, " + versionOf(ctx, f.path, "-version")
}

func (f flanneld) up(ctx context.Context, b *bench, p *pair, dir string) (*overlay, error) {
	o := &overlay{subject: peerFlanneld, pair: p, dev: [2]string{"flannel0", "flannel0"}}
	prefix := b.etcdPrefix()
	config := fmt.Sprintf(`{"Network":%q,"Backend":{"Type":"udp"}}`, overlayNetwork)
	if _, err := os.Stat("/proc/sys/net/bridge/bridge-nf-call-iptables"); err != nil {
		// flanneld refuses to start without that file, unless told to use nftables.
		config = fmt.Sprintf(`{"Network":%q,"EnableNFTables":true,"Backend":{"Type":"udp"}}`, overlayNetwork)
	}
	if err := etcdPut(ctx, b.etcd, prefix+"/config", config); err != nil {
		return o, err
	}
	for side := range p.ns {
		if err := p.forwardTCP(side, etcdForwardPort, b.etcd); err != nil {
			return o, err
		}
		if err := o.engine(b, side, f.path,
			fmt.Sprintf("-etcd-endpoints=http://127.0.0.1:%d", etcdForwardPort), "-etcd-prefix="+prefix,
			"-iface="+underlayDev, "-subnet-file="+subnetFile(dir, side),
			"-ip-masq=false", "-iptables-forward-rules=false"); err != nil {
			return o, err
		}
	}
	return o, o.waitSubnets(ctx, dir)
}

// subnetFile is where the engine of a side writes its subnet.
func subnetFile(dir string, side int) string {
	return filepath.Join(dir, fmt.Sprintf("subnet-%d.env", side))
}

// waitSubnets waits for the engines to write their subnets, and takes the
// overlay's addresses from them.
func (o *overlay) waitSubnets(ctx context.Context, dir string) error {
	return o.waitUp(ctx, startLimit, func() error {
		for side := range o.addr {
			text, err := os.ReadFile(subnetFile(dir, side))
			if err != nil {
				return err
			}
			if o.addr[side], err = subnetBase(string(text)); err != nil {
				return err
			}
		}
		return nil
	})
}

// subnetBase is the address of the TUN device of a node that wrote text as its
// subnet.env: the first of its subnet (flannel backend/udp).
func subnetBase(text string) (netip.Addr, error) {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "FLANNEL_SUBNET="); ok {
			p, err := netip.ParsePrefix(value)
			return p.Masked().Addr(), err
		}
	}
	return netip.Addr{}, errors.New("subnet file: no line FLANNEL_SUBNET=")
}

// startEtcd starts `tweed etcd` and sets b.etcd to its host and port.
func (b *bench) startEtcd(ctx context.Context) error {
	p, err := b.start(nil, "etcd", b.tweed, "etcd", "--listen-client", "http://127.0.0.1:0",
		"--data-dir", filepath.Join(b.dir, "etcd"))
	if err != nil {
		return err
	}
	b.cleanup = append(b.cleanup, func() { p.stop(stopGrace) })
	return waitFor(ctx, startLimit, func() error {
		if err := p.running(); err != nil {
			return &giveUp{err}
		}
		text, err := os.ReadFile(p.log)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if addr, ok := strings.CutPrefix(line, "http://"); ok && strings.HasSuffix(line, "\n") {
				b.etcd = strings.TrimSpace(addr)
				return nil
			}
		}
		return errors.New("tweed etcd: no endpoint yet")
	})
}

// etcdPrefix is a new key prefix, so that every subject starts with a network
// of its own in every round.
func (b *bench) etcdPrefix() string {
	b.prefixes++
	return fmt.Sprintf("/perf/%d", b.prefixes)
}

// etcdPut writes one key.
func etcdPut(ctx context.Context, addr, key, value string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{"http://" + addr}, Context: ctx})
	if err != nil {
		return fmt.Errorf("etcd %s: %w", addr, err)
	}
	defer c.Close()
	if _, err := c.Put(ctx, key, value); err != nil {
		return fmt.Errorf("etcd %s: put %s: %w", addr, key, err)
	}
	return nil
}
