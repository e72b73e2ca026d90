package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"tweed/netstack"
)

// withProxy runs the command on this host's network with a proxy into the
// overlay in its environment: the tier for hosts that allow no user namespaces.
func (r *runner) withProxy(ctx context.Context, why string) error {
	if r.options.keepID || r.options.resolvConf != "" {
		return fmt.Errorf("run: --keep-id and --resolv-conf need a namespace: %s", why)
	}
	p := &proxies{log: slog.New(slog.NewTextHandler(r.stderr, &slog.HandlerOptions{Level: slog.LevelWarn})), out: io.Discard}
	if r.options.verbose {
		p.out = r.stderr
	}
	defer p.close()
	if err := p.listen(proxyOptions{socks: "127.0.0.1:0", http: "127.0.0.1:0"}); err != nil {
		return err
	}
	if err := p.start(ctx, netstack.Config{Engine: r.engine, Name: r.options.name, Addr: r.want.Addr}, nil, nil); err != nil {
		return err
	}
	if r.options.tier != "netstack" {
		fmt.Fprintf(r.stderr, "tweed: run: no namespace for the command, so it gets a proxy into the overlay instead (tier netstack): %s\n", why)
	}
	p.print()
	cmd := exec.Command(r.path, r.args[1:]...)
	cmd.Args[0] = r.args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(commandEnvironment(os.Environ()), proxyEnvironment(p)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run: %w", err)
	}
	r.signals.to(cmd.Process)
	_ = cmd.Wait() // its status says it
	return statusOf(cmd)
}

// proxyEnvironment is what programs look for, in both spellings.
func proxyEnvironment(p *proxies) []string {
	socks, http := "socks5h://"+p.socks.Addr().String(), "http://"+p.http.Addr().String()
	return []string{
		"ALL_PROXY=" + socks, "all_proxy=" + socks,
		"HTTP_PROXY=" + http, "http_proxy=" + http,
		"HTTPS_PROXY=" + http, "https_proxy=" + http,
		"TWEED_ADDRESS=" + p.net.Addr().String(),
	}
}
