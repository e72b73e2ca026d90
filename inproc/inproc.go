// Package inproc runs overlay nodes inside a program, for tests of software
// that talks over an overlay: real nodes, real framing and real UDP between
// them, real leases in a real etcd, and no privilege, no namespace and nothing
// left behind.
//
// A [Network] holds an etcd and any number of nodes, each on a loopback address
// of its own. A [Node] has an address in the overlay and the functions of
// package net to use it with.
//
//	network, err := inproc.NewNetwork(inproc.NetworkConfig{})
//	a, err := network.Start(ctx, "a")
//	b, err := network.Start(ctx, "b")
//	l, err := b.Listen("tcp", ":80")
//	c, err := a.Dial(ctx, "tcp", l.Addr().String())
//
// [Start] joins a network that is there already, such as a flannel cluster's.
package inproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"

	"tweed/encap"
	"tweed/engine/impair"
	"tweed/lease"
	"tweed/netstack"
	"tweed/node"
	"tweed/tun"
)

// Config describes one node.
type Config struct {
	// EtcdEndpoints and EtcdPrefix say where the network is, as node.Config does.
	EtcdEndpoints []string
	EtcdPrefix    string
	// Name is the node's name in its lease.
	Name string
	// Underlay is the local IPv4 address the node sends from and is reached at;
	// the zero value takes a loopback address nobody uses.
	Underlay netip.Addr
	// MTU is the overlay's MTU as --mtu takes it: empty derives it from the
	// underlay's, which for loopback is very large.
	MTU string
	// Impair treats what the node sends as a bad network would.
	Impair impair.Spec
	// StateDir keeps the node's identity for another Start; empty forgets it.
	StateDir string
	// Framings to receive; empty means the network's own.
	Framings []encap.Framing
	// Log receives the node's events; nil discards them.
	Log *slog.Logger
}

// Node is a running node with one address in the overlay. Beside what it has
// from netstack.Net it can attach more. Its methods are safe for concurrent use.
type Node struct {
	*netstack.Net
	// Node is the node itself, for its attachments.
	Node *node.Node
	stop context.CancelFunc
	done chan struct{}
	err  error
	dir  string // to be removed
}

// loopbackTries bounds the search for a free loopback address.
const loopbackTries = 16

// Start starts a node and waits until it forwards, or ctx ends.
func Start(ctx context.Context, c Config) (*Node, error) {
	if c.Underlay.IsValid() {
		return start(ctx, c)
	}
	var err error
	for range loopbackTries {
		c.Underlay = netip.AddrFrom4([4]byte{127, byte(64 + rand.IntN(64)), byte(rand.IntN(256)), byte(1 + rand.IntN(254))})
		var n *Node
		if n, err = start(ctx, c); err == nil {
			return n, nil
		}
		if ctx.Err() != nil || !errors.Is(err, lease.ErrPublicIPTaken) {
			return nil, err
		}
	}
	return nil, err
}

func start(ctx context.Context, c Config) (*Node, error) {
	n := &Node{done: make(chan struct{})}
	if c.StateDir == "" {
		dir, err := os.MkdirTemp("", "tweed-")
		if err != nil {
			return nil, fmt.Errorf("inproc: %w", err)
		}
		c.StateDir, n.dir = dir, dir
	}
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	var err error
	n.Node, err = node.New(node.Config{
		EtcdEndpoints: c.EtcdEndpoints, EtcdPrefix: c.EtcdPrefix, NodeName: c.Name,
		Iface: []string{c.Underlay.String()}, MTU: c.MTU, ListenFramings: c.Framings,
		AttachOnly: true, Workers: 1, Offload: tun.OffloadAuto, Impair: c.Impair, StateDir: c.StateDir, ReleaseOnExit: n.dir != "",
		Program: "inproc", Log: c.Log,
	})
	if err != nil {
		n.removeDir()
		return nil, fmt.Errorf("inproc: %w", err)
	}
	var running context.Context
	running, n.stop = context.WithCancel(context.Background())
	go func() {
		defer close(n.done)
		n.err = n.Node.Run(running)
	}()
	select {
	case <-n.Node.Ready():
	case <-n.done:
		n.stop()
		n.removeDir()
		return nil, fmt.Errorf("inproc: %w", n.err)
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("inproc: the node is not ready: %w", context.Cause(ctx)), n.Close())
	}
	if n.Net, err = netstack.New(ctx, netstack.Config{Engine: n.Node, Name: "self"}); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// Close ends all connections, stops the node and, unless it has a StateDir,
// gives its lease back.
func (n *Node) Close() error {
	var err error
	if n.Net != nil {
		err = n.Net.Close()
	}
	n.stop()
	<-n.done
	n.removeDir()
	return errors.Join(err, n.err)
}

func (n *Node) removeDir() {
	if n.dir != "" {
		_ = os.RemoveAll(n.dir)
	}
}
