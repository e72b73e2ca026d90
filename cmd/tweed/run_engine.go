package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tweed/node"
)

const (
	// enginePatience is how long run waits for an engine it started to forward.
	enginePatience = 30 * time.Second
	// hintTime is how long it waits before it says what for.
	hintTime = 2 * time.Second
	// idleTime is how long an engine started by run waits for the overlay, and
	// then for the first attachment. It is longer than enginePatience, so that
	// who waits for it is told what it waits for.
	idleTime = 40 * time.Second
	// goneTime is how long run waits for it to end after the last one.
	goneTime = 30 * time.Second
	// attachTries bounds how often an engine that ends while it is being asked
	// is started again.
	attachTries = 3
)

// engineProcess is the engine a command is attached to: one that was running,
// or one started for it.
type engineProcess struct {
	ctx context.Context
	api *node.Client
	cmd *cobra.Command
	// flags are those of tweed up, as the user gave them.
	flags *flag.FlagSet
	cfg   node.Config
	own   *exec.Cmd // nil for one that was running
	log   *os.File  // of own
	done  chan struct{}
	used  bool // something was attached
	pid   int
	// process is a pidfd of one that was running. shared says that another command
	// started it, and that it ends when nothing is attached any more.
	process *os.File
	shared  bool
	// args are what it was started with, nil if that is not known.
	args []string
}

// findEngine finds this user's engine or starts one.
func findEngine(ctx context.Context, cmd *cobra.Command, flags *flag.FlagSet, cfg node.Config) (*engineProcess, error) {
	e := &engineProcess{ctx: ctx, cmd: cmd, flags: flags, cfg: cfg}
	return e, e.find()
}

func (e *engineProcess) find() error {
	path := ""
	if e.cfg.Socket != "" || e.cfg.StateDir != "" {
		path = node.SocketPath(e.cfg)
	} else {
		live, err := node.LiveSockets()
		if err != nil {
			return err
		}
		if len(live) > 1 {
			return fmt.Errorf("run: %d engines run here: choose one with --socket: %s", len(live), strings.Join(live, ", "))
		}
		if len(live) == 1 {
			path = live[0]
		}
	}
	if path != "" && node.Answers(path) {
		e.api = node.Dial(path)
		e.share()
		return nil
	}
	return e.start()
}

// share looks which process the engine that was found is, and whether it ends when
// nobody uses it.
func (e *engineProcess) share() {
	s, err := e.api.Status(e.ctx)
	if err != nil {
		return
	}
	if fd, err := unix.PidfdOpen(s.PID, 0); err == nil {
		e.process, e.pid, e.shared = os.NewFile(uintptr(fd), "engine"), s.PID, s.EndsWhenIdle
		e.args = argumentsOf(s.PID)
	}
}

// start starts an engine that ends when nothing is attached any more, and waits
// until it forwards.
func (e *engineProcess) start() error {
	args := []string{"up", "--attach-only", "--exit-when-idle"}
	e.flags.VisitAll(func(f *flag.Flag) {
		if !e.cmd.Flags().Changed(f.Name) {
			return
		}
		values := []string{f.Value.String()}
		if r, ok := f.Value.(interface{ Values() []string }); ok {
			values = r.Values()
		}
		for _, v := range values {
			args = append(args, "--"+f.Name+"="+v)
		}
	})
	if err := e.launch(args, node.SocketPath(e.cfg)); err != nil {
		return err
	}
	return e.await()
}

// launch starts an engine. Its log goes to a file without a name, to be read when
// it fails.
func (e *engineProcess) launch(args []string, socket string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.CreateTemp("", "tweed-run-*.log")
	if err != nil {
		return err
	}
	os.Remove(log.Name())
	e.api, e.args, e.log = node.Dial(socket), args, log
	e.own = exec.Command(self, args...)
	e.own.Stdout, e.own.Stderr = e.log, e.log
	e.own.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := e.own.Start(); err != nil {
		e.own = nil
		log.Close()
		return fmt.Errorf("run: start the engine: %w", err)
	}
	e.pid = e.own.Process.Pid
	own, done := e.own, make(chan struct{})
	e.done = done
	go func() {
		_ = own.Wait()
		close(done)
	}()
	return nil
}

// await waits until the engine forwards.
func (e *engineProcess) await() error {
	deadline := time.After(enginePatience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var problems []string
	hint := time.After(hintTime)
	for {
		s, err := e.api.Status(e.ctx)
		if err == nil && s.Ready {
			return nil
		}
		if err == nil {
			problems = s.Problems
		}
		select {
		case <-e.done:
			return fmt.Errorf("run: %s", e.lastWords())
		case <-deadline:
			return fmt.Errorf("run: the engine does not forward after %s: %s", enginePatience, strings.Join(append(problems, "see tweed up --attach-only"), "; "))
		case <-e.ctx.Done():
			return context.Cause(e.ctx)
		case <-hint:
			if hint = nil; len(problems) > 0 {
				fmt.Fprintf(e.cmd.ErrOrStderr(), "tweed: run: waiting for the overlay, up to %s: %s\n", enginePatience, problems[0])
			}
		case <-tick.C:
		}
	}
}

// lastWords is the line an engine that failed has ended with.
func (e *engineProcess) lastWords() string {
	b := make([]byte, 64<<10)
	n, err := e.log.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(b[:n]), []byte("\n"))
	last := string(lines[len(lines)-1])
	last = strings.TrimPrefix(last, "tweed: ")
	if last == "" {
		return "the engine ended: " + e.own.ProcessState.String()
	}
	return strings.ReplaceAll(last, "tweed up --help", "tweed run --help")
}

// attach asks the engine, and starts another one if that has just ended.
func (e *engineProcess) attach(ctx context.Context, r node.AttachRequest) (node.AttachmentStatus, error) {
	for try := 1; ; try++ {
		s, err := e.api.Attach(ctx, r)
		e.used = e.used || err == nil
		if err == nil || try == attachTries || node.Answers(e.api.Path()) {
			return s, err
		}
		e.let()
		if err := e.find(); err != nil {
			return node.AttachmentStatus{}, err
		}
	}
}

// close ends an engine that was started for us, unless others use it by now.
func (e *engineProcess) close() {
	if e.api == nil {
		return
	}
	defer e.api.Close()
	if e.own == nil && (!e.shared || !e.used) {
		return
	}
	if e.own != nil {
		defer e.log.Close()
	}
	a, err := e.api.Attachments(context.Background())
	if err == nil && !onlyEnded(a) {
		return
	}
	if !e.used {
		// It would wait for the first attachment. One that was used ends by
		// itself, and a signal on its way out would kill it.
		_ = e.own.Process.Signal(syscall.SIGTERM)
	}
	e.awaitEnd()
}

// awaitEnd waits until the engine has ended: who looks at the processes after
// the command finds none of ours. Somebody else may attach to it meanwhile.
func (e *engineProcess) awaitEnd() {
	late := time.After(goneTime)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-e.done:
			return
		case <-late:
			fmt.Fprintf(e.cmd.ErrOrStderr(), "tweed: run: the engine, pid %d, still runs %s after it was last used\n", e.pid, goneTime)
			return
		case <-tick.C:
			if e.own == nil && e.ended() {
				return
			}
			if a, err := e.api.Attachments(context.Background()); err == nil && !onlyEnded(a) {
				return
			}
		}
	}
}

// onlyEnded reports whether all that is attached are processes that are gone.
func onlyEnded(a node.AttachmentsAnswer) bool {
	for _, s := range a.Attachments {
		if s.PID == 0 {
			return false
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", s.PID)); err == nil {
			return false
		}
	}
	return true
}

// endWhenIdle ends an engine of run: when the last attachment has gone, or
// when none comes, be there an overlay or not.
func endWhenIdle(ctx context.Context, n *node.Node, end func()) {
	starter, idle := os.Getppid(), idleEngine{since: time.Now()}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-n.Ready():
			idle.joins(time.Now())
		default:
		}
		attached, ever := n.Attached()
		if idle.over(time.Now(), attached, ever > 0, os.Getppid() == starter) {
			end()
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// idleEngine knows when an engine of run has nobody left to serve.
type idleEngine struct {
	since        time.Time // the start, or when it began to forward
	joined, used bool
}

// joins is called once the engine forwards: who waited for that attaches now.
func (i *idleEngine) joins(now time.Time) {
	if !i.joined {
		i.joined, i.since = true, now
	}
}

// over decides from the number of attachments, whether there were any that a
// look like this has missed, and whether the command that started the engine
// still runs. One that finds the engine in its last moment starts another.
func (i *idleEngine) over(now time.Time, attached int, used, starter bool) bool {
	i.used = i.used || used || attached > 0
	return attached == 0 && (i.used || !starter || now.Sub(i.since) > idleTime)
}
