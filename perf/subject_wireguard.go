package main

import (
	"bufio"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	wireGuardPort = 51820
	// wireGuardMTU is what wg-quick chooses on a 1500-byte underlay.
	wireGuardMTU = 1420
	// wireGuardSockets is where wireguard-go listens for its configuration.
	wireGuardSockets = "/var/run/wireguard"
)

// wireGuard is wireguard-go, configured over its socket.
type wireGuard struct{ path string }

func (w wireGuard) version(ctx context.Context, _ *bench) string {
	return versionOf(ctx, w.path, "--version")
}

func (w wireGuard) up(ctx context.Context, b *bench, p *pair, _ string) (*overlay, error) {
	o := &overlay{subject: peerWireGuard, pair: p}
	var keys [2]*ecdh.PrivateKey
	for side := range p.ns {
		var err error
		if keys[side], err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			return o, err
		}
		// The sockets of both sides are in one folder, so the names differ.
		o.dev[side] = fmt.Sprintf("wg%x%c", os.Getpid(), 'a'+side)
		socket := filepath.Join(wireGuardSockets, o.dev[side]+".sock")
		o.cleanup = append(o.cleanup, func() { os.Remove(socket) })
		if err := o.engine(b, side, w.path, "-f", o.dev[side]); err != nil {
			return o, err
		}
	}
	for side := range p.ns {
		config := wireGuardConfig(keys[side], keys[1-side].PublicKey(), 1-side)
		socket := filepath.Join(wireGuardSockets, o.dev[side]+".sock")
		err := o.waitUp(ctx, startLimit, func() error { return wireGuardSet(socket, config) })
		if err != nil {
			return o, err
		}
		if o.addr[side], err = o.configureTUN(side, wireGuardMTU); err != nil {
			return o, err
		}
	}
	return o, nil
}

// configureTUN gives the device of a side, which its engine has made, the MTU,
// the harness's overlay address and the route that comes with it.
func (o *overlay) configureTUN(side, mtu int) (netip.Addr, error) {
	addr := overlaySubnet(side).Addr().Next()
	l, err := o.pair.rt[side].LinkByName(o.dev[side])
	if err != nil {
		return addr, fmt.Errorf("%s: %w", o.dev[side], err)
	}
	if err := o.pair.rt[side].LinkSetMTU(l, mtu); err != nil {
		return addr, fmt.Errorf("mtu of %s: %w", o.dev[side], err)
	}
	return addr, o.pair.configure(side, o.dev[side], netip.PrefixFrom(addr, 16))
}

// wireGuardConfig is a request of WireGuard's cross-platform configuration
// protocol (wireguard.com/xplatform): one peer, which holds the other side's
// whole subnet.
func wireGuardConfig(own *ecdh.PrivateKey, peer *ecdh.PublicKey, other int) string {
	lines := []string{
		"set=1",
		"private_key=" + hex.EncodeToString(own.Bytes()),
		fmt.Sprintf("listen_port=%d", wireGuardPort),
		"replace_peers=true",
		"public_key=" + hex.EncodeToString(peer.Bytes()),
		fmt.Sprintf("endpoint=%s", netip.AddrPortFrom(underlayAddr[other], wireGuardPort)),
		"replace_allowed_ips=true",
		"allowed_ip=" + overlaySubnet(other).String(),
	}
	return strings.Join(lines, "\n") + "\n\n"
}

// wireGuardSet sends a request and reads the answer's error number.
func wireGuardSet(socket, request string) error {
	c, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte(request)); err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if answer = strings.TrimSpace(answer); answer != "errno=0" {
		return fmt.Errorf("wireguard-go: configuration refused: %s", answer)
	}
	return nil
}
