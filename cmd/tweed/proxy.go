package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/cmd/internal/daemon"
	"tweed/netstack"
	"tweed/node"
	"tweed/proxy"
)

// proxyOptions are what the command line says beside the engine's flags.
type proxyOptions struct {
	socks, http   string
	local, remote []string
	name, address string
}

func newProxyCommand() *cobra.Command {
	var flags daemon.Flags
	var o proxyOptions
	cmd := &cobra.Command{
		Use:     "proxy",
		Short:   "Reach the overlay from programs of this host, by SOCKS5, HTTP or port forwards",
		GroupID: groupAttach,
		Long: `proxy is an address of the overlay without any interface (tier netstack): a
network stack inside this program. Programs reach the overlay through it by
SOCKS5 or HTTP; addresses outside of the overlay are dialled from this host, so
one proxy setting does for both. It runs until SIGINT or SIGTERM.

-L lets programs of this host reach one port in the overlay, -R lets the overlay
reach one port from this host. The engine is found, or started, as by tweed run.
At its end it prints what it has counted; tweed ps shows that meanwhile.`,
		Example: `  tweed proxy --socks5 127.0.0.1:1080 --http 127.0.0.1:3128
  tweed proxy --socks5 unix:/run/user/1000/overlay.sock
  tweed proxy -L 8080:10.244.7.2:80 -R 22:127.0.0.1:22`,
		Args: noArgs,
	}
	fs := flag.NewFlagSet("proxy", flag.ContinueOnError)
	flags.Register(fs, upDefaults)
	cmd.Flags().AddGoFlagSet(fs)
	_ = cmd.Flags().MarkHidden("subnet-file")
	cmd.Flags().StringVar(&o.socks, "socks5", "", "serve SOCKS5 at this `address`, HOST:PORT or unix:PATH")
	cmd.Flags().StringVar(&o.http, "http", "", "serve an HTTP proxy at this `address`, HOST:PORT or unix:PATH")
	cmd.Flags().StringArrayVarP(&o.local, "local", "L", nil, "`[BIND:]PORT:HOST:HOSTPORT`: connections to PORT here go to HOST in the overlay; repeatable")
	cmd.Flags().StringArrayVarP(&o.remote, "remote", "R", nil, "`PORT:HOST:HOSTPORT`: connections to PORT of our overlay address go to HOST as seen from here; repeatable")
	cmd.Flags().StringVar(&o.name, "name", "", "`name` for tweed ps")
	cmd.Flags().StringVar(&o.address, "address", "", "ask for this `address` of the node's subnet")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var want node.AttachRequest
		if err := parseAddress(o.address, &want); err != nil {
			return newUsageError(cmd, err)
		}
		local, remote, err := o.forwards()
		if err != nil {
			return newUsageError(cmd, err)
		}
		cfg, err := flags.Config()
		if err != nil {
			return newUsageError(cmd, err)
		}
		log, err := daemon.NewLogger(cmd.ErrOrStderr(), flags.LogLevel(), flags.LogFormat())
		if err != nil {
			return newUsageError(cmd, err)
		}
		tuneForCopying()
		p := &proxies{log: log, out: cmd.OutOrStdout()}
		defer p.close()
		if err := p.listen(o); err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
		defer stop()
		e, err := findEngine(ctx, cmd, fs, cfg)
		defer e.close()
		if err == nil {
			err = p.start(ctx, netstack.Config{Engine: e, Name: o.name, Addr: want.Addr}, local, remote)
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		p.print()
		<-ctx.Done()
		return nil
	}
	return cmd
}

// tuneForCopying sets the runtime up for a program that mostly copies, beside an
// engine and the programs it copies for: on more than half of the processors,
// goroutines only chase each other between threads. The environment is heeded first.
func tuneForCopying() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(1, runtime.NumCPU()/2))
	}
}

// forwards reads -L and -R.
func (o *proxyOptions) forwards() (local, remote []proxy.Forward, err error) {
	for _, s := range o.local {
		f, err := proxy.ParseForward(s, "127.0.0.1")
		if err != nil {
			return nil, nil, fmt.Errorf("--local %w", err)
		}
		local = append(local, f)
	}
	for _, s := range o.remote {
		f, err := proxy.ParseForward(s, "")
		if err != nil {
			return nil, nil, fmt.Errorf("--remote %w", err)
		}
		remote = append(remote, f)
	}
	for _, l := range [][2]string{{"--socks5", o.socks}, {"--http", o.http}} {
		if l[1] == "" {
			continue
		}
		if err := proxy.CheckAddress(l[1]); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", l[0], err)
		}
	}
	if o.socks == "" && o.http == "" && local == nil && remote == nil {
		return nil, nil, errors.New("expected at least one of --socks5, --http, -L and -R")
	}
	return local, remote, nil
}

// proxies are the servers around one netstack.
type proxies struct {
	log         *slog.Logger
	out         io.Writer
	socks, http net.Listener
	net         *netstack.Net
	closers     []io.Closer
	lines       []string
}

// listen opens the proxies' listeners, before anything is attached.
func (p *proxies) listen(o proxyOptions) (err error) {
	for _, l := range []struct {
		flag, address string
		to            *net.Listener
	}{{"--socks5", o.socks, &p.socks}, {"--http", o.http, &p.http}} {
		if l.address == "" {
			continue
		}
		if *l.to, err = proxy.Listen(l.address); err != nil {
			return fmt.Errorf("%s %s: %w", l.flag, l.address, err)
		}
		p.closers = append(p.closers, *l.to)
	}
	return nil
}

// start attaches and serves.
func (p *proxies) start(ctx context.Context, c netstack.Config, local, remote []proxy.Forward) error {
	c.Lost = func(err error) {
		if err != nil {
			p.log.Warn("no engine; waiting for it to come back", "err", err)
		} else {
			p.log.Info("attached again")
		}
	}
	var err error
	if p.net, err = netstack.New(ctx, c); err != nil {
		return err
	}
	p.closers = append(p.closers, p.net)
	dialer := &netstack.Dialer{Net: p.net}
	p.say("%s", "attached: "+p.net.Addr().String()+fmt.Sprintf(", MTU %d, tier netstack, network %s", p.net.MTU(), p.net.Network()))
	if p.socks != nil {
		p.add(proxy.ServeSOCKS5(p.socks, dialer.DialContext, p.log))
		p.say("SOCKS5 at %s", p.socks.Addr())
	}
	if p.http != nil {
		p.add(proxy.ServeHTTP(p.http, dialer.DialContext, p.log))
		p.say("HTTP proxy at %s", p.http.Addr())
	}
	for _, f := range local {
		l, err := proxy.Listen(f.Listen)
		if err != nil {
			return fmt.Errorf("--local: %w", err)
		}
		p.add(proxy.ServeForward(l, dialer.DialContext, f.To, p.log))
		p.say("%s leads to %s in the overlay", l.Addr(), f.To)
	}
	var host net.Dialer
	for _, f := range remote {
		l, err := p.net.Listen("tcp", f.Listen)
		if err != nil {
			return fmt.Errorf("--remote %s: %w", f.Listen, err)
		}
		p.add(proxy.ServeForward(l, host.DialContext, f.To, p.log))
		p.say("%s in the overlay leads to %s", l.Addr(), f.To)
	}
	return nil
}

func (p *proxies) add(c io.Closer) { p.closers = append(p.closers, c) }

func (p *proxies) say(format string, args ...any) {
	p.lines = append(p.lines, fmt.Sprintf(format, args...))
}

func (p *proxies) print() {
	for _, l := range p.lines {
		fmt.Fprintln(p.out, l)
	}
}

// close ends everything, the last first.
func (p *proxies) close() {
	for i := len(p.closers) - 1; i >= 0; i-- {
		_ = p.closers[i].Close() // listeners are closed by their servers already
	}
	p.closers = nil
	if p.net != nil {
		fmt.Fprintln(p.out, "packets:", p.net.Stats())
	}
}

// Attach implements netstack.Engine.
func (e *engineProcess) Attach(ctx context.Context, r node.AttachRequest) (node.AttachmentStatus, error) {
	return e.attach(ctx, r)
}

// Detach implements netstack.Engine.
func (e *engineProcess) Detach(ctx context.Context, name string) error {
	return e.api.Detach(ctx, name)
}
