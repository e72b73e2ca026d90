package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"tweed/netns"
)

const (
	// stepSlack is what a step may take beyond the time its traffic runs.
	stepSlack = 15 * time.Second
	// stopGrace is what a process gets to end after SIGTERM.
	stopGrace = 5 * time.Second
)

// process is a program that runs beside the harness, such as an engine.
type process struct {
	name string
	cmd  *exec.Cmd
	log  string
	done chan struct{}
	// err is how it ended; valid once done is closed.
	err error
}

// start starts a program in a namespace, nil for the harness's own. It dies
// with the harness, however that ends, and has a process group of its own, so
// that Ctrl-C reaches it only through the harness.
func (b *bench) start(ns *netns.Namespace, name, path string, args ...string) (*process, error) {
	return b.startCommand(ns, name, command(path, args...))
}

// startContained is start in a user and a network namespace of its own.
func (b *bench) startContained(ns *netns.Namespace, name, path string, args ...string) (*process, error) {
	cmd := command(path, args...)
	netns.Contain(cmd, false, false)
	return b.startCommand(ns, name, cmd)
}

func (b *bench) startCommand(ns *netns.Namespace, name string, cmd *exec.Cmd) (*process, error) {
	b.logs++
	p := &process{
		name: name,
		cmd:  cmd,
		log:  filepath.Join(b.dir, fmt.Sprintf("%03d-%s.log", b.logs, name)),
		done: make(chan struct{}),
	}
	f, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p.cmd.Stdout, p.cmd.Stderr = f, f
	if err := b.launcher.Start(ns, p.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// output runs a program in a namespace to its end and returns its standard
// output. The error of a program that failed holds its standard error.
func (b *bench) output(ctx context.Context, ns *netns.Namespace, path string, args ...string) ([]byte, error) {
	cmd := command(path, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := b.launcher.Start(ns, cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	stopKill := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stopKill()
	err := cmd.Wait()
	if ctx.Err() != nil {
		err = fmt.Errorf("%w (stopped after its time was up)", context.Cause(ctx))
	}
	if err != nil {
		if s := strings.TrimSpace(stderr.String()); s != "" {
			err = fmt.Errorf("%w: %s", err, s)
		}
		return stdout.Bytes(), fmt.Errorf("%s %s: %w", filepath.Base(path), strings.Join(args, " "), err)
	}
	return stdout.Bytes(), nil
}

func command(path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	return cmd
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// running returns an error with the end of the log once the process has ended.
func (p *process) running() error {
	select {
	case <-p.done:
		if p.err != nil {
			return fmt.Errorf("%s ended: %w%s", p.name, p.err, p.tail())
		}
		return fmt.Errorf("%s ended%s", p.name, p.tail())
	default:
		return nil
	}
}

// stop ends the process: SIGTERM, and SIGKILL after grace.
func (p *process) stop(grace time.Duration) {
	if grace > 0 {
		p.cmd.Process.Signal(syscall.SIGTERM) // fails only when it has ended
		select {
		case <-p.done:
			return
		case <-time.After(grace):
		}
	}
	p.cmd.Process.Kill()
	<-p.done
}

// tail is the end of what the process printed, on lines of its own; empty when
// it printed nothing.
func (p *process) tail() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return ""
	}
	return lastLines(string(text), 6)
}

// lastLines is the last n lines of s, each indented on a line of its own.
func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	lines = lines[max(0, len(lines)-n):]
	out := ""
	for _, l := range lines {
		if l = strings.TrimSpace(l); l != "" {
			out += "\n      " + l
		}
	}
	return out
}

// waitFor calls try every 20 ms until it returns nil, at most for limit. Its
// error is try's last.
func waitFor(ctx context.Context, limit time.Duration, try func() error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		var stop *giveUp
		if errors.As(err, &stop) {
			return stop.error
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// giveUp marks an error that trying again cannot help.
type giveUp struct{ error }

// sleep waits for d or for the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
