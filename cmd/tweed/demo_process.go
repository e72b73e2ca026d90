package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tweed/netns"
)

// demoStopTime is what a process gets to end by itself before it is killed.
const demoStopTime = 5 * time.Second

// demoProcess is one running command of the demo: this program again, with
// its output in a file.
type demoProcess struct {
	Name string
	cmd  *exec.Cmd
	log  string
	// ended is closed after the process has been waited for.
	ended chan struct{}
}

// serve runs this program with args inside a namespace until the demo ends;
// if it ends before, the demo fails.
func (d *demo) serve(where *netns.Namespace, name string, files []*os.File, args ...string) (*demoProcess, error) {
	return d.start(where, name, true, files, args...)
}

// call runs this program with args inside a namespace and waits for it.
func (d *demo) call(ctx context.Context, where *netns.Namespace, name string, args ...string) error {
	p, err := d.start(where, name, false, nil, args...)
	if err != nil {
		return err
	}
	select {
	case <-p.ended:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if !p.cmd.ProcessState.Success() {
		return &demoProcessError{p, fmt.Errorf("%s: %s", name, p.cmd.ProcessState)}
	}
	return nil
}

// start starts a process. A demo that is not kept takes its processes with it
// however it ends.
func (d *demo) start(where *netns.Namespace, name string, forever bool, files []*os.File, args ...string) (*demoProcess, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &demoProcess{Name: name, log: filepath.Join(d.dir.path, name+".log"), ended: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.cmd = exec.Command(self, args...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.ExtraFiles = files
	p.cmd.Env = demoEnvironment(os.Environ())
	// A session of its own: Ctrl-C is for the demo, which stops the rest in order.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if !d.o.keep {
		p.cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
		// Until the last of them has ended, the folder is in use.
		p.cmd.ExtraFiles = append(slices.Clip(files), d.dir.lock)
	}
	if err := d.launcher.Start(where, p.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.cmd.Wait()
		close(p.ended)
	}()
	if forever {
		go func() {
			<-p.ended
			d.fail(&demoProcessError{p, fmt.Errorf("%s ended: %s", p.Name, p.cmd.ProcessState)})
		}()
	}
	d.processes = append(d.processes, p)
	if d.o.keep {
		return p, d.note()
	}
	return p, nil
}

// note writes down what runs so far, for the case that the demo is killed before
// it is complete.
func (d *demo) note() error {
	var r record
	var err error
	if r.Processes, err = d.running(); err != nil {
		return err
	}
	r.Builder.Name, r.Builder.PID = "demo", os.Getpid()
	if r.Builder.Start, err = startTime(r.Builder.PID); err != nil {
		return err
	}
	return r.writeFile(filepath.Join(d.dir.path, demoBuilding))
}

// running are the processes that have not ended, in the order in which they are
// stopped.
func (d *demo) running() (list []kept, err error) {
	for i := len(d.processes) - 1; i >= 0; i-- {
		p := d.processes[i]
		select {
		case <-p.ended:
			continue
		default:
		}
		k, err := keep(p)
		if errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrNotExist) {
			continue // it has just ended
		}
		if err != nil {
			return nil, err
		}
		list = append(list, k)
	}
	return list, nil
}

// demoEnvironment leaves out what would configure a child behind our back.
func demoEnvironment(environ []string) []string {
	var kept []string
	for _, e := range environ {
		if !strings.HasPrefix(e, "TWEED_") && !strings.HasPrefix(e, "NOTIFY_SOCKET=") {
			kept = append(kept, e)
		}
	}
	return kept
}

// await calls ready until it says yes.
func (p *demoProcess) await(ctx context.Context, patience time.Duration, ready func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		yes, err := ready(ctx)
		if yes {
			return nil
		}
		if err != nil && ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			if cause := context.Cause(ctx); !errors.Is(cause, context.DeadlineExceeded) {
				return cause
			}
			err := fmt.Errorf("%s was not ready after %s", p.Name, patience)
			return &demoProcessError{p, errors.Join(err, last)}
		case <-tick.C:
		}
	}
}

// demoProcessError is a failure that the process's log may explain.
type demoProcessError struct {
	process *demoProcess
	err     error
}

func (e *demoProcessError) Error() string { return e.err.Error() }
func (e *demoProcessError) Unwrap() error { return e.err }

// tail returns the last lines of the process's log.
func (p *demoProcess) tail(lines int) string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}

// stop ends the process and waits for it.
func (p *demoProcess) stop() {
	p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.ended:
		return
	case <-time.After(demoStopTime):
	}
	p.cmd.Process.Kill()
	<-p.ended
}

// kept is a process of a demo that was left running, as its record names it.
// The start time tells it from another process that got the same pid.
type kept struct {
	Name  string `json:"name"`
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
}

func keep(p *demoProcess) (kept, error) {
	start, err := startTime(p.cmd.Process.Pid)
	return kept{Name: p.Name, PID: p.cmd.Process.Pid, Start: start}, err
}

// startTime is field 22 of /proc/PID/stat: clock ticks since boot. A process that
// has ended and only waits for its parent to notice counts as gone.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field may hold blanks and parentheses; the last one closes it.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat: too short", pid)
	}
	if state := string(fields[0]); state == "Z" || state == "X" {
		return 0, fmt.Errorf("process %d: %w", pid, unix.ESRCH)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// stop ends a process that is no child of ours. It reports whether it was
// still there.
func (k kept) stop() (bool, error) {
	fd, err := unix.PidfdOpen(k.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("process %d (%s): %w", k.PID, k.Name, err)
	}
	defer unix.Close(fd)
	// With the descriptor open the pid cannot be reused any more.
	if start, err := startTime(k.PID); err != nil || start != k.Start {
		return false, nil
	}
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return true, fmt.Errorf("process %d (%s): %w", k.PID, k.Name, err)
		}
		if gone, err := pidfdWait(fd, demoStopTime); gone || err != nil {
			return true, err
		}
	}
	return true, fmt.Errorf("process %d (%s): still there after SIGKILL", k.PID, k.Name)
}

// pidfdWait waits until the process ends, for at most patience.
func pidfdWait(fd int, patience time.Duration) (bool, error) {
	deadline := time.Now().Add(patience)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return false, nil
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return false, fmt.Errorf("wait: %w", err)
		}
		if n == 1 {
			return true, nil
		}
	}
}
