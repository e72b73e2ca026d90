package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/attach"
	"tweed/cmd/internal/daemon"
	"tweed/netns"
	"tweed/node"
)

// Exit statuses of a command that could not be run, as shells have them.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// runInit is the first argument of the process that waits inside the new
// namespaces for the network, and then becomes the command.
const runInit = "__run-init"

// gateFD is where it waits: one byte is the go-ahead, a hang-up the opposite.
const gateFD = 3

// exitStatus ends the process with a status and no message.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// runOptions are what the command line says beside the engine's flags.
type runOptions struct {
	name, address, ifName, tier, resolvConf string
	keepID, verbose                         bool
}

func newRunCommand() *cobra.Command {
	var flags daemon.Flags
	var o runOptions
	cmd := &cobra.Command{
		Use:     "run [flags] [--] COMMAND [ARGUMENT...]",
		Short:   "Run a command in a network namespace on the overlay",
		GroupID: groupAttach,
		Long: `run starts COMMAND in a user and a network namespace of its own, with an
address of the overlay. No privilege is needed. The exit status is COMMAND's,
or 128 plus the number of the signal that ended it.

The engine of this user that is running is used; if there is none, run starts
one, without any capability, for as long as a command needs it. The flags about
etcd, underlay and so on are for that engine, and are those of tweed up.

COMMAND reaches the overlay and nothing else. Where user namespaces are
forbidden, COMMAND runs beside the network of this host instead and is given a
proxy into the overlay by its environment (tier netstack).`,
		Example: `  tweed run --etcd-endpoints http://10.0.0.5:2379 -- iperf3 -s
  tweed run -- curl http://10.244.7.2:8080/`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return newUsageError(cmd, errors.New("expected a command to run; type: tweed run -- COMMAND"))
			}
			return nil
		},
	}
	fs := flag.NewFlagSet("run", flag.ContinueOnError)
	flags.Register(fs, upDefaults)
	cmd.Flags().AddGoFlagSet(fs)
	cmd.Flags().SetInterspersed(false)
	// A file of a command that is gone in a moment would mislead others.
	_ = cmd.Flags().MarkHidden("subnet-file")
	cmd.Flags().StringVar(&o.name, "name", "", "`name` for tweed ps (default: pid-PID)")
	cmd.Flags().StringVar(&o.address, "address", "", "ask for this `address` of the node's subnet")
	cmd.Flags().StringVar(&o.ifName, "ifname", node.DefaultIfName, "`name` of the interface inside")
	cmd.Flags().StringVar(&o.tier, "tier", "auto", "force a `tier`: tun, veth or netstack (default: the best that works)")
	cmd.Flags().BoolVar(&o.keepID, "keep-id", false, "be the same user inside, instead of root")
	cmd.Flags().StringVar(&o.resolvConf, "resolv-conf", "", "`file` to use as /etc/resolv.conf inside")
	cmd.Flags().BoolVarP(&o.verbose, "verbose", "v", false, "say on stderr what address and tier the command got")
	completeWords(cmd, "tier", "auto", "tun", "veth", "netstack")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		tier, err := attach.ParseTier(o.tier)
		if err != nil {
			return newUsageError(cmd, fmt.Errorf("--tier %q: expected auto, tun, veth or netstack", o.tier))
		}
		want := node.AttachRequest{Name: o.name, IfName: o.ifName, Tier: o.tier}
		if err := parseAddress(o.address, &want); err != nil {
			return newUsageError(cmd, err)
		}
		cfg, err := flags.Config()
		if err != nil {
			return newUsageError(cmd, err)
		}
		path, unfound, err := lookCommand(args[0])
		if err != nil {
			fmt.Fprintln(cmd.ErrOrStderr(), "tweed:", err)
			return unfound
		}
		ctx, cancel := context.WithCancelCause(cmd.Context())
		defer cancel(nil)
		signals := relaySignals(func(s syscall.Signal) { cancel(exitStatus(128 + int(s))) })
		defer signals.stop()
		e, err := findEngine(ctx, cmd, fs, cfg)
		defer e.close()
		if err == nil {
			r := &runner{options: o, want: want, engine: e, signals: signals, path: path, args: args, stderr: cmd.ErrOrStderr()}
			err = r.run(ctx, tier)
		}
		var status exitStatus
		if errors.As(context.Cause(ctx), &status) {
			return status
		}
		return err
	}
	return cmd
}

// lookCommand finds the program as a shell would.
func lookCommand(name string) (path string, status exitStatus, err error) {
	path, err = exec.LookPath(name)
	switch {
	case err == nil:
		if path, err = filepath.Abs(path); err == nil {
			return path, 0, nil
		}
		return "", exitNotFound, err
	case errors.Is(err, os.ErrPermission):
		return "", exitNotExecutable, fmt.Errorf("run: %s: permission denied", name)
	}
	return "", exitNotFound, fmt.Errorf("run: %s: no such command", name)
}

// runner runs one command.
type runner struct {
	options runOptions
	want    node.AttachRequest
	engine  *engineProcess
	signals *signalRelay
	path    string
	args    []string
	stderr  io.Writer
}

func (r *runner) run(ctx context.Context, tier attach.Tier) error {
	if tier == attach.TierNetstack {
		return r.withProxy(ctx, "asked for with --tier netstack")
	}
	gate, cmd, err := r.contain()
	if err != nil {
		return err
	}
	// The command's Pdeathsig follows this thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		gate.Close()
		err = netns.ExplainUserNamespace(err)
		if tier == attach.TierAuto {
			return r.withProxy(ctx, daemon.ErrorLine(err))
		}
		return err
	}
	s, err := r.attach(ctx, cmd.Process.Pid)
	if err != nil {
		gate.Close() // the child ends without running anything
		_ = cmd.Wait()
		return err
	}
	if r.options.verbose {
		printAttached(r.stderr, s)
	}
	r.signals.to(cmd.Process)
	guard := startGuard(ctx, r.engine, cmd.Process.Pid, r.path, r.stderr)
	_, err = gate.Write([]byte{1})
	gate.Close()
	werr := cmd.Wait()
	guard.stop()
	if err != nil && werr == nil {
		return fmt.Errorf("run: %w", err)
	}
	return statusOf(cmd)
}

// contain prepares the process that becomes the command.
func (r *runner) contain() (gate *os.File, cmd *exec.Cmd, err error) {
	pr, pw, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cmd = exec.Command(self, append([]string{runInit, r.options.resolvConf, r.path}, r.args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{pr}
	cmd.Env = commandEnvironment(os.Environ())
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	netns.Contain(cmd, r.options.keepID, r.options.resolvConf != "")
	return pw, cmd, nil
}

// attach connects the process, starting the engine again should it have ended
// between being found and being asked.
func (r *runner) attach(ctx context.Context, pid int) (node.AttachmentStatus, error) {
	req := r.want
	req.PID = pid
	return r.engine.attach(ctx, req)
}

func parseAddress(text string, r *node.AttachRequest) error {
	if text == "" {
		return nil
	}
	ip, err := netip.ParseAddr(text)
	if err != nil || !ip.Is4() {
		return fmt.Errorf("--address %q: expected an IPv4 address", text)
	}
	r.Addr = ip
	return nil
}

// commandEnvironment leaves out what is for this program only.
func commandEnvironment(environ []string) []string {
	return demoEnvironment(environ)
}

// statusOf is the command's end as our own.
func statusOf(cmd *exec.Cmd) error {
	ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
	switch {
	case ws.Signaled():
		return exitStatus(128 + int(ws.Signal()))
	case ws.ExitStatus() != 0:
		return exitStatus(ws.ExitStatus())
	}
	return nil
}

// becomeCommand is main of the process inside the new namespaces. It waits
// for the network and then becomes the command.
func becomeCommand(args []string) int {
	fail := func(status int, err error) int {
		fmt.Fprintln(os.Stderr, "tweed: run:", err)
		return status
	}
	if len(args) < 3 {
		return fail(exitUsage, errors.New("this is for tweed itself"))
	}
	gate := os.NewFile(gateFD, "gate")
	if n, _ := gate.Read(make([]byte, 1)); n != 1 {
		return exitFailed // the parent has said why
	}
	gate.Close()
	if args[0] != "" {
		if err := mountResolvConf(args[0]); err != nil {
			return fail(exitFailed, err)
		}
	}
	err := syscall.Exec(args[1], args[2:], os.Environ())
	if errors.Is(err, unix.ENOENT) {
		return fail(exitNotFound, fmt.Errorf("%s: %w", args[1], err))
	}
	return fail(exitNotExecutable, fmt.Errorf("%s: %w", args[1], err))
}

func mountResolvConf(file string) error {
	// Nothing of what is mounted here shall be seen outside.
	err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if err == nil {
		err = unix.Mount(file, "/etc/resolv.conf", "", unix.MS_BIND, "")
	}
	if err != nil {
		return fmt.Errorf("--resolv-conf %s: %w", file, err)
	}
	return nil
}

// signalRelay passes signals on to the command.
type signalRelay struct {
	c      chan os.Signal
	target chan *os.Process
	done   chan struct{}
}

// relaySignals catches signals from now on. Before there is a command, one that
// would end it makes early be called. What the terminal sends to the whole foreground group reaches the
// command without our help.
func relaySignals(early func(syscall.Signal)) *signalRelay {
	s := &signalRelay{c: make(chan os.Signal, 8), target: make(chan *os.Process, 1), done: make(chan struct{})}
	signal.Notify(s.c, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH)
	foreground := inForeground()
	go func() {
		defer close(s.done)
		var p *os.Process
		for {
			select {
			case p = <-s.target:
			case sig, open := <-s.c:
				if !open {
					return
				}
				fromTerminal := foreground && (sig == unix.SIGINT || sig == unix.SIGQUIT || sig == unix.SIGWINCH)
				switch {
				case p != nil && !fromTerminal:
					_ = p.Signal(sig)
				case p == nil && (sig == unix.SIGINT || sig == unix.SIGTERM || sig == unix.SIGHUP || sig == unix.SIGQUIT):
					early(sig.(syscall.Signal))
				}
			}
		}
	}()
	return s
}

func (s *signalRelay) to(p *os.Process) { s.target <- p }

func (s *signalRelay) stop() {
	signal.Stop(s.c)
	close(s.c)
	<-s.done
}

// inForeground reports whether the terminal's signals go to our group.
func inForeground() bool {
	group, err := unix.IoctlGetInt(int(os.Stdin.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}
