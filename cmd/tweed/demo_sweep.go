package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// sweeperArg is the first argument of a demo's sweeper, the run directory is the
// second.
const sweeperArg = "__demo-sweep"

// demoSweeper is a process that does what a demo cannot do after SIGKILL: remove
// its folder. It waits for the demo's end at a pipe whose other end the demo alone
// holds, and is killed by a demo that has left nothing for it.
type demoSweeper struct {
	cmd *exec.Cmd
	// demo is the end of the pipe that closes with this process.
	demo *os.File
}

// startDemoSweeper is called before the demo makes anything below base.
func startDemoSweeper(base string) (*demoSweeper, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if base, err = filepath.Abs(base); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	s := &demoSweeper{cmd: exec.Command(self, sweeperArg, base), demo: w}
	s.cmd.Stdin = r
	// It holds nobody's directory, and Ctrl-C and the terminal's end are not for it.
	s.cmd.Dir = "/"
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.cmd.Start(); err != nil {
		w.Close()
		return nil, fmt.Errorf("start the demo's sweeper: %w", err)
	}
	return s, nil
}

// follow names the demo's folder. A sweeper that is gone is no reason to fail: the
// next demo sweeps as well.
func (s *demoSweeper) follow(d *demoDir) { _, _ = io.WriteString(s.demo, filepath.Base(d.path)) }

// dismiss ends the sweeper; it may be called once.
func (s *demoSweeper) dismiss() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait() // it was killed
	s.demo.Close()
}

// sweepAfterDemo is the sweeper's main. Nobody listens to it.
func sweepAfterDemo(base string) int {
	name, err := io.ReadAll(os.Stdin)
	if err == nil && len(name) > 0 {
		err = awaitDemoProcesses(filepath.Join(base, string(name)))
	}
	if err == nil {
		err = sweepBase(base)
	}
	if err != nil {
		return exitFailed
	}
	return exitGood
}

// awaitDemoProcesses waits until nothing of the demo at path holds its lock any
// more. That of one that is kept, or should have been, is not waited for: in the
// second case it is enough that the demo itself has ended.
func awaitDemoProcesses(path string) error {
	if _, err := readRecord(path); err == nil {
		return nil
	}
	if r, err := readRecordFile(filepath.Join(path, demoBuilding)); err == nil {
		// Its end of the pipe was closed a moment before.
		for r.Builder.runs() {
			time.Sleep(10 * time.Millisecond)
		}
		return nil
	}
	f, err := os.Open(filepath.Join(path, demoLock))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// sweepBase removes what nobody holds in the run directory, and that if it is empty.
func sweepBase(base string) error {
	if _, err := os.Stat(base); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	guard, err := openDemoBase(base)
	if err != nil {
		return err
	}
	defer guard.Close()
	_, err = sweepDemos(base)
	removeDemoBase(base)
	return err
}

// writers are the processes whose standard output is a log in the demo's folder: the
// demo may have been killed after it had started one and before it wrote that down.
func writers(path string) (list []kept) {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	outputs, _ := filepath.Glob("/proc/[0-9]*/fd/1") // the pattern is a good one
	for _, output := range outputs {
		file, err := os.Readlink(output)
		if err != nil || filepath.Dir(file) != path {
			continue // it has ended, or is somebody else's
		}
		var k kept
		if _, err := fmt.Sscanf(output, "/proc/%d/", &k.PID); err != nil {
			continue
		}
		if k.Start, err = startTime(k.PID); err == nil {
			k.Name = strings.TrimSuffix(filepath.Base(file), ".log")
			list = append(list, k)
		}
	}
	return list
}
