package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tweed/node"
)

const (
	// engineLook is how often an engine that is no child of ours is looked at.
	engineLook = 200 * time.Millisecond
	// againPause is between two starts of an engine that ends again and again.
	againPause = time.Second
)

// guard looks after the engine of a command that runs: one that was killed is
// started again and takes the command back. What cannot be mended is said once.
type guard struct {
	engine *engineProcess
	// pid is the command's.
	pid    int
	name   string
	last   time.Time // of the last start of an engine
	stderr io.Writer
	cancel context.CancelFunc
	done   chan struct{}
}

// startGuard uses the engine alone until stop.
func startGuard(ctx context.Context, e *engineProcess, pid int, path string, stderr io.Writer) *guard {
	g := &guard{engine: e, pid: pid, name: filepath.Base(path), stderr: stderr, done: make(chan struct{})}
	ctx, g.cancel = context.WithCancel(ctx)
	e.ctx = ctx
	go func() {
		defer close(g.done)
		for g.awaitGone(ctx) && g.mend(ctx) {
		}
	}()
	return g
}

func (g *guard) stop() {
	g.cancel()
	<-g.done
}

func (g *guard) say(format string, args ...any) {
	fmt.Fprintf(g.stderr, "tweed: run: "+format+"\n", args...)
}

// awaitGone waits until the engine has ended, false if the command is over first.
func (g *guard) awaitGone(ctx context.Context) bool {
	if g.engine.own != nil {
		select {
		case <-ctx.Done():
			return false
		case <-g.engine.done:
			return true
		}
	}
	for !g.engine.ended() {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(engineLook):
		}
	}
	return true
}

// mend does what there is to be done about an engine that has ended, and reports
// whether to look after the next one.
func (g *guard) mend(ctx context.Context) bool {
	if _, err := startTime(g.pid); err != nil {
		return false // the command has ended as well
	}
	e, was := g.engine, g.engine.pid
	if e.own == nil && !e.shared {
		return g.awaitDaemon(ctx)
	}
	if !e.killed() {
		g.say("the engine, pid %d, was stopped or has let go of %s, which is not on the overlay any more", was, g.name)
		return false
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(time.Until(g.last.Add(againPause))):
	}
	g.last = time.Now()
	err := g.startAgain(ctx)
	switch {
	case ctx.Err() != nil:
		return false
	case err != nil:
		g.say("the engine, pid %d, was killed, and %s has no network: %v; type: tweed up --attach-only, with the flags of this command", was, g.name, err)
		return false
	}
	g.say("the engine, pid %d, was killed; pid %d was started and has taken %s back", was, e.pid, g.name)
	return true
}

// awaitDaemon waits for an engine that others start and end.
func (g *guard) awaitDaemon(ctx context.Context) bool {
	e := g.engine
	g.say("the engine, pid %d, has ended, and %s has no network until it runs again; type: %s", e.pid, g.name, e.command())
	for !node.Answers(e.api.Path()) {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(engineLook):
		}
	}
	e.process.Close()
	e.process = nil
	e.share()
	if err := g.takenBack(ctx); err != nil {
		if ctx.Err() == nil {
			g.say("the engine runs again, but %s has no network: %v", g.name, err)
		}
		return false
	}
	g.say("the engine runs again, pid %d, and has taken %s back", e.pid, g.name)
	return true
}

// startAgain starts the engine as it was started before, unless another command
// was faster, and waits until it has taken the command back.
func (g *guard) startAgain(ctx context.Context) (err error) {
	e := g.engine
	path, args := e.api.Path(), e.args
	if args == nil {
		return errors.New("its command line could not be read")
	}
	for range attachTries {
		e.let()
		if node.Answers(path) {
			e.api = node.Dial(path)
			e.share()
		} else if err := e.launch(args, path); err != nil {
			return err
		}
		if err = g.takenBack(ctx); !errors.Is(err, errEngineEnded) {
			return err
		}
		// Another command may have been starting it at the same time.
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(againPause):
		}
	}
	return err
}

var errEngineEnded = errors.New("the engine ended again")

// takenBack waits until the engine has connected the command.
func (g *guard) takenBack(ctx context.Context) error {
	e := g.engine
	hint := time.After(enginePatience)
	for {
		if e.own == nil && e.process == nil {
			if e.share(); e.process == nil && !node.Answers(e.api.Path()) {
				return errEngineEnded
			}
		}
		s, err := e.api.Status(ctx)
		i := slices.IndexFunc(s.Attachments, func(a node.AttachmentStatus) bool { return a.PID == g.pid })
		switch {
		case err != nil:
		case i >= 0 && s.Attachments[i].State == "up":
			e.used = true
			return nil
		case i < 0 && s.Ready:
			why := fmt.Sprintf("the engine, pid %d, does not know it; type: tweed attach --pid %d", s.PID, g.pid)
			return errors.New(strings.Join(append([]string{why}, s.Problems...), "; "))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-e.done:
			return fmt.Errorf("%w: %s", errEngineEnded, e.lastWords())
		case <-hint:
			g.say("the engine was killed and started again, but %s has no network yet, after %s: %s", g.name, enginePatience, strings.Join(s.Problems, "; "))
		case <-time.After(engineLook / 4):
			if e.own == nil && e.ended() {
				return errEngineEnded
			}
		}
	}
}

// killed reports whether an engine of run that has ended did so without being
// asked to: it has left its socket behind then.
func (e *engineProcess) killed() bool {
	if e.own != nil {
		return !e.own.ProcessState.Success()
	}
	// Somebody who starts it again removes the socket for a moment.
	for range 10 {
		if _, err := os.Lstat(e.api.Path()); err == nil {
			return true
		}
		time.Sleep(engineLook / 4)
	}
	return false
}

// let gives up an engine that has ended.
func (e *engineProcess) let() {
	e.api.Close()
	if e.own != nil {
		e.log.Close()
	}
	if e.process != nil {
		e.process.Close()
	}
	e.own, e.done, e.process, e.shared, e.used = nil, nil, nil, false, false
}

// command is what to type to start an engine that others had started.
func (e *engineProcess) command() string {
	if e.args == nil {
		return "tweed up"
	}
	return "tweed " + strings.Join(e.args, " ")
}

// argumentsOf are the arguments a process was started with, nil if they cannot be
// read.
func argumentsOf(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	argv := strings.Split(string(bytes.TrimSuffix(b, []byte{0})), "\x00")
	if err != nil || len(argv) < 2 {
		return nil
	}
	return argv[1:]
}

// ended reports whether the process of an engine that was found has ended, waited
// for by its parent or not.
func (e *engineProcess) ended() bool {
	if e.process == nil {
		return false
	}
	fds := []unix.PollFd{{Fd: int32(e.process.Fd()), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return n > 0 && err == nil
}
