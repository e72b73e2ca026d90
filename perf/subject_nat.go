package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// natDev is the interface pasta and slirp4netns make in a container.
const natDev = "tap0"

// pasta is one pasta for each container, as its users join them: the first
// container reaches the machine's loopback by the address of the gateway, where
// the other's pasta forwards a port. splice uses -T instead, by which the
// first container's own loopback leads there, without any packet.
type pasta struct {
	path   string
	splice bool
}

func (p pasta) version(ctx context.Context, _ *bench) string {
	how := "gateway address to forwarded port, "
	if p.splice {
		how = "loopback to loopback (-T), "
	}
	return how + versionOf(ctx, p.path, "--version")
}

func (p pasta) up(ctx context.Context, b *bench, pr *pair, _ string) (*overlay, error) {
	port := strconv.Itoa(iperf3Port)
	o := &overlay{subject: subjectPasta, pair: pr, dev: [2]string{natDev, ""}}
	o.way = &way{ns: pr.ns, to: underlayAddr[1].String(), port: iperf3Port, listen: "0.0.0.0", mtu: containerMTU}
	out := "none"
	if p.splice {
		o.subject, o.dev[0], o.way.to, out = subjectSplice, "", "127.0.0.1", port
	}
	for side := range pr.ns {
		in := "none"
		if side == 1 {
			in, out = port, "none"
		}
		if err := o.program(b, fmt.Sprintf("%s-%d", o.subject, side), p.path, "-f", "--config-net", "-m", strconv.Itoa(containerMTU),
			"-I", natDev, "-t", in, "-T", out, "-u", "none", "-U", "none", strconv.Itoa(pr.containers[side].pid())); err != nil {
			return o, err
		}
		if err := o.waitDevice(ctx, side); err != nil {
			return o, err
		}
	}
	return o, nil
}

// waitDevice waits until a container's interface has an address.
func (o *overlay) waitDevice(ctx context.Context, side int) error {
	return o.waitUp(ctx, startLimit, func() error {
		l, err := o.pair.rt[side].LinkByName(natDev)
		if err != nil {
			return fmt.Errorf("%s: %w", natDev, err)
		}
		addrs, err := o.pair.rt[side].AddrList(l, unix.AF_INET)
		if err == nil && len(addrs) == 0 {
			err = fmt.Errorf("%s has no address", natDev)
		}
		return err
	})
}

// slirp is one slirp4netns for each container, joined in the same way.
type slirp struct{ path string }

func (s slirp) version(ctx context.Context, _ *bench) string {
	return versionOf(ctx, s.path, "--version")
}

// Addresses inside a container of slirp4netns (its manual, "DESCRIPTION").
const (
	slirpHost  = "10.0.2.2"
	slirpGuest = "10.0.2.100"
)

func (s slirp) up(ctx context.Context, b *bench, pr *pair, dir string) (*overlay, error) {
	o := &overlay{subject: subjectSlirp, pair: pr, dev: [2]string{natDev, natDev}}
	o.way = &way{ns: pr.ns, to: slirpHost, port: iperf3Port, listen: slirpGuest}
	for side := range pr.ns {
		api := filepath.Join(dir, fmt.Sprintf("slirp%d.sock", side))
		if err := o.program(b, fmt.Sprintf("slirp4netns-%d", side), s.path, "-c", "-m", strconv.Itoa(containerMTU), "-a", api,
			strconv.Itoa(pr.containers[side].pid()), natDev); err != nil {
			return o, err
		}
		if err := o.waitDevice(ctx, side); err != nil {
			return o, err
		}
		if side == 1 {
			if err := o.waitUp(ctx, startLimit, func() error { return slirpForward(api) }); err != nil {
				return o, err
			}
		}
	}
	return o, nil
}

// slirpForward asks slirp4netns to forward the port from the machine's loopback.
func slirpForward(api string) error {
	c, err := net.Dial("unix", api)
	if err != nil {
		return err
	}
	defer c.Close()
	request, err := json.Marshal(map[string]any{"execute": "add_hostfwd", "arguments": map[string]any{
		"proto": "tcp", "host_addr": "127.0.0.1", "host_port": iperf3Port, "guest_addr": slirpGuest, "guest_port": iperf3Port,
	}})
	if err != nil {
		return err
	}
	if _, err := c.Write(request); err != nil {
		return err
	}
	if err := c.(*net.UnixConn).CloseWrite(); err != nil {
		return err
	}
	var answer struct {
		Return map[string]any
		Error  any
	}
	if err := json.NewDecoder(bufio.NewReader(c)).Decode(&answer); err != nil {
		return fmt.Errorf("slirp4netns: %w", err)
	}
	if answer.Error != nil {
		return fmt.Errorf("slirp4netns: add_hostfwd: %v", answer.Error)
	}
	return nil
}
